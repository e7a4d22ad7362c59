#!/bin/sh
# What README.md has, on one accelerator, random weights, bfloat16: lines and logs in the folder $1. The other arguments are the parts to run, all by default;
# a lent machine's minutes are few, so each has a limit of seconds and what it printed is kept.
#     sh experiments/studies/gpu/run.sh OUT [kernels rollout update trace claims exact tests tune]
# model_flops_utilisation (update, aim 0.45) and bandwidth_share (rollout, aim 0.6) are of ceilings measured in the same process.
set -u
out=$1
shift
mkdir -p "$out"
export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compiled}"
G=experiments.studies.gpu
run() { # limit, name, command
    limit=$1
    name=$2
    shift 2
    timeout "$limit" "$@" >> "$out/$name.log" 2>&1
    echo "$name: status $?"
    grep '^{' "$out/$name.log" >> "$out/results.jsonl"
}
bench() {
    name=$1
    shift
    run 100 "$name" python -m experiments.benchmark --dtype=bfloat16 --group-size=8 "$@"
}
for part in "${@:-kernels rollout update trace claims exact tests tune}"; do
    for each in $part; do
        case $each in
        # Without XLA's own search among Triton's products, which of the float32 reference takes minutes. A difference above 1e-5 in float32 is a fault.
        kernels) XLA_FLAGS=--xla_gpu_enable_triton_gemm=false run 150 kernels python -m $G.kernels --chip=h200 ;;
        rollout)
            bench rollout --what=rollout --model=qwen --prompts=32 --prompt-len=128 --completion-len=256
            bench rollout_1024 --what=rollout --model=qwen --prompts=128 --prompt-len=128 --completion-len=256
            bench rollout_qwen3 --what=rollout --model=qwen3 --prompts=32 --prompt-len=256 --completion-len=512 --repeats=3
            ;;
        update)
            bench update --what=update --model=qwen --prompts=32 --prompt-len=128 --completion-len=256 --microbatch=64
            bench update_kl --what=update --model=qwen --prompts=32 --prompt-len=128 --completion-len=256 --microbatch=64 --beta=0.04
            bench update_long --what=update --model=qwen --prompts=32 --prompt-len=128 --completion-len=1024 --microbatch=16 --remat --repeats=3
            bench update_qwen3 --what=update --model=qwen3 --prompts=32 --prompt-len=256 --completion-len=512 --microbatch=16 --repeats=3
            bench step --what=step --model=qwen --prompts=32 --prompt-len=128 --completion-len=256 --microbatch=64
            ;;
        trace)
            run 100 trace_rollout python -m $G.trace --what=rollout --model=qwen --dtype=bfloat16 --prompts=32 --prompt-len=128 --completion-len=256 --out="$out/rollout.json"
            run 100 trace_update python -m $G.trace --what=update --model=qwen --dtype=bfloat16 --prompts=32 --prompt-len=128 --completion-len=256 --microbatch=64 --out="$out/update.json"
            ;;
        claims)
            run 100 vmapped python -m $G.claims vmapped
            XLA_FLAGS=--xla_gpu_deterministic_ops=true XLA_PYTHON_CLIENT_PREALLOCATE=false run 200 resume python -m $G.claims resume
            ;;
        exact) run 60 exact python -m experiments.studies.exact.cost 10 ;;
        # Without the benchmark plugin, where it is installed: it warns under xdist, and warnings are errors here.
        tests)
            files=$(for name in $(sed -n 's/^GPU_TESTS = //p' Makefile); do echo "tests/test_$name.py"; done)
            # shellcheck disable=SC2086
            GRPO_JAX_TESTS_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false run 300 tests python -m pytest -n 4 -p no:benchmark -m "not nightly" -q $files
            ;;
        tune) for what in decode forward backward; do run 100 "tune_$what" python -m $G.tune $what; done ;;
        esac
    done
done
