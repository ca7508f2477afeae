"""Tables and figures of the experiments: results/*.jsonl -> RESULTS.md and results/*.png.

python -m data.results  # a few seconds
"""

from matplotlib.figure import Figure

from minipeft.files import write_text
from minipeft.lab import report

from .choosing import edges, operating_points, points
from .experiments import RESULTS, load

PAGE = RESULTS.parent / "RESULTS.md"
NAMES = report.NAMES | {"adalora, no penalty": "AdaLoRA, no penalty"}
COLORS = report.COLORS | {"adalora, no penalty": "#b2653f"}


def order(point: dict) -> tuple:
    """The place of a method in tables; variants follow their method."""
    method, *variant = point["method"].split(", ")
    return list(COLORS).index(method), variant


# --- score against forgetting ---


def forgetting_table(found: list[dict]) -> str:
    """Two lines per method: the operating point without decay, and with it."""
    plain, decayed = operating_points(found, False), operating_points(found, True)
    lines = []
    for pair in sorted(zip(plain, decayed, strict=True), key=lambda pair: order(pair[0])):
        for name, point in zip((NAMES[pair[0]["method"]], "… with decay"), pair, strict=True):
            edge = edges(point, found)
            lines.append(
                [
                    name,
                    f"{point['learning_rate']:g}" + ("*" if "learning_rate" in edge else ""),
                    f"{point['decay']:g}" + ("*" if "decay" in edge else ""),
                    f"{point['score']:.3f} ± {point['score_spread']:.3f}",
                    f"{point['forgetting']:+.2f}",
                    f"{point['update_norm']:.1f}",
                    f"{point['intruders']:.1f}",
                ]
            )
    head = ["method", "η", "ηλ", "score", "forgetting", "update norm", "intruders"]
    return report.markdown_table(head, lines)


def forgetting_figure(found: list[dict]) -> Figure:
    """A panel per method: score against forgetting, a line per decay. The circle is the operating
    point; the cross is full fine-tuning's."""
    best = {point["method"]: point for point in sorted(operating_points(found, True), key=order)}
    figure, axes = report.panels(13, 6.2, 2, 4)
    for axis, method in zip(axes, best, strict=False):
        mine = [p for p in found if p["method"] == method]
        decays = sorted({p["decay"] for p in mine})
        for decay, shade in zip(decays, (0.3, 0.5, 0.7, 1, 1, 1), strict=False):
            line = sorted(
                (p for p in mine if p["decay"] == decay), key=lambda p: p["learning_rate"]
            )
            axis.plot([p["forgetting"] for p in line], [p["score"] for p in line], "o-",
                      color=COLORS[method], alpha=shade, ms=3 + 4 * shade, mew=0,
                      label=f"ηλ = {decay:g}")  # fmt: skip
        for point, style in (
            (best[method], {"marker": "o", "mfc": "none", "color": "black"}),
            (best["full"], {"marker": "+", "mew": 2, "color": COLORS["full"]}),
        ):
            axis.plot(point["forgetting"], point["score"], ms=14, **style)
        axis.set(title=NAMES[method], xscale="log", ylim=(0, 1.05), xlim=(0.05, 10))
        axis.xaxis.set_major_formatter("{x:g}")
    for axis in axes[len(best) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("forgetting (nats per token on pretraining text)")
    figure.supylabel("score on validation examples")
    return figure


# --- the page ---


def page() -> str:
    """RESULTS.md."""
    found = points(load("forgetting"))
    return f"""# Results

Written by `python -m data.results` from the files that `python -m data.experiments` makes.
[PROTOCOL.md](PROTOCOL.md) says how everything was measured. All results are for models of 0.3M to
3M parameters, and for tasks that we made: they may not generalise to other models and tasks.

## Score against forgetting

The 1M base on `describe`, 100 steps. Two operating points per method: the best without weight
decay, and the best with it. Scores are on validation examples (mean ± standard deviation of three
seeds). A star marks a setting at the edge of its grid.

{forgetting_table(found)}

![Score against forgetting, a panel per method](results/forgetting.png)
"""


if __name__ == "__main__":
    figure = forgetting_figure(points(load("forgetting")))
    report.save_figure(figure, RESULTS / "forgetting.png", dpi=80)
    write_text(PAGE, page())
    print(f"wrote {PAGE} and its figures")
