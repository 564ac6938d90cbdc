"""What several test files share: the repository on the import path, one thread, a corpus, damaged bytes."""

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import strategies as st

# The models of the tests are small, and the tests already use every core: threads would only wait for each other. Set
# before torch is imported, and inherited by every program that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared corpus: a few hundred stories of the built-in grammar."""
    import preprocess
    folder = tmp_path_factory.mktemp("corpus") / "data"
    result = CliRunner().invoke(preprocess.main, ["prepare-dataset", "--dataset", "sample", "--num-files", "1",
                                                  "--sample-rate", "0.5", "--data-dir", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@st.composite
def damages(draw):
    """A function from bytes to other bytes: cut, longer, or with up to four bytes changed, near an end more often."""
    kind = draw(st.sampled_from(["cut", "longer", "bytes", "bytes", "bytes"]))
    if kind == "longer":
        more = draw(st.binary(min_size=1, max_size=100))
        return lambda data: data + more
    share = draw(st.floats(0, 1, exclude_max=True))
    if kind == "cut":
        return lambda data: data[:int(share * len(data))]
    changes = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([1, 0, -1]),
                                      st.integers(1, 255)), min_size=1, max_size=4))

    def change(data):
        data = bytearray(data)
        for share, end, bits in changes:
            at = int(share * (min(1000, len(data)) if end else len(data)))
            data[at if end >= 0 else -1 - at] ^= bits
        return bytes(data)
    return change
