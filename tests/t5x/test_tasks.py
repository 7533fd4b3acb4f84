"""Tasks by name with the model's vocabulary."""

import pytest
import seqio

from scripts.t5x_tasks import with_vocabulary
from sira_jax.errors import DataError
from tests.t5x import tiny_tasks

LARGER = seqio.ByteVocabulary(extra_ids=7)


@pytest.mark.parametrize("name", ["cldr_date_sw", "cldr_date"])
def test_a_task_of_this_project_gets_the_models_vocabulary(name):
    assert with_vocabulary(name, seqio.ByteVocabulary()) == name
    bound = with_vocabulary(name, LARGER)
    assert bound == f"{name}__ByteVocabulary_266"
    assert with_vocabulary(name, seqio.ByteVocabulary(extra_ids=7)) == bound
    features = seqio.get_mixture_or_task(bound).output_features
    assert all(feature.vocabulary == LARGER for feature in features.values())
    own = seqio.get_mixture_or_task(name).output_features
    assert all(feature.vocabulary == seqio.ByteVocabulary() for feature in own.values())


def test_inputs_of_an_encoder_end_with_eos():
    vocabulary = seqio.ByteVocabulary(extra_ids=9)
    bound = with_vocabulary("cldr_date_sw", vocabulary, inputs_eos=True)
    assert bound != with_vocabulary("cldr_date_sw", vocabulary)
    assert bound == with_vocabulary("cldr_date_sw", vocabulary, inputs_eos=True)
    task = seqio.get_mixture_or_task(bound)
    lengths = {"inputs": 256, "targets": 256}
    example = next(task.get_dataset(lengths, "train", shuffle=False).take(1).as_numpy_iterator())
    assert example["inputs"][-1] == example["targets"][-1] == vocabulary.eos_id


def test_any_other_task_stays_as_it_is():
    assert with_vocabulary("tiny_mixture", LARGER) == "tiny_mixture"
    assert tiny_tasks.VOCABULARY != LARGER


def test_an_unknown_task_is_named_with_the_nearest():
    with pytest.raises(
        DataError, match=r"MIXTURE_OR_TASK_NAME='cldr_dat': .*did you mean 'cldr_date'"
    ):
        with_vocabulary("cldr_dat", LARGER)
