"""data.py: templates and ids against transformers, masks, batches, scoring, broken files."""

import doctest
import json
import random
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from conftest import SHARED, make_hf, options, save_byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
import train
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


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    """Loads each of REAL once: its name -> data.Tokenizer."""
    @cache
    def load(name: str) -> data.Tokenizer:
        vocabulary, rest, config, _ = REAL[name]
        folder = tmp_path_factory.mktemp("tokenizer")
        rest, vocabulary = SHARED / "tokenizers" / rest, SHARED / "tokenizers" / vocabulary
        shutil.copyfile(vocabulary / ("tokenizer.RECONSTRUCTED.json" if "R1" in name else
                                      "tokenizer.json"), folder / "tokenizer.json")
        shutil.copyfile(rest / f"{config}.json", folder / "tokenizer_config.json")
        if (rest / "chat_template.jinja").exists():
            shutil.copyfile(rest / "chat_template.jinja", folder / "chat_template.jinja")
        return data.Tokenizer(folder)
    return load


@pytest.mark.parametrize("name", REAL)
def test_prompts_and_end_of_turn_of_real_tokenizers(shared, real_tokenizer, name, monkeypatch):
    """Guards rendering (against transformers' own output, stored), a second BOS, and training on
    the EOS of the base model where the chat template ends a turn with another token."""
    monkeypatch.setitem(data.TEMPLATES.globals, "strftime_now", lambda form: "21 Nov 2026")
    tokenizer = real_tokenizer(name)
    assert tokenizer.vocab[REAL[name][3]] == tokenizer.eot_id
    cases = [json.loads(line) for line in open(shared / "chat_template_renders.jsonl")]
    cases = [case for case in cases if case["tokenizer"] == name]
    assert len(cases) == 7 * (name != "Llama-2-7b-hf")  # which has no template
    for case in cases:
        if "continue_final_message" not in case["kwargs"]:
            text = tokenizer.apply_chat_template(
                case["messages"], add_generation_prompt=case["add_generation_prompt"],
                **case["kwargs"])
            assert text == case["rendered"], case["case"]
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    turns = [{"role": "user", "content": "What is 12 + 34? \\boxed{} it."}]
    if cases:
        text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True,
                                          date_string="21 Nov 2026")
        expected = theirs(text, add_special_tokens=False)["input_ids"]
    else:
        expected = theirs(turns[0]["content"])["input_ids"]
    assert tokenizer.encode_prompt(turns) == expected
    if "R1" in name or "Qwen3" in name:
        return  # these templates change the thinking of an answer
    answer = {"role": "assistant", "content": "The answer is 46."}
    ids = data.encode_trace({"messages": [*turns, answer]}, tokenizer, "line 1").tokens.tolist()
    if cases:  # prompt and response apart have the ids of the chat as a whole
        whole = theirs.apply_chat_template([*turns, answer], tokenize=False,
                                           date_string="21 Nov 2026")
        assert theirs(whole, add_special_tokens=False)["input_ids"][:len(ids)] == ids
    else:
        assert theirs(turns[0]["content"] + "The answer is 46.")["input_ids"] == ids[:-1]


@pytest.mark.parametrize("name", [name for name in REAL if name != "Llama-2-7b-hf"])
def test_real_templates_drop_no_turn(shared, real_tokenizer, name):
    """Guards a question or instructions that vanish since a real template does not know the role,
    and refusing what is only trimmed, moved to the front or the thinking of an earlier turn."""
    tokenizer, refused = real_tokenizer(name), []
    for role in ("developer", "human", "User", "critic"):
        for turns in ([(role, "Why?")], [("system", "Be brief."), (role, "Why?")],
                      [("user", "Why?"), (role, "Why?")]):
            record = {"messages": [{"role": r, "content": text} for r, text in turns],
                      "response": "4"}
            try:
                example = data.encode_trace(record, tokenizer, "t line 1")
            except BadInput as error:
                refused.append(role)
                assert f"t line 1: the chat template leaves out the turn of role '{role}'" in str(
                    error)
            else:
                text = tokenizer.decode(example.tokens.tolist())
                assert all(text.count(turn[1]) >= turns.count(turn) for turn in turns)
    assert not refused if name in ("SmolLM2-Instruct", "Llama-3.2-Instruct") else len(refused) == 12
    turns = [("system", " Be brief.\n"), ("user", "Why?\n"), ("user", "Why?\n"),
             ("assistant", "<think>\nHm.\n</think>\n\nSo."), ("user", "")]
    record = {"messages": [{"role": r, "content": text} for r, text in turns], "response": "4"}
    text = tokenizer.decode(data.encode_trace(record, tokenizer, "t line 1").tokens.tolist())
    assert text.count("Why?") == 2 and "Be brief." in text and "So." in text
    two = [{"role": "system", "content": text} for text in ("One.", "Two.")]
    record = {"messages": [*two, {"role": "user", "content": "Why?"}], "response": "4"}
    if "R1" in name:  # the second one replaces the first
        with pytest.raises(BadInput, match="leaves out the turn of role 'system'"):
            data.encode_trace(record, tokenizer, "t line 1")


@pytest.mark.parametrize("form, date", [
    ("%Y-%m-%d", "2024-07-26"), ("%d %B %Y", "26 July 2024"), ("%d %b %Y", "26 Jul 2024")])
def test_templates_have_one_date(toy_model, tmp_path, monkeypatch, form, date):
    """Guards Llama 3's template, which prints today's date: a resumed run must see the prompts of
    the first one. The date is the template's own default."""
    shutil.copytree(toy_model, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} <end>{% endfor %}"
        f"{{{{ strftime_now('{form}') }}}}")
    tokenizer = data.Tokenizer(tmp_path / "m")
    before = tokenizer.apply_chat_template([{"role": "user", "content": "?"}])
    assert before.endswith(f" <end>{date}")
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "?"}]) == before


def test_templates_of_other_tools(toy_model, tmp_path):
    """Guards templates as transformers renders them: JSON that is not escaped for HTML, `tools`
    that are none, a BOS that only special_tokens_map.json has, and marks of what to train on."""
    shutil.copytree(toy_model, tmp_path / "m")
    (tmp_path / "m/special_tokens_map.json").write_text('{"bos_token": {"content": "<user>"}}')
    (tmp_path / "m/chat_template.jinja").write_text(
        "{{ bos_token }}{% if tools is not none or documents is not none %}TOOLS{% endif %}"
        "{% for m in messages %}{%- generation -%} {{ m.content | tojson }}{% endgeneration %}"
        " <end>{% endfor %}")
    tokenizer = data.Tokenizer(tmp_path / "m")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<a> & \u00e9"}])
    assert text == '<user>"<a> & \u00e9" <end>'


@pytest.mark.parametrize("name", ["BERT", "space"])
def test_tokenizers_that_add_something(tmp_path, name):
    """Guards a base model's prompt that ends in </s>, as its post-processor writes it, and a
    response that begins with a space of its own: such a tokenizer is refused."""
    save_byte_tokenizer(tmp_path, ["\u0120is"], ("</s>", "<s>"))
    backend = data.tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    if name == "BERT":
        backend.post_processor = data.tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=ends)
    else:
        backend.pre_tokenizer = data.tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    if name == "space":
        with pytest.raises(BadInput, match="json: add_prefix_space is not implemented"):
            data.Tokenizer(tmp_path)
        return
    tokenizer = data.Tokenizer(tmp_path)
    example = data.encode_trace({"prompt": "It", "response": "5 is"}, tokenizer, "line 1")
    text = tokenizer.backend.decode(example.tokens.tolist(), skip_special_tokens=False)
    assert text == "<s>It5 is</s>"


def test_white_space_at_the_beginning(shared, real_tokenizer):
    """Guards the first blanks of a response, in tokenizers whose decoder or post-processor has an
    `add_prefix_space` that does not matter here."""
    for name in ("Qwen2.5-Instruct", "Llama-3.2-Instruct", "SmolLM2-Instruct"):
        tokenizer = real_tokenizer(name)
        for text in ("\n\nSure.", "    return x\n", " 5", "5"):
            assert tokenizer.decode(tokenizer.encode_response(text)) == text


def test_fields_of_problems(tmp_path, capsys):
    """Guards a benchmark whose thinking nobody needs, and fields that only a trace has: they are
    named, like a second question and a prompt beside `messages`."""
    turns = [{"role": "user", "content": "2+2?"}]
    data.write_jsonl(tmp_path / "p.jsonl", [
        {"question": "2+2?", "answer": "4", "reasoning": "Two and two.", "weight": 0},
        {"problem": "2+2?", "question": "3+3?", "answer": "4", "response": "4"},
        {"messages": turns, "prompt": "Other.", "answer": "4"}])
    problems = evaluate.load_problems(tmp_path / "p.jsonl")
    asked = [problem.get("prompt", "2+2?") for problem in problems]
    assert asked == ["2+2?", "3+3?", "Other."]
    said = capsys.readouterr().out.strip().partition("not read: ")[2].split(", ")
    assert sorted(said) == ["problem (1)", "prompt (1)", "reasoning (1)", "weight (1)"]


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


def test_thinking_is_not_eaten(shared, real_tokenizer):
    """Guards R1's template, which drops all text up to </think> from an assistant's turn."""
    tokenizer = real_tokenizer("DeepSeek-R1-Distill-Qwen")
    trace = {"prompt": "2+2?", "response": "<think>\nAdd.\n</think>\n\nIt is \\boxed{4}."}
    example = data.encode_trace(trace, tokenizer, "line 1")
    response = example.tokens[example.prompt_length:].tolist()
    assert tokenizer.decode(response) == trace["response"]
    assert response[0] == tokenizer.vocab["<think>"] and response[-1] == tokenizer.eot_id


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen (2025-02 template)",
                                  "Qwen3-4B-2507-Thinking", "Qwen3"])
def test_thinking_is_opened_once(shared, real_tokenizer, name):
    """Guards <think> twice where the real template opens the thinking and the trace does, too, and
    training on another prompt than the one that generation starts from."""
    tokenizer = real_tokenizer(name)
    for response in ("<think>\nAdd.\n</think>\n\n4", "Add.\n</think>\n\n4"):
        example = data.encode_trace({"prompt": "2+2?", "response": response}, tokenizer, "line 1")
        text = tokenizer.backend.decode(example.tokens, skip_special_tokens=False)
        assert text.count("<think>") == (1 if name != "Qwen3" else response.count("<think>"))
        prompt = tokenizer.encode_prompt([{"role": "user", "content": "2+2?"}])
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


# ------------------------------------------------------------------------------- examples, batches


def toy_examples(tokenizer, count, skip=0.5):
    rng = random.Random(0)
    records = [{**train.toy_trace(rng, skip=skip), "id": i} for i in range(count)]
    return [data.encode_trace(record, tokenizer, "line 1") for record in records]


def test_batch_carries_the_teacher(toy_model, traces):
    """Guards log p of another token, and of the padding: one number for each label, in order."""
    examples, _ = data.load_traces(traces, data.Tokenizer(toy_model), need_logprobs=True)
    batch = data.collate(examples)
    numbers = [x for _, record in data.read_jsonl(traces) for x in record["teacher_logprobs"]]
    assert batch.teacher_logp.tolist() == np.array(numbers, dtype=np.float32).tolist()
    assert len(batch.teacher_logp) == len(batch.labels) == len(batch.positions)
    assert data.collate([example._replace(teacher_logp=None) for example in examples])[3] is None


def test_the_sample_that_is_shown(toy_model):
    """Guards a picture of the mask that is not the mask."""
    tokenizer = data.Tokenizer(toy_model)
    example = data.encode_trace(GOOD, tokenizer, "line 1")
    shown = train.show_example(example, tokenizer)
    assert shown == "<user> 7 a+3 b*4 <assistant>[a=0 b=0 #### 0 <end>]"


def test_order_of_traces(toy_model):
    """Guards epochs that skip or repeat traces, one order for all epochs, and a step whose traces
    depend on how it is cut into micro-batches."""
    examples = toy_examples(data.Tokenizer(toy_model), 24)
    number = {id(example): i for i, example in enumerate(examples)}

    def names(step, batch_size, grad_accum, seed=0):
        micro_batches = data.step_examples(examples, step, batch_size, grad_accum, seed)
        assert [len(batch) for batch in micro_batches] == [batch_size] * grad_accum
        chosen = [example for batch in micro_batches for example in batch]
        lengths = [len(example.tokens) for example in chosen]
        assert lengths == sorted(lengths)  # neighbors in length save padding
        return [number[id(example)] for example in chosen]

    epochs = [[name for step in range(3 * e, 3 * e + 3) for name in names(step, 4, 2)]
              for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
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
    (example,), dropped = data.load_traces(write(tmp_path / "t.jsonl", trace), tokenizer, 64, True)
    assert not dropped and example.teacher_logp.tolist() == [
        np.float32(value) for value in trace["teacher_logprobs"]]
    assert tokenizer.decode(example.tokens[example.prompt_length:].tolist()) == trace["response"]
    assert evaluate.is_correct(trace["response"], trace["answer"])
    for name in ("messages", "tokens", *trace):
        assert f"`{name}`" in data.__doc__ or f'"{name}"' in source
    stored = json.dumps(trace["teacher_logprobs"], separators=(",", ":"))
    assert len(stored) <= 8 * len(trace["teacher_logprobs"])


def test_dropped_traces_are_counted(toy_model, tmp_path):
    """Guards training on wrong, unfinished or cut traces, and dropping them in silence."""
    file = write(tmp_path / "t.jsonl", GOOD, {**GOOD, "correct": False, "finished": True},
                 {**GOOD, "correct": False, "finished": False}, {**GOOD, "correct": True},
                 {**GOOD, "response": "a=0 " * 90}, {"messages": [
                     {"role": "user", "content": "7 a+3"},
                     {"role": "assistant", "content": "a=0"}]})
    examples, dropped = data.load_traces(file, data.Tokenizer(toy_model), 64)
    assert dropped == {"wrong": 1, "unfinished": 1, "longer than 64 tokens": 1}
    assert [len(example.tokens) - example.prompt_length for example in examples] == [5, 5, 2]
    longest = max(len(example.tokens) for example in examples)
    for limit, kept in ((longest, 3), (longest - 1, 1)):  # as long as allowed is not too long
        assert len(data.load_traces(file, data.Tokenizer(toy_model), limit)[0]) == kept


def test_what_is_not_read_is_said(toy_model, tmp_path, capsys):
    """Guards "corect": false, which trains on wrong traces, words that become <unk>, and a field of
    a benchmark with another name: each is named once, with its count."""
    file, tokenizer = tmp_path / "t.jsonl", data.Tokenizer(toy_model)
    write(file, {**GOOD, "corect": False}, {**GOOD, "corect": False, "Answer": "0"},
          {**GOOD, "response": "a=0 what? #### 0 what?"}, {**GOOD, "correct": True, "id": 1})
    examples, _ = data.load_traces(file, tokenizer)
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: not read: corect (2), Answer (1)",
        f"{file}: 2 tokens are words that the tokenizer does not know"]
    assert len(examples) == 4
    write(file, {"question": "q", "answer": "3", "level": 5}, {"question": "q", "answer": "3",
                                                              "level": 5, "prefx": [1]})
    evaluate.load_problems(file)
    assert capsys.readouterr().out == f"{file}: not read: level (2), prefx (1)\n"
    with pytest.raises(BadInput) as error:
        evaluate.load_problems("gsm8kk")
    assert str(error.value) == ("--benchmark gsm8kk: no such file; the benchmarks with a name are "
                                "gsm8k, math, math500, amc23, aime24, aime25, olympiadbench")


def test_traces_beyond_the_context(toy_model, traces, tmp_path, monkeypatch, capsys):
    """Guards training, scores and weights at positions that the model has never seen: such traces
    are dropped and counted by train.py, score, select and weights."""
    shutil.copytree(toy_model, tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 15}))
    lengths = [len(record["prompt"].split()) + len(record["response"].split()) + 3
               for _, record in data.read_jsonl(traces)]  # <user>, <assistant>, <end>
    kept, long = sum(n <= 15 for n in lengths), sum(n > 15 for n in lengths)
    assert kept >= 10 and long > 10
    said = f"{traces}: {kept} traces; dropped: {{'longer than 15 tokens': {long}}}\n"
    monkeypatch.chdir(tmp_path)
    for main, command in ((data.main, "score --teacher m --out s"),
                          (data.main, "select --student m --keep 1 --out s"),
                          (evaluate.main, "weights --student m --out w")):
        main([*command.split(), "--traces", str(traces), "--device", "cpu"])
        assert said in capsys.readouterr().out
        assert (tmp_path / "s").read_text().count("\n") == kept
    assert (tmp_path / "w").read_text().count("mean weight") == 10
    run = train.train(options("m", traces, "run", "--steps", "1"))
    assert run["dropped"] == {"longer than 15 tokens": long} and run["traces"] == kept


@pytest.mark.parametrize("missing", [None, -9999, -9999.0])
def test_traces_without_a_log_probability_are_dropped(toy_model, tmp_path, missing):
    """Guards a training weight from no number: null, or the -9999 that vLLM writes for -inf. Who
    needs no log p(y) keeps the trace; a wrong trace counts as wrong."""
    values = [-1.0, -1.0, missing, -1.0, 0.0]
    file = write(tmp_path / "t.jsonl", {**GOOD, "teacher_logprobs": values},
                 {**GOOD, "teacher_logprobs": [-1.0, -1.0, -1.0, -1.0, 0.0]},
                 {**GOOD, "teacher_logprobs": values, "correct": False})
    tokenizer = data.Tokenizer(toy_model)
    examples, dropped = data.load_traces(file, tokenizer, 64, need_logprobs=True)
    assert dropped == {"with a log-probability of null or below -1000": 1, "wrong": 1}
    assert [example.teacher_logp.tolist() for example in examples] == [[-1, -1, -1, -1, 0]]
    examples, dropped = data.load_traces(file, tokenizer, 64)
    assert len(examples) == 2 and dropped == {"wrong": 1} and examples[0].teacher_logp is None
    with pytest.raises(BadInput, match=r"no usable trace; dropped: .*null or below -1000': 1"):
        file = write(tmp_path / "t.jsonl", {**GOOD, "teacher_logprobs": values})
        data.load_traces(file, tokenizer, 64, need_logprobs=True)


def test_end_of_turn_stops_a_base_model(toy_model, tmp_path):
    """Guards base models (Qwen2.5) whose config names another EOS than their template writes: the
    student would be trained to end with a token that generation does not stop at."""
    shutil.copytree(toy_model, tmp_path / "m")
    make_hf(tmp_path / "m", "qwen2", vocab_size=129, eos_token_id=7)
    model, tokenizer = data.load(tmp_path / "m")
    assert model.eos_token_ids == [tokenizer.vocab["<end>"], 7] == [3, 7]


def test_score_equals_transformers(toy_model, tmp_path, capsys):
    """Guards scoring at the wrong position, in another order, with padding mixed in, or of traces
    that nobody trains on; and what is written must load. Fields that nobody knows are kept."""
    rng = random.Random(1)
    records = [{**train.toy_trace(rng, skip=0.5), "id": i, "level": [i]} for i in range(20)]
    records[7]["response"] = " ".join(["a=0"] * 99)
    records[8]["teacher_logprobs"] = [None]  # to be scored anew
    traces = write(tmp_path / "in.jsonl", *records[:5], {**GOOD, "correct": False}, *records[5:],
                   {**GOOD, "finished": False}, {**GOOD, "correct": False})
    out = tmp_path / "deep" / "out.jsonl"
    data.main(["score", "--traces", str(traces), "--teacher", str(toy_model), "--out", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{traces}: not read: level (20)",
                    f"{traces}: 20 traces; dropped: {{'wrong': 2, 'unfinished': 1}}",
                    f"{out}: 20 traces scored"]
    written = [record for _, record in data.read_jsonl(out)]
    for record, given in zip(written, records, strict=True):
        assert record.pop("teacher") == str(toy_model)
        assert record.pop("vocab") == data.Tokenizer(toy_model).vocab_hash
        assert record.pop("prompt_tokens") == 2 + len(given["prompt"].split())
        assert given | {"teacher_logprobs": record["teacher_logprobs"]} == record
    tokenizer = data.Tokenizer(toy_model)
    examples, dropped = data.load_traces(out, tokenizer, need_logprobs=True)
    assert len(examples) == 20 and not dropped
    theirs = AutoModelForCausalLM.from_pretrained(toy_model)
    for record, example in zip(records, examples, strict=True):
        assert tokenizer.decode(example.tokens.tolist()).endswith(record["response"])
        ids = torch.from_numpy(example.tokens.astype(np.int64))
        logp = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        logp = logp[example.prompt_length - 1:].detach().numpy()
        assert np.abs(example.teacher_logp - logp).max() < 1e-4
    stored = json.dumps(written[7]["teacher_logprobs"], separators=(",", ":"))
    assert len(stored) <= 8.1 * 100  # 8 bytes a token


def test_scores_ignore_rows_that_no_token_has(toy_model, tmp_path):
    """Guards a softmax over the rows that pad the head of a real model (Qwen2.5: 271 of them)."""
    shutil.copytree(toy_model, tmp_path / "m")
    make_hf(tmp_path / "m", "qwen2", vocab_size=160, scale=0.5, tie_word_embeddings=False)
    model, tokenizer = data.load(tmp_path / "m")
    assert model.vocab_size == tokenizer.vocab_size == 129
    example = data.encode_trace(GOOD, tokenizer, "line 1")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.from_numpy(example.tokens.astype(np.int64))
    logp = theirs(ids[None]).logits[0, :-1, :129].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    ours, = data.response_logp(model, [example])
    assert np.abs(ours - logp[example.prompt_length - 1:].detach().numpy()).max() < 1e-4


# ---------------------------------------------------------------------------------------- toy world


def test_toy_traces(toy_model):
    """Guards the rule, the share of multiplications and of skipped values, and that text and tokens
    stand for each other."""
    tokenizer, rng = data.Tokenizer(toy_model), random.Random(0)
    traces = [train.toy_trace(rng, times=0.1, skip=0.6) for _ in range(2000)]
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
    assert 3.8 < steps < 4.1  # a chain of six values, each skipped with 0.6 unless the last was
    assert "<unk>" not in tokenizer.decode(tokenizer.encode(text))


def test_toy_world_opens_in_transformers(tmp_path):
    """Guards a toy world that only this project can read. (Its models are Llamas: for the others,
    transformers takes the family's way of splitting words, whatever tokenizer.json says.)"""
    train.build_toy(tmp_path, seed=0)
    folder = tmp_path / "seed0" / "blank-student"
    theirs, ours = AutoTokenizer.from_pretrained(folder), data.Tokenizer(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == ours.vocab_size
    turns = [{"role": "user", "content": "7 a+3 b*4"}]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == ours.apply_chat_template(turns) == "<user> 7 a+3 b*4 <assistant>"
    assert theirs(text)["input_ids"] == ours.encode_prompt(turns)
    assert theirs.eos_token_id == ours.eot_id == 3


def test_problem_fields(tmp_path, capsys):
    """Guards the field names of the usual benchmarks, numbers and lists as answers, problems
    without an answer, and dropping those with an empty one in silence."""
    rows = [{"question": "q", "answer": "x #### 3"},
            {"problem": "p", "expected_answer": 7.0, "id": "a"},
            {"prompt": "r", "answer": None, "solution": "s"},
            {"question": "u", "final_answer": ["$1$", "$2$"]}]
    expected = [
        {"id": "1", "prompt": "q", "answer": "x #### 3"},
        {"id": "a", "prompt": "p", "answer": "7.0"}, {"id": "3", "prompt": "r", "answer": "s"},
        {"id": "4", "prompt": "u", "answer": "$1$, $2$"}]
    file = tmp_path / "p.jsonl"
    assert evaluate.load_problems(write(file, *rows)) == expected
    assert not capsys.readouterr().out
    empty = [{"prompt": "t", "answer": ""}, {"prompt": "t", "answer": None, "solution": []}]
    assert evaluate.load_problems(write(file, *rows[:2], *empty)) == expected[:2]
    assert capsys.readouterr().out.splitlines() == [
        f"{file} line {k}: dropped, its answer is empty" for k in (3, 4)]


def test_one_place_renders_prompts(toy_model, tmp_path):
    """Guards a system prompt or suffix that is lost between sampling, scoring and training, or
    doubled: the traces of an evaluation are trained on with the very string that was asked."""
    boxed, system = "5\n put it within \\boxed{}.", {"role": "system", "content": "b*3"}
    messages = [[system, {"role": "user", "content": text}] for text in ("1 a+2", boxed)]
    file = write(tmp_path / "p.jsonl", {"prompt": "1 a+2", "answer": "5"},
                 *({"messages": turns, "answer": "5"} for turns in messages))
    problems = evaluate.load_problems(file, "\n \\boxed{}")
    model, tokenizer = data.load(toy_model)
    records = list(evaluate.generate_answers(model, tokenizer, problems, max_new_tokens=3))
    records.sort(key=lambda record: record["id"])
    assert [record["rendered"] for record in records] == [
        "<user> 1 a+2\n \\boxed{} <assistant>", *(
            f"<system> b*3 <user> {text} <assistant>" for text in ("1 a+2\n \\boxed{}", boxed))]
    prompts = [evaluate.encode_problem(problem, tokenizer) for problem in problems]
    for record, prompt in zip(records, prompts, strict=True):
        example = data.encode_trace(record, tokenizer, "line 1")
        assert example.tokens[:example.prompt_length].tolist() == prompt
        assert prompt == tokenizer.encode(record["rendered"])
    again = evaluate.load_problems(write(tmp_path / "a.jsonl", *records), "\n \\boxed{}")
    assert [evaluate.encode_problem(problem, tokenizer) for problem in again] == prompts
    turns = [system, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
             {"role": "user", "content": "3"}]
    file = write(tmp_path / "b.jsonl", {"messages": turns, "answer": "5"})
    for _ in range(2):  # the second time, from what the first one made
        problem, = evaluate.load_problems(file, " Box.")
        assert [turn["content"] for turn in problem["messages"]] == ["b*3", "1", "2", "3 Box."]
        file = write(tmp_path / "c.jsonl", problem)
