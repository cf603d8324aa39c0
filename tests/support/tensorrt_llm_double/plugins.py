"""The ChunkKV plugins as a network sees them: the fields they take and the outputs they have."""

from __future__ import annotations

from typing import Any

from support.tensorrt_llm_double.graph import Value

_SETTINGS = ("window", "sinks", "chunk_size", "boundaries", "pooling", "score", "keep_per_10k", "budget_tokens")
_SETTINGS += ("min_tokens", "window_reduce", "head_reduce", "value_norm")
_HEADS = ("num_heads", "num_kv_heads", "head_size")
FIELDS = {
    "ChunkKVPrepare": (*_SETTINGS, "max_length", "tokens_per_block", "vocab_size", "delimiter_bitmap"),
    "ChunkKVRope": (*_HEADS, "rotary_dim", "neox", "max_positions", "behind"),
    "ChunkKVScore": (*_SETTINGS, *_HEADS, "max_length"),
    "ChunkKVCompress": (
        *_SETTINGS,
        *_HEADS,
        *(
            "role",
            "layers",
            "layer_in_pool",
            "tokens_per_block",
            "kv_bytes",
            "max_length",
            "mapping_rank",
            "order_only",
        ),
    ),
}


def plugin_outputs(name: str, fields: dict[str, Any], inputs: list[Value]) -> list[tuple[str, tuple[int, ...]]]:
    """Return type and shape of each output; the number of inputs must be what the plugin takes."""
    delimiter = fields.get("boundaries") == "delimiter"
    batch, tokens = ("int32", (-1,)), ("int32", (-1,))
    if name == "ChunkKVPrepare":
        _takes(name, inputs, 7 + delimiter)
        return [batch, batch, batch, tokens, *([tokens] if delimiter else [])]
    if name == "ChunkKVRope":
        _takes(name, inputs, 3 + fields["behind"])
        return [(inputs[0].dtype, inputs[0].shape)]
    if name == "ChunkKVScore":
        _takes(name, inputs, 5 + delimiter)
        return [("float32", (-1,))]
    follower = fields["role"] == "follower"
    _takes(name, inputs, 10 + (delimiter and not follower))
    first = ("int32", (1,)) if fields["order_only"] else (inputs[0].dtype, inputs[0].shape)
    return [first, *([] if follower else [tokens])]


def _takes(name: str, inputs: list[Value], count: int) -> None:
    assert len(inputs) == count, f"{name} takes {count} inputs, got {[value.name for value in inputs]}"
