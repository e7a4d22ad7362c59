"""Does transformers continue prompts as we do, with what a run exported? Greedy, token by token.

    python -m experiments.export --workdir=runs/smollm2 --out=runs/smollm2/hf --dtype=float32
    python -m experiments.studies.smollm2.same_text --workdir=runs/smollm2 --exported=runs/smollm2/hf
    python -m experiments.export --workdir=runs/lora --out=runs/lora/peft --adapter
    python -m experiments.studies.smollm2.same_text --workdir=runs/lora --exported=runs/lora/peft        # needs peft

A difference is only allowed where transformers' two best logits lie within `TIE` of each other.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from grpo_jax.config import RolloutConfig
from grpo_jax.errors import UserError
from grpo_jax.models.peft import CONFIG as ADAPTER_CONFIG
from grpo_jax.rollout.rollout import EndTokens, greedy, rollout, row_keys
from grpo_jax.tools import cli
from grpo_jax.training.run import make_run
from grpo_jax.training.settings import read_config
from grpo_jax.types import Prompts

flags.declare_key_flag("step")
flags.declare_key_flag("strict")
EXPORTED = flags.DEFINE_string("exported", None, "Hugging Face folder, or PEFT's with --adapter")
NUM_TOKENS = 64
TIE = 1e-4
PROMPTS = (
    "The capital of France is",
    "12 + 30 = 42\n7 + 8 = 15\n21 + 17 =",
    "Once upon a time, there was a",
    "def add(a, b):\n    return",
    "Water boils at",
    "The three primary colours are",
    "My favourite book is",
    "To bake bread, first",
)


def main() -> None:
    """Compare our greedy continuations with those of transformers. Raises UserError without the two folders."""
    import torch
    from transformers import AutoModelForCausalLM

    if not cli.WORKDIR.value or not EXPORTED.value:
        raise UserError("--workdir or --exported is missing; see the commands at the top of this file")
    workdir, exported = pathlib.Path(cli.WORKDIR.value), pathlib.Path(EXPORTED.value)
    run = make_run(read_config(workdir))
    _, policy = cli.restore_policy(run, workdir, cli.chosen_step(workdir), is_strict=cli.STRICT.value)
    tokenizer: Any = run.task.tokenizer
    run.task.close()
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    # Padded on the left: completions begin at the same slot in all rows.
    width = max(map(len, prompts))
    mask_PS = np.arange(width)[None] >= np.array([width - len(ids) for ids in prompts])[:, None]
    tokens_PS = np.array([[0] * (width - len(ids)) + ids for ids in prompts], np.int32)
    config = greedy(RolloutConfig(max_completion_tokens=NUM_TOKENS))
    ends = EndTokens(tokenizer.eos_ids, tokenizer.pad_id)
    rolled = jax.jit(lambda params, prompts, keys: rollout(run.model, params, prompts, keys, config, ends))(
        policy,
        Prompts(jnp.asarray(tokens_PS), jnp.asarray(mask_PS), jnp.arange(len(prompts))),
        row_keys(jax.random.key(0), len(prompts), 1),
    )

    # float32 on both sides: bfloat16 has few digits, and its ties would hide real differences. A folder of adapters has no
    # weights of its own, so PEFT puts them on the model that the run began with.
    if (exported / ADAPTER_CONFIG).exists():
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(run.config.model.path, dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, exported)
    else:
        model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    # Transformers gets our own tokens, one pass a prompt: its best next token at each place must be the one that we took.
    num_same = num_ties = 0
    for ids, ours, mask in zip(prompts, np.asarray(rolled.tokens_PGT[:, 0]), np.asarray(rolled.mask_PGT[:, 0]), strict=True):
        ours = ours[mask > 0].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids + ours])).logits[0, len(ids) - 1 : -1]
        theirs = logits.argmax(-1).tolist()
        best = logits.topk(2).values
        for t, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b and (best[t, 0] - best[t, 1]).item() < TIE:
                num_ties += 1
                break  # from here on the texts may part
            assert a == b, (
                f"{tokenizer.decode(ids)!r}: token {t} is {tokenizer.decode([a])!r}, theirs {tokenizer.decode([b])!r}"
            )
            num_same += 1
        print(repr(tokenizer.decode(ours))[:100])
    print(f"{num_same} tokens of {len(PROMPTS)} continuations are those of transformers, {num_ties} ties")


if __name__ == "__main__":
    cli.run(main)
