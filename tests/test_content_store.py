"""The store behind `accelerate`: eviction, pauses, hashes."""

from __future__ import annotations

import pytest
import torch

from dive_fast.accelerator.store import RETRY, ContentStore, Rows, fingerprint, row_hashes

KEY, STATE = 8, 4  # bytes of content (two float32) and of state (one float32)
ENTRY = KEY + STATE


def look_up(store: ContentStore, *values: float, context: object = None) -> torch.Tensor:
    """The state of rows (value, value), which is ten times the value."""
    content = torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2)

    def compute(rows):
        return (10 * (content if rows is None else content[rows])[:, :1],)

    (state,) = store.states(Rows(context, content), compute)
    assert state.tolist() == [[10 * value] for value in values]
    return state


def counts(store: ContentStore) -> tuple[int, int, int]:
    return store.hits, store.shared, store.misses


def test_rows_of_a_batch_share():
    store = ContentStore(100 * ENTRY)
    look_up(store, 1, 2, 1, 1)
    assert counts(store) == (0, 2, 2)
    look_up(store, 3, 2, 3, 1)
    assert counts(store) == (2, 3, 3)
    assert (len(store), store.nbytes) == (3, 3 * ENTRY)


def test_contexts_do_not_mix():
    store = ContentStore(100 * ENTRY)
    look_up(store, 1, context="float32")
    look_up(store, 1, context="bfloat16")
    assert counts(store) == (0, 0, 2)


def test_least_recently_used_goes_first():
    store = ContentStore(2 * ENTRY)
    for value in (1, 2, 1, 3):  # the second 1 is a hit, so 2 is the oldest
        look_up(store, value)
    look_up(store, 1)
    look_up(store, 2)
    assert counts(store) == (2, 0, 4)
    assert store.nbytes == 2 * ENTRY


def test_a_cycle_longer_than_the_store_still_hits():
    store = ContentStore(4 * ENTRY)
    for _ in range(5):
        for value in range(10):
            look_up(store, value)
    assert counts(store) == (4 * 4, 0, 50 - 16)


def test_storing_pauses_where_nothing_repeats_and_resumes():
    store = ContentStore(4 * ENTRY)
    for value in range(4 + 1):
        look_up(store, value)
    assert store.paused and len(store) == 4
    for value in range(5, 5 + 4 * RETRY + 1):
        look_up(store, value)
    assert not store.paused
    look_up(store, 1000)
    look_up(store, 1000)
    assert store.hits == 1


def test_resize():
    store = ContentStore(4 * ENTRY)
    look_up(store, 1, 2, 3)
    store.resize(2 * ENTRY)
    assert store.nbytes == 2 * ENTRY
    look_up(store, 3)
    assert store.hits == 1
    store.resize(0)
    assert store.nbytes == len(store) == 0


def test_what_is_larger_than_the_store_is_not_kept():
    store = ContentStore(ENTRY - 1)
    look_up(store, 1)
    look_up(store, 1)
    assert counts(store) == (0, 0, 2) and store.nbytes == 0


def test_states_are_copies():
    store = ContentStore(10 * ENTRY)
    look_up(store, 1, 2).zero_()
    look_up(store, 1).zero_()
    look_up(store, 2, 1).zero_()
    look_up(store, 1, 2)
    assert store.misses == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_bits_decide(dtype):
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0], [0.0, 1.0]]).to(dtype)
    if dtype.is_floating_point:
        rows = torch.cat([rows, torch.full((2, 2), torch.nan, dtype=dtype)])
        assert Rows(None, rows).unique() == ([0, 1, 2, 4], [0, 1, 2, 0, 3, 3])
    else:
        assert Rows(None, rows).unique() == ([0, 2], [0, 0, 1, 0])


def test_hashes_spread():
    """Small counters differ in few bits, and so do images of one image at two timesteps."""
    rows = torch.arange(4096)[:, None].expand(-1, 3)
    assert len(set(row_hashes([rows.contiguous()]))) == 4096
    swapped = torch.tensor([[1, 2], [2, 1]])
    assert len(set(row_hashes([swapped]))) == 2
    parts = torch.tensor([[1], [2]]), torch.tensor([[2], [1]])
    assert len(set(row_hashes(parts))) == 2


def test_fingerprint():
    linear = torch.nn.Linear(30, 20).requires_grad_(False)
    conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    parameters = [*linear.parameters(), *conv.parameters()]
    marks = [fingerprint(parameters)]
    assert fingerprint(parameters) == marks[0]
    for change in (
        lambda: linear.weight[3, 4].add_(1),  # counted, though no sampled value need change
        lambda: linear.weight.data.add_(1),
        lambda: conv.weight.data.mul_(2),
        lambda: conv.bias.data.fill_(torch.nan),
        linear.double,
    ):
        change()
        marks.append(fingerprint(parameters))
    assert len(set(marks)) == len(marks)
    assert fingerprint(parameters) == marks[-1]
    assert fingerprint([]) == ()


def test_fingerprint_of_weights_made_in_inference_mode():
    with torch.inference_mode():
        linear = torch.nn.Linear(3, 2)
    before = fingerprint(linear.parameters())
    with torch.inference_mode():
        linear.weight.mul_(2)
    assert fingerprint(linear.parameters()) != before
