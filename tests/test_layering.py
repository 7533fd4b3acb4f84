"""Who may import whom, what importing the library may not bring with it, and one list of requirements."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sira_jax.adapters import METHODS

REPOSITORY = Path(__file__).parents[1]
# What the modules of each package may import of sira_jax, besides their own package.
GROUND = {"errors", "files", "json_text", "placement", "quantized", "tokenizer_text"}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "json_text": set(),
    "tokenizer_text": {"json_text"},
    "placement": set(),
    "quantized": {"errors"},
    "routing": GROUND,
    "adapters": GROUND | {"routing"},
    "models": GROUND | {"routing", "adapters"},
    "checkpoints": GROUND | {"adapters", "models"},
    "training": GROUND | {"routing", "adapters", "models", "checkpoints"},
    "t5x_integration": GROUND | {"routing", "adapters", "models", "checkpoints", "training"},
}
HEAVY = {"seqio", "tensorflow", "tensorflow_datasets", "clu", "tensorboard", "t5", "t5x", "torch"}
# The optional engine, which brings TensorFlow with it: one package, whose modules need it but for these, and its scripts.
T5X = "sira_jax/t5x_integration/"
WITHOUT_T5X = {f"{T5X}{name}.py" for name in ("__init__", "compat", "rows")}
T5X_SCRIPTS = {f"scripts/t5x_{name}.py" for name in ("export", "launch", "tasks")}
OPTIONAL = {"gin"}
# Scripts beside PyTorch, and the module that looks for a TPU's compiler; both are extras.
EXTRAS = {
    "scripts/torch_worker.py": {"torch", "transformers", "peft", "mixlora"},
    "scripts/precompile_topology.py": {"libtpu"},
}


def imports(path):
    """(imported module's dotted name, whether it is imported when the module is) of a file."""
    tree = ast.parse(path.read_text(), str(path))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from sira_jax import routing` imports sira_jax.routing.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
            and "import" in ast.unparse(node.func)
        ):
            names = [node.args[0].value]
        for name in names:
            yield name, id(node) not in inside


def files(package):
    found = sorted((REPOSITORY / package).rglob("*.py"))
    assert found
    return found


LIBRARY = files("sira_jax")


def relative(path):
    return str(path.relative_to(REPOSITORY))


def extras(path):
    return EXTRAS.get(relative(path), set())


@pytest.mark.parametrize("path", LIBRARY, ids=relative)
def test_lower_layers_import_no_higher_ones(path):
    own = path.relative_to(REPOSITORY / "sira_jax").parts[0].removesuffix(".py")
    if own == "__init__":
        assert not list(imports(path))
        return
    for name, _ in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("tasks", "configs", "scripts", "tests"), name
        if parts[0] == "sira_jax":
            assert parts[1] in ALLOWED[own] | {own}, f"{relative(path)} imports {name}"


def test_every_package_of_the_library_is_in_the_order():
    packages = {path.relative_to(REPOSITORY / "sira_jax").parts[0] for path in LIBRARY}
    assert {name.removesuffix(".py") for name in packages} == set(ALLOWED) | {"__init__"}


@pytest.mark.parametrize("package", ["sira_jax", "configs", "scripts", "tasks"])
def test_only_tasks_and_the_log_use_tensorflows_world(package):
    for path in files(package):
        for name, at_import in imports(path):
            if name.split(".")[0] not in HEAVY:
                continue
            if relative(path).startswith(T5X):
                assert relative(path) not in WITHOUT_T5X or not at_import, name
            elif relative(path) in T5X_SCRIPTS or name.split(".")[0] in extras(path):
                continue
            elif relative(path) == "sira_jax/training/logging.py":
                assert name.startswith("clu.")
                assert not at_import
            else:
                assert package == "tasks", f"{relative(path)} imports {name}"


@pytest.mark.parametrize("package", ["sira_jax", "configs", "scripts", "tasks"])
def test_only_the_t5x_integration_imports_t5x(package):
    for path in files(package):
        for name, _ in imports(path):
            if name.split(".")[0] == "t5x":
                # By the one function that says what is missing.
                assert relative(path) == f"{T5X}engine.py" or relative(path) in T5X_SCRIPTS, name


@pytest.mark.parametrize(
    "package", ["models", "training", "checkpoints", "routing", "t5x_integration"]
)
def test_no_package_but_adapters_asks_for_a_method(package):
    """Methods reach the block and the step through hooks: their names and classes stand nowhere else."""
    names = {f'"{name}"' for name in METHODS} | {f"'{name}'" for name in METHODS}
    classes = {config.__name__ for config in METHODS.values()}
    for path in files(f"sira_jax/{package}"):
        if relative(path) == "sira_jax/checkpoints/peft.py":
            continue  # The format of another library has names of its own for some methods.
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Constant | ast.Name) else ""
            assert text not in names | classes, f"{relative(path)}: {text}"


@pytest.mark.parametrize("package", ["configs", "tasks"])
def test_configs_and_tasks_do_not_reach_up(package):
    higher = {"configs": {"scripts", "tasks", "tests"}, "tasks": {"scripts", "configs", "tests"}}
    for path in files(package):
        for name, _ in imports(path):
            assert name.split(".")[0] not in higher[package], f"{relative(path)} imports {name}"


def test_importing_the_whole_library_brings_no_tensorflow():
    modules = [
        relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in LIBRARY
        if not relative(path).startswith(T5X) or relative(path) in WITHOUT_T5X
    ]
    program = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(sorted({HEAVY!r} & {{name.split(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]"


def test_every_package_is_listed_for_installation():
    listed = set(project()["tool"]["setuptools"]["packages"])
    there = {
        relative(path.parent).replace("/", ".")
        for package in ("sira_jax", "configs", "scripts", "tasks")
        for path in files(package)
        if path.name == "__init__.py"
    }
    assert listed == there


def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_requirements_are_the_projects():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    config = project()["project"]
    optional = config["optional-dependencies"]
    assert listed == config["dependencies"] + optional["test"] + optional["docs"]


def test_what_the_code_imports_is_required():
    """Every third-party module belongs to a listed requirement: of the tests', if only a function imports it.

    What makes the documentation needs that of its own two extras.
    """
    named_otherwise = {
        "absl": "absl-py",
        "google": "protobuf",
        "ml_collections": "ml-collections",
        "ml_dtypes": "ml-dtypes",
        "orbax": "orbax-checkpoint",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "rouge_score": "rouge-score",
    }
    config = project()["project"]
    required = {line.split(">")[0].lower() for line in config["dependencies"]}
    optional = {
        extra: {line.split(">")[0] for line in lines}
        for extra, lines in config["optional-dependencies"].items()
    }
    known = set(sys.stdlib_module_names) | {"sira_jax", "configs", "scripts", "tasks"}
    for package in ("sira_jax", "configs", "scripts", "tasks"):
        for path in files(package):
            for name, at_import in imports(path):
                top = name.split(".")[0]
                if top in {"t5x", *OPTIONAL}:
                    assert relative(path).startswith(T5X) or relative(path) in T5X_SCRIPTS, name
                elif top not in known | extras(path):
                    allowed = required if at_import else required | optional["test"]
                    if relative(path).startswith("scripts/docs/"):
                        allowed = required | optional["docs"] | optional["notebooks"]
                    assert named_otherwise.get(top, top).lower() in allowed, (
                        f"{relative(path)} imports {name}"
                    )
