"""The process, `python -m node`.  Read `node/main.py` first."""
