"""The README's recipes, command by command as printed, with real problems and tokenizers, and with
small random models in place of the real ones. They are never right: a stand-in grades them."""

import json
import random
import re
import shlex
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from conftest import make_hf
from hub import HUB
from transformers import AutoModelForCausalLM

import data
import evaluate
import train

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
RECIPE = README.partition("\n## Your own models and traces")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^    python ((?:data|train|evaluate)\.py .*)$", RECIPE, re.MULTILINE)
SMALL = {"accuracy": "--limit 12 --max-new-tokens 12 --batch-size 24 --device cpu",
         "train.py": "--steps 2 --batch-size 2 --grad-accum 1 --lr 1e-3 --device cpu"}


def publish(shared, tmp_path):
    """GSM8K and two Qwens on the Hub. A tenth of all tokens ends an answer, or random models would
    never finish one."""
    for split in ("train", "test"):
        HUB.rows["openai/gsm8k", "main", split] = [
            row for _, row in data.read_jsonl(shared / f"benchmarks/gsm8k/{split}.jsonl")]
    for seed, (name, tokenizer) in enumerate((("Qwen2.5-7B-Instruct", "Qwen2.5-Instruct"),
                                              ("Qwen2.5-0.5B", "Qwen2.5-base"))):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        shutil.copyfile(shared / "tokenizers/Qwen2.5-Instruct/tokenizer.json",
                        folder / "tokenizer.json")
        shutil.copyfile(shared / "tokenizers" / tokenizer / "tokenizer_config.json",
                        folder / "tokenizer_config.json")
        raw = json.loads((shared / f"configs/{name}.json").read_text())
        make_hf(folder, "qwen2", seed, 0.1, **{**raw, "hidden_size": 32, "intermediate_size": 64,
                                             "num_hidden_layers": 1, "num_attention_heads": 4,
                                             "num_key_value_heads": 2})
        (folder / "generation_config.json").write_text(json.dumps(
            {"eos_token_id": list(range(0, 151643, 10))}))
        HUB.repos[f"models/Qwen/{name}"] = {f.name: f.read_bytes() for f in folder.iterdir()}


def replies(tokenizer):
    """What a server says to the first problems: made text with made log-probabilities."""
    rng = random.Random(0)
    for problem in data.load_problems("gsm8k:train")[:8]:
        text = f"That is \\boxed{{{rng.randrange(9)}}}."
        ids = [*tokenizer.encode(text), tokenizer.end]
        yield {**problem, "model": "big", "choices": [
            {"finish_reason": "stop", "message": {"content": text}, "token_ids": ids, "logprobs": {
                "content": [{"token": f"token_id:{i}", "logprob": -rng.random()} for i in ids]}}]}


def test_recipes(shared, tmp_path, monkeypatch, capsys):
    """Guards commands that do not parse or do not fit together: a prompt, id or number lost on the
    way from the Hub's problems to the student's accuracy."""
    monkeypatch.setattr(data.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate, "is_correct", lambda prediction, gold: bool(
        prediction and zlib.crc32((prediction + gold).encode()) % 3))
    monkeypatch.chdir(tmp_path)
    publish(shared, tmp_path)
    shutil.copyfile(shared / "benchmarks/gsm8k/train.jsonl", "train.jsonl")
    lines = Path("train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    Path("train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    snippet = re.search(r"^    import json\n(?:    .*\n)+", RECIPE, re.MULTILINE)[0]
    exec(re.sub(r"^    ", "", snippet, flags=re.MULTILINE), {})  # noqa: S102
    student = data.Tokenizer("Qwen/Qwen2.5-0.5B")
    data.write_jsonl("replies.jsonl", replies(student))
    mains = {"data.py": data.main, "evaluate.py": evaluate.main,
             "train.py": lambda words: train.train(train.parse_args(words))}
    assert len(COMMANDS) == 15
    for command in COMMANDS:
        script, *words = shlex.split(command)
        kind = script if script == "train.py" else words[0]
        mains[script]([*words, *shlex.split(SMALL.get(kind, ""))])
    printed = capsys.readouterr().out
    assert printed.count("Qwen/Qwen2.5-7B-Instruct on gsm8k:train: accuracy 0.") == 3
    assert "runs/discord on gsm8k: accuracy 0." in printed
    assert Path("runs/discord/gsm8k-greedy.jsonl").exists()

    teacher = [record for _, record in data.read_jsonl("teacher.jsonl")]
    assert len(teacher) == 12 * 4 and len({record["id"] for record in teacher}) == 12
    for record in teacher:
        assert record["rendered"].count("put your final answer within \\boxed{}.") == 1
        assert record["rendered"].startswith("<|im_start|>system\nYou are Qwen, created by Alibaba")
        if not record["response"].strip():
            continue  # ended at once, and wrong
        example = data.encode(record, student, "line 1", teacher=True)
        text = student.backend.decode(example.tokens[:example.prompt], skip_special_tokens=False)
        assert text == record["rendered"].replace("You are Qwen, created by Alibaba Cloud. You are "
                                                  "a", "You are a")  # the base model's template
    run = json.loads(Path("runs/discord/run.json").read_text())
    right = sum(record["correct"] and record["finished"] for record in teacher)
    assert run["traces"] == right and sum(run["dropped"].values()) == 48 - right > 4
    mixed = [record for _, record in data.read_jsonl("mixed.jsonl")]
    assert any(record["correct"] and record["finished"] for record in mixed)
    served = [record for _, record in data.read_jsonl("traces.jsonl")]
    assert all(record["teacher"] == "Qwen/Qwen2.5-7B-Instruct" for record in served)  # the last one
    theirs = AutoModelForCausalLM.from_pretrained("runs/dasd", dtype=torch.float32)
    assert theirs.config.vocab_size == 151936


@pytest.mark.parametrize("command", sorted(set(re.findall(
    r"python ((?:data|train|evaluate)\.py(?: [^\n#`;&)]*)?)", README))))
def test_readme_commands_have_these_options(command, capsys):
    """Guards commands and options of the README that do not exist."""
    script, *words = shlex.split(command)
    with pytest.raises(SystemExit) as stopped:
        if script == "train.py":
            train.parse_args(["--help"])
        else:
            (data if script == "data.py" else evaluate).main([words[0], "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", said))


def test_readme_sizes_and_code_are_those_of_the_files():
    """Guards line counts and quoted code that have gone stale, and links to what is not there."""
    home = Path(__file__).parents[1]
    sizes = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert sizes == {name: str(len((home / name).read_text().splitlines())) for name in (
        "loss.py", "model.py", "data.py", "evaluate.py", "train.py")}
    quoted = [line.strip() for start in ("which is, in `discord_weight`", "tests/test_bridge.py; ")
              for block in re.findall(r"\n((?:\n|    +.*\n)+)", README.partition(start)[2])[:1]
              for line in block.splitlines() if line.strip()]
    assert len(quoted) >= 12
    code = "\n".join((home / name).read_text() for name in (
        "loss.py", "train.py", "tests/test_bridge.py"))
    assert [line for line in quoted if line not in code] == []
    links = re.findall(r"\]\(([^)#:]+)\)|\b(tests/\w+\.py)", README)
    assert [a or b for a, b in links if not (home / (a or b)).exists()] == []
