"""Which shards? Patterns expanded, one short unique name for each, and the way back from a URL to a name."""

from __future__ import annotations

import glob
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import PurePosixPath
from urllib.parse import unquote

import braceexpand

from adq_wds.errors import PlanError, shorten

MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})[.}]")
_LIKE_SCP = re.compile(r"[^/]*@[^/]*:")
_IMAGE_NAME = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE)
_TAR_IN_COMMAND = re.compile(r"[^/\s'\"|<>?#&=:@]+\.(?:tar|tgz)[.\w]*")


def expand_urls(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, commands: bool = False
) -> list[str]:
    """The shards that a pattern, or several, stand for, in the order written.

    Braces (``train-{000000..000146}.tar``) and ``::`` are read as WebDataset reads them; ``*`` and ``?`` match
    local files, sorted; a folder means the ``*.tar`` files in it, sorted; ``file:`` URLs become paths. A command
    (``pipe:``) is refused, unless `commands` lets it pass.

    Raises:
        ValueError: nothing is named, a local pattern matches nothing, a shard is named twice, or is a command.

    >>> expand_urls("a-{000..002}.tar::b.tar")
    ['a-000.tar', 'a-001.tar', 'a-002.tar', 'b.tar']
    """
    patterns = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    found: list[str] = []
    for pattern in patterns:
        for part in os.fspath(pattern).split("::"):
            found.extend(_expand_one(part))
    for url in found:
        if is_pipe(url) and not commands:
            raise ValueError(
                f"shard {shown_url(url)} is a command, and running it is refused: fetch its output first, or say "
                "ShardDataset(allow_pipe=True)"
            )
    if not found:
        raise ValueError("no shards given; name tar files, a pattern in quotes, or a folder")
    twice = [url for url, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(
            f"shard {shown_url(twice[0])} is listed {found.count(twice[0])} times; name each shard once"
        )
    return found


def _expand_one(part: str) -> list[str]:
    if os.path.exists(part) and not os.path.isdir(part):
        return [part]  # a file whose own name has braces or stars
    many = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(part))
    if many > MAX_SHARDS:  # counted first: the ranges would be written out in memory
        raise ValueError(f"shards {shown_url(part)}: {many:,} shards, at most {MAX_SHARDS:,}")
    try:
        names = list(islice(braceexpand.braceexpand(part), MAX_SHARDS)) if part else []
    except ValueError:  # its text quotes the pattern
        raise ValueError(f"shards {shown_url(part)}: braces that do not match") from None
    found = []
    for name in names:
        if is_url(name):
            found.append(_without_file_scheme(name))
        elif os.path.isdir(name):
            found.extend(_matches(os.path.join(glob.escape(name), "*.tar"), f"{name}/*.tar", folder=name))
        elif any(c in name for c in "*?[") and not os.path.exists(name):
            found.extend(_matches(name, name))
        else:
            found.append(name)
    return found


def _matches(pattern: str, shown: str, *, folder: str | None = None) -> list[str]:
    names = sorted(glob.glob(pattern))
    if not names:
        remedy = ""
        if folder is not None and _holds_images(folder):
            packed = f"adq pack {shlex.quote(folder)} -o shards/%06d.tar"
            remedy = f"; the folder holds image files: `{packed}` makes shards of them"
        raise ValueError(f"no shards match {shorten(shown)}{remedy}")
    return names


def _holds_images(folder: str) -> bool:
    """Whether an image file is among the first files below a folder, by extension."""
    paths = (name for _, _, names in os.walk(folder) for name in names)
    return any(_IMAGE_NAME.search(name) for name in islice(paths, 1000))


def _without_file_scheme(url: str) -> str:
    if not url.lower().startswith("file://"):
        return url
    host, slash, path = url[7:].partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"shard {shown_url(url)}: a file: URL of another machine; expected file:///PATH")
    return unquote("/" + path)


def is_pipe(url: str) -> bool:
    """Whether it is a command whose output is the shard."""
    return url.lstrip().lower().startswith("pipe:")


def is_url(url: str) -> bool:
    """Whether it is not a path of a local file: a URL or a command.

    >>> [is_url(url) for url in ("s3://bucket/a.tar", "pipe:cat a.tar", "data/a.tar")]
    [True, True, False]
    """
    return "://" in url or is_pipe(url)


def shown_url(url: str) -> str:
    """What may be said of a shard: a path as it is; of a URL the file's name, for all else may hold a secret.

    >>> shown_url("https://user:s3cret@host/data/a.tar?token=s3cret"), shown_url("s3cret@host://a.tar")
    ("'a.tar'", 'a URL')
    """
    if not is_url(url):
        return "a URL" if _LIKE_SCP.match(url) else shorten(url)
    folder, slash, name = path_of(url).rpartition("/")
    if is_pipe(url):
        return f"'pipe:' … {shorten(name)}"
    return shorten(name) if slash and folder and not set(name) & set("@:?#") else "a URL"


def without_secrets(url: str) -> str:
    """A URL without user, password, query and fragment; a command's name only; a path as it is.

    >>> without_secrets("https://user:s3cret@host/data/a.tar?token=s3cret")
    'https://host/data/a.tar'
    """
    if is_pipe(url):
        return "pipe:"
    scheme, separator, _ = url.partition("://")
    return f"{scheme}://{path_of(url)}" if separator else url


def path_of(url: str) -> str:
    """The path in a URL with its host: no scheme, user, query or fragment, no ``pipe:`` command before it.

    >>> path_of("https://me:s3cret@host/data/train-000001.tar?token=s3cret")
    'host/data/train-000001.tar'
    >>> path_of("pipe:curl -s http://host/a.tar")
    'a.tar'
    """
    if is_pipe(url):
        names = _TAR_IN_COMMAND.findall(url)  # a command may hold secrets: nothing else of it is passed on
        return names[-1] if names else "pipe"
    scheme, separator, rest = url.partition("://")
    if not separator:
        return scheme
    host, slash, path = rest.split("?", 1)[0].split("#", 1)[0].partition("/")
    return host.rpartition("@")[2] + slash + path


def base_name(shard: str) -> str:
    """The file's name, which draws use: moving the data, or adding a folder to the name, changes no draw."""
    return PurePosixPath(path_of(shard)).name


def shard_names(urls: Sequence[str]) -> list[str]:
    """A name for each shard: the file's name, with as much of its folder as makes it unique.

    Raises:
        ValueError: two of the URLs are the same file.

    >>> shard_names(["/data/a/train.tar", "/data/b/train.tar", "/data/b/val.tar"])
    ['a/train.tar', 'b/train.tar', 'val.tar']
    """
    paths = [path_of(url if is_url(url) else os.path.abspath(url)) for url in urls]
    parts = [[p for p in path.replace(os.sep, "/").split("/") if p not in ("", ".")] for path in paths]
    depth = [1] * len(urls)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        groups = Counter(names)
        same = [i for i, name in enumerate(names) if groups[name] > 1]
        if not same:
            return names
        stuck = [i for i in same if depth[i] >= len(parts[i])]
        if len(stuck) > 1:
            raise ValueError(f"shard {shown_url(urls[stuck[0]])} is listed twice; name each shard once")
        for i in same:
            depth[i] = min(depth[i] + 1, len(parts[i]))


class ShardNames:
    """The way back from a sample's `__url__` to the shard's name in a plan.

    A URL belongs to the name that shares its longest path suffix, so data may move as a whole. A tie is an
    error, and `root` settles it: then the name is the path below `root`.
    """

    def __init__(self, names: Iterable[str], *, root: str | None = None) -> None:
        self._by_base: dict[str, list[str]] = {}
        for name in names:
            self._by_base.setdefault(name.rsplit("/", 1)[-1], []).append(name)
        self._root = root

    def find(self, url: str) -> str:
        """The name for `url`.

        Raises:
            PlanError: no name fits, or several fit equally well.
        """
        path = path_of(url).replace(os.sep, "/")
        known = self._by_base.get(path.rsplit("/", 1)[-1], [])
        if self._root is not None:
            below = path.removeprefix(path_of(self._root).rstrip("/") + "/")
            if below in known:
                return below
            raise PlanError(f"shard {shorten(below)} below root {shorten(self._root)} is not in the plan")
        if len(known) == 1:
            return known[0]
        if not known:
            raise PlanError(
                f"shard {shorten(base_name(url))} is not in the plan; plan again with it, or leave it out"
            )
        shared = [_shared_suffix(name.split("/"), path.split("/")) for name in known]
        best = max(shared)
        if shared.count(best) > 1:
            fits = [name for name, n in zip(known, shared, strict=True) if n == best]
            raise PlanError(f"shard {shorten(path)} may be {fits[0]!r} or {fits[1]!r}; say which with root=")
        return known[shared.index(best)]


def _shared_suffix(a: list[str], b: list[str]) -> int:
    shared = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        shared += 1
    return shared


def check_shard_name(name: object) -> str:
    """`name`, if it is a plain relative file name: a plan comes from a stranger and must not name more.

    Raises:
        PlanError: empty, absolute, ``..``, a scheme, a command, or a character that a shell or a pattern reads.

    >>> check_shard_name("train/a-000001.tar")
    'train/a-000001.tar'
    """
    if not isinstance(name, str) or not name:
        raise PlanError(f"shard name {shorten(name)} is not a name")
    parts = name.split("/")
    hostile = set(name) & set("{}[]*?$|`<>\\:;&\"'!")
    if hostile or not name.isprintable() or name != name.strip() or name[0] in "-~":
        raise PlanError(f"shard name {shorten(name)} is refused: it is not a plain file name")
    if any(part in ("", ".", "..") for part in parts):
        raise PlanError(f"shard name {shorten(name)} is refused: it must be a relative path without '..'")
    return name
