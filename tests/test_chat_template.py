"""Chat templates are foreign code: they render like transformers' and cannot leave their sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.messages import naming
from support.tiny_tokenizers import CHAT_TEMPLATE, write_tokenizer

from chunkkv.errors import CheckpointError, RequestError
from chunkkv.text.chat_template import ChatTemplate
from chunkkv.text.tokenizer import Tokenizer

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
LLAMA3 = """{% set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""
CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
{{ '<|im_start|>' + message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


def render(text: str, messages: Any = TALK, **variables: Any) -> str:
    return ChatTemplate(text, "file.jinja").render(messages, {"add_generation_prompt": True, **variables})


def test_a_llama_3_like_template() -> None:
    assert render(LLAMA3, bos_token="<s>") == (
        "<s><|head|>system<|/head|>\n\nBe brief.<|eot|><|head|>user<|/head|>\n\nHi<|eot|><|head|>assistant<|/head|>\n\n"
    )
    assert render(LLAMA3, TALK[1:], bos_token="", add_generation_prompt=False) == ("<|head|>user<|/head|>\n\nHi<|eot|>")


def test_a_chatml_template() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{{ ['é', '<'] | tojson }}", '["é", "<"]'),  # transformers escapes neither
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{{ {'a': 1} | tojson(separators=(',', ':')) }}", '{"a":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("a{% generation %}{{ messages[1].content }}{% endgeneration %}b", "a Hi b"),
        ("{% if true %}\n  {% set x = 1 %}\n{{ x }}\n{% endif %}\n", "1\n"),  # blocks leave no blank lines
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ tools is none }} {{ missing is defined }} [{{ missing }}]", "True False []"),
    ],
)
def test_helpers_are_those_of_transformers(template: str, expected: str) -> None:
    assert render(template, tools=None) == expected


def test_strftime_now_is_the_local_time() -> None:
    before = datetime.now().replace(microsecond=0)
    found = datetime.strptime(render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"), "%Y-%m-%d %H:%M:%S")
    assert before <= found <= datetime.now()


def test_a_template_may_reject_messages() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('first must be user') }}{% endif %}ok"
    assert render(template, TALK[1:]) == "ok"
    with pytest.raises(RequestError, match=naming("messages first must be user")):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        '{{ "".__class__.__mro__ }}',
        '{{ "".__class__.__mro__[1].__subclasses__() }}',
        '{{ ""["__class__"]["__mro__"] }}',
        '{{ "{0.__class__.__mro__}".format(1) }}',
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
        "{{ messages | map(attribute='__class__.__mro__') | list }}",
        '{{ lipsum.__globals__["os"] }}',
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ self._TemplateReference__context.environment.globals }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update(role='x') %}",
        "{% set _ = messages[0].pop('role') %}",
        "{% set _ = messages.clear() %}",
        "{{ messages.__class__() }}",
    ],
)
def test_sandbox_escapes_and_mutation_are_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match=naming("file.jinja sandbox")):
        render(template)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "messages | attr('__class__')",
        "raise_exception | attr('__globals__')",
        "self.__init__",
    ],
)
def test_what_the_sandbox_hides_reads_as_nothing(expression: str) -> None:
    assert render(f"[{{{{ {expression} }}}}]") == "[]"


def test_messages_stay_as_they_were() -> None:
    messages = [{"role": "user", "content": "x", "extra": {"deep": [1]}}]
    before = json.dumps(messages)
    render("{% for m in messages %}{% set m = {} %}{% endfor %}{{ messages[0].extra.deep[0] }}", messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for i in range(10 ** 6) %}{% endfor %}", "OverflowError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nobody.name }}", "UndefinedError 'nobody'"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% include 'other' %}", "TypeError loader"),
        ("{% import 'os' as os %}", "TypeError loader"),
    ],
)
def test_a_template_that_breaks_is_named(template: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=naming(named)):
        render(template)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("one\ntwo {% if %}", "file.jinja syntax line 2"),
        ("{{ messages | nofilter }}", "line 1 'nofilter'"),
        ("\n\n{% for m in messages %}", "syntax line 3"),
        ("{% generation %}open", "syntax line 1 endgeneration"),
        ("{{ '" + "(" * 9, "syntax line 1"),
        ("{{" + "(" * 5_000 + "1" + ")" * 5_000 + "}}", "file.jinja compile"),
    ],
)
def test_syntax_errors_name_the_line(template: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=naming(named)):
        ChatTemplate(template, "file.jinja")


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages list '[]'"),
        ("Hello", "messages str 'Hello'"),
        (None, "messages NoneType"),
        ({"role": "user"}, "messages dict"),
        (["Hello"], "message 0 'Hello' 'role' 'content'"),
        ([TALK[0], {"content": "x"}], "message 1 mapping"),
        ([{"role": 1, "content": "x"}], "message 0"),
        ([{"role": "user", "content": 7}], "message 0 content int"),
    ],
)
def test_malformed_messages_are_refused_before_rendering(messages: Any, named: str) -> None:
    with pytest.raises(RequestError, match=naming(named)):
        render("{{ raise_exception('rendered') }}", messages)


def tokenizer(folder: Path, template: Any, jinja: str | None = None) -> Tokenizer:
    write_tokenizer(folder, "byte_level")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return Tokenizer.from_dir(folder)


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain é"}]


@pytest.mark.parametrize(
    ("template", "jinja", "expected"),
    [
        ("settings", None, "settings"),
        ("settings", "file", "file"),
        (None, "file", "file"),
        (NAMED, None, "plain é"),
        (NAMED, "file {{ eos_token }}", "file <|end|>"),
        ([None, 3, {"other": 1, "keys": 2}, *NAMED], None, "plain é"),
    ],
)
def test_where_the_template_comes_from(tmp_path: Path, template: Any, jinja: str | None, expected: str) -> None:
    assert tokenizer(tmp_path, template, jinja).apply_chat_template(TALK) == expected


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (NAMED[:1], "chat_template 'default'"),
        ([], "'default'"),
        ([{"name": "default", "template": 7}], "chat_template int text list"),
        ([{"name": "default"}], "'default'"),
        ({"default": "x"}, "chat_template dict"),
    ],
)
def test_lists_of_templates_without_a_default_are_refused(tmp_path: Path, template: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=naming(named)):
        tokenizer(tmp_path, template)


def test_a_template_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=naming("chat_template.jinja UTF-8")):
        Tokenizer.from_dir(tmp_path)


def test_a_conversation_becomes_the_ids_of_its_text(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, CHAT_TEMPLATE)
    text = found.apply_chat_template(TALK)
    assert text == "<|begin|>[system]\nBe brief.<|end|>\n[user]\nHi<|end|>\n[assistant]\n"
    ids = found.encode_chat(TALK)
    assert ids[0] == found.bos_token_id and ids.count(0) == 1 and ids.count(1) == 2
    assert found.decode(ids, skip_special_tokens=False) == text
    assert found.apply_chat_template(TALK, add_generation_prompt=False) == text.removesuffix("[assistant]\n")
    with_tools = tokenizer(tmp_path, "{{ tools | tojson }} {{ documents }} {{ mood }}")
    assert with_tools.apply_chat_template(TALK, tools=[{"name": "f"}], mood="calm") == '[{"name": "f"}] None calm'


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=naming("chat_template.jinja tokenizer_config.json")):
        tokenizer(tmp_path, None).apply_chat_template(TALK)


def test_surrogates_in_a_rendered_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=naming("surrogate U+D800 3")):
        tokenizer(tmp_path, "abc{{ '\\ud800' }}").apply_chat_template(TALK)
    with pytest.raises(RequestError, match=naming("surrogate U+DC80")):
        tokenizer(tmp_path, CHAT_TEMPLATE).encode_chat([{"role": "user", "content": "\udc80"}])


# --- limits ---

GROWING = "{% set ns = namespace(x='ab', l=[1, 2]) %}{% for i in range(60) %}"
BOMBS = {
    "product": "{{ 'a' * 10**8 }}",
    "product the other way round": "{{ 10**8 * 'a' }}",
    "huge product": "{{ 'a' * 10**12 }}",
    "list": "{{ ([1] * 10**9) | length }}",
    "power": "{{ 10 ** 100000000 }}",
    "nested ranges": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "nested texts": "{% set t = 'a' * 100000 %}{% for i in t %}{% for j in t %}{% for k in t %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "output in a loop": "{% set t = 'a' * 1000000 %}{% for i in range(100000) %}{{ t }}{% endfor %}",
    "doubling by ~": GROWING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "doubling by +": GROWING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by a block": GROWING + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling by join": GROWING + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replace": GROWING
    + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}"
    + GROWING
    + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "doubling by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}"
    + GROWING
    + "{% set ns.x = m(ns.x) %}{% endfor %}",
    "doubling a list": GROWING + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "method": "{{ 'a'.ljust(1000000000) }}",
    "filter": "{{ 'a' | center(1000000000) }}",
    "indent": "{{ 'a\\nb' | indent(1000000000) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format with an argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with an argument": "{{ '%*d' % (1000000000, 1) }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop(range(1000)) }}{% endfor %}",
    "mapped": "{% for i in range(100000) %}{{ range(100000) | map('string') | list | length }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(20)
def test_templates_are_bounded(name: str) -> None:
    with pytest.raises(CheckpointError, match=naming("file.jinja template")):
        render(BOMBS[name])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% for i in [3, 4] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for i in 'ab' %}{{ i ~ '-' ~ loop.index0 }}{% else %}none{% endfor %}", "a-0b-1"),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for i in messages if i.role == 'user' %}{{ loop.first }}{{ i.content }}{% endfor %}", "True Hi "),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set x | upper %}ab{% endset %}{{ x }}", "AB"),
        (
            "{{ '%s-%05d' % ('a', 7) }} {{ '{:>4}'.format(2) }} {{ 3 * 'ab' }} {{ 2 ** 10 + 1 }} {{ 7 % 4 }}",
            "a-00007    2 ababab 1025 3",
        ),
        (
            "{{ [1, 2, 3] | map('string') | join(',') }}{{ range(3) | list }}{{ 'a' | center(5) }}|",
            "1,2,3[0, 1, 2]  a  |",
        ),
        ("{% for i in [[1], [2]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}", "12"),
        ("{{ messages[:-1] | length }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}", "11"),
    ],
)
def test_what_is_bounded_still_works(text: str, expected: str) -> None:
    assert render(text) == expected


def test_a_long_conversation_is_within_the_limits() -> None:
    talk = [{"role": role, "content": "word " * 2000} for _ in range(300) for role in ("user", "assistant")]
    assert len(render(LLAMA3, talk, bos_token="<s>")) > 5_000_000


def test_a_rendering_that_was_stopped_takes_no_steps_of_the_next() -> None:
    template = ChatTemplate(
        "{% for i in range(messages[0].content | int) %}{% for j in range(2000) %}{% endfor %}{% endfor %}", "f"
    )
    with pytest.raises(CheckpointError):
        template.render([{"role": "user", "content": "2000"}], {})
    assert template.render([{"role": "user", "content": "2"}], {}) == ""
