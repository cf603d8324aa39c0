"""Which TensorRT is used, what it can do, and what the manifest says of it: on packages made of names alone."""

from __future__ import annotations

import enum
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.cuda_double import CudartDouble
from support.messages import naming

from chunkkv.command_line import UsageError
from chunkkv.engine.fields import Fields
from chunkkv.engine.tensorrt_build import FUNCTIONS, PLUGIN, RTX, STANDARD, TensorRTBuild
from chunkkv.errors import BackendUnavailableError, EngineError, EngineMismatchError
from chunkkv.gpu import tensorrt_plugins
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.gpu.plugin_architectures import ARCHITECTURES_FILE
from chunkkv.gpu.tensorrt_library import capability_member, find_tensorrt, installed, missing, tensorrt_of_engine
from chunkkv_builder.backends.tensorrt.target import Options, Target
from chunkkv_builder.checkpoint.model_config import ModelConfig

PACKAGES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
NEEDED = ("IKVCacheUpdateLayer", "IRotaryEmbeddingLayer", "IAttention", "OnnxParser", "IProgressMonitor")
LIBRARIES = ("libchunkkv_tensorrt.so.11", "libchunkkv_tensorrt_rtx.so.1", "rtx/libtensorrt_rtx.so")
MODEL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        **{"vocab_size": 8, "hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    },
)


def package(name: str, version: str) -> types.ModuleType:
    """Return a TensorRT of names alone; that of RTX takes compute capabilities."""
    module = types.ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]  # a module that is made here
    vars(module).update(dict.fromkeys(NEEDED))
    config = {"set_compute_capability": None} if name != "tensorrt" else {}
    module.IBuilderConfig = type("IBuilderConfig", (), config)  # type: ignore[attr-defined]  # the same
    kinds = {"NONE": 0, "CURRENT": 1, "SM120": 120, "SM75": 75, "SM86": 86}
    module.ComputeCapability = enum.IntEnum("ComputeCapability", kinds)  # type: ignore[attr-defined]  # the same
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function after which exactly the given packages are installed; no GPU, and all plugin libraries."""
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", (tmp_path,))
    monkeypatch.delenv("CHUNKKV_LIB", raising=False)
    (tmp_path / "rtx").mkdir()
    for library in LIBRARIES:
        (tmp_path / library).touch()
    cuda = CudartDouble()
    cuda.devices = 0
    monkeypatch.setattr(CudaRuntime, "load", staticmethod(lambda: CudaRuntime(cuda)))

    def run(*names: str) -> None:
        for name in PACKAGES:
            version = "11.4.0.106" if name == "tensorrt" else "1.7.1.116"
            monkeypatch.setitem(sys.modules, name, package(name, version) if name in names else None)

    return run


@pytest.mark.parametrize(
    ("names", "choice", "title"),
    [
        (("tensorrt", "tensorrt_rtx"), "auto", "TensorRT 11.4.0.106"),
        (("tensorrt", "tensorrt_rtx"), "rtx", "TensorRT for RTX 1.7.1.116"),
        (("tensorrt_rtx",), "auto", "TensorRT for RTX 1.7.1.116"),
        (("tensorrt_rtx_bindings",), "auto", "TensorRT for RTX 1.7.1.116"),  # the wheels without the package over them
        (("tensorrt",), "standard", "TensorRT 11.4.0.106"),
    ],
)
def test_the_standard_tensorrt_comes_first(install, names: tuple[str, ...], choice: str, title: str) -> None:
    install(*names)
    assert find_tensorrt(choice).title == title


@pytest.mark.parametrize(
    ("names", "choice", "words"),
    [
        ((), "auto", "'tensorrt' 'tensorrt_rtx'"),
        (("tensorrt",), "rtx", "'tensorrt_rtx'"),
        (("tensorrt_rtx",), "standard", "'tensorrt'"),
    ],
)
def test_the_packages_that_would_do_are_named(install, names: tuple[str, ...], choice: str, words: str) -> None:
    install(*names)
    with pytest.raises(BackendUnavailableError, match=naming(words)):
        find_tensorrt(choice)
    assert len(missing(choice)) == 1


def test_features_are_read_off_the_package(install) -> None:
    install("tensorrt", "tensorrt_rtx")
    standard, rtx = installed()
    assert (standard.flavour, standard.builds_ahead, standard.compute_capabilities) == (STANDARD, False, ())
    assert (rtx.flavour, rtx.builds_ahead, rtx.compute_capabilities) == (RTX, True, ("8.6", "12.0"))
    assert [capability_member(rtx, each).name for each in rtx.compute_capabilities] == ["SM86", "SM120"]


def test_only_the_standard_tensorrt_needs_a_gpu_to_build(install) -> None:
    install("tensorrt", "tensorrt_rtx")
    assert missing("rtx") == [] and Options("rtx").missing(with_chunkkv=True) == []
    (lack,) = Options().missing(with_chunkkv=True)
    assert "GPU" in lack and lack.endswith("; or give --tensorrt rtx, which builds without a GPU")


@pytest.mark.parametrize("flavour", [STANDARD, RTX])
def test_engines_run_with_the_tensorrt_that_built_them(install, flavour: str) -> None:
    other, version = (RTX, "1.7.1.116") if flavour == STANDARD else (STANDARD, "11.4.0.106")
    here = {STANDARD: "tensorrt", RTX: "tensorrt_rtx"}[flavour]
    install(here)
    with pytest.raises(BackendUnavailableError, match=naming("engine", version, find_tensorrt().version)):
        tensorrt_of_engine("engine", TensorRTBuild(other, version, (), PLUGIN, {}, {}))
    build = TensorRTBuild(flavour, find_tensorrt().version, (), PLUGIN, {}, {})
    assert tensorrt_of_engine("engine", build).flavour == flavour
    with pytest.raises(EngineMismatchError, match=naming("engine 9.1", find_tensorrt().version)):
        tensorrt_of_engine("engine", TensorRTBuild(flavour, "9.1", (), PLUGIN, {}, {}))


@pytest.mark.parametrize("absent", ["libchunkkv_tensorrt_rtx.so.1", "rtx/libtensorrt_rtx.so"])
def test_plugins_are_the_default_where_all_their_files_are_there(install, tmp_path: Path, absent: str) -> None:
    install("tensorrt_rtx")
    assert Target.decide(Options(), MODEL, with_chunkkv=True).chunkkv_ops == PLUGIN
    (tmp_path / absent).unlink()
    target = Target.decide(Options(), MODEL, with_chunkkv=True)
    assert target.chunkkv_ops == FUNCTIONS and absent in target.reason and target.lacking == ()
    (lack,) = Target.decide(Options(chunkkv_ops=PLUGIN), MODEL, with_chunkkv=True).lacking
    assert absent in lack and lack.count("--chunkkv_ops functions") == 1


def test_gpus_that_the_plugins_were_not_built_for_are_told(install, tmp_path: Path) -> None:
    install("tensorrt_rtx")
    (tmp_path / ARCHITECTURES_FILE).write_text("86-real\n")

    def warnings(**options: Any) -> list[str]:
        return Target.decide(Options(**options), MODEL, with_chunkkv=True).warnings()

    (portable,) = warnings()
    (twelve,) = warnings(compute_capabilities=["8.6", "12.0"])
    assert portable == twelve and "86-real" in portable and "capability 12.0;" in portable
    assert warnings(compute_capabilities=["8.6"]) == warnings(chunkkv_ops=FUNCTIONS) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(compute_capabilities=["9.0"]), "--compute_capability 9.0 8.6 12.0"),
        (Options(compute_capabilities=["8.6", "7.5"]), "--compute_capability 7.5 8.0"),
        (Options(timing_cache=Path("file")), "--timing_cache 1.7.1.116"),
        (Options("standard", compute_capabilities=["8.6"]), "--compute_capability 8.6 --tensorrt rtx"),
    ],
)
def test_flags_without_meaning_for_a_tensorrt_are_refused(install, options: Options, words: str) -> None:
    install("tensorrt", "tensorrt_rtx")
    chosen = options if options.tensorrt == STANDARD else Options("rtx", *list(vars(options).values())[1:])
    with pytest.raises(UsageError, match=naming(words)):
        Target.decide(chosen, MODEL, with_chunkkv=True)


BUILDS = [
    TensorRTBuild(RTX, "1.7.1.116", (), PLUGIN, {"prefill.engine": 1.5}, {"prefill.engine": {"PLUGIN_V3": 3}}),
    TensorRTBuild(RTX, "1.7.1.116", ("8.6", "12.0"), FUNCTIONS, {}, {}),
    TensorRTBuild(STANDARD, "11.4.0.106", (), "none", {}, {}),
]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: f"{build.flavour} {build.chunkkv_ops}")
def test_the_manifests_record_is_read_as_it_was_written(build: TensorRTBuild) -> None:
    assert TensorRTBuild.from_fields(Fields(build.to_dict(), "manifest.json", EngineError)) == build


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flavour": "gtx"}, "'flavour' 'gtx' 'standard' 'rtx'"),
        ({"version": 1}, "'version' 1"),
        ({"chunkkv_ops": "kernel"}, "'chunkkv_ops' 'kernel' 'plugin' 'functions' 'none'"),
        ({"compute_capabilities": []}, "'compute_capabilities' []"),
        ({"compute_capabilities": ["sm89"]}, "'compute_capabilities' ['sm89'] ['8.9']"),
        ({"compute_capabilities": "this machine's GPU"}, "'compute_capabilities' 'portable'"),
        ({"flavour": "standard"}, "'compute_capabilities' 'portable'"),
        ({"seconds": {"prefill.engine": "long"}}, "'prefill.engine' 'long'"),
        ({"seconds": 1}, "'seconds' 1"),
        ({"layers": {"prefill.engine": {"CAST": -1}}}, "'CAST' -1"),
        ({"tactics": 1}, "'tactics'"),
    ],
)
def test_a_record_with_a_wrong_entry_is_refused(change: dict, words: str) -> None:
    fields = Fields({**BUILDS[0].to_dict(), **change}, "manifest.json", EngineError)
    with pytest.raises(EngineError, match=naming("manifest.json", words)):
        TensorRTBuild.from_fields(fields)
