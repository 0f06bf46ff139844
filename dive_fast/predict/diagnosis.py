"""What a diagnosis of a detector says: tables by class and by size, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CERTAIN = 3.0  # standard errors between an object's share of the loss and nothing
APART = 2.0  # standard errors between two layouts of an image
SIDES = (4, 8, 16)  # pixels of the model's picture, where one size ends and the next begins
FEW_PIXELS = 8  # a side at which more pixels are worth trying before more training
GAP = 0.2  # share of the images that makes a gap worth a sentence
COMMON = 0.5  # share of a class's objects that should be certain
LEAST_MARGIN = 0.001


class Measured(NamedTuple):
    """Differences of losses, float64 [n] each: their means over the probes, and standard errors."""

    mean: Tensor
    error: Tensor


class Row(NamedTuple):
    """One line of a table; shares lie in [0, 1].

    Attributes:
        name: of a class or a size.
        n: annotated objects.
        side: median of sqrt(width x height), pixels of the model's picture.
        explains: median share of the loss that an object explains.
        certain: share of the objects that explain something by 3 standard errors.
        placed: share whose place counts: the box moved by a third explains less, by 3 errors.
        named: share whose class counts: the mean of all classes explains less, by 3 errors.
        probes: median number of probes that make an object certain; infinite where it explains
            nothing.
        found: share that the search finds, IoU 0.5 and more.
        found_named: share that it finds and calls by its name.
    """

    name: str
    n: int
    side: float
    explains: float
    certain: float
    placed: float
    named: float
    probes: float
    found: float
    found_named: float


@dataclass(frozen=True)
class Diagnosis:
    """Whether the model or the search is what a detector lacks.

    All losses are measured on probes that the search did not see, without the prior.

    Attributes:
        names: of the classes.
        n_probes: of each measurement.
        evaluations: of searches and measurements.
        gap: of every image, L(found) - L(annotated): above 0 the search missed a better layout,
            below 0 the model prefers another one.
        differs: whether the two layouts differ in more than how boxes fit: an object that is
            missed, misnamed or too many; bool [n].
        counts: annotated and found objects of every image, int64 [n, 2].
        class_id: of every annotated object, int64 [m]; the following have its order.
        side: sqrt(width x height) in pixels of the model's picture, float64 [m].
        gain: L(annotated without the object) - L(annotated).
        share: the gain as a share of L(annotated without the object), float64 [m].
        place: L(its box moved by a third of its width or height) - L(annotated).
        label: L(the mean of all classes in place of its own) - L(annotated).
        price: what the prior takes for the object, in units of the loss; None without a prior.
        found: whether the search finds it, bool [m]; ``found_named``, with its class.
        margin: of the search, the share of the loss that an object has to explain; None if it has
            none.
    """

    names: tuple[str, ...]
    n_probes: int
    evaluations: int
    gap: Measured
    differs: Tensor
    counts: Tensor
    class_id: Tensor
    side: Tensor
    gain: Measured
    share: Tensor
    place: Measured
    label: Measured
    price: Tensor | None
    found: Tensor
    found_named: Tensor
    margin: float | None

    @property
    def search_gap(self) -> float:
        """The share of images whose annotated layout is another one, and better."""
        better = self.gap.mean > APART * self.gap.error
        return float((self.differs & better).double().mean())

    @property
    def model_gap(self) -> float:
        """The share of images of which the model prefers another layout to the annotated one."""
        worse = self.gap.mean < -APART * self.gap.error
        return float((self.differs & worse).double().mean())

    def by_class(self) -> tuple[Row, ...]:
        """One row for each class that is annotated."""
        rows = [(name, self.class_id == c) for c, name in enumerate(self.names)]
        return tuple(self._row(name, which) for name, which in rows if which.any())

    def by_size(self) -> tuple[Row, ...]:
        """One row for each range of sides, in pixels of the model's picture."""
        ends = (0.0, *SIDES, math.inf)
        rows = []
        for low, high in zip(ends, ends[1:], strict=False):
            name = f"{low:g} to {high:g} px" if high < math.inf else f"from {low:g} px"
            which = (self.side >= low) & (self.side < high)
            if which.any():
                rows.append(self._row(name, which))
        return tuple(rows)

    def advice(self) -> tuple[str, ...]:
        """What to do, one sentence each, with the figures that say so."""
        parts: tuple[Callable[[], list[str]], ...] = (
            self._of_search,
            self._of_classes,
            self._of_margin,
            self._of_prior,
        )
        found = [sentence for part in parts for sentence in part()]
        return tuple(found) or (
            "Nothing stands out: objects explain the pictures, and the search finds them.",
        )

    def to_dict(self) -> dict[str, Any]:
        """The tables and what they mean, for JSON; infinite numbers of probes are None."""

        def plain(row: Row) -> dict[str, Any]:
            values = row._asdict()
            return {**values, "probes": values["probes"] if row.probes < math.inf else None}

        return {
            "images": len(self.counts),
            "objects": len(self.side),
            "probes": self.n_probes,
            "evaluations": self.evaluations,
            "found_as_annotated": float((~self.differs).double().mean()),
            "search_gap": self.search_gap,
            "model_gap": self.model_gap,
            "annotated_per_image": float(self.counts[:, 0].double().mean()),
            "found_per_image": float(self.counts[:, 1].double().mean()),
            "by_class": [plain(row) for row in self.by_class()],
            "by_size": [plain(row) for row in self.by_size()],
            "advice": list(self.advice()),
        }

    def __str__(self) -> str:
        annotated, found = self.counts.double().mean(dim=0).tolist()
        same = float((~self.differs).double().mean())
        undecided = 1 - same - self.search_gap - self.model_gap
        head = (
            f"{len(self.counts)} images, {annotated:.1f} objects annotated and {found:.1f} found "
            f"in each; {self.n_probes} probes\n"
            f"found as annotated: {same:.0%} of the images; otherwise, and the annotated layout "
            f"explains the image better: {self.search_gap:.0%}; worse: {self.model_gap:.0%}; "
            f"neither by {APART:g} standard errors: {undecided:.0%}"
        )
        lines = [_HEADER, *map(_line, self.by_class()), "", *map(_line, self.by_size())]
        return "\n".join([head, "", *lines, "", *self.advice()])

    def _certain(self, measured: Measured) -> Tensor:
        return measured.mean > CERTAIN * measured.error

    def _row(self, name: str, which: Tensor) -> Row:
        def share(of: Tensor) -> float:
            return float(of[which].double().mean())

        gain, error = self.gain.mean[which], self.gain.error[which]
        needed = torch.where(gain > 0, self.n_probes * (CERTAIN * error / gain).square(), math.inf)
        return Row(
            name,
            int(which.sum()),
            float(self.side[which].median()),
            float(self.share[which].median()),
            share(self._certain(self.gain)),
            share(self._certain(self.place)),
            share(self._certain(self.label)),
            float(needed.median()),
            share(self.found),
            share(self.found_named),
        )

    def _of_search(self) -> list[str]:
        found = []
        if self.search_gap >= GAP:
            found.append(
                f"In {self.search_gap:.0%} of the images the annotated layout explains the picture "
                "better than what was found: the search is a gap. Search harder: windows of the "
                "usual sizes of objects (dive-fast fit says whether they help), more probes "
                "(--probes), more rounds (--set rounds=4), a relaxed search beside it "
                "(--set starts=1)."
            )
        if self.model_gap >= GAP:
            found.append(
                f"In {self.model_gap:.0%} of the images the model prefers what was found to what "
                "is annotated: no search would end there. Train longer or with more pixels, "
                "and look whether objects are left unannotated."
            )
        return found

    def _of_classes(self) -> list[str]:
        found = []
        for row in self.by_class():
            if row.certain >= COMMON:
                continue
            small = row.side < FEW_PIXELS
            what = "use more pixels (--size, or tiles of the pictures)" if small else "train longer"
            probes = (
                "no number of probes makes half of them certain"
                if row.probes == math.inf
                else f"{math.ceil(row.probes):,} probes would make half of them certain"
            )
            found.append(
                f"Only {row.certain:.0%} of the objects of class {row.name!r}, {row.side:.0f} "
                f"pixels wide in the model's picture, explain it measurably better than "
                f"nothing there: {what}; {probes}."
            )
        return found

    def _of_margin(self) -> list[str]:
        if self.margin is None:
            return []
        certain = self._certain(self.gain)
        below = certain & (self.share < self.margin)
        part = float(below.sum() / certain.sum()) if certain.any() else 0.0
        if part < GAP:
            return []
        fifth = float(self.share[certain].quantile(0.2))
        return [
            f"{part:.0%} of the objects that explain something explain less than the margin of "
            f"{self.margin:g} of the loss, and are dropped: take --set "
            f"margin={max(LEAST_MARGIN, round(fifth, 3)):g}."
        ]

    def _of_prior(self) -> list[str]:
        if self.price is None:
            return []
        certain = self._certain(self.gain)
        part = float((self.price > self.gain.mean)[certain].double().mean()) if certain.any() else 0
        if part < GAP:
            return []
        return [
            f"The prior takes more for {part:.0%} of the objects that explain something than they "
            "explain: give it less weight (--prior-weight), or none (--prior none)."
        ]


_COLUMNS = ("", "n", "side", "explains", "certain", "placed", "named", "probes", "found", "right")
_WIDTHS = (18, 6, 7, 9, 8, 8, 7, 9, 7, 7)
_HEADER = "".join(
    f"{name:<{width}}" if i == 0 else f"{name:>{width}}"
    for i, (name, width) in enumerate(zip(_COLUMNS, _WIDTHS, strict=True))
)


def _line(row: Row) -> str:
    probes = "never" if row.probes == math.inf else f"{math.ceil(row.probes):,}"
    cells = (
        row.name[: _WIDTHS[0] - 1],
        str(row.n),
        f"{row.side:.1f}",
        f"{row.explains:.2%}",
        *(f"{share:.0%}" for share in (row.certain, row.placed, row.named)),
        probes,
        *(f"{share:.0%}" for share in (row.found, row.found_named)),
    )
    return "".join(
        f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    )
