"""A span over several devices: its blocks one after the other (split), or each block on all (sharded)."""
