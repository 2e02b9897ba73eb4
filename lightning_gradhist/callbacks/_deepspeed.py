"""What DeepSpeed's ZeRO has made of optimizer and parameters; the one place that reads its attributes.

DeepSpeed's public functions (``safe_get_full_grad`` and others) gather whole tensors over the ranks. A count needs no more
than what this rank has, and in stages 1 and 2 there is no public way to that. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhist._flat import FlatPiece
from lightning_gradhist.callbacks._lightning import Trainer, is_a

_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
_ZERO = ("DeepSpeedZeroOptimizer", _STAGE_3)  # stages 1 and 2 share a class


@dataclass(frozen=True)
class Slot:
    """Where this rank's part of a parameter lies in the long tensor that ZeRO has put into the optimizer."""

    flat: Tensor  # that tensor: weights, in fp32
    start: int  # of the part
    size: int  # of the part, without padding; 0 where other ranks have the whole parameter
    group: int  # index of the parameter group that it is stepped in; within a step ZeRO has taken out the others

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is laid out as the long one."""
        return tensor.detach().reshape(-1).narrow(0, self.start, self.size)


def is_deepspeed(trainer: Trainer) -> bool:
    return is_a(trainer.strategy, "DeepSpeedStrategy")


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is ZeRO's own, of stage 1, 2 or 3, around one of the user's; variants of it are not known."""
    return type(optimizer).__name__ in _ZERO


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that ZeRO steps with on this rank; any other as it is."""
    return optimizer.optimizer if is_zero(optimizer) else optimizer


def grouped_parameters(optimizer: Any) -> list[list[nn.Parameter]]:
    """The module's parameters that an optimizer steps, in the order of its groups; ZeRO has other tensors in these."""
    if is_zero(optimizer):
        return list(optimizer.fp16_groups if _is_stage_3(optimizer) else optimizer.bit16_groups)
    return [group["params"] for group in optimizer.param_groups]


def is_told_apart(trainer: Trainer) -> bool:
    """Whether each value of a gradient is on one rank alone, in memory, where it can be read."""
    optimizer: Any = trainer.optimizers[0] if trainer.optimizers else None
    if not is_zero(optimizer) or getattr(optimizer, "swap_optimizer", False):  # which has it on a disk
        return False
    if "muon" in type(optimizer.optimizer).__name__.lower():  # of which ZeRO keeps the update in the gradient's place
        return False
    return all(ranks == trainer.world_size for ranks in _ranks(optimizer))  # experts are on some ranks


def zero_pieces(trainer: Trainer) -> dict[int, FlatPiece]:
    """The parameters that ZeRO has cut up, by ``id``: those of the optimizer, in stage 3 all."""
    optimizer = trainer.optimizers[0]
    found = [parameter for group in grouped_parameters(optimizer) for parameter in group]
    if _is_stage_3(optimizer):
        found = list(trainer.lightning_module.parameters())
    return {id(p): FlatPiece(getattr(p, "ds_shape", p.shape), None, None) for p in found}


def zero_gradients(trainer: Trainer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """This rank's flat part of each gradient, as backward left it, under the loss scale; without a collective."""
    optimizer: Any = trainer.optimizers[0]
    device = trainer.lightning_module.device
    if getattr(optimizer, "cpu_offload", False) and device.type == "cuda":
        torch.cuda.synchronize(device)  # copies to the host may still be on their way
    found = {name: _gradient(optimizer, parameter) for name, parameter in parameters.items()}
    return {name: gradient.to(device) for name, gradient in found.items() if gradient is not None}


def zero_slots(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Where this rank's part of each parameter is."""
    if _is_stage_3(optimizer):
        return {name: _slot_of_stage_3(optimizer, parameter) for name, parameter in parameters.items()}
    groups = {id(p): index for index, group in enumerate(optimizer.bit16_groups) for p in group}
    return {name: _slot(optimizer, groups[id(p)], getattr(p, "_hp_mapping", None)) for name, p in parameters.items()}


def ends_accumulation(trainer: Trainer) -> bool:
    """Whether the step that Lightning announces is one: to DeepSpeed it announces each micro-batch."""
    return not is_deepspeed(trainer) or bool(trainer.strategy.model.is_gradient_accumulation_boundary())  # type: ignore


def zero_loss_scale(trainer: Trainer) -> float | None:
    """The factor of the loss under ZeRO in fp16; None where there is none."""
    if not is_deepspeed(trainer) or not trainer.optimizers:
        return None
    optimizer: Any = trainer.optimizers[0]
    return float(optimizer.loss_scale) if is_zero(optimizer) and optimizer.dtype == torch.float16 else None


def cuts_weights_up(trainer: Trainer) -> bool:
    """Whether ZeRO leaves ranks parts of the weights, too: in stage 3."""
    return is_deepspeed(trainer) and _is_stage_3(trainer.optimizers[0])


def _is_stage_3(optimizer: Any) -> bool:
    return type(optimizer).__name__ == _STAGE_3


def _ranks(optimizer: Any) -> list[int]:
    """How many ranks each group of parameters is spread over."""
    if not _is_stage_3(optimizer):
        return list(optimizer.partition_count)
    groups = {p.ds_process_group for group in optimizer.fp16_groups for p in group}
    return [torch.distributed.get_world_size(group) for group in groups]


def _gradient(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    if _is_stage_3(optimizer):
        gradient = optimizer.get_local_fp32_grad_for_param(parameter)
        return None if gradient is None else gradient.reshape(-1)[: _size(parameter)]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return parameter.new_empty(0)
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).detach().reshape(-1)  # type: ignore[attr-defined]
    if gradient.numel() != mapping.get_hp_fragment_address().numel:
        raise RuntimeError(
            f"ZeRO has {gradient.numel()} values of a gradient where this rank steps"
            f" {mapping.get_hp_fragment_address().numel}; this version of DeepSpeed is not known"
        )
    return gradient


def _size(parameter: Any) -> int:
    """Values of a parameter that this rank has in stage 3, where all have as many, and the last ones padding."""
    first = parameter.partition_numel() * torch.distributed.get_rank(parameter.ds_process_group)
    return max(0, min(parameter.partition_numel(), parameter.ds_numel - first))


def _slot_of_stage_3(optimizer: Any, parameter: Tensor) -> Slot:
    index, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat, group = optimizer.fp32_partitioned_groups_flat[index], optimizer.sub_group_to_group_id[index]
    return Slot(flat, start, _size(parameter), group)


def _slot(optimizer: Any, group: int, mapping: Any) -> Slot:
    flat = optimizer.single_partition_of_fp32_groups[group]
    address = mapping.get_hp_fragment_address() if mapping is not None else None
    return Slot(flat, 0, 0, group) if address is None else Slot(flat, address.start, address.numel, group)
