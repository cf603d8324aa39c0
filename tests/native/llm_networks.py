"""TensorRT-LLM networks with ChunkKV from the real command line on the double, and what is compared with them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from support import engines
from support.tensorrt_llm_double import installed
from support.tensorrt_llm_double.attention import Hidden, Pools
from support.tensorrt_llm_double.checkpoints import convert
from support.tensorrt_llm_double.driver import Driver, Row
from support.tensorrt_llm_double.graph import Graph, Node
from support.tensorrt_llm_double.run import Execution

from chunkkv.gpu import tensorrt_plugins
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder import build as build_engine
from native.memory import Memory
from native.plugin_host import Field
from native.plugin_op import PluginNode

ROOT = Path(__file__).resolve().parents[2]
LAYERS, TOKENS_PER_BLOCK, MAX_SEQ_LEN = 4, 16, 256
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "fp8": 1}
KV_SCALES = {"int8": 0.06, "fp8": 0.02}  # the largest cached number of the tiny model is about 7
_FOLDER = tempfile.TemporaryDirectory(prefix="chunkkv-llm-networks-")


@cache
def checkpoint(**overrides: Any) -> Path:
    """Return a tiny Llama with heads that the kernels take; its weights are float16, the same for both paths."""
    sizes = {"head_dim": 64, "num_hidden_layers": LAYERS, "dtype": "float16"}
    return engines.checkpoint_dir("llama3", **{**sizes, **overrides})


@cache
def networks(
    *,
    source: Path | None = None,
    dtype: str = "float16",
    kv: str | None = None,
    tp_size: int = 1,
    pp_size: int = 1,
    plain: bool = False,
    **flags: Any,
) -> tuple[Graph, ...]:
    """Return the networks of all ranks; `kv` is int8 or fp8, `flags` are ChunkKV's, `plain` leaves ChunkKV out."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "checkpoint"
    scale = KV_SCALES.get(kv or "", 1.0)
    convert(
        source or checkpoint(),
        folder,
        dtype,
        tp_size=tp_size,
        pp_size=pp_size,
        kv_cache=kv and kv.upper(),
        kv_scale=scale,
    )
    with installed():
        found = build(folder, plain, **flags)
    assert len(found) == tp_size * pp_size
    return found


def build(folder: Path, plain: bool, **flags: Any) -> tuple[Graph, ...]:
    """Return the networks of a TensorRT-LLM checkpoint; the double must be installed."""
    output = build_engine_dir(folder, plain, **flags)
    return tuple(Graph.from_bytes(file.read_bytes()) for file in sorted(output.glob("rank*.engine")))


def build_engine_dir(folder: Path, plain: bool = False, **flags: Any) -> Path:
    """Return the engine directory of a TensorRT-LLM checkpoint; the double must be installed."""
    output = Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "engine"
    own = {"checkpoint_dir": folder, "output_dir": output, "max_batch_size": 8, "max_seq_len": MAX_SEQ_LEN}
    own |= {"max_input_len": MAX_SEQ_LEN - 64, "tokens_per_block": TOKENS_PER_BLOCK}
    own |= {"use_paged_context_fmha": "disable", "use_fp8_context_fmha": "disable"}
    if plain:
        _trtllm_build(engines.command_line({**own, **flags}))
    else:
        _chunkkv_build(engines.command_line({**own, "chunkkv": True, **engines.SMALL_CHUNKKV, **flags}))
    return output


def _trtllm_build(arguments: list[str]) -> None:
    from tensorrt_llm.commands import build

    before, sys.argv = sys.argv, ["trtllm-build", *arguments]
    try:
        build.main()
    finally:
        sys.argv = before


@contextmanager
def plugin_library() -> Iterator[None]:
    """Let a file stand for the plugin library: the double takes any."""
    library = Path(_FOLDER.name) / "libchunkkv_tensorrt.so.10"
    library.touch()
    with mock.patch.object(tensorrt_plugins, "PLUGIN_FOLDERS", (library.parent,)):
        yield


def _chunkkv_build(arguments: list[str]) -> None:
    with plugin_library():
        build_engine.main(["--backend", "tensorrt_llm", "--log_level", "error", *arguments])


@dataclass
class Machine:
    """Where plugins run: emulated kernels on the host, or a GPU with memory of its own."""

    memory: Memory | None = None

    @property
    def exact(self) -> bool:
        """Whether results are those of the host to the last bit."""
        return self.memory is None or not self.memory.on_device

    def execution(self, graph: Graph) -> Execution:
        """Return the network with its plugins in the plugin host."""
        return Execution(graph, self.plugin, Pools() if self.memory is None else DevicePools(self.memory))

    def plugin(self, node: Node) -> Any:
        """Return what runs a plugin node, made of the very bytes of its fields."""
        fields = [
            Field(name, kind, bytes.fromhex(data), length) for name, kind, length, data in node.attributes["fields"]
        ]
        return PluginNode(node.plugin or "", fields, memory=self.memory).run


class DevicePools(Pools):
    """Pools in device memory, copied to the host and back for the reference attention."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._places = memory, {}

    def allocate(self, nbytes: int) -> int:
        raw = self._memory.empty((nbytes,), "int8")
        self._places[raw.pointer] = raw
        return raw.pointer

    def load(self, address: int) -> np.ndarray:
        return self._memory.get(self._places[address]).view(np.uint8)

    def store(self, address: int, content: np.ndarray) -> None:
        self._memory.write(self._places[address], content)


@dataclass(frozen=True)
class Workload:
    """Prompts of unequal lengths, one of them kept whole, and the tokens that are decoded behind them."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def random(cls, lengths: tuple[int, ...], steps: int, seed: int = 5) -> Workload:
        """Return prompts of these lengths and as many tokens for each; no token ends an answer."""
        random = np.random.RandomState(seed)
        rows = [tuple(random.randint(2, 384, length).tolist()) for length in lengths]
        return cls(tuple(rows), tuple(tuple(random.randint(2, 384, steps).tolist()) for _ in lengths))


@dataclass(frozen=True)
class Outcome:
    """Logits [steps,vocab] per prompt, and per prompt what every leader kept."""

    logits: list[np.ndarray]
    kept: list[dict[int, np.ndarray]]

    def hidden(self, work: Workload, settings: ChunkKVSettings) -> list[Hidden]:
        """Return what every layer must not see of each prompt in a full cache, so that it sees the same."""
        return [dropped(kept, settings, len(prompt)) for kept, prompt in zip(self.kept, work.prompts, strict=True)]


def driven(stages: list[list[Execution]], settings: ChunkKVSettings, kv_bytes: int, work: Workload) -> Outcome:
    """Prefill the prompts one after the other, decode them together."""
    kept: list[dict[int, np.ndarray]] = []

    def look(row: Row) -> None:
        kept.append(kept_by_leader([rank[0] for rank in stages], settings, len(row.prompt)))

    return Outcome(_logits(Driver(stages, settings, kv_bytes), work, [{} for _ in work.prompts], look), kept)


def _logits(driver: Driver, work: Workload, hidden: list[Hidden], look: Callable[[Row], None]) -> list[np.ndarray]:
    """Return logits [steps,vocab] per prompt; `look` is called after each prefill."""
    rows = [Row(np.array(p, np.int32), hidden=mask) for p, mask in zip(work.prompts, hidden, strict=True)]
    logits = []
    for row in rows:
        logits.append([driver.step([row])[0]])
        look(row)
    for step in range(len(work.tokens[0]) - 1):
        for row, tokens in zip(rows, work.tokens, strict=True):
            row.tokens.append(tokens[step])
        for made, found in zip(logits, driver.step([], rows), strict=True):
            made.append(found)
    return [np.array(made) for made in logits]


def leaders(graph: Graph) -> list[Node]:
    """Return the nodes that choose, in layer order."""
    return [node for node in graph.of("ChunkKVCompress") if len(node.outputs) == 2]


def kept_by_leader(stages: list[Execution], settings: ChunkKVSettings, length: int) -> dict[int, np.ndarray]:
    """Return what each leader kept in the context step of one prompt that was just run."""
    kept = settings.kept_tokens(length)
    if kept == length:
        return {settings.leader_of(group): np.arange(length) for group in settings.layer_groups}
    found = [stage.seen[node.outputs[1]][:kept] for stage in stages for node in leaders(stage.graph)]
    return {settings.leader_of(group): indices for group, indices in zip(settings.layer_groups, found, strict=True)}


def dropped(kept: dict[int, np.ndarray], settings: ChunkKVSettings, length: int) -> Hidden:
    """Return what every layer must not see where its group kept `kept` of a prompt of `length` tokens."""
    rest = {leader: np.setdiff1d(np.arange(length), indices) for leader, indices in kept.items()}
    return {layer: rest[settings.leader_of(group)] for group in settings.layer_groups for layer in group}


def full_cache_logits(
    graph: Graph, kv_bytes: int, work: Workload, hidden: list[Hidden] | None = None
) -> list[np.ndarray]:
    """Return the logits of a network without ChunkKV: a full cache, of which attention does not see what is hidden."""
    driver = Driver([[Execution(graph, _no_plugin, Pools())]], None, kv_bytes)
    return _logits(driver, work, hidden or [{} for _ in work.prompts], lambda row: None)


def _no_plugin(node: Node) -> Any:
    raise AssertionError(f"{node.name} is a plugin")
