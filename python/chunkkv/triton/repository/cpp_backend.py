"""What an engine with ChunkKV needs of TensorRT-LLM's own C++ backend: check.py looks for it, patch.py sets it."""

from __future__ import annotations

import re

BACKEND = "tensorrtllm"  # what config.pbtxt calls it
LOADER_LIBRARY = "libchunkkv_tensorrt_loader.so"  # the library that brings the ChunkKV plugins into tritonserver
IN_FLIGHT_BATCHING = "inflight_fused_batching"
NO_EVICTION = "guaranteed_no_evict"
# Decoding modes that take tokens back by cache length, which a compacted cache does not have.
SPECULATIVE_MODES = ("medusa", "eagle", "lookahead", "redrafter", "explicit_draft_tokens", "beam_search")


def is_speculative(decoding_mode: str) -> bool:
    """Return whether a value of `decoding_mode` names one of SPECULATIVE_MODES."""
    return any(mode in decoding_mode.lower() for mode in SPECULATIVE_MODES)


def is_placeholder(value: str) -> bool:
    """Return whether a value is one that TensorRT-LLM's fill_template.py has not replaced."""
    return value.startswith("${")


def whole_number(text: str) -> int | None:
    """Return a whole number, None where `text` is none; beyond 18 digits any is too large for a setting."""
    return int(text[:18]) if re.fullmatch("[0-9]+", text) else None


def attention_windows(value: str) -> list[int]:
    """Return the numbers in a value of `max_attention_window_size`: one for all layers, or one for each."""
    numbers = [] if is_placeholder(value) else re.findall("[0-9]+", value)
    return [window for number in numbers if (window := whole_number(number)) is not None]
