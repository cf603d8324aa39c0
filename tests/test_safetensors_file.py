"""The safetensors header parser takes any bytes, and accepts only headers that describe the data exactly."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from support.messages import naming

from chunkkv.errors import CheckpointError
from chunkkv_builder.checkpoint.safetensors_file import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    SafetensorsFile,
    header_length,
    parse_header,
)

SMALL = st.integers(-1, 9) | st.booleans() | st.floats() | st.none()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "X"]) | SMALL,
        "shape": st.lists(SMALL, max_size=3) | SMALL,
        "data_offsets": st.lists(SMALL, max_size=3) | SMALL,
    }
)
HEADERS = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.dictionaries(st.text(max_size=4), ENTRY | SMALL, max_size=3).map(lambda value: json.dumps(value).encode())
)


def parsed(header: bytes, size: int) -> None:
    """Parse, and hold what is accepted to the format's promise: the tensors cover the data exactly."""
    try:
        entries = parse_header(header, size, "file")
    except CheckpointError:
        return
    position = 0
    for tensor in entries.values():
        assert tensor.start == position and all(length >= 0 for length in tensor.shape)
        position = tensor.stop
    assert position == size


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.integers(0, 40))
def test_any_header_is_parsed_or_refused(header, size):
    parsed(header, size)


SAMPLE = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
    }
).encode()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SAMPLE)), st.integers(0, 3), st.binary(max_size=3))
def test_any_small_change_of_a_header_is_parsed_or_refused(place, removed, inserted):
    parsed(SAMPLE[:place] + inserted + SAMPLE[place + removed :], 14)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | HEADERS.map(lambda header: len(header).to_bytes(8, "little") + header))
def test_any_file_is_opened_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    path.write_bytes(data)
    try:
        tensors = SafetensorsFile(path).entries
    except CheckpointError:
        return
    header = int.from_bytes(data[:LENGTH_BYTES], "little")
    assert LENGTH_BYTES + header + max((tensor.stop for tensor in tensors.values()), default=0) == len(data)


def test_the_sample_header_is_valid():
    assert [entry.shape for entry in parse_header(SAMPLE, 14, "file").values()] == [(2, 1), (3,)]


def test_the_header_length_is_bounded_by_file_and_format():
    assert header_length((92).to_bytes(8, "little"), 100, "file") == 92
    with pytest.raises(CheckpointError, match=naming("93 bytes 92")):
        header_length((93).to_bytes(8, "little"), 100, "file")
    assert header_length(MAX_HEADER_BYTES.to_bytes(8, "little"), 2 * MAX_HEADER_BYTES, "file") == MAX_HEADER_BYTES
    with pytest.raises(CheckpointError, match=naming("16777217 16777216 save")):
        header_length((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 2 * MAX_HEADER_BYTES, "file")


def test_a_header_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((84_000_000).to_bytes(8, "little") + b"{")
        file.truncate(84_000_008)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=naming("model.safetensors 84000000 16777216")):
        SafetensorsFile(path)
    assert time.process_time() - start < 1


def test_what_the_safetensors_library_writes_is_read(tmp_path):
    tensors = {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float16), "odd": np.ones(3, np.float16)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors))
    file = SafetensorsFile(path)
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.tensor(name), tensor)
        assert file.tensor(name).shape == tensor.shape


def test_a_tensor_at_an_odd_offset_is_read(tmp_path):
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + np.array([1.5, -2], "<f4").tobytes())
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("b"), [1.5, -2])


@pytest.mark.timeout(10)
def test_a_header_of_very_many_names_is_refused_quickly():
    names = ",".join(f'"t{number}":0' for number in range(100_000))
    with pytest.raises(CheckpointError, match=naming("'t99999' twice")):
        parse_header(f'{{{names},"t99999":0}}'.encode(), 0, "file")
