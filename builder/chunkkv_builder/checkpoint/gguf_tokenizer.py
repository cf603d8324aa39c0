"""The tokenizer inside a GGUF file, rewritten as tokenizer.json, tokenizer_config.json and generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkkv.engine.fields import Fields
from chunkkv.errors import CheckpointError
from chunkkv.text.tokenizer import GENERATION_FILE, SETTINGS_FILE, TOKENIZER_FILE
from chunkkv_builder.checkpoint.gguf_file import Value
from chunkkv_builder.checkpoint.gguf_vocabulary import Vocabulary
from chunkkv_builder.checkpoint.pre_tokenizers import PRE_TOKENIZERS

_PREFIX = "tokenizer.ggml."
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where the file does not state them
_SPACE = "▁"


@dataclass(frozen=True)
class GgufTokenizer:
    """A model's tokenizer, as the files that Hugging Face's checkpoints have.

    Parameters
    ----------
    files : dict[str, str]
        Text of each file, by its name.
    bos_token_id : int or None
        The token that begins a text.
    eos_token_ids : tuple of int
        The tokens that end an answer.
    """

    files: dict[str, str]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def write(self, folder: Path) -> None:
        """Write the files to `folder`."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Kind:
    """What sets the two kinds of tokenizer apart.

    `model` is the BPE of tokenizer.json and `parts` what surrounds it there; `defaults` are ids of special tokens, and
    `begins` says whether a text gets the begin token, where the file does not say.
    """

    model: dict[str, Any]
    parts: dict[str, Any]
    defaults: dict[str, int]
    begins: bool


def read_tokenizer(metadata: Mapping[str, Value], source: str) -> GgufTokenizer | None:
    """Return the tokenizer of a GGUF file, None where it has none.

    Parameters
    ----------
    metadata : mapping
        The file's metadata.
    source : str
        What the file is called in errors.

    Raises
    ------
    CheckpointError
        For a kind of tokenizer or pre-tokenizer that is not read, and for missing, damaged or contradictory values.
    """
    values = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    fields = Fields(values, f"{source}: tokenizer.ggml", CheckpointError)
    if fields.get("model") in (None, "none", "no_vocab"):
        return None
    name = fields.text("model", ("gpt2", "llama"))
    vocabulary = Vocabulary(fields)
    kind = _byte_level(fields, vocabulary) if name == "gpt2" else _sentencepiece(fields, vocabulary)
    special = vocabulary.special_tokens(kind.defaults)
    added = {
        "bos_token": fields.flag("add_bos_token", default=kind.begins and "bos_token" in special),
        "eos_token": fields.flag("add_eos_token", default=False),
    }
    for role, is_added in added.items():
        if is_added and role not in special:
            raise fields.error(f"add_{role}", f"the file names no {role}, so it is damaged: convert the model again")
    ends = vocabulary.end_ids(special.get("eos_token"))
    template = Fields(metadata, source, CheckpointError).text("tokenizer.chat_template", default=None)
    frame = [special[role] if is_added else None for role, is_added in added.items()]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        **kind.parts,
        "post_processor": _frame(frame[0], frame[1], vocabulary.ids),
        "model": {**kind.model, "unk_token": special.get("unk_token"), "vocab": vocabulary.ids},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"add_{role}": is_added for role, is_added in added.items()},
        **special,
        **({} if template is None else {"chat_template": template}),
    }
    generation = {"eos_token_id": list(ends)} if ends else {}
    files = {TOKENIZER_FILE: tokenizer, SETTINGS_FILE: settings, GENERATION_FILE: generation}
    texts = {file: json.dumps(content, ensure_ascii=False) for file, content in files.items()}
    return GgufTokenizer(texts, vocabulary.ids[special["bos_token"]] if "bos_token" in special else None, ends)


def _bpe(merges: list[tuple[str, str]], **differences: bool) -> dict[str, Any]:
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, **differences, "merges": merges}


def _byte_level(fields: Fields, vocabulary: Vocabulary) -> _Kind:
    """A token for every byte, and merges: GPT-2, Llama 3, Qwen, SmolLM."""
    pre = PRE_TOKENIZERS[fields.text("pre", tuple(PRE_TOKENIZERS), default="default")]
    parts = {
        "normalizer": None if pre.normalizer is None else {"type": pre.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    model = _bpe(vocabulary.stated_merges(), ignore_merges=pre.ignore_merges)
    return _Kind(model, parts, {}, pre.begins)


def _sentencepiece(fields: Fields, vocabulary: Vocabulary) -> _Kind:
    """Pieces with scores, ▁ for a space, and tokens for single bytes: Llama 2, Mistral."""
    has_prefix = fields.flag("add_space_prefix", default=True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    restored = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [restored, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }
    model = _bpe(vocabulary.merges_by_score(), fuse_unk=True, byte_fallback=True)
    return _Kind(model, parts, _SENTENCEPIECE_IDS, begins=True)


def _frame(bos: str | None, eos: str | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the post-processor that puts the begin and end tokens around a text."""

    def around(*sequences: str) -> list[dict[str, Any]]:
        return [
            {kind: {"id": text, "type_id": 0}}
            for name in sequences
            for kind, text in (("SpecialToken", bos), ("Sequence", name), ("SpecialToken", eos))
            if text is not None
        ]

    if bos is None and eos is None:
        return None
    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (bos, eos) if text is not None}
    return {"type": "TemplateProcessing", "single": around("A"), "pair": around("A", "B"), "special_tokens": special}
