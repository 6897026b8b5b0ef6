"""Reaching peers behind NAT: circuits through relays, and direct ways that come of them."""
