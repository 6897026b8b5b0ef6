"""Ports that the router of a home forwards to this node: NAT-PMP, else UPnP."""
