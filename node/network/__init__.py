"""Peers and streams: the host, addresses, dialling.  No other package imports libp2p."""
