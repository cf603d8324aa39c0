"""Layout `trtllm`: five models under the names, tensors and types of TensorRT-LLM's own repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chunkkv.triton.repository.config_text import Tensor, add_tensors, new_config, run_on_cpu, set_parameters
from chunkkv.triton.repository.write import BUDGET, COUNTS, TEXT_INPUTS, Model

PREPROCESSING_INPUTS: tuple[Tensor, ...] = (
    ("QUERY", "STRING", (1,)),
    ("REQUEST_OUTPUT_LEN", "INT32", (1,)),
    ("BAD_WORDS_DICT", "STRING", (-1,)),
    ("STOP_WORDS_DICT", "STRING", (-1,)),
    ("END_ID", "INT32", (1,)),
    ("PAD_ID", "INT32", (1,)),
)
PREPROCESSING_OUTPUTS: tuple[Tensor, ...] = (
    ("INPUT_ID", "INT32", (-1,)),
    ("REQUEST_INPUT_LEN", "INT32", (1,)),
    ("REQUEST_OUTPUT_LEN", "INT32", (-1,)),
    ("BAD_WORDS_IDS", "INT32", (2, -1)),
    ("STOP_WORDS_IDS", "INT32", (2, -1)),
    ("OUT_END_ID", "INT32", (1,)),
    ("OUT_PAD_ID", "INT32", (1,)),
)
# (name here, its name in the text models): what the ensemble hands through from its own inputs.
HANDED_ON = (
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
)
FROM_PREPROCESSING = (
    ("input_ids", "INPUT_ID"),
    ("input_lengths", "REQUEST_INPUT_LEN"),
    ("request_output_len", "REQUEST_OUTPUT_LEN"),
    ("end_id", "OUT_END_ID"),
    ("pad_id", "OUT_PAD_ID"),
    ("stop_words_list", "STOP_WORDS_IDS"),
    ("bad_words_list", "BAD_WORDS_IDS"),
)
ENGINE_SCALARS: tuple[Tensor, ...] = (
    ("input_lengths", "INT32", (1,)),
    ("request_output_len", "INT32", (1,)),
    *(
        (name, kind, (1,))
        for name, kind in (
            ("end_id", "INT32"),
            ("pad_id", "INT32"),
            ("beam_width", "INT32"),
            ("num_return_sequences", "INT32"),
            ("temperature", "FP32"),
            ("runtime_top_k", "INT32"),
            ("runtime_top_p", "FP32"),
            ("repetition_penalty", "FP32"),
            ("len_penalty", "FP32"),
            ("min_tokens", "INT32"),
            ("presence_penalty", "FP32"),
            ("frequency_penalty", "FP32"),
            ("seed", "UINT64"),
            ("exclude_input_in_output", "BOOL"),
            ("ignore_eos", "BOOL"),
            ("stop", "BOOL"),
            ("streaming", "BOOL"),
        )
    ),
    *BUDGET,
)
ENGINE_LISTS: tuple[Tensor, ...] = (
    ("input_ids", "INT32", (-1,)),
    ("stop_words_list", "INT32", (2, -1)),
    ("bad_words_list", "INT32", (2, -1)),
)
REPORTED: tuple[Tensor, ...] = (
    ("batch_index", "INT32", (1,)),
    ("sequence_index", "INT32", (1,)),
    ("finish_reason", "STRING", (1,)),
    *COUNTS,
)
TEXT = "chunkkv_text"  # the text of output_ids with all that came before: no later model can tell it from ids alone
ENGINE_OUTPUTS: tuple[Tensor, ...] = (
    ("output_ids", "INT32", (-1, -1)),
    ("sequence_length", "INT32", (-1,)),
    (TEXT, "STRING", (1,)),
    *REPORTED,
)
POSTPROCESSING_INPUTS: tuple[Tensor, ...] = (
    ("TOKENS_BATCH", "INT32", (-1, -1)),
    ("SEQUENCE_LENGTH", "INT32", (-1,)),
    (TEXT, "STRING", (1,)),
)
POSTPROCESSING_OUTPUTS: tuple[Tensor, ...] = (("OUTPUT", "STRING", (-1,)),)
TEXT_OUTPUTS: tuple[Tensor, ...] = (("text_output", "STRING", (-1,)), *REPORTED)
_ACCEPTED: tuple[Tensor, ...] = tuple(
    (f"return_num_{name}_tokens", "BOOL", (1,)) for name in ("input", "output")
)  # both counts always come


def trtllm(parameters: Mapping[str, object], bls_instances: int) -> list[Model]:
    """Return preprocessing, tensorrt_llm, postprocessing, tensorrt_llm_bls and ensemble for an engine directory."""
    engine_dir = parameters["engine_dir"]
    return [
        _step(
            "preprocessing",
            (PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS),
            ("QUERY", "REQUEST_OUTPUT_LEN"),
            {"tokenizer_dir": engine_dir, "max_prompt_bytes": parameters.get("max_prompt_bytes")},
        ),
        _engine(parameters),
        _step(
            "postprocessing",
            (POSTPROCESSING_INPUTS, POSTPROCESSING_OUTPUTS),
            ("TOKENS_BATCH", "SEQUENCE_LENGTH"),
            {"tokenizer_dir": engine_dir},
        ),
        _bls(bls_instances),
        Model(_ensemble(), None),
    ]


def _new(name: str, **fields: Any) -> Any:
    return new_config(name=name, max_batch_size=1, **fields)


def _step(
    name: str, tensors: tuple[tuple[Tensor, ...], ...], required: tuple[str, ...], parameters: Mapping[str, object]
) -> Model:
    config = _new(name, backend="python")
    add_tensors(config, tensors[0], required, tensors[1])
    run_on_cpu(config)
    set_parameters(config, parameters)
    return Model(config, f"chunkkv.triton.trtllm_{name}")


def _engine(parameters: Mapping[str, object]) -> Model:
    config = _new("tensorrt_llm", backend="python")
    config.model_transaction_policy.decoupled = True
    required = ("input_ids", "input_lengths", "request_output_len")
    add_tensors(config, (*ENGINE_LISTS, *ENGINE_SCALARS), required, ENGINE_OUTPUTS)
    scalars = {name for name, _, _ in ENGINE_SCALARS}
    for tensor in config.input:
        if tensor.name in scalars:
            tensor.reshape.SetInParent()  # an empty shape: clients send [B,1], the model sees [B]
        else:
            tensor.allow_ragged_batch = True
    run_on_cpu(config)
    set_parameters(config, {**parameters, "exclude_input_in_output": "true"})
    return Model(config, "chunkkv.triton.models.trtllm_engine")


def _bls(instances: int) -> Model:
    config = _new("tensorrt_llm_bls", backend="python")
    config.model_transaction_policy.decoupled = True
    add_tensors(config, (*TEXT_INPUTS, *_ACCEPTED), ("text_input", "max_tokens"), TEXT_OUTPUTS)
    run_on_cpu(config, instances)
    set_parameters(config, {"accumulate_tokens": "false", "tensorrt_llm_model_name": "tensorrt_llm"})
    return Model(config, "chunkkv.triton.models.trtllm_bls")


def _ensemble() -> Any:
    config = _new("ensemble", platform="ensemble")
    add_tensors(config, TEXT_INPUTS, ("text_input", "max_tokens"), TEXT_OUTPUTS)
    steps = config.ensemble_scheduling.step
    first = steps.add(model_name="preprocessing", model_version=-1)
    for name, source in (
        ("QUERY", "text_input"),
        ("REQUEST_OUTPUT_LEN", "max_tokens"),
        ("BAD_WORDS_DICT", "bad_words"),
        ("STOP_WORDS_DICT", "stop_words"),
        ("END_ID", "end_id"),
        ("PAD_ID", "pad_id"),
    ):
        first.input_map[name] = source
    for name, _, _ in PREPROCESSING_OUTPUTS:
        first.output_map[name] = f"_{name}"
    engine = steps.add(model_name="tensorrt_llm", model_version=-1)
    for name, source in FROM_PREPROCESSING:
        engine.input_map[name] = f"_{source}"
    for name, source in HANDED_ON:
        engine.input_map[name] = source
    for name in ("output_ids", "sequence_length", TEXT):
        engine.output_map[name] = f"_{name}"
    for name, _, _ in REPORTED:
        engine.output_map[name] = name
    last = steps.add(model_name="postprocessing", model_version=-1)
    for name, source in (("TOKENS_BATCH", "output_ids"), ("SEQUENCE_LENGTH", "sequence_length"), (TEXT, TEXT)):
        last.input_map[name] = f"_{source}"
    last.output_map["OUTPUT"] = "text_output"
    return config
