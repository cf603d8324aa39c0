"""libchunkkv on real torch tensors: the binding, and compaction beside torch's own gather (emulated on a CPU)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from native.build import emulated_library
from support.messages import naming

from chunkkv import reference
from chunkkv.errors import NativeArgumentError
from chunkkv.native import BatchRows, NativeLibrary, contiguous_kv
from chunkkv.native.arrays import as_raw
from chunkkv.settings import ChunkKVSettings

SETTINGS = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=9, keep_per_10k=4_000)
STORAGE = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    return NativeLibrary(os.environ.get("CHUNKKV_LIB") or emulated_library())


@pytest.fixture
def device(library: NativeLibrary) -> str:
    return "cuda" if library.device == "cuda" else "cpu"


class OnlyDLPack:
    """A tensor without its other protocols."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__


@pytest.mark.parametrize("dtype", [*STORAGE, torch.int32, torch.int64, torch.uint8])
def test_torch_and_its_dlpack_describe_the_same_array(device: str, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 8, 6, device=device).to(dtype)[1:, ::2].transpose(0, 1)
    raw = as_raw(tensor)
    assert raw == as_raw(OnlyDLPack(tensor))
    assert raw.pointer == tensor.data_ptr() and raw.shape == (4, 2, 6)
    assert raw.strides == tuple(stride * tensor.element_size() for stride in tensor.stride())


@pytest.mark.parametrize("dtype", STORAGE)
def test_select_and_compact_as_the_reference_and_torch_gather(
    library: NativeLibrary, device: str, dtype: torch.dtype
) -> None:
    length, kept = 50, SETTINGS.kept_tokens(50)
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(1, 15, generator=generator)
    data = torch.randint(0, 100, (2, 1, 3, length, 64), generator=generator).to(dtype)
    key, value = data.to(device)
    indices = torch.full((1, kept), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    rows = BatchRows(torch.tensor([length], dtype=torch.int32, device=device), length)
    library.select(SETTINGS, rows, means.to(device), indices, counts)
    tokens = np.zeros(length, np.float32)
    tokens[2:46] = np.repeat(means[0].numpy(), 3)[:44]
    wanted = reference.select_tokens(tokens, length, kept, SETTINGS)
    np.testing.assert_array_equal(indices[0].cpu().numpy(), wanted)
    outputs = [torch.zeros(1, 3, kept, 64, device=device).to(dtype) for _ in range(2)]
    library.compact(rows, indices, counts, [contiguous_kv(key, value)], [contiguous_kv(*outputs)])
    gathered = [bytes_of(tensor)[:, :, torch.from_numpy(wanted).long()] for tensor in (key, value)]
    for output, wish in zip(outputs, gathered, strict=True):
        assert torch.equal(bytes_of(output), wish)


def bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.cpu().contiguous().view(torch.uint8).reshape(*tensor.shape[:3], -1)


def test_tensors_of_the_wrong_kind_are_refused(library: NativeLibrary, device: str) -> None:
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    rows = BatchRows(torch.tensor([50], dtype=torch.int64, device=device), 50)
    with pytest.raises(NativeArgumentError, match=naming("lengths int64 [1]")):
        library.select(SETTINGS, rows, torch.zeros(1, 15, device=device), torch.zeros(1, 20, device=device), counts)
