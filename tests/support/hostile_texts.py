"""Texts that tokenizers disagree on: odd spaces, digits of other scripts, joined emoji, names of special tokens."""

from __future__ import annotations

import random

TEXTS = (
    "Hello, world!", " leading", "trailing ", "tabs\t\tand\nnewlines\r\n\r\n", "1234567890 3.14159 1,000,000",
    "don't I'LL we've 'S", "日本語テキスト", "العربية", "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈", "zero\u200bwidth\u200d\ufeff",
    "é e\u0301 ﬁ ǅ",
    "\x00\x01\x7f", "a" * 300, " " * 50, "\n" * 20, "½ ² ٣ Ⅷ 一", "http://x.y/z?q=1&b=%20",
    "def f(x):\n    return x**2\n", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\ud7ff\ue000\U0010ffff", "ſ's 'ſ", "▁under▁", "Ġspace",
    "\u00a0nbsp\u3000ideo", "\u0300\u0301", "'s't're", "", "<s>[INST] hi [/INST]</s>", "<0x0A>", "<unk><s></s>",
    "<|begin|>x<|end|>", "<|im_start|>user\nhi<|im_end|>", "<|im_", "the key of the cache is that token",
)  # fmt: skip
_MIX = "abcXYZ 019.,!?'\n\t\r éßñ日本한글😀👍\u200d\u0301½٣<|>_▁Ġ-+=$^~\x00\u00a0"
_RANGES = ((0x20, 0x2000), (0x2000, 0xD800), (0xE000, 0x20000))


def hostile_texts(count: int = 400) -> list[str]:
    """Return TEXTS and `count` random ones, always the same: half of a small mix, half of all of Unicode."""
    draw = random.Random(0)
    mixed = ["".join(draw.choice(_MIX) for _ in range(draw.randint(1, 40))) for _ in range(count // 2)]
    wide = [
        "".join(chr(draw.randrange(*draw.choice(_RANGES))) for _ in range(draw.randint(1, 20)))
        for _ in range(count - len(mixed))
    ]
    return [*TEXTS, *mixed, *wide]
