"""What a process tells its operator: structured logs and Prometheus metrics."""
