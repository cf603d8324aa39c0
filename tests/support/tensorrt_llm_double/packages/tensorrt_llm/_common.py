"""The network that layers are added to."""

from __future__ import annotations

from typing import Any

_NETWORK: list[Any] = []


def default_net() -> Any:
    assert _NETWORK, "no network is being built: use net_guard"
    return _NETWORK[-1]


def default_trtnet() -> Any:
    return default_net().trt_network


def set_network(network: Any) -> None:
    _NETWORK.append(network)
