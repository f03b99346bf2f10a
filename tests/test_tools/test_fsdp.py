"""FSDP through MMEngine's FlexibleRunner, with gloo on the CPU."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from tool_runs import NO_VAL, iterations

from mmrest.checkpoint import read_state_dict

WITH_UNITS = """
custom_imports = dict(imports=['mmrest', 'note_units'], allow_failed_imports=False)
custom_hooks = [
    dict(type='CheckNonFiniteHook'), dict(type='PreemptionHook'), dict(type='NoteUnits')
]
"""
NOTE_UNITS = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.fsdp import FullyShardedDataParallel

@HOOKS.register_module()
class NoteUnits(Hook):
    def before_train(self, runner):
        units = {
            name.replace('_fsdp_wrapped_module.', '').replace('module.', '')
            for name, module in runner.model.named_modules()
            if isinstance(module, FullyShardedDataParallel)
        }
        counts = sum(p.numel() for p in runner.model.parameters())
        with open(f'units{runner.rank}', 'w') as file:
            print(counts, *sorted(units), sep='\\n', file=file)
"""
OPTIONS = [
    *NO_VAL,
    'randomness.seed=3',
    'default_hooks.checkpoint.interval=1',
    'param_scheduler=None',
]


def build_detector(path):
    from mmdet.registry import MODELS

    config = Config.fromfile(path)
    init_default_scope('mmdet')
    return MODELS.build(config.model)


@pytest.mark.slow
@pytest.mark.parametrize('backbone', ['ResT', 'ResTV2'])
def test_equals_ddp_and_resumes(backbone, finish, config, repo, tmp_path):
    base = 'mmrest::mask_rcnn/rest_lite_fpn_1x.py'
    shipped = repo / 'configs/mask_rcnn/rest_base_fpn_1x_fsdp.py'
    text = config.read_text()
    assert base in text
    if backbone == 'ResT':
        new = text.replace(base, 'mmrest::mask_rcnn/rest_base_fpn_1x.py')
        sharded = text.replace(base, 'mmrest::mask_rcnn/rest_base_fpn_1x_fsdp.py')
    else:  # as a user writes it: the lines of the shipped config in another one
        new = text.replace(base, 'mmrest::mask_rcnn/restv2_tiny_fpn_1x.py')
        sharded = new + shipped.read_text().split("_base_fpn_1x.py'\n")[1]
    sgd = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)
    sgd = dict(_delete_=True, type='OptimWrapper', optimizer=sgd)
    sgd = f'optim_wrapper = {sgd}\n'
    (tmp_path / 'note_units.py').write_text(NOTE_UNITS)
    (tmp_path / 'shapes.py').write_text(new + sgd)
    (tmp_path / 'shapes_fsdp.py').write_text(sharded + sgd + WITH_UNITS)

    def train(name, resume, iters):
        command = ['train.py', tmp_path / f'shapes{name}.py', '--resume', *resume]
        command += ['--work-dir', tmp_path / f'run{name}', '--cfg-options', *OPTIONS]
        return finish(*command, f'train_cfg.max_iters={iters}', ranks=2)

    ddp_run, fsdp_run = tmp_path / 'run', tmp_path / 'run_fsdp'
    train('', [], 3)
    # from the same weights, and with the same random numbers
    train('_fsdp', [ddp_run / 'iter_1.pth'], 3)

    units = (tmp_path / 'units0').read_text().split('\n')[1:-1]
    blocks = [f'backbone.stage{n}.0' for n in range(1, 5)]
    assert units == ['', *blocks]
    held = [int((tmp_path / f'units{n}').read_text().split()[0]) for n in range(2)]
    ddp, fsdp = (read_state_dict(run / 'iter_3.pth') for run in (ddp_run, fsdp_run))
    before = read_state_dict(ddp_run / 'iter_1.pth')
    assert ddp.keys() == fsdp.keys()
    moved = 0
    for key, value in ddp.items():
        torch.testing.assert_close(
            fsdp[key],
            value,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, k=key: f'{k}: {text}',
        )
        moved += not torch.allclose(before[key], value, rtol=1e-4, atol=1e-6)
    assert moved > len(ddp) / 2
    detector = build_detector(tmp_path / 'shapes.py')
    detector.load_state_dict(fsdp, strict=True)
    # neither process holds the whole model
    assert max(held) < sum(v.numel() for v in ddp.values()) * 0.75

    assert iterations(train('_fsdp', [], 4))[-1] == 4
    assert torch.load(fsdp_run / 'iter_4.pth', weights_only=False)['meta']['iter'] == 4
