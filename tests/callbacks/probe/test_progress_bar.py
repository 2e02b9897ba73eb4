from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from support import fit, loader

from lightning_gradhist import OptimizerCalibration


class Plain(ProgressBar):
    """A display that knows one bar."""


@pytest.mark.parametrize(
    ("callbacks", "options", "shown", "bar_of_training"),
    [
        pytest.param([], {"enable_progress_bar": True}, ["Calibration:   0%", "4/4"], True, id="Lightning's default"),
        pytest.param([TQDMProgressBar(refresh_rate=0)], {"enable_progress_bar": True}, [], False, id="a silent one"),
        pytest.param(
            [Plain()], {"enable_progress_bar": True}, ["Calibration: a probe of 4 batches"], False, id="another kind"
        ),
        pytest.param([], {}, [], False, id="none"),
    ],
)
def test_progress_is_shown_where_lightning_shows_it(
    tmp_path, capsys, callbacks: Any, options: dict[str, Any], shown: list[str], bar_of_training: bool
) -> None:
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=4)
    made = fit(tmp_path, calibration, *callbacks, data=loader(32), logger=False, **options)
    assert calibration.result.gradients == 4 and made.global_step == 4
    printed = capsys.readouterr().out
    assert [text for text in shown if text not in printed] == []
    assert ("Calibration" in printed) == bool(shown)
    assert ("Epoch 0: 100%" in printed) == bar_of_training
