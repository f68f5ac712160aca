"""data.py score, select and mix: replies of servers, and the stages of DASD, on made traces."""

import json
import math
import re

import numpy as np
import pytest
import tokenizers
from conftest import make_hf

import data
import evaluate
from model import BadInput

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = "It is 5 caf\u00e9s, \U0001f642 so. Then\n\\boxed{5}!"


def save_tokenizer(folder, words, template=TEMPLATE):
    """A byte-level tokenizer like Qwen's: a token for each byte, and one for each of `words`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {token: i for i, token in enumerate(alphabet)}, []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[:end - 1], word[end - 1]))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
    backend.add_tokens(["<think>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|endoftext|>", "chat_template": template}))
    return data.Tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "student", ["\u0120is", "\u0120the", "\u0120so", "Then"])


def tokens_of(tokenizer):
    """ids of TEXT with its end of turn, their bytes, and log-probabilities."""
    ids = [*tokenizer.encode(TEXT), tokenizer.end]
    split = tokenizer.backend.encode(TEXT, add_special_tokens=False)
    table = {token: byte for byte, token in byte_names().items()}
    pieces = [bytes(table[char] for char in token) for token in split.tokens]
    assert b"".join(pieces) == TEXT.encode() and b"\xc3" in pieces  # half of an e with an accent
    return ids, [*pieces, b"<|im_end|>"], [round(-0.01 * i, 4) for i in range(len(ids))]


def byte_names():
    """{byte: the character that stands for it} of byte-level tokenizers (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def chat(pieces, values, **more):
    """What /v1/chat/completions returns: strings, U+FFFD for parts of characters, and bytes."""
    content = [{"token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": value,
                "top_logprobs": []} for piece, value in zip(pieces, values, strict=True)]
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": TEXT},
            "logprobs": {"content": content}, **more}


def completion(names, values, **more):
    return {"finish_reason": "stop", "text": TEXT, "logprobs": {
        "tokens": names, "token_logprobs": values, "top_logprobs": None,
        "text_offset": [0] * len(names)}, **more}


def replies(tokenizer):
    """name -> a choice of a reply that says TEXT, in each form there is."""
    ids, pieces, values = tokens_of(tokenizer)
    named = [f"token_id:{i}" for i in ids]
    strings = [piece.decode(errors="replace") for piece in pieces]
    prompt = tokenizer.prompt([{"role": "user", "content": "What?"}])
    return {
        "chat": chat(pieces, values),
        "chat, EOS as an empty token": chat([*pieces[:-1], b""], values),
        "chat with token ids": chat(pieces, values, token_ids=ids),
        "chat, tokens named by id": chat([name.encode() for name in named], values),
        "completion with token ids": completion(strings, values, token_ids=ids),
        "completion, tokens named by id": completion(named, values),
        "completion after an echo": completion(
            ["x"] * len(prompt) + named, [None, *[-1.0] * (len(prompt) - 1), *values],
            usage={"prompt_tokens": len(prompt)}, token_ids=ids),
        "vLLM offline": {"finish_reason": "stop", "text": TEXT, "token_ids": ids, "logprobs": [
            {str(i): {"logprob": value, "rank": 1, "decoded_token": "?"},
             "9999": {"logprob": -9.0, "rank": 2, "decoded_token": "!"}}
            for i, value in zip(ids, values, strict=True)]},
        "ended by another EOS": {"finish_reason": "stop", "text": TEXT, "logprobs": [
            {str(i): {"logprob": value}} for i, value in
            zip([*ids[:-1], tokenizer.vocab["<|endoftext|>"]], values, strict=True)],
            "token_ids": [*ids[:-1], tokenizer.vocab["<|endoftext|>"]]},
    }


REPLIES = ["chat", "chat, EOS as an empty token", "chat with token ids", "chat, tokens named by id",
           "completion with token ids", "completion, tokens named by id",
           "completion after an echo", "vLLM offline", "ended by another EOS"]


def score(tmp_path, *records, **options):
    data.write_jsonl(tmp_path / "in.jsonl", records)
    options = {"student": tmp_path / "student", **options}
    data.main(["score", "--traces", str(tmp_path / "in.jsonl"), "--out",
               str(tmp_path / "out.jsonl"),
               *(str(word) for key, value in options.items() for word in (f"--{key}", value))])
    return [record for _, record in data.read_jsonl(tmp_path / "out.jsonl")]


@pytest.mark.parametrize("form", REPLIES)
def test_replies_of_servers(tokenizer, tmp_path, form):
    """Guards each form of log-probabilities: string keys, null first, tokens that are a part of a
    character, an end of turn that is named, empty, or another one. The trace must load, with the
    ids and numbers that the server meant."""
    ids, _, values = tokens_of(tokenizer)
    record, = score(tmp_path, {"id": 7, "prompt": "What?", "answer": "5", "model": "big",
                               "choices": [replies(tokenizer)[form]]})
    assert record["response"] == TEXT and record["teacher"] == "big" and record["answer"] == "5"
    example = data.encode(record, tokenizer, "line 1", teacher=True)
    assert example.tokens[example.prompt:].tolist() == ids
    assert np.allclose(example.p_logp, values)
    assert set(REPLIES) == replies(tokenizer).keys()


def test_openai_does_not_return_the_end_of_turn(tokenizer, tmp_path):
    """Guards a trace that never ends, or one number too few."""
    ids, pieces, values = tokens_of(tokenizer)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    record, = score(tmp_path, {"messages": messages, "choices": [chat(pieces[:-1], values[:-1])]})
    example = data.encode(record, tokenizer, "line 1", teacher=True)
    assert example.tokens[example.prompt:].tolist() == ids and record["messages"] == messages
    assert np.allclose(example.p_logp, [*values[:-1], 0])


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo", "echo by id"])
def test_given_traces_scored_by_a_server(tokenizer, tmp_path, form):
    """Guards the seam: the numbers of the response, not of the prompt before it or of the token
    that max_tokens=1 adds behind it."""
    ids, pieces, values = tokens_of(tokenizer)
    given = {"prompt": "What?", "response": TEXT, "correct": False, "level": 5}
    whole = data.encode(given, tokenizer, "line 1")
    before = whole.tokens[:whole.prompt].tolist()
    numbers = [None, *[-5.0] * (len(before) - 1), *values]
    if form == "prompt_logprobs":
        choice = {}
        given["prompt_logprobs"] = [None, *(
            {"3": {"logprob": -7.0}, str(i): {"logprob": value}}
            for i, value in zip([*before[1:], *ids], numbers[1:], strict=True))]
    else:
        names = ([f"token_id:{i}" for i in [*before, *ids]] if "id" in form else
                 ["x"] * len(before) + [piece.decode("latin1") for piece in pieces])
        choice = completion([*names, "!"], [*numbers, -3.0],
                            usage={"prompt_tokens": len(whole.tokens)})
        if form == "echo":  # completions have no bytes: parts of characters cannot be told
            return expect(tmp_path, {**given, "choices": [choice]}, "other tokens")
    record, = score(tmp_path, {**given, "choices": [choice]})
    assert record["teacher_logprobs"] == values
    given.pop("prompt_logprobs", None)
    assert "prompt_logprobs" not in record  # far more than 8 bytes a token
    assert given.items() <= record.items()
    choice["prompt_logprobs"] = [None, *({"3": {"logprob": -7.0}} for _ in whole.tokens[1:])]
    return expect(tmp_path, {**given, "choices": [choice]}, "no log-probability")


def expect(tmp_path, record, reason):
    with pytest.raises(BadInput, match=rf"in\.jsonl: no trace can be used \(1 {reason[:12]}"):
        score(tmp_path, record)


def test_replies_that_cannot_be_used(tokenizer, tmp_path, capsys):
    """Guards floors taken for log-probabilities, cut-off answers, answers in other tokens (the
    ratio q / p would compare different things); each is named with its line and reason."""
    ids, pieces, values = tokens_of(tokenizer)
    other = save_tokenizer(tmp_path / "other", ["\u0120It", "caf"])
    other_ids = [*other.encode(TEXT), other.end]
    bad = [
        (chat(pieces, [*values[:3], -9999.0, *values[4:]]), r"the floor -9999, at token \[3\]"),
        (chat(pieces, [*values[:3], None, *values[4:]]), r"the floor -9999, at token \[3\]"),
        (chat(pieces, values, finish_reason="length"), "unfinished: finish_reason length"),
        (chat(pieces, values, logprobs=None), "no log-probabilities in a form known here"),
        ({"finish_reason": "stop", "text": TEXT}, "no log-probabilities in a form known here"),
        (chat([b"It is", *pieces[3:]], values[2:]), "other tokens: this tokenizer splits the text"),
        (chat([b"I", b"t ", b"is", *pieces[3:]], values), "other tokens: this tokenizer splits"),
        (chat([b"\xf0", *pieces], [-1.0, *values]), "no log-probabilities in a form known here"),
        (completion([f"token_id:{i}" for i in other_ids], [-1.0] * len(other_ids)), "other tokens"),
        (completion(["token_id:99999"], [-1.0]), "other tokens: ids out of range"),
        (completion([], [], token_ids=ids), "no log-probabilities in a form known here"),
        (chat(pieces, values, token_ids=ids[1:]), "other tokens: its ids do not spell its text"),
    ]
    good = replies(tokenizer)["chat"]
    records = score(tmp_path, *({"id": i, "prompt": "?", "choices": [choice]}
                                for i, (choice, _) in enumerate(bad)),
                    {"id": "ok", "prompt": "?", "choices": [
                        good, {**good, "finish_reason": "length"}]})
    assert [record["id"] for record in records] == ["ok"]
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == len(bad) + 1
    for number, (line, (_, reason)) in enumerate(zip(lines, bad, strict=False), 1):
        assert line.startswith(f"{tmp_path / 'in.jsonl'} line {number}: left out: ")
        assert re.search(reason, line), (line, reason)
    assert "1 traces scored; left out: 2 no log-probability, 2 unfinished" in printed.out
    with pytest.raises(BadInput, match=r"in\.jsonl line 1: no choices, so no server's reply"):
        score(tmp_path, {"prompt": "?", "response": "!"})


def test_two_tokenizers_are_refused(tokenizer, tmp_path):
    """Guards ratios of probabilities of different tokens, and a refusal that does not say what
    still works: SFT does, although the trace holds the other tokenizer's ids."""
    other = save_tokenizer(tmp_path / "teacher", ["caf", "\u0120It", "5"])
    make_hf(tmp_path / "teacher", "qwen2", vocab_size=other.vocab_size)
    given = {"prompt": "What?", "response": TEXT}
    with pytest.raises(BadInput, match=r"two vocabularies; .*--objective sft and `data.py select"):
        score(tmp_path, given, teacher=tmp_path / "teacher")
    ids = other.encode("ca") + other.encode("f\u00e9") + [other.end]
    record = {**given, **data.response_fields(ids, [-1.0] * len(ids), other, finished=True)}
    assert record["response"] == "caf\u00e9" and record["tokens"] == ids
    with pytest.raises(BadInput, match="they do not spell the response; has the teacher another"):
        data.encode(record, tokenizer, "line 1", teacher=True)
    example = data.encode(record, tokenizer, "line 1")
    ids = example.tokens[example.prompt:].tolist()
    assert ids == [*tokenizer.encode("caf\u00e9"), tokenizer.end]


@pytest.mark.parametrize("opened", [True, False])
def test_thinking_that_the_template_opens(tmp_path, opened):
    """Guards <think> twice where both the template and the trace open it, and a lost one."""
    ending = "assistant\n" + "<think>\n" * opened + "{% endif"
    tokenizer = save_tokenizer(tmp_path / "m", [], TEMPLATE.replace("assistant\n{% endif", ending))
    for response in ("<think>\nHm.\n</think>\nSo.", "<think>\n\nHm.\n</think>\nSo."):
        trace = {"prompt": "?", "response": response}
        trace["teacher_logprobs"] = [-1.0] * (len(tokenizer.encode(response)) + 1)
        example = data.encode(trace, tokenizer, "line 1", teacher=True)
        text = tokenizer.decode(example.tokens.tolist())
        assert text == f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{response}"
        assert len(example.p_logp) == len(example.tokens) - example.prompt
    example = data.encode({"prompt": "?", "response": "Hm.\n</think>\nSo."}, tokenizer, "line 1")
    assert tokenizer.decode(example.tokens.tolist()).count("<think>") == opened


# ------------------------------------------------------------------------------------------ DASD


def test_sentences(tokenizer):
    """Guards the geometric mean and where a sentence begins: a point within a number ends none, and
    the end of turn belongs to the last."""
    text = "It is 3.5. \U0001f642 is! Then\nso"
    example = data.encode({"prompt": "?", "response": text}, tokenizer, "line 1")
    pieces = [tokenizer.backend.decode([i], skip_special_tokens=False)
              for i in example.tokens[example.prompt:]]
    logp = -np.arange(1, len(pieces) + 1.0)
    means = data.sentence_means(tokenizer, example, text, logp, r"(?<=[.!?])\s+|\n+")
    firsts = [0, pieces.index("."), pieces.index("!") + 1, pieces.index("\n")]
    dot = [i for i, piece in enumerate(pieces) if piece == "."][1]
    firsts[1] = dot + 1
    expected = [logp[a:b].mean() for a, b in zip(firsts, [*firsts[1:], None], strict=True)]
    assert np.allclose(means, expected) and pieces[-1] == "<|im_end|>"


def test_select(tokenizer, tmp_path, capsys):
    """Guards the direction (teacher's sentences, not the student's), the share that is kept, the
    order, and wrong or unfinished traces among the chosen."""
    make_hf(tmp_path / "student", "qwen2", vocab_size=tokenizer.vocab_size)
    student, _ = data.load(tmp_path / "student")
    records = []
    for i in range(8):
        record = {"id": i, "prompt": "?", "response": f"It is {i}. So it is. Then\nso"}
        example = data.encode(record, tokenizer, "line 1")
        q, = data.response_logp(student, [example], tokenizer.vocab_size)
        # the teacher gives three times as much to each token of the first i % 4 sentences
        more = raised(tokenizer, example, record["response"], i % 4)
        records.append({**record, "teacher_logprobs": (q + more).tolist()})
    records += [{**records[3], "id": 8, "correct": False},
                {**records[3], "id": 9, "finished": False}]
    data.write_jsonl(tmp_path / "in.jsonl", records)
    data.main(["select", "--traces", str(tmp_path / "in.jsonl"), "--student",
               str(tmp_path / "student"), "--out", str(tmp_path / "out.jsonl"), "--keep", "0.5"])
    kept = [record for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
    assert [record["id"] for record in kept] == [2, 3, 6, 7]
    assert [record["teacher_sentences"] for record in kept] == [0.5, 0.75, 0.5, 0.75]
    assert "kept 4 of 8 traces" in (printed := capsys.readouterr().out)
    assert "37.5% before, 62.5% in what is kept" in printed
    data.main(["select", "--traces", str(tmp_path / "in.jsonl"), "--student",
               str(tmp_path / "student"), "--out", str(tmp_path / "out.jsonl"), "--ratio", "4"])
    assert {r["teacher_sentences"] for _, r in data.read_jsonl(tmp_path / "out.jsonl")} == {0.0}


def raised(tokenizer, example, text, count):
    """log 3 for the tokens of the first `count` sentences, else -1."""
    ends = len("It is 0."), len("It is 0. So it is."), len("It is 0. So it is. Then")
    position, found = 0, []
    for i in example.tokens[example.prompt:].tolist():
        sentence = sum(position >= end for end in ends)
        found.append(math.log(3) if sentence < count else -1.0)
        position += len(tokenizer.backend.decode([i])) if i != tokenizer.end else 0
    assert position == len(text)
    return np.array(found)


def test_select_with_another_tokenizer(tokenizer, tmp_path):
    """Guards the promise that whole sentences can be compared where tokens cannot."""
    make_hf(tmp_path / "student", "qwen2", vocab_size=tokenizer.vocab_size)
    other = save_tokenizer(tmp_path / "teacher", ["It", "It\u0120is", "So", "caf"])
    records = []
    for i, sure in enumerate((-9.0, -0.01, -9.0, -0.01)):
        response = f"It is {i}. So it is."
        count = len(other.encode(response)) + 1
        assert count != len(tokenizer.encode(response)) + 1
        records.append({"id": i, "prompt": "?", "response": response,
                        "teacher_logprobs": [sure] * count})
    data.write_jsonl(tmp_path / "in.jsonl", records)
    select = ["select", "--traces", str(tmp_path / "in.jsonl"), "--student",
              str(tmp_path / "student"), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(BadInput, match=r"another tokenizer.*data.py select --teacher"):
        data.main(select)
    data.main([*select, "--teacher", str(tmp_path / "teacher")])
    assert [r["id"] for _, r in data.read_jsonl(tmp_path / "out.jsonl")] == [1, 3]


def test_mix(toy_model, tmp_path, capsys):
    """Guards which answers become problems (cut off, or beyond 1.5 times the teacher's length;
    all only if asked for), prefixes of half or less, and prompts or golds that get lost.
    Then the teacher goes on from there: its answer begins with the prefix, all of it scored."""
    tokenizer = data.Tokenizer(toy_model)
    teacher = [{"id": i, "prompt": f"{i} a+2", "answer": "5", "response": "a=1 b=2 c=3 #### 5",
                "correct": True, "finished": True} for i in range(5)]
    teacher[4]["correct"] = False  # so there is no length to compare with
    long = " ".join(["a=1"] * 12)  # the teacher's has 6 tokens: cut after 9
    answers = [{**teacher[0], "sample": 2, "response": long, "finished": False, "correct": False},
               {**teacher[1], "response": f"{long} #### 5"}, {**teacher[2], "correct": False},
               teacher[3], {**teacher[4], "response": long, "finished": False}]
    for name, records in (("teacher", teacher), ("answers", answers)):
        data.write_jsonl(tmp_path / f"{name}.jsonl", records)
    command = ["mix", "--answers", str(tmp_path / "answers.jsonl"), "--traces",
               str(tmp_path / "teacher.jsonl"), "--student", str(toy_model), "--out",
               str(tmp_path / "out.jsonl"), "--seed"]
    lengths = set()
    for seed in range(20):
        data.main([*command, str(seed)])
        problems = [record for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
        assert [problem["id"] for problem in problems] == ["0/2", "1/0"]
        assert problems[0]["prompt"] == "0 a+2" and problems[0]["answer"] == "5"
        for problem in problems:
            assert set(problem["prefix"]) == {tokenizer.vocab["a=1"]}
            lengths.add(len(problem["prefix"]))
        data.main([*command, str(seed), "--all"])
        everything = [record["prefix"] for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
        assert not any(tokenizer.end in prefix for prefix in everything)
    assert lengths == {5, 6, 7, 8, 9}
    data.main([*command, "0", "--all"])
    problems = data.load_problems(tmp_path / "out.jsonl")
    assert [problem["id"] for problem in problems] == ["0/2", "1/0", "2/0", "3/0"]
    assert tokenizer.end not in problems[2]["prefix"] and len(problems[2]["prefix"]) >= 3

    model, tokenizer = data.load(toy_model)
    for record in evaluate.answers(model, tokenizer, problems, max_new_tokens=4):
        problem = next(p for p in problems if p["id"] == record["id"])
        example = data.encode(record, tokenizer, "line 1", teacher=True)
        written = example.tokens[example.prompt:].tolist()
        assert written[:len(problem["prefix"])] == problem["prefix"]
        assert len(problem["prefix"]) < len(written) <= len(problem["prefix"]) + 4
        logp, = data.response_logp(model, [example], tokenizer.vocab_size)
        assert np.abs(example.p_logp - logp).max() < 2e-4 and "prefix" not in record
    with pytest.raises(BadInput, match="no answer was cut off, so there is nothing to go on from"):
        data.write_jsonl(tmp_path / "answers.jsonl", teacher)
        data.main([*command, "0"])
