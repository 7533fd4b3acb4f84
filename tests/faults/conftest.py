"""The lab and its unbroken run."""

import pytest

from tests.faults.runs import Lab, finish

STEPS, EVERY = 100, 5


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"), STEPS, EVERY)


@pytest.fixture(scope="session")
def unbroken(lab, tmp_path_factory):
    """unbroken(*flags) -> run directory of a run without a stop, made once for the flags."""
    made = {}

    def run(*flags):
        if flags not in made:
            workdir = tmp_path_factory.mktemp("unbroken")
            status, _, err = finish(lab.train(workdir, *flags))
            assert status == 0, err
            made[flags] = workdir
        return made[flags]

    return run


@pytest.fixture
def say(capsys):
    """Prints a line of figures where it is seen, after the test's own."""

    def say(text):
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return say
