"""Compresses a document once and asks several questions about it at the same time, then goes on with a second turn.

    python examples/many_questions.py --engine_dir ENGINE --document FILE "Who owns the house?" "When was it built?"

The engine needs a tokenizer with a chat template. With --context the compressed document is kept for the next run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from chunkkv import ChunkKVSession, Context, SamplingParams
from chunkkv.conversation import Conversation


def compressed(session: ChunkKVSession, text: str, keep_ratio: float, file: Path | None) -> Context:
    """Return the document as a context: from `file` if it is there, else made now and saved there."""
    if file is not None and file.exists():
        return Context.load(file, session)
    context = session.compress([{"role": "user", "content": text}], keep_ratio=keep_ratio)
    if file is not None:
        context.save(file)
    return context


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask many questions about one document.")
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--document", type=Path, required=True)
    parser.add_argument("--keep_ratio", type=float, default=0.5)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--context", type=Path, help="safetensors file that keeps the context for the next run")
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args(words)

    session = ChunkKVSession.from_dir(args.engine_dir)
    began = time.perf_counter()
    context = compressed(session, args.document.read_text(encoding="utf-8"), args.keep_ratio, args.context)
    print(f"{context}, ready after {time.perf_counter() - began:.2f} s")

    sampling = SamplingParams(max_new_tokens=args.max_new_tokens)
    answers = session.generate(args.questions, sampling, context=context)
    for question, answer in zip(args.questions, answers, strict=True):
        statistics = answer.statistics
        prefilled = statistics.prompt_tokens - statistics.context_tokens
        print(f"> {question}\n{answer.text}")
        print(f"  [{prefilled} tokens prefilled, first token after {statistics.ttft_s:.2f} s]")

    # Several turns: Conversation keeps what the cache holds, and prefills what is new.
    conversation = Conversation(session, args.document.read_text(encoding="utf-8"), keep_ratio=args.keep_ratio)
    for question in (args.questions[0], "Say it in other words."):
        answer_text = "".join(event.text for event in conversation.ask(question, sampling))
        assert conversation.last is not None
        statistics = conversation.last.statistics
        print(f"> {question}\n{answer_text}\n  [{statistics.context_tokens} of {statistics.prompt_tokens} tokens held]")


if __name__ == "__main__":
    main()
