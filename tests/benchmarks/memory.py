"""Peak memory of whole runs of train.py, by micro-batch and way of computing, and whole runs under a memory limit.

A whole run has evaluations, stories and checkpoints too. On a CPU no memory is measured, only that the runs work.
"""

import tempfile

import click
import common
import studies

WAYS = {"eager": "--compile off", "eager, checkpointing": "--compile off --activation-checkpointing",
        "compiled": "--compile on", "compiled, checkpointing": "--compile on --activation-checkpointing"}
# Limit in GiB, way, micro-batch
LIMITED = {"6.5 GiB, 128": (6.5, "compiled", 128), "3 GiB, auto": (3, "compiled", "auto"),
           "3 GiB, auto, eager": (3, "eager", "auto")}
WIDTHS = (28, 9, 10, 9, 8)


def measure(data_dir, gib, way, size, iterations, tiny, flags, timeout, cache_dir):
    """The figures of one whole run."""
    flags = ["--data-dir", data_dir, "--batch-size", str(size), *WAYS[way].split(), "--max-iters", str(iterations),
             "--eval-interval", str(max(1, iterations // 3)), *flags]
    if tiny:
        tokens, size = str(common.TINY_EVAL_TOKENS), size if size == "auto" else max(1, size // 16)
        flags += [*common.TINY, "--compile", "off", "--tokens-per-iter", str(16 * common.TINY_BLOCK), "--batch-size",
                  str(size), "--eval-tokens", tokens, "--final-eval-tokens", tokens]
    with tempfile.TemporaryDirectory() as out_dir:
        result = common.run_train(flags, out_dir, timeout, memory_gib=gib, cache_dir=cache_dir)
    return dict(error="torch.compile does not work here") if result.get("compile_failed") else result


def show(row):
    if "error" in row:
        return common.print_row((row["name"], row["error"]), (WIDTHS[0], 1))
    common.print_row((row["name"], common.count(row["peak_mib"]), common.count(row["tokens_per_second"]),
                      row["auto_batch_size"], row["wall_seconds"]), WIDTHS)


def table(rows, sizes):
    """Markdown: a line per micro-batch, a column per way; MiB and tokens per second."""
    def cell(way, size):
        row = rows.get(f"{way}, {size}", dict(error="-"))
        return row.get("error") or f"{common.count(row['peak_mib']) or '-'} MiB, {studies.rate(row)}/s"
    lines = [["micro-batch", *WAYS], ["---"] * (1 + len(WAYS)), *([size, *(cell(way, size) for way in WAYS)]
                                                                 for size in sizes)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(rows, sizes, path):
    panels = {}
    for i, way in enumerate(WAYS):
        points = [(size, mib) for size in sizes if (mib := rows.get(f"{way}, {size}", {}).get("peak_mib"))]
        if points:
            panels.setdefault(way.split(",")[0], {})["checkpointing" if i % 2 else "plain"] = (*zip(*points), i % 2)
    if panels:
        studies.draw_panels(path, panels, "sequences per micro-batch", "peak memory, MiB")


@click.command()
@common.data_dir_option
@click.option("--sizes", default="16,32,64,128,256", callback=common.numbers, show_default=True,
              help="sequences per micro-batch")
@click.option("--iterations", default=45, show_default=True, help="of each run")
@common.memory_option
@click.option("--only", multiple=True, type=click.Choice([*LIMITED, *WAYS]), help="this limit or way (repeatable)")
@common.deadline_option
@common.json_option
@click.option("--picture", type=click.Path(dir_okay=False), help="draw memory over micro-batch here")
@common.tiny_option
@common.flags_argument
def main(data_dir, sizes, iterations, memory_gib, only, deadline, json_path, picture, tiny, flags):
    """Measure the memory of whole runs. Flags after -- go to train.py: -- --preset llama."""
    runs = {name: run for name, run in LIMITED.items() if not only or name in only}
    runs |= {f"{way}, {size}": (memory_gib, way, size) for size in sizes for way in WAYS if not only or way in only}
    clock, rows = common.Clock(deadline), {}
    common.print_row(("run", "peak MiB", "tokens/s", "auto", "wall s"), WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache_dir:
        for name, (gib, way, size) in runs.items():
            result = clock.timed(measure, data_dir, gib, way, size, iterations, tiny, flags, limit=240,
                                 cache_dir=cache_dir)
            rows[name] = dict(name=name, limit_gib=gib, flags=[WAYS[way], *flags]) | result
            show(rows[name])
            common.write_json(json_path, rows=list(rows.values()), table=table(rows, sizes), **common.today())
    print(f"\n{table(rows, sizes)}")
    if picture:
        draw(rows, sizes, picture)


if __name__ == "__main__":
    main()
