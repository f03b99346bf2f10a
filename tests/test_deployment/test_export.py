"""tools/deployment: files of every task and format, and what cannot be exported."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')
pytest.importorskip('openvino', reason='needs the extra [deploy]')
pytest.importorskip('onnxscript', reason='needs the extra [deploy]')

EXPORT = 'deployment/export.py'


@pytest.fixture
def exported_model(repo, monkeypatch):
    """The class that a service copies."""
    monkeypatch.syspath_prepend(str(repo / 'tools' / 'deployment'))
    from run_exported import ExportedModel

    return ExportedModel


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'picture.png'
    pixels = np.random.default_rng(1).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((235, 165)).save(path)
    return path


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
    task, arch, ending, call, trained, picture, tmp_path, exported_model, repo
):
    """It is verified on the way; then the runner runs it where torch is not."""
    config, checkpoint = trained(task, arch)
    file = tmp_path / f'model{ending}'
    output = call(EXPORT, config, checkpoint, file, '--verify', picture, cwd=tmp_path)
    assert 'verified against PyTorch: ' in output
    assert '4 layers in tiles, which store no map' in output
    names = {'model.bin', file.name} if ending == '.xml' else {file.name}
    assert {p.name for p in tmp_path.glob('*model*')} == names
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


@pytest.mark.slow
def test_nothing_is_found(call, trained, picture, tmp_path, exported_model):
    """No box reaches the mask head, in both runtimes."""
    config, checkpoint = trained('mask_rcnn')
    file = tmp_path / 'model.onnx'
    options = ['--cfg-options', 'model.test_cfg.rcnn.score_thr=1.0']
    output = call(EXPORT, config, checkpoint, file, *options, cwd=tmp_path)
    assert 'give --verify a picture' in output
    import openvino

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
def test_masks_of_boxes_and_a_file_that_differs(call, trained, tmp_path, picture):
    config, checkpoint = trained('mask_rcnn')
    file = tmp_path / 'model.pt2'
    options = [file, '--masks', 'box', '--verify', picture]
    call(EXPORT, config, checkpoint, *options, cwd=tmp_path)

    from mmrest.deployment.export import ExportedProgram
    from mmrest.deployment.verification import VerificationError, verify

    program = ExportedProgram(file)
    image = np.asarray(Image.open(picture))
    found = program.run(image[None], np.array([165, 235]))
    assert found['masks'].shape == (len(found['boxes']), 28, 28)

    class Other:
        def predict(self, image, size):
            result = program.run(image, size)
            return dict(result, scores=result['scores'] * 0.99)

        def compare(self, found, expected):
            from mmrest.deployment.verification import compare_detections

            return compare_detections(found, expected, 0.05, 20)

    with pytest.raises(VerificationError, match='detections more of'):
        verify(program.run, Other(), [image], lambda x: x)


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


def test_runner_names_what_is_wrong(tmp_path, exported_model):
    for name, options, message in (
        ('none.onnx', {}, 'no file'),
        ('model.bin', {}, 'must end in'),
        ('model.onnx', dict(precision='bfloat16'), r'use an \.xml file'),
        ('model.onnx', dict(device='NPU'), 'has no device NPU, but .*CPU'),
        ('model.xml', dict(device='NPU'), 'has no device NPU, but .*CPU'),
    ):
        if name != 'none.onnx':
            (tmp_path / name).write_bytes(b'')
        with pytest.raises(ValueError, match=message):
            exported_model(tmp_path / name, **options)
