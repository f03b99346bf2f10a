"""Which COCO-format datasets a config uses, and with what settings."""

import os.path as osp
from dataclasses import dataclass
from typing import Optional

from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS
from mmengine.utils import is_abs


@dataclass(frozen=True)
class CocoDataset:
    """One COCO-format dataset as a config describes it.

    Attributes:
        where (str): Its place in the config, e.g. ``train_dataloader.dataset``.
        ann_file (str): Path of the annotation file, ``data_root`` included.
        data_root (str): As in the config.
        image_folder (str): Folder that the file names are relative to.
        classes (tuple[str]): Class names that the run uses, in its order.
        test_mode (bool): Whether images without annotations are used too.
        min_size (int): Smaller images are left out of training.
        filter_empty (bool): Whether images without annotations are, too.
        turned (bool): Whether images are turned as their EXIF data say.
        needs_masks (bool): Whether the pipeline loads masks.
        polygons_only (bool): Whether it can take polygons alone, no RLE.
    """

    where: str
    ann_file: str
    data_root: str
    image_folder: str
    classes: tuple
    test_mode: bool
    min_size: int
    filter_empty: bool
    turned: bool
    needs_masks: bool
    polygons_only: bool


def find_coco_datasets(cfg, split: str) -> list:
    """List the COCO-format datasets of a split, wrappers taken off.

    Datasets of other formats, and those on other storage than the file system,
    are passed over.

    Args:
        cfg (Config): A config.
        split (str): ``train``, ``val`` or ``test``.

    Returns:
        list[CocoDataset]: In the order of the config.
    """
    name = f'{split}_dataloader'
    dataset = (cfg.get(name) or {}).get('dataset')
    if dataset is None:
        return []
    found = [
        _describe(where, leaf) for where, leaf in leaves(dataset, f'{name}.dataset')
    ]
    return [dataset for dataset in found if dataset is not None]


def leaves(dataset, where: str):
    """Look into RepeatDataset, ClassBalancedDataset, ConcatDataset and the like."""
    if 'dataset' in dataset:
        yield from leaves(dataset['dataset'], f'{where}.dataset')
    elif 'datasets' in dataset:
        for index, part in enumerate(dataset['datasets']):
            yield from leaves(part, f'{where}.datasets.{index}')
    else:
        yield where, dataset


def _describe(where, cfg) -> Optional[CocoDataset]:
    kind = find_class(cfg)
    if not _reads_coco(kind):
        return None
    root = cfg.get('data_root') or ''
    ann_file = cfg.get('ann_file') or ''
    if not ann_file or cfg.get('backend_args') or '://' in root + ann_file:
        return None
    pipeline = cfg.get('pipeline', ())
    filters = cfg.get('filter_cfg') or {}
    masks = [
        step
        for step in pipeline
        if step.get('type') == 'LoadAnnotations' and step.get('with_mask')
    ]
    return CocoDataset(
        where=where,
        ann_file=_join(root, ann_file),
        data_root=root,
        image_folder=_join(root, cfg.get('data_prefix', {}).get('img', '')),
        classes=_classes(kind, cfg),
        test_mode=cfg.get('test_mode', False),
        min_size=filters.get('min_size', 0),
        filter_empty=filters.get('filter_empty_gt', False),
        turned=all(map(_turns, pipeline)),
        needs_masks=bool(masks),
        polygons_only=any(not step.get('poly2mask', True) for step in masks),
    )


def _turns(step) -> bool:
    """Whether a step, if it loads an image, follows its EXIF orientation."""
    if step.get('type') != 'LoadImageFromFile':
        return True
    return step.get('color_type', 'color') in ('color', 'grayscale') and (
        step.get('imdecode_backend', 'cv2') in ('cv2', 'pillow')
    )


def find_class(cfg):
    """The class that ``type`` names in the default scope or its parents."""
    if not isinstance(cfg['type'], str):
        return cfg['type']
    with DATASETS.switch_scope_and_registry(cfg.get('_scope_')) as registry:
        return registry.get(cfg['type'])


def _reads_coco(kind) -> bool:
    """Whether a dataset class reads its file as mmdet's CocoDataset does."""
    for base in getattr(kind, '__mro__', ()):
        if base.__name__ == 'CocoDataset':
            return kind.load_data_list is base.load_data_list
    return False


def _join(root, path):
    return path if is_abs(path) else osp.join(root, path)


def _classes(kind, cfg) -> tuple:
    metainfo = {**getattr(kind, 'METAINFO', {}), **(cfg.get('metainfo') or {})}
    classes = metainfo.get('classes', ())
    if isinstance(classes, str):
        # As mmengine does: the name of a file with one class a line.
        classes = list_from_file(classes) if osp.isfile(classes) else (classes,)
    return tuple(classes)
