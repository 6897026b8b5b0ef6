"""Which chain of hops a session takes."""
