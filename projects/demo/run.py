"""Train and evaluate a small ResT detector within minutes, and draw its predictions.

Without arguments it generates a data set of fruit on tables and trains a Mask
R-CNN on it. With ``--data`` it takes a folder in the format of COCO, VOC or YOLO, and
trains a RetinaNet if its objects only have boxes.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Read when torch is loaded. Waiting threads must not take the cores from the data
# loader and other processes on a small machine.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

# ruff: noqa: E402
import torch
from fruitset.coco import CLASSES, SPLITS, VERSION, generate
from mmengine.config import Config
from mmengine.runner import Runner
from plotting import metric_table, read_scalars, save_curves, save_pictures
from user_data import LAYOUTS, CocoFolder, DataError, Split, find_data

from mmrest.datasets.preflight import PreflightError, check_config, log_report
from mmrest.launch import OverrideAction

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'demo'


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--data', metavar='DIR', help='your own folder: COCO, VOC or YOLO'
    )
    parser.add_argument(
        '--work-dir',
        default='work_dirs/demo',
        metavar='DIR',
        help='results go into a new folder in it (default: %(default)s)',
    )
    parser.add_argument(
        '--arch',
        choices=('rest', 'restv2'),
        default='rest',
        help='generation of the backbone (default: %(default)s)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OverrideAction,
        metavar='KEY=VALUE',
        help='change fields of the config in configs/demo',
    )
    return parser.parse_args()


def new_run_folder(work_dir):
    """Create ``work_dir/<date>_<time>``, without using the folder of an older run."""
    name = time.strftime('%Y%m%d_%H%M%S')
    for suffix in ('', *(f'_{n}' for n in range(2, 100))):
        folder = Path(work_dir) / f'{name}{suffix}'
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f'{folder} and its forerunners exist already.')


def limit_threads():
    """Use at most four threads, since more are slower with small images."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 2
    threads = min(4, available)
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(threads)
    return threads


def generated_data(settings, work_dir, workers):
    """Generate the fruit, or use complete data of an earlier run."""
    folder = 'fruit_v{}_{num_train}+{num_val}_{size}px_seed{seed}'.format(
        VERSION, **settings
    )
    root = generate(Path(work_dir).resolve() / folder, **settings, workers=workers)
    splits = [
        Split(root / 'annotations' / f'instances_{split}.json', root / split)
        for split in SPLITS
    ]
    return CocoFolder(CLASSES, *splits, note=f'generated in {root}')


def fill_in(cfg, data, run_dir):
    """Set paths, classes and the folder for results in the config."""
    options = {
        'work_dir': str(run_dir),
        'experiment_name': run_dir.name,
        'val_evaluator.ann_file': str(data.val.ann_file),
    }
    heads = ('roi_head.bbox_head', 'roi_head.mask_head')
    for head in heads if data.has_masks else ('bbox_head',):
        options[f'model.{head}.num_classes'] = len(data.classes)
    for split in SPLITS:
        files = getattr(data, split)
        dataset = f'{split}_dataloader.dataset'
        options[f'{dataset}.ann_file'] = str(files.ann_file)
        options[f'{dataset}.data_prefix'] = dict(img=str(files.img_dir))
        options[f'{dataset}.metainfo'] = dict(classes=data.classes)
    cfg.merge_from_dict(options)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator


def load_config(name, args):
    cfg = Config.fromfile(CONFIGS / name)
    if args.arch == 'restv2':
        cfg.model.backbone.update(type='ResTV2', out_norm='branch')
    cfg.merge_from_dict(args.cfg_options or {})
    return cfg


def write_results(runner, run_dir):
    """Write metrics, curves and pictures.

    Returns:
        tuple[str, dict]: The table of metrics, and where each result is.
    """
    train, val = read_scalars(run_dir / runner.timestamp / 'vis_data' / 'scalars.json')
    metrics = val[-1] if val and val[-1]['step'] == runner.iter else {}
    table = metric_table(metrics)
    (run_dir / 'metrics.txt').write_text(table + '\n')
    (run_dir / 'metrics.json').write_text(json.dumps(metrics, indent=2) + '\n')
    save_curves(train, val, run_dir / 'curves.png')
    dataset = runner.val_dataloader.dataset
    save_pictures(runner.model, dataset, run_dir / 'pictures')
    return table, {
        'metrics': run_dir / 'metrics.txt',
        'pictures': run_dir / 'pictures',
        'curves': run_dir / 'curves.png',
        'checkpoint': run_dir / f'iter_{runner.max_iters}.pth',
        'config': run_dir / f'{Path(runner.cfg.filename).name}',
        'log': run_dir / runner.timestamp / f'{runner.timestamp}.log',
    }


def main():
    start = time.time()
    args = parse_args()
    threads = limit_threads()
    run_dir = new_run_folder(args.work_dir).resolve()
    try:
        if args.data:
            data = find_data(args.data, run_dir / 'split')
            kind = 'mask_rcnn' if data.has_masks else 'retinanet'
            cfg = load_config(f'{kind}_rest_custom.py', args)
        else:
            cfg = load_config('mask_rcnn_rest_fruit.py', args)
            print('Generating the data set ...', flush=True)
            data = generated_data(cfg.fruit_set, args.work_dir, threads)
        if not data.has_masks:
            print('The objects have boxes and no masks: a RetinaNet is trained.')
        print(f'Data: {data.note}. Classes: {", ".join(data.classes)}.', flush=True)
        fill_in(cfg, data, run_dir)
        report = check_config(cfg, 'train')
    except (DataError, PreflightError, FileExistsError) as error:
        if not any(run_dir.iterdir()):
            run_dir.rmdir()
        sys.exit(f'projects/demo/run.py: {error}')
    runner = Runner.from_cfg(cfg)
    log_report(report)
    runner.train()
    table, places = write_results(runner, run_dir)
    print(f'\nOn {len(runner.val_dataloader.dataset)} images held back from training:')
    print(f'{table}\n')
    for what, path in places.items():
        print(f'{what:<11} {path}')
    print(f'{"time":<11} {(time.time() - start) / 60:.1f} minutes')


if __name__ == '__main__':
    main()
