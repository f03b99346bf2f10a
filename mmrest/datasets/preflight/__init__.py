"""What can be known to be wrong before a run starts: files, classes, weights.

===================  =========================================================
``reading.py``       a config's datasets without wrappers, parts by their class
``coco.py``          an annotation file: readable, consistent, with those classes
``masks.py``         its masks: there, of the image's size, and readable
``usage.py``         how much of it a run uses, and why not the rest
``images.py``        the images that it lists: there, and decodable
``evaluators.py``    the annotation files that metrics read
``segmentation.py``  folders, pairs and label indices of segmentation datasets
``model.py``         class counts of the heads, and the weights to start from
``schedule.py``      loop, sampler, schedules and hooks count in the same unit
``work_dir.py``      the folders that the run writes into
===================  =========================================================

It knows formats, not data sets. Every finding names the thing, what was found and
what to do; all findings are reported together. What does no harm is counted.
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
from .coco import CocoDataset, check_annotations, find_coco_datasets
from .evaluators import check_evaluators, find_evaluators, with_evaluation
from .images import check_images
from .model import check_class_counts, check_weights
from .reading import check_class_text
from .schedule import check_loaders, check_units
from .segmentation import check_ignored, check_seg_dataset, find_seg_datasets
from .usage import describe_use
from .work_dir import check_folders

__all__ = ['PreflightError', 'check_config', 'check_data', 'log_report']

STAGES = dict(train=('train', 'val'), test=('test',))
Report = list[tuple[int, str]]


class PreflightError(ValueError):
    """What stands in the way of a run, one finding a paragraph."""


def check_config(cfg: Config, stage: str = 'train') -> Report:
    """Raise if a run of ``cfg`` is bound to fail or to learn something else.

    A run that is resumed (``cfg.resume``) does not read its data files again; they
    were checked when it began.

    The config field ``preflight`` may change the check:
    ``preflight=dict(unused_categories=True, decode=0)``, see :func:`check_data`.

    Args:
        cfg (Config): A whole config, with command line options merged.
        stage (str): ``train`` (training and validation data) or ``test``.

    Returns:
        list[tuple[int, str]]: What was found in order, and what of the data is not
        used or is converted, for :func:`log_report`.

    Raises:
        PreflightError: With every finding.
    """
    init_default_scope(find_toolbox(cfg) or 'mmengine')
    clashes, notes = check_units(cfg) if stage == 'train' else ([], [])
    options = dict(cfg.get('preflight') or {}, read=not cfg.get('resume'))
    with _uncollected():
        in_data, report = _examine(cfg, stage, **options)
    found = [
        *check_folders(cfg),
        *check_weights(cfg, stage),
        *check_loaders(cfg, STAGES[stage]),
        *clashes,
        *in_data,
    ]
    _raise_if_any(found, 'To start without this check, add --no-preflight.')
    return [(logging.WARNING, note) for note in notes] + report


def check_data(cfg: Config, stage: str = 'train', **options: Any) -> Report:
    """Raise if the datasets of ``cfg`` are incomplete or do not fit it.

    Args:
        cfg (Config): A config; parts other than the data may be missing.
        stage (str): ``train`` (training and validation data) or ``test``.
        unused_categories (bool): Allow annotations of categories that are not
            among the config's classes; they are left out. Defaults to False.
        decode (int | None): How many images of a dataset to decode, evenly
            spread. Defaults to None: all where there are at most 500, else 100.

    Returns:
        list[tuple[int, str]]: As :func:`check_config`.

    Raises:
        PreflightError: With every finding.
    """
    init_default_scope(find_toolbox(cfg) or 'mmengine')
    with _uncollected():
        found, report = _examine(cfg, stage, **options)
    _raise_if_any(found)
    return report


def log_report(report: Report) -> None:
    """Log what a check returned; after the Runner is built, into its file too."""
    for level, text in report:
        print_log(text, logger='current', level=level)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from looking through millions of objects for garbage."""
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
    """Findings, and the report of sound data; without ``read`` no file is opened."""
    model = cfg.get('model') or {}
    findings: list[str] = []
    summary: list[str] = []
    report: Report = []
    for split in STAGES[stage]:
        texts = list(check_class_text(cfg, split))
        findings += texts
        if texts:  # the classes are not what was meant
            continue
        evaluators = find_evaluators(cfg, split) if split != 'train' else []
        contents = []
        for dataset in find_coco_datasets(cfg, split):
            dataset = with_evaluation(dataset, evaluators)
            found, content = list(_find_files(dataset)), None
            if read and osp.isfile(dataset.ann_file):
                content, texts = check_annotations(dataset, unused_categories)
                found += texts
            kinds: list[str] = []
            if content and osp.isdir(dataset.image_folder):
                texts, kinds = check_images(dataset, content.images, decode)
                found += texts
            if content:
                summary.append(
                    f'{split}: {len(content.images)} images, {len(content.ids)} '
                    f'annotations, {len(dataset.classes)} classes'
                )
            if content and not found:
                clauses = '; '.join([*describe_use(dataset, content), *kinds])
                if clauses:
                    report.append((logging.WARNING, f'{dataset.where}: {clauses}.'))
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


def _find_files(dataset: CocoDataset) -> Iterator[str]:
    """Whether the annotation file and the folder of images exist."""
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
