"""What a student of the toy world does, step by step: python tests/toy_steps.py FOLDER...

For the greedy answers to the held-out problems: the share of right values after each operation,
given the value that the student wrote before it, and the share of values left out. Not a test.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate


def count(folder: Path) -> None:
    model, tokenizer = data.load(folder)
    problems = data.load_problems(folder.parents[1] / "held-out.jsonl")
    right, written, skipped = dict.fromkeys("+-*", 0), dict.fromkeys("+-*", 0), 0
    for record in evaluate.answers(model, tokenizer, problems, max_new_tokens=64, batch_size=500):
        value, *operations = record["prompt"].split()
        values = dict(word.split("=") for word in record["response"].split() if "=" in word)
        for letter, sign, k in operations:
            if letter not in values:
                skipped += 1
                value = None
                continue
            if value is not None:
                v, k = int(value), int(k)
                written[sign] += 1
                exact = {"+": v + k, "-": v - k, "*": v * k}[sign] % 10
                right[sign] += exact == int(values[letter])
            value = values[letter]
    shares = "  ".join(f"{sign} {right[sign] / max(written[sign], 1):.3f}" for sign in "+-*")
    print(f"{folder}:  {shares}  left out {skipped / (6 * len(problems)):.3f}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        count(Path(name))
