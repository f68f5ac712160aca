"""The study's own weights (look-ahead, floor, probe), which its conclusions rest on."""

import math

import numpy as np
import pytest
import study
import torch
from conftest import make_hf, options

import data
import loss
import train
from model import Transformer


@pytest.mark.parametrize(("gamma", "floor", "probed"), [
    (0.0, 0.3, False), (0.5, 0.0, False), (0.9, 0.0, True), (0.0, 0.0, True)])
def test_changed_weight(toy_model, traces, tmp_path, monkeypatch, gamma, floor, probed):
    """Guards a look-ahead that runs on into the next trace or backwards, a probe's number of
    another token or trace, and a floor that is none. By hand, token by token."""
    for module, name in ((loss, "discord_weight"), (train, "backward")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    monkeypatch.setitem(train.CHUNK, "cpu", 256)
    student, tokenizer = data.load(toy_model)
    examples = data.load_traces(traces, tokenizer, 64, teacher=True)[0][:7]
    support = data.response_logp(student, examples)
    if probed:
        folder = tmp_path / "probe"
        folder.mkdir()
        for file in toy_model.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        make_hf(folder, "qwen2", seed=9, vocab_size=129, num_hidden_layers=1)
        other = data.response_logp(Transformer.from_pretrained(folder), examples)
        support = [np.maximum(a, b) for a, b in zip(support, other, strict=True)]
    study.changed(traces, gamma, floor, tmp_path / "probe" if probed else None)
    batch = data.collate(examples)
    found = train.backward(student, batch, options("s", "t", "o"), len(batch.labels))[2].item()
    expected = 0.0
    for example, q_logp in zip(examples, support, strict=True):
        r = [float(q) - float(p) for q, p in zip(q_logp, example.teacher_logp, strict=True)]
        for t in range(len(r)):
            seen = sum(gamma ** (k - t) * r[k] for k in range(t, len(r)))
            expected += max(floor, 2 / (1 + math.exp(-seen / loss.TAU)))
    assert found == pytest.approx(expected, rel=1e-4)
    assert study.WEIGHT(torch.zeros(1), torch.zeros(1)).item() == 1.0


def test_tabular_fixed_point():
    """Guards the figure's table: method.md's fact 5 on both sides of tau = 1/2."""
    assert study.tabular(0.7, [0.4, 0.35, 0.25], 3000) == pytest.approx([0.5, 0.3, 0.2], abs=2e-3)
    assert study.tabular(0.3, [0.4, 0.35, 0.25], 3000)[0] < 0.05
