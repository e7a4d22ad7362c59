#!/bin/sh
# Shapes of the table in README.md by this commit's programs; sh experiments/studies/aot/run.sh OUT [a b c d e]. Needs grpo_jax[aot-tpu]; e: [aot-gpu].
set -eu
out=$1
shift
batch="--config.rollout.num_prompts=32 --config.rollout.group_size=8 --config.rollout.max_completion_tokens=1024 --prompt_tokens=256"
same="--config=configs/dapo.py:smollm2 --config.model.dtype=bfloat16 --config.dynamic_sampling.enabled=false --config.learner.bucket_tokens=0"
same="$same --config.learner.old_logp=sampler"
plan() {
    name=$1
    shift
    # shellcheck disable=SC2086
    python -m grpo_jax plan --compile --json --hlo="$out.$name" $same $batch "$@" > "$out.$name.json"
}
for shape in "${@:-a}"; do
    case $shape in
    a) plan a --chip=v5e --topology=2x2 --shape=qwen2.5-0.5b --config.mesh.data=4 --config.learner.num_microbatches=8 ;;
    b) plan b --chip=v5e --topology=4x4 --shape=qwen2.5-7b --config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=4 --config.learner.num_microbatches=8 ;;
    c) plan c --chip=v6e --topology=2x4 --shape=qwen2.5-7b --config.mesh.data=1 --config.mesh.fsdp=2 --config.mesh.tensor=4 --config.learner.num_microbatches=16 \
        --config.lora.rank=32 ;;
    d) plan d --chip=v5p --topology=8x8x4 --shape=llama3-70b --config.mesh.data=1 --config.mesh.fsdp=32 --config.mesh.tensor=8 --config.learner.num_microbatches=8 \
        --config.rollout.num_prompts=256 --config.model.remat=dots ;;
    e) plan e --chip=h100 --topology=1x1x1 --shape=qwen2.5-0.5b --config.mesh.data=1 --config.learner.num_microbatches=32 ;;
    esac
done
