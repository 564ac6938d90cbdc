"""What several test files share: the repository on the import path, small models, a small prepared corpus."""

import os
import sys
from pathlib import Path

# The models of the tests are small, and the tests already use every core: threads would only wait for each other. Set
# before torch is imported, and inherited by every program that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
