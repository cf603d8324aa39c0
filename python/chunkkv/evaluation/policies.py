"""Which tokens of a prompt stay: ChunkKV in its variants and what it is compared with, all with as many tokens.

CONTRIBUTING.md says how to add a policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from chunkkv import reference
from chunkkv.contexts.scorers import SCORERS
from chunkkv.engine.layer_groups import layer_groups
from chunkkv.errors import ConfigError
from chunkkv.evaluation.prefilled import PrefilledPrompt
from chunkkv.evaluation.requirements import check_queries
from chunkkv.limits import KEEP_SCALE
from chunkkv.settings import ChunkKVSettings

SNAPKV_POOLING = 5
PYRAMID_BETA = 20
_NUMBERS = ("window", "chunk_size", "sinks", "pooling")
_NAMES = ("boundaries", "score", "leader", "window_reduce", "head_reduce", "value_norm")

KeptPositions = list[np.ndarray]  # per layer the ascending positions [N] that stay
Chooser = Callable[[PrefilledPrompt, ChunkKVSettings, int], KeptPositions]


@dataclass(frozen=True)
class Policy:
    """One way to choose what stays.

    Parameters
    ----------
    name : str
        How it was asked for, such as "snapkv:pooling=7"; a rule that was spelled otherwise under its name here.
    rule : str
        A name in RULES.
    settings : ChunkKVSettings
        What the rule works with; its keep ratio and budget are not used, because `keep` is given a number of tokens.
    scorer : str or None, default None
        What scores the tokens of rule "engine", a name of chunkkv.contexts.scorers.SCORERS; None for what the engine
        takes by itself.
    """

    name: str
    rule: str
    settings: ChunkKVSettings
    scorer: str | None = None

    @property
    def compresses(self) -> bool:
        """Whether the policy drops anything at all."""
        return self.rule != "full"

    @property
    def reads_cache(self) -> bool:
        """Whether the policy chooses for itself, which needs an engine whose whole cache can be read after prefill."""
        return RULES[self.rule].reads_cache

    @property
    def is_buildable(self) -> bool:
        """Whether an engine can be built that keeps what this policy keeps."""
        return RULES[self.rule].is_buildable

    @property
    def least_tokens(self) -> int:
        """The fewest kept tokens that hold the window, the sinks and one chunk."""
        return self.settings.window + self.settings.sinks + self.settings.chunk_size

    def keep(self, prompt: PrefilledPrompt, kept: int) -> KeptPositions:
        """Return per layer the ascending positions that stay: `kept` of them in every layer, or on average over all.

        Raises ConfigError for fewer kept tokens than the policy's window and sinks, or where the engine lacks what the
        policy looks at.
        """
        if not self.compresses or kept >= len(prompt):
            return [np.arange(len(prompt))] * prompt.num_layers
        if kept < self.settings.window + self.settings.sinks:
            raise ConfigError(
                f"policy {self.name} always keeps {self.settings.window} + {self.settings.sinks} tokens; {kept} were "
                "allowed: give a larger keep ratio or a smaller window"
            )
        return RULES[self.rule].choose(prompt, self.settings, kept)


@dataclass(frozen=True)
class Rule:
    """How a policy chooses.

    Parameters
    ----------
    about : str
        The rule in a few words.
    choose : Chooser
        Called with a prompt after prefill, the policy's settings and the number of tokens to keep per layer.
    settings : dict[str, Any]
        Settings in which the rule differs from the engine's; the user's override them.
    scored_layers : {"leaders", "all", "none"}, default "leaders"
        Layers whose window queries the rule scores with: the leaders of the policy's groups, every layer, or none.
    reads_cache : bool, default True
        Whether `choose` needs the prompt's whole cache or queries.
    is_buildable : bool, default False
        Whether an engine can be built that keeps the same tokens.
    """

    about: str
    choose: Chooser
    settings: dict[str, Any] = field(default_factory=dict)
    scored_layers: Literal["leaders", "all", "none"] = "leaders"
    reads_cache: bool = True
    is_buildable: bool = False


def _per_group(
    prompt: PrefilledPrompt, settings: ChunkKVSettings, choose: Callable[[int], np.ndarray]
) -> KeptPositions:
    """Return per layer what `choose` says for the leader of its group."""
    chosen: KeptPositions = []
    for group in settings.layer_groups:
        chosen += [choose(settings.leader_of(group))] * len(group)
    return chosen


def _chunks(prompt: PrefilledPrompt, settings: ChunkKVSettings, kept: int) -> KeptPositions:
    flags = prompt.is_delimiter if settings.boundaries == "delimiter" else None

    def choose(leader: int) -> np.ndarray:
        scores = prompt.token_scores(leader, settings)
        return reference.select_tokens(scores, len(prompt), kept, settings, flags)

    return _per_group(prompt, settings, choose)


def _engine(prompt: PrefilledPrompt, settings: ChunkKVSettings, kept: int) -> KeptPositions:
    if prompt.engine_choice is None:
        raise ConfigError("policy engine needs an engine built with --chunkkv")
    return prompt.engine_choice(kept)


def _streaming(prompt: PrefilledPrompt, settings: ChunkKVSettings, kept: int) -> KeptPositions:
    recent = len(prompt) - (kept - settings.sinks)
    return [np.concatenate([np.arange(settings.sinks), np.arange(recent, len(prompt))])] * prompt.num_layers


def _random(prompt: PrefilledPrompt, settings: ChunkKVSettings, kept: int) -> KeptPositions:
    def choose(leader: int) -> np.ndarray:
        scores = np.random.default_rng([prompt.seed, leader]).random(len(prompt), dtype=np.float32)
        return reference.select_tokens(scores, len(prompt), kept, settings)

    return _per_group(prompt, settings, choose)


def pyramid_budgets(layers: int, length: int, kept: int, always: int) -> list[int]:
    """Return how many of `length` tokens each of `layers` layers keeps: falling by equal steps, `kept` on average.

    Every layer keeps at least `always` tokens (window and sinks). Beyond those the last layer keeps 1/PYRAMID_BETA of
    the average, or more where the first layer would otherwise have to keep more tokens than the prompt has.
    """
    share, most = kept - always, length - always  # of the tokens that are ranked: mean per layer, and all there are
    last = max(share // PYRAMID_BETA, 2 * share - most)
    ideal = np.linspace(2 * share - last, last, layers) if layers > 1 else np.array([float(share)])
    budgets = np.floor(ideal + 1e-9).astype(int)
    rest = layers * share - int(budgets.sum())
    budgets[np.argsort(budgets - ideal, kind="stable")[:rest]] += 1  # those that rounding took most from
    return [always + int(budget) for budget in budgets]


def _pyramid(prompt: PrefilledPrompt, settings: ChunkKVSettings, kept: int) -> KeptPositions:
    budgets = pyramid_budgets(prompt.num_layers, len(prompt), kept, settings.window + settings.sinks)
    return [
        reference.select_tokens(prompt.token_scores(layer, settings), len(prompt), budget, settings)
        for layer, budget in enumerate(budgets)
    ]


def _everything(prompt: PrefilledPrompt, settings: ChunkKVSettings, kept: int) -> KeptPositions:
    return [np.arange(len(prompt))] * prompt.num_layers


# Policies choose once per layer and keep as many tokens in every head; rule "engine" is what the engine itself does.
_ONE_CHOICE: dict[str, Any] = {
    "budget_tokens": 0,
    "heads": "shared",
    "budget_split": "uniform",
    "num_kv_heads": 0,
    "reading_heads": (),
    "reading_share_per_10k": KEEP_SCALE,
    "local_share_per_10k": KEEP_SCALE,
    "local_policy": "recent",
    "leaders": (),
}
_PLAIN: dict[str, Any] = {"boundaries": "fixed"}
_TOKENS: dict[str, Any] = {
    **_PLAIN,
    "chunk_size": 1,
    "pooling": SNAPKV_POOLING,
    "window_reduce": "mean",
    "head_reduce": "mean",
    "value_norm": "off",
}
RULES: dict[str, Rule] = {
    "full": Rule("every token", _everything, scored_layers="none", reads_cache=False),
    "engine": Rule("what the engine's own compress graph keeps", _engine, scored_layers="none", reads_cache=False),
    "chunkkv": Rule("chunks as the engine's settings cut and score them", _chunks, is_buildable=True),
    "chunkkv-delimiter": Rule(
        "chunks that end with a clause or a line", _chunks, {"boundaries": "delimiter"}, is_buildable=True
    ),
    "snapkv": Rule("single tokens, scores pooled over 5 neighbours, heads sharing", _chunks, _TOKENS),
    "pyramidkv": Rule(
        "as snapkv, more in the first layers and less in the last", _pyramid, _TOKENS, scored_layers="all"
    ),
    "streaming_llm": Rule(
        "the first tokens and the most recent ones", _streaming, {**_PLAIN, "chunk_size": 1}, scored_layers="none"
    ),
    "random": Rule("chunks drawn at random", _random, _PLAIN, scored_layers="none"),
}


def _letters(name: str) -> str:
    """Return a rule's name as papers and other programs may spell it, too: SnapKV, StreamingLLM, streaming-llm."""
    return name.lower().replace("-", "").replace("_", "")


_SPELLED = {_letters(name): name for name in RULES}


def parse_policies(text: str, engine: ChunkKVSettings) -> list[Policy]:
    """Return the policies that `text` lists, in its order.

    Parameters
    ----------
    text : str
        Entries separated by commas, each a rule's name and changed settings, as in
        "full,chunkkv,snapkv:pooling=7,chunkkv:chunk_size=20:layer_reuse=0-1+2-3:leader=first".
    engine : ChunkKVSettings
        The engine's settings: they hold where neither the entry nor its rule names one.

    Raises
    ------
    ConfigError
        For an unknown rule or setting, an invalid value, and a policy that is listed twice.
    """
    policies = [make_policy(part.strip(), engine) for part in text.split(",")]
    names = [policy.name for policy in policies]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"policies lists {twice} twice; name each once")
    return policies


def make_policy(text: str, engine: ChunkKVSettings) -> Policy:
    """Return the policy that one entry of parse_policies describes; raises ConfigError."""
    word, *changes = text.split(":")
    rule = _SPELLED.get(_letters(word))
    if rule is None:
        raise ConfigError(f"policies names {word!r}; there are {', '.join(RULES)}")
    values: dict[str, Any] = dict(RULES[rule].settings)
    allowed, scorer = ("scorer",) if rule == "engine" else (*_NUMBERS, *_NAMES, "layer_reuse"), None
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in allowed:
            raise ConfigError(
                f"policies has {text!r}, where {change!r} is no setting of {rule}; give name=value, with a name of "
                f"{', '.join(allowed)}"
            )
        if name == "scorer":
            if value not in SCORERS:
                raise ConfigError(
                    f"policies has {text!r}, where scorer is {value!r}; allowed is {' or '.join(SCORERS)}"
                )
            scorer = value
        elif name == "layer_reuse":
            count = sum(map(len, engine.layer_groups))
            values["layer_groups"] = layer_groups(count, value.replace("+", ","))
        elif name in _NUMBERS:
            if not value.isdecimal():
                raise ConfigError(f"policies has {text!r}, where {name} is {value!r}; give a whole number")
            values[name] = int(value)
        else:
            values[name] = value
    return Policy(":".join((rule, *changes)), rule, _settings(text, engine, values), scorer)


def check_policy(policy: Policy, engine: ChunkKVSettings) -> None:
    """Raise ConfigError where an engine of these settings does not give the queries that the policy scores with."""
    scored = RULES[policy.rule].scored_layers
    if scored == "none":
        return
    with_queries = [engine.leader_of(group) for group in engine.layer_groups]
    for group in policy.settings.layer_groups:
        for layer in group if scored == "all" else [policy.settings.leader_of(group)]:
            check_queries(layer, policy.settings.window, with_queries, engine.window)


def _settings(text: str, engine: ChunkKVSettings, values: dict[str, Any]) -> ChunkKVSettings:
    merged = {**{name: getattr(engine, name) for name in (*_NUMBERS, *_NAMES)}, **values}
    least = merged["window"] + merged["sinks"] + merged["chunk_size"]
    try:
        if values.get("score", engine.score) != "softmax":
            engine = engine.with_score(values.get("score", engine.score))
        return dataclasses.replace(engine, **_ONE_CHOICE, **values, min_tokens=max(engine.min_tokens, least))
    except ConfigError as error:
        raise ConfigError(f"policies has {text!r}: {error}") from None
