"""ChunkKV's flags of a build, and the settings that they and a recipe ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chunkkv.command_line import CommandParser, errors_name_flags, path_text, whole_number
from chunkkv.engine.layer_groups import SYNTAX, layer_groups
from chunkkv.engine.recipe import read_recipe
from chunkkv.errors import ConfigError
from chunkkv.limits import CHOICES, RANGES
from chunkkv.settings import DELIMITER_CHUNK_SIZE, ChunkKVSettings
from chunkkv.settings import keep_ratio_to_per_10k as to_per_10k

PREFIX = "chunkkv_"
DEFAULTS = ChunkKVSettings()
AUTO = "auto"
_OF_CLASSES = ("reading_heads", "reading_share_per_10k", "local_share_per_10k", "local_policy")


def chunkkv_settings(
    flags: argparse.Namespace, num_layers: int, num_kv_heads: int = 0, has_tokenizer: bool = True
) -> ChunkKVSettings | None:
    """Return the ChunkKV settings the flags ask for, None without --chunkkv; raises UsageError.

    Parameters
    ----------
    flags : Namespace
        Of chunkkv_builder.flags.parse.
    num_layers, num_kv_heads : int
        Layers of the model and KV heads of a layer; the latter is needed where heads of a layer may keep unequal
        numbers of tokens.
    has_tokenizer : bool, default True
        Whether delimiter chunks are possible, which --chunkkv_boundaries auto then means.
    """
    if not flags.chunkkv:
        return None
    values: dict[str, Any] = {
        name.removeprefix(PREFIX): value
        for name, value in vars(flags).items()
        if name.startswith(PREFIX) and value is not None
    }
    values.pop("ops", None)  # what the nodes are, not what is kept
    if values.pop("tp_agree", False):  # the ranks' scores are added up, which no maximum survives
        values.setdefault("head_reduce", "mean")
    with errors_name_flags(PREFIX):
        if (recipe := values.pop("recipe", None)) is not None:
            values = _over_recipe(values, read_recipe(Path(recipe), num_layers))
        layer_reuse = values.pop("layer_reuse", "1")
        for name in ("keep", "max_keep"):
            if (share := values.pop(f"{name}_ratio", None)) is not None:
                values[f"{name}_per_10k"] = to_per_10k(share, f"{name}_ratio")
        if "max_keep_per_10k" in values and "keep_per_10k" not in values:
            values["keep_per_10k"] = min(DEFAULTS.keep_per_10k, values["max_keep_per_10k"])
        if values.get("boundaries", AUTO) == AUTO:
            values["boundaries"] = "delimiter" if has_tokenizer else "fixed"
        if values["boundaries"] == "delimiter":
            values.setdefault("chunk_size", DELIMITER_CHUNK_SIZE)
        if values.get("budget_split") == "classes":
            if "reading_heads" not in values:
                raise ConfigError("budget_split is 'classes', whose heads are listed in a recipe: give one too")
            values["num_kv_heads"] = num_kv_heads
        if values.get("budget_split") == "ranked" and values.get("heads") == "each":
            values["num_kv_heads"] = num_kv_heads
        least = sum(values.get(name, getattr(DEFAULTS, name)) for name in ("window", "sinks", "chunk_size"))
        values.setdefault("min_tokens", max(DEFAULTS.min_tokens, least))
        return ChunkKVSettings(**values, layer_groups=layer_groups(num_layers, layer_reuse))


def _over_recipe(flags: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings with those of the flags in their place.

    A share and a number exclude each other; leaders belong to the recipe's groups, and classes to its budget_split.
    """
    replaced: set[str] = set()
    for names, others in (
        (("budget_tokens", "keep_ratio"), ("budget_tokens", "keep_ratio")),
        (("leader", "layer_reuse"), ("leaders",)),
    ):
        if any(name in flags for name in names):
            replaced.update(others)
    if flags.get("budget_split", "classes") != "classes":
        replaced.update(_OF_CLASSES)
    return {**{name: value for name, value in recipe.items() if name not in replaced}, **flags}


def _range(setting: str) -> str:
    low, high = RANGES[setting]
    return f"{low} to {high}"


def add_chunkkv(parser: CommandParser) -> argparse._ArgumentGroup:
    """Declare ChunkKV's flags but for the budget's, and return their group."""
    group = parser.add_argument_group("ChunkKV (all but the first need --chunkkv)")
    group.add_argument(
        "--chunkkv",
        nargs="?",
        const="enable",
        default="disable",
        choices=("enable", "disable"),
        help="compress the KV cache of every prompt after prefill",
    )
    group.add_argument(
        "--chunkkv_recipe",
        type=path_text,
        metavar="FILE",
        help="settings that chunkkv calibrate wrote; flags given here win over it",
    )
    for name, text in (
        ("chunk_size", f"tokens of a chunk, {_range('chunk_size')}; {DELIMITER_CHUNK_SIZE} with boundaries delimiter"),
        ("window", f"last tokens of a prompt, which score the others and are always kept, {_range('window')}"),
        ("sinks", "first tokens of a prompt, which are always kept"),
        ("pooling", "neighbouring tokens that a score is averaged over, odd; 1 turns averaging off"),
    ):
        default = getattr(DEFAULTS, name)
        group.add_argument(f"--chunkkv_{name}", type=whole_number, metavar="N", help=f"{text}; default: {default}")
    for name, text in (
        (
            "boundaries",
            "where chunks end: after chunk_size tokens, or at punctuation and line ends; auto: delimiter if "
            "there is a tokenizer, else fixed",
        ),
        (
            "score",
            "what a token is scored by: attention weights, logits before the softmax, or scores from outside",
        ),
        ("window_reduce", "how the attention weights of the window's queries become one score of a head"),
        ("head_reduce", "how the scores of the query heads become one; a score that is not softmax has mean alone"),
        ("value_norm", "whether a score is multiplied by the length of the token's value vector"),
        ("heads", "whether the KV heads of a layer keep the same tokens, or each its own"),
        (
            "budget_split",
            "who keeps how many tokens: all heads the same, classes of heads as a recipe says, or every "
            "layer what its chunks win in one ranking over all layers (with heads each, every KV head)",
        ),
        ("local_policy", "what local heads keep: the best chunks, or the first and the last tokens"),
        ("leader", "layer of a group that chooses the tokens for all of its layers"),
    ):
        choices, default = CHOICES[name], getattr(DEFAULTS, name)
        if name == "boundaries":
            choices, default = (AUTO, *choices), AUTO
        group.add_argument(f"--chunkkv_{name}", choices=choices, help=f"{text}; default: {default}")
    group.add_argument(
        "--chunkkv_layer_reuse", metavar="N|LIST", help=f"layers that share one choice of tokens: {SYNTAX}; default: 1"
    )
    return group
