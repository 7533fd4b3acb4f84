"""The hand-derived gradients of the reference are those of its own forward pass."""

import numpy as np
import pytest

from sira_jax.routing import RoutingConfig
from tests.routing.reference import reference_layer


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("position", ["before_topk", "after_topk"])
def test_gradients_agree_with_finite_differences(renormalize, position):
    rng = np.random.default_rng(3)
    config = RoutingConfig(
        num_experts=4,
        num_selected_experts=3,
        capacity_factor=0.5,
        min_capacity=1,
        renormalize=renormalize,
        expert_dropout_rate=0.3,
        expert_dropout_position=position,
    )
    arrays = [rng.normal(size=shape) for shape in ((2, 5, 3), (3, 4), (4, 3, 2), (4, 2, 3))]
    valid = rng.random((2, 5)) < 0.8
    mask = (rng.random((2, 5, 4)) < 0.7) / 0.7
    cotangent = rng.normal(size=(2, 5, 3))
    weights = {"load_balance_weight": 0.3, "z_weight": 0.2}

    def run(values):
        x, router, lora_a, lora_b = values
        return reference_layer(
            x,
            valid,
            router,
            lora_a,
            lora_b,
            config,
            scale=1.5,
            deterministic=False,
            dropout_mask=mask,
            cotangent=cotangent,
            **weights,
        )

    def loss(values):
        result = run(values)
        return (
            (result.delta * cotangent).sum()
            + weights["load_balance_weight"] * result.load_balance_loss
            + weights["z_weight"] * result.router_z_loss
        )

    result = run(arrays)
    assert 0 < result.kept.sum() < result.selected.sum()
    gradients = (result.grad_x, result.grad_router, result.grad_a, result.grad_b)
    for which, gradient in enumerate(gradients):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(gradient.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [value.copy() for value in arrays]
                moved[which][index] += step
                ends.append(loss(moved))
            numeric[index] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)
