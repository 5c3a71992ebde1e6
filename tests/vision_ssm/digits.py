"""A small classifier of scikit-learn's digits (8 x 8 pixels), trained in seconds, whose mixing is scans alone."""

from typing import get_args

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vision_ssm.explain import Method
from vision_ssm.explain.maps import combine, make_maps
from vision_ssm.explain.perturb import Perturbation, perturbation_test
from vision_ssm.explain.recording import record
from vision_ssm.mamba import BidirectionalMamba


class DigitsNet(nn.Module):
    """Patches of 2 x 2 pixels and a class token in their middle, blocks x + mixer(norm(x)), linear on the class token.

    Shape: (B, 1, 8, 8) -> (B, 10)
    """

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, dim, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mixers = nn.ModuleList(BidirectionalMamba(dim, state_size=4) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :8], torch.zeros_like(x[:, :1]), x[:, 8:]], dim=1) + self.positions
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x[:, 8])


PATCHES = [i for i in range(17) if i != 8]
"""Positions of the patches among the tokens."""


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) floats from 0 to 1 and (1797,) classes; the first 1200 are for training."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def trained(*, steps: int = 200, seed: int = 0) -> DigitsNet:
    """A network trained on digits with pixels missing, so that blanked ones are nothing new to it."""
    torch.manual_seed(seed)
    images, labels = digits()
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(0, 1200, (64,))
        kept = torch.rand(64, 1, 8, 8) >= 0.5 * torch.rand(64, 1, 1, 1)
        loss = F.cross_entropy(net(images[batch] * kept), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def perturbed(net: DigitsNet, method: Method) -> Perturbation:
    """The perturbation test of a map on the pictures that were not trained on."""
    images, labels = (t[1200:] for t in digits())
    with record(net) as recording:
        logits = net(images)
    maps = make_maps(recording, method, target=logits.max(1).values, query=lambda _: [8], batch=len(images))
    return perturbation_test(net, images, labels, combine(maps[0][1], (4, 4), grid=(4, 4), tokens=PATCHES))


if __name__ == "__main__":  # the table of docs/explain.md
    torch.set_num_threads(1)
    for seed in range(5):
        net = trained(seed=seed)
        for method in get_args(Method):
            print(
                seed, f"{method:12}", *(f"{name} {value:.1f}" for name, value in perturbed(net, method).auc().items())
            )
