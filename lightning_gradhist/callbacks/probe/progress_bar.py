"""How far the probe has come, where Lightning shows how far training has."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from lightning_gradhist.callbacks._lightning import Trainer, is_a


@contextmanager
def progress(trainer: Trainer, batches: int) -> Generator[Callable[[], Any], None, None]:
    """A bar under Lightning's own while it lasts, to be moved by calling what it gives.

    It is the bar of the trainer's ``TQDMProgressBar``, so it is silent, and looks, as that one. Another kind of progress
    bar, which owns the whole display, prints one line. Without a progress bar there is nothing.
    """
    display: Any = trainer.progress_bar_callback
    if not is_a(display, "TQDMProgressBar"):
        if display is not None and trainer.is_global_zero:
            display.print(f"Calibration: a probe of {batches} batches")
        yield lambda: None
        return
    bar = display.init_validation_tqdm()  # at its place below the bar of training, and gone when it is closed
    try:
        bar.set_description("Calibration", refresh=False)
        bar.reset(batches)
        yield bar.update
    finally:
        bar.close()
