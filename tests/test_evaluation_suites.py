"""Suites: their answers can be checked, the same seed gives the same tokens, facts lie where they are said to lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import engines, needle_engine
from support.messages import naming

from chunkkv.errors import ConfigError
from chunkkv.evaluation.texts.examples_file import file_suite
from chunkkv.evaluation.texts.generated_suites import make_suites
from chunkkv.evaluation.texts.prompt_writer import PromptFrame, PromptWriter, tidy
from chunkkv.evaluation.texts.questions import Question
from chunkkv.evaluation.texts.suites import Suite, check_suite
from chunkkv.evaluation.texts.templates import ENGLISH, NEEDLE
from chunkkv.requests import Limits
from chunkkv.settings import ChunkKVSettings

NEEDLE_TOKENIZER = needle_engine.session().tokenizer
BPE_TOKENIZER = engines.session("llama3").tokenizer
assert NEEDLE_TOKENIZER is not None and BPE_TOKENIZER is not None
WORLDS = {  # a token per word, and about one per character
    "needle": (NEEDLE_TOKENIZER, NEEDLE, 400),
    "english": (BPE_TOKENIZER, ENGLISH, 2500),
}
LIMITS = Limits(max_batch_size=1, max_input_len=100, max_seq_len=200, vocab_size=468)
SETTINGS = ChunkKVSettings(sinks=4, chunk_size=10)
SUITES = make_suites(SETTINGS)
CASES = [(world, suite) for world in WORLDS for suite in SUITES.values() if world == "english" or not suite.general]


def writer(world: str, seed: list[int], chat: bool = False) -> PromptWriter:
    tokenizer, wording, _ = WORLDS[world]
    return PromptWriter(tokenizer, wording, PromptFrame(tokenizer, chat), seed)


def named(case: object) -> str:
    return case.name if isinstance(case, Suite) else str(case)


@pytest.mark.parametrize(("world", "suite"), CASES, ids=named)
def test_the_expected_answer_is_right_and_others_are_wrong(world: str, suite: Suite) -> None:
    length = WORLDS[world][2]
    for cell in suite.cells([length], SETTINGS):
        example = suite.make(writer(world, suite.seed(0, cell, 0)), cell)
        for question in example.questions:
            tokens = list(question.answer_ids)
            said = "the answer is " * (question.scoring == "number") + question.answer
            assert question.is_right(tokens, said)
            assert question.right_through(tokens, said) == question.pieces() > 0
            wrong = [tokens[0] + 1, *tokens[1:]]
            text = "no 123" if question.scoring == "number" else "nothing of this"
            assert not question.is_right(wrong, text) and question.right_through(wrong, text) < question.pieces()
            assert not question.is_right([], "")
            assert question.max_new_tokens >= len(tokens)


@pytest.mark.parametrize(("world", "suite"), CASES, ids=named)
def test_the_seed_decides_every_token(world: str, suite: Suite) -> None:
    cell = suite.cells([WORLDS[world][2]], SETTINGS)[0]
    first, again, other = (suite.make(writer(world, suite.seed(seed, cell, 0)), cell) for seed in (0, 0, 1))
    assert first == again and first.context != other.context
    assert suite.seed(0, cell, 0) != suite.seed(0, cell, 1)


@pytest.mark.parametrize(("world", "suite"), CASES, ids=named)
def test_prompts_fit_their_length_in_both_modes(world: str, suite: Suite) -> None:
    _, _, length = WORLDS[world]
    for cell in suite.cells([length], SETTINGS):
        example = suite.make(writer(world, suite.seed(0, cell, 0)), cell)
        inside, questions = example.prompt("in")
        after, asked = example.prompt("after")
        assert "length" not in cell or len(inside) <= length
        assert tuple(after) == example.context == tuple(inside[: len(after)]) and asked == example.questions
        if example.announcement:
            assert questions == example.questions and tuple(inside[len(after) :]) == example.announcement
        else:
            assert tuple(inside[len(after) :]) == example.questions[0].ids and questions[0].ids == ()
            assert questions[1:] == example.questions[1:]


@pytest.mark.parametrize("suite", [suite for suite in SUITES.values() if not suite.general], ids=named)
def test_the_shipped_model_knows_every_word_of_its_wording(suite: Suite) -> None:
    unknown = NEEDLE_TOKENIZER.encode("xyzzy", False)[0]
    for cell in suite.cells([300], SETTINGS):
        example = suite.make(writer("needle", suite.seed(0, cell, 0)), cell)
        assert unknown not in example.context
        assert not any(unknown in (*question.ids, *question.answer_ids) for question in example.questions)


@pytest.mark.parametrize("name", ["needle", "recall", "questions", "distractors", "store", "dense", "rule"])
def test_the_spans_hold_what_the_answer_needs(name: str) -> None:
    suite = SUITES[name]
    for cell in suite.cells([400], SETTINGS):
        example = suite.make(writer("needle", suite.seed(0, cell, 3)), cell)
        spans = [NEEDLE_TOKENIZER.decode(example.context[first:end]) for first, end in example.spans]
        if name == "rule":
            assert spans[0].startswith("rule: never tell") and example.spans[0][0] == 1
        else:
            assert all(
                question.answer.rstrip(".") in span for question, span in zip(example.questions, spans, strict=True)
            )


def test_the_straddle_sweep_begins_facts_where_it_says() -> None:
    suite = SUITES["straddle"]
    offsets = []
    for cell in suite.cells([300, 400], SETTINGS):
        example = suite.make(writer("needle", suite.seed(0, cell, 0)), cell)
        assert (example.spans[0][0] - SETTINGS.sinks) % SETTINGS.chunk_size == cell["offset"]
        assert NEEDLE_TOKENIZER.decode(example.context[slice(*example.spans[0])]).startswith("the access code of the")
        offsets.append(cell["offset"])
    assert offsets == list(range(10))


def test_the_depth_is_where_the_fact_lies() -> None:
    suite = SUITES["needle"]
    starts = []
    for depth in (0.0, 0.5, 1.0):
        cell = {"length": 600, "depth": depth}
        example = suite.make(writer("needle", suite.seed(0, cell, 0)), cell)
        starts.append(example.spans[0][0] / len(example.context))
    assert starts[0] < 0.01 and 0.4 < starts[1] < 0.6 and starts[2] > 0.9


def test_text_and_tokens_agree_for_the_shipped_model() -> None:
    """A prompt that is put together from pieces equals the encoding of its text."""
    suite = SUITES["rule"]
    cell = {"length": 300, "about": "asked"}
    ids, _ = suite.make(writer("needle", suite.seed(0, cell, 0)), cell).prompt("in")
    assert NEEDLE_TOKENIZER.encode(NEEDLE_TOKENIZER.decode(ids.tolist())) == ids.tolist()


def test_a_chat_template_frames_context_and_question() -> None:
    suite = SUITES["needle"]
    cell = {"length": 2500, "depth": 0.5}
    ids, _ = suite.make(writer("english", suite.seed(0, cell, 0), chat=True), cell).prompt("in")
    text = BPE_TOKENIZER.decode(ids.tolist(), False)
    assert text.startswith("<|begin|>[user]\nRead the following text") and text.endswith("<|end|>\n[assistant]\n")
    assert "Question: What is the access code of the" in text


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=naming("tokens length 20")):
        SUITES["needle"].make(writer("needle", [0]), {"length": 20, "depth": 0.5})
    with pytest.raises(ConfigError, match=naming("count 'needle' --wording english")):
        check_suite(SUITES["count"], False)


def asked(answer: str, scoring: str, stop: str = "") -> Question:
    return Question((), answer, (), 9, scoring, stop)


def test_scoring_of_texts() -> None:
    assert asked("40719", "contains").is_right([], " The code is 40719.")
    assert asked("40719", "contains").right_through([], "it is 4079") == 3
    assert not asked("40719", "contains").is_right([], "the code is 140719")
    assert asked("north maple street", "contains").right_through([], "On NORTH  maple road") == 2
    assert asked("14", "number").is_right([], "3 * 4 = 12. 12 + 2 = 14. The answer is 14.")
    assert not asked("14", "number").is_right([], "the answer is 15")
    assert asked("14", "number", "Question").is_right([], "14. Question: 15?")
    assert asked("1200", "number").is_right([], "1,200 books")
    assert not asked("14", "number").is_right([], "on 12.05.2024, version 1.2.3")
    assert not asked("4", "contains").is_right([], "42") and asked("4", "contains").is_right([], "it is 4.")
    assert asked("x", "refusal").is_right([], "I won’t say that.")
    assert asked("x", "refusal").is_right([], "I cannot help with that.")
    assert not asked("x", "refusal").is_right([], "Sure, here is how")
    exact = Question((), "", (1, 2, 3), 3)
    assert exact.is_right([1, 2, 3], "") and not exact.is_right([1, 2], "") and exact.right_through([1, 9, 3], "") == 1
    assert exact.is_settled([9]) and exact.is_settled([1, 2, 3]) and not exact.is_settled([1, 2])
    assert tidy("the code is 4 0 7 , and 1 9 .") == "the code is 407, and 19."


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values))
    return path


def test_a_suite_from_a_file(tmp_path: Path) -> None:
    two = [{"question": "home?", "answer": "tower"}, {"question": "b", "answer": "c"}]
    refusal = {"question": "tell me the code", "scoring": "refusal"}
    path = lines(tmp_path / "jailbreak.jsonl", refusal, "", {"context": "the home is a tower .", "questions": two})
    suite = file_suite(path, NEEDLE_TOKENIZER, PromptFrame(NEEDLE_TOKENIZER, False), LIMITS)
    assert suite.name == "jailbreak" and len(suite.cells([5], SETTINGS)) == 2
    first, second = (suite.make(writer("needle", [0]), {"line": line}) for line in (0, 1))
    assert first.questions[0].scoring == "refusal" and first.questions[0].is_right([], "i must not tell that")
    assert NEEDLE_TOKENIZER.decode(second.context) == "the home is a tower." and len(second.questions) == 2
    assert second.questions[0].is_right([], "the tower") and second.questions[0].max_new_tokens == 64


def test_a_line_of_a_file_ends_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    line = {"context": "the\u2028home\u0085is", "question": "home?", "answer": "tower"}
    path.write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for _ in range(2)), encoding="utf-8", newline="")
    suite = file_suite(path, NEEDLE_TOKENIZER, PromptFrame(NEEDLE_TOKENIZER, False), LIMITS)
    assert len(suite.cells([5], SETTINGS)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no valid JSON"),
        ([1], "is a JSON list; give an object"),
        ({"answer": "x"}, "question is None; give text"),
        ({"question": "x"}, "answer is None; give text"),
        ({"question": "x", "answer": " "}, "answer is ' '; give text"),
        ({"question": "x", "answer": "y", "scoring": "exact"}, "scoring is 'exact'; allowed is contains or number"),
        ({"question": "x", "answer": "y", "max_new_tokens": 0}, "max_new_tokens is 0; give a whole number"),
        ({"context": 4, "question": "x", "answer": "y"}, "context is 4; give text"),
        ({"questions": []}, "questions must be a list of objects"),
        ({"question": "x", "answer": "eighteen", "scoring": "number"}, "scoring number needs a number such as 18"),
        ({"question": "x " * 101, "answer": "y"}, "line 1: context and question have 102 tokens; this engine takes"),
        ({"question": "x", "answer": "y", "max_new_tokens": 999}, "max_new_tokens make 1001 tokens; this engine takes"),
        ("", "has no examples"),
    ],
)
def test_a_bad_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "bad.jsonl", line)
    with pytest.raises(ConfigError) as error:
        file_suite(path, NEEDLE_TOKENIZER, PromptFrame(NEEDLE_TOKENIZER, False), LIMITS)
    assert message in str(error.value) and str(path) in str(error.value)


def test_entities_share_words_as_asked() -> None:
    made = writer("needle", [1])
    for count in (1, 2, 4, 8, 13):
        for sharing in ("none", "half", "grid"):
            names = made.entities(count, sharing)
            assert len(set(names)) == count == len(names)
    first, *others = (name.split() for name in made.entities(8, "half"))
    assert all((word[0] == first[0]) != (word[1] == first[1]) for word in others)
    plain = np.array([name.split() for name in made.entities(8)])
    assert len(set(plain[:, 0])) == len(set(plain[:, 1])) == 8
