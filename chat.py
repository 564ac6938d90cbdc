"""Continue text with a trained model: in a conversation on a terminal, or once for --prompt or piped input.

The model's text goes to standard output, everything else to standard error.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes while torch is imported

import codecs
import json
import math
import os
import re
import secrets
import select
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch

from config import (CONTEXT_SETTINGS, DEVICE, Command, SampleConfig, UserError, only_fields, refuse_without_effect,
                    setting_options, wrapped)
from data import CONTROL_CHARACTERS, WORDS, Tokenizer, word_prompt, words_used
from model import (choose_device, choose_dtype, find_checkpoint, load_checkpoint, out_of_memory_advice,
                   prepare_for_inference)

WELCOME = """\
The model continues text; it does not answer questions.
Type the beginning of a story, or Enter for one from nothing.
/help lists the commands, /quit exits."""
HELP = """\
TEXT             continue it
Enter            a new story, or more with --keep-context
\"\"\"              begin and end a text of several lines
//TEXT           a text that begins with a slash
/words fox rain  a new story with these words (up to five)
/set NAME VALUE  change a setting (/set temperature 0.8)
/set NAME        show a setting
/show            the checkpoint and all settings
/retry           regenerate the reply with the next seed
/reset           forget the story so far
/quit            exit; so does Ctrl-D (Windows: Ctrl-Z)
Ctrl-C           stop the model; what it wrote is kept"""


def print_text(text):
    click.echo(text.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else text, nl=False)


def print_note(text):
    """Print what is not the model's text, wrapped and dim on a terminal."""
    click.secho(wrapped(text, sys.stderr), err=True, dim=True, color=False if os.environ.get("NO_COLOR") else None)


class LoadedModel:
    """A trained model on its device, its tokenizer, and a line that describes it."""

    def __init__(self, path, device, dtype):
        self.device = choose_device(device)
        dtype = choose_dtype(dtype, self.device, generating=True)
        self.model, checkpoint = load_checkpoint(path)
        self.word_prompts = checkpoint.get("word_prompts")
        self.tokenizer = Tokenizer(checkpoint["tokenizer"], path)
        prepare_for_inference(self.model, self.device, dtype)
        size, state = f"{self.model.count_parameters() / 1e6:.2f} M parameters", checkpoint.get("state")
        trained = f", iteration {state['iter']:,}" if state else ""
        if state and state["best_val"] < math.inf:
            trained += f", best validation loss {state['best_val']:.4f}"
        self.description = f"{path}: {size}{trained}; {self.device}, {str(dtype).removeprefix('torch.')}."

    def generate(self, ids, sampling, seed, count):
        """Yield a list of the next tokens of `count` continuations of the prompt `ids`; -1: it has ended."""
        idx = torch.tensor([ids], device=self.device).expand(count, -1)
        generator = torch.Generator(self.device).manual_seed(seed)
        advice = f"--num-samples {count // 2}" if count > 1 else "--device cpu"
        with out_of_memory_advice(lambda: f"out of memory on {self.device}: use {advice}."):
            for step in self.model.generate(idx, sampling, self.tokenizer.eos_id, generator):
                yield step.tolist()
            yield [-1] * count  # the model leaves out the step in which its last row ends


class Reply:
    """One continuation of a prompt, which grows token by token."""

    def __init__(self, tokenizer, sampling, stops):
        self.tokenizer, self.sampling = tokenizer, sampling
        self.stops = [stop.replace(r"\n", "\n") for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        self.text = ""
        self.printed = 0  # characters
        self.tokens = 0
        self.stop = None  # why it ended: end of story, length, stop string, interrupted

    def add(self, token):
        """Append a token; -1 ends the text."""
        if self.stop:
            return
        if token == -1:
            self.text += self.decoder.decode(b"", final=True)
            self.stop = "length" if self.tokens == self.sampling.max_new_tokens else "end of story"
            return
        self.tokens += 1
        self.text += self.decoder.decode(self.tokenizer.token_bytes[token])
        if found := [self.text.index(stop) for stop in self.stops if stop in self.text]:
            self.text, self.stop = self.text[:min(found)], "stop string"

    def next_piece(self):
        """The text to print now: what is new, but not the last characters while they may begin a stop string."""
        margin = 0 if self.stop else max(map(len, self.stops), default=1) - 1
        start, self.printed = self.printed, max(self.printed, len(self.text) - margin)
        return self.text[start:self.printed]


# -----------------------------------------------------------------------------
# A session

def append_text(story, text):
    """The story and the user's text, with a space between them unless one is there or punctuation begins."""
    add_space = story and text and not story[-1].isspace() and text[0] not in " \t\n,.;:!?'\"-)"
    return f"{story} {text}" if add_space else story + text


def parse_words(text):
    """The words of --words and /words, each once and in lower case, as in training."""
    words = list(dict.fromkeys(re.findall(r"[^\s,.]+", text.lower())))
    if not 1 <= len(words) <= 5 or not all(map(WORDS.fullmatch, words)):  # words_used never finds "don't"
        raise UserError(f"{text!r} is not one to five words made of letters: type, for example, fox umbrella rain.")
    return words


@dataclass
class Session:
    loaded: LoadedModel
    sampling: SampleConfig
    stops: tuple
    keep_context: bool
    story: str = ""  # what keep-context carries
    last: tuple | None = None  # for /retry: the story before the last turn, its text, its seed and its words

    def write(self, text, count=1, as_json=False, seed=None, words=()):
        """Print `count` continuations of `text`, or of the story and `text`; a single one as it is generated."""
        if words and not self.loaded.word_prompts:
            print_note("This model was trained without word prompts. To train one with them:\n"
                       "python preprocess.py prepare-dataset --word-prompts 0.8 --data-dir data/words")
        if seed is None:
            seed = secrets.randbelow(2**31) if self.sampling.seed is None else self.sampling.seed
        prompt = append_text(self.story, text) if self.keep_context else text
        header = word_prompt(words) if words else ""
        tokenizer = self.loaded.tokenizer
        ids = [tokenizer.bos_id, *tokenizer.encode(header + prompt)]
        replies = [Reply(tokenizer, self.sampling, self.stops) for _ in range(count)]
        single, start = count == 1 and not as_json, time.perf_counter()
        try:
            for step in self.loaded.generate(ids, self.sampling, seed, count):
                for reply, token in zip(replies, step, strict=True):
                    reply.add(token)
                if single:
                    print_text(replies[0].next_piece())
                if all(reply.stop for reply in replies):
                    break
        except KeyboardInterrupt:
            for reply in replies:
                reply.stop = reply.stop or "interrupted"
        seconds = time.perf_counter() - start
        self.story, self.last = header + prompt + replies[0].text, (self.story, text, seed, words)
        used = [words_used(words, prompt + reply.text) for reply in replies]
        if single:
            print_text(replies[0].next_piece() + ("" if replies[0].text.endswith("\n") else "\n"))
        elif as_json:
            for i, reply in enumerate(replies):
                row = dict(prompt=prompt, text=reply.text, stop=reply.stop, tokens=reply.tokens, seed=seed, sample=i)
                click.echo(json.dumps(row | (dict(words=words, words_used=used[i]) if words else {})))
        else:
            print_text("---\n".join(reply.text.removesuffix("\n") + "\n" for reply in replies))
        tokens = [reply.tokens for reply in replies]
        stops = Counter(reply.stop for reply in replies)
        why = ", ".join(f"{n} x {stop}" if count > 1 else stop for stop, n in stops.items())
        context, block_size = len(ids) + max(tokens), self.loaded.model.config.block_size
        outgrown = " (outgrown: the model sees only the end)" if context > block_size else ""
        print_note(f"[{sum(tokens):,} tokens, {sum(tokens) / seconds:,.0f} tokens/s, {why}, context "
                   f"{min(context, block_size)} of {block_size}{outgrown}, seed {seed}]")
        if words and count == 1:
            print_note(f"[words used: {', '.join(used[0]) or 'none'} ({len(used[0])} of {len(words)})]")
        elif words:
            uses = ", ".join(f"{sum(word in story for story in used)} x {word}" for word in words)
            print_note(f"[words used: {uses}]")
        return replies

    def options(self):
        """{name: value} of what /set can change, as it is typed."""
        stops = " ".join(f'"{stop}"' for stop in self.stops).replace("\n", r"\n")
        values = dict(asdict(self.sampling), stop=stops or None, keep_context="on" if self.keep_context else "off")
        return {name.replace("_", "-"): "none" if value is None else value for name, value in values.items()}

    def set_option(self, name, value):
        if name == "stop":
            texts = re.findall(r'"[^"]+"|[^"\s]+', value) if value != "none" else []
            self.stops = tuple(text.strip('"') for text in texts)
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
    return os.name == "posix" and select.select([sys.stdin], [], [], 0.02)[0]


def read_rest(text):
    """The whole text whose first line is `text`: that line, several pasted at once, or those between two \"\"\"."""
    if text.startswith('"""'):
        text = text[3:]
        while not text.endswith('"""'):
            text += "\n" + read_line("  ...> ")
        return text.removeprefix("\n").removesuffix('"""')
    while more_pasted():
        text += "\n" + read_line("  ...> ")
    return text.removeprefix("/")


def clean_prompt(text):
    """`text` as the training text is: LF between lines, no byte order mark, no newline or spaces at the end."""
    return re.sub("\r\n?", "\n", text.removeprefix("\ufeff")).removesuffix("\n").rstrip(" ")


def run_command(session, command, argument=""):
    options = session.options()
    if command == "/help":
        print_note(HELP)
    elif command == "/show":
        print_note("\n".join([session.loaded.description, *(f"{name} = {value}" for name, value in options.items())]))
    elif command == "/set":
        name, value = re.fullmatch(r"-*([\w-]*)[\s=]*(.*)", argument.strip()).groups()
        name = name.replace("_", "-")
        if name not in options:
            raise UserError(f"no setting is called {name!r}: /show lists them.")
        if value:
            session.set_option(name, value)
        print_note(f"{name} = {session.options()[name]}")
    elif command == "/retry" and session.last:
        session.story, text, seed, words = session.last
        session.write(text, seed=seed + 1, words=words)
    elif command == "/retry":
        print_note("There is nothing to regenerate yet: type a text.")
    elif command == "/words":
        words, session.story = parse_words(argument), ""
        session.write("", words=words)
    elif command == "/reset":
        session.story, session.last = "", None
        print_note("A new story begins.")
    else:
        print_note(f"{command} is not a command: /help lists them. To begin a text with a slash, type //.")


def chat_loop(session):
    """Continue texts and run commands until the user exits; KeyboardInterrupt after Ctrl-C twice in a row."""
    try:
        import readline  # input() then edits lines and takes long ones: a bare terminal cuts them at 4,096 bytes
    except ImportError:
        readline = None
    print_note(f"{session.loaded.description}\n{WELCOME}")
    pressed = False  # whether Ctrl-C was the last thing typed
    while True:
        try:
            line = read_line("Story> ")
            pressed = False
            if line.strip().removeprefix("/") in ("quit", "exit"):
                return
            if line.startswith("/") and not line.startswith("//"):
                run_command(session, *line.split(maxsplit=1))
            else:
                session.write(clean_prompt(read_rest(line)))
        except click.ClickException as error:
            print_note(error.format_message())
        except EOFError:
            return click.echo(err=True)
        except KeyboardInterrupt:
            click.echo(err=True)
            half_typed = readline and readline.get_line_buffer()  # then Ctrl-C only drops that
            if pressed and not half_typed:
                raise
            pressed = not half_typed
            if pressed:
                print_note("Ctrl-C again exits, as does /quit.")


def read_piped():
    """All of standard input: UTF-8 whatever the locale says, else in the encoding of the locale."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(sys.stdin.encoding, "replace")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--prompt", metavar="TEXT",
              help=r'continue TEXT and exit; "" writes a story from nothing, and \n is a newline')
@click.option("--words", metavar="WORDS",
              help='write a story with one to five words ("fox, umbrella, rain") and exit; with --prompt '
              "it begins with TEXT; for a model trained with word prompts")
@click.option("--num-samples", type=click.IntRange(min=1), default=1, metavar="N",
              help="continuations, generated as one batch  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines: one object per sample")
@click.option("--stop", "stops", multiple=True, metavar="TEXT",
              help=r"end a continuation before TEXT (\n: a newline); may be given several times")
@click.option("--keep-context", is_flag=True,
              help="keep the story so far as context: you and the model write it in turns")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="the trained model  [default: best.pt in --out-dir, else ckpt.pt]")
@click.option("--out-dir", type=click.Path(path_type=Path), default="out", metavar="FOLDER",
              help="the run to talk to  [default: out]")
@click.option("--device", default="auto", metavar="NAME",
              help=f"{DEVICE[1]}  [default: auto]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              help="precision of the weights; auto: float16 on CUDA and CPU, else float32  [default: auto]")
@setting_options(SampleConfig)
def main(prompt, words, num_samples, as_json, stops, keep_context, checkpoint, out_dir, device, dtype, **sampling):
    """Continue text with a trained model.

    On a terminal it is a conversation (/help lists the commands). With --prompt, --words or piped input it prints
    only the continuation to standard output.
    """
    if words is not None:
        words, prompt = parse_words(words), prompt or ""
    if prompt is not None:
        prompt = prompt.replace(r"\n", "\n")  # as in --stop: cmd cannot type a newline
    elif not sys.stdin.isatty():
        prompt = read_piped()
        if not prompt:
            return print_note('The input is empty. For a story from nothing: --prompt=""')
    if prompt is None and (num_samples > 1 or as_json):
        raise click.UsageError("--num-samples and --json need a text: add --prompt TEXT, or pipe one in.")
    given = only_fields(SampleConfig, sampling)
    config = SampleConfig(**given)
    no_dry = config.dry_multiplier == 0, "without DRY: add --dry-multiplier 0.8."
    greedy = config.temperature == 0, "with --temperature 0: omit one."
    no_penalty = config.repetition_penalty == 1, "with --repetition-penalty 1: omit one."
    refuse_without_effect(given, dict(dry_base=no_dry, dry_allowed_length=no_dry, top_k=greedy, top_p=greedy,
                                      min_p=greedy, repetition_window=no_penalty))
    loaded = LoadedModel(checkpoint or find_checkpoint(out_dir), device, dtype)
    session = Session(loaded, config, stops, keep_context)
    if prompt is None:
        return chat_loop(session)
    print_note(loaded.description)
    replies = session.write(clean_prompt(prompt), num_samples, as_json, words=words or ())
    if any(reply.stop == "interrupted" for reply in replies):
        raise KeyboardInterrupt  # for the exit status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
