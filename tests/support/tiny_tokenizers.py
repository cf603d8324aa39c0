"""Tiny tokenizers of the two kinds that checkpoints ship: byte-level BPE and SentencePiece-style BPE."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("the", "and", "is", "of", "key", "cache", "token", "in", "to", "that")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n"
    "{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def write_tokenizer(directory: Path, style: str) -> None:
    """Write tokenizer.json and tokenizer_config.json of `style` "byte_level" or "sentencepiece"."""
    make, bos, eos = {
        "byte_level": (byte_level, "<|begin|>", "<|end|>"),
        "sentencepiece": (sentencepiece, "<s>", "</s>"),
    }[style]
    make().save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": bos, "special": True} if style == "byte_level" else bos,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def byte_level() -> Tokenizer:
    """Return a byte-level BPE tokenizer as Llama 3 and Qwen have: a token for every byte, begin, end and pad."""
    specials = ["<|begin|>", "<|end|>", "<|pad|>"]
    vocab = {token: number for number, token in enumerate(specials)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    merges = _merges(vocab, [word for plain in WORDS for word in ("Ġ" + plain, plain)])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Return a BPE tokenizer as Llama 2 and Mistral have: ▁ for spaces, bytes as <0x..> where no piece fits."""
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: number for number, token in enumerate(specials)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for character in "▁abcdefghijklmnopqrstuvwxyz.,;:!?T":
        vocab[character] = len(vocab)
    merges = _merges(vocab, ["▁" + word for word in WORDS[:6]])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def _merges(vocab: dict[str, int], words: list[str]) -> list[tuple[str, str]]:
    """Add every prefix of `words` to `vocab`, and return the merges that build them letter by letter."""
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return merges
