"""A block's operations on a GPU, each of them one call."""
