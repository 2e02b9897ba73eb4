from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import Batches, Net, fit, loader, trainer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_gradhist import ALTO, AdamE, OptimizerCalibration
from lightning_gradhist.callbacks.handoff import apply_changes, holds_before
from lightning_gradhist.report.result import GroupChange

pytestmark = pytest.mark.filterwarnings("ignore:GradientHistogramMonitor has no logger")


def scaled(folder: Any, names: list[str], optimizer: Any, scheduler: Any = None, **options: Any) -> Any:
    """From 1 to 16 samples, the rate by the square root."""
    given = {"reference_batch_size": 1, "epsilon": "keep", "learning_rate": "sqrt", **options}
    calibration = OptimizerCalibration(**given, scale_with_batch=names)
    made = fit(folder, calibration, module=Net(optimizer, scheduler), data=loader(16), max_steps=2, logger=False)
    return calibration.result, made.optimizers[0].param_groups[0]


@pytest.mark.parametrize(
    ("make", "betas"),
    [
        pytest.param(torch.optim.Adam, (0.9, 0.999), id="Adam"),
        pytest.param(torch.optim.AdamW, (0.9, 0.999), id="AdamW"),
        pytest.param(AdamE, (0.9, 0.999), id="AdamE"),
        pytest.param(ALTO, (0.9, 0.99), id="ALTO"),
    ],
)
def test_the_second_beta_alone_is_scaled(tmp_path, make: Any, betas: tuple[float, float]) -> None:
    result, group = scaled(tmp_path, ["betas"], lambda parameters: make(parameters, lr=1e-2, betas=betas))
    assert group["betas"] == (0.9, pytest.approx(betas[1] ** 16))
    assert GroupChange(0, "beta2", betas[1], betas[1] ** 16) in result.changes
    assert "beta2 (group 0)" in result.to_text()


def test_the_schedule_of_momentum_leaves_the_second_beta(tmp_path) -> None:
    _, group = scaled(
        tmp_path, ["betas"], lambda p: torch.optim.Adam(p, lr=1e-2), lambda o: OneCycleLR(o, 1e-2, total_steps=99)
    )
    assert group["betas"][0] != 0.9 and group["betas"][1] == pytest.approx(0.999**16)


@pytest.mark.parametrize(
    ("make", "after"),
    [
        pytest.param(torch.optim.AdamW, 0.4, id="AdamW"),
        pytest.param(ALTO, 0.4, id="ALTO"),
        pytest.param(AdamE, 0.4, id="AdamE"),
        pytest.param(torch.optim.Adafactor, 0.4, id="Adafactor"),
        pytest.param(torch.optim.Adam, 0.1, id="Adam"),
        pytest.param(torch.optim.SGD, 0.1, id="SGD"),
    ],
)
def test_decoupled_weight_decay_goes_with_batch_and_rate(tmp_path, make: Any, after: float) -> None:
    result, group = scaled(tmp_path, ["weight_decay"], lambda p: make(p, lr=1e-2, weight_decay=0.1))
    assert result.ratio == 4 and group["weight_decay"] == pytest.approx(after)
    assert any("adds it to the gradient" in reason for reason in result.reasons) == (after == 0.1)


@pytest.mark.parametrize(
    ("dtype", "after"), [pytest.param("32-true", 2.5e-8, id="float32"), pytest.param("16-true", 1e-7, id="float16")]
)
def test_epsilon_goes_with_the_root_and_stays_what_the_dtype_holds(tmp_path, dtype: str, after: float) -> None:
    calibration = OptimizerCalibration(16, epsilon="keep", learning_rate="keep", scale_with_batch=["eps"])
    module = Net(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-7))
    module.body = torch.nn.Sequential(torch.nn.Linear(8, 16))
    fit(tmp_path, calibration, module=module, data=loader(256, samples=256), precision=dtype, logger=False)
    assert calibration.result.epsilon == pytest.approx(after)
    assert module.optimizers().param_groups[0]["eps"] == pytest.approx(after)


def test_all_three_are_in_the_report_and_a_second_fit_has_them(tmp_path) -> None:
    calibration = OptimizerCalibration(
        1, epsilon="keep", learning_rate="sqrt", scale_with_batch=["betas", "weight_decay", "eps"]
    )
    made = fit(tmp_path, calibration, module=Net, data=loader(16), logger=False)
    names = {name for name, _ in calibration.result.rows()}
    assert {"beta2 (group 0)", "weight_decay (group 0)", "eps (group 0)", "lr (group 0)"} <= names
    once = {key: value for key, value in made.optimizers[0].param_groups[0].items() if key != "params"}
    made.fit_loop.max_epochs = 2
    made.fit(made.lightning_module, loader(16))  # Lightning makes the optimizer anew
    again = made.optimizers[0].param_groups[0]
    assert {key: again[key] for key in once} == once
    assert once["betas"] == (0.9, pytest.approx(0.999**16)) and once["eps"] == pytest.approx(2.5e-9)


def test_a_second_fit_after_a_resumed_one_has_them_too(tmp_path) -> None:
    def made() -> Any:
        return OptimizerCalibration(1, epsilon="keep", learning_rate="sqrt", scale_with_batch=["betas"])

    fit(tmp_path, made(), module=Net, data=loader(16), logger=False).save_checkpoint(tmp_path / "one.ckpt")
    resumed = trainer(tmp_path, made(), max_epochs=2, logger=False)
    resumed.fit(Net(), loader(16), ckpt_path=tmp_path / "one.ckpt")
    group = resumed.optimizers[0].param_groups[0]
    assert (group["lr"], group["betas"]) == (pytest.approx(4e-2), (0.9, pytest.approx(0.999**16)))
    resumed.fit_loop.max_epochs = 3
    resumed.fit(resumed.lightning_module, loader(16))  # Lightning makes the optimizer anew
    again = resumed.optimizers[0].param_groups[0]
    assert again is not group and (again["lr"], again["betas"]) == (group["lr"], group["betas"])


def test_nothing_is_scaled_where_the_batch_size_is_not_known(tmp_path) -> None:
    calibration = OptimizerCalibration(1, epsilon="keep", learning_rate="keep", scale_with_batch=["betas"])
    with pytest.warns(UserWarning, match="so nothing is scaled with it"):
        made = fit(tmp_path, calibration, module=Net, data=Batches(16), logger=False)
    assert made.optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)


def test_beta2_is_written_beside_the_first() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], betas=(0.8, 0.99))
    change = GroupChange(0, "beta2", 0.99, 0.9)
    assert holds_before(optimizer, change)
    apply_changes(optimizer, [], [change])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and not holds_before(optimizer, change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_with_batch": ["beta"]}, r"some of \('betas', 'weight_decay', 'eps'\), got 'beta'"),
        ({"scale_with_batch": "betas"}, "must be a list of some of .*, got 'betas'"),
        ({"reference_batch_size": None}, "scale_with_batch needs the batch size at which"),
        ({"scale_with_batch": ["eps"]}, "epsilon='auto' contradict each other"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        OptimizerCalibration(**{"reference_batch_size": 8, "scale_with_batch": ["betas"], **options})


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("betas", torch.optim.SGD, "group 0 of SGD is not known to have betas"),
        ("betas", torch.optim.RMSprop, "group 0 of RMSprop is not known to have betas"),
        ("betas", torch.optim.Adamax, "group 0 of Adamax is not known to have betas"),
        ("eps", torch.optim.Adadelta, "group 0 of Adadelta is not known to have an eps of Adam's kind"),
        ("weight_decay", torch.optim.Rprop, "group 0 of Rprop is not known to have a weight_decay"),
    ],
)
def test_an_optimizer_without_it_is_named(tmp_path, name: str, make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        scaled(tmp_path, [name], lambda parameters: make(parameters, lr=1e-2))
