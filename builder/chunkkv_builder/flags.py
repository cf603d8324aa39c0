"""The command line's flags: trtllm-build's names and style, one line per error."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from chunkkv import __version__
from chunkkv.command_line import (
    LOG_LEVELS,
    CommandParser,
    UsageError,
    path_text,
    ratio,
    whole_number,
)
from chunkkv.engine.backends import BACKENDS, DEFAULT_BACKEND, DTYPES, TENSORRT, TENSORRT_LLM, TRAITS
from chunkkv.engine.tensorrt_build import FLAVOURS, FUNCTIONS, PLUGIN
from chunkkv_builder import config
from chunkkv_builder.chunkkv_flags import DEFAULTS, PREFIX, add_chunkkv
from chunkkv_builder.trtllm_flags import TENSORRT_LLM_INSTEAD, TRTLLM_FLAGS_WITHOUT_MEANING

PROGRAM = "chunkkv-build"
_TENSORRT_ONLY = ("timing_cache", "tensorrt", "compute_capability", "chunkkv_ops")
_TENSORRT_LLM_ONLY = ("tokenizer_dir", "chunkkv_tp_agree")


class BuildParser(CommandParser):
    """Adds what trtllm-build's users may expect: which of its flags have no meaning here, which need its backend."""

    def unknown(self, word: str) -> str:
        """Return what is wrong with a word that belongs to no flag."""
        name = word.partition("=")[0]
        setting = name[2:].replace("-", "_")
        if not name.startswith("-"):
            return f"{word!r} belongs to no flag; every value follows its flag, as in --max_seq_len 4096"
        if setting in _TENSORRT_LLM_ONLY:
            return f"{name} has no effect without --backend {TENSORRT_LLM}: add that or leave it away"
        if setting in TRTLLM_FLAGS_WITHOUT_MEANING:
            return f"{name} is a flag of trtllm-build that has no meaning for these engines: leave it out"
        return super().unknown(word)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of one build.

    Parameters
    ----------
    arguments : Sequence[str], optional
        The words of the command line; default: those of this process.

    Raises
    ------
    UsageError
        For unknown, invalid and contradictory flags.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if _backend(words) == TENSORRT_LLM:
        return _parse_tensorrt_llm(words)
    flags = _parser().parse_args(words)
    for name in ("weight_only_precision", "weight_only_activations"):
        if getattr(flags, name) and not flags.use_weight_only:
            raise UsageError(f"--{name} has no effect without --use_weight_only: add it")
    if flags.use_weight_only:
        flags.weight_only_precision = flags.weight_only_precision or config.DEFAULT_WEIGHT_ONLY_PRECISION
        flags.weight_only_activations = flags.weight_only_activations or config.DEFAULT_WEIGHT_ONLY_ACTIVATIONS
    flags.chunkkv = flags.chunkkv == "enable"
    settings = [name for name, value in vars(flags).items() if name.startswith(PREFIX) and value is not None]
    if settings and not flags.chunkkv:
        raise UsageError(f"--{settings[0]} has no effect without --chunkkv: add it")
    if flags.chunkkv_budget_tokens and flags.chunkkv_max_keep_ratio is not None:
        raise UsageError(
            "--chunkkv_max_keep_ratio bounds a share, --chunkkv_budget_tokens is a number of tokens: give one of them"
        )
    _check_budget(flags)
    for name in _TENSORRT_ONLY:
        if getattr(flags, name) and flags.backend != TENSORRT:
            raise UsageError(f"--{name} has no effect without --backend tensorrt: add that or leave it away")
    return flags


def _backend(words: Sequence[str]) -> str | None:
    """Return the backend, which decides about all other flags."""
    parser = CommandParser(add_help=False, passes_unknown_flags=True)
    parser.add_argument("--backend", nargs="?")
    backend: str | None = parser.parse_known_args(words)[0].backend
    return backend


def _parse_tensorrt_llm(words: Sequence[str]) -> argparse.Namespace:
    """Return our own flags; everything else is trtllm-build's, in `passed_on`."""
    parser = _tensorrt_llm_parser()
    flags, passed_on = parser.parse_known_args(words)
    for name in (word.partition("=")[0] for word in passed_on):
        if name.startswith("--") and (instead := TENSORRT_LLM_INSTEAD.get(name[2:])):
            raise UsageError(f"{name} has no effect with --backend {TENSORRT_LLM}: use {instead}")
        if name.startswith(f"--{PREFIX}"):
            raise UsageError(parser.unknown(name))
    if flags.chunkkv != "enable":
        raise UsageError(
            f"--backend {TENSORRT_LLM} puts ChunkKV into trtllm-build's engines: add --chunkkv, or call trtllm-build"
        )
    _check_budget(flags)
    flags.chunkkv, flags.passed_on = True, [*passed_on, "--log_level", flags.log_level]
    if flags.checkpoint_dir is not None:
        flags.passed_on += ["--checkpoint_dir", flags.checkpoint_dir]
    if flags.dry_run:
        flags.passed_on.append("--dry_run")
    return flags


def _check_budget(flags: argparse.Namespace) -> None:
    if flags.chunkkv_budget_tokens == 0:
        raise UsageError("--chunkkv_budget_tokens is 0; give at least 1, or --chunkkv_keep_ratio instead")


def _parser() -> BuildParser:
    parser = BuildParser(
        prog=PROGRAM,
        usage="chunkkv-build --checkpoint_dir DIR [--chunkkv] [flags]",
        description="Build an engine directory from a Hugging Face checkpoint or a GGUF file, with ChunkKV inside if "
        "asked for.",
        epilog="--backend tensorrt_llm takes every flag of trtllm-build instead; its --help shows what is different.",
        required={"checkpoint_dir": "the directory of a Hugging Face checkpoint, or a GGUF file"},
    )
    _add_paths(parser, "required: directory with config.json, *.safetensors and the tokenizer's files; or a GGUF file")
    sizes = parser.add_argument_group("sizes")
    for name, default, text in (
        ("max_batch_size", config.DEFAULT_MAX_BATCH_SIZE, "most prompts that the engine processes at once"),
        ("max_input_len", None, "longest prompt in tokens; default: max_seq_len"),
        ("max_seq_len", None, "longest prompt and answer together, in tokens; default: the model's longest context"),
        (
            "max_num_tokens",
            None,
            "tokens of one prefill block, at least the observation window: more takes more memory; default: "
            f"{config.CPU_MAX_NUM_TOKENS} for {DEFAULT_BACKEND}, else {config.DEFAULT_MAX_NUM_TOKENS}",
        ),
    ):
        shown = text if default is None else f"{text}; default: {default}"
        sizes.add_argument(f"--{name}", type=whole_number, default=default, metavar="N", help=shown)
    build = parser.add_argument_group("build")
    build.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help=f"inference engine to build for; default: auto = {DEFAULT_BACKEND}",
    )
    build.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"number type of weights and KV cache; default: auto = {_auto_dtypes()}",
    )
    _add_stored_types(build)
    _add_prefill_precision(build)
    _add_tensorrt(parser)
    _add_output(parser)
    add_chunkkv(parser)
    _add_budget(parser, max_keep_ratio=True)
    return parser


def _add_stored_types(build: argparse._ArgumentGroup) -> None:
    """Add the flags for cache and weights in fewer bits than the engine computes in."""
    build.add_argument(
        "--kv_cache_dtype",
        choices=config.KV_CACHE_DTYPES,
        help="number type of the KV cache alone, for backend onnxruntime: float16 takes half the memory, int8 a "
        "quarter, with scales that the build finds by running the model; default: that of --dtype",
    )
    build.add_argument("--use_weight_only", action="store_true", help="store the weight matrices in fewer bits")
    build.add_argument(
        "--weight_only_precision",
        choices=config.WEIGHT_ONLY_PRECISIONS,
        help="number type of those weights: int8 costs hardly any accuracy, int4 much unless a GGUF file has 4-bit "
        "blocks already; w8a8 has 8 bits with a scale for each output instead of each 32 values, for long "
        "prompts; embedding table and head have 8 bits with each; "
        f"default: {config.DEFAULT_WEIGHT_ONLY_PRECISION}",
    )
    build.add_argument(
        "--weight_only_activations",
        choices=config.WEIGHT_ONLY_ACTIVATIONS,
        help="number type of what those weights are multiplied with: int8 rounds it, float32 does not and is slower, "
        f"much slower for int8 weights; default: {config.DEFAULT_WEIGHT_ONLY_ACTIVATIONS}",
    )


def _add_prefill_precision(build: argparse._ArgumentGroup) -> None:
    """Add the flag for weights that only the blocks of a prompt are multiplied with."""
    build.add_argument(
        "--prefill_precision",
        choices=config.PREFILL_PRECISIONS,
        help="number type in which all blocks of a prompt but the last are multiplied, for backend onnxruntime: w8a8 "
        "stores the projections a second time, in 8 bits with a scale for each output, which takes memory and reads "
        "long prompts faster; answers keep the weights of the other flags; default: prompts, too",
    )


def _auto_dtypes() -> str:
    """Return what --dtype auto means, for --help; --backend tensorrt_llm has no --dtype."""
    return ", ".join(f"{TRAITS[name].default_dtype} for {name}" for name in BACKENDS if name != TENSORRT_LLM)


def _tensorrt_llm_parser() -> BuildParser:
    parser = BuildParser(
        prog=PROGRAM,
        usage="chunkkv-build --backend tensorrt_llm --checkpoint_dir DIR --chunkkv …",
        description="Build engines with trtllm-build, ChunkKV inside. Every flag that is not listed here goes to "
        "trtllm-build as it is: see trtllm-build --help.",
        passes_unknown_flags=True,
    )
    _add_paths(parser, "required: directory of a TensorRT-LLM checkpoint, as convert_checkpoint.py writes it")
    build = parser.add_argument_group("build")
    build.add_argument("--backend", choices=(TENSORRT_LLM,), help="the inference engine to build for")
    build.add_argument(
        "--tokenizer_dir",
        type=path_text,
        metavar="DIR",
        help="directory whose tokenizer files go into the engine; --chunkkv_boundaries delimiter needs them",
    )
    _add_output(parser)
    add_chunkkv(parser).add_argument(
        "--chunkkv_tp_agree",
        action="store_true",
        help="tensor-parallel ranks add up their scores and keep the same tokens; default: each rank by its own heads",
    )
    _add_budget(parser)
    return parser


def _add_tensorrt(parser: BuildParser) -> None:
    group = parser.add_argument_group(f"TensorRT (needs --backend {TENSORRT})")
    group.add_argument(
        "--tensorrt",
        choices=("auto", *FLAVOURS),
        help="TensorRT to build with: standard needs a GPU, rtx (TensorRT for RTX) needs none; default: auto = "
        "standard where the package tensorrt is installed, else rtx",
    )
    group.add_argument(
        "--compute_capability",
        type=_compute_capability,
        action="append",
        default=[],
        metavar="N.N",
        help="kind of GPU that TensorRT for RTX builds for, as in 8.9; may be given several times; default: none, "
        "portable engines",
    )
    group.add_argument(
        "--chunkkv_ops",
        choices=("auto", PLUGIN, FUNCTIONS),
        help="what ChunkKV is in the engines: plugin = our kernels, functions = operators of TensorRT's own; "
        "default: auto = plugin where their library is found and has a kernel for the model, else functions",
    )
    group.add_argument(
        "--timing_cache",
        type=path_text,
        metavar="FILE",
        help="kernel timings of the standard TensorRT, read if the file exists and written after the build; "
        "default: none",
    )


def _add_paths(parser: BuildParser, checkpoint: str) -> None:
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version")
    paths = parser.add_argument_group("paths")
    paths.add_argument("--checkpoint_dir", type=path_text, metavar="DIR", help=checkpoint)
    paths.add_argument(
        "--output_dir",
        default="engine_outputs",
        metavar="DIR",
        help="engine directory to write; default: engine_outputs",
    )
    paths.add_argument(
        "--overwrite", action="store_true", help="replace the engine in output_dir once the new one is complete"
    )


def _add_output(parser: BuildParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--dry_run", action="store_true", help="check everything and print the plan, but build nothing")
    output.add_argument(
        "--log_level",
        choices=LOG_LEVELS,
        default="info",
        help="least important messages that are shown; errors have a traceback at verbose and debug; default: info",
    )


def _add_budget(parser: BuildParser, max_keep_ratio: bool = False) -> None:
    group = parser.add_argument_group("budget (needs --chunkkv)")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--chunkkv_keep_ratio",
        type=ratio,
        metavar="R",
        help=f"share of a prompt's tokens that is kept, in (0, 1]; default: {DEFAULTS.keep_ratio}",
    )
    budget.add_argument(
        "--chunkkv_budget_tokens", type=whole_number, metavar="N", help="number of tokens kept, instead of a share"
    )
    if max_keep_ratio:
        group.add_argument(
            "--chunkkv_max_keep_ratio",
            type=ratio,
            metavar="R",
            help="largest share that a request may ask for, in (0, 1]; default: 1.0",
        )
    least = "window + sinks + chunk_size"
    group.add_argument(
        "--chunkkv_min_tokens",
        type=whole_number,
        metavar="N",
        help=f"prompts up to this many tokens are kept whole; default: {DEFAULTS.min_tokens}, or {least} if more",
    )


def _compute_capability(text: str) -> str:
    """Return a compute capability as it is written, "8.9"; raises ArgumentTypeError for anything else."""
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability; give one such as 8.9")
    return text
