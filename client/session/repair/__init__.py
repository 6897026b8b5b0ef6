"""What a session decides when hops are late, slow or gone.  Pure."""
