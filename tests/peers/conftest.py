"""Every test in this folder runs another project's code and needs the "peers" extra: make test-peers."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import engines
from support.checkpoints import VARIANTS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what this folder holds, so that `-m "not peers"` leaves it out."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.peers)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    """Each family, as a tiny checkpoint."""
    return request.param


@pytest.fixture(scope="module")
def model(variant: str):
    """Transformers' own model of the family."""
    import torch  # here, because other test runs collect this folder without it
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        engines.checkpoint_dir(variant), dtype=torch.float32, attn_implementation="eager"
    ).eval()
