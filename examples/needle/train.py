"""Train the needle model: `python examples/needle/train.py --out examples/needle/model`, under half an hour on a core.

Two chained runs. The first teaches plain associative recall, where the heads that look things up form; the second goes
from short documents to documents of 2304 tokens. Progress goes to standard output, one line per 50 steps.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from documents import KIND_NAMES, Document, Writer
from publish import write_model
from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE

LM_WEIGHT, LM_SHARE = 0.1, 0.06
LOG_EVERY = 50


def _short(writer: Writer, length: int) -> Document:
    facts = 1 + writer.picker.below(max(1, length // 64))
    return writer.full(length, facts, facts + 1)


def _long(writer: Writer, length: int) -> Document:
    facts = 1 + writer.picker.below(max(2, length // 40))
    return writer.full(length, facts, min(facts + 1, 24) if facts > 1 else 2)


def _ruled(writer: Writer, length: int) -> Document:
    rules = 1 + writer.picker.below(2)
    if length <= 128 or writer.picker.chance() < 0.3:
        return writer.dense(length, share=0.35, rules=rules)
    facts = rules + 1 + writer.picker.below(max(2, length // 64))
    return writer.full(length, facts, min(facts + 2, 20), rules=rules)


MAKERS: dict[str, Callable[[Writer, int], Document]] = {
    "pairs": lambda writer, length: writer.pairs(length),
    "any pairs": lambda writer, length: writer.pairs(length, None, None),
    "two words": lambda writer, length: writer.recall(length, 0),
    "same noun": lambda writer, length: writer.recall(length, 0, "noun"),
    "is": lambda writer, length: writer.recall(length, 1),
    "list": lambda writer, length: writer.name_list(length),
    "dense": lambda writer, length: writer.dense(length, share=0.3 + 0.3 * writer.picker.chance()),
    "short": _short,
    "long": _long,
    "rules": _ruled,
}
SENTENCES = {
    "two words": 0.1,
    "is": 0.1,
    "same noun": 0.05,
    "any pairs": 0.05,
    "list": 0.1,
    "dense": 0.45,
    "rules": 0.15,
}


@dataclass(frozen=True)
class Stage:
    """So many steps of one length; `mixture` gives the share of each of MAKERS, `words` as for Writer."""

    length: int
    batch: int
    steps: int
    mixture: dict[str, float]
    words: int | None = None
    until: float = 1.1  # the stage ends early once recall is this accurate


RUNS: list[list[Stage]] = [
    [
        Stage(32, 32, 1200, {"pairs": 1.0}, words=8, until=0.99),
        Stage(32, 32, 600, {"any pairs": 0.8, "same noun": 0.2}, words=8, until=0.96),
        Stage(32, 32, 600, {"any pairs": 0.3, "same noun": 0.4, "two words": 0.3}, words=24, until=0.96),
        Stage(64, 16, 400, {"any pairs": 0.2, "same noun": 0.2, "two words": 0.2, "is": 0.2, "list": 0.2}),
        Stage(128, 16, 400, SENTENCES, words=16),
        Stage(128, 16, 500, SENTENCES),
    ],
    [
        Stage(128, 16, 400, {"two words": 0.05, "is": 0.05, "list": 0.1, "dense": 0.4, "short": 0.2, "rules": 0.2}),
        Stage(256, 8, 500, {"is": 0.05, "list": 0.1, "dense": 0.3, "short": 0.35, "rules": 0.2}),
        Stage(512, 4, 600, {"list": 0.1, "dense": 0.25, "short": 0.2, "long": 0.25, "rules": 0.2}),
        Stage(1024, 4, 250, {"dense": 0.15, "long": 0.65, "rules": 0.2}),
        Stage(2304, 2, 250, {"dense": 0.1, "long": 0.7, "rules": 0.2}),
    ],
]


def model_config() -> LlamaConfig:
    """The shape of the shipped model: 1,049,728 parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        initializer_range=0.07,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        use_cache=False,
    )


@dataclass
class Batch:
    """Tokens [B, S], and the places in the flattened tokens that the loss predicts from, with a weight each."""

    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    groups: dict[str, list[int]]  # which of the places belong to which kind of answer token


class Batches:
    """Endless batches of one stage, the same for the same seed."""

    def __init__(self, stage: Stage, seed: list[int]) -> None:
        self.stage = stage
        self.writer = Writer(seed, stage.words)
        self.limit = stage.length * stage.batch // 3  # a fixed number of loss places keeps the shapes fixed

    def _document(self) -> Document:
        dice = self.writer.picker.chance()
        chosen = next(iter(self.stage.mixture))  # stays where the shares sum to a hair below 1
        for name, share in self.stage.mixture.items():
            dice -= share
            if dice < 0:
                chosen = name
                break
        return MAKERS[chosen](self.writer, self.stage.length)

    def __next__(self) -> Batch:
        length, rows, picker = self.stage.length, self.stage.batch, self.writer.picker
        tokens = torch.full((rows, length), PAD_ID, dtype=torch.long)
        answers: list[tuple[int, int]] = []
        others: list[tuple[int, int]] = []
        members_of: dict[str, list[int]] = defaultdict(list)
        for row in range(rows):
            document = self._document()
            ids = document.tokens[:length]
            tokens[row, : len(ids)] = torch.tensor(ids)
            learned = set(document.answer_places)
            kind_of: dict[int, str] = {}
            for question in document.questions:
                kind = "refusal" if question.refused else question.kind
                kind_of |= dict.fromkeys(range(question.start, question.end), kind)
                if not question.refused and not question.sentence:
                    kind_of[question.start] = "first " + kind
            for place in document.answer_places:
                if place < length:
                    members_of[kind_of.get(place, document.label)].append(len(answers))
                    answers.append((row * length + place - 1, ids[place]))
            others += [
                (row * length + place - 1, ids[place])
                for place in range(1, len(ids))
                if place not in learned and picker.chance() < LM_SHARE
            ]
        answers = answers[: self.limit]
        others = others[: self.limit - len(answers)]
        groups = {name: [i for i in members if i < len(answers)] for name, members in members_of.items()}
        missing = self.limit - len(answers) - len(others)
        chosen = torch.tensor([*answers, *others, *([(0, 0)] * missing)])
        weights = torch.zeros(self.limit)
        weights[: len(answers)] = 1.0 / max(1, len(answers))
        weights[len(answers) : len(answers) + len(others)] = LM_WEIGHT / max(1, len(others))
        return Batch(tokens, chosen[:, 0], chosen[:, 1], weights, groups)


def learning_rate(step: int, steps: int, peak: float, warm_up: int, final: float) -> float:
    """Linear warm-up, constant, cosine over the last 30 % down to `final` of the peak (1.0: no decay)."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    start = int(steps * 0.7)
    if step < start:
        return peak
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start))))


def optimizer_for(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


class Progress:
    """Accuracy per kind of answer token since the last line."""

    def __init__(self) -> None:
        self.right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.losses: list[float] = []

    def add(self, loss: float, hits: list[bool], groups: dict[str, list[int]]) -> None:
        """Count one step."""
        self.losses.append(loss)
        for name, members in groups.items():
            self.right[name][0] += sum(hits[i] for i in members)
            self.right[name][1] += len(members)

    def share(self, name: str) -> float:
        """Accuracy of one kind of token since the last line."""
        right, count = self.right[name]
        return right / max(1, count)

    def line(self) -> str:
        """Loss and accuracies as text; starts anew."""
        names = ["recall", "list", *(f"{first}{kind}" for kind in KIND_NAMES for first in ("first ", "")), "refusal"]
        parts = [f"{name} {self.right[name][0] / self.right[name][1]:.3f}" for name in names if self.right[name][1]]
        text = f"loss {sum(self.losses) / len(self.losses):.3f} · " + " · ".join(parts)
        self.right.clear()
        self.losses.clear()
        return text


def train_run(model: LlamaForCausalLM, run: int, stages: list[Stage], arguments: argparse.Namespace) -> int:
    """One run with a fresh optimizer; returns the number of tokens seen."""
    began, step, seen = time.monotonic(), 0, 0
    steps = sum(stage.steps for stage in stages)
    optimizer = optimizer_for(model, arguments.rate)

    def loss_and_hits(
        tokens: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[places])
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * weights).sum(), logits.argmax(-1) == targets

    progress = Progress()
    for number, stage in enumerate(stages):
        batches = Batches(stage, [arguments.seed, run, number])
        for index in range(stage.steps):
            rate = learning_rate(step, steps, arguments.rate, 40, 1.0 if run + 1 < len(RUNS) else 0.05)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(batches)
            loss, hits = loss_and_hits(batch.tokens, batch.places, batch.targets, batch.weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.add(loss.item(), hits.tolist(), batch.groups)
            step, seen = step + 1, seen + batch.tokens.numel()
            if step % LOG_EVERY == 0 or index + 1 == stage.steps:
                learned = progress.share("recall") >= stage.until
                speed = f"{time.monotonic() - began:.0f} s · {seen / 1e6:.2f} M tokens"
                print(f"run {run} stage {number} step {step}/{steps} · {speed} · {progress.line()}", flush=True)
                if learned:
                    step += stage.steps - index - 1
                    break
    return seen


def main() -> None:
    """Train with the command line's settings and write the model directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the model, replaced when it exists")
    parser.add_argument("--seed", type=int, default=1, help="of documents and weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    model = LlamaForCausalLM(model_config())
    model.train()
    tokens = 0
    for run, stages in enumerate(RUNS):
        tokens += train_run(model, run, stages, arguments)
        write_model(model, arguments.out)
        minutes = (time.monotonic() - began) / 60
        print(f"wrote {arguments.out} after run {run}: {minutes:.1f} minutes, {tokens / 1e6:.1f} M tokens", flush=True)


if __name__ == "__main__":
    main()
