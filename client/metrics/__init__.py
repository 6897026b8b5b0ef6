"""What a client measures, for Prometheus: its sessions, their steps, faults and recoveries."""
