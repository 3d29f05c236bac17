"""How dense the code is: python .ci/measure.py [FILE ...] (all tracked Python files outside tests/ without arguments).

Prints the number of AST nodes per non-blank line, the share of lines over 100 columns, and the longest functions.
A figure for reviewers, not a gate.
"""

import ast
import subprocess
import sys
from pathlib import Path


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True)
    return [name for name in listing.stdout.split() if not name.startswith("tests/")]


def function_lengths(tree: ast.AST, name: str) -> list[tuple[int, str]]:
    """(lines, "file:line function") of every function; decorators are not counted."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(node.end_lineno - node.lineno + 1, f"{name}:{node.lineno} {node.name}") for node in functions]


def main() -> None:
    nodes = 0
    lines = 0
    long_lines = 0
    functions = []
    names = sys.argv[1:] or tracked_files()
    for name in names:
        text = Path(name).read_text(encoding="utf-8")
        tree = ast.parse(text)
        nodes += sum(1 for _ in ast.walk(tree))
        functions += function_lengths(tree, name)
        filled = [line for line in text.splitlines() if line.strip()]
        lines += len(filled)
        long_lines += sum(len(line) > 100 for line in filled)
    print(f"{len(names)} files, {lines} lines")
    print(f"{nodes / lines:.2f} AST nodes per line")
    print(f"{100 * long_lines / lines:.1f} % of the lines over 100 columns")
    for length, where in sorted(functions, reverse=True)[:10]:
        print(f"{length:4d} lines  {where}")


if __name__ == "__main__":
    main()
