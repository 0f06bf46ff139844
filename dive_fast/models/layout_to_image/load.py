"""Reads the family "layout-to-image", whose network is a UNet or a transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin, SD3Transformer2DModel, UNet2DConditionModel

from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import AUTOENCODERS
from dive_fast.models.files.checkpoint import first_line, quiet_diffusers
from dive_fast.models.layout_to_image.base import LayoutModel
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.transformer import LayoutTransformerModel
from dive_fast.models.layout_to_image.unet import LayoutToImageModel
from dive_fast.models.pipeline import Pipeline


def load(directory: Path, **asked: Any) -> LayoutModel:
    """Reads what ``LayoutModel.save_pretrained`` writes.

    Args:
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported.
    """
    pipeline = Pipeline(directory, **asked)
    scheduler = _load_scheduler(pipeline)
    family, part = LayoutToImageModel, UNet2DConditionModel
    if LayoutTransformerModel.folder in pipeline.index:
        family, part = LayoutTransformerModel, SD3Transformer2DModel
    denoiser = pipeline.network(part, family.folder)
    encoder = pipeline.component(LayoutEncoder, "layout_encoder")
    vae, class_name = None, pipeline.part("vae")
    if class_name is not None:
        if class_name not in AUTOENCODERS:
            raise ModelError(
                f"expected vae in {directory / 'model_index.json'} to be a "
                f"{' or '.join(AUTOENCODERS)}, got {class_name!r}."
            )
        vae = pipeline.vae(denoiser.config.in_channels)
    r = pipeline.index.get("space_to_depth", 1)
    return family(denoiser, encoder, scheduler, vae, space_to_depth=r, name=pipeline.name)


def _load_scheduler(pipeline: Pipeline) -> SchedulerMixin:
    """The scheduler itself, which ``save_pretrained`` writes again."""
    pipeline.discrete_schedule()  # says what is wrong with it
    config = pipeline.scheduler_config
    scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ModelError(
            f"expected the _class_name of a diffusers scheduler in "
            f"{pipeline.directory / 'scheduler'}, got {config.get('_class_name')!r}."
        )
    try:
        with quiet_diffusers():  # about entries that a scheduler does not take
            return scheduler_class.from_config(config)
    except Exception as error:  # options of sampling, which the schedule does not look at
        raise ModelError(
            f"the scheduler in {pipeline.directory} cannot be made: {first_line(error)}"
        ) from error
