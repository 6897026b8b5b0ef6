"""/v1/responses, without a store: OpenAI's newer form of a chat, with typed items and events."""
