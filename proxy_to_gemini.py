#!/usr/bin/env python3
"""proxy_to_gemini.py: OpenAI's, Ollama's and Anthropic's APIs in one file, answered by Gemini.

    GEMINI_API_KEY=... python3 proxy_to_gemini.py               # OpenAI's API at 127.0.0.1:5555
    GEMINI_API_KEY=... python3 proxy_to_gemini.py -api=ollama   # Ollama's, with most of OpenAI's

Both serve Anthropic's API as well, and pass Gemini's own through.

It needs Python 3.9 or newer and nothing else. How a request goes through this file:

    client JSON --parse--> Fields --route.request--> Plan(GeminiCall, ...) --Client--> chunks
                              |                        ^                                 |
                              '---> Chat --chat_call---' (chat endpoints)           read_gemini
                                                                                         |
    whole answer <--route.response-- Answer <-answer_of- Text | ToolCall | Media | End <---'
    wire events  <--route.stream------------------------'

A back end changes calls before they are sent (Backend.calls) and chunks as they come
(Backend.chunks). RequestCycle.exchanges plans, again for each model of an alias that is asked.
chat_events gives the events of a chat the client's names and the form that it asked for.
Gemini.remember keeps what Gemini wants back of its tool calls, Gemini.signed puts it back.

Where to look
    1. Vocabulary                the nouns everything else is written in
    2. Models                    one table of what their names say; names, stand-ins and recipes
    3. Writing Gemini            parts, turns, settings, functions, schemas, repairs, signatures
    4. Reading Gemini            from bytes to chunks to events; refusals, usage, citations
    5. Conversation              question, history and answer in no dialect; what dialects share
    6. OpenAI chat               messages, tools, settings, choices and chunks
    7. OpenAI's other endpoints  embeddings, completions, images, speech, transcripts, models
    8. Responses                 from input items to output items; OpenAI's routes
    9. Ollama                    chat, generate, embeddings, models and their management
    10. Anthropic                messages and their counting
    11. Gemini's own             its API as it is, passed through
    12. Routing                  which route answers a path, and the protocol of its errors
    13. Credentials              who pays on Google Cloud, and how a token is asked for
    14. Backends                 where a call goes, and what differs on Vertex AI
    15. Client                   all that talks to Gemini: waiting, connections, attempts, memory
    16. Recording                what passes in an exchange, without secrets, in a file
    17. Server                   all that talks to clients: metrics, HTTP, answers, page for people
    18. Command line             flags, environment, systemd, workers, checks, start and end

Sections 1 to 14 are pure: they know no clock, socket or store. Time and ids are given to them,
and Gemini's answers as iterators; the tokens that an answer took are noted in the Exchange. What is
stored is looked up before (Route.keys, Shelf.recipes); what must be stored is yielded as a Keep.
Gemini's JSON is the form of parts and turns; a Chat is a question to a model in nobody's dialect,
and an Answer is what a whole answer adds up to. One more dialect turns its messages into a History,
fills a Chat, and reads events or the Answer that they add up to; its plans carry the Chat, or tool
calls would keep Gemini's names. MOUNTS and VERSIONED in 12 must know its paths, and STAND_INS in 2
what its clients call their models.

Words
    body       the client's JSON, as Fields: it knows the path of each value, and which were read
    call       one HTTP request to Gemini, not yet sent; a tool call is one that Gemini makes
    chunk      one GenerateContentResponse of Gemini's; a plain answer is a single chunk
    event      what read_gemini makes of chunks, and what a stream sends to the client
    exchange   a plan for a client's request, one for each model that is asked, and its answer
    further    models of an alias, asked where the first cannot answer: fallback_reason in 4 says
               why, Cooldowns in 15 for how long, RequestCycle.exchanges in 17 asks them
    history    the system's words and the turns that a client's messages come to
    recipe     a model that an Ollama client created: one of Gemini's, with words and options
    turn       one content of Gemini's history: a role and its parts
    signature  Gemini 3's opaque `thoughtSignature`, without which it refuses its own tool calls

Declined, and why: fetching what a client names (a proxy with a key must not), inventing vectors for
token numbers (they are OpenAI's), several providers (there are good routers), plug-ins.
"""

from __future__ import annotations

import argparse
import array
import base64
import bisect
import codecs
import collections
import contextlib
import datetime
import email.utils
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import math
import mmap
import os
import queue
import random
import re
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
import wave
import weakref
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter, mul
from re import Pattern
from typing import Any, Callable, NamedTuple, Union

# ======================================================================================
# 1. Vocabulary: the nouns everything else is written in
# ======================================================================================

VERSION = "1.0.0"
JSON = dict[str, Any]


class ProxyError(Exception):
    """A failure that the client is to hear about; a Protocol puts it into its own words."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        path: str | None = None,
        headers: dict[str, str] | None = None,
        upstream: bool = False,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status = status  # of the HTTP answer
        self.message = message
        self.code = code  # what is wrong, as one of OpenAI's words
        self.path = path  # the field it is about, such as "messages[2].role"
        self.headers = headers or {}  # such as Retry-After
        self.upstream = upstream  # whether Gemini said so
        # Seconds after which the same call may go well; None: it will not.
        self.retry_after = retry_after
        self.model = ""  # the model it is about, as the client spelt it
        self.listed: bool | None = None  # whether Gemini lists that model; None: not known
        self.request_id = ""  # of the request that failed

    def __str__(self) -> str:
        return self.message  # to which more may have been added


class NoRouteError(ProxyError):
    """Nothing is served under this path."""


def given(**fields: Any) -> JSON:
    """An object without the fields that are None, false or empty; 0 and 0.0 stay."""
    return {key: value for key, value in fields.items() if value or type(value) in (int, float)}


class Upload(NamedTuple):
    """A file in a form."""

    name: str
    mime: str
    data: bytes


KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    dict: "an object",
    list: "an array",
    Upload: "a file",
}


def kind_of(value: Any) -> str:
    return KINDS.get(type(value), "null")


def wrong_type(path: str, kinds: Iterable[type], value: Any) -> ProxyError:
    names = " or ".join(KINDS[kind] for kind in kinds)
    message = f"Invalid type for '{path}': expected {names}, but got {kind_of(value)} instead."
    return ProxyError(400, message, code="invalid_type", path=path)


def wrong_value(path: str, message: str) -> ProxyError:
    return ProxyError(400, message, code="invalid_value", path=path)


def invalid_value(path: str, why: str) -> ProxyError:
    return wrong_value(path, f"Invalid value for '{path}': {why}.")


# What an unread field may hold without anything being lost, besides nothing at all: the defaults of
# OpenAI's and Ollama's API references, by the path of the field without its indexes.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "text.verbosity": ("medium",),
    "parallel_tool_calls": (True,),
    "truncation": ("disabled", "auto"),
    "truncate": (True,),
    "shift": (True,),
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "speed": (1, "standard"),  # of sound; of Anthropic's answers
    "chunking_strategy": ("auto",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "top_logprobs": (0,),
    "partial_images": (0,),
    "options.presence_penalty": (0,),
    "options.frequency_penalty": (0,),
    **dict.fromkeys(("options.min_p", "options.mirostat", "options.main_gpu"), (0,)),
    "options.num_thread": (0,),
}
DETAIL = re.compile(r"(messages|input|previous_response_id)\[\]\.\w+(\[\])?(\.\w+_url)?\.detail")


def without_indexes(path: str) -> str:
    """The path of a field, one for all items of a list: "messages[].name"."""
    return re.sub(r"\[\d+\]", "[]", path)


# An object of the client's JSON: its path, itself, and the keys of it that were read. Or a name to
# report as ignored.
Tracked = Union[str, tuple[str, JSON, set[str]]]


class Fields:
    """An object of the client's JSON, which knows its path in the body and which of its keys were
    read.

    null counts as absent: client libraries send it for whatever was not set. What nobody ever read
    is named as ignored in the answer.
    """

    __slots__ = ("data", "path", "read", "tracked")

    def __init__(self, data: Any, path: str = "", tracked: list[Tracked] | None = None):
        if type(data) is not dict:
            raise wrong_type(path, (dict,), data)
        self.data, self.path = data, path
        self.read: set[str] = set()
        # It does not hold the Fields of this body, which hold it: a cycle would keep a large body
        # until the garbage collector runs.
        self.tracked: list[Tracked] = [] if tracked is None else tracked
        self.tracked.append((path, data, self.read))

    def path_of(self, key: str) -> str:
        """The path of a key in the body, such as "tools[0].function"."""
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, *kinds: type) -> Any:
        """The value, which must be of one of these kinds; None where it is absent or null."""
        value = self.data.get(key)
        if value is None:
            return None
        self.read.add(key)
        if type(value) in kinds:
            return value
        if type(value) is int and float in kinds:
            return value
        if type(value) is float and int in kinds and value.is_integer():
            return int(value)
        raise wrong_type(self.path_of(key), kinds, value)

    def require(self, key: str, *kinds: type) -> Any:
        """The value of one of these kinds; a 400 where it is absent or null."""
        value = self.get(key, *kinds)
        if value is None:
            path = self.path_of(key)
            code = "missing_required_parameter"
            raise ProxyError(400, f"Missing required parameter: '{path}'.", code=code, path=path)
        return value

    def require_text(self, key: str) -> str:
        """A text that must say something."""
        text: str = self.require(key, str)
        if not text.strip():
            path = self.path_of(key)
            raise wrong_value(path, f"Invalid '{path}': empty string.")
        return text

    def number(self, key: str, low: float, high: float, kind: type = float) -> Any:
        """A number within these bounds, or None."""
        value = self.get(key, kind)
        if value is None or low <= value <= high:
            return value
        kind_name = "integer" if kind is int else "decimal"
        bound = "below_min" if value < low else "above_max"
        bounds = f"between {low} and {high}" if high < math.inf else f"{low} or more"
        path = self.path_of(key)
        message = f"Invalid value for '{path}': it must be {bounds}."
        raise ProxyError(400, message, code=f"{kind_name}_{bound}_value", path=path)

    def choice(self, key: str, *allowed: str) -> str | None:
        """One of these words, in any case, or None."""
        value: str | None = self.get(key, str)
        if value is None:
            return None
        if value.lower() not in allowed:
            raise self.unknown_choice(key, value, allowed)
        return value.lower()

    def unknown_choice(self, key: str, value: str, allowed: Iterable[str]) -> ProxyError:
        names = ", ".join(f"'{word}'" for word in allowed)
        why = f"{value[:80]!r}. Supported values are: {names}"
        return invalid_value(self.path_of(key), why)

    def object(self, key: str) -> Fields | None:
        """The object under this key, or None."""
        return None if self.data.get(key) is None else self.require_object(key)

    def require_object(self, key: str) -> Fields:
        """The object under this key; a 400 where there is none."""
        return Fields(self.get_any(key), self.path_of(key), self.tracked)

    def object_or_empty(self, key: str) -> Fields:
        return self.object(key) or Fields({}, self.path_of(key), self.tracked)

    def object_or_self(self, key: str) -> Fields:
        """The object under this key; without such a key this one, which clients send flat."""
        return self.require_object(key) if key in self.data else self

    def get_any(self, key: str) -> Any:
        """The value under this key, whatever it is; it counts as read."""
        self.read.add(key)
        return self.data.get(key)

    def objects(self, key: str) -> Iterator[Fields]:
        """The objects of the list under this key, each made when read: the first may be bad."""
        for i in range(len(self.get(key, list) or ())):
            yield self.item(key, i)

    def item(self, key: str, i: int) -> Fields:
        """The object at this place of the list under this key."""
        return Fields(self.data[key][i], f"{self.path_of(key)}[{i}]", self.tracked)

    def strings(self, key: str) -> list[str]:
        """The strings under this key, which may be a list of them or a single one."""
        value: str | list[str] | None = self.get(key, str, list)
        if isinstance(value, str):
            return [value]  # also an empty one
        for i, item in enumerate(value or []):
            if type(item) is not str:
                raise wrong_type(f"{self.path_of(key)}[{i}]", (str,), item)
        return value or []

    def mark_read(self, *keys: str) -> None:
        """These keys say nothing that could be lost."""
        self.read.update(keys)

    def ignore(self, name: str) -> None:
        """Name this as ignored, although it was read."""
        self.tracked.append(name)

    def ignore_whole(self, name: str) -> None:
        """Name this as ignored for all that is in this object."""
        self.ignore(name)
        self.mark_read(*self.data)

    def ignored(self) -> list[str]:
        """Whatever the client sent and nobody read, by its path without the indexes."""
        names: set[str] = set()
        for item in self.tracked:
            if isinstance(item, str):
                names.add(item)
                continue
            path, data, read = item
            for key in data.keys() - read:
                if given(value=data[key]):
                    place = without_indexes(f"{path}.{key}".lstrip("."))
                    detail = data[key] == "auto" and DETAIL.fullmatch(place)
                    if not detail and data[key] not in DEFAULTS.get(place, ()):
                        names.add(place)
        return sorted(names)


def finite(text: str) -> float:
    number = float(text)
    if number - number:  # infinite: json.loads makes that of 1e999
        raise ValueError(f"{text[:20]} is beyond any number")
    return number


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Strict: neither NaN nor Infinity, in either direction. To clients the text is ASCII, since some of
# them split lines at U+2028; Gemini gets it as it is.
decode_json = json.JSONDecoder(parse_float=finite, parse_constant=no_constant).decode
json_encoder = functools.partial(  # no value of ours holds itself
    json.JSONEncoder, separators=(",", ":"), allow_nan=False, check_circular=False
)
encode_json = json_encoder().encode
encode_utf8 = json_encoder(ensure_ascii=False).encode


def gemini_json(body: JSON) -> bytes:
    """The bytes for Gemini. A lone surrogate, which clients leave where they cut an emoji, becomes
    U+FFFD: no UTF-8 has it, and protobuf takes nothing else."""
    try:
        text = encode_utf8(body)
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    except RecursionError:
        raise nested_too_deeply() from None


BAD_JSON = "We could not parse the JSON body of your request: "
# The bytes in memory of (an object or array, a text): in a body, with its Fields and its part of a
# turn, and in JSON inside a text. Measured; many tiny ones would take far more than their JSON.
BODY_BYTES = (900, 80)
INNER_BYTES = (200, 80)
SPARE_BYTES = 20 << 20  # so much is always fine
MEMORY_FACTOR = 12  # beyond that, at most so many times the size of the body
STRUCTURE = re.compile(r'("[^"]*"?)|[\[{]')  # a text, or the beginning of an object or array


def check_density(text: str) -> None:
    """A 400 for JSON that would take much more memory than its text; nothing is parsed for it."""
    allowed = SPARE_BYTES + MEMORY_FACTOR * len(text)
    counts = (text.count("{") + text.count("["), len(text) // 3)  # a text takes three characters
    if sum(map(mul, counts, BODY_BYTES)) > allowed:
        counts = (counts[0], text.count('"') // 2)  # takes a while: most bodies need no count
    if sum(map(mul, counts, BODY_BYTES)) <= allowed:
        return
    inner_bytes = sum(map(mul, counts, INNER_BYTES))
    if inner_bytes > allowed + SPARE_BYTES or body_exceeds(allowed, text):
        words = "it is made of too many small objects and texts for its size."
        raise ProxyError(400, BAD_JSON + words)


def body_exceeds(allowed: int, text: str) -> bool:
    """Whether a body takes more memory than allowed; what is inside of its texts does not count."""
    container_bytes, text_bytes = BODY_BYTES
    left = allowed
    unescaped = text.replace("\\\\", "").replace('\\"', "")  # each quote begins or ends a text
    for match in STRUCTURE.finditer(unescaped):
        left -= text_bytes if match.lastindex else container_bytes
        if left < 0:
            return True
    return False


def nested_too_deeply() -> ProxyError:
    return ProxyError(400, BAD_JSON + "it is nested too deeply.")


def parse_body(raw: bytes, content_type: str = "") -> Fields:
    """The client's body as Fields, whatever its Content-Type; a 400 where it is no JSON object."""
    if not raw.strip():
        raise ProxyError(400, "missing request body")
    try:
        text = raw.decode("utf-8-sig")
        check_density(text)
        data = decode_json(text)
    except RecursionError:
        raise nested_too_deeply() from None
    except ValueError as error:
        raise ProxyError(400, f"{BAD_JSON}{str(error)[:200]}.") from None
    if type(data) is not dict:
        raise ProxyError(400, f"{BAD_JSON}expected an object, but got {kind_of(data)}.")
    return Fields(data)


MAX_FORM_PARTS = 100  # of a form
FORM_TYPE = re.compile(
    r"multipart/form-data\s*(?:;[^;]*)*?;\s*boundary=(\"?)"
    r"([0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-])\1\s*(?:;.*)?",
    re.I | re.A,
)
FORM_DATA = re.compile("form-data", re.I)
FORM_START = re.compile(r"\s*multipart/", re.I)
HTTP_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
PARAMETER = re.compile(rf"""\s*;\s*({HTTP_TOKEN})=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s;"]+))""")


def bad_form(why: str) -> ProxyError:
    start = "We could not parse the multipart/form-data body of your request"
    return ProxyError(400, f"{start}: {why}.")


def parse_form(raw: bytes, content_type: str) -> Fields:
    """The client's form as Fields: texts, Uploads, and lists of them under names in []; else a 400.

    RFC 7578 and RFC 2046, with nothing before the first part; each piece must be what it says it
    is.
    """
    match = FORM_TYPE.fullmatch(content_type)
    if not match:
        raise bad_form("the Content-Type must be multipart/form-data with a boundary")
    first, *pieces = (b"\r\n" + raw).split(b"\r\n--" + match.group(2).encode(), MAX_FORM_PARTS + 1)
    if len(pieces) > MAX_FORM_PARTS:
        raise bad_form(f"it has more than {MAX_FORM_PARTS} parts")
    if first.strip() or not pieces or not re.match(rb"--[ \t]*(\r\n|\Z)", pieces[-1]):
        raise bad_form("it does not begin and end with the boundary")
    data: JSON = {}
    for piece in pieces[:-1]:
        name, value = form_part(piece)
        key = re.sub(r"(?<=.)\[\]$", "", name)
        if key in data and (key == name or type(data[key]) is not list):
            raise wrong_value(name, f"Invalid form: '{name}' comes twice.")
        if key == name:
            data[key] = value
        else:
            data.setdefault(key, []).append(value)
    return Fields(data)


def form_part(piece: bytes) -> tuple[str, str | Upload]:
    """(name, value) of one part, which is a file if it has a file name."""
    head, gap, data = piece.partition(b"\r\n\r\n")
    headers = form_headers(head if gap and len(head) < 8192 else b"")
    parameters = form_parameters(headers.get("content-disposition", ""))
    if parameters is None:
        raise bad_form("a part's head makes no sense")
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise bad_form("a part has a transfer encoding")
    name = parameters.get("name")
    if not name:
        raise bad_form("a part has no name")
    if "filename" in parameters or "filename*" in parameters:
        encoded = parameters.get("filename*", "")
        file_name = parameters.get("filename") or urllib.parse.unquote(encoded)
        mime = headers.get("content-type", "").partition(";")[0].strip().lower()
        return name, Upload(file_name, mime, data)
    try:
        return name, data.decode()
    except UnicodeDecodeError:
        raise wrong_value(name, f"Invalid value for '{name[:80]}': it is not UTF-8.") from None


def form_parameters(disposition: str) -> dict[str, str] | None:
    """The parameters of a part's Content-Disposition; None where it makes no sense.

    One after the other: a search for them would begin anew at each of a thousand blanks.
    """
    match = FORM_DATA.match(disposition)
    parameters: dict[str, str] = {}
    end = 0
    while match:
        end = match.end()
        match = PARAMETER.match(disposition, end)
        if match:
            key, quoted, bare = match.groups()
            parameters[key.lower()] = re.sub(r"\\(.)", r"\1", quoted or bare or "")
    return parameters if end and disposition[end:].strip() in ("", ";") else None


def form_headers(head: bytes) -> dict[str, str]:
    """The headers of a part, from the end of its delimiter's line; empty where they are none."""
    try:
        rest, *lines = head.decode().split("\r\n")
    except UnicodeDecodeError:
        return {}
    fields = [line.partition(":") for line in lines]
    headers = {name.lower(): value.strip() for name, colon, value in fields if colon}
    if rest.strip(" \t") or len(headers) != len(lines):
        return {}
    return headers


FORM_SCALAR = re.compile(r"true|false|null|-?(0|[1-9]\d{0,8})(\.\d{1,17})?", re.I | re.A)


def form_scalars(body: Fields, *keys: str) -> None:
    """Read these texts of a form as the numbers and booleans that they would be in JSON."""
    for key in keys:
        text = body.data.get(key)
        if type(text) is str and FORM_SCALAR.fullmatch(text):
            body.data[key] = decode_json(text.lower())


def parsed_object(text: str) -> JSON | None:
    """The JSON object in a text, or None: arguments and results are JSON inside JSON."""
    try:
        return decode_object(text)
    except RecursionError:
        return None


def decode_object(text: str) -> JSON | None:
    """The JSON object in a text, or None; a RecursionError where it is nested too deeply."""
    if text.lstrip()[:1] != "{":
        return None
    try:
        value = decode_json(text)
    except ValueError:
        return None
    return value if type(value) is dict else None


class BodyStream(NamedTuple):
    """A client's body that goes on to Gemini as it comes in; section 17 puts it into a call."""

    blocks: Iterable[bytes]
    length: int | None  # None where it comes in chunks


class HttpParts(NamedTuple):
    """What a call has besides its path: as the client sent it, or made of the call's body."""

    method: str
    root: str  # what is before the path: "v1beta", "v1", "upload/v1beta" ...
    headers: Mapping[str, str]
    body: bytes | BodyStream | None = None


class AnswerHead(NamedTuple):
    """How the answer to such a call begins; its bytes follow."""

    status: int
    headers: Mapping[str, str]


class GeminiCall(NamedTuple):
    """One HTTP request to Gemini, not yet sent: a POST where it has a body, if it is not passed."""

    path: str  # below /v1beta/, such as "models/gemini-2.5-flash:generateContent"
    body: JSON | None = None
    model: Model | None = None
    streaming: bool = False
    optional: bool = False  # the answer can do without it: a failure is an empty chunk
    generates: bool = False  # whether its answer is read as events, not as chunks
    unfence: bool = False  # whether JSON was asked for in words, and may come in a code fence
    left_out: tuple[str, ...] = ()  # names of what had to be left out of it
    waits: bool = False  # is sent once the answers before it are read, which may refuse it
    passed: HttpParts | None = None  # where it goes on as it came: its answer is a head, then bytes
    headers: tuple[tuple[str, str], ...] = ()  # besides the usual ones
    instead: tuple[GeminiCall, ...] = ()  # what to send where there is no such method


class Plan(NamedTuple):
    """What a client's request comes to."""

    calls: tuple[GeminiCall, ...] = ()  # sent ahead, a few at a time; answered in order
    stream: bool = False  # whether the client wants events
    options: Any = None  # what only the answer can fulfil; the endpoint knows its type
    model_name: str = ""  # as the client spelt it
    framing: Framing | None = None  # of the stream, where it is not the route's
    chat: Chat | None = None  # the question of a chat endpoint, to which chat_events fits answers
    loads: tuple[str, float] | None = None  # (model, seconds) to list in Ollama's ps from now on


class ClientRequest(NamedTuple):
    """A client's request but for its body."""

    method: str = ""  # of the route: HEAD is GET
    path: str = ""
    query: str = ""
    headers: Mapping[str, str] = {}  # by name in lower case


class Context(NamedTuple):
    """What a request and its answer may depend on besides its body: values only."""

    # (name or glob, Gemini's model, further ones for when it cannot answer)
    aliases: tuple[tuple[str, ...], ...] = ()
    ollama: bool = False  # whether this is to pass for an Ollama server
    stored: Mapping[str, str] = {}  # texts that Route.keys named; "" where there is none
    recipes: Mapping[str, Recipe] = {}  # all, by plain name; whole where the body names them
    loaded: Mapping[str, float] = {}  # models in use -> until when, in seconds since 1970
    params: Mapping[str, str] = {}  # captured from the path
    request: ClientRequest = ClientRequest()
    models: tuple[str, ...] = ()  # where an alias has several: the one that is asked, and the rest

    @property
    def query(self) -> dict[str, str]:
        """The fields of the query."""
        return dict(urllib.parse.parse_qsl(self.request.query))


class Keep(NamedTuple):
    """A text to keep under a key, before the rest of the answer is sent; "" deletes it."""

    key: str
    text: str
    pinned: bool = False  # whether it stays until it is deleted; else newer texts evict it


class Usage(NamedTuple):
    """Tokens, of one call or of several."""

    prompt: int = 0  # went in, with the results of Gemini's own tools
    cached: int = 0  # of these, from Gemini's cache
    output: int = 0  # came out, thoughts included
    thoughts: int = 0  # of these, thoughts
    audio_input: int = 0  # of the prompt, sound
    audio_output: int = 0  # of the output, sound
    image_input: int = 0  # of the prompt, pictures

    def plus(self, other: Usage) -> Usage:
        return Usage(*map(sum, zip(self, other)))


class Exchange:
    """A plan, and what has become of it: how far its answer has come, and what Gemini said."""

    def __init__(self, plan: Plan, context: Context, seed: str, created: float):
        self.plan, self.context = plan, context
        self.model_name, self.options = plan.model_name, plan.options
        self.model = next((call.model for call in plan.calls if call.model), None)  # that answers
        self.seed = seed  # random; every id in the answer is made of it
        self.ids = 0  # how many there are so far
        self.created = self.now = created  # seconds since 1970; section 17 moves `now` on
        self.usage = Usage()  # of all that was read so far
        self.first_usage: JSON | None = None  # what Gemini's first chunk says of the tokens
        self.model_status: JSON = {}  # what Gemini says of the model's future
        self.builder: ResponseBuilder | None = None  # from which a failed stream goes on

    @property
    def chat(self) -> Chat:
        """The question; only chat endpoints ask for it, and their plans have one."""
        assert self.plan.chat is not None
        return self.plan.chat

    def new_id(self, prefix: str) -> str:
        self.ids += 1
        return f"{prefix}{self.seed}{self.ids}"


class Payload(NamedTuple):
    """A whole answer that is not JSON."""

    data: bytes
    content_type: str = "text/plain; charset=utf-8"


class Framing(NamedTuple):
    """How the events of a stream become bytes."""

    content_type: str
    encode: Callable[[Any], bytes]
    end: bytes = b""  # after the last event of a stream that went well
    # What shows that a silent stream is alive, where there is such a thing.
    keep_alive: Callable[[Exchange], bytes] | None = lambda exchange: b": keep-alive\n\n"
    carries_errors: bool = True  # whether an error can be an event


def encode_sse(event: JSON) -> bytes:
    return b"data: %b\n\n" % encode_json(event).encode()


def encode_named_sse(event: JSON) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode_json(event).encode())


SSE = Framing("text/event-stream; charset=utf-8", encode_sse, b"data: [DONE]\n\n")
NAMED_SSE = Framing("text/event-stream; charset=utf-8", encode_named_sse)


def no_body(raw: bytes, content_type: str) -> Fields:
    """For routes that read none."""
    return Fields({})


# For each call of a plan its events, or its chunks of JSON.
AnswerStreams = Iterator[Iterator[Any]]


class Refusal(NamedTuple):
    """The answer of a route that always refuses."""

    status: int
    message: str
    headers: Mapping[str, str] = {}


class Route(NamedTuple):
    """One endpoint. Path segments in braces are captured; the last one may hold slashes.

    A route has a `fixed` answer, which is always the same (JSON or a Refusal), or a `response` or a
    `stream`, mostly with a `request` before. A `response` returns the whole answer, or yields it as
    the last event; without it, it is the last event of the stream. Both pull what Gemini answers,
    so each step of theirs may wait.
    """

    method: str
    path: str
    request: Callable[[Fields, Context], Plan] | None = None
    response: Callable[[Exchange, AnswerStreams], Any] | None = None
    # Events, and a Keep before the event that needs it; an AnswerHead is how the answer begins.
    stream: Callable[[Exchange, AnswerStreams], Iterator[Any]] | None = None
    framing: Framing = SSE
    # (body, Content-Type); None: the body is not read, but goes on to Gemini as it comes in.
    parse: Callable[[bytes, str], Fields] | None = parse_body
    failure: Callable[[Exchange, ProxyError], list[Any]] | None = None  # last events of a failure
    keys: Callable[[Fields, Context], list[str]] | None = None  # of stored texts
    fixed: Any = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


class Protocol(NamedTuple):
    """The routes that speak one protocol, and its form of an error, in a stream the last event."""

    name: str
    routes: tuple[Route, ...]
    error: Callable[[ProxyError], tuple[int, Any]]  # (status, body: JSON or a Payload)
    id_headers: tuple[str, ...] = ()  # in which its clients look for the request's id
    # Whether a 401 of Gemini's, which is about the server's key and not about the client's, is a
    # 403 here: for a 401, Ollama's command line asks to sign in at ollama.com.
    hides_401: bool = True


# ======================================================================================
# 2. Models: one table of what their names say; names, stand-ins and recipes
# ======================================================================================


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")  # up to Codex's
# Their budgets in tokens: "low" to "high" as Google's own OpenAI endpoint has them
# (https://ai.google.dev/gemini-api/docs/openai), and above these the most that any model takes.
BUDGETS = dict(zip(EFFORTS, (0, 512, 1024, 8192, 24576, 32768, 32768, 32768)))


class Levels(NamedTuple):
    """A model that thinks by level."""

    names: tuple[str, ...]

    def config(self, effort: str | None, budget: int | None) -> JSON:
        """The thinkingConfig: the lowest level that is at least the effort, or the highest."""
        if effort is None:
            return {}
        lowest = EFFORTS.index(effort)
        enough = (name for name in self.names if EFFORTS.index(name.lower()) >= lowest)
        return {"thinkingLevel": next(enough, self.names[-1])}


class Budget(NamedTuple):
    """A model that thinks by budget, in tokens."""

    low: int
    high: int
    stops: bool  # whether it can be told not to think

    def config(self, effort: str | None, budget: int | None) -> JSON:
        """The thinkingConfig: a budget within the model's range."""
        tokens = budget or BUDGETS.get(effort or "")
        if tokens is None or (tokens == 0 and self.stops):
            return given(thinkingBudget=tokens)
        return {"thinkingBudget": min(max(tokens, self.low), self.high)}


NEWEST = 99.0  # the generation of a name that does not say it
ALL_LEVELS = Levels(("MINIMAL", "LOW", "MEDIUM", "HIGH"))
# In recordings, and in profiles/google.py of https://github.com/pydantic/pydantic-ai.
RESULT_MEDIA = ("image/png", "image/jpeg", "image/webp", "application/pdf", "text/plain")


class Recipe(NamedTuple):
    """A model that a client of Ollama created: one of Gemini's, with words and options of its
    own."""

    source: str = ""
    system: str = ""
    options: Mapping[str, Any] = {}
    messages: Sequence[JSON] = ()  # before those of each chat, in Ollama's form
    licenses: Sequence[str] = ()
    modified: float = 0.0  # seconds since 1970; 0 where it was not kept yet


NO_RECIPE = Recipe()
RECIPE_PREFIX = "model:"  # of the keys under which recipes are stored; their plain names follow
RECIPE_NAME = re.compile(r"[\w.:/-]{1,200}", re.A)


def recipe_text(recipe: Recipe) -> str:
    """A recipe as it is stored: a line of JSON for its head, and one for the rest."""
    fields = recipe._asdict()
    head = {key: fields.pop(key) for key in ("source", "modified")}
    return f"{json.dumps(head)}\n{json.dumps(fields)}"


def recipe_of(text: str) -> Recipe:
    """The recipe in a stored text, or what the first line of one says."""
    head, _, rest = text.partition("\n")
    recipe = Recipe(**json.loads(head))
    return recipe._replace(**json.loads(rest)) if rest else recipe


class Model(NamedTuple):
    """A Gemini model, and what its name says of it. The defaults are those of the newest kind."""

    path: str  # in URLs: "models/gemini-2.5-flash"
    generation: float
    thinking: Levels | Budget | None = Levels(("LOW", "MEDIUM", "HIGH"))  # None: not configurable
    signs: bool = True  # refuses its own tool calls without their signatures
    prefills: bool = False  # continues a history that ends in its own turn
    penalties: bool = False  # takes presencePenalty and frequencyPenalty
    mixes_tools: bool = True  # takes Google's tools beside functions
    json_with_tools: bool = True  # takes a JSON answer's settings beside tools
    result_media: tuple[str, ...] = RESULT_MEDIA  # MIME types that functionResponse.parts takes
    resolutions: bool = True  # takes mediaResolution on a part
    large_images: bool = True  # takes imageConfig.imageSize
    image_format: str = "jpeg"  # of the images that it makes
    streams_speech: bool = True  # sends speech piece by piece
    mcp: bool = True  # calls tools of remote MCP servers
    system: bool = True  # takes a systemInstruction
    audio: bool = True  # takes audio
    chats: bool = True  # is listed for chats; a client can name it all the same
    tools: bool = True  # is known to call functions
    cheap: bool = False
    embeds: bool = False  # makes vectors in place of text
    max_input: int = 1048576  # tokens
    max_output: int = 65536
    task_types: bool = False  # makes other vectors for other tasks
    counts_vectors: bool = True  # says how many tokens its vectors cost
    predicts: bool = False  # makes vectors on Vertex AI by `predict` only
    # What the client's name adds:
    dimensions: int | None = None  # of vectors whose size the client leaves open; None: its own
    stands_in: bool = False  # whether it is another maker's
    further: tuple[str, ...] = ()  # models to ask where this one cannot answer
    recipe: Recipe = NO_RECIPE

    @property
    def name(self) -> str:
        return self.path.partition("/")[2]


BEFORE_GEMINI_3 = {
    "signs": False,
    "mixes_tools": False,
    "json_with_tools": False,
    "result_media": (),
    "resolutions": False,
    "large_images": False,
    "image_format": "png",
}
NO_CHAT = {"chats": False, "tools": False}

# What the name of a model says of it: (below this generation, the beginning of the name, traits).
# Each row that fits counts, later ones more. A new family is a new row; a name that fits no row is
# taken for the newest kind. Thinking: https://ai.google.dev/gemini-api/docs/thinking; output
# limits: https://ai.google.dev/gemini-api/docs/models; the rest is from Gemini's refusals, in
# recordings.
TRAITS: tuple[tuple[float, str, dict[str, Any]], ...] = (
    (3.5, r"", {"prefills": True}),
    (math.inf, r"gemini-3\.5-flash(?!-lite)", {"prefills": True}),
    (3.1, r"", {"streams_speech": False}),
    (3.0, r"", BEFORE_GEMINI_3),
    (2.5, r"", {"penalties": True, "max_output": 8192, "mcp": False}),
    (1.5, r"", {"audio": False}),
    (math.inf, r"gemini-3(\.[1-6])?-flash", {"thinking": ALL_LEVELS}),
    (math.inf, r"gemini-3-pro", {"thinking": Levels(("LOW", "HIGH"))}),
    (math.inf, r"gemini-[12]\b", {"thinking": None}),
    (math.inf, r"gemini-2\.5-flash", {"thinking": Budget(1, 24576, stops=True)}),
    (math.inf, r"gemini-2\.5-flash-lite", {"thinking": Budget(512, 24576, stops=True)}),
    (math.inf, r"gemini-2\.5-pro", {"thinking": Budget(128, 32768, stops=False)}),
    (math.inf, r".*(image|banana|tts|embedding|audio)|gemma|learnlm|aqa", {"thinking": None}),
    (math.inf, r".*(image|banana)", {"signs": False, "mcp": False}),
    (math.inf, r"gemini-[\d.]+-flash", {"cheap": True}),
    (math.inf, r".*embedding", {"max_input": 2048, "embeds": True}),
    (math.inf, r"gemini-embedding-2", {"max_input": 8192}),
    (math.inf, r"gemini-embedding-001", {"task_types": True}),
    (math.inf, r".*embedding-00\d$", {"counts_vectors": False}),
    (math.inf, r"text-|textembedding", {"predicts": True}),
    (math.inf, r"gemma", {"system": False, "audio": False, "tools": False}),
    (math.inf, r"gemma-[4-9]", {"max_output": 32768}),
    (math.inf, r".*(image|banana|tts|audio|live|lyria|omni)", NO_CHAT),
    (math.inf, r".*(robotics|computer-use|aqa|deep-research|antigravity)", NO_CHAT),
)


@functools.lru_cache(maxsize=256)
def model_of(name: str) -> Model:
    """The traits of a model by this (valid) name, which may begin with "tunedModels/"."""
    folder, _, short = name.rpartition("/")
    number = re.match(r"gemini-(\d+(?:\.\d+)?)", short)
    generation = NEWEST
    if number:
        generation = float(number.group(1))
    elif re.match(r"gemma|learnlm", short):
        generation = 2.0
    model = Model(f"{folder or 'models'}/{short}", generation)
    for below, pattern, traits in TRAITS:
        if generation < below and re.match(pattern, short):
            model = model._replace(**traits)
    return model


def generation_number(model: Model) -> int:
    """The generation whose signatures this model understands."""
    return int(model.generation)


def no_such_model(name: str) -> ProxyError:
    message = f"The model `{name[:200]}` does not exist or you do not have access to it."
    error = ProxyError(404, message, code="model_not_found", path="model")
    error.model = name
    return error


MODEL_PREFIX = re.compile(r"^(publishers/google/models|models|google|gemini)/")
OLLAMA_PREFIX = re.compile(
    r"^(registry\.ollama\.ai/)?(library|ollama|publishers/google/models|models|google|gemini)/",
    re.I,
)
OLLAMA_TAG = re.compile(r":(latest|local)$", re.I)


def plain_name(model_name: str, ollama: bool) -> str:
    """A model's name without prefixes, and without what Ollama lets clients write around it:
    registry, tag, case."""
    if not ollama:
        return MODEL_PREFIX.sub("", model_name)
    name = OLLAMA_TAG.sub("", OLLAMA_PREFIX.sub("", model_name))
    return name if name.startswith("tunedModels/") else name.lower()


# Tuned models, here and on Vertex AI, which also knows versions (@001) and other projects.
MODEL_NAME = re.compile(
    r"(tunedModels/|endpoints/|projects/[a-z0-9-]+([.:][a-z0-9-]+)*/locations/[a-z0-9-]+/"
    r"(endpoints|publishers/[a-z0-9-]+/models)/)?"
    r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*(@[A-Za-z0-9_-]+)?"
)


class StandIn(NamedTuple):
    """One of Gemini's models, for names of OpenAI's and Anthropic's (and Google's former ones)."""

    use: str  # what the client wants of it
    names: str  # how they begin, as a pattern
    model: str
    dimensions: int | None = None  # of vectors: as those that users of the named model have stored


# The first row that fits counts. The `latest` ones move on with Google's models
# (https://ai.google.dev/gemini-api/docs/models): the large one is for its makers' large ones.
STAND_INS = (
    StandIn("image", r"dall-e|(chat)?gpt-image|imagen", "gemini-nano-banana-2.1"),
    StandIn("speech", r"tts-1|gpt-.*(tts|audio)", "gemini-3.8-flash-tts"),
    StandIn("transcript", r"whisper|gpt-.*transcribe", "gemini-3.8-flash"),
    StandIn("embedding", r"text-embedding-(3-small|ada-002)\Z", "gemini-embedding-001", 1536),
    StandIn("embedding", r"text-embedding-3-large\Z", "gemini-embedding-001", 3072),
    StandIn("chat", r"claude-(.*-)?opus|(gpt-|o[1-4]).*-pro(-|\Z)", "gemini-pro-latest"),
    StandIn("chat", r"(claude|(chat)?gpt|codex)-|o[1-4](-|\Z)", "gemini-flash-latest"),
)
ALL_USES = tuple(dict.fromkeys(row.use for row in STAND_INS))
# What can do more than chat: an alias glob for chats, such as `-alias='gpt-*=...'`, does not apply.
MEDIA_MODELS = {
    "image": r"gemini-.*image|.*banana",
    "speech": r"gemini-.*(tts|audio)",
    "transcript": r"gemini|gemma",
}


@functools.lru_cache(maxsize=256)
def stand_in_for(name: str, uses: tuple[str, ...]) -> StandIn | None:
    rows = (row for row in STAND_INS if row.use in uses and re.match(row.names, name))
    return next(rows, None)


def model_named(model_name: str, context: Context, *uses: str) -> Model:
    """The model that a client means: through recipes, aliases (an exact name before a glob) and
    stand-ins for these uses, and without prefixes; with its recipe, or an alias's further models.

    A name can never change the URL: whatever is not plain is a model that does not exist.
    """
    plain = plain_name(model_name, context.ollama)
    stand_in = stand_in_for(plain, uses)
    recipe = context.recipes.get(plain, NO_RECIPE)
    candidates = [[recipe.source] if recipe.source else []]
    candidates += [models for name, *models in context.aliases if name in (model_name, plain)]
    globs = [models for glob, *models in context.aliases if fnmatch.fnmatchcase(plain, glob)]
    if stand_in:
        able = MEDIA_MODELS.get(stand_in.use, "")
        globs = [[model for model in models if re.match(able, model)] for models in globs]
    names = next(filter(None, candidates + globs), [])
    if stand_in and not names:
        model = model_of(stand_in.model)
        return model._replace(dimensions=stand_in.dimensions, stands_in=True)
    if context.models and set(context.models) <= set(names):
        names = [*context.models]
    name, *further = names or [plain]
    if len(name) > 128 or not MODEL_NAME.fullmatch(name):
        raise no_such_model(model_name)
    model = model_of(name)
    if further or recipe.source:
        return model._replace(further=tuple(further), recipe=recipe)
    return model


# ---- models that go ----


def retirement_words(name: str, end: str, follower: str, message: str) -> str:
    """What is known of a model: that it "will go" or "is gone", its follower, Gemini's message."""
    successor = follower and f" and is followed by {follower}"
    return f"the model {name} {end}{successor}" + (message and f": {message}")


# Stages at which a model is on its way out: ModelStage in types.py of
# https://github.com/googleapis/python-genai
LEAVING_STAGES = ("LEGACY", "DEPRECATED", "RETIRED")
# Of a 404: "This model models/gemini-2.5-flash is no longer available to new users."
# (https://github.com/sohzm/cheating-daddy/issues/476)
GONE = "no longer available"


def announced_retirement(model: Model, status: JSON, listed: Iterable[str]) -> str:
    """What the modelStatus of an answer says; "" where the model stays."""
    stage, words = (get_or_empty(status, key, str) for key in ("modelStage", "message"))
    date = re.match(r"\d{4}-\d\d-\d\d", get_or_empty(status, "retirementTime", str))
    if stage not in LEAVING_STAGES and not date:
        return ""
    end = f"will go on {date.group()}" if date else "will go"
    return retirement_words(model.name, end, follower_of(model.name, words, listed), words)


def follower_of(name: str, words: str, listed: Iterable[str]) -> str:
    """The model that takes this one's place: the one that Gemini's words name, else the newest of
    its family that is listed, else that family's `latest`."""
    named = [other.rstrip(".") for other in re.findall(r"\bgemini-[a-z0-9.-]+", words)]
    family, own = family_of(name)
    newer = [
        ("preview" not in other and "exp" not in other, family_of(other)[1], other)
        for other in listed
        if family_of(other)[0] == family and family_of(other)[1] > own
    ]
    others = [other for other in named if other != name] + [max(newer)[2] for _ in newer[:1]]
    if family in LATEST_FAMILIES:
        others.append(f"{family}-latest")
    return next(iter(others), "")


LATEST_FAMILIES = ("gemini-flash", "gemini-flash-lite", "gemini-pro")


def family_of(name: str) -> tuple[str, float]:
    """("gemini-flash-lite", 2.5) of gemini-2.5-flash-lite-preview-09-2025."""
    number = re.search(r"-(\d+(?:\.\d+)?)(?=-|\Z)", name)
    family = re.sub(r"-(\d+(\.\d+)?|preview|exp|latest)(?=-|\Z)", "", name)
    return family, float(number.group(1)) if number else 0.0


# ---- models that are listed ----

GEMINI_OPENED = 1702425600  # 13 December 2023, Gemini's API opened; it gives no dates of its models


def model_created(name: str, context: Context) -> float:
    """When a model of this name was made, in seconds since 1970."""
    recipe = context.recipes.get(plain_name(name, True), NO_RECIPE)
    return recipe.modified or GEMINI_OPENED


def entry_path(entry: JSON) -> str:
    """The path of a model in Gemini's entry for it: "models/gemini-2.5-flash"."""
    path: str = get_or_empty(entry, "name", str)
    return path


def entry_name(entry: JSON) -> str:
    return entry_path(entry).partition("/")[2]


def usable_models(answers: AnswerStreams, context: Context) -> dict[str, JSON]:
    """Gemini's entries for the models that can chat or embed, by their plain names; then the names
    that stand for one of these."""
    models: dict[str, JSON] = {}
    for entry in (entry for chunks in answers for chunk in chunks for entry in chunk["models"]):
        methods = get_or_empty(entry, "supportedGenerationMethods", list)
        if entry_name(entry) and ("generateContent" in methods or "embedContent" in methods):
            models[entry_name(entry)] = entry
    names = [name for name, *_ in context.aliases if not re.search(r"[*?\[]", name)]
    for name in (*names, *context.recipes):
        model = model_named(name, context)
        listed = [models[other] for other in (model.name, *model.further) if other in models]
        models.update((name, entry) for entry in listed[:1])
    return models


# ======================================================================================
# 3. Writing Gemini: parts, turns, settings, functions, schemas, repairs, signatures
# ======================================================================================

# ---- parts ----

Part = JSON
# For an unknown signature, in base64 as seen in recordings; Google documents it:
# https://ai.google.dev/gemini-api/docs/thought-signatures
PLACEHOLDER = base64.b64encode(b"skip_thought_signature_validator").decode()


def text_part(text: str) -> Part:
    return {"text": text}


# The first bytes of files, which tell their types before any label does: clients label wrongly.
MAGIC = (
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"\x89PNG", "image/png"),
    (rb"GIF8[79]a", "image/gif"),
    (rb"RIFF....WEBP", "image/webp"),
    (rb"....ftyp(hei[cfmsx]|mif1|hevc)", "image/heic"),
    (rb"BM....\0\0\0\0", "image/bmp"),
    (rb"II\*\0|MM\0\*", "image/tiff"),
    (rb"%PDF", "application/pdf"),
    (rb"RIFF....WAVE", "audio/wav"),
    (rb"ID3[\x02-\x04]|\xff[\xf2\xf3\xfa\xfb]", "audio/mp3"),
    (rb"\xff[\xf1\xf9]", "audio/aac"),
    (rb"fLaC", "audio/flac"),
    (rb"OggS", "audio/ogg"),
    (rb"....ftypavi[fs]", "image/avif"),
    (rb"....ftypM4A", "audio/mp4"),
    (rb"....ftypqt", "video/quicktime"),
    (rb"....ftyp", "video/mp4"),
    (rb"\x1a\x45\xdf\xa3", "video/webm"),
    (rb"PK\x03\x04", "application/zip"),
    (rb"\xd0\xcf\x11\xe0", "application/x-ole-storage"),
)
ARCHIVES = ("application/zip", "application/x-ole-storage")  # labels say what is in them
UNKNOWN_TYPE = "application/octet-stream"
TEXT_TYPES = re.compile(r"text/|application/(?!pdf$)|.*\+(json|xml)$")  # where they are UTF-8
# What Gemini reads: https://ai.google.dev/gemini-api/docs/image-understanding#supported-formats
# and its neighbours. It refuses GIF, BMP, TIFF, SVG and office files, as reported:
# https://github.com/microsoft/vscode/issues/286628, https://github.com/google/adk-python/issues/5693
READABLE_TYPES = re.compile(
    r"image/(png|jpeg|webp|heic|heif)$|(audio|video|text)/[^*]|application/pdf$"
)
OFFICE = "application/vnd.openxmlformats-officedocument"
# By the endings of files' names, which are labels too, and by other spellings.
MIME_TYPES = {
    **{name: f"image/{name}" for name in ("png", "jpeg", "webp", "heic", "gif", "bmp", "tiff")},
    **{name: f"audio/{name}" for name in ("mp3", "wav", "flac", "ogg", "aac")},
    **{name: f"video/{name}" for name in ("mp4", "webm", "mov")},
    **{name: f"text/{name}" for name in ("csv", "html", "xml")},
    **{name: f"application/{name}" for name in ("pdf", "json", "zip", "rtf")},
    **dict.fromkeys(("txt", "ts", "yaml", "yml"), "text/plain"),
    "jpg": "image/jpeg",
    "svg": "image/svg+xml",
    "m4a": "audio/mp4",
    "md": "text/markdown",
    "py": "text/x-python",
    "js": "text/javascript",
    "doc": "application/msword",
    "xls": "application/vnd.ms-excel",
    "ppt": "application/vnd.ms-powerpoint",
    "docx": f"{OFFICE}.wordprocessingml.document",
    "xlsx": f"{OFFICE}.spreadsheetml.sheet",
    "pptx": f"{OFFICE}.presentationml.presentation",
    **dict.fromkeys(("audio/x-wav", "audio/wave"), "audio/wav"),
    "audio/m4a": "audio/mp4",
    **dict.fromkeys(("image/jpg", "image/pjpeg"), "image/jpeg"),
    "image/x-png": "image/png",
    "application/x-pdf": "application/pdf",
}


def sniffed(data: str) -> str | None:
    """The MIME type of base64 data by its first bytes, or None."""
    head = decode_base64(data[:32])
    return next((mime for pattern, mime in MAGIC if re.match(pattern, head, re.S)), None)


def extension_type(name: str | None) -> str | None:
    return MIME_TYPES.get((name or "").rpartition(".")[2].lower())


def media_type(data: str, label: str | None, name: str | None) -> str:
    """The MIME type of base64 data: by its bytes where they are known, else by its label, which may
    be a bare "png", else by the name of its file."""
    label = (label or "").partition(";")[0].strip().lower()
    label = MIME_TYPES.get(label, label)
    if not label or label == UNKNOWN_TYPE:
        label = extension_type(name) or UNKNOWN_TYPE
    known = sniffed(data)
    vague = known in ARCHIVES and label != UNKNOWN_TYPE and not READABLE_TYPES.match(label)
    if vague or not known:
        return label
    if known.startswith("video/") and label.startswith("audio/"):
        return known.replace("video", "audio")  # the containers are the same
    return known


def is_base64(text: str) -> bool:
    """Whether this is base64 in either alphabet, padded or not."""
    match = re.fullmatch(r"[A-Za-z0-9+/_-]+={0,2}", text, re.ASCII)
    return match is not None and len(text.rstrip("=")) % 4 != 1


def can_sign(text: str) -> bool:
    """Whether this may be a signature of Gemini's, and no word that stands for one."""
    return len(text) > 8 and is_base64(text)


def decode_base64(text: str) -> bytes:
    """The bytes of base64; the library takes both alphabets here, and too much padding."""
    return base64.urlsafe_b64decode(text + "==")


def base64_data(text: str, path: str) -> str:
    """Base64 as Gemini takes it: padded, without line breaks; a 400 where it is none."""
    data = "".join(text.split())
    if not is_base64(data):
        raise invalid_value(path, "it must be valid base64-encoded data")
    data = data.rstrip("=")
    return data + "=" * (-len(data) % 4)


def media_part(
    fields: Fields, key: str, data: str, label: str | None = None, name: str | None = None
) -> Part:
    """A part of base64 data or a data: URL, which is under this key of the fields.

    A text file becomes text, which every model reads; so do words about a file that none reads.
    """
    path = fields.path_of(key)
    if data[:5].lower() == "data:":  # RFC 2397
        head, comma, data = data[5:].partition(",")
        if not comma:
            raise invalid_value(path, "expected a base64-encoded data URL")
        mime, *parameters = [word.strip().lower() for word in head.split(";")]
        label = mime or label
        if "base64" not in parameters:
            raw = urllib.parse.unquote_to_bytes(data.encode("utf-8", "replace"))
            data = base64.b64encode(raw).decode()
    data = base64_data(data, path)
    mime = media_type(data, label, name)
    if TEXT_TYPES.match(mime):
        text = decoded_text(data)
        if text is not None:
            return text_part(f"{name}:\n{text}" if name else text)
    if not READABLE_TYPES.match(mime):
        return left_out_part(fields, path, mime, name and f"named {name}")
    return {"inlineData": {"mimeType": mime, "data": data}}


def decoded_text(data: str) -> str | None:
    """The text in base64, or None where it is none."""
    try:
        text = decode_base64(data).decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def left_out_part(fields: Fields, path: str, mime: str, which: str | None) -> Part:
    """What stands in the place of a file that Gemini refuses, now and at each later turn."""
    fields.ignore(f"{without_indexes(path)} ({mime})")
    words = " ".join(filter(None, ("A file of type", mime, which)))
    return text_part(f"[{words} was left out: Gemini cannot read it.]")


def local_host(host: str) -> bool:
    """Whether a host name or address is of this machine or a private network, however spelt."""
    import ipaddress

    host = host.strip("[]").rstrip(".").lower()
    if re.search(r"(^|\.)(localhost|local|internal|lan|home|arpa)$|^[^.:]*$", host):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # 127.1, 0x7f.1 and the like are addresses to some programs
        return bool(re.fullmatch(r"0x[0-9a-f]*|\d+", host.rpartition(".")[2]))
    return not (getattr(address, "ipv4_mapped", None) or address).is_global


def public_url(text: str, path: str, what: str) -> urllib.parse.SplitResult:
    """The address that is under this path; a 400 where Gemini cannot reach it."""
    try:
        url = urllib.parse.urlsplit(text)
        host = url.hostname
    except ValueError:
        raise invalid_value(path, f"expected {what}") from None
    if not host or url.scheme not in ("https", "http", "gs"):
        raise invalid_value(path, f"expected {what}")
    if url.scheme != "gs" and (local_host(host) or "@" in url.netloc):
        raise invalid_value(path, f"Gemini fetches this URL, and cannot reach {host[:80]!r}")
    return url


def source_part(fields: Fields, key: str, name: str | None = None) -> Part:
    """The part for a data: URL, or for an address, which Gemini fetches: this proxy must not."""
    source, path = fields.require(key, str), fields.path_of(key)
    if source[:5].lower() == "data:":
        return media_part(fields, key, source, None, name)
    url = public_url(source, path, "a data URL or a public https URL")
    mime_type = extension_type(url.path) or extension_type(name)
    if mime_type and not READABLE_TYPES.match(mime_type) and mime_type != "application/json":
        return left_out_part(fields, path, mime_type, f"at {source}")
    return {"fileData": {**given(mimeType=mime_type), "fileUri": source}}


# What LiteLLM and Bifrost put between a call's id and its signature, in the histories that they
# leave (LiteLLM: THOUGHT_SIGNATURE_SEPARATOR in litellm/constants.py; both seen in recordings).
SIGNED_ID_MARKS = ("__thought__", "_ts_")


def split_signed_id(signed_id: str) -> tuple[str, str]:
    """(the id itself, the signature that rides behind it or "")."""
    for mark in SIGNED_ID_MARKS:
        call_id, _, tail = signed_id.rpartition(mark)
        if len(tail) >= 40 and call_id and is_base64(tail):
            return call_id, tail
    return signed_id, ""


def call_part(
    name: str, args: JSON, call_id: str | None = None, signature: str | None = None
) -> Part:
    """A functionCall; without a signature it has the one behind its id."""
    call_id, id_signature = split_signed_id(call_id or "")
    call = {**given(id=call_id), "name": gemini_name(name), "args": args}
    return {"functionCall": call, **given(thoughtSignature=signature or id_signature)}


def result_part(
    name: str | None, parts: list[Part], call_id: str | None = None, failed: bool = False
) -> Part:
    """A functionResponse of a tool's result in parts: its texts, and the media beside them.

    valid_turns finds its call, and moves the media where need be.
    """
    content = "\n".join(part["text"] for part in parts if "text" in part)
    media = [part for part in parts if "text" not in part]
    result = {
        **given(id=split_signed_id(call_id or "")[0]),
        "name": gemini_name(name) if name else "",
        "response": {"error": content} if failed else result_response(content),
        **given(parts=media),
    }
    return {"functionResponse": result}


def result_response(content: str) -> JSON:
    """The `response` for a tool's result: its JSON, but as text where Gemini would read something
    else in it, and wrapped where it would read only some of it."""
    parsed = parsed_object(content)
    if parsed is None or nested_too_deep(parsed) or is_misread(parsed):
        return {"output": content}
    if len(parsed) > 1 and RESULT_KEYS & parsed.keys():
        return {"output": parsed}
    return parsed


# Google gives these two keys of a result a meaning, and the others beside them may not reach the
# model: https://ai.google.dev/api/caching#FunctionResponse
RESULT_KEYS = {"output", "error"}
MAX_DEPTH = 100  # at which protobuf's JSON parsers stop
TOO_DEEP = "it is nested too deeply"


def inner_values(value: Any) -> Iterable[Any]:
    """The values in an object or array."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def nested_too_deep(value: JSON) -> bool:
    """Whether objects and arrays are in one another deeper than Gemini takes it."""
    layer: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        if not layer:
            break
        values = (inner for outer in layer for inner in inner_values(outer))
        layer = [inner for inner in values if isinstance(inner, (dict, list))]
    return bool(layer)


def is_misread(value: Any) -> bool:
    """Whether it holds an integer that Gemini would round, since its numbers are doubles, or a
    `$ref`, which it takes for a reference to media (both as reported)."""
    if type(value) is int:
        return abs(value) > 2**53
    if isinstance(value, dict) and "$ref" in value:
        return True
    return any(map(is_misread, inner_values(value)))


def call_arguments(call: Fields) -> JSON:
    """The arguments of a tool call in a history: an object, or JSON in a string, or nearly so."""
    value, path = call.get("arguments", str, dict), call.path_of("arguments")
    if not value or (isinstance(value, str) and value.strip() in ("", "null")):
        return {}
    try:
        arguments: JSON | None = decode_object(value) if isinstance(value, str) else value
    except RecursionError:
        raise invalid_value(path, TOO_DEEP) from None
    if arguments is None:
        return {"_raw": value}
    return within_depth(arguments, path)


def within_depth(arguments: JSON, path: str) -> JSON:
    """The arguments under this path; a 400 where they are nested too deeply for Gemini."""
    if nested_too_deep(arguments):
        raise invalid_value(path, TOO_DEEP)
    return arguments


def gemini_name(name: str) -> str:
    """A function name as Gemini takes it: https://ai.google.dev/api/caching#FunctionDeclaration"""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"_{re.sub('[^A-Za-z0-9_.:-]', '_', name)[:50]}_{digest}"


# ---- turns ----

CALLS_AND_RESULTS = {"functionCall", "functionResponse"}
GO_ON = "Continue."  # the turn after what the model is to carry on, where it does not by itself
NO_RESULT = {"response": {"error": "There is no result: the call was interrupted."}}
JOINED_RESULT = {"response": {"output": "See the first call's result: it may stand for several."}}


def user_turn(*parts: Part) -> JSON:
    return {"role": "user", "parts": list(parts)}


def model_turn(*parts: Part) -> JSON:
    return {"role": "model", "parts": list(parts)}


def system_turn(parts: Sequence[Part]) -> JSON:
    """System text in mid-conversation: in its place, marked, as text of the user's.

    In front it would be obeyed less, and change the beginning that Gemini's cache goes by.
    """
    if not any(map(has_content, parts)):
        return user_turn()
    return user_turn(text_part("<system>\n"), *parts, text_part("\n</system>"))


def has_content(part: Part) -> bool:
    return part.get("text") != "" or "thoughtSignature" in part


def valid_turns(contents: Iterable[JSON], model: Model) -> list[JSON]:
    """The history in the order that Gemini accepts, with nothing lost.

    Neighbours of one role become one turn. A turn's calls get their results in a turn of their own,
    in order, with a stand-in for what is missing; a result without a call becomes text. The first
    turn is the user's, and so is the last, unless the model continues its own. Each rule is a 400
    of Gemini's; most are in https://ai.google.dev/gemini-api/docs/function-calling.
    """
    turns = merged_turns(contents)
    parts = itertools.chain.from_iterable(turn["parts"] for turn in turns)
    if not all(map(CALLS_AND_RESULTS.isdisjoint, parts)):
        turns = turns_with_results(reunited(turns), model)
    if turns and turns[0]["role"] == "model":
        turns.insert(0, user_turn(text_part(" ")))
    if turns and turns[-1]["role"] == "model" and not model.prefills:
        turns.append(user_turn(text_part(GO_ON)))
    return turns


def turns_with_results(history: list[JSON], model: Model) -> list[JSON]:
    """The turns; behind each one with calls, their results."""
    turns: list[JSON] = []
    for turn in history:
        if turn["role"] == "model":
            turns.append(turn)
        else:
            turns += tool_result_turns(turns[-1:], turn, model)
    if turns[-1]["role"] == "model":
        turns += tool_result_turns(turns[-1:], user_turn(), model)
    return [{**turn, "parts": with_unique_ids(turn["parts"])} for turn in turns]


def without_id(item: JSON) -> JSON:
    return {name: value for name, value in item.items() if name != "id"}


def merged_turns(contents: Iterable[JSON]) -> list[JSON]:
    """The turns without what is empty in them; neighbours of one role are one."""
    turns: list[JSON] = []
    for content in contents:
        parts = [part for part in content["parts"] if has_content(part)]
        if parts and turns and turns[-1]["role"] == content["role"]:
            turns[-1]["parts"] += parts
        elif parts:
            turns.append({"role": content["role"], "parts": parts})
    return turns


def reunited(turns: list[JSON]) -> list[JSON]:
    """The turns with each call, by its id, in the last turn before its result: what goes on from a
    stored response may repeat messages in between (semantic-kernel 1.45), or the calls themselves
    (strands-agents 1.62). OpenAI takes both."""
    waiting: dict[str, tuple[JSON, Part]] = {}  # by id, in these turns
    moved: set[int] = set()
    for before, turn in zip([user_turn(), *turns], turns):
        for part in filter(CALLS_AND_RESULTS.intersection, turn["parts"]):
            result = part.get("functionResponse")
            call_id = (result or part["functionCall"]).get("id")
            if result is None and call_id:
                home, call = waiting.get(call_id, (turn, part))
                if home is not turn and call["functionCall"] == part["functionCall"]:
                    moved.add(id(call))
                waiting[call_id] = turn, part
            elif result and not call_id:
                waiting.clear()  # where results go by order, ids may come again
            elif result and call_id in waiting:
                home, call = waiting.pop(call_id)
                if home is not before:
                    before["parts"].append({**call})
                    moved.add(id(call))
    if not moved:
        return turns
    staying = ([part for part in turn["parts"] if id(part) not in moved] for turn in turns)
    return merged_turns({**turn, "parts": parts} for turn, parts in zip(turns, staying))


def with_unique_ids(parts: list[Part]) -> list[Part]:
    """The parts of a turn without the ids that came before: two equal ones in a turn are a bare 400
    (reported). Results are in the order of their calls by now, and so lose the same ones."""
    used = {""}
    out: list[Part] = []
    for part in parts:
        unique = part
        for key in CALLS_AND_RESULTS & part.keys():
            item = part[key]
            if item.get("id") in used:
                unique = {**part, key: without_id(item)}
            used.add(item.get("id") or "")
        out.append(unique)
    return out


def tool_result_turns(before: list[JSON], turn: JSON, model: Model) -> list[JSON]:
    """A user's turn after a model's turn: the results of its calls, then the other parts."""
    parts = turn["parts"]
    earlier = [part for one in before for part in one["parts"]]
    calls = [part["functionCall"] for part in earlier if "functionCall" in part]
    results = [part["functionResponse"] for part in parts if "functionResponse" in part]
    if not calls and not results:
        return [turn] if parts else []
    matched = match_results(calls, results)
    used = set(map(id, matched))
    media: list[Part] = []
    for result in matched:
        media += [part for part in result.get("parts", ()) if not fits_result(part, model)]
    rest: list[Part] = []
    for part in parts:
        result = part.get("functionResponse")
        if result is None:
            rest.append(part)
        elif id(result) not in used:
            text = f"Result of {result['name'] or 'a function'}: {encode_json(result['response'])}"
            rest += [text_part(text), *result.get("parts", ())]
    answers = [tool_result(call, result, model) for call, result in zip(calls, matched)]
    return [user_turn(*group) for group in (answers, media + rest) if group]


def fits_result(part: Part, model: Model) -> bool:
    """Whether the model takes these media inside of a functionResponse, not just beside it."""
    return part.get("inlineData", {}).get("mimeType") in model.result_media


def tool_result(call: JSON, result: JSON, model: Model) -> Part:
    """The functionResponse to a call."""
    parts = [part for part in result.get("parts", ()) if fits_result(part, model)]
    media = [{"inlineData": part["inlineData"]} for part in parts]
    answer = {**given(id=call.get("id")), "name": call["name"], "response": result["response"]}
    return {"functionResponse": {**answer, **given(parts=media)}}


def match_results(calls: list[JSON], results: list[JSON]) -> list[JSON]:
    """The result of each call, or words in its place: by id, else by name, else by order."""
    call_ids = {call["id"] for call in calls if "id" in call}
    waiting: dict[tuple[str, str], collections.deque[JSON]]
    waiting = collections.defaultdict(collections.deque)
    for result in results:
        key = ("", "")  # for calls in their order, where the result says nothing
        if result.get("id") in call_ids:
            key = ("id", result["id"])
        elif result["name"]:
            key = ("name", result["name"])
        elif "id" in result:
            key = ("unknown id", "")
        waiting[key].append(result)
    missing = NO_RESULT
    if len(results) == len(waiting["", ""]) == 1:
        # Genkit's plug-in for Ollama joins all results in a message that names no call (Go, 1.4).
        missing = JOINED_RESULT
    matched: dict[int, JSON] = {}
    for kind in ("id", "name", ""):
        for i, call in enumerate(calls):
            queue = waiting[kind, call.get(kind, "")]
            if queue and i not in matched:
                matched[i] = queue.popleft()
    strays = [result for queue in waiting.values() for result in queue if not result["name"]]
    rest = [i for i in range(len(calls)) if i not in matched]
    if len(strays) == len(rest):  # their ids are unknown, but each call has one
        matched.update(zip(rest, strays))
    return [matched.get(i, missing) for i in range(len(calls))]


# ---- thinking and settings ----


class Thinking(NamedTuple):
    """How a model is to think, as the client asked for it."""

    effort: str | None = None  # one of EFFORTS; None: the model's own way
    budget: int | None = None  # tokens; precedes `effort` on models that think by budget
    show: bool = False  # whether the client wants to see its thoughts
    answer_only: bool = False  # whether the client's limit of tokens is meant for the answer alone
    field: str = ""  # what to name as ignored where the effort has no effect
    google: Mapping[str, Any] = {}  # Google's own thinkingConfig, which takes precedence
    signatures: bool = False  # whether the client takes those of calls, among its thoughts


SMALL_OUTPUT_TOKENS = 1024  # left to itself, a model can think for so long before it answers


def thinking_config(thinking: Thinking, model: Model, limit: int | None, body: Fields) -> JSON:
    """The thinkingConfig of a chat; names the client's field as ignored where it has no effect."""
    client_effort = thinking.effort
    if client_effort is None and thinking.budget:
        enough = (word for word in EFFORTS[1:] if BUDGETS[word] >= thinking.budget)
        client_effort = next(enough, EFFORTS[-1])
    effort = client_effort
    if effort is None and thinking.answer_only and limit and limit < SMALL_OUTPUT_TOKENS:
        effort = "none"
    config: JSON = {}
    no_effect = client_effort is not None
    if model.thinking is not None:
        config = model.thinking.config(effort, thinking.budget)
        no_effect = client_effort == "none" and config.get("thinkingBudget") != 0
        if thinking.show and effort != "none":
            config["includeThoughts"] = True
    if thinking.google.keys() - {"includeThoughts"}:  # Google's own level or budget, which wins
        config, no_effect = {}, client_effort is not None
    if thinking.field and no_effect:
        body.ignore(thinking.field)
    return {**config, **thinking.google}


def sampling_config(
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    limit: int | None = None,
    seed: int | None = None,
    stops: Sequence[str] = (),
    **weights: float | None,
) -> JSON:
    """The part of a generationConfig about sampling, within what Gemini takes.

    Bounds: https://ai.google.dev/api/generate-content#generationconfig; its integers have 32 bits.
    A null stands for a value that the client gave to say "none", such as a limit of -1.
    """
    config: JSON = {}
    if temperature is not None:
        config["temperature"] = min(max(temperature, 0), 2)
    if top_p is not None:
        config["topP"] = min(max(top_p, 0), 1)
    if top_k is not None:
        config["topK"] = top_k if 0 < top_k < 2**31 else None
    if limit is not None:
        config["maxOutputTokens"] = max(0, min(limit, 2**31 - 1)) or None
    if seed is not None:
        config["seed"] = seed if -(2**31) <= seed < 2**31 else seed % 2**31
    if stops:
        config["stopSequences"] = list(stops)
    for name, weight in weights.items():
        if weight is not None:
            config[name] = weight or None
    return config


def penalties(fields: Fields, low: float, high: float, model: Model) -> dict[str, float | None]:
    """Both penalties; models that refuse them leave them unread, and so named as ignored."""
    if not model.penalties:
        return {}
    names = ("presence", "frequency")
    return {f"{name}Penalty": fields.number(f"{name}_penalty", low, high) for name in names}


def stop_sequences(body: Fields, key: str = "stop") -> list[str]:
    """At most five that are not empty, which is all that Gemini takes."""
    stops = [text for text in body.strings(key) if text]
    if len(stops) > 5:
        body.ignore(body.path_of(key))
    return stops[:5]


# ---- functions and schemas ----

COMBINATIONS = ("anyOf", "oneOf", "allOf", "additionalProperties")
SUBSCHEMAS = (
    *(*COMBINATIONS, "items", "prefixItems", "additionalItems", "contains"),
    *("not", "if", "then", "else"),
)
NAMED_SUBSCHEMAS = ("properties", "$defs", "patternProperties", "dependentSchemas")
OPEN_ENDED = ("$ref", *COMBINATIONS, "patternProperties")  # need no `properties` beside them


def gemini_schema(schema: Any) -> Any:
    """A JSON Schema as parametersJsonSchema and responseJsonSchema want it.

    Gemini has no `const`, no null in `enum`, allows nothing beside a `$ref`, and follows it only
    below `#/$defs/`; what it does not know it passes over:
    https://ai.google.dev/gemini-api/docs/structured-output#json-schema-support, recordings.
    It refuses a list in `items`: https://github.com/fazer-ai/agents/pull/67
    """
    references: list[str] = []
    out = adapted_schema(schema, references)
    known = {f"#/$defs/{name}" for name in get_or_empty(out, "$defs", dict)}
    if known.issuperset(references):
        return out
    return adapted_schema(SchemaReferences(schema).localized(), [])


def adapted_schema(schema: Any, references: list[str]) -> Any:
    """A schema as Gemini takes it, with all inside of it; adds its references to the list."""
    if not isinstance(schema, dict):
        return schema
    out = mapped_schema(schema, lambda inner: adapted_schema(inner, references))
    for key in ("$schema", "strict", "definitions"):
        out.pop(key, None)
    if isinstance(out.get("items"), list):  # a tuple, as drafts before 2020-12 spell it
        out.update(given(prefixItems=out.pop("items")))
        if "additionalItems" in out:
            out["items"] = out.pop("additionalItems")
    if "const" in out:
        out["enum"] = [out.pop("const")]
    if isinstance(out.get("enum"), list) and None in out["enum"]:
        out = nullable_enum(out)
    if isinstance(out.get("$ref"), str):
        references.append(out["$ref"])
        out = lone_reference(out)
    return out


def mapped_schema(schema: JSON, change: Callable[[Any], Any]) -> JSON:
    """A schema with each one changed that is directly in it."""
    out: JSON = {}
    for key, value in schema.items():
        if key in NAMED_SUBSCHEMAS and isinstance(value, dict):
            out[key] = {name: change(inner) for name, inner in value.items()}
        elif key in SUBSCHEMAS:
            out[key] = [*map(change, value)] if isinstance(value, list) else change(value)
        elif key not in NAMED_SUBSCHEMAS:
            out[key] = value
    return out


DEFINITIONS = {"$defs": "definitions", "definitions": "$defs"}
# Whose values may be objects; others that are, such as `components`, held definitions.
OBJECT_KEYWORDS = (*SUBSCHEMAS, *NAMED_SUBSCHEMAS, "const", "default", "example")


class SchemaReferences:
    """The references of a schema, wherever in it they lead."""

    def __init__(self, root: JSON):
        self.root = root
        self.known: set[int] = set()  # ids of the subschemas that were looked at
        self.unresolved: list[tuple[JSON, tuple[JSON, ...]]] = []  # (with a reference, around it)
        self.labels: JSON = {}  # "$id" or "#anchor" -> subschema
        self.names: dict[int, str] = {}  # id of a subschema that one leads to -> its name
        self.definitions: JSON = {}  # name -> that subschema
        self.targets: dict[int, str] = {}  # id of a subschema with a reference -> where it leads

    def localized(self) -> JSON:
        """The schema with all that its references lead to below `$defs`, each of them once. A
        reference that leads nowhere allows anything."""
        self.collect(self.root)
        while self.unresolved:
            schema, around = self.unresolved.pop()
            target = self.target(schema["$ref"], around)
            if isinstance(target, dict):
                self.collect(target)
                if id(target) not in self.names:
                    self.define(target, schema["$ref"])
                self.targets[id(schema)] = self.names[id(target)]
        definitions = self.definitions.items()
        names = {name: self.rewritten(schema, whole=True) for name, schema in definitions}
        return {**self.rewritten(self.root, whole=True), **given(**{"$defs": names})}

    def collect(self, start: JSON) -> None:
        """Note what is in this schema: references and labels."""
        stack: list[tuple[Any, tuple[JSON, ...]]] = [(start, ())]
        while stack:
            schema, around = stack.pop()
            if not isinstance(schema, dict) or id(schema) in self.known:
                continue
            self.known.add(id(schema))
            if DEFINITIONS.keys() & schema.keys():
                around = (schema, *around)
            self.labels.setdefault(get_or_empty(schema, "$id", str), schema)
            self.labels.setdefault("#" + get_or_empty(schema, "$anchor", str), schema)
            if isinstance(schema.get("$ref"), str):
                self.unresolved.append((schema, around))
            stack += [(inner, around) for inner in subschemas(schema)]

    def target(self, reference: str, around: tuple[JSON, ...]) -> Any:
        """What a reference leads to, None if nothing; it may begin at a schema around it."""
        base, _, fragment = reference.partition("#")
        document = self.labels.get(base) if base else self.root
        fragment = urllib.parse.unquote(fragment)
        if not fragment:
            return document
        if not fragment.startswith("/"):
            return self.labels.get("#" + fragment)
        targets = (at_pointer(place, fragment) for place in (document, *around))
        return next((target for target in targets if target is not None), None)

    def define(self, target: JSON, reference: str) -> None:
        """Give a subschema a name, which is like the end of the reference."""
        tail = urllib.parse.unquote(reference).rpartition("/")[2]
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", tail.strip("#")) or "root"
        while name in self.definitions:
            name = f"{name}_{len(self.definitions)}"
        self.names[id(target)] = name
        self.definitions[name] = target

    def rewritten(self, schema: Any, whole: bool = False) -> Any:
        """A subschema in the form of localized(): by its name if it has one, unless whole."""
        if not isinstance(schema, dict):
            return schema
        if id(schema) in self.names and not whole:
            return {"$ref": f"#/$defs/{self.names[id(schema)]}"}
        out: JSON = {}
        for key, value in mapped_schema(schema, self.rewritten).items():
            if key not in DEFINITIONS and (not isinstance(value, dict) or key in OBJECT_KEYWORDS):
                out[key] = value
        if id(schema) in self.targets:
            out["$ref"] = f"#/$defs/{self.targets[id(schema)]}"
        elif "$ref" in out and not str(out["$ref"]).startswith("#/$defs/"):
            # One below `$defs` stays: Gemini complains of it, and the schema is put in words.
            out.setdefault("description", f"See {out.pop('$ref')}")
        return out


def subschemas(schema: JSON) -> Iterator[Any]:
    """What is directly in a schema under a keyword of JSON Schema's."""
    for key in SUBSCHEMAS:
        value = schema.get(key)
        yield from value if isinstance(value, list) else [value]
    for key in (*NAMED_SUBSCHEMAS, "definitions"):
        yield from get_or_empty(schema, key, dict).values()


def at_pointer(document: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901), or None; both names of definitions will do."""
    value = document
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key, value.get(DEFINITIONS.get(key, key)))
        elif isinstance(value, list) and re.fullmatch(r"\d{1,6}", key):
            value = next(iter(value[int(key) :]), None)
        else:
            return None
    return value


def nullable_enum(schema: JSON) -> JSON:
    """An enum with null, as a choice between the rest of it and null."""
    rest = {key: value for key, value in schema.items() if key not in ("enum", "type")}
    values = [value for value in schema["enum"] if value is not None]
    if not values:
        return {**rest, "type": "null"}
    kinds = schema.get("type")
    if isinstance(kinds, list):
        kinds = [kind for kind in kinds if kind != "null"]
        if len(kinds) == 1:
            kinds = kinds[0]
    choice = {"anyOf": [{**given(type=kinds), "enum": values}, {"type": "null"}]}
    if "anyOf" in rest:
        return {"allOf": [choice, rest]}
    return {**rest, **choice}


def lone_reference(schema: JSON) -> JSON:
    """A $ref without neighbours: they go outside of a choice of one."""
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    reference = {"$ref": schema["$ref"]}
    if "anyOf" in rest:
        return {"allOf": [reference, rest]}
    if any(not key.startswith("$") for key in rest):
        return {"anyOf": [reference], **rest}
    return {**rest, **reference}


# What clients call Google's own tools, but for the dates at the end -> Gemini's key. Google's own
# names are written in either case: https://ai.google.dev/api/caching#Tool
HOSTED_TOOLS = (
    (r"web_?search|google_?search$", "googleSearch"),
    (r"web_?fetch|url_?context$", "urlContext"),
    (r"code_?interpreter|code_?execution", "codeExecution"),
    (r"google_?maps$", "googleMaps"),
)


def restricts(setting: Any) -> bool:
    """Whether a setting of an MCP server's lets some of its tools be called, and others not."""
    if not isinstance(setting, dict):
        return bool(setting)
    rest = [value for key, value in setting.items() if key != "enabled"]
    return setting.get("enabled") is False or any(map(restricts, rest))


def hosted_key(name: str) -> str | None:
    """Gemini's key of a tool of Google's, which a client calls so; None for other tools."""
    return next((key for start, key in HOSTED_TOOLS if re.match(start, name, re.I)), None)


MCP = "mcpServers"


class Tools:
    """What Gemini may call: functions of the client's, and Google's own tools."""

    def __init__(self) -> None:
        self.declared: dict[str, JSON] = {}  # Gemini's name of each function -> its declaration
        self.names: dict[str, str] = {}  # Gemini's name -> the client's
        self.custom: set[str] = set()  # the client's names of functions that take plain text
        self.local: set[str] = set()  # functions that stand for LOCAL_TOOLS
        self.namespaces: dict[str, str] = {}  # the client's name of a function -> its namespace
        self.finder: str | None = None  # the function with which the client searches for tools
        self.strict = False  # whether a call must keep to its schema
        self.hosted: dict[str, tuple[str, Any]] = {}  # Google's own -> (client's words, settings)

    def declare(
        self,
        function: Fields,
        name: str,
        description: str | None,
        schema: JSON | None,
        custom: bool = False,
    ) -> None:
        """Add a function under the client's name; the first one of that name counts."""
        key = gemini_name(name)
        declaration = {"name": key, **given(description=description)}
        # Some models refuse an object without properties.
        if schema and (schema.get("properties") or any(map(schema.get, OPEN_ENDED))):
            declaration["parametersJsonSchema"] = gemini_schema(schema)
        if self.declared.setdefault(key, declaration) != declaration:
            function.ignore(function.path)
            return
        self.names[key] = name
        if custom:
            self.custom.add(name)

    def withdraw(self, name: str) -> None:
        """Take out the function, else the tool of Google's, that the client calls so."""
        key = gemini_name(name)
        if self.names.get(key) == name:
            del self.declared[key], self.names[key]
        else:
            self.hosted.pop(hosted_key(name) or "", None)

    def host(self, tool: Fields) -> bool:
        """Add one of Google's own tools, by its type or as Google writes it; whether it is one."""
        kind = tool.get("type", str)
        named = kind or tool.data.keys() & {"name", "function"}
        keys = {name: hosted_key(name) for name in ([kind or ""] if named else tool.data)}
        for name, key in keys.items():
            if key:
                settings = {} if named else tool.get(name, dict) or {}
                within_depth(settings, tool.path_of(name))
                self.host_with(key, f"tools[].{name}", settings)
        return any(keys.values())

    def host_with(self, key: str, words: str, settings: JSON) -> None:
        """Add one with settings. One that comes twice keeps those of both."""
        self.hosted.setdefault(key, (words, {}))[1].update(settings)

    def host_mcp(self, server: Fields, keys: Sequence[str], words: str) -> None:
        """Add a remote MCP server. Gemini uses all of its tools, so one that restricts them is left
        out, and named as ignored in these words."""
        name_key, url_key, token_key, restriction_key = keys
        if restricts(server.get_any(restriction_key)) or not server.data.get(url_key):
            server.ignore_whole(words)
            return
        url = server.require(url_key, str)
        public_url(url, server.path_of(url_key), "a public https URL")
        headers = dict(server.get("headers", dict) or {})
        for name, value in headers.items():
            if type(value) is not str:
                raise wrong_type(server.path_of(f"headers.{name[:80]}"), (str,), value)
        token = server.get(token_key, str)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        transport = {"url": url, **given(headers=headers)}
        entry = {"name": server.require(name_key, str), "streamableHttpTransport": transport}
        server.mark_read("server_description")
        self.hosted.setdefault(MCP, (words, []))[1].append(entry)


class ToolChoice(NamedTuple):
    """Which tools a model may call, and how."""

    mode: str | None = None  # Gemini's; None leaves it to the model
    names: Sequence[str] = ()  # the client's names of the functions that it may call; (): all
    parallel: bool = True  # whether it may call several at a time
    hosted: bool = True  # whether it may use Google's own


def tool_fields(tools: Tools, choice: ToolChoice, model: Model, body: Fields) -> JSON:
    """The request's `tools` and `toolConfig`."""
    listed: list[JSON] = []
    hosted: list[JSON] = []
    if tools.declared:
        listed.append({"functionDeclarations": list(tools.declared.values())})
    for key, (words, settings) in tools.hosted.items():
        if not choice.hosted:
            break
        if (listed and not model.mixes_tools) or (key == MCP and not model.mcp):
            body.ignore(words)
        else:
            hosted.append({key: settings})
    config = given(includeServerSideToolInvocations=bool(hosted and listed))
    listed += hosted
    if tools.declared and (choice.mode or tools.strict):
        names = [gemini_name(name) for name in choice.names]
        mode = choice.mode or "VALIDATED"
        config["functionCallingConfig"] = given(mode=mode, allowedFunctionNames=names)
    return given(tools=listed, toolConfig=config)


# ---- whole requests ----

ANY_JSON: JSON = {}  # the schema of an answer that may be any JSON


def json_words(schema: JSON) -> Part:
    """The schema of the answer in words, for models that do not take the settings beside tools."""
    words = "\n\nWhen you answer without calling a function, answer with nothing but JSON, "
    words += "without a code fence"
    if not schema:
        return text_part(f"{words}.")
    return text_part(f"{words}, that conforms to this JSON Schema:\n{encode_json(schema)}")


def generate_call(
    model: Model, stream: bool, system: list[Part], history: list[JSON], config: JSON, **fields: Any
) -> GeminiCall:
    """The call for a history, whose turns are put right here. Gemini wants one turn at least."""
    turns = valid_turns(history, model) or [user_turn(text_part(""))]
    parts = [part for part in system if has_content(part)]
    body: JSON = {"contents": turns}
    if parts and model.system:
        body["systemInstruction"] = {"parts": parts}
    elif parts:
        body["contents"] = [user_turn(*parts), *turns]
    if config:
        body["generationConfig"] = config
    body.update(fields)
    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    return GeminiCall(f"{model.path}:{verb}", body, model, stream, generates=True)


MAX_EMBED_INPUTS = 2048  # as https://platform.openai.com/docs/api-reference/embeddings has it
MAX_EMBED_BATCH = 100  # inputs in one call, as https://github.com/vercel/ai has it


# https://ai.google.dev/gemini-api/docs/embeddings#supported-task-types, and what other makers'
# clients say for them (https://docs.cohere.com/reference/embed, NVIDIA's and Voyage's).
TASK_NAMES = (
    "RETRIEVAL_QUERY RETRIEVAL_DOCUMENT SEMANTIC_SIMILARITY CLASSIFICATION CLUSTERING "
    "QUESTION_ANSWERING FACT_VERIFICATION CODE_RETRIEVAL_QUERY"
)
TASK_TYPES = {
    **dict.fromkeys(("query", "search_query"), "RETRIEVAL_QUERY"),
    **dict.fromkeys(("document", "passage", "search_document"), "RETRIEVAL_DOCUMENT"),
    **{name.lower(): name for name in TASK_NAMES.split()},
}


def embed_calls(
    model: Model, texts: list[str], dimensions: int | None, task: str | None = None
) -> tuple[GeminiCall, ...]:
    """The calls for the vectors of these texts, and one to count tokens if vectors lack a count."""
    if len(texts) > MAX_EMBED_INPUTS:
        message = (
            f"Invalid 'input': array too long. Expected an array with maximum length "
            f"{MAX_EMBED_INPUTS}, but got an array with length {len(texts)} instead."
        )
        raise ProxyError(400, message, code="array_above_max_length", path="input")
    settings = given(outputDimensionality=dimensions or model.dimensions, taskType=task)
    calls: list[GeminiCall] = []
    for i in range(0, len(texts), MAX_EMBED_BATCH):
        contents = [{"parts": [text_part(text)]} for text in texts[i : i + MAX_EMBED_BATCH]]
        requests = [{"model": model.path, "content": content, **settings} for content in contents]
        calls.append(GeminiCall(f"{model.path}:batchEmbedContents", {"requests": requests}, model))
    if not model.counts_vectors:
        body = {"contents": [user_turn(*map(text_part, texts))]}
        calls.append(GeminiCall(f"{model.path}:countTokens", body, model, optional=True))
    return tuple(calls)


MODELS_CALL = GeminiCall("models")  # Gemini's whole list, which section 15 keeps for minutes

# ---- repairs: each changes a request, and returns the names of what it left out ----


class RefusedCall(NamedTuple):
    """A call that Gemini refused, while it is repaired."""

    body: JSON
    config: JSON  # its generationConfig
    message: str
    left_out: tuple[str, ...]  # by earlier repairs

    def parts(self) -> list[Part]:
        return [part for content in self.body["contents"] for part in content["parts"]]


def drop_field(owners: Iterable[JSON], key: str, name: str) -> list[str]:
    """Take a field from all that have it; its name for clients, where any has it."""
    holders = [owner for owner in owners if key in owner]
    for owner in holders:
        del owner[key]
    return [name for _ in holders[:1]]


def without(key: str, name: str = "") -> Callable[[RefusedCall], list[str]]:
    """The repair that leaves out this setting, which clients know by that name."""
    return lambda refused: drop_field((refused.body, refused.config), key, name or key)


# What to try in place of a level that a model does not have, which its name does not always tell.
NEXT_LEVELS = {"XHIGH": "HIGH", "MEDIUM": "HIGH", "MINIMAL": "LOW"}


def other_thinking(refused: RefusedCall) -> list[str]:
    """The level that comes next, where it is about a level; else the model's own way."""
    thinking = refused.config.get("thinkingConfig", {})
    level = thinking.get("thinkingLevel", "")
    if level in NEXT_LEVELS and f"level {level} " in refused.message:
        thinking["thinkingLevel"] = NEXT_LEVELS[level]
        return ["thinkingLevel"]
    return drop_field((refused.config,), "thinkingConfig", "thinkingConfig")


def without_signatures(refused: RefusedCall) -> list[str]:
    """Tool calls get the placeholder in place of their signatures, other parts get nothing."""
    name = "thoughtSignature"
    signed = [part for part in refused.parts() if part.get(name, PLACEHOLDER) != PLACEHOLDER]
    names = drop_field(signed, name, name)
    for part in signed:
        if "functionCall" in part:
            part[name] = PLACEHOLDER
    return names


def without_call_ids(refused: RefusedCall) -> list[str]:
    items = [part[key] for part in refused.parts() for key in CALLS_AND_RESULTS & part.keys()]
    return drop_field(items, "id", "tool_call_id")


def without_prefill(refused: RefusedCall) -> list[str]:
    refused.body["contents"].append(user_turn(text_part(GO_ON)))
    return ["prefill"]


def without_mcp(refused: RefusedCall) -> list[str]:
    """The call without remote MCP servers, which Vertex AI and some models do not take."""
    tools = refused.body.get("tools", ())
    rest = [tool for tool in tools if MCP not in tool]
    if len(rest) == len(tools):
        return []
    refused.body["tools"] = rest
    if len(rest) == 1:  # functions alone
        refused.body.get("toolConfig", {}).pop("includeServerSideToolInvocations", None)
    return ["mcp"]


BOUNDS = (
    *(f"{end}{what}" for end in ("max", "min") for what in ("Items", "Length", "Properties")),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minContains", "maxContains", "uniqueItems", "pattern", "format"),
)
BARE_REFUSAL = "request contains an invalid argument"  # all that Gemini says of many things
SCHEMA_PREFIX = "schema."  # the names of what a schema lost begin with it


def looser_schemas(refused: RefusedCall) -> list[str]:
    """The request with schemas that hold Gemini to less: without bounds, else in words.

    A bare refusal may be about anything, and so must have bounds to be taken for one of a schema.
    """
    body = refused.body
    functions = [
        entry for tool in body.get("tools", ()) for entry in tool.get("functionDeclarations", ())
    ]
    schemas = [get_or_empty(function, "parametersJsonSchema", dict) for function in functions]
    schemas.append(get_or_empty(refused.config, "responseJsonSchema", dict))
    names = {name for schema in schemas for name in loosened(schema, refused.message)}
    before = any(name.startswith(SCHEMA_PREFIX) for name in refused.left_out)
    if names or not any(schemas) or (BARE_REFUSAL in refused.message.lower() and not before):
        return sorted(names)
    for function in functions:
        describe_parameters(function)
    if "responseJsonSchema" in refused.config:
        system = body.setdefault("systemInstruction", {"parts": []})
        system["parts"].append(json_words(refused.config.pop("responseJsonSchema")))
    return ["schema"]


def loosened(schema: JSON, message: str) -> set[str]:
    """Take bounds from a schema, or what requires a loop if that is it; the names of those."""
    if "ref loop" in message:
        return without_required_loops(schema)
    names: set[str] = set()
    for inner in every_schema(schema):
        for key in inner.keys() & BOUNDS:
            del inner[key]
            names.add(SCHEMA_PREFIX + key)
    return names


def every_schema(schema: Any) -> Iterator[JSON]:
    """A schema and all that are in it."""
    stack = [schema]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack += subschemas(value)


def without_required_loops(schema: JSON) -> set[str]:
    """Let properties be left out through which a definition leads back to itself."""
    definitions = get_or_empty(schema, "$defs", dict)
    groups = loops_of({name: referred_names(inner) for name, inner in definitions.items()})
    names: set[str] = set()
    for name, definition in definitions.items():
        for inner in every_schema(definition):
            properties = get_or_empty(inner, "properties", dict).items()
            required = get_or_empty(inner, "required", list)
            loops = {key for key, value in properties if groups[name] & referred_names(value)}
            rest = [key for key in required if str(key) not in loops]
            if rest != required:
                inner["required"] = rest
                names.add(SCHEMA_PREFIX + "required")
    return names


def referred_names(schema: Any) -> set[str]:
    """The names of the definitions that a schema refers to."""
    references = {get_or_empty(inner, "$ref", str) for inner in every_schema(schema)}
    return {reference[len("#/$defs/") :] for reference in references}


def loops_of(targets: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """For each definition all those that it leads to and that lead back to it, and itself.

    In proportion to the references: Kosaraju's algorithm.
    """
    sources: dict[str, list[str]] = {name: [] for name in targets}
    for name, others in targets.items():
        for other in others & targets.keys():
            sources[other].append(name)
    left: list[str] = []  # in the order in which a walk in depth leaves them
    seen: set[str] = set()
    stack = [(name, False) for name in targets]
    while stack:
        name, leaving = stack.pop()
        if leaving:
            left.append(name)
        elif name not in seen:
            seen.add(name)
            stack += [(name, True), *((other, False) for other in sources[name])]
    groups: dict[str, set[str]] = {}
    for name in reversed(left):
        group: set[str] = set()
        pending = [name]
        while pending:
            other = pending.pop()
            if other not in groups:
                groups[other] = group
                group.add(other)
                pending += targets[other] & targets.keys()
    return groups


def describe_parameters(function: JSON) -> None:
    """Put the schema of a function in words; of itself the outline stays."""
    schema = function.get("parametersJsonSchema")
    outlines = {
        name: {key: value[key] for key in ("type", "description") if key in value}
        for name, value in get_or_empty(schema, "properties", dict).items()
        if isinstance(value, dict)
    }
    outline = {"type": "object", "properties": outlines}
    if not schema or schema == outline:
        return
    words = f"The arguments must conform to this JSON Schema:\n{encode_json(schema)}"
    function["description"] = "\n".join(filter(None, (function.get("description"), words)))
    function["parametersJsonSchema"] = outline


# What Gemini's 400 says, and the repair for another attempt. Models change faster than this file.
# Words without a source are guesses by the names of the fields.
REPAIRS = (
    # https://github.com/RooCodeInc/Roo-Code/issues/10700
    (r"thinking.?(level|budget)|thinking is not|thinking_config", other_thinking),
    # https://github.com/PublicAffairs/openai-gemini/issues/63: it does not say which penalty
    (r"penalty is not enabled|presence_?penalty", without("presencePenalty")),
    (r"penalty is not enabled|frequency_?penalty", without("frequencyPenalty")),
    # announced for coming models: https://ai.google.dev/gemini-api/docs/changelog
    (r"\btemperature\b", without("temperature")),
    (r"\btop_?p\b", without("topP", "top_p")),
    (r"\btop_?k\b", without("topK", "top_k")),
    (r"\bseed\b", without("seed")),
    # https://github.com/stackblitz-labs/bolt.diy/issues/955: more than a model can write
    (r"max_?output_?tokens value", without("maxOutputTokens", "max_tokens")),
    (r"\bstop(_?sequences?| sequences?)?\b", without("stopSequences", "stop")),
    (r"service.?tier", without("serviceTier")),
    (r"media.?resolution", lambda call: drop_field(call.parts(), "mediaResolution", "detail")),
    (r"media.?resolution", without("mediaResolution", "media_resolution")),
    (r"mcp.?server", without_mcp),
    # reported after a change of the model or the key: "Corrupted thought signature."
    # Vertex AI's words: https://github.com/RooCodeInc/Roo-Code/issues/11716
    (r"(invalid|corrupted) thought.?signature|signature is not valid", without_signatures),
    # Vertex AI until September 2026: https://github.com/vercel/ai/issues/15664
    (r"unknown name \"id\" at '[\w.[\]]*function_", without_call_ids),
    # https://github.com/pipecat-ai/pipecat/issues/5821
    (r"must not end with|ending with a model turn", without_prefill),
    # reported, with many bounds, with recursion, and for schemas that are large or deep
    (
        rf"^{BARE_REFUSAL}|too many states|ref loop|schema|function_declarations\[\d+\]\.param",
        looser_schemas,
    ),
)


def repaired(call: GeminiCall, message: str) -> tuple[GeminiCall | None, list[str]]:
    """(the call without what Gemini's message complains of, the names of that), or (None, [])."""
    body = json.loads(encode_json(call.body or {}))
    refused = RefusedCall(body, body.get("generationConfig", {}), message, call.left_out)
    names: list[str] = []
    if "contents" in body:
        for pattern, repair in REPAIRS:
            if re.search(pattern, message, re.I):
                names += repair(refused)
    if not names:
        return None, []
    return call._replace(body=body, left_out=(*call.left_out, *names)), names


# ---- signatures ----


def canonical(value: Any) -> Any:
    """A value whose JSON is the same whoever wrote it: some clients turn 1.0 into 1, and Home
    Assistant's Ollama integration leaves out arguments that are null or empty texts."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        full = {key: inner for key, inner in value.items() if inner not in (None, "")}
        return {key: canonical(inner) for key, inner in full.items()}
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return value


def unsigned_part(part: Part) -> JSON:
    """A part without what clients drop or rename: ids and signatures."""
    out = {key: value for key, value in part.items() if key != "thoughtSignature"}
    for key in CALLS_AND_RESULTS & out.keys():
        out[key] = without_id(out[key])
    return out


class ConversationDigest:
    """Digests that tie a tool call to what led to it: system and turns before, name, arguments."""

    def __init__(self, body: JSON, scope: str):
        system = [
            unsigned_part(part) for part in body.get("systemInstruction", {}).get("parts", ())
        ]
        self.hash = hashlib.sha256(json.dumps([scope, system]).encode())
        self.seen: dict[str, int] = {}

    def turn(self, content: JSON) -> None:
        """Go on past a turn."""
        parts = [unsigned_part(part) for part in content["parts"]]
        self.hash.update(json.dumps([content["role"], canonical(parts)], sort_keys=True).encode())
        self.seen = {}

    def call(self, name: str, args: JSON) -> str:
        """The digest of the next call in the turn that follows; equal calls differ by order."""
        digest = self.hash.copy()
        call = json.dumps([name, canonical(args)], sort_keys=True)
        self.seen[call] = self.seen.get(call, -1) + 1
        digest.update(f"{call}{self.seen[call]}".encode())
        return digest.hexdigest()


def digested_calls(call: GeminiCall, scope: str) -> list[tuple[ToolCall, str]]:
    """(a tool call, its digest) for each one in a history, in order."""
    body = call.body or {}
    contents = body.get("contents", ())
    calls: list[tuple[ToolCall, str]] = []
    if not any("functionCall" in part for content in contents for part in content["parts"]):
        return calls
    conversation = ConversationDigest(body, scope)
    for content in contents:
        for item in (part["functionCall"] for part in content["parts"] if "functionCall" in part):
            tool_call = ToolCall(item["name"], item["args"], id=item.get("id", ""))
            calls.append((tool_call, conversation.call(tool_call.name, tool_call.args)))
        conversation.turn(content)
    return calls


def restore_signatures(
    call: GeminiCall, known_calls: Iterable[ToolCall] = ()
) -> tuple[GeminiCall, list[str]]:
    """(the call with the signatures and hosted parts that its history lost, their origins).

    `known_calls` are its tool calls as Gemini made them, as far as that is known. On Gemini 3 the
    first one of a turn needs a signature: https://ai.google.dev/gemini-api/docs/thought-signatures
    """
    body = call.body or {}
    mixed = body.get("toolConfig", {}).get("includeServerSideToolInvocations")
    every_known = itertools.chain(known_calls, itertools.repeat(ToolCall("", {})))
    contents: list[JSON] = []
    origins: list[str] = []
    for content in body.get("contents", ()):
        parts: list[Part] = []
        required = call.model is not None and call.model.signs  # of the turn's next tool call
        for part in content["parts"]:
            restored = part
            if "functionCall" in part:
                known = next(every_known)
                restored, origin = signed_part(part, known, required)
                origins.append(origin)
                required = False
                if mixed:
                    parts += known.before
            parts.append(restored)
        contents.append({**content, "parts": parts})
    signed = call._replace(body={**body, **given(contents=contents)})
    return signed, [origin for origin in origins if origin]


def signed_part(part: Part, known: ToolCall, required: bool) -> tuple[Part, str]:
    """(a tool call with its signature, the origin of that); "" where it needs none."""
    if part.get("thoughtSignature"):
        return part, "client"
    if known.signature:
        return {**part, "thoughtSignature": known.signature}, "memory"
    if required:
        return {**part, "thoughtSignature": PLACEHOLDER}, "placeholder"
    return part, ""


# ======================================================================================
# 4. Reading Gemini: from bytes to chunks to events; refusals, usage, citations
# ======================================================================================

# ---- refusals ----


def get_or_empty(value: Any, key: str, kind: type) -> Any:
    """The value under a key if both are what they should be, else an empty one of this kind."""
    if isinstance(value, dict) and type(value.get(key)) is kind:
        return value[key]
    return kind()


def gemini_refusal(status: int, answer: Any, raw: bytes = b"") -> ProxyError:
    """What a refusal means to the client; `answer` is the JSON of its `raw` bytes, None if none.

    The class of the status and Gemini's own words survive. https://google.aip.dev/193; the error is
    in a list where a stream was asked for without SSE.
    """
    if isinstance(answer, list) and answer:
        answer = answer[0]
    error = get_or_empty(answer, "error", dict)
    details = [detail for detail in get_or_empty(error, "details", list) if type(detail) is dict]
    message = (
        get_or_empty(error, "message", str)
        or get_or_empty(answer, "error", str)
        or get_or_empty(answer, "message", str)
        or unknown_refusal(status, raw)
    )
    code = refusal_code(status, details, message)
    headers: dict[str, str] = {}
    retry_after = 0.0 if status in (500, 502, 503, 504, 529) else None
    if status == 429:
        retry_after = retry_delay(details, message)
    if status == 429 and retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if code == "insufficient_quota":  # OpenAI's and Anthropic's SDKs obey the header
        retry_after, headers["x-should-retry"] = None, "false"
    elif code == "invalid_api_key":  # Gemini's status for it is 400
        status = 401
    elif not 400 <= status <= 599:
        status = 502
    return ProxyError(
        status, message, code=code, headers=headers, upstream=True, retry_after=retry_after
    )


def unknown_refusal(status: int, raw: bytes) -> str:
    text = " ".join(raw[:200].decode("utf-8", "replace").split())
    message = f"Gemini, or something on the way to it, answered with status {status}"
    return f"{message}: {text}" if text else f"{message}."


def refusal_code(status: int, details: list[JSON], message: str) -> str | None:
    """OpenAI's word for a refusal: https://platform.openai.com/docs/guides/error-codes"""
    reasons = [get_or_empty(detail, "reason", str) for detail in details]
    if status == 401 or "API_KEY_INVALID" in reasons:
        return "invalid_api_key"
    if status == 400 and re.search(r"API key (not valid|not found|expired)", message, re.I):
        return "invalid_api_key"
    if status == 404:
        return "model_not_found"
    if status == 429:
        violations = (get_or_empty(detail, "violations", list) for detail in details)
        quotas = [get_or_empty(item, "quotaId", str) for items in violations for item in items]
        daily = any("PerDay" in quota for quota in quotas)
        if daily or re.search(r"limit: 0\b", message):  # waiting does not help
            return "insufficient_quota"
        return "rate_limit_exceeded"
    if 400 <= status <= 599 and "exceeds the maximum number of tokens" in message:
        return "context_length_exceeded"
    return None


def in_known_words(error: ProxyError, too_long: str, counted: str) -> str:
    """What an error says. That a prompt is too long comes in the words of the client's API, upon
    which clients compact (OVERFLOW_MESSAGES in strands-agents 1.62), and then in Gemini's.

    `counted` says it with the tokens, their maximum and the excess.
    """
    if error.code != "context_length_exceeded":
        return error.message
    numbers = [*map(int, re.findall(r"\d{4,15}", error.message))]
    if len(numbers) == 2:
        too_long = counted.format(*numbers, numbers[0] - numbers[1])
    return f"{too_long} ({error.message})"


def retry_delay(details: list[JSON], message: str) -> float | None:
    """The seconds to wait by RetryInfo, else by Gemini's words; None if it does not say."""
    for detail in details:
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,12})?)s", get_or_empty(detail, "retryDelay", str))
        if match:
            return float(match.group(1))
    match = re.search(r"retry in (\d{1,6}(?:\.\d{1,12})?)(m?s)", message)
    if not match:
        return None
    return float(match.group(1)) / {"s": 1, "ms": 1000}[match.group(2)]


class SilenceError(ProxyError):
    """Gemini was silent for too long."""


# Why an alias's next model is asked, by the status of Gemini's refusal.
FALLBACK_REASONS = {404: "not_found", 429: "quota", 503: "overloaded", 529: "overloaded"}


def fallback_reason(error: ProxyError) -> str:
    """Why another model may answer what failed like this; "" where it would fail as well."""
    if isinstance(error, SilenceError):
        return "silent"
    return FALLBACK_REASONS.get(error.status, "") if error.upstream else ""


def invalid_answer(what: str) -> ProxyError:
    return ProxyError(502, f"Gemini's answer makes no sense: {what}.", upstream=True)


def read_count(answers: Iterable[Iterable[JSON]]) -> int:
    """The tokens that a countTokens call counted."""
    count = next(chunk.get("totalTokens") for chunks in answers for chunk in chunks)
    if type(count) is not int:
        raise invalid_answer("a count without a number")
    return count


# ---- chunks ----


def read_json(data: bytes) -> Any:
    """The JSON that Gemini sent, or None where it is none."""
    try:
        return decode_json(data.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None


def read_chunk(data: bytes) -> JSON:
    """A GenerateContentResponse, or the answer of another method; raises an error in its place."""
    chunk = read_json(data)
    first = chunk[0] if isinstance(chunk, list) and chunk else chunk
    if isinstance(first, dict) and "error" in first:
        code = get_or_empty(get_or_empty(first, "error", dict), "code", int)
        raise gemini_refusal(code if 400 <= code <= 599 else 502, first)  # the 200 does not count
    if not isinstance(chunk, dict):
        raise invalid_answer(f"expected a JSON object, but got {len(data)} bytes of something else")
    return chunk


MAX_ANSWER_BYTES = 64 << 20  # of a whole answer, or of one event of a stream
TOO_LONG = f"it has more than {MAX_ANSWER_BYTES >> 20} MiB"


def read_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines in blocks of bytes, cut anywhere; CR, LF or both end a line, U+2028 does not."""
    pieces: list[bytes] = []  # of a line that has not ended yet; it may be megabytes long
    after_cr, length = False, 0
    for block in filter(None, blocks):
        lines = block.splitlines()
        if after_cr and block[:1] == b"\n":  # it belongs to the CR at the end of the last block
            del lines[0]
        after_cr = block[-1:] == b"\r"
        if block[-1:] in (b"\r", b"\n"):
            lines.append(b"")  # the beginning of the next line
        pieces += lines[:1]
        length += len(lines[0])
        if length > MAX_ANSWER_BYTES:
            raise invalid_answer(TOO_LONG)
        if len(lines) > 1:
            yield b"".join(pieces)
            yield from lines[1:-1]
            pieces = lines[-1:]
            length = len(lines[-1])
    if any(pieces):
        yield b"".join(pieces)


def read_sse(blocks: Iterable[bytes]) -> Iterator[JSON]:
    """The chunks in Gemini's event stream: https://html.spec.whatwg.org/#parsing-an-event-stream

    An error in mid-stream comes as an event, or as bare JSON lines outside of any; both are raised.
    """
    data: list[bytes] = []
    stray: list[bytes] = []
    size = 0  # of the event that has not ended yet
    for raw_line in read_lines(blocks):
        line = raw_line.removeprefix(codecs.BOM_UTF8)
        size += len(line)
        if size > MAX_ANSWER_BYTES:
            raise invalid_answer(TOO_LONG)
        if line[:5] == b"data:":
            data.append(line[5:])
        elif not line and data:
            yield read_chunk(b"\n".join(data))
            data, size = [], 0
        elif line.partition(b":")[0] not in (b"", b"event", b"id", b"retry"):
            stray.append(line)
    if data:
        yield read_chunk(b"\n".join(data))
    if stray:
        read_chunk(b"\n".join(stray))
        raise invalid_answer("it has lines outside of any event")


# ---- events ----


class Text(NamedTuple):
    text: str
    thought: bool = False  # a summary of the model's thoughts, not its answer


class ToolCall(NamedTuple):
    """A function call; its id is ours."""

    name: str  # Gemini's; from chat_events on, the client's
    args: JSON
    signature: str | None = None
    id: str = ""
    before: tuple[Part, ...] = ()  # of Gemini's own tools, which it wants back before the call


class Media(NamedTuple):
    mime: str
    data: str  # base64

    def url(self) -> str:
        return f"data:{self.mime};base64,{self.data}"


class Citation(NamedTuple):
    """A source, and the characters of the answer that rest on it."""

    start: int
    end: int
    url: str
    title: str


class End(NamedTuple):
    """How an answer ended; always the last event, and the only one of its kind."""

    finish: str  # "stop", "length", "filter" or "failed"
    calls: tuple[ToolCall, ...]  # all that Gemini made, by its own names, whatever the client gets
    reason: str  # Gemini's own word
    message: str  # and what it says about it
    usage: Usage
    citations: list[Citation]
    queries: tuple[str, ...] = ()  # what Gemini searched the web for
    signature: str = ""  # of the text, the last one


Event = Union[Text, ToolCall, Media, End]

# Of a long answer that ends here because a call may take no longer. Another call goes on with it:
# types.py and _extra_utils.py of https://github.com/googleapis/python-genai
CONTINUES = "CONTINUATION"


def continuation_token(chunk: JSON) -> str:
    """With which the next call goes on from this chunk; "" where none must."""
    for candidate in get_or_empty(chunk, "candidates", list):
        if get_or_empty(candidate, "finishReason", str) == CONTINUES:
            return str(get_or_empty(candidate, "continuationToken", str))
    return ""


# Gemini's finish reasons in four words; what is not here is "stop", since the list grows every few
# months: https://ai.google.dev/api/generate-content#FinishReason, and google-genai's types.
FINISHES = {
    "": "filter",  # a blocked prompt has a block reason instead
    **dict.fromkeys(("STOP", "1"), "stop"),  # numbers: as some recorders write the enum
    **dict.fromkeys(("MAX_TOKENS", "2", CONTINUES), "length"),
    **dict.fromkeys(("SAFETY", "3", "RECITATION", "4", "LANGUAGE", "BLOCKLIST", "SPII"), "filter"),
    **dict.fromkeys(("PROHIBITED_CONTENT", "MODEL_ARMOR", "IMAGE_OTHER", "NO_IMAGE"), "filter"),
    **dict.fromkeys(("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"), "filter"),
    **dict.fromkeys(("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL"), "failed"),
    **dict.fromkeys(("TOO_MANY_TOOL_CALLS", "MALFORMED_RESPONSE"), "failed"),
    "MISSING_THOUGHT_SIGNATURE": "failed",
}


def get_or_502(value: JSON, key: str, kind: type) -> Any:
    """The value under a key of Gemini's, an empty one if there is none; a 502 for another kind."""
    inner = value.get(key)
    if inner is None:
        return kind()
    if type(inner) is not kind:
        raise invalid_answer(f"{key} is {kind_of(inner)}")
    return inner


def first_candidate(chunk: JSON) -> JSON:
    """The candidate of a chunk, or an empty one: every call asks for one only."""
    for candidate in get_or_502(chunk, "candidates", list):
        if not isinstance(candidate, dict):
            raise invalid_answer("a candidate is no object")
        if not candidate.get("index"):
            return candidate
    return {}


def read_gemini(chunks: Iterable[JSON], exchange: Exchange) -> Iterator[Event]:
    """What Gemini says, in order, and one End; a 502 where it never ends.

    Calls come last, when the answer is complete: a client must not act on one that Gemini takes
    back, or that its own servers have answered. Of finish reasons and token counts the last ones
    count, as seen in recordings: a STOP is not always the end, and counts are running figures.
    """
    reading = Reading()
    for chunk in chunks:
        candidate = reading.absorb(chunk)
        if exchange.first_usage is None:
            exchange.first_usage = reading.usage
        for part in get_or_502(get_or_502(candidate, "content", dict), "parts", list):
            event = reading.read_part(part)
            if event is not None:
                yield event
    usage = reading.whole_usage()
    exchange.model_status = reading.model_status or exchange.model_status
    exchange.usage = exchange.usage.plus(usage)
    if not reading.reason and not reading.blocked:
        message = "Gemini's answer broke off: it ended without a finish reason."
        raise ProxyError(502, message, upstream=True)
    calls = [call for call in reading.calls if call.name not in reading.answered]
    calls = [call._replace(id=exchange.new_id("call_")) for call in calls]
    yield from calls
    yield reading.end(tuple(calls), usage)


GROUNDING = {"groundingMetadata", "citationMetadata", "urlContextMetadata"}


class Reading:
    """What the chunks of one answer have said so far."""

    def __init__(self) -> None:
        self.usage: JSON = {}
        self.earlier: list[JSON] = []  # the usage of calls that this answer has gone on from
        self.grounding: JSON = {}
        self.model_status: JSON = {}
        self.reason = self.message = self.blocked = self.signature = ""
        self.pieces: list[tuple[str, bool]] = []  # (text, whether it is Gemini's own, not ours)
        self.calls: list[ToolCall] = []
        # Parts of Gemini's own tools, for the call that comes next:
        # https://ai.google.dev/gemini-api/docs/tool-combination
        self.before: list[Part] = []
        self.answered: set[str] = set()  # functions that Gemini's servers have answered

    def absorb(self, chunk: JSON) -> JSON:
        """Take in what a chunk says besides its parts; returns its candidate."""
        if self.reason == CONTINUES and chunk.get("candidates"):  # the first of the next call
            self.earlier.append(self.usage)
            self.usage, self.reason = {}, ""
        self.usage = get_or_502(chunk, "usageMetadata", dict) or self.usage
        if "modelStatus" in chunk:
            self.model_status = get_or_empty(chunk, "modelStatus", dict)
        if "promptFeedback" in chunk:
            feedback = get_or_502(chunk, "promptFeedback", dict)
            self.blocked = get_or_502(feedback, "blockReason", str) or self.blocked
        candidate = first_candidate(chunk)
        self.reason = str(candidate.get("finishReason") or "") or self.reason
        self.message = get_or_502(candidate, "finishMessage", str) or self.message
        for key in GROUNDING & candidate.keys():
            self.grounding.update(given(**get_or_502(candidate, key, dict)))
        return candidate

    def read_part(self, part: Any) -> Text | Media | None:
        """The event of one part; None where it has nothing for the client yet."""
        if not isinstance(part, dict):
            raise invalid_answer("a part is no object")
        if "text" in part:
            if "thoughtSignature" in part:
                signature: str = get_or_empty(part, "thoughtSignature", str)
                if is_base64(signature):
                    self.signature = signature
            return self.text(get_or_502(part, "text", str), part.get("thought") is True)
        if "functionCall" in part:
            self.calls.append(read_call(part, tuple(self.before)))
            self.before = []
        elif "functionResponse" in part:
            response = get_or_502(part, "functionResponse", dict)
            self.answered.add(get_or_502(response, "name", str))
        elif "toolCall" in part or "toolResponse" in part:
            self.before.append(part)
        elif not part.get("thought"):
            return self.read_output(part)
        return None

    def read_output(self, part: Part) -> Text | Media | None:
        """Media, and code that Gemini ran, as Markdown: the protocols have no part for it."""
        if "inlineData" in part:
            data = get_or_502(part, "inlineData", dict)
            return Media(get_or_502(data, "mimeType", str), get_or_502(data, "data", str))
        if "executableCode" in part:
            code = get_or_502(part, "executableCode", dict)
            language = get_or_502(code, "language", str).lower()
            return self.text(fenced(get_or_502(code, "code", str), language), own=False)
        output = get_or_502(get_or_502(part, "codeExecutionResult", dict), "output", str)
        return self.text(output and fenced(output), own=False)

    def whole_usage(self) -> Usage:
        """The tokens of all calls of this answer. They have one prompt."""
        first, *others = map(read_usage, (*self.earlier, self.usage))
        for usage in others:
            first = first.plus(usage._replace(prompt=0, cached=0, audio_input=0, image_input=0))
        return first

    def text(self, text: str, thought: bool = False, own: bool = True) -> Text | None:
        """The event of a text, in which citations count; `own` is whether Gemini wrote it so."""
        if not text:
            return None
        if not thought:
            self.pieces.append((text, own))
        return Text(text, thought)

    def end(self, calls: tuple[ToolCall, ...], usage: Usage) -> End:
        finish = FINISHES.get(self.reason, "stop")
        queries: tuple[str, ...] = ()
        citations: list[Citation] = []
        if self.grounding:
            searches = get_or_empty(self.grounding, "webSearchQueries", list)
            queries = tuple(query for query in searches if isinstance(query, str))
            citations = read_citations(self.pieces, self.grounding)
        reason = self.reason or self.blocked
        message, signature = self.message, self.signature
        return End(finish, calls, reason, message, usage, citations, queries, signature)


def read_call(part: Part, before: tuple[Part, ...]) -> ToolCall:
    call = get_or_502(part, "functionCall", dict)
    signature = get_or_502(part, "thoughtSignature", str) or None
    if signature and not is_base64(signature):
        raise invalid_answer("thoughtSignature is not base64")
    name, args = get_or_502(call, "name", str), get_or_502(call, "args", dict)
    return ToolCall(name, args, signature, before=before)


def fenced(text: str, language: str = "") -> str:
    return "\n```{}\n{}\n```\n".format(language, text.rstrip("\n"))


def read_usage(usage: JSON) -> Usage:
    """The token counts of a usageMetadata: thoughts are output, tools' results are prompt."""
    counts = {key: max(0, number) for key, number in usage.items() if type(number) is int}.get
    prompt, output = modality_tokens(usage, "prompt"), modality_tokens(usage, "candidates")
    thoughts = counts("thoughtsTokenCount", 0)
    return Usage(
        prompt=counts("promptTokenCount", 0) + counts("toolUsePromptTokenCount", 0),
        cached=counts("cachedContentTokenCount", 0),
        output=counts("candidatesTokenCount", 0) + thoughts,
        thoughts=thoughts,
        audio_input=prompt.get("AUDIO", 0),
        audio_output=output.get("AUDIO", 0),
        image_input=prompt.get("IMAGE", 0),
    )


def modality_tokens(usage: JSON, name: str) -> dict[str, int]:
    """The tokens of the prompt, or of the candidates, by modality."""
    tokens: dict[str, int] = {}
    for item in get_or_empty(usage, f"{name}TokensDetails", list):
        kind = get_or_empty(item, "modality", str)
        tokens[kind] = tokens.get(kind, 0) + max(0, get_or_empty(item, "tokenCount", int))
    return tokens


def read_citations(pieces: list[tuple[str, bool]], grounding: JSON) -> list[Citation]:
    """The sources of an answer. Gemini counts bytes of its text, a Citation characters of ours."""
    sources = [grounding_source(item) for item in get_or_empty(grounding, "groundingChunks", list)]
    spans = [
        (get_or_empty(support, "segment", dict), sources[i])
        for support in get_or_empty(grounding, "groundingSupports", list)
        for i in get_or_empty(support, "groundingChunkIndices", list)
        if type(i) is int and 0 <= i < len(sources)
    ]
    spans += [(source, source) for source in get_or_empty(grounding, "citationSources", list)]
    pages = dict.fromkeys(pages_read(grounding))
    if not spans and not pages:
        return []
    text = CitedText(pieces)
    citations: list[Citation] = []
    for span, source in spans:
        url = get_or_empty(source, "uri", str)
        if url:
            start, end = map(text.character, text.span_of(span))
            citations.append(Citation(start, end, url, get_or_empty(source, "title", str) or url))
            pages.pop(url, None)
    return citations + [Citation(0, text.length, url, url) for url in pages]


def pages_read(grounding: JSON) -> list[str]:
    """The addresses that Gemini has read for the whole answer: UrlMetadata in types.py of
    https://github.com/googleapis/python-genai"""
    pages = get_or_empty(grounding, "urlMetadata", list)
    status = "urlRetrievalStatus"
    read = [page for page in pages if get_or_empty(page, status, str).endswith("_SUCCESS")]
    return [*filter(None, (get_or_empty(page, "retrievedUrl", str) for page in read))]


def grounding_source(item: Any) -> JSON:
    """The source in one of the groundingChunks, which is under "web", "maps" or the like, or {}."""
    if not isinstance(item, dict):
        return {}
    return next((source for source in item.values() if get_or_empty(source, "uri", str)), {})


# Of UTF-8: 1 where a character begins.
FIRST_BYTES = bytes(not 0x80 <= byte < 0xC0 for byte in range(256))


class CitedText:
    """Gemini's own text of an answer, in which bytes are counted, and where it stands in ours."""

    def __init__(self, pieces: list[tuple[str, bool]]):
        self.data = "".join(text for text, own in pieces if own).encode("utf-8", "surrogatepass")
        # The characters that have begun by each byte of it, and by its end.
        self.counts = array.array("I", itertools.accumulate(self.data.translate(FIRST_BYTES)))
        self.ends: list[int] = []  # of our pieces, in characters of Gemini's text
        self.shifts: list[int] = []  # of each of these, and of the end: what is ours before it
        own_length = shift = 0
        for text, own in pieces:
            if own:
                own_length += len(text)
                self.ends.append(own_length)
                self.shifts.append(shift)
            else:
                shift += len(text)
        self.counts.append(own_length + 1)
        self.shifts.append(shift)
        self.length = own_length + shift
        self.patience = 64 * len(self.data)  # bytes to search for words

    def span_of(self, span: JSON) -> tuple[int, int]:
        """The bytes where a segment begins and ends; by its words where numbers do not fit them."""
        start, end = get_or_empty(span, "startIndex", int), get_or_empty(span, "endIndex", int)
        words = get_or_empty(span, "text", str).encode("utf-8", "surrogatepass")
        if words and self.data[start:end] != words and self.patience > 0:
            self.patience -= len(self.data)
            place = self.data.find(words)
            if place >= 0:
                start, end = place, place + len(words)
        return max(0, start), max(0, end)

    def character(self, offset: int) -> int:
        """The character of the answer that stands at a byte of Gemini's own text."""
        own = self.counts[min(offset, len(self.data))] - 1
        return own + self.shifts[bisect.bisect_left(self.ends, own)]


# ======================================================================================
# 5. Conversation: question, history and answer in no dialect; what dialects share
# ======================================================================================

# ---- questions ----


class Chat(NamedTuple):
    """One question to a model, in nobody's dialect; chats and transcripts come to one."""

    model: Model
    system: list[Part]
    contents: list[JSON]  # Gemini's turns, in the client's order
    tools: Tools
    choice: ToolChoice = ToolChoice()
    thinking: Thinking = Thinking()
    sampling: Mapping[str, Any] = {}  # from sampling_config
    schema: JSON | None = None  # of an answer in JSON; ANY_JSON where any will do; None: text
    settings: Mapping[str, Any] = {}  # more of the generationConfig: modalities, speech
    fields: Mapping[str, Any] = {}  # more of the request: Google's own settings
    stream: bool = False


# Of all dialects. (The limit of a recipe has no name that its client knows.)
LIMIT_FIELDS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "options.num_predict"}


def chat_call(chat: Chat, body: Fields) -> GeminiCall:
    """The call for a chat: the only place that decides how its settings combine on each model.

    What has no effect is named as ignored in `body`.
    """
    if chat.model.recipe.source:
        chat = with_recipe(chat)
    model, system, tools = chat.model, chat.system, chat.tools
    config = {key: value for key, value in chat.sampling.items() if value is not None}
    limit = config.get("maxOutputTokens", 0)
    if limit > model.max_output:  # a 400: https://github.com/stackblitz-labs/bolt.diy/issues/955
        limit = config["maxOutputTokens"] = model.max_output
        options = get_or_empty(body.data, "options", dict)
        for field in LIMIT_FIELDS & {*body.data, *(f"options.{key}" for key in options)}:
            body.ignore(f"{field}>{limit}")
    config.update(given(thinkingConfig=thinking_config(chat.thinking, model, limit, body)))
    fields = chat.fields
    if tools.declared or tools.hosted:
        fields = {**tool_fields(tools, chat.choice, model, body), **fields}
    in_words = chat.schema is not None and "tools" in fields and not model.json_with_tools
    if in_words:
        system = [*system, json_words(chat.schema or {})]
    elif chat.schema is not None:
        config["responseMimeType"] = "application/json"
        config.update(given(responseJsonSchema=gemini_schema(chat.schema)))
    config.update(chat.settings)
    call = generate_call(model, chat.stream, system, chat.contents, config, **fields)
    return call._replace(unfence=True) if in_words else call


def with_recipe(chat: Chat) -> Chat:
    """The chat with what its model's recipe puts before it, or sets where the client does not."""
    model, recipe, own = chat.model, chat.model.recipe, chat.system
    history = ollama_history(Fields({"messages": list(recipe.messages)}), model)
    if recipe.system and not any(map(has_content, own)):
        own = [text_part(recipe.system)]
    sampling = {**ollama_sampling(Fields(dict(recipe.options)), model), **chat.sampling}
    system, contents = [*history.system, *own], [*history.contents, *chat.contents]
    return chat._replace(system=system, contents=contents, sampling=sampling)


def count_plan(plan: Plan) -> Plan:
    """The plan to count the tokens of a chat in place of asking it (ai.google.dev/api/tokens)."""
    signed, _ = restore_signatures(plan.calls[-1])  # Gemini may look for them here
    model = signed.model
    assert model is not None
    fields = {key: value for key, value in (signed.body or {}).items() if key != "generationConfig"}
    body = {"generateContentRequest": {"model": model.path, **fields}}
    call = GeminiCall(f"{model.path}:countTokens", body, model)
    return plan._replace(calls=(call,), stream=False)


GAP_INSTRUCTION = (
    "You fill a gap in a text, as an editor's completion does. You get what stands before the gap "
    "and what stands after it. Answer with what belongs into the gap and with nothing else: no "
    "explanation, no code fence, and nothing that is there already."
)
gap_prompt = "<before>{}</before><gap/><after>{}</after>".format
# Before a summary that stands in a history.
SUMMARY_HEAD = "[A summary of what you said and did before this point, in place of it:]\n"

# ---- answers ----


def chat_events(events: Iterable[Event], call: GeminiCall, chat: Chat) -> Iterator[Event]:
    """The events as the client of this chat wants them: functions by its own names for them, one
    call where it wants no more, and JSON without a code fence."""
    texts: list[str] = []
    calls = 0
    for event in events:
        if call.unfence and isinstance(event, Text) and not event.thought:
            texts.append(event.text)
            continue
        if texts and isinstance(event, (ToolCall, End)):  # they come after all of the text
            yield Text(unfenced("".join(texts)))
            texts.clear()
        if not isinstance(event, ToolCall):
            yield event
        elif not calls or chat.choice.parallel:
            calls += 1
            yield event._replace(name=chat.tools.names.get(event.name, event.name))


class Answer(NamedTuple):
    """What a whole answer adds up to."""

    events: list[Text | ToolCall | Media]  # in order; neighbouring texts of one kind are one
    end: End

    @property
    def text(self) -> str:
        return self.joined(thought=False)

    @property
    def calls(self) -> list[ToolCall]:
        return [event for event in self.events if isinstance(event, ToolCall)]

    def joined(self, thought: bool) -> str:
        texts = [event for event in self.events if isinstance(event, Text)]
        return "".join(event.text for event in texts if event.thought == thought)

    def media(self, kind: str = "") -> list[Media]:
        """Those of this kind, such as "image/"."""
        media = [event for event in self.events if isinstance(event, Media)]
        return [event for event in media if event.mime.startswith(kind)]


def answer_of(events: Iterable[Event]) -> Answer:
    """The sum of an answer's events, the last of which is its End."""
    *rest, end = events
    assert isinstance(end, End)
    items: list[Text | ToolCall | Media] = []
    runs: Iterator[tuple[bool | None, Iterator[Any]]]  # of thoughts, of text, of what is neither
    runs = itertools.groupby(rest, key=lambda event: getattr(event, "thought", None))
    for thought, run in runs:
        if thought is None:
            items += run
        else:
            items.append(Text("".join(event.text for event in run), thought))
    return Answer(items, end)


def unfenced(text: str) -> str:
    """The text without the code fence that a model added although told not to."""
    first, newline, rest = text.strip().partition("\n")
    inside_fence = newline and re.fullmatch(r"```\w*", first.rstrip()) and rest.endswith("```")
    return rest[:-3].strip() if inside_fence else text


# Of a delta, as JSON: Go clients read lines of 64 KB at most (bufio.MaxScanTokenSize).
MAX_DELTA = 16_000


def delta_pieces(text: str) -> Iterator[str]:
    """A text in pieces that are small enough for a delta; one piece if it is empty."""
    if len(text) * 12 <= MAX_DELTA or len(encode_json(text)) <= MAX_DELTA:  # 12: "\\ud83d\\ude00"
        yield text
    else:
        middle = len(text) // 2
        yield from delta_pieces(text[:middle])
        yield from delta_pieces(text[middle:])


def media_note(media: Media) -> str:
    """What stands in a text for media that have no place in the client's protocol."""
    return f"\n[Gemini made something of type {media.mime}, for which there is no place here.]\n"


def native_finish(end: End) -> JSON:
    """Gemini's own words for an end that OpenAI has no word for, under OpenRouter's key for it."""
    if end.finish in ("stop", "length") and end.reason in ("STOP", "MAX_TOKENS"):
        return {}
    return {"native_finish_reason": end.reason, **given(finish_message=end.message)}


# ---- messages in histories ----


def no_file_store(part: Fields) -> None:
    if part.get("file_id", str):
        why = "there is no file store behind this server; send the file itself, as base64 in a "
        raise invalid_value(part.path_of("file_id"), why + "data URL")


class History:
    """A conversation as a client's messages tell it, and what they set besides."""

    def __init__(self, model: Model):
        self.model = model
        self.system: list[Part] = []
        self.contents: list[JSON] = []  # Gemini's turns
        self.effort: str | None = None  # of the last message or item that asks for one
        # Of a response, or a chat with the body of one:
        self.tools: list[Fields] = []  # the items that bring more tools
        self.text: Fields | None = None  # the form of the answer, as an item or the body asks
        self.limit: int | None = None  # of tokens

    def add(self, role: str, parts: list[Part]) -> None:
        """Add what one message says; the list of its parts is kept. What the system says after the
        first turn stays in its place: a model obeys it there, and the beginning of the conversation
        does not change."""
        if role in ("assistant", "model"):
            self.contents.append({"role": "model", "parts": parts})
        elif role not in ("system", "developer"):
            self.contents.append({"role": "user", "parts": parts})
        elif self.contents:
            self.contents.append(system_turn(parts))
        else:
            self.system += parts

    def add_texts(self, body: Fields, key: str) -> Iterator[Fields]:
        """Add the messages under this key that are mere texts, as most of a long history are, and
        give the others, each in its turn. A mere text costs a third of what the others do."""
        for i, message in enumerate(body.get(key, list) or ()):
            if is_mere_text(message):
                self.add(message["role"], [text_part(message["content"])])
            else:
                yield body.item(key, i)


def is_mere_text(message: Any) -> bool:
    """Whether a message is the same in every dialect: a role, a text, and nothing else."""
    return (
        type(message) is dict
        and message.keys() == {"role", "content"}
        and message["role"] in ("user", "assistant")
        and type(message["content"]) is str
        and message["content"] != ""
    )


# ---- vectors ----


class EmbedOptions(NamedTuple):
    """What only the answer with vectors can fulfil."""

    vectors: int  # how many
    base64: bool = False
    checks: int = 0  # how many answers come before those with vectors


def read_vectors(answers: AnswerStreams, exchange: Exchange) -> list[list[float]]:
    """The vectors of all batches in order, each of unit length; a 502 where one is missing."""
    options: EmbedOptions = exchange.options
    vectors: list[list[float]] = []
    for call, chunks in zip(exchange.plan.calls[options.checks :], answers):
        for chunk in chunks:
            if not call.optional:
                embeddings = get_or_502(chunk, "embeddings", list)
                vectors += [unit_vector(get_or_empty(one, "values", list)) for one in embeddings]
            usage = get_or_empty(chunk, "usageMetadata", dict)
            tokens = get_or_empty(usage, "promptTokenCount", int)
            tokens = tokens or get_or_empty(chunk, "totalTokens", int)
            exchange.usage = exchange.usage.plus(Usage(prompt=max(0, tokens)))
    if len(vectors) != options.vectors:
        raise invalid_answer(f"{len(vectors)} vectors for {options.vectors} texts")
    return vectors


def unit_vector(values: list[Any]) -> list[float]:
    """A vector of length 1, as OpenAI's are and Gemini's are not once they are cut."""
    try:
        length = math.hypot(*values)
    except (TypeError, OverflowError):
        raise invalid_answer("a vector that is not made of numbers") from None
    if not values or not 0 < length < math.inf:
        raise invalid_answer("an empty vector")
    if abs(length - 1) < 1e-6:
        return values
    return [value / length for value in values]


# ======================================================================================
# 6. OpenAI chat: messages, tools, settings, choices and chunks
# ======================================================================================

# ---- content parts, as in Ollama's messages ----

DETAILS = {"low": "LOW", "high": "HIGH", "original": "HIGH"}


def openai_text_part(part: Fields, model: Model) -> Part:
    key = "refusal" if part.data["type"] == "refusal" else "text"
    return text_part(part.require(key, str))


def openai_link_part(part: Fields, model: Model) -> Part:
    """An image or a video: its URL stands bare or in an object, and `detail` beside it."""
    key = part.data["type"].replace("input_", "").replace("_url", "") + "_url"
    no_file_store(part)
    link, url_key = part, key
    if type(part.data.get(key)) is dict:
        link, url_key = part.require_object(key), "url"
    media = source_part(link, url_key)
    level = DETAILS.get(get_or_empty(link.data, "detail", str))
    if level and model.resolutions and "text" not in media:
        link.mark_read("detail")
        media["mediaResolution"] = {"level": f"MEDIA_RESOLUTION_{level}"}
    return media


def openai_audio_part(part: Fields, model: Model) -> Part:
    if part.data.get("audio_url"):  # Codex's form
        return source_part(part, "audio_url", "audio.wav")
    audio = part.object_or_self("input_audio")
    extension = (audio.get("format", str) or "wav").lower()
    mime = extension_type("." + extension) or "audio/" + extension
    return media_part(audio, "data", audio.require("data", str), mime)


def openai_file_part(part: Fields, model: Model) -> Part:
    file = part.object_or_self("file")
    no_file_store(file)
    name = file.get("filename", str)
    if file.get("file_url", str):
        return source_part(file, "file_url", name)
    data = file.require("file_data", str)
    return media_part(file, "file_data", data, name=name)


def openai_sealed_part(part: Fields, model: Model) -> Part:
    """What only OpenAI can read, such as a result of its own search."""
    part.ignore_whole(f"{without_indexes(part.path)}.encrypted_content")
    return text_part("[sealed content]")


OPENAI_PARTS: dict[str, Callable[[Fields, Model], Part]] = {
    **dict.fromkeys(("text", "input_text", "output_text", "refusal"), openai_text_part),
    **dict.fromkeys(("image_url", "input_image", "video_url", "input_video"), openai_link_part),
    "input_audio": openai_audio_part,
    **dict.fromkeys(("file", "input_file"), openai_file_part),
    "encrypted_content": openai_sealed_part,
}


def openai_parts(message: Fields, key: str, model: Model) -> list[Part]:
    """The parts of a content: a string, a list of typed parts, one such part, or nothing."""
    content = message.get(key, str, list, dict)
    if not content:
        return []
    if type(content) is str:
        return [text_part(content)]
    typed = [message.require_object(key)] if type(content) is dict else message.objects(key)
    parts: list[Part] = []
    for part in typed:
        kind = part.require("type", str)
        if kind not in OPENAI_PARTS:
            raise part.unknown_choice("type", kind, OPENAI_PARTS)
        part.mark_read("annotations", "logprobs", "prompt_cache_breakpoint", "cache_control")
        parts.append(OPENAI_PARTS[kind](part, model))
    return parts


# ---- messages, calls and results ----

EMPTY_ARRAY = "empty array. Expected an array with minimum length 1"
OPENAI_ROLES = ("developer", "system", "user", "assistant", "tool", "function")


def openai_chat_history(body: Fields, model: Model, context: Context) -> History:
    """The messages. Cursor sends the body of a response to chats (BerriAI/litellm#34029)."""
    if body.data.get("input") and not body.data.get("messages"):
        body.mark_read("messages")
        if is_triggered(body):  # no answer of a chat has a place for a compaction
            body.ignore(f"input[].{COMPACTION_TRIGGER}")
        return openai_history(body, model, context)
    if not body.require("messages", list):
        problem = f"{EMPTY_ARRAY}, but got an empty array instead."
        raise wrong_value("messages", f"Invalid 'messages': {problem}")
    history = History(model)
    for message in history.add_texts(body, "messages"):
        openai_turn(message, history)
    return history


def openai_turn(message: Fields, history: History) -> None:
    """Add what one message says."""
    model = history.model
    role = message.require("role", str).lower()
    if role in ("assistant", "model"):
        parts = openai_assistant_parts(message, model)
    elif role in ("tool", "function"):
        parts = [openai_result_part(message, "content", "tool_call_id", model)]
    elif role in OPENAI_ROLES:
        parts = openai_parts(message, "content", model)
    else:
        raise message.unknown_choice("role", role, OPENAI_ROLES)
    history.add(role, parts)


def openai_assistant_parts(message: Fields, model: Model) -> list[Part]:
    """What the model said earlier. Its thoughts do not go back: their signatures stand for them."""
    parts = openai_parts(message, "content", model)
    message.mark_read("reasoning_content", "reasoning", "reasoning_details", "annotations")
    refusal = message.get("refusal", str)
    if refusal:
        parts.append(text_part(refusal))
    for image in message.objects("images"):
        if image.data.get("type") == "image_url":
            parts.append(openai_link_part(image, model))
    parts.extend(map(openai_call_part, message.objects("tool_calls")))
    legacy = message.object("function_call")
    if legacy is not None:
        parts.append(call_part(legacy.require("name", str), call_arguments(legacy)))
    return parts


def openai_call_part(call: Fields) -> Part:
    call.mark_read("type", "index")
    function = call.object("custom")
    if function is not None:
        args = {CUSTOM_INPUT: function.get("input", str) or ""}
    else:
        function = call.require_object("function")
        function.mark_read("index")  # where Ollama has it
        args = call_arguments(function)
    signature = openai_signature(call, function)
    return call_part(function.require("name", str), args, call.get("id", str), signature)


def openai_result_part(
    message: Fields, content: str, id_key: str, model: Model, images: Iterable[Part] = ()
) -> Part:
    """A tool's result, under these keys: text, JSON in a text, or parts. Many clients do not say
    which call it belongs to; valid_turns goes by the order then."""
    name = message.get("tool_name", str) or message.get("name", str)
    parts = [*openai_parts(message, content, model), *images]
    return result_part(name, parts, message.get(id_key, str))


def openai_signature(call: Fields, function: Fields) -> str | None:
    """The thought signature that the client kept for us, in Google's form or other proxies'."""
    call.mark_read("extra_content", "provider_specific_fields")
    function.mark_read("thought_signature", "provider_specific_fields")
    carriers = (
        get_or_empty(get_or_empty(call.data, "extra_content", dict), "google", dict),
        function.data,
        get_or_empty(call.data, "provider_specific_fields", dict),
        get_or_empty(function.data, "provider_specific_fields", dict),
    )
    signatures = (get_or_empty(one, "thought_signature", str) for one in carriers)
    return next(filter(can_sign, signatures), None)


# ---- tools and their choice ----

# The keys of a remote MCP server's name, address and token, and of what restricts it.
OPENAI_MCP = ("server_label", "server_url", "authorization", "allowed_tools")


def openai_tools(body: Fields, *more: Fields) -> Tools:
    """`tools` and the older `functions`, in the form of chats and in the flat one of responses,
    which some clients send to chats; `more` are other lists of tools."""
    tools = Tools()
    deferred: list[str] = []  # what the finder finds
    first = [*openai_tool_list(body)]
    later = (entry for fields in more if fields is not body for entry in openai_tool_list(fields))
    finders = (tool for tool, _, _ in first if tool.data.get("type") == TOOL_SEARCH)
    finder = next((tool for tool in finders if tool.data.get("execution") == "client"), None)
    for tool, namespace, note in first:
        if tool is not finder:
            openai_tool(tool, namespace, note, tools, deferred if finder else None)
    for tool, namespace, note in later:
        openai_tool(tool, namespace, note, tools)
    if finder:
        declare_finder(finder, deferred, tools)
    for function in body.objects("functions"):
        openai_function(function, tools)
    return tools


def openai_tool(
    tool: Fields, namespace: str, note: str, tools: Tools, deferred: list[str] | None = None
) -> None:
    """Add one tool of any type; what Gemini has nothing for is named as ignored. Until the client's
    search has found a deferred one, the model knows its name and what it is for."""
    kind, defers = tool.get("type", str), tool.get("defer_loading", bool)
    if tools.host(tool):
        return
    function = None
    if kind in (None, "", "function", "custom") or "function" in tool.data:
        wrapper = "custom" if kind == "custom" else "function"  # which only chats have
        function = tool.object_or_self(wrapper)
    if function and defers and deferred is not None:
        name = qualified_name(namespace, function.require_text("name"))
        words = " ".join(filter(None, (note, function.get("description", str))))
        deferred.append(f"{name}: {words}")
        function.mark_read(*function.data)
    elif function:
        openai_function(function, tools, kind == "custom", namespace, note)
        tools.strict |= bool(function.get("strict", bool))
    elif kind == "mcp" and tool.get("require_approval", str, dict) == "never":
        tools.host_mcp(tool, OPENAI_MCP, f"tools[].{kind}")
    elif kind in LOCAL_TOOLS and is_local(tool) and kind not in tools.names:
        description = "\n".join([LOCAL_TOOLS[kind].description, *skill_words(tool)])
        tools.declare(tool, kind, description, LOCAL_TOOLS[kind].schema)
        tools.local.add(kind)
    else:  # such as a server whose tools need approval: Gemini calls without asking anybody
        tool.ignore_whole(f"tools[].{kind}")


class LocalTool(NamedTuple):
    """One of OpenAI's tools that the client runs; to Gemini it is a function."""

    description: str
    schema: JSON  # of its parameters
    key: str  # under which an item of a response has the arguments
    rest: Mapping[str, Any] = {}  # what must stand beside them there
    item: Mapping[str, Any] = {}  # what else the item must have

    def fields(self, args: JSON) -> JSON:
        """A call's item: a text where a list of texts belongs, as a model may write it, is the only
        one of its list, since @ai-sdk/openai refuses the whole answer otherwise."""
        lists = [key for key, form in self.schema["properties"].items() if form is TEXTS_SCHEMA]
        texts = {key: [args[key]] for key in lists if isinstance(args.get(key), str)}
        return {self.key: {**self.rest, **args, **texts}, **self.item}


def object_schema(required: Sequence[str], **fields: Any) -> JSON:
    return {"type": "object", "properties": fields, "required": [*required]}


TEXT_SCHEMA: JSON = {"type": "string"}
TEXTS_SCHEMA: JSON = {"type": "array", "items": TEXT_SCHEMA}
TIMEOUT: JSON = {"type": "integer", "description": "Milliseconds after which it is stopped"}
OPERATIONS: JSON = {"type": "string", "enum": ["create_file", "update_file", "delete_file"]}
DIFF: JSON = {
    "type": "string",
    "description": "Of a new file, all lines, each after a '+'. Of an update, hunks: a line '@@', "
    "which may name a line above the change such as a function's head, then lines of the file: "
    "after a blank those that stay, some of them around each change, after a '-' those that go, "
    "after a '+' those that come. Without line numbers and names of files",
}
# https://platform.openai.com/docs/guides/tools-shell, tools-local-shell and tools-apply-patch; what
# must be there: FunctionShellAction and its like in https://github.com/openai/openai-openapi
LOCAL_TOOLS = {
    "shell": LocalTool(
        "Run commands in the user's shell; several run beside each other.",
        object_schema(["commands"], commands=TEXTS_SCHEMA, timeout_ms=TIMEOUT),
        "action",
        {"commands": [], "timeout_ms": None, "max_output_length": None},
        {"environment": {"type": "local"}},
    ),
    "local_shell": LocalTool(
        "Run a program on the user's machine: its name and its arguments.",
        object_schema(
            ["command"], command=TEXTS_SCHEMA, working_directory=TEXT_SCHEMA, timeout_ms=TIMEOUT
        ),
        "action",
        {"type": "exec", "env": {}, "command": []},
    ),
    "apply_patch": LocalTool(
        "Create, update or delete a file of the user's.",
        object_schema(["type", "path"], type=OPERATIONS, path=TEXT_SCHEMA, diff=DIFF),
        "operation",
        {"diff": ""},  # of a new file without lines; one to delete may have it too
    ),
}


def is_local(tool: Fields) -> bool:
    """Whether such a tool runs on the client's machine, and not in a container of OpenAI's."""
    environment = get_or_empty(tool.data, "environment", dict)
    return environment.get("type") in (None, "local")


def skill_words(tool: Fields) -> Iterator[str]:
    """The skills on the client's machine, for its shell."""
    environment = tool.object_or_empty("environment")
    environment.mark_read("type")
    for skill in environment.objects("skills"):
        name, path, what = (skill.require(key, str) for key in ("name", "path", "description"))
        yield f"Skill {name}, whose instructions are in {path}/SKILL.md: {what}"


# A search for tools that the client runs (https://developers.openai.com/api/docs/guides/tools-tool-search);
# without "client", OpenAI's servers would search, and Gemini knows all tools from the start.
TOOL_SEARCH = "tool_search"


def declare_finder(tool: Fields, deferred: list[str], tools: Tools) -> None:
    """Declare the client's search for tools as a function."""
    words = [tool.get("description", str), *deferred]
    if deferred:
        words.insert(1, "It finds these, among others:")
    description = "\n".join(filter(None, words))
    tools.declare(tool, TOOL_SEARCH, description, tool.get("parameters", dict))
    tools.finder = TOOL_SEARCH
    tool.mark_read(*tool.data)


CUSTOM_INPUT = "input"  # the one parameter of a function that takes plain text
CUSTOM_TEXT = {"type": "string", "description": "The text, and nothing else."}
CUSTOM_SCHEMA = object_schema([CUSTOM_INPUT], **{CUSTOM_INPUT: CUSTOM_TEXT})


def openai_function(
    function: Fields, tools: Tools, custom: bool = False, namespace: str = "", note: str = ""
) -> None:
    """Declare one function; `note` describes its namespace."""
    name = qualified_name(namespace, function.require_text("name"))
    words = [note, function.get("description", str)]
    if custom:
        schema = CUSTOM_SCHEMA
        words.append(grammar_words(function))
    else:
        schema = function.get("parameters", dict)
    tools.declare(function, name, "\n".join(filter(None, words)), schema, custom)
    if namespace:
        tools.namespaces[name] = namespace


MAX_NAMESPACE_CHARACTERS = 128  # each function repeats those of its namespace


def openai_tool_list(
    fields: Fields, namespace: str = "", note: str = ""
) -> Iterator[tuple[Fields, str, str]]:
    """The tools, each with its namespace or "", and the first of one with its description."""
    for tool in fields.objects("tools"):
        if tool.data.get("type") != "namespace":
            yield tool, namespace, note
            note = ""
            continue
        tool.mark_read("type")
        inner = qualified_name(namespace, tool.require_text("name"))
        if len(inner) > MAX_NAMESPACE_CHARACTERS:
            why = f"with those around it, it may have {MAX_NAMESPACE_CHARACTERS} characters"
            raise invalid_value(tool.path_of("name"), why)
        yield from openai_tool_list(tool, inner, tool.get("description", str) or "")


def openai_tool_names(fields: Fields) -> list[str]:
    """The names of the functions in a list of tools, which are read once more to be declared."""
    listed = openai_tool_list(Fields(fields.data, fields.path))
    pairs = [(namespace, get_or_empty(tool.data, "name", str)) for tool, namespace, _ in listed]
    return [qualified_name(namespace, name) for namespace, name in pairs if name]


def qualified_name(namespace: str | None, name: str) -> str:
    """The name of a function in a namespace, as real Ollama writes it too."""
    return f"{namespace}.{name}" if namespace else name


def grammar_words(function: Fields) -> str:
    """The grammar of a custom tool's text, in words: Gemini cannot be held to it."""
    form = function.object_or_empty("format")
    form.get("type", str)
    grammar = form.object("grammar") or form
    definition, syntax = grammar.get("definition", str), grammar.get("syntax", str)
    if not definition:
        return ""
    return f"The text must conform to this {syntax} grammar:\n{definition}"


# OpenAI's words for the choice of a tool, and what clients write instead -> Gemini's mode.
TOOL_CHOICES = {
    "auto": None,
    "none": "NONE",
    "required": "ANY",
    "any": "ANY",
    "validated": "VALIDATED",
}


def openai_tool_choice(body: Fields, key: str, tools: Tools) -> ToolChoice:
    """The choice of tools under this key, and `parallel_tool_calls`."""
    parallel = body.get("parallel_tool_calls", bool) is not False
    choice = body.get(key, str, dict)
    mode: str | None = None
    names: list[str] = []
    if choice is None or not tools.declared:
        if choice not in (None, "auto", "none"):
            body.ignore(key)
    elif isinstance(choice, str):
        mode = TOOL_CHOICES[body.choice(key, *TOOL_CHOICES) or "auto"]
    else:
        mode, names = openai_chosen_tools(body.require_object(key), key, tools)
    return ToolChoice(mode, names, parallel, hosted=choice != "none")


def openai_chosen_tools(choice: Fields, key: str, tools: Tools) -> tuple[str | None, list[str]]:
    """(Gemini's mode, the client's names of the functions) of a choice of one tool or of some."""
    kind = choice.get("type", str) or "function"
    callable_kinds = ("function", "custom", *tools.local)
    if kind in callable_kinds:
        return "ANY", [openai_chosen_name(choice, tools)]
    if kind != "allowed_tools":
        choice.ignore_whole(key)
        return None, []
    allowed = choice.object("allowed_tools") or choice
    mode = allowed.choice("mode", "auto", "required")
    names: list[str] = []
    for tool in allowed.objects("tools"):
        if tool.data.get("type", "function") in callable_kinds:
            names.append(openai_chosen_name(tool, tools))
        else:
            tool.ignore(key)
    if not names:
        return "NONE", []
    return TOOL_CHOICES[mode or "auto"] or "VALIDATED", names


def openai_chosen_name(choice: Fields, tools: Tools) -> str:
    """The name of a function, nested or flat, that must be among the tools."""
    if choice.data.get("type") in tools.local:
        return str(choice.require("type", str))
    function = choice.object(choice.get("type", str) or "function") or choice
    name = qualified_name(function.get("namespace", str), function.require("name", str))
    if tools.names.get(gemini_name(name)) != name:
        why = f"no function {name[:80]!r} is among the tools"
        raise invalid_value(function.path_of("name"), why)
    return name


# ---- the request ----

MAX_CHOICES = 128  # of one request


class OpenAIOptions(NamedTuple):
    """What an answer of OpenAI's depends on, but for vectors and responses."""

    legacy: bool = False  # functions in place of tools
    usage: bool = False  # a last chunk with the token counts
    wav: bool = False  # sound as WAV; else in bare samples
    echoes: tuple[str, ...] = ()  # for each choice of a completion what stands before its text
    image_urls: bool = False  # images in data URLs; else in bare base64
    image_event: str = ""  # what the names of an image's events begin with
    speech_events: bool = False  # speech in server-sent events; else in bytes
    transcript_form: str = ""  # such as "json"
    task: str = ""  # "transcribe" or "translate"


def openai_chat_request(body: Fields, context: Context) -> Plan:
    """Chat completions: https://platform.openai.com/docs/api-reference/chat/create"""
    model_name = body.require("model", str)
    model = model_named(model_name, context, "chat")
    history = openai_chat_history(body, model, context)
    legacy = not body.data.get("tools") and bool(body.data.get("functions"))
    chat = openai_question(body, history, "function_call" if legacy else "tool_choice")
    if body.object("web_search_options") is not None:
        chat.tools.host_with("googleSearch", "web_search_options", {})
    sampling, answer_only = openai_chat_sampling(body, model, context, history.limit)
    modes, wav = openai_modalities(body)
    thinking = openai_thinking(body, context, answer_only, chat.thinking.google)
    if history.effort:
        thinking = thinking._replace(effort=history.effort, budget=None)
    settings = {**modes, **chat.settings}
    chat = chat._replace(thinking=thinking, sampling=sampling, settings=settings)
    calls = (chat_call(chat, body),) * (body.number("n", 1, MAX_CHOICES, int) or 1)
    options = OpenAIOptions(legacy, openai_wants_usage(body), wav)
    return Plan(calls, chat.stream, options, model_name, chat=chat)


def openai_question(body: Fields, history: History, choice_key: str) -> Chat:
    """What is alike in chats and responses; the choice of tools is under this key."""
    google = google_objects(body)
    fields, settings, thinking = openai_google(body, google)
    tools = openai_tools(body, *history.tools, *google)
    return Chat(
        history.model,
        history.system,
        history.contents,
        tools,
        openai_tool_choice(body, choice_key, tools),
        Thinking(google=thinking),
        schema=openai_response_format(body, history.text),
        settings=settings,
        fields=fields,
        stream=bool(body.get("stream", bool)),
    )


def openai_wants_usage(body: Fields) -> bool:
    """Whether a stream is to end with a chunk of token counts."""
    options = body.object("stream_options")
    return options is not None and bool(options.get("include_usage", bool))


def openai_chat_sampling(
    body: Fields, model: Model, context: Context, limit: int | None = None
) -> tuple[JSON, bool]:
    """(the sampling, whether its limit is for the answer without its thoughts): the newer limits
    count thoughts, and `max_tokens` does not (googleapis/python-genai#811)."""
    limit = openai_limit(body, "max_completion_tokens", context) or limit
    highest = limit or openai_limit(body, "max_tokens", context)
    return openai_sampling(body, model, highest, context), not limit


def openai_limit(body: Fields, key: str, context: Context) -> int | None:
    """The most tokens that may come out; in Ollama, a number below 1 is no limit."""
    limit = body.number(key, -math.inf if context.ollama else 1, math.inf, int)
    return max(limit or 0, 0) or None


def openai_sampling(body: Fields, model: Model, limit: int | None, context: Context) -> JSON:
    # Ollama has no upper bounds.
    highest, highest_p = (math.inf, math.inf) if context.ollama else (2.0, 1.0)
    return sampling_config(
        body.number("temperature", 0, highest),
        body.number("top_p", 0, highest_p),
        body.get("top_k", int),
        limit,
        body.get("seed", int),
        stop_sequences(body),
        **penalties(body, -2, 2, model),
    )


def openai_effort(body: Fields, reasoning: Fields | None) -> str | None:
    """The effort to think with: a chat's `reasoning_effort`, or `reasoning` of responses, and of
    OpenRouter's and Ollama's chats."""
    effort = body.choice("reasoning_effort", *EFFORTS)
    if effort is not None or reasoning is None:
        return effort
    enabled = {True: "medium", False: "none"}
    return reasoning.choice("effort", *EFFORTS) or enabled.get(reasoning.get("enabled", bool))


def openai_thinking(
    body: Fields, context: Context, answer_only: bool, google: Mapping[str, Any]
) -> Thinking:
    """How to think: as `reasoning_effort` or OpenRouter's `reasoning` say, or Anthropic's
    `thinking`, which LiteLLM has for all models. Who says so gets to see the thoughts."""
    reasoning = body.object("reasoning")
    effort, field = openai_effort(body, reasoning), "reasoning_effort"
    budget: int | None = None
    hidden = False
    if reasoning:
        budget = reasoning.number("max_tokens", 0, math.inf, int)
        hidden = bool(reasoning.get("exclude", bool))
    elif isinstance(body.data.get("thinking"), dict):
        thinking, field = body.require_object("thinking"), "thinking"
        budget = thinking.number("budget_tokens", 0, math.inf, int)
        if thinking.get("type", str) == "disabled":
            budget = 0
    if budget == 0:
        effort, budget = effort or "none", None
    show = not hidden and (effort is not None or budget is not None or context.ollama)
    return Thinking(effort, budget, show, answer_only, field, google)


def openai_response_format(body: Fields, text: Fields | None) -> JSON | None:
    """The schema of the answer, by the `text` of a response or else by a chat's `response_format`:
    ANY_JSON where any JSON will do, None where it is text."""
    form = text.object("format") if text else body.object("response_format")
    if form is None:
        return None
    form.require("type", str)
    kind = form.choice("type", "text", "json_object", "json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_JSON
    if text is None:  # else it is flat
        form = form.require_object("json_schema")
    form.get("name", str)  # a response repeats them
    form.get("strict", bool)
    description = given(description=form.get("description", str))
    return {**description, **(form.get("schema", dict) or ANY_JSON)}


MODALITIES = ("text", "audio", "image")


def openai_modalities(body: Fields) -> tuple[JSON, bool]:
    """(the settings for an answer in other forms than text, whether audio is wanted as WAV)."""
    modalities = [word.lower() for word in body.strings("modalities")]
    for word in modalities:
        if word not in MODALITIES:
            raise body.unknown_choice("modalities", word, MODALITIES)
    if "audio" in modalities:
        audio = body.object_or_empty("audio")
        form = audio.choice("format", "wav", "aac", "mp3", "flac", "opus", "pcm16", "pcm") or "wav"
        pcm = form in ("pcm16", "pcm")
        wav = not pcm and not body.data.get("stream")  # a stream is in pcm16, as OpenAI's
        if not pcm and not (wav and form == "wav"):
            body.ignore("audio.format")
        return speech_config(audio, "voice"), wav
    if "image" in modalities:
        words = [word.upper() for word in ("text", "image") if word in modalities]
        return {"responseModalities": words}, False
    return {}, False


GEMINI_VOICES = (
    "Zephyr Puck Charon Kore Fenrir Leda Orus Aoede Callirrhoe Autonoe Enceladus Iapetus Umbriel "
    "Algieba Despina Erinome Algenib Rasalgethi Laomedeia Achernar Alnilam Schedar Gacrux "
    "Pulcherrima Achird Zubenelgenubi Vindemiatrix Sadachbia Sadaltager Sulafat"
)
# OpenAI's voices, each with one of Gemini's that comes near it, and Gemini's own names:
# https://ai.google.dev/gemini-api/docs/speech-generation
VOICES = {
    "alloy": "Kore",
    "ash": "Orus",
    "ballad": "Algieba",
    "cedar": "Iapetus",
    "coral": "Aoede",
    "echo": "Charon",
    "fable": "Puck",
    "marin": "Leda",
    "nova": "Zephyr",
    "onyx": "Alnilam",
    "sage": "Vindemiatrix",
    "shimmer": "Autonoe",
    "verse": "Fenrir",
    **{name.lower(): name for name in GEMINI_VOICES.split()},
}


def speech_config(fields: Fields, key: str) -> JSON:
    """The settings for an answer in speech; an unknown voice is named as ignored."""
    voice = fields.get(key, str, dict)
    if isinstance(voice, dict):
        voice = get_or_empty(voice, "id", str)
    elif not voice:
        voice = "alloy"
    if voice.lower() not in VOICES:
        fields.ignore(fields.path_of(key))
    name = VOICES.get(voice.lower(), VOICES["alloy"])
    config = {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": name}}}
    return {"responseModalities": ["AUDIO"], "speechConfig": config}


# Google's own settings in a client's body.
GOOGLE_SETTINGS = {
    "cachedContent": str,
    "safetySettings": list,
    "mediaResolution": str,
    "imageConfig": {"aspectRatio": str, "imageSize": str},
    "thinkingConfig": {"thinkingBudget": int, "thinkingLevel": str, "includeThoughts": bool},
}


def snake_case(name: str) -> str:
    return re.sub("([A-Z])", r"_\1", name).lower()


GOOGLE_NAMES = {name for key in GOOGLE_SETTINGS for name in (key, snake_case(key))}


def google_objects(body: Fields) -> list[Fields]:
    """Where they stand (https://ai.google.dev/gemini-api/docs/openai); the last one
    counts. OpenAI's libraries put what is in their `extra_body` at the top level."""
    extra = body.object("extra_body")
    objects = [body.object("google"), extra and extra.object("google")]
    if GOOGLE_NAMES & body.data.keys():
        objects.insert(0, body)
    return [*filter(None, objects)]


def openai_google(body: Fields, objects: Sequence[Fields]) -> tuple[JSON, JSON, JSON]:
    """(fields of the request, of its generationConfig, its thinkingConfig), by what stands in these
    objects and by the service tier."""
    config: JSON = {}
    for one in objects:
        config.update(google_settings(one, GOOGLE_SETTINGS))
    outside = config.keys() & {"cachedContent", "safetySettings"}
    fields: JSON = {key: config.pop(key) for key in sorted(outside)}
    thinking: JSON = config.pop("thinkingConfig", {})
    if "thinkingLevel" in thinking:
        thinking["thinkingLevel"] = thinking["thinkingLevel"].upper()
    if "mediaResolution" in config:
        level = config["mediaResolution"].upper().rpartition("MEDIA_RESOLUTION_")[2]
        config["mediaResolution"] = f"MEDIA_RESOLUTION_{level}"
    tier = body.get("service_tier", str)
    if tier in SERVICE_TIERS:
        fields["serviceTier"] = SERVICE_TIERS[tier]
    elif tier not in (None, "auto", "default"):
        body.ignore("service_tier")
    return fields, config, thinking


# OpenAI's -> Gemini's. Since 2026 OpenAI calls the faster one by both names.
SERVICE_TIERS = {"flex": "flex", "priority": "priority", "fast": "priority"}


def google_settings(fields: Fields, kinds: Mapping[str, Any]) -> JSON:
    """Settings by their names in camelCase; clients may write these in snake_case too."""
    settings: JSON = {}
    for key, kind in kinds.items():
        for name in (snake_case(key), key):
            if isinstance(kind, dict):
                value: Any = google_settings(fields.object_or_empty(name), kind)
            else:
                value = fields.get(name, kind)
            if value not in (None, "", {}):
                settings[key] = value
    return settings


# ---- the answer ----

OPENAI_FINISH = {"length": "length", "filter": "content_filter"}  # else "stop", or "tool_calls"


def openai_finish(end: End, legacy: bool) -> str:
    if not end.calls:
        return OPENAI_FINISH.get(end.finish, "stop")
    return OPENAI_FINISH.get(end.finish, "function_call" if legacy else "tool_calls")


def openai_usage(usage: Usage) -> JSON:
    output = {"reasoning_tokens": usage.thoughts, "audio_tokens": usage.audio_output}
    prediction = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.output,
        "total_tokens": usage.prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": usage.audio_input},
        "completion_tokens_details": {**output, **prediction},
    }


def openai_call_text(call: ToolCall, tools: Tools) -> tuple[str, str, str]:
    """(type, key of the text, text) of a tool call; where a model made up parameters of a custom
    tool, all of them as JSON."""
    if call.name not in tools.custom:
        return "function", "arguments", encode_json(call.args)
    text = call.args.get(CUSTOM_INPUT)
    return "custom", "input", text if isinstance(text, str) else encode_json(call.args)


def openai_call(call: ToolCall, chat: Chat) -> JSON:
    """A tool call. Its signature stands in Google's field, for clients that send back all they get:
    https://ai.google.dev/gemini-api/docs/thought-signatures"""
    kind, key, text = openai_call_text(call, chat.tools)
    entry = {"id": call.id, "type": kind, kind: {"name": call.name, key: text}}
    if call.signature:
        entry["extra_content"] = {"google": {"thought_signature": call.signature}}
    return entry


def citation_fields(citation: Citation, offset: int = 0) -> JSON:
    """A citation of the text that begins at this character of the answer."""
    start, end = max(0, citation.start - offset), max(0, citation.end - offset)
    return {"start_index": start, "end_index": end, "url": citation.url, "title": citation.title}


def openai_annotations(end: End) -> list[JSON]:
    fields = map(citation_fields, end.citations)
    return [{"type": "url_citation", "url_citation": one} for one in fields]


def openai_image(media: Media, index: int) -> JSON:
    """An image in the form of OpenRouter and LiteLLM; OpenAI has none for images in a chat."""
    return {"type": "image_url", "image_url": {"url": media.url()}, "index": index}


def openai_base(exchange: Exchange, prefix: str, kind: str) -> JSON:
    """The first fields of completions and chunks. Clients know an Ollama by its fingerprint."""
    base = {"id": exchange.new_id(prefix), "object": kind, "created": int(exchange.created)}
    base["model"] = exchange.model_name
    if exchange.context.ollama:
        base["system_fingerprint"] = "fp_ollama"
    return base


def openai_chat_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    choices = [openai_choice(i, answer_of(events), exchange) for i, events in enumerate(answers)]
    base = openai_base(exchange, "chatcmpl-", "chat.completion")
    return {**base, "choices": choices, "usage": openai_usage(exchange.usage)}


# The field of thoughts, by Context.ollama: as Ollama has it, or else as clients know it from
# https://api-docs.deepseek.com/guides/reasoning_model
THOUGHTS_KEYS = {True: "reasoning", False: "reasoning_content"}


def openai_choice(index: int, answer: Answer, exchange: Exchange) -> JSON:
    """One answer as a choice of a whole completion."""
    end, legacy = answer.end, exchange.options.legacy
    calls = [openai_call(call, exchange.chat) for call in answer.calls]
    audio = answer.media("audio/")
    images = [media for media in answer.media("") if media not in audio]
    text, thoughts = answer.text, answer.joined(thought=True)
    message: JSON = {"role": "assistant", "content": text, "refusal": None}
    if not text and (calls or audio):
        message["content"] = None
    message["annotations"] = openai_annotations(end)
    if thoughts:
        message[THOUGHTS_KEYS[exchange.context.ollama]] = thoughts
    if calls and legacy:
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    if images:
        message["images"] = [openai_image(image, i) for i, image in enumerate(images)]
    if audio:
        message["audio"] = openai_audio(audio, exchange, text)
    choice = {"index": index, "message": message, "logprobs": None}
    return {**choice, "finish_reason": openai_finish(end, legacy), **native_finish(end)}


def openai_audio(audio: list[Media], exchange: Exchange, transcript: str) -> JSON:
    data = audio_bytes(audio)
    if exchange.options.wav:
        data = wav_file(data, audio[0].mime)
    text, expires_at = base64.b64encode(data).decode(), int(exchange.created) + 3600
    audio_id = exchange.new_id("audio_")
    return {"id": audio_id, "data": text, "expires_at": expires_at, "transcript": transcript}


def openai_chat_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    """Chunks, choice after choice; nothing before Gemini's first event."""
    legacy, usage = exchange.options.legacy, exchange.options.usage
    base = openai_base(exchange, "chatcmpl-", "chat.completion.chunk")
    more = {"usage": None} if usage else {}
    for index, events in enumerate(answers):
        for delta, end in openai_deltas(events, exchange):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            if end:
                choice.update(finish_reason=openai_finish(end, legacy), **native_finish(end))
            yield {**base, "choices": [choice], **more}
    if usage:
        yield {**base, "choices": [], "usage": openai_usage(exchange.usage)}


def openai_deltas(events: Iterable[Event], exchange: Exchange) -> Iterator[tuple[JSON, End | None]]:
    """(delta, the End beside the last one) for the events of one answer. OpenAI's libraries
    concatenate deltas: the role, each id and the annotations come only once."""
    text_keys = {False: "content", True: THOUGHTS_KEYS[exchange.context.ollama]}
    legacy = exchange.options.legacy
    calls = images = audio = 0
    for i, event in enumerate(events):
        if i == 0:
            content = None if isinstance(event, ToolCall) else ""
            yield {"role": "assistant", "content": content}, None
        if isinstance(event, Text):
            for piece in delta_pieces(event.text):
                yield {text_keys[event.thought]: piece}, None
        elif isinstance(event, ToolCall):
            for entry in openai_call_deltas(openai_call(event, exchange.chat)):
                if not legacy:
                    yield {"tool_calls": [{"index": calls, **entry}]}, None
                elif not calls:
                    yield {"function_call": entry["function"]}, None
            calls += 1
        elif isinstance(event, End):
            if audio:
                yield {"audio": {"expires_at": int(exchange.created) + 3600}}, None
            if event.citations:
                yield {"annotations": openai_annotations(event)}, None
            yield {}, event
        elif event.mime.startswith("audio/"):
            delta = {"data": event.data}
            if not audio:
                delta["id"] = exchange.new_id("audio_")
            yield {"audio": delta}, None
            audio += 1
        else:
            yield {"images": [openai_image(event, images)]}, None
            images += 1


def openai_call_deltas(entry: JSON) -> Iterator[JSON]:
    """A tool call in deltas, each with a piece of its arguments, or of its input."""
    key = entry["type"]
    text_key = {"function": "arguments", "custom": "input"}[key]
    first, *rest = delta_pieces(entry[key][text_key])
    yield {**entry, key: {**entry[key], text_key: first}}
    for piece in rest:
        yield {key: {text_key: piece}}


# ======================================================================================
# 7. OpenAI's other endpoints: embeddings, completions, images, speech, transcripts, models
# ======================================================================================

# ---- embeddings ----


def openai_embeddings_request(body: Fields, context: Context) -> Plan:
    """Embeddings: https://platform.openai.com/docs/api-reference/embeddings/create"""
    model_name = body.require("model", str)
    model = model_named(model_name, context, "embedding")
    body.require("input", str, list)
    hint = " (LangChain: check_embedding_ctx_length=False)"
    texts = openai_texts(body, "input", "embedded", hint)
    if "" in texts:
        path = "input"
        if body.data["input"]:
            path = f"input[{texts.index('')}]"
        raise wrong_value(path, f"Invalid '{path}': input cannot be an empty string.")
    form = body.choice("encoding_format", "float", "base64")
    dimensions = body.number("dimensions", 1, 2**31 - 1, int)
    calls = embed_calls(model, texts, dimensions, openai_task_type(body, model))
    return Plan(calls, False, EmbedOptions(len(texts), form == "base64"), model_name)


def openai_task_type(body: Fields, model: Model) -> str | None:
    """What the vectors are for, in Gemini's word; named as ignored where it makes no difference."""
    for key in ("task_type", "input_type"):
        word = body.get(key, str)
        task = TASK_TYPES.get((word or "").lower())
        if task and model.task_types:
            return task
        if word:
            body.ignore(key)
    return None


def openai_texts(body: Fields, key: str, participle: str, hint: str = "") -> list[str]:
    """The texts under this key, one or several. OpenAI's token numbers mean nothing to Gemini."""
    items = body.get(key, str, list)
    if items == []:
        raise wrong_value(key, f"Invalid '{key}': {EMPTY_ARRAY}.")
    if isinstance(items, list) and any(type(item) in (int, list) for item in items):
        reason = f"cannot be {participle} here, since the numbers are OpenAI's; send strings{hint}"
        raise wrong_value(key, f"Invalid '{key}': arrays of tokens {reason}.")
    return body.strings(key)


def openai_embeddings_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    vectors: list[Any] = read_vectors(answers, exchange)
    if exchange.options.base64:
        vectors = [packed(vector) for vector in vectors]
    data = [
        {"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)
    ]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), exchange.usage.prompt)
    return {"object": "list", "data": data, "model": exchange.model_name, "usage": usage}


def packed(vector: list[float]) -> str:
    """Base64 of little-endian 32-bit floats, which OpenAI's libraries ask for by default."""
    floats = array.array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode()


# ---- legacy completions ----

COMPLETION_INSTRUCTION = (
    "You are a text completion engine. Go on from the exact point where the user's text ends, or, "
    "if it is an instruction or a question, with what it asks for. Do not repeat the text, and add "
    "nothing about it."
)
MAX_ECHO = 2**22  # characters of prompts that several choices repeat


def openai_completions_request(body: Fields, context: Context) -> Plan:
    """Legacy completions: https://platform.openai.com/docs/api-reference/completions/create"""
    model_name = body.require("model", str)
    prompts = openai_texts(body, "prompt", "completed") or [""]
    n = body.number("n", 1, MAX_CHOICES, int) or 1
    best = body.number("best_of", 0, 20, int)
    if len(prompts) * n > MAX_CHOICES:
        count = f"{len(prompts)} prompts with {n} choices each are more than {MAX_CHOICES} choices"
        raise invalid_value("prompt", count)
    if best and best > n:
        body.ignore("best_of")  # there are no probabilities to choose by
    chat = openai_completion_chat(body, model_name, context)
    suffix = body.get("suffix", str)
    calls: list[GeminiCall] = []
    for prompt in prompts:
        system, text = COMPLETION_INSTRUCTION, prompt
        if suffix:
            system, text = GAP_INSTRUCTION, gap_prompt(prompt, suffix)
        one = chat._replace(system=[text_part(system)], contents=[user_turn(text_part(text))])
        calls += [chat_call(one, body)] * n
    echoes = [""] * len(calls)
    if body.get("echo", bool):
        echoes = [prompt for prompt in prompts for _ in range(n)]
        if n > 1 and sum(map(len, echoes)) > MAX_ECHO:
            why = f"{n} choices would repeat more than {MAX_ECHO} characters of the prompt"
            raise invalid_value("echo", why)
    options = OpenAIOptions(usage=openai_wants_usage(body), echoes=tuple(echoes))
    return Plan(tuple(calls), chat.stream, options, model_name, chat=chat)


def openai_completion_chat(body: Fields, model_name: str, context: Context) -> Chat:
    """All of a completion but its prompt. A limit is for the text alone: with one, a model thinks
    as little as it can."""
    model = model_named(model_name, context, "chat")
    sampling, _ = openai_chat_sampling(body, model, context)
    effort = openai_effort(body, body.object("reasoning"))
    thinking = Thinking(effort, field="reasoning_effort")
    if effort is None and sampling.get("maxOutputTokens"):
        thinking = Thinking("none")
    stream = bool(body.get("stream", bool))
    return Chat(model, [], [], Tools(), thinking=thinking, sampling=sampling, stream=stream)


def openai_text_choice(index: int, text: str, event: Event) -> JSON:
    """A choice of a completion; the last event of its answer brings the finish reason."""
    choice = {"text": text, "index": index, "logprobs": None, "finish_reason": None}
    if isinstance(event, End):
        choice.update(finish_reason=OPENAI_FINISH.get(event.finish, "stop"), **native_finish(event))
    return choice


def completion_text(event: Event) -> str:
    """What an event adds to a completion's text."""
    if isinstance(event, Media):
        return media_note(event)
    if isinstance(event, Text) and not event.thought:
        return event.text
    return ""


def openai_completions_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    choices: list[JSON] = []
    for index, events in enumerate(answers):
        *rest, end = events
        text = exchange.options.echoes[index] + "".join(map(completion_text, rest))
        choices.append(openai_text_choice(index, text, end))
    base = openai_base(exchange, "cmpl-", "text_completion")
    return {**base, "choices": choices, "usage": openai_usage(exchange.usage)}


def openai_completions_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    """Chunks, choice after choice, in the form of whole completions."""
    options: OpenAIOptions = exchange.options
    base = openai_base(exchange, "cmpl-", "text_completion")
    more = {"usage": None} if options.usage else {}
    for index, events in enumerate(answers):
        before = options.echoes[index]
        for event in events:
            text = completion_text(event)
            if text or isinstance(event, End):
                choice = openai_text_choice(index, before + text, event)
                yield {**base, "choices": [choice], **more}
                before = ""
    if options.usage:
        yield {**base, "choices": [], "usage": openai_usage(exchange.usage)}


# ---- what the media endpoints share ----


def no_media_error(what: str, end: End, text: str = "") -> ProxyError:
    """The error for what Gemini did not make, or not to its end, in its own words."""
    words = end.message or text.strip()[:1000]
    words = f": {words}" if words else "."
    code = {"filter": "content_policy_violation"}.get(end.finish)
    message = f"Gemini made no whole {what} ({end.reason}){words}"
    return ProxyError(400, message, code=code, upstream=True)


def openai_media_usage(usage: Usage, **details: JSON) -> JSON:
    total = usage.prompt + usage.output
    output = {"output_tokens": usage.output, "total_tokens": total}
    return {"input_tokens": usage.prompt, **details, **output}


# ---- images ----

# Those that all models take: https://ai.google.dev/gemini-api/docs/image-generation
RATIOS = ((1, 1), (2, 3), (3, 2), (3, 4), (4, 3), (4, 5), (5, 4), (9, 16), (16, 9), (21, 9))
IMAGE_TYPES = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}


def openai_edits_request(body: Fields, context: Context) -> Plan:
    """Edits: https://platform.openai.com/docs/api-reference/images/createEdit"""
    form_scalars(body, "n", "stream")
    return openai_images_request(body, context, openai_source_images(body), "image_edit")


def openai_images_request(
    body: Fields, context: Context, images: Sequence[Part] = (), event: str = "image_generation"
) -> Plan:
    """Images: https://platform.openai.com/docs/api-reference/images/create"""
    model_name = body.get("model", str)
    model = model_named(model_name or "gpt-image-1", context, "image")
    prompt, n = body.require_text("prompt"), body.number("n", 1, 10, int) or 1
    form = body.choice("response_format", "url", "b64_json")
    output_form = body.choice("output_format", *IMAGE_TYPES.values(), "gif", "svg")
    if output_form not in (None, model.image_format):
        body.ignore("output_format")
    config = {"responseModalities": ["IMAGE"], **openai_image_config(body, model)}
    call = generate_call(model, False, [], [user_turn(*images, text_part(prompt))], config)
    stream = bool(body.get("stream", bool))
    if stream and form == "url":
        body.ignore("response_format")  # events have no field for one
    by_default = form is None and (model_name or "").startswith("dall-e")
    options = OpenAIOptions(image_urls=form == "url" or by_default, image_event=event)
    return Plan((call,) * n, stream, options, model_name or model.name)


def openai_source_images(body: Fields) -> list[Part]:
    """The images to edit: files of a form, or in JSON addresses, bare or in objects."""
    key = "images" if "images" in body.data else "image"
    sources = body.require(key, Upload, str, dict, list)
    if not isinstance(sources, list):
        return [openai_source_image(sources, key, body)]
    if not sources:
        raise wrong_value(key, f"Invalid '{key}': {EMPTY_ARRAY}.")
    return [openai_source_image(source, f"{key}[{i}]", body) for i, source in enumerate(sources)]


def openai_source_image(source: Any, path: str, body: Fields) -> Part:
    if isinstance(source, Upload):
        data = base64.b64encode(source.data).decode()
        if not data:
            raise wrong_value(path, f"Invalid '{path}': the file is empty.")
        part = media_part(Fields({}), path, data, source.mime, source.name)
    elif isinstance(source, str):
        part = source_part(Fields({path: source}), path)
    else:
        image = Fields(source, path, body.tracked)
        no_file_store(image)
        part = source_part(image, "image_url")
    mime: str = get_or_empty(part.get("inlineData"), "mimeType", str)
    if "fileData" not in part and not mime.startswith("image/"):
        formats = "png, jpeg, webp, heic and heif"
        raise wrong_value(path, f"Invalid image at '{path}'. Supported formats: {formats}.")
    return part


def parse_form_or_body(raw: bytes, content_type: str) -> Fields:
    """The client's form, or its JSON."""
    parse = parse_form if FORM_START.match(content_type) else parse_body
    return parse(raw, content_type)


def openai_image_config(body: Fields, model: Model) -> JSON:
    """The imageConfig for `size`: the nearest ratio, and more pixels where the model can."""
    size = (body.get("size", str) or "auto").lower()
    match = re.fullmatch(r"([1-9]\d{1,4})\s*x\s*([1-9]\d{1,4})", size)
    if size == "auto":
        return {}
    if not match:
        raise invalid_value("size", f"{size[:80]!r}. Expected 'auto' or WIDTHxHEIGHT")
    width, height = map(int, match.groups())
    target = math.log(width / height)
    ratio = min(RATIOS, key=lambda ratio: abs(target - math.log(ratio[0] / ratio[1])))
    config = {"aspectRatio": f"{ratio[0]}:{ratio[1]}"}
    side = math.sqrt(width * height)
    if side > 2900 and model.large_images:
        config["imageSize"] = "4K"
    elif side > 1450 and model.large_images:
        config["imageSize"] = "2K"
    return {"imageConfig": config}


def openai_image_results(answers: AnswerStreams) -> Iterator[tuple[Media, Usage]]:
    """(an image, the tokens of its call) for each; a 400 in Gemini's words where there is none."""
    refusal: ProxyError | None = None
    count = 0
    for events in answers:
        answer = answer_of(events)
        images = answer.media("image/")
        for image in images:
            if not is_base64(image.data):
                raise invalid_answer("a picture that is not base64")
            count += 1
            yield image, answer.end.usage
        if not images:
            refusal = no_media_error("picture", answer.end, answer.text)
    if refusal and not count:
        raise refusal


def openai_image_usage(usage: Usage) -> JSON:
    images = min(usage.image_input, usage.prompt)
    details = {"text_tokens": usage.prompt - images, "image_tokens": images}
    return openai_media_usage(usage, input_tokens_details=details)


def openai_images_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    images = [image for image, _ in openai_image_results(answers)]
    data = [{"b64_json": image.data} for image in images]
    if exchange.options.image_urls:
        data = [{"url": image.url()} for image in images]
    form = given(output_format=IMAGE_TYPES.get(images[0].mime))
    usage = openai_image_usage(exchange.usage)
    return {"created": int(exchange.created), "data": data, **form, "usage": usage}


def openai_images_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    """Each image when it is there: Gemini sends no partial ones."""
    for image, usage in openai_image_results(answers):
        yield {
            "type": f"{exchange.options.image_event}.completed",
            "b64_json": image.data,
            "created_at": int(exchange.created),
            **dict.fromkeys(("size", "quality", "background"), "auto"),
            "output_format": IMAGE_TYPES.get(image.mime, image.mime),
            "usage": openai_image_usage(usage),
        }


def openai_images_failure(exchange: Exchange, error: ProxyError) -> list[JSON]:
    """The last event of a stream that failed; in named events, an error has a name too."""
    return [{"type": "error", **openai_error(error)[1]}]


# ---- speech ----

# Bare samples as they come. No error can stand among them, so a failure breaks the answer off.
PCM = Framing("audio/pcm", itemgetter("audio"), keep_alive=None, carries_errors=False)


def openai_speech_request(body: Fields, context: Context) -> Plan:
    """Speech: https://platform.openai.com/docs/api-reference/audio/createSpeech"""
    model_name = body.require("model", str)
    model = model_named(model_name, context, "speech")
    text, manner = body.require_text("input"), body.get("instructions", str)
    form = body.choice("response_format", "mp3", "opus", "aac", "flac", "wav", "pcm") or "mp3"
    events, wav = body.choice("stream_format", "audio", "sse") == "sse", form != "pcm"
    if form not in ("pcm", "wav"):  # WAV is all that the library can make
        body.ignore("response_format")
    # A bare text is sometimes answered in place of being spoken.
    prompt = "\n\n".join(filter(None, (manner, f"Say: {text}")))
    streaming = model.streams_speech and (events or not wav)
    config = speech_config(body, "voice")
    call = generate_call(model, streaming, [], [user_turn(text_part(prompt))], config)
    options = OpenAIOptions(wav=wav, speech_events=events)
    return Plan((call,), events or streaming, options, model_name, SSE if events else PCM)


def openai_speech_response(exchange: Exchange, answers: AnswerStreams) -> Payload:
    answer = answer_of(next(answers))
    audio = answer.media("audio/")
    if not audio or answer.end.finish != "stop":
        raise no_media_error("speech", answer.end, answer.text)
    samples = audio_bytes(audio)
    if exchange.options.wav:
        return Payload(wav_file(samples, audio[0].mime), "audio/wav")
    return Payload(samples, "audio/pcm")


def audio_bytes(audio: list[Media]) -> bytes:
    """The samples of Gemini's speech: 16 bits, little-endian, mono, whatever "audio/L16" means."""
    if not all(is_base64(media.data) for media in audio):
        raise invalid_answer("sound that is not base64")
    return b"".join(decode_base64(media.data) for media in audio)


def wav_file(samples: bytes, mime: str) -> bytes:
    """A WAV file of such samples, at the rate that their MIME type names."""
    rates = re.findall(r"rate=([1-9]\d{3,5})\b", mime) or [24000]  # samples a second
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, int(rates[0]), 0, "NONE", ""))
        file.writeframes(samples)
    return out.getvalue()


def openai_speech_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    """Audio as it comes: events, or the bytes themselves under "audio"."""
    options: OpenAIOptions = exchange.options
    texts: list[str] = []
    begun = False
    for event in next(answers):
        if isinstance(event, Media) and event.mime.startswith("audio/"):
            data = audio_bytes([event])
            if options.wav and not begun:  # the greatest length: players read to the end
                head = wav_file(b"", event.mime)
                data = head[:4] + b"\xff" * 4 + head[8:40] + b"\xff" * 4 + data
            begun = True
            if options.speech_events:
                yield {"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}
            else:
                yield {"audio": data}
        elif isinstance(event, Text) and not event.thought:
            texts.append(event.text)
        elif isinstance(event, End) and (not begun or event.finish != "stop"):
            raise no_media_error("speech", event, "".join(texts))
    if options.speech_events:
        yield {"type": "speech.audio.done", "usage": openai_media_usage(exchange.usage)}


# ---- transcriptions and translations ----

TRANSCRIPT_FORMS = ("json", "text", "srt", "verbose_json", "vtt", "diarized_json")
TIMED_FORMS = TRANSCRIPT_FORMS[2:]
TASKS = {
    "transcribe": "Write down what is said in this recording, word for word, in the language that "
    "is spoken.",
    "translate": "Write down in English what is said in this recording, whatever language is "
    "spoken.",
}
LANGUAGE_WORDS = "the language that is spoken, in English and lower case"
SPEAKER_WORDS = "A for the first speaker, B for the second, and so on"
TIME = {"type": "string", "description": "HH:MM:SS.mmm from the beginning of the recording"}
SEGMENT_SCHEMA = object_schema(
    ["start", "end", "speaker", "text"],
    start=TIME,
    end=TIME,
    text={"type": "string", "description": "a sentence, or a part of one"},
    speaker={"type": "string", "description": SPEAKER_WORDS},
)
TIMED_SCHEMA = object_schema(
    ["language", "segments"],
    language={"type": "string", "description": LANGUAGE_WORDS},
    segments={"type": "array", "items": SEGMENT_SCHEMA},
)


def openai_transcriptions_request(body: Fields, context: Context, task: str = "transcribe") -> Plan:
    """Transcriptions and translations: https://platform.openai.com/docs/api-reference/audio"""
    model_name = body.require("model", str)
    model = model_named(model_name, context, "transcript")
    recording = openai_recording(body)
    forms = {"transcribe": TRANSCRIPT_FORMS, "translate": TRANSCRIPT_FORMS[:5]}
    form = body.choice("response_format", *forms[task]) or "json"
    form_scalars(body, "temperature", "stream")
    stream, timed = bool(body.get("stream", bool)), form in TIMED_FORMS
    if stream and timed:
        body.ignore("stream")  # as whisper-1 does
    if form == "verbose_json" and body.strings("timestamp_granularities") not in ([], ["segment"]):
        body.ignore("timestamp_granularities")
    words = text_part(openai_transcript_words(body, task, timed))
    chat = Chat(
        model,
        [],
        [user_turn(recording, words)],
        Tools(),
        thinking=Thinking("none"),
        sampling={"temperature": body.number("temperature", 0, 2) or 0},
        schema=TIMED_SCHEMA if timed else None,
        stream=stream and not timed,
    )
    options = OpenAIOptions(transcript_form=form, task=task)
    return Plan((chat_call(chat, body),), chat.stream, options, model_name)


def openai_recording(body: Fields) -> Part:
    """The uploaded file, by what it is rather than by what it is called."""
    upload: Upload = body.require("file", Upload)
    if not upload.data:
        raise wrong_value("file", "Invalid 'file': the file is empty.")
    data = base64.b64encode(upload.data).decode()
    by_name = extension_type(upload.name) or upload.mime
    labels = (label for label in (upload.mime, by_name) if label.startswith("audio/"))
    mime = media_type(data, next(labels, by_name), None)
    if not mime.startswith(("audio/", "video/")):
        formats = "flac, m4a, mp3, mp4, mpeg, mpga, oga, ogg, wav and webm"
        raise wrong_value("file", f"Invalid file format. Supported formats: {formats}.")
    return {"inlineData": {"mimeType": mime, "data": data}}


def openai_transcript_words(body: Fields, task: str, timed: bool) -> str:
    """What Gemini is to do with the recording."""
    languages = [*filter(None, body.strings("language") + body.strings("languages"))]
    prompt, keywords = body.get("prompt", str), [*filter(None, body.strings("keywords"))]
    words = [TASKS[task]]
    if timed:
        words.append("Cut it into segments at pauses and at changes of the speaker.")
    else:
        words.append(
            "Answer with these words alone: no times, no names of speakers, no remarks. Without "
            "words, with nothing."
        )
    if languages:
        words.append(f"Spoken is (ISO 639): {', '.join(languages)}.")
    if keywords:
        words.append(f"These words may occur in it, spelt so: {', '.join(keywords)}.")
    if prompt:
        hint = "Spell names and words as in this text, or go on from it, but do not repeat it: "
        words.append(hint + prompt)
    return "\n".join(words)


def openai_transcriptions_response(exchange: Exchange, answers: AnswerStreams) -> JSON | Payload:
    """A transcript in the form that the client wants: JSON, or a Payload of plain text."""
    answer = answer_of(next(answers))
    if answer.end.finish != "stop":
        raise no_media_error("transcript", answer.end, answer.text)
    form = exchange.options.transcript_form
    if form in TIMED_FORMS:
        return openai_timed_transcript(exchange, answer.text)
    text = answer.text.strip()
    if form == "text":
        return Payload(text.encode("utf-8", "replace") + b"\n")
    return {"text": text, "usage": openai_transcript_usage(exchange.usage)}


def openai_timed_transcript(exchange: Exchange, text: str) -> JSON | Payload:
    """A transcript with times, from Gemini's JSON, which has no probabilities."""
    form, task = exchange.options.transcript_form, exchange.options.task
    transcript = parsed_object(unfenced(text))
    if transcript is None:
        raise invalid_answer("the transcript is no JSON")
    segments = [read_segment(segment) for segment in get_or_502(transcript, "segments", list)]
    if form in ("srt", "vtt"):
        return Payload(subtitles(segments, form).encode("utf-8", "replace"))
    fields: JSON = {
        "task": task,
        "duration": max((segment["end"] for segment in segments), default=0.0),
        "text": " ".join(segment["text"] for segment in segments),
    }
    if form == "diarized_json":
        kind = "transcript.text.segment"
        fields["segments"] = [
            {"type": kind, "id": f"seg_{i}", **segment} for i, segment in enumerate(segments)
        ]
        return {**fields, "usage": openai_transcript_usage(exchange.usage)}
    fields["language"] = "english"
    if task == "transcribe":
        fields["language"] = get_or_502(transcript, "language", str)
    fields["segments"] = [openai_segment(i, segment) for i, segment in enumerate(segments)]
    return {**fields, "usage": {"type": "duration", "seconds": math.ceil(fields["duration"])}}


# What Whisper says of a segment that it is sure of; Gemini says no such thing. Clients in Rust
# cannot read a segment that lacks a field (async-openai's TranscriptionSegment), and others drop
# those that seem to be silence.
WHISPERS_FIELDS: JSON = {
    "seek": 0,
    "tokens": [],
    "temperature": 0.0,
    "avg_logprob": 0.0,
    "compression_ratio": 1.0,
    "no_speech_prob": 0.0,
}


def openai_segment(index: int, segment: JSON) -> JSON:
    fields = {key: segment[key] for key in ("start", "end", "text")}
    return {"id": index, **fields, **WHISPERS_FIELDS}


def read_segment(segment: Any) -> JSON:
    """One of Gemini's segments, its times in seconds; a 502 where they make no sense."""
    if not isinstance(segment, dict):
        raise invalid_answer("a segment of the transcript is no object")
    start, end = (read_time(get_or_502(segment, key, str)) for key in ("start", "end"))
    text, speaker = get_or_502(segment, "text", str).strip(), get_or_502(segment, "speaker", str)
    return {"start": start, "end": max(start, end), "text": text, "speaker": speaker or "A"}


def read_time(text: str) -> float:
    """Seconds from [[HH:]MM:]SS[.mmm]."""
    pattern = r"(?:(?:(\d{1,3}):)?(\d{1,4}):)?(\d{1,6}(?:[.,]\d{1,9})?)"
    match = re.fullmatch(pattern, text.strip(), re.A)
    if not match:
        raise invalid_answer(f"a time in the transcript is {text[:40]!r}")
    hours, minutes, seconds = match.groups("0")
    return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", ".")), 3)


def subtitles(segments: list[JSON], form: str) -> str:
    """The segments as SubRip or WebVTT, where no text may hold an empty line or an arrow:
    https://www.w3.org/TR/webvtt1/"""
    blocks = []
    for i, segment in enumerate(segments, 1):
        text = " ".join(segment["text"].split()).replace("-->", "->")
        times = f"{clock(segment['start'])} --> {clock(segment['end'])}"
        if form == "srt":
            times = f"{i}\n{times.replace('.', ',')}"
        blocks.append(f"{times}\n{text}\n")
    if form == "vtt":
        blocks.insert(0, "WEBVTT\n")
    return "\n".join(blocks)


def clock(seconds: float) -> str:
    """HH:MM:SS.mmm"""
    total, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}.{thousandths:03}"


def openai_transcript_usage(usage: Usage) -> JSON:
    audio = min(usage.audio_input, usage.prompt)
    details = {"text_tokens": usage.prompt - audio, "audio_tokens": audio}
    return {"type": "tokens", **openai_media_usage(usage, input_token_details=details)}


def openai_transcriptions_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    texts: list[str] = []
    for event in next(answers):
        if isinstance(event, Text) and not event.thought:
            texts.append(event.text)
            yield {"type": "transcript.text.delta", "delta": event.text}
        elif isinstance(event, End) and event.finish != "stop":
            raise no_media_error("transcript", event)
    usage = openai_transcript_usage(exchange.usage)
    yield {"type": "transcript.text.done", "text": "".join(texts), "usage": usage}


# ---- models ----


def openai_models_request(body: Fields, context: Context) -> Plan:
    return Plan((MODELS_CALL,), model_name=context.params.get("model", ""))


def openai_model_entry(name: str, gemini_entry: JSON, context: Context) -> JSON:
    """A model in OpenAI's form and Anthropic's, in one: no field of theirs has two meanings.
    https://platform.claude.com/docs/en/api/models"""
    owner = "library" if context.ollama else "google"
    created = int(model_created(name, context))
    moment = datetime.datetime.fromtimestamp(created, datetime.timezone.utc)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "type": "model",
        "display_name": get_or_empty(gemini_entry, "displayName", str) or name,
        "created_at": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": get_or_empty(gemini_entry, "inputTokenLimit", int) or None,
        "max_tokens": get_or_empty(gemini_entry, "outputTokenLimit", int) or None,
        "capabilities": anthropic_capabilities(gemini_entry),
    }


def anthropic_capabilities(gemini_entry: JSON) -> JSON:
    """What Anthropic's clients may ask of a model, under all keys that they know: Home Assistant's
    integration sends images, PDFs, thinking and schemas to those models only that say so here."""
    words = ollama_capabilities(gemini_entry)
    names = ("vision", "tools", "thinking", "completion")
    sees, calls, thinks, chats = (name in words for name in names)
    switches = supported(True, "between_tools", "disabled")
    return {
        **supported(False, "batch", "citations", "code_execution", "context_management"),
        **supported(sees, "image_input"),
        **supported(calls, "pdf_input", "structured_outputs"),
        "compaction": {"supported": chats, **supported(chats, "summarize")},
        "effort": {"supported": thinks, **supported(thinks, *ANTHROPIC_EFFORTS)},
        "server_tools": {"supported": calls, **supported(calls, "code_execution", "web_search")},
        "thinking": {
            "supported": thinks,
            "types": {**supported(thinks, "adaptive", "enabled"), **switches},
        },
    }


ANTHROPIC_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def supported(value: bool, *names: str) -> JSON:
    return {name: {"supported": value} for name in names}


def openai_models_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    """All models, or a page as Anthropic's clients ask for it."""
    context = exchange.context
    models = usable_models(answers, context)
    if context.ollama:
        models = {tagged(name): models[name] for name in models if model_of(name).chats}
    data = [openai_model_entry(name, entry, context) for name, entry in models.items()]
    page = openai_page(data, context.query, "after_id", len(data), 1000)
    if "client_version" in context.query:  # Codex wants a list of its own (openai/codex#35758)
        page["models"] = []  # of models with prompts, which would replace Codex's
    return page


def openai_page(
    items: list[JSON], query: Mapping[str, str], after: str, default: int, most: int
) -> JSON:
    """A page of a list: as many items as `limit` says in the query, behind the one that `after`
    names there, or before that of `before_id`."""
    text = query.get("limit", "")
    if text and not (re.fullmatch(r"[1-9]\d{0,3}", text, re.ASCII) and int(text) <= most):
        raise invalid_value("limit", f"it must be between 1 and {most}")
    limit = int(text or default)
    ids = [item["id"] for item in items]
    start, end, more_before = 0, len(items), False
    if query.get(after) in ids:
        start = ids.index(query[after]) + 1
    if query.get("before_id") in ids:
        end = ids.index(query["before_id"])
        start = max(start, end - limit)
        more_before = start > 0
    page_ids = ids[start:end][:limit] or [None]
    return {
        "object": "list",
        "data": items[start:end][:limit],
        "first_id": page_ids[0],
        "last_id": page_ids[-1],
        "has_more": more_before or end - start > limit,
    }


def openai_model_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    name, context = exchange.model_name, exchange.context
    entry = listed_entry(name, answers, context, *ALL_USES)
    if not context.ollama:
        name = plain_name(name, False)
    return openai_model_entry(name, entry, context)


# ---- errors ----

OPENAI_TYPES = {403: "permission_error", 429: "requests"}


def openai_error(error: ProxyError) -> tuple[int, JSON]:
    """OpenAI's form of an error: https://platform.openai.com/docs/guides/error-codes"""
    kind, code = OPENAI_TYPES.get(error.status, "invalid_request_error"), error.code
    if code == "insufficient_quota":
        kind = code
    elif error.status >= 500:
        kind, code = "server_error", code or "server_error"
    words = "This model's maximum context length is"
    counted = words + " {1} tokens. However, your messages resulted in {0} tokens."
    message = in_known_words(error, f"{words} exceeded.", counted)
    body = {"message": message, "type": kind, "param": error.path, "code": code}
    return error.status, {"error": body}


# ======================================================================================
# 8. Responses: from input items to output items; OpenAI's routes
# ======================================================================================

# ---- input items ----


class ResponseHistory(History):
    """A conversation as it grows: each input item adds what it says."""

    def __init__(self, model: Model, context: Context):
        super().__init__(model)
        self.context = context
        self.signatures: dict[str, str] = {}  # call id -> signature, from our own reasoning items
        self.stored: dict[str, dict[str, JSON]] = {}  # key of a response -> its items by id
        self.references: set[str] = set()  # the ids of items referred to
        self.summarized = 0  # turns up to the last summary, the last of them

    def add_item(self, item: Fields) -> None:
        """Add one item, by its type, which messages and references may leave out. One of a type
        that is not known is named as ignored."""
        data = item.data
        item.get("id", str)  # it is stored, and looked up
        if data.get("type") is None and "role" in data:
            kind = "message"
        elif data.get("type") is None and data.get("id") and data.keys() <= {"id", "type"}:
            kind = "item_reference"
        else:
            kind = item.require("type", str)
        if kind in INPUT_ITEMS:
            item.mark_read("type")
            item.get("status", str)
            INPUT_ITEMS[kind](self, item)
        else:
            item.ignore_whole(f"input[].{kind}")

    def add_message(self, item: Fields) -> None:
        item.get("phase", str)
        openai_turn(item, self)

    def add_call(self, item: Fields) -> None:
        """A call of a function or of a custom tool."""
        call_id = item.require("call_id", str)
        name = qualified_name(item.get("namespace", str), item.require("name", str))
        if item.data["type"] == "custom_tool_call":
            args = {CUSTOM_INPUT: item.get("input", str) or ""}
        else:
            args = call_arguments(item)
        signature = openai_signature(item, item) or self.signatures.get(call_id)
        self.contents.append(model_turn(call_part(name, args, call_id, signature)))

    def add_output(self, item: Fields) -> None:
        """The result of such a call."""
        part = openai_result_part(item, "output", "call_id", self.model)
        self.contents.append(user_turn(part))

    def add_local_call(self, item: Fields) -> None:
        """A call of one of OpenAI's tools on the client's machine; to Gemini it is a function."""
        call_id = item.get("call_id", str) or item.get("id", str)
        name = item.data["type"][: -len("_call")]
        rest = LOCAL_TOOLS[name].rest
        fields = item.get("action", dict) or item.get("operation", dict) or {}
        within_depth(fields, item.path)
        item.mark_read("environment", "max_output_length")
        args = {key: value for key, value in fields.items() if (key, value) not in rest.items()}
        signature = self.signatures.get(call_id or "")
        self.contents.append(model_turn(call_part(name, args, call_id, signature)))

    def add_local_output(self, item: Fields) -> None:
        """What such a tool printed: a text, or a list of streams and outcomes."""
        call_id = item.get("call_id", str) or item.get("id", str)
        content = item.get("output", str, list)
        item.mark_read("max_output_length")
        if not isinstance(content, str):
            content = encode_json({"output": content or item.data.get("status")})
        self.contents.append(user_turn(result_part(None, [text_part(content)], call_id)))

    def add_reasoning(self, item: Fields) -> None:
        """The signatures in it. Its words do not go back to the model."""
        item.mark_read("summary", "content")
        text = item.get("encrypted_content", str)
        signatures = text and signatures_in(text, self.model)
        if signatures:
            self.sign_text(signatures.pop(TEXT_SIGNATURE, ""))
            self.signatures.update(signatures)
        elif text:
            item.ignore("input[].encrypted_content")

    def sign_text(self, signature: str) -> None:
        """Give the model's last text its signature, which comes after it (ResponseBuilder)."""
        turns = [turn for turn in self.contents[-1:] if turn["role"] == "model"]
        parts = [turn["parts"][-1] for turn in turns if turn["parts"]]
        if signature and parts and "text" in parts[0]:
            parts[0]["thoughtSignature"] = signature

    def add_image(self, item: Fields) -> None:
        """An image that the model made earlier."""
        item.mark_read("revised_prompt", "background", "output_format", "quality", "size", "action")
        data = item.get("result", str)
        if data:
            self.contents.append(model_turn(media_part(item, "result", data)))

    def add_reference(self, item: Fields) -> None:
        """The stored item with this id, which names its response. A second one is a 400, as with
        OpenAI (continuedev/continue#10723): a short request could repeat a large item endlessly."""
        item_id = item.require("id", str)
        if item_id in self.references:
            why = f"Duplicate item found with id {item_id[:80]}."
            message = f"{why} Remove duplicate items from your input and try again."
            raise ProxyError(400, message, path="input")
        self.references.add(item_id)
        key = reference_key(item_id)
        if key not in self.stored:
            response = stored_response(key, self.context) or {"input": [], "output": []}
            items = response["input"] + response["output"]
            self.stored[key] = {entry["id"]: entry for entry in items}
        entry = self.stored[key].get(item_id)
        if entry is None or entry.get("type") == "item_reference":
            why = "it was not stored, or is forgotten. Send the item itself, or leave it out."
            raise ProxyError(404, f"Item with id '{item_id[:80]}' not found: {why}", path="input")
        self.add_item(Fields(entry, item.path))

    def add_search(self, item: Fields) -> None:
        """A call of the client's search for tools."""
        call_id = item.get("call_id", str)
        item.mark_read("execution")
        if call_id:  # else OpenAI's servers searched
            signature = self.signatures.get(call_id)
            part = call_part(TOOL_SEARCH, call_arguments(item), call_id, signature)
            self.contents.append(model_turn(part))

    def add_tools(self, item: Fields) -> None:
        """More tools, to be declared; those that such a search has found are its result."""
        self.tools.append(item)
        call_id = item.get("call_id", str)
        item.mark_read("role", "execution")
        if call_id:
            content = text_part(encode_json({"tools": openai_tool_names(item)}))
            self.contents.append(user_turn(result_part(TOOL_SEARCH, [content], call_id)))

    def add_summary(self, item: Fields) -> None:
        """The summary in a compaction, in place of all before it but what the user said. A client
        may drop the rest, or leave it: https://developers.openai.com/api/docs/guides/compaction"""
        text = item.get("encrypted_content", str)
        summary: str = get_or_empty(text and unsealed(text), "summary", str)
        if summary:
            if self.summarized:
                self.contents[self.summarized - 1]["parts"].clear()  # the earlier summary
            rest = [turn for turn in self.contents[self.summarized :] if is_users_own(turn)]
            rest.append(user_turn(text_part(SUMMARY_HEAD + summary)))
            self.contents[self.summarized :] = rest
            self.summarized = len(self.contents)
        elif text:
            item.ignore("input[].encrypted_content")

    def add_agent_message(self, item: Fields) -> None:
        """What another agent of the client's said to this one."""
        names = (item.get("author", str), item.get("recipient", str))
        head = text_part("[Message from {} to {}]\n".format(*(name or "?" for name in names)))
        self.contents.append(user_turn(head, *openai_parts(item, "content", self.model)))

    def add_update(self, item: Fields) -> None:
        """Settings that hold from here on, in place of the request's."""
        effort = item.object_or_empty("reasoning").choice("effort", *EFFORTS)
        self.effort = effort or self.effort
        self.text = item.object("text") or self.text

    def skip(self, item: Fields) -> None:
        """A search of Gemini's: the text that followed has its results."""
        item.mark_read(*item.data)


def is_users_own(turn: JSON) -> bool:
    """Whether the user speaks here, and not a tool."""
    return turn["role"] == "user" and not any("functionResponse" in part for part in turn["parts"])


# Codex's names for one, old and new (its protocol/src/models.rs).
COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
COMPACTION_TRIGGER = "compaction_trigger"
INPUT_ITEMS: dict[str, Callable[[ResponseHistory, Fields], None]] = {
    "message": ResponseHistory.add_message,
    "reasoning": ResponseHistory.add_reasoning,
    "item_reference": ResponseHistory.add_reference,
    **dict.fromkeys(("function_call", "custom_tool_call"), ResponseHistory.add_call),
    **dict.fromkeys(
        ("function_call_output", "custom_tool_call_output"), ResponseHistory.add_output
    ),
    **dict.fromkeys((f"{name}_call" for name in LOCAL_TOOLS), ResponseHistory.add_local_call),
    **dict.fromkeys(
        (f"{name}_call_output" for name in LOCAL_TOOLS), ResponseHistory.add_local_output
    ),
    "image_generation_call": ResponseHistory.add_image,
    **dict.fromkeys(("web_search_call", COMPACTION_TRIGGER), ResponseHistory.skip),
    **dict.fromkeys(("additional_tools", "tool_search_output"), ResponseHistory.add_tools),
    "tool_search_call": ResponseHistory.add_search,
    **dict.fromkeys(COMPACTIONS, ResponseHistory.add_summary),
    "agent_message": ResponseHistory.add_agent_message,
    "configuration_update": ResponseHistory.add_update,
}
TEXT_SIGNATURE = ""  # the id of a text among those of the calls


def encrypted_content(calls: list[ToolCall], text_signature: str, model: Model) -> str:
    """The signatures of an answer as an opaque text, which clients send back; "" if none."""
    signatures = {call.id: call.signature for call in calls if call.signature}
    if text_signature:
        signatures[TEXT_SIGNATURE] = text_signature
    if not signatures:
        return ""
    return sealed({"generation": generation_number(model), "signatures": signatures})


def sealed(content: JSON) -> str:
    """What only this program reads, on whatever instance. It is no secret to the client."""
    return base64.b64encode(encode_json(content).encode()).decode()


def unsealed(text: str) -> JSON | None:
    """What sealed() made text of; None where it is another program's."""
    try:
        content = base64.b64decode(text, validate=True).decode()
        check_density(content)  # parse_body saw base64
    except (ValueError, ProxyError):
        return None
    return parsed_object(content)


def signatures_in(text: str, model: Model) -> dict[str, str]:
    """The signatures in an encrypted_content; none if it is not ours, or of other models."""
    content = unsealed(text)
    if get_or_empty(content, "generation", int) != generation_number(model):
        return {}
    signatures: JSON = get_or_empty(content, "signatures", dict)
    return {key: text for key, text in signatures.items() if type(text) is str and is_base64(text)}


# ---- what is stored ----

RESPONSE_PREFIX = "responses:"  # of the keys under which responses are stored; their ids follow


def reference_key(item_id: str) -> str:
    """The key of the response that holds the item with this id, such as "msg_TAIL_i0"."""
    return f"{RESPONSE_PREFIX}resp_{item_id.partition('_')[2].rpartition('_')[0]}"


def openai_keys(body: Fields, context: Context) -> list[str]:
    """The keys of the stored responses that a request builds on, or that its path names."""
    return response_keys({"previous_response_id": context.params.get("id"), **body.data})


def response_keys(request: JSON) -> list[str]:
    """The keys of the stored responses that a request, itself stored or not, builds on."""
    items, previous = request.get("input"), request.get("previous_response_id")
    objects = [item for item in items if type(item) is dict] if type(items) is list else []
    ids = [item.get("id") for item in objects if item.get("type") in (None, "item_reference")]
    keys = [reference_key(item_id) for item_id in ids if type(item_id) is str]
    return [*keys, RESPONSE_PREFIX + previous] if type(previous) is str else keys


def stored_response(key: str, context: Context) -> JSON | None:
    """The response that is stored under this key, and the `input` that it answers; or None."""
    response: JSON | None = json.loads(context.stored.get(key) or "null")
    return response


def past_items(response_id: str | None, context: Context) -> list[JSON]:
    """The items of all responses up to this one, oldest first; OpenAI's 404 if one is missing."""
    past: list[list[JSON]] = []
    while response_id:
        response = stored_response(RESPONSE_PREFIX + response_id, context)
        if response is None:
            message = f"Previous response with id '{response_id[:80]}' not found."
            code, path = "previous_response_not_found", "previous_response_id"
            raise ProxyError(404, message, code=code, path=path)
        past.append(response["input"] + response["output"])
        response_id = response["previous_response_id"]
    return [item for items in reversed(past) for item in items]


def input_items(content: str | list[JSON], tail: str) -> list[JSON]:
    """A request's input as it is stored: items, each with an id that has this tail in it."""
    if isinstance(content, str):
        content = [{"role": "user", "content": content}]
    return [input_item(item, f"{tail}_i{i}") for i, item in enumerate(content)]


PART_KEYS: dict[str, JSON] = {
    "input_image": {"detail": "auto"},
    "output_text": {"annotations": [], "logprobs": []},
}


def input_item(item: JSON, tail: str) -> JSON:
    """An item without nulls, with its type and id, and a message's content as parts."""
    item = {key: value for key, value in without_access(item).items() if value is not None}
    if "role" in item:
        item = {"id": f"msg_{tail}", "type": "message", **item}
    else:
        item = {"id": f"item_{tail}", "type": "item_reference", **item}
    kind = item["type"]
    if kind == "message":
        item["content"] = message_parts(item["role"], item.get("content") or [])
    if kind == "message" or kind.endswith(("_call", "_output")):
        item = {**item, "status": item.get("status") or "completed"}
    return item


def message_parts(role: str, content: str | JSON | list[JSON]) -> list[JSON]:
    """The content of a message as parts, with the keys that these have in every stored one."""
    if isinstance(content, str):
        kind = {"assistant": "output_text"}.get(role, "input_text")
        content = {"type": kind, "text": content}
    parts = [content] if isinstance(content, dict) else content
    return [{**PART_KEYS.get(part["type"], {}), **part} for part in parts]


# ---- the request ----


class ResponseOptions(NamedTuple):
    """What only the answer to a response's request can fulfil."""

    echo: JSON  # what a response repeats of its request
    items: str | list[JSON]  # the input, to be stored
    sources: bool  # whether the client wants those of searches
    compacts: bool  # whether the first answer is a summary of the conversation


# What `include` may name; what else OpenAI has there, Gemini does not have.
SIGNATURES, SOURCES = "reasoning.encrypted_content", "web_search_call.action.sources"


def openai_responses_request(body: Fields, context: Context) -> Plan:
    """Responses: https://platform.openai.com/docs/api-reference/responses/create"""
    model_name = body.require("model", str)
    model = model_named(model_name, context, "chat")
    history = openai_history(body, model, context)
    history.text = history.text or Fields({})
    chat = openai_question(body, history, "tool_choice")
    reasoning, google = body.object_or_empty("reasoning"), chat.thinking.google
    effort = history.effort or openai_effort(body, reasoning)
    summary = openai_summary(reasoning)
    show = summary is not None or bool(google.get("includeThoughts"))
    show = show or (context.ollama and effort != "none")
    included = body.strings("include")
    for name in included:
        if name not in (SIGNATURES, SOURCES):
            body.ignore(f"include.{name}")
    signatures, field = SIGNATURES in included, "reasoning.effort"
    thinking = Thinking(effort, show=show, field=field, google=google, signatures=signatures)
    sampling = openai_sampling(body, model, history.limit, context)
    chat = chat._replace(thinking=thinking, sampling=sampling)
    calls = compacting_calls(chat, body)
    echo = {
        **openai_echo(body, history.text, calls[-1]),
        "model": model_name,
        "parallel_tool_calls": chat.choice.parallel,
        "reasoning": {"effort": effort, "summary": summary},
        "service_tier": chat.fields.get("serviceTier", "default"),
    }
    items, compacts = body.data.get("input") or [], len(calls) > 1 or is_triggered(body)
    options = ResponseOptions(echo, items, SOURCES in included, compacts)
    return Plan(calls, chat.stream, options, model_name, chat=chat)


def openai_history(body: Fields, model: Model, context: Context) -> ResponseHistory:
    """The conversation: the earlier responses without their instructions, and then the input."""
    for key, kinds in (("conversation", (str, dict)), ("prompt", (dict,))):
        if body.data.get(key) and type(body.data[key]) in kinds:
            raise invalid_value(key, "it is kept at OpenAI; send the items themselves")
    instructions = body.get("instructions", str)
    previous = body.get("previous_response_id", str)
    content = body.get("input", str, list)
    if not (content or instructions or previous):
        message = "Missing required parameter: 'input'."
        raise ProxyError(400, message, code="missing_required_parameter", path="input")
    history = ResponseHistory(model, context)
    if instructions:
        history.system.append(text_part(instructions))
    for i, item in enumerate(past_items(previous, context)):
        history.add_item(Fields(item, f"previous_response_id[{i}]"))
    if isinstance(content, str):
        history.contents.append(user_turn(text_part(content)))
    else:
        for entry in history.add_texts(body, "input"):
            history.add_item(entry)
    history.text = history.text or body.object("text")
    history.limit = openai_limit(body, "max_output_tokens", context)
    return history


def openai_summary(reasoning: Fields) -> str | None:
    """The kind of summary of its thoughts that the client wants, if any."""
    kinds = ("auto", "concise", "detailed", "none")
    words = [reasoning.choice(key, *kinds) for key in ("summary", "generate_summary")]
    kind = next(filter(None, words), "none")
    return None if kind == "none" else kind


# Where no setting is sent, those of Gemini's list of models. A response must tell each of them as a
# number: ResponseResource in https://github.com/openresponses/openresponses
SAMPLING_DEFAULTS = {
    "temperature": ("temperature", 1.0),
    "top_p": ("topP", 0.95),
    "presence_penalty": ("presencePenalty", 0.0),
    "frequency_penalty": ("frequencyPenalty", 0.0),
}


def openai_echo(body: Fields, text: Fields, call: GeminiCall) -> JSON:
    """What a response repeats of its request: what is only repeated stays unread, thus ignored; and
    the sampling of its call."""
    data, store = body.data, body.get("store", bool)
    config = get_or_empty(call.body, "generationConfig", dict)
    return {
        "background": False,
        "instructions": data.get("instructions"),
        "max_output_tokens": data.get("max_output_tokens"),
        "max_tool_calls": get_or_empty(data, "max_tool_calls", int) or None,
        "metadata": openai_metadata(body),
        "previous_response_id": data.get("previous_response_id"),
        "prompt_cache_key": get_or_empty(data, "prompt_cache_key", str) or None,
        "safety_identifier": get_or_empty(data, "safety_identifier", str) or None,
        "store": store is not False,
        "text": {**text.data, "format": openai_echoed_format(text.data.get("format"))},
        "tool_choice": data.get("tool_choice") or "auto",
        "tools": [openai_echoed_tool(tool) for tool in data.get("tools") or ()],
        "top_logprobs": get_or_empty(data, "top_logprobs", int),
        "truncation": body.choice("truncation", "auto", "disabled") or "disabled",
        "user": get_or_empty(data, "user", str) or None,
        **{name: config.get(key, default) for name, (key, default) in SAMPLING_DEFAULTS.items()},
    }


def openai_metadata(body: Fields) -> dict[str, str]:
    metadata = body.object_or_empty("metadata")
    return {key: metadata.require(key, str) for key in metadata.data}


def openai_echoed_format(form: JSON | None) -> JSON:
    """The format of the answer, as a response repeats it."""
    if form and form.get("type") == "json_schema":
        strict = bool(form.get("strict"))
        return {**form, "description": form.get("description"), "strict": strict}
    return form or {"type": "text"}


# The keys that a tool of a type has in every response, for clients in Rust (async-openai) too; only
# these may be null: FunctionTool and CustomToolParam in https://github.com/openai/openai-openapi
ECHOED_KEYS: dict[Any, JSON] = {
    "function": {"description": None, "parameters": None, "strict": False},
    "custom": {"format": {"type": "text"}},
}


def openai_echoed_tool(tool: JSON) -> JSON:
    """A tool as a response repeats it."""
    sent = {key: value for key, value in without_access(tool).items() if value is not None}
    return {**ECHOED_KEYS.get(tool.get("type"), {}), **sent}


def without_access(tool: JSON) -> JSON:
    """A tool without what opens an MCP server, since it is stored; also one in a namespace."""
    hidden = ("authorization", "headers") if tool.get("type") == "mcp" else ()
    out = {key: value for key, value in tool.items() if key not in hidden}
    if isinstance(tool.get("tools"), list):
        out["tools"] = [
            without_access(inner) if isinstance(inner, dict) else inner for inner in tool["tools"]
        ]
    return out


# ---- compaction ----

COMPACTION_PROMPT = (
    "<system>\nThis conversation becomes too long. Summarize it now for yourself: of all that you "
    "said, of your tool calls and their results you will see nothing but this summary. Write "
    "down what the user wants, word for word where the wording matters, and what they decided "
    "or forbade; what was found out, with the paths, names, numbers, commands and errors that "
    "are still needed; what was changed, and where; what is done, what is not, and what comes "
    "next. Leave out what nobody needs any more. Answer with the summary alone, and call no "
    "function.\n</system>"
)
BYTES_PER_TOKEN = 4  # of text: https://ai.google.dev/gemini-api/docs/tokens
MEDIA_TOKENS = 1120  # of an image: https://ai.google.dev/gemini-api/docs/media-resolution


def compacting_calls(chat: Chat, body: Fields) -> tuple[GeminiCall, ...]:
    """The call for an answer, after one for a summary where the conversation has become too long
    for the client; or that one alone, where the client wants nothing else."""
    if is_triggered(body):
        if not chat.contents:
            raise wrong_value("input", "Invalid 'input': there is no conversation to compact.")
        return (summary_call(chat, body),)
    call = chat_call(chat, body)
    threshold = compact_threshold(body)
    if threshold and estimated_tokens(call.body) >= threshold:
        return summary_call(chat._replace(sampling={}), body), call
    return (call,)


def is_triggered(body: Fields) -> bool:
    """Whether the input ends in a compaction_trigger, which may stand nowhere else."""
    items = body.data.get("input")
    if not isinstance(items, list):
        return False
    kinds = [get_or_empty(item, "type", str) for item in items]
    if COMPACTION_TRIGGER in kinds[:-1]:
        path = f"input[{kinds.index(COMPACTION_TRIGGER)}]"
        raise wrong_value(path, f"Invalid '{path}': a {COMPACTION_TRIGGER} must be the last item.")
    return kinds[-1:] == [COMPACTION_TRIGGER]


def compact_threshold(body: Fields) -> int | None:
    """The tokens from which on the client wants the conversation to be summarized."""
    thresholds: list[int] = []
    for entry in body.objects("context_management"):
        kind = entry.require("type", str)
        threshold = entry.number("compact_threshold", 1, math.inf, int)
        if kind == "compaction" and threshold:
            thresholds.append(threshold)
        else:
            entry.ignore(f"context_management[].{kind}")
    return min(thresholds, default=None)


def estimated_tokens(value: Any) -> int:
    """About how many tokens a request has: one of many needs no call to count them."""
    if isinstance(value, str):
        return -(-len(value.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)
    if isinstance(value, dict) and ("inlineData" in value or "fileData" in value):
        return MEDIA_TOKENS
    return sum(map(estimated_tokens, inner_values(value)))


def summary_call(chat: Chat, body: Fields, prompt: str = COMPACTION_PROMPT) -> GeminiCall:
    """The call for a summary of a chat. Its tools stay declared: what Gemini caches begins so."""
    choice = ToolChoice("NONE", hosted=False)
    contents = [*chat.contents, user_turn(text_part(prompt))]
    thinking = chat.thinking._replace(show=False)
    question = chat._replace(contents=contents, choice=choice, thinking=thinking)
    return chat_call(question._replace(schema=None), body)


def openai_compact_request(body: Fields, context: Context) -> Plan:
    """Compact a conversation: https://platform.openai.com/docs/api-reference/responses/compact"""
    content = body.get("input", str, list) or []
    items = [{"role": "user", "content": content}] if isinstance(content, str) else content
    body.data = {**body.data, "input": [*items, {"type": COMPACTION_TRIGGER}]}
    if body.get("stream", bool):
        body.ignore("stream")
    return openai_responses_request(body, context)._replace(stream=False)


def openai_compact_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    """All messages of the user's, and a compaction in place of the rest."""
    *_, response = openai_responses_response(exchange, answers)
    if response["status"] != "completed":
        reason = (response["error"] or response["incomplete_details"]).get("message")
        words = reason or f"Gemini's summary is {response['status']}."
        raise ProxyError(502, f"The conversation was not compacted: {words}", upstream=True)
    past = past_items(response["previous_response_id"], exchange.context)
    items = [*past, *input_items(exchange.options.items, response["id"].partition("_")[2])]
    messages = [item for item in items if item.get("role") == "user"]
    return {
        "id": response["id"],
        "object": "response.compaction",
        "created_at": response["created_at"],
        "output": [*messages, *response["output"]],
        "usage": response["usage"],
    }


# ---- the answer ----

# Of messages, and of summaries of thoughts: how their ids begin, the names of events about the part
# of such an item and about its text, the part's place in these, and what else is said of the text.
TEXT_FORMS: dict[bool, tuple[str, str, str, JSON, JSON]] = {
    False: ("msg_", "content_part", "output_text", {"content_index": 0}, {"logprobs": []}),
    True: ("rs_", "reasoning_summary_part", "reasoning_summary_text", {"summary_index": 0}, {}),
}


class TextItem:
    """A message, or a summary of thoughts, while its text comes, in a single part."""

    def __init__(self, thought: bool, start: int):
        self.thought, self.start = thought, start  # in the text of the whole answer
        self.pieces: list[str] = []
        self.annotations: list[JSON] = []  # some are known only after the message has ended
        names = TEXT_FORMS[thought]
        self.prefix, self.part_event, self.text_event, self.place, self.more = names

    def item(self) -> JSON:
        if self.thought:
            return {"type": "reasoning", "summary": []}
        return {"type": "message", "status": "in_progress", "role": "assistant", "content": []}

    def part(self) -> JSON:
        text = "".join(self.pieces)
        if self.thought:
            return {"type": "summary_text", "text": text}
        more = {"annotations": self.annotations, "logprobs": []}
        return {"type": "output_text", "text": text, **more}

    def final(self, status: str) -> JSON:
        if self.thought:
            return {"summary": [self.part()]}
        return {"content": [self.part()], "status": status}


MAX_STORED_CHARACTERS = 8 << 20  # of a response and its input: a quarter of the memory


class ResponseBuilder:
    """A response as it grows, and its events. One item ends before the next begins: openai-python
    insists on it (lib/streaming/responses), and openai-node takes output_index for their order."""

    def __init__(self, exchange: Exchange):
        self.exchange: Exchange = weakref.proxy(exchange)  # which holds this
        self.chat = exchange.chat
        self.options: ResponseOptions = exchange.options
        self.count = 0  # events so far
        self.length = 0  # characters of the answer's text so far
        self.open: TextItem | None = None  # the item that has not ended
        self.messages: list[TextItem] = []
        self.output: list[JSON] = []
        response_id = exchange.new_id("resp_")
        self.tail = response_id.partition("_")[2]  # of the id of every item
        self.response: JSON = {"id": response_id, "object": "response"}
        self.response.update(created_at=int(exchange.created), completed_at=None)
        self.response.update(status="in_progress", error=None, incomplete_details=None)
        self.response.update(self.options.echo, output=self.output, usage=None)

    def event(self, kind: str, **fields: Any) -> JSON:
        self.count += 1
        return {"type": f"response.{kind}", "sequence_number": self.count - 1, **fields}

    def item_event(self, kind: str, **fields: Any) -> JSON:
        """An event about the last item."""
        index = len(self.output) - 1
        return self.event(kind, item_id=self.output[index]["id"], output_index=index, **fields)

    def begin(self) -> Iterator[JSON]:
        for kind in ("created", "in_progress"):
            yield self.event(kind, response={**self.response, "output": []})

    def add(self, prefix: str, fields: JSON) -> JSON:
        """The event of a new item."""
        index = len(self.output)
        self.output.append({"id": f"{prefix}{self.tail}_{index}", **fields})
        return self.event("output_item.added", output_index=index, item=self.output[index])

    def done(self, **fields: Any) -> JSON:
        """The event of the last item's end, with its last fields."""
        index = len(self.output) - 1
        self.output[index] = {**self.output[index], **fields}
        return self.event("output_item.done", output_index=index, item=self.output[index])

    def start(self, item: TextItem) -> Iterator[JSON]:
        self.open = item
        if not item.thought:
            self.messages.append(item)
        yield self.add(item.prefix, item.item())
        yield self.item_event(f"{item.part_event}.added", **item.place, part=item.part())

    def add_text(self, text: str, thought: bool = False) -> Iterator[JSON]:
        item = self.open
        if item is None or item.thought != thought:
            yield from self.close()
            item = TextItem(thought, self.length)
            yield from self.start(item)
        if not thought:
            self.length += len(text)
        for piece in delta_pieces(text):
            item.pieces.append(piece)
            place = {**item.place, "delta": piece, **item.more}
            yield self.item_event(f"{item.text_event}.delta", **place)

    def close(self, status: str = "completed", **fields: Any) -> Iterator[JSON]:
        """The end of the message or the thoughts, if either is open."""
        item = self.open
        if item is None:
            return
        part = item.part()
        done = f"{item.text_event}.done"
        yield self.item_event(done, **item.place, text=part["text"], **item.more)
        yield self.item_event(f"{item.part_event}.done", **item.place, part=part)
        yield self.done(**item.final(status), **fields)
        self.open = None

    def cite(self, citations: list[Citation]) -> Iterator[JSON]:
        """Add each source to the message that rests on it. Only an open one has events for it."""
        starts = [message.start for message in self.messages]
        if not starts:
            return
        for citation in citations:
            message = self.messages[bisect.bisect_right(starts, citation.start) - 1]
            annotation = {"type": "url_citation", **citation_fields(citation, message.start)}
            message.annotations.append(annotation)
            if message is self.open:
                place = {**message.place, "annotation_index": len(message.annotations) - 1}
                kind = "output_text.annotation.added"
                yield self.item_event(kind, **place, annotation=annotation)

    def add_call(self, call: ToolCall) -> Iterator[JSON]:
        namespace = self.chat.tools.namespaces.get(call.name)
        name = call.name.removeprefix(qualified_name(namespace, ""))
        if call.name == self.chat.tools.finder or call.name in self.chat.tools.local:
            yield from self.add_whole_call(call)
            return
        kind, key, value = openai_call_text(call, self.chat.tools)
        if kind == "custom":
            kind, prefix, last = "custom_tool_call", "ctc_", {key: value}
        else:  # OpenAI specifies the name, but leaves it out itself
            kind, prefix, last = "function_call", "fc_", {key: value, "name": name}
        fields = {"call_id": call.id, "name": name, **given(namespace=namespace), key: ""}
        yield self.add(prefix, {"type": kind, "status": "in_progress", **fields})
        for piece in delta_pieces(value):
            yield self.item_event(f"{kind}_{key}.delta", delta=piece)
        yield self.item_event(f"{kind}_{key}.done", **last)
        yield self.done(status="completed", **{key: value})

    def add_whole_call(self, call: ToolCall) -> Iterator[JSON]:
        """A call whose arguments are no text, and have no deltas."""
        prefix, item = "tsc_", {"execution": "client", "arguments": call.args}
        if call.name in self.chat.tools.local:
            prefix, item = "lc_", LOCAL_TOOLS[call.name].fields(call.args)
        item.update(type=f"{call.name}_call", call_id=call.id, status="in_progress")
        yield self.add(prefix, item)
        yield self.done(status="completed")

    def steps(self, kind: str, work: str) -> Iterator[JSON]:
        """The events of what one of OpenAI's own tools does."""
        for step in ("in_progress", work, "completed"):
            yield self.item_event(f"{kind}.{step}")

    def add_image(self, image: Media) -> Iterator[JSON]:
        """An image, as OpenAI's own tool for them has it."""
        yield from self.close()
        fields = {"type": "image_generation_call", "status": "in_progress", "result": None}
        yield self.add("ig_", fields)
        yield from self.steps("image_generation_call", "generating")
        yield self.done(status="completed", result=image.data)

    def add_search(self, end: End) -> Iterator[JSON]:
        """What Gemini searched for. It says so only at its end, after the message about it."""
        action: JSON = {"type": "search", "query": end.queries[0], "queries": list(end.queries)}
        if self.options.sources:
            urls = dict.fromkeys(citation.url for citation in end.citations)
            action["sources"] = [{"type": "url", "url": url} for url in urls]
        fields = {"type": "web_search_call", "status": "in_progress", "action": action}
        yield self.add("ws_", fields)
        yield from self.steps("web_search_call", "searching")
        yield self.done(status="completed")

    def finish(self, end: End, calls: list[ToolCall]) -> Iterator[Any]:
        """The rest: citations, the calls after the signatures that belong to them, and the end."""
        content = ""
        if self.chat.thinking.signatures:
            content = encrypted_content(calls, end.signature, self.chat.model)
        if content and self.open and self.open.thought:
            yield from self.close(encrypted_content=content)
            content = ""
        status, fields = response_status(end)
        yield from self.cite(end.citations)
        yield from self.close("completed" if status == "completed" else "incomplete")
        if end.queries:
            yield from self.add_search(end)
        if content:
            reasoning = {"type": "reasoning", "summary": [], "encrypted_content": content}
            yield self.add("rs_", reasoning)
            yield self.done()
        for call in calls:
            yield from self.add_call(call)
        if not self.output and status == "completed":
            yield from self.start(TextItem(False, self.length))
            yield from self.close()
        yield from self.end(status, fields)

    def compact(self, events: Iterator[Event], alone: bool) -> Iterator[Any]:
        """The item with a summary of the conversation, if it was written to its end; and the end of
        a response that is nothing but that item."""
        first = next(events)
        yield from self.begin()
        answer = answer_of(itertools.chain([first], events))
        if answer.end.finish == "stop" and answer.text.strip():
            content = sealed({"summary": answer.text})
            yield self.add("cmp_", {"type": "compaction", "encrypted_content": content})
            yield self.done()
        status, fields = response_status(answer.end)
        if status == "completed" and not self.output:
            error = ProxyError(500, "Gemini wrote no summary.")
            status, fields = "failed", {"error": response_error(error)}
        if alone:
            yield from self.end(status, fields)

    def fail(self, error: JSON) -> Iterator[Any]:
        """The last event of a response that failed; the open item stays as far as it came."""
        if not self.count:
            yield from self.begin()
        if self.open:
            self.output[-1] = {**self.output[-1], **self.open.final("incomplete")}
        yield from self.end("failed", {"error": error})

    def end(self, status: str, fields: JSON) -> Iterator[Any]:
        """The last event. Unless the client forbids it, the response is stored before.

        An error stands beside the response too. OpenAI sends an event `error` first (vercel/ai,
        openai-error.1 in packages/openai/src/responses/__fixtures__), and its libraries raise
        whatever has such a key: LangChain for JavaScript, which n8n uses, learns of no other.
        """
        usage = response_usage(self.exchange.usage)
        self.response.update(fields, status=status, usage=usage)
        if status == "completed":
            self.response["completed_at"] = int(self.exchange.now)
        if self.response["store"]:
            items = input_items(self.options.items, self.tail)
            text = encode_json({**self.response, "input": items})
            if len(text) <= MAX_STORED_CHARACTERS:
                yield Keep(RESPONSE_PREFIX + self.response["id"], text)
            else:
                self.response["store"] = False  # it would evict what others have stored
        yield self.event(status, response=self.response, **given(error=fields.get("error")))


def response_usage(usage: Usage) -> JSON:
    return {  # cache_write_tokens is for openai-python, whose strict validation wants it
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.thoughts},
        "total_tokens": usage.prompt + usage.output,
    }


def response_error(error: ProxyError) -> JSON:
    """The error of a response that failed: its newer fields too, since @ai-sdk/openai wants a
    type."""
    body = openai_error(error)[1]["error"]
    return {**body, "code": body["code"] or "invalid_prompt"}


def response_status(end: End) -> tuple[str, JSON]:
    """(the status of a response, the fields about it), with Gemini's own words."""
    native = native_finish(end)
    if end.finish == "failed":
        message = (
            f"Gemini's answer ended in an internal error, {end.reason}. {end.message}".rstrip()
        )
        return "failed", {"error": response_error(ProxyError(500, message)), **native}
    reason = {"length": "max_output_tokens", "filter": "content_filter"}.get(end.finish)
    if reason:
        return "incomplete", {"incomplete_details": {"reason": reason}, **native}
    return "completed", native


def openai_responses_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    """The events of a response, and what to keep of it; nothing before Gemini's first word."""
    builder = exchange.builder = ResponseBuilder(exchange)
    calls: list[ToolCall] = []
    if builder.options.compacts and len(exchange.plan.calls) == 1:
        yield from builder.compact(next(answers), alone=True)
        return
    if builder.options.compacts:
        with contextlib.suppress(ProxyError):  # the answer itself can do without a summary
            yield from builder.compact(next(answers), alone=False)
    for event in next(answers):
        if not builder.count:
            yield from builder.begin()
        if isinstance(event, ToolCall):
            calls.append(event)
        elif isinstance(event, End):
            yield from builder.finish(event, calls)
        elif isinstance(event, Media) and event.mime.startswith("image/"):
            yield from builder.add_image(event)
        elif isinstance(event, Media):
            yield from builder.add_text(media_note(event))
        elif not event.thought or builder.chat.thinking.show:
            yield from builder.add_text(event.text, event.thought)


def openai_responses_response(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    """The response as its last event has it, and what to keep of it before."""
    for event in openai_responses_stream(exchange, answers):
        if isinstance(event, Keep):
            yield event
        elif "response" in event:
            yield event["response"]


def openai_responses_failure(exchange: Exchange, error: ProxyError) -> list[Any]:
    """The last event of a stream that failed, after the first ones, which clients insist on. Codex
    reads in the message when to try again (its codex-api/src/sse/responses.rs)."""
    body = response_error(error)
    if error.retry_after and error.status == 429:
        body["message"] += f" Please try again in {error.retry_after:g}s."
    builder = exchange.builder or ResponseBuilder(exchange)
    return list(builder.fail(body))


# ---- tokens of a request, and stored responses ----


def openai_input_tokens_request(body: Fields, context: Context) -> Plan:
    """How many tokens a response's request would send: the body is the same."""
    return count_plan(openai_responses_request(body, context))


def openai_input_tokens_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    return {"object": "response.input_tokens", "input_tokens": read_count(answers)}


def response_in_path(context: Context) -> JSON:
    """The stored response that the path names; a 404 as OpenAI's if it is not there any more."""
    response_id = context.params["id"]
    response = stored_response(RESPONSE_PREFIX + response_id, context)
    if response is None:
        raise ProxyError(404, f"Response with id '{response_id[:80]}' not found.")
    if context.query.get("stream") == "true":
        raise invalid_value("stream", "only a response that is under way could be streamed")
    return response


def openai_stored_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    response = response_in_path(exchange.context)
    return {key: value for key, value in response.items() if key != "input"}


def openai_delete_response(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    response_id = response_in_path(exchange.context)["id"]
    yield Keep(RESPONSE_PREFIX + response_id, "")
    yield {"id": response_id, "object": "response", "deleted": True}


def openai_cancel_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    response_in_path(exchange.context)
    raise ProxyError(400, "Cannot cancel a response that was not made in the background.")


def openai_input_items_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    """A page of a response's own input, the newest first unless the client wants it otherwise."""
    items, query = response_in_path(exchange.context)["input"], exchange.context.query
    if Fields(dict(query)).choice("order", "asc", "desc") != "asc":
        items = items[::-1]
    return openai_page(items, query, "after", 20, 100)


# ---- routes ----

# (request, response, stream, framing) of each endpoint, as far as it has them.
CHAT_COMPLETIONS = (openai_chat_request, openai_chat_response, openai_chat_stream)
COMPLETIONS = (openai_completions_request, openai_completions_response, openai_completions_stream)
RESPONSES = (
    openai_responses_request,
    openai_responses_response,
    openai_responses_stream,
    NAMED_SSE,
)
COMPACTION = (openai_compact_request, openai_compact_response)
NO_WEB_SOCKET = Refusal(426, "There is no WebSocket here: use POST.", {"Upgrade": "HTTP/1.1"})
INPUT_TOKENS = (openai_input_tokens_request, openai_input_tokens_response)
IMAGE_ANSWERS = (openai_images_response, openai_images_stream, NAMED_SSE)
IMAGES = (openai_images_request, *IMAGE_ANSWERS)
EDITS = (openai_edits_request, *IMAGE_ANSWERS)
SPEECH = (openai_speech_request, openai_speech_response, openai_speech_stream)
TRANSCRIPTS = (openai_transcriptions_response, openai_transcriptions_stream)
TRANSCRIPTIONS = (openai_transcriptions_request, *TRANSCRIPTS)
TRANSLATIONS = (functools.partial(openai_transcriptions_request, task="translate"), *TRANSCRIPTS)
STORED: JSON = {"parse": no_body, "keys": openai_keys}

# To add an endpoint: a request, a response and perhaps a stream function above, and a row here.
# The README's table needs a line too, and a test says so.
OPENAI_ROUTES = (
    Route("POST", "/v1/chat/completions", *CHAT_COMPLETIONS),
    Route("POST", "/v1/responses", *RESPONSES, failure=openai_responses_failure, keys=openai_keys),
    Route("GET", "/v1/responses", fixed=NO_WEB_SOCKET),  # upon a 426 Codex uses POST from then on
    Route("POST", "/v1/responses/compact", *COMPACTION, keys=openai_keys),
    Route("POST", "/v1/responses/input_tokens", *INPUT_TOKENS, keys=openai_keys),
    Route("GET", "/v1/responses/{id}/input_items", None, openai_input_items_response, **STORED),
    Route("POST", "/v1/responses/{id}/cancel", None, openai_cancel_response, **STORED),
    Route("GET", "/v1/responses/{id}", None, openai_stored_response, **STORED),
    Route("DELETE", "/v1/responses/{id}", None, openai_delete_response, **STORED),
    Route("POST", "/v1/embeddings", openai_embeddings_request, openai_embeddings_response),
    Route("POST", "/v1/completions", *COMPLETIONS),
    Route("POST", "/v1/images/generations", *IMAGES, failure=openai_images_failure),
    Route(
        "POST", "/v1/images/edits", *EDITS, parse=parse_form_or_body, failure=openai_images_failure
    ),
    Route("POST", "/v1/audio/speech", *SPEECH),
    Route("POST", "/v1/audio/transcriptions", *TRANSCRIPTIONS, parse=parse_form),
    Route("POST", "/v1/audio/translations", *TRANSLATIONS, parse=parse_form),
    Route("GET", "/v1/models", openai_models_request, openai_models_response),
    Route("GET", "/v1/models/{model}", openai_models_request, openai_model_response),
)
OPENAI = Protocol("openai", OPENAI_ROUTES, openai_error, hides_401=False)


# ======================================================================================
# 9. Ollama: chat, generate, embeddings, models and their management
# ======================================================================================

# What is said of Ollama is from https://github.com/ollama/ollama at v0.33.0-rc2 (server/routes.go,
# api/types.go), unless another source stands beside it; of clients, from their source code.

# VS Code's Copilot wants 0.6.4 or newer; Open WebUI reads each part between the dots as a number.
OLLAMA_VERSION = "0.33.0"


def ollama_time(seconds: float) -> str:
    """RFC 3339 in UTC with six digits, which every client's parser takes."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def nanoseconds(seconds: float) -> int:
    """A duration as Ollama writes it; at least 1, since Open WebUI shows N/A for 0."""
    return max(1, int(seconds * 1e9))


# ---- requests to chat and generate ----


class OllamaOptions(NamedTuple):
    """What the answer to a chat or a prompt depends on."""

    generate: bool  # whether the answer is in generate's form, not in chat's
    done_reason: str = ""  # "load" or "unload" where there is no question
    goes_on: bool = False  # whether a later prompt may go on from its `context`


def tagged(name: str) -> str:
    """A name as Ollama lists it."""
    return name if ":" in name else name + ":latest"


def ollama_name(body: Fields, *keys: str, missing: ProxyError | None = None) -> str:
    """The first name of a model under these keys; the error `missing` where there is none."""
    name = next(filter(None, [body.get(key, str) for key in keys]), "")
    if not name:
        raise missing or ProxyError(400, "model is required", path="model")
    return name


# Go's form of a duration: https://pkg.go.dev/time#ParseDuration
DURATION = re.compile(r"([+-]?)((?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h))+")
UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
LOADED_SECONDS, FOREVER_SECONDS = 300.0, 1e10  # the default: https://docs.ollama.com/faq


def ollama_loaded_seconds(body: Fields) -> float:
    """Seconds, from a number of them or a duration in Go's form; a negative one is for ever."""
    value = body.get("keep_alive", float, str)
    if value is None:
        return LOADED_SECONDS
    negative, seconds = str(value).startswith("-"), value
    if isinstance(value, str):
        if not DURATION.fullmatch(value) and value.strip("+-") != "0":
            message = f'invalid keep_alive: {value[:40]!r} is not a duration such as "5m"'
            raise wrong_value("keep_alive", message)
        parts = re.findall(r"([\d.]+)([a-zµ]+)", value)
        seconds = sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)
    if negative and seconds:
        return FOREVER_SECONDS
    return float(min(seconds, FOREVER_SECONDS))


THINK_VALUES = '"high", "medium", "low", "max", true, or false'
THINK_EFFORTS: dict[Any, Any] = {True: None, False: "none"}  # the texts are efforts themselves


def ollama_thinking(body: Fields, model: Model) -> Thinking:
    """`think`: without it the model decides, and shows its thoughts; a small limit means few."""
    think = body.get_any("think")
    if think is not None and not isinstance(think, (str, bool)):
        raise wrong_value("think", f"think must be a boolean or string ({THINK_VALUES})")
    if isinstance(think, str) and think not in ("high", "medium", "low", "max"):
        value = json.dumps(think[:40])
        raise wrong_value("think", f"invalid think value: {value} (must be {THINK_VALUES})")
    if model.thinking is None:
        if think:
            name = json.dumps(body.data["model"][:200])
            raise ProxyError(400, f"{name} does not support thinking", path="think")
        return Thinking()
    effort = THINK_EFFORTS.get(think, think)
    return Thinking(effort, None, think is not False, not think, "think")


def ollama_sampling(options: Fields, model: Model) -> JSON:
    """The sampling in `options`. What only local models have stays unread: it counts as ignored.
    Ollama cuts a fraction off where it wants a whole number."""
    numbers = [options.get(key, float) for key in ("num_predict", "top_k", "seed")]
    limit, top_k, seed = (number if number is None else int(number) for number in numbers)
    if seed is not None and seed < 0:
        seed = None  # Ollama takes a random one
    temperature, top_p = options.get("temperature", float), options.get("top_p", float)
    stops, weights = stop_sequences(options), penalties(options, -math.inf, math.inf, model)
    return sampling_config(temperature, top_p, top_k, limit, seed, stops, **weights)


def ollama_format(body: Fields) -> JSON | None:
    """The schema of the answer; ANY_JSON where it may be any JSON; None where it is text."""
    schema = body.get_any("format")
    if schema in (None, ""):
        return None
    if schema == "json":
        return ANY_JSON
    if not isinstance(schema, dict):
        text = json.dumps(schema)[:80]
        message = f'invalid format: {text}; expected "json" or a valid JSON Schema object'
        raise wrong_value("format", message)
    return schema


def ollama_images(fields: Fields) -> list[Part]:
    """Images, or audio in their place: base64 that does not say what it is."""
    fields.get("images", list)  # a single text is an error
    texts = fields.strings("images")
    return [media_part(fields, f"images[{i}]", text, "image/jpeg") for i, text in enumerate(texts)]


def ollama_load_plan(body: Fields, model_name: str, generate: bool) -> Plan:
    """Without a question a model is to be loaded, or unloaded if keep_alive is 0. It must exist."""
    seconds = ollama_loaded_seconds(body)
    body.mark_read(*body.data)
    options = OllamaOptions(generate, "load" if seconds else "unload")
    return Plan((MODELS_CALL,), False, options, model_name, loads=(model_name, seconds))


def ollama_plan(body: Fields, model_name: str, chat: Chat, options: OllamaOptions) -> Plan:
    """The plan for a chat or a prompt, with all that both may set."""
    top = body.number("top_logprobs", -math.inf, math.inf, int)
    if top is not None and not 0 <= top <= 20:
        raise wrong_value("top_logprobs", "top_logprobs must be between 0 and 20")
    if top or body.get("logprobs", bool):
        body.ignore("logprobs")
    chat = chat._replace(
        tools=openai_tools(body),
        thinking=ollama_thinking(body, chat.model),
        sampling=ollama_sampling(body.object_or_empty("options"), chat.model),
        schema=ollama_format(body),
        stream=body.get("stream", bool) is not False,
    )
    loads = (model_name, ollama_loaded_seconds(body))
    calls = (chat_call(chat, body),)
    return Plan(calls, chat.stream, options, model_name, chat=chat, loads=loads)


def ollama_chat_request(body: Fields, context: Context) -> Plan:
    """Chat: https://docs.ollama.com/api/chat"""
    model_name = ollama_name(body, "model")
    model = model_named(model_name, context)
    if not body.get("messages", list):
        return ollama_load_plan(body, model_name, False)
    history = ollama_history(body, model)
    chat = Chat(model, history.system, history.contents, Tools())
    return ollama_plan(body, model_name, chat, OllamaOptions(generate=False))


def ollama_history(body: Fields, model: Model) -> History:
    history = History(model)
    for message in history.add_texts(body, "messages"):
        role = (message.get("role", str) or "user").lower()
        if role == "tool":
            images = ollama_images(message)
            parts = [openai_result_part(message, "content", "tool_call_id", model, images)]
        else:
            parts = openai_parts(message, "content", model)
        if role not in ("tool", "system", "developer"):
            parts += ollama_images(message)
        if role in ("assistant", "model"):
            message.mark_read("thinking")
            parts += map(openai_call_part, message.objects("tool_calls"))
        history.add(role, parts)
    return history


def ollama_generate_request(body: Fields, context: Context) -> Plan:
    """Generate: https://docs.ollama.com/api/generate"""
    model_name = ollama_name(body, "model", missing=no_such_model(""))
    model = model_named(model_name, context)
    prompt, suffix, system = (body.get(key, str) or "" for key in ("prompt", "suffix", "system"))
    raw, images = body.get("raw", bool), ollama_images(body)
    if raw and (system or body.get("template", str) or body.get("context", list)):
        raise wrong_value("raw", "raw mode does not support template, system, or context")
    if not prompt:
        return ollama_load_plan(body, model_name, True)
    if raw:
        model = model._replace(recipe=model.recipe._replace(system="", messages=()))
    system = system or model.recipe.system
    if suffix:
        system = "\n\n".join(filter(None, (system, GAP_INSTRUCTION)))
        prompt = gap_prompt(prompt, suffix)
    contents = [*past_turns(body, context), user_turn(text_part(prompt), *images)]
    chat = Chat(model, [text_part(system)], contents, Tools())
    options = OllamaOptions(generate=True, goes_on=not raw and not suffix)
    return ollama_plan(body, model_name, chat, options)


# ---- the context of generate: a few numbers that stand for a conversation in the memory ----

CONTEXT_PREFIX = "context:"  # the keys of conversations begin with it
CONTEXT_NUMBERS = 8  # of 16 bits each
MAX_CONTEXT_CHARACTERS = 1 << 19  # of one conversation


def context_key(numbers: Any) -> str:
    """The key of the conversation that these numbers stand for; "" if they are none of ours."""
    if type(numbers) is not list or [type(number) for number in numbers] != [int] * CONTEXT_NUMBERS:
        return ""
    return CONTEXT_PREFIX + "-".join(map(str, numbers))


def generate_keys(body: Fields, context: Context) -> list[str]:
    return [*filter(None, [context_key(body.data.get("context"))])]


def past_turns(body: Fields, context: Context) -> list[JSON]:
    """The turns that `context` stands for. Numbers that nobody knows any more are ignored."""
    numbers = body.get("context", list)
    text = context.stored.get(context_key(numbers))
    if text:
        return list(json.loads(text))
    if numbers:
        body.ignore("context")
    return []


def context_to_keep(exchange: Exchange, answer: str) -> tuple[list[int], tuple[Keep, ...]]:
    """(the numbers, what to keep under them) for a prompt and its answer.

    Of what is too long, only the texts are kept; Ollama's tokens have no images either. Completions
    in an editor keep nothing: there is one for each keystroke.
    """
    options: OllamaOptions = exchange.options
    if not options.goes_on:
        return [], ()  # ollama-ai-provider insists on a list
    contents = [*exchange.chat.contents, model_turn(text_part(answer))]
    texts = [
        {**turn, "parts": [part for part in turn["parts"] if "text" in part]} for turn in contents
    ]
    for turns in (contents, texts):
        text = encode_json(turns)
        if len(text) <= MAX_CONTEXT_CHARACTERS:
            digest = hashlib.sha256(text.encode()).digest()
            numbers = [*struct.unpack_from(f">{CONTEXT_NUMBERS}H", digest)]
            return numbers, (Keep(context_key(numbers), text),)
    return [], ()


# ---- answers to chat and generate ----


def ollama_additions(events: Iterable[Event], generate: bool) -> Iterator[tuple[JSON, End | None]]:
    """(what an event adds to a message, the End) for each event. Zed reads one call a chunk.

    Only the answers of generate have a place for an image (GenerateResponse in ollama-python 0.6.3
    and ollama-js 0.6.4), and for one: ollama-python takes no answer of chat that has any.
    """
    calls, room = 0, generate
    for event in events:
        if isinstance(event, Text):
            yield {"thinking" if event.thought else "content": event.text}, None
        elif isinstance(event, ToolCall):
            function = {"index": calls, "name": event.name, "arguments": event.args}
            yield {"tool_calls": [{"id": event.id, "function": function}]}, None
            calls += 1
        elif isinstance(event, End):
            yield {}, event
        elif event.mime.startswith("image/") and room:
            room = False
            yield {"image": event.data}, None
        else:
            yield {"content": media_note(event)}, None


def ollama_chunk(exchange: Exchange, message: JSON) -> JSON:
    """A message, or what is added to it, in the form of chat or of generate."""
    base = {"model": exchange.model_name, "created_at": ollama_time(exchange.now)}
    message = {"content": "", **message}  # Zed wants a role and a content in every chunk
    if not exchange.options.generate:
        return {**base, "message": {"role": "assistant", **message}}
    response = message.pop("content")
    return {**base, "response": response, **message}


def ollama_ending(
    exchange: Exchange, first: float, end: End, text: str
) -> tuple[JSON, tuple[Keep, ...]]:
    """(the end of an answer with this text, whose first event came at `first`, and what to keep of
    it). Durations are measured here."""
    metrics = {
        "done": True,
        "done_reason": "length" if end.finish == "length" else "stop",
        **native_finish(end),
        "total_duration": nanoseconds(exchange.now - exchange.created),
        "load_duration": 1,
        "prompt_eval_count": end.usage.prompt,
        "prompt_eval_duration": nanoseconds(first - exchange.created),
        "eval_count": end.usage.output,
        "eval_duration": nanoseconds(exchange.now - first),
    }
    if not exchange.options.generate:
        return metrics, ()
    numbers, keep = context_to_keep(exchange, text)
    return {"context": numbers, **metrics}, keep


def ollama_response(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    """The whole answer to a chat or a prompt, or the end of a load or an unload."""
    options: OllamaOptions = exchange.options
    if options.done_reason:
        listed_entry(exchange.model_name, answers, exchange.context)
        yield {**ollama_chunk(exchange, {}), "done": True, "done_reason": options.done_reason}
        return
    answer = answer_of(next(answers))
    message: JSON = {}
    for addition, _ in ollama_additions(answer.events, options.generate):
        for key, value in addition.items():
            message[key] = message[key] + value if key in message else value
    text = message.get("content", "")
    ending, keep = ollama_ending(exchange, exchange.created, answer.end, text)
    yield from keep
    yield {**ollama_chunk(exchange, message), **ending}


def ollama_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    """The chunks of an answer; the last one has the metrics and no text."""
    first, texts = None, []
    for addition, end in ollama_additions(next(answers), exchange.options.generate):
        first = first or exchange.now
        texts.append(addition.get("content", ""))
        ending: JSON = {"done": False}
        if end:
            ending, keep = ollama_ending(exchange, first, end, "".join(texts))
            yield from keep
        yield {**ollama_chunk(exchange, addition), **ending}


# ---- embeddings ----


def ollama_embed_plan(
    body: Fields, model_name: str, model: Model, texts: list[str], size: int | None
) -> Plan:
    """The plan for a vector of this size for each text. Without a text, the model must exist."""
    calls: tuple[GeminiCall, ...] = (MODELS_CALL,)
    if texts:  # Gemini takes no empty text
        calls = embed_calls(model, [text or " " for text in texts], size)
    loads = (model_name, ollama_loaded_seconds(body))
    return Plan(calls, False, EmbedOptions(len(texts)), model_name, loads=loads)


MIN_EMBED_TOKENS = 2048  # the smallest limit of Gemini's models for vectors; theirs is in its list


def untruncated(plan: Plan, model: Model, texts: list[str]) -> Plan:
    """The same plan, but it embeds nothing before it is known that no text is too long.

    Gemini itself cuts texts off in silence. A token has one byte at least, so that short texts need
    not be counted; the longest one is, whatever its length.
    """
    long_texts = [text for text in texts if len(text.encode(errors="replace")) > MIN_EMBED_TOKENS]
    counts = [
        GeminiCall(f"{model.path}:countTokens", {"contents": [user_turn(text_part(text))]}, model)
        for text in long_texts or [max(texts, key=len) or " "]
    ]
    first, *rest = plan.calls
    calls = (MODELS_CALL, *counts, first._replace(waits=True), *rest)
    return plan._replace(calls=calls, options=plan.options._replace(checks=1 + len(counts)))


def ollama_embed_request(body: Fields, context: Context) -> Plan:
    """Embed: https://docs.ollama.com/api/embed"""
    model_name = ollama_name(body, "model", missing=no_such_model(""))
    model = model_named(model_name, context)
    value = body.get_any("input")
    if value is not None and not isinstance(value, (str, list)):
        message = "invalid input type: input must be a string or a list of strings"
        raise wrong_value("input", message)
    texts = value or []
    if isinstance(texts, str):
        texts = [texts]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong_value(f"input[{i}]", f"invalid input type: input[{i}] must be a string")
    dimensions = body.number("dimensions", 0, 2**31 - 1, int)
    plan = ollama_embed_plan(body, model_name, model, texts, dimensions)
    if texts and body.get("truncate", bool) is False:
        return untruncated(plan, model, texts)
    return plan


def check_lengths(exchange: Exchange, answers: AnswerStreams) -> None:
    """Refuse a text that the model would cut off. Gemini's list says how many tokens it takes."""
    options: EmbedOptions = exchange.options
    models = usable_models(itertools.islice(answers, 1), exchange.context)
    entry = models.get(model_named(exchange.model_name, exchange.context).name)
    limit = get_or_empty(entry, "inputTokenLimit", int) or math.inf
    for chunks in itertools.islice(answers, options.checks - 1):
        if any(get_or_empty(chunk, "totalTokens", int) > limit for chunk in chunks):
            raise wrong_value("input", "the input length exceeds the context length")


def embeds_nothing(exchange: Exchange, answers: AnswerStreams) -> bool:
    """Whether there is no text to embed; a 404 where there is no such model either."""
    if exchange.options.vectors:
        return False
    listed_entry(exchange.model_name, answers, exchange.context)
    return True


def ollama_embed_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    if embeds_nothing(exchange, answers):
        return {"model": exchange.model_name, "embeddings": []}
    if exchange.options.checks:
        check_lengths(exchange, answers)
    vectors = read_vectors(answers, exchange)
    return {
        "model": exchange.model_name,
        "embeddings": vectors,
        "total_duration": nanoseconds(exchange.now - exchange.created),
        "load_duration": 1,
        "prompt_eval_count": exchange.usage.prompt,
    }


def ollama_embeddings_request(body: Fields, context: Context) -> Plan:
    """The older call: one prompt, one vector."""
    model_name = ollama_name(body, "model")
    model = model_named(model_name, context)
    texts = list(filter(None, [body.get("prompt", str)]))
    return ollama_embed_plan(body, model_name, model, texts, None)


def ollama_embeddings_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    if embeds_nothing(exchange, answers):
        return {"embedding": []}
    return {"embedding": read_vectors(answers, exchange)[0]}


# ---- models and their management ----


def listed_entry(model_name: str, answers: AnswerStreams, context: Context, *uses: str) -> JSON:
    """Gemini's entry for the model that a client means; a 404 if there is none."""
    name = model_named(model_name, context, *uses).name
    entry = usable_models(answers, context).get(name)
    if entry is None:
        raise no_such_model(model_name)
    return entry


def ollama_capabilities(entry: JSON) -> list[str]:
    """What a model can do, in the words of types/model/capability.go, and no other."""
    if "embedContent" in get_or_empty(entry, "supportedGenerationMethods", list):
        return ["embedding"]
    model = model_of(entry_name(entry))
    if not model.tools:
        return ["completion", "vision"]
    capabilities = ["completion", "tools", "insert", "vision"]
    if model.audio:
        capabilities.append("audio")
    if model.thinking is not None:
        capabilities.append("thinking")
    return capabilities


MODEL_BYTES = 1  # there are no files; some clients take 0 for a size that is missing


def ollama_entry(name: str, entry: JSON, context: Context) -> JSON:
    """A model in a list, from Gemini's entry for it."""
    limit = entry.get("inputTokenLimit")
    capabilities = ollama_capabilities(entry)
    # llm-ollama caches the capabilities by the digest.
    identity = json.dumps([plain_name(name, True), capabilities, limit])
    details = {"parent_model": "", "format": "gguf", "family": "gemini", "families": ["gemini"]}
    details.update(parameter_size="unknown", quantization_level="unknown")
    details["context_length"] = get_or_empty(entry, "inputTokenLimit", int)
    return {
        "name": tagged(name),
        "model": tagged(name),
        "modified_at": ollama_time(model_created(name, context)),
        "size": MODEL_BYTES,
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": details,
        "capabilities": capabilities,
    }


def ollama_tags_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    context = exchange.context
    models = usable_models(answers, context)
    names = [name for name in models if model_of(name).chats]
    return {"models": [ollama_entry(name, models[name], context) for name in names]}


def ollama_ps_request(body: Fields, context: Context) -> Plan:
    return Plan((MODELS_CALL,) if context.loaded else ())


def ollama_ps_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    """The models that were used lately, the one that stays longest first."""
    now, context = exchange.now, exchange.context
    models = usable_models(answers, context)
    entries = []
    for name, until in sorted(context.loaded.items(), key=itemgetter(1), reverse=True):
        gemini_entry = models.get(model_named(name, context).name)
        if gemini_entry is None or until <= now:
            continue
        entry = ollama_entry(name, gemini_entry, context)
        running = {key: entry[key] for key in ("name", "model", "size", "digest", "details")}
        running["size_vram"] = entry["size"]
        running["expires_at"] = ollama_time(min(until, now + FOREVER_SECONDS))
        running["context_length"] = entry["details"].pop("context_length")
        entries.append(running)
    return {"models": entries}


def ollama_manage_request(body: Fields, context: Context) -> Plan:
    """One model and Gemini's list. Ollama's command line and LiteLLM send the older `name`."""
    body.mark_read("verbose", "insecure", "options")
    stream = body.get("stream", bool) is not False
    return Plan((MODELS_CALL,), stream, model_name=ollama_name(body, "model", "name"))


# LiteLLM looks into it for the word "tools", Continue for .Suffix, to learn what a model can do.
OLLAMA_TEMPLATE = "{{ if .Suffix }}{{ .Suffix }}{{ end }}{{ if .Tools }}tools{{ end }}{{ .Prompt }}"


def ollama_show_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    """What clients decide by: capabilities, and the context length under exactly one key."""
    model_name, context = exchange.model_name, exchange.context
    gemini_entry = listed_entry(tagged(model_name), answers, context)  # Ollama's 404 has the tag
    name = plain_name(model_name, True)
    entry, recipe = ollama_entry(name, gemini_entry, context), context.recipes.get(name, NO_RECIPE)
    options, template, embedding_length = option_values(recipe.options), OLLAMA_TEMPLATE, 0
    if entry["capabilities"] == ["embedding"]:
        template, embedding_length = "{{ .Prompt }}", 3072
    return {
        "license": "\n".join(recipe.licenses),
        "modelfile": modelfile(recipe, entry["name"]),
        "parameters": "\n".join(f"{key} {encode_json(value)}" for key, value in options),
        "template": template,
        "system": recipe.system,
        "details": {**entry["details"], "parent_model": recipe.source},
        "model_info": {
            "general.architecture": "gemini",
            "general.basename": model_name,
            "general.parameter_count": 0,
            "gemini.context_length": entry["details"]["context_length"],
            "gemini.embedding_length": embedding_length,
        },
        "capabilities": entry["capabilities"],
        "modified_at": entry["modified_at"],
        **given(messages=list(recipe.messages)),
    }


def option_values(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a recipe's options, one for each value of a list."""
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        for item in values:
            yield key, item


def modelfile(recipe: Recipe, model_name: str) -> str:
    """A file from which `ollama create` makes the same model: Model.String in server/images.go."""
    lines = ["# Gemini, by proxy-to-gemini", f"FROM {recipe.source or model_name}"]
    lines += [f"SYSTEM {modelfile_text(text)}" for text in filter(None, [recipe.system])]
    for key, value in option_values(recipe.options):
        text = value if isinstance(value, str) else encode_json(value)
        lines.append(f"PARAMETER {key} {modelfile_text(text)}")
    lines += [f"LICENSE {modelfile_text(text)}" for text in recipe.licenses]
    for message in recipe.messages:
        role, content = message.get("role"), get_or_empty(message, "content", str)
        if content and role in ("system", "user", "assistant"):  # it has no others
            lines.append(f"MESSAGE {role} {modelfile_text(content)}")
    return "\n".join([*lines, ""])


def modelfile_text(text: str) -> str:
    """A text as parser/parser.go reads it: in quotes where it would lose something without."""
    if text and "\n" not in text and text == text.strip() and not text.startswith('"'):
        return text
    marks = '"' * (3 if '"' in text else 1)
    return f"{marks}{text}{marks}"


def ollama_pull_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    """Nothing is downloaded; `codex --oss` and Home Assistant wait for "success"."""
    models = usable_models(answers, exchange.context)
    yield {"status": "pulling manifest"}
    if model_named(exchange.model_name, exchange.context).name not in models:
        raise ProxyError(500, "pull model manifest: file does not exist")
    for status in ("verifying sha256 digest", "writing manifest", "success"):
        yield {"status": status}


MAX_RECIPES = 200  # they stay until they are deleted
MAX_RECIPE_CHARACTERS = 1 << 20


def recipe_to_keep(name: str, recipe: Recipe, exchange: Exchange, models: dict[str, JSON]) -> Keep:
    """A recipe to keep under this name. A name of Gemini's own stays Gemini's."""
    context, recipe = exchange.context, recipe._replace(modified=exchange.now)
    name, text = plain_name(name, True), recipe_text(recipe)
    known = name in context.recipes
    if (name in models and not known) or not RECIPE_NAME.fullmatch(name):
        message = f"the name {json.dumps(name[:200])} is taken, or is not a valid model name"
        raise ProxyError(400, message)
    full = len(context.recipes) >= MAX_RECIPES and not known
    if full or len(text) > MAX_RECIPE_CHARACTERS:
        message = "there is no room for this model: what it says is too long, or there are too many"
        raise ProxyError(400, message)
    return Keep(RECIPE_PREFIX + name, text, pinned=True)


def ollama_copy_request(body: Fields, context: Context) -> Plan:
    """Another name for a model; `options` of the plan is that name."""
    body.mark_read("verbose", "insecure")
    source, destination = ollama_name(body, "source"), ollama_name(body, "destination")
    return Plan((MODELS_CALL,), options=destination, model_name=source)


def ollama_copy_response(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    name, context = exchange.model_name, exchange.context
    source = model_named(name, context)
    models = usable_models(answers, context)
    if source.name not in models:
        raise ProxyError(404, f"model {json.dumps(name[:200])} not found")
    recipe = source.recipe._replace(source=source.name)
    yield recipe_to_keep(exchange.options, recipe, exchange, models)
    yield Payload(b"")


def ollama_create_request(body: Fields, context: Context) -> Plan:
    """A recipe `from` a model, with what it adds to it; it is the plan's `options`.

    As with Ollama, messages replace those of the model that it is from, and licenses add to them.
    """
    plan, source = ollama_manage_request(body, context), body.get("from", str)
    if not source or body.get("files", dict) or body.get("adapters", dict):
        message = 'only models "from" one of Gemini\'s can be created here: there are no files'
        raise ProxyError(400, f"{message} to build from", path="from")
    model, system = model_named(source, context), body.get("system", str)
    old = model.recipe
    if system is None:
        system = old.system
    parameters = body.object_or_empty("parameters")
    ollama_sampling(parameters, model)  # an error in them is one of this request
    ollama_history(body, model)  # likewise
    recipe = Recipe(
        model.name,
        system,
        {**old.options, **parameters.data},
        body.get("messages", list) or old.messages,
        [*old.licenses, *filter(None, body.strings("license"))],
    )
    return plan._replace(options=recipe)


def ollama_create_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    recipe: Recipe = exchange.options
    models = usable_models(answers, exchange.context)
    if recipe.source not in models:
        raise no_such_model(recipe.source)
    yield recipe_to_keep(exchange.model_name, recipe, exchange, models)
    for status in ("creating new layer", "writing manifest", "success"):
        yield {"status": status}


def ollama_delete_response(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    name, context = exchange.model_name, exchange.context
    plain = plain_name(name, True)
    if plain in context.recipes:
        yield Keep(RECIPE_PREFIX + plain, "")
        yield Payload(b"")
        return
    if plain in usable_models(answers, context):
        message = f"model '{name[:200]}' is Google's and cannot be deleted from here"
        raise ProxyError(403, message)
    raise no_such_model(name)


# ---- errors and routes ----


def ollama_error(error: ProxyError) -> tuple[int, Any]:
    """Ollama's form of an error, which is a text: https://docs.ollama.com/api/errors"""
    if isinstance(error, NoRouteError):
        return 404, Payload(b"404 page not found")
    words = "prompt too long; exceeded max context length"
    message = in_known_words(error, words, words + " by {2} tokens")
    if error.code == "model_not_found":
        message = f"model '{error.model[:200]}' not found"
        if error.upstream and error.listed is not False:  # Gemini has a reason of its own
            message += ": " + error.message
    return error.status, {"error": message}


def encode_line(event: JSON) -> bytes:
    return encode_json(event).encode() + b"\n"


def ndjson(keep_alive: Callable[[Exchange], JSON]) -> Framing:
    """Events in lines. There are no comments, so one of them must show that a stream is alive."""
    return Framing(
        "application/x-ndjson",
        encode_line,
        keep_alive=lambda exchange: encode_line(keep_alive(exchange)),
    )


CHAT_ROW: JSON = {
    "response": ollama_response,
    "stream": ollama_stream,
    "framing": ndjson(lambda exchange: {**ollama_chunk(exchange, {}), "done": False}),
}
PULLING = ndjson(lambda exchange: {"status": "pulling manifest"})
CREATING = ndjson(lambda exchange: {"status": "creating new layer"})
NO_CLOUD = Refusal(403, "ollama cloud is disabled: remote inference is unavailable")
NO_BLOBS = Refusal(
    400, "there are no files behind this server, and none can be put there: its models are Gemini's"
)
NO_PUSH = Refusal(400, "models cannot be pushed from here: they are Google's")
NOT_SIGNED_IN = Refusal(401, "you are not currently signed in")

OLLAMA_ROUTES = (
    Route("POST", "/api/chat", ollama_chat_request, **CHAT_ROW),
    Route("POST", "/api/generate", ollama_generate_request, keys=generate_keys, **CHAT_ROW),
    Route("POST", "/api/embed", ollama_embed_request, ollama_embed_response),
    Route("POST", "/api/embeddings", ollama_embeddings_request, ollama_embeddings_response),
    Route("GET", "/api/tags", openai_models_request, ollama_tags_response),
    Route("POST", "/api/show", ollama_manage_request, ollama_show_response),
    Route("GET", "/api/ps", ollama_ps_request, ollama_ps_response),
    Route("GET", "/api/version", fixed={"version": OLLAMA_VERSION}),
    Route("GET", "/api/status", fixed={"cloud": {"disabled": True, "source": "env"}}),
    Route("POST", "/api/pull", ollama_manage_request, None, ollama_pull_stream, PULLING),
    Route("POST", "/api/create", ollama_create_request, None, ollama_create_stream, CREATING),
    Route("POST", "/api/copy", ollama_copy_request, ollama_copy_response),
    Route("DELETE", "/api/delete", ollama_manage_request, ollama_delete_response),
    Route("POST", "/api/push", fixed=NO_PUSH),
    Route("GET", "/api/blobs/{digest}", fixed=Refusal(404, "there is no such file here")),
    Route("POST", "/api/blobs/{digest}", fixed=NO_BLOBS),
    Route("POST", "/api/me", fixed=Refusal(401, "unauthorized")),
    Route("POST", "/api/signout", fixed=NOT_SIGNED_IN),
    Route("DELETE", "/api/user/keys/{key}", fixed=NOT_SIGNED_IN),
    Route("POST", "/api/experimental/web_search", fixed=NO_CLOUD),
    Route("POST", "/api/experimental/web_fetch", fixed=NO_CLOUD),
    Route("GET", "/api/experimental/model-recommendations", fixed={"recommendations": []}),
)

OLLAMA = Protocol("ollama", OLLAMA_ROUTES, ollama_error)


# ======================================================================================
# 10. Anthropic: messages and their counting
# ======================================================================================

# ---- content blocks ----

COMPACTION_BLOCK = "compaction"  # also the parameter that asks for it, and a reason to stop
ADDITION = "tool_addition"
TOOL_CHANGES = (ADDITION, "tool_removal")
BLOCK_ROLES = {  # who may send them
    "tool_use": "assistant",
    "tool_result": "user",
    **dict.fromkeys(TOOL_CHANGES, "system"),
}


def anthropic_text_part(block: Fields, model: Model) -> list[Part]:
    block.mark_read("citations")  # of an earlier answer; Gemini gets its text
    return [text_part(block.require("text", str))]


def anthropic_source_parts(block: Fields, model: Model, name: str | None = None) -> list[Part]:
    """The parts of an image or a document, by the type of its source."""
    block.require("source", dict)
    source = block.object_or_empty("source")
    kind = source.require("type", str)
    if kind == "base64":
        data, mime = source.require("data", str), source.get("media_type", str)
        return [media_part(source, "data", data, mime)]
    if kind == "url":
        return [source_part(source, "url", name)]
    if kind == "text":
        source.mark_read("media_type")
        return [text_part(source.require("data", str))]
    if kind == "content":
        source.require("content", str, list)
        return anthropic_parts(source, "content", model)
    if kind == "file":
        source.require("file_id", str)
        no_file_store(source)
    raise source.unknown_choice("type", kind, ("base64", "url", "text", "content", "file"))


def anthropic_document_parts(block: Fields, model: Model) -> list[Part]:
    """A document after its title and context. A URL without an ending is taken for a PDF."""
    head = "\n".join(filter(None, [block.get("title", str), block.get("context", str)]))
    parts = anthropic_source_parts(block, model, "document.pdf")
    if head:
        parts.insert(0, text_part(head + ":\n"))
    return parts


def anthropic_search_parts(block: Fields, model: Model) -> list[Part]:
    """A result of the client's own search."""
    head = f"{block.get('title', str) or ''} ({block.get('source', str) or ''}):\n"
    block.require("content", str, list)
    return [text_part(head), *anthropic_parts(block, "content", model)]


def anthropic_reference_part(block: Fields, model: Model) -> list[Part]:
    """A tool that a search for tools returned. Gemini knows all tools from the start."""
    return [text_part(block.require("tool_name", str))]


def anthropic_call_part(block: Fields, model: Model) -> list[Part]:
    block.mark_read("caller")
    call_id, name = block.require("id", str), block.require("name", str)
    args = within_depth(block.get("input", dict) or {}, block.path_of("input"))
    return [call_part(name, args, call_id)]


def anthropic_result_part(block: Fields, model: Model) -> list[Part]:
    parts = anthropic_parts(block, "content", model, "tool")
    call_id = block.require("tool_use_id", str)
    return [result_part(None, parts, call_id, bool(block.get("is_error", bool)))]


def anthropic_no_parts(block: Fields, model: Model) -> list[Part]:
    """Thoughts are not sent to Gemini: anthropic_parts takes the signature of their block. Nor is a
    change of the tools, which anthropic_tools reads."""
    block.mark_read("thinking", "signature", "data", "tool")
    return []


def anthropic_summary_parts(block: Fields, model: Model) -> list[Part]:
    """The summary that Anthropic's servers wrote of all that was before; null where they failed."""
    block.mark_read("encrypted_content", "signature", "tool_changes")
    return [text_part(SUMMARY_HEAD + text) for text in filter(None, [block.get("content", str)])]


ANTHROPIC_BLOCKS: dict[str, Callable[[Fields, Model], list[Part]]] = {
    "text": anthropic_text_part,
    "image": anthropic_source_parts,
    "document": anthropic_document_parts,
    "search_result": anthropic_search_parts,
    "tool_reference": anthropic_reference_part,
    "tool_use": anthropic_call_part,
    "tool_result": anthropic_result_part,
    COMPACTION_BLOCK: anthropic_summary_parts,
    **dict.fromkeys(("thinking", "redacted_thinking", *TOOL_CHANGES), anthropic_no_parts),
}


def anthropic_parts(message: Fields, key: str, model: Model, role: str = "") -> list[Part]:
    """The parts of a content, which is a string, a list of blocks, or nothing."""
    content = message.get(key, str, list)
    if not content:
        return []
    if isinstance(content, str):
        return [text_part(content)]
    parts: list[Part] = []
    signature = ""
    for block in message.objects(key):
        kind = block.require("type", str)
        if kind not in ANTHROPIC_BLOCKS:  # such as those of tools on Anthropic's servers
            block.ignore_whole(f"{without_indexes(block.path)}.{kind}")
            continue
        if BLOCK_ROLES.get(kind, role) != role:
            why = f"{kind} blocks can only stand in messages of role '{BLOCK_ROLES[kind]}'"
            raise invalid_value(block.path_of("type"), why)
        if block.data.get("citations") == {"enabled": False}:
            block.mark_read("citations")
        block_parts = ANTHROPIC_BLOCKS[kind](block, model)
        if kind == "thinking" and can_sign(get_or_empty(block.data, "signature", str)):
            signature = block.data["signature"]
        elif kind == "tool_use" and signature:  # which came before the message's next call
            block_parts[0]["thoughtSignature"] = signature
            signature = ""
        parts += block_parts
    return parts


# Claude Code begins its instructions with this line for Anthropic's servers. It is no instruction,
# and may change from one request to the next.
BILLING_HEADER = "x-anthropic-billing-header:"
ANTHROPIC_ROLES = ("user", "assistant", "system")


def anthropic_history(body: Fields, model: Model) -> History:
    """The messages. One of the system's may set the effort of those that follow:
    https://platform.claude.com/docs/en/build-with-claude/effort-per-message"""
    history = History(model)
    parts = anthropic_parts(body, "system", model, "system")
    system = [part for part in parts if not part.get("text", "").startswith(BILLING_HEADER)]
    history.add("system", system)
    if len(system) < len(parts):
        body.ignore("system[]." + BILLING_HEADER[:-1])
    cleared = cleared_messages(body.data["messages"])
    for message in history.add_texts(body, "messages"):
        role = message.require("role", str)
        if role not in ANTHROPIC_ROLES:
            raise message.unknown_choice("role", role, ANTHROPIC_ROLES)
        output = None
        if role == "system":
            output = message.object("output_config")
            message.choice("clear_at", "never", CLEARING)
        if output:
            history.effort = output.choice("effort", *EFFORTS) or history.effort
        else:
            message.require("content", str, list)
        parts = anthropic_parts(message, "content", model, role)
        if role != "system" or id(message.data) not in cleared:
            history.add(role, parts)
    return history


CLEARING = "next_user_message"


def cleared_messages(messages: list[Any]) -> set[int]:
    """The ids of what the system said for one turn of the user's, where a later one has come:
    BetaSystemMessageParam in anthropic 2.14."""
    last = len(messages) - 1
    while last > 0 and get_or_empty(messages[last], "role", str) != "user":
        last -= 1
    before = messages[: max(last, 0)]
    return {id(one) for one in before if get_or_empty(one, "clear_at", str) == CLEARING}


# ---- tools ----

EDIT_FIELDS: JSON = {
    "path": TEXT_SCHEMA,
    "file_text": {"type": "string", "description": "The whole text of a file to create"},
    "old_str": {"type": "string", "description": "The text to replace; it must occur exactly once"},
    "new_str": {"type": "string", "description": "The text that takes its place"},
    "insert_line": {
        "type": "integer",
        "description": "The line after which to insert; 0 is the beginning",
    },
    "insert_text": {"type": "string", "description": "The text to insert"},
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "description": "First and last line to view, from 1; -1 is the end",
    },
}


def edit_fields(*commands: str, **more: JSON) -> JSON:
    """The fields of a tool that edits files, with these commands besides the usual four."""
    words = ["view", "create", "str_replace", "insert", *commands]
    return {"command": {"type": "string", "enum": words}, **EDIT_FIELDS, **more}


OLD_EDIT_FIELDS = edit_fields("undo_edit")
del OLD_EDIT_FIELDS["insert_text"]
OLD_EDITOR = (
    "View, create and edit text files. Insert takes the text to insert as new_str; undo_edit takes "
    "back the last edit of a file."
)
MEMORY_FIELDS = edit_fields("delete", "rename", old_path=TEXT_SCHEMA, new_path=TEXT_SCHEMA)
MEMORY = (
    "Keep and look up notes in files under /memories, which outlive this conversation. Look "
    "there before you begin. Rename takes old_path and new_path, all else takes path."
)
BASH_FIELDS: JSON = {"command": TEXT_SCHEMA, "restart": {"type": "boolean"}}
BASH = "Run a command in a persistent bash session, or restart that session."

# (description, fields, required fields) of tools that Claude knows and clients run:
# https://platform.claude.com/docs/en/agents-and-tools/tool-use/overview
ANTHROPIC_TOOLS: dict[str, tuple[str, JSON, list[str]]] = {
    "bash": (BASH, BASH_FIELDS, []),
    "text_editor_20241022": (OLD_EDITOR, OLD_EDIT_FIELDS, ["command", "path"]),
    "text_editor_20250124": (OLD_EDITOR, OLD_EDIT_FIELDS, ["command", "path"]),
    "text_editor": ("View, create and edit text files.", edit_fields(), ["command", "path"]),
    "memory": (MEMORY, MEMORY_FIELDS, ["command"]),
}
# As in OPENAI_MCP.
ANTHROPIC_MCP = ("name", "url", "authorization_token", "tool_configuration")


def anthropic_tools(body: Fields) -> Tools:
    """The client's own tools, those with a schema of Anthropic's, and Gemini's for hosted ones."""
    tools = Tools()
    restricted: set[str] = set()  # names of MCP servers, not all of whose tools may be called
    for tool in body.objects("tools"):
        anthropic_tool(tool, tools, restricted)
    change_tools(body, tools, restricted)
    for server in body.objects("mcp_servers"):
        server.mark_read("type")
        if server.get("name", str) in restricted:
            server.ignore_whole("mcp_servers[]")
        else:
            tools.host_mcp(server, ANTHROPIC_MCP, "mcp_servers[]")
    return tools


def anthropic_tool(tool: Fields, tools: Tools, restricted: set[str]) -> None:
    """Add one tool; what Gemini has nothing for is named as ignored."""
    if tools.host(tool):
        tool.mark_read("name")
        return
    kind = tool.get("type", str) or "custom"
    family = re.sub(r"_\d{8}$", "", kind)  # types end in a date
    known = ANTHROPIC_TOOLS.get(kind) or ANTHROPIC_TOOLS.get(family)
    tool.mark_read("eager_input_streaming", "defer_loading")  # about when Claude sees it
    if kind == "custom":
        name, description = tool.require_text("name"), tool.get("description", str)
        tools.declare(tool, name, description, tool.get("input_schema", dict))
        tools.strict |= bool(tool.get("strict", bool))
    elif known:
        name, (description, fields, required) = tool.require("name", str), known
        tools.declare(tool, name, description, object_schema(required, **fields))
    elif kind == "mcp_toolset":
        name = tool.require("mcp_server_name", str)
        default = tool.get("default_config", dict)
        if restricts(tool.get("configs", dict)) or restricts(default):
            restricted.add(name)
    else:
        tool.ignore_whole(f"tools[].{kind}")


def change_tools(body: Fields, tools: Tools, restricted: set[str]) -> None:
    """Add the tools that messages of the system's define, and take out those that they withdraw.
    https://platform.claude.com/docs/en/build-with-claude/mid-conversation-system-messages"""
    last_words: dict[str, bool] = {}
    for block in tool_changes(body):
        change = Fields(block.get_any("tool"), block.path_of("tool"), body.tracked)
        block.require("type", str)
        kind, adds = change.require("type", str), block.choice("type", *TOOL_CHANGES) == ADDITION
        if kind == "tool_definition":
            definition = change.require_object("definition")
            anthropic_tool(definition, tools, restricted)
            last_words[definition.get("name", str) or ""] = True
        elif kind == "tool_reference":
            last_words[change.require("name", str)] = adds
        elif not adds:  # of an MCP server, Gemini uses all tools or none
            restricted.add(change.require("server_name", str))
        change.mark_read("name", "server_name")
    for name, adds in last_words.items():
        if not adds:
            tools.withdraw(name)


def tool_changes(body: Fields) -> Iterator[Fields]:
    """The blocks of the system's messages that change the tools, and those that a compaction keeps
    of the messages that it stands for. All blocks were read before."""
    for i, message in enumerate(body.data["messages"]):
        for j, block in enumerate(get_or_empty(message, "content", list)):
            if block["type"] == COMPACTION_BLOCK:
                kept = Fields(message, f"messages[{i}]").item("content", j)
                yield from kept.objects("tool_changes")
            elif block["type"] in TOOL_CHANGES:
                yield Fields(message, f"messages[{i}]").item("content", j)


def anthropic_tool_choice(body: Fields, tools: Tools) -> ToolChoice:
    choice = body.object("tool_choice")
    if choice is None:
        return ToolChoice()
    choice.require("type", str)
    kind = choice.choice("type", "auto", "any", "tool", "none") or ""
    parallel = not choice.get("disable_parallel_tool_use", bool)
    if kind in ("auto", "none"):
        return ToolChoice(TOOL_CHOICES[kind], (), parallel, hosted=kind == "auto")
    if kind == "any" and tools.declared:
        return ToolChoice("ANY", (), parallel)
    if kind == "tool":
        name = choice.require("name", str)
        if name in tools.names.values():
            return ToolChoice("ANY", (name,), parallel)
        listed = [get_or_empty(tool, "name", str) for tool in body.data.get("tools") or ()]
        if name and name not in listed:
            why = f"no tool {name[:80]!r} is among the tools"
            raise invalid_value(choice.path_of("name"), why)
    body.ignore("tool_choice")  # Gemini cannot be made to use its own tools
    return ToolChoice(parallel=parallel)


# ---- the request ----


def anthropic_messages_request(body: Fields, context: Context) -> Plan:
    """Messages: https://platform.claude.com/docs/en/api/messages"""
    body.require("max_tokens", int)
    plan = anthropic_plan(body, context, bool(body.get("stream", bool)))
    compaction = body.object(COMPACTION_BLOCK)
    return compacting_plan(plan, compaction, body) if compaction else plan


def compacting_plan(plan: Plan, compaction: Fields, body: Fields) -> Plan:
    """The plan for a summary, which the client sends from then on in place of the messages:
    BetaCompactionConfigParam in anthropic 2.14."""
    kind, chat = compaction.require("type", str), plan.chat
    if kind != "summarize":
        raise compaction.unknown_choice("type", kind, ("summarize",))
    prompt = (compaction.get("instructions", str) or "").strip()
    prompt = f"<system>\n{prompt}\n</system>" if prompt else COMPACTION_PROMPT
    assert chat is not None
    for name, value in (("tool_choice", chat.choice.mode), ("output_config.format", chat.schema)):
        if value is not None:  # it is about an answer, of which there is none
            body.ignore(name)
    changes = [{key: block.data[key] for key in ("type", "tool")} for block in tool_changes(body)]
    return plan._replace(calls=(summary_call(chat, body, prompt),), options=changes)


def anthropic_plan(body: Fields, context: Context, stream: bool = False) -> Plan:
    """The plan for a message, or for one to be counted."""
    model_name = body.require("model", str)
    model = model_named(model_name, context, "chat")
    if not body.require("messages", list):
        raise wrong_value("messages", "messages: at least one message is required")
    # No thread is kept between two requests. (The tool_runner of anthropic 2.x sends `thread`.)
    if get_or_empty(body.data.get("thread"), "type", str) == "continue":
        hint = 'send all of its messages, with thread {"type": "create"}.'
        message = f"No conversation is kept on this server: {hint}"
        raise ProxyError(404, message, code="thread_not_found", path="thread")
    history = anthropic_history(body, model)
    tools = anthropic_tools(body)
    choice = anthropic_tool_choice(body, tools)
    output = body.object_or_empty("output_config")
    sampling = anthropic_sampling(body)
    first_effort, schema = output.choice("effort", *EFFORTS), anthropic_schema(body, output)
    thinking = anthropic_thinking(body, history.effort or first_effort)
    question = model, history.system, history.contents, tools, choice, thinking, sampling, schema
    chat = Chat(*question, stream=stream)
    return Plan((chat_call(chat, body),), stream, model_name=model_name, chat=chat)


def anthropic_sampling(body: Fields) -> JSON:
    limit = body.number("max_tokens", 1, math.inf, int)  # 0 fills a cache, of which there is none
    temperature, top_p = body.number("temperature", 0, 2), body.number("top_p", 0, 1)
    top_k, stops = body.get("top_k", int), stop_sequences(body, "stop_sequences")
    return sampling_config(temperature, top_p, top_k, limit, stops=stops)


def anthropic_thinking(body: Fields, effort: str | None) -> Thinking:
    """How to think. Without `thinking`, the client takes no thinking blocks."""
    thinking = body.object("thinking")
    if thinking is None:
        return Thinking(effort, answer_only=True, field="output_config.effort")
    budget = thinking.number("budget_tokens", 1, math.inf, int)
    thinking.require("type", str)
    # between_tools: none either, as where a model of Anthropic's does not take it (BetaFallback).
    kinds = ("enabled", "adaptive", "disabled", "between_tools")
    if thinking.choice("type", *kinds) in kinds[2:]:
        return Thinking("none", answer_only=True, field="thinking")
    show = thinking.get("display", str) != "omitted"
    return Thinking(effort, budget, show, field="thinking", signatures=True)


def anthropic_schema(body: Fields, output: Fields) -> JSON | None:
    """The schema of a JSON answer: `output_config.format`, or `output_format` in older clients."""
    form = output.object("format") or body.object("output_format")
    if form is None:
        return None
    kind = form.require("type", str)
    if kind != "json_schema":
        raise form.unknown_choice("type", kind, ("json_schema",))
    schema: JSON = form.require("schema", dict)
    return schema


# ---- the answer ----

ANTHROPIC_STOPS = {"length": "max_tokens", "filter": "refusal"}  # else "end_turn", or "tool_use"


def anthropic_usage(usage: Usage, queries: tuple[str, ...] = ()) -> JSON:
    """Anthropic counts cached tokens beside the rest of the input, not within it."""
    counts: JSON = {
        "input_tokens": max(0, usage.prompt - usage.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
        "output_tokens_details": {"thinking_tokens": usage.thoughts},
    }
    if queries:
        counts["server_tool_use"] = {"web_search_requests": len(queries), "web_fetch_requests": 0}
    return counts


def anthropic_ending(end: End) -> JSON:
    """How a message ended. Gemini does not say whether it met a stop sequence, nor which one."""
    default = "tool_use" if end.calls else "end_turn"
    reason = ANTHROPIC_STOPS.get(end.finish, default)
    ending: JSON = {"stop_reason": reason, "stop_sequence": None}
    if reason == "refusal":
        explanation = end.message or f"Gemini ended its answer: {end.reason}"
        ending["stop_details"] = {"type": reason, "category": None, "explanation": explanation}
    return {**ending, **native_finish(end)}


# Who made a call: the model itself, not a program that it wrote. Anthropic's libraries have it as a
# required field of calls and of search results (rbi/anthropic/models/ in anthropic-sdk-ruby).
DIRECT_CALL: JSON = {"caller": {"type": "direct"}}
# Characters of a quote: https://platform.claude.com/docs/en/agents-and-tools/tool-use/web-search-tool
MAX_CITED_TEXT = 150

# Blocks that grow, as they begin. Neighbours of one such type are one block; calls never join.
GROWING_BLOCKS: JSON = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}
# What deltas bring, in other blocks as they begin.
LATER_FIELDS: JSON = {
    "tool_use": {"input": {}},
    "server_tool_use": {"input": {}},
    COMPACTION_BLOCK: {"content": None},
}
# The signature of thoughts that have none of Gemini's: @genkit-ai/anthropic 0.3 takes no block back
# without one. It is too short to be taken for one (can_sign).
UNSIGNED = "unsigned"


def anthropic_pieces(events: Iterable[Event], exchange: Exchange) -> Iterator[tuple[str, JSON]]:
    """(type, fields) of each block, or piece of a growing one; at last of the message_delta."""
    unsigned = False  # whether the last piece was a thought
    pieces = anthropic_answer(events, exchange)
    if exchange.options is not None:
        pieces = anthropic_compaction(answer_of(events), exchange.options)
    for kind, fields in pieces:
        if unsigned and kind != "thinking":
            yield "thinking", {"signature": UNSIGNED}
        unsigned = "thinking" in fields
        yield kind, fields


def anthropic_answer(events: Iterable[Event], exchange: Exchange) -> Iterator[tuple[str, JSON]]:
    """The pieces of an answer. Tool calls come last, as Anthropic's do, behind the citations of the
    text and the searches, which Gemini reports at the end."""
    texts: list[str] = []
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, Text) and event.thought:
            yield "thinking", {"thinking": event.text}
        elif isinstance(event, Text):
            texts.append(event.text)
            yield "text", {"text": event.text}
        elif isinstance(event, Media):
            yield "text", {"text": media_note(event)}
        elif isinstance(event, ToolCall):
            calls.append(event)
        else:
            yield from anthropic_searches(event, "".join(texts), exchange)
            yield from anthropic_calls(calls, exchange.chat.thinking.signatures)
            usage = anthropic_usage(event.usage, event.queries)
            yield "message_delta", {"delta": anthropic_ending(event), "usage": usage}


def anthropic_calls(calls: list[ToolCall], signatures: bool) -> Iterator[tuple[str, JSON]]:
    """Tool calls. A signature travels in a thinking block before its call: clients must send such
    blocks back. https://platform.claude.com/docs/en/build-with-claude/extended-thinking"""
    for call in calls:
        if signatures and call.signature:
            yield "thinking", {"signature": call.signature}
        fields = {"id": call.id, "name": call.name, "input": call.args}
        yield "tool_use", {**fields, **DIRECT_CALL}


def anthropic_compaction(answer: Answer, changes: list[JSON]) -> Iterator[tuple[str, JSON]]:
    """A summary, with the changes of the tools up to it; null where it is not whole, which clients
    and anthropic_summary_parts pass over."""
    end = answer.end
    content = answer.text.strip() if end.finish == "stop" else ""
    yield COMPACTION_BLOCK, {"content": content or None, **given(tool_changes=changes)}
    ending = {"stop_reason": COMPACTION_BLOCK, "stop_sequence": None, **native_finish(end)}
    yield "message_delta", {"delta": ending, "usage": anthropic_usage(end.usage)}


def anthropic_searches(end: End, text: str, exchange: Exchange) -> Iterator[tuple[str, JSON]]:
    """The citations of a text, then the searches behind them."""
    citations: list[JSON] = []
    results: dict[str, JSON] = {}
    for citation in end.citations:
        link = {"url": citation.url, "title": citation.title}
        cited_text = text[citation.start : min(citation.end, citation.start + MAX_CITED_TEXT)]
        quote = {"cited_text": cited_text, **link, "encrypted_index": ""}
        citations.append({"type": "web_search_result_location", **quote})
        page = {**link, "encrypted_content": "", "page_age": None}
        results[citation.url] = {"type": "web_search_result", **page}
    if citations:
        yield "text", {"citations": citations}
    content = [*results.values()]
    for query in end.queries:
        call_id = exchange.new_id("srvtoolu_")
        search = {"id": call_id, "name": "web_search", "input": {"query": query}}
        yield "server_tool_use", {**search, **DIRECT_CALL}
        yield "web_search_tool_result", {"tool_use_id": call_id, "content": content, **DIRECT_CALL}


def anthropic_start(exchange: Exchange, answers: AnswerStreams) -> tuple[JSON, Iterator[Event]]:
    """(the message as it begins, the answer's events). It waits for the first, or for a refusal."""
    events = next(answers)
    first = next(events)
    usage = read_usage(exchange.first_usage or {})
    message: JSON = {
        "id": exchange.new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": exchange.model_name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        # Nothing has come out yet; LangChain for JavaScript adds the end's count to this one.
        "usage": anthropic_usage(usage._replace(output=0, thoughts=0)),
    }
    return message, itertools.chain([first], events)


def anthropic_messages_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[JSON]:
    """The events of a message: https://platform.claude.com/docs/en/build-with-claude/streaming"""
    message, events = anthropic_start(exchange, answers)
    yield {"type": "message_start", "message": message}
    index, open_kind = -1, ""
    for kind, fields in anthropic_pieces(events, exchange):
        grows = kind == open_kind and kind in GROWING_BLOCKS
        if open_kind and not grows:
            yield {"type": "content_block_stop", "index": index}
        if kind == "message_delta":
            yield {"type": kind, **fields}
            break
        if not grows:
            index, open_kind = index + 1, kind
            beginning = {**GROWING_BLOCKS.get(kind, fields), **LATER_FIELDS.get(kind, {})}
            block = {"type": kind, **beginning}
            yield {"type": "content_block_start", "index": index, "content_block": block}
        for delta in anthropic_deltas(fields):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "message_stop"}


def anthropic_deltas(fields: JSON) -> Iterator[JSON]:
    """The deltas that add these fields to a block."""
    for key, value in fields.items():
        if key == "signature":
            yield {"type": "signature_delta", key: value}
        elif key in ("text", "thinking"):
            yield from ({"type": f"{key}_delta", key: piece} for piece in delta_pieces(value))
        elif key == "input":
            for piece in delta_pieces(encode_json(value)):
                yield {"type": "input_json_delta", "partial_json": piece}
        elif key == "content" and isinstance(value, str):  # of which clients keep the last delta
            yield {"type": "compaction_delta", key: value}
        elif key == "citations":
            yield from ({"type": "citations_delta", "citation": citation} for citation in value)


def anthropic_messages_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    """The message that the events of the stream would add up to."""
    message, events = anthropic_start(exchange, answers)
    answer = answer_of(events)
    *pieces, (_, ending) = anthropic_pieces([*answer.events, answer.end], exchange)
    content: list[JSON] = []
    for kind, fields in pieces:
        if kind not in GROWING_BLOCKS:
            content.append({"type": kind, **fields})
            continue
        if not content or content[-1]["type"] != kind:
            content.append({"type": kind, **GROWING_BLOCKS[kind]})
        for key, value in fields.items():  # texts, or a list of citations
            content[-1][key] = content[-1].get(key, []) + value
    return {**message, "content": content, **ending["delta"], "usage": ending["usage"]}


# ---- counting, errors, routes ----


def anthropic_count_request(body: Fields, context: Context) -> Plan:
    """Count tokens: https://platform.claude.com/docs/en/api/messages-count-tokens"""
    return count_plan(anthropic_plan(body, context))


def anthropic_count_response(exchange: Exchange, answers: AnswerStreams) -> JSON:
    return {"input_tokens": read_count(answers)}


ANTHROPIC_ERROR_TYPES = {
    **dict.fromkeys(range(500, 600), "api_error"),
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}  # else "invalid_request_error"


def anthropic_error(error: ProxyError) -> tuple[int, JSON]:
    """Anthropic's form of an error: https://platform.claude.com/docs/en/api/errors"""
    kind = ANTHROPIC_ERROR_TYPES.get(error.status, "invalid_request_error")
    counted = "prompt is too long: {0} tokens > {1} maximum"  # Claude Code 2.1.197 reads both
    body: JSON = {"type": kind, "message": in_known_words(error, "prompt is too long", counted)}
    if error.code == "thread_not_found":
        body["details"] = {"error_code": error.code}
    return error.status, {"type": "error", "error": body, "request_id": error.request_id}


PINGED_SSE = NAMED_SSE._replace(keep_alive=lambda exchange: encode_named_sse({"type": "ping"}))
MESSAGES = (anthropic_messages_request, anthropic_messages_response, anthropic_messages_stream)
ANTHROPIC_ROUTES = (
    Route("POST", "/v1/messages", *MESSAGES, PINGED_SSE),
    Route("POST", "/v1/messages/count_tokens", anthropic_count_request, anthropic_count_response),
)
ANTHROPIC = Protocol("anthropic", ANTHROPIC_ROUTES, anthropic_error, ("request-id",))


# ======================================================================================
# 11. Gemini's own: its API as it is, passed through
# ======================================================================================

# Names of resources (https://google.aip.dev/122): nothing that could lead to another place.
RESOURCE_ID = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
CREATED = "(tunedModels|files|cachedContents|batches|interactions|fileSearchStores)"
COLLECTION = f"(models|operations|{CREATED})"
INNER = "((upload/)?operations|documents|permissions|media)"  # collections within a resource
RESOURCE = f"{COLLECTION}/{RESOURCE_ID}(/{INNER}/{RESOURCE_ID})?"
# What each method can be about: https://ai.google.dev/api, and the paths of google-genai 3.6.
PASSED_PATHS = {
    "GET": rf"{COLLECTION}|{RESOURCE}(/{INNER})?|files/{RESOURCE_ID}:download",
    "POST": (
        rf"{CREATED}(/{RESOURCE_ID}/permissions)?|({RESOURCE}|{COLLECTION}):[A-Za-z]+"
        rf"|interactions/{RESOURCE_ID}/cancel"
    ),
    "PATCH": f"(?!models/){RESOURCE}",
    "DELETE": f"(?!models/){RESOURCE}",
}
PASSED_TARGET = re.compile(r"(?:/google)?/((?:upload/|download/)?v1(?:alpha|beta)?)/(.*)")
PASSED_HEADERS = re.compile(
    "content-(type|encoding)|api-revision|x-goog-(api-client|upload-.*)", re.ASCII
)
# Parameters that are credentials, or stand for headers and the method
# (https://cloud.google.com/apis/docs/system-parameters); a ticket is this server's own.
UPLOAD_TICKET = "proxy_ticket"
WITHHELD = re.compile(
    rf"\$?(key|access_token|oauth_token|userProject|httpMethod|httpHeaders)|{UPLOAD_TICKET}"
)


def kept_query(query: str) -> tuple[str, set[str]]:
    """(the query without the parameters that are withheld, the names of these)."""
    given_fields = [field for field in query.split("&") if field]
    fields = [(urllib.parse.unquote_plus(field.partition("=")[0]), field) for field in given_fields]
    withheld = {name for name, _ in fields if WITHHELD.fullmatch(name)}
    return "&".join(field for name, field in fields if name not in withheld), withheld


def passed_body(raw: bytes, content_type: str) -> Fields:
    """The body as it came, whatever it is: Gemini says what is wrong with it."""
    return Fields({"body": Upload("", content_type, raw)})


def passed_request(body: Fields, context: Context) -> Plan:
    """Anything of Gemini's API: https://ai.google.dev/api"""
    method, path, query, headers = context.request
    match = PASSED_TARGET.fullmatch(path)
    target = re.sub("%3a", ":", match.group(2), flags=re.I) if match else ""
    if not match or not re.fullmatch(PASSED_PATHS[method], target):
        raise NoRouteError(404, f"Gemini's API has nothing here ({method} {path[:200]})")
    kept, withheld = kept_query(query)
    for name in withheld - {"key", UPLOAD_TICKET}:
        body.ignore(name)
    upload = body.get("body", Upload)
    headers = {name: value for name, value in headers.items() if PASSED_HEADERS.fullmatch(name)}
    passed = HttpParts(method, match.group(1), headers, upload and upload.data)
    call = GeminiCall("?".join(filter(None, (target, kept))), passed=passed)
    model = re.match(r"(?:models/|(?=tunedModels/))([^:]+):", target)
    return Plan((call,), stream=True, model_name=model.group(1) if model else "")


TOKEN_COUNT = re.compile(rb'"(\w{1,40}TokenCount)": ?(\d{1,12})')
MAX_COUNT_BYTES = 80  # that a TOKEN_COUNT has at most


def passed_stream(exchange: Exchange, answers: AnswerStreams) -> Iterator[Any]:
    """The head and the bytes of the answer, as they come; its tokens count."""
    counts: JSON = {}
    end = b""  # of what came before: a count may begin in it
    for item in next(answers):
        if isinstance(item, bytes):
            end += item
            for name, number in TOKEN_COUNT.findall(end):
                counts[name.decode()] = int(number)
            exchange.usage = read_usage(counts)
            end = end[-MAX_COUNT_BYTES:]
        yield item


# Google's words: https://google.aip.dev/193, google/rpc/code.proto
GOOGLE_STATUSES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # else "INVALID_ARGUMENT"


def passed_error(error: ProxyError) -> tuple[int, JSON]:
    """Google's form of an error, for those of this server; Gemini's own go on as they come."""
    status = GOOGLE_STATUSES.get(error.status, "INVALID_ARGUMENT")
    body = {"code": error.status, "message": error.message, "status": status}
    return error.status, {"error": body}


def passed_route(method: str, path: str, parse: Any = passed_body) -> Route:
    return Route(method, path, passed_request, stream=passed_stream, framing=AS_IT_IS, parse=parse)


AS_IT_IS = Framing("application/octet-stream", bytes, keep_alive=None, carries_errors=False)
GEMINI_ROUTES = (
    *(passed_route(method, "/v1beta/{path}") for method in PASSED_PATHS),
    *(passed_route(method, "/v1alpha/{path}") for method in PASSED_PATHS),
    *(passed_route(method, "/google/v1/{path}") for method in PASSED_PATHS),
    passed_route("POST", "/v1/models/{model}:{verb}"),
    passed_route("POST", "/v1/interactions"),
    *(passed_route(method, "/v1/interactions/{path}") for method in ("GET", "POST", "DELETE")),
    passed_route("POST", "/upload/{path}", parse=None),
    passed_route("GET", "/download/{path}"),
)
GEMINI = Protocol("gemini", GEMINI_ROUTES, passed_error, hides_401=False)
# Of its paths, the beginnings that no other protocol has.
GEMINI_FOLDERS = "|".join(sorted({route.path.split("/")[1] for route in GEMINI_ROUTES} - {"v1"}))


# ======================================================================================
# 12. Routing: which route answers a path, and the protocol of its errors
# ======================================================================================

# Paths of OpenAI's that a real Ollama server does not mount, and the protocol as it mounts it.
OPENAI_ONLY_PATHS = (
    *("/v1/images/generations", "/v1/images/edits"),
    *("/v1/audio/speech", "/v1/audio/translations"),
)
SHARED_ROUTES = tuple(route for route in OPENAI.routes if route.path not in OPENAI_ONLY_PATHS)
SHARED_OPENAI = OPENAI._replace(routes=SHARED_ROUTES, hides_401=True)

# What each -api mounts. The first protocol whose pattern fits "METHOD path" writes its errors.
GEMINI_PATHS = re.compile(
    rf"\w+ /({GEMINI_FOLDERS}|v1/interactions)(/|\Z)"
    r"|POST /v1/models/[^/]+:[A-Za-z]+\Z"
)
FOR_ALL = (GEMINI_PATHS, GEMINI), (re.compile(r"\w+ /v1/messages(/|\Z)"), ANTHROPIC)
ANY_PATH = re.compile("")
MOUNTS: dict[str, tuple[tuple[Pattern[str], Protocol], ...]] = {
    "openai": (*FOR_ALL, (ANY_PATH, OPENAI)),
    "ollama": (*FOR_ALL, (re.compile(r"\w+ /v1"), SHARED_OPENAI), (ANY_PATH, OLLAMA)),
}


@functools.cache
def path_pattern(path: str) -> Pattern[str]:
    """A route's path as a pattern. Its last segment may hold slashes, as model names do; a verb of
    Google's is a word."""
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path))
    pattern = pattern.replace("(?P<verb>[^/]+)", "(?P<verb>[A-Za-z]+)")
    return re.compile(re.sub(r"\[\^/\]\+\)$", ".+)", pattern) + r"\Z")


# Of the server itself, whatever its -api: path and method.
OWN_PAGES = {"/": "GET", "/healthz": "GET", "/metrics": "GET", "/status": "GET", "/checks": "POST"}
SLASHES, VERSIONS = re.compile("/{2,}"), re.compile(r"^(/v1(?:alpha|beta)?){2,}(?=/|$)")
VERSIONED = re.compile(rf"/v1/|/({GEMINI_FOLDERS})(/|\Z)")
# Headers that the clients of some makers always send.
GOOGLES_SDK, ANTHROPICS_CLIENTS = "x-goog-api-client", "anthropic-version"


def route_path(path: str, api: str, headers: Mapping[str, str] = {}) -> str:
    """The path as routes spell it: users write the version twice or never in base URLs, or add
    slashes; version 3 of Google's SDK asks below /v1/, as clients of OpenAI do."""
    path = SLASHES.sub("/", "/" + path).rstrip("/") or "/"
    path = VERSIONS.sub(r"\1", path)
    if GOOGLES_SDK in headers and path.startswith("/v1/"):
        return "/google" + path
    if api == "ollama" or VERSIONED.match(path) or path in OWN_PAGES:
        return path
    return "/v1" + path


def protocol_of(api: str, method: str, path: str, headers: Mapping[str, str] = {}) -> Protocol:
    """The protocol that writes the errors at this path. Clients of Anthropic's share those with
    OpenAI's to which no route of OpenAI's posts, such as `/v1/models`."""
    shared = path.startswith("/v1/") and ("POST", path) not in exact_routes(api)
    if shared and ANTHROPICS_CLIENTS in headers:
        return ANTHROPIC
    request = f"{method} {path}"
    return next(protocol for pattern, protocol in MOUNTS[api] if pattern.match(request))


@functools.cache
def exact_routes(api: str) -> dict[tuple[str, str], Route]:
    return {
        (route.method, route.path): route
        for _, protocol in reversed(MOUNTS[api])
        for route in protocol.routes
    }


def find_route(api: str, method: str, path: str) -> tuple[Route, dict[str, str]]:
    """(the route for a method and a route_path, the segments that it captures); else a 404 or a 405
    with Allow. HEAD is like GET."""
    if method == "HEAD":
        method = "GET"
    exact = exact_routes(api).get((method, path))
    if exact:
        return exact, {}
    allowed: list[str] = []
    for route in (route for _, protocol in MOUNTS[api] for route in protocol.routes):
        match = path_pattern(route.path).match(path)
        if match and route.method == method:
            params = {key: urllib.parse.unquote(text) for key, text in match.groupdict().items()}
            return route, params
        if match:
            allowed.append(route.method)
    if not allowed:
        raise NoRouteError(404, f"Invalid URL ({method[:20]} {path[:200]})")
    if "GET" in allowed:
        allowed.append("HEAD")
    message = f"Not allowed to {method[:20]} on {path[:200]}."
    headers = {"Allow": ", ".join(dict.fromkeys(allowed))}
    raise ProxyError(405, message, code="method_not_supported", headers=headers)


# ======================================================================================
# 13. Credentials: who pays on Google Cloud, and how a token is asked for
# ======================================================================================

# What is said of them here is from google-auth 2.63 (google/auth, google/oauth2).

# ---- RSA keys ----


class CredentialError(ValueError):
    """A credential that is of no use, in words that hold no secret."""


RsaKey = tuple[int, ...]  # n, e, d, p, q, dp, dq, qi: RFC 8017, section 3.2
PEM = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----(.+?)-----END \1-----", re.S)
SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")  # RFC 8017, section 9.2


def der_items(data: bytes) -> list[bytes]:
    """The contents of the values in DER, one after the other (X.690); a ValueError if cut short."""
    items: list[bytes] = []
    start = 0
    while start < len(data):
        _, size = data[start : start + 2]
        start += 2
        if size & 0x80:  # the next bytes are the size
            end = start + (size & 0x7F)
            start, size = end, int.from_bytes(data[start:end], "big")
        if start + size > len(data):
            raise ValueError("cut short")
        items.append(data[start : start + size])
        start += size
    return items


def rsa_key(pem: str) -> RsaKey:
    """The key in PKCS#8 or PKCS#1, or a CredentialError."""
    match = PEM.search(pem)
    if not match:
        raise CredentialError("private_key is no private key in PEM")
    label, text = match.groups()
    if "ENCRYPTED" in label + text:  # also "Proc-Type: 4,ENCRYPTED"
        raise CredentialError("private_key is encrypted; it is taken in the clear only")
    try:
        items = der_items(der_items(base64.b64decode("".join(text.split()), validate=True))[0])
        if label == "PRIVATE KEY":  # PKCS#8, for keys of all kinds; an RSA one is PKCS#1 inside
            items = der_items(der_items(items[2])[0])
        key = tuple(int.from_bytes(item, "big") for item in items[1:9])
        rsa_signature(key, b"")
    except (ValueError, IndexError):
        raise CredentialError("private_key is no RSA key, or is cut short or damaged") from None
    return key


def rsa_signature(key: RsaKey, message: bytes) -> bytes:
    """RSASSA-PKCS1-v1_5 with SHA-256: RFC 8017, sections 5.2.1 and 8.2.1."""
    n, e, _, p, q, dp, dq, qi = key
    size = (n.bit_length() + 7) // 8
    digest = SHA256_INFO + hashlib.sha256(message).digest()
    padded = b"\0\1" + b"\xff" * (size - len(digest) - 3) + b"\0" + digest
    number = int.from_bytes(padded, "big")
    a, b = pow(number, dp, p), pow(number, dq, q)
    signature = b + qi * (a - b) % p * q
    if p * q != n or pow(signature, e, n) != number:  # a fault would give the key away
        raise ValueError("the numbers of the key do not fit each other")
    return signature.to_bytes(size, "big")


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def basic_login(login: str) -> str:
    """The header of "name:password" in HTTP Basic: RFC 7617, section 2."""
    return "Basic " + base64.b64encode(login.encode()).decode()


# ---- credentials ----

TOKEN_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
OAUTH_URL = "https://oauth2.googleapis.com/token"
STS_URL = "https://sts.googleapis.com/v1/token"
VERTEX_AUDIENCE = "https://aiplatform.googleapis.com/"  # of tokens that an account signs itself
GRANT_TYPE = "urn:ietf:params:oauth:grant-type:"
SERVICE_ACCOUNT = "instance/service-accounts/default/"  # a page of the metadata server's


class Credential(NamedTuple):
    """Who pays for calls to Vertex AI: what a file of Google's says, or what stands in for one."""

    kind: str  # one of CREDENTIAL_KINDS
    fields: JSON
    origin: str  # where it was found
    key: RsaKey | None = None
    source: Credential | None = None  # whose token buys one of this account

    def text(self, name: str, default: str = "") -> str:
        return get_or_empty(self.fields, name, str) or default

    @property
    def account(self) -> str:
        """Whose it is, "" if it does not say."""
        url = self.text(IMPERSONATION)
        match = re.search(r"serviceAccounts/([^/:]+):", url)
        names = (self.text(name) for name in ("client_email", "account", "audience"))
        return match.group(1) if match else next(filter(None, names), "")

    def headers(self, token: str) -> dict[str, str]:
        """What is sent to Vertex AI with this token of the credential's."""
        quota = given(**{"x-goog-user-project": self.text("quota_project_id")})
        return {"Authorization": f"Bearer {token}", **quota}

    @property
    def login(self) -> str:
        return f"{self.text('client_id')}:{self.text('client_secret')}"


class TokenStep(NamedTuple):
    """One thing to ask for on the way to a token: of a URL, of a file, or of a command."""

    url: str = ""
    body: bytes | None = None
    headers: Mapping[str, str] = {}
    direct: bool = False  # without an HTTP proxy, and briefly: the metadata server is near
    file: str = ""
    command: str = ""


class Token(NamedTuple):
    value: str
    seconds: float  # that it lives
    refresh_token: str = ""  # in place of the one that was sent, if there is one


TOKEN_LIFE_SECONDS = 3600.0  # of a token that does not say it
MAX_TOKEN_LIFE_SECONDS = 43200.0


class UnreachableError(ProxyError):
    """What gives tokens cannot be reached, or says nothing."""


Grant = Generator[TokenStep, Any, Token]  # what is to be asked; it is sent the answers' texts


def form_step(url: str, fields: Mapping[str, str], login: str = ":") -> TokenStep:
    """A request for a token: RFC 6749, section 4; the client may name itself by HTTP Basic."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    if login != ":":
        headers["Authorization"] = basic_login(login)
    return TokenStep(url, urllib.parse.urlencode(fields).encode(), headers)


def user_grant(credential: Credential, now: float) -> Grant:
    fields = {name: credential.text(name) for name in USER_FIELDS}
    fields["grant_type"] = "refresh_token"
    return read_token((yield form_step(credential.text("token_uri", OAUTH_URL), fields)))


def workforce_grant(credential: Credential, now: float) -> Grant:
    fields = {"grant_type": "refresh_token", "refresh_token": credential.text("refresh_token")}
    return read_token((yield form_step(credential.text("token_url"), fields, credential.login)))


def service_jwt(credential: Credential, now: float, **claims: str) -> str:
    """A JWT of a service account's, signed RS256 (RFC 7515, section 3.1)."""
    assert credential.key is not None
    head = {"alg": "RS256", "typ": "JWT", **given(kid=credential.text("private_key_id"))}
    issuer = {"iss": credential.text("client_email"), "iat": int(now), "exp": int(now) + 3600}
    parts = (head, {**issuer, **claims})
    text = ".".join(base64url(encode_json(part).encode()) for part in parts)
    return f"{text}.{base64url(rsa_signature(credential.key, text.encode()))}"


def service_grant(credential: Credential, now: float) -> Grant:
    url = credential.text("token_uri", OAUTH_URL)
    assertion = service_jwt(credential, now, scope=TOKEN_SCOPE, aud=url)
    fields = {"grant_type": GRANT_TYPE + "jwt-bearer", "assertion": assertion}
    return read_token((yield form_step(url, fields)))


def self_signed_token(credential: Credential, now: float) -> Token:
    """What stands for a token of a service account's where none can be had: AIP-4111."""
    account = credential.text("client_email")
    return Token(service_jwt(credential, now, sub=account, aud=VERTEX_AUDIENCE), 3600.0)


def federated_grant(credential: Credential, now: float) -> Grant:
    """The token of another provider's for one of Google's (RFC 8693)."""
    source = credential.fields["credential_source"]
    places = {key: source[key] for key in ("file", "url", "headers") if key in source}
    subject = (yield TokenStep(**places)).strip()
    form = get_or_empty(source, "format", dict)
    if form.get("type") == "json":
        name = get_or_empty(form, "subject_token_field_name", str)
        subject = get_or_empty(parsed_object(subject), name, str)
    if not subject:
        raise ProxyError(502, "The source of the subject token gives none.", upstream=True)
    exchanged = {
        "grant_type": GRANT_TYPE + "token-exchange",
        "audience": credential.text("audience"),
        "scope": TOKEN_SCOPE,
        "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token": subject,
        "subject_token_type": credential.text("subject_token_type"),
    }
    project = credential.text("workforce_pool_user_project")
    if project:
        exchanged["options"] = encode_json({"userProject": project})
    url = credential.text("token_url", STS_URL)
    return read_token((yield form_step(url, exchanged, credential.login)))


def metadata_step(url: str, page: str) -> TokenStep:
    headers = {"Metadata-Flavor": "Google"}
    return TokenStep(f"{url}/computeMetadata/v1/{page}", headers=headers, direct=True)


def metadata_grant(credential: Credential, now: float) -> Grant:
    return read_token((yield metadata_step(credential.text("url"), SERVICE_ACCOUNT + "token")))


def command_grant(credential: Credential, now: float) -> Grant:
    output = yield TokenStep(command=credential.text("command"))
    if parsed_object(output) is None:
        output = encode_json({"access_token": output.strip()})
    return read_token(output)


def source_grant(credential: Credential, now: float) -> Grant:
    assert credential.source is not None
    return (yield from CREDENTIAL_KINDS[credential.source.kind].grant(credential.source, now))


def token_grant(credential: Credential, now: float) -> Grant:
    """All that is to be asked for a token of this credential; `now` is in seconds since 1970."""
    token = yield from CREDENTIAL_KINDS[credential.kind].grant(credential, now)
    url = credential.text(IMPERSONATION)
    if not url:
        return token
    settings = get_or_empty(credential.fields, "service_account_impersonation", dict)
    seconds = get_or_empty(settings, "token_lifetime_seconds", int) or 3600
    body = {"scope": [TOKEN_SCOPE], "lifetime": f"{seconds}s"}
    body.update(given(delegates=get_or_empty(credential.fields, "delegates", list)))
    headers = {"Authorization": f"Bearer {token.value}", "Content-Type": "application/json"}
    answer = parsed_object((yield TokenStep(url, gemini_json(body), headers))) or {}
    end = get_or_empty(answer, "expireTime", str)[:19]  # there may be a fraction behind it
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(end + "+00:00")
        answer["expires_in"] = moment.timestamp() - now
    answer["access_token"] = answer.get("accessToken")
    return read_token(encode_json(answer))._replace(refresh_token=token.refresh_token)


def read_token(text: str) -> Token:
    """The token in an answer; a 502 where there is none that fits into a header."""
    answer = parsed_object(text) or {}
    value = get_or_empty(answer, "access_token", str)
    if not re.fullmatch(r"[!-~]{1,16384}", value):
        message = "What should give an access token for Vertex AI gives none that can be used."
        raise ProxyError(502, message, upstream=True)
    try:
        life = float(answer["expires_in"])
    except (KeyError, TypeError, ValueError, OverflowError):
        life = TOKEN_LIFE_SECONDS  # a 401 mends it where it does not live so long
    life = min(MAX_TOKEN_LIFE_SECONDS, max(1.0, life))  # NaN is 1
    return Token(value, life, get_or_empty(answer, "refresh_token", str))


def with_rsa_key(credential: Credential) -> Credential:
    return credential._replace(key=rsa_key(credential.text("private_key")))


def with_source(credential: Credential) -> Credential:
    fields = get_or_empty(credential.fields, "source_credentials", dict)
    if not fields:
        raise CredentialError("source_credentials is missing")
    source = read_credential(fields, credential.origin)
    if source.kind in ("external_account", "impersonated_service_account"):
        raise CredentialError(f"source_credentials of type {source.kind!r} are not supported")
    return credential._replace(source=source)


# Keys of a credential_source that lead to what is not supported.
OTHER_SOURCES = {"environment_id": "AWS", "executable": "an executable", "certificate": "X.509"}


def with_subject(credential: Credential) -> Credential:
    """The same credential, if its subject token can be read where it says."""
    source = get_or_empty(credential.fields, "credential_source", dict)
    names = [name for key, name in OTHER_SOURCES.items() if key in source]
    if "aws" in credential.text("subject_token_type"):
        names = ["AWS"]
    if names:
        advice = "what asks it for an access token can be a -token-command"
        raise CredentialError(f"credential_source is {names[0]}, which is not supported; {advice}")
    url = get_or_empty(source, "url", str)
    if bool(url) == bool(get_or_empty(source, "file", str)):
        raise CredentialError("credential_source must name either a file or a url")
    if url and not re.fullmatch(CREDENTIAL_URL, url):
        raise CredentialError("the url of credential_source is no http or https URL")
    return credential


class CredentialKind(NamedTuple):
    """A kind of credential."""

    needs: tuple[str, ...]  # fields that must be there
    grant: Callable[[Credential, float], Grant]
    mend: str  # what helps when it is refused
    complete: Callable[[Credential], Credential] = lambda credential: credential  # or refuse it


LOGIN = "gcloud auth application-default login"
USER_FIELDS = ("client_id", "client_secret", "refresh_token")
IMPERSONATION = "service_account_impersonation_url"
KEY_MEND = "see to this machine's clock, and to gcloud iam service-accounts keys list"
SOURCE_MEND = "see to the provider of the workload identity pool, and to what it trusts"
FILE_KINDS = {
    "authorized_user": CredentialKind(USER_FIELDS, user_grant, LOGIN),
    "service_account": CredentialKind(
        ("client_email", "private_key"), service_grant, KEY_MEND, with_rsa_key
    ),
    "impersonated_service_account": CredentialKind(
        (IMPERSONATION,), source_grant, LOGIN, with_source
    ),
    "external_account": CredentialKind(
        ("audience", "subject_token_type"), federated_grant, SOURCE_MEND, with_subject
    ),
    "external_account_authorized_user": CredentialKind(
        (*USER_FIELDS, "token_url"), workforce_grant, LOGIN
    ),
}
CREDENTIAL_KINDS = {
    **FILE_KINDS,
    "metadata server": CredentialKind(("url",), metadata_grant, "give the host a service account"),
    "token command": CredentialKind(("command",), command_grant, "run it by hand, as this user"),
}
URL_FIELDS = ("token_uri", "token_url", IMPERSONATION)
CREDENTIAL_URL = r"https?://([\w.-]+|\[[0-9A-Fa-f:]+\])(:[1-9]\d{0,4})?([/?][!-~]*)?"


def read_credential(fields: Any, origin: str) -> Credential:
    """What a file says, by its JSON; a CredentialError where it is of no use."""
    if type(fields) is not dict:
        raise CredentialError("it is no JSON object")
    kind = fields.get("type")
    if type(kind) is not str or kind not in FILE_KINDS:
        known = ", ".join(FILE_KINDS)
        raise CredentialError(f"its type is {kind!r:.60}, and not one of {known}")
    credential = Credential(kind, fields, origin)
    for name in FILE_KINDS[kind].needs:
        if not credential.text(name):
            raise CredentialError(f"{name} is missing, or no text")
    for name in URL_FIELDS:
        if name in fields and not re.fullmatch(CREDENTIAL_URL, credential.text(name), re.ASCII):
            raise CredentialError(f"{name} is no http or https URL")
    universe = credential.text("universe_domain", "googleapis.com")
    if universe != "googleapis.com":
        raise CredentialError(f"universe_domain is {universe!r:.60}, which is not supported")
    return FILE_KINDS[kind].complete(credential)


# ======================================================================================
# 14. Backends: where a call goes, and what differs on Vertex AI
# ======================================================================================

# What is said of Vertex AI is from google-genai 3.6, and from recordings.

DEFAULT_UPSTREAM = "https://generativelanguage.googleapis.com"


class Backend(NamedTuple):
    """Where calls go, and what is different there. The defaults are those of the Gemini API."""

    name: str = "the Gemini API"
    url: str = DEFAULT_UPSTREAM
    url_variable: str = "GOOGLE_GEMINI_BASE_URL"  # names another in the environment
    root: str = "v1beta"  # of all paths, behind the base URL
    project: str = ""  # of Vertex AI; "" where an API key stands for it
    location: str = ""
    credential: Credential | None = None  # None: a key goes with each call
    listing: tuple[str, str] = ("models?pageSize=1000", "models")  # its path, the key in its answer
    checks: tuple[str, ...] = ("port", "memory", "name", "connection", "key", "clock", "answer")
    unlisted: tuple[int, ...] = ()  # statuses of a list that this caller is not shown
    # A call as it is sent there, perhaps in several; what is said to it, as the Gemini API says it;
    # the models in the entries of the listing; a refusal with what helps against it.
    calls: Callable[[GeminiCall, Backend], tuple[GeminiCall, ...]] = lambda call, backend: (call,)
    chunks: Callable[[GeminiCall, Iterator[JSON]], Iterator[JSON]] = lambda call, chunks: chunks
    models: Callable[[list[JSON]], list[JSON]] = lambda entries: entries
    refusal: Callable[[ProxyError, Backend], ProxyError] = lambda error, backend: error

    def __str__(self) -> str:
        place = f" (project {self.project}, location {self.location})" if self.project else ""
        return f"{self.name}{place} at {self.url}"

    @property
    def place(self) -> str:
        """What Vertex AI's paths begin with."""
        return f"projects/{self.project}/locations/{self.location}/" if self.project else ""


GEMINI_API = Backend()


# No name of Vertex AI's moves on with its models: what those of the Gemini API are there.
VERTEX_LATEST = {
    "models/gemini-flash-latest": "models/gemini-3.8-flash",
    "models/gemini-flash-lite-latest": "models/gemini-3.1-flash-lite",
    "models/gemini-pro-latest": "models/gemini-3.1-pro-preview",
}


def vertex_path(path: str, backend: Backend) -> str:
    """Where a model is on Vertex AI; one of another project's says so itself."""
    path = VERTEX_LATEST.get(path, path)
    if path.startswith("projects/"):
        return path
    if path.startswith("models/"):
        path = f"publishers/google/{path}"
    return backend.place + path


def vertex_calls(call: GeminiCall, backend: Backend) -> tuple[GeminiCall, ...]:
    """A call as Vertex AI wants it: https://cloud.google.com/vertex-ai/generative-ai/docs/reference"""
    if call.passed is not None:
        return vertex_passed_calls(call, call.passed, backend)
    if call.body is None:  # the list of models
        return (call,)
    model, _, method = call.path.rpartition(":")
    path = vertex_path(model, backend)
    if method in VECTOR_METHODS:
        return vertex_embed_calls(call, path)
    if method == "countTokens" and call.optional:  # the answers with vectors tell their tokens
        return ()
    body = dict(get_or_empty(call.body, "generateContentRequest", dict) or call.body)
    call = vertex_body(call._replace(path=f"{path}:{method}", body=body), backend)
    if method == "countTokens":
        counted = {key: value for key, value in body.items() if key in COUNTED}
        call = call._replace(body=counted, headers=())
    return (call,)


COUNTED = ("contents", "systemInstruction", "tools", "generationConfig")  # all that it counts
VECTOR_METHODS = ("embedContent", "batchEmbedContents")
TRANSLATED_METHODS = (*VECTOR_METHODS, "countTokens")  # the rest of Gemini's own API just passes


def vertex_passed_calls(
    call: GeminiCall, passed: HttpParts, backend: Backend
) -> tuple[GeminiCall, ...]:
    """The calls for one of Gemini's own API; a 404 for what Vertex AI does not have."""
    target = call.path.partition("?")[0]
    model, _, method = target.rpartition(":")
    if passed.method == "GET" and re.match(r"models(/|\Z)", target):
        return (MODELS_CALL,)
    if not model.startswith("models/") or isinstance(passed.body, BodyStream):
        raise ProxyError(404, f"{target[:200]} is not served where Vertex AI answers.")
    if method not in TRANSLATED_METHODS:
        path = vertex_path(model, backend) + call.path[len(model) :]
        return (call._replace(path=path, passed=passed._replace(root=backend.root)),)
    return vertex_calls(GeminiCall(target, passed_json(method, passed.body or b"")), backend)


def passed_json(method: str, raw: bytes) -> JSON:
    """The body of one of TRANSLATED_METHODS, in which what is read here has the right types."""
    body = parse_body(raw)
    counted = body.object("generateContentRequest") or body
    contents = [*counted.objects("contents")]
    if method in VECTOR_METHODS:
        requests = [*body.objects("requests")] or [body]
        contents = [request.require_object("content") for request in requests]
    for part in (part for content in contents for part in content.objects("parts")):
        part.get("text", str)
    for _ in counted.objects("tools"):
        pass
    return body.data


NOT_ON_VERTEX = {"fileSearch", "mcpServers"}  # tools: google/genai/models.py


def vertex_body(call: GeminiCall, backend: Backend) -> GeminiCall:
    """The call with a body of its own as Vertex AI takes it, and with headers that say the rest."""
    body, left_out, headers = call.body or {}, call.left_out, call.headers
    tools = [tool for tool in body.get("tools") or () if not NOT_ON_VERTEX & tool.keys()]
    if len(tools) < len(body.get("tools") or ()):
        keys = {key for tool in body.pop("tools") for key in tool}
        left_out += tuple(f"tools.{key}" for key in sorted(keys & NOT_ON_VERTEX))
        body.update(given(tools=tools))
    config = dict(get_or_empty(body, "toolConfig", dict))
    if config.pop("includeServerSideToolInvocations", None):  # its tools mix without it
        del body["toolConfig"]
        body.update(given(toolConfig=config))
    if get_or_empty(body, "cachedContent", str).startswith("cachedContents/"):
        body["cachedContent"] = backend.place + body["cachedContent"]
    body["contents"] = [typed_content(content) for content in body.get("contents") or ()]
    if "serviceTier" in body:
        headers += (("X-Vertex-AI-LLM-Shared-Request-Type", body.pop("serviceTier")),)
    return call._replace(body=body, headers=headers, left_out=left_out)


def typed_content(content: JSON) -> JSON:
    """A turn in which each file has a type, without which Vertex AI refuses it. Addresses without
    an ending mostly lead to images: https://github.com/langchain-ai/langchainjs/pull/8947"""
    parts = content.get("parts") or []
    if not any("fileData" in part for part in parts):
        return content
    typed = list(map(dict, parts))
    for part in typed:
        if "fileData" in part:
            part["fileData"] = {"mimeType": "image/jpeg", **get_or_empty(part, "fileData", dict)}
    return {**content, "parts": typed}


MAX_PREDICT_TEXTS, MAX_PREDICT_TOKENS = 250, 20_000  # of one call; a token has a byte at least


def vertex_embed_calls(call: GeminiCall, path: str) -> tuple[GeminiCall, ...]:
    """The calls for vectors: `predict` for older models, else what google-genai asks for. Where
    there is no such method, as reported, texts are asked for one by one, and then by `predict`:
    https://github.com/googleapis/python-genai/issues/2165"""
    requests = get_or_empty(call.body, "requests", list) or [call.body or {}]
    if model_of(path).predicts:
        calls = predict_calls(path, requests, call.model)
    else:
        calls = tuple(embed_call(path, request, call.model) for request in requests)
        if len(calls) > 1:
            batch = {"requests": [one.body for one in calls]}
            calls = (GeminiCall(f"{path}:batchEmbedContents", batch, call.model, instead=calls),)
    return (calls[0]._replace(waits=call.waits), *calls[1:])


def embed_call(path: str, request: JSON, model: Model | None) -> GeminiCall:
    """The call for one vector. Its options are not where the Gemini API has them."""
    rest = {key: value for key, value in request.items() if key not in ("content", "model")}
    body = {"content": request.get("content"), **given(embedContentConfig=given(**rest))}
    instead = predict_calls(path, [request], model)
    return GeminiCall(f"{path}:embedContent", body, model, instead=instead)


def predict_calls(path: str, requests: list[JSON], model: Model | None) -> tuple[GeminiCall, ...]:
    """Calls of `predict` for these requests, with as many texts in each as it takes."""
    bodies: list[JSON] = []
    instances: list[JSON] = []  # of the last one
    size, options = 0, None
    for request in requests:
        parts = get_or_empty(request.get("content"), "parts", list)
        instance = {"content": "".join(get_or_empty(part, "text", str) for part in parts)}
        instance.update(given(task_type=request.get("taskType"), title=request.get("title")))
        own_options = given(outputDimensionality=request.get("outputDimensionality"))
        length = len(instance["content"].encode(errors="replace"))
        full = len(instances) == MAX_PREDICT_TEXTS or size + length > MAX_PREDICT_TOKENS
        if full or options != own_options:
            instances, options, size = [], own_options, 0
            bodies.append({"instances": instances, **given(parameters=options)})
        instances.append(instance)
        size += length
    return tuple(GeminiCall(f"{path}:predict", body, model) for body in bodies)


def vertex_chunks(call: GeminiCall, chunks: Iterator[Any]) -> Iterator[Any]:
    """What Vertex AI says to a call, as the Gemini API would say it."""
    target = call.path.partition("?")[0]
    method = target.rpartition(":")[2]
    if method in VECTOR_METHODS:
        chunks = vertex_vectors(method, chunks)
    if call.passed and (call.passed.method == "GET" or method in TRANSLATED_METHODS):
        return passed_chunks(target, chunks)
    return chunks


def passed_chunks(target: str, chunks: Iterator[JSON]) -> Iterator[Any]:
    """The answer to a call that is passed through, where Vertex AI was asked something else."""
    answer: Any = next(chunks)
    if target.startswith("models/") and "models" in answer:
        answer = next((entry for entry in answer["models"] if entry_path(entry) == target), None)
    if answer is None:
        raise ProxyError(404, f"{target} is not listed.", code="model_not_found")
    yield AnswerHead(200, {"content-type": "application/json; charset=UTF-8"})
    yield gemini_json(answer)


def vertex_vectors(method: str, chunks: Iterable[JSON]) -> Iterator[JSON]:
    """The vectors in the answers to vertex_embed_calls, in one answer of the Gemini API's."""
    vectors: list[JSON] = []
    tokens = 0
    for chunk in chunks:
        predictions = get_or_502(chunk, "predictions", list)
        batch = [get_or_empty(one, "embeddings", dict) for one in predictions]
        batch = batch or get_or_502(chunk, "embeddings", list)
        batch = batch or [get_or_502(chunk, "embedding", dict)]
        counts = [get_or_empty(one, "statistics", dict) for one in batch]
        tokens += sum(get_or_empty(count, "token_count", int) for count in counts)
        usage = get_or_empty(chunk, "usageMetadata", dict)
        tokens += get_or_empty(usage, "promptTokenCount", int)
        vectors += [{"values": get_or_empty(one, "values", list)} for one in batch]
    answer: JSON = {"embeddings": vectors}
    if method == "embedContent":
        answer = {"embedding": vectors[0]}
    yield {**answer, "usageMetadata": {"promptTokenCount": tokens}}


# What is there, whether or not Model Garden lists it: most of Gemini is known to be missing.
VERTEX_MODELS = (
    *("gemini-3.8-flash", "gemini-3.1-pro-preview", "gemini-3.1-flash-lite"),
    *("gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite"),
    *("gemini-embedding-2", "gemini-embedding-001"),
    *("text-embedding-005", "text-multilingual-embedding-002"),
)
VERTEX_LISTED = re.compile(r"publishers/google/models/((gemini|text-(multilingual-)?embedding)-.+)")
SELF_DEPLOYED = {"deploy", "multiDeployVertex", "deployGke"}


def vertex_models(entries: list[JSON]) -> list[JSON]:
    """The models that chat or embed, in the Gemini API's form: those listed, and those known."""
    matches = [
        VERTEX_LISTED.fullmatch(entry_path(entry))
        for entry in entries
        if get_or_empty(entry, "launchStage", str) != "DEPRECATED"
        and not SELF_DEPLOYED & get_or_empty(entry, "supportedActions", dict).keys()
    ]
    names = [match.group(1) for match in matches if match]
    return [vertex_entry(name) for name in dict.fromkeys((*names, *VERTEX_MODELS))]


def vertex_entry(name: str) -> JSON:
    methods, model = ["generateContent", "countTokens"], model_of(name)
    if model.embeds:
        methods = ["embedContent", "batchEmbedContents"]
    entry: JSON = {"name": model.path, "displayName": name, "supportedGenerationMethods": methods}
    if model.chats:  # the others' limits differ
        entry.update(inputTokenLimit=model.max_input, outputTokenLimit=model.max_output)
    return entry


# What Google says when it refuses, and what helps.
VERTEX_ADVICE = {
    "not been used in project|it is disabled": "gcloud services enable aiplatform.googleapis.com",
    "Permission '?aiplatform": "gcloud projects add-iam-policy-binding {project} "
    "--member={member} --role=roles/aiplatform.user",
    "insufficient authentication scopes": "set the machine's access scope cloud-platform",
    "API keys are not supported": "unset GOOGLE_API_KEY, and name a project with -vertex",
    "requires a quota project": "gcloud auth application-default set-quota-project {project}",
    # https://github.com/prime-radiant-inc/evener/pull/1167
    "^Publisher Model .*/locations/(?!global/|us/|eu/)": "Gemini 3 is in global, us and eu only: "
    "-vertex={project}/global",
}


def vertex_refusal(error: ProxyError, backend: Backend) -> ProxyError:
    """A refusal, with what helps. A 429 is about capacity that all share, and soon over."""
    account = (backend.credential and backend.credential.account) or "ACCOUNT"
    kind = "serviceAccount" if account.endswith("gserviceaccount.com") else "user"
    for pattern, advice in VERTEX_ADVICE.items():
        if re.search(pattern, error.message):
            words = advice.format(project=backend.project, member=f"{kind}:{account}")
            error.message = f"{error.message} What helps: {words}"
            break
    if error.code == "rate_limit_exceeded" and error.retry_after is None:
        error.retry_after = 0.0
    return error


VERTEX = Backend(
    name="Vertex AI",
    url="https://aiplatform.googleapis.com",
    url_variable="GOOGLE_VERTEX_BASE_URL",
    root="v1beta1",
    listing=("publishers/google/models?pageSize=100", "publisherModels"),
    unlisted=(401, 403, 404),
    checks=("port", "memory", "credential", "name", "connection", "token", "clock", "answer"),
    calls=vertex_calls,
    chunks=vertex_chunks,
    models=vertex_models,
    refusal=vertex_refusal,
)


# ======================================================================================
# 15. Client: all that talks to Gemini: waiting, connections, attempts, memory
# ======================================================================================

CONNECT_SECONDS = 10.0  # to connect, and as much silence again during the TLS handshake
ADDRESS_SECONDS = 2.5  # of these, for each of several addresses but the last
IDLE_CONNECTION_SECONDS = 55.0  # middleboxes forget unused connections after 60 seconds or more
MAX_IDLE_CONNECTIONS = 128
READY_SECONDS = 0.0002  # what comes faster than this was there before the wait began
KEEP_ALIVE_SECONDS = 10.0  # a stream that is silent for so long sends a keep-alive
MAX_ATTEMPTS = 3  # of a call, the first included
BACKOFF_SECONDS = 0.2  # before the next attempt; it doubles with each one
MAX_BACKOFF_SECONDS = 2.0  # a longer wait is left to the client
RETRY_WINDOW_SECONDS = 30.0  # later, the same call is not sent again
BROKEN_RETRY_SECONDS = 1.0  # if a connection breaks so early, Gemini has not begun to work
MAX_PARALLEL_CALLS = 4  # of one request of a client
MAX_CALLS_OF_ANSWER = 16  # one after the other, where Gemini wants several for a long answer
BLOCK_BYTES = 64 << 10  # of a body that are read at a time
SMALL_BODY_BYTES = 1 << 20  # sent without a look at whether Gemini answers meanwhile
MODEL_LIST_SECONDS = 300.0  # how long a list of Gemini's models is used
MAX_COOLDOWNS = 1000  # models that are passed over; with -client-keys, for each key
RETIREMENT_LOG_SECONDS = 86400.0  # between two log lines about a model that goes
MAX_LISTED_MODELS = 5000  # that are remembered, in all lists together
MAX_RETIREMENTS = 100  # models that are remembered as going
STATE_LOCK_SECONDS = 1.0  # how long to wait for a state file that another process has locked
MASK = "[masked]"

# ---- the heads of HTTP messages ----

HEADER_LINE = re.compile(rf"({HTTP_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\r\n]*))?\r\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
MAX_HEAD_BYTES = 64 << 10  # of the first line and the headers of a request or an answer
MAX_HEADER_LINES = 200
SINGLE_HEADERS = ("host", "content-length", "transfer-encoding")  # two would be ambiguous


class BadHeadError(ProxyError):
    """This is not the head of an HTTP message."""


def read_headers(file: io.BufferedIOBase, limit: int) -> dict[str, str]:
    """The headers up to the empty line, by name in lower case; they may have `limit` bytes.

    A BadHeadError for what another reader might take for something else (RFC 9112, section 5). The
    library's parser is slow, and is one for mail: it stops at a malformed line without an error.
    """
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADER_LINES + 1):  # each costs ten times its bytes
        line = file.readline(limit + 1).decode("latin-1")
        limit -= len(line)
        if line == "\r\n":
            return headers
        match = HEADER_LINE.fullmatch(line)
        if limit < 0:
            raise BadHeadError(431, "The headers are too large.")
        if not match:
            raise BadHeadError(400, "This is not an HTTP header line: " + ascii(line[:60]))
        name, value = match.group(1).lower(), match.group(2).strip(" \t")
        if name not in headers:
            headers[name] = value
        elif name in SINGLE_HEADERS:
            raise BadHeadError(400, f"The header {name} comes twice.")
        else:
            headers[name] += f", {value}"
    raise BadHeadError(431, f"There are more than {MAX_HEADER_LINES} header lines.")


LAST_CHUNK = b"0\r\n\r\n"


def chunk_of(data: bytes) -> bytes:
    """Data as a chunk of a body (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- waiting ----

READABLE, WRITABLE = 1, 4  # POLLIN and POLLOUT in the poll.h of Linux and of macOS
# Linux reports a hang-up at once, even behind unread bytes (poll(2)). PyPy 3.9 lacks the name only.
POLLRDHUP = getattr(select, "POLLRDHUP", {"linux": 0x2000}.get(sys.platform, 0))


class ClientGoneError(Exception):
    """The client has left, so there is nobody to finish the call to Gemini for."""


class SelectPoll:
    """What is used of select.poll's objects, made of select.select: Windows has nothing else."""

    def __init__(self) -> None:
        self.events: dict[int, int] = {}  # by descriptor

    def register(self, sock: socket.socket, event: int) -> None:
        self.events[sock.fileno()] = event

    def poll(self, milliseconds: int) -> list[tuple[int, int]]:
        readable = [fd for fd, event in self.events.items() if event & READABLE]
        writable = [fd for fd, event in self.events.items() if event & WRITABLE]
        if not readable and not writable:  # which Windows refuses (WSAEINVAL)
            time.sleep(milliseconds / 1000)
            return []
        # A connection that fails is among the last ones there (learn.microsoft.com, "select").
        ready = itertools.chain(*select.select(readable, writable, writable, milliseconds / 1000))
        return [(fd, self.events[fd]) for fd in dict.fromkeys(ready)]


class Poller:
    """Waits for sockets: the one place that knows how the system does that."""

    def __init__(self, *readable: socket.socket):
        self.poll = getattr(select, "poll", SelectPoll)()
        for sock in readable:
            self.watch(sock, READABLE)

    def watch(self, sock: socket.socket, event: int) -> None:
        """Wait for this event of the socket; 0 stands for none."""
        self.poll.register(sock, event)

    def wait(self, seconds: float) -> list[int]:
        """The descriptors that are ready; none if that takes longer than this."""
        return [fd for fd, _ in self.poll.poll(max(0, math.ceil(seconds * 1000)))]


class Waiter:
    """The one place that waits for Gemini, on behalf of one request of a client.

    It wakes up when Gemini's socket is ready, when the client leaves, when time is up, when a
    keep-alive is due, and when the server ends (then `stopping` becomes readable).
    """

    def __init__(
        self,
        client: socket.socket | None,
        silence: float,  # seconds that Gemini may be silent
        stopping: socket.socket | None = None,
        keep_alive: Callable[[], None] | None = None,  # called when the client hears nothing
    ):
        self.client, self.silence = client, silence
        self.stopping, self.keep_alive = stopping, keep_alive
        # Called before anything is waited for; returns when the client was sent something.
        self.flush: Callable[[], float] | None = None
        self.pollers: dict[tuple[socket.socket | None, int], Poller] = {}
        self.quiet_since = time.monotonic()  # since when the client has heard nothing
        self.deadline = math.inf  # of all waiting together
        self.recording: Recording | None = None  # of that request

    def poller(self, gemini: socket.socket | None, event: int) -> Poller:
        """The poller of this event, the client and the end. A stream uses it for each chunk."""
        poller = self.pollers.get((gemini, event))
        if poller is None:
            poller = self.pollers[gemini, event] = Poller()
            if gemini is not None:
                poller.watch(gemini, event)
            if self.client is not None:
                poller.watch(self.client, POLLRDHUP or READABLE)
            if self.stopping is not None:
                poller.watch(self.stopping, READABLE)
        return poller

    def wait(
        self, gemini: socket.socket | None, event: int = READABLE, seconds: float | None = None
    ) -> float:
        """Wait for Gemini's socket, whose silence is a 504, or for so many seconds. Returns the
        seconds that it took."""
        if self.flush:
            self.quiet_since = max(self.quiet_since, self.flush())
        poller = self.poller(gemini, event)
        gemini_fd = -1 if gemini is None else gemini.fileno()
        stopping_fd = -1 if self.stopping is None else self.stopping.fileno()
        began = now = time.monotonic()
        deadline = min(self.deadline, began + (self.silence if seconds is None else seconds))
        while True:
            keep_alive_due = math.inf
            if self.keep_alive:
                keep_alive_due = self.quiet_since + KEEP_ALIVE_SECONDS
            ready = poller.wait(min(deadline, keep_alive_due) - now)
            now = time.monotonic()
            if stopping_fd in ready:
                raise ProxyError(503, "The server is shutting down.")
            if ready not in ([], [gemini_fd]) and self.client_left(poller):
                raise ClientGoneError
            if self.keep_alive and now >= keep_alive_due:  # also where Gemini speaks, but not to it
                self.keep_alive()
                self.quiet_since = time.monotonic()
            if gemini_fd in ready:
                return now - began
            if now >= deadline:
                if seconds is None:
                    raise self.silence_error()
                return max(seconds, now - began)  # which differ by rounding

    def silence_error(self) -> ProxyError:
        message = f"Timed out: Gemini has been silent for {self.silence:g} seconds."
        return SilenceError(504, message, upstream=True)

    def client_left(self, poller: Poller) -> bool:
        """Whether the client hung up; a system without POLLRDHUP only says that it can be read."""
        if self.client and not POLLRDHUP:
            with contextlib.suppress(OSError):
                if self.client.recv(1, socket.MSG_PEEK):  # its next request came early
                    poller.watch(self.client, 0)
                    return False
        return True


IDLE_WAITER = Waiter(None, 0)  # of connections that wait for their next call


# ---- connections ----

BROKEN_ERRORS = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
CONNECTING = getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)  # Windows has a word of its own
Address = tuple[int, int, int, str, Any]  # as socket.getaddrinfo gives it
HttpProxy = tuple[str, int, dict[str, str]]  # host, port and headers of one on the way to Gemini


class UpstreamSocket(io.RawIOBase):
    """A connection to Gemini as a raw file. Its socket never blocks: its waiter waits."""

    def __init__(self, sock: socket.socket, waiter: Waiter):
        self.sock, self.waiter, self.poller = sock, waiter, Poller(sock)
        self.tls: ssl.SSLSocket | None = None  # the same socket, once it speaks TLS
        self.reused = False  # whether it was idle before this call: Gemini may have closed it
        self.received = False  # whether a byte of the answer to this call has come
        self.slow = False  # whether the last bytes had to be waited for: so will the next ones
        self.early = b""  # of an answer that came while the body was still being sent
        self.cut = False  # whether the rest of that body was not sent

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; 0 at the end. (TLS may hold bytes that the system knows nothing of.)"""
        if self.early:
            size = min(len(buffer), len(self.early))
            buffer[:size], self.early = self.early[:size], self.early[size:]
            self.received = True
            return size
        if self.slow and not (self.tls and self.tls.pending()):
            self.slow = self.waiter.wait(self.sock) > READY_SECONDS
        count: int = self.when_ready(READABLE, self.sock.recv_into, buffer)
        self.received = self.received or count > 0
        return count

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.when_ready(WRITABLE, self.sock.send, view) :]

    def send_stream(self, body: BodyStream) -> None:
        """Send a body as it comes, until Gemini answers or hangs up: then its answer tells why."""
        with contextlib.suppress(*BROKEN_ERRORS):
            for block in body.blocks:
                view = memoryview(block if body.length is not None else chunk_of(block))
                while view and not self.cut:
                    view = view[self.when_ready(READABLE | WRITABLE, self.send_unanswered, view) :]
                if self.cut:
                    return
            if body.length is None:
                self.send(LAST_CHUNK)

    def send_unanswered(self, view: memoryview) -> int:
        """Send some of a body, but nothing more of it once Gemini says anything. (TLS has words of
        its own, which are not Gemini's.)"""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            self.early, self.cut = self.sock.recv(BLOCK_BYTES), True
            return 0
        try:
            return self.sock.send(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def start_tls(self, context: ssl.SSLContext, host: str, session: ssl.SSLSession | None) -> None:
        """Speak TLS; the session of an earlier connection saves half of the handshake."""
        self.sock = self.tls = context.wrap_socket(
            self.sock, server_hostname=host, session=session, do_handshake_on_connect=False
        )
        self.when_ready(READABLE, self.tls.do_handshake)

    def when_ready(self, event: int, operation: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns once it does not block: after this event, or the one that TLS needs."""
        while True:
            try:
                return operation(*arguments)
            except ssl.SSLWantReadError:
                event = READABLE
            except ssl.SSLWantWriteError:
                event = WRITABLE
            except BlockingIOError:
                pass
            self.slow = self.waiter.wait(self.sock, event) > READY_SECONDS

    def close(self) -> None:
        super().close()
        self.sock.close()


def dial(host: str, port: int, waiter: Waiter) -> socket.socket:
    """A non-blocking connection to the first address of the host's that answers: v6, v4, v6, ...

    They have CONNECT_SECONDS together. The library gives each the whole time, but where a network
    drops IPv6 in silence, several of Google's never answer. (The look-up watches no client.)
    """
    deadline = min(waiter.deadline, time.monotonic() + CONNECT_SECONDS)
    families: dict[int, list[Address]] = {}
    for resolved in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        families.setdefault(resolved[0], []).append(resolved)
    turns = itertools.chain(*itertools.zip_longest(*families.values()))
    *addresses, last = [address for address in turns if address]
    for address in addresses:
        with contextlib.suppress(OSError):
            seconds = max(0.1, deadline - time.monotonic())
            return reach(address, waiter, min(seconds, ADDRESS_SECONDS))
    return reach(last, waiter, max(0.1, deadline - time.monotonic()))


def reach(address: Address, waiter: Waiter, seconds: float) -> socket.socket:
    """A non-blocking connection to the address; an OSError if that fails or takes longer."""
    sock = socket.socket(*address[:3])
    try:
        sock.setblocking(False)
        error = sock.connect_ex(address[4])
        if error == CONNECTING:
            if waiter.wait(sock, WRITABLE, seconds) >= seconds:
                raise TimeoutError
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


BODILESS = (204, 304)  # answers of these statuses have no body (RFC 9110, section 6.4.1)


class Response:
    """Gemini's answer (RFC 9112): read_head() reads its head, read() and read1() the body.

    What breaks the rules is an HTTPException; a body that ends too early is an IncompleteRead. A
    response that is lost closes its connection, unless its file was detached.
    """

    def __init__(self, connection: UpstreamSocket):
        self.connection, self.file = connection, io.BufferedReader(connection)
        self.status, self.reason, self.chunked = 0, "", False
        self.headers: dict[str, str] = {}  # by name in lower case
        self.left: int | None = None  # bytes of the body or chunk; None if that is not known yet
        self.complete = False  # whether the body was read to its end
        self.persistent = False  # whether the connection stays open then
        self.attempt: Attempt | None = None  # that is recorded

    def read_head(self) -> None:
        """Read the head, past those of interim answers (1xx), which count as silence."""
        deadline = time.monotonic() + self.connection.waiter.silence
        while self.status < 200:
            if time.monotonic() > deadline:
                raise self.connection.waiter.silence_error()
            line = self.file.readline(MAX_HEAD_BYTES)
            if not line:
                raise http.client.RemoteDisconnected("the connection ended before an answer")
            match = STATUS_LINE.fullmatch(line)
            if not match:
                raise http.client.BadStatusLine(ascii(line[:60]))
            version, status, reason = match.groups(b"")
            self.status, self.reason = int(status), reason.decode("latin-1")
            try:
                self.headers = read_headers(self.file, MAX_HEAD_BYTES)
            except BadHeadError as error:
                raise http.client.HTTPException(error.message) from None
        self.chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length")
        if length is not None and not self.chunked:
            if not length.isdecimal():  # int() takes more than HTTP does
                raise http.client.HTTPException("its Content-Length is no number")
            self.left = int(length)
            self.complete = not self.left
        if self.status in BODILESS:  # whatever else its head says
            self.left, self.complete = 0, True
        if "close" not in self.headers.get("connection", "").lower() and version == b"1":
            self.persistent = self.chunked or self.left is not None
        if self.attempt:
            self.attempt.begin_answer(self.status, self.headers)

    def read1(self, limit: int) -> bytes:
        """The next bytes of the body, as soon as there are some; none at its end."""
        if self.chunked and not self.left and not self.complete:
            self.next_chunk()
        if self.complete:
            return b""
        if self.left is None:
            data = self.file.read1(limit)
            self.complete = not data  # such a body ends with the connection
        else:
            data = self.file.read1(min(limit, self.left))
            if not data:
                raise http.client.IncompleteRead(b"")
            self.left -= len(data)
            self.complete = not self.left and not self.chunked
        if self.attempt and data:
            self.attempt.answer.feed(data)
        return data

    def next_chunk(self) -> None:
        """Go on to the next chunk, or past the last one and its trailers (RFC 9112, 7.1)."""
        in_step = self.left is None or self.file.read(2) == b"\r\n"
        match = in_step and CHUNK_LINE.fullmatch(self.file.readline(MAX_HEAD_BYTES))
        if not match:
            raise http.client.IncompleteRead(b"")
        self.left = int(match.group(1), 16)
        if not self.left:
            self.complete = True
            try:
                read_headers(self.file, MAX_HEAD_BYTES)
            except BadHeadError:
                self.persistent = False  # the body is whole, but what comes after it is unclear

    def read(self, limit: int = MAX_ANSWER_BYTES + 1) -> bytes:
        """The rest of the body, or so many bytes of it."""
        body = bytearray()
        try:
            while len(body) < limit and not self.complete:
                body += self.read1(min(limit - len(body), BLOCK_BYTES))
        except http.client.IncompleteRead:
            raise http.client.IncompleteRead(bytes(body)) from None
        return bytes(body)


class UpstreamRequest(urllib.request.Request):
    """A request to Gemini, with what the pool must know; an idle connection is not `fresh`."""

    def __init__(
        self, url: str, headers: Mapping[str, str], parts: HttpParts, waiter: Waiter, fresh: bool
    ):
        usual = {"User-Agent": f"proxy-to-gemini/{VERSION}", **parts.headers}
        # The last one is for cookies, which there are none of.
        super().__init__(url, None, {**usual, **headers}, "", method=parts.method)
        self.body, self.waiter, self.fresh = parts.body, waiter, fresh


class Pool(urllib.request.BaseHandler):
    """How urllib reaches Gemini: over connections that are used again."""

    def __init__(self, upstream: str, count: Callable[..., None] = lambda *_: None):
        self.count = count  # called with the name of a metric
        parts = urllib.parse.urlsplit(upstream)
        self.host = parts.hostname or ""
        self.port = parts.port or {"https": 443, "http": 80}[parts.scheme]
        self.authority = f"{self.host}:{self.port}"
        if ":" in self.host:
            self.authority = f"[{self.host}]:{self.port}"
        self.idle: collections.deque[tuple[float, UpstreamSocket]] = collections.deque()
        self.proxy = proxy_for(parts.scheme, parts.netloc.rpartition("@")[2])
        self.context: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self.context = tls_context()
        self.session: ssl.SSLSession | None = None  # of a TLS connection, for new ones to resume

    def https_open(self, request: UpstreamRequest) -> Response:
        """Send the request: its Response, of which nothing is read yet."""
        connection = self.acquire(request)
        connection.waiter, connection.received = request.waiter, False
        target, headers, body = request.selector, dict(request.header_items()), request.body
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
        elif body is not None and body.length is None:
            headers["Transfer-Encoding"] = "chunked"
        elif body is not None:
            headers["Content-Length"] = str(body.length)
        if self.proxy and not self.context:  # a proxy for plain HTTP wants the whole URL
            target = f"http://{self.authority}{target}"
            headers.update(self.proxy[2])
        head = request_head(request.get_method(), target, request.host, headers)
        if isinstance(body, bytes) and len(body) > SMALL_BODY_BYTES:
            body = BodyStream([body], len(body))
        try:
            if isinstance(body, BodyStream):
                connection.send(head)
                connection.send_stream(body)
            else:
                connection.send(head + (body or b""))
        except BaseException:
            connection.close()
            raise
        return Response(connection)

    http_open = https_open

    def acquire(self, request: UpstreamRequest) -> UpstreamSocket:
        """The connection that was used last of those that are idle and still open, or a new one."""
        while self.idle and not request.fresh:
            try:
                since, connection = self.idle.pop()
            except IndexError:  # another thread was faster
                break
            readable = connection.poller.wait(0)  # it is closed, or out of step
            if not readable and time.monotonic() - since < IDLE_CONNECTION_SECONDS:
                return connection
            connection.close()
        return self.connect(request.waiter)

    def connect(self, waiter: Waiter) -> UpstreamSocket:
        """A new connection, through the proxy if there is one, and with TLS for https."""
        self.count("upstream_connections_total")
        waiter.wait(None, seconds=0)  # which flushes, too: the look-up of the name may take long
        deadline = waiter.deadline
        waiter = Waiter(waiter.client, CONNECT_SECONDS, waiter.stopping, waiter.keep_alive)
        waiter.deadline = deadline
        host, port, _ = self.proxy or (self.host, self.port, {})
        connection = UpstreamSocket(dial(host, port, waiter), waiter)
        try:
            if self.context:
                if self.proxy:
                    self.open_tunnel(connection, self.proxy)
                connection.start_tls(self.context, self.host, self.session)
            waiter.wait(None, seconds=0)  # a client that left meanwhile needs no answer
        except BaseException:
            connection.close()
            raise
        return connection

    def open_tunnel(self, connection: UpstreamSocket, proxy: HttpProxy) -> None:
        """Have the proxy connect us to Gemini (RFC 9110, section 9.3.6)."""
        host, port, headers = proxy
        connection.send(request_head("CONNECT", self.authority, self.authority, headers))
        response = Response(connection)
        response.read_head()
        if not 200 <= response.status < 300:
            answer = f"{response.status} {response.reason}".rstrip()
            raise OSError(f"the proxy {host}:{port} says {answer}")
        response.file.detach()

    def release(self, response: Response) -> None:
        """Keep the connection of a response for other calls; close it if it cannot carry any."""
        response.file.detach()
        connection = response.connection
        if not response.complete or not response.persistent or connection.cut:
            connection.close()  # this is what stops the bill
            return
        connection.reused = True
        connection.waiter = IDLE_WAITER  # or it would hold the last request and its body
        self.idle.append((time.monotonic(), connection))
        if len(self.idle) > MAX_IDLE_CONNECTIONS:
            self.drop_oldest()

    def drop_oldest(self) -> None:
        with contextlib.suppress(IndexError):
            self.idle.popleft()[1].close()

    def tidy(self) -> None:
        """Close what has been idle for too long."""
        with contextlib.suppress(IndexError):
            while time.monotonic() - self.idle[0][0] > IDLE_CONNECTION_SECONDS:
                self.drop_oldest()


def request_head(method: str, target: str, host: str, headers: dict[str, str]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in {"Host": host, **headers}.items()]
    return "".join([f"{method} {target} HTTP/1.1\r\n", *lines, "\r\n"]).encode("latin-1")


def proxy_for(scheme: str, host: str) -> HttpProxy | None:
    """The proxy that the environment names for this scheme and host, in any usual spelling."""
    url = urllib.request.getproxies().get(scheme)
    if not url or urllib.request.proxy_bypass(host):
        return None
    parts = urllib.parse.urlsplit("//" + url.rpartition("://")[2])
    if not parts.hostname:
        raise ValueError(f"{scheme.upper()}_PROXY is not the address of a proxy")
    headers = {}
    if parts.username:
        login = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
        headers["Proxy-Authorization"] = basic_login(login)
    return parts.hostname, parts.port or 80, headers


def tls_context() -> ssl.SSLContext:
    """The one TLS context. It reads SSL_CERT_FILE and SSL_CERT_DIR by itself, but not this one."""
    context = ssl.create_default_context()
    if sys.platform == "darwin" and not ssl.get_default_verify_paths().cafile:
        context.load_verify_locations("/etc/ssl/cert.pem")  # python.org's Python brings none
    bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle and os.path.isdir(bundle):
        context.load_verify_locations(capath=bundle)
    elif bundle:
        context.load_verify_locations(cafile=bundle)
    context.set_alpn_protocols(["http/1.1"])
    return context


# ---- calls ----

TRANSPORT_ERRORS = (OSError, http.client.HTTPException)


def reason_of(failure: Exception) -> str:
    """What is wrong, without a number. (Python has words of its own for Windows' sockets.)"""
    words: dict[int, str] = getattr(socket, "errorTab", {})
    own = words.get(getattr(failure, "errno", None) or 0)
    return own or getattr(failure, "strerror", None) or str(failure) or type(failure).__name__


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with a mask in place of each of these secrets."""
    for secret in filter(None, secrets):
        text = text.replace(secret, MASK)
    return text


def transport_error(failure: Exception) -> ProxyError:
    """What it means to the client that Gemini could not be reached, or broke off."""
    if isinstance(failure, ProxyError):
        return failure.with_traceback(None)  # a call that keeps it would hold itself
    if isinstance(failure, TimeoutError):
        return ProxyError(504, "Gemini could not be reached in time.", upstream=True)
    if isinstance(failure, http.client.IncompleteRead):
        # In words upon which agents ask again: agent-session.ts of badlogic/pi-mono
        return ProxyError(502, "Connection lost: Gemini's answer broke off.", upstream=True)
    message = f"Gemini could not be reached, or does not speak HTTP: {reason_of(failure)}"
    return ProxyError(502, message, upstream=True)


def lacks_method(failure: Exception) -> bool:
    """Whether there is no such method, or not for this model; Google has several words for it."""
    status = getattr(failure, "status", 0)
    words = re.search("precondition check failed|not supported", str(failure), re.I)
    return status == 404 or (status == 400 and words is not None)


# Headers of an answer that is passed through.
ANSWER_HEADERS = re.compile(
    r"content-(type|disposition|encoding)|location|retry-after|x-g(oog-upload|emini)-.*", re.ASCII
)


def json_parts(call: GeminiCall, root: str) -> HttpParts:
    """What a call of this server's own has besides its path."""
    headers = {"Content-Type": "application/json", **dict(call.headers)}
    if call.body is None:
        return HttpParts("GET", root, headers)
    return HttpParts("POST", root, headers, gemini_json(call.body))


class UpstreamCall:
    """One call to Gemini, in at most MAX_ATTEMPTS attempts: send() it, then read its chunks().

    Another attempt is made while no byte of a good answer has come: when Gemini says that it may
    help (`retry_after`, up to MAX_BACKOFF_SECONDS) or the connection broke within
    BROKEN_RETRY_SECONDS, but not after RETRY_WINDOW_SECONDS; and at any time when a repaired call
    or another token may pass, as a refusal costs nothing, and a large body may take that long.
    """

    def __init__(
        self, gemini: Gemini, call: GeminiCall, waiter: Waiter, key: str, left_out: list[str]
    ):
        self.gemini, self.call, self.waiter, self.key = gemini, call, waiter, key
        self.left_out = left_out  # gets the names of what goes so that Gemini takes the call
        self.response: Response | None = None
        self.send_error: Exception  # outcome() returns it in its turn: calls are sent ahead
        self.access: Access | None = None  # with which it was sent
        self.renewed = False  # whether that was renewed after a 401
        self.attempt: Attempt | None = None  # the last one, where it is recorded
        self.attempts = 0
        self.began = self.sent = time.monotonic()

    def send(self, fresh: bool = False) -> None:
        """Make an attempt; on a fresh connection where the last one got no byte."""
        self.attempts += 1
        backend = self.gemini.backend
        parts = self.call.passed or json_parts(self.call, backend.root)
        url = f"{backend.url}/{parts.root}/{self.call.path}"
        fresh = fresh or isinstance(parts.body, BodyStream)  # which cannot be sent again
        try:
            self.access = self.gemini.access(self.key, self.waiter)
            request = UpstreamRequest(url, self.access.headers, parts, self.waiter, fresh)
            if self.waiter.recording:
                self.attempt = self.waiter.recording.attempt(request)
            self.response = self.gemini.opener.open(request)
            self.response.attempt = self.attempt
        except (ProxyError, *TRANSPORT_ERRORS) as failure:
            self.send_error = failure.with_traceback(None)  # which leads back to this object
        self.sent = time.monotonic()

    def chunks(self) -> Iterator[Any]:
        """Gemini's answer: one chunk, or those of a stream; to a call that is passed through, an
        AnswerHead and bytes. A call not sent yet is sent now."""
        try:
            if self.call is MODELS_CALL:
                yield {"models": self.gemini.list_models(self.waiter, self.key)}
                return
            if self.call.passed:
                yield from self.passed_answer(self.good_response())
            else:
                yield from self.answer_chunks()
        except (ProxyError, *TRANSPORT_ERRORS) as failure:
            if self.call.instead and lacks_method(failure):
                yield from self.chunks_instead()
            elif not self.call.optional:
                raise self.reported(failure) from None  # no local may hold it: it holds this frame
            else:
                yield {}
        finally:
            self.release()

    def answer_chunks(self) -> Iterator[JSON]:
        """The chunks of an answer that may take several calls: each goes on where the last one
        ended."""
        token = ""
        for _ in range(MAX_CALLS_OF_ANSWER):
            last_token = token
            for chunk in self.response_chunks(self.good_response()):
                token = continuation_token(chunk) or token
                yield chunk
            if token == last_token:
                return
            self.release()
            body = {**(self.call.body or {}), "continuationToken": token}
            self.call = self.call._replace(body=body)
            self.attempts, self.began = 0, time.monotonic()

    def response_chunks(self, response: Response) -> Iterable[JSON]:
        if self.call.streaming:
            return read_sse(iter(functools.partial(response.read1, BLOCK_BYTES), b""))
        body = response.read()
        if len(body) > MAX_ANSWER_BYTES:
            raise invalid_answer(TOO_LONG)
        return (read_chunk(body),)

    def passed_answer(self, response: Response) -> Iterator[Any]:
        """The answer as it comes: its head, then its bytes. Neither a head nor an error quotes the
        key."""
        headers = {
            name: self.masked(value.encode("latin-1")).decode("latin-1")
            for name, value in response.headers.items()
            if ANSWER_HEADERS.fullmatch(name)
        }
        yield AnswerHead(response.status, headers)
        if response.status >= 400:
            self.gemini.count("upstream_errors_total", str(response.status))
            yield self.masked(response.read())
        else:
            yield from iter(functools.partial(response.read1, BLOCK_BYTES), b"")

    def masked(self, data: bytes) -> bytes:
        """The bytes without the key or the token, where there is one."""
        secrets = [self.access.secret] if self.access else []
        return without_secrets(data.decode("latin-1"), secrets).encode("latin-1")

    def chunks_instead(self) -> Iterator[JSON]:
        """The answers to the calls that stand in for this one."""
        self.release()
        calls = self.gemini.answers_to(self.call.instead, self.waiter, self.key, self.left_out)
        with contextlib.closing(calls):
            for chunks in calls:
                yield from chunks

    def error_of(self, failure: Exception) -> ProxyError:
        """What a failure of the last attempt means to the client."""
        error = transport_error(failure)
        if self.attempt and not self.attempt.error:
            self.attempt.error = error.message
        return error

    def reported(self, failure: Exception) -> ProxyError:
        """The error for the client, which does not quote the key."""
        error = self.error_of(failure)
        error.message = self.masked(error.message.encode("utf-8", "replace")).decode()[:8000]
        return error

    def good_response(self) -> Response:
        """The response with status 200 (with any, where it is passed through), after further
        attempts if need be; else the refusal."""
        while True:
            outcome = self.outcome()
            if isinstance(outcome, Response):
                return outcome
            error = self.error_of(outcome)
            unanswered = self.response is None or not self.response.connection.received
            stale = unanswered and self.response is not None and self.response.connection.reused
            late = self.response is not None and time.monotonic() - self.sent > BROKEN_RETRY_SECONDS
            if isinstance(outcome, BROKEN_ERRORS) and unanswered and not late:
                error.retry_after = 0.0  # later, Gemini may be at work, and would be paid for twice
            self.release()
            if error.upstream:  # not because this server ends
                self.gemini.count("upstream_errors_total", str(error.status))
            backoff = self.backoff(error)
            if backoff is None:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame: a cycle, and the body in it
            if backoff and not stale:  # which says nothing of Gemini
                self.waiter.wait(None, seconds=backoff)
            self.gemini.count("upstream_retries_total")
            self.send(fresh=unanswered)

    def outcome(self) -> Response | Exception:
        """Read the head of the answer to an attempt: the response if it is good, else an error."""
        if not self.attempts:
            self.send()
        if self.response is None:
            error = self.send_error
            del self.send_error  # once it is raised, its traceback leads here
            return error
        response = self.response
        try:
            response.read_head()
            renewable = response.status == 401 and self.gemini.tokens and not self.renewed
            if response.status == 200 or (self.call.passed and not renewable):
                tls = response.connection.tls
                if tls and not response.connection.reused and not tls.session_reused:
                    # Its ticket has come (RFC 8446, 4.6.1). A copy is dear, and serves all.
                    self.gemini.pool.session = tls.session
                return response
            body = response.read(1 << 20)
        except http.client.IncompleteRead as failure:
            body = failure.partial
        except TRANSPORT_ERRORS as failure:
            return failure
        body = self.masked(body)
        error = gemini_refusal(response.status, read_json(body), body)
        return self.gemini.backend.refusal(error, self.gemini.backend)

    def backoff(self, error: ProxyError) -> float | None:
        """Make ready for the next attempt, by another token or a repair of the call where one of
        them helps: the seconds to wait for it, or None to give up."""
        streams = self.call.passed and isinstance(self.call.passed.body, BodyStream)
        if self.attempts >= MAX_ATTEMPTS or streams:
            return None
        if error.status == 400:
            call, names = repaired(self.call, error.message)
            if call is not None:
                self.call = call
                self.left_out += names
                return 0.0
        if error.status == 401 and not self.renewed and self.gemini.drop_access(self.access):
            self.renewed = True
            return 0.0
        if fallback_reason(error) == "overloaded" and self.call.model and self.call.model.further:
            return None  # the next model can answer at once
        late = time.monotonic() - self.began > RETRY_WINDOW_SECONDS
        if late or error.retry_after is None or error.retry_after > MAX_BACKOFF_SECONDS:
            return None
        return max(error.retry_after, BACKOFF_SECONDS * 2.0**self.attempts * random.uniform(0.5, 1))

    def release(self) -> None:
        """Give the connection back. If its answer was not read to the end, that hangs up."""
        response, self.response = self.response, None
        if response is not None:
            self.gemini.pool.release(response)


# ---- access ----

# A token is renewed when it has no longer to live than this, or than half of its life. (With more,
# the metadata server would be asked at each call: it gives the same token until four minutes are
# left, as google/auth/_helpers.py says.)
TOKEN_MARGIN_SECONDS = 225.0
TOKEN_PAUSE_SECONDS = 1.0  # between two renewals that fail, or that a 401 asks for
TOKEN_ANSWER_SECONDS = 10.0  # for a server that gives tokens to answer; it has as long to connect
METADATA_SECONDS = 3.0  # for the metadata server, in all
COMMAND_SECONDS = 20.0
MAX_TOKEN_ATTEMPTS = 3
MAX_TOKEN_BYTES = 1 << 20  # of an answer with a token


class Access(NamedTuple):
    """What opens a back end to a call."""

    secret: str
    headers: Mapping[str, str]  # that carry it
    due: float = math.inf  # when it is to be renewed, on the monotonic clock
    ends: float = math.inf


def fetch_token(credential: Credential) -> Token:
    """A new token; a ProxyError that tells why there is none."""
    now = time.time()
    grant, answer = token_grant(credential, now), None
    try:
        while True:
            answer = token_answer(grant.send(answer))
    except StopIteration as end:
        token: Token = end.value
        return token
    except UnreachableError:
        if credential.key is None:
            raise
        return self_signed_token(credential, now)


def token_answer(step: TokenStep) -> str:
    """What the file, the command or the server of this step says."""
    if step.command:
        return command_output(step.command)
    if step.file:
        try:
            with open(step.file, encoding="utf-8") as file:
                return file.read(MAX_TOKEN_BYTES)
        except (OSError, ValueError) as error:
            message = f"The subject token cannot be read: {error}"
            raise ProxyError(502, message, upstream=True) from None
    for _ in range(MAX_TOKEN_ATTEMPTS):
        status, body = ask_for_token(step)
        if status == 200:
            return body.decode("utf-8", "replace")
        word = get_or_empty(read_json(body), "error", str)
        if status not in (408, 429) and status < 500 and word not in TEMPORARY_ERRORS:
            break
    raise token_refusal(step, status, body)


# google/oauth2/_client.py: what may be asked again
TEMPORARY_ERRORS = ("temporarily_unavailable", "server_error", "internal_failure")


def token_refusal(step: TokenStep, status: int, body: bytes) -> ProxyError:
    """What a server says that gives no token: RFC 6749, section 5.2, or Google's form of errors."""
    answer = read_json(body)
    words = (
        f"{host_of(step.url)} says",
        gemini_refusal(status, answer, body).message,
        get_or_empty(answer, "error_description", str),
    )
    message = without_secrets(": ".join(filter(None, words)), step_secrets(step))
    return ProxyError(502, message[:1000], upstream=True)


def ask_for_token(step: TokenStep) -> tuple[int, bytes]:
    """(status, body) of a server's answer, over a connection of its own."""
    waiter = Waiter(None, TOKEN_ANSWER_SECONDS)
    waiter.deadline = time.monotonic() + CONNECT_SECONDS + TOKEN_ANSWER_SECONDS
    if step.direct:
        waiter.deadline = time.monotonic() + METADATA_SECONDS
    parts = HttpParts("GET", "", step.headers)
    if step.body is not None:
        parts = HttpParts("POST", "", step.headers, step.body)
    try:
        pool, opener = Pool(step.url), urllib.request.OpenerDirector()
        if step.direct:
            pool.proxy = None
        opener.add_handler(pool)
        response = opener.open(UpstreamRequest(step.url, {}, parts, waiter, True))
        with contextlib.closing(response.connection):
            response.read_head()
            return response.status, response.read(MAX_TOKEN_BYTES)
    except (ProxyError, ValueError, OverflowError, *TRANSPORT_ERRORS) as failure:
        late = isinstance(failure, (ProxyError, TimeoutError))
        reason = "it does not answer in time" if late else reason_of(failure)
        message = f"{host_of(step.url)} cannot be reached: {reason}"
        raise UnreachableError(502, message, upstream=True) from None


def host_of(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


SECRET_FIELDS = ("client_secret", "refresh_token", "assertion", "subject_token")


def step_secrets(step: TokenStep) -> list[str]:
    """What is sent in this step and is nobody else's business."""
    form = dict(urllib.parse.parse_qsl((step.body or b"").decode()))
    words = [form[name] for name in SECRET_FIELDS if name in form]
    return words + step.headers.get("Authorization", "").split()[1:]


def command_output(command: str) -> str:
    """What a token command prints. It runs without a shell, in a group of its own to be ended."""
    import shlex
    import shutil
    import subprocess

    words: str | list[str]
    if sys.platform == "win32":  # it splits a command itself, but finds no gcloud.cmd by itself
        first, rest = re.findall(r'\s*("[^"]*"|\S+)(.*)', command)[0]
        name = first.strip('"')
        words = subprocess.list2cmdline([shutil.which(name) or name]) + rest
    else:
        words = shlex.split(command)
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            words, stdin=none, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise ProxyError(502, f"The token command cannot be run: {error}", upstream=True) from None
    with process:
        try:
            output, errors = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            if sys.platform == "win32":
                process.kill()
            else:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what it started
            message = f"The token command has not ended within {COMMAND_SECONDS:g} seconds."
            raise ProxyError(502, message, upstream=True) from None
    if process.returncode:
        lines = errors.decode("utf-8", "replace").split("\n")
        last = next(filter(None, map(str.strip, reversed(lines))), "it says nothing")[:500]
        message = f"The token command ends with status {process.returncode}: {last}"
        raise ProxyError(502, message, upstream=True)
    return output.decode("utf-8", "replace")


class Tokens:
    """The one place that keeps an access token. It is renewed in a thread of its own, once for all
    calls; one that still lives is used meanwhile."""

    def __init__(self, credential: Credential):
        self.credential, self.lock = credential, threading.Lock()
        self.access: Access | None = None
        self.failure = ""  # why there is no new token
        self.renewing = False
        self.not_before = self.refused = -math.inf  # of the next renewal; of the last 401
        self.woken: list[socket.socket] = []  # of calls that wait for a token, to be closed

    def get(self, waiter: Waiter) -> Access:
        """What opens Vertex AI now. Only where no token lives, this waits for one."""
        while True:
            with self.lock:
                access, now = self.access, time.monotonic()
                due = access is None or now >= access.due
                if due and not self.renewing and now >= self.not_before:
                    self.begin_renewal()
                if access is not None and now < access.ends:
                    return access
                if not self.renewing:
                    raise ProxyError(502, self.failure, upstream=True)
                ready, waker = socket.socketpair()
                self.woken.append(waker)
            with ready, waker:
                waiter.wait(ready)

    def begin_renewal(self) -> None:
        """Begin a renewal."""
        self.renewing = True
        try:
            threading.Thread(target=self.renew, daemon=True).start()
        except RuntimeError as error:  # there can be no more threads
            self.renewing, self.failure = False, f"No access token can be fetched: {error}"

    def renew(self) -> None:
        """Fetch a token, and wake those who wait for it."""
        credential, began, access, refresh_token = self.credential, time.monotonic(), None, ""
        failure = BUG
        try:
            value, seconds, refresh_token = fetch_token(credential)
            due = began + seconds - min(TOKEN_MARGIN_SECONDS, seconds / 2)
            access = Access(value, credential.headers(value), due, began + seconds)
        except UnreachableError as error:
            failure = error.message
        except ProxyError as error:
            failure = f"{error.message} ({CREDENTIAL_KINDS[credential.kind].mend})"
        except Exception:
            log(f"{BUG}: {traceback.format_exc()}")
        with self.lock:
            self.renewing = False
            if self.credential is credential:  # and none was read again meanwhile
                self.keep(access, failure, refresh_token)
            woken, self.woken = self.woken, []
        for waker in woken:
            waker.close()

    def keep(self, access: Access | None, failure: str, refresh_token: str) -> None:
        """Keep what a renewal came to."""
        if refresh_token:
            fields = {**self.credential.fields, "refresh_token": refresh_token}
            self.credential = self.credential._replace(fields=fields)
        if access is None:
            self.failure = f"There is no access token for Vertex AI: {failure}"
            self.not_before = time.monotonic() + TOKEN_PAUSE_SECONDS
            log(self.failure)
        else:
            self.access = access

    def drop(self, access: Access | None) -> bool:
        """Give up this access, which was a 401; whether the call may be made again with another."""
        with self.lock:
            now = time.monotonic()
            if access is self.access:
                if now < self.refused + TOKEN_PAUSE_SECONDS:
                    return False
                self.access, self.refused = None, now
            return True

    def use(self, credential: Credential) -> None:
        """Go on with another credential."""
        with self.lock:
            self.credential, self.access, self.not_before = credential, None, -math.inf


# ---- memory ----


class Memory:
    """The one place that remembers: texts by a key, and by an alias that several may share.

    What is put into it may be evicted, the oldest first; what is pinned stays. A file that fails is
    logged and taken for empty: reads see no error, and pin and forget are refused with a 503.
    """

    MAX_ROWS, MAX_BYTES = 20_000, 32 << 20  # exceeded at most by what came since the last pruning
    PRUNE_ROWS, PRUNE_BYTES = 256, 4 << 20  # after so many new ones it is pruned
    PINNED = "!"  # begins the alias of a pinned text, its group; the other aliases are digests
    SCHEMA = (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = OFF",  # a crash may lose the last texts
        "CREATE TABLE IF NOT EXISTS memory (key TEXT PRIMARY KEY, alias TEXT, value TEXT)",
        "CREATE INDEX IF NOT EXISTS aliases ON memory (alias)",
    )
    INSERT = "INSERT OR REPLACE INTO memory VALUES (:key, :alias, :value)"
    SELECT = (
        "SELECT value FROM memory WHERE key = :key OR alias = :alias "
        "ORDER BY key = :key DESC, rowid DESC LIMIT 1"
    )
    SELECT_GROUP = (
        "SELECT key, substr(value, 1, instr(value || char(10), char(10))) "
        "FROM memory WHERE alias = :alias"
    )
    PRUNE = (
        "DELETE FROM memory WHERE rowid IN (SELECT row FROM ("
        "SELECT rowid AS row, ROW_NUMBER() OVER newest AS n, SUM(LENGTH(value)) OVER newest AS size"
        f" FROM memory WHERE alias IS NULL OR alias NOT LIKE '{PINNED}%' "
        "WINDOW newest AS (ORDER BY rowid DESC)) WHERE n > :rows OR size > :bytes)"
    )

    def __init__(self, path: str = ":memory:"):
        self.path, self.lock = path, threading.Lock()
        self.database: sqlite3.Connection | None = None
        self.new_rows = self.new_bytes = 0  # since the last pruning
        self.resume = {"read": 0.0, "write": 0.0}  # when, after a failure; a lock stops writes only

    def open(self) -> sqlite3.Connection:
        """The database, opened when it is first needed: most exchanges remember nothing."""
        if self.database is not None:
            return self.database
        if self.path != ":memory:":  # only the user of this process may read the file
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            os.chmod(self.path, 0o600)  # also one that was there; SQLite's other files get the same
        database = sqlite3.connect(
            self.path, timeout=STATE_LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            for statement in self.SCHEMA:
                database.execute(statement).close()  # or PyPy keeps a lock until it collects it
        except BaseException:
            database.close()
            raise
        self.database = database
        return database

    def close(self) -> None:
        """Close the database: what is not in a file is forgotten. A later use opens it again."""
        with self.lock:
            if self.database is not None:
                self.database.close()
                self.database = None

    def try_out(self) -> None:
        """An OSError or sqlite3.Error if the file cannot be used."""
        self.open()
        self.close()  # the workers that are forked later cannot share a connection

    def execute(self, use: str, statement: str, **values: str | int | None) -> list[Any] | None:
        """The rows that a statement gives; None if the database fails, or has just failed."""
        with self.lock:
            if time.monotonic() < self.resume[use]:
                return None
            try:
                with contextlib.closing(self.open().execute(statement, values)) as cursor:
                    return cursor.fetchall()
            except UnicodeEncodeError:  # a lone surrogate, which no text in it has
                return []
            except (sqlite3.Error, OSError) as error:
                log(f"the state file {self.path} failed: {error}")
                self.resume[use] = time.monotonic() + 5  # seconds
                return None

    def put(self, key: str, alias: str | None, value: str) -> None:
        """Keep a text until newer ones need its place."""
        self.execute("write", self.INSERT, key=key, alias=alias, value=value)
        self.new_rows, self.new_bytes = self.new_rows + 1, self.new_bytes + len(value)
        if self.new_rows >= self.PRUNE_ROWS or self.new_bytes >= self.PRUNE_BYTES:
            self.new_rows = self.new_bytes = 0
            self.execute("write", self.PRUNE, rows=self.MAX_ROWS, bytes=self.MAX_BYTES)

    def pin(self, group: str, key: str, value: str) -> None:
        """Keep a text that is never evicted; a 503 if that fails."""
        self.write(self.INSERT, key=key, alias=self.PINNED + group, value=value)

    def forget(self, key: str) -> None:
        """Forget a text, pinned or not; a 503 if that fails."""
        self.write("DELETE FROM memory WHERE key = :key", key=key)

    def write(self, statement: str, **values: str) -> None:
        if self.execute("write", statement, **values) is None:
            raise ProxyError(503, "This server cannot remember anything now; its log tells why.")

    def pinned(self, group: str) -> list[tuple[str, str]]:
        """(key, first line) of all that is pinned in this group."""
        return self.execute("read", self.SELECT_GROUP, alias=self.PINNED + group) or []

    def get(self, key: str | None, alias: str | None = None) -> str | None:
        """The text under this key, else the last one under this alias, or None."""
        for (text,) in self.execute("read", self.SELECT, key=key, alias=alias) or ():
            return str(text)
        return None


# ---- the service ----


# For how many seconds at most calls pass over a model that could not answer, by the reason.
COOLDOWN_SECONDS = {"not_found": 60.0, "quota": 60.0, "overloaded": 5.0, "silent": 60.0}


def cooldown_seconds(error: ProxyError, reason: str) -> float:
    """For how long to pass over a model that failed like this: as Gemini says, within bounds."""
    longest = COOLDOWN_SECONDS[reason]
    if error.retry_after is None:
        return longest
    return min(longest, max(error.retry_after, COOLDOWN_SECONDS["overloaded"]))


class Cooldowns:
    """Models that could not answer a moment ago: calls pass them over while there are others."""

    def __init__(self) -> None:
        # (when it ends, its seconds), by Gemini key and model
        self.ends: dict[tuple[str, str], tuple[float, float]] = {}
        self.lock = threading.Lock()

    def in_turn(self, key: str, models: tuple[str, ...]) -> tuple[str, ...]:
        """The models of an alias, those that cool down last. When such a time ends, one call finds
        out for all whether the model answers again; the others pass it over for as long again."""
        now = time.monotonic()
        with self.lock:
            ready = [model for model in models if self.ends.get((key, model), (0.0,))[0] <= now]
            for model in ready[:1]:
                if (key, model) in self.ends:
                    _, seconds = self.ends[key, model]
                    self.ends[key, model] = now + seconds, seconds
        return (*ready, *(model for model in models if model not in ready))

    def start(self, key: str, model: str, seconds: float) -> None:
        with self.lock:
            self.ends[key, model] = time.monotonic() + seconds, seconds
            while len(self.ends) > MAX_COOLDOWNS:
                del self.ends[next(iter(self.ends))]

    def end(self, key: str, model: str) -> None:
        with self.lock:
            self.ends.pop((key, model), None)


class Retirements:
    """The models that go, as far as Gemini has said so: each is logged once a day."""

    def __init__(self, count: Callable[..., None]):
        self.count = count  # called with the name of a metric
        self.listed: dict[str, None] = {}  # paths of the models that were ever listed
        self.models: dict[str, tuple[float, str]] = {}  # (when it was logged, what is known)

    def see(self, entries: Iterable[JSON]) -> None:
        """Remember which models a list of Gemini's has."""
        self.listed.update(dict.fromkeys(map(entry_path, entries)))
        while len(self.listed) > MAX_LISTED_MODELS:
            self.listed.pop(next(iter(self.listed)), None)

    def note(self, name: str, words: str) -> None:
        """Count it; log it if that was not done today."""
        self.count("retiring_models_total")
        now = time.monotonic()
        logged, _ = self.models.get(name, (-math.inf, ""))
        if now - logged > RETIREMENT_LOG_SECONDS:
            logged = now
            log(words)
        self.models[name] = logged, words
        while len(self.models) > MAX_RETIREMENTS:
            self.models.pop(next(iter(self.models)), None)


class Gemini:
    """The service: its connections, its models, and what it must be reminded of."""

    def __init__(
        self,
        backend: Backend,
        state: str = ":memory:",
        count: Callable[..., None] = lambda *_: None,
    ):
        self.backend = backend
        self.tokens: Tokens | None = None
        if backend.credential:
            self.tokens = Tokens(backend.credential)
        self.pool, self.memory = Pool(backend.url, count), Memory(state)
        self.count = count  # called with the name and labels of a metric
        self.opener = urllib.request.OpenerDirector()  # bare: it follows no redirect
        self.opener.add_handler(self.pool)
        self.models: dict[str, tuple[float, list[JSON]]] = {}  # (when, the list) by key
        self.retirements = Retirements(count)
        self.cooldowns = Cooldowns()

    def close(self) -> None:
        """Close the idle connections and the memory."""
        while self.pool.idle:
            self.pool.drop_oldest()
        self.memory.close()

    def use(self, backend: Backend) -> None:
        """Go on with other credentials."""
        self.backend = backend
        if self.tokens and backend.credential:
            self.tokens.use(backend.credential)

    def access(self, key: str, waiter: Waiter) -> Access:
        """What opens Gemini to those who pay with this key."""
        if self.tokens is None:
            return Access(key, given(**{"x-goog-api-key": key}))
        return self.tokens.get(waiter)

    def drop_access(self, access: Access | None) -> bool:
        """Give up an access that was a 401; whether there can be another one."""
        return self.tokens is not None and self.tokens.drop(access)

    def ask(
        self, calls: Iterable[GeminiCall], waiter: Waiter, key: str, left_out: list[str]
    ) -> Generator[Iterator[JSON], None, None]:
        """For each call its chunks, in order; its close() hangs up on what is unread. The names of
        what Gemini cannot be sent are added to `left_out` on the way."""
        backend = self.backend
        groups = [(call, backend.calls(self.signed(call, key), backend)) for call in calls]
        for _, group in groups:
            left_out.extend(name for one in group for name in one.left_out)
        every_call = [one for _, group in groups for one in group]
        answers = self.answers_to(every_call, waiter, key, left_out)
        with contextlib.closing(answers):
            for call, group in groups:
                chunks = itertools.chain.from_iterable(itertools.islice(answers, len(group)))
                yield backend.chunks(call, chunks)

    def answers_to(
        self, calls: Iterable[GeminiCall], waiter: Waiter, key: str, left_out: list[str]
    ) -> Generator[Iterator[JSON], None, None]:
        """For each call its chunks, in order; MAX_PARALLEL_CALLS at most are sent ahead."""
        unsent, pending = collections.deque(calls), collections.deque[UpstreamCall]()
        try:
            while True:
                while unsent and len(pending) < MAX_PARALLEL_CALLS:
                    if pending and unsent[0].waits:
                        break
                    call = unsent.popleft()
                    pending.append(UpstreamCall(self, call, waiter, key, left_out))
                    if call is not MODELS_CALL:
                        pending[-1].send()
                if not pending:
                    return
                yield pending[0].chunks()
                pending.popleft().release()
        finally:
            for upstream_call in pending:
                upstream_call.release()

    def list_models(self, waiter: Waiter, key: str) -> list[JSON]:
        """All of Gemini's models. An old list is used while Gemini does not give a new one."""
        since, models = self.models.get(key, (-math.inf, None))
        if models is None or time.monotonic() - since > MODEL_LIST_SECONDS:
            try:
                models = self.read_models(waiter, key)
                self.models[key] = time.monotonic(), models
                self.retirements.see(models)
                while len(self.models) > 32:  # one for each Gemini key (-client-keys)
                    self.models.pop(next(iter(self.models)), None)
            except ProxyError:
                if models is None:
                    raise
        return models

    def note_status(self, model: Model, status: JSON, key: str) -> None:
        """Note what an answer says of the future of its model."""
        _, entries = self.models.get(key, (0.0, []))
        words = announced_retirement(model, status, map(entry_name, entries))
        if words:
            self.retirements.note(model.name, words)

    def note_not_found(self, model: Model, error: ProxyError, key: str) -> None:
        """Note a model that is gone: it was listed once, or Gemini says so."""
        lost = error.listed is False and model.path in self.retirements.listed
        if lost or GONE in error.message:
            _, entries = self.models.get(key, (0.0, []))
            follower = follower_of(model.name, error.message, map(entry_name, entries))
            words = retirement_words(model.name, "is gone", follower, error.message)
            self.retirements.note(model.name, words)

    def read_models(self, waiter: Waiter, key: str) -> list[JSON]:
        """The models of all pages (ai.google.dev/api/models#method:-models.list)."""
        models: list[JSON] = []
        first, name = self.backend.listing
        path = first
        for _ in range(50):
            try:
                (page,) = UpstreamCall(self, GeminiCall(path), waiter, key, []).chunks()
            except ProxyError as error:
                if error.status not in self.backend.unlisted:
                    raise
                page = {}
            models += get_or_502(page, name, list)
            token = get_or_502(page, "nextPageToken", str).encode("ascii", "ignore").decode()
            if not token:
                return self.backend.models(models)
            path = f"{first}&pageToken={urllib.parse.quote(token)}"
        raise invalid_answer("more than 50 pages of models")

    def signed(self, call: GeminiCall, key: str) -> GeminiCall:
        """The call with what its history lost."""
        calls = digested_calls(call, scope_of(key))
        if call.model is None or not calls:
            return call
        known = [self.known_call(tool_call, digest, key, call.model) for tool_call, digest in calls]
        signed, origins = restore_signatures(call, known)
        for origin in origins:
            self.count("signatures_total", origin)
        return signed

    def known_call(self, call: ToolCall, digest: str, key: str, model: Model) -> ToolCall:
        """A tool call with what is kept of it, unless another generation of models made it."""
        text = self.memory.get(f"{scope_of(key)}:call:{call.id}", digest) or ""
        # As remember() joined them; an old state file may lack the list.
        words = [*text.split(" ", 3), "[]"]
        if words[:2] == [str(generation_number(model)), call.name]:
            return call._replace(signature=words[2], before=tuple(json.loads(words[3])))
        if text:
            self.count("signatures_total", "foreign")
        return call

    def remember(self, call: GeminiCall, key: str, calls: Sequence[ToolCall]) -> None:
        """Keep what Gemini wants back with the tool calls in an answer, by their ids."""
        if not (call.model and call.body and any(item.signature or item.before for item in calls)):
            return
        scope, generation = scope_of(key), str(generation_number(call.model))
        conversation = ConversationDigest(call.body, scope)
        for content in call.body["contents"]:
            conversation.turn(content)
        for tool_call in calls:
            name = gemini_name(tool_call.name)  # as it comes back, whatever the model called it
            digest = conversation.call(name, tool_call.args)
            if tool_call.signature or tool_call.before:
                words = (generation, name, tool_call.signature or "", json.dumps(tool_call.before))
                self.memory.put(f"{scope}:call:{tool_call.id}", digest, " ".join(words))


class Shelf(NamedTuple):
    """The stored texts of the users of one Gemini key, whose keys begin with its prefix."""

    memory: Memory
    prefix: str

    def look_up(self, keys: list[str], reserve: Callable[[int], None]) -> dict[str, str]:
        """The texts under these keys and under those that they lead to; "" where there is none.

        They count as the body does: a short one can name a long conversation.
        """
        texts: dict[str, str] = {}
        pending = list(keys)
        while pending:
            key = pending.pop()
            if key not in texts:
                texts[key] = self.get(key)
                reserve(len(texts[key]))
                if texts[key] and key.startswith(RESPONSE_PREFIX):
                    pending += response_keys(json.loads(texts[key]))
        return texts

    def get(self, key: str) -> str:
        text = self.memory.get(self.prefix + key) or ""
        if text:
            self.memory.put(self.prefix + key, None, text)  # what is in use is not evicted next
        return text

    def recipes(self, body: Fields) -> dict[str, Recipe]:
        """All recipes by their plain names: whole where the body names them, else their heads."""
        prefix = self.prefix + RECIPE_PREFIX
        heads = self.memory.pinned(self.prefix)
        recipes = {key[len(prefix) :]: recipe_of(head) for key, head in heads}
        names = [body.data.get(key) for key in ("model", "name", "source", "from")]
        plain = {plain_name(name, True) for name in names if isinstance(name, str)}
        for name in plain & recipes.keys():
            recipes[name] = recipe_of(self.memory.get(prefix + name) or "{}")
        return recipes

    def keep(self, item: Keep) -> None:
        key = self.prefix + item.key
        if not item.text:
            self.memory.forget(key)
        elif item.pinned:
            self.memory.pin(self.prefix, key, item.text)
        else:
            self.memory.put(key, None, item.text)


@functools.lru_cache(maxsize=256)
def scope_of(key: str) -> str:
    """What a Gemini key adds to digests: signatures of one key mean nothing to another."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


# ======================================================================================
# 16. Recording: what passes in an exchange, without secrets, in a file
# ======================================================================================

MAX_RECORDINGS = 1000  # files in the folder; the oldest go
MAX_RECORDINGS_BYTES = 256 << 20  # of all of them
MAX_TAPE_BYTES = 16 << 20  # of one body that are held until they are written
MAX_TAPES_BYTES = 64 << 20  # of all bodies that a process holds for that
SAMPLE_BYTES = 64 << 10  # of a body that is longer: of the rest there is a length and a digest
MAX_TEXT_CHARACTERS = 4 << 20  # of a body without its media, and
MAX_QUOTES = 500_000  # in it: of what has more, a sample is written
PIECE_BYTES = 250  # of memory that a piece of a body takes besides its own
MAX_UNWRITTEN_RECORDINGS = 256  # that wait to be written; more are dropped
RECORDING_STEP_BYTES = 512  # to which blanks fill a file: the next one over it is rarely shorter
MAX_RECORDER_BATCH = 64  # recordings that are written in a row, if they have
MAX_BATCH_CHARACTERS = 256 << 10  # no more together
RECORDING_NAME = re.compile(r"\d{8}-\d{6}-\d{6}-req_[0-9a-f]{24}\.json")
READABLE_JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
PROGRAM = f"proxy-to-gemini {VERSION}, Python {sys.version}, {sys.platform}"
RECORDING_FORMAT = 1  # changes when a program that reads recordings must
WRITING = os.O_WRONLY | os.O_CREAT
if sys.platform == "win32":
    WRITING |= os.O_BINARY
else:
    WRITING |= os.O_NOFOLLOW
RECORDER_PAUSE_SECONDS = 0.1  # for recordings to gather: a thread that wakes for each costs more
RECORDER_LOG_SECONDS = 600.0  # between two lines in the log about the same trouble
MIN_KEY_CHARACTERS = 8  # of a key that is masked wherever it stands, if it is not this server's
KEY_HEADERS = ("X-goog-api-key", "Authorization")  # of a call to Gemini, as urllib spells them

# ---- masks and cuts ----

SECRET_HEADER = re.compile(
    "auth|key|token|secret|cookie|passw|credential|jwt|assertion|uploadid", re.I
)
is_secret_header = functools.lru_cache(maxsize=1024)(SECRET_HEADER.search)
SECRET_NAMES = {  # of fields, in lower case
    "headers",  # of an MCP server: any of them may be a secret
    *("authorization", "proxy-authorization", "authorization_token", "authorizationtoken"),
    *("x-api-key", "api-key", "api_key", "apikey", "x-goog-api-key", "x-api-token"),
    *("token", "x-auth-token", "auth_token", "bearer_token", "access_token", "accesstoken"),
    *("refresh_token", "refreshtoken", "id_token", "secret", "client_secret", "clientsecret"),
    *("password", "private_key", "privatekey", "cookie", "set-cookie"),
}


QUERY_NAMES = "key|token|ticket|upload_id|secret|signature|password"
SECRET_QUERY_NAME = re.compile(f"{QUERY_NAMES}|^sig$", re.I)
QUERY_SECRET = re.compile(
    rf"((?:[?&;]|\\u0026|%26)(?:[\w.-]*(?:{QUERY_NAMES})|sig)=)[^\s\"\\&#]+", re.I
)
# What is in a text with such secrets; the secret, after what stays.
SECRET_SHAPES = {
    "AIza": re.compile(r"(AIza)[\w-]{20,}"),
    "ya29.": re.compile(r"(ya29\.)[\w.-]{10,}"),
    "AQ.": re.compile(r"(\bAQ\.)[\w-]{20,}"),
    "sk-": re.compile(r"(\bsk-)[\w-]{16,}"),
    "eyJ": re.compile(r"((?<![\w-])eyJ)[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    "earer ": re.compile(r"(bearer )[^\s\"\\,;<>]{6,}", re.I),
    "@": re.compile(r"(://)[^\s\"\\/?#@]+(?=@)"),
    "=": QUERY_SECRET,
}


def masked(text: str, secrets: Iterable[str]) -> str:
    """The text without these secrets, and without what looks like one."""
    text = without_secrets(text, secrets)
    for sign, pattern in SECRET_SHAPES.items():
        if sign in text:
            text = pattern.sub(rf"\1{MASK}", text)
    if '"' not in text:
        return text
    names = text.lower().replace("\\", "").split('"')
    if SECRET_NAMES.isdisjoint(names):
        return text
    pieces, end = text.split('"'), 0
    for i, name in enumerate(names):
        if name in SECRET_NAMES and i >= end:
            end = mask_field(pieces, i)
    return '"'.join(pieces)


BLANKS = " \t\r\n\\"


def mask_field(pieces: list[str], i: int) -> int:
    """Mask the text, or the texts in the object, of the field whose name is this piece of JSON
    between quotes; the piece after them. In JSON within a text, quotes have backslashes before."""
    depth, border = backslashes(pieces[i]), "".join(pieces[i + 1 : i + 2]).strip(BLANKS)
    is_object = re.fullmatch(r":\s*\{", border) and pieces[i].strip("\\").lower() == "headers"
    if border != ":" and not is_object:
        return i + 1
    secret, k = not is_object, i + 2
    if is_object and {"type", "description"}.intersection(pieces[k : k + 1]):  # of a tool's schema
        return k
    while k < len(pieces):
        end = backslashes(pieces[k])
        if secret:
            pieces[k] = MASK + "\\" * end
        if end > depth:  # the quote after it is a part of the text
            k += 1
            continue
        border = "".join(pieces[k + 1 : k + 2]).strip(BLANKS)
        if not is_object or "}" in border:
            break
        secret, k = not border.endswith(","), k + 2
    return k + 1


def backslashes(piece: str) -> int:
    """How many are at the end."""
    return len(piece) - len(piece.rstrip("\\"))


def masked_query(url: str) -> str:
    """A URL without secrets in its query, whose names may be encoded."""
    path, mark, query = url.partition("?")
    if not mark:
        return url
    fields = query.split("&")
    for i, field in enumerate(fields):
        if SECRET_QUERY_NAME.search(urllib.parse.unquote_plus(field.partition("=")[0])):
            fields[i] = f"{field.partition('=')[0]}={MASK}"
    return path + mark + "&".join(fields)


def masked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers; in place of a value a mask, where the name tells that it is a secret."""
    result = dict(headers)
    for name in filter(is_secret_header, headers):
        scheme, blank, _ = result[name].partition(" ")
        result[name] = MASK
        if blank and scheme.lower() in ("bearer", "basic"):
            result[name] = f"{scheme} {MASK}"
    return result


def masked_lines(several: Sequence[Mapping[str, str]], secrets: Iterable[str]) -> list[JSON]:
    """These without secrets in their values, each of which is one line. They are masked together:
    a call costs more than their length."""
    values = [value for fields in several for value in fields.values()]
    lines = masked("\n".join(values), secrets).split("\n")
    if len(lines) != len(values):  # a quote has no partner in its line
        lines = [masked(value, secrets) for value in values]
    left = iter(lines)
    return [dict(zip(fields, left)) for fields in several]


@functools.lru_cache(maxsize=256)
def spellings(secret: str) -> tuple[str, ...]:
    """The secret as it is, in JSON and in a URL."""
    return tuple({secret, json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe="")})


MIN_MEDIA_CHARACTERS = 48  # of base64 that is looked at; below that, there is no picture or sound
# What may be media, after the quote before it: a text without any such piece need not be split.
LONG_PIECE = re.compile(f'"[^"]{{{MIN_MEDIA_CHARACTERS}}}')
MIN_BASE64_CHARACTERS = 256  # of what is taken for media whatever its field
MEDIA_FIELDS = {"data", "b64_json", "partial_image_b64", "file_data", "images", "image"}
KEPT_FIELDS = {"thoughtSignature", "thought_signature", "signature", "encrypted_content"}
DATA_URL = re.compile(r"(?<=;base64,)[\w+/=%\\-]+", re.ASCII)
# Where a text of JSON has base64, "/" and "+" may be escaped, and lines may end.
BASE64_ESCAPE = re.compile(r"\\+(?:[rn]|(/)|u00([23][bdf]))", re.I)
# How it may begin; an escape may be cut in two there.
BASE64_HEAD = re.compile(rf"(?:[\w+/=-]|{BASE64_ESCAPE.pattern})+(?:\\+\w{{0,4}})?", re.A | re.I)
BASE64_TEXT = re.compile(r"[\w+/=-]+", re.ASCII)
BINARY_TYPE = re.compile(r"(image|audio|video)/|application/(pdf|zip|octet-stream)", re.I)
SLICE_CHARACTERS = 1 << 18  # of base64 that are decoded at once, a multiple of four
CUT_OFF = "[cut off; all of it:]"
CONTROLS = bytes({*range(32)} - set(b"\t\n\r\f\x1b"))  # none of them is in a text


def cut_mark(size: int, digest: Any) -> str:
    return f"[media: {size} bytes, SHA-256 {digest.hexdigest()}]"


def cut(data: bytes) -> str:
    return cut_mark(len(data), hashlib.sha256(data))


def held_bytes(content_type: str) -> int:
    """How many bytes of a body are held: of media none, since they are cut in any case."""
    if BINARY_TYPE.match(content_type):
        return 0
    return MAX_TAPE_BYTES


def unescaped(match: re.Match[str]) -> str:
    slash, number = match.groups()
    return slash or chr(int(number or "0", 16)).strip("\0")


def cut_base64(text: str) -> str:
    """What stands for base64: the length and the digest of its bytes, or of what is none."""
    if not is_base64(text):
        return cut(text.encode())
    size, digest = 0, hashlib.sha256()
    for start in range(0, len(text), SLICE_CHARACTERS):  # other threads can run between two
        data = decode_base64(text[start : start + SLICE_CHARACTERS])
        size += len(data)
        digest.update(data)
    return cut_mark(size, digest)


def without_media(text: str) -> str:
    """The text with its media cut: base64 in data URLs, in fields for media, and long base64."""
    if not LONG_PIECE.search(f'"{text}'):
        return text
    pieces = text.split('"')
    for i, size in enumerate(map(len, pieces)):
        if size < MIN_MEDIA_CHARACTERS:
            continue
        piece = pieces[i]
        if ";base64," in piece:
            pieces[i] = DATA_URL.sub(lambda match: cut_base64(plain_base64(match[0])), piece)
        elif BASE64_HEAD.fullmatch(piece[:MIN_MEDIA_CHARACTERS]):
            end = len(piece.rstrip("\\"))  # of a text within a text
            if is_media(plain_base64(piece[:end]), pieces[max(0, i - 2)].rstrip("\\")):
                pieces[i] = cut_base64(plain_base64(piece[:end])) + piece[end:]
    return '"'.join(pieces)


def plain_base64(text: str) -> str:
    """Base64 as it was before it was put into JSON, or into a URL."""
    if "%" in text:
        text = urllib.parse.unquote(text)
    if "\\" in text:
        text = BASE64_ESCAPE.sub(unescaped, text)
    return text


def is_media(text: str, field: str) -> bool:
    """Whether a text in this field is base64 of media; thought signatures are none."""
    if field in KEPT_FIELDS or not BASE64_TEXT.fullmatch(text):
        return False
    long = len(text) >= MIN_BASE64_CHARACTERS
    return long or field in MEDIA_FIELDS or (is_base64(text) and sniffed(text) is not None)


def body_text(data: bytes, content_type: str) -> str:
    """A body as text, with its media cut."""
    form = FORM_TYPE.fullmatch(content_type)
    if form:
        border = b"--" + form.group(2).encode()
        return border.decode().join(map(form_part_text, data.split(border)))
    if BINARY_TYPE.match(content_type) or len(data.translate(None, CONTROLS)) < len(data):
        return cut(data)
    text = data.decode("utf-8", "backslashreplace")
    if text.count('"') <= MAX_QUOTES:
        text = without_media(text)
        if len(text) <= MAX_TEXT_CHARACTERS:
            return text
    return f"{beginning(text[:SAMPLE_BYTES])} {CUT_OFF} {cut(data)}"


def beginning(text: str) -> str:
    """The text without its last word, which may be a key that is cut in two."""
    return text[: 1 + max(text.rfind(end) for end in '" \n,')]


def form_part_text(piece: bytes) -> str:
    """A part of a form as text. What is a file is cut."""
    head, gap, content = piece.partition(b"\r\n\r\n")
    text = (head + gap).decode("utf-8", "backslashreplace")
    if b"filename" in head.lower():
        return text + cut(content[:-2]) + "\r\n"
    return text + body_text(content, "")


# ---- one exchange ----


class Tape:
    """The bytes of a body that pass: when they came, and as many as there is room for."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.limit = recorder, MAX_TAPE_BYTES
        self.pieces: list[bytes] = []
        self.times: list[tuple[float, int]] = []  # (when, bytes up to then)
        self.size = self.held = 0
        self.digest: Any = None  # of all bytes, from the first on that is not held

    def feed(self, data: bytes) -> None:
        """Keep bytes that pass just now; of what is too much, only length and digest."""
        self.size += len(data)
        if self.digest is None and self.hold(data):
            self.times.append((time.monotonic(), self.size))
            return
        if self.digest is None:
            self.digest = hashlib.sha256(b"".join(self.pieces))
            if not self.pieces:
                self.hold(data[:SAMPLE_BYTES])
        self.digest.update(data)
        self.times[-1:] = [(time.monotonic(), self.size)]

    def hold(self, data: bytes) -> bool:
        cost = len(data) + PIECE_BYTES
        if self.held + cost > self.limit or not self.recorder.reserve(cost):
            return False
        self.held += cost
        self.pieces.append(data)
        return True

    def fed(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The blocks, which pass as they are asked for."""
        for block in blocks:
            self.feed(block)
            yield block

    def text(self, content_type: str, words: Sequence[str]) -> str:
        """What is held as text, masked and cut; with the length and digest of what is not."""
        text = body_text(b"".join(self.pieces), content_type)
        if self.digest is None:
            return masked(text, words)
        if not self.pieces:
            return cut_mark(self.size, self.digest)
        text = masked(beginning(text), words)
        return f"{text} {CUT_OFF} {cut_mark(self.size, self.digest)}"

    def arrived(self, began: float) -> list[tuple[float, int]]:
        return [(round(when - began, 4), size) for when, size in self.times]


class Attempt:
    """An attempt at Gemini, and its answer."""

    def __init__(self, recorder: Recorder, request: UpstreamRequest):
        self.began = self.first_byte = time.monotonic()
        self.method, self.url, self.headers = request.method, request.full_url, request.headers
        self.body, self.answer = Tape(recorder), Tape(recorder)
        self.status, self.error = 0, ""
        self.answer_headers: Mapping[str, str] = {}

    def begin_answer(self, status: int, headers: Mapping[str, str]) -> None:
        """The answer begins."""
        self.first_byte, self.status, self.answer_headers = time.monotonic(), status, headers
        self.answer.limit = held_bytes(headers.get("content-type", ""))

    def lines(self) -> list[dict[str, str]]:
        """Its address and headers, and the headers of its answer."""
        headers = masked_headers(self.headers), masked_headers(self.answer_headers)
        return [{"url": masked_query(self.url)}, *headers]

    def as_json(self, began: float, words: Sequence[str], lines: Iterator[JSON]) -> JSON:
        """The attempt as JSON; its lines() come next among these, which are masked."""
        fields = {
            "after": round(self.began - began, 4),
            "method": self.method,
            **next(lines),
            "headers": next(lines),
            "body": self.body.text(self.headers.get("Content-type", ""), words),
        }
        answer_headers = next(lines)
        if self.status:
            fields["answer"] = {
                "after": round(self.first_byte - began, 4),
                "status": self.status,
                "headers": answer_headers,
                "body": self.answer.text(self.answer_headers.get("content-type", ""), words),
                "arrived": self.answer.arrived(began),
            }
        if self.error:
            fields["error"] = masked(self.error, words)
        return fields


class Recording:
    """What passes while one request is answered, until it is written."""

    def __init__(self, recorder: Recorder, config: Config, head: RequestHead):
        self.recorder, self.config, self.head = recorder, config, head
        self.began, self.clock = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
        self.request, self.answer = Tape(recorder), Tape(recorder)
        self.attempts: list[Attempt] = []
        self.answer_head = b""
        self.ignored: list[str] = []  # the names of what had no effect
        self.notes: list[str] = []  # what went wrong, besides what the answer says
        self.facts: JSON = {}  # what the server made of the request

    def attempt(self, request: UpstreamRequest) -> Attempt:
        """A new attempt at Gemini."""
        attempt = Attempt(self.recorder, request)
        self.attempts.append(attempt)
        if isinstance(request.body, BodyStream):
            attempt.body = self.request  # which it passes on
        elif request.body is not None:
            attempt.body.feed(request.body)
        return attempt

    def passing(self, body: BodyStream, headers: Mapping[str, str]) -> BodyStream:
        """A body that goes on to Gemini as it comes; the bytes of a file are not held."""
        self.request.limit = SAMPLE_BYTES
        if "upload" in headers.get("x-goog-upload-command", ""):
            self.request.limit = 0
        return body._replace(blocks=self.request.fed(body.blocks))

    def begin_answer(self, head: bytes, headers: Iterable[tuple[str, str]]) -> None:
        self.answer_head = head
        self.answer.limit = held_bytes(dict(headers).get("Content-Type", ""))

    @property
    def name(self) -> str:
        """The name of the file: recordings sort by the time at which they began."""
        return f"{self.clock:%Y%m%d-%H%M%S-%f}-{self.facts['request_id']}.json"

    @property
    def held(self) -> int:
        tapes = [tape for attempt in self.attempts for tape in (attempt.body, attempt.answer)]
        return sum(tape.held for tape in {self.request, self.answer, *tapes})

    def secrets(self) -> list[str]:
        """What must not stand in the file: keys, tokens, and what lets an upload go on."""
        words, addresses = [*client_keys(self.head)], [self.head.target]
        for attempt in self.attempts:
            words += [attempt.headers.get(name, "").rpartition(" ")[2] for name in KEY_HEADERS]
            addresses.append(attempt.answer_headers.get("x-goog-upload-url", ""))
        for fields in map(query_fields, filter(None, addresses)):
            words += [fields.get(name, "") for name in ("upload_id", UPLOAD_TICKET)]
        words = [word for word in words if len(word) >= MIN_KEY_CHARACTERS]
        words += [self.config.key, self.config.proxy_key]
        every = itertools.chain(*map(spellings, filter(None, words)))
        return sorted(set(every), key=len, reverse=True)  # one may be in another

    def lines(self) -> list[dict[str, str]]:
        """The addresses and headers of all that passed, in the order of text()."""
        lines = [{"target": masked_query(self.head.target)}, masked_headers(self.head.headers)]
        for attempt in self.attempts:
            lines += attempt.lines()
        answer_lines = self.answer_head.decode("latin-1").split("\r\n")[1:-2]
        return [*lines, masked_headers(dict(line.split(": ", 1) for line in answer_lines))]

    def text(self) -> str:
        """The recording as JSON."""
        words, head = self.secrets(), self.head
        lines = iter(masked_lines(self.lines(), words))
        request = {
            "method": head.method,
            **next(lines),
            "headers": next(lines),
            "body": self.request.text(head.headers.get("content-type", ""), words),
        }
        about = {
            "recording": RECORDING_FORMAT,
            "program": PROGRAM,
            "began": self.clock.isoformat(),
            "api": self.config.api,
            "aliases": self.config.aliases,
            **self.facts,
            "ignored": [masked(name, words) for name in self.ignored],
            "notes": [masked(note, words) for note in self.notes],
        }
        attempts = [attempt.as_json(self.began, words, lines) for attempt in self.attempts]
        headers = next(lines)
        answer = {
            "headers": headers,
            "body": self.answer.text(headers.get("Content-Type", ""), words),
            "sent": self.answer.arrived(self.began),
        }
        passed = {"request": request, "attempts": attempts, "answer": answer}
        return READABLE_JSON({**about, **passed}) + "\n"


# ---- the folder ----


class Recorder:
    """Writes recordings into a folder. A thread of its own does it, and nobody waits for that."""

    def __init__(self, folder: str, workers: int, count: Callable[..., None]):
        self.folder, self.workers, self.count = folder, workers, count
        self.prefix = os.path.join(folder, "")  # of the paths in it
        self.lock, self.held = threading.Lock(), 0  # bytes that recordings hold
        self.queue: queue.SimpleQueue[Recording | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()  # no more recordings come
        self.new_files, self.new_bytes = 0, 0  # since the last look at the folder
        self.spare = 0  # files that may be new until the next one
        self.oldest: list[str] = []  # those to be written over, last first
        self.sizes: dict[str, int] = {}  # of files, as far as they are known
        self.logged: dict[str, float] = {}  # when there was a line in the log, by outcome

    def start(self) -> None:
        """Begin; a worker does so after its fork, which no thread outlives."""
        self.thread = threading.Thread(target=self.run, name="recorder", daemon=True)
        self.thread.start()

    def try_out(self) -> None:
        """Make the folder; an OSError if nothing can be written there."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        path = f"{self.prefix}.{secrets.token_hex(12)}"
        self.write_file(path, b"")
        os.unlink(path)

    def reserve(self, size: int) -> bool:
        """Whether so many more bytes may be held."""
        with self.lock:
            if self.held + size > MAX_TAPES_BYTES:
                return False
            self.held += size
            return True

    def put(self, recording: Recording) -> None:
        """Have a recording written, unless too many wait for that."""
        if self.queue.qsize() < MAX_UNWRITTEN_RECORDINGS:
            self.queue.put(recording)
        else:
            self.complain("dropped", "recordings come faster than they can be written")
            self.release(recording)

    def release(self, recording: Recording) -> None:
        with self.lock:
            self.held -= recording.held

    def close(self) -> None:
        """Write what waits, for a moment."""
        self.ended.set()
        self.queue.put(None)
        if self.thread:
            self.thread.join(FINAL_SECONDS)

    def run(self) -> None:
        while not self.ended.is_set() or not self.queue.empty():
            self.write_batch()
            if self.queue.empty():
                self.ended.wait(RECORDER_PAUSE_SECONDS)

    def write_batch(self) -> None:
        """Make the texts of a few recordings, then their files: in a row, each takes less time."""
        files: list[tuple[str, str]] = []
        for recording in itertools.islice(iter(self.queue.get, None), MAX_RECORDER_BATCH):
            text = self.result_of(recording.text)
            self.release(recording)
            if text is not None:
                files.append((recording.name, text))
            if self.queue.empty() or sum(len(text) for _, text in files) > MAX_BATCH_CHARACTERS:
                break
        for name, text in files:
            self.result_of(self.write, name, text)

    def result_of(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """What this step returns, or None: of what fails, the log tells."""
        try:
            return step(*arguments)
        except OSError as error:
            line = f"recordings cannot be written to {self.folder}: {reason_of(error)}"
            self.complain("failed", line)
        except Exception:
            self.complain("failed", f"{BUG}: {traceback.format_exc()}")

    def complain(self, outcome: str, line: str) -> None:
        """Count recordings that are lost; the log tells so once in a while."""
        self.count("recordings_total", outcome)
        now = time.monotonic()
        if now - self.logged.get(outcome, -math.inf) > RECORDER_LOG_SECONDS:
            self.logged[outcome] = now
            log(line)

    def write(self, name: str, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        data = data.ljust(-(-len(data) // RECORDING_STEP_BYTES) * RECORDING_STEP_BYTES)
        path = self.prefix + name
        old_size = self.make_room(len(data), path)
        try:
            self.write_file(path, data, old_size)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        self.sizes[path] = len(data)
        self.count("recordings_total", "written")

    def write_file(self, path: str, data: bytes, old_size: int = 0) -> None:
        """Write a file, over what it holds if it is there."""
        file, size = os.open(path, WRITING, 0o600), len(data)
        try:
            while data:
                data = data[os.write(file, data) :]
            if size < old_size:
                os.ftruncate(file, size)
        finally:
            os.close(file)

    def make_room(self, size: int, path: str) -> int:
        """See that one more file is not too many; if it would be, the oldest one gets this path,
        and the bytes in it are what this returns. Between two looks at the folder, all workers
        together add as many files as there is room for, and a tenth of the bytes."""
        self.new_files, self.new_bytes = self.new_files + 1, self.new_bytes + size
        few = self.new_bytes <= MAX_RECORDINGS_BYTES // (10 * self.workers)
        if few and self.new_files <= self.spare:
            return 0
        if not few or not self.oldest:
            self.look(size)
        while self.oldest:
            oldest = self.oldest.pop()
            try:
                os.replace(oldest, path)
            except OSError:  # another worker has taken it, or somebody reads it on Windows
                continue
            return self.sizes.pop(oldest)
        return 0

    def look(self, size: int) -> None:
        """Look what there is, and remove the oldest files if they are too many or too large. To
        write over a file is less work than to remove it and to make another."""
        with os.scandir(self.folder) as entries:
            paths = [entry.path for entry in entries if RECORDING_NAME.fullmatch(entry.name)]
        sizes = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # another worker has taken it
                sizes[path] = self.sizes.get(path) or os.stat(path).st_size
        left, total = sorted(sizes, reverse=True), sum(sizes.values()) + size
        while len(left) > MAX_RECORDINGS or (left and total > MAX_RECORDINGS_BYTES * 0.9):
            path = left.pop()
            total -= sizes[path]
            with contextlib.suppress(OSError):  # the same, or somebody reads it on Windows
                os.unlink(path)
        room, tenth = MAX_RECORDINGS - len(left), MAX_RECORDINGS // 10
        if room > tenth:
            self.oldest, self.spare = [], room // self.workers
        else:
            self.oldest, self.spare = left[tenth:], 0
        self.new_files, self.new_bytes, self.sizes = 1, size, sizes


# ======================================================================================
# 17. Server: all that talks to clients: metrics, HTTP, answers, page for people
# ======================================================================================

MAX_BODY_BYTES = 128 << 20  # of a request; Gemini takes 100 MB
MAX_UPLOAD_BYTES = 2 << 30  # of a file for Gemini, which is not held here: what it takes
# Under way, in all workers; media take three times that, of MemoryMax=1G.
MAX_ALL_BODIES_BYTES = 192 << 20
BODY_BLOCK_BYTES = 1 << 20  # of a body that are read before they count
MAX_UNPACKED_BYTES = 32 << 20  # of a compressed body, once unpacked: media hardly shrink
MAX_UNPACKED_RATIO = 100  # to one byte that came: JSON shrinks to a tenth, bombs to a thousandth
MIN_UNPACKED_BYTES = 64 << 10  # which may be unpacked whatever the ratio
CLIENT_SECONDS = 60.0  # of a client's silence, or of its not reading; also for a whole head
BODY_SECONDS = 900.0  # for a whole body
MAX_CONNECTIONS = 10_000  # of clients; the next one waits until another leaves
ACCEPT_BATCH = 16  # clients that are accepted before the next look at anything else
MAX_LEAD = 0.125  # clients that a worker may have more than another, as a share of that one's
YIELD_SECONDS = 0.0005  # in which another worker may accept a client
FULL_PAUSE_SECONDS = 0.1  # between two looks for room for another connection
DRAIN_NOTICE_SECONDS = 1.0  # for load balancers to see that the server ends; it still serves
DRAIN_SECONDS = 6.5  # more for answers under way, before they end with an error
FINAL_SECONDS = 1.0  # for those errors to be sent, and for a request that is just coming in
TIDY_SECONDS = 5.0  # between two looks at what can be given back
MAX_LOADED_MODELS = 100  # that are listed as loaded
LINGER_SECONDS = 1.0  # for a client to read a refusal of what it is still sending
KEY_PATTERN = r"[!-~]{1,1000}"  # what can be sent in a header as a key
# Of a stream, while Gemini says more: since the last send, and of events that wait.
MAX_UNSENT_SECONDS, MAX_UNSENT_BYTES = 0.005, 16 << 10
MAX_IGNORED_CHARACTERS = 4000  # of x-proxy-ignored: nginx takes 8 KB of headers in all
PIPE_BYTES = 4096  # that a pipe takes in one piece, if it takes anything (PIPE_BUF)
MAX_LOG_PIECES = 4  # that one thread writes for others
MAX_LOG_CHARACTERS = 4000  # of a log line, which is such a piece

CONTENT_LENGTH = re.compile("[0-9]{1,15}")
REQUEST_LINE = re.compile(rf"({HTTP_TOKEN}) ([^\x00-\x20\x7f]+) HTTP/1\.([0-9])\r\n".encode())
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # others are a 501
# (authority, path, query), of the origin-form, the absolute-form or "*" (RFC 9112, section 3.2).
TARGET = re.compile(r"(?:https?://([^/?]+)(?![^/?])|(?=/|\*$))([^?]*)\??(.*)", re.I)
QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_EXTENSION = rf"[ \t]*;[ \t]*{HTTP_TOKEN}(?:[ \t]*=[ \t]*(?:{HTTP_TOKEN}|{QUOTED}))?"
REQUEST_CHUNK = re.compile(rf"([0-9A-Fa-f]{{1,8}})(?:{CHUNK_EXTENSION})*\r\n".encode("latin-1"))
APP_ORIGINS = (
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?|"
    r"(app|file|tauri|vscode-webview|vscode-file)://[\w.-]*"
)
LOOPBACK_HOSTS = re.compile(
    r"(localhost|[\w.-]+\.localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.I | re.A
)
ADDRESS_HOSTS = re.compile(r"(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\])(:\d{1,5})?", re.A)
# Containers call their host so.
NEARBY_HOSTS = re.compile(r"([\w.-]+\.(?:local|internal))(:\d{1,5})?", re.I | re.A)
BROWSER_HEADERS = ("sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")  # w3.org/TR/fetch-metadata
BUG = "this is a bug in proxy-to-gemini; please report it"
# That are not written yet. The oldest are lost where a write takes so long.
LOG_LINES: collections.deque[bytes] = collections.deque(maxlen=10_000)
LOG_LOCK = threading.Lock()


def log(line: str) -> None:
    text = line.encode("unicode_escape").decode()  # no line break within it starts another line
    if len(text) > MAX_LOG_CHARACTERS:
        text = f"{text[:1000]} ... {text[-2990:]}"  # the cause comes last
    write_log(text + "\n")


def write_log(line: str) -> None:
    """Write to standard error. If it is closed, or a full pipe, the line is lost: nobody waits. Nor
    does a thread wait for another: the one that writes takes what comes meanwhile."""
    LOG_LINES.append(line.encode())
    write_waiting_lines()


def write_waiting_lines() -> None:
    """Write what waits for the log, in a few pieces: whoever does so has clients of its own. What
    comes even then waits for the next line, or for Server.service_actions."""
    for _ in range(MAX_LOG_PIECES):
        if not LOG_LINES or not LOG_LOCK.acquire(blocking=False):
            return
        try:
            write_lines()
        # An IndexError: the one that wrote has just taken them all.
        except (OSError, ValueError, AttributeError, IndexError):
            pass
        finally:
            LOG_LOCK.release()


def write_lines() -> None:
    """Write the first lines of those that wait, as many as a pipe takes in one piece."""
    data = LOG_LINES.popleft()
    while LOG_LINES and len(data) + len(LOG_LINES[0]) <= PIPE_BYTES:
        data += LOG_LINES.popleft()
    file = sys.stderr.fileno()
    # On Windows, open_standard_streams sees to a full pipe.
    if sys.platform == "win32" or select.select([], [file], [], 0)[1]:
        os.write(file, data)


http_date = functools.lru_cache(maxsize=2)(email.utils.formatdate)  # RFC 9110, section 5.6.7


# ---- metrics ----

BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds
STATUSES = (
    *(200, 204, 400, 401, 403, 404, 405, 413, 414, 415, 426, 429, 431, 499),
    *(500, 501, 502, 503, 504, 529),
)
LABELS = {
    "status": tuple(map(str, STATUSES)),
    "kind": ("prompt", "cached", "output", "thoughts"),
    "origin": ("client", "memory", "foreign", "placeholder"),
    "reason": (*COOLDOWN_SECONDS, "cooldown"),
    "outcome": ("written", "dropped", "failed"),
}
WIDTHS = {"counter": 1, "gauge": 1, "histogram": len(BUCKETS) + 2}  # numbers; 2 for +Inf and sum


class Metric(NamedTuple):
    """What is measured under one name."""

    kind: str  # Prometheus' word
    help: str
    labels: tuple[str, ...] = ()


# To measure something new: a row here, and a call of add, observe or set where it happens.
METRICS = {
    "requests_total": Metric("counter", "Requests by route and status.", ("route", "status")),
    "request_seconds": Metric("histogram", "From first line to last byte.", ("route",)),
    "first_byte_seconds": Metric("histogram", "From first line to first byte.", ("route",)),
    "tokens_total": Metric("counter", "Cached ones are also prompt, thoughts output.", ("kind",)),
    "upstream_errors_total": Metric("counter", "Gemini's, retried ones included.", ("status",)),
    "upstream_retries_total": Metric("counter", "Calls that were tried again."),
    "upstream_connections_total": Metric("counter", "Connections to Gemini that were opened."),
    "upstream_idle_connections": Metric("gauge", "Connections to Gemini that wait for a call."),
    "fallbacks_total": Metric("counter", "Turns to an alias's next model.", ("reason",)),
    "retiring_models_total": Metric("counter", "Answers and refusals of models that go."),
    "signatures_total": Metric("counter", "Sources of the signatures in histories.", ("origin",)),
    "clients": Metric("gauge", "Connections of clients."),
    "in_flight": Metric("gauge", "Requests under way."),
    "body_bytes": Metric("gauge", "Bytes of the bodies of requests under way."),
    "checks": Metric("gauge", "Checks under way."),
    "recordings_total": Metric("counter", "What became of recordings.", ("outcome",)),
}


class Metrics:
    """Numbers that all workers share: each writes a row of its own, and /metrics adds the rows up.

    The values of a label are fixed from the start ("other" is the rest): clients cannot add any.
    """

    def __init__(self, routes: Iterable[str], workers: int = 1):
        self.values = {
            label: {value: i for i, value in enumerate(("other", *values))}
            for label, values in {**LABELS, "route": tuple(routes)}.items()
        }
        self.start: dict[str, int] = {}  # of each metric in a row
        size = 0
        for name, metric in METRICS.items():
            self.start[name] = size
            combinations = math.prod(len(self.values[label]) for label in metric.labels)
            size += combinations * WIDTHS[metric.kind]
        self.size, self.workers, self.lock = size, workers, threading.Lock()
        self.slot = functools.lru_cache(maxsize=4096)(self.find_slot)
        self.numbers = memoryview(mmap.mmap(-1, 8 * size * workers)).cast("d")
        self.use_row(0)

    def use_row(self, worker: int) -> None:
        """Write to this worker's row from now on. What a dead predecessor had under way is over."""
        self.row = worker * self.size
        for name, metric in METRICS.items():
            if metric.kind == "gauge":
                self.set(name, 0)

    def find_slot(self, name: str, labels: tuple[str, ...]) -> int:
        """Where a metric's (first) number is in a row."""
        metric, index = METRICS[name], 0
        for label, value in zip(metric.labels, labels):
            index = index * len(self.values[label]) + self.values[label].get(value, 0)
        return self.start[name] + index * WIDTHS[metric.kind]

    def add(self, name: str, *labels: str, amount: float = 1) -> None:
        """Add to a counter, or to a gauge."""
        slot = self.row + self.slot(name, labels)
        with self.lock:
            self.numbers[slot] += amount

    def reserve(self, name: str, amount: float, limit: float) -> bool:
        """Add to a gauge, unless that of all workers together would exceed the limit."""
        slot = self.slot(name, ())
        with self.lock:
            fits = sum(self.numbers[slot :: self.size]) + amount <= limit
            self.numbers[self.row + slot] += amount * fits
        return fits

    def leads(self, name: str) -> bool:
        """Whether this worker's gauge is well above that of another one."""
        slot = self.slot(name, ())
        least = min(self.numbers[slot :: self.size])
        return self.numbers[self.row + slot] > least * (1 + MAX_LEAD)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.numbers[self.row + self.slot(name, ())] = value

    def observe(self, name: str, *labels: str, seconds: float) -> None:
        """Count an observation in a histogram."""
        slot = self.row + self.slot(name, labels)
        with self.lock:
            self.numbers[slot + bisect.bisect_left(BUCKETS, seconds)] += 1
            self.numbers[slot + len(BUCKETS) + 1] += seconds

    def page(self, config: Config) -> Payload:
        """All as prometheus.io/docs/instrumenting/exposition_formats has it."""
        row = [sum(self.numbers[i :: self.size]) for i in range(self.size)]
        info = f'version="{VERSION}",api="{config.api}",workers="{self.workers}"'
        lines = [
            "# HELP proxy_to_gemini_info What this is.",
            "# TYPE proxy_to_gemini_info gauge",
            f"proxy_to_gemini_info{{{info}}} 1",
        ]
        for name, metric in METRICS.items():
            full_name = "proxy_to_gemini_" + name
            lines += [f"# HELP {full_name} {metric.help}", f"# TYPE {full_name} {metric.kind}"]
            for labels in itertools.product(*(self.values[label] for label in metric.labels)):
                slot = self.slot(name, labels)
                numbers = row[slot : slot + WIDTHS[metric.kind]]
                if any(numbers) or not metric.labels:
                    pairs = [f'{label}="{value}"' for label, value in zip(metric.labels, labels)]
                    lines += metric_lines(full_name, pairs, numbers)
        return Payload("\n".join([*lines, ""]).encode(), "text/plain; version=0.0.4; charset=utf-8")


def metric_lines(name: str, labels: list[str], numbers: list[float]) -> list[str]:
    """The lines of one metric. Several numbers are a histogram's, whose buckets add up."""
    rows = [("", labels, numbers[0])]
    if len(numbers) > 1:
        *counts, total = numbers
        sums = list(itertools.accumulate(counts))
        bounds = [f'le="{bound}"' for bound in (*BUCKETS, "+Inf")]
        rows = [("_bucket", [*labels, bound], number) for bound, number in zip(bounds, sums)]
        rows += [("_sum", labels, total), ("_count", labels, sums[-1])]
    texts = [(suffix, "{" + ",".join(labels) + "}", number) for suffix, labels, number in rows]
    return [f"{name}{suffix}{text.replace('{}', '')} {n:.15g}" for suffix, text, n in texts]


# ---- the last requests ----

RECENT_REQUESTS = 50  # that each worker remembers, and that are shown of all together
RECENT_MINUTES = 60  # whose requests and tokens are shown
RECENT_FORM = struct.Struct("<6d16s64s64s128s")  # it cuts what is longer
RECENT_BYTES = 4 + RECENT_FORM.size  # with a checksum before it


class RecentRequest(NamedTuple):
    """A request as the page for people shows it: nothing of what it or its answer says."""

    time: float  # when it began, in seconds since 1970
    first_byte: float  # of the answer, in seconds
    total: float  # seconds
    status: float
    prompt: float  # tokens
    output: float  # tokens
    scope: str  # of the Gemini key that it came with
    route: str
    model: str  # as the client spelt it
    answered_by: str  # and what did not answer

    def entry(self) -> JSON:
        fields = self._asdict()
        del fields["scope"]
        return fields


class Recent:
    """The last requests and the sums of each minute, in memory that all workers share.

    Each worker writes to a part of its own. One that reads a row while another writes it sees by
    the checksum that it is none.
    """

    def __init__(self, workers: int = 1):
        self.rows = mmap.mmap(-1, workers * RECENT_REQUESTS * RECENT_BYTES)
        # Of each minute: its number, requests, tokens.
        self.minutes = memoryview(mmap.mmap(-1, workers * RECENT_MINUTES * 3 * 8)).cast("d")
        self.unshared: collections.deque[RecentRequest] = collections.deque(maxlen=RECENT_REQUESTS)
        self.lock = threading.Lock()
        self.use_part(0)

    def use_part(self, worker: int) -> None:
        """Write to this worker's part from now on."""
        self.worker, self.count = worker, 0

    def add(self, request: RecentRequest) -> None:
        """Remember a request, and count it in its minute."""
        self.unshared.append(request)
        minute, minutes = (request.time + request.total) // 60, self.minutes
        start = 3 * (self.worker * RECENT_MINUTES + int(minute) % RECENT_MINUTES)
        with self.lock:
            if minutes[start] != minute:
                minutes[start : start + 3] = array.array("d", (minute, 0, 0))
            minutes[start + 1] += 1
            minutes[start + 2] += request.prompt + request.output

    def share(self) -> None:
        """Write the requests that came since the last time to where all workers see them."""
        with self.lock:
            while self.unshared:
                *numbers, scope, route, model, answered_by = self.unshared.popleft()
                texts = [
                    text.encode("utf-8", "replace") for text in (scope, route, model, answered_by)
                ]
                data = RECENT_FORM.pack(*numbers, *texts)
                row = self.worker * RECENT_REQUESTS + self.count % RECENT_REQUESTS
                start = row * RECENT_BYTES
                self.rows[start : start + RECENT_BYTES] = zlib.crc32(data).to_bytes(4, "big") + data
                self.count += 1

    def requests(self) -> list[RecentRequest]:
        """All that are remembered, the newest first."""
        self.share()
        rows = self.rows[:]
        requests = []
        for start in range(0, len(rows), RECENT_BYTES):
            data = rows[start + 4 : start + RECENT_BYTES]
            if zlib.crc32(data).to_bytes(4, "big") == rows[start : start + 4]:
                fields = RECENT_FORM.unpack(data)
                texts = [text.rstrip(b"\0").decode("utf-8", "ignore") for text in fields[6:]]
                requests.append(RecentRequest(*fields[:6], *texts))
        return sorted(requests, reverse=True)

    def sums(self, now: float) -> list[tuple[float, float]]:
        """(requests, tokens) of each of the last minutes, this one last."""
        sums = [(0.0, 0.0)] * RECENT_MINUTES
        numbers = iter(self.minutes)
        for minute, requests, tokens in zip(numbers, numbers, numbers):
            age = int(now // 60 - minute)
            if 0 <= age < RECENT_MINUTES:
                before = sums[-1 - age]
                sums[-1 - age] = before[0] + requests, before[1] + tokens
        return sums


# ---- one connection: heads, bodies, bytes ----


class ClientSocket(io.RawIOBase):
    """A client's (non-blocking) socket as a file that waits: between requests, also for the end."""

    def __init__(self, sock: socket.socket, ending: socket.socket):
        self.sock = sock
        self.idle = True  # no byte of the next request has come
        self.unused = True  # no byte of any request has come
        self.opened = time.monotonic()
        self.deadline = math.inf  # for all that the client is sending
        self.busy_poller, self.idle_poller = Poller(sock), Poller(sock, ending)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has come: nothing if the client left, or the server ends between requests."""
        while self.wait():
            try:
                count = self.sock.recv_into(buffer)
            except BlockingIOError:
                continue
            if self.idle:
                self.idle = self.unused = False
                self.deadline = time.monotonic() + CLIENT_SECONDS
            return count
        return 0

    def wait(self) -> bool:
        """Wait for something to read; False: the server ends, and no request is coming."""
        poller = self.idle_poller if self.idle else self.busy_poller
        ready = poller.wait(min(CLIENT_SECONDS, self.deadline - time.monotonic()))
        if not ready:
            raise socket.timeout("the client is silent")  # before Python 3.10 no TimeoutError
        if self.sock.fileno() in ready:
            return True
        grace = 0.0
        if self.unused:  # its first request may be on its way
            grace = self.opened + FINAL_SECONDS - time.monotonic()
        return bool(self.busy_poller.wait(grace))

    def is_sending(self) -> bool:
        """Whether a request may be coming in: not where its head has taken FINAL_SECONDS."""
        return self.deadline - CLIENT_SECONDS > time.monotonic() - FINAL_SECONDS

    def send(self, data: bytes) -> None:
        """Send all of it, as fast as the client takes it."""
        view = memoryview(data)
        while view:
            view = view[self.send_some(view) :]

    def send_some(self, view: memoryview) -> int:
        """Send what the socket takes at once; if that is nothing, wait. The number of bytes."""
        try:
            return self.sock.send(view)
        except BlockingIOError:
            poller = Poller()
            poller.watch(self.sock, WRITABLE)
            if poller.wait(CLIENT_SECONDS):
                return 0
        except OSError:
            pass
        raise ClientGoneError


class RequestHead:
    """The first line and the headers of a client's request."""

    method = target = ""
    http_1_0 = False  # its client knows no chunks, and keep-alive only if it says so
    length: int | None = 0  # of the body; None where it comes in chunks

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}  # by name in lower case

    def read_line(self, line: bytes) -> None:
        """Read the first line. What another server might read differently is a 400."""
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            status = 400 if len(line) < MAX_HEAD_BYTES else 414
            raise ProxyError(status, "This is not an HTTP/1.1 request line.")
        self.method, self.target = match.group(1).decode(), match.group(2).decode("latin-1")
        self.http_1_0 = match.group(3) == b"0"


def body_too_large(limit: int) -> ProxyError:
    return ProxyError(413, f"The body of this request is larger than {limit >> 20} MiB.")


def body_length(head: RequestHead) -> int | None:
    """The bytes of a request's body, or None where it comes in chunks (RFC 9112, section 6.3).

    A length that two servers might read differently is a 400: that is how requests are smuggled.
    """
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None or head.http_1_0:
            raise ProxyError(400, "The framing of this request's body is ambiguous.")
        return None
    if length is None:
        return 0
    if not CONTENT_LENGTH.fullmatch(length):
        raise ProxyError(400, "Content-Length is not a number.")
    return int(length)


def decoded_body(body: bytes, coding: str) -> bytes:
    """The body without its Content-Encoding (RFC 9110, section 8.4.1). A bomb is a 413."""
    if coding in ("identity", ""):
        return body
    if coding not in ("gzip", "x-gzip", "deflate"):
        advice = "is not known here; send the body as it is, or in gzip."
        raise ProxyError(415, f"Content-Encoding {coding[:40]!a} {advice}")
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever its head says
    limit = min(MAX_UNPACKED_BYTES, max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * len(body)))
    try:
        data = unpacker.decompress(body, limit)
    except zlib.error as error:
        raise ProxyError(400, f"The body is not {coding}: {error}") from None
    if not unpacker.eof and len(data) >= limit:
        size = f"{limit / (1 << 20):.3g} MiB"
        raise ProxyError(413, f"The body of this request unpacks to more than {size}.")
    if not unpacker.eof:
        raise ProxyError(400, f"The {coding} body breaks off.")
    if unpacker.unused_data:
        raise ProxyError(400, f"Something follows the {coding} body.")
    return data


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client: it reads requests, and a RequestCycle answers each."""

    server: Server
    rfile: io.BufferedReader

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.client = ClientSocket(self.connection, self.server.ending)
        self.rfile = io.BufferedReader(self.client)
        self.body_pending = False  # whether the client may still be sending a body
        self.body_bytes = 0  # of the body that is read or answered just now
        self.in_flight = False  # whether a request was read whose answer is not at its end
        self.server.connections[self.request] = self

    def handle_one_request(self) -> None:
        """Wait for a request, and answer it; the library does so until close_connection."""
        self.close_connection = True  # unless its head says otherwise
        try:
            self.client.idle, self.client.deadline = True, math.inf
            line = self.rfile.readline(MAX_HEAD_BYTES)
            if line == b"\r\n":  # an empty line before a request means nothing (RFC 9112, 2.2)
                line = self.rfile.readline(MAX_HEAD_BYTES)
            if line:
                RequestCycle(self).run(line)
        except (ClientGoneError, OSError):
            self.close_connection = True
        finally:
            self.release_body()

    def begin_request(self, head: RequestHead, limit: int) -> None:
        """Read the headers of a request, of so many bytes at most, and what they say of this
        connection."""
        head.headers = headers = read_headers(self.rfile, limit)
        self.in_flight, self.client.deadline = True, math.inf
        length = headers.get("content-length", "0")
        self.body_pending = length != "0" or "transfer-encoding" in headers
        if "host" not in headers and not head.http_1_0:  # RFC 9112, section 3.2
            raise ProxyError(400, "This HTTP/1.1 request has no Host header.")
        words = headers.get("connection", "").lower().split(",")
        options = [word.strip(" \t") for word in words]
        keeps_alive = "keep-alive" in options or not head.http_1_0
        self.close_connection = "close" in options or not keeps_alive  # RFC 9112, section 9.3

    def read_body(self, head: RequestHead) -> bytes:
        """The whole body, without its framing and its Content-Encoding."""
        file = io.BytesIO()  # a list of small chunks would take many times their bytes
        for block in self.body_blocks(head, MAX_BODY_BYTES):
            self.reserve(len(block))
            file.write(block)
        body = file.getvalue()
        data = decoded_body(body, head.headers.pop("content-encoding", "identity").lower())
        if data is not body:
            self.reserve(len(data))
        return data

    def body_blocks(self, head: RequestHead, limit: int) -> Iterator[bytes]:
        """The body as it comes in, without its framing; more bytes than the limit are a 413."""
        if head.length is not None and head.length > limit:
            raise body_too_large(limit)
        return self.read_blocks(head, limit)

    def read_blocks(self, head: RequestHead, limit: int) -> Iterator[bytes]:
        """The same body; what is wrong with it shows once its first block is asked for."""
        expects = head.headers.get("expect", "").lower() == "100-continue" and not head.http_1_0
        if self.body_pending and expects:  # RFC 9110, section 10.1.1
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.client.deadline = time.monotonic() + BODY_SECONDS
        if head.length is None:
            yield from self.read_chunked(limit)
        else:
            yield from self.read_exactly(head.length)
        self.body_pending = False

    def body_stream(self, head: RequestHead) -> BodyStream:
        """The body as it comes in, which is held nowhere."""
        blocks = self.body_blocks(head, MAX_UPLOAD_BYTES)

        def watched() -> Iterator[bytes]:
            try:
                yield from blocks
            except OSError:  # of the client's, or it would be taken for one of Gemini's
                raise ClientGoneError from None

        return BodyStream(watched(), head.length)

    def read_exactly(self, size: int) -> Iterator[bytes]:
        """Read so many bytes of a body. They count as they come: a mere length takes no room."""
        while size:
            block = self.rfile.read(min(size, BODY_BLOCK_BYTES))
            if not block:
                raise ClientGoneError
            yield block
            size -= len(block)

    def reserve(self, size: int) -> None:
        """Count bytes of this body until its answer ends; a 503 if all bodies have too many."""
        if self.server.metrics.reserve("body_bytes", size, MAX_ALL_BODIES_BYTES):
            self.body_bytes += size
            return
        self.release_body()  # now, so that the others can go on
        message = "This server has too many large requests under way; try again soon."
        raise ProxyError(503, message, headers={"Retry-After": "5"})

    def release_body(self) -> None:
        self.server.metrics.add("body_bytes", amount=-self.body_bytes)
        self.body_bytes = 0

    def read_chunked(self, left: int) -> Iterator[bytes]:
        """Read a body in chunks (RFC 9112, section 7.1), of so many bytes at most."""
        limit = left
        while True:
            match = REQUEST_CHUNK.fullmatch(self.rfile.readline(1024))
            if not match:
                raise ProxyError(400, "This is not a chunk of a body.")
            size = int(match.group(1), 16)
            left -= size
            if left < 0:
                raise body_too_large(limit)
            if not size:
                read_headers(self.rfile, MAX_HEAD_BYTES)  # trailers, which nobody needs
                return
            yield from self.read_exactly(size)
            if self.rfile.read(2) != b"\r\n":
                raise ProxyError(400, "A chunk of the body is longer than it says.")

    def finish(self) -> None:
        """End. A client that still sends can read its refusal before (RFC 9112, section 9.6)."""
        with contextlib.suppress(OSError):
            if self.body_pending:
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(LINGER_SECONDS)
                deadline = time.monotonic() + LINGER_SECONDS
                while time.monotonic() < deadline and self.connection.recv(1 << 16):
                    pass
        self.rfile.close()


# ---- who may call ----

WRONG_PROXY_KEY = "Incorrect API key provided: this server wants its own key (PROXY_API_KEY)."
NO_GEMINI_KEY = (
    "You didn't provide an API key: this server wants your own Gemini key as the API key "
    "(aistudio.google.com/apikey)."
)


def origin_allowed(origin: str, added: tuple[str, ...]) -> bool:
    """Whether a web page from there may call: this machine's pages, apps, and -origins."""
    return "*" in added or origin in added or re.fullmatch(APP_ORIGINS, origin) is not None


def is_own_origin(origin: str, host: str, config: Config) -> bool:
    """Whether a web page from there is this server's own. Anybody can make a name lead here (DNS
    rebinding), so it must be an address, or the key must tell users from others."""
    locked = config.proxy_key or config.client_keys or ADDRESS_HOSTS.fullmatch(host)
    return bool(locked) and re.sub("^https?://", "", origin) == host


def host_allowed(host: str, browser: bool, origins: tuple[str, ...]) -> bool:
    """Whether this is a name for this machine. Browsers may use those of LAN and containers only if
    -origins has them: whoever answers for these names there could rebind them to this machine."""
    if not host or LOOPBACK_HOSTS.fullmatch(host):
        return True
    match = NEARBY_HOSTS.fullmatch(host)
    if not match or not browser or "*" in origins:
        return match is not None
    named = [re.sub(r"^\w+://|(:\d+)?/*$", "", origin).lower() for origin in origins]
    return match.group(1).lower() in named


def check_caller(head: RequestHead, path: str, config: Config, loopback: bool) -> None:
    """Refuse foreign web pages, foreign names for this machine, and clients without the key."""
    host, origin = head.headers.get("host", ""), head.headers.get("origin")
    browser = not head.headers.keys().isdisjoint(BROWSER_HEADERS)
    if loopback and not host_allowed(host, browser, config.origins):  # DNS rebinding
        raise ProxyError(403, "This server is called by another name: " + ascii(host[:80]))
    if origin is not None and not (
        origin_allowed(origin, config.origins) or is_own_origin(origin, host, config)
    ):
        message = f"Pages from {origin[:80]!a} may not call this server; -origins can allow it."
        raise ProxyError(403, message)
    cross_site = head.headers.get("sec-fetch-site") == "cross-site"  # such as an image's source
    if cross_site and origin is None and "*" not in config.origins:
        raise ProxyError(403, "Other sites may not call this server; -origins can allow it.")
    if not config.proxy_key or head.method == "OPTIONS" or path in ("/", "/healthz"):
        return
    if has_ticket(head, path, config):
        return
    if not any(is_proxy_key(key, config) for key in client_keys(head)):
        raise ProxyError(401, WRONG_PROXY_KEY, code="invalid_api_key")


def query_fields(target: str) -> dict[str, str]:
    """The parameters in the target of a request, byte for byte as headers are. One that comes twice
    means nothing here: Gemini might take the other for it."""
    if "?" not in target:
        return {}
    pairs = urllib.parse.parse_qsl(target.partition("?")[2], encoding="latin-1")
    counts = collections.Counter(name for name, _ in pairs)
    return {name: value for name, value in pairs if counts[name] == 1}


def client_keys(head: RequestHead) -> Iterator[str]:
    """What the client sent as a key, in any of the usual headers, or as Google's clients may."""
    for name in ("authorization", "x-api-key", "api-key", "x-goog-api-key"):
        value = head.headers.get(name)
        if value:
            yield re.sub(r"^bearer +", "", value, flags=re.I)
    key = query_fields(head.target).get("key")
    if key:
        yield key


def is_proxy_key(key: str, config: Config) -> bool:
    return hmac.compare_digest(key.encode("latin-1"), config.proxy_key.encode())


def ticket_for(upload_id: str, config: Config) -> str:
    """What lets a client in that sends the bytes of a file. Google's SDKs send no key with them
    (google-genai 3.6, _api_client.py)."""
    data = b"upload " + upload_id.encode("latin-1")
    return hmac.new(config.proxy_key.encode(), data, hashlib.sha256).hexdigest()


def has_ticket(head: RequestHead, path: str, config: Config) -> bool:
    """Whether this is to go on with an upload that was begun with the key."""
    fields = query_fields(head.target)
    ticket, upload_id = fields.get(UPLOAD_TICKET, ""), fields.get("upload_id", "")
    if not upload_id or not path.startswith("/upload/"):
        return False
    return hmac.compare_digest(ticket.encode("latin-1"), ticket_for(upload_id, config).encode())


def with_own_address(answer: AnswerHead, head: RequestHead, config: Config) -> AnswerHead:
    """The head of an answer in which an address of Gemini's API is one of this server's. What a
    browser shows of it is no page of this server's, whatever its type."""
    headers = {**answer.headers, "Content-Security-Policy": "sandbox"}
    scheme = head.headers.get("x-forwarded-proto", "")  # where a proxy before this speaks TLS
    if scheme not in ("http", "https"):
        scheme = "http"
    for name in headers.keys() & {"x-goog-upload-url", "location"}:
        try:
            url = urllib.parse.urlsplit(headers[name])
        except ValueError:
            raise invalid_answer(f"{name} is no address") from None
        if PASSED_TARGET.fullmatch(url.path):
            upload_id, query = (
                query_fields(headers[name]).get("upload_id"),
                kept_query(url.query)[0],
            )
            if upload_id and config.proxy_key:
                query += f"&{UPLOAD_TICKET}={ticket_for(upload_id, config)}"
            host = head.headers.get("host", "")
            headers[name] = urllib.parse.urlunsplit((scheme, host, url.path, query, ""))
    return answer._replace(headers=headers)


def upstream_key(head: RequestHead, path: str, config: Config) -> str:
    """The key for Gemini: the server's own, or with -client-keys the client's."""
    if not config.client_keys:
        if config.proxy_key and not any(is_proxy_key(key, config) for key in client_keys(head)):
            return ""  # a ticket is good for the bytes of one file, with which Gemini wants no key
        return config.key
    keys = [key for key in client_keys(head) if not is_proxy_key(key, config)]
    if keys and re.fullmatch(KEY_PATTERN, keys[0]):
        return keys[0]
    if path.startswith("/upload/") and query_fields(head.target).get("upload_id"):
        return ""  # Gemini wants no key with the bytes of a file
    raise ProxyError(401, NO_GEMINI_KEY, code="invalid_api_key")


EXPOSED = ("x-proxy-model", "x-goog-upload-url", "x-goog-upload-status")


def cors_headers(head: RequestHead, config: Config, protocol: Protocol) -> list[tuple[str, str]]:
    """The headers that let a web page read the answer (fetch.spec.whatwg.org, "CORS protocol")."""
    origin = head.headers.get("origin")
    if origin is None or not origin_allowed(origin, config.origins):
        return []
    exposed = ("x-request-id", *protocol.id_headers, "retry-after", "x-proxy-ignored", *EXPOSED)
    return [
        ("Access-Control-Allow-Origin", re.sub(r"[^!-~]", "", origin[:500])),
        ("Vary", "Origin"),
        ("Access-Control-Expose-Headers", ", ".join(exposed)),
    ]


def preflight_headers(head: RequestHead) -> list[tuple[str, str]]:
    """The answer to a web page's question whether it may send these headers."""
    text = head.headers.get("access-control-request-headers", "")[:2000]
    names = [name.strip() for name in text.split(",") if re.fullmatch(HTTP_TOKEN, name.strip())]
    return [
        ("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE, HEAD, OPTIONS"),
        ("Access-Control-Allow-Headers", ", ".join(names[:100])),
        ("Access-Control-Max-Age", "86400"),
    ]


# ---- one request ----


class Sender:
    """Sends the answer to one request: a whole one at once, a stream event by event."""

    def __init__(self, handler: Handler, head: RequestHead):
        self.handler, self.head = handler, head
        self.recording: Recording | None = None
        if handler.server.recorder:
            self.recording = Recording(handler.server.recorder, handler.server.config, head)
        self.status = 0  # of the answer; 0 until its head is written
        self.first_byte = time.monotonic()  # when it was; until then, when the request came
        self.streaming = False  # whether the answer is a stream that has begun
        self.unsent = b""  # bytes of that stream that wait for more
        self.last_flush = -math.inf  # when some were sent

    def send(self, status: int, headers: list[tuple[str, str]], data: bytes = b"") -> None:
        """Send a whole answer in one write."""
        answer = self.answer_head(status, headers)
        if self.head.method != "HEAD":
            answer += data
            if self.recording:
                self.recording.answer.feed(data)
        self.handler.client.send(answer)

    def begin_stream(self, status: int, headers: list[tuple[str, str]]) -> None:
        """Begin a stream; its head goes out with the first event."""
        if self.head.http_1_0:
            self.handler.close_connection = True  # which is how this stream ends
        elif status not in BODILESS:
            headers = [*headers, ("Transfer-Encoding", "chunked")]
        self.unsent, self.streaming = self.answer_head(status, headers), True

    def emit(self, data: bytes, last: bool = False) -> None:
        """Send an event of the stream. What Gemini says without a pause goes together, a few
        milliseconds at most: each send costs as much as an event."""
        if self.head.method == "HEAD" or self.status in BODILESS:
            self.flush()
            return
        if self.recording and data:
            self.recording.answer.feed(data)
        if not self.head.http_1_0:
            if data:
                data = chunk_of(data)
            if last:
                data += LAST_CHUNK
        self.unsent += data
        due = time.monotonic() - self.last_flush > MAX_UNSENT_SECONDS
        if last or due or len(self.unsent) > MAX_UNSENT_BYTES:
            self.flush()

    def flush(self) -> float:
        """Send what waits of the stream, if anything does; the waiter does so before it waits.
        Returns when some was sent last."""
        data, self.unsent = self.unsent, b""
        if data:
            self.handler.client.send(data)
            self.last_flush = time.monotonic()
        return self.last_flush

    def answer_head(self, status: int, headers: list[tuple[str, str]]) -> bytes:
        """Status line and headers; with these the answer has begun."""
        self.status, self.first_byte = status, time.monotonic()
        lines = [
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Error')}",
            f"Date: {http_date(int(time.time()), usegmt=True)}",
            f"Server: proxy-to-gemini/{VERSION}",
        ]
        lines += [f"{name}: {value}" for name, value in headers]
        handler = self.handler
        if handler.close_connection or handler.body_pending or handler.server.draining:
            handler.close_connection = True
            lines.append("Connection: close")
        elif self.head.http_1_0:
            lines.append("Connection: keep-alive")
        data = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
        if self.recording:
            self.recording.begin_answer(data, headers)
        return data


TARGET_LOGIN = re.compile(r"^\w+://[^/]*@")  # in the target of a request, which no log is to have
# nginx.org/en/docs/http/ngx_http_proxy_module.html: a stream is not to be gathered on its way.
STREAM_HEADERS = (("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"))


class RequestCycle:
    """One request of a client, and its answer."""

    def __init__(self, handler: Handler):
        self.handler, self.server = handler, handler.server
        self.began = time.monotonic()
        self.seed = os.urandom(12).hex()  # of all ids in the answer
        self.request_id = "req_" + self.seed
        self.head, self.key = RequestHead(), ""  # the key for Gemini
        _, self.protocol = MOUNTS[self.server.config.api][-1]  # until the path is known
        self.route: Route | None = None
        self.route_name = "other"  # for the metrics
        self.exchange: Exchange | None = None
        self.ignored: list[str] = []  # names of what has no effect; grows while Gemini is called
        self.framing = SSE  # of the answer, where it is a stream
        self.passed_head: AnswerHead | None = None  # of an answer that is passed through
        self.committed = False  # whether the client was sent some of what a model says
        self.fallbacks: list[str] = []  # models that could not answer, and why
        self.sender = Sender(handler, self.head)

    def run(self, line: bytes) -> None:
        """Answer the request that begins with this line, whatever it is."""
        try:
            self.head.read_line(line)  # the log has it, whatever the headers are
            self.handler.begin_request(self.head, MAX_HEAD_BYTES - len(line))
            self.serve()
        except ProxyError as error:
            error.__traceback__ = None  # its frames hold the body, and one may hold the error
            self.fail(error)
        except RecursionError:
            if self.exchange:
                self.fail(invalid_answer("it is nested too deeply"))
            else:
                self.fail(nested_too_deeply())
        except (ClientGoneError, OSError):
            self.sender.status = self.sender.status or 499  # nginx's number for a client that left
            self.note("the client left")
            raise
        except Exception:
            log(f"{self.request_id}: {BUG}: {traceback.format_exc()}")
            self.note(traceback.format_exc())
            message = "proxy-to-gemini has a bug here; its log tells more."
            self.fail(ProxyError(500, message, code="internal_error"))
        finally:
            if self.sender.recording:
                self.end_recording(self.sender.recording)
            self.handler.in_flight = False
            self.account()

    def serve(self) -> None:
        """Find what answers this path, and let it answer."""
        server, head, method, api = self.server, self.head, self.head.method, self.server.config.api
        if method not in METHODS:
            raise ProxyError(501, f"The method {method[:20]} is not implemented.")
        match = TARGET.fullmatch(head.target)
        if not match:
            raise ProxyError(400, "The target of this request is no path.")
        authority, target, query = match.groups()
        path = route_path(target, api, head.headers)
        self.protocol = protocol_of(api, method, path, head.headers)
        if authority and head.headers.setdefault("host", authority).lower() != authority.lower():
            raise ProxyError(400, "The target of this request names another server than its Host.")
        head.length = body_length(head)  # ambiguous framing is a 400 whatever the path
        check_caller(head, path, server.config, server.loopback)
        if method == "OPTIONS":
            self.sender.send(204, self.all_headers(preflight_headers(head)))
        elif path in OWN_PAGES and OWN_PAGES[path] == method.replace("HEAD", "GET"):
            self.route_name = f"{OWN_PAGES[path]} {path}"
            self.sender.recording = None  # they are asked for all the time
            self.send_answer(*self.own_page(path))
        else:
            route, params = find_route(api, method, path)
            self.route_name, self.key = route.name, upstream_key(head, path, server.config)
            request = ClientRequest(route.method, path, query, head.headers)
            context = server.context._replace(params=params, request=request)
            exchanges = self.exchanges(route, *self.read_request(route, context))
            with contextlib.closing(exchanges):
                self.answer(route, exchanges)

    def own_page(self, path: str) -> tuple[int, Any, Mapping[str, str]]:
        """(status, answer, headers) of one of OWN_PAGES."""
        server, config = self.server, self.server.config
        if path in ("/status", "/checks"):
            self.key = upstream_key(self.head, path, config)
        if path == "/status":
            return 200, server.state_for(self.key), NOT_STORED
        if path == "/checks":
            return 200, self.checks(), NOT_STORED
        if path == "/metrics":
            server.update_gauges()
            return 200, server.metrics.page(config), {}
        if path == "/healthz" and server.draining:
            return 503, Payload(b"ending"), {}
        if path == "/healthz":
            return 200, Payload(b"ok"), {}
        if accepts_page(self.head.headers.get("accept", "")):
            return page_for_people(config)
        text = f"You are running proxy-to-gemini at {server.url}; api = {config.api}\n"
        if config.api == "ollama":
            text = "Ollama is running"
        return 200, Payload(text.encode()), {}

    def checks(self) -> list[JSON]:
        """What -check tells of the way to Gemini. It costs an answer, so there is one at a time."""
        server = self.server
        if not server.metrics.reserve("checks", 1, 1):
            message = "Checks are under way already; try again in a few seconds."
            raise ProxyError(429, message, headers={"Retry-After": "5"})
        waiter = Waiter(self.handler.connection, CHECK_SECONDS, server.stopping)
        waiter.deadline = time.monotonic() + ALL_CHECKS_SECONDS
        config = server.config._replace(key=self.key)
        names = [name for name in config.backend.checks if name != "port"]
        try:
            return [result._asdict() for result in check_results(config, names, waiter)]
        finally:
            server.metrics.add("checks", amount=-1)

    def exchanges(
        self, route: Route, body: Fields, context: Context
    ) -> Generator[Exchange, None, None]:
        """Plan the calls to Gemini; then the same for each of an alias's further models, for when
        the one before cannot answer."""
        data, created = body.data, time.time()
        exchange = self.new_exchange(route, body, context, created)
        del body
        model = exchange.model
        if model is None or not model.further:
            del data  # it may be large
            yield exchange
            return
        first = model.path.removeprefix("models/")  # as the alias spells it
        models = self.server.gemini.cooldowns.in_turn(self.key, (first, *model.further))
        if models[0] == first:
            exchange.context = context._replace(models=models)
            yield exchange
            models = models[1:]
        else:
            self.count_fallback(first, "cooldown")
        while models:
            with contextlib.suppress(ProxyError):  # the error of the first model is the one to tell
                context = context._replace(models=models)
                yield self.new_exchange(route, Fields(data), context, created)
            models = models[1:]

    def read_request(self, route: Route, context: Context) -> tuple[Fields, Context]:
        """The body, and all else that the plan may depend on."""
        if isinstance(route.fixed, Refusal):
            status, message, headers = route.fixed
            raise ProxyError(status, message, headers=dict(headers))
        if route.parse and (self.handler.body_pending or self.head.method not in ("GET", "HEAD")):
            raw = self.handler.read_body(self.head)
            if self.sender.recording:
                self.sender.recording.request.feed(raw)
            body = route.parse(raw, self.head.headers.get("content-type", ""))
            del raw  # it may be large
        else:
            body = Fields({})
        shelf = self.server.shelf(self.key)
        if context.ollama:
            loaded, recipes = self.server.loaded_by(self.key), shelf.recipes(body)
            context = context._replace(loaded=loaded, recipes=recipes)
        if route.keys:
            keys = route.keys(body, context)
            context = context._replace(stored=shelf.look_up(keys, self.handler.reserve))
        return body, context

    def new_exchange(
        self, route: Route, body: Fields, context: Context, created: float
    ) -> Exchange:
        """An exchange with the first of the models that the context leaves."""
        plan = route.request(body, context) if route.request else Plan()
        self.ignored = body.ignored()
        return Exchange(plan, context, self.seed, created)

    def pass_over(self, exchange: Exchange, error: ProxyError) -> bool:
        """Pass the model over for a while if the alias's next one may cure this failure; whether it
        may."""
        if not exchange.context.models:
            return False
        cooldowns, model = self.server.gemini.cooldowns, exchange.context.models[0]
        reason = fallback_reason(error)
        if not reason:
            cooldowns.end(self.key, model)
            return False
        cooldowns.start(self.key, model, cooldown_seconds(error, reason))
        self.count_fallback(model, reason)
        self.count_tokens(exchange.usage)
        exchange.usage = Usage()
        return True

    def is_decided(self) -> bool:
        """Whether no other model can answer any more than the one that is asked now."""
        return self.committed or not self.exchange or len(self.exchange.context.models) < 2

    def count_fallback(self, model: str, reason: str) -> None:
        self.fallbacks.append(f"{model}: {reason}")
        self.server.metrics.add("fallbacks_total", reason)

    # ---- what Gemini says ----

    def answer(self, route: Route, exchanges: Iterator[Exchange]) -> None:
        """Answer with what the route makes of what Gemini says to the first plan; where it cannot
        answer, to the next one. If none can, the client gets the first one's error."""
        server = self.server
        waiter = Waiter(self.handler.connection, server.config.timeout, server.stopping)
        waiter.recording = self.sender.recording
        first_error: ProxyError | None = None
        for exchange in exchanges:
            self.route, self.exchange = route, exchange
            error = self.answer_with(route, exchange, waiter)
            if error is None:
                self.note_answer(exchange)
                return
            if self.committed:
                raise error
            if first_error is None:
                first, first_error = exchange, error
            if not self.pass_over(exchange, error):
                break
        assert first_error is not None  # there is one plan at least
        self.exchange = first
        raise first_error

    def note_answer(self, exchange: Exchange) -> None:
        """Note that a model has answered, and is in use now."""
        server, plan, models = self.server, exchange.plan, exchange.context.models
        if models:
            server.gemini.cooldowns.end(self.key, models[0])
        if plan.loads:
            server.load(self.key, *plan.loads)
        elif plan.chat and exchange.context.ollama:
            model = plan.chat.model
            name = model.name if model.stands_in else plan.model_name
            server.load(self.key, name, LOADED_SECONDS)

    def answer_with(self, route: Route, exchange: Exchange, waiter: Waiter) -> ProxyError | None:
        """Answer with what one model says; the error where it cannot."""
        server, plan, calls = self.server, exchange.plan, exchange.plan.calls
        self.framing, stream = plan.framing or route.framing, plan.stream and route.stream
        if not route.parse:
            calls = tuple(map(self.with_body, calls))
        waiter.silence = server.config.timeout
        if not self.is_decided():
            waiter.silence /= 2  # until the first event
        if stream:
            waiter.flush = self.sender.flush
        if stream and self.framing.keep_alive:
            waiter.keep_alive = self.keep_alive
        try:
            batch = server.gemini.ask(calls, waiter, self.key, self.ignored)
            with contextlib.closing(batch):
                answers = self.read_answers(batch, exchange, waiter)
                if stream:
                    for event in self.kept(stream(exchange, answers)):
                        self.committed = True
                        self.emit(self.framing.encode(event))
                    self.committed = True
                    self.emit(self.framing.end, last=True)
                else:
                    self.send_answer(200, self.whole_answer(route, exchange, answers))
        except ProxyError as error:
            if error.upstream and error.code == "invalid_api_key":
                server.reload_instead_of(self.key)
            self.add_model_to(error, exchange, waiter)
            error.__context__ = None  # its frames, and those of the error, lead back to this one
            return error.with_traceback(None)
        finally:
            waiter.flush = waiter.keep_alive = None  # they lead here, and may outlive this (PyPy)
        return None

    def with_body(self, call: GeminiCall) -> GeminiCall:
        """The call that is passed through, with the body that the client is sending."""
        assert call.passed is not None
        body = self.handler.body_stream(self.head)
        if self.sender.recording:
            body = self.sender.recording.passing(body, self.head.headers)
        return call._replace(passed=call.passed._replace(body=body))

    def read_answers(
        self, batch: Iterable[Iterator[JSON]], exchange: Exchange, waiter: Waiter
    ) -> AnswerStreams:
        """For each call its events, or its chunks of JSON where it does not generate."""
        for call, chunks in zip(exchange.plan.calls, batch):
            items: Iterator[Any] = chunks
            if call.generates:
                items = read_gemini(chunks, exchange)
            items = self.arriving(items, call, exchange, waiter)
            if call.generates and exchange.plan.chat:
                items = chat_events(items, call, exchange.plan.chat)
            yield items

    def arriving(
        self, items: Iterable[Any], call: GeminiCall, exchange: Exchange, waiter: Waiter
    ) -> Iterator[Any]:
        """The events or chunks; the exchange learns when each of them came. What Gemini wants back
        with its tool calls is remembered before the client gets the end of the answer."""
        for item in items:
            exchange.now = time.time()
            waiter.silence = self.server.config.timeout
            if isinstance(item, End) and item.calls:
                self.sender.flush()  # the memory may keep this waiting
                self.server.gemini.remember(call, self.key, item.calls)
            yield item

    def kept(self, events: Iterable[Any]) -> Iterator[JSON]:
        """The events for the client. A Keep among them is kept instead, a head becomes its own."""
        for event in events:
            if isinstance(event, Keep):
                self.sender.flush()
                self.server.shelf(self.key).keep(event)
            elif isinstance(event, AnswerHead):
                self.passed_head = with_own_address(event, self.head, self.server.config)
            else:
                yield event
                if self.head.method == "HEAD":
                    return  # nobody gets the rest

    def whole_answer(self, route: Route, exchange: Exchange, answers: AnswerStreams) -> Any:
        """The route's answer to a client that wants no stream. What is to be kept is kept."""
        answer, make = route.fixed, route.response or route.stream
        if make:
            answer = make(exchange, answers)
        if isinstance(answer, Iterator):
            (answer,) = collections.deque(self.kept(answer), maxlen=1)
        return answer

    def add_model_to(self, error: ProxyError, exchange: Exchange, waiter: Waiter) -> None:
        """Add to "no such model" how the client spelt it, and whether Gemini lists it after all."""
        if error.code != "model_not_found" or not error.upstream:
            return
        error.model = exchange.model_name
        gemini, model = self.server.gemini, exchange.model
        if model is None:
            return
        with contextlib.suppress(ProxyError):
            error.listed = model.path in map(entry_path, gemini.list_models(waiter, self.key))
        gemini.note_not_found(model, error, self.key)

    # ---- its answer ----

    def keep_alive(self) -> None:
        """Show in the stream that it is alive."""
        assert self.exchange is not None and self.framing.keep_alive is not None
        self.exchange.now = time.time()
        self.emit(self.framing.keep_alive(self.exchange))
        self.sender.flush()

    def emit(self, data: bytes, last: bool = False) -> None:
        """Send an event of a stream, which begins with the first one."""
        if not self.sender.streaming:
            usual = 200, {"Content-Type": self.framing.content_type}
            status, fields = self.passed_head or usual
            headers = [*fields.items(), *STREAM_HEADERS, *self.own_headers(self.is_decided())]
            self.sender.begin_stream(status, self.all_headers(headers))
        self.sender.emit(data, last)

    def send_answer(self, status: int, answer: Any, headers: Mapping[str, str] = {}) -> None:
        """Send a whole answer, JSON or a Payload."""
        payload = answer
        if not isinstance(answer, Payload):
            payload = Payload(encode_json(answer).encode(), "application/json")
        own = ("Content-Type", payload.content_type), ("Content-Length", str(len(payload.data)))
        fields = [own[0], *headers.items(), *self.own_headers(), own[1]]
        self.sender.send(status, self.all_headers(fields), payload.data)

    def all_headers(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """These headers of an answer, and those that each one has."""
        ids = [(name, self.request_id) for name in ("x-request-id", *self.protocol.id_headers)]
        return [*ids, *headers, *cors_headers(self.head, self.server.config, self.protocol)]

    def own_headers(self, decided: bool = True) -> list[tuple[str, str]]:
        """The headers that tell which model answers, if that is decided, and what was ignored of
        the request."""
        headers: list[tuple[str, str]] = []
        model = self.exchange and self.exchange.model
        if model and decided:
            headers.append(("x-proxy-model", model.name))
        names = [re.sub(r"[^!-+\--~]", "?", name)[:200] for name in self.ignored]
        text = ", ".join(dict.fromkeys(names))
        if len(text) > MAX_IGNORED_CHARACTERS:
            text = text[:MAX_IGNORED_CHARACTERS].rpartition(", ")[0] + ", ..."
        if text:
            headers.append(("x-proxy-ignored", text))
        return headers

    def fail(self, error: ProxyError) -> None:
        """Answer with an error; in mid-stream it is the last event."""
        error.request_id = self.request_id
        if error.status == 401 and error.upstream and self.protocol.hides_401:
            error.status = 403
        if not self.sender.status:
            status, answer = self.protocol.error(error)
            self.send_answer(status, answer, error.headers)
        elif self.sender.streaming and self.framing.carries_errors:
            events = [self.protocol.error(error)[1]]
            if self.route and self.route.failure and self.exchange:
                events = list(self.kept(self.route.failure(self.exchange, error)))
            self.emit(b"".join(map(self.framing.encode, events)), last=True)
        else:
            self.sender.flush()
            self.handler.close_connection = True  # no error would be understood here

    def count_tokens(self, usage: Usage) -> None:
        for kind in LABELS["kind"]:
            amount = getattr(usage, kind)
            if amount:
                self.server.metrics.add("tokens_total", kind, amount=amount)

    def note(self, text: str) -> None:
        """Have the recording tell this too."""
        if self.sender.recording:
            self.sender.recording.notes.append(text)

    def end_recording(self, recording: Recording) -> None:
        """Have what was recorded written, by a thread that this one does not wait for."""
        recording.ignored = self.ignored
        recording.facts = {
            "seconds": round(time.monotonic() - self.began, 4),
            "request_id": self.request_id,
            "route": self.route_name,
            "status": self.sender.status,
            "fallbacks": self.fallbacks,
        }
        recording.recorder.put(recording)

    def account(self) -> None:
        """Count the request, and log it without its content and its query, which may hold keys."""
        now, metrics, tokens = time.monotonic(), self.server.metrics, ""
        status, first_byte = self.sender.status, self.sender.first_byte
        metrics.add("requests_total", self.route_name, str(status))
        metrics.observe("request_seconds", self.route_name, seconds=now - self.began)
        metrics.observe("first_byte_seconds", self.route_name, seconds=first_byte - self.began)
        exchange, answered_by = self.exchange, self.answered_by()
        if exchange and exchange.model_name:
            usage = exchange.usage
            if exchange.model and exchange.model_status:
                self.server.gemini.note_status(exchange.model, exchange.model_status, self.key)
            tokens = f" {exchange.model_name[:100]!r}"
            if answered_by not in ("", exchange.model_name):
                tokens += f" ({answered_by})"
            tokens += f" {usage.prompt}+{usage.output} tokens"
            self.count_tokens(usage)
        target = TARGET_LOGIN.sub("", self.head.target.partition("?")[0])
        method, path = self.head.method or "-", target[:200] or "-"
        log(f"{method} {path} {status} {(now - self.began) * 1000:.0f} ms{tokens}")
        if self.route_name not in self.server.own_routes:
            self.remember(now - self.began, f"{method} {path}", answered_by)

    def answered_by(self) -> str:
        """The model that answers, and those that did not, each with its reason."""
        models = list(self.fallbacks)
        if self.exchange and self.exchange.model:
            models.insert(0, self.exchange.model.name)
        return "; ".join(models)

    def remember(self, seconds: float, place: str, answered_by: str) -> None:
        """Remember the request for the page for people; its place is shown if no route answers."""
        scope, route, model, tokens = "", self.route_name, "", (0, 0)
        if self.server.config.client_keys:
            scope = scope_of(self.key)
        if route == "other":
            route = place
        if self.exchange:
            usage, model = self.exchange.usage, self.exchange.model_name
            tokens = usage.prompt, usage.output
        times = time.time() - seconds, self.sender.first_byte - self.began, seconds
        texts = scope, route, model, answered_by
        request = RecentRequest(*times, self.sender.status, *tokens, *texts)
        self.server.recent.add(request)


# ---- the page for people ----

# Client | -api | line to paste: the README's table, with this server's address as "{url}", as
# "{address}" without "http://", and as "{host}" and "{port}".
CLIENT_ROWS = """\
OpenAI's libraries and programs built on them | either \
| `OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=any`
Anthropic's libraries | either | `ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY=any`
Google's libraries | either | `GOOGLE_GEMINI_BASE_URL={url} GEMINI_API_KEY=any`
Codex CLI | either | `codex -c model_provider=gemini -c \
'model_providers.gemini={name="Gemini",base_url="{url}/v1"}'`
Claude Code | either | `ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=any claude`
Gemini CLI | either | `GOOGLE_GEMINI_BASE_URL={url} GEMINI_API_KEY=any gemini`, then "Use Gemini \
API key" (for `gemini -p`: `{"security": {"auth": {"selectedType": "gemini-api-key"}}}` in \
`~/.gemini/settings.json`)
aider | either | `OPENAI_API_BASE={url}/v1 OPENAI_API_KEY=any aider --model openai/gemini-3.8-flash`
Cline, Roo Code | either | API Provider > OpenAI Compatible: Base URL `{url}/v1`, model \
`gemini-3.8-flash`
Ollama's CLI and libraries | ollama | `OLLAMA_HOST={address}`
Open WebUI | ollama | Admin Panel > Settings > Connections > Ollama API: `{url}`
VS Code Copilot Chat | ollama | `"github.copilot.chat.byok.ollamaEndpoint": "{url}"`, then Manage \
Models > Ollama
Home Assistant | ollama | Settings > Devices & services > Add integration > Ollama: \
`http://{host}:{port}`; on the server `-listen=:{port}` and `PROXY_API_KEY`, which is the \
integration's key
Zed | ollama | `"language_models": {"ollama": {"api_url": "{url}"}}`
JetBrains AI Assistant | ollama | Settings > Tools > AI Assistant > Models > Ollama: `{url}`
Continue | ollama | in `config.yaml`: `provider: ollama`, `apiBase: {url}`
LangChain | ollama | `ChatOllama(model="gemini-3.8-flash", base_url="{url}")`
LiteLLM | ollama | `model="ollama_chat/gemini-3.8-flash", api_base="{url}"`
n8n | ollama | credential Ollama account: Base URL `{url}`
Page Assist | ollama | Settings > Ollama > URL `{url}`; on the server \
`-origins=chrome-extension://ID`
Xcode | ollama | Settings > Intelligence > Add a Model Provider > Locally Hosted, port {port}
"""
CLIENTS = [row.split(" | ") for row in CLIENT_ROWS.splitlines()]
NOT_STORED = {"Cache-Control": "no-store"}
KEY_FIELD = """<p><label>{}<br>
<input name="{}" type="password" autocomplete="off" required pattern="[!-~]+"></label></p>"""
# Nothing on it is loaded from elsewhere, and no script can turn text into markup (Trusted Types).
# NONCE and FIELDS are filled in.
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>proxy-to-gemini</title><link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #57606a; --paper: #fff; --line: #8c959f;
  --field: #f3f5f7; --accent: #0a58b5; --good: #116329; --bad: #b3141d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --faint: #a3acb5; --paper: #14171b; --line: #6b7681; --field: #20252b;
    --accent: #7db5ff; --good: #63c983; --bad: #ff9189; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p, ol, ul, pre, textarea { margin: .5rem 0; }
p:empty, pre:empty, ol:empty, ul:empty { display: none; }
details:has(pre:empty), #keys:not([hidden]) ~ * { display: none; }
textarea, input, select, button { font-size: 1rem; padding: .5rem .7rem; max-width: 100%;
  border: 1px solid var(--line); color: inherit; background: var(--field); border-radius: 4px; }
textarea { display: block; width: 100%; }
button:enabled { color: var(--accent); cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
code, pre { background: var(--field); padding: .1rem .3rem; white-space: pre-wrap; }
figcaption, small, button:disabled { color: var(--faint); }
code, pre, figcaption, small, table, dd button { font-size: .875rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--field);
  white-space: nowrap; }
td:nth-child(2), td:nth-child(3) { min-width: 12rem; white-space: normal; }
th:nth-child(n+4), td:nth-child(n+4) { text-align: right; }
.wide { overflow: auto; max-height: 24rem; }
.charts { display: flex; gap: 1.5rem; flex-wrap: wrap; } figure { flex: 1 1 16rem; }
svg { display: block; width: 100%; height: 3rem; background: var(--field); fill: var(--accent); }
dt { font-weight: 600; margin-top: .6rem; } dd, figure { margin: 0; }
dd button { padding: .1rem .5rem; margin-left: .4rem; }
.good { color: var(--good); } .bad { color: var(--bad); } img { max-width: 100%; }
</style>
</head>
<body><main>
<h1>proxy-to-gemini</h1>
<noscript>This page needs JavaScript.</noscript><p id="about"></p>
<p id="problem" role="alert"></p>
<form id="keys" hidden>FIELDS
<button>Use</button> <small>It is kept in this tab until you close it.</small>
</form>
<button id="forget" hidden>Forget the key</button>
<h2>Does it work?</h2>
<button id="check">Check the way to Gemini</button>
<small>Looks at connection and key, and asks a flash model for one word.</small>
<ol id="results" aria-live="polite"></ol>
<h2>The last hour</h2>
<div class="charts">
<figure id="requests"><svg viewBox="0 0 60 100" preserveAspectRatio="none"
aria-hidden="true"><path></path></svg><figcaption></figcaption></figure>
<figure id="tokens"><svg viewBox="0 0 60 100" preserveAspectRatio="none"
aria-hidden="true"><path></path></svg><figcaption></figcaption></figure>
</div>
<h2 id="last">Last requests</h2>
<div class="wide" role="region" aria-labelledby="last" tabindex="0">
<table><thead><tr>
<th scope="col">Time<th scope="col">Route<th scope="col">Model<th scope="col">Tokens in
<th scope="col">Tokens out<th scope="col">First byte<th scope="col">Total<th scope="col">Status
</tr></thead><tbody id="rows"></tbody></table>
</div>
<h2>Try a prompt</h2>
<form id="try">
<p><label>Model <select id="model" required></select></label></p>
<label for="prompt">Prompt</label>
<textarea id="prompt" rows="3" required>Why is the sky blue? Answer in two sentences.</textarea>
<button id="send">Send</button> <button id="stop" type="button" disabled>Stop</button>
<small>Ctrl+Enter sends. Gemini's price applies.</small>
</form>
<details open><summary>Thoughts</summary><pre id="thoughts"></pre></details>
<pre id="answer" role="log" aria-label="Answer"></pre><p id="usage" role="status"></p>
<h2>Point your client here</h2>
<p id="key"></p><dl id="clients"></dl>
<h2>Models</h2>
<ul id="going" class="bad"></ul><p id="aliases"></p><p id="models"></p>
</main><script nonce="NONCE">
const byId = (id) => document.getElementById(id);
const base = (location.origin + location.pathname).replace(/\/+$/, "");  // of this server
const keys = [...byId("keys").elements].filter((input) => input.name);

// Strings become text nodes: nothing that a client or a model wrote can be markup.
const put = (id, ...children) => byId(id).replaceChildren(...children);
const make = (tag, fields, ...children) => {
  const node = Object.assign(document.createElement(tag), fields);
  node.append(...children);
  return node;
};

async function attempt(id, action) {
  try {
    await action();
  } catch (error) {
    put(id, make("span", {className: "bad"}, error.message));
  }
}

async function ask(path, options) {
  const headers = {"content-type": "application/json"};
  for (const {name} of keys) headers[name] = sessionStorage.getItem(name) ?? "";
  const answer = await fetch(base + path, {...options, headers});
  if (answer.ok) return answer;
  if (answer.status === 401 && path === "/status") askForKeys();
  const {error} = await answer.json();
  throw new Error(`${answer.status}: ${error.message ?? error}`);
}

function askForKeys() {
  byId("keys").hidden = !keys.length;
  keys[0]?.select();
}
byId("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  for (const {name, value} of keys) sessionStorage.setItem(name, value);
  byId("keys").hidden = true;
  begin();
});
byId("forget").addEventListener("click", () => { sessionStorage.clear(); location.reload(); });

function draw(id, numbers) {
  const most = Math.max(...numbers), sum = numbers.reduce((a, b) => a + b);
  const bars = numbers.map((n) => 100 * n / (most || 1)).map((n, i) => `M${i} 100v${-n}h.8v${n}z`);
  byId(id).querySelector("path").setAttribute("d", bars.join(""));
  byId(id).querySelector("figcaption").textContent =
    `${sum.toLocaleString()} ${id}, at most ${most.toLocaleString()} a minute`;
}

const seconds = (number) => number.toFixed(number < 10 ? 2 : 0) + " s";
function show({api, backend, version, workers, minutes, requests, retirements, ...rest}) {
  put("about", api === "ollama" ? "Ollama is running, as " : "This is ", `api ${api} at `,
    `${base}, answered by ${backend}. Version ${version}, workers: ${workers}.`);
  ["requests", "tokens"].forEach((id, i) => draw(id, minutes.map((sums) => sums[i])));
  if (!byId("clients").firstChild) showClients(rest);
  put("going", ...retirements.map((text) => make("li", {}, text)));
  const table = JSON.stringify(requests);
  if (byId("rows").dataset.shown === table) return;  // a selection in it stays
  byId("rows").dataset.shown = table;
  put("rows", ...requests.map((request) => {
    const {time, route, model, answered_by, prompt, output, first_byte, total, status} = request;
    const models = [...new Set([model, answered_by])].filter(Boolean).join(", by ");
    const cells = [new Date(time * 1000).toLocaleTimeString(), route, models, prompt, output,
      seconds(first_byte), seconds(total)];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)),
      make("td", {className: status < 400 ? "good" : "bad"}, status));
  }));
}

function showClients({clients, other_clients: others, aliases, client_key: key}) {
  const name = location.hostname, port = location.port || {"http:": 80}[location.protocol] || 443;
  const host = /^(localhost|127\..*|\[::1\])$/.test(name) ? "HOST" : name;
  const place = {url: base, address: `${name}:${port}`, host, port};
  put("key", `As its API key, a client sends ${key}. `, others.length ?
    `With -api=ollama also: ${others.join(", ")}.` : "");
  put("aliases", ...aliases.map((alias) => make("code", {}, alias)).flatMap((code) => [code, " "]));
  put("clients", ...clients.flatMap(([client, line]) => {
    const filled = line.replace(/\{(\w+)\}/g, (braces, word) => place[word] ?? braces);
    const parts = filled.split("`").map((part, i) => i % 2 ? make("code", {}, part) : part);
    const button = make("button", {ariaLabel: "Copy the line for " + client}, "Copy");
    button.addEventListener("click", () => {
      getSelection().selectAllChildren(parts[1]);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    });
    return [make("dt", {}, client), make("dd", {}, ...parts, ...parts[1] ? [button] : [])];
  }));
}

async function poll() {
  await attempt("problem", async () => {
    if (!document.hidden) show(await (await ask("/status")).json());
    put("problem");
  });
  if (byId("keys").hidden) setTimeout(poll, 5000);
}

async function begin() {
  await poll();
  if (!byId("keys").hidden) return;
  byId("forget").hidden = !keys.length;
  await attempt("models", async () => {
    const names = (await (await ask("/v1/models")).json()).data.map((model) => model.id);
    put("models", names.join(", "));
    put("model", ...names.map((name) => new Option(name)));
    byId("model").value = names.find((name) => /flash-latest/.test(name)) ?? names[0];
  });
}
if (keys.every(({name}) => sessionStorage.getItem(name))) begin();
else askForKeys();

byId("check").addEventListener("click", async () => {
  byId("check").disabled = true;
  put("results", make("li", {}, "Checking ..."));
  await attempt("results", async () => {
    const results = await (await ask("/checks", {method: "POST"})).json();
    put("results", ...results.map(({name, works, text, mend}) => make("li", {},
      make("b", {className: works ? "good" : "bad"}, works ? "ok" : "fails"),
      ` ${name}: ${text} `, mend && `Mend: ${mend}.`)));
  });
  byId("check").disabled = false;
});

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function stream(body, signal) {
  const began = performance.now(), time = () => seconds((performance.now() - began) / 1000);
  const options = {method: "POST", body: JSON.stringify(body), signal};
  const answer = await ask("/v1/chat/completions", options), first = time();
  let finish = "";
  for await (const {choices: [choice] = [], usage, error} of events(answer)) {
    if (error) throw new Error(error.message);
    const {content, images, reasoning, reasoning_content: thought} = choice?.delta ?? {};
    finish = choice?.finish_reason ?? finish;
    byId("thoughts").append(thought ?? reasoning ?? "");
    byId("answer").append(content ?? "",
      ...(images ?? []).map((image) => make("img", {src: image.image_url.url, alt: "An image"})));
    if (usage) put("usage", `${usage.prompt_tokens} tokens in, ${usage.completion_tokens} out, ` +
      `${usage.completion_tokens_details.reasoning_tokens} of these thoughts; ${first} to the ` +
      `first byte, ${time()} in all; finish: ${finish}; by ${answer.headers.get("x-proxy-model")}`);
  }
}

byId("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = {model: byId("model").value, stream: true, stream_options: {include_usage: true},
    messages: [{role: "user", content: byId("prompt").value}],
    google: {thinking_config: {include_thoughts: true}}};
  const call = new AbortController();
  byId("stop").onclick = () => call.abort(new Error("Stopped."));
  byId("stop").disabled = !(byId("send").disabled = true);
  ["thoughts", "answer"].forEach((id) => put(id));
  put("usage", "Waiting ...");
  await attempt("usage", () => stream(body, call.signal));
  byId("stop").disabled = !(byId("send").disabled = false);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.ctrlKey && event.key === "Enter") byId("try").requestSubmit(byId("send"));
});
</script></body></html>
"""
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def accepts_page(accept: str) -> bool:
    """Whether a browser asks. Java's HttpURLConnection says so too unless it is told otherwise."""
    return "text/html" in accept and not accept.startswith("text/html, image/gif, image/jpeg")


def page_for_people(config: Config) -> tuple[int, Payload, Mapping[str, str]]:
    """(status, page, headers) for a browser. It has fields for the keys that it will need."""
    nonce, fields = secrets.token_urlsafe(16), ""
    if config.proxy_key:
        fields += KEY_FIELD.format("Key of this server (<code>PROXY_API_KEY</code>)", "x-api-key")
    if config.client_keys:
        fields += KEY_FIELD.format("Your Gemini key", "x-goog-api-key")
    page = PAGE.replace("NONCE", nonce).replace("FIELDS", fields)
    headers = {
        **NOT_STORED,
        "Content-Security-Policy": PAGE_POLICY.replace("NONCE", nonce),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept",
    }
    return 200, Payload(page.encode(), "text/html; charset=utf-8"), headers


# ---- the server ----

BUSY_CONNECTIONS = 8  # from so many on, all threads stay on one core


class Cores:
    """Keeps the threads of a busy process on one core, where the system lets it choose (Linux).

    They take turns with the interpreter's lock. On one core a turn is a switch; over several, it
    wakes a core whose caches know nothing of it: that took a third of the rate of 64 calls at once.
    Nor does a thread that wakes up interrupt another there (SCHED_BATCH in sched(7)), which would
    only hold the lock for longer: that was a tenth of the time for a thousand streams.
    A process with few clients gains nothing by it, and may move to a core that is free.
    """

    def __init__(self) -> None:
        self.worker: int | None = None
        self.together = False
        self.allowed: list[int] = []  # cores; empty if there is no choice
        self.usual = False  # whether the policy of its threads is the usual one, and may change
        able = sys.platform == "linux" and hasattr(os, "sched_setaffinity")  # which PyPy lacks
        if able and "t" not in sys.abiflags:  # which has no such lock: PEP 703
            with contextlib.suppress(OSError):  # system calls are filtered
                self.allowed = sorted(os.sched_getaffinity(0))
                self.usual = os.sched_getscheduler(0) == os.SCHED_OTHER

    def settle(self, connections: int) -> None:
        """Bring all threads to one core, or let them go, as there are many connections or few."""
        together = connections >= BUSY_CONNECTIONS
        if together == self.together or not self.allowed:
            return
        self.together = together
        with contextlib.suppress(OSError):  # there is no /proc
            cores, policy = set(self.allowed), os.SCHED_OTHER
            if together:
                cores, policy = {self.chosen()}, os.SCHED_BATCH
            for thread in map(int, os.listdir("/proc/self/task")):
                with contextlib.suppress(OSError):  # it has just ended, or it may not choose
                    os.sched_setaffinity(thread, cores)
                    if self.usual:
                        os.sched_setscheduler(thread, policy, os.sched_param(0))

    def chosen(self) -> int:
        """The core on which this thread runs; a worker's is that of its number."""
        if self.worker is not None:
            return self.allowed[self.worker % len(self.allowed)]
        with open("/proc/thread-self/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # man 5 proc_pid_stat: the third, ...
        return int(fields[39 - 3])


class Server(http.server.ThreadingHTTPServer):
    """Accepts clients, and gives each connection a thread."""

    daemon_threads = True
    request_queue_size = 1024
    # On Windows it would let a second program listen on the same port.
    allow_reuse_address = sys.platform != "win32"
    # Sockets whose peers are closed when the server ends: for new requests, for answers.
    ending: socket.socket
    stopping: socket.socket

    def __init__(self, config: Config, handed_over: socket.socket | None = None):
        """`handed_over` is a socket that listens already, and may go on with other processes."""
        # A client and its call need two files.
        self.max_connections = min(MAX_CONNECTIONS, max(8, open_files_limit() // 2 - 16))
        self.config, self.shared = config, handed_over is not None
        routes = [route.name for _, protocol in MOUNTS[config.api] for route in protocol.routes]
        pages = [f"{method} {path}" for path, method in OWN_PAGES.items()]
        self.metrics = Metrics([*dict.fromkeys(routes), *pages], config.workers)
        self.recent, self.own_routes = Recent(config.workers), set(pages)
        self.gemini = Gemini(config.backend, config.state, self.metrics.add)
        self.recorder: Recorder | None = None
        if config.record:
            self.recorder = Recorder(config.record, config.workers, self.metrics.add)
        self.context = Context(config.aliases)  # of all requests
        if config.api == "ollama":
            aliases = tuple((plain_name(name, True), *models) for name, *models in config.aliases)
            self.context = Context(aliases, ollama=True)
        self.loaded: dict[tuple[str, str], float] = {}  # by the prefix of a Shelf, and the name
        self.connections: dict[socket.socket, Handler | None] = {}  # None: it has not begun yet
        self.draining, self.tidied = False, -math.inf
        self.cores = Cores()
        self.listen(handed_over)
        self.host = str(self.server_address[0])
        self.loopback = self.host == "::1" or self.host.startswith("127.")

    def listen(self, handed_over: socket.socket | None) -> None:
        """Listen where the configuration says, or on a socket that does so already."""
        host, port = self.config.listen
        if handed_over is not None:
            self.address_family = handed_over.family
        elif ":" in host or not host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host or "::", port), Handler, bind_and_activate=not self.shared)
        except OSError as error:
            if host or self.shared or error.errno == errno.EADDRINUSE:
                raise
            self.address_family = socket.AF_INET  # a machine without IPv6
            super().__init__(("0.0.0.0", port), Handler)
        if handed_over is not None:
            self.socket.close()
            self.socket, self.server_address = handed_over, handed_over.getsockname()
        self.server_port = self.server_address[1]
        self.socket.setblocking(False)  # another worker may be faster to accept

    def server_bind(self) -> None:
        """Bind without http.server's reverse look-up of the host, which can take half a minute."""
        if sys.platform == "win32":  # or another program could take the port away
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6 and not self.config.listen[0]:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def shelf(self, key: str) -> Shelf:
        """What is stored for the users of this Gemini key. With -client-keys, each has its own."""
        prefix = f"{scope_of(key)}:" if self.config.client_keys else ""
        return Shelf(self.gemini.memory, prefix)

    def load(self, key: str, name: str, seconds: float) -> None:
        """List a model as loaded for so long; none at all takes it out, whatever its spelling."""
        prefix = self.shelf(key).prefix
        for other in self.loaded_by(key):
            if plain_name(other, True) == plain_name(name, True):
                self.loaded.pop((prefix, other), None)
        if seconds > 0:
            self.loaded[prefix, name] = time.time() + seconds
        for oldest in list(self.loaded)[:-MAX_LOADED_MODELS]:
            self.loaded.pop(oldest, None)

    def loaded_by(self, key: str) -> dict[str, float]:
        """The models that users of this Gemini key have loaded, and until when."""
        own = self.shelf(key).prefix
        models = list(self.loaded.items())  # a copy: other threads change it too
        return {name: until for (prefix, name), until in models if prefix == own}

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}"

    def state_for(self, key: str) -> JSON:
        """What the page for people shows. With -client-keys, each sees the requests of its own."""
        config, requests, client_key = self.config, self.recent.requests(), "anything"
        served, retirements = ("either", config.api), list(self.gemini.retirements.models.items())
        source = " (as one of the workers saw it)" if config.workers > 1 else ""
        if config.proxy_key:
            client_key = "the value of PROXY_API_KEY"
        if config.client_keys:
            client_key = "its user's own Gemini key"
            requests = [request for request in requests if request.scope == scope_of(key)]
            models = {name for row in requests for name in re.findall("[^:; ]+", row.answered_by)}
            retirements = [item for item in retirements if item[0] in models]
        return {
            "version": VERSION,
            "api": config.api,
            "backend": str(config.backend),
            "workers": config.workers,
            "aliases": [f"{name}={','.join(models)}" for name, *models in config.aliases],
            "client_key": client_key,
            "clients": [(name, line) for name, api, line in CLIENTS if api in served],
            "other_clients": [name for name, api, _ in CLIENTS if api not in served],
            "retirements": [f"{words}{source}" for _, (_, words) in retirements],
            "minutes": self.recent.sums(time.time()),
            "requests": [request.entry() for request in requests[:RECENT_REQUESTS]],
        }

    def run(self, signals: Signals) -> None:
        """Accept clients until a signal says stop; then let what is under way end."""
        self.ending, end = socket.socketpair()
        self.stopping, stop = socket.socketpair()
        poller = Poller(signals.woken)
        if self.recorder:
            self.recorder.start()
        while not signals.should_stop():
            signals.ping_watchdog()
            event, seconds = READABLE, signals.poll_seconds
            if len(self.connections) >= self.max_connections:
                event, seconds = 0, FULL_PAUSE_SECONDS
            poller.watch(self.socket, event)
            for fd in poller.wait(seconds):
                if fd == signals.woken.fileno():
                    signals.clear_woken()
                else:
                    self.accept_pending()
            if signals.take("SIGHUP"):
                self.reload()
            self.cores.settle(len(self.connections))
            self.service_actions()
        self.cores.settle(0)
        signals.notify("STOPPING=1")
        self.drain(end, stop)
        self.ending.close()
        self.stopping.close()
        self.gemini.close()
        if self.recorder:
            self.recorder.close()
        write_waiting_lines()

    def drain(self, end: socket.socket, stop: socket.socket) -> None:
        """Go on while connections are used again; then give answers DRAIN_SECONDS to end.

        A connection that is closed as its next request comes in loses that request. So each gets an
        answer that says it is the last one, before idle connections are closed.
        """
        self.draining, deadline = True, time.monotonic() + DRAIN_NOTICE_SECONDS
        poller = Poller(self.socket)
        while self.connections and time.monotonic() < deadline:
            if poller.wait(0.01):
                self.accept_pending()
        deadline += FINAL_SECONDS  # for clients that come back at once after each answer
        while not self.shared and time.monotonic() < deadline and poller.wait(0):
            self.accept_pending()
        self.server_close()
        end.close()
        self.wait_for_handlers(FINAL_SECONDS, lambda handler: handler.client.is_sending())
        self.wait_for_handlers(DRAIN_SECONDS, lambda handler: handler.in_flight)
        stop.close()
        self.wait_for_handlers(FINAL_SECONDS, lambda handler: handler.in_flight)

    def wait_for_handlers(self, seconds: float, busy: Callable[[Handler], bool]) -> None:
        """Wait until no handler is busy, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            handlers = list(self.connections.values())
            if not any(handler is None or busy(handler) for handler in handlers):
                return
            time.sleep(0.01)

    def reload(self) -> None:
        """Read the Gemini key again, or the credential."""
        try:
            config = with_backend(self.config, os.environ)
        except CredentialError as error:
            log(f"{error}; the old credential stays")
            return
        if not config.key:
            log("there is no Gemini key; the old one stays")
            return
        self.config = config
        self.gemini.use(config.backend)
        log(f"what opens {config.backend.name} was read again")

    def reload_instead_of(self, refused: str) -> None:
        """Read the key's file again when Gemini refuses the key: Windows has no SIGHUP."""
        if self.config.backend.name != GEMINI_API.name:  # its tokens are renewed anyway
            return
        if refused == self.config.key and gemini_key(os.environ) not in ("", refused):
            self.reload()

    def accept_pending(self) -> None:
        """Accept clients that wait, several at a time: a thousand may come at once. They wake all
        workers, of which one that has fewer clients gets a moment to be the first."""
        if self.metrics.leads("clients"):
            time.sleep(YIELD_SECONDS)
        for _ in range(ACCEPT_BATCH):
            try:
                client, address = self.get_request()
            except OSError:
                return
            self.connections[client] = None
            self.metrics.add("clients")
            try:
                self.process_request(client, address)
            except RuntimeError as error:  # there can be no more threads
                log(f"a client is turned away: {error}")
                self.shutdown_request(client)
            if self.metrics.leads("clients"):
                return

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.gemini.pool.drop_oldest()
                time.sleep(FULL_PAUSE_SECONDS)  # the client stays in the queue
            raise

    def shutdown_request(self, request: Any) -> None:
        self.connections.pop(request, None)
        self.metrics.add("clients", amount=-1)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log(f"{BUG}: {traceback.format_exc()}")

    def service_actions(self) -> None:
        """Share the last requests; every few seconds, give back what is not needed any more."""
        self.recent.share()
        write_waiting_lines()
        if time.monotonic() - self.tidied > TIDY_SECONDS:
            self.tidied = time.monotonic()
            self.gemini.pool.tidy()
            self.update_gauges()
            malloc_trim()(0)

    def update_gauges(self) -> None:
        """Measure what there is just now."""
        handlers = list(filter(None, self.connections.values()))
        self.metrics.set("in_flight", sum(handler.in_flight for handler in handlers))
        self.metrics.set("upstream_idle_connections", len(self.gemini.pool.idle))


def open_files_limit() -> int:
    """How many files this process may have open. Windows does not count sockets among them."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@functools.lru_cache(maxsize=1)
def malloc_trim() -> Callable[[int], int]:
    """glibc's function that gives free memory back to the system, which it would keep for ever
    after the start and each large image. Elsewhere it does nothing."""
    if sys.platform != "linux":
        return int
    import ctypes

    return getattr(ctypes.CDLL(None), "malloc_trim", int)


# ======================================================================================
# 18. Command line: flags, environment, systemd, workers, checks, start and end
# ======================================================================================

NO_KEY = """\
proxy-to-gemini: there is no Gemini key. Get one at https://aistudio.google.com/apikey (free), then:

    {}
"""
WITH_KEY = {"win32": "setx GEMINI_API_KEY <your key>, and start it in a new console"}


class Config(NamedTuple):
    """What the command line and the environment decide; flags under their own names."""

    api: str
    listen: tuple[str, int]  # an empty host is every interface
    backend: Backend = GEMINI_API
    key: str = ""  # Gemini's; where an account pays, what tells it from others
    aliases: tuple[tuple[str, ...], ...] = ()  # (name or glob, Gemini's model, further ones)
    origins: tuple[str, ...] = ()
    timeout: float = 600.0  # seconds that Gemini may be silent
    proxy_key: str = ""  # what clients must send
    workers: int = 1  # processes
    state: str = ":memory:"  # the file with signatures and responses, as SQLite names it
    client_keys: bool = False  # whether each client brings its own Gemini key
    record: str = ""  # the folder for recordings
    upstream: str | None = None  # what the flags say of the back end: its URL,
    vertex: tuple[str, str] | None = None  # project and location for Vertex AI,
    token_command: str | None = None  # and what prints an access token


def listen_address(text: str) -> tuple[str, int]:
    """("127.0.0.1", 5555) from HOST:PORT, :PORT or [::1]:PORT; argparse prints the error."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*):(\d{1,5})", text)
    if not match or int(match.group(2)) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return match.group(1).strip("[]"), int(match.group(2))


def base_url(text: str) -> str:
    """The URL of a server, without a slash at its end. A password in it would end in logs."""
    with contextlib.suppress(ValueError):  # of a port that is not a number
        url = urllib.parse.urlsplit(text)
        if "@" in url.netloc:
            raise argparse.ArgumentTypeError("a URL with a user name or a password is not taken")
        plain = re.fullmatch(r"https?://[!-~]+", text, re.I) and not re.search(r"[?#]", text)
        if plain and url.hostname and url.port != 0:
            return text.rstrip("/")
    raise argparse.ArgumentTypeError(f"{text!r} is not the URL of a server")


def proxy_key(env: Mapping[str, str]) -> str:
    """The key that clients must send, "" for none; exits with 1 if it would lock nobody out."""
    key = env.get("PROXY_API_KEY")
    if key is not None and not re.fullmatch(KEY_PATTERN, key.strip()):
        problem = "is empty, or has characters that cannot be sent; unset it, or give it a value."
        sys.exit(f"proxy-to-gemini: PROXY_API_KEY {problem}")
    return (key or "").strip()


def parse_alias(text: str) -> tuple[str, ...]:
    """("gpt-*", "gemini-3.8-flash", "gemini-2.5-flash") from NAME=MODEL,MODEL."""
    name, _, models = text.partition("=")
    names = [re.sub("^models/", "", model.strip()) for model in models.split(",")]
    if not name or not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL or NAME=MODEL,MODEL...")
    return (name, *dict.fromkeys(names))


def parse_origins(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (item.strip(" /") for item in text.split(","))))


def parse_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e7:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


CPU_SHARE_FILE = "/sys/fs/cgroup/cpu.max"  # docs.kernel.org/admin-guide/cgroup-v2.html


def usable_cores() -> int:
    """How many cores this process may use: those it may run on, and its share of their time."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
        with open(CPU_SHARE_FILE, encoding="ascii") as file:
            quota, period = map(int, file.read().split())
        cores = min(cores, math.ceil(quota / period))
    return cores


def worker_count(text: str) -> int:
    if text == "auto":
        return usable_cores() if hasattr(os, "fork") else 1
    if not re.fullmatch(r"[1-9]\d{0,2}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


PROJECT = r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,29}|[0-9]{1,20}"
LOCATION = "[a-z]+(-[a-z]+[0-9]+)?"  # it becomes part of a host name


def vertex_place(text: str) -> tuple[str, str]:
    """("my-project", "europe-west4") from PROJECT/LOCATION, or ("my-project", "")."""
    match = re.fullmatch(f"({PROJECT})(/({LOCATION}))?", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not PROJECT or PROJECT/LOCATION")
    project, _, location = text.partition("/")
    return project, location


def command_line(text: str) -> str:
    """A command, which can be split into words."""
    import shlex

    try:
        if shlex.split(text) or sys.platform == "win32":  # which splits it itself
            return text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is no command: {error}") from None
    raise argparse.ArgumentTypeError("it is no command")


def flag_parser() -> argparse.ArgumentParser:
    """The flags, spelt as Go does (-api=ollama), or with two dashes."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("proxy_to_gemini.py", description=about, allow_abbrev=False)

    def flag(name: str, text: str, **options: Any) -> None:
        parser.add_argument("-" + name, "--" + name, help=text, **options)

    flag("api", "the protocol to serve", choices=sorted(MOUNTS), default="openai")
    address = {"type": listen_address, "default": ("127.0.0.1", 5555), "metavar": "HOST:PORT"}
    flag("listen", ":PORT is every interface", **address)
    text = f"base URL of the Gemini API; {DEFAULT_UPSTREAM} unless $GOOGLE_GEMINI_BASE_URL is set"
    text += " (of Vertex AI: the location's server, $GOOGLE_VERTEX_BASE_URL)"
    flag("upstream", text, type=base_url, metavar="URL")
    place = {"type": vertex_place, "metavar": "PROJECT[/LOCATION]"}
    flag("vertex", "Vertex AI answers, with Google Cloud credentials", **place)
    text = "prints an access token for Vertex AI"
    flag("token-command", text, type=command_line, metavar="COMMAND")
    text = "another name for a model (the next ones are for when it cannot answer); NAME may be "
    more = {"action": "append", "default": [], "metavar": "NAME=MODEL[,MODEL...]"}
    flag("alias", f"{text}a glob; repeatable", type=parse_alias, **more)
    text = "browser origins that may call besides this machine's and apps'; * is any"
    flag("origins", text, type=parse_origins, default="", metavar="ORIGIN,...")
    text = "how long Gemini may be silent"
    flag("timeout", text, type=parse_seconds, default=600.0, metavar="SECONDS")
    flag("workers", "processes that share the port", type=worker_count, default=1, metavar="N|auto")
    flag("state", "keeps signatures and responses over a restart", metavar="FILE")
    text = "keeps what passes, without secrets, one file an exchange"
    flag("record", text, default="", metavar="DIR")
    switch = {"action": "store_true"}
    flag("client-keys", "every client brings its own Gemini key as its API key", **switch)
    flag("check", "tell what works on the way to Gemini, and what to mend", **switch)
    flag("print-unit", "print a systemd unit for this file and these flags", **switch)
    flag("version", "version, and the SHA-256 of this file", **switch)
    return parser


def refuse_what_the_system_lacks(flags: argparse.Namespace) -> None:
    """Exit with 2 if a flag needs what there is on Linux alone, or on all systems but Windows."""
    if flags.workers > 1 and not hasattr(os, "fork"):
        flag_parser().error(f"-workers={flags.workers}: {sys.platform} has no fork; use one")
    if flags.print_unit and sys.platform != "linux":
        flag_parser().error(f"-print-unit: {sys.platform} has no systemd; see the README")


def gemini_key(env: Mapping[str, str]) -> str:
    """The key from the environment or from systemd's credentials; "" where there is none."""
    key = env.get("GEMINI_API_KEY", "").strip() or env.get("GOOGLE_API_KEY", "").strip()
    if key:
        return key
    with contextlib.suppress(OSError, KeyError, UnicodeDecodeError):
        path = os.path.join(env["CREDENTIALS_DIRECTORY"], "gemini_api_key")
        return edited_text(path).strip()
    return ""


def edited_text(path: str) -> str:
    """The text of a file that a person made: PowerShell's > writes UTF-16, Notepad a BOM."""
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def uses_vertex(vertex: tuple[str, str] | None, env: Mapping[str, str]) -> bool:
    """Whether the flags or the environment want Vertex AI. As in Google's SDK, a project in the
    environment is no such wish, and the first of these variables decides."""
    names = ("GOOGLE_GENAI_USE_ENTERPRISE", "GOOGLE_GENAI_USE_VERTEXAI")
    words = [env.get(name, "").strip().lower() for name in names]
    return vertex is not None or next(filter(None, words), "") in ("true", "1")


def credential_path(env: Mapping[str, str]) -> str:
    """The file with a credential: the first that is there of those that Google's libraries know,
    and of systemd's; "" where there is none."""
    path = env.get("GOOGLE_APPLICATION_CREDENTIALS", "").strip()
    if path:
        return path
    home = env.get("APPDATA") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".config")
    gcloud = env.get("CLOUDSDK_CONFIG", "") or os.path.join(home, "gcloud")
    paths = [os.path.join(gcloud, "application_default_credentials.json")]
    if "CREDENTIALS_DIRECTORY" in env:
        paths.insert(0, os.path.join(env["CREDENTIALS_DIRECTORY"], "google_credentials"))
    return next(filter(os.path.exists, paths), "")


def google_credential(command: str | None, env: Mapping[str, str]) -> Credential:
    """The credential for Vertex AI; a CredentialError where there is none that can be used."""
    path = credential_path(env)
    if command:
        credential = Credential("token command", {"command": command}, "-token-command")
    elif path:
        try:
            credential = read_credential(parsed_object(edited_text(path)), path)
        except (OSError, ValueError) as error:
            message = f"the credential in {path} cannot be used: {reason_of(error)}"
            raise CredentialError(message) from None
    else:
        credential = metadata_credential(env)
    quota = env.get("GOOGLE_CLOUD_QUOTA_PROJECT", "").strip() or credential.text("quota_project_id")
    if not re.fullmatch("[a-z0-9.:-]*", quota):
        raise CredentialError(f"the quota project {quota!r:.60} is no name of a project")
    fields = {**credential.fields, **given(quota_project_id=quota)}
    return credential._replace(fields=fields)


def metadata_page(url: str, page: str) -> str:
    """A page of the metadata server's, "" where it has none."""
    try:
        return token_answer(metadata_step(url, page)).strip()
    except UnreachableError:
        raise
    except ProxyError:
        return ""


def metadata_credential(env: Mapping[str, str]) -> Credential:
    """The account of this machine at Google, whose metadata server tells it."""
    known = ("metadata.google.internal", env.get("GCE_METADATA_IP") or "169.254.169.254")
    named = env.get("GCE_METADATA_HOST") or env.get("GCE_METADATA_ROOT")
    hosts = [named] if named else [*known]
    if env.get("NO_GCE_CHECK", "").strip().lower() == "true":
        hosts = []
    for url in (f"http://{host}" for host in hosts):
        with contextlib.suppress(UnreachableError):
            project = metadata_page(url, "project/project-id")
            account = metadata_page(url, SERVICE_ACCOUNT + "email")
            if project or account:
                fields = {"url": url, "account": account, "project_id": project}
                return Credential("metadata server", fields, url)
    advice = f"set GOOGLE_APPLICATION_CREDENTIALS to a file, or run: {LOGIN}"
    raise CredentialError(f"there is no credential for Vertex AI: {advice}")


# By location: google/genai/_api_client.py
VERTEX_HOSTS = {"global": "aiplatform", "us": "aiplatform.us.rep", "eu": "aiplatform.eu.rep"}


def vertex_backend(config: Config, env: Mapping[str, str]) -> tuple[str, Backend]:
    """(what stands for a key, Vertex AI) as flags and environment have it, or a CredentialError."""
    project, location = config.vertex or ("", "")
    project = project or env.get("GOOGLE_CLOUD_PROJECT", "").strip()
    location = location or env.get("GOOGLE_CLOUD_LOCATION", "").strip()
    key = env.get("GOOGLE_API_KEY", "").strip()
    if key and not (project or location or config.token_command):
        return key, VERTEX
    credential = google_credential(config.token_command, env)
    project = project or credential.text("project_id") or credential.text("quota_project_id")
    location = location or "global"
    if not project:
        raise CredentialError("there is no project: use -vertex, or set GOOGLE_CLOUD_PROJECT")
    if not re.fullmatch(PROJECT, project, re.ASCII):
        raise CredentialError(f"the project {project!r:.60} is no name of one")
    if not re.fullmatch(LOCATION, location, re.ASCII):
        raise CredentialError(f"the location {location!r:.60} is no name of one")
    url = f"https://{VERTEX_HOSTS.get(location, location + '-aiplatform')}.googleapis.com"
    backend = VERTEX._replace(url=url, project=project, location=location, credential=credential)
    payer = credential.account or credential.text("refresh_token")  # while tokens come and go
    return f"{project} {credential.kind} {payer}", backend


def with_backend(config: Config, env: Mapping[str, str]) -> Config:
    """The configuration with the key and the back end that flags and environment choose; a
    CredentialError where these cannot be used. Exits with 2 if the URL is wrong."""
    key, backend = gemini_key(env), GEMINI_API
    if uses_vertex(config.vertex, env):
        key, backend = vertex_backend(config, env)
    if key and not backend.credential and not re.fullmatch(KEY_PATTERN, key):
        names = "GEMINI_API_KEY or GOOGLE_API_KEY"
        raise CredentialError(f"the key in {names} has characters that no key has")
    try:
        url = config.upstream or base_url(env.get(backend.url_variable, "").strip() or backend.url)
    except argparse.ArgumentTypeError as error:
        flag_parser().error(f"{backend.url_variable}: {error}")
    return config._replace(key=key, backend=backend._replace(url=url))


def configure(flags: argparse.Namespace, env: Mapping[str, str]) -> Config:
    """The configuration; exits with 2 if flags are wrong, with 1 if there is no usable key."""
    if flags.client_keys and uses_vertex(flags.vertex, env):
        flag_parser().error("with Vertex AI, clients have no keys of their own (-client-keys)")
    if flags.token_command and not uses_vertex(flags.vertex, env):
        flag_parser().error("-token-command is for Vertex AI: -vertex=PROJECT")
    folder = env.get("STATE_DIRECTORY", "").partition(":")[0]
    state = flags.state or (folder and os.path.join(folder, "proxy-to-gemini.db")) or ":memory:"
    settings = {name: value for name, value in vars(flags).items() if name in Config._fields}
    settings.update(aliases=tuple(flags.alias), proxy_key=proxy_key(env), state=state)
    try:
        config = with_backend(Config(**settings), env)
    except CredentialError as error:
        sys.exit(f"proxy-to-gemini: {error}")
    if not config.key and not config.client_keys:
        advice = "GEMINI_API_KEY=<your key> python3 proxy_to_gemini.py"
        sys.exit(NO_KEY.format(WITH_KEY.get(sys.platform, advice)))
    return config


# ---- systemd ----

UNIT = """\
[Unit]
Description=proxy-to-gemini: OpenAI's, Ollama's and Anthropic's APIs, answered by Gemini
Documentation=file://{folder}/README.md
Wants=network-online.target
After=network-online.target
[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
TimeoutStopSec=15
WatchdogSec=30
LoadCredential=gemini_api_key:/etc/proxy-to-gemini/gemini_api_key
EnvironmentFile=-/etc/proxy-to-gemini/environment
StateDirectory=proxy-to-gemini
StateDirectoryMode=0700
DynamicUser=yes
MemoryMax=1G
TasksMax=12000
LimitNOFILE=32768
UMask=0077
CapabilityBoundingSet=
AmbientCapabilities=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallFilter=sched_setaffinity sched_setscheduler
SystemCallErrorNumber=EPERM
[Install]
WantedBy=multi-user.target"""


def systemd_unit(arguments: list[str]) -> str:
    """A systemd unit for this very file and these flags, without the final newline."""
    here = own_path()
    flags = [word for word in arguments if word.lstrip("-") != "print-unit"]
    command = " ".join(map(unit_word, [os.path.realpath(sys.executable), here, *flags]))
    text = UNIT.format(folder=os.path.dirname(here), command=command)
    parsed = flag_parser().parse_args(arguments)
    if uses_vertex(parsed.vertex, os.environ):
        text = text.replace("gemini_api_key", "google_credentials")
    if parsed.client_keys or parsed.token_command:
        text = re.sub("\nLoadCredential=.*", "", text)  # without that file it would not start
    if parsed.listen[1] < 1024:
        text = re.sub("((Bounding|Ambient).*=)$", r"\1CAP_NET_BIND_SERVICE", text, flags=re.M)
    return text


def unit_word(word: str) -> str:
    """A word of a command line, quoted as "Command lines" in systemd.service(5) wants it."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[^\s'\";]+", word):
        return word
    return f'"{word}"'


def handed_over_socket(env: Mapping[str, str]) -> socket.socket | None:
    """The socket that systemd listens on for this process (sd_listen_fds(3)), or None."""
    count = env.get("LISTEN_FDS", "")
    if env.get("LISTEN_PID") != str(os.getpid()) or not re.fullmatch(r"[1-9]\d*", count):
        return None
    if count != "1":
        raise ValueError(f"LISTEN_FDS hands over {count} sockets, and one is served")
    sock = socket.socket(fileno=3)
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise ValueError("the socket of LISTEN_FDS is not one for TCP")
    return sock


def watchdog_seconds(env: Mapping[str, str]) -> float:
    """How often systemd wants a ping (sd_watchdog_enabled(3)); infinite if never."""
    usec, own_pid = env.get("WATCHDOG_USEC", ""), str(os.getpid())
    if env.get("WATCHDOG_PID", own_pid) == own_pid and re.fullmatch(r"[1-9]\d{0,15}", usec):
        return int(usec) / 1e6
    return math.inf


# What a user sends with Ctrl-C; on Windows also with Ctrl-Break, or by closing the console.
INTERRUPTS = {"SIGINT", "SIGBREAK"}
STOP_SIGNALS = {"SIGTERM", *INTERRUPTS}


class Signals:
    """The signals that this process receives, and the notifications that it sends to systemd."""

    def __init__(self, env: Mapping[str, str]):
        self.pending: set[str] = set()  # names of those received, and not yet taken
        self.parent = 0  # the process id of a worker's parent, with which it ends
        self.notify_socket = env.get("NOTIFY_SOCKET", "")
        self.watchdog = watchdog_seconds(env)
        self.poll_seconds = min(1.0, self.watchdog / 4)
        self.last_ping = -math.inf
        for name in {"SIGHUP", "SIGCHLD", *STOP_SIGNALS}:
            if hasattr(signal, name):  # Windows has some of them
                signal.signal(getattr(signal, name), self.receive)
        self.open_sockets()
        if sys.platform == "win32":
            self.watch_console()

    def receive(self, number: int, frame: Any = None) -> None:
        """Note a signal. A second interrupt ends the process at once."""
        name = signal.Signals(number).name
        if name in INTERRUPTS and self.pending & INTERRUPTS:
            sys.exit(128 + number)  # as shells have it
        self.pending.add(name)

    def open_sockets(self) -> None:
        """Open the pair of sockets with which a signal wakes this process, and no other."""
        self.woken, self.wake = socket.socketpair()  # Windows' select waits for no pipe
        self.woken.setblocking(False)
        self.wake.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)

    if sys.platform == "win32":

        def watch_console(self) -> None:
            """Let the end of the console, or of the session, be a signal as Ctrl-Break is one.

            Once such a handler returns, Windows ends the process; else after some 5 seconds
            (learn.microsoft.com, "HandlerRoutine callback function").
            """
            import ctypes

            def handle(event: int) -> bool:
                if event > signal.CTRL_BREAK_EVENT:
                    self.pending.add("SIGBREAK")
                    self.wake.send(b"\0")
                    threading.Event().wait()
                return False  # the next handler is Python's, which knows the other two events

            self.console_handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(handle)
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self.console_handler, True)

    def become_worker(self, parent: int) -> None:
        """Go on in a fork: systemd hears from the parent alone."""
        self.parent, self.notify_socket, self.watchdog = parent, "", math.inf
        self.pending.discard("SIGCHLD")
        with self.woken, self.wake:  # the parent has them too
            self.open_sockets()

    def clear_woken(self) -> None:
        """Read what signals wrote into the socket."""
        with contextlib.suppress(BlockingIOError):
            self.woken.recv(4096)

    def take(self, name: str) -> bool:
        """Whether this signal was received since the last call."""
        received = name in self.pending
        self.pending.discard(name)
        return received

    def should_stop(self) -> bool:
        """Whether a signal ends this process, or the end of its parent."""
        orphaned = self.parent != 0 and os.getppid() != self.parent
        return orphaned or bool(self.pending & STOP_SIGNALS)

    def ping_watchdog(self) -> None:
        """Tell systemd that this process is alive, whenever that is due."""
        if time.monotonic() - self.last_ping > self.watchdog / 2.5:
            self.last_ping = time.monotonic()
            self.notify("WATCHDOG=1", wait_seconds=0)  # the next ping is due soon

    def notify(self, *lines: str, wait_seconds: float = 5) -> None:
        """Send these lines to systemd (sd_notify(3)), if it started this process."""
        if not self.notify_socket:
            return
        address = re.sub("^@", "\0", self.notify_socket)  # an abstract address (unix(7))
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(wait_seconds)
            sock.sendto("\n".join(lines).encode(), address)


# ---- workers ----

STATE_FOLDER = "proxy-to-gemini-"  # begins the name of the temporary one that workers share
RESTART_SECONDS = 1.0  # seconds between two starts of the same worker
# Seconds for workers to end by themselves: those of Server.drain (three times FINAL_SECONDS) and of
# Recorder.close, and a little more. systemd's TimeoutStopSec is longer.
WORKER_DRAIN_SECONDS = DRAIN_NOTICE_SECONDS + DRAIN_SECONDS + 5 * FINAL_SECONDS


class Workers:
    """The processes that share the port: forks of this one, which only looks after them."""

    def __init__(self, server: Server, signals: Signals):
        self.server, self.signals = server, signals
        self.running: dict[int, int] = {}  # process id: number of the worker
        self.start_after = [0.0] * server.config.workers  # the earliest time of each next start

    def run(self) -> None:
        """Replace workers that die, until a signal ends them all; kill those that are too slow."""
        poller = Poller(self.signals.woken)
        while not self.signals.should_stop():
            self.signals.ping_watchdog()
            self.start_missing()
            poller.wait(self.signals.poll_seconds)
            self.signals.clear_woken()
            self.touch_state()
            if self.signals.take("SIGHUP"):
                self.server.reload()  # for workers that are forked later
                self.send_signal(signal.SIGHUP)
            self.reap()
        self.signals.notify("STOPPING=1")
        self.server.server_close()  # or the kernel accepts clients that no worker will serve
        self.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + WORKER_DRAIN_SECONDS
        while self.running and time.monotonic() < deadline:
            poller.wait(0.1)
            self.signals.clear_woken()
            self.reap()
        self.send_signal(signal.SIGKILL)

    def touch_state(self) -> None:
        """Show what removes old temporary files that the workers' own folder is in use."""
        state = self.server.config.state
        folder = os.path.dirname(state)
        if os.path.basename(folder).startswith(STATE_FOLDER):
            with contextlib.suppress(OSError):
                os.utime(state)
                os.utime(folder)

    def start_missing(self) -> None:
        """Start every worker that does not run, unless it was started just before."""
        for number, start_after in enumerate(self.start_after):
            due = number not in self.running.values() and time.monotonic() >= start_after
            if due and not self.signals.should_stop():
                self.start_after[number] = time.monotonic() + RESTART_SECONDS
                self.start(number)

    def start(self, number: int) -> None:
        """Fork a worker, whose whole life is spent here."""
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, or no memory: the others go on
            log(f"worker {number} cannot be started: {reason_of(error)}")
            return
        if pid != 0:
            self.running[pid] = number
            return
        try:
            self.signals.become_worker(parent)
            self.server.cores.worker = number
            self.server.metrics.use_row(number)
            self.server.recent.use_part(number)
            self.server.run(self.signals)
            os._exit(0)
        except Exception:
            log(f"a worker has a bug; please report it: {traceback.format_exc()}")
        finally:
            os._exit(1)

    def send_signal(self, number: int) -> None:
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def reap(self) -> None:
        """Forget the workers that have ended, and log those that died."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                number = self.running.pop(pid, None)
                if status and number is not None:
                    log(f"worker {number} died (status {status}); another takes its place")


# ---- checks ----

MAX_MISSING_MODELS = 4  # that are not there, before the check of an answer fails
CHECK_SECONDS = 30.0  # seconds that a call of a check may take
ALL_CHECKS_SECONDS = 60.0  # that all calls of checks may take for the page for people
CHECK_ERRORS = (ProxyError, OSError, ValueError, sqlite3.Error, http.client.HTTPException)
# What to do if something does not work; Backend.checks says in which order each is needed.
CHECKS = {
    "certificates": "see to REQUESTS_CA_BUNDLE, SSL_CERT_FILE and HTTPS_PROXY",
    "port": "end what listens there, or choose another with -listen",
    "memory": "name a writable file with -state, SQLite's or a new one",
    "name": "see to DNS; where the network wants a proxy, set HTTPS_PROXY",
    "connection": "see to the firewall and HTTPS_PROXY; a company's own CA goes into SSL_CERT_FILE",
    "credential": "name another with GOOGLE_APPLICATION_CREDENTIALS",
    "token": "what is said above is the cause; the command in brackets may mend it",
    "key": "get a key at https://aistudio.google.com/apikey, and see what it is restricted to",
    "clock": "set the clock: certificates and quotas go by it",
    "answer": "what Gemini says above is the cause: billing, quota, or a region without service",
}


class CheckResult(NamedTuple):
    """Whether something works."""

    name: str
    works: bool
    text: str  # what was learned, or the cause
    mend: str = ""  # what to do


def check_results(
    config: Config, names: Iterable[str], waiter: Waiter | None = None
) -> Iterator[CheckResult]:
    """Whether each of these CHECKS works, up to the first that does not."""
    name = "certificates"
    try:
        checker = Checker(config, waiter)
        with contextlib.closing(checker.gemini):
            for name in names:
                check: Callable[[], str] = getattr(checker, "check_" + name)
                yield CheckResult(name, True, check())
    except CHECK_ERRORS as error:
        text = f"{config.backend.url}: {reason_of(error)}"
        yield CheckResult(name, False, text, CHECKS[name])


class Checker:
    """A method for each of CHECKS: it returns what it learned in a few words, or raises."""

    def __init__(self, config: Config, waiter: Waiter | None = None):
        self.config, self.gemini = config, Gemini(config.backend)
        self.waiter = waiter or Waiter(None, CHECK_SECONDS)

    def check_port(self) -> str:
        server = Server(self.config, handed_over_socket(os.environ))
        server.server_close()
        if server.shared:
            return f"{server.url} is handed over"
        return f"{server.url} is free"

    def check_memory(self) -> str:
        if self.config.state == ":memory:":
            return "nothing is kept over a restart"
        Memory(self.config.state).try_out()
        return self.config.state

    def check_name(self) -> str:
        pool = self.gemini.pool
        host, port, role = pool.host, pool.port, ""
        if pool.proxy:
            (host, port, _), role = pool.proxy, ", the proxy on the way,"
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        hosts = dict.fromkeys(str(address[0]) for *_, address in addresses)
        return f"{host}:{port}{role} is at " + ", ".join(hosts)

    def check_connection(self) -> str:
        with contextlib.closing(self.gemini.pool.connect(self.waiter)) as connection:
            sock = connection.sock
            if not isinstance(sock, ssl.SSLSocket):
                return f"{self.config.backend.url}, without TLS"
            certificate: JSON = sock.getpeercert() or {}
            issuer = dict(pair for name in certificate["issuer"] for pair in name)
            organization = issuer.get("organizationName") or issuer.get("commonName")
            names = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")  # as in tls_context()
            store = next((f"${name}" for name in names if os.environ.get(name)), "the system")
            trust = f"certificate of {organization}, trusted by {store}"
            return f"{self.config.backend.url}, {sock.version()}, {trust}"

    def check_credential(self) -> str:
        backend, credential = self.config.backend, self.config.backend.credential
        if credential is None:
            return "the API key in GOOGLE_API_KEY, in express mode: no project, no location"
        account = credential.account or "an account that it does not name"
        source = f"{credential.kind} of {account}, from {credential.origin}"
        return f"{source}; project {backend.project}, location {backend.location}"

    def check_token(self) -> str:
        access = self.gemini.access(self.config.key, self.waiter)
        if access.ends == math.inf:
            return "none is needed with an API key"
        return f"there is one, for {access.ends - time.monotonic():.0f} seconds"

    def check_key(self) -> str:
        if not self.config.key:
            return "every client brings its own"
        models = self.gemini.list_models(self.waiter, self.config.key)
        return f"it opens a list of {len(models)} models"

    def check_clock(self) -> str:
        models = GeminiCall(self.config.backend.listing[0])
        call = UpstreamCall(self.gemini, models, self.waiter, self.config.key, [])
        outcome = call.outcome()
        if call.response is None and isinstance(outcome, Exception):
            raise outcome
        date = call.response and email.utils.parsedate_tz(call.response.headers.get("date", ""))
        call.release()
        if not date:
            return "Gemini does not tell the time"
        difference = abs(time.time() - email.utils.mktime_tz(date))
        if difference > 300:
            raise ValueError(f"it is {difference:.0f} seconds off")
        if difference >= 5:
            return f"it is {difference:.0f} seconds off, which does no harm"
        return "it agrees with Gemini's"

    def check_answer(self) -> str:
        if not self.config.key:
            return "every client asks with a key of its own"
        models = self.gemini.list_models(self.waiter, self.config.key)
        missing: list[str] = []  # what is listed, but not in this location
        while True:
            model = newest_flash([entry for entry in models if entry_path(entry) not in missing])
            try:
                return ", ".join([self.hello(model), *(f"{name} is missing" for name in missing)])
            except ProxyError as error:
                if error.code != "model_not_found" or len(missing) == MAX_MISSING_MODELS:
                    raise
            missing.append(model.path)

    def hello(self, model: Model) -> str:
        """What a model says."""
        began, turns = time.monotonic(), [user_turn(text_part("Say hello in one word."))]
        call = generate_call(model, False, [], turns, {})
        answers = self.gemini.ask((call,), self.waiter, self.config.key, [])
        with contextlib.closing(answers):
            (answer,) = next(answers)
        content = get_or_empty(first_candidate(answer), "content", dict)
        text = "".join(part.get("text", "") for part in get_or_empty(content, "parts", list))
        return f"{model.name} said {text[:40]!a} after {time.monotonic() - began:.1f} seconds"


def newest_flash(models: list[JSON]) -> Model:
    """The newest flash model, which is cheap; without one, the newest model that can chat."""
    candidates = [
        model_of(entry_name(entry))
        for entry in models
        if "generateContent" in get_or_empty(entry, "supportedGenerationMethods", list)
    ]
    flash = [model for model in candidates if model.chats and model.cheap]
    return max(flash or candidates, key=lambda model: model.generation)


def run_checks(config: Config) -> int:
    """Do what -check asks for; the exit status, 1 if something does not work."""
    status = 0
    for result in check_results(config, config.backend.checks):
        if result.works:
            print(f"ok    {result.name}: {result.text}", flush=True)
        else:
            print(f"FAIL  {result.name}: {result.text}\n      mend: {result.mend}")
            status = 1
    return status


# ---- start and end ----

# Seconds before a thread must yield; at 0.005, a thousand threads do little else.
SWITCH_INTERVAL_SECONDS = 0.05
# OPEN_MAX: what setrlimit(2) takes there of a process that may have files without limit, or 256.
MACOS_MAX_FILES = 10_240


def raise_limits() -> None:
    """Allow as many open files as the system does: each client needs two. Windows has no limit."""
    with contextlib.suppress(ImportError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = math.inf if hard == resource.RLIM_INFINITY else hard
        for needed in (2 * MAX_CONNECTIONS + 64, MACOS_MAX_FILES):
            with contextlib.suppress(ValueError, OSError):
                files = max(soft, min(needed, allowed))
                resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), hard))
                return


def open_server(config: Config) -> Server:
    """The server, listening; exits with one line if it cannot listen, or not remember."""
    host, port = config.listen
    purpose = f"listen on {host or '*'}:{port}"
    try:
        server = Server(config, handed_over_socket(os.environ))
        purpose = f"remember in {config.state}"
        if config.state != ":memory:":
            server.gemini.memory.try_out()
        purpose = f"record in {config.record}"
        if server.recorder:
            server.recorder.try_out()
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"proxy-to-gemini: cannot {purpose}: {reason_of(error)}")
    return server


def serve(config: Config) -> None:
    """Serve until a signal says stop."""
    signals = Signals(os.environ)
    server = open_server(config)
    if hasattr(gc, "freeze"):  # PyPy has another collector
        gc.freeze()  # what is there by now stays for good, and need not be looked through
        # A look through all the rest stops every stream (145 ms where there are 1,000). It finds
        # next to nothing, as no cycle is to hold a body; so it comes a hundred times as rarely.
        gc.set_threshold(*gc.get_threshold()[:2], 1000)
    address = f"api {config.api} at {server.url}"
    log(f"proxy-to-gemini {VERSION}: {address}, answered by {config.backend}")
    if not server.loopback and not config.proxy_key and not config.client_keys:
        risk = "whoever reaches this port can spend the Gemini key"
        log(f"warning: {risk}; set PROXY_API_KEY, or listen on 127.0.0.1")
    signals.notify("READY=1", f"STATUS={address}")
    if config.workers > 1:
        Workers(server, signals).run()
    else:
        server.run(signals)


@contextlib.contextmanager
def shared_state(config: Config) -> Iterator[Config]:
    """The configuration with a file for what workers share, which goes when they end."""
    if config.workers == 1 or config.state != ":memory:":
        yield config
        return
    import tempfile

    try:
        folder = tempfile.TemporaryDirectory(prefix=STATE_FOLDER)
    except OSError as error:
        sys.exit(f"proxy-to-gemini: workers share a file; name one with -state: {reason_of(error)}")
    with folder as path:
        yield config._replace(state=os.path.join(path, "state.db"))


def own_path() -> str:
    """This file, or the zipapp that it is in."""
    path = os.path.abspath(__file__)
    folder = os.path.dirname(path)
    return folder if os.path.isfile(folder) else path


def open_standard_streams() -> None:
    """Open those that were closed (2>&-): else a client's socket gets their number, and the log.

    What a console cannot show is escaped, and a log that is a full pipe stops nobody.
    """
    number = 0
    while number < 3:
        number = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    os.close(number)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does by itself
    if sys.platform == "win32":
        import ctypes
        import msvcrt

        pipe = msvcrt.get_osfhandle(2)  # whatever it is: of others, this changes nothing
        nowait = ctypes.byref(ctypes.c_ulong(1))  # learn.microsoft.com, "SetNamedPipeHandleState"
        ctypes.windll.kernel32.SetNamedPipeHandleState(pipe, nowait, None, None)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    open_standard_streams()
    flags = flag_parser().parse_args()
    if flags.version:
        with open(own_path(), "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        print(f"proxy-to-gemini {VERSION}, SHA-256 {digest}")
        return
    refuse_what_the_system_lacks(flags)
    if flags.print_unit:
        print(systemd_unit(sys.argv[1:]))
        return
    config = configure(flags, os.environ)
    if flags.check:
        sys.exit(run_checks(config))
    raise_limits()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    with shared_state(config) as complete:
        serve(complete)
    os._exit(0)  # without waiting for threads that serve slow clients


if __name__ == "__main__":
    main()
