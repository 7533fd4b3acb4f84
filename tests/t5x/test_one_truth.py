"""The same model, adapter, data, optimizer and seed train alike under T5X and natively: losses, metrics, parameters."""

import jax
import numpy as np
import pytest

from sira_jax.adapters import (
    AdaMixConfig,
    LoRAConfig,
    MoLoRAConfig,
    RACLoRAConfig,
    SiRAConfig,
    is_trained,
    partition,
)
from sira_jax.training.config import OptimizerConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import fresh_state, split_params
from sira_jax.training.train_step import make_train_step
from tests.t5x.tiny_t5x import (
    MISSING,
    SEED,
    STEPS,
    T5XRun,
    decoder,
    encoder_decoder,
    example_batches,
    fresh_params,
    native_batch,
    t5x_model,
)

pytestmark = pytest.mark.t5x
pytest.importorskip("t5x", reason=MISSING, exc_type=ImportError)

OPTIMIZER = OptimizerConfig(
    learning_rate=0.02, schedule="cosine", warmup_steps=1, weight_decay=0.1, clip_norm=0.5
)
SIRA = SiRAConfig(
    rank=2,
    num_experts=4,
    num_selected_experts=2,
    targets=("query", "wi_0"),
    dropout_rate=0.2,
    expert_dropout_rate=0.3,
    load_balance_loss_weight=0.1,
)
GROWING = SiRAConfig(
    rank=2, num_experts=4, num_selected_experts=2, targets=("q",), router_regularizer="smoe_dropout"
)
# (module, packed rows, microbatches)
RUNS = {
    "sira": (encoder_decoder(SIRA), True, 1),
    "lora": (encoder_decoder(LoRAConfig(rank=2, targets="key", dropout_rate=0.2)), False, 2),
    "adamix": (encoder_decoder(AdaMixConfig(rank=2, targets="wo", dropout_rate=0.1)), False, 1),
    # Routers whose number of chosen experts follows the training's progress.
    "growing": (decoder(GROWING), True, 2),
    "molora": (
        decoder(MoLoRAConfig(rank=2, num_experts=3, targets="v", load_balance_loss_weight=0.1)),
        False,
        1,
    ),
    # Merges at a step's end and starts the optimizer's moments anew.
    "rac_lora": (decoder(RACLoRAConfig(rank=2, targets="down", merge_every=2)), False, 1),
}
SAME = ("loss", "auxiliary_loss", "accuracy", "gradient_norm", "parameter_norm", "learning_rate")


@pytest.fixture(scope="module", params=RUNS)
def both(request):
    """(T5X's run, native state, their metrics, the parameters before)."""
    module, packed, microbatches = RUNS[request.param]
    from sira_jax.t5x_integration.optimizer import adapter_optimizer

    before = fresh_params(module)
    adapter, frozen = split_params(before)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    step = make_train_step(
        module,
        optimizer,
        make_schedule(OPTIMIZER, STEPS),
        seed=SEED,
        num_steps=STEPS,
        accumulation_steps=microbatches,
    )
    step, state = jax.jit(step), fresh_state(adapter, optimizer)
    run = T5XRun(
        t5x_model(module, adapter_optimizer(STEPS, OPTIMIZER)), before, microbatches=microbatches
    )
    native, t5x = [], []
    for batch in example_batches(module, STEPS, packed=packed):
        state, metrics = step(state, frozen, native_batch(batch))
        native.append({name: float(x) for name, x in metrics.items()})
        t5x.append(run.step(batch))
    return run, state, (native, t5x), before


def test_losses_and_metrics_step_by_step(both):
    _, _, (native, t5x), _ = both
    routers = [name for name in native[0] if name.startswith("router/")]
    for ours, theirs in zip(native, t5x, strict=True):
        for name in (*SAME, *routers):
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({metrics["loss"] for metrics in t5x}) == STEPS


def test_adapter_and_optimizer_state_after_all_steps(both):
    run, state, _, before = both
    ours, start = split_params(run.params)[0], split_params(before)[0]
    moved = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))), ours, start)
    assert max(jax.tree.leaves(moved)) > 1e-3
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, ours, jax.device_get(state.adapter))
    jax.tree.map(close, jax.device_get(run.state.param_states), jax.device_get(state.optimizer))
    assert int(run.state.step) == STEPS


def test_the_base_is_bitwise_unchanged_and_has_no_optimizer_state(both):
    run, _, _, before = both
    base, was = split_params(run.params)[1], split_params(before)[1]
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), base, was)
    assert all(jax.tree.leaves(same))
    trained, _ = partition(run.params, is_trained)
    expected = make_optimizer(OPTIMIZER, STEPS).init(trained)
    sizes = [
        sorted(x.size for x in jax.tree.leaves(tree)) for tree in (run.state.param_states, expected)
    ]
    assert sizes[0] == sizes[1]


def test_a_fresh_adapter_is_native_trainings():
    module = RUNS["sira"][0]
    run = T5XRun(t5x_model(module))
    expected, _ = split_params(fresh_params(module))
    jax.tree.map(np.testing.assert_array_equal, split_params(run.params)[0], expected)
