#!/bin/sh
# The plans of README.md: for each model and machine all meshes, then one mesh in full. Nothing is computed: a CPU will do.
set -e
FLAGS="--prompt_tokens=512 --config.model.dtype=bfloat16 --config.model.remat=full
    --config.rollout.group_size=8 --config.rollout.max_completion_tokens=1024 --config.dynamic_sampling.enabled=False"
plan() { python -m experiments.plan --config=configs/dapo.py:smollm2 $FLAGS "$@"; }

V5E="--shape=qwen2.5-7b --chip=v5e --devices=16 --config.rollout.num_prompts=64 --config.learner.num_microbatches=32"
H100="--shape=qwen2.5-7b --chip=h100 --devices=8 --config.rollout.num_prompts=64 --config.learner.num_microbatches=16"
V5P="--shape=llama3-70b --chip=v5p --devices=256 --config.rollout.num_prompts=256 --config.learner.num_microbatches=8"
plan $V5E --sweep
plan $V5E --config.mesh.fsdp=4 --config.mesh.tensor=4
plan $H100 --sweep
plan $H100 --config.mesh.fsdp=8
plan $V5P --sweep
plan $V5P --config.mesh.fsdp=32 --config.mesh.tensor=8
