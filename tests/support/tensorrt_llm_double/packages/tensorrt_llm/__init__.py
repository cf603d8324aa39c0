"""TensorRT-LLM's package as ChunkKV meets it; the generation is the machine's."""

from support.tensorrt_llm_double import VERSIONS, machine

__version__ = VERSIONS[machine().generation][0]

from tensorrt_llm import functional, layers, models
from tensorrt_llm.builder import BuildConfig, Builder, build
from tensorrt_llm.functional import Tensor, constant
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.network import Network, net_guard

__all__ = ["BuildConfig", "Builder", "Mapping", "Network", "Tensor", "build", "constant", "functional", "layers"]
__all__ += ["models", "net_guard"]
