"""Splits the heads of a layer by the parts of its KV cache, and puts them back in order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from chunkkv_builder.onnx_graph.emitter import NodeEmitter
from chunkkv_builder.plan import PartPlan


class HeadParts:
    """The parts of one layer; emits nothing where the layer is a single part.

    Parameters
    ----------
    e : NodeEmitter
        The graph that gets the nodes.
    parts : sequence of PartPlan
        All parts of the layer.
    """

    def __init__(self, e: NodeEmitter, parts: Sequence[PartPlan]) -> None:
        self._e, self._count = e, len(parts)
        owner = {head: place for place, part in enumerate(parts) for head in part.kv_heads}
        # Neighbouring heads of one part stay together: (place of the part, how many heads).
        self._runs = [(place, len(list(run))) for place, run in groupby(owner[head] for head in sorted(owner))]

    def split(self, value: str, width: int, axis: int) -> list[str]:
        """Return for each part its heads of `value`, which has `width` numbers along `axis` for each KV head."""
        if self._count == 1:
            return [value]
        pieces = self._split(value, [count * width for _, count in self._runs], axis)
        owners = [owner for owner, _ in self._runs]
        return [
            self._joined([piece for piece, owner in zip(pieces, owners, strict=True) if owner == place], axis)
            for place in range(self._count)
        ]

    def merge(self, values: Sequence[str], width: int, axis: int) -> str:
        """Return the heads of all parts in the order of the model; undoes `split`."""
        if self._count == 1:
            return values[0]
        pieces = []
        for place, value in enumerate(values):
            counts = [count * width for owner, count in self._runs if owner == place]
            pieces.append(iter(self._split(value, counts, axis)))
        return self._joined([next(pieces[owner]) for owner, _ in self._runs], axis)

    def _split(self, value: str, sizes: list[int], axis: int) -> list[str]:
        if len(sizes) == 1:
            return [value]
        outputs = [f"{value}/heads_{number}_of_{len(sizes)}" for number in range(len(sizes))]
        self._e.op("Split", [value, self._e.ints(*sizes)], outputs, axis=axis)
        return outputs

    def _joined(self, pieces: list[str], axis: int) -> str:
        return pieces[0] if len(pieces) == 1 else self._e.op("Concat", pieces, axis=axis)
