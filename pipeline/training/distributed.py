"""Training in several processes (``pipeline.ranks``), each of which computes a part of every batch.

Two processes with 4 images each compute what one process computes with 8: all that depends on a whole batch is computed
over the parts of all ranks. These are

* the gradient, which is summed over the ranks once per optimizer step;
* a loss that is a mean over anything but images, such as labelled pixels: it must use ``ratio``;
* the mean and variance of a batch norm in training mode;
* the numbers that dropout draws: each rank draws them for the whole batch, so that all generators agree.

The results differ from those of one process by rounding alone, since sums have another order. All ranks have the same
state after each optimizer step, so that one checkpoint, which rank 0 writes, serves all. The order of sums is always
the same, also after the training was resumed. DistributedDataParallel is not used: it arranges the sums anew after its
first step, and it calls only ``forward`` of a network, while a method's loss may use any of its methods.

In a training of one process, each function returns its argument.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.nn import functional

from pipeline import ranks
from pipeline.errors import PipelineError

BUCKET = 32 << 20  # bytes of gradients that are summed at once


@dataclass(frozen=True)
class _Part:
    """This rank's part of the current batch."""

    size: int  # images of the whole batch
    start: int
    length: int  # images that this rank computes
    counts: bool  # false: they are the part of another rank, since this rank has none, and must have no effect

    @property
    def share(self) -> float:
        """This rank's share of the images of the batch."""
        return self.length / self.size if self.counts else 0.0


_part: _Part | None = None
_count = 1  # processes that are connected


def processes() -> int:
    """The number of processes of this training."""
    return _count


@contextmanager
def connected(device: torch.device) -> Iterator[None]:
    """Connect the ranks of a training for the duration of the block."""
    global _count
    place = ranks.place()
    if place.count == 1:
        yield
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listener = None if place.listener is None else place.listener.detach()
    store = TCPStore(
        "127.0.0.1",
        place.port,
        place.count,
        is_master=place.rank == 0,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count)
    _count = place.count
    functional.batch_norm = _batch_norm  # type: ignore[assignment]
    try:
        yield
        agreed(False)  # none leaves while another still needs it
        dist.destroy_process_group()
    except BaseException:
        if not on_gpu:  # a GPU would wait for the other ranks; the process ends anyway
            dist.destroy_process_group()
        raise
    finally:
        _count = 1
        functional.batch_norm = _batch_norm_alone


@contextmanager
def batch(size: int, unit: int, shape: Sequence[int]) -> Iterator[bool]:
    """Compute this rank's part of a batch in the block; yield whether it counts.

    Args:
        size: images of the whole batch.
        unit: consecutive images that one rank computes together.
        shape: height and width of this rank's images.

    Raises:
        PipelineError: the images of the ranks differ in size.
    """
    global _part
    if _count == 1:
        yield True
        return
    place = ranks.place()
    mine, loaded = place.part(size, unit), place.loaded(size, unit)
    _part = _Part(size, loaded.start, loaded.stop - loaded.start, mine.start < mine.stop)
    extent = torch.tensor([*shape, *(-side for side in shape)])
    dist.all_reduce(extent, dist.ReduceOp.MAX)
    if (extent[: len(extent) // 2] != -extent[len(extent) // 2 :]).any():
        raise PipelineError(
            "augmentation: the images of a batch differ in size; set crop, side: square, or training.processes: 1"
        )
    try:
        yield _part.counts
    finally:
        _part = None


def images(length: int) -> int:
    """The number of images of the whole batch, of which this rank has ``length``."""
    return length if _part is None else length * _part.size // _part.length


def total(value: Tensor) -> Tensor:
    """Sum a tensor without gradient over all ranks; in place."""
    if _count > 1:
        dist.all_reduce(value)
    return value


def weighted(loss: Tensor) -> Tensor:
    """Weight this rank's mean over images so that the sum over the ranks is the mean over the whole batch."""
    return loss if _part is None else loss * _part.share


def mean(value: Tensor) -> Tensor:
    """The mean over the whole batch of a value without gradient that is this rank's mean over images."""
    return value if _part is None else total(weighted(value))


def ratio(numerator: Tensor, count: Tensor) -> Tensor:
    """``numerator`` / max(1, ``count``), for a loss that is averaged over ``count`` items of the batch.

    Among several ranks, the mean of the ranks' ratios, weighted by their numbers of images as any loss is, equals the
    sum of the numerators divided by the sum of the counts.
    """
    if _part is None:
        return numerator / count.clamp_min(1)
    counts = total(count.detach() * int(_part.counts))
    return numerator / counts.clamp_min(1) / (_part.share or 1)


def agreed(asked: bool) -> bool:
    """Whether any rank asks for it."""
    if _count == 1:
        return asked
    flag = torch.tensor(int(asked))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def sum_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Sum the gradients over all ranks, in an order that does not depend on the step."""
    if _count == 1:
        return
    parameters: list[nn.Parameter] = [each for group in optimizer.param_groups for each in group["params"]]
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter, has_gradient in zip(parameters, present.tolist(), strict=True):
        if has_gradient:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= BUCKET:
                _sum_bucket(bucket)
                bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: Sequence[nn.Parameter]) -> None:
    gradients = [cast(Tensor, parameter.grad) for parameter in bucket]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, values in zip(gradients, torch.split(flat, [each.numel() for each in gradients]), strict=True):
        gradient.copy_(values.view(gradient.shape))


def prepare(network: nn.Module) -> None:
    """Give all ranks the same network, whose dropouts are those of the whole batch."""
    if _count == 1:
        return
    for tensor in network.state_dict().values():
        dist.broadcast(tensor, 0)
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.forward = partial(_dropout, module, module.forward)


def _dropout(module: Any, alone: Any, x: Tensor) -> Tensor:
    """Apply this rank's part of the mask of the whole batch.

    The dimension of ``x`` along which the images lie is ``module.images``, or else the first. If the whole batch does
    not fit into it in proportion, the rank draws for itself (``Loop`` then aligns the generators).
    """
    if _part is None or not module.training or module.p == 0:
        return cast(Tensor, alone(x))
    dim = getattr(module, "images", 0)
    length = x.shape[dim]
    if (length * _part.size) % _part.length or (length * _part.start) % _part.length:
        return cast(Tensor, alone(x))
    shape = list(x.shape)
    shape[dim] = length * _part.size // _part.length
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda each: (-strides[each], each))  # numbers are drawn in memory order
    with torch.no_grad():
        mask = alone(torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device).fill_(1))
    return x * mask.narrow(dim, length * _part.start // _part.length, length)


def align_generators(device: torch.device) -> None:
    """Give all ranks the generators of rank 0, after they have drawn different numbers."""
    if _count == 1:
        return
    state = torch.get_rng_state()
    dist.broadcast(state, 0)
    torch.set_rng_state(state)
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        dist.broadcast(state, 0)
        torch.cuda.set_rng_state(state, device)


def exchange(values: NDArray[Any], mine: NDArray[np.bool_]) -> None:
    """Replace the entries that other ranks have changed by theirs. No entry was changed by several ranks.

    Args:
        values: flat array of at most 32-bit numbers; all ranks had the same before.
        mine: which entries this rank has changed.
    """
    dtype = np.float32 if values.dtype.kind == "f" else np.int32 if values.dtype.itemsize > 1 else np.uint8
    changed = total(torch.from_numpy(mine.astype(np.uint8))).numpy() > 0
    sent = total(torch.from_numpy(np.where(mine, values, 0).astype(dtype))).numpy()
    values[changed] = sent[changed].astype(values.dtype)


_batch_norm_alone = functional.batch_norm


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``functional.batch_norm``, whose statistics are those of the whole batch."""
    values = x[0, 0].numel()
    count = images(len(x)) * values  # of a channel in the whole batch
    if _part is None or not training or count == 1:
        return _batch_norm_alone(x, running_mean, running_var, weight, bias, training, momentum, eps)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        variance, average = torch.var_mean(x.to(dtype), _all_but_channels(x), correction=0)
        moments = torch.stack([average.double(), variance.double() + average.double().square()])
        average, second = total(moments * (int(_part.counts) * len(x) * values / count))
        variance = (second - average.square()).clamp_min(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(average.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        scale = (variance + eps).rsqrt()
    return cast(
        Tensor,
        _Normalisation.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, average.to(dtype), scale.to(dtype), count, int(_part.counts)
        ),
    )


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


class _Normalisation(torch.autograd.Function):
    """(x - average) * scale * weight + bias, where average and scale are functions of the parts of all ranks.

    ``counts`` is 0 for a part that has no effect on them, else 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        average: Tensor,
        scale: Tensor,
        count: int,
        counts: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, average, scale)
        ctx.count, ctx.counts = count, counts
        out = (x.to(average.dtype) - _channels(average, x)) * _channels(scale, x)
        if weight is not None and bias is not None:
            out = out * _channels(weight, x) + _channels(bias, x)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, average, scale = ctx.saved_tensors
        dims = _all_but_channels(x)
        grad = grads[0].to(average.dtype)
        normalised = (x.to(average.dtype) - _channels(average, x)) * _channels(scale, x)
        to_bias, to_weight = grad.sum(dims), (grad * normalised).sum(dims)
        means = total(torch.stack([to_bias, to_weight])) / ctx.count
        to_x = grad - _channels(means[0], x) - normalised * _channels(means[1], x)
        to_x = to_x * _channels(scale if weight is None else scale * weight, x) * ctx.counts
        if weight is None:
            return to_x.to(x.dtype), None, None, None, None, None, None
        return to_x.to(x.dtype), to_weight.to(weight.dtype), to_bias.to(weight.dtype), None, None, None, None


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Reshape a value for each channel to broadcast over ``x``."""
    return values.view(1, -1, *(1 for _ in range(x.dim() - 2)))
