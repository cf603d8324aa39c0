"""What chunkkv-build answers to flags that belong to trtllm-build, or that TensorRT-LLM has elsewhere."""

from __future__ import annotations

# Flags that TensorRT-LLM has at another place, and that place.
TENSORRT_LLM_INSTEAD = {
    "dtype": "convert_checkpoint.py --dtype",
    "use_weight_only": "convert_checkpoint.py --use_weight_only",
    "weight_only_precision": "convert_checkpoint.py --weight_only_precision",
    "weight_only_activations": "convert_checkpoint.py --dtype, the type of its activations",
    "timing_cache": "--input_timing_cache and --output_timing_cache",
    "chunkkv_max_keep_ratio": "--chunkkv_keep_ratio: the share is part of the engine, no request can ask for more",
}
# Flags of trtllm-build that set nothing these engines have, or something that has only one value here.
TRTLLM_FLAGS_WITHOUT_MEANING = {
    *("model_config", "build_config", "model_cls_file", "model_cls_name", "max_beam_width", "opt_num_tokens"),
    *("max_encoder_input_len", "max_prompt_embedding_table_size", "max_multimodal_len", "kv_cache_type"),
    *("paged_kv_cache", "input_timing_cache", "output_timing_cache", "profiling_verbosity", "strip_plan"),
    *("weight_sparsity", "weight_streaming", "fast_build", "workers", "enable_debug_output", "visualize_network"),
    *("monitor_memory", "logits_dtype", "gather_context_logits", "gather_generation_logits"),
    *("gather_all_token_logits", "lora_dir", "lora_ckpt_source", "lora_target_modules", "max_lora_rank"),
    *("speculative_decoding_mode", "max_draft_len", "gpt_attention_plugin", "gemm_plugin", "nccl_plugin"),
    *("lora_plugin", "moe_plugin", "context_fmha", "remove_input_padding", "tokens_per_block"),
    *("use_paged_context_fmha", "use_fp8_context_fmha", "multiple_profiles", "reduce_fusion", "user_buffer"),
}
