"""The command line, ``dive-fast``: parses arguments and turns errors into one sentence."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from dive_fast import __version__
from dive_fast.core.threads import spin_shortly
from dive_fast.errors import DiveFastError

DESCRIPTION = """\
Frozen conditional diffusion models as classifiers and detectors.

Asks a pretrained diffusion model which condition best explains an image: by trying every class
(enumerate) or by optimising the condition (invert)."""

EXAMPLES = """\
examples:
  dive-fast classify photo.png --model digits
  dive-fast classify photo.png --model stable-diffusion-v1-5/stable-diffusion-v1-5 --classes cat,dog
  dive-fast classify scans/ --model facebook/DiT-XL-2-256 --top 5 --json
  dive-fast explain photo.png --model digits --against five --out maps
  dive-fast evaluate --model digits --data digits --strategy invert --out runs/invert
  dive-fast detect photo.png --model DIR --out runs/found
  dive-fast convert layout2img.ckpt --out DIR
  dive-fast app --model digits --model scenes
  dive-fast info"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    # Each command's module imports torch only when the command runs, so that --help is quick.
    from dive_fast.cli import (
        app,
        choose,
        classify,
        compare,
        compare_runs,
        convert,
        demo,
        detect,
        diagnose,
        evaluate,
        explain,
        fit,
        info,
        likelihood,
        merge,
        probe,
        report,
        score,
        segment,
        tasks,
        train,
        train_classes,
        train_layout,
        train_prior,
    )

    parser = _Parser(
        prog="dive-fast",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dive-fast {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    groups = (
        (classify, explain, likelihood, detect, segment, app),
        (score, choose, tasks),
        (evaluate, merge, compare_runs, compare, report),
        (fit, diagnose, probe),
        (train, train_classes, train_layout, train_prior),
        (convert, demo, info),
    )
    for module in (command for group in groups for command in group):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after bad input, or 130 after an interrupt."""
    with _every_text_printable():
        options = build_parser().parse_args(arguments)
        # The threads of a process that computes already are its caller's.
        options.own_process = "torch" not in sys.modules
        if options.own_process:
            spin_shortly()
        _hush()
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        with _told():
            code = options.run(options)
        # What is still buffered is written here, where a failure can be told.
        print(end="", flush=True)  # there may be no stdout
        return code
    except DiveFastError as error:
        print(f"dive-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dive-fast: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has left
        _flush_or_discard()
        return 0
    except OSError as error:
        _flush_or_discard()
        subject = error.filename or "the output cannot be written"
        print(f"dive-fast: {subject}: {error.strerror or error}.", file=sys.stderr)
        return 2


class _Teller(logging.Handler):
    """Prints what the library warns of as a sentence on stderr, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"dive-fast: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def _every_text_printable() -> Iterator[None]:
    """What a stream's encoding lacks is printed as an escape: file names may be any bytes.

    Names that are not UTF-8 would otherwise end a command when they are printed, and so would any
    letter but ASCII where the locale is C.
    """
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [(stream, stream.errors) for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            # It writes what is still buffered, and whoever reads may have left.
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """As long as a command runs; who calls the library alone has handlers of his own."""
    log, teller = logging.getLogger("dive_fast"), _Teller()

    def show(message: Warning | str, *where: object) -> None:
        """A Python warning, of whatever library, without the place in its sources."""
        log.warning(" ".join(str(message).split()))

    log.addHandler(teller)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        log.removeHandler(teller)


def _hush() -> None:
    """No bars and no remarks of other libraries, who read this when they are loaded."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def _flush_or_discard() -> None:
    """Writes what is still buffered, or throws it away: python would fail on it again at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        with contextlib.suppress(OSError):  # a stdout that is no file needs nothing more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
