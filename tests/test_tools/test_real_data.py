"""The COCO configs on photographs, changed by --cfg-options alone.

The run starts from a checkpoint in published form, is resumed and evaluated.
"""

import json

import pytest
import torch
from weights_rule import fill

pytestmark = pytest.mark.slow

SIDE = (256, 160)


def data_options(config, root, train, val, images, classes=None):
    """The fields that name a data set, and smaller images for time."""
    heads = ['roi_head.bbox_head', 'roi_head.mask_head']
    heads = heads if config.startswith('mask_rcnn') else ['bbox_head']
    resize = 4 if 'restv2' in config else 3  # after a crop
    options = [f'train_dataloader.dataset.pipeline.{resize}.scales=[{SIDE}]']
    if config.startswith('mask_rcnn/restv2'):
        options.append('optim_wrapper.type=OptimWrapper')  # float16 needs a GPU
    for split in ('train', 'val', 'test'):
        dataset = f'{split}_dataloader.dataset'
        options += [
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
            f'{dataset}.data_root={root}/',
            f'{dataset}.ann_file={train if split == "train" else val}',
            f'{dataset}.data_prefix.img={images[split == "train"]}',
        ]
        if classes:
            options.append(f'{dataset}.metainfo.classes=({",".join(classes)})')
        if split != 'train':
            options.append(f'{dataset}.pipeline.2.scale={SIDE}')
            options.append(f'{split}_evaluator.ann_file={root}/{val}')
            options.append(f'{dataset}.indices=6')
    if classes:
        options += [f'model.{head}.num_classes={len(classes)}' for head in heads]
    return [option.replace(' ', '') for option in options]


DATA = dict(
    coco_tiny=dict(
        train='annotations/instances_train2017.json',
        val='annotations/instances_val2017.json',
        images=('val2017', 'train2017'),
    ),
    fruit_nuts=dict(
        train='trainval.json',
        val='trainval.json',
        images=('images', 'images'),
        classes=('date', 'fig', 'hazelnut'),
    ),
)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory, published_shapes):
    """Files as the authors publish them: the state dict under ``model``."""

    def write(arch):
        state = {
            key: torch.zeros(
                shape, dtype=torch.long if key.endswith('tracked') else torch.float
            )
            for key, shape in published_shapes[arch].items()
        }
        path = tmp_path_factory.mktemp('pretrained') / f'{arch}.pth'
        torch.save(dict(model=fill(state)), path)
        return path

    return write


@pytest.mark.parametrize(
    ('detector', 'arch', 'name', 'tensors'),
    [
        ('mask_rcnn', 'rest_small', 'fruit_nuts', 272),
        ('retinanet', 'rest_small', 'coco_tiny', 272),
        ('mask_rcnn', 'restv2_tiny', 'coco_tiny', 270),
    ],
)
def test_train_resume_and_test(
    finish, shared, pretrained, tmp_path, detector, arch, name, tensors
):
    config = f'{detector}/{arch}_fpn_1x.py'
    data = data_options(config, shared / 'data' / name, **DATA[name])
    options = [
        '--cfg-options',
        *data,
        f'model.backbone.init_cfg.checkpoint={pretrained(arch)}',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=1',
        'train_cfg.val_interval=2',
    ]
    work_dir = tmp_path / 'run'
    train = ['train.py', f'mmrest::{config}', '--work-dir', work_dir]
    output = finish(*train, *options, 'train_cfg.max_iters=1')
    assert f'Loaded {tensors} tensors' in output
    output = finish(*train, '--resume', *options, 'train_cfg.max_iters=2')
    assert 'resumed' in output.lower() and 'Iter(train) [2/2]' in output

    kinds = ('bbox', 'segm') if detector == 'mask_rcnn' else ('bbox',)
    # Two iterations teach nothing, so all scores count.
    test = ['test.py', f'mmrest::{config}', work_dir / 'iter_2.pth']
    prefix = 'model.test_cfg.' + 'rcnn.' * (detector == 'mask_rcnn')
    options = ['--cfg-options', *data, f'{prefix}score_thr=0.0']
    options.append(f'{prefix}max_per_img=20')  # pasting masks takes the time
    results = []
    for ranks in (1, 2):
        out = tmp_path / f'{ranks}.json'
        output = finish(*test, '--out', out, *options, ranks=ranks)
        assert output.count('Average Precision') == 6 * len(kinds)
        files = [tmp_path / f'{ranks}.{kind}.json' for kind in kinds]
        results.append([json.loads(file.read_text()) for file in files])
    assert all(results[0]) and results[0] == results[1]
