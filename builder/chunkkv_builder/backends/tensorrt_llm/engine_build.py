"""TensorRT-LLM engines with ChunkKV: one call per rank, then the side file that describes them all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import chunkkv
from chunkkv.engine.directory import CONFIG_FILE
from chunkkv.engine.json_files import read_object
from chunkkv.engine.layer_groups import layer_groups
from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, build_values, check
from chunkkv.engine.tensorrt_llm_side_file import SIDE_FILE, RankLayers, SideFile, engine_file
from chunkkv.errors import BuildError, ConfigError, EngineError
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import TOKENIZER_FILE, Tokenizer
from chunkkv_builder.backends.tensorrt_llm.library import Plugins, before_compiling, delimiter_words
from chunkkv_builder.backends.tensorrt_llm.model import LlmModel
from chunkkv_builder.backends.tensorrt_llm.preconditions import check_lengths, longest_prompt
from chunkkv_builder.backends.tensorrt_llm.rotary import stretched_table
from chunkkv_builder.backends.tensorrt_llm.wrapper import AttentionShape, RankBuild, injected
from chunkkv_builder.checkpoint.end_tokens import tokenizer_end_tokens


def build_chunkkv(
    model: Any,
    build_config: Any,
    settings: ChunkKVSettings,
    *,
    tokenizer_dir: str | Path | None = None,
    tp_agree: bool = False,
) -> Any:
    """Return the engine of one rank with ChunkKV inside, where tensorrt_llm.builder.build returns one without.

    Parameters
    ----------
    model : tensorrt_llm PretrainedModel
        The model of one rank.
    build_config : tensorrt_llm BuildConfig
        Limits and plugin settings of the engine.
    settings : ChunkKVSettings
        What is kept; the keep ratio or budget becomes part of the engine. Without layer groups each layer gets its own.
    tokenizer_dir : str or Path, optional
        Directory with tokenizer.json; needed for delimiter boundaries.
    tp_agree : bool, default False
        Tensor-parallel ranks add up their chunk scores and keep the same tokens; otherwise each chooses by its heads.

    Raises
    ------
    ConfigError
        For a model, limit or setting that is not supported.
    BackendUnavailableError
        Where the ChunkKV plugins are missing or of another version.
    BuildError
        For a network that is not what was expected.
    """
    from tensorrt_llm.builder import build

    return EngineBuild(settings, tokenizer_dir, tp_agree).engine(model, build_config, build)


class EngineBuild:
    """The engines of all ranks of one model with one choice of settings; the parameters are those of build_chunkkv."""

    def __init__(
        self, settings: ChunkKVSettings, tokenizer_dir: str | Path | None = None, tp_agree: bool = False
    ) -> None:
        # The share is part of the engine: no request can ask for another.
        self.settings = dataclasses.replace(settings, max_keep_per_10k=settings.keep_per_10k)
        self._tokenizer = None if tokenizer_dir is None else Tokenizer.from_dir(tokenizer_dir)
        if self._tokenizer is not None:
            self._tokenizer.check_chat_template()
        self._tp_agree = tp_agree
        self._ranks: dict[int, RankLayers] = {}
        self._shape: AttentionShape | None = None
        self._model: LlmModel | None = None
        self._max_seq_len = 0  # of the last engine; TensorRT-LLM decides where none was asked for
        self.plugins: Plugins | None = None

    def check_model(self, model: LlmModel) -> None:
        """Raise ConfigError where the settings do not fit the model; gives each layer a group where none are."""
        if not self.settings.layer_groups:
            self.settings = dataclasses.replace(self.settings, layer_groups=layer_groups(model.num_layers))
        if [layer for group in self.settings.layer_groups for layer in group] != list(range(model.num_layers)):
            raise ConfigError(
                f"layer_groups is {self.settings.layer_groups}; list the layers 0 to {model.num_layers - 1} in order"
            )
        self.settings.check_kernels()
        if self._tp_agree and model.tp_size == 1:
            raise ConfigError("tp_agree has no effect with one tensor-parallel rank: leave it out")
        if self._tp_agree and self.settings.head_reduce == "max":
            raise ConfigError(
                "head_reduce is 'max', and tp_agree adds up the scores of the ranks, which makes a mean: use "
                "head_reduce 'mean', or leave tp_agree out"
            )
        if self.settings.boundaries == "delimiter":
            if model.pp_size > 1:
                raise ConfigError(
                    "boundaries is 'delimiter', which needs the prompt's tokens on every pipeline stage; they are on "
                    f"the first of {model.pp_size}: give --chunkkv_boundaries fixed, or convert with --pp_size 1"
                )
            if self._tokenizer is None:
                raise ConfigError("boundaries is 'delimiter', which needs the tokenizer: give --tokenizer_dir")

    def engine(self, model: Any, build_config: Any, build: Callable[[Any, Any], Any]) -> Any:
        """Return the engine of one rank.

        Parameters
        ----------
        model : tensorrt_llm PretrainedModel
            The model of the rank.
        build_config : tensorrt_llm BuildConfig
            Limits and plugin settings of the engine.
        build : callable
            tensorrt_llm.builder.build, or what stands for it.
        """
        llm_model = LlmModel.from_values(model.config.to_dict(), "the model's configuration")
        self.check_model(llm_model)
        check(BUILD_PRECONDITIONS, build_values(build_config, build_config.plugin_config))
        check_lengths(llm_model, build_config)
        if self.plugins is None:
            self.plugins = Plugins()
        mapping = model.config.mapping
        stage = list(mapping.pp_layers(llm_model.num_layers))
        layers = rank_layers(self.settings, stage, mapping.rank, mapping.tp_rank, mapping.pp_rank)
        group = tuple(mapping.tp_group) if self._tp_agree else ()
        longest = longest_prompt(llm_model, build_config)
        words = self._delimiter_words(llm_model)
        table = stretched_table(model, build_config.max_seq_len or llm_model.default_max_seq_len)
        rank = RankBuild(self.settings, layers, self.plugins, llm_model.vocab_size, longest, words, group, table)
        with injected(rank) as wrapped, before_compiling(lambda: wrapped.check_complete(layers)):
            engine = build(model, build_config)
        shape = wrapped.check_complete(layers)  # a dry run compiles nothing
        if self._shape not in (None, shape):
            raise BuildError(f"rank {mapping.rank} has {shape}, other ranks {self._shape}: they must be alike")
        self._shape, self._model = shape, llm_model
        self._max_seq_len = engine.config.build_config.max_seq_len
        if shape.max_positions is not None and self._max_seq_len > shape.max_positions:
            raise ConfigError(
                f"max_seq_len is {self._max_seq_len}, beyond the {shape.max_positions} positions of the rotary table: "
                f"give --max_seq_len {shape.max_positions} or less"
            )
        self._ranks[mapping.rank] = layers
        return engine

    def check_all_built(self) -> None:
        """Raise BuildError unless every rank of the model was built with ChunkKV."""
        expected = self._model.tp_size * self._model.pp_size if self._model else 1
        if sorted(self._ranks) != list(range(expected)):
            raise BuildError(f"of {expected} ranks only {sorted(self._ranks)} were built with ChunkKV")

    def write(self, folder: Path) -> None:
        """Add the side file and the key `chunkkv` of config.json to an engine directory of TensorRT-LLM.

        Raises BuildError where a rank is missing.
        """
        self.check_all_built()
        for rank in self._ranks:
            if not (folder / engine_file(rank)).is_file():
                raise BuildError(f"trtllm-build wrote no {engine_file(rank)}")
        (folder / SIDE_FILE).write_text(self._side_file().to_json(), encoding="utf-8")
        config = read_object(folder / CONFIG_FILE, EngineError)
        config["chunkkv"] = self.settings.to_dict()
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")

    def _side_file(self) -> SideFile:
        model, shape, plugins = self._model, self._shape, self.plugins
        assert model is not None and shape is not None and plugins is not None
        words = self._delimiter_words(model)
        delimiters = None
        if words is not None:
            delimiters = {"source": TOKENIZER_FILE, "sha256": hashlib.sha256(words.tobytes()).hexdigest()}
        return SideFile(
            settings=self.settings,
            ranks=tuple(self._ranks[rank] for rank in sorted(self._ranks)),
            tokens_per_block=shape.tokens_per_block,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            kv_dtype=shape.kv_dtype,
            mapping_rank=shape.mapping_rank,
            max_positions=shape.max_positions or self._max_seq_len,
            tp_size=model.tp_size,
            pp_size=model.pp_size,
            tp_agree=self._tp_agree,
            eos_token_ids=tokenizer_end_tokens(self._tokenizer) if self._tokenizer else (),
            delimiters=delimiters,
            plugin_library=plugins.library,
            versions={"chunkkv": chunkkv.__version__, **plugins.versions},
        )

    def _delimiter_words(self, model: LlmModel) -> np.ndarray | None:
        if self.settings.boundaries != "delimiter":
            return None
        assert self._tokenizer is not None  # check_model saw to that
        return delimiter_words(self._tokenizer.delimiter_token_table(model.vocab_size))


def rank_layers(settings: ChunkKVSettings, stage: Sequence[int], rank: int, tp_rank: int, pp_rank: int) -> RankLayers:
    """Return the layer-reuse groups of a rank.

    Parameters
    ----------
    settings : ChunkKVSettings
        Settings, with the layer groups of the whole model.
    stage : sequence of int
        The layers of the rank's pipeline stage in the numbers of the whole model, consecutive.
    rank, tp_rank, pp_rank : int
        Number of the rank, and its place among tensor-parallel ranks and among pipeline stages.

    Raises
    ------
    ConfigError
        Where a group reaches over the end of the stage: a choice cannot be handed to another process.
    """
    first, last = stage[0], stage[-1]
    groups, leaders = [], []
    for group in settings.layer_groups:
        inside = [layer for layer in group if first <= layer <= last]
        if inside and len(inside) < len(group):
            raise ConfigError(
                f"layer_reuse has layers {group[0]} to {group[-1]} in one group, but pipeline stage {pp_rank} has the "
                f"layers {first} to {last}: give groups that end where a stage ends"
            )
        if inside:
            groups.append(tuple(layer - first for layer in group))
            leaders.append(settings.leader_of(group) - first)
    return RankLayers(rank, tp_rank, pp_rank, first, tuple(groups), tuple(leaders))


def even_stages(num_layers: int, pp_size: int) -> list[range] | None:
    """Return the layers of each pipeline stage where all are of one size; None where TensorRT-LLM decides."""
    size, rest = divmod(num_layers, pp_size)
    return None if rest else [range(stage * size, (stage + 1) * size) for stage in range(pp_size)]
