"""trtllm-build."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from tensorrt_llm._utils import mpi_world_size
from tensorrt_llm.builder import BuildConfig, KVCacheType, build
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
from tensorrt_llm.plugin import PluginConfig, add_plugin_argument


def parse_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("checkpoint_dir", "model_config", "speculative_decoding_mode", "input_timing_cache", "lora_dir"):
        parser.add_argument(f"--{name}")
    for name in ("max_batch_size", "max_input_len", "max_beam_width", "max_num_tokens", "max_seq_len", "max_draft_len"):
        parser.add_argument(f"--{name}", type=int, default=getattr(BuildConfig, name))
    parser.add_argument("--output_dir", default="engine_outputs")
    parser.add_argument("--output_timing_cache", default="model.cache")
    parser.add_argument("--log_level", default="info")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--kv_cache_type", type=lambda text: KVCacheType[text.upper()])
    parser.add_argument("--paged_kv_cache", choices=["enable", "disable"])
    add_plugin_argument(parser)
    return parser


def main() -> None:
    args = parse_arguments().parse_known_args()[0]
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = args.model_config or f"{args.checkpoint_dir}/config.json"
    names = BuildConfig.__dataclass_fields__.keys() & vars(args).keys()
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    build_config = BuildConfig(**values, plugin_config=PluginConfig.from_arguments(args))
    config = PretrainedConfig.from_json_file(file)
    assert args.workers == mpi_world_size() == 1
    for rank in range(config.mapping.world_size):
        own = copy.deepcopy(config)
        own.mapping.rank = rank
        build(MODEL_MAP[own.architecture].from_checkpoint(args.checkpoint_dir, own), build_config).save(args.output_dir)
