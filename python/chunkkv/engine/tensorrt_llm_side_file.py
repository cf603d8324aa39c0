"""chunkkv_config.json: what an engine directory of trtllm-build holds beside TensorRT-LLM's own config.json.

It is authoritative: `settings`, with global layer numbers; per rank the reuse groups and their leaders in local layer
numbers; the cache's shape per tensor-parallel rank; what end an answer; what the engine was built with. TensorRT-LLM
ignores it. Where the key `chunkkv` of config.json says otherwise the directory is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_object
from chunkkv.errors import ConfigError, EngineError, EngineMismatchError
from chunkkv.settings import ChunkKVSettings

SIDE_FILE = "chunkkv_config.json"
SCHEMA_VERSION = 1
KV_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "fp8": 1}
_COUNTS = ("tokens_per_block", "num_heads", "num_kv_heads", "head_size", "tp_size", "pp_size", "max_positions")


def engine_file(rank: int) -> str:
    """Return the name that TensorRT-LLM gives the engine of a rank."""
    return f"rank{rank}.engine"


@dataclass(frozen=True)
class RankLayers:
    """The layers of one rank: local layer `i` is layer `first_layer + i` of the model.

    `groups` has every local layer once, in order; `leaders` one layer of each group.
    """

    rank: int
    tp_rank: int
    pp_rank: int
    first_layer: int
    groups: tuple[tuple[int, ...], ...]
    leaders: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """How many layers this rank has."""
        return sum(map(len, self.groups))


@dataclass(frozen=True)
class SideFile:
    """The content of chunkkv_config.json.

    `num_heads`, `num_kv_heads`, `head_size` are those of one tensor-parallel rank; `kv_dtype` is a key of
    KV_ITEM_BYTES; `mapping_rank` is the number of dimensions of host_kv_cache_pool_mapping; `max_positions` the rows of
    the rotary table, or max_seq_len where the model has none; `tp_agree` whether ranks add up their chunk scores.
    `delimiters` is None, or the tokenizer file they come from and the sha256 of the bitmap in the engine;
    `plugin_library` name and sha256 of the library the engine was built with; `versions` the packages'.
    """

    settings: ChunkKVSettings
    ranks: tuple[RankLayers, ...]
    tokens_per_block: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_dtype: str
    mapping_rank: int
    max_positions: int
    tp_size: int
    pp_size: int
    tp_agree: bool
    eos_token_ids: tuple[int, ...]
    delimiters: dict[str, str] | None
    plugin_library: dict[str, str]
    versions: dict[str, str]

    @property
    def kv_bytes(self) -> int:
        """Bytes of one cached number."""
        return KV_ITEM_BYTES[self.kv_dtype]

    def to_json(self) -> str:
        """Return the file's text."""
        values = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self), "settings": self.settings.to_dict()}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def read(cls, engine_dir: Path) -> SideFile:
        """Read the file; raises EngineError where it is missing or damaged, EngineMismatchError for another schema."""
        path = engine_dir / SIDE_FILE
        values = read_object(path, EngineError)
        if values.pop("schema_version", None) != SCHEMA_VERSION:
            raise EngineMismatchError(
                f"{path} has another schema_version than {SCHEMA_VERSION}: build the engine with this version of "
                "ChunkKV-TRT"
            )
        try:
            return _checked(values)
        except (ConfigError, KeyError, TypeError) as error:
            raise EngineError(f"{path} is damaged ({error}): build the engine again") from None


def _checked(values: dict[str, Any]) -> SideFile:
    names = {field.name for field in dataclasses.fields(SideFile)}
    if wrong := sorted(names.symmetric_difference(values)):
        raise ConfigError(f"{wrong[0]!r} is missing or unknown")
    for name in _COUNTS:
        if not _is_count(values[name], low=1):
            raise ConfigError(f"{name} is {values[name]!r}, no whole number of at least 1")
    settings = ChunkKVSettings.from_dict(_mapping(values["settings"], "settings"))
    if values["kv_dtype"] not in KV_ITEM_BYTES:
        raise ConfigError(f"kv_dtype is {values['kv_dtype']!r}, none of {', '.join(KV_ITEM_BYTES)}")
    if values["mapping_rank"] not in (1, 2) or not isinstance(values["tp_agree"], bool):
        raise ConfigError("mapping_rank must be 1 or 2 and tp_agree true or false")
    if not isinstance(values["eos_token_ids"], list) or not all(map(_is_count, values["eos_token_ids"])):
        raise ConfigError("eos_token_ids must be a list of token ids")
    texts = ["plugin_library", "versions", *(["delimiters"] if values["delimiters"] is not None else [])]
    for name in texts:
        if not all(isinstance(text, str) for text in _mapping(values[name], name).values()):
            raise ConfigError(f"{name} must be an object of texts")
    ranks = tuple(_rank(entry) for entry in values["ranks"])
    if [rank.rank for rank in ranks] != list(range(values["tp_size"] * values["pp_size"])):
        raise ConfigError("ranks does not list every rank once, in order")
    layers = [rank.first_layer + layer for rank in ranks if rank.tp_rank == 0 for layer in range(rank.num_layers)]
    if layers != [layer for group in settings.layer_groups for layer in group]:
        raise ConfigError("the layers of the ranks are not those of settings.layer_groups")
    ends = tuple(values["eos_token_ids"])
    return SideFile(**{**values, "settings": settings, "ranks": ranks, "eos_token_ids": ends})


def _rank(entry: Any) -> RankLayers:
    fields = _mapping(entry, "an entry of ranks")
    for name in ("rank", "tp_rank", "pp_rank", "first_layer"):
        if not _is_count(fields.get(name)):
            raise ConfigError(f"{name} of a rank is {fields.get(name)!r}")
    groups = tuple(tuple(group) for group in fields["groups"])
    leaders = tuple(fields["leaders"])
    rank = RankLayers(**{**fields, "groups": groups, "leaders": leaders})
    if [layer for group in groups for layer in group] != list(range(rank.num_layers)):
        raise ConfigError(f"groups of rank {rank.rank} do not list its layers once, in order")
    if len(leaders) != len(groups) or not all(leader in group for leader, group in zip(leaders, groups, strict=True)):
        raise ConfigError(f"leaders of rank {rank.rank} are not one of each group")
    return rank


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object")
    return value


def _is_count(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
