"""SD1.5, SDXL and CogVideoX-2b as they were published, on the meta device: shapes, conditioning, counts, LoRA, memory."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict

from benchmarks import published
from selfnpo.budget.memory import memory_plan
from selfnpo.budget.meta import call_on_meta
from selfnpo.config import PRESETS, TrainConfig, parse_config
from selfnpo.models import ModelOptions, SampleOptions, Source
from selfnpo.models.lora.adapters import STUDENT, add_lora
from selfnpo.schedule import make_grid, make_schedule
from selfnpo.training.student import lora_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


@pytest.fixture(scope="module", params=["STABLE_DIFFUSION_1_5", "STABLE_DIFFUSION_XL", "COGVIDEOX_2B"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return published.write(getattr(published, name), tmp_path_factory.mktemp("published") / name)


@pytest.fixture
def source(folder):
    return Source(ModelOptions(str(folder)))


# What ComfyUI derives from the layers of either UNet.
KOHYA_KEY = re.compile(
    r"lora_unet_(down_blocks_\d|mid_block|up_blocks_\d)_attentions_\d_transformer_blocks_\d_attn[12]_to_(q|k|v|out_0)"
    r"\.(lora_down\.weight|lora_up\.weight|alpha)"
)
EXPECTED = {
    "STABLE_DIFFUSION_1_5": {
        "family": "stable-diffusion",
        "parameters": 859_520_964,
        "shape": (4, 64, 64),
        "rows": {"encoder_hidden_states": (77, 768)},
        "prediction_type": "epsilon",
        "adapted": 128,
    },
    "STABLE_DIFFUSION_XL": {
        "family": "stable-diffusion-xl",
        "parameters": 2_567_463_684,
        "shape": (4, 128, 128),
        "rows": {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)},
        "prediction_type": "epsilon",
        "adapted": 560,
    },
    "COGVIDEOX_2B": {
        "family": "cogvideox",
        "parameters": 1_693_783_872,
        "shape": (13, 16, 60, 90),
        "rows": {"encoder_hidden_states": (226, 4096)},
        "prediction_type": "v_prediction",
        "adapted": 120,
    },
}


def test_family_shapes_and_counts(source, name):
    expected, model = EXPECTED[name], source.empty_denoiser()
    assert source.family.name == expected["family"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    shape = source.family.sample_shape(source.config, source.scale, SampleOptions())
    assert shape == expected["shape"]
    assert source.family.condition_shapes(source.config) == expected["rows"]
    with torch.no_grad():
        assert call_on_meta(source, model, shape, 2, SampleOptions()).shape == (2, *shape)


def test_stable_diffusion_2_is_told_from_1(tmp_path):
    files = published.STABLE_DIFFUSION_1_5
    unet = files["unet/config.json"] | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
    family = Source(ModelOptions(str(published.write(files | {"unet/config.json": unet}, tmp_path)))).family
    assert (family.name, family.base_model_version) == ("stable-diffusion-2", "sd_v2")


def test_noise_levels(source, name):
    schedule, grid = make_schedule(source.scheduler), make_grid(source.scheduler, 25)
    assert schedule.prediction_type == EXPECTED[name]["prediction_type"]
    assert (schedule.alpha[-1] == 0) == (name == "COGVIDEOX_2B")  # zero terminal SNR
    assert len(grid.timesteps) == 25


def test_a_lora_adapts_every_attention_projection(source, name):
    model = source.empty_denoiser()
    trained = add_lora(model, lora_config(TrainConfig(rank=16), source.family), STUDENT)
    assert len(trained) == 2 * EXPECTED[name]["adapted"]
    if source.family.base_model_version:
        adapters = get_peft_model_state_dict(model, adapter_name=STUDENT)
        keys = convert_state_dict_to_kohya({f"unet.{path}": tensor for path, tensor in adapters.items()}).keys()
        assert len(keys) == 3 * EXPECTED[name]["adapted"]
        assert all(KOHYA_KEY.fullmatch(key) for key in keys)


def test_other_sizes(source, name):
    sizes = SampleOptions(height=512, width=768, num_frames=17)
    shape = source.family.sample_shape(source.config, source.scale, sizes)
    assert shape == {"COGVIDEOX_2B": (5, 16, 64, 96)}.get(name, (4, 64, 96))
    with torch.no_grad():
        assert call_on_meta(source, source.empty_denoiser(), shape, 1, sizes).shape == (1, *shape)


def test_the_memory_plan_counts_what_is_held(source, name, folder):
    weights = EXPECTED[name]["parameters"]
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder), mixed_precision="bf16", train_batch_size=1, gradient_checkpointing=True
    )
    full = memory_plan(config, source, 1000, CUDA)
    assert full.parameters == full.trainable == weights
    rows = full.rows
    assert rows["student"] + rows["gradients"] + rows["AdamW's two moments"] + rows["reference"] == 18 * weights
    lora = memory_plan(replace(config, rank=16), source, 1000, CUDA)
    assert lora.rows["base, shared by student and reference"] == 2 * weights
    assert lora.total < full.total / 4.5
    assert f"{weights:,} parameters" in str(full)
    assert "GiB" in str(full)
    if name != "STABLE_DIFFUSION_1_5":
        return  # the rest depends on no configuration
    low = memory_plan(replace(config, rank=16, low_vram=True), source, 1000, CUDA)
    assert low.total < lora.total
    frozen = memory_plan(replace(config, reference_decay=1.0), source, 1000, CUDA)
    assert frozen.total == full.total - 2 * weights
    kept = memory_plan(replace(config, rank=16, gradient_checkpointing=False), source, 1000, CUDA)
    activations = "activations (1 samples, estimated)"
    assert kept.rows[activations] > 2 * lora.rows[activations] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_follow_the_family(folder, name, preset):
    config = parse_config(["--pretrained_model_name_or_path", str(folder), "--preset", preset])
    assert config.max_train_steps == 1000
    expected = {"STABLE_DIFFUSION_1_5": (20, 1e-6), "STABLE_DIFFUSION_XL": (10, 1e-7), "COGVIDEOX_2B": (1, 1e-6)}
    assert (config.train_batch_size, config.learning_rate) == expected[name]
    if preset == "released":
        assert (config.rollout, config.loss, config.reference_decay) == ("data", "huber", 0.999)
        assert config.rollout_guidance_scale == (-4.0 if name == "STABLE_DIFFUSION_XL" else 0.0)
        assert config.adam_weight_decay == (0.0 if name == "STABLE_DIFFUSION_XL" else 1e-3)
    lora = parse_config(["--pretrained_model_name_or_path", str(folder), "--network_dim", "8", "--seed", "3"])
    assert (lora.rank, lora.learning_rate, lora.train_batch_size) == (8, 1e-4, expected[name][0])
