"""Group-relative policy optimisation in JAX: GRPO, DAPO, Dr. GRPO, GTPO and GRPO-S on one set of axes."""

__version__ = "0.1.0"
