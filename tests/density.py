"""Can it be read in one sitting? python tests/density.py fails if a file exceeds its budget.

A limit of lines alone rewards squeezed lines, so Python tokens per line of code count as well
(a line of code is no blank, comment or docstring line). Small, readable projects have 5 to 11.
"""

import ast
import sys
import tokenize
from pathlib import Path

HOME = Path(__file__).parents[1]
BUDGETS = {  # lines, tokens per line of code
    "loss.py": (130, 14.5),  # formulas
    "model.py": (380, 11.5),
    # The design wants 660 and 680: GPU decoding, checks of real traces and the benchmarks came.
    "data.py": (687, 10.5),
    "evaluate.py": (804, 10.5),
    "train.py": (390, 10.5),
}
WIDTH = 92
LONGEST = 60  # lines of a function; train.train is read from top to bottom
README_LINES, README_WIDTH, README_WORDS = 220, 100, 2700
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def measure(path: Path) -> tuple[int, float, int, int]:
    """(lines, tokens per line of code, widest line, lines of the longest function)"""
    text = path.read_text(encoding="utf-8")
    docstrings, functions = set(), [0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name != "train":
            functions.append(node.end_lineno - node.lineno + 1)
    code: dict[int, int] = {}
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            line = token.start[0]
            if token.type not in LAYOUT and line > 0 and line not in docstrings:
                code[line] = code.get(line, 0) + 1
    lines = text.splitlines()
    return len(lines), sum(code.values()) / len(code), max(map(len, lines)), max(functions)


def main() -> None:
    failed = False
    print("| file | lines | of | tokens a line | of | widest | longest function |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, (most_lines, most_tokens) in BUDGETS.items():
        lines, tokens, width, longest = measure(HOME / name)
        print(f"| {name} | {lines} | {most_lines} | {tokens:.2f} | {most_tokens} | {width} | "
              f"{longest} |")
        failed |= lines > most_lines or tokens > most_tokens
        failed |= width > WIDTH or longest > LONGEST
    for name, most_lines, most_width in (("README.md", README_LINES, README_WIDTH),
                                         ("tests/README.md", 320, 110)):
        text = (HOME / name).read_text(encoding="utf-8")
        lines, width, words = text.splitlines(), max(map(len, text.splitlines())), len(text.split())
        print(f"{name}: {len(lines)} lines of {most_lines}, widest {width}, {words} words")
        failed |= len(lines) > most_lines or width > most_width
        failed |= name == "README.md" and words > README_WORDS
    if failed:
        sys.exit("over budget: cut a feature, do not squeeze lines")


if __name__ == "__main__":
    main()
