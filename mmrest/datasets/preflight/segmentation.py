"""Check segmentation datasets: folders, pairs of image and labels, label indices."""

import os.path as osp
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from mmengine.registry import DATASETS
from mmengine.utils import scandir
from PIL import Image

from ...utils.config_types import find_type, type_name
from ...utils.text import shorten
from .images import DECODE_ERRORS, ImageError, file_sizes, inspect_image, spread
from .reading import (
    bases,
    find_classes,
    find_datasets,
    find_steps,
    is_remote,
    join,
    options_of,
    walk,
)

KINDS = dict(img_path='image', seg_map_path='label')
Pair = tuple[str, str]


@dataclass(frozen=True)
class SegDataset:
    """A dataset of mmseg in a config."""

    where: str  # its place in the config, e.g. ``train_dataloader.dataset``
    classes: tuple[str, ...]  # class names, in the order of the labels
    # built without list of images and pipeline; None if it cannot be built
    source: Any
    fault: str  # why it cannot be built
    ignored: int  # the label that the heads ignore

    @property
    def things(self) -> tuple[str, ...]:
        """As in :class:`.coco.CocoDataset`."""
        return self.classes


def find_seg_datasets(cfg: Any, split: str) -> list[SegDataset]:
    """List the segmentation datasets of a split.

    Datasets that are not in the file system, or whose pipeline does not load labels, or
    loads images by other steps than mmcv's, are left out.
    """
    return [
        _describe(where, leaf, ignored_label(cfg))
        for where, leaf in find_datasets(cfg, split)
        if 'BaseSegDataset' in bases(leaf, DATASETS)
        and find_steps(leaf, 'LoadAnnotations')
        and find_steps(leaf, 'LoadImageFromFile')
        and not is_remote(leaf)
    ]


def _describe(where: str, leaf: dict, ignored: int) -> SegDataset:
    prefix = leaf.get('data_prefix') or {}
    classes, source, fault = find_classes(leaf), None, ''
    for key, kind in KINDS.items():
        folder = join(leaf.get('data_root'), prefix.get(key))
        if not fault and not (prefix.get(key) and osp.isdir(folder)):
            place = osp.abspath(folder) if prefix.get(key) else f'data_prefix.{key}'
            fault = (
                f'the {kind} folder {place} does not exist. Put the data there, or set '
                f'{where}.data_root and {where}.data_prefix.{key} (relative paths '
                'start at the current folder).'
            )
    if not fault:
        built: Any = find_type(leaf, DATASETS)
        options = {**options_of(leaf), 'pipeline': [], 'lazy_init': True}
        try:
            source = built(**options)
            classes = tuple(source.metainfo.get('classes') or ())
        except (AssertionError, ValueError, OSError) as error:
            fault = f'{built.__name__} cannot be built: {error}.'
    return SegDataset(where, classes, source, fault, ignored)


def ignored_label(cfg: Any) -> int:
    """Return ``ignore_index`` of the (last) decode head."""
    head = (cfg.get('model') or {}).get('decode_head') or {}
    head = head[-1] if isinstance(head, (list, tuple)) else head
    return head.get('ignore_index', 255)


def check_seg_dataset(
    dataset: SegDataset, decode: Optional[int] = None
) -> tuple[int, list[str]]:
    """Find problems that make a dataset fail, or mislabel pixels.

    Returns the number of images, and findings. For ``decode`` see
    :func:`.images.spread`.
    """
    pairs: list[Pair] = []
    found = [dataset.fault] if dataset.fault else []
    if not found:
        pairs, found = _list_pairs(dataset)
    if not found:
        there = [
            [size is not None for size in file_sizes(list(paths))]
            for paths in zip(*pairs)
        ]
        whole = [pair for pair, *both in zip(pairs, *there) if all(both)]
        found = [
            *_check_lost(dataset, pairs, there),
            *_check_unused(dataset, pairs),
            *_check_sample(dataset, spread(whole, decode)),
        ]
    return len(pairs), [f'{dataset.where}: {text}' for text in found]


def check_ignored(cfg: Any, split: str) -> Iterator[str]:
    """Check that padding and metric ignore the same label as the heads."""
    ignored = ignored_label(cfg)
    part = (cfg.get('model') or {}).get('data_preprocessor') or {}
    padded = part.get('seg_pad_val', 255)
    pads = part.get('size') or part.get('size_divisor')
    if split == 'train' and type_name(part) == 'SegDataPreProcessor' and pads:
        if padded != ignored:
            yield (
                f'model.data_preprocessor.seg_pad_val is {padded}, but the heads leave '
                f'out {ignored}, so padding would count as a class. Set --cfg-options '
                f'model.data_preprocessor.seg_pad_val={ignored}.'
            )
    where = f'{split}_evaluator'
    for place, metric in walk(cfg.get(where), where):
        left_out = metric.get('ignore_index', 255)
        if type_name(metric) == 'IoUMetric' and left_out != ignored:
            yield (
                f'{place}: IoUMetric leaves out the label {left_out}, but the heads '
                f'leave out {ignored}, so pixels without a class would be evaluated. '
                f'Set {place}.ignore_index={ignored}.'
            )


def _list_pairs(dataset: SegDataset) -> tuple[list[Pair], list[str]]:
    """Return all pairs (image, label image), and why there are none."""
    source = dataset.source
    try:
        listed = source.load_data_list()
    except (AssertionError, OSError) as error:
        return [], [f'its list of images cannot be read: {error}.']
    if listed:
        return [(item['img_path'], item['seg_map_path']) for item in listed], []
    folder = source.data_prefix['img_path']
    ends = {osp.splitext(name)[1] for name in scandir(folder, recursive=True)}
    return [], [
        f'no file in {folder} ends in {source.img_suffix}; found '
        f'{shorten(sorted(ends)) or "nothing"}. Set {dataset.where}.img_suffix.'
    ]


def _check_lost(
    dataset: SegDataset, pairs: list[Pair], there: list[list[bool]]
) -> Iterator[str]:
    for index, what in ((0, 'images'), (1, 'label images')):
        lost = [pair for pair, found in zip(pairs, there[index]) if not found]
        if lost:
            yield (
                f'{len(lost)} {what} are missing: '
                f'{shorten(pair[index] for pair in lost)} (for {lost[0][1 - index]}, '
                '...). Add them, remove their partners, or correct '
                f'{dataset.where}.img_suffix={dataset.source.img_suffix!r} and '
                f'.seg_map_suffix={dataset.source.seg_map_suffix!r}.'
            )


def _check_unused(dataset: SegDataset, pairs: list[Pair]) -> Iterator[str]:
    """Find label images without an image, if the folders define the dataset."""
    source = dataset.source
    if source.ann_file:
        return
    folder = source.data_prefix['seg_map_path']
    used = {osp.abspath(label) for _, label in pairs}
    labels = scandir(folder, source.seg_map_suffix, recursive=True)
    paths = (osp.join(folder, name) for name in labels)
    unused = sorted(path for path in paths if osp.abspath(path) not in used)
    if unused:
        yield (
            f'{len(unused)} label images have no image that ends in '
            f'{source.img_suffix} and would not be used: {shorten(unused)}. Add the '
            'images, or name those to use, one a line, in '
            f'{dataset.where}.ann_file.'
        )


def _check_sample(dataset: SegDataset, sample: list[Pair]) -> Iterator[str]:
    count = len(dataset.classes)
    trained = {value: _as_trained(dataset.source, value) for value in range(256)}
    classes = {value for value, label in trained.items() if 0 <= label < count}
    ignored = [value for value, label in trained.items() if label == dataset.ignored]
    bad, outside, learnable = [], [], not sample
    for image, label in sample:
        try:
            values = _read_labels(image, label)
        except ImageError as error:
            bad.append(str(error))
            continue
        wrong = sorted(values - classes - set(ignored))
        if wrong:
            outside.append(f'{label} holds {shorten(wrong)}')
        learnable = learnable or bool(values & classes)
    if bad:
        yield (
            f'{len(bad)} of {len(sample)} decoded pairs are unusable: '
            f'{"; ".join(bad[:5])}. Correct them, or remove both files of each.'
        )
    if outside and count:
        yield (
            f'{len(outside)} of {len(sample)} label images hold an index that is no '
            f'class: {"; ".join(outside[:5])}. The {count} classes are '
            f'{min(classes)} to {max(classes)}; ignored: {shorten(ignored) or "none"}. '
            'Correct the files, metainfo.classes or reduce_zero_label of the '
            'datasets, or ignore_index of the heads and the metric.'
        )
    elif not bad and not learnable:
        yield (
            f'no pixel of the {len(sample)} decoded label images is of a class. Give '
            'label images whose pixels are class indices.'
        )


def _as_trained(source: Any, value: int) -> int:
    """The training label of a value in a file."""
    if source.reduce_zero_label:
        value = 255 if value in (0, 255) else value - 1
    return (source.label_map or {}).get(value, value)


def _read_labels(image: str, label: str) -> set[int]:
    """Return the values of a label image, after checking that it fits its image."""
    try:
        with Image.open(label) as opened:
            values = np.array(opened).squeeze()
    except DECODE_ERRORS as error:
        raise ImageError(f'{label} cannot be decoded ({error})') from error
    if values.ndim != 2:
        raise ImageError(
            f'{label} is a colour picture ({values.shape[-1]} values a pixel), but '
            'pixels must be class indices'
        )
    try:
        size = inspect_image(image).size
    except ImageError as error:
        raise ImageError(f'{image} {error}') from error
    if size != values.shape[::-1]:
        raise ImageError(
            f'{image} is {size[0]}x{size[1]} pixels, but {label} is '
            f'{values.shape[1]}x{values.shape[0]}'
        )
    return set(np.unique(values).tolist())
