"""Attention of our own blocks over the pages of a page pool, compiled for this CPU."""
