"""The gateway: OpenAI HTTP in, tokens to and from the cluster. Never imports torch."""
