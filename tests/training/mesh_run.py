"""Two training steps of tiny models on given meshes; run as a module, in a process of its own or as one of several.

    python -m tests.training.mesh_run CASES.json OUT

CASES is a list of {name, kind, mesh, adapter}. The directory OUT gets NAME.npz for each, with the metrics and gradients
of both steps, and NAME.PROCESS.json with the collectives of the compiled step.
"""

import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from sira_jax.adapters import SiRAConfig
from sira_jax.models import Decoder, EncoderDecoder
from sira_jax.training import multihost
from sira_jax.training.config import MeshConfig
from sira_jax.training.partitioning import (
    BatchLayout,
    make_mesh,
    make_rules,
    optimizer_shardings,
    param_shardings,
    placed,
    replicated,
)
from sira_jax.training.train_state import TrainState, abstract_params, split_params
from sira_jax.training.train_step import make_train_step
from tests.tiny import decoder_config, decoder_params, make_batch
from tests.tiny_t5 import t5_batch, t5_config, t5_params

ROWS, LENGTH, VOCAB = 8, 8, 24
ADAPTER = {
    "num_experts": 4,
    "num_selected_experts": 2,
    "rank": 2,
    "capacity_factor": 1.0,
    "min_capacity": 1,
    "expert_dropout_rate": 0.2,
    "router_init_std": 0.5,
    "targets": ("q", "k", "o", "up", "down"),
}
# Of the second pass too: the updates of the first must have been the same.
STEPS = 2
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def _decoder(adapter):
    model = Decoder(decoder_config(vocab_size=VOCAB), adapter)
    lengths = [(5, 3), (7,), (4, 2, 2), (8,), (6,), (3, 3), (8,), (2, 5)]
    batches = [make_batch(lengths, LENGTH, seed=step, vocab=VOCAB) for step in range(STEPS)]
    return model, decoder_params(model, scale=0.25), batches


def _encoder_decoder(adapter):
    config = t5_config(vocab_size=VOCAB, num_heads=4, num_encoder_layers=2)
    model = EncoderDecoder(config, adapter)
    pairs = [[(6, 2)], [(3, 5)], [(4, 3), (4, 2)], [(8, 6)], [(2, 2)], [(5, 4)], [(7, 1)], [(3, 3)]]
    batches = [t5_batch(pairs, (LENGTH, LENGTH), seed=step, vocab=VOCAB) for step in range(STEPS)]
    return model, t5_params(model, scale=0.25), batches


KINDS = {"decoder": _decoder, "encoder_decoder": _encoder_decoder}


def place(tree, shardings):
    """Arrays of one process or of several from values that all have."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
        tree,
        shardings,
    )


def collectives(text):
    """[kind, elements of the result] of each collective in a compiled program."""
    found = []
    for shapes, kind in _COLLECTIVE.findall(text):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        counts = [int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes]
        found.append([kind, counts])
    return found


def run(case):
    adapter = SiRAConfig(**ADAPTER | case.get("adapter", {}))
    model, params, batches = KINDS[case["kind"]](adapter)
    config = MeshConfig(**case["mesh"])
    rules = make_rules(config)
    size = int(np.prod(list(config.sizes.values())))
    mesh = make_mesh(config, jax.devices()[:size])
    shardings = param_shardings(abstract_params(model), mesh, rules)
    adapter_tree, frozen = split_params(place(params, shardings))
    # The trace without decay is the last gradient.
    optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(-0.01))
    steps = case.get("accumulation_steps", 1)
    step = make_train_step(
        model,
        optimizer,
        optax.constant_schedule(0.01),
        seed=3,
        num_steps=STEPS,
        accumulation_steps=steps,
    )
    everywhere = replicated(mesh)
    moments = optimizer_shardings(
        jax.eval_shape(optimizer.init, adapter_tree),
        adapter_tree,
        split_params(shardings)[0],
        mesh,
    )
    state = TrainState(
        step=place(np.int32(0), everywhere),
        adapter=adapter_tree,
        optimizer=jax.jit(optimizer.init, out_shardings=moments)(adapter_tree),
    )
    layouts = jax.tree.map(lambda x: x.sharding, state)
    layout = BatchLayout(mesh, ROWS, rules)
    compiled, history, arrays = None, [], {}
    for batch in batches:
        local = {name: x[list(layout.rows)] for name, x in batch.items()}
        arguments = (state, frozen, layout.put(local))
        if compiled is None:
            jitted = jax.jit(placed(step, mesh, rules), out_shardings=(layouts, everywhere))
            compiled = jitted.lower(*arguments).compile()
        state, metrics = compiled(*arguments)
        gradients = jax.jit(lambda x: x, out_shardings=everywhere)(state.optimizer[0].trace)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            arrays[f"gradient/{len(history)}/{name}"] = np.asarray(leaf)
        history.append({name: float(x) for name, x in metrics.items()})
    arrays |= {f"metric/{name}": [entry[name] for entry in history] for name in history[0]}
    weights = [
        leaf.size // (leaf.shape[0] if leaf.ndim > 2 else 1) for leaf in jax.tree.leaves(frozen)
    ]
    facts = {
        "collectives": collectives(compiled.as_text()),
        "weights": sorted(set(weights)),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(adapter_tree)),
        "devices": mesh.size,
        "rows": list(layout.rows),
    }
    return arrays, facts


def main(cases_file, out):
    for case in json.loads(Path(cases_file).read_text()):
        arrays, facts = run(case)
        if multihost.is_main():
            np.savez(Path(out) / f"{case['name']}.npz", **arrays)
        facts_file = Path(out) / f"{case['name']}.{jax.process_index()}.json"
        facts_file.write_text(json.dumps(facts))


if __name__ == "__main__":
    if multihost.settings(os.environ):
        multihost.initialize()
    main(*sys.argv[1:])
