"""Searches for layouts on the analytic model, driven as tests want them."""

from __future__ import annotations

import torch
from toy_layout import ToyLayoutModel

from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.strategies.layout import Board, Box, Item
from dive_fast.strategies.layout.residual import residual
from dive_fast.strategies.layout.settle import settle
from dive_fast.strategies.layout.state import State

SCENES = (
    (Item(0, Box(0, 1, 2, 4)),),
    (Item(1, Box(1, 0, 3, 2)), Item(2, Box(3, 3, 6, 6))),
    (Item(2, Box(0, 0, 2, 2)), Item(0, Box(3, 1, 5, 3)), Item(1, Box(1, 4, 4, 6))),
    (),
)


def make_board(model: ToyLayoutModel, penalty=None) -> Board:
    probes = low_discrepancy_probes(24, 1000, model.latent_shape)
    return Board(model.vocabulary.table, model.layout_format, probes, penalty=penalty)


def run(model: ToyLayoutModel, board: Board, strategy, scenes=SCENES, batch_size: int = 256):
    """Answers and evaluations, in the order of the scenes."""
    pictures = model.picture(board.conditions(scenes).flatten(1))
    jobs = [Job(i, x0, strategy.search(board)) for i, x0 in enumerate(pictures)]
    found = Engine(model, batch_size).run(jobs, board.probes, Objective())
    return [(f.answer, f.evaluations) for f in sorted(found, key=lambda f: f.key)]


def drive(model: ToyLayoutModel, scene, begin, move, penalty=None) -> State:
    """Where a move of ``State`` leads from a layout, on the image of a scene."""

    class Search:
        def search(self, board: Board):
            probe_ids = torch.arange(6)
            unexplained = yield from residual(board, (), probe_ids)
            state = State(board, probe_ids, 0.02, unexplained)
            yield from state.choose([begin])
            changed = yield from move(state)
            answer = yield from settle(board, (), torch.arange(1), 0.0)
            answer.trace.update(state=state, changed=changed)
            return answer

    ((answer, _),) = run(model, make_board(model, penalty), Search(), (scene,))
    state, changed = answer.trace["state"], answer.trace["changed"]
    # What a move says of itself, where it says anything.
    assert changed in (None, state.items != begin)
    return state
