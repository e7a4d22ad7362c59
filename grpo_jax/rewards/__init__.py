"""Completions -> rewards: scorers, the worker processes they run in, and shaping."""
