"""Frames, links and lines: the cost of the network alone."""
