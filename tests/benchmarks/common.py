"""What the benchmarks share: a process for each measurement, our runs, other repositories' models, tables and JSON."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHAPE = dict(block_size=256, n_layer=6, n_head=6, n_embd=384)
TINY_SHAPE = dict(block_size=64, n_layer=2, n_head=2, n_embd=32)  # --tiny: shows on a CPU that the script works


# A measurement in a process of its own: clean memory, a clean compiler, and a crash that is only a row.

def start(main, worker):
    """The script's entry: the command line for a person, or `--worker JOB.json` for a process started by measure()."""
    if sys.argv[1:2] != ["--worker"]:
        return main()
    path = Path(sys.argv[2])
    result = guarded(worker, json.loads(path.read_text(encoding="utf-8")))
    path.with_name("result.json").write_text(json.dumps(result), encoding="utf-8")


def guarded(worker, job):
    """The worker's dict; {"error": "does not fit"} where memory ran out, inside a compiler or outside."""
    import torch
    hold(job.get("memory_gib"))
    torch.set_float32_matmul_precision("high")
    try:
        result = worker(job)
    except Exception as error:
        if "out of memory" not in str(error).lower():
            raise
        result = dict(error="does not fit")
    return result | machine()


def measure(script, job, timeout, cache_dir):
    """What `worker(job)` of the script returns, from a new process; {"error": ...} where it died or took too long."""
    with tempfile.TemporaryDirectory() as folder:
        path, result, output = (Path(folder) / name for name in ("job.json", "result.json", "output.txt"))
        path.write_text(json.dumps(job), encoding="utf-8")
        # A file, not a pipe: the compiler's helper processes may hold a pipe open after the end.
        with open(output, "w") as log:
            code = run_process([sys.executable, script, "--worker", str(path)], log, timeout, cache_dir)
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        return dict(error=f"stopped after {timeout:.0f} s" if code is None else last_line(output))


def run_process(command, log, timeout, cache_dir=None, **options):
    """Exit status of a command whose output goes to the open file `log`; None if it ran past `timeout` seconds."""
    env = os.environ | (dict(TORCHINDUCTOR_CACHE_DIR=str(cache_dir)) if cache_dir else {})
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, **options)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.wait()


def last_line(path):
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it died without a word"


def hold(gib):
    """Keep this process to `gib` GiB of the card, as if the card were that small."""
    import torch
    if gib and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(memory_fraction(gib))


def memory_fraction(gib):
    import torch
    return min(1.0, gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def peak_mib():
    """Most memory that tensors held so far, in MiB; None without a card."""
    import torch
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def synchronize():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine():
    import torch
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return dict(device=name, torch=torch.__version__)


# Our own runs.

def make_run(flags, out_dir):
    """(Run, Log) of train.py from its command-line flags. It saves no checkpoints and says nothing."""
    import preprocess
    import train
    given = train.main.make_context("train.py", [*flags, "--out-dir", str(out_dir)]).params
    given = {name: value for name, value in given.items() if value is not None}
    preset = given.pop("preset", "rtx3050")
    corpus = preprocess.open_corpus(given["data_dir"])
    model_config, config = train.fresh_settings(preset, given, corpus)
    run = train.Run(preset, model_config, replace(config, out_dir=str(out_dir)), corpus)
    run.save = run.save_best = lambda: None
    log = train.Log(Path(out_dir) / "metrics.jsonl", run.config, run.progress)
    log.say = lambda text: print(text, file=sys.stderr)
    run.prepare_batches(log)
    return run, log


def iterate(run, log):
    """An iteration as train.py makes it between two lines of its log: the outcome of the one before is taken in."""
    import train
    run.optimizer.set_share(train.learning_rate_share(run.progress.iter, run.config))
    run.iteration(log)
    run.progress.iter += 1
    run.settle(under_way=1)


def shape_flags(tiny):
    """train.py's flags for the size of model that every code gets."""
    shape = TINY_SHAPE | dict(intermediate_size=64) if tiny else SHAPE
    return [word for name, value in shape.items() for word in (f"--{name.replace('_', '-')}", str(value))]


# Other repositories: their models and their settings, our data and clock.

def load_peer(name, folder):
    """model.py of a checkout, beside ours: registered as NAME_model, where the compiler looks for its globals."""
    folder = Path(folder)
    ours = sys.modules.get("config")
    if (folder / "config.py").exists():
        sys.modules["config"] = load_file(f"{name}_config", folder / "config.py")
    try:
        return load_file(f"{name}_model", folder / "model.py")
    finally:
        sys.modules.pop("config", None)
        if ours:
            sys.modules["config"] = ours


def load_file(name, path):
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give --{name.split('_')[0]} the folder of a checkout")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def peer_settings(name, folder):
    """A peer's own values: train.py's for nanoGPT, with its config for this size over them as nanogpt_char."""
    folder = Path(folder)
    if name == "smolgpt":
        config = load_file("smolgpt_config", folder / "config.py")
        values = asdict(config.GPTConfig()) | asdict(config.TrainingConfig())
    else:
        values = assigned(folder / "train.py")
        if name == "nanogpt_char":
            values |= assigned(folder / "config" / "train_shakespeare_char.py")
    values["tokens_per_iter"] = values["gradient_accumulation_steps"] * values["batch_size"] * values["block_size"]
    names = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "weight_decay", "beta1", "beta2",
             "grad_clip", "dropout", "tokens_per_iter")
    return {key: values[key] for key in names}


def assigned(path):
    """The names that a script sets to plain values at its top level; nothing of it runs."""
    values = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if not any(isinstance(part, ast.Name | ast.Call | ast.Attribute) for part in ast.walk(node.value)):
                values[node.targets[0].id] = eval(compile(ast.Expression(node.value), str(path), "eval"))
    return values


class Peer:
    """Another repository's model and optimizer in the step that nanoGPT and smolGPT share.

    Autocast, loss scaling for float16, clipping, AdamW as their configure_optimizers makes it. The next batch is read
    after each forward pass, from memory and in one gather, which is no slower than what their loaders do.
    """

    def __init__(self, name, folder, corpus, shape, settings, batch_size, dtype, compiled):
        import numpy as np
        import torch

        import train
        self.device = train.choose_device()
        self.dtype, self.settings, self.block_size = dtype, settings, shape["block_size"]
        self.batch_size = batch_size = max(1, min(batch_size, settings["tokens_per_iter"] // self.block_size))
        self.count = max(1, round(settings["tokens_per_iter"] / (batch_size * self.block_size)))
        self.tokens_per_iter = self.count * batch_size * self.block_size
        self.data = np.concatenate(corpus.train.shards)
        torch.manual_seed(1337)
        self.model = build_peer(name, folder, shape, corpus.tokenizer.vocab_size, settings["dropout"]).to(self.device)
        self.optimizer = self.model.configure_optimizers(
            settings["weight_decay"], settings["learning_rate"], (settings["beta1"], settings["beta2"]),
            self.device.type)
        self.scaler = train.make_scaler(self.device, dtype)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.batch = self.get_batch()

    def get_batch(self):
        """(x, y) of shape (batch_size, block_size) at random places of the training stream."""
        import numpy as np
        import torch

        from train import to_device
        starts = torch.randint(len(self.data) - self.block_size, (self.batch_size,)).numpy()
        rows = self.data[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return tuple(to_device(part.copy(), self.device) for part in (rows[:, :-1], rows[:, 1:]))

    def iteration(self):
        import torch

        from model import autocast
        for _ in range(self.count):
            with autocast(self.device, self.dtype):
                _, loss = self.forward(*self.batch)
            self.batch = self.get_batch()
            self.scaler.scale(loss / self.count).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["grad_clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


def build_peer(name, folder, shape, vocab_size, dropout):
    module = load_peer(name, folder)
    values = dict(shape, vocab_size=vocab_size, dropout=dropout, bias=False)
    if name == "smolgpt":
        values["n_embed"] = values.pop("n_embd")
    return module.GPT(module.GPTConfig(**values))


# Deadlines, tables, JSON.

class Clock:
    """Seconds since the script began, and whether another measurement still fits before the deadline."""

    def __init__(self, deadline):
        self.began, self.deadline, self.longest = time.monotonic(), deadline, 0.0

    def left(self):
        return self.deadline - (time.monotonic() - self.began) if self.deadline else 3600.0

    def timed(self, function, *arguments):
        """The function's dict with wall_seconds added; {"error": ...} at once if it would likely pass the deadline."""
        if self.left() < min(self.longest, 30.0):
            return dict(error="not started: the deadline is near")
        started = time.monotonic()
        result = function(*arguments)
        took = time.monotonic() - started
        self.longest = max(self.longest, took)
        return result | dict(wall_seconds=round(took, 1))


def print_row(cells, widths):
    """One line of a table, at once: the first column to the left, the others to the right; None is a dash."""
    texts = ["-" if cell is None else str(cell) for cell in cells]
    line = "  ".join(text.ljust(w) if at == 0 else text.rjust(w) for at, (text, w) in enumerate(zip(texts, widths)))
    print(line.rstrip(), flush=True)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path, **contents):
    """After every row, so that a stop loses nothing."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
