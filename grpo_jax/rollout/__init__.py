"""Prompts -> completions: the distribution, the loops that draw tokens, and the rollout made of them."""
