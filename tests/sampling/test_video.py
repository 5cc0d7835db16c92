"""Videos: every frame is decoded, and stands where and when it should."""

import numpy as np
import pytest
import torch

from selfnpo.models import ModelOptions, load_pretrained
from selfnpo.sampling.ddim import start_noise
from selfnpo.sampling.decode import decode_frames, decode_samples
from selfnpo.sampling.video import save_video
from videos import read_video


def test_all_frames_of_a_video_are_decoded(models):
    base = load_pretrained(ModelOptions(str(models("cogvideox"))))
    samples = start_noise(base, 2, 0)
    videos = [*decode_frames(base, samples)]
    assert [video.shape for video in videos] == [(9, 3, 64, 64)] * 2
    assert decode_samples(base, samples).equal(torch.cat([video[[0, 2, 5, 8]] for video in videos]))


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_every_frame_is_where_and_when_it_should_be(tmp_path, suffix):
    """Two panels of two videos each, of which every frame is one color; sizes are odd."""
    colors = torch.randint(0, 256, (2, 2, 3, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    panels = [[video[:, None, None].expand(3, 101, 301, 3) for video in panel] for panel in colors]
    save_video(tmp_path / f"video{suffix}", ["left", "right"], panels, 4)
    size, frames, _ = read_video(tmp_path / f"video{suffix}")
    assert size == (2 * 301 + 4, size[1])
    assert not any(side % 2 for side in size)
    assert frames[:, :30].min() < 100  # titles
    for column in range(2):
        for row in range(2):
            middle = frames[:, -155 + 105 * row, 150 + 305 * column]
            assert np.abs(middle.astype(int) - colors[column, row].numpy()).max() < 12
