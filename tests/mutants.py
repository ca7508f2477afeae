"""Change one thing in the package at random, run the default tests, and see whether they notice.

python tests/mutants.py LOG --count 200 --seed 1 minipeft/methods/lora.py …

Every mutant is one line of LOG: killed, survived or timeout. A run continues where the last one
stopped, and draws no mutant that LOG has from another seed. Two workers run the tests, each in its
own copy of the repository, which the subprocesses of tests see too. A worker imports torch only
once and forks for each mutant. Text of error messages is replaced as a whole.
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
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = {  # the tests most likely to notice, by module; test_MODULE.py is always one of them
    "adalora": ["methods"], "p_tuning": ["methods"], "prefix_tuning": ["methods"],
    "prompt_tuning": ["methods"],
    "bitfit": ["more_methods"], "bottleneck": ["more_methods"],
    "adapters": ["methods", "peft_model"], "prompt_adapter": ["methods"],
    "evaluate": ["lab", "finetune"], "train": ["checkpoint", "lab"], "saving": ["bad_folders"],
}  # fmt: skip
# The subprocesses of tests must import the copy too, not the installed package
SITE = """import sys
for module in list(sys.modules.values()):
    if "minipeft" in getattr(module, "MAPPING", {}):  # an editable installation
        module.MAPPING = {"minipeft": "COPY/minipeft", "minipeft.data": "COPY/data"}
"""
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
    for node in nodes(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            node.test.is_test = True
        if not hasattr(node, "lineno"):
            continue
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        old = source[start:end].decode()
        found = []
        for new in dict.fromkeys(changes(node)):
            try:
                ast.parse(source[:start] + new.encode() + source[end:])
            except SyntaxError:
                continue
            where = {"file": file, "line": node.lineno, "start": start, "end": end}
            found.append(where | {"kind": type(node).__name__, "old": old, "new": new})
        for decorator in getattr(node, "decorator_list", []):
            a = starts[decorator.lineno - 1] + decorator.col_offset - 1
            b = starts[decorator.end_lineno - 1] + decorator.end_col_offset
            where = {"file": file, "line": decorator.lineno, "start": a, "end": b}
            found.append(where | {"kind": "decorator", "old": source[a:b].decode(), "new": ""})
        if found:
            yield found


def key(m: dict) -> tuple:
    return m["file"], m["old"], m["new"], m["start"]


def draw(files: list[str], count: int, seed: int, log: list[dict]) -> list[dict]:
    """`count` mutants, one of each place, none that the log has from another seed."""
    rng = random.Random(seed)
    places = [place for file in sorted(files) for place in mutants(file)]
    drawn = [rng.choice(place) for place in rng.sample(places, len(places))]
    others = {key(m) for m in log if m["seed"] != seed}
    return [m | {"seed": seed} for m in drawn if key(m) not in others][:count]


def run_tests(files: list[str], limit: float) -> tuple[str, str]:
    """Run pytest on these files in a fork: passed, failed or timeout, and the line that says so."""
    import pytest

    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 99
        try:
            code = pytest.main(["-x", "--tb=no", "-p", "no:cacheprovider", "-rfE", *files])
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


def work(number: int, arguments) -> None:
    """One worker, in its copy of the repository."""
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    tests = {
        file: file.read_text()
        for file in Path("tests").glob("test_*.py")
        if "conformance" not in file.name and "gpu" not in file.name
    }
    log = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    drawn = draw(arguments.files, arguments.count, arguments.seed, log)
    done = {key(m) for m in log}
    canary = {"file": "minipeft/__init__.py", "start": 0, "end": 0, "new": "raise KeyError\n"}
    for m in [canary, *drawn[number::2]]:
        if m is not canary and key(m) in done:
            continue
        stem = Path(m["file"]).stem
        likely = [Path(f"tests/test_{name}.py") for name in (stem, *FIRST.get(stem, []))]
        likely = [file for file in likely if file in tests] or [Path("tests/test_lora.py")]
        rest = sorted(set(tests) - set(likely), key=lambda f: -tests[f].count(stem))
        target, began = Path(m["file"]), time.time()
        source = (ROOT / target).read_bytes()
        target.write_bytes(source[: m["start"]] + m["new"].encode() + source[m["end"] :])
        shutil.rmtree(target.parent / "__pycache__", ignore_errors=True)  # same size, same second
        result, by = run_tests([*map(str, likely)], 150)
        if result == "passed":
            result, by = run_tests([*map(str, rest)], 400)
        target.write_bytes(source)
        shutil.rmtree(target.parent / "__pycache__", ignore_errors=True)
        if m is canary:
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
            workers.append(subprocess.Popen(command, cwd=copy, env=environment))
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
