"""Computing with transformer blocks, and their KV cache."""
