"""Bad input of any kind, through the commands that meet it: each ends in one line that names the
file, line, key or value, and leaves nothing behind."""

import gzip
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf, raw_config
from safetensors.torch import load_file, save_file

import data
import evaluate
import train
from model import BadInput, Config, Transformer

GOOD = {"id": 1, "prompt": "7 a+3 b*4", "response": "a=0 b=0 #### 0", "answer": "0",
        "teacher_logprobs": [-1.0] * 5}
LINE = json.dumps(GOOD).encode() + b"\n"


@pytest.fixture
def place(toy_model, tmp_path, monkeypatch):
    """A folder with a model, another tokenizer's, traces and problems, to spoil."""
    for name in ("m", "other"):
        shutil.copytree(toy_model, tmp_path / name)
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace("####", "@@@@"))
    data.write_jsonl(tmp_path / "t.jsonl", [GOOD] * 3)
    data.write_jsonl(tmp_path / "p.jsonl", [{"id": 1, "prompt": "7 a+3", "answer": "0"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = {
    "train": (lambda argv: train.train(train.parse_args(argv)),
              "--student m --traces t.jsonl --out run --steps 1 --device cpu"),
    "toy": (train.parse_args, ""),
    "score": (data.main, "score --traces t.jsonl --teacher m --out o.jsonl --device cpu"),
    "select": (data.main, "select --traces t.jsonl --student m --out o.jsonl --device cpu"),
    "reach": (data.main, "reach --traces t.jsonl --student m --out o.jsonl --device cpu"),
    "mix": (data.main, "mix --answers t.jsonl --traces t.jsonl --student m --out o.jsonl "
            "--continue-all"),
    "accuracy": (evaluate.main, "accuracy --model m --benchmark p.jsonl --out o.jsonl "
                 "--max-new-tokens 2 --device cpu"),
    "compare": (evaluate.main, "compare t.jsonl t.jsonl"),
    "exposure": (evaluate.main, "exposure --teacher m --student m --benchmark p.jsonl --out o.jsonl"
                 " --max-new-tokens 2 --device cpu"),
    "weights": (evaluate.main, "weights --student m --traces t.jsonl --out o.html --device cpu"),
    "report": (evaluate.main, "report m")}


def second(line: str | bytes) -> dict:
    """Traces whose second line is this one."""
    return {"t.jsonl": LINE + (line if isinstance(line, bytes) else line.encode()) + b"\n"}


def trace(**change) -> dict:
    return second(json.dumps({**GOOD, **change}))


def problem(**change) -> dict:
    record = {"id": 1, "prompt": "7 a+3", "answer": "0"} | change
    return {"p.jsonl": json.dumps({k: v for k, v in record.items() if v is not ...}).encode()}


def template(text: str) -> dict:
    return {"m/chat_template.jinja": text.encode("latin-1")}


def header(text: str, length: int | None = None) -> dict:
    raw = text.encode()
    return {"m/model.safetensors": struct.pack("<Q", len(raw) if length is None else length) + raw
            + bytes(64)}


def index(content: object) -> dict:
    return {"m/model.safetensors": None,  # it would be read instead
            "m/model.safetensors.index.json": json.dumps(content).encode()}


TOKENS = "line 2: tokens do not spell the response and its end .*--objective sft"
CORRUPT = "m/model.safetensors: missing, corrupt or truncated"
LOGP, TURNS = "line 2: teacher_logprobs: ", "line 2: messages: "
USER = {"role": "user", "content": "2+2?"}
CASES = [  # command, {file: content, None to remove it, or changed keys of JSON}, options, error
    # ---- files of lines
    *[("train", second(line), "", "t.jsonl line 2: not valid JSON") for line in (
        "{", b"\xff\xfe\x00", "[" * 100_000, '{"a":' * 100_000, '{"id": ' + "9" * 5000 + "}",
        '{"prompt": "x", "response": "\\ud800"}')],
    ("train", second('{"prompt": "x", "response": "a=0", "prompt": "y"}'), "",
     "t.jsonl line 2: not valid JSON: a key twice among prompt, response, prompt"),
    *[("train", second(line), "", "t.jsonl line 2: not a JSON object") for line in (
        "null", '"x"', "[1]", "7")],
    *[("train", {"t.jsonl": content}, "", f"t.jsonl line 1: not .*this is {form}, not an object")
      for form, content in (("gzip", gzip.compress(LINE)), ("Parquet", b"PAR1\x15\x04"),
                            ("a JSON array", b"[" + LINE + b"]"),
                            ("a JSON array", b"[\n" + LINE + b"]"))],
    ("train", second('{"conversations": []}'), "", "line 2: ShareGPT format; write `messages` or"),
    ("score", second('{"instruction": "2+2?"}'), "", "line 2: Alpaca format; write `messages` or"),
    ("accuracy", {"p.jsonl": b'[{"prompt": "x", "answer": "1"}]'}, "",
     "p.jsonl line 1: not a JSON object; this is a JSON array"),
    *[(command, {"t.jsonl": b"\n\n \n"}, "", "t.jsonl: no usable trace; dropped: none")
      for command in ("train", "score", "select", "weights")],
    *[(command, {"t.jsonl": None}, "", "No such file or directory: 't.jsonl'")
      for command in ("train", "score", "mix", "compare")],
    ("train", {}, "--traces m", "m: not a file"),
    ("accuracy", {}, "--benchmark m", "Is a directory: 'm'"),
    ("train", {}, "--out t.jsonl", "t.jsonl"),
    ("compare", {}, "", "t.jsonl: expected a file that `accuracy` wrote"),
    ("compare", {"t.jsonl": b""}, "", "t.jsonl: the file is empty"),
    ("compare", {"t.jsonl": json.dumps({**GOOD, "setup": {}, "finished": True}).encode()}, "",
     "t.jsonl: expected a file that `accuracy` wrote"),
    ("report", {}, "", "m/run.json: missing"),
    ("report", {"m/run.json": b'{"options": {}}'}, "", "m: not finished; add --resume to its com"),
    # ---- traces
    *[(command, trace(tokens=[129] * 5), "", TOKENS)
      for command in ("train", "score", "select", "mix", "weights")],
    *[("train", trace(tokens=ids), "", TOKENS) for ids in (  # 69 79 4 5 lacks the end of turn
        [-1] * 5, [10 ** 30] * 5, [5] * 5, [4, 5, 3], [69, 79, 4, 5], [69, 79, 4, 5, 5])],
    *[("train", trace(tokens=ids), "", "line 2: tokens: expected a list of whole numbers") for ids
      in ("12345", {"a": 1}, [1.5] * 5, [69, 79, 4, 5.0, 3], [[1]] * 5, [], ["a"])],
    *[("train", trace(teacher_logprobs=values), "", LOGP + "expected a list of 5 numbers, one for "
       f"each token and its end, not {re.escape(repr(values))}; .*data.py score")
      for values in ({}, [], "[-1.0]", 3, [-1.0] * 4, [-1.0] * 6)],
    ("train", trace(teacher_logprobs=None), "", "line 2: no teacher_logprobs; it has id, prompt"),
    *[("train", trace(teacher_logprobs=[-1.0, value, *[-1.0] * 3]), "",
       LOGP + rf"{re.escape(repr(value))} is not a log-prob.* at most 0") for value in (
        0.5, 2.25, 1, True, False, math.inf, math.nan, "-1", [-1.0])],
    ("select", second('{"prompt": "x", "response": "a=0"}'), "", "line 2: no teacher_logprobs; it"),
    ("train", trace(vocab="0"), "", "line 2: the teacher_logprobs are of another tokenizer's"),
    ("train", {"t.jsonl": json.dumps({**GOOD, "teacher_logprobs": [None] * 5}).encode()}, "",
     "t.jsonl: no usable trace; dropped: .*null or below -1000': 1"),
    ("score", {"t.jsonl": json.dumps({**GOOD, "correct": False}).encode() * 1}, "",
     "t.jsonl: no usable trace; dropped: {'wrong': 1}"),
    ("train", {}, "--max-length 3", "no usable trace; dropped: {'longer than 3 tokens': 3"),
    ("train", second('{"response": "a=0"}'), "", "line 2: prompt = 'None': expected text; the f"),
    ("train", second('{"prompt": "x"}'), "", "line 2: response = 'None': expected text"),
    *[("train", trace(response=text), "", f"line 2: response = .{re.escape(str(text))}.: expected")
      for text in (None, ["a=0"], "", 5)],
    *[("train", trace(prompt=text), "", "line 2: prompt = ") for text in (" ", {"text": "x"})],
    *[("train", trace(messages=turns), "", TURNS + "not a list of turns")
      for turns in ([], "hi", 5)],
    *[("train", trace(messages=[turn]), "", TURNS + "expected turns with role and content") for turn
      in (1, {}, {"role": "user"}, {"role": "user", "content": None},
          {"role": "user", "content": [{"type": "text"}]}, {"role": ["user"], "content": "x"})],
    *[("train", trace(messages=[USER], **{name: value}), "",
       f"line 2: {name} would be lost; write it into the text of the prompt, or remove it")
      for name, value in (("tools", [{"name": "add"}]), ("tool_calls", [1]), ("functions", [1]),
                          ("function_call", {"name": "add"}), ("enable_thinking", False),
                          ("chat_template_kwargs", {"a": 1}), ("images", ["x.png"]),
                          ("system_prompt", "Be brief."), ("context", "Some text."))],
    ("train", trace(messages=[{**USER, "tool_calls": [{"name": "add"}]}]), "",
     "line 2: tool_calls would be lost; write it into"),
    *[("train", trace(prompt=f"{mark} 7 a+3"), "", "line 2: .* in a turn of role user: is it rend")
      for mark in ("<user>", "<|im_start|>user", "[INST]", "<\uff5cUser\uff5c>")],
    ("train", {"m/tokenizer_config.json": {"chat_template": None},
               **second('{"messages": [{"role": "user", "content": ""}], "response": "a=0"}')}, "",
     "line 2: the prompt has no token, so nothing predicts the response"),
    ("train", {"m/tokenizer_config.json": {"chat_template": None}, **trace(messages=[USER] * 2)},
     "", "line 2: no chat template for several turns"),
    ("train", {**template("{% for m in messages %}{{ m.content if m.role != 'critic' else "
                          "raise_exception('unknown role') }} <end> {% endfor %}"),
               **trace(messages=[{**USER, "role": "critic"}])}, "",
     "line 2: chat template: .*unknown role"),
    ("mix", trace(answer={"a": 1}), "", "line 2: answer = "),
    ("mix", second('{"prompt": "x", "response": "a=0", "answer": "1"}'), "",
     "t.jsonl line 2: no id, so its problem is unknown"),
    ("mix", {"a.jsonl": LINE + b'{"prompt": "x", "response": "a=0", "answer": "1"}'},
     "--answers a.jsonl", "a.jsonl line 2: no id, so its problem is unknown"),
    # ---- problems
    ("accuracy", problem(prompt=5), "", "p.jsonl line 1: prompt or question or problem = '5': exp"),
    ("accuracy", problem(prompt=...), "", "line 1: prompt or question or problem = 'None'"),
    ("accuracy", problem(prompt=..., question=" "), "", "prompt or question or problem = ' '"),
    ("accuracy", problem(prompt="\ud800"), "", "p.jsonl line 1: not valid JSON"),
    ("accuracy", problem(answer={"value": 1}), "", "p.jsonl line 1: the answer is an object"),
    ("accuracy", problem(answer=...), "", "p.jsonl line 1: no answer or .*; it has id, prompt"),
    *[("accuracy", problem(answer=gold), "", "p.jsonl: no problems") for gold in ("", " ")],
    *[("accuracy", problem(prefix=prefix), "", "problem 1: prefix: not ids of m")
      for prefix in ("abc", [10 ** 9], [None], [5.0], [True])],
    ("exposure", problem(prefix=[129]), "", "problem 1: prefix: not ids"),
    *[("accuracy", problem(messages=turns), "", "p.jsonl line 1: messages: not a list of turns")
      for turns in ([], "What?")],
    *[("accuracy", problem(**{name: ["1", "2"]}), "", f"p.jsonl line 1: {name} would be lost")
      for name in ("choices", "options", "context")],
    ("accuracy", problem(prompt="7 a+3 <assistant>"), "", "problem 1: <assistant> in a turn of ro"),
    ("exposure", {}, "--max-new-tokens 999", "--max-new-tokens 999 and prompts of up to 4 do not"),
    ("accuracy", {"p.jsonl": 2 * b'{"id": 1, "prompt": "x", "answer": "1"}\n'}, "", "the same id"),
    ("accuracy", {}, "--benchmark gsm9k", "gsm9k: no such file; the benchmarks with a name are"),
    ("accuracy", {}, "--benchmark gsm8k:x", "--benchmark gsm8k:x: cannot get openai/gsm8k from"),
    # ---- folders of models
    *[("train", {"m/config.json": content}, "", f"m/config.json: {said}") for content, said in (
        (b"[]", "not a JSON object"), (b"null", "not a JSON object"), (None, "missing, or not val"),
        (b"\xff", "missing, or not valid JSON"), (b"[" * 100_000, "missing, or not valid JSON"))],
    ("train", {"m/config.json": {"hidden_act": "gelu"}}, "",
     "m/config.json: hidden_act = gelu: only silu is implemented"),
    ("train", {"m/generation_config.json": b"{"}, "", "m/generation_config.json: missing, or not"),
    ("train", {"m/generation_config.json": b'{"eos_token_id": "3"}'}, "",
     r"m: eos_token_id = \['3'\]: expected ids, as numbers"),
    *[("train", {"m/tokenizer.json": content}, "", "m/tokenizer.json: missing, or not a tokenizer")
      for content in (b"{}", b"\x00" * 99, None)],
    ("train", {"m/tokenizer.json": lambda text: text.replace(b'"<unk>": 0', b'"<unk>": 150')}, "",
     "m: vocabulary mismatch: the tokenizer has 151 ids, the model 129"),
    ("train", {"m/tokenizer_config.json": b"5"}, "", "m/tokenizer_config.json: not a JSON object"),
    *[("train", {"m/tokenizer_config.json": {"chat_template": source}}, "", "m: chat template")
      for source in (5, [{"a": 1}])],
    *[("train", {"m/tokenizer_config.json": {"chat_template": source, "eos_token": eos}}, "",
       "m: no end-of-turn token") for source, eos in (("hi", "<nobody>"), (None, {"x": 1}))],
    *[("train", template(text), "", f"m: chat template: .*{said}") for text, said in (
        ("{% for", ""), ("{# \xe9 #}", "codec"),
        ("{{ messages[9].content }}", "no element 9"), ("{{ 1 / 0 }}", "ZeroDiv"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch hacked') }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"), ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for a in range(999999) %}{% endfor %}", "Range too big"))],
    *[("train", spoilt, "", CORRUPT) for spoilt in (
        {"m/model.safetensors": None}, {"m/model.safetensors": lambda whole: whole[:-100]},
        {"m/model.safetensors": b""}, header("{}"), header("{}", 2 ** 60), header("{}", 10 ** 6),
        header("{" * 5000), *(header(json.dumps({"a": {
            "dtype": dtype, "shape": [size], "data_offsets": [0, end]}})) for dtype, size, end in (
                ("F32", 2, 999), ("F32", -2, 8), ("PICKLE", 16, 64))))],
    *[("train", index({"weight_map": {"model.norm.weight": name}}), "", f"m/{said}: missing, corr")
      for name, said in (("../../secret.safetensors", "secret.safetensors"), (5, "5"))],
    *[("train", index(content), "", "m/model.safetensors.index.json: n")
      for content in ({"weight_map": [1, 2]}, {}, [], None)],
    ("train", index({"weight_map": {}}), "", "m: the weights are not .*Missing key"),
    ("train", {"m/config.json": None, "m/model.q4.gguf": b""}, "", "m: GGUF is llama.cpp's format"),
    *[("train", {}, f"--student {name}", f"{name}: GGUF is llama.cpp's format; give the folder")
      for name in ("m/x.gguf", "Qwen/Qwen2.5-0.5B-Instruct-GGUF")],
    ("train", {"m/adapter_config.json": b"{}"}, "", "m: has an adapter .*merge it"),
    ("accuracy", {}, "--model t.jsonl", "t.jsonl: not a folder, and the Hub says"),
    *[(command, {}, f"--{which} nobody/none", "nobody/none: not a folder, and the Hub says")
      for command, which in (("accuracy", "model"), ("score", "teacher"), ("train", "student"))],
    ("train", {}, "--objective kl --teacher other", "vocabulary mismatch: other and m have differ"),
    ("exposure", {}, "--student other", "exposure: different tokenizers"),
    # ---- options
    *[(command, {}, f"{option} {value}", rf"{option}: {value}.*: must be from")
      for command, option, value in [
          ("train", "--tau", "0"), ("train", "--tau", "nan"), ("train", "--lr", "inf"),
          ("train", "--lr", "-1"), ("train", "--batch-size", "0"), ("train", "--beta", "2"),
          ("train", "--steps", "-5"), ("train", "--on-policy", "nan"), ("train", "--seed", "-1"),
          ("train", "--epochs", "0"), ("train", "--epochs", "inf"), ("train", "--max-length", "0"),
          ("select", "--keep", "0"), ("select", "--keep", "nan"), ("select", "--keep", "2"),
          ("reach", "--max-ratio", "0"),
          ("accuracy", "--samples", "0"), ("accuracy", "--temperature", "-1"),
          ("accuracy", "--temperature", "nan"), ("accuracy", "--batch-size", "0"),
          ("accuracy", "--max-new-tokens", "0"), ("accuracy", "--limit", "-3"),
          ("accuracy", "--seed", "-1"), ("weights", "--tau", "0"), ("mix", "--seed", "-1")]],
    ("train", {}, "--batch-size 1.5", "argument --batch-size: invalid number value: '1.5'"),
    ("train", {}, "--objective dpo", "argument --objective: invalid choice: 'dpo'"),
    ("train", {}, "--save-dtype float32", "unrecognized arguments: --save-dtype"),
    ("toy", {}, "--stu x", "unrecognized arguments: --stu"),
    *[("toy", {}, words, "give --student, --traces and --out; or none, for the toy world")
      for words in ("--student s", "--traces t", "--student s --traces t")],
    *[("toy", {}, words, "the toy world has its own teacher, and --steps for --epochs")
      for words in ("--teacher m", "--epochs 2")],
    *[("train", {}, f"--objective {name}", f"--objective {name} needs the whole .* give --teacher")
      for name in ("kl", "discord-gkd")],
    *[("train", {}, f"--objective {name} --teacher m", f"--objective {name} uses no --teacher")
      for name in ("sft", "dft")],
    *[("train", {}, f"--objective {name} --on-policy 0.5",
       f"--on-policy: --objective {name} learns from the teacher's tokens")
      for name in ("sft", "dft", "discord")],
    ("select", {}, "--separator (", "unterminated subpattern"),
    ("accuracy", {}, "--dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ("accuracy", {}, "--samples 2", "--samples > 1 needs --temperature > 0"),
    *[(command, {}, f"--device {name}", f"--device: {name}: only cpu, cuda and cuda:1 are impl")
      for command in ("accuracy", "train") for name in ("tpu9", "mps", "gpu", "cpu:0")],
    ("accuracy", {}, "--device cuda:7", "--device cuda:7: no such GPU here"),
    ("accuracy", {}, "--temperature 1e-40", "temperature 1e-40: give 0, which is greedy, or at le"),
    *[(command, {}, "--out /dev/null", "--out: /dev/null: not a file")
      for command in ("train", "score", "reach", "select", "mix", "accuracy", "exposure",
                      "weights")],
    ("train", {}, "--traces /dev/stdin", "/dev/stdin: not a file"),
]


@pytest.mark.parametrize("command, spoilt, options, said", CASES, ids=[
    f"{i}-{case[0]}-{case[3]:.50}" for i, case in enumerate(CASES)])
def test_bad_input_is_one_line(place, capsys, command, spoilt, options, said):
    """Guards a traceback, a hang, a wrong result, or an error that does not say where."""
    for name, content in spoilt.items():
        file = Path(name)
        if content is None:
            file.unlink()
            continue
        if isinstance(content, dict):
            content = json.dumps(json.loads(file.read_text()) | content).encode()
        file.write_bytes(content(file.read_bytes()) if callable(content) else content)
    before = {path.name for path in place.iterdir()}
    main, words = COMMANDS[command]
    with pytest.raises(SystemExit) as error:
        data.run_command(lambda: main([*words.split(), *options.split()]))
    message = error.value.code
    if message == 2:  # argparse has printed it
        message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: .*{said}", message), message
    assert "\n" not in message
    assert {path.name for path in place.iterdir()} == before


@pytest.mark.parametrize("key, value", [
    ("model_type", "mistral"), ("hidden_act", "gelu"), ("mlp_bias", True),
    ("use_sliding_window", True), ("layer_types", ["full_attention", "sliding_attention"]),
    ("layer_types", {"a": 1}), ("attention_dropout", 0.1), ("is_causal", False),
    ("attention_bias", 7), ("tie_word_embeddings", "no"), ("partial_rotary_factor", 0.5),
    ("architectures", ["Qwen2ForRewardModel"]), ("quantization_config", {"quant_method": "fp8"}),
    ("auto_map", {"AutoModel": "x.Y"}), ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"type": "default", "mrope_section": [2, 2]}),
    ("rope_parameters", {"rope_type": "dynamic"}),
    ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}), ("head_dim", 7),
    ("num_key_value_heads", 3), ("hidden_size", None), ("hidden_size", True),
    ("hidden_size", 32.0), ("hidden_size", 10 ** 13), ("vocab_size", "97"), ("vocab_size", -129),
    ("rms_norm_eps", -1), ("num_attention_heads", 0), ("rope_theta", 0), ("rope_theta", "1e6"),
    ("rope_theta", math.nan), ("rope_theta", math.inf), ("max_position_embeddings", "long")])
def test_unsupported_config_is_refused(key, value):
    """Guards silently wrong networks: the message has the key (or the part of it) and the value."""
    part = {"rope_scaling": "rope_type|low_freq_factor|mrope_section",
            "rope_parameters": "rope_type|full_attention"}
    with pytest.raises(BadInput, match=part.get(key, key)) as error:
        Config(raw_config("qwen2") | {key: value}, "some/config.json")
    shown = value if not isinstance(value, dict | list) else ""
    assert str(error.value).startswith("some/config.json: ") and str(shown) in str(error.value)


@pytest.mark.parametrize("change, named", [
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    (lambda t: t.pop("model.layers.1.self_attn.q_proj.bias"), "layers.1.self_attn.q_proj.bias"),
    (lambda t: t.update({"model.layers.9.x": torch.ones(2)}), "model.layers.9.x"),
    (lambda t: t.update({"lm_head.weight": torch.ones(97, 32)}), "lm_head.weight"),
    (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight")])
def test_wrong_tensors_are_named(tmp_path, change, named):
    """Guards loading that goes on with missing, surplus or misshapen tensors."""
    make_hf(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=named.replace(".", r"\.")) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: the weights are not what config.json says: ")


@pytest.mark.parametrize("command", ["score", "reach", "select", "weights"])
def test_a_broken_model_writes_nothing(place, command):
    """Guards NaN in a file, half of the traces by chance, a page of colors that mean nothing."""
    tensors = load_file("m/model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, "m/model.safetensors", {"format": "pt"})
    before = {path.name for path in place.iterdir()}
    main, words = COMMANDS[command]
    with pytest.raises(BadInput, match="m: NaN or infinity among the log-probabilities; try"):
        main(words.split())
    assert {path.name for path in place.iterdir()} == before


def test_a_link_stays_a_link(place):
    """Guards results that replace the link to where they should go."""
    (place / "disk").mkdir()
    (place / "o.jsonl").symlink_to("disk/real.jsonl")
    main, words = COMMANDS["score"]
    main(words.split())
    assert (place / "o.jsonl").is_symlink()
    assert len((place / "disk/real.jsonl").read_text().splitlines()) == 3


def test_odd_terminals(toy_model, tmp_path):
    """Guards tracebacks in a terminal of ASCII, and without a stderr."""
    data.write_jsonl(tmp_path / "t.jsonl", [{**GOOD, "\u00e9": 1}])
    command = shlex.join([sys.executable, train.__file__, "--student", str(toy_model), "--traces",
                          "t.jsonl", "--steps", "1", "--out", "run", "--device", "cpu"])
    done = subprocess.run(f"{command} 2>&-", shell=True, cwd=tmp_path, text=True,  # noqa: S602
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
                          check=False)
    assert done.returncode == 0 and "not read: \\xe9 (1)" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "run/config.json").exists()


def test_no_compiler(place, monkeypatch):
    """Guards a traceback of --compile, after the folder of the run was made."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    main, words = COMMANDS["train"]
    with pytest.raises(BadInput, match="--compile needs a C"):
        main([*words.split(), "--compile"])
    assert not Path("run").exists()
