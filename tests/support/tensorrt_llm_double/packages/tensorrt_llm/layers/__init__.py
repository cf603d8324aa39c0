"""The layers of models."""

from tensorrt_llm.layers.attention import Attention, AttentionParams, KeyValueCacheParams
from tensorrt_llm.layers.basic import MLP, ColumnLinear, Embedding, GatedMLP, LayerNorm, RmsNorm, RowLinear

__all__ = ["MLP", "Attention", "AttentionParams", "ColumnLinear", "Embedding", "GatedMLP", "KeyValueCacheParams"]
__all__ += ["LayerNorm", "RmsNorm", "RowLinear"]
