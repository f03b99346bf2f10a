"""What stands in users' configs under the names of the first release."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    'module, name',
    [
        ('engine', 'PreemptionHook'),
        ('engine.checkpointing', 'WholeCheckpointHook'),
        ('engine.fsdp', 'BlockFSDPStrategy'),
        ('engine.label_range', 'LabelRangeHook'),
        ('engine.numerics', 'CheckNonFiniteHook'),
        ('engine.optim', 'LayerDecayOptimWrapperConstructor'),
        ('engine.preemption', 'PreemptionHook'),
        ('preflight', 'check_config'),
    ],
)
def test_modules_of_the_first_release(module, name, monkeypatch):
    package = module.partition('.')[0]
    monkeypatch.delitem(sys.modules, f'mmrest.{package}', raising=False)
    with pytest.warns(DeprecationWarning, match=f'mmrest.{package} is'):
        importlib.import_module(f'mmrest.{package}')
    assert hasattr(importlib.import_module(f'mmrest.{module}'), name)
