"""Three ways to compute sum over e of G[e] B_e (A_e x), with equal values, gradients and drops.

Axis letters: G routing groups, S tokens a group, D features in, F features out, E experts,
K selected experts, C capacity, R rank, M = E * R joined ranks, P = G * S * K (token, expert) pairs.
"""

import functools

import jax
import jax.numpy as jnp

from sira_jax.errors import check
from sira_jax.placement import FREE, constrain, per_shard
from sira_jax.routing.capacity import expert_capacity
from sira_jax.routing.config import DISPATCH_ALGORITHMS, RoutingConfig
from sira_jax.routing.joined import can_join, project_with_router
from sira_jax.routing.products import keep, project
from sira_jax.routing.router import Routing, route, router_logits

# `choose_algorithm` counts multiply-adds. Joined ranks up to this share of the width are computed in
# full, as a product that small is lost in the frozen one.
MASKED_WIDTH_SHARE = 0.25
# What it counts for a feature of a pair to move into expert order and back: 4 bytes in bfloat16, at
# some 64 multiply-adds in the time an accelerator moves a byte. An estimate, not a measurement.
RAGGED_MOVE_COST = 256
# Its many small products run at about a third of the speed of one large one (measured on CPU).
EINSUM_SLOWDOWN = 3
# Names of the axes (G, E, C, D) before and after tokens move to experts on other devices.
_WITH_TOKENS = ("batch", None, None, FREE)
_WITH_EXPERTS = ("expert_batch", "expert", None, FREE)


def choose_algorithm(
    num_experts: int,
    rank: int,
    d_in: int,
    d_out: int,
    tokens: int,
    k: int,
    capacity: int,
    *,
    platform: str | None = None,
) -> str:
    """Returns the algorithm that "auto" stands for: the one of the least modelled cost.

    Costs are multiply-adds a token for each of the D + F features the adapter reads and writes:

      masked: M = E * R, as every token meets all experts;
      ragged: K * (R + RAGGED_MOVE_COST), as a token meets its own experts, moved into their order;
        on CPU K * E * R, as XLA's `ragged_dot` there computes all experts for all pairs;
      einsum: EINSUM_SLOWDOWN * (2 * E * C + E * C * R / S), the one-hot products and the experts,
        with S tokens and C places.

    Masked wins at once while M <= MASKED_WIDTH_SHARE * min(D, F). Its two products have no data-
    dependent step and cost at most that share of the frozen product, whatever the others cost.

    Args:
      num_experts: E.
      rank: R.
      d_in: D.
      d_out: F.
      tokens: tokens a group, S.
      k: selected experts a token, K.
      capacity: C.
      platform: "cpu", "gpu" or "tpu"; None is JAX's default backend.
    """
    joined_ranks = num_experts * rank
    if joined_ranks <= MASKED_WIDTH_SHARE * min(d_in, d_out):
        return "masked"
    is_cpu = (platform or jax.default_backend()) == "cpu"
    places = num_experts * min(capacity, tokens)
    costs = {
        "masked": joined_ranks,
        "ragged": k * joined_ranks if is_cpu else k * (rank + RAGGED_MOVE_COST),
        "einsum": EINSUM_SLOWDOWN * (2 * places + places * rank / max(tokens, 1)),
    }
    return min(costs, key=costs.get)


def mix_experts(
    x_GSD: jax.Array,
    valid_GS: jax.Array,
    router_DE: jax.Array,
    lora_a_EDR: jax.Array,
    lora_b_ERF: jax.Array,
    config: RoutingConfig,
    *,
    scale: float,
    deterministic: bool,
    rng: jax.Array | None = None,
    expert_input_GSD: jax.Array | None = None,
    active_choices: jax.Array | None = None,
) -> tuple[jax.Array, Routing]:
    """Routes x and returns (delta_GSF, routing), delta = sum over e of G[e] scale B_e (A_e x).

    SiRA, arXiv 2311.09179 [P]. delta has the type of x and is 0 for padding; the gates of the
    returned routing are without `scale`. Under "masked" x meets A and the router in one product,
    see `joined`.

    Args:
      x_GSD: input of the adapted projection, and of the router.
      valid_GS: bool, False for padding.
      router_DE: Wg, no bias [S].
      lora_a_EDR: the experts' A.
      lora_b_ERF: the experts' B.
      config: static.
      scale: s = alpha / r.
      deterministic: no dropout, and `eval_capacity_factor`.
      rng: key of the expert dropout.
      expert_input_GSD: input of the experts if not x, such as x after a dropout the router must not
        see.
      active_choices: see `route`.

    Raises:
      ConfigError: shapes disagree, or the key is missing.
    """
    _check_shapes(x_GSD, router_DE.shape, lora_a_EDR, lora_b_ERF)
    num_experts, d_in, rank = lora_a_EDR.shape
    capacity = expert_capacity(x_GSD.shape[1], config, deterministic=deterministic)
    algorithm = config.dispatch
    if algorithm == "auto":
        algorithm = choose_algorithm(
            num_experts,
            rank,
            d_in,
            lora_b_ERF.shape[-1],
            x_GSD.shape[1],
            config.num_selected_experts,
            capacity,
        )
    options = {"deterministic": deterministic, "rng": rng, "active_choices": active_choices}
    if algorithm == "masked" and expert_input_GSD is None and can_join(x_GSD.dtype):
        hidden_GSM, logits_GSE = jax.checkpoint(_join_and_project, prevent_cse=False)(
            x_GSD, lora_a_EDR, router_DE
        )
        # Gates, ranks and queues are cheap to make again and several times as large as what they are made of.
        mix = functools.partial(
            _route_and_mix, config=config, scale=scale, dtype=x_GSD.dtype, **options
        )
        mix = jax.checkpoint(mix, prevent_cse=False)
        return mix(hidden_GSM, logits_GSE, valid_GS, lora_b_ERF)
    routing = route(router_logits(x_GSD, router_DE), valid_GS, config, **options)
    expert_input_GSD = x_GSD if expert_input_GSD is None else expert_input_GSD
    delta_GSF = apply_experts(
        expert_input_GSD, _scaled(routing, scale), lora_a_EDR, lora_b_ERF, algorithm
    )
    return delta_GSF, routing


def _join_and_project(x_GSD, lora_a_EDR, router_DE):
    joined = project_with_router(x_GSD, join_ranks(lora_a_EDR), router_DE)
    return tuple(constrain(y_GS, "batch", None, None) for y_GS in joined)


def _route_and_mix(
    hidden_GSM, logits_GSE, valid_GS, lora_b_ERF, *, config, scale, dtype, **options
):
    routing = route(logits_GSE, valid_GS, config, **options)
    return _masked_output(hidden_GSM, _scaled(routing, scale), lora_b_ERF, dtype), routing


def _scaled(routing: Routing, scale: float) -> Routing:
    # The gates are the smallest array to multiply by the scale.
    return routing.replace(gates_GSE=routing.gates_GSE * scale)


def apply_experts(
    x_GSD: jax.Array,
    routing: Routing,
    lora_a_EDR: jax.Array,
    lora_b_ERF: jax.Array,
    algorithm: str = "auto",
) -> jax.Array:
    """Returns sum over e of gates[e] B_e (A_e x) for every token, (G, S, F) in the type of x.

    Products take their operands in the type of x ("einsum": float32) and accumulate in float32;
    gates stay float32.
    Padding rows are 0, and nothing finite in them reaches another row or a gradient.

    Args:
      x_GSD: input of the experts.
      routing: result of `route`.
      lora_a_EDR: the experts' A; cast to the type of x.
      lora_b_ERF: the experts' B; cast to the type of x.
      algorithm: "einsum", "masked", "ragged", or "auto" (`choose_algorithm`).

    Raises:
      ConfigError: `algorithm` is unknown or shapes disagree.
    """
    check(
        algorithm in DISPATCH_ALGORITHMS,
        "algorithm",
        algorithm,
        f"one of {', '.join(DISPATCH_ALGORITHMS)}",
    )
    num_experts, d_in, rank = lora_a_EDR.shape
    _check_shapes(x_GSD, (d_in, routing.gates_GSE.shape[-1]), lora_a_EDR, lora_b_ERF)
    if algorithm == "auto":
        algorithm = choose_algorithm(
            num_experts,
            rank,
            d_in,
            lora_b_ERF.shape[-1],
            x_GSD.shape[1],
            routing.indices_GSK.shape[-1],
            routing.capacity,
        )
    lora_a_EDR, lora_b_ERF = lora_a_EDR.astype(x_GSD.dtype), lora_b_ERF.astype(x_GSD.dtype)
    if algorithm == "einsum":
        return _einsum_experts(x_GSD, routing, lora_a_EDR, lora_b_ERF)
    if algorithm == "ragged":
        return _ragged_experts(x_GSD, routing, lora_a_EDR, lora_b_ERF)
    hidden_GSM = keep(constrain(project(x_GSD, join_ranks(lora_a_EDR)), "batch", None, None))
    return _masked_output(hidden_GSM, routing, lora_b_ERF, x_GSD.dtype)


def _check_shapes(x_GSD, router_shape, lora_a_EDR, lora_b_ERF):
    num_experts, d_in, rank = lora_a_EDR.shape
    check(x_GSD.ndim == 3, "x_GSD.shape", x_GSD.shape, "(groups, tokens, features)")
    check(
        (x_GSD.shape[-1], num_experts) == (d_in, router_shape[-1]) and router_shape[0] == d_in,
        "lora_a_EDR.shape",
        lora_a_EDR.shape,
        f"(experts, {x_GSD.shape[-1]} features, rank) with {router_shape[-1]} experts",
    )
    check(
        lora_b_ERF.shape[:2] == (num_experts, rank),
        "lora_b_ERF.shape",
        lora_b_ERF.shape,
        f"({num_experts} experts, rank {rank}, features)",
    )


def join_ranks(lora_a_EDR: jax.Array) -> jax.Array:
    """The experts' A side by side, (D, M)."""
    num_experts, d_in, rank = lora_a_EDR.shape
    return lora_a_EDR.transpose(1, 0, 2).reshape(d_in, num_experts * rank)


def _masked_output(
    hidden_GSM: jax.Array, routing: Routing, lora_b_ERF: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    # Large padding may overflow here, and inf * 0 is not 0.
    hidden_GSM = jnp.where(routing.valid_GS[..., None], hidden_GSM, 0.0)
    return gated_sum(hidden_GSM, routing.gates_GSE, lora_b_ERF, dtype)


def gated_sum(
    hidden_GSM: jax.Array, gates_GSE: jax.Array, lora_b_ERF: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """sum over e of gates[e] B_e h_e, (G, S, F) in `dtype`, as one product with B_cat: all experts meet all tokens.

    Args:
      hidden_GSM: h = A_e x, float32, the experts side by side; finite.
      gates_GSE: float32, with any scale in them.
      lora_b_ERF: the experts' B.
      dtype: of the product's operands and its result.
    """
    num_experts, rank, d_out = lora_b_ERF.shape
    hidden_GSER = hidden_GSM.reshape(*hidden_GSM.shape[:2], num_experts, rank)
    gated_GSM = (hidden_GSER * gates_GSE[..., None]).reshape(hidden_GSM.shape)
    lora_b_MF = lora_b_ERF.reshape(num_experts * rank, d_out)
    return project(gated_GSM.astype(dtype), lora_b_MF.astype(dtype)).astype(dtype)


def _einsum_experts(x_GSD, routing, lora_a_EDR, lora_b_ERF):
    """Moves tokens to the experts' places and back by one-hot products, as GShard does.

    All float32: this is the reference, and XLA's CPU backend lacks some of these products for
    bfloat16. Where experts lie on different devices, tokens move to them and back.
    """
    places = min(routing.capacity, x_GSD.shape[1])
    is_place_GSEC = routing.position_GSE[..., None] == jnp.arange(places)
    dispatch_GSEC = is_place_GSEC & routing.kept_GSE[..., None]
    combine_GSEC = jnp.where(dispatch_GSEC, routing.gates_GSE[..., None], 0.0)
    dispatch_GSEC, x_GSD_f32, lora_a_EDR, lora_b_ERF = (
        array.astype(jnp.float32) for array in (dispatch_GSEC, x_GSD, lora_a_EDR, lora_b_ERF)
    )
    expert_in_GECD = jnp.einsum("gsec,gsd->gecd", dispatch_GSEC, x_GSD_f32)
    expert_in_GECD = _to_experts(expert_in_GECD)
    hidden_GECR = jnp.einsum("gecd,edr->gecr", expert_in_GECD, lora_a_EDR)
    expert_out_GECF = _from_experts(jnp.einsum("gecr,erf->gecf", hidden_GECR, lora_b_ERF))
    return jnp.einsum("gsec,gecf->gsf", combine_GSEC, expert_out_GECF).astype(x_GSD.dtype)


def _to_experts(x_GECD: jax.Array) -> jax.Array:
    # First gathered by expert where the tokens are, then moved in one step.
    return constrain(constrain(x_GECD, *_WITH_TOKENS), *_WITH_EXPERTS)


def _from_experts(x_GECF: jax.Array) -> jax.Array:
    return constrain(constrain(x_GECF, *_WITH_EXPERTS), *_WITH_TOKENS)


def _ragged_experts(x_GSD, routing, lora_a_EDR, lora_b_ERF):
    """Sorts the (token, expert) pairs by expert and multiplies each run by its expert.

    Pairs over capacity stay in their run with a gate of 0, so the shapes are static. Each device sorts its own pairs.
    """

    def choices(x_GSE):
        return jnp.take_along_axis(x_GSE, routing.indices_GSK, axis=-1)

    return per_shard(
        _sorted_experts,
        (lora_a_EDR, lora_b_ERF),
        (x_GSD, routing.indices_GSK, choices(routing.gates_GSE), choices(routing.kept_GSE)),
        size=x_GSD.shape[0],
    )


def _sorted_experts(experts, tokens):
    (lora_a_EDR, lora_b_ERF), (x_GSD, indices_GSK, gates_GSK, kept_GSK) = experts, tokens
    num_experts, num_choices = lora_a_EDR.shape[0], indices_GSK.shape[-1]
    num_tokens = x_GSD.shape[0] * x_GSD.shape[1]
    expert_P, gate_P, kept_P = (x.reshape(-1) for x in (indices_GSK, gates_GSK, kept_GSK))
    order_P = jnp.argsort(expert_P)
    pairs_E = jnp.bincount(expert_P, length=num_experts).astype(jnp.int32)

    x_PD = x_GSD.reshape(num_tokens, -1)[order_P // num_choices]
    hidden_PR = _ragged_dot(x_PD, lora_a_EDR, pairs_E)
    hidden_PR = jnp.where(kept_P[order_P, None], hidden_PR, 0.0) * gate_P[order_P, None]
    out_PF = _ragged_dot(hidden_PR.astype(x_GSD.dtype), lora_b_ERF, pairs_E)
    out_NKF = out_PF[jnp.argsort(order_P)].reshape(num_tokens, num_choices, -1)
    delta_NF = jnp.sum(out_NKF, axis=1).astype(x_GSD.dtype)
    return delta_NF.reshape(*x_GSD.shape[:2], -1)


def _ragged_dot(lhs_PD: jax.Array, rhs_EDF: jax.Array, pairs_E: jax.Array) -> jax.Array:
    # `ragged_dot` maps over a batch only if all its operands have the batch axis, so under `vmap`
    # of the tokens this gives it to the kernels; else the compiler removes the integer zero.
    rhs_EDF = rhs_EDF + (pairs_E[0] * 0).astype(rhs_EDF.dtype)
    return jax.lax.ragged_dot(lhs_PD, rhs_EDF, pairs_E, preferred_element_type=jnp.float32)
