"""TRL's GRPOTrainer on the workload, on the CPU: python -m experiments.peers.trl_grpo --what=update (TRL's environment).

rollout: the trainer's generation (transformers `generate`). update: reference log-probs if beta > 0, the trainer's own
training_step, clipping, AdamW, scheduler. step: `train()`, from the end of one step to the end of the next. mem: update.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.peers import workload
from experiments.peers.workload import LEARNING_RATE, PAD, Timing, Workload


def main() -> None:
    import torch
    import transformers
    import trl

    work = workload.parse()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_model(work, folder)
        trainer = make_trainer(work, folder)
        how = {"rollout": time_rollout, "step": time_step, "update": time_update, "mem": time_update}[work.what]
        timing = how(trainer, work)
    version = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    workload.emit(workload.report("trl", version, work, timing))


def make_tokenizer(work: Workload) -> Any:
    """One word a token. The stop token has an id that the model has no logit for, so that it is never sampled."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {workload.as_text([i]): i for i in range(work.shape.never + 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=workload.as_text([0])))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"eos_token": work.shape.never, "pad_token": PAD, "unk_token": 0}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{name: workload.as_text([i]) for name, i in special.items()})


def save_model(work: Workload, folder: str) -> None:
    """Random weights as a folder: the trainer loads its reference model from where the policy came from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = work.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=work.prompt_len + work.completion_len,
        bos_token_id=None,
        eos_token_id=shape.never,
        pad_token_id=PAD,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(work).save_pretrained(folder)


def make_trainer(work: Workload, folder: str) -> Any:
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work.rows_at_a_time,
        gradient_accumulation_steps=work.rows // work.rows_at_a_time,
        num_generations=work.group_size,
        max_completion_length=work.completion_len,
        temperature=1.0,
        beta=work.beta,
        loss_type="grpo",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_steps=max(work.warmup, 1) + work.repeats,
        bf16=work.dtype == "bfloat16",  # float32 weights under autocast
        gradient_checkpointing=work.remat,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    prompts = [workload.as_text(ids) for ids in work.prompt_ids()]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    return GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts * (args.max_steps + 1)}),
        processing_class=make_tokenizer(work),
    )


def time_rollout(trainer: Any, work: Workload) -> Timing:
    trainer.model.train()
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)  # as train() does: under bf16 it adds autocast
    ids = [row for row in work.prompt_ids() for _ in range(work.group_size)]

    def generate(_: int) -> list[list[int]]:
        completions, _logprobs = trainer._generate_single_turn(ids, None, {}, work.group_size)
        return completions

    def count(completions: list[list[int]]) -> float:
        assert {len(row) for row in completions} == {work.completion_len}, "a completion ended early"
        return float(work.num_tokens)

    return workload.timed(generate, count, work.warmup, work.repeats)


def time_update(trainer: Any, work: Workload) -> Timing:
    update = make_update(trainer, work)
    return workload.timed(lambda _: update(), lambda _: float(work.num_tokens), work.warmup, work.repeats)


def make_update(trainer: Any, work: Workload) -> Callable[[], float]:
    """What `train()` does with a generated batch, without the generation."""
    import torch

    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    prepared = trainer.accelerator.prepare(trainer.model, trainer.optimizer, trainer.lr_scheduler)
    model, optimizer, schedule = prepared
    trainer.model_wrapped, trainer.optimizer, trainer.lr_scheduler = prepared
    trainer._prepare_inputs = lambda inputs: inputs  # would generate
    if work.remat:  # train() switches it on
        trainer.model.gradient_checkpointing_enable()
    model.train()
    pieces = batch_pieces(work)
    trainer.current_gradient_accumulation_steps = len(pieces)

    def update() -> float:
        loss = 0.0
        for piece in pieces:
            inputs = dict(piece)
            if work.beta:
                tokens = torch.cat([piece["prompt_ids"], piece["completion_ids"]], 1)
                with torch.no_grad():
                    scored = trainer._get_per_token_logps_and_entropies(
                        trainer.ref_model, tokens, torch.ones_like(tokens), work.completion_len, batch_size=len(tokens)
                    )
                inputs["ref_per_token_logps"] = scored[0]
            loss += float(trainer.training_step(model, inputs, None))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trainer._metrics["train"].clear()
        return loss

    return update


def batch_pieces(work: Workload) -> list[dict[str, Any]]:
    """The batch as the trainer's inputs, microbatch by microbatch."""
    import torch

    prompt_ids = torch.tensor([row for row in work.prompt_ids() for _ in range(work.group_size)])
    completion_ids = torch.tensor(work.completion_ids())
    whole = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.tensor([workload.advantage(row) for row in range(work.rows)]),
    }
    num_items = torch.tensor(float(completion_ids.numel()))
    cuts = [slice(i, i + work.rows_at_a_time) for i in range(0, work.rows, work.rows_at_a_time)]
    return [{**{name: x[cut] for name, x in whole.items()}, "num_items_in_batch": num_items} for cut in cuts]


def time_step(trainer: Any, work: Workload) -> Timing:
    from transformers import PrinterCallback, TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    lengths = [entry["completions/min_length"] for entry in trainer.state.log_history if "completions/min_length" in entry]
    assert min(lengths) == work.completion_len, "a completion ended early"
    return workload.timed_by_marks(began, marks, work)


if __name__ == "__main__":
    main()
