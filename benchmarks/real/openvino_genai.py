"""Measures the cache eviction of OpenVINO GenAI on the prompts of the measurement, the question in the prompt.

python -m benchmarks.real.openvino_genai      # after benchmarks.real has made its engine and the transformers folder

OpenVINO GenAI cannot be fed an answer, so it writes one greedily, and so does ChunkKV for this comparison
(benchmarks/real/written.py). Needs the extra "openvino".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.real.contexts import Context, make_context
from benchmarks.real.measure import context_head, measured
from benchmarks.real.openvino_model import write_model
from benchmarks.real.policies import GREEDY, LEAST, OPENVINO, OPENVINO_FILE, OPENVINO_FULL
from benchmarks.real.written import CONTEXTS, KEEPS, TASKS, answer_room, holds
from benchmarks.results.runs import ROOT
from chunkkv.cli.progress import progress_bars
from chunkkv.evaluation.records import append_record
from chunkkv.session import ChunkKVSession
from chunkkv.text.tokenizer import Tokenizer

BLOCK = 32  # tokens of a block of its cache on a CPU; everything else is a multiple
PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_NUM_THREADS": 1,
}


def pipeline(folder: Path, most: int, window: int) -> Any:
    """Return a pipeline that keeps at most `most` tokens, 0 for all of them; `window` last queries choose."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 1, 1 << 14
    scheduler.enable_prefix_caching = scheduler.dynamic_split_fuse = False
    if most:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            BLOCK, BLOCK, most, genai.AggregationMode.SUM, snapkv_window_size=window
        )
    return genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", PROPERTIES)


@dataclass(frozen=True)
class Generation:
    """One answer to generate, and where its outcome is written."""

    context: Context
    task: str
    key: str
    most: int
    window: int

    def right(self, pipe: Any, tokenizer: Tokenizer) -> str:
        """Return 1 where the greedy answer holds the value, else 0."""
        asked = next(one for one in self.context.asked if one.name == self.task)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = answer_room(asked), False
        prompt = np.array([(*self.context.ids, *asked.question)], np.int64)
        (result,) = pipe.generate([ov.Tensor(prompt)], [config])
        return holds(tokenizer, asked, result.m_generation_ids[0])


def generations(context: Context) -> Iterator[Generation]:
    """Yield the answers of a context: from all tokens, and from the next multiple of a block of each share."""
    for task in TASKS:
        asked = next(one for one in context.asked if one.name == task)
        length = len(context.ids) + len(asked.question)
        yield Generation(context, task, f"{GREEDY}|{task}|{OPENVINO_FULL}|10000", 0, 0)
        for policy, window in OPENVINO.items():
            for keep in KEEPS:
                most = -(-max(LEAST, length * keep // 10_000) // BLOCK) * BLOCK
                yield Generation(context, task, f"{GREEDY}|{task}|{policy}|{keep}", most, window)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "results-real", help="engine and outcomes")
    folder = parser.parse_args().work_dir
    path = folder / OPENVINO_FILE
    write_model(folder / "transformers", folder / "openvino")
    tokenizer = ChunkKVSession.from_dir(folder / "engine", threads=1).tokenizer
    assert tokenizer is not None
    known = measured(path)
    todo = [
        one
        for length, count in CONTEXTS.items()
        for number in range(count)
        for one in generations(make_context(tokenizer, length, number))
        if one.key not in known.get(one.context.name, {}).get("outcomes", {})
    ]
    with progress_bars(False) as begin:
        advance = begin("answers", len(todo))
        for window, most in sorted({(one.window, one.most) for one in todo}):
            pipe = pipeline(folder / "openvino", most, window)
            for one in todo:
                if (one.most, one.window) == (most, window):
                    start = time.process_time()
                    right = one.right(pipe, tokenizer)
                    seconds = round(time.process_time() - start, 1)
                    kept = most or len(one.context.ids)
                    append_record(
                        path,
                        {**context_head(one.context), "seconds": seconds, "outcomes": {one.key: [kept, right, None]}},
                    )
                    advance(1)


if __name__ == "__main__":
    main()
