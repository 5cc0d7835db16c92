"""python -m benchmarks.budget_run: the paper's run, 1,000 steps of 20 samples, with random weights, from start to end.

SD1.5 on a GPU takes minutes; a CPU runs its stand-in. The trained weights are worthless. The result is the cost: hours, and
energy as the GPU's driver counts it. Both go into the results file of this device.

A call that ends early, by --max_seconds or Ctrl-C, leaves the run unfinished; further calls at the same commit continue it.
The exit code is 0 when the run is complete, 75 while it is not.
"""

import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import report, results
from benchmarks.workloads import evaluations, sd15
from selfnpo.budget.cost import EFFICIENCY, cost_lines, count_flops, step_flops
from selfnpo.cli import parse, run
from selfnpo.config import check
from selfnpo.device import matmul_peak
from selfnpo.errors import UserError
from selfnpo.export.run_cost import beside_steps, compute_cost, training_cost

UNFINISHED = 75  # exit code: try again
# Columns that add up over the parts of a run.
ADDED = (
    "steps, done", "parts, run", "training, s", "start-up, s", "beside the steps, s", "energy, Wh", "predicted training, s",
)  # fmt: skip


@dataclass(frozen=True)
class BudgetRun:
    """Train on random weights and report what it cost."""

    rollout: Literal["pool", "data", "full"] = "pool"
    """data starts from random latents in place of the released recipe's images."""
    rank: int = 0
    """Rank of the LoRA; 0 trains the full weights."""
    compile: bool = True
    """Compile reference and student."""
    max_train_steps: int = 1000
    """Optimizer steps of the whole run."""
    max_seconds: int = 0
    """Seconds after which this call starts no further step; 0 means no limit."""
    results: Path = results.RESULTS
    """Folder for results files."""


def main(options: BudgetRun) -> int:
    if options.max_seconds < 0:
        raise UserError(f"max_seconds is {options.max_seconds}; expected 0 or more")
    deadline = time.monotonic() + options.max_seconds
    results.check_folder(options.results)
    workload = sd15().changed(rollout=options.rollout, rank=options.rank, compile=options.compile, pool_size=8)
    names = {
        "model": workload.describe(),
        "weights": f"LoRA of rank {options.rank}" if options.rank else "full",
        "run": options.rollout + (", compiled" if options.compile else ""),
        "steps": options.max_train_steps,
    }
    before = unfinished(names, options.results)
    workload = workload.changed(max_train_steps=options.max_train_steps - before["steps, done"])
    config = check(workload.config)
    with tempfile.TemporaryDirectory(prefix="selfnpo-budget-") as folder:  # for the log and the checkpoints, as in any run
        trainer = workload.trainer(Path(folder))
        if options.max_seconds:
            trainer.train_step = until(deadline, trainer.train_step)
        trainer.run()
    state, flops = trainer.state, count_flops(config, workload.source)
    cost = training_cost(state) | compute_cost(state, trainer.meter, flops)
    print(cost_lines(cost | {"predicted_gpu_hours": None}))  # on a CPU they would be those of the stand-in
    print(beside_steps(state))
    peak = matmul_peak(state.base.device, state.base.dtype)
    predicted = state.step * step_flops(config, flops, evaluations(config)) / (EFFICIENCY * peak)
    seconds = state.seconds, state.startup_seconds, sum(state.beside.values())
    part = dict(zip(ADDED, (state.step, 1, *seconds, cost["energy_wh"], predicted), strict=True))
    row = names | whole(before, part, config.total_batch_size)
    print(f"{row['steps, done']} of {row['steps']} steps are done, in {row['parts, run']} parts")
    path = results.save({"budget": results.table("budget", [row], {"matmul FLOP/s": [peak]})}, options.results)
    print("results:", path, *report.write(path), sep="\n  ")
    return 0 if row["steps, done"] == row["steps"] else UNFINISHED


def until(deadline: float, step: Callable[[], Any]) -> Callable[[], Any]:
    """`step`, but once the deadline has passed it interrupts the run like Ctrl-C."""

    def limited() -> Any:
        result = step()
        if time.monotonic() >= deadline:
            signal.raise_signal(signal.SIGINT)
        return result

    return limited


def unfinished(names: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Sums over the earlier parts of this run; zeros if there are none, or if the earlier run is complete."""
    for row in results.rows_before("budget", folder):
        if names.items() <= row.items() and row["steps, done"] < row["steps"]:
            return {name: row[name] for name in ADDED}
    return dict.fromkeys(ADDED, 0)


def whole(before: dict[str, Any], part: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The earlier parts plus another, with figures derived from the sums. The energy is unknown if it is for one part."""
    row = {name: None if None in (before[name], part[name]) else before[name] + part[name] for name in ADDED}
    share = row["predicted training, s"] / row["training, s"]
    return row | {
        "run, device-hours": (row["training, s"] + row["start-up, s"]) / 3600,
        "beside the steps, %": 100 * row["beside the steps, s"] / (row["training, s"] + row["start-up, s"]),
        "samples, 1/s": row["steps, done"] * batch_size / row["training, s"],
        "of matmul peak, %": 100 * EFFICIENCY * share,
        "error of that, %": 100 * (share - 1),
    }


if __name__ == "__main__":
    run(lambda: main(parse(BudgetRun)))
