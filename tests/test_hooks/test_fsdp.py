"""What FSDP makes of ResT in one process; two processes: tests/test_tools."""

import torch.distributed as dist
from preempt_runs import in_process
from rest_runs import ARCH, Regressor

from mmrest.models.rest import Block
from mmrest.strategies.fsdp import BlockFSDPStrategy, rest_block_wrap_policy


def test_policy_asks_for_blocks_alone():
    model = Regressor(arch=dict(ARCH, depths=[2, 1, 1, 1]))
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
        from mmengine.registry import MODEL_WRAPPERS
        from torch.distributed.fsdp import FullyShardedDataParallel

        meeting = f'file://{tmp_path / "meeting"}'
        dist.init_process_group('gloo', init_method=meeting, rank=0, world_size=1)
        strategy = BlockFSDPStrategy(work_dir=str(tmp_path))
        config = dict(strategy.model_wrapper, module=Regressor())
        model = MODEL_WRAPPERS.build(config)
        units = FullyShardedDataParallel.fsdp_modules(model)
        kinds = [type(unit.module).__name__ for unit in units]
        assert sorted(kinds) == ['Block'] * 4 + ['Regressor']

    assert in_process(check) == 0
