"""The input pipeline: what it yields, that it is deterministic, resumable and shardable."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.errors import CheckpointError, ConfigError, DataError
from tasks.converters import DecoderFeatures
from tasks.features import unpack
from tasks.loading import TokenizedTask
from tasks.pipeline import InputPipeline, eval_batches


def make_task(name, size, first_id, *, longest=6):
    """Example i's prompt starts with the id first_id + i, so that examples can be told apart."""
    rng = np.random.default_rng(first_id)
    inputs = [
        np.asarray([first_id + i, *rng.integers(2, 50, rng.integers(0, longest))], np.int32)
        for i in range(size)
    ]
    targets = [
        np.asarray([*rng.integers(2, 50, rng.integers(0, longest)), 1], np.int32)
        for _ in range(size)
    ]
    examples = [{"inputs": str(i), "targets": str(i)} for i in range(size)]
    return TokenizedTask(name, "train", inputs, targets, examples, ("exact_match",))


TASKS = (make_task("a", 13, 1000), make_task("b", 40, 2000), make_task("c", 5, 3000))
RATES = (1.0, 2.0, 1.0)


def pipeline(tasks=TASKS, rates=RATES, **changes):
    features = {name: changes.pop(name) for name in ("length", "bos_id") if name in changes}
    converter = DecoderFeatures(**({"length": 24} | features))
    settings_ = {"batch_size": 4, "converter": converter, "seed": 3} | changes
    return InputPipeline(tasks, rates, **settings_)


def stream(source, num_batches):
    """(task id, first token) of every example, row by row."""
    return [
        (item.task_id, int(item.example.tokens[0]))
        for _ in range(num_batches)
        for row in unpack(source.next_batch())
        for item in row
    ]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert np.array_equal(left[name], right[name]), name


def test_examples_arrive_whole():
    for task_id, first in stream(pipeline(), 20):
        assert 0 <= first - 1000 * (task_id + 1) < len(TASKS[task_id])
    for row in unpack(pipeline().next_batch()):
        for item in row:
            task = TASKS[item.task_id]
            index = int(item.example.tokens[0]) - 1000 * (item.task_id + 1)
            expected = [*task.inputs[index], *task.targets[index]]
            assert item.example.tokens.tolist() == expected
            assert item.example.num_prompt == len(task.inputs[index])


def test_every_epoch_of_a_task_has_each_example_once_in_a_new_order():
    source = pipeline(tasks=TASKS[:1], rates=[1.0], pack=False, batch_size=13)
    epochs = [[first for _, first in stream(source, 1)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(1000, 1013)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_packing_changes_rows_but_not_the_stream():
    packed = Counter(stream(pipeline(batch_size=2), 60))
    plain = stream(pipeline(pack=False, batch_size=1), sum(packed.values()))
    assert Counter(plain) == packed


def test_one_example_a_row_without_packing():
    batch = pipeline(pack=False).next_batch()
    assert batch["decoder_segment_ids"].max(axis=1).tolist() == [1, 1, 1, 1]


def test_own_order_without_shuffling():
    source = pipeline(tasks=TASKS[2:], rates=[1.0], shuffle=False, pack=False, batch_size=1)
    assert [first for _, first in stream(source, 7)] == [3000, 3001, 3002, 3003, 3004, 3000, 3001]


def test_rates():
    counts = Counter(task for task, _ in stream(pipeline(pack=False, batch_size=100), 40))
    for task, rate in enumerate(RATES):
        share = rate / sum(RATES)
        # Four standard deviations of a binomial over 4000 draws.
        assert abs(counts[task] - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share))


@pytest.mark.parametrize("rates", [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1e-9)])
def test_a_task_at_rate_zero_is_never_drawn(rates):
    tasks = {task for task, _ in stream(pipeline(rates=rates), 30)}
    assert tasks == {int(np.argmax(rates))}


def test_the_seed_decides():
    assert stream(pipeline(), 5) == stream(pipeline(), 5)
    assert stream(pipeline(), 5) != stream(pipeline(seed=4), 5)


def test_iterating_is_next_batch():
    first, second = pipeline(), iter(pipeline())
    for _ in range(3):
        assert_equal(first.next_batch(), next(second))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 5))
def test_resume_is_exact(taken, pack, shuffle, seed):
    options = {"pack": pack, "shuffle": shuffle, "seed": seed}
    source = pipeline(**options)
    for _ in range(taken):
        source.next_batch()
    state = json.loads(json.dumps(source.state()))
    other = pipeline(**options)
    other.next_batch()
    other.restore(state)
    assert other.num_batches == taken
    for _ in range(4):
        assert_equal(source.next_batch(), other.next_batch())
    assert source.state() == other.state()


def test_resume_over_blocks_of_draws():
    source = pipeline(pack=False, batch_size=1000)
    for _ in range(2):
        source.next_batch()
    other = pipeline(pack=False, batch_size=1000)
    other.restore(source.state())
    for _ in range(3):
        assert_equal(source.next_batch(), other.next_batch())


def test_going_back():
    source = pipeline()
    start, first = source.state(), source.next_batch()
    for _ in range(10):
        source.next_batch()
    source.restore(start)
    assert_equal(source.next_batch(), first)


def test_a_state_is_not_changed_by_going_on():
    source = pipeline()
    state = source.state()
    copy = json.loads(json.dumps(state))
    source.next_batch()
    assert state == copy


@pytest.mark.parametrize("shares", [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)]])
def test_processes_hold_the_rows_of_one_global_batch(shares):
    whole = pipeline()
    parts = [pipeline(rows=rows) for rows in shares]
    for _ in range(5):
        expected, batches = whole.next_batch(), [part.next_batch() for part in parts]
        for rows, batch in zip(shares, batches, strict=True):
            assert_equal({k: v[list(rows)] for k, v in expected.items()}, batch)
    for part in parts:
        assert part.state() == whole.state()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"length": 25}, "length"),
        ({"pack": False}, "pack"),
        ({"rates": (1.0, 1.0, 1.0)}, "rates"),
        ({"bos_id": 7}, "bos_id"),
        ({"tasks": (*TASKS[:2], make_task("d", 5, 3000))}, "tasks"),
        ({"tasks": (*TASKS[:2], make_task("c", 6, 3000))}, "the examples of task c/train"),
        ({"tasks": (*TASKS[:2], make_task("c", 5, 3001))}, "the examples of task c/train"),
    ],
)
def test_restoring_into_another_pipeline_fails(change, field):
    source = pipeline(**change)
    before = source.state()
    with pytest.raises(CheckpointError, match=f"of another run: {field} was|{field} have changed"):
        source.restore(pipeline().state())
    assert source.state() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, not 1"),
        ({"num_examples": 5}, "do not add up"),
        ({"task_counts": [0, 0]}, "do not add up"),
        ({"task_counts": [1, -1, 0]}, "do not add up"),
        ({"num_batches": 1.5}, "do not add up"),
        ({"task_counts": None}, "incomplete"),
    ],
)
def test_damaged_states(change, message):
    with pytest.raises(CheckpointError, match=message):
        pipeline().restore(pipeline().state() | change)


def test_a_state_without_its_fields():
    with pytest.raises(CheckpointError, match="incomplete: 'version'"):
        pipeline().restore({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"length": 0}, "length=0"),
        ({"seed": -1}, "seed=-1"),
        ({"too_long": "cut"}, "too_long='cut'"),
        ({"rows": (1, 4)}, "rows=.* is not allowed: ascending ones of the 4 of a batch"),
        ({"rows": (1, 0)}, "rows="),
        ({"rows": (1, 1)}, "rows="),
        ({"rows": ()}, "rows="),
        ({"rates": (1.0,)}, "rates=.*one for each of 3 tasks"),
        ({"rates": (1.0, -1.0, 1.0)}, "rates="),
        ({"rates": (0.0, 0.0, 0.0)}, "rates="),
        ({"rates": (1.0, float("nan"), 1.0)}, "rates="),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        pipeline(**change)


def test_no_tasks():
    with pytest.raises(DataError, match="at least one task"):
        pipeline(tasks=(), rates=())


def test_examples_that_are_too_long():
    with pytest.raises(DataError, match=r"task a, train example \d+: an example takes"):
        pipeline(length=5)
    tasks = {"tasks": TASKS[:2], "rates": RATES[:2], "length": 5}
    dropped = pipeline(**tasks, too_long="drop")
    for task, report in zip(TASKS, dropped.reports, strict=False):
        fitting = sum(
            len(i) + len(t) - 1 <= 5 for i, t in zip(task.inputs, task.targets, strict=True)
        )
        assert (report.kept, report.truncated) == (fitting, 0)
        assert report.kept + report.dropped == len(task)
    cut = pipeline(**tasks, too_long="truncate_inputs")
    assert sum(report.truncated for report in cut.reports) > 0
    for task, report in zip(TASKS, cut.reports, strict=False):
        assert report.dropped == sum(len(targets) > 5 for targets in task.targets)
    with pytest.raises(DataError, match="task c: none of its 5 train examples fits length=5"):
        pipeline(length=5, too_long="drop")


@pytest.mark.parametrize("pack", [True, False])
def test_eval_batches_hold_each_example_once_in_order(pack):
    seen = []
    for batch in eval_batches(TASKS, batch_size=4, converter=DecoderFeatures(length=24), pack=pack):
        assert batch["decoder_input_tokens"].shape == (4, 24)
        seen += [(p.task_id, int(p.example.tokens[0])) for row in unpack(batch) for p in row]
    assert sorted(seen) == sorted(
        (task_id, 1000 * (task_id + 1) + i)
        for task_id, task in enumerate(TASKS)
        for i in range(len(task))
    )
    if not pack:
        assert seen == sorted(seen)


def test_eval_batches_over_processes():
    whole = list(eval_batches(TASKS, batch_size=4, converter=DecoderFeatures(length=24)))
    parts = [
        list(
            eval_batches(
                TASKS,
                batch_size=4,
                converter=DecoderFeatures(length=24),
                rows=range(2 * i, 2 * i + 2),
            )
        )
        for i in range(2)
    ]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for expected, *batches in zip(whole, *parts, strict=True):
        assert_equal(expected, {k: np.concatenate([b[k] for b in batches]) for k in expected})


def test_eval_batches_fail_at_the_call():
    with pytest.raises(DataError, match="an example takes"):
        eval_batches(TASKS, batch_size=4, converter=DecoderFeatures(length=5))
