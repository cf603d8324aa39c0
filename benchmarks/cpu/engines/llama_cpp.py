"""llama.cpp, by its C API: the libraries of the npm package @node-llama-cpp/linux-x64, one of them for this processor.

PyPI has no wheel of llama-cpp-python. The wheels of other bindings have code for one kind of processor alone.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import tarfile
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from pathlib import Path

import numpy as np

from benchmarks.cpu.contract import BenchmarkEngine, Case, Runner, folder_of, greedy, is_ready, mark_ready

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
ROOT = Path(__file__).resolve().parents[3]
LIBRARIES = ROOT / "build" / "llama-cpp" / VERSION
FILE_TYPES = {"float32": 0, "Q4_0": 2}  # enum llama_ftype
_SILENCE = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)
SPARE = 64  # slots of a sequence behind what a case needs


class _Parameters(ctypes.Structure):
    """Parameters of a model or a context: larger than either, because they are handed on as they came."""

    _fields_ = (("sizes", c_uint32 * 4), ("rest", c_uint8 * 1008))


class _QuantizeParameters(ctypes.Structure):
    _fields_ = (
        ("threads", c_int32),
        ("file_type", c_int32),
        ("head_and_table", c_int32 * 2),
        ("allow_requantize", c_uint8),
        ("rest", c_uint8 * 1007),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", c_int32),
        ("tokens", POINTER(c_int32)),
        ("embeddings", c_void_p),
        ("positions", POINTER(c_int32)),
        ("sequence_counts", POINTER(c_int32)),
        ("sequences", POINTER(POINTER(c_int32))),
        ("wants_logits", POINTER(c_int8)),
    )


def libraries() -> Path:
    """Return the folder with the libraries, fetched once with npm; raises OSError where that is not possible."""
    folder = LIBRARIES / "package" / "bins" / "linux-x64"
    if not folder.is_dir():
        if shutil.which("npm") is None:
            raise OSError("llama.cpp's libraries are fetched with npm, which is not installed")
        partial = LIBRARIES.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command = ["npm", "pack", "--json", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"npm cannot fetch {PACKAGE}@{VERSION}: {done.stderr.strip().splitlines()[-1:]}")
        (archive,) = partial.glob("*.tgz")
        with tarfile.open(archive) as file:
            file.extractall(partial, filter="data")
        partial.replace(LIBRARIES)
    return folder


def load_library() -> ctypes.CDLL:
    """Return libllama with the signatures that are used here."""
    folder = libraries()
    ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    (ggml_file,), (llama_file,) = folder.glob("libggml.v*.so"), folder.glob("libllama.v*.so")
    ggml = ctypes.CDLL(str(ggml_file), ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama = ctypes.CDLL(str(llama_file), ctypes.RTLD_GLOBAL)
    llama.llama_model_default_params.restype = llama.llama_context_default_params.restype = _Parameters
    llama.llama_model_quantize_default_params.restype = _QuantizeParameters
    llama.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(_QuantizeParameters)]
    llama.llama_model_load_from_file.argtypes = [c_char_p, _Parameters]
    llama.llama_init_from_model.argtypes = [c_void_p, _Parameters]
    llama.llama_model_load_from_file.restype = llama.llama_init_from_model.restype = c_void_p
    llama.llama_model_get_vocab.argtypes, llama.llama_model_get_vocab.restype = [c_void_p], c_void_p
    llama.llama_vocab_n_tokens.argtypes = [c_void_p]
    llama.llama_set_n_threads.argtypes = [c_void_p, c_int32, c_int32]
    llama.llama_batch_init.argtypes, llama.llama_batch_init.restype = [c_int32] * 3, _Batch
    llama.llama_decode.argtypes = [c_void_p, _Batch]
    llama.llama_get_logits_ith.argtypes, llama.llama_get_logits_ith.restype = [c_void_p, c_int32], POINTER(c_float)
    for name in ("llama_n_ctx", "llama_n_seq_max"):
        function = getattr(llama, name)
        function.argtypes, function.restype = [c_void_p], c_uint32
    llama.llama_log_set(_SILENCE, None)
    return llama


class LlamaCppRunner:
    """A model and a context with a sequence for each row.

    Parameters
    ----------
    case : Case
        What is measured.
    """

    def __init__(self, case: Case) -> None:
        self._llama, self._case, rows = load_library(), case, len(case.prompts)
        path = folder_of(case.work, "llama_cpp", case.weights) / "model.gguf"
        model = self._llama.llama_model_load_from_file(str(path).encode(), self._llama.llama_model_default_params())
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(model))
        params, slots = self._llama.llama_context_default_params(), rows * (case.length + case.steps + SPARE)
        # tokens of the cache, of a batch, of a piece of it (as it is), and sequences
        params.sizes[0], params.sizes[1], params.sizes[3] = slots, case.length, rows
        self._context = self._llama.llama_init_from_model(model, params)
        taken = self._llama.llama_n_ctx(self._context), self._llama.llama_n_seq_max(self._context)
        if taken[0] < slots or taken[1] != rows:
            raise RuntimeError(f"llama.cpp {VERSION} has other parameters: {taken} instead of {(slots, rows)}")
        self._llama.llama_set_n_threads(self._context, case.threads, case.threads)
        self._batch = self._llama.llama_batch_init(max(case.length, rows), 0, rows)
        self._tokens, self._position = [0] * rows, case.length

    def prefill(self) -> list[int]:
        """Run one prompt after the other; return the first token of each row."""
        for row, prompt in enumerate(self._case.prompts):
            (self._tokens[row],) = self._decode([(token, place, row) for place, token in enumerate(prompt)], 1)
        return self._tokens

    def step(self) -> list[int]:
        """Return the next token of each row."""
        items = [(token, self._position, row) for row, token in enumerate(self._tokens)]
        self._tokens, self._position = self._decode(items, len(items)), self._position + 1
        return self._tokens

    def compress_s(self) -> float | None:
        """Return None: nothing is compressed."""
        return None

    def _decode(self, items: list[tuple[int, int, int]], wanted: int) -> list[int]:
        """Run (token, position, row) for each item; return the likeliest token behind each of the last `wanted`."""
        batch = self._batch
        batch.count = len(items)
        for place, (token, position, row) in enumerate(items):
            batch.tokens[place], batch.positions[place] = token, position
            batch.sequence_counts[place], batch.sequences[place][0] = 1, row
            batch.wants_logits[place] = place >= len(items) - wanted
        if self._llama.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        logits = [self._llama.llama_get_logits_ith(self._context, place - wanted) for place in range(wanted)]
        return greedy(np.stack([np.ctypeslib.as_array(row, (self._vocabulary,)) for row in logits]))


class LlamaCpp:
    """llama.cpp."""

    def version(self) -> str:
        """Return the release of the libraries."""
        built = json.loads((libraries() / "_nlcBuildMetadata.json").read_text("utf-8"))
        return f"llama.cpp {built['buildOptions']['llamaCpp']['release']} ({PACKAGE} {VERSION})"

    def prepare(self, work: Path, model: Path, weights: str) -> None:
        """Let llama.cpp rewrite the GGUF file in another type; its own fast kernels are those for Q4_0."""
        folder = folder_of(work, "llama_cpp", weights)
        if is_ready(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        llama = load_library()
        params = llama.llama_model_quantize_default_params()
        params.file_type, params.allow_requantize = FILE_TYPES[weights], True
        if llama.llama_model_quantize(str(model).encode(), str(folder / "model.gguf").encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp cannot write {model.name} as {weights}")
        mark_ready(folder)

    def load(self, case: Case) -> Runner:
        """Load the model."""
        return LlamaCppRunner(case)


ENGINE: BenchmarkEngine = LlamaCpp()
