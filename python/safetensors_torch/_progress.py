"""Runs native loads and saves in steps: between two steps Python handles signals, and reports the progress.

Owns the loop and the meaning of ``progress``. The threads of the native object work during the steps and between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# No progress, a bar of tqdm, or a function of the bytes done and the total.
Progress = bool | Callable[[int, int], Any] | None

# The duration of a step. A signal waits at most this long, and for the reads in progress.
STEP_SECONDS = 0.1


def check_progress(progress: Any) -> Progress:
    """Returns ``progress`` if it is valid.

    Raises:
        TypeError: it is neither None, a bool nor callable.
        ImportError: it is True, and tqdm is not installed.
    """
    if progress is True:
        try:
            import tqdm  # noqa: F401
        except ImportError:
            raise ImportError(
                "progress=True needs tqdm, which is not installed: pip install tqdm, or pass a function of (bytes"
                " done, bytes in all)"
            ) from None
    elif progress is not None and progress is not False and not callable(progress):
        raise TypeError(f"progress must be a bool or a function, not {type(progress).__name__}")
    return progress


class ProgressBar:
    """A progress function that draws a bar if one is wanted and the total is not 0, as in a load that maps the file."""

    def __init__(self, title: str, is_wanted: bool) -> None:
        self._title = title
        self._is_wanted = is_wanted
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and self._is_wanted and total > 0:
            from tqdm.auto import tqdm

            self._bar = tqdm(desc=self._title, total=total, unit="B", unit_scale=True, unit_divisor=1024)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def run(work: Any, progress: Progress, title: str) -> None:
    """Does pending work in steps. If it fails, or is interrupted, it is cancelled.

    Args:
        work: a native object with ``advance``, ``total``, ``done`` and ``cancel``.
        progress: called between steps; an exception from it cancels the work.
        title: the title of a bar.

    Raises:
        The translated errors of the work; KeyboardInterrupt; what ``progress`` raises.
    """
    from ._errors import call  # not above: the shell command draws bars without torch

    with ProgressBar(title, progress is True) as bar:
        report = bar if progress is True else progress
        try:
            while not call(work.advance, STEP_SECONDS):
                if report:
                    report(call(work.done), call(work.total))
            if report:
                report(call(work.total), call(work.total))
        except BaseException:
            work.cancel()
            raise
