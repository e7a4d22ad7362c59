"""Seed known bugs one at a time, in a copy, and demand that the tests go red: python -m tests.mutate (make mutate).

Each entry: a file, the text to replace, the bug, and the tests that must notice it. With an argument, only entries in which it
occurs: python -m tests.mutate objectives.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
OBJECTIVES = "grpo_jax/objectives"

BUGS = [
    (
        "clip's sign flipped",
        f"{OBJECTIVES}/surrogates.py",
        "jnp.minimum(ratio_BT * adv_BT",
        "jnp.maximum(ratio_BT * adv_BT",
        "tests/test_objectives.py -k golden",
    ),
    (
        "mask dropped from the weights",
        f"{OBJECTIVES}/aggregation.py",
        "return mask_BT, mask_BT.sum()",
        "return mask_BT * 0 + 1, mask_BT.sum()",
        "tests/test_objectives.py -k loss_is_its_parts",
    ),
    (
        "an update that is NaN taken",
        "grpo_jax/learner/train_step.py",
        "jnp.isfinite(norm) & jnp.isfinite(loss)",
        "jnp.isfinite(norm) | True",
        "tests/test_guard.py -k leaves_all",
    ),
    (
        "mean instead of sum",
        f"{OBJECTIVES}/__init__.py",
        "(loss_BT * weight_BT).sum() / denom",
        "(loss_BT * weight_BT).mean() / denom",
        "tests/test_objectives.py -k golden",
    ),
    (
        "zeros left out of R+ and R-",
        f"{OBJECTIVES}/advantages.py",
        "pools = (everyone, everyone)",
        "pools = (success, failure)",
        "tests/test_objectives.py -k correct_answers",
    ),
    (
        "CISPO without stop-gradient",
        f"{OBJECTIVES}/surrogates.py",
        "jax.lax.stop_gradient(jnp.clip(terms.ratio_BT, low, high))",
        "jnp.clip(terms.ratio_BT, low, high)",
        "tests/test_beyond.py -k cispo",
    ),
    (
        "k1 paid for as if it were k2",
        f"{OBJECTIVES}/ratios.py",
        '{"k1": kl_k1, "k2": kl_k2',
        '{"k1": kl_k2, "k2": kl_k1',
        "tests/test_beyond.py -k kl_estimator",
    ),
    (
        "dual clip for good tokens too",
        f"{OBJECTIVES}/surrogates.py",
        "jnp.where(adv_BT < 0, jnp.maximum(value_BT, bound * adv_BT), value_BT)",
        "jnp.minimum(value_BT, -bound * adv_BT)",
        "tests/test_beyond.py -k dual_clip",
    ),
    (
        "KL added to the reward instead of subtracted",
        f"{OBJECTIVES}/advantages.py",
        "jnp.float32) - obj.kl_in_reward",
        "jnp.float32) + obj.kl_in_reward",
        "tests/test_beyond.py -k kl_in_the_reward",
    ),
    (
        "importance of the sampler not truncated",
        f"{OBJECTIVES}/ratios.py",
        "return jnp.clip(ratio, low, high)",
        "return jnp.maximum(ratio, low)",
        "tests/test_train_step.py -k truncated_importance",
    ),
    (
        "stop token not trained",
        "grpo_jax/rollout/decoding.py",
        "live_B.astype(jnp.float32)",
        "(live_B & ~is_stop_B).astype(jnp.float32)",
        "tests/test_rollout.py",
    ),
    (
        "a refilled row keeps its first prompt",
        "grpo_jax/rollout/decoding.py",
        "prompt_W = completion_W // ctx.group_size",
        "prompt_W = jnp.arange(len(completion_W)) // ctx.group_size",
        "tests/test_rollout.py",
    ),
    (
        "log-probs shifted by one",
        "grpo_jax/learner/logprobs.py",
        "tokens_BT[:, :num_read]",
        "tokens_BT[:, -num_read:]",
        "tests/test_rollout.py",
    ),
    (
        "temperature ignored by the learner",
        "grpo_jax/learner/logprobs.py",
        "head_logits(hidden_CD, head_VD, cap, tiles) / sampling.temperature",
        "head_logits(hidden_CD, head_VD, cap, tiles)",
        "tests/test_logprobs.py",
    ),
    (
        "cap of the logits left out of the gradient",
        "grpo_jax/learner/logprobs.py",
        "d_logits_CV *= 1 - jnp",
        "d_logits_CV *= 1 + 0 * jnp",
        "tests/test_logprobs.py",
    ),
    (
        "window one token too wide over the prompt",
        "grpo_jax/models/attention.py",
        "key_positions_PS[:, None, None] < window",
        "key_positions_PS[:, None, None] <= window",
        "tests/test_families.py",
    ),
    (
        "every step repeats its noise",
        "grpo_jax/rng.py",
        "PURPOSES.index(purpose)), step)",
        "PURPOSES.index(purpose)), 0)",
        "tests/test_dynamic_sampling.py tests/test_rollout.py tests/test_train_step.py",
    ),
    (
        "divided twice under accumulation",
        "grpo_jax/learner/train_step.py",
        "(weight_BT / denom).reshape",
        "(weight_BT / denom / config.learner.microbatches).reshape",
        "tests/test_train_step.py",
    ),
    (
        "inner epochs ignored",
        "grpo_jax/learner/train_step.py",
        "(config.num_epochs, *x.shape)",
        "(1, *x.shape)",
        "tests/test_train_step.py",
    ),
    (
        "dynamic sampling judged on the shaped reward",
        "grpo_jax/training/iteration.py",
        "is_informative(batch.task_reward_PG, ",
        "is_informative(batch.reward_PG, ",
        "tests/test_dynamic_sampling.py",
    ),
    (
        "dynamic sampling without a cap",
        "grpo_jax/training/iteration.py",
        "self.config.dynamic_sampling.max_sampling_rounds",
        "50",
        "tests/test_dynamic_sampling.py",
    ),
    (
        "reference kept although kl_coef is 0",
        "grpo_jax/training/run.py",
        "if config.objective.needs_reference and adapters is None:",
        "if adapters is None:",
        "tests/test_train_step.py",
    ),
    (
        "GRPO's advantage reported as the variant's own",
        "grpo_jax/learner/advantage_diagnostics.py",
        "for each in (obj, GRPO)",
        "for each in (GRPO, GRPO)",
        "tests/test_advantage_diagnostics.py",
    ),
    (
        "recorded advantages without the overlong filter",
        "grpo_jax/learner/advantage_diagnostics.py",
        "if filter_truncated:",
        "if False:",
        "tests/test_advantage_diagnostics.py",
    ),
    (
        "text pieces decoded one by one",
        "grpo_jax/training/completions.py",
        "pieces.append(text[len(before) :])",
        "pieces.append(tokenizer.decode(ids[now - 1 : now]))",
        "tests/test_completions.py",
    ),
    (
        "sampled text can end the page's script",
        "grpo_jax/tools/show/page.py",
        "[<>&",
        "[&",
        "tests/test_show.py -k hostile",
    ),
    (
        "thresholds read the wrong way round",
        "grpo_jax/tools/show/health.py",
        'if rule.worse == "high" else',
        'if rule.worse == "low" else',
        "tests/test_show.py -k verdict",
    ),
    (
        "shaping counts as success",
        "grpo_jax/rewards/reward_function.py",
        "            shaping_PG += np.float32(weight) * scores[name]",
        "            task_PG += np.float32(weight) * scores[name]",
        "tests/test_reward_function.py -k scored_apart",
    ),
    (
        "reasoning that was cut off has an answer",
        "grpo_jax/rewards/scorers/answers.py",
        "return None if opening in behind else behind",
        "return behind",
        "tests/test_answers.py -k behind_the_reasoning",
    ),
    (
        "words are mathematics",
        "grpo_jax/rewards/scorers/formulas.py",
        "return all(_is_variables(word, has_signs) for word in words)",
        "return True",
        "tests/test_equality.py -k no_arithmetic",
    ),
    (
        "thousands separators leave tuples too",
        "grpo_jax/rewards/scorers/normal_form.py",
        "if depth or not text:",
        "if not text:",
        "tests/test_equality.py -k thousands",
    ),
    (
        "a list of candidates is paid for",
        "grpo_jax/rewards/scorers/answers.py",
        "for _ in range(9):",
        "for _ in range(0):",
        "tests/test_answers.py -k final_answer",
    ),
    (
        "what the prompt opened is forgotten",
        "grpo_jax/rewards/scorers/answers.py",
        """return f"{item.get('prompt_opens') or ''}{completion}\"""",
        """return completion""",
        "tests/test_parts.py -k prompt_opened",
    ),
    (
        "copies of held-out questions are trained on",
        "grpo_jax/tasks/questions.py",
        "return [question for question in questions if question.text not in taken]",
        "return [question for question in questions if question not in others]",
        "tests/test_tasks_host.py -k any_copy",
    ),
    (
        "worked examples are asked too",
        "grpo_jax/tasks/selection.py",
        "asked = [question for question in source.train if question.text not in shown]",
        "asked = list(source.train)",
        "tests/test_tasks_host.py -k worked_examples",
    ),
    (
        "runs of one call all take the first one's objective",
        "grpo_jax/objectives/one_of.py",
        "return jax.lax.select_n(jnp.int32(place), ",
        "return jax.lax.select_n(jnp.int32(0 * place), ",
        "tests/test_one_of.py -k alone",
    ),
    (
        "the completions of one run are scored by another's questions",
        "grpo_jax/training/together.py",
        "sampler = self.samplers[place]",
        "sampler = self.samplers[0]",
        "tests/test_host_training.py -k one_call",
    ),
    (
        "a prompt's keys forget what all rows but the last of a group add",
        "grpo_jax/models/flash/whole.py",
        "begins, firsts = [refs[0][p, 0], *begins], [is_first & (g == 0), is_first]",
        "begins, firsts = [refs[0][p, 0], *begins], [is_first, is_first]",
        "tests/test_flash.py -k plain_operations",
    ),
    (
        "a decoding kernel does not see the newest token",
        "grpo_jax/models/flash/tpu_newest.py",
        "(slot_RU <= last)",
        "(slot_RU < last)",
        "tests/test_newest.py -k outputs_and_caches",
    ),
    (
        "the TPU's draw finds its block by the second number too",
        "grpo_jax/rollout/tpu_draw.py",
        "total_81 * uniform_ref[:, 0:1]",
        "total_81 * uniform_ref[:, 1:2]",
        "tests/test_tpu_draw.py -k cumulated",
    ),
    (
        "a looked-up row's gradient takes the place of the sum so far",
        "grpo_jax/models/fsdp.py",
        "total_VE.at[tokens].add(d_rows.astype(jnp.float32))",
        "total_VE.at[tokens].set(d_rows.astype(jnp.float32))",
        "tests/test_grad_sums.py -k embedding_and_head",
    ),
    (
        "the data begins again at every step",
        "grpo_jax/training/samplers.py",
        "self.prompts_at(int(state.num_prompts_drawn + number",
        "self.prompts_at(int(number",
        "tests/test_host_training.py -k very_next",
    ),
    (
        "one hanging part takes the others' answers with it",
        "grpo_jax/rewards/pool/jobs.py",
        "for index in self.waiting if self.jobs[index].scorer == name]",
        "for index in self.waiting]",
        "tests/test_reward_function.py -k always_hangs",
    ),
    (
        "a completion without a score is trained on as 0",
        "grpo_jax/learner/advantage_diagnostics.py",
        "mask_PGT = mask_PGT * (batch.is_scored_PG & can_compare_P1)[..., None]",
        "pass",
        "tests/test_unscored.py -k float64",
    ),
    (
        "a reply to another job is taken",
        "grpo_jax/rewards/pool/protocol.py",
        "if got != number:",
        "if False:",
        "tests/test_hostile_rewards.py -k refused",
    ),
    (
        "a forked scorer answers twice",
        "grpo_jax/rewards/pool/serve.py",
        "if os.getpid() != worker:",
        "if False:",
        "tests/test_hostile_rewards.py -k right_one",
    ),
    (
        "a group has the time of one completion",
        "grpo_jax/rewards/pool/pool.py",
        "limit_secs = num * self._config.time_limit_secs",
        "limit_secs = self._config.time_limit_secs",
        "tests/test_calling.py -k limit_of_time",
    ),
    (
        "a scorer's children are left behind",
        "grpo_jax/rewards/pool/keeper.py",
        "for pid in descendants(os.getpid()):",
        "for pid in ():",
        "tests/test_reward_function.py -k starts_ends",
    ),
    (
        "a scorer may take all memory",
        "grpo_jax/rewards/pool/serve.py",
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))",
        "pass",
        "tests/test_reward_function.py -k memory_hog",
    ),
    (
        "a generator's weight is ignored",
        "grpo_jax/tasks/host.py",
        "grain.MapDataset.mix(orders, list(weights.values()))",
        "grain.MapDataset.mix(orders)",
        "tests/test_tasks_host.py -k weights",
    ),
    (
        "plain prompts without BOS",
        "grpo_jax/tasks/tokenizers.py",
        "return prefix + ids",
        "return ids",
        "tests/test_prompts.py -k plain_prompt",
    ),
    (
        "special tokens vanish before the reward",
        "grpo_jax/tasks/tokenizers.py",
        "if i not in ends])",
        "if i not in ends | self.special_ids])",
        "tests/test_prompts.py -k reach_the_reward",
    ),
    (
        "ids beyond the embedding are let through",
        "grpo_jax/tasks/tokenizers.py",
        "i < self.limits.num_embeddings",
        "i <= self.limits.num_embeddings",
        "tests/test_prompts.py -k without_a_row",
    ),
    (
        "a template's day is that of each start",
        "grpo_jax/tasks/chat.py",
        "datetime.date.fromisoformat(day) if day else today()",
        "today()",
        "tests/test_prompts.py -k day",
    ),
    (
        "worked examples are taken from those that are held out",
        "grpo_jax/tasks/selection.py",
        "taken += itertools.islice(fitting, source.num_eval)",
        "taken += itertools.islice(fitting, 0)",
        "tests/test_data.py -k worked_examples",
    ),
    (
        "the last of two equal keys counts",
        "grpo_jax/tasks/files.py",
        "if len(values) < len(pairs):",
        "if False:",
        "tests/test_data.py -k wrong_with_a_file",
    ),
    (
        "adapters not scaled",
        "grpo_jax/models/lora.py",
        "return self.alpha / self.rank",
        "return 1.0",
        "tests/test_lora.py -k peft",
    ),
    (
        "the reference has the adapters on",
        "grpo_jax/learner/train_step.py",
        "dataclasses.replace(model, lora=None), ref_params",
        "model, join_params(ref_params, state.params) if model.lora else ref_params",
        "tests/test_lora.py -k chain_rule",
    ),
    (
        "pass@k draws with replacement",
        "grpo_jax/analysis/estimates.py",
        "np.maximum(num_wrong_P1 - drawn_1k, 0) / (num_samples - drawn_1k)",
        "(num_wrong_P1 + 0 * drawn_1k) / num_samples",
        "tests/test_estimates.py -k subsets",
    ),
    (
        "intervals from the bootstrap alone",
        "grpo_jax/analysis/statistics.py",
        "np.maximum(below_x, most_x), np.maximum(above_x, -least_x)",
        "most_x, -least_x",
        "tests/test_statistics.py -k tied",
    ),
    (
        "no correction for the number of comparisons",
        "grpo_jax/analysis/statistics.py",
        "np.arange(len(p_values), 0, -1) * p_values[order]",
        "p_values[order]",
        "tests/test_statistics.py -k holm",
    ),
    (
        "seeds are compared with other seeds",
        "grpo_jax/tools/report/analysis.py",
        "their_final = {run.seed:",
        "their_final = {run.seed + 1:",
        "tests/test_report.py -k clear",
    ),
    (
        "a microbatch is cut one token short",
        "grpo_jax/learner/batching.py",
        "lengths(mask_PGT).max(), axes",
        "lengths(mask_PGT).max() - 1, axes",
        "tests/test_batching.py",
    ),
    (
        "a visitor's keys are scored for the wrong half of the queries",
        "grpo_jax/models/ring.py",
        '"back": (second, whole)',
        '"back": (first, whole)',
        "tests/test_context.py -k ring",
    ),
    (
        "a token that two rows have moves its embedding once",
        "grpo_jax/models/fsdp.py",
        "total_VE.at[asked].add(d_found)",
        "total_VE.at[asked].set(d_found)",
        "tests/test_mesh.py -k three_updates",
    ),
    (
        "a block of queries sees as the first one does",
        "grpo_jax/models/attention.py",
        "view.mask_BTU[:, start:end, :end]",
        "view.mask_BTU[:, : end - start, :end]",
        "tests/test_transformer.py -k blocks",
    ),
    (
        "the batch sampled ahead is never taken",
        "grpo_jax/training/iteration.py",
        "return dataclasses.replace(state, next_batch=following, later_batches=tuple(later)), oldest",
        "return state, oldest",
        "tests/test_host_training.py -k scored_while",
    ),
    (
        "a head's part that is gathered is the first one each time",
        "grpo_jax/learner/vocab_parts.py",
        "jax.lax.dynamic_slice_in_dim(here_VD, i * size, size)",
        "jax.lax.dynamic_slice_in_dim(here_VD, 0 * i, size)",
        "tests/test_mesh.py -k parts_of_the_vocabulary",
    ),
    (
        "a device takes its part of the vocabulary for the first one",
        "grpo_jax/learner/vocab_parts.py",
        "firsts = jnp.arange(num_parts)[:, None] *",
        "firsts = 0 * jnp.arange(num_parts)[:, None] *",
        "tests/test_mesh.py -k parts_of_the_vocabulary",
    ),
    (
        "a batch that is old on purpose counts as one from the buffer",
        "grpo_jax/learner/train_step.py",
        "batch.sampled_at_P >= state.step - config.async_steps",
        "batch.sampled_at_P >= state.step",
        "tests/test_train_step.py -k importance",
    ),
    (
        "YaRN's ramp is over channels, not over pairs",
        "grpo_jax/models/rope.py",
        "jnp.arange(num_pairs, dtype=jnp.float32) - first",
        "2 * jnp.arange(num_pairs, dtype=jnp.float32) - first",
        "tests/test_families.py -k yarn",
    ),
    (
        "the prompt's scores are not capped",
        "grpo_jax/models/attention.py",
        "soft_cap(pre_PKGTRS, cap)",
        "pre_PKGTRS",
        "tests/test_families.py -k every_token",
    ),
    (
        "rows come back from experts in their order",
        "grpo_jax/models/experts.py",
        "jnp.argsort(order).reshape",
        "order.reshape",
        "tests/test_experts.py -k own_experts",
    ),
    (
        "a frozen router learns",
        "grpo_jax/models/transformer.py",
        'jax.lax.stop_gradient(mlp["router"])',
        'mlp["router"]',
        "tests/test_experts.py -k frozen",
    ),
    (
        "padding counts in the experts' load",
        "grpo_jax/models/experts.py",
        "is_chosen &= (is_token != 0)[..., None, None]",
        "pass",
        "tests/test_experts.py -k loads",
    ),
    (
        "a device answers with its own numbers of other devices' experts",
        "grpo_jax/models/experts.py",
        "chosen_Ak - first",
        "chosen_Ak",
        "tests/test_experts.py -k some_of_the_experts",
    ),
    (
        "rows of experts elsewhere are read",
        "grpo_jax/models/experts.py",
        "jnp.where((place_Mk < num_own)[..., None], rows_MkD, 0)",
        "rows_MkD",
        "tests/test_experts.py -k some_of_the_experts",
    ),
    (
        "the sampler's experts are those of the token before",
        "grpo_jax/rollout/decoding.py",
        "experts_BTX.at[:, carry.t - 1].set",
        "experts_BTX.at[:, carry.t].set",
        "tests/test_experts.py -k records_the_experts",
    ),
    (
        "padding fades a state",
        "grpo_jax/models/gated_delta.py",
        "(jnp.where(is_token_BT1, x, 0) for x in (channels_BTX, log_decay, strength))",
        "(x for x in (channels_BTX, log_decay, strength))",
        "tests/test_gated_delta.py -k padding",
    ),
    (
        "a refilled row goes on with the state of the one before",
        "grpo_jax/models/gated_delta.py",
        "is_first = (jnp.asarray(slot) == 0).reshape(-1)",
        "is_first = (jnp.asarray(slot) == -1).reshape(-1)",
        "tests/test_gated_delta.py -k refilled",
    ),
    (
        "a chunk forgets the state before it",
        "grpo_jax/models/gated_delta.py",
        'change = of_values - dot("bjmik,bjmkv->bjmiv", of_state, state)',
        "change = of_values",
        "tests/test_gated_delta.py -k recurrence",
    ),
    (
        "what is joined over devices is put together as on one",
        "grpo_jax/models/linear.py",
        "shards = [x.reshape(*x.shape[:axis], num_shards, -1, *x.shape[axis + 1 :]) for x in leaves]",
        "shards = [x.reshape(*x.shape[:axis], 1, -1, *x.shape[axis + 1 :]) for x in leaves]",
        "tests/test_newest.py -k products_of_the_same",
    ),
    (
        "a weight's gradient is left to pieces of the rows",
        "grpo_jax/models/linear.py",
        'jnp.einsum("...o,...i->oi", dy, in_full_over_tensor(x))',
        'jnp.einsum("...o,...i->oi", dy, x)',
        "tests/test_hardware.py -k several_devices",
    ),
    (
        "auto counts all channels of the residual stream on each device of tensor",
        "grpo_jax/training/fit.py",
        "kept_D = D / tensor if is_spread else D",
        "kept_D = D",
        "tests/test_fit.py -k gathers_the_weights",
    ),
    (
        "heads are not gated",
        "grpo_jax/models/attention.py",
        "out_BTNH = out_BTNH * jax.nn.sigmoid(gate_BTNH)",
        "pass",
        "tests/test_families.py -k qwen3.5",
    ),
    (
        "layers are filed under another layer's number",
        "grpo_jax/models/tensor_names.py",
        "numbers[0] = range(place, architecture.num_layers, architecture.period)",
        "numbers[0] = range(stack[0])",
        "tests/test_families.py -k qwen3.5",
    ),
    (
        "a setting of another family is not seen",
        "grpo_jax/models/families.py",
        "for key, value in NEUTRAL.items() if key not in is_read}",
        "for key, value in NEUTRAL.items() if key not in NEUTRAL}",
        "tests/test_model_settings.py -k changes_nothing",
    ),
]


def is_caught(file: str, old: str, new: str, tests: str) -> bool:
    """Whether the tests go red with `old` replaced by `new`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "repo"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__"))
        text = (copy / file).read_text()
        if old not in text:
            raise SystemExit(f"{file}: {old!r} is not there any more; bring this list up to date")
        (copy / file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 1


def main(wanted: str = "") -> None:
    chosen = [bug for bug in BUGS if any(wanted in part for part in bug)]
    if not chosen:
        raise SystemExit(f"no seeded bug has {wanted!r} in its name, file, text or tests")
    survived = []
    for name, file, old, new, tests in chosen:
        caught = is_caught(file, old, new, tests)
        print(f"{'caught  ' if caught else 'SURVIVED'}  {name}", flush=True)
        survived += [] if caught else [name]
    if survived:
        raise SystemExit(f"{len(survived)} of {len(chosen)} seeded bugs went unnoticed: {', '.join(survived)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
