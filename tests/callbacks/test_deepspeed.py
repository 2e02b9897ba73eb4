"""Variants of ZeRO whose gradients cannot be told apart, without DeepSpeed; what it does is in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gradhist.callbacks._deepspeed import is_told_apart, is_zero, unwrapped


def zero(name: str = "DeepSpeedZeroOptimizer", inner: str = "AdamW", **attributes: Any) -> Any:
    return type(name, (), {"optimizer": type(inner, (), {})(), "partition_count": [2, 2], **attributes})()


def told_apart(optimizer: Any) -> bool:
    return is_told_apart(SimpleNamespace(optimizers=[optimizer], world_size=2))  # type: ignore[arg-type]


def test_a_partition_on_all_ranks_is_told_apart() -> None:
    assert told_apart(zero())


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(zero(partition_count=[2, 1]), id="experts, which are on some ranks"),
        pytest.param(zero(swap_optimizer=True), id="NVMe"),
        pytest.param(zero(inner="MuonWithAuxAdam"), id="Muon"),
        pytest.param(zero("ZenFlowZeroOptimizer"), id="ZenFlow"),
        pytest.param(zero("SuperOffloadOptimizer_Stage3"), id="SuperOffload"),
        pytest.param(zero("BF16_Optimizer"), id="bf16 with sums in fp32"),
    ],
)
def test_other_variants_of_zero_are_not(variant: Any) -> None:
    assert not told_apart(variant)


def test_only_zero_itself_is_looked_into() -> None:
    one, other = zero(), zero("BF16_Optimizer")
    assert is_zero(one) and unwrapped(one) is one.optimizer
    assert not is_zero(other) and unwrapped(other) is other
