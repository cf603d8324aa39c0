"""The adapter to lm-evaluation-harness."""
