"""Can it be read in one sitting? python tests/density.py shows the limits; (!) marks what is over.

A limit of lines alone rewards squeezed lines, so Python tokens per line of code count as well
(a line of code is no blank, comment or docstring line). Small, readable projects have 5 to 11.
A file that is too dense, too wide, or has a long function fails. Code or a page under tests/ that
is too long does not: the cure is a feature less, and nobody should squeeze lines to pass.
"""

import ast
import sys
import tokenize
from pathlib import Path

HOME = Path(__file__).parents[1]
TOKENS = {"loss.py": 14.5, "model.py": 11.5, "data.py": 10.5, "evaluate.py": 10.5,
          "train.py": 10.5}  # per line of code; loss.py has formulas
LINES, ALL_LINES, WIDTH = 540, 1900, 92
LONGEST = 60  # lines of a function; train.train is read from top to bottom
README_LINES, PAGE_LINES, README_WIDTH = 200, 160, 100  # a page is a README under tests/
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def measure(path: Path) -> tuple[int, int, float, int]:
    """(lines, widest line, tokens per line of code, lines of the longest function)"""
    text = path.read_text(encoding="utf-8")
    docstrings, functions = set(), [0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and (path.name, node.name) != ("train.py", "train"):
            functions.append(node.end_lineno - node.lineno + 1)
    with open(path, "rb") as file:
        code = [token.start[0] for token in tokenize.tokenize(file.readline)
                if token.type not in LAYOUT and token.start[0] not in {0, *docstrings}]
    lines = text.splitlines()
    return len(lines), max(map(len, lines)), len(code) / len(set(code)), max(functions)


def main() -> None:
    over, total = False, 0

    def row(name: str, *pairs: tuple[float, float]) -> None:
        cells = [f"{found:.4g} of {most:g}" + " (!)" * (found > most) for found, most in pairs]
        print(f"| {name:24} |", " | ".join(f"{cell:17}" for cell in cells), "|")

    print("| file                     | lines | widest | tokens a line | longest function |")
    print("|---|--:|--:|--:|--:|")
    for name, most in TOKENS.items():
        lines, width, tokens, longest = measure(HOME / name)
        total += lines
        row(name, (lines, LINES), (width, WIDTH), (tokens, most), (longest, LONGEST))
        over |= width > WIDTH or tokens > most or longest > LONGEST
    row("all five", (total, ALL_LINES))
    for file in [HOME / "README.md", *sorted((HOME / "tests").rglob("README.md"))]:
        lines = file.read_text(encoding="utf-8").splitlines()
        width, main_page = max(map(len, lines)), file.parent == HOME
        most = README_LINES if main_page else PAGE_LINES
        row(str(file.relative_to(HOME)), (len(lines), most), (width, README_WIDTH))
        over |= width > README_WIDTH or (main_page and len(lines) > most)
    if over:
        sys.exit("too dense, too wide, a function too long, or README.md too long")


if __name__ == "__main__":
    main()
