"""A trained negative on the Hugging Face hub. Whoever is logged in uploads; no token passes through the settings."""

from pathlib import Path

from huggingface_hub import HfApi

from selfnpo.config import TrainConfig
from selfnpo.errors import UserError, first_line


def create_repo(config: TrainConfig) -> str:
    """The full id of the repository for a run's negative, made where it does not exist: before training, so that a run does
    not end in front of a closed door.

    Raises:
        UserError: the hub cannot be reached or does not let the user write there.
    """
    name = config.hub_model_id or config.output_dir.resolve().name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the hub, of the library beneath it and of the system
        raise UserError(
            f"push_to_hub: {name} could not be created on the hub ({first_line(error)}); log in with 'hf auth login', "
            "name a repository that is yours in --hub_model_id, or leave --push_to_hub out"
        ) from error


def upload(repo_id: str, folder: Path) -> str:
    """Upload what is in `folder`; returns where it can be seen.

    Raises:
        UserError: it could not be uploaded.
    """
    try:
        return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Negative model").commit_url
    except Exception as error:  # as above
        raise UserError(
            f"the run is complete, but {folder} could not be uploaded ({first_line(error)}); try again: "
            f"hf upload {repo_id} {folder} ."
        ) from error
