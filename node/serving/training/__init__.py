"""What a server keeps between a forward and its backward: tapes, and the memory for them."""
