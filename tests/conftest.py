"""What several test files share: the repository on the import path, small models, a small prepared corpus."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
