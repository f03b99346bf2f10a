"""Which checkpoint ``--resume`` continues from when files are damaged or missing."""

import os

import pytest
import torch
from mmengine.config import Config
from toy_run import ToyModel
from toy_runs import exit_codes, in_processes

from mmrest.checkpoint import (
    CheckpointError,
    check_load_from,
    choose_checkpoint,
    find_latest,
    read_state_dict,
)
from mmrest.launch import choose_start


def save(folder, name, iteration, seed=5):
    folder.mkdir(exist_ok=True)
    weight = torch.arange(5000.0)
    checkpoint = dict(
        meta=dict(iter=iteration, epoch=0, seed=seed),
        state_dict=dict(weight=weight),
        message_hub={},
    )
    torch.save(checkpoint, folder / name)
    return folder / name


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, of which the last is named; the times are no help."""
    for number in (20, 9, 100):
        path = save(tmp_path, f'iter_{number}.pth', number)
        os.utime(path, (10**9 - number, 10**9 - number))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_100.pth'))
    return tmp_path


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b'')


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def zero_a_block(path):
    """As after a power failure: torch would read the zeros as weights."""
    content = bytearray(path.read_bytes())
    content[8192:12288] = bytes(4096)
    path.write_bytes(content)


def delete(path):
    path.unlink()


def replace_by_weights(path):
    torch.save(dict(state_dict=dict(weight=torch.zeros(3))), path)


def drop_message_hub(path):
    """MMEngine would end with a KeyError."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint['message_hub']
    torch.save(checkpoint, path)


DAMAGES = [
    truncate,
    empty,
    zero,
    zero_a_block,
    delete,
    replace_by_weights,
    drop_message_hub,
]


def test_named_one(run):
    found = find_latest(str(run))
    assert found.path == str(run / 'iter_100.pth') and not found.warning
    assert found.seed == 5 and found.iteration == 100


def test_named_one_is_taken_even_if_a_newer_one_exists(run):
    (run / 'last_checkpoint').write_text(str(run / 'iter_20.pth'))
    assert find_latest(str(run)).path == str(run / 'iter_20.pth')


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_newest(run, damage):
    damage(run / 'iter_100.pth')
    found = find_latest(str(run))
    assert found.path == str(run / 'iter_20.pth')
    assert str(run / 'iter_100.pth') in found.warning
    assert str(run / 'iter_20.pth') in found.warning


def test_several_damaged(run):
    for number, damage in ((100, truncate), (20, empty)):
        damage(run / f'iter_{number}.pth')
    found = find_latest(str(run))
    assert found.path == str(run / 'iter_9.pth') and 'iter_20.pth' in found.warning


@pytest.mark.parametrize('damage', DAMAGES)
def test_all_damaged_is_an_error_and_no_new_start(run, damage):
    for number in (9, 20, 100):
        damage(run / f'iter_{number}.pth')
    with pytest.raises(CheckpointError, match='no complete checkpoint') as info:
        find_latest(str(run))
    assert 'iter_100.pth' in str(info.value) and '--work-dir' in str(info.value)


def test_nothing_saved_yet(tmp_path):
    assert find_latest(str(tmp_path)) is None
    assert find_latest(str(tmp_path / 'missing')) is None
    (tmp_path / 'epoch_3.pth.mmrest-unfinished').write_bytes(b'PK')
    replace_by_weights(tmp_path / 'epoch_12.pth')  # somebody's pretrained weights
    assert find_latest(str(tmp_path)) is None


@pytest.mark.parametrize('content', [None, b'', b'\0' * 40])
def test_pointer_is_missing_or_damaged(run, content):
    """As when the process was killed before it wrote the first one."""
    (run / 'last_checkpoint').unlink()
    if content is not None:
        (run / 'last_checkpoint').write_bytes(content)
    found = find_latest(str(run))
    assert found.path == str(run / 'iter_100.pth')
    assert 'names no file' in found.warning


def test_moved_work_folder(run):
    (run / 'last_checkpoint').write_text('/elsewhere/run/iter_20.pth')
    found = find_latest(str(run))
    assert found.path == str(run / 'iter_100.pth')
    assert '/elsewhere/run/iter_20.pth' in found.warning


def test_checkpoints_in_another_folder(run, tmp_path):
    """``out_dir`` of the hook: only the pointer is in the work folder."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    (work_dir / 'last_checkpoint').write_text(str(run / 'iter_100.pth'))
    truncate(run / 'iter_100.pth')
    assert find_latest(str(work_dir)).path == str(run / 'iter_20.pth')


@pytest.mark.parametrize(
    'names', [('epoch_2.pth', 'epoch_10.pth'), ('a7b1.pt', 'a7b2.pt')]
)
def test_other_names(tmp_path, names):
    first, second = (save(tmp_path, name, i) for i, name in enumerate(names))
    (tmp_path / 'last_checkpoint').write_text(str(second))
    truncate(second)
    assert find_latest(str(tmp_path)).path == str(first)


def test_epochs_and_iterations_in_one_folder(tmp_path):
    """The progress in the files decides between the two kinds."""
    save(tmp_path, 'epoch_3.pth', 300)
    save(tmp_path, 'iter_250.pth', 250)
    assert find_latest(str(tmp_path)).path == str(tmp_path / 'epoch_3.pth')


def test_refused_content_is_no_damage(run):
    """A payload is not passed over silently."""
    saved = torch.load(run / 'iter_100.pth')
    torch.save(dict(saved, extra=os.system), run / 'iter_100.pth')
    with pytest.raises(CheckpointError, match='refuses'):
        find_latest(str(run))


def test_seed_of_the_run_is_kept(run):
    """Otherwise the images come in another order after each restart."""
    cfg = Config(dict(work_dir=str(run), load_from='start.pth'))
    assert choose_start(cfg, 'auto').warning == ''
    assert cfg.resume and cfg.load_from == str(run / 'iter_100.pth')
    assert cfg.randomness.seed == 5
    cfg = Config(dict(work_dir=str(run), randomness=dict(seed=8, deterministic=True)))
    choose_start(cfg, str(run / 'iter_9.pth'))
    assert cfg.randomness == dict(seed=8, deterministic=True)
    assert cfg.load_from == str(run / 'iter_9.pth')


def test_first_start_and_config_without_resume(tmp_path, run):
    cfg = Config(dict(work_dir=str(tmp_path / 'new'), load_from='start.pth'))
    assert choose_start(cfg, 'auto') is None
    assert not cfg.resume and cfg.load_from == 'start.pth'
    assert choose_start(cfg, None) is None and cfg.load_from == 'start.pth'
    cfg = Config(dict(work_dir=str(run), resume=True, load_from=None))
    choose_start(cfg, None)
    assert cfg.load_from == str(run / 'iter_100.pth')


@pytest.fixture
def toy(tmp_path):
    """A checkpoint of the toy model in a work folder."""
    work_dir = tmp_path / 'toy'
    work_dir.mkdir()
    checkpoint = dict(
        meta=dict(iter=7, epoch=1, seed=3),
        state_dict=ToyModel().state_dict(),
        message_hub={},
    )
    torch.save(checkpoint, work_dir / 'iter_7.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_7.pth'))
    return work_dir


@pytest.mark.parametrize('resume', ['auto', 'iter_7.pth'])
def test_the_file_is_read_once(toy, monkeypatch, resume):
    reads, load = [], torch.load
    monkeypatch.setattr(
        torch, 'load', lambda *args, **kw: reads.append(args) or load(*args, **kw)
    )
    resume = resume if resume == 'auto' else toy / resume
    latest = choose_checkpoint(str(toy), resume)
    check_load_from(ToyModel(), latest)
    assert len(reads) == 1 and latest.path == str(toy / 'iter_7.pth')
    with pytest.raises(CheckpointError, match=r'layer.weight \(4, 3\) instead of \(5'):
        check_load_from(ToyModel(width=5), latest)


def test_nan_in_the_chosen_one(toy):
    """It is not passed over for an older one."""
    checkpoint = torch.load(toy / 'iter_7.pth')
    checkpoint['state_dict']['layer.bias'][1] = float('nan')
    torch.save(checkpoint, toy / 'iter_7.pth')
    with pytest.raises(CheckpointError, match='NaN .*layer.bias'):
        check_load_from(ToyModel(), choose_checkpoint(str(toy)))


def test_nothing_to_choose(tmp_path):
    assert choose_checkpoint(str(tmp_path)) is None


def test_a_sharded_checkpoint_is_believed(tmp_path):
    (tmp_path / 'sharded').mkdir()
    (tmp_path / 'sharded' / '__0_0.distcp').write_bytes(b'x')
    latest = choose_checkpoint(str(tmp_path), str(tmp_path / 'sharded'))
    assert latest.path == str(tmp_path / 'sharded') and latest.iteration == -1
    check_load_from(ToyModel(), latest)


def test_the_folder_of_a_run_is_no_checkpoint(toy):
    (toy / 'last_checkpoint').write_text(str(toy / 'iter_7.pth'))
    with pytest.raises(CheckpointError, match='folder of a run.*--work-dir .* --res'):
        choose_checkpoint(str(toy), str(toy))


def test_an_address_is_read_when_the_model_is_there(server, toy, tmp_path):
    url, root = server
    (toy / 'iter_7.pth').rename(root / 'iter_7.pth')
    latest = choose_checkpoint(str(tmp_path), f'{url}/iter_7.pth')
    assert latest.path == f'{url}/iter_7.pth' and latest.iteration == -1
    check_load_from(ToyModel(), latest)
    with pytest.raises(CheckpointError, match='instead of'):
        check_load_from(ToyModel(width=5), latest)


def test_a_process_that_sees_another_file(toy, monkeypatch):
    monkeypatch.setattr(
        'mmrest.checkpoint.resume.all_gather_object', lambda size: [size, None]
    )
    with pytest.raises(CheckpointError, match=r'process 0: \d+ bytes, process 1: miss'):
        choose_checkpoint(str(toy))


def test_two_processes(server, toy, tmp_path):
    """The first one downloads and reads; an error is raised by both."""
    url, root = server
    torch.save({'model': ToyModel().state_dict()}, root / 'rest.pth')
    lost = tmp_path / 'lost'
    lost.mkdir()
    (lost / 'iter_1.pth').write_bytes(b'')

    def check(rank):
        reads, load = [], torch.load
        torch.load = lambda *args, **kw: reads.append(args) or load(*args, **kw)
        with pytest.raises(CheckpointError, match='HTTP Error 404'):
            read_state_dict(f'{url}/none.pth')
        assert len(read_state_dict(f'{url}/rest.pth')) == 7
        reads.clear()
        latest = choose_checkpoint(str(toy))
        check_load_from(ToyModel(), latest)
        assert (latest.path, latest.seed) == (f'{toy}/iter_7.pth', 3)
        assert len(reads) == 1 - rank
        with pytest.raises(CheckpointError, match=r'instead of \(9, 3\)'):
            check_load_from(ToyModel(width=9), choose_checkpoint(str(toy)))
        with pytest.raises(CheckpointError, match='no complete checkpoint'):
            choose_checkpoint(str(lost))

    assert exit_codes(in_processes(check, tmp_path)) == [0, 0]


def test_path_of_weights_alone(run):
    replace_by_weights(run / 'iter_9.pth')
    cfg = Config(dict(work_dir=str(run)))
    with pytest.raises(CheckpointError, match='meta is missing.*load_from=PATH'):
        choose_start(cfg, str(run / 'iter_9.pth'))
