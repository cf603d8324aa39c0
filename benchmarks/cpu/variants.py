"""What is compared: engines with weights of one kind, with the full cache and with a part of it."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32, REDUCED = "float32", "reduced"  # weights and arithmetic of float32, and anything cheaper
FULL, PART = 100, 20  # percent of a prompt that stays in the cache
PRODUCT = "product"
# How the product stores weights, its KV cache, and the weights that prompts are read with.
HALF_CACHE = "float32, cache float16"
INT4_CACHE = "int4, cache int8"
INT4_ALL = f"{INT4_CACHE}, prefill w8a8"
W8A8_ALL = "w8a8, cache int8"
TITLES = {
    PRODUCT: "ChunkKV-TRT",
    "transformers_kvpress": "transformers",
    "onnxruntime_genai": "ONNX Runtime GenAI",
    "openvino": "OpenVINO GenAI",
    "llama_cpp": "llama.cpp",
}
# The environment of each engine: a folder of the checkout.
ENVIRONMENTS = {
    PRODUCT: ".venv",
    "transformers_kvpress": ".venv-peers",
    "onnxruntime_genai": ".venv-onnxruntime-genai",
    "openvino": ".venv-openvino",
    "llama_cpp": ".venv",
}


@dataclass(frozen=True)
class Variant:
    """One line of the tables.

    Parameters
    ----------
    engine : str
        A key of TITLES.
    weights : str
        How the weights are stored, as the engine names it.
    group : str
        FLOAT32 or REDUCED: variants of one group are compared.
    keep : int
        FULL or PART.
    """

    engine: str
    weights: str
    group: str
    keep: int

    @property
    def key(self) -> str:
        """What it is called in the JSON file."""
        return f"{self.engine}|{self.weights}|{self.keep}"

    @property
    def title(self) -> str:
        """What it is called in tables."""
        name = TITLES[self.engine]
        if self.keep == PART and self.engine == "transformers_kvpress":
            name += " + kvpress"
        kept = "full cache" if self.keep == FULL else f"{PART} % kept"
        return f"{name} {self.weights}, {kept}"


def _pair(engine: str, weights: str, group: str) -> tuple[Variant, Variant]:
    return Variant(engine, weights, group, FULL), Variant(engine, weights, group, PART)


# OpenVINO's default multiplies in bfloat16 where the processor has it, and stores the cache in fewer bits.
VARIANTS = (
    *_pair(PRODUCT, "float32", FLOAT32),
    *_pair(PRODUCT, HALF_CACHE, FLOAT32),
    *_pair("transformers_kvpress", "float32", FLOAT32),
    Variant("onnxruntime_genai", "float32", FLOAT32, FULL),
    *_pair("openvino", "float32", FLOAT32),
    Variant("llama_cpp", "float32", FLOAT32, FULL),
    *_pair(PRODUCT, "int8", REDUCED),
    *_pair(PRODUCT, INT4_CACHE, REDUCED),
    *_pair(PRODUCT, INT4_ALL, REDUCED),
    *_pair(PRODUCT, W8A8_ALL, REDUCED),
    Variant("onnxruntime_genai", "int4", REDUCED, FULL),
    *_pair("openvino", "int4", REDUCED),
    Variant("openvino", "default", REDUCED, FULL),
    Variant("llama_cpp", "Q4_0", REDUCED, FULL),
)


@dataclass(frozen=True, order=True)
class Cell:
    """What all variants are measured at: prompt tokens, threads, and prompts at once."""

    tokens: int
    threads: int
    rows: int

    @property
    def title(self) -> str:
        """What it is called in the page."""
        threads, rows = ("one thread", "two threads"), "one prompt" if self.rows == 1 else f"{self.rows} prompts"
        return f"{self.tokens:,} tokens, {threads[self.threads - 1]}, {rows}"


# The first cells say most, so a run that is cut short leaves the best part.
QUICK = (Cell(4096, 1, 1), Cell(1024, 1, 1), Cell(1024, 2, 1), Cell(1024, 1, 4))
ALL = tuple(
    Cell(tokens, threads, rows) for rows in (1, 4, 8) for threads in (1, 2) for tokens in (4096, 2048, 1024, 7500)
)
