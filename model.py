"""The network, its key/value cache, sampling, generation, the checkpoint file, and the choice of device and dtype.

Shapes: B sequences, T positions, C = n_embd, H heads, D = C / H, V = vocab_size, L layers, S tokens seen so far.
"""

import contextlib
import math
import shutil
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from config import GPTConfig, UserError, first_line, replacing, restore

NORM_EPS = 1e-5  # written into exported configs; torch's default would be the dtype's machine epsilon
ROPE_BASE = 10000.0
CHECKPOINT_FORMAT = 1
IGNORE = -1  # target of a position that is not predicted (padding)
EMBEDDING_STD = 0.01
DRY_GROWTH = 50  # repeated tokens beyond the allowed ones after which the penalty stays: it is beyond all logits
NEVER = torch.iinfo(torch.long).min  # the place of a token that was not used


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019); the mean is taken in float32."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), NORM_EPS)


def rotary_tables(block_size, head_size):
    """Cosines and sines (2, block_size, D) of rotary positions, half-split layout (Su et al. 2021, as in Llama on HF).

    The sines of the first half are negated, which saves `rotate` that work.
    """
    frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2) / head_size)  # (D/2,)
    angles = torch.outer(torch.arange(block_size), frequencies)  # (block_size, D/2)
    return torch.stack([angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)])


def rotate(x, rope):
    """Turn each pair (i, i + D/2) of the last dimension of x (..., T, D) by its position's angle, in float32."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([b, a], dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of the positions read so far, for generation: room for block_size of them."""

    def __init__(self, config, batch_size, device, dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, head_size)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled; the model moves it on after all its layers

    def update(self, layer, k, v):
        """Append k and v (B, H, T, D) of one layer; all of them, (B, H, length + T, D), and the mask that they need."""
        T, end, mask = k.shape[2], self.length + k.shape[2], None
        keys, values = self.data[layer]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        # is_causal aligns to the top left, so it is right only when there are as many queries as keys.
        if 1 < T < end:
            mask = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(end - T)
        return keys[:, :, :end], values[:, :, :end], mask


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
        if rope is not None and cache is not None:
            q, k = rotate(torch.stack([q, k]), rope)  # the time of small tensors is in the number of operations
        elif rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)
        # No dropout on the attention weights: measured, it costs a third of the speed and 0.01 bits a byte.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate) * up), gate and up in one matrix."""

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
    """A pre-norm transformer decoder whose embedding is also its output matrix."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.decode_step = None  # kept for the next call of generate: recording it takes longer than a short reply
        self.wte = empty_embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = empty_embedding(config.block_size, config.n_embd) if learned else None
        rope = None if learned else torch.empty(2, config.block_size, config.n_embd // config.n_head)
        self.register_buffer("rope", rope, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd)
        if not self.wte.weight.is_meta:  # torch loads its compiler, 2 seconds, to draw weights that are not there
            self.init_weights()

    def init_weights(self):
        """Matrices N(0, 0.02); the two that write the residual stream and all biases 0; norms 1.

        A block that starts as the identity lets the learning rate be higher (GPT-2 scales these two down instead).
        """
        for name, weight in self.named_parameters():
            if name.endswith(("c_proj.weight", "bias")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=EMBEDDING_STD if name.startswith("w") else 0.02)
        self.init_rope()

    def init_rope(self):
        if self.rope is not None:
            self.rope = rotary_tables(self.config.block_size, self.config.n_embd // self.config.n_head)

    def hidden(self, idx, cache=None):
        """Final hidden states (B, T, C) of the tokens idx (B, T), which follow what the cache holds."""
        start, T = cache.length if cache else 0, idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"cannot read {start + T} tokens: block_size is {self.config.block_size}")
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[start:start + T]
        rope = None if self.rope is None else self.rope[:, start:start + T]
        x = self.drop(x)
        if torch.is_autocast_enabled(x.device.type):
            # autocast leaves embeddings in float32; a half-precision residual stream is faster and half as large.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = recompute(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def logits(self, x):
        """Scores (..., V) of the next token for hidden states (..., C)."""
        return F.linear(x, self.wte.weight)

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for idx (B, T); with targets (B, T), the mean loss in nats over those not -1."""
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORE)

    def count_parameters(self):
        return sum(weight.numel() for weight in self.parameters())

    @torch.inference_mode()
    def generate(self, idx, sample, eos_id, generator=None):
        """Continue the prompts idx (B, S): yield a (B,) tensor of token ids, on the CPU, for each step.

        A row ends at eos_id, which is not yielded: it gives -1 from then on; when all have ended, so does the
        generator. When the window of block_size tokens is full, its last half is read again as the beginning of a new
        one, so the model always sees between block_size / 2 and block_size tokens.
        """
        block_size, step = self.config.block_size, take_step(self, len(idx), sample, eos_id)
        cache = step.cache if step else KVCache(self.config, len(idx), idx.device, self.wte.weight.dtype)
        cache.length = 0
        unread, ended = idx[:, -block_size:], torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        try:
            for _ in range(sample.max_new_tokens):
                if cache.length + unread.shape[1] > block_size:
                    cache.length, unread = 0, idx[:, -(block_size // 2):]
                if step and unread.shape[1] == 1:
                    token = step(unread, idx, generator)  # (B,)
                else:
                    logits = self.logits(self.hidden(unread, cache)[:, -1])  # (B, V)
                    token = choose_token(logits, idx, sample, eos_id, generator)  # (B,)
                ended |= token == eos_id
                unread = token.unsqueeze(1)
                idx = torch.cat([idx, unread], dim=1)
                shown = token.masked_fill(ended, -1).cpu()  # the one wait for the device, when all else is under way
                if (shown < 0).all():
                    return
                yield shown
        finally:
            self.decode_step = step


class DecodeStep:
    """One step of generation in fixed shapes at fixed addresses, so that CUDA can record it once and replay it whole.

    The hundred small kernels of a step run in a fraction of the time that launching them one by one takes. The step
    reads `token` (B, 1) at `position` (1,), attends to the whole cache under a mask, and leaves the next token and
    position in their place. DRY needs all tokens so far, whose number grows, so with it the caller chooses the token.
    GPT.hidden and choose_token say the same in plain code, and read the prompt into the same cache.
    """

    def __init__(self, model, batch_size, sample, eos_id):
        config, device, dtype = model.config, model.wte.weight.device, model.wte.weight.dtype
        self.model, self.sample, self.eos_id = model, sample, eos_id
        self.key = self.make_key(model, batch_size, sample, eos_id)
        self.chooses = sample.dry_multiplier == 0
        self.penalizes = self.chooses and sample.repetition_penalty > 1
        self.cache = KVCache(config, batch_size, device, dtype)
        self.places = torch.arange(config.block_size, device=device)
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.noise = torch.full((batch_size, config.vocab_size), 0.5, device=device)
        # At which position each token was used last: unlike a list of the last tokens, of one size for every window.
        self.last_use = torch.full((batch_size, config.vocab_size), NEVER, device=device) if self.penalizes else None
        self.graph = None
        if device.type == "cuda":
            self.graph = record_graph(device, self.advance, before=self.position.zero_)

    @staticmethod
    def make_key(model, batch_size, sample, eos_id):
        """Equal for two steps that are the same: a recorded one holds the weights' addresses and the settings."""
        weights = tuple((weight.data_ptr(), weight.dtype) for weight in (*model.parameters(), *model.buffers()))
        return batch_size, replace(sample, max_new_tokens=1, seed=None), eos_id, weights

    def advance(self):
        """What is recorded: nothing in it may wait for the device or depend on a tensor's values in Python."""
        model, sample = self.model, self.sample
        x = model.wte(self.token)  # (B, 1, C)
        if model.wpe is not None:
            x = x + model.wpe.weight.index_select(0, self.position)
        rope = None if model.rope is None else model.rope.index_select(1, self.position)
        self.mask = torch.zeros(1, 1, 1, len(self.places), device=x.device, dtype=x.dtype)
        self.mask = self.mask.masked_fill(self.places > self.position, -math.inf)
        for block in model.blocks:
            x = block(x, rope, self)
        self.logits = model.logits(model.ln_f(x)[:, -1])  # (B, V)
        if self.penalizes:
            used = self.last_use > self.position - sample.repetition_window
            self.logits = penalize_used(self.logits.float(), used, sample.repetition_penalty)
        self.position += 1
        if self.chooses:
            unpenalized = replace(sample, repetition_penalty=1.0)
            self.token.copy_(choose_token(self.logits, None, unpenalized, None, noise=self.noise).unsqueeze(1))
        if self.penalizes:
            self.last_use.scatter_(1, self.token, self.position.expand_as(self.token))
            self.last_use[:, self.eos_id].fill_(NEVER)

    def update(self, layer, k, v):
        """What KVCache.update does for one position, with all of the cache for an answer."""
        keys, values = self.cache.data[layer]
        return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v), self.mask

    def begin(self, token, seen):
        """Take up `token` (B, 1), which this step did not choose: the window is new, or the caller chooses."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        if self.penalizes:
            places = torch.arange(1 - seen.shape[1], 1, device=seen.device) + self.position  # `token` is seen[:, -1]
            self.last_use.fill_(NEVER).scatter_reduce_(1, seen, places.expand_as(seen), "amax")
            self.last_use[:, self.eos_id].fill_(NEVER)

    def __call__(self, token, seen, generator):
        """The token (B,) after `token` (B, 1), the last of `seen` (B, S) and the first that the cache does not hold."""
        if token.data_ptr() != self.token.data_ptr():
            self.begin(token, seen)
        if self.sample.temperature > 0 and self.chooses:
            self.noise.uniform_(generator=generator)  # outside, where it is the same for every generator
        if self.graph:
            self.graph.replay()
        else:
            self.advance()
        self.cache.length += 1
        if self.chooses:
            return self.token.squeeze(1)
        return choose_token(self.logits, seen, self.sample, self.eos_id, generator)


def record_graph(device, run, before):
    """A CUDA graph of what run() queues, the random state as it was. `before` is called ahead of each run, unrecorded.

    The recipe of torch.cuda.graph: three runs on a side stream come first, in which libraries allocate what they keep.
    While it records nothing is given back, so it takes more memory than a plain run; and after one that had run out of
    memory, a plain run did not fit either (torch 2.11).
    """
    with torch.cuda.device(device), torch.random.fork_rng(devices=[device]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                before()
                run()
        torch.cuda.current_stream().wait_stream(side)
        before()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use CUDA meanwhile
            run()
    return graph


class CPUStep:
    """One step of one story on a CPU: what GPT.hidden, GPT.logits and choose_token say, in a straight line.

    Half of a plain step's time goes into what lies between its operations: modules, attributes, a dimension of length
    1. Most of the rest goes into reading the weights, which store_for_cpu may halve.
    """

    key = None  # it is made anew for each generation, which takes no time

    def __init__(self, model, sample, eos_id):
        self.model, self.sample, self.eos_id = model, sample, eos_id
        self.cache = KVCache(model.config, 1, model.wte.weight.device, model.wte.weight.dtype)
        self.output = one_row_matrix(model.wte)
        self.blocks = [(block.attn, block.ln_1.weight, one_row_matrix(block.attn.c_attn),
                        one_row_matrix(block.attn.c_proj), block.ln_2.weight, one_row_matrix(block.mlp.c_fc),
                        one_row_matrix(block.mlp.c_proj)) for block in model.blocks]

    def __call__(self, token, seen, generator):
        """The token (1,) after `token` (1, 1), the last of `seen` (1, S) and the first that the cache does not hold."""
        model, config, place = self.model, self.model.config, self.cache.length
        size = (config.n_embd,)
        x = model.wte.weight[token.item(), None]  # (1, C)
        if model.wpe is not None:
            x = x + model.wpe.weight[place]
        rope = None if model.rope is None else model.rope[:, place]
        for (attn, ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), (keys, values) in zip(self.blocks, self.cache.data):
            qkv = multiply(F.rms_norm(x, size, ln_1, NORM_EPS), c_attn)
            qk, v = qkv.to(x.dtype).view(3, 1, config.n_head, 1, -1).split([2, 1])
            if config.qk_norm:
                qk = torch.stack([attn.q_norm(qk[0]), attn.k_norm(qk[1])])
            q, k = qk if rope is None else rotate(qk, rope)  # (1, H, 1, D)
            keys[:, :, place:place + 1] = k
            values[:, :, place:place + 1] = v[0]
            y = F.scaled_dot_product_attention(q, keys[:, :, :place + 1], values[:, :, :place + 1])
            x = x + multiply(y.view(1, -1), attn_proj)
            gate, up = multiply(F.rms_norm(x, size, ln_2, NORM_EPS), c_fc).chunk(2, dim=1)
            x = x + multiply(F.silu(gate) * up, mlp_proj)
        self.cache.length += 1
        return choose_token(multiply(model.ln_f(x), self.output), seen, self.sample, self.eos_id, generator)


def one_row_matrix(module):
    """The weight (in, out) and the bias that a CPUStep uses: a module's own, or their copies by store_for_cpu."""
    weight, bias = getattr(module, "half_precision", (module.weight, getattr(module, "bias", None)))
    return weight.t(), bias


def multiply(x, matrix):
    """x (1, in) times a matrix of one_row_matrix, in the matrix's precision."""
    weight, bias = matrix
    y = x.to(weight.dtype) @ weight
    return y if bias is None else y + bias


def store_for_generation(model, device, dtype):
    """Move a model that will only generate to its device, with weights of `dtype`."""
    model.to(device)
    if device.type == "cpu":
        return store_for_cpu(model, dtype)
    for weight in model.parameters():  # not model.to(dtype): the tables of rotary positions stay float32
        weight.data = weight.data.to(dtype)


def store_for_cpu(model, dtype):
    """Round the weights to `dtype` and lay them out for generation on a CPU.

    The blocks' matrices are turned over in memory, since one row times such a matrix reads it in order. Of a half
    precision a CPUStep gets copies, which are half as much to read; the weights themselves stay float32, since
    most CPUs are slow at products of many half-precision rows, and a prompt has many.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()
    for module in (model.wte, *model.blocks.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)) and dtype is not torch.float32:
            bias = getattr(module, "bias", None)
            module.half_precision = module.weight.data.to(dtype), None if bias is None else bias.data.to(dtype)
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def take_step(model, batch_size, sample, eos_id):
    """The step of a model for these settings, None where the plain path is the one.

    A DecodeStep is the caller's alone until put back, since two generations at once must not share a cache."""
    step, model.decode_step = model.decode_step, None
    kind = step_kind(model, batch_size)
    if kind is CPUStep:
        return CPUStep(model, sample, eos_id)
    if kind is None or step and step.key == DecodeStep.make_key(model, batch_size, sample, eos_id):
        return step if kind else None
    step = None  # gives its memory back first
    return DecodeStep(model, batch_size, sample, eos_id)


def step_kind(model, batch_size):
    """Which step can do what the plain path does: DecodeStep, CPUStep or None."""
    device = model.wte.weight.device.type
    # autocast keeps converted weights, which would be read after they are freed; dropout has a random state of its own.
    if model.training or torch.is_autocast_enabled(device):
        return None
    return DecodeStep if device == "cuda" else CPUStep if device == "cpu" and batch_size == 1 else None


# Sampling: pure functions on logits (B, V). A removed token is -inf.

def penalize_repetition(logits, seen, penalty, eos_id):
    """Penalise the tokens in seen (B, S) once each; never the story's end, else stories would grow with the window."""
    used = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, seen, True)
    used[:, eos_id] = False
    return penalize_used(logits, used, penalty)


def penalize_used(logits, used, penalty):
    """Divide positive and multiply negative scores where used (B, V) says so (CTRL, Keskar et al. 2019)."""
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_phrases(logits, seen, multiplier, base, allowed_length):
    """DRY (p-e-w, text-generation-webui #5677, 2024): lower tokens that prolong a repeat of the end of seen (B, S).

    A token that would follow n repeated tokens loses multiplier * base ** (n - allowed_length) where n reaches
    allowed_length. The longest n counts; the exponent grows no further than DRY_GROWTH.
    """
    if seen.shape[1] < 2:
        return logits
    longest = min(allowed_length + DRY_GROWTH, seen.shape[1] - 1)  # R: longer repeats count as this one
    before = F.pad(seen[:, :-1], (longest - 1, 0), value=-1).unfold(1, longest, 1)  # (B, S-1, R): before seen[:, 1:]
    same = before == seen[:, None, -longest:]
    n = same.flip(2).int().cumprod(dim=2).sum(dim=2)  # (B, S-1): how many of them the end repeats
    growth = (base ** (n - allowed_length).float()).clamp(max=1e30)  # infinite ones, on all tokens, would leave none
    penalty = torch.where(n >= allowed_length, multiplier * growth, 0.0)
    return logits - torch.zeros_like(logits).scatter_reduce(1, seen[:, 1:], penalty, "amax")


def keep_top_k(logits, k):
    """Keep the k highest scores (Fan et al. 2018): exactly k, whichever of equal ones torch.topk takes."""
    if k >= logits.shape[-1]:
        return logits
    values, tokens = logits.topk(k)
    return torch.full_like(logits, -math.inf).scatter(1, tokens, values)


def keep_top_p(logits, p):
    """Keep the fewest tokens, likeliest first, whose probabilities reach p (nucleus sampling, Holtzman et al. 2020)."""
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = F.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))  # what the likelier tokens already reach
    p = max(p, 1e-30)  # in float32 smaller ones are 0, which leaves no token
    return logits.masked_fill((before >= p).scatter(1, order, before >= p), -math.inf)


def keep_min_p(logits, min_p):
    """Keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)


def filter_logits(logits, seen, sample, eos_id):
    """The logits (B, V) to draw from: repetition penalty, DRY, temperature, top-k, top-p and min-p, in that order."""
    if sample.repetition_penalty > 1:
        logits = penalize_repetition(logits, seen[:, -sample.repetition_window:], sample.repetition_penalty, eos_id)
    if sample.dry_multiplier > 0:
        logits = penalize_phrases(logits, seen, sample.dry_multiplier, sample.dry_base, sample.dry_allowed_length)
    if sample.temperature > 0:
        logits = logits / max(sample.temperature, 1e-6)  # smaller ones overflow, and leave only the likeliest anyway
    if sample.top_k > 0:
        logits = keep_top_k(logits, sample.top_k)
    if sample.top_p < 1:
        logits = keep_top_p(logits, sample.top_p)
    if sample.min_p > 0:
        logits = keep_min_p(logits, sample.min_p)
    return logits


def choose_token(logits, seen, sample, eos_id, generator=None, noise=None):
    """Draw the next token (B,) from logits (B, V) after the tokens seen (B, S); temperature 0 takes the likeliest.

    `noise` (B, V): numbers uniform in [0, 1), drawn from the generator where they are not given.
    """
    logits = filter_logits(logits.float(), seen, sample, eos_id)
    if sample.temperature == 0:
        return logits.argmax(-1)
    if noise is None:
        noise = torch.empty_like(logits).uniform_(generator=generator)
    # -log(noise) / p is exponential with rate p, and the least of such is the i-th with probability p_i.
    # (torch.multinomial draws in the same way, but waits for the device to check p, and is slower on the CPU.)
    return (logits.softmax(-1) / noise.log()).argmin(-1)


# The checkpoint file: plain types and tensors only, so that reading one never runs code from it.

def save_checkpoint(path, model, tokenizer_bytes, **state):
    """Write everything that chatting needs, and `state` for resuming, to `path` in one step (see config.replacing)."""
    tokenizer = torch.frombuffer(bytearray(tokenizer_bytes), dtype=torch.uint8)
    contents = dict(format=CHECKPOINT_FORMAT, model_config=asdict(model.config), model=model.state_dict(),
                    tokenizer=tokenizer, **state)
    with replacing(path) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # on a full disk torch complains about itself; the system's reason lies beneath
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def read_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU; `tokenizer` as bytes. UserError for any other file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: train a model with `python train.py`, or name another file.")
    try:
        with open(path, "rb") as file:
            # torch.load ignores the checksums, so a weight that changed on the disk would go unnoticed; and of an entry
            # marked as a folder (0x10) it reads nothing, and gives the memory as it lies.
            archive = zipfile.ZipFile(file)
            if archive.testzip() or any(entry.external_attr & 0x10 for entry in archive.infolist()):
                raise ValueError("a part of it is damaged")
            file.seek(0)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise UserError(f"{path} is not a whole checkpoint of this program ({first_line(error)}). "
                        "Use another one, or train again with `python train.py`.") from error
    needed = dict(format=int, model_config=dict, model=dict, tokenizer=torch.Tensor)
    ours = isinstance(contents, dict) and all(isinstance(contents.get(key), kind) for key, kind in needed.items())
    if not ours or contents["tokenizer"].dtype is not torch.uint8 or not is_plain(contents["tokenizer"]):
        raise UserError(f"{path} is not a checkpoint of this program: train one with `python train.py`.")
    if contents["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has checkpoint format {contents['format']}, this program reads {CHECKPOINT_FORMAT}: "
                        "update the program, or train again with `python train.py`.")
    contents["tokenizer"] = contents["tokenizer"].numpy().tobytes()
    return contents


def build_model(contents, where):
    """The GPT of a checkpoint's contents, in evaluation mode. Every shape is compared before memory is taken."""
    config = restore(GPTConfig, contents["model_config"], where)
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: describe_weight(weight) for name, weight in model.state_dict().items()}
    found = {name: describe_weight(weight) for name, weight in contents["model"].items()}
    if expected != found:
        wrong = min((name for name in expected | found if expected.get(name) != found.get(name)), key=str)
        raise UserError(f"{where}: {wrong} is {found.get(wrong, 'missing')}, and by its settings should be "
                        f"{expected.get(wrong, 'missing')}: the file is damaged; train again with `python train.py`.")
    if not all(is_plain(weight) and weight.isfinite().all() for weight in contents["model"].values()):
        raise UserError(f"{where} holds weights that are not finite: use another checkpoint.")
    model.load_state_dict(contents["model"], assign=True)
    model.init_rope()  # not saved, and only a shape so far
    return model.eval()


def is_plain(tensor):
    """Whether a tensor has all its numbers, as ours do: not sparse, and no mere shape (torch's meta device)."""
    return tensor.layout is torch.strided and not tensor.is_meta


def describe_weight(weight):
    return f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__


# Device and dtype.

def choose_device(name="auto"):
    """torch.device for a name; auto is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used here ({first_line(error)}). {cuda_hint()}"
                        "Use --device auto.") from error
    return device


def cuda_hint():
    """Advice where an NVIDIA driver is installed but this PyTorch cannot use the card, else ''."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    build = "has no CUDA support" if torch.version.cuda is None else "found no usable CUDA device"
    return (f"This computer has an NVIDIA driver, but the installed PyTorch {torch.__version__} {build}: "
            "pytorch.org/get-started/locally gives the command that installs the right one. ")


def choose_dtype(name, device, generating=False):
    """torch.dtype of the matrix products; auto is float16 on CUDA from Volta on, else float32.

    A model that only generates takes float16 on a CPU too (see store_for_cpu), and auto is that.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    on_cpu = generating and device.type == "cpu"
    if name == "auto":
        return torch.float16 if major >= 7 or on_cpu else torch.float32
    if name == "float16" and device.type != "cuda" and not on_cpu:
        raise UserError(f"dtype float16 needs CUDA, and the device is {device.type}: use --dtype float32.")
    # torch.cuda.is_bf16_supported() counts emulation, which is slow; Ampere is the first to have it in hardware.
    if name == "bfloat16" and device.type == "cuda" and major < 8:
        raise UserError("dtype bfloat16 needs an Ampere card (RTX 30 series) or newer: use --dtype float16.")
    return getattr(torch, name)


def autocast(device, dtype):
    """Run matrix products in `dtype`; float32 leaves everything as it is."""
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)
