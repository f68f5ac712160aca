"""Models and benchmarks from the Hub: the real client against a small server on this machine."""

import math
import shutil
import socket
import time
from functools import partial

import pytest
import torch
from conftest import DATA, FIXTURES
from hub import HUB

import data
import evaluate
import model
import train
from model import BadInput, Transformer

# benchmark -> (a file of ../shared/data/benchmarks, the Hub's rows, those without an answer)
FILES = {"gsm8k:test": ("gsm8k/test.jsonl", 1319, 0),
         "gsm8k:train": ("gsm8k/train.jsonl", 7473, 0),
         "math:test": ("math/test.jsonl", 5000, 0),
         "math:train": ("math/train.answers-only.jsonl", 7500, 2),
         "math500": ("math500/test.math_oai.jsonl", 500, 0), "amc23": ("amc23/test.jsonl", 40, 0),
         "aime24": ("aime24/test.jsonl", 30, 0),
         "aime25": ("aime25/test.int-answers.jsonl", 30, 0),
         "olympiadbench": ("olympiadbench/test.jsonl", 674, 0)}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An empty cache, a server without files, and no waiting."""
    monkeypatch.setattr(evaluate.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds))
    waits = HUB.waits = []
    for store in (HUB.repos, HUB.rows, HUB.faults, HUB.seen):
        store.clear()


def publish(name, rows):
    """Puts a benchmark where the Hub has it."""
    key, _, split = name.partition(":")
    repo, config, default_split = evaluate.BENCHMARKS[key].split()
    HUB.rows[repo, config, split or default_split] = rows


@pytest.mark.parametrize("name", FILES)
def test_benchmarks(name, capsys):
    """Guards counts, the order of pages, and gold answers as the files have them (thousands commas,
    floats, zero padding, lists, an empty one), downloaded once."""
    path, count, empty = FILES[name]
    if DATA == FIXTURES:
        count = 3
        if not (DATA / "benchmarks" / path).exists():
            pytest.skip(f"needs ../shared/data/benchmarks/{path}")
    rows = [record for _, record in data.read_jsonl(DATA / "benchmarks" / path)][:count]
    assert len(rows) == count
    publish(name, rows)
    problems = evaluate.load_problems(name)
    requests = len(HUB.seen)
    assert requests == math.ceil(count / 100)
    assert capsys.readouterr().out.count("dropped, its answer is empty") == empty
    assert evaluate.load_problems(name) == problems and len(HUB.seen) == requests
    assert len(problems) == count - empty
    for problem, row in zip(problems, [row for row in rows if row.get("answer") != ""],
                            strict=True):
        assert problem["prompt"].endswith(evaluate.SUFFIX) or "\\boxed" in problem["prompt"]
        assert problem["prompt"].count("put your final answer within") <= 1
        gold = problem["answer"]
        if "gsm8k" in name:
            gold = row["answer"].rpartition("#### ")[2]
        elif name in ("amc23", "aime24", "aime25"):
            gold = str(int(float(row["answer"])))
        elif name == "olympiadbench":
            gold, = row["final_answer"]
        elif "answer" in row:
            gold = row["answer"]
        assert evaluate.is_correct(f"So it is \\boxed{{{gold}}}." if name != "math:test" else gold,
                                   problem["answer"]), gold
    assert not evaluate.is_correct("\\boxed{-123}", problems[0]["answer"])


def test_golds_of_all_files(shared):
    """Guards field names and spellings of the same golds: the copies of AIME hold the same answers,
    as padded strings, as numbers and as `expected_answer`."""
    found = {}
    for file in sorted((shared / "benchmarks").rglob("*.jsonl")):
        problems = evaluate.load_problems(file)
        found[f"{file.parent.name}/{file.name}"] = [problem["answer"] for problem in problems]
    assert {name: len(golds) for name, golds in found.items()} == {
        "aime24/test.jsonl": 30, "aime24/test.nemo-skills.jsonl": 30, "aime25/test.jsonl": 30,
        "aime25/test.int-answers.jsonl": 30, "aime25/test.qwen-harness-style.jsonl": 30,
        "amc23/test.jsonl": 40, "gsm8k/test.jsonl": 1319, "gsm8k/train.jsonl": 7473,
        "math/test.jsonl": 5000, "math/train.answers-only.jsonl": 7498,
        "math500/test.math_oai.jsonl": 500, "olympiadbench/test.jsonl": 675}
    for year in ("aime24", "aime25"):
        first, *others = [sorted(golds, key=lambda gold: int(gold)) for name, golds in found.items()
                          if year in name]
        for other in others:
            assert all(map(evaluate.is_correct, first, other))
    assert evaluate.is_correct("27", found["amc23/test.jsonl"][0])
    assert evaluate.is_correct("\\boxed{25}", "025") and "025" in found["aime24/test.jsonl"]


ROWS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(1319)]


def test_busy_hub_and_broken_connections():
    """Guards giving up at the first 429 or broken connection, and rows doubled or lost by asking
    again; the waits must grow."""
    publish("gsm8k", ROWS)
    HUB.faults["offset=300"] = [429, 503, "broken", 500]
    problems = evaluate.load_problems("gsm8k", suffix="")
    assert [problem["prompt"] for problem in problems] == [row["question"] for row in ROWS]
    assert len(HUB.seen) == 14 + 4 and len(HUB.waits) == 4


@pytest.mark.parametrize("name, fault, said", [
    ("gsm8k", [404], "404"), ("gsm8k", [429] * 9, "429"), ("gsm8k", ["broken"] * 9, "closed"),
    ("gsm8k", ["truncated"], "JSON|Expecting|Unterminated|delimiter"), ("aime25", [404], "404"),
    ("aime25", ["broken"] * 9, "closed"),
    ("aime25", ["truncated"], "JSON|Expecting|Unterminated|delimiter"),
    ("gsm8k", ["login"], "<html>Log in.*; a mirror may lack it: give a JSONL file"),
    ("math500", [], "404"), ("amc23", [], "404")])
def test_a_download_that_fails_leaves_nothing(name, fault, said, tmp_path):
    """Guards a part of a benchmark that passes for all of it, now or from the cache later."""
    rows = ROWS if name == "gsm8k" else [
        {"id": i, "problem": "one line\u2028of text", "answer": 70} for i in range(10, 40)]
    if fault:
        publish(name, rows)
        HUB.faults[name] = list(fault)
    repo = evaluate.BENCHMARKS[name].split()[0]
    with pytest.raises(BadInput, match=rf"--benchmark {name}: cannot get {repo} .*({said})"):
        evaluate.load_problems(name)
    assert not list((tmp_path / "cache").rglob("*.jsonl*"))
    HUB.faults.clear()
    publish(name, rows)
    assert len(evaluate.load_problems(name)) == len(rows)


def test_short_data_sets_and_unknown_splits(monkeypatch):
    """Guards a server that ends early without an error, cells that it cut, pages that are shorter
    than asked for, and a typing error."""
    publish("gsm8k", ROWS[:1300])
    monkeypatch.setattr(HUB, "total", 1319)
    with pytest.raises(BadInput, match=r"gsm8k: .*openai/gsm8k .*no rows after row 1300"):
        evaluate.load_problems("gsm8k")
    publish("gsm8k", ROWS)
    monkeypatch.setattr(HUB, "truncated", ["question"])
    with pytest.raises(BadInput, match=r"gsm8k: .*row 99 is cut"):
        evaluate.load_problems("gsm8k")
    monkeypatch.setattr(HUB, "truncated", [])
    monkeypatch.setattr(HUB, "page", 60)
    assert [problem["prompt"] for problem in evaluate.load_problems("gsm8k", "")] == [
        row["question"] for row in ROWS]
    with pytest.raises(BadInput, match=r"gsm8k:dev: cannot get openai/gsm8k .*404"):
        evaluate.load_problems("gsm8k:dev")
    with pytest.raises(BadInput, match=r"gsm9k: no such file; the benchmarks .* gsm8k, math"):
        evaluate.load_problems("gsm9k")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "https://no-such-host.invalid"])
def test_no_hub_fails_in_seconds(tmp_path, monkeypatch, endpoint):
    """Guards half a minute of waiting for a name that needs the Hub where there is no network."""
    def unknown(host, *more, **options):
        raise socket.gaierror(-2, f"{host}: name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    if "invalid" in endpoint:
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for ask, said in ((lambda: evaluate.load_problems("gsm8k"), "--benchmark gsm8k: cannot get"),
                      (lambda: data.Tokenizer("org/name"), "org/name: not a folder, and the Hub")):
        HUB.waits.clear()
        begin = time.perf_counter()
        with pytest.raises(BadInput, match=f"{said}.*(refused|not known)"):
            ask()
        assert sum(HUB.waits) + time.perf_counter() - begin < 10


def test_suffix_box(tmp_path):
    """Guards files whose questions do not ask for a box, which the grader looks for first."""
    file = tmp_path / "p.jsonl"
    data.write_jsonl(file, [{"prompt": "1+1?", "answer": "2"},
                            {"prompt": "\\boxed{?} of 1+1", "answer": "2"}])
    asked = ["1+1?" + evaluate.SUFFIX, "\\boxed{?} of 1+1"]
    assert [problem["prompt"] for problem in evaluate.load_problems(file, "box")] == asked
    assert evaluate.load_problems(file, " box")[0]["prompt"] == "1+1? box"
    publish("gsm8k", [{"question": "1+1?", "answer": "#### 2"}])
    for suffix in (None, "box"):
        assert evaluate.load_problems("gsm8k", suffix)[0]["prompt"] == asked[0]


def model_files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_models_load_by_name(tmp_path, toy_model, monkeypatch):
    """Guards the Hub's path of models: sharded, the same tensors as from the folder, no file that
    is not needed, and nothing downloaded twice."""
    shutil.copytree(toy_model, tmp_path / "m")
    ours = Transformer.from_pretrained(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_torch_state_dict",
                      partial(model.save_torch_state_dict, max_shard_size=40_000))
        ours.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "model.safetensors").exists()  # it would win over the shards
    extra = {"pytorch_model.bin": b"1", "README.md": b"2", "consolidated.safetensors": b"3",
             "vocab.json": b"{}", "original/model.pth": b"4"}
    files = model_files(tmp_path / "m")
    assert sum(name.endswith(".safetensors") for name in files) >= 2
    HUB.repos["models/org/name"] = {**files, **extra}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    theirs, tokenizer = data.load("org/name")
    assert all(map(torch.equal, theirs.state_dict().values(), ours.state_dict().values()))
    assert theirs.eos_token_ids == [3] and tokenizer.eot_id == 3
    asked = [path.rpartition("/")[2] for path in HUB.seen if "/resolve/" in path]
    assert sorted(asked) == sorted(files)
    HUB.seen.clear()
    Transformer.from_pretrained("org/name")
    assert not any("/resolve/" in path for path in HUB.seen)


@pytest.mark.parametrize("fault, said", [
    ([404], "404"), ([403], "403"), ([429] * 9, "429"), (["broken"] * 9, "closed"),
    (["truncated"], "size|Consistency"), (["gated"] * 9, "Access is restricted. Please log in")])
def test_a_model_that_fails_to_download_is_named(toy_model, tmp_path, monkeypatch, fault, said):
    """Guards tracebacks of the client, and half a file of weights that counts as there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    HUB.repos["models/org/name"] = model_files(toy_model)
    HUB.faults["model.safetensors"] = list(fault)
    message = rf"(?s)org/name: not a folder, and the Hub says: .*({said})"
    with pytest.raises(BadInput, match=message):
        Transformer.from_pretrained("org/name")
    HUB.faults = {"api/models": ["login"] * 9}
    with pytest.raises(BadInput, match=r"org/name: not a folder, and the Hub says: .*<html>Log in"):
        Transformer.from_pretrained("org/name")
    HUB.faults.clear()
    ours = Transformer.from_pretrained(toy_model).state_dict()
    theirs = Transformer.from_pretrained("org/name").state_dict()
    assert all(map(torch.equal, theirs.values(), ours.values()))


def test_the_users_token_stays_secret(tmp_path, toy_model, monkeypatch, capsys):
    """Guards a login token in output, in an error, in a run's files or in the cache: records and
    runs are published. It must reach the Hub, though."""
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETsecret")
    monkeypatch.setattr(evaluate.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    HUB.tokens.clear()
    HUB.repos["models/org/name"] = model_files(toy_model)
    publish("gsm8k", ROWS)
    evaluate.main(["accuracy", "--model", "org/name", "--benchmark", "gsm8k", "--limit", "2",
                   "--max-new-tokens", "2"])
    data.write_jsonl("t.jsonl", [{"prompt": "1", "response": "2"}])
    train.train(train.parse_args([
        "--student", "org/name", "--traces", "t.jsonl", "--objective", "sft", "--out", "run",
        "--steps", "1", "--device", "cpu"]))
    monkeypatch.setattr(evaluate.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    HUB.faults, errors = {"org/name": [403] * 9, "rows": [403] * 9}, []
    for argv in (["--model", "org/name", "--benchmark", "t.jsonl"],
                 ["--model", str(toy_model), "--benchmark", "gsm8k:train"]):
        with pytest.raises(BadInput) as error:
            evaluate.main(["accuracy", *argv])
        errors.append(str(error.value))
    HUB.faults = {}
    assert HUB.tokens == {"Bearer hf_SECRETsecret"} and len(errors) == 2
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for text in [*map(str.encode, [*capsys.readouterr(), *errors]), *files]:
        assert b"SECRET" not in text


def test_nothing_leaves_this_machine():
    """Guards the guard of conftest.py, without which the suite might need a network unseen."""
    for ask in (lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
                lambda: socket.socket().connect(("192.0.2.1", 80)),
                lambda: socket.getaddrinfo("example.org", 80)):
        with pytest.raises(AssertionError, match="a test asked for"):
            ask()
