"""tools/deployment/quantize.py on a file of one convolution."""

import numpy as np
import pytest
from PIL import Image

onnx = pytest.importorskip('onnx', reason='needs the extra [deploy]')
pytest.importorskip('openvino', reason='needs the extra [deploy]')

TOOL = 'deployment/quantize.py'


@pytest.fixture
def folder(tmp_path):
    """Pictures, and a file that is none."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
    (folder / 'labels.json').write_text('{}')
    return folder


@pytest.mark.parametrize('ending', ['.onnx', '.xml'])
def test_convolutions_are_of_8_bits(
    ending, call, colour_detector, folder, tmp_path, exported_model
):
    file, out = colour_detector(('red', 'green', 'blue')), tmp_path / f'small{ending}'
    output = call(TOOL, file, out, '--images', folder, '--limit', 2, cwd=tmp_path)
    assert 'on the 2 pictures for calibration: 2 of 2 detections' in output
    assert {p.name for p in tmp_path.glob('small*')} - {'small.bin'} == {out.name}
    if ending == '.onnx':
        nodes = {node.output[0]: node for node in onnx.load(out).graph.node}
        (conv,) = (node for node in nodes.values() if node.op_type == 'Conv')
        sources = {nodes[name].op_type for name in conv.input}
        assert sources == {'DequantizeLinear'}
    picture = np.asarray(Image.open(folder / '2.png'))
    new, old = exported_model(out), exported_model(file)
    assert new.metadata == old.metadata
    found, expected = new(picture), old(picture)
    np.testing.assert_array_equal(found['boxes'], expected['boxes'])
    difference = np.abs(found['scores'] - expected['scores'])
    assert 0 < difference < 0.02


def test_what_it_refuses(call, colour_detector, folder, tmp_path):
    file = colour_detector(('red', 'green', 'blue'))

    def fails(*arguments, images=folder):
        options = ('--images', images)
        output = call(TOOL, *arguments, *options, cwd=tmp_path, fails=True)
        assert 'Traceback' not in output
        assert not list(tmp_path.glob('*small*'))
        return output

    out = tmp_path / 'small.onnx'
    assert 'must end in .onnx' in fails(tmp_path / 'model.xml', out)
    assert 'exists; give --force' in fails(file, file)
    assert '--limit must be 1 or more' in fails(file, out, '--limit', 0)
    assert 'No such file' in fails(file, out, images=tmp_path / 'none')
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert 'holds no pictures' in fails(file, out, images=empty)
    (folder / '0.png').write_bytes(b'no picture')
    assert '0.png' in fails(file, out)
    (tmp_path / 'other.onnx').write_bytes(b'no model')
    assert 'other.onnx' in fails(tmp_path / 'other.onnx', out)


def test_differences_of_detections():
    from mmrest.deployment.quantization import describe_differences

    old = dict(
        boxes=np.array([[0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 5, 5]], np.float32),
        scores=np.array([0.9, 0.8, 0.1]),
        labels=np.array([0, 1, 0]),
    )
    new = dict(
        boxes=np.array([[20, 20, 40, 41], [0, 0, 12, 10], [60, 0, 70, 10]], np.float32),
        scores=np.array([0.7, 0.85, 0.8]),
        labels=np.array([1, 0, 0]),
    )
    text = describe_differences('detection', [(new, old)])
    assert '2 of 2 detections' in text and '1.50 pixel in the median' in text
    assert '2.00 at most' in text and 'scores by 0.0750 and 0.1000' in text
    none = dict(boxes=np.zeros((0, 4)), scores=np.zeros(0), labels=np.zeros(0))
    assert '0 of 2 detections' in describe_differences('detection', [(none, old)])
    labels = [dict(labels=np.array([[[0, 1], [2, x]]])) for x in (0, 1)]
    assert '25.00% of the pixels' in describe_differences('segmentation', [labels])
    scores = [dict(scores=np.array([[0.6, x]])) for x in (0.4, 0.7)]
    text = describe_differences('classification', [scores])
    assert '0 of 1' in text and '0.300' in text
