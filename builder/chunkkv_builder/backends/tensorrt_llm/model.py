"""What config.json of a TensorRT-LLM checkpoint says that matters to ChunkKV, and what of it is not supported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkkv.engine.directory import CONFIG_FILE
from chunkkv.engine.fields import Fields
from chunkkv.engine.json_files import read_object
from chunkkv.errors import CheckpointError, ConfigError
from chunkkv.gpu.tensorrt_plugins import check_head_sizes

POSITION_TYPES = ("rope_gpt_neox", "rope_gptj", "yarn", "learned_absolute")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
DTYPES = ("float16", "bfloat16")
KV_QUANTISATIONS = {None: None, "INT8": "int8", "FP8": "fp8"}
_CONVERT = "convert_checkpoint.py"
_NO_SUCH_ATTENTION = {
    "EncoderModel": "its encoder is not a decoder",
    "DecoderModel": "it has cross attention",
    "WhisperEncoder": "its encoder is not a decoder",
    "DeepseekV2ForCausalLM": "it has multi-head latent attention",
    "DeepseekV3ForCausalLM": "it has multi-head latent attention",
    "CogVLMForCausalLM": "it has an attention layer of its own",
    "MambaForCausalLM": "it has recurrent layers",
    "RecurrentGemmaForCausalLM": "it has recurrent layers",
    "MedusaForCausalLm": "it decodes speculatively",
    "EagleForCausalLM": "it decodes speculatively",
    "ReDrafterForCausalLM": "it decodes speculatively",
}


@dataclass(frozen=True)
class LlmModel:
    """The model of a TensorRT-LLM checkpoint.

    Parameters
    ----------
    architecture : str
        TensorRT-LLM's class of the model.
    dtype : str
        Type of weights and activations, one of DTYPES.
    num_layers : int
        Decoder layers of all pipeline stages.
    num_heads, num_kv_heads, head_size : int
        Query heads and KV heads of all tensor-parallel ranks, and the width of a head.
    vocab_size : int
        Tokens of the vocabulary.
    max_positions : int
        Positions that config.json has without rotary_scaling: the rows of the model's own rotary table.
    default_max_seq_len : int
        What trtllm-build takes for --max_seq_len where it is left out.
    sliding_window : int or None
        Tokens that attention sees back; None for all.
    kv_quantisation : str or None
        A key of KV_QUANTISATIONS; None keeps the cache in `dtype`.
    tp_size, pp_size : int
        Number of tensor-parallel ranks, and of pipeline stages.
    """

    architecture: str
    dtype: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_positions: int
    default_max_seq_len: int
    sliding_window: int | None
    kv_quantisation: str | None
    tp_size: int
    pp_size: int

    @classmethod
    def read(cls, checkpoint_dir: str | Path) -> LlmModel:
        """Read config.json of a checkpoint directory, or a config.json itself.

        Raises CheckpointError where there is none, ConfigError for a model that ChunkKV does not support.
        """
        path = Path(checkpoint_dir)
        file = path if path.suffix == ".json" else path / CONFIG_FILE
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist: give the output directory of {_CONVERT}")
        return cls.from_values(read_object(file, CheckpointError), str(file))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str) -> LlmModel:
        """Return the model that `values` (config.json, or the to_dict of TensorRT-LLM's PretrainedConfig) describe."""
        if "architectures" in values and "architecture" not in values:
            raise ConfigError(f"{source} is that of a Hugging Face checkpoint: convert it with {_CONVERT} first")
        fields = Fields(values, source)
        heads = fields.integer("num_attention_heads")
        mapping = Fields(values.get("mapping") or {}, f"{source}: mapping")
        if mapping.integer("cp_size", default=1) != 1:
            raise mapping.error("cp_size", f"allowed is 1: convert again ({_CONVERT} --cp_size 1)")
        quantisation = Fields(values.get("quantization") or {}, f"{source}: quantization").get("kv_cache_quant_algo")
        model = cls(
            architecture=fields.text("architecture"),
            dtype=fields.text("dtype"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", default=heads),
            head_size=fields.integer("head_size", default=max(fields.integer("hidden_size") // heads, 1)),
            vocab_size=fields.integer("vocab_size"),
            max_positions=fields.integer("max_position_embeddings"),
            default_max_seq_len=_default_max_seq_len(fields),
            sliding_window=_sliding_window(fields),
            kv_quantisation=_named(quantisation),
            tp_size=mapping.integer("tp_size", default=1),
            pp_size=mapping.integer("pp_size", default=1),
        )
        _check_attention(model, fields)
        return model

    def check_weights(self, checkpoint_dir: str | Path) -> None:
        """Raise CheckpointError where a rank's weights are missing; a config.json alone is built without weights."""
        path = Path(checkpoint_dir)
        if path.suffix == ".json":
            return
        for rank in range(self.tp_size * self.pp_size):
            if not (path / f"rank{rank}.safetensors").is_file():
                raise CheckpointError(
                    f"{path / f'rank{rank}.safetensors'} is missing of {self.tp_size * self.pp_size} ranks (tp_size "
                    f"{self.tp_size}, pp_size {self.pp_size}): give the whole output directory of {_CONVERT}"
                )

    @property
    def stretched_positions(self) -> int:
        """Positions that the model has, those of linear and YaRN scaling included."""
        return max(self.max_positions, self.default_max_seq_len)

    @property
    def kv_dtype(self) -> str:
        """The type of a cached number."""
        return KV_QUANTISATIONS[self.kv_quantisation] or self.dtype

    @property
    def heads_per_rank(self) -> tuple[int, int]:
        """Query and KV heads of one tensor-parallel rank; a KV head is repeated where there are more ranks."""
        return self.num_heads // self.tp_size, max(self.num_kv_heads // self.tp_size, 1)


def _check_attention(model: LlmModel, fields: Fields) -> None:
    """Raise ConfigError where the model's attention is not what the wrapper and the plugins can do."""
    if reason := _NO_SUCH_ATTENTION.get(model.architecture):
        raise fields.error("architecture", f"{reason}: build this model with trtllm-build, without ChunkKV")
    if model.dtype not in DTYPES:
        raise fields.error("dtype", f"allowed is {' or '.join(DTYPES)}: convert again ({_CONVERT} --dtype bfloat16)")
    kind = _named(fields.get("position_embedding_type") or "learned_absolute")
    if kind not in POSITION_TYPES:
        raise fields.error(
            "position_embedding_type",
            f"allowed is {', '.join(POSITION_TYPES)}: with others the tokens that stay would get wrong positions",
        )
    if _scaling_name(fields.get("rotary_scaling")) not in (*ROPE_SCALINGS, "default"):
        raise fields.error("rotary_scaling", f"the rotary scalings allowed are {', '.join(ROPE_SCALINGS)}")
    if model.kv_quantisation not in list(KV_QUANTISATIONS):
        raise fields.error("quantization", f"a KV cache may be of {', '.join(DTYPES)}, INT8 or FP8: convert again")
    if model.num_heads % model.num_kv_heads:
        raise fields.error("num_key_value_heads", f"it must divide num_attention_heads, {model.num_heads}")
    if model.num_heads % model.tp_size:
        raise fields.error("num_attention_heads", f"it must be a multiple of tp_size, {model.tp_size}")
    if fields.get("attn_logit_softcapping"):
        raise fields.error("attn_logit_softcapping", "the scoring kernels cap no logits: this model is not supported")
    if fields.get("query_pre_attn_scalar") not in (None, model.head_size):
        raise fields.error("query_pre_attn_scalar", f"the scoring kernels scale by head_size, {model.head_size}, only")
    if "recurrent" in str(fields.get("layer_types")):
        raise fields.error("layer_types", "recurrent layers have no KV cache: this model is not supported")
    check_head_sizes(model.head_size, *model.heads_per_rank, advice="build it with trtllm-build, without ChunkKV")


def _default_max_seq_len(fields: Fields) -> int:
    """Return what trtllm-build takes for --max_seq_len where it is not given: it stretches by the scaling's factor."""
    scaling, positions = fields.get("rotary_scaling"), fields.integer("max_position_embeddings")
    if not isinstance(scaling, Mapping) or _scaling_name(scaling) == "llama3":
        return positions
    return math.ceil(positions * Fields(scaling, f"{fields.source}: rotary_scaling").number("factor", default=1.0))


def _scaling_name(scaling: Any) -> Any:
    if isinstance(scaling, Mapping):
        return scaling.get("rope_type") or scaling.get("type") or "none"
    return scaling or "none"


def _sliding_window(fields: Fields) -> int | None:
    return None if fields.get("use_sliding_window") is False else fields.integer("sliding_window", default=None)


def _named(value: Any) -> Any:
    """Return the name of an enum's value, as config.json has it."""
    return getattr(value, "name", value)
