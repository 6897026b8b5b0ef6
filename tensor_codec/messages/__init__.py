"""The messages of our protocols, one module each."""
