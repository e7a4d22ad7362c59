"""Compile the programs of another commit, which cannot do it by itself, for chips that are not here.

    python experiments/studies/aot/other_commit.py CHECKOUT OUT v5e 2x2 --config=configs/dapo.py:smollm2 --shape=qwen2.5-0.5b

CHECKOUT is a clone at that commit; all that is imported comes from there. Writes OUT.update and OUT.rollout (text) and OUT.json
(bytes of a device, seconds to compile); `read.py` says the rest. Nothing is run: all that follows is an estimate.

For an H100 (h100 1x1x8, say) XLA_FLAGS has to name the folder of CUDA's compiler and to tune nothing:
--xla_gpu_cuda_data_dir=... --xla_gpu_autotune_level=0.
"""

import ast
import json
import os
import pathlib
import sys
import time

PLAN = pathlib.Path(__file__).parents[3] / "grpo_jax/tools/plan/aot.py"


def main(checkout: str, out: str, chip: str, topology: str, *given: str) -> None:
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    sys.path[0] = checkout

    import jax
    from absl import flags
    from jax.experimental import topologies
    from jax.sharding import AxisType

    from grpo_jax.parallel.sharding import AXES
    from grpo_jax.tools import cli
    from grpo_jax.tools.plan import command, compiled, job

    assert command  # it has the flags

    flags.FLAGS(["other_commit", *given])
    if chip == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=description_of_h100(), topology=topology
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{topology}")
    devices = described.devices
    asked = flags.FLAGS
    planned = job.make_job(cli.config_from_flags(), asked.shape, asked.prompt_tokens, len(devices))
    sizes = tuple(planned.mesh.shape[axis] for axis in AXES)
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    compiled.make_mesh = lambda _: mesh
    found = {}
    for name in ("update", "rollout"):
        began = time.perf_counter()
        program = getattr(compiled, f"compile_{name}")(planned)
        memory = program.memory_analysis()
        pathlib.Path(f"{out}.{name}").write_text(program.as_text(), encoding="utf-8")
        found[name] = {
            "compile_secs": time.perf_counter() - began,
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    pathlib.Path(f"{out}.json").write_text(json.dumps(found), encoding="utf-8")


def description_of_h100() -> str:
    """Read what this commit's planner tells XLA:GPU; importing it would import this commit's package."""
    statements = ast.parse(PLAN.read_text(encoding="utf-8")).body
    assigned = [each for each in statements if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "H100"]
    return ast.literal_eval(assigned[0].value)


if __name__ == "__main__":
    main(*sys.argv[1:])
