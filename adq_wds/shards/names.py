"""Expands patterns into shards, gives each a short unique name, and maps URLs to these names."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote

import braceexpand

from adq_wds.errors import PlanError, printable, shorten
from adq_wds.shards.braces import count_braces
from adq_wds.shards.folders import TARS, shards_in

MAX_SHARDS = 1_000_000
_URL_PATTERN = re.compile(r"\*|\[[^]/]{2,}\]")  # train[1].tar may be a name
_QUERY_PATTERN = re.compile(r"[?\d_-]*\.(?:tar|tgz)(?:\.\w+)*")  # what follows the first ? of t-00?.tar
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_LIKE_SCP = re.compile(r"[^/]*@[^/]*:")
_ORDINARY = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*", re.ASCII)  # a part of letters, digits and _ . - between
_TAR_IN_COMMAND = re.compile(r"[^/\s'\"|<>?#&=:@]+\.(?:tar|tgz)[.\w]*")


def expand_urls(
    urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, commands: bool = False
) -> list[str]:
    """The shards of one or more patterns, in the order written.

    Braces (``train-{000000..000146}.tar``) and ``::`` are read as WebDataset reads them; ``*`` and ``?`` match
    local files, sorted; a folder means the ``.tar``, ``.tar.gz`` and ``.tgz`` files in it, sorted, and a warning says
    which other files in it look like data; ``file:`` URLs become paths. A command (``pipe:``) is refused unless
    `commands` is True.

    Raises:
        ValueError: nothing is named, a local pattern or folder has no shards, a URL is a folder or has ``*``, a shard
            is named twice, or is a command.

    >>> expand_urls("a-{000..002}.tar::b.tar")
    ['a-000.tar', 'a-001.tar', 'a-002.tar', 'b.tar']
    """
    patterns = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    shards: list[str] = []
    for pattern in patterns:
        for part in os.fspath(pattern).split("::"):
            shards.extend(_expand_one(part))
    for url in shards:
        if is_pipe(url) and not commands:
            raise ValueError(
                f"shard {shown_url(url)} is a command, and running it is refused: fetch its output first, or say "
                "ShardDataset(allow_pipe=True)"
            )
    if not shards:
        raise ValueError("no shards given; name tar files, a pattern in quotes, or a folder")
    twice = [url for url, count in Counter(shards).items() if count > 1]
    if twice:
        raise ValueError(
            f"shard {shown_url(twice[0])} is listed {shards.count(twice[0])} times; name each shard once"
        )
    return shards


def _expand_one(part: str) -> list[str]:
    if os.path.isdir(part):
        return shards_in(part)
    if os.path.exists(part):
        return [part]  # a file whose own name has braces or stars
    try:
        many = count_braces(part)  # first: ranges would be written out in memory
        names = braceexpand.braceexpand(part) if part and many <= MAX_SHARDS else iter(())
    except ValueError:  # its text quotes the pattern, which may hold a secret
        raise ValueError(f"shards {shown_url(part)}: braces that do not match") from None
    except RecursionError:
        raise ValueError(f"shards {shown_url(part)}: too many braces within braces") from None
    if many > MAX_SHARDS:
        raise ValueError(f"shards {shown_url(part)}: {many:,} shards, at most {MAX_SHARDS:,}")
    shards = []
    for name in names:
        if is_url(name):
            _refuse_url_pattern(name)
            shards.append(_without_file_scheme(name))
        elif os.path.isdir(name):
            shards.extend(shards_in(name))
        elif any(c in name for c in "*?[") and not os.path.exists(name):
            shards.extend(_matches(name))
        else:
            shards.append(name)
    return shards


def _matches(pattern: str) -> list[str]:
    names = sorted(glob.glob(pattern))
    if not names:
        raise ValueError(f"no shards match {shorten(pattern)}")
    return names


def _refuse_url_pattern(url: str) -> None:
    """Raise `ValueError` for a URL that can only be meant as a pattern or a folder."""
    if is_pipe(url):
        return
    rest, _, query = url.partition("://")[2].partition("#")[0].partition("?")
    host, _, path = rest.partition("/")
    folder = not query and (not path or path.endswith("/")) and not host.endswith(TARS)
    if folder or _URL_PATTERN.search(path) or _QUERY_PATTERN.fullmatch(query):
        raise ValueError(
            f"shard {shown_url(url)}: in URLs braces are expanded only, no *, ? or [...], and no folders are read: "
            "list the names, such as train-{000000..000009}.tar"
        )


def _without_file_scheme(url: str) -> str:
    if not url.lower().startswith("file://"):
        return url
    host, slash, path = url[7:].partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"shard {shown_url(url)}: a file: URL of another machine; expected file:///PATH")
    return unquote("/" + path)


def is_pipe(url: str) -> bool:
    """Whether a URL is a command whose output is the shard."""
    return url.lstrip().lower().startswith("pipe:")


def is_url(url: str) -> bool:
    """Whether it is a URL or a command, not a local path.

    >>> [is_url(url) for url in ("s3://bucket/a.tar", "pipe:cat a.tar", "data/a.tar")]
    [True, True, False]
    """
    return "://" in url or is_pipe(url)


def shown_url(url: str) -> str:
    """A shard's name for messages: a path unchanged, for a URL only the file's name, since the rest may hold a secret.

    >>> shown_url("https://user:s3cret@host/data/a.tar?token=s3cret"), shown_url("s3cret@host://a.tar")
    ("'a.tar'", 'a URL')
    """
    if not is_url(url):
        return "a URL" if _LIKE_SCP.match(url) else shorten(url)
    folder, slash, name = path_of(url).rpartition("/")
    if is_pipe(url):
        return f"'pipe:' … {shorten(name)}"
    return shorten(name) if slash and folder and name and not set(name) & set("@:?#") else "a URL"


def without_secrets(url: str) -> str:
    """A URL without user, password, query and fragment; only the file's name for a command; a path unchanged.

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

    A name that would be read as a URL or as an option (``log-10:00.tar``, ``-1.tar``) takes its folder with it.

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
        stuck = [i for i in same if depth[i] >= len(parts[i])]
        if len(stuck) > 1:
            raise ValueError(f"shard {shown_url(urls[stuck[0]])} is listed twice; name each shard once")
        misread = [i for i, name in enumerate(names) if _reads_as_more(name)]
        deeper = {i for i in (*same, *misread) if depth[i] < len(parts[i])}
        if not deeper:
            return names
        for i in deeper:
            depth[i] += 1


def plain_shard_names(urls: Sequence[str]) -> list[str]:
    """`shard_names`, checked before any work for use in a plan or index.

    Raises:
        ValueError: two of the URLs are the same file.
        PlanError: see `check_shard_name`.
    """
    return check_shard_names(shard_names(urls))


class ShardNames:
    """Maps a sample's `__url__` to the shard's name in a plan.

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
    """`name`, checked to be a plain relative file name, since plans may come from a stranger.

    Names are only matched with the user's shards, so any character of ordinary names is allowed. Names with a special
    meaning to some program are refused, since other programs read plans too.

    Raises:
        PlanError: empty, absolute, ``..``, a scheme, a command, or a character that a pattern or a shell expands.

    >>> check_shard_name("R&D/train's [1]-2024:05.tar")
    "R&D/train's [1]-2024:05.tar"
    """
    if not isinstance(name, str) or not name:
        raise PlanError(f"shard name {shorten(name)} is not a name")
    why = _why_refused(name)
    if why is not None:
        raise PlanError(f"shard name {shorten(name)} is refused: {why}; rename the file or folder")
    return name


def check_shard_names(names: Iterable[object]) -> list[str]:
    """Names, each checked by `check_shard_name`; ordinary ones cost little."""
    return [
        name if isinstance(name, str) and _ORDINARY.fullmatch(name) else check_shard_name(name)
        for name in names
    ]


def _reads_as_more(name: str) -> bool:
    """Whether a name reads as a URL, a remote file or an option; a folder in front prevents that."""
    return bool(_SCHEME.match(name) or _LIKE_SCP.match(name)) or name[:1] in ("-", "~")


def _why_refused(name: str) -> str | None:
    hostile = sorted(set(name) & set('{}*?$|`<>\\"'))
    if hostile:
        return f"it holds {' '.join(hostile)}"
    if printable(name) != name or set(name) & {"\n", "\t"}:
        return "it holds control characters"
    if name != name.strip():
        return "it begins or ends with a space"
    if _reads_as_more(name) or "://" in name or "::" in name:
        return "it reads as a URL, a command or an option"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "it must be a relative path without '..'"
    return None
