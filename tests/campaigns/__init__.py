"""Campaigns: what is done to a run by hand or by chance, many times over. Each module has a command, a count and a seed."""
