"""The family "class-unet": UNets of diffusers that are conditioned on class labels.

``UNet2DModel`` (ADM, arXiv 2105.05233, consistency models, arXiv 2303.01469, and what else is
trained with labels) and the ``UNet2DConditionModel`` without a prompt. A condition is the vector
that the network adds to its time embedding or, of a network that attends to the class (arXiv
2112.10752), the sequence that it attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from dive_fast.core.convention import CONSISTENCY, Convention
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import AUTOENCODERS, Autoencoder
from dive_fast.models.base import LatentModel
from dive_fast.models.class_unet.labels import UNet, attends, check_unet, class_table, stated_names
from dive_fast.models.files.checkpoint import fingerprint, read_class_names
from dive_fast.models.pipeline import Pipeline

NETWORKS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
VAES = ("vqvae", "vae")  # the folders, of which a model of pixels has none


class ClassUNet(LatentModel):
    """A UNet as classifier; see ``models.protocol.Model`` for the common attributes.

    Args:
        unet: float32, frozen; what embeds its labels is taken out of it.
        vae: encodes images to latents, or None for a model of pixels.
        convention: what the network is told and predicts.
        table: float32 [C, D], the conditions of the classes; one row more than names is that of
            "no class".
        names: of the classes.
    """

    family = "class-unet"

    def __init__(
        self,
        unet: UNet,
        vae: Autoencoder | None,
        convention: Convention,
        table: Tensor,
        names: Sequence[str],
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(unet, vae, convention.schedule, name=name)
        self.convention = convention
        self._attends = attends(unet)
        if not self._attends:
            unet.class_embedding = nn.Identity()
            unet.register_to_config(class_embed_type="identity")
        n = len(names)
        self.vocabulary = Vocabulary(table[:n], names, table[n] if len(table) > n else None)
        self._embeddings = fingerprint(nn.Embedding.from_pretrained(table))

    def facts(self) -> dict[str, Any]:
        return {**self.convention.facts(), "embeddings": self._embeddings}

    def encode(self, images: Tensor) -> Tensor:
        """As ``LatentModel.encode``; with an EDM schedule in units of sigma_data."""
        return super().encode(images) / (self.schedule.sigma_data or 1)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``models.protocol.Model.predict``."""
        given, told = self.convention.given(x_t, t), self.convention.told(t)
        found = self.network(given.to(self.dtype), told, **self._arguments(condition)).sample
        return self.convention.target(found, x_t, t)

    def _arguments(self, condition: Tensor) -> dict[str, Any]:
        rows = condition.to(self.dtype)
        if self._attends:
            width = self.network.config.cross_attention_dim
            return {"encoder_hidden_states": rows.unflatten(1, (-1, width))}
        if isinstance(self.network, UNet2DModel):
            return {"class_labels": rows}
        return {"class_labels": rows, "encoder_hidden_states": None}


def load(directory: Path, **asked: Any) -> ClassUNet:
    """Reads what ``save_pretrained`` of ``DDPMPipeline``, ``ConsistencyModelPipeline`` ... writes.

    An optional ``dive_fast.json`` beside ``model_index.json`` may state ``classes``, their names;
    ``embeddings``, their vectors, where the network does not hold them; ``time`` and ``predicts``.

    Args:
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported, or the network has no classes.
    """
    pipeline = Pipeline(directory, **asked)
    kind = _class_of(pipeline, "unet")
    if kind not in NETWORKS:
        raise ModelError(
            f"expected unet in {directory / 'model_index.json'} to be one of "
            f"{', '.join(NETWORKS)}, got {kind!r}."
        )
    convention = pipeline.convention()
    consistent = convention.predicts == CONSISTENCY
    if pipeline.index["_class_name"] == "ConsistencyModelPipeline" and not consistent:
        raise ModelError(
            f"expected the CMStochasticIterativeScheduler of a consistency model in {directory}, "
            f"got {pipeline.scheduler_config.get('_class_name')!r}."
        )
    unet = pipeline.network(NETWORKS[kind], "unet", keep=("class_embedding",))
    check_unet(unet, convention, directory)
    embeddings = pipeline.extra.get("embeddings")
    names = stated_names(pipeline)
    table = class_table(unet, embeddings, None if names is None else len(names), directory)
    if names is None:
        names = read_class_names(pipeline.index, len(table))
    if len(names) not in (len(table), len(table) - 1):
        raise ModelError(
            f"expected the names of {len(table)} classes in {directory}, or of one less where the "
            f"last label means no class, got {len(names)}."
        )
    vae = _vae(pipeline, unet.config.in_channels)
    return ClassUNet(unet, vae, convention, table, names, name=pipeline.name)


def _vae(pipeline: Pipeline, channels: int) -> Autoencoder | None:
    for folder in VAES:
        kind = _class_of(pipeline, folder)
        if kind is None:
            continue
        if kind not in AUTOENCODERS:
            raise ModelError(
                f"expected {folder} in {pipeline.directory / 'model_index.json'} to be one of "
                f"{', '.join(AUTOENCODERS)}, got {kind!r}."
            )
        return pipeline.vae(channels, folder)
    return None


def _class_of(pipeline: Pipeline, part: str) -> str | None:
    """Of a part of ``model_index.json``; None where it is not there."""
    entry = pipeline.index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
