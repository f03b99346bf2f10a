"""Short trainings with MMEngine's Runner that get a signal at a chosen moment."""

import os
import random
import signal
import subprocess
import tempfile
from multiprocessing import get_context

import numpy as np
import torch
import torch.distributed as dist
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner, find_latest_checkpoint
from rest_runs import Images, Regressor, collate

FORK = get_context('fork')


class NoisyImages(Images):
    """Each image with noise from all three generators of random numbers."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        noise = torch.rand(1) + random.random() + np.random.rand()
        return dict(item, inputs=item['inputs'] + 0.1 * noise.float())


class MeanOutput(BaseMetric):
    """The mean of what the model returns, without a meaning."""

    default_prefix = 'val'

    def process(self, data_batch, data_samples):
        self.results.extend(float(output) for output in data_samples)

    def compute_metrics(self, results):
        return dict(mean=float(np.mean(results)))


class Calls(Hook):
    """Calls a function at an iteration of the training or of a validation."""

    def __init__(self, function, train=None, val=None, at_iter=0):
        self.function, self.at_iter = function, at_iter
        self.train, self.val = train, val

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.train == runner.iter + 1:
            self.function()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.val == batch_idx + 1 and runner.iter == self.at_iter:
            self.function()


class Validations(Hook):
    """Writes down after which iterations there was a whole validation."""

    def after_val_epoch(self, runner, metrics=None):
        if runner.rank == 0:
            with open(os.path.join(runner.work_dir, 'validations'), 'a') as file:
                file.write(f'{runner.iter}\n')


def kill_self(name, group=False):
    """Send a signal to this process, or to its whole group."""
    number = getattr(signal, name)
    if group:  # as Slurm does, it comes from another process
        command = f'kill -s {number:d} -- -{os.getpgid(0)}; sleep 1'
        subprocess.run(['sh', '-c', command], start_new_session=True)
    else:
        os.kill(os.getpid(), number)


def loader(workers, shuffle, epochs=False, val_size=8):
    data = NoisyImages() if shuffle else Images(val_size)
    kind = 'InfiniteSampler' if shuffle and not epochs else 'DefaultSampler'
    return dict(
        batch_size=2,
        num_workers=workers,
        dataset=data,
        sampler=dict(type=kind, shuffle=shuffle),
        collate_fn=collate,
    )


def train(
    work_dir,
    *calls,
    resume=False,
    preemption=None,
    hooks=(),
    validate=True,
    workers=0,
    epochs=False,
    **kwargs,
):
    """Six iterations or three epochs of four, with dropout and a momentum.

    Checkpoints and validations come after two iterations or one epoch.
    """
    torch.set_num_threads(1)
    every = 1 if epochs else 2
    checkpoint = dict(type='WholeCheckpointHook', interval=every, max_keep_ckpts=1)
    checkpoint['by_epoch'] = epochs
    loop = dict(max_epochs=3) if epochs else dict(max_iters=6)
    if validate:
        kwargs.update(
            val_dataloader=loader(0, shuffle=False),
            val_evaluator=Evaluator([MeanOutput()]),
            val_cfg=dict(),
        )
    hook = dict(type='PreemptionHook', **(preemption or {}))
    latest = find_latest_checkpoint(str(work_dir)) if resume else None
    runner = Runner(
        model=Regressor(drop_rate=0.2, drop_path_rate=0.2, norm_eval=False),
        work_dir=str(work_dir),
        train_dataloader=loader(workers, True, epochs),
        train_cfg=dict(by_epoch=epochs, val_interval=every, **loop),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
        default_hooks=dict(checkpoint=checkpoint),
        custom_hooks=[hook, Validations(), *hooks, *calls],
        default_scope='mmengine',
        experiment_name=f'run_{os.getpid()}',
        log_level='WARNING',
        load_from=latest,
        resume=latest is not None,
        randomness=dict(seed=3),
        **kwargs,
    )
    runner.train()


def in_process(function, *args, **kwargs):
    """Call a function in a process of its own and return the exit code."""
    process = FORK.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(timeout=300)
    assert process.exitcode is not None, 'it hangs'
    return process.exitcode


def _one_of_two(rank, meeting, folder, *calls, **kwargs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group(
        'gloo', init_method=f'file://{meeting}', rank=rank, world_size=2
    )
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    kwargs.update(launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    train(folder, *(calls if rank == 1 else ()), **kwargs)


def train_both(folder, *calls, **kwargs):
    """Exit codes of two processes that train together; the calls are of the second."""
    meeting = os.path.join(tempfile.mkdtemp(dir=folder), 'meeting')
    processes = [
        FORK.Process(
            target=_one_of_two, args=(rank, meeting, folder, *calls), kwargs=kwargs
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    return [process.exitcode for process in processes]
