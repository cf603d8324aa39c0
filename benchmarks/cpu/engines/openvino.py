"""OpenVINO GenAI's continuous batching, with the full cache and with its cache eviction."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.cpu.contract import BenchmarkEngine, Case, Runner, folder_of, is_ready, mark_ready, transformers_folder
from benchmarks.real.openvino_model import write_model

BLOCK = 32  # tokens of a block of its cache on a CPU; all sizes of the eviction are multiples
WINDOW = 16  # last queries that choose what is evicted
DEFAULT = "default"  # weights in float32, everything else as OpenVINO chooses for the machine
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenvinoRunner:
    """A pipeline and one request for each row.

    Parameters
    ----------
    case : Case
        What is measured.
    """

    def __init__(self, case: Case) -> None:
        scheduler = genai.SchedulerConfig()
        tokens = len(case.prompts) * (case.length + case.steps + 2 * BLOCK)
        scheduler.num_kv_blocks = -(-tokens // BLOCK) + 2 * len(case.prompts)
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs = max(tokens, 256), len(case.prompts)
        scheduler.enable_prefix_caching = scheduler.dynamic_split_fuse = False
        if case.keep < 100:
            scheduler.use_cache_eviction = True
            most = -(-case.kept // BLOCK) * BLOCK
            scheduler.cache_eviction_config = genai.CacheEvictionConfig(
                BLOCK, BLOCK, most, genai.AggregationMode.SUM, snapkv_window_size=WINDOW
            )
        model = "float32" if case.weights == DEFAULT else case.weights
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": case.threads}
        properties |= EXACT if case.weights == "float32" else {}
        folder = folder_of(case.work, "openvino", model)
        self._pipe, self._case = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties), case
        self._answers: list[Any] = []

    def prefill(self) -> list[int]:
        """Run all prompts; return the first token of each row."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = self._case.steps + 2, False, True
        prompts = [ov.Tensor(np.array([prompt], np.int64)) for prompt in self._case.prompts]
        self._answers = [self._pipe.add_request(row, prompt, config) for row, prompt in enumerate(prompts)]
        return self.step()

    def step(self) -> list[int]:
        """Return the next token of each row."""
        tokens: dict[int, int] = {}
        while len(tokens) < len(self._answers):
            self._pipe.step()
            for row, answer in enumerate(self._answers):
                if row not in tokens and answer.can_read():
                    (output,) = answer.read().values()
                    tokens[row] = int(output.generated_ids[0])
        return [tokens[row] for row in range(len(tokens))]

    def compress_s(self) -> float | None:
        """Return None: eviction is spread over the steps."""
        return None


class Openvino:
    """OpenVINO GenAI."""

    def version(self) -> str:
        """Return the versions of the packages."""
        return ", ".join(f"{name} {version(name)}" for name in ("openvino-genai", "openvino", "nncf"))

    def prepare(self, work: Path, model: Path, weights: str) -> None:
        """Write the folder of transformers as an OpenVINO model, and compress its weights where asked."""
        if weights == DEFAULT:
            weights = "float32"
        folder = folder_of(work, "openvino", weights)
        if is_ready(folder):
            return
        exact = folder_of(work, "openvino", "float32")
        write_model(transformers_folder(work), exact)
        if weights == "int4":
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "generation_config.json"):
                (folder / name).write_bytes((exact / name).read_bytes())
            compressed = nncf.compress_weights(
                ov.Core().read_model(exact / "openvino_model.xml"),
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=32,
                ratio=1.0,
            )
            ov.save_model(compressed, folder / "openvino_model.xml")
        mark_ready(folder)

    def load(self, case: Case) -> Runner:
        """Load the model."""
        return OpenvinoRunner(case)


ENGINE: BenchmarkEngine = Openvino()
