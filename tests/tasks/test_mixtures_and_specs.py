"""Mixing rates, task definitions and loading."""

import subprocess
import sys

import numpy as np
import pytest

from sira_jax.errors import ConfigError, DataError
from tasks import specs
from tasks.loading import TokenizedTask, load_mixture, load_task
from tasks.mixtures import equal_rates, mixing_rates, proportional_rates, temperature_rates
from tasks.templates import PlainTemplate
from tasks.vocabularies import ByteVocabulary


def test_rates_by_hand():
    assert equal_rates([4, 100]) == [1.0, 1.0]
    assert proportional_rates([4, 100]) == [4.0, 100.0]
    assert proportional_rates([4, 100], maximum=10) == [4.0, 10.0]
    assert temperature_rates([4, 100], temperature=2) == [2.0, 10.0]
    assert temperature_rates([4, 100], temperature=2, maximum=9) == [2.0, 3.0]
    assert temperature_rates([4, 100], temperature=float("inf")) == [1.0, 1.0]


def test_mixing_rates_by_name():
    sizes = [4, 100]
    assert mixing_rates("mixture", sizes, own_rates=(3.0, 1.0)) == [3.0, 1.0]
    assert mixing_rates("equal", sizes) == [1.0, 1.0]
    assert mixing_rates("proportional", sizes, maximum=10) == [4.0, 10.0]
    assert mixing_rates("temperature", sizes, temperature=2) == [2.0, 10.0]
    with pytest.raises(ConfigError, match="mixing='random' is not allowed"):
        mixing_rates("random", sizes)
    with pytest.raises(ConfigError, match=r"temperature=0\.5 is not allowed"):
        temperature_rates(sizes, temperature=0.5)
    with pytest.raises(ConfigError, match="maximum=0 is not allowed"):
        proportional_rates(sizes, maximum=0)


def test_load_task():
    task = load_task("cldr_unit_sw", "test", "bytes", limit=3, template=PlainTemplate())
    vocabulary = ByteVocabulary()
    assert len(task) == 3
    for example, inputs, targets in zip(task.examples, task.inputs, task.targets, strict=True):
        assert inputs.dtype == targets.dtype == np.int32
        assert vocabulary.decode(inputs) == example["inputs"]
        assert example["inputs"].endswith("in full in Swahili.\n")
        assert vocabulary.decode(targets[:-1]) == example["targets"]
        assert targets[-1] == vocabulary.eos_id
    assert task.max_input_length == max(len(ids) for ids in task.inputs)
    assert task.max_target_length == max(len(ids) for ids in task.targets)
    assert len(task.take(2)) == 2


def test_another_end_of_sequence():
    task = load_task("cldr_unit_sw", "test", "bytes", limit=1, eos_id=2)
    assert task.targets[0][-1] == 2
    with pytest.raises(DataError, match="eos_id=259 is not allowed: 0 to 258"):
        load_task("cldr_unit_sw", "test", "bytes", limit=1, eos_id=259)


def test_fingerprints_follow_the_ids():
    one = load_task("cldr_unit_sw", "test", "bytes", limit=3)
    assert one.fingerprint() == load_task("cldr_unit_sw", "test", "bytes", limit=3).fingerprint()
    assert one.fingerprint() != load_task("cldr_unit_te", "test", "bytes", limit=3).fingerprint()


def test_load_mixture():
    tasks, rates = load_mixture("cldr_sw", "validation", "bytes", limit=5)
    assert [task.name for task in tasks] == list(specs.MIXTURES["cldr_sw"].tasks)
    assert {len(task) for task in tasks} == {5}
    assert rates == [1.0] * len(tasks)
    tasks, rates = load_mixture("cldr_unit_sw", "test", "bytes", mixing="proportional")
    assert (len(tasks), rates) == (1, [200.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: load_task("cldr_dat_sw", "train", "bytes"),
            "no task 'cldr_dat_sw': close.*cldr_date_sw",
        ),
        (
            lambda: load_mixture("zzz", "train", "bytes"),
            "no task or mixture 'zzz': scripts/show_task",
        ),
        (lambda: load_task("cldr_sw", "train", "bytes"), "no task 'cldr_sw'"),
        (
            lambda: load_task("cldr_date_sw", "dev", "bytes"),
            "split='dev' of task cldr_date_sw: it has",
        ),
        (lambda: load_task("cldr_date_sw", "train", "byte"), "vocabulary='byte' is not allowed"),
        (lambda: load_task("cldr_date_sw", "train", "bytes", limit=0), "limit=0 is not allowed"),
        (lambda: TokenizedTask("t", "s", [], [1], [], ()), "task t: 0 inputs, 1 targets"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(DataError, match=message):
        call()


def spec(name="x_task", **changes):
    fields = {"description": "d", "source": lambda split: [], "metrics": (), "sizes": {"train": 0}}
    return specs.TaskSpec(name=name, **(fields | changes))


def test_definitions_are_checked():
    with pytest.raises(DataError, match="'cldr_sw' is taken"):
        specs.add_task(spec("cldr_sw"))
    with pytest.raises(DataError, match="'a-b': use letters"):
        specs.add_task(spec("a-b"))
    with pytest.raises(DataError, match="has no examples"):
        spec().examples("train")
    for tasks, rates, message in (
        (("cldr_date_sw",), (1.0, 2.0), "2 rates for 1 tasks"),
        ((), (), "0 rates for 0 tasks"),
        (("cldr_date_sw",), (0.0,), "must all be above 0"),
        (("nothing",), (1.0,), "unknown tasks"),
    ):
        with pytest.raises(DataError, match=message):
            specs.add_mixture(
                specs.MixtureSpec(name="x_mix", description="d", tasks=tasks, rates=rates)
            )
    assert "x_mix" not in specs.MIXTURES


def test_no_tensorflow_without_the_registry():
    code = (
        "import sys, pkgutil, importlib, sira_jax\n"
        "for module in pkgutil.walk_packages(sira_jax.__path__, 'sira_jax.'):\n"
        "    if '.t5x_integration.' not in module.name: importlib.import_module(module.name)\n"
        "import tasks\n"
        "ours = tasks.load_mixture('cldr_sw', 'test', 'bytes', limit=20)\n"
        "tasks.InputPipeline(*ours, batch_size=2, converter=tasks.DecoderFeatures(length=128), seed=0).next_batch()\n"
        "heavy = {'tensorflow', 'seqio', 't5x', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
