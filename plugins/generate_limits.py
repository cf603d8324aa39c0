"""Writes include/chunkkv/limits.h from python/chunkkv/limits.py, so that the C++ code and Python allow the same values.

python plugins/generate_limits.py
"""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "python" / "chunkkv" / "limits.py"
HEADER = ROOT / "plugins" / "include" / "chunkkv" / "limits.h"
# The members of chunkkv_settings (params.h). Python has more settings; the native code does not know those.
NATIVE_SETTINGS = (
    "window",
    "sinks",
    "chunk_size",
    "boundaries",
    "pooling",
    "score",
    "window_reduce",
    "head_reduce",
    "value_norm",
    "heads",
    "keep_per_10k",
    "budget_tokens",
    "min_tokens",
    "budget_split",
    "local_policy",
    "reading_share_per_10k",
)
_HEAD = """\
// The values that settings may have, and the shapes that the score kernel is compiled for.
// Generated from python/chunkkv/limits.py by plugins/generate_limits.py: change that file and run this one again.
#pragma once

#include <cstdint>

namespace chunkkv::limits {

/// A setting is a whole number from `low` to `high`; where `words` is given it is the place of a word in that list.
struct Setting {
    const char* name;
    int32_t low, high;
    const char* const* words;
};

"""


def header_text() -> str:
    """Return the text of limits.h."""
    limits = runpy.run_path(str(SOURCE))
    words = [name for name in NATIVE_SETTINGS if name in limits["KERNEL_CHOICES"]]
    lines = []
    for name in words:
        choices = ", ".join(map(_quoted, limits["KERNEL_CHOICES"][name]))
        lines.append(f"inline constexpr const char* {_constant(name)}Words[] = {{{choices}}};")
    lines.append("")
    for name in NATIVE_SETTINGS:
        if name in words:
            low, high, list_of_words = 0, len(limits["KERNEL_CHOICES"][name]) - 1, f"{_constant(name)}Words"
        else:
            (low, high), list_of_words = limits["RANGES"][name], "nullptr"
        lines.append(f"inline constexpr Setting {_constant(name)}{{{_quoted(name)}, {low}, {high}, {list_of_words}}};")
    sizes = ", ".join(map(str, limits["KERNEL_HEAD_SIZES"]))
    lines += [
        "",
        f"inline constexpr int32_t kHeadSizes[] = {{{sizes}}};",
        f"inline constexpr int32_t kMaxGroup = {limits['KERNEL_MAX_GROUP']};  // query heads that share one KV head",
        f"inline constexpr int32_t kMaxLength = {limits['KERNEL_MAX_LENGTH']};  // tokens of a prompt",
    ]
    return _HEAD + "\n".join(lines) + "\n\n}  // namespace chunkkv::limits\n"


def _constant(name: str) -> str:
    """Return the C++ name of a setting: kChunkSize for chunk_size."""
    return "k" + "".join(part[0].upper() + part[1:] for part in name.split("_"))


def _quoted(text: str) -> str:
    return f'"{text}"'


if __name__ == "__main__":
    HEADER.write_text(header_text(), encoding="utf-8")
