"""tools/train.py: a whole run, resuming, other checkpoints, and how it fails."""

import os
import re
from unittest import mock

import pytest
import torch
from kill_checks import check_folder
from tool_runs import NO_VAL, iterations
from torch.testing import assert_close

from mmrest.checkpoint import read_checkpoint


def test_trains_saves_and_evaluates_from_another_folder(trained):
    folder, output = trained
    assert iterations(output) == [1, 2, 3, 4]
    assert re.search(r'eta: .*loss: .*loss_mask: ', output)
    assert 'coco/bbox_mAP_50: ' in output and 'coco/segm_mAP_50: ' in output
    assert (folder / 'iter_2.pth').is_file() and (folder / 'iter_4.pth').is_file()
    assert (folder / 'shapes.py').is_file()  # the whole config, for later
    # --tensorboard adds to the usual log
    assert list(folder.glob('*/vis_data/events.out.tfevents.*'))
    assert list(folder.glob('*/vis_data/scalars.json'))


def test_as_a_process(run, repo, config, tmp_path):
    """Also with the text of the config laid out, which costs the other runs time."""
    options = ['--cfg-options', 'train_cfg.max_iters=1', *NO_VAL]
    env = dict(PYTHONPATH=str(repo))
    output = run('train.py', config, *options, cwd=tmp_path, env=env)
    assert '\n    backbone=dict(\n' in output
    assert iterations(output) == [1]


@pytest.mark.parametrize('path', [None, 'iter_2.pth'])
def test_resume(call, config, trained, tmp_path, path, monkeypatch):
    folder, _ = trained
    load = mock.Mock(wraps=torch.load)
    monkeypatch.setattr(torch, 'load', load)
    if path is None:  # from the latest in the work folder
        first, resume = 5, ['--resume']
        (tmp_path / 'last_checkpoint').write_text(str(folder / 'iter_4.pth'))
    else:
        first, resume = 3, ['--resume', folder / path]
    options = [*resume, '--cfg-options', 'train_cfg.max_iters=5', *NO_VAL]
    output = call('train.py', config, '--work-dir', tmp_path, *options, cwd=tmp_path)
    assert iterations(output) == list(range(first, 6))
    # once to choose and check, and once by MMEngine
    assert load.call_count <= 2
    saved = read_checkpoint(tmp_path / 'iter_5.pth')
    assert saved['meta']['iter'] == 5
    assert saved['message_hub'] and saved['optimizer']['state']


def test_damaged_newest_checkpoint(call, config, trained, tmp_path):
    """The one before is taken with a warning; if both are damaged, none."""
    for name in ('iter_2.pth', 'iter_4.pth'):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_4.pth'))
    os.truncate(tmp_path / 'iter_4.pth', 20000)
    options = ['--work-dir', tmp_path, '--resume', '--no-preflight']
    options += ['--cfg-options', *NO_VAL]
    output = call('train.py', config, *options, cwd=tmp_path)
    assert iterations(output) == [3, 4]
    warning = next(line for line in output.splitlines() if 'WARNING - last_' in line)
    assert 'iter_4.pth' in warning and 'iter_2.pth, the newest complete' in warning
    check_folder(tmp_path)  # iter_4.pth is new
    for name in ('iter_2.pth', 'iter_4.pth'):
        os.truncate(tmp_path / name, 20000)
    output = call('train.py', config, *options, cwd=tmp_path, fails=True)
    assert 'tools/train.py: ' in output and 'no complete checkpoint' in output
    assert 'Iter(train)' not in output


def test_load_from_for_another_number_of_classes(call, config, trained, tmp_path):
    """Fine-tuning: a head of another size is new, the backbone is not."""
    folder, _ = trained
    saved = read_checkpoint(folder / 'iter_4.pth')['state_dict']
    other = {k: v for k, v in saved.items() if 'roi_head.bbox_head.fc_cls' not in k}
    other['roi_head.bbox_head.fc_cls.weight'] = torch.zeros(81, 32)
    torch.save(dict(state_dict=other), tmp_path / 'other.pth')
    options = [f'load_from={tmp_path / "other.pth"}', 'train_cfg.max_iters=1']
    options += ['optim_wrapper.optimizer.lr=0.0', *NO_VAL]
    output = call('train.py', config, '--cfg-options', *options, cwd=tmp_path)
    assert 'fits in part' in output and 'fc_cls' in output
    # The default work folder carries the config's name.
    now = read_checkpoint(tmp_path / 'work_dirs/shapes/iter_1.pth')
    key = 'backbone.patch_embed_2.conv.weight'
    assert_close(now['state_dict'][key], saved[key], rtol=0, atol=0)


def test_checkpoint_of_another_model_is_refused(call, config, tmp_path):
    torch.save(dict(model={'conv.weight': torch.zeros(3)}), tmp_path / 'other.pth')
    options = ['--cfg-options', f'load_from={tmp_path / "other.pth"}']
    output = call('train.py', config, *options, cwd=tmp_path, fails=True)
    assert 'tools/train.py: ' in output and 'other.pth' in output


def test_explosion_ends_with_its_reason(call, config, tmp_path):
    """The second iteration of a run whose first step was far too long."""
    options = ['--cfg-options', 'optim_wrapper.optimizer.lr=1e35']
    options += ['default_hooks.checkpoint.interval=1']
    output = call('train.py', config, *options, cwd=tmp_path, fails=True)
    end = output.rpartition('tools/train.py: ')[2]
    assert end.startswith('iteration 2: a loss is NaN or infinite.')
    assert len(re.findall(r'train_\d\.jpg', end)) == 2
    assert re.search(r'first in backbone\.\S+ \(', end)
    assert 'iter_1.pth, is from before' in end


@pytest.mark.slow
def test_undecodable_image_is_named_in_training(finish, config, dataset):
    """As when the check before the run did not decode that very image."""
    for path in (dataset / 'images').glob('train_*.jpg'):
        path.write_bytes(b'<html>')
    options = ['--cfg-options', f'train_dataloader.dataset.data_root={dataset}']
    options += ['preflight.decode=0']
    output = finish('train.py', config, *options, fails=True)
    assert re.search(r'train_\d\.jpg', output.splitlines()[-1])


@pytest.mark.slow
def test_two_processes_without_gpus(run, config, tmp_path):
    options = ['--work-dir', tmp_path / 'run', '--auto-scale-lr', '--cfg-options']
    options += ['train_cfg.max_iters=2', *NO_VAL]
    output = run('dist_train.sh', config, 2, *options, cwd=tmp_path)
    assert iterations(output) == [1, 2]
    assert 'current batch size is 4' in output  # 2 processes x 2 images
    assert 'Distributed launcher: pytorch' in output
    saved = read_checkpoint(tmp_path / 'run' / 'iter_2.pth')
    assert not any(key.startswith('module.') for key in saved['state_dict'])
