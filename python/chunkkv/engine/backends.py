"""The backends by name, and what holds for every engine of one, whatever model it was built from: one row for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chunkkv.errors import ConfigError
from chunkkv.settings import ChunkKVSettings

ONNXRUNTIME, TENSORRT, TENSORRT_LLM = BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_llm")
DEFAULT_BACKEND = ONNXRUNTIME  # what --backend auto means: it builds and runs on any machine
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class BackendTraits:
    """What holds for every engine of one backend. Nothing has a default, so a new backend says everything.

    Parameters
    ----------
    dtypes : tuple of str
        Number types of weights and KV cache that it can be built in, some of DTYPES.
    default_dtype : str
        The one that `--dtype auto` means.
    kv_cache_dtypes : tuple of str
        Number types that its KV cache may have beside the one of the engine.
    has_weight_only : bool
        Whether its weights can be stored in int8 or int4.
    runs_kernels : bool
        Whether ChunkKV is always CUDA kernels in it, which compute fewer settings than standard operators do
        (ChunkKVSettings.check_kernels).
    needs_gpu : bool
        Whether it runs on a machine with an NVIDIA GPU only.
    packages : tuple of str
        Python packages that run it. Empty where the manifest names the package.
    is_compiled : bool
        Whether an engine runs only on those versions of the packages that built it.
    budget_is_fixed : bool
        Whether the keep ratio is part of the engine, so that no request may bring its own.
    takes : mapping of str to tuple of str
        The values of ChunkKV's settings that its engines take; they take every value of a setting that is not listed.
    """

    dtypes: tuple[str, ...]
    default_dtype: str
    kv_cache_dtypes: tuple[str, ...]
    has_weight_only: bool
    runs_kernels: bool
    needs_gpu: bool
    packages: tuple[str, ...]
    is_compiled: bool
    budget_is_fixed: bool
    takes: Mapping[str, tuple[str, ...]]

    def check_settings(self, settings: ChunkKVSettings) -> None:
        """Raise ConfigError for settings that no engine of this backend takes."""
        for name, allowed in self.takes.items():
            if (word := getattr(settings, name)) not in allowed:
                raise ConfigError(
                    f"{name} is {word!r}; engines of this backend take {' or '.join(map(repr, allowed))}: "
                    f"give that, or build for backend {ONNXRUNTIME}"
                )
        if self.runs_kernels:
            settings.check_kernels()


TRAITS = {
    ONNXRUNTIME: BackendTraits(
        dtypes=("float32",),
        default_dtype="float32",
        kv_cache_dtypes=("float16", "int8"),
        has_weight_only=True,
        runs_kernels=False,
        needs_gpu=False,
        packages=("onnxruntime",),
        is_compiled=False,
        budget_is_fixed=False,
        takes={},
    ),
    TENSORRT: BackendTraits(
        dtypes=DTYPES,
        default_dtype="bfloat16",  # its fast attention kernels need 16 bits
        kv_cache_dtypes=(),
        has_weight_only=False,
        runs_kernels=False,  # where settings are beyond the kernels, ChunkKV gets in as functions
        needs_gpu=True,
        packages=(),  # tensorrt or tensorrt_rtx
        is_compiled=True,
        budget_is_fixed=False,
        # Lengths that depend on scores have no static cache, and scores from outside no input in one run of prefill.
        takes={"budget_split": ("uniform", "classes"), "score": ("softmax", "logits")},
    ),
    TENSORRT_LLM: BackendTraits(
        dtypes=("float16", "bfloat16"),
        default_dtype="bfloat16",
        kv_cache_dtypes=(),
        has_weight_only=False,  # its own checkpoints have other ways
        runs_kernels=True,
        needs_gpu=True,
        packages=("tensorrt", "tensorrt_llm"),
        is_compiled=True,
        budget_is_fixed=True,
        # One block table serves all layers and heads of a prompt.
        takes={"budget_split": ("uniform",), "heads": ("shared",), "score": ("softmax", "logits")},
    ),
}
