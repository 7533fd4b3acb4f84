"""The tasks in seqio: equal to the arrays of `tasks.loading`, and usable by name."""

import functools
import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

import tasks.registry
from sira_jax.errors import DataError
from tasks import HuggingFaceVocabulary, bfcl, bind, specs
from tasks.features import make_example
from tasks.loading import load_mixture, load_task
from tasks.templates import ChatTemplate, PlainTemplate
from tasks.vocabularies import ByteVocabulary, TokenizersVocabulary, make_vocabulary
from tests.tasks import datasets
from tests.tasks.conftest import EOS
from tests.tasks.test_bfcl import data  # noqa: F401 - a fixture
from tests.tasks.test_templates import CHATML

LENGTHS = {"inputs": 512, "targets": 512}
VOCABULARIES = ("bytes", "sentencepiece", "tokenizers")


@pytest.fixture
def vocabulary(request, sentencepiece_path, tokenizer_json):
    if request.param == "tokenizers":
        return TokenizersVocabulary(tokenizer_json, eos_id=2)
    path = f":{sentencepiece_path}" if request.param == "sentencepiece" else ""
    return make_vocabulary(request.param + path)


each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES, indirect=True)


def read(provider, split="validation", lengths=LENGTHS, **options):
    dataset = provider.get_dataset(lengths, split, **({"shuffle": False} | options))
    return list(dataset.as_numpy_iterator())


def assert_same(examples, task):
    assert len(examples) == len(task)
    for example, inputs, targets, texts in zip(
        examples, task.inputs, task.targets, task.examples, strict=True
    ):
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        assert example["inputs"].tolist() == inputs.tolist()
        assert example["targets"].tolist() == targets.tolist()
        assert example["inputs_pretokenized"].decode() == texts["inputs"]
        assert example["targets_pretokenized"].decode() == texts["targets"]


def test_every_task_and_mixture_is_registered():
    assert set(specs.TASKS) <= set(seqio.TaskRegistry.names())
    assert set(specs.MIXTURES) <= set(seqio.MixtureRegistry.names())
    for name in specs.TASKS:
        provider = seqio.get_mixture_or_task(name)
        assert isinstance(provider, seqio.Task)
        assert set(provider.output_features) == {"inputs", "targets"}
        assert set(provider.splits) == set(specs.TASKS[name].sizes)
        assert [metric.__name__ for metric in provider.metric_fns] == list(
            specs.TASKS[name].metrics
        )
    tasks.registry.register_all()  # twice is as good as once


@pytest.mark.parametrize("name", ["cldr_date_sw", "cldr_unit_te", "cldr_number_fr"])
def test_a_registered_task_yields_what_load_task_loads(name):
    assert_same(read(seqio.get_mixture_or_task(name)), load_task(name, "validation", "bytes"))


@each_vocabulary
@pytest.mark.parametrize("template", [None, PlainTemplate(), ChatTemplate(CHATML)])
def test_a_bound_task_yields_what_load_task_loads(vocabulary, template):
    provider = bind("cldr_unit_te", vocabulary, template=template)
    task = load_task("cldr_unit_te", "validation", vocabulary, template=template)
    assert_same(read(provider), task)


def test_bfcl_through_seqio(data):  # noqa: F811
    examples = read(seqio.get_mixture_or_task("bfcl_simple"), "train", None)
    task = load_task("bfcl_simple", "train", "bytes")
    assert_same(examples, task)
    assert [e["answers"].decode() for e in examples] == [e["answers"] for e in task.examples]


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    datasets.write_all(tmp_path)


@pytest.mark.parametrize("name", ["finqa", "xtreme_up_ner_sw", "dialogsum"])
def test_downloaded_tasks_through_seqio(downloaded, name):
    """Further fields come along, empty targets too; a size that is not declared is counted."""
    examples = read(seqio.get_mixture_or_task(name), "test", None)
    task = load_task(name, "test", "bytes")
    assert_same(examples, task)
    for field in specs.get_task(name).extra_fields:
        assert [e[field].decode() for e in examples] == [e[field] for e in task.examples]


def test_sizes_that_are_not_declared_are_counted(downloaded):
    assert bind("afriqa_ha", "bytes").num_input_examples("train") == 60
    with pytest.raises(DataError, match="split='train' of task afriqa_sw: it has"):
        bind("afriqa_sw", "bytes").num_input_examples("train")


def test_missing_data_is_our_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"scripts/download_data\.py bfcl"):
        read(seqio.get_mixture_or_task("bfcl_simple"))


def test_long_targets_still_end_with_eos():
    lengths = {"inputs": 10, "targets": 5}
    for example in read(seqio.get_mixture_or_task("cldr_date_sw"), lengths=lengths):
        assert len(example["inputs"]) == 10
        assert len(example["targets"]) == 5
        assert example["targets"][-1] == 1


def test_shuffling_follows_the_seed():
    provider = seqio.get_mixture_or_task("cldr_date_sw")
    first, again, other = (
        [e["inputs"].tolist() for e in read(provider, shuffle=True, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_a_mixture_draws_from_all_its_tasks():
    mixture = seqio.get_mixture_or_task("cldr_sw")
    assert isinstance(mixture, seqio.Mixture)
    assert {task.name for task in mixture.tasks} == set(specs.MIXTURES["cldr_sw"].tasks)
    dataset = mixture.get_dataset(LENGTHS, "train", shuffle=False, seed=0).take(300)
    drawn = [seqio.ByteVocabulary().decode(e["inputs"]) for e in dataset.as_numpy_iterator()]
    assert len(drawn) == 300
    for word in ("date", "measure", "relative time", "number", "amount"):
        assert any(f"the {word} " in text for text in drawn)


@pytest.mark.parametrize("name", ["cldr_sw", "bfcl"])
def test_rates_are_those_of_load_mixture(name, data):  # noqa: F811
    mixture = seqio.get_mixture_or_task(name)
    loaded, rates = load_mixture(name, "train", "bytes", limit=1)
    rates_by_name = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert {t.name: rate for t, rate in zip(loaded, rates, strict=True)} == rates_by_name


def test_seqio_evaluates_with_our_metrics(data):  # noqa: F811
    task = seqio.get_mixture_or_task("bfcl_multiple")
    examples = read(task, "train", None)
    targets = [
        task.postprocess_fn(e["targets_pretokenized"].decode(), example=e, is_target=True)
        for e in examples
    ]
    calls = [e["targets_pretokenized"].decode() for e in examples]
    # A right call that is not the canonical one, and a wrong one.
    loose = [calls[0].replace("Nairobi", "nairobi"), "none()", *calls[2:]]
    predictions = [
        task.postprocess_fn(text, example=e, is_target=False)
        for text, e in zip(loose, examples, strict=True)
    ]
    scores = {}
    for metric in task.metric_fns:
        scores |= metric(targets, predictions)
    size = len(examples)
    assert scores["exact_match"] == pytest.approx(100 * (size - 2) / size)
    assert scores["ast_match"] == pytest.approx(100 * (size - 1) / size)


def test_our_loss_positions_are_those_of_seqio_s_prefix_lm():
    provider = seqio.get_mixture_or_task("cldr_date_sw")
    dataset = provider.get_dataset(LENGTHS, "validation", shuffle=False).take(5)
    converter = seqio.PrefixLMFeatureConverter(pack=False)
    theirs = converter(dataset, {"inputs": 80, "targets": 80})
    task = load_task("cldr_date_sw", "validation", "bytes", limit=5)
    for batch, inputs, targets in zip(
        theirs.as_numpy_iterator(), task.inputs, task.targets, strict=True
    ):
        ours = make_example(inputs, targets)
        # seqio starts each sequence with a 0 that stands for bos; we begin one token later.
        size = len(ours)
        assert batch["decoder_input_tokens"][1 : size + 1].tolist() == ours.tokens[:-1].tolist()
        assert batch["decoder_target_tokens"][1 : size + 1].tolist() == ours.tokens[1:].tolist()
        weights = (np.arange(1, size + 1) >= ours.num_prompt).astype(int)
        assert batch["decoder_loss_weights"][1 : size + 1].tolist() == weights.tolist()


def test_bind_leaves_the_registry_alone(tokenizer_json):
    vocabulary = TokenizersVocabulary(tokenizer_json, eos_id=2)
    before = seqio.get_mixture_or_task("cldr_sw"), seqio.get_mixture_or_task("cldr_date_sw")
    mixture = bind("cldr_sw", vocabulary)
    assert bind("cldr_sw", TokenizersVocabulary(tokenizer_json, eos_id=2)) is mixture
    assert bind("cldr_sw", vocabulary, template=PlainTemplate()) is not mixture
    assert mixture.name == "cldr_sw"
    assert all(
        isinstance(t.output_features["inputs"].vocabulary, HuggingFaceVocabulary)
        for t in mixture.tasks
    )
    assert (
        seqio.get_mixture_or_task("cldr_sw"),
        seqio.get_mixture_or_task("cldr_date_sw"),
    ) == before
    dataset = mixture.get_dataset(LENGTHS, "validation", shuffle=False).take(3)
    for example in dataset.as_numpy_iterator():
        assert example["targets"][-1] == 2


def test_bind_registers_under_a_new_name(tokenizer_json):
    vocabulary = TokenizersVocabulary(tokenizer_json, eos_id=2)
    for name in ("cldr_date_sw", "cldr_sw"):
        provider = bind(name, vocabulary, register_as=f"{name}_small")
        assert bind(name, vocabulary, register_as=f"{name}_small") is provider
        assert seqio.get_mixture_or_task(f"{name}_small") is provider
        assert provider.name == f"{name}_small"
    with pytest.raises(DataError, match="seqio already has another task of that name"):
        bind("cldr_date_sw", "bytes", register_as="cldr_date_sw_small")
    with pytest.raises(DataError, match="seqio already has another task of that name"):
        bind("cldr_date_sw", "bytes", register_as="cldr_sw")


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [("cldr_dat", "bytes", "close names: cldr_date"), ("cldr_sw", "byte", "vocabulary='byte'")],
)
def test_bind_errors(name, vocabulary, message):
    with pytest.raises(DataError, match=message):
        bind(name, vocabulary)


@each_vocabulary
def test_seqio_vocabularies_give_the_same_ids(vocabulary):
    theirs = vocabulary.to_seqio()
    assert theirs.vocab_size == vocabulary.vocab_size
    assert theirs.eos_id == vocabulary.eos_id
    assert theirs.unk_id == vocabulary.unk_id
    for text in ("Jumatatu, 30 Julai 2001", "2.5 రోజులు", "ab\ncd", ""):
        ids = vocabulary.encode(text)
        assert list(theirs.encode(text)) == ids
        assert theirs.encode_tf(tf.constant(text)).numpy().tolist() == ids
        ended = [*ids, vocabulary.eos_id, *ids]
        assert theirs.decode(ended) == vocabulary.decode(ended)


def test_hugging_face_vocabulary_in_tensorflow(tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    vocabulary = HuggingFaceVocabulary(tmp_path / "tokenizer.json", eos_id=2, bos_id=1, pad_id=0)
    assert isinstance(vocabulary, seqio.Vocabulary)
    texts = ["siku 3 zilizopita", "3 రోజులు"]
    rows = [[*vocabulary.encode(text), 2, 7] for text in texts]
    padded = tf.ragged.constant(rows, dtype=tf.int32).to_tensor(0)
    decoded = vocabulary.decode_tf(padded)
    assert [text.decode() for text in decoded.numpy()] == texts
    assert vocabulary.decode_tf(padded[0]).numpy().decode() == texts[0]
    in_graph = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
    assert in_graph.element_spec == tf.TensorSpec([None], tf.int32)
    assert [ids.tolist() for ids in in_graph.as_numpy_iterator()] == [r[:-2] for r in rows]
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, 0)
    assert vocabulary.decode(vocabulary.encode(f"a{EOS}b")) == "a"


def test_hugging_face_vocabularies_compare_and_pickle(tokenizer_json):
    make = functools.partial(HuggingFaceVocabulary, tokenizer_json)
    one = make(eos_id=2)
    assert one == make(eos_id=2)
    assert one != make(eos_id=1)
    assert one != seqio.ByteVocabulary()
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert hash(copy) == hash(one)
    assert copy.encode("siku") == one.encode("siku")


def test_a_bad_tokenizer_is_our_error():
    with pytest.raises(DataError, match="is not a tokenizer"):
        HuggingFaceVocabulary("{}", eos_id=1)


def test_load_task_takes_a_seqio_vocabulary(tokenizer_json):
    native = load_task("cldr_date_sw", "validation", ByteVocabulary(), limit=4)
    wrapped = load_task("cldr_date_sw", "validation", seqio.ByteVocabulary(), limit=4)
    assert native.fingerprint() == wrapped.fingerprint()
    theirs = HuggingFaceVocabulary(tokenizer_json, eos_id=2)
    ours = TokenizersVocabulary(tokenizer_json, eos_id=2)
    assert (
        load_task("cldr_date_sw", "test", theirs, limit=4).fingerprint()
        == load_task("cldr_date_sw", "test", ours, limit=4).fingerprint()
    )


def test_sizes_are_declared():
    task = seqio.get_mixture_or_task("cldr_date_sw")
    assert {split: task.num_input_examples(split) for split in specs.SPLITS} == {
        "train": 2000,
        "validation": 100,
        "test": 200,
    }
    bfcl_train = sum(bfcl.SIZES[name]["train"] for name in bfcl.FILES)
    assert seqio.get_mixture_or_task("bfcl").num_input_examples("train") == bfcl_train
