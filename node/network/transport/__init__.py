"""From a TCP socket to muxed, encrypted streams."""
