"""Real text as contexts: facts are planted, passages are cut, and what is asked for stands in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.messages import naming

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.real_tasks import COPIED_TOKENS, TASKS, make_tasks
from chunkkv.evaluation.texts.real_texts import KINDS, RealText, cut_passage, file_text, real_text


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="ignore")


def made(kind: str, seed: int, tokens: int = 4_000):
    return make_tasks(real_text(kind), tokens, encode, decode, np.random.default_rng([seed]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_asked_for_stands_in_the_passage_once(kind, seed):
    result = made(kind, seed)
    text = result.passage.text
    assert 3_000 < len(encode(text)) <= 4_000
    assert tuple(task.name for task in result.tasks) == TASKS
    for task in result.tasks:
        first, end = task.span
        assert text.count(task.lead + task.answer) == 1
        assert task.answer in text[first:end]
        assert task.answer not in task.question
    copied = result.tasks[-1]
    assert copied.lead.strip() in copied.question and len(encode(copied.answer)) <= COPIED_TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_text_and_another_seed_another(kind):
    assert made(kind, 1) == made(kind, 1) != made(kind, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_facts_a_passage_is_the_source_and_what_follows_goes_on_there(kind):
    source = real_text(kind)
    plain = cut_passage(source, 3_000, lambda text: len(encode(text)), np.random.default_rng(0))
    assert plain.text + plain.follows in source.text
    planted = cut_passage(source, 3_000, lambda text: len(encode(text)), np.random.default_rng(0), ["A b.", "C d."])
    for (first, end), statement in zip(planted.spans, ("A b.", "C d."), strict=True):
        assert planted.text[first:end] == source.planted(statement).rstrip()
    assert planted.text.replace("A b.", "").replace("C d.", "")[:200] in source.text or planted.spans[0][0] < 200


def test_code_gets_its_facts_as_comments():
    code = made("code", 3)
    first, end = code.tasks[0].span
    assert code.passage.text[first:end].startswith("# The access code") and code.passage.text[first - 1] == "\n"


def test_a_text_of_ones_own_is_read_and_asked_without_facts(tmp_path: Path):
    file = tmp_path / "own.txt"
    file.write_text(" ".join(f"Sentence number {n} tells of the year {n * 7}." for n in range(400)), encoding="utf-8")
    result = make_tasks(file_text(file), 2_000, encode, decode, np.random.default_rng(0), plant=False)
    assert [task.name for task in result.tasks] == ["copy"] and result.passage.spans == ()


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str):
    file = tmp_path / "empty.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match="is empty"):
        file_text(file)


def test_another_place_is_drawn_where_the_first_holds_too_few_sentences():
    source = RealText("file", f"{'a ' * 300}end. " + "One. Two. Three. Four. " * 200)
    fact = ["It is so."]
    for seed in range(20):
        passage = cut_passage(source, 60, lambda text: len(text.split()), np.random.default_rng(seed), fact)
        assert "It is so." in passage.text and len(passage.text.split()) <= 60


def test_prompts_too_short_for_what_is_planted_are_refused():
    source = RealText("file", f"{'a ' * 30}end. " * 50)
    with pytest.raises(ConfigError, match=naming("longer prompts", "(file)", "2 others in 20 tokens")):
        cut_passage(source, 20, lambda text: len(text.split()), np.random.default_rng(0), ["It is so.", "It is not."])


def test_a_text_too_short_is_refused():
    with pytest.raises(ConfigError, match="no stretch of 5000 tokens"):
        cut_passage(RealText("file", "One. Two. Three."), 5_000, len, np.random.default_rng(0))


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match="there are novel, speech, manual, code"):
        real_text("poem")
