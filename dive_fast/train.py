"""Makes the zoo's models: trains, fits the temperature, measures, and writes a model directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors import SafetensorError

from dive_fast.calibration import fit_beta
from dive_fast.classify import DiffusionClassifier
from dive_fast.errors import RunError
from dive_fast.zoo import digits
from dive_fast.zoo.training import (
    DIGITS,
    LOG,
    TrainingConfig,
    augment_images,
    train_transformer,
)

N_CALIBRATION = 400
PROBES = 100


def train_digits(
    out: str | Path, *, steps: int | None = None, seed: int = 0, progress: bool = True
) -> float:
    """Trains the zoo's ``digits`` into ``out``, a diffusers model directory.

    Returns:
        Accuracy on the 397 held-out digits by enumeration with 100 probes.

    Raises:
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made a directory: {error.strerror}.") from error
    # dive_fast.json comes last: a model of ours without it was cut off while it was measured.
    unfinished = (out / LOG).exists() and not (out / "dive_fast.json").exists()
    if (out / "model_index.json").exists() and not unfinished:
        raise RunError(f"{out} holds a model already; choose another --out.")
    config = dataclasses.replace(DIGITS, steps=steps or DIGITS.steps, seed=seed)
    train = digits.load_digits("train")
    transformer = train_transformer(train.images, train.labels, config, out, progress)
    try:
        write_model(out, transformer, digits.NAMES)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written ({error}).") from error

    classifier = DiffusionClassifier.from_pretrained(out)
    beta = fit_beta(*_calibration_losses(classifier, train, config, progress))

    held_out = digits.load_digits("test")
    losses = classifier.losses(held_out.images, probes=PROBES, progress=progress).mean(dim=2)
    accuracy = (losses.argmin(dim=1).numpy() == held_out.labels).mean().item()
    facts = {
        "timestep_embedding": "diffusers",
        "beta": round(beta, 2),
        "command": "dive-fast train digits --out DIR",
        "config": dataclasses.asdict(config),
        "expected": {"enumerate_100_probes_accuracy": round(accuracy, 4), "n": len(losses)},
    }
    (out / "dive_fast.json").write_text(json.dumps(facts, indent=2) + "\n")
    return accuracy


def _calibration_losses(
    classifier: DiffusionClassifier, train: digits.Digits, config: TrainingConfig, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [B, C] and labels [B] of training images, each moved a little.

    Of the training part, because the held-out digits are for the final figure only; moved, because
    on pictures that it has seen as they are the model is surer than it ought to be.
    """
    x0 = classifier.encode(train.images[:N_CALIBRATION])
    generator = torch.Generator().manual_seed(config.seed)
    moved = augment_images(x0, dataclasses.replace(config, augment=1.0), generator)
    losses = classifier.losses(latents=moved, probes=PROBES, progress=progress)
    return losses.mean(dim=2), torch.from_numpy(train.labels[:N_CALIBRATION])


def write_model(out: Path, transformer: DiTTransformer2DModel, names: tuple[str, ...]) -> None:
    """A pixel-space DiT as ``DiTPipeline.save_pretrained`` would write it, without a VAE."""
    # Shared embedders cannot be written as safetensors: a fresh model takes equal copies.
    copy = DiTTransformer2DModel.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    copy.save_pretrained(out / "transformer")
    DDPMScheduler(beta_schedule="linear").save_pretrained(out / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "scheduler": ["diffusers", "DDPMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
