"""Hostile files: nothing that they hold is executed, and nothing outside a folder is read. What is
only broken is in test_errors.py."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import train
from model import BadInput

GOOD = {"id": 1, "prompt": "7 a+3 b*4", "response": "a=0 b=0 #### 0", "answer": "0",
        "teacher_logprobs": [-1.0] * 5}


@pytest.fixture
def place(toy_model, tmp_path, monkeypatch):
    """A folder with a model and traces, to spoil; commands run in it."""
    shutil.copytree(toy_model, tmp_path / "m")
    data.write_jsonl(tmp_path / "t.jsonl", [GOOD] * 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_index_stays_in_its_folder(place):
    """Guards tensors that an index fetches from elsewhere: here they would even fit."""
    Path("m/model.safetensors").rename("secret.safetensors")
    names = load_file("secret.safetensors").keys()
    for path in ("../secret.safetensors", str(place / "secret.safetensors")):
        Path("m/model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": dict.fromkeys(names, path)}))
        with pytest.raises(BadInput, match=r"secret\.safetensors: missing, corrupt"):
            data.load("m")


def test_model_text_is_text(place):
    """Guards a page that runs what a trace says, and a fence around it: `<script>` in the prompt,
    the response and the model's name is shown, not run."""
    evil = "<script>alert(1)</script>"
    shutil.copytree("m", "<img src=x>")
    data.write_jsonl("t.jsonl", [{**GOOD, "prompt": evil, "response": evil,
                                  "teacher_logprobs": [-1.0] * 2}])
    evaluate.main(["weights", "--student", "<img src=x>", "--traces", "t.jsonl", "--out", "o.html",
                   "--device", "cpu"])
    page = Path("o.html").read_text()
    assert "<script" not in page and "<img" not in page
    assert "&lt;img src=x&gt;" in page


def test_no_pickle_is_read(place, monkeypatch):
    """Guards code that runs because it lay in a folder: a model or a checkpoint with pickles in it
    is resumed without opening one."""
    def refused(*_, **__):
        raise AssertionError("a pickle was opened")

    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        Path("m", name).write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    for module in (pickle, torch.serialization):
        monkeypatch.setattr(module, "load", refused)
    monkeypatch.setattr(torch, "load", refused)
    options = "--student m --traces t.jsonl --out run --steps 2 --save-every 1 --device cpu"
    train.train(train.parse_args(options.split()))
    assert not Path("hacked").exists() and not list(Path("run").glob("*.bin"))
