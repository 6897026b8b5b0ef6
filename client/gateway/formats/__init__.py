"""What a text should be: JSON by a schema, calls of tools, and the chat templates that ask for them."""
