"""The bodies of /v1/completions and /v1/chat/completions, as what the session understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chunkkv.contexts.scorers import SCORERS
from chunkkv.requests import Message, Prompt
from chunkkv.sampling import SamplingParams
from chunkkv.serve.errors import ApiError
from chunkkv.serve.fields import BodyFields

MOST_ANSWERS = 64  # of one request
_MOST_TOP_LOGPROBS = 20
_LARGEST_SEED = 2**63
# Fields that say who asks, or what another server should do: nothing of the answer depends on them.
_IGNORED = ("metadata", "prompt_cache_key", "request_id", "safety_identifier", "service_tier", "store", "user")
# Fields that benchmark clients and SDKs send at the value that means "off".
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (0, 1),
    "priority": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "use_beam_search": (False,),
}
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_NEUTRAL_COMPLETIONS: dict[str, tuple[Any, ...]] = {"suffix": ("",), "response_format": ({"type": "text"},)}


@dataclass(frozen=True)
class Ask:
    """What one request asks for.

    Parameters
    ----------
    prompts : list of prompts
        Texts, token ids or messages.
    is_chat : bool
        Whether it came to /v1/chat/completions.
    n : int
        Answers for each prompt.
    max_tokens : int or None
        Longest answer; None for the server's default.
    sampling : mapping
        Other arguments of SamplingParams.
    keep_ratio, budget_tokens : optional
        As for ChunkKVSession.generate.
    scorer : str or None
        What chooses the tokens that stay.
    context : str or None
        Id of a held context that stands before the prompts.
    add_special_tokens : bool
        Whether text gets the begin token.
    cache_prompt : bool
        Whether the request may go on from what is held, and is held itself.
    stream, include_usage, continuous_usage : bool
        Send events; a last one with the usage; the usage in each.
    echo : bool
        Put the prompt's text before the answer.
    """

    prompts: list[Prompt]
    is_chat: bool
    n: int
    max_tokens: int | None
    sampling: Mapping[str, Any]
    keep_ratio: float | None
    budget_tokens: int | None
    scorer: str | None
    context: str | None
    add_special_tokens: bool
    cache_prompt: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool = False

    @property
    def prompt_field(self) -> str:
        """The field of the body that holds the prompt."""
        return "messages" if self.is_chat else "prompt"

    def params(self, max_new_tokens: int, number: int) -> SamplingParams:
        """Return how the answer of that number is chosen: a seed is counted up, so that answers differ."""
        seed = self.sampling.get("seed")
        own = {"seed": None if seed is None else (seed + number) % _LARGEST_SEED}
        return SamplingParams(max_new_tokens=max_new_tokens, **{**self.sampling, **own})


def chat_ask(values: Mapping[str, Any], model: str) -> Ask:
    """Return what a body of /v1/chat/completions asks for; raises ApiError that names a field."""
    body = BodyFields(values)
    messages = chat_messages(body)
    limit = "max_completion_tokens" if body.has("max_completion_tokens") else "max_tokens"
    max_tokens = body.whole(limit, low=1)
    body.ignore(("max_tokens", "max_completion_tokens"))
    logprobs = body.flag("logprobs")
    top = body.whole("top_logprobs", 0, high=_MOST_TOP_LOGPROBS) or 0
    if top and not logprobs:
        raise body.error("top_logprobs", "give logprobs true as well")
    body.neutral(_NEUTRAL_CHAT)
    return _ask(body, model, [messages], True, max_tokens, {"logprobs": logprobs, "top_logprobs": top}, False)


def completion_ask(values: Mapping[str, Any], model: str) -> Ask:
    """Return what a body of /v1/completions asks for; raises ApiError that names a field."""
    body = BodyFields(values)
    prompts = _prompts(body)
    max_tokens = body.whole("max_tokens", 16, low=1)
    echo = body.flag("echo")
    top = body.whole("logprobs", high=_MOST_TOP_LOGPROBS)
    if echo and top is not None:
        raise body.error("logprobs", "log probabilities of a prompt that is echoed are not computed: leave one out")
    body.neutral(_NEUTRAL_COMPLETIONS)
    best_of = body.whole("best_of")
    if best_of is not None and best_of != (body.whole("n", 1) or 1):
        raise body.error("best_of", "this server returns all answers: give n instead")
    logprobs = {"logprobs": top is not None, "top_logprobs": top or 0}
    return _ask(body, model, prompts, False, max_tokens, logprobs, echo)


def _ask(
    body: BodyFields,
    model: str,
    prompts: list[Prompt],
    is_chat: bool,
    max_tokens: int | None,
    logprobs: dict[str, Any],
    echo: bool,
) -> Ask:
    if (named := body.text("model", model)) != model:
        raise ApiError(404, f"there is no model {named!r}; this server has {model!r}", "model", "model_not_found")
    n = body.whole("n", 1, low=1, high=MOST_ANSWERS) or 1
    if n * len(prompts) > MOST_ANSWERS:
        name = "n" if n > 1 else "prompt"
        raise ApiError(
            400, f"{name} asks for {n * len(prompts)} answers; one request may have {MOST_ANSWERS}: send more", name
        )
    stream = body.flag("stream")
    options = BodyFields(body.mapping("stream_options"), "stream_options.")
    include_usage = options.flag("include_usage")
    continuous_usage = options.flag("continuous_usage_stats")
    options.ignore(("include_obfuscation",))
    options.refuse_others()
    ask = Ask(
        prompts,
        is_chat,
        n,
        max_tokens,
        {**_sampling(body), **logprobs},
        body.number("keep_ratio"),
        body.whole("budget_tokens", low=1),
        body.text("scorer"),
        body.text("context"),
        body.flag("add_special_tokens", True),
        body.flag("cache_prompt", True),
        stream,
        include_usage,
        continuous_usage,
        echo,
    )
    body.neutral(_NEUTRAL)
    body.ignore(_IGNORED)
    body.refuse_others()
    check_budget(ask.keep_ratio, ask.budget_tokens, ask.scorer)
    if ask.context is not None and any(value is not None for value in (ask.keep_ratio, ask.budget_tokens, ask.scorer)):
        raise ApiError(400, "context comes with a budget and a scorer of its own; leave the others out", "context")
    return ask


def check_budget(keep_ratio: float | None, budget_tokens: int | None, scorer: str | None) -> None:
    """Raise ApiError for two budgets, and for a scorer that does not exist."""
    if keep_ratio is not None and budget_tokens is not None:
        raise ApiError(400, "keep_ratio and budget_tokens were both given; give one of them", "keep_ratio")
    if scorer is not None and scorer not in SCORERS:
        raise ApiError(400, f"scorer is {scorer!r}; allowed is {' or '.join(map(repr, SCORERS))}", "scorer")


def _sampling(body: BodyFields) -> dict[str, Any]:
    """Return the arguments of SamplingParams that both kinds of body have."""
    stop = body.any("stop", ())
    if not isinstance(stop, (str, list, tuple)) or not all(isinstance(text, str) for text in stop):
        raise body.error("stop", "give a string or a list of strings")
    stop_ids = body.items("stop_token_ids")
    bias = {}
    for token, value in body.mapping("logit_bias").items():
        if not token.isdecimal() or len(token) > 9:
            raise body.error("logit_bias", f"{token!r} is no token id: give whole numbers as names")
        bias[int(token)] = value
    top_k = body.whole("top_k", 0, low=-1) or 0
    return {
        "temperature": body.number("temperature", 1.0),
        "top_p": body.number("top_p", 1.0),
        "top_k": max(top_k, 0),  # -1 is another way to say off
        "min_p": body.number("min_p", 0.0),
        "repetition_penalty": body.number("repetition_penalty", 1.0),
        "presence_penalty": body.number("presence_penalty", 0.0),
        "frequency_penalty": body.number("frequency_penalty", 0.0),
        "logit_bias": bias,
        "min_tokens": body.whole("min_tokens", 0),
        "seed": body.whole("seed"),
        "stop": stop if isinstance(stop, str) else tuple(text for text in stop if text),
        "stop_token_ids": stop_ids,
        "ignore_eos": body.flag("ignore_eos"),
    }


def _prompts(body: BodyFields) -> list[Prompt]:
    """Return the prompts of a completion: a text, token ids, or a list of either."""
    prompt = body.any("prompt")
    if prompt is None:
        raise ApiError(400, "prompt is missing; give text, token ids, or a list of these", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_id(item) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) or (isinstance(item, list) and all(map(_is_id, item))) for item in prompt):
            return prompt
    raise body.error("prompt", "give text, token ids, or a list of these")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def chat_messages(body: BodyFields, name: str = "messages") -> list[Message]:
    """Return the messages of a body; parts of text are joined, and a developer is the system."""
    messages = body.items(name)
    if not messages:
        raise ApiError(400, f"{name} is missing or empty; give a list of messages with role and content", name)
    return [_message(message, f"{name}[{number}].") for number, message in enumerate(messages)]


def _message(message: object, prefix: str) -> Message:
    if not isinstance(message, dict):
        name = prefix.rstrip(".")
        raise ApiError(400, f"{name} is no object; give role and content", name)
    fields = BodyFields(message, prefix)
    role, content = fields.text("role"), fields.any("content")
    if not role:
        raise fields.error("role", "give system, user or assistant")
    if isinstance(content, list):
        content = "".join(_part(part, f"{prefix}content") for part in content)
    if not isinstance(content, str):
        raise fields.error("content", "give a string, or a list of parts of type text")
    fields.ignore(("name", "refusal", "annotations", "audio"))
    fields.neutral({"tool_calls": ([],)})
    fields.refuse_others()
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: object, name: str) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise ApiError(400, f"{name} has a part of type {kind!r}; this server takes parts of type text only", name)
