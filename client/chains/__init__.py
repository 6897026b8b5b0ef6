"""The chains that a client takes, and its memory of peers."""
