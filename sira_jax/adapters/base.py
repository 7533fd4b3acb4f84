"""What every adapter shares: its config and hooks, and what tells trained from frozen.

Axis letters: B batch, T length, D features in, F features out, R rank.
"""

import abc
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.errors import ConfigError, MergeError, check, is_finite_number, is_whole_number

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
# Where they are in the block of a decoder-only model, which is what patterns match.
PATHS = tuple(f"{'attention' if name in 'qkvo' else 'mlp'}/{name}" for name in PROJECTIONS)
# What the projections of the T5 family, whose parameters have T5X's names, are called in patterns besides.
ALIASES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "o",
    "wi": "up",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
}
ADAPTER = "adapter"
# Where a stack's layers are in its parameter tree: together, or apart as layers_0, layers_1, ...
STACKED = "layers"
# What an adapter keeps beside its trained parameters (masks, scores, merged sums, frozen random factors) are leaves
# whose names start so: they are saved and restored with the adapter, and no gradient or optimizer state exists for them.
BUFFER = "buffer_"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFlops:
    """Multiply-adds times two, a token and projection, forward pass. `router` is part of `total`."""

    total: int
    router: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondPass:
    """A second forward pass with other random draws, held to the first by weight * symmetric KL divergence.

    Attributes:
      weight: of (KL(first || second) + KL(second || first)) / 2, a mean over the target tokens, nats.
      both_gradients: differentiate through both passes. Otherwise through the first alone, with twice the weight: as
        the two are drawn alike, the gradient is the same in expectation, and the second pass costs no backward pass.
    """

    weight: float
    both_gradients: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Where training stands, for `AdapterConfig.after_step`.

    Attributes:
      step: optimizer steps done, this one included, int32 scalar.
      num_steps: steps of the whole training (static).
      key: random key of this step.
    """

    step: jax.Array
    num_steps: int
    key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(abc.ABC):
    """Fields that every method has; a method subclasses this and implements the methods at the end.

    Attributes:
      rank: width R of a low-rank pair.
      alpha: numerator of the scale s = alpha / rank.
      dropout_rate: dropout on the input of the low-rank pair, in training.
      targets: projections that carry an adapter: names out of q, k, v, o, gate, up, down, or regular expressions that match a
        whole name or a whole path ("attention/q", "mlp/(gate|up)", "encoder/.*"). A single string is one such pattern. The
        T5 family's query, key, value, out, wi_0, wi_1, wi and wo answer to q, k, v, o, gate, up, up and down too.
      overrides: pairs of a pattern and the fields that differ on the projections it matches, for example
        (("down", {"rank": 8}),); a mapping is taken too. Later pairs win. Held as nested tuples, so that the config stays
        hashable.
    """

    method: ClassVar[str] = ""
    # Fields that steer training or speed alone: what a trained adapter computes does not depend on them.
    training_fields: ClassVar[frozenset[str]] = frozenset({"dropout_rate"})
    # Fields that hold for the whole model at once, such as a schedule: overrides cannot change them.
    whole_model_fields: ClassVar[frozenset[str]] = frozenset()
    # The field that sets how many parameters are trained, which scripts/compare.py varies; None where none may vary.
    size_field: ClassVar[str | None] = "rank"

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
        is_int = is_whole_number(self.rank)
        check(is_int and self.rank >= 1, f"{name}.rank", self.rank, "a whole number of at least 1")
        # Its square is to be a number in float32 too.
        is_alpha = is_finite_number(self.alpha) and 0 < self.alpha <= 1e18
        check(is_alpha, f"{name}.alpha", self.alpha, "over 0, at most 1e18")
        check(
            is_finite_number(self.dropout_rate) and 0 <= self.dropout_rate < 1,
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

    def is_target(self, path: str) -> bool:
        """Whether the projection at `path` ("attention/q") carries an adapter."""
        return any(matches(target, path) for target in self.targets)

    def for_projection(self, path: str) -> "AdapterConfig | None":
        """The config of the adapter on the projection at `path` ("attention/q"), or None where there is none."""
        if not self.is_target(path):
            return None
        fields: dict[str, Any] = {}
        for pattern, override in self.overrides:
            if matches(pattern, path):
                fields.update(override)
        return dataclasses.replace(self, overrides=(), **fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields with the method's name, as plain data; `registry.make_config` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["targets"] = list(self.targets)
        # Pairs, since their order counts and JSON writers may sort a mapping.
        fields["overrides"] = [[pattern, dict(override)] for pattern, override in self.overrides]
        return {"method": self.method} | fields

    @property
    def trained_rank(self) -> int:
        """Rank of the LoRA that trains as many rank-one components on a projection: what a method's cost is held against."""
        return self.rank

    # What a method implements.

    @abc.abstractmethod
    def make_module(self) -> nn.Module:
        """The Flax module, named `adapter`, called as module(x_BTD, projection, context) -> y_BTF.

        It calls `projection` itself, once, so that it may change what goes in and what comes out. It may sow a weighted scalar
        into `losses` (averaged over all adapters and added to the loss) and RouterStats into `metrics`, and draw from the
        RNG streams `dropout`, `expert_dropout` and `expert_choice` in training.
        """

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """The plain kernel that computes what kernel and adapter compute together; MergeError if there is none.

        Leading axes, of stacked layers, go along.
        """
        raise MergeError(f"adapter.method={self.method!r} cannot be merged into a plain kernel")

    @abc.abstractmethod
    def count_parameters(self, d_in: int, d_out: int) -> int:
        """Trained parameters on one d_in x d_out projection."""

    def active_parameters(self, d_in: int, d_out: int) -> int:
        """Those of `count_parameters` that one token's forward pass in training uses; the mean where it is random."""
        return self.count_parameters(d_in, d_out)

    def active_layers(self, num_layers: int) -> int:
        """Layers of a stack whose adapters one token's forward pass in training uses."""
        return num_layers

    @abc.abstractmethod
    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """Forward FLOPs that the equation needs a token (what a dispatch algorithm adds is not counted)."""

    def check_model(self, projections: Mapping[str, tuple[int, int]]) -> None:
        """Raises ConfigError if the adapter does not fit a model.

        Args:
          projections: path -> (d_in, d_out) of all that the model has, see `models.Stack.projections`.
        """
        allowed = f"it matches no projection, which are {', '.join(projections)}"
        is_any = any(self.is_target(path) for path in projections)
        check(is_any, "adapter.targets", self.targets, allowed)
        patterns = [("adapter.targets", target) for target in self.targets]
        patterns += [("adapter.overrides", pattern) for pattern, _ in self.overrides]
        for field, pattern in patterns:
            # A misspelt one would just do nothing. The default names what not every model has: T5 1.0 has no gate.
            is_useful = any(matches(pattern, path) for path in projections)
            check(is_useful or pattern in PROJECTIONS, field, pattern, allowed)

    def check_shard(self, rows: int, length: int) -> None:
        """Raises ConfigError if rows x length tokens, a device's part of a batch, are cut in a way that needs other devices.

        Called for the adapter of each projection, where a batch lies on several devices.
        """
        del rows, length

    # Hooks for methods that need more than their projection's view. The defaults do nothing, and neither models nor
    # training ask which method it is.

    @property
    def second_pass(self) -> SecondPass | None:
        """A second stochastic forward pass of each training step, and how it enters the loss; None for none."""
        return None

    def make_block_module(self) -> nn.Module | None:
        """A module that each block runs first, named `adapter`, called as module(x_BTD, context) -> anything.

        x is the block's input; what it returns is `context.block` of the block's projections.
        """
        return None

    def count_block_parameters(self, emb_dim: int) -> int:
        """Trained parameters of the block module."""
        del emb_dim
        return 0

    def initial_carry(
        self, d_in: int, d_out: int, batch_shape: tuple[int, int], dtype: Any
    ) -> Any | None:
        """What the first layer's adapter finds in `context.link.previous` under its path; None for no carry.

        Args:
          d_in, d_out: of the projection.
          batch_shape: (B, T).
          dtype: type of the computation.
        """
        del d_in, d_out, batch_shape, dtype

    def initialise(self, adapter: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """The whole model's fresh adapter tree, where its parts must agree with one another; runs jitted."""
        del key
        return adapter

    def after_step(
        self, adapter: dict[str, Any], info: StepInfo
    ) -> tuple[dict[str, Any], jax.Array | None]:
        """Changes the whole model's adapter tree after an optimizer step, inside the jitted step.

        Returns (adapter, restart); where the bool scalar `restart` is true, the optimizer's moments start anew (its
        learning-rate schedule goes on). None never restarts.
        """
        del info
        return adapter, None

    def merge_tree(
        self, adapters: Mapping[Path, Mapping[str, Any]], kernels: Mapping[Path, jax.Array]
    ) -> dict[Path, jax.Array]:
        """Merged kernels of all projections; methods whose layers depend on one another override this.

        Args:
          adapters: path of a projection ("layers", "attention", "q") -> its adapter's parameters.
          kernels: the same paths -> kernel, with a leading axis of layers where they are stacked.
        """
        return {
            path: self.for_projection(projection_name(path)).merge(leaves, kernels[path])
            for path, leaves in adapters.items()
        }


def _check_pattern(field: str, pattern: object) -> None:
    allowed = f"projection names ({', '.join(PROJECTIONS)}) or regular expressions"
    check(isinstance(pattern, str) and pattern != "", field, pattern, allowed)
    try:
        with warnings.catch_warnings():
            # Of patterns that will mean something else.
            warnings.simplefilter("error", FutureWarning)
            re.compile(pattern)
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise ConfigError(f"{field}={pattern!r} is not allowed: {allowed} ({error})") from None


def split_layer(path: Path) -> tuple[Path, int | None, Path]:
    """A module's path in the model as (prefix of its stack, layer or None where layers are stacked, path in the block).

    ("encoder", "layers_3", "attention", "query") is (("encoder",), 3, ("attention", "query")).
    """
    for at, name in enumerate(path):
        if name == STACKED:
            return path[:at], None, path[at + 1 :]
        if re.fullmatch(rf"{STACKED}_\d+", name):
            return path[:at], int(name.removeprefix(f"{STACKED}_")), path[at + 1 :]
    raise ValueError(f"{'/'.join(path)} is in no layer")


def projection_name(path: Path) -> str:
    """The path inside the block, "attention/q" or "encoder/attention/query", of a module's path in the model.

    This is what targets and overrides match.
    """
    prefix, _, inner = split_layer(path)
    return "/".join((*prefix, *inner))


def matches(pattern: str, path: str) -> bool:
    """Whether a target or the pattern of an override fits the projection at `path`: by its name or its whole path.

    Where the name is one of ALIASES, the other name and the path that ends in it count too.
    """
    *parents, last = path.split("/")
    names = {last, ALIASES.get(last, last)}
    names |= {"/".join((*parents, name)) for name in names}
    return any(re.fullmatch(pattern, name) for name in names)


def _freeze_overrides(config: AdapterConfig, overrides: Any) -> tuple:
    """Nested tuples from a mapping, after checking that every override gives a valid config."""
    pairs = tuple(overrides.items()) if isinstance(overrides, Mapping) else overrides
    are_pairs = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    )
    check(are_pairs, "adapter.overrides", overrides, "pairs of a pattern and its fields")
    known = {f.name for f in dataclasses.fields(config)} - {"targets", "overrides"}
    known -= config.whole_model_fields
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


def is_adapter(path: Path) -> bool:
    """Whether the parameter at `path` is the adapter's, trained or not: exactly those under a module named `adapter` are."""
    return ADAPTER in path


def is_trained(path: Path) -> bool:
    """Whether the parameter at `path` is trained: the adapter's are, but for its buffers."""
    return is_adapter(path) and not path[-1].startswith(BUFFER)


def lora_a_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """LoRA's A: kaiming-uniform with a = sqrt(5), that is U(-b, b), b = 1 / sqrt(d_in). 2106.09685 [O].

    `shape` ends in (d_in, rank); leading axes are experts and do not count as fan-in.
    """
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
