"""The store of activations: what it holds, in how many bytes, and what leaves first."""

from __future__ import annotations

import pytest
import torch

from dive_fast.engine.cache import ActivationCache, Key, is_out_of_memory, merge, take

ROW_BYTES = 3 * 4 + 2 * 4  # float32 [3] and int32 [2]


def state(numbers) -> tuple[torch.Tensor, ...]:
    """One row per number, recognisable."""
    n = torch.as_tensor(numbers)
    return n[:, None].float().expand(-1, 3).contiguous(), n[:, None].int().expand(-1, 2)


def keys(numbers, image: int = 0) -> list[Key]:
    return [Key("prefix", image, int(i)) for i in numbers]


class Source:
    """Computes states of keys and remembers for which it was asked."""

    def __init__(self, numbers) -> None:
        self.numbers, self.asked = list(numbers), []

    def __call__(self, missing: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.asked = [self.numbers[i] for i in missing.tolist()]
        return state(self.asked)


def get(cache: ActivationCache, numbers, image: int = 0) -> list[int]:
    """What had to be computed; checks what came back."""
    source = Source(numbers)
    found = cache.get(keys(numbers, image), source)
    for x, expected in zip(found, state(numbers), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=0)
    return source.asked


def test_only_what_is_missing_is_computed_and_rows_keep_their_order():
    cache = ActivationCache(10**6)
    assert get(cache, [4, 2]) == [4, 2]
    assert get(cache, [2, 9, 4, 7]) == [9, 7]
    assert get(cache, [7, 4]) == []
    assert get(cache, [7, 4], image=1) == [7, 4]
    assert (cache.hits, cache.misses, cache.evictions) == (4, 6, 0)
    assert len(cache) == 6 and cache.nbytes == cache.peak_bytes == 6 * ROW_BYTES


def test_the_bound_holds_and_the_least_recently_used_leave():
    cache = ActivationCache(3 * ROW_BYTES + 5)
    get(cache, [0, 1, 2])
    get(cache, [0])
    assert get(cache, [3]) == [3]  # 1 leaves
    assert cache.evictions == 1 and cache.nbytes == 3 * ROW_BYTES
    assert get(cache, [0, 2, 3]) == []
    assert get(cache, [1]) == [1]
    assert cache.peak_bytes == 3 * ROW_BYTES


@pytest.mark.parametrize("capacity", [0, ROW_BYTES - 1])
def test_what_does_not_fit_is_computed_again(capacity):
    cache = ActivationCache(capacity)
    for _ in range(2):
        assert get(cache, [0, 1]) == [0, 1]
    assert len(cache) == cache.nbytes == cache.evictions == 0


def test_more_at_once_than_fits_keeps_as_many_as_fit():
    cache = ActivationCache(2 * ROW_BYTES)
    assert get(cache, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert len(cache) == 2 and cache.evictions == 0
    assert get(cache, [0, 1]) == []


def test_a_key_written_again_is_replaced():
    cache = ActivationCache(10**6)
    cache.write(keys([1]), state([5]))
    cache.write(keys([1]), state([6]))
    assert cache.read(keys([1]))[0][0, 0] == 6
    assert len(cache) == 1 and cache.nbytes == ROW_BYTES and cache.evictions == 0


def test_entries_do_not_keep_the_batch_alive_nor_its_graph():
    cache = ActivationCache(10**6)
    batch = torch.randn(100, 3, requires_grad=True) * 2
    cache.write(keys([0]), (batch,))
    (row,) = cache.read(keys([0]))
    assert not row.requires_grad
    (entry,) = cache._entries[keys([0])[0]]
    assert entry.untyped_storage().nbytes() == 12


def test_an_image_is_dropped_and_what_belongs_to_none_stays():
    cache = ActivationCache(10**6)
    get(cache, [0, 1], image=0)
    get(cache, [0], image=1)
    cache.write([Key("projected", condition=3)], state([3]))
    cache.drop(0)
    cache.drop(7)
    assert len(cache) == 2 and cache.nbytes == 2 * ROW_BYTES
    assert Key("projected", condition=3) in cache and keys([0], 1)[0] in cache
    assert cache.evictions == 0
    assert cache.close() and not cache.close()
    assert get(cache, [0], image=1) == [0] and len(cache) == 0


def test_no_memory_on_the_device_ends_the_growth(monkeypatch):
    cache = ActivationCache(10**6)
    get(cache, [0])
    clone = torch.Tensor.clone

    def refuse(self, *arguments, **named):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.Tensor, "clone", refuse)
    assert get(cache, [1]) == [1]
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    assert cache.capacity == cache.nbytes == ROW_BYTES
    assert get(cache, [0]) == []


def test_another_error_is_not_taken_for_memory(monkeypatch):
    def broken(self, *arguments, **named):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(torch.Tensor, "clone", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        ActivationCache(10**6).write(keys([0]), state([0]))
    assert not is_out_of_memory(RuntimeError("device-side assert"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())


def test_rows_are_taken_and_merged_with_their_gradient():
    first = (torch.randn(2, 3, requires_grad=True),)
    second = (torch.randn(1, 3),)
    (merged,) = merge(first, second, torch.tensor([2, 1, 0]))
    torch.testing.assert_close(merged, torch.stack([second[0][0], first[0][1], first[0][0]]))
    (taken,) = take(first, torch.tensor([1, 1, 0]))
    (gradient,) = torch.autograd.grad(taken.sum() + merged.sum(), first)
    assert gradient[:, 0].tolist() == [2.0, 3.0]
