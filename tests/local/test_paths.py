"""Paths that lead nowhere, wherever a user may write one: one sentence, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commandline import run

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.paths import expanded, resolved


def test_paths_that_lead_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("there")
    assert resolved(expanded("~/link/../there/x")) == tmp_path.resolve() / "there" / "x"
    assert resolved(Path("/no/such")) == Path("/no/such")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf:~nosuchuser/x", "~nosuchuser/x: ~nosuchuser is not a user with a home folder here"),
        ("gguf:~nosuchuser/x", "~nosuchuser/x: ~nosuchuser is not a user with a home folder here"),
        ("hf:a\0b", r"'a\x00b' contains a null byte"),
        ("gguf:a\0b", r"'a\x00b' contains a null byte"),
        ("hf:loop", "a symbolic link there points back to itself"),
        ("gguf:loop", "a symbolic link there points back to itself"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("command", ["build r.yaml --out o --cache-dir c", "build r.yaml --out o --dry-run"])
def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: str, source: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": {"source": source}}))
    refused(capsys, command, says)
    assert not Path("o").exists()


@pytest.mark.parametrize("place", ["~nosuchuser/x", "a\0b"], ids=ascii)
@pytest.mark.parametrize("kind", ["dir", "file"])
def test_corpora(tmp_path: Path, cache, kind: str, place: str) -> None:
    from pdtrim_deploy.evaluation.corpora import load

    with pytest.raises(UserError, match=r"not a user with a home|contains a null byte"):
        load(f"{kind}:{place}", cache)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("doctor home.yaml", "~nosuchuser is not a user"),
        ("plan home.yaml", "~nosuchuser is not a user"),
        ("plan ~nosuchuser/x", "~nosuchuser is not a user"),
        ("recipe validate loop", "a symbolic link there points back to itself"),
        ("plan loop.yaml", "a symbolic link there points back to itself"),
        ("doctor loop", "a symbolic link there points back to itself"),
        ("build loop --out o", "a symbolic link there points back to itself"),
        ("build dense.yaml --out loop --cache-dir c", "loop is not a folder; choose another --out"),
        ("build dense.yaml --out loop/x --cache-dir c", "Too many levels of symbolic links; fix that"),
        ("build dense.yaml --out loop --dry-run --cache-dir c", "Too many levels of symbolic links; fix that"),
        ("build dense.yaml --out o --cache-dir loop/x", "cannot fill the cache loop/x (Too many levels of symbolic"),
    ],
    ids=lambda value: value.replace("/", " "),
)
def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, tiny_llama_dir: Path, command: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for link in ("loop", "loop.yaml"):
        Path(link).symlink_to(link)
    for name, source in (("home", "hf:~nosuchuser/x"), ("dense", f"hf:{tiny_llama_dir}")):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "model": {"source": source}}))
    refused(capsys, command, says)
    assert not Path("o").exists()


def refused(capsys, command: str, says: str) -> None:
    code, _, err = run(capsys, *command.split())
    assert code == 2, err
    last = err.splitlines()[-1]
    assert says in last
    assert last.startswith("pdtrim-deploy: ")
