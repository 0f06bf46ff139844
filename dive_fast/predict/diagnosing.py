"""Where a detector falls short, its model or its search: part of ``LayoutDetector``.

For each annotated image three kinds of layouts are measured on common probes that the search did
not see: the annotated one, what the search found, and the annotated one with one object changed.
Differences of their losses say what an object explains, and the scatter of the differences over the
probes how well that is known:

    gain_i = mean_k d_k,    d_k = l_k(y without object i) - l_k(y)
    se_i^2 = sum over pairs (d_j - d_k)^2 / K^2

The pairs are neighbours in t, so that only noise counts as an error: what an object explains
depends on t, but all timesteps have their share in the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.core.bound import standard_error
from dive_fast.core.numbers import whole
from dive_fast.core.probes import MOST_PROBES
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.data.coco import CocoDataset, CocoImage, expect_fitting_images
from dive_fast.data.coco.readable import readable
from dive_fast.data.images import squashed_tensor, to_mode
from dive_fast.errors import DataError, DiveFastError, shown
from dive_fast.predict.diagnosis import Diagnosis, Measured
from dive_fast.predict.fitting_detector import DetectorFitting, settings_of
from dive_fast.predict.matching import match
from dive_fast.priors.tokens import fitting_layouts
from dive_fast.strategies.layout.board import (
    ANY,
    Board,
    Items,
    replaced,
    with_box,
    with_class,
    without,
)
from dive_fast.strategies.layout.boxes import Box

DIAGNOSIS_PROBES = 96
THIRD = 3  # of a side, by which a box is moved: what is left has an IoU of 0.5 with it


class _Case(NamedTuple):
    """An image, its annotated layout, and what the search found."""

    image: CocoImage
    truth: Items
    found: Items
    boxes: Tensor  # of what was found, pixels of the image, float32 xyxy [n, 4]
    worth: Tensor  # of what was found: the loss without it, above that with it


class Diagnosing(DetectorFitting):
    """The part of ``LayoutDetector`` that says what it lacks."""

    def diagnose(
        self,
        data: CocoDataset,
        *,
        diagnosis_probes: int = DIAGNOSIS_PROBES,
        seed: int = 0,
        progress: bool = False,
        **search: Any,
    ) -> Diagnosis:
        """Whether the model or the search is the gap, and which objects the model can see.

        The search goes without the prior, whose price for each object is told beside.

        Args:
            data: images and annotated boxes; classes are matched by name. Images that cannot be
                read, and those without an object that the model can write, are left out.
            diagnosis_probes: on which layouts are compared, of another seed than the search's.
            seed: of the search.
            progress: show a bar.
            **search: strategy, probes, timesteps and settings, as for the detector.

        Raises:
            DataError: nothing is annotated, no class is known, no image can be read.
            DiveFastError: bad input as in ``LayoutDetector``.
        """
        if not isinstance(data, CocoDataset):
            raise DiveFastError(f"expected a CocoDataset to diagnose on, got {shown(data)}.")
        count = whole("diagnosis_probes", diagnosis_probes, 2, MOST_PROBES)
        data.expect_objects("to diagnose on")
        expect_fitting_images(data)
        strategy = self.layout_strategy(search.pop("strategy", None), settings_of(search))
        cases, evaluations = self._cases(data, strategy, seed, progress, search)
        probes = self.probe_list(strategy, count, seed + 1, search.get("timesteps"))
        board = Board(self.model.vocabulary.table, self.model.layout_format, probes)
        losses, more = self._case_losses(cases, board, progress)
        penalty = self._penalty(seed)
        pricing = Board(board.table, board.layout_format, probes, seed, penalty)
        return _diagnosis(
            cases,
            losses,
            None if penalty is None else [_prices(pricing, case.truth) for case in cases],
            names=self.names,
            side=self.model.image_shape[1],
            grid=board.layout_format.grid,
            evaluations=evaluations + more,
            margin=getattr(strategy, "least_share", None),
        )

    def _cases(
        self, data: CocoDataset, strategy: Any, seed: int, progress: bool, search: dict[str, Any]
    ) -> tuple[list[_Case], int]:
        """The images with what is annotated and what is found; and the evaluations."""
        form = self.model.layout_format
        fitting = fitting_layouts(data, form)
        board = Board(self.model.vocabulary.table, form, None)
        truths = {
            data.images[i].id: (data.images[i], board.items(tokens))
            for i, tokens in zip(fitting.images.tolist(), fitting.tokens, strict=True)
        }
        truths = {key: case for key, case in truths.items() if case[1]}
        pictures = readable(image for image, _ in truths.values())
        found, evaluations = [], 0
        stream = self._search(
            pictures,
            strategy=strategy,
            seed=seed,
            progress=len(truths) if progress else None,
            **search,
        )
        for done, size in stream:
            answer, (image, truth) = done.answer, truths[done.key]
            worth = answer.losses[:, -1] - answer.losses[:, :-1].min(dim=1).values
            found.append(_Case(image, truth, answer.items, self.boxes(answer, size), worth))
            evaluations += done.evaluations
        if not found:
            raise DataError(
                f"{data.source}: expected an image with objects that can be read, got none of "
                f"{len(data.images)}."
            )
        return found, evaluations

    def _case_losses(
        self, cases: list[_Case], board: Board, progress: bool
    ) -> tuple[list[Tensor], int]:
        """The losses of each case's layouts (``_layouts``), float64 [n, K], K in order of t."""
        channels, side, _ = self.model.image_shape

        def jobs() -> Iterator[Any]:
            for i, case in enumerate(cases):
                pixels = squashed_tensor(to_mode(case.image.read(), 3), side, channels)
                layouts = _layouts(case, board.layout_format.grid)
                yield self._job(i, self.encode_pixels(pixels[None])[0], _measured(board, layouts))

        losses, evaluations = [torch.empty(0)] * len(cases), 0
        by_time = board.probes.timesteps.argsort(stable=True)
        total = len(cases) if progress else None
        for done in self._run(jobs(), board.probes, progress=total):
            losses[done.key] = done.answer.trace["losses"][:, by_time].double()
            evaluations += done.evaluations
        return losses, evaluations


def moved(box: Box, grid: int) -> Box:
    """The box a third of its longer side further, to where there is more room."""
    width, height = box.right - box.left, box.bottom - box.top
    if width >= height:
        step = max(1, round(width / THIRD))
        step = step if grid - 1 - box.right >= box.left else -step
        left = min(max(0, box.left + step), grid - 1 - width)
        return box._replace(left=left, right=left + width)
    step = max(1, round(height / THIRD))
    step = step if grid - 1 - box.bottom >= box.top else -step
    top = min(max(0, box.top + step), grid - 1 - height)
    return box._replace(top=top, bottom=top + height)


def _layouts(case: _Case, grid: int) -> list[Items]:
    """Annotated, found; then of each object: not there, elsewhere, of any class."""
    truth = case.truth
    layouts = [truth, case.found]
    for i, item in enumerate(truth):
        layouts += [
            without(truth, i),
            with_box(truth, i, moved(item.box, grid)),
            with_class(truth, i, ANY),
        ]
    return layouts


def _measured(board: Board, layouts: list[Items]) -> Search:
    every = torch.arange(len(board.probes))
    losses = yield Losses(board.conditions(layouts).flatten(1), every)
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, {"losses": losses})


def _prices(board: Board, truth: Items) -> Tensor:
    """What the prior takes for each object, in units of the loss."""
    prices = board.price([truth, *(replaced(truth, i) for i in range(len(truth)))])
    return prices[0] - prices[1:]


def _diagnosis(
    cases: list[_Case],
    losses: list[Tensor],
    prices: list[Tensor] | None,
    *,
    names: tuple[str, ...],
    side: int,
    grid: int,
    evaluations: int,
    margin: float | None,
) -> Diagnosis:
    """The columns of all images and objects."""
    of_truth = [table[0] for table in losses]
    changed = [table[2:].unflatten(0, (-1, 3)) for table in losses]  # [m, 3, K]
    gap = torch.stack([table[1] - table[0] for table in losses])
    differences = torch.cat([c - t for c, t in zip(changed, of_truth, strict=True)])
    alone = torch.cat([c[:, 0] for c in changed]).mean(dim=1)
    items = [item for case in cases for item in case.truth]
    sides = torch.tensor([item.box for item in items]).double().view(-1, 4)
    areas = (sides[:, 2:] - sides[:, :2]).prod(dim=1)
    matched = [_matched(case, side, grid) for case in cases]
    return Diagnosis(
        names=names,
        n_probes=gap.shape[1],
        evaluations=evaluations,
        gap=_over_probes(gap),
        differs=torch.tensor(
            [
                not named.all() or len(case.found) != len(case.truth)
                for case, (_, named) in zip(cases, matched, strict=True)
            ]
        ),
        counts=torch.tensor([[len(case.truth), len(case.found)] for case in cases]),
        class_id=torch.tensor([item.class_id for item in items]),
        side=areas.sqrt() * side / (grid - 1),
        gain=_over_probes(differences[:, 0]),
        share=differences[:, 0].mean(dim=1) / alone,
        place=_over_probes(differences[:, 1]),
        label=_over_probes(differences[:, 2]),
        price=None if prices is None else torch.cat(prices),
        found=torch.cat([found for found, _ in matched]),
        found_named=torch.cat([named for _, named in matched]),
        margin=margin,
    )


def _over_probes(differences: Tensor) -> Measured:
    """[n, K], probes in the order of t, to means and their standard errors."""
    in_pairs = differences.shape[1] // 2 * 2
    return Measured(differences.mean(dim=1), standard_error(differences[:, :in_pairs]))


def _matched(case: _Case, side: int, grid: int) -> tuple[Tensor, Tensor]:
    """Which annotated objects are found, and which with their class, bool [m] each."""
    width, height = case.image.size
    scale = torch.tensor([width, height, width, height]).double() / (grid - 1)
    truth = torch.tensor([item.box for item in case.truth]).double().view(-1, 4) * scale
    of_found = match(case.boxes, case.worth, truth)
    found = torch.zeros(len(truth), dtype=torch.bool)
    named = found.clone()
    for item, row in zip(case.found, of_found.tolist(), strict=True):
        if row >= 0:
            found[row] = True
            named[row] = item.class_id == case.truth[row].class_id
    return found, named
