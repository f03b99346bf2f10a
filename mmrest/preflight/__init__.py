"""What can be known to be wrong before a run starts: files, classes, weights.

===================  =========================================================
``datasets.py``      which COCO-format datasets a config uses, and with what
``coco.py``          an annotation file: readable, consistent, with those classes
``images.py``        the images that it lists: there, and decodable
``segmentation.py``  folders, pairs and label indices of segmentation datasets
``model.py``         class counts of the heads, and the weights to start from
===================  =========================================================

It knows formats, not data sets. Every finding names the thing, what was found and
what to do; all findings are reported together.
"""

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import init_default_scope

from .coco import check_annotations, check_evaluator
from .datasets import find_coco_datasets
from .images import check_images
from .model import check_class_counts, check_weights
from .segmentation import check_ignored, check_seg_dataset, find_seg_datasets

__all__ = ['PreflightError', 'check_config', 'check_data']

STAGES = dict(train=('train', 'val'), test=('test',))


class PreflightError(ValueError):
    """What stands in the way of a run, one finding a paragraph."""


def check_config(cfg: Config, stage: str = 'train') -> None:
    """Raise if a run of ``cfg`` is bound to fail or to learn something else.

    The config field ``preflight`` may change the check:
    ``preflight=dict(unused_categories=True, decode=0)``, see :func:`check_data`.

    Args:
        cfg (Config): A whole config, with command line options merged.
        stage (str): ``train`` (training and validation data) or ``test``.

    Raises:
        PreflightError: With every finding.
    """
    findings = [
        *check_weights(cfg, stage),
        *_findings(cfg, stage, **cfg.get('preflight', {})),
    ]
    _report(findings)


def check_data(cfg: Config, stage: str = 'train', **options) -> None:
    """Raise if the datasets of ``cfg`` are incomplete or do not fit it.

    Args:
        cfg (Config): A config; parts other than the data may be missing.
        stage (str): ``train`` (training and validation data) or ``test``.
        unused_categories (bool): Allow annotations of categories that are not
            among the config's classes; they are left out. Defaults to False.
        decode (int | None): How many images of a dataset to decode, evenly
            spread. Defaults to None: all where there are at most 500, else 100.

    Raises:
        PreflightError: With every finding.
    """
    _report(_findings(cfg, stage, **options))


def _findings(cfg, stage, unused_categories=False, decode=None):
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    findings, summary = [], []
    for split in STAGES[stage]:
        datasets = find_coco_datasets(cfg, split)
        for dataset in datasets:
            content, found = check_annotations(dataset, unused_categories)
            if content is not None:
                found += check_images(dataset, content['images'], decode)
                summary.append(
                    f'{split}: {len(content["images"])} images, '
                    f'{len(content.get("annotations", ()))} annotations, '
                    f'{len(dataset.classes)} classes'
                )
            found += check_class_counts(cfg.get('model', {}), dataset)
            findings += [text for text in found if text not in findings]
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
    if summary and not findings:
        print_log(f'Preflight passed. {"; ".join(summary)}.', logger='current')
    return findings


def _report(findings):
    if findings:
        count = '1 problem' if len(findings) == 1 else f'{len(findings)} problems'
        raise PreflightError(
            f'{count} found before the run:\n\n' + '\n\n'.join(findings)
        )
