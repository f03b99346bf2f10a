"""Check annotation files that metrics read, as COCO's evaluation does."""

import os.path as osp
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

from mmengine.registry import METRICS

from ...utils.config_types import find_type
from ...utils.text import shorten
from .coco import CocoDataset, Content, check_annotations
from .reading import bases, walk


@dataclass(frozen=True)
class Evaluator:
    """A metric that reads an annotation file."""

    where: str  # its place in the config, e.g. ``val_evaluator.1``
    ann_file: str  # path of the file; empty if it uses the dataset's annotations
    coco: bool  # whether it is COCO's evaluation of instances
    masks: bool  # whether it evaluates masks


def find_evaluators(cfg: Any, split: str) -> list[Evaluator]:
    """List the metrics of a split that read a local annotation file."""
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
    """Add to a dataset the needs of metrics that read its annotation file."""
    own = [
        evaluator
        for evaluator in evaluators
        if evaluator.coco
        and (not evaluator.ann_file or _is_same(evaluator.ann_file, dataset.ann_file))
    ]
    return replace(
        dataset,
        needs_masks=dataset.needs_masks or any(evaluator.masks for evaluator in own),
        evaluated=any(evaluator.ann_file for evaluator in own),
    )


def check_evaluators(
    evaluators: list[Evaluator], read: list[tuple[CocoDataset, Optional[Content]]]
) -> Iterator[str]:
    """Check that metrics use the annotations of the images they evaluate."""
    files = [dataset.ann_file for dataset, _ in read]
    images = [item for _, given in read if given for item in given.images]
    for evaluator in evaluators:
        path, where = evaluator.ann_file, f'{evaluator.where}.ann_file'
        # a missing file of a dataset was already reported
        if not path or any(_is_same(path, file) for file in files):
            continue
        if not osp.isfile(path):
            other = f', such as the dataset has: {shorten(files)}' if files else ''
            yield (
                f'{where}: {osp.abspath(path)} does not exist. Put it there, or set '
                f'{where} to an annotation file{other}.'
            )
        elif evaluator.coco and any(given is not None for _, given in read):
            own = CocoDataset(
                where=where,
                ann_file=path,
                classes=read[0][0].things,
                needs_masks=evaluator.masks,
                evaluated=True,
            )
            content, found = check_annotations(own, unused_categories=True)
            yield from found
            known = set(map(_key, content.images)) if content else set()
            lost = [item for item in images if _key(item) not in known]
            if content and lost:
                names = (osp.basename(item['file_name']) for item in lost)
                yield (
                    f'{where}: it reads {path}, which does not list {len(lost)} '
                    f'images of {shorten(files)}: {shorten(names)}. Set both to the '
                    'same file.'
                )


def _is_same(path: str, other: str) -> bool:
    if osp.exists(path) and osp.exists(other):
        return osp.samefile(path, other)
    return osp.abspath(path) == osp.abspath(other)


def _key(image: dict) -> tuple:
    return image['id'], osp.basename(image['file_name'])
