"""Blocks of figures in documents, by subject."""
