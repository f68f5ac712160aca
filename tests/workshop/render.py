"""Run the notebook and write it, with its pictures, as one HTML page.

    python tests/workshop/render.py            # runs/workshop/workshop.html
    STEPS=40 python tests/workshop/render.py   # a try-out: its students hardly learn

It prints the seconds of each cell, and fails on an error or a missing picture.
"""

import sys
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
from model import check

HOME = Path(__file__).parent
PICTURES = "plt.show()", "\n    boxes(", "\nboxes(", "\npage("  # what a cell calls to show one


def pictures(cell: dict) -> int:
    kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
    return kinds.count("image/png") + kinds.count("text/html")


def seconds(cell: dict) -> float:
    times = cell["metadata"]["execution"]
    begin, end = times["iopub.execute_input"], times["shell.execute_reply"]
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def main() -> None:
    notebook = nbformat.read(HOME / "workshop.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(HOME)}})
    client.execute()
    total = 0.0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            first = cell["source"].splitlines()[0]
            print(f"cell {number:2}: {seconds(cell):5.1f} s, {pictures(cell)} pictures  {first}")
            total += seconds(cell)
            only_defines = cell["source"].startswith("def boxes")
            shows = any(call in cell["source"] for call in PICTURES) and not only_defines
            check(pictures(cell) or not shows, f"cell {number}: no picture")
    page, _ = HTMLExporter().from_notebook_node(notebook)
    out = HOME.parents[1] / "runs/workshop/workshop.html"
    out.write_text(page, encoding="utf-8")
    print(f"{total:.0f} s; {out}")


if __name__ == "__main__":
    data.run_command(main)
