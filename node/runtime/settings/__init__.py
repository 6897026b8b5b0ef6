"""Where a flag's value comes from: the command line, the environment, a file, or its default."""
