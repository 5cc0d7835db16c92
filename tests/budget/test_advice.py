"""Advice for a run that needs too much memory: settings that would fit according to the memory plan."""

import os
import shlex
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import published
from runs import settings
from selfnpo import train
from selfnpo.budget import advice
from selfnpo.budget.advice import out_of_memory, settings_that_fit, shortage
from selfnpo.budget.memory import memory_plan
from selfnpo.cli import parse
from selfnpo.config import TrainConfig, binding
from selfnpo.device import free_memory, total_memory
from selfnpo.errors import UserError, is_out_of_memory
from selfnpo.models import DEMO, Source
from selfnpo.output import list_checkpoints
from selfnpo.training.checkpoint import load_checkpoint
from selfnpo.training.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30
CHECKPOINT = "the last good checkpoint is runs/x/checkpoint-250"
ALONE = "use another --output_dir if you change settings, because --resume_from_checkpoint latest needs the same ones"


def changed(config, flags):
    """The settings that a user gets who adds the flags to his command line."""
    return parse(TrainConfig, shlex.split(flags), default=config)


def total(config, device=CUDA):
    return advice.memory_plan(config, Source(config), 1, device).total


def advised(config, free, device=CUDA):
    return settings_that_fit(config, Source(config), 1, device, free)


@pytest.fixture(scope="module")
def plans():
    return {}


@pytest.fixture(autouse=True)
def _counted_once(plans, monkeypatch):
    """Equal settings have equal plans: here each is counted once."""

    def plan(config, source, prompts, device):
        if (config, prompts, device) not in plans:
            plans[config, prompts, device] = memory_plan(config, source, prompts, device)
        return plans[config, prompts, device]

    monkeypatch.setattr(advice, "memory_plan", plan)


@pytest.fixture
def memory_of(monkeypatch):
    """Lets every device have so many bytes, of which all or some are free."""

    def of(whole, free=None):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (whole if free is None else free, whole))
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": whole}.get)

    return of


def batches_of_20(files, folder):
    published.write(files, folder)
    return TrainConfig(pretrained_model_name_or_path=str(folder), train_batch_size=20, mixed_precision="fp16")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return batches_of_20(published.STABLE_DIFFUSION_1_5, tmp_path_factory.mktemp("published") / "sd15")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The two widths of the first layers alone, on small samples: counted fast, and its weights outweigh a sample too."""
    files = published.STABLE_DIFFUSION_1_5
    fewer = {
        "block_out_channels": [320, 640], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "sample_size": 32,
    }  # fmt: skip
    return batches_of_20(
        files | {"unet/config.json": files["unet/config.json"] | fewer}, tmp_path_factory.mktemp("published") / "shallow"
    )


@pytest.mark.parametrize(
    "expected",
    [
        "--gradient_checkpointing",
        "--gradient_checkpointing --train_batch_size 5 --gradient_accumulation_steps 4",
        "--gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 20",
        "--gradient_checkpointing --use_8bit_adam --train_batch_size 10 --gradient_accumulation_steps 2",
        "--gradient_checkpointing --use_8bit_adam --low_vram --train_batch_size 2 --gradient_accumulation_steps 10",
        "--gradient_checkpointing --rank 16",
        "--gradient_checkpointing --rank 16 --train_batch_size 1 --gradient_accumulation_steps 20",
        "--gradient_checkpointing --use_8bit_adam --low_vram --rank 16 --train_batch_size 1 "
        "--gradient_accumulation_steps 20",
    ],
)
def test_the_first_settings_that_fit_are_chosen(shallow, expected):
    config = changed(shallow, expected)
    assert config.total_batch_size == 20
    counted = total(config)
    assert advised(shallow, counted) == (expected, counted)
    flags, other = advised(shallow, counted - 1)  # one byte less, and others must do
    assert flags != expected
    assert other < counted or (flags, other) == (None, counted)


def test_published_sizes_in_one_line(sd15, memory_of):
    memory_of(whole=24 * GIB, free=17 * GIB)
    plan = memory_plan(sd15, Source(sd15), 1, CUDA)
    flags = "--gradient_checkpointing --train_batch_size 5 --gradient_accumulation_steps 4"
    larger = "--gradient_checkpointing --train_batch_size 10 --gradient_accumulation_steps 2"
    counted = total(changed(sd15, flags)) / GIB
    assert shortage(plan, sd15, Source(sd15), 1, CUDA) == (
        f"warning: the plan needs more than the 17.0 GiB that are free on cuda:0; these settings would fit: {flags} "
        f"(planned {counted:.1f} GiB)\n"
    )
    assert 16 < counted <= 17 < total(changed(sd15, larger)) / GIB
    memory_of(whole=24 * GIB, free=6 * GIB)
    assert "fit: --gradient_checkpointing --rank 16 (a LoRA, planned 4." in shortage(plan, sd15, Source(sd15), 1, CUDA)


def test_enough_memory_says_nothing(models, memory_of):
    config = settings(models("stable_diffusion"))
    plan = memory_plan(config, Source(config), 1, CUDA)
    for device in (CPU, CUDA):
        memory_of(whole=plan.total)
        assert shortage(plan, config, Source(config), 1, device) == ""


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_nothing_fits(models, memory_of, device):
    config = settings(models("stable_diffusion"), rank=2)
    plan = memory_plan(config, Source(config), 1, device)
    smallest = replace(
        config, train_batch_size=1, gradient_accumulation_steps=2, gradient_checkpointing=True, low_vram=device == CUDA
    )
    bytes_of_it = total(smallest, device)
    assert advised(config, bytes_of_it - 1, device) == (None, bytes_of_it)
    assert advised(config, bytes_of_it, device)[1] == bytes_of_it
    memory_of(whole=1 << 16)
    there = "that are free on cuda:0" if device == CUDA else "that this machine has"
    assert shortage(plan, config, Source(config), 1, device) == (
        f"warning: the plan needs more than the 0.1 MiB {there}; no settings for this model fit "
        f"(the smallest plan needs {bytes_of_it / (1 << 20):.1f} MiB)\n"
    )


def test_a_lora_with_every_setting_is_its_own_smallest_plan(shallow):
    saving = {"train_batch_size": 1, "low_vram": True, "gradient_checkpointing": True, "use_8bit_adam": True}
    config = replace(shallow, rank=2 * advice.LORA_RANK, **saving)
    assert advised(config, 0) == (None, total(config))


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"gradient_checkpointing": True}, "--use_8bit_adam --train_batch_size 1 --gradient_accumulation_steps 20"),
        (
            {"gradient_checkpointing": True, "use_8bit_adam": True},
            "--low_vram --train_batch_size 10 --gradient_accumulation_steps 2",
        ),
        ({"low_vram": True}, "--use_8bit_adam"),  # low_vram checkpoints gradients itself
        ({"low_vram": True, "use_8bit_adam": True, "rank": 8}, "--train_batch_size 1 --gradient_accumulation_steps 20"),
        ({"low_vram": True, "use_8bit_adam": True, "train_batch_size": 1}, "--rank 16"),
    ],
)
def test_what_is_set_already_is_not_advised(shallow, has, expected):
    config = replace(shallow, **has)
    counted = total(changed(config, expected))
    assert advised(config, counted) == (expected, counted)


@pytest.mark.parametrize(
    ("size", "steps", "sizes"),
    [(20, 1, [10, 5, 2, 1]), (20, 3, [10, 5, 2, 1]), (7, 1, [1]), (6, 1, [3, 1]), (9, 2, [2, 1]), (1, 4, [])],
)
def test_split_batches_make_the_same_step(shallow, size, steps, sizes):
    config = replace(shallow, train_batch_size=size, gradient_accumulation_steps=steps)
    whole, *parts = [replace(config, **split) for split in advice._splits(config)]
    assert whole == config
    assert [part.train_batch_size for part in parts] == sizes
    assert all(part.total_batch_size == size * steps for part in parts)


def test_gradient_checkpointing_needs_a_model_that_has_it(models, monkeypatch):
    config = settings(models("stable_diffusion"), train_batch_size=4)
    kind = Source(config).family.denoiser_class
    assert advised(config, total(config) - 1)[0] == "--gradient_checkpointing"
    monkeypatch.setattr(kind, "_supports_gradient_checkpointing", False)
    assert advised(config, total(config) - 1)[0] == "--train_batch_size 2 --gradient_accumulation_steps 2"


def test_8_bit_moments_need_bitsandbytes(shallow, monkeypatch):
    config = replace(shallow, train_batch_size=1, gradient_checkpointing=True)
    assert advised(config, total(config) - 1)[0] == "--use_8bit_adam"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert advised(config, total(config) - 1)[0] == "--low_vram"


def test_a_lora_needs_layers_of_its_rank(models, monkeypatch):
    config = settings(models("class_conditional"), train_batch_size=1)
    full = total(changed(config, "--gradient_checkpointing --low_vram --use_8bit_adam"))
    lora = total(changed(config, "--gradient_checkpointing --low_vram --use_8bit_adam --rank 16"))
    assert lora < full
    assert advised(config, 0) == (None, lora)
    monkeypatch.setattr(advice, "LORA_RANK", 33)  # the tiny transformer is 32 wide
    assert advised(config, 0) == (None, full)


def test_the_demo_on_the_cpu(memory_of):
    config = TrainConfig(mixed_precision="no")
    assert config.pretrained_model_name_or_path == DEMO
    plan = memory_plan(config, Source(config), 1, CPU)
    memory_of(whole=plan.total - 1)
    assert "this machine has; these settings would fit: --gradient_checkpointing (planned" in shortage(
        plan, config, Source(config), 1, CPU
    )
    flags, counted = advised(config, 0, CPU)
    assert flags is None
    expected = "--gradient_checkpointing --rank 16 --train_batch_size 1 --gradient_accumulation_steps 128"
    small = total(changed(config, expected), CPU)
    assert counted <= small < plan.total / 2
    assert advised(config, small, CPU)[0] == expected
    assert "low_vram" not in str(advice._savings(config, Source(config), CPU))  # what it moves to the host is there already


def test_a_run_that_ran_out(shallow, memory_of):
    memory_of(whole=80 * GIB, free=0)
    plan = total(shallow)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.06 GiB is free. "
        "Including non-PyTorch memory, this process has 78.11 GiB memory in use.\nmore"
    )
    told = out_of_memory(shallow, Source(shallow), 1, CUDA, error, CHECKPOINT)
    assert isinstance(told, UserError)
    counted = total(changed(shallow, "--gradient_checkpointing"))
    assert counted < 0.9 * plan < GIB * 72  # the plan said that it would fit
    assert str(told) == (
        "out of memory on cuda:0 (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB "
        "of which 1.06 GiB is free. Including non-PyTorch memory, ...); by the memory plan these settings would fit: "
        f"--gradient_checkpointing (planned {counted / GIB:.1f} GiB); {CHECKPOINT}; {ALONE}"
    )


def test_a_run_that_ran_out_is_advised_a_plan_smaller_than_the_device_and_its_own(shallow, memory_of):
    config = replace(shallow, gradient_checkpointing=True, mixed_precision="no")
    half = "--train_batch_size 10 --gradient_accumulation_steps 2"
    quarter = "--train_batch_size 5 --gradient_accumulation_steps 4"
    for whole, expected in ((80 * GIB, half), (int(total(changed(config, quarter)) / 0.9) + 2, quarter)):
        memory_of(whole)
        told = str(out_of_memory(config, Source(config), 1, CUDA, MemoryError(), "no checkpoint was saved"))
        start = f"out of memory on cuda:0 (MemoryError); by the memory plan these settings would fit: {expected} (planned 1."
        assert told.startswith(start)
        assert told.endswith(f" GiB); no checkpoint was saved; {ALONE}")
    memory_of(whole=1 << 20)
    told = str(out_of_memory(config, Source(config), 1, CUDA, MemoryError(), CHECKPOINT))
    assert "; by the memory plan no settings for this model fit (the smallest plan needs " in told


def test_no_advised_setting_can_be_changed_on_resume(shallow):
    """As the sentence says: such a setting is one of those that a checkpoint is bound to."""
    advised_ever = {name for savings in advice._savings(shallow, Source(shallow), CUDA) for name in savings}
    advised_ever |= {name for split in advice._splits(shallow) for name in split}
    assert len(advised_ever) == 6
    assert advised_ever <= binding(shallow).keys()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: not enough memory: you tried to"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 131072"), False),
        (ValueError("can't allocate memory"), False),
        (UserError("CUDA out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_running_out_of_memory_looks_like(error, expected):
    assert is_out_of_memory(error) == expected


def test_the_allocator_of_the_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_memory_of_this_machine(monkeypatch):
    assert free_memory(CPU) == total_memory(CPU) > 1 << 28
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(CPU) == sys.maxsize


def test_out_of_memory_names_settings_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    ordinary = Trainer.train_step

    def fails(self):
        if self.state.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return ordinary(self)

    monkeypatch.setattr(Trainer, "train_step", fails)
    config = TrainConfig(output_dir=tmp_path / "run", train_batch_size=8, checkpointing_steps=2, max_train_steps=6)
    with pytest.raises(UserError, match=r"out of memory on cpu \(CUDA out of memory.*; by the memory plan .*checkpoint-2;"):
        train.main(config)
    (kept,) = list_checkpoints(tmp_path / "run")
    assert load_checkpoint(kept)[1]["step"] == 2
