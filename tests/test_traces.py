"""data.py: sampled ids as traces and back, thinking, and the stages of DASD, on made traces."""

import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from conftest import make_hf, save_byte_tokenizer

import data
import evaluate
import train
from model import BadInput

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = "It is 5 caf\u00e9s, \U0001f642 so. Then\n\\boxed{5}!"


def save_tokenizer(folder, words, template=TEMPLATE):
    special = "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eom_id|>"
    save_byte_tokenizer(folder, words, special)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|endoftext|>", "chat_template": template}))
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": data.Tokenizer(folder).vocab["<|eom_id|>"]}))
    return data.Tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "student", ["\u0120is", "\u0120the", "\u0120so", "Then"])


# ----------------------------------------------------------------------------- sampled ids and back


def sampled_fields(ids, logp, tokenizer, *more_eos) -> dict:
    """What `evaluate.py accuracy` writes about sampled ids, without the verdict."""
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10 ** 9),
                            eos_token_ids=[tokenizer.eot_id, *more_eos])
    record = evaluate.grade_answer(model, tokenizer, {"id": 1, "prompt": "?", "answer": "5"}, [],
                                   list(ids), logp)
    kept = "response", "finished", "teacher_logprobs", "vocab", "tokens"
    return {key: record[key] for key in kept if key in record}


def sampled(tokenizer, name):
    """Ids as a model may sample them: the name says what is special about them."""
    text, eot = tokenizer.encode(TEXT), tokenizer.eot_id
    single = [tokenizer.vocab[char] for char in "It\u0120is"]  # the text has one token for " is"
    return {"as the text": [*text, eot],
            "another EOS": [*text, tokenizer.vocab["<|endoftext|>"]],
            "other tokens for the text": [*single, *tokenizer.encode(" 5"), eot],
            "a part of a character": [*text[:3], tokenizer.encode("\u00e9")[0], eot],
            "an end of turn within": [*text, eot, *text, eot],
            "cut off": text,
            "cut off within a character": [*text, tokenizer.encode("\u00e9")[0]]}[name]


SAMPLED = ["as the text", "another EOS", "other tokens for the text", "a part of a character",
           "an end of turn within", "cut off", "cut off within a character"]


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_ids_come_back(tokenizer, tmp_path, name):
    """Guards a trace that is not what was sampled: grade_answer, a file, encode_trace. It ends in
    the EOS that was sampled, and each number stays with its token. Only an answer that was cut off
    may lack an end of turn."""
    ids, rng = sampled(tokenizer, name), random.Random(0)
    logp = [-rng.random() * 9 for _ in ids]
    finished = not name.startswith("cut off")
    fields = sampled_fields(ids, np.array(logp, np.float32), tokenizer,
                            tokenizer.vocab["<|endoftext|>"])
    assert ("tokens" in fields) == (name not in ("as the text", "an end of turn within"))
    assert fields["finished"] == finished and not fields["response"].endswith("|>")
    data.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "What?", **fields}])
    (_, record), = data.read_jsonl(tmp_path / "t.jsonl")
    example = data.encode_trace(record, tokenizer, "line 1", need_logprobs=True)
    assert example.tokens[example.prompt_length:].tolist() == ids
    assert np.abs(example.teacher_logp - logp).max() < 1e-4
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "What?"}])
    assert example.tokens[:example.prompt_length].tolist() == prompt
    assert data.drop_reason(record) == ("" if finished else "unfinished")
    del record["finished"]
    if not finished:
        with pytest.raises(BadInput, match=r"line 1: tokens do not spell .* its end of turn"):
            data.encode_trace(record, tokenizer, "line 1")


def test_other_tokens_are_refused(tokenizer, tmp_path):
    """Guards ratios of probabilities of different tokens: the ids must be this tokenizer's, also
    where nobody reads the log-probabilities. Without both, SFT works."""
    other = save_tokenizer(tmp_path / "teacher", ["caf", "\u0120It", "5"])
    ids = [*other.encode("ca"), *other.encode("f\u00e9"), other.eot_id]
    record = {"prompt": "What?", **sampled_fields(ids, [-1.0] * len(ids), other)}
    assert record["response"] == "caf\u00e9" and record["tokens"] == ids
    for need_logprobs in (False, True):
        with pytest.raises(BadInput, match="t line 2: tokens do not spell the response"):
            data.encode_trace(record, tokenizer, "t line 2", need_logprobs)
    del record["tokens"], record["teacher_logprobs"]
    example = data.encode_trace(record, tokenizer, "t line 2")
    ids = example.tokens[example.prompt_length:].tolist()
    assert ids == [*tokenizer.encode("caf\u00e9"), tokenizer.eot_id]


@pytest.mark.parametrize("opened", [True, False])
def test_thinking_that_the_template_opens(tmp_path, opened):
    """Guards <think> twice where both the template and the trace open it, and a lost one."""
    ending = "assistant\n" + "<think>\n" * opened + "{% endif"
    tokenizer = save_tokenizer(tmp_path / "m", [], TEMPLATE.replace("assistant\n{% endif", ending))
    for response in ("<think>\nHm.\n</think>\nSo.", "<think>\n\nHm.\n</think>\nSo."):
        trace = {"prompt": "?", "response": response}
        trace["teacher_logprobs"] = [-1.0] * (len(tokenizer.encode(response)) + 1)
        example = data.encode_trace(trace, tokenizer, "line 1", need_logprobs=True)
        text = tokenizer.decode(example.tokens.tolist())
        assert text == f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{response}"
        assert len(example.teacher_logp) == len(example.tokens) - example.prompt_length
    trace = {"prompt": "?", "response": "Hm.\n</think>\nSo."}
    example = data.encode_trace(trace, tokenizer, "line 1")
    assert tokenizer.decode(example.tokens.tolist()).count("<think>") == opened


THOUGHT = "Add.\n</think>\n\n5"
THINKING_CASES = [  # how the template's prompt ends, a response, is it whole
    ("", "5", True), ("", f"<think>\n{THOUGHT}", True), ("", THOUGHT, False),
    ("", "<think>\nAdd. 5", False), ("", f"<think>\n{THOUGHT}\n</think>", False),
    ("<think>\n", THOUGHT, True), ("<think>\n", f"<think>\n{THOUGHT}", True),
    ("<think>\n", f"\n<think>\n{THOUGHT}", False), ("<think>\n", "Add. 5", False),
    ("<think>\n\n</think>\n\n", "5", True),
    ("<think>\n\n</think>\n\n", f"<think>\n{THOUGHT}", False)]


@pytest.mark.parametrize("ending, response, whole", THINKING_CASES)
def test_thinking_that_does_not_match(tmp_path, ending, response, whole):
    """Guards students that close thinking that they never open, open it twice, or never close it:
    such traces are dropped and counted. A closed block of the template is no thinking."""
    template = TEMPLATE.replace("assistant\n{% endif", f"assistant\n{ending}{{% endif")
    tokenizer = save_tokenizer(tmp_path / "m", [], template)
    data.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "2+3?", "response": response}] * 2 + [
        {"prompt": "2+3?", "response": "Add.\n</think>\n5" if ending == "<think>\n" else "5"}])
    examples, dropped = data.load_traces(tmp_path / "t.jsonl", tokenizer)
    expected = {} if whole else {"with <think> and </think> that do not match": 2}
    assert dropped == expected and len(examples) == 3 - sum(dropped.values())


# ------------------------------------------------------------------- what people really have


DROPPED = [
    ({"finish_reason": "length"}, "unfinished"), ({"truncated": True}, "unfinished"),
    ({"finish_reason": "content_filter"}, "unfinished"), ({"finish_reason": "stop"}, None),
    ({"finish_reason": "length", "finished": True}, None), ({"truncated": False}, None),
    ({"finish_reason": "length", "finished": None}, "unfinished"),
    ({"finish_reason": "STOP"}, None),
    ({"response": "4<|im_end|>\n<|im_start|>user\nThanks"}, "with special tokens in the text"),
    ({"response": "4</s>"}, "with special tokens in the text"),
    ({"messages": None, "reasoning": "high", "parallel_tool_calls": False}, None),
    ({"messages": [{"role": "user", "content": "2+2?", "weight": 0, "train": False}],
      "response": "4"}, None),
    ({"weight": None, "messages": [{"role": "user", "content": "?"},
                                   {"role": "assistant", "content": "4", "weight": 0}]},
     "of weight 0"),
    ({"weight": 0}, "of weight 0"), ({"weight": 1}, None), ({"train": False}, "not to train on"),
    ({"messages": [{"role": "user", "content": "?"},
                   {"role": "assistant", "content": "4", "weight": 0}]}, "of weight 0"),
    ({"messages": [{"role": "user", "content": "?", "weight": 0, "name": "Ann"},
                   {"role": "assistant", "content": "4", "weight": 1}]}, None),
    *[({"teacher_logprobs": [-0.5, value]}, "with a log-probability of null or below -1000")
      for value in (-3.4e38, -1e30, -65504, -9999.0, -math.inf, None)],
    ({"teacher_logprobs": [-0.5, -999.0]}, None)]


@pytest.mark.parametrize("fields, reason", DROPPED)
def test_what_other_tools_say_of_a_trace(tokenizer, tmp_path, capsys, fields, reason):
    """Guards answers that were cut off, turns that are not to be trained on, and a server's minus
    infinity, whose weight would be the largest. A field of a turn that nothing reads is named."""
    good = {"prompt": "2+2?", "response": "4", "teacher_logprobs": [-0.5, -0.5]}
    record = {**good, **fields}
    if fields.get("messages"):
        record = {"teacher_logprobs": good["teacher_logprobs"], **fields}
    if len(record.get("response", "4")) > 1:
        record["tokens"] = None
        record["teacher_logprobs"] = [-0.5] * len(tokenizer.encode_response(record["response"]))
    data.write_jsonl(tmp_path / "t.jsonl", [good, record])
    examples, dropped = data.load_traces(tmp_path / "t.jsonl", tokenizer, need_logprobs=True)
    assert dropped == ({reason: 1} if reason else {}) and len(examples) == 2 - len(dropped)
    named = "not read: messages.name (1)" in capsys.readouterr().out
    assert named == ("Ann" in str(fields))


CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
THINKING = "Two and two make four."


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thinking_blocks",
                                  "reasoning_details", "think", "cot", "deepseek_thinking_traj"
                                  "ectory"])
def test_thinking_in_a_field_of_its_own(tokenizer, name):
    """Guards a student that learns answers without their thinking: it is refused with one line that
    says how to put it into the text, and what this line says is trained on. Empty fields do not
    matter."""
    field = {name: THINKING}
    for record in ({"messages": [CHAT[0], {**CHAT[1], **field}]}, {"messages": CHAT, **field},
                   {"messages": CHAT[:1], "response": "4", **field},
                   {"prompt": "2+2?", "response": "4", **field},
                   {"messages": [CHAT[0], {**CHAT[1], **field}, CHAT[0]], "response": "4"}):
        with pytest.raises(BadInput, match=f"t line 1: {name} would be lost; put it into") as error:
            data.encode_trace(record, tokenizer, "t line 1")
        advice = str(error.value).partition("text: ")[2]
        text = eval(advice, {"thinking": THINKING, "answer": "4"})  # noqa: S307
        assert text == f"<think>\n{THINKING}\n</think>\n\n4"
        example = data.encode_trace({"prompt": "2+2?", "response": text}, tokenizer, "t line 1")
        assert train.show_example(example, tokenizer).endswith(f"[{text}<|im_end|>]")
    for empty in (None, ""):
        record = {"messages": [CHAT[0], {**CHAT[1], name: empty}], name: empty}
        assert data.response_ids(record, tokenizer) == [
            *tokenizer.encode("4"), tokenizer.eot_id]


def test_an_answer_is_not_in_its_prompt(tokenizer):
    """Guards an answer that stands in the prompt and is trained on again; a question is needed, in
    an evaluation, too."""
    for record in ({"messages": CHAT, "response": "4"}, {"messages": CHAT[1:]},
                   {"messages": [*CHAT, CHAT[1]]}):
        with pytest.raises(BadInput, match="t line 1: messages: no question, or an answer that"):
            data.encode_trace(record, tokenizer, "t line 1")
    with pytest.raises(BadInput, match="problem 7: messages: no question, or an answer that"):
        evaluate.encode_problem({"id": 7, "messages": CHAT, "answer": "4"}, tokenizer)
    example = data.encode_trace({"messages": CHAT, "response": None}, tokenizer, "t line 1")
    assert train.show_example(example, tokenizer).endswith("assistant\n[4<|im_end|>]")
    again = [*CHAT, CHAT[0]]  # an earlier answer belongs to the prompt
    example = data.encode_trace({"messages": again, "response": "5"}, tokenizer, "t line 1")
    assert train.show_example(example, tokenizer).count("4<|im_end|>") == 1


SOME_ROLES = TEMPLATE.replace("for m in messages", "for m in messages if m.role in known")


@pytest.mark.parametrize("template", [
    SOME_ROLES, SOME_ROLES.replace("m.content }}", "m.content | trim }}"),
    SOME_ROLES.replace("m.content }}", "m.content.split('</think>')[-1] }}")])
@pytest.mark.parametrize("role", ["developer", "human", "User", "critic"])
def test_turns_that_a_template_drops(tmp_path, template, role):
    """Guards training without the question or the instructions: a template leaves out the roles
    that it does not know. What is the same as another turn, or empty, counts as well; white space
    and the thinking of earlier turns may go."""
    template = "{% set known = ['system', 'user', 'assistant'] %}" + template
    tokenizer = save_tokenizer(tmp_path / "m", [], template)
    lost = {"role": role, "content": "2+2?"}
    for turns in ([lost], [CHAT[0], lost], [lost, CHAT[0]], [*CHAT, {**lost, "content": ""}],
                  [{**lost, "content": "user"}, CHAT[0]]):
        with pytest.raises(BadInput, match=rf"t line 1: .* leaves out the turn of role '{role}'"):
            data.encode_trace({"messages": turns, "response": "4"}, tokenizer, "t line 1")
        with pytest.raises(BadInput, match=rf"problem 5: .* leaves out the turn of role '{role}'"):
            evaluate.encode_problem({"id": 5, "messages": turns, "answer": "4"}, tokenizer)
    turns = [{"role": "system", "content": " Be brief.\n"}, CHAT[0],
             {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n4"}, CHAT[0]]
    example = data.encode_trace({"messages": turns, "response": "4"}, tokenizer, "t line 1")
    shown = train.show_example(example, tokenizer)
    assert shown.count("2+2?") == 2 and "Be brief." in shown and "[turn" not in shown


@pytest.mark.parametrize("name, reason", [("correct", "wrong"), ("finished", "unfinished")])
def test_verdicts_of_spreadsheets(tokenizer, tmp_path, name, reason):
    """Guards wrong traces that are trained on because their verdict is 0 and not false; null is
    unknown, and words are refused."""
    trace, file = {"id": 1, "prompt": "2+2?", "response": "4", "answer": "4"}, tmp_path / "t.jsonl"
    values = [False, 0, 0.0, True, 1, 1.0, None]
    data.write_jsonl(file, [{**trace, name: value} for value in values] + [trace])
    examples, dropped = data.load_traces(file, tokenizer)
    assert len(examples) == 5 and dropped == {reason: 3}
    data.write_jsonl(tmp_path / "right.jsonl", [trace])
    command = ["mix", "--answers", str(file), "--traces", str(tmp_path / "right.jsonl"),
               "--student", str(tmp_path / "student"), "--out", str(tmp_path / "out.jsonl")]
    for value in ("False", "false", "0", "true", "", 2, -1, [], {}, math.nan):
        data.write_jsonl(file, [trace, {**trace, name: value}])
        for read in (lambda: data.load_traces(file, tokenizer), lambda: data.main(command)):
            with pytest.raises(BadInput, match=rf"t\.jsonl line 2: {name} = .*: expected true"):
                read()
    whole = [*tokenizer.encode("4"), tokenizer.eot_id]
    for value in (0, 0.0, False):  # an answer that was cut off has no end of turn
        record = {**trace, "tokens": whole[:-1], "finished": value}
        assert data.response_ids(record, tokenizer) == whole[:-1]
    for value in (1, 1.0, True, None):
        record = {**trace, "tokens": whole, "finished": value}
        assert data.response_ids(record, tokenizer) == whole


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|> \n ", "<|endoftext|>",
                                 "<|im_end|><|im_end|>", "<|im_end|>\n<|endoftext|>\n",
                                 "<|eom_id|>"])
def test_one_end_of_turn(tokenizer, end):
    """Guards two ends of turn in a row, where the text has its own already."""
    expected = [*tokenizer.encode("So 4.\n"), tokenizer.eot_id]
    for record in ({"prompt": "2+2?", "response": f"So 4.\n{end}"},
                   {"messages": [CHAT[0], {**CHAT[1], "content": f"So 4.\n{end}"}]}):
        for more in ({}, {"tokens": expected}):
            example = data.encode_trace({**record, **more}, tokenizer, "t line 1")
            assert example.tokens[example.prompt_length:].tolist() == expected
    twice = [*expected, tokenizer.eot_id]
    for text in ("So 4.\n", "So 4.\n<|im_end|>", "So 4.\n<|im_end|><|im_end|>"):
        with pytest.raises(BadInput, match="t line 1: tokens do not spell the response and its"):
            data.encode_trace({"prompt": "?", "response": text, "tokens": twice}, tokenizer,
                              "t line 1")
    text = "Write <|im_end|> at the end."  # within a text it stays
    assert tokenizer.decode(tokenizer.encode_response(text)) == text


def test_prompts_are_compared(tokenizer):
    """Guards log-probabilities under another prompt, like that of a server without the default
    system prompt: `prompt_tokens`, ids or their number, must be those of the prompt here."""
    trace = {"prompt": "2+2?", "response": "4"}
    prompt = tokenizer.encode_prompt([CHAT[0]])
    for right in (prompt, len(prompt), None):
        data.encode_trace({**trace, "prompt_tokens": right}, tokenizer, "t line 1")
    for wrong, count in ((prompt[1:], len(prompt) - 1), (len(prompt) + 3, len(prompt) + 3),
                         ([*prompt[:-1], 7], len(prompt)), ([], 0), ("x", "x"), (0, 0)):
        said = (rf"the teacher saw {count} tokens, the student's template gives {len(prompt)} or "
                r"other ones: '<\|im_start")
        with pytest.raises(BadInput, match=f"t line 1: prompt_tokens: {said}"):
            data.encode_trace({**trace, "prompt_tokens": wrong}, tokenizer, "t line 1")


def test_records_name_their_tokenizer(tokenizer, tmp_path):
    """Guards another tokenizer's log-probabilities where their number is the same by chance."""
    other = save_tokenizer(tmp_path / "other", ["It"])
    ids = [*other.encode("so 4"), other.eot_id]
    record = {"prompt": "?", **sampled_fields(ids, [-1.0] * len(ids), other)}
    assert len(ids) == len(tokenizer.encode("so 4")) + 1 and "tokens" not in record
    data.encode_trace(record, data.Tokenizer(tmp_path / "other"), "t line 1", need_logprobs=True)
    with pytest.raises(BadInput, match="t line 1: the teacher_logprobs are of another"):
        data.encode_trace(record, tokenizer, "t line 1", need_logprobs=True)
    data.encode_trace(record, tokenizer, "t line 1")  # SFT needs only the text


def test_log_probabilities_that_are_all_zero(tokenizer, tmp_path):
    """Guards weights from a server at temperature 0 that returns processed values: each is exactly
    0. One sure trace among others is fine."""
    zero = {"prompt": "?", "response": "so", "teacher_logprobs": [0.0, -0.0, 0]}
    assert len(tokenizer.encode("so")) == 2
    file = tmp_path / "t.jsonl"
    data.write_jsonl(file, [zero, zero])
    with pytest.raises(BadInput, match=r"t\.jsonl: all teacher_logprobs are 0, .*raw_logprobs"):
        data.load_traces(file, tokenizer, need_logprobs=True)
    assert len(data.load_traces(file, tokenizer)[0]) == 2
    data.write_jsonl(file, [zero, {**zero, "teacher_logprobs": [0.0, -0.0001, 0.0]}])
    assert len(data.load_traces(file, tokenizer, need_logprobs=True)[0]) == 2


# ------------------------------------------------------------------------------------ SentencePiece


def save_sentencepiece(folder, legacy):
    """A tokenizer like Llama 2's: a word mark for each space, and one before a text."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", *"TheIt4isuramno<>|?+2"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("T", "h"), ("Th", "e"), ("\u2581", "The"), ("i", "s"), ("\u2581", "is")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    template = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "legacy": legacy, "chat_template": template}))
    return data.Tokenizer(folder)


@pytest.mark.parametrize("legacy", [True, False])
def test_no_word_mark_behind_a_prompt(tmp_path, legacy):
    """Guards a response whose first token has a word mark that it does not have in the chat as a
    whole. Sampled ids stay as they are, with the mark and without."""
    tokenizer = save_sentencepiece(tmp_path / "m", legacy)
    for text in ("The is", "The", "It is 4", " The", "\nThe", "4\n"):
        example = data.encode_trace({"prompt": "2+2?", "response": text}, tokenizer, "t line 1")
        whole = tokenizer.apply_chat_template(
            [CHAT[0], {"role": "assistant", "content": text}], add_generation_prompt=False)
        expected = tokenizer.encode(whole.removesuffix("\n"))
        assert example.tokens.tolist() == expected and expected[-1] == tokenizer.eot_id
    for first in ("The", "\u2581The"):
        ids = [tokenizer.vocab[first], tokenizer.vocab["\u2581is"], tokenizer.eot_id]
        fields = sampled_fields(ids, [-1.0] * 3, tokenizer)
        assert fields["response"] == "The is" and ("tokens" in fields) == (first != "The")
        assert data.response_ids({"prompt": "?", **fields}, tokenizer) == ids


# ----------------------------------------------------------------------------------- score and DASD


def test_score_takes_the_sampled_ids(tokenizer, tmp_path):
    """Guards scores of the text's tokens where others were sampled. Old numbers are replaced."""
    make_hf(tmp_path / "student", "qwen2", vocab_size=tokenizer.vocab_size)
    ids = sampled(tokenizer, "other tokens for the text")
    fields = sampled_fields(ids, [-9999.0] * len(ids), tokenizer)
    data.write_jsonl(tmp_path / "in.jsonl", [{"prompt": "?", **fields}])
    data.main(["score", "--traces", str(tmp_path / "in.jsonl"), "--teacher",
               str(tmp_path / "student"), "--out", str(tmp_path / "out.jsonl")])
    (example,), _ = data.load_traces(tmp_path / "out.jsonl", tokenizer, need_logprobs=True)
    assert example.tokens[example.prompt_length:].tolist() == ids
    logp, = data.response_logp(data.load(tmp_path / "student")[0], [example])
    assert np.abs(example.teacher_logp - logp).max() < 2e-4


def test_sentences(tokenizer):
    """Guards the geometric mean and where a sentence begins: a point within a number ends none, and
    the end of turn belongs to the last."""
    text = "It is 3.5. \U0001f642 is! Then\nso"
    example = data.encode_trace({"prompt": "?", "response": text}, tokenizer, "line 1")
    pieces = [tokenizer.backend.decode([i], skip_special_tokens=False)
              for i in example.tokens[example.prompt_length:]]
    logp = -np.arange(1, len(pieces) + 1.0)
    means = data.sentence_means(tokenizer, example, logp, re.compile(r"(?<=[.!?])\s+|\n+"))
    firsts = [0, pieces.index("."), pieces.index("!") + 1, pieces.index("\n")]
    dot = [i for i, piece in enumerate(pieces) if piece == "."][1]
    firsts[1] = dot + 1
    expected = [logp[a:b].mean() for a, b in zip(firsts, [*firsts[1:], None], strict=True)]
    assert np.allclose(means, expected) and pieces[-1] == "<|im_end|>"


def test_sentences_of_any_bytes(tokenizer):
    """Guards a model that samples bytes that are no text, and an empty sentence: each token counts
    once."""
    rng, everything = random.Random(0), range(tokenizer.vocab_size)
    for _ in range(200):
        ids = [rng.choice(everything) for _ in range(rng.randint(1, 40))]
        example = data.Example(np.array([0, *ids]), 1)
        logp = np.array([-rng.random() for _ in ids])
        means = data.sentence_means(tokenizer, example, logp, re.compile(r"\s"))
        assert np.isfinite(means).all() and 1 <= len(means) <= len(ids)
        assert logp.min() - 1e-9 <= means.min() <= means.max() <= logp.max() + 1e-9
        whole = data.sentence_means(tokenizer, example, logp, re.compile("(?!)"))
        assert np.allclose(whole, logp.mean())


def test_select_and_reach(tokenizer, tmp_path, capsys):
    """Guards the direction (teacher's sentences, not the student's), the share that is kept, the
    order, and wrong or unfinished traces among the chosen; of `reach`: q / p in place of p / q, a
    mean in place of the worst token, and an end of turn that counts."""
    make_hf(tmp_path / "student", "qwen2", vocab_size=tokenizer.vocab_size)
    student, _ = data.load(tmp_path / "student")
    records = []
    for i in range(8):
        record = {"id": i, "prompt": "?", "response": f"It is {i}. So it is. Then\nso"}
        example = data.encode_trace(record, tokenizer, "line 1")
        q, = data.response_logp(student, [example])
        # the teacher gives three times as much to each token of the first i % 4 sentences
        more = raised(tokenizer, example, record["response"], i % 4)
        records.append({**record, "teacher_logprobs": (q + more).tolist()})
    floor = [*records[3]["teacher_logprobs"][:-1], -9999.0]
    records += [{**records[3], "id": 8, "correct": False},
                {**records[3], "id": 9, "finished": False},
                {**records[3], "id": 10, "teacher_logprobs": floor},
                {**records[3], "id": 11, "teacher_logprobs": [None, *floor[1:]]}]
    data.write_jsonl(tmp_path / "in.jsonl", records)
    command = ["select", "--traces", str(tmp_path / "in.jsonl"), "--student",
               str(tmp_path / "student"), "--out", str(tmp_path / "out.jsonl")]
    data.main(command)
    kept = [record for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
    assert kept == [records[i] for i in (2, 3, 6, 7)]
    printed = capsys.readouterr().out
    assert "8 traces; dropped: {'wrong': 1, 'unfinished': 1, 'with a log-prob" in printed
    assert "null or below -1000': 2}\n" in printed
    assert "out.jsonl: kept 4 of 8 traces\n" in printed
    for share, ids in (("0.25", [3, 7]), ("0.3", [2, 3, 7]), ("1", range(8))):
        data.main([*command, "--keep", share])
        kept = [record["id"] for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
        assert kept == [*ids]
    data.main([*command, "--keep", "0.125", "--separator", r"(?<=\d)[.]"])  # one of two sentences
    kept = [record["id"] for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
    assert kept == [1]
    data.write_jsonl(tmp_path / "in.jsonl", records[8:])
    with pytest.raises(BadInput, match=r"in\.jsonl: no usable trace; dropped: \{'wrong': 1, "):
        data.main(command)
    for record in records:
        record["teacher_logprobs"][-1] = 0.0  # of the end of turn: p / q is in the thousands
    data.write_jsonl(tmp_path / "in.jsonl", records[:8])
    command[0] = "reach"
    for ratio, ids in (("2.9", [0, 4]), ("3.1", range(8))):
        data.main([*command, "--max-ratio", ratio])
        kept = [record["id"] for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
        assert kept == [*ids]
        assert f"out.jsonl: {len(ids)} of 8 traces are in reach\n" in capsys.readouterr().out
    data.write_jsonl(tmp_path / "in.jsonl", records[1:4])
    with pytest.raises(BadInput, match="no trace is in reach; a larger --max-ratio keeps more"):
        data.main([*command, "--max-ratio", "2"])


def raised(tokenizer, example, text, count):
    """log 3 for the tokens of the first `count` sentences, else -1."""
    ends = len("It is 0."), len("It is 0. So it is."), len("It is 0. So it is. Then")
    position, found = 0, []
    for i in example.tokens[example.prompt_length:].tolist():
        sentence = sum(position >= end for end in ends)
        found.append(math.log(3) if sentence < count else -1.0)
        position += len(tokenizer.backend.decode([i])) if i != tokenizer.eot_id else 0
    assert position == len(text)
    return np.array(found)


def test_mix(toy_model, tmp_path, capsys):
    """Guards which answers become problems (cut off, or 1.5 times as long as the teacher's;
    all only if asked for), prefixes of half or less, and prompts or golds that get lost.
    Then the teacher completes them: its answer begins with the prefix, all of it scored."""
    tokenizer = data.Tokenizer(toy_model)
    teacher = [{"id": i, "prompt": f"{i} a+2", "answer": "5", "response": "a=1 b=2 c=3 #### 5",
                "correct": True, "finished": True} for i in range(5)]
    ended = [*tokenizer.encode(teacher[2]["response"]), 1]  # by another EOS
    teacher[4]["correct"] = False  # so there is no length to compare with
    long = " ".join(["a=1"] * 12)  # the teacher's has 6 tokens: cut after 9
    answers = [{**teacher[0], "sample": 2, "response": long, "finished": False, "correct": False},
               {**teacher[1], "response": f"{long} #### 5"}, {**teacher[2], "tokens": ended},
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
        data.main([*command, str(seed), "--continue-all"])
        everything = [record["prefix"] for _, record in data.read_jsonl(tmp_path / "out.jsonl")]
        assert not any(eos in prefix for prefix in everything for eos in (tokenizer.eot_id, 1))
    assert lengths == {5, 6, 7, 8, 9}
    capsys.readouterr()
    data.write_jsonl(tmp_path / "answers.jsonl", [{**record, "corect": 1} for record in answers])
    data.main([*command, "0", "--continue-all"])
    said = capsys.readouterr().out
    assert said.endswith("out.jsonl: 4 of 5 kept, no right trace: 1\n")
    assert "answers.jsonl: not read: corect (5)\n" in said and said.count("not read") == 1
    problems = evaluate.load_problems(tmp_path / "out.jsonl")
    assert [problem["id"] for problem in problems] == ["0/2", "1/0", "2/0", "3/0"]
    assert tokenizer.eot_id not in problems[2]["prefix"] and len(problems[2]["prefix"]) >= 3

    model, tokenizer = data.load(toy_model)
    for record in evaluate.generate_answers(model, tokenizer, problems, max_new_tokens=4):
        problem = next(p for p in problems if p["id"] == record["id"])
        written = data.response_ids(record, tokenizer)
        assert written[:len(problem["prefix"])] == problem["prefix"]
        assert len(problem["prefix"]) < len(written) <= len(problem["prefix"]) + 4
        prompt = tokenizer.encode_prompt([{"role": "user", "content": problem["prompt"]}])
        logp, = data.response_logp(model, [data.Example(np.array(prompt + written), len(prompt))])
        assert np.abs(record["teacher_logprobs"] - logp).max() < 2e-4 and "prefix" not in record
    with pytest.raises(BadInput, match="no answer was cut off; --continue-all takes others, too"):
        unasked = [{**record, "answer": None} for record in teacher]  # a gold that nobody needs
        data.write_jsonl(tmp_path / "answers.jsonl", unasked)
        data.main([*command, "0"])
