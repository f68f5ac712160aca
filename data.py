"""Tokenizers, chat templates, traces, batches and problems; `python data.py score --help`.

A trace is one line of a JSONL file, written by `evaluate.py accuracy` or by any tool of yours:

>>> trace = {"id": "17", "prompt": "7 a+3 b*4", "response": "a=0 b=0 #### 0", "answer": "0",
...          "teacher_logprobs": [-0.9163, -0.0001, 0.0, 0.0, 0.0], "correct": True}

`prompt` is what the user says, or `messages` a list of {"role", "content"}, whose last turn may be
the response. `response` is what the teacher wrote. All else is optional. `teacher_logprobs`
are the teacher's log-probabilities of the response's tokens and of the end-of-turn token behind
them (natural log, temperature 1), `tokens` their ids where the text is not split into just these. A
record with a false `correct` or `finished` is left out of training, and counted.
"""

import argparse
import json
import math
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jinja2  # comes with torch
import numpy as np
import tokenizers
import torch
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from tqdm import tqdm  # comes with huggingface-hub

from model import BadInput, Config, Transformer, check, fetch, read_json


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[loopcontrols])
TEMPLATES.globals |= {"raise_exception": raise_exception,
                      "strftime_now": lambda form: datetime.now().strftime(form)}
TEMPLATES.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)


class Tokenizer:
    """tokenizer.json, chat template and end-of-turn token of a Hugging Face folder."""

    def __init__(self, path_or_repo: str | Path):
        self.folder = fetch(path_or_repo)
        file, config = self.folder / "tokenizer.json", self.folder / "tokenizer_config.json"
        check(file.exists(), f"{file}: no such file; copy the tokenizer.json of the model there")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises no narrower class
            raise BadInput(f"{file}: not a readable tokenizer: {error}") from error
        self.backend.no_padding()  # some files have padding or truncation baked in
        self.backend.no_truncation()
        self.vocab = self.backend.get_vocab()
        self.vocab_size = max(self.vocab.values()) + 1  # a model's head may have more rows
        config = read_json(config) if config.exists() else {}
        if config.get("legacy") is False and "\u2581" in self.vocab:  # Llama 2: a word mark only in
            self.backend.normalizer = None  # front of a text, not behind each special token
            self.backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                prepend_scheme="first", split=False)
        special = {key: value["content"] if isinstance(value, dict) else value
                   for key, value in config.items() if key.endswith("_token")}
        self.special = {key: value for key, value in special.items() if isinstance(value, str)}
        source, file = config.get("chat_template"), self.folder / "chat_template.jinja"
        if isinstance(source, list):  # several templates, each with a name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        source = file.read_text(encoding="utf-8") if file.exists() else source
        try:
            self.template = TEMPLATES.from_string(source) if source else None
        except jinja2.TemplateError as error:
            raise BadInput(f"{self.folder}: chat template: {error}") from error
        self.end = self._end_of_turn()

    def _end_of_turn(self) -> int:
        """The special token that the template puts behind an answer; without one, the EOS."""
        ending = [self.special.get("eos_token", "")]
        if self.template is not None:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
            written = self.render(turns, add_generation_prompt=False).rpartition("ANSWER")[2]
            ending = self.backend.encode(written, add_special_tokens=False).tokens + ending
        special = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        for token in ending:
            if token in special and token in self.vocab:
                return self.vocab[token]
        raise BadInput(f"{self.folder}: no end-of-turn token: neither the chat template nor "
                       "eos_token in tokenizer_config.json names a special token")

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **options) -> str:
        try:
            return self.template.render(messages=messages, **self.special, **options,
                                        add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadInput(f"{self.folder}: chat template: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without the end-of-turn token."""
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        return self.backend.decode(ids, skip_special_tokens=False)

    def prompt(self, messages: list[dict]) -> list[int]:
        """Rendered with the generation prompt. The template writes BOS itself, so it is not added;
        only text for a model without a template gets it from the tokenizer."""
        if self.template is not None:
            return self.encode(self.render(messages))
        check(len(messages) == 1, f"{self.folder}: has no chat template for several turns")
        return self.backend.encode(messages[0]["content"]).ids


def load(path_or_repo: str | Path, dtype: str = "float32",
         device: str = "cpu") -> tuple[Transformer, Tokenizer]:
    """A model with its tokenizer; it will also stop at the end of turn of the chat template, which
    a base model's config does not name (Qwen2.5: <|endoftext|>, but <|im_end|> in the template)."""
    check(dtype in ("float32", "bfloat16"), f"--dtype {dtype}: must be float32 or bfloat16")
    tokenizer = Tokenizer(path_or_repo)
    model = Transformer.from_pretrained(tokenizer.folder, getattr(torch, dtype), device)
    check(tokenizer.vocab_size <= model.config.vocab_size, f"{path_or_repo}: vocabulary mismatch: "
          f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, the model only "
          f"{model.config.vocab_size} rows; is it another model's tokenizer?")
    model.eos_token_ids = sorted({*model.eos_token_ids, tokenizer.end})
    return model, tokenizer


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("FILE line K", record) for each line that is not blank."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    check(isinstance(record, dict), f"{path} line {number}: not a JSON object")
                    yield f"{path} line {number}", record
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} line {number}: not valid JSON: {error}") from None


def text_field(record: dict, names: Iterable[str], where: str) -> str:
    """The first of these fields that is there; it must be a string with something in it."""
    name = next((name for name in names if name in record), None)
    check(name, f"{where}: no field {' or '.join(names)}; it has {', '.join(record) or 'none'}")
    check(isinstance(record[name], str) and record[name].strip(),
          f"{where}: {name} = {str(record[name])[:40]!r}: expected a string that is not empty")
    return record[name]


def conversation(record: dict, where: str) -> tuple[list[dict], str]:
    """(the turns before the response, the response)"""
    turns = record.get("messages")
    if turns is None:
        turns = [{"role": "user", "content": text_field(record, ["prompt"], where)}]
    check(isinstance(turns, list) and turns and all(isinstance(turn, dict) and {"role", "content"}
          <= turn.keys() for turn in turns), f"{where}: messages: not a list of {{role, content}}")
    if "response" not in record and turns[-1]["role"] == "assistant":
        turns, record = turns[:-1], {"response": turns[-1]["content"]}
    return turns, text_field(record, ["response"], where)


class Example(NamedTuple):
    """One trace as a student sees it; 8 bytes a token in memory."""

    id: str
    tokens: np.ndarray  # [prompt + response] int32, the end-of-turn token last
    prompt: int  # how many of the tokens are the prompt
    p_logp: np.ndarray | None  # [response] float32, log p of the response's tokens


def encode(record: dict, tokenizer: Tokenizer, where: str, teacher: bool = False) -> Example:
    """Prompt and response are split into tokens apart, then joined: split as one text, the ids at
    the seam may differ, and a student starts from the prompt's. `teacher` asks for log p(y)."""
    turns, response = conversation(record, where)
    prompt, p_logp = tokenizer.prompt(turns), record.get("teacher_logprobs") if teacher else None
    ids = record.get("tokens") or [*tokenizer.encode(response), tokenizer.end]
    check(prompt, f"{where}: the prompt becomes no token at all, so nothing predicts the response")
    check(all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids),
          f"{where}: tokens: not ids of the tokenizer in {tokenizer.folder}")
    if teacher:
        check(isinstance(p_logp, list), f"{where}: no list of teacher_logprobs, but this objective "
              "needs log p(y): add them with `python data.py score`, or give --teacher")
        check(len(p_logp) == len(ids), f"{where}: teacher_logprobs: {len(p_logp)} numbers for the "
              f"{len(ids)} tokens of the response, end of turn included; has the teacher another "
              "tokenizer? The objective sft needs none of them")
        bad = [x for x in p_logp if not isinstance(x, int | float) or not -math.inf < x <= 1e-3]
        check(not bad, f"{where}: teacher_logprobs: {bad[:1]} is not a log-probability")
        p_logp = np.array(p_logp, dtype=np.float32)
    name = str(record.get("id", where.rpartition(" ")[2]))
    return Example(name, np.array(prompt + ids, dtype=np.int32), len(prompt), p_logp)


def load_traces(path: str | Path, tokenizer: Tokenizer, max_length: int, teacher: bool = False,
                ) -> tuple[list[Example], Counter]:
    """(usable traces, how many were left out for which reason). A broken record raises; a wrong,
    unfinished or over-long one is counted, and never cut: half a trace teaches not to stop."""
    examples, dropped = [], Counter()
    for where, record in tqdm(read_jsonl(path), desc="reading traces", unit="", disable=None):
        if record.get("correct") is False or record.get("finished") is False:
            dropped["wrong" if record.get("finished", True) else "unfinished"] += 1
            continue
        example = encode(record, tokenizer, where, teacher)
        if len(example.tokens) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
        else:
            examples.append(example)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    check(examples, f"{path}: no usable trace ({reasons or 'the file is empty'})")
    return examples, dropped


class Batch(NamedTuple):
    """B traces padded on the right to T columns, and the N positions that are supervised."""

    tokens: Tensor  # [B, T]: what the network reads, all but the last token of each trace
    rows: Tensor  # [N]: where it predicts a response token, as indices into B * T
    y: Tensor  # [N]: the token that the teacher wrote there
    p_logp: Tensor | None  # [N]: the teacher's log-probability of it
    ids: list[str]

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


def collate(examples: list[Example]) -> Batch:
    """The one shift: position t predicts token t + 1. The one mask: `rows`, made from lengths, so a
    padding id that is also the EOS harms nothing. The end-of-turn token is supervised."""
    T = max(len(example.tokens) for example in examples) - 1
    tokens, rows = np.zeros((len(examples), T), dtype=np.int64), []
    for b, example in enumerate(examples):
        tokens[b, :len(example.tokens) - 1] = example.tokens[:-1]
        rows.append(b * T + np.arange(example.prompt - 1, len(example.tokens) - 1))
    y = np.concatenate([example.tokens[example.prompt:] for example in examples])
    known = all(example.p_logp is not None for example in examples)
    p_logp = np.concatenate([example.p_logp for example in examples]) if known else None
    return Batch(*(x if x is None else torch.from_numpy(x) for x in (
        tokens, np.concatenate(rows), y.astype(np.int64), p_logp)), [e.id for e in examples])


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def step_batches(examples: list[Example], step: int, batch_size: int, grad_accum: int,
                 seed: int) -> list[Batch]:
    """The micro-batches of optimizer step `step`: the next batch_size * grad_accum traces of an
    endless stream, shuffled anew each epoch. The stream depends on the seed alone, so a resumed run
    reads what an uninterrupted one would. Neighbours in length share a micro-batch."""
    size, count = batch_size * grad_accum, len(examples)
    chosen = [examples[shuffled(count, seed, i // count)[i % count]]
              for i in range(step * size, (step + 1) * size)]
    chosen.sort(key=lambda example: len(example.tokens))
    return [collate(chosen[i:i + batch_size]) for i in range(0, size, batch_size)]


def show(example: Example, tokenizer: Tokenizer, color: bool) -> str:
    """The text of one trace, its supervised tokens in green, or in [brackets]."""
    left, right = ("\033[32m", "\033[0m") if color else ("[", "]")
    prompt, *response = [tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in
                         (example.tokens[:example.prompt], *example.tokens[example.prompt:, None])]
    return prompt + "".join(left + token + right for token in response)


@torch.no_grad()
def response_logp(model: Transformer, batch: Batch, vocab_size: int, chunk: int = 256) -> Tensor:
    """The model's log-probability of each supervised token, [N] fp32, at temperature 1."""
    hidden = model(batch.tokens).flatten(0, 1)[batch.rows]  # [N, D]
    logits = (model.logits(rows)[:, :vocab_size].float() for rows in hidden.split(chunk))
    return torch.cat([rows.log_softmax(-1).gather(-1, y[:, None])[:, 0]
                      for rows, y in zip(logits, batch.y.split(chunk), strict=True)])


def score(args: argparse.Namespace) -> None:
    """Adds a local teacher's log-probabilities to traces; JSONL in, JSONL out, the same order."""
    teacher, tokenizer = load(args.teacher, args.dtype, args.device)
    records = list(read_jsonl(args.traces))
    examples = [encode(record, tokenizer, where) for where, record in records]
    fits = [i for i, example in enumerate(examples) if len(example.tokens) <= args.max_length]
    fits.sort(key=lambda i: len(examples[i].tokens))
    for start in tqdm(range(0, len(fits), args.batch_size), desc="scoring", disable=None):
        chosen = fits[start:start + args.batch_size]
        batch = collate([examples[i] for i in chosen]).to(args.device)
        lengths = [len(examples[i].tokens) - examples[i].prompt for i in chosen]
        p_logp = response_logp(teacher, batch, tokenizer.vocab_size).cpu().split(lengths)
        for i, values in zip(chosen, p_logp, strict=True):
            records[i][1].update(teacher=str(args.teacher), teacher_logprobs=[
                round(value, 4) for value in values.tolist()])
    write_jsonl(args.out, (records[i][1] for i in sorted(fits)))
    print(f"{args.out}: {len(fits)} traces scored, {len(records) - len(fits)} left out (longer "
          f"than {args.max_length} tokens)")


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """The whole file or nothing: it is written beside and then moved into place."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
    temporary.replace(path)


def load_problems(path: str | Path) -> list[dict]:
    """[{"id", "prompt", "answer"}] from a JSONL file with the usual names for these fields."""
    problems, golds = [], ("answer", "final_answer", "expected_answer", "solution")
    for where, record in read_jsonl(path):
        record = {key: str(value) if isinstance(value, int | float) else value
                  for key, value in record.items()}
        problems.append({
            "id": record.get("id", where.rpartition(" ")[2]),
            "prompt": text_field(record, ("prompt", "question", "problem"), where),
            "answer": text_field(record, golds, where)})
    check(problems, f"{path}: the file is empty")
    return problems


# The toy world. A problem is a digit and six operations, all modulo 10; a trace has the value after
# each of them, and then the answer. The teacher often writes only the second value of two: a step
# that a network of one layer cannot follow, since it needs the first value to find the second.
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
    values = [value := SIGNS[sign](value, int(k)) % 10 for sign, k in operations]
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


def build_toy(root: Path, seed: int) -> None:
    """Untrained models, lessons by the rule, problems to train on and to hold out; what is there is
    left as it is. The seed varies the student, its lessons and the problems, not the teacher."""
    home = root / f"seed{seed}"
    for folder, layers, width in ((root / "blank-teacher", 2, 96), (home / "blank-student", 1, 48)):
        if not (folder / "config.json").exists():
            torch.manual_seed(seed + 1 if folder.parent == home else 0)
            Transformer(Config({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "vocab_size": save_toy_tokenizer(folder), "max_position_embeddings": 64,
                "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0, "tie_word_embeddings": False})).save_pretrained(folder)
    for file, count, kind in ((root / "lessons.jsonl", 30000, {"skip": 0.6}),
                              (root / "held-out.jsonl", 1000, {}),
                              (home / "lessons.jsonl", 8000, {"times": 0.1}),
                              (home / "problems.jsonl", 4000, {})):
        if not file.exists():
            rng = random.Random(str(file.relative_to(root)))
            write_jsonl(file, ({"id": i, **toy_trace(rng, **kind)} for i in range(count)))


MODEL_OPTIONS = {"--dtype": ("float32", "or bfloat16: of the model"),
                 "--device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")}


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
            kind = {"type": type(default), "default": default}
            if isinstance(default, type):
                kind = {"type": default, "required": True}
            elif default is False:
                kind = {"action": "store_true"}
            elif default:
                text += f" (default: {default})"
            command.add_argument(name, help=text, **kind if name[0] == "-" else {"nargs": default})
    args = parser.parse_args(argv)
    args.run(args)


def one_line_errors(main: Callable, *args) -> None:
    try:
        main(*args)
    except BadInput as error:
        raise SystemExit("error: " + " ".join(str(error).split())) from None


def main(argv: list[str] | None = None) -> None:
    command_line(__doc__.splitlines()[0], {score: {
        "--traces": (str, "IN.jsonl: traces to score"),
        "--teacher": (str, "HF folder or Hub name, with its tokenizer"),
        "--out": (str, "OUT.jsonl: the same traces with teacher_logprobs"),
        "--batch-size": (16, "traces at a time"),
        "--max-length": (4096, "longer traces are left out (tokens)"), **MODEL_OPTIONS}}, argv)


if __name__ == "__main__":
    one_line_errors(main)
