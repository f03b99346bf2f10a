"""The tool that measures the rows of docs/ablation.md."""

import re

import pytest
import torch

TOOL = 'analysis_tools/ablation_table.py'
PAGE = 'before\n<!-- ablation:begin -->\nold\n<!-- ablation:end -->\nafter\n'


@pytest.fixture
def one_thread():
    """The tool sets PyTorch's threads; they are as before after the test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(call, repo, tmp_path, one_thread):
    def run_tool(*options, **kwargs):
        names = ('lite_published', 'lite_pos_none')
        configs = [repo / 'configs' / 'ablation' / f'{name}.py' for name in names]
        small = ['--size', '64', '--batch', '1', '--rounds', '1', '--threads', '1']
        return call(TOOL, *configs, *small, *options, cwd=tmp_path, **kwargs)

    return run_tool


def test_rows_go_between_the_marks(measure, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(PAGE)
    output = measure('--into', page)
    text = page.read_text()
    rows = dict(re.findall(r'\| `(\w+)` \| ([\d,]+) \| \d\.\d{3} G \|', text))
    # without the depthwise 3x3 convolutions of the four stages, and their biases
    removed = (9 + 1) * (64 + 128 + 256 + 512)
    assert rows == dict(
        lite_published='10,508,300', lite_pos_none=f'{10_508_300 - removed:,}'
    )
    (line,) = (line for line in text.splitlines() if '`lite_published` |' in line)
    assert line.count('x 1.00') == 2
    assert all(line in output for line in text.splitlines()[2:-2])
    assert text.startswith('before\n') and text.endswith('after\n')
    assert 'old' not in text


@pytest.mark.parametrize('text', ['no marks', PAGE * 2])
def test_a_page_without_the_marks_stays_as_it_is(measure, tmp_path, text):
    page = tmp_path / 'page.md'
    page.write_text(text)
    assert 'needs <!-- ablation:begin -->' in measure('--into', page, fails=True)
    assert page.read_text() == text
