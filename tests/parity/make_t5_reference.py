"""Writes tests/models/t5_reference.json: logits of the T5 family as transformers computes them.

Needs torch and transformers (`make parity-setup`):

  python -m tests.parity.make_t5_reference
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

from tests.hf_models import write_folder
from tests.hf_t5_models import TINY_T5S, t5_inputs, t5_weights_by_rule

TARGET = Path(__file__).parents[1] / "models" / "t5_reference.json"
POSITIONS = (0, 1, 20, 39)


def main() -> None:
    models = {}
    for name, config in TINY_T5S.items():
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), config, t5_weights_by_rule(config))
            model = AutoModelForSeq2SeqLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        batch = t5_inputs(config["vocab_size"])
        inputs = torch.tensor(batch["encoder_input_tokens"])
        with torch.no_grad():
            logits = model(
                input_ids=inputs,
                attention_mask=(inputs != 0).long(),
                decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]),
            ).logits
        kept = [
            [[round(x, 6) for x in row[place].tolist()] for place in POSITIONS] for row in logits
        ]
        models[name] = {"config": config, "positions": POSITIONS, "logits": kept}
    head = {
        "made_by": "tests/parity/make_t5_reference.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "weights": "tests/hf_t5_models.py, t5_weights_by_rule; token ids: t5_inputs",
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(model)}" for name, model in models.items())
    TARGET.write_text(f'{json.dumps(head)[:-1]},\n"models": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
