"""Several images encoded at once: in their order, no more held than said, memory minded."""

from __future__ import annotations

import pytest
import torch

from dive_fast.errors import ImageError
from dive_fast.evaluation.encoding import encoded, images_at_once


class Encoder:
    """x0 = 2 pixels; has no memory for more than ``most`` images."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.batches: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("no memory")
        return 2 * pixels


def pixels(number: int) -> torch.Tensor:
    return torch.full((1, 3, 3), number, dtype=torch.uint8)


def answer(number: int) -> torch.Tensor:
    """Twice what the encoder is given, which is in [-1, 1]."""
    return torch.full((1, 3, 3), 2 * (number / 127.5 - 1))


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 50])
def test_every_image_once_in_order(at_once: int) -> None:
    encoder, error = Encoder(), ImageError("damaged.")
    pairs = [(i, error if i in (2, 5, 6) else pixels(i)) for i in range(8)]
    found = list(encoded(pairs, encoder, at_once))
    assert [key for key, _ in found] == list(range(8))
    for key, x0 in found:
        assert x0 is error if key in (2, 5, 6) else torch.allclose(x0, answer(key))
    assert sum(encoder.batches) == 5
    assert max(encoder.batches) <= at_once


def test_no_more_are_taken_than_said() -> None:
    taken = []

    def pairs():
        for i in range(10):
            taken.append(i)
            yield i, pixels(i)

    found = encoded(pairs(), Encoder(), 4)
    assert taken == []
    next(found)
    assert taken == [0, 1, 2, 3]


def test_only_errors() -> None:
    encoder = Encoder()
    assert [key for key, _ in encoded([("a", ImageError("x"))], encoder, 4)] == ["a"]
    assert encoder.batches == []


def test_fewer_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(most=3)
    found = list(encoded([(i, pixels(i)) for i in range(12)], encoder, 8))
    assert all(torch.allclose(x0, answer(key)) for key, x0 in found)
    assert len(found) == 12
    assert encoder.batches == [8, 4, 2, 2, 2, 2, 2, 2]
    assert "out of memory with 8 images" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none"), RuntimeError("a mistake")])
def test_what_cannot_be_helped(error: Exception) -> None:
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        raise error

    at_once = 1 if isinstance(error, torch.OutOfMemoryError) else 4
    with pytest.raises(type(error)):
        list(encoded([(0, pixels(0)), (1, pixels(1))], encode, at_once))


def test_one_by_one_on_the_cpu() -> None:
    assert images_at_once(torch.device("cpu")) == 1
    assert images_at_once(torch.device("cuda:1")) > 1
