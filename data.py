"""Tokenizers, chat templates, traces, benchmarks, batches; `python data.py --help`.

A trace is one line of JSONL, from `evaluate.py accuracy`, `data.py score` or a tool of yours:

>>> trace = {"id": 3, "prompt": "0 a+4 b-2 c-3 d*2 e+3 f*2", "response": "b=2 d=8 f=2 #### 2",
...          "teacher_logprobs": [-0.3878, -0.8581, -0.3085, -0.0, -0.0, 0.0], "answer": "2",
...          "correct": True, "finished": True}

`prompt` is what the user says, or `messages` a list of {"role", "content"}, whose last turn may be
the response. `response` is what the teacher wrote. All else is optional. `teacher_logprobs`
are the teacher's log-probabilities of the response's tokens and of the end-of-turn token behind
them (natural log, temperature 1), `tokens` their ids where the text is not split into just these. A
record with a false `correct` or `finished` is left out of training, and counted. Fields that are
not named here are kept and not read.
"""

import argparse
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jinja2  # comes with torch
import numpy as np
import tokenizers
import torch
from filelock import FileLock, Timeout  # comes with huggingface-hub
from huggingface_hub import constants, errors, utils
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm  # comes with huggingface-hub

from model import BadInput, Config, Transformer, check, fetch, read_json

# ---- Tokenizers and chat templates


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"**"})  # a power can take for ever in one operation

    def call_binop(self, context, operator: str, left, right) -> None:
        raise jinja2.TemplateError(f"{left!r:.20} {operator} {right!r:.20} is not allowed")


TEMPLATES = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols],
                    optimized=False)  # nothing is computed before `limits` holds
TEMPLATES.globals |= {"raise_exception": raise_exception,
                      "strftime_now": lambda form: datetime.now().strftime(form)}
TEMPLATES.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)


@contextmanager
def limits(folder: Path, seconds: float = 2.0, memory: int = 2 ** 28) -> Iterator[None]:
    """A chat template is a stranger's program. Its sandbox keeps it from files and from Python's
    insides; here it is kept from working for ever (not on Windows, and only in the main thread) and
    from taking all memory (only on Linux). Whatever it raises is one error that names its folder.
    """
    def late(number: int, frame) -> None:
        raise TimeoutError(f"works for more than {seconds:g} s")

    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if linux := sys.platform == "linux":
        import resource  # there is none on Windows
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
    try:
        if linux:
            resource.setrlimit(resource.RLIMIT_AS, (
                most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
        if timed:
            handler = signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except Exception as error:
        raise BadInput(f"{folder}: chat template: {type(error).__name__}: {error!s:.300}"
                       ) from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        if linux:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Tokenizer:
    """tokenizer.json, chat template and end-of-turn token of a Hugging Face folder."""

    def __init__(self, path_or_repo: str | Path):
        self.folder = fetch(path_or_repo)
        file, options = self.folder / "tokenizer.json", self.folder / "tokenizer_config.json"
        check(file.exists(), f"{file}: no such file; copy the tokenizer.json of the model there")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises no narrower class
            raise BadInput(f"{file}: not a readable tokenizer: {error}") from error
        self.backend.no_padding()  # some files have padding or truncation baked in
        self.backend.no_truncation()
        self.vocab = self.backend.get_vocab()
        self.vocab_size = max(self.vocab.values(), default=0) + 1  # a head may have more rows
        config = read_json(options) if options.exists() else {}
        if config.get("legacy") is False and "\u2581" in self.vocab:  # Llama 2: a word mark only in
            self.backend.normalizer = None  # front of a text, not behind each special token
            self.backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                prepend_scheme="first", split=False)
        special = {key: value.get("content") if isinstance(value, dict) else value
                   for key, value in config.items() if key.endswith("_token")}
        self.special = {key: value for key, value in special.items() if isinstance(value, str)}
        source, file = config.get("chat_template"), self.folder / "chat_template.jinja"
        with limits(self.folder):
            if isinstance(source, list):  # several templates, each with a name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            source = file.read_text(encoding="utf-8") if file.exists() else source
            self.template = TEMPLATES.from_string(source) if source else None
        self.end = self._end_of_turn()

    def _end_of_turn(self) -> int:
        """The special token that the template puts behind an answer; without one, the EOS."""
        ending = [self.special.get("eos_token", "")]
        if self.template is not None:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
            _, answer, behind = self.render(turns, add_generation_prompt=False).rpartition("ANSWER")
            behind = behind if answer else ""  # a template may have no place for an answer
            ending = self.split(behind).tokens + ending
        special = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        special.discard(self.special.get("unk_token", ""))
        for token in ending:
            if token in special and token in self.vocab:
                return self.vocab[token]
        raise BadInput(f"{self.folder}: no end-of-turn token: neither the chat template nor "
                       "eos_token in tokenizer_config.json names a special token")

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **options) -> str:
        with limits(self.folder):
            text = self.template.render(messages=messages, **self.special, **options,
                                        add_generation_prompt=add_generation_prompt)
        check(len(text) < 10 ** 7, f"{self.folder}: chat template: {len(text):,} characters long")
        return text

    def split(self, text: str, bos: bool = False) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=bos)
        except Exception as error:  # the Rust library raises no narrower class
            raise BadInput(f"{self.folder}/tokenizer.json: {error} ({text!r:.60})") from error

    def encode(self, text: str) -> list[int]:
        return self.split(text).ids

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without the end-of-turn token."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        return self.backend.decode(ids, skip_special_tokens=False)

    def text(self, messages: list[dict]) -> str:
        """What a model is given to answer, as one string; the one place that renders prompts."""
        if self.template is not None:
            return self.render(messages)
        check(len(messages) == 1, f"{self.folder}: has no chat template for several turns")
        return messages[0]["content"]

    def prompt(self, messages: list[dict]) -> list[int]:
        """`text` as tokens. A template writes BOS itself, so it is not added; only text for a model
        without a template gets it from the tokenizer."""
        return self.split(self.text(messages), bos=not self.template).ids


def load(path_or_repo: str | Path, dtype: str = "float32",
         device: str = "cpu") -> tuple[Transformer, Tokenizer]:
    """A model with its tokenizer; it will also stop at the end of turn of the chat template, which
    a base model's config does not name (Qwen2.5: <|endoftext|>, but <|im_end|> in the template)."""
    check(dtype in ("float32", "bfloat16"), f"--dtype {dtype}: must be float32 or bfloat16")
    count = torch.cuda.device_count()
    check(device in ("cpu", *["cuda"][:count], *(f"cuda:{i}" for i in range(count))),
          f"--device {device}: must be cpu or cuda; there are {count} CUDA devices here")
    tokenizer = Tokenizer(path_or_repo)
    model = Transformer.from_pretrained(tokenizer.folder, getattr(torch, dtype), device)
    check(tokenizer.vocab_size <= model.config.vocab_size, f"{path_or_repo}: vocabulary mismatch: "
          f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, the model only "
          f"{model.config.vocab_size} rows; is it another model's tokenizer?")
    model.eos_token_ids = sorted({*model.eos_token_ids, tokenizer.end})
    return model, tokenizer


# ---- Files: read line by line, written whole or not at all, resumed where work was broken off


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("FILE line K", record) for each line that is not blank; or for each entry of a JSON list."""
    number, unit = 1, "line"
    try:
        with open(path, "rb") as file:
            whole = file.read(1) == b"["
            file.seek(0)
            unit = "entry" if whole else "line"
            for number, line in enumerate(json.load(file) if whole else file, 1):
                if whole or line.strip():
                    record = line if whole else json.loads(line)
                    check(isinstance(record, dict), f"{path} {unit} {number}: not a JSON object")
                    if whole or b"\\u" in line:  # half of an emoji is valid JSON, but no text
                        json.dumps(record, ensure_ascii=False).encode()
                    yield f"{path} {unit} {number}", record
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} {unit} {number}: not valid JSON: {error!s:.200}") from None


@contextmanager
def writable(path: str | Path) -> Iterator[None]:
    """What the disk refuses becomes one error that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); what was saved before is whole, and "
                       "the same command with --resume goes on once there is room") from error


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Gives a place beside `path` for a file or a folder, which is moved there once it is whole."""
    temporary = Path(f"{path}.tmp")
    try:
        with writable(path):
            remove(temporary)  # of a killed process
            temporary.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        remove(temporary)


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    with writing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")


def cut_half_line(path: str | Path) -> int:
    """Removes what a killed process was just writing; returns the size of what is left."""
    with open(path, "r+b") as file:
        return file.truncate(file.read().rfind(b"\n") + 1)


def sha256(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def alone(out: str | Path) -> Iterator[None]:
    """Keeps a second process from writing the same file or folder."""
    lock = FileLock(f"{out}.lock", timeout=0)
    with writable(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise BadInput(f"{out}: another process is writing this; wait for it, or choose another "
                       "--out") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove a file that is open
            Path(lock.lock_file).unlink()
        lock.release()


def unchanged(file: Path, was: dict, now: dict) -> None:
    """Refuses to go on with other settings. What is absent, since it is newer, was off."""
    for key, value in now.items():
        same = was[key] == value if key in was else not value
        check(same, f"{file}: cannot resume: {key} was {was.get(key)}, is now {value}; use what it "
              "was, or choose another --out")


@contextmanager
def resumable(out: Path, setup: dict, resume: bool) -> Iterator[tuple[Path, Callable]]:
    """(OUT.part, a function that adds a row to it), for work that goes on where it was broken off.
    Rows carry the setup; another one is refused. By the end of the block OUT must be written."""
    part = Path(f"{out}.part")

    def add(row: dict) -> dict:
        row = {**row, "setup": setup}
        with writable(part), open(part, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row

    with alone(out):
        check(resume or not part.exists(), f"{part}: work was broken off here; add --resume to go "
              "on, or remove the file")
        if part.exists() and not cut_half_line(part):
            part.unlink()
        for file in filter(Path.exists, (out, part) if resume else ()):
            unchanged(file, next(read_jsonl(file), ("", {}))[1].get("setup", setup), setup)
        try:
            yield part, add
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what is finished stands in {part}; the same command with "
                                    "--resume goes on") from None
        part.unlink(missing_ok=True)


# ---- Traces: from a line of JSONL to token ids


def text_field(record: dict, names: Iterable[str], where: str) -> str:
    """The first of these fields that is there; it must be a string with something in it."""
    name = next((name for name in names if name in record), None)
    check(name, f"{where}: no field {' or '.join(names)}; it has {', '.join(record) or 'none'}")
    check(isinstance(record[name], str) and record[name].strip(),
          f"{where}: {name} = {str(record[name])[:40]!r}: expected a string that is not empty")
    return record[name]


def turns(record: dict, where: str) -> list[dict]:
    """The messages of a trace or problem; a plain prompt is what the user says."""
    if "messages" not in record:
        return [{"role": "user", "content": text_field(record, ["prompt"], where)}]
    messages = record["messages"]
    check(isinstance(messages, list) and messages and all(isinstance(turn, dict) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")) for turn in messages),
        f"{where}: messages: not a list of {{role, content}}, each of them text")
    return messages


def conversation(record: dict, where: str) -> tuple[list[dict], str]:
    """(the turns before the response, the response)"""
    messages = turns(record, where)
    if "response" not in record and messages[-1]["role"] == "assistant":
        messages, record = messages[:-1], {"response": messages[-1]["content"]}
    return messages, text_field(record, ["response"], where)


OTHER_TOKENS = ("has the teacher another tokenizer? Then no token has a probability of both; plain "
                "--objective sft and `data.py select --teacher` (whole sentences) still work")


def response_ids(record: dict, response: str, tokenizer: Tokenizer, where: str,
                 exact: bool = False) -> list[int]:
    """The ids that were sampled, if they are this tokenizer's; else how it splits the text."""
    ids, known = record.get("tokens"), range(tokenizer.vocab_size)
    if ids and all(i in known for i in ids) and response in map(tokenizer.decode, (ids, ids[:-1])):
        return ids
    check(not ids or not (exact or any(not isinstance(i, int) for i in ids)), f"{where}: tokens: "
          f"they do not spell the response; {OTHER_TOKENS}")
    return [*tokenizer.encode(response), tokenizer.end]


class Example(NamedTuple):
    """One trace as a student sees it."""

    id: str
    tokens: np.ndarray  # [prompt + response] int32, the end-of-turn token last
    prompt: int  # how many of the tokens are the prompt
    p_logp: np.ndarray | None  # [response] float32, log p of the response's tokens


def encode(record: dict, tokenizer: Tokenizer, where: str, teacher: bool = False) -> Example:
    """Prompt and response are split into tokens apart, then joined: split as one text, the ids at
    the seam may differ, and a student starts from the prompt's. `teacher` asks for log p(y)."""
    messages, response = conversation(record, where)
    prompt = tokenizer.prompt(messages)
    ids = response_ids(record, response, tokenizer, where, teacher)
    think, p_logp = tokenizer.vocab.get("<think>"), record.get("teacher_logprobs")
    if think == ids[0] and think in prompt[-2:]:  # not twice, where the template opens it as well
        prompt = prompt[:prompt.index(think, -2)]
    check(prompt, f"{where}: the prompt becomes no token at all, so nothing predicts the response")
    if teacher:
        check(isinstance(p_logp, list), f"{where}: no list of teacher_logprobs, but this objective "
              "needs log p(y): add them with `python data.py score`, or give --teacher")
        check(len(p_logp) == len(ids), f"{where}: teacher_logprobs: {len(p_logp)} numbers for the "
              f"{len(ids)} tokens of the response, end of turn included; {OTHER_TOKENS}")
        bad = [x for x in p_logp if not isinstance(x, int | float) or not -math.inf < x <= 1e-3]
        check(not bad, f"{where}: teacher_logprobs: {bad[:1]} is not a log-probability")
    name = str(record.get("id", where.rpartition(" ")[2]))
    return Example(name, np.array(prompt + ids, dtype=np.int32), len(prompt),
                   np.array(p_logp, dtype=np.float32) if teacher else None)


def useless(record: dict) -> str:
    """Why a trace is left out: the verdict of `evaluate.py accuracy`, if there is one."""
    if record.get("finished") is False:
        return "unfinished"
    return "wrong" if record.get("correct") is False else ""


class Traces(Sequence):
    """Examples in a temporary file, which goes with its process: what is not in a batch takes only
    24 bytes of memory and its id, so that a file of traces may be larger than the memory."""

    def __init__(self, teacher: bool):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115, open as long as it is used
        self.places = array("q")  # of each: where it begins, its tokens, those of the prompt
        self.ids: list[str] = []
        self.teacher = teacher

    def append(self, example: Example) -> None:
        start = self.file.seek(0, os.SEEK_END)
        self.places.extend((start, len(example.tokens), example.prompt))
        self.ids.append(example.id)
        self.file.write(example.tokens.tobytes() + (
            example.p_logp.tobytes() if self.teacher else b""))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # or IndexError
        start, length, prompt = self.places[3 * i:3 * i + 3]
        self.file.seek(start)
        tokens = np.frombuffer(self.file.read(4 * length), np.int32)
        p_logp = self.file.read(4 * (length - prompt)) if self.teacher else None
        return Example(self.ids[i], tokens, prompt, p_logp and np.frombuffer(p_logp, np.float32))


def load_traces(path: str | Path, tokenizer: Tokenizer, max_length: int, teacher: bool = False,
                ) -> tuple[Traces, Counter]:
    """(usable traces, how many were left out for which reason). A broken record raises; a wrong,
    unfinished or over-long one is counted, and never cut: half a trace teaches not to stop."""
    examples, dropped = Traces(teacher), Counter()
    for where, record in tqdm(read_jsonl(path), desc="reading traces", unit="", disable=None):
        reason = useless(record)
        if not reason:
            example = encode(record, tokenizer, where, teacher)
            reason = f"longer than {max_length} tokens" * (len(example.tokens) > max_length)
        if reason:
            dropped[reason] += 1
        else:
            examples.append(example)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    check(examples, f"{path}: no usable trace ({reasons or 'the file is empty'})")
    return examples, dropped


# ---- Batches


class Batch(NamedTuple):
    """B traces padded on the right to T columns, and the N positions that are supervised."""

    tokens: Tensor  # [B, T]: what the network reads, all but the last token of each trace
    rows: Tensor  # [N]: where it predicts a response token, as indices into B * T
    y: Tensor  # [N]: the token that the teacher wrote there
    p_logp: Tensor | None  # [N]: the teacher's log-probability of it
    ids: list[str]

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(self.tokens.to(device), self.rows.to(device), self.y.to(device),
                     None if self.p_logp is None else self.p_logp.to(device), self.ids)


def collate(examples: list[Example]) -> Batch:
    """The one shift: position t predicts token t + 1. The one mask: `rows`, made from lengths, so a
    padding id that is also the EOS harms nothing. The end-of-turn token is supervised."""
    T = max(len(example.tokens) for example in examples) - 1
    tokens, rows = np.zeros((len(examples), T), dtype=np.int64), []
    for b, example in enumerate(examples):
        tokens[b, :len(example.tokens) - 1] = example.tokens[:-1]
        rows.append(b * T + np.arange(example.prompt - 1, len(example.tokens) - 1))
    y = np.concatenate([example.tokens[example.prompt:] for example in examples]).astype(np.int64)
    known = all(example.p_logp is not None for example in examples)
    p_logp = torch.from_numpy(np.concatenate([e.p_logp for e in examples])) if known else None
    return Batch(torch.from_numpy(tokens), torch.from_numpy(np.concatenate(rows)),
                 torch.from_numpy(y), p_logp, [example.id for example in examples])


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def step_batches(examples: Sequence[Example], step: int, batch_size: int, grad_accum: int,
                 seed: int, rewrite: Callable = lambda examples, first: examples,
                 budget: int | None = None) -> list[Batch]:
    """The micro-batches of optimizer step `step`: the next batch_size * grad_accum traces of an
    endless stream, shuffled anew each epoch. The stream depends on the seed alone, so a resumed run
    reads what an uninterrupted one would. Neighbours in length share a micro-batch, of batch_size
    traces or, with a budget, of at most so many tokens, padding included (one trace at least);
    `rewrite(its examples, number of its first)` may change it."""
    size, count = batch_size * grad_accum, len(examples)
    chosen = [examples[shuffled(count, seed, i // count)[i % count]]
              for i in range(step * size, (step + 1) * size)]
    chosen.sort(key=lambda example: len(example.tokens))
    starts = [0]
    for i, example in enumerate(chosen):
        width = i + 1 - starts[-1]
        if width > batch_size if budget is None else width > 1 and width * len(
                example.tokens) > budget:
            starts.append(i)
    return [collate(rewrite(chosen[i:end], i))
            for i, end in zip(starts, [*starts[1:], size], strict=True)]


def show(example: Example, tokenizer: Tokenizer, color: bool) -> str:
    """The text of one trace, its supervised tokens in green, or in [brackets]."""
    left, right = ("\033[32m", "\033[0m") if color else ("[", "]")
    prompt, *response = [tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in
                         (example.tokens[:example.prompt], *example.tokens[example.prompt:, None])]
    return prompt + "".join(left + token + right for token in response)


# ---- score, select, mix: JSONL in, JSONL out


@torch.no_grad()
def response_logp(model: Transformer, examples: list[Example], vocab_size: int,
                  batch_size: int = 16, chunk: int = 256) -> list[np.ndarray]:
    """The model's fp32 log-probabilities, at temperature 1, of the tokens of each response. Logits
    exist for `chunk` tokens at a time."""
    device, found = model.model.embed_tokens.weight.device, {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    for start in tqdm(range(0, len(order), batch_size), "scoring",
                      disable=len(order) <= 16 * batch_size or None):
        chosen = order[start:start + batch_size]
        batch = collate([examples[i] for i in chosen]).to(device)
        hidden = model(batch.tokens).flatten(0, 1)[batch.rows]  # [N, D]
        logits = (model.logits(rows)[:, :vocab_size].float() for rows in hidden.split(chunk))
        logp = torch.cat([rows.log_softmax(-1).gather(-1, y[:, None])[:, 0]
                          for rows, y in zip(logits, batch.y.split(chunk), strict=True)])
        ends = np.cumsum([len(examples[i].tokens) - examples[i].prompt for i in chosen])
        found |= zip(chosen, np.split(logp.cpu().numpy(), ends[:-1]), strict=True)
    return [found[i] for i in range(len(examples))]


def score(args: argparse.Namespace) -> None:
    """Adds a teacher's log-probabilities to traces: those of a local teacher, or what a server
    returned with them. JSONL in, JSONL out, the same order."""
    check(args.teacher or args.student, "score: give --teacher (a local model) or, for the replies "
          "of a server, --student (its tokenizer must be the teacher's)")
    setup = {key: vars(args)[key] for key in ("teacher", "student", "dtype", "max_length",
                                              "batch_size")}
    with resumable(Path(args.out), {**setup, "traces_sha256": sha256(args.traces)},
                   args.resume) as (part, add):
        # A line of OUT.part is a whole window: a last digit depends on what shares its batch.
        done = sum(1 for _ in read_jsonl(part)) if part.exists() else 0
        if args.teacher:
            teacher, tokenizer = load(args.teacher, args.dtype, args.device)
            check(not args.student or Tokenizer(args.student).vocab == tokenizer.vocab,
                  f"{args.teacher} and {args.student}: two vocabularies; {OTHER_TOKENS}")
            for where, record in read_jsonl(args.traces):
                encode(record, tokenizer, where)  # what is broken is said at once, not after hours
        else:
            tokenizer = Tokenizer(args.student)
        records = iter(tqdm(read_jsonl(args.traces), "scoring", unit=" records", disable=None))
        windows = iter(lambda: list(itertools.islice(records, 16 * args.batch_size)), [])
        for window in itertools.islice(windows, done, None):
            add({"found": scored(window, teacher, tokenizer, args) if args.teacher else
                 [pair for where, record in window for pair in served(record, tokenizer, where)]})
        check(part.exists(), f"{args.traces}: the file is empty")
        dropped = Counter(reason.partition(":")[0] for _, row in read_jsonl(part)
                          for _, reason in row["found"])
        kept = dropped.pop("", 0)
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        if not kept:
            part.unlink()
        check(kept, f"{args.traces}: no trace can be used ({reasons})")
        write_jsonl(args.out, (trace for _, row in read_jsonl(part)
                               for trace, reason in row["found"] if not reason))
    print(f"{args.out}: {kept} traces scored; left out: {reasons}")


def scored(window: list[tuple[str, dict]], teacher: Transformer, tokenizer: Tokenizer,
           args: argparse.Namespace) -> list[tuple[dict, str]]:
    """What `served` gives, by a local teacher: (trace, "") or ({}, why not) for each record."""
    examples = [encode(record, tokenizer, where) for where, record in window]
    fits = [len(example.tokens) <= args.max_length for example in examples]
    found = iter(response_logp(teacher, list(itertools.compress(examples, fits)),
                               tokenizer.vocab_size, args.batch_size))
    return [({**record, "teacher": args.teacher, "teacher_logprobs": short(next(found))}, "")
            if fit else ({}, f"longer than {args.max_length} tokens")
            for (_, record), fit in zip(window, fits, strict=True)]


def short(logp: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in logp]


def response_fields(ids: list[int], logp: Iterable[float], tokenizer: Tokenizer,
                    finished: bool) -> dict:
    """What a record holds of a sampled response: at most 8 bytes a token besides the text, since
    the ids are stored only where they are not what the text would be split into again."""
    text = tokenizer.decode(ids[:-1] if finished else ids)
    same = ids == [*tokenizer.encode(text), tokenizer.end]
    return {"response": text, "finished": finished, **({} if same else {"tokens": ids}),
            "teacher_logprobs": short(logp)}


def served(record: dict, tokenizer: Tokenizer, where: str) -> Iterator[tuple[dict, str]]:
    """(trace, "") or ({}, why it cannot be used) for each choice of a server's reply, which stands
    in one object with its request: {"messages" or "prompt": ..., "choices": [...]}. Known are
    /v1/chat/completions and /v1/completions with logprobs as OpenAI has them, vLLM's ids in either
    (return_token_ids, return_tokens_as_token_ids) and vLLM's offline outputs. With a "response" the
    reply scores it: prompt_logprobs, or an echo, of `encode(record).tokens` as the prompt."""
    check(isinstance(record.get("choices"), list), f"{where}: no choices, so no server's reply; "
          "to score it with a local model give --teacher")
    kept = {key: record[key] for key in record if key not in (
        "choices", "usage", "model", "prompt_logprobs", "prompt_token_ids")}
    given = None
    if "response" in record:
        example = encode(record, tokenizer, where)
        given = example.tokens[example.prompt:].tolist()
    for k, choice in enumerate(record["choices"]):
        try:
            ids, logp = reply_tokens({**record, **choice}, tokenizer, given)
            bad = [t for t, x in enumerate(logp) if x is None or not -9999 < x <= 1e-3]
            check(not bad, f"no log-probability: null or the floor -9999, at token {bad[:1]}")
        except (LookupError, TypeError, ValueError) as error:
            reason = (str(error) if isinstance(error, BadInput) else
                      f"no log-probabilities in a form known here: {error!r:.80}")
            tqdm.write(f"{where}: left out: {reason}", sys.stderr)
            yield {}, reason
            continue
        yield {**kept, "teacher": record.get("model", "a server"), "sample": k, **(
            {"teacher_logprobs": short(logp)} if given else
            response_fields(ids, logp, tokenizer, finished=True))}, ""


def reply_tokens(reply: dict, tokenizer: Tokenizer,
                 given: list[int] | None) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of what a server wrote, the end of turn last; or of the response
    given to it."""
    logprobs, ids = reply.get("logprobs"), None if given else reply.get("token_ids")
    if given and "prompt_logprobs" in reply:
        logprobs, ids = reply["prompt_logprobs"][-len(given):], given
    if isinstance(logprobs, list):  # vLLM: a table {id: {"logprob"}} for each token
        logp = [table.get(str(i), {}).get("logprob")
                for i, table in zip(ids, logprobs, strict=True)]
    else:
        entries = logprobs["content"] if "content" in logprobs else [
            {"token": token, "logprob": value} for token, value in
            zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)]
        prompt = reply.get("usage", {}).get("prompt_tokens")
        if given:  # the end of the echo, without what was generated behind it
            entries = entries[:prompt][-len(given):]
        elif entries[0]["logprob"] is None:  # an echo of the prompt comes first
            entries = entries[prompt:]
        ids, logp = ids or spell(entries, tokenizer), [entry["logprob"] for entry in entries]
    if given:
        check(ids == given, "other tokens: the prompt does not end in the response and its end")
        return ids, logp
    why = reply.get("finish_reason", "stop")
    check(why == "stop", f"unfinished: finish_reason {why}")
    check(all(i in range(tokenizer.vocab_size) for i in ids), "other tokens: ids out of range")
    end, added = 0.0, tokenizer.backend.get_added_tokens_decoder()
    if ids[-1] in added and added[ids[-1]].special:
        ids, logp, end = ids[:-1], logp[:-1], logp[-1]  # else (OpenAI) it was sure enough to stop
    text, said = tokenizer.decode(ids), reply.get("text", reply.get("message", {}).get("content"))
    check(len(ids) == len(logp) and (not said or said.strip() in text or text in said),
          f"other tokens: its ids do not spell its text; {OTHER_TOKENS}")
    return [*ids, tokenizer.end], [*logp, end]


def spell(entries: list[dict], tokenizer: Tokenizer) -> list[int]:
    """The ids of tokens that a server names by id, or by text: then this tokenizer must split the
    text in the same places. A token may be part of a character: bytes are joined, not strings."""
    names = [entry["token"] for entry in entries]
    if all(name.startswith("token_id:") for name in names):
        return [int(name.removeprefix("token_id:")) for name in names]
    pieces = [bytes(entry.get("bytes") or entry["token"].encode()) for entry in entries]
    if not pieces[-1]:  # the end of turn, where special tokens are skipped
        pieces[-1] = tokenizer.backend.id_to_token(tokenizer.end).encode()
    text = b"".join(pieces).decode()
    split = tokenizer.split(text)
    check(len(split.ids) == len(pieces) and all(
        piece in text[slice(*span)].encode() for piece, span in
        zip(pieces, split.offsets, strict=True)), "other tokens: this tokenizer splits the text "
        "elsewhere; vLLM's return_token_ids would tell the ids")
    return split.ids


def sentence_means(tokenizer: Tokenizer, example: Example, text: str, logp: np.ndarray,
                   between: str) -> np.ndarray:
    """Mean log-probability of the tokens that begin in each sentence of a response, [sentences];
    NaN where none does. `between` is a regular expression for what separates two sentences."""
    stream, starts, position = DecodeStream(skip_special_tokens=False), [], 0
    for token in example.tokens[example.prompt:].tolist():
        starts.append(position)
        position += len(stream.step(tokenizer.backend, token) or "")
    ends = [gap.start() for gap in re.finditer(between, text)]
    sentence = np.searchsorted(ends, starts, side="right")
    with np.errstate(invalid="ignore"):
        return (np.bincount(sentence, logp, len(ends) + 1)
                / np.bincount(sentence, minlength=len(ends) + 1))


def select(args: argparse.Namespace) -> None:
    """Divergence-aware sampling (DASD, arXiv 2601.09088): keeps the traces richest in sentences
    whose tokens the teacher finds likelier than the student does, by their geometric mean."""
    check(args.keep <= 1, f"--keep {args.keep}: must be a share, at most 1")
    try:
        re.compile(args.between)
    except re.error as error:
        raise BadInput(f"--between {args.between}: no regular expression: {error}") from error
    student, tokenizer = load(args.student, args.dtype, args.device)
    other = Tokenizer(args.teacher) if args.teacher else tokenizer
    lines = [(where, record) for where, record in read_jsonl(args.traces) if not useless(record)]
    theirs = [encode(record, other, where, teacher=True) for where, record in lines]
    ours = theirs if other is tokenizer else [
        encode(record, tokenizer, where) for where, record in lines]
    found = response_logp(student, ours, tokenizer.vocab_size, args.batch_size)
    for (where, record), his, mine, q_logp in zip(lines, theirs, ours, found, strict=True):
        text = conversation(record, where)[1]
        p, q = (sentence_means(*side, args.between) for side in (
            (other, his, text, his.p_logp), (tokenizer, mine, text, q_logp)))
        both = np.isfinite(p) & np.isfinite(q)
        record["teacher_sentences"] = round(float(np.mean((p - q)[both] > math.log(args.ratio))), 4)
    ranked = sorted(range(len(lines)), key=lambda i: -lines[i][1]["teacher_sentences"])
    kept = sorted(ranked[:math.ceil(args.keep * len(lines))])
    check(kept, f"{args.traces}: no usable trace, or --keep {args.keep:g} keeps none")
    write_jsonl(args.out, (lines[i][1] for i in kept))
    before, after = (np.mean([lines[i][1]["teacher_sentences"] for i in some])
                     for some in (ranked, kept))
    print(f"{args.out}: kept {len(kept)} of {len(lines)} traces; sentences that the teacher finds "
          f"{args.ratio:g} times as likely: {before:.1%} before, {after:.1%} in what is kept")


def mix(args: argparse.Namespace) -> None:
    """Mixed-policy distillation (DASD, arXiv 2601.09088): a student's answers that were cut off, or
    are longer than 1.5 times the teacher's, become problems with a `prefix`: a random part of the
    answer, beyond its half, from which `evaluate.py accuracy --model TEACHER` will go on."""
    tokenizer, rng, lengths = Tokenizer(args.student), random.Random(args.seed), {}
    for where, record in read_jsonl(args.traces):
        if not useless(record):
            ids = response_ids(record, conversation(record, where)[1], tokenizer, where)
            lengths[str(record.get("id"))] = max(len(ids), lengths.get(str(record.get("id")), 0))
    problems, answers = [], list(read_jsonl(args.answers))
    for where, record in answers:
        check("id" in record, f"{where}: no id, so it is not known which problem it answers")
        limit, text = int(1.5 * lengths.get(str(record.get("id")), 0)), record.get("response")
        ids = response_ids(record, text, tokenizer, where)[:limit] if text else []
        cut = record.get("finished") is False or len(ids) == limit
        if ids and (cut or args.all):
            ids = [i for i in ids if i != tokenizer.end]
            problems.append({
                **{key: record[key] for key in ("prompt", "messages") if key in record},
                "id": f"{record['id']}/{record.get('sample', 0)}",
                "answer": text_field(record, ["answer"], where),
                "prefix": ids[:rng.randint(len(ids) // 2 + 1, len(ids))]})
    check(problems, f"{args.answers}: no answer was cut off, so there is nothing to go on from; "
          "--all takes all answers")
    write_jsonl(args.out, problems)
    print(f"{args.out}: {len(problems)} of {len(answers)} answers to go on from, after "
          f"{np.mean([len(problem['prefix']) for problem in problems]):.1f} tokens on average")


# ---- Problems
# The benchmarks that have a name: the Hub's data set; its configuration, or its file where there is
# JSONL; the rows of each split (the first is meant where none is given).
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "main", {"test": 1319, "train": 7473}),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", {"test": 5000, "train": 7500}),
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl", {"test": 500}),
    "amc23": ("math-ai/amc23", "default", {"test": 40}),
    "aime24": ("math-ai/aime24", "default", {"test": 30}),
    "aime25": ("math-ai/aime25", "test.jsonl", {"test": 30}),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", {"train": 674})}
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTIONS = "prompt", "question", "problem"
GOLDS = "answer", "final_answer", "expected_answer", "solution"


def hub_rows(repo: str, config: str, split: str) -> Iterator[dict]:
    """The rows of a data set of the Hub, in order. The client asks again, more and more slowly,
    where the Hub is busy or a connection breaks."""
    def get(url: str, **params):
        reply = utils.http_backoff("GET", url, params=params, headers=utils.build_hf_headers())
        utils.hf_raise_for_status(reply)
        return reply

    if config.endswith(".jsonl"):
        content = get(f"{constants.ENDPOINT}/datasets/{repo}/resolve/main/{config}").content
        yield from map(json.loads, filter(bytes.strip, content.split(b"\n")))
        return
    server = constants.ENDPOINT.replace("https://", "https://datasets-server.")
    offset, total = 0, 1
    while offset < total:  # at most 100 rows a page
        page = get(f"{server}/rows", dataset=repo, config=config, split=split, offset=offset,
                   length=100).json()
        check(page["rows"] and not any(row["truncated_cells"] for row in page["rows"]),
              f"the rows from {offset} on are not whole")
        yield from (row["row"] for row in page["rows"])
        offset, total = offset + len(page["rows"]), page["num_rows_total"]


def download(name: str) -> Path:
    """The JSONL file of a benchmark, like "math" or "math:train", downloaded once."""
    key, _, split = name.partition(":")
    repo, config, splits = BENCHMARKS[key]
    split = split or next(iter(splits))
    check(split in splits, f"--benchmark {name}: the splits of {key} are {', '.join(splits)}")
    file = Path(constants.HF_HUB_CACHE, "benchmarks", f"{key}-{split}.jsonl")
    if not file.exists():
        try:
            rows = list(tqdm(hub_rows(repo, config, split), f"downloading {repo}",
                             splits[split], disable=None))
        except (OSError, ValueError, KeyError, TypeError, errors.HTTPError) as error:
            raise BadInput(f"--benchmark {name}: {repo} cannot be had from the Hub: "
                           f"{error!s:.200}; a JSONL file of yours will do as well") from error
        check(len(rows) == splits[split], f"--benchmark {name}: {repo} has {len(rows)} rows, not "
              f"the {splits[split]} expected: a broken download, or the data set has changed")
        write_jsonl(file, rows)
    return file


def load_problems(benchmark: str | Path, suffix: str | None = None, system: str = "") -> list[dict]:
    """[{"id", "prompt" or "messages", "answer"}] of a benchmark with a name, or of a JSONL or JSON
    file with the usual names for these fields. The suffix (for a name, by default: SUFFIX) follows
    each question that does not ask for a box already; neither it nor the system prompt is doubled.
    What has an empty gold answer is left out."""
    named = str(benchmark).partition(":")[0] in BENCHMARKS and not Path(benchmark).exists()
    suffix, problems, empty = SUFFIX if suffix is None and named else suffix or "", [], 0
    for where, record in read_jsonl(download(str(benchmark)) if named else benchmark):
        golds = [record[name] for name in GOLDS if name in record]
        check(golds, f"{where}: no field {' or '.join(GOLDS)}; it has {', '.join(record)}")
        gold = next((gold for gold in golds if gold not in (None, "", [])), None)
        if gold is None:
            empty += 1
            continue
        check(isinstance(gold, str | int | float | list), f"{where}: answer = {gold!s:.40}: "
              "expected text, a number or a list of these")
        *before, last = turns(record, where) if "messages" in record else [
            {"role": "user", "content": text_field(record, QUESTIONS, where)}]
        text = text_field(last, ["content"], where)
        text += suffix * ("\\boxed" not in text and not text.endswith(suffix))
        if system and not (before and before[0]["role"] == "system"):
            before = [{"role": "system", "content": system}, *before]
        check(not system or before[0]["content"] == system, f"{where}: has a system prompt of its "
              "own, other than --system")
        problems.append({
            "id": record.get("id", where.rpartition(" ")[2]),
            **({"messages": [*before, {**last, "content": text}]} if before else {"prompt": text}),
            "answer": ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold),
            **({"prefix": record["prefix"]} if "prefix" in record else {})})
    check(problems, f"{benchmark}: no problem with an answer")
    if empty:
        print(f"{benchmark}: {empty} problems have no answer, and are left out")
    return problems


# ---- The toy world. A problem is a digit and six operations, all modulo 10; a trace has the value
# after each of them, and then the answer. The teacher often writes only the second value of two: a
# network of one layer must then do two operations at once, which it learns late, if ever.
LETTERS, SIGNS = "abcdef", {"+": operator.add, "-": operator.sub, "*": operator.mul}
TOY_TEMPLATE = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ '<end> ' if m.role == "
                "'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}")


def toy_trace(rng: random.Random, times: float = 1 / 3, skip: float = 0.0) -> dict:
    """One problem and how the rule solves it. `times` is the share of multiplications, `skip` the
    probability of leaving a value out."""
    value, step, written = rng.randrange(10), 0, []
    operations = [("*" if rng.random() < times else rng.choice("+-")) + rng.choice("234")
                  for _ in LETTERS]
    prompt = " ".join([str(value), *map("".join, zip(LETTERS, operations, strict=True))])
    values = [value := SIGNS[one[0]](value, int(one[1])) % 10 for one in operations]
    while step < len(LETTERS):
        step += step + 1 < len(LETTERS) and rng.random() < skip
        written.append(f"{LETTERS[step]}={values[step]}")
        step += 1
    return {"prompt": prompt, "response": " ".join([*written, f"#### {value}"]),
            "answer": str(value)}


def save_toy_tokenizer(folder: Path) -> int:
    """One token for each word of the toy world, as the files of a Hugging Face tokenizer."""
    words = ["<unk>", "<user>", "<assistant>", "<end>", "####", *map(str, range(10)),
             *(letter + sign + k for letter in LETTERS for sign in SIGNS for k in "234"),
             *(f"{letter}={value}" for letter in LETTERS for value in range(10))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:4])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "<unk>",
        "chat_template": TOY_TEMPLATE}))
    return len(words)


def save_toy_model(folder: Path, layers: int, width: int, seed: int) -> None:
    """An untrained Llama with the toy's tokenizer."""
    torch.manual_seed(seed)
    Transformer(Config({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": save_toy_tokenizer(folder), "max_position_embeddings": 64,
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False})).save_pretrained(folder)


def build_toy(root: Path, seed: int) -> None:
    """Untrained models, lessons by the rule, problems to train on and to hold out; what is there is
    left as it is. The seed varies the student, its lessons and the problems, not the teacher."""
    home = root / f"seed{seed}"
    for folder, *sizes in ((root / "blank-teacher", 2, 96, 0),
                           (home / "blank-student", 1, 48, seed + 1)):
        if not (folder / "config.json").exists():
            save_toy_model(folder, *sizes)
    for file, count, kind in ((root / "lessons.jsonl", 30000, {"skip": 0.6}),
                              (root / "held-out.jsonl", 1000, {}),
                              (home / "lessons.jsonl", 8000, {"times": 0.1}),
                              (home / "problems.jsonl", 4000, {})):
        if not file.exists():
            rng = random.Random(str(file.relative_to(root)))
            write_jsonl(file, ({"id": i, **toy_trace(rng, **kind)} for i in range(count)))


# ---- The command line of this file and of evaluate.py


MODEL_OPTIONS = {"--dtype": ("float32", "or bfloat16: of the model"),
                 "--device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")}


def number(kind: type, low: float = 1e-99, high: float = 1e99) -> Callable:
    """A type for argparse: an int or a float within these bounds, by default above 0."""
    def read(text: str) -> int | float:
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text}: must be " + (
            "above 0" if low > 0 else f"from {low} to {high:g}" if high < 1e99 else "0 or more"))
    read.__name__ = kind.__name__  # argparse says "invalid float value"
    return read


def command_line(about: str, commands: dict[Callable, dict], argv: list[str] | None) -> None:
    """`python FILE.py FUNCTION --options`, from {function: {option: (default, help)}}; docstrings
    are help, too. A type instead of a default: required. Without dashes: how many there are."""
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, options in commands.items():
        command = subparsers.add_parser(function.__name__, help=function.__doc__,
                                        description=function.__doc__, allow_abbrev=False)
        command.set_defaults(run=function)
        for name, (default, text) in options.items():
            kind = {"type": str if default is None else type(default), "default": default}
            if isinstance(default, type):
                kind = {"type": default, "required": True}
            elif default is False:
                kind = {"action": "store_true"}
            elif isinstance(default, int | float):
                kind["type"] = number(type(default), 1e-99 if default else 0)
            text += f" (default: {default})" * bool(default and default not in (int, float, str))
            command.add_argument(name, help=text, **kind if name[0] == "-" else {"nargs": default})
    args = parser.parse_args(argv)
    args.run(args)


def one_line_errors(main: Callable, *args, on_signal: Callable = signal.default_int_handler,
                    ) -> None:
    for name in signal.SIGINT, signal.SIGTERM:
        signal.signal(name, on_signal)
    try:
        main(*args)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: the device's memory is full ({error!s:.120}); a smaller "
                         "--batch-size needs less; in train.py, with --grad-accum as much larger, "
                         "the steps stay the same") from None
    except (BadInput, OSError) as error:
        raise SystemExit("error: " + " ".join(str(error).split())) from None
    except KeyboardInterrupt as stop:
        print("interrupted:", *stop.args or ["no work is lost; give the same command again"],
              file=sys.stderr)
        raise SystemExit(130) from None


def main(argv: list[str] | None = None) -> None:
    size = {"--batch-size": (16, "traces at a time")}
    command_line(__doc__.splitlines()[0], {
        score: {
            "--traces": (str, "IN.jsonl: traces, or a server's requests with its replies"),
            "--teacher": ("", "HF folder or Hub name of a local teacher"),
            "--student": ("", "HF folder or Hub name: its tokenizer must be the teacher's"),
            "--out": (str, "OUT.jsonl: traces with teacher_logprobs"), **size,
            "--resume": (False, "go on where it was broken off"),
            "--max-length": (4096, "tokens; longer traces are left out"), **MODEL_OPTIONS},
        select: {
            "--traces": (str, "T.jsonl: traces with teacher_logprobs"),
            "--student": (str, "HF folder or Hub name: the student before training"),
            "--out": (str, "OUT.jsonl: the traces that are kept"),
            "--keep": (0.5, "share of all traces"),
            "--ratio": (2.0, "how much likelier a sentence of the teacher's is"),
            "--between": (r"(?<=[.!?])\s+|\n+", "regular expression: what separates sentences"),
            "--teacher": ("", "the teacher's tokenizer, if it is another"), **size,
            **MODEL_OPTIONS},
        mix: {
            "--answers": (str, "A.jsonl: the student's, from `evaluate.py accuracy`"),
            "--traces": (str, "T.jsonl: the teacher's, to the same problems"),
            "--student": (str, "HF folder or Hub name, for its tokenizer"),
            "--out": (str, "PROBLEMS.jsonl for the teacher's evaluation"),
            "--all": (False, "go on from all answers (where none is cut off)"),
            "--seed": (0, "of the lengths that are kept")}}, argv)


if __name__ == "__main__":
    one_line_errors(main)
