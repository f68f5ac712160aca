"""The study's own weights and measures, which its conclusions rest on."""

import math
import random
import re
from collections import Counter

import pytest
import study
import torch
import words

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


def test_weights_of_prefixes():
    """Guards a refused token that lowers its own weight twice, or those of the next answer."""
    def token_losses(*rest):
        return torch.zeros(7), torch.tensor([0.5, 1.8, 0.9, 0.1, 2.0, 0.05, 1.0])

    y = torch.tensor([7, 8, study.END, 7, 8, 9, study.END])
    _, w = study.losses_of_prefixes("discord", None, y, token_losses=token_losses)
    assert torch.allclose(w, torch.tensor([0.5, 0.9, 0.45, 0.1, 0.2, 0.005, 0.05]))


def test_shares_of_ways():
    """Guards a letter or a marker counted as a way, and an infinite KL for a way never written:
    3 and 1 of 4 values, and one more of each."""
    records = [{"response": "a=1 b~2 c=3 #### 3"}, {"response": "f=0 #### 0"}]
    assert study.shares_of_ways(records).tolist() == pytest.approx([4 / 8, 1 / 8, 2 / 8, 1 / 8])


def test_parts_share_no_folder_by_mistake():
    """Guards two parts that give one name to different runs: the second part would stop, since its
    folder was made with other options."""
    parts = (study.rate_runs, study.tau_runs, study.prefix_runs, study.reach_runs,
             study.capacity_runs, study.dead_runs, study.ends_runs, study.ways_runs, study.far_runs)
    made = {}
    for run in (run for part in parts for run in part()):
        assert made.setdefault((run.world, run.seed, run.label), run.stages) == run.stages
    assert len(made) > 300


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


def test_problems_of_words():
    """Guards a question that its facts do not answer, or answer in two ways, facts told backwards
    and skips in other shares than asked for, and a written step that is wrong."""
    rng, hops, backwards, skips, pairs = random.Random(0), Counter(), 0, 0, 0
    for _ in range(2000):
        record = words.problem(rng, back=0.3, skip=0.25)
        prompt = record["messages"][-1]["content"]
        told, _, asked = prompt.rpartition("Who is")
        facts = words.known_facts(told)
        path = re.findall(r"the (\w+) of", asked)
        assert len(facts) == told.count(".") == len(path) + 2
        name = asked.removesuffix("?").split()[-1]
        assert words.follow(facts, name, path[::-1]) == record["answer"]
        hops[len(path)] += 1
        backwards += sum(way == "backwards" for _, way in facts.values()) / len(facts)
        found = words.read_steps({**record, "finished": True})
        for kind in ("forwards", "backwards", "skip"):
            assert found[f"{kind}, right"] == found[kind]
        assert found["invented"] == found["too early"] == found["too late"] == 0
        skips += found["skip"]
        pairs += found["skip"] + max(found["forwards"] + found["backwards"] - 1, 0)
    assert [hops[k] / 2000 for k in (2, 3, 4)] == pytest.approx([1 / 3] * 3, abs=0.04)
    assert backwards / 2000 == pytest.approx(0.3, abs=0.02)
    assert 0.2 < skips / pairs < 0.4


PROMPT = ("Tom's friend is Amy. Bob is the boss of Amy. Bob's coach is Eva. "
          "Who is the coach of the boss of the friend of Tom?")


def words_record(response: str, finished: bool = True) -> dict:
    return {"messages": [{"role": "user", "content": PROMPT}], "response": response,
            "finished": finished}


@pytest.mark.parametrize(("response", "expected"), [
    ("Tom's friend is Amy. Amy's boss is Bob. Bob's coach is Eva. #### Eva",
     {"forwards": 2, "forwards, right": 2, "backwards": 1, "backwards, right": 1}),
    ("Tom's friend is Amy. Amy's boss is Eva. #### Eva",
     {"forwards": 1, "forwards, right": 1, "backwards": 1, "too early": 1}),
    ("Tom's friend's boss is Amy. Bob's coach is Eva. #### Eva",
     {"skip": 1, "with a skip": 1, "forwards": 1, "forwards, right": 1}),
    ("Tom's friend's boss's coach is Eva. Eva's uncle is Tom. #### Tom",
     {"skip": 1, "skip, right": 1, "with a skip": 1, "invented": 1, "too late": 1}),
])
def test_steps_of_words(response, expected):
    """Guards a skip that counts as a look-up, a wrong one as right, a stop in the wrong place."""
    found = words.read_steps(words_record(response))
    assert {key: value for key, value in found.items() if value} == {"answers": 1, **expected}
    assert words.read_steps(words_record(response, finished=False))["too late"] == 1


def test_mean_of_seeds():
    """Guards an interval of one seed for all, and a mean of one column in another's place."""
    titles = ("greedy", "sampled", "greedy - SFT", "sampled - SFT")
    rows = [{"run": "DFT", "rate": "3e-5", "minutes": minutes,
             **{title: value + place / 10 for place, title in enumerate(titles)},
             **{f"± {title}": half for title in titles}}
            for value, half, minutes in ((0.1, 0.03, 2), (0.3, 0.04, 4))]
    assert words.mean_cells(rows) == ["DFT", "3e-5", "0.200 ± 0.025", "0.300 ± 0.025",
                                      "+0.400 ± 0.025", "+0.500 ± 0.025", "3.0"]


def test_kinds_of_tokens(toy_model):
    """Guards weights of tokens beside those that their row names; here a token is a word."""
    tokenizer = data.Tokenizer(toy_model)
    tokenizer.pieces = lambda ids: [
        "Tom", "'s", " friend", "'s", " boss", " is", " Bob", ".", " Bob", "'s", " coach", " is",
        " Eva", ".", " ####", " Eva", "<end>"]
    kinds = words.kinds_of_tokens(words_record(
        "Tom's friend's boss is Bob. Bob's coach is Eva. #### Eva"), tokenizer)
    assert {i: kind for i, kind in enumerate(kinds) if kind != "rest"} == {
        3: "'s, which begins a skip", 6: "name after a skip", 12: "name after a step told forwards",
        14: "#### after a step", 15: "answer after a step", 16: "end of turn after a step"}
