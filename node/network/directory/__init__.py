"""Who is in the swarm: records, pings, and the way in."""
