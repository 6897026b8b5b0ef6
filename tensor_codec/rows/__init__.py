"""Rows of hidden states: the bytes of each, and their order."""
