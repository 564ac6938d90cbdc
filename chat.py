"""Continue text with a trained model: in a conversation on a terminal, or once for --prompt or piped input.

The model's text goes to standard output, everything else to standard error.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes while torch is imported

import contextlib
import itertools
import json
import math
import os
import re
import secrets
import select
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch

from config import CONTEXT_SETTINGS, Command, SampleConfig, TrainConfig, UserError, only_fields, setting_options
from data import Tokenizer
from model import choose_device, choose_dtype, find_checkpoint, load_checkpoint, prepare_for_inference

WELCOME = """\
The model continues text; it does not answer questions.
Type the beginning of a story, or Enter for one from nothing.
/help lists the commands, /quit exits."""
COMMANDS = [
    ("TEXT", "the model continues it; Enter alone: a story from nothing, or more of a story that is carried"),
    ('"""', "starts and ends a text of several lines"),
    ("//TEXT", "a text that begins with a slash"),
    ("/set NAME VALUE", "change a setting, for example /set temperature 0.8; without VALUE, show it"),
    ("/show", "the checkpoint and all settings"),
    ("/retry", "regenerate the last continuation with the next seed"),
    ("/reset", "forget the story so far"),
    ("/quit", "exit; so do quit, exit and the end of input (Ctrl-D, on Windows Ctrl-Z and Enter)"),
    ("Ctrl-C", "stop the model; what it wrote is kept"),
]
# A barely trained model may write bytes that control a terminal; newline and tab are harmless.
CONTROL = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}
INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


# -----------------------------------------------------------------------------
# Printing

def print_text(text):
    """Print a piece of the model's text at once."""
    click.echo(text.translate(CONTROL) if sys.stdout.isatty() else text, nl=False)


def print_note(text):
    """Print anything else, on a terminal wrapped and dim."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        text = "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
                         for line in text.split("\n"))
    click.echo(click.style(text, dim=True), err=True, color=False if os.environ.get("NO_COLOR") else None)


def table(rows):
    """Rows (name, help) in two columns."""
    formatter = click.HelpFormatter()
    formatter.write_dl(rows)
    return formatter.getvalue().rstrip("\n")


# -----------------------------------------------------------------------------
# Generation

class LoadedModel:
    """A trained model on its device, its tokenizer, and a line that describes it."""

    def __init__(self, path, device, dtype):
        self.device = choose_device(device)
        dtype = choose_dtype(dtype, self.device, generating=True)
        self.model, checkpoint = load_checkpoint(path)
        self.block_size = self.model.config.block_size
        self.tokenizer = Tokenizer(checkpoint["tokenizer"], path)
        prepare_for_inference(self.model, self.device, dtype)
        state = checkpoint.get("state") or checkpoint.get("progress", {})  # older checkpoints call it progress
        facts = [f"{path}: {self.model.count_parameters() / 1e6:.2f} M parameters"]
        if "iter" in state:
            facts.append(f"iteration {state['iter']:,}")
        if math.isfinite(state.get("best_val", math.inf)):
            facts.append(f"best validation loss {state['best_val']:.4f}")
        self.description = f"{', '.join(facts)}; {self.device}, {str(dtype).removeprefix('torch.')}."

    def prompt_ids(self, text):
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def generate(self, ids, sampling, seed, count):
        """Yield the next id of each of `count` continuations of the prompt `ids`, as a list; -1: it has ended."""
        idx = torch.tensor([ids], device=self.device).expand(count, -1)
        generator = torch.Generator(self.device).manual_seed(seed)
        try:
            for step in self.model.generate(idx, sampling, self.tokenizer.eos_id, generator):
                yield step.tolist()
        except RuntimeError as error:
            if not re.search("out of memory|to allocate", str(error)):  # only CUDA has a class of its own for it
                raise
            advice = f"--num-samples {count // 2}" if count > 1 else "--device cpu"
            raise UserError(f"out of memory on {self.device}: use {advice}.") from error


@dataclass
class Reply:
    """One continuation of a prompt."""

    text: str = ""
    stop: str = "interrupted"  # until it ends otherwise: end of story, length, stop string
    tokens: int = 0  # without the end of the story
    seed: int = 0


def row_ids(steps, row, reply, max_new_tokens):
    """Yield the ids in one row of the steps of a batch until its story ends."""
    for step in steps:
        if step[row] == -1:
            break
        reply.tokens += 1
        yield step[row]
    reply.stop = "length" if reply.tokens == max_new_tokens else "end of story"


def cut_at_stop(pieces, stops, reply):
    """Yield pieces of text until a stop string is complete, without it.

    A stop string may span pieces, so the end of a piece is held back while it may be the beginning of one.
    """
    buffer = ""
    for piece in pieces:
        buffer += piece
        found = [buffer.index(stop) for stop in stops if stop in buffer]
        if found:
            reply.stop = "stop string"
            yield buffer[:min(found)]
            return
        overlap = max((n for stop in stops for n in range(1, len(stop)) if buffer.endswith(stop[:n])), default=0)
        yield buffer[:len(buffer) - overlap]
        buffer = buffer[len(buffer) - overlap:]
    yield buffer


# -----------------------------------------------------------------------------
# A session: the settings, the story so far, the last turn

def append_text(story, text):
    """The story and the user's text, with a space between them unless one is there or punctuation begins."""
    if not story or not text or story[-1].isspace() or text[0].isspace() or text[0] in ",.;:!?'\"-)":
        return story + text
    return f"{story} {text}"


@dataclass
class Session:
    loaded: LoadedModel
    sampling: SampleConfig
    stops: tuple
    keep_context: bool
    story: str = ""  # what keep-context carries
    last: tuple | None = None  # for /retry: the story before the last turn, its text and its seed
    window_warned: bool = False

    def stream(self, ids, replies):
        """Generate the replies to the prompt `ids` as one batch; yield the next piece of text of each."""
        steps = self.loaded.generate(ids, self.sampling, replies[0].seed, len(replies))
        streams = []
        for row, (all_steps, reply) in enumerate(zip(itertools.tee(steps, len(replies)), replies, strict=True)):
            ids = row_ids(all_steps, row, reply, self.sampling.max_new_tokens)
            streams.append(cut_at_stop(self.loaded.tokenizer.decode_stream(ids), self.stops, reply))
        for pieces in itertools.zip_longest(*streams, fillvalue=""):  # no step is generated that no reply needs
            for reply, piece in zip(replies, pieces, strict=True):
                reply.text += piece
            yield pieces

    def write(self, text, count=1, as_json=False, seed=None):
        """Print `count` continuations of `text`, or of the story and `text`; a single one while it is generated."""
        if seed is None:
            seed = secrets.randbelow(2**31) if self.sampling.seed is None else self.sampling.seed
        story, replies, single = self.story, [Reply(seed=seed) for _ in range(count)], count == 1 and not as_json
        prompt = append_text(story, text) if self.keep_context else text
        ids, start = self.loaded.prompt_ids(prompt), time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            for pieces in self.stream(ids, replies):
                if single:
                    print_text(pieces[0])
        self.story, self.last = prompt + replies[0].text, (story, text, seed)
        if as_json:
            for i, reply in enumerate(replies):
                click.echo(json.dumps(dict(prompt=prompt, **asdict(reply), sample=i)))
        elif not single:
            print_text("---\n".join(reply.text.removesuffix("\n") + "\n" for reply in replies))
        elif not replies[0].text.endswith("\n"):
            click.echo()
        self.print_statistics(ids, replies, start)
        return replies

    def print_statistics(self, ids, replies, start):
        tokens, seconds = sum(reply.tokens for reply in replies), time.perf_counter() - start
        context, block_size = len(ids) + max(reply.tokens for reply in replies), self.loaded.block_size
        stops = [reply.stop for reply in replies]
        why = ", ".join(f"{stops.count(s)} x {s}" if len(stops) > 1 else s for s in dict.fromkeys(stops))
        if context > block_size and not self.window_warned:
            self.window_warned = True
            print_note(f"The text has outgrown the model's window of {block_size} tokens: it sees only the last part.")
        print_note(f"[{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {why}, context "
                   f"{min(context, block_size)} of {block_size}, seed {replies[0].seed}]")

    def options(self):
        """{name: value} of what /set can change, as it is typed."""
        values = {name.replace("_", "-"): value for name, value in asdict(self.sampling).items()}
        values["stop"] = " ".join(f'"{stop}"' for stop in self.stops).replace("\n", "\\n") or None
        values["keep-context"] = "on" if self.keep_context else "off"
        return {name: "none" if value is None else value for name, value in values.items()}

    def set_option(self, name, value):
        if name == "stop":
            texts = re.findall(r'"([^"]+)"|([^"\s]+)', value.replace("\\n", "\n")) if value != "none" else []
            self.stops = tuple("".join(text) for text in texts)
        elif name == "keep-context":
            self.keep_context = click.BOOL.convert(value, None, None)
        else:
            value = None if value == "none" else value
            self.sampling = replace(self.sampling, **{name.replace("-", "_"): value})


# -----------------------------------------------------------------------------
# The conversation

def read_line(prompt):
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # input() would print it among the model's text
    return input()


def more_pasted():
    """Whether another line is there already, sooner than anyone types one. Windows cannot tell."""
    return os.name == "posix" and bool(select.select([sys.stdin], [], [], 0.02)[0])


def read_text():
    """A line, several pasted at once, or those between two \"\"\", with a / before a text that begins with one."""
    text = read_line("Story> ")
    if text.startswith("/"):
        return text
    in_quotes = text.startswith('"""')
    text = text[3:] if in_quotes else text
    try:
        while not text.endswith('"""') if in_quotes else more_pasted():
            text += "\n" + read_line("  ...> ")
    except KeyboardInterrupt:
        raise UserError("\nThe text is dropped: type another one.") from None
    text = text.removeprefix("\n").removesuffix('"""') if in_quotes else text
    return f"/{text}" if text.startswith("/") else text


def clean_prompt(text):
    """`text` as the training text is: LF between lines, no byte order mark, no newline or spaces at the end."""
    text = text.encode("utf-8", "replace").decode()  # an argument that is not valid in the locale has lone surrogates
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").rstrip(" ")


def run_command(session, command, argument=""):
    """Run a /command. False: exit."""
    options = session.options()
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        print_note(table(COMMANDS))
    elif command == "/show":
        used = len(session.loaded.prompt_ids(session.story)) if session.keep_context else 0
        print_note(f"{session.loaded.description} The story so far takes {used} of {session.loaded.block_size} tokens.")
        print_note(table([(f"{name} = {options[name]}", option.help.partition("  [")[0]) for option in main.params
                          if (name := option.opts[0][2:]) in options]))
    elif command == "/set":
        name, value = re.fullmatch(r"-*([\w-]*)\s*=?\s*(.*)", argument.strip()).groups()
        name = name.replace("_", "-")
        if name not in options:
            raise UserError(f"no setting is called {name!r}: /show lists them, /set NAME VALUE changes one.")
        if value:
            session.set_option(name, value)
        print_note(f"{name} = {session.options()[name]}")
    elif command == "/retry" and session.last:
        session.story, text, seed = session.last
        session.write(text, seed=(seed + 1) % 2**63)
    elif command == "/retry":
        print_note("There is nothing to regenerate yet: type a text.")
    elif command == "/reset":
        session.story, session.last, session.window_warned = "", None, False
        print_note("A new story begins.")
    else:
        print_note(f"{command} is not a command: /help lists them. To begin a text with a slash, type //.")
    return True


def handle_line(session, line):
    """Continue a text or run a command. False: exit."""
    if line.strip() in ("quit", "exit"):
        return False
    if line.startswith("/") and not line.startswith("//"):
        return run_command(session, *line.split(maxsplit=1))
    session.write(clean_prompt(line.removeprefix("/")))
    return True


def chat_loop(session):
    """Read and handle lines until the user exits; return the exit status."""
    try:
        import readline  # input() then edits lines and takes long ones: a bare terminal cuts them at 4,096 bytes
    except ImportError:
        readline = None
    print_note(f"{session.loaded.description}\n{WELCOME}")
    presses = 0  # of Ctrl-C in a row, on an empty line
    while True:
        try:
            if not handle_line(session, read_text()):
                return 0
            presses = 0
        except EOFError:
            click.echo(err=True)
            return 0
        except KeyboardInterrupt:
            click.echo(err=True)
            half_typed = readline and readline.get_line_buffer()
            presses = 0 if half_typed else presses + 1
            if presses == 2:
                return INTERRUPTED
            if presses == 1:
                print_note("Ctrl-C again exits, as does /quit.")
        except click.ClickException as error:
            print_note(error.format_message())
            presses = 0


# -----------------------------------------------------------------------------
# The command

def read_piped():
    """All of standard input: UTF-8 whatever the locale says, else in the encoding of the locale."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError:
        print_note(f"The input is not UTF-8; it is read as {sys.stdin.encoding}.")
        return data.decode(sys.stdin.encoding, "replace")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--prompt", metavar="TEXT",
              help='continue TEXT and exit, without reading any input; "" writes a story from nothing')
@click.option("--num-samples", type=click.IntRange(min=1), default=1, metavar="N",
              help="continuations of --prompt or piped input, generated as one batch  [default:\u00a01]")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines: one object per sample")
@click.option("--stop", "stops", multiple=True, metavar="TEXT",
              help="end a continuation before TEXT; may be given several times")
@click.option("--keep-context", is_flag=True, help="carry the story so far: you and the model write it in turns")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="the trained model  [default: best.pt in --out-dir, else ckpt.pt]")
@click.option("--out-dir", type=click.Path(path_type=Path), default=TrainConfig.out_dir, metavar="FOLDER",
              help=f"the run to talk to  [default:\u00a0{TrainConfig.out_dir}]")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps  [default:\u00a0auto]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              help="precision of the weights; auto: float16 on CUDA and CPU, else float32  [default:\u00a0auto]")
@setting_options(SampleConfig)
def main(prompt, num_samples, as_json, stops, keep_context, checkpoint, out_dir, device, dtype, **sampling):
    """Continue text with a trained model.

    On a terminal it reads one text at a time (/help lists the commands). With --prompt or piped input it prints only
    the continuation to standard output.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "" in stops:
        raise click.UsageError("--stop is empty: pass the text to stop at.")
    if prompt is None and not sys.stdin.isatty():
        prompt = read_piped()
        if not prompt:
            return print_note('The input is empty: there is nothing to continue. For a story from nothing: --prompt ""')
    if prompt is None and (num_samples > 1 or as_json):
        raise click.UsageError("--num-samples and --json need a text: add --prompt TEXT, or pipe one in.")
    loaded = LoadedModel(checkpoint or find_checkpoint(out_dir), device, dtype)
    session = Session(loaded, SampleConfig(**only_fields(SampleConfig, sampling)), stops, keep_context)
    if prompt is None:
        sys.exit(chat_loop(session))
    print_note(loaded.description)
    replies = session.write(clean_prompt(prompt), num_samples, as_json)
    sys.exit(INTERRUPTED if any(reply.stop == "interrupted" for reply in replies) else 0)


if __name__ == "__main__":
    try:
        main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python exits
