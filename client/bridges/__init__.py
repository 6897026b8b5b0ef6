"""The client for programs that do not run trio."""
