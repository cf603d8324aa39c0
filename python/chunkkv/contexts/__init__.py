"""Compressed prompts that outlive a call: made once, asked many times, extended, saved and loaded."""

from chunkkv.contexts.context import Context, check_continues, longest_prefix
from chunkkv.contexts.continuation import Continuation, ContinuedRequest, continue_requests, start_prefill
from chunkkv.contexts.make import context_of_row, make_context

__all__ = [
    "Context",
    "Continuation",
    "ContinuedRequest",
    "check_continues",
    "context_of_row",
    "continue_requests",
    "longest_prefix",
    "make_context",
    "start_prefill",
]
