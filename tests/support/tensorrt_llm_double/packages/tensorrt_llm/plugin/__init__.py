"""Which of TensorRT-LLM's own plugins a network uses."""

from tensorrt_llm.plugin.plugin import PluginConfig, add_plugin_argument

__all__ = ["PluginConfig", "add_plugin_argument"]
