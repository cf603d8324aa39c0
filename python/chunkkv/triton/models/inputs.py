"""Reads a request's tensors, under TensorRT-LLM's names, as what the session understands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.errors import RequestError
from chunkkv.requests import Prompt
from chunkkv.sampling import SamplingParams
from chunkkv.triton.models.backend import ReadTensor
from chunkkv.triton.models.trtllm_sampling import tensorrt_llm_choice

# Inputs that TensorRT-LLM clients send and that change nothing at these values; any other value is refused.
NEUTRAL_VALUES = {
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (0.0, 1.0),
    "len_penalty": (0.0, 1.0),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "return_perf_metrics": (False,),
    "return_kv_cache_reuse_stats": (False,),
}
# Fields of a request that are Triton's own.
_PROTOCOL_FIELDS = {
    "id",
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "binary_data_output",
}


@dataclass(frozen=True)
class ParsedRequest:
    """What one request asks for.

    Parameters
    ----------
    prompt : text, or token ids.
    sampling : how tokens are chosen, and when the answer ends.
    keep_ratio : share of the prompt's KV cache that stays, in (0, 1]; None: the engine's own budget.
    budget_tokens : prompt tokens whose KV cache stays, at least 1; None: the engine's own budget.
    add_special_tokens : put the model's begin token before a text that does not have it.
    stream : send a response for each new piece of text, instead of one for the whole answer.
    echo : repeat the prompt before the answer.
    """

    prompt: Prompt
    sampling: SamplingParams
    keep_ratio: float | None
    budget_tokens: int | None
    add_special_tokens: bool
    stream: bool
    echo: bool


def parse_request(
    read: ReadTensor,
    prompt: Prompt,
    stop_words: Sequence[str],
    eos_token_ids: frozenset[int],
    vocab_size: int,
    *,
    stop_token_ids: Sequence[int] = (),
    excludes_input: bool = True,
    as_tensorrt_llm: bool = False,
    tensor_names: Mapping[str, str] | None = None,
) -> ParsedRequest:
    """Return what a request asks for.

    Parameters
    ----------
    read : reads the request's tensors.
    prompt : text or token ids, read already.
    stop_words : texts that end the answer, read already.
    eos_token_ids : the engine's end tokens; a request may name one of them as `end_id`, which changes nothing.
    vocab_size : number of tokens; an `end_id` that is none means that no token ends the answer.
    stop_token_ids : tokens that end the answer. Default: none but the end tokens.
    excludes_input : value of `exclude_input_in_output` for a request that does not give it. Default: True.
    as_tensorrt_llm : read temperature, top_k, top_p, penalties and seed as TensorRT-LLM does. Default: False.
    tensor_names : tensors that this model has under another name: {name in layout `single`: name here}. Default: none.

    Raises RequestError for a value out of range, and for one that asks for what the engine does not have.
    """
    renamed = tensor_names or {}

    def value(name: str, default: Any = None) -> Any:
        return scalar(read, renamed.get(name, name), default)

    _refuse_what_is_missing(value)
    end_id = value("end_id", -1)
    if 0 <= end_id < vocab_size and end_id not in eos_token_ids:
        raise RequestError(f"end_id is {end_id}; this model's end tokens are {sorted(eos_token_ids)}: leave it out")
    ends_nowhere = value("ignore_eos", False) or end_id >= vocab_size
    sampling = SamplingParams(
        max_new_tokens=value("max_tokens", SamplingParams.max_new_tokens),
        min_tokens=value("min_tokens", value("min_length", 0)),
        stop=tuple(stop_words),
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=ends_nowhere,
        logprobs=value("return_log_probs", False),
        **(tensorrt_llm_choice if as_tensorrt_llm else _choice)(value),
    )
    keep_ratio = value("keep_ratio")
    if keep_ratio is not None and math.isnan(keep_ratio):
        raise RequestError("keep_ratio is nan; give a number in (0, 1]")
    return ParsedRequest(
        prompt=prompt,
        sampling=sampling,
        keep_ratio=keep_ratio,
        budget_tokens=value("budget_tokens"),
        add_special_tokens=value("add_special_tokens", True),
        stream=value("stream", False),
        echo=not value("exclude_input_in_output", excludes_input),
    )


def _choice(value: Callable[..., Any]) -> dict[str, Any]:
    """Return how tokens are chosen; `value` reads an input by name, with its default."""
    top_p = value("top_p", 1.0)
    return {
        "temperature": value("temperature", 0.0),
        "top_k": value("top_k", 0),
        "top_p": 1.0 if top_p == 0 else top_p,  # 0 is TensorRT-LLM's way to say off
        "repetition_penalty": value("repetition_penalty", 1.0),
        "presence_penalty": value("presence_penalty", 0.0),
        "frequency_penalty": value("frequency_penalty", 0.0),
        "seed": value("seed", value("random_seed")),
    }


def _refuse_what_is_missing(value: Callable[[str], Any]) -> None:
    """Raise RequestError for an input that asks for what the engine does not have; `value` reads one by name."""
    for name, allowed in NEUTRAL_VALUES.items():
        asked = value(name)
        if asked is not None and asked not in allowed:
            raise RequestError(f"{name} is {asked}; this engine does not have it: leave it out or give {allowed[0]}")


def scalar(read: ReadTensor, name: str, default: Any = None) -> Any:
    """Return the one value of a tensor as bool, int, float or bytes, or `default` where the request has none.

    A float32 is read as the shortest decimal that it stands for, so that 0.7 means what it means in Python. Raises
    RequestError for a tensor of more or fewer values.
    """
    array = read(name)
    if array is None:
        return default
    if array.size != 1:
        raise RequestError(f"{name} has {array.size} values; give one")
    value = array.reshape(-1)[0]
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def strings(read: ReadTensor, name: str) -> tuple[str, ...]:
    """Return the strings of a tensor without empty ones, with which clients pad; raises RequestError for bad UTF-8."""
    array = read(name)
    texts = () if array is None else (_decode(value, name) for value in array.reshape(-1))
    return tuple(text for text in texts if text)


def prompt_text(read: ReadTensor, name: str, max_bytes: int) -> str:
    """Return the prompt; raises RequestError where it is missing, longer than `max_bytes` or not UTF-8."""
    value = scalar(read, name)
    if value is None:
        raise RequestError(f"{name} is missing; give the prompt")
    size = len(value) if isinstance(value, bytes) else len(value.encode())
    if size > max_bytes:
        raise RequestError(
            f"{name} has {size} bytes; this server takes at most {max_bytes}: shorten it, or raise max_prompt_bytes"
        )
    return _decode(value, name)


def refuse_unknown_fields(parameters: str, inputs: Sequence[str]) -> None:
    """Raise RequestError for a field of a request that is no input of the model.

    Parameters
    ----------
    parameters : the request's parameters, a JSON object; Triton puts every field there that it does not know.
    inputs : names of the model's inputs.
    """
    for name in json.loads(parameters or "{}"):
        if name not in _PROTOCOL_FIELDS and not name.startswith("triton_"):
            raise RequestError(f"there is no input {name!r}; known are {', '.join(inputs)}")


def pack_word_lists(words: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the token ids of words as TensorRT-LLM's word list, int32 [2, n] with n at least 1.

    Row 0 has the ids of all words one after the other, padded with 0, and row 1 where each word ends, padded with -1.
    """
    ids = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    size = max(len(ids), len(ends), 1)
    packed = np.zeros((2, size), np.int32)
    packed[1] = -1
    packed[0, : len(ids)] = ids
    packed[1, : len(ends)] = ends
    return packed


def unpack_word_lists(array: np.ndarray | None, name: str) -> list[list[int]]:
    """Return the token ids of each word in a word list [2, n] or [1, 2, n], which pack_word_lists describes.

    Raises RequestError for another shape, and for ends that do not ascend within the list.
    """
    if array is None or array.size == 0:
        return []
    if array.size % 2 or array.ndim < 2 or array.shape[-2] != 2:
        raise RequestError(f"{name} has shape {list(array.shape)}; give [2,n]: ids and ends")
    ids, ends = array.reshape(2, -1).tolist()
    ends = [end for end in ends if end >= 0]
    if ends != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= len(ids)):
        raise RequestError(f"{name} has ends {ends}; they must ascend from 1 to at most {len(ids)}")
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _decode(value: bytes | str, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text: byte {value[error.start]:#04x} at {error.start}; send UTF-8"
        ) from None
