"""Decoder-only conversion and packing, against a plain reference and by properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.errors import ConfigError, DataError
from tasks.features import (
    FEATURE_DTYPES,
    PlacedExample,
    first_fit,
    make_example,
    pack_rows,
    unpack,
)

IDS = st.lists(st.integers(1, 500), min_size=1, max_size=9)


def reference_row(examples, length):
    """One row, position by position; `examples` are (inputs, targets, task id)."""
    row = {name: [0] * length for name in FEATURE_DTYPES}
    at = 0
    for segment, (inputs, targets, task_id) in enumerate(examples, start=1):
        tokens = [*inputs, *targets]
        for i in range(len(tokens) - 1):
            row["decoder_input_tokens"][at] = tokens[i]
            row["decoder_target_tokens"][at] = tokens[i + 1]
            row["decoder_loss_weights"][at] = 1 if i + 1 >= len(inputs) else 0
            row["decoder_segment_ids"][at] = segment
            row["decoder_positions"][at] = i
            row["task_ids"][at] = task_id
            at += 1
    return row


def test_one_row_by_hand():
    rows = [
        [PlacedExample(make_example([5, 6, 7], [8, 1]), 2), PlacedExample(make_example([9], [1]))]
    ]
    batch = pack_rows(rows, 7)
    assert batch["decoder_input_tokens"].tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert batch["decoder_target_tokens"].tolist() == [[6, 7, 8, 1, 1, 0, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 1, 1, 2, 0, 0]]
    assert batch["decoder_positions"].tolist() == [[0, 1, 2, 3, 0, 0, 0]]
    assert batch["task_ids"].tolist() == [[2, 2, 2, 2, 0, 0, 0]]
    assert {name: array.dtype for name, array in batch.items()} == {
        name: np.dtype(dtype) for name, dtype in FEATURE_DTYPES.items()
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(IDS, IDS, st.integers(0, 3)), max_size=12), st.integers(1, 4))
def test_packing_equals_the_reference_and_unpacks(examples, num_rows):
    length = 20
    made = [make_example(inputs, targets) for inputs, targets, _ in examples]
    rows = first_fit([len(example) for example in made], num_rows, length)
    placed = [[] for _ in range(num_rows)]
    plain = [[] for _ in range(num_rows)]
    for example, source, row in zip(made, examples, rows, strict=False):
        placed[row].append(PlacedExample(example, source[2]))
        plain[row].append(source)
    batch = pack_rows(placed, length)
    for row, sources in enumerate(plain):
        expected = reference_row(sources, length)
        for name in FEATURE_DTYPES:
            assert batch[name][row].tolist() == expected[name], name
    restored = [
        [(p.example.tokens.tolist(), p.example.num_prompt, p.task_id) for p in row]
        for row in unpack(batch)
    ]
    assert restored == [[([*i, *t], len(i), task) for i, t, task in row] for row in plain]
    # As many positions count as there are target tokens.
    assert batch["decoder_loss_weights"].sum() == sum(len(t) for row in plain for _, t, _ in row)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10), max_size=30), st.integers(1, 5))
def test_first_fit(lengths, num_rows):
    rows = first_fit(lengths, num_rows, 10)
    used = [0] * num_rows
    for positions, row in zip(lengths, rows, strict=False):
        assert all(used[other] + positions > 10 for other in range(row))
        used[row] += positions
        assert used[row] <= 10
    if len(rows) < len(lengths):
        assert all(other + lengths[len(rows)] > 10 for other in used)


def attend(tokens_T, positions_T, segments_T):
    """A causal attention layer in numpy that sees a segment only; token and position embeddings."""
    rng = np.random.default_rng(0)
    embed_VD, place_TD = rng.normal(size=(600, 8)), rng.normal(size=(64, 8))
    x_TD = embed_VD[tokens_T] + place_TD[positions_T]
    scores_TS = x_TD @ x_TD.T
    causal = np.tril(np.ones_like(scores_TS, bool))
    same = segments_T[:, None] == segments_T[None, :]
    scores_TS = np.where(causal & same, scores_TS, -1e9)
    weights_TS = np.exp(scores_TS - scores_TS.max(-1, keepdims=True))
    return weights_TS / weights_TS.sum(-1, keepdims=True) @ x_TD


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(IDS, IDS), min_size=2, max_size=4))
def test_a_packed_example_is_computed_as_if_alone(examples):
    names = ("decoder_input_tokens", "decoder_positions", "decoder_segment_ids")
    made = [PlacedExample(make_example(*example)) for example in examples]
    batch = pack_rows([made], 80)
    packed = attend(*(batch[name][0] for name in names))
    for segment, item in enumerate(made, start=1):
        alone = pack_rows([[item]], len(item.example))
        expected = attend(*(alone[name][0] for name in names))
        mine = packed[batch["decoder_segment_ids"][0] == segment]
        np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-12)


def test_bos_goes_before_the_prompt():
    example = make_example([5], [6, 1], bos_id=2)
    assert example.tokens.tolist() == [2, 5, 6, 1]
    assert example.num_prompt == 2
    assert make_example([], [6, 1], bos_id=2).num_prompt == 1


def test_padding_token():
    batch = pack_rows([[PlacedExample(make_example([5], [1]))]], 3, pad_id=9)
    assert batch["decoder_input_tokens"].tolist() == [[5, 9, 9]]
    assert batch["decoder_target_tokens"].tolist() == [[1, 9, 9]]


@pytest.mark.parametrize(
    ("inputs", "targets", "bos_id", "tokens"),
    [
        ([1, 2, 3], [4, 5], None, [1, 2, 3, 4, 5]),  # 4 positions: just fits
        ([1, 2, 3, 4], [5, 6], None, [2, 3, 4, 5, 6]),
        ([1, 2, 3, 4], [5, 6], 9, [9, 3, 4, 5, 6]),
        ([1, 2, 3], [4, 5, 6, 7], None, [3, 4, 5, 6, 7]),
        ([1, 2, 3], [4, 5, 6, 7], 9, [9, 4, 5, 6, 7]),
        ([1, 2, 3], [4, 5, 6, 7, 8], None, None),  # the target alone leaves no token before it
        ([1, 2, 3], [4, 5, 6, 7, 8], 9, None),
    ],
)
def test_truncation_cuts_prompts_on_the_left_and_never_targets(inputs, targets, bos_id, tokens):
    example = make_example(inputs, targets, length=4, too_long="truncate_inputs", bos_id=bos_id)
    assert (None if example is None else example.tokens.tolist()) == tokens
    if example is not None:
        assert example.tokens[example.num_prompt :].tolist() == targets


def test_other_policies_for_long_examples():
    assert make_example([1, 2, 3, 4], [5, 6], length=4, too_long="drop") is None
    with pytest.raises(DataError, match="takes 5 positions, more than length=4"):
        make_example([1, 2, 3, 4], [5, 6], length=4)
    with pytest.raises(ConfigError, match="too_long='cut' is not allowed"):
        make_example([1], [2], too_long="cut")


def test_examples_that_cannot_be():
    with pytest.raises(DataError, match="without target tokens"):
        make_example([1], [])
    with pytest.raises(DataError, match="without a token before its target"):
        make_example([], [1])
    with pytest.raises(DataError, match="row 0 takes 4 positions, more than 3"):
        pack_rows(
            [[PlacedExample(make_example([1, 2], [3])), PlacedExample(make_example([1, 2], [3]))]],
            3,
        )


def test_empty_rows_are_padding():
    batch = pack_rows([[], []], 4)
    assert all(not array.any() and array.shape == (2, 4) for array in batch.values())
    assert unpack(batch) == [[], []]
