"""Tar files at URLs, through fsspec: listing them, their versions, and reading from them."""

import errno
import glob
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from cae_fast.config import UserError
from cae_fast.data.patience import patiently

# fsspec knows more, some of which run code or programs that a URL names, or read another URL.
PROTOCOLS = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "Last-Modified")

Result = TypeVar("Result")


def is_url(name: str) -> bool:
    return "://" in name


class _RawFile(io.RawIOBase):
    """A file at a URL whose errors are OSErrors."""

    def __init__(self, url: str) -> None:
        files, path = _filesystem(url)
        self.file = _remotely(lambda: files.open(path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = _remotely(lambda: self.file.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return _remotely(lambda: self.file.seek(offset, whence))

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def open_url(url: str) -> IO[bytes]:
    """A file at a URL to scan, seekable. Raises OSError, as its methods do."""
    return io.BufferedReader(_RawFile(url))


def read_url(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on. Raises OSError, also where there is nothing at the URL any more."""
    files, path = _filesystem(url)
    try:
        return _remotely(lambda: files.cat_file(path, start=offset, end=offset + size))
    except FileNotFoundError as error:
        raise OSError(errno.EIO, f"FileNotFoundError: {url}") from error  # never the fault of a single image


def url_states(urls: Sequence[str], pool: ThreadPoolExecutor) -> list[str]:
    """Of each, its size and what the server says of its version. Raises UserError where it does not answer."""
    for folder in {url.rpartition("/")[0] for url in urls if not url.startswith("http")}:
        files, path = _filesystem(folder)
        files.invalidate_cache()
        try:
            files.ls(path)  # file systems that keep listings answer the questions below from this one
        except Exception:  # then each file is asked for
            continue
    return list(pool.map(_url_state, urls))


def _url_state(url: str) -> str:
    files, path = _filesystem(url)
    try:
        info = patiently(url, lambda: _remotely(lambda: files.info(path)))
    except FileNotFoundError:
        return "missing"
    return f"{info.get('size')} {next((info[key] for key in VERSIONS if info.get(key)), '')}"


def list_tars(url: str) -> list[str]:
    """The tar files that a URL, a glob of URLs or a folder's URL names. Raises UserError where there are none."""
    files, path = _filesystem(url)
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    try:
        names = files.glob(path if glob.has_magic(path) else f"{path.rstrip('/')}/*.tar")
    except Exception as error:  # every file system has its own errors
        raise UserError(f"{url}: cannot be listed: {' '.join(str(error).split())}") from error
    if not names:
        raise UserError(f"{url}: there is no such tar file")
    return [files.unstrip_protocol(name) for name in sorted(names)]


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path on it; fsspec keeps one for each process."""
    protocol = url.partition("://")[0]
    if "::" in url or protocol not in PROTOCOLS:
        raise UserError(f"{url}: tar files are read from URLs of {', '.join(PROTOCOLS)}, one at a time (no `::`)")
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # fsspec or the package for this protocol is missing
        raise UserError(f"{url}: URLs are read with fsspec and its package for this protocol: {error}") from error


def _remotely(function: Callable[[], Result]) -> Result:
    """function(), whatever it raises as an OSError: every file system has its own errors."""
    try:
        return function()
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
