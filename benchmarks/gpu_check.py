"""Everything that needs a GPU, in one run of at most nine minutes: build, smoke test, benchmarks, tests, sanitizers.

    python benchmarks/gpu_check.py --output result.json   needs a GPU, nvcc and torch; no network
    python benchmarks/gpu_check.py --dry_run              the same steps on the host: emulated kernels, tiny sizes

Every step is a process with its own share of the time. Every measurement is in the JSON as soon as it exists, so a step
that fails or takes too long costs only what it had not measured yet; what it could not do is there with its reason. The
last line says what was measured beside the aims. The exit status is 0 only if the library was built and every step that
ran succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]

from benchmarks.gpu.build import build_library  # noqa: E402
from chunkkv.files import write_whole  # noqa: E402

LIMIT_SECONDS, MARGIN_SECONDS = 540, 15
OPS = ("boundaries", "score", "select", "compact", "rope", "prepare")
OP_TESTS = [f"tests/native/test_{name}.py" for name in (*OPS, "packed", "device_memory")]
PLUGIN_TESTS = [f"tests/native/test_{name}.py" for name in ("plugins", "packed_plugins")]
NETWORK_TESTS = ["tests/native/test_tensorrt_llm_networks.py"]
NETWORK_MODULES = ("onnx", "safetensors", "tokenizers", "jinja2", "rich")
TEST_MODULES = ("pytest", "hypothesis", "ml_dtypes")
# A sample: the whole is `make test`.
DRY_TESTS = "garbage or page or partial or reference_and or two_contexts or beside_their"
PROBES = ("score", "select", "compact", "packed", "prepare", "choices")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# The most seconds of every step; together less than the limit. What a step leaves over is there for the last ones.
SHARES = {
    **{"build": 60, "smoke": 20, "ops": 130, "peers": 45, "decode": 45},
    **{"op tests": 90, "plugin tests": 30, "network tests": 25, "sanitizer": 20},
}
AIMS = {
    "score_percent_of_copy": "K counted twice, as it is read: at least 75 at 32k and more",
    "all_layers_32k": "keep 0.1, reuse 2: at most 2 times what its bytes take, and 0.1 percent of a prefill",
    "faster_than_kvpress_arithmetic": "as published: at least 20",
    "faster_than_kvpress_vectorised": "without its Python loop: at least 5",
    "faster_than_torch_plain": "the same scores from careful torch: at least 3",
    "decode_16x32k": "keep 0.1 at least 3 times faster than full",
    "percent_above_prediction": "score and select: within 30 either way",
}


class Run:
    """The clock, the library and the result, which is written anew after every step."""

    def __init__(self, dry_run: bool, output: Path) -> None:
        self.begin, self.dry_run, self.output = time.monotonic(), dry_run, output
        self.environment = dict(os.environ, OPENBLAS_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        self.environment["PYTHONPATH"] = os.pathsep.join(
            str(ROOT / part) for part in ("", "python", "builder", "tests")
        )
        self.result: dict[str, Any] = {
            "dry_run": dry_run,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **commit(),
            "host": f"{platform.machine()}, Python {platform.python_version()}",
            "aims": AIMS,
            "steps": {},
        }

    @property
    def left(self) -> float:
        """Seconds until the run must end."""
        return LIMIT_SECONDS - MARGIN_SECONDS - (time.monotonic() - self.begin)

    def keep(self, step: str, outcome: dict[str, Any]) -> None:
        """Write the result with what a step has measured so far."""
        self.result["steps"][step] = outcome
        self.result["seconds"] = round(time.monotonic() - self.begin, 1)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.output, json.dumps(self.result, indent=1) + "\n")

    def record(self, step: str, outcome: dict[str, Any]) -> None:
        """Keep and print the outcome of a step."""
        self.keep(step, outcome)
        words = outcome.get("skipped") or outcome.get("error") or "ok"
        print(f"{step:<24}{outcome.get('seconds', 0):>7.1f} s  {str(words).splitlines()[-1][:120]}", flush=True)

    def child(self, step: str, command: list[str], share: float, more: dict[str, str] | None = None) -> None:
        """Run one step as a process; `share` is the most seconds it may take, `more` is added to its environment.

        Lines of JSON that it prints are kept as they come, whatever becomes of it afterwards.
        """
        limit, begin = min(share, self.left), time.monotonic()
        if limit <= 1:
            return self.record(step, {"error": "no time was left"})
        outcome: dict[str, Any] = {"lines": []}
        other: list[str] = []
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                env=self.environment | (more or {}),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
            timer = threading.Timer(limit, kill_group, [process])
            timer.start()
            try:
                assert process.stdout is not None
                for text in process.stdout:
                    if (line := json_line(text)) is None:
                        other.append(text)
                    else:
                        outcome["lines"].append(line)
                        self.keep(step, outcome)
                status = process.wait()
            except BaseException:
                kill_group(process)
                raise
            finally:
                timer.cancel()
            errors.seek(0)
            said = errors.read()
        seconds = time.monotonic() - begin
        outcome["seconds"] = round(seconds, 1)
        if status and seconds >= limit:
            outcome["error"] = f"took longer than {limit:.0f} s"
        elif status:
            outcome["error"] = ("".join(other)[-2000:] + said[-2000:]).strip() or f"status {status}"
        elif not outcome["lines"]:
            outcome["last_line"] = other[-1].strip() if other else ""
        if reasons := [line["skipped"] for line in outcome["lines"] if "skipped" in line]:
            outcome["skipped"] = reasons[0]
        return self.record(step, outcome)


def json_line(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a line holds, None for any other text."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process with everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def commit() -> dict[str, Any]:
    """Return the commit and whether files differ from it; both unknown outside a checkout."""

    def git(*arguments: str) -> str | None:
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def build(run: Run) -> None:
    """Build the library and let every later step load it."""
    begin = time.monotonic()
    if run.dry_run:
        from native.build import emulated_library

        path, device = emulated_library(), {"device": "emulated on the host"}
    else:
        import torch

        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        path = build_library(capability, ROOT / "build" / "gpu_check")
        device = {
            "device": properties.name,
            "compute_capability": f"{capability[0]}.{capability[1]}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }
    run.environment["CHUNKKV_LIB"] = str(path)
    run.result |= device
    run.record("build", {"seconds": round(time.monotonic() - begin, 1)})


def smoke(run: Run) -> None:
    """Every op once against the reference: whether the numbers that follow are of kernels that are right."""
    if reason := missing_modules():
        return run.record("smoke", {"skipped": f"{reason}; the benchmarks check their results too"})
    command = [sys.executable, "-m", "native.probe", *(PROBES[:3] if run.dry_run else PROBES)]
    return run.child("smoke", command, SHARES["smoke"] * (3 if run.dry_run else 1))


def op_tests(run: Run) -> None:
    """Every op test, on the library that was built."""
    if reason := missing_modules():
        return run.record("op tests", {"skipped": f"{reason}; the benchmarks check their results too"})
    return run.child("op tests", pytest_command(run, OP_TESTS), SHARES["op tests"])


def plugin_tests(run: Run) -> None:
    """The TensorRT plugins over that library, in the plugin host, which hands them the addresses of its memory."""
    host_tests(run, "plugin tests", PLUGIN_TESTS, ("onnx",))


def network_tests(run: Run) -> None:
    """Whole TensorRT-LLM networks: the plugins on that memory, the rest of the network in NumPy."""
    host_tests(run, "network tests", NETWORK_TESTS, NETWORK_MODULES)


def host_tests(run: Run, step: str, files: list[str], modules: tuple[str, ...]) -> None:
    """Run tests that build the plugin host and import the builder."""
    compiler = () if shutil.which(os.environ.get("CXX", "g++")) else ("a C++ compiler",)
    if reason := missing_modules(*modules, also=compiler):
        return run.record(step, {"skipped": reason})
    return run.child(step, pytest_command(run, files), SHARES[step])


def pytest_command(run: Run, files: list[str]) -> list[str]:
    """Return the command for these test files; a dry run takes a sample."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *files]
    return [*command, "-k", DRY_TESTS] if run.dry_run else command


def missing_modules(*more: str, also: tuple[str, ...] = ()) -> str | None:
    """Return what the tests and the probe lack here, None where they can run."""
    missing = [name for name in (*TEST_MODULES, *more) if importlib.util.find_spec(name) is None]
    return f"{', '.join((*missing, *also))} not installed" if missing or also else None


def sanitizers(run: Run) -> None:
    """compute-sanitizer over the probe, which is small enough for it."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for name in SANITIZERS:
        step = f"compute-sanitizer {name}"
        if run.dry_run or not Path(tool).is_file():
            reason = "a dry run has no device code" if run.dry_run else "compute-sanitizer was not found"
            run.record(step, {"skipped": reason})
            continue
        if missing := missing_modules():
            run.record(step, {"skipped": missing})
            continue
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "native.probe", *PROBES]
        # Every buffer an allocation of its own: in torch's pool the tool would take a whole segment for one.
        run.child(step, command, SHARES["sanitizer"], more={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def summarize(run: Run) -> dict[str, Any]:
    """Return what was measured of the aims, and write it beside them."""
    lines = {name: run.result["steps"].get(name, {}).get("lines", []) for name in ("ops", "peers", "decode")}
    prefill = {line["length"]: line["microseconds"] for line in lines["peers"] if line.get("op") == "prefill"}
    plain = [line for line in lines["ops"] if "variant" not in line]
    summary: dict[str, Any] = {
        "score_percent_of_copy": [
            line["percent_of_copy"] for line in plain if line["op"] == "score" and line["length"] >= 32768
        ],
        "percent_above_prediction": [
            line["percent_above_prediction"] for line in lines["ops"] if "percent_above_prediction" in line
        ],
    }
    for line in plain:
        if line["op"] == "all layers":
            whole = prefill.get(line["length"])
            line["percent_of_prefill"] = None if whole is None else round(100 * line["microseconds"] / whole, 3)
            if (line["length"], line["keep_per_10k"], line["reuse"]) == (32768, 1000, 2):
                summary["all_layers_32k"] = {key: line[key] for key in ("times_byte_floor", "percent_of_prefill")}
    for name in (name for name in AIMS if name.startswith("faster_than")):
        summary[name] = [line[name] for line in lines["peers"] if name in line]
    for line in lines["decode"]:
        if (line.get("batch"), line.get("length"), line.get("keep_per_10k")) == (16, 32768, 1000):
            summary["decode_16x32k"] = line["faster_than_full"]
    run.result["measured"] = None if run.dry_run else summary  # times of an emulator say nothing
    return summary


def main() -> int:
    """Run all steps; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run", action="store_true", help="run on the host with emulated kernels and tiny sizes")
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default docs/benchmarks/gpu.json")
    args = parser.parse_args()
    default = ROOT / "build" / "gpu-check-dry-run.json" if args.dry_run else ROOT / "docs" / "benchmarks" / "gpu.json"
    run = Run(args.dry_run, args.output or default)
    build(run)
    smoke(run)
    flags = ["--dry_run"] if args.dry_run else []
    for step in ("ops", "peers", "decode"):
        run.child(step, [sys.executable, "-m", f"benchmarks.gpu.{step}", *flags], SHARES[step])
    op_tests(run)
    plugin_tests(run)
    network_tests(run)
    sanitizers(run)
    summary = summarize(run)
    run.record("summary", {})
    print(json.dumps({"output": str(run.output), "measured": None if run.dry_run else summary}))
    return 1 if any("error" in outcome for outcome in run.result["steps"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
