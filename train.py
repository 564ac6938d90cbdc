"""Training: optimizer, data order, evaluation, the loop, its log, and going on after a stop."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds that importing torch takes: no traceback

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import preprocess
from config import (COMMAND_LINE, PRESETS, GPTConfig, GroupedCommand, SampleConfig, TrainConfig, UserError,
                    first_line, pick, replacing, restore, setting_options, sole_owner)
from model import (GPT, IGNORE, autocast, build_model, choose_device, choose_dtype, cuda_hint, read_checkpoint,
                   record_graph, save_checkpoint)

# What may be given anew with --resume; anything else comes from the checkpoint.
RESUME_MAY_CHANGE = {"data_dir", "out_dir", "max_iters", "batch_size", "device", "compile", "checkpoint_activations",
                     "log_interval", "eval_interval", "eval_tokens", "final_eval_tokens", "sample_tokens",
                     "save_minutes"}
MANY_EPOCHS = 20
COMPILE_WORTH_SECONDS = 120
SAVE_SHARE = 0.01  # of a run's time, which saving at evaluations may take
SKIPS_IN_A_ROW = 30
PLAN_ITERS = 8
WORKSPACE = 96 * 2**20  # what cuBLAS and the allocator take, measured


# The optimizer.

def orthogonalize(x):
    """The nearest semi-orthogonal matrix to each of x (N, rows <= cols), roughly: 5 quintic Newton-Schulz steps.

    Coefficients of Keller Jordan (2024): singular values land in about 0.7..1.2, which is enough for Muon.
    """
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def muon_update(gradient, momentum, decay, ok, dtype):
    """The step for a batch of matrices (N, rows, cols), whose momentum moves on (Nesterov); nothing if ok is 0."""
    gradient = gradient.where(ok > 0, 0.0)  # infinity times 0 is not a number
    momentum.lerp_(gradient, (1 - decay) * ok)
    return ok * orthogonalize(gradient.lerp(momentum, decay).to(dtype)).to(gradient.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices (Jordan et al. 2024). The matrices of a group are treated in one batch.

    Weights come as (weight, parts): a fused one (queries, keys, values; gate, up) counts as its parts. A group holds
    one shape, tall ones lying on their side; that takes a quarter of the time of one matrix after the other. Where
    `found_inf` is 1, a step changes nothing: on the device, so that nobody waits for it (as in torch's fused AdamW).
    """

    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        groups = {}
        for weight, parts in weights:
            shape = (weight.shape[0] // parts, weight.shape[1])
            group = groups.setdefault(tuple(sorted(shape)), dict(params=[], parts=[]))
            group["params"].append(weight)
            group["parts"].append(parts)
        super().__init__(list(groups.values()), dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.update = muon_update  # train.py puts the compiled one here when it compiles the model

    @torch.no_grad()
    def step(self):
        ok = 1 - self.found_inf
        for group in self.param_groups:
            weights, counts = group["params"], group["parts"]
            lying = [turned(weight.grad, parts) for weight, parts in zip(weights, counts, strict=True)]
            gradient = torch.cat(lying)  # (N, rows, cols)
            state = self.state[weights[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            # bfloat16 keeps float32's range, which the iteration needs; float16 does not.
            fast = gradient.is_cuda and torch.cuda.get_device_capability(gradient.device)[0] >= 8
            update = self.update(gradient, state["momentum"], group["momentum"], ok,
                                 torch.bfloat16 if fast else torch.float32)
            torch._foreach_mul_(weights, 1 - ok * (group["lr"] * group["weight_decay"]))
            for weight, parts, part in zip(weights, counts, update.split(counts), strict=True):
                rows, cols = weight.shape[0] // parts, weight.shape[1]
                part = part.mT if rows > cols else part
                weight.view(parts, rows, cols).add_(part, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def turned(matrix, parts):
    """The parts of a matrix as a batch (parts, rows, cols) with rows <= cols."""
    batch = matrix.view(parts, matrix.shape[0] // parts, matrix.shape[1])
    return batch.mT if batch.shape[1] > batch.shape[2] else batch


class Optimizers:
    """Several optimizers that step as one: an infinite gradient stops all of them or none."""

    def __init__(self, *members):
        self.members = members
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @property
    def param_groups(self):
        return [group for member in self.members for group in member.param_groups]

    def step(self, found_inf):
        """One update, or none where the tensor found_inf () is 1. Nobody waits for its value."""
        for member in self.members:
            member.found_inf = found_inf  # where GradScaler.step leaves it for torch's fused optimizers
            member.step()

    def zero_grad(self):
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def set_share(self, share):
        """Set every learning rate to this share of its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * share

    def state_dict(self):
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states):
        """Take the moments from `states`, rates and the like from the settings. ValueError where they do not fit."""
        for member, saved in zip(self.members, states, strict=True):
            shapes = state_shapes(member)
            found = {key: {name: list(value.shape) for name, value in entry.items()}
                     for key, entry in saved["state"].items()}
            if found and found != shapes:  # empty where every update was skipped
                raise ValueError(f"the moments of {type(member).__name__} do not fit its weights")
            if not all_finite(value for entry in saved["state"].values() for value in entry.values()):
                raise ValueError(f"moments of {type(member).__name__} are not finite")
            member.load_state_dict(dict(state=saved["state"], param_groups=member.state_dict()["param_groups"]))


def state_shapes(member):
    """{index of a weight: {name: shape}} of what an optimizer remembers after its first step."""
    shapes, index = {}, 0
    for group in member.param_groups:
        for weight in group["params"]:
            if isinstance(member, Muon) and weight is group["params"][0]:
                rows, cols = sorted((weight.shape[0] // group["parts"][0], weight.shape[1]))
                shapes[index] = dict(momentum=[sum(group["parts"]), rows, cols])
            elif not isinstance(member, Muon):
                shapes[index] = dict(step=[], exp_avg=list(weight.shape), exp_avg_sq=list(weight.shape))
            index += 1
    return shapes


def all_finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def make_optimizer(model, config):
    """AdamW for all, or Muon for the blocks' matrices and AdamW for embeddings and norms."""
    use_muon = config.optimizer == "muon"
    muon, decayed, others = [], [], []
    for name, weight in model.named_parameters():
        if use_muon and name.startswith("blocks") and weight.dim() == 2:
            muon.append((weight, 3 if "c_attn" in name else 2 if "c_fc" in name else 1))
        else:
            (decayed if weight.dim() == 2 and not use_muon else others).append(weight)
    adamw = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)],
        lr=config.embedding_learning_rate if use_muon else config.learning_rate, betas=(config.beta1, config.beta2),
        fused=True)
    if not use_muon:
        return Optimizers(adamw)
    return Optimizers(Muon(muon, config.muon_learning_rate, config.weight_decay), adamw)


def peak_lr(config):
    """The learning rate that the log shows: that of most weights."""
    return config.muon_learning_rate if config.optimizer == "muon" else config.learning_rate


def learning_rate_share(it, config):
    """Share of the peak learning rate at iteration `it` (from 0): linear warmup, then cosine or wsd."""
    warmup = min(config.warmup_iters, config.max_iters // 10)
    if it < warmup:
        return (it + 1) / (warmup + 1)
    start = warmup if config.schedule == "cosine" else max(warmup, config.max_iters * (1 - config.decay_share))
    done = min(1.0, max(0.0, (it - start) / max(1, config.max_iters - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_share + (1 - config.min_lr_share) * left


# The data order.

class TokenLoader:
    """Training windows of block_size + 1 tokens. Which ones is a function of the seed and of how many came before.

    The stream is read as a ring, so that each epoch can begin at a phase of its own and still see every token. With
    align_stories a window starts where a story does; a story longer than the window goes on in further windows.
    """

    def __init__(self, stream, block_size, seed, align_stories):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.aligned = story_rows(stream, len(stream), block_size)[0] if align_stories else None
        self.windows_per_epoch = len(self.aligned) if align_stories else len(stream) // block_size
        if len(stream) <= block_size:
            raise UserError(f"the corpus has {len(stream):,} training tokens, fewer than one window of "
                            f"{block_size + 1}: prepare more text, or use a shorter --block-size.")
        self.epoch, self.starts, self.prefetched = None, None, {}

    def epoch_starts(self, epoch):
        """First tokens of the windows of one epoch, in their order."""
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            starts = self.aligned
            if starts is None:
                phase = rng.integers(len(self.stream))
                starts = (phase + np.arange(self.windows_per_epoch) * self.block_size) % len(self.stream)
            self.epoch, self.starts = epoch, rng.permutation(starts)
        return self.starts

    def windows(self, consumed, count):
        """The `count` windows after the first `consumed`, as int64 (count, block_size + 1)."""
        starts = []
        while count:
            epoch, offset = divmod(consumed, self.windows_per_epoch)
            taken = self.epoch_starts(epoch)[offset:offset + count]
            starts.append(taken)
            consumed, count = consumed + len(taken), count - len(taken)
        return read_ring(self.stream, np.concatenate(starts), self.block_size + 1)

    def micro_batches(self, it, batch_size, count, device, rank=0, world=1):
        """Yield (x, y), each (batch_size, block_size), for the `count` micro-batches of iteration `it`.

        The next one is read and sent while the device works on the one before, across iterations too. Of several
        processes, each takes every `world`-th micro-batch.
        """
        for step in range(it * count, (it + 1) * count):
            here, ahead = (((step + i) * world + rank) * batch_size for i in range(2))
            batch = self.prefetched.pop((here, batch_size), None) or self.fetch(here, batch_size, device)
            yield batch
            self.prefetched = {(ahead, batch_size): self.fetch(ahead, batch_size, device)}

    def fetch(self, consumed, batch_size, device):
        rows = to_device(self.windows(consumed, batch_size), device)
        return rows[:, :-1], rows[:, 1:]


def read_ring(stream, starts, length):
    """Windows (n, length) of the stream, int64; one that passes the end goes on at the beginning."""
    inside = np.minimum(starts, len(stream) - length)
    rows = stream.windows(inside, length).astype(np.int64)
    for row in np.flatnonzero(inside < starts):
        tail = stream.read(int(starts[row]), len(stream))
        rows[row] = np.concatenate([tail, stream.read(0, length - len(tail))])
    return rows


def story_rows(stream, end, block_size):
    """Starts and numbers of targets (block_size at most) of rows that hold the stories before `end`, one a row."""
    starts = stream.story_starts()
    starts = starts[starts < end]
    targets = np.diff(starts, append=end) - 1  # the tokens after bos
    pieces = np.maximum(1, -(-targets // block_size))
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return (np.repeat(starts, pieces) + piece * block_size,
            np.minimum(block_size, np.repeat(targets, pieces) - piece * block_size))


def to_device(array, device):
    """A tensor on the device; to CUDA it is copied from pinned memory while the card computes."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty_like(tensor, pin_memory=True)
    pinned.numpy()[...] = array  # tensor.pin_memory() wakes all cores for the copy, which took a millisecond
    return pinned.to(device, non_blocking=True)


# Evaluation.

class Validation:
    """The validation stories up to about `tokens` tokens (0: all), always the same ones, and what is known of them."""

    def __init__(self, corpus, block_size, tokens, align_stories):
        self.stream, self.block_size = corpus.val, block_size
        stories = np.append(self.stream.story_starts(), len(self.stream))
        fitting = stories[stories <= (tokens or len(self.stream))]
        end = int(fitting[-1]) if len(fitting) > 1 else int(stories[1])  # whole stories, at least one
        if align_stories:
            self.starts, self.targets = story_rows(self.stream, end, block_size)
        else:
            self.starts = np.arange(0, end - 1, block_size)
            self.targets = np.minimum(block_size, end - 1 - self.starts)
        self.predicted = int(self.targets.sum())
        byte_lengths = corpus.tokenizer.byte_lengths()
        self.text_bytes = int(byte_lengths[self.stream.read(0, end)].sum())
        self.floor = None
        if corpus.meta["source"] == "sample":
            ids = self.stream.read(0, end).tolist()
            texts = [corpus.tokenizer.decode(ids[a:b]) for a, b in zip(stories, stories[1:]) if b <= end]
            try:
                self.floor = sum(map(preprocess.story_nats, texts)) / self.predicted
            except ValueError as error:
                raise UserError(f"the corpus is called sample, but its validation stories are not: {error}. Prepare it "
                                "again: `python preprocess.py prepare-dataset --dataset sample --overwrite`."
                                ) from error

    def batches(self, batch_size):
        """(x, y) of shape (<= batch_size, block_size), int64; y is -1 where nothing is predicted."""
        positions = np.arange(self.block_size + 1)
        for at in range(0, len(self.starts), batch_size):
            starts, targets = self.starts[at:at + batch_size], self.targets[at:at + batch_size]
            rows = np.zeros((len(starts), self.block_size + 1), dtype=np.int64)
            for row, start, count in zip(rows, starts, targets):
                row[:count + 1] = self.stream.read(int(start), int(start + count + 1))
            yield rows[:, :-1].copy(), np.where(positions[1:] <= targets[:, None], rows[:, 1:], IGNORE)


@torch.no_grad()
def evaluate(model, validation, batch_size, device, dtype):
    """{"val_loss": nats a token, "val_bpb": bits a byte of text, "floor"?: the least val_loss possible}."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with autocast(device, dtype):
        for x, y in validation.batches(batch_size):
            loss = model(to_device(x, device), to_device(y, device))
            total += (loss.double() if device.type != "mps" else loss.cpu().double()) * int((y != IGNORE).sum())
    model.train(was_training)
    nats = total.item()
    result = dict(val_loss=nats / validation.predicted, val_bpb=nats / math.log(2) / validation.text_bytes)
    return result | (dict(floor=validation.floor) if validation.floor is not None else {})


def sample_story(model, tokenizer, tokens, seed, device):
    """A story from an empty prompt, in float32: autocast would convert all weights for each token.

    It draws from a generator of its own, so training does not notice.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    prompt = torch.tensor([tokenizer.encode_prompt("")], device=device)
    ids = [int(token) for token in model.generate(prompt, SampleConfig(max_new_tokens=tokens), tokenizer.eos_id,
                                                  generator)]
    model.train(was_training)
    return tokenizer.decode(ids)


# Several GPUs: torchrun starts one process for each. With one process, nothing here does anything.

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def join_world(device_name):
    """Meet the other processes, where torchrun started several; returns the name of this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device_name
    cuda = choose_device(device_name).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    return f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"


def across(value, operation):
    """The sum or maximum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value, operation)
    return value


def synchronized(forward, last):
    """Gradients travel between processes once an iteration, in the backward pass of its last micro-batch."""
    return contextlib.nullcontext() if last or not dist.is_initialized() else forward.no_sync()


# One iteration.

def make_scaler(device, dtype):
    """Loss scaling for float16 on CUDA, whose small gradients would underflow; bfloat16 and float32 do without."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16 and device.type == "cuda")


class LossNotFinite(Exception):
    """The loss of an iteration, or its gradient where no GradScaler skips it, is infinite or not a number."""


def run_passes(forward, x, y, count, scaler, device):
    """Both passes of one of `count` micro-batches: adds to the weights' gradients, returns its share of the loss."""
    loss = forward(x, y) / count
    with torch.autocast(device.type, enabled=False):
        scaler.scale(loss).backward()
    return loss.detach()


class RecordedPasses:
    """run_passes as a CUDA graph, recorded at the first call.

    Both passes are some 370 kernels where no compiler joins them. The CPU of a fast card takes longer to start each
    than the card to run it; a graph starts them all at once. It holds the memory of the activations while it lives.
    """

    def __init__(self):
        self.graph = None

    def __call__(self, forward, x, y, count, scaler, device):
        if self.graph is None:
            self.record(forward, x, y, count, scaler, device)
        if self.weights[0].grad is None:  # a new iteration: zero_grad let go of the tensors that the graph adds to
            torch._foreach_zero_(self.gradients)
            for weight, gradient in zip(self.weights, self.gradients, strict=True):
                weight.grad = gradient
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss

    def record(self, forward, x, y, count, scaler, device):
        self.weights, self.x, self.y = list(forward.parameters()), x.clone(), y.clone()

        def run():
            # Without autocast's cache: the weights that it has converted outside of the graph go away.
            with torch.autocast(device.type, torch.get_autocast_dtype(device.type),
                                torch.is_autocast_enabled(device.type), cache_enabled=False):
                self.loss = run_passes(forward, self.x, self.y, count, scaler, device)

        def check_room():  # before it records, see record_graph
            if torch.cuda.max_memory_allocated(device) > card_memory(device) / 2:
                raise RuntimeError("it may take more memory than there is")

        self.graph = record_graph(device, run, before=check_room)
        self.gradients = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None


def train_step(forward, model, batches, count, optimizer, scaler, config, device, dtype, passes=run_passes):
    """Queue one optimizer update over `count` micro-batches (x, y); returns a function that waits for its outcome.

    That gives (mean loss, gradient norm, was it skipped). Where loss or gradient is not finite nothing has changed: a
    GradScaler has lowered its scale; without one, LossNotFinite is raised.
    """
    mean = torch.zeros((), device=device)
    with autocast(device, dtype):  # around all of them: it converts the weights once, and forgets them at its end
        for step, (x, y) in enumerate(batches, 1):
            with synchronized(forward, step == count):
                mean += passes(forward, x, y, count, scaler, device)
    mean = across(mean, dist.ReduceOp.SUM) / world_size()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    outcome = torch.stack([mean, norm])
    found_inf = 1 - outcome.isfinite().all().float()
    read = start_reading(outcome)
    optimizer.step(found_inf)
    scaler.update()
    optimizer.zero_grad()

    def wait():
        loss, norm = read()
        skipped = scaler.is_enabled() and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
            raise LossNotFinite
        return loss, norm, skipped
    return wait


def start_reading(tensor):
    """A function that returns the tensor's values. It waits for what was queued so far, not for what comes after."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy = tensor.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(tensor.device).record_event()
    return lambda: arrived.synchronize() or copy.tolist()


# A run: its settings, its log, its saves.

@dataclass
class Progress:
    """How far a run is: everything that changes beside weights, optimizer and random state."""

    iter: int = 0
    seconds: float = 0.0  # spent training; evaluation and saving are not counted
    loss_sum: float = 0.0  # mean loss of each iteration since the last training line
    loss_count: int = 0
    skipped: int = 0  # iterations whose update an infinite fp16 gradient prevented
    best_val: float = math.inf

    def __post_init__(self):
        if not all(type(getattr(self, name)) is kind and getattr(self, name) >= 0  # NaN is not
                   for name, kind in self.__annotations__.items()):
            raise ValueError(f"progress is {asdict(self)}")


def accumulation_steps(config, block_size, batch_size):
    """Micro-batches of each process in an iteration; UserError with values that fit, if it is no whole number."""
    tokens = batch_size * block_size * world_size()
    steps, rest = divmod(config.tokens_per_iter, tokens)
    if steps and not rest:
        return steps
    below, above = config.tokens_per_iter // tokens * tokens or tokens, -(-config.tokens_per_iter // tokens) * tokens
    sizes = batch_sizes(config, block_size)
    near = sorted(sorted(sizes, key=lambda size: abs(size - batch_size))[:2])
    hint = f"--batch-size {' or '.join(map(str, near))}, or " if near else ""
    values = " or ".join(map(str, sorted({below, above})))
    gpus = f" on {world_size()} GPUs" if world_size() > 1 else ""
    raise UserError(f"tokens_per_iter is {config.tokens_per_iter}, which is not a whole number of micro-batches of "
                    f"{batch_size} x {block_size}{gpus} = {tokens} tokens: use {hint}--tokens-per-iter {values}.")


def batch_sizes(config, block_size):
    """The micro-batch sizes that divide an iteration, ascending."""
    sequences, rest = divmod(config.tokens_per_iter, block_size * world_size())
    return [] if rest else [size for size in range(1, sequences + 1) if sequences % size == 0]


def fresh_settings(preset, given, corpus):
    """(GPTConfig, TrainConfig) from defaults, the preset, and the flags that were typed, in this order."""
    vocab_size = corpus.tokenizer.vocab_size
    if given.get("vocab_size", vocab_size) != vocab_size:
        raise UserError(f"--vocab-size {given['vocab_size']} contradicts the prepared corpus, whose vocabulary has "
                        f"{vocab_size} tokens: leave the flag out, or run `python preprocess.py prepare-dataset "
                        f"--vocab-size {given['vocab_size']} --overwrite`.")
    values = PRESETS[preset] | given | dict(vocab_size=vocab_size)
    return GPTConfig(**pick(GPTConfig, values)), TrainConfig(**pick(TrainConfig, values))


def settings_from(contents, preset, given, corpus, path):
    """(preset, GPTConfig, TrainConfig) of a new run on the weights of a checkpoint, which decide the shape."""
    model_config = restore(GPTConfig, contents["model_config"], path)
    shape = pick(GPTConfig, (PRESETS[preset] if preset else {}) | given)
    for name, value in shape.items():
        if name != "dropout" and value != getattr(model_config, name):
            typed = f"--{name.replace('_', '-')}" if name in given else f"--preset {preset} ({name})"
            raise UserError(f"{typed} {value} contradicts {path}, whose network has {getattr(model_config, name)}: "
                            "leave the flag out, the shape comes from the checkpoint.")
    if hashlib.sha256(contents["tokenizer"]).hexdigest() != corpus.tokenizer.sha256:
        name = f"tok{model_config.vocab_size}.model"
        arguments = corpus.meta["arguments"] | dict(tokenizer=name, vocab_size=None)
        again = preprocess.prepare_command(given.get("data_dir", TrainConfig.data_dir), arguments, "--overwrite")
        raise UserError(f"{path} was trained with another tokenizer than {given.get('data_dir', TrainConfig.data_dir)} "
                        f"was prepared with. Take it out with `python export.py --format tokenizer --checkpoint {path} "
                        f"--output {name}`, then prepare the text with it: {again}.")
    preset = preset or (contents.get("preset") if contents.get("preset") in PRESETS else "rtx3050")
    return (preset, replace(model_config, dropout=given.get("dropout", model_config.dropout)),
            TrainConfig(**pick(TrainConfig, PRESETS[preset] | given)))


def resumed_settings(contents, preset, given, corpus, path):
    """(preset, GPTConfig, TrainConfig) of the checkpoint, with those flags that may change. Refuses the others."""
    model_config = restore(GPTConfig, contents["model_config"], path)
    config = restore(TrainConfig, contents["train_config"], path)
    before = asdict(model_config) | asdict(config) | dict(preset=contents["preset"])
    for name, value in (given | (dict(preset=preset) if preset else {})).items():
        if name not in RESUME_MAY_CHANGE and value != before[name]:
            raise UserError(f"--{name.replace('_', '-')} {value} contradicts {path}, which was trained with "
                            f"{before[name]}: leave the flag out, or start anew in another --out-dir.")
    if contents["corpus"] != corpus_identity(corpus):
        raise UserError(f"{path} was trained on another corpus than that in {given.get('data_dir', config.data_dir)} "
                        f"({contents['corpus']} there, {corpus_identity(corpus)} here): name the right one with "
                        "--data-dir, or start anew in another --out-dir.")
    return contents["preset"], model_config, replace(config, **pick(TrainConfig, given))


def read_run(path):
    """The contents of a ckpt.pt, with all that going on from it needs; UserError where something is missing."""
    contents = read_checkpoint(path)
    needed = dict(preset=str, train_config=dict, corpus=dict, progress=dict, optimizer=list, scaler=dict,
                  rng=torch.Tensor, cuda_rng=torch.Tensor | None)
    wrong = [name for name, kind in needed.items() if not isinstance(contents.get(name, ...), kind)]
    if wrong:
        raise UserError(f"{path} cannot be gone on from, it lacks {', '.join(wrong)} (a best.pt is for chatting only): "
                        "put the run's own ckpt.pt there, or start anew with --overwrite.")
    return contents


def corpus_identity(corpus):
    """What must be the same for a run to go on: where the text is from, the tokenizer and the training shards."""
    shards = "".join(shard["sha256"] for shard in corpus.meta["train"])
    return dict(source=corpus.meta["source"], tokenizer=corpus.tokenizer.sha256[:16],
                shards=hashlib.sha256(shards.encode()).hexdigest()[:16])


class Log:
    """metrics.jsonl, and what a person sees: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, path, config, progress):
        self.path, self.config = path if rank() == 0 else None, config
        self.bar = tqdm(total=config.max_iters, initial=progress.iter, disable=None if rank() == 0 else True,
                        dynamic_ncols=True, leave=False,
                        bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {postfix}")
        self.started, self.started_at, self.last = None, progress.iter, replace(progress)

    def keep_until(self, it):
        """Drop what was logged after iteration `it`, and a line that was cut short; say so of lines that are none."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n") if it and self.path.exists() else []
        at = [logged_iteration(line) for line in lines]
        strange = sum(i is None and bool(line.strip()) for i, line in zip(at[:-1], lines))
        if strange:
            self.say(f"{self.path}: {strange} lines are damaged and left out.")
        with replacing(self.path, "w") as file:
            file.writelines(line + "\n" for i, line in zip(at, lines) if i is not None and i <= it)

    def write(self, progress, **values):
        """Append one line to metrics.jsonl; what is not finite becomes null."""
        if not self.path:
            return
        row = dict(iter=progress.iter, tokens=progress.iter * self.config.tokens_per_iter,
                   seconds=round(progress.seconds, 3), **values)
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}. Free some space, then go on with "
                            "`python train.py --resume`.") from error

    def say(self, text):
        if rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def training(self, progress, lr, norm, scale, device):
        """One training line, for the file and for the eye."""
        loss = progress.loss_sum / progress.loss_count
        iters, seconds = progress.iter - self.last.iter, progress.seconds - self.last.seconds
        rate = iters * self.config.tokens_per_iter / max(seconds, 1e-9)
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        self.write(progress, train_loss=loss, lr=lr, grad_norm=norm, loss_scale=scale, skipped=progress.skipped,
                   tokens_per_second=round(rate), peak_memory_mib=memory and round(memory))
        line = f"loss {loss:.3f}, lr {lr:.1e}, {thousands(rate)} tokens/s" + self.time_left(progress)
        line += f", {memory / 1024:.1f} GiB" if memory else ""
        line += f", {progress.skipped} skipped" if progress.skipped else ""
        self.last = replace(progress)
        if self.bar.disable:
            self.say(f"iter {progress.iter}/{self.config.max_iters}: {line}")
        else:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update(progress.iter - self.bar.n)

    def time_left(self, progress):
        """From the wall clock since the first line, so that evaluation counts and compilation does not; '' before."""
        if self.started is None:
            self.started, self.started_at = time.monotonic(), progress.iter
            return ""
        each = (time.monotonic() - self.started) / (progress.iter - self.started_at)
        return f", {duration(each * (self.config.max_iters - progress.iter))} left"


def logged_iteration(line):
    """The iteration of a line of metrics.jsonl, None where it is not one."""
    try:
        it = json.loads(line)["iter"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return it if type(it) is int else None


def thousands(number):
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def duration(seconds):
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1.5 else f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the current iteration; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.signal, self.heard = None, lambda: [0]
        self.previous = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        tqdm.write("Finishing this iteration, then saving. Ctrl-C once more stops at once, without saving.",
                   file=sys.stderr)

    def shared(self, device):
        """The signal that any process got, or None. Of several, all must ask, and all hear it an iteration late.

        So none waits for the others while it could queue work for its card.
        """
        if world_size() == 1:
            return self.signal
        asked = to_device(np.array([self.signal or 0]), device)
        heard, self.heard = self.heard, start_reading(across(asked, dist.ReduceOp.MAX))
        return max(heard()) or None

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Run:
    """One training run: what it learns with, how far it is, and how it is saved."""

    def __init__(self, preset, model_config, config, corpus, contents=None, model=None):
        """`contents` of a ckpt.pt to go on with, or the `model` to begin with; with neither, a new one."""
        self.preset, self.config, self.corpus = preset, config, corpus
        self.out_dir = Path(config.out_dir)
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        if not (contents or model):
            check_memory(model_config)
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")
        self.model = (build_model(contents, self.out_dir / "ckpt.pt") if contents
                      else model or GPT(model_config)).train().to(self.device)
        self.model.checkpoint_activations = config.checkpoint_activations
        self.optimizer = make_optimizer(self.model, config)
        self.can_record = can_record(self.device, config)
        self.set_compiled(config.compile == "on" or (world_size() > 1 and config.compile == "auto"
                                                     and can_compile(self.device)))
        self.scaler = make_scaler(self.device, self.dtype)
        self.progress, self.skipped_in_a_row, self.outcomes = Progress(), 0, []
        if contents:
            self.restore(contents)
        if rank() > 0:  # dropout of its own; the first process goes on with the saved state
            torch.manual_seed(config.seed + rank() + 1000 * self.progress.iter)
        self.loader = TokenLoader(corpus.train, model_config.block_size, config.seed, config.align_stories)
        self.validation = Validation(corpus, model_config.block_size, config.eval_tokens, config.align_stories)

    def restore(self, contents):
        try:
            self.optimizer.load_state_dict(contents["optimizer"])
            self.scaler.load_state_dict(contents["scaler"])
            self.progress = Progress(**contents["progress"])
            torch.set_rng_state(contents["rng"])
            if self.device.type == "cuda" and contents["cuda_rng"] is not None:
                torch.cuda.set_rng_state(contents["cuda_rng"], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # whatever has the wrong form
            raise UserError(f"the training state in {self.out_dir / 'ckpt.pt'} is damaged ({first_line(error)}): start "
                            "anew with --overwrite; its weights can still be used by chat.py.") from error

    def check_finite(self):
        """A checkpoint with NaN must never replace a good one: the update after the last loss may have made it."""
        moments = (value for member in self.optimizer.members for entry in member.state.values()
                   for value in entry.values())
        if not (all_finite(self.model.parameters()) and all_finite(moments)):
            raise UserError(loss_advice(self, f"the update of iteration {self.progress.iter} made weights or moments "
                                        "that are not finite; they were not saved"))

    def save(self):
        """Write ckpt.pt, from which a resumed run goes on as if it had never stopped."""
        self.check_finite()
        if rank() > 0:
            return
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        save_checkpoint(self.out_dir / "ckpt.pt", self.model, self.corpus.tokenizer.model_bytes,
                        optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                        rng=torch.get_rng_state(), cuda_rng=cuda_rng, **self.described())

    def save_best(self):
        """Write best.pt, for chatting: weights and tokenizer, without what only resuming needs."""
        save_checkpoint(self.out_dir / "best.pt", self.model, self.corpus.tokenizer.model_bytes, **self.described())

    def described(self):
        return dict(preset=self.preset, train_config=asdict(self.config), corpus=corpus_identity(self.corpus),
                    progress=asdict(self.progress))

    def final_validation(self):
        config = self.config
        return Validation(self.corpus, self.model.config.block_size, config.final_eval_tokens, config.align_stories)

    def prepare_batches(self, log):
        """Settle the micro-batch size and with it the number of micro-batches in an iteration."""
        size = self.config.batch_size
        if size == "auto":
            size = fitting_batch_size(self)
            log.say(f"--batch-size auto found that micro-batches of {size} fit.")
        self.batch_size = size
        self.count = accumulation_steps(self.config, self.model.config.block_size, size)

    def halve_batch(self, log):
        """After running out of memory: halve the micro-batch if it was ours to choose, else say what to type."""
        sizes = [size for size in batch_sizes(self.config, self.model.config.block_size) if size < self.batch_size]
        if self.config.batch_size != "auto" or not sizes or world_size() > 1:
            smaller = f"--batch-size {sizes[-1]}" if sizes else "a shorter --block-size or --checkpoint-activations"
            again = " --resume" if (self.out_dir / "ckpt.pt").exists() else ""
            raise UserError(f"out of memory with micro-batches of {self.batch_size} x {self.model.config.block_size} "
                            f"tokens: use {smaller} (or --batch-size auto) and run `python train.py{again}` with it; "
                            "learning stays the same.")
        log.say(f"Out of memory: going on with micro-batches of {sizes[-1]} instead of {self.batch_size}; "
                "an iteration stays the same.")
        self.batch_size = sizes[-1]
        self.count = accumulation_steps(self.config, self.model.config.block_size, self.batch_size)

    def set_compiled(self, compiled):
        """Run the model, and Muon's arithmetic, through torch.compile or not."""
        self.forward, self.compiled = torch.compile(self.model) if compiled else self.model, compiled
        if world_size() > 1:
            self.forward = DistributedDataParallel(self.forward)
        for member in self.optimizer.members:
            if isinstance(member, Muon):
                member.update = torch.compile(muon_update) if compiled else muon_update
        self.forget_passes()

    def forget_passes(self):
        """Record anew at the next iteration, where recording is the way, and give back the memory that it held."""
        self.passes = RecordedPasses() if self.can_record and not self.compiled else run_passes
        if self.passes is not run_passes:
            torch.cuda.empty_cache()

    def iteration(self, log):
        """Queue one update, whose outcome `settle` waits for. Falls back where memory runs out or compiling fails."""
        while True:
            try:
                batches = self.loader.micro_batches(self.progress.iter, self.batch_size, self.count, self.device,
                                                    rank(), world_size())
                return self.outcomes.append(train_step(self.forward, self.model, batches, self.count, self.optimizer,
                                                       self.scaler, self.config, self.device, self.dtype, self.passes))
            except torch.OutOfMemoryError:
                failure = None
            except Exception as error:  # whatever a compiler raises; TritonMissing comes only here, at the first call
                if self.passes is run_passes and not self.compiled:
                    raise
                failure = first_line(error)
            recorded = self.passes is not run_passes
            self.can_record = self.can_record and not recorded
            self.start_iteration_again()
            if recorded:
                log.say(f"Recording a CUDA graph does not work here ({failure or 'out of memory'}): "
                        "going on without one.")
            elif failure is None:
                self.halve_batch(log)
            else:
                log.say(f"torch.compile does not work here ({failure}): going on without it.")
                self.set_compiled(False)

    def settle(self, under_way=0):
        """Take the outcomes of all but the last `under_way` iterations into the progress; their last gradient norm."""
        norm = None
        while len(self.outcomes) > under_way:
            it, outcome = self.progress.iter + 1 - len(self.outcomes), self.outcomes.pop(0)
            try:
                loss, norm, skipped = outcome()
            except LossNotFinite:
                raise UserError(loss_advice(self, f"the loss or its gradient is no longer finite at iteration {it}; "
                                            "nothing was changed by it")) from None
            self.progress.loss_sum += loss
            self.progress.loss_count += 1
            self.progress.skipped += skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if self.skipped_in_a_row > SKIPS_IN_A_ROW:
                raise UserError(loss_advice(self, f"{self.skipped_in_a_row} iterations in a row, up to {it}, had an "
                                            "infinite gradient and changed nothing"))
        return norm

    def start_iteration_again(self):
        """Forget a half-done iteration. A scaler remembers that it has unscaled, so it is made anew from its state."""
        self.optimizer.zero_grad()
        state = self.scaler.state_dict()
        self.scaler = make_scaler(self.device, self.dtype)
        self.scaler.load_state_dict(state)
        self.forget_passes()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def evaluate(self, log, validation):
        """Log one evaluation line, print a story, and keep the weights if they are the best so far."""
        self.forget_passes()
        result = evaluate(self.model, validation, self.batch_size, self.device, self.dtype)
        log.write(self.progress, **result)
        if not math.isfinite(result["val_loss"]):
            raise UserError(loss_advice(self, "the validation loss is no longer finite at iteration "
                                        f"{self.progress.iter}; these weights were not saved"))
        loss, floor = result["val_loss"], result.get("floor")
        line = f"iter {self.progress.iter}: validation loss {loss:.4f}, {result['val_bpb']:.4f} bits a byte"
        if floor:
            line += f", {100 * (loss / floor - 1):.1f}% above the floor of {floor:.4f}"
        log.say(line)
        if self.progress.iter and self.config.sample_tokens:
            log.say("  " + sample_story(self.model, self.corpus.tokenizer, self.config.sample_tokens,
                                        self.config.seed + self.progress.iter, self.device).strip())
        if self.progress.iter and result["val_loss"] < self.progress.best_val:
            self.progress.best_val = result["val_loss"]
            self.check_finite()
            if rank() == 0:
                self.save_best()


def check_memory(model_config):
    """UserError for a model whose weights, gradients and one moment alone are more than this computer's memory."""
    with torch.device("meta"):
        need = 12 * GPT(model_config).count_parameters()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > there:
            raise UserError(f"a model of {need // 12:,} parameters needs {need / 2**30:,.0f} GiB to train, and this "
                            f"computer has {there / 2**30:,.0f}: use a smaller --n-layer, --n-embd or "
                            "--intermediate-size.")


def worth_compiling(run, seconds_left):
    """auto compiles only where it can work, and where the run is long enough to win back the half minute it takes."""
    wanted = run.config.compile == "auto" and not run.compiled
    return wanted and seconds_left > COMPILE_WORTH_SECONDS and can_compile(run.device)


def can_compile(device):
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def can_record(device, config):
    """Not where blocks are recomputed, which looks at the random state, nor where processes talk in between."""
    return device.type == "cuda" and not config.checkpoint_activations and world_size() == 1


def train(run, log):
    """Run iterations until max_iters or a request to stop; returns the signal that asked, or None."""
    config, progress = run.config, run.progress
    first, saved_at, saving, stopped_by = progress.iter, time.monotonic(), 0.0, None
    with StopRequest() as stop:
        if progress.iter == 0:
            run.evaluate(log, run.validation)
        while progress.iter < config.max_iters and not stopped_by:
            share = learning_rate_share(progress.iter, config)
            run.optimizer.set_share(share)
            started = time.perf_counter()
            run.iteration(log)
            progress.iter += 1
            last = progress.iter == config.max_iters
            reported = progress.iter % config.log_interval == 0 or last
            evaluated = progress.iter % config.eval_interval == 0 or last
            stopped_by = stop.shared(run.device)
            since = time.monotonic() - saved_at
            saved = (stopped_by or last or since > 60 * config.save_minutes
                     or (evaluated and since > saving / SAVE_SHARE))
            # The iteration before is looked at while the device works on this one; this one where it must be known now.
            norm = run.settle(0 if reported or saved else 1)
            each = time.perf_counter() - started
            progress.seconds += each
            if progress.iter == first + 4 and worth_compiling(run, each * (config.max_iters - progress.iter)):
                run.set_compiled(True)
            if reported:
                log.training(progress, peak_lr(config) * share, norm, run.scaler.get_scale(), run.device)
                progress.loss_sum, progress.loss_count = 0.0, 0
            if evaluated:
                run.evaluate(log, run.final_validation() if last else run.validation)
            if saved:
                saved_at = time.monotonic()
                run.save()
                saving = time.monotonic() - saved_at
        return stopped_by


def loss_advice(run, happened):
    """What happened when numbers stopped being finite, and what to do."""
    good = run.out_dir / ("best.pt" if (run.out_dir / "best.pt").exists() else "ckpt.pt")
    lr_flag = "muon-learning-rate" if run.config.optimizer == "muon" else "learning-rate"
    kept = f"The last good checkpoint is {good}. " if good.exists() else ""
    return (f"{happened}. {kept}"
            f"Train again with a lower rate, --{lr_flag} {peak_lr(run.config) / 2:g}, or with "
            "--dtype float32 (bfloat16 on RTX 30 and newer), and --overwrite or another --out-dir.")


# Before the first iteration.

def fitting_batch_size(run):
    """The largest micro-batch that divides an iteration and fits: sizes are tried upwards, never past the card.

    Windows does not report an overfull card, it swaps and crawls; so a size is tried only if the two before promise it.
    """
    sizes = batch_sizes(run.config, run.model.config.block_size)
    if not sizes or run.device.type != "cuda":
        return max([size for size in sizes if size <= 32], default=32)
    moments = 0 if run.progress.iter else 8 * run.model.count_parameters()  # AdamW's two come with the first step
    room = 0.9 * card_memory(run.device) - moments
    fits, peaks = sizes[0], []
    for size in sizes:
        if len(peaks) > 1:
            (a, peak_a), (b, peak_b) = peaks[-2:]
            if peak_b + (peak_b - peak_a) / (b - a) * (size - b) > room:
                break
        try:
            peaks.append((size, probe_memory(run, size)))
        except torch.OutOfMemoryError:
            break
        finally:
            run.optimizer.zero_grad()
            torch.cuda.empty_cache()
        if peaks[-1][1] > room:
            break
        fits = size
    return fits


def card_memory(device):
    """Bytes of the card that this process may take in all: what it has, and what is free."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free + torch.cuda.memory_reserved(device),
               total * torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device()))


def probe_memory(run, batch_size):
    """Peak bytes of one forward and backward pass, eager; leaves the random state as it was."""
    torch.cuda.reset_peak_memory_stats(run.device)
    tokens = torch.randint(run.model.config.vocab_size, (batch_size, run.model.config.block_size + 1),
                           generator=torch.Generator().manual_seed(0)).to(run.device)
    with torch.random.fork_rng(devices=[run.device]), autocast(run.device, run.dtype):
        run_passes(run.model, tokens[:, :-1], tokens[:, 1:], 1, run.scaler, run.device)
    return torch.cuda.max_memory_allocated(run.device)


def expected_memory(model_config, config, batch_size, dtype, compiled):
    """Peak bytes of training on CUDA by part, as a dict. Fitted to measurements on an H100: within a tenth there.

    Counted are the tensors that autograd keeps per token. Compiling saves the float32 copies of the logits and, in the
    MLP, all but the output of its first matrix.
    """
    C, V, layers = model_config.n_embd, model_config.vocab_size, model_config.n_layer
    with torch.device("meta"):
        model = GPT(model_config)
    weights = model.count_parameters()
    matrices = sum(w.numel() for name, w in model.named_parameters() if name.startswith("blocks") and w.dim() == 2)
    size = dtype.itemsize
    stream = 8 * C  # block input, ln_1, queries, keys, values, attention, middle, ln_2
    stream += 2 * C * ((model_config.position == "rotary") + model_config.qk_norm)  # queries and keys once more
    mlp = model_config.intermediate_size * (2 if compiled else 4)  # gate, up; eager also keeps silu(gate), product
    per_layer = size * (stream + mlp) + (2 * C if model_config.dropout else 0)  # dropout keeps a mask of bytes
    logits = V * (2 * size if compiled else 12)  # eager: log-probabilities and two gradients of theirs, in float32
    kept = layers * per_layer
    if config.checkpoint_activations:  # a block's inside is there again only after the logits have gone
        kept = layers * size * C + max(0, per_layer - logits)
    tokens = batch_size * model_config.block_size
    moments = 8 * weights - (4 * matrices if config.optimizer == "muon" else 0)
    return {"weights": 4 * weights, "gradients": 4 * weights, "optimizer": moments,
            "half-precision weights": 0 if dtype is torch.float32 else size * weights,
            "activations": tokens * (kept + 3 * size * C), "logits": tokens * logits, "workspace": WORKSPACE}


def dtype_on_cuda(run):
    """The dtype of a run on its CUDA card, or on the one that a plan made elsewhere is for."""
    return run.dtype if run.device.type == "cuda" or run.config.dtype != "auto" else torch.float16


def print_plan(run, log):
    """What this run would take: memory by part, and on a GPU the measured peak and hours of a few iterations."""
    config, model_config = run.config, run.model.config
    on_cuda = run.device.type == "cuda"
    dtype = dtype_on_cuda(run)
    compiled = config.compile == "on" or (config.compile == "auto" and (not on_cuda or can_compile(run.device)))
    parts = expected_memory(model_config, config, run.batch_size, dtype, compiled)
    how = "compiled" if compiled else "eager"
    log.say(f"Expected memory on a CUDA card ({str(dtype)[6:]}, {how}, micro-batches of {run.batch_size}):")
    for name, size in parts.items():
        log.say(f"  {name:<24}{size / 2**20:8,.0f} MiB")
    log.say(f"  {'together':<24}{sum(parts.values()) / 2**20:8,.0f} MiB")
    if not on_cuda:
        log.say("No CUDA card here, so nothing was measured. Run this again on the machine that trains.")
        return
    if compiled and not run.compiled:
        run.set_compiled(True)
    torch.cuda.reset_peak_memory_stats(run.device)
    seconds = []
    for _ in range(PLAN_ITERS):
        started = time.perf_counter()
        run.iteration(log)
        run.progress.iter += 1
        run.settle(under_way=1)
        seconds.append(time.perf_counter() - started)
    each = sorted(seconds)[len(seconds) // 2]
    peak = torch.cuda.max_memory_allocated(run.device)
    log.say(f"Measured over {PLAN_ITERS} iterations: peak {peak / 2**20:,.0f} MiB, "
            f"{thousands(config.tokens_per_iter / each)} tokens/s, so {config.max_iters:,} iterations take "
            f"{duration(each * config.max_iters)} plus evaluations. Nothing was saved.")


def own(out_dir):
    """Keep every other training out of `out_dir` until this command ends; of several processes the first does it."""
    if int(os.environ.get("RANK", 0)) == 0:
        click.get_current_context().with_resource(sole_owner(out_dir, "training"))


def check_out_dir(out_dir, resume, overwrite):
    """Refuse to train over an earlier run unless told to; a log without a checkpoint is not one."""
    if not (resume or overwrite) and any((out_dir / name).exists() for name in ("ckpt.pt", "best.pt")):
        go_on = "go on with it by --resume, " if (out_dir / "ckpt.pt").exists() else ""
        raise UserError(f"{out_dir} already holds a run: {go_on}replace it by --overwrite, or keep both with another "
                        "--out-dir.")


def describe(run, log):
    """The facts of the run before it starts, in a few lines."""
    model, config, stream = run.model.config, run.config, run.corpus.train
    count, tokens = run.model.count_parameters(), config.max_iters * config.tokens_per_iter
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.say(f"Model: {run.preset}, {count / 1e6:.2f} M parameters ({count * 4 / 2**20:.1f} MB in float32), "
            f"{model.position} positions, context {model.block_size}, vocabulary {model.vocab_size}.")
    scaled = " with a GradScaler" if run.scaler.is_enabled() else ""
    log.say(f"Device: {run.device} ({name}), {str(run.dtype)[6:]}{scaled}.")
    if run.device.type == "cpu" and cuda_hint():
        log.say(f"Warning: {cuda_hint()}Training goes on, slowly, on the CPU.")
    epochs = tokens / len(stream)
    log.say(f"Plan: {config.max_iters:,} iterations of {config.tokens_per_iter:,} tokens ({run.count} micro-batch"
            f"{'es' if run.count > 1 else ''} of {run.batch_size} x {model.block_size}), "
            f"{tokens / 1e6:,.1f} M tokens in all, {epochs:.1f} epochs of the "
            f"{len(stream) / 1e6:,.2f} M training tokens in {config.data_dir}.")
    if epochs > MANY_EPOCHS:
        enough = max(1, round(MANY_EPOCHS * len(stream) / config.tokens_per_iter))
        log.say(f"Warning: past about {MANY_EPOCHS} epochs a model learns its stories by heart. Prepare more of them "
                f"(larger --num-files and --sample-rate), or stop earlier: --max-iters {enough}.")


def write_config(run):
    """config.json: the resolved settings, for people and for plot_loss.py."""
    settings = dict(preset=run.preset, model=asdict(run.model.config), train=asdict(run.config),
                    corpus=dict(source=run.corpus.meta["source"], vocab_size=run.corpus.tokenizer.vocab_size,
                                train_tokens=len(run.corpus.train), validation_tokens=len(run.corpus.val)))
    with replacing(run.out_dir / "config.json", "w") as file:
        json.dump(settings, file, indent=2)


def begin_folder(run, log, overwrite):
    """What changes in the folder once nothing can be refused any more: an old run goes, the log is cut, config.json."""
    if overwrite:
        for name in ("ckpt.pt", "best.pt"):
            (run.out_dir / name).unlink(missing_ok=True)
    log.keep_until(run.progress.iter)
    write_config(run)


@click.command(cls=GroupedCommand, context_settings=COMMAND_LINE)
@click.option("--preset", type=click.Choice(list(PRESETS)),
              help="settings by purpose; the defaults below are those of rtx3050")
@click.option("--resume", is_flag=True, help="go on with the run in --out-dir")
@click.option("--init-from", type=click.Path(path_type=Path), metavar="FILE",
              help="begin with the weights of a checkpoint, on text prepared with its tokenizer (preprocess.py "
              "--tokenizer)")
@click.option("--overwrite", is_flag=True, help="replace the run in --out-dir")
@click.option("--plan", is_flag=True, help="train nothing; print size, memory and duration")
@setting_options(GPTConfig, TrainConfig)
def main(preset, resume, init_from, overwrite, plan, **given):
    """Train a GPT on the corpus that preprocess.py prepared.

    Writes ckpt.pt (to go on with --resume), best.pt (for chat.py), metrics.jsonl (for plot_loss.py) and config.json
    into --out-dir. Ctrl-C saves and stops.
    """
    sys.stdout.reconfigure(errors="replace")  # a console that is not UTF-8 shows ? for what it cannot
    given = {name: value for name, value in given.items() if value is not None}
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite deletes it: choose one.")
    if resume and init_from:
        raise click.UsageError("--resume goes on with a run as it was, --init-from begins a new one: choose one.")
    out_dir = Path(given.get("out_dir", TrainConfig.out_dir))
    if init_from and overwrite and init_from.resolve().parent == out_dir.resolve():
        raise UserError(f"--overwrite would delete {init_from}, where the run begins: pass another --out-dir.")
    if resume and not plan and out_dir.is_dir():
        own(out_dir)  # before reading what another training may be about to replace
    contents = read_run(out_dir / "ckpt.pt") if resume else None
    initial = read_checkpoint(init_from) if init_from else None
    data_dir = given.get("data_dir") or (restore(TrainConfig, contents["train_config"], out_dir / "ckpt.pt").data_dir
                                         if resume else TrainConfig.data_dir)
    corpus = preprocess.open_corpus(data_dir)
    if resume:
        preset, model_config, config = resumed_settings(contents, preset, given, corpus, out_dir / "ckpt.pt")
    else:
        if init_from:
            preset, model_config, config = settings_from(initial, preset, given, corpus, init_from)
        else:
            preset = preset or "rtx3050"
            model_config, config = fresh_settings(preset, given, corpus)
        if not plan:
            own(out_dir)
            check_out_dir(out_dir, resume, overwrite)
    config = replace(config, device=join_world(config.device))
    model = init_from and build_model(initial | dict(model_config=asdict(model_config)), init_from)
    config = replace(config, data_dir=str(data_dir), out_dir=str(out_dir))
    run = Run(preset, model_config, config, corpus, contents, model)
    contents = initial = model = None  # the optimizer has its copy; on a small card the room is needed
    if run.progress.iter >= config.max_iters:
        raise UserError(f"the run in {out_dir} has finished its {run.progress.iter} iterations: talk to it with "
                        f"`python chat.py --out-dir {out_dir}`, or go on with a larger --max-iters.")
    log = Log(None if plan else out_dir / "metrics.jsonl", run.config, run.progress)
    run.prepare_batches(log)
    describe(run, log)
    if plan:
        log.bar.close()
        return print_plan(run, log)
    if rank() == 0:
        begin_folder(run, log, overwrite)
    stopped_by = train(run, log)
    log.bar.close()
    where = "" if str(out_dir) == TrainConfig.out_dir else f" --out-dir {out_dir}"
    if stopped_by:
        log.say(f"Stopped and saved at iteration {run.progress.iter}. Go on with: python train.py --resume{where}")
        sys.exit(128 + stopped_by)
    log.say(f"Finished: best validation loss {run.progress.best_val:.4f}. Talk to it: python chat.py{where}")
    log.say(f"See its loss curve: python plot_loss.py{where}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
