"""Train, kill and resume in a loop on generated pictures, and count what was lost.

First a run without disturbance, as the measure. Then the same run again and again,
its processes killed with SIGKILL at random moments, half of them while they save, and
resumed with tools/train.py --resume until the run is finished. After each kill all
checkpoints are read; the finished run is compared with the undisturbed one bit by bit.
"""

import argparse
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from soak_session import Session, SoakError

from mmrest.checkpoint import CheckpointError, inspect_latest, read_checkpoint

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / 'projects' / 'demo'))
from fruitset.coco import CLASSES, SPLITS, generate  # noqa: E402

ITERATIONS, INTERVAL = 60, 5
CONFIG = """
_base_ = {base!r}

train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        ann_file={ann_file!r},
        data_prefix=dict(img={images!r}),
        metainfo=dict(classes={classes!r}),
    ),
)
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes={num_classes}),
        mask_head=dict(num_classes={num_classes}),
    )
)
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
train_cfg = dict(max_iters={iterations})
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(interval={interval}, max_keep_ckpts=3),
)
"""


@dataclass
class Counts:
    """What happened so far."""

    kills: int = 0
    interrupted: int = 0
    resumes: int = 0
    written: int = 0
    damaged: list = field(default_factory=list)
    lost: list = field(default_factory=list)
    finished: int = 0
    different: int = 0
    sessions: list = field(default_factory=list)
    started: float = field(default_factory=time.time)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--hours', type=float, default=0.1, help='how long [0.1]')
    parser.add_argument('--processes', type=int, default=2, help='of a run [2]')
    parser.add_argument('--work-dir', type=Path, default='work_dirs/soak')
    parser.add_argument('--seed', type=int, help='of the moments of the kills')
    return parser.parse_args()


def write_config(folder: Path) -> Path:
    root = generate(folder / 'pictures', num_train=64, num_val=2, size=160)
    split = SPLITS[0]
    text = CONFIG.format(
        base=str(REPO / 'configs' / 'demo' / 'mask_rcnn_rest_fruit.py'),
        ann_file=str(root / 'annotations' / f'instances_{split}.json'),
        images=str(root / split),
        classes=tuple(CLASSES),
        num_classes=len(CLASSES),
        iterations=ITERATIONS,
        interval=INTERVAL,
    )
    path = folder / 'soak_config.py'
    path.write_text(text)
    return path


def check(work_dir: Path, counts: Counts) -> int:
    """Read every checkpoint; the iteration that the next session starts from."""
    for path in work_dir.glob('*.pth'):
        try:
            inspect_latest(path)
        except CheckpointError as error:
            counts.damaged.append(f'{path.name}: {error}')
    pointer = work_dir / 'last_checkpoint'
    if not pointer.exists():
        return 0
    try:
        return inspect_latest(pointer.read_text()).iteration
    except CheckpointError as error:
        counts.damaged.append(f'last_checkpoint: {error}')
        return 0


def run_once(
    start, work_dir: Path, rng: random.Random, counts: Counts, stop_at: float
) -> bool:
    """Kill and resume a run until it is finished; False if the time is over."""
    resumed_from = 0
    while True:
        session = start(work_dir)
        counts.resumes += resumed_from > 0
        try:
            finished = session.wait_and_kill(rng)
        finally:
            session.end()
        counts.sessions.append(session)
        counts.written += session.saves
        resumed_from = check(work_dir, counts)
        if finished:
            return True
        counts.kills += 1
        counts.interrupted += session.saving > resumed_from
        counts.lost.append(max(0, session.iteration - resumed_from))
        print(
            f'kill {counts.kills}: after iteration {session.iteration}, '
            f'continuing from {resumed_from}',
            flush=True,
        )
        if time.time() > stop_at:
            return False


def same_parameters(work_dir: Path, reference: Path) -> bool:
    name = f'iter_{ITERATIONS}.pth'
    one, other = (
        read_checkpoint(folder / name)['state_dict'] for folder in (work_dir, reference)
    )
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) for k in one
    )


def table(counts: Counts, processes: int) -> str:
    first, last = counts.sessions[0], counts.sessions[-1]
    longest = max(counts.sessions, key=lambda session: session.count)
    mean = sum(counts.lost) / max(1, len(counts.lost))
    rows = [
        ('minutes', f'{(time.time() - counts.started) / 60:.1f}'),
        ('processes', processes),
        ('kills', counts.kills),
        ('of these while a checkpoint was being saved', counts.interrupted),
        ('resumes', counts.resumes),
        ('checkpoints written', counts.written),
        ('checkpoints damaged', len(counts.damaged)),
        (
            f'iterations lost for each kill (one checkpoint in {INTERVAL})',
            f'{mean:.1f} on average, {max(counts.lost, default=0)} at most',
        ),
        (
            'runs finished, of these other than the undisturbed one',
            f'{counts.finished}, {counts.different}',
        ),
        (
            'peak memory of a process, first and last session',
            f'{first.peak()} and {last.peak()} MB',
        ),
        (
            f'peak memory in the longest session ({longest.count} iterations), '
            'after 10 iterations and at its end',
            f'{longest.early_peak()} and {longest.peak()} MB',
        ),
    ]
    lines = ['| | |', '|---|---|']
    return '\n'.join(lines + [f'| {name} | {value} |' for name, value in rows])


def main() -> int:
    args = parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    rng = random.Random(seed)
    folder = args.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder)
    train = REPO / 'tools' / 'train.py'
    counts = Counts()
    stop_at = counts.started + args.hours * 3600
    reference, work_dir = folder / 'undisturbed', folder / 'killed'

    def start(work_dir: Path) -> Session:
        return Session(train, config, work_dir, args.processes, ITERATIONS)

    print(f'seed {seed}; the undisturbed run ...', flush=True)
    try:
        shutil.rmtree(reference, ignore_errors=True)
        session = start(reference)
        try:
            session.finish()
        finally:
            session.end()
        counts.sessions.append(session)
        while time.time() < stop_at:
            shutil.rmtree(work_dir, ignore_errors=True)
            if run_once(start, work_dir, rng, counts, stop_at):
                counts.finished += 1
                counts.different += not same_parameters(work_dir, reference)
    except KeyboardInterrupt:
        print('interrupted')
    except SoakError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(table(counts, args.processes))
    for line in counts.damaged:
        print(line, file=sys.stderr)
    return 1 if counts.damaged or counts.different else 0


if __name__ == '__main__':
    sys.exit(main())
