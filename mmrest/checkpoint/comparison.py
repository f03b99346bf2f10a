"""The tensors of a file against those of a module: names, shapes, values."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..utils.text import shorten

COUNTER = 'num_batches_tracked'


class Comparison(NamedTuple):
    """Names and shapes of a file against those of a module.

    Attributes:
        fitting (dict[str, Tensor]): The file's tensors that fit.
        reshaped (list[str]): Names that both have, with different shapes.
        problems (list[str]): One sentence for each kind of difference.
    """

    fitting: dict[str, Tensor]
    reshaped: list[str]
    problems: list[str]


def compare(
    tensors: dict[str, Tensor],
    target: dict[str, Tensor],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Comparison:
    """Compare the names and shapes of a file with those of a module.

    Args:
        tensors (dict[str, Tensor]): From the file.
        target (dict[str, Tensor]): Of the module.
        allow_missing (Sequence[str]): What the file may lack.
        allow_unexpected (Sequence[str]): What the module may lack.

    Returns:
        Comparison: What fits, and what does not.
    """
    begun = {_parent(name) for name in tensors if not is_counter(name)}
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
    shared = [name for name in target if name in tensors]
    reshaped = [name for name in shared if tensors[name].shape != target[name].shape]
    problems = []
    if reshaped:
        items = (
            f'{name} {_shape(tensors[name])} instead of {_shape(target[name])}'
            for name in reshaped
        )
        problems.append(f'Other shapes ({len(reshaped)}): {shorten(items)}.')
    for what, names, values in (
        ('Missing in the file', missing, target),
        ('Not in the model', unexpected, tensors),
    ):
        if names:
            items = (f'{name} {_shape(values[name])}' for name in names)
            problems.append(f'{what} ({len(names)}): {shorten(items)}.')
    fitting = {name: tensors[name] for name in shared if name not in set(reshaped)}
    return Comparison(fitting, reshaped, problems)


def describe_defects(tensors: dict[str, Tensor]) -> list[str]:
    """Say, in at most one sentence, which tensors are not finite."""
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
    """Whether a name is, or lies below, one of the patterns."""
    for pattern in patterns:
        pattern = pattern.rstrip('.')
        if fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*'):
            return True
    return False


def is_counter(name: str) -> bool:
    """Whether a name is that of a BatchNorm's counter of batches."""
    return name.rpartition('.')[2] == COUNTER


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, without what is no tensor."""
    return {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def adapt(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let submodules change what they can take in another shape.

    A submodule with a method ``adapt_state_dict(state_dict, prefix)`` may do so,
    as a learnable position embedding interpolates that of another grid.

    Args:
        module (nn.Module): Takes the tensors.
        tensors (dict[str, Tensor]): From the file.

    Returns:
        dict[str, Tensor]: A new dict.
    """
    tensors = dict(tensors)
    for name, part in module.named_modules():
        if hasattr(part, 'adapt_state_dict'):
            part.adapt_state_dict(tensors, f'{name}.' if name else '')
    return tensors


def explain(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Ask a module, and its submodules, what tensors that do not fit may be of.

    A submodule with a method ``explain_names(names)`` gives a sentence, or an empty
    text if it knows nothing, as a backbone does for another generation of it.

    Args:
        module (nn.Module): Was to take the tensors.
        names (Iterable[str]): Their names, as ``module`` would have them.

    Returns:
        list[str]: Sentences.
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
