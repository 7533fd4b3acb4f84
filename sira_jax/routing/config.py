"""Options of the sparse router, as plain data."""

import dataclasses
from typing import ClassVar

from sira_jax.errors import check, is_finite_number, is_whole_number

DISPATCH_ALGORITHMS = ("auto", "einsum", "masked", "ragged")
EXPERT_DROPOUT_POSITIONS = ("before_topk", "after_topk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Routing of SiRA (arXiv 2311.09179). Hashable, so it can be a static argument of `jax.jit`.

    [P] is stated by the paper, [S] by a secondary source, [C] is a choice of this project.

    Attributes:
      num_experts: experts of a projection, E [C: 16].
      num_selected_experts: experts a token selects, k; at most E [C: 4].
      capacity_factor: sets how many tokens of a group an expert takes in training [P: that there is
        a limit; C: its form]: C = max(min_capacity, ceil(capacity_factor * k * S / E)) with S the
        group's tokens, padding included. None is no limit.
      eval_capacity_factor: the same, where `deterministic` is true. None is no limit.
      min_capacity: least C of a limited expert [C].
      capacity_counts_k: leaves `k` in the formula; without it C = ceil(capacity_factor * S / E), as
        in flaxformer [C].
      group_size: tokens a group, S; the last group is padded. None makes every sequence a group.
      renormalize: divide the selected gates by their sum [C: no].
      expert_dropout_rate: share of gates dropped in training, in [0, 1) [P: dropout on the gates].
      expert_dropout_position: "before_topk" drops probabilities before the selection, "after_topk"
        drops the gates of selected experts, after any renormalisation [C].
      load_balance_loss_weight: weight of the load-balancing loss [S: the paper has such a loss].
      router_z_loss_weight: weight of the router z-loss [C: 0].
      router_init_std: standard deviation of the router's normal initialisation [C].
      dispatch: "einsum", "masked", "ragged", or "auto", which picks one by a cost model (see
        `dispatch.choose_algorithm`). They give the same values and gradients to rounding.

    Raises:
      ConfigError: a field is out of range; the message names the field and what is allowed.
    """

    # Where messages say that a field stands.
    config_section: ClassVar[str] = "routing"

    num_experts: int = 16
    num_selected_experts: int = 4
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    capacity_counts_k: bool = True
    group_size: int | None = None
    renormalize: bool = False
    expert_dropout_rate: float = 0.0
    expert_dropout_position: str = "before_topk"
    load_balance_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.0
    router_init_std: float = 0.02
    dispatch: str = "auto"

    def __post_init__(self):
        def require(name, is_allowed, allowed):
            value = getattr(self, name)
            check(is_allowed(value), f"{self.config_section}.{name}", value, allowed)

        require("num_experts", lambda v: is_whole_number(v) and v >= 1, "a whole number over 0")
        require(
            "num_selected_experts",
            lambda v: is_whole_number(v) and 1 <= v <= self.num_experts,
            f"a whole number from 1 to num_experts={self.num_experts}",
        )
        for name in ("capacity_factor", "eval_capacity_factor"):
            require(
                name,
                lambda v: v is None or (is_finite_number(v) and v > 0),
                "a finite number over 0, or None for no limit",
            )
        require(
            "min_capacity", lambda v: is_whole_number(v) and v >= 0, "a whole number, 0 or more"
        )
        require(
            "group_size",
            lambda v: v is None or (is_whole_number(v) and v >= 1),
            "a whole number over 0, or None for one group a sequence",
        )
        for name in ("capacity_counts_k", "renormalize"):
            require(name, lambda v: isinstance(v, bool), "true or false")
        require(
            "expert_dropout_rate",
            lambda v: is_finite_number(v) and 0 <= v < 1,
            "a number in [0, 1)",
        )
        for name, choices in (
            ("expert_dropout_position", EXPERT_DROPOUT_POSITIONS),
            ("dispatch", DISPATCH_ALGORITHMS),
        ):
            require(name, lambda v, choices=choices: v in choices, f"one of {', '.join(choices)}")
        for name in ("load_balance_loss_weight", "router_z_loss_weight", "router_init_std"):
            require(name, lambda v: is_finite_number(v) and v >= 0, "a finite number, 0 or more")
