"""Find what made a loss NaN or infinite, by running the same batch once more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

MAX_NAMES = 5


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a tensor or a nest of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with a value that is NaN or infinite."""
    return [
        name
        for name, param in model.named_parameters()
        if not torch.isfinite(param.detach()).all()
    ]


def abbreviate(names: list[str]) -> str:
    """The first few of ``names``, and how many there are."""
    shown = ', '.join(names[:MAX_NAMES])
    rest = len(names) - MAX_NAMES
    return f'{shown} and {rest} more' if rest > 0 else shown


def rng_states() -> list[Tensor]:
    """PyTorch's random state, of the CPU and of the current GPU if there is one."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def find_source(
    model: nn.Module, args: tuple, kwargs: dict, states: list[Tensor]
) -> str:
    """Say what in a forward pass is the first that is NaN or infinite.

    Parameters are looked at first, then the inputs, then, in a second pass without
    gradients, what enters and leaves each module. Buffers, such as the statistics
    of BatchNorm, and the random state are as before afterwards.

    Args:
        model (nn.Module): The model without its wrapper.
        args (tuple): Positional arguments of the pass.
        kwargs (dict): Keyword arguments of the pass.
        states (list[Tensor]): :func:`rng_states` before the pass.
    """
    names = nonfinite_parameters(model)
    if names:
        return f'parameters were so before this iteration: {abbreviate(names)}'
    inputs = kwargs.get('inputs', args[0] if args else None)
    for images in tensors_of(inputs):
        if _count(images):
            return f'the preprocessed inputs are so already: {_count(images)}'
    found: list[str] = []
    handles = _watch(model, found)
    try:
        with torch.no_grad(), _unchanged(model, states):
            model.forward(*args, **kwargs)
    except _Found:
        pass
    except Exception as error:  # the reason matters more than how it was sought
        return f'the batch could not be run again ({error!r})'
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return 'no module gave such a value when the batch was run again'


class _Found(Exception):
    """Ends the second pass."""


def _watch(model: nn.Module, found: list[str]) -> list:
    modules = dict(model.named_modules())
    handles = []

    def stop(text: str) -> None:
        found.append(text)
        raise _Found

    def watch(name: str, module: nn.Module) -> None:
        def entering(_: nn.Module, args: tuple, kwargs: dict) -> None:
            count = _first_count((args, kwargs))
            if count:
                maker = _parent(name, modules)
                stop(
                    f'first in {_describe(maker, modules)}, by its own operations: '
                    f'it hands {name} {count}'
                )

        def leaving(_: nn.Module, args: tuple, output: Any) -> None:
            count = _first_count(output)
            if count:
                stop(
                    f'first in {_describe(name, modules)}, from inputs that are '
                    f'finite: {count}'
                )

        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(module.register_forward_hook(leaving))

    for name, module in modules.items():
        if name:
            watch(name, module)
    return handles


def _parent(name: str, modules: dict[str, nn.Module]) -> str:
    """The module whose code calls ``name``; lists of modules have no code."""
    name = name.rpartition('.')[0]
    while name and isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        name = name.rpartition('.')[0]
    return name


def _describe(name: str, modules: dict[str, nn.Module]) -> str:
    kind = type(modules[name]).__name__
    return f'{name} ({kind})' if name else f'the model itself ({kind})'


def _first_count(value: Any) -> Optional[str]:
    return next((c for c in map(_count, tensors_of(value)) if c), None)


def _count(values: Tensor) -> Optional[str]:
    nans = int(torch.isnan(values).sum())
    infs = int(torch.isinf(values).sum())
    if not nans and not infs:
        return None
    return f'{nans} NaN and {infs} infinite values of {values.numel()}'


@contextmanager
def _unchanged(model: nn.Module, states: list[Tensor]) -> Iterator[None]:
    """Start from ``states``; afterwards random state and buffers are as now."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1])
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.data.copy_(value)
