"""Images: used with their boxes in place, or refused by name."""

import re

import numpy as np
import pytest
from dirty_files import BOX, HEIGHT, REFUSED, USED, WIDTH, encode, rgb

from mmrest.datasets import ImageSizeError
from mmrest.datasets.preflight import PreflightError, check_config

# Said of an image that is converted when it is loaded.
NOTES = {
    'grey': '1 of 2 decoded images are grey',
    'grey-alpha': 'grey with transparency, which is dropped',
    'rgba': 'with transparency, which is dropped',
    'palette': 'of a palette',
    'black-white': 'of black and white',
    'cmyk': 'CMYK',
    '16-bit': 'of more than 8 bits, of which the upper 8 are kept',
    'exif-180': 'have an EXIF orientation, which is applied',
    'exif-90': 'have an EXIF orientation, which is applied',
    'exif-270': 'have an EXIF orientation, which is applied',
    'exif-png': 'have an EXIF orientation, which is applied',
    'exif-tiff': 'have an EXIF orientation, which is applied',
}


def assert_box_is_bright(data):
    """The box of the sample, and it alone, is bright in the loaded image."""
    image = data['inputs'].numpy()
    assert image.dtype == np.uint8 and image.shape[0] == 3
    boxes = data['data_samples'].gt_instances.bboxes
    boxes = getattr(boxes, 'tensor', boxes).numpy()
    assert len(boxes) == 1
    x1, y1, x2, y2 = boxes[0].round().astype(int)
    inside = np.zeros(image.shape[1:], bool)
    inside[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = True
    around = np.ones(image.shape[1:], bool)
    around[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = False
    assert inside.any() and around.any()
    assert image[:, inside].min() > 150
    assert image[:, around].max() < 110


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('kind', USED)
def test_used(sandbox, build, kind, split):
    name, content = USED[kind]
    part = sandbox.part(split)
    key = part.add_image(name, content())
    part.add_object(key)
    cfg = sandbox.config()
    report = ' '.join(text for _, text in check_config(cfg))
    assert 'Preflight passed' in report
    if kind in NOTES:
        assert re.search(rf'{split}_dataloader.dataset: .*{NOTES[kind]}', report)
    else:
        assert 'decoded images are' not in report
    dataset = build(cfg, split)
    index = [dataset.get_data_info(n)['img_id'] for n in range(len(dataset))].index(key)
    data = dataset[index]
    # in validation boxes stay in the coordinates of the image as it is loaded
    sample = data['data_samples']
    assert sample.img_id == key and sample.ori_shape == (HEIGHT, WIDTH)
    if split == 'train':
        assert_box_is_bright(data)
    else:
        scale = np.array(sample.scale_factor * 2)
        box = np.array([BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3]]) * scale
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.new_tensor(box[None])
        assert_box_is_bright(data)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('kind', REFUSED)
def test_refused_before_the_run(sandbox, kind, split):
    name, content = REFUSED[kind]
    part = sandbox.part(split)
    part.add_object(part.add_image(name, content()))
    with pytest.raises(PreflightError, match=re.escape(name)) as error:
        check_config(sandbox.config())
    assert f'{split}_dataloader.dataset' in str(error.value)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('kind', sorted(set(REFUSED) - {'no-bytes'}))
def test_refused_in_the_run(sandbox, build, kind, split):
    """As when the check before it decoded a sample, of other images."""
    name, content = REFUSED[kind]
    part = sandbox.part(split)
    part.add_object(part.add_image(name, content()))
    dataset = build(sandbox.config(), split)
    index = [dataset.get_data_info(n)['img_path'] for n in range(len(dataset))]
    index = next(n for n, path in enumerate(index) if path.endswith(name))
    # mmcv asserts that an image was decoded
    kinds = (ImageSizeError, AssertionError, FileNotFoundError)
    with pytest.raises(kinds, match=re.escape(name)):
        dataset[index]


def test_no_bytes_are_found_without_decoding(sandbox):
    """However many images there are: of this one the loader's error has no name."""
    sandbox.train.add_object(sandbox.train.add_image('nothing.jpg', b''))
    cfg = sandbox.config()
    cfg.preflight.decode = 0
    with pytest.raises(PreflightError, match=r'1 of 2 images .* \(0 bytes\): nothing'):
        check_config(cfg)


@pytest.mark.parametrize('flag', ['color_ignore_orientation', 'unchanged'])
def test_exif_may_be_ignored(sandbox, build, flag):
    """Boxes drawn on the stored image fit if the loader leaves it as it is."""
    name, content = REFUSED['exif-as-stored']
    sandbox.train.add_object(sandbox.train.add_image(name, content()))
    cfg = sandbox.config()
    cfg.train_dataloader.dataset.pipeline[0].color_type = flag
    report = ' '.join(text for _, text in check_config(cfg))
    assert '1 of 2 decoded images have an EXIF orientation, which is not app' in report
    for data in build(cfg, 'train'):
        assert_box_is_bright(data)


def test_the_advice_about_exif(sandbox, build):
    name, content = REFUSED['exif-as-stored']
    # written upright, so that it is loaded 64 wide and 96 high
    sandbox.train.add_object(sandbox.train.add_image(name, content()))
    with pytest.raises(
        PreflightError, match='64x96 pixels when its EXIF orient.*96x64'
    ):
        check_config(sandbox.config())
    dataset = build(sandbox.config(), 'train')
    with pytest.raises(ImageSizeError, match='color_ignore_orientation'):
        for index in range(len(dataset)):
            dataset[index]


@pytest.mark.parametrize(
    ('size', 'min_size'),
    [((1, 1), 0), ((1, 40), 32), ((40, 1), 0), ((31, 200), 0), ((31, 200), 32)],
)
def test_small_images(sandbox, build, size, min_size):
    """Used, and left out of training only where the config says so."""
    width, height = size
    for part in (sandbox.train, sandbox.val):
        name = f'{part is sandbox.val}.png'
        content = encode(rgb(width=width, height=height, box=(0, 0, 1, 1)), 'PNG')
        key = part.add_image(name, content, width, height)
        part.add_object(key, bbox=(0, 0, 1, 1))
    cfg = sandbox.config()
    cfg.train_dataloader.dataset.filter_cfg.min_size = min_size
    report = ' '.join(text for _, text in check_config(cfg))
    note = '1 images have a side of less than 32 pixels and are left out'
    assert (note in report) is bool(min_size)
    assert len(build(cfg, 'train')) == (1 if min_size else 2)
    assert len(build(cfg, 'val')) == 2
    for split in ('train', 'val'):
        for data in build(cfg, split):
            assert min(data['inputs'].shape) > 0
            assert len(data['data_samples'].gt_instances) == 1


def test_twenty_megapixels(sandbox, build):
    box = (3000, 500, 1500, 1600)
    content = encode(rgb(width=5000, height=4000, box=box))
    key = sandbox.train.add_image('large.jpg', content, 5000, 4000)
    sandbox.train.add_object(key, bbox=box)
    cfg = sandbox.config()
    check_config(cfg)
    for data in build(cfg, 'train'):
        assert max(data['inputs'].shape) <= 160
        assert_box_is_bright(data)


def test_inference_needs_no_size():
    """What an inferencer loads has no annotation, hence nothing to compare."""
    from mmrest.datasets import CheckImageSize

    results = dict(img=np.zeros((3, 4, 3), np.uint8), img_path=None)
    assert CheckImageSize()(results) is results
    assert repr(CheckImageSize()) == 'CheckImageSize()'
