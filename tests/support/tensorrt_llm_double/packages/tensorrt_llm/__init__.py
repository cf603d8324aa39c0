"""TensorRT-LLM's package as ChunkKV meets it."""

from support.tensorrt_llm_double import VERSION

__version__ = VERSION

from tensorrt_llm import functional, layers, models
from tensorrt_llm.builder import BuildConfig, Builder, build
from tensorrt_llm.functional import Tensor, constant
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.network import Network, net_guard

__all__ = ["BuildConfig", "Builder", "Mapping", "Network", "Tensor", "build", "constant", "functional", "layers"]
__all__ += ["models", "net_guard"]
