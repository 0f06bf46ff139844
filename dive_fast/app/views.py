"""What the page shows of an answer: sentences and tables as HTML, and drawings."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import torch
from PIL import Image

from dive_fast.app.asking import Boxes, Look
from dive_fast.predict.classification import Classification
from dive_fast.predict.detections import Detections
from dive_fast.predict.drawing import draw_boxes
from dive_fast.predict.explanation import Explanation

MOST_CLASSES = 10  # that are shown
_LONGEST = 1600  # pixels of a drawing's longer side


def told(sentence: str, kind: str = "") -> str:
    """A sentence that a screen reader tells as it changes.

    Args:
        kind: "error" is told at once; "running", "stopped" and "done" when there is a pause.
    """
    role = 'role="alert"' if kind == "error" else 'role="status" aria-live="polite"'
    return f'<p class="told {kind}" {role}>{escape(sentence)}</p>'


def status(look: Look) -> str:
    """How the search stands, in a sentence."""
    cost = f"{_counted(look.evaluations, 'evaluation')}, {look.seconds:.1f} s"
    return told(f"{_headline(look)} ({cost})", look.state)


def bars(look: Look) -> dict[str, float] | None:
    """The probabilities of the best classes; None without any."""
    if not isinstance(look.found, Classification):
        return None
    return {entry["label"]: entry["score"] for entry in look.found.top(MOST_CLASSES)}


def table(look: Look) -> str:
    """What is known of each class, or of each object."""
    found = look.found
    if isinstance(found, Classification):
        return _class_table(found, final=look.state == "done")
    if isinstance(found, Detections):
        return _object_table(found)
    return ""


def drawing(look: Look, names: Sequence[str]) -> Image.Image | None:
    """The picture with its boxes, those of a search under way without numbers; None without any."""
    found = look.found
    if not isinstance(found, Detections | Boxes):
        return None
    image, boxes = _reduced(look.image, found.xyxy)
    if isinstance(found, Detections):
        classes, scores = found.class_id.tolist(), found.confidence.tolist()
        captions = [f"{names[c]} {p:.2f}" for c, p in zip(classes, scores, strict=True)]
    else:
        classes = list(found.class_id)
        captions = [names[c] if c >= 0 else "?" for c in classes]
    return draw_boxes(image, boxes.tolist(), [max(c, 0) for c in classes], captions)


def where(look: Look) -> str:
    """The map with its caption, or the sentence in its place; nothing where none was asked for."""
    if look.where is None:
        return ""
    if isinstance(look.where, str):
        return f'<p class="note" role="status" aria-live="polite">{escape(look.where)}</p>'
    return _figure(look.where)


def _figure(found: Explanation) -> str:
    best, other = escape(found.a), escape(found.b)
    alt = f"The picture in grey: red where {best} explains it better, blue where {other} does"
    data = io.BytesIO()
    found.image(z=None).save(data, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return (
        f'<figure class="where"><figcaption>Where it is {best} rather than {other}</figcaption>'
        f'<img src="{source}" alt="{alt}">'
        f'<p class="note">{_swatch("Red")} {best} explains the picture better. '
        f"{_swatch('Blue')} {other} does. The mean loss of {other} less that of "
        f"{best}, on {_counted(found.n_probes, 'probe')}: {found.gap:+.2g}. The map took "
        f"{_counted(found.evaluations, 'evaluation')} in addition, and is slightly smoothed.</p>"
        "</figure>"
    )


def _swatch(colour: str) -> str:
    return f'<span class="swatch"><span class="{colour.lower()}"></span> {colour}:</span>'


def _reduced(image: Image.Image, xyxy: torch.Tensor) -> tuple[Image.Image, torch.Tensor]:
    """A large picture at a size that is quickly sent, and its boxes."""
    scale = min(1.0, _LONGEST / max(image.size))
    if scale == 1.0:
        return image, xyxy
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size), xyxy * scale


def _headline(look: Look) -> str:
    found = look.found
    ended = {"running": "So far", "stopped": "Stopped"}.get(look.state)
    if found is None:
        return f"{ended}: nothing compared yet" if ended else "Nothing found"
    if isinstance(found, Classification):
        best = f"{found.label}, {_percent(found.probability)}"
        return f"{ended}: {best}" if ended else best
    what = _counted(len(found.xyxy), "object")
    return f"{ended}: {what}" if ended else f"{what} found"


def _class_table(found: Classification, final: bool) -> str:
    rows = []
    for entry in found.top(MOST_CLASSES):
        i = entry["index"]
        odds = found.log_posterior[i].item() - found.log_posterior[found.index].item()
        if not found.eliminated[i]:
            state = ("answer" if final else "leads") if i == found.index else "in question"
            if final and i != found.index:
                state = "measured"
        else:
            bound = found.log_odds_bound[i].item()
            state = f"given up, at most {_odds(bound)}" if math.isfinite(bound) else "given up"
        rows.append(
            (
                entry["label"],
                _percent(entry["score"]),
                _odds(odds),
                f"{found.losses[i].item():.4f}",
                f"{int(found.n_probes[i]):,}",
                state,
            )
        )
    unmeasured = int((found.n_probes == 0).sum())
    beyond = int((found.n_probes > 0).sum()) - len(rows)
    notes = ["odds are those to the first class"] if len(rows) > 1 else []
    if beyond > 0:
        notes.append(f"{_counted(beyond, 'further class', 'further classes')} measured")
    if unmeasured:
        notes.append(f"{_counted(unmeasured, 'class', 'classes')} never measured")
    head = ("class", "probability", "odds", "mean loss", "probes", "")
    return _html_table(
        "The classes that explain the picture best", head, rows, "; ".join(notes).capitalize()
    )


def _object_table(found: Detections) -> str:
    boxes = found.xyxy.round().int().tolist()
    rows = [
        (label, _percent(score), *map(str, box))
        for label, score, box in zip(found.labels, found.confidence.tolist(), boxes, strict=True)
    ]
    if not rows:
        return ""
    head = ("object", "confidence", "left", "top", "right", "bottom")
    return _html_table("The objects, in pixels of the picture", head, rows)


def _html_table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> str:
    """A table of texts whose first column names the rows; all others are numbers or short."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    below = f'<p class="note">{escape(note)}.</p>' if note else ""
    return (
        f'<div class="rows" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{below}"
    )


def _percent(p: float) -> str:
    """A probability with as many digits as tell it from 0 and 1."""
    if 0 < p < 0.0005:
        return "< 0.1%"
    if 0.9995 <= p < 1:
        return "> 99.9%"
    return f"{p:.1%}"


def _odds(log_odds: float) -> str:
    """p(y | x0) / p(answer | x0) as "1 : 20"; of odds above 1 "3 : 1"."""
    if log_odds >= 0:
        return f"{_short(math.exp(min(log_odds, 700)))} : 1"
    return f"1 : {_short(math.exp(min(-log_odds, 700)))}"


def _short(x: float) -> str:
    return f"{x:.1e}" if x >= 1e6 else f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _counted(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"
