"""What ``dive-fast app`` refuses before it serves anything."""

from __future__ import annotations

import socket
import sys

import pytest
from command import assert_refused, call, words

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'dive_fast[app]'")


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "expected a port from 1 to 65535, got '0'"),
        (["--port", "65536"], "expected a port from 1 to 65535, got '65536'"),
        (["--port", "http"], "expected a port from 1 to 65535, got 'http'"),
        (["--host", "no such host"], "no such host:7860 cannot be listened at: "),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "digits", "--model", "digits"], "every model once, got 'digits' more than"),
        (["--model", "digits", "--classes", "a,b"], "--classes is for text-conditional models"),
        (["--model", "scenes", "--average", "loss"], "--average is for classifiers, got 'scenes'"),
        (["--model", "digits", "--prior", "none"], "--prior is for detectors, got 'digits'"),
        (["--model", "digits", "--model", "mnist", "--fitted", "D"], "--fitted is for one model"),
        (["--dtype", "float8"], "expected a dtype of float32"),
        (["--examples", "nowhere.png"], "nowhere.png"),
    ],
    ids=words,
)
def test_bad_commands(capsys, arguments, message) -> None:
    if "--port" not in arguments and "--host" not in arguments:
        arguments = [*arguments, "--port", str(free_port())]
    assert_refused(call(capsys, "app", *arguments), message)


def test_a_port_in_use(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = call(capsys, "app", "--port", port)
    assert_refused(said, f"127.0.0.1:{port} cannot be listened at: Address already in use")


def test_without_gradio(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(call(capsys, "app"), r"pip install 'dive_fast\[app\]'")


def test_with_an_old_gradio(capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.49.1")
    assert_refused(call(capsys, "app"), r"needs gradio 6 or later, got 5\.49\.1")
