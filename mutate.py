"""Breaks source files on purpose, one small edit at a time, and tells which edits no test notices.

    python mutate.py foof.py                             # 20 edits, drawn with seed 0
    python mutate.py mac.py kfac.py --count 50 --seed 1  # 50 in each

    python mutate.py foof.py --lines 94 95 --every       # a closer look at what survived

An edit flips a sign or a comparison, drops a factor, a transpose or a statement, swaps operands,
arguments or axes, changes a number or a flag. Each is made in a copy of the project in a temporary
folder, where tests run until one fails: of those for the file (TESTS) that call the edited
function a few parametrisations, the quickest and what caught earlier edits first. A survivor is a
hole in the tests, an edit that changes nothing (an equivalent one), or one that --every catches:
read it and decide.
"""
import argparse
import ast
import collections
import contextlib
import copy
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch._dynamo                                      # before the processes are forked
import torch.distributed.checkpoint.state_dict            # noqa: F401

sys.dont_write_bytecode = True                            # sources change within their clock's tick
os.environ["OMP_NUM_THREADS"] = "1"

TESTS = {"augment.py": "test_data.py test_augment.py"} | dict.fromkeys(
    # pytest's arguments for a file; others: the test file of its name
    ("mac.py", "foof.py", "nysact.py", "kfac.py", "calls.py", "adafisher.py", "attention.py",
     "covariance.py", "patches.py", "blocks.py", "pooling.py", "precision.py", "optimizer.py",
     "capture.py"),
    "test_math.py test_optimizers.py test_capture.py test_protocol.py "
    "-k 'not compile and not export and not ranks and not cuda'")     # which take long

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


class Plugin:
    """pytest's plugin: which tests run, in which order; how long each took, which one failed, and,
    if traced, the project's functions that each called."""

    def __init__(self, folder, choose, traced=False):
        self.folder, self.choose, self.traced = folder, choose, traced
        self.times, self.calls, self.failed = collections.Counter(), {}, None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        names = self.choose([item.nodeid for item in items])
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in names]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        called = self.calls[item.nodeid] = set()

        def trace(frame, event, arg):
            if frame.f_code.co_filename.startswith(self.folder):
                called.add((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
        if self.traced:
            sys.settrace(trace)
        yield
        sys.settrace(None)

    def pytest_runtest_logreport(self, report):
        self.times[report.nodeid] += report.duration
        self.failed = report.nodeid if report.failed else self.failed


def sample(names, most=10):
    """At most so many parametrisations of each test, evenly spaced."""
    tests = collections.defaultdict(list)
    for name in names:
        tests[name.split("[")[0]].append(name)
    return [each[i * len(each) // min(most, len(each))] for each in tests.values()
            for i in range(min(most, len(each)))]


def quickest(names, times, kills, most=4):
    """What caught earlier edits, then of each test the quickest parametrisations."""
    chosen = []
    for name in sorted(names, key=lambda name: (-kills[name], times[name])):
        test = name.split("[")[0]
        if kills[name] or sum(x.split("[")[0] == test for x in chosen) < most:
            chosen.append(name)
    return chosen


def work(folder, arguments, plugin, sender):
    """In a process of its own: run the tests there until one fails."""
    os.setsid()                                          # the tests' own children end with it
    os.chdir(folder)
    sys.path[0] = folder
    sys.stdout = sys.stderr = open(os.devnull, "w")
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    code = pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider",
                        *shlex.split(arguments)], plugins=[plugin])
    sender.send((code == 0, plugin.failed or "none: they cannot even be collected", plugin.times,
                 plugin.calls))


def run(folder, arguments, plugin, hang=None):
    """(do the tests pass there?, which did not, times, calls); torch is imported once for all."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=work, args=(folder, arguments, plugin, sender))
    process.start()
    sender.close()
    found = False, "a crash, or the hang guard", {}, {}
    if receiver.poll(hang):
        with contextlib.suppress(EOFError):
            found = receiver.recv()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return found


def function_of(tree, node):
    """The innermost function around a node, or the module."""
    inside = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
              and f.body[0].lineno <= node.lineno <= f.end_lineno]
    return max(inside, key=lambda f: f.lineno).name if inside else "<module>"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--count", type=int, default=20, help="edits in each file (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="+", help="only those edits that are here")
    parser.add_argument("--every", action="store_true", help="every parametrisation, not a few")
    args = parser.parse_args()
    here, caught, tried = Path(__file__).resolve().parent, 0, 0
    kills, whole = collections.Counter(), {}      # by test; what a run without edits told
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        for path in here.glob("*.py"):
            (Path(folder) / path.name).write_text(path.read_text())
        for name in args.files:
            source, arguments = (here / name).read_text(), TESTS.get(name, f"test_{name}")
            tree = ast.parse(source)
            edits = list(candidates(tree))
            if arguments not in whole and not args.every:
                whole[arguments] = run(folder, arguments, Plugin(folder, sample, traced=True))
                if not whole[arguments][0]:
                    sys.exit(f"{name}: {whole[arguments][1]} fails without any edit.")
            print(f"{name}: {len(edits)} edits are possible", flush=True)
            for node, new in random.Random(args.seed).sample(edits, min(args.count, len(edits))):
                if args.lines and node.lineno not in args.lines:
                    continue
                (Path(folder) / name).write_text(replaced(source, node, new))
                tried, function = tried + 1, function_of(tree, node)
                if args.every:
                    passed, failed, *_ = run(folder, arguments, Plugin(folder, list))
                else:
                    *_, times, calls = whole[arguments]
                    tests = [test for test in calls if (name, function) in calls[test]]
                    tests = quickest(tests or [*calls], times, kills)
                    passed, failed, *_ = run(folder, arguments, Plugin(folder, lambda _: tests),
                                             120 + 5 * sum(times[test] for test in tests))
                caught += not passed
                kills[failed] += not passed
                print(f"  {'SURVIVED' if passed else 'caught'}, line {node.lineno}: "
                      f"{ast.unparse(node)}  ->  {ast.unparse(new)}"
                      f"{'' if passed else f'   by {failed}'}", flush=True)
            (Path(folder) / name).write_text(source)
    print(f"{caught} of {tried} edits were caught: {caught / max(tried, 1):.1%}")


if __name__ == "__main__":
    main()
