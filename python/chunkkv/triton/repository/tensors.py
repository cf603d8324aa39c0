"""The tensors of every model in the layouts `single` and `trtllm`: one table for those who declare and who read them.

In layout `trtllm`, names, types and dims are those of TensorRT-LLM's own repository, tensorrtllm_backend; the budget of
a request, `ignore_eos` and the counts are added to them.
"""

from __future__ import annotations

from typing import NamedTuple


class TensorSpec(NamedTuple):
    """A tensor as config.pbtxt declares it.

    Parameters
    ----------
    name : the tensor's name.
    data_type : Triton's name of the type, without `TYPE_`.
    dims : the shape without the batch dimension; -1 stands for any length. Default: one value.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)


# Pairs: the name of a step's input, and the name of the tensor that is handed to it.
TensorMap = tuple[tuple[str, str], ...]

BUDGET_INPUTS = (TensorSpec("keep_ratio", "FP32"), TensorSpec("budget_tokens", "INT32"))
SAMPLING_INPUTS = (
    TensorSpec("temperature", "FP32"),
    TensorSpec("top_k", "INT32"),
    TensorSpec("top_p", "FP32"),
    TensorSpec("repetition_penalty", "FP32"),
    TensorSpec("seed", "UINT64"),
    TensorSpec("end_id", "INT32"),
    TensorSpec("pad_id", "INT32"),
    TensorSpec("min_tokens", "INT32"),
    TensorSpec("presence_penalty", "FP32"),
    TensorSpec("frequency_penalty", "FP32"),
    # Accepted at the value that means "off", so that clients which always send them work.
    TensorSpec("beam_width", "INT32"),
    TensorSpec("num_return_sequences", "INT32"),
    TensorSpec("length_penalty", "FP32"),
)
TEXT_INPUTS = (
    TensorSpec("text_input", "STRING"),
    TensorSpec("max_tokens", "INT32"),
    TensorSpec("stop_words", "STRING", (-1,)),
    TensorSpec("bad_words", "STRING", (-1,)),
    TensorSpec("stream", "BOOL"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("ignore_eos", "BOOL"),
    *SAMPLING_INPUTS,
    *BUDGET_INPUTS,
)
# Clients ask with these for counts that every answer has anyway.
COUNT_REQUEST_INPUTS = (TensorSpec("return_num_input_tokens", "BOOL"), TensorSpec("return_num_output_tokens", "BOOL"))
# Of clients that measure servers of TensorRT-LLM: each response repeats the text so far; the least length of an answer.
BENCHMARK_INPUTS = (TensorSpec("accumulate_tokens", "BOOL"), TensorSpec("min_length", "INT32"))
COUNT_OUTPUTS = (
    TensorSpec("num_input_tokens", "INT32"),
    TensorSpec("num_output_tokens", "INT32"),
    TensorSpec("kept_tokens", "INT32"),
)

# Layout `single`: the model `chunkkv`.
SINGLE_INPUTS = (
    *TEXT_INPUTS,
    TensorSpec("add_special_tokens", "BOOL"),
    *COUNT_REQUEST_INPUTS,
    *BENCHMARK_INPUTS,
)
SINGLE_OUTPUTS = (
    TensorSpec("text_output", "STRING"),
    TensorSpec("output_ids", "INT32", (-1,)),
    TensorSpec("finish_reason", "STRING"),
    *COUNT_OUTPUTS,
    TensorSpec("kv_cache_bytes", "INT64"),
    TensorSpec("ttft_ms", "FP32"),
    TensorSpec("tpot_ms", "FP32"),
    TensorSpec("prefill_ms", "FP32"),
    TensorSpec("compress_ms", "FP32"),
)

# What clients of TensorRT-LLM send beside that. Before 0.20 the seed had the first name. Those behind return_log_probs
# ask for outputs that these models do not have, and are accepted when they are false.
CLIENT_INPUTS = (
    TensorSpec("random_seed", "UINT64"),
    TensorSpec("return_log_probs", "BOOL"),
    TensorSpec("return_context_logits", "BOOL"),
    TensorSpec("return_generation_logits", "BOOL"),
    TensorSpec("return_perf_metrics", "BOOL"),
    TensorSpec("return_kv_cache_reuse_stats", "BOOL"),
)
# The least length of an answer, as it was called before 0.20.
MIN_LENGTH_INPUT = TensorSpec("min_length", "INT32")

# The model `tensorrt_llm_bls`: the same inputs, with TensorRT-LLM's outputs.
BLS_INPUTS = (*SINGLE_INPUTS, *CLIENT_INPUTS)

# Layout `trtllm`: preprocessing, tensorrt_llm, postprocessing, and the models that join them, ensemble and BLS.
PREPROCESSING_INPUTS = (
    TensorSpec("QUERY", "STRING"),
    TensorSpec("REQUEST_OUTPUT_LEN", "INT32"),
    TensorSpec("BAD_WORDS_DICT", "STRING", (-1,)),
    TensorSpec("STOP_WORDS_DICT", "STRING", (-1,)),
    TensorSpec("END_ID", "INT32"),
    TensorSpec("PAD_ID", "INT32"),
)
PREPROCESSING_OUTPUTS = (
    TensorSpec("INPUT_ID", "INT32", (-1,)),
    TensorSpec("REQUEST_INPUT_LEN", "INT32"),
    TensorSpec("REQUEST_OUTPUT_LEN", "INT32", (-1,)),
    TensorSpec("BAD_WORDS_IDS", "INT32", (2, -1)),
    TensorSpec("STOP_WORDS_IDS", "INT32", (2, -1)),
    TensorSpec("OUT_END_ID", "INT32"),
    TensorSpec("OUT_PAD_ID", "INT32"),
)
PREPROCESSING_FROM_REQUEST: TensorMap = (
    ("QUERY", "text_input"),
    ("REQUEST_OUTPUT_LEN", "max_tokens"),
    ("BAD_WORDS_DICT", "bad_words"),
    ("STOP_WORDS_DICT", "stop_words"),
    ("END_ID", "end_id"),
    ("PAD_ID", "pad_id"),
)

ENGINE_SCALAR_INPUTS = (
    TensorSpec("input_lengths", "INT32"),
    TensorSpec("request_output_len", "INT32"),
    TensorSpec("end_id", "INT32"),
    TensorSpec("pad_id", "INT32"),
    TensorSpec("beam_width", "INT32"),
    TensorSpec("num_return_sequences", "INT32"),
    TensorSpec("temperature", "FP32"),
    TensorSpec("runtime_top_k", "INT32"),
    TensorSpec("runtime_top_p", "FP32"),
    TensorSpec("repetition_penalty", "FP32"),
    TensorSpec("len_penalty", "FP32"),
    TensorSpec("min_tokens", "INT32"),
    TensorSpec("presence_penalty", "FP32"),
    TensorSpec("frequency_penalty", "FP32"),
    TensorSpec("seed", "UINT64"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("ignore_eos", "BOOL"),
    TensorSpec("stop", "BOOL"),
    TensorSpec("streaming", "BOOL"),
    *COUNT_REQUEST_INPUTS,
    *BUDGET_INPUTS,
    *CLIENT_INPUTS,
    MIN_LENGTH_INPUT,
)
ENGINE_LIST_INPUTS = (
    TensorSpec("input_ids", "INT32", (-1,)),
    TensorSpec("stop_words_list", "INT32", (2, -1)),
    TensorSpec("bad_words_list", "INT32", (2, -1)),
)
REPORT_OUTPUTS = (
    TensorSpec("batch_index", "INT32"),
    TensorSpec("sequence_index", "INT32"),
    TensorSpec("finish_reason", "STRING"),
    *COUNT_OUTPUTS,
)
# The engine's model sends its text along, because later models cannot reconstruct it from the ids of one response: a
# character may be split between two responses, and a tokenizer may strip the space before the first token.
ENGINE_TEXT = "chunkkv_text"
# The answer's number in the engine's model, by which postprocessing, which Triton tells of a client that has left an
# ensemble, has it stopped.
ENGINE_ANSWER = "chunkkv_answer"
ENGINE_OUTPUTS = (
    TensorSpec("output_ids", "INT32", (-1, -1)),
    TensorSpec("sequence_length", "INT32", (-1,)),
    TensorSpec(ENGINE_TEXT, "STRING"),
    TensorSpec(ENGINE_ANSWER, "INT64"),
    *REPORT_OUTPUTS,
)
ENGINE_FROM_PREPROCESSING: TensorMap = (
    ("input_ids", "INPUT_ID"),
    ("input_lengths", "REQUEST_INPUT_LEN"),
    ("request_output_len", "REQUEST_OUTPUT_LEN"),
    ("end_id", "OUT_END_ID"),
    ("pad_id", "OUT_PAD_ID"),
    ("stop_words_list", "STOP_WORDS_IDS"),
    ("bad_words_list", "BAD_WORDS_IDS"),
)
ENGINE_FROM_REQUEST: TensorMap = (
    ("temperature", "temperature"),
    ("runtime_top_k", "top_k"),
    ("runtime_top_p", "top_p"),
    ("repetition_penalty", "repetition_penalty"),
    ("seed", "seed"),
    ("beam_width", "beam_width"),
    ("num_return_sequences", "num_return_sequences"),
    ("min_tokens", "min_tokens"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("len_penalty", "length_penalty"),
    ("exclude_input_in_output", "exclude_input_in_output"),
    ("streaming", "stream"),
    ("ignore_eos", "ignore_eos"),
    ("keep_ratio", "keep_ratio"),
    ("budget_tokens", "budget_tokens"),
    ("return_num_input_tokens", "return_num_input_tokens"),
    ("return_num_output_tokens", "return_num_output_tokens"),
    *((tensor.name, tensor.name) for tensor in (*CLIENT_INPUTS, MIN_LENGTH_INPUT)),
)

# In responses to requests with return_log_probs: the sum over the answer so far, and each of a response's own tokens.
LOG_PROB_OUTPUTS = (TensorSpec("cum_log_probs", "FP32", (-1,)), TensorSpec("output_log_probs", "FP32", (-1, -1)))
# Declared so that clients which list every output of TensorRT-LLM's models are served; no response has them, as in
# TensorRT-LLM where nobody asks for them, and a request that asks is refused.
ABSENT_OUTPUTS = (
    TensorSpec("context_logits", "FP32", (-1, -1)),
    TensorSpec("generation_logits", "FP32", (-1, -1, -1)),
    TensorSpec("kv_cache_alloc_new_blocks", "INT32"),
    TensorSpec("kv_cache_reused_blocks", "INT32"),
    TensorSpec("kv_cache_alloc_total_blocks", "INT32"),
    TensorSpec("arrival_time_ns", "INT64"),
    TensorSpec("first_scheduled_time_ns", "INT64"),
    TensorSpec("first_token_time_ns", "INT64"),
    TensorSpec("last_token_time_ns", "INT64"),
    TensorSpec("acceptance_rate", "FP32"),
    TensorSpec("total_accepted_draft_tokens", "INT32"),
    TensorSpec("total_draft_tokens", "INT32"),
)

POSTPROCESSING_INPUTS = (
    TensorSpec("TOKENS_BATCH", "INT32", (-1, -1)),
    TensorSpec("SEQUENCE_LENGTH", "INT32", (-1,)),
    TensorSpec(ENGINE_TEXT, "STRING"),
    TensorSpec(ENGINE_ANSWER, "INT64"),
)
POSTPROCESSING_OUTPUTS = (TensorSpec("OUTPUT", "STRING", (-1,)),)
POSTPROCESSING_FROM_ENGINE: TensorMap = (
    ("TOKENS_BATCH", "output_ids"),
    ("SEQUENCE_LENGTH", "sequence_length"),
    (ENGINE_TEXT, ENGINE_TEXT),
    (ENGINE_ANSWER, ENGINE_ANSWER),
)
TEXT_OUTPUTS = (TensorSpec("text_output", "STRING", (-1,)), *REPORT_OUTPUTS)
