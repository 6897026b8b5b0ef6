"""The goals of placement, by default.  Apart from the algorithms, so that a config needs no numpy."""

from __future__ import annotations

QUALITY = 0.99  # share of its bound at which no node moves for capacity: the rest costs too much loading
MIN_REPLICAS = 2  # servers that each block should have, where that costs no capacity
