"""From a name or a folder to the tensors of a span."""
