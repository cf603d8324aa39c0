"""The TensorRT-LLM backend: checks, then trtllm-build itself with ChunkKV around its build()."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkkv.command_line import UsageError, errors_name_flags
from chunkkv.engine.backends import TENSORRT_LLM, TRAITS
from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, build_values, check
from chunkkv.errors import BuildError, ChunkKVError
from chunkkv_builder.backends.interface import Built
from chunkkv_builder.backends.tensorrt_llm import library
from chunkkv_builder.backends.tensorrt_llm.engine_build import EngineBuild, even_stages, rank_layers
from chunkkv_builder.backends.tensorrt_llm.model import LlmModel
from chunkkv_builder.backends.tensorrt_llm.preconditions import check_lengths
from chunkkv_builder.backends.tensorrt_llm.print_plan import print_plan
from chunkkv_builder.backends.tensorrt_llm.trtllm_flags import read_flags
from chunkkv_builder.chunkkv_flags import chunkkv_settings
from chunkkv_builder.progress import Progress

_TIMING_CACHE = "--output_timing_cache"


@dataclass(frozen=True)
class LlmBuild:
    """A planned build of TensorRT-LLM engines.

    Parameters
    ----------
    checkpoint : Path
        The output directory of convert_checkpoint.py, or a config.json.
    model : LlmModel
        What its config.json says.
    engines : EngineBuild
        Puts ChunkKV into the engine of each rank.
    limits : Namespace
        trtllm-build's flags; without TensorRT-LLM only those that were given.
    tokenizer_dir : Path or None
        The directory of --tokenizer_dir.
    command : BuildCommand or None
        trtllm-build, None where TensorRT-LLM is not installed.
    is_dry_run : bool
        Whether no engine is compiled.
    """

    checkpoint: Path
    model: LlmModel
    engines: EngineBuild
    limits: argparse.Namespace
    tokenizer_dir: Path | None
    command: library.BuildCommand | None
    is_dry_run: bool

    def show(self) -> None:
        """Print the plan, and how much of it was checked."""
        print_plan(self.model, self.engines.settings, self.limits)
        if self.command is None:
            print("tensorrt_llm is not installed: config.json and the flags were checked, the network was not built.")
        else:
            print("The network of every rank was built and checked; no engine was compiled or written.")


class TensorRTLLMBackend:
    """Builds with trtllm-build; satisfies chunkkv_builder.backends.interface.Backend.

    Parameters
    ----------
    arguments : sequence of str
        The flags that are trtllm-build's own, without --output_dir.
    tokenizer_dir : Path or None
        Directory of the tokenizer: its files go into the engine, and delimiter boundaries need it.
    tp_agree : bool
        Whether tensor-parallel ranks add up their scores and keep the same tokens.
    """

    name = TENSORRT_LLM

    def __init__(self, arguments: Sequence[str], tokenizer_dir: Path | None, tp_agree: bool) -> None:
        self._arguments, self._tokenizer_dir, self._tp_agree = tuple(arguments), tokenizer_dir, tp_agree

    def missing(self, flags: argparse.Namespace) -> list[str]:
        """Return whether TensorRT-LLM is missing; a dry run does without."""
        if flags.dry_run or library.installed():
            return []
        return [
            f"the Python package 'tensorrt_llm' ({library.VERSIONS}), which is not installed; --dry_run checks flags "
            "and config.json without it"
        ]

    def plan(self, flags: argparse.Namespace, progress: Progress) -> LlmBuild:
        """Read trtllm-build's flags, config.json and the tokenizer."""
        command = library.import_build_command() if library.installed() else None
        if command is not None:
            _check_single_process()
        progress.stage("checks", 1)
        limits, unknown = read_flags([*self._arguments, "--output_dir", flags.output_dir], command)
        for word in unknown:
            if word.startswith("--"):
                progress.warning(f"{word} was not checked: trtllm-build is not installed here")
        source = getattr(limits, "checkpoint_dir", None) or getattr(limits, "model_config", None)
        if source is None:
            raise UsageError("--checkpoint_dir is missing; give the output directory of convert_checkpoint.py")
        with errors_name_flags():
            check(BUILD_PRECONDITIONS, build_values(limits))
        model = LlmModel.read(source)
        settings = chunkkv_settings(flags, model.num_layers, has_tokenizer=self._tokenizer_dir is not None)
        assert settings is not None  # flags.py insists on --chunkkv
        with errors_name_flags("chunkkv_"):
            TRAITS[TENSORRT_LLM].check_settings(settings)
        engines = EngineBuild(settings, self._tokenizer_dir, self._tp_agree)
        return LlmBuild(Path(source), model, engines, limits, self._tokenizer_dir, command, flags.dry_run)

    def check(self, planned: LlmBuild, progress: Progress) -> None:
        """Check all that flags and config.json tell; a dry run also makes every network without compiling it.

        Raises UsageError for flags that do not fit the model, CheckpointError for missing weights.
        """
        engines, model = planned.engines, planned.model
        if not planned.is_dry_run:
            model.check_weights(planned.checkpoint)
        with errors_name_flags():
            check_lengths(model, planned.limits)
        with errors_name_flags("chunkkv_"):
            engines.check_model(model)
            for number, stage in enumerate(even_stages(model.num_layers, model.pp_size) or []):
                rank_layers(engines.settings, stage, number, 0, number)
        progress.advance()
        if planned.is_dry_run and planned.command is not None:
            with tempfile.TemporaryDirectory(prefix="chunkkv-dry-run-") as folder:
                self._run_trtllm_build(planned, Path(folder), progress)
            engines.check_all_built()

    def build(self, planned: LlmBuild, folder: Path, progress: Progress) -> Built:
        """Let trtllm-build write `folder` and add what ChunkKV needs; return the versions of TensorRT and TensorRT-LLM.

        Raises BuildError for what goes wrong inside TensorRT-LLM.
        """
        self._run_trtllm_build(planned, folder, progress)
        planned.engines.write(folder)
        if nested := [path.name for path in folder.iterdir() if not path.is_file()]:
            raise BuildError(f"trtllm-build wrote a folder, {nested[0]}, which no ChunkKV engine has")
        assert planned.engines.plugins is not None  # the engines were built with them
        return Built(planned.engines.plugins.versions)

    def _run_trtllm_build(self, planned: LlmBuild, folder: Path, progress: Progress) -> None:
        """Run trtllm-build's main with its build() replaced; both argv and build() are put back, whatever happens.

        Without --output_timing_cache it would leave one in the working directory; it then goes to a folder that is
        deleted.
        """
        command, engines = planned.command, planned.engines
        assert command is not None  # `missing` and `check` saw to that
        progress.stage("engines", planned.model.tp_size * planned.model.pp_size)
        original = command.build

        def build_with_chunkkv(rank_model: Any, build_config: Any) -> Any:
            engine = engines.engine(rank_model, build_config, original)
            progress.advance()
            return engine

        argv = sys.argv
        command.build = build_with_chunkkv
        try:
            with tempfile.TemporaryDirectory(prefix="chunkkv-timing-cache-") as scratch:
                own = ["--output_dir", str(folder), *self._timing_cache(Path(scratch))]
                sys.argv = ["trtllm-build", *self._arguments, *own]
                command.main()
        except ChunkKVError:
            raise
        except Exception as error:
            raise BuildError(_failure(error)) from error
        finally:
            sys.argv, command.build = argv, original

    def _timing_cache(self, scratch: Path) -> list[str]:
        if any(word.split("=")[0] == _TIMING_CACHE for word in self._arguments):
            return []
        return [_TIMING_CACHE, str(scratch / "model.cache")]


def _failure(error: Exception) -> str:
    """Return what failed and where: many assertions of TensorRT-LLM have no text."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = "/".join(Path(place.filename).parts[-2:])
    return (
        f"trtllm-build failed with {type(error).__name__} at {file}:{place.lineno}: "
        f"{str(error) or place.line} (--log_level debug shows the traceback)"
    )


def _check_single_process() -> None:
    """Raise UsageError under mpirun: every process would write the same folder."""
    from tensorrt_llm import _utils

    if (size := getattr(_utils, "mpi_world_size", lambda: 1)()) > 1:
        raise UsageError(f"{size} MPI processes build at once, which is not supported: start one without mpirun")
