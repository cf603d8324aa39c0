"""The source of both packages as the house rules read it: modules, what each imports and where, and its functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("chunkkv", "chunkkv_builder")


@dataclass(frozen=True)
class Import:
    """One import statement's target; `lazy`: inside a function, or only for a type checker."""

    target: str
    line: int
    lazy: bool

    @property
    def package(self) -> str:
        """The top-level package that is imported."""
        return self.target.split(".", maxsplit=1)[0]


@dataclass(frozen=True)
class Module:
    """A Python file; `name` is what it is imported as."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """The source."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the tree."""
        return list(ast.walk(self.tree))

    def at(self, line: int) -> str:
        """Return the place as people write it."""
        return f"{self.name}:{line}"

    def within(self, *rooms: str) -> bool:
        """Return whether the module is one of `rooms` or lies in one."""
        return any(self.name == room or self.name.startswith(f"{room}.") for room in rooms)

    @cached_property
    def imports(self) -> list[Import]:
        """Every import, those by `importlib.import_module("name")` too; `from x import y` is one of x.y."""
        return list(self._imports(self.tree, lazy=False))

    def _imports(self, node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                source = self._absolute(child)
                yield from (Import(f"{source}.{alias.name}", child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                name = child.args[0] if child.args else None
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield Import(name.value, child.lineno, lazy)
            deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from self._imports(child, lazy or deferred)

    def _absolute(self, node: ast.ImportFrom) -> str:
        package = self.name.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        above = package[: len(package) - node.level + 1] if node.level else []
        return ".".join([*above, *([node.module] if node.module else [])])


class House:
    """Both packages under one root; the rules below ask it, and plant violations in one of their own."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules: dict[str, Module] = {}
        for folder in ("python", "builder"):
            for path in sorted((root / folder).rglob("*.py")):
                parts = path.relative_to(root / folder).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                if parts[0] in PACKAGES:
                    self.modules[name] = Module(name, path)

    def module_of(self, target: str) -> str | None:
        """Return the module an import of `target` runs, None where it is not one of ours."""
        while target not in self.modules:
            if "." not in target:
                return None
            target = target.rpartition(".")[0]
        return target

    def arrows(self) -> Iterator[tuple[Module, Import, str]]:
        """Yield each import of one of our modules by another: who imports, the import, what is imported."""
        for module in self.modules.values():
            for statement in module.imports:
                target = self.module_of(statement.target)
                if target is not None and target != module.name:
                    yield module, statement, target


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of names that reach each other (strongly connected components of more than one)."""
    reach = {name: _reachable(name, edges) for name in edges}
    groups = {
        tuple(sorted({name} | {other for other in reach[name] if name in reach.get(other, ())}))
        for name in edges
        if name in reach[name]
    }
    return sorted(list(group) for group in groups)


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(edges.get(start, ()))
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges.get(name, ())
    return seen


def native_sources(root: Path) -> list[Path]:
    """Return every C++ and CUDA file of plugins/."""
    return sorted(p for p in (root / "plugins").rglob("*") if p.suffix in {".h", ".cc", ".cu", ".cuh"})


def includes(path: Path) -> list[str]:
    """Return what a C++ file includes, without quotes or brackets."""
    return re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def tree_folders(readme: str) -> list[str]:
    """Return the folders that the README's tree names: lines of a code block that start with `name/`, indented by 2."""
    folders: list[str] = []
    above: list[tuple[int, str]] = []
    for line in readme.splitlines():
        entry = re.match(r"^( *)([\w.-]+/(?:[\w.-]+/)*)(?:\s|$)", line)
        if entry is None:
            continue
        indent = len(entry[1])
        while above and above[-1][0] >= indent:
            above.pop()
        name = "".join([*([above[-1][1]] if above else []), entry[2]])
        above.append((indent, name))
        folders.append(name)
    return folders
