"""Model repositories without a server: what is written parses and fits together, what is read is checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support import engines
from support.messages import naming
from test_tensorrt_llm_executor import engine_dir as llm_engine_dir

from chunkkv.cli.main import main
from chunkkv.engine.directory import EngineFiles
from chunkkv.errors import BackendUnavailableError, ConfigError, EngineError
from chunkkv.findings import BREAKS, WARNING
from chunkkv.triton.repository.check import check_repository
from chunkkv.triton.repository.config_text import read_config, string_parameters
from chunkkv.triton.repository.patch import patch_repository
from chunkkv.triton.repository.write import ServeOptions, write_repository

# Names, types and dims of TensorRT-LLM's own models (tensorrtllm_backend, branch r25.05), for what this layout has.
TENSORRT_LLM = {
    "ensemble": "text_input STRING 1; max_tokens INT32 1; bad_words STRING -1; stop_words STRING -1; end_id INT32 1; "
    "pad_id INT32 1; top_k INT32 1; top_p FP32 1; temperature FP32 1; length_penalty FP32 1; "
    "repetition_penalty FP32 1; min_tokens INT32 1; presence_penalty FP32 1; frequency_penalty FP32 1; seed UINT64 1; "
    "beam_width INT32 1; num_return_sequences INT32 1; exclude_input_in_output BOOL 1; stream BOOL 1",
    "preprocessing": "QUERY STRING 1; REQUEST_OUTPUT_LEN INT32 1; BAD_WORDS_DICT STRING -1; STOP_WORDS_DICT STRING -1; "
    "END_ID INT32 1; PAD_ID INT32 1",
    "tensorrt_llm": "input_ids INT32 -1; input_lengths INT32 1; request_output_len INT32 1; end_id INT32 1; "
    "pad_id INT32 1; stop_words_list INT32 2,-1; bad_words_list INT32 2,-1; beam_width INT32 1; "
    "num_return_sequences INT32 1; temperature FP32 1; runtime_top_k INT32 1; runtime_top_p FP32 1; "
    "len_penalty FP32 1; repetition_penalty FP32 1; min_tokens INT32 1; presence_penalty FP32 1; "
    "frequency_penalty FP32 1; seed UINT64 1; exclude_input_in_output BOOL 1; stop BOOL 1; streaming BOOL 1",
    "postprocessing": "TOKENS_BATCH INT32 -1,-1; SEQUENCE_LENGTH INT32 -1",
}
OUTPUTS = {
    "ensemble": "text_output STRING -1; batch_index INT32 1; sequence_index INT32 1",
    "preprocessing": "INPUT_ID INT32 -1; REQUEST_INPUT_LEN INT32 1; REQUEST_OUTPUT_LEN INT32 -1; "
    "BAD_WORDS_IDS INT32 2,-1; STOP_WORDS_IDS INT32 2,-1; OUT_END_ID INT32 1; OUT_PAD_ID INT32 1",
    "tensorrt_llm": "output_ids INT32 -1,-1; sequence_length INT32 -1; batch_index INT32 1; sequence_index INT32 1",
    "postprocessing": "OUTPUT STRING -1",
}
BLS = "tensorrt_llm_bls"
TENSORRT_LLM[BLS], OUTPUTS[BLS] = TENSORRT_LLM["ensemble"], OUTPUTS["ensemble"]
REQUIRED = {
    "ensemble": {"text_input", "max_tokens"},
    "tensorrt_llm_bls": {"text_input", "max_tokens"},
    "preprocessing": {"QUERY", "REQUEST_OUTPUT_LEN"},
    "tensorrt_llm": {"input_lengths", "request_output_len"},
    "postprocessing": {"TOKENS_BATCH", "SEQUENCE_LENGTH"},
}


@pytest.fixture(scope="module")
def engine() -> Path:
    return engines.engine_dir("llama3")


@pytest.fixture
def trtllm(engine, tmp_path) -> dict:
    names = write_repository(engine, tmp_path / "repository", "trtllm")
    return {name: read_config(tmp_path / "repository" / name / "config.pbtxt") for name in names}


def tensors(declared) -> dict[str, tuple]:
    kinds = type(declared[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    return {
        tensor.name: (kinds[tensor.data_type].name.removeprefix("TYPE_"), tuple(tensor.dims)) for tensor in declared
    }


def table(text: str) -> dict[str, tuple]:
    rows = (row.split() for row in text.split(";"))
    return {name: (kind, tuple(int(size) for size in dims.split(","))) for name, kind, dims in rows}


@pytest.mark.parametrize("model", TENSORRT_LLM)
def test_names_types_and_shapes_are_tensorrt_llms(trtllm, model: str) -> None:
    config = trtllm[model]
    assert table(TENSORRT_LLM[model]).items() <= tensors(config.input).items()
    assert table(OUTPUTS[model]).items() <= tensors(config.output).items()
    assert {tensor.name for tensor in config.input if not tensor.optional} == REQUIRED[model]


ASKED_FOR = (
    "cum_log_probs FP32 -1; output_log_probs FP32 -1,-1; context_logits FP32 -1,-1; generation_logits FP32 -1,-1,-1; "
    "kv_cache_alloc_new_blocks INT32 1; kv_cache_reused_blocks INT32 1; kv_cache_alloc_total_blocks INT32 1; "
    "arrival_time_ns INT64 1; first_scheduled_time_ns INT64 1; first_token_time_ns INT64 1; "
    "last_token_time_ns INT64 1; acceptance_rate FP32 1; total_accepted_draft_tokens INT32 1; "
    "total_draft_tokens INT32 1"
)  # outputs that TensorRT-LLM gives where a request asks for them


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls", "ensemble"])
def test_outputs_that_nobody_may_ask_for_are_declared(trtllm, model: str) -> None:
    assert table(ASKED_FOR).items() <= tensors(trtllm[model].output).items()


def test_one_value_is_a_scalar_where_it_is_tensorrt_llms(trtllm) -> None:
    reshaped = {
        model: {each.name for each in trtllm[model].input if each.HasField("reshape")} for model in ("ensemble", BLS)
    }
    assert reshaped == {"ensemble": set(), BLS: {"num_return_sequences"}}


def test_the_ensemble_fits_its_steps(trtllm) -> None:
    """Every mapped tensor exists with one type on both sides, and every input of the ensemble arrives somewhere."""
    known = {name: kind for name, (kind, _) in tensors(trtllm["ensemble"].input).items()}
    used = set()
    for step in trtllm["ensemble"].ensemble_scheduling.step:
        model_inputs, model_outputs = (
            tensors(part) for part in (trtllm[step.model_name].input, trtllm[step.model_name].output)
        )
        for name, source in step.input_map.items():
            assert model_inputs[name][0] == known[source], (step.model_name, name)
            used.add(source)
        for name, target in step.output_map.items():
            assert target not in known, "made twice"
            known[target] = model_outputs[name][0]
    assert set(tensors(trtllm["ensemble"].input)) <= used
    assert {name: kind for name, (kind, _) in tensors(trtllm["ensemble"].output).items()}.items() <= known.items()


def test_the_single_layout(engine, tmp_path, capsys) -> None:
    repository = tmp_path / "new" / "repository"
    repository.parent.mkdir()
    flags = [
        "--engine_dir",
        str(engine),
        "--model_repository",
        str(repository),
        "--slots",
        "3",
        "--kv_bytes",
        "99999999",
    ]
    main(["triton", "init", *flags])
    assert capsys.readouterr().out == f"{repository}: chunkkv\n"
    config = read_config(repository / "chunkkv" / "config.pbtxt")
    values = {name: parameter.string_value for name, parameter in config.parameters.items()}
    assert values == {"engine_dir": str(engine), "slots": "3", "kv_bytes": "99999999"}
    assert config.model_transaction_policy.decoupled and config.backend == "python"
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "1", "chunkkv", "config.pbtxt", "model.py", "new", "repository",
    ]  # fmt: skip
    findings = check_repository(repository, EngineFiles.load(engine), {})
    assert [finding for finding in findings if finding.state == BREAKS] == []


def test_nothing_is_overwritten_and_no_half_repository_stays(engine, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ConfigError, match=naming("exists empty")):
        write_repository(engine, tmp_path / "full")
    for change, error, named in (
        ({"layout": "other"}, ConfigError, "layout is 'other'; allowed is single or trtllm"),
        ({"engine_dir": tmp_path}, EngineError, "manifest.json"),
        ({"options": ServeOptions(slots=0)}, ConfigError, "slots 0"),
        ({"options": ServeOptions(kv_bytes=9000)}, ConfigError, "kv_bytes 9000 shortest"),
        ({"options": ServeOptions(waiting=0)}, ConfigError, "waiting 0"),
        ({"options": ServeOptions(queue_timeout_s=float("nan"))}, ConfigError, "queue_timeout_s nan"),
        ({"options": ServeOptions(request_timeout_s=-1)}, ConfigError, "request_timeout_s -1"),
        ({"options": ServeOptions(kv_bytes=-5)}, ConfigError, "kv_bytes -5"),
        ({"options": ServeOptions(max_prompt_bytes=0)}, ConfigError, "max_prompt_bytes 0"),
        ({"options": ServeOptions(stream_interval_ms=-1)}, ConfigError, "stream_interval_ms -1"),
        ({"options": ServeOptions(threads=0)}, ConfigError, "threads 0 1 1024"),
        ({"options": ServeOptions(log_level="loud")}, ConfigError, "log_level 'loud' debug"),
        ({"repository": tmp_path / "my models"}, ConfigError, "models' white space"),
        ({"python_env": tmp_path}, ConfigError, "python_env bin/python"),
    ):
        with pytest.raises(error, match=naming(named)):
            write_repository(**{"engine_dir": engine, "repository": tmp_path / "new", **change})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_working_directory_and_a_link_to_nowhere_can_become_a_repository(engine, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_repository(engine, Path("."))
    (tmp_path / "link").symlink_to("target")
    write_repository(engine, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "target"]
    assert all((tmp_path / name / "chunkkv" / "config.pbtxt").is_file() for name in ("empty", "target"))


TEMPLATE = """# TensorRT-LLM's backend
name: "tensorrt_llm"
backend: "tensorrtllm"
max_batch_size: 64
parameters: {
  key: "gpt_model_path"
  value: { string_value: "/engines/old" }  # where it was
}
parameters: { key: "enable_kv_cache_reuse" value: { string_value: "true" } }
parameters: { key: "sink_token_length" value: { string_value: "4" } }
parameters: { key: "decoding_mode" value: { string_value: "medusa" } }
parameters: { key: "max_attention_window_size" value: { string_value: "64" } }
"""


@pytest.fixture
def stock(tmp_path) -> Path:
    for name, text in (
        ("tensorrt_llm", TEMPLATE),
        ("preprocessing", 'backend: "python"\nparameters { key: "tokenizer_dir" value { string_value: "/t" } }\n'),
    ):
        (tmp_path / "stock" / name).mkdir(parents=True)
        (tmp_path / "stock" / name / "config.pbtxt").write_text(text, encoding="utf-8")
    return tmp_path / "stock"


def test_a_patched_repository_passes_the_doctor(stock, capsys) -> None:
    engine = llm_engine_dir()
    before = {path: path.read_text() for path in stock.rglob("config.pbtxt")}
    shown = patch_repository(engine, stock, dry_run=True)
    assert {path: path.read_text() for path in before} == before
    main(["triton", "patch", "--engine_dir", str(engine), "--model_repository", str(stock)])
    assert capsys.readouterr().out == shown
    assert '-  value: { string_value: "/engines/old" }  # where it was' in shown
    assert f'+  value: {{ string_value: "{engine}" }}  # where it was' in shown
    assert "preprocessing" not in shown and "LD_PRELOAD" in shown
    findings = check_repository(stock, EngineFiles.load(engine), {})
    assert [finding.check for finding in findings if finding.state == BREAKS] == ["tensorrt_llm: LD_PRELOAD"]
    noted = ["tensorrt_llm: memory", "tensorrt_llm: plugin errors"]
    assert [finding.check for finding in findings if finding.state == WARNING] == noted
    assert read_config(stock / "tensorrt_llm" / "config.pbtxt").max_batch_size == 4
    assert "# TensorRT-LLM's backend" in (stock / "tensorrt_llm" / "config.pbtxt").read_text()
    again = patch_repository(engine, stock)
    assert again.startswith("# start tritonserver"), "a second time there is nothing to do"


def test_what_cannot_be_patched_is_named(stock, engine, tmp_path) -> None:
    with pytest.raises(ConfigError, match=naming("onnxruntime")):
        patch_repository(engine, stock)
    llm = llm_engine_dir()
    path = stock / "tensorrt_llm" / "config.pbtxt"
    path.write_text(TEMPLATE.replace('"/engines/old"', '"/engines" "/old"'), encoding="utf-8")
    with pytest.raises(ConfigError, match=naming("gpt_model_path edited")):
        patch_repository(llm, stock)
    path.write_text(TEMPLATE.replace("tensorrtllm", "python"), encoding="utf-8")
    with pytest.raises(ConfigError, match=naming("backend tensorrtllm")):
        patch_repository(llm, stock)
    path.write_text("parameters {", encoding="utf-8")
    with pytest.raises(ConfigError, match=naming("config.pbtxt Triton")):
        patch_repository(llm, stock)


def test_a_template_that_is_not_filled_is_no_config(tmp_path) -> None:
    (tmp_path / "config.pbtxt").write_text("max_batch_size: ${triton_max_batch_size}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"fill the template's \$\{\.\.\.\} first"):
        read_config(tmp_path / "config.pbtxt")
    (tmp_path / "config.pbtxt").write_text("bogus_field: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="bogus_field"):
        read_config(tmp_path / "config.pbtxt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('parameters { key: "a" value { string_value: "x" "y\\"z" } }', {"a": 'xy"z'}),
        ('parameters { key: "a" value { string_value: " 1 " } } # ${b}', {"a": "1"}),
        ("parameters [ { key: \"a\", value < string_value: '${b}'; > } ]", {"a": "${b}"}),
        ("max_batch_size: ${b} model_transaction_policy { decoupled: ${c} } input [ { data_type: ${d} } ]", {}),
        ('newer_field { list: [ 1, 2 ] } parameters { key: "a" }', {"a": ""}),
        ("", {}),
    ],
)
def test_a_template_is_read_with_its_placeholders(tmp_path, text: str, expected: dict[str, str]) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text(text, encoding="utf-8")
    assert string_parameters(read_config(path, is_template=True)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a {",
        "a: [1",
        "}",
        ": 1",
        "a:",
        'a: "x',
        "a: ]",
        "a {" * 10**5,
        "ensemble_scheduling {" * 10**5,
        " " * (5 << 20),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=naming("config.pbtxt")) as refused:
        read_config(path, is_template=True)
    assert "\n" not in str(refused.value)


def test_only_plain_files_are_read(tmp_path) -> None:
    path = tmp_path / "config.pbtxt"
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(ConfigError, match=naming("plain file")):
            read_config(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_commands_name_the_package_that_is_missing(engine, stock, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(BackendUnavailableError, match=r"tritonclient .*: pip install 'chunkkv-trt\[triton\]'$"):
        patch_repository(llm_engine_dir(), stock)
    with pytest.raises(BackendUnavailableError, match=r"tritonclient .*: pip install 'chunkkv-trt\[triton\]'$"):
        write_repository(engine, tmp_path / "new")
    assert not (tmp_path / "new").exists()
