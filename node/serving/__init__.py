"""What a serving node adds: listener, session, engine, cache."""
