"""Truths about the repository as a whole: what importing does, who imports whom, what the README promises."""

import ast
import importlib
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

# Which of our files each file may import.
ARROWS = {"config": set(), "data": {"config"}, "model": {"config"}, "preprocess": {"config", "data"},
          "train": {"config", "data", "model"}, "chat": {"config", "data", "model"},
          "export": {"config", "data", "model"}, "plot_loss": {"config"},
          "reinforce": {"config", "data", "model", "train"}}
FILES, COMMANDS = sorted(ARROWS), ["chat", "export", "plot_loss", "preprocess", "reinforce", "train"]
LIBRARIES = {"torch", "numpy", "sentencepiece", "datasets", "tqdm", "matplotlib", "click"}
COME_WITH_DATASETS = {"pyarrow", "huggingface_hub"}
OPTIONAL_FOR_EXPORT = {"safetensors", "gguf"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imports(path):
    """(top-level name of the module, whether inside a function) of each import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module.split(".")[0], id(node) in inside


def names(path):
    return {name for name, _ in imports(path)}


# -----------------------------------------------------------------------------
# Imports

def test_these_files_and_no_others_are_the_program():
    assert [path.stem for path in sorted(ROOT.glob("*.py"))] == FILES and not list(ROOT.glob("*/__init__.py"))


def test_importing_any_file_creates_nothing_prints_nothing_and_needs_no_heavy_library(tmp_path):
    heavy = {"datasets", "matplotlib", "transformers", "tensorflow"} | COME_WITH_DATASETS | OPTIONAL_FOR_EXPORT
    program = f"""
import os, sys
sys.modules.update(dict.fromkeys({heavy}))  # importing one of them now fails
sys.path.insert(0, {str(ROOT)!r})
for name in {FILES}:
    for other in {FILES}:
        sys.modules.pop(other, None)
    __import__(name)
    assert not os.listdir(), name
"""
    result = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_the_files_and_libraries_that_the_design_allows(name):
    others = names(ROOT / f"{name}.py") - set(sys.stdlib_module_names) - LIBRARIES
    assert others <= ARROWS[name] | dict(preprocess=COME_WITH_DATASETS, export=OPTIONAL_FOR_EXPORT).get(name, set())


@pytest.mark.parametrize("library, user", [("datasets", "preprocess"), ("matplotlib", "plot_loss")])
def test_a_heavy_library_is_imported_by_one_file_inside_the_function_that_needs_it(library, user):
    places = {(name, inside) for name in FILES for module, inside in imports(ROOT / f"{name}.py") if module == library}
    assert places == {(user, True)}


@pytest.mark.parametrize("name", FILES)
def test_a_file_needs_nothing_that_only_unix_has(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"os\.fork|multiprocessing|[\"']/(tmp|var|dev)/", source)
    unix = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "readline"}
    top = [alias.name for node in ast.parse(source).body if isinstance(node, ast.Import) for alias in node.names]
    assert not unix & set(top), "import it inside try"


# -----------------------------------------------------------------------------
# Commands

def main_of(name):
    return importlib.import_module(name).main


def leaf_commands(command, words=()):
    """(words, command) of a click command, or of each command of a group."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaf_commands(inner, (*words, name))
    else:
        yield words, command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_every_flag_says_what_it_does(name):
    for words, leaf in leaf_commands(main_of(name)):
        result = CliRunner().invoke(main_of(name), [*words, "--help"])
        assert result.exit_code == 0 and leaf.help, f"{name}.py {words} has no help"
        for parameter in leaf.params:
            if isinstance(parameter, click.Option):
                assert parameter.help and parameter.opts[0] in result.output, parameter.opts


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_flag_is_a_usage_error_without_a_traceback(name):
    for words, _ in leaf_commands(main_of(name)):
        result = CliRunner().invoke(main_of(name), [*words, "--no-such-option"])
        assert result.exit_code == 2 and "No such option" in result.output


# -----------------------------------------------------------------------------
# README

FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
THEIRS = {"--index-url", "--extra-index-url", "--upgrade", "--standalone", "--nproc-per-node"}  # pip's and torchrun's


def shell_lines(text):
    """The commands in the fenced blocks of a text, one per line, without prompts."""
    for block in FENCE.findall(text):
        for line in re.split(r"\n|&&|;", block.replace("\\\n", " ").replace("`\n", " ")):
            yield line.strip().removeprefix("$ ").removeprefix("> ")


def our_commands(text):
    """[script name, argument, ...] of each command of ours in a text."""
    for line in shell_lines(text):
        if re.match(r"(\S+=\S+ +)*(python3?|py|torchrun|\S*bin/python|\S*Scripts\\python)\s.*\b\w+\.py\b", line):
            words = shlex.split(line.split(" | ")[0].replace("\\", "/"), comments=True)
            at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if at is not None:
                yield [words[at].removesuffix(".py"), *words[at + 1:]]
        elif re.search(r"\| *python3? \w+\.py", line):
            words = shlex.split(line.rsplit("|", 1)[1], comments=True)
            yield [words[1].removesuffix(".py"), *words[2:]]


def complaint(command, arguments):
    """What click says of arguments that it refuses, else ''. Runs nothing."""
    try:
        while isinstance(command, click.Group):
            context = command.make_context("readme", list(arguments))
            words = [*getattr(context, "_protected_args", []), *context.args]
            _, command, arguments = command.resolve_command(context, words)
        command.make_context("readme", list(arguments))
    except click.exceptions.Exit:  # --help
        pass
    except click.UsageError as error:
        # A file that the reader will have is not here.
        return "" if "does not exist" in error.format_message() else error.format_message()
    return ""


def test_the_check_of_commands_sees_what_is_wrong():
    @click.group()
    def group():
        pass

    @group.command()
    @click.option("--size", type=int)
    def make(size):
        raise AssertionError("it must not run")

    assert complaint(group, ["make", "--size", "3"]) == complaint(group, ["make", "--help"]) == ""
    assert "--sise" in complaint(group, ["make", "--sise", "3"])
    assert "not a valid integer" in complaint(group, ["make", "--size", "x"])
    assert "No such command" in complaint(group, ["build"])
    text = "```\n$ pip install x && python a.py --b 1 \\\n  --c  # why\necho hi | python d.py -e\n```\npython no.py"
    assert list(our_commands(text)) == [["a", "--b", "1", "--c"], ["d", "-e"]]


def test_every_command_in_the_readme_exists_with_its_flags():
    commands = list(our_commands(README))
    assert {"preprocess", "train", "chat", "plot_loss"} <= {name for name, *_ in commands}
    wrong = {shlex.join(words): complaint(main_of(words[0]), words[1:]) for words in commands}
    assert not {line: error for line, error in wrong.items() if error}


def test_every_flag_that_the_readme_mentions_exists():
    ours = {option for name in COMMANDS for _, command in leaf_commands(main_of(name)) for parameter in command.params
            for option in parameter.opts + parameter.secondary_opts} | {"--help"}
    of_tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*/*.py"))
    ours |= set(re.findall(r'(?:option|argument)\("(--[a-z-]+)', of_tests))
    mentioned = {option.replace("_", "-") for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", FENCE.sub("", README))}
    assert mentioned <= ours | THEIRS


def test_the_readme_mentions_every_file_and_none_that_does_not_exist():
    mentioned = set(re.findall(r"(?<![\w/.\-])(?:tests/(?:\w+/)?)?\w+\.py\b", README))
    assert {f"{name}.py" for name in FILES} <= mentioned
    assert not [name for name in mentioned if not (ROOT / name).exists()]


# -----------------------------------------------------------------------------
# Requirements and tracked files

def requirements(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return {re.match(r"[\w-]+", line)[0].lower(): line for line in lines if line and not line.startswith("-r ")}


def test_requirements_are_the_seven_libraries_and_torch_has_a_version():
    needed = requirements("requirements.txt")
    assert set(needed) == LIBRARIES and re.search(r"[=<>~]=?\s*\d", needed["torch"])


def test_what_the_tests_import_is_in_their_requirements():
    needed = set(requirements("requirements.txt")) | set(requirements("tests/requirements.txt"))
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | set(FILES) | set(sys.stdlib_module_names)
    assert set().union(*map(names, (ROOT / "tests").glob("*.py"))) - ours - COME_WITH_DATASETS <= needed


@pytest.fixture(scope="module")
def tracked():
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git clone")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize("forbidden", [
    rb"(?<![\w.:/])/(?:work|root|opt/venv|home/\w+|Users/\w+|mnt/\w+)/\w", rb"[A-Z]:\\Users\\\w", rb"\bTO[D]O\b",
    rb"\bFIX[M]E\b"])
def test_no_file_names_a_folder_of_the_machine_it_was_written_on_or_is_unfinished(tracked, forbidden):
    found = {path.name: match[0] for path in tracked if path.suffix not in (".png", ".svg")
             and (match := re.search(forbidden, path.read_bytes()))}
    assert not found


def test_nothing_that_a_run_makes_is_tracked(tracked):
    assert not [path for path in tracked if path.suffix in (".pt", ".bin", ".model", ".jsonl", ".pyc")
                or {"data", "out"} & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("name", FILES)
def test_lines_of_the_program_have_at_most_120_characters(name):
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert not {number: len(line) for number, line in enumerate(lines, 1) if len(line) > 120}
