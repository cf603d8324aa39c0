"""Texts and conversations behind a context: token for token what the tokenizer and the chat template write."""

from __future__ import annotations

import dataclasses

import pytest
from support import engines
from tokenizers import Tokenizer as Backend

from chunkkv import ChunkKVSession, SamplingParams
from chunkkv.contexts.origin import shared_tokens
from chunkkv.errors import RequestError
from chunkkv.text.tokenizer import Tokenizer

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
DOCUMENT = "The door of the old house is green. The key lies under a stone."
CHATML = (
    "{% if messages[0].role != 'system' %}<s>system: be kind\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[Q] {{ m.content }} [A]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Leaves the text in angle brackets out of every answer but the last.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('>')[-1] }}{% endif %}\n{% endfor %}"
)
COUNTING = "{{ messages | length }} messages\n{% for m in messages %}{{ m.content }}\n{% endfor %}"


def with_template(session: ChunkKVSession, template: str) -> ChunkKVSession:
    """Return the session with another chat template."""
    own = session.tokenizer
    assert own is not None
    backend: Backend = own._backend
    tokenizer = Tokenizer(backend, {}, own.special_tokens, own.eos_token_ids, (template, "chat_template.jinja"))
    return ChunkKVSession(session.executor, session.settings, session.limits, tokenizer, session.eos_token_ids)


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def session(request: pytest.FixtureRequest) -> ChunkKVSession:
    return engines.session(request.param)


CONVERSATIONS = {
    "the document, then the question": [{"role": "user", "content": DOCUMENT}],
    "a system prompt": [{"role": "system", "content": DOCUMENT}],
    "an answered question": [
        {"role": "user", "content": DOCUMENT + " Where is the key?"},
        {"role": "assistant", "content": "Under a stone."},
    ],
}


@pytest.mark.parametrize("template", [None, CHATML, ALTERNATING])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_context_and_question_are_what_the_template_writes(session, template, conversation: str) -> None:
    session = session if template is None else with_template(session, template)
    messages = CONVERSATIONS[conversation]
    if template == ALTERNATING and messages[0]["role"] == "system":
        with pytest.raises(RequestError, match="roles must alternate"):
            session.compress(messages)
        return
    context = session.compress(messages, keep_ratio=1.0)
    question = "What colour is the door?"
    if messages[-1]["role"] == "user":
        whole = [{"role": "user", "content": f"{DOCUMENT}\n\n{question}"}]
    else:
        whole = [*messages, {"role": "user", "content": question}]
    assert session.tokenizer is not None
    ids = session.tokenizer.encode_chat(whole)
    assert shared_tokens(context.token_ids, ids) == len(context) > len(ids) // 2
    behind, plain = session.generate(question, GREEDY, context=context), session.generate(whole, GREEDY, keep_ratio=1.0)
    assert behind.token_ids == plain.token_ids
    assert behind.statistics.prompt_tokens == plain.statistics.prompt_tokens == len(ids)


@pytest.mark.parametrize("template", [None, CHATML, ALTERNATING])
def test_a_turn_of_messages_goes_on(session, template) -> None:
    session = session if template is None else with_template(session, template)
    first = CONVERSATIONS["the document, then the question"]
    turn = [{"role": "assistant", "content": "I see."}, {"role": "user", "content": "Where is the key?"}]
    context = session.compress(first, keep_ratio=1.0).extend(turn)
    plain = session.generate([*first, *turn], GREEDY, keep_ratio=1.0)
    assert context.origin.messages == (*first, *turn)
    last = session.generate([{"role": "assistant", "content": "Under"}], GREEDY, context=context)
    assert last.statistics.prompt_tokens > plain.statistics.prompt_tokens
    assert session.tokenizer is not None
    ids = session.tokenizer.encode_chat([*first, *turn])
    rest = ids[len(context) :]
    assert session.generate(rest, GREEDY, context=context).token_ids == plain.token_ids


def test_a_template_that_writes_earlier_messages_differently_is_told(session) -> None:
    session = with_template(session, FORGETFUL)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<long thoughts>Hello you"}]
    context = session.compress(messages)
    assert "thoughts" not in session.tokenizer.decode(context.token_ids.tolist())
    assert session.generate("Bye", GREEDY, context=context).finish_reason == "length"
    kept = session.compress(session.tokenizer.encode_chat(messages))
    stale = dataclasses.replace(context, token_ids=kept.token_ids, slots=kept.slots, cache=kept.cache)
    with pytest.raises(RequestError, match=r"another token at position \d+ of \d+"):
        session.generate("Bye", GREEDY, context=stale)


def test_a_template_without_a_common_beginning_is_refused(session) -> None:
    with pytest.raises(RequestError, match="cannot be continued"):
        with_template(session, COUNTING).compress([{"role": "user", "content": DOCUMENT}])


@pytest.mark.parametrize("question", [" What colour is the door?", "What?", "s", "\nWhere?"])
def test_text_behind_text_is_encoded_as_one_where_it_can_be(session, question: str) -> None:
    context = session.compress(DOCUMENT, keep_ratio=1.0)
    assert session.tokenizer is not None
    whole = session.tokenizer.encode_prompt(DOCUMENT + question)
    stats = session.generate(question, GREEDY, context=context).statistics
    if shared_tokens(context.token_ids, whole) == len(context):
        assert stats.prompt_tokens == len(whole)
        plain = session.generate(DOCUMENT + question, GREEDY, keep_ratio=1.0)
        assert session.generate(question, GREEDY, context=context).token_ids == plain.token_ids
    else:
        assert stats.prompt_tokens == len(context) + len(session.tokenizer.encode(question, False))
    longer = context.extend(question)
    assert longer.origin.text == DOCUMENT + question
    assert longer.token_ids.tolist().count(session.tokenizer.bos_token_id) <= 1


def test_text_behind_token_ids(session) -> None:
    assert session.tokenizer is not None
    context = session.compress([5, 6, 7, 8])
    assert context.origin.text is None
    stats = session.generate("Hello", GREEDY, context=context).statistics
    assert stats.prompt_tokens == 4 + len(session.tokenizer.encode("Hello", add_special_tokens=False))


def test_a_context_without_a_tokenizer_takes_token_ids_only(session) -> None:
    bare = ChunkKVSession(session.executor, session.settings, session.limits)
    context = bare.compress([5, 6, 7, 8])
    assert len(bare.generate([9], GREEDY, context=context).token_ids) == 8
    for call in (lambda: bare.compress("Hello"), lambda: bare.generate("Hello", context=context)):
        with pytest.raises(RequestError, match="without a tokenizer"):
            call()
