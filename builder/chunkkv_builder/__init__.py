"""Offline part of ChunkKV-TRT: checkpoint, plan, graphs, engine directory."""
