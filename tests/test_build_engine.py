"""chunkkv-build from checkpoint to engine directory: what is written, where it may be written, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import engines
from support.builds import ROOT, SCRIPT, CommandLine, Outcome, on_terminal, python, run_program, tree
from support.checkpoints import random_tensors, variant_config, write_checkpoint, write_tensors

import chunkkv
from chunkkv.engine.directory import EngineFiles
from chunkkv.sampling import SamplingParams
from chunkkv.session import ChunkKVSession
from chunkkv_builder import manifest
from chunkkv_builder.backends.onnxruntime import OnnxRuntimeBackend
from chunkkv_builder.backends.registry import available_backend
from chunkkv_builder.flags import parse

GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT = [(7 * i) % 380 + 3 for i in range(40)]
GRAPHS = {"config.json", "manifest.json", "step.onnx", "weights.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
# Other packages can be imported, this one cannot: -S leaves out what points to the checkout.
UNINSTALLED = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)
STAGES = ["checkpoint", "weights", "graphs", "tokenizer", "checksums"]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def model() -> Path:
    return engines.checkpoint_dir("llama3")


@pytest.fixture
def build(cli: CommandLine, model: Path) -> Callable[..., Outcome]:
    """Return a function that builds with small settings, quietly."""
    limits = ("--max_seq_len", 64, "--max_num_tokens", 16, "--log_level", "error")

    def run(output: object, *flags: object) -> Outcome:
        return cli("--checkpoint_dir", model, "--output_dir", output, *limits, *flags)

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def answer(engine: Path) -> list[int]:
    return list(ChunkKVSession.from_dir(engine, threads=1).generate(PROMPT, GREEDY).token_ids)


@pytest.mark.parametrize(
    ("flags", "extra"),
    [([], set()), (["--chunkkv", "--chunkkv_window", 8], {"compress.onnx", "compress_given.onnx", "reread.onnx"})],
)
def test_an_engine_has_its_graphs_weights_tokenizer_and_lists(build, tmp_path, flags, extra) -> None:
    output = tmp_path / "new" / "engine"
    assert build(output, *flags) == Outcome(0, "", "")
    assert names(output) == GRAPHS | TOKENIZER | extra
    assert names(output.parent) == {"engine"}
    files = EngineFiles.load(output)
    assert (files.settings is not None) == bool(flags) and set(files.versions) == {"chunkkv", "python", "onnx"}


def test_config_json_has_tensorrt_llms_shape(build: Callable[..., Outcome], tmp_path: Path) -> None:
    build(tmp_path / "engine")
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config"]
    assert config["version"] == chunkkv.__version__
    expected = {
        "architecture": "LlamaForCausalLM", "dtype": "float32", "vocab_size": 384, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_size": 16, "hidden_act": "silu", "norm_epsilon": 1e-5, "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 50000.0, "max_position_embeddings": 512,
    }  # fmt: skip
    assert expected.items() <= config["pretrained_config"].items()
    assert config["build_config"] == {
        "max_input_len": 64, "max_seq_len": 64, "max_batch_size": 8, "max_num_tokens": 16, "dtype": "float32",
        "weight_only_precision": None, "weight_only_activations": None, "backend": "onnxruntime",
        "kv_cache_dtype": None, "prefill_precision": None, "max_beam_width": 1, "kv_cache_type": "continuous",
    }  # fmt: skip


def test_limits_default_to_the_models_context(cli: CommandLine, model: Path, tmp_path: Path) -> None:
    cli("--checkpoint_dir", model, "--output_dir", tmp_path / "engine")
    limits = EngineFiles.load(tmp_path / "engine").build
    assert (limits["max_seq_len"], limits["max_input_len"], limits["max_num_tokens"]) == (512, 512, 128)


def test_two_builds_of_the_same_give_the_same_bytes(build: Callable[..., Outcome], tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, "--chunkkv", "--chunkkv_window", 8)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("shape", [{"shards": 3}, {"dtype": "bfloat16"}, {"dtype": "float16", "shards": 2}])
def test_shards_and_half_types_give_the_engine_of_the_plain_checkpoint(cli, tmp_path, shape) -> None:
    """Weights rounded to a half type beforehand make the same engine from float32, stored plainly."""
    given = write_checkpoint(tmp_path / "given", "llama3", **shape)
    plain = write_checkpoint(tmp_path / "plain", "llama3", dtype=shape.get("dtype", "float32"))
    for folder in (given, plain):
        assert cli("--checkpoint_dir", folder, "--output_dir", f"{folder}-engine", "--log_level", "error").code == 0
    weights = [(tmp_path / f"{name}-engine" / "weights.safetensors").read_bytes() for name in ("given", "plain")]
    assert weights[0] == weights[1]
    files = EngineFiles.load(tmp_path / "given-engine")
    assert files.model["dtype"] == shape.get("dtype", "float32") and files.build["dtype"] == "float32"
    assert len(answer(tmp_path / "given-engine")) == 4


def test_weight_only_makes_smaller_engines_that_load(build: Callable[..., Outcome], tmp_path: Path) -> None:
    sizes = {}
    for precision in ("none", "int8", "int4", "w8a8"):
        flags = [] if precision == "none" else ["--use_weight_only", "--weight_only_precision", precision]
        assert build(tmp_path / precision, *flags).code == 0
        sizes[precision] = (tmp_path / precision / "weights.safetensors").stat().st_size
        assert len(answer(tmp_path / precision)) == 4
    build(tmp_path / "default", "--use_weight_only")
    limits = EngineFiles.load(tmp_path / "default").build
    assert (limits["weight_only_precision"], limits["weight_only_activations"]) == ("int8", "int8")
    embedding, projections = 384 * 64, sizes["none"] - 384 * 64 * 4  # its values have 8 bits in all three
    assert sizes["int8"] < 0.35 * sizes["none"] and sizes["w8a8"] < sizes["int8"]
    assert sizes["int4"] - embedding < 0.25 * projections


@pytest.mark.parametrize(("activations", "accuracy_level"), [("int8", 4), ("float32", 1)])
def test_activations_of_weight_only_engines(activations, accuracy_level, build, tmp_path) -> None:
    build(tmp_path / "engine", "--use_weight_only", "--weight_only_activations", activations)
    nodes = onnx.load(tmp_path / "engine" / "step.onnx", load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    levels = {attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert len(products) >= 15 and levels == {accuracy_level}


def test_without_a_tokenizer_the_engine_takes_ids_and_says_so(cli: CommandLine, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", "llama3", with_tokenizer=False)
    done = cli("--checkpoint_dir", bare, "--output_dir", tmp_path / "engine", "--log_level", "warning")
    assert (done.code, done.out) == (0, "")
    assert done.err == f"warning: {bare} has no tokenizer.json: the engine will take and give token ids only\n"
    assert names(tmp_path / "engine") == GRAPHS
    assert len(answer(tmp_path / "engine")) == 4


def test_a_tokenizer_larger_than_the_model_is_warned_about(cli: CommandLine, tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small", "llama3", vocab_size=200)
    done = cli("--checkpoint_dir", small, "--output_dir", tmp_path / "engine", "--log_level", "warning")
    assert re.fullmatch(r"warning: the tokenizer has \d+ tokens, the model 200: .* are refused\n", done.err)


@pytest.mark.parametrize("flags", [["--chunkkv"], []])
def test_overwrite_replaces_an_engine_and_only_when_asked(build, tmp_path, flags) -> None:
    engine = tmp_path / "engine"
    build(engine, "--chunkkv", "--chunkkv_window", 8)
    before = tree(engine)
    message = build(engine).error(2)
    assert message == f"--output_dir {engine} holds an engine already; give --overwrite or another directory"
    assert tree(engine) == before
    assert build(engine, "--overwrite", *flags, "--max_num_tokens", 32).code == 0
    assert EngineFiles.load(engine).build["max_num_tokens"] == 32  # nothing of the old one is left
    assert names(tmp_path) == {"engine"}


def test_an_empty_directory_is_taken(build: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    assert build(tmp_path / "engine").code == 0
    EngineFiles.load(tmp_path / "engine")


def test_through_a_link_the_engine_lands_where_it_points(build: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("real")
    for flags in ([], ["--overwrite"]):
        assert build(tmp_path / "dangling", *flags).code == 0
        assert (tmp_path / "dangling").is_symlink() and not (tmp_path / "real").is_symlink()
        EngineFiles.load(tmp_path / "real")
    assert names(tmp_path) == {"dangling", "real"}


REFUSED_OUTPUTS = {
    "file": "exists and is not a directory",
    "file/engine": "would lie in {0}/file, which is no directory",
    "loop": "exists and is not a directory",
    "foreign": "is not empty and holds no engine of chunkkv-build; give an empty or new directory",
    "mixed": "holds an engine and 'notes.txt', which is not part of it",
    ".": "is or holds the current directory",
    "..": "is or holds the current directory",
    "link-to-here": "is or holds the current directory",
    "/": "is or holds the current directory",
    "": "is or holds the current directory",
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("output", REFUSED_OUTPUTS)
def test_an_output_that_would_destroy_something_is_refused(build, tmp_path, monkeypatch, output, overwrite) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "file").write_text("x")
    (here / "loop").symlink_to("loop")
    (here / "link-to-here").symlink_to(here)
    shutil.copytree(engines.engine_dir("llama3", chunkkv=False), here / "mixed")
    for name in ("foreign", "mixed"):
        (here / name).mkdir(exist_ok=True)
        (here / name / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    message = build(output, *overwrite).error(2)
    assert message.startswith("--output_dir /") and REFUSED_OUTPUTS[output].format(here) in message
    assert tree(tmp_path) == before


def test_a_checkpoint_is_not_an_output(build: Callable[..., Outcome], model: Path) -> None:
    before = tree(model)
    assert "holds no engine of chunkkv-build" in build(model, "--overwrite").error(2)
    assert tree(model) == before


def _break_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _set(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def _not_finite(folder: Path) -> None:
    tensors = random_tensors(variant_config("llama3"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_tensors(folder, tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_not_finite, "'model.layers.1.mlp.up_proj.weight' has a value that is not finite in float32"),
        (shutil.rmtree, "does not exist; give the directory of a Hugging Face checkpoint, or a GGUF file"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{\n\n"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (_break_weights, "model.safetensors"),
        (_set(architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel'"),
        (_set(num_key_value_heads=3), "4 attention heads cannot share 3 key-value heads"),
        (_set(num_hidden_layers=4), "model.layers.3."),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("nonsense"), "tokenizer_config.json"),
    ],
)
def test_a_broken_checkpoint_gives_one_line_and_exit_code_1(cli, tmp_path, damage, message) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama3")
    damage(folder)
    flags = ("--checkpoint_dir", folder, "--output_dir", tmp_path / "engine")
    assert message in cli(*flags, "--log_level", "error").error(1)
    assert names(tmp_path) <= {"model"}
    for level, shown in (("verbose", True), ("debug", True), ("info", False)):
        done = cli(*flags, "--log_level", level)
        assert done.code == 1 and done.err.splitlines()[-1].startswith("chunkkv-build: error: ")
        assert ("Traceback (most recent call last)" in done.err) == shown


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_head_size_without_a_kernel_is_refused_before_any_work(cli, tmp_path, flags) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama3", head_dim=20)
    message = cli("--checkpoint_dir", folder, "--output_dir", tmp_path / "engine", *flags).error(1)
    assert "head_dim is 20; ONNX Runtime's attention takes multiples of 8" in message
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("8 GiB"), 1, "unexpected MemoryError: 8 GiB; --log_level debug shows where"),
        (ValueError("two\nlines"), 1, "unexpected ValueError: two lines; --log_level debug shows where"),
        (OSError(28, "No space left on device"), 1, "--output_dir {engine}: No space left on device"),
        (OSError(5, "Input/output error"), 1, "input or output: Input/output error"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    ],
)
def test_a_failure_within_the_build_is_one_line_and_leaves_nothing(
    build, tmp_path, monkeypatch, error, code, message
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(manifest, "hash_file", fail)
    assert build(tmp_path / "engine").error(code) == message.replace("{engine}", str(tmp_path / "engine"))
    assert not list(tmp_path.iterdir())


def test_a_file_too_large_for_the_disk_is_told_as_such(model: Path, tmp_path: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); "
    code += "from chunkkv_builder.build import main; main(sys.argv[1:])"
    flags = ("--checkpoint_dir", model, "--output_dir", tmp_path / "engine", "--log_level", "error")
    assert python("-c", code, *flags).error(1) == f"--output_dir {tmp_path / 'engine'}: File too large"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("level", "stages", "warning"),
    [("error", False, False), ("warning", False, True), ("info", True, True), ("debug", True, True)],
)
def test_log_levels(cli: CommandLine, tmp_path: Path, level: str, stages: bool, warning: bool) -> None:
    bare = engines.checkpoint_dir("llama3", with_tokenizer=False)
    done = cli("--checkpoint_dir", bare, "--output_dir", tmp_path / "engine", "--log_level", level)
    assert (done.code, done.out) == (0, "")
    assert ("warning: " in done.err) == warning
    found = re.findall(r"^(\w+) +\d+\.\d s$", done.err, re.MULTILINE)
    assert found == (STAGES if stages else [])
    assert (f"engine written to {tmp_path / 'engine'}\n" in done.err) == stages


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_terminal_shows_a_bar_that_ends_full(with_tokenizer: bool, tmp_path: Path) -> None:
    model = engines.checkpoint_dir("llama3", with_tokenizer=with_tokenizer)
    flags = ("--checkpoint_dir", model, "--output_dir", tmp_path / "engine")
    code, shown = on_terminal(sys.executable, SCRIPT, *flags)
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    last = {line.split()[0]: line.split() for line in text.splitlines() if "━" in line}
    assert list(last) == STAGES
    for stage, words in last.items():
        done, total = " ".join(words[2:-1]).split("/")
        assert done == total != "0" and ("iB" in total) == (stage == "checksums"), words
    assert text.splitlines()[-1] == f"engine written to {tmp_path / 'engine'}"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is visible again"


@pytest.mark.parametrize("start", ["builder", "elsewhere", "uninstalled", "installed", "module"])
def test_every_way_to_start_it(start: str, build: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    commands = {
        "builder": ([sys.executable, "build_engine.py"], ROOT / "builder"),
        "elsewhere": ([sys.executable, SCRIPT], tmp_path),
        "uninstalled": ([sys.executable, "-S", "-c", UNINSTALLED, Path(np.__file__).parents[1], SCRIPT], tmp_path),
        "installed": ([Path(sys.executable).with_name("chunkkv-build")], tmp_path),
        "module": ([sys.executable, "-m", "chunkkv_builder.build"], tmp_path),
    }
    command, folder = commands[start]
    limits = ("--max_seq_len", 64, "--max_num_tokens", 16, "--log_level", "error")
    output = tmp_path / "engine"
    done = run_program(*command, "--checkpoint_dir", model, "--output_dir", output, *limits, cwd=folder)
    assert done == Outcome(0, "", "")
    build(tmp_path / "expected")
    assert tree(output) == tree(tmp_path / "expected")
    assert run_program(*command, "--max_seq_len", "x", cwd=folder).error(2).startswith("--max_seq_len: 'x' is not")


def test_the_builders_module_names_hide_nothing_when_it_is_run_in_its_own_folder() -> None:
    code = "import importlib.util, runpy; runpy.run_path('build_engine.py', run_name='started'); "
    code += "print([name for name in ('plan', 'config', 'manifest') if importlib.util.find_spec(name)])"
    assert python("-c", code, cwd=ROOT / "builder") == Outcome(0, "[]\n", "")


def test_a_missing_dependency_is_named_in_one_line() -> None:
    """Python without site-packages is a machine on which nothing was installed."""
    done = python("-I", "-S", SCRIPT, "--help")
    assert re.fullmatch(r"the Python package '\w+' is missing; install this project with pip install \.", done.error(1))


def test_a_broken_dependency_is_named_in_one_line(model: Path, tmp_path: Path) -> None:
    """A package that is there but raises ImportError: of another version, or half installed."""
    (tmp_path / "rich.py").write_text("raise ImportError(\"cannot import name 'x' from 'y'\")")
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    message = python("-c", code, tmp_path, SCRIPT, "--checkpoint_dir", model).error(1)
    assert "cannot import name 'x' from 'y'; install this project again" in message


def test_the_builder_can_be_called_from_another_thread(model: Path, tmp_path: Path) -> None:
    """Signal handlers belong to the main thread; a build elsewhere goes without."""
    code = "import sys, threading; from chunkkv_builder.build import main; "
    code += "t = threading.Thread(target=main, args=(sys.argv[1:],)); t.start(); t.join()"
    flags = ("--checkpoint_dir", model, "--output_dir", tmp_path / "engine", "--log_level", "error")
    assert python("-c", code, *flags) == Outcome(0, "", "")
    EngineFiles.load(tmp_path / "engine")


def test_auto_is_onnx_runtime() -> None:
    for name in ("auto", "onnxruntime"):
        backend = available_backend(parse(["--checkpoint_dir", "c", "--backend", name]))
        assert isinstance(backend, OnnxRuntimeBackend) and backend.name == "onnxruntime"
