"""Each finding before a run names the thing, what was found and what to do."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmrest.datasets.preflight import PreflightError, check_config, check_data
from mmrest.datasets.preflight.model import check_backbones, check_unused_maps

POLYGON = [[1, 1, 9, 1, 9, 9]]


def drop(part, field):
    """Remove a field from all items of a list of the annotation file."""

    def change(content):
        for item in content[part]:
            del item[field]

    return change


def set_first(part, **fields):
    return lambda content: content[part][0].update(fields)


@pytest.mark.parametrize('stage', ['train', 'test'])
def test_sound_data_pass(cfg, stage):
    ((_, text),) = check_config(cfg, stage)
    assert text.startswith('Preflight passed.') and '2 classes' in text


def test_a_refusal_names_the_way_past_it_once(cfg, dataset, finding):
    shutil.rmtree(dataset)
    text = finding(cfg)
    assert text.startswith('2 problems found before the run:')
    assert text.count('--no-preflight') == 1
    assert text.endswith('To start without this check, add --no-preflight.')
    assert text.count(f'nor does its data_root {dataset}') == 2
    assert f'{dataset / "train.json"} does not exist' in text
    assert 'train_dataloader.dataset.data_root' in text
    with pytest.raises(PreflightError, match='does not exist') as error:
        check_data(cfg)  # of no run
    assert '--no-preflight' not in str(error.value)


@pytest.mark.parametrize(
    'content',
    ['', '<html>404</html>', '{"images": [', '\x00\x01', '\ufeff{}'],
    ids=repr,
)
def test_unreadable_json(cfg, dataset, finding, content):
    (dataset / 'val.json').write_text(content)
    assert 'val.json is not valid JSON' in finding(cfg)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda c: c.pop('categories'), 'it has no list "categories"'),
        (lambda c: c.update(images={}), 'it has no list "images"'),
        (lambda c: c['images'].insert(1, 'x'), 'images[1] is not an object'),
        (drop('images', 'file_name'), 'images[0] has no file_name'),
        (drop('annotations', 'bbox'), 'annotations[0] has no bbox'),
        (drop('categories', 'name'), 'categories[0] has no name'),
        (set_first('annotations', bbox=[1, 2]), 'bbox of annotation 1 is [1, 2]'),
        (set_first('annotations', iscrowd='0'), "iscrowd of annotation 1 is '0'"),
        (set_first('annotations', image_id=[1]), 'annotations[0] is [1], neither'),
        (set_first('categories', name=['x']), "categories[0] is ['x'], neither"),
    ],
)
def test_not_coco_format(cfg, finding, edit, change, expected):
    edit(change)
    text = finding(cfg)
    assert 'train.json is not in COCO format' in text and expected in text


def test_another_object(cfg, dataset, finding):
    (dataset / 'train.json').write_text('[]')
    assert 'it holds a list' in finding(cfg)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (
            set_first('annotations', image_id=77),
            '1 annotations of images that it does not list: annotation 1',
        ),
        (set_first('annotations', category_id=77), 'category_id 77 in annotation 1'),
        (
            lambda c: c['annotations'][1].update(id=1),
            'an id of annotations more than once: 1',
        ),
        (
            lambda c: c['images'][1].update(id=1000),
            'an id of images more than once: 1000',
        ),
        (lambda c: c['annotations'].clear(), 'none of which can be trained on'),
        (lambda c: (c['images'].clear(), c['annotations'].clear()), 'lists no images'),
        (
            lambda c: c['annotations'][4].pop('segmentation'),
            '1 annotations without segmentation',
        ),
        (set_first('categories', name='other'), 'names categories twice: other'),
    ],
)
def test_inconsistent_annotations(cfg, finding, edit, change, expected):
    edit(change)
    assert expected in finding(cfg)


def test_run_length_masks_where_polygons_are_wanted(cfg, finding, edit):
    edit(set_first('annotations', segmentation=dict(size=[64, 96], counts=[0, 6144])))
    assert 'Set poly2mask=True' in finding(cfg)
    steps = cfg.train_dataloader.dataset.pipeline
    next(step for step in steps if step.type == 'LoadAnnotations').poly2mask = True
    check_config(cfg)


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (('box', 'disc'), '1 are not in the file: disc. Set train_dataloader'),
        (('box',), '6 annotations of categories that are not among the 1 classes'),
        (('other', 'box'), "metainfo.classes=('box', 'other')"),
        (('box', 'other', 'star'), 'num_classes=2'),
    ],
)
def test_categories_that_differ_from_the_classes(cfg, finding, names, expected):
    cfg.train_dataloader.dataset.metainfo.classes = names
    assert expected in finding(cfg)


def test_the_default_classes_of_another_dataset(cfg, finding):
    """Data paths were changed, and nothing else."""
    del cfg.train_dataloader.dataset['metainfo']
    text = finding(cfg)
    assert 'has the categories box, other (2)' in text
    assert 'has 80 classes, of which 80 are not in the file: person' in text


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_a_class_without_its_comma(cfg, finding, split, wrapped):
    part = cfg[f'{split}_dataloader']
    part.dataset.metainfo = dict(classes='box')
    if wrapped:
        part.dataset = dict(type='RepeatDataset', times=2, dataset=part.dataset)
    text = finding(cfg)
    where = f'{split}_dataloader.dataset{".dataset" * wrapped}'
    assert f"{where}.metainfo.classes is 'box'" in text
    assert "add the comma: classes=('box',)" in text


def test_a_class_without_its_comma_of_other_formats(finding):
    dataset = dict(type='CustomDataset', classes='fig')
    loader = dict(train_dataloader=dict(dataset=dataset), default_scope='mmpretrain')
    assert "classes=('fig',)" in finding(Config(loader))


def test_classes_may_be_in_a_file(cfg, tmp_path):
    (tmp_path / 'classes.txt').write_text('box\nother\n')
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.metainfo = dict(classes=str(tmp_path / 'classes.txt'))
    check_config(cfg)


def test_heads_of_another_class_count(cfg, finding):
    cfg.model.roi_head.bbox_head.num_classes = 80
    text = finding(cfg)
    assert 'model.roi_head.bbox_head.num_classes is 80' in text
    assert '--cfg-options model.roi_head.bbox_head.num_classes=2' in text
    assert 'mask_head' not in text


@pytest.mark.parametrize(
    ('backbone', 'expected'),
    [
        (dict(arch='base'), 'neck.in_channels=[96,192,384,768], or correct'),
        (dict(out_indices=(1, 2)), 'have 128, 256 channels'),
        (dict(arch='basic'), "model.backbone: arch must be one of 'lite'"),
        (dict(drop_path=0.1), "unexpected keyword argument 'drop_path'"),
    ],
)
def test_backbone_that_does_not_fit(cfg, finding, backbone, expected):
    fitting = dict(type='ResT', arch='small')
    cfg.model.backbone = fitting
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    check_config(cfg)
    cfg.model.backbone = dict(fitting, **backbone)
    assert expected in finding(cfg)


class ReadsValues(torch.nn.Identity):
    def __init__(self, dim):
        super().__init__()
        torch.ones(dim).numpy()


def test_parts_that_cannot_be_built_on_the_meta_device(cfg, finding):
    pos = dict(type=ReadsValues)
    cfg.model.backbone = dict(type='ResT', arch='small', pos_cfg=pos)
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    before = torch.get_rng_state()
    check_config(cfg)
    assert torch.equal(torch.get_rng_state(), before)
    cfg.model.neck.in_channels = [64, 128, 256]
    assert 'neck.in_channels=[64,128,256,512]' in finding(cfg)


@pytest.mark.parametrize(
    ('head', 'advice'),
    [
        (dict(in_channels=[128, 512], in_index=[1, 3]), ''),
        (dict(in_channels=[128, 512], in_index=[0, 3]), '.in_channels=[64,512], or'),
        (dict(in_channels=256, in_index=2), ''),
        (dict(in_channels=2048, in_index=3), '.in_channels=512, or'),
        (dict(in_channels=512, in_index=4), '.in_index=-1, or'),
    ],
)
@pytest.mark.parametrize('name', ['decode_head', 'auxiliary_head.1', 'decode_head.x'])
def test_channels_of_heads_that_choose_maps(name, head, advice):
    """As in mmseg, whose heads may be a list, or hold another one as in KNet."""
    model = dict(
        backbone=dict(type='ResT', arch='small'),
        decode_head=dict(x=dict(in_channels=512, in_index=3)),
        auxiliary_head=[dict(in_channels=64, in_index=0), dict()],
    )
    cfg = Config(dict(model=model))
    cfg.merge_from_dict({f'model.{name}': head})
    found = list(check_backbones(cfg.model))
    assert len(found) == bool(advice)
    assert not advice or f'--cfg-options model.{name}{advice}' in found[0]


@pytest.mark.parametrize(
    ('parts', 'advice'),
    [
        (dict(head=dict(in_channels=512)), ''),
        (dict(head=dict(in_channels=2048)), 'model.head.in_channels=512'),
        (dict(decode_head=dict(in_channels=9)), 'model.decode_head.in_channels=512'),
        (dict(rpn_head=dict(in_channels=9)), 'model.rpn_head.in_channels=512'),
        (
            dict(neck=dict(type='GlobalAveragePooling'), head=dict(in_channels=2048)),
            'model.head.in_channels=512',
        ),
        # a neck may take the first map or the last one, and change the channels
        (dict(neck=dict(in_channels=64), head=dict(in_channels=9)), ''),
        (dict(neck=dict(in_channels=2048)), 'model.neck.in_channels=512'),
        # mmseg's JPU takes a tuple only, and shells take one in quotes
        (
            dict(neck=dict(in_channels=(9, 9))),
            '"model.neck.in_channels=(64,128,256,512)"',
        ),
        (dict(neck=dict(type='Own'), head=dict(in_channels=9)), ''),
        # detectors do not state what it takes
        (dict(bbox_head=dict(in_channels=9)), ''),
    ],
)
def test_channels_of_parts_that_take_a_map_by_default(parts, advice):
    found = list(check_backbones(dict(backbone=dict(type='ResT'), **parts)))
    assert len(found) == bool(advice)
    assert not advice or f'--cfg-options {advice}, or' in found[0]


@pytest.mark.parametrize(
    'backbone',
    [dict(type='ResTV2', arch='tiny'), dict(type='ResT', out_norm='branch')],
    ids=lambda backbone: backbone['type'],
)
def test_norms_of_maps_that_the_neck_leaves_out(cfg, finding, backbone):
    cfg.model.backbone = backbone
    dims = MODELS.build(backbone).arch.embed_dims
    cfg.model.neck.update(in_channels=list(dims), start_level=1)
    check_config(cfg)  # one process
    cfg.launcher = 'pytorch'
    check_config(cfg, 'test')
    text = finding(cfg)
    assert 'model.neck.start_level=1 leaves out maps of model.backbone' in text
    advice = (
        'model.backbone.out_indices=[1,2,3] '
        f'model.neck.in_channels=[{dims[1]},{dims[2]},{dims[3]}] '
        'model.neck.start_level=0, or find_unused_parameters=True.'
    )
    assert advice in text
    cfg.model.backbone.out_indices = [1, 2, 3]
    cfg.model.neck.update(in_channels=list(dims[1:]), start_level=0)
    check_config(cfg)


@pytest.mark.parametrize(
    'change',
    [
        dict(find_unused_parameters=True),
        dict(model_wrapper_cfg=dict(find_unused_parameters=True)),
        dict(model_wrapper_cfg=dict(static_graph=True)),
        dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')),
        {'model.neck.start_level': 0},
        {'model.backbone.out_norm': 'chain'},
    ],
    ids=str,
)
def test_norms_that_may_lack_gradients(cfg, change):
    cfg.launcher = 'pytorch'
    cfg.model.backbone = dict(type='ResT', out_norm='branch')
    cfg.model.neck.update(in_channels=[64, 128, 256, 512], start_level=1)
    cfg.merge_from_dict(change)
    check_config(cfg)


def test_advice_about_left_out_maps_names_what_the_config_has():
    backbone = dict(type='ResTV2', arch='tiny')
    neck = dict(type='Neck', start_level=1)
    cfg = dict(model=dict(backbone=backbone, neck=neck), launcher='pytorch')
    cfg.update(model_wrapper_cfg=dict(type='MMDistributedDataParallel'))
    (text,) = check_unused_maps(cfg)
    assert text.endswith(
        '--cfg-options model.backbone.out_indices=[1,2,3] model.neck.start_level=0, '
        'or model_wrapper_cfg.find_unused_parameters=True.'
    )


@pytest.mark.parametrize('out_indices', [3, None, 'all'])
def test_wrong_out_indices_are_named_where_maps_are_left_out(cfg, finding, out_indices):
    cfg.launcher = 'pytorch'
    cfg.model.backbone = dict(type='ResTV2', out_indices=out_indices)
    cfg.model.neck.start_level = 1
    assert 'model.backbone: out_indices' in finding(cfg)


def test_missing_images_are_named_and_counted(cfg, dataset, finding):
    for path in (dataset / 'images').glob('train_[0-2].jpg'):
        path.unlink()
    text = finding(cfg)
    assert '3 of 6 images listed' in text and 'train_0.jpg, train_1.jpg' in text


def test_missing_image_folder(cfg, finding, edit):
    cfg.val_dataloader.dataset.data_prefix.img = 'pictures'
    edit(lambda content: content['images'].clear(), 'val.json')
    text = finding(cfg)
    assert 'pictures does not exist' in text
    assert 'val_dataloader.dataset.data_prefix.img' in text
    assert 'lists no images' in text  # the file is looked at all the same


def test_decoding_may_be_left_out(cfg, dataset, finding):
    (dataset / 'images' / 'train_2.jpg').write_bytes(b'<html>' * 9)
    assert 'train_2.jpg (54 bytes) is not an image' in finding(cfg)
    cfg.preflight = dict(decode=0)
    check_config(cfg)


def test_images_of_another_loader_are_not_decoded(cfg, dataset):
    (dataset / 'images' / 'train_2.jpg').write_bytes(b'of a scanner')
    step = dict(type='LoadMultiChannelImageFromFiles')
    cfg.train_dataloader.dataset.pipeline[0] = step
    check_config(cfg)


def test_wrapped_datasets_are_looked_into(cfg, dataset, finding):
    part = cfg.train_dataloader.dataset
    other = Config(dict(part)).to_dict() | dict(ann_file='more.json')
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=3,
        dataset=dict(type='ConcatDataset', datasets=[part, other]),
    )
    text = finding(cfg)
    assert 'train_dataloader.dataset.dataset.datasets.1: ' in text
    assert f'{dataset / "more.json"} does not exist' in text


@pytest.mark.parametrize('as_list', [False, True])
def test_evaluator_that_judges_by_another_file(cfg, dataset, finding, as_list):
    evaluator = cfg.val_evaluator
    if as_list:
        cfg.val_evaluator = [dict(type='DumpResults', out_file_path='x.pkl'), evaluator]
    where = f'val_evaluator{".1" * as_list}.ann_file'
    evaluator.ann_file = str(dataset / 'train.json')
    text = finding(cfg)
    assert f'{where}: it reads' in text and 'val_0.jpg' in text
    evaluator.ann_file = str(dataset / 'none.json')
    assert f'{where}: {dataset / "none.json"} does not exist' in finding(cfg)
    shutil.copy(dataset / 'val.json', dataset / 'copy.json')
    evaluator.ann_file = str(dataset / 'copy.json')
    check_config(cfg)


def test_masks_that_only_the_metric_needs(cfg, finding, edit):
    for step in cfg.val_dataloader.dataset.pipeline:
        if step.type == 'LoadAnnotations':
            step.with_mask = False
    edit(drop('annotations', 'segmentation'), 'val.json')
    assert '6 annotations without segmentation' in finding(cfg)
    cfg.val_evaluator.metric = ['bbox']
    check_config(cfg)


def test_pure_python_configs(cfg, finding, edit):
    """Types are classes and there is no scope."""
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations
    from mmdet.evaluation import CocoMetric

    cfg.default_scope = None
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.type = CocoDataset
        for step in dataset.pipeline:
            if step.type == 'LoadAnnotations':
                step.update(type=LoadAnnotations, poly2mask=split == 'val')
    cfg.val_evaluator.type = CocoMetric
    check_config(cfg)
    edit(set_first('annotations', segmentation=dict(size=[64, 96], counts=[0, 6144])))
    cfg.model.roi_head.mask_head.num_classes = 80
    text = finding(cfg)
    assert 'Set poly2mask=True' in text and 'mask_head.num_classes is 80' in text


def test_missing_pretrained_weights(cfg, finding, tmp_path):
    missing = str(tmp_path / 'rest_lite.pth')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=missing)
    text = finding(cfg)
    assert missing in text and 'python -m mmrest.weights rest_lite' in text
    assert '--cfg-options model.backbone.init_cfg=None' in text
    check_config(cfg, 'test')  # whose weights come from the checkpoint


def test_missing_checkpoint_to_load(cfg, finding, tmp_path):
    cfg.load_from = str(tmp_path / 'epoch_3.pth')
    assert f'load_from: the checkpoint {cfg.load_from} does not exist' in finding(cfg)


def test_checkpoints_that_are_there(cfg, monkeypatch, tmp_path):
    """A sharded one is a folder, and ``~`` is a path for MMEngine's loader."""
    (tmp_path / 'iter_9.pth').mkdir()
    cfg.load_from = str(tmp_path / 'iter_9.pth')
    check_config(cfg)
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg.load_from = '~/iter_9.pth'
    check_config(cfg)


def test_freezing_random_weights(cfg, finding, tmp_path):
    cfg.model.backbone.frozen_stages = 1
    assert 'model.backbone.frozen_stages=-1' in finding(cfg)
    torch.save({}, tmp_path / 'start.pth')
    cfg.load_from = str(tmp_path / 'start.pth')
    check_config(cfg)


def test_weights_named_one_level_too_high(cfg, finding, tmp_path):
    path = str(tmp_path / 'imagenet.pth')
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=path)
    torch.save(dict(model={'stem.conv1.weight': torch.zeros(1)}), path)
    text = finding(cfg)
    assert f'model.init_cfg: {path} holds stem.conv1.weight' in text
    assert 'model.backbone.init_cfg' in text
    torch.save({'state_dict': {'backbone.stem.conv1.weight': torch.zeros(1)}}, path)
    check_config(cfg)


def test_test_sets_need_no_annotations(cfg, edit):
    edit(lambda content: content.pop('annotations'), 'val.json')
    (_, note), _ = check_config(cfg, 'test')
    assert 'no annotations to evaluate with' in note
    cfg.test_evaluator.format_only = True
    assert len(check_config(cfg, 'test')) == 1


def test_a_resumed_run_reads_no_data_again(cfg, dataset, finding):
    (dataset / 'train.json').write_text('damaged since')
    cfg.resume = True
    ((_, text),) = check_config(cfg)
    assert 'a resumed run reads no data' in text
    cfg.model.roi_head.bbox_head.num_classes = 80  # what costs nothing is looked at
    assert 'num_classes is 80' in finding(cfg)


@pytest.mark.parametrize(
    ('scope', 'dataset'),
    [
        ('mmseg', dict(type='ADE20KDataset', data_prefix=dict(img_path='none'))),
        ('mmpretrain', dict(type='ImageNet', data_root='none', data_prefix='train')),
        ('mmdet', dict(type='CocoDataset', ann_file='s3://bucket/train.json')),
    ],
)
def test_other_formats_and_storage_are_passed_over(scope, dataset):
    loader = dict(dataset=dataset)
    check_config(Config(dict(default_scope=scope, train_dataloader=loader)))


def test_the_tool_that_checks_the_data_alone(call, cfg, dataset):
    """Heads and checkpoints of the config are not its matter."""
    cfg.load_from = 'nowhere.pth'
    cfg.dump(dataset / 'config.py')
    tool = ['check_dataset.py', dataset / 'config.py']
    output = call(*tool, '--stage', 'test', cwd=dataset)
    assert 'Preflight passed. test: 3 images' in output
    (dataset / 'images' / 'train_2.jpg').write_bytes(b'<html>' * 9)
    output = call(*tool, cwd=dataset, fails=True)
    assert 'check_dataset.py: 1 problem' in output and 'train_2.jpg' in output
    call(*tool, '--decode', 0, cwd=dataset)


@pytest.mark.parametrize('out_dir', [None, 'checkpoints'])
def test_checkpoints_of_an_earlier_run_are_named(cfg, tmp_path, out_dir):
    cfg.work_dir = str(tmp_path / 'run')
    folder = tmp_path / 'run'
    if out_dir:
        cfg.default_hooks = dict(checkpoint=dict(out_dir=str(tmp_path / out_dir)))
        folder = tmp_path / out_dir / 'run'
    folder.mkdir(parents=True)
    (folder / 'best_coco_bbox_mAP_epoch_1.pth').touch()

    def notes(stage='train'):
        return [text for _, text in check_config(cfg, stage) if 'earlier run' in text]

    assert not notes()
    for name in ('epoch_2.pth', 'iter_10.pth'):
        (folder / name).touch()
    (text,) = notes()
    assert f'{folder} holds epoch_2.pth, iter_10.pth of an earlier run' in text
    assert '--resume' in text and '--work-dir' in text
    assert not notes('test')
    cfg.resume = True
    assert not notes()
