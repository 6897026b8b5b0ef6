"""The scheduler: batches of steps on the torch thread."""
