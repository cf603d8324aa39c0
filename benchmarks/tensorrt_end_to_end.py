"""TensorRT end to end, for a machine that has it: build, compare tokens with ONNX Runtime, measure.

Two parts. `needle`: engines of the shipped model in float32 and in --dtype; every prompt of examples/needle/prompts at
several keep ratios, answers compared token by token with the ONNX Runtime engine (float32 must agree; fewer bits are
counted). `random8b`: a Llama of 8B size with random weights; prefill, time per token and memory by length and keep
ratio. Prints tables, then the result as one JSON line; --output also writes it to a file.

Needs TensorRT 10.15 or later, an NVIDIA GPU and the ChunkKV plugins; random8b also 33 GB of disk (checkpoint and
engine) and a GPU that holds 16 GB of weights beside prefill's work space. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_checkpoint import LLAMA_8B, write_random_checkpoint  # noqa: E402
from chunkkv import ChunkKVSession, SamplingParams  # noqa: E402
from chunkkv.gpu.cuda_runtime import CudaRuntime  # noqa: E402
from chunkkv.gpu.tensorrt_library import import_tensorrt, missing, missing_gpu  # noqa: E402
from chunkkv_builder import build as build_engine  # noqa: E402

if TYPE_CHECKING:
    from chunkkv.executors.tensorrt.executor import TensorRTExecutor

NEEDLE = ROOT / "examples" / "needle"
KEEP_RATIOS = (1.0, 0.5, 0.2, 0.1)
LENGTHS = (2048, 8192, 32768)
NEW_TOKENS, REPEATS = 64, 5
CANNOT_RUN = 3


def build(checkpoint: Path, engine: Path, **flags: Any) -> float:
    """Build an engine with ChunkKV and return the seconds it took."""
    started = time.perf_counter()
    named = {"checkpoint_dir": checkpoint, "output_dir": engine, "log_level": "warning", **flags}
    build_engine.main([*(part for name, value in named.items() for part in (f"--{name}", str(value))), "--chunkkv"])
    return time.perf_counter() - started


def prompts() -> dict[str, str]:
    """Return the shipped prompts by name."""
    return {path.stem: json.loads(path.read_text())["text"] for path in sorted((NEEDLE / "prompts").glob("*.json"))}


def answers(engine: Path) -> dict[str, list[int]]:
    """Return the tokens that an engine answers every prompt with, by prompt and keep ratio."""
    session = ChunkKVSession.from_dir(engine)
    sampling = SamplingParams(max_new_tokens=24)
    return {
        f"{name} {ratio}": list(session.generate(text, sampling, keep_ratio=ratio).token_ids)
        for name, text in prompts().items()
        for ratio in KEEP_RATIOS
    }


def run_needle(work: Path, dtypes: list[str], cache: Path) -> dict[str, Any]:
    """Compare the answers of TensorRT engines with those of the ONNX Runtime engine; float32 must give the same."""
    choice = {"chunkkv_layer_reuse": 2, "chunkkv_boundaries": "delimiter", "chunkkv_chunk_size": 20}
    build(NEEDLE / "model", work / "onnxruntime", **choice)
    expected = answers(work / "onnxruntime")
    result: dict[str, Any] = {"answers": len(expected)}
    for dtype in dtypes:
        engine = work / f"tensorrt-{dtype}"
        seconds = build(NEEDLE / "model", engine, backend="tensorrt", dtype=dtype, timing_cache=cache, **choice)
        got = answers(engine)
        different = sorted(name for name in expected if got[name] != expected[name])
        result[dtype] = {"build_s": seconds, "different": different}
    return result


def measure(session: ChunkKVSession, length: int, ratio: float) -> dict[str, Any]:
    """Return medians over REPEATS runs of one prompt; one run before them warms up."""
    ids = np.random.default_rng(length).integers(3, session.limits.vocab_size, length)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    runs = [session.generate(ids, sampling, keep_ratio=ratio).statistics for _ in range(REPEATS + 1)][1:]
    median = {
        f"{name}_ms": statistics.median(getattr(run, f"{name}_s") for run in runs) * 1e3
        for name in ("prefill", "ttft", "tpot")
    }
    fixed = ("kept_tokens", "cache_bytes", "allocated_cache_bytes", "peak_cache_bytes")
    return {"length": length, "keep_ratio": ratio, **median, **{name: getattr(runs[0], name) for name in fixed}}


def run_random(work: Path, dtype: str, cache: Path, config: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
    """Measure an engine with random weights by prompt length and keep ratio."""
    if not (work / "random").is_dir():
        write_random_checkpoint(work / "random", config)
    limits = {"max_batch_size": 1, "max_input_len": lengths[-1], "max_seq_len": lengths[-1] + NEW_TOKENS}
    flags = {**limits, "backend": "tensorrt", "dtype": dtype, "timing_cache": cache}
    seconds = build(work / "random", work / "engine", **flags)
    cuda = CudaRuntime.load()
    before = cuda.free_memory()[0]
    session = ChunkKVSession.from_dir(work / "engine")
    loaded = before - cuda.free_memory()[0]
    rows = [measure(session, length, ratio) for length in lengths for ratio in KEEP_RATIOS]
    size = sum(nbytes for _, nbytes in cast("TensorRTExecutor", session.executor).contract.weights.values())
    return {"build_s": seconds, "weights_bytes": size, "gpu_bytes_after_load": loaded, "rows": rows}


def machine() -> dict[str, str]:
    """Return what the numbers were measured on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return {"device": f"unknown ({error})", "tensorrt": import_tensorrt().__version__}
    return {"device": device, "commit": commit.stdout.strip(), "tensorrt": import_tensorrt().__version__}


def show(result: dict[str, Any]) -> None:
    """Print both parts for people."""
    console = Console(highlight=False, width=120)
    for dtype, part in result.get("needle", {}).items():
        if dtype != "answers":
            same = result["needle"]["answers"] - len(part["different"])
            console.print(f"needle {dtype}: {same} of {result['needle']['answers']} answers equal ONNX Runtime's")
    if "random8b" in result:
        columns = ("length", "keep_ratio", "kept_tokens", "prefill_ms", "tpot_ms", "allocated_cache_bytes")
        table = Table(*columns, "peak_cache_bytes", title="random weights, 8B")
        for row in result["random8b"]["rows"]:
            cells = [row[name] for name in (*columns, "peak_cache_bytes")]
            table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run both parts or one; return 1 where float32 answers differ, 3 where this machine cannot run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("needle", "random8b", "both"), default="both")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--work", type=Path, help="folder to keep checkpoint, engines and timings in")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    flags = parser.parse_args(arguments)
    if lacking := list(dict.fromkeys([*missing(), *missing_gpu()])):
        print(f"this benchmark needs {'; and '.join(lacking)}", file=sys.stderr)
        return CANNOT_RUN
    with tempfile.TemporaryDirectory() as temporary:
        work = flags.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        cache = work / "timings"
        result: dict[str, Any] = {**machine(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        if flags.part != "random8b":
            result["needle"] = run_needle(work / "needle", ["float32", flags.dtype], cache)
        if flags.part != "needle":
            result["random8b"] = run_random(work / "random8b", flags.dtype, cache, LLAMA_8B, LENGTHS)
    show(result)
    text = json.dumps(result)
    if flags.output:
        flags.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if result.get("needle", {}).get("float32", {}).get("different") else 0


if __name__ == "__main__":
    raise SystemExit(main())
