"""ChunkKV-TRT itself, as a user runs it: ChunkKVSession.generate with a stream of events."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.cpu.contract import BenchmarkEngine, Case, Runner, folder_of
from benchmarks.cpu.machine import commit
from benchmarks.cpu.variants import HALF_CACHE, INT4_ALL, INT4_CACHE, W8A8_ALL
from chunkkv import ChunkKVSession, SamplingParams, __version__
from chunkkv.results import GenerationResult, StreamEvent
from chunkkv_builder.build import main as build

FLAGS = "--chunkkv --max_seq_len 8192 --max_batch_size 8 --log_level error --overwrite"
_INT4 = "--use_weight_only --weight_only_precision int4 --kv_cache_dtype int8"
# Flags by what they are called in tables.
STORED = {
    "float32": "",
    HALF_CACHE: "--kv_cache_dtype float16",
    "int8": "--use_weight_only --weight_only_precision int8",
    INT4_CACHE: _INT4,
    INT4_ALL: f"{_INT4} --prefill_precision w8a8",
    W8A8_ALL: "--use_weight_only --weight_only_precision w8a8 --kv_cache_dtype int8",
}


class ProductRunner:
    """A session and the answers of one call.

    Parameters
    ----------
    case : Case
        What is measured.
    """

    def __init__(self, case: Case) -> None:
        folder = folder_of(case.work, "product", case.weights)
        self._session, self._case = ChunkKVSession.from_dir(folder, threads=case.threads), case
        self._events: Iterator[StreamEvent] = iter(())
        self._finished: list[GenerationResult] = []

    def prefill(self) -> list[int]:
        """Run all prompts and compress them; return the first token of each row."""
        case, sampling = (
            self._case,
            SamplingParams(temperature=0.0, max_new_tokens=self._case.steps + 1, ignore_eos=True),
        )
        prompts = [list(prompt) for prompt in case.prompts]
        self._events = self._session.generate(prompts, sampling, keep_ratio=case.keep / 100, stream=True)
        return self.step()

    def step(self) -> list[int]:
        """Return the next token of each row."""
        events = [next(self._events) for _ in self._case.prompts]
        self._finished += [event.finished for event in events if event.finished is not None]
        return [event.token_ids[0] for event in sorted(events, key=lambda event: event.row)]

    def compress_s(self) -> float | None:
        """Return the seconds of compression, all rows together; None where nothing is compressed."""
        return sum(result.statistics.compress_s for result in self._finished) if self._case.keep < 100 else None


class Product:
    """ChunkKV-TRT on ONNX Runtime."""

    def version(self) -> str:
        """Return version and commit."""
        return f"{__version__} ({commit()})"

    def prepare(self, work: Path, model: Path, weights: str) -> None:
        """Build the engine, again after every commit that changes the product."""
        folder, built_by = folder_of(work, "product", weights), work / f"product-{weights}.version"
        is_known = built_by.is_file() and built_by.read_text("utf-8") == self.version()
        if is_known and "dirty" not in self.version():
            return
        flags = [*FLAGS.split(), *STORED[weights].split()]
        build(["--checkpoint_dir", str(model), "--output_dir", str(folder), *flags])
        built_by.write_text(self.version(), "utf-8")

    def load(self, case: Case) -> Runner:
        """Load the engine."""
        return ProductRunner(case)


ENGINE: BenchmarkEngine = Product()
