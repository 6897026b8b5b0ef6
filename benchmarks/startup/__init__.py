"""The time until a node is online and until a client has its first token."""
