"""Shape of a decoder-only language model as plain data. Every difference between model families is a field here."""

import dataclasses

from sira_jax.errors import check, is_finite_number, is_whole_number
from sira_jax.models.stacks import Stack

REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 and later (its `rope_scaling` with rope_type "llama3").

    Wave lengths beyond `original_max_positions / low_freq_factor` are stretched by `factor`, those under
    `original_max_positions / high_freq_factor` are kept, and those between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(is_finite_number(value), f"rope_scaling.{field.name}", value, "a number")
        check(self.factor >= 1, "rope_scaling.factor", self.factor, "at least 1")
        check(
            self.low_freq_factor > 0, "rope_scaling.low_freq_factor", self.low_freq_factor, "over 0"
        )
        check(
            self.high_freq_factor > self.low_freq_factor,
            "rope_scaling.high_freq_factor",
            self.high_freq_factor,
            f"over low_freq_factor={self.low_freq_factor}",
        )
        check(
            self.original_max_positions > 0,
            "rope_scaling.original_max_positions",
            self.original_max_positions,
            "over 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of the Llama family (Llama, SmolLM2, TinyLlama, Mistral, Qwen2).

    Attributes:
      vocab_size: rows of the token embedding, V.
      emb_dim: width of the residual stream, D.
      num_layers: blocks.
      num_heads: query heads; `num_kv_heads` divides it (grouped-query attention).
      num_kv_heads: key and value heads.
      head_dim: width of a head (explicit, since some families do not have emb_dim / num_heads); even.
      mlp_dim: hidden width of the SwiGLU MLP.
      norm_eps: epsilon of RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Llama-3 frequency scaling, or None.
      tie_embeddings: the logits reuse the token embedding.
      qkv_bias: biases on q, k and v (Qwen2).
      max_positions: longest sequence; decoding caches are never longer.
      dtype: type of the computation; the router's arithmetic, norms, softmax and loss stay in float32.
      param_dtype: type the frozen base is held in. Adapters are always float32.
      scan_layers: stack the blocks' parameters on axis 0 and compile one block.
      remat_policy: "none" keeps activations, "full" recomputes a block in the backward pass, "dots" keeps the results of
        matrix products, "dots_no_batch" those without batch axes.
    """

    vocab_size: int
    emb_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    qkv_bias: bool = False
    max_positions: int = 2048
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat_policy: str = "none"

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The one of all blocks, at the root of the parameter tree."""
        return (Stack((), self.num_layers, self.projections),)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Path in a block -> (d_in, d_out) of the projections that may carry adapters, in the order they are computed."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "attention/q": (self.emb_dim, queries),
            "attention/k": (self.emb_dim, keys),
            "attention/v": (self.emb_dim, keys),
            "attention/o": (queries, self.emb_dim),
            "mlp/gate": (self.emb_dim, self.mlp_dim),
            "mlp/up": (self.emb_dim, self.mlp_dim),
            "mlp/down": (self.mlp_dim, self.emb_dim),
        }

    def __post_init__(self):
        for name in (
            "vocab_size",
            "emb_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            check(
                is_whole_number(value) and value > 0,
                f"model.{name}",
                value,
                "a whole number over 0",
            )
        check(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        for name in ("tie_embeddings", "qkv_bias", "scan_layers"):
            check(
                isinstance(getattr(self, name), bool),
                f"model.{name}",
                getattr(self, name),
                "a bool",
            )
        is_scaling = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        check(is_scaling, "model.rope_scaling", self.rope_scaling, "a RopeScaling or None")
        check(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number")
        check(
            is_finite_number(self.norm_eps) and self.norm_eps > 0,
            "model.norm_eps",
            self.norm_eps,
            "over 0",
        )
        check(
            is_finite_number(self.rope_theta) and self.rope_theta > 0,
            "model.rope_theta",
            self.rope_theta,
            "over 0",
        )
        for name in ("dtype", "param_dtype"):
            check(
                getattr(self, name) in DTYPES,
                f"model.{name}",
                getattr(self, name),
                f"one of {', '.join(DTYPES)}",
            )
        check(
            self.remat_policy in REMAT_POLICIES,
            "model.remat_policy",
            self.remat_policy,
            f"one of {', '.join(REMAT_POLICIES)}",
        )
