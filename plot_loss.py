"""Picture and summary of one run or several, from the metrics.jsonl that train.py writes, also while it trains."""

import json
import math
from pathlib import Path
from statistics import fmean

import click

from config import CONTEXT_SETTINGS, Command, UserError, atomic_write, quoted

STYLE = ["seaborn-v0_8-whitegrid", "seaborn-v0_8-colorblind", {"grid.color": "0.9"}]  # six colors, C0 to C5

X_AXES = {"iteration": ("iter", 1, "iteration"), "tokens": ("tokens", 1e6, "tokens, millions"),
          "seconds": ("seconds", 60, "training time, minutes")}
PANELS = ("grad-norm", "loss-scale", "tokens-per-second")


class Run:
    """Training and evaluation lines of one out folder, by iteration; a value that was not finite is nan."""

    def __init__(self, folder):
        self.folder, self.label = folder, str(folder)[-60:]  # the picture has no room for more
        self.train, self.val = read_metrics(folder / "metrics.jsonl")
        self.best = lowest(self.val, "val_loss")
        self.floor = self.best and self.best.get("floor")
        try:
            self.vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
        except (OSError, ValueError, KeyError, TypeError):
            self.vocab_size = None  # costs only the line for guessing


def read_metrics(path):
    """(training lines, evaluation lines). A resumed run may repeat an iteration: its last line counts."""
    by_kind = {"train_loss": {}, "val_loss": {}}
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = {name: math.nan if value is None else float(value) for name, value in json.loads(text).items()}
            for kind in by_kind.keys() & line.keys():
                by_kind[kind][line["iter"]] = line
        except (ValueError, TypeError, AttributeError, KeyError):
            click.echo(f"{path}, line {number} is damaged or still being written: skipped.", err=True)
    return [[lines[i] for i in sorted(lines)] for lines in by_kind.values()]


def lowest(lines, name):
    """The line with the lowest finite value, or None."""
    return min((line for line in lines if math.isfinite(line[name])), key=lambda line: line[name], default=None)


def read_runs(folders):
    """The runs among the folders; the others are skipped with a note. UserError if there is none."""
    runs = []
    for run in map(Run, folders):
        if run.best or lowest(run.train, "train_loss"):
            runs.append(run)
        else:
            click.echo(f"{run.folder}: no metrics.jsonl with a loss, skipped.", err=True)
    if not runs:
        first = folders[0]
        nearby = [path.parent for path in (*first.glob("*/metrics.jsonl"), *first.parent.glob("metrics.jsonl"))]
        raise UserError("no run to draw. Type: python " + (f"plot_loss.py {quoted(nearby[0])}" if nearby else
                                                           f"train.py --out-dir {quoted(first)}"))
    return runs


def summary(run):
    """A table of 79 columns: initial, final and best loss, with the iteration of each."""
    row = "  {:20}{:>19}{:>19}{:>19}".format
    last = max(run.train[-1:] + run.val[-1:], key=lambda line: line["iter"])
    rows = [f"{run.folder}\n  {last['iter']:,.0f} iterations, {last['tokens']:,.0f} tokens, "
            f"{last['seconds'] / 60:,.1f} minutes of training", row("nats per token", "initial", "final", "best")]
    for title, name in (("training", "train_loss"), ("validation", "val_loss"), ("  bits per byte", "val_bpb"),
                        ("whole validation", "full_val_loss"), ("  bits per byte", "full_val_bpb")):
        lines = [line for line in run.train + run.val if name in line]
        if lines:
            lines = [lines[0], lines[-1], lowest(lines, name) or lines[0]]
            rows.append(row(title, *(f"{line[name]:.4f} at {line['iter']:,.0f}" for line in lines)))
        floor = name.replace("val_loss", "floor")
        if floor != name and lines and floor in lines[-1]:  # above 100% a distance means nothing yet
            percent = [f"{line[name] / line[floor] - 1:.1%}" if line[name] < 2 * line[floor] else "-" for line in lines]
            rows.append(row(f"  above floor {lines[-1][floor]:.4f}", *percent))
    return "\n".join(rows)


# -----------------------------------------------------------------------------
# The picture

def running_mean(values, width):
    """Mean of the values around each one. At the start, in the steepest fall, the window narrows to stay centred."""
    half = width // 2
    return [fmean(values[max(0, i - half):i + min(i, half) + 1]) for i in range(len(values))]


def curve(lines, x, name):
    """(xs, ys) for matplotlib, which draws nan as a gap."""
    key, divisor, _ = X_AXES[x]
    return [line[key] / divisor for line in lines], [line.get(name, math.nan) for line in lines]


def style_of(i, lines):
    """Few points are marked: a line of one point would be invisible."""
    return dict(color=f"C{i}", ls=("-", "--", ":")[i // 6 % 3], marker="o" if len(lines) <= 40 else "", ms=3)


def fit_y(axis):
    """Limit a linear axis to what comes after a fifth of x, unless the fall before takes less than twice that room."""
    if "log" in (axis.get_xscale(), axis.get_yscale()):
        return  # all values have room
    ys, later = [], []
    for line in axis.get_lines():
        points = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)]
        ys += [y for x, y in points]
        later += [y for x, y in points if x > 0.2 * axis.dataLim.x1] or ys[-1:]
    if ys:
        low, high = min(later), max(later)
        high = max(ys) if max(ys) - high < 2 * (high - low) else high
        room = max(0.1 * (high - low), 0.02 * high)
        axis.set_ylim(low - room, high + room)


def draw_run(axis, run, i, x, smooth, bits, single):
    """Training as a line, validation as markers, a ring around the best. Only validation is logged in bits per byte."""
    name, style, label = "val_bpb" if bits else "val_loss", style_of(i, run.train), "none yet"
    if run.train and not bits:
        xs, losses = curve(run.train, x, "train_loss")
        smoothed = running_mean(losses, smooth or max(1, len(losses) // 50))
        axis.plot(xs, losses, color=style["color"], lw=0.8, alpha=0.3)
        axis.plot(xs, smoothed, **style, lw=1.8, label="training" if single else None)
    if run.best:
        (best_x,), (best,) = curve([run.best], x, name)
        label = f"best {best:.3f}"
        axis.plot(best_x, best, "o", ms=12, mfc="none", mec="black", zorder=4)
        axis.annotate(f"{best:.3f}" * single, (best_x, best), (0, 9), textcoords="offset points", ha="center")
    style |= dict(color="C2" if single else f"C{i}", marker="o", ms=5, lw=0.8)
    axis.plot(*curve(run.val, x, name), **style, label=f"validation: {label}" if single else f"{label}: {run.label}")


def draw_loss(axis, runs, x, smooth, bits):
    """The losses of all runs, and the floor and the loss of guessing where the runs share them."""
    for i, run in enumerate(runs):
        draw_run(axis, run, i, x, smooth, bits, len(runs) == 1)
    if run.floor and len({run.floor for run in runs}) == 1:
        axis.axhline(run.floor, color="gray", ls=":", label=f"corpus floor: {run.floor:.3f}")
    fit_y(axis)
    guess, (low, high) = math.log(run.vocab_size or 1), axis.get_ylim()
    if low < guess < high and len({run.vocab_size for run in runs}) == 1:
        axis.axhline(guess, color="gray", ls="--", label=f"guessing: ln {run.vocab_size} = {guess:.2f}")
    axis.set_ylabel("loss, bits per byte" if bits else "loss, nats per token")


def draw_panel(axis, runs, x, panel):
    for i, run in enumerate(runs):
        axis.plot(*curve(run.train, x, panel.replace("-", "_")), **style_of(i, run.train), lw=1.1)
    axis.set_title("learning rate" if panel == "lr" else panel.replace("-", " "), loc="left", fontsize=10)
    if panel == "loss-scale":  # the GradScaler halves and doubles it
        axis.set_yscale("log", base=2)
    elif panel != "lr":
        fit_y(axis)


def draw(runs, output, x, smooth, panels, log_x, log_y, bits):
    """Write the picture: loss above, learning rate and the panels asked for below, all over one x axis."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot no display is needed

    panels, single = ["lr"] * any(run.train for run in runs) + list(panels), len(runs) == 1
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3.8 + len(panels) + 0.2 * len(runs)), layout="constrained")
        axes = figure.subplots(1 + len(panels), sharex=True, squeeze=False, height_ratios=[4] + [1] * len(panels))[:, 0]
        top = axes[0]
        if log_x:
            top.set_xscale("log", nonpositive="mask")
        else:
            top.xaxis.get_major_locator().set_params(integer=x == "iteration", min_n_ticks=1)
        if log_y:
            top.set_yscale("log", subs=(1.5, 2, 3, 4, 6))
            top.yaxis.set_major_formatter("{x:g}")
            top.yaxis.set_minor_formatter("{x:g}")
        draw_loss(top, runs, x, smooth, bits)
        for axis, panel in zip(axes[1:], panels, strict=True):
            draw_panel(axis, runs, x, panel)
        axes[-1].set_xlabel(X_AXES[x][2])
        figure.legend(loc="outside upper left", alignment="left", ncols=3 if single else 1,
                      title=runs[0].label if single else "lines: training; " * (not bits) + "markers: validation")
        with atomic_write(output) as file:  # a viewer that follows a run never opens half a picture
            figure.savefig(file, dpi=200, format=output.suffix[1:].lower())


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.argument("run", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out-dir", type=click.Path(path_type=Path), metavar="RUN", help="the same as RUN")
@click.option("--output", type=click.Path(path_type=Path),
              help="picture to write, .png or .svg  [default: loss_curve.png in the first RUN]")
@click.option("--x", type=click.Choice(list(X_AXES)), default="iteration", help="x axis  [default: iteration]")
@click.option("--smooth", type=click.IntRange(1), metavar="N",
              help="training lines averaged into each point  [default: a fiftieth of them]")
@click.option("--panel", "panels", multiple=True, type=click.Choice(PANELS),
              help="one more panel below; repeatable")
@click.option("--log-x", is_flag=True, help="logarithmic x axis")
@click.option("--log-y", is_flag=True, help="logarithmic loss axis")
def main(run, out_dir, output, x, smooth, panels, log_x, log_y):
    """Draw the loss of each RUN, an out folder of train.py (default: out), and print a summary.

    Several runs share one picture. A run may still be training.
    """
    folders = run + (out_dir,) if out_dir else run or (Path("out"),)
    runs = read_runs(list({folder.resolve(): folder for folder in folders}.values()))
    output = output or runs[0].folder / "loss_curve.png"
    if output.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{output} is neither .png nor .svg. Type: --output {quoted(output.with_suffix('.png'))}")
    click.echo("\n".join(map(summary, runs)))
    bits = len({run.vocab_size for run in runs} - {None}) > 1
    if bits:
        click.echo("The vocabularies differ: the picture shows bits per byte, of validation only.")
    draw(runs, output, x, smooth, panels, log_x, log_y, bits)
    click.echo(f"Wrote {output}")


if __name__ == "__main__":
    main()
