"""What a step with a bad loss does: it stops the run, is skipped, or sends the run back to its last checkpoint.

A loss is bad where it, the gradient's norm, the auxiliary loss or the norm of the updated parameters is no finite number; and,
with `spike_factor`, where it is larger than so many times the median of the last losses. What is decided hangs on numbers of
the run alone, which go into its checkpoints, so that a resumed run decides as an unbroken one.
"""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.errors import TrainingError, check, is_finite_number, is_whole_number

ACTIONS = ("stop", "skip", "rewind")
# The parameters' norm is of the updated ones: a step that breaks them is found before they are saved.
MUST_BE_FINITE = ("loss", "gradient_norm", "auxiliary_loss", "parameter_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadLossConfig:
    """What is a bad loss, and what follows.

    Attributes:
      action: "stop" ends the run with an error. "skip" leaves out the step's update: parameters and moments stay, the learning
        rate and the data go on. "rewind" takes parameters and optimizer from the last checkpoint at a multiple of
        train.checkpoint_every (the beginning before the first), and goes on from its step with the batches that follow the
        bad one; those since the checkpoint are not used again.
      spike_factor: a loss over so many times the median of the last `window` good ones is bad; 0 for only what is not finite.
      window: W, losses of the median; before there are so many, no loss is a spike.
      patience: most bad steps in a row that are skipped, or rewinds to one checkpoint; one more ends the run.
    """

    action: str = "stop"
    spike_factor: float = 0.0
    window: int = 20
    patience: int = 5

    def __post_init__(self):
        allowed = f"one of {', '.join(ACTIONS)}"
        check(self.action in ACTIONS, "bad_loss.action", self.action, allowed)
        factor = self.spike_factor
        fits = is_finite_number(factor) and (factor == 0 or factor > 1)
        check(fits, "bad_loss.spike_factor", factor, "0, or a number over 1")
        for name in ("window", "patience"):
            value = getattr(self, name)
            fits = is_whole_number(value) and value >= 1
            check(fits, f"bad_loss.{name}", value, "a whole number of at least 1")


class Judge:
    """Says of each step whether its loss is bad, and counts.

    Args:
      config: see BadLossConfig.
      state: of `state()`, to go on from; None at the beginning.
    """

    def __init__(self, config: BadLossConfig, state: Mapping[str, Any] | None = None):
        self._config = config
        state = state or {"losses": [], "bad": 0}
        self._losses = deque(map(float, state["losses"]), maxlen=config.window)
        self._bad = int(state["bad"])

    def limit(self) -> np.float32:
        """The largest loss that is no spike; infinite while none is."""
        factor = self._config.spike_factor
        if not factor or len(self._losses) < self._config.window:
            return np.float32(np.inf)
        return np.float32(factor * statistics.median(self._losses))

    def problem(self, metrics: Mapping[str, float]) -> str | None:
        """What is bad in a step's metrics, in a few words; None for a good step."""
        problem = not_finite(metrics, MUST_BE_FINITE)
        limit = float(self.limit())
        if problem is None and not metrics["loss"] <= limit:
            return (
                f"loss is {metrics['loss']:.6g}, over {self._config.spike_factor:g} times the median of the last"
                f" {self._config.window}"
            )
        return problem

    def accept(self, loss: float) -> None:
        """Takes note of a good step."""
        # Nothing is remembered that is not asked for.
        if self._config.spike_factor:
            self._losses.append(loss)
        if self._config.action == "skip":
            self._bad = 0

    def refuse(self, step: int, problem: str) -> None:
        """Takes note of a bad step; raises TrainingError where it is one more than `patience` allows."""
        self._bad += 1
        patience = self._config.patience
        if self._bad > patience:
            times = {"skip": "bad steps in a row", "rewind": "rewinds to one checkpoint"}
            raise TrainingError(
                f"{problem} at step {step}, after {patience} {times[self._config.action]} (bad_loss.patience)"
            )

    def passed_checkpoint(self) -> None:
        """Takes note of a checkpoint that a rewind may go to: from here rewinds count anew."""
        if self._config.action == "rewind":
            self._bad = 0

    def rewound(self, state: Mapping[str, Any] | None) -> "Judge":
        """The judge of the checkpoint that the run went back to, with this one's count."""
        losses = state["losses"] if state else []
        return Judge(self._config, {"losses": losses, "bad": self._bad})

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data."""
        return {"losses": list(self._losses), "bad": self._bad}


def not_finite(metrics: Mapping[str, float], names: Iterable[str]) -> str | None:
    """The first of the named metrics that is no finite number, in a few words; None where all are finite."""
    for name in names:
        if not math.isfinite(metrics[name]):
            return f"{name} is {metrics[name]}"
    return None


def is_bad(metrics: Mapping[str, jax.Array], limit: jax.Array) -> jax.Array:
    """Whether a step is bad, in the compiled step; the same as `Judge.problem`."""
    finite = [jnp.isfinite(metrics[name]) for name in MUST_BE_FINITE]
    return ~(jnp.all(jnp.stack(finite)) & (metrics["loss"] <= limit))
