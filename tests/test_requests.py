"""Prompts and budgets of a call, checked against what the engine was built for."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import naming
from support.tiny_tokenizers import write_tokenizer

from chunkkv.errors import ConfigError, EngineMismatchError, RequestError
from chunkkv.requests import Limits, as_batch, make_requests
from chunkkv.settings import ChunkKVSettings
from chunkkv.text.tokenizer import Tokenizer

LIMITS = Limits(max_batch_size=3, max_input_len=120, max_seq_len=150, vocab_size=300)
SMALL = ChunkKVSettings(window=4, chunk_size=3, sinks=2, min_tokens=10, keep_per_10k=4_000, max_keep_per_10k=6_000)
IDS = [5] * 100


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), "byte_level")
        return Tokenizer.from_dir(folder)


def make(prompts: Any = (IDS,), ratio: Any = None, budget: Any = None, new: int = 10, **changes: Any) -> list:
    options = {"tokenizer": None, "limits": LIMITS, "settings": SMALL, **changes}
    return make_requests(prompts, keep_ratio=ratio, budget_tokens=budget, max_new_tokens=new, **options)


@pytest.mark.parametrize(
    ("prompts", "single"),
    [
        ("text", True),
        ("", True),
        ([1, 2], True),
        ((np.int64(1),), True),
        (np.array([1, 2]), True),
        ([], False),
        (["text"], False),
        ([[1, 2]], False),
        ([np.array([1])], False),
        (("a", [1]), False),
        ([{"role": "user", "content": "a"}], True),
        ([[{"role": "user", "content": "a"}], [1]], False),
    ],
)
def test_one_prompt_is_told_from_a_list(prompts: Any, single: bool) -> None:
    batch, is_single = as_batch(prompts)
    assert is_single is single
    expected = [prompts] if single else list(prompts)
    assert len(batch) == len(expected) and all(one is other for one, other in zip(batch, expected, strict=True))


@pytest.mark.parametrize("prompt", [[3, 299], (3, 299), np.array([3, 299], np.uint16), range(3, 5)])
def test_token_ids_may_come_in_any_sequence(prompt: Any) -> None:
    (request,) = make([prompt])
    assert request.ids.dtype == np.int64 and request.ids.flags.c_contiguous
    assert request.ids.tolist() == [int(token) for token in prompt]


def test_text_is_encoded_with_its_begin_token() -> None:
    (request,) = make(["the key"], tokenizer=tokenizer())
    assert request.ids.tolist() == tokenizer().encode("the key")
    assert request.ids[0] == tokenizer().bos_token_id


@pytest.mark.parametrize(
    ("ratio", "budget", "expected"),
    [
        (None, None, (4_000, 0, 40)),
        (0.25, None, (2_500, 0, 25)),
        (0.6, None, (6_000, 0, 60)),
        (1e-4, None, (1, 0, 10)),
        (None, 33, (4_000, 33, 33)),
        (None, 3, (4_000, 3, 10)),
        (None, np.int32(60), (4_000, 60, 60)),
        ([0.3], [None], (3_000, 0, 30)),
        (np.array([0.3]), None, (3_000, 0, 30)),
    ],
)
def test_what_the_graph_is_told_of_a_budget(ratio: Any, budget: Any, expected: tuple) -> None:
    (request,) = make(ratio=ratio, budget=budget)
    assert (request.keep_per_10k, request.budget_tokens, request.kept_tokens) == expected


def test_a_budget_per_prompt() -> None:
    found = make([IDS, IDS, IDS[:8]], ratio=[None, 0.5, None], budget=[20, None, None])
    assert [request.kept_tokens for request in found] == [20, 50, 8]


def test_a_ratio_replaces_the_budget_of_the_engine() -> None:
    budget = dataclasses.replace(SMALL, budget_tokens=30)
    assert make(settings=budget)[0].kept_tokens == 30
    (request,) = make(ratio=0.5, settings=budget)
    assert (request.keep_per_10k, request.budget_tokens, request.kept_tokens) == (5_000, 0, 50)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    length=st.integers(1, 120),
    most=st.integers(4_000, 10_000),
    ratio=st.none() | st.integers(1, 10_000),
    budget=st.none() | st.integers(1, 130),
)
def test_no_request_keeps_more_than_the_engine_was_built_for(length, most, ratio, budget) -> None:
    options = dataclasses.replace(SMALL, max_keep_per_10k=most)
    budget = None if ratio is not None else budget
    limit = options.kept_tokens(length, most)
    wanted = options.kept_tokens(length, ratio, budget)
    given_ratio = None if ratio is None else ratio / 10_000
    if wanted > limit:
        with pytest.raises(RequestError, match=naming(wanted, length, "tokens", limit)):
            make([[5] * length], given_ratio, budget, settings=options)
    else:
        assert make([[5] * length], given_ratio, budget, settings=options)[0].kept_tokens == wanted


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompts": []}, "0 prompts 1 3"),
        ({"prompts": [IDS] * 4}, "4 prompts --max_batch_size"),
        ({"prompts": ["text"]}, "tokenizer ids text"),
        ({"prompts": [[5] * 121]}, "prompt 0 121 120 --max_input_len"),
        ({"new": 51}, "prompt 0 100 max_new_tokens 51 151 50"),
        ({"prompts": [[5], [5, 300]]}, "prompt 1 token 300 position 1 0 299"),
        ({"prompts": [[2**40]]}, "prompt 0 token 1099511627776 position 0"),
        ({"prompts": [[2**70]]}, "prompt 0 text list"),
        ({"prompts": [np.zeros((2, 2), int)]}, "prompt 0 text list"),
        ({"prompts": [[True, False]]}, "prompt 0 text list"),
        ({"prompts": [b"bytes"]}, "prompt 0 text list"),
        ({"prompts": [np.array([], int)]}, "prompt 0 empty"),
        ({"ratio": 0.61}, "keep_ratio 0.61 61 100 60 max_keep_ratio 0.6"),
        ({"budget": 61}, "budget_tokens 61 61 100 --chunkkv_max_keep_ratio"),
        ({"ratio": 0.0}, "keep_ratio 0.0"),
        ({"ratio": True}, "keep_ratio True"),
        ({"budget": True}, "budget_tokens True 1 2147483647"),
        ({"budget": 2**31}, "budget_tokens 2147483648"),
        ({"budget": "20"}, "budget_tokens '20'"),
        ({"ratio": 0.5, "budget": 20}, "keep_ratio 0.5 budget_tokens 20"),
        ({"ratio": [0.5, 0.5]}, "keep_ratio 2 1"),
        ({"budget": ()}, "budget_tokens 0 1"),
    ],
)
def test_a_request_the_engine_cannot_serve_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=naming(named)):
        make(**options)


def test_empty_text_is_refused_before_it_is_encoded() -> None:
    for text in ("", " \t\n"):
        with pytest.raises(RequestError, match=naming("prompt 1 empty")):
            make([IDS, text], tokenizer=tokenizer())


def test_tokens_beyond_the_models_vocabulary_are_refused() -> None:
    limits = dataclasses.replace(LIMITS, vocab_size=20)
    with pytest.raises(RequestError, match=naming("token position 1 0 19")):
        make(["the"], tokenizer=tokenizer(), limits=limits)


@pytest.mark.parametrize(("ratio", "budget"), [(0.5, None), (None, 20)])
def test_an_engine_without_chunkkv_keeps_everything(ratio: Any, budget: Any) -> None:
    for none in (None, 1.0):
        (request,) = make(ratio=none, settings=None)
        assert (request.keep_per_10k, request.budget_tokens, request.kept_tokens) == (10_000, 0, 100)
    with pytest.raises(EngineMismatchError, match=naming("engine ChunkKV")):
        make(ratio=ratio, budget=budget, settings=None)


def test_a_request_error_is_no_config_error() -> None:
    """Callers tell a bad request from a bad build."""
    with pytest.raises(RequestError) as caught:
        make(ratio=2.0)
    assert not isinstance(caught.value, ConfigError)


TALK = [{"role": "user", "content": "the key"}]


def test_messages_are_put_into_the_chat_template() -> None:
    text = tokenizer().apply_chat_template(TALK)
    once = tokenizer().encode(text, add_special_tokens=False)
    for prompt, options in ((TALK, {}), (tuple(TALK), {}), (text, {}), (text, {"add_special_tokens": False})):
        (request,) = make([prompt], tokenizer=tokenizer(), **options)
        assert request.ids.tolist() == once and once.count(tokenizer().bos_token_id) == 1


def test_text_may_go_without_a_begin_token() -> None:
    (request,) = make(["the key"], tokenizer=tokenizer(), add_special_tokens=False)
    assert request.ids.tolist() == tokenizer().encode("the key", add_special_tokens=False)


@pytest.mark.parametrize("messages", [[{"content": "no role"}], [{"role": "user", "content": 7}]])
def test_messages_that_are_none_are_refused(messages: list) -> None:
    with pytest.raises(RequestError, match=naming("message 0")):
        make([messages], tokenizer=tokenizer())
    with pytest.raises(RequestError, match=naming("tokenizer token ids")):
        make([TALK])


def test_an_empty_list_is_said_to_be_empty() -> None:
    with pytest.raises(RequestError, match=naming("prompts empty list")) as caught:
        make([])
    assert "fewer" not in str(caught.value)


def test_a_template_that_makes_no_text_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "byte_level")
    (tmp_path / "chat_template.jinja").write_text("{# nothing #}")
    with pytest.raises(RequestError, match=naming("chat template no text")):
        make([TALK], tokenizer=Tokenizer.from_dir(tmp_path))
