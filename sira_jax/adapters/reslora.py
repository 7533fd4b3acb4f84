"""ResLoRA: low-rank pairs with shortcuts from the same projection of earlier layers. arXiv 2402.18039.

Derived from the paper's equations; of the official code [O] only conventions are taken, as it has defects (its weight norms
leave the scale out and add to the frozen weight, and its two merge flags mean other things than its documentation says).

Axis letters: B batch, T length, D features in, F features out, R rank, L layers, P previous layers, Q = P * R.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters.base import ADAPTER, AdapterConfig, AdapterFlops, Path
from sira_jax.adapters.checks import check_count
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import add_to_kernel, lora_pair
from sira_jax.adapters.trees import by_layer, replace_kernels
from sira_jax.errors import MergeError, check
from sira_jax.routing import project

CONNECTIONS = ("input", "block", "middle")
MERGE_BY = ("weights", "inputs")
FIRST_INPUTS = ("zero", "repeat")
# What a module sows for `merge_by="inputs"`: the squared norm, summed over valid tokens, of what a merge compares.
SQUARED_NORM = "squared_norm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResLoRAConfig(AdapterConfig):
    """Fields of ResLoRA: those of AdapterConfig and

    Attributes:
      connection: where the shortcut is, n being the layer [P]:
        "input": y_n += s B_n A_n (x_n + x_{n-1});
        "block": y_n += s sum over 0 <= i <= m of B_{n-i} A_{n-i} x_n;
        "middle": y_n += s B_n (A_n x_n + sum over 1 <= i <= m of A_{n-i} x_{n-i}).
        Layers before the first contribute nothing, but for `first_input`. The default is the one that merges exactly [C].
      num_previous: m, at least 1 [C: 1]; "input" takes exactly one previous layer.
      first_input: what stands for x_{n-1} in the first layer of "input": "zero" [C], or "repeat", which takes x_n itself
        [O], so that the first pair's input is as large as the others'.
      merge_by: how "input" and "middle" estimate the norms that their merge compares: "weights", from the weights alone, or
        "inputs", from a batch [P; see `merge_with_inputs`]. "block" needs neither.
    """

    method: ClassVar[str] = "reslora"
    training_fields: ClassVar[frozenset[str]] = AdapterConfig.training_fields | {"merge_by"}

    connection: str = "block"
    num_previous: int = 1
    first_input: str = "zero"
    merge_by: str = "weights"

    def __post_init__(self):
        for name, choices in (
            ("connection", CONNECTIONS),
            ("first_input", FIRST_INPUTS),
            ("merge_by", MERGE_BY),
        ):
            value = getattr(self, name)
            check(value in choices, f"adapter.{name}", value, f"one of {', '.join(choices)}")
        check_count("num_previous", self.num_previous)
        check(
            self.connection != "input" or self.num_previous == 1,
            "adapter.num_previous",
            self.num_previous,
            'with connection="input" only 1',
        )
        super().__post_init__()

    def make_module(self) -> nn.Module:
        return ResLoRA(config=self, name=ADAPTER)

    def initial_carry(
        self, d_in: int, d_out: int, batch_shape: tuple[int, int], dtype: Any
    ) -> dict[str, jax.Array]:
        """Zeros. "input": the input; "block": A and B of P layers side by side; "middle": A x of P layers. Nearest first."""
        width = self.num_previous * self.rank
        if self.connection == "block":
            return {"lora_a": jnp.zeros((d_in, width)), "lora_b": jnp.zeros((width, d_out))}
        if self.connection == "middle":
            return {"hidden": jnp.zeros((self.num_previous, *batch_shape, self.rank), dtype)}
        carry = {"input": jnp.zeros((*batch_shape, d_in), dtype)}
        return carry | ({"is_first": jnp.array(True)} if self.first_input == "repeat" else {})

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """Always raises MergeError: one layer's adapter does not say what the layers before it add."""
        raise MergeError(
            "adapter.method='reslora' cannot be merged one projection at a time: a layer's output takes in earlier layers;"
            " merge the whole model with sira_jax.adapters.merge"
        )

    def merge_tree(
        self, adapters: Mapping[Path, Mapping[str, Any]], kernels: Mapping[Path, jax.Array]
    ) -> dict[Path, jax.Array]:
        """Merged kernels: "block" exactly, the others approximately, as the class says.

        Raises:
          MergeError: `merge_by="inputs"` where norms are needed: `merge_with_inputs` takes them.
        """
        return _merge_layers(self, adapters, kernels, None)

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The products; the sums of inputs or hidden values are not counted. From layer m on, where all m layers are there."""
        pairs = 1 + self.num_previous if self.connection == "block" else 1
        return AdapterFlops(total=2 * pairs * self.rank * (d_in + d_out))


def merge_with_inputs(
    config: ResLoRAConfig, params: Mapping[str, Any], norms: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The parameters of the merged model, as `adapters.merge`, with norms measured on data in place of estimates.

    Args:
      config: any `merge_by`.
      params: all parameters, layers stacked or apart.
      norms: projection name ("attention/q") -> (L,), of each layer the Frobenius norm over the tokens of a batch of x_n
        ("input") or of A_n x_n ("middle"), see `training.merging.measure_norms`. "block" needs none.

    Raises:
      MergeError: norms of a projection are missing, or of another shape, or not finite numbers of 0 or more.
    """
    return replace_kernels(
        params, lambda adapters, kernels: _merge_layers(config, adapters, kernels, norms)
    )


def _merge_layers(
    config: ResLoRAConfig,
    adapters: Mapping[Path, Mapping[str, Any]],
    kernels: Mapping[Path, jax.Array],
    norms: Mapping[str, np.ndarray] | None,
) -> dict[Path, jax.Array]:
    merged: dict[Path, Any] = {}
    for name, places in by_layer(adapters).items():
        own = config.for_projection(name)
        layers = [
            _Layer(*(leaf if index is None else leaf[index] for leaf in leaves))
            for path, index in places
            for leaves in [(adapters[path]["lora_a"], adapters[path]["lora_b"], kernels[path])]
        ]
        shares = _shares(own, name, layers, norms) if own.connection != "block" else None
        for n, (path, index) in enumerate(places):
            if shares is None:
                summed = layers[max(0, n - own.num_previous) : n + 1]
                a_DQ = jnp.concatenate([layer.lora_a_DR for layer in summed], axis=1)
                b_QF = jnp.concatenate([layer.lora_b_RF for layer in summed], axis=0)
                delta_DF = own.scale * (a_DQ @ b_QF)
            else:
                delta_DF = (1 + shares[n]) * layers[n].delta(own.scale)
            new_DF = add_to_kernel(jnp.asarray(layers[n].kernel_DF), delta_DF)
            if index is None:
                merged[path] = new_DF
            else:
                merged.setdefault(path, []).append(new_DF)
    return {
        path: jnp.stack(kernel) if isinstance(kernel, list) else kernel
        for path, kernel in merged.items()
    }


class _Layer(NamedTuple):
    lora_a_DR: jax.Array
    lora_b_RF: jax.Array
    kernel_DF: jax.Array

    def delta(self, scale: float) -> jax.Array:
        return scale * (jnp.asarray(self.lora_a_DR) @ jnp.asarray(self.lora_b_RF))


def _shares(
    config: ResLoRAConfig,
    name: str,
    layers: Sequence[_Layer],
    norms: Mapping[str, np.ndarray] | None,
) -> list[float]:
    """a_n of each layer: how large what it takes from earlier layers is, measured by its own."""
    sizes = _sizes(config, name, layers, norms)
    shares = []
    for n, own in enumerate(sizes):
        earlier = sizes[max(0, n - config.num_previous) : n]
        # Where a norm is 0 the ratio is taken as 1 [O].
        shares.append(sum(size / own if size > 0 and own > 0 else 1.0 for size in earlier))
    if config.connection == "input" and config.first_input == "repeat":
        shares[0] = 1.0
    return shares


def _sizes(
    config: ResLoRAConfig,
    name: str,
    layers: Sequence[_Layer],
    norms: Mapping[str, np.ndarray] | None,
) -> list[float]:
    """Norms of x_n ("input") or A_n x_n ("middle") of the layers, up to a common factor."""
    if norms is not None:
        found = np.asarray(norms.get(name, ()), np.float64)
        if found.shape != (len(layers),) or not np.all(np.isfinite(found) & (found >= 0)):
            raise MergeError(
                f"norms[{name!r}]={found.tolist()} is not allowed: {len(layers)} finite numbers of 0 or more, one a layer"
            )
        return found.tolist()
    if config.merge_by == "inputs":
        raise MergeError(
            f"adapter.merge_by='inputs' needs norms of {name} measured on a batch: measure them with"
            " training.merging.measure_norms and merge with adapters.reslora.merge_with_inputs"
        )
    # The input of layer n comes out of layer n - 1, so it is taken to be as large as that layer's W0 + s A B; what comes into
    # the first layer, of which nothing is known, as large as what comes into the second [O].
    adapted = [
        float(jnp.linalg.norm(layer.kernel_DF.astype(jnp.float32) + layer.delta(config.scale)))
        for layer in layers
    ]
    inputs = [adapted[0], *adapted[:-1]]
    if config.connection == "input":
        return inputs
    # A projects onto R of D directions: its norm times that of its input [C: the paper's rule is for inputs].
    return [
        size * float(jnp.linalg.norm(layer.lora_a_DR))
        for size, layer in zip(inputs, layers, strict=True)
    ]


class ResLoRA(nn.Module):
    """Parameters, float32: lora_a (D, R) kaiming-uniform, lora_b (R, F) zero.

    Reads and sets the projection's entry of `context.link` (see `ResLoRAConfig.initial_carry`); without a link it is a first
    layer. Padding tokens carry whatever they have. With `merge_by="inputs"` it sows into `metrics` the squared norm that
    `merge_with_inputs` asks for, over valid tokens.
    """

    config: ResLoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the low-rank terms."""
        config, rank = self.config, self.config.rank
        y_BTF = projection(x_BTD)
        lora_a_DR, lora_b_RF = lora_pair(self, projection, rank)
        dropout = nn.Dropout(config.dropout_rate, deterministic=context.deterministic)
        previous = None if context.link is None else context.link.previous[projection.path]
        carry: dict[str, jax.Array] = {}
        if config.connection == "input":
            carry = {"input": x_BTD}
            self._sow_norm(x_BTD, context)
            summed_BTD = x_BTD
            if previous is not None:
                before_BTD = previous["input"]
                if config.first_input == "repeat":
                    before_BTD = jnp.where(previous["is_first"], x_BTD, before_BTD)
                    carry["is_first"] = jnp.array(False)
                summed_BTD = x_BTD + before_BTD
            elif config.first_input == "repeat":
                summed_BTD = x_BTD + x_BTD
            hidden_BTR = project(dropout(summed_BTD), lora_a_DR.astype(x_BTD.dtype))
        elif config.connection == "middle":
            hidden_BTR = project(dropout(x_BTD), lora_a_DR.astype(x_BTD.dtype))
            self._sow_norm(hidden_BTR, context)
            if previous is not None:
                before_PBTR = previous["hidden"]
                own_1BTR = hidden_BTR[None].astype(before_PBTR.dtype)
                carry = {"hidden": jnp.concatenate([own_1BTR, before_PBTR[:-1]])}
                hidden_BTR += jnp.sum(before_PBTR, axis=0, dtype=jnp.float32)
        else:
            if previous is not None:
                # One product with all layers' pairs side by side: [A_n A_{n-1} ..] and [B_n; B_{n-1}; ..].
                width = config.num_previous * rank
                lora_a_DR = jnp.concatenate([lora_a_DR, previous["lora_a"]], axis=1)
                lora_b_RF = jnp.concatenate([lora_b_RF, previous["lora_b"]], axis=0)
                carry = {"lora_a": lora_a_DR[:, :width], "lora_b": lora_b_RF[:width]}
            hidden_BTR = project(dropout(x_BTD), lora_a_DR.astype(x_BTD.dtype))
        if context.link is not None:
            context.link.next[projection.path] = carry
        hidden_BTR = (hidden_BTR * config.scale).astype(x_BTD.dtype)
        delta_BTF = project(hidden_BTR, lora_b_RF.astype(x_BTD.dtype))
        return y_BTF + delta_BTF.astype(y_BTF.dtype)

    def _sow_norm(self, values: jax.Array, context: AdapterContext) -> None:
        if self.config.merge_by == "inputs" and self.is_mutable_collection("metrics"):
            valid_BT1 = context.valid_or_all(values.shape[:2])[..., None]
            squares = jnp.where(valid_BT1, jnp.square(values.astype(jnp.float32)), 0.0)
            self.sow("metrics", SQUARED_NORM, jnp.sum(squares))
