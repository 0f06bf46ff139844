"""The page itself: what is on it, and what happens when something is pressed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from dive_fast.app import views
from dive_fast.app.asking import ask, sentence, watch_for
from dive_fast.app.options import (
    classes_of,
    hint_of,
    question_about,
    settings_of,
    strategies_of,
    verb_of,
    whole_number,
)
from dive_fast.app.shelf import Entry, Shelf
from dive_fast.app.watch import Watch
from dive_fast.app.where import MOST_PROBES
from dive_fast.errors import DiveFastError
from dive_fast.strategies import Auto

log = logging.getLogger(__name__)

TITLE = "dive_fast"
HEAD = """\
<h1>Which class explains this picture?</h1>
<p>A frozen diffusion model is asked under which condition it predicts the noise in the picture
best. Pictures stay on this server and are removed when it ends.</p>"""
_SHOW_STATUS = "() => document.getElementById('status').scrollIntoView({block: 'nearest'})"
IDLE = views.told("Choose a picture, and ask.")


class Page:
    """All that is on the page.

    Args:
        shelf: the models to choose from; the first one is loaded by now.
        examples: pictures of each model, by its name.
    """

    def __init__(self, shelf: Shelf, examples: Mapping[str, Sequence[str]]) -> None:
        self.shelf = shelf
        self.running: dict[str | None, Watch] = {}  # by session
        first = shelf[shelf.names[0]]
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.HTML(HEAD, padding=False)
            with gr.Row(equal_height=False):
                with gr.Column(min_width=300, scale=4):
                    self._question(first, examples)
                    self._unchecked()
                with gr.Column(min_width=300, scale=5):
                    self._answer(first)
            self._wire()
            blocks.unload(self.leave)
        self.blocks = blocks

    def stop_all(self) -> None:
        """Ends the searches under way."""
        for watch in tuple(self.running.values()):
            watch.stop()

    # -- what is on it -----------------------------------------------------------------------------

    def _question(self, first: Entry, examples: Mapping[str, Sequence[str]]) -> None:
        names = list(self.shelf.names)
        self.model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        about, options = classes_of(first), strategies_of(first)
        self.classes = gr.Textbox(
            "\n".join(about), label="Classes, one a line", lines=3, visible=first.prompted
        )
        self.template = gr.Textbox(
            label="Template",
            info="Makes a prompt of a class, with {} in its place; empty: the model's own.",
            placeholder="a photo of a {}.",
            visible=first.prompted,
        )
        self.picture = gr.Image(
            label="Picture",
            alt_text="The picture that is asked about",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            buttons=[],
            height=260,
            elem_id="picture",
        )
        self.examples = {
            name: gr.Dataset(
                label="Examples",
                components=[gr.Image(label="Example", render=False)],
                samples=[[path] for path in examples.get(name, ())],
                visible=bool(examples.get(name)) and name == names[0],
                samples_per_page=12,
                elem_classes="examples",
            )
            for name in names
        }
        self.strategy = gr.Radio(list(options), value=options[0], label="Strategy")
        self.where = gr.Checkbox(
            True,
            label="Show where",
            info=f"Maps where the answer explains the picture better than the next class; "
            f"that takes evaluations of both on up to {MOST_PROBES} probes more.",
            visible=not first.detects,
        )
        with gr.Row():
            self.go = gr.Button(verb_of(first), variant="primary", min_width=120)
            self.stop = gr.Button("Stop", min_width=120)
        with gr.Accordion("Settings", open=False):
            self.min_agreement = gr.Slider(
                0.5,
                0.999,
                Auto().min_agreement,
                step=0.001,
                label="Agreement",
                info="Share of pictures whose answer is to be that of trying every class.",
                visible="min_agreement" in settings_of(first, options[0]),
            )
            # Texts: gradio's boxes for numbers make 0 of an empty one.
            self.budget = gr.Textbox(
                label="Budget",
                info="Evaluations of the network at most; empty: as many as it takes.",
                visible="budget" in settings_of(first, options[0]),
            )
            self.probes = gr.Textbox(
                label="Probes",
                info="Pairs of timestep and noise; empty: the strategy's own number.",
            )
            self.seed = gr.Textbox("0", label="Seed", info="Of the noise.")
        self.hint = gr.HTML(hint_of(first), padding=False)

    def _unchecked(self) -> None:
        """What is wrong with an input is said here, in one sentence, and not by gradio.

        Of these components alone: for classes of their own gradio writes files beside the source.
        """
        self.picture.preprocess = _sent
        for component in (self.model, self.strategy, self.min_agreement):
            component.preprocess = _given

    def _answer(self, first: Entry) -> None:
        self.status = gr.HTML(IDLE, elem_id="status", padding=False)
        self.bars = gr.Label(
            label="Probabilities", num_top_classes=views.MOST_CLASSES, visible=not first.detects
        )
        self.drawn = gr.Image(
            label="Objects",
            alt_text="The picture with a box around every object; the table lists them",
            interactive=False,
            buttons=["download", "fullscreen"],
            format="png",
            height=400,
            elem_id="drawn",
            visible=first.detects,
        )
        self.table = gr.HTML(padding=False)
        self.map = gr.HTML(padding=False)

    def _wire(self) -> None:
        question = [self.model, self.picture, self.classes, self.template, self.strategy]
        question += [self.min_agreement, self.budget, self.probes, self.seed, self.where]
        answer = [self.status, self.bars, self.drawn, self.table, self.map]
        self.go.click(
            self.ask,
            question,
            answer,
            api_name="ask",
            concurrency_limit=1,
            concurrency_id="models",
            show_progress="hidden",
        )
        # On a narrow screen the answer lies below.
        self.go.click(None, js=_SHOW_STATUS)
        self.stop.click(
            self.stop_own, None, None, api_name="stop", queue=False, show_progress="hidden"
        )
        of_model = [self.hint, self.classes, self.template, self.strategy]
        of_model += [self.min_agreement, self.budget, self.where, self.go]
        of_model += [*answer, *self.examples.values()]
        self.model.change(
            self.choose,
            self.model,
            of_model,
            api_name="choose",
            concurrency_limit=1,
            concurrency_id="models",
        )
        self.strategy.change(
            self.settings_for,
            [self.model, self.strategy],
            [self.min_agreement, self.budget],
            api_name=False,
            queue=False,
            show_progress="hidden",
        )
        for samples in self.examples.values():
            samples.click(
                _only,
                samples,
                self.picture,
                api_name=False,
                queue=False,
                show_progress="hidden",
            )

    # -- what happens ------------------------------------------------------------------------------

    def ask(
        self,
        model: str,
        picture: str | None,
        classes: str = "",
        template: str = "",
        strategy: str | None = None,
        min_agreement: float | None = None,
        budget: str | None = None,
        probes: str | None = None,
        seed: str | None = None,
        where: bool = True,
        request: gr.Request | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Status, bars, drawing, table and map, anew whenever there is something to see."""
        session = getattr(request, "session_hash", None)
        try:
            if not picture:
                raise DiveFastError("expected a picture, got none: drop one, or pick an example.")
            yield views.told("Waiting for the model ...", "running"), None, None, "", ""
            with self.shelf.taken(model) as entry:
                watch = self.running[session] = watch_for(entry)
                if entry.ask_about(classes, template):
                    log.warning("%s was loaded again for other classes.", entry.source)
                most, *numbers = map(
                    whole_number, ("budget", "probes", "seed"), (budget, probes, seed)
                )
                settings = {"min_agreement": min_agreement, "budget": most}
                asked = question_about(entry, picture, strategy, settings, *numbers, where)
                seen = None
                for look in ask(entry, asked, watch):
                    drawn = gr.skip()
                    if look.found is not seen or look.state != "running":
                        seen = look.found
                        drawn = views.drawing(look, entry.predictor.names)
                    told = views.status(look), views.bars(look), drawn, views.table(look)
                    yield *told, views.where(look)
        except Exception as error:
            said = sentence(error, picture)
            yield views.told(said, "error"), None, None, "", ""
            # The page has it by now; this is for those who call the server themselves.
            raise gr.Error(said, visible=False, print_exception=False) from error
        finally:
            self.running.pop(session, None)

    def choose(self, model: str, request: gr.Request) -> list[Any]:
        """Loads another model, and shows what it can be asked."""
        self.stop_own(request)
        try:
            with self.shelf.taken(model) as entry:
                return self._of_model(entry)
        except Exception as error:
            raise gr.Error(escape(sentence(error)), print_exception=False) from error

    def settings_for(self, model: str, strategy: str) -> tuple[Any, Any]:
        """Which settings a strategy has: agreement and budget."""
        known = settings_of(self.shelf[model], strategy)
        return tuple(gr.update(visible=name in known) for name in ("min_agreement", "budget"))

    def stop_own(self, request: gr.Request) -> None:
        """Ends the search of this session, if there is one."""
        watch = self.running.get(request.session_hash)
        if watch is not None:
            watch.stop()

    def leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for the answer."""
        self.stop_own(request)

    def _of_model(self, entry: Entry) -> list[Any]:
        about, options = classes_of(entry), strategies_of(entry)
        known, name = settings_of(entry, options[0]), str(entry.source)
        return [
            hint_of(entry),
            gr.update(visible=entry.prompted, value="\n".join(about)),
            gr.update(visible=entry.prompted),
            gr.update(choices=list(options), value=options[0]),
            gr.update(visible="min_agreement" in known),
            gr.update(visible="budget" in known),
            gr.update(visible=not entry.detects),
            gr.update(value=verb_of(entry)),
            IDLE,
            gr.update(value=None, visible=not entry.detects),
            gr.update(value=None, visible=entry.detects),
            "",
            "",
            *(
                gr.update(visible=other == name and bool(samples.raw_samples))
                for other, samples in self.examples.items()
            ),
        ]


def _sent(payload: Any) -> str | None:
    """The file of a picture as it was sent: the library reads it, and says what is wrong with it.

    Raises:
        gr.Error: it is no file.
    """
    if payload is None:
        return None
    if not payload.path:
        raise gr.Error("expected a file, got none.", print_exception=False)
    return payload.path


def _given(payload: Any) -> Any:
    return payload


def _only(sample: Sequence[str]) -> str:
    """The picture of an example."""
    return sample[0]
