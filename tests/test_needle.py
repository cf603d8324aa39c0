"""The shipped model's documents, tokenizer, prompts and files agree with each other."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from support.messages import naming
from tokenizers import Tokenizer

NEEDLE = Path(__file__).resolve().parent.parent / "examples" / "needle"
MODEL = NEEDLE / "model"
sys.path.insert(0, str(NEEDLE))

import documents as docs  # noqa: E402
import make_prompts  # noqa: E402
import measure_engines  # noqa: E402
import vocabulary as words  # noqa: E402

DOCUMENT_KINDS = {
    "pairs": lambda writer: writer.pairs(64),
    "any pairs": lambda writer: writer.pairs(64, None, None),
    "recall of one noun": lambda writer: writer.recall(128, 0, "noun"),
    "recall": lambda writer: writer.recall(128, 0),
    "recall in sentences": lambda writer: writer.recall(200, 1),
    "list": lambda writer: writer.name_list(150),
    "dense": lambda writer: writer.dense(300),
    "dense with rules": lambda writer: writer.dense(300, rules=2),
    "full": lambda writer: writer.full(500, 4, 5),
    "full with rules": lambda writer: writer.full(700, 6, 8, rules=2),
}
TASKS = {
    "code": docs.Task(),
    "home": docs.Task("home"),
    "keeper": docs.Task("keeper"),
    "sentence": docs.Task(sentence=True),
    "shared": docs.Task(facts=8, sharing="grid"),
    "forbidden": docs.Task(facts=2, sharing="grid", rule="forbidden"),
    "neighbour": docs.Task(facts=2, sharing="grid", rule="neighbour"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_the_vocabulary_has_1024_different_words(tokenizer: Tokenizer) -> None:
    assert len(set(words.WORDS)) == 1024 == tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(index) for index in range(1024)] == list(words.WORDS)


def test_the_shipped_tokenizer_is_the_one_built_here(tokenizer: Tokenizer) -> None:
    assert json.loads(tokenizer.to_str()) == json.loads(words.build_tokenizer().to_str())


def test_delimiters_and_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("The home, is 4207: why?\nno;").tokens
    assert tokens == ["<bos>", "the", "home", ",", "is", "4", "2", "0", "7", ":", "why", "?", "\n", "<unk>", ";"]


def test_a_line_break_at_the_end_of_a_prompt_is_no_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("answer:\n").ids == tokenizer.encode("answer:").ids


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
def test_token_ids_of_a_document_are_those_of_its_text(kind: str, tokenizer: Tokenizer) -> None:
    writer = docs.Writer(11)
    for _ in range(20):
        tokens = DOCUMENT_KINDS[kind](writer).tokens
        without_ends = [token for token in tokens if token != words.EOS_ID]
        assert words.UNK_ID not in tokens
        assert tokenizer.encode(words.text_of(tokens)).ids == without_ends


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
def test_documents_depend_on_the_seed_alone(kind: str) -> None:
    make = DOCUMENT_KINDS[kind]
    same = [make(docs.Writer(5)).tokens for _ in range(2)]
    assert same[0] == same[1]
    assert make(docs.Writer(6)).tokens != same[0]


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
def test_documents_are_not_longer_than_asked_for(kind: str) -> None:
    limits = {
        "pairs": 64,
        "any pairs": 64,
        "recall": 128,
        "recall of one noun": 128,
        "recall in sentences": 200,
        "list": 150,
        "full": 500,
        "full with rules": 700,
    }
    writer = docs.Writer(3)
    assert max(len(DOCUMENT_KINDS[kind](writer).tokens) for _ in range(50)) <= limits.get(kind, 300)


@pytest.mark.parametrize("kind", ["dense", "full", "full with rules"])
def test_every_answer_is_what_the_document_states(kind: str) -> None:
    writer, asked, refused = docs.Writer(8), 0, 0
    for _ in range(30):
        document = DOCUMENT_KINDS[kind](writer)
        first = document.questions[0].start if document.questions else 0
        stated = words.text_of(document.tokens[:first])
        for question in document.questions:
            answer = words.text_of(document.tokens[question.start : question.end])
            before = words.text_of(document.tokens[: question.start])
            subject = before[before.rindex("question:") :].split(" the ", 1)[1].removesuffix(" answer:")[:-1]
            asked += 1
            refused += question.refused
            forbidden = f"never tell the {subject}." in stated
            assert question.refused == forbidden == (answer == "i must not tell that.")
            if not question.refused:
                value = answer.removeprefix(f"the {subject} is ").removesuffix(".")
                assert f"the {subject} is {value}." in stated
                assert question.sentence == (answer != value)
    assert asked > 50
    assert (refused > 5) == (kind == "full with rules")


@pytest.mark.parametrize("sharing", sorted(set(docs.SHARING)))
def test_more_facts_than_there_are_words_are_as_many_as_possible(sharing: str) -> None:
    facts = docs.Writer(1).facts(500, ("code",), sharing)
    assert (
        len({fact.entity for fact in facts})
        == len(facts)
        >= min(map(len, (docs.CLASSES["adjective"], docs.CLASSES["noun"])))
    )


def test_a_writer_of_few_words_uses_no_others() -> None:
    writer = docs.Writer(1, words=8)
    seen = {token for _ in range(50) for token in writer.dense(300).tokens}
    for name in ("adjective", "noun", "person", "street"):
        assert len(seen & set(docs.CLASSES[name])) == 8
    assert set(docs.CLASSES["digit"]) <= seen


def test_learned_places_cover_every_answer_and_its_end() -> None:
    document = docs.Writer(2).full(600, 5, 8)
    learned = set(document.answer_places)
    for question in document.questions:
        assert set(range(question.start, question.end)) <= learned
        assert document.tokens[question.end - 1] == words.EOS_ID


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [200, 1000])
def test_a_test_prompt_fills_its_length_and_asks_for_what_it_states(name: str, length: int) -> None:
    writer, task = docs.Writer(21), TASKS[name]
    for _ in range(10):
        prompt, answer = docs.test_prompt(writer, length, task)
        text, answered = words.text_of(prompt), words.text_of(answer)
        assert length - 20 <= len(prompt) <= length
        assert text.endswith(" answer:") and answer[-1] == words.EOS_ID
        subject = text[text.rindex("question:") :].split(" the ", 1)[1].removesuffix(" answer:")[:-1]
        assert (answered == "i must not tell that.") == (task.rule == "forbidden")
        assert text.count(f"the {subject} is ") == 1
        if task.rule != "forbidden":
            assert f"the {subject} is {answered.removeprefix(f'the {subject} is ').removesuffix('.')}." in text


def test_a_test_prompt_without_room_for_its_facts_is_refused() -> None:
    with pytest.raises(ValueError, match=naming("8 facts")):
        docs.test_prompt(docs.Writer(1), 100, docs.Task(facts=8))


def test_the_depth_of_the_needle_is_obeyed() -> None:
    for depth in (0.0, 0.5, 1.0):
        prompt, _ = docs.test_prompt(docs.Writer(1), 1000, docs.Task(), depth)
        text = words.text_of(prompt)
        at = text.index("the access code of") / text.index("question:")
        assert at == pytest.approx(depth, abs=0.06)


def test_prompt_files_are_what_their_seed_gives(tokenizer: Tokenizer) -> None:
    files = make_prompts.prompt_files()
    assert {path.name: path.read_text(encoding="utf-8") for path in make_prompts.FOLDER.iterdir()} == files
    for name in make_prompts.PROMPTS:
        prompt = json.loads(files[f"{name}.json"])
        ids, answer = make_prompts.prompt_ids(name)
        assert tokenizer.encode(prompt["text"]).ids == ids
        assert tokenizer.encode(prompt["expected"], add_special_tokens=False).ids == answer[:-1]
        assert prompt["text"].endswith(prompt["question"]) and prompt["tokens"] == len(ids)


def _weights() -> dict[str, dict[str, object]]:
    content = (MODEL / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    assert len(content) == 8 + size + max(tensor["data_offsets"][1] for tensor in header.values())
    return header


def test_the_model_files_are_small_and_fit_their_config() -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["vocab_size"] == 1024
    width, heads, key_heads, head = 128, 4, 2, 64
    shapes = {"model.embed_tokens.weight": [1024, width], "lm_head.weight": [1024, width], "model.norm.weight": [width]}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": [width],
                "post_attention_layernorm": [width],
                "self_attn.q_proj": [heads * head, width],
                "self_attn.k_proj": [key_heads * head, width],
                "self_attn.v_proj": [key_heads * head, width],
                "self_attn.o_proj": [width, heads * head],
                "mlp.gate_proj": [256, width],
                "mlp.up_proj": [256, width],
                "mlp.down_proj": [width, 256],
            }.items()
        }
    header = _weights()
    assert {name: tensor["shape"] for name, tensor in header.items()} == shapes
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 1_049_728
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4_000_000


def test_special_tokens_agree_across_files(tokenizer: Tokenizer) -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    settings = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("bos", "eos", "pad"):
        token = tokenizer.token_to_id(settings[f"{name}_token"])
        assert config[f"{name}_token_id"] == generation[f"{name}_token_id"] == token


def test_the_chat_template_gives_the_prompt_the_model_was_trained_on(tokenizer: Tokenizer) -> None:
    import jinja2

    settings = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    prompt = json.loads((make_prompts.FOLDER / "demo.json").read_text(encoding="utf-8"))["text"]
    messages = [{"role": "user", "content": prompt.removesuffix(" answer:")}]
    tokens = {"bos_token": settings["bos_token"], "eos_token": settings["eos_token"]}
    text = jinja2.Template(settings["chat_template"]).render(messages=messages, **tokens)
    assert tokenizer.encode(text, add_special_tokens=False).ids == tokenizer.encode(prompt).ids


def test_the_card_shows_the_measured_numbers() -> None:
    cells = json.loads((NEEDLE / "accuracy.json").read_text(encoding="utf-8"))["cells"]
    card = (NEEDLE / "README.md").read_text(encoding="utf-8")
    for cell in cells:
        assert cell["low"] <= cell["exact"] <= cell["high"]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        rows = [line for line in card.splitlines() if line.startswith(f"| {task} |")]
        assert len(rows) == 1, f"the card has no row {task!r}"
        for cell in cells:
            if cell["task"] == task:
                shown = f"{cell['exact'] * 100:.1f} ({cell['low'] * 100:.1f}–{cell['high'] * 100:.1f})"
                assert shown in rows[0], f"{task} at {cell['length']} tokens: {shown}"


def test_the_card_shows_what_engines_of_the_model_lose() -> None:
    cells = json.loads((NEEDLE / "engines.json").read_text(encoding="utf-8"))["cells"]
    card = (NEEDLE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = measure_engines.card_rows(cells)
    assert len(rows) == 6 + 12 and [row for row in rows if row not in card] == []
    full = {cell["weights"]: cell["exact"] for cell in cells if "weights" in cell and cell["task"] == "code"}
    assert min(full.values()) > 0.9
