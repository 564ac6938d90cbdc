"""Train a GPT on the corpus that preprocess.py prepared.

    python train.py                                      # the default model, on one GPU
    python train.py --resume                             # continue after Ctrl-C, a kill or a power cut
    torchrun --standalone --nproc-per-node=2 train.py    # the same iterations on two GPUs
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds that importing torch takes: no traceback

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import (CONTEXT_SETTINGS, IGNORE_INDEX, PRESETS, Command, GPTConfig, SampleConfig, TrainConfig, UserError,
                    atomic_write, flag, folder_lock, only_fields, quoted, refuse_without_effect, setting_options,
                    short_message, wrapped)
from data import CONTROL_CHARACTERS, Corpus, TrainLoader, Validation, prepare_command, write_json
from model import (GPT, TrainingLoss, autocast, choose_device, choose_dtype, cuda_hint, load_checkpoint, move_weights,
                   out_of_memory_advice, save_checkpoint)

# Settings that may change with --resume; all others come from the checkpoint.
RESUME_MAY_CHANGE = {"data_dir", "out_dir", "teacher", "hours", "max_iters", "batch_size", "device", "dtype", "compile",
                     "activation_checkpointing", "log_interval", "eval_interval", "final_eval_tokens", "sample_tokens",
                     "save_minutes"}
MANY_EPOCHS = 20            # beyond these a model of this size overfits
FEW_ITERS = 100             # a text that fills fewer is better cut into smaller ones
COMPILE_MIN_ITERS = 500     # shorter runs do not regain the half minute that compiling takes
MAX_CONSECUTIVE_SKIPS = 30
MEASURE_SECONDS = 2         # enough to tell a speed
LONG_FLOPS = 1e15           # runs of more than these floating-point operations could take a day on a slow device
LONG_HOURS = 24             # before one that does, other commands are suggested

# torchrun starts one process per GPU and numbers them; without it there is one.
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def print0(text):
    """Print in the first process only, above the progress bar."""
    if RANK == 0:
        tqdm.write(wrapped(text, sys.stdout), file=sys.stdout)
        sys.stdout.flush()


# -----------------------------------------------------------------------------
# Optimizer

def orthogonalize(x):
    """The nearest semi-orthogonal matrix to each of x (N, rows, cols), roughly: 5 quintic Newton-Schulz steps.

    Coefficients of Keller Jordan (2024): singular values end within about 0.7 to 1.2, which is enough for Muon.
    """
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


def muon_update(grad, momentum, beta, apply, dtype):
    """Orthogonalised Nesterov momentum for matrices (N, rows, cols); where `apply` is 0, nothing changes."""
    grad = grad.where(apply > 0, 0.0)  # infinity times 0 is not a number
    momentum.lerp_(grad, (1 - beta) * apply)
    return apply * orthogonalize(grad.lerp(momentum, beta).to(dtype)).to(grad.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon (Jordan et al. 2024) for groups with a `shape`: matrices of equal shape, updated as one batch.

    A fused matrix counts as its parts (queries, keys, values; gate, up). Where `found_inf` is 1 a step changes nothing;
    that is decided on the device, as in torch's fused AdamW, so there is no host sync.
    """

    update = staticmethod(muon_update)  # train() compiles it together with the model

    @torch.no_grad()
    def step(self):
        apply = 1 - self.found_inf
        for group in self.param_groups:
            if "shape" in group:
                params, (rows, cols) = group["params"], group["shape"]
                grads = torch.cat([p.grad.view(-1, rows, cols) for p in params])  # (N, rows, cols)
                state = self.state[params[0]]
                if not state:  # AdamW expects a step when it loads a state
                    state["step"], state["momentum"] = grads.new_zeros(()), torch.zeros_like(grads)
                # bfloat16 has the range of float32, which the iteration needs; float16 has not.
                ampere = grads.is_cuda and torch.cuda.get_device_capability(grads.device)[0] >= 8
                update = self.update(grads, state["momentum"], group["momentum"], apply,
                                     torch.bfloat16 if ampere else torch.float32)
                torch._foreach_mul_(params, 1 - apply * (group["lr"] * group["weight_decay"]))
                updates = [u.reshape(p.shape) for p, u in zip(params, update.split([len(p) // rows for p in params]))]
                torch._foreach_sub_(params, updates, alpha=group["lr"] * max(1, rows / cols) ** 0.5)
                for p in params:
                    p.grad = None  # AdamW skips it
        super().step()


def configure_optimizer(model, config):
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for embeddings and norms."""
    muon, by_shape, decayed, others = config.optimizer == "muon", {}, [], []
    for name, p in model.named_parameters():
        if muon and name.startswith("blocks") and p.dim() == 2:
            parts = 3 if "c_attn" in name else 2 if "c_fc" in name else 1
            by_shape.setdefault((p.shape[0] // parts, p.shape[1]), []).append(p)
        else:
            (decayed if p.dim() == 2 and not muon else others).append(p)
    lr = config.embedding_learning_rate if muon else config.learning_rate
    groups = [dict(params=decayed, lr=lr, weight_decay=config.weight_decay),
              dict(params=others, lr=lr, weight_decay=0.0)]
    groups += [dict(params=params, shape=shape, lr=config.muon_learning_rate, momentum=0.95,
                    weight_decay=config.weight_decay) for shape, params in by_shape.items()]
    groups = [dict(group, initial_lr=group["lr"]) for group in groups if group["params"]]
    return MuonAdamW(groups, betas=(config.beta1, config.beta2), fused=True)


def lr_multiplier(it, config):
    """Fraction of the peak learning rate at iteration `it` (from 0): linear warmup, then cosine or wsd."""
    warmup = min(config.warmup_iters, config.max_iters // 10)
    if it < warmup:
        return (it + 1) / (warmup + 1)
    start = warmup if config.schedule == "cosine" else max(warmup, config.max_iters * (1 - config.decay_fraction))
    done = min(1.0, max(0.0, (it - start) / max(1, config.max_iters - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left


# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def estimate_loss(model, validation, batch_size, device, dtype):
    """{"val_loss": nats per token, "val_bpb": bits per byte of text, "floor": the lowest possible loss, if known}."""
    model.eval()
    with autocast(device, dtype):
        losses = [model(x, y) * (y != IGNORE_INDEX).sum() for x, y in validation.batches(batch_size, device)]
    model.train()
    nats = torch.stack(losses).cpu().double().sum().item()
    result = dict(val_loss=nats / validation.num_targets, val_bpb=nats / math.log(2) / validation.text_bytes)
    return result | (dict(floor=validation.floor) if validation.floor else {})


def sample_story(model, tokenizer, max_tokens, seed, device):
    """A story from an empty prompt. It has its own random generator, so it does not change the training."""
    model.eval()
    prompt = torch.tensor([[tokenizer.bos_id]], device=device)
    ids = model.generate(prompt, SampleConfig(max_new_tokens=max_tokens), tokenizer.eos_id,
                         torch.Generator(device).manual_seed(seed))
    story = tokenizer.decode(ids).strip().translate(CONTROL_CHARACTERS)
    model.train()
    return story


# -----------------------------------------------------------------------------
# Memory and compilation

def batch_sizes(config, block_size):
    """The micro-batch sizes that divide an iteration, ascending."""
    sequences, rest = divmod(config.tokens_per_iter, block_size * WORLD_SIZE)
    return [] if rest else [size for size in range(1, sequences + 1) if sequences % size == 0]


def grad_accum_steps(config, block_size, batch_size):
    """Micro-batches per process and iteration. UserError, with values that work, if it is not a whole number."""
    tokens = batch_size * block_size * WORLD_SIZE
    steps, rest = divmod(config.tokens_per_iter, tokens)
    if steps and not rest:
        return steps
    sizes = sorted(batch_sizes(config, block_size), key=lambda size: abs(size - batch_size))
    hint = f"--batch-size {sizes[0]} or " if sizes else ""
    gpus = f" on each of {WORLD_SIZE} GPUs" if WORLD_SIZE > 1 else ""
    raise UserError(f"--tokens-per-iter {config.tokens_per_iter} is not a multiple of micro-batches of {batch_size} x "
                    f"{block_size} tokens{gpus}: use {hint}--tokens-per-iter {max(1, steps) * tokens}")


def try_iteration(forward, batch_size, run, accum_steps=1):
    """Peak bytes of an iteration whose update is skipped: nothing changes."""
    device, cuda = run.device, run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            compute_gradients(forward, run.batches(0, batch_size), accum_steps, run)
        clip_grad_norm(run.model, run.config.grad_clip)
        run.optimizer.found_inf = torch.ones((), device=device)
        run.optimizer.step()
        return torch.cuda.max_memory_allocated(device) if cuda else 0
    finally:
        run.model.zero_grad(set_to_none=True)


def find_batch_size(run):
    """The largest micro-batch that divides an iteration and needs at most 90% of the GPU memory.

    Sizes are tried upwards, each only if the one before promises that it fits: Windows does not report an overfull GPU,
    it swaps and crawls.
    """
    sizes = batch_sizes(run.config, run.model.config.block_size) or [1]
    if run.device.type != "cuda":
        return max(size for size in sizes if size <= 32)
    free, total = torch.cuda.mem_get_info(run.device)
    limit = total * torch.cuda.get_per_process_memory_fraction(run.device)
    room = 0.9 * min(free + torch.cuda.memory_reserved(run.device), limit)
    best, peak = sizes[0], 0
    for size in sizes:
        torch.cuda.empty_cache()
        fixed = torch.cuda.memory_allocated(run.device)
        if fixed + (peak - fixed) * size / best > room:
            break
        try:
            peak = try_iteration(run.training_loss, size, run)
        except torch.OutOfMemoryError:
            break
        if peak > room:
            break
        best = size
    if WORLD_SIZE > 1:  # all processes use the size that fits the smallest GPU
        smallest = torch.tensor(best, device=run.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        best = smallest.item()
    return best


def compile_model(run, batch_size):
    """The training loss through torch.compile if that is wanted and works, tried in one iteration; else as it is.

    Whether to compile depends on the settings alone, so that a resumed run computes what an unbroken one does.
    """
    possible = run.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    auto = possible and (run.config.hours or run.config.max_iters >= COMPILE_MIN_ITERS)
    if run.config.compile == "off" or run.config.compile == "auto" and not auto:
        return run.training_loss
    try:
        compiled, run.optimizer.update = torch.compile(run.training_loss), torch.compile(muon_update)
        try_iteration(compiled, batch_size, run)
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler can raise anything
        print0(f"torch.compile does not work here ({short_message(error)}): training falls back to a slower path.")
        run.optimizer.update = muon_update
        return run.training_loss


# -----------------------------------------------------------------------------
# Time

def measure_iteration(forward, batch_size, accum_steps, run):
    """Seconds that an iteration takes, measured on some that change nothing."""
    def seconds(steps):
        started = time.perf_counter()
        try_iteration(forward, batch_size, run, steps)
        if run.device.type != "cpu":
            torch.accelerator.synchronize(run.device)
        return time.perf_counter() - started

    print0("Measuring the speed ...")
    seconds(1)  # warms up
    one, two = seconds(1), seconds(2)
    if two * accum_steps > 2 * MEASURE_SECONDS:  # slow enough to be exact
        return one + (accum_steps - 1) * (two - one)
    times = []
    while sum(times) < MEASURE_SECONDS:
        times.append(seconds(accum_steps))
    return statistics.median(times)


def fit_hours(run, seconds_per_iter):
    """Set max_iters to what fits into the rest of --hours, until the learning rate decays, which depends on it."""
    config, state, val_tokens = run.config, run.state, len(run.corpus.val)
    if state.iter and state.iter >= config.max_iters * (1 - config.decay_fraction):
        return
    final_eval = run.eval_seconds * (config.final_eval_tokens or val_tokens) / (config.eval_tokens or val_tokens)
    left = 3600 * config.hours - state.elapsed - run.pause_seconds - final_eval
    max_iters = state.iter + max(1, int(left / (seconds_per_iter + run.pause_seconds / config.eval_interval)))
    if state.iter:  # the decay begins now at the earliest, as in a run that knows max_iters
        max_iters = max(max_iters, math.ceil(state.iter / (1 - config.decay_fraction)))
    if WORLD_SIZE > 1:  # all processes have to stop at the same iteration
        agreed = torch.tensor(max_iters, device=run.device)
        dist.broadcast(agreed, 0)
        max_iters = agreed.item()
    # half of the tenth that lr_multiplier allows: there may turn out to be fewer iterations
    warmup = config.warmup_iters if state.iter else min(config.warmup_iters, max_iters // 20)
    run.config = replace(config, max_iters=max_iters, warmup_iters=warmup)


# -----------------------------------------------------------------------------
# The run: its state, its log, its checkpoints

@dataclass
class TrainState:
    """How far a run is: what changes besides weights, optimizer and random state."""

    iter: int = 0
    seconds: float = 0.0  # spent training, without evaluations and saves
    elapsed: float = 0.0  # spent since the first iteration began, with them
    loss_sum: float = 0.0  # of the iterations since the last log line
    loss_count: int = 0
    skipped: int = 0  # iterations whose update was skipped because the gradient was not finite
    best_val: float = math.inf


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the current iteration. A second one, or one before there is anything to
    save, stops at once."""

    def __init__(self):
        self.signal, self.can_save = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.signal or not self.can_save:
            self.print("Stopped. Nothing was saved since the last checkpoint.")
            sys.exit(128 + number)
        self.signal = number
        self.print("Finishing this iteration, then saving. Press Ctrl-C again to stop at once, without saving.")

    @staticmethod
    def print(text):
        if RANK == 0:
            os.write(2, f"\n{text}\n".encode())  # print and tqdm.write must not interrupt themselves


class MetricsFile:
    """metrics.jsonl: an object per line, in which a value that is not finite is null."""

    def __init__(self, path):
        self.path, self.unwritten = path, ""

    def write(self, **row):
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}
        self.unwritten += json.dumps(row) + "\n"
        with contextlib.suppress(PermissionError):  # Windows, while another program has the file open: the next time
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.unwritten)
            self.unwritten = ""


class Log:
    """metrics.jsonl, and a log line for the user: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, run):
        self.run, self.metrics = run, MetricsFile(run.out_dir / "metrics.jsonl")
        self.times = [(run.state.iter, run.state.seconds, time.monotonic())]  # at the start, and at each log line
        self.line = ""
        self.bar = tqdm(total=run.config.max_iters, initial=run.state.iter, disable=None if RANK == 0 else True,
                        leave=False, dynamic_ncols=True,
                        bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {desc}")

    def write(self, **values):
        config, state = self.run.config, self.run.state
        self.bar.total = config.max_iters  # --hours changes it
        if RANK == 0:
            self.metrics.write(iter=state.iter, tokens=state.iter * config.tokens_per_iter,
                               seconds=round(state.seconds, 3), **values)

    def seconds_per_iter(self):
        """Mean of the later half of the log lines, without the first, which contains the warmup; None before."""
        state, (at, seconds, _) = self.run.state, self.times[len(self.times) // 2]
        return (state.seconds - seconds) / (state.iter - at) if state.iter > at else None

    def log_training(self, loss, norm):
        """Write and show one line about the iterations since the last one."""
        run, config, state = self.run, self.run.config, self.run.state
        at, seconds, _ = self.times[-1]
        rate = (state.iter - at) * config.tokens_per_iter / max(state.seconds - seconds, 1e-9)
        memory, lr = peak_memory_mib(run.device), run.optimizer.param_groups[-1]["lr"]
        self.write(train_loss=loss, lr=lr, grad_norm=norm, loss_scale=run.scaler.get_scale(), skipped=state.skipped,
                   tokens_per_second=round(rate), peak_memory_mib=memory)
        self.times.append((state.iter, state.seconds, time.monotonic()))
        line = f"loss {loss:.3f}"
        if len(self.times) > 2:  # by the wall clock, so evaluations count; since the first line, so compiling does not
            at, _, then = self.times[1]
            each = (time.monotonic() - then) / (state.iter - at)
            line += f", {format_seconds(each * (config.max_iters - state.iter))} left"
        line += f", {format_count(rate)} tokens/s, lr {lr:.1e}"  # a narrow terminal cuts the end
        line += f", {memory / 1024:.1f} GiB" if memory else ""
        line += f", {state.skipped} skipped" if state.skipped else ""
        if self.bar.disable:
            print0(f"iter {state.iter}/{config.max_iters}: {line}")
        self.line = line
        self.bar.set_description_str(line, refresh=False)
        self.bar.update(state.iter - self.bar.n)


def format_count(number):
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def format_seconds(seconds):
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 72:
        return f"{hours / 24:.0f} days"
    return f"{hours:.1f} h" if hours >= 1.5 else f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"


def command_line(script, out_dir):
    """The command to type next, for this run."""
    return f"python {script}" + (f" --out-dir {quoted(out_dir)}" if str(out_dir) != TrainConfig.out_dir else "")


class Run:
    """What a run learns with and how far it is: everything that a checkpoint holds."""

    def __init__(self, preset, model, config, corpus, teacher=None, teacher_sha256=None):
        self.preset, self.config, self.corpus, self.out_dir = preset, config, corpus, Path(config.out_dir)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        self.model = model.train().to(self.device)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.teacher_sha256 = teacher_sha256
        if teacher:
            move_weights(teacher.requires_grad_(False), self.device, self.dtype)
        self.training_loss = TrainingLoss(self.model, teacher, config.teacher_weight)
        self.optimizer = configure_optimizer(self.model, config)
        self.loader = TrainLoader(corpus.train, model.config.block_size, config.seed, config.align_stories)
        # Small float16 gradients would underflow without loss scaling; bfloat16 and float32 need none.
        self.scaler = torch.amp.GradScaler(self.device.type,
                                           enabled=self.dtype is torch.float16 and self.device.type == "cuda")
        self.state = TrainState()
        self.eval_seconds = self.pause_seconds = 0.0  # of the last evaluation alone; with its story and saves

    def batches(self, step, batch_size):
        """Yield (x, y) of this process from micro-batch number `step` on."""
        return self.loader.batches(step, batch_size, self.device, RANK, WORLD_SIZE)

    def restore(self, checkpoint):
        """Continue from a checkpoint. Loss scale and CUDA's random state start fresh if it was saved without them."""
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.state = TrainState(**checkpoint["state"])
            torch.set_rng_state(checkpoint["rng"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            if self.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
                torch.cuda.set_rng_state(checkpoint["cuda_rng"], self.device)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = short_message(error)
            raise UserError(cannot_resume(self.out_dir / "ckpt.pt", reason, self.config.data_dir)) from error

    def save(self, name, resumable=True):
        """Write ckpt.pt, from which --resume continues as if it had never stopped, or best.pt, for chat.py."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        if not all(tensor.isfinite().all() for tensor in (*self.model.parameters(), *moments)):
            raise UserError(nonfinite_message(self, "the last update made weights that are not finite"))
        if RANK > 0:
            return
        if self.config.hours:  # max_iters has changed
            self.write_config()
        checkpoint = dict(preset=self.preset, train_config=asdict(self.config), corpus=self.corpus.fingerprint,
                          teacher_sha256=self.teacher_sha256, state=asdict(self.state),
                          word_prompts=bool(self.corpus.meta["arguments"].get("word_prompts")))
        if resumable:
            cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            checkpoint |= dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                               rng=torch.get_rng_state(), cuda_rng=cuda_rng)
        save_checkpoint(self.out_dir / name, self.model, self.corpus.tokenizer.model_bytes, **checkpoint)

    def write_config(self):
        write_json(self.out_dir / "config.json",
                   dict(preset=self.preset, model=asdict(self.model.config), train=asdict(self.config)))

    def evaluate(self, log, batch_size):
        """Log an evaluation, print a story, and save the weights as best.pt if they are the best so far."""
        config, state = self.config, self.state
        result = self.measure(config.eval_tokens, batch_size)
        message = f"iter {state.iter}: validation {describe_loss(**result)}"
        if state.iter == config.max_iters:
            full = self.measure(config.final_eval_tokens, batch_size)
            tokens = f"{config.final_eval_tokens:,} tokens" if config.final_eval_tokens else "the whole validation set"
            message += f"\n{tokens}: {describe_loss(**full)}"
            result |= {f"full_{name}": value for name, value in full.items()}
        log.write(**result)
        if not math.isfinite(result["val_loss"]):
            raise UserError(nonfinite_message(self, f"the validation loss is not finite at iteration {state.iter}"))
        print0(message)
        if state.iter and config.sample_tokens:
            print0(sample_story(self.model, self.corpus.tokenizer, config.sample_tokens, config.seed + state.iter,
                                self.device) + "\n")
        if state.iter and result["val_loss"] < state.best_val:
            state.best_val = result["val_loss"]
            self.save("best.pt", resumable=False)

    def measure(self, tokens, batch_size):
        validation = Validation(self.corpus, self.model.config.block_size, tokens, self.config.align_stories)
        started = time.monotonic()
        result = estimate_loss(self.model, validation, batch_size, self.device, self.dtype)
        self.eval_seconds = time.monotonic() - started
        return result


def describe_loss(val_loss, val_bpb, floor=None):
    line = f"loss {val_loss:.4f}, {val_bpb:.4f} bits per byte"
    if floor:
        is_near = val_loss < 2 * floor  # a percentage means nothing before
        line += f", {val_loss / floor - 1:.1%} above the floor of {floor:.4f}" if is_near else f" (floor {floor:.4f})"
    return line


def nonfinite_message(run, problem):
    """What happened when numbers stopped being finite, and what to type."""
    name = "muon_learning_rate" if run.config.optimizer == "muon" else "learning_rate"
    return (f"{problem}; nothing was saved from there on. Train again from the start with half the learning rate, "
            f"{flag(name)} {getattr(run.config, name) / 2:g}, or with --dtype float32 (bfloat16 on RTX 30 and newer), "
            "and with --overwrite or another --out-dir.")


def cannot_resume(path, reason, data_dir):
    return (f"cannot resume from {path}: {reason}. Its weights can start a new run: python train.py --init-from "
            f"{quoted(path)} --data-dir {quoted(data_dir)} --out-dir another-folder")


# -----------------------------------------------------------------------------
# The loop

def compute_gradients(forward, batches, accum_steps, run):
    """Add up the gradients of an iteration, still scaled; returns its mean loss."""
    iter_loss = torch.zeros((), device=run.device)
    with autocast(run.device, run.dtype):  # around all micro-batches, so that it converts the weights only once
        for micro_step, (x, y) in enumerate(itertools.islice(batches, accum_steps), 1):
            if isinstance(forward, DistributedDataParallel):  # all-reduce the gradients only in the last micro-batch
                forward.require_backward_grad_sync = micro_step == accum_steps
            loss, text_loss = forward(x, y)
            run.scaler.scale(loss / accum_steps).backward()
            iter_loss += text_loss.detach() / accum_steps
    return iter_loss


def clip_grad_norm(model, max_norm):
    """The norm of all gradients, which are scaled down to max_norm; 0 leaves them as they are."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)


def train(run, batch_size, stop, overwrite=False, plan=False):
    """Train until max_iters or a request to stop; returns the signal that asked for it, or 0. `plan`: only measure."""
    config, optimizer, scaler, device, state = run.config, run.optimizer, run.scaler, run.device, run.state
    accum_steps = grad_accum_steps(config, run.model.config.block_size, batch_size)
    started = time.perf_counter()
    forward = compile_model(run, batch_size)
    is_compiled = forward is not run.training_loss
    forward = DistributedDataParallel(forward) if WORLD_SIZE > 1 else forward
    batches = run.batches(state.iter * accum_steps, batch_size)
    seconds_per_iter = 0.0
    flops = 6 * run.model.count_parameters() * config.max_iters * config.tokens_per_iter
    if plan or config.hours or flops > LONG_FLOPS:
        seconds_per_iter = measure_iteration(forward, batch_size, accum_steps, run)
    if config.hours:
        fit_hours(run, seconds_per_iter)
    describe_plan(run, batch_size, seconds_per_iter)
    if plan:
        describe_measured(run, config.tokens_per_iter / seconds_per_iter, batch_size, is_compiled)
        return 0
    log = Log(run)
    if RANK == 0:
        prepare_out_dir(run, overwrite)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # These stay on the device and are read at log lines, evaluations and saves: no host sync in between.
    loss_sum, skipped = torch.tensor(state.loss_sum, device=device), torch.tensor(float(state.skipped), device=device)
    # Iterations that were not finite: with a GradScaler, which causes some itself, those in a row; without one, all of
    # them, and one is too many.
    bad_iters, max_bad_iters = torch.zeros((), device=device), MAX_CONSECUTIVE_SKIPS if scaler.is_enabled() else 0
    first_iter, saved_at, stop_signal = state.iter, time.monotonic(), 0
    began = saved_at - state.elapsed

    while True:
        # Evaluate and save
        is_last = state.iter == run.config.max_iters
        eval_now = state.iter == 0 or state.iter > first_iter and (state.iter % config.eval_interval == 0 or is_last)
        save_now = state.iter > first_iter and (eval_now or stop_signal
                                                or time.monotonic() - saved_at > 60 * config.save_minutes)
        if eval_now or save_now:
            state.loss_sum, state.skipped = loss_sum.item(), int(skipped)
            check_finite(run, state.loss_sum, bad_iters, max_bad_iters)
            state.seconds += time.perf_counter() - started
            paused = time.monotonic()
            state.elapsed = paused - began
            if eval_now:
                log.bar.set_description_str("evaluating")
                run.evaluate(log, batch_size)
                log.bar.set_description_str(log.line)
            if save_now:
                run.save("ckpt.pt")
                saved_at = time.monotonic()
            if eval_now:
                run.pause_seconds = time.monotonic() - paused
            if state.iter == 0:
                began = time.monotonic()
            state.elapsed = time.monotonic() - began
            started = time.perf_counter()
        if is_last or stop_signal:
            log.bar.close()
            return 0 if is_last else stop_signal

        # One iteration: the gradients of all micro-batches, then one update
        multiplier = lr_multiplier(state.iter, run.config)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        iter_loss = compute_gradients(forward, batches, accum_steps, run)
        if WORLD_SIZE > 1:
            dist.all_reduce(iter_loss)
            iter_loss /= WORLD_SIZE
        scaler.unscale_(optimizer)
        norm = clip_grad_norm(run.model, config.grad_clip)
        found_inf = 1 - (iter_loss + norm).isfinite().float()
        optimizer.found_inf = found_inf  # where GradScaler.step leaves it; here without a scaler too
        optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += iter_loss
        skipped += found_inf
        bad_iters = (bad_iters + 1) * found_inf if scaler.is_enabled() else bad_iters + found_inf
        state.iter += 1
        state.loss_count += 1
        stop.can_save = True

        # A line of the log
        log_now = state.iter % config.log_interval == 0 or state.iter == run.config.max_iters
        if log_now:
            mean_loss, state.skipped = loss_sum.item() / state.loss_count, int(skipped)
            check_finite(run, mean_loss, bad_iters, max_bad_iters)
            now = time.perf_counter()
            state.seconds, started = state.seconds + now - started, now
            log.log_training(mean_loss, norm.item())
            loss_sum.zero_()
            state.loss_sum, state.loss_count = 0.0, 0
            if config.hours and (seconds_per_iter := log.seconds_per_iter()):
                state.elapsed = time.monotonic() - began
                fit_hours(run, seconds_per_iter)
        if WORLD_SIZE == 1:
            stop_signal = stop.signal
        elif log_now:  # all processes have to stop at the same iteration
            request = torch.tensor(stop.signal, device=device)
            dist.all_reduce(request, dist.ReduceOp.MAX)
            stop_signal = request.item()


def check_finite(run, loss, bad_iters, max_bad_iters):
    """UserError where the loss, or too many gradients, were not finite. Such iterations have changed nothing."""
    if not math.isfinite(loss) or bad_iters > max_bad_iters:
        raise UserError(nonfinite_message(run, f"the loss or its gradient is not finite at iteration {run.state.iter}"))


# -----------------------------------------------------------------------------
# The command

def refuse_changes(given, before, path, advice):
    """UserError where a flag contradicts what the checkpoint at `path` was trained with."""
    for name, value in given.items():
        if name in before and value != before[name]:
            raise UserError(f"{flag(name)} {value} contradicts {path}, which has {before[name]}: {advice}")


def refuse_other_tokenizer(checkpoint, corpus, path, data_dir):
    """UserError, with the commands that help, where the checkpoint at `path` has another tokenizer than the corpus."""
    if checkpoint["tokenizer"] != corpus.tokenizer.model_bytes:
        tokenizer = f"tok{checkpoint['model_config']['vocab_size']}.model"
        prepare = prepare_command(data_dir, corpus.meta["arguments"] | dict(tokenizer=tokenizer, vocab_size=None))
        extract = f"python export.py --format tokenizer --checkpoint {quoted(path)} --output {tokenizer}"
        raise UserError(f"{path} has another tokenizer than the corpus in {data_dir}. Extract it, then prepare the "
                        f"text with it:\n  {extract}\n  {prepare} --overwrite")


def load_teacher(path, block_size, corpus, data_dir):
    """(the model of --teacher, the SHA-256 of its file). UserError if it cannot read what its student reads."""
    if not Path(path).exists():
        raise UserError(f"the teacher {path} does not exist: pass its path with --teacher.")
    teacher, checkpoint = load_checkpoint(path)
    refuse_other_tokenizer(checkpoint, corpus, path, data_dir)
    if teacher.config.block_size < block_size:
        raise UserError(f"the teacher {path} reads at most {teacher.config.block_size} tokens: use --block-size "
                        f"{teacher.config.block_size} or another --teacher.")
    with open(path, "rb") as file:
        return teacher, hashlib.file_digest(file, "sha256").hexdigest()


def settings_for_new_run(preset, given, corpus):
    """(preset, GPTConfig, TrainConfig) from defaults, preset and flags, in this order."""
    vocab_size, preset = corpus.tokenizer.vocab_size, preset or "rtx3050"
    if given.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(f"--vocab-size {given['vocab_size']} contradicts the prepared corpus, whose vocabulary has "
                        f"{vocab_size} tokens: omit it, or prepare the corpus with --vocab-size {given['vocab_size']}.")
    values = PRESETS[preset] | given | dict(vocab_size=vocab_size)
    return preset, GPTConfig(**only_fields(GPTConfig, values)), TrainConfig(**only_fields(TrainConfig, values))


def settings_for_init_from(checkpoint, shape, preset, given, corpus, path):
    """(preset, GPTConfig, TrainConfig) of a new run on the weights of a checkpoint, which decides the shape."""
    typed = only_fields(GPTConfig, PRESETS.get(preset, {}) | given)
    dropout = typed.pop("dropout", shape.dropout)
    refuse_changes(typed, asdict(shape), path, "omit the flag or preset, the shape comes from the checkpoint.")
    refuse_other_tokenizer(checkpoint, corpus, path, given["data_dir"])
    preset = preset or checkpoint.get("preset", "rtx3050")
    return preset, replace(shape, dropout=dropout), TrainConfig(**only_fields(TrainConfig, PRESETS[preset] | given))


def settings_for_resume(checkpoint, shape, preset, given, corpus, path):
    """(preset, GPTConfig, TrainConfig) of the checkpoint, with the flags that may change."""
    if missing := {"preset", "train_config", "optimizer", "scaler", "state", "rng", "corpus"} - checkpoint.keys():
        reason = f"it lacks {', '.join(sorted(missing))} (saved for chatting only, or by an earlier version)"
        raise UserError(cannot_resume(path, reason, given["data_dir"]))
    config, before = TrainConfig.from_dict(checkpoint["train_config"], path), dict(preset=checkpoint["preset"])
    fixed = {name: value for name, value in given.items() if name not in RESUME_MAY_CHANGE}
    refuse_changes(fixed | (dict(preset=preset) if preset else {}), before | asdict(shape) | asdict(config), path,
                   "omit it, or start a new run in another --out-dir.")
    if checkpoint["corpus"] != corpus.fingerprint:
        raise UserError(f"{path} was trained on another corpus than that in {given.get('data_dir', config.data_dir)}: "
                        "pass its --data-dir, or start a new run in another --out-dir.")
    hours = dict(hours=None) if "max_iters" in given else {}
    return checkpoint["preset"], shape, replace(config, **hours, **only_fields(TrainConfig, given))


def device_name(device):
    if device.type == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def peak_memory_mib(device):
    return round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None


def describe(run):
    """Print the facts of the run before it starts."""
    config, shape = run.config, run.model.config
    count = run.model.count_parameters()
    print0(f"Model: {run.preset}, {count / 1e6:.2f} M parameters ({count * 4 / 2**20:.1f} MiB in float32), "
           f"{shape.position} positions, context {shape.block_size}, vocabulary {shape.vocab_size}.")
    if config.teacher:
        print0(f"Teacher: {config.teacher}, {run.training_loss.teacher.count_parameters() / 1e6:.2f} M parameters, "
               f"weight {config.teacher_weight:g}. The loss shown is that of the text alone.")
    print0(f"Device: {run.device} ({device_name(run.device)}), {str(run.dtype).removeprefix('torch.')}"
           f"{' with a GradScaler' * run.scaler.is_enabled()}.")
    if run.device.type == "cpu" and cuda_hint():
        print0(f"Warning: {cuda_hint()}Training continues on the CPU, slowly.")
    group = run.optimizer.param_groups[-1]
    rate = group["initial_lr"] * lr_multiplier(run.state.iter, config)
    if run.state.iter and rate > 2 * group["lr"]:  # a finished run is resumed with more iterations
        print0(f"Note: the learning rate rises again, to {rate:.1e}, and at first the loss with it.")


def describe_plan(run, batch_size, seconds_per_iter):
    """Print how much is going to be learned, and a warning where that is too much for the text or the time."""
    config, state, block_size = run.config, run.state, run.model.config.block_size
    text_tokens = len(run.corpus.train) // run.corpus.meta["arguments"].get("copies", 1)
    tokens = config.max_iters * config.tokens_per_iter
    steps, epochs = grad_accum_steps(config, block_size, batch_size), tokens / text_tokens
    print0(f"Plan: {config.max_iters:,} iterations of {config.tokens_per_iter:,} tokens ({steps} micro-batch"
           f"{'es' * (steps > 1)} of {batch_size} x {block_size}), {format_count(tokens)} tokens in total, "
           f"{epochs:.2g} epochs of the {format_count(text_tokens)} training tokens in {config.data_dir}.")
    if epochs > MANY_EPOCHS:
        enough, size, smaller = MANY_EPOCHS * text_tokens, config.tokens_per_iter, ""
        if enough < FEW_ITERS * size and steps > 1:
            size //= steps
            smaller = f"--tokens-per-iter {size} "
        print0(f"Warning: beyond about {MANY_EPOCHS} epochs a model overfits. Prepare more text, or stop earlier: "
               f"{smaller}--max-iters {max(1, enough // size)}")
    seconds = (config.max_iters - state.iter) * seconds_per_iter
    if config.hours:
        late = state.elapsed + seconds - 3600 * config.hours
        if late > 0.03 * 3600 * config.hours:
            print0(f"Note: at the present speed the run ends about {format_seconds(late)} late.")
    elif seconds > 3600 * LONG_HOURS:
        print0(f"Warning: on this device the run takes about {format_seconds(seconds)}. Pass the time that you have, "
               "such as --hours 8, or train a small model: --preset demo")


def describe_measured(run, rate, batch_size, is_compiled):
    """Print what --plan found out, and last a line that compares machines."""
    iters, memory = run.config.max_iters, peak_memory_mib(run.device)
    print0(f"Measured: {format_count(rate)} tokens/s, so {iters:,} iterations take "
           f"{format_seconds(iters * run.config.tokens_per_iter / rate)} plus evaluations. Nothing was saved.")
    print0(f"To compare: {run.preset}, {device_name(run.device)}, torch {torch.__version__}, "
           f"{str(run.dtype).removeprefix('torch.')}, {'' if is_compiled else 'not '}compiled, micro-batches of "
           f"{batch_size} x {run.model.config.block_size}: {format_count(rate)} tokens/s"
           f"{f', {memory:,} MiB' if memory else ''}")


def prepare_out_dir(run, overwrite):
    """Delete the run that is replaced, and what was logged after the checkpoint; write config.json."""
    if overwrite:
        for name in ("ckpt.pt", "best.pt"):
            (run.out_dir / name).unlink(missing_ok=True)
    truncate_after(run.state.iter, run.out_dir / "metrics.jsonl")
    run.write_config()


def truncate_after(it, path):
    """Keep the lines of metrics.jsonl up to iteration `it`; none for a new run."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if it and path.exists() else []
    with atomic_write(path, "w") as file:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut short
                if json.loads(line)["iter"] <= it:
                    file.write(line)


def out_of_memory_message(run, batch_size):
    smaller = [size for size in batch_sizes(run.config, run.model.config.block_size) if size < batch_size]
    advice = f"--batch-size {smaller[-1]}" if smaller else "--activation-checkpointing"
    can_resume = run.state.iter and (run.out_dir / "ckpt.pt").exists()
    command = f": {command_line(f'train.py --resume {advice}', run.out_dir)}" if can_resume else " and rerun it."
    return (f"out of memory with micro-batches of {batch_size} x {run.model.config.block_size} tokens. Add {advice} to "
            f"the command, which leaves the learning as it is{command}")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--preset", type=click.Choice(list(PRESETS)),
              help="a set of defaults; those below are of rtx3050")
@click.option("--resume", is_flag=True, help="resume the run in --out-dir")
@click.option("--init-from", type=click.Path(path_type=Path), metavar="FILE",
              help="fine-tune: start from the weights of a checkpoint, on text prepared with its tokenizer "
              "(preprocess.py --tokenizer)")
@click.option("--overwrite", is_flag=True, help="replace the run in --out-dir")
@click.option("--plan", is_flag=True,
              help="measure memory and speed, print how long the run would take, and exit")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), metavar="X", help="like --hours, in minutes")
@setting_options(GPTConfig, TrainConfig)
def main(preset, resume, init_from, overwrite, plan, minutes, **given):
    """Train a GPT on the corpus that preprocess.py prepared.

    Writes ckpt.pt (for --resume), best.pt (for chat.py), metrics.jsonl (for plot_loss.py) and config.json to --out-dir.
    Ctrl-C saves and stops. For several GPUs: torchrun --standalone --nproc-per-node=2 train.py
    """
    given["hours"] = (given["hours"] or 0) + (minutes or 0) / 60 or None
    given = {name: value for name, value in given.items() if value is not None}
    if "hours" in given and "max_iters" in given:
        raise click.UsageError("--hours and --minutes decide how many iterations there are: omit --max-iters.")
    out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
    ckpt = out_dir / "ckpt.pt"
    if resume and (overwrite or init_from):
        raise click.UsageError("--resume continues a run as it was: omit --overwrite and --init-from.")
    for path in filter(None, (init_from, given.get("teacher"))):
        if overwrite and Path(path).resolve().parent == out_dir.resolve():
            raise UserError(f"--overwrite would delete {path}, which the run needs: pass another --out-dir.")
    if resume and not ckpt.exists():
        raise UserError(f"there is no run to resume in {out_dir}: start one with "
                        f"`{command_line('train.py', out_dir)}`, or pass the --out-dir of another.")
    with folder_lock(out_dir) if RANK == 0 and not plan else contextlib.nullcontext():
        if not (resume or overwrite or plan) and (ckpt.exists() or (out_dir / "best.pt").exists()):
            advice = "--resume continues it, " if ckpt.exists() else ""
            raise UserError(f"{out_dir} already contains a run: {advice}--overwrite replaces it, and another --out-dir "
                            "keeps both.")
        with out_of_memory_advice(lambda: "the model does not fit into the free memory of the device: close other "
                                  "programs that use it and rerun, or choose another --device."):
            run = open_run(preset, ckpt if resume else init_from, resume, given | dict(out_dir=str(out_dir)))
        if run.state.iter >= run.config.max_iters:
            raise UserError(f"the run in {out_dir} has finished its {run.state.iter} iterations: talk to it with "
                            f"`{command_line('chat.py', out_dir)}`, or continue with a larger --max-iters.")
        stop, batch_size = StopRequest(), run.config.batch_size
        with out_of_memory_advice(lambda: out_of_memory_message(run, batch_size)):
            if batch_size == "auto":
                batch_size = find_batch_size(run)
                print0(f"--batch-size auto: micro-batches of {batch_size} fit.")
            describe(run)
            stop_signal = train(run, batch_size, stop, overwrite, plan)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if stop_signal:
        print0(f"Stopped and saved at iteration {run.state.iter}. Resume with: "
               f"{command_line('train.py --resume', out_dir)}")
        sys.exit(128 + stop_signal)
    if not plan:
        if run.config.hours:
            config = run.config
            print0(f"{config.max_iters:,} iterations took {format_seconds(run.state.elapsed)}. The same run without a "
                   f"clock: --max-iters {config.max_iters} --warmup-iters {config.warmup_iters}")
        print0(f"Finished: best validation loss {run.state.best_val:.4f}. Talk to it: "
               f"{command_line('chat.py', out_dir)}\nSee its loss curve: {command_line('plot_loss.py', out_dir)}")


def open_run(preset, path, resume, given):
    """The Run that the flags describe, on the weights of the checkpoint at `path` if there is one."""
    model, checkpoint = load_checkpoint(path) if path else (None, {})
    saved_dir = checkpoint.get("train_config", {}).get("data_dir") if resume else None
    data_dir = given.setdefault("data_dir", saved_dir or TrainConfig.data_dir)
    corpus = Corpus(data_dir)
    if resume:
        preset, shape, config = settings_for_resume(checkpoint, model.config, preset, given, corpus, path)
    elif path:
        preset, shape, config = settings_for_init_from(checkpoint, model.config, preset, given, corpus, path)
    else:
        preset, shape, config = settings_for_new_run(preset, given, corpus)
    if config.hours and config.schedule == "cosine":
        raise UserError("--hours does not know its last iteration, which a cosine needs: omit --schedule cosine.")
    muon = config.optimizer == "muon"
    refuse_without_effect(given, {
        "learning_rate": (muon, "with --optimizer muon: use --muon-learning-rate and --embedding-learning-rate"),
        "muon_learning_rate": (not muon, "with --optimizer adamw: use --learning-rate"),
        "embedding_learning_rate": (not muon, "with --optimizer adamw: use --learning-rate"),
        "decay_fraction": (config.schedule == "cosine", "with --schedule cosine: use --schedule wsd"),
        "teacher_weight": (not config.teacher, "without --teacher: add it")})
    teacher, sha256 = None, None
    if config.teacher:
        teacher, sha256 = load_teacher(config.teacher, shape.block_size, corpus, data_dir)
    if resume and (before := checkpoint.get("teacher_sha256")) != sha256:
        right = f"whose file has the SHA-256 {before}: pass that one" if before else "which has none: omit it"
        raise UserError(f"--teacher {config.teacher} is not the teacher of {path}, {right}, or start a new run in "
                        "another --out-dir.")
    config = replace(config, device=init_distributed(config.device))
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    model = GPT(shape)  # not the loaded one: --init-from may change dropout
    if path:
        model.load_state_dict(checkpoint["model"])
    run = Run(preset, model, config, corpus, teacher, sha256)
    if resume:
        run.restore(checkpoint)
    if RANK > 0:  # dropout of its own; the first process continues with the saved state
        torch.manual_seed(config.seed + RANK + 1000 * run.state.iter)
    return run


def init_distributed(device_name):
    """Join the process group of torchrun, if there is one; returns the name of this process's device."""
    if WORLD_SIZE == 1:
        return device_name
    cuda = device_name != "cpu" and torch.cuda.is_available()
    device_name = f"cuda:{LOCAL_RANK}" if cuda else "cpu"
    choose_device(device_name)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device_name


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
