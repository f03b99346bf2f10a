"""Runs of MMEngine's Runner with a tiny ResT on drawn images, in seconds.

As a program (torchrun): a run in which one process meets a bad image, see
``test_nonfinite.py``.
"""

import sys

import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import Dataset

from mmrest import ResT

ARCH = dict(
    embed_dims=[8, 16, 24, 32],
    num_heads=[1, 2, 3, 4],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
)


class Regressor(BaseModel):
    """ResT and a linear layer that learns the number drawn with an image."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = ResT(**{'arch': ARCH, 'norm_eval': True, **backbone})
        self.head = nn.Linear(ARCH['embed_dims'][-1], 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.head(self.backbone(inputs)[-1].mean(dim=(2, 3))).squeeze(1)
        target = torch.stack([sample.target for sample in data_samples])
        if mode == 'loss':
            return dict(loss=(out - target).square(), accuracy=torch.tensor(torch.nan))
        return out


class Images(Dataset):
    """Images of 64x64 pixels with ids and paths; those in ``bad`` hold a NaN."""

    metainfo = dict(classes=('a',))

    def __init__(self, count=8, bad=()):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 3, 64, 64, generator=generator)
        self.targets = torch.rand(count, generator=generator)
        for index in bad:
            self.images[index, 0, 3, 3] = torch.nan

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        meta = dict(img_id=100 + index, img_path=f'images/{index}.jpg')
        sample = BaseDataElement(metainfo=meta, target=self.targets[index])
        return dict(inputs=self.images[index], data_samples=sample)


def collate(items):
    return dict(
        inputs=torch.stack([item['inputs'] for item in items]),
        data_samples=[item['data_samples'] for item in items],
    )


def loader(batch_size, data):
    # in order, so that a test knows which image comes when
    return dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=data,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=collate,
    )


def build(work_dir, model=None, iters=4, batch_size=2, data=None, **kwargs):
    """Build a Runner that saves after every second iteration."""
    torch.manual_seed(0)
    model = model or Regressor()
    model.init_weights()
    optimizer = kwargs.pop('optimizer', dict(type='SGD', lr=0.01))
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False))
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader(batch_size, data or Images()),
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=optimizer, **kwargs.pop('optim_wrapper', {})),
        default_hooks=hooks,
        default_scope='mmengine',
        experiment_name=f'run_{id(model)}',
        log_level='ERROR',
        **kwargs,
    )


def main():
    dist.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    # two processes, one image each: the fifth image is process 0's third
    runner = build(
        sys.argv[1],
        batch_size=1,
        data=Images(bad=[4]),
        launcher='pytorch',
        custom_hooks=[dict(type='CheckNonFiniteHook')],
        cfg=dict(model_wrapper_cfg=wrapper),
    )
    runner.train()


if __name__ == '__main__':
    main()
