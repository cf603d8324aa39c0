"""chunkkv-build: from a checkpoint to an engine directory, with ChunkKV inside if asked for."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chunkkv.command_line import errors_name_flags, run_program, termination_as_exit

if TYPE_CHECKING:
    from chunkkv_builder.progress import Progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises SystemExit with 1 for failures, 2 for bad usage, 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def parse() -> Namespace:
        from chunkkv_builder import flags  # here, so that a missing package is an error of one line

        return flags.parse(arguments)

    def run(flags: Namespace) -> None:
        with termination_as_exit():
            build_engine(flags)

    run_program("chunkkv-build", parse, run)


def build_engine(flags: Namespace) -> None:
    """Build the engine that `flags` describe, or print its plan with --dry_run.

    Parameters
    ----------
    flags : Namespace
        Of chunkkv_builder.flags.parse.

    Raises
    ------
    ChunkKVError
        A subclass that says what is wrong: flags, checkpoint, this machine, or what the engine's builder refused.
    OSError
        Where the engine cannot be written.
    """
    # Imported here, so that a missing package is an error of one line.
    from chunkkv_builder.backends.registry import available_backend
    from chunkkv_builder.manifest import check_target, staged_output, write_manifest
    from chunkkv_builder.progress import Progress

    with errors_name_flags():
        check_target(Path(flags.output_dir), flags.overwrite)
    backend = available_backend(flags)
    with Progress(flags.log_level) as progress:
        planned = backend.plan(flags, progress)
        backend.check(planned, progress)
        if not flags.dry_run:
            with staged_output(flags.output_dir, flags.overwrite, progress.warning) as folder:
                built = backend.build(planned, folder, progress)
                copy_tokenizer(planned.tokenizer_dir, folder, progress)
                write_manifest(folder, backend.name, built.versions, progress, built.tensorrt)
    if flags.dry_run:
        planned.show()  # not earlier: a progress bar would be drawn over it
    else:
        progress.info(f"engine written to {flags.output_dir}")


def copy_tokenizer(tokenizer_dir: Path | None, folder: Path, progress: Progress) -> None:
    """Copy the tokenizer's files from `tokenizer_dir` into the engine's `folder`; there are none where it is None."""
    from chunkkv_builder.checkpoint.tokenizer_files import tokenizer_files

    files = tokenizer_files(tokenizer_dir)
    progress.stage("tokenizer", len(files))
    for file in files:
        shutil.copyfile(file, folder / file.name)
        progress.advance()


if __name__ == "__main__":
    main()
