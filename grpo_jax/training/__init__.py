"""A run: its parts built from a config, its loop, its records and checkpoints."""
