"""Where the pictures of a run lie: found by their ids, opened only when they are shown."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from PIL import Image

from dive_fast.core.numbers import is_whole
from dive_fast.data import DataSet, open_dataset
from dive_fast.data.coco import CocoDataset, CocoImage, read_coco
from dive_fast.data.corruptions import corrupted_again
from dive_fast.data.images import as_image, read_image
from dive_fast.data.scenes import N_TEST, write_scenes
from dive_fast.errors import DataError, DiveFastError, ImageError
from dive_fast.report.runs import Run

SCENES = "scenes"


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a classifier's run.

    Attributes:
        problem: a sentence on what is wrong with them; "" where nothing is.
    """

    problem: str = ""
    _data: DataSet | None = None
    _row: Mapping[str, int] | None = None

    @property
    def found(self) -> bool:
        return self._data is not None

    def read(self, key: str, truth: int) -> Image.Image:
        """The image of a record.

        Raises:
            ImageError: there is none of that id, it cannot be read, or it is of another class than
                the record says, and so another image.
        """
        if not self.found or key not in self._row:
            raise ImageError("no image of this id was found.")
        example = self._data.examples[self._row[key]]
        if example.label != truth:
            raise ImageError("the image of this id is of another class.")
        return as_image(example.load())


@dataclass(frozen=True, eq=False)
class Annotated:
    """The images of a detector's run, and what they are known to show.

    Attributes:
        problem: a sentence on what is wrong with them; "" where nothing is.
        dataset: None where no annotations were found.
    """

    problem: str = ""
    dataset: CocoDataset | None = None
    _of: Mapping[str, CocoImage] | None = None

    @property
    def found(self) -> bool:
        return self.dataset is not None or self._of is None

    def read(self, key: str) -> Image.Image:
        """The image of a record; of ``dive-fast detect`` the file that its id names.

        Raises:
            ImageError: there is none, or it cannot be read.
        """
        if self._of is not None:
            if key not in self._of:
                raise ImageError("no image of this id was found.")
            return self._of[key].read()
        return read_image(key)

    def annotation(self, key: str) -> CocoImage | None:
        return self._of.get(key) if self._of is not None else None


class Sources:
    """Opens data, each only once; a context, for scenes are written into a folder of their own.

    Args:
        data: where the images lie, as ``evaluate`` takes it; None for where the runs say.
        images: the folder of the images of an annotation file.
    """

    def __init__(self, data: str | os.PathLike[str] | None, images: str | os.PathLike | None):
        self._given = None if data is None else os.fspath(data)
        self._images = images
        self._stack = ExitStack()
        self._opened: dict[tuple[str, tuple[str, ...]], DataSet] = {}
        self._annotated: dict[tuple[str, str, int], CocoDataset] = {}

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of_classifier(self, run: Run) -> Pictures:
        """The run's images.

        Raises:
            DataError: the data that were named cannot be read. Where only the run tells where they
                are, that is the pictures' ``problem``.
        """
        named = self._given if not _is_annotated(self._given) else None
        where = named or run.where
        if where is None:
            return Pictures(f"{run.label}: the run does not say where its images lie; --data can.")
        names = run.table.names
        try:
            if (where, names) not in self._opened:
                self._opened[where, names] = open_dataset(where, names)
            data = self._opened[where, names]
            if isinstance(told := run.data.get("corruption"), Mapping):
                data = corrupted_again(data, told)
        except DiveFastError as error:
            if named is not None:
                raise
            return Pictures(f"{run.label}: its images were not found: {error}")
        if data.labels is None:  # to find a few of a stream's images is to read them all
            return Pictures(f"{run.label}: its images are streamed; --data can name a copy.")
        row = {key: i for i, key in enumerate(data.ids)}
        return Pictures(_other_images(run, data, row), data, row)

    def of_detector(self, run: Run) -> Annotated:
        """The run's images with their annotations.

        Raises:
            DataError: as for ``of_classifier``; or annotations without their folder of images.
        """
        named = self._given if _is_annotated(self._given) else None
        where = named or run.where
        if where is None and not run.data:
            return Annotated()  # of dive-fast detect, whose ids are paths
        try:
            dataset = self._open_annotated(where, self._images or run.images, run)
        except DiveFastError as error:
            if named is not None:
                raise
            return Annotated(f"{run.label}: its images were not found: {error}", None, {})
        of = {str(image.id): image for image in dataset.images}
        there = dataset.take(i for i, m in enumerate(dataset.images) if str(m.id) in run.records)
        problem = ""
        if not there.images:
            problem = f"{run.label}: none of its images is in {where}."
        elif _changed(run, there.identity()):
            problem = f"{run.label}: the images in {where} are not those of the run."
        return Annotated(problem, dataset, of)

    def _open_annotated(
        self, where: str | None, images: str | os.PathLike[str] | None, run: Run
    ) -> CocoDataset:
        if where is None:
            raise DataError("the run does not say where; --data FILE.json --images DIR can.")
        if where != SCENES and images is None:
            raise DataError(f"expected --images DIR, the images of {where}, got none.")
        count = run.data.get("count") if where == SCENES else 0
        count = count if is_whole(count, 0) and count <= N_TEST else N_TEST
        key = where, str(images), count
        if key not in self._annotated:
            if where == SCENES:
                folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="scenes-"))
                self._annotated[key] = write_scenes(folder, "test", count)
            else:
                self._annotated[key] = read_coco(where, images)
        return self._annotated[key]


def _is_annotated(data: str | None) -> bool:
    """Whether data are a detector's, as ``evaluate`` tells them apart."""
    return data is not None and (data == SCENES or data.lower().endswith(".json"))


def _other_images(run: Run, data: DataSet, row: Mapping[str, int]) -> str:
    """A sentence where the data are not those of the run."""
    ids = [*run.table.ids, *run.table.failed]
    there = sorted(row[key] for key in ids if key in row)
    if not there:
        return f"{run.label}: none of its images is in {data.where or data.name}."
    if len(there) == len(ids) and _changed(run, data.take(there).identity()):
        return (
            f"{run.label}: the images in {data.where or data.name} have the ids of the run's, but "
            "are not the same."
        )
    return ""


def _changed(run: Run, identity: Mapping[str, str | int]) -> bool:
    """Whether images that are as many as the run's have another fingerprint."""
    told = run.data
    same_count = told.get("count") == identity["count"]
    return same_count and told.get("fingerprint") not in (None, identity["fingerprint"])
