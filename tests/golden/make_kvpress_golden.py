"""Run the real kvpress in float32 and write what it scored and kept to kvpress_float32.npz.

    cd tests && python -m golden.make_kvpress_golden

Needs the "peers" extra. `make test-peers` makes the same recordings again and compares them with the file.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support.kvpress_checks import GOLDEN
from support.kvpress_live import run_model, run_press
from support.kvpress_restatement import PressSettings, Recording


class Shape(NamedTuple):
    """Shape of one direct call; contrast scales the logits."""

    length: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    batch: int = 1
    contrast: float = 1.5


DIRECT: dict[str, tuple[Shape, PressSettings]] = {
    "defaults": (Shape(200), PressSettings(0.5)),
    "defaults, one KV head, short tail": (Shape(193, kv_heads=1), PressSettings(0.5)),
    "defaults, heads one to one": (Shape(240, 2, 2), PressSettings(0.3)),
    "defaults, four query heads per KV head": (Shape(256, 8, 2, 16), PressSettings(0.6)),
    "defaults, paper's chunk length": (Shape(211), PressSettings(0.5, chunk_length=10)),
    "window 32": (Shape(150), PressSettings(0.5, 32, 5, 10)),
    "window 8, pooling 3": (Shape(60), PressSettings(0.6, 8, 3, 7)),
    "no pooling, truncated budget": (Shape(101), PressSettings(0.8, 4, 1, 5)),
    "peaked attention": (Shape(120, contrast=5.0), PressSettings(0.7, 16, 5, 8)),
    "row 0 decides for the batch": (Shape(80, batch=2), PressSettings(0.5, 8, 5, 10)),
    "budget inside the window": (Shape(194), PressSettings(0.9, chunk_length=10)),
    "below one chunk": (Shape(17), PressSettings(0.5, 4, 3, 20)),
    "nothing removed": (Shape(40), PressSettings(0.0, 8, 5, 10)),
}
MODELS: dict[str, tuple[str, int, PressSettings]] = {
    "llama": ("llama", 150, PressSettings(0.5)),
    "qwen3": ("qwen3", 90, PressSettings(0.5, 16, 5, 10)),
}


def direct_inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return query [B,Hq,w,D] and key [B,Hkv,T,D] of a direct call; float16 halves the file and is exact in float32."""
    shape, press = DIRECT[name]
    rng = np.random.default_rng(list(DIRECT).index(name))
    query = rng.normal(size=(shape.batch, shape.heads, press.window_size, shape.head_dim)) * shape.contrast
    key = rng.normal(size=(shape.batch, shape.kv_heads, shape.length, shape.head_dim))
    return query.astype(np.float16), key.astype(np.float16)


def record() -> list[tuple[str, PressSettings, Recording]]:
    """Return every recording of the file, made by the kvpress that is installed."""
    made = [(name, press, run_press(*direct_inputs(name), press)) for name, (_, press) in DIRECT.items()]
    for name, (family, length, press) in MODELS.items():
        layers = run_model(family, length, press)
        made += [(f"{name} layer {layer}", press, recorded) for layer, recorded in enumerate(layers)]
    return made


def write(path: Path) -> None:
    """Write all recordings and a JSON index of them as one compressed npz without pickled objects."""
    arrays: dict[str, Any] = {}
    cases = []
    for number, (name, press, recorded) in enumerate(record()):
        cases.append({"name": name, **press._asdict()})
        for field, values in recorded._asdict().items():
            if values is not None:
                arrays[f"{number}.{field}"] = values.astype(np.int32) if field == "kept" else values
    made_with = {package: importlib.metadata.version(package) for package in ("kvpress", "torch", "transformers")}
    arrays["index"] = np.array(json.dumps({"made_with": made_with, "cases": cases}))
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    write(GOLDEN)
    print(f"wrote {GOLDEN.name}, {GOLDEN.stat().st_size} bytes")
