"""Frames, links and lines: what the network alone costs."""
