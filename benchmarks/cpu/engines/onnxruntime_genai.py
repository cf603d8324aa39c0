"""ONNX Runtime GenAI with models of its own builder."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

from benchmarks.cpu.contract import BenchmarkEngine, Case, Runner, folder_of, is_ready, mark_ready, transformers_folder

PRECISIONS = {"float32": "fp32", "int4": "int4"}


class GenaiRunner:
    """A generator for all rows of one case.

    Parameters
    ----------
    case : Case
        What is measured.
    """

    def __init__(self, case: Case) -> None:
        config = genai.Config(str(folder_of(case.work, "onnxruntime_genai", case.weights)))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": case.threads}}}}))
        self._model, self._case = genai.Model(config), case
        self._generator: genai.Generator | None = None

    def prefill(self) -> list[int]:
        """Run all prompts as one batch; return the first token of each row."""
        params, length = genai.GeneratorParams(self._model), self._case.length + self._case.steps + 1
        params.set_search_options(do_sample=False, batch_size=len(self._case.prompts), max_length=length)
        self._generator = genai.Generator(self._model, params)
        self._generator.append_tokens(self._case.array().astype(np.int32))
        return self.step()

    def step(self) -> list[int]:
        """Return the next token of each row."""
        assert self._generator is not None
        if self._generator.is_done():
            raise RuntimeError("all rows have ended before the measurement did")
        self._generator.generate_next_token()
        return [int(token) for token in self._generator.get_next_tokens()]

    def compress_s(self) -> float | None:
        """Return None: nothing is compressed."""
        return None


class OnnxRuntimeGenai:
    """ONNX Runtime GenAI."""

    def version(self) -> str:
        """Return the versions of the packages."""
        return ", ".join(f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime"))

    def prepare(self, work: Path, model: Path, weights: str) -> None:
        """Let its builder make the model from the folder of transformers; the head computes the last token alone."""
        folder = folder_of(work, "onnxruntime_genai", weights)
        if is_ready(folder):
            return
        source, cache = transformers_folder(work), work / "cache"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "SmolLM2", "-i", str(source)]
        command += ["-o", str(folder), "-p", PRECISIONS[weights], "-e", "cpu", "-c", str(cache)]
        command += ["--extra_options", "prune_lm_head=true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        mark_ready(folder)

    def load(self, case: Case) -> Runner:
        """Load the model."""
        return GenaiRunner(case)


ENGINE: BenchmarkEngine = OnnxRuntimeGenai()
