"""The adapter beside lm-evaluation-harness's own Hugging Face adapter: the same prompts and numbers on local tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from support.engines import command_line

from chunkkv.errors import RequestError
from chunkkv.evaluation.lm_eval.model import ChunkKVLM
from chunkkv_builder import build as build_engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "needle" / "model"
FILES = ("demo", "home", "keeper")
TOLERANCE = 1e-3  # of a log likelihood of some hundred tokens
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
TASKS = {
    "stops": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [".", "\\n"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "no_stops": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
""",
    "begun": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
gen_prefix: "{{first}}"
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "begun_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
gen_prefix: "the answer is"
metric_list: [{metric: acc}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}


def documents() -> list[dict[str, Any]]:
    lines = []
    for name in FILES:
        file = json.loads((ROOT / "examples" / "needle" / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
        answer = file["expected"].replace("<eos>", "").strip().rstrip(". ")
        wrong = " ".join(reversed(answer.split())) if " " in answer else answer[::-1]
        choices = [f" {wrong}", f" {answer}", " east"]
        lines.append(
            {"text": file["text"], "answer": answer, "first": answer[: len(answer) // 2].split()[0], "choices": choices,
             "label": 1}
        )  # fmt: skip
    return lines


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.json").write_text("\n".join(map(json.dumps, documents())), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=folder / "data.json") + text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("side_by_side") / "engine"
    build_engine.main(
        command_line({"checkpoint_dir": MODEL, "output_dir": output, "chunkkv": True, "log_level": "error"})
    )
    return output


def samples(model: str, arguments: str, tasks: Path, chat: bool) -> dict[str, list[dict[str, Any]]]:
    result = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        system_instruction="answer in few words" if chat else None,
        device="cpu",
    )
    return {name: sorted(entries, key=lambda sample: sample["doc_id"]) for name, entries in result["samples"].items()}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def both(request: pytest.FixtureRequest, engine: Path, tasks: Path) -> tuple[dict, dict]:
    ours = samples("chunkkv", f"engine_dir={engine},keep_ratio=1.0,threads=1", tasks, request.param)
    theirs = samples("hf", f"pretrained={MODEL},dtype=float32", tasks, request.param)
    return ours, theirs


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_puts_the_same_requests(both: tuple[dict, dict], name: str) -> None:
    ours, theirs = both
    assert len(ours[name]) == len(FILES)
    for own, other in zip(ours[name], theirs[name], strict=True):
        assert own["arguments"] == other["arguments"]


@pytest.mark.parametrize("name", TASKS)
def test_answers_and_likelihoods_are_the_same(both: tuple[dict, dict], name: str) -> None:
    for own, other in zip(both[0][name], both[1][name], strict=True):
        for (ours,), (theirs,) in zip(own["resps"], other["resps"], strict=True):
            if isinstance(ours, str):
                assert ours == theirs
            elif isinstance(ours, tuple):
                assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE) and ours[1] == theirs[1]
            else:
                assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_an_open_message_ends_where_transformers_ends_it(engine: Path) -> None:
    from transformers import AutoTokenizer

    lm, theirs = ChunkKVLM(str(engine), threads=1), AutoTokenizer.from_pretrained(MODEL)
    for content in ("the answer is", "the answer is ", "x\n"):
        chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": content}]
        expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert lm.apply_chat_template(chat, add_generation_prompt=False) == expected


def test_a_message_that_the_template_leaves_out_cannot_be_continued(engine: Path, monkeypatch) -> None:
    lm = ChunkKVLM(str(engine), threads=1)
    monkeypatch.setattr(lm._tokenizer, "apply_chat_template", lambda *_: "nothing")
    with pytest.raises(RequestError, match="leaves out the message 'begun'"):
        lm.apply_chat_template([{"role": "assistant", "content": "begun"}], add_generation_prompt=False)


def test_a_template_without_system_messages_gets_none(engine: Path, monkeypatch) -> None:
    lm = ChunkKVLM(str(engine), threads=1)

    def render(messages: list[dict[str, str]], *_: Any) -> str:
        if messages[0]["role"] == "system":
            raise RequestError("no system message")
        return str(len(messages))

    monkeypatch.setattr(lm._tokenizer, "apply_chat_template", render)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
    assert lm.apply_chat_template(chat) == "1"
    with pytest.raises(RequestError, match="no system message"):
        lm.apply_chat_template(chat[:1])
