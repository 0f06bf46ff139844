"""What a model is called: resolved once into its directory and its family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dive_fast import zoo
from dive_fast.errors import ModelError, shown
from dive_fast.models.files.hub import find
from dive_fast.models.files.reading import read_json
from dive_fast.models.files.weights import check_variant_name
from dive_fast.models.protocol import Model
from dive_fast.models.text.prompts import stored_classes

PRIOR = "prior"  # the folder of a model directory

Loader = Callable[..., Model]


@dataclass(frozen=True)
class Family:
    """How the models of one pipeline class are read.

    Attributes:
        loader: see ``register_model_family``.
        folders: those of the pipeline that it reads; None for all.
        text: its classes are prompts.
        lora: LoRA weights can be fused into it.
        dtype: the loader takes the network's ``dtype``, so that no float32 copy is made first.
        layouts: its conditions are layouts.
    """

    loader: Loader
    folders: tuple[str, ...] | None = None
    text: bool = False
    lora: bool = False
    dtype: bool = True
    layouts: bool = False


@dataclass(frozen=True)
class Source:
    """A model that was found; a hub id is fetched by then.

    Attributes:
        text: what the user called it.
        directory: where it lies.
        family: how it is read.
        own: the directory is the user's, not the zoo's or the hub's.
    """

    text: str
    directory: Path
    family: Family
    own: bool

    def __str__(self) -> str:
        return self.text

    @property
    def own_directory(self) -> Path | None:
        """Where fitted values may be written; None for zoo and hub."""
        return self.directory if self.own else None

    @property
    def prior(self) -> Path | None:
        """Where the prior over layouts lies that belongs to the model; None without."""
        path = self.directory / PRIOR
        # A training that is under way has no configuration yet.
        return path if (path / "config.json").is_file() else None

    @property
    def needs_classes(self) -> bool:
        """Whether ``load_model`` can read it only if it is given ``classes``."""
        return self.family.text and stored_classes(self.directory) is None

    @property
    def finds_objects(self) -> bool:
        """Whether it is a layout-to-image model, so that a detector asks it."""
        return self.family.layouts or (self.family is _SD and _grounded(self.directory) is not None)


def resolve(
    source: str | Path | Source,
    *,
    allow_pickle: bool = False,
    variant: str | None = None,
    prediction_type: str | None = None,
) -> Source:
    """Finds a model, and fetches it if it is a hub id; a ``Source`` is handed back.

    Args:
        source: a zoo name ("digits"), a directory, a hub id ("facebook/DiT-XL-2-256"), or a
            ``.safetensors`` file of Stable Diffusion (see ``single_file``).
        allow_pickle: of the hub, also fetch pickled weights where there are no others.
        variant: of the hub, fetch the weights of this variant where there are such.
        prediction_type: of a single file, what its network predicts: "epsilon" or "v_prediction".

    Raises:
        ModelError: the source is unknown, or of a family that is not supported, or the hub has no
            such variant of it; a prediction_type of something else than a single file.
    """
    check_variant_name(variant)
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ModelError(
            f"expected prediction_type epsilon or v_prediction, got {shown(prediction_type)}."
        )
    if isinstance(source, Source):
        if prediction_type is not None:
            raise _without_prediction_type(source)
        return source
    text = str(source)
    if (directory := _single_file(text, prediction_type)) is not None:
        return Source(text, directory, _family_in(directory), own=False)
    if prediction_type is not None:
        raise _without_prediction_type(text)
    directory = find(text, lambda index: _family(index, text).folders, allow_pickle, variant)
    own = text not in zoo.names() and Path(text).expanduser().is_dir()
    return Source(text, directory, _family_in(directory), own)


def _without_prediction_type(source: object) -> ModelError:
    return ModelError(
        f"prediction_type is for a model in one .safetensors file; of {source} its scheduler's "
        f"configuration says it."
    )


def _single_file(text: str, prediction_type: str | None) -> Path | None:
    """The converted directory of a checkpoint in one file; None for what is none."""
    try:
        path = Path(text).expanduser()
        if path.suffix != ".safetensors" or not path.is_file():
            return None
    except (OSError, ValueError, RuntimeError):  # ``find`` says what is wrong with it
        return None
    # diffusers' loaders take seconds.
    from dive_fast.models.single_file import as_directory

    return as_directory(path, prediction_type)


def _family_in(directory: Path) -> Family:
    index = directory / "model_index.json"
    return _family(read_json(index), index)


def register_model_family(pipeline_class: str, loader: Loader, *, text: bool = False) -> None:
    """Makes ``from_pretrained`` read another family.

    Args:
        pipeline_class: the ``_class_name`` in ``model_index.json`` that picks it.
        loader: called as ``loader(directory, name=..., allow_pickle=..., timestep_embedding=...)``,
            returns a ``Model``. Where a variant of the weights is asked for, also with ``variant``.
        text: the classes are prompts; the loader is then also called with ``classes``,
            ``templates`` and ``average`` as ``load_model`` got them, and the ``device`` on which
            to encode them.
    """
    FAMILIES[pipeline_class] = Family(loader, text=text, dtype=False)


def without_lora(source: object) -> ModelError:
    """What a model says that cannot take a LoRA."""
    return ModelError(
        f"{source} cannot take a LoRA: expected a text-to-image model of the kinds "
        f"{', '.join(sorted(name for name, family in FAMILIES.items() if family.lora))}."
    )


def _family(index: dict[str, Any], where: str | Path) -> Family:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"the _class_name in {where} is {shown(name)}, which is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name]


def _load_of(module: str) -> Loader:
    """``load`` of a module, imported when it is called: diffusers' networks take seconds."""

    def load(directory: Path, **asked: Any) -> Model:
        return import_module(f"dive_fast.models.{module}").load(directory, **asked)

    return load


def _grounded(directory: Path) -> Any:
    """The module of a layout-to-image family that is published as an ordinary pipeline, or None.

    A gated UNet and a tokenizer tell them apart.
    """
    from dive_fast.models import gligen
    from dive_fast.models.geodiffusion import model as geodiffusion
    from dive_fast.models.geodiffusion.prompts import has_location_tokens

    if gligen.is_gligen(directory):
        return gligen
    return geodiffusion if has_location_tokens(directory) else None


def _load_stable_diffusion(directory: Path, **asked: Any) -> Model:
    from dive_fast.models import stable_diffusion

    family = _grounded(directory) or stable_diffusion
    if "lora" in asked and family is not stable_diffusion:
        raise without_lora(asked["name"])
    return family.load(directory, **asked)


_SD_FOLDERS = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
_SD = Family(_load_stable_diffusion, _SD_FOLDERS, text=True, lora=True)
_SDXL = Family(
    _load_stable_diffusion,
    (*_SD_FOLDERS, "tokenizer_2", "text_encoder_2"),
    text=True,
    lora=True,
)
_LABELS = Family(_load_of("class_unet.model"), ("unet", "vae", "vqvae", "scheduler"))
_TRANSFORMER = ("transformer", "vae", "scheduler")
_ONE_TEXT = ("tokenizer", "text_encoder")
_TEXT = tuple(f"{part}{n}" for part in ("tokenizer", "text_encoder") for n in ("", "_2", "_3"))


def _family_of(module: str, *, texts: tuple[str, ...] = _TEXT, lora: bool = True) -> Family:
    """One text-to-image transformer."""
    folders = (*_TRANSFORMER, *texts)
    return Family(_load_of(f"transformers.{module}"), folders, text=True, lora=lora)


FAMILIES: dict[str, Family] = {
    "AuraFlowPipeline": _family_of("aura_flow"),
    "ConsistencyModelPipeline": _LABELS,
    "DDIMPipeline": _LABELS,
    "DDPMPipeline": _LABELS,
    "LDMPipeline": _LABELS,
    "PNDMPipeline": _LABELS,
    "DiTPipeline": Family(_load_of("dit.model"), ("transformer", "vae", "scheduler")),
    "FluxPipeline": _family_of("flux"),
    "LayoutToImagePipeline": Family(
        _load_of("layout_to_image.load"),
        ("unet", "layout_encoder", "vae", "scheduler", PRIOR),
        layouts=True,
    ),
    "StableDiffusionGLIGENPipeline": Family(
        _load_of("gligen"), _SD_FOLDERS, text=True, layouts=True
    ),
    "Lumina2Pipeline": _family_of("lumina2", texts=_ONE_TEXT),
    "Lumina2Text2ImgPipeline": _family_of("lumina2", texts=_ONE_TEXT),
    "PixArtAlphaPipeline": _family_of("pixart", texts=_ONE_TEXT, lora=False),
    "PixArtSigmaPipeline": _family_of("pixart", texts=_ONE_TEXT, lora=False),
    "SanaPipeline": _family_of("sana", texts=_ONE_TEXT),
    "StableDiffusion3Pipeline": _family_of("sd3"),
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "ZImagePipeline": _family_of("z_image"),
}
