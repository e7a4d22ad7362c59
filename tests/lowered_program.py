"""The hash of a run's program as the compiler gets it: python -m tests.lowered_program"""

import hashlib

from grpo_jax.training.run import make_run
from tests import tiny

# Rounds and microbatches, for the metrics of both are merged.
CHANGES = {
    "dynamic_sampling.enabled": True,
    "dynamic_sampling.max_sampling_rounds": 3,
    "learner.num_microbatches": 2,
    "steps_per_call": 1,
    "warm_start.num_steps": 0,
}

if __name__ == "__main__":
    run = make_run(tiny.config_of("dapo", CHANGES))
    program = run.iterate.lower(run.abstract_state).as_text()
    print(hashlib.sha256(program.encode()).hexdigest())
