"""tools/analysis_tools/benchmark_exported.py on a tiny detector."""

import shutil

import pytest

pytest.importorskip('onnxruntime', reason='needs the extra [deploy]')

TOOL = 'analysis_tools/benchmark_exported.py'


@pytest.mark.slow
def test_both_ways_are_measured(run, trained, exported, tmp_path):
    """With the file that is there, and a checkpoint that is drawn."""
    config, _ = trained('retinanet')
    file, _ = exported('retinanet', 'rest_lite', '.onnx')
    (tmp_path / 'work').mkdir()
    name = f'{config.parent.name}_{config.stem}.onnx'
    shutil.copy(file, tmp_path / 'work' / name)
    ways = ['--ways', 'PyTorch', 'ONNX Runtime']
    options = ['--shapes', '64x96', '--repeats', '1', '--work-dir', tmp_path / 'work']
    output = run(TOOL, config, *ways, *options, cwd=tmp_path)
    rows = [line.split('|') for line in output.splitlines() if 'MiB' in line]
    assert [row[1].strip() for row in rows] == ways[1:]
    speeds = [float(row[3]) for row in rows]
    assert speeds[0] == 1.0 and speeds[1] > 0
    # a process without torch
    assert int(rows[1][4].split()[0]) < int(rows[0][4].split()[0]) / 2


def test_what_it_refuses(call, trained, tmp_path):
    def fails(*arguments):
        output = call(TOOL, *arguments, cwd=tmp_path, fails=True)
        assert 'Traceback' not in output
        return output

    config, _ = trained('retinanet')
    assert 'a size is HxW' in fails(config, '--shapes', '64')
    assert 'no config none.py' in fails('none.py')
    assert 'is no detector' in fails(trained('classifier')[0])
