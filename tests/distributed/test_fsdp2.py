from __future__ import annotations

import pytest
import torch
from rank_jobs import run_ranks
from shard_jobs import OPTIMIZERS, flat, loaded, model, saved, train, trajectories, unused, whole

from lightning_gradhist import ALTO


@pytest.mark.parametrize("ranks", [pytest.param(2, id="two ranks"), pytest.param(3, id="three ranks")])
def test_sharded_is_one_process(tmp_path, ranks: int) -> None:
    found = run_ranks(trajectories, ranks, tmp_path)
    for name, make in OPTIMIZERS.items():
        module = model()
        optimizer = make(module.parameters())
        train(module, optimizer, range(12))
        optimizer.step()
        expected = whole(module)
        for weights, calls, same_placement, _ in (of_rank[name] for of_rank in found):
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
            assert calls == ([2 * len(expected)] if name == "ALTO" else [])  # one collective, for all layer norms
            assert same_placement
    assert sum(of_rank["ALTO"][3] for of_rank in found) > 0, "no shard was empty"


def test_a_rank_without_a_gradient_still_joins_the_collective(tmp_path) -> None:
    assert run_ranks(unused, 2, tmp_path) == [True, True]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path) -> None:
    expected = run_ranks(saved, 2, tmp_path)[0]
    for weights in run_ranks(loaded, 3, tmp_path):
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_the_flat_parameters_of_fsdp1_are_refused(tmp_path) -> None:
    for found in run_ranks(flat, 2, tmp_path):
        for message in found.values():
            assert "FSDP1" in message and "layerwise=False" in message and "fully_shard" in message


def test_the_partitions_of_zero_are_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    param.ds_id = 0
    with pytest.raises(TypeError, match="ALTO needs the norm of each layer.*DeepSpeed ZeRO"):
        ALTO([param])
    optimizer = ALTO([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match="DeepSpeed ZeRO"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1
