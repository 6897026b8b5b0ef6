"""Warm standbys of a session's hops: peers whose caches follow."""
