"""What a peer knows of the swarm: records, and how they spread."""
