"""What every command of the process needs: threads, nurseries, logs, arguments, the terminal."""
