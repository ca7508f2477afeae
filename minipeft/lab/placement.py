"""What an adapter could be put on, in any model."""

from torch import nn

from minipeft.peft_model import find_targets


def list_targets(model: nn.Module) -> list[dict]:
    """A row for each kind of linear layer but the output head: name, count, in, out, parameters.

    A kind is the end of a module's name: as an entry of `target_modules` it matches them all.
    """
    rows: dict[tuple, dict] = {}
    for name, layer in find_targets(model, "all-linear").items():
        out_features, in_features = layer.weight.shape
        if type(layer).__name__ == "Conv1D":  # transformers' GPT-2 stores (in, out)
            in_features, out_features = out_features, in_features
        key = (".".join(name.split(".")[-2:]), in_features, out_features)
        row = rows.setdefault(
            key, {"name": key[0], "count": 0, "in": in_features, "out": out_features}
        )
        row["count"] += 1
        row["parameters"] = row["count"] * in_features * out_features
        row["rank 1 adapters"] = row["count"] * (in_features + out_features)
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else value for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
