"""A training step on a pretended GPU: nothing mixes devices, nothing waits for the device, and the numbers are the CPU's."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from pretended_device import OnDevice, crossings, pretended_device
from selfnpo.config import TrainConfig
from selfnpo.models import load_pretrained, loading
from selfnpo.sampling.ddim import ddim_sample, start_noise
from selfnpo.training.checkpoint import load_checkpoint
from selfnpo.training.trainer import Trainer

PROMPTS = ("a cat", "a dog")


def load(config, device, prompts, rows=None, stream=False):
    """With the prompts encoded as `rows`, for transformers' encoders do not run on what is only pretended."""
    home = device if config.rank else torch.device("cpu")
    encode = loading._encode if rows is None else lambda *args: rows
    with patch.object(loading, "_encode", encode):
        return load_pretrained(config, config, prompts, device=device, weights_device=home, stream_conditions=stream)


def test_the_pretended_device_finds_what_a_real_one_would():
    with pretended_device() as cuda:
        here, there = torch.ones(2), torch.ones(2, device=cuda)
        assert there.device == cuda
        assert (there + there).to("cpu").tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="mixes the device with the CPU"):
            here + there
        with pytest.raises(RuntimeError, match="mixes the device with the CPU"):
            there[torch.tensor([0])]
        with pytest.raises(RuntimeError, match="reads the device from the host"):
            there.sum().item()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("family", "rollout"),
    [
        ("stable_diffusion", "pool"),
        pytest.param("stable_diffusion_xl", "pool", marks=pytest.mark.slow),
        ("cogvideox_rotary", "pool"),
        ("class_conditional", "fresh"),
        pytest.param("class_conditional", "full", marks=pytest.mark.slow),
    ],
)
def test_steps_on_a_device(models, family, rollout, rank):
    config = TrainConfig(
        pretrained_model_name_or_path=str(models(family)), train_batch_size=1, pool_size=1, num_inference_steps=4,
        mixed_precision="no", rank=rank, rollout=rollout, rollout_guidance_scale=2.0, gradient_accumulation_steps=2,
        lr_warmup_steps=0, attention="sdpa", capture="off", tandem="sequential",
    )  # fmt: skip
    prompts = ("",) if family == "class_conditional" else PROMPTS
    expected = Trainer(config, load(config, torch.device("cpu"), prompts))
    losses = [expected.train_step()[0].item() for _ in range(2)]
    for stream in (False, True) if family == "stable_diffusion" else (False,):
        with pretended_device() as cuda:
            trainer = Trainer(config, load(config, cuda, prompts, expected.base.conditions.rows, stream))
            trainer.step.prepare()
            crossings.clear()
            got = [trainer.train_step()[0] for _ in range(2)]
            assert bool(crossings) == (stream or rollout != "pool")  # the indices of a pool are kept on the device
            assert all(isinstance(parameter, OnDevice) for parameter in trainer.state.student.trainable.values())
            assert all(isinstance(rows, OnDevice) != stream for rows in trainer.base.conditions.rows.values())
            got = [loss.to("cpu").item() for loss in got]
        assert got == pytest.approx(losses, rel=1e-5)


class PretendedStream:
    """Of work that is done when it is asked for."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class PretendedEvent:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return 1000.0


@pytest.mark.parametrize("rank", [0, 2])
def test_saving_and_measuring_on_a_device(models, tmp_path, monkeypatch, rank):
    """The base is read from pinned memory, and the host reads one value of how far the weights have moved; of a checkpoint
    none: the state goes to memory that is there, once."""
    monkeypatch.setattr("torch.cuda.Stream", PretendedStream)
    monkeypatch.setattr("torch.cuda.Event", PretendedEvent)
    monkeypatch.setattr("torch.cuda.current_stream", PretendedStream)
    monkeypatch.setattr("torch.cuda.stream", nullcontext)
    config = TrainConfig(
        pretrained_model_name_or_path=str(models("stable_diffusion")), train_batch_size=1, pool_size=1, lr_warmup_steps=0,
        num_inference_steps=4, mixed_precision="no", rank=rank, attention="sdpa", capture="off", tandem="sequential",
        learning_rate=1e-2,
    )  # fmt: skip
    on_cpu = Trainer(config, load(config, torch.device("cpu"), PROMPTS))
    expected = [(on_cpu.train_step(), on_cpu.state.relative_delta())[1] for _ in range(2)]
    pinned, reads = [], []

    def pin(tensor):
        copy = tensor.clone(memory_format=torch.preserve_format)
        pinned.append(copy)
        return copy

    def read(tensor):
        reads.append(tensor)
        return tensor.to("cpu").tolist()

    with pretended_device() as cuda, patch.object(torch.Tensor, "pin_memory", pin):
        trainer = Trainer(config, load(config, cuda, PROMPTS, on_cpu.base.conditions.rows), tmp_path)
        theta = [*trainer.base.denoiser.parameters()]
        lies_in = {each.data_ptr() for each in pinned}
        assert rank or all(parameter.data_ptr() in lies_in for parameter in theta)
        got = []
        for _ in range(2):
            trainer.train_step()
            with patch.object(torch.Tensor, "item", read):
                got.append(trainer.state.relative_delta())
        assert got == pytest.approx(expected, rel=1e-4)
        assert len(reads) == 2
        places, _ = set(), trainer.state.fingerprint  # for which the base is read, once
        for step in (2, 3):
            crossings.clear()
            trainer._checkpoint()
            assert len(crossings) == len(trainer.state.tensors())
            places.add(tuple(buffer.data_ptr() for buffer in trainer.writer._buffers.values()))
            expected = {name: tensor.to("cpu") for name, tensor in trainer.state.tensors().items()}
            trainer.train_step()
            trainer.writer.wait()
            tensors, scalars = load_checkpoint(tmp_path / f"checkpoint-{step}")
            assert scalars["step"] == step
            assert all(value.equal(expected[name]) for name, value in tensors.items())
        assert len(places) == 1
        assert trainer.state.beside["checkpoints"] > 2  # the seconds for which the device copied
        trainer._checkpoint(final=True)  # as it lies
        trainer.writer.wait()
        tensors, _ = load_checkpoint(tmp_path / "checkpoint-4")
        assert all(tensors[name].equal(tensor.to("cpu")) for name, tensor in trainer.state.tensors().items())


@pytest.mark.parametrize("rank", [0, 2])
def test_pictures_on_a_device(models, rank):
    config = TrainConfig(pretrained_model_name_or_path=str(models("stable_diffusion")), rank=rank, mixed_precision="no")
    asked, rows = torch.arange(2), load(config, torch.device("cpu"), PROMPTS).conditions.rows

    def samples(device):
        trainer = Trainer(replace(config, train_batch_size=2, pool_size=1), load(config, device, PROMPTS, rows))
        noise = start_noise(trainer.base, 2, seed=0)
        with trainer.state.student.positive() as positive:
            return ddim_sample(trainer.base, noise, asked, 3.0, trainer.state.model, positive, num_inference_steps=5).to(
                "cpu"
            )

    expected = samples(torch.device("cpu"))
    with pretended_device() as cuda:
        got = samples(cuda)
    torch.testing.assert_close(got, expected)
