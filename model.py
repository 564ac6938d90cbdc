"""The network, generation and its sampling filters, the checkpoint file, and the choice of device and dtype.

Shapes: B sequences, T positions, C = n_embd, H heads, D = C / H, V = vocab_size, L layers, S tokens so far.
"""

import contextlib
import math
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from config import IGNORE_INDEX, GPTConfig, UserError, atomic_write, quoted, short_message

NORM_EPS = 1e-5  # written into exported configs; torch's default would be the machine epsilon of the dtype
ROPE_BASE = 10000.0
DRY_MAX_EXPONENT = 50  # the DRY penalty grows no further: by then it exceeds all logits


# -----------------------------------------------------------------------------
# The network

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019); the mean is taken in float32."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return rms_norm(x, self.weight)


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), NORM_EPS)


def precompute_rope(block_size, head_size):
    """Cosines and sines (2, block_size, D) of rotary positions, half-split layout (Su et al. 2021, as in Llama on HF).

    The sines of the first half are negated, which saves apply_rotary_emb a step.
    """
    frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2) / head_size)  # (D/2,)
    angles = torch.outer(torch.arange(block_size), frequencies)  # (block_size, D/2)
    return torch.stack([angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)])


def apply_rotary_emb(x, rope):
    """Rotate each pair (i, i + D/2) of the last dimension of x (..., T, D) by the angle of its position, in float32."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([b, a], dim=-1) * sin).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        head_size = config.n_embd // config.n_head
        self.q_norm = RMSNorm(head_size) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_size) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rotary_emb(q, rope), apply_rotary_emb(k, rope)
        if cache is not None:
            cache.keys[self.layer, :, :, :T], cache.values[self.layer, :, :, :T] = k, v
        # No dropout on the attention weights: measured, it costs a third of the speed and 0.01 bits per byte.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate) * up), with gate and up in one matrix."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=config.bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1)  # (B, T, intermediate_size) each
        return self.resid_dropout(self.c_proj(F.silu(gate) * up))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


def empty_embedding(rows, size):
    """An embedding whose weights GPT.init_weights or a checkpoint fills in."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


class GPT(nn.Module):
    """A pre-norm transformer decoder whose token embedding is also its output matrix."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.decode_step = None  # reused by the next call of generate: capturing it takes longer than a short reply
        self.wte = empty_embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = empty_embedding(config.block_size, config.n_embd) if learned else None
        rope = None if learned else torch.empty(2, config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rope", rope, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd)
        if not self.wte.weight.is_meta:  # drawing weights on the meta device would make torch load its compiler: 2 s
            self.init_weights()

    def init_weights(self):
        """Embeddings N(0, 0.01), matrices N(0, 0.02), both projections that write the residual and all biases 0.

        Blocks that start as the identity allow a higher learning rate (GPT-2 scales the projections down instead).
        """
        for name, weight in self.named_parameters():
            if name.endswith(("c_proj.weight", "bias")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.01 if name in ("wte.weight", "wpe.weight") else 0.02)
        self.init_rope()

    def init_rope(self):
        if self.rope is not None:
            self.rope = precompute_rope(self.config.block_size, self.config.n_embd // self.config.n_head)

    def forward_hidden(self, idx, cache=None):
        """Final hidden states (B, T, C) of the tokens idx (B, T); a cache is filled with their keys and values."""
        T = idx.shape[1]
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[:T]
        rope = None if self.rope is None else self.rope[:, :T]
        x = self.drop(x)
        if torch.is_autocast_enabled(x.device.type):
            # autocast leaves embeddings in float32; a half-precision residual stream is faster and half as large
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = recompute(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        if cache is not None:
            cache.length = T
        return self.ln_f(x)

    def lm_head(self, x):
        """Logits (..., V) of the next token for hidden states (..., C)."""
        return F.linear(x, self.wte.weight)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for idx (B, T); with targets (B, T), their mean loss in nats, IGNORE_INDEX left out."""
        logits = self.lm_head(self.forward_hidden(idx))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1),
                               ignore_index=IGNORE_INDEX)

    def count_parameters(self):
        return sum(weight.numel() for weight in self.parameters())

    @torch.inference_mode()
    def generate(self, idx, sampling, eos_id, generator=None):
        """Continue the prompts idx (B, S) in evaluation mode: yield a (B,) tensor of ids, on the CPU, for each step.

        A row ends at eos_id, which is not yielded: from then on it yields -1. The generator ends with the last row.
        When the window of block_size tokens is full, its last half is read again as the start of a new one, so at least
        block_size / 2 tokens of context remain.
        """
        step, self.decode_step = self.decode_step, None  # taken out: two generations must not share a cache
        if step is None or step.key != DecodeStep.make_key(self, len(idx)):
            step = DecodeStep(self, len(idx))
        cache, block_size = step.cache, self.config.block_size
        cache.length, next_ids = 0, idx[:, -block_size:]
        finished = torch.zeros(len(idx), dtype=torch.bool)
        try:
            for _ in range(sampling.max_new_tokens):
                if cache.length + next_ids.shape[1] > block_size:
                    cache.length, next_ids = 0, idx[:, -(block_size // 2):]
                if next_ids.shape[1] == 1:
                    logits = step(next_ids[:, 0])  # (B, V)
                else:
                    logits = self.lm_head(self.forward_hidden(next_ids, cache)[:, -1])
                next_ids = sample_next_token(logits, idx, sampling, eos_id, generator).unsqueeze(1)  # (B, 1)
                idx = torch.cat([idx, next_ids], dim=1)
                is_finite = logits.isfinite().all()
                output = next_ids[:, 0].masked_fill(~is_finite, -1).cpu()  # the only host sync
                if (output < 0).any():
                    raise UserError("the logits are not finite, so there is no next token: use --dtype float32, or "
                                    "another checkpoint.")
                finished |= output == eos_id
                if finished.all():
                    return
                yield output.masked_fill(finished, -1)
        finally:
            self.decode_step = step


class TrainingLoss(nn.Module):
    """What train.py minimises: the loss on the text, or a mixture with that against the predictions of a teacher.

    The teacher is a GPT in evaluation mode, whose weights do not learn (born-again networks, Furlanello et al. 2018).
    """

    def __init__(self, model, teacher=None, teacher_weight=0.0):
        super().__init__()
        self.model, self.teacher, self.teacher_weight = model, teacher, teacher_weight

    def forward(self, idx, targets):
        """(loss to minimise, loss on the text alone) in nats, for idx and targets (B, T)."""
        if self.teacher is None:
            loss = self.model(idx, targets)
            return loss, loss
        with torch.no_grad():
            probabilities = self.teacher(idx).float().softmax(-1).flatten(0, 1)  # (B T, V)
        logits = self.model(idx).float().flatten(0, 1)
        text_loss = F.cross_entropy(logits, targets.flatten())
        loss = torch.lerp(text_loss, F.cross_entropy(logits, probabilities), self.teacher_weight)
        return loss, text_loss.detach()


# -----------------------------------------------------------------------------
# One step of generation

class KVCache:
    """Keys and values (L, B, H, block_size, D) of the first `length` positions."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.length = 0


class DecodeStep:
    """Reads one token per story and returns the logits of the next: GPT.forward as a straight line of fixed shapes.

    It computes what GPT.forward computes, and a test compares them. On a CPU half of the time of GPT.forward is spent
    between its operations. On CUDA the step is captured once as a graph and replayed, in a fraction of the time that
    launching its hundred kernels one by one takes.
    """

    def __init__(self, model, batch_size):
        weight = model.wte.weight
        self.model, self.key = model, self.make_key(model, batch_size)
        self.cache = KVCache(model.config, batch_size, weight.device, weight.dtype)
        self.token = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.positions = torch.arange(model.config.block_size, device=weight.device)
        # Looked up once: on a CPU the attributes of modules take a tenth of a step.
        self.layers = [(block.attn, block.ln_1.weight.data, weights_of(block.attn.c_attn, batch_size),
                        weights_of(block.attn.c_proj, batch_size), block.ln_2.weight.data,
                        weights_of(block.mlp.c_fc, batch_size), weights_of(block.mlp.c_proj, batch_size))
                       for block in model.blocks]
        self.lm_head = weights_of(model.wte, batch_size)
        self.graph = capture_graph(self.forward) if weight.is_cuda else None

    @staticmethod
    def make_key(model, batch_size):
        """Equal as long as a captured step is valid: it contains the addresses of the weights."""
        return batch_size, *((p.data_ptr(), p.dtype) for p in model.parameters())

    def forward(self):
        model, config, cache = self.model, self.model.config, self.cache
        x = F.embedding(self.token, model.wte.weight)  # (B, C)
        if model.wpe is not None:
            x = x + model.wpe.weight.index_select(0, self.position)
        rope = None if model.rope is None else model.rope.index_select(1, self.position)  # (2, 1, D)
        if x.is_cuda:  # a captured step always reads the whole cache, under a mask
            end, mask = config.block_size, torch.zeros(1, 1, 1, config.block_size, device=x.device, dtype=x.dtype)
            mask = mask.masked_fill(self.positions > self.position, -math.inf)
        else:
            end, mask = cache.length + 1, None
        for (attn, ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), keys, values in zip(
                self.layers, cache.keys, cache.values, strict=True):
            qkv = linear(rms_norm(x, ln_1), *c_attn).to(x.dtype)
            q, k, v = qkv.view(len(x), 3, config.n_head, 1, -1).unbind(1)  # (B, H, 1, D)
            if config.qk_norm:
                q, k = attn.q_norm(q), attn.k_norm(k)
            if rope is not None:
                q, k = apply_rotary_emb(torch.stack([q, k]), rope)
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            x = x + linear(y.reshape(x.shape), *attn_proj)
            gate, up = linear(rms_norm(x, ln_2), *c_fc).chunk(2, dim=-1)
            x = x + linear(F.silu(gate) * up, *mlp_proj)
        self.logits = linear(model.ln_f(x), *self.lm_head).float()  # (B, V)

    def __call__(self, token):
        """Logits (B, V) after `token` (B,), which follows what the cache holds."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.graph.replay() if self.graph else self.forward()
        self.cache.length += 1
        return self.logits


def weights_of(module, batch_size):
    """(weight, bias) of a module; for a single row the half-precision copies of prepare_for_inference, if any."""
    own = module.weight.data, getattr(module, "bias", None)
    # most CPUs multiply many half-precision rows slowly
    return getattr(module, "half_copy", own) if batch_size == 1 else own


def linear(x, weight, bias):
    return F.linear(x.to(weight.dtype), weight, bias)


def capture_graph(run):
    """A CUDA graph of the kernels that run() launches; torch.cuda.graph asks for a warmup on a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def move_weights(model, device, dtype):
    """Move a model to its device and round its weights to `dtype`."""
    model.to(device)
    for weight in model.parameters():  # not model.to(dtype): the rotary tables stay float32
        weight.data = weight.data.to(dtype)


def prepare_for_inference(model, device, dtype):
    """Move a model that will only generate to its device, with its weights rounded to `dtype`.

    On a CPU the weights stay float32 for prompts and batches; for a single row DecodeStep reads half-precision copies,
    which are half as much to read. One row times a matrix is fastest when the matrix lies column by column.
    """
    move_weights(model, device, dtype)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and dtype is not torch.float32:
                module.half_copy = [p if p is None else p.data for p in (module.weight, getattr(module, "bias", None))]
        for weight in model.parameters():
            weight.data = weight.data.float()
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()


# -----------------------------------------------------------------------------
# Sampling: pure functions of logits (B, V). A removed token gets -inf.

def penalize_repetition(logits, context, penalty, eos_id):
    """Divide positive and multiply negative logits of the tokens in context (B, S) (CTRL, Keskar et al. 2019).

    The end of the story is exempt, otherwise stories would grow with the window.
    """
    used = logits.gather(1, context)
    penalized = logits.scatter(1, context, used * torch.where(used > 0, 1 / penalty, penalty))
    penalized[:, eos_id] = logits[:, eos_id]
    return penalized


def apply_dry(logits, context, multiplier, base, allowed_length):
    """DRY (p-e-w, text-generation-webui #5677, 2024): penalise tokens that would extend a repeat of the end of context.

    A token after n repeated tokens loses multiplier * base ** (n - allowed_length) once n reaches allowed_length, for
    the longest such n; the exponent is at most DRY_MAX_EXPONENT.
    """
    if context.shape[1] < 2:
        return logits
    longest = min(allowed_length + DRY_MAX_EXPONENT, context.shape[1] - 1)  # R: longer repeats count as this
    before = F.pad(context[:, :-1], (longest - 1, 0), value=-1).unfold(1, longest, 1)  # (B, S-1, R) before each token
    same = before == context[:, None, -longest:]
    n = same.flip(2).int().cumprod(dim=2).sum(dim=2)  # (B, S-1): how many of them match the end of context
    growth = (base ** (n - allowed_length).float()).clamp(max=1e30)  # infinite penalties on all tokens would leave none
    penalty = torch.where(n >= allowed_length, multiplier * growth, 0.0)
    return logits - torch.zeros_like(logits).scatter_reduce(1, context[:, 1:], penalty, "amax")


def keep_top_k(logits, k):
    """Keep the k highest logits (Fan et al. 2018): exactly k, in case of ties those that torch.topk takes."""
    if k >= logits.shape[-1]:
        return logits
    values, tokens = logits.topk(k)
    return torch.full_like(logits, -math.inf).scatter(1, tokens, values)


def keep_top_p(logits, p):
    """Keep the fewest most likely tokens whose probabilities sum to p (nucleus sampling, Holtzman et al. 2020)."""
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = F.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))  # the sum that the more likely tokens already reach
    remove = (before >= p) & (before > 0)  # the most likely token stays, whatever p rounds to
    return logits.masked_fill(remove.scatter(1, order, remove), -math.inf)  # back in the order of the vocabulary


def keep_min_p(logits, min_p):
    """Keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def filter_logits(logits, context, sampling, eos_id):
    """Logits (B, V) after repetition penalty, DRY, temperature, top-k, top-p and min-p, in that order."""
    if sampling.repetition_penalty > 1:
        context_window = context[:, -sampling.repetition_window:]
        logits = penalize_repetition(logits, context_window, sampling.repetition_penalty, eos_id)
    if sampling.dry_multiplier > 0:
        logits = apply_dry(logits, context, sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length)
    if sampling.temperature > 0:
        logits = logits / max(sampling.temperature, 1e-6)  # smaller ones overflow, and are greedy anyway
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def sample_next_token(logits, context, sampling, eos_id, generator=None):
    """Draw the next token (B,) from logits (B, V) after the tokens of context (B, S); temperature 0 is greedy."""
    logits = filter_logits(logits.float(), context, sampling, eos_id)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    noise = torch.empty_like(logits).uniform_(generator=generator)
    # -log(noise) / p is exponential with rate p, and the one of token i is the smallest with probability p_i. Minus its
    # inverse, which is compared here, is the smallest for the same token.
    # (torch.multinomial draws the same way, but syncs with the device to check p, and is slower on a CPU.)
    return (logits.softmax(-1) / noise.log()).argmin(-1)


# -----------------------------------------------------------------------------
# The checkpoint file: tensors and plain types only, so that loading one never runs code from it

def save_checkpoint(path, model, tokenizer_bytes, **state):
    """Write everything needed for generation, and `state` for resuming, to `path` atomically."""
    tokenizer = torch.frombuffer(bytearray(tokenizer_bytes), dtype=torch.uint8)
    checkpoint = dict(model_config=asdict(model.config), model=model.state_dict(), tokenizer=tokenizer, **state)
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # on a full disk torch reports its own state; the system's reason is its context
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_checkpoint(path):
    """(model in evaluation mode, the dict that save_checkpoint wrote), on the CPU. UserError for any other file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: train a model with `python train.py`, or name another checkpoint.")
    try:
        with open(path, "rb") as file:  # one open file for both reads: a training may replace it in between
            if zipfile.ZipFile(file).testzip():  # torch.load ignores the checksums
                raise ValueError("a checksum does not match")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError("its contents are of another program")
        config = GPTConfig.from_dict(checkpoint["model_config"], path)
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("its weights are not finite")
        checkpoint["tokenizer"] = checkpoint["tokenizer"].numpy().tobytes()
    except UserError:
        raise
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise UserError(f"{path} is not a SmolerGPT checkpoint, or is damaged ({short_message(error)}): use another "
                        "one, or train again with `python train.py`.") from error
    model.init_rope()  # not saved; on the meta device it was only a shape
    return model.eval(), checkpoint


def find_checkpoint(out_dir):
    """The best.pt of a run, else its ckpt.pt."""
    for path in (Path(out_dir) / "best.pt", Path(out_dir) / "ckpt.pt"):
        if path.exists():
            return path
    if runs := [*Path(out_dir).glob("*/best.pt")]:
        newest = max(runs, key=lambda path: path.stat().st_mtime).parent
        raise UserError(f"no checkpoint in {out_dir}, but there is one in {newest}: pass --out-dir {quoted(newest)}.")
    raise UserError(f"no checkpoint in {out_dir}: train a model with `python train.py --out-dir {quoted(out_dir)}`, or "
                    "name a file with --checkpoint.")


# -----------------------------------------------------------------------------
# Device and dtype

def choose_device(name="auto"):
    """torch.device for a name, made the current one; auto: the accelerator that torch finds, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda (also AMD's), xpu, mps
        name = accelerator.type if accelerator else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails here, not later, where the device does not work
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here ({short_message(error)}). {cuda_hint()}"
                        "Use --device auto.") from error
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)  # graphs and streams are made on the current device
    return probe.device


@contextlib.contextmanager
def out_of_memory_advice(advice):
    """UserError with the text of the function `advice` where memory runs out; only CUDA has an error class for it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("out of memory|to allocate", str(error)):
            raise
        raise UserError(advice()) from error


def cuda_hint():
    """Advice where an NVIDIA driver is installed but this PyTorch cannot use the GPU, else ''."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    return (f"This computer has an NVIDIA driver, but PyTorch {torch.__version__} cannot use it: get the right install "
            "command from pytorch.org/get-started/locally. ")


def choose_dtype(name, device, generating=False):
    """torch.dtype of the matrix products; auto: float16 on CUDA from Volta on, else float32.

    For generation on a CPU, auto is float16 too (see prepare_for_inference).
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    on_cpu = generating and device.type == "cpu"
    if name == "auto":
        return torch.float16 if major >= 7 or on_cpu else torch.float32
    if name == "float16" and device.type != "cuda" and not on_cpu:
        raise UserError(f"float16 needs CUDA, and the device is {device.type}: use --dtype float32.")
    # torch.cuda.is_bf16_supported() counts emulation, which is slow; Ampere is the first to have it in hardware.
    if name == "bfloat16" and device.type == "cuda" and major < 8:
        raise UserError("bfloat16 needs an Ampere GPU (RTX 30 series) or newer: use --dtype float16.")
    return getattr(torch, name)


def autocast(device, dtype):
    """Run matrix products in `dtype`; float32 changes nothing."""
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)
