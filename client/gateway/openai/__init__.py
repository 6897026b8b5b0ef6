"""OpenAI's endpoints: requests read and checked, answers and streams in OpenAI's shapes."""
