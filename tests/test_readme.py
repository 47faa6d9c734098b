"""The README's commands and code, run in order in an empty folder."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import readings
from support import pictures
from tests.conftest import ROOT

SHORT = {  # what is appended to a command of each program
    "train": "--pretrain_steps=3 --sparsify_steps=3 --batch_size=500 --eval_iters=1 --device=cpu",
    "circuits": "--steps=3 --examples=20 --no-sweep",
}
# slow, or of an environment
NOT_HERE = "-m venv|pip install|prepare.py shakespeare|openwebtext|gpt2|bench.py|shakespeare_char|--seeds"


def blocks(language, name="README.md"):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def test_commands_and_code_run_as_written(program, tmp_path, monkeypatch):
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readings, "MOST_PAIRS", 2**14)  # 16 examples: after three steps all edges are open,
    monkeypatch.setattr(readings, "effect_of", lambda *_: None)  # and forcing each would take a minute
    done = []
    for command in (line for block in blocks("sh") for line in block.splitlines()):
        if not command.startswith("python ") or re.search(NOT_HERE, command):
            continue
        _, path, *argv = shlex.split(command)
        if path == "-c":
            subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
            continue
        name = path.removesuffix(".py").replace("/", ".")
        with monkeypatch.context() as patch:
            if name == "train":  # pictures take longer than all the rest
                patch.setattr(pictures, "save", lambda figure, path: path)
            code, out, err = program(importlib.import_module(name).main, *argv, *SHORT.get(name, "").split())
        assert code == 0, f"{command}\n{out}\n{err}"
        done.append(name)
        assert name != "circuits" or "edges dense / sparse" in out
    assert len(done) >= 8 and {"train", "circuits", "sample", "data.prepare"} <= set(done), done
    for name in ("docs/readings.md", "docs/circuits.md"):
        for code in blocks("python", name):
            exec(code.replace("steps=100", "steps=3, sweep=False"), {})


TEXTS = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", TEXTS)
def test_pictures_and_files_that_a_text_links_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert all(((ROOT / name).parent / link).exists() for link in links), links


@pytest.mark.slow
def test_a_wrong_command_line_ends_in_one_sentence_without_a_traceback():
    result = subprocess.run([sys.executable, "train.py", "adition"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_other_libraries_can_be_imported_from_here():
    """No module at the top has the name of a package that others import by chance, such as `kernels`."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    program = "import sys; sys.modules['triton'] = None; from transformers import GPT2LMHeadModel"
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300, env=environment)
