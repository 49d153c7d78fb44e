"""Configuration: one frozen struct per service, filled from file, environment and flags."""
