"""The family "dit": class-conditional diffusion transformers of diffusers.

DiT (arXiv 2212.09748) and, with a flow's schedule, SiT (arXiv 2401.08740).

diffusers' ``DiTTransformer2DModel`` keeps one timestep and label embedder per block and takes
integer labels. A learnable class vector must enter every block and the final layer, so the
embedders are taken out, c = temb(t) + y is computed here, and the model's own forward carries c to
every place where it looked its label up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding

from dive_fast.core.convention import Convention
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import KL_OR_TINY, Autoencoder
from dive_fast.models.base import LatentModel, check_sizes
from dive_fast.models.dit.self_conditioned import SelfConditionedDiT, output, through
from dive_fast.models.files.checkpoint import read_class_names
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.protocol import State

# The frequencies are max_period^(-i / (half - shift)): diffusers builds the DiT with shift 1,
# the original code (and so every checkpoint converted from it) was trained with shift 0.
FREQ_SHIFT = {"diffusers": 1, "original": 0}


class _Given(torch.nn.Module):
    """Stands where a block's embedder stood: returns the conditioning that came as the label."""

    def __init__(self, copy: int) -> None:
        super().__init__()
        self.copy = copy

    def forward(self, timestep, class_labels, hidden_dtype=None) -> torch.Tensor:
        return class_labels[:, self.copy]


class DiT(LatentModel):
    """A DiT as classifier; see ``models.protocol.Model`` for the common attributes.

    Args:
        transformer: float32, frozen; its embedders are taken out of it.
        vae: encodes images to latents, or None for a model of pixels.
        schedule: of the training.
        names: of the classes.
        timestep_embedding: "diffusers" or "original", see ``FREQ_SHIFT``.
        convention: what the network is told and predicts; the usual of the schedule if None.
        tied: all blocks' embedders hold equal copies, so the class vector has the width D of one
            row. Otherwise it is the rows of all copies end to end, [copies * D].

    Attributes:
        encoder_blocks: how many blocks ``encoder`` runs; half of them unless set.
    """

    family = "dit"
    # The class enters the first block, so that the prefix is patches and timestep embedding alone:
    # nothing worth keeping.
    default_cache = "off"

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: Autoencoder | None,
        schedule: Schedule,
        names: tuple[str, ...],
        *,
        name: str | None = None,
        timestep_embedding: str = "diffusers",
        convention: Convention | None = None,
        tied: bool = True,
    ) -> None:
        super().__init__(transformer, vae, schedule, name=name)
        self.convention = Convention.of(schedule) if convention is None else convention
        self.transformer = transformer
        self.timestep_embedding = timestep_embedding
        self.width = transformer.inner_dim
        self.encoder_blocks = len(transformer.transformer_blocks) // 2

        embedders = [block.norm1.emb for block in transformer.transformer_blocks]
        for i, block in enumerate(transformer.transformer_blocks):
            block.norm1.emb = _Given(0 if tied else i)
        kept = embedders[:1] if tied else embedders
        self.timestep_embedders = torch.nn.ModuleList(e.timestep_embedder for e in kept)
        tables = [e.class_embedder.embedding_table.weight for e in kept]
        rows = torch.cat([table.detach() for table in tables], dim=1)
        n = transformer.config.num_embeds_ada_norm
        unconditional = rows[n] if len(rows) > n else None
        self.vocabulary = Vocabulary(rows[:n], names, unconditional)

    def moved(self) -> tuple[torch.nn.Module, ...]:
        return self.transformer, self.timestep_embedders

    def facts(self) -> dict[str, Any]:
        stated = self.convention.facts()
        plain = {"predicts": self.schedule.target, "time": "t"}
        return {
            "timestep_embedding": self.timestep_embedding,
            **({} if stated == plain else stated),
        }

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``."""
        c = self._conditioning(t, condition.to(self.dtype))
        found = self.transformer(x_t.to(self.dtype), timestep=t, class_labels=c).sample
        return self.convention.signed(found)

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """Patches with their positions [M, tokens, D], and temb(t) [M, copies, D]."""
        return self.transformer.pos_embed(x_t.to(self.dtype)), self._temb(t)

    def project(self, condition: torch.Tensor) -> State:
        """The class vector itself, [N, copies, D]: a DiT has no keys and values to compute."""
        return (condition.to(self.dtype).unflatten(1, (-1, self.width)),)

    def encoder(self, prefix: State, projected: State) -> State:
        """The first ``encoder_blocks`` blocks: tokens [M, tokens, D], and temb(t) again.

        Of a self-conditioned network whose middle is among them also its features [M, D].
        """
        tokens, temb = prefix
        tokens, features = through(
            self.transformer, tokens, temb + projected[0], last=self.encoder_blocks
        )
        return (tokens, temb) if features is None else (tokens, temb, features)

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """The other blocks and the final layer, which puts the patches together again."""
        tokens, temb, *known = encoded
        c = temb + projected[0]
        tokens, features = through(
            self.transformer,
            tokens,
            c,
            first=self.encoder_blocks,
            features=known[0] if known else None,
        )
        # The first block's embedder also serves the final layer.
        return self.convention.signed(output(self.transformer, tokens, c[:, 0], features))

    def _conditioning(self, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """c = temb(t) + y for every copy of the embedders, [M, copies, D]."""
        return self._temb(t) + condition.view(len(t), -1, self.width)

    def _temb(self, t: torch.Tensor) -> torch.Tensor:
        """temb(t) of every copy, [M, copies, D]."""
        frequencies = get_timestep_embedding(
            self.convention.told(t),
            256,
            flip_sin_to_cos=True,
            downscale_freq_shift=FREQ_SHIFT[self.timestep_embedding],
        ).to(self.dtype)
        return torch.stack([embed(frequencies) for embed in self.timestep_embedders], dim=1)


def load(directory: Path, *, timestep_embedding: str = "auto", **asked: Any) -> DiT:
    """Reads what ``DiTPipeline.save_pretrained`` writes; without a ``vae`` it is a model of pixels.

    The transformer is diffusers' own, or where ``model_index.json`` says so a
    ``SelfConditionedDiT``.

    An optional ``dive_fast.json`` beside ``model_index.json`` may state ``timestep_embedding``, and
    of a flow ``time`` and ``predicts``: "1 - sigma" and "data - noise" for a converted SiT.

    Args:
        timestep_embedding: see ``choose_timestep_embedding``.
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported.
    """
    pipeline = Pipeline(directory, **asked)
    convention = pipeline.convention()
    if convention.schedule.sigma_data is not None:
        raise ModelError(
            f"expected a scheduler that states its betas, or a flow's, beside the transformer in "
            f"{directory}, got {pipeline.scheduler_config.get('_class_name')}."
        )
    rerouted = pipeline.part("transformer") == SelfConditionedDiT.__name__
    kind = SelfConditionedDiT if rerouted else DiTTransformer2DModel
    transformer = pipeline.network(kind, "transformer", keep=("norm1.emb",))
    config = transformer.config
    vae = None
    if pipeline.part("vae") is not None:
        pipeline.check_parts({"vae": KL_OR_TINY})
        vae = pipeline.vae(config.in_channels)
    check_sizes(transformer, f"transformer in {directory}")
    return DiT(
        transformer,
        vae,
        convention.schedule,
        read_class_names(pipeline.index, config.num_embeds_ada_norm),
        name=pipeline.name,
        timestep_embedding=choose_timestep_embedding(
            timestep_embedding, pipeline.stated_extra.text("timestep_embedding", None), config
        ),
        convention=convention,
        tied=embedders_are_equal(transformer),
    )


def choose_timestep_embedding(asked: str, stated: str | None, config) -> str:
    """The convention to use: what was asked, else what the directory states, else by architecture.

    The published DiT-XL/2 configuration only exists as conversions of the original checkpoints,
    which were trained with the original frequencies although diffusers builds others.

    Raises:
        ModelError: an unknown convention.
    """
    known = ("auto", *FREQ_SHIFT)
    choice = asked if asked != "auto" or stated is None else stated
    if choice not in known:
        raise ModelError(f"expected a timestep_embedding of {', '.join(known)}, got {choice!r}.")
    if choice != "auto":
        return choice
    xl_2 = {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    published = all(config[key] == value for key, value in xl_2.items())
    return "original" if published else "diffusers"


def embedders_are_equal(transformer: DiTTransformer2DModel) -> bool:
    """Whether every block's timestep and label embedder is a copy of the first block's."""
    first, *others = (block.norm1.emb.state_dict() for block in transformer.transformer_blocks)
    return all(torch.equal(other[key], first[key]) for other in others for key in first)
