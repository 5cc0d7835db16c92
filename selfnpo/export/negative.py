"""Save the trained negative with its model card: full weights, or a LoRA in both formats."""

import shutil
from pathlib import Path
from typing import Any

from selfnpo.export.model_card import Card, model_card
from selfnpo.export.run_cost import training_cost
from selfnpo.files import committed_file, committed_folder, write_text
from selfnpo.models.lora.read import LORA_FILE
from selfnpo.models.lora.write import model_spec, save_lora
from selfnpo.training.state import TrainState
from selfnpo.training.student import LoRAStudent

KOHYA_FILE = "negative_kohya.safetensors"
PICTURE = "samples.png"


def save_negative(state: TrainState, status: str) -> Path:
    """Save the student to `output_dir`/negative, with a model card: a diffusers model folder, or LoRA files if diffusers
    supports LoRAs for the family."""
    folder = state.config.output_dir / "negative"
    with committed_folder(folder) as partial:
        if _lora_file(state):
            _save_lora(partial, state)
        else:
            state.student.merged().save_pretrained(partial)
        (partial / "README.md").write_text(card(state, status))
    return folder


def _lora_file(state: TrainState) -> str | None:
    """Name of the LoRA file (kohya's if there is one); None if full weights are written."""
    family = state.base.family
    if not (isinstance(state.student, LoRAStudent) and hasattr(family.pipeline_class, "load_lora_weights")):
        return None
    return KOHYA_FILE if family.base_model_version else LORA_FILE


def _save_lora(folder: Path, state: TrainState) -> None:
    config, family = state.config, state.base.family
    title = f"Self-NPO negative for {config.pretrained_model_name_or_path}"
    metadata = model_spec(f"{family.architecture}/lora", title, description="For the negative branch of guidance.")
    metadata |= {
        "ss_base_model_version": family.base_model_version,
        "ss_sd_model_name": config.pretrained_model_name_or_path,
        "ss_output_name": config.output_dir.name,
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_steps": str(state.step),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_batch_size_per_device": str(config.train_batch_size),
        "ss_gradient_accumulation_steps": str(config.gradient_accumulation_steps),
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": str(config.seed),
    }
    student = state.student
    kohya_name = KOHYA_FILE if family.base_model_version else ""
    save_lora(
        folder, student.state_dict(), student.lora, component=family.component, kohya_name=kohya_name, metadata=metadata
    )


def card(state: TrainState, status: str, quality: dict[str, Any] | None = None, picture: str | None = None) -> str:
    """The model card. Without `quality`, the samples were not judged."""
    told = Card(training_cost(state), status, quality, picture, _lora_file(state))
    return model_card(state.config, state.base.source, told)


def add_picture(state: TrainState, status: str, picture: Path, quality: dict[str, Any] | None = None) -> None:
    """Add a picture of samples to the negative's folder and its card, so that both are uploaded to the hub."""
    folder = state.config.output_dir / "negative"
    with committed_file(folder / PICTURE) as partial:
        shutil.copyfile(picture, partial)
    write_text(folder / "README.md", card(state, status, quality, PICTURE))
