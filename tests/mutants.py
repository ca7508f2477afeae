"""Change one thing in the package at random, run the default tests, and see whether they notice.

python tests/mutants.py LOG --count 200 --seed 1 minipeft/methods/lora.py …

Every mutant is one line of LOG: killed, survived or timeout. A run continues where the last one
stopped, and draws no mutant that LOG has from another seed. First, all tests run once to record
which functions each of them calls (LOG.calls): a mutant is only tried on the tests that call its
function, and on those that start other processes. Two workers run the tests, each in its own copy
of the repository, which subprocesses see too. A worker imports torch once and forks per mutant.
"""

import argparse
import ast
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
# The subprocesses of tests must import the copy too, not the installed package
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
SWAPPED = {
    ast.Lt: "<= >", ast.LtE: "< >=", ast.Gt: ">= <", ast.GtE: "> <=", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is_not", ast.IsNot: "is", ast.In: "not_in", ast.NotIn: "in", ast.Add: "-",
    ast.Sub: "+", ast.Mult: "/", ast.Div: "* //", ast.FloorDiv: "/", ast.Mod: "*", ast.Pow: "*",
    ast.BitOr: "&", ast.BitAnd: "|", ast.And: "or", ast.Or: "and",
}  # fmt: skip

METHODS_TO_DROP = ("clone", "detach", "contiguous", "to", "float", "eval", "train", "copy", "abs")
FUNCTIONS_TO_DROP = ("sorted", "list", "tuple", "dict", "set", "int", "float", "str", "abs", "len")


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What may be mutated: no docstrings, annotations, demos or texts inside f-strings."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from nodes(child)


def changes(node: ast.AST) -> Iterator[str]:
    """The sources that can replace this node."""
    text = ast.unparse
    if isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
        for i, op in enumerate(node.ops):
            for new in SWAPPED[type(op)].split():
                pairs = zip(node.ops, map(text, parts[1:]), strict=True)
                signs = [new.replace("_", " ") if k == i else None for k in range(len(parts) - 1)]
                yield (
                    f"({text(parts[0])} "
                    + " ".join(
                        f"{sign or sign_of(old)} ({right})"
                        for sign, (old, right) in zip(signs, pairs, strict=True)
                    )
                    + ")"
                )
    elif isinstance(node, ast.BinOp):
        left, right = text(node.left), text(node.right)
        for new in SWAPPED.get(type(node.op), "").split():
            yield f"(({left}) {new} ({right}))"
        if isinstance(node.op, ast.MatMult):
            yield f"(({right}) @ ({left}))"
        yield from (f"({left})", f"({right})")
    elif isinstance(node, ast.BoolOp):
        values = [f"({text(value)})" for value in node.values]
        yield "(" + f" {SWAPPED[type(node.op)]} ".join(values) + ")"
        yield from values
    elif isinstance(node, ast.UnaryOp):
        yield f"({text(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield from (f"({text(node.body)})", f"({text(node.orelse)})")
    elif isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    ):
        yield '"XX"'
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (f"({node.value + 1})", f"({node.value - 1})")
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield from (f"({2 * node.value or 1.0})", f"({node.value / 2})")
    elif isinstance(node, ast.Slice):
        for part in ("lower", "upper", "step"):
            if getattr(node, part) is not None:
                yield text(ast.Slice(**{**vars(node), part: None}))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "return None"
    elif isinstance(node, (ast.Assign, ast.Raise, ast.Break, ast.Continue, ast.Delete)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "pass"
    elif isinstance(node, ast.AugAssign):
        yield "pass"
        for new in SWAPPED.get(type(node.op), "").split():
            yield f"{text(node.target)} {new}= {text(node.value)}"
    elif isinstance(node, ast.Call):
        args, function = [*node.args, *node.keywords], text(node.func)
        if len(args) > 1:
            for i in range(len(args)):
                yield f"{function}({', '.join(map(text, args[:i] + args[i + 1 :]))})"
        for i in range(len(node.args) - 1):
            swapped = [*args[:i], args[i + 1], args[i], *args[i + 2 :]]
            yield f"{function}({', '.join(map(text, swapped))})"
        name = function.rpartition(".")[2]
        if isinstance(node.func, ast.Attribute) and name in METHODS_TO_DROP:
            yield f"({text(node.func.value)})"
        if len(node.args) == 1 and ("dropout" in name or name in FUNCTIONS_TO_DROP):
            yield f"({text(node.args[0])})"
    if isinstance(node, (ast.Call, ast.Compare, ast.BoolOp, ast.Name)) and hasattr(node, "is_test"):
        yield f"(not ({text(node)}))"


def sign_of(op: ast.cmpop) -> str:
    return ast.unparse(ast.Compare(ast.Name("a"), [op], [ast.Name("b")]))[2:-2]


def mutants(file: str) -> Iterator[list[dict]]:
    """For every place in a file that can be changed, the changes as (start, end, new) in bytes."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    firsts = {f: min(n.lineno for n in (f, *f.decorator_list)) for f in functions}
    for node in nodes(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            node.test.is_test = True
        if not hasattr(node, "lineno"):
            continue
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = source[start:end].decode()
        inside = [first for f, first in firsts.items() if first <= node.lineno <= f.end_lineno]
        found = []
        for new in dict.fromkeys(changes(node)):
            try:
                ast.parse(source[:start] + new.encode() + source[end:])
            except SyntaxError:
                continue
            where = {"file": file, "line": node.lineno, "start": start, "end": end}
            where["calls"] = [f"{file}:{first}" for first in inside] or [file]
            found.append(where | {"kind": type(node).__name__, "old": old, "new": new})
        for decorator in getattr(node, "decorator_list", []):
            a = starts[decorator.lineno - 1] + decorator.col_offset - 1
            b = starts[decorator.end_lineno - 1] + decorator.end_col_offset
            where = {"file": file, "line": decorator.lineno, "start": a, "end": b}
            where["calls"] = [f"{file}:{first}" for first in inside] or [file]
            found.append(where | {"kind": "decorator", "old": source[a:b].decode(), "new": ""})
        if found:
            yield found


def key(m: dict) -> tuple:
    return m["file"], m.get("old"), m["new"], m["start"]


def draw(files: list[str], count: int, seed: int, log: list[dict]) -> list[dict]:
    """`count` mutants, one of each place, none that the log has from another seed."""
    rng = random.Random(seed)
    places = [place for file in sorted(files) for place in mutants(file)]
    drawn = [rng.choice(place) for place in rng.sample(places, len(places))]
    others = {key(m) for m in log if m["seed"] != seed}
    return [m | {"seed": seed} for m in drawn if key(m) not in others][:count]


class Recorder:
    """A pytest plugin that records which functions of the package every test calls."""

    def __init__(self):
        self.calls: dict[str, list[str]] = {}
        self.shared: dict[str, set] = {}  # calls of fixtures that several tests use, by folder
        self.seen: set[str] = set()
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

    def pytest_sessionfinish(self):
        for test, calls in self.calls.items():
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
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 99
        try:
            options = ["-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:nbmake", "-rfE"]
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
    lines = Path("output.txt").read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    return "passed" if code == 0 else "failed", "".join(said)[:200]


def choose(m: dict, calls: dict[str, list[str]]) -> tuple[set[str], list[str]]:
    """The tests that may notice a mutant, and their files, the most likely ones first."""
    imported = set(calls["import"])  # what runs then may matter to every test of the file
    calls = {test: called for test, called in calls.items() if test != "import"}
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
    skipped = ("conformance", "gpu")  # they import transformers
    files = [str(f) for f in sorted(Path("tests").glob("test_*.py"))]
    files = [file for file in files if not any(word in file for word in skipped)]
    recorded = arguments.log.with_suffix(".calls")
    if arguments.record:
        assert run_tests(files, 1000, Recorder())[0] == "passed", "the tests must pass first"
        return recorded.write_bytes(Path("calls.json").read_bytes())
    calls = json.loads(recorded.read_text())
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
        tests, where = choose(m, calls)
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
