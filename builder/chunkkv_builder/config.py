"""What an engine is built for: batch, lengths, block size, number type and backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chunkkv.engine.backends import BACKENDS, DEFAULT_BACKEND, DTYPES, TRAITS
from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.checkpoint.model_config import ModelConfig

KV_CACHE_DTYPES = ("float32", "float16", "int8")
W8A8 = "w8a8"
WEIGHT_ONLY_PRECISIONS = ("int8", "int4", W8A8)
WEIGHT_ONLY_ACTIVATIONS = ("int8", "float32")
PREFILL_PRECISIONS = (W8A8,)
DEFAULT_WEIGHT_ONLY_PRECISION = "int8"
# Decode is faster with it for int4, and ONNX Runtime has no fast product of int8 weights and float32 activations.
DEFAULT_WEIGHT_ONLY_ACTIVATIONS = "int8"
DEFAULT_MAX_BATCH_SIZE = 8
DEFAULT_MAX_NUM_TOKENS = 512
# On a CPU larger blocks are no faster, and attention takes memory for each of a block's tokens and each cached one.
CPU_MAX_NUM_TOKENS = 128  # as many as the largest observation window
_LARGEST = {"max_batch_size": 4096, "max_num_tokens": 2**20, "max_seq_len": 2**31 - 1, "max_input_len": 2**31 - 1}
# What trtllm-build records, too, and what has only one value in these engines.
_FIXED = {"max_beam_width": 1, "kv_cache_type": "continuous"}


@dataclass(frozen=True)
class BuildConfig:
    """The limits of an engine; raises ConfigError for any value or combination that cannot be built.

    Parameters
    ----------
    max_input_len : int
        Longest prompt in tokens.
    max_seq_len : int
        Longest prompt and answer together, in tokens.
    max_batch_size : int, default 8
        Prompts that are answered at once.
    max_num_tokens : int, default 512
        Tokens of a prefill block, which must hold the observation window. chunkkv-build takes default_max_num_tokens.
    dtype : str, default "float32"
        Number type of weights and KV cache, one of DTYPES that the backend allows.
    kv_cache_dtype : str or None, default None
        Number type of the KV cache alone, which the backend allows beside `dtype`; None means `dtype`. "int8" has a
        scale for each channel of each head, found while the engine is built.
    weight_only_precision : str or None, default None
        "int8" or "int4" stores the weights in fewer bits, in blocks of 32. "w8a8" stores the projections in 8 bits with
        a scale for each output, and multiplies whole numbers. None keeps them in `dtype`.
    weight_only_activations : str or None, default None
        "int8" rounds the inputs of those projections to 8 bits, which is faster; "float32" leaves them as they are,
        which "w8a8" cannot.
        Given exactly where weight_only_precision is.
    prefill_precision : str or None, default None
        "w8a8" stores the projections a second time, as weight_only_precision "w8a8" does, and multiplies with them in
        all blocks of a prompt but the last. None multiplies with the weights of decode.
    backend : str, default "onnxruntime"
        The engine that runs it, one of chunkkv.engine.backends.BACKENDS.
    """

    max_input_len: int
    max_seq_len: int
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    max_num_tokens: int = DEFAULT_MAX_NUM_TOKENS
    dtype: str = "float32"
    kv_cache_dtype: str | None = None
    weight_only_precision: str | None = None
    weight_only_activations: str | None = None
    prefill_precision: str | None = None
    backend: str = DEFAULT_BACKEND

    def __post_init__(self) -> None:
        for name, high in _LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ConfigError(f"{name} is {value!r}; give a whole number from 1 to {high}")
        if self.max_input_len > self.max_seq_len:
            raise ConfigError(
                f"max_input_len is {self.max_input_len}, above max_seq_len = {self.max_seq_len}, which counts prompt "
                "and answer: lower max_input_len or raise max_seq_len"
            )
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend is {self.backend!r}; allowed is {' or '.join(BACKENDS)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; allowed is {' or '.join(DTYPES)}")
        if self.dtype not in (allowed := TRAITS[self.backend].dtypes):
            raise ConfigError(
                f"dtype is {self.dtype!r}; backend {self.backend} computes in {' or '.join(allowed)}: give that, or "
                "use_weight_only with weight_only_precision int8 or int4 for smaller weights"
            )
        if self.kv_cache_dtype not in (None, self.dtype, *(others := TRAITS[self.backend].kv_cache_dtypes)):
            raise ConfigError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}; backend {self.backend} holds keys and values in "
                f"{' or '.join((self.dtype, *others))}: give that, or leave it away"
            )
        if self.weight_only_precision and not TRAITS[self.backend].has_weight_only:
            raise ConfigError(
                f"weight_only_precision is {self.weight_only_precision!r}; backend {self.backend} has no quantised "
                "weights: leave use_weight_only away and give dtype float16 or bfloat16"
            )
        self._check_weight_only("weight_only_precision", WEIGHT_ONLY_PRECISIONS)
        self._check_weight_only("weight_only_activations", WEIGHT_ONLY_ACTIVATIONS)
        if self.weight_only_precision == W8A8 and self.weight_only_activations == "float32":
            raise ConfigError(
                "weight_only_activations is 'float32', but weight_only_precision w8a8 multiplies inputs of 8 bits: "
                "leave it away, or give weight_only_precision int4"
            )
        if (self.weight_only_precision is None) != (self.weight_only_activations is None):
            raise ConfigError(
                f"weight_only_precision is {self.weight_only_precision!r} and weight_only_activations is "
                f"{self.weight_only_activations!r}; give both, or leave both away"
            )

        self._check_prefill()

    @property
    def cache_dtype(self) -> str:
        """Number type of the KV cache."""
        return self.kv_cache_dtype or self.dtype

    def _check_weight_only(self, name: str, allowed: tuple[str, ...]) -> None:
        if (value := getattr(self, name)) not in (None, *allowed):
            raise ConfigError(f"{name} is {value!r}; allowed is {' or '.join(allowed)}")

    def _check_prefill(self) -> None:
        self._check_weight_only("prefill_precision", PREFILL_PRECISIONS)
        if self.prefill_precision and not TRAITS[self.backend].has_weight_only:
            raise ConfigError(
                f"prefill_precision is {self.prefill_precision!r}; backend {self.backend} multiplies in {self.dtype} "
                "throughout: leave it away"
            )
        if self.prefill_precision and self.weight_only_precision == W8A8:
            raise ConfigError(
                f"prefill_precision is {self.prefill_precision!r}, and so is weight_only_precision, which holds for "
                "prompts, too: leave one of them away"
            )

    @classmethod
    def for_model(
        cls, model: ModelConfig, max_input_len: int | None = None, max_seq_len: int | None = None, **values: Any
    ) -> BuildConfig:
        """Return the limits for a model.

        Parameters
        ----------
        model : ModelConfig
            The model.
        max_input_len : int, optional
            Default: max_seq_len.
        max_seq_len : int, optional
            Default: the model's longest context.
        **values
            The other parameters of BuildConfig.

        Raises
        ------
        ConfigError
            For a max_seq_len beyond the positions the model was trained for, and as BuildConfig does.
        """
        longest = longest_context(model)
        seq_len = longest if max_seq_len is None else max_seq_len
        if seq_len > longest:
            if (reason := limit_reason(model)) is not None:
                raise ConfigError(
                    f"max_seq_len is {seq_len}; {reason}: give {longest} or less, where it changes nothing"
                )
            raise ConfigError(
                f"max_seq_len is {seq_len}; this model was trained for at most {longest} positions "
                f"(max_position_embeddings): give {longest} or less"
            )
        return cls(seq_len if max_input_len is None else max_input_len, seq_len, **values)

    @staticmethod
    def default_max_num_tokens(backend: str) -> int:
        """Return the tokens of a prefill block where none are given."""
        return CPU_MAX_NUM_TOKENS if backend == DEFAULT_BACKEND else DEFAULT_MAX_NUM_TOKENS

    def check_window(self, settings: ChunkKVSettings | None) -> None:
        """Raise ConfigError where a prefill block cannot hold the whole observation window."""
        if settings is not None and self.max_num_tokens < settings.window:
            raise ConfigError(
                f"max_num_tokens is {self.max_num_tokens}, below the observation window of {settings.window} tokens, "
                "which must fit in one prefill block: raise max_num_tokens or lower chunkkv_window"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values under trtllm-build's names."""
        return {**dataclasses.asdict(self), **_FIXED}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildConfig:
        """Read what to_dict wrote; raises ConfigError for unknown, missing or invalid entries."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names - set(_FIXED)):
            raise ConfigError(f"unknown build_config entry {unknown[0]!r}; known are {', '.join(sorted(names))}")
        if missing := sorted(names - set(values)):
            raise ConfigError(f"build_config entry {missing[0]!r} is missing")
        for name, fixed in _FIXED.items():
            if values.get(name, fixed) != fixed:
                raise ConfigError(f"build_config entry {name!r} is {values[name]!r}; allowed is {fixed!r}")
        return cls(**{name: values[name] for name in names})


def longest_context(model: ModelConfig) -> int:
    """Return how many positions `model` can be built for; yarn's max_position_embeddings may be those before scaling.

    A sliding window is the limit where it is shorter: within it every token sees all others. So is the context that
    longrope's factors for short sequences are for.
    """
    window = _LARGEST["max_seq_len"] if model.sliding_window is None else model.sliding_window
    return min(window, _trained_positions(model), _longrope_limit(model))


def limit_reason(model: ModelConfig) -> str | None:
    """Return why the longest context is below what the model was trained for, None where it is not."""
    longest = longest_context(model)
    if longest == _trained_positions(model):
        return None
    if model.sliding_window == longest:
        return f"layers of this model attend to the last {longest} tokens only (sliding_window), which is not supported"
    return (
        f"beyond {longest} tokens (original_max_position_embeddings) this model's rotary scaling, longrope, changes "
        "the angles of all tokens, also of those in the cache, which is not supported"
    )


def _longrope_limit(model: ModelConfig) -> int:
    scaling = model.rope_scaling
    if scaling is None or scaling.type != "longrope":
        return _LARGEST["max_seq_len"]
    assert scaling.original_max_position_embeddings is not None
    return scaling.original_max_position_embeddings


def _trained_positions(model: ModelConfig) -> int:
    scaling = model.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return model.max_position_embeddings
    assert scaling.original_max_position_embeddings is not None
    extended = int(scaling.original_max_position_embeddings * scaling.factor)
    return max(model.max_position_embeddings, min(extended, _LARGEST["max_seq_len"]))
