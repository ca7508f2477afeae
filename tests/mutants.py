"""Change one thing in the package at random, run the default tests, and see whether they notice.

python tests/mutants.py LOG --count 200 --seed 1 minipeft/methods/lora.py …

Every mutant is one line of LOG: killed, survived or timeout. A run continues where the last one
stopped, and draws no mutant that LOG has from another seed. First, all tests run once to record
which functions each of them calls (LOG.calls; delete it if tests change): a mutant is only tried on
the tests that call its function, and on those that start other processes. Two workers run the
tests, each in its own copy of the repository. A worker imports torch once and forks per mutant.
"""

import argparse
import ast
import copy
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# For sitecustomize.py: subprocesses of tests must import the copy too, not the installed package
SITE = """import sys
for module in list(sys.modules.values()):
    if "minipeft" in getattr(module, "MAPPING", {}):  # an editable installation
        module.MAPPING = {"minipeft": "COPY/minipeft", "minipeft.data": "COPY/data"}
"""
STARTS = ("subprocess.Popen", "os.fork")  # audit events
SLOW_IMPORTS = (
    "torch._dynamo", "torch.utils.checkpoint", "safetensors.torch", "tokenizers", "huggingface_hub",
    "matplotlib.pyplot", "hypothesis",
)  # fmt: skip
OPERATORS = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Add: [ast.Sub],
    ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult, ast.FloorDiv],
    ast.FloorDiv: [ast.Div], ast.Mod: [ast.Mult], ast.Pow: [ast.Mult], ast.BitOr: [ast.BitAnd],
    ast.BitAnd: [ast.BitOr], ast.And: [ast.Or], ast.Or: [ast.And], ast.MatMult: [],
}  # fmt: skip
# Calls that may be left out: x.clone() becomes x, and sorted(x) becomes x
METHODS = ("clone", "detach", "contiguous", "to", "float", "eval", "train", "copy", "abs")
FUNCTIONS = ("sorted", "list", "tuple", "dict", "set", "int", "float", "str", "abs", "len")


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What may be mutated: no docstrings, annotations, demos or parts of f-strings."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    demo = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    if docstring or demo:
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns") and not isinstance(node, ast.JoinedStr):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from nodes(child)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that can replace this one."""

    def new(**fields) -> ast.AST:
        changed = copy.copy(node)
        vars(changed).update(fields)
        return changed

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in OPERATORS[type(op)]:
                    yield new(ops=[*ops[:i], other(), *ops[i + 1 :]])
        case ast.BinOp(left=left, right=right, op=op):
            yield from (new(op=other()) for other in OPERATORS[type(op)])
            yield from (left, right, new(left=right, right=left))
        case ast.BoolOp(values=values, op=op):
            yield from (new(op=OPERATORS[type(op)][0]()), *values)
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.JoinedStr() | ast.Constant(value=str()):
            yield ast.Constant("XX")
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(value=float(value)):
            yield from (ast.Constant(2 * value or 1.0), ast.Constant(value / 2))
        case ast.Slice():
            yield from (new(**{part: None}) for part in ("lower", "upper", "step"))
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Assign() | ast.Delete() | ast.Break() | ast.Continue():
            yield ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.AugAssign(op=op):
            yield from (ast.Pass(), *(new(op=other()) for other in OPERATORS[type(op)]))
        case ast.Call(func=function, args=args, keywords=keywords):
            if len(args) + len(keywords) > 1:
                yield from (new(args=args[:i] + args[i + 1 :]) for i in range(len(args)))
                for i in range(len(keywords)):
                    yield new(keywords=keywords[:i] + keywords[i + 1 :])
            for i in range(len(args) - 1):
                yield new(args=[*args[:i], args[i + 1], args[i], *args[i + 2 :]])
            name = ast.unparse(function).rpartition(".")[2]
            if isinstance(function, ast.Attribute) and name in METHODS:
                yield function.value
            if len(args) == 1 and ("dropout" in name or name in FUNCTIONS):
                yield args[0]
    if hasattr(node, "is_condition"):
        yield ast.UnaryOp(ast.Not(), node)


def mutants(file: str) -> Iterator[list[dict]]:
    """For every place in a file that can be changed: its changes, with positions in bytes."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    firsts = {f: min(n.lineno for n in (f, *f.decorator_list)) for f in functions}
    for node in nodes(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            node.test.is_condition = True
        inside = [
            f"{file}:{first}"
            for f, first in firsts.items()
            if first <= getattr(node, "lineno", 0) <= f.end_lineno
        ]

        def mutant(where: ast.AST, new: str, before: int = 0, inside=inside) -> dict:
            start = starts[where.lineno - 1] + where.col_offset - before
            end = starts[where.end_lineno - 1] + where.end_col_offset
            return {
                "file": file, "line": where.lineno, "start": start, "end": end, "new": new,
                "old": source[start:end].decode(), "calls": inside or [file],
            }  # fmt: skip

        found = [mutant(d, "", 1) for d in getattr(node, "decorator_list", [])]  # with the @
        for changed in changes(node):
            text = ast.unparse(changed)
            expression = isinstance(node, ast.expr) and not isinstance(node, ast.Slice)
            found.append(mutant(node, f"({text})" if expression else text))
        if found:
            yield found


def key(m: dict) -> tuple:
    return m["file"], m.get("old"), m["new"], m["start"]


def is_valid(m: dict) -> bool:
    """Whether the mutant is Python, and another program than the original."""
    source = (ROOT / m["file"]).read_bytes()
    try:
        tree = ast.parse(source[: m["start"]] + m["new"].encode() + source[m["end"] :])
    except SyntaxError:
        return False
    return ast.dump(tree) != ast.dump(ast.parse(source))


def draw(files: list[str], count: int, seed: int, log: list[dict]) -> list[dict]:
    """`count` mutants, at most one of each place, none that the log has from another seed."""
    rng = random.Random(seed)
    others = {key(m) for m in log if m["seed"] != seed}
    places = [place for file in sorted(files) for place in mutants(file)]
    drawn = []
    for place in rng.sample(places, len(places)):
        options = rng.sample(place, len(place))
        m = next((m for m in options if key(m) not in others and is_valid(m)), None)
        if m is not None:
            drawn.append(m | {"seed": seed})
        if len(drawn) == count:
            break
    return drawn


class Recorder:
    """A pytest plugin that records which functions of the package every test calls."""

    def __init__(self):
        self.calls: dict[str, list[str]] = {}
        self.shared: dict[str, set] = {}  # calls of fixtures that several tests use, by folder
        self.seen: set[str] = set()
        self.failed: set[str] = set()
        self.package = os.path.abspath("minipeft")
        sys.settrace(self.trace)
        sys.addaudithook(lambda name, _: self.seen.add("subprocess") if name in STARTS else None)

    def trace(self, frame, event, argument):
        code = frame.f_code
        if code.co_filename.startswith(self.package):
            self.seen.add(f"{os.path.relpath(code.co_filename)}:{code.co_firstlineno}")

    def pytest_collection_finish(self):
        self.calls["import"] = sorted(self.seen)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seen = set()
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        result = yield
        sys.settrace(None)
        self.calls[item.nodeid] = sorted(self.seen)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        outside, self.seen = self.seen, set()
        result = yield
        if fixturedef.scope != "function":
            self.shared.setdefault(fixturedef.baseid, set()).update(self.seen)
        self.seen |= outside
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:  # too slow while it is traced, for example
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        print("not used, because they fail while they are recorded:", *self.failed, sep="\n")
        self.calls = {t: called for t, called in self.calls.items() if t not in self.failed}
        for test, calls in self.calls.items():  # with the entry "import", before the first test
            used = [more for folder, more in self.shared.items() if test.startswith(folder)]
            self.calls[test] = sorted(set(calls).union(*used))
        Path("calls.json").write_text(json.dumps(self.calls))


class Chosen:
    """A pytest plugin that runs these tests only."""

    def __init__(self, tests: set[str]):
        self.tests = tests

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.tests]


def run_tests(files: list[str], limit: float, plugin=None) -> tuple[str, str]:
    """Run pytest on these files in a fork: passed, failed or timeout, and the line that says so."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 99
        try:
            options = [
                "--tb=no" if isinstance(plugin, Recorder) else "-x",
                "-p",
                "no:cacheprovider",
                "-rfE",
            ]
            code = pytest.main([*options, *files], [plugin] if plugin else [])
        finally:
            os._exit(int(code))
    until, code = time.time() + limit, None
    while code is None and time.time() < until:
        time.sleep(0.05)
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
    if code is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "timeout", files[0]
    output = Path("output.txt").read_text(errors="replace")
    assert code != 4 or "while loading conftest" in output, output  # 4: pytest was called wrongly
    lines = output.splitlines()
    said = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    return "passed" if code == 0 else "failed", "".join(said)[:200]


def choose(m: dict, calls: dict[str, list[str]], imported: set[str]) -> tuple[set[str], list[str]]:
    """The tests that may notice a mutant, and their files, the most likely ones first."""
    if ":" in m["calls"][-1] and not imported & set(m["calls"]):
        hits = [test for test, called in calls.items() if set(called) & set(m["calls"])]
    else:
        hits = [
            t for t, called in calls.items() if any(one.startswith(m["file"]) for one in called)
        ]
    tests = set(hits) | {test for test, called in calls.items() if "subprocess" in called}
    stem = Path(m["file"]).stem
    counts = Counter(test.split("::")[0] for test in hits)
    files = sorted({test.split("::")[0] for test in tests}, key=lambda f: -counts[f])
    return tests, sorted(files, key=lambda f: stem not in f)


def work(number: int, arguments) -> None:
    """One worker, in its copy of the repository."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    skipped = ("conformance", "gpu", "fuzz", "stateful")  # transformers; too slow when traced
    files = [str(f) for f in sorted(Path("tests").glob("test_*.py"))]
    files = [file for file in files if not any(word in file for word in skipped)]
    recorded = arguments.log.with_suffix(".calls")
    if arguments.record:
        run_tests(files, 1500, Recorder())
        print(Path("output.txt").read_text())
        return recorded.write_bytes(Path("calls.json").read_bytes())
    calls = json.loads(recorded.read_text())
    imported = set(calls.pop("import"))
    log = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    drawn = draw(arguments.files, arguments.count, arguments.seed, log)
    done = {key(m) for m in log}
    canary = {"file": "minipeft/__init__.py", "start": 0, "end": 0, "new": "raise KeyError\n"}
    for m in [canary | {"calls": ["minipeft/__init__.py"]}, *drawn[number::2]]:
        if key(m) in done:
            continue
        target, began = Path(m["file"]), time.time()
        source = (ROOT / target).read_bytes()
        target.write_bytes(source[: m["start"]] + m["new"].encode() + source[m["end"] :])
        shutil.rmtree(target.parent / "__pycache__", ignore_errors=True)  # same size, same second
        tests, where = choose(m, calls, imported)
        result, by = run_tests(where, 400, Chosen(tests))
        target.write_bytes(source)
        shutil.rmtree(target.parent / "__pycache__", ignore_errors=True)
        if "seed" not in m:
            assert result == "failed", "the tests do not import the copy"
            continue
        result = {"passed": "survived", "failed": "killed"}.get(result, result)
        row = m | {"result": result, "by": by, "seconds": round(time.time() - began, 1)}
        with arguments.log.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=lambda path: Path(path).resolve())
    parser.add_argument("files", nargs="+")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    arguments.log.touch()
    if arguments.worker is not None:
        return work(arguments.worker, arguments)
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for number in range(2):
            copy = Path(folder) / str(number)
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            (copy / "sitecustomize.py").write_text(SITE.replace("COPY", str(copy)))
            environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--worker", str(number)]
            start = {"cwd": copy, "env": environment}
            if not arguments.log.with_suffix(".calls").exists():
                subprocess.run([*command, "--record"], check=True, **start)
            workers.append(subprocess.Popen(command, **start))
        for worker in workers:
            worker.wait()
    rows = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    rows = [row for row in rows if row["seed"] == arguments.seed]
    survived = [row for row in rows if row["result"] == "survived"]
    print(f"{len(rows)} drawn, {len(rows) - len(survived)} killed")
    for row in sorted(survived, key=lambda row: (row["file"], row["line"])):
        print(f"{row['file']}:{row['line']}: {row['old']} -> {row['new']}")


if __name__ == "__main__":
    main()
