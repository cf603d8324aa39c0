"""Put return_blocks.patch into a source tree of TensorRT-LLM.

    python apply.py TensorRT-LLM --diff return_blocks.diff

Each file is found by its name and each place in it by the function that the hunk names, which must be defined once and
have the parameters that the hunk names. Where one of them is not as expected, nothing is written. Needs Python 3.10.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATCH = Path(__file__).with_name("return_blocks.patch")
MARK = "chunkkvBlocks.h"


class PatchError(Exception):
    """The patch does not fit the source tree; the message says where and what to do."""


@dataclass
class Hunk:
    """Lines to insert, and behind what: "new file", "includes", or "start of" a function with its parameters."""

    place: str
    lines: list[str] = field(default_factory=list)


@dataclass
class FilePatch:
    """The hunks of one file, whose path is relative to the source tree."""

    path: str
    hunks: list[Hunk] = field(default_factory=list)


def read_patch(text: str) -> list[FilePatch]:
    """Return the files of a patch; what stands before the first one is for readers."""
    files: list[FilePatch] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("+++ b/"):
            files.append(FilePatch(line.removeprefix("+++ b/")))
        elif line.startswith("@@ ") and line.endswith(" @@"):
            files[-1].hunks.append(Hunk(line[3:-3]))
        elif files and line.startswith("+"):
            files[-1].hunks[-1].lines.append(line[1:])
        elif files and not line.startswith("--- "):
            raise PatchError(f"{PATCH.name}, line {number}: a hunk holds lines that begin with +, not {line!r}")
    return files


def insertion_point(source: str, place: str, path: str) -> int:
    """Return the offset in `source` behind the line that `place` names.

    Raises
    ------
    PatchError
        If it is not there exactly once, or its parameters differ.
    """
    if place == "includes":
        found = re.search(r"^#include .*\n", source, re.MULTILINE)
        if not found:
            raise PatchError(f"{path} has no #include; is this a source tree of TensorRT-LLM?")
        return found.end()
    name, wanted = re.fullmatch(r"start of ([\w:]+)\((.*)\)", place).groups()  # type: ignore[union-attr]
    definition = rf"^[^\s#/}}].*\b{re.escape(name)}\(([^;{{}}]*)\)[^;{{}}()]*\{{\n"
    places = list(re.finditer(definition, source, re.MULTILINE))
    if len(places) != 1:
        count = f"{len(places)} times" if places else "nowhere"
        raise PatchError(f"{path} defines {name} {count}, not once; the patch is for TensorRT-LLM 1.0 to 1.2.1")
    given = [parameter.split("=")[0].split()[-1].strip("*&") for parameter in places[0][1].split(",")]
    if given != wanted.split(", "):
        raise PatchError(
            f"{path}: {name} takes ({', '.join(given)}), the patch knows it with ({wanted}); it is for TensorRT-LLM "
            "1.0 to 1.2.1"
        )
    return places[0].end()


def patched(source: str, patch: FilePatch) -> str:
    """Return `source` with the hunks of one file in it."""
    at = [(insertion_point(source, hunk.place, patch.path), hunk) for hunk in patch.hunks]
    for offset, hunk in sorted(at, key=lambda each: each[0], reverse=True):
        source = source[:offset] + "".join(f"{line}\n" for line in hunk.lines) + source[offset:]
    return source


def changes(tree: Path, files: Sequence[FilePatch]) -> dict[str, tuple[str, str]]:
    """Return {path: (text before, text after)}; a new file was empty before."""
    texts = {}
    for patch in files:
        path = tree / patch.path
        if patch.hunks[0].place == "new file":
            if path.exists():
                raise PatchError(f"{path} exists: the tree is patched already; start from an unchanged one")
            texts[patch.path] = ("", "".join(f"{line}\n" for line in patch.hunks[0].lines))
            continue
        if not path.is_file():
            raise PatchError(f"{path} is missing; give the folder of a source tree of TensorRT-LLM 1.0 to 1.2.1")
        before = path.read_text(encoding="utf-8")
        if MARK in before:
            raise PatchError(f"{path} is patched already; start from an unchanged tree")
        texts[patch.path] = (before, patched(before, patch))
    return texts


def unified(texts: dict[str, tuple[str, str]]) -> str:
    """Return the changes as a unified diff with the line numbers of this tree."""
    parts = []
    for path, (before, after) in texts.items():
        parts.append(f"diff --git a/{path} b/{path}\n" + ("" if before else "new file mode 100644\n"))
        old = f"a/{path}" if before else "/dev/null"
        parts += difflib.unified_diff(before.splitlines(True), after.splitlines(True), old, f"b/{path}")
    return "".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Patch a tree; return 0, or 1 with one line on stderr where the patch does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="source tree of TensorRT-LLM: the folder that holds cpp/")
    parser.add_argument("--out", type=Path, help="write the changed files to this folder, and leave the tree alone")
    parser.add_argument("--diff", type=Path, help="also write the changes as a unified diff for this tree")
    parser.add_argument("--check", action="store_true", help="only say whether the patch fits")
    given = parser.parse_args(arguments)
    try:
        texts = changes(given.tree, read_patch(PATCH.read_text(encoding="utf-8")))
    except (OSError, PatchError) as error:
        print(f"apply.py: {error}", file=sys.stderr)
        return 1
    if given.diff:
        given.diff.write_text(unified(texts), encoding="utf-8")
    for path, (_, after) in texts.items():
        print(f"{'fits' if given.check else 'patched'}: {path}")
        if not given.check:
            target = (given.out or given.tree) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
