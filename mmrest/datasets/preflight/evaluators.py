"""COCO's evaluation: it reads an annotation file of its own."""

import os.path as osp
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

from mmengine.registry import METRICS

from ...utils.config_types import find_type
from ...utils.text import shorten
from .coco import CocoDataset, Content, check_annotations
from .masks import check_masks
from .reading import bases, walk


@dataclass(frozen=True)
class Evaluator:
    """A metric that reads an annotation file.

    Attributes:
        where (str): Its place in the config, e.g. ``val_evaluator.1``.
        ann_file (str): Path of the file; empty if it takes the dataset's objects.
        coco (bool): Whether it is COCO's evaluation of instances.
        masks (bool): Whether it compares masks.
    """

    where: str
    ann_file: str
    coco: bool
    masks: bool


def find_evaluators(cfg: Any, split: str) -> list[Evaluator]:
    """List the metrics of a split that read an annotation file from the file system."""
    found = []
    where = f'{split}_evaluator'
    for place, metric in walk(cfg.get(where), where):
        path = str(metric.get('ann_file') or '')
        if metric.get('backend_args') or '://' in path:
            continue
        base: Any = bases(metric, METRICS).get('CocoMetric')
        kind: Any = find_type(metric, METRICS)
        coco = (
            base is not None
            and kind.compute_metrics is base.compute_metrics
            and not metric.get('format_only')
        )
        names = metric.get('metric') or ()
        names = [names] if isinstance(names, str) else names
        if path or coco:
            found.append(Evaluator(place, path, coco, coco and 'segm' in names))
    return found


def with_evaluation(dataset: CocoDataset, evaluators: list[Evaluator]) -> CocoDataset:
    """Add to a dataset what the metrics need that read its annotation file."""
    own = [
        evaluator
        for evaluator in evaluators
        if evaluator.coco
        and (not evaluator.ann_file or _is_same(evaluator.ann_file, dataset.ann_file))
    ]
    return replace(
        dataset,
        needs_masks=dataset.needs_masks or any(evaluator.masks for evaluator in own),
        judged=any(evaluator.ann_file for evaluator in own),
    )


def check_evaluators(
    evaluators: list[Evaluator], read: list[tuple[CocoDataset, Optional[Content]]]
) -> Iterator[str]:
    """Check that metrics judge by the annotations of the images they are given."""
    for evaluator in evaluators:
        path, where = evaluator.ann_file, f'{evaluator.where}.ann_file'
        files = [dataset.ann_file for dataset, _ in read]
        # an absent file of a dataset is reported already
        if not path or any(_is_same(path, file) for file in files):
            continue
        if not osp.isfile(path):
            other = f', such as the dataset has: {shorten(files)}' if files else ''
            yield (
                f'{where}: {osp.abspath(path)} does not exist. Put it there, or set '
                f'{where} to an annotation file{other}.'
            )
            continue
        if not evaluator.coco or all(content is None for _, content in read):
            continue
        own = CocoDataset(
            where=where,
            ann_file=path,
            classes=read[0][0].things,
            needs_masks=evaluator.masks,
            judged=True,
        )
        content, found = check_annotations(own, unused_categories=True)
        yield from found
        if content is None:
            continue
        if own.needs_masks:
            yield from (f'{where}: {path} {text}' for text in check_masks(own, content))
        known = {(item['id'], _name(item)) for item in content.images}
        lost = [
            item
            for _, given in read
            if given is not None
            for item in given.images
            if (item['id'], _name(item)) not in known
        ]
        if lost:
            yield (
                f'{where}: it judges by {path}, which does not list {len(lost)} images '
                f'of {shorten(files)}: {shorten(map(_name, lost))}. Set both to the '
                'same file.'
            )


def _is_same(path: str, other: str) -> bool:
    if osp.exists(path) and osp.exists(other):
        return osp.samefile(path, other)
    return osp.abspath(path) == osp.abspath(other)


def _name(image: dict) -> str:
    return osp.basename(image['file_name'])
