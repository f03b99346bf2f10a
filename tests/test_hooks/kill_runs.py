"""Runs that kill themselves at a chosen step of writing their files.

Every step that changes the disk is counted: a checkpoint's first byte and its middle,
each fsync, and each rename and removal before and after it happens. The functions
here run in a process of their own, see ``test_kill_resume.py``.
"""

import itertools
import os
import random
import signal

import numpy as np
import torch
import torch.distributed as dist
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import LocalBackend
from mmengine.runner import Runner
from rest_runs import Images, Regressor, collate

from mmrest.checkpoint import find_latest

ITERS, INTERVAL = 6, 2
RUNS = itertools.count()


class NoisyImages(Images):
    """Each image with noise from all three generators of random numbers."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        noise = torch.rand(1) + random.random() + np.random.rand()
        return dict(item, inputs=item['inputs'] + 0.1 * noise.float())


class MeanError(BaseMetric):
    """Falls and rises, so that some validations find a new best."""

    default_prefix = 'val'

    def process(self, data_batch, data_samples):
        self.results.extend(float(value) for value in data_samples)

    def compute_metrics(self, results):
        return dict(loss=float(np.mean(results)), other=float(np.max(results)))


class Steps:
    """Counts what is done to the disk, and kills the process at step ``fatal``."""

    def __init__(self, fatal=None):
        self.fatal, self.names = fatal, []
        put, fsync, replace, remove = (
            LocalBackend.put,
            os.fsync,
            os.replace,
            os.remove,
        )

        def counted_put(backend, obj, path):
            self.step(f'begin {os.path.basename(path)}')
            with open(path, 'wb') as file:
                file.write(obj[: len(obj) // 2])
                file.flush()
                self.step(f'half {os.path.basename(path)}')
            put(backend, obj, path)

        def counted_fsync(descriptor):
            self.step('before fsync')
            fsync(descriptor)

        def counted_replace(source, target):
            self.step(f'before rename to {os.path.basename(target)}')
            replace(source, target)
            self.step(f'after rename to {os.path.basename(target)}')

        def counted_remove(path):
            self.step(f'before removal of {os.path.basename(path)}')
            remove(path)
            self.step(f'after removal of {os.path.basename(path)}')

        LocalBackend.put = counted_put
        os.fsync, os.replace, os.remove = counted_fsync, counted_replace, counted_remove

    def step(self, name):
        self.names.append(name)
        if len(self.names) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class LargeItems(NoisyImages):
    """More than a pipe takes, from workers that leave their numbers in a folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __getitem__(self, index):
        (self.folder / str(os.getpid())).touch()
        item = super().__getitem__(index)
        item['data_samples'].set_metainfo(dict(comment=os.urandom(2**20)))
        return item


def loader(workers, shuffle, epochs=False, persistent=False):
    kind = 'DefaultSampler' if epochs or not shuffle else 'InfiniteSampler'
    options = dict(persistent_workers=True) if persistent else {}
    return dict(
        batch_size=2,
        num_workers=workers,
        dataset=NoisyImages(),
        sampler=dict(type=kind, shuffle=shuffle),
        collate_fn=collate,
        **options,
    )


def build(work_dir, resume_from=None, validate=True, workers=0, epochs=False, **kwargs):
    """A run of six iterations, or three epochs, with dropout and a momentum."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for the model, which comes before the Runner
    hook = dict(
        type='WholeCheckpointHook',
        by_epoch=epochs,
        interval=1 if epochs else INTERVAL,
        max_keep_ckpts=1,
        **(dict(save_best='val/loss', rule='less') if validate else {}),
    )
    hook.update(kwargs.pop('hook', {}))
    loop = dict(by_epoch=True, max_epochs=3) if epochs else dict(by_epoch=False)
    if not epochs:
        loop.update(max_iters=ITERS, val_interval=INTERVAL)
    if validate:
        kwargs.update(
            val_dataloader=loader(0, shuffle=False),
            val_evaluator=Evaluator(MeanError()),
            val_cfg=dict(),
        )
    persistent = kwargs.pop('persistent', False)
    data = kwargs.pop('data', None) or loader(workers, True, epochs, persistent)
    return Runner(
        model=Regressor(drop_rate=0.2, drop_path_rate=0.2, norm_eval=False),
        work_dir=str(work_dir),
        train_dataloader=data,
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
        default_hooks=dict(checkpoint=hook),
        default_scope='mmengine',
        experiment_name=f'run_{next(RUNS)}',
        log_level='ERROR',
        load_from=resume_from,
        resume=resume_from is not None,
        randomness=dict(seed=3, diff_rank_seed='launcher' in kwargs),
        **kwargs,
    )


def train(work_dir, fatal=None, names=None, **kwargs):
    """Train until step ``fatal``, from the latest checkpoint if there is one.

    The names of the steps go into the file ``names``.
    """
    steps = Steps(fatal)
    latest = find_latest(str(work_dir))
    build(work_dir, latest.path if latest else None, **kwargs).train()
    if names is not None:
        names.write_text('\n'.join(steps.names))


def train_distributed(rank, rendezvous, work_dir, fatal=None):
    """The same as one of two processes, of which the first writes."""
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group(
        'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=2
    )
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    train(
        work_dir,
        fatal if rank == 0 else None,
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
    )


def train_until(work_dir, stop, **kwargs):
    """Train, and end without a word before iteration ``stop`` + 1."""
    runner = build(work_dir, **kwargs)
    step = runner.model.train_step

    def train_step(*args, **options):
        if runner.iter == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **options)

    runner.model.train_step = train_step
    runner.train()


def train_with_large_items(work_dir, folder):
    """Killed when its workers wait to hand over a batch."""
    data = loader(2, shuffle=True)
    data['dataset'] = LargeItems(folder)
    # it lets them look after their parent
    hooks = [dict(type='PreemptionHook')]
    train_until(work_dir, 2, validate=False, data=data, custom_hooks=hooks)
