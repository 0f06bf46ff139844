"""Serves the page until it is told to end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dive_fast.app.shelf import Shelf
from dive_fast.errors import DiveFastError

LEAST_GRADIO = 6
MOST_BYTES = "100mb"  # of a picture that is sent


def check_gradio() -> None:
    """Raises DiveFastError where gradio is not installed, or too old. It is not imported yet."""
    if importlib.util.find_spec("gradio") is None:
        raise DiveFastError(
            "the page needs gradio, which is not installed: pip install 'dive_fast[app]'."
        )
    found = importlib.metadata.version("gradio")
    if int(found.partition(".")[0]) < LEAST_GRADIO:
        raise DiveFastError(
            f"the page needs gradio {LEAST_GRADIO} or later, got {found}: pip install "
            "'dive_fast[app]'."
        )


def check_address(host: str, port: int) -> None:
    """Raises DiveFastError for an address that cannot be listened at."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as trial:
            # As servers do: a port whose last connections have just ended is free.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiveFastError(f"{host}:{port} cannot be listened at: {reason}.") from error


def serve(
    shelf: Shelf,
    examples: Callable[[Path], dict[str, Sequence[str]]],
    *,
    host: str,
    port: int,
    open_browser: bool = False,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves the page until an interrupt (Ctrl+C) or a SIGTERM; then all pictures are removed.

    Args:
        shelf: the models, the first of which is loaded.
        examples: makes or finds the pictures of each model, in a folder that it may write to.
        host, port: where to listen.
        open_browser: also show the page in the browser of this machine.
        ready: called with the page's address.

    Raises:
        DiveFastError: gradio is not installed, or does not come up at this address.
    """
    check_gradio()
    with tempfile.TemporaryDirectory(prefix="dive_fast-app-") as folder, _ended() as end:
        made = Path(folder) / "examples"
        made.mkdir()
        # Gradio reads both when it is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "sent")
        from dive_fast.app.page import Page
        from dive_fast.app.style import CSS, JS, theme

        page = Page(shelf, examples(made))
        blocks = page.blocks
        try:
            blocks.launch(
                server_name=host,
                server_port=port,
                inbrowser=open_browser,
                share=False,
                prevent_thread_lock=True,
                show_error=True,
                quiet=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                max_file_size=MOST_BYTES,
                theme=theme(),
                css=CSS,
                js=JS,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DiveFastError(f"the page does not come up at {host}:{port}: {error}") from error
        try:
            ready(blocks.local_url)
            end.wait()
        except KeyboardInterrupt:
            pass
        finally:
            page.stop_all()
            # Pages that are open hold connections, which nobody waits for, or wants to hear of.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            blocks.server.force_exit = True
            blocks.close(verbose=False)


@contextlib.contextmanager
def _ended() -> Iterator[threading.Event]:
    """An event that a SIGTERM sets; where signals are another's, it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
