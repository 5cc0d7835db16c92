"""What every benchmark's JSON says about where it ran, and the table at the end."""

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from selfnpo.env import describe

TABLES = {  # by the entry of extra_info that holds their rows
    "training": (
        "a training step against a loop that does what the released code does",
        "x: samples per second as multiples of benchmarks/released_loop.py; in turns on a CPU, apart on a GPU",
        ("model", "released ms", "pool ms", "pool, compiled ms", "x pool", "x pool, compiled"),
    ),
    "row": (
        "fused ops against PyTorch",
        "of copy: bytes that the op must move, against tensor.copy_",
        ("op", "size", "kernel ms", "eager ms", "compile ms", "x eager", "x compile", "GB/s", "of copy"),
    ),
    "guidance": (
        "guided evaluation with a negative model",
        "times as multiples of plain guidance with one model; two calls: positive and negative, written by hand",
        ("model", "batch", "plain ms", "whole weights", "LoRA", "two calls"),
    ),
}


def pytest_configure():
    """Memory that an arm frees is there for the next one, as GPU allocators keep it.

    Otherwise the system maps and zeroes every large result anew, for all arms alike, and the time of that is what one sees.
    """
    if sys.platform == "linux":
        m_mmap_max, m_trim_threshold = -4, -1
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["selfnpo"] = describe() | {
        "commit": _git("rev-parse", "HEAD"),
        "changed files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
    }
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        machine_info["selfnpo"]["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        machine_info["selfnpo"]["clocks MHz"] = {
            "sm": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "sm max": pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
        }


def pytest_terminal_summary(terminalreporter, config):
    session, about = getattr(config, "_benchmarksession", None), describe()
    for name, (title, legend, header) in TABLES.items():
        rows = [bench.extra_info[name] for bench in session.benchmarks if name in bench.extra_info] if session else []
        if not rows:
            continue
        terminalreporter.section(title)
        terminalreporter.line(f"{about['gpu'] if torch.cuda.is_available() else about['cpu']}, torch {torch.__version__}")
        terminalreporter.line(f"medians; {legend}")
        terminalreporter.line("")
        for row in (header, tuple("-" for _ in header), *rows):
            terminalreporter.line("| " + " | ".join(map(str, row)) + " |")
