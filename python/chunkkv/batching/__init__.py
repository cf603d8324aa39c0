"""Continuous batching over one session: requests join and leave while others decode."""

from chunkkv.batching.batcher import ContinuousBatcher
from chunkkv.batching.limits import BatchingLimits, Load
from chunkkv.batching.listener import Listener, QueueListener

__all__ = ["BatchingLimits", "ContinuousBatcher", "Listener", "Load", "QueueListener"]
