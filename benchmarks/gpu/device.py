"""Where benchmarks run: CUDA through torch; in the dry run the host, through torch or, without it, NumPy."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu.shapes import LLAMA_3_8B, TINY, Shapes

try:
    import torch
except ImportError:
    import ml_dtypes

    torch = None

Call = Callable[[], object]
MEASURED_SECONDS, ROUNDS = 0.05, 5


class Device:
    """Arrays, streams and clocks; `shapes` are those of the run."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.shapes: Shapes = TINY if dry_run else LLAMA_3_8B
        self.torch = torch
        if not dry_run and (torch is None or not torch.cuda.is_available()):
            raise SystemExit("no CUDA device is visible to torch; --dry_run runs everything on the host at tiny sizes")
        self.name = "cpu" if dry_run else "cuda"

    @property
    def stream(self) -> Any:
        """The stream that ops are to run on: torch's current one."""
        return 0 if self.dry_run else torch.cuda.current_stream()

    def random(self, *shape: int, seed: int = 0) -> Any:
        """Return normal noise in the type of the run."""
        if torch is None:
            return np.random.default_rng(seed).normal(size=shape).astype(ml_dtypes.bfloat16)
        generator = torch.Generator(self.name).manual_seed(seed)
        array = torch.empty(shape, dtype=getattr(torch, self.shapes.dtype), device=self.name)
        return array.normal_(generator=generator)

    def empty(self, *shape: int, dtype: str) -> Any:
        """Return memory that holds anything."""
        if torch is None:
            return np.empty(shape, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.name)

    def workspace(self, size: int) -> Any:
        """Return uint8 [size], aligned to 256 bytes."""
        whole = self.empty(size + 256, dtype="uint8")
        address = whole.ctypes.data if torch is None else whole.data_ptr()
        return whole[-address % 256 :][:size]

    def bytes(self, *shape: int, dtype: str, seed: int = 0) -> Any:
        """Return noise as int8, or as fp8 (float8_e4m3fn)."""
        if torch is None:
            content = np.random.default_rng(seed).integers(-64, 64, shape).astype(np.int8)
            return content if dtype == "int8" else content.view(ml_dtypes.float8_e4m3fn)
        content = torch.randint(-64, 64, shape, dtype=torch.int8, device=self.name)
        return content if dtype == "int8" else content.view(torch.float8_e4m3fn)

    def int32(self, values: Any) -> Any:
        """Return int32 values on the device."""
        array = np.ascontiguousarray(values, dtype=np.int32)
        return array if torch is None else torch.from_numpy(array).to(self.name)

    def host(self, array: Any) -> Any:
        """Return a NumPy copy; half types become float32."""
        if torch is None:
            return array.astype(np.float32 if array.dtype == ml_dtypes.bfloat16 else array.dtype)
        return (array.float() if array.is_floating_point() else array).cpu().numpy()

    def microseconds(self, calls: Sequence[Call]) -> float:
        """Return the time of one of `calls`, which do the same work on different memory, without launch costs.

        On CUDA all calls are captured in one graph, which is replayed; the median of several rounds counts.
        """
        if self.dry_run:
            begin = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin) * 1e6 / len(calls)
        graph = self.graph(calls)
        repeats = 1
        rounds: list[float] = []
        while len(rounds) < ROUNDS:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
            if seconds < MEASURED_SECONDS and not rounds and repeats < 1 << 16:
                repeats *= 2
                continue
            rounds.append(seconds / repeats / len(calls))
        return statistics.median(rounds) * 1e6

    def graph(self, calls: Sequence[Call]) -> Any:
        """Return a CUDA graph of the calls, after one run outside of it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        torch.cuda.synchronize()
        return graph

    def eager_microseconds(self, call: Call, repeats: int = 3) -> float:
        """Return the time of a call that cannot be captured, launches and waits included."""
        times = []
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - begin)
        return min(times) * 1e6

    def wait(self) -> None:
        """Wait for the device."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def kernels(self, call: Call) -> dict[str, float]:
        """Return the microseconds of every kernel of a call, by name, as torch's profiler sees them."""
        if self.dry_run:
            return {}
        call()
        self.wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            self.wait()
        times: dict[str, float] = {}
        for event in profile.events():
            name = event.name.partition("<")[0].partition("(")[0].rpartition("::")[2].removeprefix("void ")
            times[name] = round(times.get(name, 0.0) + event.device_time, 2)
        return times

    def copy_gbps(self) -> float:
        """Return the bandwidth of a large copy, read plus written."""
        size = (1 << 20) if self.dry_run else (1 << 30)
        source, target = self.empty(size, dtype="uint8"), self.empty(size, dtype="uint8")
        if torch is None:
            return 2 * size / self.microseconds([lambda: np.copyto(target, source)]) / 1e3
        source.zero_()
        return 2 * size / self.microseconds([lambda: target.copy_(source)]) / 1e3

    def copies(self, bytes_each: int) -> int:
        """Return how many buffers to rotate through so that none is still in the second-level cache."""
        return 2 if self.dry_run else max(1, min(64, -(-(256 << 20) // bytes_each)))


Line = dict[str, Any]


def measure(step: Callable[[Device], Iterator[Line]]) -> None:
    """Run a step as its own process: read --dry_run, print every line of its result when it is there, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry_run", action="store_true")
    device = Device(parser.parse_args().dry_run)
    if os.environ.get("CHUNKKV_LIB") is None:
        raise SystemExit("CHUNKKV_LIB names no library; run benchmarks/gpu_check.py, which builds it")
    for line in step(device):
        print(json.dumps(line), flush=True)
