"""Completions -> update: log-probabilities, advantages over whole groups, batching, the optimizer, the train step."""
