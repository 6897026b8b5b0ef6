"""The only importers of libp2p: host, identity, membership, streams, directory."""
