"""Five questions about training. Each command answers one with runs of train.py, a table, a JSON file and a picture.

    python tests/benchmarks/studies.py optimizer --data-dir data

leaves the runs in WORK/optimizer (their checkpoints are removed), WORK/optimizer.json after every run and
WORK/optimizer.png at the end, and prints the table with the command of each row. Words after -- go to train.py.

Every evaluation reads all validation stories, so that any two bits a byte compare. Tokens a second are the median of
the log's lines; seconds are those of training, without evaluations and without the start: what the first line of the
log took beyond that rate, nearly all of it compiling. `--tiny` shows on a CPU that it works.
"""

import concurrent.futures
import gc
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import common

TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--intermediate-size", "64", "--device", "cpu"]
TINY_SCALE = 64  # --tiny divides the tokens of an iteration by this, and those of a run by its square
SECONDS_LEFT = 20  # for a table and a picture after the last run
PROBE_ITERS = 60
PAIRS = {"eager": (False, False), "eager, recomputed": (False, True),  # memory: (compiled, activations recomputed)
         "compiled": (True, False), "compiled, recomputed": (True, True)}
MEMORY_ITERS = 8


class Study:
    """The runs of one study, its rows in JSON after each of them, its table and its picture."""

    def __init__(self, name, columns, work_dir, compiled, deadline, tiny, flags, tokens_per_iter=0):
        """`columns`: {title: function of a row that gives the cell}."""
        self.name, self.columns, self.tiny, self.rows = name, columns, tiny, []
        self.folder = Path(work_dir) / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clock, self.lock = common.Clock(deadline - SECONDS_LEFT), threading.Lock()
        self.tokens_per_iter = tokens_per_iter // TINY_SCALE if tiny else tokens_per_iter
        eval_tokens = "2000" if tiny else "0"
        self.flags = [*(TINY if tiny else []), "--compile", "off" if tiny else compiled, "--sample-tokens", "0",
                      "--eval-tokens", eval_tokens, "--final-eval-tokens", eval_tokens, *flags]

    def iterations(self, tokens):
        return max(1, round(tokens / (TINY_SCALE**2 if self.tiny else 1) / self.tokens_per_iter))

    def train(self, name, iterations, looks, *flags):
        """The row of one whole run of train.py, evaluated about `looks` times."""
        folder = self.folder / name
        block_size = int(flags[flags.index("--block-size") + 1]) if "--block-size" in flags else 256
        command = ["train.py", *flags, "--tokens-per-iter", str(self.tokens_per_iter), "--batch-size",
                   str(max(1, self.tokens_per_iter // block_size)), "--max-iters", str(iterations), "--eval-interval",
                   str(max(1, round(iterations / looks))), *self.flags, "--out-dir", str(folder), "--overwrite"]
        row = dict(name=name, command=shlex.join(["python", *command]))
        return row | self.clock.timed(finished_run, folder, command, max(30.0, self.clock.left()))

    def train_all(self, runs, at_a_time=1):
        """Keep a row for each (facts, arguments of train), several runs at a time where no time is measured."""
        with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
            waiting = [pool.submit(lambda facts, run: self.keep(facts | self.train(*run)), *run) for run in runs]
            try:
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        names = [run[0] for _, run in runs]
        self.rows.sort(key=lambda row: names.index(row["name"]))

    def keep(self, row):
        with self.lock:
            self.rows.append(row)
            self.write()
            failed = " (NOT COMPILED)" if row.get("compile_failed") else ""
            print(f"{row['name']}: {', '.join(self.cells(row))}{failed}", flush=True)

    def write(self):
        common.write_json(self.folder.with_suffix(".json"), study=self.name, date=time.strftime("%Y-%m-%d"),
                          torch=importlib.metadata.version("torch"), command=shlex.join(["python", *sys.argv]),
                          rows=self.rows, table=self.table())

    def cells(self, row):
        return [row["error"]] if "error" in row else [str(cell(row)) for cell in self.columns.values()]

    def table(self):
        lines = [["", *self.columns], ["---"] * (1 + len(self.columns)),
                 *([row["name"], *self.cells(row)] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def finish(self, draw):
        """Print the table and the commands, then the picture by `draw(rows without an error, its path)`."""
        self.write()
        print(f"\n{self.table()}\n", *(row["command"] for row in self.rows if "command" in row), sep="\n", flush=True)
        good = [row for row in self.rows if "error" not in row]
        if good:
            draw(good, self.folder.with_suffix(".png"))

    def plot(self, rows, path):
        """plot_loss.py over the seconds of the runs, counted from the end of the start."""
        folders = []
        for row in rows:
            folder, source = self.folder / "picture" / row["name"], self.folder / row["name"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text((source / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
            lines = common.read_jsonl(source / "metrics.jsonl")
            for line in lines:
                line["seconds"] = max(0.0, line["seconds"] - row["start_seconds"])
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            folders.append(str(folder))
        subprocess.run([sys.executable, str(common.ROOT / "plot_loss.py"), *folders, "--x", "seconds", "--output",
                        str(path)], check=True)


def finished_run(folder, command, timeout):
    """The figures of a run in a process of its own, or {"error": its last line}. Keeps its log, not its weights."""
    output = folder.with_name(folder.name + ".txt")  # with_suffix would cut the name at the point of 0.1
    with open(output, "w", encoding="utf-8") as log:
        code = common.run_process([sys.executable, str(common.ROOT / command[0]), *command[1:]], log, timeout)
    for name in ("ckpt.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    if code != 0:
        return dict(error=f"stopped after {timeout:.0f} s" if code is None else common.last_line(output))
    text = output.read_text(encoding="utf-8", errors="replace")
    return read_run(folder) | dict(device=re.search(r"Device: (.*)\.\n", text)[1],
                                   compile_failed="does not work here" in text)


def read_run(folder):
    """The figures of a finished run, from its metrics.jsonl and config.json."""
    rows = common.read_jsonl(folder / "metrics.jsonl")
    lines = [row for row in rows if "train_loss" in row]
    looks = [row for row in rows if "val_bpb" in row and row["iter"]]
    best, last = min(looks, key=lambda row: row["val_bpb"]), lines[-1]
    rate = statistics.median(line["tokens_per_second"] for line in lines[1:] or lines)
    start = max(0.0, lines[0]["seconds"] - lines[0]["tokens"] / rate)
    corpus = json.loads((folder / "config.json").read_text(encoding="utf-8"))["corpus"]
    return dict(iterations=last["iter"], tokens=last["tokens"], train_tokens=corpus["train_tokens"],
                epochs=round(last["tokens"] / corpus["train_tokens"], 2), seconds=round(last["seconds"] - start, 2),
                start_seconds=round(start, 2), tokens_per_second=round(rate), skipped=last["skipped"],
                peak_mib=max((line["peak_memory_mib"] or 0 for line in lines), default=0) or None,
                final_bpb=looks[-1]["val_bpb"], best_bpb=best["val_bpb"], best_iter=best["iter"],
                curve=[(row["iter"], round(max(0.0, row["seconds"] - start), 2), row["val_bpb"]) for row in looks])


def draw_panels(path, panels, x_label, y_label):
    """Panels side by side, {title: {label: (xs, ys, line style, number of its colour)}}; the first one's legend."""
    os.environ["MPLBACKEND"] = "Agg"
    import plot_loss
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (xs, ys, style, i) in lines.items():
            axis.plot(xs, ys, style, color=plot_loss.COLORS[i], marker=plot_loss.MARKERS[i], markersize=4, label=label)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel(x_label)
        axis.grid(color="#E6E6E6")
    figure.axes[0].set_ylabel(y_label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    print(f"Wrote {path}")


# What the columns of several tables show.

def rate(row):
    each = row["tokens_per_second"]
    return f"{each / 1e6:.2f} M" if each >= 1e6 else f"{each:,}"


def final(row):
    return f"{row['final_bpb']:.4f}"


def best(row):
    return f"{row['best_bpb']:.4f} at {row['best_iter']:,}"


def peak(row):
    return f"{row['peak_mib']:,.0f}" if row["peak_mib"] else "-"


def seconds(row):
    return f"{row['seconds']:.1f}"


def millions(row):
    return f"{row['tokens'] / 1e6:.1f} M ({row['epochs']:.1f})"


# The commands.

@click.group()
def main():
    """Studies of training, a command each."""


def settings(tokens_per_iter=32768, folders=False):
    """Decorator: the options that the studies share."""
    folder = click.Path(exists=True, file_okay=False)
    options = [
        click.option("--data-dir", "data_dirs" if folders else "data_dir", type=folder, required=True, multiple=folders,
                     help="a prepared corpus" + (" (repeatable)" if folders else "")),
        click.option("--work-dir", default="out/studies", show_default=True, help="folder of runs, JSON and picture"),
        click.option("--compile", "compiled", type=click.Choice(["on", "off"]), default="on", show_default=True,
                     help="torch.compile"),
        click.option("--deadline", default=570.0, show_default=True, help="seconds after which no run goes on"),
        click.option("--tiny", is_flag=True, help="a model that a CPU can train: shows that the script works"),
        click.option("--tokens-per-iter", default=tokens_per_iter, show_default=True, help="tokens an iteration"),
        click.argument("flags", nargs=-1, type=click.UNPROCESSED)]

    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function
    return decorate


@main.command()
@settings()
@click.option("--seconds", "budget", default=45.0, show_default=True, help="training time of each run")
def context(data_dir, budget, **given):
    """Context 128, 256, 512 and 1024 at equal training time.

    A short run of the same settings tells how many iterations the time holds; compiling and evaluating are not in it.
    A micro-batch is an iteration, the same tokens at every length.
    """
    study = Study("context", {"tokens/s": rate, "tokens (epochs)": millions, "training s": seconds, "peak MiB": peak,
                              "final bits a byte": final, "best at": best}, **given)
    for size in (128, 256, 512, 1024):
        size = size // 8 if study.tiny else size
        flags = ["--block-size", str(size), "--preset", "llama", "--dropout", "0.2", "--data-dir", data_dir]
        probe = study.train(f"probe-{size}", PROBE_ITERS, 1, *flags)
        if "error" in probe:
            study.keep(probe)
            continue
        iterations = max(1, int(budget * probe["tokens_per_second"] / study.tokens_per_iter))
        study.keep(study.train(f"context-{size}", iterations, 8, *flags))
    study.finish(study.plot)


@main.command()
@settings(folders=True)
@click.option("--tokens", default=20e6, show_default=True, help="tokens of each run")
@click.option("--jobs", default=4, show_default=True, help="runs at a time")
def regularization(data_dirs, tokens, jobs, **given):
    """Dropout and weight decay against the size of the corpus, five runs on each --data-dir.

    The corpora share a tokenizer; the validation stories are the same by design. To make them, for example

    \b
    python preprocess.py prepare-dataset --data-dir data/part100
    python preprocess.py prepare-dataset --sample-rate 0.3 --tokenizer data/part100/tok4096.model --data-dir data/part30
    python preprocess.py prepare-dataset --sample-rate 0.1 --tokenizer data/part100/tok4096.model --data-dir data/part10
    """
    tokenizers = {json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))["tokenizer"]["sha256"]
                  for folder in data_dirs}
    corpora = {Path(folder).name: folder for folder in data_dirs}
    if len(tokenizers) > 1 or len(corpora) < len(data_dirs):
        raise click.UsageError("the corpora need one tokenizer, so that losses compare, and folders of different "
                               "names: prepare them as --help says.")
    study = Study("regularization", {"passes": lambda row: f"{row['epochs']:.1f}", "best at": best,
                                     "final bits a byte": final}, **given)
    ways = [("0", "0.1"), ("0.1", "0.1"), ("0.2", "0.1"), ("0.1", "0"), ("0.1", "0.5")]
    study.train_all([(dict(corpus=name, setting=f"dropout {dropout}, weight decay {decay}"),
                      (f"{name}-dropout-{dropout}-decay-{decay}", study.iterations(tokens), 16, "--dropout", dropout,
                       "--weight-decay", decay, "--data-dir", folder))
                     for name, folder in corpora.items() for dropout, decay in ways], jobs)

    def draw(rows, path):
        panels, ways_seen = {}, list(dict.fromkeys(row["setting"] for row in rows))
        for row in rows:
            title = f"{row['corpus']}: {row['train_tokens'] / 1e6:.2f} M tokens"
            later = row["curve"][2:] or row["curve"]  # the first fall would set the scale
            iters, _, bpb = zip(*later, strict=True)
            panels.setdefault(title, {})[row["setting"]] = (iters, bpb, "-", ways_seen.index(row["setting"]))
        draw_panels(path, panels, "iteration", "validation, bits a byte")
    study.finish(draw)


@main.command()
@settings()
@click.option("--tokens", default=30e6, show_default=True, help="tokens of each run")
@click.option("--target-bpb", default=0.75, show_default=True, help="bits a byte whose time is told")
def optimizer(data_dir, tokens, target_bpb, **given):
    """Muon against AdamW, and learned against rotary positions, at the same tokens.

    AdamW alone takes the default of train.py's --learning-rate, Muon those of --muon- and --embedding-learning-rate.
    """
    def reached(row):
        at = next((s for _, s, bpb in row["curve"] if bpb <= target_bpb), None)
        return "not" if at is None else f"{at:.1f} s"

    study = Study("optimizer", {"tokens/s": rate, "tokens (epochs)": millions, "training s": seconds,
                                f"at {target_bpb:g} bits a byte": reached, "final bits a byte": final}, **given)
    study.train_all([({}, (f"{name}-{position}", study.iterations(tokens), 16, "--optimizer", name, "--position",
                           position, "--dropout", "0.1", "--data-dir", data_dir))
                     for name in ("muon", "adamw") for position in ("learned", "rotary")])
    study.finish(study.plot)


@main.command()
@settings()
@click.option("--tokens", default=15e6, show_default=True, help="tokens of each run")
def precision(data_dir, tokens, **given):
    """float16, bfloat16 and float32 (whose products are TF32 on Ampere and later): speed, memory, bits a byte."""
    study = Study("precision", {"tokens/s": rate, "training s": seconds, "peak MiB": peak, "iterations skipped":
                                lambda row: f"{row['skipped']} of {row['iterations']:,}", "final bits a byte": final},
                  **given)
    study.train_all([({}, (name, study.iterations(tokens), 6, "--dtype", name, "--data-dir", data_dir))
                     for name in ("float16", "bfloat16", "float32")])
    study.finish(study.plot)


# Memory: no run is needed, a few iterations show the peak.

@main.command()
@settings(tokens_per_iter=65536)
@click.option("--sizes", default="16,32,64,128,256", show_default=True, help="sequences a micro-batch, upwards")
def memory(data_dir, sizes, **given):
    """Peak memory against micro-batch, with and without recomputed activations, eager and compiled.

    A process for each of the four curves, a few iterations for each micro-batch; in brackets what --plan expects.
    """
    columns = {name: lambda row, name=name: memory_cell(row["cells"].get(name)) for name in PAIRS}
    study = Study("memory", columns, **given)
    sizes = [max(1, int(size) // (16 if study.tiny else 1)) for size in sizes.split(",")]
    tokens_per_iter = max(sizes) * common.TINY_SHAPE["block_size"] if study.tiny else study.tokens_per_iter
    rows = {size: dict(name=str(size), cells={}) for size in sizes}
    study.rows = list(rows.values())
    for name, (compiled, recomputed) in PAIRS.items():
        flags = [*(common.shape_flags(study.tiny) if study.tiny else []), "--data-dir", data_dir, "--tokens-per-iter",
                 str(tokens_per_iter), "--compile", "on" if compiled and not study.tiny else "off",
                 *(["--checkpoint-activations"] if recomputed else []), *given["flags"]]
        command = f"python train.py --plan {shlex.join(flags)} --batch-size"
        print(f"{name}: {command} N", flush=True)
        cells = study.folder / f"{name}.jsonl"
        cells.write_text("")
        job = dict(flags=flags, sizes=sizes, compiled=compiled, cells=str(cells))
        result = study.clock.timed(common.measure, __file__, job, max(30.0, study.clock.left()), None)
        for cell in common.read_jsonl(cells):
            size = cell["batch_size"]
            rows[size]["cells"][name] = cell | dict(command=f"{command} {size}", device=result.get("device"))
        if "error" in result:
            print(f"{name}: {result['error']}", flush=True)
        study.write()
    study.finish(draw_memory)


def memory_cell(cell):
    """`measured (expected) MiB, tokens a second` of a cell."""
    if not cell or "error" in cell:
        return cell and cell["error"] or "-"
    return f"{peak(cell)} ({cell['expected_mib']:,.0f}) MiB, {rate(cell)}/s"


def draw_memory(rows, path):
    panels = {}
    for way in ("eager", "compiled"):
        for key, label, style in (("peak_mib", "measured", "-"), ("expected_mib", "expected", ":")):
            for i, (name, words) in enumerate(((way, "plain"), (f"{way}, recomputed", "recomputed"))):
                points = [(int(row["name"]), cell[key]) for row in rows
                          if (cell := row["cells"].get(name)) and cell.get(key)]
                if points:
                    panels.setdefault(way, {})[f"{words}, {label}"] = (*zip(*points, strict=True), style, i)
    if panels:
        draw_panels(path, panels, "sequences a micro-batch", "peak memory, MiB")


def worker(job):
    """The cells of one curve, the smallest micro-batch first; each goes to the file job["cells"] once it is known."""
    for size in job["sizes"]:
        with open(job["cells"], "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(batch_size=size) | peak_of(job, size)) + "\n")
    return {}


def peak_of(job, size):
    """Expected and measured peak of a few iterations at one micro-batch; {"error": ...} where it does not fit."""
    import torch

    import train
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else the second size is compiled for sizes of all kinds
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0, []
    try:
        with tempfile.TemporaryDirectory() as folder:
            run, log = common.make_run([*job["flags"], "--batch-size", str(size)], folder)
            log.bar.close()
            parts = train.expected_memory(run.model.config, run.config, run.batch_size, train.dtype_on_cuda(run),
                                          job["compiled"])
            for _ in range(MEMORY_ITERS):
                started = time.perf_counter()
                common.iterate(run, log)
                common.synchronize()
                seconds.append(time.perf_counter() - started)
    except Exception as error:
        if "out of memory" not in str(error).lower():
            raise
        return dict(error="does not fit")
    if run.compiled != (run.config.compile == "on"):
        return dict(error="torch.compile does not work here")
    return dict(expected_mib=round(sum(parts.values()) / 2**20), peak_mib=common.peak_mib(), before_mib=before / 2**20,
                tokens_per_second=round(run.config.tokens_per_iter / statistics.median(seconds[2:])))


if __name__ == "__main__":
    common.start(main, worker)
