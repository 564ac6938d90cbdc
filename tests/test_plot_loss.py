import json
import math
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from conftest import ROOT
from matplotlib import style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import plot_loss
from config import replace_file


def train_line(i, loss, **other):
    return dict(iter=i, tokens=i * 100, seconds=i * 0.5, train_loss=loss, lr=1e-3, grad_norm=0.5, loss_scale=1.0,
                skipped=0, tokens_per_second=200.0, peak_memory_mib=None) | other


def val_line(i, loss, **other):
    bpb = None if loss is None else loss / 3
    return dict(iter=i, tokens=i * 100, seconds=i * 0.5, val_loss=loss, val_bpb=bpb) | other


def write_run(folder, lines, vocab_size=512, end="\n", **settings):
    folder.mkdir(parents=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + end)
    if vocab_size:
        (folder / "config.json").write_text(json.dumps({"model": {"vocab_size": vocab_size}} | settings))
    return folder


def learning_run(folder, best=30, floor=1.0):
    """Training lines every 10 iterations to 400; validation every 100, lowest at iteration 10 * best."""
    lines = [val_line(0, 6.25, floor=floor)]
    for i in range(1, 41):
        lines.append(train_line(10 * i, 1 + 5 * math.exp(-i / 5)))
        if i % 10 == 0:
            lines.append(val_line(10 * i, 1.25 + abs(i - best) / 40, floor=floor))
    return write_run(folder, lines)


def plot(*arguments):
    return CliRunner().invoke(plot_loss.main, [str(argument) for argument in arguments])


def refusal(*arguments):
    """The error of a command that has to fail: the last line, and no traceback."""
    result = plot(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def cells(result, title):
    """The cells of the row of the printed table that begins with `title`."""
    row = next(line for line in result.output.splitlines() if line.strip().startswith(title))
    return row.split(title)[1].split()


@pytest.fixture
def figure_of(monkeypatch):
    """A function: the matplotlib figure of a command, at the moment it would be saved."""
    figures = []

    def draw(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
            result = plot(*arguments)
        assert result.exit_code == 0, result.output
        return figures[-1]
    return draw


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line_named(figure, label):
    return next(line for line in figure.axes[0].lines if line.get_label().startswith(label))


def is_png(path):
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and len(data) > 10_000


# -----------------------------------------------------------------------------
# Reading

def test_a_resumed_run_counts_each_iteration_once_with_its_last_line(tmp_path, figure_of):
    figure = figure_of(write_run(tmp_path / "run", [
        train_line(10, 5.0), train_line(20, 4.0), val_line(20, 4.5), train_line(30, 9.0), val_line(30, 9.5),
        train_line(30, 3.0), val_line(30, 3.5), val_line(25, 3.8), train_line(40, 2.0)]))
    training, validation = line_named(figure, "training"), line_named(figure, "validation")
    assert training.get_xydata().tolist() == [[10, 5.0], [20, 4.0], [30, 3.0], [40, 2.0]]
    assert validation.get_xydata().tolist() == [[20, 4.5], [25, 3.8], [30, 3.5]]


@pytest.mark.parametrize("damage", ["garbage", "{", json.dumps(train_line(20, 4.0))[:40], "[1, 2]", '{"train_loss": 3}',
                                    "\0\0\0", json.dumps(train_line(20, "low")), '{"iter": 20, "train_loss": 3}'])
def test_a_damaged_or_half_written_line_is_skipped_with_a_note(tmp_path, damage):
    for number, lines, end in ((2, [train_line(10, 5.0), damage, train_line(30, 4.0)], "\n"),
                               (3, [train_line(10, 5.0), train_line(30, 4.0), damage], "")):
        run = write_run(tmp_path / str(number), lines, end=end)
        result = plot(run)
        assert result.exit_code == 0 and is_png(run / "loss_curve.png")
        assert f"{run / 'metrics.jsonl'}, line {number} is damaged" in result.stderr
        assert cells(result, "training") == "5.0000 at 10 4.0000 at 30 4.0000 at 30".split()


def test_a_whole_last_line_without_a_newline_counts(tmp_path):
    result = plot(write_run(tmp_path / "run", [train_line(10, 5.0), train_line(20, 4.0)], end=""))
    assert cells(result, "training")[3:6] == "4.0000 at 20".split() and result.stderr == ""


def test_what_is_not_a_run_is_skipped_with_a_word(tmp_path):
    run = learning_run(tmp_path / "out" / "demo")
    (tmp_path / "out" / "a_file").write_text("text")
    (tmp_path / "out" / "empty").mkdir()
    write_run(tmp_path / "out" / "fresh", [], end="")
    result = plot(*sorted((tmp_path / "out").iterdir()))
    assert result.exit_code == 0 and is_png(run / "loss_curve.png")
    skipped = [line.split(": ")[0] for line in result.stderr.splitlines()]
    assert skipped == [str(tmp_path / "out" / name) for name in ("a_file", "empty", "fresh")]


@pytest.mark.parametrize("lines", [None, [], ['{"iter": 10, "tok']])
def test_without_any_run_the_error_names_the_command_to_type(tmp_path, lines):
    folder = tmp_path / "my run"
    if lines is not None:
        write_run(folder, lines, end="")
    assert refusal(folder).endswith(f'python train.py --out-dir "{folder}"')


def test_without_a_run_in_out_the_one_nearby_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = os.path.join("out", "demo")
    files = learning_run(tmp_path / run).relative_to(tmp_path).iterdir()
    assert refusal().endswith(f"python plot_loss.py {run}")
    assert refusal(*files).endswith(f"python plot_loss.py {run}")


# -----------------------------------------------------------------------------
# The summary

def test_summary_gives_initial_final_and_best_with_their_iterations(tmp_path):
    run = learning_run(tmp_path / "run")
    result = plot("--out-dir", run)
    assert result.exit_code == 0
    first, last = 1 + 5 * math.exp(-1 / 5), 1 + 5 * math.exp(-8)
    assert cells(result, "training") == f"{first:.4f} at 10 {last:.4f} at 400 {last:.4f} at 400".split()
    assert cells(result, "validation") == "6.2500 at 0 1.5000 at 400 1.2500 at 300".split()
    assert cells(result, "bits per byte") == "2.0833 at 0 0.5000 at 400 0.4167 at 300".split()
    assert cells(result, "above floor 1.0000") == ["-", "50.0%", "25.0%"]  # at iteration 0 it would be 525%
    assert "400 iterations, 40,000 tokens, 3.3 minutes" in result.output
    assert "whole validation" not in result.output


def test_summary_gives_the_whole_validation_set_of_a_finished_run(tmp_path):
    final = val_line(20, 1.5, floor=1.2, full_val_loss=1.6, full_val_bpb=0.53, full_floor=1.25)
    result = plot(write_run(tmp_path / "run", [val_line(10, 2.0, floor=1.2), final]))
    assert cells(result, "whole validation")[:3] == "1.6000 at 20".split()
    assert cells(result, "above floor 1.2500") == ["28.0%"] * 3
    assert cells(result, "above floor 1.2000") == ["66.7%", "25.0%", "25.0%"]
    assert "0.5300 at 20" in result.output


def test_the_table_fits_80_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "out", [
        line | dict(tokens=19_660_800_000, seconds=3e6) for i in (100_000, 300_000)
        for line in (train_line(i, 11.5), val_line(i, 11.5, floor=10.5, full_val_loss=11.5, full_val_bpb=10.5,
                                                   full_floor=10.5))])
    rows = plot().output.splitlines()
    assert len(rows) > 8 and max(map(len, rows)) <= 80


def test_values_that_were_not_finite_are_gaps(tmp_path, figure_of):
    run = write_run(tmp_path / "run", [
        train_line(10, 5.0), train_line(20, None, grad_norm=None), train_line(30, 4.0), val_line(30, None, floor=1.0),
        train_line(40, 3.0), val_line(40, 3.25, floor=1.0), train_line(50, math.nan)])
    result = plot(run)
    assert cells(result, "training") == "5.0000 at 10 nan at 50 3.0000 at 40".split()
    assert cells(result, "validation") == "nan at 30 3.2500 at 40 3.2500 at 40".split()
    losses = line_named(figure_of(run), "training").get_ydata()
    assert [math.isnan(y) for y in losses] == [False, True, False, False, True]


# -----------------------------------------------------------------------------
# The picture

def test_picture_marks_the_best_validation_and_the_floor(tmp_path, figure_of):
    figure = figure_of(learning_run(tmp_path / "run"))
    loss, rate = figure.axes
    assert labels(figure) == ["training", "validation: best 1.250", "corpus floor: 1.000"]
    ring, = (line for line in loss.lines if line.get_markerfacecolor() == "none")
    assert list(ring.get_xdata()) == [300] and list(ring.get_ydata()) == [1.25]
    assert loss.get_ylabel() == "loss, nats per token" and rate.get_xlabel() == "iteration"
    assert rate.get_title(loc="left") == "learning rate"
    floor = line_named(figure, "corpus floor").get_ydata()[0]
    assert floor == 1.0 and loss.get_ylim()[0] < 1.0


def test_the_first_fall_does_not_set_the_scale(tmp_path, figure_of):
    lines = [train_line(i, 1.5 + 6.8 * math.exp(-i / 200), grad_norm=0.5 + 40 * math.exp(-i / 200), lr=i)
             for i in range(10, 20_001, 10)]
    run = write_run(tmp_path / "run", lines, vocab_size=4096)
    loss, rate, norm = figure_of(run, "--panel", "grad-norm").axes
    assert loss.get_ylim()[0] < 1.5 and loss.get_ylim()[1] < 2
    assert norm.get_ylim()[0] < 0.5 and norm.get_ylim()[1] < 1
    assert rate.get_ylim()[0] < 10 and rate.get_ylim()[1] > 20_000  # of the learning rate, all is shown
    assert figure_of(run, "--log-x").axes[0].get_ylim()[1] > 8  # there, the start has room of its own


def test_the_distance_to_the_floor_can_be_seen_in_a_run_like_the_demo(tmp_path, figure_of):
    lines = [val_line(0, 6.24, floor=0.325)]
    lines += [train_line(i, 0.36 + 0.4 * math.exp(-i / 60) + 5.5 * math.exp((10 - i) / 10)) for i in range(10, 321, 10)]
    lines += [val_line(i, loss, floor=0.325) for i, loss in ((80, 0.416), (160, 0.353), (240, 0.338), (320, 0.328))]
    low, high = figure_of(write_run(tmp_path / "run", lines)).axes[0].get_ylim()
    assert low < 0.325 and (0.328 - 0.325) / (high - low) > 0.01  # a hundredth of the height: three pixels on a screen


@pytest.mark.parametrize("lines", [[train_line(10, 6.0)], [val_line(10, 6.0, floor=1.0)], [val_line(0, 6.2)],
                                   [train_line(10, 6.0), val_line(10, 5.9)]])
@pytest.mark.parametrize("flags", [[], ["--x", "tokens"]])
def test_one_point_is_seen(tmp_path, figure_of, lines, flags):
    axis = figure_of(write_run(tmp_path / "run", lines), *flags).axes[0]
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    curves = [line for line in axis.lines if line.get_label().startswith(("training", "validation: best"))]
    assert len(curves) == len(lines)
    for line in curves:
        (x,), (y,) = line.get_data()
        assert left < x < right and low < y < high and line.get_marker() == "o"


def test_training_lines_alone_are_enough_without_config(tmp_path):
    run = write_run(tmp_path / "run", [train_line(i, 5.0) for i in range(1, 9)], vocab_size=None)
    result = plot(run)
    assert result.exit_code == 0 and "validation" not in result.output
    assert is_png(run / "loss_curve.png")


def test_smoothing_is_a_centred_running_mean_as_long_as_its_input():
    values = [9.0, 1.0, 4.0, 4.0, 7.0, 1.0, 4.0]
    assert plot_loss.running_mean(values, 1) == values
    assert plot_loss.running_mean(values, 3) == pytest.approx([9, 14 / 3, 3, 5, 4, 4, 2.5])
    assert plot_loss.running_mean(values, 5) == pytest.approx([9, 14 / 3, 5, 17 / 5, 4, 4, 4])
    assert plot_loss.running_mean(values, 100)[3] == pytest.approx(sum(values) / 7)
    assert plot_loss.running_mean([], 5) == []
    fall = [100.0 - i for i in range(50)]
    assert plot_loss.running_mean(fall, 11)[:45] == pytest.approx(fall[:45])


def test_smoothing_is_as_asked_for_and_a_fiftieth_of_the_lines_otherwise(tmp_path, figure_of):
    losses = [float(i % 5) + 1 for i in range(300)]
    run = write_run(tmp_path / "run", [train_line(i, loss) for i, loss in enumerate(losses)])
    for flags, width in (([], 6), (["--smooth", 4], 4), (["--smooth", 1], 1)):
        figure = figure_of(run, *flags)
        assert list(line_named(figure, "training").get_ydata()) == plot_loss.running_mean(losses, width)
        assert list(figure.axes[0].lines[0].get_ydata()) == losses  # the unsmoothed curve, pale


def test_several_runs_share_one_picture_and_are_told_apart(tmp_path, monkeypatch, figure_of):
    monkeypatch.chdir(tmp_path)
    runs = [learning_run(tmp_path / name, best=best).relative_to(tmp_path)
            for name, best in (("a/out", 20), ("b/out", 30), ("_c", 40))]
    write_run(tmp_path / "new", [train_line(i, 5.0) for i in range(10)], vocab_size=None)
    runs.append("new")
    assert plot(*runs, "--output", "all.png").exit_code == 0
    figure = figure_of(*runs)
    assert labels(figure) == [f"best 1.250: {runs[0]}", f"best 1.250: {runs[1]}", "best 1.250: _c", "none yet: new"]
    assert len({handle.get_color() for handle in figure.legends[0].legend_handles}) == 4
    assert is_png(tmp_path / "all.png") and not (runs[1] / "loss_curve.png").exists()
    many = [write_run(tmp_path / f"run{i}", [train_line(j, 5.0 - i / 10) for j in range(10)]) for i in range(10)]
    handles = figure_of(*many).legends[0].legend_handles
    with style.context(plot_loss.STYLE):
        assert len({(to_hex(handle.get_color()), handle.get_linestyle()) for handle in handles}) == 10


def test_the_floor_is_drawn_only_where_the_runs_share_it(tmp_path, figure_of):
    one, same, other = (learning_run(tmp_path / str(i), floor=floor) for i, floor in enumerate((1.0, 1.0, 1.1)))
    assert "corpus floor: 1.000" in labels(figure_of(one, same))
    assert not any(label.startswith("corpus floor") for label in labels(figure_of(one, other)))


def test_runs_of_different_vocabularies_are_compared_in_bits_per_byte(tmp_path, figure_of):
    lines = [val_line(0, 6.0), train_line(5, 4.5), train_line(10, 4.0), val_line(10, 3.0)]
    small, large = (write_run(tmp_path / str(size), lines, vocab_size=size) for size in (512, 4096))
    axis = figure_of(small, large).axes[0]
    assert axis.get_ylabel() == "loss, bits per byte"
    curves = [list(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) > 1]
    assert curves == [[2.0, 1.0], [2.0, 1.0]]  # and no training loss, whose bytes are not known
    assert "bits per byte, of validation only" in plot(small, large).output
    assert "The vocabularies differ" not in plot(small).output
    assert figure_of(small).axes[0].get_ylabel() == "loss, nats per token"
    without = {name: value for name, value in val_line(0, 5.0).items() if name != "val_bpb"}
    older = write_run(tmp_path / "older", [without], vocab_size=1024)
    assert [label.split(":")[0] for label in labels(figure_of(small, older))] == ["best 1.000", "none yet"]


@pytest.mark.parametrize("flags, label, end", [
    (["--x", "tokens"], "tokens, millions", 0.04), (["--x", "seconds"], "training time, minutes", 200 / 60),
    (["--log-x", "--log-y"], "iteration", 400)])
def test_axes_on_request(tmp_path, figure_of, flags, label, end):
    figure = figure_of(learning_run(tmp_path / "run"), *flags)
    assert figure.axes[-1].get_xlabel() == label
    assert line_named(figure, "training").get_xdata()[-1] == pytest.approx(end)
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == ("log" if "--log-x" in flags else "linear")
    zero = figure.axes[0].transData.transform((0, 1))[0]  # iteration 0 has no place on a logarithmic axis
    assert math.isfinite(zero) == ("--log-x" not in flags)


@pytest.mark.filterwarnings("ignore:Data has no positive values")
def test_a_run_at_iteration_0_does_no_harm_on_a_logarithmic_axis(tmp_path):
    assert "6.2000 at 0" in plot(write_run(tmp_path / "run", [val_line(0, 6.2)]), "--log-x").output
    assert is_png(tmp_path / "run" / "loss_curve.png")


def test_panels_on_request(tmp_path, figure_of):
    run = write_run(tmp_path / "run", [train_line(i, 5.0, loss_scale=65536.0) for i in range(1, 9)])
    axes = figure_of(run, "--panel", "grad-norm", "--panel", "loss_scale", "--panel", "tokens-per-second").axes[1:]
    assert [(axis.get_title(loc="left"), axis.lines[0].get_ydata()[0]) for axis in axes] == [
        ("learning rate", 1e-3), ("grad norm", 0.5), ("loss scale", 65536.0), ("tokens per second", 200.0)]


# -----------------------------------------------------------------------------
# Watching

def write_more(run, *lines):
    """A function that appends the lines to the metrics of a run, as train.py does."""
    def write():
        with open(run / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return write


def nothing():
    pass


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def watch(monkeypatch):
    """A function: the result of --watch, whose pauses do what the list says, and the last iterations of each picture.

    A pause too many is an error.
    """
    pictures, draw = [], plot_loss.draw

    def noted(runs, *arguments, **options):
        pictures.append([run.lines[-1]["iter"] for run in runs])
        return draw(runs, *arguments, **options)

    def run(pauses, *arguments):
        pauses = iter(pauses)
        monkeypatch.setattr(plot_loss, "draw", noted)
        monkeypatch.setattr(plot_loss.time, "sleep", lambda seconds: next(pauses)())
        return plot("--watch", *arguments), pictures
    return run


@pytest.mark.parametrize("settings", ["train", "reinforce"])
def test_a_watched_run_is_drawn_when_it_has_written_and_only_then_until_its_last_evaluation(tmp_path, watch, settings):
    run = write_run(tmp_path / "run", [train_line(10, 5.0)], **{settings: {"max_iters": 30}})
    result, pictures = watch([nothing, write_more(run, train_line(20, 4.0), val_line(20, 4.0)), nothing, nothing,
                              write_more(run, train_line(30, 3.0)), write_more(run, val_line(30, 3.5))], run)
    assert result.exit_code == 0 and pictures == [[10], [20], [30], [30]] and is_png(run / "loss_curve.png")
    *progress, row = result.output.partition(f"{run}\n")[0].splitlines()
    assert [row.split(" (")[0] for row in (*progress, row)] == ["Iteration 10", "Iteration 20", "Iteration 30"]
    assert cells(result, "validation")[3:6] == "3.5000 at 30".split() and result.output.count("Wrote") == 1


def test_a_run_that_has_ended_is_drawn_once_without_a_pause(tmp_path, watch):
    run = write_run(tmp_path / "run", [train_line(10, 5.0), val_line(10, 4.0)], train={"max_iters": 10})
    result, pictures = watch([], run)
    assert result.exit_code == 0 and pictures == [[10]] and result.output == plot(run).output


def test_watching_waits_for_the_first_loss_of_each_run(tmp_path, watch):
    early, late = write_run(tmp_path / "early", [], end="", train={"max_iters": 10}), tmp_path / "late"
    last = train_line(10, 5.0), val_line(10, 4.0)
    result, pictures = watch([nothing, write_more(early, val_line(0, 6.2)), write_more(early, *last), nothing,
                              lambda: write_run(late, last, train={"max_iters": 10})], late, early)
    assert result.exit_code == 0 and pictures == [[0], [10], [10, 10]] and result.stderr == ""
    assert result.output.startswith(f"Waiting for the first loss (Ctrl-C exits): {late}, {early}\nIteration 0 ")


def test_watching_ends_when_the_last_iteration_is_known_only_after_the_last_line(tmp_path, watch):
    run = write_run(tmp_path / "run", [train_line(10, 5.0), val_line(10, 4.0)], train={"max_iters": 30})
    config = (run / "config.json").read_text()  # train.py --hours: it is saved with the checkpoint
    result, _ = watch([nothing, lambda: (run / "config.json").write_text(config.replace("30", "10"))], run)
    assert result.exit_code == 0 and result.output.count("Iteration 10 ") == 1


def test_a_run_that_is_overwritten_while_watched_is_followed(tmp_path, watch):
    run = write_run(tmp_path / "run", [train_line(10, 5.0), train_line(20, 4.0)], train={"max_iters": 30})
    result, pictures = watch([(run / "metrics.jsonl").unlink, write_more(run, train_line(10, 4.5)), interrupt], run)
    assert result.exit_code == 130 and pictures == [[20], [10]] and "Waiting" in result.output


def test_damage_is_noted_once_at_the_end_of_watching(tmp_path, watch):
    run = write_run(tmp_path / "run", ["garbage", train_line(10, 5.0)], train={"max_iters": 10})
    result, _ = watch([nothing, write_more(run, val_line(10, 4.0))], run)
    assert result.exit_code == 0 and result.stderr.count("line 1 is damaged") == 1


@pytest.mark.parametrize("drawing", [False, True])
def test_ctrl_c_ends_watching_quietly_and_leaves_the_last_picture(tmp_path, monkeypatch, watch, drawing):
    run = write_run(tmp_path / "run", [train_line(10, 5.0)], train={"max_iters": 30})

    def next_picture():
        write_more(run, train_line(20, 4.0))()
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write(b"half") and interrupt())
    result, _ = watch([next_picture if drawing else interrupt], run)
    assert result.exit_code == 130 and result.stderr == "\nStopped.\n"
    assert is_png(run / "loss_curve.png") and not (run / "loss_curve.png.tmp").exists()


def test_on_a_terminal_progress_stays_in_one_line(tmp_path, monkeypatch, watch):
    run = write_run(tmp_path / "run", [train_line(10, 5.0)], train={"max_iters": 30})
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    result, _ = watch([write_more(run, train_line(20, 4.0)), write_more(run, val_line(30, 3.5))], run)
    progress, summary = result.stdout.split("\n", 1)
    first, *rows = progress.split("\r")
    assert first == "" and [row[:13] for row in rows] == ["Iteration 10 ", "Iteration 20 "]
    assert max(map(len, rows)) < 30 and summary.startswith(f"{run}\n")


def test_a_picture_opened_while_a_real_process_watches_is_whole_and_the_process_ends_with_the_run(tmp_path):
    run = write_run(tmp_path / "run", [train_line(1, 5.0)], train={"max_iters": 3})
    code, picture = "import plot_loss; plot_loss.WATCH_SECONDS = 0.1; plot_loss.main()", run / "loss_curve.png"
    process = subprocess.Popen([sys.executable, "-c", code, "--watch", run], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        seen, deadline = set(), time.monotonic() + 30
        for lines in ([train_line(2, 4.0)], [train_line(3, 3.5), val_line(3, 3.0)], []):
            before = len(seen)
            while len(seen) == before and time.monotonic() < deadline:
                if picture.exists():
                    assert is_png(picture)
                    seen.add(picture.stat().st_mtime_ns)
                time.sleep(0.01)
            write_more(run, *lines)()
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and len(seen) == 3 and "3.0000 at 3" in output, output
    finally:
        process.kill()


# -----------------------------------------------------------------------------
# The file

def test_svg_and_png_are_written_whole_and_nothing_else(tmp_path):
    run = learning_run(tmp_path / "run")
    assert plot(run, "--output", run / "curve.svg").exit_code == 0
    svg = (run / "curve.svg").read_text()
    assert svg.startswith("<?xml") and svg.rstrip().endswith("</svg>") and svg.count("<path") > 50
    assert plot(run).exit_code == 0
    assert is_png(run / "loss_curve.png")
    assert sorted(os.listdir(run)) == ["config.json", "curve.svg", "loss_curve.png", "metrics.jsonl"]


def test_another_kind_of_picture_is_refused_with_the_name_to_type(tmp_path):
    assert refusal(learning_run(tmp_path / "run"), "--output", "x.pdf").endswith("--output x.png")


def test_a_picture_that_cannot_be_written_harms_nothing(tmp_path, monkeypatch):
    run = learning_run(tmp_path / "run")
    assert "cannot write" in refusal(run, "--output", run / "metrics.jsonl" / "x.png")
    (run / "loss_curve.png").write_bytes(b"the old one")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "in use")))
    monkeypatch.setattr(replace_file, "__defaults__", (0.1,))  # seconds
    assert "cannot write" in refusal(run)
    assert (run / "loss_curve.png").read_bytes() == b"the old one"
    assert sorted(os.listdir(run)) == ["config.json", "loss_curve.png", "metrics.jsonl"]


def test_no_display_is_needed_and_importing_loads_no_library_of_pictures(tmp_path):
    code = ("import sys, plot_loss; print([name for name in ('matplotlib', 'numpy', 'torch') if name in sys.modules]); "
            "plot_loss.main()")
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name} | {"MPLBACKEND": "TkAgg"}
    done = subprocess.run([sys.executable, "-c", code, learning_run(tmp_path / "run")], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.splitlines()[0] == "[]", done.stderr
    assert is_png(tmp_path / "run" / "loss_curve.png")
