"""An engine as a model of lm-evaluation-harness (needs the extra lm-eval): importing this registers it as "chunkkv"."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # the harness lists its own models only where none is registered before
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from chunkkv.errors import CheckpointError, EngineMismatchError, RequestError
from chunkkv.evaluation.lm_eval.continuations import CompressedPrompt
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession
from chunkkv.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # four names of one argument
_OPEN_END = "END_OF_THE_OPEN_MESSAGE"  # marks where a message that the model continues ends
_PASSED_ON = ("top_k", "top_p", "repetition_penalty", "seed")
_IGNORED = {"num_beams": 1, "use_cache": True}  # accepted because they are the only supported behaviour


@register_model("chunkkv")
class ChunkKVLM(TemplateLM):
    """An engine directory behind lm-evaluation-harness; docs/lm-eval.md says what each kind of request compresses.

    Parameters
    ----------
    engine_dir : str
        The engine directory; it must be given.
    keep_ratio : float, optional
        Share of each prompt kept, in (0, 1]; None for the engine's own.
    budget_tokens : int, optional
        Tokens of each prompt kept, instead of a share.
    held_back : int, default 1
        Tokens at the end of a context that are fed after compression, where log-likelihoods are asked for.
    max_gen_toks : int, default 256
        Tokens of an answer, where the task does not say.
    batch_size : int or str, default 1
        Prompts that are decoded together; "auto" for as many as the engine takes.
    threads : int, optional
        Threads of the engine; None for one per core.
    max_batch_size : int, optional
        Not used; lm_eval passes it.
    device : str, optional
        Not used, because the engine decides where it runs; lm_eval passes "cuda:0" where nobody asked for it.

    Raises
    ------
    EngineMismatchError
        For an engine without a tokenizer, or with neither an end token nor a begin token.
    RequestError
        For a value that the engine cannot serve.
    """

    def __init__(
        self,
        engine_dir: str | None = None,
        keep_ratio: float | None = None,
        budget_tokens: int | None = None,
        held_back: int = 1,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        threads: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(engine_dir, str) or not engine_dir:
            raise RequestError("engine_dir is missing; give the engine: --model_args engine_dir=DIR")
        if isinstance(held_back, bool) or not isinstance(held_back, int) or held_back < 0:
            raise RequestError(f"held_back is {held_back!r}; give a whole number of at least 0")
        self._session = ChunkKVSession.from_dir(engine_dir, threads)
        tokenizer = self._session.tokenizer
        ends = [] if tokenizer is None else [*_end_ids(tokenizer, self._session.eos_token_ids), tokenizer.bos_token_id]
        end = next((token for token in ends if token is not None), None)
        if tokenizer is None or end is None:
            raise EngineMismatchError(f"{engine_dir} has no tokenizer with an end token; tasks of lm_eval are texts")
        self._tokenizer, self._end = tokenizer, end
        self._keep_ratio, self._budget_tokens = keep_ratio, budget_tokens
        self._held_back, self._max_gen_toks = held_back, max_gen_toks
        self.batch_size = self._rows(batch_size)
        self._name = str(engine_dir)

    def _rows(self, batch_size: int | str) -> int:
        most = self._session.limits.max_batch_size
        if str(batch_size).startswith("auto"):
            return most
        if not str(batch_size).isdecimal() or not 1 <= int(batch_size) <= most:
            raise RequestError(f"batch_size is {batch_size}; this engine takes 1 to {most}, or auto")
        return int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the begin token where the engine has no end token."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The longest prompt with answer, in tokens."""
        return self._session.limits.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval's caches of requests keep the chat template."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the text of the engine's chat template, "" where there is none."""
        return self._tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as the prompt text that the model was trained on.

        Without `add_generation_prompt` the text ends within the last message, which the model continues: so a task
        begins the answer. Where a template takes no system message, it is left out, with a warning.
        """
        try:
            return rendered_chat(self._tokenizer, chat_history, add_generation_prompt)
        except (RequestError, CheckpointError):
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            _log.warning("the chat template takes no system message; it is left out")
            return rendered_chat(self._tokenizer, others, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids as a session makes them of a prompt; a begin token in the text is not put there again."""
        begin = self._tokenizer.decode([self.prefix_token_id], False)
        special = not (begin and string.startswith(begin)) if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, special)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer every (context, generation arguments); the whole context is compressed."""
        answers: dict[int, str] = {}
        ready = [self._generation(*request.args) for request in requests]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for numbers in _batches(ready, self.batch_size):
                sampling = ready[numbers[0]][1]
                results = self._session.generate(
                    [ready[number][0] for number in numbers],
                    sampling,
                    keep_ratio=self._keep_ratio,
                    budget_tokens=self._budget_tokens,
                )
                for number, result in zip(numbers, results, strict=True):
                    answers[number] = result.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, result.text)
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _generation(self, context: str, arguments: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        sampling = sampling_of(arguments, self._max_gen_toks)
        limits = self._session.limits
        room = min(limits.max_input_len, limits.max_seq_len - sampling.max_new_tokens)
        if room < 1:
            raise RequestError(
                f"max_gen_toks is {sampling.max_new_tokens}; this engine takes prompt and answer of at most "
                f"{limits.max_seq_len} tokens: ask for fewer, or build with a larger --max_seq_len"
            )
        return self._truncated(self.tok_encode(context), room), sampling

    def _truncated(self, ids: list[int], room: int) -> list[int]:
        """Return the last `room` tokens of a prompt that is too long, as lm_eval's other models do."""
        if len(ids) > room:
            _log.warning("a prompt of %d tokens is cut to its last %d, which is what the engine takes", len(ids), room)
        return ids[-room:]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; those of one context share its compressed cache."""
        pairs = [self._split(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda number: (pairs[number][0], number))
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood") as bar:
            for numbers in _runs(order, lambda number: pairs[number][0]):
                room = max(len(pairs[number][1]) for number in numbers) - 1  # the last token is not fed
                prompt = CompressedPrompt(
                    self._session, pairs[numbers[0]][0], room, self._keep_ratio, self._budget_tokens
                )
                for number in numbers:
                    fed, skipped = pairs[number][1:]
                    scores[number] = prompt.score(fed, skipped)
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], scores[number])
                    bar.update()
        return [scores[number] for number in range(len(pairs))]

    def _split(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Return the prompt that is compressed, what is fed behind it, and how much of that is not scored."""
        if not continuation:
            raise RequestError("a continuation has no token of its own behind its context; give it at least one word")
        limits = self._session.limits
        room = min(limits.max_input_len, limits.max_seq_len + 1 - len(continuation))
        if room < 1:
            raise RequestError(
                f"a continuation has {len(continuation)} tokens; this engine takes context and continuation of at most "
                f"{limits.max_seq_len} tokens: build with a larger --max_seq_len"
            )
        context = self._truncated(context, room)
        held_back = min(self._held_back, len(context) - 1)
        cut = len(context) - held_back
        return tuple(context[:cut]), (*context[cut:], *continuation), held_back

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts; a text has no prompt, so nothing of it is compressed."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            ids = self.tok_encode(request.args[0])
            total = 0.0
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                window_context, predicted = make_disjoint_window(pair)
                first, *rest = window_context
                fed = [*rest, *predicted]
                prompt = CompressedPrompt(self._session, [first], len(fed) - 1)  # the last token is not fed
                total += prompt.score(fed, skipped=len(rest))[0]
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def _end_ids(tokenizer: Tokenizer, ends: Collection[int]) -> list[int]:
    """Return the end tokens of a session, the tokenizer's own first."""
    own = tokenizer.special_tokens.get("eos_token")
    return sorted(ends, key=lambda token: (tokenizer.decode([token], False) != own, token))


def rendered_chat(tokenizer: Tokenizer, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """Return messages in the chat template; without `add_generation_prompt` the last one stays open at its end."""
    if add_generation_prompt:
        return tokenizer.apply_chat_template(chat_history, True)
    *others, last = chat_history
    marked = {**last, "content": f"{last['content']}{_OPEN_END} "}
    text = tokenizer.apply_chat_template([*others, marked], False)
    before, mark, after = text.rpartition(_OPEN_END)
    if not mark:
        raise RequestError(f"the chat template leaves out the message {last['content'][:40]!r}; it cannot be continued")
    # A template that strips its messages has taken the blank behind the mark.
    return before if after.startswith(" ") else before.rstrip()


def sampling_of(arguments: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """Return a task's generation arguments as sampling parameters.

    `max_gen_toks` is the length of an answer where the task names none. Raises RequestError for an argument that this
    engine does not have.
    """
    remaining = {name: value for name, value in arguments.items() if value is not None}
    until = remaining.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    lengths = [remaining.pop(name) for name in _LENGTHS if name in remaining]
    sampled = remaining.pop("do_sample", None)
    temperature = float(remaining.pop("temperature", 1.0 if sampled else 0.0))
    passed = {name: remaining.pop(name) for name in _PASSED_ON if name in remaining}
    if other := {name: value for name, value in remaining.items() if _IGNORED.get(name) != value}:
        name, value = next(iter(other.items()))
        raise RequestError(
            f"generation argument {name} is {value!r}, which this engine does not have; known are until, do_sample, "
            f"temperature, {', '.join((*_PASSED_ON, *_LENGTHS))}"
        )
    return SamplingParams(
        max_new_tokens=int(lengths[0]) if lengths else max_gen_toks,
        temperature=0.0 if sampled is False else temperature,
        stop=tuple(text for text in until if text),
        **passed,
    )


def _batches(ready: Sequence[tuple[list[int], SamplingParams]], rows: int) -> list[list[int]]:
    """Return the requests in batches of like length and the same sampling."""
    order = sorted(range(len(ready)), key=lambda number: (repr(ready[number][1]), -len(ready[number][0]), number))
    groups = _runs(order, lambda number: ready[number][1])
    return [group[first : first + rows] for group in groups for first in range(0, len(group), rows)]


def _runs(order: Sequence[int], key: Callable[[int], Any]) -> list[list[int]]:
    """Return the numbers in lists of neighbours with equal keys."""
    groups: list[list[int]] = []
    for number in order:
        if groups and key(groups[-1][0]) == key(number):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
