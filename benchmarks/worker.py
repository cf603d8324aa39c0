"""Measures one side of a comparison in a process of its own: prefill, compression, decode, peak memory.

Run by benchmarks/against_transformers.py; prints one JSON line. Both sides take the same request file.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from chunkkv.executors.onnxruntime.executor import OnnxRuntimeExecutor


def peak_mb() -> float:
    """Return the largest resident size of this process so far, in MB (10**6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def resident_mb() -> float:
    """Return the current resident size in MB."""
    import psutil  # of the extra `peers`

    return psutil.Process().memory_info().rss / 1e6


def run_ours(case: dict[str, Any], ids: np.ndarray) -> dict[str, Any]:
    """Prefill, compress and decode with an engine directory; decode is teacher-forced, as on the other side."""
    from threading import Event

    from chunkkv.executors.onnxruntime.prefill import OnnxRuntimePrefiller
    from chunkkv.requests import make_requests
    from chunkkv.session import ChunkKVSession

    session = ChunkKVSession.from_dir(case["engine_dir"], threads=case["threads"])
    executor, loaded = cast("OnnxRuntimeExecutor", session.executor), resident_mb()
    ratio = case["keep_ratio"]
    request = make_requests([ids], None, session.limits, session.settings, ratio, None, case["steps"])[0]
    prefills, compressions, decodes = [], [], []
    for _ in range(case["repeats"]):
        cache = executor.new_cache(1, request.kept_tokens + case["steps"])
        sizes = case["block"], case["window"]
        prefiller = OnnxRuntimePrefiller(executor.step, executor.compress, *sizes, executor.reread)
        (prefilled,) = prefiller.run([request], cache, Event())
        prefills.append(prefilled.prefill_s)
        compressions.append(prefilled.compress_s)
        decoder = executor.decoder(cache)
        times = []
        for step in range(case["steps"]):
            started = time.perf_counter()
            last = decoder.step([0], [ids[step]], [len(ids) + step], [request.kept_tokens + step])
            times.append(time.perf_counter() - started)
        decodes.append(statistics.median(times))
    assert prefilled.logits is not None
    choice = prefilled.choice
    return {
        "prefill_s": prefills,
        "compress_s": compressions,
        "decode_s": decodes,
        "kept_tokens": request.kept_tokens,
        "resident_after_load_mb": loaded,
        "peak_mb": peak_mb(),
        "prefill_top": int(prefilled.logits.argmax()),
        "last_logits": [float(value) for value in last[0, :8]],
        "kept": {} if choice is None else {str(k): v.tolist() for k, v in choice.kept_indices.items()},
    }


def timed_press(case: dict[str, Any], spent: dict[str, float]) -> Any:
    """Return kvpress's ChunkKVPress over SnapKVPress, which adds its seconds to `spent`.

    The projection of the window's queries is counted apart: this runtime gets them from attention, for free.
    """
    from kvpress import ChunkKVPress, SnapKVPress
    from kvpress.presses import snapkv_press

    def timed(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return result

        return run

    snapkv_press.get_prerope_query_states = timed("queries", snapkv_press.get_prerope_query_states)
    press = ChunkKVPress(SnapKVPress(1 - case["keep_ratio"], window_size=case["window"]), case["chunk_size"])
    press.compress = timed("press", press.compress)
    return press


def run_transformers(case: dict[str, Any], ids: np.ndarray) -> dict[str, Any]:
    """The same with transformers' sdpa attention and kvpress's ChunkKVPress over SnapKVPress."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(case["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        case["checkpoint_dir"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    loaded, tokens = resident_mb(), torch.from_numpy(ids)[None]
    spent = {"press": 0.0, "queries": 0.0}
    press = timed_press(case, spent)
    prefills, compressions, decodes = [], [], []
    with torch.no_grad():
        for _ in range(case["repeats"]):
            cache, spent["press"], spent["queries"] = DynamicCache(), 0.0, 0.0
            started = time.perf_counter()
            with press(model) if case["keep_ratio"] < 1 else nullcontext():
                output = model(tokens, past_key_values=cache, logits_to_keep=1)
            # The press runs inside prefill; the projection of the window's queries is charged to neither side.
            prefills.append(time.perf_counter() - started - spent["press"])
            compressions.append(spent["press"] - spent["queries"])
            kept, times = cache.get_seq_length(), []
            for step in range(case["steps"]):
                started = time.perf_counter()
                place = torch.tensor([[len(ids) + step]])
                last = model(tokens[:, step : step + 1], past_key_values=cache, position_ids=place).logits
                times.append(time.perf_counter() - started)
            decodes.append(statistics.median(times))
    return {
        "prefill_s": prefills,
        "compress_s": compressions,
        "decode_s": decodes,
        "kept_tokens": kept,
        "resident_after_load_mb": loaded,
        "peak_mb": peak_mb(),
        "prefill_top": int(output.logits[0, -1].argmax()),
        "last_logits": [float(value) for value in last[0, -1, :8]],
    }


def main() -> None:
    """Read the case file named on the command line, measure, print the result as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "transformers"])
    parser.add_argument("case", type=Path, help="JSON file written by against_transformers.py")
    arguments = parser.parse_args()
    case = json.loads(arguments.case.read_text())
    ids = np.asarray(case["ids"], dtype=np.int64)
    run = run_ours if arguments.side == "ours" else run_transformers
    print(json.dumps(run(case, ids)))


if __name__ == "__main__":
    main()
