"""From a model to an engine directory."""

from __future__ import annotations

import copy
import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorrt as trt

import tensorrt_llm
from tensorrt_llm.models.modeling_utils import PretrainedConfig, PretrainedModel
from tensorrt_llm.network import Network, net_guard
from tensorrt_llm.plugin import PluginConfig


class KVCacheType(enum.Enum):
    CONTINUOUS, PAGED, DISABLED = "continuous", "paged", "disabled"


@dataclass
class BuildConfig:
    max_input_len: int = 1024
    max_seq_len: int | None = None
    opt_batch_size: int = 8
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    opt_num_tokens: int | None = None
    max_prompt_embedding_table_size: int = 0
    kv_cache_type: KVCacheType | None = None
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    strongly_typed: bool = True
    profiling_verbosity: str = "layer_names_only"
    enable_debug_output: bool = False
    max_draft_len: int = 0
    speculative_decoding_mode: int = 1
    input_timing_cache: str | None = None
    output_timing_cache: str = "model.cache"
    weight_sparsity: bool = False
    weight_streaming: bool = False
    plugin_config: PluginConfig = field(default_factory=PluginConfig)
    use_strip_plan: bool = False
    max_encoder_input_len: int = 1024
    dry_run: bool = False
    visualize_network: Any = None
    monitor_memory: bool = False

    def to_dict(self) -> dict[str, Any]:
        values = dict(vars(self))
        for name in ("dry_run", "visualize_network"):
            values.pop(name)
        kind = self.kv_cache_type
        return {**values, "kv_cache_type": kind and kind.name, "plugin_config": self.plugin_config.to_dict()}

    @classmethod
    def from_dict(cls, config: dict[str, Any], plugin_config: PluginConfig | None = None) -> BuildConfig:
        values = {name: value for name, value in config.items() if name in cls.__dataclass_fields__}
        if isinstance(values.get("kv_cache_type"), str):
            values["kv_cache_type"] = KVCacheType[values["kv_cache_type"].upper()]
        plugins = values.pop("plugin_config", None)
        if plugin_config is None:
            plugin_config = PluginConfig.from_dict(plugins) if isinstance(plugins, dict) else plugins or PluginConfig()
        return cls(**values, plugin_config=plugin_config)


class EngineConfig:
    def __init__(self, pretrained_config: PretrainedConfig, build_config: BuildConfig, version: str) -> None:
        self.pretrained_config, self.build_config, self.version = pretrained_config, build_config, version

    def to_dict(self) -> dict[str, Any]:
        build, pretrained = self.build_config.to_dict(), self.pretrained_config.to_dict()
        build.pop("output_timing_cache")
        return {"version": self.version, "pretrained_config": pretrained, "build_config": build}

    @classmethod
    def from_json_file(cls, config_file: str) -> EngineConfig:
        values = json.loads(Path(config_file).read_text(encoding="utf-8"))
        pretrained = PretrainedConfig.from_dict(values["pretrained_config"])
        return cls(pretrained, BuildConfig.from_dict(values["build_config"]), values["version"])


class Engine:
    def __init__(self, config: EngineConfig, engine: bytes | None, managed_weights: dict | None = None) -> None:
        self.config, self.engine, self.managed_weights = config, engine, managed_weights or {}

    def save(self, engine_dir: str) -> None:
        folder, rank = Path(engine_dir), self.config.pretrained_config.mapping.rank
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            text = json.dumps(self.config.to_dict(), indent=4)
            (folder / "config.json").write_text(text, encoding="utf-8")
        if self.engine is not None:
            (folder / f"rank{rank}.engine").write_bytes(self.engine)

    @classmethod
    def from_dir(cls, engine_dir: str, rank: int = 0) -> Engine:
        folder = Path(engine_dir)
        config = EngineConfig.from_json_file(str(folder / "config.json"))
        config.pretrained_config.set_rank(rank)
        return cls(config, (folder / f"rank{rank}.engine").read_bytes())


class Builder:
    def __init__(self) -> None:
        self._logger = trt.Logger()
        self._trt_builder = trt.Builder(self._logger)

    def create_network(self) -> Network:
        return Network()._init(self._trt_builder.create_network())

    def build_engine(self, network: Network, builder_config: Any, managed_weights: dict | None = None) -> bytes:
        for layer in network.trt_network.layers:
            known = layer.type is not trt.LayerType.PLUGIN_V3 or id(layer) in network._plugin_info
            assert known, f"{layer.name}: _add_plugin_info was not called"
        return self._trt_builder.build_serialized_network(network.trt_network, builder_config)


def build(model: PretrainedModel, build_config: BuildConfig) -> Engine:
    """Build the engine of one rank; a dry run stops before the engine itself."""
    build_config = copy.deepcopy(build_config)
    plugins = build_config.plugin_config
    plugins.dtype = model.config.dtype
    if build_config.max_seq_len is None:
        scaling = model.config.rotary_scaling or {}
        kind = scaling.get("type", scaling.get("rope_type"))
        factor = 1 if kind in ("su", "longrope", "llama3") else scaling.get("factor", 1)
        build_config.max_seq_len = math.ceil(model.config.max_position_embeddings * factor)
    if build_config.kv_cache_type is None:
        build_config.kv_cache_type = KVCacheType.PAGED
    plugins.paged_kv_cache = build_config.kv_cache_type is KVCacheType.PAGED
    mode = model.config.quant_mode
    if plugins.use_paged_context_fmha and mode.has_int8_kv_cache():
        raise RuntimeError("paged context FMHA reads no int8 cache")
    if plugins.use_paged_context_fmha and mode.has_fp8_kv_cache() and not mode.has_fp8_qdq():
        raise RuntimeError("paged context FMHA reads an fp8 cache in fp8 models only")
    builder = Builder()
    network = builder.create_network()
    network.plugin_config = plugins
    with net_guard(network):
        inputs = model.prepare_inputs(
            max_batch_size=build_config.max_batch_size,
            max_input_len=build_config.max_input_len,
            max_seq_len=build_config.max_seq_len,
            max_num_tokens=build_config.max_num_tokens,
            use_cache=build_config.kv_cache_type is not KVCacheType.DISABLED,
            max_beam_width=build_config.max_beam_width,
            opt_num_tokens=build_config.opt_num_tokens,
            gather_context_logits=build_config.gather_context_logits,
        )
        model(**inputs)
    engine = None if build_config.dry_run else builder.build_engine(network, None)
    if build_config.dry_run:
        from support.tensorrt_llm_double import machine

        machine().networks.append(network.trt_network.graph)
    return Engine(EngineConfig(model.config, build_config, tensorrt_llm.__version__), engine)


__all__ = ["BuildConfig", "Builder", "Engine", "EngineConfig", "KVCacheType", "build"]
