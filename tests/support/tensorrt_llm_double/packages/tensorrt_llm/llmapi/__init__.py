"""The LLM API, of which 1.2 has the kinds of KV cache."""
