"""Real handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, in two stratified halves.

One half trains the diffusion model. The other is held out: it trains the judges and is the reference set. Settings were
chosen on the "development" split (train on half B, judge on half A). Every reported figure comes from the "final" split
(train on half A, judge on half B), whose judges were never used to choose a setting.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from selfnpo.options import Split


@dataclass(frozen=True)
class Digits:
    images: Tensor  # [n, 1, 8, 8] float32 in [-1, 1]
    labels: Tensor  # [n] int64, 0..9


def halves(split: Split = "final") -> tuple[Digits, Digits]:
    """(training half, held-out half) of the split."""
    images, labels = load_digits(return_X_y=True)
    halves = train_test_split(torch.arange(len(labels)), test_size=0.5, random_state=0, stratify=labels)
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(labels)
    a, b = (Digits(images[half], labels[half]) for half in halves)
    return (a, b) if split == "final" else (b, a)
