"""From logits to text: sampling, the loop, and a conversation's tokens."""
