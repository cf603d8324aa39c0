"""The models of each repository layout: `single`, one model, and `trtllm`, five under the names that TensorRT-LLM uses.

Every model has a batch dimension of 1, for clients that send each value as [[x]]; batching is the engine model's own
matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkkv.triton.repository import tensors
from chunkkv.triton.repository.config_text import add_tensors, new_config, run_on_cpu, set_parameters
from chunkkv.triton.repository.tensors import TensorSpec

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

LAYOUTS = ("single", "trtllm")
_MODELS = "chunkkv.triton.models"


@dataclass(frozen=True)
class RepositoryModel:
    """One model of a repository.

    Parameters
    ----------
    config : what its config.pbtxt says.
    module : name of the module that holds its class TritonPythonModel; None for an ensemble, which has no code.
    """

    config: ModelConfig
    module: str | None


def single_layout(parameters: Mapping[str, object]) -> list[RepositoryModel]:
    """Return the one model of layout `single`, text in and text out; `parameters` are those of the engine's model."""
    config = _python_config("chunkkv", tensors.SINGLE_INPUTS, ("text_input",), tensors.SINGLE_OUTPUTS, decoupled=True)
    set_parameters(config, parameters)
    return [RepositoryModel(config, f"{_MODELS}.single")]


def trtllm_layout(parameters: Mapping[str, object]) -> list[RepositoryModel]:
    """Return preprocessing, tensorrt_llm, postprocessing, tensorrt_llm_bls and ensemble.

    `parameters` are those of the engine's model; `engine_dir` is one of them.
    """
    preprocessing = _python_config(
        "preprocessing", tensors.PREPROCESSING_INPUTS, ("QUERY", "REQUEST_OUTPUT_LEN"), tensors.PREPROCESSING_OUTPUTS
    )
    max_prompt_bytes = parameters.get("max_prompt_bytes")
    set_parameters(preprocessing, {"tokenizer_dir": parameters["engine_dir"], "max_prompt_bytes": max_prompt_bytes})
    postprocessing = _python_config(
        "postprocessing",
        tensors.POSTPROCESSING_INPUTS,
        ("TOKENS_BATCH", "SEQUENCE_LENGTH"),
        tensors.POSTPROCESSING_OUTPUTS,
    )
    engine = {"tensorrt_llm_model_name": "tensorrt_llm"}
    set_parameters(postprocessing, {"tokenizer_dir": parameters["engine_dir"], **engine})
    return [
        RepositoryModel(preprocessing, f"{_MODELS}.trtllm_preprocessing"),
        RepositoryModel(_engine_config(parameters), f"{_MODELS}.trtllm_engine"),
        RepositoryModel(postprocessing, f"{_MODELS}.trtllm_postprocessing"),
        RepositoryModel(_bls_config(), f"{_MODELS}.trtllm_bls"),
        RepositoryModel(_ensemble_config(), None),
    ]


def _python_config(
    name: str,
    inputs: tuple[TensorSpec, ...],
    required: tuple[str, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    decoupled: bool = False,
) -> ModelConfig:
    """Return the configuration of a python model; a `decoupled` one may send any number of responses per request."""
    config = new_config(name, backend="python", max_batch_size=1)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    add_tensors(config, inputs, required, outputs)
    run_on_cpu(config)
    return config


def _engine_config(parameters: Mapping[str, object]) -> ModelConfig:
    inputs = (*tensors.ENGINE_LIST_INPUTS, *tensors.ENGINE_SCALAR_INPUTS)
    outputs = (*tensors.ENGINE_OUTPUTS, *tensors.LOG_PROB_OUTPUTS, *tensors.ABSENT_OUTPUTS)
    config = _python_config("tensorrt_llm", inputs, ("input_lengths", "request_output_len"), outputs, decoupled=True)
    scalars = {tensor.name for tensor in tensors.ENGINE_SCALAR_INPUTS}
    for tensor in config.input:
        if tensor.name in scalars:
            tensor.reshape.SetInParent()  # an empty shape: clients send [B,1], the model sees [B]
        else:
            tensor.allow_ragged_batch = True
    set_parameters(config, {**parameters, "exclude_input_in_output": "true"})
    return config


def _bls_config() -> ModelConfig:
    required = ("text_input", "max_tokens")
    outputs = (*tensors.TEXT_OUTPUTS, *tensors.LOG_PROB_OUTPUTS, *tensors.ABSENT_OUTPUTS)
    config = _python_config("tensorrt_llm_bls", tensors.BLS_INPUTS, required, outputs, decoupled=True)
    next(each for each in config.input if each.name == "num_return_sequences").reshape.SetInParent()  # as the original
    set_parameters(config, {"accumulate_tokens": "false", "tensorrt_llm_model_name": "tensorrt_llm"})
    return config


def _ensemble_config() -> ModelConfig:
    config = new_config("ensemble", platform="ensemble", max_batch_size=1)
    inputs = (
        *tensors.TEXT_INPUTS,
        *tensors.COUNT_REQUEST_INPUTS,
        *tensors.CLIENT_INPUTS,
        tensors.MIN_LENGTH_INPUT,
    )
    asked_for = (*tensors.LOG_PROB_OUTPUTS, *tensors.ABSENT_OUTPUTS)
    add_tensors(config, inputs, ("text_input", "max_tokens"), (*tensors.TEXT_OUTPUTS, *asked_for))
    steps = config.ensemble_scheduling.step
    preprocessing = steps.add(model_name="preprocessing", model_version=-1)
    for name, source in tensors.PREPROCESSING_FROM_REQUEST:
        preprocessing.input_map[name] = source
    for tensor in tensors.PREPROCESSING_OUTPUTS:
        preprocessing.output_map[tensor.name] = f"_{tensor.name}"
    engine = steps.add(model_name="tensorrt_llm", model_version=-1)
    for name, source in tensors.ENGINE_FROM_PREPROCESSING:
        engine.input_map[name] = f"_{source}"
    for name, source in tensors.ENGINE_FROM_REQUEST:
        engine.input_map[name] = source
    for _, name in tensors.POSTPROCESSING_FROM_ENGINE:
        engine.output_map[name] = f"_{name}"
    for tensor in (*tensors.REPORT_OUTPUTS, *asked_for):
        engine.output_map[tensor.name] = tensor.name
    postprocessing = steps.add(model_name="postprocessing", model_version=-1)
    for name, source in tensors.POSTPROCESSING_FROM_ENGINE:
        postprocessing.input_map[name] = f"_{source}"
    postprocessing.output_map["OUTPUT"] = "text_output"
    return config
