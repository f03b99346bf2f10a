"""MMPretrain's classifiers from pixels to probabilities."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .preprocessing import Preprocess, require
from .verification import SCORE, Arrays, Differences


class Classifier(nn.Module):
    """An ``ImageClassifier`` with a linear head.

    Args:
        model (nn.Module): MMPretrain's model.

    Raises:
        ExportError: If it has another head.
    """

    task = 'classification'
    input_names = ('image',)
    output_names = ('scores',)
    has_batch = True
    score_threshold = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        kind = type(model.head).__name__
        require(kind == 'LinearClsHead', 'head', 'LinearClsHead', kind)
        given = model.data_preprocessor
        self.preprocess = Preprocess.of(
            given,
            to_bgr=not given.to_rgb,
            divisor=given.pad_size_divisor,
            pad_value=given.pad_value,
        )
        self.model, self.num_classes = model, model.head.num_classes

    def forward(self, image: Tensor) -> Tensor:
        """Classify images.

        Args:
            image (Tensor): Of shape (B, H, W, 3), type uint8, RGB.

        Returns:
            Tensor: Probabilities, of shape (B, classes).
        """
        features = self.model.extract_feat(self.preprocess(image))
        return self.model.head(features).softmax(dim=1)

    @torch.no_grad()
    def predict(self, image: np.ndarray, size: np.ndarray) -> Arrays:
        """Return MMPretrain's prediction."""
        pixels = [torch.from_numpy(x).permute(2, 0, 1).flip(0) for x in image]
        found = self.model.test_step(dict(inputs=pixels))
        return dict(scores=torch.stack([x.pred_score for x in found]).numpy())

    def compare(self, found: Arrays, expected: Arrays) -> tuple[Differences, str]:
        """Return the difference, and what was compared."""
        difference = float(np.abs(found['scores'] - expected['scores']).max())
        count = f'{found["scores"].shape[1]} probabilities'
        return [(difference / SCORE, f'a probability by {difference:.1e}')], count
