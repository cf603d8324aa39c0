"""The adapter beside lm-evaluation-harness's own Hugging Face adapter: the same prompts and numbers on local tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from support.engines import command_line
from support.smollm2 import smollm2

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


# Of different lengths, with choices of different lengths, for a model of general language.
ASKED = (
    ("The keeper of the amber lantern is Ada Hunt of Porto. The code of the mill is 40719. ", "amber lantern"),
    ("Call me Ishmael. Some years ago, never mind how long, having little or no money in my purse, and nothing "
     "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. "
     "The keeper of the copper bell is Ada Hunt of Porto.\n\n", "copper bell"),
    ("def keeper(of):\n    # The keeper of the stone gate is Ada Hunt of Porto.\n    return \"é ☂\"\n", "stone gate"),
)  # fmt: skip


def documents(real: bool) -> list[dict[str, Any]]:
    if real:
        choices = [" Hunt Ada of Porto", " Ada Hunt of Porto", " nobody"]
        return [
            {"text": f"{text}The keeper of the {thing} is", "answer": "Ada Hunt of Porto", "first": "Ada",
             "choices": choices, "label": 1}
            for text, thing in ASKED
        ]  # fmt: skip
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


def written_tasks(folder: Path, real: bool) -> Path:
    """Write the tasks and their data; "real" for a model of general language."""
    (folder / "data.json").write_text("\n".join(map(json.dumps, documents(real))), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=folder / "data.json") + text, encoding="utf-8")
    return folder


def built(checkpoint: Path, output: Path, **flags: Any) -> Path:
    named = {"checkpoint_dir": checkpoint, "output_dir": output, "chunkkv": True, "log_level": "error", **flags}
    build_engine.main(command_line(named))
    return output


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(MODEL, tmp_path_factory.mktemp("side_by_side") / "engine")


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


@pytest.fixture(
    scope="module",
    params=[(real, chat) for real in (False, True) for chat in (False, True)],
    ids=["toy, plain", "toy, chat", "SmolLM2, plain", "SmolLM2, chat"],
)
def both(request: pytest.FixtureRequest, engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    real, chat = request.param
    tasks = written_tasks(tmp_path_factory.mktemp("tasks"), real)
    theirs = f"pretrained={MODEL},dtype=float32"
    if real:
        file = smollm2()
        engine = built(file, tmp_path_factory.mktemp("smollm2") / "engine", max_seq_len=2048)
        # Read from GGUF, transformers' tokenizer puts a begin token there that SmolLM2 has none of.
        theirs = f"pretrained={file.parent},gguf_file={file.name},dtype=float32,add_bos_token=False"
    ours = samples("chunkkv", f"engine_dir={engine},keep_ratio=1.0,threads=1", tasks, chat)
    return ours, samples("hf", theirs, tasks, chat)


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
