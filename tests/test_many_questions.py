"""examples/many_questions.py on a tiny engine: answers, the file of the context, and a second turn."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from support import engines

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "many_questions.py"


def test_the_example_runs_and_keeps_its_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document, file = tmp_path / "house.txt", tmp_path / "house.safetensors"
    document.write_text("The door of the old house is green. " * 3, encoding="utf-8")
    checkpoint = engines.checkpoint_dir("llama3", max_position_embeddings=1_024)
    engine = engines.engine_dir("llama3", checkpoint_dir=checkpoint, max_seq_len=512)
    flags = ["--engine_dir", engine, "--document", document, "--context", file, "--max_new_tokens", 4]
    main = runpy.run_path(str(EXAMPLE))["main"]
    outputs = []
    for _ in range(2):
        main([str(flag) for flag in (*flags, "Where is it?", "What colour?")])
        outputs.append(re.sub(r"[\d.]+ s\b", "", capsys.readouterr().out))
    assert outputs[0] == outputs[1] and file.is_file()
    lines = outputs[0].splitlines()
    assert re.match(r"Context\(\d+ tokens, \d+ kept, \d+ bytes\), ready after", lines[0])
    asked = [line for line in lines if line.startswith("> ")]
    assert asked == ["> Where is it?", "> What colour?", "> Where is it?", "> Say it in other words."]
    held, total = re.findall(r"\[(\d+) of (\d+) tokens held\]", outputs[0])[-1]
    assert int(held) > 0.5 * int(total)
