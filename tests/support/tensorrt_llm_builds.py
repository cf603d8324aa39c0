"""Builds TensorRT-LLM engines with ChunkKV against the doubles, from converted tiny checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support import engines
from support.builds import CommandLine, Outcome
from support.tensorrt_llm_double import Machine, installed
from support.tensorrt_llm_double.checkpoints import convert

LIMITS = {"max_input_len": 200, "max_seq_len": 256, "max_batch_size": 4, "max_num_tokens": 512}


def source_checkpoint(variant: str = "llama3", layers: int = 4) -> Path:
    """Return a tiny Hugging Face model with heads of 64; in float16, so that converting it rounds nothing."""
    return engines.checkpoint_dir(variant, head_dim=64, num_hidden_layers=layers, dtype="float16")


@cache
def llm_checkpoint(variant: str = "llama3", layers: int = 4, **conversion: Any) -> Path:
    """Return source_checkpoint() as a TensorRT-LLM checkpoint; the same arguments give the same directory."""
    source = source_checkpoint(variant, layers)
    return convert(source, Path(tempfile.mkdtemp(dir=engines._FOLDER.name)) / "llm", **conversion)


@contextmanager
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Install the doubles, with a file that passes for the plugin library."""
    library = tmp_path / "plugins" / "libchunkkv_tensorrt.so.10"
    library.parent.mkdir(exist_ok=True)
    library.write_bytes(b"plugins")
    monkeypatch.setenv("CHUNKKV_LIB", str(library.with_name("libchunkkv.so")))
    with installed() as machine:
        yield machine


def llm_model(**conversion: Any) -> Any:
    """Return rank 0 of the tiny model, as TensorRT-LLM loads it; needs installed doubles."""
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig

    folder = str(llm_checkpoint(**conversion))
    config = PretrainedConfig.from_json_file(f"{folder}/config.json")
    return MODEL_MAP[config.architecture].from_checkpoint(folder, config=config)


def build_config(**values: Any) -> Any:
    """Return a BuildConfig with small limits; needs installed doubles."""
    from tensorrt_llm.builder import BuildConfig

    return BuildConfig(**{"max_input_len": 200, "max_seq_len": 256, "max_batch_size": 4, **values})


class LlmBuild:
    """Runs chunkkv-build --backend tensorrt_llm; flags are keywords, None leaves a flag out."""

    def __init__(self, capsys: pytest.CaptureFixture[str], output: Path) -> None:
        self._cli, self.output = CommandLine(capsys), output

    def __call__(self, *words: str, **flags: Any) -> Outcome:
        named = {"backend": "tensorrt_llm", "chunkkv": True, "checkpoint_dir": llm_checkpoint()}
        named |= {"output_dir": self.output, "log_level": "error", **LIMITS, **engines.SMALL_CHUNKKV, **flags}
        given = {name: value for name, value in named.items() if value is not None}
        return self._cli(*engines.command_line(given), *words)
