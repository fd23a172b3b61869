"""Who we are and where the API server is, by a kubeconfig file (kubectl's): for development."""

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from redirector.apiserver.client import Access
from redirector.errors import InputError

#: Ways to log in that would run programs or speak to somebody else.
_FOREIGN = ("exec", "auth-provider", "username", "password", "as")


def from_file(path: Path) -> Access:
    """Return the access of the file's current context. InputError names the field."""
    try:
        with path.open("rb") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"kubeconfig {path}: {error.strerror}; name one that exists") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"kubeconfig {path}: is not YAML: {' '.join(str(error).split())}"
        ) from error
    return _Reader(path).access(content)


class _Reader:
    """One file; its relative paths are relative to where it lies."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def access(self, content: object) -> Access:
        root = self._mapping(content, "")
        context = self._named(root, "contexts", "context", self._text(root, "current-context", ""))
        cluster = self._named(
            root, "clusters", "cluster", self._text(context, "cluster", "context")
        )
        user = self._named(root, "users", "user", self._text(context, "user", "context"))
        url = self._text(cluster, "server", "cluster").rstrip("/")
        if not url.startswith(("https://", "http://")):
            raise self._wrong(
                "cluster.server", f"{url!r} is not a URL such as https://10.0.0.1:6443"
            )
        if cluster.get("insecure-skip-tls-verify"):
            raise self._wrong(
                "cluster.insecure-skip-tls-verify",
                "nobody is trusted unseen; give certificate-authority",
            )
        for name in _FOREIGN:
            if user.get(name):
                raise self._wrong(
                    f"user.{name}", "is not supported; give a token or a client certificate"
                )
        return Access(
            url,
            self._file(user, "user", "tokenFile") or self._token(user),
            self._file(cluster, "cluster", "certificate-authority"),
            self._file(user, "user", "client-certificate"),
            self._file(user, "user", "client-key"),
        )

    def _named(
        self, root: Mapping[str, Any], several: str, one: str, name: str
    ) -> Mapping[str, Any]:
        entries = root.get(several)
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name") == name:
                return self._mapping(entry.get(one), one)
        raise self._wrong(several, f"has no {name!r}")

    def _mapping(self, value: object, field: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(field or "it", "must be a mapping")
        return value

    def _text(self, value: Mapping[str, Any], name: str, field: str) -> str:
        found = value.get(name)
        if not isinstance(found, str) or not found:
            raise self._wrong(f"{field}.{name}".lstrip("."), "is missing")
        return found

    def _file(self, value: Mapping[str, Any], field: str, name: str) -> Path | None:
        """A file that is named, or whose content stands in the field with -data."""
        data = value.get(f"{name}-data")
        if data:
            try:
                return _held(base64.b64decode(str(data), validate=True))
            except binascii.Error as error:
                raise self._wrong(f"{field}.{name}-data", f"is not base64: {error}") from error
        found = value.get(name)
        return self._path.parent / str(found) if found else None

    @staticmethod
    def _token(user: Mapping[str, Any]) -> Path | None:
        token = user.get("token")
        return _held(str(token).encode()) if token else None

    def _wrong(self, field: str, message: str) -> InputError:
        return InputError(f"kubeconfig {self._path}: {field}: {message}")


def _held(content: bytes) -> Path:
    """A file in memory that lives as long as the process: keys are not written to a disk."""
    number = os.memfd_create("kubeconfig")
    os.write(number, content)
    return Path(f"/proc/self/fd/{number}")
