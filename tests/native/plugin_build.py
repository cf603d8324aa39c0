"""Builds the TensorRT plugin library, the loader and the plugin host, cached by content like the kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from native.build import BUILD, COMMON, FLAVOURS, ROOT, _make, compiler
from native.tensorrt_headers import Headers

PLUGINS = ROOT / "plugins" / "tensorrt"
HOST = ROOT / "tests" / "native" / "plugin_host"
_PLUGIN_SOURCES = sorted(set(PLUGINS.glob("*.cc")) - {PLUGINS / "loader.cc"})
_HOST_SOURCES = [HOST / f"{name}.cc" for name in ("c_api", "host", "fuzz")]


def plugin_library(kernels: Path, headers: Headers, flavour: str = "plain", *, rtx: bool = False) -> Path:
    """Return libchunkkv_tensorrt.so.<major>, built with `headers` and linked to the libchunkkv at `kernels`.

    With `rtx` it is libchunkkv_tensorrt_rtx.so.1, of headers with the layouts of TensorRT 11.
    """
    exports = PLUGINS / "exports.map"
    flags = [f"-I{ROOT / 'plugins' / 'include'}", *headers.flags, f"-Wl,--version-script={exports}"]
    link = ["-Wl,-z,defs" if flavour == "plain" else "", str(kernels), f"-Wl,-rpath,{kernels.parent}", "-ldl"]
    name = "libchunkkv_tensorrt_rtx.so.1" if rtx else f"libchunkkv_tensorrt.so.{headers.major}"
    return _shared(name, _PLUGIN_SOURCES, [*flags, f"-DCHUNKKV_TENSORRT_RTX={rtx:d}"], link, flavour, [exports])


def host_library(headers: Headers, flavour: str = "plain") -> Path:
    """Return the plugin host, built with `headers`."""
    return _shared("libplugin_host.so", _HOST_SOURCES, list(headers.flags), ["-ldl", "-lpthread"], flavour)


def registry_probe(headers: Headers) -> Path:
    """Return the library that looks into the registry of a real TensorRT, built with `headers`."""
    return _shared("libregistry_probe.so", [HOST / "registry_probe.cc"], list(headers.flags), ["-ldl"], "plain")


def loader_library() -> Path:
    """Return libchunkkv_tensorrt_loader.so."""
    flags = [f"-Wl,--version-script={PLUGINS / 'exports.map'}", "-Wl,-z,defs"]
    return _shared("libchunkkv_tensorrt_loader.so", [PLUGINS / "loader.cc"], flags, ["-ldl"], "plain")


def stub_tensorrt(headers: Headers, name: str) -> Path:
    """Return a library `name`, such as libnvinfer.so.11, that holds a plugin registry and nothing else."""
    return _shared(name, [HOST / "nvinfer_stub.cc"], list(headers.flags), [f"-Wl,-soname,{name}"], "plain")


def _shared(
    name: str, sources: Sequence[Path], flags: list[str], link: list[str], flavour: str, extra: Sequence[Path] = ()
) -> Path:
    headers = [path for folder in (PLUGINS, HOST, ROOT / "plugins" / "include") for path in folder.rglob("*.h")]
    digest = hashlib.sha256(repr((compiler(), name, flags, link, flavour)).encode())
    for path in sorted([*sources, *headers, *extra]):
        digest.update(path.name.encode() + path.read_bytes())
    target = BUILD / flavour / digest.hexdigest()[:20] / name
    options = [*COMMON, "-Wpedantic", *FLAVOURS[flavour], "-shared", *flags]
    return _make(target, [compiler(), *options, *map(str, sources), *filter(None, link)])
