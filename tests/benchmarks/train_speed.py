"""Tokens per second and peak memory of training, in turn on one GPU: ours, an earlier checkout's, nanoGPT's, smolGPT's.

All with 65,536 tokens per iteration (49,152 with micro-batches of 192), 6 layers 384 wide, context 256, float16, and
under the same memory limit. Ours is train.py itself, by the log lines after the first three. smolGPT keeps its dropout
of 0.2, the others have none.
"""

import statistics
import tempfile

import click
import common

ADAMW = "--optimizer adamw"
# {CODE-KIND-MICROBATCH: flags of ours}, the most telling first: a deadline cuts off the end.
ROWS = {
    "ours-256": ADAMW,
    "nanogpt-128": "",
    "ours-128": ADAMW,
    "nanogpt-192": "",
    "ours-muon-256": "",
    "ours-eager-64": ADAMW,
    "nanogpt-eager-64": "",
    "smolgpt-128": "",
    "nanogpt-256": "",
    "ours-rotary-256": f"{ADAMW} --position rotary",
    "ours-dropout-128": f"{ADAMW} --dropout 0.2",
    "ours-muon-128": "",
    "ours-64": ADAMW,
    "nanogpt-64": "",
    "smolgpt-64": "",
    "smolgpt-eager-64": "",
}
RATIOS = [("ours", "nanogpt"), ("ours-eager", "nanogpt-eager"), ("ours", "smolgpt"), ("ours-muon", "ours"),
          ("ours", "before"), ("ours-muon", "before-muon"), ("ours-eager", "before-eager")]
WIDTHS = (20, 13, 10, 9, 8)


def measure(name, data_dir, folder, log_interval, memory_gib, tiny, timeout, cache_dir):
    """The figures of one row; `folder` is the checkout that it measures."""
    code, batch_size, compiled = name.split("-")[0], int(name.rpartition("-")[2]), "eager" not in name
    tokens_per_iter, batch_size = (512, batch_size // 32) if tiny else (65536, batch_size)
    if code in ("nanogpt", "smolgpt"):
        job = dict(name=code, folder=folder, data_dir=data_dir, memory_gib=memory_gib, tiny=tiny, compiled=compiled,
                   tokens_per_iter=tokens_per_iter, batch_size=batch_size, log_interval=log_interval)
        return common.run_peer(job, timeout, cache_dir)
    values = {"data-dir": data_dir, "tokens-per-iter": tokens_per_iter, "batch-size": batch_size,
              "compile": "on" if compiled and not tiny else "off", "log-interval": log_interval,
              "max-iters": 8 * log_interval, "eval-interval": 8 * log_interval, "eval-tokens": 4096,
              "final-eval-tokens": 4096, "sample-tokens": 0}
    flags = [*(common.TINY if tiny else []), *(word for option, value in values.items()
                                               for word in (f"--{option}", str(value)))]
    with tempfile.TemporaryDirectory() as out_dir:
        result = common.run_train([*flags, *ROWS[name.replace("before", "ours")].split()], out_dir, timeout, folder,
                                  memory_gib, cache_dir=cache_dir)
    return dict(error="torch.compile does not work here") if result.get("compile_failed") else result


def median_row(name, results):
    """All rounds of a row as one: the median of their rates."""
    good = [result for result in results if "error" not in result]
    if not good:
        return dict(name=name) | results[-1]
    rates = [result["tokens_per_second"] for result in good]
    row = {key: good[-1].get(key) for key in ("peak_mib", "start_seconds", "wall_seconds", "device")}
    return dict(name=name, tokens_per_second=round(statistics.median(rates)), rates=rates) | row


def ratios(rows):
    """Quotients of tokens per second, each side with the micro-batch that is fastest for it."""
    fastest = {}
    for row in rows:
        kind = row["name"].rpartition("-")[0]
        fastest[kind] = max(fastest.get(kind, 0), row.get("tokens_per_second", 0))
    return {f"{a} / {b}": round(fastest[a] / fastest[b], 3) for a, b in RATIOS if fastest.get(a) and fastest.get(b)}


def show(row):
    if "error" in row:
        return common.print_row((row["name"], row["error"]), (WIDTHS[0], 1))
    common.print_row((row["name"], common.count(row["tokens_per_second"]), common.count(row["peak_mib"]),
                      row["start_seconds"], row["wall_seconds"]), WIDTHS)


@click.command()
@common.data_dir_option
@common.nanogpt_option
@common.smolgpt_option
@click.option("--before", type=common.FOLDER, help="folder of an earlier checkout of this repository")
@click.option("--before-data-dir", type=common.FOLDER, help="its corpus, if it cannot read --data-dir")
@common.memory_option
@click.option("--iterations", type=click.IntRange(5), default=100, show_default=True, help="timed iterations per row")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True,
              help="times that all rows are measured, in turn; the medians count")
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), help="this row (repeatable)")
@common.deadline_option
@common.json_option
@common.tiny_option
def main(data_dir, nanogpt, smolgpt, before, before_data_dir, memory_gib, iterations, rounds, only, deadline,
         json_path, tiny):
    """Time training of this repository and, where their folders are given, of others."""
    folders = dict(ours=common.ROOT, before=before, nanogpt=nanogpt, smolgpt=smolgpt)
    names = [name for row in ROWS if not only or row in only
             for name in dict.fromkeys((row, row.replace("ours", "before"))) if folders[name.split("-")[0]]]
    clock, results = common.Clock(deadline), {name: [] for name in names}
    common.print_row(("row", "tokens/s", "peak MiB", "start s", "wall s"), WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache_dir:
        for name in names * rounds:
            code = name.split("-")[0]
            corpus = before_data_dir or data_dir if code == "before" else data_dir
            results[name].append(clock.timed(measure, name, corpus, str(folders[code]), iterations // 5, memory_gib,
                                             tiny, limit=240, cache_dir=cache_dir))
            show(median_row(name, results[name][-1:]))
            rows = [median_row(name, found) for name, found in results.items() if found]
            common.write_json(json_path, memory_gib=memory_gib, rows=rows, ratios=ratios(rows), **common.today())
    if rounds > 1:
        print("Medians:")
        for row in rows:
            show(row)
    print(*(f"{name}, each at its fastest micro-batch: {ratio:.3f}" for name, ratio in ratios(rows).items()), sep="\n")


if __name__ == "__main__":
    main()
