"""How much is learned from how many tokens and seconds: ours, nanoGPT's and smolGPT's recipes on the same stories.

The measure is bits per byte of the whole validation set, in windows that follow each other (with -- --align-stories
ours start at stories: compare those among themselves). Seconds are those of training from a cold compiler on, without
evaluations.
"""

import tempfile
from dataclasses import asdict

import click
import common

from config import PRESETS, TrainConfig

EVAL_EVERY = 250_000  # tokens between evaluations
WIDTHS = (16, 12, 9, 14, 12, 9)


def run_ours(tokens, data_dir, flags, memory_gib, tiny, timeout):
    """One whole run of train.py whose schedule ends after `tokens`."""
    import train
    flags, scale = [*(common.TINY if tiny else []), *flags, "--data-dir", data_dir], 32 if tiny else 1
    typed = {name: value for name, value in train.main.make_context("train.py", list(flags)).params.items()
             if value is not None}
    settings = asdict(TrainConfig()) | PRESETS[typed.get("preset", "rtx3050")] | typed
    evaluation = str(common.TINY_EVAL_TOKENS if tiny else 0)
    flags += ["--max-iters", str(max(1, round(tokens / settings["tokens_per_iter"]))), "--sample-tokens", "0",
              "--eval-interval", str(max(1, round(EVAL_EVERY / scale / settings["tokens_per_iter"]))),
              "--eval-tokens", evaluation, "--final-eval-tokens", evaluation]
    with tempfile.TemporaryDirectory() as out_dir, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache_dir:
        return common.run_train(flags, out_dir, timeout, memory_gib=memory_gib, cache_dir=cache_dir)


def run_peer(name, tokens, target_bpb, data_dir, folder, batch_size, memory_gib, tiny, timeout):
    """Another repository's model by its own settings until the target, `tokens` or the deadline is reached."""
    job = dict(name=name, folder=folder, data_dir=data_dir, tokens=tokens, target_bpb=target_bpb, tiny=tiny,
               compiled=True, batch_size=4 if tiny else batch_size, memory_gib=memory_gib, seconds=timeout - 15,
               eval_tokens=common.TINY_EVAL_TOKENS if tiny else 0, eval_every=EVAL_EVERY // (32 if tiny else 1))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache_dir:
        return common.run_peer(job, timeout, cache_dir)


def with_target(row, target_bpb):
    """The row and where its curve first reached the target."""
    at = next((point for point in row.get("curve", []) if point[3] <= target_bpb), (None, None, None))
    return row | dict(reached="error" not in row and row["final_bpb"] <= target_bpb, tokens_at_target=at[1],
                      seconds_at_target=at[2])


def summary(rows):
    """The shortest run of ours that met the target, and each peer's tokens and seconds as multiples of its."""
    ours = min((row for row in rows if row["name"].startswith("ours") and row["reached"]),
               key=lambda row: row["tokens"], default=None)
    if not ours:
        return "No run of ours reached the target: try a larger --tokens or --budgets."
    lines = [f"ours reached the target with a budget of {ours['tokens'] / 1e6:.2f} M tokens, {ours['seconds']:.1f} s"]
    for row in rows:
        if not row["name"].startswith("ours") and "error" not in row:
            least = "" if row["reached"] else "more than "
            lines.append(f"{row['name']}: {least}{row['tokens'] / ours['tokens']:.1f} times our tokens, "
                         f"{least}{row['seconds'] / ours['seconds']:.1f} times our seconds")
    return "\n".join(lines)


def show(row):
    if "error" in row:
        return common.print_row((row["name"], row["error"]), (WIDTHS[0], 1))
    at = row["seconds_at_target"]
    common.print_row((row["name"], common.count(row["tokens"]), f"{row['seconds']:.1f}", f"{row['final_bpb']:.4f}",
                      common.count(row["tokens_at_target"]), None if at is None else f"{at:.1f}"), WIDTHS)
    if "settings" in row:
        values = ", ".join(f"{name} {value:g}" for name, value in row["settings"].items())
        print(f"  its own settings: {values}; {row['dtype']}, micro-batch {row['batch_size']}", flush=True)


@click.command()
@common.data_dir_option
@click.option("--tokens", default=8e6, show_default=True, help="tokens of our run; 0: no such run")
@click.option("--budgets", default="", callback=common.numbers, help="tokens of shorter runs, tried upwards: 4e6,6e6")
@click.option("--target-bpb", default=0.787, show_default=True, help="bits per byte to reach")
@common.nanogpt_option
@common.smolgpt_option
@click.option("--peer-tokens", default=60e6, show_default=True, help="where another code gives up")
@click.option("--peer-batch-size", default=128, show_default=True, help="its largest micro-batch, in windows of 256")
@common.memory_option
@common.deadline_option
@common.json_option
@common.tiny_option
@common.flags_argument
def main(data_dir, tokens, budgets, target_bpb, nanogpt, smolgpt, peer_tokens, peer_batch_size, memory_gib, deadline,
         json_path, tiny, flags):
    """Measure bits per byte, and tokens and seconds to a target. Flags after -- go to train.py: -- --preset llama."""
    clock, rows = common.Clock(deadline), []

    def add(name, result):
        rows.append(dict(name=name, flags=flags) | with_target(result, target_bpb))
        show(rows[-1])
        common.write_json(json_path, target_bpb=target_bpb, rows=rows, summary=summary(rows), **common.today())
        return rows[-1]["reached"]

    def ours(budget):
        return add(f"ours {budget / 1e6:g}M", clock.timed(run_ours, budget, data_dir, flags, memory_gib, tiny))

    common.print_row(("code", "tokens", "seconds", "bits per byte", "at target", "seconds"), WIDTHS)
    any(ours(budget) for budget in sorted(budgets))  # until one reaches the target
    if tokens and tokens not in budgets:
        ours(tokens)
    peers = [(name, folder) for name, folder in (("nanogpt_char", nanogpt), ("smolgpt", smolgpt)) if folder]
    for i, (name, folder) in enumerate(peers):
        limit = clock.left() / (len(peers) - i)
        add(name, clock.timed(run_peer, name, peer_tokens, target_bpb, data_dir, folder, peer_batch_size, memory_gib,
                              tiny, limit=limit))
    print(summary(rows))


if __name__ == "__main__":
    main()
