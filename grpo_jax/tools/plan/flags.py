"""Flags of the planner, apart from its tables, which import jax."""

from __future__ import annotations

from absl import flags

CHIP = flags.DEFINE_string("chip", "h100", "v4, v5e, v5p, v6e, tpu7x, a100, h100 or h200 (grpo_jax/tools/plan/chips.py)")
DEVICES = flags.DEFINE_integer("devices", 1, "how many of them", lower_bound=1)
SHAPE = flags.DEFINE_string(
    "shape",
    "",
    "smollm2, qwen2.5-0.5b, qwen2.5-7b, llama3-70b, qwen3-1.7b, qwen3-30b-a3b or qwen3.5-4b, instead of config.model",
)
PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 0, "width of the prompts; 0: config.task.max_prompt_tokens", lower_bound=0
)
SWEEP = flags.DEFINE_bool("sweep", False, "rank all meshes of that many devices")
SWEEP_MESHES = flags.DEFINE_integer(
    "sweep_meshes", 3, "with --sweep --compile --topology: compile so many, the quickest by the plan's count", lower_bound=1
)
COMPILE = flags.DEFINE_bool("compile", False, "compile update and rollout for simulated devices")
TOPOLOGY = flags.DEFINE_string("topology", "", "--compile for a slice of --chip that is not here: 4x4, 2x2x1; h100: 1x1x8")
ITERATION = flags.DEFINE_bool("iteration", False, "with --topology: compile a whole iteration in one call too")
HLO = flags.DEFINE_string("hlo", "", "with --topology: write the compiled text to <hlo>.update, <hlo>.rollout and so on")
JSON = flags.DEFINE_bool("json", False, "with --topology: print one JSON object and nothing else")
