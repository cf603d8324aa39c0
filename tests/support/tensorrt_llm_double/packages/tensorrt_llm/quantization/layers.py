"""Attention layers of quantised models, which call a gpt_attention of this module's own."""

from tensorrt_llm.functional import gpt_attention

__all__ = ["gpt_attention"]
