"""From a reference file to a student's file, and back: holes are cut out of the source text.

The reference has no marks. `holes/METHOD.json` lists its holes: a symbol, and how the first and the
last statement of the hole start. Python's `ast` only finds their lines.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Hole:
    """A task: some statements of a function that the student writes."""

    name: str
    symbol: str  # "LoraLinear.forward"
    first: str  # how the first statement starts
    last: str  # how the last one starts
    equation: str  # what to write; the text of the NotImplementedError
    hints: tuple[str, str, str]  # each tells more than the one before

    def text(self) -> str:
        """The text that replaces the statements in the skeleton."""
        return f'raise NotImplementedError(\n    "{self.equation}"\n)'


@dataclass(frozen=True)
class Given:
    """A table that is built at import: the skeleton has its values instead of the call."""

    statement: str  # how the statement starts
    text: str  # its replacement in the skeleton


def reference(method: str) -> Path:
    """The file that a skeleton is cut from."""
    return HERE / "training.py" if method == "training" else HERE.parent / f"methods/{method}.py"


def load(method: str) -> tuple[list[Hole], list[Given]]:
    """A method's holes, from easy to hard, and its tables."""
    file = HERE / "holes" / f"{method}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.json")))
        raise ValueError(f"there is no skeleton of {method!r:.100}; there are {known}")
    found = json.loads(file.read_text())
    holes = [Hole(**hole | {"hints": tuple(hole["hints"])}) for hole in found["holes"]]
    return holes, [Given(**given) for given in found.get("given", [])]


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions and methods by their dotted names."""
    found = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = node
            elif isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return found


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The lists of statements in a function, from the outside in."""
    for child in ast.walk(node):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(child, name, None), list):
                yield statements


def find(source: str, statements: list[ast.stmt], first: str, last: str) -> tuple[int, int] | None:
    """The lines from one statement to another one: [start, end), counted from 0."""
    lines = source.splitlines()

    def starts(node: ast.stmt, text: str) -> bool:
        return lines[node.lineno - 1].strip().startswith(text)

    begin = [i for i, node in enumerate(statements) if starts(node, first)]
    if not begin:
        return None
    end = [node for node in statements[begin[0] :] if starts(node, last)]
    return (statements[begin[0]].lineno - 1, end[0].end_lineno) if end else None


def spans(source: str, holes: list[Hole], given: list[Given]) -> list[tuple[int, int, str]]:
    """Where holes and tables are, in order: start, end, and the text that replaces them.

    Raises ValueError for a hole that is not in the source.
    """
    tree = ast.parse(source)
    known, found = functions(tree), []
    wanted = [(h.first, h.last, list(blocks(known[h.symbol])), h.text()) for h in holes]
    wanted += [(g.statement, g.statement, [tree.body], g.text) for g in given]
    for first, last, where, text in wanted:
        places = [span for block in where if (span := find(source, block, first, last))]
        if len(places) != 1:
            raise ValueError(f"{len(places)} places start with {first!r} and {last!r}: must be 1")
        found.append((*places[0], text))
    return sorted(found)


def cut(source: str, holes: list[Hole], given: list[Given]) -> tuple[str, list[str]]:
    """The skeleton of a source, and the texts that were cut out."""
    lines, out, pieces, at = source.splitlines(keepends=True), [], [], 0
    for start, end, text in spans(source, holes, given):
        indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
        out += lines[at:start] + [f"{indent}{line}\n" for line in text.splitlines()]
        pieces.append("".join(lines[start:end]))
        at = end
    return "".join(out + lines[at:]), pieces


def fill(skeleton: str, pieces: list[str], holes: list[Hole], given: list[Given]) -> str:
    """Put texts into the holes of a skeleton, in the order of the file: the opposite of `cut`."""
    marks = [mark.splitlines() for mark in [h.text() for h in holes] + [g.text for g in given]]
    lines, out, rest, at = skeleton.splitlines(keepends=True), [], list(pieces), 0
    while at < len(lines):
        here = next((m for m in marks if _is_at(m, lines, at)), None)
        out.append(rest.pop(0) if here else lines[at])
        at += len(here) if here else 1
    return "".join(out)


def _is_at(mark: list[str], lines: list[str], at: int) -> bool:
    """Whether the lines at this place are those of the mark, with any indentation."""
    return [line.strip() for line in mark] == [line.strip() for line in lines[at : at + len(mark)]]


def start(method: str, folder: Path) -> Path:
    """Write a student's file. Raises ValueError if there is one already."""
    holes, given = load(method)
    file = folder / f"{method}.py"
    if file.exists():
        raise ValueError(f"{file} exists already: it is not overwritten")
    from minipeft.files import write_text  # imports torch, which a hint does not need

    text, _ = cut(reference(method).read_text(encoding="utf-8"), holes, given)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return file


def hint(method: str, task: str, number: int) -> str:
    """A hint for a task, which is a hole's name or number."""
    holes, _ = load(method)
    names = {h.name: h for h in holes} | {str(i): h for i, h in enumerate(holes, 1)}
    if task not in names:
        tasks = ", ".join(f"{i} {h.name}" for i, h in enumerate(holes, 1))
        raise ValueError(f"{method} has no task {task!r:.100} with hints; it has {tasks}")
    if not 1 <= number <= 3:
        raise ValueError(f"there are three hints, got {number}")
    hole = names[task]
    return f"{hole.symbol}: {hole.equation}\nhint {number} of 3: {hole.hints[number - 1]}"


def tree_with(method: str, student: ast.Module, symbol: str) -> ast.Module | None:
    """The reference with one function of the student's in it, and with everything that it may call:
    the student's additional functions, classes and imports. None if the student has no such
    function."""
    theirs = functions(student)
    if symbol not in theirs:
        return None
    tree = ast.parse(reference(method).read_text(encoding="utf-8"))
    known = {name for node in tree.body for name in names(node)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    added = [
        node for node in student.body
        if not known.intersection(names(node)) and getattr(node, "module", "") != "__future__"
    ]  # fmt: skip
    *owner, _ = symbol.split(".")
    target = classes[owner[0]].body if owner else tree.body
    mine = functions(tree)[symbol]
    target[target.index(mine)] = theirs[symbol]
    if owner:
        their_class = next(
            node for node in student.body
            if isinstance(node, ast.ClassDef) and node.name == owner[0]
        )  # fmt: skip
        have = {name for node in target for name in names(node)}
        target += [node for node in their_class.body if not have.intersection(names(node))]
    imports = [i for i, node in enumerate(tree.body) if isinstance(node, IMPORTS)]
    tree.body[imports[-1] + 1 : imports[-1] + 1] = added
    return tree


def names(node: ast.stmt) -> set[str]:
    """The names that a statement defines. A docstring and a demo define none that matter."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, IMPORTS):
        return {alias.asname or alias.name for alias in node.names}
    return {""}


def stored(method: str) -> dict:
    """Values from Hugging Face peft or bitsandbytes, which `minipeft.grader.values` wrote."""
    return json.loads((HERE / "values" / f"{method}.json").read_text())
