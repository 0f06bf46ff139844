"""What a network of a configuration raises, in one sentence that names the model.

A configuration can be such that everything is built and filled, and the first forward fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models.files.reading import first_line


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Lets through what is a sentence already, and what a smaller batch may mend.

    Raises:
        ModelError: something else went wrong inside.
    """
    try:
        yield
    except (DiveFastError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a network meets in its configuration
        # The CPU's allocator and older devices raise a plain RuntimeError.
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ModelError(
            f"the model {model} cannot be computed, as if its configuration were another's: "
            f"{first_line(error)}"
        ) from error
