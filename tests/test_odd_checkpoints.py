"""Checkpoints that say a thing twice, differently, or in an unusual place, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import engines
from support.checkpoints import random_tensors, write_checkpoint, write_tensors
from support.messages import naming

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.errors import CheckpointError
from chunkkv_builder import build as build_engine
from chunkkv_builder.checkpoint.hugging_face import HuggingFaceCheckpoint

IDS = [0, 5, 9, 33, 77]


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; ... removes one."""
    content = {**(json.loads(path.read_text()) if path.is_file() else {}), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def build(checkpoint: Path, capsys: pytest.CaptureFixture[str], **flags: Any) -> tuple[ChunkKVSession, str]:
    """Return a session on the engine of a checkpoint, and what its build printed."""
    output = checkpoint.parent / "engine"
    named = {"checkpoint_dir": checkpoint, "output_dir": output, **flags}
    build_engine.main(engines.command_line(named))
    return ChunkKVSession.from_dir(output, threads=1), " ".join(capsys.readouterr().err.split())


def tied(folder: Path, head: str) -> Path:
    checkpoint = write_checkpoint(folder / "checkpoint", "llama_tied")
    tensors = random_tensors(json.loads((checkpoint / "config.json").read_text()))
    if head == "equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    elif head == "different":
        values = np.random.RandomState(7).standard_normal((384, 64)).astype("f4") * 0.3
        tensors["lm_head.weight"] = values
    elif head == "one value":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][383, 63] += 1
    write_tensors(checkpoint, tensors)
    return checkpoint


@pytest.mark.parametrize("head", ["none", "equal", "different", "one value"])
def test_a_tied_model_with_a_head_of_its_own_uses_it(tmp_path: Path, capsys, head: str) -> None:
    checkpoint = tied(tmp_path, head)
    is_own = head in ("different", "one value")
    assert HuggingFaceCheckpoint.open(checkpoint).config.tie_word_embeddings is not is_own
    session, printed = build(checkpoint, capsys)
    assert ("lm_head.weight differs" in printed) is is_own
    token = session.generate(IDS, SamplingParams(max_new_tokens=1, ignore_eos=True)).token_ids[0]
    assert token == {"none": 337, "equal": 337, "different": 285}.get(head, token)  # 285: transformers 5.2


def test_a_head_of_another_type_than_the_embedding_is_not_tied(tmp_path: Path) -> None:
    checkpoint = tied(tmp_path, "none")
    tensors = random_tensors(json.loads((checkpoint / "config.json").read_text()))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    write_tensors(checkpoint, tensors)
    assert not HuggingFaceCheckpoint.open(checkpoint).config.tie_word_embeddings


TURN_END = "<|pad|>"  # the tiny tokenizer's token 2
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|pad|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("files", "expected", "named"),
    [
        ({}, {1}, []),
        ({"config": {"eos_token_id": [1, 7]}, "generation_config": {"eos_token_id": 1}}, {1, 7}, ["7", "config.json"]),
        ({"generation_config": {"eos_token_id": [9, 1]}}, {1, 9}, []),
        ({"generation_config": {"eos_token_id": 9}}, {1, 9}, ["1 (<|end|>)", "config.json and tokenizer_config.json"]),
        ({"tokenizer_config": {"eos_token": TURN_END}}, {1, 2}, ["2 (<|pad|>)", "tokenizer_config.json"]),
        ({"tokenizer_config": {"chat_template": TEMPLATE}}, {1, 2}, ["2 (<|pad|>)", "the chat template"]),
        ({"tokenizer_config": {"chat_template": "{{ raise_exception('no') }}"}}, {1}, []),
        ({"config": {"eos_token_id": ...}, "generation_config": {"eos_token_id": ...}}, {1, 2}, ["1 (<|end|>)"]),
        ({"generation_config": {"eos_token_id": [1, 5000]}}, {1, 5000}, []),
    ],
)
def test_end_tokens_of_all_files_end_an_answer(tmp_path: Path, capsys, files: dict, expected: set, named: list) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama3")
    for name, values in files.items():
        change(checkpoint / f"{name}.json", **values)
    session, printed = build(checkpoint, capsys)
    assert session.eos_token_ids == expected
    assert ("end tokens" in printed) is bool(named)
    assert all(text in printed for text in named)


def test_a_chat_template_with_a_syntax_error_is_found_by_the_build(tmp_path: Path, capsys) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama3")
    change(checkpoint / "tokenizer_config.json", chat_template="{% for x in %}")
    with pytest.raises(SystemExit) as caught:
        build(checkpoint, capsys)
    assert caught.value.code == 1
    assert "syntax error in line 1" in capsys.readouterr().err and not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_in_another_format_is_named(tmp_path: Path, capsys, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama3", with_tokenizer=False)
    (checkpoint / name).write_bytes(b"x")
    assert f"only {name}: load it in transformers" in build(checkpoint, capsys)[1]


def test_sequences_within_a_sliding_window_are_built(tmp_path: Path, capsys) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "mistral", sliding_window=64)
    session, printed = build(checkpoint, capsys)
    assert session.limits.max_seq_len == 64 and "last 64 tokens only" in printed


def test_sequences_within_the_short_factors_of_longrope_are_built(tmp_path: Path, capsys) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "phi3", original_max_position_embeddings=64)
    session, printed = build(checkpoint, capsys)
    assert session.limits.max_seq_len == 64 and "longrope" in printed and "takes 64 tokens at most" in printed


@pytest.mark.parametrize(
    ("dtype", "variant", "warns"),
    [("float16", "gemma2", True), ("bfloat16", "gemma2", False), ("float16", "llama3", False)],
)
def test_a_type_that_a_family_overflows_is_warned_of(dtype: str, variant: str, warns: bool, tmp_path, capsys) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", variant)
    flags = {"checkpoint_dir": checkpoint, "backend": "tensorrt", "dtype": dtype, "dry_run": True}
    build_engine.main(engines.command_line(flags))
    assert ("leave the range of float16: give --dtype bfloat16" in " ".join(capsys.readouterr().err.split())) is warns


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("target", ["../blobs/gone", "itself"])
def test_a_link_to_nothing_is_named(tmp_path: Path, name: str, target: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama3")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(name if target == "itself" else target)
    with pytest.raises(CheckpointError, match=naming(f"{name} symbolic link")):
        HuggingFaceCheckpoint.open(checkpoint)


def test_a_shard_that_links_to_nothing_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama3", shards=2)
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=naming(f"{shard.name} symbolic link ../blobs/gone")):
        HuggingFaceCheckpoint.open(checkpoint)
