"""An HTTP server with OpenAI's API over the batcher, for one engine."""
