"""Linear layers, norms, embeddings, MLPs."""

from __future__ import annotations

from typing import Any

from tensorrt_llm import functional as f
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.module import Module, Parameter


class ColumnLinear(Module):
    """Rows of the weight are split over the ranks; gather_output puts the parts together."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: Any, mapping: Mapping, gather: bool = False
    ) -> None:
        self.weight = Parameter((outputs // mapping.tp_size, inputs), dtype)
        self.bias = Parameter((outputs // mapping.tp_size,), dtype) if bias else None
        self._mapping, self._gather = mapping, gather

    def forward(self, x: f.Tensor) -> f.Tensor:
        out = f.matmul(x, self.weight.value, self.bias.value if self.bias else None)
        if self._gather and self._mapping.has_tp():
            out = f.allgather(out, self._mapping.tp_group, gather_dim=1)
        return out


class RowLinear(Module):
    """Columns of the weight are split over the ranks, whose sums are added up."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: Any, mapping: Mapping) -> None:
        self.weight = Parameter((outputs, inputs // mapping.tp_size), dtype)
        self.bias = Parameter((outputs,), dtype) if bias else None
        self._mapping = mapping

    def forward(self, x: f.Tensor) -> f.Tensor:
        out = f.matmul(x, self.weight.value)
        if self._mapping.has_tp():
            out = f.allreduce(out, self._mapping.tp_group)
        return out + self.bias.value if self.bias else out


class Embedding(Module):
    def __init__(self, count: int, size: int, dtype: Any) -> None:
        self.weight = Parameter((count, size), dtype)

    def forward(self, ids: f.Tensor) -> f.Tensor:
        return f.embedding(ids, self.weight.value)


class RmsNorm(Module):
    def __init__(self, size: int, eps: float, dtype: Any) -> None:
        self.weight, self._eps = Parameter((size,), dtype), eps

    def forward(self, x: f.Tensor) -> f.Tensor:
        return f.rms_norm(x, self.weight.value, self._eps)


class LayerNorm(Module):
    def __init__(self, size: int, eps: float, dtype: Any) -> None:
        self.weight, self.bias, self._eps = Parameter((size,), dtype), Parameter((size,), dtype), eps

    def forward(self, x: f.Tensor) -> f.Tensor:
        return f.layer_norm(x, self.weight.value, self.bias.value, self._eps)


class GatedMLP(Module):
    """proj(silu(fc(x)) * gate(x))"""

    def __init__(self, config: Any, dtype: Any, mapping: Mapping) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fc = ColumnLinear(hidden, inner, bias, dtype, mapping)
        self.gate = ColumnLinear(hidden, inner, bias, dtype, mapping)
        self.proj = RowLinear(inner, hidden, bias, dtype, mapping)

    def forward(self, x: f.Tensor) -> f.Tensor:
        return self.proj(f.activation(self.fc(x), "silu") * self.gate(x))


class MLP(Module):
    """proj(gelu(fc(x)))"""

    def __init__(self, config: Any, dtype: Any, mapping: Mapping) -> None:
        self.fc = ColumnLinear(config.hidden_size, config.intermediate_size, True, dtype, mapping)
        self.proj = RowLinear(config.intermediate_size, config.hidden_size, True, dtype, mapping)

    def forward(self, x: f.Tensor) -> f.Tensor:
        return self.proj(f.activation(self.fc(x), "gelu"))
