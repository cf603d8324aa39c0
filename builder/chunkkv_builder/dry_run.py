"""Prints what a build would make, for --dry_run: the limits, the settings and a table of the layers."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.config import BuildConfig
from chunkkv_builder.plan import GraphPlan, LayerPlan
from chunkkv_builder.progress import human_bytes

LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768}
_PIPE_WIDTH = 120  # wide enough for the table where there is no terminal to ask


def print_plan(plan: GraphPlan, build: BuildConfig, console: Console | None = None) -> None:
    """Print the engine's limits and, for every layer, its role and what it keeps of prompts of 2k, 8k and 32k tokens.

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
    console.print(
        f"{model.architecture}: {model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}, "
        f"{human_bytes(plan.kv_bytes_per_token(build.dtype))} of KV cache per token"
    )
    console.print(
        f"backend {build.backend}, {weights}, max_batch_size {build.max_batch_size}, "
        f"max_input_len {build.max_input_len}, max_seq_len {build.max_seq_len}, max_num_tokens {build.max_num_tokens}"
    )
    console.print(f"ChunkKV: {described(plan.settings)}")
    console.print(_table(plan, plan.kv_bytes_per_token(build.dtype)))
    beyond = [name for name, length in LENGTHS.items() if length > build.max_input_len]
    if beyond:
        console.print(f"Prompts of {', '.join(beyond)} are above max_input_len; shown for comparison.")


def _table(plan: GraphPlan, per_token: int) -> Table:
    table = Table(box=box.SIMPLE, show_footer=True, collapse_padding=True, pad_edge=False)  # fits 80 columns
    table.add_column("layer", footer="all", no_wrap=True)
    table.add_column("role", no_wrap=True)
    kept = {name: _kept(plan.settings, length) for name, length in LENGTHS.items()}
    saved = {name: (LENGTHS[name] - kept[name]) * per_token for name in LENGTHS}
    for name in LENGTHS:
        table.add_column(f"kept\nat {name}", justify="right", footer=str(kept[name]), no_wrap=True)
    for name in LENGTHS:
        table.add_column(f"KV saved\nat {name}", justify="right", footer=human_bytes(saved[name]), no_wrap=True)
    for layer in plan.layers:
        amounts = [human_bytes(saved[name] // len(plan.layers)) for name in LENGTHS]
        table.add_row(str(layer.index), _role(plan, layer), *map(str, kept.values()), *amounts)
    return table


def _kept(settings: ChunkKVSettings | None, length: int) -> int:
    return length if settings is None else settings.kept_tokens(length)


def _role(plan: GraphPlan, layer: LayerPlan) -> str:
    if plan.settings is None:
        return "keeps all"
    group = plan.settings.layer_groups[layer.group]
    if len(group) == 1:
        return "chooses"
    return f"chooses for {group[0]}-{group[-1]}" if layer.is_leader else f"follows {layer.leader}"


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
    )
