"""Tokens a second of one process and of several (torchrun: NCCL on CUDA, gloo on the CPU), and the losses of both.

Both are train.py with the same flags, about 100 M parameters, dropout off; rates are medians of the log's lines after
the first ones. `--tiny` shows on a CPU that it works.
"""

import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import common

SHAPE = ["--n-layer", "14", "--n-head", "12", "--n-embd", "768", "--intermediate-size", "2048"]  # 102.5 M parameters
# Low, as the warmup is short: at higher rates rounding alone drives two equal runs apart.
RATES = ["--muon-learning-rate", "0.0005", "--embedding-learning-rate", "0.0002"]
WARMUP = 8  # iterations whose time does not count: compiling, the allocator, the first messages
WIDTHS = (12, 13, 10, 12, 14)


def measured_run(processes, flags, folder, timeout):
    """{"tokens_per_second", "losses", ...} of train.py in one process or several; {"error": ...} where it fails."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    output, out_dir = folder / f"{processes}.txt", folder / str(processes)
    command = [*start, str(common.ROOT / "train.py"), *flags, "--out-dir", str(out_dir)]
    with open(output, "w", encoding="utf-8") as log:
        code = common.run_process([sys.executable, *command], log, timeout)
    typed = f"{'torchrun ' + ' '.join(start[2:]) if start else 'python'} train.py {shlex.join(flags)}"
    if code != 0:
        # torchrun's own report comes last; the reason is what train.py said before it.
        said = output.read_text(encoding="utf-8", errors="replace").splitlines()
        why = next((line for line in said if "Error" in line), common.last_line(output))
        return dict(command=typed, error=f"stopped after {timeout:.0f} s" if code is None else why[:300])
    return dict(command=typed) | read_run(out_dir)


def read_run(out_dir):
    rows = common.read_jsonl(out_dir / "metrics.jsonl")
    lines = [row for row in rows if "train_loss" in row]
    rate = statistics.median(line["tokens_per_second"] for line in lines[WARMUP:] or lines)
    return dict(tokens_per_second=round(rate), peak_mib=lines[-1]["peak_memory_mib"], skipped=lines[-1]["skipped"],
                seconds=lines[-1]["seconds"], losses=[line["train_loss"] for line in lines],
                val_loss=rows[-1]["val_loss"])


def comparison(one, several):
    """The ratio of tokens a second, and how far the two curves lie apart."""
    apart = [abs(a - b) for a, b in zip(one["losses"], several["losses"], strict=True)]
    return dict(ratio=round(several["tokens_per_second"] / one["tokens_per_second"], 3), largest_difference=max(apart),
                validation_difference=abs(one["val_loss"] - several["val_loss"]))


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False), required=True, help="a prepared corpus")
@click.option("--processes", type=click.IntRange(min=2), help="how many  [default: one a GPU; 2 on the CPU]")
@click.option("--iterations", default=30, show_default=True, help="of each run")
@click.option("--tokens-per-iter", default=131072, show_default=True, help="tokens an iteration, of all together")
@click.option("--batch-size", default=64, show_default=True, help="sequences a micro-batch")
@click.option("--compile", "compiled", type=click.Choice(["on", "off"]), default="off", show_default=True,
              help="torch.compile")
@click.option("--timeout", default=150.0, show_default=True, help="seconds for each run")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the figures here too")
@click.option("--tiny", is_flag=True, help="a model that a CPU can train: shows that the script works")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def main(data_dir, processes, iterations, tokens_per_iter, batch_size, compiled, timeout, json_path, tiny, flags):
    """Time train.py in one process and in several, and compare their losses. Flags after -- go to train.py."""
    import torch
    processes = processes or max(2, torch.cuda.device_count())
    if tiny:
        tokens_per_iter, batch_size, compiled = 512 * processes, 4, "off"
    shape = [*common.shape_flags(True), "--device", "cpu"] if tiny else [*SHAPE, *RATES]
    flags = [*shape, "--data-dir", data_dir, "--tokens-per-iter", str(tokens_per_iter), "--batch-size", str(batch_size),
             "--max-iters", str(iterations), "--compile", compiled, "--log-interval", "1", "--eval-interval",
             str(iterations), "--eval-tokens", "16384", "--final-eval-tokens", "16384", "--sample-tokens", "0", *flags]
    rows, facts = [], dict(date=time.strftime("%Y-%m-%d"), **common.machine())
    common.print_row(("processes", "tokens/s", "peak MiB", "last loss", "validation"), WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for count in (1, processes):
            row = dict(processes=count) | measured_run(count, flags, Path(folder), timeout)
            rows.append(row)
            show(row)
            common.write_json(json_path, rows=rows, **facts)
    for row in rows:
        print(row["command"])
    if not any("error" in row for row in rows):
        result = comparison(*rows)
        common.write_json(json_path, rows=rows, **facts, **result)
        print(f"{processes} processes: {result['ratio']:.2f} times the tokens/s of one; losses at most "
              f"{result['largest_difference']:.1e} apart, validation {result['validation_difference']:.1e}")
    sys.exit(any("error" in row for row in rows))


def show(row):
    if "error" in row:
        return common.print_row((row["processes"], row["error"]), (WIDTHS[0], 1))
    common.print_row((row["processes"], f"{row['tokens_per_second']:,}", row["peak_mib"], f"{row['losses'][-1]:.4f}",
                      f"{row['val_loss']:.4f}"), WIDTHS)


if __name__ == "__main__":
    main()
