"""The pages of the API: one a package, on it every public module by what its docstrings say (mkdocstrings reads them)."""

import ast
from pathlib import Path

# Page -> (package, what its page opens with).
PACKAGES = {
    "routing": "sira_jax.routing",
    "adapters": "sira_jax.adapters",
    "models": "sira_jax.models",
    "checkpoints": "sira_jax.checkpoints",
    "training": "sira_jax.training",
    "tasks": "tasks",
}


def modules(root: Path, package: str) -> list[str]:
    """Dotted names of a package's public modules, in order."""
    folder = root / package.replace(".", "/")
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return [f"{package}.{name}" for name in names]


def page(root: Path, package: str) -> str:
    """The page of a package, as mkdocstrings takes it."""
    init = root / package.replace(".", "/") / "__init__.py"
    parts = [f"# {package}", ast.get_docstring(ast.parse(init.read_text("utf-8"))) or ""]
    parts += [f"::: {name}" for name in modules(root, package)]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The page that names the packages."""
    rows = [f"- [`{package}`]({name}.md)" for name, package in PACKAGES.items()]
    text = (
        "Every public module of the library, from its docstrings. Arrays' names end with their axes, `x_GSD`; the head of a\n"
        "module says what the letters are. [Architecture](../architecture.md) says how the packages lie on one another."
    )
    return "\n".join(["# API", "", text, "", *rows]) + "\n"
