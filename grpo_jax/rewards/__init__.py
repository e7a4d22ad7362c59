"""Completions -> worth: scorers, the worker processes they run in, and shaping."""
