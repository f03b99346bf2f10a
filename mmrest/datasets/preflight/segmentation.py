"""Segmentation datasets: folders, pairs of image and label image, label indices."""

import os.path as osp
from collections import Counter
from dataclasses import dataclass
from typing import Optional

import numpy as np
from mmengine.utils import scandir
from PIL import Image

from .coco import shown
from .datasets import find_class, leaves
from .images import ALL_UP_TO, SAMPLE

EXIF_ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class SegDataset:
    """One dataset of mmseg as a config describes it.

    Attributes:
        where (str): Its place in the config, e.g. ``train_dataloader.dataset``.
        source (BaseSegDataset): Built without its list of images and its pipeline.
        classes (tuple[str]): Class names, in the order of the labels.
        ignored (int | None): The label that the heads leave out.
    """

    where: str
    source: object
    classes: tuple
    ignored: Optional[int]


def find_seg_datasets(cfg, split: str):
    """List the segmentation datasets of a split, wrappers taken off.

    Datasets on other storage than the file system, and those whose pipeline loads
    no labels, are passed over.

    Args:
        cfg (Config): A config.
        split (str): ``train``, ``val`` or ``test``.

    Returns:
        tuple[list[SegDataset], list[str]]: Datasets, and findings about those that
        mmseg refuses to build.
    """
    name = f'{split}_dataloader'
    dataset = (cfg.get(name) or {}).get('dataset')
    datasets, found = [], []
    for where, leaf in leaves(dataset, f'{name}.dataset') if dataset else ():
        kind = find_class(leaf)
        names = [base.__name__ for base in getattr(kind, '__mro__', ())]
        loads = any(
            step.get('type') == 'LoadAnnotations' for step in leaf.get('pipeline', ())
        )
        remote = leaf.get('backend_args') or '://' in (leaf.get('data_root') or '')
        if 'BaseSegDataset' not in names or not loads or remote:
            continue
        options = {key: value for key, value in leaf.items() if key != 'type'}
        options.update(pipeline=[], lazy_init=True)
        try:
            source = kind(**options)
        except (AssertionError, ValueError, OSError) as error:
            found.append(f'{where}: {kind.__name__} cannot be built: {error}.')
            continue
        classes = tuple(source.metainfo.get('classes') or ())
        datasets.append(SegDataset(where, source, classes, ignored_label(cfg)))
    return datasets, found


def ignored_label(cfg) -> Optional[int]:
    """The ``ignore_index`` of the (last) decode head."""
    head = cfg.get('model', {}).get('decode_head') or {}
    head = head[-1] if isinstance(head, (list, tuple)) else head
    return head.get('ignore_index', 255)


def check_seg_dataset(dataset: SegDataset, decode: Optional[int] = None):
    """Look for what makes a dataset fail, or label pixels wrongly.

    Args:
        dataset (SegDataset): From :func:`find_seg_datasets`.
        decode (int | None): How many pairs to decode, evenly spread. Defaults to
            None: all where there are at most 500, else 100.

    Returns:
        tuple[int, list[str]]: Number of images, and findings.
    """
    pairs, found = _pairs(dataset)
    if found:
        return len(pairs), [f'{dataset.where}: {text}' for text in found]
    whole, lost = _split(dataset, pairs)
    found = [*_check_lost(dataset, lost), *_check_unused(dataset, pairs)]
    if decode is None:
        decode = len(whole) if len(whole) <= ALL_UP_TO else SAMPLE
    count = min(decode, len(whole))
    sample = [whole[index * len(whole) // count] for index in range(count)]
    found += _check_sample(dataset, sample)
    return len(pairs), [f'{dataset.where}: {text}' for text in found]


def check_ignored(cfg, split: str) -> list:
    """Check that padding and metric leave out the label that the heads leave out.

    Args:
        cfg (Config): A config.
        split (str): ``train``, ``val`` or ``test``.

    Returns:
        list[str]: Findings.
    """
    ignored, found = ignored_label(cfg), []
    if split == 'train':
        part = cfg.get('model', {}).get('data_preprocessor') or {}
        padded = part.get('seg_pad_val', 255)
        pads = part.get('size') or part.get('size_divisor')
        if part.get('type') == 'SegDataPreProcessor' and pads and padded != ignored:
            found.append(
                f'model.data_preprocessor.seg_pad_val is {padded}, but the heads leave '
                f'out {ignored}, so padding would count as a class. Set --cfg-options '
                f'model.data_preprocessor.seg_pad_val={ignored}.'
            )
        return found
    evaluator = cfg.get(f'{split}_evaluator')
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        left_out = (metric or {}).get('ignore_index', 255)
        if (metric or {}).get('type') == 'IoUMetric' and left_out != ignored:
            found.append(
                f'{split}_evaluator: IoUMetric leaves out the label {left_out}, but '
                f'the heads leave out {ignored}, so predictions would be judged where '
                f'there is no class. Set {split}_evaluator.ignore_index={ignored}.'
            )
    return found


def _pairs(dataset):
    """All (image, label image), or why there are none."""
    source, where = dataset.source, dataset.where
    prefix = source.data_prefix
    for key, what in (('img_path', 'image'), ('seg_map_path', 'label')):
        folder = prefix.get(key)
        if not folder or not osp.isdir(folder):
            place = osp.abspath(folder) if folder else f'data_prefix.{key}'
            return [], [
                f'the {what} folder {place} does not exist. Put the data there, or '
                f'set {where}.data_root and {where}.data_prefix.{key} (relative paths '
                'start at the current folder).'
            ]
    try:
        listed = source.load_data_list()
    except (AssertionError, OSError) as error:
        return [], [f'its list of images cannot be read: {error}.']
    if not listed:
        ends = Counter(osp.splitext(name)[1] for name in _names(prefix['img_path']))
        return [], [
            f'no file in {prefix["img_path"]} ends in {source.img_suffix}; found '
            f'{shown(sorted(ends)) or "nothing"}. Set {where}.img_suffix.'
        ]
    return [(item['img_path'], item['seg_map_path']) for item in listed], []


def _names(folder):
    return list(scandir(folder, recursive=True))


def _split(dataset, pairs):
    """Pairs of which both files are there, and the others."""
    # One listing a folder: asking for every file is slow on network disks.
    there = set()
    for key in ('img_path', 'seg_map_path'):
        folder = dataset.source.data_prefix[key]
        there.update(osp.join(folder, name) for name in _names(folder))
    whole, lost = [], []
    for pair in pairs:
        missing = [path for path in pair if path not in there and not osp.isfile(path)]
        (lost if missing else whole).append(pair)
    return whole, lost


def _check_lost(dataset, lost):
    for index, what in ((0, 'images'), (1, 'label images')):
        missing = [pair[index] for pair in lost if not osp.isfile(pair[index])]
        if missing:
            other = lost[0][1 - index]
            yield (
                f'{len(missing)} {what} are missing: {shown(missing)} (for '
                f'{other}, ...). Add them, remove their partners, or correct '
                f'{dataset.where}.img_suffix={dataset.source.img_suffix!r} and '
                f'.seg_map_suffix={dataset.source.seg_map_suffix!r}.'
            )


def _check_unused(dataset, pairs):
    """Label images that no image belongs to, where the folders are the list."""
    source = dataset.source
    if source.ann_file:
        return
    folder = source.data_prefix['seg_map_path']
    used = {osp.abspath(label) for _, label in pairs}
    unused = [
        osp.join(folder, name)
        for name in _names(folder)
        if name.endswith(source.seg_map_suffix)
        and osp.abspath(osp.join(folder, name)) not in used
    ]
    if unused:
        yield (
            f'{len(unused)} label images have no image that ends in '
            f'{source.img_suffix} and would not be used: {shown(sorted(unused))}. Add '
            'the images, or name those to use, one a line, in '
            f'{dataset.where}.ann_file.'
        )


def _check_sample(dataset, sample):
    bad, outside, learnable = [], [], not sample
    classes = {value for value in range(256) if _is_class(dataset, value)}
    ignored = [v for v in range(256) if _as_trained(dataset, v) == dataset.ignored]
    for image, label in sample:
        fault, values = _read_pair(image, label)
        if fault:
            bad.append(fault)
            continue
        wrong = sorted(values - classes - set(ignored))
        if wrong:
            outside.append(f'{label} holds {shown(wrong)}')
        learnable = learnable or bool(values & classes)
    if bad:
        yield (
            f'{len(bad)} of {len(sample)} decoded pairs are unusable: '
            f'{"; ".join(bad[:5])}. Correct them, or remove both files of each.'
        )
    if outside and dataset.classes:
        yield (
            f'{len(outside)} of {len(sample)} label images hold an index that is no '
            f'class: {"; ".join(outside[:5])}. The {len(dataset.classes)} classes are '
            f'{min(classes)} to {max(classes)}; ignored: {shown(ignored) or "none"}. '
            'Correct the files, metainfo.classes or reduce_zero_label of the '
            'datasets, or ignore_index of the heads and the metric.'
        )
    elif not bad and not learnable:
        yield (
            f'no pixel of the {len(sample)} decoded label images is of a class. Give '
            'label images whose pixels are class indices.'
        )


def _read_pair(image, label):
    """What is wrong with a pair (or None), and the values of the label image."""
    try:
        with Image.open(label) as opened:
            values = np.array(opened).squeeze()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f'{label} cannot be decoded ({error})', ()
    if values.ndim != 2:
        return (
            f'{label} is a colour picture ({values.shape[-1]} values a pixel), but '
            'pixels must be class indices'
        ), ()
    try:
        with Image.open(image) as opened:
            size = opened.size
            if opened.getexif().get(EXIF_ORIENTATION) in TURNED:
                size = size[::-1]  # as it is loaded
            opened.draft('RGB', (size[0] // 8, size[1] // 8))  # fast for JPEG
            opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f'{image} cannot be decoded ({error})', ()
    if size != values.shape[::-1]:
        return (
            f'{image} is {size[0]}x{size[1]} pixels, but {label} is '
            f'{values.shape[1]}x{values.shape[0]}'
        ), ()
    return None, set(np.unique(values).tolist())


def _as_trained(dataset, value):
    """The label that a value of a file becomes, or None if there is none."""
    source = dataset.source
    if not 0 <= value <= 255:
        return None  # label images are read as 8 bits
    if source.reduce_zero_label:
        value = 255 if value in (0, 255) else value - 1
    return (source.label_map or {}).get(value, value)


def _is_class(dataset, value):
    label = _as_trained(dataset, value)
    return label is not None and 0 <= label < len(dataset.classes)
