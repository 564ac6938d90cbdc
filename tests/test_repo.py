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

# Which of our files each file may import. A script that is not here may import the three that are shared.
SHARED = {"config", "model", "preprocess"}
ARROWS = dict(config=set(), model={"config"}, preprocess={"config"}, train=SHARED, chat=SHARED, plot_loss={"config"})
LIBRARIES = {"torch", "numpy", "sentencepiece", "datasets", "tqdm", "matplotlib", "click"}
COME_WITH_DATASETS = {"pyarrow", "fsspec", "huggingface_hub"}
OPTIONAL_FOR_EXPORT = {"safetensors", "gguf"}

FILES = sorted(path.stem for path in ROOT.glob("*.py"))
COMMANDS = [name for name in FILES if name not in ("config", "model")]


def need(name):
    """The path of a file of the repository; the test is skipped where it is not written yet."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"there is no {name} yet")
    return path


def imports(path):
    """(top-level name of the module, whether inside a function) for each import of a file."""
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


# Imports

@pytest.mark.parametrize("name", sorted({*FILES, *ARROWS}))
def test_importing_a_file_creates_nothing_prints_nothing_and_needs_no_heavy_library(name, tmp_path):
    need(f"{name}.py")
    program = f"""
import sys
for heavy in {sorted({"datasets", "matplotlib", "transformers", "tensorflow"} | COME_WITH_DATASETS | OPTIONAL_FOR_EXPORT)}:
    sys.modules[heavy] = None  # importing it now fails
sys.path.insert(0, {str(ROOT)!r})
import {name}
"""
    result = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted({*FILES, *ARROWS}))
def test_a_file_imports_only_the_files_of_ours_that_the_design_allows(name):
    ours = names(need(f"{name}.py")) & set(FILES)
    assert ours <= ARROWS.get(name, SHARED)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_the_seven_libraries(name):
    others = names(ROOT / f"{name}.py") - set(FILES) - set(sys.stdlib_module_names) - LIBRARIES
    assert others <= {"preprocess": COME_WITH_DATASETS, "export": OPTIONAL_FOR_EXPORT}.get(name, set())


@pytest.mark.parametrize("library, user", [("datasets", "preprocess"), ("matplotlib", "plot_loss")])
def test_a_heavy_library_is_imported_by_one_file_inside_the_function_that_needs_it(library, user):
    need(f"{user}.py")
    places = {(name, inside) for name in FILES for module, inside in imports(ROOT / f"{name}.py") if module == library}
    assert places == {(user, True)}


def test_there_is_no_package_and_no_drawer_of_odds_and_ends():
    assert not list(ROOT.glob("*/__init__.py")) and not {"utils", "helpers", "common", "misc"} & set(FILES)


# Commands

def main_of(name):
    need(f"{name}.py")
    return importlib.import_module(name).main


def leaves(command, path):
    """(words, command) of a click command, or of each command of a group."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaves(inner, [*path, name])
    else:
        yield path, command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_every_option_says_what_it_does(name):
    command = main_of(name)
    for words, leaf in leaves(command, []):
        result = CliRunner().invoke(command, [*words, "--help"])
        assert result.exit_code == 0 and leaf.help, f"{name}.py {words} has no help"
        for parameter in leaf.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name}.py {words} {parameter.opts} has no help"
                assert parameter.opts[0] in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_a_usage_error_without_a_traceback(name):
    command = main_of(name)
    for words, _ in leaves(command, []):
        result = CliRunner().invoke(command, [*words, "--no-such-option"])
        assert result.exit_code == 2 and "No such option" in result.output


# README

FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def shell_lines(text):
    """The commands in the fenced blocks of a text, one a line, without prompts and comments."""
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
            _, command, arguments = command.resolve_command(context, [*getattr(context, "_protected_args", []), *context.args])
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


def test_every_command_in_the_readme_exists_with_its_options():
    commands = list(our_commands(need("README.md").read_text(encoding="utf-8")))
    assert {"preprocess", "train", "chat", "plot_loss"} <= {name for name, *_ in commands}
    wrong = {shlex.join(words): complaint(main_of(words[0]), words[1:]) for words in commands}
    assert not {line: error for line, error in wrong.items() if error}


def test_every_option_that_the_readme_mentions_exists():
    text = FENCE.sub("", need("README.md").read_text(encoding="utf-8"))
    theirs = {"--index-url", "--extra-index-url", "--upgrade", "--standalone", "--nproc-per-node"}
    ours = {option for name in COMMANDS for _, command in leaves(main_of(name), []) for parameter in command.params
            for option in parameter.opts + parameter.secondary_opts} | {"--help"}
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*/*.py"))
    ours |= set(re.findall(r'(?:option|argument)\("(--[a-z-]+)', benchmarks))
    mentioned = {option.replace("_", "-") for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert mentioned <= ours | theirs


def test_every_file_that_the_readme_mentions_exists():
    text = need("README.md").read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w/.\-])(?:tests/)?\w+\.py\b", text))
    assert {f"{name}.py" for name in FILES} <= mentioned, "every script has its clause"
    assert not [name for name in mentioned if not (ROOT / name).exists()]


# Requirements and tracked files

def requirements(path):
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {re.match(r"[\w-]+", line)[0].lower(): line for line in lines if line and not line.startswith("-r ")}


def test_requirements_are_the_seven_libraries_and_torch_has_a_version():
    needed = requirements(need("requirements.txt"))
    assert set(needed) == LIBRARIES
    assert re.search(r"[=<>~]=?\s*\d", needed["torch"])


def test_what_the_tests_import_is_in_their_requirements():
    needed = set(requirements(need("requirements.txt"))) | set(requirements(need("tests/requirements.txt")))
    tests = list((ROOT / "tests").glob("*.py"))
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | set(FILES) | set(sys.stdlib_module_names)
    assert set().union(*map(names, tests)) - ours - COME_WITH_DATASETS <= needed


def tracked_files():
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git clone")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).exists()]


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    machine = re.compile(rb"(?<![\w.:/])/(?:work|root|opt/venv|home/\w+|Users/\w+|mnt/\w+)/\w|[A-Z]:\\Users\\\w")
    found = {path.name: match[0] for path in tracked_files() if (match := machine.search(path.read_bytes()))}
    assert not found


def test_nothing_that_a_run_makes_is_tracked():
    assert not [path for path in tracked_files() if path.suffix in (".pt", ".bin", ".model", ".jsonl", ".pyc")
                or {"data", "out"} & set(path.relative_to(ROOT).parts)]
