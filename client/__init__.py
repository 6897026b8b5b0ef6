"""Use a swarm from Python.  Read `client/connect.py` first."""
