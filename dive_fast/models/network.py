"""A network of the user's own, of whatever code, behind ``models.protocol.Model``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.core.convention import Convention
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import Autoencoder, encode_latents, image_shape
from dive_fast.models.files.checkpoint import fingerprint

_PIXELS = {"[-1, 1]": ((0.5,), (0.5,)), "[0, 1]": ((0.0,), (1.0,))}  # mean and std

Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]
# [-1, 1], [0, 1], or the mean and the standard deviation of each channel in [0, 1].
Pixels = str | tuple[Sequence[float], Sequence[float]]


class GivenNetwork:
    """A network that somebody built and trained; the arguments are those of ``from_network``."""

    family = "network"

    def __init__(
        self,
        network: nn.Module,
        *,
        schedule: Schedule,
        embeddings: Tensor | nn.Embedding,
        shape: Sequence[int],
        call: Call | None = None,
        names: Sequence[str] | None = None,
        predicts: str | None = None,
        time: str | None = None,
        pixels: Pixels = "[-1, 1]",
        vae: Autoencoder | None = None,
        name: str = "the given network",
    ) -> None:
        _check_arguments(network, schedule, shape, call)
        self.name, self.network, self.schedule, self.vae = name, network, schedule, vae
        self.latent_shape = tuple(shape)
        self.image_shape = image_shape(self.latent_shape, vae)
        self.convention = Convention.of(schedule, predicts, time)
        self.pixels = _pixels(pixels, shape[0], vae)
        self._call = _plain_call if call is None else call
        network.eval().requires_grad_(False)
        parameter = next(network.parameters(), torch.zeros(()))
        self.device, self.dtype = parameter.device, parameter.dtype
        table, unconditional = _table(embeddings, names)
        names = [f"class {i}" for i in range(len(table))] if names is None else names
        self.vocabulary = Vocabulary(table, names, unconditional)
        self.inverse_temperature = math.prod(self.latent_shape) / 2
        self._weights = fingerprint(network)
        check_network(self)

    def to(self, device: torch.device, dtype: torch.dtype) -> GivenNetwork:
        """Moves the network; the VAE stays in float32."""
        self.network.to(device, dtype)
        if self.vae is not None:
            self.vae.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    def identity(self) -> dict[str, Any]:
        """Precision, conventions and a fingerprint of the weights."""
        return {
            "family": self.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.convention.facts(),
            "pixels": [list(map(float, part)) for part in self.pixels],
            "weights": self._weights,
            "vae_weights": None if self.vae is None else fingerprint(self.vae),
            "schedule": self.schedule.identity(),
        }

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to what the network was trained on."""
        if self.vae is not None:
            x0 = encode_latents(self.vae, images, self.device)
        else:
            mean, std = (torch.tensor(part).view(-1, 1, 1) for part in self.pixels)
            x0 = ((images.float() + 1) / 2 - mean) / std
        return (x0 / (self.schedule.sigma_data or 1)).to(self.device)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``models.protocol.Model.predict``."""
        convention = self.convention
        given, told = convention.given(x_t, t), convention.told(t)
        told = told if told.dtype == torch.int64 else told.to(self.dtype)
        found = self._call(self.network, given.to(self.dtype), told, condition.to(self.dtype))
        return convention.target(_tensor(found, self.name), x_t, t)


def check_network(model: GivenNetwork) -> None:
    """Two classes at one noise level: shape, finite values, a gradient, and that the class counts.

    Raises:
        ModelError: one of them is not as it must be.
    """
    t = torch.full((2,), len(model.schedule) // 2, device=model.device)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, *model.latent_shape, generator=generator).expand(2, -1, -1, -1)
    rows = model.vocabulary.rows([0, len(model.vocabulary) - 1])
    rows = rows.to(model.device).requires_grad_()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            found = model.predict(x_t.to(model.device), t, rows)
    except ModelError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ModelError(
            f"{model.name} cannot be called with x_t [2, {_by(model.latent_shape)}], t [2] and "
            f"conditions {list(rows.shape)}: {type(error).__name__}: {error}"
        ) from error
    channels, *sides = model.latent_shape
    expected = [[2, c, *sides] for c in (channels, 2 * channels)]
    if list(found.shape) not in expected:
        raise ModelError(
            f"expected {model.name} to give [2, {_by(model.latent_shape)}], "
            f"got {list(found.shape)}."
        )
    if not torch.isfinite(found).all():
        raise ModelError(f"expected finite predictions from {model.name}, got NaN or infinity.")
    if not found.requires_grad:
        raise ModelError(
            f"expected the prediction of {model.name} to have a gradient with respect to the "
            f"condition, got one without: does the call use c, and no torch.no_grad?"
        )
    gradient = torch.autograd.grad(found.float().square().mean(), rows, allow_unused=True)[0]
    if gradient is None or not gradient.any():
        raise ModelError(
            f"the condition does not change what {model.name} predicts: expected the call to use c."
        )


def _check_arguments(network: Any, schedule: Any, shape: Any, call: Any) -> None:
    if not isinstance(network, nn.Module):
        raise ModelError(f"expected a torch.nn.Module as network, got {type(network).__name__}.")
    if not isinstance(schedule, Schedule):
        raise ModelError(f"expected a dive_fast.Schedule, got {type(schedule).__name__}.")
    sides = tuple(shape) if isinstance(shape, list | tuple) else ()
    good = len(sides) == 3 and all(isinstance(n, int) and n >= 1 for n in sides)
    if not good or sides[1] != sides[2]:
        raise ModelError(f"expected a shape (channels, side, side), got {shape!r}.")
    if call is not None and not callable(call):
        raise ModelError(f"expected call to be a function, got {type(call).__name__}.")


def _pixels(
    pixels: Pixels, channels: int, vae: Autoencoder | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    if isinstance(pixels, str):
        if pixels not in _PIXELS:
            raise ModelError(
                f"expected pixels of {', '.join(_PIXELS)}, or (means, stds), got {pixels!r}."
            )
        if vae is not None and pixels != "[-1, 1]":
            raise ModelError(f"a VAE takes pixels in [-1, 1], got {pixels!r}.")
        return _PIXELS[pixels]
    try:
        mean, std = (tuple(map(float, part)) for part in pixels)
    except (TypeError, ValueError) as error:
        raise ModelError(f"expected pixels as (means, stds), got {pixels!r}.") from error
    finite = all(map(math.isfinite, (*mean, *std)))
    if {len(mean), len(std)} - {1, channels} or not finite or min(std) <= 0:
        raise ModelError(
            f"expected a mean and a std above 0 for each of {channels} channels, got {pixels!r}."
        )
    return mean, std


def _table(embeddings: Any, names: Sequence[str] | None) -> tuple[Tensor, Tensor | None]:
    """The rows of the classes, and the row of "no class" where there is one more than names."""
    if isinstance(embeddings, nn.Embedding):
        table = embeddings.weight.detach()
        _take_rows(embeddings)
    else:
        table = embeddings
    if not isinstance(table, Tensor) or table.ndim != 2 or not table.is_floating_point():
        raise ModelError(
            "expected embeddings as a torch.nn.Embedding or a float tensor [C, D], got "
            f"{list(table.shape) if isinstance(table, Tensor) else type(table).__name__}."
        )
    if not torch.isfinite(table).all():
        raise ModelError("expected finite embeddings, got NaN or infinity.")
    if names is not None and len(table) == len(names) + 1:
        return table[:-1], table[-1]
    return table, None


def _take_rows(embedding: nn.Embedding) -> None:
    """Given rows instead of labels, the module hands them on; labels are looked up as before."""
    look_up = embedding.forward
    if getattr(look_up, "takes_rows", False):
        return

    def forward(given: Tensor) -> Tensor:
        return given if given.is_floating_point() else look_up(given)

    forward.takes_rows = True
    embedding.forward = forward


def _plain_call(network: nn.Module, x_t: Tensor, t: Tensor, c: Tensor) -> Any:
    return network(x_t, t, c)


def _tensor(found: Any, name: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    kind = type(found).__name__
    hint = ""
    if isinstance(found, list | tuple | dict) or hasattr(found, "sample"):
        hint = "; let call pick the prediction out of it"
    raise ModelError(f"expected {name} to give a tensor, got a {kind}{hint}.")


def _by(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
