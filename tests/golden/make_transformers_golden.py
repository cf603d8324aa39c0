"""Record what transformers computes for every checkpoint variant of tests/support/checkpoints.py (float32, eager).

    make test-peers                                    makes the environment, once
    .venv-peers/bin/python tests/golden/make_transformers_golden.py                   write transformers.npz anew
    .venv-peers/bin/python tests/golden/make_transformers_golden.py --only VARIANT    write that variant's arrays only
    .venv-peers/bin/python tests/golden/make_transformers_golden.py --check           compute again and compare

Needs torch and transformers (the `peers` extra). Keys of transformers.npz, for each VARIANT, written by
write_checkpoint(directory, VARIANT), and for each prompt P in 0, 1:

    VARIANT/weights_sha256            digest of the weights (support.checkpoints.weights_sha256): compare it first
    VARIANT/promptP                   token ids [L] int64, L = 41 and 23
    VARIANT/prefill_logitsP           [3,V] float32, after the last three prompt tokens
    VARIANT/continuationP             the 12 greedy tokens [12] int64, end tokens ignored; every best token leads the
                                      second best by at least MARGIN
    VARIANT/continuation_logitsP      [11,V] float32, after each of the first eleven of them
    VARIANT/inverse_frequencies       [R/2] float32, R the rotated dimensions of a head
    VARIANT/attention_factor          0-D float64, the factor on cosines and sines
    VARIANT/cos, VARIANT/sin          [positions,R/2] float32, the factor included
    VARIANT/…_local                   the last four for layers with a sliding window, where they have their own
    positions                         the positions of cos and sin
    transformers_version              0-D text
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.checkpoints import VARIANTS, random_tensors, variant_config, weights_sha256, write_checkpoint
from support.transformers_golden import GOLDEN_FILE, load_golden

PROMPT_LENGTHS = (41, 23)
NEW_TOKENS = 12
PREFILL_LOGITS = 3
MARGIN = 0.02
POSITIONS = (0, 1, 2, 17, 63, 200, 511, 4095)
_TEXT_IDS = (3, 300)  # ids that the tokenizers have, special tokens aside


def make_golden(variants: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the arrays of these variants, and those of none, under the keys described at the top."""
    golden = {
        "positions": np.array(POSITIONS, dtype=np.int64),
        "transformers_version": np.array(transformers.__version__),
    }
    for variant in variants:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(directory, variant)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        wrong = {kind: names for kind, names in info.items() if names}
        if wrong:
            raise AssertionError(f"{variant}: transformers reads the checkpoint differently: {wrong}")
        values = {"weights_sha256": np.array(weights_sha256(random_tensors(variant_config(variant))))}
        values.update(_rope(model))
        for number, length in enumerate(PROMPT_LENGTHS):
            values.update({f"{key}{number}": value for key, value in _answer(model, variant, number, length).items()})
        golden.update({f"{variant}/{key}": value for key, value in values.items()})
    return golden


@torch.no_grad()
def _rope(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    rotary = model.model.rotary_emb
    by_layer = isinstance(rotary.rope_type, dict)  # gemma3: angles for each kind of layer
    values: dict[str, np.ndarray] = {}
    for suffix, kind in (("", "full_attention"), ("_local", "sliding_attention")) if by_layer else (("", None),):
        prefix = "" if kind is None else f"{kind}_"
        options = {} if kind is None else {"layer_type": kind}
        cos, sin = rotary(torch.zeros(1), torch.tensor([POSITIONS]), **options)
        inverse = getattr(rotary, f"{prefix}inv_freq")
        half = inverse.shape[0]
        values |= {
            f"inverse_frequencies{suffix}": inverse.numpy(),
            f"attention_factor{suffix}": np.array(getattr(rotary, f"{prefix}attention_scaling"), dtype=np.float64),
            f"cos{suffix}": cos[0, :, :half].numpy(),
            f"sin{suffix}": sin[0, :, :half].numpy(),
        }
    return values


@torch.no_grad()
def _answer(model: transformers.PreTrainedModel, variant: str, number: int, length: int) -> dict[str, np.ndarray]:
    """Return the first random prompt whose greedy answer has a clear best token at every step, and that answer."""
    for attempt in range(200):
        random = np.random.RandomState([zlib.crc32(variant.encode()), number, attempt])
        prompt = random.randint(*_TEXT_IDS, size=length).astype(np.int64)
        ids = torch.from_numpy(prompt)[None]
        logits = model(ids).logits[0]
        steps = [logits[-1]]
        chosen = [int(steps[-1].argmax())]
        while len(chosen) < NEW_TOKENS:
            ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], dim=1)
            steps.append(model(ids).logits[0, -1])
            chosen.append(int(steps[-1].argmax()))
        best = torch.stack(steps).topk(2, dim=1).values
        if float((best[:, 0] - best[:, 1]).min()) >= MARGIN:
            return {
                "prompt": prompt,
                "prefill_logits": logits[-PREFILL_LOGITS:].numpy(),
                "continuation": np.array(chosen, dtype=np.int64),
                "continuation_logits": torch.stack(steps[1:]).numpy(),
            }
    raise AssertionError(f"{variant}: no prompt has a clear greedy answer")


def check_golden(golden: dict[str, np.ndarray], stored: dict[str, np.ndarray]) -> None:
    """Raise AssertionError where `golden` differs from the stored arrays by more than rounding."""
    if set(stored) != set(golden):
        raise AssertionError(f"keys differ: {sorted(set(stored) ^ set(golden))}")
    for key, expected in stored.items():
        if key == "transformers_version":
            continue
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(golden[key], expected, rtol=1e-4, atol=1e-4, err_msg=key)
        else:
            np.testing.assert_array_equal(golden[key], expected, err_msg=key)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write or check transformers.npz.")
    parser.add_argument("--check", action="store_true", help="compare instead of write")
    parser.add_argument("--only", choices=VARIANTS, metavar="VARIANT", help="leave the other variants as they are")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    others = {}
    if arguments.only:
        others = {key: array for key, array in load_golden().items() if key.split("/")[0] in VARIANTS}
        others = {key: array for key, array in others.items() if not key.startswith(f"{arguments.only}/")}
        version = load_golden()["transformers_version"]
        if str(version) != transformers.__version__:
            parser.error(f"the other variants are of transformers {version}, this is {transformers.__version__}")
    golden = {**others, **make_golden([arguments.only] if arguments.only else VARIANTS)}
    if arguments.check:
        check_golden(golden, load_golden())
    else:
        np.savez_compressed(GOLDEN_FILE, **golden)
    print(f"{GOLDEN_FILE.name}: {len(golden)} arrays, {GOLDEN_FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
