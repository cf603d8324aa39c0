"""Which memory a batcher works in, by what its engine can do."""

from __future__ import annotations

from collections.abc import Sequence

from chunkkv.batching.bounds import cache_bytes
from chunkkv.batching.bucket_pool import BucketPool
from chunkkv.batching.elastic_pool import ElasticPool
from chunkkv.batching.job import AnswerJob
from chunkkv.batching.limits import BatchingLimits
from chunkkv.batching.seats import Needs, Pool
from chunkkv.errors import ConfigError, RequestError
from chunkkv.session import ChunkKVSession

MOST_SLOTS = 256  # default of an engine whose rows cost what they hold


def make_pool(session: ChunkKVSession, limits: BatchingLimits) -> tuple[Pool, int]:
    """Return the pool of a batcher's seats, and how many requests are in work at once.

    Raises ConfigError for more slots than the engine has rows, and for memory in which no answer has room.
    """
    slots, bound = _slots(session, limits.slots), cache_bytes(session, limits.kv_bytes)
    executor, longest = session.executor, session.limits.max_seq_len
    pool: Pool
    if executor.capabilities.elastic_rows:
        pool = ElasticPool(executor, slots, longest, bound)
    else:
        pool = BucketPool(executor, slots, longest, bound)
    of_tokens = executor.cache_layout.slots
    if not pool.could_hold(Needs(of_tokens(1), of_tokens(2))):  # one token, and one new one
        raise ConfigError(f"kv_bytes {pool.bound} has no room for the shortest answer: give more, or free memory")
    return pool, slots


def check_room(pool: Pool, most: int, jobs: Sequence[AnswerJob]) -> None:
    """Raise RequestError for answers to one prompt for which `pool` never has room, or which are more than `most`."""
    request, new_tokens = jobs[0].request, jobs[0].sampling.max_new_tokens
    if not pool.could_hold(jobs[0].needs):
        raise RequestError(
            f"a prompt of {request.prompt_tokens} tokens of which {request.kept_tokens} stay, with {new_tokens} new "
            f"ones, does not fit kv_bytes {pool.bound}: ask for fewer new tokens or a smaller budget, or give the "
            "server more memory"
        )
    if len(jobs) > most:
        raise RequestError(f"{len(jobs)} answers to one prompt were asked for; this server takes at most {most}")


def _slots(session: ChunkKVSession, slots: int | None) -> int:
    """Return how many requests are in work at once; only rows with memory of their own are bounded by the engine."""
    most = session.limits.max_batch_size
    if session.executor.capabilities.elastic_rows:
        return MOST_SLOTS if slots is None else slots
    if slots is not None and slots > most:
        raise ConfigError(
            f"slots is {slots}; this engine takes at most {most} rows: give fewer slots, or build with a larger "
            "--max_batch_size"
        )
    return most if slots is None else slots
