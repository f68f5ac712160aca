"""The study's own weights and measures, which its conclusions rest on."""

import math

import pytest
import study
import torch

import data
import train
from model import Transformer


def test_weights_in_place_of_discord():
    """Guards p and q exchanged, a ratio above 1 and a weight with a gradient: q = .2, p = .5 and
    the other way round."""
    q = torch.tensor([0.2, 0.5]).log().requires_grad_()
    p = torch.tensor([0.5, 0.2]).log()
    dft = study.WEIGHTS["dft"](q, p, 0.7)
    clipped = study.WEIGHTS["clipped"](q, p, 0.7)
    assert dft.tolist() == pytest.approx([0.2, 0.5])
    assert clipped.tolist() == pytest.approx([0.4, 1.0])
    assert not dft.requires_grad and not clipped.requires_grad


@pytest.mark.parametrize(("name", "ends"), [
    ("DFT", [(1, 0, 0)] * 4),
    ("min(1, q/p)", [study.TABLE_TEACHER] * 4),
    ("DisCorD, τ = 1", [study.TABLE_TEACHER] * 4),
    ("DisCorD, τ = 0.7", [study.TABLE_TEACHER, study.TABLE_TEACHER,
                          (0.625, 0.375, 0), (0, 0.6, 0.4)])])
def test_what_p_adds(name, ends):
    """Guards the answer to "why store p": without it, every start collapses to the teacher's mode;
    with it, the teacher's mixture comes back, unless tau < 1 and a token is nearly dead."""
    for end, found in zip(ends, study.softmax_table(name, 6000), strict=True):
        assert found == pytest.approx(end, abs=0.02)


def test_shares_of_ways():
    """Guards a letter or a marker counted as a way, and an infinite KL for a way never written:
    3 and 1 of 4 values, and one more of each."""
    records = [{"response": "a=1 b~2 c=3 #### 3"}, {"response": "f=0 #### 0"}]
    assert study.shares_of_ways(records).tolist() == pytest.approx([4 / 8, 1 / 8, 2 / 8, 1 / 8])


def test_world_with_four_ways(tmp_path, monkeypatch):
    """Guards lessons in shares other than asked for, values without a token of their own, and a
    student that is not the teacher's first layer."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(train, "save_toy_tokenizer", train.save_toy_tokenizer)  # to be put back
    world = study.World(ways=True)
    world.write_problems(tmp_path / "t.jsonl", 2000, shares=study.STUDENT_SHARES)
    records = [record for _, record in data.read_jsonl(tmp_path / "t.jsonl")]
    assert study.shares_of_ways(records).tolist() == pytest.approx(study.STUDENT_SHARES, abs=0.015)
    world.save_model(tmp_path / "model", 1, 48, 0)
    tokenizer = data.Tokenizer(tmp_path / "model")
    assert tokenizer.vocab_size == 129 + 3 * 60
    assert Transformer.from_pretrained(tmp_path / "model").vocab_size == 129 + 3 * 60
    ids = tokenizer.encode(" ".join(record["response"] for record in records))
    assert tokenizer.vocab["<unk>"] not in ids
    assert max(ids) > 129


def test_half_interval():
    """Guards a wrong Student's t or a standard deviation of the population."""
    assert study.half_interval([1, 2, 3]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
