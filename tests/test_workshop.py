"""The workshop: a notebook that is clean, and exercises whose patches fit today's code. Both are
run in .ci/run, on the toy that is there."""

import json
import re
import shutil
from pathlib import Path

import exercise
import pytest
from test_recipe import README

HOME = Path(__file__).parents[1]
FILES = "model.py", "data.py", "loss.py", "train.py", "evaluate.py"
NOTEBOOK = json.loads((HOME / "tests/workshop/workshop.ipynb").read_text(encoding="utf-8"))


def test_the_notebook():
    """Guards outputs in git, cells that do not fit on a screen, and questions without an answer."""
    questions = 0
    for cell in NOTEBOOK["cells"]:
        lines = "".join(cell["source"]).splitlines()
        assert max(map(len, lines)) <= 100
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert len(lines) <= 15
        elif "**Question" in "".join(lines):
            questions += 1
            assert "<details><summary>Answer</summary>" in "".join(lines)
    assert questions == 10


@pytest.mark.parametrize("number", range(1, 11))
def test_exercises(tmp_path, monkeypatch, number):
    """Guards a patch that does not fit the code any more or breaks its syntax, a longer one than a
    pair can type, and a page that shows another change than the patch makes."""
    for file in FILES:
        shutil.copy(HOME / file, tmp_path)
    (tmp_path / "runs/toy").mkdir(parents=True)
    monkeypatch.setattr(exercise, "HOME", tmp_path)
    found = exercise.read_exercise(number)
    assert found["commands"] and found["expect"] and found["seen"]
    work = exercise.make_copy(number, found["patch"])
    changed = [file for file in FILES if (work / file).read_text() != (HOME / file).read_text()]
    assert bool(changed) is bool(found["patch"])
    for file in changed:
        compile((work / file).read_text(encoding="utf-8"), file, "exec")
    if found["patch"]:
        lines = re.findall(r"^[+-](?!\+\+ |-- ).*", found["patch"].read_text(), re.MULTILINE)
        assert sum(line[0] == "+" for line in lines) <= 5
        text = exercise.PAGE.read_text(encoding="utf-8").partition(f"\n## {number}. ")[2]
        shown = re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1]
        assert [line for line in shown.splitlines() if line[0] != "#"] == lines


def test_what_an_exercise_finds():
    """Guards greedy and sampled exchanged, and another student's row: the last row counts."""
    table = re.sub(r"^    ", "", README, flags=re.MULTILINE)
    sampled, greedy = exercise.ROW.findall(table)[-1]
    assert (greedy, sampled) == ("0.832", "0.787")
