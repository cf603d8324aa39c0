"""What a type checker tells users: mypy on a small file that uses the public names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chunkkv
from chunkkv import errors

pytest.importorskip("mypy")
USER_FILE = """
import threading
import numpy as np
from chunkkv import ChunkKVSession, SamplingParams

session = ChunkKVSession.from_dir("engine", threads=2)
params = SamplingParams(max_new_tokens=3, stop=["."], seed=1)
texts: list[str] = []
ids: list[list[int]] = []
flag: bool = bool(texts)

reveal_type(session.generate("text"))
reveal_type(session.generate([1, 2, 3], params, keep_ratio=0.2))
reveal_type(session.generate((1, 2), params, budget_tokens=5))
reveal_type(session.generate(np.array([1, 2]), cancel=threading.Event()))
reveal_type(session.generate(texts, params, keep_ratio=[0.2, None]))
reveal_type(session.generate(ids))
reveal_type(session.generate(["text", [1, 2]], stream=False))
reveal_type(session.generate("text", stream=True))
reveal_type(session.generate(texts, stream=True))
reveal_type(session.generate(texts, stream=flag))
reveal_type(session.inspect("text").groups)
for event in session.generate("text", stream=True):
    reveal_type(event.finished)

session.generate("text", keep_ration=0.2)
SamplingParams(max_new_tokens="3")
session.generate("text", stream=True).text
import chunkkv
chunkkv.Sampling
"""
ONE, MANY = "chunkkv.results.GenerationResult", "list[chunkkv.results.GenerationResult]"
STREAM = "typing.Iterator[chunkkv.results.StreamEvent]"
REVEALED = [ONE] * 4 + [MANY] * 3 + [STREAM] * 2 + [f"{ONE} | {MANY} | {STREAM}"]
REVEALED += ["tuple[chunkkv.results.GroupChoice, ...]", f"{ONE} | None"]
# Per line from the first mistake on: what mypy calls it.
MISTAKES = ["call-overload", "arg-type", "attr-defined", "attr-defined"]


def test_a_users_file_is_checked_against_the_overloads(tmp_path: Path) -> None:
    user_file = tmp_path / "user.py"
    user_file.write_text(USER_FILE)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\n[mypy-onnxruntime]\nignore_missing_imports=True\n"
    )
    package = str(Path(chunkkv.__file__).parents[1])
    words = ["--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache", "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, user_file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MYPYPATH": package},
        cwd=tmp_path,
    )
    revealed = re.findall(r'note: Revealed type is "(.*)"', done.stdout)
    assert [plain(name) for name in revealed] == REVEALED, done.stdout + done.stderr
    first = USER_FILE.splitlines().index('session.generate("text", keep_ration=0.2)') + 1
    found = {int(line): kind for line, kind in re.findall(r"user\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)}
    lines = [first, first + 1, first + 2, first + 4]
    assert found == dict(zip(lines, MISTAKES, strict=True)), done.stdout


def plain(name: str) -> str:
    """Return a type as every version of mypy that is allowed writes it."""
    name = name.replace("builtins.", "").replace("collections.abc.", "typing.")
    if name.startswith("Union["):
        return " | ".join(re.split(r", (?![^\[]*\])", name.removeprefix("Union[").removesuffix("]")))
    return name


def test_every_public_name_can_be_imported_and_is_seen_by_checkers() -> None:
    assert "py.typed" in os.listdir(Path(chunkkv.__file__).parent)
    tree = ast.parse(Path(chunkkv.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {*seen, "__version__"} == set(chunkkv.__all__)
    for name in chunkkv.__all__:
        assert getattr(chunkkv, name) is not None
    assert set(chunkkv.__all__) <= set(dir(chunkkv))
    with pytest.raises(AttributeError, match="'Sampling'"):
        chunkkv.Sampling  # noqa: B018


def test_every_error_is_public() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(chunkkv.__all__)
    assert all(issubclass(getattr(errors, name), errors.ChunkKVError) for name in classes)
