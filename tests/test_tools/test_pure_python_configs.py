"""Configs in pure Python, whose types are classes, as mmdet has some."""

import pickle

import pytest
from mmengine import registry as registries
from mmengine.config import Config
from mmengine.registry import DefaultScope
from tool_runs import iterations

from mmrest.utils.config_types import find_toolbox, type_name

KINDS = 'MODELS DATASETS DATA_SAMPLERS TRANSFORMS METRICS HOOKS LOOPS OPTIMIZERS'
KINDS += ' OPTIM_WRAPPERS PARAM_SCHEDULERS TASK_UTILS VISUALIZERS VISBACKENDS'
KINDS += ' LOG_PROCESSORS WEIGHT_INITIALIZERS'
RUNTIME = 'default_hooks custom_hooks visualizer log_processor env_cfg'.split()


class Bare(str):
    """A name that is written without quotes."""

    __repr__ = str.__str__


def find(name):
    """The class of that name, unless it is a layer, which stays a name."""
    for kind in KINDS.split():
        with getattr(registries, kind).switch_scope_and_registry(None) as registry:
            found = registry.get(name)
        if found is not None and not found.__module__.startswith('torch.nn'):
            return found
    return None


def pure_lines(fields):
    """Fields of a text config as code with imports."""
    imports = set()

    def convert(part):
        if isinstance(part, (list, tuple)):
            return type(part)(map(convert, part))
        if not isinstance(part, dict):
            return part
        part = {key: convert(value) for key, value in part.items() if key != '_scope_'}
        kind = find(part['type']) if isinstance(part.get('type'), str) else None
        if kind is not None:
            part['type'] = Bare(kind.__name__)
            imports.add(f'from {kind.__module__} import {kind.__name__}')
        return part

    lines = [f'{key} = {convert(value)!r}' for key, value in fields.items()]
    return [*sorted(imports), *lines]


@pytest.fixture(scope='module')
def pure(retina, tmp_path_factory):
    """Write such a config: pure(default_scope)."""

    def write(scope=None):
        folder = tmp_path_factory.mktemp('pure')
        with DefaultScope.overwrite_default_scope('mmdet'):
            fields = Config.fromfile(retina).to_dict()
            del fields['custom_imports']
            fields['default_scope'] = scope
            runtime = {name: fields.pop(name) for name in RUNTIME}
            read = ['from mmengine.config import read_base', 'with read_base():']
            read.append('    from .runtime import *')
            for name, lines in (
                ('runtime', pure_lines(runtime)),
                ('pure', [*read, *pure_lines(fields)]),
            ):
                (folder / f'{name}.py').write_text('\n'.join(lines))
        return folder / 'pure.py'

    return write


@pytest.mark.parametrize('scope', [None, pytest.param('mmdet', marks=pytest.mark.slow)])
def test_train_and_test(call, pure, scope, metrics):
    path = pure(scope)
    folder = path.parent
    output = call('train.py', path, '--work-dir', 'run', '--tensorboard', cwd=folder)
    assert iterations(output) == [1, 2]
    assert list(folder.glob('run/*/vis_data/events.out.tfevents.*'))
    test = ['test.py', path, 'run/iter_2.pth', '--work-dir']
    call(*test, 'drawn', '--show-dir', 'p', '--out', 'results.json', cwd=folder)
    assert len(list(folder.glob('drawn/*/p/*.jpg'))) == 5
    assert (folder / 'results.bbox.json').stat().st_size > 100
    call(*test, 'tta', '--tta', '--out', 'results.pkl', cwd=folder)
    image = Config.fromfile(path).test_dataloader.dataset.data_root
    image += '/images/val_0.jpg'
    call('image_demo.py', image, path, 'run/iter_2.pth', '--out-dir', 'o', cwd=folder)
    assert (folder / 'o' / 'vis' / 'val_0.jpg').is_file()
    predictions = pickle.loads((folder / 'results.pkl').read_bytes())
    assert len(predictions[0]['pred_instances']['bboxes']) >= 10
    assert 'coco/bbox_mAP' in metrics(folder / 'tta')


def test_wrong_number_of_classes_is_seen(call, pure):
    path = pure()
    options = ['--cfg-options', 'model.bbox_head.num_classes=3']
    output = call('train.py', path, *options, cwd=path.parent, fails=True)
    assert 'model.bbox_head.num_classes is 3' in output


def test_get_flops(call, pure):
    path = pure()
    options = ['--shape', '64', '96', '--cfg-options', 'model.backbone.in_channels=4']
    output = call('analysis_tools/get_flops.py', path, *options, cwd=path.parent)
    assert 'one image of 64x96' in output and 'bbox_head' in output


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        (dict(default_scope='mmseg', model=dict(type='RetinaNet')), 'mmseg'),
        (dict(default_scope=None, model=dict(type='mmdet.RetinaNet')), 'mmdet'),
        (dict(model=dict(type='ImageClassifier', _scope_='mmpretrain')), 'mmpretrain'),
        (dict(model=dict(type='mmseg.UNet', _scope_='mmrest')), 'mmseg'),
        (dict(model=dict(type='RetinaNet')), None),
        (dict(), None),
    ],
)
def test_toolbox_of_a_text_config(fields, expected):
    assert find_toolbox(Config(fields)) == expected


def test_toolbox_of_a_class(pure):
    cfg = Config.fromfile(pure())
    assert cfg.default_scope is None and find_toolbox(cfg) == 'mmdet'
    assert type_name(cfg.test_evaluator) == 'CocoMetric'
