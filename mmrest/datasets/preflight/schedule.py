"""Loops, samplers, schedules and hooks: do they count in the same unit?"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.registry import DATA_SAMPLERS, HOOKS, LOOPS, PARAM_SCHEDULERS

from ...utils.config_types import find_type, type_name
from .reading import bases, walk

ENDLESS = {'InfiniteSampler', 'MultiSourceSampler'}
# Options of a data loader that are about its worker processes.
OF_WORKERS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context')


def check_loaders(cfg: Any, splits: tuple[str, ...]) -> Iterator[str]:
    """Check the options of data loaders, and that a validation comes to an end.

    Args:
        cfg (Config): A config.
        splits (tuple[str]): Of ``train``, ``val`` and ``test``.

    Yields:
        str: Findings.
    """
    for split in splits:
        where = f'{split}_dataloader'
        loader = cfg.get(where) or {}
        options = [name for name in OF_WORKERS if loader.get(name)]
        if options and not loader.get('num_workers', 0):
            reset = ' '.join(
                f'{where}.{name}={False if name == OF_WORKERS[0] else None}'
                for name in options
            )
            yield (
                f'{where}: {" and ".join(options)} need worker processes, but '
                f'num_workers is 0; set --cfg-options {reset}, or num_workers.'
            )
        if split != 'train' and _is_endless(loader):
            yield (
                f'{where}.sampler is {type_name(loader["sampler"])}, which never ends, '
                f"and so would the {split} loop. Set it to dict(type='DefaultSampler', "
                'shuffle=False).'
            )


def check_units(cfg: Any) -> tuple[list[str], list[str]]:
    """Compare the unit of the training loop, epochs or iterations, with the others.

    Args:
        cfg (Config): A config.

    Returns:
        tuple[list[str], list[str]]: Findings, each of which names both fields, and
        notes about a mixture that works.
    """
    loop = cfg.get('train_cfg') or {}
    kinds = bases(loop, LOOPS)
    if 'type' not in loop and 'by_epoch' in loop:
        by_epoch, name = loop['by_epoch'], f'by_epoch={loop["by_epoch"]}'
    elif kinds.keys() & {'EpochBasedTrainLoop', 'IterBasedTrainLoop'}:
        by_epoch, name = 'EpochBasedTrainLoop' in kinds, type_name(loop)
    else:
        return [], []
    found = list(_check_by_epoch(cfg) if by_epoch else _check_by_iteration(cfg))
    other = 'max_iters' if by_epoch else 'max_epochs'
    if loop.get(other):
        found.append(
            f'{other} counts in {"iterations" if by_epoch else "epochs"}. Remove it '
            f'(train_cfg=dict(_delete_=True, ...) in a config that inherits it), or '
            'change the loop'
        )
    notes = []
    units = f'epochs (train_cfg: {name})' if by_epoch else f'iterations ({name})'
    return [f'train_cfg is {name}, but {text}.' for text in found], [
        f'{text}, while the loop counts in {units}.' for text in notes
    ]


def _check_by_epoch(cfg: Any) -> Iterator[str]:
    loader = cfg.get('train_dataloader') or {}
    if _is_endless(loader):
        yield (
            f'train_dataloader.sampler is {type_name(loader["sampler"])}, whose first '
            'epoch never ends: no validation, no checkpoint of an epoch. Set '
            "train_dataloader.sampler=dict(type='DefaultSampler', shuffle=True), or "
            "train by iterations: train_cfg=dict(type='IterBasedTrainLoop', "
            'max_iters=...)'
        )


def _check_by_iteration(cfg: Any) -> Iterator[str]:
    """What counts epochs never acts in a loop that has one, which ends the run."""
    for where, part in walk(cfg.get('param_scheduler'), 'param_scheduler'):
        if (
            'type' in part
            and part.get('by_epoch', True)
            and not part.get('convert_to_iter_based')
            # acts at each validation
            and 'ReduceOnPlateauParamScheduler' not in bases(part, PARAM_SCHEDULERS)
        ):
            yield (
                f'{where} ({type_name(part)}) has by_epoch=True, so it would never '
                'change anything. Give it by_epoch=False and iterations, or train by '
                "epochs: train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=...)"
            )
    for group in ('default_hooks', 'custom_hooks'):
        for where, part in walk(cfg.get(group), group):
            if 'type' not in part:
                continue
            by_epoch = part.get(
                'by_epoch', _default(find_type(part, HOOKS), 'by_epoch')
            )
            acts = part.get('interval', 1)
            if by_epoch and isinstance(acts, int) and acts > 0:
                yield (
                    f'{where} ({type_name(part)}) has by_epoch=True, so it would not '
                    f'act before the end of the run. Set --cfg-options '
                    f'{where}.by_epoch=False and an interval in iterations'
                )
            for option, value in part.items():
                if (
                    option.endswith(('epoch', 'epochs'))
                    and type(value) is int
                    and value
                ):
                    yield (
                        f'{where}.{option} is {value}, an epoch that never comes. '
                        'Remove the hook, or train by epochs'
                    )


def _default(kind: Any, name: str) -> Any:
    """The default of an argument of a class, or of the first base that has it."""
    for base in getattr(kind, '__mro__', ()):
        arguments = inspect.signature(base.__init__).parameters
        if name in arguments:
            return arguments[name].default
    return None


def _is_endless(loader: dict) -> bool:
    """Whether a sampler gives more indices than there are."""
    sampler = loader.get('sampler')
    if not isinstance(sampler, dict):
        return False
    kinds = bases(sampler, DATA_SAMPLERS)
    if not kinds or ENDLESS & kinds.keys():
        return bool(kinds)
    if 'DefaultSampler' in kinds:
        return False
    kind: Any = find_type(sampler, DATA_SAMPLERS)
    options = {key: value for key, value in sampler.items() if key != 'type'}
    if _default(kind, 'seed') is None:
        options.setdefault('seed', 0)  # draw none from the global generator
    try:
        built = kind(range(4), **options)
        limit = 100 * (len(built) + 4)
        return sum(1 for _ in itertools.islice(built, limit)) == limit
    except Exception:  # one that asks its dataset for more than a length
        return False
