"""What the server's metrics page says of an engine; Triton serves it to Prometheus."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from chunkkv.batching import Load
from chunkkv.results import GenerationResult
from chunkkv.triton.models.backend import PbMetric, PbMetricFamily, PythonBackend

OUTCOMES = ("stop", "length", "cancelled", "rejected", "timeout", "invalid", "error")
TTFT_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
TPOT_BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0]
REFRESH_S = 0.25


class Metrics:
    """Publishes counts, times and load from a thread of its own, because each change is a message to the server.

    Parameters
    ----------
    backend : Triton's module for python models.
    labels : labels of every metric.
    load : says what the batcher is doing; asked after each change, and every REFRESH_S seconds without one.
    """

    def __init__(self, backend: PythonBackend, labels: dict[str, str], load: Callable[[], Load]) -> None:
        self._backend, self._labels, self._load = backend, labels, load
        self._families: list[PbMetricFamily] = []  # a metric dies with its family
        kind = backend.MetricFamily
        requests = self._family("chunkkv_requests_total", "requests by how they ended", kind.COUNTER)
        self._requests = {outcome: self._metric(requests, outcome=outcome) for outcome in OUTCOMES}
        self._tokens = {
            name: self._metric(self._family(f"chunkkv_{name}_tokens_total", text, kind.COUNTER))
            for name, text in (
                ("prompt", "tokens of the prompts that were answered"),
                ("kept", "prompt tokens that stayed in the KV cache"),
                ("generated", "tokens of the answers"),
            )
        }
        states = self._family("chunkkv_requests", "requests in work and waiting", kind.GAUGE)
        self._states = {name: self._metric(states, state=name) for name in ("active", "waiting")}
        slots = self._family("chunkkv_slots", "most requests in work at once", kind.GAUGE)
        self._states["slots"] = self._metric(slots)
        cache = self._family("chunkkv_kv_cache_bytes", "bytes of KV caches used by answers, and allocated", kind.GAUGE)
        self._bytes = {name: self._metric(cache, kind=name) for name in ("used", "allocated")}
        ttft = self._family("chunkkv_ttft_seconds", "time to first token, waiting included", kind.HISTOGRAM)
        tpot = self._family("chunkkv_tpot_seconds", "mean time between tokens of an answer", kind.HISTOGRAM)
        self._times = {
            "ttft": self._metric(ttft, buckets=TTFT_BUCKETS),
            "tpot": self._metric(tpot, buckets=TPOT_BUCKETS),
            **{
                name: self._metric(self._family(f"chunkkv_{name}_seconds", text, kind.HISTOGRAM), buckets=TTFT_BUCKETS)
                for name, text in (
                    ("prefill", "time in which blocks of the prompt ran"),
                    ("compress", "time in which the KV cache of the prompt was compressed"),
                )
            },
        }
        self._is_closing = False
        self._changes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="chunkkv-metrics", daemon=True)
        self._thread.start()

    def count(self, outcome: str, result: GenerationResult | None = None, tpot_s: float | None = None) -> None:
        """Count a request that ended.

        Parameters
        ----------
        outcome : one of OUTCOMES.
        result : its answer; None where it failed.
        tpot_s : mean time between its tokens as its client saw it, in seconds; None for fewer than two tokens.
        """
        self._changes.put(lambda: self._count(outcome, result, tpot_s))

    def close(self) -> None:
        """Publish what is left and stop; the metrics go, because they must not outlive the connection to the server."""
        self._is_closing = True
        self._changes.put(None)
        self._thread.join(5)
        for metrics in (self._requests, self._tokens, self._states, self._bytes, self._times):
            metrics.clear()
        self._families.clear()

    def _count(self, outcome: str, result: GenerationResult | None, tpot_s: float | None) -> None:
        self._requests[outcome].increment(1)
        if result is None or not result.token_ids:
            return
        statistics = result.statistics
        self._tokens["prompt"].increment(statistics.prompt_tokens)
        self._tokens["kept"].increment(statistics.kept_tokens)
        self._tokens["generated"].increment(statistics.new_tokens)
        self._times["ttft"].observe(statistics.ttft_s)
        self._times["prefill"].observe(statistics.prefill_s)
        self._times["compress"].observe(statistics.compress_s)
        if tpot_s is not None:
            self._times["tpot"].observe(tpot_s)

    def _run(self) -> None:
        while True:
            try:
                change = self._changes.get(timeout=REFRESH_S)
                if change is None:
                    return
                change()
            except queue.Empty:
                pass
            if self._is_closing:
                continue
            load = self._load()
            self._states["active"].set(load.active)
            self._states["waiting"].set(load.waiting)
            self._states["slots"].set(load.slots)
            self._bytes["used"].set(load.kv_bytes_used)
            self._bytes["allocated"].set(load.kv_bytes_allocated)

    def _family(self, name: str, description: str, kind: int) -> PbMetricFamily:
        family = self._backend.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family

    def _metric(self, family: PbMetricFamily, buckets: list[float] | None = None, **labels: str) -> PbMetric:
        all_labels = {**self._labels, **labels}
        if buckets is None:
            return family.Metric(labels=all_labels)
        return family.Metric(labels=all_labels, buckets=buckets)
