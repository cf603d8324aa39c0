"""An engine directory loads only if every byte of it is what the build wrote."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.messages import naming

import chunkkv
from chunkkv.engine.directory import EngineFiles, FileRecord, hash_file
from chunkkv.errors import EngineError, EngineMismatchError
from chunkkv.session import ChunkKVSession

FILES = (
    "compress.onnx",
    "compress_given.onnx",
    "config.json",
    "reread.onnx",
    "step.onnx",
    "tokenizer.json",
    "weights.safetensors",
)
Values = dict[str, Any]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return shutil.copytree(engines.engine_dir("llama3", chunkkv_layer_reuse=2), tmp_path / "engine")


def rewrite(engine: Path, change: Callable[[Values], None], config: Callable[[Values], None] | None = None) -> None:
    """Change config.json and manifest.json as someone would who knows how to sign them."""
    if config is not None:
        values = json.loads((engine / "config.json").read_text())
        config(values)
        (engine / "config.json").write_text(json.dumps(values))
    path = engine / "manifest.json"
    manifest = json.loads(path.read_text())
    data = (engine / "config.json").read_bytes()
    manifest["files"]["config.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    del manifest["manifest_sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "manifest_sha256": digest}))


def test_config_has_tensorrt_llms_shape_and_a_chunkkv_section(engine: Path) -> None:
    config = json.loads((engine / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config", "chunkkv"]
    assert config["version"] == chunkkv.__version__
    assert config["pretrained_config"]["num_hidden_layers"] == 3
    assert config["build_config"]["max_seq_len"] == 256 and config["build_config"]["max_beam_width"] == 1
    assert config["chunkkv"]["layer_groups"] == [[0, 1], [2]] and config["chunkkv"]["window"] == 4


def test_manifest_lists_every_file_with_its_checksum(engine: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in engine.iterdir()} - {"manifest.json"}
    assert set(FILES) <= set(manifest["files"])
    for name, record in manifest["files"].items():
        data = (engine / name).read_bytes()
        assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["backend"] == "onnxruntime"
    assert manifest["versions"]["chunkkv"] == chunkkv.__version__ and "onnx" in manifest["versions"]


def test_a_whole_engine_loads(engine: Path) -> None:
    files = EngineFiles.load(engine)
    assert files.backend == "onnxruntime" and files.settings is not None
    assert files.settings.layer_groups == ((0, 1), (2,)) and files.settings.keep_per_10k == 4000
    assert files.model["vocab_size"] == 384 and files.build["max_num_tokens"] == 16
    assert EngineFiles.load(engines.engine_dir("llama3", chunkkv=False)).settings is None


def test_it_still_loads_when_moved_and_through_a_link_to_the_directory(engine: Path) -> None:
    moved = engine.rename(engine.with_name("elsewhere"))
    engine.symlink_to(moved)
    assert EngineFiles.load(engine).model == EngineFiles.load(moved).model


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(engine: Path, name: str) -> None:
    (engine / name).unlink()
    with pytest.raises(EngineError, match=naming(name, "missing manifest.json")):
        EngineFiles.load(engine)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused_with_both_checksums(engine: Path, name: str) -> None:
    data = bytearray((engine / name).read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    (engine / name).write_bytes(data)
    with pytest.raises(EngineError, match=naming(name, "sha256", expected, hashlib.sha256(data).hexdigest())):
        EngineFiles.load(engine)


def test_a_cut_off_file_is_refused_with_both_sizes(engine: Path) -> None:
    size = (engine / "weights.safetensors").stat().st_size
    os.truncate(engine / "weights.safetensors", size - 5)
    with pytest.raises(EngineError, match=naming("weights.safetensors", size, "bytes", size - 5)):
        EngineFiles.load(engine)


@pytest.mark.parametrize("name", ["extra.bin", "README.md", "rank0.engine"])
def test_a_foreign_file_is_refused(engine: Path, name: str) -> None:
    (engine / name).write_text("x")
    with pytest.raises(EngineError, match=naming(name, "manifest.json compress.onnx config.json")):
        EngineFiles.load(engine)


def test_a_foreign_directory_is_refused(engine: Path) -> None:
    (engine / "lora").mkdir()
    with pytest.raises(EngineError, match=naming("lora foreign")):
        EngineFiles.load(engine)


@pytest.mark.parametrize("name", [".DS_Store", "._step.onnx", ".gitattributes", ".cache/"])
def test_hidden_files_are_left_alone(engine: Path, name: str) -> None:
    if name.endswith("/"):
        (engine / name).mkdir()
    else:
        (engine / name).write_text("x")
    assert EngineFiles.load(engine).backend == "onnxruntime"


def test_links_into_a_cache_are_followed(engine: Path, tmp_path: Path) -> None:
    expected = ChunkKVSession.from_dir(engine, threads=1).generate([5, 6, 7]).token_ids
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(engine.iterdir())):
        file.rename(blobs / f"blob{number}")
        file.symlink_to(blobs / f"blob{number}")
    assert ChunkKVSession.from_dir(engine, threads=1).generate([5, 6, 7]).token_ids == expected
    data = bytearray((engine / "step.onnx").read_bytes())
    data[-1] ^= 1
    (engine / "step.onnx").write_bytes(data)
    with pytest.raises(EngineError, match=naming("step.onnx", "sha256")):
        EngineFiles.load(engine)


def test_a_link_to_nothing_is_refused(engine: Path) -> None:
    (engine / "step.onnx").unlink()
    (engine / "step.onnx").symlink_to("gone")
    with pytest.raises(EngineError, match=naming("step.onnx symbolic link nothing")):
        EngineFiles.load(engine)


def test_a_pipe_in_place_of_a_file_is_refused_without_reading_it(engine: Path) -> None:
    (engine / "step.onnx").unlink()
    os.mkfifo(engine / "step.onnx")
    with pytest.raises(EngineError, match=naming("step.onnx file")):
        EngineFiles.load(engine)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "..", "", "a\\b", "manifest.json", "a\nb"])
def test_a_manifest_cannot_name_files_elsewhere(engine: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    record = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite(engine, lambda manifest: manifest["files"].update({name: record}))
    with pytest.raises(EngineError, match=naming("plain name")):
        EngineFiles.load(engine)


@pytest.mark.parametrize(
    "record",
    [None, {}, {"size": 1}, {"size": -1, "sha256": "0" * 64}, {"size": True, "sha256": "0" * 64}]
    + [{"size": 1, "sha256": sha256} for sha256 in ("0" * 63, "G" * 64, None)],
)
def test_a_malformed_entry_is_refused(engine: Path, record: object) -> None:
    rewrite(engine, lambda manifest: manifest["files"].update({"step.onnx": record}))
    with pytest.raises(EngineError, match=r"step\.onnx(: '(size|sha256)'|' is None)"):
        EngineFiles.load(engine)


@pytest.mark.parametrize("change", [("backend", "tensorrt"), ("versions", {"chunkkv": "9"}), ("note", "hello")])
def test_a_changed_manifest_is_refused_with_both_checksums(engine: Path, change: tuple[str, Any]) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    (engine / "manifest.json").write_text(json.dumps({**manifest, change[0]: change[1]}))
    with pytest.raises(EngineError, match=naming("manifest_sha256", manifest["manifest_sha256"])):
        EngineFiles.load(engine)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"[]", "object"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b'{"format": "other"}', "format 'other' 'chunkkv-engine'"),
    ],
)
def test_a_broken_manifest_is_refused(engine: Path, content: bytes, message: str) -> None:
    (engine / "manifest.json").write_bytes(content)
    with pytest.raises(EngineError, match=naming(message)):
        EngineFiles.load(engine)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_a_mismatch(engine: Path, version: object) -> None:
    rewrite(engine, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(EngineMismatchError, match=naming("format_version", repr(version), 2)):
        EngineFiles.load(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("build_config"), "'build_config'"),
        (lambda c: c.update(pretrained_config=3), "'pretrained_config' 3"),
        (lambda c: c["build_config"].pop("max_seq_len"), "build_config 'max_seq_len'"),
        (lambda c: c["build_config"].update(max_batch_size=0), "build_config 'max_batch_size' 0"),
        (lambda c: c["pretrained_config"].update(vocab_size="many"), "pretrained_config 'vocab_size' 'many'"),
        (lambda c: c.update(chunkkv=None), "'chunkkv' None"),
        (lambda c: c["chunkkv"].update(window=0), "window 0 1 128"),
        (lambda c: c["chunkkv"].update(colour="red"), "chunkkv 'colour'"),
        (
            lambda c: c["chunkkv"].update(layer_groups=[[0, 1]]),
            "'layer_groups' [[0,1]] 0 2",
        ),
        (
            lambda c: c["pretrained_config"].update(eos_token_ids=None),
            "'eos_token_ids' None",
        ),
        (lambda c: c["pretrained_config"].update(eos_token_ids=[True]), "'eos_token_ids'"),
        (
            lambda c: c["build_config"].update(max_num_tokens=3),
            "'max_num_tokens' 3 4",
        ),
        (lambda c: c["build_config"].update(backend="tensorrt"), "'backend' 'tensorrt' manifest.json 'onnxruntime'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(engine: Path, change: Callable, message: str) -> None:
    rewrite(engine, lambda manifest: None, change)
    with pytest.raises(EngineError, match=naming(message)):
        EngineFiles.load(engine)


def test_another_backends_engine_is_refused_by_the_session(engine: Path) -> None:
    def other(values: Values) -> None:
        values.get("build_config", values)["backend"] = "onnx_next"

    rewrite(engine, other, other)
    with pytest.raises(EngineMismatchError, match=naming("backend 'onnx_next' 'onnxruntime'")):
        ChunkKVSession.from_dir(engine)


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=naming("nowhere --output_dir")):
        EngineFiles.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineError, match=naming("directory")):
        EngineFiles.load(tmp_path / "file")
    with pytest.raises(EngineError, match=naming("no manifest.json")):
        EngineFiles.load(tmp_path)


def test_an_unfinished_build_never_loads_even_if_it_looks_complete(engine: Path) -> None:
    partial = engine.rename(engine.with_name("engine.partial-123"))
    with pytest.raises(EngineError, match=naming("unfinished")):
        EngineFiles.load(partial)


def test_hashing_reads_in_pieces_and_reports_them(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than two pieces
    (tmp_path / "file").write_bytes(data)
    pieces: list[int] = []
    record = hash_file(tmp_path / "file", pieces.append, sync=True)
    assert record == FileRecord(len(data), hashlib.sha256(data).hexdigest())
    assert len(pieces) == 3 and sum(pieces) == len(data)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("chunkkv", {"sinks": 1}, "config.json sinks 1 compress.onnx 2"),
        ("chunkkv", {"layer_groups": [[0], [1, 2]]}, "config.json layer_groups"),
        ("pretrained_config", {"vocab_size": 99}, "config.json vocab_size 99 384"),
    ],
)
def test_settings_other_than_the_graphs_own_are_a_mismatch(
    engine: Path, section: str, change: Values, message: str
) -> None:
    rewrite(engine, lambda manifest: None, lambda config: config[section].update(change))
    with pytest.raises(EngineMismatchError, match=naming(message)):
        ChunkKVSession.from_dir(engine)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x08"])
def test_a_file_that_is_no_graph_is_an_engine_error(engine: Path, content: bytes) -> None:
    (engine / "step.onnx").write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(engine, lambda manifest: manifest["files"].update({"step.onnx": record}))
    with pytest.raises(EngineError, match=naming("step.onnx")):
        ChunkKVSession.from_dir(engine)


@pytest.mark.parametrize("engine_dir", [None, "", 7])
def test_what_is_no_path_is_refused(engine_dir: object) -> None:
    with pytest.raises(EngineError, match=naming("engine_dir", repr(engine_dir))):
        ChunkKVSession.from_dir(engine_dir)  # type: ignore[arg-type]  # what a script without types may pass
