"""Signals, full disks, locks, kills in bad moments, another run's files: nothing is lost, and every
refusal says what to do. faults.py kills at random moments; here the moments are chosen."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import largest_difference, options, weights
from safetensors.torch import load_file, save_file

import data
import evaluate
import train
from model import BadInput, Transformer

HOME = Path(train.__file__).parent


def command(file: str, *argv, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, HOME / file, *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def small_files(size: int) -> dict:
    """A disk that is full: no file can grow beyond `size` bytes."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step(toy_model, traces, tmp_path, whole, signals, monkeypatch, capsys,
                                 number):
    """Guards a step that is lost or half done after Ctrl-C or a cluster's SIGTERM, and an exit code
    that looks like success. The step is saved though no checkpoint was due."""
    steps, original = itertools.count(1), torch.optim.AdamW.step

    def step(self, *more):
        if next(steps) == 7:
            os.kill(os.getpid(), number)
        return original(self, *more)

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch.optim.AdamW, "step", step)
        data.one_line_errors(train.train, options(toy_model, traces, out), on_signal=train.stop)
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert f"{number.name}: step 7 is saved in {out}; the same command with --resume" in said
    assert [folder.name for folder in out.glob("checkpoint*")] == ["checkpoint-00000007"]
    train.STOP.clear()
    train.train(options(toy_model, traces, out, "--resume"))
    assert largest_difference(weights(out), whole) == 0


def test_a_second_signal_stops_at_once(signals):
    train.stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        train.stop(signal.SIGINT, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_answers(toy_model, tmp_path, signals, monkeypatch, capsys, number):
    """Guards answers lost to a signal, and a traceback in place of how to go on."""
    data.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1 a+2", "answer": "3"}] * 6)
    settings = ["accuracy", "--model", str(toy_model), "--benchmark", str(tmp_path / "p.jsonl"),
                "--max-new-tokens", "3", "--batch-size", "2", "--out"]
    evaluate.main([*settings, str(tmp_path / "whole.jsonl")])
    batches, original = itertools.count(1), Transformer.sample

    def sample(self, *args, **more):
        if next(batches) == 3:
            os.kill(os.getpid(), number)
        return original(self, *args, **more)

    out = tmp_path / "r.jsonl"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Transformer, "sample", sample)
        data.one_line_errors(evaluate.main, [*settings, str(out)])
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert f"interrupted: what is finished stands in {out}.part; the same command with" in said
    assert len(list(data.read_jsonl(f"{out}.part"))) == 4
    evaluate.main([*settings, str(out), "--resume"])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_score_goes_on(toy_model, traces, tmp_path, monkeypatch, capsys):
    """Guards hours of a teacher lost to a kill, records doubled or lost behind it, other batches
    after it (their last digits differ), and scores of other settings mixed in."""
    settings = ["score", "--traces", str(traces), "--teacher", str(toy_model), "--device", "cpu",
                "--max-length", "16", "--out"]
    small = ["--batch-size", "1"]  # windows of 16 records
    data.main([*settings, str(tmp_path / "whole.jsonl"), *small])
    said, out, part = capsys.readouterr().out, tmp_path / "s.jsonl", tmp_path / "s.jsonl.part"
    calls, original = [], data.response_logp

    def killed(model, examples, *rest):
        calls.append(len(examples))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(model, examples, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="with --resume"):
        patch.setattr(data, "response_logp", killed)
        data.main([*settings, str(out), *small])
    whole = part.read_text()  # a line for each window
    assert whole.count("\n") == 1 and not out.exists()
    with pytest.raises(BadInput, match=r"s\.jsonl\.part: work was broken off here; add --resume"):
        data.main([*settings, str(out), *small])
    with pytest.raises(BadInput, match="cannot resume: batch_size was 1, is now 2"):
        data.main([*settings, str(out), "--batch-size", "2", "--resume"])
    monkeypatch.setattr(data, "response_logp", killed)
    for kept, again in ((whole[:-20], 3), (whole + '{"found": [[{"id"', 2), (whole, 2)):
        calls[:] = [0, 0]
        part.write_text(kept)
        data.main([*settings, str(out), *small, "--resume"])
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
        assert len(calls) == 2 + again  # of three windows
        assert capsys.readouterr().out.partition(":")[2] == said.partition(":")[2]


def test_two_processes(toy_model, traces, tmp_path):
    """Guards two processes that write one folder, also a first one that is still at work; the lock
    goes with its process. A real Ctrl-C ends the first one with how to go on, and no traceback."""
    args = options(toy_model, traces, tmp_path / "run", "--steps", "100000")
    first = command("train.py", *argv_of(args))
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    with pytest.raises(BadInput, match="run: another process is writing this; wait for it, or"):
        train.train(options(toy_model, traces, tmp_path / "run", "--resume"))
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130 and "is saved in" in said and "Traceback" not in said
    saved, = (tmp_path / "run").glob("checkpoint*")
    step = int(saved.name[-8:]) + 2
    args = options(toy_model, traces, tmp_path / "run", "--steps", "100000", "--resume")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"{step}"):
        patch.setattr(train, "STOP", [])
        original = train.backward

        def backward(*rest):
            if next(count) == 3:  # the second step
                train.STOP.append(signal.SIGTERM)
            return original(*rest)

        count = itertools.count()
        patch.setattr(train, "backward", backward)
        train.train(args)
    assert not (tmp_path / "run.lock").exists()


def test_full_disk_in_training(toy_model, traces, half, whole):
    """Guards a full disk that takes the last good checkpoint along, and an error without a path.
    60 kB are enough for the student (48 kB), not for the optimizer behind it."""
    args = options(toy_model, traces, half, "--resume")
    _, said = command("train.py", *argv_of(args), **small_files(60_000)).communicate()
    assert said.startswith(f"error: {half}/checkpoint-00000010: cannot be written (") and (
        "File too large" in said and said.count("\n") == 1), said
    assert [folder.name for folder in half.glob("checkpoint*")] == ["checkpoint-00000005"]
    train.train(args)
    assert largest_difference(weights(half), whole) == 0


def test_full_disk_at_the_end(toy_model, traces, half, whole, monkeypatch):
    """Guards an error without a path, or a run that counts as finished, when the student itself
    does not fit any more."""
    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = options(toy_model, traces, half, "--resume", "--save-every", "5")
    with monkeypatch.context() as patch, pytest.raises(BadInput, match=(
            rf"{half}: cannot be written \(.*No space left on device")):
        patch.setattr(train, "save_checkpoint", lambda *_: None)
        patch.setattr(Transformer, "save_pretrained", full)
        train.train(args)
    assert [folder.name for folder in half.glob("checkpoint*")] == ["checkpoint-00000005"]
    train.train(args)
    assert largest_difference(weights(half), whole) == 0


def test_full_disk_in_answers(toy_model, tmp_path):
    """Guards half an answer in the file, and answers that cannot be resumed after it."""
    data.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1 a+2", "answer": "3"}] * 6)
    settings = ["accuracy", "--model", toy_model, "--benchmark", tmp_path / "p.jsonl",
                "--max-new-tokens", "3", "--out"]
    out = tmp_path / "r.jsonl"
    _, said = command("evaluate.py", *settings, out, **small_files(1500)).communicate()
    assert f"error: {out}.part: cannot be written (" in said and "Traceback" not in said, said
    assert 0 < Path(f"{out}.part").stat().st_size <= 1500
    for name, more in (("r", ["--resume"]), ("whole", [])):
        evaluate.main([*map(str, settings), str(tmp_path / f"{name}.jsonl"), *more])
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


def test_killed_before_the_first_line(toy_model, traces, half, whole, tmp_path):
    """Guards a folder that is refused for ever since its run died before run.json was there, and a
    log whose last line is half a line."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text('{"opt')
    train.train(options(toy_model, traces, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json.tmp").exists()
    with open(half / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    (half / "checkpoint-00000010.tmp" / ".saving-x").mkdir(parents=True)  # killed in the next one
    train.train(options(toy_model, traces, half, "--resume"))
    assert largest_difference(weights(half), whole) == 0
    assert [json.loads(line)["step"] for line in open(half / "log.jsonl")] == [3, 5, 6, 9, 10, 12]


@pytest.mark.parametrize("change, named", [
    ("another run's checkpoint", "run.json: missing, damaged or of another run; delete .*00005"),
    ("other options in run.json", "run.json: missing, damaged or of another run; delete .*00005"),
    ("flipped bytes", r"optimizer.safetensors: missing, damaged or of another run"),
    ("a file less", r"tokenizer.json: missing, damaged or of another run"),
    ("another model's optimizer", r"optimizer.safetensors: missing, damaged or of another run"),
    ("no sums", r"sums.json: missing, or not a JSON object")])
def test_checkpoints_that_are_refused(toy_model, traces, half, tmp_path, change, named):
    """Guards going on from what is not this run's own state."""
    checkpoint, = half.glob("checkpoint*")
    optimizer = checkpoint / "optimizer.safetensors"
    if change == "another run's checkpoint":
        args = options(toy_model, traces, tmp_path / "other", "--seed", "1")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "STOP", [signal.SIGINT])
            train.train(args)
        shutil.rmtree(checkpoint)
        (tmp_path / "other" / "checkpoint-00000001").rename(checkpoint)
    elif change == "other options in run.json":
        run = (half / "run.json").read_text()
        (half / "run.json").write_text(run.replace('"lr":0.01', '"lr":0.02'))
        with pytest.raises(BadInput, match=r"cannot resume: lr was 0\.02, is now 0\.01"):
            train.train(options(toy_model, traces, half, "--resume"))
        (half / "run.json").write_text(run.replace('"traces":40', '"traces":41'))
    elif change == "flipped bytes":
        content = bytearray(optimizer.read_bytes())
        content[-1] ^= 1
        optimizer.write_bytes(content)
    elif change == "a file less":
        (checkpoint / "tokenizer.json").unlink()
    elif change == "another model's optimizer":
        save_file({name: value.flatten()[:1].clone()
                   for name, value in load_file(optimizer).items()}, optimizer)
    else:
        (checkpoint / "sums.json").unlink()
    with pytest.raises(BadInput, match=named):
        train.train(options(toy_model, traces, half, "--resume"))
