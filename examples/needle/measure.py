"""Measure the needle model with its full cache: `python examples/needle/measure.py --model examples/needle/model`.

Writes accuracy.json and prints the model card's table. Exact match means that greedy decoding gives the expected answer
and then the end token; one forward pass over prompt and answer decides it, because greedy decoding takes the expected
path exactly when every expected token is the most likely one after those before it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

import torch
from documents import Task, Writer, test_prompt
from transformers import LlamaForCausalLM
from vocabulary import PAD_ID

from chunkkv.evaluation.statistics import wilson
from chunkkv.files import write_whole

TASKS: Final = {
    "code": Task(),
    "code, as a sentence": Task(sentence=True),
    "home": Task("home"),
    "keeper": Task("keeper"),
    "code among 8": Task(facts=8),
    "code among 8 that share words": Task(facts=8, sharing="grid"),
    "rule obeyed": Task(facts=2, sharing="grid", rule="forbidden"),
    "rule about a neighbour": Task(facts=2, sharing="grid", rule="neighbour"),
}
LENGTHS: Final = (128, 256, 512, 1024, 2048, 4096)
TOKENS_PER_PASS: Final = 8192


@torch.inference_mode()
def right_tokens(model: LlamaForCausalLM, examples: list[tuple[list[int], list[int]]]) -> list[list[bool]]:
    """Per example and answer token: is it the most likely one after the prompt and the answer so far?"""
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.full((len(examples), longest), PAD_ID, dtype=torch.long)  # padding on the right: causal, so harmless
    for row, (prompt, answer) in enumerate(examples):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    rights = []
    for row, (prompt, answer) in enumerate(examples):
        logits = model.lm_head(hidden[row, len(prompt) - 1 : len(prompt) + len(answer) - 1])
        rights.append((logits.argmax(-1) == torch.tensor(answer)).tolist())
    return rights


def measure_cell(model: LlamaForCausalLM, name: str, length: int, count: int, seed: int) -> dict[str, object] | None:
    """One task at one length; None where the task's facts do not fit."""
    writer = Writer([seed, length, list(TASKS).index(name)])
    try:
        examples = [test_prompt(writer, length, TASKS[name]) for _ in range(count)]
    except ValueError:
        return None
    size = max(1, TOKENS_PER_PASS // length)
    rights = [right for at in range(0, count, size) for right in right_tokens(model, examples[at : at + size])]
    exact = sum(map(all, rights))
    low, high = wilson(exact, count)
    return {
        "task": name,
        "length": length,
        "n": count,
        "exact": round(exact / count, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "first_token": round(sum(right[0] for right in rights) / count, 4),
    }


def card_table(cells: list[dict[str, Any]]) -> str:
    """The cells as the Markdown table of the model card: exact match in percent with its interval."""
    lengths = sorted({cell["length"] for cell in cells})
    lines = ["| asked for | " + " | ".join(f"{length}" for length in lengths) + " |", "|---|" + "---|" * len(lengths)]
    for name in dict.fromkeys(cell["task"] for cell in cells):
        texts = []
        for length in lengths:
            matching = [cell for cell in cells if (cell["task"], cell["length"]) == (name, length)]
            percent = [f"{matching[0][key] * 100:.1f}" for key in ("exact", "low", "high")] if matching else []
            texts.append(f"{percent[0]} ({percent[1]}–{percent[2]})" if matching else "–")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every task at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="JSON file of the results; printed only when left out")
    parser.add_argument("--n", type=int, default=200, help="prompts per cell; fewer from 2048 tokens on")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    began, cells = time.monotonic(), []
    for length in arguments.lengths:
        count = arguments.n // max(1, length // 1024)
        for name in TASKS:
            cell = measure_cell(model, name, length, count, arguments.seed)
            if cell:
                cells.append(cell)
                print(f"{time.monotonic() - began:6.0f} s", *cell.values(), sep=" · ", flush=True)
    print(card_table(cells))
    if arguments.out:
        content = {"cache": "full", "metric": "exact match", "seed": arguments.seed, "cells": cells}
        write_whole(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
