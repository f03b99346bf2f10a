"""Command lines of get_flops.py and render_results.py."""

from mmrest.utils.results import render_table

FLOPS = 'analysis_tools/get_flops.py'
RENDER = 'analysis_tools/render_results.py'


def rows(text):
    lines = [line.split() for line in text.splitlines() if ' G ' in line]
    return {line[0]: line for line in lines}


def test_get_flops(call, tmp_path):
    config, texts = 'mmrest::retinanet/rest_small_fpn_1x.py', []
    for attn_impl in ('dense', 'tiled'):
        option = f'model.backbone.attn_impl={attn_impl}'
        words = (config, '--shape', '90', '100', '--cfg-options', option)
        text = call(FLOPS, *words, cwd=tmp_path)
        assert 'one image of 96x128 (padded from 90x100)' in text
        texts.append(text)
    dense, tiled = map(rows, texts)
    assert list(dense) == ['backbone', 'neck', 'bbox_head', 'total']
    assert dense['backbone'] == tiled['backbone']
    assert dense['total'][3] == '23,401,064'


def test_get_flops_of_other_channels(call, tmp_path):
    config = 'mmrest::semantic_fpn/rest_lite_fpn_80k_ade20k_512x512.py'
    counts = []
    for channels in (1, 3, 4):
        option = f'model.backbone.in_channels={channels}'
        words = (config, '--shape', '64', '64', '--cfg-options', option)
        words += (
            'model.data_preprocessor.mean=[0.0]',
            'model.data_preprocessor.std=[1.0]',
        )
        words += ('model.data_preprocessor.bgr_to_rgb=False',)
        found = rows(call(FLOPS, *words, cwd=tmp_path))['backbone'][3]
        counts.append(int(found.replace(',', '')))
    assert counts[1] - counts[0] == 2 * (counts[2] - counts[1]) == 2 * 9 * 32


def test_get_flops_of_no_config(call, tmp_path):
    config = 'mmrest::mask_rcnn/rest_smal_fpn_1x.py'
    text = call(FLOPS, config, cwd=tmp_path, fails=True)
    assert FLOPS in text and 'rest_small_fpn_1x.py' in text


def test_render_results(call, repo, tmp_path):
    assert call(RENDER, cwd=tmp_path) == render_table(repo) + '\n'
    page = tmp_path / 'README.md'
    page.write_text('a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb\n')
    call(RENDER, page, cwd=tmp_path)
    text = page.read_text()
    assert text.startswith('a\n') and text.endswith('\nb\n') and 'old' not in text
    assert render_table(repo) in text
    page.write_text('no markers')
    call(RENDER, page, cwd=tmp_path, fails=True)
    assert page.read_text() == 'no markers'
