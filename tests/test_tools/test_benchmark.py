"""The benchmark: counts, measurements in real processes, ratios and pictures."""

import json
import sys
from itertools import count

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from PIL import Image

from mmrest.utils.complexity import HANDLES


@pytest.fixture(scope='module', autouse=True)
def _tools_on_path(repo):
    folder = str(repo / 'tools' / 'analysis_tools')
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.mark.parametrize('arch', ['lite', 'base', 'v2-tiny', 'v2-large'])
@pytest.mark.parametrize('shape', [(64, 96), (75, 130)])
def test_macs_are_those_of_a_traced_model(arch, shape):
    from benchmark_subjects import Subject, build_model, rest_macs

    model = build_model(Subject('', arch=arch)).eval()
    analyzer = FlopAnalyzer(model, (torch.zeros(1, 3, *shape),))
    analyzer.set_op_handle(**HANDLES).unsupported_ops_warnings(False)
    analyzer.tracer_warnings('none').uncalled_modules_warnings(False)
    with torch.no_grad():
        traced = analyzer.by_operator()
    products = sum(n for name, n in traced.items() if 'norm' not in name)
    assert sum(rest_macs(arch, shape)) == products


def test_terms_grow_with_the_area_and_its_square():
    from benchmark_subjects import rest_macs

    small, large = rest_macs('base', (800, 1344)), rest_macs('base', (1600, 2688))
    # 25 x 42 keys become 50 x 84: no rounding disturbs the powers
    assert large.linear == 4 * small.linear
    assert large.quadratic == 16 * small.quadratic


@pytest.fixture
def rows():
    from benchmark_report import Row
    from benchmark_subjects import list_subjects

    def make(**options):
        subjects = list_subjects(['base'], ['float32'], matmul=1000, **options)
        shape, mib = (800, 1344), 2**20
        return [
            Row(subject, shape, 1, False, memory=mib * n, seconds=[n, n + 1, n + 5])
            for n, subject in zip(count(1), subjects)
        ]

    return make


def test_ratios_compare_auto_with_dense_and_peers(rows):
    from benchmark_report import ratios

    found = ratios(rows(peers=True))
    assert {ratio['name'] for ratio in found} == {'ResT-base auto'}
    assert [ratio['than'] for ratio in found] == [
        'ResT-base dense', 'PVT-Tiny', 'PVT-Small', 'Swin-T', 'Swin-S',
        'ResNet-50', 'ResNet-101',
    ]  # fmt: skip
    # medians 2 and 3 seconds, 1 and 2 MiB
    assert found[0]['faster'] == pytest.approx(2 / 3)
    assert found[0]['memory'] == 2


def test_failures_take_no_part_in_ratios(rows):
    from benchmark_report import ratios, table

    measured = rows()
    measured[0].failure, measured[0].seconds = 'out of memory', []
    assert ratios(measured) == []
    assert 'out of memory' in table(measured)


def test_table_gives_the_share_of_the_product(rows):
    from benchmark_report import table

    dense, auto, product = rows()
    lines = table([dense, auto, product]).splitlines()
    rate = auto.subject.macs(auto.shape) / auto.time / (1000**3 / product.time)
    assert lines[2].split()[-1] == f'{rate:.0%}'
    assert lines[2].split()[3:7] == ['3000.0', '(2000.0', '-', '7000.0)']


def test_time_is_for_one_image(rows):
    _, auto, product = rows()
    auto.batch = product.batch = 2
    assert auto.time == 1.5
    assert product.time == 4


@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
def test_measures_in_processes(run, tmp_path, train):
    options = ['--train', '--with-cp'] if train else ['--matmul', '128']
    arguments = '--arch lite --shape 64 96 --batch 2 --repeats 2 --threads 1 --device'
    output = run(
        'analysis_tools/benchmark.py', *arguments.split(), 'cpu', *options,
        '--json', 'new/out.json', cwd=tmp_path,
    )  # fmt: skip
    assert f'{"forward + backward" if train else "forward"}, 64x96, batch 2' in output
    result = json.loads((tmp_path / 'new' / 'out.json').read_text())
    names = [row['name'] for row in result['rows']]
    last = 'ResT-lite auto, with_cp' if train else '128x128 product'
    assert names == ['ResT-lite dense', 'ResT-lite auto', last]
    assert all(len(row['seconds']) == 2 for row in result['rows'])
    assert all(row['failure'] is None for row in result['rows'])
    if sys.platform == 'linux':
        assert all(row['memory'] > 2**20 for row in result['rows'][:2])
    assert [ratio['than'] for ratio in result['ratios']][0] == 'ResT-lite dense'


@pytest.mark.slow
def test_sweep_goes_on_without_what_failed(run, tmp_path):
    """The dense maps do not fit into the limit at the second size of three."""
    output = run(
        'analysis_tools/benchmark.py', '--arch', 'lite', '--sweep', '64x96',
        '1280x1280', '64x64', '--memory-limit', '1.5', '--repeats', '1', '--warmup',
        '1', '--threads', '1', '--device', 'cpu', '--matmul', '0', '--plot', 'images',
        '--json', 'out.json', cwd=tmp_path,
    )  # fmt: skip
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    found = [(row['name'][10:], row['shape'][0], row['failure']) for row in rows]
    assert found == [
        ('dense', 64, None),
        ('auto', 64, None),
        ('dense', 1280, 'out of memory'),
        ('auto', 1280, None),
        ('auto', 64, None),
    ]
    assert 'ResT-lite auto, float32, 64x96 to 1280x1280: time x' in output
    for name in ('benchmark_time.png', 'benchmark_memory.png'):
        with Image.open(tmp_path / 'images' / name) as picture:
            assert picture.width > 500 and len(set(picture.convert('L').tobytes())) > 9


@pytest.mark.parametrize('peer', ['PVT-Tiny', 'Swin-T', 'ResNet-50'])
def test_peers_are_trained_whole(peer):
    from benchmark_subjects import Subject, build_model

    model = build_model(Subject(peer, peer=peer))
    model.train()
    assert [out.shape[-1] for out in model(torch.zeros(1, 3, 64, 96))] == [24, 12, 6, 3]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_reason_of_a_failure():
    from benchmark_subjects import Subject
    from benchmark_worker import Settings, SubjectFailed, Worker

    worker = Worker(Subject('odd', arch='huge'), (64, 96), Settings())
    with pytest.raises(SubjectFailed, match="ValueError: arch must be one of 'lite'"):
        worker.peak_memory()
    worker.stop()


def test_death_of_a_process_is_reported():
    from benchmark_subjects import Subject
    from benchmark_worker import Settings, SubjectFailed, Worker

    worker = Worker(Subject('product', matmul=64), (64, 96), Settings())
    worker.peak_memory()
    worker.process.kill()
    with pytest.raises(SubjectFailed, match='killed, probably out of memory'):
        for _ in range(3):  # a send into the pipe may still succeed
            worker.time_step()
    worker.stop()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--with-cp', 'add --train'),
        ('--plot images', 'add --sweep'),
        ('--shape 64 96 --sweep', 'give one of them'),
        ('--sweep 64', 'a size is HxW'),
        ('--sweep 0x64', 'above 0'),
        ('--repeats 0', 'above 0'),
        ('--memory-limit 0', 'above 0'),
        ('--json here.json', 'here.json exists'),
    ],
)
def test_command_lines_that_are_refused(
    options, message, monkeypatch, tmp_path, capsys
):
    import benchmark

    (tmp_path / 'here.json').write_text('{}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *options.split()])
    with pytest.raises(SystemExit):
        benchmark.parse_args()
    assert message in capsys.readouterr().err
