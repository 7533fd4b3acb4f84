"""What this package's models, of either kind, add to T5X's: fresh parameters with logical axes, the adapter's part of the loss.

Axis letters: B batch, L length of the decoder's input, V vocabulary.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core as flax_core

from sira_jax.adapters import AdapterConfig, is_adapter, partition
from sira_jax.checkpoints.adapter_file import load_adapter, read_header
from sira_jax.errors import CheckpointError, ConfigError, check, is_whole_number
from sira_jax.models import fresh_adapter
from sira_jax.t5x_integration import rows
from sira_jax.t5x_integration.engine import losses
from sira_jax.t5x_integration.engine import metrics as metrics_lib
from sira_jax.t5x_integration.logical_axes import parameter_axes
from sira_jax.t5x_integration.router_metrics import router_metrics
from sira_jax.training.train_state import merge_params
from sira_jax.training.train_step import auxiliary_loss, router_sums, step_rngs, symmetric_kl

Batch = Mapping[str, jax.Array]
# The mean over the target tokens of the whole batch, as in native training.
MEAN_OVER_TARGETS = "NUM_REAL_TARGET_TOKENS"


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a training pass knows besides its microbatch.

    Attributes:
      step: optimizer steps done before this one, int32 scalar.
      index: of the microbatch.
      microbatches: of the step.
      weights_BL: float32, of the microbatch's target tokens in the loss.
      total_weight: their sum over the whole batch, at least 1.
      normaliser: what the whole batch's sum is divided by.
    """

    step: jax.Array
    index: jax.Array | int
    microbatches: int
    weights_BL: jax.Array
    total_weight: jax.Array
    normaliser: Any


class Adapted:
    """What both kinds of models add to T5X's."""

    module: nn.Module

    def _check(self, module_class: type, seed: Any, num_steps: Any) -> None:
        name = type(self).__name__
        allowed = f"a sira_jax.models.{module_class.__name__}"
        check(isinstance(self.module, module_class), f"{name}.module", self.module, allowed)
        is_seed = is_whole_number(seed) and 0 <= seed < 2**32
        check(is_seed, f"{name}.seed", seed, "a whole number from 0 to 2**32 - 1")
        is_count = is_whole_number(num_steps) and num_steps >= 1
        check(is_count, f"{name}.num_steps", num_steps, "a whole number of at least 1")

    def get_initial_variables(
        self, rng: jax.Array, input_shapes: Any, input_types: Any = None
    ) -> flax_core.FrozenDict:
        """Fresh parameters and their logical axes.

        The base is drawn from T5X's key; the adapter from `seed`, as native training draws it, or read from `adapter_path`.
        """
        del input_shapes, input_types
        boxed = self.module.init(rng, self.module.init_batch())["params"]
        _, base = partition(nn.unbox(boxed), is_adapter)
        params = merge_params(base, self._initial_adapter())
        return flax_core.freeze({"params": params, "params_axes": parameter_axes(boxed)})

    def _initial_adapter(self) -> dict[str, Any]:
        if self.adapter_path is None or self.module.adapter is None:
            return fresh_adapter(self.module, jax.random.key(self.seed))
        header = read_header(self.adapter_path)
        check_adapter(header.config, self.module.adapter, self.adapter_path)
        # The base may not be loaded yet: AdapterTrainer compares its fingerprint.
        return load_adapter(self.adapter_path, self.module.config, header.fingerprint)[1]

    def prepare_step(
        self, batch: Batch, step: jax.Array, microbatches: int
    ) -> tuple[Callable[[jax.Array, jax.Array | int], Pass], jax.Array]:
        """How to make the Pass of each microbatch from its part of the returned weights (B, L)."""
        normaliser, weights_BL = losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        weights_BL = jnp.asarray(weights_BL, jnp.float32)
        total = jnp.maximum(jnp.sum(weights_BL), 1.0)
        if self._loss_normalizing_factor == MEAN_OVER_TARGETS:
            normaliser = total  # without a target token the loss is 0, and no quotient of zeros
        normaliser = 1.0 if normaliser is None else normaliser

        def make_pass(weights_BL, index):
            return Pass(step, index, microbatches, weights_BL, total, normaliser)

        return make_pass, weights_BL

    def loss_fn(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: jax.Array | None,
        training: Pass | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """T5X's loss and metrics of a batch; in training with the routers' auxiliary losses and statistics.

        The auxiliary losses, and a second pass's divergence, are scaled as the cross-entropy is by
        `loss_normalizing_factor`, so that their weights mean the same whatever it is.

        Args:
          params: all parameters.
          batch: with T5X's names.
          dropout_rng: None for evaluation: no dropout of any kind, no auxiliary losses.
          training: the step's part, which AdapterTrainer gives; random keys are folded from `seed` and its step.

        Raises:
          ConfigError: if T5X's own Trainer asks, which does not tell the step.
        """
        if training is None:
            if dropout_rng is None:
                return super().loss_fn(params, batch, None)
            raise ConfigError(
                "train.trainer_cls=Trainer is not allowed: sira_jax.t5x_integration.trainer.AdapterTrainer, which"
                " tells the model the step that random keys and schedules follow"
            )
        adapter = self.module.adapter
        second = adapter.second_pass if adapter is not None else None
        progress = training.step.astype(jnp.float32) / self.num_steps

        def run(params, second_pass):
            features, sown = self.module.apply(
                {"params": params},
                self.to_module(batch),
                deterministic=False,
                progress=progress,
                rngs=step_rngs(self.seed, training.step, training.index, second_pass),
                method="features",
                mutable=["losses", "metrics"],
            )
            return self.module.apply({"params": params}, features, method="logits"), sown

        logits_BLV, sown = run(params, False)
        nats, z_loss, _ = losses.compute_weighted_cross_entropy(
            logits_BLV,
            targets=batch["decoder_target_tokens"],
            weights=training.weights_BL,
            label_smoothing=self._label_smoothing,
            z_loss=self._z_loss,
            loss_normalizing_factor=training.normaliser,
        )
        scale = training.total_weight / training.normaliser
        auxiliary = auxiliary_loss(sown.get("losses", {})) / training.microbatches * scale
        if second is not None:
            others = params if second.both_gradients else jax.lax.stop_gradient(params)
            divergence_BL = symmetric_kl(logits_BLV, run(others, True)[0])
            term = second.weight * jnp.sum(divergence_BL * training.weights_BL)
            term /= training.normaliser
            factor = 1.0 if second.both_gradients else 2.0
            # `factor` times the gradient, the value as it is.
            auxiliary += factor * term + (1 - factor) * jax.lax.stop_gradient(term)
        segments = {
            name.removesuffix("_segment_ids"): value
            for name, value in batch.items()
            if name.endswith("_segment_ids")
        } or {
            name: batch[name] != 0
            for name in ("encoder_input_tokens", "decoder_target_tokens")
            if name in batch
        }
        metrics = self._compute_metrics(
            logits=logits_BLV,
            targets=batch["decoder_target_tokens"],
            mask=training.weights_BL,
            loss=nats,
            z_loss=z_loss,
            segment_ids=segments,
        )
        metrics["auxiliary_loss"] = metrics_lib.AveragePerStep(total=auxiliary)
        metrics |= router_metrics(router_sums(sown.get("metrics", {})))
        return nats + auxiliary, metrics

    def _compute_logits(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
        mutable: Any = False,
        other_variables: Any = None,
    ) -> Any:
        """Logits without dropout, for evaluation and scores."""
        assert dropout_rng is None
        assert other_variables is None
        return self.module.apply({"params": params}, self.to_module(batch), mutable=mutable)

    def _compute_logits_from_slice(
        self, decoding_state: Any, params: Any, max_decode_length: int
    ) -> tuple[jax.Array, Any]:
        """T5X's request for the next logits (B, V), for one token a row."""
        return rows.advance(
            self.module,
            params,
            decoding_state.cache,
            decoding_state.cur_token,
            max_decode_length,
        )


def check_adapter(saved: AdapterConfig, own: AdapterConfig, where: str | os.PathLike) -> None:
    """Raises CheckpointError, naming the field, if a saved adapter computes something else than the model's would."""
    fields, wanted = saved.to_dict(), own.to_dict()
    for name in wanted | fields:
        if name not in own.training_fields and fields.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{where}: has adapter.{name}={fields.get(name)!r}, the model's is {wanted.get(name)!r}"
            )
