"""Tokenizers, traces and batches; the commands score, reach, select and mix.

A trace is one JSON object per line:

>>> trace = {"id": 3, "prompt": "0 a+4 b-2", "response": "b=2 #### 2", "answer": "2",
...          "teacher_logprobs": [-0.39, -0.31, -0.0, 0.0], "correct": True}

`prompt` is what the user says. `messages`, a list of {"role", "content"}, can replace it
and can end in the response. Optional: `tokens`, the ids of the response and its end of
turn; `teacher_logprobs`, the log-probability of each (natural log, temperature 1);
`prompt_tokens` (ids or their number), which must be those of the student's prompt; `vocab`,
which must be the hash of its tokenizer. A trace with a false `correct`, `finished`, `train`
or `weight` is dropped and counted. Its path: load_traces, encode_trace, step_examples,
[train.resample_on_policy], collate, train.backward, loss.token_losses.
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jinja2  # comes with torch
import numpy as np
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm  # comes with huggingface-hub

import loss
from model import BadInput, Transformer, check, model_folder, read_eos, read_json

# ---- Tokenizer and chat template
# What chat templates write between turns. No text should have it.
MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|eot_id|>",
         "<|eom_id|>", "<|end_of_text|>", "[INST]", "[/INST]", "<start_of_turn>",
         "<end_of_turn>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"]

class Tokenizer:
    """tokenizer.json, chat template and end-of-turn token of a Hugging Face folder."""

    def __init__(self, path_or_repo: str | Path):
        self.folder = model_folder(path_or_repo)
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (self.folder / name).exists():
                config |= read_json(self.folder / name)
        self.backend = read_tokenizer(self.folder / "tokenizer.json", config)
        self.template = read_chat_template(self.folder, config)
        self.special_tokens = {}  # "eos_token" and so on; templates print them
        for key, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                self.special_tokens[key] = content
        self.vocab = self.backend.get_vocab()
        self.vocab_size = max(self.vocab.values()) + 1  # the head may have more
        words = "\n".join(sorted(self.vocab, key=self.vocab.__getitem__))
        self.vocab_hash = hashlib.sha256(words.encode()).hexdigest()[:8]
        self.unknown_id = self.vocab.get(self.special_tokens.get("unk_token"))
        self.eot_id = self.find_end_of_turn()
        eos_id = self.vocab.get(self.special_tokens.get("eos_token"), self.eot_id)
        ends = {self.eot_id, eos_id, *read_eos(self.folder)}
        added = self.backend.get_added_tokens_decoder()
        names = "|".join(re.escape(added[i].content) for i in ends & added.keys())
        self.ends = re.compile(rf"(?:(?:{names})\s*)+\Z")
        special = {i: token.content for i, token in added.items() if token.special}
        self.marks = [*MARKS, *special.values()]
        self.end_ids = ends | special.keys()  # a teacher of the family may use another one

    def find_end_of_turn(self) -> int:
        """The special token that the template writes after an answer, else the EOS."""
        candidates = [self.vocab.get(self.special_tokens.get("eos_token"))]
        if self.template is not None:
            turns = [{"role": "user", "content": "?"},
                     {"role": "assistant", "content": "ANSWER"}]
            with about(self.folder):
                text = self.apply_chat_template(turns, add_generation_prompt=False)
            before, _, after = text.rpartition("ANSWER")
            if before:  # a template may have no place for an answer
                candidates = self.encode(after) + candidates
        for token in candidates:
            if token in self.backend.get_added_tokens_decoder():
                return token
        raise BadInput(f"{self.folder}: no end-of-turn token in the chat template, and no "
                       "eos_token in tokenizer_config.json")

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True,
                            **options: object) -> str:
        """The text that a model is given. Every prompt of the project is rendered here."""
        if self.template is None:
            check(len(messages) == 1, "no chat template for several turns")
            return messages[0]["content"]
        try:
            return self.template.render(messages=messages, **self.special_tokens, **options,
                                        add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadInput(f"chat template: {error!r:.300}") from error

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """Refuses a prompt that lacks a turn: templates drop the roles they do not know."""
        check(messages and messages[-1]["role"] != "assistant", "messages: no question, or "
              "an answer that would be in the prompt; remove it or `response`")
        marked = [{**turn, "content": f"[turn {i}]"} for i, turn in enumerate(messages)]
        rendered = self.apply_chat_template(marked)
        for i, turn in enumerate(messages):
            check(f"[turn {i}]" in rendered, "the chat template leaves out the turn of "
                  f"role {turn['role']!r}; use system, user and assistant")
            mark = self.find_mark(turn["content"])
            check(not mark, f"{mark} in a turn of role {turn['role']}: is it rendered "
                  "already? Give the plain text")
        text = self.apply_chat_template(messages)
        ids = self.encode(text, bos=self.template is None)  # a template writes BOS itself
        if self.template is None and ids[-1:] == [self.eot_id]:  # BERT's way: <s> text </s>
            return ids[:-1]
        return ids

    def find_mark(self, text: str) -> str:
        """The first role, end or other special token in a text; "" if there is none."""
        return next((mark for mark in self.marks if mark in text), "")

    def knows(self, ids: object) -> bool:
        """Is this a list of ids of this tokenizer?"""
        known = range(self.vocab_size)
        return isinstance(ids, list) and all(type(i) is int and i in known for i in ids)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self.backend.encode(text, add_special_tokens=bos).ids

    def encode_response(self, text: str) -> list[int]:
        """The ids of a response and of one end of turn, which some texts have already.
        SentencePiece puts a word mark before a text. After a prompt, there is none."""
        start = "\n" if "\u2581" in self.vocab else ""
        ids = self.encode(start + self.without_end(text))
        return [*ids[len(self.encode(start)):], self.eot_id]

    def without_end(self, text: str) -> str:
        """The text of a response, without the ends of turn that some texts have."""
        return text[:-100] + self.ends.sub("", text[-100:])

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without its end-of-turn token."""
        if ids[-1:] == [self.eot_id]:
            ids = ids[:-1]
        return self.backend.decode(ids, skip_special_tokens=False)

    def pieces(self, ids: Iterable) -> list[str]:
        """What each token adds to the text: "" for a part of a character."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        return [stream.step(self.backend, token) or "" for token in ids]

def load(path_or_repo: str | Path, dtype: str = "float32",
         device: str = "cpu") -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer. The model also stops at the template's end of turn, which
    the config of a base model does not name (Qwen2.5: <|im_end|>)."""
    if device != "cpu":
        index = torch.device(device).index or 0
        check(index < torch.cuda.device_count(), f"--device {device}: no such GPU here")
        torch.cuda.set_device(index)  # where graphs are recorded
    tokenizer = Tokenizer(path_or_repo)
    model = Transformer.from_pretrained(tokenizer.folder, getattr(torch, dtype), device)
    check(tokenizer.vocab_size <= model.vocab_size, f"{path_or_repo}: vocabulary mismatch: "
          f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}")
    model.vocab_size = tokenizer.vocab_size
    model.eos_token_ids = sorted({*model.eos_token_ids, tokenizer.eot_id})
    return model, tokenizer

# ---- Traces
class Example(NamedTuple):
    """A trace as tokens."""
    tokens: np.ndarray  # [prompt + response] int32, the end-of-turn token last
    prompt_length: int
    teacher_logp: np.ndarray | None = None  # [response] float32: log p of each token

def prompt_and_response(record: dict) -> tuple[list[dict], str]:
    messages = get_messages(record)
    if record.get("response") is None and messages[-1]["role"] == "assistant":
        return messages[:-1], text_field(messages[-1], "content")
    return messages, text_field(record, "response")

def response_ids(record: dict, tokenizer: Tokenizer) -> list[int]:
    """The ids of a response, its end of turn last: `tokens`, or else the text's."""
    response = prompt_and_response(record)[1]
    ids = record.get("tokens")
    if ids is None:
        return tokenizer.encode_response(response)
    valid = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
    check(valid, "tokens: expected a list of whole numbers")
    cut_off = record.get("finished") not in (None, True)
    body = ids if cut_off else ids[:-1]
    spelled = None
    if tokenizer.knows(ids):
        spelled = tokenizer.backend.decode(body, skip_special_tokens=False)
    ends = cut_off or (ids[-1] in tokenizer.end_ids and body[-1:] != [tokenizer.eot_id])
    check(ends and spelled in (response, tokenizer.without_end(response)), "tokens do not "
          "spell the response and its end of turn; of another tokenizer? Then remove them "
          "and teacher_logprobs; use --objective sft")
    return ids

def read_logprobs(record: dict, count: int, tokenizer: Tokenizer) -> np.ndarray:
    """`teacher_logprobs`, one for each of `count` response tokens: [count] float32."""
    check(record.get("vocab") in (None, tokenizer.vocab_hash), "the teacher_logprobs are "
          "of another tokenizer's tokens; use --objective sft")
    values = record.get("teacher_logprobs")
    check(values is not None, f"no teacher_logprobs; it has {', '.join(record)}; `python "
          "data.py score` makes them")
    check(isinstance(values, list) and len(values) == count, "teacher_logprobs: expected a "
          f"list of {count} numbers, one for each token and its end, not {values!r:.40}; "
          "`python data.py score` makes them")
    for value in values:
        valid = type(value) in (int, float) and -math.inf < value <= 1e-3
        check(valid, f"teacher_logprobs: {value!r} is not a log-probability: these are "
              "finite and at most 0 (a loss or a probability is above)")
    return np.array(values, dtype=np.float32)

def encode_trace(record: dict, tokenizer: Tokenizer, where: str,
                 need_logprobs: bool = False) -> Example:
    """A trace as tokens. Prompt and response are tokenized separately: in one string,
    tokens can merge across the seam."""
    with about(where):
        prompt = tokenizer.encode_prompt(prompt_and_response(record)[0])
        ids = response_ids(record, tokenizer)
        given = record.get("prompt_tokens")  # the ids of the teacher's, or their number
        count = len(given) if isinstance(given, list) else given
        check(given in (None, len(prompt), prompt), "prompt_tokens: the teacher saw "
              f"{count} tokens, the student's template gives {len(prompt)} or other ones: "
              f"{tokenizer.decode(prompt)!r:.200}. Another system prompt, or a date?")
        think = tokenizer.vocab.get("<think>")
        if ids[0] == think and think in prompt[-2:]:  # the template opens the thinking, too
            prompt = prompt[:prompt.index(think, -2)]
        check(prompt, "the prompt has no token, so nothing predicts the response")
        logp = None
        if need_logprobs:
            logp = read_logprobs(record, len(ids), tokenizer)
    return Example(np.array(prompt + ids, dtype=np.int32), len(prompt), logp)

def load_traces(path: str | Path, tokenizer: Tokenizer, max_length: float = math.inf,
                need_logprobs: bool = False,
                records: list | None = None) -> tuple[list[Example], Counter]:
    """The usable traces, and counts of the dropped ones by reason; `records` gets their
    lines. A long trace is not cut: half a trace teaches the student not to stop."""
    examples, dropped, unread, unknown = [], Counter(), Counter(), 0
    for where, record in progress(read_jsonl(path), "reading traces"):
        with about(where):
            reason = drop_reason(record, need_logprobs)
        unread.update(unread_fields(record, TRACE_FIELDS))
        if not reason:
            example = encode_trace(record, tokenizer, where, need_logprobs)
            if len(example.tokens) > max_length:
                reason = f"longer than {max_length} tokens"
            else:
                reason = text_reason(record, example, tokenizer)
        if reason:
            dropped[reason] += 1
            continue
        unknown += np.sum(example.tokens == tokenizer.unknown_id)
        examples.append(example)
        if records is not None:
            records.append(record)
    print_unread(path, unread)
    if unknown:
        print(f"{path}: {unknown} tokens are words that the tokenizer does not know")
    check(examples, f"{path}: no usable trace; dropped: {dict(dropped) or 'none'}")
    check(not need_logprobs or any(example.teacher_logp.any() for example in examples),
          f"{path}: all teacher_logprobs are 0, as processed at temperature 0; ask for raw "
          "ones (vLLM: logprobs_mode raw_logprobs), or use `python data.py score`")
    return examples, dropped

# ---- Batches
class Batch(NamedTuple):
    """B traces, padded on the right to T columns, and their N supervised positions."""
    tokens: Tensor  # [B, T]: what the model reads, all but the last token of each trace
    positions: Tensor  # [N]: where it predicts a response token, as indices into B * T
    labels: Tensor  # [N]: the token that the teacher wrote there
    teacher_logp: Tensor | None = None  # [N]: log p of that token

@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)

def step_examples(examples: list[Example], step: int, batch_size: int, grad_accum: int,
                  seed: int) -> list[list[Example]]:
    """The micro-batches of one optimizer step. The seed alone decides the order, so a
    resumed run reads the same. Neighbors in length share a micro-batch to save padding."""
    size = batch_size * grad_accum
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, position = divmod(i, len(examples))
        order = shuffled(len(examples), seed, epoch)
        chosen.append(examples[order[position]])
    chosen.sort(key=lambda example: len(example.tokens))
    return [chosen[i:i + batch_size] for i in range(0, size, batch_size)]

def collate(examples: list[Example], device: str = "cpu") -> Batch:
    """Supervise response tokens only, the end of turn included. Position t predicts token
    t + 1, so positions begin at the last prompt token. Lengths make the mask, not ids."""
    T = max(len(example.tokens) for example in examples) - 1
    tokens = np.zeros((len(examples), T), dtype=np.int64)
    positions, labels, logps = [], [], []
    for row, example in enumerate(examples):
        length, start = len(example.tokens), example.prompt_length
        tokens[row, :length - 1] = example.tokens[:-1]
        positions.append(row * T + np.arange(start - 1, length - 1))
        labels.append(example.tokens[start:].astype(np.int64))
        logps.append(example.teacher_logp)
    arrays = [tokens, np.concatenate(positions), np.concatenate(labels)]
    if logps[0] is not None:
        arrays.append(np.concatenate(logps))
    return Batch(*[torch.from_numpy(array).to(device) for array in arrays])

# ---- The commands score, reach, select and mix
def map_rows(function: Callable, *rows: Tensor) -> Tensor:
    """`function` of N rows, 256 at a time, since it makes logits, which are V wide."""
    parts = zip(*(tensor.split(256) for tensor in rows), strict=True)
    return torch.cat([function(*part) for part in parts])

@torch.no_grad()
def response_logp(model: Transformer, examples: list, batch_size: int = 16) -> list:
    """fp32 log-probabilities, at temperature 1, of the tokens of each response."""
    def row_logp(hidden: Tensor, labels: Tensor) -> Tensor:
        return -loss.sft(model.logits(hidden), labels)

    device = model.model.embed_tokens.weight.device
    lengths = [len(example.tokens) for example in examples]
    order = np.argsort(lengths, kind="stable")
    results: list = [None] * len(examples)
    for start in progress(range(0, len(order), batch_size), "scoring"):
        chosen = order[start:start + batch_size]
        batch = collate([examples[i] for i in chosen], device)
        hidden = model(batch.tokens).flatten(0, 1)[batch.positions]  # [N, D]
        logp = map_rows(row_logp, hidden, batch.labels).cpu().numpy()
        for i in chosen:
            length = len(examples[i].tokens) - examples[i].prompt_length
            results[i], logp = logp[:length], logp[length:]
            check(np.isfinite(results[i]).all(), f"{model.folder}: NaN or infinity among "
                  "the log-probabilities; try --dtype float32, or other weights")
    return results

def load_scored(path_or_repo: str, args: argparse.Namespace, need_logprobs: bool,
                count: int | None = None) -> tuple:
    """Tokenizer, records, examples, and a model's log-probabilities of the responses; of
    all usable traces in --traces, or of the first `count`."""
    model, tokenizer = load(path_or_repo, compute_dtype(args, path_or_repo), args.device)
    records: list = []
    examples, dropped = load_traces(args.traces, tokenizer, need_logprobs=need_logprobs,
                                    max_length=model.config.max_position_embeddings,
                                    records=records)
    print(f"{args.traces}: {len(records)} traces; dropped: {dict(dropped) or 'none'}")
    examples = examples[:count]
    return tokenizer, records[:count], examples, response_logp(model, examples)

def score(args: argparse.Namespace) -> None:
    """Add a local teacher's log-probabilities to traces."""
    tokenizer, records, _, logps = load_scored(args.teacher, args, False)
    for record, logp in zip(records, logps, strict=True):
        record["teacher"] = args.teacher
        record["teacher_logprobs"] = round_logp(logp)
        record["vocab"] = tokenizer.vocab_hash
        turns, _ = prompt_and_response(record)
        record.setdefault("prompt_tokens", len(tokenizer.encode_prompt(turns)))
    write_jsonl(args.out, records)
    print(f"{args.out}: {len(records)} traces scored")

def round_logp(logp: Iterable) -> list[float]:
    return [round(float(value), 4) for value in logp]

def sentence_means(tokenizer: Tokenizer, example: Example, logp: np.ndarray,
                   separator: re.Pattern) -> np.ndarray:
    """Mean log-probability of the tokens that begin in each sentence: [sentences]."""
    text, starts = "", []
    for piece in tokenizer.pieces(example.tokens[example.prompt_length:]):
        starts.append(len(text))
        text += piece
    ends = [gap.start() for gap in separator.finditer(text)]
    sentence = np.searchsorted(ends, starts, side="right")
    count = np.bincount(sentence)
    return np.bincount(sentence, logp)[count > 0] / count[count > 0]

def reach(args: argparse.Namespace) -> None:
    """Keep the traces in reach of the student: the teacher finds no token of theirs more
    than --max-ratio times as likely as the student does, apart from the end of turn."""
    _, records, examples, logps = load_scored(args.student, args, True)
    kept = []
    for record, example, q_logp in zip(records, examples, logps, strict=True):
        log_ratio = (example.teacher_logp - q_logp)[:-1]  # without the end of turn
        if log_ratio.max(initial=0) <= math.log(args.max_ratio):
            kept.append(record)
    check(kept, f"{args.traces}: no trace is in reach; a larger --max-ratio keeps more")
    write_jsonl(args.out, kept)
    print(f"{args.out}: {len(kept)} of {len(records)} traces are in reach")

def select(args: argparse.Namespace) -> None:
    """DASD's divergence-aware sampling (arXiv 2601.09088): keep the traces with the largest
    share of sentences whose tokens the teacher finds, on average, at least twice as likely
    as the student does."""
    tokenizer, records, examples, logps = load_scored(args.student, args, True)
    shares = []
    for example, q_logp in zip(examples, logps, strict=True):
        p = sentence_means(tokenizer, example, example.teacher_logp, args.separator)
        q = sentence_means(tokenizer, example, q_logp, args.separator)
        shares.append(np.mean(p - q > math.log(2)))
    ranked = sorted(range(len(shares)), key=lambda i: -shares[i])
    count = math.ceil(args.keep * len(ranked))
    kept = sorted(ranked[:count])
    write_jsonl(args.out, [records[i] for i in kept])
    print(f"{args.out}: kept {len(kept)} of {len(records)} traces")

def mix(args: argparse.Namespace) -> None:
    """DASD's mixed-policy distillation (arXiv 2601.09088): student answers that were cut
    off or are 1.5 times as long as the teacher's become problems: the teacher completes a
    `prefix` that ends at a random point in the second half."""
    tokenizer, rng = Tokenizer(args.student), random.Random(args.seed)
    traces = list(read_jsonl(args.traces))
    answers = list(read_jsonl(args.answers))
    for where, record in traces + answers:
        check("id" in record, f"{where}: no id, so its problem is unknown")
    longest = Counter()  # problem: tokens of the teacher's longest right answer
    for where, record in traces:
        with about(where):
            if not drop_reason(record):
                name, ids = str(record["id"]), response_ids(record, tokenizer)
                longest[name] = max(longest[name], len(ids))
    problems = []
    for where, record in answers:
        name, ids = str(record["id"]), []
        limit = int(1.5 * longest[name])
        with about(where):
            if record.get("response") != "":
                ids = response_ids(record, tokenizer)[:limit]
            cut_off = drop_reason(record) == "unfinished" or len(ids) == limit
            if not ids or not (cut_off or args.continue_all):
                continue
            answer = text_field(record, "answer")
        if not cut_off or ids[-1] == tokenizer.eot_id:  # drop the end of turn
            ids = ids[:-1]
        end = rng.randint(len(ids) // 2 + 1, len(ids))
        asked = {key: record[key] for key in ("prompt", "messages") if key in record}
        problems.append({"id": f"{name}/{record.get('sample', 0)}", **asked,
                         "answer": answer, "prefix": ids[:end]})
    for path, records in ((args.traces, traces), (args.answers, answers)):
        unread = Counter()
        for _, record in records:
            unread.update(unread_fields(record, TRACE_FIELDS))
        print_unread(path, unread)
    check(problems, f"{args.answers}: no answer was cut off; --continue-all takes others, "
          "too")
    write_jsonl(args.out, problems)
    missing = sum(str(record["id"]) not in longest for _, record in answers)
    print(f"{args.out}: {len(problems)} of {len(answers)} kept, no right trace: {missing}")

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Commands that read and write JSONL.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (score, reach, select, mix):
        add = add_command(commands, function)
        model = "--teacher" if function is score else "--student"
        add(model, required=True, help="HF folder or Hub name")
        add("--traces", required=True, help="T.jsonl: the teacher's traces")
        if function is mix:
            add("--answers", required=True, help="A.jsonl: the student's answers")
        add("--out", type=output, required=True, help="OUT.jsonl")
        if function is mix:
            add("--continue-all", action="store_true", help="continue short answers, too")
            add("--seed", type=bounded(int, 0), default=0, help="of where prefixes end")
        else:
            add_model_options(add)
        if function is reach:
            add("--max-ratio", type=bounded(float, 1), default=1000,
                help="largest p / q of a token")
        if function is select:
            add("--keep", type=bounded(float, 1e-9, 1), default=0.5,
                help="share of the traces")
            add("--separator", type=re.compile, default=r"(?<=[.!?])\s+|\n+",
                help="regular expression between sentences")
    args = parser.parse_args(argv)
    args.run(args)

# ---- Files and command lines, for the three programs
# How files that are not JSONL begin.
FORMATS = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"[": "a JSON array"}

def no_duplicates(pairs: list[tuple]) -> dict:
    """A JSON object. Of two values for one key, json.loads would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key twice among {', '.join(key for key, _ in pairs)}")
    return found

def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE line K", record) for each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, hint = f"{path} line {number}", ""
            for start, name in FORMATS.items():
                if number == 1 and line.startswith(start):
                    hint = f"; this is {name}, not an object on each line"
            try:
                record = json.loads(line, object_pairs_hook=no_duplicates)
                json.dumps(record, ensure_ascii=False).encode()  # no half of an emoji
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: not valid JSON: {error!s:.200}{hint}") from error
            check(isinstance(record, dict), f"{where}: not a JSON object{hint}")
            yield where, record

@contextmanager
def about(where: str | Path) -> Iterator[None]:
    """Bad input that is found in here is reported with its place, as in "FILE line K"."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error

def print_unread(path: str | Path, unread: Counter) -> None:
    """Say which fields nothing reads: "corect" may be a slip."""
    if unread:
        names = [f"{name} ({count})" for name, count in unread.most_common()]
        print(f"{path}: not read: {', '.join(names)}")

@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path for a file or folder; move it to `path` once it is whole."""
    target = Path(path).resolve()  # a link stays a link
    temporary = Path(f"{target}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}). Older files are whole; mend "
                       "that and run the command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)

def write_lines(path: Path, records: Iterable[dict], mode: str = "w") -> None:
    with open(path, mode, encoding="utf-8") as file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
            file.write(line + "\n")

def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    with atomic_write(path) as temporary:
        write_lines(temporary, records)

def cut_half_line(path: Path) -> None:
    """Remove the last line if a killed process did not finish it."""
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)

def check_same_settings(file: Path, before: dict, now: dict) -> None:
    """Raise if a setting differs from the saved run."""
    for key, value in now.items():
        change = f"{key} was {before.get(key)}, is now {value}"
        if key.endswith("_sha256"):
            change = f"other {key.removesuffix('_sha256')} than before"
        check(before.get(key) == value, f"{file}: cannot resume: {change}")

# A hash of each file, as it was when this process began: edited code is run again.
CODE = {}
for _name in ("model.py", "data.py", "loss.py", "train.py", "evaluate.py"):
    _text = Path(__file__).with_name(_name).read_bytes()
    CODE[_name] = hashlib.sha256(_text).hexdigest()[:8]

def edited(before: dict, *names: str) -> str:
    """Which of these files are not as they were: "loss.py, train.py", or ""."""
    return ", ".join(name for name in names if before.get(name) != CODE[name])

def bounded(kind: type, low: float, high: float = math.inf) -> Callable:
    """A type for argparse: an int or a float from low to high."""
    def number(text: str) -> float:
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to {high:g}")
    return number

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one."""
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} (default: %(default)s)"

def output(text: str) -> str:
    """A type for argparse: a path that can become a file or a folder."""
    path = Path(text)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a file")
    return text

def add_command(commands: argparse._SubParsersAction, function: Callable) -> Callable:
    """A command named like its function, with its docstring; returns its add_argument."""
    docstring = inspect.getdoc(function)
    command = commands.add_parser(function.__name__, help=docstring, description=docstring,
                                  formatter_class=HelpFormatter)
    command.set_defaults(run=function)
    return command.add_argument

def device_name(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d)?", text):
        return text
    raise argparse.ArgumentTypeError(f"{text}: only cpu, cuda and cuda:1 are implemented")

def add_model_options(add: Callable) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_name, default=device, help="cpu, cuda or cuda:1")
    add("--dtype", choices=["float32", "bfloat16"], help="of the computation (default: "
        "float32 on a CPU; on a GPU, bfloat16 to train and the model's own to run it)")

def compute_dtype(args: argparse.Namespace, model: str = "") -> str:
    """--dtype or its default. bfloat16 would round most of a short training at 1e-5 away,
    so a student, saved in float32, runs in float32."""
    if args.dtype or args.device == "cpu":
        return args.dtype or "float32"
    if not model:
        return "bfloat16"
    config = read_json(model_folder(model) / "config.json")
    own = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if own == "bfloat16" else "float32"

def run_command(main: Callable, after_interrupt: str = "") -> None:
    """Run a program. Bad input and interrupts become one line, not a traceback."""
    sys.stdout = sys.stdout or io.StringIO()  # it was closed
    sys.stderr = sys.stderr or sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit("error: out of memory; a smaller --batch-size (train.py: with a larger "
                 f"--grad-accum) or shorter texts need less; {error!s:.120}")
    except (BadInput, OSError, SafetensorError, re.error) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {after_interrupt or 'nothing was written'}")

def progress(items: Iterable, name: str) -> tqdm:
    """A bar on a terminal; elsewhere, a line a minute, and the last one not twice."""
    if sys.stderr.isatty():
        return tqdm(items, name, delay=1)
    form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go\n"
    return tqdm(items, name, bar_format=form, delay=60, mininterval=60, leave=False)

# ---- Records of strangers: what is refused, dropped or only named
TRACE_FIELDS = {"id", "prompt", "messages", "response", "answer", "tokens", "prompt_tokens",
                "teacher_logprobs", "vocab", "finished", "correct", "teacher",
                "temperature", "sample", "rendered", "extracted", "setup", "weight",
                "train", "truncated", "finish_reason"}
TURN_FIELDS = {"role", "content", "weight", "train", "truncated", "finish_reason"}
# Fields of a record or a turn that nothing reads, though they change the prompt, or hold a
# part of the response.
OF_THE_PROMPT = re.compile(
    r"enable_thinking|chat_template_kwargs|sys(tem)?(_?(prompt|message))?|tools|functions|"
    r"\w+_calls?|(image|audio|video)s?(_?urls?)?|documents|choices|options|context")
THINKING = re.compile(
    r"(?i)(\w+_)?(think(ing)?|reasoning|thoughts?|cot)(_?(content|details|blocks|text|"
    r"output|traces?|process|steps|trajector(y|ies)))?")

def text_field(record: dict, *names: str) -> str:
    """The first of these fields that is not null. It must be text, and not empty."""
    text = next((record[name] for name in names if record.get(name) is not None), None)
    check(isinstance(text, str) and text.strip(), f"{' or '.join(names)} = "
          f"{str(text)[:40]!r}: expected text; the fields here: {', '.join(record)}")
    return text

def get_messages(record: dict) -> list:
    """The turns of a trace or a problem. A plain prompt is one user turn."""
    turns = record.get("messages")
    if turns is None:
        for field, name in (("conversations", "ShareGPT"), ("instruction", "Alpaca")):
            check(field not in record or "prompt" in record,
                  f"{name} format; write `messages` or `prompt` instead")
        turns = [{"role": "user", "content": text_field(record, "prompt")}]
    check(isinstance(turns, list) and turns, "messages: not a list of turns")
    for turn in turns:
        valid = isinstance(turn, dict) and isinstance(turn.get("role"), str)
        check(valid and isinstance(turn.get("content"), str),
              "messages: expected turns with role and content, both text")
        check_fields(turn)
    check_fields(record)
    return turns

def check_fields(fields: dict, thinking: bool = True) -> None:
    """Refuse what would be lost. Numbers, single words and empty values are no loss."""
    for name, value in fields.items():
        if (value or name == "enable_thinking") and type(value) not in (int, float):
            check(not OF_THE_PROMPT.fullmatch(name), f"{name} would be lost; write it into "
                  "the text of the prompt, or remove it")
        words = str(value).split()
        some_text = isinstance(value, list | dict) or len(words) > 1
        if thinking and value and some_text:
            check(not THINKING.fullmatch(name), f"{name} would be lost; put it into the "
                  'text: "<think>\\n" + thinking + "\\n</think>\\n\\n" + answer')

def unread_fields(record: dict, known: set) -> list[str]:
    """The fields of a record and of its turns that nothing reads."""
    names = list(record.keys() - known)
    turns = record.get("messages") or []
    if turns and "prompt" in record:
        names.append("prompt")
    for turn in turns:
        names += [f"messages.{name}" for name in turn.keys() - TURN_FIELDS]
    return names

DROPPED = {"finished": "unfinished", "correct": "wrong", "train": "not to train on",
           "weight": "of weight 0"}
STOPPED = ["stop", "eos", "eos_token", "end_turn", "stop_sequence", "completed", "finished"]

def drop_reason(record: dict, need_logprobs: bool = False) -> str:
    """Why a trace is dropped; "" if it is usable."""
    sources = [record]
    last = get_messages(record)[-1]
    if last["role"] == "assistant":
        sources.append(last)
    for fields in sources:
        for name in (*DROPPED, "truncated"):
            value = fields.get(name)  # spreadsheets write 0 and 1; null is unknown
            check(value in (None, False, True), f"{name} = {value!r}: expected true or "
                  "false")
            if value == 0 and name in DROPPED:
                return DROPPED[name]
        stopped = str(fields.get("finish_reason") or "stop").lower() in STOPPED
        if record.get("finished") is None and (fields.get("truncated") or not stopped):
            return DROPPED["finished"]
    values = record.get("teacher_logprobs") if need_logprobs else None
    for value in values if isinstance(values, list) else []:
        if value is None or (type(value) in (int, float) and value < -1000):
            return "with a log-probability of null or below -1000"  # servers' -infinity
    return ""

def text_reason(record: dict, example: Example, tokenizer: Tokenizer) -> str:
    """Why the text of a response would teach the student a wrong form; "" if it would not.
    Thinking that it, or the template just before, opens must be closed once."""
    response = tokenizer.without_end(prompt_and_response(record)[1])
    prompt = example.tokens[:example.prompt_length].tolist()
    before = tokenizer.decode(prompt[-16:])
    opened = re.search(r"(<think>\s*(</think>\s*)?)?\Z", before)[0]
    thinking = re.findall("</?think>", opened + response)
    if thinking not in ([], ["<think>", "</think>"]):
        return "with <think> and </think> that do not match"
    marked = tokenizer.find_mark(response) or response.endswith("</s>")
    return "with special tokens in the text" if marked else ""

# ---- Tokenizer files of strangers
def read_tokenizer(file: Path, config: dict) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises no narrower class
        raise BadInput(f"{file}: missing, or not a tokenizer: {error}") from error
    backend.no_padding()  # some files have padding or truncation baked in
    backend.no_truncation()
    split = backend.pre_tokenizer
    byte_level = isinstance(split, tokenizers.pre_tokenizers.ByteLevel)
    check(not (byte_level and split.add_prefix_space), f"{file}: add_prefix_space is not "
          "implemented")
    if config.get("legacy") is False and "\u2581" in backend.get_vocab():
        # Llama 2 puts a word mark before a text, not after each special token.
        backend.normalizer = None
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False)
    return backend

def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

# Chat templates come from strangers. This sandbox, the one of transformers, keeps them from
# files and from Python's internals, but not from running forever.
TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
# Llama 3's template prints a date. It is always its default, so a prompt stays the same.
TEMPLATES.globals.update(raise_exception=raise_exception, tools=None, documents=None,
                         strftime_now=datetime(2024, 7, 26).strftime)
TEMPLATES.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's is for HTML

def read_chat_template(folder: Path, config: dict) -> jinja2.Template | None:
    source, file = config.get("chat_template"), folder / "chat_template.jinja"
    try:
        if file.exists():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # several templates, each with a name
            source = {entry["name"]: entry["template"] for entry in source}["default"]
        if not source:
            return None
        # Training templates mark what an assistant says by {% generation %}.
        source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
        source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
        return TEMPLATES.from_string(source)
    except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: chat template: {error!s:.300}") from error

if __name__ == "__main__":
    run_command(main)
