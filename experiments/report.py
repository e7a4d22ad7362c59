"""python -m experiments.report: see grpo_jax/tools/report/."""

from grpo_jax.tools.report.command import main

if __name__ == "__main__":
    main()
