"""``invert`` for layouts: DIVE's relaxed search (arXiv 2504.17253).

    v' = v + stopgrad(P(v) - v),    v <- AdamW(v, d/dv [L(v'; x0) - (w / beta) log p(v')])

P projects every slot on the rows that it may take, the corners of an object jointly on the valid
boxes, and an object as a whole on "none" where that is nearer. The paper's settings for detection
were never published; these were chosen by experiment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dive_fast.core.requests import Gradients
from dive_fast.errors import DiveFastError
from dive_fast.strategies.layout.board import Board, Items, LayoutProbes, Steps, measure
from dive_fast.strategies.layout.settle import settle


@dataclass(frozen=True)
class InvertLayout(LayoutProbes):
    """Several relaxed layouts from random starts; the best discrete one that they met is settled.

    Attributes:
        starts: relaxed layouts, optimised side by side.
        steps: of AdamW, at most.
        step_probes: probes of a step; steps take them from the list in turn.
        learning_rate: of AdamW.
        stall: a search ends when no start has met a new layout for so many steps.
        joint_boxes: project the two corners of an object on the valid boxes; otherwise each on its
            nearest row, and objects whose corners make no box are dropped in the end.
        finalists: layouts that are compared on common probes.
        final_probes: for that comparison and the decisions at the end.
        settled: whether every object is decided once more in the end; without it the best layout
            is the answer.
        margin: share of the loss that an object has to explain; None for what was fitted to the
            model, else 0.02.
        metric: of the projection, "l2" or "cosine".
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "invert"
    usual_margin: ClassVar[float] = 0.02
    starts: int = 2
    steps: int = 60
    step_probes: int = 12
    learning_rate: float = 0.05
    stall: int = 15
    joint_boxes: bool = True
    finalists: int = 8
    final_probes: int = 24
    settled: bool = True
    margin: float | None = None
    metric: str = "l2"
    loss: str = "l2"

    def __post_init__(self) -> None:
        for key in ("starts", "steps", "step_probes", "stall", "finalists", "final_probes"):
            if getattr(self, key) < 1:
                raise DiveFastError(f"{key} must be at least 1, got {getattr(self, key)}.")
        if not self.learning_rate > 0:
            raise DiveFastError(f"learning_rate must be above 0, got {self.learning_rate}.")
        self.check_margin()

    def search(self, board: Board) -> Steps:
        met, steps = yield from self.relax(board)
        candidates = sorted(met, key=met.__getitem__)[: self.finalists]
        final = torch.arange(min(self.final_probes, len(board.probes)))
        losses = yield from measure(board, candidates, final)
        best = candidates[int(losses.argmin())]
        rounds = 2 if self.settled else 0
        answer = yield from settle(board, best, final, self.least_share, rounds)
        answer.trace.update(met=len(met), steps=steps, found=best)
        return answer

    def relax(self, board: Board) -> Steps:
        """The optimisation alone: the lowest running loss of every layout met, and the steps."""
        k = len(board.probes)
        min_size = 1 if self.joint_boxes else None
        project = board.layout_format.projection(board.table, self.metric, min_size)
        generator = torch.Generator().manual_seed(board.seed)
        shape = (self.starts, board.layout_format.n_slots, board.table.shape[1])
        noise = torch.randn(shape, generator=generator)
        v = (noise * board.table.std() + board.table.mean()).requires_grad_()
        optimizer = torch.optim.AdamW([v], lr=self.learning_rate)
        # The running loss of every layout that was met, on the probes of one step.
        met: dict[Items, float] = {}
        since_new = 0
        for step in range(self.steps):
            ids = (torch.arange(self.step_probes) + step * self.step_probes) % k
            with torch.enable_grad():
                projected, tokens = project(v)
                prior = _penalty(board, projected)
            reply = yield Gradients(projected.detach().flatten(1), ids)
            since_new += 1
            means = reply.losses.double().mean(dim=1) + prior.detach().double()
            for row, loss in zip(tokens, means.tolist(), strict=True):
                items = board.items(row)
                since_new = since_new if items in met else 0
                met[items] = min(loss, met.get(items, loss))
            if since_new >= self.stall:
                break
            with torch.enable_grad():
                # The straight-through projection passes the gradient on as it is.
                (from_prior,) = (
                    torch.autograd.grad(prior.sum(), v) if prior.requires_grad else (0.0,)
                )
            v.grad = reply.gradients.view(shape) + from_prior
            optimizer.step()
        return met, step + 1


def _penalty(board: Board, embeddings: Tensor) -> Tensor:
    """The prior's part [N], or zeros."""
    if board.penalty is None:
        return torch.zeros(len(embeddings))
    return board.penalty(embeddings)
