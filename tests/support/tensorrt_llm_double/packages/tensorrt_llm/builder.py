"""From a model to an engine directory."""

from __future__ import annotations

import copy
import enum
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.tensorrt_llm_double import VERSION, machine

from tensorrt_llm._common import Network, net_guard
from tensorrt_llm.models import PretrainedConfig, PretrainedModel
from tensorrt_llm.plugin import PluginConfig


class KVCacheType(enum.Enum):
    CONTINUOUS, PAGED, DISABLED = "continuous", "paged", "disabled"


@dataclass
class BuildConfig:
    max_input_len: int = 1024
    max_seq_len: int | None = None
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    max_draft_len: int = 0
    speculative_decoding_mode: int = 1
    kv_cache_type: KVCacheType | None = None
    plugin_config: PluginConfig = field(default_factory=PluginConfig)
    dry_run: bool = False


@dataclass
class EngineConfig:
    pretrained_config: PretrainedConfig
    build_config: BuildConfig
    version: str = VERSION

    def to_dict(self) -> dict[str, Any]:
        own = self.build_config
        build = {**vars(own), "kv_cache_type": own.kv_cache_type.name, "plugin_config": vars(own.plugin_config)}
        return {"version": self.version, "pretrained_config": self.pretrained_config.to_dict(), "build_config": build}

    @classmethod
    def from_json_file(cls, config_file: str) -> EngineConfig:
        values = json.loads(Path(config_file).read_text(encoding="utf-8"))
        build = BuildConfig(**values["build_config"])
        build.kv_cache_type, build.plugin_config = KVCacheType[build.kv_cache_type], PluginConfig(**build.plugin_config)
        return cls(PretrainedConfig.from_dict(values["pretrained_config"]), build, values["version"])


class Engine:
    def __init__(self, config: EngineConfig, engine: bytes | None) -> None:
        self.config, self.engine = config, engine

    def save(self, engine_dir: str) -> None:
        folder, rank = Path(engine_dir), self.config.pretrained_config.mapping.rank
        if rank == 0:
            text = json.dumps(self.config.to_dict(), indent=4)
            (folder / "config.json").write_text(text, encoding="utf-8")
        if self.engine is not None:
            (folder / f"rank{rank}.engine").write_bytes(self.engine)

    @classmethod
    def from_dir(cls, engine_dir: str, rank: int = 0) -> Engine:
        config = EngineConfig.from_json_file(f"{engine_dir}/config.json")
        config.pretrained_config.mapping.rank = rank
        return cls(config, (Path(engine_dir) / f"rank{rank}.engine").read_bytes())


class Builder:
    def build_engine(self, network: Network, builder_config: Any, managed_weights: dict | None = None) -> bytes:
        for layer in network.trt_network.layers:
            known = layer.node.plugin is None or id(layer) in network._plugin_info
            assert known, f"{layer.node.name}: _add_plugin_info was not called"
        machine().networks.append(network.trt_network.graph)
        return network.trt_network.graph.to_bytes()


def build(model: PretrainedModel, build_config: BuildConfig) -> Engine:
    """Build the engine of one rank; a dry run stops before the engine itself."""
    build_config = copy.deepcopy(build_config)
    plugins, config = build_config.plugin_config, model.config
    plugins.decide(config.dtype)
    if build_config.max_seq_len is None:
        scaling = config.rotary_scaling or {}
        factor = 1 if scaling.get("rope_type") == "llama3" else scaling.get("factor", 1)
        build_config.max_seq_len = math.ceil(config.max_position_embeddings * factor)
    build_config.kv_cache_type = build_config.kv_cache_type or KVCacheType.PAGED
    plugins.paged_kv_cache = build_config.kv_cache_type is KVCacheType.PAGED
    builder, network = Builder(), Network(plugins)
    with net_guard(network):
        model.forward(**model.prepare_inputs(max_input_len=build_config.max_input_len, use_cache=True))
    engine = None
    if build_config.dry_run:
        machine().networks.append(network.trt_network.graph)
    else:
        engine = builder.build_engine(network, None)
    return Engine(EngineConfig(config, build_config), engine)
