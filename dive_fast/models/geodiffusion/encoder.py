"""Relaxed layouts through CLIP: token embeddings of objects to the text embeddings of a prompt.

A corner's row is CLIP's own embedding of its location token. A class may be a phrase of several
tokens, so its row is a code, s times a unit vector, that is mapped linearly to the embeddings of
the phrase:

    word_p = sum over classes c of (code_c / s) E[c, p]

The loss has a gradient in the code, the mean of several rows is the mean of their phrases, and a
row itself gives exactly the phrase. How many tokens an object takes, and whether it is there at
all, is piecewise constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dive_fast.core.distinct import without_row
from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.errors import ModelError
from dive_fast.models.geodiffusion.prompts import OBJECTS, LocationPrompts, location_token
from dive_fast.models.text.towers import TextTower

CORNERS = SLOTS_PER_OBJECT - 1


class LocationPromptEncoder(nn.Module):
    """Token embeddings [N, S, D] of layouts to the text embeddings [N, L, D] of their prompts.

    There are as many triples as always fit into a prompt, whatever their classes, but no more than
    ``prompts.max_objects``.

    Args:
        tower: CLIP; frozen.
        prompts: how layouts are written.

    Attributes:
        layout_format: what the tokens mean.
        table: float32 [V, D] on the CPU, the tokens' embeddings.
        text_encoder: CLIP's.

    Raises:
        ModelError: a prompt has no room for an object, there are more classes than their codes can
            tell apart, two classes have the same tokens, or a phrase is not tokenised alike by
            itself and in the prompt.
    """

    def __init__(self, tower: TextTower, prompts: LocationPrompts) -> None:
        super().__init__()
        tokenizer, embedding = tower.tokenizer, tower.encoder.get_input_embeddings()
        weight = embedding.weight.detach().float()
        n_classes, dim = len(prompts.names), weight.shape[1]
        if n_classes >= dim:
            raise ModelError(
                f"expected at most {dim - 1} classes for a text encoder of width {dim}, "
                f"got {n_classes}."
            )
        words = Words.read(tokenizer, prompts)
        max_objects = _room(words, prompts, tower.length)
        if prompts.max_objects is not None:
            max_objects = min(max_objects, prompts.max_objects)
        self.prompts, self.length = prompts, tower.length
        self.text_encoder = tower.encoder
        self.layout_format = LayoutFormat.compact(prompts.names, max_objects, prompts.grid)
        cells = weight[words.cells]
        # About as long as the corners' rows, so that no slot outweighs the others in a projection;
        # a power of two, so that a row gives its phrase exactly in every precision.
        self.scale = 2.0 ** round(math.log2(cells.norm(dim=1).mean().item() or 1.0))
        codes = self.scale * torch.eye(n_classes + 1, dim, device=weight.device)
        # Not a buffer: it is the search's, and stays in float32 on the CPU.
        self.table = torch.cat([codes[:-1], cells, codes[-1:]]).cpu()
        padding = [tokenizer.pad_token_id] * tower.length
        lengths = torch.tensor([len(phrase) for phrase in words.phrases])
        for name, tensor in {
            "head": weight[words.head],
            "tail": weight[words.tail + padding],
            "phrases": _aligned(words.phrases, weight),  # [P C, P D]
            "lengths": F.one_hot(lengths - 1).float(),  # [C, P]
        }.items():
            self.register_buffer(name, tensor.clone(), persistent=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The text embeddings; differentiable in the rows of objects that are there."""
        prompt, real = self.write(embeddings)
        mask = None
        # The rare encoders that were trained with a mask of the padding say so.
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = (torch.arange(self.length, device=real.device) < real[:, None]).long()
        ids = torch.zeros(prompt.shape[:2], dtype=torch.int64, device=prompt.device)
        with _given(self.text_encoder.get_input_embeddings(), prompt):
            return self.text_encoder(ids, attention_mask=mask)[0]

    def write(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings of the prompts' tokens [N, L, D], and how many are no padding, int64 [N].

        Args:
            embeddings: [N, S, D].
        """
        objects, kept = self._objects(embeddings)
        head, tail = (part.expand(len(objects), -1, -1) for part in (self.head, self.tail))
        sequence = torch.cat([head, objects, tail], dim=1)
        kept = F.pad(kept, (self.head.shape[0], self.tail.shape[0]), value=True)
        # The tokens that are there, in order; the padding behind them fills up.
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.length]
        prompt = sequence.gather(1, order[..., None].expand(-1, -1, sequence.shape[2]))
        return prompt, kept.sum(dim=1) - self.length

    def _objects(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Objects' tokens with places for the longest phrase [N, T, D]; which are there [N, T]."""
        n_classes, longest = self.lengths.shape
        slots = embeddings.unflatten(1, (-1, SLOTS_PER_OBJECT))
        codes = slots[:, :, 0, : n_classes + 1] / self.scale
        weights = codes[..., :n_classes]
        # All codes are equally long: the nearest row is the one with the largest entry.
        present = weights.amax(dim=2) >= codes[..., n_classes]
        # As long as most of the mixed classes, by weight.
        length = (weights @ self.lengths).argmax(dim=2)
        of_length = F.one_hot(length, longest).to(weights.dtype)
        mixture = (of_length[..., :, None] * weights[..., None, :]).flatten(2)
        words = (mixture @ self.phrases).unflatten(2, (longest, -1))
        kept = torch.arange(longest, device=length.device) <= length[..., None]
        kept = F.pad(kept, (0, CORNERS), value=True) & present[..., None]
        return torch.cat([words, slots[:, :, 1:]], dim=2).flatten(1, 2), kept.flatten(1)


class Words:
    """The tokens that prompts are made of.

    Attributes:
        head, tail: before and after the objects, with the tokens that start and end a prompt.
        phrases: of each class.
        cells: of each cell of the grid.
    """

    def __init__(
        self, head: list[int], tail: list[int], phrases: list[list[int]], cells: list[int]
    ) -> None:
        self.head, self.tail, self.phrases, self.cells = head, tail, phrases, cells

    @classmethod
    def read(cls, tokenizer: Any, prompts: LocationPrompts) -> Words:
        """Raises ModelError where whole prompts have other tokens than their parts."""
        start, end = tokenizer("").input_ids
        before, after = prompts.template.split(OBJECTS)
        outer = tokenizer([before, after], verbose=False).input_ids
        phrases = [ids[1:-1] for ids in tokenizer(list(prompts.phrases), verbose=False).input_ids]
        cells = tokenizer.convert_tokens_to_ids([location_token(i) for i in range(prompts.grid**2)])
        words = cls([start, *outer[0][1:-1]], [*outer[1][1:-1], end], phrases, cells)
        words._check(tokenizer, prompts)
        return words

    def _check(self, tokenizer: Any, prompts: LocationPrompts) -> None:
        seen: dict[tuple[int, ...], tuple[str, str]] = {}
        for row, (name, phrase) in enumerate(zip(prompts.names, self.phrases, strict=True)):
            other, plain = seen.setdefault(tuple(phrase), (name, without_row(name, row)))
            if plain != without_row(name, row):
                raise ModelError(
                    f"the classes {other!r} and {name!r} have the same phrase as the text encoder "
                    f"reads it (lower case)."
                )
        last = len(self.cells) - 1
        # Twice, so that a phrase also stands behind a location token.
        written = [prompts.write([(c, 0, last)] * 2) for c in range(len(prompts.names))]
        for name, phrase, ids in zip(
            prompts.names, self.phrases, tokenizer(written, verbose=False).input_ids, strict=True
        ):
            part = [*phrase, self.cells[0], self.cells[last]]
            if ids != [*self.head, *part, *part, *self.tail]:
                raise ModelError(
                    f"the phrase of the class {name!r} or the template {prompts.template!r} has "
                    f"other tokens by itself than in the prompt; put spaces around {OBJECTS}."
                )


def _room(words: Words, prompts: LocationPrompts, length: int) -> int:
    """How many objects always fit into a prompt, whatever their classes.

    Raises:
        ModelError: not even one.
    """
    sizes = [len(phrase) + CORNERS for phrase in words.phrases]
    free = length - len(words.head) - len(words.tail)
    if max(sizes) > free:
        name = prompts.names[sizes.index(max(sizes))]
        raise ModelError(
            f"an object of the class {name!r} takes {max(sizes)} tokens, but a prompt of {length} "
            f"has room for {max(free, 0)} beside the template {prompts.template!r}."
        )
    return free // max(sizes)


def _aligned(phrases: list[list[int]], weight: Tensor) -> Tensor:
    """The phrases as if each were of every length, [P C, P D].

    They are aligned at their last token, which is what an English phrase is about; shorter ones
    repeat their first.
    """
    longest = max(map(len, phrases))
    ids = torch.tensor(
        [
            [
                [
                    phrase[max(len(phrase) - n + p, 0)] if p < n else phrase[0]
                    for p in range(longest)
                ]
                for phrase in phrases
            ]
            for n in range(1, longest + 1)
        ]
    )
    return weight[ids.to(weight.device)].flatten(2).flatten(0, 1)


@contextmanager
def _given(embedding: nn.Module, values: Tensor) -> Iterator[None]:
    """``embedding`` answers with ``values``: CLIPTextModel itself takes ids alone."""
    handle = embedding.register_forward_hook(lambda *_: values)
    try:
        yield
    finally:
        handle.remove()
