"""How many kernels a leader layer launches, and how many of them a GPU has to wait for."""

from __future__ import annotations

import ctypes

import pytest
from support.op_cases import OpCase

from chunkkv.native import BatchRows, NativeLibrary
from chunkkv.settings import ChunkKVSettings
from native.memory import Memory
from native.native_op import make_cache

WINDOW = {"window": 8, "chunk_size": 10, "sinks": 2, "min_tokens": 20, "keep_per_10k": 3_000, "boundaries": "fixed"}


def counted(library: NativeLibrary, name: str) -> int:
    function = getattr(ctypes.CDLL(str(library.path)), f"chunkkv_emulator_{name}")
    function.restype = ctypes.c_longlong
    return int(function())


@pytest.mark.parametrize(
    ("others", "launches", "waited_for"),
    [({}, 6, 3), ({"score": "logits"}, 4, 3), ({"value_norm": "on"}, 7, 4), ({"head_reduce": "max"}, 6, 3)],
)
@pytest.mark.parametrize("lengths", [(300,), (300, 40, 0, 170)])
def test_a_leader_waits_for_three_launches(
    library: NativeLibrary,
    memory: Memory,
    lengths: tuple[int, ...],
    others: dict[str, str],
    launches: int,
    waited_for: int,
) -> None:
    """One group of layers: its leader scores, then selects, then all layers are compacted; batches cost no more."""
    if library.device != "emulated":
        pytest.skip("the emulator counts launches")
    own = ChunkKVSettings(**WINDOW, **others)
    inputs = OpCase("launches", own, lengths, head_dim=64).inputs("float16")
    rows = BatchRows(memory.put(inputs.lengths), inputs.key.shape[2])
    caches = [make_cache(memory, inputs.key, "contiguous", value=inputs.key) for _ in range(4)]
    query = memory.put(inputs.query)
    scores = memory.empty((len(lengths), library.max_chunks(own, rows.max_length)), "float32")
    kept = memory.empty((len(lengths), rows.max_length), "int32")
    counts = memory.empty((len(lengths),), "int32")
    size = library.score_workspace(own, rows, query, caches[0], chunk_scores=scores)
    workspace = memory.empty((size,), "uint8")
    before = {name: counted(library, name) for name in ("enqueued", "ahead")}
    library.score(own, rows, query, caches[0], chunk_scores=scores, workspace=workspace)
    library.select(own, rows, scores, kept, counts)
    library.compact(rows, kept, counts, caches)
    enqueued, ahead = (counted(library, name) - before[name] for name in before)
    assert (enqueued, enqueued - ahead) == (launches, waited_for)
