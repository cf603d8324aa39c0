"""The network that layers are added to: TensorRT's, its inputs by name, and the plugin configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorrt as trt

_NETWORKS: list[Network] = []


class Network:
    def __init__(self, plugin_config: Any) -> None:
        self.trt_network = trt.INetworkDefinition()
        self.plugin_config, self._inputs = plugin_config, dict[str, Any]()
        self._plugin_info: dict[int, str] = {}  # plugin names by layer


def default_net() -> Network:
    assert _NETWORKS, "no network is being built: use net_guard"
    return _NETWORKS[-1]


def default_trtnet() -> trt.INetworkDefinition:
    return default_net().trt_network


@contextlib.contextmanager
def net_guard(network: Network) -> Iterator[None]:
    _NETWORKS.append(network)
    try:
        yield
    finally:
        _NETWORKS.pop()
