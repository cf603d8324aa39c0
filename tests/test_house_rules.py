"""The rules that keep the code liveable, checked on the source: who imports what, sizes, a README that is true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, BUILDER = ROOT / "python" / "chunkkv", ROOT / "builder"
SHIPPED = [*RUNTIME.rglob("*.py"), *BUILDER.rglob("*.py")]
EVERYTHING = [path for name in ("tests", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")] + SHIPPED


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Return the top-level packages a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=names)
def test_each_file_imports_only_what_its_room_may(path: Path) -> None:
    found = imports(path)
    assert not found & {"torch", "transformers", "kvpress", "safetensors", "pickle"}
    assert "lm_eval" not in found or path.name in ("lm_eval_model.py", "lm_eval_command.py")
    assert "matplotlib" not in found or path == RUNTIME / "evaluation" / "plots.py"
    if BUILDER / "backends" not in path.parents and RUNTIME / "executors" not in path.parents:
        assert not found & {"tensorrt", "tensorrt_llm"}
    if RUNTIME in path.parents:
        assert "chunkkv_builder" not in found
        assert "onnxruntime" not in found or path.parent.name == "executors"
    else:
        assert "onnxruntime" not in found, "the builder writes graphs, it does not run them"


@pytest.mark.parametrize("path", EVERYTHING, ids=names)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SHIPPED, ids=names)
def test_public_names_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.name != "__init__.py"], ids=names)
def test_the_readme_tree_names_every_module(path: Path) -> None:
    assert path.name in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pictures_are_drawn_lazily() -> None:
    """matplotlib is an extra: no module may need it to be imported."""
    tree = ast.parse((RUNTIME / "evaluation" / "plots.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("matplotlib" in ast.unparse(node) for node in top)
