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

from config import (CONTEXT_SETTINGS, Command, SampleConfig, TrainConfig, UserError, only_fields,
                    refuse_without_effect, setting_options, wrapped)
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


# -----------------------------------------------------------------------------
# Printing

def print_text(text):
    """Print a piece of the model's text at once."""
    click.echo(text.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else text, nl=False)


def print_note(text):
    """Print anything else, on a terminal wrapped and dim."""
    text = click.style(wrapped(text, sys.stderr), dim=True)
    click.echo(text, err=True, color=False if os.environ.get("NO_COLOR") else None)


# -----------------------------------------------------------------------------
# Generation

class LoadedModel:
    """A trained model on its device, its tokenizer, and a line that describes it."""

    def __init__(self, path, device, dtype):
        self.device = choose_device(device)
        dtype = choose_dtype(dtype, self.device, generating=True)
        self.model, checkpoint = load_checkpoint(path)
        self.block_size = self.model.config.block_size
        self.word_prompts = checkpoint.get("word_prompts")
        self.tokenizer = Tokenizer(checkpoint["tokenizer"], path)
        prepare_for_inference(self.model, self.device, dtype)
        state = checkpoint.get("state") or checkpoint.get("progress", {})  # older checkpoints call it progress
        self.description = f"{path}: {self.model.count_parameters() / 1e6:.2f} M parameters"
        if "iter" in state:
            self.description += f", iteration {state['iter']:,}"
        if math.isfinite(state.get("best_val", math.inf)):
            self.description += f", best validation loss {state['best_val']:.4f}"
        self.description += f"; {self.device}, {str(dtype).removeprefix('torch.')}."

    def generate(self, ids, sampling, seed, count):
        """Yield the next token of each of `count` continuations of the prompt `ids`, as a list; -1: it has ended."""
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
        self.stops = [stop.replace(r"\n", "\n") for stop in stops]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        self.text = ""
        self.printed = 0  # characters
        self.tokens = 0  # without the end of the story
        self.stop = None  # why it ended: end of story, length, stop string, interrupted

    def add(self, token):
        """Append a token; -1 ends the text."""
        if token == -1:
            self.text += self.decoder.decode(b"", final=True)
            self.stop = "length" if self.tokens == self.sampling.max_new_tokens else "end of story"
            return
        self.tokens += 1
        self.text += self.decoder.decode(self.tokenizer.token_bytes[token])
        found = [self.text.index(stop) for stop in self.stops if stop in self.text]
        if found:
            self.text = self.text[:min(found)]
            self.stop = "stop string"

    def next_piece(self):
        """The text to print now: what is new, but not the last characters while they may begin a stop string."""
        margin = 0 if self.stop else max(map(len, self.stops), default=1) - 1
        start, self.printed = self.printed, max(self.printed, len(self.text) - margin)
        return self.text[start:self.printed]


# -----------------------------------------------------------------------------
# A session: the settings, the story so far, the last turn

def append_text(story, text):
    """The story and the user's text, with a space between them unless one is there or punctuation begins."""
    if not story or not text or story[-1].isspace() or text[0].isspace() or text[0] in ",.;:!?'\"-)":
        return story + text
    return f"{story} {text}"


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
    context_tokens: int = 0  # of the last prompt and its continuation
    last: tuple | None = None  # for /retry: the story before the last turn, its text, its seed and its words

    def write(self, text, count=1, as_json=False, seed=None, words=()):
        """Print `count` continuations of `text`, or of the story and `text`; a single one while it is generated."""
        if seed is None:
            seed = secrets.randbelow(2**31) if self.sampling.seed is None else self.sampling.seed
        prompt = append_text(self.story, text) if self.keep_context else text
        header = word_prompt(words) if words else ""
        if words and not self.loaded.word_prompts:
            print_note("This model was trained without word prompts and may ignore the words. To train one with them:\n"
                       "python preprocess.py prepare-dataset --word-prompts 0.8 --data-dir data/words")
        tokenizer, start = self.loaded.tokenizer, time.perf_counter()
        ids = [tokenizer.bos_id, *tokenizer.encode(header + prompt)]
        replies = [Reply(tokenizer, self.sampling, self.stops) for _ in range(count)]
        single = count == 1 and not as_json
        try:
            for step in self.loaded.generate(ids, self.sampling, seed, count):
                for reply, token in zip(replies, step, strict=True):
                    if not reply.stop:
                        reply.add(token)
                if single:
                    print_text(replies[0].next_piece())
                if all(reply.stop for reply in replies):
                    break
        except KeyboardInterrupt:
            for reply in replies:
                reply.stop = reply.stop or "interrupted"
        self.story, self.last = header + prompt + replies[0].text, (self.story, text, seed, words)
        used = [words_used(words, prompt + reply.text) for reply in replies]
        if single:
            print_text(replies[0].next_piece())
            if not replies[0].text.endswith("\n"):
                click.echo()
        elif as_json:
            for i, reply in enumerate(replies):
                row = dict(prompt=prompt, text=reply.text, stop=reply.stop, tokens=reply.tokens, seed=seed, sample=i)
                click.echo(json.dumps(row | (dict(words=words, words_used=used[i]) if words else {})))
        else:
            print_text("---\n".join(reply.text.removesuffix("\n") + "\n" for reply in replies))
        self.print_statistics(replies, len(ids), seed, time.perf_counter() - start)
        if words:
            uses = Counter(word for story in used for word in story)
            found = ", ".join(f"{uses[word]} x {word}" if count > 1 else word for word in words if uses[word])
            missing = ", ".join(word for word in words if not uses[word])
            print_note(f"[words used: {found or 'none'}; not used: {missing or 'none'}]")
        return replies

    def print_statistics(self, replies, prompt_tokens, seed, seconds):
        tokens, block_size = [reply.tokens for reply in replies], self.loaded.block_size
        before, self.context_tokens = self.context_tokens, prompt_tokens + max(tokens)
        if before <= block_size < self.context_tokens:
            print_note(f"The text has outgrown the model's window of {block_size} tokens: it sees only the last part.")
        stops = Counter(reply.stop for reply in replies)
        why = ", ".join(f"{n} x {stop}" if len(replies) > 1 else stop for stop, n in stops.items())
        print_note(f"[{sum(tokens):,} tokens, {sum(tokens) / seconds:,.0f} tokens/s, {why}, context "
                   f"{min(self.context_tokens, block_size)} of {block_size}, seed {seed}]")

    def options(self):
        """{name: value} of what /set can change, as it is typed."""
        stops = " ".join(f'"{stop}"' for stop in self.stops).replace("\n", r"\n")
        values = dict(asdict(self.sampling), stop=stops or None, keep_context="on" if self.keep_context else "off")
        return {name.replace("_", "-"): "none" if value is None else value for name, value in values.items()}

    def set_option(self, name, value):
        if name == "stop":
            texts = re.findall(r'"([^"]+)"|([^"\s]+)', value) if value != "none" else []
            self.stops = ["".join(text) for text in texts]
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
    text = text.encode("utf-8", "replace").decode()  # an argument that is not valid in the locale has lone surrogates
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").rstrip(" ")


def run_command(session, command, argument=""):
    options = session.options()
    if command == "/help":
        print_note(HELP)
    elif command == "/show":
        used, block_size = session.context_tokens if session.keep_context else 0, session.loaded.block_size
        print_note(f"{session.loaded.description} The story so far takes {used} of {block_size} tokens.")
        print_note("\n".join(f"{name} = {value}" for name, value in options.items()))
    elif command == "/set":
        name, value = re.fullmatch(r"-*([\w-]*)[\s=]*(.*)", argument.strip()).groups()
        name = name.replace("_", "-")
        if name not in options:
            raise UserError(f"no setting is called {name!r}: /show lists them, /set NAME VALUE changes one.")
        if value:
            session.set_option(name, value)
        print_note(f"{name} = {session.options()[name]}")
    elif command == "/retry" and session.last:
        session.story, text, seed, words = session.last
        session.write(text, seed=(seed + 1) % 2**63, words=words)
    elif command == "/retry":
        print_note("There is nothing to regenerate yet: type a text.")
    elif command == "/words":
        words, session.story, session.context_tokens = parse_words(argument), "", 0
        session.write("", words=words)
    elif command == "/reset":
        session.story, session.context_tokens, session.last = "", 0, None
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
            if line.strip() in ("quit", "exit", "/quit", "/exit"):
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
              help='continue TEXT and exit, without reading any input; "" writes a story from nothing, '
              r"and \n is a newline")
@click.option("--words", metavar="WORDS",
              help='write a story with one to five words ("fox, umbrella, rain") and exit, without reading any input; '
              "with --prompt it begins with TEXT; for a model trained with word prompts")
@click.option("--num-samples", type=click.IntRange(min=1), default=1, metavar="N",
              help="continuations of --prompt, --words or piped input, generated as one batch  [default: 1]")
@click.option("--json", "as_json", is_flag=True, help="JSON Lines: one object per sample")
@click.option("--stop", "stops", multiple=True, metavar="TEXT",
              help=r"end a continuation before TEXT (\n: a newline); may be given several times")
@click.option("--keep-context", is_flag=True,
              help="keep the story so far as context: you and the model write it in turns")
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="the trained model  [default: best.pt in --out-dir, else ckpt.pt]")
@click.option("--out-dir", type=click.Path(path_type=Path), default=TrainConfig.out_dir, metavar="FOLDER",
              help=f"the run to talk to  [default: {TrainConfig.out_dir}]")
@click.option("--device", default="auto", metavar="NAME",
              help="cpu, cuda, cuda:1, xpu or mps; auto: the accelerator found, else cpu  [default: auto]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              help="precision of the weights; auto: float16 on CUDA and CPU, else float32  [default: auto]")
@setting_options(SampleConfig)
def main(prompt, words, num_samples, as_json, stops, keep_context, checkpoint, out_dir, device, dtype, **sampling):
    """Continue text with a trained model.

    On a terminal it reads one text at a time (/help lists the commands). With --prompt, --words or piped input it
    prints only the continuation to standard output.
    """
    if "" in stops:
        raise click.UsageError("--stop is empty: pass the text to stop at.")
    if words is not None:
        words, prompt = parse_words(words), prompt or ""
    if prompt is not None:
        prompt = prompt.replace(r"\n", "\n")  # as in --stop: cmd cannot type a newline
    elif not sys.stdin.isatty():
        prompt = read_piped()
        if not prompt:
            return print_note('The input is empty: there is nothing to continue. For a story from nothing: --prompt=""')
    if prompt is None and (num_samples > 1 or as_json):
        raise click.UsageError("--num-samples and --json need a text: add --prompt TEXT, or pipe one in.")
    given = only_fields(SampleConfig, sampling)
    config = SampleConfig(**given)
    no_dry = config.dry_multiplier == 0, "without --dry-multiplier: add, for example, --dry-multiplier 0.8"
    greedy = config.temperature == 0, "with --temperature 0, which always takes the most likely token"
    refuse_without_effect(given, {
        "dry_base": no_dry, "dry_allowed_length": no_dry, "top_k": greedy, "top_p": greedy, "min_p": greedy,
        "repetition_window": (config.repetition_penalty == 1, "with --repetition-penalty 1")})
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
