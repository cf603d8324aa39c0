"""Asks TensorRT for RTX whether it takes an engine file on this GPU, without loading the engine."""

from __future__ import annotations

from pathlib import Path

from chunkkv.gpu.tensorrt_errors import ErrorLog, start
from chunkkv.gpu.tensorrt_library import TensorRT


def why_not_valid(trt: TensorRT, engine: Path) -> str | None:
    """Return None where `engine` runs here, else what stands against it.

    Raises BackendUnavailableError where TensorRT for RTX cannot start.

    Parameters
    ----------
    trt : TensorRT
        A TensorRT for RTX; the standard TensorRT has no such question.
    engine : Path
        The engine file; only its header is read.
    """
    errors = ErrorLog()
    logger = errors.logger(trt.module)
    runtime = start(trt, trt.module.Runtime, logger, errors)
    with engine.open("rb") as file:
        header = file.read(runtime.engine_header_size)
    validity, diagnostics = runtime.get_engine_validity(header)
    if validity != trt.module.EngineValidity.INVALID:
        return None
    # Each diagnostic is one bit of the number.
    bits = trt.module.EngineInvalidityDiagnostics.__members__
    reasons = [name for name, bit in bits.items() if diagnostics & int(bit)]
    return (", ".join(reasons) or "no reason given") + errors.explanation()
