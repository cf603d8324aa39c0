"""Which of TensorRT-LLM's own plugins a network uses."""

from tensorrt_llm.plugin.plugin import ContextFMHAType, PluginConfig, add_plugin_argument

__all__ = ["ContextFMHAType", "PluginConfig", "add_plugin_argument"]
