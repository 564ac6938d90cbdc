"""Picture and summary of one run or several, from the metrics.jsonl that train.py writes, also while it trains."""

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean

import click

from config import CONTEXT_SETTINGS, Command, UserError, atomic_write, quoted

STYLE = ["seaborn-v0_8-whitegrid", "seaborn-v0_8-colorblind", {"grid.color": "0.9"}]  # six colors, C0 to C5

X_AXES = {"iteration": ("iter", 1, "iteration"), "tokens": ("tokens", 1e6, "tokens, millions"),
          "seconds": ("seconds", 60, "training time, minutes")}
TABLE = (("training", "train_loss", None),  # title of the row, name in metrics.jsonl, name of its floor
         ("validation", "val_loss", "floor"), ("  bits per byte", "val_bpb", None),
         ("whole validation", "full_val_loss", "full_floor"), ("  bits per byte", "full_val_bpb", None))
WATCH_SECONDS = 5  # a picture takes half a second of a CPU on which a run may be training


class RunMetrics:
    """The metrics of one out folder: `lines` has a dict per iteration."""

    def __init__(self, folder):
        self.folder, self.label = folder, str(folder)[-60:]  # the picture has no room for more
        self.lines, self.notes = read_metrics(folder / "metrics.jsonl")
        if not self.lines:
            self.notes.append(f"{folder}: no metrics.jsonl with a loss, skipped.")
        self.vocab_size, self.ended = None, False
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.vocab_size = config["model"]["vocab_size"]
            max_iters = (config.get("train") or config["reinforce"])["max_iters"]
            self.ended = self.lines_with("val_loss")[-1]["iter"] >= max_iters  # a run ends with an evaluation

    def lines_with(self, name):
        return [line for line in self.lines if name in line]

    def lowest(self, name):
        """The line with the lowest finite value, or None."""
        lines = [line for line in self.lines_with(name) if math.isfinite(line[name])]
        return min(lines, key=lambda line: line[name], default=None)


def read_metrics(path):
    """One dict per iteration, where a value that was not finite is nan, and notes on damaged lines."""
    by_iter, notes = {}, []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = {name: math.nan if value is None else float(value) for name, value in json.loads(text).items()}
            i, _, _ = line["iter"], line["tokens"], line["seconds"]  # each line has them
            by_iter[i] = by_iter.get(i, {}) | line  # training and evaluation have a line each; the last one counts
        except (ValueError, TypeError, AttributeError, KeyError):
            notes.append(f"{path}, line {number} is damaged or still being written: skipped.")
    return [by_iter[i] for i in sorted(by_iter)], notes


def read_runs(folders):
    """The runs among the folders; the others are skipped with a note. UserError if there is none."""
    runs = [RunMetrics(folder) for folder in folders]
    for run in runs:
        for note in run.notes:
            click.echo(note, err=True)
    runs = [run for run in runs if run.lines]
    if not runs:
        first = folders[0]
        nearby = [*first.glob("*/metrics.jsonl"), *first.parent.glob("metrics.jsonl")]
        command = f"plot_loss.py {quoted(nearby[0].parent)}" if nearby else f"train.py --out-dir {quoted(first)}"
        raise UserError(f"no run to draw. Type: python {command}")
    return runs


def summary(run):
    """A table of 79 columns: initial, final and best loss, with the iteration of each."""
    row, last = "  {:20}{:>19}{:>19}{:>19}".format, run.lines[-1]
    rows = [f"{run.folder}\n  {last['iter']:,.0f} iterations, {last['tokens']:,.0f} tokens, "
            f"{last['seconds'] / 60:,.1f} minutes of training", row("nats per token", "initial", "final", "best")]
    for title, name, floor_name in TABLE:
        if lines := run.lines_with(name):
            lines = [lines[0], lines[-1], run.lowest(name) or lines[0]]
            rows.append(row(title, *(f"{line[name]:.4f} at {line['iter']:,.0f}" for line in lines)))
            if floor := lines[1].get(floor_name):  # above 100% a distance means nothing yet
                distances = [line[name] / floor - 1 for line in lines]
                rows.append(row(f"  above floor {floor:.4f}", *(f"{d:.1%}" if d < 1 else "-" for d in distances)))
    return "\n".join(rows)


def watch_runs(folders, redraw):
    """Call redraw(runs), which returns a path, whenever a run has written, until all have ended."""
    drawn, terminal = None, sys.stdout.isatty()
    while True:
        runs = [RunMetrics(folder) for folder in folders]
        if all(run.ended for run in runs):
            return click.echo(nl=terminal and drawn is not None)
        runs = [run for run in runs if run.lines]
        values = [sum(map(len, run.lines)) for run in runs]
        if values != drawn:
            drawn = values
            if runs:
                iterations = ", ".join(f"{run.lines[-1]['iter']:,.0f}" for run in runs)
                line = f"Iteration {iterations} (Ctrl-C exits): {redraw(runs)}"
            else:
                line = f"Waiting for the first loss (Ctrl-C exits): {', '.join(map(str, folders))}"
            if terminal:  # in place, and short enough not to scroll
                line = "\r\033[K" + line[:shutil.get_terminal_size().columns - 1]
            click.echo(line, nl=not terminal)
        time.sleep(WATCH_SECONDS)


# -----------------------------------------------------------------------------
# The picture

def running_mean(values, width):
    """Mean of the values around each one. At the start, in the steepest fall, the window narrows to stay centred."""
    half = width // 2
    return [fmean(values[max(0, i - half):i + min(i, half) + 1]) for i in range(len(values))]


def draw_curve(axis, i, run, name, width=1, **style):
    """Plot a value of run number i. Few points are marked: a line of one point would be invisible."""
    lines = run.lines_with(name)
    look = dict(color=f"C{i}", ls=("-", "--", ":")[i // 6 % 3], lw=1, marker="o" if len(lines) <= 40 else "", ms=3)
    values = running_mean([line[name] for line in lines], width)
    axis.plot([line["x"] for line in lines], values, **look | style)


def fit_y(axis):
    """Limit a linear axis to what comes after a fifth of each curve, where the fall before takes twice that height."""
    later = [y for curve in axis.lines for x, y in curve.get_xydata()
             if math.isfinite(y) and x >= 0.2 * curve.get_xdata()[-1]]
    if later and axis.get_xscale() == axis.get_yscale() == "linear":
        low, high = min(later), max(later)
        if axis.dataLim.y1 > high + 2 * (high - low):
            room = max(0.1 * (high - low), 0.02 * high)
            axis.set_ylim(low - room, high + room)


def draw_loss(axis, runs, smooth, bits):
    """Training and validation, a ring around the best. Only validation is logged in bits per byte."""
    name, unit = ("val_bpb", "bits per byte") if bits else ("val_loss", "nats per token")
    single, floors = len(runs) == 1, set()
    for i, run in enumerate(runs):
        if not bits and (lines := run.lines_with("train_loss")):
            draw_curve(axis, i, run, "train_loss", alpha=0.3)
            draw_curve(axis, i, run, "train_loss", smooth or max(1, len(lines) // 50), lw=1.8,
                       label="training" if single else None)
        best = run.lowest(name)
        floors.add(best and best.get("floor"))
        label = f"best {best[name]:.3f}" if best else "none yet"
        own = dict(color="C2", label=f"validation: {label}") if single else dict(label=f"{label}: {run.label}")
        draw_curve(axis, i, run, name, marker="o", ms=5, **own)
        if best:
            axis.plot(best["x"], best[name], "o", ms=12, mfc="none", mec="black", zorder=4)
    if len(floors) == 1 and (floor := floors.pop()):
        axis.axhline(floor, color="gray", ls=":", label=f"corpus floor: {floor:.3f}")
    fit_y(axis)
    axis.set_ylabel(f"loss, {unit}")
    axis.figure.legend(loc="outside upper left", alignment="left", ncols=3 if single else 1,
                       title=runs[0].label if single else "large markers: validation")


def vocabularies_differ(runs):
    return len({run.vocab_size for run in runs} - {None}) > 1


def draw(runs, output, x, smooth, panels, log_x, log_y):
    """Write the picture (loss above, learning rate and panels below, over one x axis) and return its path."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot no display is needed

    output = output or runs[0].folder / "loss_curve.png"
    x_name, unit, x_label = X_AXES[x]
    for run in runs:
        for line in run.lines:
            line["x"] = line[x_name] / unit
    rewarded = any("reward" in line for run in runs for line in run.lines)  # by reinforce.py
    names = ["reward"] * rewarded + ["lr", *(panel.replace("-", "_") for panel in panels)]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3.8 + len(names) + 0.2 * len(runs)), layout="constrained")
        top, *below = figure.subplots(1 + len(names), sharex=True, height_ratios=[4] + [1] * len(names))
        if log_x:
            top.set_xscale("log", nonpositive="mask")
        if log_y:
            top.set_yscale("log", subs=(1.5, 2, 3, 4, 6))
            top.yaxis.set_major_formatter("{x:g}")
            top.yaxis.set_minor_formatter("{x:g}")
        draw_loss(top, runs, smooth, vocabularies_differ(runs))
        for axis, name in zip(below, names, strict=True):
            for i, run in enumerate(runs):
                draw_curve(axis, i, run, name)
            axis.set_title("learning rate" if name == "lr" else name.replace("_", " "), loc="left", fontsize=10)
            if name == "loss_scale":
                axis.set_yscale("log", base=2)
            fit_y(axis)
        below[-1].set_xlabel(x_label)
        with atomic_write(output) as file:
            figure.savefig(file, dpi=200, format=output.suffix[1:].lower())
    return output


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("run", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out-dir", type=click.Path(path_type=Path), metavar="RUN", help="another way to give RUN")
@click.option("--output", type=click.Path(path_type=Path),
              help="picture to write, .png or .svg  [default: loss_curve.png in the first RUN]")
@click.option("--x", type=click.Choice(list(X_AXES)), default="iteration", help="x axis  [default: iteration]")
@click.option("--smooth", type=click.IntRange(1), metavar="N",
              help="log lines averaged per point  [default: a fiftieth of them]")
@click.option("--panel", "panels", type=click.Choice(["grad-norm", "loss-scale", "tokens-per-second"]), multiple=True,
              help="add a panel; may be given several times")
@click.option("--log-x", is_flag=True, help="logarithmic x axis")
@click.option("--log-y", is_flag=True, help="logarithmic loss axis")
@click.option("--watch", is_flag=True, help="redraw as training goes on, until each RUN has ended or Ctrl-C")
def main(run, out_dir, output, watch, **look):
    """Draw the loss of each RUN, an out folder of train.py (default: out), and print a summary.

    Several runs share one picture. A run may still be training.
    """
    if output and output.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{output} is neither .png nor .svg. Type: --output {quoted(output.with_suffix('.png'))}")
    folders = run + (out_dir,) if out_dir else run or (Path("out"),)
    if watch:
        watch_runs(folders, lambda runs: draw(runs, output, **look))
    runs = read_runs(folders)
    click.echo("\n".join(map(summary, runs)))
    if vocabularies_differ(runs):
        click.echo("The vocabularies differ: the picture shows bits per byte, of validation only.")
    click.echo(f"Wrote {draw(runs, output, **look)}")


if __name__ == "__main__":
    main()
