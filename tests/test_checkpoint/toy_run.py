"""Train a toy model with mmengine's Runner; run as a program by the tests.

It writes everything that a checkpoint of mmengine can hold: optimizer, scheduler,
EMA, loss history, numpy values in metrics and in the data set's meta.
"""

import argparse
import json

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


def main():
    """Train, and write what the Runner has at its end."""
    parser = argparse.ArgumentParser()
    parser.add_argument('work_dir')
    parser.add_argument('out')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--resume')
    parser.add_argument('--with-mmrest', action='store_true')
    args = parser.parse_args()
    if args.with_mmrest:
        from mmrest.checkpoint import allow_mmengine_checkpoints

        assert allow_mmengine_checkpoints()
    runner = build(
        args.work_dir,
        args.epochs,
        load_from=args.resume,
        resume=args.resume is not None,
    )
    model = runner.train()
    loss, counts = runner.message_hub.get_scalar('train/loss').data
    state = {
        'iter': runner.iter,
        'loss': loss.tolist(),
        'counts': counts.tolist(),
        'kind': type(runner.message_hub.get_scalar('train/loss')).__name__,
        'mean': float(runner.message_hub.get_scalar('train/loss').mean()),
        'score': float(runner.message_hub.get_info('best_score')),
        'lr': runner.optim_wrapper.get_lr()['lr'],
        'weights': {k: v.tolist() for k, v in model.state_dict().items()},
    }
    with open(args.out, 'w') as file:
        json.dump(state, file)


if __name__ == '__main__':
    main()
