"""Files and command lines of the converters."""

import hashlib
import os
import runpy
import subprocess
import sys

import pytest
import torch

from mmrest import __version__
from mmrest.converters import files

FORTH, BACK = 'detectron2_to_mmdet', 'mmdet_to_detectron2'


@pytest.fixture
def tool(repo, monkeypatch, capsys):
    """Run a converter's command line: tool(name, *args) gives status and text."""

    def run(name, *args):
        path = repo / 'tools/model_converters' / f'{name}.py'
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, args)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(path), run_name='__main__')
        captured = capsys.readouterr()
        return done.value.code, captured.out + captured.err

    return run


@pytest.fixture
def source(tmp_path, published):
    """A published RetinaNet beside a training state, as a file."""
    path = tmp_path / 'published.pth'
    content = {'model': published('retinanet', 'small'), 'iteration': 89999}
    torch.save(content, path)
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_there_and_back(tool, source, tmp_path):
    before = digest(source)
    converted, back = tmp_path / 'mmdet.pth', tmp_path / 'back.pth'
    status, text = tool(FORTH, source, converted)
    assert status == 0
    assert 'retinanet rest_small, 80 classes' in text
    assert 'configs/retinanet/rest_small_fpn_1x_published.py' in text
    assert digest(source) == before

    meta = torch.load(converted, weights_only=True)['meta']
    assert meta['config'] == 'retinanet/rest_small_fpn_1x_published.py'
    assert meta['dataset_meta']['classes'][:2] == ('person', 'bicycle')
    assert len(meta['dataset_meta']['palette']) == 80
    assert meta['converter']['mmrest_version'] == __version__
    assert meta['converter']['source_sha256'] == before

    assert tool(BACK, converted, back)[0] == 0
    old = torch.load(source, weights_only=True)['model']
    new = torch.load(back, weights_only=True)['model']
    assert list(new) == list(old)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert sorted(os.listdir(tmp_path)) == ['back.pth', 'mmdet.pth', 'published.pth']


def test_inferencers_find_the_classes(tool, source, tmp_path, repo):
    from mmdet.apis import init_detector

    tool(FORTH, source, tmp_path / 'mmdet.pth')
    config = repo / 'configs/retinanet/rest_small_fpn_1x_published.py'
    options = {'model.backbone.init_cfg': None}
    model = init_detector(
        str(config), str(tmp_path / 'mmdet.pth'), device='cpu', cfg_options=options
    )
    assert model.dataset_meta['classes'][79] == 'toothbrush'


def test_dry_run(tool, source, tmp_path):
    status, text = tool(FORTH, source, '--dry-run')
    assert status == 0
    assert (
        'head.cls_score.weight -> bbox_head.retina_cls.weight  (720, 256, 3, 3)'
        '  (anchors reordered)' in text
    )
    assert text.count(' -> ') == 312
    assert os.listdir(tmp_path) == ['published.pth']


def resnet(state):
    state.clear()
    state.update({'conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.bias': torch.zeros(9)})


def three_classes(state):
    state['head.cls_score.weight'] = state['head.cls_score.weight'][:27].clone()
    state['head.cls_score.bias'] = state['head.cls_score.bias'][:27].clone()


def nan(state):
    state['backbone.fpn_output3.bias'] = torch.full((256,), float('nan'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (resnet, 'no Mask R-CNN or RetinaNet'),
        (three_classes, '3 classes, but 80 names'),
        (nan, 'NaN or infinite values in 1: backbone.fpn_output3.bias'),
    ],
)
def test_bad_input_leaves_no_file(change, message, tool, tmp_path, published):
    state = published('retinanet', 'small')
    change(state)
    torch.save({'model': state}, tmp_path / 'bad.pth')
    status, text = tool(FORTH, tmp_path / 'bad.pth', tmp_path / 'out.pth')
    assert status == 1
    assert message in text and 'Traceback' not in text
    assert os.listdir(tmp_path) == ['bad.pth']


@pytest.mark.parametrize('share', [0.0, 0.5, 0.999])
def test_half_downloaded(share, tool, source, tmp_path):
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    status, text = tool(FORTH, source, tmp_path / 'out.pth')
    assert status == 1
    assert text.startswith(f'error: {source}') and 'Traceback' not in text
    assert not (tmp_path / 'out.pth').exists()


def test_names_of_other_classes(tool, tmp_path, published):
    state = published('retinanet', 'small')
    three_classes(state)
    source, out = tmp_path / 'three.pth', tmp_path / 'out.pth'
    torch.save({'model': state}, source)
    assert tool(FORTH, source, out, '--classes', 'a', 'b', 'c')[0] == 0
    meta = torch.load(out, weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == ('a', 'b', 'c') and len(meta['palette']) == 3


def test_files_are_not_overwritten(tool, source, tmp_path):
    out = tmp_path / 'out.pth'
    out.write_text('precious')
    status, text = tool(FORTH, source, out)
    assert status == 1 and 'exists; use --force' in text
    assert out.read_text() == 'precious'
    before = digest(source)
    status, text = tool(FORTH, source, source, '--force')
    assert status == 1 and 'is the source' in text
    assert digest(source) == before
    assert tool(FORTH, source, tmp_path / 'none' / 'out.pth')[0] == 1
    assert tool(FORTH, source, tmp_path)[0] == 1
    assert tool(FORTH, source)[0] == 1  # no output named
    assert tool(FORTH, source, out, '--force')[0] == 0
    assert 'state_dict' in torch.load(out, weights_only=True)


def test_output_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(checkpoint, file):
        file.write(b'half')
        raise OSError('no space left on device')

    monkeypatch.setattr(files.torch, 'save', fail)
    with pytest.raises(OSError, match='no space'):
        files.save({}, tmp_path / 'out.pth')
    assert os.listdir(tmp_path) == []


def test_publish(tool, tmp_path):
    state = {'backbone.weight': torch.arange(3.0)}
    trained = {'state_dict': state, 'optimizer': {'lr': 1}, 'message_hub': {}}
    torch.save({**trained, 'meta': {'epoch': 12}}, tmp_path / 'epoch_12.pth')
    status, text = tool(
        'publish_model', tmp_path / 'epoch_12.pth', tmp_path / 'rest.pth'
    )
    assert status == 0
    (path,) = tmp_path.glob('rest-*.pth')
    assert path.name == f'rest-{digest(path)[:8]}.pth' and str(path) in text
    content = torch.load(path, weights_only=True)
    assert set(content) == {'meta', 'state_dict'} and content['meta']['epoch'] == 12
    assert torch.equal(content['state_dict']['backbone.weight'], torch.arange(3.0))
    again = ('publish_model', tmp_path / 'epoch_12.pth', tmp_path / 'rest.pth')
    assert tool(*again)[0] == 1  # the same file exists
    assert sorted(os.listdir(tmp_path)) == ['epoch_12.pth', path.name]


def test_real_process(repo, tmp_path):
    """The tool as a user starts it."""
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>Not found</html>')
    done = subprocess.run(
        [sys.executable, repo / f'tools/model_converters/{FORTH}.py', 'page.pth', 'x'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(repo)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count('error: page.pth') == 1
    assert os.listdir(tmp_path) == ['page.pth']
