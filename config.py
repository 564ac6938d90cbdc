"""Settings: their names, defaults, units and limits, stated once; the command-line flags are made from them.

Also here, because every script needs it: the user's error, and the one way in which files are written.
"""

import contextlib
import dataclasses
import errno
import os
import sys
import re
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import click

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None


class UserError(click.ClickException):
    """Something in the user's files, machine or flags. The message names it and ends with what to type next."""


def first_line(error):
    """What another library's error says first, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def cannot_write(path, error):
    """The UserError for an OSError that a full or read-only disk gave while `path` was written."""
    return UserError(f"cannot write {path}: {error.strerror or error}. "
                     "Free some space or choose another folder, then run the same command again.")


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Open a temporary file beside `path` that takes its place when the block ends well: `path` is never half written.

    UserError where the disk is full or the folder cannot be written; what was at `path` then stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise cannot_write(path, error) from error


def replace_file(source, target, seconds=10):
    """os.replace that waits for a reader to close `target`, or a virus scanner `source`, as Windows demands."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def sole_owner(folder, what):
    """Hold the file `lock` in `folder` for the length of a with block; UserError where another process holds it.

    It is the system's own lock, which ends with its process however that ends: a file left by a dead one locks nobody
    out, and need not be deleted (deleting it would let a third process lock a new file beside the second one's).
    """
    path = Path(folder) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose a folder that can be written.") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            # Anything else: a file system without locks, where a run is better than none.
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(f"another process is at work in {folder}: wait for its end or stop it, or choose "
                                f"another folder for this {what}.") from error
        yield


def option(default, help, *, min=None, max=None, above=None, below=None, choices=None, group=None, metavar=None):
    """A dataclass field that knows its help line and its limits; `group` starts a new section in --help."""
    limits = dict(min=min, max=max, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, metavar=metavar, **limits))


def allowed_values(field):
    """The limits of a field in words, '' where every value of its type will do."""
    m = field.metadata
    words = [("at least", "min"), ("above", "above"), ("at most", "max"), ("below", "below")]
    bounds = " and ".join(f"{word} {m[key]:g}" for word, key in words if m[key] is not None)
    choices = ", ".join(m["choices"] or ())
    return f"{bounds}, or {choices}" if bounds and choices else bounds or choices and f"one of {choices}"


def value_types(field):
    """The types that a field takes: `int | str` gives (int, str), `float` gives (float,)."""
    return typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)


def check_value(field, value):
    """Raise UserError unless `value` has the field's type and lies within its limits."""
    m, kinds = field.metadata, value_types(field)
    accepted = kinds + (int,) if float in kinds else kinds
    right_type = isinstance(value, accepted) and (bool in kinds or not isinstance(value, bool))
    if isinstance(value, str) or not right_type:
        within = right_type and (not m["choices"] or value in m["choices"])
    else:
        bounds = [("min", lambda v, b: v >= b), ("above", lambda v, b: v > b),
                  ("max", lambda v, b: v <= b), ("below", lambda v, b: v < b)]
        # NaN compares false with every bound, so a field with a bound refuses it.
        within = value is None or all(m[key] is None or holds(value, m[key]) for key, holds in bounds)
    if not within:
        names = " or ".join("a whole number" if k is int else "a number" if k is float else
                            "text" if k is str else "yes or no" if k is bool else "nothing" for k in kinds)
        may_be = allowed_values(field) if right_type and allowed_values(field) else names
        raise UserError(f"{field.name} is {value!r}; it must be {may_be}.")


@dataclass(frozen=True)
class Settings:
    """Base of the settings: checked when made, frozen afterwards."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))


@dataclass(frozen=True)
class GPTConfig(Settings):
    """Shape of the network. The defaults are the 12.29 M parameter model."""

    block_size: int = option(256, "context length, in tokens", min=2, max=65536, group="Model")
    vocab_size: int = option(4096, "tokens in the vocabulary; taken from the prepared corpus", min=260, max=65536)
    n_layer: int = option(6, "transformer blocks", min=1, max=256)
    n_head: int = option(6, "attention heads per block; must divide n-embd", min=1, max=256)
    n_embd: int = option(384, "width of the residual stream", min=8, max=16384)
    intermediate_size: int = option(1024, "hidden width of the SwiGLU layer", min=8, max=65536)
    dropout: float = option(0.0, "share of activations dropped in training", min=0.0, below=1.0)
    bias: bool = option(False, "biases in the linear layers")
    position: str = option("learned", "how token order is encoded", choices=("learned", "rotary"))
    qk_norm: bool = option(False, "RMS-normalise queries and keys in each head")

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd is {self.n_embd}; it must be a multiple of n_head ({self.n_head}).")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise UserError(f"n_head is {self.n_head}, so a head is {self.n_embd // self.n_head} wide; "
                            "rotary positions need an even width.")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a run learns, what it may use, and when it reports."""

    data_dir: str = option("data", "folder of the prepared corpus", group="Folders", metavar="FOLDER")
    out_dir: str = option("out", "folder for checkpoints, metrics and the resolved settings", metavar="FOLDER")

    tokens_per_iter: int = option(65536, "tokens per iteration (the learning dial)", min=2, group="Learning")
    max_iters: int = option(30000, "iterations, each one optimizer update", min=1)
    optimizer: str = option("muon", "muon: Muon for the blocks' matrices, AdamW for embeddings and norms",
                            choices=("adamw", "muon"))
    learning_rate: float = option(2e-3, "peak learning rate, where AdamW is alone", above=0, max=10)
    muon_learning_rate: float = option(0.02, "muon: peak learning rate of the matrices", above=0, max=10)
    embedding_learning_rate: float = option(0.01, "muon: peak learning rate of embeddings and norms", above=0, max=10)
    schedule: str = option("wsd", "after the warmup: cosine decay, or constant and then linear decay (wsd)",
                           choices=("cosine", "wsd"))
    min_lr_share: float = option(0.0, "learning rate at the end, as a share of its peak", min=0, max=1)
    warmup_iters: int = option(100, "iterations of linear warmup (at most a tenth of max-iters)", min=0)
    decay_share: float = option(0.4, "wsd: share of the run that decays", min=0, max=1)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", min=0, max=100)
    beta1: float = option(0.9, "AdamW: decay of the gradient's running mean", min=0, below=1)
    beta2: float = option(0.95, "AdamW: decay of the squared gradient's running mean", min=0, below=1)
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip", min=0)
    align_stories: bool = option(False, "start every training window at a story's first token")
    seed: int = option(1337, "seed of weights, data order and dropout", min=0, max=2**63 - 1)

    batch_size: int | str = option(32, "sequences per forward pass (the memory dial: halve it when memory runs "
                                   "out; learning stays the same), or auto", min=1, choices=("auto",),
                                   group="Memory and speed", metavar="N|auto")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", metavar="NAME")
    dtype: str = option("auto", "precision of the matrix products; auto is float16 on CUDA, float32 elsewhere",
                        choices=("auto", "float32", "float16", "bfloat16"))
    compile: str = option("auto", "torch.compile; auto: on CUDA with Triton, when the run is long enough to gain",
                          choices=("auto", "on", "off"))
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass: less memory, slower")

    log_interval: int = option(10, "iterations between two lines of the log", min=1, group="Reports and saving")
    eval_interval: int = option(250, "iterations between two evaluations", min=1)
    eval_tokens: int = option(65536, "validation tokens read at an evaluation; 0 reads all", min=0)
    final_eval_tokens: int = option(0, "the same after the last iteration; 0 reads all", min=0)
    sample_tokens: int = option(200, "length of the story printed at an evaluation; 0 prints none", min=0)
    save_minutes: float = option(10.0, "minutes between two saves, beside those at evaluations", above=0)


@dataclass(frozen=True)
class SampleConfig(Settings):
    """How the next token is chosen."""

    max_new_tokens: int = option(200, "longest continuation, in tokens", min=1, group="Sampling")
    temperature: float = option(0.6, "below 1 is safer, above 1 is wilder; 0 takes the likeliest token",
                                min=0, max=100)
    top_k: int = option(20, "keep the k likeliest tokens; 0 keeps all", min=0)
    top_p: float = option(1.0, "keep the likeliest tokens that together reach this probability", above=0, max=1)
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest", min=0, max=1)
    repetition_penalty: float = option(1.1, "above 1 makes tokens already used less likely; 1 is off", min=1, max=100)
    repetition_window: int = option(64, "how many of the last tokens the penalty looks at", min=1)
    dry_multiplier: float = option(0.0, "above 0 penalises repeating a phrase word for word (DRY)", min=0, max=100)
    dry_base: float = option(1.75, "DRY: growth of the penalty per repeated token", min=1, max=100)
    dry_allowed_length: int = option(3, "DRY: tokens that may repeat freely", min=1)
    seed: int | None = option(None, "repeats exactly the same text; random if not given", min=0, max=2**63 - 1)


@dataclass(frozen=True)
class CorpusConfig(Settings):
    """Which text is prepared, and how."""

    dataset: str = option("roneneldan/TinyStories", "a name on the Hugging Face Hub, a local folder or file "
                          "(parquet, json, jsonl, csv, txt), or sample, the built-in corpus", group="Corpus",
                          metavar="NAME")
    text_field: str = option("text", "the column that holds the text, where there are columns", metavar="NAME")
    vocab_size: int | None = option(None, "tokens in the vocabulary  [default: 4096; 512 for sample]",
                                    min=260, max=65536)
    tokenizer: str | None = option(None, "use this vocabulary (data/tok4096.model) instead of training one, as "
                                   "train.py --init-from needs it", metavar="FILE")
    num_files: int = option(50, "the corpus is cut into 50 equal files; use the first N", min=1, max=50)
    sample_rate: float = option(1.0, "share of the stories of those files to keep", above=0, max=1)
    seed: int = option(1337, "seed of the choice of stories", min=0, max=2**63 - 1)
    data_dir: str = option("data", "folder for the prepared corpus", metavar="FOLDER")


# What each preset changes in GPTConfig and TrainConfig. A flag on the command line wins over its preset.
PRESETS = {
    "rtx3050": {},
    "llama": dict(position="rotary"),
    "demo": dict(block_size=160, n_layer=3, n_head=4, n_embd=128, intermediate_size=256, position="rotary",
                 qk_norm=True, align_stories=True, tokens_per_iter=5120, batch_size=32, max_iters=320,
                 embedding_learning_rate=6e-3, warmup_iters=50, eval_interval=80, eval_tokens=20000),
}


def restore(cls, values, where):
    """Settings of class `cls` from a saved dict. `where` names the file in a UserError: keys not ours, bad values."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: its settings are damaged; it was not written by this program.")
    strange = set(values) - {field.name for field in dataclasses.fields(cls)}
    if strange:
        names = ", ".join(sorted(map(repr, strange)))
        raise UserError(f"{where}: unknown settings {names}; it was written by another version of this program.")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error.message}") from error


KEPT_SPACE = "\x1f"  # a space where click must not end a line of --help


class GroupedCommand(click.Command):
    """A command whose --help has the headings of the settings, and to which a failing disk is the user's situation."""

    def invoke(self, ctx):
        sys.stdout.reconfigure(errors="replace")  # a console that is not UTF-8 shows ? for what it cannot
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly: whoever read our output has enough
                raise
            raise UserError(f"{error.filename or 'the system'}: {error.strerror or error}. Mend that, then run the "
                            "same command again.") from error

    def format_options(self, ctx, formatter):
        sections = {}
        for parameter in self.get_params(ctx):
            row = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if row:
                # A default keeps to one line, and the range that click adds ([x>=1]) says nothing new.
                text = re.sub(r"  \[[\d<=]*x[<>=\d]*\]", "", row[1])
                text = re.sub(r"\[default: [^\]]{1,24}\]", lambda match: match[0].replace(" ", KEPT_SPACE), text)
                sections.setdefault(getattr(parameter, "group", "This command"), []).append((row[0], text))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
        formatter.buffer = [text.replace(KEPT_SPACE, " ") for text in formatter.buffer]


class SettingOption(click.Option):
    """A flag made from a field. Its value is None unless typed, so that a preset can fill it."""

    def __init__(self, field, group):
        kinds = value_types(field)
        flag = "--" + field.name.replace("_", "-")
        if bool in kinds:
            flag, kind = f"{flag}/--no-{flag[2:]}", click.BOOL
        elif str not in kinds:
            kind = click.FLOAT if float in kinds else click.INT
        elif int in kinds:
            kind = IntegerOrWord()
        else:
            kind = click.Choice(field.metadata["choices"]) if field.metadata["choices"] else click.STRING
        value = f"{field.default:g}" if float in kinds else "no" if field.default is False else field.default
        default = "" if value is None else f"  [default: {value}]"
        metavar = field.metadata["metavar"] or ("N" if kind is click.INT else "X" if kind is click.FLOAT else None)
        super().__init__([flag], type=kind, default=None, metavar=metavar, help=field.metadata["help"] + default)
        self.group = group


class IntegerOrWord(click.ParamType):
    """A whole number, or a word that check_value judges."""

    name = "n|auto"

    def convert(self, value, param, ctx):
        try:
            return int(value)
        except ValueError:
            return value


def setting_options(*classes, omit=()):
    """Decorator: a click option for each field of the settings classes, except the names in `omit`."""
    def decorate(function):
        parameters, group = [], None
        for cls in classes:
            for field in dataclasses.fields(cls):
                group = field.metadata["group"] or group
                if field.name not in omit:
                    parameters.append(SettingOption(field, group))
        function.__click_params__ = getattr(function, "__click_params__", []) + parameters[::-1]
        return function
    return decorate


# Underscores are accepted too: --batch_size is what users of nanoGPT type.
COMMAND_LINE = dict(help_option_names=["-h", "--help"], max_content_width=100,
                    token_normalize_func=lambda name: name.replace("_", "-"))


def pick(cls, values):
    """The entries of `values` that are fields of `cls` and were given (are not None)."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None}
