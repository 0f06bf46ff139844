"""Networks as their authors might write them: none knows of this library."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, SIDE = 5, 8


def waves(t: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2)).to(t.device)
    return torch.cat([(t.float()[:, None] * rates).cos(), (t.float()[:, None] * rates).sin()], 1)


class PatchTransformer(nn.Module):
    """DDPM: net(x, t, y) looks the label up itself, and has a learned variance."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.labels = nn.Embedding(CLASSES + 1, width)  # the last one: no label
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(1, (SIDE // 2) ** 2, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.5, batch_first=True)
        self.out = nn.Linear(width, 2 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        tokens = self.patches(x).flatten(2).mT + self.places
        c = waves(t, self.width) + self.labels(y)
        tokens = self.out(self.block(tokens * (1 + c[:, None])))
        return F.fold(
            tokens.view(len(x), -1, 2, 4).permute(0, 2, 3, 1).flatten(1, 2), SIDE, 2, stride=2
        )


class Preconditioned(nn.Module):
    """EDM: net(x, sigma, one_hot) is the denoiser D; ``raw`` the network F within."""

    sigma_data = 0.6

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)
        self.of_noise, self.of_class = nn.Linear(8, 12), nn.Linear(CLASSES, 12)

    def raw(self, x: Tensor, c_noise: Tensor, one_hot: Tensor) -> Tensor:
        added = self.of_noise(waves(c_noise * 100, 8)) + 3 * self.of_class(one_hot)
        return self.second(F.silu(self.first(x) + added[:, :, None, None]))

    def forward(self, x: Tensor, sigma: Tensor, one_hot: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        r = (sigma**2 + self.sigma_data**2).sqrt()
        raw = self.raw(x / r, sigma.flatten().log() / 4, one_hot)
        return self.sigma_data**2 / r**2 * x + sigma * self.sigma_data / r * raw


class RectifiedUNet(nn.Module):
    """Flow from noise (time 0) to data (time 1); gives a dict with the velocity data - noise."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(CLASSES, 10)
        self.down, self.middle = nn.Conv2d(3, 10, 3, 2, 1), nn.Conv2d(10, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 3, 4, 2, 1)
        self.time = nn.Linear(1, 10)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.down(batch["x"])
        added = self.time(batch["time"][:, None]) + batch["class_vector"]
        h = h + F.silu(self.middle(h) * added[:, :, None, None])
        return {"velocity": self.up(h)}


class Nested(nn.Module):
    """Lists in lists, a list in a block, a container, and a middle that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(CLASSES, 6)
        self.into = nn.Conv2d(1, 6, 3, padding=1)
        self.downs = nn.ModuleList(
            nn.ModuleList([Shifted(), nn.Conv2d(6, 6, 3, padding=1)]) for _ in range(2)
        )
        self.middle = nn.Conv2d(6, 6, 1)
        self.wrapped = nn.Sequential(nn.Identity(), nn.Module())
        self.wrapped[1].ups = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1)])
        self.unused = nn.ModuleList([nn.Linear(2, 2)])
        self.out = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.into(x), self.labels(y)
        for block, conv in self.downs:
            h = F.silu(conv(block(h, c)[0]))
        return self.out(self.wrapped[1].ups[0](self.middle(h)))


class Shifted(nn.Module):
    """Gives a tuple, and has a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1)])

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        return h + self.convs[0](h) * c[:, :, None, None], [h]
