"""The plugin configuration: fixed names, values by the flags of trtllm-build."""

from __future__ import annotations

import argparse
from typing import Any

_DTYPES = {"gpt_attention_plugin": "auto", "gemm_plugin": None, "nccl_plugin": "auto"}
_SWITCHES = {"context_fmha": True, "remove_input_padding": True, "multiple_profiles": False, "fuse_fp4_quant": False}
_SWITCHES |= {"use_paged_context_fmha": True, "use_fp8_context_fmha": True}


class PluginConfig:
    """As pydantic's models, it takes no attribute that it does not know."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(**_DTYPES, **_SWITCHES, paged_kv_cache=None, tokens_per_block=32)
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self):
            raise ValueError(f"'PluginConfig' object has no field '{name}'")
        vars(self)[name] = value

    def decide(self, dtype: str) -> None:
        """Give "auto" a type."""
        vars(self).update({name: dtype for name in _DTYPES if vars(self)[name] == "auto"})

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> PluginConfig:
        words = {"enable": True, "disable": False}
        values = {name: None if getattr(args, name) == "disable" else getattr(args, name) for name in _DTYPES}
        values |= {name: words[getattr(args, name)] for name in _SWITCHES}
        return cls(**values, tokens_per_block=args.tokens_per_block)


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    for name, default in _DTYPES.items():
        parser.add_argument(f"--{name}", choices=["auto", "float16", "float32", "bfloat16", "disable"], default=default)
    for name, on in _SWITCHES.items():
        parser.add_argument(f"--{name}", choices=["enable", "disable"], default="enable" if on else "disable")
    parser.add_argument("--tokens_per_block", type=int, default=32)
