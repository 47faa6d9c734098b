"""The README's commands and code, run in order in a copy of the project."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SHORT = {  # what is appended to a command of each program
    "train.py": "--pretrain_steps=3 --sparsify_steps=3 --batch_size=250 --eval_iters=1 --device=cpu",
    "circuits.py": "--steps=3 --examples=20 --no-curve --no-sweep",
}


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("python ")]


def quick(command):
    """Whether it takes seconds, needs no network and no GPU."""
    return not any(
        word in command
        for word in (
            "pip install",
            "prepare.py shakespeare",
            "prepare.py openwebtext",
            "gpt2",
            "bench.py",
            "shakespeare_char_gpu",
            "train.py shakespeare_char\n",
        )
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "README.md", ROOT / "LICENSE"):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


def run(project, command):
    command = re.sub("^python ", f"{shlex.quote(sys.executable)} ", command)
    result = subprocess.run(command, shell=True, cwd=project, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_commands_and_code_run_as_written(project):
    done = []
    for command in commands():
        if not quick(command + "\n"):
            continue
        output = run(project, " ".join([command, *(short for program, short in SHORT.items() if program in command)]))
        done.append(command)
        if "--plot=" in command:
            assert (project / "out/attention.png").is_file() and (project / "out/arcs.png").is_file()
        if "circuits.py" in command:
            assert "edges dense / sparse" in output
        if "--eval_only" in command:
            assert "hard edges" in output
    assert len(done) >= 9, f"the README lost its commands: {done}"
    whole = [code for code in blocks("python") if "import " in code and '"gpt2"' not in code]
    printed = [run(project, f"python -c {shlex.quote(code.replace('steps=100', 'steps=3, sweep=False'))}") for code in whole]
    assert "'logits')" in printed[0] and "tensor" in printed[1] and len(printed) == 2, printed


def test_pictures_and_files_that_it_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 8 and all((ROOT / link).exists() for link in links), links
    assert "@@" not in text


def test_a_wrong_command_line_ends_in_one_sentence_without_a_traceback(project):
    for command in ("train.py adition", "sample.py nothing.pt", "data/prepare.py text --name=x nothing.txt"):
        result = subprocess.run([sys.executable, *command.split()], cwd=project, capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
