"""Each backend is known at every place that CONTRIBUTING.md names, and keeps the contract of the builder there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from support import engines, house_rules
from support.builds import CommandLine

from chunkkv.engine.backends import BACKENDS, DEFAULT_BACKEND, DTYPES, TENSORRT_LLM, TRAITS
from chunkkv.executors import machine_report
from chunkkv_builder.backends.registry import load_backend
from chunkkv_builder.flags import parse

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt_llm": "TensorRT-LLM"}
CHECKPOINT = ("--checkpoint_dir", "x", "--chunkkv")


def test_names_stand_in_every_list() -> None:
    assert tuple(TRAITS) == BACKENDS == house_rules.ENGINES
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    columns = re.search(r"## How each engine does it\n\n\| +\|(.*)\|\n", page)
    assert columns is not None and [title.strip() for title in columns[1].split("|")] == [*TITLES.values()]
    assert set(TITLES) == set(BACKENDS)
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    for name in BACKENDS:
        assert len(re.findall(rf">{name}/?<", picture)) >= 2, f"{name} is missing in the builder or the runtime"


@pytest.mark.parametrize("name", BACKENDS)
def test_both_halves_have_their_place(name: str) -> None:
    for module in (f"chunkkv.executors.{name}", f"chunkkv_builder.backends.{name}"):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("name", BACKENDS)
def test_the_flag_chooses_the_backend_of_that_name(name: str) -> None:
    assert load_backend(parse(["--backend", name, *CHECKPOINT])).name == name


def test_auto_is_the_default_backend() -> None:
    assert load_backend(parse([*CHECKPOINT])).name == DEFAULT_BACKEND


@pytest.mark.parametrize("name", BACKENDS)
def test_number_types_are_those_that_models_are_built_in(name: str) -> None:
    assert TRAITS[name].default_dtype in TRAITS[name].dtypes and set(TRAITS[name].dtypes) <= set(DTYPES)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != TENSORRT_LLM])
def test_a_dry_run_plans_and_writes_nothing(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """TensorRT-LLM plans from a checkpoint of its own: test_tensorrt_llm_command.py."""
    flags = {"checkpoint_dir": engines.checkpoint_dir("llama3"), "output_dir": tmp_path / "engine", "dry_run": True}
    flags |= {"backend": name, "chunkkv": True, "max_seq_len": 256, **engines.SMALL_CHUNKKV}
    outcome = CommandLine(capsys)(*engines.command_line(flags))
    assert (outcome.code, list(tmp_path.iterdir())) == (0, []) and outcome.out


@pytest.mark.parametrize("name", BACKENDS)
def test_doctor_says_of_each_what_this_machine_can_do_with_it(name: str) -> None:
    assert any(finding.check == f"backend {name}" for finding in machine_report.describe_machine())
