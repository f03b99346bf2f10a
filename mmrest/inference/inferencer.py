"""One interface to the inferencers of MMDetection, MMSegmentation and MMPretrain.

The toolboxes' inferencers load, name classes, draw and save in different ways. Only
their model, pipeline, forward pass and visualizer are used here. The checkpoint is read
once, safely, and must fit the model.
"""

import copy
import itertools
import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from ..checkpoint import CheckpointError, check_content, read_checkpoint
from ..checkpoint.classifier import PublishedClassifierHook
from ..checkpoint.reading import Source
from ..launch import LaunchError, load_config
from ..optim.amp import test_with_amp
from ..utils.config_types import TOOLBOXES, find_toolbox, find_type, type_name

# a visualizer has one canvas, and Matplotlib's figures are not for several threads
_DRAWING = threading.Lock()


class InferenceError(LaunchError):
    """An input, output or device that cannot be used."""


class Inferencer(ABC):
    """Predictions of a model; use :func:`init_inferencer` to build it.

    Args:
        cfg (Config): A whole config, whose test pipeline is used.
        checkpoint (dict): The content of the checkpoint, in MMEngine's form.
        source (str | Path): Its file or URL, for messages.
        device (str): Device of the model.

    Attributes:
        model (nn.Module): The model, in evaluation mode.
        classes (Sequence[str]): Class names of the checkpoint, or else of the config.
    """

    def __init__(
        self, cfg: Config, checkpoint: dict, source: Source, device: str
    ) -> None:
        self.base = self._build(cfg, checkpoint, source, device)
        self.model: Any = self.base.model
        channels = getattr(getattr(self.model, 'backbone', None), 'in_channels', 3)
        if channels not in (1, 3):
            raise InferenceError(
                f'the backbone takes images of {channels} channels, and inference here '
                'reads pictures in colour or in grey.'
            )
        steps = cfg.test_dataloader.dataset.pipeline
        colors = (step.get('color_type', '') for step in steps)
        self._is_grey = any(color.startswith('grayscale') for color in colors)
        self.classes: Sequence[str] = self._classes()

    @abstractmethod
    def _build(self, cfg: Config, checkpoint: dict, source: Source, device: str) -> Any:
        """Build the toolbox's inferencer, and load the checkpoint."""

    def _classes(self) -> Sequence[str]:
        return self.model.dataset_meta['classes']

    def preprocess(self, images: Sequence[np.ndarray]) -> dict:
        """Apply the test pipeline to images, and return a batch for ``test_step``.

        Args:
            images (Sequence[ndarray]): Each of shape (H, W, 3), BGR, uint8.

        Raises:
            InferenceError: If they are anything else.
        """
        images = check_images(images)
        if self._is_grey:  # as LoadImageFromFile would read them
            images = [cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in images]
        (batch,) = self.base.preprocess(images, batch_size=len(images))
        # mmdet returns the images together with the batch
        return batch if isinstance(batch, dict) else batch[1]

    def predict(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Run the model on a batch.

        Args:
            images (Sequence[ndarray]): Each of shape (H, W, 3), BGR, uint8.

        Returns:
            list[BaseDataElement]: A data sample of the toolbox for each image, on the
            CPU.

        Raises:
            InferenceError: If an image has another form.
        """
        images = list(images)
        if not images:
            return []
        samples = self.base.forward(self.preprocess(images))
        return [sample.cpu() for sample in samples]

    def draw(
        self, image: np.ndarray, sample: Any, score_thr: float = 0.3
    ) -> np.ndarray:
        """Draw a prediction.

        Args:
            image (ndarray): The image, of shape (H, W, 3), BGR, uint8.
            sample (BaseDataElement): Its prediction.
            score_thr (float): Lowest score of boxes to draw. Default: 0.3.

        Returns:
            ndarray: BGR, uint8.
        """
        with _DRAWING:
            self._add(image[..., ::-1], sample, score_thr)
            return self.base.visualizer.get_image()[..., ::-1]

    @abstractmethod
    def _add(self, image: np.ndarray, sample: Any, score_thr: float) -> None:
        """Let the visualizer draw on an image, in RGB."""

    @abstractmethod
    def to_dict(self, sample: Any, score_thr: float = 0.0) -> dict:
        """Convert a prediction for JSON.

        Args:
            sample (BaseDataElement): The prediction.
            score_thr (float): Lowest score of boxes to include. Default: 0.

        Returns:
            dict: For a detector ``labels``, ``classes``, ``scores``, ``bboxes`` (x1,
            y1, x2, y2 in pixels) and ``masks`` (COCO's RLE); for a segmentor
            ``pixels`` by class; for a classifier ``pred_class``, ``pred_label``,
            ``pred_score`` and ``pred_scores``.
        """

    def label_image(self, sample: Any) -> Optional[np.ndarray]:
        """Return a segmentor's labels of the pixels, of shape (H, W); else None."""
        return None


class _Detection(Inferencer):
    def _build(self, cfg: Config, checkpoint: dict, source: Source, device: str) -> Any:
        from mmdet.apis import DetInferencer

        kind = _checked(DetInferencer, checkpoint, source)
        return kind(cfg, device=device, show_progress=False)

    def _add(self, image: np.ndarray, sample: Any, score_thr: float) -> None:
        self.base.visualizer.add_datasample(
            'image',
            image,
            sample,
            draw_gt=False,
            pred_score_thr=score_thr,
        )

    def to_dict(self, sample: Any, score_thr: float = 0.0) -> dict:
        kept = sample.clone()
        kept.pred_instances = kept.pred_instances[
            kept.pred_instances.scores >= score_thr
        ]
        result = self.base.pred2dict(kept)
        result['classes'] = [self.classes[label] for label in result['labels']]
        return result


class _Segmentation(Inferencer):
    def _build(self, cfg: Config, checkpoint: dict, source: Source, device: str) -> Any:
        from mmseg.apis import MMSegInferencer

        base = _checked(MMSegInferencer, checkpoint, source)(cfg, device=device)
        meta = base.model.dataset_meta
        # mmseg's default is the 19 colours of Cityscapes
        palette = meta.get('palette') or [
            [37 * n % 256, 97 * n % 256, 173 * n % 256]
            for n in range(len(meta['classes']))
        ]
        base.visualizer.set_dataset_meta(meta['classes'], palette)
        base.visualizer.alpha = 0.6
        return base

    def predict(self, images: Sequence[np.ndarray]) -> list[Any]:
        # mmseg's batches consist of images of one size
        size_of = operator.attrgetter('shape')
        samples: list[Any] = []
        for _, part in itertools.groupby(check_images(images), size_of):
            samples += super().predict(list(part))
        return samples

    def _add(self, image: np.ndarray, sample: Any, score_thr: float) -> None:
        self.base.visualizer.add_datasample('image', image, sample, draw_gt=False)

    def to_dict(self, sample: Any, score_thr: float = 0.0) -> dict:
        labels, counts = np.unique(sample.pred_sem_seg.data, return_counts=True)
        named = {
            self.classes[label]: int(count)
            for label, count in zip(labels.tolist(), counts)
            if label < len(self.classes)
        }
        return dict(pixels=named)

    def label_image(self, sample: Any) -> Optional[np.ndarray]:
        return sample.pred_sem_seg.data[0].numpy().astype(np.uint8)


class _Classification(Inferencer):
    def _build(self, cfg: Config, checkpoint: dict, source: Source, device: str) -> Any:
        from mmengine.runner.checkpoint import _load_checkpoint_to_model
        from mmpretrain.apis import ImageClassificationInferencer, get_model
        from mmpretrain.visualization import UniversalVisualizer

        PublishedClassifierHook().after_load_checkpoint(None, checkpoint)
        model = get_model(cfg, device=device)
        check_content(model, checkpoint, source)
        _load_checkpoint_to_model(model, checkpoint)
        meta = _dataset_meta(checkpoint, cfg, model)
        base = ImageClassificationInferencer(
            model, pretrained=False, classes=meta['classes']
        )
        base.visualizer = UniversalVisualizer()
        return base

    def _classes(self) -> Sequence[str]:
        return self.base.classes

    def _add(self, image: np.ndarray, sample: Any, score_thr: float) -> None:
        self.base.visualizer.visualize_cls(
            image, sample, classes=self.classes, draw_gt=False
        )

    def to_dict(self, sample: Any, score_thr: float = 0.0) -> dict:
        scores = sample.pred_score
        label = int(scores.argmax())
        return dict(
            pred_class=self.classes[label],
            pred_label=label,
            pred_score=float(scores[label]),
            pred_scores=scores.tolist(),
        )


KINDS: dict[str, Any] = dict(
    mmdet=_Detection, mmseg=_Segmentation, mmpretrain=_Classification
)


def init_inferencer(
    config: Union[str, Config],
    checkpoint: Source,
    device: Optional[str] = None,
    amp: Optional[str] = None,
) -> Inferencer:
    """Build a model, and load a checkpoint.

    Args:
        config (str | Config): A config of mmdet, mmseg or mmpretrain: a path,
            ``package::folder/name.py``, or a ``Config``.
        checkpoint (str | Path): A path or URL of a checkpoint of the whole model.
        device (str, optional): Such as ``'cpu'`` or ``'cuda:0'``. Default: None, a GPU
            if there is one.
        amp (str, optional): Mixed precision: ``'bfloat16'``, ``'float16'`` or
            ``'auto'``. Default: None, float32.

    Raises:
        LaunchError: If config or device cannot be used.
        AmpError: If the device does not support that precision.
        CheckpointError: If the checkpoint cannot be read safely or does not fit.

    Example:
        >>> from mmrest.inference import infer, init_inferencer  # doctest: +SKIP
        >>> inferencer = init_inferencer('my_config.py', 'epoch_12.pth')
        >>> infer(inferencer, 'demo.jpg', 'outputs')
    """
    device = check_device(device or get_device(), amp)
    cfg = load_config(config) if isinstance(config, str) else config
    toolbox = find_toolbox(cfg)
    if toolbox not in KINDS:
        raise InferenceError(
            f'the config belongs to {toolbox or "no toolbox"}; inference takes those '
            f'of {", ".join(TOOLBOXES)}, named by default_scope.'
        )
    init_default_scope(toolbox)
    cfg = _for_inference(cfg)
    loaded = read_checkpoint(checkpoint)
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f'{checkpoint} is a {type(loaded).__name__}, not a dict of tensors'
        )
    inferencer = KINDS[toolbox](cfg, loaded, checkpoint, device)
    if amp:
        test_with_amp(inferencer.model, amp)
    return inferencer


def check_images(images: Iterable[Any]) -> list[np.ndarray]:
    """Return images as a list.

    Raises:
        InferenceError: If one is no array of shape (H, W, 3) and type uint8.
    """
    listed = list(images)
    for image in listed:
        shape, dtype = np.shape(image), getattr(image, 'dtype', '')
        fits = len(shape) == 3 and shape[2] == 3 and 0 not in shape
        if not isinstance(image, np.ndarray) or not fits or dtype != np.uint8:
            raise InferenceError(
                'images are given as a list of NumPy arrays of shape (H, W, 3), BGR, '
                f'uint8; found a {type(image).__name__} of shape {shape} {dtype}. '
                'mmrest.inference.read_image reads any file so.'
            )
    return listed


def check_device(device: str, amp: Optional[str] = None) -> str:
    """Return a device, if it exists.

    Raises:
        InferenceError: If it does not, or is not the one for which mixed precision
            works.
    """
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InferenceError(f'--device {device} cannot be used: {reason}') from error
    if amp and kind != get_device():
        raise InferenceError(
            f'--amp computes on {get_device()}, the default device of this machine, '
            f'and --device is {device}. Leave one of the two out.'
        )
    return device


def _for_inference(cfg: Config) -> Config:
    """Copy a config, with a test pipeline that only loads images."""
    cfg = copy.deepcopy(cfg)
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    if not loader or 'pipeline' not in loader.get('dataset', {}):
        raise InferenceError(
            'the config has no test_dataloader (or val_dataloader) with a '
            'dataset.pipeline, which says how images are resized and normalised.'
        )
    steps = []
    for step in loader['dataset']['pipeline']:
        name = type_name(step)
        if name.startswith('Load') and 'Annotation' in name:
            continue
        if name == 'LoadImageFromFile':  # mmseg searches for this name
            step['type'] = name
        steps.append(step)
    loader['dataset']['pipeline'] = steps
    cfg.test_dataloader = loader
    if not cfg.get('visualizer'):
        cfg.visualizer = dict(type=_VISUALIZERS.get(find_toolbox(cfg) or '', ''))
    cfg.visualizer.vis_backends = None
    return cfg


_VISUALIZERS = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer')


def _dataset_meta(checkpoint: dict, cfg: Config, model: nn.Module) -> dict:
    """Class names of a checkpoint, or else of its config, or else numbers."""
    meta = checkpoint.get('meta') or {}
    if 'CLASSES' in meta:
        meta = dict(dataset_meta=dict(classes=meta['CLASSES']))
    if 'dataset_meta' in meta:
        found = {key.lower(): value for key, value in meta['dataset_meta'].items()}
    else:
        dataset = cfg.test_dataloader.dataset
        kind = find_type({'_scope_': find_toolbox(cfg), **dataset}, DATASETS)
        found = dict(getattr(kind, 'METAINFO', None) or {})
        found.update(dataset.get('metainfo') or {})
    if not found.get('classes'):
        counts = [getattr(module, 'num_classes', 0) for module in model.modules()]
        count = max(n for n in counts if isinstance(n, int))
        found['classes'] = tuple(str(n) for n in range(count))
    return found


def _checked(kind: type, checkpoint: dict, source: Source) -> type:
    """Make a toolbox's inferencer load a checkpoint that was read, if it fits."""

    class Checked(kind):
        def _load_weights_to_model(self, model: Any, _: Any, cfg: Any) -> None:
            check_content(model, checkpoint, source)
            meta = dict(checkpoint.get('meta') or {})
            meta['dataset_meta'] = _dataset_meta(checkpoint, cfg, model)
            super()._load_weights_to_model(model, dict(checkpoint, meta=meta), cfg)

        def _init_collate(self, cfg: Any) -> Any:
            # MMEngine warns if it does not find one
            named = 'collate_fn' in cfg.test_dataloader
            return super()._init_collate(cfg) if named else pseudo_collate

    return Checked
