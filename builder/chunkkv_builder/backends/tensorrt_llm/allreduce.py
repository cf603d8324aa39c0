"""Adds chunk scores up over the tensor-parallel ranks, so that all of them choose the same tokens."""

from __future__ import annotations

import inspect
from typing import Any

from chunkkv.errors import BackendUnavailableError


def sum_over_ranks(scores: Any, group: list[int]) -> Any:
    """Return the sum of `scores` (float32) over the ranks in `group`, the same bits on each of them.

    TensorRT-LLM reduces in the type of its NCCL plugin, which is set to float32 for this one node: in 16 bits many
    chunks would tie. NCCL is asked for by name, because the faster strategies choose by message size.
    """
    from tensorrt_llm import functional
    from tensorrt_llm._common import default_net

    parameters = inspect.signature(functional.allreduce).parameters
    strategy = functional.AllReduceStrategy.NCCL
    if "all_reduce_params" in parameters:
        options = {"all_reduce_params": functional.AllReduceParams(strategy=strategy)}
    elif "strategy" in parameters:
        options = {"strategy": strategy}
    else:
        raise BackendUnavailableError(
            f"tensorrt_llm.functional.allreduce takes {', '.join(parameters)}, none of which is a strategy: leave "
            "--chunkkv_tp_agree out"
        )
    config = default_net().plugin_config
    before = config.nccl_plugin
    config.nccl_plugin = "float32"
    try:
        return functional.allreduce(scores, group, **options)
    finally:
        config.nccl_plugin = before
