"""What must hold for a ChunkKV engine of TensorRT-LLM, each with the flag of trtllm-build that makes it hold.

The builder looks the names up in flags, in a BuildConfig and in the PluginConfig of a network; `chunkkv doctor` in the
config.json of a built engine. A name that a version of TensorRT-LLM does not have is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import ConfigError

_OFF = (None, False, 0, "none", "disable", "disabled")
_ATTENTION_DTYPES = ("auto", "float16", "bfloat16")
_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Precondition:
    """One value that ChunkKV needs.

    Parameters
    ----------
    name : str
        A flag of trtllm-build, or a keyword of gpt_attention.
    allowed : str
        The values that are allowed, in words, and why.
    remedy : str
        What to change, as an imperative: "give --max_beam_width 1".
    holds : callable
        Returns whether a value is allowed. Values are those of TensorRT-LLM: numbers, text, enum members, tensors.
    """

    name: str
    allowed: str
    remedy: str
    holds: Callable[[Any], bool]


def _off(name: str, why: str, remedy: str = "") -> Precondition:
    return Precondition(name, f"none ({why})", remedy or f"leave --{name} out", lambda value: value in _OFF)


def _disabled(name: str, why: str) -> Precondition:
    return Precondition(name, f"disable ({why})", f"give --{name} disable", lambda value: value in _OFF)


def _enabled(name: str, why: str) -> Precondition:
    return Precondition(name, f"enable ({why})", f"give --{name} enable", lambda value: value in (True, None))


def _at_most_one(name: str, why: str) -> Precondition:
    return Precondition(name, f"1 ({why})", f"give --{name} 1", lambda value: value in (None, 0, 1))


def _is_power_of_two(value: Any) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


BUILD_PRECONDITIONS = (
    Precondition(
        "gpt_attention_plugin",
        "float16 or bfloat16 (ChunkKV stands behind that plugin)",
        "give --gpt_attention_plugin auto",
        lambda value: value in _ATTENTION_DTYPES,
    ),
    _enabled("remove_input_padding", "the plugins read packed tokens"),
    Precondition(
        "kv_cache_type",
        "paged (kept tokens move within the blocks of the cache)",
        "give --kv_cache_type paged",
        lambda value: value in (None, "paged"),
    ),
    _enabled("paged_kv_cache", "kept tokens move within the blocks of the cache"),
    _enabled("context_fmha", "prefill must not write padded attention masks"),
    _at_most_one("max_beam_width", "beams share the blocks of a prompt"),
    _disabled("multiple_profiles", "the engine must have one profile"),
    _disabled("streamingllm", "it drops tokens by itself"),
    _disabled("fuse_fp4_quant", "attention would give fp4"),
    Precondition(
        "speculative_decoding_mode",
        "none (draft tokens are taken back by cache length)",
        "leave --speculative_decoding_mode out",
        lambda value: value in _OFF or value == 1,  # 1 is NONE of TensorRT-LLM's enum
    ),
    _off("max_draft_len", "draft tokens are taken back by cache length"),
    Precondition(
        "tokens_per_block",
        "a power of two",
        "give --tokens_per_block 32 or 64",
        lambda value: value is None or _is_power_of_two(value),
    ),
    _at_most_one("workers", "more workers are new processes, which would build without ChunkKV"),
    _at_most_one("auto_parallel", "it rewrites the network: convert the checkpoint with --tp_size instead"),
    _off("lora_dir", "adapters are given to the runtime", "leave --lora_dir out, give --lora_target_modules"),
)


def broken(preconditions: Iterable[Precondition], values: Mapping[str, Any]) -> list[Precondition]:
    """Return the preconditions whose name is in `values` with a value that is not allowed."""
    return [each for each in preconditions if each.name in values and not each.holds(values[each.name])]


def check(preconditions: Iterable[Precondition], values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first precondition that `values` break: value, what is allowed and what to change."""
    for each in broken(preconditions, values):
        raise ConfigError(f"{each.name} is {shown(values[each.name])}; allowed is {each.allowed}: {each.remedy}")


def build_values(*objects: object) -> dict[str, Any]:
    """Return the values that `objects` have under the names of BUILD_PRECONDITIONS, in the form that flags have.

    Parameters
    ----------
    *objects : object
        Whatever has the names as attributes: parsed flags, a BuildConfig, a PluginConfig. If several have a name, the
        last value that is not None counts.

    Returns
    -------
    dict
        Members of enums are given by name and in lower case, "enable" and "disable" as True and False.
    """
    values: dict[str, Any] = {}
    for name in (precondition.name for precondition in BUILD_PRECONDITIONS):
        for each in objects:
            # paged_kv_cache of a PluginConfig is None until the build has decided.
            value = getattr(each, name, None)
            if value is not None or (hasattr(each, name) and name not in values):
                values[name] = _as_flag(value)
    return values


def shown(value: Any) -> str:
    """Return what an error shows of a value of TensorRT-LLM: tensors and other long things by their type."""
    if value is None or isinstance(value, bool):
        return "enable" if value else "disable"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = str(getattr(value, "name", value))
    return text if len(text) <= _LONGEST_SHOWN else type(value).__name__


def _as_flag(value: Any) -> Any:
    value = getattr(value, "name", value)
    if isinstance(value, str):
        value = value.lower()
        return {"enable": True, "disable": False}.get(value, value)
    return value
