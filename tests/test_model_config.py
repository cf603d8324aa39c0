"""Model configs: both transformers styles, every refusal, and rotary frequencies against transformers' own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import VARIANTS, variant_config
from support.messages import naming
from support.transformers_golden import load_golden

from chunkkv.errors import ConfigError
from chunkkv_builder.checkpoint.model_config import ModelConfig, rope_frequencies
from chunkkv_builder.config import BuildConfig, longest_context

LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def llama(**changes: Any) -> dict[str, Any]:
    """Return a Llama config; a change to ... removes the key."""
    return {key: value for key, value in variant_config("llama2", **changes).items() if value is not ...}


def config_of(variant: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in variant_config(variant, **changes).items() if value is not ...}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_the_engine_file(variant):
    model = ModelConfig.from_hf(variant_config(variant))
    stored = json.loads(json.dumps(model.to_dict()))
    assert ModelConfig.from_dict(stored) == model
    assert stored["num_key_value_heads"] == model.num_kv_heads
    assert stored["head_size"] == model.head_dim


def test_sizes_and_features_of_each_family():
    llama2 = ModelConfig.from_hf(variant_config("llama2"))
    assert (llama2.family, llama2.vocab_size, llama2.hidden_size, llama2.intermediate_size) == ("llama", 384, 64, 96)
    assert (llama2.num_layers, llama2.num_heads, llama2.num_kv_heads, llama2.head_dim) == (3, 4, 4, 16)
    assert not (llama2.attention_bias or llama2.attention_out_bias or llama2.mlp_bias or llama2.qk_norm)
    assert llama2.rope_theta == 10_000.0  # transformers' default where the config has none
    bias = ModelConfig.from_hf(variant_config("llama_bias"))
    assert bias.attention_bias and bias.attention_out_bias and bias.mlp_bias
    qwen2 = ModelConfig.from_hf(variant_config("qwen2"))
    assert qwen2.attention_bias and not qwen2.attention_out_bias and qwen2.rope_theta == 1e6
    qwen3 = ModelConfig.from_hf(variant_config("qwen3"))
    assert qwen3.qk_norm and qwen3.head_dim == 32 and qwen3.tie_word_embeddings
    assert ModelConfig.from_hf(variant_config("mistral")).num_kv_heads == 2
    phi3 = ModelConfig.from_hf(variant_config("phi3"))
    assert (phi3.rotary_dim, phi3.rotated_dims, phi3.rope_scaling.type) == (12, 12, "longrope")
    granite = ModelConfig.from_hf(variant_config("granite"))
    scales = (granite.embedding_scale, granite.attention_scale, granite.residual_scale, granite.logit_divisor)
    assert scales == (3.0, 0.4, 0.7, 2.5)
    gemma = ModelConfig.from_hf(variant_config("gemma"))
    assert (gemma.activation, gemma.embedding_scale, gemma.post_norms) == ("gelu_pytorch_tanh", 8.0, False)
    gemma2 = ModelConfig.from_hf(variant_config("gemma2"))
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap, gemma2.attention_scale) == (2.0, 4.0, 20**-0.5)
    assert gemma2.post_norms and not gemma2.qk_norm and gemma2.rotations == ()


def test_rotations_of_each_layer():
    assert ModelConfig.from_hf(config_of("smollm3")).rotations == ("global", "none", "global")
    by_interval = ModelConfig.from_hf(config_of("smollm3", no_rope_layers=..., no_rope_layer_interval=3))
    assert by_interval.rotations == ("global", "global", "none")
    assert ModelConfig.from_hf(config_of("smollm3", no_rope_layers=...)).rotations == ()  # every fourth of three
    gemma3 = ModelConfig.from_hf(config_of("gemma3"))
    assert gemma3.rotations == ("local", "global", "local")
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.rope_scaling.factor) == (1e6, 100.0, 8.0)
    newer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    changes = {"rope_scaling": ..., "rope_theta": ..., "rope_local_base_freq": ..., "rope_parameters": newer}
    assert ModelConfig.from_hf(config_of("gemma3", **changes)) == gemma3
    bare = ModelConfig.from_hf(config_of("gemma3", **{**changes, "rope_parameters": ...}))
    assert (bare.rope_theta, bare.local_rope_theta, bare.rope_scaling) == (1e6, 1e4, None)


def test_old_and_new_style_mean_the_same():
    old = llama(rope_theta=500000.0, rope_scaling=LLAMA31_ROPE, max_position_embeddings=131072)
    new = llama(rope_parameters={**LLAMA31_ROPE, "rope_theta": 500000.0}, max_position_embeddings=131072)
    new["dtype"] = new.pop("torch_dtype")
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    older = llama(rope_theta=500000.0, rope_scaling={**LLAMA31_ROPE, "type": "llama3", "rope_type": None})
    assert ModelConfig.from_hf(older).rope_scaling == ModelConfig.from_hf(old).rope_scaling


def test_longrope_limits_the_sequences_to_those_of_its_short_factors():
    model = ModelConfig.from_hf(config_of("phi3"))
    assert longest_context(model) == 4096
    with pytest.raises(ConfigError, match=naming("max_seq_len 4097 4096 longrope cache")):
        BuildConfig.for_model(model, max_seq_len=4097)
    for changes in ({"rope_scaling": {**config_of("phi3")["rope_scaling"], "type": "su"}},):
        assert ModelConfig.from_hf(config_of("phi3", **changes)) == model
    given = {**config_of("phi3")["rope_scaling"], "factor": 4.0}
    assert rope_frequencies(ModelConfig.from_hf(config_of("phi3", rope_scaling=given)))[1] == pytest.approx(
        np.sqrt(1 + np.log(4) / np.log(4096))
    )
    given = {**given, "attention_factor": 1.7}
    assert rope_frequencies(ModelConfig.from_hf(config_of("phi3", rope_scaling=given)))[1] == 1.7


def test_defaults_that_depend_on_the_family():
    for variant, tied in (("llama2", False), ("granite", False), ("smollm3", True), ("gemma2", True)):
        assert ModelConfig.from_hf(config_of(variant, tie_word_embeddings=...)).tie_word_embeddings is tied
    caps = {"attn_logit_softcapping": ..., "final_logit_softcapping": ...}
    gemma2 = ModelConfig.from_hf(config_of("gemma2", **caps, query_pre_attn_scalar=..., head_dim=...))
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap) == (50.0, 30.0)
    assert (gemma2.attention_scale, gemma2.head_dim) == (1 / 16, 256)
    gemma2 = ModelConfig.from_hf(config_of("gemma2", **dict.fromkeys(caps)))
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap) == (None, None)
    gemma3 = ModelConfig.from_hf(config_of("gemma3"))
    assert (gemma3.attention_soft_cap, gemma3.logit_soft_cap) == (None, None)
    assert ModelConfig.from_hf(llama(num_key_value_heads=...)).num_kv_heads == 4
    assert ModelConfig.from_hf(config_of("qwen3", head_dim=...)).head_dim == 128
    no_ids = {"bos_token_id": ..., "eos_token_id": ...}
    model = ModelConfig.from_hf(llama(**no_ids))
    assert (model.bos_token_id, model.eos_token_ids) == (1, (2,))
    model = ModelConfig.from_hf(config_of("qwen2", **no_ids))
    assert (model.bos_token_id, model.eos_token_ids) == (None, ())
    model = ModelConfig.from_hf(llama(bos_token_id=None, eos_token_id=None))
    assert (model.bos_token_id, model.eos_token_ids) == (None, ())


def test_end_tokens_of_the_generation_config_come_first():
    model = ModelConfig.from_hf(llama(eos_token_id=2), {"eos_token_id": [7, 9], "bos_token_id": 5})
    assert (model.bos_token_id, model.eos_token_ids) == (5, (7, 9))
    assert ModelConfig.from_hf(llama(eos_token_id=2), {"eos_token_id": None}).eos_token_ids == (2,)


REFUSED = [
    (llama(architectures=["GPTNeoXForCausalLM"]), ["GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
    (llama(architectures=["LlamaForSequenceClassification"]), ["LlamaForSequenceClassification", "supported"]),
    (llama(architectures=...), ["architectures", "missing", "MistralForCausalLM"]),
    (llama(architectures=[]), ["architectures", "LlamaForCausalLM"]),
    (llama(architectures=[["x"]]), ["not supported"]),
    (llama(model_type="gemma"), ["model_type", "'gemma'", "'llama'"]),
    (config_of("mistral", sliding_window=0), ["sliding_window", "0"]),
    (config_of("qwen2", use_sliding_window="yes"), ["use_sliding_window", "'yes'"]),
    (config_of("qwen3", layer_types=["full_attention", "chunked_attention"]), ["layer_types", "full_attention"]),
    (llama(rope_scaling={"type": "dynamic", "factor": 2.0}), ["'dynamic'", "'linear'", "'yarn'"]),
    (llama(rope_scaling={"rope_type": "longrope", "factor": 2.0}), ["original_max_position_embeddings", "missing"]),
    (config_of("phi3", rope_scaling={"type": "su"}), ["short_factor", "missing"]),
    (config_of("phi3", rope_scaling={"type": "su", "short_factor": [1.0] * 8}), ["short_factor", "6 numbers"]),
    (config_of("phi3", partial_rotary_factor=0.7), ["partial_rotary_factor", "rotates 11", "even"]),
    (config_of("phi3", partial_rotary_factor=1.5), ["partial_rotary_factor", "rotates 24"]),
    (config_of("phi3", sliding_window="wide"), ["sliding_window", "'wide'"]),
    (config_of("gemma", hidden_act="gelu"), ["hidden_act", "'gelu'", "'gelu_pytorch_tanh'"]),
    (config_of("gemma", hidden_activation="gelu"), ["hidden_activation", "'gelu'", "'gelu_pytorch_tanh'"]),
    (config_of("gemma2", use_bidirectional_attention=True), ["use_bidirectional_attention", "True", "only false"]),
    (config_of("gemma2", query_pre_attn_scalar=0), ["query_pre_attn_scalar", "0"]),
    (config_of("gemma2", attn_logit_softcapping=-1.0), ["attn_logit_softcapping", "-1.0"]),
    (config_of("gemma2", layer_types=["full_attention"]), ["layer_types", "3 entries"]),
    (config_of("gemma3", attn_logit_softcapping=50.0), ["attn_logit_softcapping", "50.0", "only null"]),
    (config_of("gemma3", rope_local_base_freq=0.5), ["rope_local_base_freq", "0.5"]),
    (config_of("gemma3", sliding_window_pattern=0), ["sliding_window_pattern", "0"]),
    (
        config_of("gemma3", rope_scaling=None, rope_parameters={"sliding_attention": {"rope_type": "linear"}}),
        ["sliding_attention", "rope_type", "'linear'", "'default'"],
    ),
    (config_of("gemma3", model_type="gemma3"), ["model_type", "'gemma3'", "'gemma3_text'"]),
    (config_of("granite", logits_scaling=0.0), ["logits_scaling", "0.0"]),
    (config_of("smollm3", no_rope_layers=[1, 0]), ["no_rope_layers", "3 layers"]),
    (config_of("smollm3", no_rope_layers=[1, 0, 2]), ["no_rope_layers", "0 to 1"]),
    (llama(rope_scaling={"factor": 2.0}), ["type", "missing"]),
    (llama(rope_scaling={"type": "linear"}), ["rope_scaling", "factor", "missing"]),
    (llama(rope_scaling={"type": "linear", "factor": -2.0}), ["factor", "-2.0"]),
    (llama(rope_scaling="linear"), ["rope_scaling", "object"]),
    (llama(rope_scaling={**LLAMA31_ROPE, "high_freq_factor": 0.5}), ["high_freq_factor", "above low_freq_factor"]),
    (llama(rope_parameters={"full_attention": {"rope_type": "default"}}), ["full_attention", "one set"]),
    (llama(rope_theta=0.5), ["rope_theta", "0.5"]),
    (llama(partial_rotary_factor=0.5), ["partial_rotary_factor", "1.0"]),
    (llama(rope_parameters={"partial_rotary_factor": 0.25}), ["partial_rotary_factor", "0.25"]),
    (llama(hidden_act="gelu"), ["hidden_act", "'gelu'", "'silu'"]),
    (llama(num_key_value_heads=3), ["4", "3", "multiple"]),
    (config_of("mistral", num_key_value_heads=...), ["num_key_value_heads", "missing"]),
    (llama(head_dim=15), ["head_dim", "15", "even"]),
    (llama(num_attention_heads=6, num_key_value_heads=6), ["head_dim", "64", "6"]),
    (llama(quantization_config={"quant_method": "gptq"}), ["quantization_config", "gptq", "original"]),
    (llama(pretraining_tp=2), ["pretraining_tp", "2"]),
    (llama(torch_dtype="float64"), ["torch_dtype", "float64", "bfloat16"]),
    (llama(tie_word_embeddings="yes"), ["tie_word_embeddings", "true or false"]),
    (llama(hidden_size=...), ["hidden_size", "missing"]),
    (llama(hidden_size="64"), ["hidden_size", "'64'", "whole number"]),
    (llama(hidden_size=64.0), ["hidden_size", "64.0"]),
    (llama(vocab_size=0), ["vocab_size", "0"]),
    (llama(num_hidden_layers=True), ["num_hidden_layers", "True"]),
    (llama(num_hidden_layers=10**9), ["num_hidden_layers", "4096"]),
    (llama(rms_norm_eps=float("nan")), ["rms_norm_eps", "nan", "finite"]),
    (llama(rms_norm_eps=10**400), ["rms_norm_eps", "finite"]),
    (llama(rms_norm_eps=1e39), ["rms_norm_eps", "1e+39", "at most 1e+12"]),
    (llama(rope_theta=1e308), ["rope_theta", "1e+308", "at most 1e+12"]),
    (llama(rope_scaling={"type": "linear", "factor": 1e-300}), ["factor", "1e-300", "at least 1e-12"]),
    (llama(rope_scaling={"type": "yarn", "beta_slow": 1e-308}), ["beta_slow", "1e-308", "at least 1e-12"]),
    (llama(eos_token_id="</s>"), ["eos_token_id", "</s>"]),
    (llama(eos_token_id=[2, -1]), ["eos_token_id", "-1"]),
    ([], ["object"]),
]


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=[" ".join(words) for _, words in REFUSED])
def test_refusals_name_what_and_what_is_allowed(config, words):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(config)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ModelConfig.from_hf(variant_config("llama_yarn")).to_dict())
def test_a_missing_or_wrong_engine_entry_is_named(key):
    stored = ModelConfig.from_hf(variant_config("llama_yarn")).to_dict()
    optional = {"bos_token_id", "rotary_scaling", "position_embedding_type"}
    if key not in optional:
        with pytest.raises(ConfigError, match=key):
            ModelConfig.from_dict({name: value for name, value in stored.items() if name != key})
    if key != "position_embedding_type":
        with pytest.raises(ConfigError):
            ModelConfig.from_dict({**stored, key: [{}]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_are_those_of_transformers(variant):
    golden = load_golden()
    model = ModelConfig.from_hf(variant_config(variant))
    for rotation in sorted({*model.rotations, "global"} - {"none"}):
        inverse, factor = rope_frequencies(model, rotation)
        recorded = {
            name: golden[f"{variant}/{name}{'_local' if rotation == 'local' else ''}"]
            for name in ("inverse_frequencies", "attention_factor", "cos", "sin")
        }
        np.testing.assert_array_max_ulp(inverse.astype(np.float32), recorded["inverse_frequencies"], maxulp=2)
        assert factor == pytest.approx(float(recorded["attention_factor"]), rel=1e-12)
        angles = golden["positions"].astype(np.float32)[:, None] * inverse.astype(np.float32)
        rounding = 1e-6 + 2 * angles * np.finfo(np.float32).eps  # torch's own powers differ that much between CPUs
        for wave, name in ((np.cos, "cos"), (np.sin, "sin")):
            assert np.all(np.abs(wave(angles) * np.float32(factor) - recorded[name]) <= rounding * factor)
        assert inverse.dtype == np.float64 and np.array_equal(inverse, inverse.astype(np.float32))


def test_yarn_options_change_what_they_should():
    def yarn(**options: Any) -> tuple[np.ndarray, float]:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **options}
        return rope_frequencies(ModelConfig.from_hf(llama(rope_scaling=scaling)))

    plain, factor = yarn()
    assert factor == pytest.approx(0.1 * np.log(4.0) + 1)
    assert yarn(attention_factor=1.5)[1] == 1.5
    assert yarn(mscale=0.7, mscale_all_dim=1.1)[1] == pytest.approx((0.07 * np.log(4) + 1) / (0.11 * np.log(4) + 1))
    assert not np.array_equal(yarn(truncate=False)[0], plain)
    assert not np.array_equal(yarn(truncate=False, beta_fast=8.0)[0], yarn(truncate=False)[0])
    assert not np.array_equal(yarn(truncate=False, beta_slow=0.5)[0], yarn(truncate=False)[0])
    assert np.array_equal(yarn(factor=None)[0], plain)  # 512 positions over 128


def test_yarn_and_llama3_take_the_context_length_where_none_is_given():
    for kind in ({"rope_type": "yarn", "factor": 2.0}, {**LLAMA31_ROPE, "original_max_position_embeddings": None}):
        scaling = ModelConfig.from_hf(llama(rope_scaling=kind)).rope_scaling
        assert scaling is not None and scaling.original_max_position_embeddings == 512
    scaling = ModelConfig.from_hf(llama(rope_scaling=LLAMA31_ROPE, original_max_position_embeddings=99)).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 99


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.data())
def test_any_value_of_any_key_is_accepted_or_refused_as_config_error(variant, data):
    config = variant_config(variant)
    key = data.draw(st.sampled_from([*config, "rope_scaling", "rope_parameters", "quantization_config", "layer_types"]))
    try:
        model = ModelConfig.from_hf({**config, key: data.draw(JSON)})
        json.dumps(model.to_dict(), allow_nan=False)
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (config_of("mistral", sliding_window=None), None),
        (config_of("mistral", sliding_window=300), 300),
        (config_of("mistral", sliding_window=...), 4096),
        (config_of("qwen2", sliding_window=256), None),
        (config_of("qwen2", sliding_window=256, use_sliding_window=True), None),  # 28 full layers come first
        (config_of("qwen2", sliding_window=256, use_sliding_window=True, max_window_layers=3), None),
        (config_of("qwen2", sliding_window=256, use_sliding_window=True, max_window_layers=2), 256),
        (config_of("qwen2", sliding_window=None, use_sliding_window=True, max_window_layers=0), None),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0), 4096),
        (config_of("qwen3", use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 2), None),
        (config_of("qwen3", sliding_window=9, layer_types=["full_attention", "sliding_attention"]), 9),
        (config_of("qwen3", sliding_window=9, layer_types=["full_attention"] * 2), None),
        (config_of("llama3", sliding_window=9), None),
        (config_of("phi3", rope_scaling=None, max_position_embeddings=512, sliding_window=300), 300),
        (config_of("smollm3", use_sliding_window=True, sliding_window=100), 100),
        (config_of("smollm3", use_sliding_window=False, sliding_window=100), None),
        (config_of("gemma", sliding_window=100), None),
        (config_of("gemma2", sliding_window=100), 100),
        (config_of("gemma2", sliding_window=None), None),
        (config_of("gemma2", sliding_window=...), 4096),
        (config_of("gemma2", sliding_window=100, layer_types=["full_attention"] * 3), None),
        (config_of("gemma3", sliding_window=100), 100),
        (config_of("gemma3", sliding_window=100, sliding_window_pattern=1), None),
    ],
)
def test_a_sliding_window_limits_the_sequences(config, window: int | None) -> None:
    model = ModelConfig.from_hf(config)
    assert model.sliding_window == window
    longest = min(window or 512, 512, model.max_position_embeddings)
    assert longest_context(model) == longest
    assert ModelConfig.from_dict(model.to_dict()) == model
    assert BuildConfig.for_model(model, max_seq_len=longest).max_seq_len == longest
    with pytest.raises(ConfigError, match=naming(f"max_seq_len {longest + 1} {longest}")):
        BuildConfig.for_model(model, max_seq_len=longest + 1)
