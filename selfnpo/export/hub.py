"""Upload a trained negative to the Hugging Face hub, as the logged-in user; the settings contain no token."""

from pathlib import Path

from huggingface_hub import HfApi

from selfnpo.config import TrainConfig
from selfnpo.errors import UserError, first_line


def create_repo(config: TrainConfig) -> str:
    """Create the repository for a run's negative if it does not exist, and return its full id. This happens before training,
    so that missing permissions are noticed at the start.

    Raises:
        UserError: the hub cannot be reached, or the user has no write access.
    """
    name = config.hub_model_id or config.output_dir.resolve().name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the hub, its HTTP library and the system raise many types
        raise UserError(
            f"push_to_hub: {name} could not be created on the hub ({first_line(error)}); log in with 'hf auth login', "
            "pass a repository that you own as --hub_model_id, or leave --push_to_hub out"
        ) from error


def upload(repo_id: str, folder: Path) -> str:
    """Upload the contents of `folder`, and return their URL.

    Raises:
        UserError: the upload failed.
    """
    try:
        return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Negative model").commit_url
    except Exception as error:  # the same many types
        raise UserError(
            f"the run is complete, but {folder} could not be uploaded ({first_line(error)}); try again: "
            f"hf upload {repo_id} {folder} ."
        ) from error
