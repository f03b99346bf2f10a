"""Command lines of get_flops.py and render_results.py."""

import runpy
import sys

import pytest

from mmrest.utils.results import render_table


@pytest.fixture
def tool(repo, monkeypatch, capsys):
    """Run tools/analysis_tools/NAME.py: tool(name, *args) gives status and text."""

    def run(name, *args):
        path = repo / 'tools/analysis_tools' / f'{name}.py'
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, args)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(path), run_name='__main__')
        captured = capsys.readouterr()
        return done.value.code, captured.out + captured.err

    return run


def rows(text):
    lines = [line.split() for line in text.splitlines() if ' G ' in line]
    return {line[0]: line for line in lines}


def test_get_flops(tool):
    config = 'mmrest::mask_rcnn/rest_small_fpn_1x.py'
    texts = []
    for attn_impl in ('dense', 'tiled'):
        option = f'model.backbone.attn_impl={attn_impl}'
        args = (config, '--shape', '90', '100', '--cfg-options', option)
        status, text = tool('get_flops', *args)
        assert status == 0
        assert 'one image of 96x128 (padded from 90x100)' in text
        texts.append(text)
    dense, tiled = map(rows, texts)
    assert list(dense) == ['backbone', 'neck', 'rpn_head', 'roi_head', 'total']
    assert dense['backbone'] == tiled['backbone']
    assert dense['total'][3] == '33,318,628'


def test_get_flops_of_no_config(tool):
    status, text = tool('get_flops', 'mmrest::mask_rcnn/rest_smal_fpn_1x.py')
    assert status == 1 and text.startswith('error: ')
    assert 'rest_small_fpn_1x.py' in text and 'Traceback' not in text


def test_render_results(tool, repo, tmp_path):
    assert tool('render_results') == (0, render_table(repo) + '\n')
    page = tmp_path / 'README.md'
    page.write_text('a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb\n')
    assert tool('render_results', page)[0] == 0
    text = page.read_text()
    assert text.startswith('a\n') and text.endswith('\nb\n') and 'old' not in text
    assert render_table(repo) in text
    page.write_text('no markers')
    assert tool('render_results', page)[0] == 1
    assert page.read_text() == 'no markers'
