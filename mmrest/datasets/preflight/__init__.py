"""Checks before a run: files, classes, weights.

===================  =========================================================
``reading.py``       read a config: datasets without wrappers, classes of parts
``coco.py``          annotation files: readable, consistent, with the right classes
``masks.py``         masks: present, of the image's size, and readable
``usage.py``         how much of the annotations a run uses
``images.py``        images: present and decodable
``evaluators.py``    annotation files of metrics
``segmentation.py``  folders, pairs and label indices of segmentation datasets
``model.py``         class counts of the heads, and pretrained weights
``schedule.py``      loop, sampler, schedules and hooks: epochs or iterations
``work_dir.py``      folders that the run writes into: writable, of no earlier run
===================  =========================================================

The checks know formats, not data sets. A finding names the subject, what was found and
what to do. All findings are reported together. Harmless differences are counted.
"""

import gc
import logging
import os.path as osp
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import init_default_scope

from ...utils.config_types import find_toolbox
from .coco import CocoDataset, Content, check_annotations, find_coco_datasets
from .evaluators import check_evaluators, find_evaluators, with_evaluation
from .images import check_images
from .model import (
    check_backbones,
    check_class_counts,
    check_unused_maps,
    check_weights,
)
from .reading import check_class_text
from .schedule import check_loaders, check_units
from .segmentation import check_ignored, check_seg_dataset, find_seg_datasets
from .usage import describe_use
from .work_dir import check_folders, note_checkpoints

__all__ = ['PreflightError', 'check_config', 'check_data', 'log_report']

STAGES = dict(train=('train', 'val'), test=('test',))
Report = list[tuple[int, str]]


class PreflightError(ValueError):
    """Problems of a run, one per paragraph."""


def check_config(cfg: Config, stage: str = 'train') -> Report:
    """Raise an error if a run of ``cfg`` would fail, or learn something unintended.

    A resumed run (``cfg.resume``) does not read its data files again; they were checked
    when it began.

    The config field ``preflight`` may change the check, see :func:`check_data`, for
    example ``preflight=dict(unused_categories=True, decode=0)``.

    Args:
        cfg (Config): A whole config, with command line options merged.
        stage (str): ``train`` (training and validation data) or ``test``.

    Returns:
        list[tuple[int, str]]: Levels and texts for :func:`log_report`: what was
        checked, and which data are not used or converted.

    Raises:
        PreflightError: With all findings.
    """
    init_default_scope(find_toolbox(cfg) or 'mmengine')
    clashes, notes = check_units(cfg) if stage == 'train' else ([], [])
    notes += note_checkpoints(cfg) if stage == 'train' else []
    options = dict(cfg.get('preflight') or {}, read=not cfg.get('resume'))
    with _uncollected():
        in_data, report = _examine(cfg, stage, **options)
    found = [
        *check_folders(cfg),
        *check_backbones(cfg.get('model') or {}),
        *(check_unused_maps(cfg) if stage == 'train' else ()),
        *check_weights(cfg, stage),
        *check_loaders(cfg, STAGES[stage]),
        *clashes,
        *in_data,
    ]
    _raise_if_any(found, 'To start without this check, add --no-preflight.')
    return [(logging.WARNING, note) for note in notes] + report


def check_data(cfg: Config, stage: str = 'train', **options: Any) -> Report:
    """Raise an error if the datasets of ``cfg`` are incomplete or do not fit it.

    Args:
        cfg (Config): A config; parts other than the data may be missing.
        stage (str): ``train`` (training and validation data) or ``test``.
        unused_categories (bool): Whether annotations may have categories that are not
            classes of the config; these are ignored. Default: False.
        decode (int | None): How many images of a dataset to decode, evenly
            spread. Default: None, all of up to 500, else 100.

    Returns:
        list[tuple[int, str]]: As :func:`check_config`.

    Raises:
        PreflightError: With all findings.
    """
    init_default_scope(find_toolbox(cfg) or 'mmengine')
    with _uncollected():
        found, report = _examine(cfg, stage, **options)
    _raise_if_any(found)
    return report


def log_report(report: Report) -> None:
    """Log the result of a check; once the Runner is built, also to its file."""
    for level, text in report:
        print_log(text, logger='current', level=level)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection, which is slow with millions of objects."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _examine(
    cfg: Config,
    stage: str,
    unused_categories: bool = False,
    decode: Optional[int] = None,
    read: bool = True,
) -> tuple[list[str], Report]:
    """Return findings, and a report; without ``read`` no file is opened."""
    model = cfg.get('model') or {}
    findings: list[str] = []
    summary: list[str] = []
    report: Report = []
    for split in STAGES[stage]:
        texts = list(check_class_text(cfg, split))
        findings += texts
        if texts:  # the classes are wrong
            continue
        evaluators = find_evaluators(cfg, split) if split != 'train' else []
        contents = []
        for dataset in find_coco_datasets(cfg, split):
            dataset = with_evaluation(dataset, evaluators)
            found = list(_find_files(dataset))
            content, use = None, ''
            if read and osp.isfile(dataset.ann_file):
                content, texts, use = _examine_coco(dataset, unused_categories, decode)
                found += texts
            if content:
                summary.append(
                    f'{split}: {len(content.images)} images, {len(content.ids)} '
                    f'annotations, {len(dataset.classes)} classes'
                )
            if use and not found:
                report.append((logging.WARNING, f'{dataset.where}: {use}.'))
            contents.append((dataset, content))
            findings += [*found, *check_class_counts(model, dataset)]
        seg_datasets = find_seg_datasets(cfg, split)
        for seg_dataset in seg_datasets:
            if read:
                count, found = check_seg_dataset(seg_dataset, decode)
                findings += found
                summary.append(
                    f'{split}: {count} images, {len(seg_dataset.classes)} classes'
                )
            findings += check_class_counts(model, seg_dataset)
        findings += check_ignored(cfg, split) if seg_datasets else []
        findings += check_evaluators(evaluators, contents)
    if summary:
        report.append((logging.INFO, f'Preflight passed. {"; ".join(summary)}.'))
    elif not read:
        report.append((logging.INFO, 'Preflight passed; a resumed run reads no data.'))
    return findings, report


def _examine_coco(
    dataset: CocoDataset, unused_categories: bool, decode: Optional[int]
) -> tuple[Optional[Content], list[str], str]:
    """Return the content of an annotation file, findings, and how a run uses it."""
    content, found = check_annotations(dataset, unused_categories)
    kinds: list[str] = []
    if content and osp.isdir(dataset.image_folder):
        texts, kinds = check_images(dataset, content.images, decode)
        found += texts
    if content is None or found:
        return content, found, ''
    return content, found, '; '.join([*describe_use(dataset, content), *kinds])


def _find_files(dataset: CocoDataset) -> Iterator[str]:
    """Check that the annotation file and the image folder exist."""
    where, path, root = dataset.where, dataset.ann_file, dataset.data_root
    if not osp.isfile(path):
        kind = 'is a folder' if osp.isdir(path) else 'does not exist'
        if root and not osp.isdir(root):
            kind += f', nor does its data_root {root}'
        yield (
            f'{where}: the annotation file {osp.abspath(path)} {kind}. Put the '
            f'data there, or set {where}.data_root, .ann_file and .data_prefix.img '
            '(relative paths start at the current folder).'
        )
    elif not osp.isdir(dataset.image_folder):
        yield (
            f'{where}: the image folder {osp.abspath(dataset.image_folder)} does not '
            f'exist. Put the images there, or set {where}.data_prefix.img.'
        )


def _raise_if_any(findings: Iterable[str], advice: str = '') -> None:
    findings = list(dict.fromkeys(findings))
    if findings:
        count = '1 problem' if len(findings) == 1 else f'{len(findings)} problems'
        texts = [f'{count} found before the run:', *findings, advice]
        raise PreflightError('\n\n'.join(texts).rstrip())
