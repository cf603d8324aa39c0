"""Model classes by the architecture that a checkpoint names."""

from tensorrt_llm.models.decoders import GPTForCausalLM, LLaMAForCausalLM, QWenForCausalLM
from tensorrt_llm.models.modeling_utils import PretrainedConfig, PretrainedModel

MODEL_MAP = {
    "LlamaForCausalLM": LLaMAForCausalLM,
    "MistralForCausalLM": LLaMAForCausalLM,
    "Qwen2ForCausalLM": QWenForCausalLM,
    "Qwen3ForCausalLM": QWenForCausalLM,
    "GPTForCausalLM": GPTForCausalLM,
}
__all__ = ["MODEL_MAP", "GPTForCausalLM", "LLaMAForCausalLM", "PretrainedConfig", "PretrainedModel", "QWenForCausalLM"]
