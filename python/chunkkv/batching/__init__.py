"""Continuous batching: requests join and leave while others decode."""
