"""transformers with sdpa attention, and kvpress's ChunkKVPress over SnapKVPress."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import ChunkKVPress, SnapKVPress
from kvpress.presses import snapkv_press
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from benchmarks.cpu.contract import BenchmarkEngine, Case, Runner, folder_of, greedy, is_ready, mark_ready

disable_progress_bar()
logging.getLogger("kvpress").setLevel(logging.ERROR)

WINDOW, CHUNK_SIZE = 16, 20


class TransformersRunner:
    """A model and the cache of one case.

    Parameters
    ----------
    case : Case
        What is measured.
    """

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(case.threads)
        folder = folder_of(case.work, "transformers", "float32")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self._model, self._case, self._cache = model.eval(), case, DynamicCache()
        self._spent = {"press": 0.0, "queries": 0.0}
        self._position, self._tokens = case.length, torch.zeros((len(case.prompts), 1), dtype=torch.int64)

    @torch.no_grad()
    def prefill(self) -> list[int]:
        """Run all prompts as one batch, compressed layer by layer; return the first token of each row."""
        press = self._press(self._model) if self._case.keep < 100 else nullcontext()
        with press:
            prompts = torch.from_numpy(self._case.array())
            output = self._model(prompts, past_key_values=self._cache, logits_to_keep=1)
        return self._taken(output)

    @torch.no_grad()
    def step(self) -> list[int]:
        """Return the next token of each row."""
        places = torch.full_like(self._tokens, self._position)
        self._position += 1
        return self._taken(self._model(self._tokens, past_key_values=self._cache, position_ids=places))

    def compress_s(self) -> float | None:
        """Return the seconds in the press, without the projection of queries, which this runtime has for free."""
        return self._spent["press"] - self._spent["queries"] if self._case.keep < 100 else None

    def _taken(self, output: Any) -> list[int]:
        tokens = greedy(output.logits[:, -1])
        self._tokens = torch.tensor(tokens)[:, None]
        return tokens

    def _press(self, model: Any) -> Any:
        """Return the press at work, which adds its seconds to what is spent."""

        def timed(name: str, call: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter()
                result = call(*args, **kwargs)
                self._spent[name] += time.perf_counter() - started
                return result

            return run

        snapkv_press.get_prerope_query_states = timed("queries", snapkv_press.get_prerope_query_states)
        press = ChunkKVPress(SnapKVPress(1 - self._case.keep / 100, window_size=WINDOW), CHUNK_SIZE)
        press.compress = timed("press", press.compress)
        return press(model)


class Transformers:
    """transformers + kvpress."""

    def version(self) -> str:
        """Return the versions of the packages."""
        return ", ".join(f"{name} {version(name)}" for name in ("transformers", "kvpress", "torch"))

    def prepare(self, work: Path, model: Path, weights: str) -> None:
        """Write the GGUF file as a folder of transformers, which other engines are made from as well."""
        folder = folder_of(work, "transformers", weights)
        if is_ready(folder):
            return
        tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
        mark_ready(folder)

    def load(self, case: Case) -> Runner:
        """Load the model."""
        return TransformersRunner(case)


ENGINE: BenchmarkEngine = Transformers()
