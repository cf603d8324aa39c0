"""The example of a paged pool in plain torch, and compress_pool on torch tensors, with emulated kernels on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native.build import BuildError, compiler, emulated_library

from chunkkv.native import NativeLibrary, compress_pool
from examples import paged_pool


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    try:
        compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return NativeLibrary(emulated_library())


@pytest.mark.parametrize("tokens_per_block", [32, 64, 128])
def test_the_example_compresses_between_prefill_and_decode(library: NativeLibrary, tokens_per_block: int) -> None:
    counts = paged_pool.run(library, "cpu", tokens_per_block)
    assert counts["after"] < counts["before"] / 2 and counts["freed"] > 0


def test_a_pool_of_torch_is_left_as_one_of_numpy(library: NativeLibrary) -> None:
    random = np.random.default_rng(4)
    pool = random.normal(size=(24, 4, 2, 2, 32, 64)).astype(np.float32)
    queries = {layer: random.normal(size=(2, 8, paged_pool.SETTINGS.window, 64)).astype(np.float32) for layer in (0, 2)}
    tables, lengths = np.arange(24).reshape(2, 12), np.array([380, 300])
    theirs = torch.from_numpy(pool.copy())
    own = compress_pool(library, paged_pool.SETTINGS, pool, tables, lengths, queries=queries)
    made = compress_pool(
        library,
        paged_pool.SETTINGS,
        theirs,
        torch.from_numpy(tables),
        torch.from_numpy(lengths),
        queries={layer: torch.from_numpy(query) for layer, query in queries.items()},
    )
    assert made == own
    np.testing.assert_array_equal(theirs.numpy(), pool)
