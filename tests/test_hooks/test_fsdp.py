"""FSDP by blocks of ResT; the tools with it: tests/test_tools/test_fsdp.py."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODEL_WRAPPERS
from rest_variants import TINY
from torch.distributed.fsdp import FullyShardedDataParallel
from toy_runs import (
    Images,
    QuietFlexibleRunner,
    Regressor,
    exit_codes,
    in_process,
    in_processes,
    train,
)

from mmrest.checkpoint import read_checkpoint
from mmrest.models.rest import Block
from mmrest.strategies import BlockFSDPStrategy, rest_block_wrap_policy


def test_policy_asks_for_blocks_alone():
    model = Regressor(arch=dict(TINY, depths=[2, 1, 1, 1]))
    chosen = [
        name
        for name, module in model.named_modules()
        if rest_block_wrap_policy(module, recurse=False, nonwrapped_numel=1)
    ]
    blocks = [name for name, part in model.named_modules() if isinstance(part, Block)]
    assert chosen == blocks and len(blocks) == 5
    assert rest_block_wrap_policy(model, recurse=True, nonwrapped_numel=1)


def test_every_block_is_a_unit(tmp_path):
    def check():
        meeting = f'file://{tmp_path / "meeting"}'
        dist.init_process_group('gloo', init_method=meeting, rank=0, world_size=1)
        strategy = BlockFSDPStrategy(work_dir=str(tmp_path))
        config = dict(strategy.model_wrapper, module=Regressor())
        model = MODEL_WRAPPERS.build(config)
        units = FullyShardedDataParallel.fsdp_modules(model)
        kinds = [type(unit.module).__name__ for unit in units]
        assert sorted(kinds) == ['Block'] * 4 + ['Regressor']
        with pytest.raises(ValueError, match='clip_grad has foreach, which clipping'):
            strategy.build_optim_wrapper(
                dict(
                    optimizer=dict(type='SGD', lr=0.1),
                    clip_grad=dict(max_norm=1, foreach=False),
                ),
                model,
            )

    assert in_process(check) == 0


@pytest.mark.slow
@pytest.mark.parametrize('norm_type', [2, 1])
def test_clips_by_the_norm_of_the_whole_gradient(tmp_path, norm_type):
    """As DistributedDataParallel does; with SGD and a rate of 1 steps are gradients."""
    options = dict(
        data=Images(size=32),
        iters=2,
        optimizer=dict(type='SGD', lr=1.0),
        optim_wrapper=dict(clip_grad=dict(max_norm=0.01, norm_type=norm_type)),
        param_scheduler=None,
        batch_size=1,
        launcher='pytorch',
    )

    def train_with(rank, strategy, **kwargs):
        # the strategy finds the group
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
        torch.manual_seed(0)
        train(
            tmp_path / strategy['type'],
            Regressor(),
            runner_type=QuietFlexibleRunner,
            strategy=strategy,
            **options,
        )

    fsdp = dict(type='BlockFSDPStrategy')
    ddp = dict(type='DDPStrategy', model_wrapper=dict(device_ids=None))
    for strategy in (ddp, fsdp):
        run = functools.partial(train_with, strategy=strategy)
        assert exit_codes(in_processes(run, tmp_path)) == [0, 0]
    ours, theirs = (
        read_checkpoint(tmp_path / kind['type'] / 'iter_2.pth')['state_dict']
        for kind in (fsdp, ddp)
    )
    # DDPStrategy saves the names of the wrapped model
    theirs = {name.removeprefix('module.'): value for name, value in theirs.items()}
    assert ours.keys() == theirs.keys()
    torch.manual_seed(0)
    start = Regressor().state_dict()
    moved = max((theirs[name] - value).abs().max() for name, value in start.items())
    assert moved > 1e-4
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
