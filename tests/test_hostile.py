"""Broken and hostile files and values, through the commands that meet them: each ends in one line
that names the file, line, key or value. Nothing is executed, nothing half-written stays."""

import json
import math
import pickle
import re
import shutil
import struct
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
    """A folder with a model, traces and problems, to spoil; commands run in it."""
    shutil.copytree(toy_model, tmp_path / "m")
    data.write_jsonl(tmp_path / "t.jsonl", [GOOD] * 3)
    data.write_jsonl(tmp_path / "p.jsonl", [{"id": 1, "prompt": "7 a+3", "answer": "0"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = {
    "train": (lambda argv: train.train(train.parse_args(argv)),
              "--student m --traces t.jsonl --out run --steps 1 --device cpu"),
    "score": (data.main, "score --traces t.jsonl --teacher m --out o.jsonl --device cpu"),
    "select": (data.main, "select --traces t.jsonl --student m --out o.jsonl --device cpu"),
    "mix": (data.main,
            "mix --answers t.jsonl --traces t.jsonl --student m --out o.jsonl "
            "--continue-all"),
    "accuracy": (evaluate.main, "accuracy --model m --benchmark p.jsonl --out o.jsonl "
                 "--max-new-tokens 2 --device cpu"),
    "compare": (evaluate.main, "compare t.jsonl t.jsonl"),
    "exposure": (evaluate.main, "exposure --teacher m --student m --benchmark p.jsonl --out o.jsonl"
                 " --max-new-tokens 2 --device cpu"),
    "weights": (evaluate.main, "weights --student m --traces t.jsonl --out o.html --device cpu"),
    "report": (evaluate.main, "report m")}


def run(command: str, *more: str) -> None:
    """As from a shell: run_command turns what is expected to fail into one line."""
    main, options = COMMANDS[command]
    data.run_command(lambda: main([*options.split(), *more]))


def second(line: str | bytes | dict) -> dict[str, bytes]:
    """Traces whose second line is this one."""
    text = line if isinstance(line, bytes) else (
        json.dumps(line) if isinstance(line, dict) else line).encode("utf-8", "surrogatepass")
    return {"t.jsonl": json.dumps(GOOD).encode() + b"\n" + text + b"\n"}


def problem(**change) -> dict[str, bytes]:
    return {"p.jsonl": json.dumps({"id": 1, "prompt": "7 a+3", "answer": "0"} | change).encode()}


def config(**change) -> tuple[str, dict]:
    return "m/config.json", change


def template(text: str) -> dict[str, bytes]:
    return {"m/chat_template.jinja": text.encode("utf-8", "surrogateescape")}


def header(text: str, length: int | None = None) -> dict[str, bytes]:
    raw = text.encode()
    return {"m/model.safetensors": struct.pack("<Q", len(raw) if length is None else length) + raw
            + bytes(64)}


def index(weight_map) -> dict[str, bytes | None]:
    return {"m/model.safetensors": None,  # it would be read instead
            "m/model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}


CASES = [  # command, what is spoilt (files; or a JSON file and changed keys), options, the error
    # ---- JSONL
    ("train", second("{"), "", "t.jsonl line 2: not valid JSON"),
    ("train", second(b"\xff\xfe\x00"), "", "t.jsonl line 2: not valid JSON"),
    ("train", second(b"\x1f\x8b\x08\x00\x00"), "", "t.jsonl line 2: not valid JSON"),
    ("train", second("[" * 100_000), "", "t.jsonl line 2: not valid JSON"),
    ("train", second('{"a":' * 100_000), "", "t.jsonl line 2: not valid JSON"),
    ("train", second('{"id": ' + "9" * 5000 + "}"), "", "t.jsonl line 2: not valid JSON"),
    ("train", second("null"), "", "t.jsonl line 2: not a JSON object"),
    ("train", second('"x"'), "", "t.jsonl line 2: not a JSON object"),
    ("train", {"t.jsonl": b'[{"prompt": "x"}, 5]'}, "", "t.jsonl line 1: not a JSON object"),
    ("train", {"t.jsonl": b"[\n{}]"}, "", "t.jsonl line 1: not valid JSON"),
    ("train", {"t.jsonl": b"\n\n \n"}, "", "t.jsonl: no usable trace; dropped: none"),
    ("train", {"t.jsonl": None}, "", "No such file or directory: 't.jsonl'"),
    ("train", {}, "--traces m", "Is a directory: 'm'"),
    ("score", {"t.jsonl": None}, "", "No such file or directory: 't.jsonl'"),
    ("score", {"t.jsonl": b""}, "", "t.jsonl: no usable trace"),
    ("score", {"t.jsonl": json.dumps({**GOOD, "correct": False}).encode()}, "",
     "t.jsonl: no usable trace; dropped: {'wrong': 1}"),
    ("score", second("{"), "", "t.jsonl line 2: not valid JSON"),
    ("select", {"t.jsonl": b""}, "", "t.jsonl: no usable trace"),
    ("select", second({"prompt": "x", "response": "a=0"}), "",
     "t.jsonl line 2: teacher_logprobs: expected 2 numbers"),
    ("compare", {"t.jsonl": b""}, "", "t.jsonl: the file is empty"),
    # ---- traces
    ("train", second({**GOOD, "response": None}), "", "line 2: response = 'None'"),
    ("train", second({**GOOD, "response": ["a=0"]}), "", "line 2: response = "),
    ("train", second('{"prompt": "x", "response": "\\ud800"}'), "", "line 2: not valid JSON"),
    ("score", second('{"prompt": "x", "response": "\\ud800"}'), "", "line 2: not valid JSON"),
    ("train", second({**GOOD, "prompt": {"text": "x"}}), "", "line 2: prompt = "),
    ("train", second({**GOOD, "messages": []}), "", "line 2: messages"),
    ("train", second({**GOOD, "messages": [1]}), "", "line 2: messages"),
    ("train", second({**GOOD, "messages": "hi"}), "", "line 2: messages"),
    ("train", second({**GOOD, "messages": None}), "", "line 2: messages: not a list"),
    ("train", second({**GOOD, "messages": 5}), "", "line 2: messages: not a list"),
    ("train", second({**GOOD, "messages": [{"role": "user"}]}), "", "line 2: messages"),
    ("train", second({**GOOD, "messages": [{"role": "user", "content": None}]}), "",
     "line 2: messages"),
    ("train", second({**GOOD, "messages": [{"role": "user", "content": [{"type": "text"}]}]}), "",
     "line 2: messages"),
    ("train", second({**GOOD, "messages": [{"role": ["user"], "content": "x"}]}), "",
     "line 2: messages"),
    ("train", second({**GOOD, "teacher_logprobs": {}}), "", "line 2: teacher_logprobs: expected 5"),
    ("train", second({**GOOD, "teacher_logprobs": []}), "", "line 2: teacher_logprobs: expected 5"),
    ("train", second({**GOOD, "teacher_logprobs": "x"}), "", "line 2: teacher_logprobs: expected"),
    ("train", second({**GOOD, "teacher_logprobs": [True] * 5}), "",
     "line 2: teacher_logprobs: True is not"),
    ("train", {"t.jsonl": json.dumps({**GOOD, "teacher_logprobs": [None] * 5}).encode()}, "",
     "t.jsonl: no usable trace; dropped: .*null or -9999': 1"),
    ("train", second({**GOOD, "teacher_logprobs": [-math.inf] * 5}), "",
     "line 2: teacher_logprobs: -inf is not"),
    ("train", second({**GOOD, "teacher_logprobs": [[-1.0]] * 5}), "",
     r"line 2: teacher_logprobs: \[-1.0\] is not"),
    ("train", second({**GOOD, "tokens": "12345"}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": {"a": 1}}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [-1] * 5}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [1.5] * 5}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [1.0] * 5}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [69, 79, 4, 5]}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [[1]] * 5}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [10 ** 30] * 5}), "", "line 2: tokens do not spell"),
    ("train", second({**GOOD, "tokens": [5] * 5}), "", "line 2: tokens do not spell"),
    ("score", second({**GOOD, "tokens": [129] * 5}), "", "line 2: tokens do not spell"),
    ("select", second({**GOOD, "tokens": [129] * 5}), "", "line 2: tokens do not spell"),
    ("mix", second({**GOOD, "tokens": [129] * 5}), "", "line 2: tokens do not spell"),
    ("weights", second({**GOOD, "tokens": [129] * 5}), "", "line 2: tokens do not spell"),
    ("train", {}, "--max-length 3", "no usable trace; dropped: {'longer than 3 tokens': 3"),
    ("mix", second({**GOOD, "answer": {"a": 1}}), "", "line 2: answer = "),
    ("mix", {"t.jsonl": b'{"prompt": "x", "response": "a=0", "answer": "1"}'}, "",
     "t.jsonl line 1: no id"),
    ("compare", {}, "", "t.jsonl: expected a file that `accuracy` wrote"),
    ("report", {}, "", "m/run.json: missing"),
    # ---- problems
    ("accuracy", problem(prompt=5), "", "p.jsonl line 1: prompt .* = '5'"),
    ("accuracy", {"p.jsonl": b'{"prompt": "x"}'}, "", "p.jsonl line 1: no answer or"),
    ("accuracy", problem(answer={"value": 1}), "", "p.jsonl line 1: the answer is an object"),
    ("accuracy", problem(prefix="abc"), "", "problem 1: prefix: not ids"),
    ("accuracy", problem(prefix=[10 ** 9]), "", "problem 1: prefix: not ids"),
    ("accuracy", problem(prefix=[None]), "", "problem 1: prefix: not ids"),
    ("exposure", problem(prefix=[129]), "", "problem 1: prefix: not ids"),
    ("accuracy", problem(answer=""), "", "p.jsonl: no problems"),
    ("accuracy", problem(prompt="\ud800"), "", "p.jsonl line 1: not valid JSON"),
    ("accuracy", problem(messages=[]), "", "p.jsonl line 1: messages: not a list of turns"),
    ("accuracy", {"p.jsonl": b'[{"prompt": "x", "answer": "1"}]'}, "",
     "p.jsonl line 1: not a JSON object"),
    ("accuracy", {"p.jsonl": 2 * b'{"id": 1, "prompt": "x", "answer": "1"}\n'}, "", "the same id"),
    # ---- config.json
    ("train", {"m/config.json": b"[]"}, "", "m/config.json: not a JSON object"),
    ("train", {"m/config.json": b"\xff"}, "", "m/config.json: missing, or not valid JSON"),
    ("train", {"m/config.json": b"[" * 100_000}, "", "m/config.json: missing, or not valid JSON"),
    ("train", config(hidden_size=True), "", "m/config.json: hidden_size = True"),
    ("train", config(hidden_size=32.0), "", "m/config.json: "),
    ("train", config(hidden_size=10 ** 13), "", "m/config.json: hidden_size = 1000"),
    ("train", config(vocab_size=-129), "", "m/config.json: vocab_size = -129"),
    ("train", config(rope_theta="1e6"), "", "m/config.json: rope_theta = 1e6"),
    ("train", config(rope_theta=math.nan), "", "m/config.json: rope_theta = nan"),
    ("train", config(rope_theta=math.inf), "", "m/config.json: rope_theta = inf"),
    ("train", config(rope_scaling={"type": "linear", "factor": 2.0}), "",
     "m/config.json: rope_type = linear"),
    ("train", config(layer_types={"a": 1}), "", "m/config.json: layer_types = "),
    ("train", config(tie_word_embeddings="no"), "", "m/config.json: tie_word_embeddings = no"),
    ("train", config(attention_bias=7), "", "m/config.json: attention_bias = 7"),
    ("train", config(max_position_embeddings="long"), "", "max_position_embeddings = long"),
    ("train", {"m/generation_config.json": b"{"}, "", "m/generation_config.json: missing, or not"),
    # ---- tokenizer
    ("train", {"m/tokenizer.json": b"{}"}, "", "m/tokenizer.json: missing, or not a tokenizer"),
    ("train", {"m/tokenizer.json": b"\x00" * 99}, "", "m/tokenizer.json: missing, or not a token"),
    ("train", {"m/tokenizer.json": None}, "", "m/tokenizer.json: missing, or not a tokenizer"),
    ("train", {"m/tokenizer_config.json": b"5"}, "", "m/tokenizer_config.json: not a JSON object"),
    ("train", ("m/tokenizer_config.json", {"chat_template": 5}), "", "m: chat template"),
    ("train", ("m/tokenizer_config.json", {"chat_template": [{"a": 1}]}), "", "m: chat template"),
    ("train", ("m/tokenizer_config.json", {"chat_template": "hi", "eos_token": "<nobody>"}), "",
     "m: no end-of-turn token"),
    ("train", ("m/tokenizer_config.json", {"chat_template": None, "eos_token": {"x": 1}}), "",
     "m: no end-of-turn token"),
    # ---- chat templates
    ("train", template("{% for"), "", "m: chat template: "),
    ("train", template("{{ messages[9].content }}"), "", "m: chat template: .*no element 9"),
    ("train", template("{{ 1 / 0 }}"), "", "m: chat template: ZeroDivisionError"),
    ("train", template("{{ raise_exception('only one turn') }}"), "", "m: chat .*only one turn"),
    ("train", template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "", "m: .*is unsafe"),
    ("train", template("{{ cycler.__init__.__globals__.os.system('touch hacked') }}"), "",
     "m: .*is unsafe"),
    ("train", template("{{ messages.append(1) }}"), "", "m: .*is unsafe"),
    ("train", template("{% include '/etc/passwd' %}"), "", "m: chat template: .*no loader"),
    ("train", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "", "m: .*recursion"),
    ("train", template("{% for a in range(999999) %}{% endfor %}"), "", "m: .*Range too big"),
    # ---- weights
    ("train", {"m/model.safetensors": None}, "", "m/model.safetensors: missing, corrupt"),
    ("train", header("{}", 2 ** 60), "", "m/model.safetensors: missing, corrupt"),
    ("train", header("{}", 10 ** 6), "", "m/model.safetensors: missing, corrupt"),
    ("train", header("{" * 5000), "", "m/model.safetensors: missing, corrupt"),
    ("train", header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 999]}}'), "",
     "m/model.safetensors: missing, corrupt"),
    ("train", header('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}'), "",
     "m/model.safetensors: missing, corrupt"),
    ("train", header('{"a": {"dtype": "PICKLE", "shape": [16], "data_offsets": [0, 64]}}'), "",
     "m/model.safetensors: missing, corrupt"),
    ("train", header("{}"), "", "m/model.safetensors: missing, corrupt"),
    ("train", index({"model.norm.weight": "../../secret.safetensors"}), "",
     "secret.safetensors: missing, corrupt"),
    ("train", index({"model.norm.weight": 5}), "", "m/5: missing, corrupt"),
    ("train", index([1, 2]), "", "m/model.safetensors.index.json: "),
    ("train", index({}), "", "m: the weights are not what config.json says: .*Missing key"),
    ("train", {"m/model.safetensors": None, "m/model.safetensors.index.json": b"{}"}, "",
     "m/model.safetensors.index.json: "),
    ("train", {"m/adapter_config.json": b"{}"}, "", "m: has an adapter .*merge it"),
    # ---- values
    *[(command, {}, f"{option} {value}", rf"{option}: {value}.*: must")
      for command, option, value in [
          ("train", "--tau", "0"), ("train", "--tau", "nan"), ("train", "--lr", "inf"),
          ("train", "--lr", "-1"), ("train", "--batch-size", "0"), ("train", "--beta", "2"),
          ("train", "--steps", "-5"), ("train", "--on-policy", "nan"), ("train", "--seed", "-1"),
          ("train", "--epochs", "0"), ("train", "--epochs", "inf"), ("train", "--max-length", "0"),
          ("select", "--keep", "0"), ("select", "--keep", "nan"), ("select", "--keep", "2"),
          ("accuracy", "--samples", "0"), ("accuracy", "--temperature", "-1"),
          ("accuracy", "--temperature", "nan"), ("accuracy", "--batch-size", "0"),
          ("accuracy", "--max-new-tokens", "0"), ("accuracy", "--limit", "-3"),
          ("accuracy", "--seed", "-1"), ("weights", "--tau", "0"), ("mix", "--seed", "-1")]],
    ("train", {}, "--batch-size 1.5", "argument --batch-size: .*1.5"),
    ("train", {}, "--lr x", "argument --lr: .*x"),
    ("train", {}, "--objective dpo", "argument --objective: invalid choice: 'dpo'"),
    ("train", {}, "--objective kl", "--objective kl needs .*--teacher"),
    ("select", {}, "--separator (", "unterminated subpattern"),
    ("accuracy", {}, "--dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ("accuracy", {}, "--samples 2", "--samples > 1 needs a --temperature"),
    ("accuracy", {}, "--device tpu9", "--device tpu9: "),
    ("train", {}, "--device tpu9", "--device tpu9: "),
    ("train", {}, "--out t.jsonl", "t.jsonl"),
    ("accuracy", {}, "--model t.jsonl", "t.jsonl: not a folder"),
    ("accuracy", {}, "--benchmark gsm9k", "gsm9k: no such file; the benchmarks with a name are gsm8k, math,"),
    ("accuracy", {}, "--benchmark gsm8k:x", "--benchmark gsm8k:x: cannot get openai/gsm8k from"),
    ("accuracy", {}, "--benchmark m", "Is a directory: 'm'"),
]


@pytest.mark.parametrize("command, spoilt, options, said", CASES, ids=[
    f"{case[0]}-{case[3]:.60}" for case in CASES])
def test_bad_input_is_one_line(place, capsys, command, spoilt, options, said):
    """Guards a traceback, a hang, a wrong result, or an error that does not say where."""
    if isinstance(spoilt, tuple):
        file, change = spoilt
        spoilt = {file: json.dumps(json.loads(Path(file).read_text()) | change).encode()}
    for name, content in spoilt.items():
        Path(name).write_bytes(content) if content is not None else Path(name).unlink()
    before = {path.name for path in place.iterdir()}
    with pytest.raises(SystemExit) as error:
        run(command, *options.split())
    message = error.value.code
    if message == 2:  # argparse has printed it
        message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: .*{said}", message), message
    assert "\n" not in message
    assert {path.name for path in place.iterdir()} == before


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
