"""From ``log_to`` to a logger that no run fails with."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import numbers
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dive_fast.errors import DiveFastError, RunError, shown
from dive_fast.logs.protocol import Logger, LogTo
from dive_fast.logs.services import LOGGERS, Sitting

log = logging.getLogger(__name__)


def check_log_to(log_to: object) -> LogTo | None:
    """What names a logger, if it is one and its library is there; nothing is imported.

    Args:
        log_to: a name of ``LOGGERS``, also with a target behind a colon ("tensorboard:DIR",
            "wandb:PROJECT", "trackio:PROJECT"); an object with the methods of ``Logger``; or None.

    Raises:
        DiveFastError: it is none of them, or needs a package that is not installed.
    """
    if log_to is None or (isinstance(log_to, Logger) and not isinstance(log_to, type)):
        return log_to
    name, colon, target = log_to.partition(":") if isinstance(log_to, str) else ("", "", "")
    if name not in LOGGERS or (colon and not target.strip()):
        known = ", ".join(f"{each} or {each}:{LOGGERS[each].target}" for each in LOGGERS)
        raise DiveFastError(f"expected to log to {known}, got {shown(log_to)}.")
    if not _installed(name):
        raise DiveFastError(
            f"logging to {name} needs {name}, which is not installed: "
            f"pip install 'dive_fast[{name}]'."
        )
    return log_to


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules without a spec, or as None
        return sys.modules[package] is not None


@contextlib.contextmanager
def logging_to(
    log_to: LogTo | None, out: Path, config: Mapping[str, Any], step: int
) -> Iterator[Logger]:
    """A logger for one sitting of a run; it is finished at the end, if it was not before.

    What fails in it later than at its opening is warned of once, and nothing more is logged.

    Args:
        log_to: as ``check_log_to`` takes it; with None nothing is logged.
        out: the directory of the run.
        config: what the run is about, for JSON.
        step: where it goes on; 0 at the start.

    Raises:
        DiveFastError: as ``check_log_to`` does.
        RunError: it cannot be opened.
    """
    logger = _Forgiving(*_opened(log_to, out, config, step))
    try:
        yield logger
    finally:
        logger.finish(None)


def _opened(
    log_to: LogTo | None, out: Path, config: Mapping[str, Any], step: int
) -> tuple[str, Logger | None]:
    """What a sentence calls it, and the logger."""
    if check_log_to(log_to) is None:
        return "nothing", None
    if not isinstance(log_to, str):
        return type(log_to).__name__, log_to
    name, _, target = log_to.partition(":")
    try:
        # Tuples, paths and the like as every service can take them.
        plain = json.loads(json.dumps(config, default=str))
        sitting = Sitting(out, plain, step, target or None)
        return name, LOGGERS[name](sitting)
    except Exception as error:  # each library raises its own kinds
        raise RunError(f"logging to {name} cannot begin: {_first_line(error)}") from error


class _Forgiving:
    """Hands on until it fails; then it says so, once, and the run goes on without a log."""

    def __init__(self, name: str, logger: Logger | None) -> None:
        self._name, self._logger = name, logger

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        with self._forgiven():
            if self._logger is not None and (known := _numbers(figures)):
                self._logger.log(step, known)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        with self._forgiven():
            logger, self._logger = self._logger, None
            if logger is not None:
                logger.finish(None if summary is None else _numbers(summary))

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a network that is gone: none is worth a run
            self._logger = None
            log.warning(
                "logging to %s failed and ends here, the run goes on: %s",
                self._name,
                _first_line(error),
            )


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those that can be drawn: what is None, no number or a table of its own stays out."""
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, numbers.Real) and math.isfinite(value)
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{(lines[0] if lines else type(error).__name__).rstrip('.')}."
