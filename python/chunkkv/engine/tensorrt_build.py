"""What the manifest says of a build with TensorRT: which one, for which GPUs, and how ChunkKV is inside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from chunkkv.engine.fields import Fields

STANDARD, RTX = FLAVOURS = ("standard", "rtx")
PACKAGES = {STANDARD: "tensorrt", RTX: "tensorrt_rtx"}
TITLES = {STANDARD: "TensorRT", RTX: "TensorRT for RTX"}
PLUGIN, FUNCTIONS = "plugin", "functions"
NO_OPS = "none"  # an engine without ChunkKV
PORTABLE = "portable"
MACHINE_GPU = "this machine's GPU"
_CAPABILITY = re.compile(r"\d+\.\d")


@dataclass(frozen=True)
class TensorRTBuild:
    """What built the TensorRT engines of a directory.

    Parameters
    ----------
    flavour : "standard", or "rtx" for TensorRT for RTX; an engine runs with the one that built it.
    version : version of that TensorRT; an engine runs with that version only.
    compute_capabilities : GPUs that the engines were built for, as in "8.9". Empty where none was fixed: for "rtx" they
        are portable, for "standard" they run on the kind of GPU that they were built on.
    chunkkv_ops : "plugin" or "functions": how ChunkKV is inside; "none" without ChunkKV.
    seconds : duration of the build of each engine, by file.
    layers : how many layers of each type TensorRT's parser made of each engine's graph, by file and by TensorRT's name
        of the type. The built engine has fewer, because TensorRT fuses them.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    chunkkv_ops: str
    seconds: dict[str, float]
    layers: dict[str, dict[str, int]]

    @property
    def title(self) -> str:
        """Name and version of the TensorRT for people."""
        return f"{TITLES[self.flavour]} {self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        targets = list(self.compute_capabilities) or (PORTABLE if self.flavour == RTX else MACHINE_GPU)
        return {
            "flavour": self.flavour,
            "version": self.version,
            "compute_capabilities": targets,
            "chunkkv_ops": self.chunkkv_ops,
            "seconds": {file: round(max(seconds, 0.01), 2) for file, seconds in self.seconds.items()},
            "layers": self.layers,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> TensorRTBuild:
        """Read what to_dict wrote; raises the error of `fields` for an entry that is missing, unknown or wrong."""
        fields.allow(("flavour", "version", "compute_capabilities", "chunkkv_ops", "seconds", "layers"))
        flavour = fields.text("flavour", allowed=FLAVOURS)
        seconds, layers = fields.section("seconds"), fields.section("layers")
        return cls(
            flavour,
            fields.text("version"),
            _capabilities(fields, PORTABLE if flavour == RTX else MACHINE_GPU),
            fields.text("chunkkv_ops", allowed=(PLUGIN, FUNCTIONS, NO_OPS)),
            {file: seconds.number(file) for file in seconds.values},
            {file: _counts(layers.section(file)) for file in layers.values},
        )


def _capabilities(fields: Fields, none_fixed: str) -> tuple[str, ...]:
    if fields.get("compute_capabilities") == none_fixed:
        return ()
    advice = f"give {none_fixed!r}" + (" or a list such as ['8.9']" if none_fixed == PORTABLE else "")
    values = fields.get("compute_capabilities")
    if not isinstance(values, list) or not values or none_fixed != PORTABLE:
        raise fields.error("compute_capabilities", advice)
    if not all(isinstance(value, str) and _CAPABILITY.fullmatch(value) for value in values):
        raise fields.error("compute_capabilities", advice)
    return tuple(values)


def _counts(fields: Fields) -> dict[str, int]:
    return {name: fields.integer(name) for name in fields.values}
