"""Adapters (LoRA) inside a span's blocks: their values, where they go, and their sums."""
