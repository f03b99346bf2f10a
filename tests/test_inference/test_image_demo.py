"""tools/image_demo.py and what it calls: each toolbox, each input, each refusal."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmrest.checkpoint import CheckpointError
from mmrest.inference import InferenceError, OutputFolder, infer, init_inferencer
from mmrest.inference.inputs import Item


@pytest.fixture
def demo(call, tmp_path):
    def run(*args, fails=False):
        return call('image_demo.py', *args, cwd=tmp_path, fails=fails)

    return run


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpretrain'])
def test_picture_and_json(demo, model_files, write_image, tmp_path, toolbox):
    image = write_image(tmp_path / 'in' / 'a.png')
    out = tmp_path / 'out'
    demo(image, *model_files(toolbox), '--out-dir', out, '--score-thr', '0')
    picture = cv2.imread(str(out / 'vis' / 'a.jpg'))
    assert picture.shape == (64, 96, 3)
    assert np.abs(picture.astype(int) - cv2.imread(str(image))).max() > 50
    found = json.loads((out / 'preds' / 'a.json').read_text())
    assert found['image'] == 'a.png'
    if toolbox == 'mmdet':
        assert len(found['scores']) == len(found['masks']) == len(found['bboxes']) > 0
        assert set(found['classes']) <= {'box', 'diamond'}
    elif toolbox == 'mmseg':
        assert set(found['pixels']) <= {'road', 'sky'}  # of the config
        labels = cv2.imread(str(out / 'preds' / 'a.png'), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (64, 96) and sum(found['pixels'].values()) == labels.size
    else:
        assert found['pred_class'] and len(found['pred_scores']) == 1000


def test_folder_with_bad_files(demo, model_files, write_image, tmp_path):
    folder = tmp_path / 'in'
    for name in ('a.jpg', 'a.png', 'b.jpg'):
        write_image(folder / name)
    (folder / 'empty.jpg').touch()
    (folder / 'text.jpg').write_text('no image')
    whole = (folder / 'b.jpg').read_bytes()
    (folder / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    write_image(folder / 'thin.png', 1, 2000)  # no pixel is left after Resize
    options = ['--out-dir', 'out', '--batch-size', '2', '--device', 'cpu']
    files = model_files('mmdet')
    output = demo(folder, *files, *options, fails=True)
    assert 'skipped: empty.jpg (0 bytes) is not an image' in output
    assert 'skipped: text.jpg (8 bytes) is not an image' in output
    assert re.search(r'skipped: cut\.jpg cannot be decoded \(.*truncated', output)
    assert 'skipped: thin.png (1x2000 pixels) cannot be resized' in output
    names = sorted(path.name for path in (tmp_path / 'out/preds').iterdir())
    assert names == ['a.json', 'a.png.json', 'b.json']  # none in another's place
    output = demo(folder, *files, *options, fails=True)
    assert 'out is not empty' in output and 'Traceback' not in output
    output = demo(folder / 'empty.jpg', *files, '--out-dir', 'none', fails=True)
    assert '1 could not be read' in output and 'pictures and' not in output


def test_address(model_files, write_image, server, tmp_path):
    address, root = server
    write_image(root / 'a b.jpg')
    inferencer = init_inferencer(*map(str, model_files('mmdet')))
    assert infer(inferencer, f'{address}/a%20b.jpg?x=1', tmp_path / 'out') == []
    assert (tmp_path / 'out/vis/a b.jpg').is_file()
    with pytest.raises(InferenceError, match=r'no\.jpg cannot be fetched: '):
        infer(inferencer, f'{address}/no.jpg')


def test_video(demo, model_files, tmp_path):
    path = tmp_path / 'clip.mp4'
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 5, (96, 64))
    for grey in (0, 90, 180):
        video.write(np.full((64, 96, 3), grey, np.uint8))
    video.release()
    demo(path, *model_files('mmdet'), '--out-dir', 'out', '--batch-size', '2')
    result = cv2.VideoCapture(str(tmp_path / 'out/vis/clip.mp4'))
    assert result.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert result.get(cv2.CAP_PROP_FPS) == 5
    assert len(list((tmp_path / 'out/preds').glob('clip_*.json'))) == 3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.jpg'], r'there is no nowhere\.jpg'),
        (['nowhere.mp4'], r'there is no nowhere\.mp4'),
        (['text.mp4'], r'text\.mp4 cannot be opened'),
        (['.', '--device', 'cuda:99'], '--device cuda:99 cannot be used'),
        (['.', '--device', 'gpu'], '--device gpu cannot be used'),
        (['.', '--show'], r'--show needs (a screen|an OpenCV with windows)'),
        (['vacant'], 'vacant has no files'),
    ],
)
def test_refusals(demo, model_files, monkeypatch, tmp_path, arguments, message):
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    (tmp_path / 'text.mp4').write_text('no video')
    (tmp_path / 'vacant').mkdir()
    first, *rest = arguments
    output = demo(first, *model_files('mmdet'), *rest, fails=True)
    assert re.search(f'tools/image_demo.py: {message}', output), output
    assert 'Traceback' not in output


def test_checkpoints_that_do_not_fit(model_files, tmp_path):
    config, checkpoint = model_files('mmdet')
    saved = torch.load(checkpoint)
    saved['state_dict']['roi_head.bbox_head.fc_cls.weight'] = torch.zeros(81, 16)
    torch.save(saved, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth does not fit MaskRCNN'):
        init_inferencer(str(config), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='does not fit MaskRCNN'):
        init_inferencer(str(config), model_files('mmpretrain')[1])
    (tmp_path / 'config.py').write_text('model = dict()')
    with pytest.raises(InferenceError, match='the config belongs to no toolbox'):
        init_inferencer(str(tmp_path / 'config.py'), checkpoint)


def test_classes_of_the_checkpoint_come_before_those_of_the_config(
    model_files, tmp_path
):
    config, checkpoint = model_files('mmdet')
    saved = torch.load(checkpoint)
    saved['meta'] = dict(dataset_meta=dict(classes=('nut', 'fig')))
    torch.save(saved, tmp_path / 'named.pth')
    inferencer = init_inferencer(str(config), tmp_path / 'named.pth')
    assert tuple(inferencer.classes) == ('nut', 'fig')
    saved['meta'] = {}
    torch.save(saved, tmp_path / 'nameless.pth')
    inferencer = init_inferencer(str(config), tmp_path / 'nameless.pth')
    assert tuple(inferencer.classes) == ('box', 'diamond')


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_numbers_where_nobody_names_the_classes(model_files, toolbox):
    config, checkpoint = model_files(toolbox)
    cfg = Config.fromfile(config)
    del cfg.test_dataloader.dataset['metainfo']
    base = dict(mmdet='BaseDetDataset', mmseg='BaseSegDataset')[toolbox]
    cfg.test_dataloader.dataset.type = base
    saved = torch.load(checkpoint)
    saved['meta'] = {}
    torch.save(saved, checkpoint.with_name('nameless.pth'))
    inferencer = init_inferencer(cfg, checkpoint.with_name('nameless.pth'))
    assert tuple(inferencer.classes) == ('0', '1')
    image = np.zeros((64, 96, 3), np.uint8)
    (sample,) = inferencer.predict([image])
    assert inferencer.draw(image, sample, 0.0).any()
    assert inferencer.to_dict(sample)


def test_threads_do_not_draw_on_one_anothers_images(model_files):
    inferencer = init_inferencer(*map(str, model_files('mmseg')))
    images = [np.full((64 + n, 96, 3), 10 * n, np.uint8) for n in range(20)]
    samples = [inferencer.predict([image])[0] for image in images]
    alone = list(map(inferencer.draw, images, samples))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(inferencer.draw, images, samples))
    assert all(map(np.array_equal, alone, together))


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpretrain'])
def test_images_of_several_sizes_in_a_batch(model_files, toolbox):
    inferencer = init_inferencer(*map(str, model_files(toolbox)))
    images = [np.full((h, w, 3), 90, np.uint8) for h, w in [(64, 96), (96, 64), (9, 7)]]
    samples = inferencer.predict(images)
    assert len(samples) == 3
    if toolbox != 'mmdet':  # which pads the smaller ones
        name = dict(mmseg='seg_logits', mmpretrain='pred_score')[toolbox]
        for image, sample in zip(images, samples):
            (alone,) = inferencer.predict([image])
            found, wanted = (getattr(s, name) for s in (sample, alone))
            if toolbox == 'mmseg':
                found, wanted = found.data, wanted.data
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'toolbox, images, found',
    [
        ('mmseg', np.zeros((64, 96, 3), np.uint8), r'ndarray of shape \(96, 3\) uint8'),
        ('mmpretrain', [np.zeros((9, 9), np.uint8)], r'of shape \(9, 9\) uint8'),
        ('mmdet', [np.zeros((9, 9, 4), np.uint8)], r'of shape \(9, 9, 4\)'),
        ('mmdet', [np.zeros((9, 9, 3))], 'float64'),
        ('mmdet', [np.zeros((0, 9, 3), np.uint8)], r'of shape \(0, 9, 3\)'),
        ('mmseg', ['a.jpg'], 'found a str'),
    ],
)
def test_what_is_no_image(model_files, toolbox, images, found):
    inferencer = init_inferencer(*map(str, model_files(toolbox)))
    with pytest.raises(InferenceError, match=found):
        inferencer.predict(images)
    assert inferencer.predict([]) == []


@pytest.mark.parametrize('channels', [1, 4])
def test_detectors_of_other_channels(model_files, tmp_path, channels):
    config, _ = model_files('mmdet')
    cfg = Config.fromfile(config)
    cfg.visualizer = None
    cfg.model.backbone.in_channels = channels
    cfg.model.data_preprocessor.update(mean=[100.0], std=[50.0], bgr_to_rgb=False)
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'grayscale'
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    if channels == 4:
        with pytest.raises(InferenceError, match='takes images of 4 channels'):
            init_inferencer(cfg, tmp_path / 'model.pth')
        return
    seen = []
    inferencer = init_inferencer(cfg, tmp_path / 'model.pth')
    inferencer.model.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    (sample,) = inferencer.predict([np.full((64, 96, 3), 110, np.uint8)])
    assert inferencer.draw(np.zeros((64, 96, 3), np.uint8), sample).shape == (64, 96, 3)
    assert seen[0].shape[:2] == (1, 1)
    torch.testing.assert_close(seen[0].max(), torch.tensor(0.2))


def test_published_classifier(model_files):
    """A published file, bare, with the head beside the backbone."""
    config, checkpoint = model_files('mmpretrain')
    tensors = torch.load(checkpoint)['state_dict'].items()
    names = {
        n: n.replace('backbone.', '').replace('head.fc.', 'head.') for n, _ in tensors
    }
    torch.save({names[n]: t for n, t in tensors}, checkpoint.with_name('published.pth'))
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    scores = []
    for path in (checkpoint, checkpoint.with_name('published.pth')):
        inferencer = init_inferencer(str(config), path)
        assert len(inferencer.classes) == 1000 and 'tench' in inferencer.classes[0]
        scores.append(inferencer.predict([image])[0].pred_score)
    torch.testing.assert_close(*scores)


def test_amp(model_files):
    inferencer = init_inferencer(*map(str, model_files('mmdet')), amp='auto')
    seen = []
    inferencer.model.backbone.stage1[0].attn.q.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    inferencer.predict([np.zeros((64, 96, 3), np.uint8)])
    assert seen[0] in (torch.bfloat16, torch.float16)


@pytest.mark.slow
def test_an_image_of_20_megapixels(model_files):
    inferencer = init_inferencer(*map(str, model_files('mmdet')))
    (sample,) = inferencer.predict([np.zeros((4000, 5000, 3), np.uint8)])
    boxes = inferencer.to_dict(sample)['bboxes']
    assert np.max(boxes) > 1000 and np.max(boxes) <= 5000


def test_full_disk(tmp_path):
    folder = OutputFolder(tmp_path / 'out')
    (tmp_path / 'out' / 'vis' / 'a.jpg').mkdir()  # what imwrite cannot write to
    with pytest.raises(OSError, match=r'a\.jpg cannot be written'):
        folder.save(
            Item('a.png', np.zeros((8, 8, 3), np.uint8)),
            np.zeros((8, 8, 3), np.uint8),
            {},
        )
