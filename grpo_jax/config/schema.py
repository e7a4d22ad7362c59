"""The configuration as frozen dataclasses: one per stage, no defaults (those live in configs/base.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which decoder. With `path` (a Hugging Face folder or hub id) the architecture comes from its config.json."""

    path: str
    dtype: str
    remat: str
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in place of training all weights. rank 0: none."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    path: str


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Sums and differences as text; `num_shots` worked examples stand before the question."""

    min_operand: int
    max_operand: int
    operators: str
    num_shots: int


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Which columns of a jsonl or dataset row are the prompt and the answer."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class JsonlConfig:
    """A file with one object a line."""

    path: str
    eval_path: str


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A Hugging Face dataset: a folder of `save_to_disk`, or what `load_dataset` takes."""

    path: str
    subset: str
    split: str
    eval_split: str


@dataclasses.dataclass(frozen=True)
class ReasoningGymConfig:
    """Generators of the reasoning-gym library, mixed by weight. `params`: JSON, {generator: {setting: value}}."""

    datasets: tuple[str, ...]
    weights: tuple[float, ...]
    params: str
    num_train: int


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Where questions come from, and how they are put to the model."""

    name: str
    max_prompt_tokens: int
    system_prompt: str
    use_chat_template: bool
    num_shots: int
    columns: ColumnsConfig
    arithmetic: ArithmeticConfig
    jsonl: JsonlConfig
    dataset: DatasetConfig
    reasoning_gym: ReasoningGymConfig


@dataclasses.dataclass(frozen=True)
class PatternConfig:
    """A regular expression."""

    pattern: str


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
    """Worker processes for rewards that run on the host."""

    num_workers: int
    time_limit_secs: float
    memory_limit_mb: int


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What an answer is worth: two expressions of named parts (reward_expression.py) and the parts' settings."""

    task: str
    shaping: str
    regex: PatternConfig
    format: PatternConfig
    scoring: ScoringConfig


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on the task's own answers before reinforcement begins (embedded task only)."""

    num_steps: int
    batch_size: int
    learning_rate: float
    label_noise: float


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn."""

    num_prompts: int
    group_size: int
    max_completion_tokens: int
    temperature: float
    top_k: int
    top_p: float
    max_live_sequences: int


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
    bucket_tokens: int
    logprob_chunk_tokens: int
    old_logp: str
    importance_cap: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a schedule after it. offload: its state waits in the host's memory."""

    learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    max_grad_norm: float
    offload: bool


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left. `fsdp_min_elements`: smaller weights are not cut."""

    data: int
    fsdp: int
    tensor: int
    fsdp_min_elements: int

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> devices along it, as `parallel.sharding.make_mesh` takes them."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    num_prompts: int
    num_samples: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept in the run's folder. keep 0: one checkpoint to resume from, and none once the run has come to its end."""

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
    steps_per_call: int
    async_steps: int
    shuffle_rewards: bool
    objective: Objective
    model: ModelConfig
    lora: LoRAConfig
    task: TaskConfig
    reward: RewardConfig
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

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (JSON-ready but for tuples), the inverse of `parse_config`."""
        return dataclasses.asdict(self)
