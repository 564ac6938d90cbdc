"""Five questions about training. Each command answers one with runs of train.py, a table, a JSON file and a picture.

    python tests/benchmarks/studies.py optimizer --data-dir data

writes the runs to WORK/optimizer (without their checkpoints), WORK/optimizer.json after every run and
WORK/optimizer.png at the end, and prints the table with the command of each row. Flags after -- go to train.py.

Every evaluation reads the whole validation set, so that any two bits per byte compare. Seconds are those of training,
without evaluations and without the start, which is nearly all compiling.
"""

import concurrent.futures
import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
import common

TINY_SCALE = 64  # --tiny divides the tokens of an iteration by this, and those of a run by its square
SECONDS_LEFT = 20  # for a table and a picture after the last run
PROBE_ITERS = 60
SPEED_ITERS = 400


# -----------------------------------------------------------------------------
# The columns of the tables: functions of a row

def rate(row):
    each = row["tokens_per_second"]
    return f"{each / 1e6:.2f} M" if each >= 1e6 else f"{each:,}"


def seconds(row):
    return f"{row['seconds'] - row['start_seconds']:.1f}"


def tokens(row):
    return f"{row['tokens'] / 1e6:.1f} M ({row['epochs']:.1f})"


def peak(row):
    return common.count(row["peak_mib"]) or "-"


def final(row):
    return f"{row['final_bpb']:.4f}"


def best(row):
    return f"{row['best_bpb']:.4f} at {row['best_iter']:,}"


# -----------------------------------------------------------------------------
# A study

class Study:
    """The runs of one study, its rows in JSON after each of them, its table and its picture."""

    def __init__(self, name, columns, work_dir, compiled, deadline, tiny, flags, tokens_per_iter, memory_gib=0):
        """`columns`: {title: function of a row that gives the cell}."""
        self.name, self.columns, self.tiny, self.rows, self.memory_gib = name, columns, tiny, [], memory_gib
        self.folder, self.clock = Path(work_dir) / name, common.Clock(deadline - SECONDS_LEFT)
        self.tokens_per_iter = tokens_per_iter // TINY_SCALE if tiny else tokens_per_iter
        evaluation = str(common.TINY_EVAL_TOKENS if tiny else 0)
        self.flags = ["--compile", "off" if tiny else compiled, "--sample-tokens", "0", "--eval-tokens", evaluation,
                      "--final-eval-tokens", evaluation, *flags]

    def iterations(self, tokens):
        return max(1, round(tokens / (TINY_SCALE**2 if self.tiny else 1) / self.tokens_per_iter))

    def run(self, name, data_dir, iterations, evaluations, *flags):
        """The row of one whole run of train.py, evaluated about this many times. A micro-batch is an iteration.

        Of its checkpoints best.pt stays until finish(): it may be the teacher of a later run.
        """
        folder, flags = self.folder / name, [*(common.TINY if self.tiny else []), *flags]
        block_size = max([int(size) for name, size in zip(flags, flags[1:]) if name == "--block-size"][-1:] or [256])
        flags += ["--data-dir", data_dir, "--tokens-per-iter", str(self.tokens_per_iter), "--batch-size",
                  str(max(1, self.tokens_per_iter // block_size)), "--max-iters", str(iterations), "--eval-interval",
                  str(max(1, round(iterations / evaluations))), *self.flags, "--overwrite"]
        row = dict(name=name, command=shlex.join(["python", "train.py", *flags, "--out-dir", str(folder)]))
        row |= self.clock.timed(common.run_train, flags, folder, memory_gib=self.memory_gib)
        (folder / "ckpt.pt").unlink(missing_ok=True)
        if "error" in row:
            return row
        meta = json.loads((Path(data_dir) / "meta.json").read_text(encoding="utf-8"))
        train_tokens = sum(shard["tokens"] for shard in meta["train"])
        return row | dict(train_tokens=train_tokens, epochs=round(row["tokens"] / train_tokens, 2))

    def run_all(self, runs, at_a_time=1):
        """Keep a row for each (facts, arguments of run), several runs at a time where no time is measured."""
        with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
            for row in (pool.map if at_a_time > 1 else map)(lambda one: one[0] | self.run(*one[1]), runs):
                self.keep(row)

    def keep(self, row):
        self.rows.append(row)
        self.write()
        failed = " (NOT COMPILED)" if row.get("compile_failed") else ""
        print(f"{row['name']}: {', '.join(self.cells(row))}{failed}", flush=True)

    def write(self):
        common.write_json(self.folder.with_suffix(".json"), study=self.name, rows=self.rows, table=self.table(),
                          command=shlex.join(["python", *sys.argv]), **common.today())

    def cells(self, row):
        return [row["error"]] if "error" in row else [str(cell(row)) for cell in self.columns.values()]

    def table(self):
        lines = [["", *self.columns], ["---"] * (1 + len(self.columns)),
                 *([row["name"], *self.cells(row)] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def finish(self, draw):
        """Print the table and the commands, then draw(rows without an error, path of the picture)."""
        print(f"\n{self.table()}\n", *(row["command"] for row in self.rows), sep="\n", flush=True)
        for path in self.folder.glob("*/best.pt"):
            path.unlink()
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


def draw_panels(path, panels, x_label, y_label):
    """Panels side by side, {title: {label: (xs, ys, number of the colour)}}, with one legend."""
    import matplotlib.style
    from matplotlib.figure import Figure

    import plot_loss
    with matplotlib.style.context(plot_loss.STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
        for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for label, (xs, ys, i) in lines.items():
                axis.plot(xs, ys, color=f"C{i}", marker="os^Dv"[i % 5], markersize=4, label=label)
            axis.set_title(title, loc="left", fontsize=11)
            axis.set_xlabel(x_label)
        figure.axes[0].set_ylabel(y_label)
        handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=3)
        figure.savefig(path, dpi=150)
    print(f"Wrote {path}")


# -----------------------------------------------------------------------------
# The commands

@click.group()
def main():
    """Studies of training, a command each."""


def shared_options(function):
    """Decorator: the options of all studies."""
    options = [
        click.option("--work-dir", default="out/studies", show_default=True, help="folder for runs, JSON and picture"),
        click.option("--compile", "compiled", type=click.Choice(["on", "off"]), default="on", show_default=True,
                     help="torch.compile"),
        click.option("--tokens-per-iter", default=32768, show_default=True, help="tokens per iteration"),
        click.option("--deadline", default=570.0, show_default=True, help="stop after this many seconds"),
        common.tiny_option, common.flags_argument]
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@common.data_dir_option
@click.option("--seconds", "budget", default=45.0, show_default=True, help="training time of each run")
@shared_options
def context(data_dir, budget, **given):
    """Context 128, 256, 512 and 1024 at equal training time.

    A short run of the same settings tells how many iterations fit; compiling and evaluating are not counted. A
    micro-batch is an iteration, with the same tokens at every length.
    """
    study = Study("context", {"tokens/s": rate, "tokens (epochs)": tokens, "training s": seconds, "peak MiB": peak,
                              "final bits per byte": final, "best at": best}, **given)
    for size in (16, 32, 64, 128) if study.tiny else (128, 256, 512, 1024):
        flags = ["--block-size", str(size), "--preset", "llama", "--dropout", "0.2"]
        row = study.run(f"probe-{size}", data_dir, PROBE_ITERS, 1, *flags)
        if "error" not in row:
            iterations = max(1, int(budget * row["tokens_per_second"] / study.tokens_per_iter))
            row = study.run(f"context-{size}", data_dir, iterations, 8, *flags)
        study.keep(row)
    study.finish(study.plot)


@main.command()
@click.option("--data-dir", "data_dirs", type=common.FOLDER, required=True, multiple=True,
              help="a prepared corpus (repeatable)")
@click.option("--tokens", "budget", default=20e6, show_default=True, help="tokens of each run")
@click.option("--jobs", default=4, show_default=True, help="runs at a time")
@shared_options
def regularization(data_dirs, budget, jobs, **given):
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
    study = Study("regularization", {"epochs": lambda row: f"{row['epochs']:.1f}", "best at": best,
                                     "final bits per byte": final}, **given)
    ways = [("0", "0.1"), ("0.1", "0.1"), ("0.2", "0.1"), ("0.1", "0"), ("0.1", "0.5")]
    labels = [f"dropout {dropout}, weight decay {decay}" for dropout, decay in ways]
    study.run_all([(dict(corpus=name, setting=label),
                    (f"{name}-dropout-{dropout}-decay-{decay}", folder, study.iterations(budget), 16, "--dropout",
                     dropout, "--weight-decay", decay))
                   for name, folder in corpora.items() for label, (dropout, decay) in zip(labels, ways)], jobs)

    def draw(rows, path):
        panels = {}
        for row in rows:
            iters, _, _, bpb = zip(*(row["curve"][2:] or row["curve"]))  # the first fall would set the scale
            title = f"{row['corpus']}: {row['train_tokens'] / 1e6:.2f} M tokens"
            panels.setdefault(title, {})[row["setting"]] = (iters, bpb, labels.index(row["setting"]))
        draw_panels(path, panels, "iteration", "validation, bits per byte")
    study.finish(draw)


@main.command()
@common.data_dir_option
@click.option("--tokens", "budget", default=30e6, show_default=True, help="tokens of each run")
@click.option("--target-bpb", default=0.75, show_default=True, help="bits per byte to reach")
@shared_options
def optimizer(data_dir, budget, target_bpb, **given):
    """Muon against AdamW, and learned against rotary positions, at the same tokens.

    AdamW alone takes the default of train.py's --learning-rate, Muon those of --muon- and --embedding-learning-rate.
    """
    def reached(row):
        at = next((s - row["start_seconds"] for _, _, s, bpb in row["curve"] if bpb <= target_bpb), None)
        return "not" if at is None else f"{at:.1f} s"

    study = Study("optimizer", {"tokens/s": rate, "tokens (epochs)": tokens, "training s": seconds,
                                f"at {target_bpb:g} bits per byte": reached, "final bits per byte": final}, **given)
    study.run_all([({}, (f"{name}-{position}", data_dir, study.iterations(budget), 16, "--optimizer", name,
                         "--position", position, "--dropout", "0.1"))
                   for name in ("muon", "adamw") for position in ("learned", "rotary")])
    study.finish(study.plot)


@main.command()
@common.data_dir_option
@click.option("--tokens", "budget", default=15e6, show_default=True, help="tokens of each run")
@shared_options
def precision(data_dir, budget, **given):
    """float16, bfloat16 and float32 (whose products are TF32 on Ampere and later): speed, memory, bits per byte."""
    study = Study("precision", {"tokens/s": rate, "training s": seconds, "peak MiB": peak, "iterations skipped":
                                lambda row: f"{row['skipped']} of {row['iterations']:,}", "final bits per byte": final},
                  **given)
    study.run_all([({}, (name, data_dir, study.iterations(budget), 6, "--dtype", name))
                   for name in ("float16", "bfloat16", "float32")])
    study.finish(study.plot)


@main.command()
@common.data_dir_option
@click.option("--small-data-dir", type=common.FOLDER, required=True, help="a tenth of the same corpus, same tokenizer")
@click.option("--tokens", "budget", default=60e6, show_default=True, help="tokens of most runs")
@click.option("--jobs", default=4, show_default=True, help="runs at a time, after the two that measure the speed")
@common.memory_option
@shared_options
def teacher(data_dir, small_data_dir, budget, jobs, **given):
    """Learning from a teacher too: from which, with how much dropout, on how much text.

    Each student starts when its teacher has ended. `speed` and `speed-taught` run alone, before all others. To make the
    two corpora, for example

    \b
    python preprocess.py prepare-dataset --data-dir data/all
    python preprocess.py prepare-dataset --sample-rate 0.1 --tokenizer data/all/tok4096.model --data-dir data/part10
    """
    study = Study("teacher", {"teacher": lambda row: row["teacher"] or "-", "tokens (epochs)": tokens, "peak MiB": peak,
                              "final bits per byte": final, "best at": best}, **given)
    llama, large = ["--preset", "llama"], ["--preset", "llama", "--n-layer", "12"]
    small, epochs = (small_data_dir, budget / 10), (data_dir, budget / 5)
    runs = {  # name: (folder and tokens, dropout, teacher, other flags); teachers before their students
        "llama": ((data_dir, budget), 0.3, None, llama),
        "llama-12-layers": ((data_dir, budget), 0.3, None, large),
        "learned": ((data_dir, budget), 0.3, None, []),
        "tenth": (small, 0.3, None, llama),
        "4-epochs": (epochs, 0, None, llama),
        "llama-twice-the-tokens": ((data_dir, 2 * budget), 0.3, None, llama),
        **{f"llama-taught-{dropout}": ((data_dir, budget), dropout, "llama", llama) for dropout in (0, 0.1, 0.2)},
        "llama-taught-0.1-weight-0.8": ((data_dir, budget), 0.1, "llama", [*llama, "--teacher-weight", "0.8"]),
        "llama-taught-by-12-layers": ((data_dir, budget), 0.1, "llama-12-layers", llama),
        **{f"learned-taught-{dropout}": ((data_dir, budget), dropout, "llama", []) for dropout in (0.1, 0.2)},
        "learned-taught-by-learned": ((data_dir, budget), 0.1, "learned", []),
        **{f"tenth-taught-{dropout}": (small, dropout, "tenth", llama) for dropout in (0.1, 0.2)},
        "4-epochs-taught": (epochs, 0, "4-epochs", llama),
        "llama-taught-0.1-seed-2": ((data_dir, budget), 0.1, "llama", [*llama, "--seed", "2"]),
        "learned-taught-0.1-seed-2": ((data_dir, budget), 0.1, "llama", ["--seed", "2"]),
    }

    def run(name, iterations, evaluations, folder, dropout, teacher, flags):
        teaching = ["--teacher", str(study.folder / teacher / "best.pt"), "--seed", "1"] if teacher else []
        return dict(teacher=teacher) | study.run(name, folder, iterations, evaluations, "--dropout", str(dropout),
                                                 *teaching, *flags)

    for name, of in (("speed", None), ("speed-taught", "speed")):
        study.keep(run(name, 4 if study.tiny else SPEED_ITERS, 1, data_dir, 0.1, of, llama))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        rows = {}

        def after_teacher(name, corpus, dropout, teacher, flags):
            if teacher:
                rows[teacher].result()
            return run(name, study.iterations(corpus[1]), 12, corpus[0], dropout, teacher, flags)
        for name, settings in runs.items():
            rows[name] = pool.submit(after_teacher, name, *settings)
        for row in concurrent.futures.as_completed(rows.values()):
            study.keep(row.result())
    speeds = {row["name"]: row.get("tokens_per_second") for row in study.rows[:2]}
    if all(speeds.values()):
        print(f"An iteration with a teacher takes {speeds['speed'] / speeds['speed-taught']:.2f} times as long.")

    def draw(rows, path):
        panels, labels = {}, {}
        for title in ("llama", "learned", "tenth", "4-epochs"):
            for row in rows:
                if row["name"].startswith(title):
                    _, tokens, _, bpb = zip(*(row["curve"][2:] or row["curve"]))  # the first fall would set the scale
                    label = row["name"].removeprefix(title).strip("-").replace("-", " ") or "alone"
                    panels.setdefault(title, {})[label] = ([count / 1e6 for count in tokens], bpb,
                                                           labels.setdefault(label, len(labels)))
        draw_panels(path, panels, "million tokens", "validation, bits per byte")
    study.finish(draw)


if __name__ == "__main__":
    main()
