"""Makes the demo's modules importable, as for a script in their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'projects' / 'demo'))
