"""Reads and writes Triton's config.pbtxt through the server's own message classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkkv.engine.json_files import read_text
from chunkkv.errors import BackendUnavailableError, ConfigError

CONFIG_FILE = "config.pbtxt"
Tensor = tuple[str, str, tuple[int, ...]]  # name, type without TYPE_, dims


def new_config(**fields: Any) -> Any:
    """Return an empty ModelConfig with `fields` set; raises BackendUnavailableError without the extra `triton`."""
    return _messages().ModelConfig(**fields)


def add_tensors(config: Any, inputs: Sequence[Tensor], required: Sequence[str], outputs: Sequence[Tensor]) -> None:
    """Add inputs and outputs; inputs that are not `required` become optional."""
    types = _messages().DataType
    for name, kind, dims in inputs:
        config.input.add(name=name, data_type=types.Value(f"TYPE_{kind}"), dims=dims, optional=name not in required)
    for name, kind, dims in outputs:
        config.output.add(name=name, data_type=types.Value(f"TYPE_{kind}"), dims=dims)


def set_parameters(config: Any, values: Mapping[str, object]) -> None:
    """Set string parameters; a value of None is left out."""
    for name, value in values.items():
        if value is not None:
            config.parameters[name].string_value = str(value)


def run_on_cpu(config: Any, count: int = 1) -> None:
    """Have Triton start `count` processes of a python model; which device an engine uses is the engine's matter."""
    config.instance_group.add(count=count, kind=_messages().ModelInstanceGroup.KIND_CPU)


def to_text(config: Any) -> str:
    """Return the message as config.pbtxt has it."""
    from google.protobuf import text_format

    return text_format.MessageToString(config)


def parse(text: str, where: Path) -> Any:
    """Return the ModelConfig in `text`; raises ConfigError with line and column for what is no valid config."""
    config = new_config()
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, config)
    except text_format.ParseError as error:
        hint = ": fill the template's ${...} first" if "${" in text else ""
        raise ConfigError(f"{where} is no valid Triton model configuration ({error}){hint}") from None


def read_config(path: Path) -> Any:
    """Return the ModelConfig in a file."""
    return parse(read_text(path, ConfigError), path)


def _messages() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise BackendUnavailableError(
            f"Triton's configuration files need the package tritonclient ({error}): pip install 'chunkkv-trt[triton]'"
        ) from None
    return model_config_pb2
