"""evaluate.py without the grading: answers, accuracy, comparison, exposure, the page of weights,
the table of runs, and that a teacher's right answers train a student."""

import json
import math
import random
import re
import shutil
from argparse import Namespace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import make_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
import train
from model import BadInput, Config, Transformer


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(5)
    return [{"id": i, **train.toy_trace(rng)} for i in range(30)]


def test_answers_do_not_depend_on_batching(toy_model, problems):
    """Guards seeds by batch or by row: any batch size and order give the same answers, samples of
    one problem differ, and another seed gives others."""
    model, tokenizer = data.load(toy_model)

    def texts(batch_size, seed=0, chosen=problems):
        records = sorted(evaluate.generate_answers(model, tokenizer, chosen, 3, 1.0,
                                                   max_new_tokens=9, batch_size=batch_size,
                                                   seed=seed),
                         key=lambda record: (record["id"], record["sample"]))
        assert [(r["id"], r["sample"]) for r in records] == [(p["id"], k) for p in chosen
                                                              for k in range(3)]
        return [record["response"] for record in records]

    assert texts(7) == texts(90)
    assert texts(7, chosen=problems[:11]) == texts(7)[:33]
    assert len(set(texts(7))) > 60 and texts(7) != texts(7, seed=1)
    twins = texts(7, chosen=[{**problems[0], "id": name} for name in ("a", "b")])
    assert twins[:3] != twins[3:]  # the same question, asked twice


def test_generation_settings_are_named(toy_model, tmp_path, capsys):
    """Guards answers that transformers and vLLM would not give, without a word: Qwen2.5-Instruct
    comes with a penalty that changes greedy decoding. The saved student has no such setting."""
    shutil.copytree(toy_model, tmp_path / "m")
    problems, file = tmp_path / "p.jsonl", tmp_path / "m" / "generation_config.json"
    data.write_jsonl(problems, [{"prompt": "1 a+2", "answer": "3"}])
    said = []
    for settings in ({"repetition_penalty": 1.1, "top_p": 0.8, "do_sample": True},
                     {"repetition_penalty": 1.0, "temperature": 0.7, "pad_token_id": 5}, None):
        file.unlink(missing_ok=True)
        if settings:
            file.write_text(json.dumps(settings))
        evaluate.main(["accuracy", "--model", str(tmp_path / "m"), "--benchmark", str(problems),
                       "--max-new-tokens", "3", "--out", str(tmp_path / f"{len(said)}.jsonl")])
        said.append(capsys.readouterr().out)
    assert said[0].count("not applied here") == 1
    assert "transformers and vLLM: repetition_penalty=1.1 top_p=0.8\n" in said[0]
    assert "not applied" not in said[1] + said[2]
    file.write_text('{"repetition_penalty": 1.1, "eos_token_id": [3, 4]}')
    Transformer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved == {"eos_token_id": [3, 4]}


def test_progress_without_a_terminal(monkeypatch, capsys):
    """Guards seven silent minutes: a line a minute in a log file, none for short work, and
    the last line twice."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for minutes in (0.5, 5):
        for _ in data.progress(range(10), "answering"):
            now[0] += minutes * 60 / 10
        lines = capsys.readouterr().err.replace("\r", "").split("\n")
        found = [line for line in lines if line.strip()]
        assert len(found) == (0 if minutes < 1 else 5), found
    assert found[0] == "answering: 2 of 10, 01:00 so far, 04:00 to go"


class Script:
    """Stands for a model that answers with given texts, in the order of the prompts' lengths."""

    def __init__(self, tokenizer, replies, context=99):
        self.tokenizer, self.replies, self.eos_token_ids = tokenizer, replies, [tokenizer.eot_id]
        self.folder, self.config = "script", Namespace(max_position_embeddings=context)

    def sample(self, prompts, max_new_tokens, *_, **__):
        replies = [self.replies[self.tokenizer.backend.decode(p).split()[0]] for p in prompts]
        ids = [[*self.tokenizer.encode(text), self.tokenizer.eot_id][:max_new_tokens]
               for text in replies]
        return [(row, [-0.123456] * len(row)) for row in ids]


def test_verdicts_and_summary(toy_model):
    """Guards credit for text that was cut off, and a standard error over answers instead of over
    problems. Problem 1 is right, 2 wrong, 3 cut off although its last number is right."""
    tokenizer = data.Tokenizer(toy_model)
    model = Script(tokenizer, {"1": "f=5 #### 5", "2": "f=5 #### 4",
                               "3": "a=5 b=5 c=5 d=5 e=5 f=5"})
    problems = [{"id": k, "prompt": f"{k} a+2", "answer": "5"} for k in (1, 2, 3)]
    records = list(evaluate.generate_answers(model, tokenizer, problems, max_new_tokens=5))
    assert [r["correct"] for r in records] == [True, False, False]
    assert [r["finished"] for r in records] == [True, True, False]
    assert records[0] == {"id": 1, "prompt": "1 a+2", "answer": "5", "sample": 0, "correct": True,
                          "response": "f=5 #### 5", "finished": True, "extracted": "5",
                          "rendered": "<user> 1 a+2 <assistant>", "temperature": 0.0,
                          "prompt_tokens": 4, "teacher_logprobs": [-0.1235] * 4,
                          "vocab": tokenizer.vocab_hash}
    assert records[2]["tokens"] == tokenizer.encode("a=5 b=5 c=5 d=5 e=5")
    got = evaluate.summarize(records)
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert got["standard_error"] == pytest.approx((1 / 3 / 3) ** 0.5)
    assert got["mean_tokens"] == pytest.approx(13 / 3) and got["cut_off"] == pytest.approx(1 / 3)
    twice = evaluate.summarize([r for r in records for _ in range(2)])
    assert twice["standard_error"] == got["standard_error"] and twice["samples"] == 2


@pytest.mark.parametrize("text, gold, right", [
    (r"So it is \boxed{12}. Let me check: 12 is", "12", True),
    (r"So it is \boxed{12}. The final answer is 1", "1", False),
    (r"<think>\boxed{3}?</think> There are 4 rows of 5", "5", False), (r"So \boxed{1", "1", False)])
def test_an_answer_that_was_cut_off(toy_model, monkeypatch, text, gold, right):
    """Guards a number in half an answer that counts since there is a complete box elsewhere."""
    model, tokenizer = data.load(toy_model)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: text)
    problem = {"id": 1, "prompt": "1 a+2", "answer": gold}
    record = evaluate.grade_answer(model, tokenizer, problem, [5], [5, 6], [-1.0, -1.0])
    assert record["correct"] is right and not record["finished"]


def test_any_eos_ends_an_answer(toy_model):
    """Guards "#### 5<|endoftext|>" being graded as text, and traces that say another end than the
    one that was sampled: base models end with either of two tokens."""
    model, tokenizer = data.load(toy_model)
    other, ids = tokenizer.vocab["<user>"], tokenizer.encode("f=5 #### 5")
    model.eos_token_ids = [tokenizer.eot_id, other]
    model.sample = lambda prompts, *_, **__: [([*ids, other], [-1.0] * 4) for _ in prompts]
    problem = {"id": 1, "prompt": "1 a+2", "answer": "5"}
    record, = evaluate.generate_answers(model, tokenizer, [problem])
    assert record["response"] == "f=5 #### 5" and record["correct"] and record["finished"]
    assert data.encode_trace(record, tokenizer, "line 1").tokens[-4:].tolist() == [*ids, other]


def test_context_and_nan(toy_model, capsys):
    """Guards a crash, or credit, for answers beyond the model's context, and silent NaN."""
    tokenizer = data.Tokenizer(toy_model)
    problems = [{"id": 7, "prompt": "1 a+2", "answer": "5"}]  # a prompt of 4 tokens
    for context, length, right in ((8, 4, True), (7, 3, False), (4, 0, False), (3, 0, False)):
        model = Script(tokenizer, {"1": "f=5 #### 5"}, context)
        record, = evaluate.generate_answers(model, tokenizer, problems)
        assert len(record["teacher_logprobs"]) == length and record["correct"] is right
        assert record["finished"] is right
        said = f"1 problems are longer than the model's {context} tokens: wrong\n"
        assert capsys.readouterr().out == (said if length == 0 else "")
    model.sample = lambda prompts, *_, **__: [([5], [math.nan]) for _ in prompts]
    with pytest.raises(BadInput, match="problem 7: NaN among the log-probabilities of the"):
        list(evaluate.generate_answers(model, tokenizer, problems))


def run(*words):
    evaluate.main([str(word) for word in words])


@pytest.fixture
def benchmark(tmp_path, problems):
    path = tmp_path / "p.jsonl"
    data.write_jsonl(path, [{"id": p["id"], "prompt": p["prompt"][:9 + 3 * (i % 4)],
                             "answer": p["answer"]} for i, p in enumerate(problems)])
    return path


@pytest.mark.parametrize("file", ["r.jsonl", "r.jsonl.part"])
def test_other_settings_are_refused(toy_model, benchmark, tmp_path, monkeypatch, file):
    """Guards answers of two settings in one file. Each setting is in each record, and a resumed
    evaluation must have all of them, whether the first one was interrupted or finished."""
    out = tmp_path / "r.jsonl"
    settings = ["accuracy", "--model", toy_model, "--benchmark", benchmark, "--samples", 2,
                "--temperature", 1.0, "--max-new-tokens", 3, "--limit", 2, "--device", "cpu",
                "--out", out]
    run(*settings)
    records = [record for _, record in data.read_jsonl(out)]
    digest = records[0]["setup"]["problems_sha256"]
    assert [record["setup"] for record in records] == [
        {"problems_sha256": digest, "model": str(toy_model), "benchmark": str(benchmark),
         "suffix": None, "dtype": "float32", "samples": 2, "temperature": 1.0,
         "max_new_tokens": 3, "seed": 0, "code": data.CODE}] * 4
    assert re.fullmatch("[0-9a-f]{16,64}", digest)
    out.rename(tmp_path / file)
    content = (tmp_path / file).read_bytes()
    monkeypatch.delattr(Transformer, "sample")  # nothing is sampled before it is refused
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(benchmark.read_bytes())
    for name, value in (("model", tmp_path), ("benchmark", copy), ("dtype", "bfloat16"),
                        ("samples", 3), ("temperature", 0.5), ("max-new-tokens", 4), ("seed", 1)):
        key = name.replace("-", "_")
        was = records[0]["setup"][key]
        refusal = f"{file}: cannot resume: {key} was {was}, is now {value}"
        with pytest.raises(BadInput, match=re.escape(refusal)):
            run(*settings, f"--{name}", value, "--resume")
    with pytest.raises(BadInput, match="cannot resume: suffix was None, is now !"):
        run(*settings, "--suffix", "!", "--resume")
    with pytest.raises(BadInput, match="cannot resume: other problems than before"):
        run(*settings, "--limit", 3, "--resume")
    benchmark.write_text(benchmark.read_text().replace("+", "-"))
    with pytest.raises(BadInput, match="cannot resume: other problems than before"):
        run(*settings, "--resume")
    assert (tmp_path / file).read_bytes() == content


def test_answers_that_lie_there(toy_model, benchmark, tmp_path, capsys):
    """Guards --resume with lost or doubled answers, and with a file of something else."""
    out = tmp_path / "r.jsonl"
    words = ["accuracy", "--model", toy_model, "--benchmark", benchmark, "--max-new-tokens", 3,
             "--limit", 3, "--device", "cpu", "--out", out]
    run(*words)
    whole, line = out.read_text(), capsys.readouterr().out
    first = whole[:whole.index("\n") + 1]
    for there in (whole.rstrip("\n"), first, "", first + whole):  # an editor did this
        out.write_text(there)
        run(*words, "--resume")
        assert out.read_text() == whole and capsys.readouterr().out == line
    out.write_bytes(benchmark.read_bytes())
    with pytest.raises(BadInput, match=r"r\.jsonl: expected a file that `accuracy` wrote"):
        run(*words, "--resume")
    assert out.read_bytes() == benchmark.read_bytes()


def test_answers_of_other_code_are_noted(toy_model, benchmark, tmp_path, capsys):
    """Guards answers of older code that pass for today's, or that are refused or lost."""
    out = tmp_path / "r.jsonl"
    words = ["accuracy", "--model", toy_model, "--benchmark", benchmark, "--max-new-tokens", 3,
             "--limit", 2, "--device", "cpu", "--out", out]
    run(*words)
    whole, records = capsys.readouterr().out, evaluate.read_answers(out)
    for record in records:
        record["setup"]["code"] |= {"evaluate.py": "other", "data.py": "other", "train.py": "other"}
    data.write_jsonl(out, records)
    run(*words, "--resume")
    said = f"{out}: data.py, evaluate.py changed since these answers were written\n"
    assert capsys.readouterr().out == said + whole
    assert evaluate.read_answers(out) == records


def result(path, verdicts, gold="5"):
    """A file of answers with the given verdicts, one list for each problem."""
    setup = {"model": path.stem, "benchmark": "b", "temperature": 1.0, "max_new_tokens": 9,
             "dtype": "float32"}
    data.write_jsonl(path, [
        {"id": i, "prompt": f"b{i}", "answer": gold, "sample": k, "correct": right,
         "finished": True, "teacher_logprobs": [0.0] * 4, "setup": setup}
        for i, several in enumerate(verdicts) for k, right in enumerate(several)])
    return path


def test_compare(tmp_path, capsys):
    """Guards an unpaired comparison. 100 problems: both right on 60, only A on 18, only B on 6:
    the difference is .12 +- .048; the unpaired error would be .064."""
    a = result(tmp_path / "a.jsonl", [[True]] * 60 + [[True]] * 18 + [[False]] * 22)
    b = result(tmp_path / "b.jsonl", [[True]] * 60 + [[False]] * 18 + [[True]] * 6 + [[False]] * 16)
    run("compare", a, b)
    *lines, last = capsys.readouterr().out.splitlines()
    said = "(T=1, 100 x 1 answers of 4.0 tokens, 0.0% cut off at 9)"
    assert lines == ["a on b:", f"  accuracy 0.780 +- 0.042 {said}",
                     "b on b:", f"  accuracy 0.660 +- 0.048 {said}"]
    low, high = map(float, re.search(r"interval ([+-][0-9.]+) to ([+-][0-9.]+)", last).groups())
    assert last.startswith("A - B: +0.1200") and abs(high - low - 2 * 1.96 * 0.0477) < 0.015
    assert "A is better on 18, B on 6 of 100" in last
    several = result(tmp_path / "c.jsonl", [[True, False]] * 50 + [[False, False]] * 50)
    run("compare", several, several)
    out = capsys.readouterr().out
    assert "accuracy 0.250 +- 0.025, pass@2 0.500 (T=1, 100 x 2 " in out
    assert "+0.0000 to +0.0000" in out
    assert "A is better on 0, B on 0 of 100" in out
    for other in (result(tmp_path / "d.jsonl", [[True]] * 100, gold="6"),
                  result(tmp_path / "f.jsonl", [[True]] * 99)):
        with pytest.raises(BadInput, match=r"a\.jsonl and .*[df]\.jsonl: not answers to the same"):
            run("compare", a, other)


V = 8  # of the tabular models below; token 7 ends an answer


def tabular(folder, table):
    """A real Transformer whose next token depends on the last one alone: p(j | i) = table[i, j].
    Attention and MLP add nothing, the norm turns one-hot embeddings into sqrt(V) one-hot."""
    model = Transformer(Config({
        "model_type": "llama", "vocab_size": V, "hidden_size": V, "intermediate_size": V,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-9, "rope_theta": 1e4, "tie_word_embeddings": False,
        "hidden_act": "silu", "max_position_embeddings": 99}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.lm_head.weight.copy_(torch.tensor(np.log(table).T / math.sqrt(V)))
    model.eos_token_ids = [7]
    return model


def tables(seed, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(V, V))
    other = logits + spread * rng.normal(size=(V, V))
    return [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, other)]


def exact(author, p, q, start, length):
    """Summed KL(p || q) over prefixes that `author` writes, by carrying the distribution along."""
    kl = (p * np.log(p / q)).sum(1)
    state, means = np.eye(V)[start], []
    for _ in range(length):
        means.append(state @ kl)
        state = state @ author
        state[7] = 0  # an answer that ended has no further prefix
        state /= state.sum()
    return np.cumsum(means)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
def test_exposure_of_tabular_models(spread):
    """Guards an ExAccErr that is off by one, drops the EOS, or counts zeros behind it: for models
    that know one token back everything is known. The same model twice gives 0."""
    p, q = tables(3, spread)
    teacher, student = tabular("p", p), tabular("q", q)
    args = Namespace(max_new_tokens=12, batch_size=500, seed=0, device="cpu")
    prompts = [[0, 1]] * 3000
    kl = [evaluate.kl_along_samples(author, teacher, student, prompts, args).reshape(300, 10, 12)
          for author in (student, teacher)]
    assert (np.isfinite(kl[0][:, :, 0])).all() and np.isnan(kl[0][:, :, 5]).any()
    got = evaluate.exposure_curve(*kl)
    R, epsilon = exact(q, p, q, 1, 12), exact(p, p, q, 1, 12)
    if spread == 0:
        assert np.abs(got["excess"]).max() == got["low"].min() == got["high"].max() == 0
        return
    assert got["R"][0] == pytest.approx(R[0], rel=1e-4)  # the first token, from the prompt
    assert got["R"] == pytest.approx(R, rel=0.03)
    assert got["epsilon"] == pytest.approx(epsilon, rel=0.03)
    truth = (R - epsilon) / epsilon * 100
    assert ((got["low"] <= truth + 1e-3) & (truth - 1e-3 <= got["high"])).mean() > 0.8
    assert np.abs(truth).max() > 2 and (got["high"] - got["low"])[-1] < 15


def test_exposure_counts_rows_that_are_still_there():
    """Guards means over rows that have ended. Two problems, one answer each: the student's prefixes
    cost 1, 3 and 2, the teacher's 1, 1 and then nobody is left: R = 1, 3, epsilon = 1, 2."""
    nan = math.nan
    got = evaluate.exposure_curve(np.array([[[1.0, 3.0, 1.0]], [[1.0, 1.0, nan]]]),
                                  np.array([[[1.0, 1.0, nan]], [[1.0, nan, nan]]]))
    assert got["R"].tolist() == [1, 3] and got["epsilon"].tolist() == [1, 2]
    assert got["excess"].tolist() == [0, 50]


def test_exposure_command(toy_model, benchmark, tmp_path, capsys):
    """Guards the curve's file."""
    make_hf(tmp_path / "other", "llama", vocab_size=train.save_toy_tokenizer(tmp_path / "other"))
    words = ["exposure", "--teacher", toy_model, "--benchmark", benchmark, "--limit", 5,
             "--samples", 3, "--max-new-tokens", 6, "--device", "cpu",
             "--out", tmp_path / "c.jsonl"]
    run(*words, "--student", tmp_path / "other")
    lines = [json.loads(line) for line in open(tmp_path / "c.jsonl")]
    assert [line["length"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 3
    assert all(line["low"] <= line["excess"] <= line["high"] for line in lines)
    assert lines[0]["excess"] == pytest.approx(0, abs=1e-3) and lines[0]["R"] > 0.1
    assert max(abs(line["R"] - line["epsilon"]) for line in lines) > 0.01  # two authors
    assert f"ExAccErr({len(lines)}) = {lines[-1]['excess']:+.2f} %" in capsys.readouterr().out


class HTMLTags(HTMLParser):
    """Checks that tags close in the right order. A paragraph ends where the next one begins."""

    def __init__(self):
        super().__init__()
        self.opened = []

    def handle_starttag(self, tag, attrs):
        if tag in ("p", "h1") and self.opened[-1:] == ["p"]:
            self.opened.pop()
        if tag != "meta":
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag


def test_weights_page(toy_model, tmp_path, problems, capsys):
    """Guards a page with wrong numbers or unescaped text: every token of the first ten traces is
    there with its weight, as computed from full logits."""
    make_hf(tmp_path / "<b>", "qwen2", seed=5, num_hidden_layers=1,
            vocab_size=train.save_toy_tokenizer(tmp_path / "<b>"))
    plain, traces, page = tmp_path / "p.jsonl", tmp_path / "t.jsonl", tmp_path / "w.html"
    data.write_jsonl(plain, problems[:12])
    data.main(["score", "--traces", str(plain), "--teacher", str(toy_model), "--out", str(traces)])
    capsys.readouterr()
    run("weights", "--student", tmp_path / "<b>", "--traces", traces, "--out", page, "--tau", 0.5,
        "--device", "cpu")
    q_end, w_end = re.search(r"end of turn: mean q (\S+), mean w (\S+)",
                             capsys.readouterr().out).groups()
    text = page.read_text()
    assert "<b>" not in text and "&lt;b&gt;" in text and "log p) / 0.5" in text
    assert "http" not in text and "<script" not in text  # self-contained
    tags = HTMLTags()
    tags.feed(text)
    assert tags.opened == ["html", "p"]  # a browser closes these
    rows = text.split('<p class="prompt">')[1:]
    assert len(rows) == 10
    model, tokenizer = data.load(tmp_path / "<b>")
    examples, _ = data.load_traces(traces, tokenizer, 99, need_logprobs=True)
    kinds, ends = set(), []
    for row, example, problem in zip(rows, examples, problems, strict=False):
        ids = torch.tensor(example.tokens.astype(int))
        logp = model.logits(model(ids[None, :-1]))[0].log_softmax(-1)
        q = logp[torch.arange(len(ids) - 1), ids[1:]][example.prompt_length - 1:]
        p = torch.tensor(example.teacher_logp)
        w = 2 * torch.sigmoid((q - p) / 0.5)
        prompt, answer = row.split("</p>")[:2]
        assert prompt == f"&lt;user&gt; {problem['prompt']} &lt;assistant&gt;"
        ends.append([q[-1].exp().item(), w[-1].item()])
        assert f"(mean weight {w[:-1].mean():.3f}; of the end of turn {w[-1]:.3f})" in answer
        spans = re.findall(r'title="q (\S+), p (\S+), w (\S+)">(.*?)</span>', answer)
        assert len(spans) == answer.count("<span")
        assert [float(span[0]) for span in spans] == pytest.approx(q.exp().tolist(), rel=0.01)
        assert [float(span[1]) for span in spans] == pytest.approx(p.exp().tolist(), rel=0.01)
        assert [float(span[2]) for span in spans] == pytest.approx(w.tolist(), abs=2e-3)
        assert "".join(span[3] for span in spans) == problem["response"] + " &lt;end&gt;"
        colors = re.findall(r'style="background:rgba\((\d+),\d+,\d+,(\S+)\)"', answer)
        for (red, alpha), x in zip(colors, w.tolist(), strict=True):
            assert (red == "230") == (x < 1) and abs(float(alpha) - abs(x - 1) * 0.7) < 0.006
            kinds.add((red, abs(x - 1) > 0.5))
    assert len(kinds) == 4
    assert [float(q_end), float(w_end)] == pytest.approx(np.mean(ends, 0), rel=5e-3, abs=6e-4)


def test_a_saved_student_says_the_same_elsewhere(tmp_path, problems):
    """Guards generation_config.json: other harnesses (IFEval) generate with what it says. With it,
    transformers writes the same text, and stops where we stop."""
    make_hf(tmp_path / "llama", "llama", vocab_size=train.save_toy_tokenizer(tmp_path / "llama"))
    model, tokenizer = data.load(tmp_path / "llama")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eot_id] *= 2  # so that some answers end
    model.save_pretrained(tmp_path / "student")
    ours, tokenizer = data.load(tmp_path / "student")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    other = AutoTokenizer.from_pretrained(tmp_path / "student")
    ended = 0
    for problem in problems:
        messages = [{"role": "user", "content": problem["prompt"]}]
        ids, = ours.generate([tokenizer.encode_prompt(messages)], 20)
        inputs = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")
        text = theirs.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1]:]
        assert other.decode(text) == tokenizer.backend.decode(ids, skip_special_tokens=False)
        ended += len(ids) < 20
    assert 3 < ended < 30


def finished_run(folder, accuracies, seconds=5.0):
    folder.mkdir(parents=True)
    run = {"options": {"objective": folder.name}, "seconds": seconds, "steps": 20}
    data.write_jsonl(folder / "run.json", [run])
    for name, share in accuracies.items():
        result(folder / f"{name}-greedy.jsonl", [[i < share] for i in range(100)])
    return folder


def test_report(tmp_path, capsys):
    """Guards numbers in the wrong row or column, and runs that are not finished. The standard error
    of .70, .50 and .80 over 100 problems is .046, .050 and .040."""
    root = tmp_path / "seed0"
    runs = [finished_run(root / "sft", {"b": 80}, 2.6), finished_run(root / "none", {}),
            finished_run(root / "discord", {"c": 50, "b": 70}, 1.4)]
    run("report", *runs)
    *table, greedy_b, _ = capsys.readouterr().out.splitlines()
    assert greedy_b == "b-greedy: T=1, 1 answers a problem, cut at 9 tokens, float32"
    names, line, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert set(names) == {"run", "b-greedy", "c-greedy", "tokens", "steps", "seconds"}
    assert set("".join(line)) == {"-"}
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    empty = {"b-greedy": "", "c-greedy": "", "tokens": "4.0", "steps": "20"}
    assert rows == [
        {**empty, "run": "seed0/sft", "b-greedy": "0.800 +- 0.040, 0% cut", "seconds": "3"},
        {**empty, "run": "seed0/none", "tokens": "", "seconds": "5"},
        {**empty, "run": "seed0/discord", "b-greedy": "0.700 +- 0.046, 0% cut",
         "c-greedy": "0.500 +- 0.050, 0% cut", "seconds": "1"}]


def test_right_answers_become_traces(tmp_path, toy_model, problems, capsys):
    """Guards the three commands: evaluate a teacher, train on its file, evaluate the student. The
    records load with their log-probabilities, those of the model over the sampled tokens."""
    benchmark, out = tmp_path / "p.jsonl", tmp_path / "teacher.jsonl"
    data.write_jsonl(benchmark, [{k: p[k] for k in ("id", "prompt", "answer")} for p in problems])
    run("accuracy", "--model", toy_model, "--benchmark", benchmark, "--samples", 20,
        "--temperature", 1.5, "--max-new-tokens", 40, "--device", "cpu", "--out", out)
    records = [json.loads(line) for line in open(out)]
    right = [r for r in records if r["correct"]]
    assert 5 < len(right) < 300 and len(records) == 600
    line = capsys.readouterr().out.strip().splitlines()[-2]
    assert f"accuracy {len(right) / 600:.3f} +- " in line and "(T=1.5, 30 x 20 answers" in line
    assert "cut off at 40)" in line
    model, tokenizer = data.load(toy_model)
    examples, dropped = data.load_traces(out, tokenizer, 99, need_logprobs=True)
    odd = sum(bool(tokenizer.find_mark(record["response"])) for record in right)
    assert len(examples) == len(right) - odd
    assert dropped == {"wrong": dropped["wrong"], "unfinished": 600 - len(right) - dropped["wrong"],
                       **({"with special tokens in the text": odd} if odd else {})}
    for example in examples:
        logp, = data.response_logp(model, [example])
        assert abs(logp - example.teacher_logp).max() < 1e-3
    train.train(train.parse_args(["--student", str(toy_model), "--traces", str(out), "--out",
                                  str(tmp_path / "run"), "--steps", "2", "--device", "cpu"]))
    run("accuracy", "--model", tmp_path / "run", "--benchmark", benchmark, "--limit", 3,
        "--max-new-tokens", 5, "--device", "cpu")
    assert "(greedy, 3 x 1 answers of" in capsys.readouterr().out
    assert len((tmp_path / "run/p-greedy.jsonl").read_text().splitlines()) == 3
