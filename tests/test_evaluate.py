"""evaluate.py: grading, answers, accuracy, and that a teacher's right answers train a student."""

import json
import random

import pytest
from conftest import make_hf

import data
import evaluate
import train
from model import BadInput


@pytest.mark.parametrize("prediction, gold, right", [
    ("so it is 12.\n#### 12", "12", True), ("#### 1,234", "Half of it.\n#### 1234", True),
    ("#### 12", "13", False), (r"\boxed{7}", "7", True), (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{1} or rather \boxed{2}", "2", True), (r"\boxed{1} or rather \boxed{2}", "1", False),
    ("The answer is $18.00.", "18", True), ("it costs 3 dollars", "3", True), ("", "3", False),
    ("025", "25", True), ("27", "27.0", True), ("-5", "5", False), ("1/3", "0.3333", False),
    (r"\boxed{x + 1}", "x+1", True), (r"\boxed{x + 1}", "x+2", False), ("", "", False),
    (r"\boxed{(1,200)}", "(1, 200)", True), ("1/0", "1/0", True), ("#### 9^9^9^9", "3", False),
    (r"#### 4 and then \boxed{5", "4", False)])
def test_grading(prediction, gold, right):
    """Guards the order of the places an answer is looked for, and numbers compared as text."""
    assert evaluate.is_correct(prediction, gold) is right


def test_hostile_text_is_graded_quickly():
    """Guards evaluation of text, and searches whose time grows with the square of its length."""
    for text in ("9" * 100000, r"\boxed{" * 20000, "#### " + "1," * 50000, "{" * 100000,
                 "(" * 100000, r"\boxed{" * 9000 + "}" * 8999):
        assert evaluate.is_correct(text, "3") is False


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(5)
    return [{"id": i, **data.toy_trace(rng)} for i in range(30)]


def test_answers_do_not_depend_on_batching(toy_model, problems):
    """Guards seeds by batch or by row: any batch size and order give the same answers, samples of
    one problem differ, and another seed gives others."""
    model, tokenizer = data.load(toy_model)

    def texts(batch_size, seed=0, chosen=problems):
        records = evaluate.answers(model, tokenizer, chosen, 3, 1.0, max_new_tokens=9,
                                   batch_size=batch_size, seed=seed)
        assert [(r["id"], r["sample"]) for r in records] == [(p["id"], k) for p in chosen
                                                              for k in range(3)]
        return [record["response"] for record in records]

    assert texts(7) == texts(90)
    assert texts(7, chosen=problems[:11]) == texts(7)[:33]
    assert len(set(texts(7))) > 60 and texts(7) != texts(7, seed=1)


class Script:
    """Stands for a model that answers with given texts, in the order of the prompts' lengths."""

    def __init__(self, tokenizer, replies):
        self.tokenizer, self.replies, self.eos_token_ids = tokenizer, replies, [tokenizer.end]

    def sample(self, prompts, max_new_tokens, *_, **__):
        replies = [self.replies[self.tokenizer.backend.decode(p).split()[0]] for p in prompts]
        ids = [[*self.tokenizer.encode(text), self.tokenizer.end][:max_new_tokens]
               for text in replies]
        return [(row, [-0.123456] * len(row)) for row in ids]


def test_verdicts_and_summary(toy_model):
    """Guards credit for text that was cut off, and a standard error over answers instead of over
    problems. Problem 1 is right, 2 wrong, 3 cut off although its last number is right."""
    tokenizer = data.Tokenizer(toy_model)
    model = Script(tokenizer, {"1": "f=5 #### 5", "2": "f=5 #### 4",
                               "3": "a=5 b=5 c=5 d=5 e=5 f=5"})
    problems = [{"id": k, "prompt": f"{k} a+2", "answer": "5"} for k in (1, 2, 3)]
    records = evaluate.answers(model, tokenizer, problems, max_new_tokens=5)
    assert [r["correct"] for r in records] == [True, False, False]
    assert [r["finished"] for r in records] == [True, True, False]
    assert records[0] == {"id": 1, "prompt": "1 a+2", "answer": "5", "sample": 0, "correct": True,
                          "response": "f=5 #### 5", "finished": True, "extracted": "5",
                          "temperature": 0.0, "teacher_logprobs": [-0.1235] * 4}
    assert records[2]["tokens"] == tokenizer.encode("a=5 b=5 c=5 d=5 e=5")
    got = evaluate.summarise(records)
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert got["standard_error"] == pytest.approx((1 / 3 / 3) ** 0.5)
    assert got["mean_tokens"] == pytest.approx(13 / 3) and got["truncated"] == pytest.approx(1 / 3)
    twice = evaluate.summarise([r for r in records for _ in range(2)])
    assert twice["standard_error"] == got["standard_error"] and twice["samples"] == 2


def test_any_eos_ends_an_answer(toy_model):
    """Guards "#### 5<|endoftext|>" being graded as text, and traces that say another end than the
    one that was sampled: base models end with either of two tokens."""
    model, tokenizer = data.load(toy_model)
    other, ids = tokenizer.vocab["<user>"], tokenizer.encode("f=5 #### 5")
    model.eos_token_ids = [tokenizer.end, other]
    model.sample = lambda prompts, *_, **__: [([*ids, other], [-1.0] * 4) for _ in prompts]
    record, = evaluate.answers(model, tokenizer, [{"id": 1, "prompt": "1 a+2", "answer": "5"}])
    assert record["response"] == "f=5 #### 5" and record["correct"] and record["finished"]
    assert data.encode(record, tokenizer, "line 1").tokens[-4:].tolist() == [*ids, other]


def test_right_answers_become_traces(tmp_path, toy_model, problems, capsys):
    """Guards the three commands: evaluate a teacher, train on its file, evaluate the student. The
    records load with their log-probabilities, those of the model over the sampled tokens."""
    benchmark, out = tmp_path / "p.jsonl", tmp_path / "teacher.jsonl"
    data.write_jsonl(benchmark, [{k: p[k] for k in ("id", "prompt", "answer")} for p in problems])
    evaluate.main(["accuracy", "--model", str(toy_model), "--benchmark", str(benchmark),
                   "--samples", "20", "--temperature", "1.5", "--max-new-tokens", "40", "--out",
                   str(out)])
    records = [json.loads(line) for line in open(out)]
    right = [r for r in records if r["correct"]]
    assert 5 < len(right) < 300 and len(records) == 600
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"accuracy {len(right) / 600:.3f} +- " in line and "n=30 x 20" in line
    assert "T=1.5" in line and "cut off at 40" in line
    model, tokenizer = data.load(toy_model)
    examples, dropped = data.load_traces(out, tokenizer, 99, teacher=True)
    assert len(examples) == len(right)
    assert dropped["wrong"] + dropped["unfinished"] == 600 - len(right)
    for example in examples:
        logp = data.response_logp(model, data.collate([example]), tokenizer.vocab_size)
        assert abs(logp.detach().numpy() - example.p_logp).max() < 1e-3
    train.train(train.parse_args(["--student", str(toy_model), "--traces", str(out), "--out",
                                  str(tmp_path / "run"), "--steps", "2", "--device", "cpu"]))
    evaluate.main(["accuracy", "--model", str(tmp_path / "run"), "--benchmark", str(benchmark),
                   "--limit", "3", "--max-new-tokens", "5"])
    assert "n=3 x 1, greedy" in capsys.readouterr().out


def test_command_line_refuses(toy_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["accuracy", "--model", "m", "--benchmark", "b", "--samples", "2"])
    assert "--samples > 1 needs a --temperature above 0" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"b\.jsonl: cannot be read"):
        evaluate.main(["accuracy", "--model", str(toy_model), "--benchmark",
                       str(tmp_path / "b.jsonl")])
    make_hf(tmp_path / "m", "llama")
    data.write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "y"}])
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        evaluate.main(["accuracy", "--model", str(tmp_path / "m"), "--benchmark",
                       str(tmp_path / "b.jsonl")])
