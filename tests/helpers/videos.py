"""Read back the videos that are written."""

import imageio_ffmpeg
import numpy as np
from PIL import Image


def read_video(path):
    """(width, height), frames `[n, H, W, 3]` and duration in seconds."""
    if path.suffix == ".gif":
        with Image.open(path) as gif:
            frames, duration = [], 0
            for number in range(gif.n_frames):
                gif.seek(number)
                frames.append(np.asarray(gif.convert("RGB")))
                duration += gif.info["duration"]
            return gif.size, np.stack(frames), duration / 1000
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    size = about["size"]
    frames = np.stack([np.frombuffer(frame, np.uint8).reshape(size[1], size[0], 3) for frame in reader])
    return size, frames, len(frames) / about["fps"]
