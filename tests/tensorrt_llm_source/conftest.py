"""The packages of a source tree, and what runs chunkkv-build over them; skipped by name where one is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import engines
from support.builds import CommandLine, Outcome

from chunkkv.engine.tensorrt_llm_side_file import SideFile
from tensorrt_llm_source import package
from tensorrt_llm_source.recording import RecordedBuilder, RecordedConfig, RecordedNetwork

ROOT = Path(__file__).resolve().parents[2]
BINDINGS = ROOT / "build" / "tensorrt-llm-bindings"
FIRST = "10.7.0"  # the TensorRT of TensorRT-LLM 0.16
LIMITS = {"max_input_len": 2000, "max_seq_len": 2100, "max_num_tokens": 2048, "max_batch_size": 8}
LLAMA: dict[str, Any] = {
    **{"architecture": "LlamaForCausalLM", "dtype": "float16", "logits_dtype": "float32", "hidden_act": "silu"},
    **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512},
    **{"intermediate_size": 1024, "vocab_size": 1000, "max_position_embeddings": 4096, "norm_epsilon": 1e-5},
    **{"position_embedding_type": "rope_gpt_neox", "rotary_base": 10000.0, "rotary_scaling": None},
    **{"attn_bias": False, "mlp_bias": False, "quantization": {"quant_algo": None, "kv_cache_quant_algo": None}},
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
}


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the package tensorrt_llm of the source tree that TENSORRT_LLM_SOURCE names."""
    source = os.environ.get("TENSORRT_LLM_SOURCE")
    if not source:
        pytest.skip("TENSORRT_LLM_SOURCE names no source tree of TensorRT-LLM (its folder that holds tensorrt_llm/)")
    if not (Path(source) / "tensorrt_llm" / "functional.py").is_file():
        pytest.skip(f"TENSORRT_LLM_SOURCE is {source}, which has no tensorrt_llm/functional.py")
    if importlib.util.find_spec("torch") is None:
        pytest.skip("TensorRT-LLM needs torch, which is not installed here")
    if not (BINDINGS / FIRST).is_dir():
        pytest.skip("NVIDIA's bindings of TensorRT are not here: make test-tensorrt-llm fetches them")
    if shutil.which("cc") is None:
        pytest.skip("the bindings need three empty libraries, and there is no C compiler to make them")
    bindings = package.bindings_on_empty_libraries(BINDINGS / FIRST, tmp_path_factory.mktemp("bindings"))
    return package.import_tensorrt_llm(Path(source), bindings)[1]


@dataclass(frozen=True)
class Built:
    """What a build gave: the networks of its ranks with their optimisation profiles, and the engine directory."""

    outcome: Outcome
    networks: list[tuple[RecordedNetwork, RecordedConfig]]
    folder: Path

    @property
    def network(self) -> RecordedNetwork:
        """The network of the only rank."""
        ((network, _),) = self.networks
        return network

    @property
    def side_file(self) -> SideFile:
        """chunkkv_config.json."""
        return SideFile.read(self.folder)


@pytest.fixture
def build(
    llm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Built]:
    """Return what runs chunkkv-build with a model's config.json (no weights) and flags; None leaves a flag out."""
    library = tmp_path / "plugins" / "libchunkkv_tensorrt.so.10"
    library.parent.mkdir()
    library.write_bytes(b"plugins")
    monkeypatch.setenv("CHUNKKV_LIB", str(library.with_name("libchunkkv.so")))
    monkeypatch.chdir(tmp_path)

    def run(model: dict[str, Any], *words: str, **flags: Any) -> Built:
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **model}))
        named = {"backend": "tensorrt_llm", "chunkkv": True, "model_config": tmp_path / "config.json"}
        named |= {"output_dir": tmp_path / "engine", "log_level": "error", "chunkkv_keep_ratio": 0.2, **LIMITS, **flags}
        RecordedBuilder.networks.clear()
        given = {name: value for name, value in named.items() if value is not None}
        outcome = CommandLine(capsys)(*engines.command_line(given), *words)
        return Built(outcome, list(RecordedBuilder.networks), tmp_path / "engine")

    return run
