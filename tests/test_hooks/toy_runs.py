"""Short trainings with MMEngine's Runner, and ways to disturb them."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from mmengine.structures import BaseDataElement
from rest_variants import TINY
from torch import nn
from torch.utils.data import Dataset

from mmrest import ResT
from mmrest.checkpoint import find_latest

FORK = multiprocessing.get_context('fork')
RUNS = itertools.count()


class Toy(BaseModel):
    """Learns the number drawn with an image, with dropout and BatchNorm."""

    def __init__(self, drop=0.2):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Dropout(drop))
        self.head = nn.Linear(4, 1)

    def features(self, inputs):
        return self.body(self.norm(inputs))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.head(self.features(inputs).mean(dim=(2, 3))).squeeze(1)
        if mode != 'loss':
            return out
        target = torch.stack([sample.target for sample in data_samples])
        return dict(loss=(out - target).square(), accuracy=torch.tensor(torch.nan))


class Regressor(Toy):
    """The same with a tiny ResT."""

    def __init__(self, **backbone):
        super().__init__()
        del self.norm, self.body
        self.backbone = ResT(**{'arch': TINY, 'norm_eval': True, **backbone})
        self.head = nn.Linear(TINY['embed_dims'][-1], 1)

    def features(self, inputs):
        return self.backbone(inputs)[-1]


class Images(Dataset):
    """Images with ids and paths; those in ``bad`` hold a NaN.

    ``noisy`` adds noise from all three generators of random numbers.
    """

    metainfo = dict(classes=('a',))

    def __init__(self, count=8, size=16, bad=(), noisy=False):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 3, size, size, generator=generator)
        self.targets = torch.rand(count, generator=generator)
        self.noisy = noisy
        for index in bad:
            self.images[index, 0, 3, 3] = torch.nan

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        meta = dict(img_id=100 + index, img_path=f'images/{index}.jpg')
        sample = BaseDataElement(metainfo=meta, target=self.targets[index])
        inputs = self.images[index]
        if self.noisy:
            noise = torch.rand(1) + random.random() + np.random.rand()
            inputs = inputs + 0.1 * noise.float()
        return dict(inputs=inputs, data_samples=sample)


def collate(items):
    return dict(
        inputs=torch.stack([item['inputs'] for item in items]),
        data_samples=[item['data_samples'] for item in items],
    )


class Error(BaseMetric):
    """Falls and rises, so that some validations find a new best."""

    default_prefix = 'val'

    def process(self, data_batch, data_samples):
        self.results.extend(float(value) for value in data_samples)

    def compute_metrics(self, results):
        return dict(loss=float(np.mean(results)), other=float(np.max(results)))


def loader(data, sampler, shuffle=False, batch_size=2, **options):
    return dict(
        batch_size=batch_size,
        dataset=data,
        sampler=dict(type=sampler, shuffle=shuffle),
        collate_fn=collate,
        **{'num_workers': 0, **options},
    )


class QuietRunner(Runner):
    """Runs no programs to describe the machine."""

    def _log_env(self, env_cfg):
        pass


class QuietFlexibleRunner(FlexibleRunner):
    def _log_env(self):
        pass


def build(
    work_dir,
    model=None,
    hooks=(),
    iters=6,
    epochs=0,
    validate=False,
    checkpoint=None,
    resume=False,
    data=None,
    batch_size=2,
    dataloader=None,
    loader_options=None,
    val_loader=None,
    optimizer=None,
    optim_wrapper=None,
    train_cfg=None,
    runner_type=QuietRunner,
    **kwargs,
):
    """Six iterations, or some epochs of four, with dropout and a momentum.

    Checkpoints and validations come after two iterations or one epoch. Without
    ``data`` the images are noisy and shuffled; else they come in order.

    Args:
        resume (bool | str): From the latest checkpoint if there is one, or from this.
        checkpoint (dict): Options of the checkpoint hook.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for the model, which comes before the Runner
    every = 1 if epochs else 2
    loop = dict(max_epochs=epochs) if epochs else dict(max_iters=iters)
    if validate:
        kwargs.update(
            val_dataloader=loader(Images(), 'DefaultSampler', **(val_loader or {})),
            val_evaluator=Evaluator(Error()),
            val_cfg=dict(),
        )
    if resume is True:
        latest = find_latest(str(work_dir))
        resume = latest.path if latest else None
    sampler = 'DefaultSampler' if epochs or data is not None else 'InfiniteSampler'
    return runner_type(
        model=model or Toy(),
        work_dir=str(work_dir),
        train_dataloader=dataloader
        or loader(
            data or Images(noisy=True),
            sampler,
            shuffle=data is None,
            batch_size=batch_size,
            **(loader_options or {}),
        ),
        train_cfg=train_cfg or dict(by_epoch=epochs > 0, val_interval=every, **loop),
        optim_wrapper=dict(
            optimizer=optimizer or dict(type='SGD', lr=0.01, momentum=0.9),
            **(optim_wrapper or {}),
        ),
        param_scheduler=kwargs.pop(
            'param_scheduler',
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
        ),
        default_hooks=dict(
            checkpoint=dict(
                dict(
                    type='AtomicCheckpointHook',
                    by_epoch=epochs > 0,
                    interval=every,
                    max_keep_ckpts=1,
                ),
                **(checkpoint or {}),
            )
        ),
        custom_hooks=list(hooks),
        default_scope='mmengine',
        experiment_name=f'run_{os.getpid()}_{next(RUNS)}',
        log_level='WARNING',
        load_from=resume or None,
        resume=bool(resume),
        randomness=kwargs.pop('randomness', dict(seed=3)),
        **kwargs,
    )


def train(*args, **kwargs):
    runner = build(*args, **kwargs)
    runner.train()
    if hasattr(runner.train_loop, 'dataloader_iterator'):
        del runner.train_loop.dataloader_iterator  # ends its workers
    return runner


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


class DiskSteps:
    """Counts what is done to the disk, and kills the process at step ``fatal``.

    A step is a checkpoint's first byte and its middle, each fsync, and each rename
    and removal before and after it happens.
    """

    def __init__(self, fatal=None):
        self.fatal, self.names = fatal, []
        self._count(os, 'replace', 'rename to {}', lambda source, target: target)
        self._count(os, 'remove', 'removal of {}', lambda path: path)
        self._count(os, 'fsync', 'fsync', lambda descriptor: '')
        put = LocalBackend.put

        def counted_put(backend, obj, path):
            self.step(f'begin {os.path.basename(path)}')
            with open(path, 'wb') as file:
                file.write(obj[: len(obj) // 2])
                file.flush()
                self.step(f'half {os.path.basename(path)}')
            put(backend, obj, path)

        LocalBackend.put = counted_put

    def _count(self, owner, function, text, path_of):
        original = getattr(owner, function)

        def counted(*args):
            name = text.format(os.path.basename(path_of(*args)))
            self.step(f'before {name}')
            original(*args)
            if name != 'fsync':
                self.step(f'after {name}')

        setattr(owner, function, counted)

    def step(self, name):
        self.names.append(name)
        if len(self.names) == self.fatal:
            kill_self('SIGKILL')


def kill_self(name, group=False):
    """Send a signal to this process, or to its whole group."""
    number = getattr(signal, name)
    if group:  # as Slurm does, it comes from another process
        command = f'kill -s {number:d} -- -{os.getpgid(0)}; sleep 1'
        subprocess.run(['sh', '-c', command], start_new_session=True)
    else:
        os.kill(os.getpid(), number)


def in_process(function, *args, **kwargs):
    """Call a function in a process of its own and return the exit code."""
    process = FORK.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return exit_codes([process])[0]


def exit_codes(processes):
    for process in processes:
        process.join(timeout=240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, 'it hangs'
    return codes


def in_processes(function, folder, *args, count=2, **kwargs):
    """Call ``function(rank, ...)`` in processes of a gloo group; the processes."""
    meeting = os.path.join(tempfile.mkdtemp(dir=folder), 'meeting')

    def join_group(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
        dist.init_process_group(
            'gloo', init_method=f'file://{meeting}', rank=rank, world_size=count
        )
        torch.set_num_threads(1)
        function(rank, *args, **kwargs)

    processes = [FORK.Process(target=join_group, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def train_in_two(folder, hooks_of=lambda rank: (), **kwargs):
    """Train in two processes with the hooks of each."""

    def train_rank(rank):
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
        train(
            folder,
            hooks=hooks_of(rank),
            launcher='pytorch',
            cfg=dict(model_wrapper_cfg=wrapper),
            **kwargs,
        )

    folder.mkdir(exist_ok=True)
    return in_processes(train_rank, folder)
