"""Trains the zoo's class-conditional diffusion transformers (DiT, arXiv 2212.09748) in pixel space.

The loss is the one that classification uses: || eps - eps_theta(x_t, t, y) ||^2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn

from dive_fast.logs import LogTo
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.models.dit.self_conditioned import SelfConditionedDiT
from dive_fast.training.loop import Keep, train
from dive_fast.training.state import Course


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Course):
    """A transformer and its training.

    Attributes:
        sample_size: side of x0, in pixels or latents.
        in_channels: of x0.
    """

    sample_size: int
    num_classes: int
    in_channels: int = 1
    patch_size: int = 2
    width: int = 96
    heads: int = 4
    layers: int = 4


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(TransformerConfig):
    """What a zoo model is made of and how long it learns."""

    steps: int = 14_000
    batch_size: int = 128
    warmup_steps: int = 500
    ema_decay: float = 0.9995
    label_dropout: float = 0.1
    augment: float = 0.5
    rotate_degrees: float = 8.0
    scale: float = 0.08
    shear: float = 0.0
    shift_pixels: float = 0.6


DIGITS = TrainingConfig(sample_size=8, num_classes=10)
MNIST = TrainingConfig(
    sample_size=28,
    num_classes=10,
    patch_size=7,
    width=128,
    steps=16_000,
    learning_rate=1.5e-3,
    ema_decay=0.999,
    augment=0.0,
    shift_pixels=1.0,
)
# Few images a class: every image is moved.
OMNIGLOT = TrainingConfig(
    sample_size=16,
    num_classes=242,
    patch_size=4,
    width=128,
    steps=20_000,
    batch_size=64,
    augment=1.0,
    rotate_degrees=10.0,
    scale=0.12,
    shear=0.12,
    shift_pixels=0.8,
)


def build_transformer(
    config: TransformerConfig, class_std: float = 0.02, self_condition: bool = False
) -> DiTTransformer2DModel:
    """A ``DiTTransformer2DModel`` whose blocks share one timestep and label embedder.

    diffusers gives every block a copy of its own. Shared copies stay equal, so that the condition
    is one vector, as in the original DiT; on disk they are written out as equal copies.

    Args:
        class_std: of the class embeddings at the start; the original DiT's unless said.
        self_condition: a ``SelfConditionedDiT``, whose other weights start alike.
    """
    kind = SelfConditionedDiT if self_condition else DiTTransformer2DModel
    model = kind(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )
    shared = model.transformer_blocks[0].norm1.emb
    torch.nn.init.normal_(shared.class_embedder.embedding_table.weight, std=class_std)
    for block in model.transformer_blocks:
        block.norm1.emb = shared
        # adaLN-Zero: every block starts as the identity.
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    # eval() switches off diffusers' own label dropout, which every block would draw for itself.
    return model.eval()


def augment_images(x0: torch.Tensor, config: TrainingConfig, generator) -> torch.Tensor:
    """Rotates, scales, shears and shifts a share of the images. x0 [B, 1, h, w] in [-1, 1]."""
    n = len(x0)

    def uniform(half_width: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * half_width

    angle = uniform(math.radians(config.rotate_degrees))
    scale = 1 + uniform(config.scale)
    shift = 2 * config.shift_pixels / config.sample_size
    # Drawn in a fixed order, and only where asked for: the digits were trained without shear.
    right, down = uniform(shift), uniform(shift)
    shear = uniform(config.shear) if config.shear else torch.zeros(n)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, shear * cos - sin, right, sin, shear * sin + cos, down]
    theta = torch.stack(rows, dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x0.shape), align_corners=False)
    # The ground is -1: shifting it to zero makes zero padding the right border.
    moved = F.grid_sample(x0 + 1, grid, align_corners=False, padding_mode="zeros") - 1
    chosen = torch.rand(n, generator=generator) < config.augment
    return torch.where(chosen[:, None, None, None], moved, x0)


def train_transformer(
    images: np.ndarray,
    labels: np.ndarray,
    config: TrainingConfig,
    out: Path,
    progress: bool = True,
    log_to: LogTo | None = None,
    checkpoints: Collection[int] = (),
    keep: Callable[[int, nn.Module], None] | None = None,
):
    """Trains on uint8 images [N, h, w] and returns the transformer with averaged (EMA) weights.

    The side of the images is the model's ``sample_size`` or a multiple of it.

    What is on disk meanwhile, and how a run that was cut off goes on, says ``loop.train``.

    Args:
        checkpoints: the numbers of steps after which ``keep`` is told the number, and given the
            transformer with its weights averaged up to then.

    Raises:
        RunError: ``out`` holds the state of a run with another configuration, or a damaged one,
            or cannot be written.
    """
    torch.manual_seed(config.seed)
    model = build_transformer(config)
    alpha_bar = DDPMScheduler(beta_schedule="linear").alphas_cumprod
    data = torch.from_numpy(images).float().div(127.5).sub(1).unsqueeze(1)
    target = torch.from_numpy(labels)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(data), (config.batch_size,), generator=generator)
        x0, y = augment_images(data[pick], config, generator), target[pick]
        # Larger images are moved at their own size, then averaged as ``data.images`` halves them.
        x0 = F.avg_pool2d(x0, x0.shape[-1] // config.sample_size)
        drop = torch.rand(len(y), generator=generator) < config.label_dropout
        y = torch.where(drop, config.num_classes, y)
        t = torch.randint(len(alpha_bar), (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        x_t = a[:, None, None, None] * x0 + s[:, None, None, None] * eps
        with config.autocast(x_t.device):
            prediction = model(x_t, t, y).sample
        return F.mse_loss(prediction.float(), eps)

    kept = None if keep is None else Keep(checkpoints, lambda step: keep(step, model))
    train(model, loss_of, config, out, keep=kept, log_to=log_to, progress=progress)
    return model


def write_model(
    out: Path,
    transformer: DiTTransformer2DModel,
    names: tuple[str, ...],
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler | None = None,
    vae: Autoencoder | None = None,
) -> None:
    """A DiT as ``DiTPipeline.save_pretrained`` would write it, in pixel space without a VAE.

    Args:
        scheduler: of the training; DDPM's with linear betas if None.
    """
    # Shared embedders cannot be written as safetensors: a fresh model takes equal copies.
    kind = type(transformer)
    copy = kind.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    copy.save_pretrained(out / "transformer")
    scheduler = DDPMScheduler(beta_schedule="linear") if scheduler is None else scheduler
    scheduler.save_pretrained(out / "scheduler")
    if vae is not None:
        vae.save_pretrained(out / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": [_library(transformer), kind.__name__],
        "vae": [None, None] if vae is None else [_library(vae), type(vae).__name__],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _library(part: nn.Module) -> str:
    """Where diffusers finds the class: in itself, or in the module that has it."""
    module = type(part).__module__
    return "diffusers" if module.split(".")[0] == "diffusers" else module
