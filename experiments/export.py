"""A run's model as a Hugging Face folder: python -m experiments.export --workdir=runs/x --out=folder

Weights of the newest checkpoint (or --step=N) with the tokenizer and settings of the model that training began from.
`transformers`, vLLM and others load the folder.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import cli
from experiments.evaluate import config_of, restored_state
from grpo_jax import trainer
from grpo_jax.errors import UserError
from grpo_jax.models.export import DTYPES, export_folder, require_new
from grpo_jax.models.hf import stored_dtype

OUT = flags.DEFINE_string("out", None, "folder to write; absent or empty")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")
DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "of the weights; that of the model training began from if not given")
MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "largest file of weights, in 10^9 bytes", lower_bound=1e-6)


def main() -> None:
    if not cli.WORKDIR.value or not OUT.value:
        raise UserError("--workdir or --out is missing; for example --workdir=runs/gtpo --out=runs/gtpo/hf")
    step, dtype = export(cli.WORKDIR.value, OUT.value, STEP.value, DTYPE.value, round(MAX_SHARD_GB.value * 1e9))
    print(f"{OUT.value}: the model after step {step}, {dtype}")


def export(workdir: str, out: str, step: int | None, dtype: str | None, max_shard_bytes: int) -> tuple[int, str]:
    """Write checkpoint `step` of `workdir` (None: the newest) to `out`; -> the step and dtype written. Raises UserError."""
    config = config_of(pathlib.Path(workdir))
    source = config.model.path
    if not source:
        raise UserError(
            f"--workdir={workdir}: config.model.path is empty: the decoder and tokenizer are built in, and no other program "
            "knows them; train from a Hugging Face folder"
        )
    require_new(pathlib.Path(out))  # before a long load
    dtype = dtype or stored_dtype(source)
    run = trainer.make_run(config)
    try:
        state = restored_state(run, pathlib.Path(workdir), step)
        export_folder(out, state.params, run.model.arch, source, dtype, max_shard_bytes)
    finally:
        run.task.close()
    return int(state.step), dtype


if __name__ == "__main__":
    cli.run(main)
