"""The tables of the report: which figures they have, in what unit and of what kind.

A figure is measured, counted (from shapes, on the meta device), predicted (from counted figures and a stated efficiency) or
published (by the paper). In Markdown, predicted figures are in italics.
"""

from dataclasses import dataclass
from typing import Any

from selfnpo.budget.cost import EFFICIENCY, digits

MEASURED, COUNTED, PREDICTED, PUBLISHED = "measured", "counted", "predicted", "published"


@dataclass(frozen=True)
class Column:
    name: str
    unit: str = ""
    kind: str = ""  # empty for columns that name a row


@dataclass(frozen=True)
class Table:
    title: str
    legend: str
    source: str  # the command that makes the table
    columns: tuple[Column, ...]


def _measured(*columns: tuple[str, str]) -> tuple[Column, ...]:
    return tuple(Column(name, unit, MEASURED) for name, unit in columns)


def _names(*names: str) -> tuple[Column, ...]:
    return tuple(map(Column, names))


STEP = Column("step", "ms", MEASURED)
ERROR = Column("error of that", "%", PREDICTED)
PREDICTED_STEP = (Column("predicted step", "ms", PREDICTED), ERROR)
NOISE = Column("noise", "%", MEASURED)  # difference between two timings of the same function
ASSUMED = f"Predicted: counted FLOPs at {100 * EFFICIENCY:.0f} % of"
OF_PEAK = Column("of matmul peak", "%", MEASURED)


def _bench(name: str) -> str:
    return f"pytest benchmarks/bench_{name}.py --benchmark-only"


TABLES = {
    "ladder": Table(
        "From the released recipe to the full stack, one factor at a time",
        "Each row adds its factor to those above it; x: samples per second as multiples of the first row, which is "
        "`benchmarks/released_loop.py`. Launches are kernels and graphs on a GPU, operators and compiled loops on a CPU; "
        "host reads are values that Python asks tensors for; memory is what a loop holds and, on top, allocates within a "
        f"step. {ASSUMED} the matmul peak that was measured beside it.",
        _bench("ladder"),
        (
            *_names("model", "factor"),
            STEP,
            *_measured(("samples", "1/s"), ("speed", "x"), ("computed", "GFLOP/s")),
            OF_PEAK,
            *_measured(("memory", "MiB"), ("launches", "per step"), ("host reads", "per step")),
            Column("evaluations", "per sample", COUNTED),
            *PREDICTED_STEP,
            NOISE,
        ),
    ),
    "hours": Table(
        "GPU-hours of the paper's runs",
        "1,000 steps. Evaluations of the reference per sample: as released 12; K = 5 without those that have no weight or "
        f"come after the end 5.4; full simulation 25; pool 1. {ASSUMED} the data sheet's dense "
        "bf16 peak (A800 312, H100 990 TFLOP/s). Published: by the paper, on A800s, but 384 on A100s.",
        _bench("hours"),
        (
            *_names("model", "weights", "run"),
            Column("run", "PFLOP", COUNTED),
            Column("A800", "hours", PREDICTED),
            Column("H100", "hours", PREDICTED),
            Column("published", "hours", PUBLISHED),
            Column("published", "% of A800 peak", COUNTED),
        ),
    ),
    "steps": Table(
        "Those runs on this device",
        "Hours are 1,000 times the median step. On an A800: the hours of the published size, if it reached the share of its "
        "peak, 312 TFLOP/s, that was reached here.",
        _bench("hours"),
        (
            *_names("model", "weights", "run"),
            STEP,
            *_measured(("samples", "1/s"), ("run", "device-hours")),
            OF_PEAK,
            Column("on an A800", "hours", PREDICTED),
            *PREDICTED_STEP,
            NOISE,
        ),
    ),
    "guidance": Table(
        "A guided evaluation with a negative model",
        "x: multiples of plain guidance with one model. Full weights and LoRA are what `guide` takes; two calls: positive "
        "and negative one after the other, by hand. A picture of N steps takes N evaluations.",
        _bench("guidance"),
        (
            *_names("model", "batch"),
            *_measured(("plain", "ms"), ("two calls", "ms"), ("full weights", "ms"), ("LoRA", "ms")),
            *_measured(("two calls", "x"), ("full weights", "x"), ("LoRA", "x")),
            NOISE,
        ),
    ),
    "tandem": Table(
        "Reference and student of a LoRA: strategies by batch and resolution",
        "Whole training steps with a pool. Shared: one forward pass for both; streams: parallel branches of a CUDA graph.",
        _bench("tandem"),
        (
            *_names("model", "latents", "batch"),
            *_measured(("sequential", "ms"), ("shared", "ms"), ("streams", "ms")),
            *_measured(("shared", "x"), ("streams", "x")),
            NOISE,
        ),
    ),
    "ops": Table(
        "The fused ops against PyTorch",
        "Float32. Eager is what one writes in PyTorch, compile the same under `torch.compile`, `randn` included where noise "
        "is drawn. Of copy: bytes that an op must move, over its time, against `tensor.copy_` of the same tensor; a CPU may "
        "exceed it, up to 150 %, because it also reads each cache line that a copy overwrites, which is not counted. "
        "Predicted: those bytes at 85 % of the copy's bandwidth.",
        _bench("ops"),
        (
            *_names("op", "size"),
            *_measured(("kernel", "ms"), ("eager", "ms"), ("compile", "ms"), ("copy", "ms")),
            *_measured(("eager", "x"), ("compile", "x"), ("bandwidth", "GB/s"), ("of copy", "%")),
            Column("intensity", "op/B", COUNTED),
            Column("predicted kernel", "ms", PREDICTED),
            ERROR,
            NOISE,
        ),
    ),
    "scaling": Table(
        "How the cost of a pool step grows",
        "Full weights, not compiled. Processes are independent runs side by side that share the device evenly.",
        _bench("scaling"),
        (
            *_names("model", "grows", "to"),
            STEP,
            *_measured(("sample", "ms"), ("samples", "1/s")),
            NOISE,
        ),
    ),
    "budget": Table(
        "A whole run",
        "Random weights and prompts. Training is the time of the steps that were done, with what is beside them: log and "
        "checkpoints, also as a share of the hours. Start-up is what precedes the first step: compilation, measurements, "
        "filling the pool. Hours are both. Where there are several parts the run was measured in as many calls, each with a "
        "start-up of its own, and their times and energy are added. Energy as the GPU's driver counts it. "
        f"{ASSUMED} the matmul peak that was measured beside it.",
        "make budget-run",
        (
            *_names("model", "weights", "run", "steps"),
            *_measured(("steps", "done"), ("parts", "run"), ("training", "s"), ("start-up", "s"), ("run", "device-hours")),
            *_measured(("beside the steps", "s"), ("beside the steps", "%"), ("samples", "1/s"), ("energy", "Wh")),
            OF_PEAK,
            Column("predicted training", "s", PREDICTED),
            ERROR,
        ),
    ),
    "overhead": Table(
        "What a run of SD1.5 costs beside its steps",
        "Full-sized, random weights, bfloat16; seconds for which the steps are held up, in 1,000 steps of 20 samples. Here "
        f"each kind is measured once; without a GPU a step is what was counted, at {100 * EFFICIENCY:.0f} % of the matmul "
        "peak that was measured. H100: 259 TFLOP/s, which are steps of 248 ms for full weights, and a start of 80 s "
        "(predicted); copies to and from pinned memory at 25 GB/s, SHA-256 at 1.7 GB/s and a disk of 2 GB/s (assumed); the "
        "last checkpoint without what the negative and the pictures take meanwhile.",
        "python -m benchmarks.run_overhead",
        (
            *_names("weights", "beside the steps"),
            Column("once", "GB", COUNTED),
            Column("once here", "s", MEASURED),
            Column("here", "times", COUNTED),
            Column("of the run here", "%", PREDICTED),
            Column("H100", "times", COUNTED),
            Column("once on an H100", "s", PREDICTED),
            Column("of its run", "%", PREDICTED),
        ),
    ),
}  # fmt: skip


def middle(value: Any) -> Any:
    """The median of a figure that is given by its quartiles."""
    return value[1] if isinstance(value, (list, tuple)) else value


def label(column: dict[str, str]) -> str:
    """ "name" or "name, unit", unique in a table."""
    return f"{column['name']}, {column['unit']}" if column["unit"] else column["name"]


def key(table: dict[str, Any], row: list[Any]) -> tuple[str, ...]:
    """The values that name a row."""
    return tuple(str(value) for column, value in zip(table["columns"], row, strict=True) if not column["kind"])


def to_markdown(table: dict[str, Any], names: tuple[str, ...] = ()) -> str:
    """A table of a results file in Markdown, without empty columns.

    Args:
        names: names of the columns to show, each in all its units; by default all.
    """
    columns = table["columns"]
    shown = [
        index
        for index, column in enumerate(columns)
        if (not names or not column["kind"] or column["name"] in names)
        and any(row[index] is not None for row in table["rows"])
    ]
    lines = [[_header(columns[index]) for index in shown], ["---"] * len(shown)]
    lines += [[_cell(columns[index], row[index]) for index in shown] for row in table["rows"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _header(column: dict[str, str]) -> str:
    return f"*{label(column)}*" if column["kind"] == PREDICTED else label(column)


def _cell(column: dict[str, str], value: Any) -> str:
    if value is None:
        return ""
    if not column["kind"]:
        return str(value)
    number = middle(value)
    if column["kind"] == PUBLISHED:
        return f"{number:g}"
    text = f"{number:+.0f}" if column["name"].startswith("error") else digits(number)
    return f"*{text}*" if column["kind"] == PREDICTED else text
