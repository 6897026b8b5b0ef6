"""The decisions of a session when hops are late, slow or gone.  Pure."""
