"""Python imports this first in every tool that the tests start as a process.

MMEngine has yapf lay out the text of a config, five times a run. That takes longer
than all else in the short runs of the tests, so there the text stays as it is.
"""

import sys
from types import ModuleType

for name in ('yapf', 'yapf.yapflib', 'yapf.yapflib.yapf_api'):
    sys.modules[name] = ModuleType(name)
sys.modules['yapf'].__version__ = '0.40.2'
sys.modules['yapf.yapflib.yapf_api'].FormatCode = lambda text, **_: (text, False)
