"""Ctrl-C, full disks, kills at bad moments, another run's files: nothing is lost, and every refusal
says what to do. faults.py kills at random moments; here the moments are chosen."""

import errno
import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import largest_difference, options, weights
from safetensors import SafetensorError

import data
import evaluate
import train
from model import BadInput, Transformer


def said_on_a_full_disk(size: int, main) -> str:
    """Runs a command while no file can grow beyond `size` bytes. Returns its last words."""
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), pytest.raises(
            SystemExit) as stopped:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            data.run_command(main)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in stopped.value.code and "\n" not in stopped.value.code
    return stopped.value.code


def argv_of(args) -> list[str]:
    return [text for key, value in vars(args).items() if value not in (None, False)
            for text in (f"--{key.replace('_', '-')}", str(value)) if text != "True"]


@pytest.fixture
def half(toy_model, traces, tmp_path, monkeypatch):
    """A run that was killed after step 7, with a checkpoint of step 5."""
    steps, original = itertools.count(1), torch.optim.AdamW.step

    def step(self, *more):
        if next(steps) == 8:
            raise ZeroDivisionError
        return original(self, *more)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch.optim.AdamW, "step", step)
        train.train(options(toy_model, traces, tmp_path / "half"))
    return tmp_path / "half"


@pytest.fixture(scope="session")
def whole(toy_model, traces, tmp_path_factory):
    """The weights of the same run, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train.train(options(toy_model, traces, out))
    return weights(out)


PLACES = {  # what is interrupted (of what), at which call, and the checkpoint that is there then
    "the first step": (torch.optim.AdamW, "step", 1, None),
    "before the first checkpoint": (torch.optim.AdamW, "step", 4, None),
    "a step": (torch.optim.AdamW, "step", 8, 5),
    "the first line of the log": (data, "write_lines", 2, None),  # the first call writes run.json
    "the weights of a checkpoint": (Transformer, "save_pretrained", 2, 5),
    "the optimizer of a checkpoint": (train, "save_file", 2, 5),
    "behind the renaming": (os, "sync", 2, 10),
    "the old checkpoint": (train, "remove_checkpoints", 2, 10),
    "the result": (Transformer, "save_pretrained", 3, 10),
    "the checkpoints of a finished run": (train, "remove_checkpoints", 3, 10)}


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_training(toy_model, traces, tmp_path, whole, monkeypatch, capsys, place):
    """Guards steps that are lost, half done or done twice after Ctrl-C, an exit code that looks
    like success, and a checkpoint that is removed before the next one is there."""
    owner, name, at, there = PLACES[place]
    calls, original, out = itertools.count(1), getattr(owner, name), tmp_path / "run"

    def interrupt(*args, **more):
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(owner, name, interrupt)
        data.run_command(lambda: train.train(options(toy_model, traces, out)), "add --resume")
    assert stopped.value.code == "interrupted; add --resume"
    newest = max(out.glob("checkpoint-????????"), default=None)
    assert newest == (there and out / f"checkpoint-{there:08}")
    capsys.readouterr()
    train.train(options(toy_model, traces, out, "--resume"))
    printed = capsys.readouterr().out
    assert f"steps {there or 0} to 12" in printed or "this run is finished" in printed
    assert largest_difference(weights(out), whole) == 0
    assert not [*out.glob("checkpoint*"), *out.glob("*.tmp"), *out.glob(".saving*")]
    assert [json.loads(line)["step"] for line in open(out / "log.jsonl")] == [3, 5, 6, 9, 10, 12]


def test_checkpoint_is_on_the_disk_before_the_old_one_goes(toy_model, traces, tmp_path,
                                                           monkeypatch):
    """Guards a machine that goes down: what was renamed may not have been written yet. Each
    checkpoint is written beside, renamed, and synced, and only then the old one is removed."""
    seen, sync, remove = [], os.sync, train.remove_checkpoints

    def names():
        return sorted(folder.name[11:] for folder in (tmp_path / "run").glob("checkpoint*"))

    monkeypatch.setattr(os, "sync", lambda: (seen.append(("sync", *names())), sync()))
    monkeypatch.setattr(train, "remove_checkpoints", lambda out, keep=None: (
        seen.append(("remove", *names())), remove(out, keep), seen.append(("removed", *names()))))
    monkeypatch.setattr(train, "save_file", lambda *args, original=train.save_file: (
        seen.append(("save", *names())), original(*args)))
    train.train(options(toy_model, traces, tmp_path / "run"))
    one, two = "00000005", "00000010"
    assert seen == [("save", "00000005.tmp"), ("sync", one), ("remove", one), ("removed", one),
                    ("save", one, "00000010.tmp"), ("sync", one, two), ("remove", one, two),
                    ("removed", two), ("remove", two), ("removed",)]


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_interrupted_answers(toy_model, tmp_path, monkeypatch, capsys, temperature):
    """Guards answers lost to Ctrl-C or to a kill, answers that are doubled or drawn differently
    after it, a half line, answers of other options mixed in, and a traceback in place of how to
    continue."""
    rng = random.Random(0)
    data.write_jsonl(tmp_path / "p.jsonl", [train.toy_trace(rng) for _ in range(6)])
    settings = ["accuracy", "--model", str(toy_model), "--benchmark", str(tmp_path / "p.jsonl"),
                "--max-new-tokens", "9", "--batch-size", "2", "--temperature", temperature, "--out"]
    evaluate.main([*settings, str(tmp_path / "whole.jsonl")])
    batches, original, count = [], Transformer.sample, 3

    def sample(self, prompts, *args, **more):
        batches.append(len(prompts))  # those of the whole run: its sums, to the last digit
        if len(batches) == count:
            raise KeyboardInterrupt
        return original(self, prompts, *args, **more)

    out, part = tmp_path / "r.jsonl", tmp_path / "r.jsonl.part"
    monkeypatch.setattr(Transformer, "sample", sample)
    with pytest.raises(SystemExit) as stopped:
        data.run_command(lambda: evaluate.main([*settings, str(out)]), "add --resume")
    assert stopped.value.code == "interrupted; add --resume"
    kept = part.read_text()
    assert kept.count("\n") == 4 and not out.exists()
    with pytest.raises(BadInput, match=r"r\.jsonl\.part: holds an evaluation; add --resume"):
        evaluate.main([*settings, str(out)])
    with pytest.raises(BadInput, match="cannot resume: max_new_tokens was 9, is now 8"):
        evaluate.main([*settings, str(out), "--resume", "--max-new-tokens", "8"])
    assert part.read_text() == kept
    for begun, again in ((kept[:-20], 2), (kept + '{"id": "1", "resp', 1), (kept, 1), ("", 3)):
        batches[:], count = [], 9
        part.write_text(begun)
        evaluate.main([*settings, str(out), "--resume"])
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
        assert batches == [2] * again  # of three
        out.unlink()
    part.write_text("".join(sorted(kept.splitlines(keepends=True))))  # an older OUT does not count
    out.write_text(kept.replace('"correct":false', '"correct":true'))
    batches[:] = []
    evaluate.main([*settings, str(out), "--resume"])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
    part.write_bytes(out.read_bytes())  # killed when it was done but for the removal
    evaluate.main([*settings, str(out), "--resume"])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
    assert len(batches) == 1
    capsys.readouterr()
    evaluate.main([*settings, str(out), "--resume"])  # finished: only printed
    assert "accuracy" in capsys.readouterr().out and len(batches) == 1
    with pytest.raises(BadInput, match=r"r\.jsonl: holds an evaluation; add --resume"):
        evaluate.main([*settings, str(out)])  # nothing is overwritten without a word


def test_ctrl_c(toy_model, traces, tmp_path):
    """Guards a traceback after a real Ctrl-C, in place of how to continue. (It reaches the command
    also where a shell in the background ignores it.) The run continues from its checkpoint."""
    args = options(toy_model, traces, tmp_path / "run", "--steps", "100000")
    process = subprocess.Popen(
        [sys.executable, train.__file__, *argv_of(args)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    begin = time.monotonic()
    while not list((tmp_path / "run").glob("checkpoint-????????")):
        assert time.monotonic() < begin + 60 and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert said.endswith("interrupted; to continue, add --resume\n")
    args.resume = True
    newest = max((tmp_path / "run").glob("checkpoint-????????"))
    original, rates = train.learning_rate, []

    def rate(step, args):
        rates.append(step)
        if len(rates) == 3:
            raise KeyboardInterrupt
        return original(step, args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learning_rate", rate)
        train.train(args)
    assert rates[0] == int(newest.name[-8:]) >= 5


def test_full_disk_in_training(toy_model, traces, half, whole):
    """Guards a full disk that takes the last good checkpoint along, and an error without a path.
    60 kB are enough for the student (48 kB), not for the optimizer behind it."""
    args = options(toy_model, traces, half, "--resume")
    said = said_on_a_full_disk(60_000, lambda: train.train(args))
    assert said.startswith(f"error: {half}/checkpoint-00000010: cannot be written (")
    assert [folder.name for folder in half.glob("checkpoint*")] == ["checkpoint-00000005"]
    train.train(args)
    assert largest_difference(weights(half), whole) == 0


def test_full_disk_at_the_end(toy_model, traces, half, whole, monkeypatch):
    """Guards a run that counts as finished when the student itself does not fit any more."""
    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = options(toy_model, traces, half, "--resume", "--save-every", "5")
    with monkeypatch.context() as patch, pytest.raises((OSError, BadInput), match=(
            "No space left on device")):
        patch.setattr(train, "save_checkpoint", lambda *_: None)
        patch.setattr(Transformer, "save_pretrained", full)
        train.train(args)
    assert [folder.name for folder in half.glob("checkpoint*")] == ["checkpoint-00000005"]
    train.train(args)
    assert largest_difference(weights(half), whole) == 0


@pytest.mark.parametrize("size", [10, 2500])
def test_full_disk_in_a_new_run(toy_model, traces, tmp_path, whole, size):
    """Guards a folder that is refused after its first file (run.json, 1 kB) did not fit, and half
    a checkpoint that keeps the disk full."""
    args, out = options(toy_model, traces, tmp_path / "run"), tmp_path / "run"
    said_on_a_full_disk(size, lambda: train.train(args))
    assert not [*out.glob("*.tmp"), *out.glob(".saving*"), *out.glob("checkpoint*")]
    args.resume = True
    train.train(args)
    assert largest_difference(weights(out), whole) == 0


def test_full_disk_in_answers(toy_model, tmp_path):
    """Guards half an answer in the file, and answers that cannot be resumed after it."""
    data.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1 a+2", "answer": "3"}] * 6)
    settings = ["accuracy", "--model", str(toy_model), "--benchmark", str(tmp_path / "p.jsonl"),
                "--max-new-tokens", "3", "--out"]
    out = tmp_path / "r.jsonl"
    said_on_a_full_disk(1500, lambda: evaluate.main([*settings, str(out)]))
    assert 0 < Path(f"{out}.part").stat().st_size <= 1500
    for name, more in (("r", ["--resume"]), ("whole", [])):
        evaluate.main([*settings, str(tmp_path / f"{name}.jsonl"), *more])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_nothing_half_written_stays(tmp_path):
    """Guards a good file that is overwritten by half of a new one, and what is left beside it."""
    data.write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_jsonl(tmp_path / "x.jsonl", rows())
    assert (tmp_path / "x.jsonl").read_text() == '{"a":1}\n'
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match=r"folder: cannot be written \(.*directory"):
        data.write_jsonl(tmp_path / "folder", [{"a": 1}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.jsonl"]


def test_killed_in_a_log_line(toy_model, traces, half, whole):
    """Guards a log whose last line is half a line, and what was being written when it died."""
    with open(half / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    (half / "checkpoint-00000010.tmp" / ".saving-x").mkdir(parents=True)  # killed in the next one
    (half / "run.json.tmp").write_text('{"opt')
    train.train(options(toy_model, traces, half, "--resume"))
    assert largest_difference(weights(half), whole) == 0
    assert [json.loads(line)["step"] for line in open(half / "log.jsonl")] == [3, 5, 6, 9, 10, 12]
    assert not [*half.glob("*.tmp"), *half.glob(".saving*")]


def test_killed_before_the_first_line(toy_model, traces, whole, tmp_path):
    """Guards a folder that is refused for ever since its run died before run.json was there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text('{"opt')
    train.train(options(toy_model, traces, tmp_path / "run"))
    assert largest_difference(weights(tmp_path / "run"), whole) == 0
    assert not (tmp_path / "run" / "run.json.tmp").exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "config.json",
                                  "optimizer.safetensors"])
@pytest.mark.parametrize("change", ["missing", "truncated", "empty"])
def test_checkpoints_that_are_refused(toy_model, traces, half, file, change):
    """Guards going on from what is not the whole state of this run."""
    checkpoint, = half.glob("checkpoint*")
    whole = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    if change != "missing":
        (checkpoint / file).write_bytes(whole[:-9] if change == "truncated" else b"")
    files = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    with pytest.raises((BadInput, FileNotFoundError, SafetensorError)) as error:
        train.train(options(toy_model, traces, half, "--resume"))
    if change == "missing" or file != "optimizer.safetensors":
        assert f"{checkpoint / file}" in str(error.value)
    assert files == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
