"""The whole training step as a GPU takes it (bf16, compiled, channels last, checkpointed, accumulated), on the CPU."""

import shutil

import pytest
import torch

import tiny
from runs import RANKS, settings, start
from selfnpo.errors import UserError
from selfnpo.training.step import check_compiled
from selfnpo.training.student import FullStudent

LIKE_A_GPU = {"mixed_precision": "bf16", "compile": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def flat(models, tmp_path_factory):
    """Stable Diffusion with a single level, which has few kinds of blocks to compile, and 1x1 convolutions."""
    folder = tmp_path_factory.mktemp("flat") / "stable_diffusion"
    shutil.copytree(models("stable_diffusion"), folder)
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.unet(cross_attention_dim=tiny.WIDTH, block_out_channels=(16,), **level).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("rank", RANKS)
def test_a_compiled_step_in_bf16_is_the_eager_one_in_float32(flat, rank):
    config = settings(flat, rank=rank, gradient_accumulation_steps=2)
    plain, compiled = start(config), start(settings(flat, rank=rank, **LIKE_A_GPU))
    network = compiled.state.student.networks()[0]
    kernels = [weight for weight in network.parameters() if weight.ndim == 4 and weight.shape[2] > 1]
    assert kernels
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    before = compiled.state.student.masters()
    for _ in range(3):
        loss, norm = compiled.train_step()
        assert loss.item() == pytest.approx(plain.train_step()[0].item(), rel=0.1)
        assert norm.isfinite()
    after = compiled.state.student.masters()
    assert all(weight.isfinite().all() for weight in after.values())
    moved = sum(not weight.equal(before[name]) for name, weight in after.items())
    assert moved > 0.9 * len(after)
    assert compiled.state.relative_delta() == pytest.approx(plain.state.relative_delta(), rel=0.2)


def test_compiled_code_with_wrong_gradients_is_refused(models, monkeypatch):
    """As torch 2.13 makes it of a whole UNet on a CPU: the loss is right, and some layers learn nothing."""

    def compile(student, static):
        weights = list(student.trainable.values())
        for weight in weights[len(weights) // 2 :]:
            weight.register_hook(torch.zeros_like)

    monkeypatch.setattr(FullStudent, "compile", compile)
    trainer = start(settings(models("stable_diffusion"), compile=True))
    with pytest.raises(UserError, match=r"but torch .* compiles this model wrongly here: its gradients differ by "):
        trainer.step.prepare()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 0.17)])
def test_rounding_is_no_wrong_gradient(dtype, error):
    plain = torch.ones(4)
    check_compiled(plain, plain * (1 + error), dtype)
    for wrong in (plain * torch.tensor([1, 1, 1, 0.2]), plain * torch.nan):
        with pytest.raises(UserError, match="wrongly"):
            check_compiled(plain, wrong, dtype)
    check_compiled(plain * 0, plain * 0, dtype)


def test_tf32_is_what_the_setting_says(models):
    """cuDNN has a switch of its own, which is on by default."""
    for allowed in (True, False):
        start(settings(models("stable_diffusion"), allow_tf32=allowed))
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
