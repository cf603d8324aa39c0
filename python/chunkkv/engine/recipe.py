"""Recipes: ChunkKV settings that chunkkv calibrate measured, in a JSON file that chunkkv-build reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkkv.engine.fields import Fields
from chunkkv.engine.json_files import read_object
from chunkkv.errors import ConfigError
from chunkkv.files import write_whole

FORMAT, FORMAT_VERSION = "chunkkv-recipe", 2
NUMBERS = (
    *("budget_tokens", "chunk_size", "window", "sinks", "pooling", "min_tokens"),
    *("reading_share_per_10k", "local_share_per_10k"),
)
RATIOS = ("keep_ratio", "max_keep_ratio")
WORDS = (
    *("boundaries", "score", "leader", "layer_reuse", "window_reduce", "head_reduce", "value_norm", "heads"),
    *("budget_split", "local_policy"),
)
LISTS = ("leaders", "reading_heads")  # of layers, and per layer of KV heads
_LARGEST_BYTES = 1 << 24


def write_recipe(path: Path, settings: Mapping[str, Any], num_layers: int, measured: Mapping[str, Any]) -> None:
    """Write a recipe to `path`.

    Parameters
    ----------
    path : Path
        The JSON file; its folder must exist.
    settings : mapping
        Values under the names of chunkkv-build's flags without `chunkkv_`: those of NUMBERS, RATIOS, WORDS
        and LISTS.
    num_layers : int
        Layers of the model that the settings were measured on; a model with another number refuses the recipe.
    measured : mapping
        JSON values that say how the settings were found. A build does not read them.
    """
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_hidden_layers": num_layers}
    text = json.dumps({**values, "settings": dict(settings), "measured": measured}, indent=1) + "\n"
    write_whole(path, text)


def read_recipe(path: Path, num_layers: int) -> dict[str, Any]:
    """Return the settings of a recipe, each of the right type; their ranges are checked where they are used.

    Parameters
    ----------
    path : Path
        A file of write_recipe.
    num_layers : int
        Layers of the model that is to be built.

    Raises
    ------
    ConfigError
        For a file that is no recipe, for unknown settings, and for another number of layers.
    """
    if path.is_file() and path.stat().st_size > _LARGEST_BYTES:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes, too many for a recipe; give one of chunkkv calibrate"
        )
    recipe = Fields(read_object(path, ConfigError), str(path))
    if recipe.get("format") != FORMAT or recipe.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format is {recipe.get('format')!r} version {recipe.get('format_version')!r}; this program reads "
            f"{FORMAT!r} version {FORMAT_VERSION}, which chunkkv calibrate writes"
        )
    if recipe.get("num_hidden_layers") != num_layers:
        raise ConfigError(
            f"{path} was made for a model of {recipe.get('num_hidden_layers')!r} layers, this one has {num_layers}: "
            "calibrate on an engine of this model"
        )
    settings = recipe.section("settings")
    settings.allow((*NUMBERS, *RATIOS, *WORDS, *LISTS))
    values: dict[str, Any] = {}
    for name in settings.values:
        if name in NUMBERS:
            values[name] = settings.integer(name, low=0)
        elif name in RATIOS:
            values[name] = settings.number(name)
        elif name == "leaders":
            values[name] = _numbers(settings, name, settings.values[name])
        elif name == "reading_heads":
            listed = settings.values[name]
            if not isinstance(listed, list):
                raise settings.error(name, "a list of lists of KV heads, one per layer, is needed")
            values[name] = tuple(_numbers(settings, name, heads) for heads in listed)
        else:
            values[name] = settings.text(name)
    return values


def _numbers(settings: Fields, name: str, values: object) -> tuple[int, ...]:
    """Return a list of whole numbers as a tuple; raises ConfigError for anything else."""
    if not isinstance(values, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
        raise settings.error(name, f"{values!r} is no list of whole numbers")
    return tuple(values)
