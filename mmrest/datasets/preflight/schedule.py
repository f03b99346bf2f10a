"""Check that loop, sampler, schedules and hooks all count epochs or iterations."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, Optional

from mmengine.registry import DATA_SAMPLERS, HOOKS, LOOPS, PARAM_SCHEDULERS

from ...utils.config_types import find_type, type_name
from .reading import bases, options_of, walk

ENDLESS = {'InfiniteSampler', 'MultiSourceSampler'}
# Options of a data loader that need worker processes
OF_WORKERS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context')


def check_loaders(cfg: Any, splits: tuple[str, ...]) -> Iterator[str]:
    """Check the options of data loaders, and that a validation ends."""
    for split in splits:
        where = f'{split}_dataloader'
        loader = cfg.get(where) or {}
        for name in OF_WORKERS:
            if loader.get(name) and not loader.get('num_workers'):
                off = False if name == 'persistent_workers' else None
                yield (
                    f'{where}: {name}={loader[name]!r} needs worker processes, but '
                    f'num_workers is 0: set --cfg-options {where}.{name}={off}, or '
                    'num_workers.'
                )
        if split != 'train' and _is_endless(loader):
            yield (
                f'{where}.sampler is {type_name(loader["sampler"])}, which never ends, '
                f"and so would the {split} loop. Set it to dict(type='DefaultSampler', "
                'shuffle=False).'
            )


def check_units(cfg: Any) -> tuple[list[str], list[str]]:
    """Compare the unit of the training loop, epochs or iterations, with other parts.

    Returns findings, which name both fields, and notes about mixtures that work.
    """
    loop = cfg.get('train_cfg') or {}
    kinds = bases(loop, LOOPS)
    if kinds and 'by_epoch' in loop:
        return [
            f'train_cfg has type={type_name(loop)} and by_epoch={loop["by_epoch"]}, of '
            'which MMEngine takes one. Remove by_epoch, and set type to '
            'EpochBasedTrainLoop or IterBasedTrainLoop.'
        ], []
    if 'EpochBasedTrainLoop' in kinds or loop.get('by_epoch') is True:
        check, other = _check_by_epoch, 'max_iters'
    elif 'IterBasedTrainLoop' in kinds or loop.get('by_epoch') is False:
        check, other = _check_by_iteration, 'max_epochs'
    else:
        return [], []
    name = type_name(loop) or f'by_epoch={loop["by_epoch"]}'
    found, notes = check(cfg)
    if loop.get(other):
        found.append(
            f'{other} is given too. Remove it; train_cfg=dict(_delete_=True, ...) does '
            'so with all that is inherited'
        )
    return (
        [f'train_cfg is {name}, but {text}.' for text in found],
        [f'train_cfg is {name}, while {text}.' for text in notes],
    )


def _check_by_epoch(cfg: Any) -> tuple[list[str], list[str]]:
    loader = cfg.get('train_dataloader') or {}
    found = []
    if _is_endless(loader):
        found.append(
            f'train_dataloader.sampler is {type_name(loader["sampler"])}, whose first '
            'epoch never ends, so that there would be no validation and no checkpoint. '
            "Set train_dataloader.sampler=dict(type='DefaultSampler', shuffle=True), "
            "or train by iterations: train_cfg=dict(type='IterBasedTrainLoop', ...)"
        )
    schedules = [part for _, part in walk(cfg.get('param_scheduler'), '') if part]
    notes = [
        f'{where} ({type_name(part)}) has by_epoch=False and counts iterations'
        for where, part in _find_hooks(cfg)
        if part.get('by_epoch') is False
    ]
    if schedules and not any(part.get('by_epoch', True) for part in schedules):
        notes.append('all of param_scheduler has by_epoch=False and counts iterations')
    return found, notes


def _check_by_iteration(cfg: Any) -> tuple[list[str], list[str]]:
    """Find parts that count epochs, of which the whole run is one."""
    found = []
    for where, part in walk(cfg.get('param_scheduler'), 'param_scheduler'):
        if (
            'type' in part
            and part.get('by_epoch', True)
            and not part.get('convert_to_iter_based')
            # acts at each validation
            and 'ReduceOnPlateauParamScheduler' not in bases(part, PARAM_SCHEDULERS)
        ):
            found.append(
                f'{where} ({type_name(part)}) has by_epoch=True, so it would never '
                'change anything. Give it by_epoch=False and iterations, or train by '
                "epochs: train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=...)"
            )
    for where, part in _find_hooks(cfg):
        argument = _find_argument(find_type(part, HOOKS), 'by_epoch')
        by_epoch = part.get('by_epoch', argument and argument.default)
        interval = part.get('interval', 1)
        if by_epoch and isinstance(interval, int) and interval > 0:
            found.append(
                f'{where} ({type_name(part)}) has by_epoch=True, so it would not act '
                f'before the end of the run. Set --cfg-options {where}.by_epoch=False '
                'and an interval in iterations'
            )
        found += [
            f'{where}.{option} is {value}, an epoch that never comes. Remove the hook, '
            'or train by epochs'
            for option, value in part.items()
            if option.endswith(('epoch', 'epochs')) and type(value) is int and value
        ]
    log_by_epoch = (cfg.get('log_processor') or {}).get('by_epoch', True)
    if 'log_processor' in cfg and log_by_epoch:
        return found, ['log_processor has by_epoch=True, so the log counts epochs']
    return found, []


def _find_hooks(cfg: Any) -> list[tuple[str, dict]]:
    return [
        (where, part)
        for group in ('default_hooks', 'custom_hooks')
        for where, part in walk(cfg.get(group), group)
        if 'type' in part
    ]


def _find_argument(kind: Any, name: str) -> Optional[inspect.Parameter]:
    """The argument of a class, or of the first base class that has it."""
    for base in getattr(kind, '__mro__', ()):
        arguments = inspect.signature(base.__init__).parameters
        if name in arguments:
            return arguments[name]
    return None


def _is_endless(loader: dict) -> bool:
    """Whether a sampler yields more indices than there are."""
    sampler = loader.get('sampler')
    if not isinstance(sampler, dict):
        return False
    kinds = bases(sampler, DATA_SAMPLERS)
    if not kinds or ENDLESS & kinds.keys():
        return bool(kinds)
    if 'DefaultSampler' in kinds:
        return False
    kind: Any = find_type(sampler, DATA_SAMPLERS)
    options = options_of(sampler)
    if _find_argument(kind, 'seed'):
        options.setdefault('seed', 0)  # else it is drawn from the global generator
    try:
        built = kind(range(4), **options)
        limit = 100 * (len(built) + 4)
        return sum(1 for _ in itertools.islice(built, limit)) == limit
    except Exception:  # it needs more of its dataset than the length
        return False
