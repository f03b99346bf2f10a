"""Train a toy model with MMEngine's Runner.

It writes everything that a checkpoint of mmengine can hold: optimizer, scheduler,
EMA, loss history, numpy values in metrics and in the data set's meta.
"""

import json
import sys

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset


class ToyModel(BaseModel):
    """A linear layer and a BatchNorm."""

    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.norm(self.layer(torch.stack(list(inputs))))
        if mode == 'loss':
            return {'loss': (out**2).mean() + self.layer.weight.abs().mean()}
        return list(out)


class ToyData(Dataset):
    """Eight fixed vectors, with an array in the meta information."""

    metainfo = {'classes': ('a', 'b'), 'sigmas': np.array([0.1, 0.2])}

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {'inputs': torch.arange(3) * 0.1 + i}


class ToyMetric(BaseMetric):
    """A numpy number, as many metrics return."""

    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return {'score': np.float64(sum(results))}


def build(work_dir, epochs=4, model=None, **kwargs):
    """Build the Runner."""
    torch.manual_seed(0)
    loader = {
        'batch_size': 4,
        'dataset': ToyData(),
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'collate_fn': {'type': 'pseudo_collate'},
    }
    return Runner(
        model=model or ToyModel(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        val_dataloader=dict(loader),
        val_evaluator=Evaluator(ToyMetric()),
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        val_cfg={},
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.01}},
        param_scheduler=[
            {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'end': 3},
            {'type': 'MultiStepLR', 'milestones': [1, 3]},
        ],
        default_hooks={
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 1,
                'save_best': 'score',
                'rule': 'greater',
            },
            'logger': {'type': 'LoggerHook', 'interval': 1},
        },
        custom_hooks=[{'type': 'EMAHook'}],
        experiment_name=f'toy_{torch.randint(10**9, ()).item()}',
        default_scope='mmengine',
        randomness={'seed': 0},
        log_level='WARNING',
        **kwargs,
    )


def train(work_dir, epochs=4, resume=None):
    """Train, and return what the Runner has at its end."""
    runner = build(work_dir, epochs, load_from=resume, resume=resume is not None)
    model = runner.train()
    loss, counts = runner.message_hub.get_scalar('train/loss').data
    return {
        'iter': runner.iter,
        'loss': loss.tolist(),
        'counts': counts.tolist(),
        'kind': type(runner.message_hub.get_scalar('train/loss')).__name__,
        'mean': float(runner.message_hub.get_scalar('train/loss').mean()),
        'score': float(runner.message_hub.get_info('best_score')),
        'lr': runner.optim_wrapper.get_lr()['lr'],
        'weights': {k: v.tolist() for k, v in model.state_dict().items()},
    }


if __name__ == '__main__':
    # in a process of its own: WORK_DIR CHECKPOINT OUT
    from mmrest.checkpoint import allow_mmengine_checkpoints

    assert allow_mmengine_checkpoints()
    with open(sys.argv[3], 'w') as file:
        json.dump(train(sys.argv[1], resume=sys.argv[2]), file)
