"""train.py: gradients, accumulation, resuming, refusals, real input. Everything through train()."""

import hashlib
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import largest_difference, make_hf, options, weights
from huggingface_hub import ModelCard
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import data
import evaluate
import loss
import train
from model import BadInput, Transformer

# -------------------------------------------------------------------------------------- gradients


def all_logits(model, batch):
    """Of the supervised positions, over all rows of the head, without `Transformer.logits`."""
    head = getattr(model, "lm_head", model.model.embed_tokens).weight
    return (model(batch.tokens) @ head.T).flatten(0, 1)[batch.positions]


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_chunked_backward_equals_full_logits(toy_model, traces, tmp_path, monkeypatch, objective):
    """Guards a chunk that is lost or counted twice, hidden states whose gradient stops at the
    chunk, prompts that are trained on, head rows that the tokenizer does not have, and an end of
    turn with another weight than 1."""
    monkeypatch.setitem(train.CHUNK, "cpu", 7)
    folder = tmp_path / "wide"
    shutil.copytree(toy_model, folder)
    make_hf(folder, "qwen2", vocab_size=150, seed=5)
    make_hf(tmp_path / "teacher", "qwen2", vocab_size=140, seed=6)
    student, tokenizer = data.load(folder)
    teacher = None
    if loss.OBJECTIVES[objective][0] is not loss.sft:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(toy_model / file, tmp_path / "teacher")
        teacher = data.load(tmp_path / "teacher")[0].requires_grad_(False)
    examples, _ = data.load_traces(traces, tokenizer, 64, need_logprobs=True)
    batch, V = data.collate(examples[:9]), tokenizer.vocab_size
    args = options(folder, traces, tmp_path, "--objective", objective, "--tau", "0.8", "--beta",
                   "0.3")
    assert len(batch.labels) % 7 and V == 129 == student.vocab_size

    sums = train.backward(student, batch, args, 1234, teacher)
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    p_logits = None
    if teacher is not None:
        with torch.no_grad():
            p_logits = all_logits(teacher, batch)[:, :V]
    q_logits = all_logits(student, batch)[:, :V]
    losses, formula = loss.token_losses(objective, q_logits, batch.labels, p_logits,
                                        batch.teacher_logp, 0.8, 0.3)
    is_end = batch.labels == tokenizer.eot_id
    weight = formula.masked_fill(is_end, 1)
    (weight * losses).sum().div(1234).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)
    expected = torch.stack([(weight * losses).sum(), losses.sum(), weight.sum(),
                            weight.square().sum(), formula[is_end].sum(), is_end.sum()]).double()
    assert expected[5] == 9 and (weight is formula or expected[4] != 9 or objective in
                                 ("sft", "kl", "rkl", "todi", "gkd"))
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, far", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_odd_lengths_are_right(toy_model, traces, tmp_path, dtype, far):
    """A response of 2,000 tokens, of one, of only the end of turn, and a trace without any
    supervised token, with log p from 0 to -1e4: the gradient is that of float64, and finite."""
    rng, end = np.random.default_rng(0), 3
    shapes = {"long": (5, 2000), "one": (9, 1), "end": (4, 0), "nothing": (6, -1)}
    examples = []
    for prompt, response in shapes.values():
        ids = np.append(rng.integers(4, 129, prompt + max(response, 0)), end).astype(np.int32)
        teacher_logp = rng.choice([0.0, -0.5, -1e4], response + 1).astype(np.float32)
        examples.append(data.Example(ids, prompt + (response < 0), teacher_logp))
    batch, found = data.collate(examples), []
    assert len(batch.labels) == 2001 + 2 + 1
    args = options(toy_model, traces, tmp_path)
    for args.dtype in (dtype, "float64"):
        student = Transformer.from_pretrained(toy_model, getattr(torch, args.dtype) if
                                              args.dtype == "float64" else torch.float32)
        sums = train.backward(student, batch, args, len(batch.labels))
        found.append([sums, *(p.grad.double() for p in student.parameters())])
    size = max(exact.abs().max() for exact in found[1][1:])
    assert all(x.isfinite().all() for x in found[0])
    assert max((x - exact).abs().max() for x, exact in zip(*found, strict=True) if x.ndim > 0
               and x is not found[0][0]) < far * size
    assert ((found[0][0] - found[1][0]).abs() / found[1][0]).max() < far


@pytest.mark.parametrize("objective", ["discord", "rkl"])
def test_logits_are_freed_before_the_backward_pass(toy_model, traces, tmp_path, monkeypatch,
                                                   objective):
    """Guards two of the largest tensors (a tenth of a step's peak) held while the gradient takes
    as much again."""
    freed, token_losses = [], loss.token_losses

    def spy(objective, q_logits, y, p_logits, *rest):
        losses, w = token_losses(objective, q_logits, y, p_logits, *rest)
        storages = [StorageWeakRef(logits.untyped_storage())
                    for logits in (q_logits, p_logits) if logits is not None]
        losses.register_hook(lambda _: freed.extend(ref.expired() for ref in storages))
        return losses, w

    monkeypatch.setattr(loss, "token_losses", spy)
    student, tokenizer = data.load(toy_model)
    teacher = data.load(toy_model)[0].requires_grad_(False) if objective == "rkl" else None
    examples, _ = data.load_traces(traces, tokenizer, 64, need_logprobs=True)
    args = options(toy_model, traces, tmp_path, "--objective", objective)
    train.backward(student, data.collate(examples[:4]), args, 100, teacher)
    assert freed == [True] * (2 if teacher else 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_are_the_same(toy_model, traces, tmp_path, dtype):
    """Guards activations that are recomputed with other weights than the first time (the fp32 ones:
    the cast ones are gone in the backward pass), and an option that keeps everything after all."""
    make_hf(tmp_path / "m", "qwen2", vocab_size=129, seed=3, num_hidden_layers=6)
    examples, _ = data.load_traces(traces, data.Tokenizer(toy_model), 64, need_logprobs=True)
    batch, found, kept = data.collate(examples[:16]), [], []
    args = options(toy_model, traces, tmp_path, "--dtype", dtype)
    for run in (torch.nn.Module.__call__, train.recompute_block):
        student = Transformer.from_pretrained(tmp_path / "m")
        student.block_forward, size = run, []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, size=size: size.append(x.nbytes) or x, lambda x: x):
            student(batch.tokens)
        kept.append(sum(size) - sum(p.nbytes for p in student.parameters()))
        train.backward(student, batch, args, 100)
        found.append({name: p.grad for name, p in student.named_parameters()})
    assert largest_difference(*found) == 0
    assert kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize(("dtype", "more"), [
    ("bfloat16", []), ("float32", ["--recompute"])])
def test_compiled_run_is_the_same(toy_model, traces, tmp_path, monkeypatch, dtype, more):
    """Guards --compile: weights frozen into the graph (the cast ones change with each step), a
    graph for each block or each shape (at most two: one more when the shape changes), and an option
    that does nothing. The compiler's front and autograd are the real ones; C++ would take 30 s."""
    graphs, saved = CompileCounterWithBackend("aot_eager"), []
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(
        torch.nn.Module.compile, backend=graphs))
    make_hf(tmp_path / "m", "qwen2", vocab_size=129, seed=3, num_hidden_layers=3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy_model / file, tmp_path / "m")
    for run in ([], ["--compile"]):
        torch.compiler.reset()
        args = options(tmp_path / "m", traces, tmp_path / f"run{run}", "--dtype", dtype,
                       "--batch-size", "2", "--grad-accum", "2", "--lr", "1e-4", *more, *run)
        train.train(args)
        saved.append(weights(tmp_path / f"run{run}"))
    assert largest_difference(*saved) < 2e-5
    assert 1 <= graphs.frame_count <= 2


def test_result_does_not_depend_on_the_cut(toy_model, traces, tmp_path):
    """Guards a mean of micro-batch means: on ragged data 8 x 1, 4 x 2, 2 x 4 and 1 x 8 must agree,
    in the gradient to 1e-6, and over a whole run. (AdamW turns the rounding of gradients that are
    zero in theory, those of key biases, into whole steps, so the run is compared less strictly.)"""
    gradients, results, logs = [], [], []
    for batch_size, grad_accum in ((8, 1), (4, 2), (1, 8), (2, 4)):
        out = tmp_path / f"{batch_size}"
        args = options(toy_model, traces, out, "--batch-size", str(batch_size), "--grad-accum",
                       str(grad_accum), "--lr", "1e-4")
        student, tokenizer = data.load(toy_model)
        examples, _ = data.load_traces(traces, tokenizer, 64, need_logprobs=True)
        parts = data.step_examples(examples, 0, batch_size, grad_accum, 0)
        assert [len(part) for part in parts] == [batch_size] * grad_accum
        batches = [data.collate(part) for part in parts]
        tokens = sum(len(batch.labels) for batch in batches)
        for batch in batches:
            train.backward(student, batch, args, tokens)
        gradients.append({name: p.grad for name, p in student.named_parameters()})
        train.train(args)
        results.append(weights(out))
        logs.append([json.loads(line)["loss"] for line in open(out / "log.jsonl")])
    for other in (1, 2, 3):
        assert largest_difference(gradients[0], gradients[other]) < 1e-6
        assert largest_difference(results[0], results[other]) < 1e-5
        assert max(abs(a - b) for a, b in zip(logs[0], logs[other], strict=True)) < 1e-5
    assert largest_difference(results[0], weights(toy_model)) > 3e-4
    assert max(grad.abs().max() for grad in gradients[0].values()) > 0.1


def test_ten_steps_equal_a_plain_loop(toy_model, traces, tmp_path):
    """Guards the loop as a whole (schedule, clipping, order, zeroed gradients) against the same run
    written with transformers' model, whole logits and unfused AdamW."""
    args = options(toy_model, traces, tmp_path / "run", "--steps", "10", "--objective", "discord")
    train.train(args)
    tokenizer, model = data.Tokenizer(toy_model), AutoModelForCausalLM.from_pretrained(toy_model)
    examples, _ = data.load_traces(traces, tokenizer, 64, need_logprobs=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(10):
        batch = data.collate(data.step_examples(examples, step, 8, 1, seed=0)[0])
        logits = model(batch.tokens).logits.flatten(0, 1)[batch.positions, :129]
        nll = -logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
        weight = 2 / (1 + ((batch.teacher_logp + nll.detach()) / loss.TAU).exp())
        weight[batch.labels == tokenizer.eot_id] = 1
        optimizer.zero_grad()
        (weight * nll).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.55 + 0.45 * math.cos(math.pi * step / 10))
        optimizer.step()
    expected = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    assert largest_difference(weights(tmp_path / "run"), expected) < 1e-3


def test_learning_rate():
    args = train.parse_args(["--student", "s", "--traces", "t", "--out", "o", "--lr", "1.0",
                             "--steps", "100"])
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0]) and rates[100] == pytest.approx(0.1)
    assert rates[51] + rates[52] == pytest.approx(1.1, abs=5e-4)  # half-way down
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_bf16_keeps_fp32_weights(toy_model, traces, tmp_path):
    """Guards bf16 master weights: at lr 1e-4, updates would round to nothing. The loss must follow
    fp32's."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        train.train(options(toy_model, traces, out, "--dtype", dtype, "--lr", "1e-4", "--objective",
                            "sft"))
        losses[dtype] = [json.loads(line)["loss"] for line in open(out / "log.jsonl")]
    change = {dtype: {name: tensor - weights(toy_model)[name] for name, tensor
                      in weights(tmp_path / dtype).items()} for dtype in losses}
    for name, exact in change["float32"].items():
        cosine = torch.cosine_similarity(exact.flatten(), change["bfloat16"][name].flatten(), dim=0)
        assert cosine > 0.8 or name.endswith("bias"), (name, cosine)
    assert losses["bfloat16"] != losses["float32"]
    assert max(abs(a - b) for a, b in zip(*losses.values(), strict=True)) < 0.05


def test_log(toy_model, traces, tmp_path, capsys):
    """Guards logged numbers that are not those of the interval: the first line is recomputed."""
    run = train.train(options(toy_model, traces, tmp_path / "run", "--lr", "1e-12", "--tau", "0.9"))
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10, 12]
    student, tokenizer = data.load(toy_model)
    examples, _ = data.load_traces(traces, tokenizer, 64, need_logprobs=True)
    seen = []
    for step in range(3):
        seen += data.step_examples(examples, step, 8, 1, 0)[0]
    nll = -torch.from_numpy(np.concatenate(data.response_logp(student, seen)))
    teacher_logp = torch.from_numpy(np.concatenate([example.teacher_logp for example in seen]))
    w = loss.discord_weight(-nll, teacher_logp, 0.9)
    ends = np.cumsum([len(example.teacher_logp) for example in seen]) - 1
    assert lines[0]["end"] == pytest.approx(w[ends].mean().item(), rel=1e-5)
    w[ends] = 1  # as in SFT
    assert lines[0]["loss"] == pytest.approx((w * nll).mean().item(), rel=1e-5)
    assert lines[0]["unweighted"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert lines[0]["weight"] == pytest.approx(w.mean().item(), rel=1e-5)
    ess = (w.sum()**2 / w.square().sum() / len(w)).item()
    assert lines[0]["ess"] == pytest.approx(ess, rel=1e-5)
    printed = capsys.readouterr().out
    sample = f"{tokenizer.decode(examples[0].tokens[:examples[0].prompt_length].tolist())}["
    assert run["sample"].startswith(sample) and run["sample"].endswith(" <end>]")
    for part in ("tok/s ", "gb ", run["sample"], "dropped: none", "steps 0 to 12", "traces   40 "):
        assert part in printed
    assert "--tau 0.9" in printed and run["options"]["tau"] == 0.9 and run["seconds"] > 0
    assert run["traces"] == 40 and run["steps"] == 12
    assert run["first"] == lines[0] and run["last"] == lines[-1]


def test_model_card(toy_model, traces, tmp_path, monkeypatch):
    """Guards a README.md that the Hub cannot read, a command that does not make the run, a base
    model that only this machine has, and a text of the user's that is overwritten."""
    out = tmp_path / "run"
    run = train.train(options(toy_model, traces, out, "--recompute", "--tau", "1"))
    text = (out / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert card.data.tags == ["distillation", "discord"]
    command, = (line.strip() for line in text.splitlines() if "python train.py" in line)
    again = train.parse_args(shlex.split(command)[2:])
    for key, value in run["options"].items():
        assert key == "traces_sha256" or vars(again)[key] == value, key
    assert again.out == str(out) and "trained on 40 reasoning traces (traces.jsonl)" in text
    assert f"Unweighted loss: {run['first']['unweighted']:.3f} in the first steps" in text
    named = {**run, "options": {**run["options"], "student": "org/name"}}
    assert ModelCard(train.model_card(out, named)).data.base_model == "org/name"
    args = options(toy_model, traces, tmp_path / "own", "--resume")
    interrupted(monkeypatch, args, 7)
    (tmp_path / "own/README.md").write_text("Mine.")
    train.train(args)
    assert (tmp_path / "own/README.md").read_text() == "Mine."


def test_log_of_tiny_weights(toy_model, traces, tmp_path):
    """Guards a traceback at a low tau: the student finds each token much less likely than the
    teacher, so that no weight's square is above 0 in fp32."""
    sure = [{**record, "teacher_logprobs": [-1e-6] * len(record["teacher_logprobs"])}
            for _, record in data.read_jsonl(traces)]
    data.write_jsonl(tmp_path / "sure.jsonl", sure)
    train.train(options(toy_model, tmp_path / "sure.jsonl", tmp_path / "run", "--tau", "0.001",
                        "--lr", "1e-12"))
    for line in open(tmp_path / "run" / "log.jsonl"):
        line = json.loads(line)
        assert 0 < line["ess"] < 1.001 and 0 < line["end"] < 1e-9 < line["unweighted"]


# --------------------------------------------------------------------------------- runs and files


class Killed(Exception):
    pass


def interrupted(monkeypatch, args, at):
    """Runs until the `at`-th optimizer step, then dies as from a signal."""
    steps, original = [], torch.optim.AdamW.step

    def step(self, *more):
        steps.append(1)
        if len(steps) == at:
            raise Killed
        return original(self, *more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", step)
        train.train(args)


@pytest.mark.parametrize("at", [2, 5, 9, 12])
def test_resume_is_bit_for_bit(toy_model, traces, tmp_path, monkeypatch, at):
    """Guards a resumed run that replays or skips traces, loses AdamW's state or its step count, the
    tokenizer (once it lay in a checkpoint that had been removed since), or logs a step twice. Dying
    before the first checkpoint (step 5) starts over."""
    train.train(options(toy_model, traces, tmp_path / "whole"))
    interrupted(monkeypatch, options(toy_model, traces, tmp_path / "cut"), at)
    train.train(options(toy_model, traces, tmp_path / "cut", "--resume"))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0
    for name in ("checkpoint-00000010", ".saving-x"):  # killed when it was done but for this
        (tmp_path / "cut" / name).mkdir()
    train.train(options(toy_model, traces, tmp_path / "cut", "--resume"))
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "cut")]
    assert files[0] == files[1] and "tokenizer.json" in files[1]
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
            for name in ("whole", "cut")]
    for line in logs[0] + logs[1]:
        del line["tok/s"], line["gb"], line["seconds"]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "cut").glob("checkpoint*"))


def test_result_has_the_trained_weights(traces, toy_model, tmp_path, monkeypatch):
    """Guards a student that came as a bf16 checkpoint and is saved in bf16 again: rounding would
    undo what small steps have learned. Here and in transformers, the saved student has the trained
    fp32 weights bit for bit, its tokenizer, and the end of turn among its EOS ids."""
    folder, students, original = tmp_path / "bf16", [], train.backward
    shutil.copytree(toy_model, folder)
    Transformer.from_pretrained(toy_model, torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr(train, "backward", lambda student, *rest: (
        students.append(student), original(student, *rest))[1])
    train.train(options(folder, traces, tmp_path / "run", "--lr", "1e-4", "--dtype", "bfloat16"))
    trained = students[-1].state_dict()
    rounded = {name: tensor.bfloat16().float() for name, tensor in trained.items()}
    assert largest_difference(trained, rounded) > 1e-4  # or the test would not see the rounding
    ours, tokenizer = data.load(tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    for state in (ours.state_dict(), theirs.state_dict()):
        assert all(tensor.dtype == torch.float32 and tensor.equal(trained[name])
                   for name, tensor in state.items() if name != "lm_head.weight")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float32"
    tokens = torch.tensor([tokenizer.encode("7 a+3 b*4 c-2")])
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.logits(ours(tokens))).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == [3]


def test_broken_loss_stops_the_run(toy_model, traces, tmp_path):
    """Guards training on after a NaN, and a checkpoint that is overwritten with it."""
    args = options(toy_model, traces, tmp_path / "run", "--save-every", "1")
    original, calls = train.backward, []

    def poisoned(student, *rest):
        calls.append(1)
        sums = original(student, *rest)
        if len(calls) == 9:  # the first micro-batch of step 5
            next(student.parameters()).grad.fill_(math.nan)
        return sums

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput) as error:
        patch.setattr(train, "backward", poisoned)
        train.train(args)
    assert str(error.value) == (f"{tmp_path / 'run'}: loss or gradient is not finite in steps 5 to "
                                "5; begin anew with a lower --lr")
    kept = [folder.name for folder in (tmp_path / "run").glob("checkpoint*")]
    assert kept == ["checkpoint-00000004"]
    train.train(options(toy_model, traces, tmp_path / "run", "--save-every", "1",
                        "--resume"))


def test_warnings_of_a_run_that_goes_wrong(toy_model, traces, tmp_path, capsys):
    """Guards a collapse that looks like success, since the weighted loss falls; each sign is said
    once, SFT says neither, and a healthy run nothing. Steps with several copies of a trace, too."""
    far, near = tmp_path / "far.jsonl", tmp_path / "near.jsonl"
    for file, logp in ((far, -0.01), (near, -5.0)):  # of a teacher that is sure, or guesses
        records = [record for _, record in data.read_jsonl(traces)]
        for record in records:
            record["teacher_logprobs"] = [logp] * len(record["teacher_logprobs"])
        data.write_jsonl(file, records)
    said = {}
    for name, file, more in (("far", far, ["--tau", "0.1"]), ("sft", far, ["--objective", "sft"]),
                             ("wild", traces, ["--lr", "1", "--steps", "12"]),
                             ("healthy", near, ["--lr", "1e-4"])):
        train.train(options(toy_model, file, tmp_path / name, "--batch-size", "30", *more))
        said[name] = capsys.readouterr().out
    assert said["far"].count("warning: many tokens are unlikely for the student") == 1
    assert said["wild"].count("warning: the unweighted loss was") == 1
    assert said["wild"].count("try --objective sft") >= 1
    # between the failed and the good runs of the study
    first = {"ess": 0.6, "unweighted": 2.0, "end": 0.11}
    assert [list(train.collapse_warnings({**first, "weight": w}, 2.0)) for w in (0.56, 0.63)] == [
        ["weight"], []]
    assert list(train.collapse_warnings({**first, "weight": 0.9, "end": 0.09}, 2.0)) == ["end"]
    rising = {"weight": 0.9, "unweighted": 0.4, "end": 1.0}  # reverse KL begins near 0
    assert train.collapse_warnings(rising, 0.1) == {}
    for name in ("sft", "healthy"):
        copies = said[name].count("a step holds each trace 1.5 times")
        assert said[name].count("warning: ") == copies == 1


def test_another_device_may_continue(toy_model, traces, tmp_path, monkeypatch):
    """Guards a run that can only be resumed where it began: without --dtype, the default of each
    device is no other option. A dtype that was given stays."""
    interrupted(monkeypatch, options(toy_model, traces, tmp_path / "run"), 7)
    args = options(toy_model, traces, tmp_path / "run", "--resume", "--device", "cuda:1")
    found = train.load_run(args)["options"]
    assert "device" not in found and found["dtype"] == args.dtype == "float32"
    with pytest.raises(BadInput, match="cannot resume: dtype was float32, is now bfloat16"):
        train.load_run(options(toy_model, traces, tmp_path / "run", "--resume", "--dtype",
                               "bfloat16"))


def edit_code(folder, **code):
    """As if these files had other hashes when the run began."""
    run = json.loads((folder / "run.json").read_text())
    run["code"] = {**data.CODE, **{f"{name}.py": value for name, value in code.items()}}
    data.write_jsonl(folder / "run.json", [run])


def test_a_run_of_other_code(toy_model, traces, tmp_path, monkeypatch, capsys):
    """Guards a finished run of older code that passes for one of today's, and a run that two
    versions share without a word. Only what shapes the training counts; a run without hashes is
    older than all."""
    out = tmp_path / "run"
    interrupted(monkeypatch, options(toy_model, traces, out), 7)
    resumed = options(toy_model, traces, out, "--resume")
    train.load_run(resumed)
    assert "changed since" not in capsys.readouterr().out
    edit_code(out, loss="other", data="other")
    train.train(resumed)
    assert f"{out}: data.py, loss.py changed since this run began\n" in capsys.readouterr().out
    advice = "to train again, choose another --out or remove the folder"
    for code, said in (({"loss": "other"}, "loss.py"),
                       ({"train": "", "model": "1"}, "model.py, train.py")):
        edit_code(out, **code)
        with pytest.raises(BadInput) as error:
            train.train(resumed)
        assert str(error.value) == f"{out}: finished, but {said} changed since: {advice}"
    edit_code(out, evaluate="other")
    train.train(resumed)
    assert "this run is finished" in capsys.readouterr().out
    run = json.loads((out / "run.json").read_text())
    del run["code"]
    data.write_jsonl(out / "run.json", [run])
    with pytest.raises(BadInput, match=r"but model\.py, data\.py, loss\.py, train\.py ch"):
        train.train(resumed)
    for name, digest in data.CODE.items():
        source = Path(train.__file__).with_name(name).read_bytes()
        assert hashlib.sha256(source).hexdigest().startswith(digest) and len(digest) == 8


def test_the_toy_after_an_edit(tmp_path, monkeypatch, capsys):
    """Guards a table that shows the runs of older code after an edit of loss.py, and two minutes
    for a teacher, a student and traces that are there. Old answers of all models go."""
    names = "teacher", "seed0/student", "seed0/sft", "seed0/discord"
    setup = {"temperature": 0, "model": "m", "benchmark": "b", "max_new_tokens": 9}
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        data.write_jsonl(tmp_path / name / "run.json", [{"seconds": 1.0}])
        edit_code(tmp_path / name, loss="other")
        code = {**data.CODE, "model.py": "other"} if name == "teacher" else data.CODE
        data.write_jsonl(tmp_path / name / "held-out-greedy.jsonl", [
            {"setup": {**setup, "code": code}, "id": 1, "answer": "5", "correct": True,
             "finished": True, "teacher_logprobs": []}])
    edit_code(tmp_path / "seed0/sft", evaluate="other")  # no part of the training
    (tmp_path / "seed0/traces.jsonl").write_text("")
    trained, asked = [], []
    monkeypatch.setattr(train, "build_toy", lambda root, seed: None)
    monkeypatch.setattr(train, "train", lambda args: trained.append(Path(args.out).name))
    monkeypatch.setattr(evaluate, "main", lambda argv: asked.append(argv))
    train.toy(train.parse_args(["--out", str(tmp_path)]))
    assert trained == ["sft", "discord"] and not (tmp_path / "seed0/discord").exists()
    left = sorted(str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("run.json"))
    assert left == ["seed0/sft", "seed0/student", "teacher"]
    assert (tmp_path / "seed0/traces.jsonl").exists()
    assert [(tmp_path / name / "held-out-greedy.jsonl").exists() for name in names] == [
        False, True, True, False]
    assert not any("problems.jsonl" in word for argv in asked for word in argv)
    said = f"{tmp_path}/seed0/discord: loss.py changed, so it is trained again\n"
    assert capsys.readouterr().out.count(said) == 1


@pytest.fixture
def slow_clock(monkeypatch) -> None:
    """It ticks 7 s at each look: after a step, for a line, after it. A checkpoint takes 1,000 s."""
    now, save = [0], train.save_checkpoint

    def look():
        now[0] += 7
        return now[0]

    def slow(*args):
        now[0] += 1000
        save(*args)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=look))
    monkeypatch.setattr(train, "save_checkpoint", slow)
    for limit in ("LOG_SECONDS", "SAVE_SECONDS"):
        monkeypatch.setattr(train, limit, math.inf)


def test_seconds_and_tokens_per_second(toy_model, traces, tmp_path, monkeypatch, slow_clock):
    """Guards a time that forgets the processes before, tok/s that counts a checkpoint's time as
    training, and tok/s without the prompts, which are most of the work in short answers."""
    interrupted(monkeypatch, options(toy_model, traces, tmp_path / "run"), 7)
    run = train.train(options(toy_model, traces, tmp_path / "run", "--resume"))
    lines = [line for _, line in data.read_jsonl(tmp_path / "run" / "log.jsonl")]
    assert [line["seconds"] for line in lines] == [28, 56, 70, 105, 126, 1161]
    assert run["seconds"] == 1175
    examples, _ = data.load_traces(traces, data.Tokenizer(toy_model), 64)
    size = [sum(len(example.tokens) for part in data.step_examples(examples, step, 4, 2, 0)
                for example in part) for step in range(12)]
    steps = [0, *(line["step"] for line in lines)]
    assert [line["tok/s"] for line in lines] == [
        round(sum(size[a:b]) / (7 * (b - a + 1))) for a, b in itertools.pairwise(steps)]


def test_lines_and_checkpoints_by_time(toy_model, traces, tmp_path, monkeypatch, capsys,
                                       slow_clock):
    """Guards slow steps that say nothing for minutes, that are lost when a run is killed, and that
    give no time to go where no bar shows it."""
    monkeypatch.setattr(train, "LOG_SECONDS", 25)
    monkeypatch.setattr(train, "SAVE_SECONDS", 40)
    interrupted(monkeypatch, options(toy_model, traces, tmp_path / "run", "--log-every", "100",
                                     "--save-every", "100"), 8)
    lines = [line["step"] for _, line in data.read_jsonl(tmp_path / "run" / "log.jsonl")]
    saved = [folder.name for folder in (tmp_path / "run").glob("checkpoint*")]
    said = capsys.readouterr().out
    assert lines == [4, 5] and saved == ["checkpoint-00000005"]
    assert re.findall(r"\S+ to go", said) == ["01:10 to go", "01:18 to go"]


def test_dtype_by_device(tmp_path):
    """Guards training in fp32 on a GPU, where attention is slow in it, and in bf16 on a CPU; a
    student saved in fp32 that is rounded when it is graded on a GPU. --dtype wins."""
    for own, more, expected in (("float32", ["--device", "cuda"], "float32"),
                                ("bfloat16", ["--device", "cuda:1"], "bfloat16"),
                                ("float16", ["--device", "cuda"], "float32"),
                                ("bfloat16", ["--device", "cpu"], "float32"),
                                ("float32", ["--device", "cuda", "--dtype", "bfloat16"],
                                 "bfloat16")):
        args = train.parse_args(["--student", "s", "--traces", "t", "--out", "o", *more])
        (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": own}))
        assert data.compute_dtype(args, str(tmp_path)) == expected
    run = ["--student", "s", "--traces", "t", "--out", "o"]
    for more, expected in ((["--device", "cpu"], "float32"), (["--device", "cuda:0"], "bfloat16"),
                           (["--device", "cuda", "--dtype", "float32"], "float32"),
                           (["--device", "cpu", "--dtype", "bfloat16"], "bfloat16")):
        assert data.compute_dtype(train.parse_args([*run, *more])) == expected
    assert train.parse_args(["--device", "cuda"]).dtype == "float32"  # the toy's digits


def test_runs_that_are_refused(toy_model, traces, tmp_path, monkeypatch, capsys):
    """Guards two runs in one folder, and resuming with other options or other traces. Each message
    names the folder or file and the cause. A finished run stays as it is."""
    out, given = tmp_path / "run", traces.read_text()
    traces, other = tmp_path / "traces.jsonl", tmp_path / "other.jsonl"
    traces.write_text(given)
    other.write_text(given.replace("t1", "t2"))
    interrupted(monkeypatch, options(toy_model, traces, out), 7)

    def refused(match, *more, traces=traces, out=out):
        with pytest.raises(BadInput, match=match):
            train.train(options(toy_model, traces, out, *more))

    refused(r"run: holds a run already; add --resume")
    refused("cannot resume: tau was 1.0, is now 0.5", "--resume", "--tau", "0.5")
    refused("cannot resume: objective was discord, is now sft", "--resume", "--objective", "sft")
    refused("cannot resume: traces was", "--resume", traces=other)
    traces.write_text(given + "\n")
    refused("cannot resume: other traces than before", "--resume")
    traces.write_text(given)
    train.train(options(toy_model, traces, out, "--resume"))
    before = (out / "model.safetensors").stat().st_mtime_ns
    train.train(options(toy_model, traces, out, "--resume"))
    assert "finished" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    refused("not empty, but no run of train.py", out=traces.parent)


def test_teacher_in_memory_equals_stored_scalars(toy_model, tmp_path):
    """Guards log p(y) taken from other positions or over other rows of the head: discord with
    --teacher and discord with what data.py score stored are the same run, up to 4 decimals."""
    make_hf(tmp_path / "teacher", "qwen2", vocab_size=131, seed=7)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(toy_model / file, tmp_path / "teacher" / file)
    rng, plain, scored = random.Random(3), tmp_path / "plain.jsonl", tmp_path / "scored.jsonl"
    data.write_jsonl(plain, [train.toy_trace(rng, skip=0.4) for _ in range(40)])
    data.main(["score", "--traces", str(plain), "--teacher", str(tmp_path / "teacher"), "--out",
               str(scored)])
    train.train(options(toy_model, plain, tmp_path / "a", "--teacher", str(tmp_path / "teacher")))
    train.train(options(toy_model, scored, tmp_path / "b"))
    for name in ("sft", "dft"):  # these need no number
        train.train(options(toy_model, plain, tmp_path / name, "--objective", name))
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) < 1e-3
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "sft")) > 1e-2
    assert largest_difference(weights(tmp_path / "dft"), weights(tmp_path / "sft")) > 1e-2


def test_on_policy_batches(toy_model, traces, tmp_path):
    """Guards GKD's share of self-written answers: their number, prompts that change, answers that
    are not the present student's, an end of turn that is lost."""
    teacher = tmp_path / "teacher"
    shutil.copytree(toy_model, teacher)
    make_hf(teacher, "qwen2", vocab_size=129, seed=7)
    more = ["--objective", "gkd", "--teacher", str(teacher), "--on-policy"]
    student, tokenizer = data.load(toy_model)
    examples, rewritten, finished = data.load_traces(traces, tokenizer, 64)[0], [], 0
    args = options(toy_model, traces, tmp_path / "x", *more, "0.3")
    for step in range(20):
        parts = [list(examples[:5]), list(examples[5:10])]
        assert train.resample_on_policy(student, parts, step, args) is None
        assert [len(part) for part in parts] == [5, 5]
        for i, example in enumerate(parts[0] + parts[1]):
            old, size = examples[i], example.prompt_length
            assert size == old.prompt_length
            assert (example.tokens[:size] == old.tokens[:size]).all()
            if example is not old:
                rewritten.append((0, step, i))
                response = example.tokens[size:].tolist()
                assert len(response) <= max(len(e.tokens) - e.prompt_length for e in examples[:10])
                assert tokenizer.eot_id not in response[:-1]
                finished += response[-1] == tokenizer.eot_id
                prompt = example.tokens[:size].tolist()
                assert student.generate([prompt], len(response), 1.0, [(0, step, i)]) == [response]
    assert 40 < len(rewritten) < 80 and finished > 0  # 60 expected, with a deviation of 6.5
    first = [np.random.default_rng(seed).random() < 0.3 for seed in rewritten]
    assert 0.1 < np.mean(first) < 0.5  # or the number that decides also draws the first token
    train.train(options(toy_model, traces, tmp_path / "off", *more, "0"))
    train.train(options(toy_model, traces, tmp_path / "on", *more, "0.5"))
    assert largest_difference(weights(tmp_path / "off"), weights(tmp_path / "on")) > 1e-2


def test_on_policy_answers_do_not_depend_on_the_cut(toy_model, traces, tmp_path):
    """Guards answers that end at the longest trace of their micro-batch, or draw by their place in
    it: 1 x 4, 2 x 2 and 4 x 1 have the same answers, as long as the longest trace of the step."""
    student, tokenizer = data.load(toy_model)
    student.eos_token_ids = []
    examples, _ = data.load_traces(traces, tokenizer, 64)
    args = options(toy_model, traces, tmp_path, "--on-policy", "0.7")
    for step in range(5):
        found = []
        for size, count in ((4, 1), (2, 2), (1, 4)):
            parts = data.step_examples(examples, step, size, count, 0)
            lengths = [len(e.tokens) - e.prompt_length for part in parts for e in part]
            train.resample_on_policy(student, parts, step, args)
            found.append([e.tokens.tolist() for part in parts for e in part])
            new = [e for part in parts for e in part if e.teacher_logp is None and not any(
                e is old for old in examples)]
            assert {len(e.tokens) - e.prompt_length for e in new} == {max(lengths)}
        assert found[0] == found[1] == found[2] and len(set(lengths)) > 1


def test_on_policy_resumes_bit_for_bit(toy_model, traces, tmp_path, monkeypatch):
    """Guards draws that depend on what was drawn before the interruption."""
    more = ["--objective", "gkd", "--teacher", str(toy_model), "--on-policy", "0.5"]
    train.train(options(toy_model, traces, tmp_path / "whole", *more))
    interrupted(monkeypatch, options(toy_model, traces, tmp_path / "cut", *more), 7)
    train.train(options(toy_model, traces, tmp_path / "cut", *more, "--resume"))
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0


def test_the_toy_honors_every_option(tmp_path, monkeypatch):
    """Guards an option that the toy world takes and ignores, a run that is reused for another one,
    and options of the student's runs that reach the teacher, which all of them share."""
    fits, answers = [], []
    monkeypatch.setattr(train, "build_toy", lambda root, seed: None)
    monkeypatch.setattr(train, "train", lambda args: fits.append(vars(args)))
    monkeypatch.setattr(evaluate, "main", answers.append)
    given = ["--out", str(tmp_path), "--seed", "3", "--objective", "gkd", "--on-policy", "0.5",
             "--beta", "0.4", "--dtype", "bfloat16", "--recompute", "--steps", "7"]
    train.toy(train.parse_args(given))
    teacher, before, sft, gkd = fits
    assert [run["out"] for run in fits] == [str(tmp_path / name) for name in (
        "teacher", "seed3/student", "seed3/sft-steps=7",
        "seed3/gkd-beta=0.4-on_policy=0.5-steps=7")]
    assert {run["steps"] for run in (sft, gkd)} == {7} and (teacher["steps"], before["lr"]) == (
        2000, 5e-3)
    assert [run["lr"] for run in (sft, gkd)] == [0.03, 0.03]  # each its best one
    assert gkd["teacher"] == str(tmp_path / "teacher") and not sft["teacher"]
    assert [(run["on_policy"], run["beta"], run["dtype"], run["seed"], run["recompute"])
            for run in fits] == [
        (0, 0.5, "float32", 0, False), (0, 0.5, "float32", 0, False),
        (0, 0.5, "bfloat16", 3, True), (0.5, 0.4, "bfloat16", 3, True)]
    assert all(run["resume"] and run["max_length"] == 64 for run in fits) and len(answers) == 10


def test_the_toy_reuses_no_run_of_other_options(toy_model, traces, tmp_path, monkeypatch):
    """Guards a folder whose name lacks an option (dtype, max-length): it is refused, not reused."""
    monkeypatch.setattr(train, "build_toy", lambda root, seed: None)
    monkeypatch.setattr(evaluate, "main", lambda argv: None)
    original = train.train

    def trained(args):
        if Path(args.out).name != "discord":
            return None
        args.student, args.traces = str(toy_model), str(traces)
        return original(args)

    monkeypatch.setattr(train, "train", trained)
    given = ["--out", str(tmp_path), "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(train, "TOY_DEFAULTS", {**train.TOY_DEFAULTS, "steps": 2})
    train.toy(train.parse_args(given))
    train.toy(train.parse_args(given))
    for more, message in ((["--dtype", "bfloat16"], "dtype was float32, is now bfloat16"),
                          (["--max-length", "99"], "max_length was 64, is now 99"),
                          (["--recompute"], "recompute was False, is now True")):
        with pytest.raises(BadInput, match=f"cannot resume: {message}"):
            train.toy(train.parse_args([*given, *more]))


def test_start_is_fast(tmp_path, traces):
    """Guards a start that takes two seconds more since it imports the compiler, and a traceback or
    several lines of the Hub's client for a mistyped name."""
    done = subprocess.run([sys.executable, "-X", "importtime", train.__file__, "--student",
                           "nobody/none", "--traces", str(traces), "--out", str(tmp_path / "run")],
                          capture_output=True, text=True, check=False)
    assert "torch.nn" in done.stderr and "torch._dynamo" not in done.stderr
    said = re.sub("(?m)^import time:.*\n", "", done.stderr)
    assert said.startswith("error: nobody/none: not a folder, and the Hub says")
    assert done.returncode == 1 and said.count("\n") == 1 and not list(tmp_path.iterdir())
