"""Load a checkpoint into a module: everything that has to fit, or nothing."""

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.utils import deprecated_api_warning
from torch import Tensor, nn

from ..utils.config_types import find_type
from ..utils.text import shorten
from .comparison import (
    COUNTER,
    adapt,
    compare,
    describe_defects,
    explain,
    is_counter,
    matches,
    tensors_of,
)
from .reading import CheckpointError, Source, read_checkpoint
from .state_dict import find_state_dict, prefixes_in

# map_location is MMEngine's option and has no effect here: files are read on the CPU
_PRETRAINED_OPTIONS = ('checkpoint', 'prefix', 'map_location', 'adapt_input')
_INPUT_ADVICE = (
    ' The file is for images with another number of channels: set adapt_input=True '
    "next to checkpoint, as in init_cfg=dict(type='Pretrained', checkpoint=..., "
    'adapt_input=True), to adapt its first convolution.'
)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a checkpoint.

    Attributes:
        source (str): The file or URL.
        wrapper (str): The key that held the tensors, empty if they were bare.
        prefix (str): The prefix that was removed from the names in the file.
        loaded (tuple[str]): Names of the tensors that were loaded.
        missing_keys (tuple[str]): Names that the file lacks, permitted by
            ``allow_missing``.
        unexpected_keys (tuple[str]): Names that the module lacks, permitted by
            ``allow_unexpected``.
        other_parts (tuple[str]): Names in the file outside ``prefix``.
        counters (tuple[str]): BatchNorms' ``num_batches_tracked`` that the file
            lacks, as files from before PyTorch 0.4.1 do.
        cast (dict[str, int]): Number of tensors that were converted, by their dtype in
            the file.
        adapted (str): How the first convolution was adapted; empty if it was not.
    """

    source: str
    wrapper: str
    prefix: str
    loaded: tuple[str, ...]
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    cast: dict[str, int] = field(default_factory=dict)
    adapted: str = ''

    @property
    def new(self) -> tuple[str, ...]:
        """Former name of ``missing_keys``."""
        return _renamed('new', 'missing_keys', self.missing_keys)

    @property
    def unused(self) -> tuple[str, ...]:
        """Former name of ``unexpected_keys``."""
        return _renamed('unused', 'unexpected_keys', self.unexpected_keys)

    def __str__(self) -> str:
        form = [f'under {self.wrapper}'] if self.wrapper else []
        form += [f'names without {self.prefix}'] if self.prefix else []
        where = f' ({", ".join(form)})' if form else ''
        lines = [f'Loaded {len(self.loaded)} tensors from {self.source}{where}.']
        for names, what in (
            (self.missing_keys, 'Not in the file, initialised instead'),
            (self.unexpected_keys, 'In the file and not used'),
            (self.other_parts, 'Of other parts of the model in the file'),
            (self.counters, f'Without {COUNTER} in the file'),
        ):
            if names:
                lines.append(f'{what}: {len(names)} ({_modules(names)}).')
        for dtype, count in self.cast.items():
            lines.append(f'Converted from {dtype}: {count}.')
        if self.adapted:
            lines.append(f'{self.adapted}.')
        return ' '.join(lines)


@deprecated_api_warning(
    {'may_be_new': 'allow_missing', 'may_be_unused': 'allow_unexpected'}
)
def load_pretrained(
    module: nn.Module,
    source: Source,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    prefix: Optional[str] = None,
    logger: Union[logging.Logger, str, None] = 'current',
    adapt_input: bool = False,
) -> LoadReport:
    """Load a checkpoint into a module, and report what was loaded.

    All forms of :func:`read_state_dict` are accepted. If the module is a part of the
    model in the file, such as the backbone of a detector, the rest of the file is
    ignored. Everything else must fit. Tensors are copied only if the file holds all
    that the module needs, with the right shapes and finite values, and no others. Half
    precision is converted.

    Args:
        module (nn.Module): The module to load into.
        source (str | Path): A file or URL, see :func:`read_checkpoint`.
        allow_missing (Sequence[str]): Submodules or parameters that the file may lack;
            ``'norm1'`` stands for all names below it, and ``*`` for any text. A layer
            may only be missing as a whole. Default: ().
        allow_unexpected (Sequence[str]): Those that the module may lack. Default: ().
        prefix (str, optional): Prefix of the names in the file, as ``'backbone.'``.
            Default: None, the known prefix that fits best.
        logger (logging.Logger | str | None): As in MMEngine's ``print_log``. Default:
            ``'current'``.
        adapt_input (bool): Whether to adapt the weights of the first convolution to
            another number of input channels, see :func:`adapt_input_channels`. Default:
            False.

    Raises:
        CheckpointError: If the file cannot be read or does not fit.
    """
    found = find_state_dict(read_checkpoint(source), source)
    target = tensors_of(module)
    prefix = _choose_prefix(found.tensors, target, prefix, source)
    inside = {
        name[len(prefix) :]: tensor
        for name, tensor in found.tensors.items()
        if name.startswith(prefix)
    }
    inside = adapt(module, inside)
    adapted = ''
    first = _other_input(module, inside, target)
    if first and adapt_input:
        channels = target[first].shape[1]
        adapted = (
            f'Adapted {first} from {inside[first].shape[1]} to {channels} input '
            'channels'
        )
        inside[first] = adapt_input_channels(inside[first], channels)
    fitting, _, problems = compare(inside, target, allow_missing, allow_unexpected)
    converted: dict[str, Tensor] = {}
    if not problems:
        converted, problems = _convert(fitting, target)
    if problems:
        problems = [*explain(module, inside), *problems]
        kinds = [
            f'{name} is a {kind}'
            for name, kind in found.others.items()
            if name[len(prefix) :] in target
        ]
        raise CheckpointError(
            f'{source} does not fit {type(module).__name__}; nothing was loaded. '
            + ' '.join([*problems, *kinds])
            + (_INPUT_ADVICE if first and not adapt_input else '')
            + ' If most shapes or many numbered blocks differ, the file belongs to '
            'another `arch` or to another model.'
        )
    missing = [name for name in target if name not in fitting]
    casts = (str(x.dtype) for n, x in fitting.items() if x.dtype != target[n].dtype)
    report = LoadReport(
        source=str(source),
        wrapper=found.wrapper,
        prefix=prefix,
        loaded=tuple(fitting),
        missing_keys=tuple(name for name in missing if not is_counter(name)),
        unexpected_keys=tuple(name for name in inside if name not in target),
        other_parts=tuple(n for n in found.tensors if not n.startswith(prefix)),
        counters=tuple(
            name
            for name in missing
            if is_counter(name) and not matches(name, allow_missing)
        ),
        cast=dict(Counter(casts)),
        adapted=adapted,
    )
    module.load_state_dict(converted, strict=False)
    print_log(str(report), logger=logger)
    return report


def pretrained_options(init_cfg: Any) -> Optional[dict[str, Any]]:
    """Return the options of an ``init_cfg`` that names a checkpoint and nothing else.

    Besides MMEngine's options, ``Pretrained`` may have ``adapt_input`` here.

    Returns:
        dict | None: ``source``, ``prefix`` and ``adapt_input`` for
        :func:`load_pretrained`. None for any other ``init_cfg``, which is left to
        MMEngine.

    Raises:
        TypeError: If it is malformed or has other options.
    """
    cfgs = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg or {}]
    for cfg in cfgs:
        if not isinstance(cfg, dict) or (cfg and 'type' not in cfg):
            raise TypeError(
                'init_cfg must be a dict with a type, or a list of these, as '
                f"dict(type='Pretrained', checkpoint=PATH); found {cfg!r}"
            )
    if [find_type(cfg, WEIGHT_INITIALIZERS) for cfg in cfgs] != [PretrainedInit]:
        return None
    options = {k: v for k, v in cfgs[0].items() if k not in ('type', '_scope_')}
    unknown = sorted(set(options) - set(_PRETRAINED_OPTIONS))
    if unknown or 'checkpoint' not in options:
        raise TypeError(
            f'init_cfg of type Pretrained has the options '
            f'{", ".join(_PRETRAINED_OPTIONS)}, and needs checkpoint; found '
            f'{shorten(options)}'
        )
    return dict(
        source=options['checkpoint'],
        prefix=options.get('prefix'),
        adapt_input=options.get('adapt_input', False),
    )


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt a convolution's weight to another number of input channels, as timm does.

    Args:
        weight (Tensor): Of shape (out, in, kH, kW).
        channels (int): The new number. 1 sums over the channels, so that a grey image
            gives the result of its RGB copy. Another number repeats the channels in
            turn and rescales them, so that equal channels give the same sum.

    Returns:
        Tensor: Of shape (out, channels, kH, kW), with the same dtype.
    """
    before = weight.shape[1]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    repeats = -(-channels // before)
    repeated = wide.repeat(1, repeats, 1, 1)[:, :channels]
    return (repeated * (before / channels)).to(weight.dtype)


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
        first = next(iter(target), '')
        others = [n.removesuffix(first) for n in tensors if n.endswith(f'.{first}')]
        advice = 'Is it a checkpoint of this model?'
        if first and others:
            advice = (
                f'The names in the file begin with {shorten(others, 4)}: to take these '
                "off, set prefix next to checkpoint, as in init_cfg=dict(type='"
                f"Pretrained', checkpoint=..., prefix={others[0]!r})."
            )
        raise CheckpointError(
            f'no tensor in {source} has a name that the model knows{shown}. '
            f'In the file ({len(tensors)}): {shorten(tensors, 4)}. '
            f'In the model ({len(target)}): {shorten(target, 4)}. {advice}'
        )
    return candidates[fits.index(max(fits))]


def _convert(
    fitting: dict[str, Tensor], target: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert tensors to the dtypes of the module, within the same kind of numbers."""
    foreign = [
        f'{name} ({_nature(tensor)} for {_nature(target[name])})'
        for name, tensor in fitting.items()
        if _nature(tensor) != _nature(target[name])
    ]
    if foreign:
        return {}, [f'Tensors of another kind ({len(foreign)}): {shorten(foreign)}.']
    converted = {n: tensor.to(target[n].dtype) for n, tensor in fitting.items()}
    return converted, describe_defects(converted)


def _renamed(old: str, new: str, value: tuple[str, ...]) -> tuple[str, ...]:
    text = f'LoadReport.{old} is now called {new}'
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return value


def _other_input(
    module: nn.Module, tensors: dict[str, Tensor], target: dict[str, Tensor]
) -> str:
    """Name the weight of the first convolution if only its input channels differ."""
    convs = (n for n, part in module.named_modules() if isinstance(part, nn.Conv2d))
    name = f'{next(convs, "")}.weight'.lstrip('.')
    if name not in tensors or name not in target:
        return ''
    found, wanted = tensors[name], target[name]
    fits = (
        found.dim() == 4
        and found.is_floating_point()
        and found.layout == torch.strided
        and found.shape[0] == wanted.shape[0]
        and found.shape[1] != wanted.shape[1]
        and found.shape[2:] == wanted.shape[2:]
    )
    return name if fits else ''


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


def _modules(names: Sequence[str]) -> str:
    """Name the submodules of parameters, as ``norm1, norm2``."""
    if all(is_counter(name) for name in names):
        return shorten(names, 2)
    return shorten(dict.fromkeys(name.partition('.')[0] for name in names))
