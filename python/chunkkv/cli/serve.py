"""chunkkv serve: an HTTP server with OpenAI's API for one engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from chunkkv.cli.options import ENGINE_DIR, add_engine_flags, open_session, path_argument
from chunkkv.command_line import CommandParser, TextAction, number, whole_number
from chunkkv.errors import ChunkKVError
from chunkkv.logs import LEVELS

if TYPE_CHECKING:
    from chunkkv.serve.service import Service
    from chunkkv.session import ChunkKVSession

_BODY_BYTES_PER_TOKEN = 32  # a longer text than this per token of max_input_len cannot be a prompt
_LEAST_BODY_BYTES = 1 << 20
_EXTRA = ("prometheus_client", "starlette", "uvicorn")
_EXIT_TIMEOUT_S = 30.0
_OTHER_LOGGERS = ("asyncio", "uvicorn")  # their warnings are lines of the same log


def add_parser(program: CommandParser) -> None:
    """Add the command to the program."""
    parser = program.add_command(
        "serve",
        "Serve an engine with OpenAI's API over HTTP; SIGTERM and Ctrl-C let open requests end.",
        run,
        usage="chunkkv serve --engine_dir DIR [flags]",
        required=ENGINE_DIR,
    )
    add_engine_flags(parser, paged_kv_cache=True)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        action=TextAction,
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on; others than this machine reach it only by another one; default: 127.0.0.1",
    )
    network.add_argument(
        "--port", type=whole_number, default=8080, metavar="N", help="port; 0 takes a free one; default: 8080"
    )
    network.add_argument(
        "--api_key_file",
        type=path_argument,
        metavar="FILE",
        help="file with the API keys that clients must send, one in a line; default: everybody may ask",
    )
    network.add_argument(
        "--model_name", action=TextAction, metavar="NAME", help="what clients call the model; default: the name of DIR"
    )
    _add_limits(parser)
    parser.add_argument(
        "--log_level", choices=LEVELS, default="info", help="least important messages of the log; default: info"
    )


def _add_limits(parser: CommandParser) -> None:
    group = parser.add_argument_group("limits")
    for name, parse, text in (
        ("slots", whole_number, "requests in work at once; default: 256 on ONNX Runtime, else the engine's rows"),
        ("waiting", whole_number, "requests that may wait for a slot; default: 64"),
        ("queue_timeout_s", number, "longest wait of a request in seconds; default: 60"),
        ("request_timeout_s", number, "longest wait and answer together in seconds; default: 600"),
        ("kv_bytes", whole_number, "bytes of all KV caches and contexts; default: 80 %% of the free memory"),
        ("context_bytes", whole_number, "bytes of them for what is held between requests; default: a quarter"),
        ("context_age_s", number, "seconds after its last use for which a conversation is held; default: 3600"),
        ("default_max_tokens", whole_number, "longest answer of a chat that says no limit; default: 1024"),
        ("max_body_bytes", whole_number, "largest body of a request; default: by max_input_len, at least 1 MiB"),
        ("exit_timeout_s", number, "seconds that open requests have to end after SIGTERM; default: 30"),
    ):
        group.add_argument(f"--{name}", type=parse, metavar="N" if parse is whole_number else "X", help=text)


def run(args: argparse.Namespace) -> None:
    """Load the engine and serve it until a signal comes."""
    import logging

    from chunkkv.logs import configure, fields

    try:
        from chunkkv.serve.app import make_app
        from chunkkv.serve.server import HttpServer, is_loopback, listening_socket, read_api_keys
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ChunkKVError(
            f"the Python package {error.name!r} is missing; install what the server needs: pip install '.[serve]'"
        ) from None
    configure(args.log_level, source="serve")
    for name in _OTHER_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = logging.getLogger("chunkkv").handlers, False
        logger.setLevel(logging.WARNING)
    log = logging.getLogger(__name__)
    keys = () if args.api_key_file is None else read_api_keys(args.api_key_file)
    bound = listening_socket(args.host, args.port)
    if not is_loopback(args.host):
        log.warning(
            "open_to_the_network",
            extra=fields(
                host=args.host,
                message="everybody who reaches this address may "
                + ("ask with a key; keys and texts travel unencrypted" if keys else "ask: --api_key_file is not given"),
            ),
        )
    log.info("loading", extra=fields(engine_dir=str(args.engine_dir)))
    session = open_session(args, args.max_tokens_in_paged_kv_cache)
    service = _service(args, session)
    with service.batcher:
        timeout_s = _EXIT_TIMEOUT_S if args.exit_timeout_s is None else args.exit_timeout_s
        server = HttpServer(make_app(service, keys), bound, service, timeout_s)
        host = f"[{args.host}]" if ":" in args.host else args.host
        ready = fields(
            url=f"http://{host}:{server.port}",
            model=service.model,
            kv_bytes=service.batcher.load().kv_bytes_bound,
            context_bytes=service.limits.context_bytes,
        )
        server.run(on_ready=lambda: log.info("ready", extra=ready))
        service.batcher.close()
    log.info("stopped")


def _service(args: argparse.Namespace, session: ChunkKVSession) -> Service:
    """Return the service that the flags ask for."""
    from chunkkv.batching import BatchingLimits, ContinuousBatcher
    from chunkkv.serve.service import Service, ServiceLimits, shared_memory

    given = {
        name: value
        for name in ("slots", "waiting", "queue_timeout_s", "request_timeout_s")
        if (value := getattr(args, name)) is not None
    }
    kv_bytes, context_bytes = shared_memory(session, args.kv_bytes, args.context_bytes)
    longest = _BODY_BYTES_PER_TOKEN * session.limits.max_input_len
    own: dict[str, Any] = {"context_bytes": context_bytes, "max_body_bytes": max(longest, _LEAST_BODY_BYTES)}
    for name in ("default_max_tokens", "max_body_bytes", "context_age_s"):
        if getattr(args, name) is not None:
            own[name] = getattr(args, name)
    limits = ServiceLimits(**own)
    batcher = ContinuousBatcher(session, BatchingLimits(kv_bytes=kv_bytes, **given))
    return Service(batcher, args.model_name or args.engine_dir.resolve().name, limits)
