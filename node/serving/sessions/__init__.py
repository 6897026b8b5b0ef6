"""Sessions of clients: their streams, their state, and where their answers go."""
