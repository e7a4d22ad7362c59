"""Export a run's model as a Hugging Face folder: grpo-jax export --workdir=runs/x --out=folder

Weights of the newest checkpoint (or --step=N) with the tokenizer and settings of the model that training began from.
`transformers`, vLLM and others load the folder; a model card says what it was trained from and how. LoRA's adapters are merged
into the weights, or with --adapter written by themselves, as `peft` loads them. A run of the built-in decoder becomes a Llama
with a tokenizer of characters.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.tools.model_card import hub_id_of, push_to_hub, write_card

if TYPE_CHECKING:
    from grpo_jax.config import Config

flags.declare_key_flag("step")
flags.declare_key_flag("strict")
OUT = flags.DEFINE_string("out", None, "folder to write; absent or empty")
DTYPE = flags.DEFINE_string(
    "dtype", None, "of the weights: float32, bfloat16 or float16; that of the model training began from if not given"
)
MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "largest file of weights, in 10^9 bytes", lower_bound=1e-6)
PUSH_TO_HUB = flags.DEFINE_string("push_to_hub", None, "upload the folder too, as user/name on the Hugging Face hub")
ADAPTER = flags.DEFINE_bool("adapter", False, "of a LoRA run: the adapters alone, in PEFT's format, float32")


def main() -> None:
    """Run the command: export, then say what was written."""
    if not cli.WORKDIR.value or not OUT.value:
        raise UserError("--workdir or --out is missing; for example --workdir=runs/gtpo --out=runs/gtpo/hf")
    shard_bytes = round(MAX_SHARD_GB.value * 1e9)
    workdir = cli.workdir_of(cli.WORKDIR.value)
    step, what = export(
        str(workdir),
        OUT.value,
        cli.chosen_step(workdir),
        DTYPE.value,
        shard_bytes,
        is_adapter=ADAPTER.value,
        is_strict=cli.STRICT.value,
    )
    print(f"{OUT.value}: {what} after step {step}")
    if PUSH_TO_HUB.value:
        print(f"uploaded: {push_to_hub(pathlib.Path(OUT.value), PUSH_TO_HUB.value)}")


def export(
    workdir: str,
    out: str,
    step: int | None,
    dtype: str | None,
    max_shard_bytes: int,
    *,
    is_adapter: bool = False,
    is_strict: bool = False,
) -> tuple[int, str]:
    """Write a checkpoint as a Hugging Face folder.

    Args:
      workdir: folder of the run.
      out: folder to write; absent or empty.
      step: of the checkpoint; None: the newest that can be read.
      dtype: of the weights, one of DTYPES; None: that of the model training began from.
      max_shard_bytes: largest file of weights, bytes.
      is_adapter: write the adapters of a LoRA run alone, instead of merging them into the weights.
      is_strict: a damaged checkpoint is an error: no older one is taken.
    Returns: the step, and in words what was written.
    Raises: UserError if the run has no such checkpoint, no adapters, or `out` cannot be written.
    """
    from grpo_jax.models.export import export_folder, export_fresh
    from grpo_jax.models.folders import new_folder, require_new
    from grpo_jax.models.hf import stored_dtype
    from grpo_jax.models.lora import merge_adapters, split_adapters
    from grpo_jax.models.peft import save_adapters
    from grpo_jax.tasks.embedded import tokenizer_of
    from grpo_jax.training.checkpoint import require_step
    from grpo_jax.training.run import make_run

    config = exportable_config(workdir, is_adapter=is_adapter)
    source = config.model.path
    require_new(pathlib.Path(out))  # before a long load
    dtype = dtype or (stored_dtype(source) if source else "float32")
    require_step(pathlib.Path(workdir), step)
    run = make_run(config)
    # The task is closed as soon as the weights are here: its scoring processes have nothing to do in an export.
    try:
        step, policy = cli.restore_policy(run, pathlib.Path(workdir), step, is_strict=is_strict)
    finally:
        run.task.close()
    lora = run.model.lora
    if lora is not None and is_adapter:
        with new_folder(out) as folder:
            save_adapters(folder, split_adapters(policy)[1], run.model, hub_id_of(source))
            write_card(folder, config, pathlib.Path(workdir), step, is_adapter=True)
        return step, "adapters"
    # Merged unless asked otherwise: any program that knows the family can load the folder, also one that has no adapters.
    written = dtype
    if lora is not None:
        policy = merge_adapters(*split_adapters(policy), lora)
        written = f"{dtype}, adapters merged"
    if source:
        export_folder(out, policy, run.model.arch, source, dtype, max_shard_bytes)
    else:
        export_fresh(out, policy, run.model.arch, tokenizer_of(config).save, dtype, max_shard_bytes)
    write_card(pathlib.Path(out), config, pathlib.Path(workdir), step, is_adapter=False)
    return step, written


def exportable_config(workdir: str, *, is_adapter: bool) -> Config:
    """Read a run's config. Raises UserError if what it trained cannot be exported."""
    from grpo_jax.training.settings import read_config

    config = read_config(pathlib.Path(workdir))
    if is_adapter and not config.model.path:
        raise UserError(
            f"--adapter: {workdir} began from no Hugging Face folder, so there is nothing that adapters could be added to; "
            "leave the flag out"
        )
    if is_adapter and not config.lora.rank:
        raise UserError(f"--adapter: config.lora.rank of {workdir} is 0: all weights were trained, leave the flag out")
    return config


def command() -> None:
    """Run from the command line."""
    cli.run(main)
