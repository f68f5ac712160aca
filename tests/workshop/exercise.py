"""Run an exercise of the workshop: python tests/workshop/exercise.py 3 --seeds 0 1 2

It copies the repository to runs/exercises, applies the exercise's patch there, runs its commands
once for each seed, and prints what was expected and what was seen. Your own files stay as they
are. It needs `git`, and makes `python train.py --seed SEED` first where that has not been done.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
from model import check

HOME = Path(__file__).parents[2]
PAGE = HOME / "tests/workshop/exercises.md"
ROW = re.compile(r"^\| \S+/\S+ +\| ([\d.]+) \+.*?\| ([\d.]+) \+", re.MULTILINE)  # of `report`


def read_exercise(number: int) -> dict:
    """Title, text, commands and patch of an exercise."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next((text for text in sections if text.startswith(f"{number}. ")), None)
    check(section, f"exercise {number}: not in {PAGE}")
    task, _, solution = section.partition("<details>")
    run = re.search(r"\*\*Run:\*\*(.*?)(?=\n- \*\*|\Z)", task, re.DOTALL)
    seen = re.search(r"</summary>\s*(.*?)\s*(```|</details>)", solution, re.DOTALL)
    return {
        "title": task.splitlines()[0],
        "expect": " ".join(re.search(r"\*\*Expect:\*\*(.*)", task, re.DOTALL)[1].split()),
        "commands": [" ".join(one.split()) for one in re.findall(r"`(python\s[^`]+)`", run[1])],
        "seen": " ".join(seen[1].split()),
        "patch": next(PAGE.parent.glob(f"{number:02}-*.patch"), None),
    }


def make_copy(number: int, patch: Path | None) -> Path:
    """The repository and its toy in runs/exercises, with the patch applied."""
    work = HOME / f"runs/exercises/{number:02}"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(HOME, work, ignore=shutil.ignore_patterns("runs", ".*", "__pycache__"))
    shutil.copytree(HOME / "runs/toy", work / "runs/toy")
    if patch is not None:
        git = shutil.which("git")
        check(git, "git is missing: install it, or change the files by hand")
        # Above `work`, git must not look for a repository, or it would patch that one.
        apart = {**os.environ, "GIT_CEILING_DIRECTORIES": str(work.parent)}
        subprocess.run([git, "apply", str(patch)], cwd=work, env=apart, check=True)
    return work


def run(command: str, work: Path) -> str:
    """Run a command and pass on what it says. Returns greedy / sampled of its last student."""
    print(f"\n$ {command}", flush=True)
    _, *words = shlex.split(command)
    process = subprocess.Popen([sys.executable, *words], cwd=work, text=True,
                               stdout=subprocess.PIPE)
    said = []
    for line in process.stdout:
        print(line, end="", flush=True)
        said.append(line)
    check(process.wait() == 0, f"failed: {command}")
    rows = ROW.findall("".join(said))
    if not rows:  # of the study
        return "(see above)"
    sampled, greedy = rows[-1]
    return f"{greedy} / {sampled}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=data.HelpFormatter)
    parser.add_argument("number", type=int, help="of the exercise")
    parser.add_argument("--seeds", type=data.bounded(int, 0), nargs="+", default=[0])
    args, more = parser.parse_known_args(argv)  # more options for train.py: a try-out
    exercise = read_exercise(args.number)
    for seed in args.seeds:
        if not (HOME / f"runs/toy/seed{seed}/discord/held-out-greedy.jsonl").exists():
            run(f"python train.py --seed {seed}", HOME)
    work = make_copy(args.number, exercise["patch"])
    rows = []
    for command in exercise["commands"]:
        if "train.py" in command:
            found = [run(shlex.join([*command.split(), "--seed", str(seed), *more]), work)
                     for seed in args.seeds]
        else:  # the study has its own seeds
            found = [run(command, work)]
        rows.append(f"  {command}\n    {', '.join(found)}")
    seeds = ", ".join(map(str, args.seeds))
    print(f"\n{exercise['title']}\n\nexpected: {exercise['expect']}\n\nseen here (greedy / "
          f"sampled; seeds {seeds}):", *rows, f"\nseen by us: {exercise['seen']}\n\n"
          f"The changed copy is {work}.", sep="\n")


if __name__ == "__main__":
    data.run_command(lambda: main(sys.argv[1:]))
