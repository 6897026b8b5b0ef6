"""Steps of a span on a GPU: what is brought there, where keys and values lie, what is launched."""
