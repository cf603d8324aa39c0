"""Against transformers' own reading of GGUF files: weights, logits, tokens, on a real model and on tiny ones."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import engines
from support.checkpoints import as_read
from support.gguf_files import DRAWN, K_SIZES, QUANTISED, write_gguf
from support.hostile_texts import hostile_texts
from support.smollm2 import smollm2
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkkv import SamplingParams
from chunkkv.requests import make_requests
from chunkkv.session import ChunkKVSession
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder import build
from chunkkv_builder.checkpoint.formats import open_checkpoint

pytestmark = pytest.mark.peers
TOLERANCE = 1e-4
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def loaded(path: Path) -> Any:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def built(checkpoint: Path, output: Path, **flags: Any) -> ChunkKVSession:
    named = {"checkpoint_dir": checkpoint, "output_dir": output, "log_level": "error", **flags}
    build.main(engines.command_line(named))
    return ChunkKVSession.from_dir(output, threads=1)


def last_logits(session: ChunkKVSession, ids: np.ndarray) -> np.ndarray:
    request = make_requests([ids], None, session.limits, session.settings, None, None, 1)[0]
    cache = session.executor.new_cache(1, request.kept_tokens + 1)
    (prefilled,) = session.executor.prefiller().run([request], cache, threading.Event())
    return prefilled.logits


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()


def assert_equal_models(path: Path, output: Path) -> None:
    model, checkpoint = loaded(path), open_checkpoint(path)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    parts = as_read(model.config.to_dict(), state)
    for name in checkpoint.names():
        assert np.array_equal(checkpoint.converted(name, "float32"), parts[name]), name
    session = built(path, output, max_seq_len=256, max_num_tokens=64)
    ids = np.random.default_rng(0).integers(3, 300, 100)
    expected = torch_logits(model, ids)
    assert np.ptp(expected) > 1
    assert np.abs(last_logits(session, ids) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("variant", ["llama2", "llama_tied", "mistral", "qwen2", "qwen3", "phi3"])
def test_tiny_models_equal_transformers(tmp_path: Path, variant: str) -> None:
    # transformers passes over Qwen3's attention.key_length, and over Phi-3's rope.dimension_count.
    sizes: dict[str, Any] = {"head_dim": 128} if variant == "qwen3" else {}
    if variant == "phi3":
        sizes = {"rope_scaling": None, "partial_rotary_factor": 1.0, "max_position_embeddings": 512}
    metadata = {"tokenizer.ggml.padding_token_id": 0}  # transformers' own for Phi-3 is beyond this vocabulary
    write_gguf(tmp_path / "model.gguf", variant, "Q8_0", metadata=metadata, **sizes)
    assert_equal_models(tmp_path / "model.gguf", tmp_path / "engine")


@pytest.mark.parametrize("kind", ["F32", *QUANTISED, *DRAWN])
def test_every_type_equals_transformers(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "model.gguf", "llama_tied", kind, head_dim=64, **K_SIZES)
    assert_equal_models(tmp_path / "model.gguf", tmp_path / "engine")


TINY_TOKENIZERS = {
    "mistral": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "qwen2": {"pre": "qwen2"},
}


@pytest.mark.parametrize("variant", TINY_TOKENIZERS)
def test_tiny_texts_become_equal_tokens(tmp_path: Path, variant: str) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in TINY_TOKENIZERS[variant].items()}
    write_gguf(tmp_path / "model.gguf", variant, metadata=metadata)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tokenizer_dir is not None
    ours = Tokenizer.from_dir(checkpoint.tokenizer_dir)
    for text in hostile_texts(600):
        if variant == "qwen2" and "<|" in text:  # transformers knows Qwen's own special tokens and no others
            continue
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=False) == decoded


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded(smollm2())


@pytest.fixture(scope="module")
def theirs() -> Any:
    file = smollm2()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ChunkKVSession:
    return built(smollm2(), tmp_path_factory.mktemp("engines") / "smollm2", max_seq_len=2048)


@pytest.fixture(scope="module")
def ours(session: ChunkKVSession) -> Tokenizer:
    assert session.tokenizer is not None
    return session.tokenizer


def test_smollm2_weights_are_equal(model: Any) -> None:
    checkpoint = open_checkpoint(smollm2())
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert len(checkpoint.names()) == 272
    parts = as_read(model.config.to_dict(), state)
    for name in checkpoint.names():
        assert np.array_equal(checkpoint.converted(name, "float32"), parts[name]), name


@pytest.mark.parametrize("length", [19, 150, 900])
def test_smollm2_logits_are_equal(model: Any, session: ChunkKVSession, ours: Tokenizer, length: int) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "method.md").read_text(encoding="utf-8")
    ids = np.array(ours.encode(text)[:length])
    expected = torch_logits(model, ids)
    assert np.ptp(expected) > 20
    assert np.abs(last_logits(session, ids) - expected).max() <= TOLERANCE


def test_smollm2s_greedy_answer_is_equal(model: Any, session: ChunkKVSession, ours: Tokenizer) -> None:
    ids = np.array(ours.encode_chat(QUESTION))
    result = session.generate(ids, SamplingParams(max_new_tokens=16))
    expected = model.generate(torch.from_numpy(ids)[None], do_sample=False, max_new_tokens=16, eos_token_id=2)
    assert "Paris" in ours.decode(result.token_ids)
    assert list(result.token_ids) == expected[0, len(ids) :].tolist()


def test_smollm2s_template_and_the_special_tokens_are_equal(theirs: Any, ours: Tokenizer) -> None:
    rendered = theirs.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(QUESTION) == rendered
    for number, token in theirs.added_tokens_decoder.items():
        if number < 49152:  # transformers takes it for CodeLlama's tokenizer and adds five of that
            assert ours.encode(token.content) == [number]
    assert ours.eos_token_ids == (2, 0) and ours.bos_token_id == 1


def test_smollm2_texts_become_equal_tokens(theirs: Any, ours: Tokenizer) -> None:
    """Transformers passes over tokenizer.ggml.pre, so SmolLM's splitting of digits is put in for it."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in hostile_texts(600):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=False) == decoded
