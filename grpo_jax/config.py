"""The configuration as frozen dataclasses: one per stage, no defaults (those live in configs/base.py), validated once.

`Config.from_config_dict` is the only place where an `ml_collections.ConfigDict` is read. Past it there are no strings to
look up and nothing to default: a typo, an unknown key, a wrong type or an impossible combination ends here, in one line.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.objectives import Objective
from grpo_jax.objectives.ratios import SEQUENCE_RATIOS


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which decoder. With `path` (a Hugging Face folder or hub id) the architecture comes from its config.json."""

    path: str
    dtype: str
    remat: bool
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Sums and differences as text; `num_shots` worked examples stand before the question."""

    min_operand: int
    max_operand: int
    operators: str
    num_shots: int


@dataclasses.dataclass(frozen=True)
class ReasoningGymConfig:
    """Any generator of the reasoning-gym library, scored by the library's own scorer."""

    dataset: str
    params: Mapping[str, Any]
    num_train: int
    system_prompt: str


@dataclasses.dataclass(frozen=True)
class JsonlConfig:
    """A file with one object a line, fields `prompt` and `answer`, scored by math-verify."""

    path: str
    eval_path: str
    system_prompt: str
    use_chat_template: bool


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """Worker processes for rewards that run on the host."""

    num_workers: int
    time_limit_secs: float


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which task, and each task's settings."""

    name: str
    max_prompt_tokens: int
    arithmetic: ArithmeticConfig
    reasoning_gym: ReasoningGymConfig
    jsonl: JsonlConfig
    scoring: ScoringConfig


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on the task's own answers before reinforcement begins (embedded task only)."""

    num_steps: int
    batch_size: int
    learning_rate: float
    careless_rate: float


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn."""

    num_prompts: int
    group_size: int
    max_completion_tokens: int
    temperature: float
    top_k: int
    top_p: float


@dataclasses.dataclass(frozen=True)
class DynamicSamplingConfig:
    """DAPO eq. 11: keep sampling until the batch is full of groups whose rewards differ."""

    enabled: bool
    max_sampling_rounds: int


@dataclasses.dataclass(frozen=True)
class OverlongConfig:
    """DAPO eq. 13. `cache_tokens` = 0: no punishment. `filter`: truncated rows leave the loss."""

    cache_tokens: int
    filter: bool


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """How one batch becomes optimizer steps."""

    num_epochs: int
    num_minibatches: int
    num_microbatches: int
    logprob_chunk_tokens: int
    old_logp: str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a schedule after it."""

    learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    max_grad_norm: float


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    num_prompts: int
    num_samples: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept in the run's folder."""

    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How much of the sampled text is kept: `num_groups` groups every `completions_every` steps."""

    completions_every: int
    num_groups: int


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int
    num_steps: int
    eval_every: int
    one_call: bool
    shuffle_rewards: bool
    objective: Objective
    model: ModelConfig
    task: TaskConfig
    warm_start: WarmStartConfig
    rollout: RolloutConfig
    dynamic_sampling: DynamicSamplingConfig
    overlong: OverlongConfig
    learner: LearnerConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_steps * self.learner.num_epochs * self.learner.num_minibatches

    @classmethod
    def from_config_dict(cls, config: Any) -> Config:
        """ConfigDict (or nested mapping) -> validated Config. Raises UserError naming field, value and fix."""
        built = _build(cls, config.to_dict() if hasattr(config, "to_dict") else config, "config")
        validate(built)
        return built

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (JSON-ready but for tuples), the inverse of `from_config_dict`."""
        return dataclasses.asdict(self)


def _build(cls: type, values: Any, where: str) -> Any:
    """Mapping -> dataclass, strictly: every key known, every field present, every type right."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a group of fields ({', '.join(_names(cls))}), got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where}.{unknown[0]}: unknown field; known here: {', '.join(_names(cls))}")
    missing = [name for name in _names(cls) if name not in values]
    if missing:
        raise UserError(f"{where}.{missing[0]}: missing; start from configs/base.py, which sets every field")
    built = {name: _convert(hints[name], values[name], f"{where}.{name}") for name in _names(cls)}
    try:
        return cls(**built)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where.rpartition('.')[0]}.{error}") from None  # the message begins with the last part of `where`


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    origin = typing.get_origin(hint) or hint
    wrong = UserError(f"{where} = {value!r}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise wrong
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise wrong
        return dict(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and origin is not bool) or not isinstance(value, origin):
        raise wrong
    return value


TASKS = ("arithmetic", "reasoning_gym", "jsonl")
DTYPES = ("float32", "bfloat16")
OLD_LOGP = ("sampler", "learner")
SCHEDULES = ("constant", "linear", "cosine")


def validate(config: Config) -> None:
    """Check values and combinations that types cannot. Raises UserError naming the field, its value and the fix."""
    _require_ranges(config)
    _require_choices(config)
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
    if config.warm_start.num_steps and config.task.name != "arithmetic":
        raise UserError(
            f"config.warm_start.num_steps = {config.warm_start.num_steps}: task {config.task.name!r} has no worked answers, "
            "set it to 0"
        )


def _require_choices(config: Config) -> None:
    choices = {
        "task.name": TASKS,
        "model.dtype": DTYPES,
        "learner.old_logp": OLD_LOGP,
        "optimizer.schedule": SCHEDULES,
    }
    for name, known in choices.items():
        value = _field(config, name)
        if value not in known:
            raise UserError(f"config.{name} = {value!r}: unknown; known: {', '.join(known)}")


# Lowest allowed values, inclusive; "> 0" fields are listed apart because they are real numbers.
AT_LEAST = {
    "num_steps": 0,
    "eval_every": 0,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.ffn_dim": 1,
    "task.max_prompt_tokens": 1,
    "task.arithmetic.min_operand": 0,
    "task.arithmetic.num_shots": 0,
    "task.reasoning_gym.num_train": 1,
    "task.scoring.num_workers": 1,
    "warm_start.num_steps": 0,
    "warm_start.batch_size": 1,
    "warm_start.careless_rate": 0,
    "rollout.num_prompts": 1,
    "rollout.max_completion_tokens": 1,
    "rollout.top_k": 0,
    "dynamic_sampling.max_sampling_rounds": 1,
    "overlong.cache_tokens": 0,
    "learner.num_epochs": 1,
    "learner.num_minibatches": 1,
    "learner.num_microbatches": 1,
    "learner.logprob_chunk_tokens": 1,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "eval.num_prompts": 1,
    "eval.num_samples": 0,
    "eval.batch_size": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "log.completions_every": 0,
    "log.num_groups": 1,
}
ABOVE_ZERO = (
    "rollout.temperature",
    "rollout.top_p",
    "optimizer.max_grad_norm",
    "optimizer.eps",
    "task.scoring.time_limit_secs",
)


def _require_ranges(config: Config) -> None:
    for name, low in AT_LEAST.items():
        value = _field(config, name)
        if not value >= low:
            raise UserError(f"config.{name} = {value!r}: must be at least {low}")
    for name in ABOVE_ZERO:
        value = _field(config, name)
        if not value > 0:
            raise UserError(f"config.{name} = {value!r}: must be above 0")
    if config.rollout.top_p > 1:
        raise UserError(f"config.rollout.top_p = {config.rollout.top_p!r}: a probability, at most 1 (1 keeps every token)")
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
