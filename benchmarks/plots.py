"""Pictures of a results file. Solid bars are measured or published, hatched bars are predicted."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.tables import label, middle
from selfnpo.budget.cost import EFFICIENCY, digits
from selfnpo.figures import save_figure

BLUE, GREEN, GRAY, RED = "#3b6fb6", "#3a9a5b", "0.6", "#b6433b"
Results = dict[str, Any]


def records(results: Results, name: str) -> list[dict[str, Any]]:
    """Rows of a table as mappings from labels to values. Quartiles become medians."""
    table = results["tables"].get(name, {"columns": [], "rows": []})
    return [dict(zip(map(label, table["columns"]), map(middle, row), strict=True)) for row in table["rows"]]


def caption(results: Results, table: str) -> str:
    about = results["environment"]
    day, commit = results["tables"][table]["measured_at"][:10], about["commit"][:7]
    return f"{about['device']}, torch {about['torch']}, {day}, commit {commit}"


def ladder(results: Results, path: Path) -> None:
    """How much time each factor takes off a step of the released recipe."""
    rows = records(results, "ladder")
    models = [*dict.fromkeys(row["model"] for row in rows)]
    figure, axes = plt.subplots(len(models), 1, figsize=(10, 3.1 * len(models)), layout="constrained", squeeze=False)
    for axis, model in zip(axes.flat, models, strict=True):
        found = [row for row in rows if row["model"] == model]
        times = [row["step, ms"] for row in found]
        for place, (row, before, now) in enumerate(zip(found, [0, *times], times, strict=False)):
            faster = now <= before
            speed = f", {row['speed, x']:.2f}x" if row["speed, x"] else ""  # unknown if the first loop could not run
            axis.barh(place, abs(now - before), left=min(now, before), color=GRAY if not place else GREEN if faster else RED)
            change = f"{digits(now)} ms" if not place else f"{'−' if faster else '+'}{digits(abs(now - before), 2)} ms"
            axis.text(max(now, before), place, f" {change}{speed}", va="center", fontsize=9)
        axis.barh(len(found), times[-1], color=BLUE)
        axis.text(times[-1], len(found), f" {digits(times[-1])} ms", va="center", fontsize=9)
        axis.set_yticks(range(len(found) + 1), [*(row["factor"] for row in found), "what is left"])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(times))
        axis.set_title(f"{model}: milliseconds of a training step, MEASURED", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption(results, "ladder"), fontsize=9, color="0.35")
    save_figure(figure, path)


def hours(results: Results, path: Path) -> None:
    """Hours of 1,000 steps next to the paper's, on a logarithmic scale, one panel per model."""
    here = {
        (row["model"].split(",")[0], row["weights"], row["run"]): row["run, device-hours"]
        for row in records(results, "steps")
    }
    models: dict[str, list[tuple[str, float, dict[str, Any]]]] = {}
    for row in records(results, "hours"):
        model = row["model"].split(",")[0]
        bars = models.setdefault(model, [])
        label = f"{row['run']}, {row['weights']}"
        measured = here.get((model, row["weights"], row["run"]))
        for value, style in (
            (row["published, hours"], {"color": GRAY}),
            (row["A800, hours"], {"color": "white", "edgecolor": BLUE, "hatch": "////"}),
            (measured, {"color": GREEN}),
        ):
            if value is not None:
                bars.append((label, value, style))
    count = sum(map(len, models.values()))
    heights = [len(bars) for bars in models.values()]
    figure, axes = plt.subplots(
        len(models), 1, figsize=(9, 1 + 0.27 * count), layout="constrained", squeeze=False, sharex=True,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (model, bars) in zip(axes.flat, models.items(), strict=True):
        for place, (_, value, style) in enumerate(bars):
            axis.barh(place, value, **style)
            number = f"{value:g}" if style["color"] == GRAY else digits(value, 2)
            axis.text(value, place, f" {number}", va="center", fontsize=8)
        axis.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set(xscale="log", xlim=(0.03, 1500), ylabel=model)
        axis.spines[["top", "right"]].set_visible(False)
    is_measured = any(style["color"] == GREEN for bars in models.values() for _, _, style in bars)
    device = results["environment"]["device"]
    measured = f"green: MEASURED on {device}" if is_measured else "no model of these sizes was measured here"
    title = (
        "GPU-hours of a run of 1,000 steps. Gray: PUBLISHED by the paper; hatched: PREDICTED,\n"
        f"an A800 at {100 * EFFICIENCY:.0f} % of its peak; "
    )
    figure.suptitle(title + measured, fontsize=10)
    figure.supxlabel(f"FLOPs counted from configurations; {caption(results, 'hours')}", fontsize=9, color="0.35")
    save_figure(figure, path)


def roofline(results: Results, path: Path) -> None:
    """The ops on large tensors, under the ceilings measured in the same run."""
    ops = records(results, "ops")
    size = ops[-1]["size"]  # the largest
    rows = [row for row in ops if row["size"] == size]
    copies = [row["bandwidth, GB/s"] / row["of copy, %"] * 100 for row in rows]
    peaks = [each / 1e9 for table in results["tables"].values() for each in table["ceilings"].get("matmul FLOP/s", [])]
    bandwidth, (low, high) = median(copies), (0.1, 100.0)
    roof = median(peaks) if peaks else bandwidth * high
    knee = min(roof / bandwidth, high)
    figure, axis = plt.subplots(figsize=(9.5, 5), layout="constrained")
    axis.plot([low, knee], [low * bandwidth, knee * bandwidth], color="0.3")
    axis.text(2.2, 2.2 * bandwidth * 0.62, f"copy, {digits(bandwidth)} GB/s", ha="left", fontsize=9)
    if results["environment"]["gpu"] == "none":  # it also reads each line that a copy overwrites: 12 bytes for 8 counted
        limit = 1.5 * bandwidth
        end = min(roof / limit, high)
        axis.plot([low, end], [low * limit, end * limit], color="0.3", linestyle="--", linewidth=1)
        axis.text(1.5, 1.5 * limit * 1.25, "1.5 x copy: no line is read\nbefore it is overwritten", ha="right", fontsize=9)
    if peaks:
        axis.plot([knee, high], [roof, roof], color="0.3")
        axis.text(high * 0.9, roof * 1.1, f"matrix products, {digits(roof)} GFLOP/s", ha="right", fontsize=9)
    for number, row in enumerate(rows, 1):
        x, y = row["intensity, op/B"], row["intensity, op/B"] * row["bandwidth, GB/s"]
        axis.plot(x, y, "o", color=BLUE, markersize=5, label=f"{number}  {row['op']}, {row['of copy, %']:.0f} % of copy")
        above = number % 2 == 0  # so that labels of neighbours do not overlap
        axis.annotate(str(number), (x, y), textcoords="offset points", xytext=(-3, 7 if above else -14), fontsize=9)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low * bandwidth, 2 * roof))
    axis.set(xlabel="operations per byte, counted", ylabel="Gop/s, measured")
    axis.set_title(f"Fused ops on {size} under the ceilings of the same run, float32, MEASURED", fontsize=11)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=0, markerscale=0, fontsize=9, frameon=False)
    axis.grid(alpha=0.25)
    figure.supxlabel(caption(results, "ops"), fontsize=9, color="0.35")
    save_figure(figure, path)


PLOTS: dict[str, Callable[[Results, Path], None]] = {"ladder": ladder, "hours": hours, "ops": roofline}  # by table
