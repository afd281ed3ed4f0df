"""What `pip install` leaves: a wheel that is the checkout in one folder, imports, and the scripts under one name."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT, TIMEOUT

import plain_rlhf

ROOMS = ("data", "evaluation", "model", "presets", "rewards", "rlhf")


def run(*command, **kwargs) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT, **kwargs)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[dev]'")
    place = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", f"--wheel-dir={place}")
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    return next(place.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_is_the_checkout_in_one_folder(wheel):
    if not (ROOT / ".git").exists():
        pytest.skip("no git to ask which files are ours")
    tracked = run("git", "ls-files", *ROOMS, "*.py", cwd=ROOT).split()
    ours = {f"plain_rlhf/{name}" for name in tracked if "/" not in name or name.startswith(ROOMS)}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == ours | {"plain_rlhf.pth"}
    assert {"plain_rlhf/train_ppo.py", "plain_rlhf/presets/demo.toml", "plain_rlhf/rlhf/py.typed"} <= names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, and this one's packages behind it."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    run(
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        f"--python={home}/bin/python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    )
    packages = run(home / "bin/python", "-c", "import site; print(site.getsitepackages()[0])").strip()
    others = [path for path in sys.path if path.endswith("-packages")]
    (Path(packages) / "others.pth").write_text("\n".join(others) + "\n")
    return home / "bin"


def environment(**changes: str) -> dict[str, str]:
    return {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | changes


@pytest.mark.slow
def test_an_installed_wheel_imports_and_trains_from_an_empty_directory(world, installed, tmp_path):
    modules = "rlhf.ppo.update rlhf.serve.api model.generate data.loader rewards.verify train_ppo".split()
    code = f"import {', '.join(modules)}\nassert rlhf.infra.option_files.presets()\nprint(rlhf.__file__, train_ppo.__file__)"
    for path in run(installed / "python", "-c", code, cwd=tmp_path, env=environment()).split():
        assert path.startswith(str(installed.parent)), path
    (tmp_path / "model.py").write_text("mine = 1")  # a name of ours in somebody's directory
    assert run(installed / "python", "-c", "import model; print(model.mine)", cwd=tmp_path, env=environment()) == "1\n"

    command, at = installed / "plain-rlhf", {"cwd": tmp_path, "env": environment(CUDA_VISIBLE_DEVICES="")}
    options = world.command("train_lm.py", data=world.path / "data", epochs=0.2, out="lm")[1:]
    run(command, "lm", *options, **at)
    assert run(
        installed / "python", "-m", "plain_rlhf", "sample", "--checkpoint=lm", "--prompt=the film", "--tokens=4", **at
    ).strip()


def test_every_script_and_room_that_runs_has_its_command():
    targets = {target for target, _ in plain_rlhf.PROGRAMS.values()}
    scripts = {file.name for file in ROOT.glob("*.py") if "config.run(" in file.read_text()}
    rooms = {f"rlhf.{file.parent.name}" for file in (ROOT / "rlhf").glob("*/__main__.py")}
    assert targets == scripts | rooms | {"data.prepare"}


def test_a_command_that_is_none_is_one_line(monkeypatch, capsys):
    for words, message in ((["pppo"], "did you mean ppo?"), (["?"], "there are prepare, lm, ")):
        monkeypatch.setattr(sys, "argv", ["plain-rlhf", *words])
        with pytest.raises(SystemExit) as end:
            plain_rlhf.main()
        said = capsys.readouterr().err
        assert end.value.code == 2 and message in said and said.count("\n") == 1
    for words in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["plain-rlhf", *words])
        plain_rlhf.main()
        assert all(f"  {name} " in capsys.readouterr().out for name in list(plain_rlhf.PROGRAMS)[:1])
