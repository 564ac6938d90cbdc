"""Tokens a second and peak memory of training: ours, nanoGPT's and smolGPT's, one after the other on the same card.

All at 65,536 tokens an iteration (49,152 where 192 is the micro-batch), 6 layers 384 wide, context 256, float16, and
under the same limit of memory. Ours goes through train.py's own iteration: loader, scaler, clipping, optimizer. smolGPT
keeps its dropout of 0.2, the others have none. `--tiny` shows on a CPU that it works.
"""

import statistics
import tempfile
import time

import click
import common

WARMUP, ITERATIONS, BLOCKS = 6, 100, 5
TOKENS_PER_ITER = 65536
ADAMW = ["--optimizer", "adamw"]
MUON = ["--optimizer", "muon"]

# (name, code, flags of ours, micro-batch, compiled), the most telling first: a deadline cuts the end.
ROWS = [
    ("ours-256", "ours", ADAMW, 256, True),
    ("nanogpt-128", "nanogpt", [], 128, True),
    ("ours-128", "ours", ADAMW, 128, True),
    ("nanogpt-192", "nanogpt", [], 192, True),
    ("ours-muon-256", "ours", MUON, 256, True),
    ("ours-eager-64", "ours", ADAMW, 64, False),
    ("nanogpt-eager-64", "nanogpt", [], 64, False),
    ("smolgpt-128", "smolgpt", [], 128, True),
    ("nanogpt-256", "nanogpt", [], 256, True),
    ("ours-rotary-256", "ours", [*ADAMW, "--position", "rotary"], 256, True),
    ("ours-dropout-128", "ours", [*ADAMW, "--dropout", "0.2"], 128, True),
    ("ours-muon-128", "ours", MUON, 128, True),
    ("ours-64", "ours", ADAMW, 64, True),
    ("nanogpt-64", "nanogpt", [], 64, True),
    ("smolgpt-64", "smolgpt", [], 64, True),
    ("smolgpt-eager-64", "smolgpt", [], 64, False),
]
WIDTHS = (18, 9, 6, 13, 10, 12, 9)


def worker(job):
    """One row: {"tokens_per_second", "peak_mib", ...}."""
    with tempfile.TemporaryDirectory() as folder:
        if job["code"] == "ours":
            iterate, tokens, compiled = prepare_ours(job, folder)
        else:
            iterate, tokens, compiled = prepare_peer(job)
        first, seconds = iteration_seconds(iterate, job["warmup"], job["iterations"])
    if compiled() != job["compiled"] and not job["tiny"]:
        return dict(error="torch.compile does not work here")
    each = statistics.median(seconds)
    return dict(tokens_per_second=round(tokens / each), tokens_per_iter=tokens, compiled=compiled(),
                first_iteration_seconds=round(first, 2), block_ms=[round(1000 * one, 3) for one in seconds],
                peak_mib=common.peak_mib())


def prepare_ours(job, folder):
    """(an iteration to call, its tokens, whether it is compiled) of a real Run."""
    import train
    flags = [*common.shape_flags(job["tiny"]), *job["flags"], "--data-dir", job["data_dir"],
             "--tokens-per-iter", str(job["tokens_per_iter"]), "--batch-size", str(job["batch_size"])]
    run, log = common.make_run(flags, folder)
    run.set_compiled(job["compiled"] and train.can_compile(run.device))

    return lambda: common.iterate(run, log), run.config.tokens_per_iter, lambda: run.compiled


def prepare_peer(job):
    """The same of another repository's model, with the optimizer values of its train.py and no dropout in nanoGPT."""
    import preprocess
    import train
    settings = common.peer_settings(job["code"], job["folder"]) | dict(tokens_per_iter=job["tokens_per_iter"])
    if job["code"] == "nanogpt":
        settings["dropout"] = 0.0
    device = train.choose_device()
    compiled = job["compiled"] and train.can_compile(device)
    peer = common.Peer(job["code"], job["folder"], preprocess.open_corpus(job["data_dir"]),
                       common.TINY_SHAPE if job["tiny"] else common.SHAPE, settings, job["batch_size"],
                       train.choose_dtype("auto", device), compiled)
    return peer.iteration, peer.tokens_per_iter, lambda: compiled


def iteration_seconds(iterate, warmup, count):
    """(seconds of the first, which compiles; seconds of one iteration in each block of `count` later ones).

    The card is waited for at the ends of a block only. Single iterations cannot be timed: they return when they are
    queued, or wait for the one before, so that their durations alternate and a median would take one kind.
    """
    started = time.perf_counter()
    iterate()
    common.synchronize()
    first, seconds = time.perf_counter() - started, []
    for _ in range(warmup):
        iterate()
    per_block = max(1, count // BLOCKS)
    for _ in range(BLOCKS):
        common.synchronize()
        started = time.perf_counter()
        for _ in range(per_block):
            iterate()
        common.synchronize()
        seconds.append((time.perf_counter() - started) / per_block)
    return first, seconds


def best(rows, code, compiled=True, muon=False):
    """The fastest row of a code that fits, or None."""
    fitting = [row for row in rows if row["code"] == code and row["compiled"] == compiled and "error" not in row
               and ("muon" in row["name"]) == muon and "rotary" not in row["name"] and "dropout" not in row["name"]]
    return max(fitting, key=lambda row: row["tokens_per_second"], default=None)


def ratios(rows):
    """Named quotients of tokens a second, of those pairs that were measured."""
    pairs = {"ours / nanoGPT, compiled, each at its best": (best(rows, "ours"), best(rows, "nanogpt")),
             "ours / smolGPT, compiled, each at its best": (best(rows, "ours"), best(rows, "smolgpt")),
             "ours / nanoGPT, eager": (best(rows, "ours", False), best(rows, "nanogpt", False)),
             "ours Muon / ours AdamW, compiled": (best(rows, "ours", muon=True), best(rows, "ours"))}
    return {name: round(a["tokens_per_second"] / b["tokens_per_second"], 3)
            for name, (a, b) in pairs.items() if a and b}


def jobs(data_dir, folders, memory_gib, only, iterations, tiny):
    """The rows to measure: those named in `only` (all without it) whose code is there."""
    scale = 32 if tiny else 1
    block_size = (common.TINY_SHAPE if tiny else common.SHAPE)["block_size"]
    for name, code, flags, batch_size, compiled in ROWS:
        if (code == "ours" or folders.get(code)) and (not only or name in only):
            yield dict(name=name, code=code, flags=flags, batch_size=batch_size // scale, compiled=compiled, tiny=tiny,
                       tokens_per_iter=TOKENS_PER_ITER // 256 * block_size // scale, data_dir=data_dir,
                       folder=folders.get(code), memory_gib=memory_gib, warmup=WARMUP, iterations=iterations)


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False), required=True, help="a prepared corpus")
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False), help="folder of a nanoGPT checkout")
@click.option("--smolgpt", type=click.Path(exists=True, file_okay=False), help="folder of a smolGPT checkout")
@click.option("--memory-gib", default=6.5, show_default=True, help="limit for each process; 0 is the whole card")
@click.option("--iterations", default=ITERATIONS, show_default=True, help="timed iterations of a row")
@click.option("--rounds", default=1, show_default=True, help="times that all rows are measured, in turn; medians count")
@click.option("--only", multiple=True, type=click.Choice([row[0] for row in ROWS]), help="this row (repeatable)")
@click.option("--deadline", type=float, default=0, help="seconds after which no row is started")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the figures here too")
@click.option("--tiny", is_flag=True, help="a model that a CPU can train: shows that the script works")
def main(data_dir, nanogpt, smolgpt, memory_gib, iterations, rounds, only, deadline, json_path, tiny):
    """Time training of this repository and, where their folders are given, of nanoGPT and smolGPT."""
    clock, rows = common.Clock(deadline), {}
    common.print_row(("code", "micro-b.", "mode", "tokens/s", "peak MiB", "1st iter s", "wall s"), WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for job in list(jobs(data_dir, dict(nanogpt=nanogpt, smolgpt=smolgpt), memory_gib, only, iterations,
                             tiny)) * rounds:
            result = clock.timed(common.measure, __file__, job, max(20.0, min(180.0, clock.left())), cache)
            row = {key: job[key] for key in ("name", "code", "flags", "batch_size", "compiled")} | result
            rows[job["name"]] = with_median(rows.get(job["name"]), row)
            show(row)
            common.write_json(json_path, memory_gib=memory_gib, rows=list(rows.values()), ratios=ratios(rows.values()))
    if rounds > 1:
        for row in rows.values():
            show(row)
    for name, ratio in ratios(rows.values()).items():
        print(f"{name}: {ratio:.3f}", flush=True)


def with_median(before, row):
    """A row of one more round: its rate is the median of all rounds, `rates` holds each."""
    rates = [*(before or {}).get("rates", []), *([] if "error" in row else [row["tokens_per_second"]])]
    if not rates:
        return row
    return (before if "error" in row else row) | dict(rates=rates, tokens_per_second=round(statistics.median(rates)))


def show(row):
    head = (row["name"], row["batch_size"], "comp." if row["compiled"] else "eager")
    if "error" in row:
        return common.print_row((*head, row["error"]), (*WIDTHS[:3], 1))
    peak = row["peak_mib"] and f"{row['peak_mib']:,.0f}"
    common.print_row((*head, f"{row['tokens_per_second']:,}", peak, row["first_iteration_seconds"],
                      row["wall_seconds"]), WIDTHS)


if __name__ == "__main__":
    common.start(main, worker)
