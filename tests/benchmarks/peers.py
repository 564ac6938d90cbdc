"""nanoGPT's and smolGPT's models and settings with our data and clock; started by common.run_peer as peers.py JOB."""

import ast
import importlib.util
import json
import math
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import common
import numpy as np
import torch

import train
from data import Corpus, Validation, to_device
from model import autocast, choose_device, choose_dtype

SHAPE = dict(block_size=256, n_layer=6, n_head=6, n_embd=384)
TINY_SHAPE = dict(block_size=common.TINY_BLOCK, n_layer=2, n_head=2, n_embd=32)
SETTINGS = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "weight_decay", "beta1", "beta2", "grad_clip",
            "dropout", "tokens_per_iter")


def load_file(name, path):
    """A file of another checkout as the module `name`; the compiler looks for its globals under that name."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give --{name.split('_')[0]} the folder of a checkout")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_model(name, folder, shape, vocab_size, dropout):
    """Their GPT in our shape. smolGPT's model.py imports a config of its own, in place of ours."""
    ours, config = sys.modules["config"], folder / "config.py"
    if config.exists():
        sys.modules["config"] = load_file(f"{name}_config", config)
    try:
        module = load_file(f"{name}_model", folder / "model.py")
    finally:
        sys.modules["config"] = ours
    values = dict(shape, vocab_size=vocab_size, dropout=dropout, bias=False)
    if name == "smolgpt":
        values["n_embed"] = values.pop("n_embd")
    return module.GPT(module.GPTConfig(**values))


def peer_settings(name, folder):
    """Their own values: nanoGPT's train.py, in the case of nanogpt_char under its config for a model of this size."""
    if name == "smolgpt":
        config = load_file("smolgpt_config", folder / "config.py")
        values = asdict(config.GPTConfig()) | asdict(config.TrainingConfig())
    else:
        values = assigned(folder / "train.py")
        if name == "nanogpt_char":
            values |= assigned(folder / "config" / "train_shakespeare_char.py")
    values["tokens_per_iter"] = values["gradient_accumulation_steps"] * values["batch_size"] * values["block_size"]
    return {key: values[key] for key in SETTINGS}


def assigned(path):
    """The names that a script sets to plain values at its top level; the script is not executed."""
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
        self.device, self.dtype, self.settings, self.block_size = choose_device(), dtype, settings, shape["block_size"]
        self.batch_size = max(1, min(batch_size, settings["tokens_per_iter"] // self.block_size))
        self.accum_steps = max(1, round(settings["tokens_per_iter"] / (self.batch_size * self.block_size)))
        self.tokens_per_iter = self.accum_steps * self.batch_size * self.block_size
        self.stream = np.concatenate(corpus.train.shards)
        torch.manual_seed(1337)
        self.model = load_model(name, folder, shape, corpus.tokenizer.vocab_size, settings["dropout"]).to(self.device)
        self.optimizer = self.model.configure_optimizers(
            settings["weight_decay"], settings["learning_rate"], (settings["beta1"], settings["beta2"]),
            self.device.type)
        self.scaler = torch.amp.GradScaler(self.device.type,
                                           enabled=dtype is torch.float16 and self.device.type == "cuda")
        self.forward = torch.compile(self.model) if compiled else self.model
        self.batch = self.get_batch()

    def get_batch(self):
        """(x, y), each (batch_size, block_size), at random positions of the training stream."""
        starts = torch.randint(len(self.stream) - self.block_size, (self.batch_size,)).numpy()
        rows = self.stream[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return tuple(to_device(part.copy(), self.device) for part in (rows[:, :-1], rows[:, 1:]))

    def iteration(self):
        for _ in range(self.accum_steps):
            with autocast(self.device, self.dtype):
                _, loss = self.forward(*self.batch)
            self.batch = self.get_batch()
            self.scaler.scale(loss / self.accum_steps).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["grad_clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, first, count, learning_rate=None):
        """Seconds of `count` iterations from number `first` on; `learning_rate`: function of (iteration, settings)."""
        started = time.perf_counter()
        for it in range(first, first + count):
            if learning_rate:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(it, self.settings)
            self.iteration()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def bits_per_byte(self, validation):
        """train.py's own evaluation; their models return (logits, loss)."""
        model = LossOnly()
        model.peer = self.model
        return train.estimate_loss(model, validation, min(64, self.batch_size), self.device, self.dtype)["val_bpb"]

    def peak_mib(self):
        return torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else None


class LossOnly(torch.nn.Module):
    def forward(self, x, y):
        return self.peer(x, y)[1]


def learning_rate(it, settings):
    """Both peers' schedule: linear warmup, cosine to min_lr, then min_lr."""
    peak, low, warmup = settings["learning_rate"], settings["min_lr"], settings["warmup_iters"]
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    done = min(1.0, (it - warmup) / (settings["lr_decay_iters"] - warmup))
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (peak - low)


def measure_speed(job, corpus, shape, settings, device):
    """Tokens per second: the median of five blocks after the warmup, as many iterations as a log line of ours."""
    settings |= dict(tokens_per_iter=job["tokens_per_iter"])
    peer = Peer(job["name"], Path(job["folder"]), corpus, shape, settings, job["batch_size"],
                choose_dtype("auto", device), job["compiled"])
    warmup = peer.train(0, 3 * job["log_interval"])
    rate = job["log_interval"] * peer.tokens_per_iter / statistics.median(
        peer.train(0, job["log_interval"]) for _ in range(5))
    start = max(0.0, warmup - 3 * job["log_interval"] * peer.tokens_per_iter / rate)
    return dict(tokens_per_second=round(rate), peak_mib=peer.peak_mib(), start_seconds=round(start, 2))


def measure_learning(job, corpus, shape, settings, device):
    """Train by their own settings until the target, the tokens or the seconds are reached."""
    deadline = time.monotonic() + job["seconds"]
    dtype = torch.float32
    if device.type == "cuda":  # both say bfloat16, and nanoGPT float16 where the GPU has none
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if job["tiny"]:
        settings["tokens_per_iter"] = 1024
    peer = Peer(job["name"], Path(job["folder"]), corpus, shape, settings, job["batch_size"], dtype, job["compiled"])
    validation = Validation(corpus, peer.block_size, job["eval_tokens"], align_stories=False)
    iters, seconds, curve, more = 0, 0.0, [], max(1, round(job["eval_every"] / peer.tokens_per_iter))
    while not curve or (curve[-1][3] > job["target_bpb"] and curve[-1][1] < job["tokens"]
                        and time.monotonic() < deadline):
        seconds += peer.train(iters, more, learning_rate)
        iters += more
        curve.append([iters, iters * peer.tokens_per_iter, round(seconds, 3), peer.bits_per_byte(validation)])
    return dict(tokens=curve[-1][1], seconds=seconds, final_bpb=curve[-1][3], settings=settings, curve=curve,
                batch_size=peer.batch_size, dtype=str(dtype).removeprefix("torch."), peak_mib=peer.peak_mib())


def main(job):
    common.limit_memory(job["memory_gib"])
    torch.set_float32_matmul_precision("high")
    device = choose_device()
    job["compiled"] = job["compiled"] and device.type == "cuda"
    measure = measure_learning if "target_bpb" in job else measure_speed
    result = measure(job, Corpus(job["data_dir"]), TINY_SHAPE if job["tiny"] else SHAPE,
                     peer_settings(job["name"], Path(job["folder"])), device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    print("RESULT " + json.dumps(result | dict(device=name)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
