"""Reads checkpoints: config, tensors, tokenizer files."""
