"""Deprecated: the check before a run is :mod:`mmrest.datasets.preflight`."""

import warnings

from .datasets.preflight import PreflightError, check_config, check_data, log_report

__all__ = ['PreflightError', 'check_config', 'check_data', 'log_report']

warnings.warn(
    'mmrest.preflight is deprecated; import from mmrest.datasets.preflight.',
    DeprecationWarning,
    stacklevel=2,
)
