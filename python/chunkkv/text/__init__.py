"""Text to tokens and back: the tokenizer of a checkpoint, its chat template, and text as a stream."""
