"""python -m benchmarks.run_overhead: what a run of SD1.5 costs besides steps: log, relative_delta, checkpoints, pictures.

The model is full-sized, with random weights, in bfloat16. Each kind of work that holds up steps is measured once and scaled
up to 1,000 steps of 20 samples. Without a GPU the steps are small. Full weights take 20 GiB of memory and 30 GB of disk.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report, results
from benchmarks.tables import to_markdown
from benchmarks.workloads import DEVICE, ON_GPU, evaluations, real
from selfnpo.budget.cost import EFFICIENCY, count_flops, step_flops
from selfnpo.cli import parse, run
from selfnpo.config import TrainConfig
from selfnpo.device import matmul_peak, seconds_of
from selfnpo.training.trainer import DELTA_STEPS, REST, Trainer

STEPS = 1000
SMALL = {} if ON_GPU else {"train_batch_size": 1, "resolution": 64, "pool_size": 1, "num_inference_steps": 2}
H100_FLOPS, H100_START = 64.2e12 / 0.248, 80.0  # FLOP/s in steps of full weights, and seconds; predicted
PCIE, DISK, SHA256 = 25e9, 2e9, 1.7e9  # bytes per second, assumed; SHA-256 on one 3.5 GHz core
VAE_FLOPS = 50e12  # FLOP/s in float32, assumed


@dataclass(frozen=True)
class RunOverhead:
    """Measure what a run of SD1.5 costs besides its steps."""

    rank: int = 0
    """Rank of the LoRA; 0 trains the full weights."""
    folder: Path | None = None
    """Folder for temporary checkpoints; by default the system's temporary folder."""
    results: Path = results.RESULTS
    """Folder for results files."""


def measure(rank: int, folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds on this machine for a step and for each kind of work that holds steps up, and the bytes that it moves."""
    workload = real("SD1.5", rank=rank, tandem="sequential", attention="sdpa", max_train_steps=3, logging_steps=1, **SMALL)
    base = workload.load()
    rows = {name: each.to(torch.bfloat16) for name, each in base.conditions.rows.items()}
    if rank:  # in the precision of the network, as `load_base` has it
        torch.nn.Module.to(base.denoiser, torch.bfloat16)
    base = replace(base, dtype=torch.bfloat16, conditions=replace(base.conditions, rows=rows))
    trainer = Trainer(workload.config, base, folder)
    state, writer = trainer.state, trainer.writer
    trainer.run(wait=False)
    seconds = {"step": state.seconds / 3, "log": state.beside["logging"] / 3}
    seconds["last"] = _held_up(state.beside, "checkpoints", writer.wait)
    seconds["delta"] = seconds_of(state.student.relative_delta, DEVICE)
    for _ in range(2):  # the first time creates buffers
        taken = _held_up(state.beside, "checkpoints", trainer._checkpoint)
        if not writer.fits_twice:
            seconds["waiting"], seconds["copied"] = taken, _copy_seconds(state.tensors())
            break
        writer.done.wait()
        seconds["copied"] = taken + _held_up(state.beside, "checkpoints", writer.wait)  # adds the device's time
    size = sum(each.nbytes for each in state.tensors().values())
    theta = sum(each.nbytes for each in base.denoiser.parameters())
    return seconds, {"delta": 0 if rank else theta, "checkpoint": size, "negative": 0 if rank else theta}


def _held_up(beside: dict[str, float], kind: str, action: Callable[[], object]) -> float:
    before = beside[kind]
    action()
    return beside[kind] - before


def _copy_seconds(tensors: dict[str, Tensor]) -> float:
    """Seconds to copy all tensors, extrapolated from about a gigabyte of them."""
    started, copied = time.perf_counter(), []
    for tensor in tensors.values():
        copied.append(tensor.clone())
        if sum(each.nbytes for each in copied) > 1e9:
            break
    share = sum(each.nbytes for each in copied) / sum(each.nbytes for each in tensors.values())
    return (time.perf_counter() - started) / share


def _hashing() -> float:
    """Bytes per second on one core."""
    data = bytes(1 << 28)
    started = time.thread_time()
    hashlib.sha256(data)
    return len(data) / (time.thread_time() - started)


def picture_flops(config: TrainConfig, forward: int) -> tuple[int, int]:
    """FLOPs of the final pictures: of the denoiser, for two guided sets of samples, and of the VAE."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(128, 256, 512, 512),
    ).to("meta")  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(torch.empty(1, 4, 64, 64, device="meta"))
    images = config.num_validation_images
    return images * config.num_inference_steps * 4 * forward, 2 * images * counter.get_total_flops()


def rows_of(rank: int, seconds: dict[str, float], size: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the table, for a run of 1,000 steps of 20 samples, here and on an H100."""
    workload = real("SD1.5", rank=rank)
    config, flops = workload.config, count_flops(workload.config, workload.source)
    work, (sampling, decoding) = step_flops(config, flops, evaluations(config)), picture_flops(config, flops.forward)
    peak = EFFICIENCY * matmul_peak(DEVICE, torch.bfloat16)
    here, steps_there = STEPS * (seconds["step"] if ON_GPU else work / peak), STEPS * work / H100_FLOPS
    there, pictures = steps_there + H100_START, sampling / H100_FLOPS + decoding / VAE_FLOPS
    # While the last checkpoint is written, the negative is written to the same disk and pictures are made.
    negative = size["negative"] / DISK
    written = max(size["checkpoint"] / SHA256, size["checkpoint"] / DISK + negative)
    looks = STEPS / (config.logging_steps if rank else DELTA_STEPS)
    every = 60 * config.checkpointing_minutes
    is_copied = "waiting" not in seconds
    due = here // max(every, REST * seconds["copied" if is_copied else "waiting"])
    rows = []

    def add(name: str, moved: int, once: float | None, times: float, once_there: float, times_there: float) -> None:
        rows.append(
            {
                "weights": f"LoRA of rank {rank}" if rank else "full",
                "beside the steps": name,
                "once, GB": moved / 1e9,
                "once here, s": once,
                "here, times": times,
                "of the run here, %": 100 * times * (once or 0) / here,
                "H100, times": times_there,
                "once on an H100, s": once_there,
                "of its run, %": 100 * times_there * once_there / there,
            }
        )

    log, delta, state = seconds["log"], size["delta"], size["checkpoint"]
    add("a row of the log", 0, log, STEPS / config.logging_steps, log, STEPS / config.logging_steps)
    add("relative_delta", delta, seconds["delta"], looks, delta / PCIE or seconds["delta"], looks)
    add("a checkpoint, copied", state, seconds["copied"], due * is_copied, state / PCIE, steps_there // every)
    if not is_copied:
        add("a checkpoint, without memory for a copy", state, seconds["waiting"], due, 0, 0)
    add("the last checkpoint", state, seconds["last"], 1, max(0, written - negative - pictures), 1)
    add("pictures", 0, None, 1, pictures, 1)
    rows[-1]["of the run here, %"] = 100 * (sampling + decoding) / peak / here
    together = {name: sum(row[name] for row in rows) for name in ("of the run here, %", "of its run, %")}
    return [*rows, {"weights": rows[0]["weights"], "beside the steps": "together"} | together]


def main(options: RunOverhead) -> None:
    results.check_folder(options.results)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds, size = measure(options.rank, Path(folder))
    table = results.table("overhead", rows_of(options.rank, seconds, size), {"SHA-256 B/s": [_hashing()]})
    path = results.save({"overhead": table}, options.results)
    print(to_markdown(table), "results:", path, *report.write(path), sep="\n")


if __name__ == "__main__":
    run(lambda: main(parse(RunOverhead)))
