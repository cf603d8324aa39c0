"""Prints what a TensorRT-LLM build would make, for --dry_run: limits, settings, a table of the layer-reuse groups."""

from __future__ import annotations

from argparse import Namespace

from rich import box
from rich.console import Console
from rich.table import Table

from chunkkv.engine.tensorrt_llm_side_file import KV_ITEM_BYTES
from chunkkv.settings import ChunkKVSettings
from chunkkv_builder.backends.tensorrt_llm.model import LlmModel
from chunkkv_builder.dry_run import LENGTHS, described, plan_console
from chunkkv_builder.progress import human_bytes


def print_plan(model: LlmModel, settings: ChunkKVSettings, limits: Namespace, console: Console | None = None) -> None:
    """Print model, settings and, for every layer-reuse group, what it keeps of prompts of 2k, 8k and 32k tokens.

    Parameters
    ----------
    model : LlmModel
        The model; bytes are those of all its tensor-parallel ranks together.
    settings : ChunkKVSettings
        ChunkKV's settings.
    limits : Namespace
        trtllm-build's flags, as far as they are known.
    console : Console, optional
        Where to print; default: standard output.
    """
    console = plan_console(console)
    layer_bytes = 2 * model.num_kv_heads * model.head_size * KV_ITEM_BYTES[model.kv_dtype]
    console.print(
        f"{model.architecture}: {model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_size} in "
        f"{model.kv_dtype}, {human_bytes(layer_bytes * model.num_layers)} of KV cache per token"
    )
    names = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "tokens_per_block")
    values = {name: getattr(limits, name, None) for name in names}
    shown = ", ".join(f"{name} {'as trtllm-build has it' if v is None else v}" for name, v in values.items())
    console.print(f"backend tensorrt_llm, tp_size {model.tp_size}, pp_size {model.pp_size}, {shown}")
    console.print(f"ChunkKV: {described(settings)}, leader {settings.leader}")
    console.print(_table(settings, layer_bytes))


def _table(settings: ChunkKVSettings, layer_bytes: int) -> Table:
    table = Table(box=box.SIMPLE, show_footer=True, collapse_padding=True, pad_edge=False)
    table.add_column("layers", footer="all", no_wrap=True)
    table.add_column("chooses", no_wrap=True)
    kept = {name: settings.kept_tokens(length) for name, length in LENGTHS.items()}
    saved = {name: (LENGTHS[name] - kept[name]) * layer_bytes for name in LENGTHS}
    layers = sum(map(len, settings.layer_groups))
    for name in LENGTHS:
        table.add_column(f"kept\nat {name}", justify="right", footer=str(kept[name]), no_wrap=True)
    for name in LENGTHS:
        footer = human_bytes(saved[name] * layers)
        table.add_column(f"KV saved\nat {name}", justify="right", footer=footer, no_wrap=True)
    for group in settings.layer_groups:
        amounts = [human_bytes(saved[name] * len(group)) for name in LENGTHS]
        span = str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"
        table.add_row(span, str(settings.leader_of(group)), *map(str, kept.values()), *amounts)
    return table
