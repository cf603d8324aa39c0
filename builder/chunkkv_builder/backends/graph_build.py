"""Reads and plans a build whose engine is made of our own ONNX graphs, and writes its config.json."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import chunkkv
from chunkkv.command_line import errors_name_flags
from chunkkv.engine.backends import TRAITS
from chunkkv.engine.directory import CONFIG_FILE
from chunkkv.text.tokenizer import TOKENIZER_FILE, Tokenizer
from chunkkv_builder.checkpoint.end_tokens import united_end_tokens
from chunkkv_builder.checkpoint.families import FAMILY_OF
from chunkkv_builder.checkpoint.formats import open_checkpoint
from chunkkv_builder.checkpoint.interface import Checkpoint
from chunkkv_builder.chunkkv_flags import chunkkv_settings
from chunkkv_builder.config import BuildConfig, limit_reason
from chunkkv_builder.dry_run import print_plan
from chunkkv_builder.plan import GraphPlan, make_plan
from chunkkv_builder.progress import Progress

_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "spiece.model")  # files that only transformers can convert
_LIMITS = (
    *("max_input_len", "max_seq_len", "max_batch_size", "max_num_tokens"),
    *("kv_cache_dtype", "weight_only_precision", "weight_only_activations", "prefill_precision"),
)


@dataclass(frozen=True)
class GraphBuild:
    """A planned build of an engine made of ONNX graphs.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model's weights and tokenizer.
    limits : BuildConfig
        What the engine is built for.
    plan : GraphPlan
        Model, settings and which layer decides for which.
    """

    checkpoint: Checkpoint
    limits: BuildConfig
    plan: GraphPlan

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory of the checkpoint's tokenizer, if it has one."""
        return self.checkpoint.tokenizer_dir

    def show(self) -> None:
        """Print the plan to standard output."""
        print_plan(self.plan, self.limits)

    def write_config(self, folder: Path) -> None:
        """Write config.json in TensorRT-LLM's shape, with a section `chunkkv` where the engine has ChunkKV."""
        values = {
            "version": chunkkv.__version__,
            "pretrained_config": self.plan.model.to_dict(),
            "build_config": self.limits.to_dict(),
        }
        if self.plan.settings is not None:
            values["chunkkv"] = self.plan.settings.to_dict()
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def plan_graphs(flags: Namespace, backend: str, progress: Progress) -> GraphBuild:
    """Open the checkpoint and plan its graphs.

    Parameters
    ----------
    flags : Namespace
        Of chunkkv_builder.flags.parse.
    backend : str
        Name of the backend; its traits decide about the types and settings that are allowed.
    progress : Progress
        Shows the stage "checkpoint".

    Raises
    ------
    UsageError
        For a flag's value that the backend or this model does not allow.
    CheckpointError
        For a checkpoint or tokenizer that is missing, damaged or misshaped.
    ConfigError
        For a model that is not supported.
    """
    progress.stage("checkpoint", 1)
    checkpoint = open_checkpoint(flags.checkpoint_dir)
    progress.advance()
    for note in checkpoint.notes:
        progress.warning(note)
    tokenizer = _tokenizer(checkpoint, progress)
    place = checkpoint.tokenizer_dir or checkpoint.path
    ends, difference = united_end_tokens(checkpoint.config, tokenizer, place)
    if difference is not None:
        progress.warning(difference)
    model = dataclasses.replace(checkpoint.config, eos_token_ids=ends)
    settings = chunkkv_settings(flags, model.num_layers, model.num_kv_heads, tokenizer is not None)
    traits = TRAITS[backend]
    dtype = traits.default_dtype if flags.dtype == "auto" else flags.dtype
    with errors_name_flags():
        values = {name: getattr(flags, name) for name in _LIMITS}
        if values["max_num_tokens"] is None:
            values["max_num_tokens"] = BuildConfig.default_max_num_tokens(backend)
        limits = BuildConfig.for_model(model, **values, backend=backend, dtype=dtype)
        limits.check_window(settings)
    if flags.max_seq_len is None and (reason := limit_reason(model)) is not None:
        progress.warning(f"{reason}: the engine takes {limits.max_seq_len} tokens at most")
    if dtype == "float16" and FAMILY_OF[model.architecture].overflows_float16:
        progress.warning(f"activations of {model.architecture} leave the range of float16: give --dtype bfloat16")
    has_table = tokenizer is not None and settings is not None and settings.boundaries == "delimiter"
    delimiters = tokenizer.delimiter_token_table(vocab_size=model.vocab_size) if tokenizer and has_table else None
    with errors_name_flags("chunkkv_"):
        if settings is not None:
            traits.check_settings(settings)
        plan = make_plan(model, settings, delimiters)
    return GraphBuild(checkpoint, limits, plan)


def _tokenizer(checkpoint: Checkpoint, progress: Progress) -> Tokenizer | None:
    """Load and check the tokenizer before the long work; warns of what a user should know of it."""
    if checkpoint.tokenizer_dir is None:
        other = next((name for name in _OTHER_TOKENIZERS if (checkpoint.path / name).is_file()), None)
        way = f", only {other}: load it in transformers and save_pretrained() it there, or" if other else ":"
        progress.warning(f"{checkpoint.path} has no {TOKENIZER_FILE}{way} the engine will take and give token ids only")
        return None
    tokenizer = Tokenizer.from_dir(checkpoint.tokenizer_dir)
    vocab_size = checkpoint.config.vocab_size
    if tokenizer.size > vocab_size:
        progress.warning(
            f"the tokenizer has {tokenizer.size} tokens, the model {vocab_size}: prompts that hold one of the others "
            "are refused"
        )
    return tokenizer
