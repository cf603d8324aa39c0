"""A request's tensors, by TensorRT-LLM's names, read as what the session understands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkkv.errors import RequestError
from chunkkv.sampling import SamplingParams

Read = Callable[[str], "np.ndarray | None"]  # a tensor by name, None where the request has none

# Inputs that TensorRT-LLM clients send and that change nothing at these values; any other value is refused.
NEUTRAL = {
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "min_tokens": (0, 1),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "length_penalty": (0.0, 1.0),
    "len_penalty": (0.0, 1.0),
    "return_log_probs": (False,),
}


# Fields of a request that are Triton's own.
_PROTOCOL = {"id", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"}


@dataclass(frozen=True)
class Wish:
    """What one request asks for, beside its prompt."""

    sampling: SamplingParams
    keep_ratio: float | None
    budget_tokens: int | None
    stream: bool
    echo: bool


def one(read: Read, name: str, default: Any = None) -> Any:
    """Return the one value of a tensor as plain Python, `default` where it is missing; raises RequestError for more.

    A float32 is read as the shortest decimal that it stands for, so that 0.7 means what it means in Python.
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


def text(value: bytes | str, name: str) -> str:
    """Return UTF-8 bytes as text; raises RequestError with the place of the first bad byte."""
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text: byte {value[error.start]:#04x} at {error.start}; send UTF-8"
        ) from None


def prompt_text(read: Read, name: str, max_bytes: int) -> str:
    """Return the prompt; raises RequestError where it is missing, too long or not UTF-8."""
    value = one(read, name)
    if value is None:
        raise RequestError(f"{name} is missing; give the prompt")
    size = len(value) if isinstance(value, bytes) else len(value.encode())
    if size > max_bytes:
        raise RequestError(
            f"{name} has {size} bytes; this server takes at most {max_bytes}: shorten it, or raise max_prompt_bytes"
        )
    return text(value, name)


def words(read: Read, name: str) -> tuple[str, ...]:
    """Return the non-empty strings of a tensor, which clients pad with empty ones."""
    array = read(name)
    found = () if array is None else (text(value, name) for value in array.reshape(-1))
    return tuple(word for word in found if word)


def refuse_unknown(parameters: str, known: Sequence[str]) -> None:
    """Raise RequestError for a field that is no input: the server hands it on as a parameter, in JSON, unread."""
    for name in json.loads(parameters or "{}"):
        if name not in _PROTOCOL and not name.startswith("triton_"):
            raise RequestError(f"there is no input {name!r}; known are {', '.join(known)}")


def wish(read: Read, stop: Sequence[str], eos_token_ids: frozenset[int], names: dict[str, str] | None = None) -> Wish:
    """Return what a request asks for; raises RequestError for a value out of range or that the engine cannot honour.

    `names` maps a name used here to the request's own where it differs.
    """
    named = names or {}

    def value(name: str, default: Any = None) -> Any:
        return one(read, named.get(name, name), default)

    for name, allowed in NEUTRAL.items():
        given = value(name)
        if given is not None and given not in allowed:
            raise RequestError(f"{name} is {given}; this engine does not have it: leave it out or give {allowed[0]}")
    end = value("end_id")
    if end is not None and end >= 0 and end not in eos_token_ids:
        raise RequestError(f"end_id is {end}; this model's end tokens are {sorted(eos_token_ids)}: leave it out")
    top_p = value("top_p", 1.0)
    sampling = SamplingParams(
        max_new_tokens=value("max_tokens", SamplingParams.max_new_tokens),
        temperature=value("temperature", 0.0),
        top_k=value("top_k", 0),
        top_p=1.0 if top_p == 0 else top_p,  # TensorRT-LLM's way to say off
        repetition_penalty=value("repetition_penalty", 1.0),
        seed=value("seed"),
        stop=tuple(stop),
        ignore_eos=value("ignore_eos", False),
    )
    keep_ratio, budget = value("keep_ratio"), value("budget_tokens")
    if keep_ratio is not None and math.isnan(keep_ratio):
        raise RequestError("keep_ratio is nan; give a number in (0, 1]")
    stream, echo = value("stream", False), not value("exclude_input_in_output", True)
    return Wish(sampling, keep_ratio, budget, stream, echo)
