"""Run an exported file on pictures, without PyTorch.

It needs NumPy, Pillow, and onnxruntime or openvino. To run a file in a service, copy
the class ExportedModel.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

KEY = 'mmrest'
PRECISIONS = {'float32': 'f32', 'bfloat16': 'bf16'}


class ExportedModel:
    """A file of tools/deployment/export.py in its runtime.

    Args:
        path (str | Path): ``.onnx`` for ONNX Runtime, or ``.xml`` for OpenVINO, with
            its ``.bin`` in the same folder.
        device (str): ``'CPU'``, ``'CUDA'`` (ONNX Runtime), ``'GPU'`` (OpenVINO) or
            another device of the runtime. Default: ``'CPU'``.
        precision (str): For OpenVINO: ``'float32'``, or ``'bfloat16'`` on CPUs that
            support it, which is faster and less exact. Default: ``'float32'``.

    Attributes:
        metadata (dict): Classes, score threshold, and the preprocessing.

    Raises:
        ValueError: If the file, the device or the precision cannot be used.
    """

    def __init__(self, path, device='CPU', precision='float32'):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f'no file {path}')
        if precision not in PRECISIONS:
            raise ValueError(f'precision must be one of {", ".join(PRECISIONS)}')
        if path.suffix not in ('.onnx', '.xml'):
            raise ValueError(f'{path}: the file must end in .onnx or .xml')
        if path.suffix == '.onnx' and precision != 'float32':
            raise ValueError('ONNX Runtime computes in float32; use an .xml file')
        try:
            if path.suffix == '.onnx':
                text, self._run = open_onnx(path, device)
            else:
                text, self._run = open_openvino(path, device, PRECISIONS[precision])
        except ValueError:
            raise
        except Exception as error:  # the runtimes have errors of their own
            raise ValueError(f'{path} cannot be read: {error}') from error
        if not text:
            raise ValueError(f'{path} was not made by tools/deployment/export.py')
        self.metadata = json.loads(text)

    def run(self, image, size):
        """Run the file on images that have been resized.

        Args:
            image (ndarray): Of shape (B, H, W, 3) and type uint8, RGB.
            size (ndarray): Height and width of the picture before resizing, for which
                boxes and masks are computed.

        Returns:
            dict[str, ndarray]: The outputs by name.
        """
        if image.ndim != 4 or image.shape[3] != 3 or image.dtype != np.uint8:
            raise ValueError(
                'an image must have the shape (batch, height, width, 3) and the type '
                f'uint8, found {image.shape} and {image.dtype}'
            )
        given = dict(image=image, size=np.asarray(size, dtype=np.int64))
        names = self.metadata['inputs']
        results = self._run({name: given[name] for name in names})
        return dict(zip(self.metadata['outputs'], results))

    def prepare(self, picture):
        """Return the arguments of :meth:`run` for a picture (H, W, 3), RGB."""
        picture = np.ascontiguousarray(picture)
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(
                'a picture must have the shape (height, width, 3) and the type uint8, '
                f'found {picture.shape} and {picture.dtype}'
            )
        image = resize(picture, self.metadata['pipeline'])
        return dict(image=image[None], size=np.array(picture.shape[:2]))

    def __call__(self, picture):
        """Predict for a picture, an array of shape (H, W, 3), RGB, of any size."""
        return self.run(**self.prepare(picture))


def open_onnx(path, device):
    """Return the metadata of a file, and a function from inputs to outputs."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f'{path} needs onnxruntime: pip install onnxruntime'
        ) from error
    names = onnxruntime.get_available_providers()
    provider = f'{device}ExecutionProvider'
    if provider not in names:
        known = [name.replace('ExecutionProvider', '') for name in names]
        raise ValueError(f'onnxruntime has no device {device}, but {", ".join(known)}')
    session = onnxruntime.InferenceSession(str(path), providers=[provider])
    metadata = session.get_modelmeta().custom_metadata_map
    return metadata.get(KEY), lambda inputs: session.run(None, inputs)


def open_openvino(path, device, precision):
    """The same as :func:`open_onnx`, with OpenVINO."""
    try:
        import openvino
    except ImportError as error:
        raise ValueError('pip install openvino to run .xml files') from error
    core = openvino.Core()
    known = core.available_devices
    if device not in known:
        raise ValueError(f'openvino has no device {device}, but {", ".join(known)}')
    model = core.read_model(path)
    text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else ''
    # the default is bfloat16 on CPUs that support it
    options = {'INFERENCE_PRECISION_HINT': precision}
    compiled = core.compile_model(model, device, options)

    def run(inputs):
        results = compiled(inputs)
        return [results[output] for output in compiled.outputs]

    return text, run


# ---------------------------------------------------------------- pictures


def read_picture(path):
    """Read a picture (H, W, 3), RGB, and apply its EXIF orientation.

    Raises:
        OSError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):  # 16 bits, which Pillow would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert('RGB'))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f'{path} cannot be read as a picture: {error}') from error


def resize(picture, pipeline):
    """Apply the steps of a test pipeline that resize or crop a picture."""
    for step in pipeline:
        height, width = picture.shape[:2]
        if step['type'] == 'CenterCrop':
            picture = centre_crop(picture, step['crop_size'])
            continue
        if step['type'] == 'ResizeEdge':
            side, short = step['scale'], min(height, width)
            target = int(side * width / short), int(side * height / short)
        elif step.get('keep_ratio'):
            long, short = max(step['scale']), min(step['scale'])
            factor = min(long / max(height, width), short / min(height, width))
            target = int(width * factor + 0.5), int(height * factor + 0.5)
        else:
            both = step['scale']
            target = (both, both) if isinstance(both, int) else tuple(both)
        way = step.get('interpolation', 'bilinear')
        picture = scale(picture, target, step.get('backend', 'cv2'), way)
    return picture


def scale(picture, target, backend, way):
    """Resize to (width, height) with the library of the test pipeline."""
    if backend == 'pillow':
        ways = Image.Resampling
        way = {'bilinear': ways.BILINEAR, 'bicubic': ways.BICUBIC}[way]
        return np.asarray(Image.fromarray(picture).resize(target, way))
    import cv2

    way = {'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC}[way]
    return cv2.resize(picture, target, interpolation=way)


def centre_crop(picture, size):
    """Crop a square or (height, width) from the centre."""
    height, width = (size, size) if isinstance(size, int) else size
    y = max(0, int(round((picture.shape[0] - height) / 2)))
    x = max(0, int(round((picture.shape[1] - width) / 2)))
    return picture[y : y + height, x : x + width]


def colour(label):
    """Return the colour of a class."""
    return tuple(int(c) for c in np.random.default_rng(label).integers(64, 256, 3))


def draw_detections(picture, found, classes, threshold):
    """Draw boxes, names and masks on a copy of a picture."""
    canvas = picture.copy()
    shown = [i for i, score in enumerate(found['scores']) if score >= threshold]
    for i in shown:
        mask = found['masks'][i] if 'masks' in found else None
        if mask is not None and mask.dtype == bool:
            shade = np.array(colour(found['labels'][i]))
            canvas[mask] = (canvas[mask] * 0.5 + shade * 0.5).astype(np.uint8)
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for i in shown:
        label = found['labels'][i]
        x1, y1, x2, y2 = (float(c) for c in found['boxes'][i])
        pen.rectangle((x1, y1, x2, y2), outline=colour(label), width=2)
        text = f'{classes[label]} {found["scores"][i]:.2f}'
        pen.text((x1 + 3, y1 + 2), text, fill=colour(label))
    return image


def run_lengths(mask):
    """Encode a mask in COCO's uncompressed run lengths, column by column."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8), [0]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes])).tolist()
    missing = mask.size - sum(counts)
    return dict(size=list(mask.shape), counts=counts + [missing] * (missing > 0))


def list_detections(found, classes):
    """Return detections as a list, by descending score."""
    result = []
    for i, label in enumerate(found['labels'].tolist()):
        entry = dict(
            label=label,
            name=classes[label],
            score=float(found['scores'][i]),
            box=[float(c) for c in found['boxes'][i]],
        )
        if 'masks' in found:
            mask = found['masks'][i]
            entry['mask'] = run_lengths(mask) if mask.dtype == bool else mask.tolist()
        result.append(entry)
    return result


def colour_labels(picture, labels):
    """Return a picture in the colours of its labels."""
    palette = np.array([colour(i) for i in range(int(labels.max()) + 1)])
    return Image.fromarray((picture * 0.5 + palette[labels] * 0.5).astype(np.uint8))


def report(found, picture, metadata, threshold):
    """Return a drawing for a picture, and the content of its JSON file."""
    classes = metadata['classes']
    if metadata['task'] == 'detection':
        image = draw_detections(picture, found, classes, threshold)
        return image, list_detections(found, classes)
    if metadata['task'] == 'segmentation':
        labels = found['labels'][0]
        shares = np.bincount(labels.reshape(-1), minlength=len(classes)) / labels.size
        return colour_labels(picture, labels), dict(zip(classes, shares.tolist()))
    scores = found['scores'][0]
    best = np.argsort(-scores)[:5].tolist()
    result = [dict(label=i, name=classes[i], score=float(scores[i])) for i in best]
    image = Image.fromarray(picture)
    text = f'{result[0]["name"]} {result[0]["score"]:.2f}'
    ImageDraw.Draw(image).text((4, 4), text, fill=colour(best[0]))
    return image, result


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', help='an .onnx or .xml file from export.py')
    parser.add_argument('images', nargs='+', metavar='image', help='pictures')
    parser.add_argument(
        '--out', required=True, help='folder for NAME.png and NAME.json of each picture'
    )
    parser.add_argument(
        '--score', type=float, default=0.3, help='lowest score to draw [0.3]'
    )
    parser.add_argument('--device', default='CPU', help='device of the runtime [CPU]')
    parser.add_argument(
        '--precision',
        choices=tuple(PRECISIONS),
        default='float32',
        help='for OpenVINO [float32]; bfloat16 is faster and less exact',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.out)
    stems = [Path(name).stem for name in args.images]
    try:
        model = ExportedModel(args.file, args.device, args.precision)
        out.mkdir(parents=True, exist_ok=True)
        for name in args.images:
            picture = read_picture(name)
            try:
                found = model(picture)
            except Exception as error:  # such as one that no pixel is left of
                raise ValueError(f'{name} cannot be used: {error}') from error
            image, content = report(found, picture, model.metadata, args.score)
            stem = out / Path(name).stem
            if stems.count(stem.name) > 1:  # a.jpg beside a.png
                stem = out / Path(name).name
            if Path(f'{stem}.png').exists() or Path(f'{stem}.json').exists():
                raise ValueError(
                    f'{stem}.png or .json exists, and nothing is overwritten; name '
                    'another folder with --out'
                )
            image.save(f'{stem}.png')
            if model.metadata['task'] == 'segmentation':
                labels = found['labels'][0].astype(np.uint8)
                Image.fromarray(labels).save(f'{stem}_labels.png')
            Path(f'{stem}.json').write_text(json.dumps(content))
            print(f'{name}: {stem}.png, {stem}.json')
    except (ValueError, OSError) as error:
        sys.exit(f'run_exported.py: {error}')


if __name__ == '__main__':
    main()
