"""Continuous batching over one session: requests join and leave while others decode."""

from chunkkv.batching.batcher import PROBE_WAIT_S, ContinuousBatcher
from chunkkv.batching.limits import BatchingLimits, Load
from chunkkv.batching.listener import Listener, QueueListener

__all__ = ["PROBE_WAIT_S", "BatchingLimits", "ContinuousBatcher", "Listener", "Load", "QueueListener"]
