"""Bytes to values and back: frames, messages, and the tensors beside them.

Imports no trio, no libp2p and nothing else of ours; only `compression` imports torch, so that
directory nodes and `python -m node status` start without it.
"""
