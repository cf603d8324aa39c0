"""One class per engine behind one Protocol: checkpoint and plan in, engine files out."""
