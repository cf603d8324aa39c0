"""chunkkv triton: write a model repository, patch one, run a server on it."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from chunkkv.cli.options import EngineDir, float_option, int_option, one_line_errors
from chunkkv.triton.logs import LEVELS, configure

app = typer.Typer(help="Serve an engine on NVIDIA Triton.", no_args_is_help=True, rich_markup_mode=None)

Repository = Annotated[Path, typer.Option("--model_repository", metavar="DIR", help="Triton's model repository")]
PythonEnv = Annotated[
    Path | None,
    typer.Option("--python_env", metavar="DIR", help="virtual environment that runs the models; default: this one"),
]


@app.command()
def init(
    engine_dir: EngineDir,
    model_repository: Repository,
    layout: Annotated[
        str, typer.Option("--layout", metavar="NAME", help="single (one model) or trtllm (TensorRT-LLM's five)")
    ] = "single",
    slots: Annotated[int | None, int_option("slots", "answers that grow at once; default 8")] = None,
    waiting: Annotated[int | None, int_option("waiting", "requests that may wait; default 64")] = None,
    queue_timeout_s: Annotated[float | None, float_option("queue_timeout_s", "longest wait; default 60")] = None,
    request_timeout_s: Annotated[
        float | None, float_option("request_timeout_s", "longest wait and answer together; default 600")
    ] = None,
    kv_bytes: Annotated[int | None, int_option("kv_bytes", "bound of all KV caches; default none")] = None,
    max_prompt_bytes: Annotated[int | None, int_option("max_prompt_bytes", "longest prompt in bytes")] = None,
    stream_interval_ms: Annotated[
        float | None, float_option("stream_interval_ms", "tokens that come sooner share a response; default 0")
    ] = None,
    threads: Annotated[int | None, int_option("threads", "of an engine on the CPU; default: one per core")] = None,
    log_level: Annotated[str | None, typer.Option("--log_level", help="of the model: " + ", ".join(LEVELS))] = None,
    python_env: PythonEnv = None,
    bls_instances: Annotated[int, int_option("bls_instances", "layout trtllm: requests to the BLS model", True)] = 4,
) -> None:
    """Write a model repository for an engine."""
    with one_line_errors("info"):
        from chunkkv.triton.repository.write import ServeOptions, write_repository

        given = dict(locals())
        options = ServeOptions(**{field.name: given[field.name] for field in dataclasses.fields(ServeOptions)})
        names = write_repository(engine_dir, model_repository, layout, options, python_env, bls_instances)
        print(f"{model_repository}: {', '.join(names)}")


@app.command()
def patch(
    engine_dir: EngineDir,
    model_repository: Repository,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="print the diff, change nothing")] = False,
) -> None:
    """Set an existing repository so that a ChunkKV engine runs under TensorRT-LLM's own backend; print the diff."""
    with one_line_errors("info"):
        from chunkkv.triton.repository.patch import patch_repository

        print(patch_repository(engine_dir, model_repository, dry_run), end="")


@app.command()
def serve(
    model_repository: Repository,
    host: Annotated[str, typer.Option("--host", help="address to listen on", show_default=True)] = "127.0.0.1",
    http_port: Annotated[int, int_option("http_port", "HTTP", True)] = 8000,
    grpc_port: Annotated[int, int_option("grpc_port", "gRPC", True)] = 8001,
    metrics_port: Annotated[int, int_option("metrics_port", "Prometheus metrics", True)] = 8002,
    restarts: Annotated[int, int_option("restarts", "failures in a row before it gives up", True)] = 5,
    canary_s: Annotated[float, float_option("canary_s", "time between two canary requests", True)] = 5.0,
    canary_timeout_s: Annotated[float, float_option("canary_timeout_s", "longest canary request", True)] = 60.0,
    start_timeout_s: Annotated[float, float_option("start_timeout_s", "longest start", True)] = 300.0,
    exit_timeout_s: Annotated[int, int_option("exit_timeout_s", "time for open requests to end", True)] = 30,
    server: Annotated[Path | None, typer.Option("--server", metavar="FILE", help="the tritonserver to run")] = None,
    python_env: PythonEnv = None,
    server_arg: Annotated[
        list[str] | None, typer.Option("--server_arg", metavar="ARG", help="handed to tritonserver; may be repeated")
    ] = None,
) -> None:
    """Run tritonserver on a repository and keep it alive; SIGTERM lets open requests end."""
    with one_line_errors("info"):
        from chunkkv.triton.server.files import ServerFiles
        from chunkkv.triton.server.supervisor import ServeSettings, Supervisor

        ports = http_port, grpc_port, metrics_port
        times = {"canary_s": canary_s, "canary_timeout_s": canary_timeout_s, "start_timeout_s": start_timeout_s}
        settings = ServeSettings(
            model_repository,
            host,
            *ports,
            exit_timeout_s=exit_timeout_s,
            restarts=restarts,
            server_arguments=tuple(server_arg or ()),
            **times,
        )
        python = Path(sys.executable) if python_env is None else python_env / "bin" / "python"
        with tempfile.TemporaryDirectory(prefix="chunkkv-triton-") as folder:
            files = ServerFiles.find(Path(os.path.abspath(folder)), python, server)
            configure(source="supervisor")
            supervisor = Supervisor(settings, files)
            supervisor.handle_signals()
            code = supervisor.run()
        raise SystemExit(code)
