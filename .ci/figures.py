"""`make figures`: how large and how complex the code is, beside the goals.

A module of tests is no product code. Branches: decisions of a function (if, for, while, except, case, and, or,
comprehension conditions). Nesting: blocks within blocks of one function.
"""

from __future__ import annotations

import ast
import re
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PRODUCT: Final = ("nomad_watchdog", "agent/watchdog_agent")
Function = ast.FunctionDef | ast.AsyncFunctionDef
_BRANCHES: Final = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.match_case,
)
_BLOCKS: Final = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.Try,
    ast.With,
    ast.AsyncWith,
    ast.Match,
)
_ANY: Final = re.compile(r"\bAny\b(?!,|\n| *#)")
_SLEEP: Final = re.compile(r"\b(?:asyncio|time)\.sleep\((?!0\))")


def files(*folders: str) -> list[Path]:
    """The Python files below these folders."""
    return sorted(one for folder in folders for one in (ROOT / folder).rglob("*.py"))


def own(function: ast.AST) -> Iterator[ast.AST]:
    """What belongs to a function, and not to one inside it."""
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield from own(child)


def branches(function: Function) -> int:
    """The decisions of a function."""
    count = 0
    for node in own(function):
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += len(node.ifs)
        else:
            count += isinstance(node, _BRANCHES)
    return count


def nesting(node: ast.AST, depth: int = 0) -> int:
    """The deepest block; `elif` is no deeper than its `if`."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        inner = [
            one
            for one in (value if isinstance(value, list) else [value])
            if isinstance(one, ast.AST)
        ]
        chained = isinstance(node, ast.If) and name == "orelse" and len(inner) == 1
        for one in inner:
            if isinstance(one, Function | ast.ClassDef | ast.Lambda):
                continue
            more = isinstance(one, _BLOCKS) and not (chained and isinstance(one, ast.If))
            deepest = max(deepest, nesting(one, depth + more))
    return deepest


def comments(path: Path) -> int:
    """Lines with nothing but a comment."""
    with tokenize.open(path) as file:
        return sum(
            token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            for token in tokenize.generate_tokens(file.readline)
        )


def lines(paths: list[Path]) -> list[int]:
    """How long each file is."""
    return [len(one.read_text().splitlines()) for one in paths]


def shared(trees: list[ast.Module]) -> list[str]:
    """Names of public classes that more than one module defines."""
    found: defaultdict[str, int] = defaultdict(int)
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name] += 1
    return sorted(name for name, count in found.items() if count > 1)


def table() -> list[tuple[str, str, str]]:
    """Figure, today, goal."""
    product = files(*PRODUCT)
    trees = [ast.parse(one.read_text()) for one in product]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, Function)]
    lengths = sorted((one.end_lineno or one.lineno) - one.lineno + 1 for one in functions)
    typed = [one for one in product if "clients" not in one.parts]
    text = "\n".join(one.read_text() for one in typed)
    kloc = text.count("\n") / 1000
    size, tests = lines(product), files("tests")
    names = shared(trees)
    control = sum(lines(files("nomad_watchdog"))) - sum(
        sum(lines(files(f"nomad_watchdog/{one}"))) for one in ("demo", "testing")
    )
    ninth = lengths[int(len(lengths) * 0.9)]
    return [
        ("module lines, median / max", f"{statistics.median(size):.0f} / {max(size)}", "150 / 400"),
        ("modules over 400 lines", str(sum(one > 400 for one in size)), "0"),
        ("function lines, p90 / max", f"{ninth} / {lengths[-1]}", "25 / 60"),
        ("branches of a function, max", str(max(map(branches, functions))), "12"),
        ("nesting of a function, max", str(max(map(nesting, functions))), "4"),
        ("Any per 1,000 lines outside clients", f"{len(_ANY.findall(text)) / kloc:.1f}", "3"),
        ("dict[str, Any] per 1,000 lines", f"{text.count('dict[str, Any]') / kloc:.1f}", "1"),
        ("sleeps in tests", str(sum(len(_SLEEP.findall(one.read_text())) for one in tests)), "0"),
        ("lines of tests / of code", f"{sum(lines(tests)) / sum(size):.2f}", "1.2"),
        ("comment lines per 100", f"{100 * sum(map(comments, product)) / sum(size):.1f}", "-"),
        (
            "class names with two meanings",
            f"{len(names)}: {', '.join(names)}" if names else "0",
            "0",
        ),
        ("control plane, lines", str(control), "27400"),
        ("agent, lines", str(sum(lines(files(PRODUCT[1])))), "-"),
    ]


def main() -> None:
    """Print the table."""
    rows = [("figure", "today", "goal"), *table()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
