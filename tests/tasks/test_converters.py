"""Features of encoder-decoders: what each position holds, packing on both sides, what is cut or dropped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.errors import ConfigError, DataError
from tasks import TokenizedTask
from tasks.converters import DecoderFeatures, EncoderDecoderFeatures
from tasks.features import PlacedExample
from tasks.pipeline import InputPipeline, eval_batches

EOS, START, PAD = 1, 5, 9
CONVERTER = EncoderDecoderFeatures(
    length=8, target_length=6, eos_id=EOS, start_id=START, pad_id=PAD
)


def place(converter, inputs, targets, task_id=0):
    return PlacedExample(converter.make_example(inputs, targets, "error")[0], task_id)


def test_a_worked_row():
    row = [place(CONVERTER, [21, 22], [31, 32, EOS], 2), place(CONVERTER, [23], [33, EOS], 0)]
    batch = CONVERTER.pack_rows([row, []])
    expected = {
        "encoder_input_tokens": [21, 22, EOS, 23, EOS, PAD, PAD, PAD],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0, 0, 0],
        "encoder_positions": [0, 1, 2, 0, 1, 0, 0, 0],
        "encoder_task_ids": [2, 2, 2, 0, 0, 0, 0, 0],
        "decoder_input_tokens": [START, 31, 32, START, 33, PAD],
        "decoder_target_tokens": [31, 32, EOS, 33, EOS, PAD],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_positions": [0, 1, 2, 0, 1, 0],
        "task_ids": [2, 2, 2, 0, 0, 0],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name][0].tolist() == values, name
        empty = PAD if name.endswith("tokens") else 0
        assert set(batch[name][1].tolist()) == {empty}, name
        assert batch[name].dtype == (np.float32 if name.endswith("weights") else np.int32)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6)), min_size=1, max_size=12),
    pack=st.booleans(),
    rows=st.integers(1, 3),
)
def test_every_example_arrives_whole(sizes, pack, rows):
    task = TokenizedTask(
        "t",
        "train",
        [np.arange(n, dtype=np.int32) + 100 * i + 10 for i, (n, _) in enumerate(sizes)],
        [np.arange(n, dtype=np.int32) + 100 * i + 50 for i, (_, n) in enumerate(sizes)],
        [{"inputs": "", "targets": ""}] * len(sizes),
        ("exact_match",),
    )
    found = []
    for batch in eval_batches([task], batch_size=rows, converter=CONVERTER, pack=pack):
        for row in range(rows):
            for segment in range(1, batch["decoder_segment_ids"][row].max(initial=0) + 1):
                encoder = batch["encoder_segment_ids"][row] == segment
                decoder = batch["decoder_segment_ids"][row] == segment
                targets = batch["decoder_target_tokens"][row][decoder]
                read = batch["decoder_input_tokens"][row][decoder]
                assert read.tolist() == [START, *targets[:-1]]
                found.append((batch["encoder_input_tokens"][row][encoder], targets))
    assert len(found) == len(task)
    # Packing may move a short example before a long one of the same batch.
    found.sort(key=lambda pair: pair[1][0])
    for (inputs, targets), own, target in zip(found, task.inputs, task.targets, strict=True):
        assert inputs.tolist() == [*own, EOS]
        assert targets.tolist() == target.tolist()


def test_too_long():
    long = list(range(20, 30))
    example, is_cut = CONVERTER.make_example(long, [2], "truncate_inputs")
    assert is_cut
    assert example.inputs.tolist() == [*long[-7:], EOS]
    assert CONVERTER.make_example(long, [2], "drop") is None
    assert CONVERTER.make_example([3], [2] * 7, "truncate_inputs") is None
    with pytest.raises(DataError, match="11 positions, more than length=8"):
        CONVERTER.make_example(long, [2], "error")
    with pytest.raises(DataError, match="7 positions, more than target_length=6"):
        CONVERTER.make_example([3], [2] * 7, "error")
    with pytest.raises(DataError, match="without target tokens"):
        CONVERTER.make_example([3], [], "error")
    with pytest.raises(DataError, match="without a token for the encoder"):
        EncoderDecoderFeatures(length=4, target_length=4).make_example([], [1], "error")
    with pytest.raises(ConfigError, match="too_long='cut'"):
        CONVERTER.make_example([3], [2], "cut")
    with pytest.raises(ConfigError, match="target_length=0"):
        EncoderDecoderFeatures(length=4, target_length=0)


@pytest.mark.parametrize("converter", [CONVERTER, DecoderFeatures(length=20, bos_id=4)])
def test_prompts_fit_the_room_they_are_given(converter):
    for limit, new_tokens in ((30, 3), (18, 3), (8, 5)):
        room = converter.prompt_room(limit, new_tokens)
        prompt = converter.prompt(range(room))
        assert len(prompt) <= min(limit, converter.limits[0])
    assert CONVERTER.prompt([3, 4]) == [3, 4, EOS]
    assert DecoderFeatures(length=9, bos_id=4).prompt([3]) == [4, 3]


def test_a_stream_goes_on_from_its_state_and_knows_another_converters():
    rng = np.random.default_rng(0)
    task = TokenizedTask(
        "t",
        "train",
        [rng.integers(10, 50, n).astype(np.int32) for n in (3, 5, 2, 7, 1)],
        [rng.integers(10, 50, n).astype(np.int32) for n in (2, 1, 6, 3, 4)],
        [{"inputs": "", "targets": ""}] * 5,
        ("exact_match",),
    )

    def make(converter=CONVERTER):
        return InputPipeline([task], [1.0], batch_size=2, converter=converter, seed=3)

    first = make()
    batches = [first.next_batch() for _ in range(4)]
    again = make()
    again.next_batch()
    state = again.state()
    resumed = make()
    resumed.restore(state)
    for expected in batches[1:]:
        got = resumed.next_batch()
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    other = make(EncoderDecoderFeatures(length=8, target_length=7, eos_id=EOS, start_id=START))
    with pytest.raises(Exception, match="target_length was 6, now it is 7"):
        other.restore(state)
