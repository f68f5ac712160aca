"""What a student of the toy world does, step by step: python tests/study/toy_steps.py FOLDER...

For the greedy answers to the held-out problems: the share of right values after each operation,
given the last value that the student wrote; of those behind a skipped value (merged); and the
share of skipped values. Not a test.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate


def count(folder: Path) -> None:
    model, tokenizer = data.load(folder)
    problems = evaluate.load_problems(folder.parents[1] / "held-out.jsonl")
    kinds = "+", "-", "*", "merged"
    right, written, skipped = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0), 0
    for record in evaluate.generate_answers(model, tokenizer, problems, max_new_tokens=64,
                                            batch_size=500):
        first, *operations = record["prompt"].split()
        values = dict(word.split("=") for word in record["response"].split() if "=" in word)
        value, steps = int(first), 0  # what is right after the last value written, steps behind it
        for letter, sign, k in operations:
            value, steps = data.SIGNS[sign](value, int(k)) % 10, steps + 1
            if letter not in values:
                skipped += 1
                continue
            kind = sign if steps == 1 else "merged"
            written[kind] += 1
            right[kind] += value == int(values[letter])
            value, steps = int(values[letter]), 0
    shares = "  ".join(f"{kind} {right[kind] / max(written[kind], 1):.3f}" for kind in kinds)
    print(f"{folder}:  {shares}  skipped {skipped / (6 * len(problems)):.3f}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        count(Path(name))
