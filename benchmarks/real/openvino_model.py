"""Writes a Llama checkpoint as an OpenVINO model with states, which OpenVINO GenAI turns into paged attention.

Needs openvino and safetensors (the extra "openvino").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
from openvino.op.util import Variable, VariableInfo
from safetensors.numpy import load_file


class _Llama:
    """Builds the graph; sizes come from a config.json of transformers."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = load_file(folder / "model.safetensors")
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.head_dim = self.config["head_dim"]
        self.ids = op.parameter([-1, -1], np.int64, name="input_ids")
        self.mask = op.parameter([-1, -1], np.int64, name="attention_mask")
        self.positions = op.parameter([-1, -1], np.int64, name="position_ids")
        self.beams = op.parameter([-1], np.int32, name="beam_idx")
        self.parameters = [self.ids, self.mask, self.positions, self.beams]
        for parameter in self.parameters:
            parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
        self.sinks: list[Any] = []
        self.batch = op.gather(op.shape_of(self.ids), _integers([0]), _integers(0))

    def linear(self, hidden: Any, name: str) -> Any:
        """Return hidden times a weight [out,in]."""
        return op.matmul(hidden, op.constant(self.weights[f"{name}.weight"]), False, True)

    def norm(self, hidden: Any, name: str) -> Any:
        """Return the RMS norm of hidden."""
        squares = op.reduce_mean(op.power(hidden, _number(2.0)), _integers([-1]), True)
        scale = op.divide(_number(1.0), op.sqrt(op.add(squares, _number(self.config["rms_norm_eps"]))))
        return op.multiply(op.constant(self.weights[f"{name}.weight"]), op.multiply(hidden, scale))

    def rotation(self) -> tuple[Any, Any]:
        """Return cosine and sine [B,1,S,D] of the positions."""
        base = self.config["rope_parameters"]["rope_theta"]
        frequencies = base ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        positions = op.convert(op.unsqueeze(self.positions, _integers([2])), np.float32)
        angles = op.multiply(positions, op.constant(frequencies.astype(np.float32)[None, None]))
        both = op.unsqueeze(op.concat([angles, angles], -1), _integers([1]))
        return op.cos(both), op.sin(both)

    def rotated(self, states: Any, rotation: tuple[Any, Any]) -> Any:
        """Return states [B,H,S,D] rotated."""
        first, second = op.split(states, _integers(-1), 2).outputs()
        turned = op.concat([op.multiply(second, _number(-1.0)), first], -1)
        return op.add(op.multiply(states, rotation[0]), op.multiply(turned, rotation[1]))

    def split_heads(self, hidden: Any, heads: int) -> Any:
        """Return [B,H,S,D] of [B,S,H*D]."""
        shaped = op.reshape(hidden, _integers([0, 0, heads, self.head_dim]), True)
        return op.transpose(shaped, _integers([0, 2, 1, 3]))

    def stored(self, states: Any, name: str) -> Any:
        """Return the state with `states` behind it, one head for each query head."""
        shape = [-1, self.kv_heads, -1, self.head_dim]
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
        variable = Variable(info)
        start = op.broadcast(
            _number(0.0),
            op.concat([self.batch, _integers([self.kv_heads]), _integers([0]), _integers([self.head_dim])], 0),
        )
        past = op.gather(op.read_value(start, variable), self.beams, _integers(0))
        all_states = op.concat([past, states], 2)
        self.sinks.append(op.assign(all_states, variable))
        groups = self.heads // self.kv_heads
        shape_of = op.shape_of(all_states)
        target = op.concat(
            [
                op.gather(shape_of, _integers([0, 1]), _integers(0)),
                _integers([groups]),
                op.gather(shape_of, _integers([2, 3]), _integers(0)),
            ],
            0,
        )
        repeated = op.broadcast(op.unsqueeze(all_states, _integers([2])), target, "BIDIRECTIONAL")
        return op.reshape(repeated, _integers([0, self.heads, -1, self.head_dim]), True)

    def model(self) -> ov.Model:
        """Return the model."""
        hidden = op.gather(op.constant(self.weights["model.embed_tokens.weight"]), self.ids, _integers(0))
        rotation = self.rotation()
        visible = op.convert(op.unsqueeze(self.mask, _integers([1, 2])), np.float32)
        bias = op.multiply(op.subtract(_number(1.0), visible), _number(-1e9))
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed = self.norm(hidden, f"{name}.input_layernorm")
            query, key, value = (
                self.split_heads(self.linear(normed, f"{name}.self_attn.{part}_proj"), heads)
                for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
            )
            query, key = self.rotated(query, rotation), self.rotated(key, rotation)
            attended = op.scaled_dot_product_attention(
                query,
                self.stored(key, f"past_key_values.{layer}.keypresent.{layer}.key"),
                self.stored(value, f"past_key_values.{layer}.valuepresent.{layer}.value"),
                bias,
                _number(self.head_dim**-0.5),
                False,
            )
            joined = op.reshape(
                op.transpose(attended, _integers([0, 2, 1, 3])), _integers([0, 0, self.heads * self.head_dim]), True
            )
            hidden = op.add(hidden, self.linear(joined, f"{name}.self_attn.o_proj"))
            normed = self.norm(hidden, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(normed, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            hidden = op.add(hidden, self.linear(op.multiply(op.swish(gate), up), f"{name}.mlp.down_proj"))
        head = "lm_head" if "lm_head.weight" in self.weights else "model.embed_tokens"
        logits = self.linear(self.norm(hidden, "model.norm"), head)
        result = op.result(logits, name="logits")
        result.output(0).get_tensor().set_names({"logits"})
        return ov.Model([result], self.sinks, self.parameters, "llama")


def _integers(values: Any) -> Any:
    return op.constant(np.array(values, np.int64))


def _number(value: float) -> Any:
    return op.constant(np.array(value, np.float32))


def write_model(folder: Path, output: Path) -> None:
    """Write the checkpoint in `folder` to `output`, unless it is there."""
    if (output / "openvino_model.xml").is_file():
        return
    output.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        (output / name).write_bytes((folder / name).read_bytes())
    ov.save_model(_Llama(folder).model(), output / "openvino_model.xml", compress_to_fp16=False)
