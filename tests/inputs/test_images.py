"""Image folders: what is read, how images are fitted, and the scale of latents."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, CogVideoXPipeline
from PIL import Image

from selfnpo.errors import UserError
from selfnpo.inputs.folder import read_folder
from selfnpo.inputs.images import encode_images, load_image


def test_captions_from_metadata_then_from_text_files(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("b.png", "a.JPG", "more/c.webp", "d.bmp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [{"file_name": "b.png", "text": " a cat "}, {"file_name": "more/c.webp", "prompt": "a dog"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "d.txt").write_text("\ufeffa Bär\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("another")
    files, captions = read_folder(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a.JPG", "b.png", "d.bmp", "more/c.webp"]
    assert captions == ["", "a cat", "a Bär", "a dog"]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"file_name": "a.png"}'])
def test_damaged_metadata(tmp_path, line):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(
        UserError, match=r'line 2 of .*metadata.jsonl is damaged; expected \{"file_name": ..., "text": ...\}'
    ):
        read_folder(tmp_path)


def test_a_damaged_caption(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"caption .*a.txt could not be read; expected UTF-8 text"):
        read_folder(tmp_path)


def test_no_folder(tmp_path):
    (tmp_path / "a.txt").write_text("a caption alone")
    for path in (tmp_path / "absent", tmp_path / "a.txt"):
        with pytest.raises(UserError, match="is not a folder; expected a folder of images"):
            read_folder(path)
    with pytest.raises(UserError, match=r"has no images; expected files that end in .png, .jpg, .jpeg, .webp, .bmp"):
        read_folder(tmp_path)


def test_images_cover_the_size_and_are_cropped_in_the_centre(tmp_path):
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 20, 20)
    assert loaded.shape == (3, 20, 20)
    assert loaded[:, :, 3:-3].mean((1, 2)).tolist() == pytest.approx([-1, -1, 1], abs=2e-2)


def test_transparent_is_white_and_cameras_may_lie_on_their_side(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 4, 4).eq(1).all()
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "b.jpg", exif=exif, quality=100)
    loaded = load_image(tmp_path / "b.jpg", 8, 8, channels=1)
    assert loaded.shape == (1, 8, 8)
    assert loaded[0, :4].mean() < -0.95
    assert loaded[0, 4:].mean() > 0.95


def test_sixteen_bits_are_scaled_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 4, 4).unique().item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_one_channel_is_the_mean_of_the_colours(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 4, 4, channels=1).unique().item() == pytest.approx((1 - 1 - 0.6) / 3)
    with pytest.raises(UserError, match="the model takes 4 channels, but images have 1 or 3; use --rollout pool"):
        load_image(tmp_path / "a.png", 4, 4, channels=4)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2]])
def test_unreadable_images(tmp_path, damage):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a.png could not be read as an image; remove it or restore it"):
        load_image(path, 4, 4)


def test_images_that_pillow_calls_a_syntax_error(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0nothing")
    with pytest.raises(UserError, match=r"a.png could not be read as an image"):
        load_image(tmp_path / "a.png", 4, 4)


@pytest.fixture
def noise_image(tmp_path):
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def _seeded(kind, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options).eval()


CPU = torch.device("cpu")


@pytest.mark.parametrize("shift", [None, 0.1])
def test_latents_have_the_scale_of_pipelines(noise_image, shift):
    vae = _seeded(AutoencoderKL, block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.3, shift_factor=shift)
    latents = encode_images(vae, [noise_image] * 2, 16, 16, CPU)
    with torch.no_grad():
        expected = 0.3 * (vae.encode(load_image(noise_image, 16, 16)[None]).latent_dist.mode() - (shift or 0))
    assert latents.shape == (2, 4, 16, 16)
    torch.testing.assert_close(latents[:1], expected)


@pytest.mark.parametrize("invert", [False, True])
def test_latents_of_a_video_model_are_one_frame_that_its_pipeline_decodes(noise_image, invert):
    vae = _seeded(
        AutoencoderKLCogVideoX, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.3,
        invert_scale_latents=invert,
    )  # fmt: skip
    latents = encode_images(vae, [noise_image] * 2, 16, 16, CPU)
    assert latents.shape == (2, 1, 16, 2, 2)
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=None, scheduler=None)
    with torch.no_grad():
        mode = vae.encode(load_image(noise_image, 16, 16)[None, :, None]).latent_dist.mode()
        torch.testing.assert_close(pipeline.decode_latents(latents[:1]), vae.decode(mode).sample)


def test_without_a_vae_the_samples_are_the_images(noise_image):
    assert encode_images(None, [noise_image], 16, 16, CPU).equal(load_image(noise_image, 16, 16)[None])
    assert encode_images(None, [noise_image] * 2, 8, 4, CPU, channels=1).shape == (2, 1, 8, 4)
