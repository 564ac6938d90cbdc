"""Memory: what `train.py --plan` expects against what the card measures, and whole runs under a limit of memory.

On a machine without a CUDA card only the expectation is printed, and the whole runs show that they run.
"""

import re
import sys
import tempfile
from pathlib import Path

import click
import common

ITERATIONS = 6

# Name and train.py's flags, to compare the expectation with.
CONFIGURATIONS = {
    "rtx3050, compiled, 128": "--compile on --batch-size 128",
    "eager, 64": "--compile off --batch-size 64",
    "AdamW, compiled, 128": "--optimizer adamw --compile on --batch-size 128",
    "llama, compiled, 64": "--preset llama --compile on --batch-size 64",
    "dropout 0.2, compiled, 128": "--dropout 0.2 --compile on --batch-size 128",
    "context 1024, recomputed, 8": "--block-size 1024 --checkpoint-activations --compile off --batch-size 8",
    "float32, eager, 32": "--dtype float32 --compile off --batch-size 32",
    "dropout 0.2, eager, 64": "--dropout 0.2 --compile off --batch-size 64",
}
# Name, limit in GiB, flags: the real train.py from start to end, with evaluations, stories and checkpoints.
WHOLE_RUNS = {
    "whole run, 128": (6.5, "--batch-size 128 --compile on"),
    "whole run, auto": (3.0, "--batch-size auto --compile on"),
    "whole run, auto, eager": (3.0, "--batch-size auto --compile off"),
}
TINY = "--n-layer 2 --n-head 2 --n-embd 32 --intermediate-size 64 --tokens-per-iter 8192 --eval-tokens 2000"
TINY_BATCH = {"128": "8", "64": "4", "32": "2"}
WIDTHS = (28, 12, 12, 9, 9)
MIB = 2**20


def worker(job):
    """Expected and measured peak bytes of a few real iterations, in one configuration."""
    import train
    with tempfile.TemporaryDirectory() as folder:
        run, log = common.make_run([*job["flags"], "--data-dir", job["data_dir"]], folder)
        compiled = run.config.compile == "on"
        parts = train.expected_memory(run.model.config, run.config, run.batch_size, train.dtype_on_cuda(run), compiled)
        if run.device.type == "cuda":
            run.set_compiled(compiled)
            for _ in range(ITERATIONS):
                common.iterate(run, log)
            if run.compiled != compiled:
                return dict(error="torch.compile does not work here")
        log.bar.close()
    return compare(parts, common.peak_mib()) | dict(batch_size=run.batch_size)


def compare(parts, measured):
    """{"expected_mib", "measured_mib", "error_percent", "parts_mib"}; a positive error expected too much."""
    expected = sum(parts.values()) / MIB
    error = measured and round(100 * (expected / measured - 1), 1)
    return dict(expected_mib=round(expected, 1), measured_mib=measured and round(measured, 1), error_percent=error,
                parts_mib={name: round(size / MIB, 1) for name, size in parts.items()})


# Whole runs.

# Run by `python -c`: holds the process to argv[1] bytes of the card, then is train.py.
HELD = """
import sys
import torch
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) / total))
import train
train.main(sys.argv[2:], prog_name="train.py")
"""


def whole_run(data_dir, limit_gib, flags, iterations, timeout, cache_dir):
    """The real train.py under a limit: its peak from metrics.jsonl, its micro-batch, and how it ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out_dir, output = Path(folder) / "out", Path(folder) / "output.txt"
        command = [sys.executable, "-c", HELD, str(limit_gib * 2**30), *flags, "--data-dir", data_dir,
                   "--out-dir", str(out_dir), "--max-iters", str(iterations), "--log-interval", "5",
                   "--eval-interval", str(max(1, iterations // 3))]
        with open(output, "w") as log:
            code = common.run_process(command, log, timeout, cache_dir, cwd=common.ROOT)
        text = output.read_text(errors="replace")
        if code != 0:
            return dict(error=f"stopped after {timeout:.0f} s" if code is None else common.last_line(output))
        return read_run(out_dir, text) | dict(limit_mib=limit_gib * 1024)


def read_run(out_dir, text):
    """What a finished run left behind."""
    rows = common.read_jsonl(out_dir / "metrics.jsonl")
    peaks = [row["peak_memory_mib"] for row in rows if row.get("peak_memory_mib")]
    found = re.search(r"micro-batches of (\d+) fit", text)
    return dict(measured_mib=max(peaks, default=None), iterations=rows[-1]["iter"],
                batch_size_found=int(found[1]) if found else None, times_halved=text.count("Out of memory: going on"),
                compile_failed="does not work here" in text, evaluations=sum("val_loss" in row for row in rows),
                skipped=max(row.get("skipped", 0) for row in rows),
                checkpoints=sorted(path.name for path in out_dir.glob("*.pt")))


# The command.

def flag_list(text, tiny):
    """The words of a row's flags, made small for --tiny."""
    words = text.split()
    if tiny:
        words = [TINY_BATCH.get(word, "off" if word == "on" else word) for word in words] + TINY.split()
    return words


@click.command()
@click.option("--data-dir", type=click.Path(exists=True, file_okay=False), required=True, help="a prepared corpus")
@click.option("--iterations", default=45, show_default=True, help="of a whole run")
@click.option("--memory-gib", default=6.5, show_default=True, help="limit of the comparisons; 0 is the whole card")
@click.option("--only", multiple=True, type=click.Choice([*CONFIGURATIONS, *WHOLE_RUNS]), help="this row (repeatable)")
@click.option("--deadline", type=float, default=0, help="seconds after which no row is started")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="write the figures here too")
@click.option("--tiny", is_flag=True, help="a model that a CPU can train: shows that the script works")
def main(data_dir, iterations, memory_gib, only, deadline, json_path, tiny):
    """Compare expected memory with measured, and train under a limit of memory."""
    clock, rows, data_dir = common.Clock(deadline), [], str(Path(data_dir).resolve())
    common.print_row(("MiB", "expected", "measured", "error", "wall s"), WIDTHS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for name, (limit, flags) in WHOLE_RUNS.items():
            if not only or name in only:
                show(rows, name, clock.timed(whole_run, data_dir, limit, flag_list(flags, tiny), iterations,
                                             max(20.0, min(240.0, clock.left())), cache))
                common.write_json(json_path, rows=rows)
        for name, flags in CONFIGURATIONS.items():
            if not only or name in only:
                job = dict(data_dir=data_dir, flags=flag_list(flags, tiny), memory_gib=memory_gib)
                show(rows, name, clock.timed(common.measure, __file__, job, max(20.0, min(180.0, clock.left())), cache))
                common.write_json(json_path, rows=rows)
    errors = [abs(row["error_percent"]) for row in rows if row.get("error_percent") is not None]
    if errors:
        print(f"largest error of {len(errors)} expectations: {max(errors):.1f}%")


def show(rows, name, result):
    """Keep and print a row: a comparison, or a whole run with what it did in words below."""
    rows.append(dict(name=name) | result)
    if "error" in result:
        return common.print_row((name, result["error"]), (WIDTHS[0], 1))
    number = [None if result.get(key) is None else f"{result[key]:,.0f}" for key in ("expected_mib", "measured_mib")]
    error = result.get("error_percent")
    common.print_row((name, *number, None if error is None else f"{error:+.1f}%", result["wall_seconds"]), WIDTHS)
    if "limit_mib" in result:
        found = result["batch_size_found"]
        print(f"  finished {result['iterations']} iterations, {result['evaluations']} evaluations under "
              f"{result['limit_mib']:,.0f} MiB" + (f", auto chose {found}" if found else "")
              + f"; halved {result['times_halved']} times, {result['skipped']} skipped"
              + (", COMPILE FAILED" if result["compile_failed"] else ""), flush=True)


if __name__ == "__main__":
    common.start(main, worker)
