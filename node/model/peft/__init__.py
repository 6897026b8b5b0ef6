"""Adapters in the form of peft: its configs and folders, read against a model and written."""
