"""chunkkv-build --backend tensorrt_llm: checks, then trtllm-build itself with ChunkKV around its build()."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from chunkkv.command_line import UsageError, errors_name_flags
from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, build_values, check
from chunkkv.errors import BackendUnavailableError, BuildError, ChunkKVError
from chunkkv_builder.backends.tensorrt_llm import library
from chunkkv_builder.backends.tensorrt_llm.api import EngineBuild
from chunkkv_builder.backends.tensorrt_llm.layers import even_stages, rank_layers
from chunkkv_builder.backends.tensorrt_llm.model import LlmModel
from chunkkv_builder.backends.tensorrt_llm.preconditions import check_lengths
from chunkkv_builder.backends.tensorrt_llm.print_plan import print_plan
from chunkkv_builder.backends.tensorrt_llm.trtllm_flags import read_flags
from chunkkv_builder.flags import chunkkv_settings
from chunkkv_builder.manifest import staged_output, write_manifest
from chunkkv_builder.progress import Progress

BACKEND = "tensorrt_llm"


def run(flags: argparse.Namespace, progress: Progress) -> None:
    """Build the engine directory that `flags` describe, or print its plan with --dry_run.

    `flags` are those of chunkkv_builder.flags; `flags.passed_on` goes to trtllm-build. Raises UsageError and
    ChunkKVError subclasses.
    """
    command = library.import_build_command() if library.installed() else None
    if command is None and not flags.dry_run:
        raise BackendUnavailableError(
            f"--backend {BACKEND} needs the Python package 'tensorrt_llm' ({library.VERSIONS}), which is not "
            "installed; --dry_run checks flags and config.json without it"
        )
    _check_single_process(command)
    progress.stage("checks", 1)
    given, unknown = read_flags([*flags.passed_on, "--output_dir", flags.output_dir], command)
    build, model = _checked(flags, given)
    progress.advance()
    if flags.dry_run:
        print_plan(model, build.settings, given)
        _dry_run(flags.passed_on, build, model, command, unknown, progress)
        return
    assert command is not None
    with staged_output(flags.output_dir, flags.overwrite) as folder:
        _run_trtllm_build(command, build, model, [*flags.passed_on, "--output_dir", str(folder)], progress)
        build.write(folder)
        if nested := [path.name for path in folder.iterdir() if not path.is_file()]:
            raise BuildError(f"trtllm-build wrote a folder, {nested[0]}, which no ChunkKV engine has")
        assert build.plugins is not None
        write_manifest(folder, BACKEND, build.plugins.versions, progress)
    progress.info(f"engine written to {flags.output_dir}")


def _checked(flags: argparse.Namespace, given: argparse.Namespace) -> tuple[EngineBuild, LlmModel]:
    """Check everything that flags and config.json tell; returns what builds, and the checkpoint's model."""
    source = getattr(given, "checkpoint_dir", None) or getattr(given, "model_config", None)
    if source is None:
        raise UsageError("--checkpoint_dir is missing; give the output directory of convert_checkpoint.py")
    with errors_name_flags():
        check(BUILD_PRECONDITIONS, build_values(given))
    model = LlmModel.read(source)
    if not flags.dry_run:
        model.check_weights(source)
    settings = chunkkv_settings(flags, model.num_layers)
    assert settings is not None  # flags.py insists on --chunkkv
    with errors_name_flags():
        check_lengths(model, given)
    with errors_name_flags("chunkkv_"):
        build = EngineBuild(settings, flags.tokenizer_dir, flags.chunkkv_tp_agree)
        build.check_model(model)
        for number, stage in enumerate(even_stages(model.num_layers, model.pp_size) or []):
            rank_layers(build.settings, stage, number, 0, number)
    return build, model


def _dry_run(
    arguments: Sequence[str],
    build: EngineBuild,
    model: LlmModel,
    command: ModuleType | None,
    unknown: Sequence[str],
    progress: Progress,
) -> None:
    if command is None:
        for text in unknown:
            if text.startswith("--"):
                progress.warning(f"{text} was not checked: trtllm-build is not installed here")
        print("tensorrt_llm is not installed: config.json and the flags were checked, the network was not built.")
        return
    with tempfile.TemporaryDirectory(prefix="chunkkv-dry-run-") as folder:
        _run_trtllm_build(command, build, model, [*arguments, "--output_dir", folder], progress)
    build.check_all_built()
    print("The network of every rank was built and checked; no engine was compiled or written.")


def _run_trtllm_build(
    command: ModuleType, build: EngineBuild, model: LlmModel, arguments: Sequence[str], progress: Progress
) -> None:
    """Run trtllm-build's main with its build() replaced; both argv and build() are put back, whatever happens.

    Raises BuildError for what goes wrong inside TensorRT-LLM.
    """
    progress.stage("engines", model.tp_size * model.pp_size)
    original = command.build

    def build_with_chunkkv(rank_model: Any, build_config: Any) -> Any:
        engine = build.engine(rank_model, build_config, original)
        progress.advance()
        return engine

    argv = sys.argv
    command.build = build_with_chunkkv
    sys.argv = ["trtllm-build", *arguments]
    try:
        command.main()
    except ChunkKVError:
        raise
    except Exception as error:
        raise BuildError(f"trtllm-build failed with {type(error).__name__}: {error}") from error
    finally:
        sys.argv, command.build = argv, original


def _check_single_process(command: ModuleType | None) -> None:
    if command is None:
        return
    from tensorrt_llm import _utils

    if (size := getattr(_utils, "mpi_world_size", lambda: 1)()) > 1:
        raise UsageError(f"{size} MPI processes build at once, which is not supported: start one without mpirun")
