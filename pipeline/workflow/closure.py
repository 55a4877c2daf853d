"""The import closure of a file within the project, and a hash of it that ignores comments and docstrings.

The imports are read from the syntax trees. Imports inside functions count; imports under ``if TYPE_CHECKING`` do not.
Implementations that are looked up by name at run time (``pipeline.config.registry``) are not imports: the caller must
pass their files as roots.

A cache maps the path and content of a file to its imports and hash. Without it, parsing the closure of a training takes
longer than all else that a stage does before its work, except importing torch.
"""

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.stores import cache

ROOT = Path(__file__).parents[2]
CACHE = Path("results") / ".hashes-code"  # of all experiments
LIMIT = 2000  # entries; the oldest are dropped
PACKAGES = ("pipeline", "stages")
DATA = (".css", ".html", ".j2", ".js")  # non-Python files that belong to the modules in their folder
TEMPLATES = "templates"  # a subfolder whose files also belong to these modules


class _Source(NamedTuple):
    """A Python file without comments and docstrings."""

    code: str  # sha256, in hexadecimal
    modules: tuple[str, ...]  # that it imports; some are names within a module


@functools.cache
def digest(roots: tuple[Path, ...]) -> str:
    """Return the SHA-256 of the import closure of these files, in hexadecimal."""
    whole, known = hashlib.sha256(), len(_known())
    for file in sorted(files(roots)):
        content = _source(file).code if file.suffix == ".py" else hashlib.sha256(file.read_bytes()).hexdigest()
        whole.update(f"{file.relative_to(ROOT).as_posix()} {content}\n".encode())
    if len(_known()) > known:
        cache.save(CACHE, dict(list(_known().items())[-LIMIT:]))
    return whole.hexdigest()


def files(roots: Iterable[Path]) -> set[Path]:
    """Return these files, the project's files that they import (also indirectly), and the data files next to them."""
    closure: set[Path] = set()
    waiting = {file for root in roots for file in (root, *_packages(root))}
    while waiting:
        closure |= waiting
        waiting = {other for file in waiting for other in _imports(file)} - closure
    return closure | {data for folder in {file.parent for file in closure} for data in _data(folder)}


@functools.cache
def _data(folder: Path) -> tuple[Path, ...]:
    return tuple(file for part in (folder, folder / TEMPLATES) for file in part.glob("*") if file.suffix in DATA)


@functools.cache
def _source(file: Path) -> _Source:
    path, content = file.relative_to(ROOT).as_posix(), file.read_bytes()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"  # whose syntax tree is hashed
    key = f"{path} {hashlib.sha256(content).hexdigest()} {version}"
    if key not in _known():
        tree = ast.parse(content, path)
        _known()[key] = _Source(_code(tree), tuple(sorted(_modules(tree, path))))
    return _known()[key]


@functools.cache
def _known() -> dict[str, _Source]:
    """The cache's entries, and those that this process adds."""
    try:
        return {key: _Source(code, tuple(modules)) for key, (code, modules) in (cache.load(CACHE) or {}).items()}
    except (AttributeError, TypeError, ValueError):
        return {}


@functools.cache
def _imports(file: Path) -> frozenset[Path]:
    sources = map(_file, _source(file).modules)
    return frozenset(part for source in sources if source for part in (source, *_packages(source)))


def _modules(tree: ast.Module, path: str) -> set[str]:
    modules: set[str] = set()
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            modules.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.split("/")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, (package, node.module)))
            modules.update((source, *(f"{source}.{name.name}" for name in node.names)))
    return modules


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from _statements(other)
        else:
            yield child
            yield from _statements(child)


def _file(module: str) -> Path | None:
    """Return the file of a module of the project; None for other modules and for names that are not modules."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _packages(file: Path) -> list[Path]:
    """Return the ``__init__.py`` files of the enclosing packages, which Python runs first."""
    folders = [parent for parent in file.parents if parent != ROOT and parent.is_relative_to(ROOT)]
    return [init for folder in folders if (init := folder / "__init__.py").is_file()]


def _code(tree: ast.Module) -> str:
    parts: list[str] = []
    _flatten(tree, parts)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _flatten(node: ast.AST, parts: list[str]) -> None:
    """Append the node to ``parts`` without positions and without string statements such as docstrings.

    Empty fields are omitted, so that Python versions whose syntax trees differ only in new, unused fields agree.
    """
    parts.append(type(node).__name__)
    for name in node._fields:
        value = getattr(node, name, None)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if items := [item for item in items if not _is_docstring(item)]:
            parts.append(f"{name}[")
            for item in items:
                if isinstance(item, ast.AST):
                    _flatten(item, parts)
                else:
                    parts.append(repr(item))
            parts.append("]")


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
