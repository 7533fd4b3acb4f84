"""Steps on real data beside steps on one fixed batch. `scripts/benchmark.py --kind=data` prints it."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import tasks
from scripts.benchmark_step import make_timed_step, random_base
from scripts.timed_step import TimedStep, median_ratio, take_turns
from sira_jax.adapters import AdapterConfig
from sira_jax.models import DecoderConfig
from tasks.converters import DecoderFeatures


class _FedStep:
    """Makes a new batch before each step."""

    def __init__(self, step: TimedStep, next_batch: Callable[[], Mapping[str, Any]]):
        self._step, self._next_batch = step, next_batch
        self.fetch_seconds: list[float] = []

    def run(self) -> float:
        start = time.perf_counter()
        batch = jax.block_until_ready(jax.device_put(self._next_batch()))
        self.fetch_seconds.append(time.perf_counter() - start)
        return self.fetch_seconds[-1] + self._step.run(batch)


def run_data_benchmark(
    config: DecoderConfig,
    adapter: AdapterConfig,
    mixture: str,
    *,
    batch_size: int,
    length: int,
    repeats: int,
) -> list[dict]:
    """Measures steps of one compiled program, whose batch is fixed or comes from the input pipeline each time.

    Nothing overlaps here: a batch is made, put on the device and only then used. In training the next one is made while
    the step runs.

    Args:
      config: the model; its vocabulary has at least the bytes' 259 tokens.
      adapter: the adapter.
      mixture: a mixture or a task, in the bytes vocabulary.
      batch_size: rows.
      length: tokens a row.
      repeats: rounds.

    Returns:
      A row for "fixed" and one for "data": side, median_s, min_s, fetch_ms (median, to make a batch), and vs_fixed, the
      median over the rounds of the ratio of two steps of one round.
    """
    vocabulary = tasks.make_vocabulary("bytes")
    loaded, rates = tasks.load_mixture(mixture, "train", vocabulary)
    converter = DecoderFeatures(bos_id=vocabulary.bos_id, length=length, pad_id=vocabulary.pad_id)
    pipeline = tasks.InputPipeline(
        loaded, rates, batch_size=batch_size, converter=converter, seed=0, too_long="drop"
    )
    batch = jax.device_put(pipeline.next_batch())
    step = make_timed_step(config, adapter, random_base(config), batch)
    fed = _FedStep(step, pipeline.next_batch)
    seconds = take_turns({"fixed": step, "data": fed}, repeats)
    ratio = {"fixed": 1.0, "data": median_ratio(seconds["data"], seconds["fixed"])}
    fetch = {"fixed": None, "data": 1000 * statistics.median(fed.fetch_seconds)}
    return [
        {
            "side": side,
            "median_s": statistics.median(times),
            "min_s": min(times),
            "fetch_ms": fetch[side],
            "vs_fixed": ratio[side],
        }
        for side, times in seconds.items()
    ]
