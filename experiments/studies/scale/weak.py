"""Weak scaling by simulation: what a device sends in a compiled update as devices are added and its rows stay the same.

XLA_FLAGS="--xla_force_host_platform_device_count=256 --xla_backend_optimization_level=0" JAX_PLATFORMS=cpu \\
    python -m experiments.studies.scale.weak
"""

from __future__ import annotations

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.tools.plan import collectives, compiled, memory, times
from grpo_jax.tools.plan.job import make_job

CHANGES = {
    "warm_start.num_steps": 0,
    "model.dim": 256,
    "model.num_layers": 6,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.ffn_dim": 704,
    "rollout.max_completion_tokens": 32,
    "mesh.fsdp_min_elements": 0,
    "objective.kl_coef": 0.0,
}
# Rows grow with data x fsdp, so a device has the same work everywhere: what grows in the table grows with the devices alone.
FIXED_FSDP = [(n // 8, 8) for n in (8, 16, 32, 64, 128, 256)]
GROWING_FSDP = [(8, n // 8) for n in (16, 32, 64, 128, 256)]


def main() -> None:
    """Print the table: what the compiled update sends, beside the bytes that are derived from the layout."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    print("| data x fsdp | " + " | ".join(f"{kind}: count, MB" for kind in kinds) + " | derived MB | memory MB, derived |")
    print("|---|---|---|---|---|---|")
    # min_elements 0: the decoder is small so that it compiles, but it is sharded as a large one would be.
    for data, fsdp in FIXED_FSDP + GROWING_FSDP:
        raw = base.get_config()
        raw.update_from_flattened_dict({**CHANGES, "mesh.data": data, "mesh.fsdp": fsdp, "rollout.num_prompts": data * fsdp})
        job = make_job(parse_config(raw), "", 32, data * fsdp)
        program = compiled.compile_update(job)
        found = collectives.traffic(compiled.hlo_text(program))
        cells = []
        for kind in kinds:
            of_kind = [each for each in found if each.kind == kind]
            cells.append(f"{sum(e.count for e in of_kind):g}, {sum(e.num_bytes for e in of_kind) / 1e6:.2f}")
        derived = sum(each.num_bytes for each in times.sent_by(job) if each.phase == times.UPDATE)
        held, planned = compiled.temporary_bytes(program), memory.phase_bytes(memory.parts_of(job), memory.UPDATE)
        cells += [f"{derived / 1e6:.2f}", f"{held / 1e6:.1f}, {planned / 1e6:.1f}"]
        print(f"| {data} x {fsdp} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
