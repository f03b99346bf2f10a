"""tools/test.py: figures, files, pictures; one process against two."""

import json
import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmrest.checkpoint import read_checkpoint
from mmrest.launch import LaunchError
from mmrest.utils.evaluation import draw_predictions, write_predictions


@pytest.fixture(scope='module')
def checkpoint(trained):
    return trained[0] / 'iter_4.pth'


@pytest.fixture(scope='module')
def tested(call, config, checkpoint, tmp_path_factory):
    """Folder and output of a test in one process."""
    folder = tmp_path_factory.mktemp('tested')
    options = ['--work-dir', folder / 'run', '--out', folder / 'results.json']
    options += ['--show-dir', 'pictures']
    options += ['--cfg-options', 'test_evaluator.classwise=True']
    return folder, call('test.py', config, checkpoint, *options, cwd=folder)


def test_prints_all_figures_and_those_of_each_class(tested):
    _, output = tested
    for kind in ('bbox', 'segm'):
        assert f'coco/{kind}_mAP_50: ' in output
        # COCO's twelve lines
        assert output.count('Average Precision') == 12
        assert output.count('Average Recall') == 12
    assert '| box ' in output and '| diamond ' in output


def test_show_dir_draws_every_image(tested):
    folder, _ = tested
    assert len(list((folder / 'run').glob('*/pictures/*.jpg'))) == 5


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_written_results_give_the_printed_figures(tested, config, metrics, kind):
    folder, _ = tested
    truth = COCO(str(config.parent / 'shapes' / 'val.json'))
    results = truth.loadRes(str(folder / f'results.{kind}.json'))
    evaluation = COCOeval(truth, results, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    printed = metrics(folder / 'run')
    names = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']
    for name, figure in zip(names, evaluation.stats):
        assert printed[f'coco/{kind}_{name}'] == pytest.approx(figure, abs=6e-4)


@pytest.mark.slow
def test_two_processes_give_exactly_the_results_of_one(
    run, config, checkpoint, tested, metrics, tmp_path
):
    options = ['--work-dir', tmp_path / 'run', '--out', tmp_path / 'results.json']
    output = run('dist_test.sh', config, checkpoint, 2, *options, cwd=tmp_path)
    assert 'Iter(test) [3/3]' in output  # five images on two processes
    one, two = metrics(tested[0] / 'run'), metrics(tmp_path / 'run')
    figures = [key for key in two if '_mAP' in key]
    assert len(figures) == 12
    assert {key: two[key] for key in figures} == {key: one[key] for key in figures}
    for kind in ('bbox', 'segm'):
        first = json.loads((tested[0] / f'results.{kind}.json').read_text())
        second = json.loads((tmp_path / f'results.{kind}.json').read_text())
        assert len(first) > 10
        assert second == first


def test_tta_and_pickle(call, retina, tmp_path):
    cfg = Config.fromfile(retina)
    init_default_scope(cfg.default_scope)
    weights = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=weights), tmp_path / 'retina.pth')

    results = tmp_path / 'results.pkl'
    options = [retina, tmp_path / 'retina.pth', '--tta', '--out', results]
    output = call('test.py', *options, cwd=tmp_path)
    assert 'coco/bbox_mAP: ' in output
    results = pickle.loads(results.read_bytes())
    assert len(results) == 5
    assert len(results[0]['pred_instances']['bboxes']) >= 10


def test_tta_with_masks_is_refused(call, config, checkpoint, tmp_path):
    output = call('test.py', config, checkpoint, '--tta', cwd=tmp_path, fails=True)
    assert output.endswith('mask head. Test without --tta.\n')


def test_checkpoint_that_does_not_fit_is_refused(call, config, checkpoint, tmp_path):
    """MMEngine itself would warn and evaluate random weights."""
    saved = read_checkpoint(checkpoint)
    key = 'roi_head.bbox_head.fc_cls.weight'
    saved['state_dict'][key] = torch.zeros(81, 32)
    other = tmp_path / 'other_classes.pth'
    torch.save(saved, other)
    output = call('test.py', config, other, cwd=tmp_path, fails=True)
    message = output[output.rindex('tools/test.py: ') :]
    assert 'other_classes.pth' in message and key in message


@pytest.mark.parametrize(
    ('hook', 'drawn'),
    [
        ('mmdet.DetVisualizationHook', dict(draw=True, test_out_dir='out')),
        ('SegVisualizationHook', dict(draw=True, interval=1)),
        ('VisualizationHook', dict(enable=True, interval=1, out_dir='out')),
    ],
)
def test_show_dir_in_each_toolbox(hook, drawn):
    """The hooks of mmdet, mmseg and mmpretrain are told in words of their own."""
    hooks = dict(visualization=dict(type=hook))
    cfg = Config(dict(default_hooks=hooks, visualizer=dict()))
    draw_predictions(cfg, show_dir='out')
    result = cfg.default_hooks.visualization
    assert {key: result[key] for key in drawn} == drawn
    # mmseg's hook leaves the folder to the visualizer, whose backend writes below
    # WORK_DIR/TIME/vis_data; it has none in this config
    backends = cfg.visualizer.get('vis_backends', [])
    expected = [dict(type='LocalVisBackend', img_save_dir='../out')]
    assert backends == (expected if hook == 'SegVisualizationHook' else [])


def test_show_dir_keeps_the_other_backends():
    backends = [dict(type='TensorboardVisBackend'), dict(type='LocalVisBackend')]
    hooks = dict(visualization=dict(type='SegVisualizationHook'))
    cfg = Config(dict(default_hooks=hooks, visualizer=dict(vis_backends=backends)))
    draw_predictions(cfg, show_dir='out')
    backends[1]['img_save_dir'] = '../out'
    assert cfg.visualizer.vis_backends == backends


@pytest.mark.parametrize('name', ['all.pkl', 'all.json'])
def test_out_that_cannot_be_written_is_told_first(tmp_path, name):
    (tmp_path / 'file').touch()
    metric = dict(type='CocoMetric')
    cfg = Config(dict(default_scope='mmdet', test_evaluator=metric))
    with pytest.raises(LaunchError, match='nothing can be written in .*file/none'):
        write_predictions(cfg, str(tmp_path / 'file' / 'none' / name))


@pytest.mark.parametrize('form', ['dict', 'list', 'metrics'])
def test_out_in_each_form_of_an_evaluator(form):
    metric = dict(type='mmdet.CocoMetric', metric='bbox')
    forms = dict(dict=metric, list=[metric], metrics=dict(metrics=[metric]))
    cfg = Config(dict(default_scope='mmdet', test_evaluator=forms[form]))
    write_predictions(cfg, 'all.pkl')
    write_predictions(cfg, 'all.json')
    metrics = cfg.test_evaluator.metrics if form == 'metrics' else cfg.test_evaluator
    assert metrics == [
        dict(metric, outfile_prefix='all'),
        dict(type='mmdet.DumpDetResults', out_file_path='all.pkl'),
    ]
