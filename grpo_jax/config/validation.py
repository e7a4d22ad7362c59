"""Checks of a config that types cannot make: ranges, choices and combinations. Every message names the field and the fix."""

from __future__ import annotations

import json
import re
from typing import Any

from grpo_jax import objectives
from grpo_jax.config import reward_expression
from grpo_jax.config.schema import TARGETS, Config
from grpo_jax.errors import UserError
from grpo_jax.files import is_text
from grpo_jax.knobs import walk
from grpo_jax.objectives.ratios import SEQUENCE_RATIOS


def validate(config: Config) -> None:
    """Check values and combinations that types cannot. Raises UserError naming the field, its value and the fix."""
    # All checks that need nothing but the config are here, once, and the code that is given a Config has none. What depends on
    # the devices or the task's class is checked where these are known (training/run.py), and files where they are read.
    # Ranges come first: the checks of combinations divide by these numbers.
    _check_knobs(config)
    _check_operands(config)
    _require_objective(config)
    _require_reward(config)
    _require_generators(config)
    rollout, learner, objective = config.rollout, config.learner, config.objective
    if rollout.group_size < 2:
        raise UserError(
            f"config.rollout.group_size = {rollout.group_size}: advantages compare the completions of a prompt, use at least 2"
        )
    if rollout.num_prompts % learner.num_minibatches:
        raise UserError(
            f"config.learner.num_minibatches = {learner.num_minibatches}: must divide "
            f"config.rollout.num_prompts = {rollout.num_prompts}"
        )
    if objective.ratio in SEQUENCE_RATIOS and objective.aggregation != "sequence_mean":
        raise UserError(
            f"config.objective.aggregation = {objective.aggregation!r}: a {objective.ratio!r} ratio has one value a row, "
            "use 'sequence_mean'"
        )
    if config.overlong.cache_tokens > rollout.max_completion_tokens:
        raise UserError(
            f"config.overlong.cache_tokens = {config.overlong.cache_tokens}: must be at most "
            f"config.rollout.max_completion_tokens = {rollout.max_completion_tokens}"
        )
    if not config.model.path:
        if config.task.name != "arithmetic":
            raise UserError(
                f"config.model.path is empty: task {config.task.name!r} needs a model, give a Hugging Face folder or hub id"
            )
        if config.model.num_heads % config.model.num_kv_heads or config.model.dim % (2 * config.model.num_heads):
            raise UserError(
                f"config.model.dim = {config.model.dim}: must be a multiple of 2 * num_heads = {2 * config.model.num_heads}, "
                f"and num_heads of num_kv_heads = {config.model.num_kv_heads}"
            )
    _require_importance(config)
    _require_checkpoints(config)
    _require_adapters(config)
    _check_steps_per_call(config)
    _check_async(config)
    _require_mesh(config)
    if config.warm_start.num_steps and config.task.name != "arithmetic":
        raise UserError(
            f"config.warm_start.num_steps = {config.warm_start.num_steps}: task {config.task.name!r} has no worked answers, "
            "set it to 0"
        )


def _require_objective(config: Config) -> None:
    """Check that the objective's names are in the tables of their axes."""
    # The tables are where the functions are, and know best what they hold; here the message gets the config's prefix.
    try:
        objectives.check_choices(config.objective)
    except ValueError as error:
        raise UserError(f"config.{error}") from None


def _require_checkpoints(config: Config) -> None:
    """Check which checkpoints are kept for good."""
    kept = config.checkpoint
    if not kept.keep and (kept.keep_every or kept.keep_best):
        raise UserError(
            "config.checkpoint.keep = 0: a finished run keeps none, but keep_every or keep_best asks for some; use 1"
        )
    if kept.keep_every and (not kept.every or kept.keep_every % kept.every):
        raise UserError(
            f"config.checkpoint.keep_every = {kept.keep_every}: must be a multiple of config.checkpoint.every = {kept.every}"
        )
    if kept.keep_best and not kept.keep_best.startswith("eval/"):
        raise UserError(f"config.checkpoint.keep_best = {kept.keep_best!r}: a metric of the evaluation, such as eval/success")


def _require_importance(config: Config) -> None:
    """Check truncated importance sampling, which compares the learner's log-probabilities with the sampler's."""
    # A cap below 1 would weigh tokens down on which both agree exactly.
    cap, old_logp = config.learner.importance_cap, config.learner.old_logp
    if 0 < cap < 1:
        raise UserError(f"config.learner.importance_cap = {cap}: at least 1, the weight where the two agree, or 0 for none")
    if cap and old_logp != "learner":
        raise UserError(
            f"config.learner.importance_cap = {cap}: there is nothing to weigh with config.learner.old_logp = {old_logp!r}, "
            "set that to 'learner'"
        )


def _check_steps_per_call(config: Config) -> None:
    """Check that evaluation, saving and logging fall between calls, for inside one nothing else can happen."""
    for name in ("num_steps", "eval_every", "checkpoint.every", "log.completions_every"):
        value = _field(config, name)
        if config.steps_per_call and value % config.steps_per_call:
            raise UserError(f"config.{name} = {value}: must be a multiple of config.steps_per_call = {config.steps_per_call}")


def _check_async(config: Config) -> None:
    """Check settings that do not go together with batches sampled one step ahead."""
    # When such a batch is trained on, the weights that sampled it are gone: old_logp cannot be computed again.
    if config.async_steps and config.steps_per_call:
        raise UserError(
            f"config.async_steps = {config.async_steps}, config.steps_per_call = {config.steps_per_call}: one is for tasks of "
            "the host, the other for tasks of the device; set one of them to 0"
        )
    if config.async_steps and config.learner.old_logp != "sampler":
        raise UserError(
            f"config.learner.old_logp = {config.learner.old_logp!r}: with config.async_steps = {config.async_steps} "
            "the learner has moved on from the policy that sampled, set it to 'sampler'"
        )


def _require_mesh(config: Config) -> None:
    """Check the sizes of the mesh axes among each other; whether there are so many devices, `make_mesh` knows."""
    axes = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    for axis, size in axes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} = {size}: a number of devices, or -1 for what the other axes leave")
    if list(axes.values()).count(-1) > 1:
        wanted = ", ".join(f"{axis} = {size}" for axis, size in axes.items())
        raise UserError(f"config.mesh: {wanted}: only one axis can take what is left, say how many devices the others have")


def _require_adapters(config: Config) -> None:
    """Check the matrices that get adapters, and that a PEFT folder comes with the settings it was made with."""
    lora = config.lora
    unknown = [name for name in lora.targets if name not in TARGETS]
    if unknown or not lora.targets:
        raise UserError(f"config.lora.targets = {lora.targets!r}: one or more of {', '.join(TARGETS)}")
    if lora.path and not lora.rank:
        raise UserError(f"config.lora.path = {lora.path!r}: set config.lora.rank, alpha and targets as they were made")


def _require_reward(config: Config) -> None:
    """Check that the reward's expressions can be read, and fit the task."""
    # Before a model is loaded, and not when the first completion is scored.
    task, reward = config.task, config.reward
    for name in ("task", "shaping"):
        field, expression = f"config.reward.{name}", getattr(reward, name)
        parts = [part.name for part in reward_expression.parse(expression, field)]
        if parts and task.name == "arithmetic":
            raise UserError(f"{field} = {expression!r}: task 'arithmetic' has a reward of its own, leave it empty")
        if "reasoning_gym" in parts and task.name != "reasoning_gym":
            raise UserError(f"{field} = {expression!r}: only questions of task 'reasoning_gym' can be scored by it")
        if "regex" in parts and not reward.regex.pattern:
            raise UserError(f"config.reward.regex.pattern is empty: {field} = {expression!r} needs it")
    for name in ("regex", "format"):
        pattern = getattr(reward, name).pattern
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.reward.{name}.pattern = {pattern!r}: not a regular expression, {error}") from None
    if task.name == "arithmetic" and task.system_prompt:
        raise UserError(f"config.task.system_prompt = {task.system_prompt!r}: task 'arithmetic' has none, leave it empty")
    if task.name == "arithmetic" and task.num_shots:
        raise UserError(f"config.task.num_shots = {task.num_shots}: task 'arithmetic' has config.task.arithmetic.num_shots")


def _require_generators(config: Config) -> None:
    """Check the mixture of reasoning-gym generators."""
    # Whether a generator exists, the library alone knows: it is asked when the task is made.
    gym, field = config.task.reasoning_gym, "config.task.reasoning_gym"
    if not gym.datasets or len(set(gym.datasets)) < len(gym.datasets):
        raise UserError(f"{field}.datasets = {gym.datasets!r}: name at least one generator, and none twice")
    if gym.weights and (len(gym.weights) != len(gym.datasets) or not min(gym.weights) > 0):
        raise UserError(f"{field}.weights = {gym.weights!r}: one number above 0 for each of {', '.join(gym.datasets)}")
    try:
        params = json.loads(gym.params or "{}")
    except ValueError as error:
        raise UserError(f"{field}.params = {gym.params!r}: not JSON ({error})") from None
    if not isinstance(params, dict) or not all(isinstance(value, dict) for value in params.values()):
        raise UserError(f"{field}.params = {gym.params!r}: must be {{generator: {{setting: value}}}}")
    unknown = sorted(set(params) - set(gym.datasets))
    if unknown:
        raise UserError(f"{field}.params: {unknown[0]!r} is not among {field}.datasets = {gym.datasets!r}")


def _check_knobs(config: Config) -> None:
    """Check that every field is in the range, and among the choices, that its declaration gives."""
    for name, value, declared in walk(config):
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(each, str) and not is_text(each) for each in texts):
            raise UserError(f"config.{name} = {value!r}: holds a zero byte, or half of a character (a lone surrogate)")
        complaint = declared.complaint(value) if declared else ""
        if complaint:
            raise UserError(f"config.{name} = {value!r}: {complaint}")


def _check_operands(config: Config) -> None:
    """Check that the arithmetic task has problems to give."""
    if config.task.arithmetic.max_operand <= config.task.arithmetic.min_operand:
        raise UserError(
            f"config.task.arithmetic.max_operand = {config.task.arithmetic.max_operand}: must be above "
            f"min_operand = {config.task.arithmetic.min_operand}"
        )
    unknown = set(config.task.arithmetic.operators) - {"+", "-"}
    if unknown or not config.task.arithmetic.operators:
        raise UserError(f"config.task.arithmetic.operators = {config.task.arithmetic.operators!r}: one or both of '+' and '-'")


def _field(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
