#!/bin/sh
# Shapes of the table in README.md by this commit's programs: sh experiments/studies/aot/run.sh OUT NAME ...; all names: a a8 b b82 c d (grpo_jax[aot-tpu]),
# a1 a8h b1 b8 b42 (H100, grpo_jax[aot-gpu]). Writes OUT.NAME.json and OUT.NAME.update, OUT.NAME.rollout, the compiled texts.
set -eu
out=$1
shift
batch="--config.rollout.num_prompts=32 --config.rollout.group_size=8 --config.rollout.max_completion_tokens=1024 --prompt_tokens=256"
same="--config=configs/dapo.py:smollm2 --config.model.dtype=bfloat16 --config.dynamic_sampling.enabled=false --config.learner.bucket_tokens=0"
same="$same --config.learner.old_logp=sampler"
small="--shape=qwen2.5-0.5b"
large="--shape=qwen2.5-7b --config.mesh.data=1"
plan() {
    # shellcheck disable=SC2086
    python -m grpo_jax plan --compile --json --hlo="$out.$name" $same $batch "$@" > "$out.$name.json"
}
for name in "$@"; do
    # shellcheck disable=SC2086
    case $name in
    a) plan --chip=v5e --topology=2x2 $small --config.mesh.data=4 ;;
    a8) plan --chip=v5e --topology=2x2 $small --config.mesh.data=4 --config.learner.num_microbatches=8 --config.model.remat=narrow ;;
    b) plan --chip=v5e --topology=4x4 $large --config.mesh.fsdp=4 --config.mesh.tensor=4 ;;
    b82) plan --chip=v5e --topology=4x4 $large --config.mesh.fsdp=8 --config.mesh.tensor=2 ;;
    c) plan --chip=v6e --topology=2x4 $large --config.mesh.fsdp=2 --config.mesh.tensor=4 --config.lora.rank=32 ;;
    d) plan --chip=v5p --topology=8x8x4 --shape=llama3-70b --config.mesh.data=1 --config.mesh.fsdp=32 --config.mesh.tensor=8 --config.rollout.num_prompts=256 ;;
    a1) plan --chip=h100 --topology=1x1x1 $small --config.mesh.data=1 ;;
    a8h) plan --chip=h100 --topology=1x1x8 $small --config.mesh.data=8 ;;
    b1) plan --chip=h100 --topology=1x1x1 $large ;;
    b8) plan --chip=h100 --topology=1x1x8 $large --config.mesh.fsdp=8 ;;
    b42) plan --chip=h100 --topology=1x1x8 $large --config.mesh.fsdp=4 --config.mesh.tensor=2 ;;
    esac
done
