"""Giving adapters to others: cards, manifests and blobs, and the entries by which seeders are found."""
