"""Image folders: what is read, how images are fitted, and the scale of latents."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from selfnpo.errors import UserError
from selfnpo.images import encode_images, load_image, read_folder


def test_captions_from_metadata_then_from_text_files(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.JPG", "more/c.webp", "d.bmp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [{"file_name": "b.png", "text": " a cat "}, {"file_name": "more/c.webp", "prompt": "a dog"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d.txt").write_text("a Bär\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("another")
    files, captions = read_folder(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a.JPG", "b.png", "d.bmp", "more/c.webp"]
    assert captions == ["", "a cat", "a Bär", "a dog"]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"file_name": "a.png"}'])
def test_damaged_metadata(tmp_path, line):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(UserError, match="line 2 of"):
        read_folder(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        read_folder(tmp_path / "absent")


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


def test_latents_have_the_scale_of_pipelines(tmp_path):
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "a.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.3).eval()
    cpu = torch.device("cpu")
    latents = encode_images(vae, [tmp_path / "a.png"] * 2, 16, 16, cpu)
    with torch.no_grad():
        expected = 0.3 * vae.encode(load_image(tmp_path / "a.png", 16, 16)[None]).latent_dist.mode()
    assert latents.shape == (2, 4, 16, 16)
    torch.testing.assert_close(latents[:1], expected)
    assert encode_images(None, [tmp_path / "a.png"], 16, 16, cpu).equal(load_image(tmp_path / "a.png", 16, 16)[None])
