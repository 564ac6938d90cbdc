"""How fast the model generates: tokens per second with sampling, time to the first token, start of chat.py.

Without --checkpoint the weights are random, in the preset's shape: they are as fast as trained ones.
"""

import shlex
import statistics
import subprocess
import sys
import time

import click
import common
import torch

import model
from config import PRESETS, GPTConfig, SampleConfig, UserError, only_fields

NEVER = -5  # the id of no token: every story gets its full length
WIDTHS = (36, 9, 9, 9, 15, 12)


def load(checkpoint, preset, device, dtype):
    """A model as chat.py loads it."""
    if checkpoint:
        net, _ = model.load_checkpoint(checkpoint)
    else:
        torch.manual_seed(1)
        net = model.GPT(GPTConfig(**only_fields(GPTConfig, PRESETS[preset]))).eval()
    model.prepare_for_inference(net, device, dtype)
    return net


def timings(net, prompt, sampling, seed):
    """(seconds to the first token, seconds in total) of one generation; each token has arrived on the CPU."""
    start = time.perf_counter()
    steps = net.generate(prompt, sampling, NEVER, torch.Generator(prompt.device).manual_seed(seed))
    next(steps)
    first = time.perf_counter() - start
    count = 1 + sum(1 for _ in steps)
    assert count == sampling.max_new_tokens
    return first, time.perf_counter() - start


def measure(net, batch_size, prompt_tokens, sampling, repeats):
    """One row: medians over the repeats, the slowest and the fastest, and the first token of a new process."""
    prompt = torch.randint(3, net.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(1))
    prompt = prompt.expand(batch_size, -1).to(net.wte.weight.device)
    net.decode_step = None
    (new_first, _), *warm = [timings(net, prompt, sampling, seed) for seed in range(repeats + 1)]
    rates = [batch_size * sampling.max_new_tokens / seconds for _, seconds in warm]
    return dict(batch=batch_size, prompt_tokens=prompt_tokens, penalty=sampling.repetition_penalty,
                new_tokens=sampling.max_new_tokens, tokens_per_second=statistics.median(rates), slowest=min(rates),
                fastest=max(rates), first_token_ms=1000 * statistics.median(first for first, _ in warm),
                new_first_token_ms=1000 * new_first)


def seconds_to_first_byte(command):
    start = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise UserError(f"a command failed: run it to see why, or pass --no-startup.\n{shlex.join(process.args)}")
    return seconds


def startup(checkpoint, device, repeats):
    """Medians of the seconds until `chat.py --prompt` prints its first character, and until torch is imported."""
    chat = [sys.executable, common.ROOT / "chat.py", "--checkpoint", checkpoint, "--device", device, "--prompt",
            "Once upon a time", "--seed", "1", "--max-new-tokens", "20"]
    torch_alone = [sys.executable, "-c", "import torch; print('x', flush=True)"]
    times = [(seconds_to_first_byte(chat), seconds_to_first_byte(torch_alone)) for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True), help="a trained model; random weights if omitted")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="rtx3050", show_default=True,
              help="the shape of random weights")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16, bfloat16")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True,
              help="stories at once (repeatable)  [default: 1; on CUDA 1 and 256]")
@click.option("--max-new-tokens", type=click.IntRange(2), default=200, show_default=True, help="length of a story")
@click.option("--repetition-penalty", "penalties", type=float, multiple=True, default=(1.1, 1.0), show_default=True,
              help="chat's is 1.1 (repeatable)")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="runs whose median is shown")
@click.option("--threads", type=click.IntRange(1), help="threads on the CPU; torch's choice if omitted")
@click.option("--startup/--no-startup", "with_startup", default=True,
              help="time the start of chat.py (with --checkpoint)")
@common.json_option
@common.tiny_option
def main(checkpoint, preset, device, dtype, batches, max_new_tokens, penalties, repeats, threads, with_startup,
         json_path, tiny):
    """Measure how fast the model generates."""
    if threads:
        torch.set_num_threads(threads)
    if tiny:
        preset, max_new_tokens, repeats = "demo", 8, 1
    device = model.choose_device(device)
    dtype = model.choose_dtype(dtype, device, generating=True)
    net, rows = load(checkpoint, preset, device, dtype), []
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    facts = common.today() | dict(device=name, dtype=str(dtype).removeprefix("torch."))
    print(f"{net.count_parameters() / 1e6:.2f} M parameters, {facts['dtype']}, {name}, torch {facts['torch']}; median "
          f"of {repeats} runs of {max_new_tokens} tokens, default sampling except for the repetition penalty")
    common.print_row(["", "tokens/s", "slowest", "fastest", "first token ms", "when new ms"], WIDTHS)
    kinds = [(batch, 16, penalty, max_new_tokens) for batch in batches or ((1, 256) if device.type == "cuda" else (1,))
             for penalty in penalties]
    for batch, prompt_tokens, penalty, new_tokens in [*kinds, (1, 200, penalties[0], min(20, max_new_tokens))]:
        sampling = SampleConfig(max_new_tokens=new_tokens, repetition_penalty=penalty)
        row = measure(net, batch, min(prompt_tokens, net.config.block_size), sampling, repeats)
        rows.append(row)
        common.print_row([f"batch {batch}, prompt {row['prompt_tokens']}, penalty {penalty:g}",
                          *(common.count(row[key]) for key in ("tokens_per_second", "slowest", "fastest")),
                          f"{row['first_token_ms']:.1f}", f"{row['new_first_token_ms']:.1f}"], WIDTHS)
        common.write_json(json_path, rows=rows, **facts)
    if checkpoint and with_startup:
        chat, torch_alone = startup(checkpoint, device, min(repeats, 3))
        print(f"chat.py --prompt: {chat:.2f} s until the first character, of which {torch_alone:.2f} s import torch")
        common.write_json(json_path, rows=rows, chat_seconds=chat, torch_import_seconds=torch_alone, **facts)


if __name__ == "__main__":
    main()
