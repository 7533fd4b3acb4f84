"""Shape of a decoder-only language model as plain data. Every difference between model families is a field here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sira_jax.errors import check, is_finite_number, is_whole_number
from sira_jax.models.rope import LinearRopeScaling, RopeScaling
from sira_jax.models.stacks import Stack

ACTIVATIONS = ("silu", "gelu_tanh")
REMAT_POLICIES = ("none", "full", "projections", "dots", "dots_no_batch")
DTYPES = ("float32", "bfloat16", "float16")


# Fields that every model's config has -> what is allowed.
CHOICES = {"dtype": DTYPES, "param_dtype": DTYPES, "remat_policy": REMAT_POLICIES}


def check_size(field: str, value: object) -> None:
    """Raises ConfigError unless `value` is a number that an axis of an array may have."""
    is_size = is_whole_number(value) and 0 < value < 2**31
    check(is_size, field, value, "a whole number over 0, under 2**31")


def check_choices(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ConfigError unless each of these fields is one of its choices."""
    for name, allowed in choices.items():
        value = getattr(config, name)
        check(value in allowed, f"model.{name}", value, f"one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of the decoders that docs/models.md lists: Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3.

    Attributes:
      vocab_size: rows of the token embedding, V.
      emb_dim: width of the residual stream, D.
      num_layers: blocks.
      num_heads: query heads; `num_kv_heads` divides it (grouped-query attention).
      num_kv_heads: key and value heads.
      head_dim: width of a head (explicit, since some families do not have emb_dim / num_heads); even.
      mlp_dim: hidden width of the gated MLP.
      activation: of the MLP's gate, "silu" or "gelu_tanh" (GELU by its tanh approximation).
      norm_eps: epsilon of RMSNorm.
      norm_plus_one: RMSNorm multiplies by 1 + its parameter (Gemma).
      qk_norm: RMSNorm on each head of q and k, before the rotation (Qwen3, Gemma 3).
      sandwich_norms: further norms on what attention and MLP give, before it is added to the stream (Gemma 2 and 3;
        arXiv 2105.13290).
      scale_embeddings: token embeddings are multiplied by sqrt(emb_dim), rounded to `dtype` (Gemma); the logits are not.
      query_pre_attn_scalar: attention logits are q . k / sqrt(this); None: head_dim.
      attention_softcap: attention logits x become cap * tanh(x / cap) (Gemma 2); None: they stay.
      final_softcap: the same of the logits over the vocabulary.
      sliding_window: a token of a windowed layer sees this many tokens of its segment, itself the last (arXiv 2310.06825);
        None: no layer is windowed.
      window_pattern: which layers are windowed, repeated over the layers: (True,) all, (True, False) every other one
        beginning with the first. Without sliding_window it has no meaning.
      rope_theta: base of the rotary frequencies.
      rope_scaling: frequency scaling, or None.
      local_rope_theta: base of the windowed layers, which then have no rope_scaling (Gemma 3); None: they rotate as all do.
      tie_embeddings: the logits reuse the token embedding.
      qkv_bias: biases on q, k and v (Qwen2).
      max_positions: longest sequence; decoding caches are never longer.
      dtype: type of the computation; the router's arithmetic, norms, softmax and loss stay in float32.
      param_dtype: type the frozen base is held in. Adapters are always float32.
      scan_layers: stack the blocks' parameters on axis 0 and compile one block.
      remat_policy: "none" keeps activations, "full" recomputes a block in the backward pass, "projections" all of it that is
        cheap: it keeps what the projections give with their adapters, what A and the routers give, and attention's output, but
        not its scores; "dots" keeps the results of matrix products, "dots_no_batch" of those without batch axes.
    """

    vocab_size: int
    emb_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    activation: str = "silu"
    norm_eps: float = 1e-5
    norm_plus_one: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | LinearRopeScaling | None = None
    local_rope_theta: float | None = None
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

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """Whether each layer has the sliding window."""
        pattern = self.window_pattern if self.sliding_window is not None else (False,)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

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
            check_size(f"model.{name}", getattr(self, name))
        check(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        for name in (
            "norm_plus_one",
            "qk_norm",
            "sandwich_norms",
            "scale_embeddings",
            "tie_embeddings",
            "qkv_bias",
            "scan_layers",
        ):
            check(
                isinstance(getattr(self, name), bool),
                f"model.{name}",
                getattr(self, name),
                "a bool",
            )
        scalings = RopeScaling | LinearRopeScaling | None
        check(
            isinstance(self.rope_scaling, scalings),
            "model.rope_scaling",
            self.rope_scaling,
            "a RopeScaling, a LinearRopeScaling or None",
        )
        check(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            check(is_finite_number(value) and value > 0, f"model.{name}", value, "over 0")
        for name in (
            "query_pre_attn_scalar",
            "attention_softcap",
            "final_softcap",
            "local_rope_theta",
        ):
            value = getattr(self, name)
            is_allowed = value is None or (is_finite_number(value) and value > 0)
            check(is_allowed, f"model.{name}", value, "a number over 0, or None")
        self._check_window()
        check_choices(self, CHOICES | {"activation": ACTIVATIONS})

    def _check_window(self):
        window, pattern = self.sliding_window, self.window_pattern
        check(
            window is None or (is_whole_number(window) and window > 0),
            "model.sliding_window",
            window,
            "a whole number over 0, or None",
        )
        is_list = isinstance(pattern, list | tuple) and len(pattern) > 0
        check(
            is_list and all(isinstance(item, bool) for item in pattern),
            "model.window_pattern",
            pattern,
            "a list of bools, one or more",
        )
        object.__setattr__(self, "window_pattern", tuple(pattern))
        check(
            self.local_rope_theta is None or window is not None,
            "model.local_rope_theta",
            self.local_rope_theta,
            "None without sliding_window",
        )
