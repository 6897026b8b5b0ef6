"""Who may ask, and how much: keys, hosts, limits of bodies and headers, rates, the admission queue."""
