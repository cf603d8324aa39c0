"""Reads the flags that go to trtllm-build: with its own parser where it is installed, else what can be known."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from chunkkv.command_line import UsageError
from chunkkv_builder.backends.tensorrt_llm.library import BuildCommand

_COUNTS = (
    *("max_batch_size", "max_input_len", "max_beam_width", "max_num_tokens", "opt_num_tokens", "workers"),
    *("max_encoder_input_len", "max_draft_len", "max_lora_rank", "tokens_per_block", "auto_parallel", "gpus_per_node"),
)
_TEXTS = (
    *("checkpoint_dir", "output_dir", "model_config", "build_config", "model_cls_file", "model_cls_name"),
    *("kv_cache_type", "paged_kv_cache", "input_timing_cache", "output_timing_cache", "profiling_verbosity"),
    *("log_level", "logits_dtype", "lora_ckpt_source", "speculative_decoding_mode"),
    *("gpt_attention_plugin", "gemm_plugin", "nccl_plugin", "lora_plugin", "moe_plugin", "context_fmha"),
    *("remove_input_padding", "use_paged_context_fmha", "use_fp8_context_fmha", "multiple_profiles"),
    *("reduce_fusion", "user_buffer", "streamingllm", "fuse_fp4_quant", "norm_quant_fusion", "pp_reduce_scatter"),
    *("bert_attention_plugin", "gemm_swiglu_plugin", "fp8_rowwise_gemm_plugin", "mamba_conv1d_plugin"),
    *("low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin", "bert_context_fmha_fp32_acc", "paged_state"),
    *("use_fused_mlp", "cluster_key"),
)
_SWITCHES = (
    *("strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output", "dry_run"),
    *("monitor_memory", "gather_context_logits", "gather_generation_logits", "gather_all_token_logits"),
)
_LISTS = ("lora_dir", "lora_target_modules")


def read_flags(arguments: Sequence[str], command: BuildCommand | None) -> tuple[argparse.Namespace, list[str]]:
    """Return trtllm-build's flags, and the words that nothing here knows.

    Parameters
    ----------
    arguments : sequence of str
        The words of trtllm-build's command line.
    command : BuildCommand or None
        trtllm-build, whose parser is used. Without it flags that were not given are absent from the result, and
        unknown words are returned; otherwise they raise UsageError.
    """
    if command is None:
        return _stand_in().parse_known_args(list(arguments))
    parser = command.parse_arguments()
    parser.error = _refuse  # type: ignore[method-assign]  # the parser is TensorRT-LLM's own
    return parser.parse_args(list(arguments)), []


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"trtllm-build says: {message}")


class _StandInParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(message)


def _stand_in() -> argparse.ArgumentParser:
    """Return a parser of the flags that both ends of the supported versions have."""
    parser = _StandInParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in _COUNTS:
        parser.add_argument(f"--{name}", type=int)
    for name in _TEXTS:
        parser.add_argument(f"--{name}")
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name in _LISTS:
        parser.add_argument(f"--{name}", nargs="+")
    parser.add_argument("--visualize_network", nargs="?", const="")  # a switch in 0.16, later a folder
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int)
    return parser
