"""One self-contained HTML page that shows what all layers keep of a prompt, and each group, class and head, and why."""

from __future__ import annotations

import base64
import json
import os
from importlib import resources

import numpy as np

from chunkkv.files import write_whole
from chunkkv.results import GroupChoice, Inspection

PAGE = "inspect_page.html"
_DATA = "__DATA__"
_LISTS = ("layer_groups", "leaders", "reading_heads")  # long, and told by the groups


def write_page(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Write the page of an inspection (see ChunkKVSession.inspect) to `path`; raises OSError where that fails."""
    write_whole(path, render_page(inspection).encode("utf-8", errors="replace"))


def render_page(inspection: Inspection) -> str:
    """Return the page as HTML that loads nothing from anywhere; prompt text is data in it, never markup."""
    settings = inspection.settings.to_dict()
    values = {
        "tokens": list(inspection.tokens),
        "ids": list(inspection.token_ids),
        "kept_tokens": inspection.kept_tokens,
        "scorer": inspection.scorer,
        "settings": {name: value for name, value in settings.items() if name not in _LISTS},
        "groups": [_group(group) for group in inspection.groups],
    }
    data = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = resources.files("chunkkv.evaluation.report").joinpath(PAGE).read_text(encoding="utf-8")
    return template.replace(_DATA, data, 1)


def _group(group: GroupChoice) -> dict[str, object]:
    # As bits, so that the page ranks exactly as the op does.
    scores = np.ascontiguousarray(group.token_scores, dtype="<f4")
    return {
        "layers": list(group.layers),
        "leader": group.leader,
        "head_class": group.head_class,
        "kv_heads": list(group.kv_heads),
        "kept": [int(position) for position in group.kept_indices],
        "chunk_starts": [int(position) for position in group.chunk_starts],
        "scores": base64.b64encode(scores.tobytes()).decode("ascii"),
    }
