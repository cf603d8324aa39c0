"""The command line's flags: trtllm-build's names and style, one line per error."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from chunkkv.engine.layer_groups import SYNTAX, layer_groups
from chunkkv.engine.recipe import read_recipe
from chunkkv.errors import ConfigError
from chunkkv.limits import CHOICES, RANGES
from chunkkv.settings import DELIMITER_CHUNK_SIZE, ChunkKVSettings
from chunkkv.settings import keep_ratio_to_per_10k as to_per_10k
from chunkkv_builder import config
from chunkkv_builder.progress import LOG_LEVELS

PROGRAM = "chunkkv-build"
_PREFIX = "chunkkv_"
_DEFAULTS = ChunkKVSettings()
_TENSORRT_LLM = "tensorrt_llm"
_TENSORRT_LLM_ONLY = ("tokenizer_dir", "chunkkv_tp_agree")
# Flags that TensorRT-LLM has at another place, and that place.
_TENSORRT_LLM_INSTEAD = {
    "dtype": "convert_checkpoint.py --dtype",
    "use_weight_only": "convert_checkpoint.py --use_weight_only",
    "weight_only_precision": "convert_checkpoint.py --weight_only_precision",
    "timing_cache": "--input_timing_cache and --output_timing_cache",
    "chunkkv_max_keep_ratio": "--chunkkv_keep_ratio: the share is part of the engine, no request can ask for more",
}
# Flags of trtllm-build that say what has only one answer here, or nothing.
_ELSEWHERE = {
    *("model_config", "build_config", "model_cls_file", "model_cls_name", "max_beam_width", "opt_num_tokens"),
    *("max_encoder_input_len", "max_prompt_embedding_table_size", "max_multimodal_len", "kv_cache_type"),
    *("paged_kv_cache", "input_timing_cache", "output_timing_cache", "profiling_verbosity", "strip_plan"),
    *("weight_sparsity", "weight_streaming", "fast_build", "workers", "enable_debug_output", "visualize_network"),
    *("monitor_memory", "logits_dtype", "gather_context_logits", "gather_generation_logits"),
    *("gather_all_token_logits", "lora_dir", "lora_ckpt_source", "lora_target_modules", "max_lora_rank"),
    *("speculative_decoding_mode", "max_draft_len", "gpt_attention_plugin", "gemm_plugin", "nccl_plugin"),
    *("lora_plugin", "moe_plugin", "context_fmha", "remove_input_padding", "tokens_per_block"),
    *("use_paged_context_fmha", "use_fp8_context_fmha", "multiple_profiles", "reduce_fusion", "user_buffer"),
}


class UsageError(ConfigError):
    """The command line asks for something that is not offered."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.replace("not allowed with argument", "give either this or")
        raise UsageError(re.sub(r"^argument ([-\w/]+): ", r"\1: ", message))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of one build; raises UsageError for unknown, invalid and contradictory ones."""
    parser = _parser()
    known = {name for action in parser._actions for name in action.option_strings}
    given = [_underscored(text, known) for text in (sys.argv[1:] if arguments is None else arguments)]
    if _backend(given) == _TENSORRT_LLM:
        return _parse_tensorrt_llm(given)
    flags, rest = parser.parse_known_args(given)
    if rest:
        raise UsageError(_unknown(rest[0], known))
    if flags.checkpoint_dir is None:
        raise UsageError("--checkpoint_dir is missing; give the directory of a Hugging Face checkpoint")
    if flags.weight_only_precision and not flags.use_weight_only:
        raise UsageError("--weight_only_precision has no effect without --use_weight_only: add it")
    if flags.use_weight_only and not flags.weight_only_precision:
        flags.weight_only_precision = "int8"
    flags.chunkkv = flags.chunkkv == "enable"
    chosen = [name for name, value in vars(flags).items() if name.startswith(_PREFIX) and value is not None]
    if chosen and not flags.chunkkv:
        raise UsageError(f"--{chosen[0]} has no effect without --chunkkv: add it")
    if flags.chunkkv_budget_tokens and flags.chunkkv_max_keep_ratio is not None:
        raise UsageError(
            "--chunkkv_max_keep_ratio bounds a share, --chunkkv_budget_tokens is a number of tokens: give one of them"
        )
    _check_budget(flags)
    if flags.timing_cache and flags.backend != "tensorrt":
        raise UsageError("--timing_cache has no effect without --backend tensorrt: add that or leave it away")
    return flags


def _backend(given: Sequence[str]) -> str | None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backend", nargs="?")
    return parser.parse_known_args(list(given))[0].backend


def _parse_tensorrt_llm(given: Sequence[str]) -> argparse.Namespace:
    """Return our own flags; everything else is trtllm-build's, in `passed_on`."""
    parser = _tensorrt_llm_parser()
    known = {name for action in parser._actions for name in action.option_strings}
    flags, passed_on = parser.parse_known_args([_underscored(text, known) for text in given])
    for name in (text.partition("=")[0] for text in passed_on):
        if name.startswith("--") and (instead := _TENSORRT_LLM_INSTEAD.get(name[2:])):
            raise UsageError(f"{name} has no effect with --backend {_TENSORRT_LLM}: use {instead}")
        if name.startswith(f"--{_PREFIX}"):
            raise UsageError(_unknown(name, known))
    if flags.chunkkv != "enable":
        raise UsageError(
            f"--backend {_TENSORRT_LLM} puts ChunkKV into trtllm-build's engines: add --chunkkv, or call trtllm-build"
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


def chunkkv_settings(flags: argparse.Namespace, num_layers: int) -> ChunkKVSettings | None:
    """Return the ChunkKV settings the flags ask for, None without --chunkkv; raises UsageError."""
    if not flags.chunkkv:
        return None
    given = {name.removeprefix(_PREFIX): value for name, value in vars(flags).items() if name.startswith(_PREFIX)}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    values.pop("tp_agree", None)  # says how ranks of an engine work together, not what is kept
    try:
        if (recipe := values.pop("recipe", None)) is not None:
            values = _over_recipe(values, read_recipe(Path(recipe), num_layers))
        reuse = values.pop("layer_reuse", "1")
        for name in ("keep", "max_keep"):
            if (ratio := values.pop(f"{name}_ratio", None)) is not None:
                values[f"{name}_per_10k"] = to_per_10k(ratio, f"{name}_ratio")
        if "max_keep_per_10k" in values and "keep_per_10k" not in values:
            values["keep_per_10k"] = min(_DEFAULTS.keep_per_10k, values["max_keep_per_10k"])
        if values.get("boundaries") == "delimiter":
            values.setdefault("chunk_size", DELIMITER_CHUNK_SIZE)
        least = sum(values.get(name, getattr(_DEFAULTS, name)) for name in ("window", "sinks", "chunk_size"))
        values.setdefault("min_tokens", max(_DEFAULTS.min_tokens, least))
        return ChunkKVSettings(**values, layer_groups=layer_groups(num_layers, reuse))
    except ConfigError as error:
        raise UsageError(with_flag_name(str(error), _PREFIX)) from None


def _over_recipe(given: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings with those given as flags in their place; a share and a number exclude each other."""
    rest = dict(recipe)
    if "budget_tokens" in given or "keep_ratio" in given:
        rest = {name: value for name, value in rest.items() if name not in ("budget_tokens", "keep_ratio")}
    return {**rest, **given}


def with_flag_name(message: str, prefix: str = "") -> str:
    """Return an error that begins with the name of a setting as one that begins with the flag."""
    return f"--{prefix}{message}" if re.match(r"[a-z_0-9]+ ", message) else message


def _underscored(text: str, known: set[str]) -> str:
    """Return --max-seq-len=9 as --max_seq_len=9; what is no flag stays as it is."""
    name, equals, value = text.partition("=")
    underscored = "--" + name[2:].replace("-", "_")
    return underscored + equals + value if name.startswith("--") and underscored in known else text


def _unknown(text: str, known: set[str]) -> str:
    name = text.partition("=")[0]
    if not name.startswith("-"):
        return f"{text!r} belongs to no flag; every value follows its flag, as in --max_seq_len 4096"
    if name[2:].replace("-", "_") in _TENSORRT_LLM_ONLY:
        return f"{name} has no effect without --backend {_TENSORRT_LLM}: add that or leave it away"
    if name[2:].replace("-", "_") in _ELSEWHERE:
        return f"{name} is a flag of trtllm-build that has no meaning for these engines: leave it out"
    names = [flag.replace("-", "_") for flag in known if flag.startswith("--")]
    close = difflib.get_close_matches(name.replace("-", "_"), names, 1, 0.5)
    hint = f"did you mean --{close[0][2:]}?" if close else "see --help for those there are"
    return f"unknown flag {name}; {hint}"


def _whole(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one such as 4096")
    return int(text)


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one in (0, 1] such as 0.2") from None


def _choice(allowed: Sequence[str]) -> dict[str, Any]:
    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not offered; allowed is {' or '.join(allowed)}")
        return text

    return {"type": check, "metavar": "{" + ",".join(allowed) + "}"}


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Build an engine directory from a Hugging Face checkpoint, with ChunkKV inside if asked for.",
        epilog="--backend tensorrt_llm takes every flag of trtllm-build instead; its --help shows what is different.",
    )
    _add_paths(parser, "required: config.json, *.safetensors and tokenizer files")
    add = parser.add_argument_group("sizes").add_argument
    batch, block = config.DEFAULT_MAX_BATCH_SIZE, config.DEFAULT_MAX_NUM_TOKENS
    add("--max_batch_size", type=_whole, default=batch, metavar="N", help=f"prompts at once; default: {batch}")
    add("--max_input_len", type=_whole, metavar="N", help="longest prompt in tokens; default: max_seq_len")
    add("--max_seq_len", type=_whole, metavar="N", help="prompt and answer; default: the model's longest context")
    add(
        "--max_num_tokens",
        type=_whole,
        default=block,
        metavar="N",
        help=f"tokens of a prefill block, at least the window: more is faster and takes more memory; default: {block}",
    )
    add = parser.add_argument_group("build").add_argument
    add("--backend", **_choice(("auto", *config.BACKENDS)), default="auto", help="default: auto = onnxruntime")
    add(
        "--dtype",
        **_choice(("auto", *config.DTYPES)),
        default="auto",
        help="default: auto = float32, tensorrt bfloat16",
    )
    add("--use_weight_only", action="store_true", help="store the projections' weights in fewer bits")
    add("--weight_only_precision", **_choice(config.WEIGHT_ONLY_PRECISIONS), help="default: int8")
    add("--timing_cache", metavar="FILE", help="tensorrt: read if there, then written; default: none")
    _add_build(add)
    _add_chunkkv(parser).add_argument(
        "--chunkkv_max_keep_ratio", type=_ratio, metavar="R", help="most a request may ask for; default: 1.0"
    )
    return parser


def _tensorrt_llm_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} --backend {_TENSORRT_LLM}",
        allow_abbrev=False,
        description="Build engines with trtllm-build, ChunkKV inside. Every flag that is not listed here goes to "
        "trtllm-build as it is: see trtllm-build --help.",
    )
    _add_paths(parser, "required: a TensorRT-LLM checkpoint, as convert_checkpoint.py writes it")
    add = parser.add_argument_group("build").add_argument
    add("--backend", **_choice((_TENSORRT_LLM,)))
    add("--tokenizer_dir", metavar="DIR", help="its tokenizer's files go into the engine; delimiter boundaries need it")
    _add_build(add)
    _add_chunkkv(parser).add_argument(
        "--chunkkv_tp_agree",
        action="store_true",
        help="tensor-parallel ranks add up their scores and choose the same tokens; default: each by its own heads",
    )
    return parser


def _add_paths(parser: _Parser, checkpoint: str) -> None:
    add = parser.add_argument_group("paths").add_argument
    add("--checkpoint_dir", metavar="DIR", help=checkpoint)
    add("--output_dir", default="engine_outputs", metavar="DIR", help="the engine; default: engine_outputs")
    add("--overwrite", action="store_true", help="replace the engine in output_dir once the new one is complete")


def _add_build(add: Callable[..., Any]) -> None:
    add("--log_level", **_choice(LOG_LEVELS), default="info", help="verbose and debug show tracebacks; default: info")
    add("--dry_run", action="store_true", help="check everything and print the plan, but build nothing")


def _range(setting: str) -> str:
    low, high = RANGES[setting]
    return f"{low} to {high}"


def _add_chunkkv(parser: _Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("ChunkKV (all but the first need --chunkkv)")
    add, least = group.add_argument, "window + sinks + chunk size"
    switch = _choice(("enable", "disable"))
    add("--chunkkv", nargs="?", const="enable", default="disable", **switch, help="keep part of a prompt's KV cache")
    add("--chunkkv_recipe", metavar="FILE", help="settings that chunkkv calibrate wrote; flags given here win")
    budget = group.add_mutually_exclusive_group().add_argument
    budget(
        "--chunkkv_keep_ratio", type=_ratio, metavar="R", help=f"share kept, in (0, 1]; default: {_DEFAULTS.keep_ratio}"
    )
    budget("--chunkkv_budget_tokens", type=_whole, metavar="N", help="tokens kept, instead of a share")
    numbers = (
        ("chunk_size", f"tokens of a chunk, {_range('chunk_size')}; {DELIMITER_CHUNK_SIZE} with boundaries delimiter"),
        ("window", f"last tokens, which are kept and score the others, {_range('window')}"),
        ("sinks", "first tokens that are always kept"),
        ("pooling", "odd number of neighbours whose scores are averaged, 1 = off"),
    )
    for name, text in numbers:
        add(f"--chunkkv_{name}", type=_whole, metavar="N", help=f"{text}; default: {getattr(_DEFAULTS, name)}")
    add(
        "--chunkkv_min_tokens",
        type=_whole,
        metavar="N",
        help=f"kept of any prompt, at least {least}; default: {_DEFAULTS.min_tokens}, or {least} if more",
    )
    choices = (
        ("boundaries", "chunks of one length, or ends at punctuation and line ends"),
        ("score", "what a token's attention is measured by"),
        ("gate", "entropy: a chunk that scores high by few of its tokens gives only these at first"),
        ("leader", "layer of a group that chooses for it"),
    )
    for name, text in choices:
        add(f"--chunkkv_{name}", **_choice(CHOICES[name]), help=f"{text}; default: {getattr(_DEFAULTS, name)}")
    add("--chunkkv_layer_reuse", metavar="N|LIST", help=f"layers that share one choice: {SYNTAX}; default: 1")
    return group
