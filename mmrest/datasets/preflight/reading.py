"""Read a config: datasets without wrappers, and the classes of parts."""

import os.path as osp
from collections.abc import Iterator
from typing import Any, Optional

from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, TRANSFORMS, Registry
from mmengine.utils import is_abs

from ...utils.config_types import find_type, type_name


def walk(part: Any, where: str) -> Iterator[tuple[str, dict]]:
    """Yield all dicts within a config, with their places (``model.neck.0``)."""
    if isinstance(part, dict):
        yield where, part
        for key, value in part.items():
            yield from walk(value, f'{where}.{key}')
    elif isinstance(part, (list, tuple)):
        for index, value in enumerate(part):
            yield from walk(value, f'{where}.{index}')


def bases(cfg: dict, registry: Registry) -> dict[str, type]:
    """Return the class of a config and its base classes, by name; empty if unknown."""
    kind = find_type(cfg, registry)
    return {base.__name__: base for base in getattr(kind, '__mro__', ())}


def options_of(cfg: dict) -> dict:
    """Return the arguments for the class of a config."""
    return {key: v for key, v in cfg.items() if key not in ('type', '_scope_')}


def find_datasets(cfg: Any, split: str) -> Iterator[tuple[str, dict]]:
    """Yield the datasets of a split, without ``RepeatDataset`` and other wrappers."""
    name = f'{split}_dataloader'
    yield from _leaves((cfg.get(name) or {}).get('dataset') or {}, f'{name}.dataset')


def _leaves(dataset: dict, where: str) -> Iterator[tuple[str, dict]]:
    if 'dataset' in dataset:
        yield from _leaves(dataset['dataset'], f'{where}.dataset')
    elif 'datasets' in dataset:
        for index, part in enumerate(dataset['datasets']):
            yield from _leaves(part, f'{where}.datasets.{index}')
    elif dataset:
        yield where, dataset


def find_steps(dataset: dict, name: str) -> list[dict]:
    """List the steps of a pipeline with a class, also nested ones."""
    return [
        step
        for _, step in walk(dataset.get('pipeline') or (), '')
        if type_name(step) == name or name in bases(step, TRANSFORMS)
    ]


def is_remote(dataset: dict) -> bool:
    """Whether the files of a dataset are not in the file system."""
    paths = [dataset.get('data_root'), dataset.get('ann_file')]
    return bool(dataset.get('backend_args')) or any('://' in str(p) for p in paths)


def join(root: Optional[str], path: Optional[str]) -> str:
    """Join paths like MMEngine's datasets, which keep absolute paths and URLs."""
    path = path or ''
    return path if is_abs(path) else osp.join(root or '', path)


def find_classes(dataset: dict, key: str = 'classes') -> tuple[str, ...]:
    """Return the classes of a config, or else of its dataset class.

    They are empty if they are only known when the dataset is built. ``key`` is the list
    of ``metainfo`` to read.
    """
    kind = find_type(dataset, DATASETS)
    meta = {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    classes = meta.get(key) or ()
    if isinstance(classes, str):  # a file with a class a line
        classes = list_from_file(classes) if osp.isfile(classes) else ()
    return tuple(classes)


def check_class_text(cfg: Any, split: str) -> Iterator[str]:
    """Find ``classes=('fig')``, a string whose letters would become the classes.

    MMEngine treats a string as the path of a file with one class per line, and keeps it
    with a warning if there is no such file.
    """
    for where, dataset in find_datasets(cfg, split):
        metainfo = dataset.get('metainfo') or {}
        for field, value in (
            ('metainfo.classes', metainfo.get('classes')),
            ('classes', dataset.get('classes')),
        ):
            if isinstance(value, str) and '://' not in value and not osp.isfile(value):
                yield (
                    f'{where}.{field} is {value!r}, neither a list of names nor a file '
                    f'with a name per line. For one class add the comma: '
                    f'classes=({value!r},).'
                )
