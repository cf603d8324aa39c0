"""Under lm-evaluation-harness itself, on a local task: the same numbers as transformers and as the session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from support.engines import command_line
from support.messages import naming
from transformers import AutoModelForCausalLM

from chunkkv import SamplingParams
from chunkkv.errors import RequestError
from chunkkv.evaluation.lm_eval.model import ChunkKVLM, sampling_of
from chunkkv.session import ChunkKVSession
from chunkkv_builder import build as build_engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "needle" / "model"
TOLERANCE = 1e-4
FILES = ("demo", "home", "keeper")
TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
GENERATION = """
task: needle_generation
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], do_sample: false, temperature: 0.0, max_gen_toks: 8}
filter_list: [{name: plain, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, ignore_case: true}]
"""
CHOICE = """
task: needle_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lm_eval") / "engine"
    flags = {"chunkkv_boundaries": "delimiter", "chunkkv_chunk_size": 20, "log_level": "error", "max_batch_size": 2}
    build_engine.main(command_line({"checkpoint_dir": MODEL, "output_dir": output, "chunkkv": True, **flags}))
    return output


def documents() -> list[dict[str, Any]]:
    found = []
    for name in FILES:
        file = json.loads((ROOT / "examples" / "needle" / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
        answer = file["expected"].replace("<eos>", "").strip().rstrip(". ")
        wrong = " ".join(reversed(answer.split())) if " " in answer else answer[::-1]
        found.append({"text": file["text"], "answer": answer, "choices": [f" {wrong}", f" {answer}"], "label": 1})
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.json").write_text("\n".join(map(json.dumps, documents())), encoding="utf-8")
    common = TASK.format(data=folder / "data.json")
    for name, text in (("generation", GENERATION), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(common + text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def torch_model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def model(engine: Path, **values: Any) -> ChunkKVLM:
    arguments = ",".join(f"{name}={value}" for name, value in {"engine_dir": engine, "threads": 1, **values}.items())
    return get_model("chunkkv").create_from_arg_string(arguments, {"batch_size": "auto", "device": None})


def requests(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def torch_scores(torch_model: Any, ids: list[int], scored: int) -> tuple[float, bool]:
    with torch.no_grad():
        logits = torch_model(torch.tensor([ids])).logits[0, -scored - 1 : -1].double()
    wanted = torch.tensor(ids[-scored:])
    chosen = torch.log_softmax(logits, 1)[torch.arange(scored), wanted]
    return float(chosen.sum()), bool((logits.argmax(1) == wanted).all())


@pytest.mark.parametrize("held_back", [0, 1, 5])
def test_loglikelihood_with_the_whole_cache_equals_transformers(engine: Path, torch_model: Any, held_back: int) -> None:
    lm = model(engine, keep_ratio=1.0, held_back=held_back)
    pairs = [(doc["text"], choice) for doc in documents() for choice in doc["choices"]]
    pairs.append(("", documents()[1]["text"][:300]))  # without context
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert {greedy for _, greedy in found} == {True, False}
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = lm.tok_encode(context + continuation)
        scored = len(ids) - len(lm.tok_encode(context)) if context else len(ids) - 1
        expected, is_greedy = torch_scores(torch_model, ids, scored)
        assert score == pytest.approx(expected, abs=TOLERANCE * scored) and greedy == is_greedy


def test_rolling_loglikelihood_equals_transformers_over_several_windows(
    engine: Path, torch_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChunkKVLM, "max_length", 300)
    lm = model(engine, keep_ratio=0.1)
    text = documents()[1]["text"]
    (found,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = lm.tok_encode(text)
    assert len(ids) > 3 * 300
    line = [lm.prefix_token_id, *ids]
    ends = [*range(301, len(line), 300), len(line)]
    scored = [min(300, end - 1 if number == 0 else end - ends[number - 1]) for number, end in enumerate(ends)]
    expected = sum(
        torch_scores(torch_model, line[max(0, end - 301) : end], count)[0]
        for end, count in zip(ends, scored, strict=True)
    )
    assert found == pytest.approx(expected, abs=TOLERANCE * len(ids))


def test_a_small_cache_changes_scores_and_held_back_tokens_decide_which(engine: Path) -> None:
    pairs = [(doc["text"], doc["choices"][1]) for doc in documents()]

    def scores(keep_ratio: float, held_back: int) -> np.ndarray:
        lm = model(engine, keep_ratio=keep_ratio, held_back=held_back)
        return np.array([score for score, _ in lm.loglikelihood(requests(*pairs), disable_tqdm=True)])

    full, same = scores(1.0, 1), scores(1.0, 20)
    assert np.abs(full - same).max() < TOLERANCE * 5
    asked, later = scores(0.1, 1), scores(0.1, 20)
    assert 1e-6 < np.abs(asked - full).max() < 0.5  # the question chose what stays
    assert (later - full).min() < -1  # the question came after compression


@pytest.mark.parametrize("keep_ratio", [1.0, 0.2])
def test_a_task_of_generation_gives_what_the_session_gives(engine: Path, tasks: Path, keep_ratio: float) -> None:
    found = simple_evaluate(
        model="chunkkv",
        model_args=f"engine_dir={engine},keep_ratio={keep_ratio},threads=1",
        tasks=["needle_generation", "needle_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    session = ChunkKVSession.from_dir(engine, threads=1)
    sampling = SamplingParams(max_new_tokens=8, stop=(".",))
    samples = sorted(found["samples"]["needle_generation"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(FILES)
    for sample, doc in zip(samples, documents(), strict=True):
        expected = session.generate(doc["text"], sampling, keep_ratio=keep_ratio)
        assert sample["resps"][0][0] == expected.text
    assert found["results"]["needle_generation"]["exact_match,plain"] == 1.0
    assert found["results"]["needle_choice"]["acc,none"] == 1.0


def test_the_documented_command_runs(engine: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = f"engine_dir={engine},keep_ratio=0.2"
    command = [str(Path(sys.executable).parent / "chunkkv"), "lm-eval", "--model", "chunkkv", "--model_args", arguments]
    command += ["--tasks", "needle_generation", "--include_path", str(tasks), "--batch_size", "auto"]
    command += ["--output_path", str(tmp_path), "--limit", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "needle_generation" in done.stdout
    (report,) = tmp_path.rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["needle_generation"]["exact_match,plain"] == 1.0


def test_generation_arguments_mean_what_lm_eval_means() -> None:
    greedy = sampling_of({"until": ["\n", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 9}, 256)
    assert greedy == SamplingParams(max_new_tokens=9, stop=("\n",))
    sampled = sampling_of({"do_sample": True, "top_p": 0.9, "seed": 3, "until": "x", "num_beams": 1}, 256)
    assert sampled == SamplingParams(max_new_tokens=256, temperature=1.0, top_p=0.9, seed=3, stop=("x",))
    assert sampling_of({"temperature": 0.5}, 4).temperature == 0.5
    with pytest.raises(RequestError, match=naming("num_beams 4")):
        sampling_of({"num_beams": 4}, 256)


def test_what_is_too_long_loses_its_beginning(engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = model(engine, keep_ratio=1.0)
    doc = documents()[0]
    long = f"{doc['text']} " * 2 + doc["text"]
    (answer,) = lm.generate_until(requests((long, {"until": ["."], "max_gen_toks": 8})), disable_tqdm=True)
    assert "is cut to its last 4088" in caplog.text and answer.strip() == doc["answer"]
    with pytest.raises(RequestError, match=naming("max_gen_toks 5000")):
        lm.generate_until(requests(("a", {"max_gen_toks": 5000})), disable_tqdm=True)
    with pytest.raises(RequestError, match=naming("engine_dir missing --model_args engine_dir=DIR")):
        get_model("chunkkv").create_from_arg_string("keep_ratio=0.2", {"batch_size": 1, "device": "cuda:0"})
    with pytest.raises(RequestError, match=naming("batch_size 3 1 2")):
        get_model("chunkkv").create_from_arg_string(f"engine_dir={engine}", {"batch_size": 3})
