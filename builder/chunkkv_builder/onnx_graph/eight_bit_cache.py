"""Attention over a KV cache of 8 bits: whole numbers in the cache, and a scale for each channel of each head beside it.

ONNX Runtime's attention reads such a cache at once where a row has one new token. Over a block of several it takes
three times as long as over float32, so there the cache of this one part becomes float32 while the block attends. Graphs
that multiply whole numbers read it as it is over long blocks, too, with EightBitBlockAttention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from chunkkv.cache_scales import CacheScales
from chunkkv_builder.onnx_graph.block_attention import EightBitBlockAttention, whole_numbers
from chunkkv_builder.onnx_graph.emitter import GraphEmitter, NodeEmitter
from chunkkv_builder.onnx_graph.projections import CONTRIB

OPSET = 24  # of TensorScatter
KINDS = ("key", "value")
_ATTENTION, _FLOAT, _INT8 = "GroupQueryAttention", onnx.TensorProto.FLOAT, onnx.TensorProto.INT8
_NO_ROTATION = 3  # inputs of the attention that it needs only where it rotates
_NOT_USED = 2  # a bias on the scores, and sinks


@dataclass(frozen=True)
class BlockPlace:
    """Where the new tokens of a block stand, for the parts of one length class.

    Parameters
    ----------
    last : str
        Last filled slot of each row behind this block, [B] int32.
    total : str
        Slots that are filled behind this block, in the longest row, int32.
    filled : str
        Slots that are filled before this block, [B] int64.
    is_single : str
        Whether each row has one new token, bool.
    is_short : str or None
        Whether the block or the cache is too short for EightBitBlockAttention, bool; None for graphs without it.
    """

    last: str
    total: str
    filled: str
    is_single: str
    is_short: str | None


@dataclass(frozen=True)
class EightBitPart:
    """One part of the cache, and the attention that reads it.

    Parameters
    ----------
    number : int
        Number of the part.
    query_heads, kv_heads, head_dim : int
        Its sizes.
    attributes : mapping
        Attributes of the attention beside the numbers of heads.
    """

    number: int
    query_heads: int
    kv_heads: int
    head_dim: int
    attributes: Mapping[str, Any]

    def attend(self, e: GraphEmitter, name: str, qkv: Sequence[str], scales: CacheScales, place: BlockPlace) -> str:
        """Store keys and values and return the attention [B,S,Hq*D] float32.

        Reads past_key.p and past_value.p, and emits present_key.p and present_value.p, [B,H,C,D] int8.

        Parameters
        ----------
        e : GraphEmitter
            The graph.
        name : str
            Of the node.
        qkv : sequence of str
            Query, key and value [B,S,heads*D] float32, rotated.
        scales : CacheScales
            Those of the whole cache.
        place : BlockPlace
            Where the block stands.
        """
        past = [f"past_{kind}.{self.number}" for kind in KINDS]
        present = [f"present_{kind}.{self.number}" for kind in KINDS]
        of_part = scale_inputs(e, scales, self.number)
        return e.op(
            "If",
            [place.is_single],
            [f"{name}_output", *present],
            name=name,
            then_branch=self._single(f"{name}/single/", qkv, past, of_part, place),
            else_branch=self._block(f"{name}/block/", qkv, past, of_part, place),
        )

    def store(self, e: GraphEmitter, new: Sequence[str], scales: CacheScales, place: BlockPlace) -> None:
        """Store keys and values of one row, `new` [1,S,H*D] float32 each, rotated, and do not attend.

        Reads and emits the caches that `attend` does; `scales` and `place` are as there.
        """
        past, present = ([f"{when}_{kind}.{self.number}" for kind in KINDS] for when in ("past", "present"))
        self._block_attention(e, scale_inputs(e, scales, self.number)).store(new, past, place.last, present)

    def _single(
        self, prefix: str, qkv: Sequence[str], past: Sequence[str], scales: Sequence[str], place: BlockPlace
    ) -> onnx.GraphProto:
        """Return the branch for one new token: the attention reads the cache as it is."""
        e = NodeEmitter(prefix)
        unused = [""] * (_NO_ROTATION + _NOT_USED)
        inputs = [*qkv, *past, place.last, place.total, *unused, *scales]
        types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        return self._graph(e, self._attention(e, prefix, inputs, **types))

    def _block(
        self, prefix: str, qkv: Sequence[str], past: Sequence[str], scales: Sequence[str], place: BlockPlace
    ) -> onnx.GraphProto:
        """Return the branch for several new tokens of one row."""
        if place.is_short is None:
            return self._over_floats(prefix, qkv, past, scales, place)
        e, given = NodeEmitter(prefix), (qkv, past, scales, place)
        outputs = [f"{prefix}either/{name}" for name in ("output", *KINDS)]
        branches = self._over_floats(f"{prefix}short/", *given), self._over_codes(f"{prefix}long/", *given)
        e.op("If", [place.is_short], outputs, name=f"{prefix}either", then_branch=branches[0], else_branch=branches[1])
        return self._graph(e, outputs)

    def _over_codes(
        self, prefix: str, qkv: Sequence[str], past: Sequence[str], scales: Sequence[str], place: BlockPlace
    ) -> onnx.GraphProto:
        """Return the branch for long blocks, in which queries meet the cache's own whole numbers."""
        e = NodeEmitter(prefix)
        attention = self._block_attention(e, scales)
        return self._graph(e, attention.emit((qkv[0], qkv[1], qkv[2]), list(past), place.last))

    def _block_attention(self, e: NodeEmitter, scales: Sequence[str]) -> EightBitBlockAttention:
        return EightBitBlockAttention(e, self.query_heads, self.kv_heads, self.head_dim, scales)

    def _over_floats(
        self, prefix: str, qkv: Sequence[str], past: Sequence[str], scales: Sequence[str], place: BlockPlace
    ) -> onnx.GraphProto:
        """Return the branch in which ONNX Runtime's attention meets the cache turned into float32.

        New tokens attend to their own keys and values as the cache holds them: what is read does not depend on how a
        prompt is cut into blocks.
        """
        e = NodeEmitter(prefix)
        new, read, stored = [], [], []
        to_heads, flat = e.ints(0, 0, self.kv_heads, self.head_dim), e.ints(0, 0, self.kv_heads * self.head_dim)
        for values, cached, scale in zip(qkv[1:], past, scales, strict=True):
            by_head = e.op("Transpose", [e.op("Reshape", [values, to_heads])], perm=[0, 2, 1, 3])
            whole = whole_numbers(e, by_head, scale)
            rounded = e.op("Transpose", [e.op("Mul", [whole, scale])], perm=[0, 2, 1, 3])
            new.append(e.op("Reshape", [rounded, flat]))
            before = e.op("Slice", [cached, e.ints(0), place.filled, e.ints(2)])
            read.append(e.op("Mul", [e.op("Cast", [before], to=_FLOAT), scale]))
            numbers = e.op("Cast", [whole], to=_INT8)
            stored.append(e.op("TensorScatter", [cached, numbers, place.filled], axis=2))
        mixed = self._attention(e, prefix, [qkv[0], *new, *read, place.last, place.total])[0]
        return self._graph(e, [mixed, *stored])

    def _attention(self, e: NodeEmitter, prefix: str, inputs: Sequence[str], **attributes: Any) -> list[str]:
        """Emit the operator and return its outputs: attention, keys and values."""
        outputs = [f"{prefix}{name}" for name in ("output", *KINDS)]
        attributes |= {"num_heads": self.query_heads, "kv_num_heads": self.kv_heads, **self.attributes}
        e.op(_ATTENTION, inputs, outputs, name=f"{prefix}attention", domain=CONTRIB, **attributes)
        return outputs

    def _graph(self, e: NodeEmitter, outputs: Sequence[str]) -> onnx.GraphProto:
        """Return the branch that gives attention, keys and values."""
        cache: tuple[str, list[int | str]] = ("int8", ["batch", self.kv_heads, "slots", self.head_dim])
        mixed: tuple[str, list[int | str]] = ("float32", ["batch", "block", self.query_heads * self.head_dim])
        return e.branch([(name, *form) for name, form in zip(outputs, (mixed, cache, cache), strict=True)])


def scale_inputs(e: GraphEmitter, scales: CacheScales, part: int) -> list[str]:
    """Store the scales of a part's keys and of its values in the graph, [1,H,1,D] each, and return their names."""
    of_part = scales.keys[part], scales.values[part]
    named = zip(KINDS, of_part, strict=True)
    return [e.inline(f"{kind}_scale.{part}", array[None, :, None]) for kind, array in named]
