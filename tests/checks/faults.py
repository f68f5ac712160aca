"""Kills commands at random moments and resumes them: python tests/checks/faults.py [KILLS]

What comes out must be what an uninterrupted run leaves, byte for byte (weights on a CPU in fp32,
answers). Needs what `python train.py` leaves in runs/toy. Not a test: it takes a minute and a half,
and six seconds for each further kill.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).parents[2]
TOY = HOME / "runs" / "toy"
COMMANDS: dict[str, list] = {  # what is killed, and the file that is compared
    "answers.jsonl": ["evaluate.py", "accuracy", "--model", TOY / "seed0/student", "--benchmark",
                      TOY / "held-out.jsonl", "--samples", 4, "--temperature", 1, "--seed", 1,
                      "--max-new-tokens", 12, "--batch-size", 20, "--device", "cpu"],
    "model.safetensors": ["train.py", "--student", TOY / "seed0/student", "--traces",
                          TOY / "seed0/traces.jsonl", "--steps", 400, "--batch-size", 16, "--lr",
                          1e-3, "--save-every", 2, "--log-every", 5, "--device", "cpu"]}


def start(name: str, folder: Path) -> subprocess.Popen:
    out = folder / name if name.endswith(".jsonl") else folder
    command = [sys.executable, *COMMANDS[name], "--out", out, "--resume"]
    return subprocess.Popen(list(map(str, command)), cwd=HOME, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, seconds: float | None = None,
           folder: Path | None = None) -> bool:
    """Wait, or kill after so many seconds; given a folder, while a file is being written there.
    True if it ended by itself, and well."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        while folder and process.poll() is None and not any(folder.glob("*.tmp")):
            pass
        process.kill()
        _, said = process.communicate()
        if process.returncode < 0:
            return False
    if process.returncode:
        raise SystemExit(f"failed after a kill: {said.decode()[-500:]}")
    return True


def main(wanted: int) -> None:
    rng, root = random.Random(time.time()), Path(tempfile.mkdtemp(prefix="faults-"))
    for name in COMMANDS:
        begin = time.perf_counter()
        whole = root / f"{name}-whole"
        finish(start(name, whole))
        seconds, kills, writing, runs, same = time.perf_counter() - begin, 0, 0, 0, 0
        while kills < wanted:
            runs += 1
            folder = root / f"{name}-{runs}"
            while not finish(start(name, folder), rng.uniform(2, seconds) if kills < wanted
                             else None, folder if kills % 2 else None):
                kills += 1
                writing += any(folder.glob("*.tmp"))
            same += (folder / name).read_bytes() == (whole / name).read_bytes()
            names = [sorted(path.name for path in one.iterdir()) for one in (whole, folder)]
            if names[0] != names[1]:
                raise SystemExit(f"{folder}: has {names[1]}, not {names[0]}")
        print(f"{' '.join(map(str, COMMANDS[name][:2]))}: {kills} kills, {writing} of them while a "
              f"file was written; {runs} runs resumed, {same} identical", flush=True)
        if same < runs:
            raise SystemExit(f"{root}: a resumed run differs")
    shutil.rmtree(root)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
