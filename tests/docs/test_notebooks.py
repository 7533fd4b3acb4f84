"""The notebooks: what they hold is of one whole run, and they run."""

import json
from pathlib import Path

import pytest

from tests.docs.test_site import REPOSITORY
from tests.hf_models import weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE

NOTEBOOKS = sorted((REPOSITORY / "docs/notebooks").glob("*.ipynb"))
SCRATCH, ROUTING = "sira_from_scratch", "inspect_routing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_one_run_and_small(path):
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds
    assert "error" not in kinds
    assert path.stat().st_size < 500_000


@pytest.fixture
def runner():
    pytest.importorskip("nbclient", reason="make notebooks-setup installs it")
    from scripts.docs import run_notebooks

    return run_notebooks


@pytest.mark.slow
def test_sira_from_scratch_prints_what_it_holds(runner):
    path = REPOSITORY / f"docs/notebooks/{SCRATCH}.ipynb"
    held = runner.printed(runner.read(path))
    notebook = runner.read(path)
    runner.execute(notebook)
    assert runner.printed(notebook) == held


@pytest.mark.slow
def test_inspect_routing_runs_on_a_tiny_model(runner, tmp_path: Path):
    shape = {**SHAPE, "num_hidden_layers": 2}
    write_folder(tmp_path / "model", shape, weights_by_rule(shape))
    parameters = {
        "MODEL": str(tmp_path / "model"),
        "VOCABULARY": "bytes",
        "NUM_STEPS": 2,
        "WORKDIR": str(tmp_path / "run"),
    }
    path = REPOSITORY / f"docs/notebooks/{ROUTING}.ipynb"
    held = runner.read(path)
    notebook = runner.read(path, parameters)
    # The tests' values stand in place of the notebook's own, and set the same names.
    (cell,) = [cell for cell in held.cells if "parameters" in cell.metadata.get("tags", ())]
    own = {line.split(" = ")[0] for line in cell.source.split("\n")}
    assert own == set(parameters)
    runner.execute(notebook)
    text = "\n".join(runner.printed(notebook))
    assert "after 2 steps" in text
    assert "16 experts of rank 4, 4 a token" in text
    pictures = [
        len([o for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})])
        for cell in notebook.cells
    ]
    assert sum(pictures) == 6
    assert (tmp_path / "run/checkpoints/2").is_dir()
