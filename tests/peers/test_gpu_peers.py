"""The torch side of the GPU benchmarks computes what kvpress computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import peers

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("length", [200, 203])
def test_the_restated_arithmetic_keeps_what_kvpress_keeps(length: int) -> None:
    rng = torch.Generator().manual_seed(length)
    query = torch.randn(1, 8, 16, 32, generator=rng) * 2
    key = torch.randn(1, 2, length, 32, generator=rng)
    positions = torch.arange(length, dtype=torch.float32)[:, None].expand_as(key).contiguous()
    scores = peers.scores_as_kvpress(torch, query, key)
    call = peers.kvpress_itself(torch, query, key, positions, 10, 0.3)
    assert call is not None
    theirs = np.sort(call()[1][0, 0, :, 0].numpy().astype(np.int64))
    for kept in (peers.kept_as_kvpress, peers.kept_vectorised):
        assert kept(torch, scores, 10, 0.3).tolist() == theirs.tolist()
