"""The shares of one peer in this node's time and memory: turns, frames under way, streams of py-libp2p."""
