"""Picture and summary of one run or several, from the metrics.jsonl that train.py writes, also while it trains."""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import click

from config import COMMAND_LINE, GroupedCommand, UserError, replace_file

# Seven of Okabe and Ito's colours: told apart with any colour vision, and in grey by the markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = "osD^vPX"
INK, PALE = "#222222", "#767676"

PANELS = {"grad-norm": ("grad_norm", "gradient norm"), "loss-scale": ("loss_scale", "loss scale"),
          "tokens-per-second": ("tokens_per_second", "tokens a second")}

# Units of the x axis: the first whose threshold the longest run reaches. (threshold, divisor, label)
UNITS = {"iteration": [(0, 1, "iteration")],
         "tokens": [(2e9, 1e9, "tokens, billions"), (2e6, 1e6, "tokens, millions"), (0, 1, "tokens")],
         "seconds": [(3 * 3600, 3600, "training time, hours"), (180, 60, "training time, minutes"),
                     (0, 1, "training time, seconds")]}


@dataclass(frozen=True)
class Run:
    """What one out folder says: lines in the order of iterations; `vocab_size` and `floor` are None if unknown."""

    folder: Path
    train: list
    val: list
    vocab_size: int | None

    @property
    def floor(self):
        return next((line["floor"] for line in reversed(self.val) if line.get("floor") is not None), None)

    @property
    def best(self):
        """The evaluation line with the lowest loss, or None."""
        return min((line for line in self.val if line["val_loss"] is not None),
                   key=lambda line: line["val_loss"], default=None)


def read_metrics(path):
    """(training lines, evaluation lines) by iteration. A resumed run may repeat an iteration: its last line counts."""
    train, val = {}, {}
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity become None
        except (ValueError, RecursionError):
            if number == len(texts):  # no newline yet: train.py is writing this line now
                continue
            line = None
        if not isinstance(line, dict) or not all(map(is_number, line.values())) or type(line.get("iter")) is not int:
            raise UserError(f"{path}, line {number}: {text[:40]!r} is not a line of a training log. Delete it, then "
                            f"type: python plot_loss.py {path.parent}")
        for kind, name in ((train, "train_loss"), (val, "val_loss")):
            if name in line:
                kind[line["iter"]] = line
    return [train[i] for i in sorted(train)], [val[i] for i in sorted(val)]


def is_number(value):
    """Whether train.py may have written a value: nothing there is negative or past its 64-bit integer, 32-bit float."""
    return value is None or isinstance(value, (int, float)) and 0 <= value < (2**63 if isinstance(value, int) else 4e38)


def read_run(folder):
    """The run in `folder`; UserError, with the command to type, if there is nothing to draw."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        nearby = sorted(folder.glob("*/metrics.jsonl"))
        advice = (f"There is a run below it; type: python plot_loss.py {nearby[0].parent}" if nearby else
                  f"Train first; type: python train.py --out-dir {folder}")
        raise UserError(f"no {path}. {advice}")
    train, val = read_metrics(path)
    if all(line[name] is None for lines, name in ((train, "train_loss"), (val, "val_loss")) for line in lines):
        raise UserError(f"{path} holds no loss yet. When train.py has printed one, type: python plot_loss.py {folder}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vocab_size = config["model"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        vocab_size = None  # only the line of guessing is lost
    if type(vocab_size) is not int or vocab_size < 2:
        vocab_size = None
    return Run(folder, train, val, vocab_size)


def short_labels(folders):
    """For each folder the fewest last parts of its path that no other folder ends with."""
    paths = [folder.resolve().parts for folder in folders]
    labels = []
    for path in paths:
        n = next((n for n in range(1, len(path)) if sum(other[-n:] == path[-n:] for other in paths) == 1), len(path))
        labels.append("/".join(path[-n:]))
    return labels


def running_mean(values, width):
    """Mean of the `width` values around each one, None left out; as long as `values`.

    The window is centred, so that the curve does not lag; where the loss falls fastest, at the start, it narrows to
    stay so, and the end cuts it off. An even width counts as the next odd one."""
    means = []
    for i in range(len(values)):
        half = min(width // 2, i)
        window = [value for value in values[i - half:i + half + 1] if value is not None]
        means.append(sum(window) / len(window) if window else None)
    return means


def duration(seconds):
    """Seconds in the unit in which a person would say them."""
    return (f"{seconds:.0f} s" if seconds < 180 else
            f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h")


def summary(run):
    """A small table: initial, final and best loss in training and validation, with the iteration of each."""
    def row(title, lines, name, best, form="{:.4f}"):
        cells = ["-" if line is None else "not finite" if line.get(name) is None else
                 f"{form.format(line[name])} at {line['iter']:,}" for line in (*lines, best)]
        return f"  {title:26}" + "".join(f"{cell:>18}" for cell in cells)

    last = max(run.train[-1:] + run.val[-1:], key=lambda line: line["iter"])
    rows = [f"{run.folder}: {last['iter']:,} iterations, {last.get('tokens') or 0:,} tokens, "
            f"{duration(last.get('seconds') or 0)} of training",
            " " * 28 + "".join(f"{word:>18}" for word in ("initial", "final", "best"))]
    if run.train:
        best = min((line for line in run.train if line["train_loss"] is not None),
                   key=lambda line: line["train_loss"], default=None)
        rows.append(row("training, nats a token", (run.train[0], run.train[-1]), "train_loss", best))
    if run.val:
        val = [run.val[0], run.val[-1]]
        rows.append(row("validation, nats a token", val, "val_loss", run.best))
        if any(line.get("val_bpb") is not None for line in run.val):
            rows.append(row("validation, bits a byte", val, "val_bpb", run.best))
        if run.floor:
            above = [line and line.get("floor") and line["val_loss"] is not None and
                     {"iter": line["iter"], "above": 100 * (line["val_loss"] / line["floor"] - 1)} or None
                     for line in (*val, run.best)]
            rows.append(row(f"above the floor of {run.floor:.4f}", above[:2], "above", above[2], "{:.1f}%"))
    return "\n".join(rows)


def points(lines, name, key, divisor):
    """(xs, ys) of one value; a y of None is drawn as a gap."""
    return [line[key] / divisor for line in lines], [line.get(name) for line in lines]


def settled(xs, ys, start):
    """The values after `start` (all, if none is), so that the fall of an untrained model does not set the scale."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return [y for x, y in known if x > start] or [y for x, y in known]


def limits(low, high, log, below=0.08, above=0.1):
    """Limits of y with room for a line of text at both ends."""
    if log:
        low = max(low, high / 1e4)
        room = math.log(high / low) or 0.1
        return low * math.exp(-below * room), high * math.exp(above * room)
    room = high - low or 0.1 * abs(high) or 1
    return low - below * room, high + above * room


def draw_loss(axis, runs, labels, key, divisor, start, smooth, log):
    """Training and validation loss of all runs, and the two lines between which learning takes place."""
    alone, seen, lowest, drawn, entries = len(runs) == 1, [], [], [], {}
    for i, run in enumerate(runs):
        color, marker, dash = COLORS[i % 7], MARKERS[i % 7], ("-", "--", ":")[i // 7 % 3]
        xs, raw = points(run.train, "train_loss", key, divisor)
        ys = running_mean(raw, smooth or max(3, len(raw) // 50))
        dot = "." if sum(y is not None for y in raw) < 3 else None  # a line of one point is invisible
        if alone:
            entries["training"] = axis.plot(xs, raw, color=color, linewidth=0.8, alpha=0.4, marker=dot)[0]
        smoothed, = axis.plot(xs, ys, dash, color=color, linewidth=1.8, marker=dot)
        val_xs, val_ys = points(run.val, "val_loss", key, divisor)
        few = len(val_xs) <= 40
        look = dict(color=COLORS[1] if alone else color, linewidth=0.7, marker=marker, zorder=3,
                    markersize=6 if few else 3, markeredgecolor="white", markeredgewidth=0.6 if few else 0)
        validation, = axis.plot(val_xs, val_ys, dash, **look)
        if alone:
            entries["training, smoothed"] = smoothed
            entries |= {"validation": validation} if val_xs else {}
        else:
            best = f": best {run.best['val_loss']:.3f}" if run.best else ""
            entries[labels[i] + best] = axis.plot([], [], dash, **look | dict(linewidth=1.8, markersize=6))[0]
        seen += settled(xs, ys, start) + settled(val_xs, val_ys, start)
        lowest += settled(xs, raw if alone else ys, start)
        drawn += [(x, y) for x, y in zip(xs + val_xs, ys + val_ys, strict=True) if y is not None]

    # A line that differs between the runs would say which is which only with a legend of its own.
    vocabularies = {run.vocab_size for run in runs if run.vocab_size}
    floors = {round(run.floor, 2): run.floor for run in runs if run.floor}
    low, high = min(seen + lowest), max(seen)
    text = dict(color=PALE, fontsize=9.5, textcoords="offset points", xycoords=axis.get_yaxis_transform())
    if len(floors) == 1:
        floor = floors.popitem()[1]
        low, high = min(low, floor), max(high, floor)
        axis.axhline(floor, color=PALE, linewidth=1, linestyle=(0, (1, 1.5)))
        axis.annotate(f"floor of this corpus: {floor:.3f}", (0.01, floor), xytext=(0, -3), va="top", **text)
    if len(vocabularies) == 1:
        vocab_size = vocabularies.pop()
        guess = math.log(vocab_size)
        words = f"guessing: ln {vocab_size:,} = {guess:.2f}"
        if start <= 0 or log or len(drawn) < 5 or guess - low < 2.5 * (high - low):
            high = max(high, guess)
            axis.axhline(guess, color=PALE, linewidth=1, linestyle=(0, (5, 3)))
            axis.annotate(words, (0.99, guess), xytext=(0, 3), ha="right", **text)
        else:
            axis.annotate(f"{words}, above this picture \u2191", (0.99, 1), xytext=(0, -3), ha="right", va="top",
                          **text | dict(xycoords="axes fraction"))
    axis.set_ylim(limits(low, high, log))
    axis.set_ylabel("loss, nats a token")
    # Above the axes, where no curve can be; handles given, because a label that begins with _ would be left out.
    axis.legend(entries.values(), entries.keys(), loc="lower left", bbox_to_anchor=(-0.01, 1), frameon=False,
                title=labels[0] if alone else "lines: training, smoothed; markers: validation",
                title_fontproperties={"weight": "bold"}, alignment="left",
                ncols=3 if alone else max(1, 90 // (max(map(len, labels)) + 20)))
    return drawn


def mark_best(axis, run, key, divisor, drawn):
    """A ring around the best evaluation; its value stands above every curve that passes there."""
    to_axes = (axis.transScale + axis.transLimits).transform  # data to fractions of the axes
    x, y = run.best[key] / divisor, run.best["val_loss"]
    axis.plot([x], [y], "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.2, zorder=4)
    at_x, at_y = to_axes((x, y))
    side = -1 if at_x > 0.5 else 1
    near = [to_axes(point) for point in drawn]
    peak = max([fy for fx, fy in near if -0.03 < side * (fx - at_x) < 0.36], default=at_y)
    axis.annotate(f"best validation: {y:.3f} at {run.best['iter']:,}", (x, y), fontsize=10.5, color=INK,
                  xytext=(at_x - side * 0.015, min(max(peak, at_y) + 0.1, 0.86)), textcoords="axes fraction",
                  ha="right" if side < 0 else "left", zorder=5,
                  arrowprops=dict(arrowstyle="-", color=INK, linewidth=0.8, shrinkA=1, shrinkB=6,
                                  relpos=(0.5 - side * 0.45, 0)),
                  bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))


def draw_panel(axis, runs, name, title, key, divisor, start):
    """One value of the training lines under the loss, on the same x axis."""
    seen = []
    for i, run in enumerate(runs):
        xs, ys = points(run.train, name, key, divisor)
        seen += settled(xs, ys, start)
        axis.plot(xs, ys, ("-", "--", ":")[i // 7 % 3], color=COLORS[i % 7], linewidth=1.1,
                  marker="." if sum(y is not None for y in ys) < 3 else None)
    axis.set_title(title, loc="left", fontsize=10.5, pad=3)
    if name == "loss_scale":  # the GradScaler halves and doubles it
        axis.set_yscale("log", base=2)
        axis.set_ylim(min(seen) / 2, max(seen) * 2)
    else:
        axis.set_ylim(*limits(min(0, *seen) if name == "lr" else min(seen), max(seen), log=False))


def draw(runs, output, x="iteration", smooth=None, panels=(), log_x=False, log_y=False):
    """Write the picture: loss above, learning rate and the panels asked for below, all over one x axis."""
    os.environ["MPLBACKEND"] = "Agg"  # before the import: no display is needed, whatever the environment asks for
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    key = "iter" if x == "iteration" else x
    longest = max(line.get(key) or 0 for run in runs for line in run.train + run.val)
    runs = [replace(run, **{kind: [line for line in getattr(run, kind) if line.get(key) is not None
                                   and (line[key] > 0 or not log_x)
                                   and (line[f"{kind}_loss"] is None or line[f"{kind}_loss"] > 0 or not log_y)]
                            for kind in ("train", "val")}) for run in runs]
    if all(line.get(name) is None for name in ("train_loss", "val_loss")
           for run in runs for line in run.train + run.val):
        raise UserError(f"no line of the log has a place on these axes ({x}). Type: --x iteration, without --log-x and "
                        "--log-y")
    divisor, x_label = next((divisor, label) for least, divisor, label in UNITS[x] if longest >= least)
    longest = longest / divisor or 1
    start = 0 if log_x else 0.05 * longest
    known = {name for run in runs for line in run.train for name in line if line[name] is not None}
    for panel in panels:
        if PANELS[panel][0] not in known:
            raise UserError(f"no value of {PANELS[panel][0]} in {runs[0].folder / 'metrics.jsonl'}. "
                            f"Leave out: --panel {panel}")
    shown = [("lr", "learning rate")] * ("lr" in known) + [PANELS[panel] for panel in panels]
    labels = short_labels([run.folder for run in runs])
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": PALE,
             "axes.labelcolor": INK, "text.color": INK, "xtick.color": PALE, "ytick.color": PALE,
             "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": "#E6E6E6",
             "axes.axisbelow": True, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.6, 4.1 + 1.1 * len(shown)), layout="constrained")
        axes = figure.subplots(1 + len(shown), 1, sharex=True, squeeze=False,
                               height_ratios=[3.6] + [1] * len(shown))[:, 0]
        top = axes[0]
        if log_x:
            top.set_xscale("log")
        if log_y:
            top.set_yscale("log")
        drawn = draw_loss(top, runs, labels, key, divisor, start, smooth, log_y)
        for axis, (name, title) in zip(axes[1:], shown, strict=True):
            draw_panel(axis, runs, name, title, key, divisor, start)
        if not log_x:
            top.set_xlim(0, 1.02 * longest)
        if len(runs) == 1 and runs[0].best:
            mark_best(top, runs[0], key, divisor, drawn)
        number = FuncFormatter(lambda value, position: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
        for axis in axes:
            if axis.get_yscale() == "linear":
                axis.yaxis.set_major_locator(MaxNLocator(6 if axis is top else 4, steps=[1, 2, 5, 10]))
            elif axis is top:
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            axis.yaxis.set_major_formatter(number)
            axis.yaxis.set_minor_formatter(NullFormatter())
        axes[-1].xaxis.set_major_formatter(number)
        if not log_x:
            axes[-1].xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=x == "iteration"))
        axes[-1].set_xlabel(x_label)
        # Moved in place when whole, so that a viewer that follows a training never opens half a picture.
        part = output.with_name(f".{output.stem}.part{output.suffix}")
        try:
            figure.savefig(part, dpi=200, format=output.suffix[1:].lower())
            replace_file(part, output)
        finally:
            part.unlink(missing_ok=True)


@click.command(cls=GroupedCommand, context_settings=COMMAND_LINE)
@click.argument("run", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out-dir", type=click.Path(path_type=Path), metavar="RUN", help="the same as RUN")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False),
              help="picture to write, .png or .svg  [default: loss_curve.png in the first RUN]")
@click.option("--x", type=click.Choice(list(UNITS)), default="iteration",
              help="what the x axis counts  [default: iteration]")
@click.option("--smooth", type=click.IntRange(min=1), metavar="N",
              help="training lines averaged into one point of the smooth curve; 1 does not smooth  "
              "[default: a fiftieth of the lines, at least 3]")
@click.option("--panel", "panels", multiple=True, metavar="NAME", type=click.Choice(list(PANELS)),
              help=f"one more panel below: {', '.join(PANELS)}; may be given several times")
@click.option("--log-x", is_flag=True, help="logarithmic x axis: the early iterations large")
@click.option("--log-y", is_flag=True, help="logarithmic loss axis")
def main(run, out_dir, output, x, smooth, panels, log_x, log_y):
    """Draw the loss of each RUN, an out folder of train.py (default: out), and print a summary.

    Several runs come into one picture. A run may still be training.
    """
    typed = run + (out_dir,) if out_dir else run or (Path("out"),)
    folders = list({folder.resolve(): folder for folder in typed}.values())
    output = output or folders[0] / "loss_curve.png"
    if output.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{output} is neither .png nor .svg. Type: --output {output.with_suffix('.png')}")
    runs = [read_run(folder) for folder in folders]
    click.echo("\n".join(summary(run) for run in runs))
    if len({run.vocab_size for run in runs} - {None}) > 1:
        click.echo("The vocabularies differ, so nats a token do not compare: judge by bits a byte.")
    try:
        draw(runs, output, x, smooth, dict.fromkeys(panels), log_x, log_y)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}. Type a path that can be written: "
                        "--output loss.png") from error
    click.echo(f"Wrote {output}")


if __name__ == "__main__":
    main()
