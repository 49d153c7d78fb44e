"""The HTTP surface: OpenAI's routes, SGLang's native ones, health and metrics."""
