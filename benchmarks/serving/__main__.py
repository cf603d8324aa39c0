"""What clients of a server see: throughput, first tokens and longest gaps under load, a conversation, and capacity.

1. Load: 1, 8 and 32 clients at keep ratio 1.0 and 0.2, on `chunkkv serve` and, with --triton_python, on
   `chunkkv triton serve` (the Python of an environment with a tritonserver, docs/triton.md).
2. A conversation about a document of about 4,000 tokens.
3. How many long prompts fit a bound of KV memory, and what answers of mixed lengths cost.
4. Recovery after kill -9, on `chunkkv triton serve` with the shipped model.

    python -m benchmarks.serving --engine_dir engines/smollm2 --output docs/benchmarks/serving.json

Each part writes the JSON file anew; at the end the page and the picture are written beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import chunkkv
from benchmarks.serving import capacity, page
from benchmarks.serving.conversation import conversation
from benchmarks.serving.load import load_of
from benchmarks.serving.recovery import VICTIMS, recovery
from benchmarks.serving.servers import Kind, OwnServer, Running, TritonServer, own_server, triton_server
from chunkkv.files import write_whole
from chunkkv_builder import build as build_engine

COMMAND = "make bench-serving"
SHIPPED = Path(__file__).parents[2] / "examples" / "needle" / "model"
KEEPS = (1.0, 0.2)
NOTHING_HELD = ("--context_bytes", "0", "--queue_timeout_s", "600")


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Parameters
    ----------
    requests : dict of int to int
        Requests of a load, by its number of clients.
    share : float
        Length of the conversation's document; see `conversation`.
    bounds : tuple of int
        Bytes of KV memory whose capacity is counted.
    prompt : int
        Tokens of the prompts that are counted.
    kills : int
        How often each process is killed.
    """

    requests: dict[int, int]
    share: float
    bounds: tuple[int, ...]
    prompt: int
    kills: int


WHOLE = Sizes({1: 8, 8: 32, 32: 64}, 4 / 3, (1_500_000_000, 6_000_000_000), capacity.PROMPT, 3)
TINY = Sizes({1: 2, 2: 4}, 0.1, (20_000_000,), 512, 1)


def main() -> None:
    """Measure and write JSON, page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True, help="engine for ONNX Runtime with a chat template")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--triton_python", help="Python of an environment with a tritonserver")
    parser.add_argument("--tiny", action="store_true", help="a few requests of each, to see that it works")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    began, sizes = time.monotonic(), TINY if args.tiny else WHOLE
    values: dict[str, Any] = {**conditions(), "load": [], "conversation": [], "recovery": []}

    def save(part: str, row: dict[str, Any]) -> None:
        print(part, json.dumps(row), flush=True)
        values["seconds"] = round(time.monotonic() - began, 1)
        write_whole(args.output, json.dumps(values, indent=2) + "\n")

    for keep in KEEPS:
        values["conversation"].append(conversation(args.engine_dir, keep, sizes.share))
        save("conversation", values["conversation"][-1])
    servers: list[tuple[str, Kind, AbstractContextManager[Running]]] = [
        ("chunkkv serve", OwnServer(), own_server(args.engine_dir, *NOTHING_HELD))
    ]
    if args.triton_python is not None:
        flags = ("--queue_timeout_s", "600")
        servers.append(("chunkkv triton", TritonServer(), triton_server(args.engine_dir, args.triton_python, *flags)))
    for name, kind, starting in servers:
        with starting as server:
            load_of(server, kind, 1, 2, 1.0)  # memory and caches of the process
            for clients, requests in sizes.requests.items():
                for keep in KEEPS:
                    values["load"].append({"server": name, **load_of(server, kind, clients, requests, keep)})
                    save("load", values["load"][-1])
    values["capacity"] = capacity.measure(args.engine_dir, sizes.bounds, 16, sizes.prompt)
    save("capacity", values["capacity"])
    if args.triton_python is not None:
        with tempfile.TemporaryDirectory() as folder:
            engine = Path(folder) / "engine"
            build_engine.main(["--checkpoint_dir", str(SHIPPED), "--output_dir", str(engine), "--chunkkv"])
            for victim in VICTIMS:
                values["recovery"].append(recovery(engine, args.triton_python, victim, sizes.kills))
                save("recovery", values["recovery"][-1])
    for file in page.write(values, args.output):
        print(file)


def conditions() -> dict[str, Any]:
    """Return where and with what this is measured."""
    models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "command": COMMAND,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} CPUs, {models[0] if models else platform.processor()}",
        "chunkkv": chunkkv.__version__,
    }


if __name__ == "__main__":
    main()
