"""Shape of an encoder-decoder language model of the T5 family as plain data."""

import dataclasses

from sira_jax.errors import check, is_finite_number, is_whole_number
from sira_jax.models.config import CHOICES, check_choices, check_size
from sira_jax.models.stacks import Stack

ACTIVATIONS = ("relu", "gelu", "silu", "linear")
_SIZES = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "relpos_num_buckets",
    "relpos_max_distance",
    "max_positions",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Sizes and options of the T5 family (T5 1.0, 1.1, LM-adapted, FLAN-T5, mT5, ByT5, umT5).

    Attributes:
      vocab_size: rows of the token embedding, which encoder and decoder share, V.
      emb_dim: width of the residual streams, D.
      num_heads: heads.
      head_dim: width of a head; num_heads * head_dim need not be emb_dim.
      mlp_dim: hidden width of the MLP.
      num_encoder_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder.
      mlp_activations: ("relu",) for T5 1.0's plain MLP; ("gelu", "linear") for the gated one from 1.1 on, the product of
        one activation for each of two input projections. "gelu" is the tanh approximation.
      tie_embeddings: the logits reuse the token embedding on activations scaled by 1 / sqrt(emb_dim) (1.0).
      norm_eps: epsilon of RMSNorm.
      relpos_num_buckets: buckets of relative positions; even, as the encoder has half of them for each direction.
      relpos_max_distance: distances from here on share the last bucket.
      relpos_per_layer: each block has its own table of relative positions (umT5, and T5X's scalable_t5); otherwise the
        blocks of a stack share one.
      max_positions: longest sequence on either side. A limit of this package: T5 itself has none.
      decoder_start_id: the token that the decoder's input starts with.
      dtype: type of the computation; the router's arithmetic, norms, softmax, logits and loss stay in float32.
      param_dtype: type the frozen base is held in. Adapters are always float32.
      scan_layers: stack the blocks' parameters on axis 0, each stack's apart, and compile one block of each.
      remat_policy: see DecoderConfig.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    relpos_per_layer: bool = False
    max_positions: int = 2048
    decoder_start_id: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat_policy: str = "none"

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Names of the MLP's input projections, in the order of `mlp_activations`."""
        if len(self.mlp_activations) == 1:
            return ("wi",)
        return tuple(f"wi_{number}" for number in range(len(self.mlp_activations)))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The encoder's and the decoder's."""
        kinds = {
            "encoder": (("attention",), self.num_encoder_layers),
            "decoder": (("self_attention", "encoder_decoder_attention"), self.num_decoder_layers),
        }
        return tuple(
            Stack((name,), num_layers, self._projections(name, attentions))
            for name, (attentions, num_layers) in kinds.items()
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Those of all stacks."""
        return {path: sizes for stack in self.stacks for path, sizes in stack.projections.items()}

    def _projections(self, stack: str, attentions: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        width, heads = self.emb_dim, self.num_heads * self.head_dim
        found = {}
        for attention in attentions:
            for name in ("query", "key", "value"):
                found[f"{stack}/{attention}/{name}"] = (width, heads)
            found[f"{stack}/{attention}/out"] = (heads, width)
        for name in self.mlp_inputs:
            found[f"{stack}/mlp/{name}"] = (width, self.mlp_dim)
        return found | {f"{stack}/mlp/wo": (self.mlp_dim, width)}

    def __post_init__(self):
        for name in _SIZES:
            check_size(f"model.{name}", getattr(self, name))
        allowed = f"one or two of {', '.join(ACTIVATIONS)}"
        activations = self.mlp_activations
        check(
            isinstance(activations, list | tuple)
            and len(activations) in (1, 2)
            and all(name in ACTIVATIONS for name in activations),
            "model.mlp_activations",
            activations,
            allowed,
        )
        object.__setattr__(self, "mlp_activations", tuple(activations))
        for name in ("tie_embeddings", "relpos_per_layer", "scan_layers"):
            value = getattr(self, name)
            check(isinstance(value, bool), f"model.{name}", value, "a bool")
        is_eps = is_finite_number(self.norm_eps) and self.norm_eps > 0
        check(is_eps, "model.norm_eps", self.norm_eps, "over 0")
        buckets = self.relpos_num_buckets
        check(
            buckets % 4 == 0,
            "model.relpos_num_buckets",
            buckets,
            "a multiple of 4: half for each direction in the encoder, half of those for exact distances",
        )
        check(
            self.relpos_max_distance > buckets // 2,
            "model.relpos_max_distance",
            self.relpos_max_distance,
            f"over relpos_num_buckets / 2 = {buckets // 2}, the distances with a bucket each",
        )
        start = self.decoder_start_id
        check(
            is_whole_number(start) and 0 <= start < self.vocab_size,
            "model.decoder_start_id",
            start,
            f"from 0 to vocab_size - 1 = {self.vocab_size - 1}",
        )
        check_choices(self, CHOICES)
