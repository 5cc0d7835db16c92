"""Models from disk: what is loaded is what plain diffusers loads, and it is asked as plain pipelines ask it."""

import json
import shutil

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)  # fmt: skip
from peft import LoraConfig, get_peft_model_state_dict

import tiny
from original_format import save_single_file
from selfnpo.errors import UserError
from selfnpo.models import ModelOptions, SampleOptions, Source, load_negative, load_pretrained
from selfnpo.sampling.ddim import ddim_sample, start_noise
from selfnpo.sampling.decode import decode_frames, decode_samples

PROMPTS = ["a lighthouse in a storm", "two cats"]
SCALE, STEPS = 4.0, 10
TEXT_FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "cogvideox", "cogvideox_rotary"]
PIPELINES = {
    "stable_diffusion": (StableDiffusionPipeline, DDIMScheduler),
    "stable_diffusion_xl": (StableDiffusionXLPipeline, DDIMScheduler),
    "cogvideox": (CogVideoXPipeline, CogVideoXDDIMScheduler),
    "cogvideox_rotary": (CogVideoXPipeline, CogVideoXDDIMScheduler),
}


def load(folder, prompts=("",), **options):
    return load_pretrained(ModelOptions(str(folder), **options), prompts=prompts)


def assert_close(got, expected):
    """To float32 rounding, relative to the size of what is expected."""
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_those_that_diffusers_loads(models, family):
    model = load(models(family))
    pipeline = DiffusionPipeline.from_pretrained(models(family))
    expected = getattr(pipeline, model.family.component).state_dict()
    got = model.denoiser.state_dict()
    assert got.keys() == expected.keys()
    assert all(got[name].equal(expected[name]) for name in got)
    assert not any(parameter.requires_grad for parameter in model.denoiser.parameters())


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_sampling_equals_the_plain_pipeline(models, family):
    """With the base as its own negative, guidance away from the negative is classifier-free guidance."""
    model = load(models(family), PROMPTS)
    noise = start_noise(model, 2, seed=1)
    latents = ddim_sample(model, noise, torch.arange(2), SCALE, num_inference_steps=STEPS)

    kind, scheduler = PIPELINES[family]
    pipeline = kind.from_pretrained(models(family))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    options = {"num_frames": 9, "max_sequence_length": 16} if "cogvideox" in family else {}
    expected = pipeline(
        PROMPTS, latents=noise, guidance_scale=SCALE, num_inference_steps=STEPS, output_type="latent", return_dict=False,
        **options,
    )[0]  # fmt: skip
    assert_close(latents, expected)

    images = decode_samples(model, latents)
    sizes = {"stable_diffusion": (2, 3, 64, 64), "stable_diffusion_xl": (2, 3, 64, 64)}
    assert images.shape == sizes.get(family, (8, 3, 64, 64))  # of two videos four frames each
    decoded = pipeline.decode_latents(expected)[:, :, [0, 2, 5, 8]] if "cogvideox" in family else None
    if decoded is not None:
        assert_close(images.view(2, 4, 3, 64, 64).transpose(1, 2), decoded)


def test_padding_of_cogvideox_1_5_is_not_shown(models, tmp_path):
    family = "cogvideox_rotary"
    kind, scheduler = PIPELINES[family]
    pipeline = kind.from_pretrained(models(family))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    transformer = type(pipeline.transformer).from_config({**pipeline.transformer.config, "patch_size_t": 2})
    pipeline.transformer = tiny.without_zeros(transformer).eval()
    pipeline.save_pretrained(tmp_path)
    model = load(tmp_path, PROMPTS)
    noise = start_noise(model, 2, seed=1)
    assert noise.shape[1] == 4  # 9 frames are 3 in latent space
    options = {"num_frames": 9, "max_sequence_length": 16, "guidance_scale": SCALE, "num_inference_steps": STEPS}
    expected = pipeline(PROMPTS, latents=noise, output_type="pt", return_dict=False, **options)[0]
    latents = ddim_sample(model, noise, torch.arange(2), SCALE, num_inference_steps=STEPS)
    frames = torch.stack([*decode_frames(model, latents)])
    assert_close(frames.clamp(-1, 1) / 2 + 0.5, expected)


@pytest.mark.parametrize("family", ["class_conditional", "unconditional", "unconditional_flat"])
def test_sampling_equals_a_plain_loop(models, family):
    model = load(models(family))
    noise = start_noise(model, 3, seed=1)
    asked = torch.tensor([0, 2, 1]) if family == "class_conditional" else torch.zeros(3, dtype=torch.int64)
    samples = ddim_sample(model, noise, asked, SCALE, num_inference_steps=STEPS)

    scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    sample = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            if family == "class_conditional":
                labels = torch.cat((asked, torch.full_like(asked, 10)))
                output = model.denoiser(torch.cat((sample, sample)), t.expand(6), class_labels=labels).sample[:, :4]
                cond, null = output.chunk(2)
                output = null + SCALE * (cond - null)
            else:
                output = model.denoiser(sample, t).sample
            sample = scheduler.step(output, t, sample).prev_sample
    assert_close(samples, sample)


def test_a_dit_as_it_was_published(models, tmp_path):
    """Its configuration is older than the name of its class, and holds what other models of the former class needed."""
    folder = shutil.copytree(models("class_conditional"), tmp_path / "model")
    path = folder / "transformer" / "config.json"
    former = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | former))
    published, renamed = load(folder), load(models("class_conditional"))
    assert published.family is renamed.family
    pairs = zip(published.denoiser.parameters(), renamed.denoiser.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_type": "ada_norm_single"}))  # as of PixArt
    with pytest.raises(UserError, match=r"which cannot be trained here.* any fine-tune of the same architecture"):
        load(folder)


def test_micro_conditioning_reaches_sdxl(models):
    options = ModelOptions(str(models("stable_diffusion_xl")))
    plain = load_pretrained(options)
    assert plain.conditions.constants["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    sizes = SampleOptions(height=128, width=64, original_size=(512, 256), crops_coords_top_left=(3, 5), target_size=(9, 7))
    told = load_pretrained(options, sizes)
    assert told.sample_shape == (4, 16, 8)
    assert told.conditions.constants["time_ids"].tolist() == [[512, 256, 3, 5, 9, 7]]
    sample, time, null = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.tensor([1])
    with torch.no_grad():
        assert not plain.predict(plain.denoiser, sample, time, null).equal(told.predict(told.denoiser, sample, time, null))


def test_sdxl_has_zeros_for_the_null_prompt_where_its_pipeline_has(models, tmp_path):
    model = load(models("stable_diffusion_xl"))
    assert not model.conditions.rows["encoder_hidden_states"][model.null_condition].any()
    assert model.conditions.rows["encoder_hidden_states"][0].any()  # the prompt "" that was asked for is another thing


def test_a_size_of_two_sides_and_none(models, tmp_path):
    folder = shutil.copytree(models("stable_diffusion"), tmp_path / "model")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    for size, sizes, shape in (((8, 16), SampleOptions(), (4, 8, 16)), (None, SampleOptions(resolution=96), (4, 12, 12))):
        path.write_text(json.dumps(config | {"sample_size": size}))
        source = Source(ModelOptions(str(folder)))
        assert source.family.sample_shape(source.config, source.scale, sizes) == shape


def test_frames_and_size_of_videos(models):
    model = load_pretrained(ModelOptions(str(models("cogvideox_rotary"))), SampleOptions(num_frames=5, resolution=96))
    assert model.sample_shape == (2, 4, 12, 12)
    assert model.conditions.constants["image_rotary_emb"][0].shape[0] == 2 * 6 * 6


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_single_file_is_the_same_model(models, tmp_path, family):
    file = save_single_file(models(family), tmp_path / "model.safetensors", sdxl=family.endswith("xl"))
    one = load(models(family), PROMPTS)
    other = load(file, PROMPTS, single_file_config=str(models(family)))
    pairs = zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    assert one.conditions.rows.keys() == other.conditions.rows.keys()
    assert all(rows.equal(other.conditions.rows[name]) for name, rows in one.conditions.rows.items())
    sample = torch.randn(1, *one.sample_shape)
    assert decode_samples(one, sample).equal(decode_samples(other, sample))


@pytest.mark.parametrize("family", ["stable_diffusion", "unconditional", "unconditional_flat", "cogvideox"])
def test_a_hub_id_from_the_cache(models, put_in_cache, family):
    """Without a network, files that the model has none of are no obstacle."""
    put_in_cache(models(family), "somebody/tiny")
    here, there = load(models(family)), load("somebody/tiny", local_files_only=True)
    assert all(a.equal(b) for a, b in zip(here.denoiser.parameters(), there.denoiser.parameters(), strict=True))
    assert all(rows.equal(there.conditions.rows[name]) for name, rows in here.conditions.rows.items())
    sample = torch.randn(1, *here.sample_shape)
    assert decode_samples(here, sample).equal(decode_samples(there, sample))


@pytest.fixture
def another(models, tmp_path):
    """A pipeline whose UNet has other weights."""
    folder = shutil.copytree(models("stable_diffusion"), tmp_path / "another")
    unet = tiny.unet(cross_attention_dim=tiny.WIDTH)
    unet.save_pretrained(folder / "unet")
    return folder, unet


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_replaced_unet(models, another, tmp_path, part):
    folder, unet = another
    base = shutil.copytree(models("stable_diffusion"), tmp_path / "base")
    for path in (*base.glob("*/diffusion_pytorch_model.safetensors"), *base.glob("*/model.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))  # a variant of the base, which the other repository has none of
    for _ in range(2):
        model = load(base, PROMPTS, denoiser_name_or_path=str(folder / part), variant="fp16")
        assert all(a.equal(b) for a, b in zip(model.denoiser.parameters(), unet.parameters(), strict=True))
        for path in folder.glob("unet/*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))  # now it has that variant too, and nothing else


def test_a_replaced_unet_from_a_single_file(models, another, tmp_path):
    folder, unet = another
    file = save_single_file(folder, tmp_path / "another.safetensors")
    model = load(models("stable_diffusion"), denoiser_name_or_path=str(file))
    assert all(a.equal(b) for a, b in zip(model.denoiser.parameters(), unet.parameters(), strict=True))


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "cogvideox"])
def test_a_lora_is_merged_into_the_base(models, tmp_path, put_in_cache, family):
    pipeline = DiffusionPipeline.from_pretrained(models(family))
    plain = load(models(family), PROMPTS)
    denoiser = getattr(pipeline, plain.family.component)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = {f"{plain.family.component}_lora_layers": get_peft_model_state_dict(denoiser)}
    metadata = {f"{plain.family.component}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict()}
    lora = tmp_path / "lora"
    pipeline.save_lora_weights(lora, **layers, **metadata)

    model = load(models(family), PROMPTS, lora_name_or_path=str(lora))
    sample, time, condition = torch.randn(2, *model.sample_shape), torch.full((2,), 500.0), torch.arange(2)
    with torch.no_grad():
        got, expected = (model.predict(each, sample, time, condition) for each in (model.denoiser, denoiser))
        base = model.predict(plain.denoiser, sample, time, condition)
    assert_close(got - base, expected - base)
    file = lora / "pytorch_lora_weights.safetensors"
    again = load(models(family), PROMPTS, lora_name_or_path=str(file))
    assert all(a.equal(b) for a, b in zip(again.denoiser.parameters(), model.denoiser.parameters(), strict=True))
    half = load(models(family), PROMPTS, lora_name_or_path=str(lora), lora_scale=0.5)
    name, weight = next((name, weight) for name, weight in half.denoiser.named_parameters() if "to_q.weight" in name)
    whole, theta = (dict(each.denoiser.named_parameters())[name] for each in (model, plain))
    torch.testing.assert_close(weight - theta, 0.5 * (whole - theta))
    put_in_cache(lora, "somebody/negative")
    for origin in (lora, "somebody/negative"):
        negative = load_negative(origin, plain)
        assert all(a.equal(b) for a, b in zip(negative.parameters(), model.denoiser.parameters(), strict=True))
    more = dict(load_negative(lora, half).named_parameters())[name]  # a base with a LoRA of its own keeps it
    torch.testing.assert_close(more - theta, 1.5 * (whole - theta))


def test_prompts_that_are_too_long_are_counted(models, capsys):
    load(models("stable_diffusion"), ["short", "long " * 40])
    assert "warning: 1 of 2 prompts are longer than the 77 tokens of tokenizer; cut" in capsys.readouterr().out
    load_pretrained(ModelOptions(str(models("stable_diffusion"))), further_prompts=("short", "long " * 40))
    assert "warning: 1 of 2 prompts" in capsys.readouterr().out  # the empty one is not the user's
    load(models("stable_diffusion"), ["short"])
    assert "warning" not in capsys.readouterr().out
