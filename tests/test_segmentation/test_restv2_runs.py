"""A segmentor with a small ResTV2 on photographs, from a file in published form."""

import pytest
import torch
from weights_rule import fill

from mmrest import ResTV2

pytestmark = pytest.mark.slow

ARCH = dict(
    embed_dims=[32, 64, 128, 256],
    num_heads=[1, 2, 4, 8],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=2,
)
CONFIG = """
_base_ = 'mmrest::camvid/semantic_fpn_rest_camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ResTV2',
        arch={arch},
        init_cfg=dict(type='Pretrained', checkpoint={checkpoint!r}),
    ),
)
data = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root={root!r}, indices=4)
)
train_dataloader = data
val_dataloader = data
test_dataloader = data
train_cfg = dict(val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
"""


def test_train_resume_and_test(finish, shared, tmp_path):
    state = fill(ResTV2(ARCH, out_indices=(3,), out_norm='final').state_dict())
    head = {'head.weight': torch.ones(1000, 256), 'head.bias': torch.ones(1000)}
    checkpoint = tmp_path / 'restv2.pth'
    torch.save(dict(model={**state, **head}), checkpoint)
    root = str(shared / 'data' / 'camvid_subset')
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(arch=ARCH, checkpoint=str(checkpoint), root=root))

    work_dir = ['--work-dir', tmp_path / 'run']
    end = ['--cfg-options', 'train_cfg.max_iters=1']
    output = finish('train.py', config, *work_dir, *end)
    assert f'Loaded {len(state) - 2} tensors' in output  # without the final norm
    end = ['--resume', '--cfg-options', 'train_cfg.max_iters=2']
    output = finish('train.py', config, *work_dir, *end, ranks=2)
    assert 'Iter(train) [2/2]' in output
    saved = tmp_path / 'run' / 'iter_2.pth'
    rows = []
    for ranks in (1, 2):
        output = finish('test.py', config, saved, ranks=ranks)
        rows.append([line for line in output.splitlines() if line.startswith('|')])
    assert rows[0] and rows[0] == rows[1]
