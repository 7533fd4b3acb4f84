"""What every metric shares: the text of a target, and the check that predictions and targets pair up."""

from collections.abc import Callable, Mapping, Sequence

from sira_jax.errors import DataError

Target = str | Mapping[str, str]
Metric = Callable[[Sequence[str], Sequence[Target]], dict[str, float]]


def raw_text(target: Target) -> str:
    """The target's text. Raises DataError for an example without `targets`."""
    if isinstance(target, str):
        return target
    if "targets" not in target:
        raise DataError(f"a target needs the field 'targets'; it has {sorted(target)}")
    return target["targets"]


def text(target: Target) -> str:
    """The target's text without white space at its ends."""
    return raw_text(target).strip()


def field(target: Target, name: str, metric: str) -> str:
    """A further field of the target's example. Raises DataError where the target has none."""
    if isinstance(target, str) or name not in target:
        raise DataError(f"{metric} needs targets with the field {name!r}")
    return target[name]


def check_pairs(predictions: Sequence[str], targets: Sequence[Target]) -> None:
    """Raises DataError for no examples at all, or unequal numbers."""
    if len(predictions) != len(targets):
        raise DataError(f"{len(predictions)} predictions for {len(targets)} targets")
    if not targets:
        raise DataError("no predictions: a metric needs at least one example")
