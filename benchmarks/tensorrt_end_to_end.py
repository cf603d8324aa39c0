"""TensorRT end to end: build with the standard TensorRT or TensorRT for RTX, compare tokens with ONNX Runtime, measure.

Three parts. `needle`: engines of the shipped model in float32 and in --dtype. `checkpoint`: the same for the model of
--checkpoint_dir, where that is given. Both answer every prompt of examples/needle/prompts at several keep ratios, and
the answers are compared token by token with those of an ONNX Runtime engine of the same settings: float32 must agree,
fewer bits are counted. `random8b`: a Llama of 8B size with random weights; prefill, time per token and memory by prompt
length and keep ratio.

Prints tables, then the result as one JSON line; --output also writes it to a file. With --dry_run nothing runs: the
engines of needle and checkpoint are built and described. TensorRT for RTX does that on any machine, the standard
TensorRT needs the GPU for it, too.

random8b needs 33 GB of disk (checkpoint and engine) and a GPU that holds 16 GB of weights beside prefill's work space.
Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_checkpoint import LLAMA_8B, write_random_checkpoint  # noqa: E402
from chunkkv import ChunkKVSession, SamplingParams  # noqa: E402
from chunkkv.engine.directory import EngineFiles  # noqa: E402
from chunkkv.engine.tensorrt_contract import Contract  # noqa: E402
from chunkkv.errors import BackendUnavailableError  # noqa: E402
from chunkkv.gpu.cuda_runtime import CudaRuntime  # noqa: E402
from chunkkv.gpu.tensorrt_library import CHOICES, TensorRT, find_tensorrt, missing_gpu  # noqa: E402
from chunkkv_builder import build as build_engine  # noqa: E402

NEEDLE = ROOT / "examples" / "needle"
CHUNKKV = {"chunkkv_layer_reuse": 2, "chunkkv_boundaries": "delimiter", "chunkkv_chunk_size": 20}
KEEP_RATIOS = (1.0, 0.5, 0.2, 0.1)
LENGTHS = (2048, 8192, 32768)
NEW_TOKENS, REPEATS = 64, 5
ANSWER_TOKENS = 24  # of the answers that are compared
CANNOT_RUN = 3


@dataclass(frozen=True)
class Run:
    """What one call of this script does.

    Parameters
    ----------
    tensorrt : TensorRT
        The TensorRT that builds and runs.
    work : Path
        Folder of checkpoints, engines and kernel timings.
    dtype : str
        The 16-bit type to build for beside float32.
    dry_run : bool
        Build only.
    """

    tensorrt: TensorRT
    work: Path
    dtype: str
    dry_run: bool

    def build(self, checkpoint: Path, engine: Path, **flags: Any) -> float:
        """Build an engine with ChunkKV for TensorRT and return the seconds it took."""
        own: dict[str, Any] = {"backend": "tensorrt", "tensorrt": self.tensorrt.flavour}
        if not self.tensorrt.builds_ahead:
            own["timing_cache"] = self.work / "timings"
        return build(checkpoint, engine, **own, **flags)


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
    sampling = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    return {
        f"{name} {ratio}": list(session.generate(text, sampling, keep_ratio=ratio).token_ids)
        for name, text in prompts().items()
        for ratio in KEEP_RATIOS
    }


def compare(run: Run, name: str, checkpoint: Path, **limits: int) -> dict[str, Any]:
    """Build the engines of one checkpoint and compare their answers with the ONNX Runtime engine's.

    Parameters
    ----------
    run : Run
        What to use.
    name : str
        Folder of the engines in the work folder.
    checkpoint : Path
        The model.
    **limits : int
        The builder's flags for lengths.
    """
    folder, flags = run.work / name, {**CHUNKKV, **limits}
    result: dict[str, Any] = {}
    if not run.dry_run:
        build(checkpoint, folder / "onnxruntime", **flags)
        expected = answers(folder / "onnxruntime")
        result["answers"] = len(expected)
    for dtype in ("float32", run.dtype):
        engine = folder / f"tensorrt-{dtype}"
        part = result[dtype] = {"build_s": run.build(checkpoint, engine, dtype=dtype, **flags), **described(engine)}
        if not run.dry_run:
            tokens = answers(engine)
            part["different"] = sorted(prompt for prompt in expected if tokens[prompt] != expected[prompt])
    return result


def described(engine: Path) -> dict[str, Any]:
    """Return what the manifest of an engine says of its TensorRT and its layers."""
    record = EngineFiles.load(engine).tensorrt
    assert record is not None  # every engine of this backend has it
    return {"chunkkv_ops": record.chunkkv_ops, "layers": record.layers}


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


def run_random(run: Run, config: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
    """Measure an engine with random weights by prompt length and keep ratio."""
    folder = run.work / "random8b"
    if not (folder / "random").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(folder / "random", config)
    limits = {"max_batch_size": 1, "max_input_len": lengths[-1], "max_seq_len": lengths[-1] + NEW_TOKENS}
    seconds = run.build(folder / "random", folder / "engine", dtype=run.dtype, **limits)
    cuda = CudaRuntime.load()
    before = cuda.free_memory()[0]
    session = ChunkKVSession.from_dir(folder / "engine")
    loaded = before - cuda.free_memory()[0]
    rows = [measure(session, length, ratio) for length in lengths for ratio in KEEP_RATIOS]
    size = sum(nbytes for _, nbytes in Contract.read(folder / "engine").weights.values())
    return {"build_s": seconds, "weights_bytes": size, "gpu_bytes_after_load": loaded, "rows": rows}


def machine(tensorrt: TensorRT) -> dict[str, str]:
    """Return what the numbers were measured on."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    commands = {"device": query, "commit": ["git", "rev-parse", "HEAD"]}
    values = {"tensorrt": tensorrt.title}
    for name, command in commands.items():
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            values[name] = done.stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            values[name] = f"unknown ({error})"
    return values


def show(result: dict[str, Any]) -> None:
    """Print the parts for people."""
    console = Console(highlight=False, width=120)
    for name in ("needle", "checkpoint"):
        for dtype in ("float32", "float16", "bfloat16"):
            part = result.get(name, {}).get(dtype)
            if part is not None:
                console.print(f"{name} {dtype}: {outcome(part, result[name])}")
    if "random8b" in result:
        columns = ("length", "keep_ratio", "kept_tokens", "prefill_ms", "tpot_ms", "allocated_cache_bytes")
        table = Table(*columns, "peak_cache_bytes", title="random weights, 8B")
        for row in result["random8b"]["rows"]:
            cells = [row[name] for name in (*columns, "peak_cache_bytes")]
            table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells))
        console.print(table)


def outcome(part: dict[str, Any], whole: dict[str, Any]) -> str:
    """Return one sentence about the engines of one type."""
    built = f"built in {part['build_s']:.0f} s, ChunkKV as {part['chunkkv_ops']}"
    if "different" not in part:
        return f"{built}; not run"
    same = whole["answers"] - len(part["different"])
    return f"{built}; {same} of {whole['answers']} answers equal ONNX Runtime's"


def flags_of(arguments: list[str] | None) -> argparse.Namespace:
    """Return the flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("needle", "random8b", "both"), default="needle")
    parser.add_argument("--tensorrt", choices=CHOICES, default=CHOICES[0], help="which TensorRT; default: %(default)s")
    parser.add_argument("--checkpoint_dir", type=Path, help="a real model to compare, too")
    parser.add_argument("--max_input_len", type=int, default=2048, help="its longest prompt; default: %(default)s")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--dry_run", action="store_true", help="build the engines and stop before running them")
    parser.add_argument("--work", type=Path, help="folder to keep checkpoint, engines and timings in")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    flags = parser.parse_args(arguments)
    if flags.dry_run and flags.part != "needle":
        parser.error(f"--dry_run builds without measuring, and --part {flags.part} only measures: leave one out")
    return flags


def run_parts(run: Run, flags: argparse.Namespace) -> dict[str, Any]:
    """Do what the flags ask for."""
    result: dict[str, Any] = {**machine(run.tensorrt), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    result["ran"] = not run.dry_run
    if flags.part != "random8b":
        result["needle"] = compare(run, "needle", NEEDLE / "model")
    if flags.checkpoint_dir is not None:
        longest = flags.max_input_len
        limits = {"max_input_len": longest, "max_seq_len": longest + ANSWER_TOKENS}
        result["checkpoint"] = compare(run, "checkpoint", flags.checkpoint_dir, **limits)
    if flags.part != "needle":
        result["random8b"] = run_random(run, LLAMA_8B, LENGTHS)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Do all parts asked for; return 1 where float32 answers differ, 3 where this machine cannot do them."""
    flags = flags_of(arguments)
    try:
        tensorrt = find_tensorrt(flags.tensorrt)
        lacking = [] if flags.dry_run and tensorrt.builds_ahead else missing_gpu()
    except BackendUnavailableError as error:
        lacking = [str(error)]
    if lacking:
        print(f"this benchmark needs {'; and '.join(lacking)}", file=sys.stderr)
        return CANNOT_RUN
    with tempfile.TemporaryDirectory() as temporary:
        work = flags.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = run_parts(Run(tensorrt, work, flags.dtype, flags.dry_run), flags)
    show(result)
    text = json.dumps(result)
    if flags.output:
        flags.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    compared = (result.get(name, {}).get("float32", {}).get("different") for name in ("needle", "checkpoint"))
    return 1 if any(compared) else 0


if __name__ == "__main__":
    raise SystemExit(main())
