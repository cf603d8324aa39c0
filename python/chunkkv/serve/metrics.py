"""What the page /metrics says, in Prometheus' text format; the names are those of the Triton models."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from chunkkv.results import GenerationResult
from chunkkv.serve.errors import ApiError
from chunkkv.serve.service import Service

OUTCOMES = ("stop", "length", "cancelled", "rejected", "timeout", "invalid", "error")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class ServerMetrics:
    """Counts, times and load of one server.

    Parameters
    ----------
    service : Service
        Is asked for its load whenever the page is read.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, CollectorRegistry()
        registry = self._registry
        self._requests = Counter("chunkkv_requests", "requests by how they ended", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._tokens = {
            name: Counter(f"chunkkv_{name}_tokens", text, registry=registry)
            for name, text in (
                ("prompt", "tokens of the prompts that were answered"),
                ("cached", "prompt tokens that were held already, so that they were not prefilled"),
                ("kept", "prompt tokens that stayed in the KV cache"),
                ("generated", "tokens of the answers"),
            )
        }
        self._load = {
            name: Gauge(f"chunkkv_{name}", text, labels, registry=registry)
            for name, text, labels in (
                ("requests_now", "requests in work and waiting", ["state"]),
                ("slots", "most requests in work at once", []),
                ("kv_cache_bytes", "bytes of KV caches used by answers, allocated and allowed", ["kind"]),
                ("contexts", "contexts that are held", []),
                ("context_bytes", "bytes of contexts that are held", []),
            )
        }
        self._times = {
            name: Histogram(f"chunkkv_{name}_seconds", text, buckets=buckets, registry=registry)
            for name, text, buckets in (
                ("ttft", "time to first token, waiting included", _SECONDS),
                ("tpot", "mean time between tokens of an answer", _STEP_SECONDS),
                ("prefill", "time in which blocks of the prompt ran", _SECONDS),
                ("compress", "time in which the KV cache of the prompt was compressed", _SECONDS),
            )
        }

    def count(self, result: GenerationResult) -> None:
        """Count an answer that ended."""
        statistics = result.statistics
        self._requests.labels(result.finish_reason).inc()
        if result.finish_reason == "cancelled":
            return
        self._tokens["prompt"].inc(statistics.prompt_tokens)
        self._tokens["cached"].inc(statistics.context_tokens)
        self._tokens["kept"].inc(statistics.kept_tokens)
        self._tokens["generated"].inc(statistics.new_tokens)
        self._times["ttft"].observe(statistics.ttft_s)
        self._times["prefill"].observe(statistics.prefill_s)
        self._times["compress"].observe(statistics.compress_s)
        if statistics.tpot_s is not None:
            self._times["tpot"].observe(statistics.tpot_s)

    def count_error(self, error: ApiError) -> None:
        """Count a request that failed."""
        outcome = {"queue_full": "rejected", "closing": "rejected", "cache_full": "rejected", "timeout": "timeout"}
        self._requests.labels(outcome.get(error.code or "", "invalid" if error.status < 500 else "error")).inc()

    def page(self) -> bytes:
        """Return the page."""
        load, store = self._service.batcher.load(), self._service.store
        self._load["requests_now"].labels("active").set(load.active)
        self._load["requests_now"].labels("waiting").set(load.waiting)
        self._load["slots"].set(load.slots)
        for kind, size in (
            ("used", load.kv_bytes_used),
            ("allocated", load.kv_bytes_allocated),
            ("bound", load.kv_bytes_bound),
        ):
            if size is not None:
                self._load["kv_cache_bytes"].labels(kind).set(size)
        self._load["contexts"].set(len(store))
        self._load["context_bytes"].set(store.nbytes)
        return generate_latest(self._registry)
