"""What several test files share: the repository on the import path, one thread, a prepared corpus."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

# The tests already use every core, and their models are small: threads would only wait for each other. Set before torch
# is imported, and inherited by every program that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


SLOW_FILES = ["test_train.py", "test_preprocess.py", "test_chat.py", "test_torture.py", "test_model.py"]


def pytest_collection_modifyitems(items):
    """The longest files first, so that the processes end at about the same time."""
    order = {name: i for i, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture
def signals():
    """A run in this process takes the signals over; give them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared corpus: a few hundred stories of the built-in grammar."""
    import preprocess  # not at collection: most test files do without
    folder = tmp_path_factory.mktemp("corpus") / "data"
    with mock.patch.multiple(preprocess, TRAIN_STORIES=300, VAL_STORIES=300):
        result = CliRunner().invoke(preprocess.main, ["prepare-dataset", "--dataset", "sample", "--data-dir", str(folder)])
    assert result.exit_code == 0, result.output
    return folder
