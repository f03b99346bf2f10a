"""Evaluate an exported file with the metrics of a config, with MMEngine's Runner."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData

from mmrest import launch
from mmrest.deployment.preprocessing import ExportError
from mmrest.utils.evaluation import EvaluationRunner
from mmrest.utils.text import shorten

sys.path.insert(0, str(Path(__file__).parent))
from run_exported import PRECISIONS, ExportedModel  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    launch.add_config_arguments(parser)
    parser.add_argument('file', help='NAME.onnx, NAME.xml or NAME.pt2')
    parser.add_argument(
        '--precision',
        choices=tuple(PRECISIONS),
        default='float32',
        help='for OpenVINO [float32]; bfloat16 is faster and less exact',
    )
    launch.add_work_dir_arguments(parser)
    parser.set_defaults(launcher='none', local_rank=0)
    return parser.parse_args()


@MODELS.register_module(force=True)  # a tool may run twice in a process
class ExportedPredictor(BaseModel):
    """Runs an exported file in place of the model of a config.

    Args:
        file (str): From ``tools/deployment/export.py``.
        precision (str): See ``ExportedModel``. Default: ``'float32'``.

    Raises:
        ExportError: If the file cannot be run.
    """

    def __init__(self, file: str, precision: str = 'float32') -> None:
        super().__init__()
        try:
            if file.endswith('.pt2'):
                from mmrest.deployment.export import ExportedProgram

                self.file = ExportedProgram(Path(file))
            else:
                self.file = ExportedModel(file, precision=precision)
        except (ValueError, OSError) as error:
            raise ExportError(str(error)) from error
        task = self.file.metadata['task']
        self._fill = dict(
            detection=_fill_detections,
            segmentation=_fill_segmentation,
            classification=_fill_classification,
        )[task]

    def forward(self, inputs: Any, data_samples: Any, mode: str) -> None:
        """Required by BaseModel; the Runner calls ``test_step``."""

    def test_step(self, data: dict) -> list[Any]:
        """Predict for one image after the other, since their sizes differ.

        Args:
            data (dict): ``inputs``, images of shape (3, H, W), BGR, uint8, and their
                ``data_samples``.

        Returns:
            list[BaseDataElement]: The data samples with predictions.
        """
        for pixels, sample in zip(data['inputs'], data['data_samples']):
            image = np.ascontiguousarray(pixels.flip(0).permute(1, 2, 0)[None].numpy())
            found = self.file.run(image, np.array(sample.ori_shape))
            self._fill(sample, {k: torch.from_numpy(x) for k, x in found.items()})
        return data['data_samples']


def _fill_detections(sample: Any, found: dict[str, torch.Tensor]) -> None:
    found['bboxes'] = found.pop('boxes')
    sample.pred_instances = InstanceData(**found)


def _fill_segmentation(sample: Any, found: dict[str, torch.Tensor]) -> None:
    sample.pred_sem_seg = PixelData(data=found['labels'])


def _fill_classification(sample: Any, found: dict[str, torch.Tensor]) -> None:
    scores = found['scores'][0]
    sample.set_pred_score(scores).set_pred_label(scores.argmax(dim=0, keepdim=True))


def main() -> None:
    args = parse_args()
    with launch.short_errors('tools/deployment/test_exported.py'):
        cfg = launch.load_run_config(args)
        report = launch.check_before_run(cfg, args, 'test')
        cfg.load_from, cfg.resume = None, False
        cfg.model = dict(
            type='ExportedPredictor', file=args.file, precision=args.precision
        )
        runner = launch.build_runner(cfg, report, EvaluationRunner)
        own = runner.model.file.metadata['classes']
        names = runner.test_dataloader.dataset.metainfo.get('classes')
        if names and list(names) != own:
            raise ExportError(
                f'{args.file} was made for the classes {shorten(own)}, but the test '
                f'data of the config have {shorten(names)}'
            )
        runner.test()


if __name__ == '__main__':
    main()
