"""What stands in users' configs under the names of the first release."""

import importlib
import sys

import pytest

from mmrest.hooks import AtomicCheckpointHook, WholeCheckpointHook


@pytest.mark.parametrize(
    'module, name',
    [
        ('engine', 'PreemptionHook'),
        ('engine', 'WholeCheckpointHook'),
        ('engine', 'BlockFSDPStrategy'),
        ('engine', 'NonFiniteError'),
        ('engine', 'StopSignals'),
        ('engine', 'LayerDecayOptimWrapperConstructor'),
        ('engine.checkpointing', 'WholeCheckpointHook'),
        ('engine.fsdp', 'BlockFSDPStrategy'),
        ('engine.label_range', 'LabelRangeHook'),
        ('engine.numerics', 'CheckNonFiniteHook'),
        ('engine.optim', 'LayerDecayOptimWrapperConstructor'),
        ('engine.preemption', 'PreemptionHook'),
        ('preflight', 'check_config'),
        ('preflight', 'log_report'),
    ],
)
def test_modules_of_the_first_release(module, name, monkeypatch):
    package = module.partition('.')[0]
    monkeypatch.delitem(sys.modules, f'mmrest.{package}', raising=False)
    with pytest.warns(DeprecationWarning, match=f'mmrest.{package} is'):
        importlib.import_module(f'mmrest.{package}')
    assert hasattr(importlib.import_module(f'mmrest.{module}'), name)


def test_checkpoint_hook_of_the_first_release():
    with pytest.warns(DeprecationWarning, match='now called AtomicCheckpointHook'):
        hook = WholeCheckpointHook(interval=3)
    assert isinstance(hook, AtomicCheckpointHook) and hook.interval == 3
