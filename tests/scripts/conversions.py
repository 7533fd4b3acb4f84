"""What the tests of scripts/convert.py share: models, runs, and the command itself."""

import functools
import json

import jax
import numpy as np

from scripts import convert
from sira_jax.checkpoints import adapter_file, fingerprint
from sira_jax.models import Decoder
from sira_jax.training import loop
from tests.checkpoints.test_base_model import WORD_TOKENIZER
from tests.hf_models import weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE, make_plan
from tests.tiny import draw

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ADAPTERS = {
    "lora": {"method": "lora", "rank": 2, "targets": ["q", "down"]},
    "dora": {"method": "dora", "rank": 2, "overrides": [["down", {"rank": 3}]]},
    "sira": {"method": "sira", "rank": 2, "num_experts": 4, "num_selected_experts": 2},
    "reslora": {"method": "reslora", "rank": 2, "connection": "middle"},
    "milora": {"method": "milora", "rank": 2, "targets": ["q", "v"], "num_selected_experts": 1},
}


def make_model(folder):
    """A Hugging Face folder in two shards with a tokenizer, and tensors that loaders pass over."""
    shape = SHAPE | {"tie_word_embeddings": True, "eos_token_id": [2, 1]}
    weights = weights_by_rule(shape)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_folder(folder, shape, weights, num_shards=2)
    (folder / "tokenizer.json").write_text(json.dumps(WORD_TOKENIZER))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def make_run(workdir, model, name, steps=(2,), **changes):
    """A run directory with drawn adapters; returns its plan and the adapter of each step."""
    plan = make_plan(model, adapter=ADAPTERS.get(name, {"method": "none"}), **changes)
    meta = {"config": plan.experiment.to_dict()}
    saved = {}
    if plan.experiment.adapter is not None:
        meta["base_fingerprint"] = fingerprint(plan.load_base().params)
        shapes = adapter_file.abstract_adapter(plan.experiment.adapter, plan.base.config)
        checkpointer = loop.make_checkpointer(workdir, plan.experiment)
        for step in steps:
            saved[step] = draw(shapes, step, 0.3)
            metrics = {"validation/loss": float(step)}
            checkpointer.save(
                step, saved[step], {"step": np.int32(step)}, {"data": {}}, meta, metrics
            )
        checkpointer.close()
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(meta))
    return plan, saved


def run(*arguments):
    parsed = convert._parser().parse_args([str(argument) for argument in arguments])
    convert.main(parsed)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _apply(config, params, adapter, batch):
    return Decoder(config, adapter).apply({"params": params}, batch)


def token_ids(vocab_size):
    """(2, 12) random tokens."""
    return np.random.default_rng(7).integers(0, vocab_size, (2, 12))


def logits(config, params, adapter=None):
    """(2, 12, V) of `token_ids`."""
    batch = {"decoder_input_tokens": token_ids(config.vocab_size)}
    return np.asarray(_apply(config, params, adapter, batch))


def files(folder):
    return sorted(path.name for path in folder.iterdir())
