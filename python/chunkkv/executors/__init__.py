"""One module per engine: prepare and run its graphs; executors know tensors, not prompts."""
