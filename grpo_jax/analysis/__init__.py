"""Statistics over samples and over runs."""
