import json
import math
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import plot_loss
from config import UserError, replace_file


def train_line(i, loss, **other):
    return dict(iter=i, tokens=i * 100, seconds=i * 0.5, train_loss=loss, lr=1e-3, grad_norm=0.5, loss_scale=None,
                tokens_per_second=200.0, peak_memory_mib=None) | other


def val_line(i, loss, **other):
    bpb = None if loss is None else loss / 3
    return dict(iter=i, tokens=i * 100, seconds=i * 0.5, val_loss=loss, val_bpb=bpb) | other


def write_run(folder, lines, vocab_size=512, end="\n"):
    folder.mkdir(parents=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + end)
    if vocab_size:
        config = {"model": {"vocab_size": vocab_size}, "train": {}, "corpus": {"source": "x", "vocab_size": vocab_size}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def learning_run(folder, n=40, best=30):
    """Training lines every 10 iterations; validation every 100, lowest at iteration 10 * best."""
    lines = []
    for i in range(1, n + 1):
        lines.append(train_line(10 * i, 1 + 5 * math.exp(-i / 5)))
        if i % 10 == 0:
            lines.append(val_line(10 * i, 1.25 + abs(i - best) / 40, floor=1.0))
    return write_run(folder, lines)


def plot(*arguments):
    return CliRunner().invoke(plot_loss.main, [str(argument) for argument in arguments])


def words(result, title):
    """The cells of one row of the printed table, as 'value at iteration'."""
    line = next(line for line in result.output.splitlines() if line.strip().startswith(title))
    return line.split(title)[1].split()


def drawn_figure(monkeypatch, *arguments):
    """The matplotlib figure of a command, as it was saved."""
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    result = plot(*arguments)
    assert result.exit_code == 0, result.output
    return figures[-1]


def is_png(path):
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and len(data) > 20_000


def refusal(*arguments):
    """The one line with which a command refuses."""
    result = plot(*arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    line = result.output.strip()
    assert line.startswith("Error: ") and "\n" not in line
    return line


def test_a_resumed_run_counts_each_iteration_once_with_its_last_line(tmp_path):
    run = write_run(tmp_path / "run", [
        train_line(10, 5.0), train_line(20, 4.0), val_line(20, 4.5), train_line(30, 9.0), val_line(30, 9.5),
        train_line(30, 3.0), val_line(30, 3.5), val_line(25, 3.8), train_line(40, 2.0)])
    train, val = plot_loss.read_metrics(run / "metrics.jsonl")
    assert [(line["iter"], line["train_loss"]) for line in train] == [(10, 5.0), (20, 4.0), (30, 3.0), (40, 2.0)]
    assert [(line["iter"], line["val_loss"]) for line in val] == [(20, 4.5), (25, 3.8), (30, 3.5)]


def test_summary_gives_initial_final_and_best_with_their_iterations(tmp_path):
    run = learning_run(tmp_path / "run")
    result = plot(run)
    assert result.exit_code == 0
    assert words(result, "validation, nats a token") == "1.7500 at 100 1.5000 at 400 1.2500 at 300".split()
    assert words(result, "validation, bits a byte") == "0.5833 at 100 0.5000 at 400 0.4167 at 300".split()
    assert words(result, "above the floor of 1.0000") == "75.0% at 100 50.0% at 400 25.0% at 300".split()
    first, last = 1 + 5 * math.exp(-1 / 5), 1 + 5 * math.exp(-8)
    assert words(result, "training, nats a token") == f"{first:.4f} at 10 {last:.4f} at 400 {last:.4f} at 400".split()
    assert "400 iterations, 40,000 tokens" in result.output


def test_picture_marks_the_best_validation_the_floor_and_guessing(tmp_path, monkeypatch):
    figure = drawn_figure(monkeypatch, learning_run(tmp_path / "run"))
    loss, rate = figure.axes
    texts = [text.get_text() for text in loss.texts]
    assert "best validation: 1.250 at 300" in texts
    assert "floor of this corpus: 1.000" in texts
    assert any(text.startswith("guessing: ln 512 = 6.24") for text in texts)
    assert loss.get_ylabel() == "loss, nats a token" and rate.get_xlabel() == "iteration"
    assert any(list(line.get_xdata()) == [300] and list(line.get_ydata()) == [1.25] for line in loss.lines)


def test_early_losses_leave_the_picture_where_they_would_squash_the_rest(tmp_path, monkeypatch):
    lines = [train_line(i, 1.5 + 6.8 * math.exp(-i / 200)) for i in range(10, 20_001, 10)]
    run = write_run(tmp_path / "run", lines, vocab_size=4096)
    low, high = drawn_figure(monkeypatch, run).axes[0].get_ylim()
    assert low < 1.5 and high < 2
    low, high = drawn_figure(monkeypatch, run, "--log-x").axes[0].get_ylim()
    assert high > math.log(4096)  # there the start has room of its own


@pytest.mark.parametrize("lines", [[train_line(10, 6.0)], [val_line(10, 6.0, floor=1.0)], [val_line(0, 6.2)],
                                   [train_line(10, 6.0), val_line(10, 5.9)]])
def test_one_point_is_enough(tmp_path, lines):
    run = write_run(tmp_path / "run", lines)
    result = plot(run)
    assert result.exit_code == 0, result.output
    assert is_png(run / "loss_curve.png")


def test_training_lines_alone_are_enough_without_config(tmp_path):
    run = write_run(tmp_path / "run", [train_line(i, 5.0) for i in range(1, 9)], vocab_size=None)
    result = plot(run)
    assert result.exit_code == 0 and "validation" not in result.output
    assert is_png(run / "loss_curve.png")


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_last_line_cut_short_is_left_for_the_next_look(tmp_path, cut):
    run = write_run(tmp_path / "run", [train_line(10, 5.0), json.dumps(train_line(20, 4.0))[:cut]], end="")
    train, _ = plot_loss.read_metrics(run / "metrics.jsonl")
    assert [line["iter"] for line in train] == [10]
    assert plot(run).exit_code == 0


def test_a_whole_last_line_without_a_newline_counts(tmp_path):
    run = write_run(tmp_path / "run", [train_line(10, 5.0), train_line(20, 4.0)], end="")
    assert [line["iter"] for line in plot_loss.read_metrics(run / "metrics.jsonl")[0]] == [10, 20]


def test_null_values_are_gaps_and_are_called_not_finite(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [
        train_line(10, 5.0), train_line(20, None, grad_norm=None), train_line(30, 4.0),
        val_line(30, None), train_line(40, 3.0), val_line(40, 3.25, floor=None), train_line(50, math.nan)])
    result = plot(run)
    assert result.exit_code == 0
    assert words(result, "training, nats a token") == "5.0000 at 10 not finite 3.0000 at 40".split()
    assert words(result, "validation, nats a token") == "not finite 3.2500 at 40 3.2500 at 40".split()
    raw = drawn_figure(monkeypatch, run).axes[0].lines[0].get_ydata(orig=False)
    assert [math.isnan(y) for y in raw] == [False, True, False, False, True]


def test_smoothing_is_a_centred_running_mean_as_long_as_its_input():
    values = [9.0, 1.0, 4.0, 4.0, 7.0, 1.0, 4.0]
    assert plot_loss.running_mean(values, 1) == values
    assert plot_loss.running_mean(values, 3) == [9, 14 / 3, 3, 5, 4, 4, 2.5]
    assert plot_loss.running_mean(values, 5) == [9, 14 / 3, 5, 17 / 5, 4, 4, 4]
    assert plot_loss.running_mean(values, 100)[3] == pytest.approx(sum(values) / 7)
    assert plot_loss.running_mean([], 5) == []


def test_smoothing_does_not_bend_a_straight_fall_before_its_end():
    line = [100.0 - i for i in range(50)]
    assert plot_loss.running_mean(line, 11)[:45] == pytest.approx(line[:45])


def test_smoothing_leaves_out_what_is_missing():
    assert plot_loss.running_mean([2.0, None, 4.0], 3) == [2, 3, 4]
    assert plot_loss.running_mean([None, None, 4.0], 1) == [None, None, 4]


def test_several_runs_share_one_picture_under_their_shortest_names(tmp_path, monkeypatch):
    runs = [learning_run(tmp_path / name, best=best) for name, best in (("a/out", 20), ("b/out", 30), ("_c", 40))]
    picture = tmp_path / "all.png"
    figure = drawn_figure(monkeypatch, *runs, "--output", picture)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["a/out: best 1.250", "b/out: best 1.250", "_c: best 1.250"]
    colors = {handle.get_color() for handle in figure.axes[0].get_legend().legend_handles}
    assert len(colors) == 3
    assert is_png(picture) and not (runs[0] / "loss_curve.png").exists()


def test_a_run_named_twice_is_drawn_once(tmp_path, monkeypatch):
    run = learning_run(tmp_path / "run")
    monkeypatch.chdir(run)
    result = plot(".", run, "--out-dir", f"{run}/")
    assert result.exit_code == 0 and result.output.count("iterations") == 1


def test_ten_runs_of_ten_lines_are_told_apart(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / f"run{i}", [train_line(j, 5.0 - i / 10) for j in range(10)]) for i in range(10)]
    figure = drawn_figure(monkeypatch, *runs)
    looks = {(h.get_color(), h.get_linestyle()) for h in figure.axes[0].get_legend().legend_handles}
    assert len(looks) == 10


def test_differing_vocabularies_are_pointed_out(tmp_path):
    small, large = (write_run(tmp_path / str(v), [val_line(10, 2.0)], vocab_size=v) for v in (512, 4096))
    assert "judge by bits a byte" in plot(small, large).output
    assert "judge by bits a byte" not in plot(small).output


def test_svg_and_png_are_written_whole_and_nothing_else(tmp_path):
    run = learning_run(tmp_path / "run")
    assert plot(run, "--output", run / "curve.svg").exit_code == 0
    svg = (run / "curve.svg").read_text()
    assert svg.startswith("<?xml") and svg.rstrip().endswith("</svg>") and svg.count("<path") > 50
    assert plot(run).exit_code == 0
    assert is_png(run / "loss_curve.png")
    assert sorted(os.listdir(run)) == ["config.json", "curve.svg", "loss_curve.png", "metrics.jsonl"]


@pytest.mark.parametrize("flags, label", [
    (["--x", "tokens"], "tokens"), (["--x", "seconds"], "training time, minutes"),
    (["--log-x", "--log-y", "--smooth", "4"], "iteration")])
def test_axes_on_request(tmp_path, monkeypatch, flags, label):
    axes = drawn_figure(monkeypatch, learning_run(tmp_path / "run"), *flags).axes
    assert axes[-1].get_xlabel() == label
    assert axes[0].get_xscale() == axes[0].get_yscale() == ("log" if "--log-x" in flags else "linear")


def test_panels_on_request(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [train_line(i, 5.0, loss_scale=65536.0) for i in range(1, 9)])
    figure = drawn_figure(monkeypatch, run, "--panel", "grad-norm", "--panel", "loss_scale",
                          "--panel", "tokens-per-second")
    titles = [axis.get_title(loc="left") for axis in figure.axes[1:]]
    assert titles == ["learning rate", "gradient norm", "loss scale", "tokens a second"]


def test_a_panel_without_a_value_says_what_to_leave_out(tmp_path):
    result = plot(learning_run(tmp_path / "run"), "--panel", "loss-scale")
    assert result.exit_code == 1 and result.output.strip().endswith("Leave out: --panel loss-scale")


def test_a_missing_run_names_the_command_to_type(tmp_path):
    assert refusal(tmp_path / "no").endswith(f"type: python train.py --out-dir {tmp_path / 'no'}")


def test_without_a_run_in_out_the_one_below_it_is_named(tmp_path, monkeypatch):
    learning_run(tmp_path / "out" / "demo")
    monkeypatch.chdir(tmp_path)
    assert refusal().endswith(f"type: python plot_loss.py {os.path.join('out', 'demo')}")


@pytest.mark.parametrize("lines", [[], [train_line(10, None)], ['{"iter": 10, "tok']])
def test_a_log_without_a_loss_says_when_to_come_back(tmp_path, lines):
    run = write_run(tmp_path / "run", lines, end="")
    assert refusal(run).endswith(f"type: python plot_loss.py {run}")


@pytest.mark.parametrize("garbage", ["garbage", '{"iter": 20, "train_lo', "[1, 2]", '{"train_loss": 3.0}', "\0\0\0\0",
                                     '{"iter": 20, "train_loss": "low"}', '{"iter": null, "train_loss": 1.0}',
                                     '{"iter": -20, "train_loss": 1.0}', '{"iter": 20, "train_loss": -1.0}',
                                     '{"iter": 20, "train_loss": 1e39}', '{"iter": 20, "val_loss": 1' + 99 * "0" + "}",
                                     '{"iter": 20, "train_loss": 1.0, "tokens": -1}', "[" * 100_000])
def test_garbage_in_the_middle_is_refused_by_its_line(tmp_path, garbage):
    run = write_run(tmp_path / "run", [train_line(10, 5.0), garbage, train_line(30, 4.0)])
    line = refusal(run)
    assert f"{run / 'metrics.jsonl'}, line 2" in line and line.endswith(f"type: python plot_loss.py {run}")
    assert not (run / "loss_curve.png").exists()


def test_a_run_with_no_place_on_a_logarithmic_axis_says_what_to_type(tmp_path):
    run = write_run(tmp_path / "run", [val_line(0, 6.2), val_line(10, None)])
    result = plot(run, "--log-x")
    assert result.exit_code == 1 and "Type: --x iteration, without --log-x" in result.output


def test_a_loss_of_zero_has_no_place_on_a_logarithmic_axis(tmp_path):
    run = write_run(tmp_path / "run", [train_line(10, 0.0), train_line(20, 0.0)])
    assert "Type: --x iteration, without" in plot(run, "--log-y").output
    assert plot(run).exit_code == 0
    assert plot(write_run(tmp_path / "other", [train_line(10, 5.0), train_line(99, 0.0)]), "--log-y").exit_code == 0


def test_a_loss_below_the_floor_is_drawn_with_the_floor(tmp_path):
    assert plot(write_run(tmp_path / "run", [val_line(1, 1e-9, floor=0.8)], vocab_size=None)).exit_code == 0


NUMBERS = st.one_of(st.none(), st.floats(0, 20), st.integers(0, 9), st.floats(), st.integers(), st.sampled_from(
    [True, 10**30, -1e-9, 3e38, 1e300]))
LINES = st.one_of(
    st.fixed_dictionaries({"iter": st.integers(0, 9)}, optional=dict.fromkeys(
        ["train_loss", "val_loss", "val_bpb", "floor", "tokens", "seconds"], NUMBERS)),
    st.text(max_size=6), st.sampled_from(['{"iter": 3, "val_loss": 2', "[[", "NaN", '{"iter": 1e3}', "\ud800", "\x85"]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(LINES, max_size=4), st.sampled_from(["", "\n"]))
def test_a_log_of_any_lines_is_read_as_it_stands_or_refused_in_one_line(tmp_path_factory, lines, end):
    path = tmp_path_factory.getbasetemp() / "any" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        run = plot_loss.read_run(path.parent)
    except UserError as error:
        assert len(error.message.splitlines()) == 1 and str(path) in error.message
        return
    there = [{name: None if value in (math.inf, -math.inf) or value != value else value
              for name, value in line.items()} for line in lines if isinstance(line, dict)]
    for kind, name in ((run.train, "train_loss"), (run.val, "val_loss")):
        last = {line["iter"]: line for line in there if name in line}
        assert kind == [last[i] for i in sorted(last)]
    assert len(plot_loss.summary(run).splitlines()) >= 3


def test_another_kind_of_picture_is_refused_with_the_name_to_type(tmp_path):
    assert refusal(learning_run(tmp_path / "run"), "--output", "x.pdf").endswith("--output x.png")


def test_a_picture_that_cannot_be_written_harms_nothing(tmp_path):
    run = learning_run(tmp_path / "run")
    result = plot(run, "--output", tmp_path / "no" / "x.png")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.output.strip().endswith("--output loss.png")
    assert sorted(os.listdir(run)) == ["config.json", "metrics.jsonl"]


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    run = learning_run(tmp_path / "run")
    (run / "loss_curve.png").write_bytes(b"the old one")
    monkeypatch.setattr(plot_loss.os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "in use")))
    monkeypatch.setattr(replace_file, "__defaults__", (0.1,))  # seconds
    assert plot(run).exit_code == 1
    assert (run / "loss_curve.png").read_bytes() == b"the old one"
    assert sorted(os.listdir(run)) == ["config.json", "loss_curve.png", "metrics.jsonl"]


def test_importing_loads_neither_matplotlib_nor_torch():
    code = "import sys, plot_loss; print([name for name in ('matplotlib', 'torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
