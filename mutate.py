"""Breaks source files on purpose, one small edit at a time, and tells which edits no test notices.

    python mutate.py foof.py                             # 20 edits, drawn with seed 0
    python mutate.py mac.py kfac.py --count 50 --seed 1  # 50 in each

    python mutate.py foof.py --lines 94 95 --every       # a closer look at what survived

An edit flips a sign or a comparison, drops a factor, a transpose or a statement, swaps operands,
arguments or axes, changes a number or a flag. Each is made in a copy of the project in a temporary
folder. pytest collects the tests once; for each edit a fork gives the function its edited body and
runs the tests that call it until one fails: what caught earlier edits first, then one of each test,
the quickest first, then other parametrisations, for so many --seconds. (Edits of what is done on
import take a new process.) A survivor is a hole in the tests, an edit that changes nothing (an
equivalent one), or one that --every catches: read it and decide. Needs fork(), so Linux or macOS.
"""
import argparse
import ast
import collections
import contextlib
import copy
import gc
import itertools
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

sys.dont_write_bytecode = True           # sources change within a tick of their clock
os.environ["OMP_NUM_THREADS"] = "1"

TESTS = {    # pytest's arguments for a file; others: the test file of its name
    "augment.py": "test_data.py test_augment.py", "models.py": "test_models.py test_lm.py "
    "-k 'not ranks'", "sharding.py": "test_reach.py -k shard"} | dict.fromkeys(
    ("mac.py", "foof.py", "nysact.py", "kfac.py", "calls.py", "adafisher.py", "attention.py",
     "covariance.py", "patches.py", "blocks.py", "pooling.py", "precision.py", "optimizer.py",
     "layers.py", "uses.py", "capture.py"),
    "test_math.py test_optimizers.py test_capture.py test_protocol.py "
    "-k 'not compile and not export and not ranks and not one_rank and not cuda'")   # take long

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
        yield changed(value=node.value + 1 if isinstance(node.value, int)
                      else 2 * node.value or 1.0)
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


def in_child(work, hang=None):
    """work()'s result in a fork of this process; None if it crashed or took so many seconds."""
    receiver, sender = multiprocessing.Pipe(False)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()                                  # the tests' own children end with it
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            sender.send(work())
        finally:
            os._exit(0)
    sender.close()
    result = None
    if receiver.poll(hang):
        with contextlib.suppress(EOFError):
            result = receiver.recv()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return result


def passes(item):
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def first_failure(items, seconds, prepare):
    """The first of these tests that fails; "" if all pass that take so many seconds of work."""
    prepare()
    for item in items:
        if not passes(item):
            return item.nodeid
        if time.process_time() > seconds:
            break
    return ""


def measured(items, folder):
    """({test: seconds}, {test: the project's functions that it calls}, the first failure)."""
    times, calls, failed = {}, {}, ""
    for item in items:
        called, start = calls.setdefault(item.nodeid, set()), time.process_time()

        def trace(frame, event, arg):
            if frame.f_code.co_filename.startswith(folder):
                called.add((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
        sys.settrace(trace)
        failed = failed or ("" if passes(item) else item.nodeid)
        sys.settrace(None)
        times[item.nodeid] = time.process_time() - start
    return times, calls, failed


def sample(items):
    """One of each test, for each file that its parametrisations name."""
    stems, tests = [name.removesuffix(".py") for name in TESTS], {}
    for item in items:
        test, _, parameters = item.nodeid.partition("[")
        tests.setdefault((test, *(stem for stem in stems if stem in parameters)), item)
    return tests.values()


def in_order(called, names, times, kills, stem):
    """What caught earlier edits, then of those called what names the file, then the quickest; then
    the other parametrisations of the same tests."""
    tests = {name.split("[")[0]: times[name] for name in called}
    names = [name for name in names if name in called or name.split("[")[0] in tests]
    return sorted(names, key=lambda name: (
        -kills[name], name not in called, stem not in name.split("::")[1],
        times.get(name, tests[name.split("[")[0]])))


def function_of(tree, node):
    """The outermost function whose body has the node, or None."""
    inside = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
              and f.body[0].lineno <= node.lineno <= f.end_lineno]
    return min(inside, key=lambda f: f.lineno, default=None)


def exchange(path, source, function):
    """Give the function, wherever it is known already, the body that it has in this source."""
    line = min([function.lineno, *(each.lineno for each in function.decorator_list)])

    def search(code):
        for each in code.co_consts:
            if isinstance(each, types.CodeType):
                yield from [each] if (each.co_name, each.co_firstlineno) == (
                    function.name, line) else search(each)
    new, = search(compile(source, path, "exec"))
    for each in gc.get_objects():
        if isinstance(each, types.FunctionType) and each.__code__.co_filename == path and (
                each.__code__.co_name, each.__code__.co_firstlineno) == (function.name, line):
            each.__code__ = new


class Mutants:
    """pytest's plugin: in place of the tests it runs those that matter, once for each edit."""

    def __init__(self, names, args, folder):
        self.names, self.args, self.folder = names, args, folder
        self.kills = collections.Counter()

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        self.times, self.calls, failed = in_child(
            lambda: measured(sample(items.values()), self.folder))
        if failed:
            pytest.exit(f"{failed} fails without any edit.")
        print(f"\n{len(self.calls)} of {len(items)} tests, {sum(self.times.values()):.0f} s",
              flush=True)
        caught = tried = 0
        for name in self.names:
            path = Path(self.folder) / name
            source = path.read_text()
            tree = ast.parse(source)
            edits = list(candidates(tree))
            print(f"{name}: {len(edits)} edits are possible", flush=True)
            for node, new in random.Random(self.args.seed).sample(
                    edits, min(self.args.count, len(edits))):
                if self.args.lines and node.lineno not in self.args.lines:
                    continue
                killer = self.killer(items, path, replaced(source, node, new),
                                     function_of(tree, node))
                tried, caught = tried + 1, caught + bool(killer)
                self.kills[killer] += 1
                print(f"  {f'caught by {killer}' if killer else 'SURVIVED'}, line {node.lineno}: "
                      f"{ast.unparse(node)}  ->  {ast.unparse(new)}", flush=True)
            path.write_text(source)
        print(f"{caught} of {tried} edits were caught: {caught / max(tried, 1):.1%}")
        return True

    def killer(self, items, path, edited, function):
        """The test that fails with this edit, or ""."""
        called = [test for test in self.calls
                  if function is None or (path.name, function.name) in self.calls[test]]
        tests = in_order(called or [*self.calls], items, self.times, self.kills, path.stem)
        seconds, hang = self.args.seconds, 60 + 15 * self.args.seconds
        if self.args.every:
            tests, seconds, hang = [*items], float("inf"), None
        path.write_text(edited)                          # for processes that tests start
        if function is not None:
            found = in_child(lambda: first_failure(
                [items[test] for test in tests], seconds,
                lambda: exchange(str(path), edited, function)), hang)
            if found is not None:
                return found             # else it hangs, crashes, or no function takes such a body
        spent = itertools.accumulate(self.times.get(test, 0) for test in tests)
        tests = [test for test, sum_of_times in zip(tests, spent) if sum_of_times <= seconds
                 and (test in self.calls or self.args.every)]
        try:
            done = subprocess.run([sys.executable, "-B", "-m", "pytest", "-x", "-q", "--tb=no",
                                   "-p", "no:cacheprovider", *tests], cwd=self.folder,
                                  capture_output=True, text=True, timeout=hang)
        except subprocess.TimeoutExpired:
            return "the hang guard"
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(
            ("FAILED", "ERROR"))]
        return failed[0] if failed else "a crash" if done.returncode else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--count", type=int, default=20, help="edits in each file (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="+", help="only those edits that are here")
    parser.add_argument("--seconds", type=float, default=20,
                        help="of tests that an edit may pass, in processor time (default 20)")
    parser.add_argument("--every", action="store_true", help="all tests, whatever they take")
    args = parser.parse_args()
    here, groups = Path(__file__).resolve().parent, collections.defaultdict(list)
    for name in args.files:
        groups[TESTS.get(name, f"test_{name}")].append(name)
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        for path in here.glob("*.py"):
            (Path(folder) / path.name).write_text(path.read_text())
        os.chdir(folder)
        sys.path[0] = folder
        for arguments, names in groups.items():
            if os.fork() == 0:                             # each group imports its files anew
                code = pytest.main(["-q", "--tb=native", "--assert=plain", "-s", "-p",
                                    "no:cacheprovider", *shlex.split(arguments)],
                                   plugins=[Mutants(names, args, folder)])
                sys.stdout.flush()
                os._exit(code)
            os.wait()


if __name__ == "__main__":
    main()
