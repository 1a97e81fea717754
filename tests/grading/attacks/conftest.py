"""The attack suite: its data lies beside the tests and is imported as `grading_attacks`."""

import sys
import types
from pathlib import Path

_package = types.ModuleType("grading_attacks")
_package.__path__ = [str(Path(__file__).parent)]
sys.modules.setdefault("grading_attacks", _package)
