"""BatchNorm under activation checkpointing, whose second pass is no new batch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def has_live_statistics(module: nn.Module) -> bool:
    """Whether a forward pass of ``module`` would update running statistics."""
    return bool(_live_norms(module))


def keep_statistics_when_repeated(
    module: nn.Module,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the two passes, the ``context_fn`` of PyTorch's ``checkpoint``.

    In the second pass the norms compute with the statistics of their batch, as in
    the first, and leave the running ones alone.
    """
    return nullcontext(), _without_updates(module)


@contextmanager
def _without_updates(module: nn.Module) -> Iterator[None]:
    norms = _live_norms(module)
    buffers = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    # autograd counts on the same tensors being there: copies take the updates
    for norm, tensors in zip(norms, buffers):
        for name, tensor in tensors.items():
            setattr(norm, name, tensor.clone())
    try:
        yield
    finally:
        for norm, tensors in zip(norms, buffers):
            for name, tensor in tensors.items():
                setattr(norm, name, tensor)


def _live_norms(module: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in module.modules()
        if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
