"""python -m benchmarks.budget_run: the paper's run, 1,000 steps of 20 samples, with random weights, from start to end.

SD1.5 on a GPU, in minutes; on a CPU its stand-in. What is trained is worth nothing, what it costs is: hours, and energy as
the GPU's driver counts it. Both go into the results file of this device.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import report, results
from benchmarks.workloads import DEVICE, evaluations, sd15
from selfnpo.cli import parse, run
from selfnpo.config import check
from selfnpo.meter import EFFICIENCY, count_flops, describe, step_flops
from selfnpo.results import compute_cost, training_cost


@dataclass(frozen=True)
class BudgetRun:
    """Train on random weights and report what it cost."""

    rollout: Literal["pool", "data", "full"] = "pool"
    """data starts from random latents, as the released recipe does from images."""
    rank: int = 0
    """Of a LoRA; 0 trains the full weights."""
    compile: bool = True
    """Compile reference and student."""
    max_train_steps: int = 1000
    """Optimizer steps."""
    results: Path = results.RESULTS
    """Folder of results files."""


def main(options: BudgetRun) -> None:
    results.check_folder(options.results)
    workload = sd15().changed(
        rollout=options.rollout, rank=options.rank, compile=options.compile, max_train_steps=options.max_train_steps,
        pool_size=8,
    )  # fmt: skip
    config, trainer = check(workload.config), workload.trainer()
    trainer.run()
    flops = count_flops(config, workload.source)
    cost = training_cost(trainer.state) | compute_cost(trainer.state, trainer.meter, flops)
    print(describe(cost | {"predicted_gpu_hours": None}))  # which would be those of a stand-in
    hours = cost["gpu_hours" if DEVICE.type == "cuda" else "cpu_hours"]
    work = options.max_train_steps * step_flops(config, flops, evaluations(config))
    predicted = work / (EFFICIENCY * cost["matmul_peak_tflops"] * 1e12) / 3600
    row = {
        "model": workload.describe(),
        "weights": f"LoRA of rank {options.rank}" if options.rank else "full",
        "run": options.rollout + (", compiled" if options.compile else ""),
        "steps": options.max_train_steps,
        "run, device-hours": hours,
        "samples, 1/s": cost["samples_per_second"],
        "energy, Wh": cost["energy_wh"],
        "of matmul peak, %": 100 * cost["fraction_of_matmul_peak"],
        "predicted run, device-hours": predicted,
        "error of that, %": 100 * (predicted / hours - 1),
    }
    ceilings = {"matmul FLOP/s": [1e12 * cost["matmul_peak_tflops"]]}
    path = results.save({"budget": results.table("budget", [row], ceilings)}, options.results)
    print("results:", path, *report.write(path), sep="\n  ")


if __name__ == "__main__":
    run(lambda: main(parse(BudgetRun)))
