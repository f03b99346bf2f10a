"""What each process of a group makes of checkpoints; run with torchrun by the tests."""

import sys

import torch
from mmengine.dist import get_rank
from toy_run import ToyModel

from mmrest.checkpoint import (
    CheckpointError,
    check_load_from,
    choose_checkpoint,
    read_state_dict,
)
from mmrest.launch import end_process_group


def main():
    """Write what came of each of the actions, and how often a file was read."""
    folder, url, work_dir, lost = sys.argv[1:]
    torch.hub.set_dir(folder)
    torch.distributed.init_process_group('gloo')
    reads, load = [], torch.load

    def counted(path, *args, **kwargs):
        reads.append(path)
        return load(path, *args, **kwargs)

    torch.load = counted

    def resume():
        latest = choose_checkpoint(work_dir)
        check_load_from(ToyModel(), latest)
        return f'{latest.path} {latest.seed}'

    def other_width():
        check_load_from(ToyModel(width=9), choose_checkpoint(work_dir))

    for action in (
        lambda: len(read_state_dict(f'{url}/none.pth')),
        lambda: len(read_state_dict(f'{url}/rest.pth')),
        reads.clear,
        resume,
        lambda: len(reads),
        other_width,
        lambda: choose_checkpoint(lost),
    ):
        try:
            result = action()
        except CheckpointError as error:
            result = str(error)
        with open(f'{folder}/{get_rank()}.txt', 'a') as file:
            file.write(f'{result}\n')


if __name__ == '__main__':
    main()
    end_process_group()  # gloo's threads at times abort a process that ends itself
