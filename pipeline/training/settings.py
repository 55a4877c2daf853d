"""Devices, precision, parameter groups and learning rates."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

import cv2
import torch
from torch import nn

from pipeline import arithmetic, cards
from pipeline.config.schema import Training
from pipeline.errors import PipelineError
from pipeline.training import distributed, optimizers


def prepare(device: str, threads: int, deterministic: bool = False, slots: int = 1) -> torch.device:
    """Choose the device and configure its arithmetic.

    Args:
        device: 'auto' (a free GPU if there is one, else the CPU), 'cpu', 'cuda' or 'cuda:N'.
        threads: number of CPU threads.
        deterministic: on CUDA, use kernels that give the same bytes in every run, which are slower. An operation
            without such a kernel raises an error (``runtime.deterministic_only``). A CPU has only such kernels.
        slots: number of slots to take on a GPU (``pipeline.cards``).

    Raises:
        PipelineError: the device does not exist.
    """
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU several times and do not affect results
    requested, device = device, cards.choose(device, slots)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise PipelineError(f"--device {device}: no such device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        if requested != "auto":
            raise PipelineError(f"--device {requested}: this torch cannot use the GPU; update its driver, or use cpu")
        print("warning: this torch cannot use the GPU and computes on the CPU; update the GPU's driver", flush=True)
        return torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # else the loader's thread would open a context on card 0
        _configure_cuda(deterministic)
    return chosen


def _configure_cuda(deterministic: bool) -> None:
    """Configure the arithmetic of CUDA. Three options that could be faster keep the defaults of torch:

    * ``cudnn.benchmark`` times all plans of each new shape. OAA's inputs and those of inference have many shapes, and
      a plan that is chosen by its time may be another one when a training goes on.
    * ``set_float32_matmul_precision('high')``: convolutions already use TF32, and networks in bf16, which ``precision:
      auto`` selects on a GPU that has it, multiply in bf16. The rest is kept in fp32 on purpose (AGEN's attention).
    * Fused optimizers refuse a gradient whose strides differ from its weight's, as those of channels-last 1x1
      convolutions may (pytorch issue 126585). By default torch updates all tensors in a few kernels ('foreach').
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    for enable in (  # fused attention adds gradients in any order
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        enable(not deterministic)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_bf16_instructions())


@functools.cache
def _bf16_instructions() -> list[str]:
    """The CPU's instruction sets that multiply bfloat16, the fastest first."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return []
    return [name.upper() for name in ("amx_bf16", "avx512_bf16") if name in flags.split()]


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Whether networks compute in bf16 under this ``precision`` (see ``Training.precision``)."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def describe(device: torch.device, bf16: bool) -> str:
    """Describe this process's arithmetic, e.g. 'bf16 on CPU (AVX512_BF16), 1 thread'; see ``pipeline.arithmetic``."""
    precision = "bf16" if bf16 else "fp32"
    ranks = f", {count} processes" if (count := distributed.processes()) > 1 else ""
    if device.type == "cuda":
        tf32 = torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
        kind = "fp32 (convolutions in TF32)" if tf32 and not bf16 else precision
        return f"{kind} on {torch.cuda.get_device_name(device)}{ranks}"
    instructions = _bf16_instructions() if bf16 else []
    name = instructions[0] if instructions else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{precision} on CPU ({name}), {threads} thread{'s' if threads > 1 else ''}{ranks}"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, enabled according to ``precision``; the arithmetic is recorded (``pipeline.arithmetic``)."""
    bf16 = uses_bf16(device, precision)
    arithmetic.note([describe(device, bf16)])
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def parameter_groups(network: nn.Module, new: Iterable[nn.Module], settings: Training) -> list[dict[str, object]]:
    """Group the trainable parameters into weights and biases of the backbone and of new layers.

    Each group has a ``multiplier`` of the base learning rate: ``lr_bias`` for biases, times ``lr_new`` for new layers.
    The public code of DRS, OAA and DeepLab uses 1, 2, 10 and 20. Weight decay applies to biases only with
    ``decay_biases``.
    """
    added = {id(parameter) for module in new for parameter in module.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in added, name.endswith("bias")), []).append(parameter)
    return [
        {
            "params": parameters,
            "multiplier": (settings.lr_new if is_new else 1.0) * (settings.lr_bias if is_bias else 1.0),
            "weight_decay": settings.weight_decay if settings.decay_biases or not is_bias else 0.0,
        }
        for (is_new, is_bias), parameters in sorted(groups.items())
    ]


def build_optimizer(groups: list[dict[str, object]], settings: Training) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return optimizers.Adam(groups, lr=settings.lr)
    return optimizers.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)


def learning_rate(settings: Training, step: int, steps_per_epoch: int, steps: int) -> float:
    """The base learning rate of optimizer step ``step`` (0-based) of ``steps``.

    Schedule 'step' multiplies the rate by ``gamma`` from each milestone on. Milestones are epochs, or steps if
    ``settings.iterations`` is set. Schedule 'poly' is (1 - step / steps) ** power (DeepLab-v2). Every ``hold``
    consecutive steps share the rate of the first of them, also during warmup.

    During warmup, the rate of step n is multiplied by s + (1 - s) (n + 1) / ``warmup``, where s is ``warmup_start``.
    The first factor is thus one increment above s, and the last is 1.
    """
    step -= step % settings.hold
    factor = 1.0
    if settings.schedule == "poly":
        factor = (1 - step / steps) ** settings.power
    elif settings.schedule == "step":
        at = step if settings.iterations is not None else step // steps_per_epoch
        factor = settings.gamma ** sum(at >= milestone for milestone in settings.milestones)
    if step < settings.warmup:
        start = settings.warmup_start
        factor *= start + (1 - start) * (step + 1) / settings.warmup
    return settings.lr * factor
