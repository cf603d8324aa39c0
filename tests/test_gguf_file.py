"""GGUF files are data from strangers: every kind of damage is one line, and none takes time or memory."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.gguf_files import write_gguf
from support.messages import naming

from chunkkv.errors import CheckpointError, ConfigError
from chunkkv_builder.checkpoint.formats import open_checkpoint
from chunkkv_builder.checkpoint.gguf_file import TYPES, GgufFile

HUGE = 2**63 - 1


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(name: str, code: int, data: bytes) -> bytes:
    return string(name) + struct.pack("<I", code) + data


def tensor(name: str, shape: tuple[int, ...] = (4,), code: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    dims = len(shape) if dims is None else dims
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", dims, *shape, code, offset)


def gguf_bytes(
    *parts: bytes, values: int = 0, tensors: int = 0, data: int = 64, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    header = magic + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)
    return header + bytes(-len(header) % 32) + bytes(data)


ALIGNMENT = "general.alignment"
NUMBER = value("n", 4, struct.pack("<I", 7))
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short": (b"GG", "2 bytes"),
    "magic": (gguf_bytes(magic=b"GGML"), "GGUF"),
    "version 1": (gguf_bytes(version=1), "version 1 2 and 3"),
    "big endian": (gguf_bytes(version=3 << 24), "version 3 in big endian"),
    "values": (gguf_bytes(values=HUGE), f"{HUGE} metadata values"),
    "tensors": (gguf_bytes(tensors=HUGE), f"{HUGE} tensors"),
    "values that end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + NUMBER + value("m", 4, b""), "1 values 'm'"),
    "a name's length": (gguf_bytes(struct.pack("<Q", HUGE), values=1), "ends inside its header"),
    "a long name": (gguf_bytes(value("n" * 70000, 4, bytes(4)), values=1), "70000 characters"),
    "a string's length": (gguf_bytes(value("n", 8, struct.pack("<Q", HUGE)), values=1), "ends inside its header"),
    "no text": (gguf_bytes(value("n", 8, string(b"\xff\xfe")), values=1), "'n' UTF-8"),
    "an array's length": (gguf_bytes(value("n", 9, struct.pack("<IQ", 5, HUGE)), values=1), f"{HUGE} values 'n'"),
    "an array of flags": (gguf_bytes(value("n", 9, struct.pack("<IQ", 7, HUGE)), values=1), f"{HUGE} values 'n'"),
    "an array of strings": (gguf_bytes(value("n", 9, struct.pack("<IQ", 8, HUGE)), values=1), f"{HUGE} strings 'n'"),
    "an array of arrays": (gguf_bytes(value("n", 9, struct.pack("<IQ", 9, 1)), values=1), "'n' unknown type 9"),
    "a value's type": (gguf_bytes(value("n", 77, bytes(8)), values=1), "'n' unknown type 77"),
    "a value twice": (gguf_bytes(NUMBER, NUMBER, values=2), "'n' twice"),
    "alignment 0": (gguf_bytes(value(ALIGNMENT, 4, bytes(4)), values=1), "'general.alignment' is 0"),
    "alignment 12": (gguf_bytes(value(ALIGNMENT, 4, struct.pack("<I", 12)), values=1), "'general.alignment' is 12"),
    "alignment text": (gguf_bytes(value(ALIGNMENT, 8, string("32")), values=1), "'general.alignment' is '32'"),
    "a tensor twice": (gguf_bytes(tensor("t"), tensor("t"), tensors=2), "'t' twice"),
    "dimensions": (gguf_bytes(tensor("t", dims=9), tensors=1), "'t' 9 dimensions 1 to 4"),
    "no dimension": (gguf_bytes(tensor("t", (), dims=0), tensors=1), "'t' 0 dimensions"),
    "a huge shape": (gguf_bytes(tensor("t", (HUGE, HUGE)), tensors=1), f"'t' [{HUGE}, {HUGE}]"),
    "an empty shape": (gguf_bytes(tensor("t", (0, 4)), tensors=1), "'t' [4, 0]"),
    "a type": (gguf_bytes(tensor("t", (256,), code=16), tensors=1), "'t' type IQ2_XXS F32 Q6_K"),
    "an unknown type": (gguf_bytes(tensor("t", code=999), tensors=1), "'t' type 999"),
    "half a block": (gguf_bytes(tensor("t", (40,), code=8), tensors=1), "'t' 40 32 Q8_0"),
    "an odd offset": (gguf_bytes(tensor("t", offset=4), tensors=1), "'t' 4 32"),
    "an offset outside": (gguf_bytes(tensor("t", offset=64), tensors=1), "'t' truncated"),
    "a huge offset": (gguf_bytes(tensor("t", offset=2**64 - 32), tensors=1), "'t' truncated"),
    "an overlap": (gguf_bytes(tensor("t", (16,)), tensor("u", (4,), offset=32), tensors=2), "'u' overlaps 't'"),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_damage_is_named_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=naming(words)) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_every_value_is_read_as_written(tmp_path: Path) -> None:
    written: dict[str, Any] = {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**31, "int32": -7, "uint64": 2**63,
        "int64": -(2**40), "float32": 0.5, "float64": 1e-300, "bool": True, "string": "é\n",
        "array": [1, 2, 3], "texts": ["a", "", "ü"], "numbers": [0.5, -1.0], "flags": [True, False],
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, entry in written.items():
        adders = {"array": "array", "texts": "array", "numbers": "array", "flags": "array"}
        getattr(writer, f"add_{adders.get(name, name)}")(name, entry)
    tensors = {f"t{number}": np.random.default_rng(number).random((3, 32), np.float32) for number in range(4)}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "model.gguf")
    assert {name: file.metadata[name] for name in written} == written
    for name, array in tensors.items():
        assert file.entries[name].shape == (3, 32)
        assert not file.data(name).flags.writeable and np.array_equal(file.data(name).view(np.float32), array)


def test_the_types_are_those_of_the_package() -> None:
    for code, kind in TYPES.items():
        known = gguf.GGMLQuantizationType(code)
        assert (known.name, gguf.GGML_QUANT_SIZES[known]) == (kind.name, (kind.block, kind.block_bytes))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", "qwen2", "Q4_0", num_hidden_layers=1)
    whole = (tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, len(whole) - 1, 997), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_checkpoint(cut)


@pytest.mark.parametrize("variant", ["qwen3", "mistral"])
def test_a_changed_header_is_read_or_refused(tmp_path: Path, variant: str) -> None:
    """Whatever byte changes, the result is a model or one line; no other error, no wait."""
    write_gguf(tmp_path / "whole.gguf", variant, num_hidden_layers=1)
    whole = (tmp_path / "whole.gguf").read_bytes()
    header = whole.rindex(b"blk.0.") + 64
    draw = np.random.RandomState(0)
    outcomes = set()
    changed = tmp_path / "changed.gguf"
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randint(8, header)] = draw.choice([0, 1, 7, 8, 9, 127, 128, 255, draw.randint(256)])
        changed.write_bytes(data)
        try:
            open_checkpoint(changed)
            outcomes.add("read")
        except (CheckpointError, ConfigError) as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    for kind in ("F16", "Q4_1"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, "qwen2", kind)
        entry = GgufFile(path).entries["blk.1.ffn_up.weight"]
        data = bytearray(path.read_bytes())
        data[entry.start : entry.start + 2] = b"\x00\x7c"  # infinity in float16: a value, or the scale of a block
        path.write_bytes(data)
        checkpoint, name = open_checkpoint(path), "model.layers.1.mlp.up_proj.weight"
        with pytest.raises(CheckpointError, match=naming("'blk.1.ffn_up.weight'", "not finite", "float32")):
            checkpoint.converted(name, "float32")
        blocks = checkpoint.stored_blocks(name, 4)
        assert (blocks is None) == (kind == "F16")
        if blocks is not None:
            with pytest.raises(CheckpointError, match=naming("'blk.1.ffn_up.weight'", "not finite")):
                blocks.load()


def test_rope_factors_must_fit_the_head(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama3")
    entry = GgufFile(path).entries["rope_freqs.weight"]
    data = bytearray(path.read_bytes())
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        data[entry.start : entry.start + 4] = struct.pack("<f", wrong)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=naming("'rope_freqs.weight'", "8 positive numbers")):
            open_checkpoint(path)
