"""chunkkv doctor on good and broken engine directories and Triton repositories."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import engines
from support.cuda_double import CudartDouble
from support.tensorrt_llm_builds import llm_checkpoint
from test_tensorrt_llm_executor import TOKENS_PER_BLOCK, engine_dir, engine_of_another_tensorrt

from chunkkv.cli import doctor
from chunkkv.cli.main import main
from chunkkv.engine.backends import TENSORRT_LLM
from chunkkv.engine.preconditions import BUILD_PRECONDITIONS, build_values, check
from chunkkv.errors import ConfigError
from chunkkv.executors import machine_check
from chunkkv.findings import BREAKS, OK, WARNING, Finding
from chunkkv.gpu import tensorrt_plugins
from chunkkv.gpu.cuda_runtime import CudaRuntime
from chunkkv.triton.repository.cpp_backend import LOADER_LIBRARY
from chunkkv_builder.manifest import write_manifest
from chunkkv_builder.progress import Progress

GOOD = {
    "gpt_model_path": "",  # the engine's own
    "enable_kv_cache_reuse": "false",
    "enable_chunked_context": "false",
    "gpt_model_type": "inflight_fused_batching",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "max_beam_width": "1",
    "decoding_mode": "top_k_top_p",
}

BATCHING = "gpt_model_type (batching_strategy)"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has all a late engine needs; returns the loader library that tritonserver preloads."""
    runtime = CudaRuntime(CudartDouble())
    monkeypatch.setattr(CudaRuntime, "load", staticmethod(lambda: runtime))
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", (tmp_path,))
    versions = {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"}
    monkeypatch.setattr(machine_check, "installed_version", versions.get)
    (tmp_path / "libchunkkv_tensorrt.so.10").touch()
    (tmp_path / LOADER_LIBRARY).touch()
    return tmp_path / LOADER_LIBRARY


def repository(folder: Path, backend: str = "tensorrtllm", **changes: Any) -> Path:
    """Write a repository of one engine model and one that runs none; a value of None leaves a parameter out."""
    values = {**GOOD, "gpt_model_path": str(engine_dir()), **changes}
    entries = "\n".join(
        f'parameters: {{\n  key: "{name}"\n  value: {{ string_value: "{value}" }}\n}}'
        for name, value in values.items()
        if value is not None
    )
    text = f'name: "tensorrt_llm" # the engine\nbackend: "{backend}"\nmax_batch_size: 4\n'
    text += f'input [ {{ name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] }} ]\n{entries}\n'
    for name, content in (("tensorrt_llm", text), ("preprocessing", 'name: "preprocessing"\nbackend: "python"\n')):
        (folder / "repository" / name).mkdir(parents=True, exist_ok=True)
        (folder / "repository" / name / "config.pbtxt").write_text(content, encoding="utf-8")
    return folder / "repository"


def checked(path: Path, repo: Path | None = None, preload: str | Path = "") -> list[Finding]:
    return doctor.diagnose(path, repo, {"LD_PRELOAD": str(preload)})


def named(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check.endswith(check)]
    return found


def test_a_good_engine_and_repository(machine: Path, tmp_path: Path) -> None:
    found = checked(engine_dir(), repository(tmp_path), machine)
    states = {finding.check: finding.state for finding in found}
    assert not doctor.would_break(found)
    assert {check for check, state in states.items() if state != OK} == {
        "tensorrt_llm: memory",
        "tensorrt_llm: plugin errors",
    }
    assert "ends every request that is running" in named(found, "plugin errors").found
    assert "keeps 0.4 of a prompt, fixed in the engine" in named(found, "ChunkKV").found
    assert named(found, "LD_PRELOAD").found == str(machine)
    (machine.parent / "libchunkkv_tensorrt.so.10").write_bytes(b"built later")
    assert "another build than the engine's" in named(checked(engine_dir()), "plugin library").found


@pytest.mark.parametrize(
    ("changes", "check", "state", "words"),
    [
        ({"enable_kv_cache_reuse": "true"}, "enable_kv_cache_reuse", BREAKS, "second hit of a prefix fails"),
        ({"enable_kv_cache_reuse": "True"}, "enable_kv_cache_reuse", BREAKS, "True"),
        ({"enable_kv_cache_reuse": None}, "enable_kv_cache_reuse", BREAKS, "not set: the default differs"),
        ({"enable_kv_cache_reuse": None}, "enable_kv_cache_reuse", BREAKS, "ends every running request"),
        ({"enable_kv_cache_reuse": "${enable_kv_cache_reuse}"}, "enable_kv_cache_reuse", BREAKS, "${enable"),
        ({"enable_chunked_context": "true"}, "enable_chunked_context", BREAKS, "second chunk fails"),
        ({"context_model_name": "context"}, "disaggregated serving", BREAKS, "answers are wrong"),
        ({"gpt_model_type": "V1"}, BATCHING, WARNING, "V1; only the source for inflight_fused_batching"),
        ({"gpt_model_type": "${batching_strategy}"}, BATCHING, WARNING, "${batching_strategy}"),
        ({"gpt_model_type": None, "batching_strategy": "inflight_fused_batching"}, BATCHING, WARNING, "not set"),
        ({"batch_scheduler_policy": "max_utilization"}, "batch_scheduler_policy", WARNING, "prefilled again"),
        ({"batch_scheduler_policy": None}, "batch_scheduler_policy", WARNING, "not set"),
        ({"max_beam_width": "2"}, "max_beam_width", BREAKS, "2: beams share"),
        ({"max_beam_width": " 2 "}, "max_beam_width", BREAKS, "2: beams share"),
        ({"max_beam_width": "²"}, "max_beam_width", BREAKS, "²"),
        ({"max_beam_width": "${max_beam_width}"}, "max_beam_width", OK, "not set"),
        ({"enable_kv_cache_reuse": " true "}, "enable_kv_cache_reuse", BREAKS, "second hit of a prefix fails"),
        ({"kv_cache_host_memory_bytes": "45000000000"}, "kv_cache_host_memory_bytes", BREAKS, "block on the host"),
        ({"max_attention_window_size": "9" * 5000}, "max_attention_window_size", OK, "999"),
        ({"sink_token_length": "4"}, "sink_token_length", BREAKS, "4"),
        ({"max_attention_window_size": "128"}, "max_attention_window_size", BREAKS, "below max_seq_len 256"),
        ({"max_attention_window_size": "512,128"}, "max_attention_window_size", BREAKS, "512,128"),
        ({"max_attention_window_size": "256"}, "max_attention_window_size", OK, "256"),
        ({"decoding_mode": "medusa"}, "decoding_mode", BREAKS, "medusa"),
        ({"gpt_model_path": "/nowhere/engine"}, "gpt_model_path", WARNING, "not on this machine"),
        ({"gpt_model_path": "/"}, "gpt_model_path", BREAKS, "/ is another engine"),
        ({"gpt_model_path": None}, "gpt_model_path", BREAKS, "nothing is set"),
    ],
)
def test_each_setting_of_a_repository(
    machine: Path, tmp_path: Path, changes: dict[str, Any], check: str, state: str, words: str
) -> None:
    found = checked(engine_dir(), repository(tmp_path, **changes), machine)
    finding = named(found, f": {check}")
    assert finding.state == state and words in finding.found
    assert bool(finding.change) == (state != OK)
    assert doctor.would_break(found) == (state == BREAKS)


@pytest.mark.parametrize("way", ["MPI", "UCX", "NIXL", "MOONCAKE"])
def test_caches_that_travel_between_processes(machine: Path, tmp_path: Path, way: str) -> None:
    variable = f"TRTLLM_USE_{way}_KVCACHE"
    path, repo = engine_dir(), repository(tmp_path)
    for value, state in (("1", BREAKS), ("0", None), ("", None)):
        found = doctor.diagnose(path, repo, {"LD_PRELOAD": str(machine), variable: value})
        states = [finding.state for finding in found if finding.check == f"tensorrt_llm: {variable}"]
        assert states == ([state] if state else []), value
        assert doctor.would_break(found) == (state == BREAKS)


def test_what_a_server_needs_around_the_repository(machine: Path, tmp_path: Path) -> None:
    path, repo = engine_dir(), repository(tmp_path)
    assert "finds no ChunkKV plugins" in named(checked(path, repo), "LD_PRELOAD").found
    gone = tmp_path / "gone" / LOADER_LIBRARY
    assert named(checked(path, repo, gone), "LD_PRELOAD").state == BREAKS
    both = f"/usr/lib/libother.so:{machine}"
    assert named(checked(path, repo, both), "LD_PRELOAD").state == OK
    assert named(checked(path, tmp_path / "gone"), "triton repository").state == BREAKS
    (tmp_path / "empty").mkdir()
    assert "no model that runs an engine" in named(checked(path, tmp_path / "empty"), "triton repository").found
    (repo / "tensorrt_llm" / "config.pbtxt").write_text('name: "open')
    (refused,) = [finding for finding in checked(path, repo, machine) if finding.check == "tensorrt_llm"]
    assert refused.state == BREAKS and "no valid Triton model configuration" in refused.found
    plain = engines.engine_dir("llama3")
    other = checked(plain, repository(tmp_path, gpt_model_path=str(plain)), machine)
    assert "runs no engine of backend onnxruntime" in named(other, ": backend").found
    own = checked(plain, repository(tmp_path, "python", engine_dir=str(plain)))
    assert named(own, ": engine_dir").state == OK


def test_what_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    path = engine_of_another_tensorrt()
    found = checked(path)
    assert "10.14.1.48 is installed, the engine was built with 10.7.0.23" in named(found, "package tensorrt").found
    monkeypatch.setattr(machine_check, "installed_version", lambda name: None)
    monkeypatch.setattr(tensorrt_plugins, "PLUGIN_FOLDERS", ())
    monkeypatch.setattr(CudaRuntime, "load", staticmethod(lambda: CudaRuntime(CudartDouble(devices=0))))
    found = checked(path)
    assert named(found, "package tensorrt_llm").found == "is not installed here"
    assert named(found, "GPU").state == named(found, "plugin library").state == BREAKS


def test_directories_that_are_damaged_or_not_whole(machine: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(engine_dir(), broken)
    (broken / "rank0.engine").write_bytes(b"other")
    (finding,) = checked(broken)
    assert finding.state == BREAKS and "rank0.engine was changed" in finding.found
    ranks = named(checked(engine_dir(checkpoint_dir=llm_checkpoint(tp_size=2))), "ranks")
    assert ranks.state == WARNING and "mpirun -n 2" in ranks.change


def built_with(folder: Path, plugin_config: dict[str, Any] | None = None, **build_config: Any) -> Path:
    """Return a copy of a good engine directory whose config.json says that it was built with other values."""
    shutil.copytree(engine_dir(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["build_config"] |= build_config
    config["build_config"]["plugin_config"] |= plugin_config or {}
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, TENSORRT_LLM, {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"}, Progress("error"))
    return folder


def test_the_precision_of_the_weights_is_named_with_that_of_the_activations() -> None:
    assert not any(finding.check == "weights" for finding in doctor.diagnose(engines.engine_dir("llama3")))
    for activations in ("int8", "float32"):
        flags = {"use_weight_only": True, "weight_only_precision": "int4", "weight_only_activations": activations}
        found = named(doctor.diagnose(engines.engine_dir("llama3", **flags)), "weights")
        assert found.state == OK and found.found == f"int4, multiplied with activations in {activations}"


def test_the_precision_of_prompts_is_named_where_it_is_another() -> None:
    found = named(doctor.diagnose(engines.engine_dir("llama3", prefill_precision="w8a8")), "prompts")
    assert found.state == OK and found.found == "all blocks but the last are multiplied in w8a8"


def test_an_engine_whose_build_settings_do_not_hold(machine: Path, tmp_path: Path) -> None:
    plugin_config = {"multiple_profiles": True, "tokens_per_block": 64}
    found = checked(built_with(tmp_path / "engine", plugin_config, max_beam_width=4))
    assert "--multiple_profiles disable" in named(found, "multiple_profiles").change
    assert named(found, "max_beam_width").found.startswith("4; ChunkKV needs 1")
    assert named(found, "tokens_per_block").state == BREAKS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("gpt_attention_plugin", value) for value in ("auto", "bfloat16", "float32", None)),
        *(("remove_input_padding", value) for value in (True, None, False)),
        *(("context_fmha", value) for value in (True, False)),
        *(("paged_kv_cache", value) for value in (True, None, False)),
        *(("kv_cache_type", value) for value in ("PAGED", "paged", None, "CONTINUOUS", "disabled")),
        *(("max_beam_width", value) for value in (0, 1, 4)),
        *(("max_draft_len", value) for value in (0, "disabled", 3)),
        *(("speculative_decoding_mode", value) for value in (0, 1, "None", "disable", "MEDUSA", 2)),
        *(("multiple_profiles", value) for value in (False, "disabled", True)),
        *(("streamingllm", value) for value in (False, "disabled", True)),
        *(("fuse_fp4_quant", value) for value in (False, "disabled", True)),
        *(("tokens_per_block", value) for value in (TOKENS_PER_BLOCK, 48, "64")),
        *(("workers", value) for value in (1, 2)),
        *(("auto_parallel", value) for value in (1, 2)),
        *(("lora_dir", value) for value in (None, ["adapters"])),
    ],
)
@pytest.mark.parametrize("section", ["build_config", "plugin_config"])
def test_doctor_and_builder_agree_on_every_value(
    machine: Path, tmp_path: Path, section: str, name: str, value: Any
) -> None:
    changes = {"plugin_config": {name: value}} if section == "plugin_config" else {name: value}
    path = built_with(tmp_path / "engine", **changes)
    config = json.loads((path / "config.json").read_text())["build_config"]
    plugin_config = SimpleNamespace(**config.pop("plugin_config"))
    try:
        check(BUILD_PRECONDITIONS, build_values(SimpleNamespace(**config), plugin_config))
        refused = ""
    except ConfigError as error:
        refused = str(error).split()[0]
    found = {finding.check for finding in checked(path) if finding.state == BREAKS}
    assert (name in found) == (refused == name), (found, refused)


def test_every_precondition_is_compared() -> None:
    values = test_doctor_and_builder_agree_on_every_value.pytestmark[1].args[1]
    assert {name for name, _ in values} == {each.name for each in BUILD_PRECONDITIONS}


def test_the_command(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--engine_dir", str(engine_dir()), "--triton_repo", str(repository(tmp_path))]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and values["would_break"] == 1
    assert {tuple(sorted(entry)) for entry in values["findings"]} == {("change", "check", "found", "state")}
    with pytest.raises(SystemExit):
        main(words)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("would break  tensorrt_llm: LD_PRELOAD") for line in lines)
    assert any("-> start tritonserver with LD_PRELOAD=" in line for line in lines)
    assert lines[-1].endswith("1 would break, 2 to note")


def test_an_engine_for_onnx_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--engine_dir", str(engines.engine_dir("llama3"))])
    assert capsys.readouterr().out.splitlines()[-1] == "5 checks: 0 would break, 0 to note"


def test_a_repository_is_not_checked_without_its_messages(
    monkeypatch: pytest.MonkeyPatch, machine: Path, tmp_path: Path
) -> None:
    """The other checks stay; this one names the package to install."""
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    findings = checked(engine_dir(), repository(tmp_path), machine)
    refused = named(findings, "triton repository")
    assert refused.state == BREAKS and "pip install 'chunkkv-trt[triton]'" in refused.change
    assert "\n" not in refused.change and named(findings, "ChunkKV").state == OK


def test_a_chat_message_and_the_end_tokens_are_shown() -> None:
    session = engines.session("llama3")
    found = {finding.check: finding for finding in doctor.diagnose(engines.engine_dir("llama3"))}
    ids = session.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert f"'Hello' becomes {len(ids)} tokens: '<|begin|>' " in found["chat message"].found
    assert found["end of an answer"].found == "at token 1 (<|end|>)" and found["end of an answer"].state == "ok"
