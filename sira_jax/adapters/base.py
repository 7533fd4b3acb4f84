"""What every adapter shares: its config, the projection that carries it, and the predicate that tells trained from frozen.

Axis letters: B batch, T length, D features in, F features out, E experts, R rank.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from sira_jax.errors import ConfigError, MergeError, check

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
# Where they are in a decoder block, which is what patterns match.
PATHS = tuple(f"{'attention' if name in 'qkvo' else 'mlp'}/{name}" for name in PROJECTIONS)
ADAPTER = "adapter"
Initializer = Callable[..., jax.Array]


@struct.dataclass
class AdapterContext:
    """What an adapter may know of the batch besides its projection's input.

    Attributes:
      valid_BT: True at real tokens, False at padding; None means all are real.
      task_ids_BT: index of each token's task, for per-task metrics; None means one task.
      num_tasks: number of tasks that `task_ids_BT` counts (static; 0 turns per-task metrics off).
      deterministic: True outside training: no dropout of any kind, evaluation capacity (static).
    """

    valid_BT: jax.Array | None = None
    task_ids_BT: jax.Array | None = None
    num_tasks: int = struct.field(pytree_node=False, default=0)
    deterministic: bool = struct.field(pytree_node=False, default=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFlops:
    """Multiply-adds times two, a token and projection, forward pass. `router` is part of `total`."""

    total: int
    router: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(abc.ABC):
    """Fields that every method has; a method subclasses this and implements the four methods at the end.

    Attributes:
      rank: width R of a low-rank pair.
      alpha: numerator of the scale s = alpha / rank.
      dropout_rate: dropout on the input of the low-rank pair, in training.
      targets: projections that carry an adapter: names out of q, k, v, o, gate, up, down, or regular expressions that match a
        whole name or a whole path ("attention/q", "mlp/(gate|up)"). A single string is one such pattern.
      overrides: pairs of a pattern and the fields that differ on the projections it matches, for example
        (("down", {"rank": 8}),); a mapping is taken too. Later pairs win. Held as nested tuples, so that the config stays
        hashable.
    """

    method: ClassVar[str] = ""
    # Fields that steer training or speed alone: what a trained adapter computes does not depend on them.
    training_fields: ClassVar[frozenset[str]] = frozenset({"dropout_rate"})

    rank: int = 4
    alpha: float = 8.0
    dropout_rate: float = 0.0
    targets: tuple[str, ...] | str = PROJECTIONS
    overrides: Any = ()

    def __post_init__(self):
        name = "adapter"
        check(
            isinstance(self.targets, str | list | tuple),
            f"{name}.targets",
            self.targets,
            "projection names or regular expressions",
        )
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        is_int = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        check(is_int and self.rank >= 1, f"{name}.rank", self.rank, "a whole number of at least 1")
        check(_is_number(self.alpha) and self.alpha > 0, f"{name}.alpha", self.alpha, "over 0")
        check(
            _is_number(self.dropout_rate) and 0 <= self.dropout_rate < 1,
            f"{name}.dropout_rate",
            self.dropout_rate,
            "in [0, 1)",
        )
        check(len(targets) > 0, f"{name}.targets", self.targets, "at least one projection")
        for target in targets:
            _check_pattern(f"{name}.targets", target)
        object.__setattr__(self, "overrides", _freeze_overrides(self, self.overrides))

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def for_projection(self, path: str) -> "AdapterConfig | None":
        """The config of the adapter on the projection at `path` ("attention/q"), or None where there is none."""
        if not any(_matches(target, path) for target in self.targets):
            return None
        fields: dict[str, Any] = {}
        for pattern, override in self.overrides:
            if _matches(pattern, path):
                fields.update(override)
        return dataclasses.replace(self, overrides=(), **fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields with the method's name, as plain data; `registry.make_config` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["targets"] = list(self.targets)
        # Pairs, since their order counts and JSON writers may sort a mapping.
        fields["overrides"] = [[pattern, dict(override)] for pattern, override in self.overrides]
        return {"method": self.method} | fields

    # What a method implements.

    @abc.abstractmethod
    def make_module(self) -> nn.Module:
        """The Flax module, named `adapter`, called as module(x_BTD, y_BTF, kernel_DF, context) -> y_BTF."""

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """The plain kernel that computes what kernel and adapter compute together; MergeError if there is none."""
        raise MergeError(f"adapter.method={self.method!r} cannot be merged into a plain kernel")

    @abc.abstractmethod
    def count_parameters(self, d_in: int, d_out: int) -> int:
        """Trained parameters on one d_in x d_out projection."""

    @abc.abstractmethod
    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """Forward FLOPs that the equation needs a token (what a dispatch algorithm adds is not counted)."""


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _check_pattern(field: str, pattern: object) -> None:
    allowed = f"projection names ({', '.join(PROJECTIONS)}) or regular expressions"
    check(isinstance(pattern, str) and pattern != "", field, pattern, allowed)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}={pattern!r} is not allowed: {allowed} ({error})") from None


def _matches(pattern: str, path: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in (path, path.rsplit("/", 1)[-1]))


def _freeze_overrides(config: AdapterConfig, overrides: Any) -> tuple:
    """Nested tuples from a mapping, after checking that every override gives a valid config."""
    pairs = tuple(overrides.items()) if isinstance(overrides, Mapping) else overrides
    are_pairs = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    )
    check(are_pairs, "adapter.overrides", overrides, "pairs of a pattern and its fields")
    known = {f.name for f in dataclasses.fields(config)} - {"targets", "overrides"}
    frozen = []
    for pattern, fields in pairs:
        _check_pattern("adapter.overrides", pattern)
        # A frozen config's overrides come back as nested tuples.
        is_frozen = isinstance(fields, tuple) and all(isinstance(item, tuple) for item in fields)
        check(
            isinstance(fields, Mapping) or is_frozen,
            f"adapter.overrides[{pattern!r}]",
            fields,
            "a mapping of fields",
        )
        fields = dict(fields)
        unknown = sorted(set(fields) - known)
        check(
            not unknown,
            f"adapter.overrides[{pattern!r}]",
            unknown,
            f"fields of {config.method}: {', '.join(sorted(known))}",
        )
        try:
            dataclasses.replace(config, overrides=(), **fields)
        except ConfigError as error:
            raise ConfigError(f"adapter.overrides[{pattern!r}]: {error}") from None
        frozen.append((pattern, tuple(sorted(fields.items()))))
    return tuple(frozen)


class AdaptedDense(nn.Module):
    """A frozen projection y = x W0 (+ bias) with an optional adapter.

    Attributes:
      features: F.
      adapter: config of the adapter of this very projection (see `AdapterConfig.for_projection`), or None.
      use_bias: adds a bias (F,).
      dtype: type of the computation.
      param_dtype: type of kernel and bias.
      kernel_axes: logical axis names of the kernel's two axes.
    """

    features: int
    adapter: AdapterConfig | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_axes: tuple[str, str] = ("embed", "mlp")

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """Projects (B, T, D) to (B, T, F)."""
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel_DF = self.param(
            "kernel",
            nn.with_logical_partitioning(kernel_init, self.kernel_axes),
            (x_BTD.shape[-1], self.features),
            self.param_dtype,
        )
        x_BTD = x_BTD.astype(self.dtype)
        y_BTF = x_BTD @ kernel_DF.astype(self.dtype)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.kernel_axes[1:])
            bias_F = self.param("bias", bias_init, (self.features,), self.param_dtype)
            y_BTF = y_BTF + bias_F.astype(self.dtype)
        if self.adapter is not None:
            y_BTF = self.adapter.make_module()(x_BTD, y_BTF, kernel_DF, context)
        return y_BTF


def is_trained(path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` is trained: exactly those under a module named `adapter` are."""
    return ADAPTER in path


def lora_a_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """LoRA's A: kaiming-uniform with a = sqrt(5), that is U(-b, b), b = 1 / sqrt(d_in). 2106.09685 [O].

    `shape` ends in (d_in, rank); leading axes are experts and do not count as fan-in.
    """
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def merge(adapter: AdapterConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the plain model that computes what the adapted one computes.

    Args:
      adapter: config of the model's adapters.
      params: all parameters, layers stacked or apart.

    Raises:
      MergeError: the method has no such model, with the reason.
    """
    flat = traverse_util.flatten_dict(params)
    adapters: dict[tuple[str, ...], dict] = {}
    for path in [path for path in flat if is_trained(path)]:
        at = path.index(ADAPTER)
        adapters.setdefault(path[:at], {})[path[at + 1 :]] = flat.pop(path)
    for projection, leaves in adapters.items():
        config = adapter.for_projection("/".join(projection[-2:]))
        kernel = (*projection, "kernel")
        flat[kernel] = config.merge(traverse_util.unflatten_dict(leaves), flat[kernel])
    return traverse_util.unflatten_dict(flat)
