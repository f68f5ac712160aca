"""The scripts for real weights, a real server and the study of GSM8K, on toy and random models."""

import contextlib
import csv
import io
import json
import random
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import gsm8k
import mutants
import pytest
import real
import server
import torch
import words
from conftest import make_hf

import data
import evaluate
import loss
import train
from model import BadInput, Transformer, read_json


@pytest.fixture
def problems(tmp_path) -> Path:
    rng, file = random.Random(1), tmp_path / "problems.jsonl"
    data.write_jsonl(file, [{"id": i, **train.toy_trace(rng)} for i in range(12)])
    return file


@pytest.fixture
def model(tmp_path) -> Path:
    """A random model that a tenth of all tokens ends."""
    folder = tmp_path / "model"
    make_hf(folder, "qwen2", vocab_size=train.save_toy_tokenizer(folder), num_hidden_layers=1)
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": list(range(3, 129, 10))}))
    return folder


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_real_weights(model, tmp_path, problems, monkeypatch, factor):
    """Guards a table that says ok to other logits than those of transformers."""
    monkeypatch.setattr(real, "compare_loading", lambda folder: None)  # four processes
    logits = Transformer.logits
    monkeypatch.setattr(Transformer, "logits", lambda self, x: factor * logits(self, x))
    good = real.main(["--model", str(model), "--benchmark", str(problems), "--problems", "6",
                      "--max-new-tokens", "24", "--out", str(tmp_path / "out")])
    wrong = [what for what, _, good in real.ROWS if not good]
    assert len(real.ROWS) == 10 and good is (factor == 1.0)
    assert ("logits, fp32, largest difference" in wrong) is (factor != 1.0)
    assert len(evaluate.read_answers(tmp_path / "out/greedy.jsonl")) == 6


class MadeServer(BaseHTTPRequestHandler):
    """Answers like vLLM or like llama.cpp, from a model that may have another system prompt."""

    folder, form, system = Path(), "vLLM", ""

    def chat(self, body: dict) -> dict:
        model, tokenizer = data.load(self.folder)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        prompt = tokenizer.encode_prompt(turns + body["messages"])
        [(ids, logp)] = model.sample([prompt], body["max_tokens"], 1.0, [(0, sum(prompt))])
        finished = ids[-1] in model.eos_token_ids
        text = tokenizer.backend.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
        content = [{"id": i, "logprob": float(value)} for i, value in zip(ids, logp, strict=True)]
        choice = {"message": {"content": text}, "logprobs": {"content": content},
                  "finish_reason": "stop" if finished else "length"}
        if self.form != "vLLM":
            return {"usage": {"prompt_tokens": len(prompt)}, "choices": [choice]}
        return {"prompt_token_ids": prompt, "choices": [{**choice, "token_ids": ids}]}

    def do_GET(self) -> None:
        if self.path == "/version" and self.form != "vLLM":
            self.send_error(404)
            return
        self.say({"version": "0", "build_info": "0", "data": [{"id": "toy"}]})

    def do_POST(self) -> None:
        tokenizer = data.Tokenizer(self.folder)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            self.say(self.chat(body))
        elif self.path == "/apply-template":
            self.say({"prompt": tokenizer.apply_chat_template(body["messages"])})
        else:
            self.say({"tokens": tokenizer.encode(body["content"])})

    def say(self, reply: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def url(model, monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(MadeServer, "folder", model)
    with HTTPServer(("127.0.0.1", 0), MadeServer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize("form", ["vLLM", "llama.cpp"])
def test_a_server(model, url, tmp_path, problems, monkeypatch, form):
    """Guards ids and numbers of a neighbor or of the prompt (with the same weights, log p differs
    by rounding, and q = p), cut-off answers that are kept, and prompts that nobody compares."""
    argv = ["--teacher", str(model), "--url", url, "--benchmark", str(problems), "--problems",
            "12", "--max-new-tokens", "12", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(MadeServer, "form", form)
    found = server.main(argv)
    assert found["server"] == f"{form} 0"
    usable = 12 - sum(found["dropped"].values())
    assert found["usable of asked"] == f"{usable} of 12" and found["dropped"]["unfinished"] > 2
    assert found["ending in an end of turn"] == usable > 2 and found["largest"] <= 1e-4
    assert found["weight at q = p"] == found["first step's weight"] == 1.0
    monkeypatch.setattr(MadeServer, "system", "You are helpful.")
    with pytest.raises((BadInput, AssertionError), match=r"prompt_tokens: the|prompt tokens"):
        server.main([*argv, "--out", str(tmp_path / "other")])


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The commands of a study, which run in this process."""
    ran = []

    def run(log: Path, script: str, *words: object) -> str:
        argv, said = list(map(str, words)), io.StringIO()
        ran.append(shlex.join([script, *argv]))
        with contextlib.redirect_stdout(said):
            if script == "train.py":
                train.train(train.parse_args(argv))
            else:
                evaluate.main(argv)
        return said.getvalue()

    monkeypatch.setattr(gsm8k, "run", run)
    return ran


def test_gsm8k(model, tmp_path, problems, ran):
    """Guards commands of the study that do not fit together, DFT that is SFT, a rate that is not
    the best one, and stages that are done twice."""
    folder, out = str(model), tmp_path / "out"
    argv = ["--teacher", folder, "--student", folder, "--layers", "1", "--train",
            str(problems), "--test", str(problems), "--held-back", "4", "--limit", "3", "--samples",
            "2", "--keep-wrong", "--warm-up", "2", "--objectives", "sft", "dft", "discord", "rkl",
            "--rates", "1e-4", "1e-2", "--max-new-tokens", "12", "--answers", "16",
            "--exposure-length", "4", "--out", str(out), "--batch-size", "4", "--grad-accum", "1",
            "--epochs", "1", "--device", "cpu"]
    rows = gsm8k.main(argv)
    assert [row["run"] for row in rows[1:]] == ["student before", "sft", "dft", "discord", "rkl"]
    assert all(row["- SFT"].startswith("+0.0000 [") for row in (rows[1], *rows[3:]))
    for row in rows[2:]:
        dev = {rate: sum(evaluate.summarize(evaluate.read_answers(
            out / f"{row['run']}-{rate}/dev-{decoding}.jsonl"))["accuracy"]
            for decoding in ("greedy", "T1")) for rate in ("1e-4", "1e-2")}
        assert dev[row["lr"]] == max(dev.values())
    losses = {name: next(data.read_jsonl(out / f"{name}-1e-4/log.jsonl"))[1]["loss"]
              for name in ("sft", "dft")}
    assert losses["dft"] < 0.5 * losses["sft"]  # the weight is q(y)
    assert {record["id"] for _, record in data.read_jsonl(out / "traces.jsonl")} == set(range(8))
    assert (out / "table.md").read_text().count("\n") == 8
    assert "in all" in (out / "estimate.txt").read_text()
    ran.clear()
    assert gsm8k.main(argv) == rows and not any("probe" in line for line in ran)
    assert sum(line.startswith("evaluate.py exposure") for line in ran) == 0


def test_words(model, tmp_path, ran, monkeypatch):
    """Guards commands of the study that do not fit together, a tau that is not its own, an
    estimate that leaves out a stage, stages that are done twice, and a second seed with rates or
    a student of its own."""
    monkeypatch.setattr(words, "LAYERS", "0+1")
    monkeypatch.setattr(evaluate, "is_correct", lambda text, gold: len(text) % 3 > 0)
    argv = ["--weights", str(model), "--scale", "0.02", "--out", str(tmp_path / "out")]
    words.main(argv)
    out = tmp_path / "out"
    _, _, *rows = (out / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == [
        "teacher", "student before", "lessons without skips", *words.OBJECTIVES.values(),
        *(f"{words.OBJECTIVES[name]}, traces in reach" for name in words.OF_REACHABLE)]
    assert words.Words.left == pytest.approx(0, abs=1) and words.Words.worked > 1e5
    taus = {name: read_json(out / f"seed0/{name}-1e-4/run.json")["options"]["tau"]
            for name in ("discord", "discord@0.7")}
    assert taus == {"discord": loss.TAU, "discord@0.7": 0.7}
    assert "- DFT, T1, " in (out / "answers.md").read_text()
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*/*.safetensors")}
    words.main([*argv, "--seeds", "0", "1"])
    assert files == {file: file.stat().st_mtime_ns for file in files}
    assert words.Words.left == pytest.approx(0, abs=1)
    with open(out / "table.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["seed"] for row in table] == ["seed0", "seed1"] * len(rows)
    for first, second in zip(table[4::2], table[5::2], strict=True):
        assert first["rate"] == second["rate"] != "" or first["run"] == "lessons without skips"
    made = {folder.name for folder in (out / "seed1").glob("*-?e-?")}
    assert len(made) == 1 + len(words.OBJECTIVES) + len(words.OF_REACHABLE)
    losses = [next(data.read_jsonl(out / f"seed{seed}/before/log.jsonl"))[1]["loss"]
              for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_cut(model, tmp_path):
    """Guards a student with the layers that were to be cut away, or with one of them twice."""
    config = read_json(model / "config.json")
    make_hf(model, "qwen2", vocab_size=config["vocab_size"], num_hidden_layers=4)
    before = Transformer.from_pretrained(model).model.layers
    for layers, kept in (("1+2", [0, 2, 3]), ("2", [0, 1])):
        after = Transformer.from_pretrained(gsm8k.cut(model, layers, tmp_path / layers))
        assert len(after.model.layers) == len(kept)
        for i, layer in zip(kept, after.model.layers, strict=True):
            assert torch.equal(layer.mlp.up_proj.weight, before[i].mlp.up_proj.weight)


def test_mutants_are_of_this_code():
    """Guards a table of mutants that has fallen behind the code, so that nothing is broken."""
    assert mutants.behind() == [] and len(mutants.MUTANTS) > 110
