"""The devices of a node: where its blocks lie, what fits there, and the ranks that divide blocks."""
