"""The programs on a fake accelerator, which is neither CUDA nor the CPU, as are xpu and mps.

It is registered in a separate process. Its tensors lie in CPU memory, and a fallback runs every operator on the CPU.
"""

import ctypes
import importlib
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from torch.utils import backend_registration

register_backend = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
pytestmark = pytest.mark.skipif(register_backend is None, reason="this torch has no device backends in Python")
CPU, FAKE = 1, 12  # device types in DLPack; torch maps the second to PrivateUse1
SMALL = ["--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--intermediate-size", 32, "--block-size", 32, "--batch-size",
         "auto", "--tokens-per-iter", 128, "--eval-tokens", 100, "--final-eval-tokens", 100, "--sample-tokens", 5]
libraries = [torch.library.Library(name, "IMPL") for name in ("_", "aten")]  # a registration ends with its library
generators = set()  # addresses of those made for the fake device
capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))


def relabelled(tensor, device_type):
    """The same memory as a tensor on another device, by a DLPack capsule whose device type is overwritten."""
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(capsule_pointer(capsule, b"dltensor") + 8).value = device_type
    return torch._C._from_dlpack(capsule)


def mapped(function, x):
    return type(x)(mapped(function, item) for item in x) if isinstance(x, list | tuple) else function(x)


def run_on_cpu(op, *args, **kwargs):
    """Any operator of the fake device. As on a real one, it fails for tensors and generators of the CPU."""
    originals = {}  # {id of a CPU tensor: the fake tensor with the same memory}

    def enter(x):
        if isinstance(x, torch.Tensor) and x.device.type == "fake":
            # memory from DLPack cannot grow, and some operators resize an empty output
            on_cpu = relabelled(x, CPU) if x.numel() else torch.empty(x.shape, dtype=x.dtype)
            originals[id(on_cpu)] = x
            return on_cpu
        if isinstance(x, torch.Tensor) and x.dim() or isinstance(x, torch._C.Generator) and x._cdata not in generators:
            raise RuntimeError(f"{op} on the fake device got a {type(x)} of the CPU")
        return torch.device("cpu") if isinstance(x, torch.device) else x

    def leave(x):
        if id(x) not in originals:
            return relabelled(x, FAKE) if isinstance(x, torch.Tensor) else x
        if x.shape != originals[id(x)].shape:
            originals[id(x)].data = relabelled(x, FAKE)
        return originals[id(x)]

    with torch.inference_mode(False):  # a view of an ordinary tensor must be an ordinary one
        args, kwargs = mapped(enter, args), {name: mapped(enter, x) for name, x in kwargs.items()}
        return mapped(leave, op(*args, **kwargs))


def copy(source, target, non_blocking=False):
    relabelled(target, CPU).copy_(relabelled(source, CPU))
    return target


def storage_to_cpu(storage):
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).clone().untyped_storage()


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        (generators.add if torch.device(device).type == "fake" else generators.discard)(generator._cdata)
        return generator


def register_fake_device():
    import torch._dynamo  # optimizers import it, which fails once torch.cuda is patched
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # activation checkpointing asks for it
    register_backend("fake", module)
    libraries[0].fallback(run_on_cpu, "PrivateUse1")
    libraries[1].impl("_copy_from", copy, "PrivateUse1")
    torch.Generator, torch.UntypedStorage.cpu, torch.accelerator.synchronize = Generator, storage_to_cpu, torch.device
    refuse = Mock(side_effect=AssertionError("torch.cuda was called for another device"))
    for path in ROOT.glob("*.py"):
        for name in {*re.findall(r"torch\.cuda\.(\w+)", path.read_text(encoding="utf-8"))} - {"is_available"}:
            setattr(torch.cuda, name, refuse)
    preprocess = importlib.import_module("preprocess")
    preprocess.TRAIN_STORIES, preprocess.VAL_STORIES = 1000, 50
    importlib.import_module("train").MEASURE_SECONDS = 0


def invoke(script, words):
    result = CliRunner().invoke(importlib.import_module(script).main, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, *words) in a folder with a corpus: its standard output."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), register_fake_device) as process:
        def run(script, *words):
            return process.submit(invoke, script, words).result()

        process.submit(os.chdir, tmp_path_factory.mktemp("devices"))
        run("preprocess", "prepare-dataset", "--dataset", "sample", "--word-prompts", 0.8)
        yield run


def test_training_on_another_accelerator_computes_what_it_does_on_the_cpu(run):
    """With evaluations, a story, saves and --resume."""
    outputs = [run("train", *SMALL, "--out-dir", device, "--max-iters", 2, "--device", device)
               + run("train", "--resume", "--out-dir", device, "--max-iters", 4)
               for device in ("fake", "cpu")]
    losses = [[float(loss) for loss in re.findall(r"loss (\d\.\d+)", output)] for output in outputs]
    assert "Device: fake:0" in outputs[0]
    assert losses[0] and losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_plan_and_minutes_work_on_another_accelerator(run):
    assert "Device: fake:0" in run("train", *SMALL, "--plan")
    assert "Finished" in run("train", *SMALL, "--out-dir", "timed", "--minutes", 0.002, "--activation-checkpointing")


def test_a_model_writes_on_another_accelerator_what_it_does_on_the_cpu(run):
    """In chat.py, one story and several. An iteration of reinforce.py works too."""
    run("train", *SMALL, "--out-dir", "out", "--max-iters", 1)
    for count in (1, 3):
        chat = ["chat", "--prompt", "Once", "--num-samples", count, "--max-new-tokens", 40, "--seed", 1]
        assert run(*chat, "--device", "fake") == run(*chat, "--device", "cpu", "--dtype", "float32") != ""
    assert "iter 1/1" in run("reinforce", "--init-from", "out/best.pt", "--out-dir", "reinforced", "--max-iters", 1,
                             "--prompts-per-iter", 1, "--group-size", 2, "--eval-prompts", 1, "--eval-tokens", 100)
