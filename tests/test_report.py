"""Tables and figures."""

import pytest

from minipeft.lab import compare, report
from minipeft.lab.finetune import Record
from minipeft.lab.recipes import RECIPES
from minipeft.lab.tasks import Task


def test_a_markdown_table():
    table = report.markdown_table(["size", "loss"], [[8, 0.5], ["–", "**0.25**"]])
    assert table == "| size | loss |\n| --- | --- |\n| 8 | 0.5 |\n| – | **0.25** |"
    assert report.markdown_table(iter(["a"]), iter([])) == "| a |\n| --- |"


@pytest.mark.parametrize(
    ("values", "half_width"),
    [
        ([0.7], 0.0),
        ([0.0, 1.0], 12.706 * 0.707107 / 1.414214),  # t(1) s / √2
        ([1.0, 2.0, 3.0], 4.303 * 1.0 / 1.732051),  # t(2) s / √3
        ([1.0, 2.0, 3.0, 4.0], 3.182 * 1.290994 / 2),  # t(3) s / √4
        ([5.0] * 5, 0.0),
        (list(range(1, 11)), 2.262 * 3.027650 / 3.162278),  # t(9) s / √10
    ],
)
def test_the_interval_is_half_the_width_of_a_95_percent_t_interval(values, half_width):
    assert report.interval(values) == pytest.approx(half_width, rel=2e-3)


def test_rows_have_readable_names_and_their_methods_color():
    assert report.name_of("prompt_tuning") == "prompt tuning"
    assert report.name_of("lora") == "LoRA"
    assert report.name_of("lora, attention") == "LoRA, attention"
    assert report.name_of("mine") == "mine"
    assert set(report.NAMES) == set(report.COLORS) - {compare.RANDOM} == set(RECIPES)
    assert report.color_of("lora, attention") == report.COLORS["lora"] != report.COLORS["full"]


def test_a_figure_is_shown_with_its_alt_text_also_before_pyplot_is_imported(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.delattr("matplotlib.pyplot", raising=False)
    report.show(report.panels(2, 2, 1, 1)[0], "an empty panel")
    assert shown[0].alt == "an empty panel"


def records(method: str, scores: list[float], **changes) -> list[Record]:
    common = {"base": "1m", "task": "toy", "steps": 10, "n_train": 4, "trainable": 1_000}
    common |= {"weight_bytes": 4_000, "test_loss": 1.0} | changes
    curve = [{"step": 0, "loss": 4.0}, {"step": 10, "loss": 1.0}]
    return [
        Record(method, seed=seed, score=score, validation=curve, **common)
        for seed, score in enumerate(scores)
    ]


TOY = Task("toy", [], [], [])


def test_the_comparison_has_a_log_axis_and_readable_names():
    found = records("frozen", [0.1]) + records("prompt_tuning", [0.3, 0.5]) + records("full", [0.9])
    figure = report.compare_figure(compare.rows(found), TOY)
    left, right = figure.axes
    assert left.get_yscale() == "log"
    assert left.get_ylabel() == "validation loss on completions (nats per token)"
    names = ["frozen base", "prompt tuning", "full"]
    assert [label.get_text() for label in right.get_yticklabels()] == names
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.1, 0.4, 0.9])
    assert "2 seeds, 95 % t intervals" in right.get_xlabel()


def test_dollar_signs_in_a_tasks_name_are_no_formula(tmp_path):
    found = records("lora", [0.5])
    task = Task("a$\\b$", [], [], [])
    figure = report.compare_figure(compare.rows(found), task)
    report.save_figure(figure, tmp_path / "a.png")
    assert figure.get_suptitle() == "Task a$\\b$: 10 steps"
    points = [{"learning_rate": rate, "loss": rate} for rate in (1.0, 2.0, 4.0)]
    entry = {"method": "lora", "random_base": False, "base": "$\\b$", "task": "$", "steps": 1}
    entry |= {"examples": 4, "size": 8, "best": 1.0, "points": points}
    report.save_figure(report.sweep_figure([entry]), tmp_path / "b.png")


def test_error_bars_are_the_interval_cut_at_0_and_1():
    found = records("full", [0.8, 0.9, 1.0]) + records("lora", [0.50, 0.51, 0.52])
    figure = report.compare_figure(compare.rows(found), TOY)
    full, lora = (lines.get_segments()[0] for lines in figure.axes[1].collections)
    half = report.interval([0.50, 0.51, 0.52])
    assert [x for x, _ in lora] == pytest.approx([0.51 - half, 0.51 + half])
    assert full[1][0] == pytest.approx(1.0)  # 0.9 + 0.25 would be impossible


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_are_written_with_one_seed_and_with_rows_of_unequal_seeds(tmp_path, seeds):
    found = records("frozen", [0.0]) + records(
        "lora", [1.0] * seeds, ranks={"transformer.h.0.mlp.c_fc": 1}
    )
    compare.save(found, TOY, tmp_path / "new" / "folder")
    for name in ("compare.png", "ranks.png"):
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")
    figure = report.compare_figure(compare.rows(found), TOY)
    expected = "one seed" if seeds == 1 else "3 seeds"
    assert expected in figure.axes[1].get_xlabel()


def test_the_comparison_table_has_names_spreads_and_no_empty_columns():
    found = records("frozen", [0.25], forgetting={"base": 1.0})
    found += records(
        "prompt_tuning", [0.5, 0.7], learning_rate=0.02, disk_bytes=2_000, seconds_per_step=0.5,
        forgetting={"base": 1.0, "start": 1.5, "on": 3.25, "off": 1.0},
    )  # fmt: skip
    found += records(
        "full", [1.0, 1.0], learning_rate=0.001, disk_bytes=4_000, seconds_per_step=0.25,
        forgetting={"base": 1.0, "start": 1.0, "on": 2.0},
    )  # fmt: skip
    assert compare.table(found, TOY).splitlines() == [
        "| method | lr | trainable | weights, kB | disk, kB | s / step "
        "| validation loss | exact match | share of gap | forgetting at step 0 | forgetting "
        "| adapter off |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| frozen base | – | 1,000 | 4 | – | – | 1.000 | 0.250 | 0.00 | – | – | – |",
        "| prompt tuning | 0.02 | 1,000 | 4 | 2 | 0.500 | 1.000 | 0.600 ± 0.141 | 0.47 "
        "| +0.50 | +2.25 | +0.00 |",
        "| full | 0.001 | 1,000 | 4 | 4 | 0.250 | 1.000 | 1.000 ± 0.000 | 1.00 "
        "| +0.00 | +1.00 | – |",
    ]


def test_a_sweep_without_any_finite_loss_in_a_row_is_drawn():
    points = [{"learning_rate": rate, "loss": rate} for rate in (1.0, 2.0, 4.0)]
    entry = {"method": "lora", "random_base": False, "base": "1m", "task": "toy", "steps": 1}
    entry |= {"examples": 4, "size": 8, "best": 1.0, "points": points}
    diverged = entry | {
        "size": 2,
        "points": [{"learning_rate": p["learning_rate"]} for p in points],
    }
    (axis,) = report.sweep_figure([entry, diverged]).axes
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert axis.get_legend_handles_labels()[1] == ["size 8", "size 2"]
