"""Engines of every family, type and setting are built by TensorRT for RTX as the executor expects them.

Settings are combined so that every two values meet in one engine directory; all engines come from the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.builds import CommandLine, Outcome
from support.covering import Row, all_pairs, covering_set, pairs_of
from support.messages import naming

from chunkkv.cache_layout import Slots
from chunkkv.engine.directory import EngineFiles
from chunkkv.engine.tensorrt_contract import PREFILL_FILE, WEIGHTS_FILE, Contract, block_file, decode_file
from chunkkv.gpu.tensorrt_library import TensorRT
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends import graph_build
from chunkkv_builder.progress import human_bytes

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
# Families whose layers are made of other operators, with the numbers of attention and rotation layers of TensorRT.
UNLIKE_LLAMA = {
    "phi3": (2, 4),
    "granite": (2, 4),
    "smollm3": (2, 2),  # one of two layers rotates
    "gemma": (2, 4),
    "gemma2": (0, 4),  # attention with a soft cap is made of smaller operators
    "gemma3": (2, 4),
}
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 2, 1, 64  # a head size that has kernels
MODEL = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HEADS * HEAD_DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
}
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
CAPACITIES = {256: ((128,), (256,)), 2048: ((256,), (512,), (1024,), (2048,))}
WINDOW, KEEP_RATIO, MIN_TOKENS = 32, 0.25, 64
PREFILL_ROWS = 3  # prompts that are prefilled at once, where the batch has as many
# The bindings warn when the recorder's builder goes away.
pytestmark = pytest.mark.filterwarnings("ignore:Use del obj")


def checkpoint_of(family: str) -> Path:
    own: dict[str, Any] = {"head_dim": HEAD_DIM} if family.startswith(("qwen3", "gemma")) else {}
    if family == "phi3":
        own["rope_scaling"] = None  # its longrope factors are for a smaller head
    return engines.checkpoint_dir(family, **MODEL, **own)


def flags_of(row: Row) -> dict[str, Any]:
    return {
        "checkpoint_dir": checkpoint_of(row["family"]),
        "dtype": row["dtype"],
        "max_batch_size": row["batch"],
        "max_seq_len": row["longest"],
        "max_num_tokens": PREFILL_ROWS * row["longest"] + 100,
        "chunkkv": True,
        "chunkkv_ops": row["ops"],
        "chunkkv_boundaries": row["boundaries"],
        "chunkkv_layer_reuse": row["layer_reuse"],
        "chunkkv_leader": row["leader"],
        "chunkkv_window": WINDOW,
        "chunkkv_keep_ratio": KEEP_RATIO,
        "chunkkv_min_tokens": MIN_TOKENS,
    }


@dataclass(frozen=True)
class Builds:
    """Runs the command line in this process and keeps what TensorRT built."""

    cli: CommandLine
    folder: Path
    recorded: list[Built]

    def __call__(self, **flags: Any) -> Outcome:
        """Build to `folder`, which must succeed."""
        named = {"output_dir": self.folder, "backend": "tensorrt", "tensorrt": "rtx", "log_level": "error", **flags}
        outcome = self.cli(*engines.command_line(named))
        assert outcome.code == 0, outcome.err
        return outcome


@pytest.fixture
def build(
    rtx: TensorRT,
    found_plugins: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Builds:
    return Builds(CommandLine(capsys), tmp_path / "engine", record_builds(rtx.module, monkeypatch))


def leaders_of(row: Row) -> tuple[int, ...]:
    if row["layer_reuse"] == 1:
        return tuple(range(LAYERS))
    return (0,) if row["leader"] == "first" else (LAYERS - 1,)


def test_every_two_values_meet() -> None:
    assert set().union(*map(pairs_of, ROWS)) == all_pairs(FACTORS)
    assert all(row.keys() == FACTORS.keys() for row in ROWS)
    assert len(ROWS) <= 14 and covering_set(FACTORS) == ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_engines_are_those_of_the_executors_contract(row: Row, rtx: TensorRT, build: Builds) -> None:
    assert build(**flags_of(row)).err == ""
    prefill, *others = build.recorded
    contract = Contract.read(build.folder)
    decoders, blocks = others[: len(contract.capacities)], others[len(contract.capacities) :]
    assert (contract.capacities, contract.leaders) == (CAPACITIES[row["longest"]], leaders_of(row))
    assert (contract.prefill_rows, contract.max_input_len) == (min(row["batch"], PREFILL_ROWS), row["longest"])
    assert contract.group_layers == (row["layer_reuse"] if row["leader"] == "last" else 1)
    check_prefill(row, prefill, contract)
    for capacity, built in zip(contract.capacities, decoders, strict=True):
        check_decoder(row, built, contract, capacity)
    for capacity, built in zip(contract.capacities, blocks, strict=True):
        check_block(row, built, contract, capacity)
    assert {built.tf32 for built in build.recorded} == {row["dtype"] != "float32"}, "float32 means float32"
    check_files(build.folder, build.recorded, contract)
    engine = EngineFiles.load(build.folder)
    made_by = engine.tensorrt
    assert made_by is not None and engine.versions["tensorrt_rtx"] == rtx.version
    assert (made_by.flavour, made_by.version, made_by.compute_capabilities) == ("rtx", rtx.version, ())
    assert made_by.chunkkv_ops == row["ops"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", UNLIKE_LLAMA)
def test_families_unlike_llama_are_built(family: str, dtype: str, build: Builds) -> None:
    row = {**ROWS[0], "family": family, "dtype": dtype, "ops": "functions", "batch": 1, "longest": 256}
    assert build(**flags_of(row)).err == ""
    attention, rotation = UNLIKE_LLAMA[family]
    assert len(build.recorded) == 1 + 2 * len(CAPACITIES[256])
    for built in build.recorded:
        assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == attention
        assert built.layers["ROTARY_EMBEDDING"] == rotation


def check_files(folder: Path, builds: list[Built], contract: Contract) -> None:
    """The engines are what TensorRT gave; the matrices lie beside them once."""
    files = [PREFILL_FILE, *map(decode_file, contract.capacities), *map(block_file, contract.capacities)]
    assert {path.name for path in folder.glob("*.engine")} == set(files) and not list(folder.glob("*.onnx"))
    for file, built in zip(files, builds, strict=True):
        assert built.engine and (folder / file).read_bytes() == built.engine
    size = sum(nbytes for _, nbytes in contract.weights.values())
    assert size <= (folder / WEIGHTS_FILE).stat().st_size < size * 1.1


def check_prefill(row: Row, built: Built, contract: Contract) -> None:
    dtype, most, longest = TYPES[row["dtype"]], min(row["batch"], PREFILL_ROWS), row["longest"]
    leaders = leaders_of(row)
    assert built.layers["PLUGIN_V3"] == (len(leaders) + 2 * LAYERS if row["ops"] == "plugin" else 0)
    assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == LAYERS
    assert built.layers["ROTARY_EMBEDDING"] == 2 * LAYERS and built.layers["KV_CACHE_UPDATE"] == 0
    rows = dict.fromkeys(("lengths", "keep_per_10k", "budget_tokens", "window"), ("INT32", (-1,)))
    ids = {"input_ids": ("INT64", (-1, -1)), "capacity": ("INT64", (1,))}
    assert built.inputs.keys() == {*rows, *ids, *contract.weights}
    assert {**rows, **ids}.items() <= built.inputs.items()
    assert_weights(built, contract, dtype)
    cache = (dtype, (-1, KV_HEADS, -1, HEAD_DIM))
    caches = {f"kept_{kind}.{layer}": cache for kind in ("key", "value") for layer in range(LAYERS)}
    choices = {f"kept_indices.{leader}": ("INT32", (-1, -1)) for leader in leaders}
    choices |= {f"token_scores.{leader}": ("FLOAT", (-1, -1)) for leader in leaders}
    logits = ("FLOAT", (-1, 1, contract.vocab_size))
    assert built.outputs == {"logits": logits, "kept_lengths": ("INT32", (1, -1)), **caches, **choices}
    kept = next(capacity for capacity in contract.capacities if capacity[0] >= KEEP_RATIO * longest)
    assert built.profile == {
        **dict.fromkeys(rows, ((1,), (most,), (most,))),
        "input_ids": ((1, 1), (most, longest), (most, longest)),
        "capacity": (contract.capacities[0], kept, contract.capacities[-1]),
    }


def check_decoder(row: Row, built: Built, contract: Contract, capacity: Slots) -> None:
    dtype, most = TYPES[row["dtype"]], row["batch"]
    assert built.layers["KV_CACHE_UPDATE"] == 2 * LAYERS and built.layers["PLUGIN_V3"] == 0
    assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == LAYERS
    assert built.layers["ROTARY_EMBEDDING"] == 2 * LAYERS
    steps = dict.fromkeys(("input_ids", "position_ids", "logit_indices"), ("INT64", (-1, 1)))
    steps["cache_lengths"] = ("INT32", (1, -1))
    cache = (dtype, (-1, KV_HEADS, capacity[0], HEAD_DIM))
    past, present = (
        {f"{time}_{kind}.{layer}": cache for kind in ("key", "value") for layer in range(LAYERS)}
        for time in ("past", "present")
    )
    assert built.inputs.keys() == {*steps, *past, *contract.weights}
    assert {**steps, **past}.items() <= built.inputs.items()
    assert_weights(built, contract, dtype)
    assert built.outputs == {"logits": ("FLOAT", (-1, 1, contract.vocab_size)), **present}
    shape = (KV_HEADS, capacity[0], HEAD_DIM)
    assert built.profile == {
        **{name: ((1, 1), (most, 1), (most, 1)) for name in steps if name != "cache_lengths"},
        "cache_lengths": ((1, 1), (1, most), (1, most)),
        **{name: ((1, *shape), (most, *shape), (most, *shape)) for name in past},
    }


def check_block(row: Row, built: Built, contract: Contract, capacity: Slots) -> None:
    """A block engine is a decode engine for one row, and for up to block_tokens tokens."""
    dtype, most = TYPES[row["dtype"]], contract.block_tokens
    assert most == min(256, contract.capacities[0][0])
    assert built.layers["KV_CACHE_UPDATE"] == 2 * LAYERS and built.layers["PLUGIN_V3"] == 0
    assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == LAYERS
    steps = dict.fromkeys(("input_ids", "position_ids"), ("INT64", (1, -1)))
    steps |= {"logit_indices": ("INT64", (1, 1)), "cache_lengths": ("INT32", (1, 1))}
    shape = (1, KV_HEADS, capacity[0], HEAD_DIM)
    past, present = (
        {f"{time}_{kind}.{layer}": (dtype, shape) for kind in ("key", "value") for layer in range(LAYERS)}
        for time in ("past", "present")
    )
    assert built.inputs.keys() == {*steps, *past, *contract.weights}
    assert {**steps, **past}.items() <= built.inputs.items()
    assert built.outputs == {"logits": ("FLOAT", (1, 1, contract.vocab_size)), **present}
    varying = dict.fromkeys(("input_ids", "position_ids"), ((1, 1), (1, most), (1, most)))
    assert varying.items() <= built.profile.items()
    assert all(len(set(shapes)) == 1 for name, shapes in built.profile.items() if name not in varying)


def assert_weights(built: Built, contract: Contract, dtype: str) -> None:
    """Every matrix is an input in the engine's type, as large as its place in the weights file."""
    for name, (_, nbytes) in contract.weights.items():
        kind, shape = built.inputs[name]
        size = 1
        for dim in shape:
            size *= dim
        assert kind == dtype and size * contract.item_bytes == nbytes


def test_engines_without_chunkkv_keep_every_token(build: Builds) -> None:
    build(checkpoint_dir=checkpoint_of("llama3"), max_batch_size=2, max_seq_len=256)
    prefill, *decoders = build.recorded
    contract = Contract.read(build.folder)
    assert (contract.dtype, contract.leaders, contract.group_layers) == ("bfloat16", (), 1)
    assert prefill.inputs.keys() == {"input_ids", "lengths", "capacity", *contract.weights}
    caches = {f"kept_{kind}.{layer}" for kind in ("key", "value") for layer in range(LAYERS)}
    assert prefill.outputs.keys() == {"logits", "kept_lengths", *caches}
    assert len(decoders) == 4 and all(built.layers["PLUGIN_V3"] == 0 for built in build.recorded)
    engine = EngineFiles.load(build.folder)
    assert engine.settings is None and engine.tensorrt is not None and engine.tensorrt.chunkkv_ops == "none"


@pytest.mark.parametrize("ops", ["plugin", "functions"])
@pytest.mark.parametrize(("local_policy", "heads"), [("recent", "each"), ("recent", "shared"), ("chunks", "shared")])
def test_heads_of_two_classes_have_caches_of_two_lengths(
    build: Builds, monkeypatch: pytest.MonkeyPatch, local_policy: str, heads: str, ops: str
) -> None:
    """One layer of both classes and one of local heads: prefill keeps three parts, decode updates three caches."""
    settings = ChunkKVSettings(
        keep_per_10k=2_500,
        layer_groups=((0,), (1,)),
        budget_split="classes",
        num_kv_heads=2,
        reading_heads=((1,), ()),
        reading_share_per_10k=25_000,
        local_share_per_10k=5_000,
        local_policy=local_policy,
        heads=heads,
        value_norm="on",
        window_reduce="max",
        head_reduce="max",
    )
    monkeypatch.setattr(graph_build, "chunkkv_settings", lambda flags, *sizes: settings)
    sizes = {**MODEL, "hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"max_batch_size": 2, "max_seq_len": 1024, "max_num_tokens": 2048, "chunkkv": True}
    done = build(checkpoint_dir=engines.checkpoint_dir("llama3", **sizes), dtype="float32", chunkkv_ops=ops, **limits)
    assert done.err == ""
    prefill, *others = build.recorded
    contract, engine = Contract.read(build.folder), EngineFiles.load(build.folder)
    parts = [(part.layer, part.kv_heads, part.length_class) for part in contract.layout.parts]
    assert parts == [(0, (1,), 0), (0, (0,), 1), (1, (0, 1), 1)]
    assert engine.tensorrt is not None and engine.tensorrt.chunkkv_ops == ops
    scored = (0,) if local_policy == "recent" else (0, 1, 2)
    assert (contract.leaders, contract.scored) == ((0, 1, 2), scored)
    chosen = {0, 1} if local_policy == "recent" else {0, 1, 2}
    caches = {f"kept_{kind}.{part}" for kind in ("key", "value") for part in range(3)}
    choices = {f"kept_indices.{part}" for part in chosen} | {f"token_scores.{part}" for part in scored}
    assert prefill.outputs.keys() == {"logits", "kept_lengths", *caches, *choices}
    assert prefill.outputs["kept_indices.0"][1] == ((-1, 1, -1) if heads == "each" else (-1, -1))
    assert prefill.outputs["kept_lengths"] == ("INT32", (2, -1)) and prefill.inputs["capacity"] == ("INT64", (2,))
    least, _, most = prefill.profile["capacity"]
    assert all(lower < upper for lower, upper in zip(least, most, strict=True))
    for capacity, built in zip(contract.capacities, others[: len(contract.capacities)], strict=True):
        assert built.layers["KV_CACHE_UPDATE"] == 6 and built.layers["ATTENTION_INPUT"] == 3
        assert built.inputs["cache_lengths"] == ("INT32", (2, -1))
        for number, part in enumerate(contract.layout.parts):
            shape = (-1, len(part.kv_heads), capacity[part.length_class], HEAD_DIM)
            assert built.inputs[f"past_key.{number}"] == built.outputs[f"present_value.{number}"] == ("FLOAT", shape)
    assert contract.capacities[-1] == (1024, 1024) and any(slots[1] < slots[0] for slots in contract.capacities)


@pytest.mark.parametrize("ops", ["plugin", "functions"])
@pytest.mark.parametrize(
    "words",
    [
        {"head_reduce": "max"},
        {"value_norm": "on", "window_reduce": "max"},
        {"heads": "each", "value_norm": "on", "head_reduce": "max", "boundaries": "delimiter"},
        {"score": "logits", "heads": "each"},
    ],
    ids="-".join,
)
def test_other_scores_and_choices_per_head(build: Builds, words: dict[str, str], ops: str) -> None:
    """Every word of a setting gets into the engine by plugins, and by functions."""
    sizes = {**MODEL, "hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"max_batch_size": 2, "max_seq_len": 256, "chunkkv": True, "chunkkv_ops": ops, "dtype": "float16"}
    settings = {f"chunkkv_{name}": word for name, word in {"boundaries": "fixed", **words}.items()}
    assert build(checkpoint_dir=engines.checkpoint_dir("llama3", **sizes), **limits, **settings).err == ""
    prefill, contract, engine = build.recorded[0], Contract.read(build.folder), EngineFiles.load(build.folder)
    assert engine.settings is not None and words.items() <= engine.settings.to_dict().items()
    assert engine.tensorrt is not None and engine.tensorrt.chunkkv_ops == ops
    assert prefill.layers["PLUGIN_V3"] == (3 * LAYERS if ops == "plugin" else 0)
    heads = (2,) if words.get("heads") == "each" else ()
    assert (contract.heads_choose, contract.window) == (bool(heads), engine.settings.window)
    for layer in range(LAYERS):
        assert prefill.outputs[f"kept_indices.{layer}"] == ("INT32", (-1, *heads, -1))
        assert prefill.outputs[f"token_scores.{layer}"] == ("FLOAT", (-1, *heads, -1))
        assert prefill.outputs[f"kept_key.{layer}"] == ("HALF", (-1, 2, -1, HEAD_DIM))


def test_long_prompts_are_timed_at_a_usual_length(build: Builds) -> None:
    long = engines.checkpoint_dir("llama3", **{**MODEL, "max_position_embeddings": 20_000}, rope_scaling=None)
    build(checkpoint_dir=long, max_batch_size=2, max_seq_len=20_000, chunkkv=True)
    profile = build.recorded[0].profile
    assert profile["input_ids"] == ((1, 1), (1, 4096), (1, 20_000))
    assert profile["capacity"] == ((2560,), (10_048,), (20_032,))
    assert Contract.read(build.folder).capacities == ((2560,), (5056,), (10_048,), (20_032,))


@pytest.mark.parametrize(
    ("ops", "inside"), [("plugin", "6 of them ChunkKV plugins"), ("functions", "6 ChunkKV functions among them")]
)
def test_every_engine_is_reported_on(rtx: TensorRT, build: Builds, ops: str, inside: str) -> None:
    limits = {"max_batch_size": 1, "max_seq_len": 256, "log_level": "info"}
    text = build(checkpoint_dir=checkpoint_of("mistral"), chunkkv=True, chunkkv_ops=ops, **limits).err
    stages = re.findall(r"^(\S.*?) +\d+\.\d s$", text, re.MULTILINE)
    names = ["prefill", "decode 128", "decode 256", "block 128", "block 256"]
    assert stages == ["checkpoint", "weights", *names, "tokenizer", "checksums"]
    assert re.search(naming(rtx.version, ops), text.splitlines()[0])
    reports = re.findall(
        r"^(.*) engine: (\d+) layers(?:, )?(.*), (\S+ \S+), \d+\.\d s, peak memory", text, re.MULTILINE
    )
    sizes = [human_bytes(len(built.engine)) for built in build.recorded]
    layers = [str(built.layers.total()) for built in build.recorded]
    assert reports == list(zip(names, layers, [inside, "", "", "", ""], sizes, strict=True))
