"""chunkkv_config.json: what ChunkKV adds to an engine directory of trtllm-build, beside TensorRT-LLM's config.json.

TensorRT-LLM ignores this file. An engine directory is refused where the key `chunkkv` of config.json says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from chunkkv.engine.fields import Fields
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
    """The layers of one rank of an engine.

    Parameters
    ----------
    rank : int
        Number of the rank among all.
    tp_rank, pp_rank : int
        Its place among the tensor-parallel ranks and among the pipeline stages.
    first_layer : int
        The layer of the model that is the rank's layer 0: local layer `i` is layer `first_layer + i`.
    groups : tuple of tuples of int
        The layer-reuse groups in local numbers; every layer of the rank once, in order.
    leaders : tuple of int
        The layer of each group, in local numbers, whose attention decides what the group keeps.
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

    @property
    def layers(self) -> range:
        """The local numbers of its layers."""
        return range(self.num_layers)

    @classmethod
    def from_fields(cls, fields: Fields) -> RankLayers:
        """Read an entry of `ranks`; raises the error of `fields` where groups and leaders do not fit together."""
        rank = cls(
            **{name: fields.integer(name, low=0) for name in ("rank", "tp_rank", "pp_rank", "first_layer")},
            groups=fields.integer_lists("groups"),
            leaders=fields.integers("leaders"),
        )
        if [layer for group in rank.groups for layer in group] != list(rank.layers):
            raise fields.error("groups", "list the rank's layers once, in order")
        pairs = zip(rank.leaders, rank.groups, strict=False)
        if len(rank.leaders) != len(rank.groups) or not all(leader in group for leader, group in pairs):
            raise fields.error("leaders", "give one layer of each group")
        return rank


@dataclass(frozen=True)
class SideFile:
    """The content of chunkkv_config.json.

    Parameters
    ----------
    settings : ChunkKVSettings
        ChunkKV's settings; layer groups in the numbers of the whole model.
    ranks : tuple of RankLayers
        The layers of each rank, in the order of the ranks.
    tokens_per_block : int
        Tokens in one block of the paged KV cache.
    num_heads, num_kv_heads, head_size : int
        Query heads, KV heads and size of a head of one tensor-parallel rank.
    kv_dtype : str
        Type of a cached number, a key of KV_ITEM_BYTES.
    mapping_rank : int
        Dimensions of the input host_kv_cache_pool_mapping: 1 or 2, which differs between versions of TensorRT-LLM.
    max_positions : int
        Rows of the rotary table, or max_seq_len where the model has no such table.
    tp_size, pp_size : int
        Number of tensor-parallel ranks, and of pipeline stages.
    tp_agree : bool
        Whether tensor-parallel ranks add up their chunk scores, so that all keep the same tokens.
    eos_token_ids : tuple of int
        Tokens that end an answer.
    delimiters : dict or None
        The tokenizer file (`source`) that delimiters come from and the `sha256` of their bitmap in the engine; None
        where chunks have fixed lengths.
    plugin_library : dict
        `name` and `sha256` of the plugin library that the engine was built with.
    versions : dict
        Versions of the packages that took part, by name.
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
        fields = Fields(read_object(path, EngineError), str(path), EngineError, "build the engine again")
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise EngineMismatchError(
                f"{path} has another schema_version than {SCHEMA_VERSION}: build the engine with this version of "
                "ChunkKV-TRT"
            )
        side = cls._parsed(fields)
        if [rank.rank for rank in side.ranks] != list(range(side.tp_size * side.pp_size)):
            raise fields.error("ranks", f"list each of the {side.tp_size * side.pp_size} ranks once, in order")
        layers = [rank.first_layer + layer for rank in side.ranks if rank.tp_rank == 0 for layer in rank.layers]
        if layers != [layer for group in side.settings.layer_groups for layer in group]:
            raise fields.error("ranks", "their layers must be those of settings.layer_groups")
        return side

    @classmethod
    def _parsed(cls, fields: Fields) -> SideFile:
        fields.allow(["schema_version", *(field.name for field in dataclasses.fields(cls))])
        settings = fields.section("settings")
        try:
            chunkkv_settings = ChunkKVSettings.from_dict(settings.values)
        except ConfigError as error:
            raise EngineError(f"{settings.source}: {error}: build the engine again") from None
        counts = {name: fields.integer(name) for name in _COUNTS}
        return cls(
            **counts,
            settings=chunkkv_settings,
            ranks=tuple(RankLayers.from_fields(entry) for entry in fields.sections("ranks")),
            kv_dtype=fields.text("kv_dtype", allowed=tuple(KV_ITEM_BYTES)),
            mapping_rank=fields.integer("mapping_rank", low=1, high=2),
            tp_agree=fields.flag("tp_agree"),
            eos_token_ids=fields.integers("eos_token_ids"),
            delimiters=None if fields.get("delimiters") is None else fields.text_section("delimiters"),
            plugin_library=fields.text_section("plugin_library"),
            versions=fields.text_section("versions"),
        )
