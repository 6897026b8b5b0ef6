"""Adapters that people share: their cards, and what is known of a name.  Pure."""
