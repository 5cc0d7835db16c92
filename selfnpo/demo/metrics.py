"""The quality of generated digits, compared with real digits that the diffusion model was not trained on.

The judges are three small classifiers, trained on the held-out half. Every metric except nn is averaged over the judges; fd
to coverage are computed in a judge's feature space:

    fd          Frechet distance between Gaussian fits (Heusel et al., arXiv 1706.08500)            lower is better
    precision   generated samples inside the real k-nearest-neighbour balls (arXiv 1904.06991)       higher: faithful
    recall      real samples inside the generated balls (ibid.)                                      higher: varied
    density     real balls around a generated sample, divided by k (Naeem et al., arXiv 2002.09797)  higher: faithful
    coverage    real balls that contain a generated sample (ibid.)                                   higher: varied
    nn          RMS pixel distance to the 5 nearest real digits of the requested class               lower is better
    lp          log-probability that a judge gives the requested class       higher is better
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfnpo.inputs.digits import Digits
from selfnpo.progress import progress

K = 5
METRICS = ("fd", "precision", "recall", "density", "coverage", "nn", "lp")
HIGHER_IS_BETTER = {
    "fd": False,
    "precision": True,
    "recall": True,
    "density": True,
    "coverage": True,
    "nn": False,
    "lp": True,
}


class Judge(nn.Module):
    """A classifier for 8x8 digits; its penultimate activations are the feature space."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_judge(digits: Digits, seed: int, steps: int = 1500) -> Judge:
    """Train one judge with noise augmentation. Deterministic given the seed; leaves the global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = torch.randint(len(digits.labels), (128,))
            images = digits.images[batch] + 0.2 * torch.randn(128, 1, 8, 8)
            F.cross_entropy(judge(images), digits.labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return judge.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance between Gaussian fits to two feature sets, `[n, d]` float64."""
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of cov_a cov_b are those of a positive semi-definite matrix, so the trace of its root is real.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * root).item()


def _radii(features: Tensor) -> Tensor:
    """Distance from every point to its K-th nearest neighbour."""
    return torch.cdist(features, features).kthvalue(K + 1, dim=1).values


def compare(fake: Tensor, real: Tensor) -> dict[str, float]:
    """The metrics of a generated and a real set in a feature space, `[n, d]` and `[m, d]` float64."""
    distance = torch.cdist(fake, real)
    inside = distance <= _radii(real)
    return {
        "fd": frechet_distance(fake, real),
        "precision": inside.any(1).double().mean().item(),
        "recall": (distance <= _radii(fake)[:, None]).any(0).double().mean().item(),
        "density": inside.double().sum(1).mean().item() / K,
        "coverage": inside.any(0).double().mean().item(),
    }


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of `labels` `[n]` given `logits` `[n, 10]`: `[n]`."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


class Metrics:
    """The judges and the reference set for one held-out half."""

    def __init__(self, held_out: Digits, seeds: tuple[int, ...] = (0, 1, 2)):
        self.held_out = held_out
        judges = progress(seeds, desc="train judges", unit="judge", leave=False)
        self.judges = [train_judge(held_out, seed) for seed in judges]
        self.real = [judge.features(held_out.images).double() for judge in self.judges]

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """All metrics for `images` `[n, 1, 8, 8]`, generated for `labels` `[n]`."""
        by_judge = [
            compare(judge.features(images).double(), real) | {"lp": log_probability(judge(images), labels).mean().item()}
            for judge, real in zip(self.judges, self.real, strict=True)
        ]
        values = {name: sum(row[name] for row in by_judge) / len(by_judge) for name in by_judge[0]}
        return values | {"nn": self.nearest(images, labels).mean().item()}

    def nearest(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean RMS pixel distance from each image to the 5 nearest held-out digits of its requested class: `[n]`."""
        result = images.new_empty(len(images))
        for label in range(10):
            asked = labels == label
            real = self.held_out.images[self.held_out.labels == label]
            distance = torch.cdist(images[asked].flatten(1), real.flatten(1)) / images[0].numel() ** 0.5
            result[asked] = distance.topk(K, largest=False).values.mean(1)
        return result
