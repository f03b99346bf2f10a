"""tools/deployment: files of every task and format, and what cannot be exported."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from PIL import Image
from torch import nn
from weights_rule import fill

from mmrest import ResT

pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')
pytest.importorskip('openvino', reason='needs the extra [deploy]')
pytest.importorskip('onnxscript', reason='needs the extra [deploy]')

EXPORT = 'deployment/export.py'
PUBLISHED = """
_base_ = 'mmrest::imagenet/rest_lite_8xb128_in1k.py'
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=[4, 4, 4, 4],
            num_heads=[1, 2, 2, 2],
            depths=[1, 1, 2, 1],
            sr_ratios=[2, 2, 2, 1],
            mlp_ratios=1,
        )
    ),
    head=dict(in_channels=4, num_classes=5),
)
test_dataloader = dict(dataset=dict(metainfo=dict(classes=tuple('abcde'))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('task', 'arch', 'ending'),
    [
        ('retinanet', 'rest_lite', '.onnx'),
        ('mask_rcnn', 'restv2_tiny', '.onnx'),
        ('upernet', 'rest_lite', '.xml'),
        ('semantic_fpn', 'rest_lite', '.onnx'),
        ('classifier', 'rest_lite', '.xml'),
    ],
)
def test_file_gives_what_the_model_gives(
    task, arch, ending, call, exported, picture, tmp_path, exported_model, repo
):
    """It is verified on the way; then the runner runs it where torch is not."""
    file, output = exported(task, arch, ending)
    assert 'verified against PyTorch: ' in output
    assert '4 layers in tiles, which store no map' in output
    names = {'model.bin', file.name} if ending == '.xml' else {file.name}
    assert {p.name for p in file.parent.glob('*model*')} == names
    without_torch = (
        'import sys, runpy; sys.modules.update(torch=None, mmrest=None);'
        f'sys.argv[1:] = {[str(file), str(picture), "--out", str(tmp_path / "out")]};'
        f'runpy.run_path({str(repo / "tools/deployment/run_exported.py")!r}, None,'
        '"__main__")'
    )
    subprocess.run([sys.executable, '-c', without_torch], check=True, timeout=300)
    found = json.loads((tmp_path / 'out' / 'picture.json').read_text())
    with Image.open(tmp_path / 'out' / 'picture.png') as drawn:
        assert drawn.size == (235, 165)
    model = exported_model(file)
    assert model.metadata['classes'] == ['a', 'b', 'c']
    if task == 'mask_rcnn':
        sizes = {tuple(entry['mask']['size']) for entry in found}
        assert sizes == {(165, 235)} and found[0]['score'] >= found[-1]['score']
        options = [file, tmp_path / 'small.onnx', '--images', picture.parent]
        output = call('deployment/quantize.py', *options, cwd=tmp_path)
        # with random weights it is chance which of the boxes are left
        assert re.search(r'\d+ of [1-9]\d* detections', output)
        before, after = re.search(
            r'([\d.]+) MB reduced to ([\d.]+) MB', output
        ).groups()
        assert 0 < float(after) < float(before)
    if task in ('semantic_fpn', 'classifier'):
        batch = np.stack([np.asarray(Image.open(picture))] * 2)
        batch[1] = batch[1, ::-1]
        both = model.run(batch, (165, 235))
        for i in range(2):
            alone = model.run(batch[i : i + 1], (165, 235))
            for name, values in alone.items():
                np.testing.assert_allclose(both[name][i], values[0], atol=1e-5)
    for wrong in (np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32)):
        with pytest.raises(ValueError, match=r'shape \(height, width, 3\)'):
            model(wrong)


@pytest.mark.parametrize(
    'ending',
    [
        '.pdparams',
        pytest.param('.pth', marks=pytest.mark.slow),
        pytest.param('.safetensors', marks=pytest.mark.slow),
    ],
)
def test_published_classifier(ending, call, tmp_path, data_dir):
    """A file of another network's names; the weights follow from them."""
    from safetensors.torch import save_file

    from mmrest.checkpoint import read_state_dict
    from mmrest.deployment.export import ExportedProgram

    published = data_dir / 'paddle_rest.pdparams'
    tensors = read_state_dict(published)
    path = tmp_path / f'published{ending}'
    if ending == '.pdparams':
        shutil.copy(published, path)
    elif ending == '.safetensors':
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    else:
        torch.save(dict(model=tensors), path)
    config = tmp_path / 'config.py'
    config.write_text(PUBLISHED)
    call(EXPORT, config, path, tmp_path / 'model.pt2', '--no-verify', cwd=tmp_path)

    arch = dict(Config.fromfile(config).model.backbone.arch)
    network = ResT(arch=arch, out_indices=(3,)).eval()
    network.head = nn.Linear(4, 5)
    fill(network.state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    images = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = network.head(network(images)[0].mean(dim=(2, 3))).softmax(dim=1)
    found = ExportedProgram(tmp_path / 'model.pt2').run(pixels, np.array([40, 56]))
    np.testing.assert_allclose(found['scores'], expected, atol=1e-5)


@pytest.mark.slow
def test_nothing_is_found(exported, picture, tmp_path, exported_model):
    """No box reaches the mask head, in both runtimes."""
    import onnx
    import openvino

    file, _ = exported('mask_rcnn', 'restv2_tiny', '.onnx')
    content = onnx.load(file)
    thresholds = [
        tensor
        for tensor in content.graph.initializer
        if tensor.float_data or tensor.raw_data
        if np.array_equal(onnx.numpy_helper.to_array(tensor), np.float32(0.05))
    ]
    for tensor in thresholds:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.0), tensor.name))
    assert thresholds
    file = tmp_path / 'model.onnx'
    onnx.save(content, file)
    model = openvino.Core().read_model(file)
    compiled = openvino.Core().compile_model(model, 'CPU')
    image = np.asarray(Image.open(picture))[None]
    size = np.array([165, 235])
    of_openvino = compiled(dict(image=image, size=size))
    found = exported_model(file).run(image, size)
    shapes = dict(boxes=(0, 4), scores=(0,), labels=(0,), masks=(0, 165, 235))
    assert {name: array.shape for name, array in found.items()} == shapes
    assert {name: of_openvino[name].shape for name in shapes} == shapes


@pytest.mark.slow
def test_a_file_with_a_fault(exported, detector, tmp_path, exported_model):
    """One layer of a file has weights that are larger by a thousandth."""
    import onnx

    from mmrest.deployment.verification import check

    file, _ = exported('mask_rcnn', 'restv2_tiny', '.onnx')
    _, reference, images, size = detector('mask_rcnn', 'restv2_tiny')
    content = onnx.load(file)
    (tensor, *_) = (x for x in content.graph.initializer if 'fpn_convs' in x.name)
    values = onnx.numpy_helper.to_array(tensor) * np.float32(1.001)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(content, tmp_path / 'model.onnx')
    for path, differs in ((file, False), (tmp_path / 'model.onnx', True)):
        found = exported_model(path).run(images[0], size)
        assert bool(check(found, reference, images[0], size)[0]) is differs


@pytest.mark.slow
def test_masks_of_boxes_and_a_file_that_differs(
    call, trained, tmp_path, picture, monkeypatch
):
    from mmrest.deployment import export
    from mmrest.deployment.verification import (
        VerificationError,
        compare_detections,
        verify,
    )

    programs = []

    class Kept(export.ExportedProgram):
        def __init__(self, path):
            super().__init__(path)
            programs.append(self)  # reading it takes 6 s

    monkeypatch.setattr(export, 'ExportedProgram', Kept)
    options = [tmp_path / 'model.pt2', '--masks', 'box', '--verify', picture]
    call(EXPORT, *trained('mask_rcnn'), *options, cwd=tmp_path)
    (program,) = programs
    image = np.asarray(Image.open(picture))
    found = program.run(image[None], np.array([165, 235]))
    assert found['masks'].shape == (len(found['boxes']), 28, 28)

    class Model:
        model = nn.Identity()

        def __init__(self, predict):
            self.predict = predict

        def compare(self, found, expected):
            return compare_detections(found, expected, 0.05, 20)

    def less_sure(image, size):
        result = program.run(image, size)
        return dict(result, scores=result['scores'] * 0.99)

    def nothing(image, size):
        return {name: array[:0] for name, array in found.items()}

    with pytest.raises(VerificationError, match='beyond rounding, such as class'):
        verify(program.run, Model(less_sure), [image], lambda x: x)
    text = verify(nothing, Model(nothing), [image], lambda x: x)
    assert 'give --verify a picture' in text


def test_what_cannot_be_exported_leaves_no_file(call, trained, tmp_path, monkeypatch):
    config, checkpoint = trained('retinanet')

    def fails(name, *options, checkpoint=checkpoint):
        folder = tmp_path / 'out'
        output = call(
            EXPORT,
            config,
            checkpoint,
            folder / name,
            *options,
            cwd=tmp_path,
            fails=True,
        )
        assert 'Traceback' not in output
        assert not folder.exists() or not list(folder.iterdir())
        return output

    assert 'must end in .onnx, .xml, .pt2' in fails('model.trt')
    soft = 'model.test_cfg.nms.type=soft_nms'
    assert 'must be dict(type' in fails('model.pt2', '--cfg-options', soft)
    endless = 'model.test_cfg.max_per_img=-1'
    assert 'must be positive' in fails('model.pt2', '--cfg-options', endless)
    names = 'test_dataloader.dataset.metainfo.classes=[a,b]'
    output = fails('model.pt2', '--cfg-options', names)
    assert 'the model has 3 classes' in output and '2 (a, b)' in output
    other = tmp_path / 'other.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), other)
    assert 'would load nothing' in fails('model.pt2', checkpoint=other)
    monkeypatch.setattr('mmrest.deployment.export.find_spec', lambda name: None)
    assert "pip install 'mmrest[deploy]'" in fails('model.onnx')


def test_files_are_whole_or_absent(tmp_path):
    from mmrest.deployment.export import staged

    file = tmp_path / 'model.xml'
    file.write_text('old')
    with pytest.raises(KeyError), staged(file) as beside:
        beside.write_text('half')
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ['model.xml']
    assert file.read_text() == 'old'
    with staged(file) as beside:
        beside.write_text('new')
        beside.with_suffix('.bin').write_text('weights')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.bin', 'model.xml']
    assert file.read_text() == 'new'


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_as_the_loader_of_mmdet_turns_them(
    orientation, runner, tmp_path
):
    image = Image.new('RGB', (40, 24))
    image.paste((255, 0, 0), (0, 0, 20, 12))
    image.paste((0, 0, 255), (20, 12, 40, 24))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / 'picture.jpg', exif=exif, quality=100)
    found = runner.read_picture(tmp_path / 'picture.jpg')
    loaded = LoadImageFromFile()(dict(img_path=str(tmp_path / 'picture.jpg')))
    expected = loaded['img'][..., ::-1]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=8)


def test_pictures_of_16_bits_are_read_as_by_the_loader(runner, tmp_path):
    values = np.arange(0, 2**16, 400, dtype=np.uint16).reshape(4, 41)
    Image.fromarray(values).save(tmp_path / 'deep.png')
    loaded = LoadImageFromFile()(dict(img_path=str(tmp_path / 'deep.png')))
    found = runner.read_picture(tmp_path / 'deep.png')
    np.testing.assert_array_equal(found, loaded['img'])


@pytest.mark.parametrize(
    'names, message',
    [
        (['a.png'], r'a\.png or \.json exists, and nothing is overwritten'),
        (['text.jpg'], r'text\.jpg cannot be read as a picture'),
        (['b/a.png', 'b/a.jpg'], ''),
    ],
)
def test_runner_loses_no_picture(
    runner, tmp_path, monkeypatch, colour_detector, names, message
):
    monkeypatch.chdir(tmp_path)
    Path('b').mkdir()
    for name in ('a.png', 'b/a.png', 'b/a.jpg'):
        Image.new('RGB', (9, 9)).save(name)
    Path('text.jpg').write_text('no picture')
    before = Path('a.png').read_bytes()
    monkeypatch.setattr(
        'sys.argv', ['x', str(colour_detector('abc')), *names, '--out', '.']
    )
    if message:
        with pytest.raises(SystemExit, match=message):
            runner.main()
    else:
        runner.main()
        assert Path('a.png.json').is_file() and Path('a.jpg.json').is_file()
    assert Path('a.png').read_bytes() == before


def test_runner_names_what_is_wrong(tmp_path, exported_model):
    for name, options, message in (
        ('none.onnx', {}, 'no file'),
        ('model.bin', {}, 'must end in'),
        ('model.onnx', dict(precision='bfloat16'), r'use an \.xml file'),
        ('model.onnx', dict(device='NPU'), 'has no device NPU, but .*CPU'),
        ('model.xml', dict(device='NPU'), 'has no device NPU, but .*CPU'),
        ('model.onnx', {}, r'model\.onnx cannot be read: '),
        ('model.xml', {}, r'model\.xml cannot be read: '),
    ):
        if name != 'none.onnx':
            (tmp_path / name).write_bytes(b'no model')
        with pytest.raises(ValueError, match=message):
            exported_model(tmp_path / name, **options)
