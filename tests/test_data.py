"""data.py: templates and ids against transformers, masks, batches, scoring, broken files."""

import doctest
import json
import math
import random
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import make_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
from model import BadInput

# name -> (folder of tokenizer.json, folder of the rest, its tokenizer_config, end of turn)
REAL = {
    "Qwen2.5-Instruct": ("Qwen2.5-Instruct", "Qwen2.5-Instruct", "tokenizer_config", "<|im_end|>"),
    "Qwen2.5-base": ("Qwen2.5-Instruct", "Qwen2.5-base", "tokenizer_config", "<|im_end|>"),
    "Qwen3": ("Qwen3", "Qwen3", "tokenizer_config", "<|im_end|>"),
    "Qwen3-4B-2507-Thinking": ("Qwen3", "Qwen3-4B-2507", "tokenizer_config", "<|im_end|>"),
    "Llama-3.2-Instruct": ("Llama-3.2-Instruct", "Llama-3.2-Instruct", "tokenizer_config",
                           "<|eot_id|>"),
    "TinyLlama-1.1B-Chat-v1.0": ("TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B-Chat-v1.0",
                                 "tokenizer_config", "</s>"),
    "SmolLM2-Instruct": ("SmolLM2-Instruct", "SmolLM2-Instruct", "tokenizer_config", "<|im_end|>"),
    "DeepSeek-R1-Distill-Qwen": ("DeepSeek-R1-Distill-Qwen", "DeepSeek-R1-Distill-Qwen",
                                 "tokenizer_config", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    "DeepSeek-R1-Distill-Qwen (2025-02 template)": (
        "DeepSeek-R1-Distill-Qwen", "DeepSeek-R1-Distill-Qwen",
        "tokenizer_config.2025-02-think-in-prompt", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    "Llama-2-7b-hf": ("Llama-2-7b-hf", "Llama-2-7b-hf", "tokenizer_config", "</s>"),
}


def real_tokenizer(shared, tmp_path, name):
    vocabulary, rest, config, _ = REAL[name]
    rest, vocabulary = shared / "tokenizers" / rest, shared / "tokenizers" / vocabulary
    shutil.copyfile(next(vocabulary.glob("tokenizer*.json")) if "R1" not in name else
                    vocabulary / "tokenizer.RECONSTRUCTED.json", tmp_path / "tokenizer.json")
    if (vocabulary / "tokenizer.json").exists():
        shutil.copyfile(vocabulary / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(rest / f"{config}.json", tmp_path / "tokenizer_config.json")
    if (rest / "chat_template.jinja").exists():
        shutil.copyfile(rest / "chat_template.jinja", tmp_path / "chat_template.jinja")
    return data.Tokenizer(tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_prompts_and_end_of_turn_of_real_tokenizers(shared, tmp_path, name, monkeypatch):
    """Guards rendering (against transformers' own output, stored), a second BOS, and training on
    the EOS of the base model where the chat template ends a turn with another token."""
    monkeypatch.setitem(data.TEMPLATES.globals, "strftime_now", lambda form: "21 Nov 2026")
    tokenizer = real_tokenizer(shared, tmp_path, name)
    assert tokenizer.vocab[REAL[name][3]] == tokenizer.end
    cases = [json.loads(line) for line in open(shared / "chat_template_renders.jsonl")]
    cases = [case for case in cases if case["tokenizer"] == name]
    assert len(cases) == 7 * (name != "Llama-2-7b-hf")  # which has no template
    for case in cases:
        if "continue_final_message" not in case["kwargs"]:
            text = tokenizer.render(case["messages"], case["add_generation_prompt"],
                                    **case["kwargs"])
            assert text == case["rendered"], case["case"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "What is 12 + 34? \\boxed{} it."}]
    if cases:
        text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True,
                                          date_string="21 Nov 2026")
        expected = theirs(text, add_special_tokens=False)["input_ids"]
    else:
        expected = theirs(turns[0]["content"])["input_ids"]
    assert tokenizer.prompt(turns) == expected


def test_ids_of_real_tokenizers(shared):
    """Guards special tokens added twice, and prompt and response encoded as one text (`joint`)."""
    cases = [json.loads(line) for line in open(shared / "tokenizer_golden.jsonl")]
    loaded, seams = {}, 0
    for case in cases:
        name = case["tokenizer_file"]
        if name not in loaded:
            loaded[name] = tokenizer = data.Tokenizer.__new__(data.Tokenizer)
            file = shared / "tokenizers" / name
            tokenizer.backend = data.tokenizers.Tokenizer.from_file(str(file))
        encode = loaded[name].encode
        if "text" in case:
            assert encode(case["text"]) == case["ids"]
        else:
            assert encode(case["prompt"]) + encode(case["response"]) == case["separate"]
            seams += case["separate"] != case["joint"]
    assert len(cases) == 224 and seams > 10


def test_thinking_is_not_eaten(shared, tmp_path):
    """Guards R1's template, which drops all text up to </think> from an assistant's turn."""
    tokenizer = real_tokenizer(shared, tmp_path, "DeepSeek-R1-Distill-Qwen")
    trace = {"prompt": "2+2?", "response": "<think>\nAdd.\n</think>\n\nIt is \\boxed{4}."}
    example = data.encode(trace, tokenizer, "line 1")
    response = example.tokens[example.prompt:].tolist()
    assert tokenizer.decode(response) == trace["response"]
    assert response[0] == tokenizer.vocab["<think>"] and response[-1] == tokenizer.end


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen (2025-02 template)",
                                  "Qwen3-4B-2507-Thinking", "Qwen3"])
def test_thinking_is_opened_once(shared, tmp_path, name):
    """Guards <think> twice where the real template opens the thinking and the trace does, too, and
    training on another prompt than the one that generation starts from."""
    tokenizer = real_tokenizer(shared, tmp_path, name)
    for response in ("<think>\nAdd.\n</think>\n\n4", "Add.\n</think>\n\n4"):
        example = data.encode({"prompt": "2+2?", "response": response}, tokenizer, "line 1")
        text = tokenizer.backend.decode(example.tokens, skip_special_tokens=False)
        assert text.count("<think>") == (1 if name != "Qwen3" else response.count("<think>"))
        prompt = tokenizer.prompt([{"role": "user", "content": "2+2?"}])
        assert example.tokens[:len(prompt)].tolist() == prompt
        assert "Add.\n</think>\n\n4" in text


def test_padding_baked_into_a_tokenizer_is_ignored(toy_model, tmp_path):
    """Guards prompts that come back 128 tokens long, or cut (seen in a real fine-tune)."""
    raw = json.loads((toy_model / "tokenizer.json").read_text())
    raw["padding"] = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None,
                      "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                         "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copyfile(toy_model / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    assert len(data.Tokenizer(tmp_path).encode("1 a+2 b*3")) == 3


@pytest.mark.parametrize("template", [
    "{{ messages.__class__.__mro__ }}", "{{ raise_exception('no system role') }}", "{% for %}",
    "{{ messages[0].content + 1 }}", "{% set _ = messages.append(1) %}"])
def test_bad_chat_templates(toy_model, tmp_path, template):
    """Guards templates that reach into Python: they run in jinja2's immutable sandbox."""
    shutil.copytree(toy_model, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match="chat template"):
        data.Tokenizer(tmp_path / "m").prompt([{"role": "user", "content": "hi"}])


# ------------------------------------------------------------------------------- examples, batches


def toy_examples(tokenizer, count, skip=0.5):
    rng = random.Random(0)
    records = [{**data.toy_trace(rng, skip=skip), "id": i} for i in range(count)]
    return [data.encode(record, tokenizer, "line 1") for record in records]


def test_batch_supervises_the_response_and_nothing_else(toy_model):
    """Guards a shift by one, a lost first token, an unsupervised EOS, and padding that is
    supervised: a network that says "the next token" must be right at every row."""
    tokenizer = data.Tokenizer(toy_model)
    examples = toy_examples(tokenizer, 50)
    batch = data.collate(examples)
    assert len({len(example.tokens) for example in examples}) > 2
    following = torch.zeros_like(batch.tokens)
    for b, example in enumerate(examples):
        n = len(example.tokens)
        assert batch.tokens[b].tolist() == example.tokens[:-1].tolist() + [0] * (
            batch.tokens.shape[1] - n + 1)
        following[b, :n - 1] = torch.from_numpy(example.tokens[1:])
    assert torch.equal(following.flatten()[batch.rows], batch.y)
    assert batch.y.tolist() == [t for e in examples for t in e.tokens[e.prompt:].tolist()]
    assert (batch.y == tokenizer.end).sum() == 50
    assert len(batch.rows.unique()) == len(batch.rows)


def test_the_sample_that_is_shown(toy_model):
    """Guards a picture of the mask that is not the mask."""
    tokenizer = data.Tokenizer(toy_model)
    example = data.encode(GOOD, tokenizer, "line 1")
    assert data.show(example, tokenizer, color=False) == (
        "<user> 7 a+3 b*4 <assistant>[a=0][b=0][####][0][<end>]")
    assert data.show(example, tokenizer, color=True).count("\033[32m") == 5


def test_order_of_traces(toy_model):
    """Guards epochs that skip or repeat traces, one order for all epochs, and a step whose traces
    depend on how it is cut into micro-batches."""
    examples = toy_examples(data.Tokenizer(toy_model), 24)

    def names(step, batch_size, grad_accum, seed=0):
        batches = data.step_batches(examples, step, batch_size, grad_accum, seed)
        assert [len(batch.ids) for batch in batches] == [batch_size] * grad_accum
        return [name for batch in batches for name in batch.ids]

    epochs = [[name for step in range(3 * e, 3 * e + 3) for name in names(step, 4, 2)]
              for e in range(3)]
    assert all(sorted(map(int, epoch)) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert names(1, 8, 1) == names(1, 2, 4) == names(1, 1, 8)
    assert names(1, 8, 1) != names(1, 8, 1, seed=1)
    assert len(set(names(0, 16, 1) + names(1, 16, 1))) == 24  # across the end of an epoch


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD = {"prompt": "7 a+3 b*4", "response": "a=0 b=0 #### 0"}


def test_the_documented_record(toy_model, tmp_path):
    """Guards a docstring that no longer says how a trace looks (it is a real one, of the toy's
    teacher), and a stored signal of more than 8 bytes a token."""
    source = doctest.DocTestParser().get_examples(data.__doc__)[0].source
    exec(source, names := {})  # noqa: S102
    trace, tokenizer = names["trace"], data.Tokenizer(toy_model)
    examples, dropped = data.load_traces(write(tmp_path / "t.jsonl", trace), tokenizer, 64, True)
    assert not dropped and examples[0].id == "3" and examples[0].p_logp.tolist() == [
        np.float32(value) for value in trace["teacher_logprobs"]]
    assert tokenizer.decode(examples[0].tokens[examples[0].prompt:].tolist()) == trace["response"]
    assert evaluate.is_correct(trace["response"], trace["answer"])
    for name in ("messages", "tokens", *trace):
        assert f"`{name}`" in data.__doc__ or f'"{name}"' in source
    stored = json.dumps(trace["teacher_logprobs"], separators=(",", ":"))
    assert len(stored) <= 8 * len(trace["teacher_logprobs"])


def test_left_out_traces_are_counted(toy_model, tmp_path):
    """Guards training on wrong, unfinished or cut traces, and dropping them in silence."""
    file = write(tmp_path / "t.jsonl", GOOD, {**GOOD, "correct": False, "finished": True},
                 {**GOOD, "correct": False, "finished": False}, {**GOOD, "correct": True},
                 {**GOOD, "response": "a=0 " * 90}, {"messages": [
                     {"role": "user", "content": "7 a+3"},
                     {"role": "assistant", "content": "a=0"}]})
    examples, dropped = data.load_traces(file, data.Tokenizer(toy_model), 64)
    assert dropped == {"wrong": 1, "unfinished": 1, "longer than 64 tokens": 1}
    assert [len(example.tokens) - example.prompt for example in examples] == [5, 5, 2]
    assert [example.id for example in examples] == ["1", "4", "6"]
    longest = max(len(example.tokens) for example in examples)
    for limit, kept in ((longest, 3), (longest - 1, 1)):  # as long as allowed is not too long
        assert len(data.load_traces(file, data.Tokenizer(toy_model), limit)[0]) == kept


@pytest.mark.parametrize("line, named", [
    ('{"prompt": "x"', "line 2: not valid JSON"), ("[1]", "line 2: not a JSON object"),
    (b'{"prompt": "\xff"}', "line 2: not valid JSON"),
    ({"response": "a=0"}, "line 2: no field prompt; it has response"),
    ({"prompt": "x"}, "line 2: no field response; it has prompt"),
    ({**GOOD, "response": ""}, "line 2: response = ''"),
    ({**GOOD, "response": 5}, "line 2: response = '5'"),
    ({**GOOD, "prompt": " "}, "line 2: prompt = ' '"),
    ({**GOOD, "messages": "hi"}, "line 2: messages"),
    ({**GOOD, "messages": [{}]}, "line 2: messages"),
    ({**GOOD, "tokens": [1, 9999]}, "line 2: tokens"),
    ({**GOOD, "tokens": ["a"]}, "line 2: tokens"),
    ({**GOOD, "teacher_logprobs": None}, "line 2: no list of teacher_logprobs.*data.py score"),
    ({**GOOD, "teacher_logprobs": [-1.0] * 4},
     "line 2: teacher_logprobs: 4 numbers for the 5 tokens"),
    ({**GOOD, "teacher_logprobs": 3}, "line 2: no list of teacher_logprobs"),
    ({**GOOD, "teacher_logprobs": [-1, -1, math.nan, -1, -1]},
     "line 2: teacher_logprobs: .nan. is not a log-prob"),
    ({**GOOD, "teacher_logprobs": [-1, -1, 0.5, -1, -1]},
     "line 2: teacher_logprobs: .0.5. is not"),
    ({**GOOD, "teacher_logprobs": [-1, -1, "x", -1, -1]},
     "line 2: teacher_logprobs: .'x'. is not")])
def test_broken_traces_are_named(toy_model, tmp_path, line, named):
    """Guards every refusal: file, line, field, and what to do."""
    file = write(tmp_path / "t.jsonl", {**GOOD, "teacher_logprobs": [-1.0] * 5})
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(BadInput, match=rf"{file} {named}"):
        data.load_traces(file, data.Tokenizer(toy_model), 64, teacher=True)


def test_a_prompt_without_tokens_is_named(toy_model, tmp_path):
    """Guards a response whose first token would be predicted from position -1, the end."""
    shutil.copytree(toy_model, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }} <end>{% endfor %}")
    with pytest.raises(BadInput, match="line 1: the prompt becomes no token"):
        data.encode(GOOD, data.Tokenizer(tmp_path / "m"), "t.jsonl line 1")


def test_missing_and_empty_files_are_named(toy_model, tmp_path):
    tokenizer = data.Tokenizer(toy_model)
    with pytest.raises(BadInput, match=r"absent\.jsonl: cannot be read: No such file"):
        data.load_traces(tmp_path / "absent.jsonl", tokenizer, 64)
    with pytest.raises(BadInput, match=r"t\.jsonl: no usable trace \(the file is empty\)"):
        data.load_traces(write(tmp_path / "t.jsonl"), tokenizer, 64)
    with pytest.raises(BadInput, match=r"no usable trace \(2 wrong\)"):
        file = write(tmp_path / "t.jsonl", *[{**GOOD, "correct": False}] * 2)
        data.load_traces(file, tokenizer, 64)
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        data.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: not a readable tokenizer"):
        data.Tokenizer(tmp_path)


def test_vocabulary_mismatch_is_refused(toy_model, tmp_path):
    """Guards a tokenizer whose ids the model has no rows for: an index error deep in a run."""
    shutil.copytree(toy_model, tmp_path / "m")
    make_hf(tmp_path / "m", "qwen2", vocab_size=50)
    with pytest.raises(BadInput, match=r"vocabulary mismatch: tokenizer\.json has ids up to 128"):
        data.load(tmp_path / "m")


def test_end_of_turn_stops_a_base_model(toy_model, tmp_path):
    """Guards base models (Qwen2.5) whose config names another EOS than their template writes: the
    student would be trained to end with a token that generation does not stop at."""
    shutil.copytree(toy_model, tmp_path / "m")
    make_hf(tmp_path / "m", "qwen2", vocab_size=129, eos_token_id=7)
    model, tokenizer = data.load(tmp_path / "m")
    assert model.eos_token_ids == [tokenizer.vocab["<end>"], 7] == [3, 7]


def test_score_equals_transformers(toy_model, tmp_path, capsys):
    """Guards scoring at the wrong position, in another order, with padding mixed in, or of rows of
    the head that the tokenizer does not have; and what is written must load."""
    rng = random.Random(1)
    records = [{**data.toy_trace(rng, skip=0.5), "id": i} for i in range(20)]
    traces = write(tmp_path / "in.jsonl", *records, {**GOOD, "response": "a=0 " * 99})
    out = tmp_path / "deep" / "out.jsonl"
    data.main(["score", "--traces", str(traces), "--teacher", str(toy_model), "--out", str(out),
               "--batch-size", "3", "--max-length", "64"])
    assert "20 traces scored; left out: 1 longer than 64 tokens" in capsys.readouterr().out
    examples, _ = data.load_traces(out, data.Tokenizer(toy_model), 64, teacher=True)
    theirs = AutoModelForCausalLM.from_pretrained(toy_model)
    for i, example in enumerate(examples):
        ids = torch.from_numpy(example.tokens.astype(np.int64))
        logp = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        assert example.id == str(i)
        assert np.abs(example.p_logp - logp[example.prompt - 1:].detach().numpy()).max() < 1e-4
    bytes_per_token = (out.stat().st_size - len("".join(map(json.dumps, records)))) / sum(
        len(example.p_logp) for example in examples)
    assert bytes_per_token < 20  # 8 for the signal; short toy responses carry the field names, too


def test_traces_are_not_held_in_memory(toy_model, tmp_path):
    """Guards memory that grows with the tokens of a file of traces (8 bytes a token are 330 bytes a
    trace here). What comes back is what went in, in any order."""
    record = {"prompt": "7 a+3 b*4", "response": " ".join(["a=0", "b=0"] * 18), "id": "trace",
              "teacher_logprobs": [-0.5] * 37}
    tokenizer, used = data.Tokenizer(toy_model), []
    for count in (1000, 8000):
        file = write(tmp_path / "t.jsonl", *[record] * count)
        tracemalloc.start()
        examples, _ = data.load_traces(file, tokenizer, 64, teacher=True)
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, data.__file__)])
        used.append(sum(line.size for line in ours.statistics("lineno")))
        tracemalloc.stop()
    assert (used[1] - used[0]) / 7000 < 120
    expected = data.encode(record, tokenizer, "x line 1", teacher=True)
    examples.append(expected._replace(id="last", tokens=expected.tokens[::-1].copy()))
    for i, name in ((7, "trace"), (8000, "last"), (0, "trace")):
        got = examples[i]
        assert got.id == name and got.prompt == expected.prompt
        assert got.tokens.tolist() == expected.tokens.tolist()[::-1 if name == "last" else 1]
        assert got.p_logp.tolist() == [-0.5] * 37
    assert [len(example.tokens) for example in examples[7998:]] == [len(expected.tokens)] * 3


def test_micro_batches_of_so_many_tokens(toy_model):
    """Guards a trace that is lost or doubled at a cut, a micro-batch beyond the budget, and one
    trace that is larger than it (it goes alone)."""
    rng = np.random.default_rng(0)
    examples = [data.Example(str(i), np.arange(n, dtype=np.int32), 1, None)
                for i, n in enumerate(rng.integers(3, 60, 40))]
    for budget in (1, 60, 200, 10 ** 6):
        for step in range(3):
            plain = data.step_batches(examples, step, 4, 8, 0)
            batches = data.step_batches(examples, step, 4, 8, 0, budget=budget)
            assert [i for batch in batches for i in batch.ids] == [
                i for batch in plain for i in batch.ids]
            for batch, after in zip(batches, [*batches[1:], None], strict=True):
                rows, width = batch.tokens.shape
                assert rows * (width + 1) <= budget or rows == 1
                if after is not None:  # the next one would not have fitted
                    first = min(len(examples[int(i)].tokens) for i in after.ids)
                    assert (rows + 1) * first > budget
    assert len(data.step_batches(examples, 0, 4, 8, 0, budget=10 ** 6)) == 1


# ---------------------------------------------------------------------------------------- toy world


def test_toy_traces(toy_model):
    """Guards the rule, the share of multiplications and of skipped values, and that text and tokens
    stand for each other."""
    tokenizer, rng = data.Tokenizer(toy_model), random.Random(0)
    traces = [data.toy_trace(rng, times=0.1, skip=0.6) for _ in range(2000)]
    for trace in traces:
        start, *operations = trace["prompt"].split()
        value, values = int(start), {}
        for letter, sign, k in operations:
            value = {"+": value + int(k), "-": value - int(k), "*": value * int(k)}[sign] % 10
            values[letter] = value
        *steps, _, answer = trace["response"].split()
        assert answer == trace["answer"] == str(value) and steps[-1][0] == "f"
        assert all(values[step[0]] == int(step[2]) for step in steps)
        assert tokenizer.decode(tokenizer.encode(trace["response"])) == trace["response"]
    text = " ".join(trace["prompt"] for trace in traces)
    assert abs(text.count("*") / 12000 - 0.1) < 0.02
    steps = sum(len(trace["response"].split()) - 2 for trace in traces) / 2000
    assert 3.8 < steps < 4.1  # a chain of six values, each left out with 0.6 unless the last was
    assert "<unk>" not in tokenizer.decode(tokenizer.encode(text))


def test_toy_world_opens_in_transformers(tmp_path):
    """Guards a toy world that only this project can read. (Its models are Llamas: for the others,
    transformers takes the family's way of splitting words, whatever tokenizer.json says.)"""
    data.build_toy(tmp_path, seed=0)
    folder = tmp_path / "seed0" / "blank-student"
    theirs, ours = AutoTokenizer.from_pretrained(folder), data.Tokenizer(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == ours.vocab_size
    turns = [{"role": "user", "content": "7 a+3 b*4"}]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == ours.render(turns) == "<user> 7 a+3 b*4 <assistant>"
    assert theirs(text)["input_ids"] == ours.prompt(turns)
    assert theirs.eos_token_id == ours.end == 3


def test_problem_fields(tmp_path):
    """Guards the field names of the usual benchmarks, numbers and lists as answers, JSON lists, and
    what has no answer."""
    rows = [{"question": "q", "answer": "x #### 3"},
            {"problem": "p", "expected_answer": 7.0, "id": "a"},
            {"prompt": "r", "answer": None, "solution": "s"}, {"prompt": "t", "answer": ""},
            {"question": "u", "final_answer": ["$1$", "$2$"], "context": None}]
    expected = [
        {"id": "1", "prompt": "q", "answer": "x #### 3"},
        {"id": "a", "prompt": "p", "answer": "7.0"}, {"id": "3", "prompt": "r", "answer": "s"},
        {"id": "5", "prompt": "u", "answer": "$1$, $2$"}]
    assert data.load_problems(write(tmp_path / "p.jsonl", *rows)) == expected
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    assert data.load_problems(tmp_path / "p.json") == expected
    for text, said in (("{}", "line 1: no field answer"), ('["x"]', "entry 1: not a JSON object"),
                       ("[{", "not valid JSON"), ("7", "line 1: not a JSON object")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(BadInput, match=said):
            data.load_problems(tmp_path / "p.json")
    with pytest.raises(BadInput, match=r"p\.jsonl line 1: no field prompt or question or problem"):
        data.load_problems(write(tmp_path / "p.jsonl", {"answer": "3"}))
    with pytest.raises(BadInput, match=r"p\.jsonl line 1: no field answer or final_answer"):
        data.load_problems(write(tmp_path / "p.jsonl", {"prompt": "3"}))


def test_one_place_renders_prompts(toy_model, tmp_path):
    """Guards a system prompt or suffix that is lost between sampling, scoring and training, or
    doubled: the traces of an evaluation are trained on with the very string that was asked."""
    boxed = "5\n put it within \\boxed{}."
    file = write(tmp_path / "p.jsonl", {"prompt": "1 a+2", "answer": "5"},
                 {"prompt": boxed, "answer": "5"})
    problems = data.load_problems(file, "\n \\boxed{}", "b*3")
    model, tokenizer = data.load(toy_model)
    records = list(evaluate.answers(model, tokenizer, problems, max_new_tokens=3))
    records.sort(key=lambda record: record["id"])
    assert [record["rendered"] for record in records] == [
        f"<system> b*3 <user> {said} <assistant>" for said in ("1 a+2\n \\boxed{}", boxed)]
    for record, prompt in zip(records, evaluate.ask(problems, tokenizer), strict=True):
        example = data.encode(record, tokenizer, "line 1")
        assert example.tokens[:example.prompt].tolist() == prompt
        assert prompt == tokenizer.encode(record["rendered"])
    again = data.load_problems(write(tmp_path / "a.jsonl", *records), "\n \\boxed{}", "b*3")
    assert evaluate.ask(again, tokenizer) == evaluate.ask(problems, tokenizer)
    for prefix in ([1, 9999], "abc", [1.5]):
        with pytest.raises(BadInput, match="problem 1: prefix: not ids of the tokenizer"):
            evaluate.ask([{"id": 1, "prompt": "5", "prefix": prefix}], tokenizer)
    with pytest.raises(BadInput, match="line 1: has a system prompt of its own, other than --syst"):
        data.load_problems(tmp_path / "a.jsonl", "", "c*3")
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
             {"role": "user", "content": "3"}]
    file = write(tmp_path / "b.jsonl", {"messages": turns, "answer": "5"})
    for _ in range(2):  # the second time, of what the first one made
        problem, = data.load_problems(file, " Box.", "Sys.")
        assert [turn["content"] for turn in problem["messages"]] == ["Sys.", "1", "2", "3 Box."]
        file = write(tmp_path / "c.jsonl", problem)
