"""Files and command lines of the converters."""

import hashlib
import os

import pytest
import torch

from mmrest import __version__
from mmrest.checkpoint import read_checkpoint
from mmrest.converters import convert_to_mmdet, files

TO_MMDET, BACK = 'detectron2_to_mmdet', 'mmdet_to_detectron2'


@pytest.fixture
def tool(call, tmp_path):
    """Call a converter: tool(name, *args) gives its output."""

    def run(name, *args, **options):
        return call(f'model_converters/{name}.py', *args, cwd=tmp_path, **options)

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


def test_there_and_back(tool, source, tmp_path, repo):
    from mmdet.apis import init_detector

    before = digest(source)
    converted, back = tmp_path / 'mmdet.pth', tmp_path / 'back.pth'
    text = tool(TO_MMDET, source, converted)
    assert 'retinanet rest_small, 80 classes' in text
    assert 'configs/retinanet/rest_small_fpn_1x_published.py' in text
    assert digest(source) == before

    meta = read_checkpoint(converted)['meta']
    assert meta['config'] == 'retinanet/rest_small_fpn_1x_published.py'
    assert meta['dataset_meta']['classes'][:2] == ('person', 'bicycle')
    assert len(meta['dataset_meta']['palette']) == 80
    assert meta['converter']['mmrest_version'] == __version__
    assert meta['converter']['source_sha256'] == before

    tool(BACK, converted, back)
    old, new = read_checkpoint(source)['model'], read_checkpoint(back)['model']
    assert list(new) == list(old)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert sorted(os.listdir(tmp_path)) == ['back.pth', 'mmdet.pth', 'published.pth']

    # inferencers find the classes
    config = repo / 'configs/retinanet/rest_small_fpn_1x_published.py'
    options = {'model.backbone.init_cfg': None}
    model = init_detector(
        str(config), str(converted), device='cpu', cfg_options=options
    )
    assert model.dataset_meta['classes'][79] == 'toothbrush'


def test_dry_run(tool, source, tmp_path):
    text = tool(TO_MMDET, source, '--dry-run')
    assert (
        'head.cls_score.weight -> bbox_head.retina_cls.weight  (720, 256, 3, 3)'
        '  (anchors reordered)' in text
    )
    assert text.count(' -> ') == 312
    assert os.listdir(tmp_path) == ['published.pth']


def test_from_a_url_and_from_home(server, source, tmp_path, monkeypatch):
    """What the reader accepts, the hash in the meta accepts."""
    url, root = server
    source.rename(root / 'published.pth')
    monkeypatch.setenv('HOME', str(root))
    for name in (f'{url}/published.pth?download=1', '~/published.pth'):
        _, checkpoint = convert_to_mmdet(name)
        history = checkpoint['meta']['converter']
        assert history['source_sha256'] == digest(root / 'published.pth')
        assert history['source'] == 'published.pth'


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
    assert message in tool(TO_MMDET, 'bad.pth', 'out.pth', fails=True)
    assert os.listdir(tmp_path) == ['bad.pth']


@pytest.mark.parametrize('share', [0.0, 0.5, 0.999])
def test_half_downloaded(share, tool, source, tmp_path):
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    text = tool(TO_MMDET, source, 'out.pth', fails=True)
    assert text.startswith(f'error: {source}') and text.count(str(source)) == 1
    assert not (tmp_path / 'out.pth').exists()


def test_names_of_other_classes(tool, tmp_path, published):
    state = published('retinanet', 'small')
    three_classes(state)
    torch.save({'model': state}, tmp_path / 'three.pth')
    tool(TO_MMDET, 'three.pth', 'out.pth', '--classes', 'a', 'b', 'c')
    meta = read_checkpoint(tmp_path / 'out.pth')['meta']['dataset_meta']
    assert meta['classes'] == ('a', 'b', 'c') and len(meta['palette']) == 3


def test_files_are_not_overwritten(tool, source, tmp_path):
    out = tmp_path / 'out.pth'
    out.write_text('precious')
    assert 'exists; use --force' in tool(TO_MMDET, source, out, fails=True)
    assert out.read_text() == 'precious'
    before = digest(source)
    text = tool(TO_MMDET, source, source, '--force', fails=True)
    assert 'is the source' in text and digest(source) == before
    tool(TO_MMDET, source, tmp_path / 'none' / 'out.pth', fails=True)
    tool(TO_MMDET, source, tmp_path, fails=True)
    assert 'name it .pth' in tool(TO_MMDET, source, 'out.pkl', fails=True)
    assert 'name the file' in tool(TO_MMDET, source, fails=True)
    tool(TO_MMDET, source, out, '--force')
    assert 'state_dict' in read_checkpoint(out)


@pytest.mark.parametrize('save', [files.save, files.publish])
def test_output_on_a_full_disk_appears_not_at_all(tmp_path, file_limit, save):
    content = {'state_dict': {'weight': torch.zeros(1000)}}
    torch.save(content, tmp_path / 'in.pth')
    given = content if save is files.save else tmp_path / 'in.pth'
    with file_limit(1000), pytest.raises(OSError, match="too large: '.*/out"):
        save(given, tmp_path / 'out.pth')
    assert os.listdir(tmp_path) == ['in.pth']


@pytest.mark.parametrize('options', [(), ('--format', 'safetensors')], ids=str)
def test_publish(tool, tmp_path, options):
    state = {'backbone.weight': torch.arange(3.0)}
    trained = {'state_dict': state, 'optimizer': {'lr': 1}, 'message_hub': {}}
    torch.save({**trained, 'meta': {'epoch': 12}}, tmp_path / 'epoch_12.pth')
    command = ('publish_model', 'epoch_12.pth', 'rest.pth', *options)
    text = tool(*command)
    (path,) = tmp_path.glob('rest-*')
    suffix = '.safetensors' if options else '.pth'
    assert path.name == f'rest-{digest(path)[:8]}{suffix}' and path.name in text
    content = read_checkpoint(path)
    assert set(content) == {'meta', 'state_dict'} and content['meta']['epoch'] == 12
    assert torch.equal(content['state_dict']['backbone.weight'], torch.arange(3.0))
    assert 'exists; use --force' in tool(*command, fails=True)
    assert sorted(os.listdir(tmp_path)) == ['epoch_12.pth', path.name]


@pytest.mark.slow
def test_real_process(run, tmp_path):
    """The tool as a user starts it."""
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>Not found</html>')
    command = (f'model_converters/{TO_MMDET}.py', 'page.pth', 'x')
    assert run(*command, cwd=tmp_path, fails=True).count('error: page.pth') == 1
    assert os.listdir(tmp_path) == ['page.pth']
