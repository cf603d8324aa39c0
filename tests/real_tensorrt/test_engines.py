"""Engines of every family, type and setting are built by TensorRT for RTX as the executor expects them.

Settings are combined so that every two values meet in one engine directory; all engines come from the command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.builds import CommandLine
from support.covering import Row, all_pairs, covering_set, pairs_of

from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.tensorrt_contract import PREFILL_FILE, Contract, decode_file
from chunkkv.gpu.tensorrt_library import TensorRT

from .recorder import Built, record_builds

FACTORS: dict[str, tuple[Any, ...]] = {
    "family": ("llama3", "mistral", "qwen2", "qwen3"),
    "dtype": ("float32", "float16", "bfloat16"),
    "boundaries": ("fixed", "delimiter"),
    "layer_reuse": (1, 2),
    "leader": ("first", "last"),
    "ops": ("plugin", "functions"),
    "batch": (1, 4),
    "longest": (256, 2048),
}
ROWS = covering_set(FACTORS)
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 2, 1, 64  # a head size that has kernels
MODEL = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HEADS * HEAD_DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
}
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
CAPACITIES = {256: (128, 256), 2048: (256, 512, 1024, 2048)}
WINDOW, KEEP_RATIO, MIN_TOKENS = 32, 0.25, 64


def checkpoint_of(family: str) -> Path:
    own = {"head_dim": HEAD_DIM} if family == "qwen3" else {}
    return engines.checkpoint_dir(family, **MODEL, **own)


def flags_of(row: Row, output: Path) -> list[str]:
    return engines.command_line(
        {
            "checkpoint_dir": checkpoint_of(row["family"]),
            "output_dir": output,
            "backend": "tensorrt",
            "tensorrt": "rtx",
            "dtype": row["dtype"],
            "max_batch_size": row["batch"],
            "max_seq_len": row["longest"],
            "max_num_tokens": row["batch"] * row["longest"],
            "log_level": "error",
            "chunkkv": True,
            "chunkkv_ops": row["ops"],
            "chunkkv_boundaries": row["boundaries"],
            "chunkkv_layer_reuse": row["layer_reuse"],
            "chunkkv_leader": row["leader"],
            "chunkkv_window": WINDOW,
            "chunkkv_keep_ratio": KEEP_RATIO,
            "chunkkv_min_tokens": MIN_TOKENS,
        }
    )


def leaders_of(row: Row) -> tuple[int, ...]:
    if row["layer_reuse"] == 1:
        return tuple(range(LAYERS))
    return (0,) if row["leader"] == "first" else (LAYERS - 1,)


def test_every_two_values_meet() -> None:
    assert set().union(*map(pairs_of, ROWS)) == all_pairs(FACTORS)
    assert all(row.keys() == FACTORS.keys() for row in ROWS)
    assert len(ROWS) <= 14 and covering_set(FACTORS) == ROWS


@pytest.mark.filterwarnings("ignore:Use del obj")  # of what the bindings do when the recorder's builder goes away
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_engines_are_those_of_the_executors_contract(
    row: Row,
    rtx: TensorRT,
    found_plugins: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    builds = record_builds(rtx.module, monkeypatch)
    outcome = CommandLine(capsys)(*flags_of(row, tmp_path / "engine"))
    assert (outcome.code, outcome.err) == (0, "")
    prefill, *decoders = builds
    contract = Contract.read(tmp_path / "engine")
    assert (contract.capacities, contract.leaders) == (CAPACITIES[row["longest"]], leaders_of(row))
    assert contract.prefill_rows == row["batch"] and contract.max_input_len == row["longest"]
    check_prefill(row, prefill, contract)
    for capacity, built in zip(contract.capacities, decoders, strict=True):
        check_decoder(row, built, contract, capacity)
    files = [PREFILL_FILE, *map(decode_file, contract.capacities)]
    for file, built in zip(files, builds, strict=True):
        assert built.engine and (tmp_path / "engine" / file).read_bytes() == built.engine
    build = EngineFiles.load(tmp_path / "engine").tensorrt
    assert build is not None and build.seconds.keys() == set(files)
    assert (build.flavour, build.version, build.compute_capabilities) == ("rtx", rtx.version, ())
    assert build.chunkkv_ops == row["ops"]


def check_prefill(row: Row, built: Built, contract: Contract) -> None:
    dtype, most, longest = TYPES[row["dtype"]], row["batch"], row["longest"]
    leaders = leaders_of(row)
    assert built.layers["PLUGIN_V3"] == (len(leaders) + 2 * LAYERS if row["ops"] == "plugin" else 0)
    assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == LAYERS
    assert built.layers["ROTARY_EMBEDDING"] == 2 * LAYERS and built.layers["KV_CACHE_UPDATE"] == 0
    rows = dict.fromkeys(("lengths", "keep_per_10k", "budget_tokens"), ("INT32", (-1,)))
    ids = {"input_ids": ("INT64", (-1, -1)), "capacity": ("INT64", (1,))}
    assert built.inputs.keys() == {*rows, *ids, *contract.weights}
    assert {**rows, **ids}.items() <= built.inputs.items()
    assert_weights(built, contract, dtype)
    cache = (dtype, (-1, KV_HEADS, -1, HEAD_DIM))
    caches = {f"kept_{kind}.{layer}": cache for kind in ("key", "value") for layer in range(LAYERS)}
    choices = {f"kept_indices.{leader}": ("INT32", (-1, -1)) for leader in leaders}
    choices |= {f"token_scores.{leader}": ("FLOAT", (-1, -1)) for leader in leaders}
    logits = ("FLOAT", (-1, 1, contract.vocab_size))
    assert built.outputs == {"logits": logits, "kept_lengths": ("INT32", (-1,)), **caches, **choices}
    kept = next(capacity for capacity in contract.capacities if capacity >= KEEP_RATIO * longest)
    assert built.profile == {
        **dict.fromkeys(rows, ((1,), (most,), (most,))),
        "input_ids": ((1, 1), (most, longest), (most, longest)),
        "capacity": ((contract.capacities[0],), (kept,), (contract.capacities[-1],)),
    }


def check_decoder(row: Row, built: Built, contract: Contract, capacity: int) -> None:
    dtype, most = TYPES[row["dtype"]], row["batch"]
    assert built.layers["KV_CACHE_UPDATE"] == 2 * LAYERS and built.layers["PLUGIN_V3"] == 0
    assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == LAYERS
    assert built.layers["ROTARY_EMBEDDING"] == 2 * LAYERS
    steps = dict.fromkeys(("input_ids", "position_ids", "logit_indices"), ("INT64", (-1, 1)))
    steps["cache_lengths"] = ("INT32", (-1,))
    cache = (dtype, (-1, KV_HEADS, capacity, HEAD_DIM))
    past, present = (
        {f"{time}_{kind}.{layer}": cache for kind in ("key", "value") for layer in range(LAYERS)}
        for time in ("past", "present")
    )
    assert built.inputs.keys() == {*steps, *past, *contract.weights}
    assert {**steps, **past}.items() <= built.inputs.items()
    assert_weights(built, contract, dtype)
    assert built.outputs == {"logits": ("FLOAT", (-1, 1, contract.vocab_size)), **present}
    shape = (KV_HEADS, capacity, HEAD_DIM)
    assert built.profile == {
        **{name: ((1, 1), (most, 1), (most, 1)) for name in steps if name != "cache_lengths"},
        "cache_lengths": ((1,), (most,), (most,)),
        **{name: ((1, *shape), (most, *shape), (most, *shape)) for name in past},
    }


def assert_weights(built: Built, contract: Contract, dtype: str) -> None:
    """Every matrix is an input in the engine's type, as large as its place in the weights file."""
    for name, (_, nbytes) in contract.weights.items():
        kind, shape = built.inputs[name]
        size = 1
        for dim in shape:
            size *= dim
        assert kind == dtype and size * contract.item_bytes == nbytes
