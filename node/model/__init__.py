"""What a model is made of: architecture, checkpoint, span, ends.  Imports no libp2p and no trio."""
