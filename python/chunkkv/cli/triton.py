"""chunkkv triton: write a model repository, patch one, run a server on it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from chunkkv.cli.options import ENGINE_DIR, add_engine_dir, path_argument
from chunkkv.command_line import CommandParser, TextListAction, number, whole_number
from chunkkv.logs import LEVELS, configure

_REPOSITORY = {"model_repository": "the directory of Triton's model repository"}


def add_parser(program: CommandParser) -> None:
    """Add the command with its commands init, patch and serve to the program."""
    triton = program.add_command("triton", "Serve an engine on NVIDIA Triton.", usage="chunkkv triton COMMAND [flags]")
    _add_init(triton)
    _add_patch(triton)
    _add_serve(triton)


def _add_repository(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model_repository", type=path_argument, metavar="DIR", help="required: directory of Triton's model repository"
    )


def _add_python_env(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--python_env",
        type=path_argument,
        metavar="DIR",
        help="virtual environment that runs the models; default: this one",
    )


def _add_init(triton: CommandParser) -> None:
    parser = triton.add_command(
        "init",
        "Write a model repository for an engine.",
        run_init,
        usage="chunkkv triton init --engine_dir DIR --model_repository DIR [flags]",
        required={**ENGINE_DIR, **_REPOSITORY},
    )
    repository = parser.add_argument_group("repository")
    add_engine_dir(repository)
    _add_repository(repository)
    repository.add_argument(
        "--layout",
        default="single",
        metavar="NAME",
        help="single (one model) or trtllm (TensorRT-LLM's five models); default: single",
    )
    _add_python_env(repository)
    model = parser.add_argument_group("model")
    numbers = (
        ("slots", whole_number, "requests in work at once; default: 256 on ONNX Runtime, else the engine's rows"),
        ("waiting", whole_number, "requests that may wait for a slot; default: 64"),
        ("queue_timeout_s", number, "longest wait of a request in seconds; default: 60"),
        ("request_timeout_s", number, "longest wait and answer together in seconds; default: 600"),
        ("kv_bytes", whole_number, "bytes that all KV caches together may take; default: 80 %% of the free memory"),
        ("max_prompt_bytes", whole_number, "longest prompt in bytes of text; default: by max_input_len"),
        ("stream_interval_ms", number, "milliseconds within which new tokens share one response; default: 0"),
        ("threads", whole_number, "threads of an engine on the CPU; default: one per core"),
    )
    for name, parse, text in numbers:
        model.add_argument(f"--{name}", type=parse, metavar="N" if parse is whole_number else "X", help=text)
    model.add_argument(
        "--log_level",
        dest="model_log_level",
        choices=LEVELS,
        help="least important messages of the model's log; default: info",
    )


def _add_patch(triton: CommandParser) -> None:
    parser = triton.add_command(
        "patch",
        "Set an existing repository so that a ChunkKV engine runs under TensorRT-LLM's own backend; print the diff.",
        run_patch,
        usage="chunkkv triton patch --engine_dir DIR --model_repository DIR [flags]",
        required={**ENGINE_DIR, **_REPOSITORY},
    )
    group = parser.add_argument_group("repository")
    add_engine_dir(group)
    _add_repository(group)
    group.add_argument("--dry_run", action="store_true", help="print the diff and change nothing")


def _add_serve(triton: CommandParser) -> None:
    parser = triton.add_command(
        "serve",
        "Run tritonserver on a repository and keep it alive; SIGTERM lets open requests end.",
        run_serve,
        usage="chunkkv triton serve --model_repository DIR [flags]",
        required=_REPOSITORY,
    )
    server = parser.add_argument_group("server")
    _add_repository(server)
    server.add_argument(
        "--server",
        type=path_argument,
        metavar="FILE",
        help="tritonserver to run; default: that of the wheel nvidia-pytriton, then PATH's, then the container's",
    )
    _add_python_env(server)
    server.add_argument(
        "--server_arg",
        action=TextListAction,
        default=(),
        metavar="ARG",
        help="argument for tritonserver, as in --server_arg --log-verbose=1; may be given several times",
    )
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on; default: 127.0.0.1")
    for name, port, service in (
        ("http_port", 8000, "HTTP"),
        ("grpc_port", 8001, "gRPC"),
        ("metrics_port", 8002, "Prometheus metrics"),
    ):
        network.add_argument(
            f"--{name}", type=whole_number, default=port, metavar="N", help=f"port for {service}; default: {port}"
        )
    _add_watching(parser)


def _add_watching(parser: CommandParser) -> None:
    group = parser.add_argument_group("watching")
    group.add_argument(
        "--restarts",
        type=whole_number,
        default=5,
        metavar="N",
        help="give up after this many failures in a row; default: 5",
    )
    for name, seconds, text in (
        ("canary_s", 5.0, "seconds between two canary requests, which ask the server for a token"),
        ("canary_timeout_s", 60.0, "longest canary request in seconds"),
        ("start_timeout_s", 300.0, "longest start of the server in seconds"),
    ):
        group.add_argument(f"--{name}", type=number, default=seconds, metavar="X", help=f"{text}; default: {seconds:g}")
    group.add_argument(
        "--exit_timeout_s",
        type=whole_number,
        default=30,
        metavar="N",
        help="seconds that open requests have to end after SIGTERM; default: 30",
    )


def run_init(args: argparse.Namespace) -> None:
    """Write the repository and print the names of its models."""
    from chunkkv.triton.repository.write import ServeOptions, write_repository
    from chunkkv.triton.server.files import numpy_problem

    options = ServeOptions(
        slots=args.slots,
        waiting=args.waiting,
        queue_timeout_s=args.queue_timeout_s,
        request_timeout_s=args.request_timeout_s,
        kv_bytes=args.kv_bytes,
        max_prompt_bytes=args.max_prompt_bytes,
        stream_interval_ms=args.stream_interval_ms,
        threads=args.threads,
        log_level=args.model_log_level,
    )
    names = write_repository(args.engine_dir, args.model_repository, args.layout, options, args.python_env)
    print(f"{args.model_repository}: {', '.join(names)}")
    if problem := numpy_problem(_python(args)):
        print(f"warning: {problem}", file=sys.stderr)


def _python(args: argparse.Namespace) -> Path:
    """Return the interpreter that runs the models."""
    return Path(sys.executable) if args.python_env is None else args.python_env / "bin" / "python"


def run_patch(args: argparse.Namespace) -> None:
    """Patch the repository, or only print how."""
    from chunkkv.triton.repository.patch import patch_repository

    print(patch_repository(args.engine_dir, args.model_repository, args.dry_run), end="")


def run_serve(args: argparse.Namespace) -> None:
    """Run the server; raises SystemExit with the supervisor's exit code."""
    from chunkkv.triton.server.files import ServerFiles
    from chunkkv.triton.server.shared_memory import new_folder
    from chunkkv.triton.server.supervisor import ServeSettings, Supervisor

    settings = ServeSettings(
        repository=args.model_repository,
        host=args.host,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        start_timeout_s=args.start_timeout_s,
        canary_s=args.canary_s,
        canary_timeout_s=args.canary_timeout_s,
        exit_timeout_s=args.exit_timeout_s,
        restarts=args.restarts,
        server_arguments=args.server_arg,
    )
    with new_folder() as folder:
        files = ServerFiles.find(Path(os.path.abspath(folder)), _python(args), args.server)
        configure(source="supervisor")
        supervisor = Supervisor(settings, files)
        supervisor.handle_signals()
        code = supervisor.run()
    raise SystemExit(code)
