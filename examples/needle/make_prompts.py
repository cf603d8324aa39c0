"""Write the example prompts anew: `python examples/needle/make_prompts.py`; the same files every time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

from documents import Task, Writer, test_prompt
from vocabulary import TOKEN_ID, text_of

from chunkkv.files import write_whole

STOP_ID: Final = TOKEN_ID["."]
FOLDER: Final = Path(__file__).resolve().parent / "prompts"
# name: (seed, tokens, depth of the needle, task)
PROMPTS: Final = {
    "demo": (1, 2000, 0.5, Task()),
    "home": (2, 1000, 0.3, Task("home")),
    "keeper": (3, 1000, 0.7, Task("keeper")),
    "sentence": (4, 1000, 0.5, Task(sentence=True)),
    "distractors": (5, 500, 0.5, Task(facts=8)),
}
PLAIN_TEXT: Final = (6, 200, 0.5, Task())


def prompt_ids(name: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, with <bos>, and of its answer, with <eos>."""
    seed, length, depth, task = PROMPTS.get(name, PLAIN_TEXT)
    return test_prompt(Writer(seed), length, task, depth)


def answer_span(ids: list[int], answer: list[int]) -> tuple[int, int]:
    """First and past-the-end position of the sentence that states `answer`, which ends with <eos>."""
    words = [word for word in answer[:-1] if word != STOP_ID]
    start = next(at for at in range(len(ids)) if ids[at : at + len(words)] == words)
    first = max((at + 1 for at in range(start) if ids[at] == STOP_ID), default=0)
    return first, ids.index(STOP_ID, start) + 1


def prompt_files() -> dict[str, str]:
    """File name to content."""
    files = {}
    for name, (seed, length, depth, task) in PROMPTS.items():
        ids, answer = prompt_ids(name)
        text = text_of(ids)
        content = {
            "text": text,
            "question": text[text.rindex("question:") :],
            "expected": text_of(answer),
            "tokens": len(ids),
            "answer_span": answer_span(ids, answer),
            "made_from": {"seed": seed, "length": length, "depth": depth, "task": asdict(task)},
        }
        files[f"{name}.json"] = json.dumps(content, indent=1) + "\n"
    files["short.txt"] = text_of(prompt_ids("short")[0]) + "\n"
    return files


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(exist_ok=True)
    for name, content in prompt_files().items():
        write_whole(FOLDER / name, content)


if __name__ == "__main__":
    main()
