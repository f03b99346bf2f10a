"""These tests need a CUDA device: torch, MMEngine and mmcv-lite are enough for them."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if 'test_cuda' in item.path.parts:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(autouse=True)
def _exact_products():
    """Float32 products in float32, and a clean memory counter."""
    if not torch.cuda.is_available():
        yield
        return
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    for setting, value in zip(settings, before):
        setting.allow_tf32 = value
