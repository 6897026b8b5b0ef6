"""The common parts of all commands: threads, nurseries, logs, arguments, the terminal."""
