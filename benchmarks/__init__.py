"""Numbers, never asserted in CI."""
