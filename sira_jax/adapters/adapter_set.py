"""Several trained adapters on one base: each row of a batch is computed with its own, in one forward pass.

Not a method of the registry: a set has no parameters of its own and is not trained, it holds members that were trained alone.
The parameters of member NAME lie where they lay alone, one level deeper: .../adapter/NAME/lora_a.

Every member computes all rows, and each row takes the result of its own. Members that add to the frozen product share it: they
write the same product, which the compiler computes once. So N LoRAs cost one base and N low-rank pairs a token, while a member
that changes the product's input or kernel costs a product more.

Axis letters: B batch, T length, D features in, F features out.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import ADAPTER, PROJECTIONS, AdapterConfig, AdapterFlops, Path
from sira_jax.adapters.context import AdapterContext, LayerLink, Projection
from sira_jax.errors import ConfigError, MergeError, check

MEMBER_NAMES = (
    "letters, digits and _, a letter first, and no attribute of a Flax module (such as name)"
)
_NOT_MERGED = (
    "a set of adapters cannot be merged into a plain kernel: each row of a batch uses another one;"
    " merge one adapter alone"
)
_NOT_TRAINED = "a set of adapters cannot be trained: train each adapter alone and load it"


def is_member_name(name: object) -> bool:
    """Whether an adapter of a set may be called so: parameters and metrics are kept under the name."""
    is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is not None
    # Flax refuses a submodule that has the name of one of its parent's attributes.
    fields = {field.name for field in dataclasses.fields(AdapterSet)}
    return is_name and name not in fields and not hasattr(AdapterSet, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSetConfig(AdapterConfig):
    """The adapters of a `Decoder` whose batches say for each row which one it uses (`adapter_ids`).

    The fields that every method has are the members' here; the set's own are fixed and mean nothing.

    Attributes:
      members: pairs of a name and the adapter's config; the place in it is the adapter's id. In the config of one projection
        (`for_projection`) the config is None where a member has no adapter on it.

    Raises:
      ConfigError: a name that is not allowed or there twice, or a member that is no adapter.
    """

    method: ClassVar[str] = "adapter_set"

    members: tuple[tuple[str, AdapterConfig | None], ...] = ()
    rank: int = dataclasses.field(default=1, init=False, repr=False)
    alpha: float = dataclasses.field(default=1.0, init=False, repr=False)
    dropout_rate: float = dataclasses.field(default=0.0, init=False, repr=False)
    targets: tuple[str, ...] | str = dataclasses.field(default=PROJECTIONS, init=False, repr=False)
    overrides: Any = dataclasses.field(default=(), init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        names = [name for name, _ in self.members]
        for name, config in self.members:
            check(is_member_name(name), "adapter.members", name, MEMBER_NAMES)
            check(names.count(name) == 1, "adapter.members", name, "each name once")
            is_single = isinstance(config, AdapterConfig) and not isinstance(
                config, AdapterSetConfig
            )
            check(config is None or is_single, f"adapter.members[{name!r}]", config, "an adapter")

    @property
    def _present(self) -> list[tuple[str, AdapterConfig]]:
        return [(name, config) for name, config in self.members if config is not None]

    def for_projection(self, path: str) -> "AdapterSetConfig | None":
        """The set with each member's config at `path`; None where no member has an adapter."""
        members = tuple(
            (name, config and config.for_projection(path)) for name, config in self.members
        )
        restricted = dataclasses.replace(self, members=members)
        return restricted if restricted._present else None

    def check_model(self, projections: Mapping[str, tuple[int, int]]) -> None:
        """Raises ConfigError if a member does not fit a model."""
        for _, config in self._present:
            config.check_model(projections)

    def to_dict(self) -> dict[str, Any]:
        """Names and fields of the members, as plain data for logs; `make_config` does not take it."""
        members = {name: config.to_dict() for name, config in self._present}
        return {"method": self.method, "members": members}

    def make_module(self) -> nn.Module:
        return AdapterSet(config=self, name=ADAPTER)

    def make_block_module(self) -> nn.Module | None:
        """A module that returns {name: what the member's block module returns}, of the members that have one."""
        return AdapterSetBlock(config=self, name=ADAPTER)

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return sum(config.count_parameters(d_in, d_out) for _, config in self._present)

    def count_block_parameters(self, emb_dim: int) -> int:
        return sum(config.count_block_parameters(emb_dim) for _, config in self._present)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The sum over the members, as every token is computed with all of them."""
        flops = [config.flops_per_token(d_in, d_out) for _, config in self._present]
        return AdapterFlops(
            total=sum(each.total for each in flops), router=sum(each.router for each in flops)
        )

    def initial_carry(
        self, d_in: int, d_out: int, batch_shape: tuple[int, int], dtype: Any
    ) -> dict[str, Any] | None:
        """{name: carry} of the members that have one, or None."""
        carries = {
            name: config.initial_carry(d_in, d_out, batch_shape, dtype)
            for name, config in self._present
        }
        return {name: carry for name, carry in carries.items() if carry is not None} or None

    def initialise(self, adapter: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """Always raises ConfigError: a set holds adapters that are trained already."""
        raise ConfigError(_NOT_TRAINED)

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """Always raises MergeError: rows of one batch use different adapters."""
        raise MergeError(_NOT_MERGED)

    def merge_tree(
        self, adapters: Mapping[Path, Mapping[str, Any]], kernels: Mapping[Path, jax.Array]
    ) -> dict[Path, jax.Array]:
        """Always raises MergeError, as `merge`."""
        raise MergeError(_NOT_MERGED)


class _Member(nn.Module):
    """One member under its name: the module its config makes, whose own name is always `adapter`, without that level."""

    config: AdapterConfig
    is_block: bool = False

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        config = self.config
        module = config.make_block_module() if self.is_block else config.make_module()
        if module is None:
            return None
        nn.share_scope(self, module)
        return module(*inputs)


class AdapterSet(nn.Module):
    """The members' modules, each under its name, on one projection; no parameters of its own."""

    config: AdapterSetConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """(B, T, F): each row from its own member, the frozen projection's where there is none.

        A member sees the other rows as padding: they take no place in an expert's queue and count in no statistics.

        Raises:
          ConfigError: in training, or if `context.adapter_ids_B` is missing or has another shape.
        """
        ids_B = _row_ids(context, x_BTD.shape[0], self.is_initializing())
        y_BTF = projection(x_BTD)
        for index, (name, config) in enumerate(self.config.members):
            if config is None:
                continue
            is_own_B = ids_B == index
            own = _context_of(context, name, is_own_B, x_BTD.shape[:2])
            own_BTF = _Member(config, name=name)(x_BTD, projection, own)
            y_BTF = jnp.where(is_own_B[:, None, None], own_BTF.astype(y_BTF.dtype), y_BTF)
            _hand_on(context.link, own.link, name)
        return y_BTF


class AdapterSetBlock(nn.Module):
    """The members' block modules, each under its name; no parameters of its own."""

    config: AdapterSetConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> dict[str, Any]:
        """{name: what the member's block module returns for this layer}, of the members that have one."""
        ids_B = _row_ids(context, x_BTD.shape[0], self.is_initializing())
        returned = {}
        for index, (name, config) in enumerate(self.config.members):
            own = _context_of(context, name, ids_B == index, x_BTD.shape[:2])
            value = config and _Member(config, is_block=True, name=name)(x_BTD, own)
            if value is not None:
                returned[name] = value
        return returned


def _row_ids(context: AdapterContext, batch: int, initializing: bool) -> jax.Array:
    if not context.deterministic:
        raise ConfigError(_NOT_TRAINED)
    ids_B = context.adapter_ids_B
    if ids_B is None and initializing:
        # Shapes do not depend on it.
        return jnp.full((batch,), -1, jnp.int32)
    shape = None if ids_B is None else ids_B.shape
    allowed = f"({batch},), an adapter's place in the set for each row, -1 for none"
    check(shape == (batch,), "adapter_ids.shape", shape, allowed)
    return ids_B


def _context_of(
    context: AdapterContext, name: str, is_own_B: jax.Array, shape: tuple[int, int]
) -> AdapterContext:
    """What a member alone would be given, had the batch no other rows but padding."""
    is_own_B1 = is_own_B[:, None]
    valid_BT = context.valid_or_all(shape)
    segments_BT, prompt_BT = context.segment_ids_BT, context.prompt_BT
    link = context.link
    return context.replace(
        valid_BT=valid_BT & is_own_B1,
        segment_ids_BT=None if segments_BT is None else jnp.where(is_own_B1, segments_BT, 0),
        prompt_BT=(valid_BT if prompt_BT is None else prompt_BT) & is_own_B1,
        adapter_ids_B=None,
        block=None if context.block is None else context.block.get(name),
        link=None if link is None else _link_of(link, name),
    )


def _link_of(link: LayerLink, name: str) -> LayerLink:
    """A member's part of what the layer before left."""
    return LayerLink(
        {path: carries[name] for path, carries in link.previous.items() if name in carries}
    )


def _hand_on(link: LayerLink | None, own: LayerLink | None, name: str) -> None:
    """Puts what a member leaves for the next layer among what the others leave."""
    if link is None or own is None:
        return
    for path, value in own.next.items():
        link.next[path] = link.next.get(path, {}) | {name: value}
