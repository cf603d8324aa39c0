"""Reads and writes Triton's config.pbtxt through the server's own message classes.

They come with the package tritonclient, which the extra `triton` installs. It is imported when the first message is
needed, so that everything else works without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from chunkkv.engine.json_files import read_text
from chunkkv.errors import BackendUnavailableError, ConfigError
from chunkkv.triton.repository.tensors import TensorSpec

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CONFIG_FILE = "config.pbtxt"
_LARGEST_BYTES = 4 << 20  # a configuration has some kilobytes
# Quoted text and comments, which stay as they are, or a placeholder of TensorRT-LLM's templates outside of them.
_PLACEHOLDER = re.compile(r""""(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*|(?P<placeholder>\$\{[^}\n]*\})""")


def new_config(name: str, *, backend: str = "", platform: str = "", max_batch_size: int = 0) -> ModelConfig:
    """Return a ModelConfig with these fields set; raises BackendUnavailableError without the extra `triton`."""
    return _messages().ModelConfig(name=name, backend=backend, platform=platform, max_batch_size=max_batch_size)


def add_tensors(
    config: ModelConfig, inputs: Sequence[TensorSpec], required: Sequence[str], outputs: Sequence[TensorSpec]
) -> None:
    """Add inputs and outputs; inputs that are not `required` become optional."""
    types = _messages().DataType
    for name, data_type, dims in inputs:
        config.input.add(
            name=name, data_type=types.Value(f"TYPE_{data_type}"), dims=dims, optional=name not in required
        )
    for name, data_type, dims in outputs:
        config.output.add(name=name, data_type=types.Value(f"TYPE_{data_type}"), dims=dims)


def set_parameters(config: ModelConfig, values: Mapping[str, object]) -> None:
    """Set string parameters; a value of None is left out."""
    for name, value in values.items():
        if value is not None:
            config.parameters[name].string_value = str(value)


def string_parameters(config: ModelConfig) -> dict[str, str]:
    """Return the parameters of a model, without the white space around their values."""
    return {name: parameter.string_value.strip() for name, parameter in config.parameters.items()}


def run_on_cpu(config: ModelConfig, count: int = 1) -> None:
    """Have Triton start `count` processes of a python model; which device an engine uses is the engine's matter."""
    config.instance_group.add(count=count, kind=_messages().ModelInstanceGroup.KIND_CPU)


def to_text(config: ModelConfig) -> str:
    """Return the message as config.pbtxt has it."""
    from google.protobuf import text_format

    return text_format.MessageToString(config)


def parse(text: str, path: Path, *, is_template: bool = False) -> ModelConfig:
    """Return the ModelConfig in `text`.

    Parameters
    ----------
    text : what config.pbtxt holds.
    path : path of that file, for messages.
    is_template : accept what Triton itself would refuse: placeholders `${...}` outside quotes are read as 0, and fields
        that this version of tritonclient does not know are skipped. Default: both are errors.

    Raises ConfigError for what is no valid configuration, BackendUnavailableError without the extra `triton`.
    """
    config = _messages().ModelConfig()
    from google.protobuf import text_format

    source = _PLACEHOLDER.sub(_zero_for_placeholder, text) if is_template else text
    try:
        return text_format.Parse(source, config, allow_unknown_field=is_template)
    except text_format.ParseError as error:
        reason = " ".join(str(error).split())
        hint = ": fill the template's ${...} first" if "${" in text else ""
    except RecursionError:
        reason, hint = "it is nested too deeply", ""
    raise ConfigError(f"{path} is no valid Triton model configuration ({reason}){hint}")


def read_config(path: Path, *, is_template: bool = False) -> ModelConfig:
    """Return the ModelConfig in a file, which parse() reads; raises ConfigError also for what is no plain file."""
    if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
        raise ConfigError(
            f"{path} is no plain file of at most {_LARGEST_BYTES} bytes; give a Triton model configuration"
        )
    return parse(read_text(path, ConfigError), path, is_template=is_template)


def _zero_for_placeholder(match: re.Match[str]) -> str:
    # 0 is valid text for numbers, booleans and enumerations alike.
    return "0" if match["placeholder"] else match[0]


def _messages() -> ModuleType:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise BackendUnavailableError(
            f"Triton's configuration files need the package tritonclient ({error}): pip install 'chunkkv-trt[triton]'"
        ) from None
    return model_config_pb2
