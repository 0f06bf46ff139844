"""Answers that are several conditions each: their loss is the mean of the conditions' losses.

    L(y; x0) = mean over the prompts p of y of L(p; x0)

A row of the vocabulary then holds the conditions of one answer end to end. Strategies search over
such rows as over any others, and the engine and the network see single conditions: the requests
are taken apart on their way, and the replies are put together again.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dive_fast.core.requests import LossesAndGradients, Request, Search


def averaged(search: Search, parts: int) -> Search:
    """The same search, with every condition [parts * D] requested as ``parts`` conditions [D]."""
    if parts == 1:
        return (yield from search)
    reply = None
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value
        reply = _join((yield _split(request, parts)), parts)


def _split(request: Request, parts: int) -> Request:
    if request.relaxed:
        conditions = request.conditions.unflatten(1, (parts, -1)).flatten(0, 1)
    else:
        # The engine counts the vocabulary's conditions through.
        conditions = (request.conditions[:, None] * parts + torch.arange(parts)).flatten()
    return replace(request, conditions=conditions)


def _join(
    reply: torch.Tensor | LossesAndGradients, parts: int
) -> torch.Tensor | LossesAndGradients:
    if not isinstance(reply, LossesAndGradients):
        return reply.unflatten(0, (-1, parts)).mean(dim=1)
    losses = reply.losses.unflatten(0, (-1, parts)).mean(dim=1)
    # Each condition owns its part of the row, and a share of the mean.
    gradients = reply.gradients.unflatten(-2, (-1, parts)).flatten(-2) / parts
    return reply._replace(losses=losses, gradients=gradients)
