"""What is written is there whole or not at all, and follows the umask, also what a library would keep for its owner."""

import os
import stat

import pytest
from safetensors import torch as safetensors
from torch import zeros

from commands import QUICK, call
from selfnpo.files import committed_file, committed_folder


@pytest.fixture(params=[pytest.param(0o022, marks=pytest.mark.slow), 0o027], ids=["022", "027"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_files_that_safetensors_would_keep_for_their_owner(tmp_path, umask):
    with committed_folder(tmp_path / "folder") as partial:
        (partial / "within").mkdir()
        safetensors.save_file({"a": zeros(1)}, partial / "within" / "a.safetensors")
    with committed_file(tmp_path / "b.safetensors") as partial:
        safetensors.save_file({"a": zeros(1)}, partial)
    assert modes(tmp_path) == {
        "folder": 0o777 & ~umask,
        "folder/within": 0o777 & ~umask,
        "folder/within/a.safetensors": 0o666 & ~umask,
        "b.safetensors": 0o666 & ~umask,
    }


def test_a_half_written_file_of_an_earlier_run_passes_nothing_on(tmp_path, umask):
    stale = tmp_path / ".partial-a.txt"
    stale.touch(0o600)
    with committed_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert modes(tmp_path) == {"a.txt": 0o666 & ~umask}


def test_all_that_the_commands_write(models, tmp_path, umask):
    model = ("--pretrained_model_name_or_path", models("stable_diffusion"))
    short = ("--max_train_steps", 1, "--train_batch_size", 1, "--pool_size", 1, "--num_inference_steps", 10)
    assert call("train", *model, *short, "--rank", 2, "--output_dir", tmp_path / "lora") == 0
    assert call("train", *QUICK, "--output_dir", tmp_path / "whole", "--report_to", "tensorboard") == 0
    merged = ("--negative", tmp_path / "lora" / "negative", "--output_dir", tmp_path / "merged")
    assert call("merge", *model, *merged) == 0
    demo = ("--negative", tmp_path / "whole" / "negative", "--num_images", 2, "--output", tmp_path / "grid.png")
    assert call("sample", *demo) == 0
    found = modes(tmp_path)
    assert any("negative_kohya" in name for name in found)
    wrong = {
        name: oct(mode) for name, mode in found.items() if mode != (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    target = tmp_path / "video.gif"
    target.write_text("before")

    def write():
        with committed_file(target) as partial:
            assert partial.suffix == ".gif"
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
