"""Checks of a config that types cannot make: ranges, choices and combinations. Every message names the field and the fix."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from typing import Any

from grpo_jax import objectives
from grpo_jax.config import mixture, reward_expression
from grpo_jax.config.embedded import EMBEDDED
from grpo_jax.config.schema import TRACKERS, Config, TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.files import is_text
from grpo_jax.knobs import walk
from grpo_jax.models.lora import ALL_LINEAR, DELTA_TARGETS, TARGETS
from grpo_jax.objectives.functions import name_of
from grpo_jax.objectives.ratios import is_per_row

# Of transformers' apply_chat_template; what a chat template itself reads goes beside them.
RESERVED_ARGUMENTS = frozenset(
    {"conversation", "messages", "chat_template", "template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "sanitize_control_tokens"}
)


def validate(config: Config) -> None:
    """Check values and combinations that types cannot. Raises UserError naming the field, its value and the fix."""
    # All checks that need nothing but the config are here, once, and the code that is given a Config has none. What depends on
    # the devices or the task's class is checked where these are known (training/run.py), and files where they are read.
    # Ranges come first: the checks of combinations divide by these numbers.
    _check_knobs(config)
    _check_operands(config)
    _check_embedded(config)
    _require_objective(config)
    _require_prompts(config)
    _require_reward(config)
    _require_generators(config.task, "config.task.reasoning_gym")
    for number, member in enumerate(_members(config.task)):
        _require_generators(member.task, f"config.task.mixture[{number}].reasoning_gym")
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
    if is_per_row(objective) and objective.aggregation not in ("sequence_mean", "sequence_sum"):
        raise UserError(
            f"config.objective.aggregation = {name_of(objective.aggregation)!r}: a {name_of(objective.ratio)!r} ratio has one "
            "value a row, use 'sequence_mean', or 'sequence_sum' for rows that count by their length"
        )
    _require_overlong(config)
    if not config.model.path:
        if config.task.name not in EMBEDDED:
            raise UserError(
                f"config.model.path is empty: task {config.task.name!r} needs a model, give a Hugging Face folder or hub id"
            )
        if config.model.num_heads % config.model.num_kv_heads or config.model.dim % (2 * config.model.num_heads):
            raise UserError(
                f"config.model.dim = {config.model.dim}: must be a multiple of 2 * num_heads = {2 * config.model.num_heads}, "
                f"and num_heads of num_kv_heads = {config.model.num_kv_heads}"
            )
    _check_tokens(config)
    _require_importance(config)
    _require_checkpoints(config)
    _require_adapters(config)
    _check_steps_per_call(config)
    _require_mesh(config)
    _require_trackers(config)
    if config.warm_start.num_steps and config.task.name not in EMBEDDED:
        raise UserError(
            f"config.warm_start.num_steps = {config.warm_start.num_steps}: task {config.task.name!r} has no worked answers, "
            "set it to 0"
        )


def _check_tokens(config: Config) -> None:
    """Check what completions begin and end with. How many ids the model has is known later (training/run.py)."""
    rollout, forced = config.rollout, config.rollout.forced_prefix_ids
    if "" in rollout.stop:
        raise UserError(f"config.rollout.stop = {rollout.stop!r}: an empty text stands everywhere, leave it out")
    if config.task.name in EMBEDDED and (rollout.stop or rollout.stop_ids):
        name = "stop" if rollout.stop else "stop_ids"
        raise UserError(
            f"config.rollout.{name} = {getattr(rollout, name)!r}: answers of task {config.task.name!r} end with the end token "
            "(a language model's with a newline too), leave it empty"
        )
    if len(forced) >= rollout.max_completion_tokens:
        raise UserError(
            f"config.rollout.forced_prefix_ids: {len(forced)} tokens; must be fewer than "
            f"config.rollout.max_completion_tokens = {rollout.max_completion_tokens}"
        )
    for name in ("bad_ids", "stop_ids"):
        both = sorted(set(forced) & set(getattr(rollout, name)))
        if both:
            raise UserError(f"config.rollout.forced_prefix_ids: {both[0]} is in config.rollout.{name} too; take it out of one")


def _require_overlong(config: Config) -> None:
    """Check the punishments of length, of which there is one at most."""
    rollout = config.rollout
    if 0 < config.overlong.easy_share < 0.5:
        raise UserError(f"config.overlong.easy_share = {config.overlong.easy_share}: at least 0.5, or 0 for no GROP")
    if config.overlong.easy_share and (config.overlong.cache_share or config.overlong.cache_tokens):
        raise UserError(
            f"config.overlong.easy_share = {config.overlong.easy_share}: GROP takes the place of DAPO's punishment, set "
            "config.overlong.cache_share and cache_tokens to 0"
        )
    if config.overlong.cache_tokens > rollout.max_completion_tokens:
        raise UserError(
            f"config.overlong.cache_tokens = {config.overlong.cache_tokens}: must be at most "
            f"config.rollout.max_completion_tokens = {rollout.max_completion_tokens}"
        )


def _require_objective(config: Config) -> None:
    """Check that the objective's names are in the tables of their axes."""
    # The tables are where the functions are, and know best what they hold; here the message gets the config's prefix.
    try:
        objectives.check_choices(config.objective)
    except ValueError as error:
        raise UserError(f"config.{error}") from None
    obj, G = config.objective, config.rollout.group_size
    if config.learner.ref_every and not obj.needs_reference:
        raise UserError(
            f"config.learner.ref_every = {config.learner.ref_every}: without a KL there is no reference to move, set it to 0, "
            "or config.objective.kl_coef above 0"
        )
    if obj.keep_rows >= G > 1:
        raise UserError(f"config.objective.keep_rows = {obj.keep_rows}: must be below config.rollout.group_size = {G}, or 0")
    if obj.advantage == "pass_at_k_analytic" and obj.pass_k > G:
        raise UserError(f"config.objective.pass_k = {obj.pass_k}: must be at most config.rollout.group_size = {G}")
    if obj.advantage == "reward_parts" and len(obj.part_weights) not in (0, 2):
        raise UserError(
            f"config.objective.part_weights = {obj.part_weights!r}: two numbers, for the task's reward and for what is added"
        )


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
    learner = config.learner
    if not cap and (learner.importance_floor, learner.importance_level, learner.importance_outside) != (0, "token", "truncate"):
        raise UserError(
            "config.learner.importance_cap = 0: with it importance_floor, importance_level and importance_outside do nothing; "
            "set a cap, or leave them at 0, 'token' and 'truncate'"
        )
    if cap and old_logp == "sampler":
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


def _require_mesh(config: Config) -> None:
    """Check the sizes of the mesh axes among each other; whether there are so many devices, `make_mesh` knows."""
    axes = config.mesh.sizes
    for axis, size in axes.items():
        if size < 1 and size != -1:
            raise UserError(f"config.mesh.{axis} = {size}: a number of devices, or -1 for what the other axes leave")
    if list(axes.values()).count(-1) > 1:
        wanted = ", ".join(f"{axis} = {size}" for axis, size in axes.items())
        raise UserError(f"config.mesh: {wanted}: only one axis can take what is left, say how many devices the others have")


def _require_trackers(config: Config) -> None:
    """Check the names of trackers; whether their libraries are there, a run finds out."""
    unknown = [name for name in config.log.trackers if name not in TRACKERS]
    if unknown:
        raise UserError(f"config.log.trackers: {unknown[0]!r} is unknown; there are {', '.join(TRACKERS)}")


def _require_adapters(config: Config) -> None:
    """Check the matrices that get adapters, and that a PEFT folder comes with the settings it was made with."""
    lora = config.lora
    known = (*TARGETS, *DELTA_TARGETS)
    unknown = [name for name in lora.targets if name not in known]
    if (unknown and lora.targets != (ALL_LINEAR,)) or not lora.targets:
        raise UserError(f"config.lora.targets = {lora.targets!r}: one or more of {', '.join(known)}; or {ALL_LINEAR} alone")
    if lora.path and not lora.rank:
        raise UserError(f"config.lora.path = {lora.path!r}: set config.lora.rank, alpha and targets as they were made")


def _require_reward(config: Config) -> None:
    """Check that the reward's expressions can be read, and fit the task."""
    # Before a model is loaded, and not when the first completion is scored.
    task, reward = config.task, config.reward
    for field, expression, sources in _expressions(config):
        parts = [part.name for part in reward_expression.parse(expression, field)]
        if parts and task.name in EMBEDDED:
            raise UserError(f"{field} = {expression!r}: task {task.name!r} has a reward of its own, leave it empty")
        if "reasoning_gym" in parts and set(sources) != {"reasoning_gym"}:
            raise UserError(f"{field} = {expression!r}: only questions of task 'reasoning_gym' can be scored by it")
        _check_code_and_judge(parts, config)
        if "regex" in parts and not reward.regex.pattern:
            raise UserError(f"config.reward.regex.pattern is empty: {field} = {expression!r} needs it")
    tags = reward.reasoning_tags
    if len(tags) not in (0, 2) or not all(tags):
        raise UserError(f"config.reward.reasoning_tags = {tags!r}: an opening and a closing tag, or () for none")
    for name in ("regex", "format"):
        pattern = getattr(reward, name).pattern
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.reward.{name}.pattern = {pattern!r}: not a regular expression, {error}") from None
    unsaid = [each for each in _members(task) if each.task.name == "reasoning_gym" and not each.reward]
    if unsaid and not reward.task:
        raise UserError(
            "config.reward.task is empty: in a mixture with 'reasoning_gym' say which reward suits all of it, or "
            "give the source a reward of its own; task 'reasoning_gym' mixes generators by itself"
        )


def _expressions(config: Config) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (field, the expression there, names of the tasks it is for) for all of the reward. Raises UserError."""
    reward, sources = config.reward, _source_names(config.task)
    yield "config.reward.task", reward.task, sources
    yield "config.reward.shaping", reward.shaping, sources
    by_value = json.loads(reward.by_column or "{}")
    field = "config.reward.by_column"
    if not isinstance(by_value, dict) or not all(isinstance(each, str) and each.strip() for each in by_value.values()):
        raise UserError(f'{field} = {reward.by_column!r}: must be {{"value of the column": "parts of a reward"}}')
    columns = [each.task.columns.reward for each in _members(config.task)] or [config.task.columns.reward]
    if by_value and not any(columns):
        raise UserError(f"{field} is set, and config.task.columns.reward is empty: name the column that has these values")
    for value, expression in by_value.items():
        yield f"{field}[{value!r}]", expression, sources
    for number, member in enumerate(_members(config.task)):
        yield f"config.task.mixture[{number}].reward", member.reward, [member.task.name]


def _members(task: TaskConfig) -> list[mixture.Member]:
    """List the sources of a mixture; none of another task."""
    return mixture.members(task.mixture, task) if task.name == "mixture" else []


def _source_names(task: TaskConfig) -> list[str]:
    """List the sources of questions; of a mixture, those in it."""
    return [member.task.name for member in _members(task)] or [task.name]


def _require_prompts(config: Config) -> None:
    """Check what is around a question."""
    task, chat = config.task, ("chat_template", "chat_template_kwargs", "template_date")
    if task.name in EMBEDDED:
        # All that its prompts, a line of text, do not have: a setting that did nothing would be believed.
        for name in ("system_prompt", "prompt_template", "num_shots", "assistant_prefill", "mixture", *chat):
            if getattr(task, name):
                where = ", it is config.task.arithmetic.num_shots" * (name == "num_shots" and task.name == "arithmetic")
                raise UserError(
                    f"config.task.{name} = {getattr(task, name)!r}: task {task.name!r} has none{where}; leave it at its default"
                )
    for name in chat:
        value = getattr(task, name)
        if value and not task.use_chat_template:
            raise UserError(f"config.task.{name} = {value!r}: set config.task.use_chat_template = True, or leave it empty")
    if task.prompt_template and "{prompt}" not in task.prompt_template:
        raise UserError(f"config.task.prompt_template = {task.prompt_template!r}: where the question goes, write {{prompt}}")
    arguments = json.loads(task.chat_template_kwargs or "{}")
    if not isinstance(arguments, dict):
        raise UserError(f"config.task.chat_template_kwargs = {task.chat_template_kwargs!r}: a JSON object, {{name: value}}")
    reserved = sorted(set(arguments) & RESERVED_ARGUMENTS)
    if reserved:
        raise UserError(f"config.task.chat_template_kwargs.{reserved[0]}: set by the library")
    try:
        datetime.date.fromisoformat(task.template_date or "2026-11-26")
    except ValueError:
        raise UserError(f"config.task.template_date = {task.template_date!r}: a day, as 2026-11-26") from None
    functions = [name for name in (task.name, *_source_names(task)) if ":" in name]
    if task.params and not functions:
        raise UserError(
            f"config.task.params.{next(iter(task.params))}: settings are for a task of your own, config.task.name = "
            f"'module:function', not {task.name!r}"
        )
    if task.mixture and task.name != "mixture":
        raise UserError(f"config.task.mixture is set: set config.task.name = 'mixture' too, not {task.name!r}")


def _check_code_and_judge(parts: list[str], config: Config) -> None:
    """Check the settings of these two parts, where an expression names them."""
    code, judge, scoring = config.reward.code, config.reward.judge, config.reward.scoring
    # A program that never ends must have failed before its scorer counts as late, or it would only be left out.
    if "code" in parts and code.limit_secs >= scoring.time_limit_secs:
        raise UserError(
            f"config.reward.code.limit_secs = {code.limit_secs}: must be below "
            f"config.reward.scoring.time_limit_secs = {scoring.time_limit_secs}"
        )
    if "judge" not in parts:
        return
    for name in ("url", "model"):
        if not getattr(judge, name):
            raise UserError(f"config.reward.judge.{name} is empty: the part 'judge' needs it")
    if not judge.url.startswith(("http://", "https://")):
        raise UserError(f"config.reward.judge.url = {judge.url!r}: must begin with http:// or https://")
    if judge.template and "{completion}" not in judge.template:
        raise UserError("config.reward.judge.template: has no {completion}, so the judge would not see what it judges")
    try:
        num_groups = re.compile(judge.pattern).groups
    except re.error as error:
        raise UserError(f"config.reward.judge.pattern = {judge.pattern!r}: not a regular expression, {error}") from None
    if num_groups != 1:
        raise UserError(f"config.reward.judge.pattern = {judge.pattern!r}: must have one group, around the number")


def _require_generators(task: TaskConfig, field: str) -> None:
    """Check a mixture of reasoning-gym generators. field: where its settings are, for messages."""
    # Whether a generator exists, the library alone knows: it is asked when the task is made.
    gym = task.reasoning_gym
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


def _check_embedded(config: Config) -> None:
    """Check that the embedded tasks of long answers have problems to give, and the decoder that they are made for."""
    task = config.task
    if task.name in EMBEDDED[1:] and config.model.path:
        raise UserError(
            f"config.model.path = {config.model.path!r}: task {task.name!r} is written in signs of its own, for the built-in "
            "decoder; leave it empty, or take task 'arithmetic'"
        )
    countdown, maze = task.countdown, task.maze
    if countdown.num_numbers * countdown.max_number > 99:
        raise UserError(
            f"config.task.countdown.max_number = {countdown.max_number}: {countdown.num_numbers} of them may add up to more "
            "than two digits hold; at most 99 together"
        )
    if maze.num_walls > maze.side**2 // 2 or maze.min_distance > 2 * (maze.side - 1):
        raise UserError(
            f"config.task.maze.num_walls = {maze.num_walls}, min_distance = {maze.min_distance}: at most half of the cells of "
            f"side = {maze.side} are walls, and start and goal at most {2 * (maze.side - 1)} steps apart"
        )


def _field(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
