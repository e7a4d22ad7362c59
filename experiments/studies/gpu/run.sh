#!/bin/sh
# Rollout, update and whole step of Qwen2.5-0.5B's shape on one accelerator, random weights, bfloat16: JSON lines in $1.
#     sh experiments/studies/gpu/run.sh results.jsonl
# First the attention kernels beside the plain form: a difference of more than 1e-5 in float32 is a fault of theirs.
# model_flops_utilisation (update, aim 0.45) and bandwidth_share (rollout at 256 rows, aim 0.5) are of ceilings measured in the same process.
set -eu
out=${1:-results.jsonl}
bench() { python -m experiments.benchmark --model=qwen --dtype=bfloat16 "$@" | tee -a "$out"; }
# Without XLA's own search among Triton's products, which of the float32 reference takes minutes.
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false python -m experiments.studies.gpu.kernels | tee -a "$out"
bench --what=rollout --prompts=32 --group-size=8 --prompt-len=128 --completion-len=256
bench --what=rollout --prompts=128 --group-size=8 --prompt-len=128 --completion-len=256
bench --what=update --prompts=32 --group-size=8 --prompt-len=128 --completion-len=256 --microbatch=64
bench --what=update --prompts=32 --group-size=8 --prompt-len=128 --completion-len=256 --microbatch=64 --beta=0.04
bench --what=update --prompts=32 --group-size=8 --prompt-len=128 --completion-len=1024 --microbatch=16 --remat
bench --what=step --prompts=32 --group-size=8 --prompt-len=128 --completion-len=256 --microbatch=64
