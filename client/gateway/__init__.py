"""The gateway: a swarm behind OpenAI's HTTP API, an asyncio program.  Read `command.py` first."""
