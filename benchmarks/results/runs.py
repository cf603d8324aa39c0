"""What is measured for the results page, and on which engine of the shipped model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chunkkv.evaluation.evaluator import Plan
from chunkkv.evaluation.policies import parse_policies
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.evaluation.texts.templates import NEEDLE
from chunkkv.session import ChunkKVSession

ROOT: Final = Path(__file__).resolve().parents[2]
MODEL: Final = ROOT / "examples" / "needle" / "model"
# Every setting that a default might change is named, so that the numbers stay those of these settings.
ENGINE_FLAGS: Final = (
    "--chunkkv --chunkkv_window 32 --chunkkv_chunk_size 10 --chunkkv_sinks 4 --chunkkv_boundaries fixed "
    "--chunkkv_pooling 1 --chunkkv_score softmax --chunkkv_head_reduce mean --chunkkv_leader last "
    "--chunkkv_layer_reuse 1 --chunkkv_min_tokens 64 --max_batch_size 64"
)
FIXED, FIXED_20, CLAUSES = "chunkkv", "chunkkv:chunk_size=20", "chunkkv-delimiter:chunk_size=20"
CLAUSES_10, LOGITS = "chunkkv-delimiter", "chunkkv:score=logits"
TOKENS_1, TOKENS, TOKENS_7 = "snapkv:pooling=1", "snapkv", "snapkv:pooling=7"
PYRAMID, STREAMING, RANDOM = "pyramidkv", "streaming_llm", "random"


def reuse(size: int, leader: str) -> str:
    """Return the policy with groups of `size` layers and this leader."""
    return f"chunkkv:layer_reuse={size}:leader={leader}"


@dataclass(frozen=True)
class Run:
    """Suites with policies at shares kept (per 10,000), `examples` of each cell."""

    name: str
    suites: tuple[str, ...]
    policies: tuple[str, ...]
    keeps: tuple[int, ...]
    lengths: tuple[int, ...]
    modes: tuple[str, ...]
    examples: int

    def plan(self, session: ChunkKVSession) -> Plan:
        """Return the plan for an engine built with ENGINE_FLAGS."""
        assert session.settings is not None
        suites = make_suites(session.settings)
        return Plan(
            suites=tuple(suites[name] for name in self.suites),
            policies=tuple(parse_policies(",".join(("full", *self.policies)), session.settings)),
            keeps=self.keeps,
            lengths=self.lengths,
            modes=self.modes,
            examples=self.examples,
            seed=0,
            wording=NEEDLE,
        )


_METHODS = (FIXED, FIXED_20, CLAUSES, CLAUSES_10, LOGITS, TOKENS_1, TOKENS, TOKENS_7, PYRAMID, STREAMING, RANDOM)
_REUSED = tuple(reuse(size, leader) for size in (2, 4) for leader in ("first", "last"))
_FEW = (FIXED, CLAUSES, TOKENS, STREAMING)
_SOME = (FIXED, FIXED_20, CLAUSES, TOKENS_1, TOKENS, STREAMING, RANDOM)
_BOTH = ("in", "after")
_OTHERS = ("dense", "questions", "rule", "distractors", "store")  # what it solves with a full cache
RUNS: Final = (
    Run("recall", ("recall",), (*_METHODS, *_REUSED), (5_000, 2_000, 1_000), (1024,), _BOTH, 100),
    Run("straddle", ("straddle",), _FEW, (2_000,), (512,), ("in",), 50),
    Run("needle", ("needle",), _FEW, (2_000,), (512, 1024, 2048), ("in",), 20),
    Run("others", _OTHERS, _SOME, (2_000, 1_250), (512,), _BOTH, 60),
)
