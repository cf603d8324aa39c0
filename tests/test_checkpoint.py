"""Checkpoints: what is read equals what was written, and every kind of damage is named."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import (
    NUMPY_DTYPES,
    VARIANTS,
    as_read,
    random_tensors,
    variant_config,
    write_checkpoint,
    write_tensors,
)
from support.messages import naming

from chunkkv.errors import CheckpointError, ConfigError
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint
from chunkkv_builder.checkpoint.safetensors_file import LENGTH_BYTES
from chunkkv_builder.checkpoint.tokenizer_files import tokenizer_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_read_as_written(tmp_path, variant, dtype):
    shards = 3 if dtype == "bfloat16" else 1
    checkpoint = HuggingFaceCheckpoint.open(write_checkpoint(tmp_path, variant, dtype=dtype, shards=shards))
    expected = as_read(variant_config(variant), random_tensors(variant_config(variant), dtype=dtype))
    assert sorted(checkpoint.names()) == sorted(expected)
    assert checkpoint.config.dtype == dtype
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == checkpoint.tensor(name).shape == tensor.shape
        assert checkpoint.dtype(name) == checkpoint.tensor(name).dtype.name == dtype
        assert np.array_equal(checkpoint.converted(name, "float32"), tensor.astype(np.float32))


def test_tensors_are_read_only_views_of_one_map_per_file(tmp_path, monkeypatch):
    mapped: list[str] = []
    real_map = np.memmap

    def counting_map(path, *arguments, **options):
        mapped.append(Path(path).name)
        return real_map(path, *arguments, **options)

    monkeypatch.setattr("chunkkv_builder.checkpoint.safetensors_file.np.memmap", counting_map)
    checkpoint = HuggingFaceCheckpoint.open(write_checkpoint(tmp_path, "qwen3", shards=2))
    tensors = [checkpoint.tensor(name) for name in checkpoint.names() for _ in range(2)]
    assert sorted(mapped) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert np.shares_memory(tensors[0], tensors[1])
    for tensor in tensors:
        assert isinstance(tensor, real_map) and not tensor.flags.owndata and not tensor.flags.writeable
    checkpoint_free_tensor = tensors[0]
    expected = checkpoint_free_tensor.copy()
    del checkpoint, tensors, tensor
    gc.collect()
    np.testing.assert_array_equal(checkpoint_free_tensor, expected)


def test_reading_needs_neither_torch_nor_safetensors(tmp_path):
    write_checkpoint(tmp_path, "llama3", dtype="bfloat16")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors']))\n"
        "from chunkkv_builder.checkpoint.formats import open_checkpoint; from chunkkv.text.tokenizer import Tokenizer\n"
        "c = open_checkpoint(sys.argv[1]); t = Tokenizer.from_dir(sys.argv[1])\n"
        "print(sum(float(c.converted(n, 'float32').sum()) for n in c.names()) != 0, t.decode(t.encode('the key')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "True the key"


def test_harmless_extras_are_left_aside(tmp_path):
    config = variant_config("llama_tied")
    write_checkpoint(tmp_path, "llama_tied")
    tensors = random_tensors(config)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    for shards in (1, 2):
        (tmp_path / SINGLE).unlink(missing_ok=True)
        write_tensors(tmp_path, {**tensors, **extra}, shards)
        assert sorted(HuggingFaceCheckpoint.open(tmp_path).names()) == sorted(tensors)


def test_the_tokenizer_is_found_where_its_main_file_is(tmp_path):
    folder = write_checkpoint(tmp_path / "with", "mistral")
    assert HuggingFaceCheckpoint.open(folder).tokenizer_dir == folder
    names = {file.name for file in tokenizer_files(folder)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    bare = HuggingFaceCheckpoint.open(write_checkpoint(tmp_path / "without", "mistral", with_tokenizer=False))
    assert bare.tokenizer_dir is None and tokenizer_files(bare.tokenizer_dir) == []


def test_the_stored_dtype_counts_and_dtypes_may_differ(tmp_path):
    write_checkpoint(tmp_path, "llama2")
    tensors = random_tensors(variant_config("llama2"), dtype="float16")
    tensors[NORM] = tensors[NORM].astype(np.float32)
    write_tensors(tmp_path, tensors)
    checkpoint = HuggingFaceCheckpoint.open(tmp_path)
    assert checkpoint.config.dtype == "float16"
    assert (checkpoint.dtype(NORM), checkpoint.dtype(Q_PROJ)) == ("float32", "float16")


def test_an_unknown_name_is_refused(tmp_path):
    checkpoint = HuggingFaceCheckpoint.open(write_checkpoint(tmp_path, "llama2"))
    with pytest.raises(CheckpointError, match=naming("tensor 'lm_head.bias'")):
        checkpoint.tensor("lm_head.bias")


# --- Damage -------------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def change_tensors(**changes: Any) -> Damage:
    """Rewrite the single weights file; a change to None removes a tensor (dots are written as double underscores)."""

    def damage(path: Path) -> None:
        tensors = random_tensors(json.loads((path / "config.json").read_text()))
        named = {name.replace("__", "."): value for name, value in changes.items()}
        tensors = {name: value for name, value in {**tensors, **named}.items() if value is not None}
        write_tensors(path, tensors)

    return damage


def change_header(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(path: Path) -> None:
        data = (path / SINGLE).read_bytes()
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
        change(header)
        text = json.dumps(header).encode()
        (path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[LENGTH_BYTES + length :])

    return damage


def change_index(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(path: Path) -> None:
        (path / SINGLE).unlink()
        write_tensors(path, random_tensors(json.loads((path / "config.json").read_text())), shards=3)
        index = json.loads((path / INDEX).read_text())
        change(index)
        (path / INDEX).write_text(json.dumps(index))

    return damage


def after_sharding(change: Damage) -> Damage:
    def damage(path: Path) -> None:
        change_index(lambda index: None)(path)
        change(path)

    return damage


def write(name: str, data: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(data) and None


def cut(name: str, size: int) -> Damage:
    """Keep the first `size` bytes; a negative size drops that many from the end."""
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size]) and None


def only_pickle(path: Path) -> None:
    (path / SINGLE).rename(path / "pytorch_model.bin")


def repeat_tensor_in_shard(path: Path) -> None:
    """Give one shard a tensor that the index places in another."""
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    tensors = random_tensors(variant_config("llama2"))
    names = [name for name, file in weight_map.items() if file == SHARD]
    names.append(next(name for name, file in weight_map.items() if file != SHARD))
    write_tensors(path, {name: tensors[name] for name in names})
    (path / SINGLE).replace(path / SHARD)


def weights_a_directory(path: Path) -> None:
    (path / SINGLE).unlink()
    (path / SINGLE).mkdir()


def entry(**changes: Any) -> Damage:
    return change_header(lambda header: header[Q_PROJ].update(changes))


def point_elsewhere(name: Any) -> Damage:
    return change_index(lambda index: index["weight_map"].update({Q_PROJ: name}))


DAMAGE: dict[str, tuple[Damage, list[str]]] = {
    "missing tensor": (change_tensors(**{Q_PROJ.replace(".", "__"): None}), [SINGLE, Q_PROJ, "missing", "3 layers"]),
    "missing bias": (
        lambda path: (
            (path / "config.json").write_text(json.dumps(variant_config("llama2", attention_bias=True))) and None
        ),
        [SINGLE, "model.layers.0.self_attn.q_proj.bias", "more are missing"],
    ),
    "extra tensor": (change_tensors(model__extra=np.ones(4, np.float32)), [SINGLE, "model.extra", "extra"]),
    "extra layer": (
        lambda path: (
            (path / "config.json").write_text(json.dumps(variant_config("llama2", num_hidden_layers=2))) and None
        ),
        [SINGLE, "model.layers.2.", "extra", "config.json"],
    ),
    "misshaped": (
        change_tensors(model__norm__weight=np.ones(63, np.float32)),
        [SINGLE, NORM, "[63]", "[64]", "config.json"],
    ),
    "transposed": (
        change_tensors(lm_head__weight=np.ones((64, 384), np.float32)),
        [SINGLE, "lm_head.weight", "[64, 384]", "[384, 64]"],
    ),
    "float64": (change_tensors(model__norm__weight=np.ones(64)), [SINGLE, NORM, "F64", "F32", "BF16"]),
    "int8": (change_tensors(lm_head__weight=np.ones((384, 64), np.int8)), [SINGLE, "lm_head.weight", "I8", "F16"]),
    "empty file": (write(SINGLE, b""), [SINGLE, "0 bytes"]),
    "seven bytes": (write(SINGLE, b"\x01" * 7), [SINGLE, "7 bytes"]),
    "not safetensors": (write(SINGLE, b"PK\x03\x04" + b"\xff" * 100), [SINGLE, "header", "96"]),
    "header beyond the limit": (write(SINGLE, (200_000_000).to_bytes(8, "little") + b"{}"), [SINGLE, "200000000"]),
    "cut in the header": (cut(SINGLE, 100), [SINGLE, "truncated"]),
    "cut in the data": (cut(SINGLE, -1), [SINGLE, "truncated", "tensor"]),
    "trailing bytes": (
        lambda path: (path / SINGLE).write_bytes((path / SINGLE).read_bytes() + b"\0") and None,
        [SINGLE, "bytes follow the header"],
    ),
    "header no JSON": (write(SINGLE, (4).to_bytes(8, "little") + b"{'a'"), [SINGLE, "no valid JSON"]),
    "header not UTF-8": (write(SINGLE, (4).to_bytes(8, "little") + b'{"\xff"'), [SINGLE, "no valid JSON"]),
    "header a list": (write(SINGLE, (2).to_bytes(8, "little") + b"[]"), [SINGLE, "not a JSON object"]),
    "header with leading space": (write(SINGLE, (3).to_bytes(8, "little") + b" {}"), [SINGLE, "not a JSON object"]),
    "header nested too deep": (
        write(SINGLE, (200_000).to_bytes(8, "little") + b'{"a":' * 40_000),
        [SINGLE, "no valid JSON"],
    ),
    "header with a name twice": (write(SINGLE, (15).to_bytes(8, "little") + b'{"a":{},"a":{}}'), [SINGLE, "'a' twice"]),
    "metadata not text": (change_header(lambda header: header.update(__metadata__={"a": 1})), ["__metadata__"]),
    "entry without dtype": (change_header(lambda header: header[Q_PROJ].pop("dtype")), [SINGLE, Q_PROJ, "exactly"]),
    "entry no object": (change_header(lambda header: header.update({Q_PROJ: 3})), [SINGLE, Q_PROJ, "exactly"]),
    "entry with more": (entry(strides=[1]), [SINGLE, Q_PROJ, "exactly"]),
    "unknown dtype": (entry(dtype="Q4"), [SINGLE, Q_PROJ, "unknown dtype 'Q4'", "BF16"]),
    "dtype no text": (entry(dtype=["F32"]), [SINGLE, Q_PROJ, "unknown dtype"]),
    "dtype and span disagree": (entry(dtype="F16"), [SINGLE, Q_PROJ, "8192", "16384"]),
    "negative dimension": (entry(shape=[-64, -64]), [SINGLE, Q_PROJ, "[-64, -64]"]),
    "fractional dimension": (entry(shape=[64.0, 64]), [SINGLE, Q_PROJ, "[64.0, 64]"]),
    "boolean dimension": (entry(shape=[True, 4096]), [SINGLE, Q_PROJ, "[True, 4096]"]),
    "overflowing shape": (entry(shape=[2**62, 2**62, 64]), [SINGLE, Q_PROJ, "span 16384"]),
    "too many dimensions": (entry(shape=[64, 64] + [1] * 70), [SINGLE, Q_PROJ, "at most 8"]),
    "huge dimension": (entry(shape=[10**40]), [SINGLE, Q_PROJ, "whole numbers"]),
    "offsets reversed": (entry(data_offsets=[16384, 0]), [SINGLE, Q_PROJ, "[16384, 0]"]),
    "three offsets": (entry(data_offsets=[0, 1, 2]), [SINGLE, Q_PROJ, "data_offsets"]),
    "offset beyond the file": (entry(data_offsets=[2**40, 2**40 + 16384]), [SINGLE, "starts at byte"]),
    "overlap": (
        change_header(lambda header: header[Q_PROJ].update(data_offsets=header["lm_head.weight"]["data_offsets"])),
        [SINGLE, Q_PROJ, "span"],
    ),
    "same place twice": (
        change_header(lambda header: header.update({"copy": header[Q_PROJ]})),
        [SINGLE, "starts at byte", "expected"],
    ),
    "gap": (change_header(lambda header: header.pop(Q_PROJ)), [SINGLE, "starts at byte", "expected"]),
    "weights a directory": (
        weights_a_directory,
        ["neither", SINGLE, INDEX],
    ),
    "no weights": (lambda path: (path / SINGLE).unlink(), ["neither", SINGLE, INDEX]),
    "only a pickle": (only_pickle, ["pytorch_model.bin", "pickle", "safetensors"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["no config.json", "Hugging Face"]),
    "config no JSON": (write("config.json", b'{"a": '), ["config.json", "no valid JSON"]),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), ["config.json", "UTF-8", "byte 7"]),
    "config a list": (write("config.json", b"[1]"), ["config.json", "list", "object"]),
    "config nested too deep": (write("config.json", b"[" * 100_000), ["config.json", "no valid JSON"]),
    "generation config no JSON": (write("generation_config.json", b"{"), ["generation_config.json", "JSON"]),
    "index no JSON": (after_sharding(write(INDEX, b"{]")), [INDEX, "no valid JSON"]),
    "index without map": (change_index(lambda index: index.pop("weight_map")), [INDEX, "weight_map"]),
    "index with empty map": (change_index(lambda index: index.update(weight_map={})), [INDEX, "weight_map"]),
    "missing shard": (after_sharding(lambda path: (path / SHARD).unlink()), [SHARD, "missing", INDEX]),
    "shard cut": (after_sharding(cut(SHARD, -4)), [SHARD, "truncated"]),
    "shard lacks a tensor": (point_elsewhere(SHARD), [SHARD, Q_PROJ]),
    "tensor not in the index": (change_index(lambda index: index["weight_map"].pop(Q_PROJ)), [Q_PROJ, "nowhere"]),
    "tensor in two shards": (after_sharding(repeat_tensor_in_shard), [SHARD, "has tensor", INDEX]),
    "shard outside": (point_elsewhere("../other.safetensors"), [INDEX, Q_PROJ, "../other.safetensors", "plain name"]),
    "shard absolute": (point_elsewhere("/etc/passwd"), [INDEX, Q_PROJ, "/etc/passwd"]),
    "shard in Windows style": (point_elsewhere("..\\x.safetensors"), [INDEX, Q_PROJ, "plain name"]),
    "shard with a null": (point_elsewhere("x\0.safetensors"), [INDEX, Q_PROJ, "plain name"]),
    "shard no text": (point_elsewhere(None), [INDEX, Q_PROJ, "None"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    damage, words = DAMAGE[case]
    damage(write_checkpoint(tmp_path, "llama2", with_tokenizer=False))
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint.open(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_directory_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=naming("missing exist")):
        HuggingFaceCheckpoint.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=naming("file directory")):
        HuggingFaceCheckpoint.open(tmp_path / "file")


def test_an_unsupported_model_is_refused_before_its_weights_are_touched(tmp_path):
    write_checkpoint(tmp_path, "llama2", architectures=["FalconForCausalLM"])
    (tmp_path / SINGLE).write_bytes(b"")
    with pytest.raises(ConfigError, match=naming("'FalconForCausalLM' LlamaForCausalLM")):
        HuggingFaceCheckpoint.open(tmp_path)


def test_the_factory_knows_the_same_tensors(tmp_path):
    for variant in VARIANTS:
        config = variant_config(variant)
        shapes = {name: tensor.shape for name, tensor in as_read(config, random_tensors(config)).items()}
        checkpoint = HuggingFaceCheckpoint.open(write_checkpoint(tmp_path / variant, variant, with_tokenizer=False))
        assert {name: checkpoint.shape(name) for name in checkpoint.names()} == shapes
