"""Compare the tensors of a file with those of a module: names, shapes, values."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..utils.text import shorten

COUNTER = 'num_batches_tracked'


class Comparison(NamedTuple):
    """The result of comparing a file with a module."""

    fitting: dict[str, Tensor]  # tensors of the file that fit
    reshaped: list[str]  # names with different shapes in file and module
    problems: list[str]  # one sentence for each kind of difference


def compare(
    tensors: dict[str, Tensor],
    target: dict[str, Tensor],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Comparison:
    """Compare the names and shapes of a file with those of a module.

    Args:
        tensors (dict[str, Tensor]): Tensors of the file.
        target (dict[str, Tensor]): Tensors of the module.
        allow_missing (Iterable[str]): What the file may lack, see :func:`matches`.
        allow_unexpected (Iterable[str]): What the module may lack.
    """
    begun = {_parent(name) for name in tensors if not is_counter(name)}
    shared = [name for name in target if name in tensors]
    reshaped = [name for name in shared if tensors[name].shape != target[name].shape]
    missing = [
        name
        for name in target
        if name not in tensors
        and not is_counter(name)
        and not (matches(name, allow_missing) and _parent(name) not in begun)
    ]
    unexpected = [
        name
        for name in tensors
        if name not in target and not matches(name, allow_unexpected)
    ]
    kinds = {
        'Other shapes': [
            f'{name} {_shape(tensors[name])} instead of {_shape(target[name])}'
            for name in reshaped
        ],
        'Missing in the file': [f'{name} {_shape(target[name])}' for name in missing],
        'Not in the model': [f'{name} {_shape(tensors[name])}' for name in unexpected],
    }
    return Comparison(
        {name: tensors[name] for name in shared if name not in set(reshaped)},
        reshaped,
        [
            f'{kind} ({len(all_)}): {shorten(all_)}.'
            for kind, all_ in kinds.items()
            if all_
        ],
    )


def describe_defects(tensors: dict[str, Tensor]) -> list[str]:
    """Name tensors with values that are not finite, in at most one sentence."""
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.is_meta
        and not torch.isfinite(tensor).all()
    ]
    if not broken:
        return []
    return [
        f'NaN or infinite values in {len(broken)}: {shorten(broken)}. Training may '
        'have diverged before the file was saved; take an earlier one.'
    ]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of the patterns or lies below one."""
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')
        for pattern in (pattern.rstrip('.') for pattern in patterns)
    )


def is_counter(name: str) -> bool:
    """Whether a name is that of a BatchNorm's batch counter."""
    return name.rpartition('.')[2] == COUNTER


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors in the state dict of a module."""
    return {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def adapt(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors of a file, adapted by the submodules that will load them.

    A submodule may have a method ``adapt_state_dict(state_dict, prefix)``. A learnable
    position embedding, for example, interpolates one of another size.
    """
    tensors = dict(tensors)
    for name, part in module.named_modules():
        if hasattr(part, 'adapt_state_dict'):
            part.adapt_state_dict(tensors, f'{name}.' if name else '')
    return tensors


def explain(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Ask the submodules to explain names of tensors that do not fit.

    A submodule may have a method ``explain_names(names)`` that returns a sentence or an
    empty string. A backbone, for example, recognises names of its other generation.
    """
    names, sentences = list(names), []
    for name, part in module.named_modules():
        if hasattr(part, 'explain_names'):
            start = f'{name}.' if name else ''
            inside = [n[len(start) :] for n in names if n.startswith(start)]
            sentences.append(part.explain_names(inside))
    return [sentence for sentence in sentences if sentence]


def _parent(name: str) -> str:
    return name.rpartition('.')[0]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
