"""Breaks source files on purpose, one small edit at a time, and tells which edits no test notices.

    python mutate.py foof.py                             # 20 edits, drawn with seed 0
    python mutate.py mac.py kfac.py --count 50 --seed 1  # 50 in each

An edit flips a sign or a comparison, drops a factor, a transpose or a statement, swaps operands,
arguments or axes, changes a number or a flag. Each is made in a copy of the project in a temporary
folder, where the tests that matter for the file (TESTS) run until one fails. A survivor is a hole
in the tests, or an edit that changes nothing (an equivalent one): read it and decide.
"""
import argparse
import ast
import copy
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOTH = "test_math.py test_optimizers.py"
TESTS = {                    # pytest's arguments for a file; others: the test file of its name
    "mac.py": f"{BOTH} -k mac", "foof.py": f"{BOTH} -k foof", "nysact.py": f"{BOTH} -k nysact",
    "kfac.py": f"{BOTH} -k kfac", "calls.py": f"{BOTH} -k kfac",
    "adafisher.py": f"{BOTH} -k adafisher",
    "optimizer.py": BOTH, "capture.py": BOTH, "patches.py": BOTH, "covariance.py": BOTH,
    "attention.py": f"{BOTH} -k mac", "augment.py": "test_data.py test_augment.py",
}
HANG = 3600                  # seconds after which a run counts as caught, on a busy machine too

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
             ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
             ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
             ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"mean": "sum", "sum": "mean", "amin": "amax", "amax": "amin", "min": "max", "max": "min",
         "all": "any", "any": "all", "add_": "sub_", "mul_": "div_", "div_": "mul_",
         "square": "abs", "sqrt": "square", "cumsum": "cumprod", "tril": "triu", "triu": "tril"}


def edits_of(node):
    """The nodes that may stand in this one's place."""
    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        yield changed(op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div, ast.Add, ast.Sub)):
        yield node.left                                                  # without the factor
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield changed(left=node.right, right=node.left)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield changed(ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield changed(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield changed(value=node.value + 1 if isinstance(node.value, int) else 2 * node.value)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        if node.attr in NAMES:
            yield changed(attr=NAMES[node.attr])
        if node.attr in ("mT", "T"):
            yield node.value
    if isinstance(node, ast.Call) and len(node.args) > 1 and not any(
            isinstance(x, ast.Starred) for x in node.args[:2]):
        yield changed(args=[node.args[1], node.args[0], *node.args[2:]])
    if isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()                                                 # without the statement


def candidates(tree):
    """(node, what replaces it) for all edits, less those in errors' texts, strings, annotations."""
    left_out = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)
    for name, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, left_out) or not isinstance(node, ast.AST) or name == "annotation":
                continue
            if getattr(node, "name", "") == "__repr__":
                continue
            if hasattr(node, "lineno"):
                yield from ((node, new) for new in edits_of(node))
            yield from candidates(node)


def replaced(source, node, new):
    """The source with the node's text replaced; all else stays as it is."""
    text = ast.unparse(new)
    text = text if isinstance(new, ast.Pass) else f"({text})"
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    start, end = starts[node.lineno - 1] + node.col_offset, \
        starts[node.end_lineno - 1] + node.end_col_offset
    raw = source.encode()
    return (raw[:start] + text.encode() + raw[end:]).decode()


def passes(folder, arguments):
    """Do the tests pass there?"""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               *shlex.split(arguments)]
    environment = os.environ | dict(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    try:
        return subprocess.run(command, cwd=folder, env=environment, timeout=HANG,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--count", type=int, default=20, help="edits in each file (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    here, caught, tried = Path(__file__).resolve().parent, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for path in here.glob("*.py"):
            (Path(folder) / path.name).write_text(path.read_text())
        for name in args.files:
            source, arguments = (here / name).read_text(), TESTS.get(name, f"test_{name}")
            edits = list(candidates(ast.parse(source)))
            start = time.perf_counter()
            if not passes(folder, arguments):
                sys.exit(f"{name}: pytest {arguments} fails without any edit.")
            print(f"{name}: {len(edits)} edits are possible; pytest {arguments} takes "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
            for node, new in random.Random(args.seed).sample(edits, min(args.count, len(edits))):
                (Path(folder) / name).write_text(replaced(source, node, new))
                tried += 1
                if passes(folder, arguments):
                    old, text = ast.unparse(node), ast.unparse(new)
                    print(f"  survived, line {node.lineno}: {old}  ->  {text}", flush=True)
                else:
                    caught += 1
            (Path(folder) / name).write_text(source)
    print(f"{caught} of {tried} edits were caught: {caught / max(tried, 1):.1%}")


if __name__ == "__main__":
    main()
