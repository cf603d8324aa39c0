"""Prints what a build would make, for --dry_run: the limits, the settings and a table of the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from chunkkv.cache_layout import ALL_HEADS
from chunkkv.limits import KEEP_SCALE
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.plan import GraphPlan, PartPlan
from chunkkv_builder.progress import human_bytes

LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768}
_PIPE_WIDTH = 120  # wide enough for the table where there is no terminal to ask


def print_plan(plan: GraphPlan, build: BuildConfig, console: Console | None = None) -> None:
    """Print the engine's limits and, for every layer, its role and what it keeps of prompts of 2k, 8k and 32k tokens.

    Neighbouring layers, or layer groups, that are alike share their rows; a layer with heads of two classes has one row
    for each.

    Parameters
    ----------
    plan : GraphPlan
        Model, settings and layers.
    build : BuildConfig
        The limits of the engine.
    console : Console, optional
        Where to print; default: standard output.
    """
    console = plan_console(console)
    model = plan.model
    weights = f"weights {build.dtype}"
    if build.weight_only_precision:
        weights = f"weights {build.weight_only_precision} times activations {build.weight_only_activations}"
    if build.prefill_precision:
        weights += f", prompts in {build.prefill_precision}"
    console.print(
        f"{model.architecture}: {model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}, "
        f"{human_bytes(plan.kv_bytes_per_token(build.cache_dtype))} of KV cache per token"
        + (f" in {build.kv_cache_dtype}" if build.kv_cache_dtype else "")
    )
    console.print(
        f"backend {build.backend}, {weights}, max_batch_size {build.max_batch_size}, "
        f"max_input_len {build.max_input_len}, max_seq_len {build.max_seq_len}, max_num_tokens {build.max_num_tokens}"
    )
    console.print(f"ChunkKV: {described(plan.settings)}")
    console.print(_table(plan, plan.kv_bytes_per_token(build.cache_dtype)))
    beyond = [name for name, length in LENGTHS.items() if length > build.max_input_len]
    if beyond:
        console.print(f"Prompts of {', '.join(beyond)} are above max_input_len; shown for comparison.")


class _Row(NamedTuple):
    """What the heads of one part of a layer do: role, kept tokens and saved bytes of a prompt of each length."""

    role: str
    kept: tuple[int, ...]
    saved: tuple[int, ...]

    def times(self, count: int) -> _Row:
        """Return the row of `count` such parts."""
        return self._replace(saved=tuple(count * amount for amount in self.saved))


def _table(plan: GraphPlan, per_token: int) -> Table:
    table = Table(box=box.SIMPLE, show_footer=True, padding=(0, 0, 0, 1), pad_edge=False)  # fits 80 columns
    rows = list(_rows(plan, per_token))
    saved = [sum(amounts) for amounts in zip(*(row.saved for _, row in rows), strict=True)]
    table.add_column("layer", footer="all", no_wrap=True)
    table.add_column("role")  # gives way on a narrow terminal
    for name, length in LENGTHS.items():
        kept = length if plan.settings is None else plan.settings.kept_tokens(length)
        table.add_column(f"kept\nat {name}", justify="right", footer=str(kept), no_wrap=True)
    for name, amount in zip(LENGTHS, saved, strict=True):
        table.add_column(f"KV saved\nat {name}", justify="right", footer=human_bytes(amount), no_wrap=True)
    for name, row in rows:
        table.add_row(name, row.role, *map(str, row.kept), *map(human_bytes, row.saved))
    return table


def _rows(plan: GraphPlan, per_token: int) -> Iterator[tuple[str, _Row]]:
    """Yield every row with the numbers of its layers."""
    groups = plan.settings.layer_groups if plan.settings else tuple((layer.index,) for layer in plan.layers)

    def of_group(group: tuple[int, ...]) -> tuple[_Row, ...]:
        return tuple(row for layer in group for row in _rows_of_layer(plan, layer, per_token, True))

    for rows, alike in groupby(groups, of_group):
        listed = list(alike)
        layers = [layer for group in listed for layer in group]
        if len(listed) > 1:
            for row, count in Counter(rows).items():
                yield _name(layers), row.times(count * len(listed))
            continue
        for of_each, equal in groupby(layers, lambda layer: _rows_of_layer(plan, layer, per_token, False)):
            numbers = list(equal)
            for row in of_each:
                yield _name(numbers), row.times(len(numbers))


def _name(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _rows_of_layer(plan: GraphPlan, layer: int, per_token: int, of_many: bool) -> tuple[_Row, ...]:
    """Return the rows of a layer; parts that do the same, such as heads that are ranked apart, share one."""
    rows = [_row(plan, part, per_token, of_many) for part in plan.parts_of(layer)]
    return tuple(row.times(len(list(equal))) for row, equal in groupby(rows))


def _row(plan: GraphPlan, part: PartPlan, per_token: int, of_many: bool) -> _Row:
    """Return the row of a part; `of_many` for a role that holds in every layer group of the same form."""
    kept = tuple(_kept(plan.settings, part, length) for length in LENGTHS.values())
    head_bytes = per_token // sum(plan.layout.heads)
    saved = (
        (length - count) * len(part.kv_heads) * head_bytes for length, count in zip(LENGTHS.values(), kept, strict=True)
    )
    return _Row(_role(plan, part, of_many), kept, tuple(saved))


def _kept(settings: ChunkKVSettings | None, part: PartPlan, length: int) -> int:
    """Return the tokens that a part keeps of a prompt; where parts are ranked together, what they keep on average."""
    if settings is None:
        return length
    if settings.budget_split == "ranked":
        return settings.kept_tokens(length)
    return settings.class_lengths(length)[part.length_class]


def _role(plan: GraphPlan, part: PartPlan, of_many: bool) -> str:
    settings = plan.settings
    if settings is None:
        return "keeps all"
    group = settings.layer_groups[plan.layers[part.layer].group]
    leader = plan.parts[part.leader]
    if not leader.scores:
        role = "keeps recent"
    elif settings.budget_split == "ranked":
        role = "is ranked"
    elif len(group) == 1:
        role = "chooses"
    elif of_many:
        role = f"1 of {len(group)} leads" if part.leads else f"{len(group) - 1} of {len(group)} follow"
    else:
        role = f"leads {group[0]}-{group[-1]}" if part.leads else f"follows {leader.layer}"
    if settings.heads == "each" and leader.scores:
        role += " per head"
    return role if part.head_class == ALL_HEADS else f"{len(part.kv_heads)} {part.head_class}: {role}"


def plan_console(console: Console | None = None) -> Console:
    """Return `console`, or one for standard output; one that is no terminal is made wide enough for the table."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def described(settings: ChunkKVSettings | None) -> str:
    """Return the settings as one line."""
    if settings is None:
        return "off, every prompt token is kept"
    amount = f"keep_ratio {settings.keep_ratio:g} (kvpress compression_ratio {1 - settings.keep_ratio:g})"
    if settings.budget_tokens:
        amount = f"budget_tokens {settings.budget_tokens}"
    return (
        f"{amount}, chunk_size {settings.chunk_size}, boundaries {settings.boundaries}, window {settings.window}, "
        f"sinks {settings.sinks}, pooling {settings.pooling}, score {settings.score}, min_tokens {settings.min_tokens}"
        f"{_split(settings)}"
    )


def _split(settings: ChunkKVSettings) -> str:
    """Return who keeps how many tokens, where it is not the same everywhere."""
    if settings.budget_split == "ranked":
        return ", one ranking of all KV heads" if settings.ranks_heads else ", one ranking of all layers"
    if settings.budget_split != "classes":
        return ""
    reading, heads = sum(map(len, settings.reading_heads)), settings.num_kv_heads * len(settings.reading_heads)
    return (
        f", {reading} of {heads} KV heads read and keep {settings.reading_share_per_10k / KEEP_SCALE:g} times as much, "
        f"the others {settings.local_share_per_10k / KEEP_SCALE:g} times"
    )
