"""The tokenizer inside a GGUF file encodes, decodes and chats as the one it was made of."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.gguf_files import tiny_tokenizer, write_gguf
from support.hostile_texts import hostile_texts
from support.messages import naming
from support.tiny_tokenizers import write_tokenizer
from tokenizers import Tokenizer as Backend

from chunkkv import SamplingParams
from chunkkv.errors import CheckpointError
from chunkkv.session import ChunkKVSession
from chunkkv.text.tokenizer import Tokenizer
from chunkkv_builder import build
from chunkkv_builder.checkpoint.formats import open_checkpoint
from chunkkv_builder.checkpoint.gguf_tokenizer import read_tokenizer
from chunkkv_builder.checkpoint.pre_tokenizers import PRE_TOKENIZERS

VARIANTS = {"byte_level": "qwen3", "sentencepiece": "mistral"}
STYLES = list(VARIANTS)
PREFIX = "tokenizer.ggml."


def of_gguf(folder: Path, style: str, **metadata: Any) -> Tokenizer:
    """Return the tokenizer of a tiny GGUF file; `metadata` are values under tokenizer.ggml."""
    path = folder / "model.gguf"
    write_gguf(path, VARIANTS[style], metadata={PREFIX + key: value for key, value in metadata.items()})
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer_dir is not None
    return Tokenizer.from_dir(checkpoint.tokenizer_dir)


@pytest.mark.parametrize("style", STYLES)
def test_texts_become_the_tokens_of_the_original(tmp_path: Path, style: str) -> None:
    original, ours = tiny_tokenizer(style), of_gguf(tmp_path, style)
    for text in hostile_texts():
        for framed in (True, False):
            ids = original.encode(text, add_special_tokens=framed).ids
            assert ours.encode(text, add_special_tokens=framed) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_ends_and_template_are_those_of_the_original(tmp_path: Path, style: str) -> None:
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    write_tokenizer(tiny, style)
    original, ours = Tokenizer.from_dir(tiny), of_gguf(tmp_path, style)
    for role in ("bos_token", "eos_token"):
        assert ours.special_tokens[role] == original.special_tokens[role]
        assert len(ours.encode(ours.special_tokens[role], add_special_tokens=False)) == 1
    assert (ours.bos_token_id, ours.special_ids) == (original.bos_token_id, original.special_ids)
    assert ours.eos_token_ids == original.eos_token_ids
    chat = [{"role": "user", "content": "the key?"}, {"role": "assistant", "content": "7"}]
    assert ours.apply_chat_template(chat) == original.apply_chat_template(chat)
    assert ours.encode_chat(chat) == original.encode_chat(chat)


@pytest.mark.parametrize("style", STYLES)
def test_flags_decide_what_surrounds_a_text(tmp_path: Path, style: str) -> None:
    plain = of_gguf(tmp_path, style).encode("key", add_special_tokens=False)
    bos, eos = (0, 1) if style == "byte_level" else (1, 2)
    for flags, expected in (
        ({"add_bos_token": False}, plain),
        ({"add_bos_token": True, "add_eos_token": True}, [bos, *plain, eos]),
        # SentencePiece models begin with the begin token by default, these byte-level ones do not.
        ({"add_bos_token": None}, plain if style == "byte_level" else [bos, *plain]),
    ):
        assert of_gguf(tmp_path, style, **flags).encode("key") == expected
    beginning = of_gguf(tmp_path, "byte_level", add_bos_token=None, pre="llama-bpe")
    assert beginning.encode("key")[0] == 0


def test_a_text_gets_a_space_in_front_unless_the_file_says_no(tmp_path: Path) -> None:
    with_space = of_gguf(tmp_path, "sentencepiece").encode("the", add_special_tokens=False)
    ours = of_gguf(tmp_path, "sentencepiece", add_space_prefix=False)
    assert ours.token_text(with_space[0]) == " the"
    assert [ours.token_text(number) for number in ours.encode("the", add_special_tokens=False)] == list("the")
    assert ours.decode(ours.encode(" the the")) == " the the"


def test_every_token_that_ends_a_turn_is_an_end(tmp_path: Path) -> None:
    tokens = ["a", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<|end|>", "odd", "aa"]
    kinds = [1, 3, 3, 3, 1, 3, 3, 1]
    named = {"tokens": tokens, "token_type": kinds, "merges": ["a a"], "bos_token_id": 1, "eos_token_id": 2}
    assert of_gguf(tmp_path, "byte_level", **named).eos_token_ids == (2, 3, 5)
    assert of_gguf(tmp_path, "byte_level", **named, eot_token_id=6).eos_token_ids == (2, 6, 3, 5)
    path = tmp_path / "model.gguf"
    assert open_checkpoint(path).config.eos_token_ids == (2, 6, 3, 5)


def test_tokens_are_found_in_texts_by_their_types(tmp_path: Path) -> None:
    tokens = ["a", "b", "ab", "<|x|>", "<think>", "[PAD5]", "", "", "ba"]
    named = {"tokens": tokens, "token_type": [1, 1, 1, 3, 4, 5, 1, 1, 0], "merges": ["a b", "b a"]}
    ids = {"bos_token_id": None, "eos_token_id": 3, "add_bos_token": False, "padding_token_id": 2**32 - 1}
    ours = of_gguf(tmp_path, "byte_level", **named, **ids)
    assert ours.encode("ab<think>ba<|x|>a[PAD5]") == [2, 4, 8, 3, 0]  # what has no token is left out
    assert ours.special_ids == {3} and "pad_token" not in ours.special_tokens
    assert ours.decode([2, 4, 3, 5, 6]) == "ab<think>"


# What each rule does to one text, as llama.cpp's and the models' own tokenizers do.
TEXT = "I'VE 12345 don't\n\n  x½ HTTPServer/ok!! $a"
WORDS = ["\n\n ", " x", "½", " HTTPServer", "/", "ok", "!!"]
CASELESS = [" don", "'t", "\n\n", " ", " x", "½", " HTTPServer", "/ok", "!!", " $", "a"]
PIECES = {
    "default": ["I", "'", "VE", " ", "123", "45", " don", "'", "t", *WORDS, " ", "$", "a"],
    "gpt-2": ["I", "'", "VE", " 12345", " don", "'t", *WORDS, " $", "a"],
    "smollm": ["I", "'", "VE", " ", *"12345", " don", "'t", *WORDS, " $", "a"],
    "llama-bpe": ["I", "'VE", " ", "123", "45", *CASELESS],
    "qwen2": ["I", "'VE", " ", *"12345", *CASELESS],
    "tekken": ["I", "'VE", " ", *"12345", *CASELESS],
}
SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_splits_as_it_should(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3", metadata={PREFIX + "pre": pre})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tokenizer_dir is not None
    backend = Backend.from_file(str(checkpoint.tokenizer_dir / "tokenizer.json"))
    places = [place for _, place in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    pieces = [TEXT[start:end] for start, end in places]
    assert pieces == PIECES[SAME.get(pre, pre)]


def test_only_tekken_splits_before_a_capital(tmp_path: Path) -> None:
    for pre, expected in (("tekken", ["camel", "Case"]), ("qwen2", ["camelCase"])):
        write_gguf(tmp_path / "model.gguf", "qwen3", metadata={PREFIX + "pre": pre})
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.tokenizer_dir is not None
        backend = Backend.from_file(str(checkpoint.tokenizer_dir / "tokenizer.json"))
        assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("camelCase")] == expected


def test_pieces_join_by_score(tmp_path: Path) -> None:
    """The pair whose whole has the highest score joins first, wherever it stands in the list."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc", "abc"]
    kinds, scores = [2, 3, 3, *[1] * 6], [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    named = {"tokens": tokens, "token_type": kinds, "add_space_prefix": False, "add_bos_token": False}
    assert of_gguf(tmp_path, "sentencepiece", **named, scores=scores).encode("abcab") == [8, 6]
    scores[8] = -30.0
    assert of_gguf(tmp_path, "sentencepiece", **named, scores=scores).encode("abcab") == [8, 6]
    kinds[8] = 5  # unused: then "bc" is joined, and "a" stays
    assert of_gguf(tmp_path, "sentencepiece", **named, scores=scores).encode("abcab") == [3, 7, 6]


@pytest.mark.parametrize("style", STYLES)
def test_the_engine_carries_the_tokenizer(tmp_path: Path, style: str) -> None:
    write_gguf(tmp_path / "model.gguf", VARIANTS[style])
    flags = {"checkpoint_dir": tmp_path, "output_dir": tmp_path / "engine", "max_seq_len": 64, "log_level": "error"}
    build.main(engines.command_line(flags))
    session = ChunkKVSession.from_dir(tmp_path / "engine", threads=1)
    assert session.tokenizer is not None
    assert session.tokenizer.encode("the key") == tiny_tokenizer(style).encode("the key").ids
    assert session.generate("the key", SamplingParams(max_new_tokens=4)).token_ids


def test_the_temporary_files_go_with_the_checkpoint(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3")
    checkpoint = open_checkpoint(tmp_path)
    folder = checkpoint.tokenizer_dir
    assert folder is not None and folder.is_dir()
    del checkpoint
    gc.collect()
    assert not folder.exists()


def test_a_file_without_tokenizer_has_none(tmp_path: Path) -> None:
    for model in (None, "none", "no_vocab"):
        write_gguf(tmp_path / "model.gguf", "qwen3", metadata={PREFIX + "model": model})
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.tokenizer_dir is None
        assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_ids) == (None, ())


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({PREFIX + key: value for key, value in values.items()})


REFUSED = {
    "model": (changed(model="t5"), "'model' is 't5' 'gpt2' 'llama'"),
    "pre-tokenizer": (changed(pre="chameleon"), "'pre' is 'chameleon' 'qwen2' 'default'"),
    "a token twice": (changed(tokens=["a", "b", "a"]), "0 and 2 'a'"),
    "no tokens": (changed(tokens=7), "'tokens' is 7"),
    "a token of numbers": (changed(tokens=[1, 2, 3]), "'tokens' [1, 2, 3] strings"),
    "types": (changed(token_type=[1]), "'token_type' [1] 3 whole"),
    "an unknown type": (changed(token_type=[1, 1, 9]), "'token_type' [1, 1, 9] 0 to 6"),
    "a merge": (changed(merges=["a c"]), "'a c' two tokens"),
    "half a merge": (changed(merges=["ab"]), "'ab' two tokens"),
    "an id": (changed(eos_token_id=3), "'eos_token_id' is 3 3 tokens"),
    "a negative id": (changed(eos_token_id=-1), "'eos_token_id' is -1"),
    "no begin token": (changed(add_bos_token=True), "'add_bos_token' is True bos_token"),
    "a flag": (changed(add_bos_token="yes"), "'add_bos_token' is 'yes' true or false"),
    "no scores": (changed(model="llama"), "'scores' is missing"),
    "too few scores": (changed(model="llama", scores=[1.0]), "'scores' is [1.0] 3 tokens"),
    "no number": (changed(model="llama", scores=[1.0, float("nan"), 2.0]), "'scores' nan numbers"),
    "a long piece": (changed(model="llama", scores=[1.0] * 3, tokens=["a" * 600, "b", "c"]), "0 600 512"),
    "a template": (lambda metadata: metadata.update({"tokenizer.chat_template": 5}), "'tokenizer.chat_template' is 5"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_right_is_refused_by_name(change: Callable[[dict[str, Any]], None], words: str) -> None:
    metadata: dict[str, Any] = {
        PREFIX + key: value for key, value in {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}.items()
    }
    assert read_tokenizer(metadata, "model.gguf") is not None
    change(metadata)
    with pytest.raises(CheckpointError, match=naming(words)) as caught:
        read_tokenizer(metadata, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ") and "\n" not in str(caught.value)
