"""The READMEs, command by command as printed, with real problems and tokenizers, and with small
random models in place of the real ones. They are never right: a stand-in grades them."""

import json
import re
import shlex
import shutil
import subprocess
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, FIXTURES, make_hf, save_byte_tokenizer
from hub import HUB
from server import readme_lines
from transformers import AutoModelForCausalLM

import data
import evaluate
import train

HOME = Path(__file__).parents[1]
README = (HOME / "README.md").read_text(encoding="utf-8")
PAGES = {HOME / name: (HOME / name).read_text(encoding="utf-8") for name in (
    "README.md", "tests/README.md", "tests/checks/README.md", "tests/study/README.md",
    "tests/study/words/README.md", "tests/study/dasd.md", "tests/workshop/README.md",
    "tests/workshop/exercises.md")}
DASD = PAGES[HOME / "tests/study/dasd.md"].partition("\n## DASD beside DisCorD")[0]
RECIPE = README.partition("\n## Your own models")[2].partition("\n## DASD")[0] + DASD
RECIPE = re.sub(r" \\\n +", " ", RECIPE)  # a command of two lines
REAL = RECIPE.partition("runs on the toy")[0]  # then come other names
VARIABLES = {name: value.strip('"') for name, value in
             re.findall(r'\b([A-Z])=("[^"]*"|\S+)', REAL)}
COMMANDS = re.findall(r"^    (?:python )?((?:(?:data|train|evaluate)\.py|cat) [^#\n]*)", RECIPE,
                      re.MULTILINE)
SMALL = {"accuracy": "--limit 12 --max-new-tokens 12 --batch-size 24 --device cpu",
         "exposure": "--limit 3 --max-new-tokens 5 --samples 2 --device cpu",
         "train.py": "--steps 2 --batch-size 2 --grad-accum 1 --lr 1e-3 --device cpu"}


def publish(tmp_path):
    """GSM8K (at least 12 problems) and two Qwens on the Hub, with one token for each byte where the
    real tokenizer is not at hand. A tenth of all tokens ends an answer, or random models would
    never finish one."""
    for split in ("train", "test"):
        rows = [row for _, row in data.read_jsonl(DATA / f"benchmarks/gsm8k/{split}.jsonl")]
        HUB.rows["openai/gsm8k", "main", split] = rows if len(rows) > 12 else [
            {**row, "question": f"{i}. {row['question']}"} for i in range(4) for row in rows]
    tokenizer = "Qwen2.5-Instruct"
    for seed, (name, config_name) in enumerate((("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
                                                ("Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B"))):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        config = (DATA / "tokenizers" / tokenizer / "tokenizer_config.json").read_text()
        (folder / "tokenizer_config.json").write_text(config)
        if DATA == FIXTURES:
            added = json.loads(config)["added_tokens_decoder"].values()
            save_byte_tokenizer(folder, (), [x["content"] for x in added if x["special"]], [])
        else:
            shutil.copyfile(DATA / "tokenizers/Qwen2.5-Instruct/tokenizer.json",
                            folder / "tokenizer.json")
        raw = json.loads((DATA / f"configs/{config_name}.json").read_text())
        make_hf(folder, "qwen2", seed, 0.1, **{**raw, "hidden_size": 32, "intermediate_size": 64,
                                             "num_hidden_layers": 1, "num_attention_heads": 4,
                                             "num_key_value_heads": 2})
        (folder / "generation_config.json").write_text(json.dumps(
            {"eos_token_id": list(range(0, 151643, 10))}))
        HUB.repos[f"models/Qwen/{name}"] = {f.name: f.read_bytes() for f in folder.iterdir()}


def test_recipes(tmp_path, monkeypatch, capsys):
    """Guards commands that do not parse or do not fit together: a prompt, id or number lost on the
    way from the Hub's problems to the student's accuracy."""
    monkeypatch.setattr(evaluate.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate, "is_correct", lambda prediction, gold: bool(
        prediction.strip() and zlib.crc32((prediction + gold).encode()) % 3))
    monkeypatch.setattr(data, "Tokenizer", cache(data.Tokenizer))  # half a second each
    monkeypatch.chdir(tmp_path)
    publish(tmp_path)
    data.write_jsonl("plain.jsonl", [{"prompt": f"{i}+2?", "response": f"It is {i + 2}."}
                                     for i in range(4)])
    assert len(COMMANDS) >= 15
    mains = {"data.py": data.main, "evaluate.py": evaluate.main,
             "train.py": lambda words: train.train(train.parse_args(words))}
    for command in COMMANDS:
        line = re.sub(r"\$(\w)", lambda name: VARIABLES.get(name[1], ""), command)
        script, *words = shlex.split(line)
        if script == "cat":
            subprocess.run(line, shell=True, check=True)  # noqa: S602
            continue
        kind = script if script == "train.py" else words[0]
        mains[script]([*words, *shlex.split(SMALL.get(kind, ""))])
    printed = capsys.readouterr().out
    assert printed.count("Qwen/Qwen2.5-7B-Instruct on gsm8k:train:\n  accuracy 0.") == 2
    for name in ("runs/discord", VARIABLES["S"]):
        assert printed.count(f"{name} on gsm8k:\n  accuracy 0.") == 2  # by itself, and compared
    assert "A - B: " in printed and "T=0, 1 answers a problem, cut at 12 tokens" in printed
    assert "| runs/discord |" in printed
    assert Path("runs/discord/gsm8k-greedy.jsonl").exists()

    student = data.Tokenizer(VARIABLES["S"])
    teacher = [record for _, record in data.read_jsonl("runs/t.jsonl")]
    assert len(teacher) == 12 * 4 and len({record["id"] for record in teacher}) == 12
    for record in teacher:
        assert record["rendered"].count("put your final answer within \\boxed{}.") == 1
        assert record["rendered"].startswith("<|im_start|>system\nYou are Qwen, created by Alibaba")
        if not record["response"].strip():
            continue  # ended at once, and wrong
        example = data.encode_trace(record, student, "line 1", need_logprobs=True)
        text = student.decode(example.tokens[:example.prompt_length].tolist())
        assert text == record["rendered"]
    run = json.loads(Path("runs/discord/run.json").read_text())
    right = sum(record["correct"] and record["finished"] for record in teacher)
    # The byte tokenizer's model sometimes writes a special token.
    marked = run["dropped"].get("with special tokens in the text", 0)
    assert run["traces"] == right - marked > 4
    assert sum(run["dropped"].values()) == 48 - right + marked > 4
    mixed = [record for _, record in data.read_jsonl("runs/m.jsonl")]
    assert any(record["correct"] and record["finished"] for record in mixed)
    scored = [record for _, record in data.read_jsonl("runs/scored.jsonl")]
    assert [record["teacher"] for record in scored] == [VARIABLES["T"]] * 4
    assert Path("runs/weights.html").read_text(encoding="utf-8").count("mean weight") == 10
    theirs = AutoModelForCausalLM.from_pretrained("runs/dasd", dtype=torch.float32)
    assert theirs.config.vocab_size == 151936


# What servers return: (text, finish_reason, stop_reason, what is wrong with the log-probabilities)
REPLIES = {
    "right": ("f=2 #### 2", "stop", None, None),
    "wrong": ("f=2 #### 3", "stop", None, None),
    "cut off": ("a=1 b=2", "length", None, None),
    "stopped by a string": ("a=1", "stop", "####", None),
    "stopped by another EOS": ("f=2 #### 2", "stop", 1, None),
    "the floor": ("f=2 #### 2", "stop", None, -9999.0),
    "null": ("f=2 #### 2", "stop", None, None),
}


def made_replies(tokenizer, form):
    """One reply for each case, in the form of vLLM's offline outputs or of its server."""
    outputs, prompt = [], tokenizer.encode_prompt([{"role": "user", "content": "0 a+4"}])
    for name, (text, finish_reason, stop_reason, floor) in REPLIES.items():
        ids = tokenizer.encode(text)
        if finish_reason == "stop" and not isinstance(stop_reason, str):
            ids = [*ids, stop_reason or tokenizer.eot_id]
        logprobs = [-0.25 * i for i in range(len(ids))]
        if floor:
            logprobs[1] = floor
        if name == "null":
            logprobs[1] = None
        if form == "offline":
            tables = [{i: SimpleNamespace(logprob=value), 9999: SimpleNamespace(logprob=-20.0)}
                      for i, value in zip(ids, logprobs, strict=True)]
            choice = SimpleNamespace(text=text, token_ids=ids, logprobs=tables,
                                     finish_reason=finish_reason, stop_reason=stop_reason)
            outputs.append(SimpleNamespace(outputs=[choice], prompt_token_ids=prompt))
        else:
            content = [{"token": "?", "logprob": value, "bytes": None, "top_logprobs": []}
                       for value in logprobs]
            outputs.append({"usage": {}, "prompt_token_ids": prompt, "choices": [{
                "message": {"role": "assistant", "content": text}, "token_ids": ids,
                "logprobs": {"content": content}, "finish_reason": finish_reason,
                "stop_reason": stop_reason}]})
    return outputs


@pytest.mark.parametrize("form", ["offline", "served"])
def test_traces_of_vllm(toy_model, tmp_path, monkeypatch, form):
    """Guards the README's lines: what a server cut off, or has no number for, must be dropped and
    counted; what is usable must keep the server's ids and numbers, to the end of turn."""
    monkeypatch.chdir(tmp_path)
    tokenizer = data.Tokenizer(toy_model)
    problems = [{"id": name, "prompt": "0 a+4", "answer": "2"} for name in REPLIES]
    replies = made_replies(tokenizer, form)
    exec(readme_lines(form == "served"),  # noqa: S102
         {"given": problems, "outputs": replies, "replies": replies})
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "0 a+4"}])
    records = [record for _, record in data.read_jsonl("runs/served.jsonl")]
    assert all(record["prompt_tokens"] == prompt for record in records)
    examples, dropped = data.load_traces("runs/served.jsonl", tokenizer, 64, need_logprobs=True)
    assert dropped == {"wrong": 1, "unfinished": 2,
                       "with a log-probability of null or below -1000": 2}
    ids = tokenizer.encode("f=2 #### 2")
    for example, last in zip(examples, (tokenizer.eot_id, 1), strict=True):
        assert example.tokens[example.prompt_length:].tolist() == [*ids, last]
        assert example.teacher_logp.tolist() == [0, -0.25, -0.5, -0.75]


@pytest.mark.parametrize("command", sorted(set(re.findall(
    r"python ((?:data|train|evaluate)\.py(?: [^\n#`;&)\\]*)?)", "\n".join(PAGES.values())))))
def test_commands_have_these_options(command, capsys):
    """Guards commands and options of the READMEs that do not exist."""
    script, *words = shlex.split(command)
    with pytest.raises(SystemExit) as stopped:
        if script == "train.py":
            train.parse_args(["--help"])
        else:
            (data if script == "data.py" else evaluate).main([words[0], "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", said))


def test_code_and_links_are_those_of_the_files():
    """Guards quoted code that has gone stale, and links to and names of files that do not exist."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for name, about in rows:
        code = (HOME / name).read_text()
        named = re.findall(r"`(\w+)`", about)
        assert [word for word in named if f"def {word}(" not in code] == []
    bridge = (HOME / "tests/test_bridge.py").read_text()
    page, = (text for text in PAGES.values() if "    class DisCorD" in text)
    block = re.match(r"(?:(?: {4}.*)?\n)+", page[page.index("    class DisCorD"):])[0]
    lines = [line.strip() for line in block.splitlines()]
    assert len(lines) >= 8 and [line for line in lines if line not in bridge] == []
    for file, text in PAGES.items():
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links and [link for link in links if not (file.parent / link).exists()] == []
        files = re.findall(r"\btests/[\w/]+\.(?:py|yaml)\b", text)
        assert [name for name in files if not (HOME / name).exists()] == []
