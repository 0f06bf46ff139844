"""Reading ahead: worker processes read the next pictures while the network computes.

The workers come from a fork server, which has imported the readers of images and nothing else: a
fork of the process that computes would have its OpenMP threads, and perhaps its GPU, in a state
that no fork can use. torch's DataLoader keeps the order and hands tensors over in shared memory.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dive_fast.core.numbers import whole
from dive_fast.core.threads import free_cores
from dive_fast.data.images import image_bytes, read_image, to_mode
from dive_fast.errors import DiveFastError, ImageError, RunError, shown

if TYPE_CHECKING:
    from dive_fast.data.coco import CocoImage
    from dive_fast.data.examples import Example

K = TypeVar("K")
T = TypeVar("T")
Read = Callable[[], Any]

# Images that are read and not yet taken: an engine takes those of a whole batch at once. What they
# lie in is a container's shared memory, of which there may be 64 MiB.
AHEAD, AHEAD_BYTES = 32, 32 << 20
# Readers are started when reading has taken this share of the first seconds, of so many images,
# and the rest of it would take several times what it takes to start them.
SHARE, FIRST_SECONDS, FIRST_IMAGES, REST_SECONDS = 0.2, 3.0, 8, 20.0
MOST = 4


@dataclass(frozen=True)
class Pixels:
    """Reads an image for a model: uint8 [channels, size, size], for ``images.from_bytes``.

    Attributes:
        read: gives it in any form that ``as_image`` takes.
        size, channels: of the model's input.
    """

    read: Read
    size: int
    channels: int

    def __call__(self) -> torch.Tensor:
        return image_bytes(self.read(), self.size, self.channels)


def load(examples: Sequence[Example], index: int) -> Image.Image | np.ndarray:
    """The image of an example; unlike ``examples[index].load`` it refers to them all."""
    return examples[index].load()


def read_found(path: str, error: ImageError | None) -> Image.Image:
    """The image of a path that ``expand_inputs`` gave; its error is raised."""
    if error is not None:
        raise error
    return read_image(path)


def read_rgb(image: CocoImage) -> Image.Image:
    """An annotated image, RGB. A mode that cannot be converted is its error, not the detector's."""
    return to_mode(image.read(), 3)


def images_ahead(nbytes: int) -> int:
    """How many images of so many bytes are read ahead: 2 to ``AHEAD``."""
    return max(2, min(AHEAD, AHEAD_BYTES // nbytes))


def as_readers(readers: object, *, on_ray: bool = False) -> int | None:
    """A number of readers, or None for "auto".

    Raises:
        DiveFastError: it is neither; or there shall be some, and the workers of Ray read.
    """
    if readers is None or readers == "auto":
        return None
    count = whole("readers", readers, 0)
    if on_ray and count > 0:
        raise DiveFastError(
            f"the workers of Ray read their images themselves: expected no readers, got {count}."
        )
    return count


def read_ahead(
    items: Iterable[tuple[K, Read]],
    readers: int | None = 0,
    *,
    shared: Sequence[object] = (),
    ahead: int = 8,
    total: int | None = None,
) -> Iterator[tuple[K, Any]]:
    """Reads images in their order, and hands on each as soon as it is asked for.

    Args:
        items: pairs of a key, which stays here, and what reads the image. With readers it must
            pickle.
        readers: worker processes; 0 reads here. None begins here, and starts some if reading
            turns out to keep the network waiting while there are cores free.
        shared: what many of ``items`` refer to, such as a data set's examples: sent to every
            reader once.
        ahead: images that readers have read or are reading; at least one each.
        total: how many items there are, which None for ``readers`` looks at.

    Yields:
        (key, image), or (key, ImageError) where it cannot be read.

    Raises:
        DiveFastError: something that does not pickle.
        RunError: a reader was killed.
    """
    items = iter(items)
    if readers is None:
        readers = yield from _begin(items, total)
    if readers == 0:
        yield from ((key, _value(read)) for key, read in items)
    else:
        yield from _by_workers(items, readers, shared, ahead)


def _begin(items: Iterator[tuple[K, Read]], total: int | None) -> Iterator[tuple[K, Any]]:
    """Reads here until it is known how many readers pay; returns the number."""
    if total is None:
        return 0
    start, reading = time.perf_counter(), 0.0
    for count, (key, read) in enumerate(items, 1):
        began = time.perf_counter()
        value = _value(read)
        reading += time.perf_counter() - began
        yield key, value
        elapsed = time.perf_counter() - start
        if count >= FIRST_IMAGES and elapsed >= FIRST_SECONDS:
            rest = (total - count) * reading / count
            return how_many(reading / elapsed, rest, free_cores())
    return 0


def how_many(share: float, rest: float, free: float | None) -> int:
    """Readers that pay.

    Args:
        share: of the time that went into reading, while one process read and computed.
        rest: seconds that the reading still would take.
        free: cores that nobody else uses; one of them computes.
    """
    if share < SHARE or rest < REST_SECONDS or free is None:
        return 0
    return max(0, min(MOST, round(free) - 1))


def _value(read: Read) -> Any:
    try:
        return read()
    except ImageError as error:
        return error


def _by_workers(
    items: Iterator[tuple[K, Read]], readers: int, shared: Sequence[object], ahead: int
) -> Iterator[tuple[K, Any]]:
    under_way: deque[K] = deque()

    def pickled() -> Iterator[bytes]:
        for key, read in items:
            content = _dumps(read, shared)
            under_way.append(key)
            yield content

    results = _start(pickled(), readers, shared, max(1, ahead // readers))
    try:
        while (found := _next(results)) is not None:
            value, remarks = found
            for message, category in remarks:
                warnings.warn(message, category, stacklevel=2)
            if isinstance(value, DiveFastError) and not isinstance(value, ImageError):
                raise value
            yield under_way.popleft(), value.image() if isinstance(value, _Sent) else value
    finally:
        # Its workers end with it.
        del results


def _start(
    reads: Iterator[bytes], readers: int, shared: Sequence[object], each: int
) -> Iterator[Any]:
    """The results of ``reads`` in their order, by workers that have started."""
    methods = multiprocessing.get_all_start_methods()
    context = _lockless("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        _Reads(tuple(shared)),
        sampler=reads,
        batch_size=None,
        num_workers=readers,
        prefetch_factor=each,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_the_run,
        multiprocessing_context=context,
    )
    try:
        with _no_interrupt(), warnings.catch_warnings():
            # Of what does not pickle, which is told below, and of more readers than cores.
            warnings.simplefilter("ignore")
            results = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise _cannot_pickle(error) from error
    return results


class _Flag:
    """An event for a DataLoader, which tells its workers to end by one, that no process locks.

    A reader may be killed at any time. With the lock of ``multiprocessing.Event`` in its hands it
    would leave the others, and this process, waiting for ever.
    """

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return self._value.value == 1


def _lockless(method: str) -> Any:
    """The context of a start method, with a ``_Flag`` for an event."""

    class Lockless(type(multiprocessing.get_context(method))):
        def Event(self) -> _Flag:
            return _Flag()

    return Lockless()


def _next(results: Iterator[Any]) -> Any:
    """The next result; None after the last."""
    try:
        return next(results, None)
    except (OSError, EOFError, RuntimeError) as error:
        # A DataLoader finds it out within seconds, or the shared memory's connection is broken.
        # What reading itself raised, by a mistake in its code, says in which worker.
        lost = not isinstance(error, RuntimeError) or "DataLoader worker (pid" in str(error)
        if not lost or "in DataLoader worker process" in str(error):
            raise
        raise RunError(
            "a process that read images ahead was killed, perhaps for lack of memory; what was "
            "answered is kept: run again, with fewer readers or --readers 0."
        ) from error


class _Sent(NamedTuple):
    """A grey or RGB image, whose pixels go through shared memory.

    A reader that is killed while it writes pixels into a pipe would leave this process waiting for
    the rest of them.
    """

    pixels: torch.Tensor

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels.numpy().copy())


class _Reads(Dataset):
    """In a worker: reads what it is sent, errors and warnings being values."""

    def __init__(self, shared: tuple[object, ...]) -> None:
        self.shared = shared

    def __getitem__(self, content: bytes) -> tuple[Any, list[tuple[str, type[Warning]]]]:
        with warnings.catch_warnings(record=True) as caught:
            try:
                value = _loads(content, self.shared)()
            except DiveFastError as error:
                value = error
        if isinstance(value, Image.Image) and value.mode in ("L", "RGB"):
            value = _Sent(torch.from_numpy(np.array(value)))
        return value, [(str(warning.message), warning.category) for warning in caught]


def _end_with_the_run(number: int) -> None:
    """A killed run leaves no readers: a DataLoader's own watch is kept on the fork server only."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(found: T) -> T:
    return found


class _Pickler(pickle.Pickler):
    """Names what the readers have already by its number."""

    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.numbers = {id(value): number for number, value in enumerate(shared)}

    def persistent_id(self, value: object) -> int | None:
        return self.numbers.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        self.shared = shared

    def persistent_load(self, number: int) -> object:
        return self.shared[number]


def _dumps(value: object, shared: Sequence[object]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, shared).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise _cannot_pickle(error) from error
    return file.getvalue()


def _loads(content: bytes, shared: Sequence[object]) -> Any:
    return _Unpickler(io.BytesIO(content), shared).load()


def _cannot_pickle(error: Exception) -> DiveFastError:
    return DiveFastError(
        f"readers need data that pickle, got {shown(str(error))}: take readers=0 (--readers 0)."
    )


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C is kept back until the end, and never reaches the processes that start meanwhile.

    They inherit that they do not see it: it is this process that ends them.
    """
    came: list[tuple[int, Any]] = []
    before = signal.getsignal(signal.SIGINT)
    # Only there may handlers be set, and only there does Ctrl-C arrive. Blocking alone would leave
    # it to another thread of this process, of OpenMP's for example.
    kept = threading.current_thread() is threading.main_thread() and callable(before)
    if kept:
        signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        with _blocked(signal.SIGINT):
            yield
    finally:
        if kept:
            signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """For this thread and the processes that it starts."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Its start would let the signal through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
