"""Small things of tensorrt_llm._utils."""

from __future__ import annotations

import tensorrt as trt


def mpi_world_size() -> int:
    return 1


def str_dtype_to_trt(dtype: str) -> trt.DataType:
    return trt.DataType(dtype)


def trt_dtype_to_str(dtype: trt.DataType) -> str:
    return dtype.value
