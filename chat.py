"""Chat: load a trained model by its checkpoint alone and let it continue text, in a terminal or in a pipe."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds that importing torch takes: no traceback

import contextlib
import dataclasses
import json
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

import preprocess
from config import (COMMAND_LINE, GroupedCommand, SampleConfig, SettingOption, TrainConfig, UserError, pick,
                    setting_options, value_types)
from model import build_model, choose_device, choose_dtype, read_checkpoint, store_for_generation

WELCOME = """\
This is a base model: it does not answer, it continues your text.
Type the beginning of a story, or only Enter for one from nothing.
/help lists the commands, /quit leaves."""
HELP = """\
TEXT             the model continues it; Enter alone: a story from nothing, or
                 with --keep-context the story goes on
\"\"\"              begins a text of several lines, and \"\"\" ends it
//TEXT           a text that begins with a slash
/set NAME VALUE  change a setting, for example: /set temperature 0.8
/show            the settings, the checkpoint, how much of the window is used
/retry           write the last continuation anew, with the next seed
/reset           forget the story so far
/quit            leave; so do quit, exit and the end of input (Ctrl-D, or on
                 Windows Ctrl-Z and Enter)
Ctrl-C           stop the model's writing; what it wrote stays"""
# A model that has learned little may write bytes that a terminal obeys; newline and tab may stay.
CONTROL = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


# Output: the text goes to stdout, everything else to stderr.

def show(text):
    """Write a piece of the model's text at once."""
    click.echo(text.translate(CONTROL) if sys.stdout.isatty() else text, nl=False)


def note(text):
    """Say something that is not the model's text; dim on a terminal that shows colours."""
    click.echo(click.style(text, dim=True), err=True, color=False if os.environ.get("NO_COLOR") else None)


class Interrupts:
    """Ctrl-C, for the length of a with block: it raises KeyboardInterrupt while `reading`, else it sets `pressed`."""

    def __init__(self):
        self.reading = self.pressed = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def handle(self, *_):
        self.pressed = True
        if self.reading:
            raise KeyboardInterrupt


# The model, and text from it.

@dataclass
class Writer:
    """A trained model with its tokenizer on a device; `about` describes it in a line."""

    model: torch.nn.Module
    tokenizer: preprocess.Tokenizer
    device: torch.device
    about: str


@dataclass
class Reply:
    """One continuation of a prompt: its text, and what its statistics line says."""

    seed: int
    prompt_tokens: int
    text: str = ""
    tokens: int = 0  # the end of the story is not counted
    seconds: float = 0.0
    stop: str = "end of story"  # or length, stop string, interrupted


def find_checkpoint(out_dir):
    """The best.pt of a run, else its ckpt.pt. UserError where there is neither."""
    for path in (out_dir / "best.pt", out_dir / "ckpt.pt"):
        if path.exists():
            return path
    where = "" if str(out_dir) == TrainConfig.out_dir else f" --out-dir {out_dir}"
    raise UserError(f"no checkpoint in {out_dir} (best.pt or ckpt.pt): train a model with `python train.py{where}`, or "
                    "name a file with --checkpoint.")


def load_writer(path, device, dtype):
    """The Writer of a checkpoint file, which is read whole and closed: a training may replace it at any time."""
    device = choose_device(device)
    dtype = choose_dtype(dtype, device, generating=True)
    contents = read_checkpoint(path)
    tokenizer = preprocess.Tokenizer(contents["tokenizer"])
    model = build_model(contents, path)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model "
                        f"{model.config.vocab_size}: the file is damaged; train again with `python train.py`.")
    store_for_generation(model, device, dtype)
    progress = contents["progress"] if isinstance(contents.get("progress"), dict) else {}  # only said, not needed
    it, best = progress.get("iter"), progress.get("best_val")
    seen = f", iteration {it:,}" if type(it) is int else ""
    loss = f", best validation loss {best:.4f}" if type(best) is float and best < math.inf else ""
    about = f"{path}: {model.count_parameters() / 1e6:.2f} M parameters{seen}{loss}; {device}, {str(dtype)[6:]}."
    return Writer(model, tokenizer, device, about)


def until_stop(pieces, stops, reply):
    """Pass pieces of text on until a stop string is complete; it is not passed on, and reply.stop tells.

    A stop string may lie across pieces, so an end that may be the beginning of one waits for the next piece.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            reply.stop = "stop string"
            yield held[:min(found)]
            return
        waiting = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[:len(held) - waiting]
        held = held[len(held) - waiting:]
    yield held


def token_steps(writer, ids, sample, seed, count, interrupts):
    """Yield the ids (count,) of each step after the prompt `ids`, as GPT.generate does, until Ctrl-C."""
    idx = torch.tensor([ids], device=writer.device).expand(count, -1)
    generator = torch.Generator(writer.device).manual_seed(seed)
    for tokens in writer.model.generate(idx, sample, writer.tokenizer.eos_id, generator):
        yield tokens
        if interrupts.pressed:
            return


def stream_reply(writer, ids, sample, stops, reply, interrupts):
    """Yield the text after the prompt `ids` in pieces of whole characters; `reply` is filled in on the way."""
    def new_ids():
        for token in token_steps(writer, ids, sample, reply.seed, 1, interrupts):
            reply.tokens += 1
            yield token.item()
        if reply.tokens == sample.max_new_tokens:
            reply.stop = "length"
        elif interrupts.pressed:
            reply.stop = "interrupted"

    start = time.perf_counter()
    for piece in until_stop(writer.tokenizer.stream(new_ids()), stops, reply):
        reply.text += piece
        yield piece
    reply.seconds = time.perf_counter() - start


def sample_replies(writer, ids, sample, stops, seed, count, interrupts):
    """`count` continuations of the prompt `ids`, written as one batch."""
    start = time.perf_counter()
    try:
        steps = list(token_steps(writer, ids, sample, seed, count, interrupts))
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise UserError(f"{count} samples at once do not fit in the memory of {writer.device}: "
                        f"use --num-samples {max(1, count // 2)}.") from error
    seconds = time.perf_counter() - start
    replies = []
    for row in torch.stack(steps, dim=1).tolist() if steps else [[]] * count:
        row_ids = [token for token in row if token != -1]
        reply = Reply(seed, len(ids), tokens=len(row_ids), seconds=seconds)
        if reply.tokens == sample.max_new_tokens:
            reply.stop = "length"
        elif interrupts.pressed and -1 not in row:
            reply.stop = "interrupted"
        reply.text = "".join(until_stop(writer.tokenizer.stream(row_ids), stops, reply))
        replies.append(reply)
    return replies


# A session: the settings, the story so far, and the last turn.

def joined(story, text):
    """The story with the person's text after it: a space goes between unless one is there or punctuation begins."""
    spaced = not story or not text or story[-1].isspace() or text[0].isspace() or text[0] in ",.;:!?'\"-)"
    return story + text if spaced else f"{story} {text}"


@dataclass
class Session:
    writer: Writer
    sample: SampleConfig
    stops: tuple
    keep_context: bool
    interrupts: Interrupts
    story: str = ""  # what --keep-context carries
    last: tuple | None = None  # story before the last turn, the text typed, its seed: for /retry
    told: bool = False  # that the window is too short

    def write(self, text, seed=None):
        """Write the continuation of `text` (with --keep-context, of the story and `text`), then its statistics."""
        self.interrupts.pressed = False
        seed, before = self.new_seed() if seed is None else seed, self.story
        prompt = joined(before, text) if self.keep_context else text
        ids = self.prompt_ids(prompt)
        reply = Reply(seed, len(ids))
        for piece in stream_reply(self.writer, ids, self.sample, self.stops, reply, self.interrupts):
            show(piece)
        if not reply.text.endswith("\n"):
            click.echo()
        self.story, self.last = prompt + reply.text, (before, text, seed)
        self.report(reply)

    def write_samples(self, text, count, as_json):
        """Write `count` continuations of `text`: with a line --- between two, or as one JSON object a line."""
        seed = self.new_seed()
        ids = self.prompt_ids(text)
        replies = sample_replies(self.writer, ids, self.sample, self.stops, seed, count, self.interrupts)
        for i, reply in enumerate(replies):
            if as_json:
                click.echo(json.dumps(dict(prompt=text, text=reply.text, stop=reply.stop, tokens=reply.tokens,
                                           seed=seed, sample=i)))
            else:
                show(("---\n" if i else "") + reply.text.removesuffix("\n") + "\n")
        self.report(*replies)

    def new_seed(self):
        return secrets.randbelow(2**31) if self.sample.seed is None else self.sample.seed

    def prompt_ids(self, prompt):
        ids = self.writer.tokenizer.encode_prompt(prompt)
        self.tell_window(len(ids))
        return ids

    def tell_window(self, tokens):
        """Say once when `tokens` are more than the model can see."""
        block_size = self.writer.model.config.block_size
        if tokens > block_size and not self.told:
            self.told = True
            note(f"The text has outgrown the model's window of {block_size} tokens: it sees only the last part of it.")

    def report(self, *replies):
        """The statistics line of one reply, or of a batch."""
        block_size = self.writer.model.config.block_size
        tokens, longest = sum(r.tokens for r in replies), max(r.prompt_tokens + r.tokens for r in replies)
        self.tell_window(longest)
        stops = [reply.stop for reply in replies]
        why = ", ".join(f"{stops.count(s)} x {s}" if len(stops) > 1 else s for s in dict.fromkeys(stops))
        note(f"[{tokens:,} tokens, {tokens / replies[0].seconds:,.0f} tokens/s, {why}, context "
             f"{min(longest, block_size)} of {block_size}, seed {replies[0].seed}]")

    def retry(self):
        if self.last is None:
            return note("There is nothing to write anew yet.")
        self.story, text, seed = self.last
        self.write(text, (seed + 1) % 2**63)

    def reset(self):
        self.story, self.last, self.told = "", None, False
        note("A new story begins.")

    def change(self, words):
        """Change a setting by its name and value, in the spelling and within the limits of its flag."""
        if len(words) != 2:
            return note(f"Type /set NAME VALUE. The settings:\n{settings_text(self.sample)}")
        name, value = words[0].lstrip("-").replace("-", "_"), words[1]
        fields = {field.name: field for field in dataclasses.fields(SampleConfig)}
        if name not in fields:
            raise UserError(f"{name} is not a setting; there are {', '.join(fields)}.")
        if type(None) in value_types(fields[name]) and value == "none":
            value = None
        else:
            value = SettingOption(fields[name], None).type.convert(value, None, None)
        self.sample = dataclasses.replace(self.sample, **{name: value})
        note(f"{name} = {str(value).lower()}")

    def show_settings(self):
        used = len(self.writer.tokenizer.encode_prompt(self.story if self.keep_context else ""))
        block_size = self.writer.model.config.block_size
        note(f"{self.writer.about}\n{settings_text(self.sample)}\nstop: {list(self.stops) or 'end of story only'}\n"
             f"keep-context: {'on' if self.keep_context else 'off'}, {used} tokens carried, window {block_size}")


def settings_text(sample):
    """The settings, one a line, each beside the help line of its flag."""
    formatter = click.HelpFormatter()
    formatter.write_dl([(f"{field.name} = {str(getattr(sample, field.name)).lower()}", field.metadata["help"])
                        for field in dataclasses.fields(sample)])
    return formatter.getvalue().rstrip("\n")


# The terminal.

def read_line(prompt, interrupts):
    """A line that the person types. EOFError at the end of input, KeyboardInterrupt on Ctrl-C."""
    try:
        interrupts.reading = True
        if sys.stdout.isatty():
            return input(prompt)
        click.echo(prompt, nl=False, err=True)  # input() would write it among the text
        return input()
    finally:
        interrupts.reading = False


def read_text(interrupts):
    """A line, or the lines between two \"\"\", as typed; None where Ctrl-C came between these."""
    line = read_line("Story> ", interrupts)
    if not line.startswith('"""'):
        return line
    text = line[3:]
    try:
        while not text.endswith('"""'):
            text += "\n" + read_line("  ...> ", interrupts)
    except KeyboardInterrupt:
        click.echo()
        return note("The text is dropped.")
    text = text.removesuffix('"""')
    return f"/{text}" if text.startswith("/") else text  # never a command, see answer()


def obey(session, line):
    """Carry out a /command. False means to leave."""
    command, *words = line.split()
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        note(HELP)
    elif command == "/show":
        session.show_settings()
    elif command == "/set":
        session.change(words)
    elif command == "/retry":
        session.retry()
    elif command == "/reset":
        session.reset()
    else:
        note(f"{command} is no command: /help lists them. To begin a text with a slash, type //.")
    return True


def answer(session, text):
    """Carry out or continue what the person typed. False means to leave."""
    if text.strip() in ("quit", "exit"):
        return False
    try:
        if text.startswith("/") and not text.startswith("//"):
            return obey(session, text)
        session.write(text[1:] if text.startswith("//") else text)
    except click.ClickException as error:
        note(error.format_message())
    return True


def converse(session):
    """Read and answer until the person leaves; return the exit status."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and takes long ones: a bare terminal cuts at 4,096 bytes
    note(f"{session.writer.about}\n{WELCOME}")
    hinted = False
    while True:
        try:
            text = read_text(session.interrupts)
        except EOFError:
            click.echo()
            return 0
        except KeyboardInterrupt:
            click.echo()
            if hinted:
                return INTERRUPTED
            hinted = True
            note("Ctrl-C again leaves, as does /quit.")
            continue
        hinted = False
        if text is not None and not answer(session, text):
            return 0


def read_piped(interrupts):
    """All of standard input without the newline that ends it; None where there is nothing."""
    try:
        interrupts.reading = True
        text = sys.stdin.read()
        return text.removesuffix("\n") if text else None
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        interrupts.reading = False


def write_once(session, prompt, count, as_json):
    """Write what --prompt or piped input asks for; return the exit status."""
    if count > 1 or as_json:
        session.write_samples(prompt, count, as_json)
    else:
        session.write(prompt)
    return INTERRUPTED if session.interrupts.pressed else 0


@click.command(cls=GroupedCommand, context_settings=COMMAND_LINE)
@click.option("--prompt", metavar="TEXT", help='continue TEXT and leave, without reading any input; "" writes a story '
              "from nothing")
@click.option("--num-samples", type=click.IntRange(min=1), default=1, metavar="N",
              help="continuations of --prompt or piped input, written as one batch  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a sample, a line each")
@click.option("--stop", "stops", multiple=True, metavar="TEXT",
              help="end a continuation before TEXT; may be given several times")
@click.option("--keep-context", is_flag=True, help="carry the story so far: you and the model write it in turns")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="the trained model  [default: best.pt in --out-dir, else ckpt.pt]")
@click.option("--out-dir", type=click.Path(path_type=Path), default=TrainConfig.out_dir, metavar="FOLDER",
              help=f"the run to talk to  [default: {TrainConfig.out_dir}]")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps  [default: auto]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              help="precision of the weights; auto is float16 on CUDA and CPU, else float32  [default: auto]")
@setting_options(SampleConfig)
def main(prompt, num_samples, as_json, stops, keep_context, checkpoint, out_dir, device, dtype, **given):
    """Continue text with a trained model.

    A base model: it does not answer questions, it goes on from the text it is given. On a terminal it reads a text at a
    time (/help lists the commands). With --prompt or piped input it writes only the continuation to standard output;
    what is said about it goes to standard error.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # neither a console nor a file that is not UTF-8 stops the program
    piped = prompt is None and not sys.stdin.isatty()
    if "" in stops:
        raise click.UsageError("--stop is empty; give it the text to stop at.")
    if prompt is None and not piped and (num_samples > 1 or as_json):
        raise click.UsageError("--num-samples and --json need a text: add --prompt TEXT, or pipe one in.")
    sample = SampleConfig(**pick(SampleConfig, given))
    with Interrupts() as interrupts:
        if piped:
            prompt = read_piped(interrupts)
        if piped and prompt is None:
            note('The input is empty, so there is nothing to continue. For a story from nothing: --prompt ""')
            return
        writer = load_writer(checkpoint or find_checkpoint(out_dir), device, dtype)
        session = Session(writer, sample, stops, keep_context, interrupts)
        if prompt is None:
            sys.exit(converse(session))
        note(writer.about)
        # An argument that is not valid in the console's encoding arrives with lone surrogates in place of bytes.
        sys.exit(write_once(session, prompt.encode("utf-8", "replace").decode("utf-8"), num_samples, as_json))


if __name__ == "__main__":
    main()
