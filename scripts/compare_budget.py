"""How large each method of a comparison is: equal trained parameters, or equal rank."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sira_jax.adapters import AdapterConfig, count_model_parameters
from sira_jax.errors import ConfigError
from sira_jax.models import ModelConfig

BUDGETS = ("parameters", "rank")
# The method that the others are measured against, and whose size at --rank is the budget.
BASELINE = "lora"
# A method that does not reach the budget by then never does.
_MAX_VALUE = 4096
# Nearer than this share of the budget, the number of experts stays as it is.
_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a method is.

    Attributes:
      fields: the size field, and what else the budget changed, with their values.
      trained: trained parameters of the whole model.
      active: those that a token uses.
      target: trained parameters of the baseline.
    """

    fields: Mapping[str, Any]
    trained: int
    active: int
    target: int

    @property
    def deviation(self) -> float:
        """By what share the trained parameters differ from the baseline's; positive where they are more."""
        return self.trained / self.target - 1


def measure(
    adapter: AdapterConfig, original: AdapterConfig, model: ModelConfig, target: int | None
) -> Size:
    """The size of `adapter`, which the budget made from `original`; without a target it is its own."""
    fields = {
        field.name: getattr(adapter, field.name)
        for field in dataclasses.fields(adapter)
        if field.name == adapter.size_field
        or getattr(adapter, field.name) != getattr(original, field.name)
    }
    trained = count(adapter, model)
    return Size(fields, trained, count(adapter, model, active=True), target or trained)


def count(adapter: AdapterConfig, model: ModelConfig, *, active: bool = False) -> int:
    """Trained parameters on a model, or those of them that a token uses."""
    return count_model_parameters(adapter, model.stacks, model.emb_dim, active=active)


def fit(
    adapter: AdapterConfig,
    budget: str,
    rank: int,
    count_of: Callable[[AdapterConfig], int],
    target: int,
) -> AdapterConfig:
    """The config of a method at the budget's size.

    Args:
      adapter: the method's config; fields that carry no size stay as they are.
      budget: "rank" sets the rank of each low-rank pair, "parameters" the size field, so that the trained parameters come as
        near to the target as they can. Where they stay further off than 5%, the smallest value that is too much gets fewer
        experts, if the method has such a field.
      rank: of "rank".
      count_of: trained parameters of a config.
      target: of "parameters".

    A method without a size field stays as it is; one whose size field is not the rank stays so under "rank".

    Raises:
      ConfigError: no value of the size field is allowed together with the other fields.
    """
    field = adapter.size_field
    if field is None or (budget == "rank" and field != "rank"):
        return adapter
    if budget == "rank":
        return resized(adapter, "rank", rank)

    def distance(config: AdapterConfig) -> int:
        return abs(count_of(config) - target)

    candidates = list(_upwards(adapter, field, count_of, target))
    if not candidates:
        raise ConfigError(
            f"adapter.{field}: no value from 1 to {_MAX_VALUE} goes with the other fields of {adapter.method}"
        )
    experts = getattr(adapter, "num_experts", None)
    is_near = min(map(distance, candidates)) <= _TOLERANCE * target
    if not is_near and experts is not None and field != "num_experts":
        fewer = (_or_none(candidates[-1], "num_experts", n) for n in range(1, experts))
        candidates += [config for config in fewer if config is not None]
    return min(candidates, key=distance)


def _upwards(
    adapter: AdapterConfig, field: str, count_of: Callable[[AdapterConfig], int], target: int
) -> Iterator[AdapterConfig]:
    """Configs with growing values of `field` that are allowed, to the first that reaches the target."""
    for value in range(1, _MAX_VALUE + 1):
        config = _or_none(adapter, field, value)
        if config is None:
            continue
        yield config
        if count_of(config) >= target:
            return


def _or_none(adapter: AdapterConfig, field: str, value: int) -> AdapterConfig | None:
    try:
        return resized(adapter, field, value)
    except ConfigError:
        return None


def resized(adapter: AdapterConfig, field: str, value: int) -> AdapterConfig:
    """`adapter` with another value of `field` and what must follow it.

    Alpha follows the rank, so that the scale alpha / rank stays the method's own; k is never more than the experts.
    """
    changes: dict[str, Any] = {field: value}
    if field == "rank":
        changes["alpha"] = adapter.alpha * value / adapter.rank
    selected = getattr(adapter, "num_selected_experts", None)
    if field == "num_experts" and selected is not None:
        changes["num_selected_experts"] = min(selected, value)
    return dataclasses.replace(adapter, **changes)
