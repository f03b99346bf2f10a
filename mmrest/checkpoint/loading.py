"""Load a checkpoint into a module: everything that has to fit, or nothing."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Optional, Union

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .errors import CheckpointError, shorten
from .reading import Source, read_checkpoint
from .state_dicts import find_state_dict, prefixes_in

COUNTER = 'num_batches_tracked'


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave to a module.

    Attributes:
        source (str): The file or URL.
        wrapper (str): The key that held the tensors, empty if they were bare.
        prefix (str): What was taken off the names in the file.
        loaded (tuple[str]): Names of the tensors that were loaded.
        new (tuple[str]): Names in the module that the file lacks, and may lack.
        unused (tuple[str]): Names in the file that the module lacks, and may lack.
        other_parts (tuple[str]): Names in the file outside ``prefix``.
        counters (tuple[str]): BatchNorms' ``num_batches_tracked`` that the file
            lacks, as files from before PyTorch 0.4.1 do.
        cast (dict[str, int]): How many tensors were stored with another dtype.
    """

    source: str
    wrapper: str
    prefix: str
    loaded: tuple[str, ...]
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    cast: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        form = [f'under {self.wrapper}'] if self.wrapper else []
        form += [f'names without {self.prefix}'] if self.prefix else []
        where = f' ({", ".join(form)})' if form else ''
        lines = [f'Loaded {len(self.loaded)} tensors from {self.source}{where}.']
        for names, what in (
            (self.new, 'New, initialised and not loaded'),
            (self.unused, 'In the file and unused'),
            (self.other_parts, 'Of other parts of the model in the file'),
            (self.counters, f'Without {COUNTER} in the file'),
        ):
            if names:
                lines.append(f'{what}: {len(names)} ({_modules(names)}).')
        for dtype, count in self.cast.items():
            lines.append(f'Converted from {dtype}: {count}.')
        return ' '.join(lines)


def load_pretrained(
    module: nn.Module,
    source: Source,
    may_be_new: Sequence[str] = (),
    may_be_unused: Sequence[str] = (),
    prefix: Optional[str] = None,
    logger: Union[logging.Logger, str, None] = 'current',
) -> LoadReport:
    """Load a checkpoint into a module, and say what was loaded.

    All forms of :func:`read_state_dict` are read. Where the module is a part of
    what the file holds, as a backbone in a detector, the rest of the file is
    left alone. Everything else must fit: nothing is copied unless all tensors
    that the module needs are there with their shapes and finite values, and
    none is left over. Half precision is converted.

    Args:
        module (nn.Module): Takes the tensors.
        source (str | Path): A file or URL, see :func:`read_checkpoint`.
        may_be_new (Sequence[str]): Submodules or parameters that the file may
            lack; ``'norm1'`` stands for all names below it, and ``*`` for any
            text. A layer is new as a whole or not at all. Default: ().
        may_be_unused (Sequence[str]): The same for what the module lacks.
            Default: ().
        prefix (str, optional): What the names in the file begin with, as
            ``'backbone.'``. Default: None, the known prefix that fits best.
        logger (logging.Logger | str | None): As in mmengine's ``print_log``.
            Default: ``'current'``.

    Returns:
        LoadReport: What was loaded, new and unused.

    Raises:
        CheckpointError: If the file cannot be read, or does not fit.
    """
    found = find_state_dict(read_checkpoint(source), source)
    target = module.state_dict()
    target = {k: v for k, v in target.items() if isinstance(v, Tensor)}
    prefix = _choose_prefix(found.tensors, target, prefix, source)
    inside = {
        name[len(prefix) :]: tensor
        for name, tensor in found.tensors.items()
        if name.startswith(prefix)
    }
    inside = adapt(module, inside)
    fitting, problems = compare(inside, target, may_be_new, may_be_unused)
    converted: dict[str, Tensor] = {}
    if not problems:
        converted, problems = _convert(fitting, target)
    if problems:
        kinds = [
            f'{name} is a {kind}'
            for name, kind in found.others.items()
            if name[len(prefix) :] in target
        ]
        raise CheckpointError(
            f'{source} does not fit {type(module).__name__}; nothing was loaded. '
            + ' '.join([*problems, *kinds])
            + ' If most shapes or many numbered blocks differ, the file belongs to '
            'another `arch` or to another model.'
        )
    missing = [name for name in target if name not in fitting]
    report = LoadReport(
        source=str(source),
        wrapper=found.wrapper,
        prefix=prefix,
        loaded=tuple(fitting),
        new=tuple(name for name in missing if not is_counter(name)),
        unused=tuple(name for name in inside if name not in target),
        other_parts=tuple(n for n in found.tensors if not n.startswith(prefix)),
        counters=tuple(
            name
            for name in missing
            if is_counter(name) and not matches(name, may_be_new)
        ),
        cast=_count_casts(fitting, target),
    )
    module.load_state_dict(converted, strict=False)
    print_log(str(report), logger=logger)
    return report


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


def compare(
    tensors: dict[str, Tensor],
    target: dict[str, Tensor],
    may_be_new: Sequence[str] = (),
    may_be_unused: Sequence[str] = (),
) -> tuple[dict[str, Tensor], list[str]]:
    """Compare the names and shapes of a file with those of a module.

    Args:
        tensors (dict[str, Tensor]): From the file.
        target (dict[str, Tensor]): Of the module.
        may_be_new (Sequence[str]): What the file may lack.
        may_be_unused (Sequence[str]): What the module may lack.

    Returns:
        tuple[dict[str, Tensor], list[str]]: The tensors that fit, and one sentence
        for each kind of difference.
    """
    begun = {_parent(name) for name in tensors if not is_counter(name)}
    missing = [
        name
        for name in target
        if name not in tensors
        and not is_counter(name)
        and not (matches(name, may_be_new) and _parent(name) not in begun)
    ]
    unexpected = [
        name
        for name in tensors
        if name not in target and not matches(name, may_be_unused)
    ]
    shared = [name for name in target if name in tensors]
    other = [name for name in shared if tensors[name].shape != target[name].shape]
    problems = []
    if other:
        items = (
            f'{name} {_shape(tensors[name])} instead of {_shape(target[name])}'
            for name in other
        )
        problems.append(f'Other shapes ({len(other)}): {shorten(items)}.')
    for what, names, values in (
        ('Missing in the file', missing, target),
        ('Not in the model', unexpected, tensors),
    ):
        if names:
            items = (f'{name} {_shape(values[name])}' for name in names)
            problems.append(f'{what} ({len(names)}): {shorten(items)}.')
    return {n: tensors[n] for n in shared if n not in set(other)}, problems


def describe_defects(tensors: dict[str, Tensor]) -> list[str]:
    """Say, in at most one sentence, which tensors are not finite."""
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
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


def _choose_prefix(
    tensors: dict[str, Tensor],
    target: dict[str, Tensor],
    wanted: Optional[str],
    source: Source,
) -> str:
    if wanted is not None:
        wanted = wanted if not wanted or wanted.endswith('.') else f'{wanted}.'
        candidates = [wanted, f'module.{wanted}']
    else:
        candidates = prefixes_in(tensors)
    fits = [sum(p + name in tensors for name in target) for p in candidates]
    if not any(fits):
        shown = f'; {wanted!r} was asked for as their prefix' if wanted else ''
        raise CheckpointError(
            f'no tensor in {source} has a name that the model knows{shown}. '
            f'In the file ({len(tensors)}): {shorten(tensors, 4)}. '
            f'In the model ({len(target)}): {shorten(target, 4)}. '
            'Is it a checkpoint of this model?'
        )
    return candidates[fits.index(max(fits))]


def _convert(
    fitting: dict[str, Tensor], target: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert tensors to the dtypes of the module, if that loses no meaning."""
    foreign = [
        f'{name} ({_nature(tensor)} for {_nature(target[name])})'
        for name, tensor in fitting.items()
        if _nature(tensor) != _nature(target[name])
    ]
    if foreign:
        return {}, [f'Tensors of another nature ({len(foreign)}): {shorten(foreign)}.']
    converted = {n: tensor.to(target[n].dtype) for n, tensor in fitting.items()}
    return converted, describe_defects(converted)


def _nature(tensor: Tensor) -> str:
    if tensor.is_meta:
        return 'without values'
    if tensor.is_quantized:
        return 'quantized'
    if tensor.layout != torch.strided:
        return 'sparse'
    if tensor.is_complex():
        return 'complex'
    return 'floating-point' if tensor.is_floating_point() else 'integer'


def _count_casts(
    fitting: dict[str, Tensor], target: dict[str, Tensor]
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, tensor in fitting.items():
        if tensor.dtype != target[name].dtype:
            dtype = str(tensor.dtype)
            counts[dtype] = counts.get(dtype, 0) + 1
    return counts


def _parent(name: str) -> str:
    return name.rpartition('.')[0]


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _modules(names: Sequence[str]) -> str:
    """Name the submodules that parameters belong to, as ``norm1, norm2``."""
    if all(is_counter(name) for name in names):
        return shorten(names, 2)
    return shorten(dict.fromkeys(name.partition('.')[0] for name in names))
