"""Tokens per second of one process and of several (torchrun: NCCL on CUDA, gloo on the CPU), and the losses of both.

Both are train.py with the same flags, about 100 M parameters, dropout off.
"""

import shlex
import sys
import tempfile
from pathlib import Path

import click
import common

SHAPE = ["--n-layer", "14", "--n-head", "12", "--n-embd", "768", "--intermediate-size", "2048"]  # 102.5 M parameters
# Low, as the warmup is short: at higher rates rounding alone drives two equal runs apart.
RATES = ["--muon-learning-rate", "0.0005", "--embedding-learning-rate", "0.0002"]
WARMUP = 8  # iterations that do not count: compiling, the allocator, the first messages
WIDTHS = (12, 13, 10, 12, 14)


def measure(processes, flags, out_dir, timeout):
    """The figures of train.py in this many processes, and its losses."""
    result = common.run_train(flags, out_dir, timeout, processes=processes, skip=WARMUP)
    torchrun = f"torchrun --standalone --nproc-per-node={processes}" if processes > 1 else "python"
    result |= dict(processes=processes, command=f"{torchrun} train.py {shlex.join(flags)}")
    if "error" not in result:
        rows = common.read_jsonl(out_dir / "metrics.jsonl")
        result |= dict(losses=[row["train_loss"] for row in rows if "train_loss" in row], val_loss=rows[-1]["val_loss"])
    return result


def comparison(one, several):
    """The ratio of tokens per second, and how far apart the losses are."""
    apart = max(abs(a - b) for a, b in zip(one["losses"], several["losses"], strict=True))
    return dict(ratio=round(several["tokens_per_second"] / one["tokens_per_second"], 3), largest_difference=apart,
                validation_difference=abs(one["val_loss"] - several["val_loss"]))


def show(row):
    if "error" in row:
        return common.print_row((row["processes"], row["error"]), (WIDTHS[0], 1))
    common.print_row((row["processes"], common.count(row["tokens_per_second"]), common.count(row["peak_mib"]),
                      f"{row['losses'][-1]:.4f}", f"{row['val_loss']:.4f}"), WIDTHS)


@click.command()
@common.data_dir_option
@click.option("--processes", type=click.IntRange(2), help="how many  [default: one per GPU; 2 on the CPU]")
@click.option("--iterations", default=30, show_default=True, help="of each run")
@click.option("--tokens-per-iter", default=131072, show_default=True, help="tokens per iteration, in total")
@click.option("--batch-size", default=64, show_default=True, help="sequences per micro-batch")
@click.option("--compile", "compiled", type=click.Choice(["on", "off"]), default="off", show_default=True,
              help="torch.compile")
@click.option("--timeout", default=150.0, show_default=True, help="seconds for each run")
@common.json_option
@common.tiny_option
@common.flags_argument
def main(data_dir, processes, iterations, tokens_per_iter, batch_size, compiled, timeout, json_path, tiny, flags):
    """Time train.py in one process and in several, and compare their losses. Flags after -- go to train.py."""
    import torch
    processes = processes or max(2, torch.cuda.device_count())
    if tiny:
        tokens_per_iter, batch_size, compiled = 512 * processes, 4, "off"
    flags = [*(common.TINY if tiny else [*SHAPE, *RATES]), "--data-dir", data_dir, "--tokens-per-iter",
             str(tokens_per_iter), "--batch-size", str(batch_size), "--max-iters", str(iterations), "--compile",
             compiled, "--log-interval", "1", "--eval-interval", str(iterations), "--eval-tokens", "16384",
             "--final-eval-tokens", "16384", "--sample-tokens", "0", *flags]
    rows, result = [], {}
    common.print_row(("processes", "tokens/s", "peak MiB", "last loss", "validation"), WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for count in (1, processes):
            rows.append(measure(count, flags, Path(folder) / str(count), timeout))
            show(rows[-1])
    print(*(row["command"] for row in rows), sep="\n")
    if not any("error" in row for row in rows):
        result = comparison(*rows)
        print(f"{processes} processes: {result['ratio']:.2f} times the tokens/s of one; losses at most "
              f"{result['largest_difference']:.1e} apart, validation {result['validation_difference']:.1e}")
    common.write_json(json_path, rows=rows, **result, **common.today())
    sys.exit(not result)


if __name__ == "__main__":
    main()
