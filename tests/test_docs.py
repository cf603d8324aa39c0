"""The documentation is true where a test can tell: links, flags, files, versions, the API page, the width of lines."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import chunkkv
from chunkkv.cli.main import main as chunkkv_command
from chunkkv.evaluation.policies import RULES
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.build import main as chunkkv_build

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "benchmarks" / "results" / "page.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"), TEMPLATE])
NOT_WRAPPED = {ROOT / "docs" / name for name in ("api.md", "results.md")}
GROUPS = {"triton": ("init", "patch", "serve"), "profile": ("", "report")}
COMMANDS = (
    "generate",
    "chat",
    "compress",
    "inspect",
    "eval",
    "calibrate",
    "lm-eval",
    "profile",
    "serve",
    "triton",
    "doctor",
    "version",
)
# Flags that the pages name and that belong to other programs.
ELSEWHERE = {
    "trtllm-build": """context_fmha fast_build gemm_plugin gpt_attention_plugin kv_cache_type lora_target_modules
        max_beam_width multiple_profiles remove_input_padding output_timing_cache tokens_per_block workers""",
    "convert_checkpoint.py": "cp_size dtype model_dir output_dir tp_size",
    "lm_eval": """apply_chat_template batch_size include_path limit log_samples model model_args num_fewshot
        output_path tasks""",
    "scripts of this project": "check diff model nvtx_include only out output page_only quick seed work_dir",
    "other tools": "backend-config build cuda-graph-trace dry_run model-repository no-deps output shm-size trace type",
}
FOREIGN = {flag for flags in ELSEWHERE.values() for flag in flags.split()}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of indented code blocks, with continuation lines joined, and the code spans."""
    for block in re.findall(r"(?:^ {4,}\S.*\n?)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))


@cache
def flags_of(program: str, *command: str) -> frozenset[str]:
    """Return the flags in a command's --help; chunkkv-build has another one for TensorRT-LLM."""
    run = chunkkv_build if program == "chunkkv-build" else chunkkv_command
    pages = ([], ["--backend", "tensorrt_llm"]) if run is chunkkv_build else (list(command),)
    output = io.StringIO()
    for words in pages:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            run([*words, "--help"])
    return frozenset(re.findall(r"--([a-z][a-z0-9_-]*)", output.getvalue()))


def all_flags() -> frozenset[str]:
    """Return the flags of both programs."""
    commands = [(c, s) if s else (c,) for c in COMMANDS for s in GROUPS.get(c, ("",))]
    known = [flags_of("chunkkv", *command) for command in commands if command != ("lm-eval",)]
    return frozenset().union(flags_of("chunkkv-build"), *known)


def command_of(words: list[str]) -> tuple[str, ...]:
    """Return the program and the command of a command line; empty where it is not one of ours."""
    if not words or words[0] not in ("chunkkv", "chunkkv-build"):
        return ()
    names = [word for word in words[1:3] if not word.startswith("-")]
    if words[0] == "chunkkv-build" or not names:
        return (words[0],)
    has_second = len(names) > 1 and names[1] in GROUPS.get(names[0], ())
    return (words[0], *names[: 2 if has_second else 1])


def anchors(page: Path) -> set[str]:
    """Return the anchors that a code host makes of a page's headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_resolves(page: Path) -> None:
    folder = ROOT / "docs" if page == TEMPLATE else page.parent
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_of_a_command_exists(page: Path) -> None:
    wrong = []
    for line in code_lines(page.read_text(encoding="utf-8")):
        with contextlib.suppress(ValueError):  # a span such as `"` is no command line
            words = shlex.split(line, comments=True)
            command = command_of(words)
            if not command or command[1:] == ("lm-eval",):
                continue
            passes_on = "tensorrt_llm" in words
            for word in words:
                flag = word.partition("=")[0].removeprefix("--")
                if word.startswith("--") and flag not in flags_of(*command) and not (passes_on and flag in FOREIGN):
                    wrong.append(f"{' '.join(command)}: --{flag}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_that_is_named_exists(page: Path) -> None:
    known = all_flags() | FOREIGN
    named = {flag for line in code_lines(page.read_text("utf-8")) for flag in re.findall(r"--([a-z][\w-]*)", line)}
    assert sorted(named - known) == []


def test_flags_of_other_programs_are_named_somewhere() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [flag for flag in sorted(FOREIGN) if f"--{flag}" not in text] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NOT_WRAPPED], ids=name)
def test_prose_is_wrapped_at_120_columns(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert [line for line in lines if len(line) > 120] == []


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text))
    assert len(files) > 40
    assert sorted(path for path in files if "<" not in path and not (ROOT / path).exists()) == []


def test_names_that_contributing_gives_are_in_the_file_it_names() -> None:
    """A step such as "`path.py`: add it to `NAME`" is true while the file has the name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d+\. (.*(?:\n {3}.*)*)", text, re.MULTILINE)
    missing = []
    for step in steps:
        files = [ROOT / path for path in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|h|cc|cu|md))`", step)]
        content = "".join(path.read_text(encoding="utf-8") for path in files)
        words = re.findall(r"`([A-Za-z]+_[a-z_A-Z]+|[A-Z]{3,}|[A-Z][a-z]+[A-Z]?\w*)`", step)
        missing += [word for word in words if files and word not in content]
    assert missing == []


def test_the_api_page_is_that_of_the_docstrings() -> None:
    pytest.importorskip("griffe")
    command = [sys.executable, str(ROOT / "docs" / "generate_api.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {chunkkv.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == chunkkv.__version__


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    assert [page for page in pages if f"]({page}" not in index] == []


def test_the_page_about_evaluation_lists_every_policy_and_suite() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert first_column(page, "policy") == list(RULES)
    assert first_column(page, "suite") == list(make_suites(ChunkKVSettings()))


def first_column(page: str, heading: str) -> list[str]:
    """Return the code spans that begin the rows of the table with that heading."""
    rows = page.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `([^`]+)`", rows, re.MULTILINE)
