"""The bridge to transformers' Trainer on real weights, or on several processes.

    python tests/checks/doors.py STUDENT TRACES
    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
        --dynamo_backend no tests/checks/doors.py STUDENT TRACES

On a CPU, too, it takes --multi_gpu: with --cpu, accelerate starts one process and says nothing.
A few steps by the Trainer and by train.py: the same losses, the same norms of the gradient and the
same weights. Not a test.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from test_bridge import DisCorD, trainer

import data
import train
from model import Transformer


def main(argv: list[str] | None = None) -> dict:
    """On process 0: the largest differences between the Trainer and train.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("student", type=Path)
    add("traces")
    add("--out", default="runs/doors")
    add("--steps", type=int, default=3)
    add("--size", type=int, default=2, help="traces of a micro-batch; a step has two of them")
    add("--lr", type=float, default=1e-5)
    args = parser.parse_args(argv)
    student, tokenizer = data.load(args.student)
    examples, _ = data.load_traces(args.traces, tokenizer, teacher=True)
    DisCorD.vocab_size = tokenizer.vocab_size
    order = [example for step in range(args.steps)
             for part in data.step_examples(examples, step, args.size, 2, seed=0)
             for example in part]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    theirs = trainer(args.student, order, args.size, 2 // processes, args.steps,
                     out=Path(args.out, "trainer"), learning_rate=args.lr)
    theirs.train()
    theirs.save_model(f"{args.out}/theirs")  # only process 0 writes
    if not theirs.is_world_process_zero():
        return {}
    train.train(train.parse_args([
        "--student", str(args.student), "--traces", args.traces, "--out", f"{args.out}/ours",
        "--steps", str(args.steps), "--batch-size", str(args.size), "--grad-accum", "2", "--lr",
        str(args.lr), "--log-every", "1", "--device", "cpu"]))
    lines = [line for _, line in data.read_jsonl(f"{args.out}/ours/log.jsonl")]
    logs = [log for log in theirs.state.log_history if "loss" in log]
    start, one, other = (torch.cat([w.flatten() for w in model.state_dict().values()])
                         for model in (student, *(Transformer.from_pretrained(f"{args.out}/{name}")
                                                  for name in ("ours", "theirs"))))
    found = {"processes": processes, "update": (one - start).norm().item(),
             "weights": (one - other).norm().item(),
             "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(lines, logs, strict=True)),
             "norm": max(abs(a["norm"] - b["grad_norm"]) for a, b in zip(lines, logs, strict=True))}
    print(" ".join(f"{key} {value:.2g}" for key, value in found.items()))
    return found


if __name__ == "__main__":
    main()
