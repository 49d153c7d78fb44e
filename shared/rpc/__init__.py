"""gRPC with generic handlers and msgspec messages: no protoc step, typed errors, one shared token."""
