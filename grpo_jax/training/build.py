"""Config -> the objects of a run: tokenizer, task, model. The one place that knows which class a name stands for."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import PyTree

from grpo_jax import objectives
from grpo_jax.config import Config, LoRAConfig
from grpo_jax.config.embedded import EMBEDDED
from grpo_jax.errors import UserError
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.fingerprint import TOKENIZER, WEIGHTS, fingerprint
from grpo_jax.models.folders import resolve
from grpo_jax.models.lora import ALL_LINEAR, DELTA_TARGETS, LoRA, init_adapters, targets_of
from grpo_jax.models.transformer import ModelDef, init_params
from grpo_jax.parallel import hosts
from grpo_jax.parallel.finite import find_not_finite
from grpo_jax.rng import key_for
from grpo_jax.tasks import Task, Tokenizer
from grpo_jax.tasks.embedded import make_embedded, tokenizer_of
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.sources import load_data
from grpo_jax.tasks.tokenizers import HFTokenizer
from grpo_jax.training.warm_start import make_warm_start
from grpo_jax.types import Params


def make_task(config: Config) -> Task:
    """Make the task that config.task names, with the model's tokenizer (built-in characters without a model folder)."""
    tokenizer: Tokenizer = tokenizer_of(config)
    if config.model.path:
        tokenizer = HFTokenizer(config.model.path, config.task.chat_template)
    task: Task
    if config.task.name in EMBEDDED:
        task = make_embedded(config, tokenizer)
    else:
        task = HostTask(config, tokenizer, load_data(config))
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.check_length(task.prompt_tokens, config.rollout.max_completion_tokens)
    return task


def sources_of(config: Config) -> dict[str, str]:
    """Mark the files outside of its folder that a run is made of: field of the config or own function -> fingerprint."""
    own = objectives.sources(config.objective)
    if not config.model.path:
        return own
    folder = resolve(config.model.path)
    return own | {"model.path": fingerprint(folder, WEIGHTS), "model.path.tokenizer": fingerprint(folder, TOKENIZER)}


def make_model(config: Config, tokenizer: Tokenizer) -> ModelDef:
    """Make the decoder's static half: from the folder's config.json, or of the configured size for a built-in tokenizer."""
    size = config.model
    if size.path:
        from grpo_jax.models.families import read_architecture

        arch = read_architecture(size.path)
    else:
        arch = Architecture(
            vocab_size=tokenizer.vocab_size,
            dim=size.dim,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.dim // size.num_heads,
            ffn_dim=size.ffn_dim,
        )
    lora = lora_of(config.lora, arch) if config.lora.rank else None
    is_router_frozen = size.router == "frozen"
    if is_router_frozen and not arch.num_experts:
        raise UserError("config.model.router = 'frozen': the model has no experts and so no router; leave it out")
    if size.numerics == "exact" and arch.num_experts:
        raise UserError(
            "config.model.numerics = 'exact': an expert's product is of all tokens that chose it, and its numbers hang on "
            "how many these are; set it to 'fast'"
        )
    if size.numerics == "exact" and "gated_delta" in arch.mixers:
        raise UserError(
            "config.model.numerics = 'exact': a gated delta net adds a prompt up in chunks and a completion token by token; "
            "set it to 'fast'"
        )
    static: dict[str, Any] = {"dtype": size.dtype, "remat": size.remat, "numerics": size.numerics, "attention": size.attention}
    return ModelDef(arch, **static, lora=lora, is_router_frozen=is_router_frozen)


def lora_of(config: LoRAConfig, arch: Architecture) -> LoRA:
    """Make the settings of a model's adapters. Raises UserError naming a matrix that the model has not."""
    targets, there = config.targets, targets_of(arch)
    if targets == (ALL_LINEAR,):
        targets = there
    missing = [name for name in targets if name not in there]
    if missing:
        raise UserError(f"config.lora.targets: the model has no {missing[0]}; it has {', '.join(there)}")
    left_out = [name for name in DELTA_TARGETS if name in there and name not in targets]
    # The default names are those of attention and MLP: of a stack of gated delta nets not all that one would expect.
    if left_out and jax.process_index() == 0:
        print(f"config.lora.targets: no adapters on {', '.join(left_out)}; ('{ALL_LINEAR}',) has them too", file=sys.stderr)
    return LoRA(config.rank, config.alpha, targets, config.use_rslora)


def initial_params(config: Config, model: ModelDef, task: Task, shardings: PyTree[Sharding]) -> Params:
    """Make the weights to start from, without adapters: loaded, or fresh and warm-started on worked answers.

    A warm start is a small decoder's: it runs on one device, so that its result does not depend on the mesh.

    Args:
      config: model, warm_start and seed are read. model: decoder. task: of the worked answers.
      shardings: of each weight; loaded and fresh ones are created in them.
    Returns: float32 if they are trained; frozen under adapters, they need no more precision than they are computed with.
    """
    if config.model.path:
        from grpo_jax.models.hf import load_params

        dtype = jnp.float32 if model.lora is None else model.dtype
        return load_params(config.model.path, model.arch, dtype, shardings)
    init = functools.partial(init_params, model.arch)
    key = key_for(config.seed, "init")
    if not config.warm_start.num_steps:
        return jax.jit(init, out_shardings=shardings)(key)
    # All weights take part in a warm start: adapters come on top of what it has taught.
    # There is no sampler to agree with, so its numbers need not be exact. Its kernels are those of one device: those of the run
    # would take part in a program of all processes.
    hardware = model.hardware and dataclasses.replace(model.hardware, mesh=None)
    decoder = dataclasses.replace(model, lora=None, numerics="fast", hardware=hardware)
    warm_start = make_warm_start(decoder, task, config.warm_start, config.learner.logprob_chunk_tokens)
    # Each process has made it on a device of its own. Arrays over several processes must be the same in all of them, so the
    # result of the first counts.
    weights = hosts.make_global_array(hosts.broadcast_from_process0(warm_start(init(key), config.seed)), shardings)
    if find_not_finite(weights):
        rate = config.warm_start.learning_rate
        raise UserError(f"config.warm_start.learning_rate = {rate}: too high, the warm start ended in NaN or infinity")
    return weights


def initial_adapters(config: Config, model: ModelDef, shardings: PyTree[Sharding]) -> Params:
    """Load the adapters of config.lora.path, or make fresh ones that change nothing yet.

    Args:
      config: lora.path and seed are read. model: with its LoRA. shardings: of each adapter.
    Returns: float32 adapters.
    """
    if config.lora.path:
        from grpo_jax.models.peft import load_adapters

        return hosts.make_global_array(load_adapters(config.lora.path, model), shardings)
    init = functools.partial(init_adapters, model.param_shapes())
    return jax.jit(init, out_shardings=shardings)(key_for(config.seed, "adapters"))
