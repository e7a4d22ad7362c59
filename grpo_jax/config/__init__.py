"""A run's settings, read once at the edge: ConfigDict -> frozen dataclasses, every value checked.

Past `parse_config` there are no strings to look up and nothing to default: a typo, an unknown key, a wrong type or an
impossible combination ends here, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_jax.config.aliases import upgrade
from grpo_jax.config.embedded import ChainConfig, CountdownConfig, ForksConfig, MazeConfig, fill_by_task
from grpo_jax.config.resolve import resolve
from grpo_jax.config.schema import (
    ArithmeticConfig,
    CheckpointConfig,
    ChoiceConfig,
    CodeConfig,
    ColumnsConfig,
    Config,
    DatasetConfig,
    DynamicSamplingConfig,
    EvalConfig,
    FormatConfig,
    JsonlConfig,
    JudgeConfig,
    LearnerConfig,
    LogConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    OverlongConfig,
    ReasoningGymConfig,
    RegexConfig,
    RepetitionConfig,
    RewardConfig,
    RolloutConfig,
    ScoringConfig,
    TaskConfig,
    WarmStartConfig,
)
from grpo_jax.config.strict import build
from grpo_jax.config.validation import validate

__all__ = [
    "ArithmeticConfig",
    "ChainConfig",
    "CheckpointConfig",
    "ChoiceConfig",
    "CodeConfig",
    "ColumnsConfig",
    "Config",
    "CountdownConfig",
    "DatasetConfig",
    "DynamicSamplingConfig",
    "EvalConfig",
    "ForksConfig",
    "FormatConfig",
    "JsonlConfig",
    "JudgeConfig",
    "LearnerConfig",
    "LoRAConfig",
    "LogConfig",
    "MazeConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "ReasoningGymConfig",
    "RegexConfig",
    "RepetitionConfig",
    "RewardConfig",
    "RolloutConfig",
    "ScoringConfig",
    "TaskConfig",
    "WarmStartConfig",
    "parse_config",
]


def parse_config(config: Any) -> Config:
    """Make a validated Config of a ConfigDict or nested mapping. Raises UserError naming field, value and fix."""
    # In this order: names of older versions first, or they would be unknown; then types; then values, which checks may compare
    # only when all types are right, and none is left to the task.
    values = config.to_dict() if hasattr(config, "to_dict") else config
    parsed = fill_by_task(build(Config, upgrade(values) if isinstance(values, Mapping) else values, "config"))
    validate(parsed)
    return resolve(parsed)
