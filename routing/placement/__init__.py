"""Which blocks a server takes."""
