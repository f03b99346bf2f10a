"""Expected results, and whether measured ones agree.

The model index (``model-index.yml`` and a ``metafile.yml`` per config folder) holds the
published results. A config may hold its own in ``expected_results``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config
from mmengine.fileio import load

from ..config import config_root

# With multiple scales and flip, `tools/test.py --tta`
AUGMENTED = 'mIoU (ms+flip)'
# Names of the metrics of the index in the evaluation, and the factor to percent
METRICS = {
    'box AP': ('coco/bbox_mAP', 100),
    'mask AP': ('coco/segm_mAP', 100),
    'top-1': ('accuracy/top1', 1),
    AUGMENTED: ('mIoU', 1),
}
# For rounding errors
SLACK = 1e-6


class ResultsError(ValueError):
    """Expected results are missing or cannot be compared."""


@dataclass(frozen=True)
class Expected:
    """Expected results of a config."""

    metrics: dict[str, float]  # in percent by name, e.g. ``'box AP'``
    tolerance: float  # largest difference in percent
    kind: str  # kind and origin of the results


def read_index(root: Optional[Path] = None) -> list[dict[str, Any]]:
    """Read the entries under ``Models`` of all files that the index imports.

    ``root`` is the folder of ``model-index.yml``. Default: None, that of the installed
    package or the checkout.
    """
    root = Path(root or config_root().parent)
    models = []
    for name in load(root / 'model-index.yml')['Import']:
        models += load(root / name)['Models']
    return models


def _metrics(model: Mapping[str, Any]) -> dict[str, float]:
    results = model.get('Results', ())
    return {name: v for result in results for name, v in result['Metrics'].items()}


def _is_detector(model: Mapping[str, Any]) -> bool:
    return any(r['Task'] == 'Object Detection' for r in model.get('Results', ()))


def expected(cfg: Config, name: str, root: Optional[Path] = None) -> Expected:
    """Find the expected results of a config.

    Its ``expected_results``, a dict with ``metrics``, ``tolerance`` and ``kind``, has
    precedence over the index, in which its path, ``name``, is searched.

    Raises:
        ResultsError: If there are none, or they are incomplete.
    """
    own = cfg.get('expected_results')
    if own is not None:
        missing = [key for key in ('metrics', 'tolerance', 'kind') if key not in own]
        unknown = [key for key in own.get('metrics', {}) if key not in METRICS]
        if missing or unknown or not own['metrics']:
            raise ResultsError(
                'expected_results of the config takes metrics (in percent by '
                f'{" or ".join(METRICS)}), tolerance and kind; missing: {missing}, '
                f'unknown metrics: {unknown}'
            )
        return Expected(dict(own.metrics), own.tolerance, f'{own.kind} (the config)')
    path = Path(name.replace('mmrest::', 'configs/')).parts[-2:]
    for model in read_index(root):
        if Path(model['Config']).parts[-2:] == path and 'Results' in model:
            meta = model['Metadata']
            unit = 'AP' if _is_detector(model) else 'points'
            kind = (
                f'{meta["Figures"]} figures, for {meta["Weights To Check"]} weights '
                '(the model index)'
            )
            return Expected(_metrics(model), meta[f'Tolerance ({unit})'], kind)
    raise ResultsError(
        f'no expected figures for {name}: neither does the config have '
        'expected_results, nor does the model index have figures of it'
    )


def compare(measured: Mapping[str, float], figures: Expected) -> tuple[bool, str]:
    """Compare the results of ``Runner.test`` with expected ones.

    Returns:
        tuple[bool, str]: Whether all agree, and a line for each result.

    Raises:
        ResultsError: If a result was not measured.
    """
    agree, lines = True, [f'compared with {figures.kind}']
    for name, wanted in figures.metrics.items():
        key, factor = METRICS[name]
        if key not in measured:
            raise ResultsError(
                f'{name} was not measured: the evaluation gave '
                f'{", ".join(sorted(measured)) or "nothing"}, not {key}'
            )
        found = factor * measured[key]
        inside = abs(found - wanted) <= figures.tolerance + SLACK
        agree &= inside
        lines.append(
            f'{name}: {found:.1f}, expected {wanted:.1f} +- {figures.tolerance:g}: '
            + ('agrees' if inside else 'DIFFERS')
        )
    return agree, '\n'.join(lines)


def render_table(root: Optional[Path] = None) -> str:
    """Write the detectors of the index as a Markdown table, for the README."""
    lines = [
        '| config | published box AP | published mask AP | parameters '
        '| FLOPs at 800x1333 | expected of |',
        '|---|---|---|---|---|---|',
    ]
    for model in filter(_is_detector, read_index(root)):
        meta, metrics, path = model['Metadata'], _metrics(model), Path(model['Config'])
        cells = (
            f'[{path.parent.name}/{path.stem}]({path})',
            metrics.get('box AP', '-'),
            metrics.get('mask AP', '-'),
            f'{meta["Parameters"] / 1e6:.1f} M',
            f'{meta["FLOPs"] / 1e9:.0f} G',
            f'{meta["Weights To Check"]} weights, within {meta["Tolerance (AP)"]}',
        )
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)
