"""What can be known to be wrong before a run starts: files, classes, weights.

===================  =========================================================
``datasets.py``      which COCO-format datasets a config uses, and with what
``coco.py``          an annotation file: readable, consistent, with those classes
``masks.py``         its masks: there, of the image's size, and readable
``usage.py``         how much of it a run uses, and why not the rest
``images.py``        the images that it lists: there, and decodable
``segmentation.py``  folders, pairs and label indices of segmentation datasets
``model.py``         class counts of the heads, and the weights to start from
``work_dir.py``      the folders that the run writes into
===================  =========================================================

It knows formats, not data sets. Every finding names the thing, what was found and
what to do; all findings are reported together. What does no harm is counted.
"""

import logging

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import init_default_scope

from .coco import check_annotations, check_evaluator
from .datasets import find_coco_datasets
from .images import check_images
from .masks import check_masks
from .model import check_class_counts, check_weights
from .segmentation import check_ignored, check_seg_dataset, find_seg_datasets
from .usage import describe_use
from .work_dir import check_folders

__all__ = ['PreflightError', 'check_config', 'check_data', 'log_report']

STAGES = dict(train=('train', 'val'), test=('test',))


class PreflightError(ValueError):
    """What stands in the way of a run, one finding a paragraph."""


def check_config(cfg: Config, stage: str = 'train') -> list:
    """Raise if a run of ``cfg`` is bound to fail or to learn something else.

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
    findings = [*check_folders(cfg), *check_weights(cfg, stage)]
    found, report = _examine(cfg, stage, **cfg.get('preflight', {}))
    _raise_if_any([*findings, *found])
    return report


def check_data(cfg: Config, stage: str = 'train', **options) -> list:
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
    found, report = _examine(cfg, stage, **options)
    _raise_if_any(found)
    return report


def log_report(report: list) -> None:
    """Log what a check returned; after the Runner is built, into its file too."""
    for level, text in report:
        print_log(text, logger='current', level=level)


def _examine(cfg, stage, unused_categories=False, decode=None):
    """Findings, and the report of sound data."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    findings, summary, notes = [], [], []
    for split in STAGES[stage]:
        datasets = find_coco_datasets(cfg, split)
        for dataset in datasets:
            found, clauses, size = _examine_coco(dataset, unused_categories, decode)
            found += check_class_counts(cfg.get('model', {}), dataset)
            findings += [text for text in found if text not in findings]
            summary += [f'{split}: {size}']
            if clauses:
                notes.append(f'{dataset.where}: {"; ".join(clauses)}.')
        datasets_seg, found = find_seg_datasets(cfg, split)
        for dataset in datasets_seg:
            count, texts = check_seg_dataset(dataset, decode)
            summary.append(f'{split}: {count} images, {len(dataset.classes)} classes')
            found += texts + check_class_counts(cfg.get('model', {}), dataset)
        if datasets_seg:
            found += check_ignored(cfg, split)
        findings += [text for text in found if text not in findings]
        if split != 'train':
            findings += check_evaluator(cfg.get(f'{split}_evaluator'), split, datasets)
    report = [(logging.WARNING, note) for note in notes]
    if summary:
        report.append((logging.INFO, f'Preflight passed. {"; ".join(summary)}.'))
    return findings, report


def _examine_coco(dataset, unused_categories, decode):
    """Findings about a dataset, clauses about its use, and its size in words."""
    content, found = check_annotations(dataset, unused_categories)
    if content is None:
        return found, [], ''
    if dataset.needs_masks:
        place = f'{dataset.where}: {dataset.ann_file}'
        found += [f'{place} {text}' for text in check_masks(dataset, content)]
    texts, kinds = check_images(dataset, content['images'], decode)
    size = (
        f'{len(content["images"])} images, '
        f'{len(content.get("annotations", ()))} annotations, '
        f'{len(dataset.classes)} classes'
    )
    found += texts
    return found, [] if found else [*describe_use(dataset, content), *kinds], size


def _raise_if_any(findings):
    if findings:
        count = '1 problem' if len(findings) == 1 else f'{len(findings)} problems'
        raise PreflightError(
            f'{count} found before the run:\n\n' + '\n\n'.join(findings)
        )
