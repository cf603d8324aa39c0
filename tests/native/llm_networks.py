"""TensorRT-LLM networks with ChunkKV from the real command line on the double, and what is compared with them."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from support import engines
from support.tensorrt_llm_double import installed
from support.tensorrt_llm_double.attention import Hidden, Pools
from support.tensorrt_llm_double.checkpoints import convert
from support.tensorrt_llm_double.driver import Driver
from support.tensorrt_llm_double.graph import Graph, Node
from support.tensorrt_llm_double.run import Arrays, Execution

from chunkkv.settings import ChunkKVSettings
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
    """Return a tiny Llama with heads that the kernels take; its weights are float16, so that both paths have the same."""
    sizes = {"head_dim": 64, "num_hidden_layers": LAYERS, "dtype": "float16"}
    return engines.checkpoint_dir("llama3", **{**sizes, **overrides})


@cache
def networks(
    generation: str,
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
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    converted = convert(
        source or checkpoint(),
        folder / "checkpoint",
        dtype,
        tp_size=tp_size,
        pp_size=pp_size,
        kv_cache=kv and kv.upper(),
        kv_scale=KV_SCALES.get(kv or "", 1.0),
    )
    own = {"checkpoint_dir": converted, "output_dir": folder / "engine", "max_batch_size": 8}
    own |= {"max_input_len": MAX_SEQ_LEN - 64, "max_seq_len": MAX_SEQ_LEN, "tokens_per_block": TOKENS_PER_BLOCK}
    own |= {"use_paged_context_fmha": "disable", "use_fp8_context_fmha": "disable"}
    with installed(generation):
        if plain:
            _trtllm_build(engines.command_line(own))
        else:
            _chunkkv_build(engines.command_line({**own, "chunkkv": True, **engines.SMALL_CHUNKKV, **flags}))
    files = sorted((folder / "engine").glob("rank*.engine"))
    assert len(files) == tp_size * pp_size
    return tuple(Graph.from_bytes(file.read_bytes()) for file in files)


def _trtllm_build(arguments: list[str]) -> None:
    from tensorrt_llm.commands import build

    before, sys.argv = sys.argv, ["trtllm-build", *arguments]
    try:
        build.main()
    finally:
        sys.argv = before


def _chunkkv_build(arguments: list[str]) -> None:
    raise NotImplementedError


@dataclass
class Machine:
    """Where plugins run: emulated kernels on the host, or a GPU with memory of its own."""

    memory: Memory | None = None

    def execution(self, graph: Graph) -> Execution:
        """Return the network with its plugins in the plugin host."""
        return Execution(graph, self.plugin, Pools() if self.memory is None else DevicePools(self.memory))

    def plugin(self, node: Node) -> Any:
        """Return what runs a plugin node, made of the very bytes of its fields."""
        fields = [
            Field(name, kind, bytes.fromhex(data), length) for name, kind, length, data in node.attributes["fields"]
        ]
        made = PluginNode(node.plugin or "", fields, memory=self.memory)

        def run(given: Arrays) -> Arrays:
            return made.run(given)

        return run


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


def leaders(graph: Graph) -> list[Node]:
    """Return the nodes that choose, in layer order."""
    return [node for node in graph.of("ChunkKVCompress") if len(node.outputs) == 2]


def kept_by_layer(execution: Execution, settings: ChunkKVSettings, length: int) -> dict[int, np.ndarray]:
    """Return what each leader kept in the context step of one prompt that was just run."""
    kept = settings.kept_tokens(length)
    found = [execution.seen[node.outputs[1]][:kept] for node in leaders(execution.graph)]
    return {settings.leader_of(group): indices for group, indices in zip(settings.layer_groups, found, strict=True)}


def dropped(kept: dict[int, np.ndarray], settings: ChunkKVSettings, length: int) -> Hidden:
    """Return what every layer must not see where its group kept `kept` of a prompt of `length` tokens."""
    if settings.kept_tokens(length) == length:
        return {}
    rest = {leader: np.setdiff1d(np.arange(length), indices) for leader, indices in kept.items()}
    return {layer: rest[settings.leader_of(group)] for group in settings.layer_groups for layer in group}


def full_cache_logits(
    graph: Graph, kv_bytes: int, prompts: list[list[int]], tokens: list[list[int]], hidden: list[Hidden]
) -> list[np.ndarray]:
    """Return the logits of a network without ChunkKV: a full cache, of which attention does not see what is hidden."""
    driver = Driver([[Execution(graph, _no_plugin, Pools())]], None, kv_bytes)
    return driver.generate(prompts, tokens, hidden)


def _no_plugin(node: Node) -> Any:
    raise AssertionError(f"{node.name} is a plugin")
