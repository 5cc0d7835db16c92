"""Checkpoints beside the training: exact, one at a time, never half, and never wrong in silence."""

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import QUICK, call
from runs import SHORT, assert_same_state
from selfnpo import files
from selfnpo.config import TrainConfig
from selfnpo.errors import UserError
from selfnpo.output import list_checkpoints
from selfnpo.training import checkpoint, snapshot
from selfnpo.training.checkpoint import load_checkpoint, save_checkpoint, write_tensors
from selfnpo.training.trainer import Trainer

BY_MINUTES = replace(SHORT, checkpointing_steps=0)
HANGS = 600  # seconds


def trainer_of(demo, folder: Path, config: TrainConfig = SHORT) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(config, demo, folder)


@pytest.fixture
def gate(monkeypatch):
    """Set, it lets checkpoints be written; `gate.begun` tells that one would be."""
    opened = threading.Event()
    opened.begun = threading.Event()
    write = snapshot.save_checkpoint

    def waits(*args):
        opened.begun.set()
        assert opened.wait(HANGS)
        write(*args)

    monkeypatch.setattr(snapshot, "save_checkpoint", waits)
    return opened


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_written_tensor_by_tensor_is_what_safetensors_reads(tmp_path):
    tensors = {
        f"{dtype}.{size}": torch.arange(size).to(dtype) for dtype in files.DTYPES.values() for size in (1, 7)
    } | {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "part": torch.randn(6, 6)[::2, 1:],
        "expanded": torch.randn(3, 1).expand(3, 4),
    }  # fmt: skip
    digest = write_tensors(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].equal(tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with (tmp_path / "file").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_the_state_is_held_once_more_and_never_twice(tmp_path, monkeypatch):
    """What is written next is made when it is its turn."""
    made = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: made.append(1) or original(tensor))
    counts = []
    write_tensors(tmp_path / "file", {str(n): torch.ones(4) for n in range(3)}, lambda: counts.append(len(made)))
    assert counts == [0, 1, 2]


@pytest.mark.parametrize("changes", [{}, {"compile": True}])
def test_a_checkpoint_is_of_its_step_though_training_goes_on(demo, tmp_path, gate, changes):
    trainer = trainer_of(demo, tmp_path, replace(SHORT, **changes))
    for _ in range(3):
        trainer.train_step()
    expected = {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}
    trainer._checkpoint()
    assert gate.begun.wait(HANGS)
    for _ in range(3):
        trainer.train_step()
    gate.set()
    trainer.writer.wait()
    tensors, scalars = load_checkpoint(tmp_path / "checkpoint-3")
    assert scalars["step"] == 3
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(value) for name, value in expected.items())
    assert not all(tensors[name].equal(value) for name, value in trainer.state.tensors().items())


def test_one_checkpoint_at_a_time_and_the_run_waits_for_the_last(demo, tmp_path, gate):
    trainer = trainer_of(demo, tmp_path)
    ending = []
    run = threading.Thread(target=lambda: ending.append(trainer.run()))
    run.start()
    assert gate.begun.wait(HANGS)
    while trainer.state.step < 8:  # steps go on until the next checkpoint is due
        assert run.is_alive()
        time.sleep(0.01)
    run.join(0.3)
    assert (trainer.state.step, list_checkpoints(tmp_path)) == (8, [])
    gate.set()
    run.join(HANGS)
    assert ending == ["completed"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-12"]


def test_the_last_checkpoint_is_written_while_the_results_are(demo, tmp_path, gate):
    trainer = trainer_of(demo, tmp_path, BY_MINUTES)
    assert trainer.run(wait=False) == "completed"
    with trainer.closing():
        assert gate.begun.wait(HANGS)
        assert not list_checkpoints(tmp_path)
        gate.set()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-12"]


def test_sigterm_among_the_results_leaves_the_last_checkpoint(demo, tmp_path, gate):
    trainer = trainer_of(demo, tmp_path, BY_MINUTES)
    trainer.run(wait=False)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(KeyboardInterrupt), trainer.closing():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-12"]


def test_an_error_in_the_training_does_not_cost_the_checkpoint_under_way(demo, tmp_path, gate, monkeypatch):
    trainer = trainer_of(demo, tmp_path)

    def fails():
        if trainer.state.step == 6:
            threading.Timer(0.2, gate.set).start()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return ordinary()

    ordinary, trainer.train_step = trainer.train_step, fails
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_what_cannot_be_pruned_stays_with_a_note(demo, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    assert trainer_of(demo, tmp_path).run() == "completed"
    said = "".join(capsys.readouterr())
    assert f"note: the old checkpoint {tmp_path / 'checkpoint-1'} could not be deleted: Cannot call rmtree" in said


def test_what_is_given_up_leaves_nothing_and_harms_nothing(demo, tmp_path, gate):
    """As by a second Ctrl-C, after which the same trainer may go on."""
    trainer = trainer_of(demo, tmp_path)
    save_checkpoint(tmp_path / "checkpoint-1", {"a": torch.ones(1)}, dict)
    trainer.train_step()
    trainer._checkpoint()
    assert gate.begun.wait(HANGS)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(KeyboardInterrupt), trainer.writer:
        raise KeyboardInterrupt
    assert load_checkpoint(tmp_path / "checkpoint-1")[0]["a"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert trainer.run() == "completed"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-12"]


def test_without_memory_for_a_copy_training_waits_and_the_checkpoint_is_the_same(demo, tmp_path, monkeypatch, capsys):
    beside = trainer_of(demo, tmp_path / "beside")
    beside.run()
    monkeypatch.setattr(snapshot, "free_host_memory", lambda: snapshot.MARGIN)
    waiting = trainer_of(demo, tmp_path / "waiting")
    waiting.train_step()
    waiting._checkpoint()
    assert [path.name for path in list_checkpoints(tmp_path / "waiting")] == ["checkpoint-1"]  # there at once
    waiting.run()
    assert_same_state(beside, waiting)
    one, other = (tmp_path / name / "checkpoint-8" / "state.safetensors" for name in ("beside", "waiting"))
    assert one.read_bytes() == other.read_bytes()
    assert capsys.readouterr().out.count("note: training pauses while a checkpoint is written") == 1


def test_free_memory_of_the_host(tmp_path, monkeypatch):
    """As far as machine and container have any, without what this process has had and given back."""
    for name in ("MemAvailable", "MemTotal"):
        assert 1 << 20 < snapshot._table(Path("/proc/meminfo"))[name] < 1 << 50
    machine = {"meminfo": {"MemAvailable": 9_000}, "status": {"VmHWM": 700, "VmRSS": 200}}
    table = snapshot._table
    monkeypatch.setattr(snapshot, "_table", lambda path: machine.get(path.name) or table(path))
    monkeypatch.setattr(snapshot, "_CONTAINERS", ((tmp_path, "max", "current", "inactive_file"),))
    for name, text in (("max", "5000\n"), ("current", "4000\n"), ("memory.stat", "file 2\ninactive_file 3\n")):
        (tmp_path / name).write_text(text)
    assert snapshot.free_host_memory() == 5_000 - (4_000 - 3) - (700 - 200)
    (tmp_path / "max").write_text("max\n")
    assert snapshot.free_host_memory() == 9_000 - (700 - 200)


def test_a_full_disk_ends_the_run_in_one_sentence_before_the_next_checkpoint_is_due(tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def waits(trainer):
        assert trainer.state.step < 30 or trainer.writer.done.wait(HANGS)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", waits)
    monkeypatch.setattr(checkpoint, "write_tensors", no_space)
    flags = ("--max_train_steps", 60, "--checkpointing_steps", 20)
    assert call("train", *QUICK, "--output_dir", tmp_path / "out", *flags) == 2
    told = capsys.readouterr()
    assert "checkpoint-20 could not be written: No space left on device" in told.err
    assert "Traceback" not in told.err
    assert not list((tmp_path / "out").glob("*checkpoint*"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert steps[-1] < 40


def test_a_full_disk_leaves_the_checkpoint_before(demo, tmp_path, monkeypatch):
    trainer = trainer_of(demo, tmp_path, replace(SHORT, checkpoints_total_limit=1))
    trainer.train_step()
    trainer._checkpoint()
    trainer.writer.wait()
    monkeypatch.setattr(checkpoint, "write_tensors", no_space)
    trainer.train_step()
    trainer._checkpoint()
    with pytest.raises(UserError, match="checkpoint-2 could not be written: No space left on device"):
        trainer.writer.wait()
    assert load_checkpoint(tmp_path / "checkpoint-1")[1]["step"] == 1


def test_a_full_disk_at_the_last_checkpoint_is_said_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_tensors", no_space)
    assert call("train", *QUICK, "--output_dir", tmp_path / "out") == 2
    assert "checkpoint-4 could not be written: No space left on device" in capsys.readouterr().err


def test_a_run_that_diverges_says_what_became_of_the_checkpoint_too(demo, tmp_path, monkeypatch):
    trainer = trainer_of(demo, tmp_path)
    monkeypatch.setattr(checkpoint, "write_tensors", no_space)
    trainer.train_step()
    trainer._checkpoint()
    assert trainer.last_checkpoint().startswith("no checkpoint was saved; ")
    assert trainer.last_checkpoint() == "no checkpoint was saved"


def test_by_default_a_checkpoint_is_due_by_minutes_of_training(demo, tmp_path):
    trainer = trainer_of(demo, tmp_path, replace(BY_MINUTES, checkpointing_minutes=2))
    assert [trainer._is_due(seconds) for seconds in (0, 119, 121)] == [False, False, True]
    trainer.state.seconds = 100.0
    trainer._checkpoint(final=True)
    trainer.writer.wait()
    resumed = Trainer(replace(BY_MINUTES, checkpointing_minutes=3, resume_from_checkpoint="latest"), demo, tmp_path)
    assert [resumed._is_due(seconds) for seconds in (100, 279, 281)] == [False, False, True]


def test_a_checkpoint_that_holds_training_up_puts_the_next_one_off(demo, tmp_path, monkeypatch):
    """At the default of ten minutes, one of half a minute."""
    trainer = trainer_of(demo, tmp_path, BY_MINUTES)
    monkeypatch.setattr(trainer.writer, "save", lambda final: trainer.state.beside.update(checkpoints=130.0))
    trainer.state.beside["checkpoints"] = 100.0
    trainer._checkpoint()
    assert [trainer._is_due(seconds) for seconds in (601, 1499, 1501)] == [False, False, True]


def test_a_checkpoint_of_an_older_version_is_resumed(demo, tmp_path):
    """One of safetensors' own `save_file`, which did not count what is beside the steps."""
    straight = trainer_of(demo, tmp_path)
    straight.run()
    shutil.rmtree(tmp_path / "checkpoint-12")
    folder = tmp_path / "checkpoint-8"
    tensors, scalars = load_checkpoint(folder)
    save_file(tensors, folder / "state.safetensors")
    scalars["sha256"] = hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()
    del scalars["beside"]
    (folder / "state.json").write_text(json.dumps(scalars))
    resumed = Trainer(replace(SHORT, resume_from_checkpoint="latest"), demo, tmp_path)
    assert resumed.state.step == 8
    resumed.run()
    assert_same_state(straight, resumed)


STAGES = [
    (snapshot.CheckpointWriter, "_go_on", 1),
    (snapshot.CheckpointWriter, "_go_on", 30),
    (files, "_flush", 1),
    (files, "_flush", 3),
    (Path, "replace", 1),
    (files, "_flush", 4),  # renamed, but the folder above is not flushed
    (snapshot, "prune_checkpoints", 1),
]


@pytest.mark.parametrize(("owner", "name", "number"), STAGES)
def test_a_run_killed_at_this_stage_resumes_to_the_same_bits(demo, tmp_path, monkeypatch, owner, name, number):
    """In the second checkpoint."""
    straight = trainer_of(demo, tmp_path / "straight")
    straight.run()
    broken, calls, checkpoints = tmp_path / "broken", [], []
    original, save = getattr(owner, name), snapshot.save_checkpoint

    def counted(*args):
        checkpoints.append(1)
        save(*args)

    def killed(*args):
        if len(checkpoints) == 2:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(snapshot, "save_checkpoint", counted)
        monkeypatch.setattr(owner, name, killed)
        trainer_of(demo, broken).run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_checkpoint(list_checkpoints(broken)[0])[1]["step"] == 4
    resumed = Trainer(replace(SHORT, resume_from_checkpoint="latest"), demo, broken)
    assert resumed.state.step in (4, 8)
    resumed.run()
    assert_same_state(straight, resumed)
    assert sorted(path.name for path in broken.iterdir()) == ["checkpoint-12", "checkpoint-8", "config.yaml", "log.jsonl"]


def test_what_a_killed_run_had_half_written_goes_with_the_next_checkpoint(demo, tmp_path):
    (tmp_path / ".checkpoint-7.partial").mkdir()
    (tmp_path / ".checkpoint-7.partial" / "state.safetensors").write_text("half")
    trainer_of(demo, tmp_path).run()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
