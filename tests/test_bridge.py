"""The bridge: transformers' Trainer, and with it accelerate and FSDP, trains with loss.py from our
traces. `collate` and `DisCorD` are the whole of it; what they must equal is train.py."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import largest_difference, make_hf, options, weights
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import data
import loss
import train
from model import Transformer


def collate(examples: list[data.Example]) -> dict[str, Tensor]:
    rows = [{"input_ids": torch.tensor(e.tokens).long(),
             "attention_mask": torch.ones(len(e.tokens), dtype=torch.long),
             "labels": F.pad(torch.tensor(e.tokens[e.prompt_length:]).long(), (e.prompt_length, 0),
                             value=-100),
             "teacher_logprobs": F.pad(torch.tensor(e.teacher_logp), (e.prompt_length, 0))}
            for e in examples]
    return {key: pad_sequence([row[key] for row in rows], batch_first=True,
                              padding_value=-100 if key == "labels" else 0) for key in rows[0]}


class DisCorD(Trainer):
    objective, vocab_size = "discord", 129  # the tokenizer's: a head may have more rows
    eot_id = 3  # the end of turn, <|im_end|> in Qwen

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        y, p_logp = inputs.pop("labels")[:, 1:], inputs.pop("teacher_logprobs")[:, 1:]
        outputs, here = model(**inputs), y != -100
        q_logits = outputs.logits[:, :-1][here][:, :self.vocab_size]
        losses, w = loss.token_losses(self.objective, q_logits, y[here], p_logp=p_logp[here])
        w = w.masked_fill(y[here] == self.eot_id, 1)
        # by all tokens of the step on all GPUs; times GPUs, since their gradients become a mean
        total = (w * losses).sum() / num_items_in_batch * self.accelerator.num_processes
        return (total, outputs) if return_outputs else total


def trainer(folder: Path, examples: list[data.Example], size: int, accum: int, steps: int,
            out: Path | None = None, **more) -> DisCorD:
    args = TrainingArguments(
        str(out or folder / "out"), per_device_train_batch_size=size,
        gradient_accumulation_steps=accum, max_steps=steps, logging_steps=1, adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        train_sampling_strategy="sequential", use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", **more)
    return DisCorD(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args,
                   data_collator=collate, train_dataset=examples)


@pytest.fixture(scope="module")
def world(traces, tmp_path_factory) -> tuple[Path, list[data.Example]]:
    """A model whose head is wider than its tokenizer; traces with prompts of many lengths."""
    folder = tmp_path_factory.mktemp("bridge")
    make_hf(folder, "qwen2", vocab_size=train.save_toy_tokenizer(folder) + 8)
    data.write_jsonl(folder / "traces.jsonl", [
        {**record, "prompt": " ".join(record["prompt"].split()[:1 + 3 * i % 7])}
        for i, (_, record) in enumerate(data.read_jsonl(traces))])
    examples, _ = data.load_traces(folder / "traces.jsonl", data.Tokenizer(folder), 64, True)
    assert sorted(example.prompt_length for example in examples[:4]) == [3, 5, 6, 9]
    return folder, examples


def first_step(world: tuple, size: int, accum: int, objective: str = "discord") -> dict:
    """Loss and gradients of a step by the Trainer, not clipped: that would hide a wrong factor."""
    theirs, found = trainer(world[0], world[1][:4], size, accum, 1, max_grad_norm=0.0), {}
    theirs.objective = objective
    theirs.create_optimizer().register_step_pre_hook(lambda *_: found.update(
        {name: p.grad.clone() for name, p in theirs.model.named_parameters()}))
    theirs.train()
    return found | {"loss": torch.tensor(theirs.state.log_history[0]["loss"])}


def assert_ours(found: dict, world: tuple, objective: str = "discord") -> None:
    student, batch = data.load(world[0])[0], data.collate(world[1][:4])
    args = options("unused", "unused", "unused", "--objective", objective)
    student.vocab_size, tokens = DisCorD.vocab_size, len(batch.labels)
    sums = train.backward(student, batch, args, tokens)
    ours = {"loss": sums[0] / tokens, **{n: p.grad for n, p in student.named_parameters()}}
    assert largest_difference(found, ours) < 2e-6  # of 0.5 and more; fp32's own is up to 7e-7


@pytest.mark.parametrize("size, accum", [(1, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("objective", ["discord", "sft"])
def test_step_of_trainer_is_ours(world, objective, size, accum):
    """Guards a mean of micro-batch means (of 1, 3 and 4 ragged traces), log p(y) of the neighbor,
    prompts or padding that are trained on, and rows of the head that have no token."""
    assert_ours(first_step(world, size, accum, objective), world, objective)


def half(rank: int, world: tuple, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "unused", "MASTER_PORT": "1",  # they meet in a file instead
                   "OMP_NUM_THREADS": "1"}  # or accelerate asks for threads, which a fork has not
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group("gloo", f"file://{out}/meet", rank=rank, world_size=2)
    torch.save(first_step(world, 1, 2), out / f"rank{rank}")


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="it forks")
def test_step_of_two_processes_is_ours(world, tmp_path):
    """Guards gradients that are too small by the number of GPUs (a mean taken for a sum), and a
    GPU that divides by its own tokens, 14 or 15 of 29."""
    processes = [multiprocessing.get_context("fork").Process(
        target=half, args=(rank, world, tmp_path), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(60)
        assert_ours(torch.load(tmp_path / f"rank{rank}"), world)


def test_run_of_trainer_is_ours(world, tmp_path):
    """Guards another optimizer, schedule or clip, and a student that our files cannot open."""
    folder, examples = world
    train.train(options(folder, folder / "traces.jsonl", tmp_path / "ours", "--steps", "3", "--lr",
                        "1e-4"))
    order = [example for step in range(3)
             for micro_batch in data.step_examples(examples, step, 4, 2, seed=0)
             for example in micro_batch]
    theirs = trainer(folder, order, 4, 2, 3, learning_rate=1e-4)
    theirs.train()
    theirs.save_model(tmp_path / "theirs")
    start, one, other = (torch.cat([w.flatten() for w in weights(place).values()])
                         for place in (folder, tmp_path / "ours", tmp_path / "theirs"))
    assert (one - other).abs().max() < 1e-5
    assert (one - other).norm() < 1e-3 * (one - start).norm()  # 9e-5
    student, x = Transformer.from_pretrained(tmp_path / "theirs"), collate(order[:4])["input_ids"]
    with torch.no_grad():
        assert (theirs.model(x).logits - student.logits(student(x))).abs().max() < 1e-5
