"""The parts of a model: architecture, checkpoint, span, head.  Imports no libp2p and no trio."""
