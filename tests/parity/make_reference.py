"""Writes tests/models/reference_logits.json: logits as transformers computes them.

Needs torch and transformers (`make parity-setup`):

  python -m tests.parity.make_reference
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.hf_models import weights_by_rule, write_folder
from tests.parity.reference_configs import CONFIGS, NUM_TOKENS, token_ids

TARGET = Path(__file__).parents[1] / "models" / "reference_logits.json"
POSITIONS = (0, 1, NUM_TOKENS // 2, NUM_TOKENS - 1)


def main() -> None:
    models = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), config, weights_by_rule(config))
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        ids = token_ids(config["vocab_size"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        models[name] = {
            "config": config,
            "token_ids": ids,
            "positions": POSITIONS,
            "logits": [[round(x, 6) for x in logits[place].tolist()] for place in POSITIONS],
        }
    head = {
        "made_by": "tests/parity/make_reference.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "weights": "tests/hf_models.py, weights_by_rule",
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(model)}" for name, model in models.items())
    TARGET.write_text(f'{json.dumps(head)[:-1]},\n"models": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
