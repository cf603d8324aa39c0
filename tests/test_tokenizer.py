"""Tokenizers of the two kinds that checkpoints ship: round trips, streams, settings files, delimiters, bad files."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import tiny_tokenizers
from support.messages import naming
from tokenizers import AddedToken, decoders, models

from chunkkv.errors import CheckpointError, RequestError
from chunkkv.text.tokenizer import StreamDecoder, Tokenizer

STYLES = ("byte_level", "sentencepiece")
BOS, EOS = {"byte_level": 0, "sentencepiece": 1}, {"byte_level": 1, "sentencepiece": 2}
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
unicode_text = st.text(max_size=24)  # surrogates are not among hypothesis' characters by default
parts = st.sampled_from(["the", " and", " ", "  ", "é", "€", "😀", ".\n", "Ω", "\t"])
mixed_text = st.lists(parts, max_size=12).map("".join)


def write_files(directory: Path, style: str, **files: Any) -> Path:
    """Write a tiny tokenizer; a file given by its name without .json is updated, None removes it, text replaces it."""
    tiny_tokenizers.write_tokenizer(directory, style)
    for name, content in files.items():
        path = directory / f"{name}.json"
        if content is None:
            path.unlink()
        elif isinstance(content, dict):
            values = {**(json.loads(path.read_text()) if path.is_file() else {}), **content}
            path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
        else:
            path.write_bytes(content)
    return directory


@functools.cache
def tiny(style: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_dir(write_files(Path(folder), style))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("style", STYLES)
@quick
@given(text=unicode_text | mixed_text)
@example("the key of the cache. é€😀\n\n")
@example("")
@example(" leading and trailing ")
@example("\x00\x7f\u200b\U0010ffff")
def test_text_survives_a_round_trip(style: str, text: str) -> None:
    tokenizer = tiny(style)
    ids = tokenizer.encode(text)
    assert ids[0] == BOS[style] and tokenizer.decode(ids) == text
    plain = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [BOS[style], *plain] and tokenizer.decode(plain) == text


@pytest.mark.parametrize("style", STYLES)
@quick
@given(text=unicode_text | mixed_text, specials=st.lists(st.integers(0, 24), max_size=3))
@example("😀" * 5, [1, 3])
@example("a \ufffd\ufffd b\ufffd", [])
@example(" ▁ a", [0])
def test_stream_pieces_together_are_the_decoded_text(style: str, text: str, specials: list[int]) -> None:
    """Special tokens in between, even inside a character, change nothing."""
    tokenizer = tiny(style)
    ids = tokenizer.encode(text)
    for place in specials:
        ids.insert(min(place, len(ids)), EOS[style])
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces) and pieces[-1] == ""


@quick
@given(ids=st.lists(st.integers(3, 302), max_size=15))
def test_stream_of_any_bytes_equals_the_decoded_text(ids: list[int]) -> None:
    assert "".join(streamed(tiny("byte_level"), ids)) == tiny("byte_level").decode(ids)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_split_character_comes_with_its_last_token(style: str, character: str) -> None:
    ids = tiny(style).encode("a" + character, add_special_tokens=False)
    assert len(ids) == 1 + len(character.encode())
    assert streamed(tiny(style), ids) == ["a", *[""] * (len(ids) - 2), character, ""]


def byte_tokens(style: str, data: bytes) -> list[int]:
    tokenizer = tiny(style)._backend
    if style == "sentencepiece":
        return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    # Byte-level BPE gives every byte a printable stand-in; bytes that no UTF-8 has are those the alphabet is left with.
    known = {tiny(style).encode(chr(code), False)[-1] for code in [*range(0x100), 0x800, 0x10000]}
    return [next(number for number in range(3, 259) if number not in known)] * len(data)


@pytest.mark.parametrize("style", STYLES)
def test_invalid_bytes_are_held_back_then_replaced(style: str) -> None:
    tokenizer, (bad,) = tiny(style), byte_tokens(style, b"\xff")
    letter = tokenizer.encode("ab", add_special_tokens=False)[-1]
    assert streamed(tokenizer, [letter, bad]) == ["b", "", "\ufffd"]
    assert streamed(tokenizer, [letter, bad, letter]) == ["b", "", "\ufffdb", ""]
    pieces = streamed(tokenizer, [bad] * 40)
    assert "".join(pieces) == "\ufffd" * 40
    assert [bool(piece) for piece in pieces].index(True) == 15  # held no longer than this


@pytest.mark.parametrize("style", STYLES)
def test_an_unfinished_character_ends_as_a_replacement(style: str) -> None:
    ids = tiny(style).encode("a€", add_special_tokens=False)[:-1]
    *pieces, last = streamed(tiny(style), ids)
    assert "".join(pieces) == "a" and set(last) == {"\ufffd"}


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_have_ids_and_no_text(style: str) -> None:
    tokenizer = tiny(style)
    assert tokenizer.special_ids == {0, 1, 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS[style], (EOS[style],))
    ids = [BOS[style], *tokenizer.encode("the", False), EOS[style], tokenizer.size, 2**31 - 1]
    name = tokenizer.special_tokens["eos_token"]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("the" + name)
    assert tokenizer.token_text(EOS[style]) == name
    assert tokenizer.encode("the" + name, False)[-1] == EOS[style]
    assert "".join(streamed(tokenizer, ids)) == "the"


@pytest.mark.parametrize("style", STYLES)
def test_token_texts_keep_their_leading_space(style: str) -> None:
    tokenizer = tiny(style)
    token = tokenizer.encode("a the", add_special_tokens=False)[-1]
    assert tokenizer.token_text(token) == " the"
    assert tokenizer.token_text(tokenizer.encode("a\n", False)[-1]) == "\n"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_bos_token": False, "add_eos_token": True}, False, True),
        ({"add_bos_token": ...}, True, False),  # the tokenizer's own post-processor
        ({"add_bos_token": ..., "add_eos_token": True}, True, True),
        ({"add_bos_token": ..., "add_eos_token": False}, True, False),
        ({"add_bos_token": None, "add_eos_token": None}, True, False),
    ],
)
def test_settings_say_what_frames_a_text(tmp_path: Path, style: str, flags: dict, before: bool, after: bool) -> None:
    tokenizer = Tokenizer.from_dir(write_files(tmp_path, style, tokenizer_config=flags))
    plain = tokenizer.encode("the key", add_special_tokens=False)
    assert tokenizer.encode("the key") == [BOS[style]] * before + plain + [EOS[style]] * after


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [1, 2, 7]}, (1, 2, 7)),
        ({"eos_token_id": None}, (1,)),
        ({"eos_token_id": []}, (1,)),
        ({}, (1,)),
    ],
)
def test_end_tokens_come_from_the_generation_config(tmp_path: Path, generation: dict, expected: tuple) -> None:
    tokenizer = Tokenizer.from_dir(write_files(tmp_path, "byte_level", generation_config=generation))
    assert tokenizer.eos_token_ids == expected


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    own = {"bos_token": {"content": "<|pad|>"}, "pad_token": "<|pad|>"}
    write_files(tmp_path, "byte_level", special_tokens_map=own, tokenizer_config={"eos_token": ..., "bos_token": None})
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<|pad|>", "pad_token": "<|pad|>"}
    assert tokenizer.bos_token_id == 2 and tokenizer.eos_token_ids == ()


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = tiny_tokenizers.byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    write_files(tmp_path, "byte_level", tokenizer=backend.to_str().encode())
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the key of the cache")) == "the key of the cache"
    assert len(tokenizer.encode("x")) == 2


@pytest.mark.parametrize("style", STYLES)
def test_delimiter_table_marks_ends_of_clauses_and_lines(tmp_path: Path, style: str) -> None:
    backend = getattr(tiny_tokenizers, style)()
    backend.add_tokens([AddedToken(text, normalized=False) for text in (". ", "x;", ";x", "!  ", "\n\n", " :", ".\t")])
    backend.add_special_tokens([AddedToken("[end].", normalized=False)])
    tokenizer = Tokenizer.from_dir(write_files(tmp_path, style, tokenizer=backend.to_str().encode()))
    table = tokenizer.delimiter_token_table()
    assert table.shape == (tokenizer.size,) and table.dtype == bool
    marked = {tokenizer.token_text(int(token)) for token in np.flatnonzero(table)}
    assert marked == {*".!?;:,\n", ". ", "x;", "!  ", "\n\n", " :"}
    assert not table[backend.token_to_id("[end].")]
    assert not table[sorted(tokenizer.special_ids)].any()
    only = tokenizer.delimiter_token_table(delimiters="x")
    assert {tokenizer.token_text(int(token)) for token in np.flatnonzero(only)} == {"x", ";x"}


@pytest.mark.parametrize("vocab_size", [0, 20, 303, 9000])
def test_delimiter_table_has_the_models_size(vocab_size: int) -> None:
    whole = tiny("byte_level").delimiter_token_table()
    table = tiny("byte_level").delimiter_token_table(vocab_size)
    assert len(table) == vocab_size
    assert (table[: len(whole)] == whole[:vocab_size]).all() and not table[len(whole) :].any()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer": None}, "no tokenizer.json transformers"),
        ({"tokenizer": b"{"}, "tokenizer.json valid"),
        ({"tokenizer": b'{"model": {"type": "Magic"}}'}, "tokenizer.json valid"),
        ({"tokenizer": b'{"a": "\xff"}'}, "tokenizer.json UTF-8 7"),
        ({"tokenizer_config": b"[]"}, "tokenizer_config.json list object"),
        ({"tokenizer_config": b"{,}"}, "tokenizer_config.json valid JSON"),
        ({"tokenizer_config": b"[" * 100_000}, "tokenizer_config.json valid JSON"),
        ({"tokenizer_config": {"bos_token": 7}}, "bos_token '7'"),
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "eos_token '<gone>' tokenizer.json"),
        ({"tokenizer_config": {"bos_token": ...}}, "add_bos_token bos_token"),
        ({"tokenizer_config": {"eos_token": ..., "add_eos_token": True}}, "add_eos_token eos_token"),
        ({"special_tokens_map": {"unk_token": {"content": []}}}, "unk_token '[]'"),
        ({"special_tokens_map": b"\xff"}, "special_tokens_map.json UTF-8"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id ['2']"),
        ({"generation_config": {"eos_token_id": [1, -1]}}, "eos_token_id [1,-1]"),
        ({"generation_config": {"eos_token_id": True}}, "eos_token_id [True]"),
        ({"generation_config": {"eos_token_id": 1.0}}, "eos_token_id [1.0]"),
        ({"tokenizer_config": {"chat_template": 7}}, "chat_template int text list"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, files: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=naming(named)):
        Tokenizer.from_dir(write_files(tmp_path, "byte_level", **files))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ab\ud800c", "surrogate U+D800 2"),
        ("\udcff", "surrogate U+DCFF 0 UTF-8"),
        (b"bytes", "text bytes"),
        (None, "text NoneType"),
    ],
)
def test_text_that_is_no_unicode_is_refused(style: str, text: Any, named: str) -> None:
    with pytest.raises(RequestError, match=naming(named)):
        tiny(style).encode(text)


@pytest.mark.parametrize("bad", [-1, 2**31, 2**70, 1.0, True, "1", None])
def test_ids_that_are_no_token_ids_are_refused(bad: Any) -> None:
    tokenizer = tiny("byte_level")
    for call in (lambda: tokenizer.decode([3, bad]), lambda: tokenizer.token_text(bad)):
        with pytest.raises(RequestError, match=naming("valid 0 2147483647")):
            call()


def test_numpy_ids_are_fine() -> None:
    ids = np.array(tiny("byte_level").encode("the é"), np.int32)
    assert tiny("byte_level").decode(ids) == "the é"
    assert "".join(streamed(tiny("byte_level"), list(ids))) == "the é"


# --- tokens that stand beside tokenizer.json ---

TURN = "<|turn|>"
DECODER_ENTRY = {"content": TURN, "special": True, "normalized": False, "lstrip": False}


@pytest.mark.parametrize(
    ("files", "is_special"),
    [
        ({"added_tokens": {TURN: 303}}, False),
        ({"added_tokens": {TURN: 303}, "special_tokens_map": {"additional_special_tokens": [TURN]}}, True),
        ({"tokenizer_config": {"added_tokens_decoder": {"303": DECODER_ENTRY}}}, True),
        ({"tokenizer_config": {"added_tokens_decoder": {"303": {"content": TURN, "special": False}}}}, False),
        ({"added_tokens": {TURN: 303}, "tokenizer_config": {"added_tokens_decoder": {"303": DECODER_ENTRY}}}, True),
    ],
)
def test_added_tokens_may_stand_in_other_files(tmp_path: Path, files: dict, is_special: bool) -> None:
    tokenizer = Tokenizer.from_dir(write_files(tmp_path, "byte_level", **files))
    assert tokenizer.encode(TURN + "hi") == [0, 303, 74, 75]
    assert tokenizer.size == 304 and (303 in tokenizer.special_ids) is is_special
    assert tokenizer.decode([74, 303, 75]) == ("hi" if is_special else f"h{TURN}i")


def test_several_added_tokens_keep_their_order(tmp_path: Path) -> None:
    added = {"<a>": 305, "<b>": 303, "<c>": 304, "<|begin|>": 0}
    tokenizer = Tokenizer.from_dir(write_files(tmp_path, "byte_level", added_tokens=added))
    assert tokenizer.size == 306 and tokenizer.encode("<a><b><c>", False) == [305, 303, 304]
    assert tokenizer.special_ids == {0, 1, 2}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"added_tokens": {TURN: 304}}, f"{TURN!r} 304 303"),
        ({"added_tokens": {"the": 7}}, "'the' 7"),
        ({"added_tokens": {TURN: 303, "<b>": 303}}, "'<b>' 303 304"),
        ({"added_tokens": {"<|begin|>": 5}}, "'<|begin|>' 5 0"),
        ({"added_tokens": {TURN: "303"}}, f"added_tokens.json {TURN!r} '303'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"2": DECODER_ENTRY}}}, f"{TURN!r} 2 303"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": DECODER_ENTRY}}}, "added_tokens_decoder 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"303": TURN}}}, "added_tokens_decoder '303'"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder list"),
    ],
)
def test_added_tokens_that_cannot_be_had_are_named(tmp_path: Path, files: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=naming(named)):
        Tokenizer.from_dir(write_files(tmp_path, "byte_level", **files))


def test_a_byte_order_mark_of_a_settings_file_is_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, "byte_level")
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer.from_dir(tmp_path).eos_token_ids == (1,)


@pytest.mark.parametrize("style", STYLES)
def test_a_text_that_has_its_begin_token_gets_no_second_one(style: str) -> None:
    tokenizer = tiny(style)
    text = tokenizer.special_tokens["bos_token"] + "the key"
    assert tokenizer.encode_prompt(text) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode_prompt("the key") == tokenizer.encode("the key")
    assert tokenizer.encode_prompt("the key", add_special_tokens=False) == tokenizer.encode("the key", False)
    talk = [{"role": "user", "content": "the key"}]
    assert tokenizer.encode_prompt(tokenizer.apply_chat_template(talk)) == tokenizer.encode_chat(talk)


# --- streams of every kind of decoder ---

PIECES = ["a", "b", "##c", "▁d", "e</w>", " f", "'", "n't", ".", "▁", "-", "<pad>", " "]
DECODERS = {
    "none": None,
    "word pieces": decoders.WordPiece(cleanup=True),
    "metaspace": decoders.Metaspace(),
    "metaspace, never first": decoders.Metaspace(prepend_scheme="never"),
    "word ends": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "fuse": decoders.Fuse(),
    "spaces": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
}


@pytest.mark.parametrize("kind", DECODERS)
@quick
@given(ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=12))
def test_streams_add_up_for_every_decoder(kind: str, ids: list[int]) -> None:
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    if DECODERS[kind] is not None:
        backend.decoder = DECODERS[kind]
    tokenizer = Tokenizer(backend, {}, {}, ())
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize("style", STYLES)
@quick
@given(ids=st.lists(st.integers(0, 302), max_size=40))
@example([200] * 17 + [160, 60] * 3)
def test_streams_of_any_tokens_add_up(style: str, ids: list[int]) -> None:
    assert "".join(streamed(tiny(style), ids)) == tiny(style).decode(ids)


@quick
@given(data=st.binary(min_size=1, max_size=24))
def test_streams_of_any_bytes_add_up(data: bytes) -> None:
    tokenizer = tiny("sentencepiece")
    ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
    text = tokenizer.decode(ids)
    assert "".join(streamed(tokenizer, ids)) == text
    try:
        assert text == data.decode()
    except UnicodeDecodeError:
        assert "\ufffd" in text
    assert streamed(tokenizer, [*tokenizer.encode("é", False)[1:], ids[0]])[1] == "é"
