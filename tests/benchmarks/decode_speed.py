"""How fast the model writes: tokens a second with sampling included, time to the first token, start of chat.py.

Without --checkpoint the weights are random, in the preset's shape: they are as fast as trained ones.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import common
import torch

import model
from config import PRESETS, GPTConfig, SampleConfig, UserError, pick
from preprocess import Tokenizer, sample_stories, train_sentencepiece

NEVER = -5  # no token's id: every story gets its full length
WIDTHS = (42, 9, 9, 9, 15, 12)


def load(checkpoint, preset, device, dtype):
    """A model as chat.py loads it."""
    if checkpoint:
        net = model.build_model(model.read_checkpoint(checkpoint), checkpoint)
    else:
        torch.manual_seed(1)
        net = model.GPT(GPTConfig(**pick(GPTConfig, PRESETS[preset]))).eval()
    model.store_for_generation(net, device, dtype)
    return net


def timings(net, prompt, sample, repeats):
    """(seconds to the first token, seconds for all) of each of `repeats` generations, and of the one before them."""
    result = []
    for seed in range(repeats + 1):
        generator = torch.Generator(prompt.device).manual_seed(seed)
        common.synchronize()
        start = time.perf_counter()
        steps = net.generate(prompt, sample, NEVER, generator)
        next(steps)
        first = time.perf_counter() - start
        count = 1 + sum(1 for _ in steps)
        common.synchronize()
        result.append((first, time.perf_counter() - start))
        assert count == sample.max_new_tokens
    return result[0], result[1:]


def measure_row(net, stepped, batch_size, prompt_tokens, sample, repeats):
    """One row: with the model's fast step or plainly; medians over the repeats, and the slowest and fastest."""
    before, model.step_kind = model.step_kind, model.step_kind if stepped else lambda *_: None
    net.decode_step = None
    try:
        prompt = torch.randint(3, net.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(1))
        prompt = prompt.expand(batch_size, -1).to(net.wte.weight.device)
        cold, warm = timings(net, prompt, sample, repeats)
    finally:
        model.step_kind = before
    tokens = batch_size * sample.max_new_tokens
    rates = [tokens / seconds for _, seconds in warm]
    return dict(path="step" if stepped else "plain", batch=batch_size, prompt_tokens=prompt_tokens,
                penalty=sample.repetition_penalty, new_tokens=sample.max_new_tokens,
                tokens_per_second=statistics.median(rates), slowest=min(rates), fastest=max(rates),
                first_token_ms=1000 * statistics.median(first for first, _ in warm),
                cold_first_token_ms=1000 * cold[0], peak_mib=common.peak_mib())


def kernel_times(net, batch_size, sample):
    """torch's table of what the device does in 50 steps."""
    prompt = torch.full((batch_size, 16), 7, device=net.wte.weight.device)
    list(net.generate(prompt, sample, NEVER))
    on_device = prompt.is_cuda
    activities = [getattr(torch.profiler.ProfilerActivity, "CUDA" if on_device else "CPU")]
    with torch.profiler.profile(activities=activities) as profile:
        for count, _ in enumerate(net.generate(prompt, sample, NEVER)):
            if count == 50:
                break
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=key, row_limit=22, max_name_column_width=70)


def seconds_to_first_byte(command):
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed with status {process.returncode}.")
    return seconds


def startup(checkpoint, device, repeats):
    """Medians of the seconds until `chat.py --prompt` shows its first character, and until torch is imported."""
    with tempfile.TemporaryDirectory() as folder:
        if not checkpoint:
            checkpoint = Path(folder) / "best.pt"
            tokenizer = Tokenizer(train_sentencepiece(sample_stories(300, seed=1), 512))
            model.save_checkpoint(checkpoint, model.GPT(GPTConfig(vocab_size=512)), tokenizer.model_bytes)
        chat = [sys.executable, common.ROOT / "chat.py", "--checkpoint", checkpoint, "--device", str(device),
                "--prompt", "Once upon a time", "--seed", "1", "--max-new-tokens", "20"]
        torch_alone = [sys.executable, "-c", "import torch; print('x', flush=True)"]
        times = [(seconds_to_first_byte(chat), seconds_to_first_byte(torch_alone)) for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True), help="a trained model; random weights if not given")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="rtx3050", show_default=True,
              help="the shape of random weights")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16, bfloat16")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1,), show_default=True,
              help="stories at once; may be given several times")
@click.option("--max-new-tokens", type=click.IntRange(2), default=200, show_default=True, help="length of a story")
@click.option("--repetition-penalty", "penalties", type=float, multiple=True, default=(1.1, 1.0), show_default=True,
              help="chat's is 1.1; may be given several times")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="runs whose median is shown")
@click.option("--threads", type=click.IntRange(1), help="threads on the CPU; torch's choice if not given")
@click.option("--startup/--no-startup", "with_startup", default=True, help="time the start of chat.py too")
@click.option("--profile", is_flag=True, help="also print what the device does in 50 steps")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the figures to this file")
def main(checkpoint, preset, device, dtype, batches, max_new_tokens, penalties, repeats, threads, with_startup, profile,
         json_path):
    """Measure how fast the model writes."""
    if threads:
        torch.set_num_threads(threads)
    device = model.choose_device(device)
    dtype = model.choose_dtype(dtype, device, generating=True)
    net = load(checkpoint, preset, device, dtype)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}{threads}"
    print(f"{net.count_parameters() / 1e6:.2f} M parameters, {str(dtype)[6:]}, {name}, torch {torch.__version__}; "
          f"median of {repeats} runs of {max_new_tokens} tokens, default sampling but for the repetition penalty")
    common.print_row(["", "tokens/s", "slowest", "fastest", "first token ms", "when new ms"], WIDTHS)
    rows = []

    def add(stepped, batch_size, prompt_tokens, penalty, new_tokens):
        sample = SampleConfig(max_new_tokens=new_tokens, repetition_penalty=penalty)
        row = measure_row(net, stepped, batch_size, min(prompt_tokens, net.config.block_size), sample, repeats)
        rows.append(row)
        common.print_row([f"{row['path']}, batch {batch_size}, prompt {row['prompt_tokens']}, penalty {penalty:g}",
                          *(f"{row[key]:,.0f}" for key in ("tokens_per_second", "slowest", "fastest")),
                          f"{row['first_token_ms']:.1f}", f"{row['cold_first_token_ms']:.1f}"], WIDTHS)
        common.write_json(json_path, device=name, dtype=str(dtype)[6:], torch=torch.__version__, rows=rows)

    for batch_size in batches:
        paths = (False, True) if model.step_kind(net, batch_size) else (False,)
        for penalty in penalties:
            for stepped in paths:
                add(stepped, batch_size, 16, penalty, max_new_tokens)
    add(True, 1, 200, penalties[0], 20)
    if profile:
        for batch_size in batches:
            sample = SampleConfig(max_new_tokens=max_new_tokens, repetition_penalty=penalties[0])
            print(f"\nbatch {batch_size}:\n{kernel_times(net, batch_size, sample)}")
    if with_startup:
        chat, torch_alone = startup(checkpoint, device, min(repeats, 3))
        print(f"chat.py --prompt: {chat:.2f} s until the first character, of which {torch_alone:.2f} s import torch")
        common.write_json(json_path, device=name, dtype=str(dtype)[6:], torch=torch.__version__, rows=rows,
                          chat_seconds=chat, torch_import_seconds=torch_alone)


if __name__ == "__main__":
    main()
