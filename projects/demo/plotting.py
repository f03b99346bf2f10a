"""Pictures of ground truth and predictions, and training curves."""

import json
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

SHOWN_SIDE = 640  # pictures are enlarged to about this many pixels
TITLES = ('ground truth', 'prediction')
PALETTE = ((20, 110, 230), (220, 40, 160), (30, 200, 200), (240, 240, 240))


def save_pictures(model, dataset, out_dir, count=12, score_thr=0.5):
    """Draw the first images of a data set, ground truth left, prediction right.

    Args:
        model (nn.Module): An mmdet detector.
        dataset (CocoDataset): Its test pipeline must load the annotations.
        out_dir (str | Path): Folder for the PNGs; created.
        count (int): Number of pictures. Default: 12.
        score_thr (float): Lowest score that is shown. Default: 0.5.

    Returns:
        list[Path]: One PNG each, then ``overview.png`` with up to six of them.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    visualizer = DetLocalVisualizer(name='demo', line_width=3, alpha=0.35)
    visualizer.dataset_meta = _meta(dataset.metainfo['classes'])
    model.eval()
    paths, pairs = [], []
    for index in range(min(count, len(dataset))):
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        image = cv2.imread(sample.img_path)[:, :, ::-1]
        factor = max(1, round(SHOWN_SIDE / max(image.shape[:2])))
        pair = _draw_pair(visualizer, image, sample.cpu(), factor, score_thr)
        paths.append(out_dir / f'{Path(sample.img_path).stem}.png')
        cv2.imwrite(str(paths[-1]), pair[:, :, ::-1])
        pairs.append(pair)
    paths.append(out_dir / 'overview.png')
    cv2.imwrite(str(paths[-1]), _overview(pairs[:6])[:, :, ::-1])
    return paths


def _meta(classes):
    """Class names with one more for crowds, and a colour for each."""
    names = (*classes, 'crowd')
    if len(names) <= len(PALETTE) + 1:
        return dict(classes=names, palette=[*PALETTE[: len(classes)], (150, 150, 150)])
    hues = [
        (np.uint8([[[179 * n // len(names), 200, 230]]])) for n in range(len(names))
    ]
    palette = [tuple(map(int, cv2.cvtColor(h, cv2.COLOR_HSV2RGB)[0, 0])) for h in hues]
    return dict(classes=names, palette=palette)


def _draw_pair(visualizer, image, sample, factor, score_thr):
    """One picture (RGB) of ground truth and prediction, ``factor`` times as large."""
    large = cv2.resize(
        np.ascontiguousarray(image),
        None,
        fx=factor,
        fy=factor,
        interpolation=cv2.INTER_CUBIC,
    )
    crowd = len(visualizer.dataset_meta['classes']) - 1
    truth = _enlarge(sample.gt_instances, large.shape, factor)
    if len(sample.get('ignored_instances', ())):
        heaps = _enlarge(sample.ignored_instances, large.shape, factor)
        heaps.labels[:] = crowd
        truth = InstanceData.cat([truth, heaps])
    found = _enlarge(sample.pred_instances, large.shape, factor)
    found = found[found.scores >= score_thr]
    halves = []
    for title, kind, instances in zip(TITLES, ('gt', 'pred'), (truth, found)):
        drawn = DetDataSample(**{f'{kind}_instances': instances})
        visualizer.add_datasample(
            title,
            large,
            drawn,
            draw_gt=kind == 'gt',
            draw_pred=kind == 'pred',
            pred_score_thr=score_thr,
        )
        halves.append(_titled(visualizer.get_image(), title))
    gap = np.full((halves[0].shape[0], 6, 3), 255, np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], axis=1)


def _enlarge(instances, shape, factor):
    """What instances have, for an image ``factor`` times as large."""
    boxes = instances.bboxes
    boxes = boxes.tensor if hasattr(boxes, 'tensor') else boxes
    result = InstanceData(bboxes=boxes * factor, labels=instances.labels.clone())
    if 'masks' in instances:
        masks = instances.masks
        masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks.numpy()
        large = [
            cv2.resize(
                m.astype(np.float32), shape[1::-1], interpolation=cv2.INTER_LINEAR
            )
            for m in masks
        ]
        large = np.reshape(large, (len(masks), *shape[:2])) >= 0.5
        result.masks = torch.tensor(large)
    if 'scores' in instances:
        result.scores = instances.scores
    return result


def _titled(image, title):
    strip = np.full((28, image.shape[1], 3), 255, np.uint8)
    cv2.putText(
        strip, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1,
        cv2.LINE_AA,
    )  # fmt: skip
    return np.concatenate([strip, image])


def _overview(pairs):
    """Pairs in two columns, each half as large."""
    height = min(p.shape[0] for p in pairs) // 2
    width = min(p.shape[1] for p in pairs) // 2
    cells = [
        cv2.copyMakeBorder(
            cv2.resize(p, (width, height), interpolation=cv2.INTER_AREA),
            4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255),
        )
        for p in pairs
    ]  # fmt: skip
    if len(cells) % 2:
        cells.append(np.full_like(cells[0], 255))
    rows = [np.concatenate(cells[i : i + 2], 1) for i in range(0, len(cells), 2)]
    return np.concatenate(rows)


def read_scalars(path):
    """Split a Runner's ``scalars.json`` into training and validation entries.

    Returns:
        tuple[list[dict], list[dict]]: Entries with losses; entries with metrics.
    """
    lines = Path(path).read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    train = [e for e in entries if 'loss' in e]
    val = [e for e in entries if 'coco/bbox_mAP_50' in e]
    return train, val


def save_curves(train, val, path):
    """Plot losses and average precision over the iterations into a PNG.

    Args:
        train (list[dict]): Training entries of :func:`read_scalars`.
        val (list[dict]): Validation entries.
        path (str | Path): The PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    steps = [e['step'] for e in train]
    names = sorted(k for k in train[-1] if k.startswith('loss_')) if train else []
    for name in ['loss', *names]:
        width = 2.2 if name == 'loss' else 1.2
        left.plot(steps, [e[name] for e in train], label=name, linewidth=width)
    left.set(xlabel='iteration', ylabel='loss', title='training loss', ylim=(0, None))
    for kind, colour in (('bbox', 'tab:blue'), ('segm', 'tab:orange')):
        for metric, style in (('mAP_50', '-'), ('mAP', '--')):
            key = f'coco/{kind}_{metric}'
            if not all(key in e for e in val):
                continue  # only boxes
            right.plot(
                [e['step'] for e in val],
                [e[key] for e in val],
                style,
                color=colour,
                marker='o',
                label=f'{kind} {"AP50" if metric == "mAP_50" else "AP"}',
            )
    right.set(
        xlabel='iteration', title='average precision, held-back images', ylim=(0, 1)
    )
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def metric_table(metrics):
    """COCO's box and mask figures as a table to print.

    Args:
        metrics (dict): A validation entry of :func:`read_scalars`; empty where the
            detector found nothing at all, so that COCO's figures do not exist.
    """
    if not metrics:
        return (
            'No object was detected in any of the images: the training was too '
            'short for these data.\nFor a longer one: '
            'projects/demo/run.py ... --cfg-options train_cfg.max_iters=3000'
        )
    columns = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    rows = [''.join(f'{c.replace("mAP", "AP").replace("_", ""):>8}' for c in columns)]
    for kind in ('bbox', 'segm'):
        if f'coco/{kind}_mAP' not in metrics:
            continue
        values = [metrics[f'coco/{kind}_{column}'] for column in columns]
        # COCO says -1 where no object of that size exists
        cells = ''.join(f'{v:8.3f}' if v >= 0 else f'{"-":>8}' for v in values)
        rows.append(f'{kind}{cells}')
    return '\n'.join([f'    {rows[0]}', *rows[1:]])
