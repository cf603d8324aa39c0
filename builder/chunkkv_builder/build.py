"""chunkkv-build: from a Hugging Face checkpoint to an engine directory, with ChunkKV inside if asked for."""

from __future__ import annotations

import importlib
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from chunkkv.command_line import errors_name_flags, run_program, termination_as_exit

if TYPE_CHECKING:
    import numpy as np

    from chunkkv_builder.checkpoint.hugging_face import Checkpoint
    from chunkkv_builder.config import BuildConfig
    from chunkkv_builder.plan import Plan
    from chunkkv_builder.progress import Progress

TOKENIZER_FILE = "tokenizer.json"
_AUTO_BACKEND = "onnxruntime"
_TENSORRT_LLM = "tensorrt_llm"
_AUTO_DTYPE = {"onnxruntime": "float32"}  # elsewhere bfloat16: fast attention kernels need 16 bits


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; raises SystemExit with 1 for failures, 2 for bad usage, 130 for Ctrl-C, 143 for SIGTERM."""

    def parse() -> Namespace:
        from chunkkv_builder import flags  # only here is a missing package an error of one line

        return flags.parse(arguments)

    def run(flags: Namespace) -> None:
        with termination_as_exit():
            build_engine(flags)

    run_program("chunkkv-build", parse, run)


def build_engine(flags: Namespace) -> None:
    """Build the engine that `flags` describe, or print its plan; raises ChunkKVError subclasses and OSError."""
    from chunkkv_builder.dry_run import print_plan
    from chunkkv_builder.manifest import check_target, staged_output, write_config, write_manifest
    from chunkkv_builder.progress import Progress

    with errors_name_flags():
        check_target(Path(flags.output_dir), flags.overwrite)
    if flags.backend == _TENSORRT_LLM:
        # Its checkpoints, flags and graphs are TensorRT-LLM's own.
        command = importlib.import_module(f"chunkkv_builder.backends.{_TENSORRT_LLM}.command")
        with Progress(flags.log_level) as progress:
            command.run(flags, progress)
        return
    backend = load_backend(flags.backend, flags.chunkkv)
    with Progress(flags.log_level) as progress:
        checkpoint, build, plan = read_and_plan(flags, progress)
        backend.check(plan)
        if not flags.dry_run:
            with staged_output(flags.output_dir, flags.overwrite) as folder:
                cache = {"timing_cache": Path(flags.timing_cache)} if flags.timing_cache else {}
                versions = backend.build(checkpoint, plan, build, folder, progress, **cache)
                copy_tokenizer(checkpoint, folder, progress)
                write_config(folder, plan.model.to_dict(), build.to_dict(), plan.settings)
                write_manifest(folder, build.backend, versions, progress)
    if flags.dry_run:
        print_plan(plan, build)
    else:
        progress.info(f"engine written to {flags.output_dir}")


def load_backend(name: str, chunkkv: bool = False) -> ModuleType:
    """Return the module that builds for backend `name`, with ChunkKV or without.

    Raises BackendUnavailableError saying what is missing on this machine.
    """
    from chunkkv.errors import BackendUnavailableError

    name = _AUTO_BACKEND if name == "auto" else name
    module = importlib.import_module(f"chunkkv_builder.backends.{name}")
    if lacking := module.missing(chunkkv):
        raise BackendUnavailableError(
            f"--backend {name} needs {'; and '.join(lacking)}. Install that or give --backend {_AUTO_BACKEND}"
        )
    return module


def read_and_plan(flags: Namespace, progress: Progress) -> tuple[Checkpoint, BuildConfig, Plan]:
    """Open the checkpoint and return it with the checked limits and the plan; nothing is written."""
    from chunkkv_builder.checkpoint.hugging_face import Checkpoint
    from chunkkv_builder.config import BuildConfig
    from chunkkv_builder.flags import chunkkv_settings
    from chunkkv_builder.plan import make_plan

    progress.stage("checkpoint", 1)
    checkpoint = Checkpoint.open(flags.checkpoint_dir)
    progress.advance()
    model = checkpoint.config
    settings = chunkkv_settings(flags, model.num_layers)
    names = ("max_input_len", "max_seq_len", "max_batch_size", "max_num_tokens", "weight_only_precision")
    limits = {name: getattr(flags, name) for name in names}
    backend = _AUTO_BACKEND if flags.backend == "auto" else flags.backend
    dtype = _AUTO_DTYPE.get(backend, "bfloat16") if flags.dtype == "auto" else flags.dtype
    with errors_name_flags():
        build = BuildConfig.for_model(model, **limits, backend=backend, dtype=dtype)
        build.check_window(settings)
        build.check_gate(settings)
    delimiters = _read_tokenizer(
        checkpoint, progress, wanted=settings is not None and settings.boundaries == "delimiter"
    )
    with errors_name_flags("chunkkv_"):
        plan = make_plan(model, settings, delimiters)
    return checkpoint, build, plan


def copy_tokenizer(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """Copy the tokenizer's files into the engine, where there is a tokenizer."""
    files = checkpoint.files if TOKENIZER_FILE in checkpoint.files else {}
    progress.stage("tokenizer", len(files))
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
        progress.advance()


def _read_tokenizer(checkpoint: Checkpoint, progress: Progress, wanted: bool) -> np.ndarray | None:
    """Check the checkpoint's tokenizer before the long work; return its delimiter tokens [vocab] where wanted."""
    from chunkkv.text.tokenizer import Tokenizer

    model = checkpoint.config
    if TOKENIZER_FILE not in checkpoint.files:
        progress.warning(f"{checkpoint.path} has no {TOKENIZER_FILE}: the engine will take and give token ids only")
        return None
    tokenizer = Tokenizer.from_dir(checkpoint.path)
    if tokenizer.size > model.vocab_size:
        progress.warning(
            f"the tokenizer has {tokenizer.size} tokens, the model {model.vocab_size}: "
            "prompts with the others are refused"
        )
    return tokenizer.delimiter_token_table(vocab_size=model.vocab_size) if wanted else None


if __name__ == "__main__":
    main()
