"""Settings: every name, default, unit and limit is stated once, here, and the command-line flags are made from them.

Also what every script needs: the error a user sees, how a file is replaced, and the lock on a folder.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import click
from click import BOOL, STRING, Choice, FloatRange, IntRange

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

IGNORE_INDEX = -1  # target of a position where nothing is predicted


class UserError(click.ClickException):
    """A problem with the user's files, machine or flags. The message names it and ends with what to type next."""

    def show(self, file=None):
        click.echo(wrapped(f"Error: {self.format_message()}", sys.stderr), err=True)


def short_message(error):
    """The first line of another library's error, for use inside one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def quoted(text):
    """`text` as one word of a command, in double quotes (which sh, cmd and PowerShell share) where it needs them."""
    return str(text) if re.fullmatch(r"[\w./\\:=+~-]+", str(text)) else f'"{text}"'


BREAKABLE = str.maketrans("\u00a0\u2011", " -")


def unbreakable(pattern, text):
    """`text` with a space and a hyphen at which no line is broken, wherever `pattern` matches. BREAKABLE undoes it."""
    return re.sub(pattern, lambda match: match[0].replace(" ", "\u00a0").replace("-", "\u2011"), text)


def wrapped(text, stream):
    """`text` for `stream`: on a terminal, lines are broken between words, and never inside a command to type."""
    if not stream.isatty():
        return text
    text = unbreakable(r"(python|pip|torchrun) [^`\n]*", text)
    wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns - 1, break_long_words=False,
                                   break_on_hyphens=False)
    return "\n".join(map(wrapper.fill, text.split("\n"))).translate(BREAKABLE)


# -----------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file that replaces `path` when the block succeeds, so that `path` is never half written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Free some disk space or choose another "
                        "folder, then rerun the same command.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # still there only after a failure


def replace_file(source, target, seconds=10):
    """os.replace that waits for readers: Windows refuses while another process has one of the files open."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def folder_lock(folder):
    """Keep every other run out of `folder`. The operating system drops the lock when the process ends, in any way."""
    path = Path(folder) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            # Any other error means a file system without locks, where an unlocked run is better than none.
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(f"{folder} is in use by another process: wait for it to finish, or stop it.") from error
        yield


# -----------------------------------------------------------------------------
# Settings

def setting(default, help, type, *, group=None, metavar=None):
    """A field of a settings class that is also a flag; `group` starts a new section in --help."""
    return field(default=default, metadata=dict(help=help, type=type, group=group, metavar=metavar))


# What users of nanoGPT type, and the settings here.
OTHER_FLAGS = {"lr": "learning_rate", "min_lr": "min_lr_ratio", "n_embed": "n_embd",
               "gradient_accumulation_steps": "tokens_per_iter"}


@dataclass(frozen=True)
class Settings:
    """Base class. A value is converted and checked by the click type of its field, wherever the value comes from."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            try:
                converted = f.metadata["type"].convert(value, None, None)
            except (click.BadParameter, TypeError) as error:
                raise UserError(f"{flag(f.name)}: {getattr(error, 'message', error)}") from None
            object.__setattr__(self, f.name, converted)

    @classmethod
    def from_dict(cls, values, path):
        """The settings in a dict that was read from the file `path`. UserError if they are not of this version."""
        try:
            return cls(**values)
        except (AttributeError, TypeError, UserError) as error:
            raise UserError(f"{path}: its settings are damaged or of another version ({short_message(error)}): use "
                            "another file, or train again with `python train.py`.") from error


class IntOrAuto(click.ParamType):
    name = "N|auto"

    def convert(self, value, param, ctx):
        if value == "auto" or str(value).isdecimal():
            return value if value == "auto" else IntRange(1).convert(value, param, ctx)
        self.fail(f"{value!r} is neither a number nor auto.", param, ctx)


@dataclass(frozen=True)
class GPTConfig(Settings):
    """Shape of the network. The defaults are the model of 12.29 M parameters."""

    block_size: int = setting(256, "context length, in tokens", IntRange(2, 65536), group="Model")
    vocab_size: int = setting(4096, "vocabulary size; by default that of the corpus", IntRange(260, 65536))
    n_layer: int = setting(6, "transformer blocks", IntRange(1, 256))
    n_head: int = setting(6, "attention heads per block; must divide n-embd", IntRange(1, 256))
    n_embd: int = setting(384, "width of the residual stream", IntRange(8, 16384))
    intermediate_size: int = setting(1024, "hidden width of the SwiGLU layer", IntRange(8, 65536))
    dropout: float = setting(0.0, "dropout probability", FloatRange(0, 1, max_open=True))
    bias: bool = setting(False, "biases in the linear layers", BOOL)
    position: str = setting("learned", "how token order is encoded", Choice(["learned", "rotary"]))
    qk_norm: bool = setting(False, "RMS-normalise queries and keys in each head", BOOL)

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd is {self.n_embd}; it must be a multiple of n_head ({self.n_head}).")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise UserError(f"n_embd / n_head is {self.n_embd // self.n_head}; rotary positions need an even number.")


DEVICE = ("auto", "cpu, cuda, cuda:1, xpu or mps; auto: the accelerator found, else cpu", STRING)
DTYPE = ("auto", "precision of the matrix products; auto: float16 on CUDA, else float32",
         Choice(["auto", "float32", "float16", "bfloat16"]))


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a run learns, what it may use, and when it reports."""

    data_dir: str = setting("data", "folder of the prepared corpus", STRING, group="Folders", metavar="FOLDER")
    out_dir: str = setting("out", "folder for checkpoints, metrics and settings", STRING, metavar="FOLDER")

    tokens_per_iter: int = setting(65536, "tokens per iteration (the learning dial)", IntRange(2), group="Learning")
    max_iters: int = setting(30000, "iterations; each one is an optimizer update", IntRange(1))
    hours: float | None = setting(None, "instead of --max-iters: as many iterations as fit this time, evaluations and "
                                  "saves included", FloatRange(0, min_open=True))
    optimizer: str = setting("muon", "muon: Muon for the matrices of the blocks, AdamW for embeddings and norms",
                             Choice(["adamw", "muon"]))
    learning_rate: float = setting(2e-3, "peak learning rate with --optimizer adamw", FloatRange(0, 10, min_open=True))
    muon_learning_rate: float = setting(0.02, "peak learning rate of the matrices with muon",
                                        FloatRange(0, 10, min_open=True))
    embedding_learning_rate: float = setting(0.01, "peak learning rate of embeddings and norms with muon",
                                             FloatRange(0, 10, min_open=True))
    schedule: str = setting("wsd", "after the warmup: cosine decay, or constant and then linear decay (wsd)",
                            Choice(["cosine", "wsd"]))
    min_lr_ratio: float = setting(0.0, "final learning rate as a fraction of its peak", FloatRange(0, 1))
    warmup_iters: int = setting(100, "iterations of linear warmup (at most a tenth of max-iters)", IntRange(0))
    decay_fraction: float = setting(0.4, "wsd: fraction of the run in which the learning rate decays", FloatRange(0, 1))
    weight_decay: float = setting(0.1, "decoupled weight decay of the matrices (with muon, not of embeddings)",
                                  FloatRange(0, 100))
    beta1: float = setting(0.9, "AdamW: decay of the mean of the gradient", FloatRange(0, 1, max_open=True))
    beta2: float = setting(0.95, "AdamW: decay of the mean of the squared gradient", FloatRange(0, 1, max_open=True))
    grad_clip: float = setting(1.0, "maximum gradient norm; 0: no clipping", FloatRange(0))
    align_stories: bool = setting(False, "start every training window at the first token of a story", BOOL)
    seed: int = setting(1337, "seed of weights, data order and dropout", IntRange(0, 2**63 - 1))
    teacher: str | None = setting(None, "learn from the predictions of this checkpoint too, which has the same "
                                  "tokenizer", STRING, metavar="FILE")
    teacher_weight: float = setting(0.5, "weight of the teacher in the loss; the rest is that of the text",
                                    FloatRange(0, 1, min_open=True))

    batch_size: int | str = setting(32, "sequences per forward pass (the memory dial: halve it when memory runs out; "
                                    "learning stays the same), or auto", IntOrAuto(), group="Memory and speed")
    device: str = setting(*DEVICE, metavar="NAME")
    dtype: str = setting(*DTYPE)
    compile: str = setting("auto", "torch.compile; auto: on CUDA with Triton, for runs of 500 iterations or more",
                           Choice(["auto", "on", "off"]))
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower",
                                             BOOL)

    log_interval: int = setting(10, "iterations between log lines", IntRange(1), group="Reports and checkpoints")
    eval_interval: int = setting(250, "iterations between evaluations", IntRange(1))
    eval_tokens: int = setting(65536, "tokens per evaluation; 0: the whole validation set", IntRange(0))
    final_eval_tokens: int = setting(0, "tokens of the evaluation after the last iteration; 0: the whole "
                                     "validation set", IntRange(0))
    sample_tokens: int = setting(200, "maximum length of the story printed at each evaluation; 0: none", IntRange(0))
    save_minutes: float = setting(10.0, "minutes between saves; every evaluation saves too",
                                  FloatRange(0, min_open=True))


@dataclass(frozen=True)
class SampleConfig(Settings):
    """How the next token is chosen."""

    max_new_tokens: int = setting(200, "maximum length of a continuation, in tokens", IntRange(1), group="Sampling")
    temperature: float = setting(0.6, "below 1 is safer, above 1 is wilder; 0: always the most likely token",
                                 FloatRange(0, 100))
    top_k: int = setting(20, "keep the k most likely tokens; 0: all", IntRange(0))
    top_p: float = setting(1.0, "keep the fewest most likely tokens whose total probability reaches this; 1: all",
                           FloatRange(0, 1, min_open=True))
    min_p: float = setting(0.0, "drop tokens less likely than this fraction of the most likely one", FloatRange(0, 1))
    repetition_penalty: float = setting(1.1, "above 1: recent tokens become less likely; 1: off", FloatRange(1, 100))
    repetition_window: int = setting(64, "number of recent tokens that the penalty applies to", IntRange(1))
    dry_multiplier: float = setting(0.0, "above 0: penalise verbatim repetition of phrases (DRY); 0: off",
                                    FloatRange(0, 100))
    dry_base: float = setting(1.75, "DRY: growth of the penalty per repeated token", FloatRange(1, 100))
    dry_allowed_length: int = setting(3, "DRY: length of a repetition without penalty", IntRange(1))
    seed: int | None = setting(None, "random seed: the same one gives the same text  [default: random]",
                              IntRange(0, 2**63 - 1))


@dataclass(frozen=True)
class ReinforceConfig(Settings):
    """How reinforce.py learns, what it may use, and when it evaluates."""

    data_dir: str = setting("data", "folder of a corpus prepared with --word-prompts", STRING, group="Folders",
                            metavar="FOLDER")
    out_dir: str = setting("out/rl", "folder for checkpoints and metrics", STRING, metavar="FOLDER")

    max_iters: int = setting(150, "iterations; each one writes new stories and makes one update", IntRange(1),
                             group="Learning")
    prompts_per_iter: int = setting(48, "prompts per iteration, of equally many tokens", IntRange(1))
    group_size: int = setting(12, "stories per prompt, whose mean reward is the baseline", IntRange(2))
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW; it warms up and falls to 0",
                                   FloatRange(0, 10, min_open=True))
    warmup_iters: int = setting(10, "iterations of linear warmup", IntRange(0))
    kl_weight: float = setting(0.02, "weight of the divergence from the model that it starts from", FloatRange(0))
    grad_clip: float = setting(1.0, "maximum gradient norm; 0: no clipping", FloatRange(0))
    seed: int = setting(1337, "seed of prompts and stories", IntRange(0, 2**63 - 1))

    batch_size: int = setting(64, "stories per forward pass of the update (the memory dial)", IntRange(1),
                              group="Memory and speed")
    device: str = setting(*DEVICE, metavar="NAME")
    dtype: str = setting(*DTYPE)

    eval_interval: int = setting(25, "iterations between evaluations", IntRange(1), group="Evaluation")
    eval_prompts: int = setting(256, "prompts with held-out words per evaluation", IntRange(1))
    eval_tokens: int = setting(65536, "validation tokens per evaluation; 0: the whole validation set", IntRange(0))


@dataclass(frozen=True)
class CorpusConfig(Settings):
    """Which text is prepared, and how."""

    dataset: str = setting("roneneldan/TinyStories", "a name on the Hugging Face Hub (owner/name, or "
                           "owner/name:configuration), a local file or folder (txt, json, jsonl, csv, parquet), or "
                           "'sample', the built-in corpus", STRING, group="Corpus", metavar="NAME")
    text_field: str = setting("text", "column that holds the text (not for txt)", STRING, metavar="NAME")
    vocab_size: int | None = setting(None, "vocabulary size  [default: 4096; 512 for sample]", IntRange(260, 65536))
    tokenizer: str | None = setting(None, "use this tokenizer (such as data/tok4096.model) instead of training one; "
                                    "required before train.py --init-from", STRING, metavar="FILE")
    num_files: int = setting(50, "the corpus is cut into 50 equal files; use the first N", IntRange(1, 50))
    sample_rate: float = setting(1.0, "fraction of the stories of those files to keep", FloatRange(0, 1, min_open=True))
    word_prompts: float = setting(0.0, "fraction of the training stories that begin with a line which names three of "
                                  "their words, such as 'Words: fox, rain, umbrella.' (for reinforce.py)",
                                  FloatRange(0, 1))
    copies: int = setting(1, "with --word-prompts: copies of the training text, each naming other words",
                          IntRange(1, 1000))
    seed: int = setting(1337, "seed of the choice by --sample-rate and of the word prompts", IntRange(0, 2**63 - 1))
    data_dir: str = setting("data", "folder for the prepared corpus", STRING, metavar="FOLDER")


# What each preset changes in GPTConfig and TrainConfig. A flag on the command line wins over the preset.
PRESETS = {
    "rtx3050": {},
    "llama": dict(position="rotary"),
    "demo": dict(block_size=160, n_layer=3, n_head=4, n_embd=128, intermediate_size=256, position="rotary",
                 qk_norm=True, align_stories=True, tokens_per_iter=5120, batch_size=32, max_iters=320,
                 embedding_learning_rate=6e-3, warmup_iters=50, eval_interval=80, eval_tokens=20000),
}


# -----------------------------------------------------------------------------
# The command line

# Underscores are accepted too: users of nanoGPT type --batch_size.
CONTEXT_SETTINGS = dict(help_option_names=["-h", "--help"], max_content_width=100,
                        token_normalize_func=lambda name: name.replace("_", "-"))


def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


class Command(click.Command):
    """A command whose --help has the sections of the settings, and whose errors are one line, without a traceback."""

    def parse_args(self, ctx, args):
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if new := OTHER_FLAGS.get(error.option_name[2:].replace("-", "_")):
                raise click.UsageError(f"there is no {error.option_name}: use {flag(new)}.", ctx) from None
            raise

    def invoke(self, ctx):
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # a notebook's streams cannot be reconfigured
                # A console that is not UTF-8 shows ? for what it lacks; a file or a pipe gets UTF-8.
                redirected = stream is not sys.stdin and not stream.isatty()
                stream.reconfigure(encoding="utf-8" if redirected else None, errors="replace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            ctx.exit(130)  # as shells report Ctrl-C
        except ModuleNotFoundError as error:
            package = error.name.partition(".")[0]
            raise UserError(f"cannot import {package}: pip install {package}") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has closed it: click exits quietly
                raise
            name = error.filename or "the operating system"
            raise UserError(f"{name}: {error.strerror or error}. Fix this and rerun.") from error

    def format_options(self, ctx, formatter):
        sections = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "group", "This command"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, unbreakable(r"\S*-\S*|\[default: \S*", help)) for name, help in records])
        formatter.buffer = [text.translate(BREAKABLE) for text in formatter.buffer]


class SettingOption(click.Option):
    """The flag of a field. Its value is None unless typed, so that a preset can fill it."""

    def __init__(self, field, group):
        name, kind = flag(field.name), field.metadata["type"]
        metavar = field.metadata["metavar"] or {IntRange: "N", FloatRange: "X"}.get(type(kind))
        value = "no" if field.default is False else field.default
        default = "" if value is None else f"  [default: {value}]"
        super().__init__([f"{name}/--no-{name[2:]}" if kind is BOOL else name], type=kind, default=None,
                         metavar=metavar, help=field.metadata["help"] + default)
        self.group = group

    def get_help_extra(self, ctx):
        return {}  # click would add the range of every number


def setting_options(*classes):
    """Decorator: one flag for each field of the settings classes."""
    def decorate(function):
        options, group = [], None
        for f in (f for cls in classes for f in fields(cls)):
            group = f.metadata["group"] or group
            options.append(SettingOption(f, group))
        function.__click_params__ = getattr(function, "__click_params__", []) + options[::-1]
        return function
    return decorate


def refuse_without_effect(given, unused):
    """UserError for a flag in `given` that has no effect; `unused`: {name of a setting: (is that so, what to do)}."""
    for name, (is_unused, advice) in unused.items():
        if is_unused and name in given:
            raise UserError(f"{flag(name)} has no effect {advice}")


def only_fields(cls, values):
    """The entries of `values` that are fields of `cls` and were given (are not None)."""
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None}
