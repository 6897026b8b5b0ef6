"""The transformers API over a swarm, measured."""
