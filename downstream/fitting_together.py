"""Whether the files of a saved detector, each of them whole, belong together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def put_together(folder: Path) -> Iterator[None]:
    """Names the folder where options, tensors and features of a saved detector do not fit together: a ValueError.

    Every file can be whole and yet contradict another. What then breaks, and how, is the detector's own matter: the
    first use would fail with an error about shapes, far from the cause.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{folder}: the detector's options, tensors and features do not fit together ({type(error).__name__}: "
            f"{reason}): fit it again"
        ) from error


def part(folder: Path, name: str) -> Path:
    """A model inside a model. Raises ValueError for a link, which could lead back to the folder itself."""
    if (folder / name).is_symlink():
        raise ValueError(f"{folder / name} is a link: a saved model holds copies of its parts")
    return folder / name
