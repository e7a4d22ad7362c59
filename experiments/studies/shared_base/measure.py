"""Adapters of k runs on one frozen base: seconds a step and bytes, in one call with one base, with k bases, and in turn.

    python -m experiments.studies.shared_base.measure --members=4 > experiments/studies/shared_base/results.json
    python -m experiments.studies.shared_base.measure --members=5 --objectives

A fresh decoder, as no model folder is needed to count bytes and to multiply matrices; task `chain`, a few steps after a first
one, the median of them. Of a machine that others use too, take `cpu_secs`, the processor's time, and not `step_secs`, the
clock's. Bytes are those that XLA's compiler counts for the program that makes a step.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import jax

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.training.run import make_run
from grpo_jax.training.stacking import places_of, several_of, stack_states

STEPS = 3
VARIANTS = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")


def config_of(args, member):
    """Return the config of one member: KL coefficients of GRPO, or the variants without a KL."""
    raw = base.get_config("tiny", VARIANTS[member % len(VARIANTS)] if args.objectives else "grpo")
    raw.update_from_flattened_dict(
        {
            "task.name": "chain",
            "model.dim": args.dim,
            "model.ffn_dim": 4 * args.dim,
            "model.num_layers": args.layers,
            "lora.rank": 8,
            "warm_start.num_steps": 0,
            "steps_per_call": 1,
            "rollout.num_prompts": 4,
            "objective.kl_coef": 0.0 if args.objectives else 0.01 * (1 + member),
            "mesh.data": 1,
        }
    )
    return parse_config(raw)


def time_calls(iterates, states):
    """Median seconds in which every state makes a step by its function, and the bytes of the first. states: donated."""
    programs = {id(iterate): iterate.lower(state).compile() for iterate, state in zip(iterates, states, strict=True)}
    compiled = [programs[id(iterate)] for iterate in iterates]
    memory = compiled[0].memory_analysis()
    secs, cpu_secs = [], []
    for _ in range(STEPS + 1):
        began, began_cpu = time.monotonic(), time.process_time()
        states = [call(state)[0] for call, state in zip(compiled, states, strict=True)]
        jax.block_until_ready(states)
        secs.append(time.monotonic() - began)
        cpu_secs.append(time.process_time() - began_cpu)
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp")}
    found = {"step_secs": statistics.median(secs[1:]), "cpu_secs": statistics.median(cpu_secs[1:]), **sizes}
    print(found, file=sys.stderr, flush=True)  # what is known already, of a long call
    return found


def main():
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--objectives", action="store_true", help="the five variants, and not one with several KL coefficients")
    args = parser.parse_args()
    configs = [config_of(args, i) for i in range(args.members)]
    run = make_run(configs[0])
    runs = [run.with_config(config) for config in configs]
    several = several_of(configs)
    places = places_of(configs, several)

    def states():
        return [each.initial_state() for each in runs]

    def in_one_call(*, shares_base):
        iterate = run.vmapped(shares_base=shares_base, several=several).iterate
        return time_calls([iterate], [stack_states(states(), shares_base=shares_base, places=places)])

    first = states()[0]
    base_bytes, adapter_bytes = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (first.base, first.params))
    found = {
        "in turn": time_calls([each.iterate for each in runs], states()),
        "one call, k bases": in_one_call(shares_base=False),
        "one call, one base": in_one_call(shares_base=True),
    }
    found["in turn"]["argument"] *= args.members  # of which each is a program by itself
    report = {
        "command": f"python -m experiments.studies.shared_base.measure {' '.join(sys.argv[1:])}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "device": str(jax.devices()[0].device_kind),
        "members": args.members,
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "found": found,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
