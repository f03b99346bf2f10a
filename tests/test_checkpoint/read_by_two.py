"""Read a URL in each process of a group; run with torchrun by the tests."""

import sys

import torch
from mmengine.dist import get_rank

from mmrest.checkpoint import CheckpointError, read_state_dict


def main():
    """Print what each process makes of each URL."""
    folder, *urls = sys.argv[1:]
    torch.hub.set_dir(folder)
    torch.distributed.init_process_group('gloo')
    for url in urls:
        try:
            result = len(read_state_dict(url))
        except CheckpointError as error:
            result = str(error)
        with open(f'{folder}/{get_rank()}.txt', 'a') as file:
            file.write(f'{result}\n')


if __name__ == '__main__':
    main()
