"""A recipe: ChunkKV settings that were found by measuring, in a JSON file that chunkkv-build reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_object
from chunkkv.errors import ConfigError
from chunkkv.files import write_whole

FORMAT, FORMAT_VERSION = "chunkkv-recipe", 1
NUMBERS = ("budget_tokens", "chunk_size", "window", "sinks", "pooling", "min_tokens")
RATIOS = ("keep_ratio", "max_keep_ratio")
WORDS = ("boundaries", "score", "gate", "leader", "layer_reuse")
_LARGEST_BYTES = 1 << 24


def write_recipe(path: Path, settings: Mapping[str, Any], num_layers: int, measured: Mapping[str, Any]) -> None:
    """Write `settings`, under the names of chunkkv-build's flags, for a model of `num_layers` layers.

    `measured` says what the settings were found by; a build does not read it.
    """
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_hidden_layers": num_layers}
    text = json.dumps({**values, "settings": dict(settings), "measured": measured}, indent=1) + "\n"
    write_whole(path, text)


def read_recipe(path: Path, num_layers: int) -> dict[str, Any]:
    """Return the settings of a recipe, each of the right type; their ranges are checked where they are used.

    Raises ConfigError for a file that is no recipe, for unknown settings, and for another number of layers.
    """
    if path.is_file() and path.stat().st_size > _LARGEST_BYTES:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes, too many for a recipe; give one of chunkkv calibrate"
        )
    values = read_object(path, ConfigError)
    if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format is {values.get('format')!r} version {values.get('format_version')!r}; this program reads "
            f"{FORMAT!r} version {FORMAT_VERSION}, which chunkkv calibrate writes"
        )
    if values.get("num_hidden_layers") != num_layers:
        raise ConfigError(
            f"{path} was made for a model of {values.get('num_hidden_layers')!r} layers, this one has {num_layers}: "
            "calibrate on an engine of this model"
        )
    settings = values.get("settings")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: settings is {settings!r}; it must be an object")
    for name, value in settings.items():
        _check(path, name, value)
    return settings


def _check(path: Path, name: str, value: Any) -> None:
    kinds = {**dict.fromkeys(NUMBERS, int), **dict.fromkeys(RATIOS, (int, float)), **dict.fromkeys(WORDS, str)}
    if name not in kinds:
        raise ConfigError(f"{path}: settings has {name!r}; known are {', '.join(kinds)}")
    if isinstance(value, bool) or not isinstance(value, kinds[name]):
        kind = "text" if name in WORDS else "a whole number" if name in NUMBERS else "a number"
        raise ConfigError(f"{path}: {name} is {value!r}; it must be {kind}")
