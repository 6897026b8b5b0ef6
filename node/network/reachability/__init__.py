"""Whether others can dial this node: peers are asked to try, and the answer stands in the node's record."""
