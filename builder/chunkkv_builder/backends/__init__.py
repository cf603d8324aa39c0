"""One module per engine: plan and checkpoint in, engine files out."""
