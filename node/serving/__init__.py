"""The parts of a serving node: listener, session, engine, cache."""
