"""Rotary position embeddings: the scaling a checkpoint asks for, and the frequencies it leads to.

The arithmetic follows transformers' modeling_rope_utils step by step in float32, so angles agree at long positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkkv.engine.fields import Fields
from chunkkv_builder.checkpoint.families import Family

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "factors")
DEFAULT_THETA = 10_000.0
_LOCAL_THETA = 10_000.0


@dataclass(frozen=True)
class RopeScaling:
    """Parameters of one scaling type; those that the type does not use are None.

    `factor` and, for llama3, yarn and longrope, `original_max_position_embeddings` are always resolved to numbers. The
    type "factors" divides each frequency by `factor` and its own entry of `factors` [D/2]; GGUF files have it in place
    of llama3's parameters. The type "longrope" divides each frequency by its own entry of `factors` [D/2], which are
    those for sequences of at most original_max_position_embeddings tokens; other sequences would need other factors,
    so that is the longest context.
    """

    type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters that are set, under their Hugging Face names, as plain JSON values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if self.factors is not None:
            values["factors"] = list(self.factors)
        return {"rope_type": values.pop("type"), **values}


@dataclass(frozen=True)
class Rope:
    """What a config says of rotary embeddings.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    scaling : RopeScaling or None
        None for plain RoPE.
    local_theta : float or None
        Base of the frequencies of the layers with a sliding window, None where that is `theta`.
    rotary_dim : int
        How many of a head's dimensions are rotated: the first ones.
    """

    theta: float
    scaling: RopeScaling | None
    local_theta: float | None
    rotary_dim: int


def read_rope(config: Fields, family: Family, max_position_embeddings: int, head_dim: int) -> Rope:
    """Return the rotary embeddings of a Hugging Face config, old style or new.

    Raises ConfigError for a scaling type that is not supported, or invalid parameters of one that is.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = Fields(config.get(name) or {}, f"{config.source}: {name}")
    local_theta = None
    if family.rotated_layers == "two_bases":
        rope, local_theta = _split_bases(rope, config)
    for key, value in rope.values.items():
        if isinstance(value, Mapping):
            raise rope.error(key, "rotary parameters per kind of layer are not supported: give one set for all layers")
    if rope.get("type") in family.longrope_names or rope.get("rope_type") in family.longrope_names:
        rope = rope.with_values(rope_type="longrope")
    theta = rope.number("rope_theta", above=1.0, default=None)
    if theta is None:
        theta = config.number("rope_theta", above=1.0, default=family.default_theta)
    rotary_dim = _read_rotary_dim(rope, config, family, head_dim)
    scaling = read_scaling(rope, config, max_position_embeddings)
    if scaling is not None and scaling.factors is not None and len(scaling.factors) != rotary_dim // 2:
        raise rope.error("short_factor", f"give {rotary_dim // 2} numbers, one per rotary frequency")
    return Rope(theta, scaling, local_theta, rotary_dim)


def _split_bases(rope: Fields, config: Fields) -> tuple[Fields, float]:
    """Return the parameters of the layers that attend to everything, and the base of those with a sliding window."""
    local_theta = config.number("rope_local_base_freq", above=1.0, default=_LOCAL_THETA)
    if rope.get("sliding_attention") is not None:
        local = rope.section("sliding_attention")
        for key in ("rope_type", "type"):
            local.text(key, allowed=("default",), default="default")
        local_theta = local.number("rope_theta", above=1.0, default=local_theta)
    if rope.get("full_attention") is not None:
        return rope.section("full_attention"), local_theta
    kinds = ("full_attention", "sliding_attention")
    others = {key: value for key, value in rope.values.items() if key not in kinds}
    return Fields(others, rope.source), local_theta


def _read_rotary_dim(rope: Fields, config: Fields, family: Family, head_dim: int) -> int:
    """Return how many dimensions of a head are rotated."""
    if not family.reads_partial_rotary:
        for fields in (config, rope):
            if fields.number("partial_rotary_factor", default=1.0) != 1.0:
                raise fields.error(
                    "partial_rotary_factor", "only 1.0 is supported: every dimension of a head is rotated"
                )
        return head_dim
    fields = config if config.get("partial_rotary_factor") is not None else rope
    rotary_dim = int(head_dim * fields.number("partial_rotary_factor", default=1.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise fields.error(
            "partial_rotary_factor",
            f"of {head_dim} dimensions it rotates {rotary_dim}: give a part that is an even number of dimensions",
        )
    return rotary_dim


def read_scaling(rope: Fields, config: Fields, max_position_embeddings: int) -> RopeScaling | None:
    """Return the scaling that the JSON object `rope` describes; raises ConfigError like read_rope."""
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    if "factor" in rope.values:  # a factor without the kind of scaling would be passed over
        kind = rope.text(key, ROPE_TYPES)
    else:
        kind = rope.text(key, ROPE_TYPES, default="default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind == "factors":
        return RopeScaling("factors", rope.number("factor"), factors=rope.numbers("factors"))
    if kind == "longrope":
        return _read_longrope(rope, config, max_position_embeddings)
    original = config.integer("original_max_position_embeddings", default=None)
    if original is None:
        original = rope.integer("original_max_position_embeddings", default=max_position_embeddings)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"it must be above low_freq_factor, which is {low}")
        return RopeScaling("llama3", rope.number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    return RopeScaling(
        "yarn",
        rope.number("factor", default=max_position_embeddings / original),
        original,
        attention_factor=rope.number("attention_factor", default=None),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=rope.number("mscale", default=None),
        mscale_all_dim=rope.number("mscale_all_dim", default=None),
        truncate=rope.flag("truncate", default=True),
    )


def _read_longrope(rope: Fields, config: Fields, max_position_embeddings: int) -> RopeScaling:
    """Return the scaling for sequences that are not longer than original_max_position_embeddings."""
    original = config.integer("original_max_position_embeddings", low=2, default=None)
    if original is None:
        original = rope.integer("original_max_position_embeddings", low=2)
    factor = rope.number("factor", default=max_position_embeddings / original)
    attention_factor = rope.number("attention_factor", default=None)
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=attention_factor,
        factors=rope.numbers("factors" if "factors" in rope.values else "short_factor"),
    )


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[NDArray[np.float64], float]:
    """Return inverse frequencies [D/2], float32 values held in float64, and the factor on cosines and sines.

    `head_dim` is the number D of dimensions that are rotated.
    """
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Powers are taken in float64 and rounded once: closer to torch's float32 powers than NumPy's own are.
    wavelengths = np.power(theta, steps.astype(np.float64)).astype(np.float32)
    plain = np.float32(1.0) / wavelengths
    factor = 1.0
    if scaling is None:
        inverse = plain
    elif scaling.type == "linear":
        inverse = plain / np.float32(scaling.factor)
    elif scaling.type == "llama3":
        inverse = _llama3(plain, scaling)
    elif scaling.type == "longrope":
        assert scaling.factors is not None and scaling.attention_factor is not None
        inverse = np.float32(1.0) / (np.asarray(scaling.factors, dtype=np.float32) * wavelengths)
        factor = scaling.attention_factor
    elif scaling.type == "factors":
        assert scaling.factors is not None
        inverse = plain / np.asarray(scaling.factors, dtype=np.float32) / np.float32(scaling.factor)
    else:
        inverse, factor = _yarn(wavelengths, head_dim, theta, scaling)
    return inverse.astype(np.float64), factor


def _llama3(plain: NDArray[np.float32], scaling: RopeScaling) -> NDArray[np.float32]:
    """Divide the slow waves by the factor, leave the fast ones, blend between."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None
    factor = np.float32(scaling.factor)
    wave = np.float32(2 * math.pi) / plain
    slow, fast = wave > np.float32(original / low), wave < np.float32(original / high)
    scaled = np.where(slow, plain / factor, plain)
    smooth = (np.float32(original) / wave - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    return np.where(~fast & ~slow, blended, scaled)


def _yarn(
    wavelengths: NDArray[np.float32], head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[NDArray[np.float32], float]:
    """Interpolate the slow dimensions, extrapolate the fast ones, with a linear ramp between."""
    assert scaling.beta_fast is not None and scaling.beta_slow is not None
    low, high = (_correction_dim(turns, head_dim, theta, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in transformers: the ramp is a step
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    extrapolated = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    unscaled = np.float32(1) / wavelengths
    interpolated = np.float32(1) / (np.float32(scaling.factor) * wavelengths)
    inverse = interpolated * (np.float32(1) - extrapolated) + unscaled * extrapolated
    return inverse, _yarn_attention_factor(scaling)


def _correction_dim(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """Return the dimension whose wave turns `turns` times within the original context."""
    original = scaling.original_max_position_embeddings
    assert original is not None
    return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
