"""How much is learned from how many tokens and seconds: ours, nanoGPT's and smolGPT's recipes on the same stories.

The measure is bits a byte of the whole validation stream, read in the same windows for every code. Seconds are those of
training from a cold compiler on, without evaluation. `--tiny` shows on a CPU that it works.
"""

import math
import tempfile
import time
from pathlib import Path

import click
import common

EVAL_EVERY = 250_000  # tokens between two looks at the validation loss
EVAL_TOKENS = 131_072  # validation tokens that a look reads; what decides is read whole
WIDTHS = (16, 12, 12, 12, 11, 9)


def worker(job):
    return train_ours(job) if job["code"] == "ours" else train_peer(job)


# Ours: a run whose schedule ends with the budget.

def train_ours(job):
    """One whole run of train.py: its final bits a byte, and where its curve first came to the target."""
    import train
    with tempfile.TemporaryDirectory() as folder:
        run, log = common.make_run(ours_flags(job), folder)
        run.validation = stream_windows(run, job["eval_tokens"])
        run.final_validation = lambda: stream_windows(run, 0)
        train.train(run, log)
        log.bar.close()
        rows = common.read_jsonl(Path(folder) / "metrics.jsonl")
        curve = [(row["tokens"], row["val_bpb"], row["seconds"]) for row in rows if "val_bpb" in row]
        aligned = None
        if run.config.align_stories:
            whole = train.Validation(run.corpus, run.model.config.block_size, 0, True)
            aligned = train.evaluate(run.model, whole, run.batch_size, run.device, run.dtype)["val_bpb"]
    tokens, bpb, seconds = curve[-1]
    reached = next(((t, s) for t, b, s in curve if b <= job["target_bpb"]), (None, None))
    return dict(tokens=tokens, bpb=bpb, seconds=seconds, reached=bpb <= job["target_bpb"], bpb_in_stories=aligned,
                tokens_at_target=reached[0], seconds_at_target=reached[1], skipped=run.progress.skipped,
                iterations=run.config.max_iters, tokens_per_iter=run.config.tokens_per_iter, compiled=run.compiled,
                curve=curve, peak_mib=common.peak_mib())


def ours_flags(job):
    """The user's flags, and over them the budget and the looks at the validation loss."""
    import train
    own = [*(common.shape_flags(True) if job["tiny"] else []), *job["flags"], "--data-dir", job["data_dir"]]
    given = train.main.make_context("train.py", list(own)).params
    tokens_per_iter = (train.PRESETS[given["preset"] or "rtx3050"] | {
        name: value for name, value in given.items() if value is not None}).get(
            "tokens_per_iter", train.TrainConfig.tokens_per_iter)
    return [*own, "--max-iters", str(max(1, round(job["tokens"] / tokens_per_iter))), "--sample-tokens", "0",
            "--eval-interval", str(max(1, round(job["eval_every"] / tokens_per_iter)))]


def stream_windows(run, tokens):
    """Validation in windows that follow each other, whatever the training windows are."""
    import train
    return train.Validation(run.corpus, run.model.config.block_size, tokens, False)


# Theirs: their own recipe, until the target is met.

def train_peer(job):
    """Train another repository's model by its own settings until the target, the tokens or the seconds are reached."""
    import train
    peer, compiled = make_peer(job)
    few, whole = (train.Validation(job["corpus"], peer.block_size, tokens, False) for tokens in (job["eval_tokens"], 0))
    iters, seconds, bpb, curve = 0, 0.0, math.inf, []
    more = max(1, round(job["eval_every"] / peer.tokens_per_iter))
    while bpb > job["target_bpb"] and iters * peer.tokens_per_iter < job["tokens"] and time.time() < job["ends_at"]:
        seconds += train_some(peer, iters, more)
        iters += more
        bpb = bits_a_byte(peer, few)
        curve.append((iters * peer.tokens_per_iter, bpb, round(seconds, 3)))
        if bpb <= job["target_bpb"]:
            bpb = bits_a_byte(peer, whole)
    if bpb > job["target_bpb"]:
        bpb = bits_a_byte(peer, whole)
    tokens, reached = iters * peer.tokens_per_iter, bpb <= job["target_bpb"]
    return dict(tokens=tokens, bpb=bpb, seconds=seconds, reached=reached,
                best_bpb=min((row[1] for row in curve), default=bpb), tokens_at_target=tokens if reached else None,
                seconds_at_target=seconds if reached else None,
                settings=peer.settings, batch_size=peer.batch_size, dtype=str(peer.dtype)[6:], compiled=compiled,
                curve=curve, peak_mib=common.peak_mib())


def make_peer(job):
    """(Peer, whether it is compiled) with its own settings; leaves the opened corpus in the job."""
    import torch

    import preprocess
    import train
    device, settings = train.choose_device(), common.peer_settings(job["code"], job["folder"])
    job["corpus"], compiled = preprocess.open_corpus(job["data_dir"]), train.can_compile(device)
    if job["tiny"]:
        settings["tokens_per_iter"] = 1024
    dtype = torch.float32
    if device.type == "cuda":  # both say bfloat16, and nanoGPT float16 where the card has none
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    shape = common.TINY_SHAPE if job["tiny"] else common.SHAPE
    return common.Peer(job["code"], job["folder"], job["corpus"], shape, settings, job["batch_size"], dtype,
                       compiled), compiled


def train_some(peer, iters, count):
    """Seconds of `count` iterations at the learning rates that follow iteration `iters`."""
    started = time.perf_counter()
    for it in range(iters, iters + count):
        peer.set_learning_rate(peer_learning_rate(it, peer.settings))
        peer.iteration()
    common.synchronize()
    return time.perf_counter() - started


def peer_learning_rate(it, settings):
    """Both peers' schedule: linear warmup, cosine to min_lr, then min_lr."""
    peak, low, warmup = settings["learning_rate"], settings["min_lr"], settings["warmup_iters"]
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    done = min(1.0, (it - warmup) / (settings["lr_decay_iters"] - warmup))
    return low + 0.5 * (1 + math.cos(math.pi * done)) * (peak - low)


def bits_a_byte(peer, validation):
    """train.py's own evaluation of a model that returns (logits, loss)."""
    import torch

    import train

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer.model

        def forward(self, x, y):
            return self.peer(x, y)[1]
    return train.evaluate(Loss(), validation, min(64, peer.batch_size), peer.device, peer.dtype)["val_bpb"]


# The command.

def ours_rows(clock, job, tokens, budgets, show):
    """The smallest of the budgets that meets the target, then a run of `tokens` if that was none of them."""
    for budget in sorted(budgets):
        row = show(f"ours {budget / 1e6:g}M", clock.timed(run_job, clock, job | dict(tokens=budget)))
        if row.get("reached"):
            break
    if tokens and tokens not in budgets:
        show(f"ours {tokens / 1e6:g}M", clock.timed(run_job, clock, job | dict(tokens=tokens)))


def peer_rows(clock, job, folders, show):
    """One row for each peer; what is left until the deadline is shared among them."""
    given = [(code, folder) for code, folder in folders if folder]
    for at, (code, folder) in enumerate(given):
        show(code, clock.timed(run_job, clock, job | dict(code=code, folder=folder), len(given) - at))


def run_job(clock, job, share=1):
    """One measurement with an empty compiler's cache, as in a user's first run, in 1 / share of the time left."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        left = max(30.0, clock.left() / share)
        # A peer stops itself in time for a last look at the whole validation stream.
        return common.measure(__file__, job | dict(ends_at=time.time() + left - 15), left, cache)


def summary(rows):
    """The first of ours to meet the target, and each peer's tokens and seconds as multiples of its."""
    met = [row for row in rows if row["code"] == "ours" and row.get("reached")]
    if not met:
        return {}
    ours = min(met, key=lambda row: row["tokens"])
    result = dict(ours_tokens=ours["tokens"], ours_seconds=ours["seconds"], ours_bpb=ours["bpb"])
    for row in rows:
        if row["code"] != "ours" and row.get("tokens"):
            result[row["name"]] = dict(reached=row["reached"], tokens_ratio=round(row["tokens"] / ours["tokens"], 2),
                                       seconds_ratio=round(row["seconds"] / ours["seconds"], 2))
    return result


def print_summary(result):
    if not result:
        return print("No run of ours met the target: try a larger --tokens or --budgets.")
    print(f"ours met the target with a budget of {result['ours_tokens'] / 1e6:.2f} M tokens, "
          f"{result['ours_seconds']:.1f} s")
    for name, row in result.items():
        if isinstance(row, dict):
            least = "" if row["reached"] else "more than "
            print(f"{name}: {least}{row['tokens_ratio']:.1f} times our tokens, {least}{row['seconds_ratio']:.1f} "
                  "times our seconds")


def budget_list(context, parameter, text):
    try:
        return [float(word) for word in text.split(",") if word]
    except ValueError:
        raise click.BadParameter("give numbers of tokens with commas between: --budgets 4e6,6e6,8e6") from None


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False), required=True, help="a prepared corpus")
@click.option("--tokens", default=8e6, show_default=True, help="tokens of our run; 0 leaves it out")
@click.option("--budgets", default="", callback=budget_list, help="tokens of shorter runs, tried upwards: 4e6,6e6")
@click.option("--target-bpb", default=0.787, show_default=True, help="bits a byte to reach")
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False), help="folder of a nanoGPT checkout")
@click.option("--smolgpt", type=click.Path(exists=True, file_okay=False), help="folder of a smolGPT checkout")
@click.option("--peer-tokens", default=60e6, show_default=True, help="where another code gives up")
@click.option("--peer-batch-size", default=128, show_default=True, help="its largest micro-batch, in windows of 256")
@click.option("--memory-gib", default=6.5, show_default=True, help="limit for each process; 0 is the whole card")
@click.option("--deadline", type=float, default=0, help="seconds after which no run goes on")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the figures and curves here too")
@click.option("--tiny", is_flag=True, help="a model that a CPU can train: shows that the script works")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def main(data_dir, tokens, budgets, target_bpb, nanogpt, smolgpt, peer_tokens, peer_batch_size, memory_gib, deadline,
         json_path, tiny, flags):
    """Measure bits a byte, and tokens and seconds to a target. Flags after -- go to train.py: -- --preset llama."""
    clock, rows = common.Clock(deadline), []
    job = dict(data_dir=data_dir, target_bpb=target_bpb, memory_gib=memory_gib, flags=flags, tiny=tiny,
               eval_tokens=EVAL_TOKENS // (32 if tiny else 1), eval_every=EVAL_EVERY // (32 if tiny else 1),
               batch_size=4 if tiny else peer_batch_size)

    def show(name, result):
        rows.append(dict(name=name, code=name.split()[0], flags=flags) | result)
        show_row(rows[-1])
        common.write_json(json_path, target_bpb=target_bpb, rows=rows, summary=summary(rows))
        return rows[-1]

    common.print_row(("code", "tokens", "seconds", "bits a byte", "at target", "seconds"), WIDTHS)
    ours_rows(clock, job | dict(code="ours"), tokens, budgets, show)
    peer_rows(clock, job | dict(tokens=peer_tokens),
              [("nanogpt_char", nanogpt), ("smolgpt", smolgpt)], show)
    print_summary(summary(rows))


def show_row(row):
    if "error" in row:
        return common.print_row((row["name"], row["error"]), (WIDTHS[0], 1))
    at = row["tokens_at_target"]
    common.print_row((row["name"], f"{row['tokens']:,}", f"{row['seconds']:.1f}", f"{row['bpb']:.4f}",
                      at and f"{at:,}", at and f"{row['seconds_at_target']:.1f}"), WIDTHS)
    if "settings" in row:
        taken = ", ".join(f"{name} {value:g}" for name, value in row["settings"].items())
        print(f"  its own settings: {taken}; {row['dtype']}, micro-batch {row['batch_size']}", flush=True)


if __name__ == "__main__":
    common.start(main, worker)
