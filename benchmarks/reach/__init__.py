"""How nodes behind NAT are reached: circuits, hole punching, and the time until a node is of use."""
