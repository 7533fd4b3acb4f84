"""What the precautions cost: python -m tests.faults.costs

Times are of the process on the CPU, so that a busy machine changes them little; the rest are the compiler's counts.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from sira_jax.adapters import SiRAConfig
from sira_jax.checkpoints import checksums
from sira_jax.models import Decoder
from sira_jax.training.bad_loss import BadLossConfig, Judge
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import fresh_state, split_params
from sira_jax.training.train_step import make_train_step
from tests.tiny import decoder_config, decoder_params, make_batch

SIZES = {
    "vocab_size": 1024,
    "emb_dim": 128,
    "mlp_dim": 352,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "max_positions": 128,
}


def seconds(function, times=1):
    """CPU time of a call."""
    since = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - since) / times


def judging():
    """CPU seconds a step that the judge takes, with a full window."""
    judge = Judge(BadLossConfig(action="skip", spike_factor=3.0))
    metrics = dict.fromkeys(("loss", "gradient_norm", "auxiliary_loss", "parameter_norm"), 1.0)

    def step():
        judge.limit()
        judge.problem(metrics)
        judge.accept(1.0)

    seconds(step, 100)
    return seconds(step, 5000)


def hashing(size=200_000_000):
    """Bytes a second of CPU time, of writing checksums and of comparing them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(np.random.default_rng(0).bytes(size))
        writing = seconds(lambda: checksums.write(Path(folder)))
        return size / writing, size / seconds(lambda: checksums.problem(Path(folder)))


def step_costs():
    """(FLOPs, bytes accessed, temporary bytes) of a compiled step that never skips, and of one that may."""
    adapter = SiRAConfig(rank=4, num_experts=16, num_selected_experts=4)
    model = Decoder(decoder_config(**SIZES), adapter)
    trained, frozen = split_params(decoder_params(model))
    config = OptimizerConfig(learning_rate=0.01)
    optimizer = make_optimizer(config, 10)
    step = make_train_step(model, optimizer, make_schedule(config, 10), seed=0, num_steps=10)
    state, batch = fresh_state(trained, optimizer), make_batch([(60, 60)] * 8, 128, seed=1)
    costs = []
    for limit in ((), (np.float32(np.inf),)):
        compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch, *limit).compile()
        cost = compiled.cost_analysis()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        costs.append((cost["flops"], cost["bytes accessed"], temporary))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (trained, frozen)]
    return *costs, sizes


def main():
    print(f"judge: {judging() * 1e6:.1f} us of CPU time a step")
    write, compare = hashing()
    print(f"checksums: {write / 1e6:.0f} MB/s written, {compare / 1e6:.0f} MB/s compared")
    without, skipping, (trained, frozen) = step_costs()
    ratios = [new / old for old, new in zip(without, skipping, strict=True)]
    print(
        f"skip: {ratios[0]:.4f} x the FLOPs, {ratios[1]:.4f} x the bytes accessed, {ratios[2]:.4f} x the temporary memory"
        f" ({trained:,} trained parameters on a base of {frozen:,}, 8 x 128 tokens)"
    )


if __name__ == "__main__":
    main()
