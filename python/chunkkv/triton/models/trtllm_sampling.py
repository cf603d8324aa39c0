"""How TensorRT-LLM reads a request's sampling inputs, in terms of SamplingParams.

Its rules are those of the sources of 0.16 (defaultDecodingParams.h, samplingTopKKernels.h, penaltyKernels.cu) and of
tensorrtllm_backend (utils.cc); later releases have the same defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_TOP_K = 1024  # larger values are cut to it
SEEDS = 1 << 63


def tensorrt_llm_choice(value: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of SamplingParams that say how a token is chosen.

    - Neither `top_k` nor `top_p`: the likeliest token, whatever the temperature. `top_p` of 0 or below is not given.
    - `temperature` is 1 if not given; 0 takes the likeliest token.
    - The penalties count the tokens of prompt and answer. Presence and frequency are taken from logits that are divided
      by the temperature already.
    - `seed` is 0 if not given, so that the same request gets the same answer.

    Parameters
    ----------
    value : reads an input by its name in layout `single`, with a default.
    """
    top_k, top_p, temperature = value("top_k", 0), value("top_p", 0.0), value("temperature", 1.0)
    is_greedy = top_k == 0 and top_p <= 0
    scale = temperature if temperature > 0 else 1.0
    return {
        # A temperature that is out of range stays as it is, for SamplingParams to refuse.
        "temperature": 0.0 if is_greedy and temperature >= 0 else temperature,
        "top_k": min(top_k, MAX_TOP_K),
        "top_p": 1.0 if top_p <= 0 else top_p,
        "repetition_penalty": value("repetition_penalty", 1.0),
        "presence_penalty": value("presence_penalty", 0.0) * scale,
        "frequency_penalty": value("frequency_penalty", 0.0) * scale,
        "penalise_prompt": True,
        "seed": value("seed", value("random_seed", 0)) % SEEDS,
    }
