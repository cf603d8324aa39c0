"""The plugin configuration: fixed names, values by the flags of trtllm-build."""

from __future__ import annotations

import argparse
from typing import Any

_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32")
_DTYPE_FLAGS = {"gpt_attention_plugin": "auto", "gemm_plugin": None, "nccl_plugin": "auto", "lora_plugin": None}
_DTYPE_FLAGS |= {"moe_plugin": "auto", "bert_attention_plugin": "auto"}
_SWITCHES = {"context_fmha": True, "remove_input_padding": True, "multiple_profiles": False, "reduce_fusion": False}
_SWITCHES |= {"user_buffer": False, "norm_quant_fusion": False, "bert_context_fmha_fp32_acc": False}
_SWITCHES |= {"use_paged_context_fmha": True, "use_fp8_context_fmha": True, "fuse_fp4_quant": False}
_PLAIN = {"dtype": "float16", "paged_kv_cache": None, "tokens_per_block": 32}


class PluginConfig:
    """As pydantic's models, it takes no attribute that it does not know."""

    def __init__(self, **values: Any) -> None:
        known = {**_DTYPE_FLAGS, **_SWITCHES, **_PLAIN}
        object.__setattr__(self, "_values", known)
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        values = object.__getattribute__(self, "__dict__").get("_values", {})
        if name not in values:
            raise AttributeError(f"'PluginConfig' object has no attribute '{name}'")
        return values["dtype"] if values[name] == "auto" else values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._values:
            raise ValueError(f"'PluginConfig' object has no field '{name}'")
        self._values[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self._values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PluginConfig:
        return cls(**values)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> PluginConfig:
        config, given = cls(), vars(args)
        for name in (*_DTYPE_FLAGS, *_SWITCHES, "tokens_per_block"):
            value = given.get(name)
            if value is not None:
                setattr(
                    config, name, {"enable": True, "disable": False}.get(value, value) if name in _SWITCHES else value
                )
                if name in _DTYPE_FLAGS and value == "disable":
                    setattr(config, name, None)
        return config


def add_plugin_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("Plugin config")
    for name, default in _DTYPE_FLAGS.items():
        group.add_argument(f"--{name}", choices=[*_DTYPES, "disable"], default=default)
    for name, default in _SWITCHES.items():
        group.add_argument(f"--{name}", choices=["enable", "disable"], default="enable" if default else "disable")
    group.add_argument("--tokens_per_block", type=int, default=_PLAIN["tokens_per_block"])
    return parser
