"""Tables of all config fields, read from the source: names, types and defaults of the dataclasses, and their docstrings.

Nothing is imported, so that the site is built without JAX; tests/docs holds the tables to what Python itself says.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_CODE = re.compile(r"(`[^`]*`)|[^`]+")
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config: its type and default as they are written, and what it means."""

    name: str
    type: str
    default: str
    text: str


class Sources:
    """The classes of some Python files by their names.

    Args:
      paths: files or folders.
    """

    def __init__(self, *paths: Path):
        self._classes: dict[str, ast.ClassDef] = {}
        self._trees: dict[str, ast.Module] = {}
        self._constants: dict[str, dict[str, str]] = {}
        for path in paths:
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                tree = ast.parse(file.read_text("utf-8"), str(file))
                self._trees[file.name] = tree
                # A default may be a constant of its file.
                constants = {
                    ast.unparse(node.targets[0]): ast.unparse(node.value)
                    for node in tree.body
                    if isinstance(node, ast.Assign)
                }
                for node in tree.body:
                    if isinstance(node, ast.ClassDef) and node.name not in self._classes:
                        self._classes[node.name] = node
                        self._constants[node.name] = constants

    def fields(self, name: str) -> list[Field]:
        """The fields of a dataclass, its bases' first, as `dataclasses.fields` has them."""
        found: dict[str, Field] = {}
        for node in reversed(self._bases(name)):
            constants = self._constants[node.name]
            texts = attributes(ast.get_docstring(node) or "")
            for field_name, annotation, value in _annotated(node):
                known = found.get(field_name)
                text = texts.get(field_name) or (known.text if known else "")
                value = constants.get(value, value)
                found[field_name] = Field(field_name, annotation, value, text)
        return list(found.values())

    def class_variable(self, name: str, variable: str) -> str:
        """The text that a class gives a variable."""
        for node in self._bases(name):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and statement.target.id == variable:
                    return ast.literal_eval(statement.value)
        raise KeyError(variable)

    def named_classes(self, file: str, variable: str) -> dict[str, str]:
        """Key -> class of a mapping {"model": ModelSource, ...} that a file assigns."""
        mapping = self._value(file, variable)
        keys = [key.value for key in mapping.keys]
        return dict(zip(keys, [ast.unparse(value) for value in mapping.values], strict=True))

    def listed_classes(self, file: str, variable: str) -> list[str]:
        """The classes of a comprehension over a tuple of them that a file assigns."""
        comprehension = self._value(file, variable)
        return [ast.unparse(element) for element in comprehension.generators[0].iter.elts]

    def _value(self, file: str, variable: str) -> ast.expr:
        for node in self._trees[file].body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else []
            targets = node.targets if isinstance(node, ast.Assign) else targets
            if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
                return node.value
        raise KeyError(variable)

    def _bases(self, name: str) -> list[ast.ClassDef]:
        """The class and its bases among these files, in the order in which Python looks things up."""
        order: list[ast.ClassDef] = []
        node = self._classes.get(name.rpartition(".")[2])
        if node is None:
            return order
        for other in [ast.unparse(base) for base in node.bases]:
            # A base of several classes comes after all of them.
            above = self._bases(other)
            order = [one for one in order if one not in above] + above
        return [node, *order]


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        annotation = ast.unparse(statement.annotation)
        if annotation.startswith("ClassVar"):
            continue
        value = "" if statement.value is None else ast.unparse(statement.value)
        value = {"dataclasses.field(default_factory=dict)": "{}"}.get(value, value)
        yield statement.target.id, annotation, value


def attributes(docstring: str) -> dict[str, str]:
    """Name -> text of a docstring's section `Attributes:`; names that share a line share its text."""
    lines = inspect.cleandoc(docstring).split("\n")
    if "Attributes:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Attributes:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = _ENTRY.fullmatch(line.strip())
        if entry and len(line) - len(line.lstrip()) == 2:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def assigned(file: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """section -> field -> (value, comment) of the lines `config.section.field = value  # comment` of a config file."""
    source = file.read_text("utf-8")
    lines = source.split("\n")
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for node in ast.walk(ast.parse(source, str(file))):
        if not isinstance(node, ast.Assign):
            continue
        parts = ast.unparse(node.targets[0]).split(".")
        if len(parts) != 3 or parts[0] != "config":
            continue
        own = " ".join(lines[node.lineno - 1 : node.end_lineno])
        comment = own.rpartition("  # ")[2].rstrip(" )") if "  # " in own else ""
        value = ast.unparse(node.value)
        value = "None" if value.startswith("config_dict.placeholder") else value
        value = "{}" if value == "ConfigDict()" else value
        found.setdefault(parts[1], {})[parts[2]] = (value, comment)
    return found


def table(fields: list[Field]) -> str:
    """A Markdown table, a row a field."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = f"`{field.default}`" if field.default else "–"
        # A bar within code is none of the table's; elsewhere it must be marked.
        text = _CODE.sub(
            lambda part: part[0] if part[1] else part[0].replace("|", "\\|"), field.text
        )
        rows.append(f"| `{field.name}` | `{field.type}` | {default} | {text} |")
    return "\n".join(rows)


def experiment_sections(root: Path) -> dict[str, list[Field]]:
    """section -> fields of an experiment with the defaults of configs/base.py, but for `adapter`."""
    sources = Sources(root / "sira_jax/training/config.py", root / "sira_jax/training/bad_loss.py")
    return _sections(sources, root / "configs/base.py")


def adapter_methods(root: Path) -> tuple[list[Field], dict[str, list[Field]]]:
    """The fields that all methods have, and method -> all its fields."""
    sources = Sources(root / "sira_jax/adapters", root / "sira_jax/routing")
    methods = {
        sources.class_variable(cls, "method"): sources.fields(cls)
        for cls in sources.listed_classes("registry.py", "METHODS")
    }
    return sources.fields("AdapterConfig"), methods


def launch_sections(root: Path) -> dict[str, list[Field]]:
    """section -> fields of a launch with the defaults of configs/launch/base.py."""
    sources = Sources(root / "scripts/launch/tpus.py", root / "scripts/launch/config.py")
    return _sections(sources, root / "configs/launch/base.py")


def _sections(sources: Sources, defaults: Path) -> dict[str, list[Field]]:
    base = assigned(defaults)
    return {
        name: _with_defaults(sources.fields(cls), base.get(name, {}))
        for name, cls in sources.named_classes("config.py", "SECTIONS").items()
    }


def _with_defaults(fields: list[Field], base: Mapping[str, tuple[str, str]]) -> list[Field]:
    changed = []
    for field in fields:
        value, comment = base.get(field.name, (field.default, ""))
        changed.append(dataclasses.replace(field, default=value, text=field.text or comment))
    return changed


def experiment_tables(root: Path) -> str:
    """The sections of an experiment."""
    parts = []
    for name, fields in experiment_sections(root).items():
        parts += [f"### {name}", table(fields)]
    return "\n\n".join(parts)


def adapter_tables(root: Path) -> str:
    """The section `adapter`: what all methods have, then each method's own fields and changed defaults."""
    common, methods = adapter_methods(root)
    parts = ["### adapter", "Fields of every method:", table(common)]
    shared = {field.name: field.default for field in common}
    for name, fields in methods.items():
        own = [field for field in fields if shared.get(field.name) != field.default]
        parts += [f"### adapter: {name}", table(own) if own else "No further fields."]
    return "\n\n".join(parts)


def launch_tables(root: Path) -> str:
    """The sections of a launch."""
    parts = []
    for name, fields in launch_sections(root).items():
        parts += [f"### launch: {name}", table(fields)]
    return "\n\n".join(parts)
