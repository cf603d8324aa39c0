"""NVIDIA's bindings of each TensorRT that a supported TensorRT-LLM is made for take our plugin fields as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tensorrt_llm_source import package
from tensorrt_llm_source.conftest import BINDINGS

VERSIONS = ("10.7.0", "10.11.0.33", "10.14.1.48")  # of TensorRT-LLM 0.16, 1.0 and 1.2.1
PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:]
import numpy as np
import tensorrt_bindings as trt
from chunkkv_builder.backends.tensorrt_llm.library import _field_data
values = {"window": 16, "role": "follower", "layers": np.array([3, 5, 7]), "score": "softmax"}
data = {name: _field_data(value) for name, value in values.items()}
kinds = {bytes: trt.PluginFieldType.CHAR, np.ndarray: trt.PluginFieldType.INT32}
fields = trt.PluginFieldCollection([trt.PluginField(name, each, kinds[type(each)]) for name, each in data.items()])
read = {field.name: [field.type.name, field.size, field.data.copy().tolist()] for field in fields}
print(json.dumps({"version": trt.__version__, "fields": read, "phase": trt.TensorRTPhase.BUILD.name}))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_fields_reach_tensorrt_as_they_are_given(version: str, tmp_path: Path) -> None:
    folder = next(iter(BINDINGS.glob(f"{version}*")), None)
    if folder is None or shutil.which("cc") is None:
        pytest.skip(f"no bindings of TensorRT {version}, or no C compiler: make test-tensorrt-llm fetches them")
    place = package.bindings_on_empty_libraries(folder, tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(place), *sys.path]
    read = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert read["version"].startswith(version) and read["phase"] == "BUILD"
    assert {name: field[:2] for name, field in read["fields"].items()} == {
        **{"window": ["INT32", 1], "role": ["CHAR", 8], "layers": ["INT32", 3], "score": ["CHAR", 7]},
    }
    # TensorRT-LLM keeps what it reads as a list; NVIDIA's getter gives as many numbers as there are.
    assert [len(field[2]) for field in read["fields"].values()] == [1, 8, 3, 7]
