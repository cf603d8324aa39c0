"""trtllm-build."""

from __future__ import annotations

import argparse
import copy
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import SourceFileLoader
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tensorrt_llm._utils import mpi_rank, mpi_world_size
from tensorrt_llm.builder import BuildConfig, Engine, KVCacheType, build
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
from tensorrt_llm.plugin import PluginConfig, add_plugin_argument

_COUNTS = {"max_batch_size": 2048, "max_input_len": 1024, "max_beam_width": 1, "max_num_tokens": 8192, "workers": 1}
_COUNTS |= {"opt_num_tokens": None, "max_encoder_input_len": 1024, "max_draft_len": 0, "max_lora_rank": 64}
_TEXTS = {"checkpoint_dir": None, "model_config": None, "build_config": None, "model_cls_file": None}
_TEXTS |= {"model_cls_name": None, "output_dir": "engine_outputs", "input_timing_cache": None, "log_level": "info"}
_TEXTS |= {"output_timing_cache": "model.cache", "speculative_decoding_mode": None, "visualize_network": None}
_TEXTS |= {"lora_ckpt_source": "hf"}
_SWITCHES = ["strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output", "dry_run"]
_SWITCHES += ["monitor_memory"]
_SWITCHES += ["gather_context_logits", "gather_generation_logits", "gather_all_token_logits"]


def parse_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name, default in _TEXTS.items():
        parser.add_argument(f"--{name}", type=str, default=default)
    for name, value in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true", default=False)
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int, default=None)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    parser.add_argument("--kv_cache_type", type=lambda text: KVCacheType[text.upper()], default=None)
    parser.add_argument("--paged_kv_cache", choices=["enable", "disable"], default=None)
    parser.add_argument("--profiling_verbosity", choices=["layer_names_only", "detailed", "none"])
    parser.set_defaults(profiling_verbosity="layer_names_only")
    parser.add_argument("--logits_dtype", choices=["float16", "float32"], default=None)
    for name in ("lora_dir", "lora_target_modules"):
        parser.add_argument(f"--{name}", nargs="+", default=None)
    return add_plugin_argument(parser)


def build_model(
    build_config: BuildConfig,
    rank: int = 0,
    ckpt_dir: str | None = None,
    model_config: str | PretrainedConfig | None = None,
    model_cls: Any = None,
    **kwargs: Any,
) -> Engine:
    rank_config = copy.deepcopy(model_config)
    if kwargs.get("logits_dtype"):
        rank_config.logits_dtype = kwargs["logits_dtype"]
    model_cls = model_cls or MODEL_MAP[rank_config.architecture]
    rank_config.set_rank(rank)
    model = model_cls.from_checkpoint(ckpt_dir, config=rank_config)
    return build(model, build_config)


def build_and_save(
    rank: int, gpu_id: int, ckpt_dir: str, build_config: Any, output_dir: str, log_level: str, model_config: Any,
    model_cls: Any, **kwargs: Any,
) -> bool:  # fmt: skip
    engine = build_model(build_config, rank, ckpt_dir, model_config, model_cls=model_cls, **kwargs)
    assert engine is not None
    engine.save(output_dir)
    return True


def parallel_build(
    model_config: Any, ckpt_dir: str, build_config: Any, output_dir: str, workers: int, log_level: str,
    model_cls: Any, **kwargs: Any,
) -> None:  # fmt: skip
    rest = (ckpt_dir, build_config, output_dir, log_level, model_config, model_cls)
    ranks = range(model_config.mapping.world_size)
    if mpi_world_size() > 1:
        ranks = range(mpi_rank(), model_config.mapping.world_size, mpi_world_size())
    if workers == 1 or mpi_world_size() > 1:
        for rank in ranks:
            assert build_and_save(rank, rank % workers, *rest, **kwargs), "Engine building failed"
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_workers=workers) as pool:
        for future in [pool.submit(build_and_save, rank, rank % workers, *rest, **kwargs) for rank in ranks]:
            assert future.result()


def main() -> None:
    parser = parse_arguments()
    args = parser.parse_known_args()[0]
    if args.gather_all_token_logits:
        args.gather_context_logits = args.gather_generation_logits = True
    model_cls = None
    if args.model_cls_file is not None:
        assert args.model_cls_name is not None
        model_cls = getattr(SourceFileLoader("models", args.model_cls_file).load_module(), args.model_cls_name)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    model_config = PretrainedConfig.from_json_file(args.model_config or str(Path(args.checkpoint_dir) / "config.json"))
    kind = args.kv_cache_type
    if args.paged_kv_cache is not None:
        kind = KVCacheType.PAGED if args.paged_kv_cache == "enable" else KVCacheType.CONTINUOUS
    names = set(BuildConfig.__dataclass_fields__) - {"plugin_config", "kv_cache_type"}
    values = {name: value for name, value in vars(args).items() if name in names and value is not None}
    values |= {"kv_cache_type": kind, "use_strip_plan": args.strip_plan}
    values["speculative_decoding_mode"] = 1 if args.speculative_decoding_mode is None else 2
    build_config = BuildConfig.from_dict(values, PluginConfig.from_arguments(args))
    if args.build_config is not None:
        import json

        build_config = BuildConfig.from_dict(json.loads(Path(args.build_config).read_text(encoding="utf-8")))
    parallel_build(
        model_config, args.checkpoint_dir, build_config, args.output_dir, args.workers, args.log_level, model_cls,
        logits_dtype=args.logits_dtype,
    )  # fmt: skip
