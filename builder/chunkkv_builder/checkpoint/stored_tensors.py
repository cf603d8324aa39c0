"""Where Hugging Face's checkpoints keep the tensors of tensor_shapes.py: some families fuse several into one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from chunkkv_builder.checkpoint.families import FAMILY_OF
from chunkkv_builder.checkpoint.model_config import ModelConfig
from chunkkv_builder.checkpoint.tensor_shapes import expected_shapes

_NORM = re.compile(r".*norm\.weight")
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_FUSED_INTO = {part: whole for whole, parts in _FUSED.items() for part in parts}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a model lies.

    Parameters
    ----------
    name : str
        The tensor of the checkpoint that holds it.
    first, stop : int
        Its rows there.
    adds_one : bool
        Whether 1 is added to its values, which the model does before it uses them.
    """

    name: str
    first: int
    stop: int
    adds_one: bool


def stored_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Return where each tensor of expected_shapes(config) lies, in the same order."""
    family = FAMILY_OF[config.architecture]
    rows: dict[str, int] = {}
    places = {}
    for name, shape in expected_shapes(config).items():
        stored = _stored_name(name) if family.fused_projections else name
        first = rows.get(stored, 0)
        rows[stored] = first + shape[0]
        adds_one = family.norms_add_one and _NORM.fullmatch(name) is not None
        places[name] = StoredTensor(stored, first, rows[stored], adds_one)
    return places


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint of `config` must have, in layer order."""
    shapes: dict[str, tuple[int, ...]] = {}
    expected = expected_shapes(config)
    for name, place in stored_tensors(config).items():
        shapes[place.name] = (place.stop, *expected[name][1:])  # the last part ends the tensor
    return shapes


def _stored_name(name: str) -> str:
    """Return the name of the fused tensor that has `name` as a part, else `name`."""
    head, _, rest = name.partition("layers.")
    layer, _, module = rest.partition(".")
    module, _, kind = module.rpartition(".")
    whole = _FUSED_INTO.get(module)
    return name if whole is None else f"{head}layers.{layer}.{whole}.{kind}"
