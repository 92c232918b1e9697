"""Tests of proxy_to_gemini.py, in the order of its sections; and the stand-in Gemini that they talk to.

    python3 -m pytest -W error test_proxy.py     the tests; they need pytest and no network
    python3 test_proxy.py PORT                   the stand-in alone, to try things without a key
    python3 test_proxy.py -replay FILE PORT      the stand-in plays Gemini's part of a recording

The stand-in is as strict as the real service: it refuses unknown fields, wrong turn order, unsigned
calls, and settings that a model does not take, each with Google's own kind of message.
"""

from __future__ import annotations

import ast
import base64
import collections
import collections.abc
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if __name__ != "__main__":  # the stand-in alone needs neither
    import pytest

    import proxy_to_gemini as proxy
    from proxy_to_gemini import (
        Context,
        End,
        Exchange,
        Fields,
        ProxyError,
        Text,
        ToolCall,
        Usage,
    )

WINDOWS = sys.platform == "win32"

# ======================================================================================
# The stand-in Gemini
# ======================================================================================

ANY = object()  # any JSON
SCHEMA = ANY
BLOB = {"mimeType": ANY, "data": ANY}
PART = {
    "text": ANY,
    "thought": ANY,
    "thoughtSignature": ANY,
    "mediaResolution": {"level": ANY},
    "inlineData": BLOB,
    "fileData": {"fileUri": ANY, "mimeType": ANY},
    "functionCall": {"id": ANY, "name": ANY, "args": ANY},
    "functionResponse": {"id": ANY, "name": ANY, "response": ANY, "parts": [{"inlineData": BLOB}]},
    "toolCall": {"id": ANY, "toolType": ANY, "args": ANY},
    "toolResponse": {"id": ANY, "toolType": ANY, "response": ANY},
}
CONTENT = {"role": ANY, "parts": [PART]}
GENERATE = {
    "contents": [CONTENT],
    "systemInstruction": CONTENT,
    "cachedContent": ANY,
    "continuationToken": ANY,
    "serviceTier": ANY,
    "safetySettings": [{"category": ANY, "threshold": ANY}],
    "tools": [
        {
            "functionDeclarations": [
                {
                    "name": ANY,
                    "description": ANY,
                    "parametersJsonSchema": SCHEMA,
                    "parameters_json_schema": SCHEMA,  # as google-genai spells them
                    "response_json_schema": SCHEMA,
                }
            ],
            "googleSearch": {"searchTypes": ANY, "timeRangeFilter": ANY},
            "codeExecution": {},
            "urlContext": {},
            "googleMaps": {"enableWidget": ANY},
            "mcpServers": [{"name": ANY, "streamableHttpTransport": {"url": ANY, "headers": ANY}}],
        }
    ],
    "toolConfig": {
        "functionCallingConfig": {"mode": ANY, "allowedFunctionNames": ANY},
        "includeServerSideToolInvocations": ANY,
    },
    "generationConfig": {
        **dict.fromkeys(
            (
                "temperature",
                "topP",
                "topK",
                "maxOutputTokens",
                "candidateCount",
                "stopSequences",
                "seed",
                "presencePenalty",
                "frequencyPenalty",
                "responseMimeType",
                "responseJsonSchema",
                "responseModalities",
                "mediaResolution",
            ),
            ANY,
        ),
        "thinkingConfig": {"thinkingBudget": ANY, "thinkingLevel": ANY, "includeThoughts": ANY},
        "imageConfig": {"aspectRatio": ANY, "imageSize": ANY},
        "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": ANY}}},
    },
}
EMBED = {
    "requests": [{"model": ANY, "content": CONTENT, "outputDimensionality": ANY, "taskType": ANY}]
}
COUNT = {"contents": [CONTENT], "generateContentRequest": {"model": ANY, **GENERATE}}
SHAPES = {
    "generateContent": GENERATE,
    "streamGenerateContent": GENERATE,
    "batchEmbedContents": EMBED,
    "countTokens": COUNT,
}


def short_id(value):
    """The name of a parameter; Windows takes none of 32 KB in its environment, where pytest puts it."""
    return repr(value)[:40]


def unknown_field(value, shape, path=""):
    """Google's complaint about the first field that it does not know, or None."""
    if shape is ANY:
        return None
    if isinstance(shape, list):
        return unknown_field_of_items(value, shape[0], path)
    if not isinstance(value, dict):
        return f"Invalid value at '{path}': not an object"
    for key, field in value.items():
        if key not in shape:
            return f"Invalid JSON payload received. Unknown name \"{key}\" at '{path}': Cannot find field."
        complaint = unknown_field(field, shape[key], f"{path}.{key}".lstrip("."))
        if complaint:
            return complaint
    return None


def unknown_field_of_items(value, shape, path):
    if not isinstance(value, list):
        return f"Invalid value at '{path}': not a list"
    complaints = (unknown_field(item, shape, f"{path}[{i}]") for i, item in enumerate(value))
    return next(filter(None, complaints), None)


def generation(model):
    match = re.match(r"gemini-(\d+(?:\.\d+)?)", model)
    return float(match.group(1)) if match else 99.0


def refused_turns(model, contents):
    """Why Gemini would refuse the order of these turns, or None."""
    if not contents:
        return "contents is not specified"
    for i in range(len(contents)):
        complaint = refused_turn(contents, i)
        if complaint:
            return complaint
    if contents[0]["role"] != "user":
        return "Please ensure that the first turn is the user's."
    if contents[-1]["role"] == "model" and (generation(model) >= 3.6 or "3.5-flash-lite" in model):
        return "Requests ending with a model turn are not supported."
    if generation(model) >= 3 and "image" not in model:
        return unsigned_call(contents)
    return None


def refused_turn(contents, i):
    """Why Gemini would refuse the turn at this index, or None."""
    parts = contents[i].get("parts")
    if not parts:
        return f"contents[{i}].parts must not be empty."
    if contents[i].get("role") not in ("user", "model"):
        return "Please use a valid role: user, model."
    calls = [part["functionCall"]["name"] for part in parts if "functionCall" in part]
    if not calls:
        return None
    if i == 0 or contents[i - 1]["role"] != "user":
        return "Please ensure that function call turn comes immediately after a user turn or after a function response turn."
    following = [part for content in contents[i + 1 : i + 2] for part in content["parts"]]
    results = [part["functionResponse"] for part in following if "functionResponse" in part]
    if calls != [result["name"] for result in results]:
        return (
            "Please ensure that the number of function response parts is equal to the number of function call parts "
            "of the function call turn."
        )
    return None


def begins_turn(content):
    """Whether the user speaks here, and not just a function's result."""
    return content["role"] == "user" and not any(
        "functionResponse" in part for part in content["parts"]
    )


def unsigned_call(contents):
    """Gemini 3's complaint about a call in the current turn without its signature, or None."""
    start = max((i for i, content in enumerate(contents) if begins_turn(content)), default=0)
    for content in contents[start:]:
        calls = [part for part in content["parts"] if "functionCall" in part]
        if calls and not calls[0].get("thoughtSignature"):
            return (
                f"Function call is missing a thought_signature in functionCall parts. Additional data, function call "
                f"`default_api:{calls[0]['functionCall']['name']}`."
            )
    return None


def first_broken(*rules):
    """The message of the first rule that is broken, or None."""
    return next((message for broken, message in rules if broken), None)


def refused_settings(model, body):
    """Why Gemini would refuse these settings, or None."""
    config = body.get("generationConfig", {})
    return (
        refused_thinking(model, config.get("thinkingConfig", {}))
        or refused_sampling(model, config)
        or refused_tools(model, body, config)
    )


def refused_thinking(model, thinking):
    version, level = generation(model), thinking.get("thinkingLevel")
    has_level, has_budget = "thinkingLevel" in thinking, "thinkingBudget" in thinking
    return first_broken(
        (
            has_level and has_budget,
            "You can only set only one of thinking budget and thinking level.",
        ),
        (has_level and version < 3, "Thinking level is not supported for this model."),
        (thinking and version < 2.5, "Thinking is not supported for this model."),
        (
            level == "MINIMAL" and (version in (3.7, 3.8, 4) or "pro" in model),
            "Thinking level MINIMAL is not supported for this model.",
        ),
        (
            thinking.get("thinkingBudget") == 0 and "2.5-pro" in model,
            "Budget 0 is invalid. This model only works in thinking mode.",
        ),
    )


def refused_sampling(model, config):
    version, stops = generation(model), config.get("stopSequences", [])
    penalty = config.get("presencePenalty") or config.get("frequencyPenalty")
    json_type = config.get("responseMimeType") == "application/json"
    return first_broken(
        (version >= 2.5 and penalty, "Penalty is not enabled for this model"),
        (
            version >= 3 and config.get("candidateCount", 1) > 1,
            "Multiple candidates is not enabled for this model",
        ),
        (config.get("maxOutputTokens", 1) < 1, "max_output_tokens must be positive."),
        (
            config.get("maxOutputTokens", 1) > (65536 if version >= 2.5 else 8192),
            "Unable to submit request because it has a maxOutputTokens value that is too large.",
        ),
        (not 0 <= config.get("temperature", 0) <= 2, "temperature must be within [0, 2]."),
        (
            not -(2**31) <= config.get("seed", 0) < 2**31,
            "Invalid value at 'generation_config.seed'",
        ),
        (len(stops) > 5 or "" in stops, "Invalid stop sequences."),
        (
            "responseJsonSchema" in config and not json_type,
            "A schema needs a JSON mime type.",
        ),
    )


def refused_tools(model, body, config):
    version, tools = generation(model), body.get("tools", [])
    names = [entry["name"] for tool in tools for entry in tool.get("functionDeclarations", [])]
    server_side = {key for tool in tools for key in tool} - {"functionDeclarations"}
    tool_config = body.get("toolConfig", {})
    mixes = version >= 3 and tool_config.get("includeServerSideToolInvocations")
    calling = tool_config.get("functionCallingConfig", {})
    return first_broken(
        (
            names and config.get("responseMimeType") == "application/json" and version < 3,
            "Function calling with a response mime type: 'application/json' is unsupported",
        ),
        (names and server_side and not mixes, "Tool use with function calling is unsupported"),
        (
            calling and not names,
            "Function calling config is set without function_declarations.",
        ),
        (set(calling.get("allowedFunctionNames", [])) - set(names), "Undeclared function."),
        (len(set(names)) < len(names), "Duplicate function declaration found"),
        (
            any(not re.fullmatch(r"[A-Za-z_][\w.:-]{0,127}", name, re.ASCII) for name in names),
            "Invalid function name.",
        ),
    )


def model_and_verb(path):
    """("gemini-2.5-flash", "generateContent") from the path of a request."""
    model, _, verb = path.partition("?")[0].rpartition("/")[2].partition(":")
    return model, verb


def refusal_of(path, body):
    """The message with which Gemini would refuse this request, or None."""
    model, verb = model_and_verb(path)
    if verb not in SHAPES:
        return None if body is None else f"unknown method {verb}"
    complaint = unknown_field(body, SHAPES[verb])
    if complaint or SHAPES[verb] is not GENERATE:
        return complaint
    return refused_turns(model, body.get("contents", [])) or refused_settings(model, body)


class Say:
    """What the stand-in answers to one request."""

    def __init__(self, *chunks, status=200, raw=None, headers=(), delay=0.0, gap=0.0, cut=None):
        self.chunks, self.status, self.headers = list(chunks), status, list(headers)
        self.raw = raw  # the body, in place of the chunks
        self.delay, self.gap = delay, gap  # seconds before the answer, and after each chunk
        self.cut = cut  # hang up after this many chunks


def chunk(*parts, finish=None, usage=None, **candidate):
    """A chunk of an answer; plain strings are text parts."""
    parts = [{"text": part} if isinstance(part, str) else part for part in parts]
    entry = {"content": {"role": "model", "parts": parts}, "index": 0}
    if finish:
        entry["finishReason"] = finish
    result = {"candidates": [{**entry, **candidate}]}
    if usage:
        result["usageMetadata"] = usage
    return result


USAGE = {
    "promptTokenCount": 4,
    "candidatesTokenCount": 5,
    "thoughtsTokenCount": 2,
    "totalTokenCount": 11,
}


def whole(*parts, finish="STOP", usage=USAGE, **candidate):
    """A chunk that ends an answer, or is one."""
    return chunk(*parts, finish=finish, usage=usage, **candidate)


def call(name, args=None, signature=None):
    """The part of a function call."""
    part = {"functionCall": {"name": name, "args": args or {}}}
    if signature:
        part["thoughtSignature"] = sign(signature)
    return part


def sign(word):
    """A thought signature that shows where it comes from."""
    return base64.b64encode(b"\x12" + word.encode() * 8).decode()


def gemini_error(status, message, word="INVALID_ARGUMENT", *details):
    error = {"code": status, "message": message, "status": word, "details": list(details)}
    return Say({"error": error}, status=status)


def merged(chunks):
    """The plain answer that the chunks of a stream amount to."""
    answer, parts = {}, []
    for one in chunks:
        answer = {**answer, **one}
        for candidate in one.get("candidates", [])[:1]:
            parts = parts + candidate.get("content", {}).get("parts", [])
            answer["candidates"] = [{**candidate, "content": {"role": "model", "parts": parts}}]
    return answer


def default_answer(path, body):
    """An answer to whoever tries things: it calls the first function, and quotes its result."""
    _, verb = model_and_verb(path)
    if verb == "batchEmbedContents":
        return Say({"embeddings": [{"values": [0.6, 0.8]} for _ in body["requests"]]})
    if verb == "countTokens":
        return Say({"totalTokens": 7})
    parts = [part for content in body["contents"] for part in content["parts"]]
    results = [part["functionResponse"] for part in parts if "functionResponse" in part]
    if results:
        return Say(chunk("The function said: "), whole(json.dumps(results[-1]["response"])))
    for tool in body.get("tools", []):
        if tool.get("functionDeclarations"):
            return Say(chunk(call_of(tool["functionDeclarations"][0])), whole(""))
    question = next((part["text"] for part in reversed(parts) if part.get("text")), "")
    return Say(
        chunk("Hello from the stand-in "), chunk("for Gemini. You said: "), whole(question[:200])
    )


def call_of(declaration):
    """A call of this function, with a value for each of its properties."""
    args = {}
    for name, schema in declaration.get("parametersJsonSchema", {}).get("properties", {}).items():
        text = schema is not True and schema.get("type") == "string"  # true: of any type
        args[name] = "Oslo" if text else 1
    return call(declaration["name"], args, "stand-in")


MODELS = [
    {
        "name": f"models/{name}",
        "version": "1",
        "displayName": name,
        "description": name,
        "inputTokenLimit": 1048576,
        "outputTokenLimit": 65536,
        "supportedGenerationMethods": methods,
    }
    for name, methods in (
        ("gemini-2.5-flash", ["generateContent", "countTokens"]),
        ("gemini-3.8-flash", ["generateContent"]),
        ("gemini-embedding-001", ["embedContent"]),
        ("veo-3.1", ["predictLongRunning"]),
    )
]


class StandIn(ThreadingHTTPServer):
    """The stand-in: it gives the answers of say(), then default ones, and keeps what it was sent."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0, log=False):
        super().__init__(("127.0.0.1", port), StandInHandler)
        self.log = log  # whether to print a line for each request
        self.answers = []  # of say(), not yet given
        self.bodies, self.paths, self.headers = [], [], []  # of requests, but for countTokens
        self.passed = []  # (method, path, headers, bytes) of all requests
        self.refused = []  # messages of its own 400s
        self.opened = 0  # connections
        self.gone = threading.Event()  # a client left before the end of its answer
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def say(self, *answers):
        """Give these answers in turn: each a Say, a chunk, or a list of chunks."""
        self.answers = [self.as_say(answer) for answer in answers]

    @staticmethod
    def as_say(answer):
        if isinstance(answer, Say):
            return answer
        if isinstance(answer, list):
            return Say(*answer)
        return Say(answer)

    def answer_to(self, path, headers, body):
        """The answer to a request, which is kept."""
        if model_and_verb(path)[1] == "countTokens":
            return default_answer(path, body)
        with self.lock:
            self.bodies.append(body)
            self.paths.append(path)
            self.headers.append(headers)
        return self.next_answer()

    def next_answer(self):
        """The next answer of say(), or None."""
        with self.lock:
            return self.answers.pop(0) if self.answers else None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        self.gone.set()


def event_bytes(event):
    """An event as it is sent; bytes are sent as they are."""
    if isinstance(event, bytes):
        return event
    return b"data: " + json.dumps(event).encode() + b"\r\n\r\n"


class StandInHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        if self.server.log:
            super().log_message(*args)

    def setup(self):
        super().setup()
        self.server.opened += 1

    def do_GET(self):
        self.read_body()
        listed = json.dumps({"models": MODELS}).encode()
        self.send_whole(self.server.next_answer() or Say(raw=listed))

    do_DELETE = do_PATCH = do_GET

    def read_body(self):
        """The bytes of the body, which are kept with the rest of the request."""
        if self.headers["Transfer-Encoding"]:
            data = b"".join(iter(self.read_chunk, b""))
        else:
            data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.passed.append((self.command, self.path, headers, data))
        return data

    def read_chunk(self):
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def do_POST(self):
        data = self.read_body()
        if self.path.startswith("/upload/"):
            self.send_whole(self.server.next_answer())
            return
        body = json.loads(data)
        answer = self.server.answer_to(self.path, dict(self.headers), body)
        answer = self.refusal(body) or answer or default_answer(self.path, body)
        if answer.delay:
            self.pause(answer.delay)
        if "alt=sse" in self.path and answer.status == 200 and answer.raw is None:
            self.send_stream(answer)
        else:
            self.send_whole(answer)

    def refusal(self, body):
        """The error that Gemini would answer to this request, or None."""
        if not self.headers["x-goog-api-key"]:
            message = "Method doesn't allow unregistered callers."
            return gemini_error(403, message, "PERMISSION_DENIED")
        message = refusal_of(self.path, body)
        if message is None:
            return None
        self.server.refused.append(message)
        return gemini_error(400, message)

    def pause(self, seconds):
        """Wait, but notice a client that leaves."""
        self.connection.settimeout(seconds)
        # Before Python 3.10, socket.timeout is another class than TimeoutError.
        with contextlib.suppress(TimeoutError, socket.timeout):
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
        self.connection.settimeout(None)

    def send_whole(self, answer):
        if answer.cut == 0:
            self.hang_up()
            return
        data = answer.raw
        if data is None:
            data = json.dumps(merged(answer.chunks), indent=2).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        for name, value in answer.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_stream(self, answer):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i, event in enumerate(answer.chunks):
            if answer.cut == i:
                self.hang_up()
                return
            data = event_bytes(event)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            if answer.gap:
                self.pause(answer.gap)
        self.wfile.write(b"0\r\n\r\n")

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


# ---- replays ----

MEDIA_MARK = re.compile(r"\[media: (\d+) bytes, SHA-256 [0-9a-f]{64}\]")
HOP_HEADERS = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}


def restored(text):
    """A body of a recording as bytes; its media are as long as they were, and empty."""
    match = MEDIA_MARK.fullmatch(text)
    if match:
        return bytes(int(match.group(1)))
    return MEDIA_MARK.sub(zeros, text).encode()


def zeros(match):
    """What stands for media: base64, or bytes where they are a part of a form."""
    data = bytes(int(match.group(1)))
    if match.string[: match.start()].endswith("\r\n\r\n"):
        return data.decode()
    return base64.b64encode(data).decode()


def decoded(data):
    """The JSON in these bytes, else their text."""
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def difference(recorded, seen, path=""):
    """Where two values differ first, in words; None where they do not."""
    if type(recorded) is type(seen) is dict:
        keys = [*recorded, *(key for key in seen if key not in recorded)]
        pairs = ((f"{path}.{key}".lstrip("."), recorded.get(key), seen.get(key)) for key in keys)
    elif type(recorded) is type(seen) is list and len(recorded) == len(seen):
        pairs = ((f"{path}[{i}]", *pair) for i, pair in enumerate(zip(recorded, seen)))
    elif recorded == seen:
        return None
    else:
        return f"{path or 'the body'} is {shortened(seen)}, and was {shortened(recorded)}"
    return next(filter(None, (difference(*pair[1:], pair[0]) for pair in pairs)), None)


def shortened(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def recorded_pieces(answer):
    """The body of a recorded answer in the pieces that it came in."""
    data = restored(answer["body"])
    ends = [end for _, end in answer["arrived"]]
    if ends[-1:] != [len(data)]:  # something was masked or cut: where it came apart is unknown
        ends = [len(data)]
    return filter(None, (data[start:end] for start, end in zip([0, *ends], ends)))


class Replay(StandIn):
    """The stand-in that plays Gemini's part of a recording, and tells what differs."""

    def __init__(self, recording, port=0, tell=print):
        super().__init__(port)
        self.RequestHandlerClass = ReplayHandler
        self.recording, self.tell = recording, tell
        self.left = list(recording["attempts"])

    def attempt_for(self, method, target, data):
        """The next recorded attempt with this method and path, or None; differences are told."""
        path = target.partition("?")[0]
        same = [one for one in self.left if (one["method"], path_of(one)) == (method, path)]
        if not same:
            self.tell(f"{method} {path}: not in the recording, or not so often")
            return None
        if same[0] is not self.left[0]:
            self.tell(f"{method} {path}: out of order")
        self.left.remove(same[0])
        recorded = urllib.parse.urlsplit(same[0]["url"]).query
        found = difference(recorded, target.partition("?")[2], "the query") or difference(
            decoded(restored(same[0]["body"])), decoded(data)
        )
        self.tell(f"{method} {path}: {found or 'as recorded'}")
        return same[0]

    def how_to(self):
        """The commands that run the recording."""
        request, flags = self.recording["request"], [f"-api={self.recording['api']}"]
        for name, *models in self.recording["aliases"]:
            flags.append(f"-alias={name}={','.join(models)}")
        for attempt in self.recording["attempts"][:1]:
            place = re.search("/projects/([^/]+)/locations/([^/]+)/", attempt["url"])
            if place:
                flags += ["-vertex=" + "/".join(place.groups()), "-token-command=echo replay"]
        start = shlex.join([*flags, f"-upstream={self.url}"])
        url = shlex.quote(f"http://127.0.0.1:5555{request['target']}")
        kind = shlex.quote("Content-Type: " + request["headers"].get("content-type", ""))
        ask = f"curl -sN -X {request['method']} {url} -H {kind} --data-binary @-"
        return (
            f"Start the proxy:  GEMINI_API_KEY=replay python3 proxy_to_gemini.py {start}\n"
            f"Ask it:           curl -s {self.url}/request | {ask}\n"
            f"Its answer was:   {self.recording['status']} "
            f"{shortened(self.recording['answer']['body'])}"
        )


def path_of(attempt):
    return urllib.parse.urlsplit(attempt["url"]).path


class ReplayHandler(StandInHandler):
    """One connection of the proxy's; or of whoever wants the recorded request, at /request."""

    def answer_any(self):
        data = self.read_body()
        if self.path == "/request":
            self.send_whole(Say(raw=restored(self.server.recording["request"]["body"])))
            return
        attempt = self.server.attempt_for(self.command, self.path, data)
        if attempt is None:
            self.send_whole(gemini_error(404, "This is not in the recording.", "NOT_FOUND"))
            return
        self.send_recorded(attempt.get("answer"), attempt.get("error", ""))

    def send_recorded(self, answer, error):
        """Send the answer. It hangs up where Gemini said nothing, or broke off."""
        if not answer:
            self.hang_up()
            return
        self.send_response_only(answer["status"])
        for name, value in answer["headers"].items():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        if answer["status"] != 204:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in recorded_pieces(answer):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if re.search("broke off|silent", error):
            self.hang_up()
        elif answer["status"] != 204:
            self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PATCH = do_DELETE = answer_any


def serve_alone(port=0):
    """Run the stand-in until Ctrl-C."""
    stand_in = StandIn(port, log=True)
    wait_in(stand_in, f"the stand-in for Gemini listens at {stand_in.url}; any key will do")


def replay(path, port=0):
    """Play Gemini's part of the recording in this file until Ctrl-C."""
    with open(path, encoding="utf-8") as file:
        stand_in = Replay(json.load(file), port, functools.partial(print, flush=True))
    wait_in(stand_in, stand_in.how_to())


def wait_in(stand_in, line):
    with stand_in, contextlib.suppress(KeyboardInterrupt):
        print(line, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["-replay"]:
        replay(sys.argv[2], *map(int, sys.argv[3:4]))
    serve_alone(*map(int, sys.argv[1:2]))
    sys.exit()

# ======================================================================================
# Words for the tests
# ======================================================================================

HERE = Path(__file__).resolve().parent
FLASH, NEWEST, EMBEDDER = "gemini-2.5-flash", "gemini-3.8-flash", "gemini-embedding-001"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCRIPTS = 'Ærlig \u2013 日本語 👩‍👩‍👧 line\u2028paragraph\u2029next\x85end "quoted" \\ </script>\ttab\nnewline'
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool_call(call_id, name, arguments):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def function(name, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name}",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }


WEATHER, CLOCK = function("weather", city="string"), function("clock", city="string")


NO_CONTEXT = Context()


def queried(query):
    """A request with these fields in its query."""
    return proxy.ClientRequest(query=urllib.parse.urlencode(query))


def exchange(plan=None, context=NO_CONTEXT):
    """An exchange whose ids count up, at a time that stands still."""
    return Exchange(plan or proxy.Plan(model_name="m"), context, "", 1700000000.5)


class Notes(dict):
    """What is stored, in place of the program's Memory."""

    def put(self, key, alias, text):
        self[key] = text

    def pin(self, shelf, key, text):
        self[key] = text

    def forget(self, key):
        self.pop(key, None)

    def pinned(self, shelf):
        lines = [(key, text.partition("\n")[0]) for key, text in self.items()]
        return [(key, line) for key, line in lines if key.startswith("model:")]


def looked_up(route, body, context, notes):
    """The context with what the route wants to know of what is stored."""
    shelf = proxy.Shelf(notes, "")
    if context.ollama:
        context = context._replace(recipes=shelf.recipes(Fields(body)))
    if route.keys:
        keys = route.keys(Fields(body), context)
        context = context._replace(stored=shelf.look_up(keys, lambda size: None))
    return context


def kept_by(events, notes):
    """Events without those that are to be kept; they are in the notes then."""
    shelf = proxy.Shelf(Notes() if notes is None else notes, "")
    for event in events:
        if isinstance(event, proxy.Keep):
            shelf.keep(event)
        else:
            yield event


def whole_of(route, one, *answers, notes=None):
    """The whole answer of a route, when Gemini says these lists of chunks to its calls."""
    answer = (route.response or route.stream)(one, events_of(one, answers))
    if isinstance(answer, collections.abc.Iterator):
        *_, answer = kept_by(answer, notes)
    return answer


def stream_of(route, one, *answers, notes=None):
    """The same, as events."""
    return list(kept_by(route.stream(one, events_of(one, answers)), notes))


def openai_route(path, method="POST"):
    return next(
        route for route in proxy.OPENAI.routes if (route.method, route.path) == (method, path)
    )


CHAT_COMPLETIONS, RESPONSES_ROUTE = (
    openai_route("/v1/chat/completions"),
    openai_route("/v1/responses"),
)


def events_of(one, answers):
    """The events, or the chunks, that a route gets of these answers."""
    for call, chunks in zip(one.plan.calls, answers):
        if not call.generates:
            yield iter(chunks)
            continue
        events = proxy.read_gemini(iter(chunks), one)
        yield proxy.chat_events(events, call, one.plan.chat) if one.plan.chat else events


def chat(*messages, model=FLASH, **more):
    """The body of a chat completion."""
    return {"model": model, "messages": list(messages) or [user("Hi")], **more}


def by_value(plan):
    """A plan whose tools compare by what is in them."""
    chat = plan.chat and plan.chat._replace(tools=vars(plan.chat.tools))
    return plan._replace(chat=chat)


def plan_and_ignored(body, request=proxy.openai_chat_request, context=NO_CONTEXT):
    """(the Plan, the names of what is ignored) of a body."""
    fields = Fields(body)
    plan = request(fields, context)
    again = request(Fields(body), context)
    assert by_value(again) == by_value(plan), "further models get plans of the same body"
    return plan, fields.ignored()


def gemini_body(body, **how):
    """The body of Gemini's request for a client's; the stand-in must accept it."""
    plan, _ = plan_and_ignored(body, **how)
    call = plan.calls[0]
    signed, _ = proxy.restore_signatures(call)
    assert refusal_of("/v1beta/" + call.path, signed.body) is None
    return call.body


def refused(body, request=proxy.openai_chat_request):
    """The error that a body gets."""
    with pytest.raises(ProxyError) as caught:
        plan_and_ignored(body, request)
    return caught.value


def read(*chunks):
    """The events of these chunks."""
    return list(proxy.read_gemini(iter(chunks), exchange()))


def respond(body, *answers, context=NO_CONTEXT):
    """(the whole answer, the events of a stream) to a body; each of Gemini's answers is a list of chunks."""
    plan, _ = plan_and_ignored(body, context=context)
    return (
        whole_of(CHAT_COMPLETIONS, exchange(plan, context), *answers),
        stream_of(CHAT_COMPLETIONS, exchange(plan, context), *answers),
    )


def deltas(events, index=0):
    """The deltas of one choice."""
    choices = [choice for event in events for choice in event["choices"]]
    return [choice["delta"] for choice in choices if choice["index"] == index]


# ======================================================================================
# 1. Vocabulary
# ======================================================================================


def test_fields_know_the_place_of_every_value():
    body = Fields({"a": [{"b": 7}], "n": 3.0, "s": "Yes", "none": None, "t": ["x", 1]})
    assert next(body.objects("a")).require("b", int) == 7
    assert (
        body.get("n", int) == 3
        and body.get("none", str) is None
        and body.choice("s", "yes", "no") == "yes"
    )
    for act, path in (
        (lambda: next(body.objects("a")).get("b", str), "a[0].b"),
        (lambda: body.require("none", str), "none"),
        (lambda: next(body.objects("a")).require("c", str), "a[0].c"),
        (lambda: body.choice("s", "no"), "s"),
        (lambda: body.number("n", 0, 2), "n"),
        (lambda: list(body.objects("t")), "t[0]"),
        (lambda: body.strings("t"), "t[1]"),
    ):
        with pytest.raises(ProxyError) as caught:
            act()
        assert (caught.value.status, caught.value.path) == (
            400,
            path,
        ) and path in caught.value.message


@pytest.mark.parametrize(
    "value, kind",
    [
        (True, int),
        (True, float),
        (1, bool),
        ("1", int),
        (1.5, int),
        ([], dict),
        ({}, list),
        (1, str),
    ],
)
def test_a_value_of_another_kind_is_refused(value, kind):
    with pytest.raises(ProxyError, match="Invalid type for 'k'"):
        Fields({"k": value}).get("k", kind)


def test_what_nobody_read_was_ignored():
    body = Fields(
        {
            "read": 1,
            "user": "me",
            "messages": [{"name": "a", "role": "user"}, {"name": "b"}],
            "n": 1,
            "store": False,
            "logit_bias": {},
            "none": None,
            "service_tier": "auto",
            "metadata": {"a": "b"},
            "max_tool_calls": 0,
            "top_logprobs": 0,
        }
    )
    body.get("read", int)
    for message in body.objects("messages"):
        message.get("role", str)
    body.ignore("told")
    assert body.ignored() == ["max_tool_calls", "messages[].name", "metadata", "told", "user"]


RUBBISH = [
    b"",
    b" \r\n ",
    b"hello",
    b"[]",
    b"null",
    b'"s"',
    b"7",
    b"NaN",
    b"{}{}",
    b'{"a": 1,}',
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": ' + b"[" * 100_000,
    b'{"a": "\xff"}',
    b'{"a": "\n"}',
    b"\0" * 9,
]


@pytest.mark.parametrize("raw", RUBBISH, ids=short_id)
def test_a_body_that_is_no_json_object_is_a_400(raw):
    with pytest.raises(ProxyError) as caught:
        proxy.parse_body(raw)
    assert caught.value.status == 400


QUESTION = b'{"model":"m","messages":[{"role":"user","content":"x"}]'
DENSE = {
    "objects": b'{"messages":[' + b"{}," * 100_000 + b"{}]}",
    "arrays": QUESTION + b',"unknown":[' + b"[]," * 100_000 + b"[]]}",
    "texts": QUESTION + b',"unknown":[' + b'"a",' * 700_000 + b'""]}',
    "objects in a text": b'{"t":"' + b"{}," * 300_000 + b'"}',
}


@pytest.mark.parametrize("raw", DENSE.values(), ids=list(DENSE))
def test_a_body_that_would_be_far_larger_in_memory_is_refused_unparsed(raw, monkeypatch):
    monkeypatch.setattr(proxy, "decode_json", pytest.fail)
    with pytest.raises(ProxyError, match="too many small objects") as caught:
        proxy.parse_body(raw)
    assert caught.value.status == 400


SPARSE = {
    "one long text": b'{"t":"' + b"x" * 3_000_000 + b'"}',
    "quotes and brackets in texts": b'{"t":["' + rb"{\"a\":[1]},\\ " * 100_000 + b'"]}',
    "messages": b'{"t":[' + b'{"role":"user","content":"Hello there."},' * 10_000 + b"{}]}",
}


@pytest.mark.parametrize("raw", SPARSE.values(), ids=list(SPARSE))
def test_a_large_body_is_parsed_where_it_is_as_large_in_memory(raw):
    assert proxy.parse_body(raw).data == json.loads(raw)


def test_objects_of_a_list_are_made_as_they_are_read():
    body = Fields({"a": [{"b": 1}, 7]})
    objects = body.objects("a")
    assert next(objects).require("b", int) == 1
    with pytest.raises(ProxyError, match=r"a\[1\]"):
        next(objects)


def form_with(head):
    raw = b"--B\r\nContent-Disposition: %b\r\n\r\nx\r\n--B--\r\n" % head
    return proxy.parse_form(raw, "multipart/form-data; boundary=B").data


@pytest.mark.parametrize(
    "head, data",
    [
        (b'form-data; name="a"', {"a": "x"}),
        (b"Form-Data ;name=a ; ", {"a": "x"}),
        (rb'form-data; name="a\"b; c=d"', {'a"b; c=d': "x"}),
        (b'form-data; x=1; NAME="a"', {"a": "x"}),
        (b'form-data; name="a"' + b" " * 8000 + b";", {"a": "x"}),
    ],
)
def test_a_part_of_a_form_has_the_name_in_its_head(head, data):
    assert form_with(head) == data


@pytest.mark.parametrize(
    "head",
    [b"", b"form-data", b'attachment; name="a"', b'form-data; name="a" b', b"form-data; name="],
)
def test_a_part_of_a_form_whose_head_makes_no_sense_is_refused(head):
    with pytest.raises(ProxyError, match="multipart/form-data body") as caught:
        form_with(head)
    assert caught.value.status == 400


def cpu_seconds(act):
    began = time.process_time()
    act()
    return time.process_time() - began


def test_blanks_in_a_forms_head_take_time_in_proportion():
    head = b'form-data; name="a[]"' + b" " * 8000 + b"; "
    assert cpu_seconds(lambda: [form_with(head) for _ in range(50)]) < 1


def test_what_is_sent_is_ascii_and_never_nan():
    assert proxy.encode_json({"t": SCRIPTS}).isascii()
    with pytest.raises(ValueError):
        proxy.encode_json({"x": float("inf")})


def test_half_an_emoji_goes_to_gemini_as_a_replacement_character():
    data = proxy.gemini_json({"text": "a \ud83d b \U0001f600 \\ud83d", "args": {"\udc00": "x"}})
    assert data.decode() == '{"text":"a \ufffd b \U0001f600 \\\\ud83d","args":{"\ufffd":"x"}}'


def form(*parts, boundary="b0un:d"):
    """(body, Content-Type) of a form: (name, text), or (name, file name, type, bytes)."""
    body = b""
    for name, *values in parts:
        file, data = "", values[-1]
        if len(values) == 1:
            data = data.encode()
        else:
            file = f'; filename="{values[0]}"\r\nContent-Type: {values[1]}'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f'multipart/form-data; boundary="{boundary}"'


def test_a_form_becomes_texts_files_and_lists():
    tricky = b"\r\n\r\n--b0un:\r\n\0\xff--"
    parts = (
        ("model", "m\r\nn"),
        ("file", '\u00e5 \\"b\\".wav', "Audio/WAV; x=y", tricky),
        ("g[]", "a"),
        ("g[]", "b"),
    )
    assert proxy.parse_form(*form(*parts)).data == {
        "model": "m\r\nn",
        "file": proxy.Upload('\u00e5 "b".wav', "audio/wav", tricky),
        "g": ["a", "b"],
    }


def test_a_form_in_loose_spelling_is_taken():
    raw = (
        b"--x \r\ncontent-disposition:form-data;name=a;filename*=UTF-8''b%20c.mp3\r\n\r\n1\r\n--x--"
    )
    fields = proxy.parse_form(raw, "Multipart/Form-Data; charset=utf-8; BOUNDARY=x")
    assert fields.data == {"a": proxy.Upload("UTF-8''b c.mp3", "", b"1")}


def test_numbers_and_booleans_of_a_form_are_read_under_their_keys_alone():
    fields = Fields({"temperature": "0.5", "stream": "True", "prompt": "7"})
    proxy.form_scalars(fields, "temperature", "stream", "missing")
    assert fields.data == {"temperature": 0.5, "stream": True, "prompt": "7"}


GOOD_FORM, FORM_KIND = form(("model", "m"))


@pytest.mark.parametrize(
    "raw, kind",
    [
        (b"", FORM_KIND),
        (b"{}", "application/json"),
        (GOOD_FORM, "multipart/form-data"),
        (GOOD_FORM, "multipart/form-data; boundary="),
        (GOOD_FORM, FORM_KIND + "x\0"),
        (GOOD_FORM, "multipart/form-data; boundary=other"),
        (b"x" + GOOD_FORM, FORM_KIND),
        (GOOD_FORM[:-6], FORM_KIND),
        (GOOD_FORM.replace(b"name", b"nome"), FORM_KIND),
        (GOOD_FORM.replace(b"form-data", b"attachment"), FORM_KIND),
        (GOOD_FORM.replace(b"Content-D", b"X-D"), FORM_KIND),
        (GOOD_FORM.replace(b"; n", b"\r\n; n"), FORM_KIND),
        (GOOD_FORM.replace(b"\r\n\r\n", b"\r\n"), FORM_KIND),
        (
            GOOD_FORM.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n"),
            FORM_KIND,
        ),
        (GOOD_FORM.replace(b'"model"', b'""'), FORM_KIND),
        (GOOD_FORM.replace(b'"model"', b'"\xff"'), FORM_KIND),
        (GOOD_FORM.replace(b"\r\nm", b"\r\n\xff"), FORM_KIND),
        (GOOD_FORM.replace(b'"model"', b'"' + b"x" * 9000 + b'"'), FORM_KIND),
        form(("a", "1"), ("a", "2")),
        form(("a[]", "1"), ("a", "2")),
        form(("a", "1"), ("a[]", "2")),
        form(*[("x[]", "y")] * 101),
    ],
)
def test_what_is_no_form_is_a_400(raw, kind):
    with pytest.raises(ProxyError) as caught:
        proxy.parse_form(raw, kind)
    assert caught.value.status == 400


# ======================================================================================
# 2. Models
# ======================================================================================


@pytest.mark.parametrize(
    "name, path",
    [
        (FLASH, "models/gemini-2.5-flash"),
        ("models/" + FLASH, "models/gemini-2.5-flash"),
        ("google/" + FLASH, "models/gemini-2.5-flash"),
        ("tunedModels/mine-1", "tunedModels/mine-1"),
        ("gpt-4o-mini", "models/gemini-3.8-flash"),
        ("gpt-exact", "models/gemma-4"),
        ("o3", "models/o3"),
    ],
)
def test_a_name_loses_its_prefix_or_is_an_alias_and_an_exact_one_goes_before_a_glob(name, path):
    context = Context(aliases=(("gpt-*", NEWEST), ("gpt-exact", "gemma-4")))
    assert proxy.model_named(name, context).path == path


@pytest.mark.parametrize(
    "what, name, aliases, model",
    [
        ("image", "dall-e-3", (), "gemini-nano-banana-2.1"),
        ("image", "gemini-2.5-flash-image", (), "gemini-2.5-flash-image"),
        ("image", "gpt-image-1", (("gpt-*", NEWEST),), "gemini-nano-banana-2.1"),
        ("image", "gpt-image-1", (("gpt-image-*", "gemini-3-pro-image"),), "gemini-3-pro-image"),
        ("image", "dall-e-3", (("dall-e-3", "tunedModels/mine"),), "mine"),
        ("speech", "tts-1-hd", (), "gemini-3.8-flash-tts"),
        ("speech", "gpt-4o-mini-tts", (("gpt-*", NEWEST),), "gemini-3.8-flash-tts"),
        ("transcript", "whisper-1", (), NEWEST),
        ("transcript", FLASH, (), FLASH),
        ("transcript", "gpt-4o-transcribe", (("gpt-*", FLASH),), FLASH),
    ],
)
def test_openais_media_models_stand_for_geminis(what, name, aliases, model):
    assert proxy.model_named(name, Context(aliases=aliases), what).name == model


@pytest.mark.parametrize(
    "name, model",
    [
        ("gpt-5.5", "gemini-flash-latest"),
        ("gpt-5.5-pro", "gemini-pro-latest"),
        ("gpt-5-pro-2025-10-06", "gemini-pro-latest"),
        ("chatgpt-4o-latest", "gemini-flash-latest"),
        ("codex-mini-latest", "gemini-flash-latest"),
        ("o1", "gemini-flash-latest"),
        ("o3-pro", "gemini-pro-latest"),
        ("o4-mini", "gemini-flash-latest"),
        ("claude-sonnet-5", "gemini-flash-latest"),
        ("claude-opus-5", "gemini-pro-latest"),
        ("claude-3-opus-20240229", "gemini-pro-latest"),
    ],
)
def test_names_of_other_makers_stand_for_the_model_that_moves_on(name, model):
    assert proxy.model_named(name, NO_CONTEXT, "chat").name == model
    assert proxy.model_named(name + ":latest", OLLAMA, "chat").name == model


@pytest.mark.parametrize(
    "name", ["o5", "o1x", "opus", "gpt5", "claude", "llama-3", "my-gpt-4", "davinci-002"]
)
def test_any_other_name_stands_for_itself(name):
    assert proxy.model_named(name, NO_CONTEXT, "chat").path == f"models/{name}"


@pytest.mark.parametrize(
    "name, dimensions",
    [
        ("text-embedding-3-small", 1536),
        ("text-embedding-3-large", 3072),
        ("text-embedding-ada-002", 1536),
    ],
)
def test_names_of_embeddings_stand_for_vectors_of_their_size(name, dimensions):
    model = proxy.model_named(name, NO_CONTEXT, "embedding")
    assert (model.name, model.dimensions) == (EMBEDDER, dimensions)


def test_an_alias_goes_before_a_stand_in():
    aliases = (("gpt-*", FLASH), ("text-embedding-3-small", "gemini-embedding-2"))
    context = Context(aliases=aliases)
    assert proxy.model_named("gpt-5-pro", context, "chat").name == FLASH
    embedder = proxy.model_named("text-embedding-3-small", context, "embedding")
    assert (embedder.name, embedder.dimensions) == ("gemini-embedding-2", None)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a:b",
        "a?b",
        "a#b",
        "a b",
        "a%2fb",
        "a\r\nb",
        "\0",
        "ключ",
        "x" * 200,
        "models/models/x",
        "tunedModels/../x",
        "a..b",
        "@evil",
        "http://evil/x",
    ],
)
@pytest.mark.parametrize("ollama", [False, True])
def test_a_name_never_changes_the_url(name, ollama):
    with pytest.raises(ProxyError) as caught:
        proxy.model_named(name, Context(ollama=ollama))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


# What each model takes: https://ai.google.dev/gemini-api/docs/thinking
THINKERS = {
    "gemini-2.5-pro": (128, 32768),
    "gemini-2.5-flash": (0, 24576),
    "gemini-2.5-flash-lite": (0, 24576),
    "gemini-2.5-flash-preview-09-2025": (0, 24576),
    "gemini-3-pro-preview": ("LOW", "HIGH"),
    "gemini-3.1-pro-preview": ("LOW", "MEDIUM", "HIGH"),
    "gemini-3-flash-preview": ("MINIMAL", "LOW", "MEDIUM", "HIGH"),
    "gemini-3.1-flash-lite": ("MINIMAL", "LOW", "MEDIUM", "HIGH"),
    "gemini-3.5-flash": ("MINIMAL", "LOW", "MEDIUM", "HIGH"),
    "gemini-3.6-flash": ("MINIMAL", "LOW", "MEDIUM", "HIGH"),
    "gemini-3.7-flash": ("LOW", "MEDIUM", "HIGH"),
    "gemini-3.8-flash": ("LOW", "MEDIUM", "HIGH"),
    "gemini-4-argon": ("LOW", "MEDIUM", "HIGH"),
    "gemini-flash-latest": ("LOW", "MEDIUM", "HIGH"),
    "gemini-9-unheard-of": ("LOW", "MEDIUM", "HIGH"),
}


def thinking_config(model, effort, show=False):
    return proxy.thinking_config(proxy.Thinking(effort, show=show), model, None, Fields({}))


@pytest.mark.parametrize("name", THINKERS)
def test_every_effort_is_legal_on_every_model_and_more_is_never_less(name):
    allowed, amounts = THINKERS[name], []
    for effort in proxy.EFFORTS:
        config = thinking_config(proxy.model_of(name), effort)
        ((key, value),) = config.items()
        if isinstance(allowed[0], int):
            assert key == "thinkingBudget"
            assert allowed[0] <= value <= allowed[1]
            amounts.append(value)
        else:
            assert key == "thinkingLevel"
            amounts.append(allowed.index(value))
    assert amounts == sorted(amounts)
    assert amounts[2] < amounts[4]


def test_a_model_with_a_level_above_high_gets_it_for_efforts_above_high():
    levels = proxy.Levels(("LOW", "MEDIUM", "HIGH", "XHIGH"))
    model = proxy.model_of("gemini-9")._replace(thinking=levels)
    efforts = ("high", "xhigh", "max", "ultra")
    configs = [thinking_config(model, effort)["thinkingLevel"] for effort in efforts]
    assert configs == ["HIGH", "XHIGH", "XHIGH", "XHIGH"]


@pytest.mark.parametrize("name", THINKERS)
def test_thoughts_are_included_unless_the_effort_is_none(name):
    model = proxy.model_of(name)
    configs = {effort: thinking_config(model, effort, show=True) for effort in proxy.EFFORTS}
    silent = [effort for effort, config in configs.items() if "includeThoughts" not in config]
    assert silent == ["none"]
    assert thinking_config(model, None, show=True) == {"includeThoughts": True}


@pytest.mark.parametrize(
    "name",
    [
        "gemini-2.0-flash",
        "gemini-1.5-pro",
        "gemini-2.5-flash-image",
        "gemini-3.8-flash-tts",
        "gemma-4-31b-it",
    ],
)
def test_models_that_do_not_think_get_no_thinking_config(name):
    assert thinking_config(proxy.model_of(name), "high", show=True) == {}


@pytest.mark.parametrize(
    "name, last_role",
    [
        (FLASH, "model"),
        ("gemini-3-pro-preview", "model"),
        ("gemini-3.5-flash", "model"),
        ("gemini-3.5-flash-lite", "user"),
        ("gemini-3.6-flash", "user"),
        (NEWEST, "user"),
        ("gemini-flash-latest", "user"),
    ],
)
def test_only_the_newer_models_refuse_to_go_on_with_their_own_turn(name, last_role):
    contents = [proxy.user_turn({"text": "q"}), proxy.model_turn({"text": "Once"})]
    assert proxy.valid_turns(contents, proxy.model_of(name))[-1]["role"] == last_role


@pytest.mark.parametrize(
    "name, use, left, expected",
    [
        ("fast", "chat", (), (NEWEST, FLASH, "gemini-pro-latest")),
        ("fast", "chat", (FLASH, "gemini-pro-latest"), (FLASH, "gemini-pro-latest")),
        ("fast", "chat", (FLASH,), (FLASH,)),
        ("fast", "chat", ("gemini-of-another-alias",), (NEWEST, FLASH, "gemini-pro-latest")),
        ("gpt-5", "chat", (), (FLASH, "gemini-2.5-flash-image")),
        ("gpt-image-1", "image", (), ("gemini-2.5-flash-image",)),
        ("gpt-image-1", "image", (FLASH,), ("gemini-2.5-flash-image",)),
        (FLASH, "chat", (NEWEST,), (FLASH,)),
    ],
)
def test_an_alias_has_further_models(name, use, left, expected):
    further = (("fast", NEWEST, FLASH, "gemini-pro-latest"), ("gpt-*", FLASH, IMAGER))
    model = proxy.model_named(name, Context(aliases=further, models=left), use)
    assert (model.name, *model.further) == expected
    assert model._replace(further=()) == proxy.model_of(expected[0])


IMAGER = "gemini-2.5-flash-image"


def test_an_alias_is_listed_as_long_as_one_of_its_models_is():
    aliases = (("fast", "gemini-gone", FLASH), ("slow", "gemini-gone"))
    models = proxy.usable_models([[{"models": MODELS}]], Context(aliases=aliases))
    assert models["fast"]["name"] == f"models/{FLASH}"
    assert "slow" not in models


LISTED = (
    *("gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-3.6-flash", "gemini-3.8-flash"),
    *("gemini-3.9-flash-preview", "gemini-3.1-flash-lite", "gemini-embedding-2"),
)


@pytest.mark.parametrize(
    "name, words, follower",
    [
        ("gemini-2.5-flash", "Use gemini-3.6-flash.", "gemini-3.6-flash"),
        ("gemini-2.5-flash", "models/gemini-2.5-flash is no longer available", NEWEST),
        ("gemini-2.5-flash-lite-preview-09-2025", "", "gemini-3.1-flash-lite"),
        ("gemini-embedding-001", "", "gemini-embedding-2"),
        ("gemini-2.5-pro", "", "gemini-pro-latest"),
        ("gemini-9-flash", "", "gemini-flash-latest"),
        ("gemini-3.1-flash-tts", "", ""),
    ],
)
def test_a_models_follower_is_named_or_the_newest_of_its_family(name, words, follower):
    assert proxy.follower_of(name, words, LISTED) == follower


@pytest.mark.parametrize(
    "status, words",
    [
        ({"modelStage": "LEGACY"}, f"the model {FLASH} will go and is followed by {NEWEST}"),
        (
            {"modelStage": "STABLE", "retirementTime": "2026-10-16T00:00:00Z", "message": "Move."},
            f"the model {FLASH} will go on 2026-10-16 and is followed by {NEWEST}: Move.",
        ),
        ({"modelStage": "STABLE"}, ""),
        ({"modelStage": 7, "retirementTime": "soon", "message": None}, ""),
    ],
)
def test_what_gemini_says_of_the_future_of_a_model(status, words):
    assert proxy.announced_retirement(proxy.model_of(FLASH), status, LISTED) == words


# ======================================================================================
# 3. Writing Gemini
# ======================================================================================


@pytest.mark.parametrize(
    "source, part",
    [
        (f"data:image/png;base64,{PNG}", {"inlineData": {"mimeType": "image/png", "data": PNG}}),
        (f"data:;base64,{PNG}", {"inlineData": {"mimeType": "image/png", "data": PNG}}),
        (
            "data:image/jpg;charset=x;base64,AAAA",
            {"inlineData": {"mimeType": "image/jpeg", "data": "AAAA"}},
        ),
        ("data:image/png;base64,_-8", {"inlineData": {"mimeType": "image/png", "data": "_-8="}}),
        (
            "data:image/png;base64,AA\r\nAA",
            {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
        ),
        ("data:text/plain;base64,aGk=", {"text": "hi"}),
        ("data:text/plain,a%20b", {"text": "a b"}),
        (
            "https://example.com/a/cat.webp?x=1",
            {
                "fileData": {
                    "mimeType": "image/webp",
                    "fileUri": "https://example.com/a/cat.webp?x=1",
                }
            },
        ),
        ("https://example.com/cat", {"fileData": {"fileUri": "https://example.com/cat"}}),
    ],
)
def test_data_becomes_inline_data_or_text_and_an_address_becomes_file_data(source, part):
    assert proxy.source_part(Fields({"p": source}), "p") == part


@pytest.mark.parametrize(
    "source",
    [
        "data:image/png;base64,@@@@",
        "data:image/png;base64,A",
        "data:image/png;base64,",
        "data:image/png",
        "cat.png",
        "ftp://example.com/x",
        "file:///etc/passwd",
        "http://127.0.0.1/x",
        "http://localhost:8080/x",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://printer/",
        "http://nas.local/",
        "http://user@example.com/",
        "http://[",
    ],
)
def test_a_source_that_gemini_cannot_read_or_reach_is_a_400(source):
    with pytest.raises(ProxyError) as caught:
        proxy.source_part(Fields({"url": source}, "messages[0].content[1]"), "url")
    assert (caught.value.status, caught.value.path) == (400, "messages[0].content[1].url")


def base64_of(data):
    return base64.b64encode(data).decode()


def media_part(data, label=None, name=None):
    """(the part of these bytes, the names of what is ignored)."""
    body = Fields({})
    fields = Fields({"data": base64_of(data)}, "messages[3].file", body.tracked)
    part = proxy.media_part(fields, "data", fields.require("data", str), label, name)
    return part, body.ignored()


@pytest.mark.parametrize(
    "data, label, mime",
    [
        (b"\xff\xd8\xff\xe0", "image/png", "image/jpeg"),
        (b"\x89PNG\r\n", "image/*", "image/png"),
        (b"\x89PNG\r\n", "text/plain", "image/png"),
        (b"\x89PNG\r\n", "image/gif", "image/png"),
        (b"\x89PNG\r\n", "application/msword", "image/png"),
        (b"RIFF0000WEBP", "png", "image/webp"),
        (b"%PDF-1.7", None, "application/pdf"),
        (b"\0\0\0 ftypisom", "audio/mp4", "audio/mp4"),
        (b"\0\0\0 ftypM4A ", "video/mp4", "audio/mp4"),
        (b"\x1a\x45\xdf\xa3", "audio/webm", "audio/webm"),
        (b"\xff\xff\xff\xff", "image/png", "image/png"),
        (b"\xff\xff\xff\xff", "PNG", "image/png"),
        (b"\xff\xff\xff\xff", "image/jpg; x=y", "image/jpeg"),
    ],
)
def test_the_bytes_of_a_file_tell_its_type_before_its_label_does(data, label, mime):
    part = {"inlineData": {"mimeType": mime, "data": base64_of(data)}}
    assert media_part(data, label) == (part, [])


@pytest.mark.parametrize(
    "data, label",
    [
        (b"BMW is a car", "text/plain"),
        (b"a = 1", "application/x-python"),
        (b"<svg/>", "image/svg+xml"),
    ],
)
def test_a_text_file_is_text_whatever_it_begins_with(data, label):
    assert media_part(data, label) == ({"text": data.decode()}, [])


DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.mark.parametrize(
    "data, label, name, words",
    [
        (b"GIF89a", "image/gif", None, "type image/gif was"),
        (b"GIF89a", "image/png", "cat.png", "type image/gif named cat.png was"),
        (b"BM0000\0\0\0\0", None, None, "type image/bmp was"),
        (b"PK\x03\x04\0\0", DOCX, "a.docx", f"type {DOCX} named a.docx was"),
        (b"PK\x03\x04\0\0", None, "a.docx", f"type {DOCX} named a.docx was"),
        (b"PK\x03\x04\0\0", "image/png", None, "type application/zip was"),
        (b"\xff\0", "image/*", None, "type image/* was"),
        (b"\xff\0", None, None, "type application/octet-stream was"),
    ],
)
def test_words_stand_in_the_place_of_a_file_that_gemini_refuses(data, label, name, words):
    part, ignored = media_part(data, label, name)
    assert part == {"text": f"[A file of {words} left out: Gemini cannot read it.]"}
    assert ignored == [f"messages[].file.data ({words.split()[1]})"]


def test_words_stand_in_the_place_of_an_address_of_such_a_file():
    body = Fields({"url": "https://example.com/cat.gif?x=1"})
    part = proxy.source_part(body, "url")
    words = "[A file of type image/gif at https://example.com/cat.gif?x=1 was left out: "
    assert part == {"text": words + "Gemini cannot read it.]"}
    assert body.ignored() == ["url (image/gif)"]


def u(*parts):
    return proxy.user_turn(*[{"text": part} if isinstance(part, str) else part for part in parts])


def m(*parts):
    return proxy.model_turn(*[{"text": part} if isinstance(part, str) else part for part in parts])


def fc(name, call_id=None):
    return proxy.call_part(name, {}, call_id)


def fr(name, result, call_id=None):
    return proxy.result_part(name, [{"text": result}], call_id)


def answer_to(name, output, call_id=None):
    return {"functionResponse": {**proxy.given(id=call_id), "name": name, "response": output}}


MISSING_RESULT = proxy.NO_RESULT["response"]
HISTORIES = {
    "neighbours are one turn": (
        [u("a"), u("b"), m("c"), m("d"), u("e")],
        [u("a", "b"), m("c", "d"), u("e")],
    ),
    "nothing empty": ([u(""), m(""), u("a"), m(), u("", "b")], [u("a", "b")]),
    "the model first": ([m("Hello"), u("Hi")], [u(" "), m("Hello"), u("Hi")]),
    "results in call order": (
        [u("q"), m(fc("f", "1"), fc("g", "2")), u(fr(None, "G", "2")), u(fr(None, "F", "1"))],
        [
            u("q"),
            m(fc("f", "1"), fc("g", "2")),
            u(answer_to("f", {"output": "F"}, "1"), answer_to("g", {"output": "G"}, "2")),
        ],
    ),
    "results by name": (
        [u("q"), m(fc("f"), fc("g")), u(fr("g", "G"), fr("f", "F"))],
        [
            u("q"),
            m(fc("f"), fc("g")),
            u(answer_to("f", {"output": "F"}), answer_to("g", {"output": "G"})),
        ],
    ),
    "results by order": (
        [u("q"), m(fc("f"), fc("f")), u(fr(None, "1"), fr(None, "2"))],
        [
            u("q"),
            m(fc("f"), fc("f")),
            u(answer_to("f", {"output": "1"}), answer_to("f", {"output": "2"})),
        ],
    ),
    "one result for several calls": (
        [u("q"), m(fc("f"), fc("g", "2")), u(fr(None, "F and G"))],
        [
            u("q"),
            m(fc("f"), fc("g", "2")),
            u(
                answer_to("f", {"output": "F and G"}),
                answer_to("g", proxy.JOINED_RESULT["response"], "2"),
            ),
        ],
    ),
    "a missing result": (
        [u("q"), m(fc("f")), u("never mind")],
        [u("q"), m(fc("f")), u(answer_to("f", MISSING_RESULT)), u("never mind")],
    ),
    "no results at all": (
        [u("q"), m("look", fc("f"))],
        [u("q"), m("look", fc("f")), u(answer_to("f", MISSING_RESULT))],
    ),
    "text among results": (
        [u("q"), m(fc("f", "1")), u("and"), u(fr(None, "F", "1"))],
        [u("q"), m(fc("f", "1")), u(answer_to("f", {"output": "F"}, "1")), u("and")],
    ),
    "results with ids of somebody else's": (
        [u("q"), m(fc("f", "a"), fc("g", "b")), u(fr(None, "F", "1"), fr(None, "G", "2"))],
        [
            u("q"),
            m(fc("f", "a"), fc("g", "b")),
            u(answer_to("f", {"output": "F"}, "a"), answer_to("g", {"output": "G"}, "b")),
        ],
    ),
    "one result too few": (
        [u("q"), m(fc("f", "a"), fc("g", "b")), u(fr(None, "F", "1"))],
        [
            u("q"),
            m(fc("f", "a"), fc("g", "b")),
            u(answer_to("f", MISSING_RESULT, "a"), answer_to("g", MISSING_RESULT, "b")),
            u('Result of a function: {"output":"F"}'),
        ],
    ),
    "an orphaned result": (
        [u("q"), m("a"), u(fr("f", "F", "9"))],
        [u("q"), m("a"), u('Result of f: {"output":"F"}')],
    ),
    "two calls with one id": (
        [u("q"), m(fc("f", "1"), fc("g", "1")), u(fr(None, "F", "1")), u(fr(None, "G", "1"))],
        [
            u("q"),
            m(fc("f", "1"), fc("g")),
            u(answer_to("f", {"output": "F"}, "1"), answer_to("g", {"output": "G"})),
        ],
    ),
    "one id in two turns that become one": (
        [u("q"), m(fc("f", "1")), m(fc("f", "1")), u(fr(None, "1", "1"), fr(None, "2", "1"))],
        [
            u("q"),
            m(fc("f", "1"), fc("f")),
            u(answer_to("f", {"output": "1"}, "1"), answer_to("f", {"output": "2"})),
        ],
    ),
    "one id in turns of their own": (
        [u("q"), m(fc("f", "1")), u(fr(None, "1", "1")), m(fc("f", "1")), u(fr(None, "2", "1"))],
        [
            u("q"),
            m(fc("f", "1")),
            u(answer_to("f", {"output": "1"}, "1")),
            m(fc("f", "1")),
            u(answer_to("f", {"output": "2"}, "1")),
        ],
    ),
    "results after more turns": (
        [u("q"), m("a", fc("f", "1"), fc("g", "2")), u("q"), m("a"), u(fr(None, "G", "2"), "b")],
        [
            u("q"),
            m("a", fc("f", "1")),
            u(answer_to("f", MISSING_RESULT, "1")),
            u("q"),
            m("a", fc("g", "2")),
            u(answer_to("g", {"output": "G"}, "2")),
            u("b"),
        ],
    ),
    "a call that is repeated before its result": (
        [u("q"), m(fc("f", "1")), u("q"), m("a", fc("f", "1")), u(fr(None, "F", "1"))],
        [u("q", "q"), m("a", fc("f", "1")), u(answer_to("f", {"output": "F"}, "1"))],
    ),
    "a call that is made again after a result without an id": (
        [u("q"), m(fc("f", "1")), u(fr(None, "1")), m(fc("f", "1")), u(fr(None, "2"))],
        [
            u("q"),
            m(fc("f", "1")),
            u(answer_to("f", {"output": "1"}, "1")),
            m(fc("f", "1")),
            u(answer_to("f", {"output": "2"}, "1")),
        ],
    ),
    "another call with the id of one without a result": (
        [u("q"), m(fc("f", "1")), u("q"), m(fc("g", "1")), u(fr(None, "G", "1"))],
        [
            u("q"),
            m(fc("f", "1")),
            u(answer_to("f", MISSING_RESULT, "1")),
            u("q"),
            m(fc("g", "1")),
            u(answer_to("g", {"output": "G"}, "1")),
        ],
    ),
    "calls in messages of their own": (
        [u("q"), m(fc("f", "1")), m(fc("g", "2")), u(fr(None, "F", "1")), u(fr(None, "G", "2"))],
        [
            u("q"),
            m(fc("f", "1"), fc("g", "2")),
            u(answer_to("f", {"output": "F"}, "1"), answer_to("g", {"output": "G"}, "2")),
        ],
    ),
}


@pytest.mark.parametrize("history, valid", HISTORIES.values(), ids=list(HISTORIES))
def test_turns_come_in_the_order_that_gemini_accepts(history, valid):
    assert proxy.valid_turns(history, proxy.model_of(FLASH)) == valid


def test_a_clients_turns_are_not_changed_in_place():
    histories = [history for history, _ in HISTORIES.values()]
    before = json.dumps(histories)
    for history in histories:
        proxy.valid_turns(history, proxy.model_of(FLASH))
    assert json.dumps(histories) == before


NESTED = '{"a":' * 101 + "1" + "}" * 101


@pytest.mark.parametrize(
    "content, response",
    [
        ("rain", {"output": "rain"}),
        ('{"temp": 3}', {"temp": 3}),
        ("[1, 2]", {"output": "[1, 2]"}),
        ("3.5", {"output": "3.5"}),
        ("", {"output": ""}),
        ("null", {"output": "null"}),
        ("{oops", {"output": "{oops"}),
        ('{"a": NaN}', {"output": '{"a": NaN}'}),
        ('{"id": 12345678901234567890}', {"output": '{"id": 12345678901234567890}'}),
        ('{"id": "12345678901234567890"}', {"id": "12345678901234567890"}),
        ('{"s": {"$ref": "#/a"}}', {"output": '{"s": {"$ref": "#/a"}}'}),
        ('{"a": [{"b": [{"$ref": 1}]}]}', {"output": '{"a": [{"b": [{"$ref": 1}]}]}'}),
        ('{"ref": "$ref"}', {"ref": "$ref"}),
        ('{"output": "", "exit": 1}', {"output": {"output": "", "exit": 1}}),
        ('{"code": 7, "error": "no"}', {"output": {"code": 7, "error": "no"}}),
        ('{"output": "x"}', {"output": "x"}),
        ('{"error": "no"}', {"error": "no"}),
        ('{"a": {"output": 1, "b": 2}}', {"a": {"output": 1, "b": 2}}),
        (NESTED, {"output": NESTED}),
    ],
)
def test_results_become_objects_of_which_nothing_is_lost_or_misread(content, response):
    assert proxy.result_response(content) == response


@pytest.mark.parametrize(
    "text, args",
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (" ", {}),
        ("null", {}),
        ("{oops", {"_raw": "{oops"}),
        ("7", {"_raw": "7"}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
    ],
)
def test_arguments_become_an_object_and_lose_nothing(text, args):
    assert proxy.call_arguments(Fields({"arguments": text})) == args


@pytest.mark.parametrize(
    "arguments", [NESTED, json.loads(NESTED), '{"a":' * 9999 + "1" + "}" * 9999], ids=short_id
)
def test_arguments_that_are_nested_too_deeply_are_a_400_at_their_place(arguments):
    fields = Fields({"arguments": arguments}, "messages[1].tool_calls[0].function")
    with pytest.raises(ProxyError, match="nested too deeply") as caught:
        proxy.call_arguments(fields)
    place = "messages[1].tool_calls[0].function.arguments"
    assert (caught.value.status, caught.value.path) == (400, place)


def test_arguments_may_be_nested_a_hundred_times():
    arguments = '{"a":' * 100 + "1" + "}" * 100
    assert proxy.call_arguments(Fields({"arguments": arguments})) == json.loads(arguments)


def test_system_text_in_mid_conversation_is_marked_text_of_the_users():
    turn = proxy.system_turn([{"text": "Be brief."}])
    assert turn == u("<system>\n", "Be brief.", "\n</system>")


def test_empty_system_text_in_mid_conversation_says_nothing():
    assert proxy.system_turn([{"text": ""}]) == u()


@pytest.mark.parametrize(
    "schema, geminis",
    [
        (
            {
                "$schema": "x",
                "strict": True,
                "type": "object",
                "properties": {"$schema": {"type": "string"}, "const": {"const": 1}},
            },
            {
                "type": "object",
                "properties": {"$schema": {"type": "string"}, "const": {"enum": [1]}},
            },
        ),
        (
            {"type": ["string", "null"], "enum": ["a", None], "title": "T"},
            {"title": "T", "anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]},
        ),
        ({"const": None}, {"type": "null"}),
        (
            {
                "$ref": "#/definitions/A",
                "description": "d",
                "definitions": {"A": {"type": "string"}},
            },
            {
                "anyOf": [{"$ref": "#/$defs/A"}],
                "description": "d",
                "$defs": {"A": {"type": "string"}},
            },
        ),
        ({"items": {"$ref": "#/$defs/A"}}, {"items": {"$ref": "#/$defs/A"}}),
        (
            {"anyOf": [{"const": "x"}, True], "additionalProperties": False},
            {"anyOf": [{"enum": ["x"]}, True], "additionalProperties": False},
        ),
        (
            {"items": [{"const": 1}, {}], "additionalItems": False, "minItems": 2},
            {"prefixItems": [{"enum": [1]}, {}], "items": False, "minItems": 2},
        ),
        (
            {"items": [{"type": "string"}], "additionalItems": {"const": 2}},
            {"prefixItems": [{"type": "string"}], "items": {"enum": [2]}},
        ),
        ({"type": "array", "items": []}, {"type": "array"}),
    ],
)
def test_a_schema_keeps_its_meaning_and_is_not_changed_in_place(schema, geminis):
    before = json.dumps(schema)
    assert proxy.gemini_schema(schema) == geminis
    assert json.dumps(schema) == before


STRING, NUMBER = {"type": "string"}, {"type": "number"}
TREE = {"properties": {"kids": {"items": {"$ref": "#/$defs/root"}}}, "required": ["kids"]}
REFERENCES = {
    "the root": (
        {"properties": {"kids": {"items": {"$ref": "#"}}}, "required": ["kids"]},
        {**TREE, "$defs": {"root": TREE}},
    ),
    "another property": (
        {"properties": {"a": STRING, "b": {"$ref": "#/properties/a"}}},
        {
            "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#/$defs/a"}},
            "$defs": {"a": STRING},
        },
    ),
    "the middle of a definition": (
        {
            "items": {"$ref": "#/$defs/A/properties/b/anyOf/1"},
            "$defs": {"A": {"properties": {"b": {"anyOf": [NUMBER, STRING]}}}},
        },
        {"items": {"$ref": "#/$defs/1"}, "$defs": {"1": STRING}},
    ),
    "definitions further inside, two of one name": (
        {
            "properties": {
                "a": {"$defs": {"T": STRING}, "items": {"$ref": "#/$defs/T"}},
                "b": {"definitions": {"T": NUMBER}, "items": {"$ref": "#/definitions/T"}},
            }
        },
        {
            "properties": {
                "a": {"items": {"$ref": "#/$defs/T"}},
                "b": {"items": {"$ref": "#/$defs/T_1"}},
            },
            "$defs": {"T": STRING, "T_1": NUMBER},
        },
    ),
    "OpenAPI's components": (
        {
            "$ref": "#/components/schemas/E",
            "components": {"schemas": {"E": {"items": {"$ref": "#/components/schemas/E"}}}},
        },
        {"$ref": "#/$defs/E", "$defs": {"E": {"items": {"$ref": "#/$defs/E"}}}},
    ),
    "an anchor and an id": (
        {
            "prefixItems": [{"$ref": "#Foo"}, {"$ref": "https://example.com/n"}],
            "$defs": {"a": {"$anchor": "Foo", "enum": [1]}, "b": {"$id": "https://example.com/n"}},
        },
        {
            "prefixItems": [{"$ref": "#/$defs/Foo"}, {"$ref": "#/$defs/n"}],
            "$defs": {
                "Foo": {"$anchor": "Foo", "enum": [1]},
                "n": {"$id": "https://example.com/n"},
            },
        },
    ),
    "a name that is written in another way": (
        {"items": {"$ref": "#/%24defs/A~1B"}, "$defs": {"A/B": STRING}},
        {"items": {"$ref": "#/$defs/A_1B"}, "$defs": {"A_1B": STRING}},
    ),
    "nothing": (
        {"items": {"$ref": "https://example.com/x.json"}},
        {"items": {"description": "See https://example.com/x.json"}},
    ),
    "nothing, and a description": (
        {"items": {"$ref": "#/properties/x", "description": "d"}},
        {"items": {"description": "d"}},
    ),
}


@pytest.mark.parametrize("schema, geminis", REFERENCES.values(), ids=list(REFERENCES))
def test_references_lead_to_definitions_at_the_top_wherever_they_led(schema, geminis):
    before = json.dumps(schema)
    assert proxy.gemini_schema(schema) == geminis
    assert json.dumps(schema) == before


def test_references_into_one_another_do_not_multiply_a_schema():
    schema = NUMBER
    for _ in range(60):
        schema = {"properties": {"a": schema}}
    places = ["#" + "/properties/a" * i for i in range(1, 60)]
    schema["anyOf"] = [{"$ref": place} for place in places]
    assert len(json.dumps(proxy.gemini_schema(schema))) < 3 * len(json.dumps(schema))


NAMES = ["3d_map", "a b", "a b!", "x" * 65, "x" * 66, "ключ"]


@pytest.mark.parametrize("name", NAMES)
def test_a_function_name_that_gemini_would_refuse_becomes_one_that_it_takes(name):
    assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}", proxy.gemini_name(name))


def test_function_names_stay_apart():
    assert len({proxy.gemini_name(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", ["ok_name", "a.b"])
def test_a_function_name_that_gemini_takes_stays(name):
    assert proxy.gemini_name(name) == name


def refused_call():
    history = [u("q"), m(call_with("old"))]
    config = {"thinkingConfig": {"thinkingLevel": "LOW"}, "topK": 3}
    return proxy.generate_call(proxy.model_of("gemini-9"), False, [], history, config)


def test_a_refused_setting_is_left_out_of_a_second_attempt():
    call = refused_call()
    message = "Thinking level LOW is not supported for this model."
    second, names = proxy.repaired(call, message)
    assert names == ["thinkingConfig"]
    assert second.body["generationConfig"] == {"topK": 3}
    assert "thinkingConfig" in call.body["generationConfig"]


@pytest.mark.parametrize(
    "level, next_level", [("XHIGH", "HIGH"), ("MEDIUM", "HIGH"), ("MINIMAL", "LOW")]
)
def test_the_next_level_takes_the_place_of_a_refused_one(level, next_level):
    call = refused_call()
    call.body["generationConfig"]["thinkingConfig"]["thinkingLevel"] = level
    message = f"Thinking level {level} is not supported for this model. Please retry."
    second, names = proxy.repaired(call, message)
    assert names == ["thinkingLevel"]
    assert second.body["generationConfig"]["thinkingConfig"] == {"thinkingLevel": next_level}


def test_a_refused_signature_becomes_the_placeholder():
    message = "Unable to submit request because Thought signature is not valid."
    second, names = proxy.repaired(refused_call(), message)
    assert (second, names) == proxy.repaired(refused_call(), "Invalid thought signature.")
    assert names == ["thoughtSignature"]
    (part,) = second.body["contents"][1]["parts"]
    assert part["thoughtSignature"] == proxy.PLACEHOLDER


def test_ids_of_tool_calls_are_left_out_where_they_are_refused():
    parts = [{"functionCall": {"id": "a", "name": "f", "args": {"id": 1}}}]
    parts.append({"functionResponse": {"id": "a", "name": "f", "response": {"id": 2}}})
    call = proxy.GeminiCall("m", {"contents": [{"role": "user", "parts": parts}]})
    message = "Invalid JSON payload received. Unknown name \"id\" at 'contents[1].parts[0].function_call': Cannot find field."
    second, names = proxy.repaired(call, message)
    assert names == ["tool_call_id"]
    assert second.body["contents"][0]["parts"] == [
        {"functionCall": {"name": "f", "args": {"id": 1}}},
        {"functionResponse": {"name": "f", "response": {"id": 2}}},
    ]


def test_a_refused_prefill_gets_a_turn_of_the_users():
    second, names = proxy.repaired(
        refused_call(), "Requests ending with a model turn are not supported."
    )
    assert names == ["prefill"]
    assert second.body["contents"][-1] == u("Continue.")


def test_both_penalties_are_left_out_since_the_refusal_names_neither():
    config = {"presencePenalty": 1, "frequencyPenalty": 1, "topK": 3}
    call = proxy.generate_call(proxy.model_of(FLASH), False, [], [u("q")], config)
    second, names = proxy.repaired(call, "Penalty is not enabled for this model")
    assert names == ["presencePenalty", "frequencyPenalty"]
    assert second.body["generationConfig"] == {"topK": 3}


def test_a_refusal_that_names_nothing_has_no_second_attempt():
    message = "Request contains an invalid argument."
    assert proxy.repaired(refused_call(), message) == (None, [])


@pytest.mark.parametrize("mixed", [False, True])
def test_remote_mcp_servers_that_are_refused_are_left_out_and_named(mixed):
    body = {"contents": [u("Hi")], "tools": [{"mcpServers": [{}]}]}
    if mixed:
        body["tools"].insert(0, {"functionDeclarations": []})
        body["toolConfig"] = {"includeServerSideToolInvocations": True}
    call, names = proxy.repaired(proxy.GeminiCall("x", body), "mcp_servers is not supported")
    assert names == ["mcp"]
    assert call.body["tools"] == body["tools"][:-1]
    assert not call.body.get("toolConfig")


@pytest.mark.parametrize(
    "key, value, name, message",
    [
        ("temperature", 1, "temperature", "temperature is not supported for this model"),
        ("topP", 0.5, "top_p", "The field generation_config.top_p is deprecated."),
        ("topP", 0.5, "top_p", "topP is not supported"),
        ("topK", 3, "top_k", "Unsupported parameter: top_k"),
        ("seed", 7, "seed", "seed is not supported for this model"),
        (
            *("maxOutputTokens", 65536, "max_tokens"),
            "it has a maxOutputTokens value of 65536 but the supported range is from 1 to 32768",
        ),
        ("stopSequences", ["x"], "stop", "stop_sequences is not supported"),
        ("stopSequences", ["x"], "stop", "Stop sequences are not enabled for this model"),
    ],
)
def test_a_sampling_setting_that_a_model_refuses_is_left_out_and_named(key, value, name, message):
    config = {"responseMimeType": "text/plain", key: value}
    call = proxy.generate_call(proxy.model_of(NEWEST), False, [], [u("q")], config)
    second, names = proxy.repaired(call, message)
    assert names == [name]
    assert second.body["generationConfig"] == {"responseMimeType": "text/plain"}
    assert proxy.repaired(second, message) == (None, [])


BARE = "Request contains an invalid argument."
STATES = "The specified schema produces a constraint that has too many states for serving."
LOOPS = "ref loops are only supported if the ref is in a non-required property"
LIST = {"type": "array", "items": {"type": "string", "pattern": "a+"}, "maxItems": 999}
LOOSE_LIST = {"type": "array", "items": {"type": "string"}}


def call_with_schemas(parameters=None, answer=None, system=()):
    fields, config = {}, {}
    if parameters:
        tools = proxy.Tools()
        tools.declare(Fields({}), "f", "Does it.", parameters)
        fields["tools"] = [{"functionDeclarations": list(tools.declared.values())}]
    if answer:
        schema = proxy.gemini_schema(answer)
        config = {"responseMimeType": "application/json", "responseJsonSchema": schema}
    parts = [{"text": text} for text in system]
    return proxy.generate_call(proxy.model_of(NEWEST), False, parts, [u("q")], config, **fields)


def parameters_of(call):
    return call.body["tools"][0]["functionDeclarations"][0]["parametersJsonSchema"]


@pytest.mark.parametrize("message", [BARE, STATES, "Invalid schema for response"])
def test_a_refused_schema_loses_its_bounds(message):
    schema = {"type": "object", "properties": {"maxItems": LIST}}
    call = call_with_schemas(schema, {"properties": {"b": {"type": "number", "minimum": 1}}})
    second, names = proxy.repaired(call, message)
    assert names == ["schema.maxItems", "schema.minimum", "schema.pattern"]
    assert parameters_of(second) == {"type": "object", "properties": {"maxItems": LOOSE_LIST}}
    answer = second.body["generationConfig"]["responseJsonSchema"]
    assert answer == {"properties": {"b": {"type": "number"}}}
    assert parameters_of(call) == schema


@pytest.mark.parametrize("message", [BARE, STATES])
def test_a_schema_that_is_refused_without_bounds_too_is_put_in_words(message):
    call = call_with_schemas({"properties": {"a": LIST}}, {"properties": {"b": LIST}}, ["Hi."])
    second, _ = proxy.repaired(call, message)
    third, names = proxy.repaired(second, message)
    assert names == ["schema"]
    assert third.left_out == ("schema.maxItems", "schema.pattern", "schema")
    (entry,) = third.body["tools"][0]["functionDeclarations"]
    loose = json.dumps({"properties": {"a": LOOSE_LIST}}, separators=(",", ":"))
    words = f"Does it.\nThe arguments must conform to this JSON Schema:\n{loose}"
    assert entry["description"] == words
    outline = {"type": "object", "properties": {"a": {"type": "array"}}}
    assert entry["parametersJsonSchema"] == outline
    assert third.body["generationConfig"] == {"responseMimeType": "application/json"}
    words_for_it = proxy.json_words({"properties": {"b": LOOSE_LIST}})
    assert third.body["systemInstruction"]["parts"] == [{"text": "Hi."}, words_for_it]


def test_a_bare_refusal_of_schemas_without_bounds_is_about_something_else():
    call = call_with_schemas({"properties": {"a": LOOSE_LIST}})
    assert proxy.repaired(call, BARE) == (None, [])


def test_a_schema_that_requires_a_loop_no_longer_requires_it():
    node = {
        "properties": {"value": STRING, "next": {"anyOf": [{"$ref": "#/$defs/node"}, STRING]}},
        "required": ["value", "next"],
    }
    schema = {"properties": {"list": {"$ref": "#/$defs/node"}}, "required": ["list"]}
    second, names = proxy.repaired(
        call_with_schemas(answer={**schema, "$defs": {"node": node}}), LOOPS
    )
    assert names == ["schema.required"]
    answer = second.body["generationConfig"]["responseJsonSchema"]
    assert answer == {**schema, "$defs": {"node": {**node, "required": ["value"]}}}


def definitions_that_require(edges):
    """A schema whose definitions require one another, and the repaired one's requirements."""
    definitions = {
        name: {
            "properties": {other: {"$ref": f"#/$defs/{other}"} for other in others},
            "required": [*others],
        }
        for name, others in edges.items()
    }
    call = call_with_schemas(answer={"$ref": "#/$defs/a", "$defs": definitions})
    second, _ = proxy.repaired(call, LOOPS)
    repaired = second.body["generationConfig"]["responseJsonSchema"]["$defs"]
    return {name: repaired[name]["required"] for name in edges}


def test_only_what_leads_back_is_no_longer_required():
    edges = {"a": "bd", "b": "ce", "c": "af", "d": "e", "e": "", "f": "fg", "g": "e"}
    left = {"a": ["d"], "b": ["e"], "c": ["f"], "d": ["e"], "e": [], "f": ["g"], "g": ["e"]}
    assert definitions_that_require(edges) == left


def test_thousands_of_definitions_that_loop_take_time_in_proportion():
    names = ["a", *map(str, range(3000))]
    edges = {name: [names[i * 7 % 3001], names[i - 1]] for i, name in enumerate(names)}
    assert cpu_seconds(lambda: definitions_that_require(edges)) < 2


def call_with(signature):
    return proxy.call_part("f", {}, None, sign(signature))


def digest_of(*contents, call=("f", {"a": 1, "b": [2]}), system="", scope="key"):
    conversation = proxy.ConversationDigest(
        {"systemInstruction": {"parts": [{"text": system}]}}, scope
    )
    for content in contents:
        conversation.turn(content)
    return conversation.call(*call)


def test_a_digest_is_the_same_however_a_client_writes_the_arguments():
    assert digest_of(u("q"), call=("f", {"b": [2.0], "a": 1})) == digest_of(u("q"))
    with_empty_ones = {"a": 1, "b": [2], "c": None, "d": ""}
    assert digest_of(u("q"), call=("f", with_empty_ones)) == digest_of(u("q"))


@pytest.mark.parametrize(
    "digest",
    [
        digest_of(u("other")),
        digest_of(u("q"), system="s"),
        digest_of(u("q"), scope="another key"),
        digest_of(u("q"), call=("g", {"a": 1, "b": [2]})),
        digest_of(u("q"), call=("f", {"a": 2, "b": [2]})),
    ],
)
def test_a_digest_ties_a_call_to_its_conversation_and_key(digest):
    assert digest != digest_of(u("q"))


def test_equal_calls_of_one_turn_have_digests_of_their_own():
    conversation = proxy.ConversationDigest({}, "key")
    assert conversation.call("f", {}) != conversation.call("f", {})


def test_a_digest_does_without_ids_and_signatures_which_clients_drop():
    with_ids = [u("q"), m(fc("f", "id-1")), u(answer_to("f", {}, "id-1"))]
    with_signatures = [u("q"), m(call_with("s")), u(answer_to("f", {}))]
    assert digest_of(*with_ids) == digest_of(*with_signatures)


def history_call(*contents, model=NEWEST, **fields):
    return proxy.GeminiCall("x", {"contents": list(contents), **fields}, proxy.model_of(model))


def known_call(signature, *before):
    return proxy.ToolCall("f", {}, signature, before=before)


def test_a_history_has_a_digest_for_each_of_its_tool_calls_in_order():
    calls = proxy.digested_calls(
        history_call(
            u("q"), m(fc("f", "1"), fc("g")), u(fr("f", ""), fr("g", "")), m(fc("f", "2"))
        ),
        "",
    )
    assert [(item.id, item.name) for item, _ in calls] == [
        ("1", "f"),
        ("", "g"),
        ("2", "f"),
    ]
    assert len({digest for _, digest in calls}) == 3


@pytest.mark.parametrize(
    "known, signature, origin",
    [
        (known_call(sign("known")), sign("known"), "memory"),
        (known_call(None), proxy.PLACEHOLDER, "placeholder"),
    ],
)
def test_a_tool_call_without_signature_gets_the_known_one_or_the_placeholder(
    known, signature, origin
):
    call, origins = proxy.restore_signatures(history_call(u("q"), m(fc("f"))), [known])
    assert call.body["contents"][1]["parts"][0]["thoughtSignature"] == signature
    assert origins == [origin]


def test_a_signature_of_the_clients_goes_before_a_known_one():
    call = history_call(u("q"), m(call_with("mine")))
    restored, origins = proxy.restore_signatures(call, [known_call(sign("known"))])
    assert restored.body == call.body
    assert origins == ["client"]


def test_only_the_first_call_of_a_turn_gets_the_placeholder():
    call, origins = proxy.restore_signatures(history_call(u("q"), m(fc("f"), fc("g")), m(fc("h"))))
    parts = [part for content in call.body["contents"][1:] for part in content["parts"]]
    assert ["thoughtSignature" in part for part in parts] == [True, False, True]
    assert origins == ["placeholder", "placeholder"]


def test_a_model_that_signs_nothing_needs_no_placeholder():
    call = history_call(u("q"), m(fc("f")), model=FLASH)
    assert proxy.restore_signatures(call) == (call, [])


@pytest.mark.parametrize("mixed, parts", [(True, 2), (False, 1)])
def test_parts_of_geminis_own_tools_come_back_where_the_request_has_such_tools(mixed, parts):
    known = known_call(sign("s"), {"toolCall": {"id": "t"}})
    config = {"includeServerSideToolInvocations": mixed}
    call, _ = proxy.restore_signatures(history_call(u("q"), m(fc("f")), toolConfig=config), [known])
    assert len(call.body["contents"][1]["parts"]) == parts


def test_an_enum_beside_an_any_of_becomes_an_all_of():
    schema = proxy.gemini_schema({"anyOf": [{"type": "string"}], "enum": ["a", None]})
    assert schema == {
        "allOf": [{"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, {"anyOf": [{"type": "string"}]}]
    }


@pytest.mark.parametrize("count, calls", [(2048, 21), (1, 1)])
def test_inputs_of_embeddings_are_sent_a_hundred_at_a_time(count, calls):
    model = proxy.model_of("gemini-embedding-2")
    assert len(proxy.embed_calls(model, ["a"] * count, None)) == calls


def test_more_inputs_of_embeddings_than_openai_takes_are_a_400():
    with pytest.raises(ProxyError, match="maximum length 2048") as caught:
        proxy.embed_calls(proxy.model_of("gemini-embedding-001"), ["a"] * 2049, None)
    assert (caught.value.status, caught.value.path) == (400, "input")


# ======================================================================================
# 4. Reading Gemini
# ======================================================================================

EVENTS = [chunk("Straße €"), chunk("a\u2028b\x85c"), whole("!")]


def event_stream(end):
    gap = end[: len(end) // 2]
    events = [json.dumps(event, ensure_ascii=False) for event in EVENTS]
    return "".join(f": hi{gap}event: x{gap}data:{event}{end}" for event in events).encode()


ENDS = ["\n\n", "\r\n\r\n", "\r\r"]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("end", ENDS)
def test_an_event_stream_may_be_cut_anywhere(size, end):
    raw = event_stream(end)
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert list(proxy.read_sse(blocks)) == EVENTS


@pytest.mark.parametrize("end", ENDS)
def test_an_event_stream_may_begin_with_a_bom_and_end_without_a_line_end(end):
    raw = b"\xef\xbb\xbf" + event_stream(end).rstrip()
    assert list(proxy.read_sse([raw])) == EVENTS


def test_an_event_may_have_several_data_lines():
    raw = event_stream("\n\n").replace(b", ", b",\ndata: ", 1)
    assert list(proxy.read_sse([raw])) == EVENTS


def test_an_empty_block_ends_no_line():
    blocks = [b"a\r", b"", b"\nb", b"", b"c"]
    assert list(proxy.read_lines(blocks)) == [b"a", b"bc"]


SHED = {"error": {"code": 503, "message": "shed", "status": "UNAVAILABLE"}}


@pytest.mark.parametrize(
    "tail, status, words",
    [
        (b"data: " + json.dumps(SHED).encode() + b"\n\n", 503, "shed"),
        (json.dumps(SHED, indent=2).encode(), 503, "shed"),
        (b"[" + json.dumps(SHED, indent=2).encode() + b"]", 503, "shed"),
        (b"data: {oops\n\n", 502, "no sense"),
        (b"data: null\n\n", 502, "no sense"),
        (b"<html>", 502, "no sense"),
        (b'data: {"candidates": [{"con', 502, "no sense"),
    ],
)
def test_an_error_in_a_stream_is_raised_after_what_came_before(tail, status, words):
    events = proxy.read_sse([b"data: " + json.dumps(EVENTS[0]).encode() + b"\n\n", tail])
    assert next(events) == EVENTS[0]
    with pytest.raises(ProxyError, match=words) as caught:
        list(events)
    assert caught.value.status == status


def detail(kind, **fields):
    return {"@type": f"type.googleapis.com/google.rpc.{kind}", **fields}


def error_body(code, message, *details):
    return {"error": {"code": code, "message": message, "status": "X", "details": list(details)}}


@pytest.mark.parametrize(
    "status, answer, seen",
    [
        (
            400,
            error_body(
                400,
                "API key not valid. Please pass a valid API key.",
                detail("ErrorInfo", reason="API_KEY_INVALID"),
            ),
            (401, "invalid_api_key", {}),
        ),
        (400, error_body(400, "Bad field"), (400, None, {})),
        (401, error_body(401, "no"), (401, "invalid_api_key", {})),
        (403, error_body(403, "no"), (403, None, {})),
        (404, error_body(404, "models/x is not found"), (404, "model_not_found", {})),
        (302, None, (502, None, {})),
        (503, error_body(503, "busy"), (503, None, {})),
        (
            429,
            error_body(429, "Quota", detail("RetryInfo", retryDelay="6.2s")),
            (429, "rate_limit_exceeded", {"Retry-After": "7"}),
        ),
        (
            429,
            error_body(429, "Please retry in 48.9s."),
            (429, "rate_limit_exceeded", {"Retry-After": "49"}),
        ),
        (
            429,
            error_body(429, "Please retry in 120.5ms."),
            (429, "rate_limit_exceeded", {"Retry-After": "1"}),
        ),
        (
            429,
            error_body(429, "Q", detail("RetryInfo", retryDelay="1e9s")),
            (429, "rate_limit_exceeded", {}),
        ),
        (
            429,
            error_body(
                429, "Q", detail("QuotaFailure", violations=[{"quotaId": "RequestsPerDayPerModel"}])
            ),
            (429, "insufficient_quota", {"x-should-retry": "false"}),
        ),
        (
            400,
            error_body(400, "The input token count exceeds the maximum number of tokens allowed"),
            (400, "context_length_exceeded", {}),
        ),
        (400, [error_body(400, "in a list")], (400, None, {})),
        (500, "text", (500, None, {})),
        (418, {"error": {"message": 7}}, (418, None, {})),
    ],
)
def test_a_refusal_keeps_its_class_and_gets_openais_word_and_a_time_to_wait(status, answer, seen):
    error = proxy.gemini_refusal(status, answer)
    assert (error.status, error.code, error.headers) == seen
    assert error.message


@pytest.mark.parametrize(
    "form, counted, words",
    [
        (
            proxy.openai_error,
            (
                "This model's maximum context length is 1048576 tokens. "
                "However, your messages resulted in 1200000 tokens."
            ),
            "This model's maximum context length is exceeded.",
        ),
        (
            proxy.ollama_error,
            "prompt too long; exceeded max context length by 151424 tokens",
            "prompt too long; exceeded max context length",
        ),
        (
            proxy.anthropic_error,
            "prompt is too long: 1200000 tokens > 1048576 maximum",
            "prompt is too long",
        ),
    ],
)
def test_a_prompt_that_is_too_long_is_said_in_the_words_that_clients_look_for(form, counted, words):
    maximum = "exceeds the maximum number of tokens allowed"
    with_numbers = f"The input token count (1200000) {maximum} (1048576)."
    without = f"The input token count {maximum} 1048576."
    endless = f"The input token count {'9' * 5000} {maximum}."
    for message, seen in ((with_numbers, counted), (without, words), (endless, words)):
        _, body = form(ProxyError(400, message, code="context_length_exceeded"))
        error = body["error"]
        assert (error if isinstance(error, str) else error["message"]) == f"{seen} ({message})"


@pytest.mark.parametrize(
    "status, answer, retry_after",
    [
        (503, error_body(503, "busy"), 0.0),
        (429, error_body(429, "Quota", detail("RetryInfo", retryDelay="6.2s")), 6.2),
        (429, error_body(429, "Please retry in 120.5ms."), 0.1205),
        (429, error_body(429, "limit: 0, retry in 2s"), None),
        (400, error_body(400, "Bad field"), None),
    ],
)
def test_a_refusal_says_whether_another_attempt_makes_sense(status, answer, retry_after):
    assert proxy.gemini_refusal(status, answer).retry_after == retry_after


def test_text_and_thoughts_come_in_order_and_calls_last():
    events = read(
        chunk({"text": "Hm", "thought": True}, "A"),
        chunk(call("f", {"a": 1}, "s"), "B"),
        chunk("", finish="STOP", usage=USAGE),
    )
    made = ToolCall("f", {"a": 1}, sign("s"), "call_1")
    assert events == [
        Text("Hm", True),
        Text("A"),
        Text("B"),
        made,
        End("stop", (made,), "STOP", "", Usage(prompt=4, output=7, thoughts=2), []),
    ]


def test_a_whole_answer_is_a_stream_of_one_chunk():
    one = read(whole({"text": "Hm", "thought": True}, "A", call("f")))
    many = read(
        chunk({"text": "Hm", "thought": True}),
        chunk("A", finish="STOP"),
        chunk(call("f"), usage={"promptTokenCount": 9}),
        whole(""),
    )
    assert one == many


def test_a_call_that_geminis_servers_answered_is_not_the_clients():
    events = read(
        chunk(call("theirs"), {"functionResponse": {"name": "theirs", "response": {}}}),
        whole("Done."),
    )
    assert [type(event) for event in events] == [Text, End]
    assert not events[-1].calls


@pytest.mark.parametrize(
    "reason, finish",
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "filter"),
        ("MALFORMED_FUNCTION_CALL", "failed"),
        ("SOMETHING_NEW", "stop"),
        (2, "length"),
    ],
)
def test_a_finish_reason_is_one_of_four_words_and_keeps_its_message(reason, finish):
    end = read(whole("Hm", finish=reason, finishMessage="why"))[-1]
    assert (end.finish, end.message) == (finish, "why")


def test_a_blocked_prompt_is_a_filtered_end():
    assert read({"promptFeedback": {"blockReason": "OTHER"}})[-1][:3] == ("filter", (), "OTHER")


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [{}],
        [{"candidates": []}],
        [chunk("half")],
        [{"candidates": [7]}],
        [{"candidates": {}}],
        [chunk(7, finish="STOP")],
        [whole({"text": 7})],
        [whole({"functionCall": []})],
    ],
)
def test_an_answer_without_end_or_sense_is_a_502(chunks):
    with pytest.raises(ProxyError) as caught:
        read(*chunks)
    assert caught.value.status == 502


def test_usage_counts_thoughts_as_output_and_tool_results_as_prompt():
    usage = proxy.read_usage(
        {
            "promptTokenCount": 100,
            "cachedContentTokenCount": 60,
            "toolUsePromptTokenCount": 5,
            "candidatesTokenCount": 7,
            "thoughtsTokenCount": 30,
            "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 9}],
        }
    )
    assert usage == Usage(prompt=105, cached=60, output=37, thoughts=30, audio_input=9)


@pytest.mark.parametrize("detail", [None, 7, "AUDIO", [], {"modality": "AUDIO", "tokenCount": "x"}])
def test_counts_by_modality_that_make_no_sense_count_nothing(detail):
    usage = {"promptTokenCount": 3, "promptTokensDetails": [detail]}
    assert proxy.read_usage(usage) == Usage(prompt=3)


def test_citations_count_characters_and_not_bytes():
    text, cited = "Blåbær er blå. Røde roser også. Å ja!", "Røde roser også."
    begin = len(text[: text.index(cited)].encode())
    grounding = {
        "groundingChunks": [{"web": {"uri": "https://a.example/", "title": "a"}}, {"web": {}}],
        "groundingSupports": [
            {
                "segment": {"startIndex": begin, "endIndex": begin + len(cited.encode())},
                "groundingChunkIndices": [0, 1, 9],
            }
        ],
    }
    code = {"executableCode": {"language": "PYTHON", "code": "1"}}
    events = read(
        chunk(text[:5], groundingMetadata={}),
        chunk(code, text[5:]),
        chunk("", finish="STOP", groundingMetadata=grounding),
    )
    answer = "".join(event.text for event in events[:-1])
    (citation,) = events[-1].citations
    assert answer[citation.start : citation.end] == cited
    assert (citation.url, citation.title) == ("https://a.example/", "a")
    assert answer == text[:5] + "\n```python\n1\n```\n" + text[5:]


def test_a_byte_of_geminis_text_has_its_character_in_the_answer():
    pieces = [("[code]", False), ("Ærø", True), ("[more]", False), ("日本", True)]
    text = proxy.CitedText(pieces)
    places = [text.character(i) for i in range(15)]
    assert places == [6, 6, 7, 8, 8, 9, 9, 9, 16, 16, 16, 17, 17, 17, 17]


@pytest.mark.parametrize("data", [b"data: " + b"x" * 2000, b"data: x\n" * 400, b"odd\n" * 600])
def test_an_event_of_a_stream_is_bounded(data, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ANSWER_BYTES", 1000)
    with pytest.raises(ProxyError, match="more than"):
        list(proxy.read_sse([data[i : i + 100] for i in range(0, len(data), 100)]))


def test_the_last_signature_of_a_text_is_read():
    signed = {"text": "", "thoughtSignature": sign("b")}
    events = read(chunk({"text": "Hi", "thoughtSignature": sign("a")}), chunk("!"), whole(signed))
    assert events[-1].signature == sign("b")


def test_a_text_without_a_signature_has_none():
    assert read(whole("Hi", {"text": "!", "thoughtSignature": "@"}))[-1].signature == ""


@pytest.mark.parametrize(
    "blocks",
    [
        [b"a\r", b"\n", b"\nb\n"],
        [b"a\r\n\nb\n"],
        [b"a\r", b"\n\nb\n"],
        [b"a\r\n", b"\nb", b"\n"],
    ],
)
def test_blocks_cut_between_cr_and_lf_are_the_same_lines(blocks):
    assert list(proxy.read_lines(blocks)) == [b"a", b"", b"b"]


def test_citations_begin_and_end_at_characters_and_within_the_text():
    cited = proxy.CitedText([("aé", True), ("[code]", False), ("ü", True)])
    assert [cited.character(i) for i in range(7)] == [0, 1, 1, 2, 2, 9, 9]


def test_thousands_of_citations_take_time_in_proportion():
    sources = [{"web": {"uri": "https://a.example/"}}]
    spans = [{"startIndex": 700_000 + i * 8, "endIndex": 700_008 + i * 8} for i in range(20_000)]
    supports = [{"segment": span, "groundingChunkIndices": [0]} for span in spans]
    grounding = {"groundingChunks": sources, "groundingSupports": supports}
    pieces = [("wörter " * 130_000, True)]
    assert cpu_seconds(lambda: proxy.read_citations(pieces, grounding)) < 2


READ_PAGE = {
    "retrievedUrl": "https://a.example/1",
    "urlRetrievalStatus": "URL_RETRIEVAL_STATUS_SUCCESS",
}


def test_a_page_that_gemini_has_read_is_a_source_of_the_whole_answer():
    failed = {
        "retrievedUrl": "https://b.example",
        "urlRetrievalStatus": "URL_RETRIEVAL_STATUS_ERROR",
    }
    pages = {"urlMetadata": [READ_PAGE, failed, READ_PAGE, None]}
    end = read(chunk("Two "), whole("words", urlContextMetadata=pages))[-1]
    assert end.citations == [proxy.Citation(0, 9, *[READ_PAGE["retrievedUrl"]] * 2)]


def test_a_page_that_is_cited_is_not_named_again():
    grounding = {
        "groundingChunks": [{"web": {"uri": READ_PAGE["retrievedUrl"], "title": "One"}}],
        "groundingSupports": [{"segment": {"endIndex": 3}, "groundingChunkIndices": [0]}],
    }
    pages = {"urlMetadata": [READ_PAGE]}
    end = read(whole("Two words", groundingMetadata=grounding, urlContextMetadata=pages))[-1]
    assert end.citations == [proxy.Citation(0, 3, READ_PAGE["retrievedUrl"], "One")]


# ======================================================================================
# 5. Conversation
# ======================================================================================


def blob(mime, data):
    return {"inlineData": {"mimeType": mime, "data": data}}


def anthropic_image(label, data):
    source = {"type": "base64", "media_type": label, "data": data}
    return {"type": "image", "source": source}


def image_bodies(label, data):
    """A question with this image, in each dialect: (its request, the place, the body)."""
    url = f"data:{label};base64,{data}"
    link = {"type": "image_url", "image_url": {"url": url}}
    openai, anthropic = proxy.openai_chat_request, proxy.anthropic_messages_request
    responses, ollama = proxy.openai_responses_request, proxy.ollama_chat_request
    place = "messages[].content[]"
    return {
        "chat": (openai, f"{place}.image_url.url", chat(user([link]))),
        "Responses": (
            responses,
            "input[].content[].image_url",
            {"model": FLASH, "input": [user([{"type": "input_image", "image_url": url}])]},
        ),
        "Ollama": (ollama, "messages[].images[]", chat({**user(""), "images": [data]})),
        "Anthropic": (
            anthropic,
            f"{place}.source.data",
            chat(user([anthropic_image(label, data)]), max_tokens=9),
        ),
    }


GIF, JPEG = (base64.b64encode(data).decode() for data in (b"GIF89a", b"\xff\xd8\xff\xe0"))
DIALECTS = list(image_bodies("", ""))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_image_with_a_wrong_label_gets_the_right_one_in_every_dialect(dialect):
    request, _, body = image_bodies("image/png", JPEG)[dialect]
    plan, ignored = plan_and_ignored(body, request)
    assert plan.calls[0].body["contents"] == [u(blob("image/jpeg", JPEG))]
    assert ignored == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_words_stand_in_the_place_of_a_gif_in_every_dialect(dialect):
    request, place, body = image_bodies("image/png", GIF)[dialect]
    plan, ignored = plan_and_ignored(body, request)
    words = "[A file of type image/gif was left out: Gemini cannot read it.]"
    assert plan.calls[0].body["contents"] == [u(words)]
    assert ignored == [f"{place} (image/gif)"]


def test_words_stand_in_the_place_of_a_gif_in_a_tools_result():
    link = {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{GIF}"}}
    body = chat(
        user("q"),
        assistant(None, tool_calls=[tool_call("a", "look", "{}")]),
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "Here:"}, link]},
    )
    words = "Here:\n[A file of type image/gif was left out: Gemini cannot read it.]"
    assert gemini_body(body)["contents"][2] == u(answer_to("look", {"output": words}, "a"))


def deep_call_bodies(arguments):
    """A history with a call of these arguments, in each dialect: (its request, the place, body)."""
    entry = tool_call("a", "f", json.dumps(arguments))
    item = {
        "type": "function_call",
        "call_id": "a",
        "name": "f",
        "arguments": json.dumps(arguments),
    }
    ollama_entry = {"function": {"name": "f", "arguments": arguments}}
    block = {"type": "tool_use", "id": "a", "name": "f", "input": arguments}
    place = "messages[0].tool_calls[0].function.arguments"
    return {
        "chat": (proxy.openai_chat_request, place, chat(assistant(None, tool_calls=[entry]))),
        "Responses": (
            proxy.openai_responses_request,
            "input[0].arguments",
            {"model": FLASH, "input": [item]},
        ),
        "Ollama": (
            proxy.ollama_chat_request,
            place,
            chat(assistant("", tool_calls=[ollama_entry])),
        ),
        "Anthropic": (
            proxy.anthropic_messages_request,
            "messages[0].content[0].input",
            chat(assistant([block]), max_tokens=9),
        ),
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_deeply_nested_arguments_are_a_400_at_their_place_in_every_dialect(dialect):
    request, place, body = deep_call_bodies(json.loads(NESTED))[dialect]
    error = refused(body, request)
    assert (error.status, error.path) == (400, place)


@pytest.mark.parametrize("model", [NEWEST, FLASH])
def test_an_image_from_a_tool_stands_in_its_result_or_beside_it(model):
    content = [
        {"type": "text", "text": "Here:"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
    ]
    body = chat(
        user("q"),
        assistant(None, tool_calls=[tool_call("a", "look", "{}")]),
        {"role": "tool", "tool_call_id": "a", "content": content},
        model=model,
    )
    contents = gemini_body(body)["contents"]
    parts = contents[-1]["parts"]
    if model == NEWEST:
        parts = contents[2]["parts"][0]["functionResponse"]["parts"]
    assert parts == [{"inlineData": {"mimeType": "image/png", "data": PNG}}]


@pytest.mark.parametrize(
    "signature, carrier",
    [
        ("s", {"extra_content": {"google": {"thought_signature": sign("s")}}}),
        ("s", {"provider_specific_fields": {"thought_signature": sign("s")}}),
        ("a longer one", {"id": "call_1__thought__" + sign("a longer one")}),
        ("a longer one", {"id": "call_1_ts_" + sign("a longer one")}),
        (
            "s",
            {"function": {"name": "weather", "arguments": "{}", "thought_signature": sign("s")}},
        ),
    ],
)
def test_signatures_that_clients_and_other_proxies_kept_are_restored(signature, carrier):
    client_call = {**tool_call("call_1", "weather", "{}"), **carrier}
    result = {"role": "tool", "tool_call_id": client_call["id"], "content": "ok"}
    body = gemini_body(chat(user("q"), assistant(None, tool_calls=[client_call]), result))
    part = body["contents"][1]["parts"][0]
    assert part["thoughtSignature"] == sign(signature)
    assert part["functionCall"]["id"] == "call_1"


@pytest.mark.parametrize(
    "model, most", [(NEWEST, 65536), ("gemini-2.0-flash", 8192), ("gemma-4-31b-it", 32768)]
)
@pytest.mark.parametrize(
    "request_of, body",
    [
        (proxy.openai_chat_request, chat(max_tokens=128000)),
        (proxy.openai_chat_request, chat(max_completion_tokens=128000)),
        (proxy.openai_responses_request, {"input": "q", "max_output_tokens": 128000}),
        (proxy.openai_completions_request, {"prompt": "q", "max_tokens": 128000}),
        (proxy.ollama_chat_request, chat(options={"num_predict": 128000})),
        (proxy.anthropic_messages_request, chat(max_tokens=128000)),
    ],
)
def test_a_limit_above_a_models_own_is_the_models_own_and_named(request_of, body, model, most):
    body = {**body, "model": model}
    config = gemini_body(body, request=request_of)["generationConfig"]
    assert config["maxOutputTokens"] == most
    (name,) = {*body, *(f"options.{key}" for key in body.get("options", ()))} & proxy.LIMIT_FIELDS
    assert f"{name}>{most}" in plan_and_ignored(body, request_of)[1]


def test_tools_of_all_forms_become_declarations_once_each():
    now = {"type": "function", "function": {"name": "now"}}
    sql = {"type": "custom", "custom": {"name": "sql"}}
    body = chat(tools=[WEATHER, now, sql, CLOCK["function"], WEATHER])
    declarations = gemini_body(body)["tools"][0]["functionDeclarations"]
    assert declarations[0] == {
        "name": "weather",
        "description": "The weather",
        "parametersJsonSchema": WEATHER["function"]["parameters"],
    }
    assert declarations[1] == {"name": "now"}
    assert [d["name"] for d in declarations] == ["weather", "now", "sql", "clock"]


def test_search_and_functions_go_together_only_on_gemini_3():
    new = gemini_body(chat(model=NEWEST, tools=[WEATHER], web_search_options={}))
    assert new["tools"][1] == {"googleSearch": {}}
    assert new["toolConfig"] == {"includeServerSideToolInvocations": True}
    assert plan_and_ignored(chat(tools=[WEATHER], web_search_options={}))[1] == [
        "web_search_options"
    ]


def test_a_search_without_functions_goes_to_every_model():
    assert gemini_body(chat(web_search_options={}))["tools"] == [{"googleSearch": {}}]


@pytest.mark.parametrize(
    "thinking, ignored",
    [
        ({"thinking_level": "low"}, ["reasoning_effort"]),
        ({"thinking_budget": 99}, ["reasoning_effort"]),
        ({"include_thoughts": True}, []),
    ],
)
def test_an_effort_that_a_setting_of_googles_outdoes_is_named_as_ignored(thinking, ignored):
    google = {"google": {"thinking_config": thinking}}
    body = chat(model=NEWEST, reasoning_effort="high", extra_body=google)
    assert plan_and_ignored(body)[1] == ignored


SCHEMA_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "schema": {"type": "object", "properties": {"kind": {"const": "a"}}},
        "strict": True,
    },
}


def test_a_schema_becomes_the_settings_of_a_json_answer():
    config = {
        "responseMimeType": "application/json",
        "responseJsonSchema": {"type": "object", "properties": {"kind": {"enum": ["a"]}}},
    }
    assert gemini_body(chat(response_format=SCHEMA_FORMAT))["generationConfig"] == config
    beside_tools = chat(model=NEWEST, tools=[WEATHER], response_format=SCHEMA_FORMAT)
    assert gemini_body(beside_tools)["generationConfig"] == config


def test_json_without_a_schema_is_asked_for_by_its_mime_type():
    body = gemini_body(chat(response_format={"type": "json_object"}))
    assert body["generationConfig"] == {"responseMimeType": "application/json"}


def test_json_beside_tools_is_asked_for_in_words_before_gemini_3():
    body = gemini_body(chat(tools=[WEATHER], response_format=SCHEMA_FORMAT))
    assert "generationConfig" not in body
    assert '"kind"' in body["systemInstruction"]["parts"][0]["text"]


def test_json_that_was_asked_for_in_words_loses_its_fence():
    answer, events = respond(
        chat(tools=[WEATHER], response_format=SCHEMA_FORMAT, stream=True),
        [chunk("```json\n"), whole('{"kind":"a"}\n```')],
    )
    assert answer["choices"][0]["message"]["content"] == '{"kind":"a"}'
    assert [d["content"] for d in deltas(events) if d.get("content")] == ['{"kind":"a"}']


def test_without_parallel_calls_only_the_first_one_is_passed_on():
    answer, events = respond(
        chat(tools=[WEATHER], parallel_tool_calls=False, stream=True),
        [whole(call("weather"), call("weather"))],
    )
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert len([d for d in deltas(events) if "tool_calls" in d]) == 1


@pytest.mark.parametrize(
    "path, key",
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/responses", "input"),
        ("/v1/messages", "messages"),
        ("/api/chat", "messages"),
    ],
)
def test_mere_texts_and_other_messages_keep_their_order(path, key, gemini):
    rich = {"role": "user", "content": [{"type": "text", "text": "two"}]}
    if path == "/v1/responses":
        rich["content"][0]["type"] = "input_text"
    messages = [user("one"), rich, assistant("three"), user(""), user("four"), user("five")]
    body = {"model": "gemini-2.5-flash", "max_tokens": 9, key: messages, "stream": False}
    with serving(gemini.url, "openai" if path.startswith("/v1/") else "ollama") as server:
        assert post(server, path, body)[0] == 200
        assert gemini.bodies[-1]["contents"] == [u("one", "two"), m("three"), u("four", "five")]
        for bad in ("six", {"role": "user", "content": 6}, {"role": "user", "content": {"a": 1}}):
            status, _, answer = post(server, path, {**body, key: [*messages, bad]})
            assert status == 400
            assert f"{key}[6]".encode() in answer


# ======================================================================================
# 6. OpenAI chat
# ======================================================================================


FULL_CHAT = chat(
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "And kind."}]},
    user(
        [
            {"type": "text", "text": "What is this?"},
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "high"},
            },
        ]
    ),
    assistant("A dot."),
    user("Sure?"),
    model=NEWEST,
    temperature=0,
    top_p=0.5,
    top_k=40,
    seed=2**40 + 17,
    stop="END",
    max_completion_tokens=100,
    reasoning_effort="low",
)
FULL_REQUEST = {
    "contents": [
        {
            "role": "user",
            "parts": [
                {"text": "What is this?"},
                {
                    "inlineData": {"mimeType": "image/png", "data": PNG},
                    "mediaResolution": {"level": "MEDIA_RESOLUTION_HIGH"},
                },
            ],
        },
        {"role": "model", "parts": [{"text": "A dot."}]},
        {"role": "user", "parts": [{"text": "Sure?"}]},
    ],
    "systemInstruction": {"parts": [{"text": "Be brief."}, {"text": "And kind."}]},
    "generationConfig": {
        "temperature": 0,
        "topP": 0.5,
        "topK": 40,
        "maxOutputTokens": 100,
        "seed": 17,
        "stopSequences": ["END"],
        "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
    },
}


def test_a_chat_becomes_a_request():
    plan, ignored = plan_and_ignored(FULL_CHAT)
    assert plan.calls[0].path == "models/gemini-3.8-flash:generateContent"
    assert not plan.stream
    assert ignored == []
    assert gemini_body(FULL_CHAT) == FULL_REQUEST


REMINDER = {"role": "system", "content": "The user is silent. Ask again."}
REMINDER_PARTS = ["<system>\n", "The user is silent. Ask again.", "\n</system>"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages_after_the_first_turn_stay_in_their_place(role):
    body = gemini_body(
        chat(
            {"role": "system", "content": "Be brief."},
            user("I want a shirt."),
            assistant("Which size?"),
            {**REMINDER, "role": role},
        )
    )
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert body["contents"] == [u("I want a shirt."), m("Which size?"), u(*REMINDER_PARTS)]


def test_a_system_message_before_the_results_of_calls_comes_after_them():
    calls = [tool_call("a", "weather", "{}")]
    result = {"role": "tool", "tool_call_id": "a", "content": "rain"}
    body = gemini_body(chat(user("q"), assistant(None, tool_calls=calls), REMINDER, result))
    answer = answer_to("weather", {"output": "rain"}, "a")
    assert body["contents"][2:] == [u(answer), u(*REMINDER_PARTS)]


def test_an_empty_system_message_after_the_first_turn_is_left_out():
    body = gemini_body(chat(user("Hi"), {"role": "system", "content": ""}))
    assert body["contents"] == [u("Hi")]


def test_a_history_with_tools():
    body = chat(
        user("q"),
        assistant(
            None,
            tool_calls=[
                tool_call("a", "weather", '{"city": "Oslo"}'),
                tool_call("b", "3d map", ""),
            ],
        ),
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "map"}]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        model=NEWEST,
        tools=[WEATHER],
    )
    (call,) = plan_and_ignored(body)[0].calls
    calls = proxy.digested_calls(call, "")
    signed, origins = proxy.restore_signatures(
        call, [known_call(sign("known") if item.id == "b" else None) for item, _ in calls]
    )
    assert origins == ["placeholder", "memory"]
    assert signed.body["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {
                    "functionCall": {"id": "a", "name": "weather", "args": {"city": "Oslo"}},
                    "thoughtSignature": proxy.PLACEHOLDER,
                },
                {
                    "functionCall": {"id": "b", "name": proxy.gemini_name("3d map"), "args": {}},
                    "thoughtSignature": sign("known"),
                },
            ],
        },
        {
            "role": "user",
            "parts": [
                answer_to("weather", {"output": "rain"}, "a"),
                answer_to(proxy.gemini_name("3d map"), {"output": "map"}, "b"),
            ],
        },
    ]


@pytest.mark.parametrize(
    "choice, config",
    [
        ("auto", None),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "ANY"}),
        ("any", {"mode": "ANY"}),
        ("validated", {"mode": "VALIDATED"}),
        (
            {"type": "function", "function": {"name": "clock"}},
            {"mode": "ANY", "allowedFunctionNames": ["clock"]},
        ),
        ({"type": "function", "name": "clock"}, {"mode": "ANY", "allowedFunctionNames": ["clock"]}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "clock"}}],
                },
            },
            {"mode": "ANY", "allowedFunctionNames": ["clock"]},
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "clock"}],
            },
            {"mode": "VALIDATED", "allowedFunctionNames": ["clock"]},
        ),
    ],
)
def test_choices_of_tools_become_geminis_modes(choice, config):
    assert (
        gemini_body(chat(tools=[WEATHER, CLOCK], tool_choice=choice))
        .get("toolConfig", {})
        .get("functionCallingConfig")
        == config
    )


def test_a_tool_choice_without_tools_is_no_error():
    for choice in ("auto", "none", "required"):
        assert "toolConfig" not in gemini_body(chat(tools=[], tool_choice=choice))
    assert plan_and_ignored(chat(tool_choice="required"))[1] == ["tool_choice"]


def test_a_named_choice_without_tools_is_ignored():
    plan, ignored = plan_and_ignored(
        chat(tool_choice={"type": "function", "function": {"name": "f"}})
    )
    assert ignored == ["tool_choice"]
    assert "toolConfig" not in plan.calls[0].body


@pytest.mark.parametrize(
    "tier, sent", [("flex", "flex"), ("priority", "priority"), ("fast", "priority"), ("auto", None)]
)
def test_service_tiers_have_geminis_names(tier, sent):
    assert gemini_body(chat(service_tier=tier)).get("serviceTier") == sent
    assert response_to({"service_tier": tier}, whole("Hi"))["service_tier"] == (sent or "default")


def test_googles_own_settings_pass():
    google = {
        "thinking_config": {"thinking_budget": 800, "include_thoughts": True},
        "cached_content": "cachedContents/x",
    }
    for more in ({"extra_body": {"google": google}}, {"google": google}):
        body = gemini_body(chat(**more))
        config = {"thinkingConfig": {"thinkingBudget": 800, "includeThoughts": True}}
        assert body["generationConfig"] == config
        assert body["cachedContent"] == "cachedContents/x"


def test_googles_own_settings_pass_in_camel_case_and_beside_an_empty_extra_body():
    google = {
        "thinkingConfig": {"thinkingBudget": 0, "includeThoughts": False},
        "cachedContent": "cachedContents/x",
        "safetySettings": [{"category": "C", "threshold": "T"}],
    }
    for more in ({"extra_body": {"google": google}}, {"extra_body": {}, "google": google}):
        body = gemini_body(chat(**more))
        config = {"thinkingConfig": {"thinkingBudget": 0, "includeThoughts": False}}
        assert body["generationConfig"] == config
        assert body["cachedContent"] == "cachedContents/x"
        assert body["safetySettings"] == google["safetySettings"]


@pytest.mark.parametrize("place", ["google", "extra_body", "top"])
def test_googles_settings_for_media_pass_and_stand_in_several_places(place):
    google = {
        "media_resolution": "low",
        "image_config": {"aspect_ratio": "16:9", "image_size": "2K"},
        "safety_settings": [{"category": "C", "threshold": "T"}],
    }
    places = {"google": {"google": google}, "extra_body": {"extra_body": {"google": google}}}
    plan, ignored = plan_and_ignored(chat(**places.get(place, google)))
    body = plan.calls[0].body
    assert ignored == []
    assert body["generationConfig"] == {
        "mediaResolution": "MEDIA_RESOLUTION_LOW",
        "imageConfig": {"aspectRatio": "16:9", "imageSize": "2K"},
    }
    assert body["safetySettings"] == google["safety_settings"]


def test_googles_tools_stand_in_its_own_settings_too():
    google = {"tools": [{"google_search": {}}, {"urlContext": {}}]}
    sent = gemini_body(chat(model=NEWEST, tools=[WEATHER], extra_body={"google": google}))
    assert [list(tool) for tool in sent["tools"]] == [
        ["functionDeclarations"],
        ["googleSearch"],
        ["urlContext"],
    ]


HOSTED_SPELLINGS = {
    "googleSearch": (
        "google_search",
        "googleSearch",
        "web_search",
        "web_search_preview_2025_03_11",
    ),
    "urlContext": ("url_context", "urlContext", "web_fetch_20250910"),
    "codeExecution": ("code_execution", "codeExecution", "code_interpreter"),
    "googleMaps": ("google_maps", "googleMaps"),
}


@pytest.mark.parametrize("key", HOSTED_SPELLINGS)
def test_googles_tools_have_a_name_in_every_dialect(key):
    for name in HOSTED_SPELLINGS[key]:
        for tool in ({"type": name}, {name: {}}):
            plans = (
                plan_and_ignored(chat(tools=[tool])),
                response_plan({"tools": [tool]}),
                plan_and_ignored(
                    claude_chat(tools=[tool]), proxy.anthropic_messages_request, CLAUDE
                ),
                plan_and_ignored(chat(tools=[tool]), proxy.ollama_chat_request, OLLAMA),
            )
            assert [plan.calls[0].body["tools"] for plan, _ in plans] == [[{key: {}}]] * 4
            assert [ignored for _, ignored in plans] == [[]] * 4


def test_the_settings_of_googles_tools_pass_in_its_own_spelling():
    times = {"startTime": "2026-01-01T00:00:00Z", "endTime": "2026-02-01T00:00:00Z"}
    tool = {"googleSearch": {"timeRangeFilter": times}}
    assert gemini_body(chat(tools=[tool, {"codeExecution": {}}]))["tools"] == [
        tool,
        {"codeExecution": {}},
    ]


@pytest.mark.parametrize("more", [{"tools": [{"type": "web_search"}]}, {"web_search_options": {}}])
@pytest.mark.parametrize("place", ["first", "google"])
def test_a_tool_of_googles_that_comes_twice_keeps_its_settings(more, place):
    settings = {"timeRangeFilter": {"startTime": "2026-01-01T00:00:00Z"}}
    tool = {"google_search": settings}
    tools = [tool, *more.get("tools", ())]
    body = {**more, "tools": tools}
    if place == "google":
        body = {**more, "extra_body": {"google": {"tools": [tool]}}}
    sent = plan_and_ignored(chat(**body))[0].calls[0].body
    assert sent["tools"] == [{"googleSearch": settings}]


@pytest.mark.parametrize(
    "path, tool",
    [("tools[0].name", {"strange": {}}), ("tools[0].googleSearch", {"googleSearch": 7})],
)
def test_a_tool_that_makes_no_sense_is_a_400_with_the_place(path, tool):
    assert refused(chat(tools=[tool])).path == path


def test_a_picture_that_code_drew_reaches_the_client():
    code = {"executableCode": {"language": "PYTHON", "code": "draw()"}}
    answer = [whole(code, {"codeExecutionResult": {"outcome": "OUTCOME_OK"}}, IMAGE, "Look.")]
    message = respond(chat(tools=[{"codeExecution": {}}]), answer)[0]["choices"][0]["message"]
    assert message["content"] == "\n```python\ndraw()\n```\nLook."
    assert message["images"][0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"


@pytest.mark.parametrize(
    "more, level, thoughts",
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "LOW", True),
        ({"thinking": {"type": "enabled", "budget_tokens": 9000}}, "HIGH", True),
        ({"thinking": {"type": "disabled"}}, "LOW", False),
        ({"thinking": {"budget_tokens": 0}}, "LOW", False),
        ({"reasoning": {"max_tokens": 1000}}, "LOW", True),
        ({"reasoning": {"max_tokens": 8000, "exclude": True}}, "MEDIUM", False),
        ({"reasoning": {"effort": "high", "exclude": True}}, "HIGH", False),
        ({"reasoning_effort": "high", "thinking": {"budget_tokens": 1}}, "HIGH", True),
    ],
)
def test_budgets_of_other_dialects_are_levels(more, level, thoughts):
    plan, ignored = plan_and_ignored(chat(model=NEWEST, **more))
    config = plan.calls[0].body["generationConfig"]["thinkingConfig"]
    assert config.pop("includeThoughts", False) is thoughts
    assert config == {"thinkingLevel": level}
    thinks_anyway = level == "LOW" and not thoughts
    assert ignored == ["thinking"] * thinks_anyway


@pytest.mark.parametrize(
    "more", [{"thinking": {"budget_tokens": 2000}}, {"reasoning": {"max_tokens": 2000}}]
)
def test_budgets_of_other_dialects_pass_to_models_that_think_by_budget(more):
    config = gemini_body(chat(**more))["generationConfig"]["thinkingConfig"]
    assert config == {"thinkingBudget": 2000, "includeThoughts": True}


def test_a_switch_for_thinking_that_is_no_object_is_named_as_ignored():
    assert plan_and_ignored(chat(thinking=True))[1] == ["thinking"]


@pytest.mark.parametrize("own", [{}, {"description": "Its own"}])
def test_the_description_of_a_schema_reaches_the_model(own):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, **own}
    named = {"name": "bill", "description": "In EUR", "strict": True, "schema": schema}
    plan, ignored = plan_and_ignored(
        chat(response_format={"type": "json_schema", "json_schema": named})
    )
    config = plan.calls[0].body["generationConfig"]
    assert config["responseJsonSchema"] == {"description": "In EUR", **schema}
    assert ignored == []


def test_the_body_of_a_response_is_taken_for_a_chat():
    """Cursor sends such bodies."""
    body = {
        "model": FLASH,
        "input": [user("Hi")],
        "max_output_tokens": 77,
        "text": {"format": {"type": "json_object"}},
    }
    plan, ignored = plan_and_ignored(body)
    assert plan.calls[0].body == {
        "contents": [u("Hi")],
        "generationConfig": {"maxOutputTokens": 77, "responseMimeType": "application/json"},
    }
    assert ignored == []


REFUSED = {  # what is wrong: (the place that the error names, the body)
    "no model": ("model", {"messages": [user("Hi")]}),
    "no messages": ("messages", {"model": FLASH}),
    "empty messages": ("messages", chat() | {"messages": []}),
    "a string": ("messages", chat() | {"messages": "Hi"}),
    "a number for a message": ("messages[1]", chat(user("Hi"), 7)),
    "an unknown role": ("messages[0].role", chat({"role": "wizard", "content": ""})),
    "no role": ("messages[0].role", chat({"content": "x"})),
    "content as a number": ("messages[0].content", chat(user(7))),
    "a part as a number": (
        "messages[0].content[1]",
        chat(user([{"type": "text", "text": "x"}, 7])),
    ),
    "an unknown part": ("messages[0].content[0].type", chat(user([{"type": "smell"}]))),
    "text that is none": (
        "messages[0].content[0].text",
        chat(user([{"type": "text", "text": {}}])),
    ),
    "bad base64": (
        "messages[0].content[0].image_url.url",
        chat(user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}}])),
    ),
    "a file id": (
        "messages[0].content[0].file.file_id",
        chat(user([{"type": "file", "file": {"file_id": "file-1"}}])),
    ),
    "calls as a number": ("messages[0].tool_calls", chat(assistant(None, tool_calls=7))),
    "a function as a number": (
        "messages[0].tool_calls[0].function",
        chat(assistant(None, tool_calls=[{"id": "a", "function": 7}])),
    ),
    "tools as a number": ("tools", chat(tools=7)),
    "a nameless function": (
        "tools[0].function.name",
        chat(tools=[{"type": "function", "function": {}}]),
    ),
    "an unknown choice": ("tool_choice", chat(tools=[WEATHER], tool_choice="perhaps")),
    "a choice of nobody": (
        "tool_choice.function.name",
        chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "nobody"}}),
    ),
    "an unknown format": ("response_format.type", chat(response_format={"type": "poem"})),
    "temperature as a word": ("temperature", chat(temperature="hot")),
    "too hot": ("temperature", chat(temperature=2.5)),
    "n of none": ("n", chat(n=0)),
    "stop as an object": ("stop", chat(stop={})),
    "yes": ("stream", chat(stream="yes")),
    "seed as a word": ("seed", chat(seed="x")),
    "effort as a number": ("reasoning_effort", chat(reasoning_effort=7)),
    "an unknown effort": ("reasoning_effort", chat(reasoning_effort="extreme")),
    "no tokens": ("max_tokens", chat(max_tokens=0)),
    "an unknown modality": ("modalities", chat(modalities=["smell"])),
}


@pytest.mark.parametrize("path, body", REFUSED.values(), ids=list(REFUSED))
def test_bad_input_is_a_400_that_names_the_place(path, body):
    error = refused(body)
    assert (error.status, error.path) == (400, path)
    assert path in error.message
    status, answer = proxy.openai_error(error)
    assert status == 400
    assert answer["error"]["param"] == path
    assert answer["error"]["type"] == "invalid_request_error"


WHOLE_COMPLETION = {
    "id": "chatcmpl-2",
    "object": "chat.completion",
    "created": 1700000000,
    "model": FLASH,
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Let me look.",
                "refusal": None,
                "annotations": [],
                "reasoning_content": "Hm",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city":"Oslo"}'},
                        "extra_content": {"google": {"thought_signature": sign("s")}},
                    }
                ],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ],
    "usage": {
        "prompt_tokens": 4,
        "completion_tokens": 7,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 2,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    },
}


def test_a_whole_completion():
    answer, _ = respond(
        chat(tools=[WEATHER], reasoning_effort="low"),
        [
            whole(
                {"text": "Hm", "thought": True},
                "Let me ",
                "look.",
                call("weather", {"city": "Oslo"}, "s"),
            )
        ],
    )
    assert answer == WHOLE_COMPLETION


def chunk_of(delta, finish=None):
    """A chunk of a streamed completion that counts its tokens at the end."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": FLASH,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        "usage": None,
    }


WEATHER_DELTA = {
    "index": 0,
    "id": "call_2",
    "type": "function",
    "function": {"name": "weather", "arguments": "{}"},
    "extra_content": {"google": {"thought_signature": sign("s")}},
}
CLOCK_DELTA = {
    "index": 1,
    "id": "call_3",
    "type": "function",
    "function": {"name": "clock", "arguments": "{}"},
}


def test_a_streamed_completion():
    _, events = respond(
        chat(stream=True, tools=[WEATHER, CLOCK], stream_options={"include_usage": True}),
        [
            chunk({"text": "Hm", "thought": True}),
            chunk("Hel"),
            chunk(call("weather", {}, "s")),
            chunk(call("clock")),
            whole(""),
        ],
    )
    assert events[:-1] == [
        chunk_of({"role": "assistant", "content": ""}),
        chunk_of({"reasoning_content": "Hm"}),
        chunk_of({"content": "Hel"}),
        chunk_of({"tool_calls": [WEATHER_DELTA]}),
        chunk_of({"tool_calls": [CLOCK_DELTA]}),
        chunk_of({}, "tool_calls"),
    ]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 11


NOVEL = 'Så \\ "😀" ' * 5000  # more than 16 KB in any form


@pytest.mark.parametrize(
    "text", ["", "a", "a" * 16_000, "a" * 40_000, NOVEL, "\0" * 9000], ids=short_id
)
def test_texts_are_cut_into_deltas_of_16_kb_at_most(text):
    pieces = list(proxy.delta_pieces(text))
    assert "".join(pieces) == text
    assert all(len(proxy.encode_json(piece)) <= 16_000 for piece in pieces)
    assert len(pieces) <= 1 + len(proxy.encode_json(text)) // 7000


def test_a_text_that_fits_is_one_delta():
    assert list(proxy.delta_pieces("a" * 15_998)) == ["a" * 15_998]


def test_long_arguments_of_a_call_are_cut_into_deltas():
    answer = [whole(call("weather", {"city": NOVEL}, "s"), call("clock"))]
    _, events = respond(chat(stream=True, tools=[WEATHER, CLOCK]), answer)
    assert max(len(proxy.SSE.encode(event)) for event in events) < 40_000
    calls = [delta["tool_calls"][0] for delta in deltas(events) if "tool_calls" in delta]
    first, *more = [entry for entry in calls if entry["index"] == 0]
    assert first["id"] == "call_2"
    assert first["extra_content"] == {"google": {"thought_signature": sign("s")}}
    assert all(entry.keys() == {"index", "function"} for entry in more)
    assert all(entry["function"].keys() == {"arguments"} for entry in more)
    arguments = "".join(entry["function"]["arguments"] for entry in [first, *more])
    assert arguments == proxy.encode_json({"city": NOVEL})
    assert calls[-1]["function"] == {"name": "clock", "arguments": "{}"}


def test_the_long_input_of_a_custom_tool_is_cut_into_deltas():
    body = chat(stream=True, tools=[{"type": "custom", "custom": {"name": "sql"}}])
    _, events = respond(body, [whole(call("sql", {"input": NOVEL}))])
    calls = [delta["tool_calls"][0] for delta in deltas(events) if "tool_calls" in delta]
    assert len(calls) > 5
    assert "".join(entry["custom"]["input"] for entry in calls) == NOVEL


def test_long_arguments_of_a_legacy_function_are_cut_into_deltas():
    body = chat(functions=[WEATHER["function"]], stream=True)
    _, events = respond(body, [whole(call("weather", {"city": NOVEL}))])
    pieces = [delta["function_call"] for delta in deltas(events) if "function_call" in delta]
    assert [piece.get("name") for piece in pieces] == ["weather"] + [None] * (len(pieces) - 1)
    arguments = "".join(piece["arguments"] for piece in pieces)
    assert arguments == proxy.encode_json({"city": NOVEL})


def test_a_long_text_is_cut_into_deltas():
    _, events = respond(chat(stream=True), [whole(NOVEL)])
    assert max(len(proxy.SSE.encode(event)) for event in events) < 20_000
    assert "".join(delta.get("content") or "" for delta in deltas(events)) == NOVEL


@pytest.mark.parametrize(
    "last_chunk, content, finish",
    [
        (whole("Once", finish="MAX_TOKENS"), "Once", "length"),
        (whole(finish="MAX_TOKENS"), "", "length"),
        (whole("Take", finish="SAFETY"), "Take", "content_filter"),
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "", "content_filter"),
        (whole(finish="MALFORMED_FUNCTION_CALL", finishMessage="f("), "", "stop"),
        (whole("x", finish="OTHER"), "x", "stop"),
    ],
)
def test_geminis_finish_reasons_become_openais(last_chunk, content, finish):
    answer, events = respond(chat(stream=True), [last_chunk])
    choice = answer["choices"][0]
    assert choice["message"]["content"] == content
    assert choice["finish_reason"] == finish
    assert "".join(d.get("content") or "" for d in deltas(events)) == content
    assert events[-1]["choices"][0]["finish_reason"] == finish


def test_geminis_own_words_for_an_end_stay_readable():
    last_chunk = whole(finish="MALFORMED_FUNCTION_CALL", finishMessage="f(")
    assert respond(chat(), [last_chunk])[0]["choices"][0]["finish_message"] == "f("
    assert "finish_message" not in respond(chat(), [whole("x", finish="OTHER")])[0]["choices"][0]


def test_several_choices_are_several_calls():
    assert len(plan_and_ignored(chat(n=3))[0].calls) == 3
    answer, events = respond(chat(n=2, stream=True), [whole("One")], [whole("Two")])
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["One", "Two"]
    assert answer["usage"]["total_tokens"] == 22
    assert [event["choices"][0]["index"] for event in events] == [0, 0, 0, 1, 1, 1]


def test_legacy_functions_are_answered_with_a_function_call():
    body = chat(functions=[WEATHER["function"]], function_call={"name": "weather"}, stream=True)
    assert gemini_body(body)["toolConfig"]["functionCallingConfig"] == {
        "mode": "ANY",
        "allowedFunctionNames": ["weather"],
    }
    answer, events = respond(body, [whole(call("weather", {"city": "Oslo"}))])
    function_call = {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert answer["choices"][0]["message"]["function_call"] == function_call
    assert answer["choices"][0]["finish_reason"] == "function_call"
    assert {"function_call": function_call} in deltas(events)
    assert events[-1]["choices"][0]["finish_reason"] == "function_call"


def test_a_history_with_legacy_functions():
    history = chat(
        user("q"),
        assistant(None, function_call={"name": "weather", "arguments": "{}"}),
        {"role": "function", "name": "weather", "content": "rain"},
    )
    assert gemini_body(history)["contents"][2]["parts"] == [
        answer_to("weather", {"output": "rain"})
    ]


def test_the_grammar_of_a_custom_tool_stands_in_its_description():
    grammar = {"syntax": "lark", "definition": "start: X"}
    custom = {"name": "sql", "format": {"type": "grammar", "grammar": grammar}}
    body = gemini_body(chat(tools=[{"type": "custom", "custom": custom}]))
    assert "start: X" in body["tools"][0]["functionDeclarations"][0]["description"]


def test_a_call_of_a_custom_tool_goes_there_and_back():
    body = chat(tools=[{"type": "custom", "custom": {"name": "sql"}}])
    answer = respond(body, [whole(call("sql", {"input": "select 1"}))])[0]
    (client_call,) = answer["choices"][0]["message"]["tool_calls"]
    assert client_call == {
        "id": "call_1",
        "type": "custom",
        "custom": {"name": "sql", "input": "select 1"},
    }
    history = gemini_body(chat(user("q"), assistant(None, tool_calls=[client_call])))
    assert history["contents"][1]["parts"][0]["functionCall"]["args"] == {"input": "select 1"}


IMAGE_ENTRY = {
    "type": "image_url",
    "image_url": {"url": f"data:image/png;base64,{PNG}"},
    "index": 0,
}


def test_images_of_geminis_stand_beside_the_text():
    answer, events = respond(
        chat(stream=True, modalities=["text", "image"]), [whole("Here", blob("image/png", PNG))]
    )
    assert answer["choices"][0]["message"]["images"] == [IMAGE_ENTRY]
    assert {"images": [IMAGE_ENTRY]} in deltas(events)


def test_images_in_a_history_go_back():
    body = gemini_body(chat(assistant("", images=[IMAGE_ENTRY]), user("Redder")))
    assert body["contents"][1]["parts"] == [blob("image/png", PNG)]


def test_an_answer_in_audio_is_wav_unless_it_is_streamed():
    body = chat(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})
    assert gemini_body(body)["generationConfig"] == {
        "responseModalities": ["AUDIO"],
        "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Kore"}}},
    }
    samples = base64.b64encode(b"\1\2").decode()
    answer = respond(body, [whole(blob("audio/L16;rate=24000", samples))])[0]
    audio = answer["choices"][0]["message"]["audio"]
    assert base64.b64decode(audio["data"]).startswith(b"RIFF")
    events = respond({**body, "stream": True}, [whole(blob("audio/L16;rate=24000", samples))])[1]
    assert {"audio": {"data": samples, "id": "audio_2"}} in deltas(events)


def test_every_script_survives():
    answer, events = respond(chat(user(SCRIPTS), stream=True), [*map(chunk, SCRIPTS), whole("")])
    assert answer["choices"][0]["message"]["content"] == SCRIPTS
    assert "".join(d.get("content") or "" for d in deltas(events)) == SCRIPTS
    assert gemini_body(chat(user(SCRIPTS)))["contents"] == [u(SCRIPTS)]


def test_ollama_takes_numbers_that_openai_refuses():
    body = chat(max_tokens=-1, temperature=3, top_p=1.5)
    config = (
        plan_and_ignored(body, context=Context(ollama=True))[0].calls[0].body["generationConfig"]
    )
    assert "maxOutputTokens" not in config
    assert (config["temperature"], config["topP"]) == (2, 1)
    with pytest.raises(ProxyError, match="max_tokens"):
        plan_and_ignored(body)


def test_a_function_name_with_a_space_keeps_its_signature(server, gemini):
    tool = {"type": "function", "function": {"name": "my tool"}}
    gemini.say(whole(call("my_tool", {}, "s")))
    answer = json.loads(post(server, body=chat(model=NEWEST, tools=[tool]))[2])
    message = kept(answer["choices"][0]["message"])
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"}
    post(server, body=chat(user("Hi"), message, result, model=NEWEST, tools=[tool]))
    assert gemini.bodies[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("s")


# ======================================================================================
# 7. OpenAI's other endpoints
# ======================================================================================

PCM_SAMPLES = bytes(range(8))
AUDIO = blob("audio/L16;codec=pcm;rate=24000", base64.b64encode(PCM_SAMPLES).decode())
RIFF = proxy.wav_file(PCM_SAMPLES, "")


def endpoint(name, body, *answers):
    """(the whole answer, the events) of one of OpenAI's endpoints; the stand-in must find nothing
    wrong with its calls."""
    route = openai_route("/v1/" + name)
    plan = plan_and_ignored(body, route.request)[0]
    for call in plan.calls:
        assert refusal_of("/v1beta/" + call.path, call.body) is None
    answer = whole_of(route, exchange(plan), *answers)
    if not plan.stream:
        return answer, []
    return answer, stream_of(route, exchange(plan), *answers)


def test_vectors_are_made_of_2048_inputs_at_most():
    body = {"model": EMBEDDER, "input": ["a"] * 2048}
    assert plan_and_ignored(body, proxy.openai_embeddings_request)[0].options.vectors == 2048
    error = refused({**body, "input": ["a"] * 2049}, proxy.openai_embeddings_request)
    assert (error.status, error.path) == (400, "input")
    assert error.code == "array_above_max_length"


def embed(body, *answers):
    plan = plan_and_ignored(body, proxy.openai_embeddings_request)[0]
    return proxy.openai_embeddings_response(exchange(plan), map(iter, answers))


TWO_TEXTS = {"model": EMBEDDER, "input": ["one", "two"], "dimensions": 2}
TWO_VECTORS = [{"embeddings": [{"values": [3, 4]}, {"values": [0.6, 0.8]}]}]


def test_texts_to_embed_become_a_batch_and_a_count():
    plan = plan_and_ignored(TWO_TEXTS, proxy.openai_embeddings_request)[0]
    verbs = [call.path.partition(":")[2] for call in plan.calls]
    assert verbs == ["batchEmbedContents", "countTokens"]
    assert plan.calls[0].body["requests"][1] == {
        "model": "models/gemini-embedding-001",
        "content": {"parts": [{"text": "two"}]},
        "outputDimensionality": 2,
    }


@pytest.mark.parametrize(
    "more, task",
    [
        ({"task_type": "RETRIEVAL_QUERY"}, "RETRIEVAL_QUERY"),
        ({"task_type": "code_retrieval_query"}, "CODE_RETRIEVAL_QUERY"),
        ({"input_type": "search_document"}, "RETRIEVAL_DOCUMENT"),
        ({"input_type": "passage"}, "RETRIEVAL_DOCUMENT"),
        ({"input_type": "query"}, "RETRIEVAL_QUERY"),
        ({"input_type": "strange"}, None),
        ({"input_type": "query", "model": "gemini-embedding-2"}, None),
    ],
)
def test_what_vectors_are_for_is_a_task_type_or_named_as_ignored(more, task):
    body = {**TWO_TEXTS, **more}
    plan, ignored = plan_and_ignored(body, proxy.openai_embeddings_request)
    requests = plan.calls[0].body["requests"]
    assert [request.get("taskType") for request in requests] == [task, task]
    assert ignored == ([] if task else ["input_type"])


def test_vectors_have_unit_length():
    assert embed(TWO_TEXTS, TWO_VECTORS, [{"totalTokens": 7}]) == {
        "object": "list",
        "model": EMBEDDER,
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]},
            {"object": "embedding", "index": 1, "embedding": [0.6, 0.8]},
        ],
    }


def test_vectors_in_base64_are_little_endian_floats():
    answer = embed({**TWO_TEXTS, "encoding_format": "base64"}, TWO_VECTORS, [{}])
    vector = struct.unpack("<2f", base64.b64decode(answer["data"][0]["embedding"]))
    assert vector == pytest.approx((0.6, 0.8))


def test_a_missing_vector_is_an_error():
    with pytest.raises(ProxyError, match="1 vectors for 2"):
        embed(TWO_TEXTS, [{"embeddings": [{"values": [1]}]}], [{}])


def test_many_texts_go_in_batches_in_order():
    texts = [str(i) for i in range(250)]
    body = {"model": "gemini-embedding-2", "input": texts}
    plan = plan_and_ignored(body, proxy.openai_embeddings_request)[0]
    batches = [call.body["requests"] for call in plan.calls]
    assert [len(batch) for batch in batches] == [100, 100, 50]
    sent = [request["content"]["parts"][0]["text"] for batch in batches for request in batch]
    assert sent == texts


@pytest.mark.parametrize(
    "path, more",
    [
        ("input", {"input": []}),
        ("input", {"input": [1, 2]}),
        ("input", {"input": [[1], [2]]}),
        ("input[1]", {"input": ["a", {}]}),
        ("input", {"input": ""}),
        ("encoding_format", {"encoding_format": "hex"}),
        ("dimensions", {"dimensions": -1}),
        ("input", {"input": None}),
        ("model", {"model": None}),
    ],
)
def test_what_cannot_be_embedded_is_a_400(path, more):
    assert (
        refused({"model": EMBEDDER, "input": "x", **more}, proxy.openai_embeddings_request).path
        == path
    )


def complete(*answers, **body):
    return endpoint("completions", {"model": FLASH, "prompt": "Once", **body}, *answers)


def test_a_legacy_completion():
    answer, events = complete(
        [chunk(" upon"), whole({"text": "Hm", "thought": True}, " a time")],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert answer == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1700000000,
        "model": FLASH,
        "usage": proxy.openai_usage(Usage(4, 0, 7, 2)),
        "choices": [
            {"text": " upon a time", "index": 0, "logprobs": None, "finish_reason": "stop"}
        ],
    }
    assert [(c["text"], c["finish_reason"]) for event in events for c in event["choices"]] == [
        (" upon", None),
        (" a time", None),
        ("", "stop"),
    ]
    assert [event["usage"] for event in events] == [None, None, None, answer["usage"]]
    assert events[-1]["choices"] == []


def test_a_completion_that_gemini_refuses_ends_with_content_filter():
    answer = complete([whole("", finish="SAFETY")])[0]
    assert answer["choices"][0]["finish_reason"] == "content_filter"


def test_several_prompts_with_several_choices_and_their_echoes():
    answers = [[whole(letter)] for letter in "abcd"]
    answer, events = complete(*answers, prompt=["A", "B"], n=2, echo=True, stream=True)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "Aa"),
        (1, "Ab"),
        (2, "Bc"),
        (3, "Bd"),
    ]
    assert answer["usage"]["total_tokens"] == 44
    assert [event["choices"][0]["text"] for event in events][:4] == ["Aa", "", "Ab", ""]


@pytest.mark.parametrize("prompt", ["x" * 2**20, ["x" * 2**18] * 4], ids=short_id)
def test_several_choices_repeat_a_short_prompt_only(prompt):
    body = {"model": FLASH, "prompt": prompt, "echo": True}
    plan = plan_and_ignored({**body, "n": 4}, proxy.openai_completions_request)[0]
    assert sum(map(len, plan.options.echoes)) == 2**22
    error = refused({**body, "n": 5}, proxy.openai_completions_request)
    assert (error.status, error.path) == (400, "echo")


def test_one_choice_may_repeat_a_long_prompt():
    body = {"model": FLASH, "prompt": "x" * 5_000_000, "echo": True}
    plan = plan_and_ignored(body, proxy.openai_completions_request)[0]
    assert plan.options.echoes == (body["prompt"],)


def completion(**body):
    return gemini_body(
        {"model": FLASH, "prompt": "Once", **body}, request=proxy.openai_completions_request
    )


def test_the_settings_of_a_completion_go_to_gemini():
    config = {"temperature": 0.5, "stopSequences": ["END"]}
    assert completion(stop="END", temperature=0.5)["generationConfig"] == config


def test_a_completion_with_a_limit_thinks_as_little_as_it_can():
    config = {"maxOutputTokens": 16, "thinkingConfig": {"thinkingBudget": 0}}
    assert completion(max_tokens=16)["generationConfig"] == config
    config = completion(reasoning_effort="low", max_tokens=16)["generationConfig"]
    assert config["thinkingConfig"] == {"thinkingBudget": 1024}


def test_a_completion_with_a_suffix_fills_a_gap():
    body = completion(prompt="def f(", suffix="return 1")
    assert body["contents"] == [u("<before>def f(</before><gap/><after>return 1</after>")]
    assert "gap" in body["systemInstruction"]["parts"][0]["text"]


def test_a_completion_without_a_prompt_goes_on_from_nothing():
    assert completion(prompt=None)["contents"] == [u("")]


def test_what_a_completion_cannot_do_is_named_as_ignored():
    body = {"model": FLASH, "prompt": "x", "best_of": 3, "logprobs": 2, "user": "u"}
    ignored = plan_and_ignored(body, proxy.openai_completions_request)[1]
    assert ignored == ["best_of", "logprobs", "user"]


@pytest.mark.parametrize(
    "path, more",
    [
        ("prompt", {"prompt": {}}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [1, 2]}),
        ("prompt", {"prompt": [[1], [2]]}),
        ("prompt[1]", {"prompt": ["a", {}]}),
        ("prompt", {"prompt": ["a"] * 2, "n": 100}),
        ("n", {"n": 0}),
        ("model", {"model": None}),
        ("suffix", {"suffix": 7}),
        ("best_of", {"best_of": 21}),
        ("max_tokens", {"max_tokens": "many"}),
    ],
)
def test_what_cannot_be_completed_is_a_400(path, more):
    assert (
        refused({"model": FLASH, "prompt": "x", **more}, proxy.openai_completions_request).path
        == path
    )


def draw(*answers, **body):
    return endpoint(
        "images/generations",
        {"model": "gemini-2.5-flash-image", "prompt": "A dot", **body},
        *answers,
    )


IMAGE_USAGE = {
    "input_tokens": 4,
    "input_tokens_details": {"text_tokens": 4, "image_tokens": 0},
    "output_tokens": 7,
    "total_tokens": 11,
}


def test_images_are_answered_in_base64():
    answers = [whole("Here:", blob("image/png", PNG))], [whole(blob("image/png", PNG))]
    assert draw(*answers, n=2)[0] == {
        "created": 1700000000,
        "data": [{"b64_json": PNG}] * 2,
        "output_format": "png",
        "usage": {
            **IMAGE_USAGE,
            "input_tokens": 8,
            "input_tokens_details": {"text_tokens": 8, "image_tokens": 0},
            "output_tokens": 14,
            "total_tokens": 22,
        },
    }


def test_streamed_images_are_one_event_each():
    answers = [whole("Here:", blob("image/png", PNG))], [whole(blob("image/png", PNG))]
    event = {
        "type": "image_generation.completed",
        "b64_json": PNG,
        "created_at": 1700000000,
        "size": "auto",
        "quality": "auto",
        "background": "auto",
        "output_format": "png",
        "usage": IMAGE_USAGE,
    }
    assert draw(*answers, n=2, stream=True)[1] == [event, event]


def edit(*answers, **body):
    body = {"model": "gemini-2.5-flash-image", "prompt": "A dot", "image": PNG_UPLOAD, **body}
    return endpoint("images/edits", body, *answers)


PNG_UPLOAD = proxy.Upload("dot.png", "image/png", base64.b64decode(PNG))
PNG_LINK = f"data:image/png;base64,{PNG}"
DOT = {"inlineData": {"mimeType": "image/png", "data": PNG}}
LINK_PART = {"fileData": {"fileUri": "https://example.com/a.png", "mimeType": "image/png"}}


@pytest.mark.parametrize(
    "images, parts",
    [
        ({"image": PNG_UPLOAD}, [DOT]),
        ({"image": [PNG_UPLOAD, PNG_UPLOAD]}, [DOT, DOT]),
        ({"image": PNG_LINK}, [DOT]),
        (
            {"images": [{"image_url": PNG_LINK}, {"image_url": "https://example.com/a.png"}]},
            [DOT, LINK_PART],
        ),
        ({"images": [PNG_LINK]}, [DOT]),
    ],
)
def test_the_images_to_edit_stand_before_the_prompt(images, parts):
    body = {"prompt": "Redder", "size": "1024x1024", "mask": PNG_UPLOAD, "n": "2", **images}
    plan, ignored = plan_and_ignored(body, proxy.openai_edits_request)
    assert plan.calls[0].body["contents"] == [u(*parts, "Redder")]
    assert plan.calls[0].body["generationConfig"]["imageConfig"] == {"aspectRatio": "1:1"}
    assert len(plan.calls) == 2
    assert ignored == ["mask"]


def test_an_edited_image_is_answered_as_openais():
    usage = {**USAGE, "promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 3}]}
    answer, events = edit([whole(blob("image/png", PNG), usage=usage)], stream="true")
    counts = {**IMAGE_USAGE, "input_tokens_details": {"text_tokens": 1, "image_tokens": 3}}
    assert answer["usage"] == counts
    assert events[0]["type"] == "image_edit.completed"
    assert events[0]["usage"] == counts


@pytest.mark.parametrize(
    "path, more",
    [
        ("image", {"image": None}),
        ("image", {"image": []}),
        ("image", {"image": proxy.Upload("a.png", "image/png", b"")}),
        ("image", {"image": proxy.Upload("a.txt", "text/plain", b"Hi")}),
        ("image[1]", {"image": [PNG_UPLOAD, proxy.Upload("a.gif", "", b"GIF89a")]}),
        ("image[0]", {"image": [7]}),
        ("image", {"image": "http://127.0.0.1/a.png"}),
        ("images[0].file_id", {"images": [{"file_id": "file-1"}]}),
        ("images[0].image_url", {"images": [{}]}),
        ("prompt", {"prompt": " "}),
        ("n", {"n": "11"}),
    ],
)
def test_what_cannot_be_edited_is_a_400_with_the_place(path, more):
    body = {"prompt": "x", "image": PNG_UPLOAD, **more}
    assert refused(body, proxy.openai_edits_request).path == path


@pytest.mark.parametrize("as_form", [True, False])
def test_edits_come_in_forms_and_in_json(server, gemini, as_form):
    gemini.say(whole(blob("image/png", PNG)))
    raw, content_type = form(
        ("image[]", "a.png", "image/png", PNG_UPLOAD.data),
        ("image[]", "b.png", "image/png", PNG_UPLOAD.data),
        ("prompt", "Redder"),
    )
    if not as_form:
        body = {"images": [{"image_url": PNG_LINK}] * 2, "prompt": "Redder"}
        raw, content_type = json.dumps(body).encode(), "application/json"
    with RawClient(server) as client:
        headers = {"Content-Type": content_type}
        status, _, answer = client.request("POST", "/v1/images/edits", raw, **headers)
    assert (status, json.loads(answer)["data"]) == (200, [{"b64_json": PNG}])
    assert gemini.bodies[-1]["contents"] == [u(DOT, DOT, "Redder")]


@pytest.mark.parametrize("more", [{"response_format": "url"}, {"model": "dall-e-2"}])
def test_images_are_answered_in_data_urls_where_the_client_wants_urls(more):
    answer = draw([whole(blob("image/jpeg", "AAAA"))], **more)[0]
    assert answer["data"] == [{"url": "data:image/jpeg;base64,AAAA"}]


def test_one_image_of_two_is_no_error():
    answer = draw([whole(finish="NO_IMAGE")], [whole(blob("image/png", PNG))], n=2)[0]
    assert len(answer["data"]) == 1


@pytest.mark.parametrize(
    "size, model, config",
    [
        (None, FLASH, {}),
        ("auto", FLASH, {}),
        ("1024x1024", FLASH, {"imageConfig": {"aspectRatio": "1:1"}}),
        ("1792x1024", FLASH, {"imageConfig": {"aspectRatio": "16:9"}}),
        ("1024X1536", NEWEST, {"imageConfig": {"aspectRatio": "2:3"}}),
        ("256x256", NEWEST, {"imageConfig": {"aspectRatio": "1:1"}}),
        ("2048x2048", NEWEST, {"imageConfig": {"aspectRatio": "1:1", "imageSize": "2K"}}),
        ("4096x2304", NEWEST, {"imageConfig": {"aspectRatio": "16:9", "imageSize": "4K"}}),
        ("4096x2304", FLASH, {"imageConfig": {"aspectRatio": "16:9"}}),
        ("9999x10", FLASH, {"imageConfig": {"aspectRatio": "21:9"}}),
    ],
)
def test_sizes_become_the_nearest_ratio(size, model, config):
    body = {"model": model, "prompt": "A dot", "size": size}
    sent = gemini_body(body, request=proxy.openai_images_request)["generationConfig"]
    assert sent == {"responseModalities": ["IMAGE"], **config}


@pytest.mark.parametrize(
    "last_chunk, code, words",
    [
        (
            whole(finish="IMAGE_SAFETY", finishMessage="Too grim."),
            "content_policy_violation",
            r"IMAGE_SAFETY\): Too grim",
        ),
        (whole("I would rather not."), None, "I would rather not"),
        (
            {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
            "content_policy_violation",
            "PROHIBITED_CONTENT",
        ),
    ],
)
def test_an_image_that_is_not_drawn_is_an_error(last_chunk, code, words):
    with pytest.raises(ProxyError, match=words) as caught:
        draw([last_chunk])
    assert (caught.value.status, caught.value.code) == (400, code)


def test_what_has_no_effect_on_an_image_is_named_as_ignored():
    body = {
        "model": NEWEST,
        "prompt": "A dot",
        "quality": "high",
        "background": "transparent",
        "style": "vivid",
        "output_format": "webp",
        "user": "u",
        "partial_images": 2,
    }
    ignored = plan_and_ignored(body, proxy.openai_images_request)[1]
    assert ignored == [
        "background",
        "output_format",
        "partial_images",
        "quality",
        "style",
        "user",
    ]


def test_defaults_of_an_image_are_not_named_as_ignored():
    absent = dict.fromkeys(["background", "style", "user", "partial_images", "size", "n"])
    body = {"model": NEWEST, "prompt": "x", "quality": "auto", "output_format": "jpeg", **absent}
    assert plan_and_ignored(body, proxy.openai_images_request)[1] == []


def speak(*chunks, **body):
    return endpoint(
        "audio/speech",
        {"model": "gemini-3.8-flash-tts", "input": "Hello", "voice": "nova", **body},
        list(chunks),
    )


TWO_PIECES = [chunk(AUDIO), whole(AUDIO)]


def test_speech_is_wav_whatever_other_format_the_client_wants():
    wav = proxy.Payload(proxy.wav_file(PCM_SAMPLES * 2, ""), "audio/wav")
    assert speak(*TWO_PIECES, response_format="wav")[0] == wav
    assert speak(*TWO_PIECES)[0] == wav


def test_speech_in_pcm_is_streamed_as_it_comes():
    answer, events = speak(*TWO_PIECES, response_format="pcm")
    assert answer == proxy.Payload(PCM_SAMPLES * 2, "audio/pcm")
    assert [*map(proxy.PCM.encode, events)] == [PCM_SAMPLES] * 2


def test_speech_in_events_begins_with_the_head_of_an_endless_wav():
    events = speak(*TWO_PIECES, stream_format="sse")[1]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.done"]
    first, second = (base64.b64decode(event["audio"]) for event in events[:2])
    assert first == RIFF[:4] + b"\xff" * 4 + RIFF[8:40] + b"\xff" * 4 + PCM_SAMPLES
    assert second == PCM_SAMPLES
    assert events[2]["usage"] == {"input_tokens": 4, "output_tokens": 7, "total_tokens": 11}


def test_speech_in_events_of_pcm_has_no_head():
    events = speak(*TWO_PIECES, stream_format="sse", response_format="pcm")[1]
    assert events[0]["audio"] == AUDIO["inlineData"]["data"]


SPEECH_BODY = {
    "model": "tts-1",
    "input": "Hello",
    "voice": {"id": "nova"},
    "instructions": "Cheerfully",
    "speed": 2,
    "response_format": "opus",
}


def test_speech_asks_for_a_voice_and_a_manner():
    plan, ignored = plan_and_ignored(SPEECH_BODY, proxy.openai_speech_request)
    assert plan.calls[0].body == {
        "contents": [u("Cheerfully\n\nSay: Hello")],
        "generationConfig": {
            "responseModalities": ["AUDIO"],
            "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Zephyr"}}},
        },
    }
    assert ignored == ["response_format", "speed"]
    assert not plan.stream


def test_older_models_speak_all_at_once():
    older = {"model": "gemini-2.5-flash-preview-tts", "response_format": "pcm"}
    body = {**SPEECH_BODY, **older, "voice": "Kore", "speed": 1.0}
    plan, ignored = plan_and_ignored(body, proxy.openai_speech_request)
    assert not plan.stream
    assert not plan.calls[0].streaming
    assert ignored == []


def test_an_unknown_voice_is_named_as_ignored():
    body = {"model": "tts-1", "input": "Hello", "voice": "mine"}
    plan, ignored = plan_and_ignored(body, proxy.openai_speech_request)
    voice = plan.calls[0].body["generationConfig"]["speechConfig"]["voiceConfig"]
    assert voice == {"prebuiltVoiceConfig": {"voiceName": "Kore"}}
    assert ignored == ["response_format", "voice"]


@pytest.mark.parametrize("more", [{}, {"stream_format": "sse"}])
@pytest.mark.parametrize(
    "chunks", [[whole("No.")], [whole(finish="SAFETY")], [chunk(AUDIO), whole(finish="MAX_TOKENS")]]
)
def test_speech_that_is_not_whole_is_an_error(chunks, more):
    with pytest.raises(ProxyError, match="no whole speech"):
        speak(*chunks, **more)


PCM_BODY = {"model": "tts-1", "input": "Hello", "voice": "alloy", "response_format": "pcm"}


def test_bare_samples_on_the_wire(server, gemini):
    gemini.say([chunk(AUDIO), whole(AUDIO)])
    status, headers, audio = post(server, "/v1/audio/speech", PCM_BODY)
    assert (status, headers["content-type"]) == (200, "audio/pcm")
    assert audio == PCM_SAMPLES * 2


def test_speech_that_gemini_refuses_is_a_400_on_the_wire(server, gemini):
    gemini.say([whole("No.")])
    assert post(server, "/v1/audio/speech", PCM_BODY)[0] == 400


def test_bare_samples_that_fail_break_off(server, gemini):
    """No error can stand among the samples, and there is no end."""
    gemini.say([chunk(AUDIO), whole(finish="OTHER_SAFETY"), b"{"])
    with RawClient(server) as line, pytest.raises(ValueError):
        line.request("POST", "/v1/audio/speech", PCM_BODY)


def test_a_format_that_cannot_be_made_is_named_on_the_wire(server, gemini):
    gemini.say(whole(AUDIO))
    headers = post(server, "/v1/audio/speech", {**PCM_BODY, "response_format": "mp3"})[1]
    assert headers["content-type"] == "audio/wav"
    assert headers["x-proxy-ignored"] == "response_format"


def transcribe(chunks, name="audio/transcriptions", **body):
    file = proxy.Upload("a.wav", "audio/x-wav", RIFF)
    return endpoint(name, {"model": FLASH, "file": file, **body}, chunks)


def test_a_transcript_whole_and_streamed():
    details = [{"modality": "AUDIO", "tokenCount": 3}]
    last_chunk = whole("morgen.\n", usage={**USAGE, "promptTokensDetails": details})
    answer, events = transcribe([chunk(" God "), last_chunk], stream="true")
    usage = {
        "type": "tokens",
        "input_tokens": 4,
        "input_token_details": {"text_tokens": 1, "audio_tokens": 3},
        "output_tokens": 7,
        "total_tokens": 11,
    }
    assert answer == {"text": "God morgen.", "usage": usage}
    assert events == [
        {"type": "transcript.text.delta", "delta": " God "},
        {"type": "transcript.text.delta", "delta": "morgen.\n"},
        {"type": "transcript.text.done", "text": " God morgen.\n", "usage": usage},
    ]


def test_a_transcript_in_plain_text():
    assert transcribe([whole("Hei.")], response_format="text")[0] == proxy.Payload(b"Hei.\n")


def test_silence_has_an_empty_transcript():
    assert transcribe([whole("")])[0]["text"] == ""


@pytest.mark.parametrize("finish", ["RECITATION", "MAX_TOKENS"])
def test_a_transcript_that_is_not_whole_is_an_error(finish):
    with pytest.raises(ProxyError, match=finish):
        transcribe([whole("Yesterday", finish=finish)], stream="true")


TIMED = json.dumps(
    {
        "language": "english",
        "segments": [
            {"start": "00:00:01.5", "end": "00:02", "text": " Hello --> there.\n", "speaker": "A"},
            {"start": "1:01:01,25", "end": "3661", "text": "Bye.", "speaker": "B"},
        ],
    }
)


SUBTITLES = {
    "srt": """\
1
00:00:01,500 --> 00:00:02,000
Hello -> there.

2
01:01:01,250 --> 01:01:01,250
Bye.
""",
    "vtt": """\
WEBVTT

00:00:01.500 --> 00:00:02.000
Hello -> there.

01:01:01.250 --> 01:01:01.250
Bye.
""",
}


@pytest.mark.parametrize("form", SUBTITLES)
def test_a_transcript_as_subtitles(form):
    answer = transcribe([whole(TIMED)], response_format=form)[0]
    assert answer.data.decode() == SUBTITLES[form]


TIMED_BASE = {"task": "transcribe", "duration": 3661.25, "text": "Hello --> there. Bye."}


SURE = {
    "seek": 0,
    "tokens": [],
    "temperature": 0.0,
    "avg_logprob": 0.0,
    "compression_ratio": 1.0,
    "no_speech_prob": 0.0,
}


def test_a_transcript_with_segments_is_never_streamed():
    answer, events = transcribe([whole(TIMED)], response_format="verbose_json", stream="true")
    assert answer == {
        **TIMED_BASE,
        "language": "english",
        "segments": [
            {"id": 0, "start": 1.5, "end": 2.0, "text": "Hello --> there.", **SURE},
            {"id": 1, "start": 3661.25, "end": 3661.25, "text": "Bye.", **SURE},
        ],
        "usage": {"type": "duration", "seconds": 3662},
    }
    assert events == []


def test_a_transcript_with_speakers():
    fenced = whole("```json\n" + TIMED + "\n```")
    answer = transcribe([fenced], response_format="diarized_json")[0]
    assert {key: answer[key] for key in TIMED_BASE} == TIMED_BASE
    assert [(entry["id"], entry["speaker"], entry["type"]) for entry in answer["segments"]] == [
        ("seg_0", "A", "transcript.text.segment"),
        ("seg_1", "B", "transcript.text.segment"),
    ]


def test_a_translation_names_its_task():
    answer = transcribe([whole(TIMED)], "audio/translations", response_format="verbose_json")[0]
    assert answer["task"] == "translate"


@pytest.mark.parametrize(
    "text",
    [
        "Hello.",
        '{"segments":[7]}',
        '{"segments":[{"start":"soon","end":"later","text":""}]}',
        '{"segments":[{"start":1,"end":2,"text":""}]}',
    ],
)
def test_segments_that_make_no_sense_are_a_502(text):
    with pytest.raises(ProxyError) as caught:
        transcribe([whole(text)], response_format="srt")
    assert caught.value.status == 502


TIMED_BODY = {
    "model": "gemini-3.8-flash",
    "file": proxy.Upload("a.wav", "audio/x-wav", RIFF),
    "language": "no",
    "prompt": "\u00c5se",
    "temperature": "0.2",
    "include": ["logprobs"],
    "timestamp_granularities": ["word"],
    "response_format": "verbose_json",
}


def test_a_transcript_asks_with_the_recording_and_words():
    sent = plan_and_ignored(TIMED_BODY, proxy.openai_transcriptions_request)[0].calls[0].body
    recording, words = sent["contents"][0]["parts"]
    assert recording == blob("audio/wav", base64.b64encode(RIFF).decode())
    assert "no" in words["text"]
    assert "\u00c5se" in words["text"]
    assert sent["generationConfig"]["temperature"] == 0.2
    assert sent["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "LOW"}
    assert sent["generationConfig"]["responseJsonSchema"]["properties"]["segments"]


def test_keywords_of_a_recording_are_in_the_prompt():
    body = {**TIMED_BODY, "keywords": ["Oslo", "", "Bergen"]}
    sent = plan_and_ignored(body, proxy.openai_transcriptions_request)[0].calls[0].body
    assert "spelt so: Oslo, Bergen." in sent["contents"][0]["parts"][1]["text"]


def test_what_a_transcript_cannot_do_is_named_as_ignored():
    ignored = plan_and_ignored(TIMED_BODY, proxy.openai_transcriptions_request)[1]
    assert ignored == ["include", "timestamp_granularities"]
    ignored = plan_and_ignored(
        {**TIMED_BODY, "stream": "true"}, proxy.openai_transcriptions_request
    )[1]
    assert ignored == ["include", "stream", "timestamp_granularities"]


@pytest.mark.parametrize(
    "upload, mime",
    [
        (("a", "", RIFF), "audio/wav"),
        (("a.wav", "application/octet-stream", b"ID3\4"), "audio/mp3"),
        (("a.m4a", "", b"\0\0\0\x20ftypisom"), "audio/mp4"),
        (("blob", "audio/webm", b"\x1a\x45\xdf\xa3"), "audio/webm"),
        (("a.webm", "video/webm", b"\x1a\x45\xdf\xa3"), "video/webm"),
        (("a.flac", "", b"?"), "audio/flac"),
        (("a", "audio/aiff", b"?"), "audio/aiff"),
    ],
)
def test_recordings_are_taken_for_what_they_are(upload, mime):
    body = {"model": FLASH, "file": proxy.Upload(*upload)}
    (call,) = plan_and_ignored(body, proxy.openai_transcriptions_request)[0].calls
    assert call.body["contents"][0]["parts"][0]["inlineData"]["mimeType"] == mime


@pytest.mark.parametrize(
    "upload",
    [
        ("a.txt", "text/plain", b"?"),
        ("a.wav", "audio/wav", b"%PDF-1"),
        ("a.wav", "audio/wav", b""),
    ],
)
def test_files_that_are_no_recordings_are_refused(upload):
    body = {"model": FLASH, "file": proxy.Upload(*upload)}
    assert refused(body, proxy.openai_transcriptions_request).path == "file"


@pytest.mark.parametrize(
    "path, more",
    [
        ("file", {"file": None}),
        ("file", {"file": "text"}),
        ("model", {"model": None}),
        ("model", {"model": proxy.Upload("m", "", b"m")}),
        ("response_format", {"response_format": "poem"}),
        ("temperature", {"temperature": "hot"}),
        ("stream", {"stream": "maybe"}),
        ("language", {"language": 7}),
    ],
)
def test_what_cannot_be_transcribed_is_a_400(path, more):
    assert (
        refused(
            {"model": FLASH, "file": proxy.Upload("a.wav", "", RIFF), **more},
            proxy.openai_transcriptions_request,
        ).path
        == path
    )


UPLOAD_PARTS = ("model", "whisper-1"), ("file", "a.wav", "audio/wav", RIFF), ("user", "me")


def test_a_form_on_the_wire(server, gemini):
    gemini.say(whole("Hei."))
    raw, kind = form(*UPLOAD_PARTS)
    status, headers, body = post(server, "/v1/audio/transcriptions", raw, Content_Type=kind)
    assert status == 200
    assert json.loads(body)["text"] == "Hei."
    assert headers["x-proxy-ignored"] == "user"
    assert gemini.paths == ["/v1beta/models/gemini-3.8-flash:generateContent"]


def test_a_form_on_the_wire_that_wants_a_stream(server, gemini):
    gemini.say([chunk("He"), whole("i.")])
    raw, kind = form(*UPLOAD_PARTS, ("stream", "true"))
    body = post(server, "/audio/transcriptions", raw, Content_Type=kind)[2]
    assert body.decode().count("transcript.text.delta") == 2


def test_a_number_with_a_zero_before_it_is_no_number_of_json():
    body = Fields({"temperature": "00", "stream": "true"})
    proxy.form_scalars(body, "temperature", "stream")
    assert body.data == {"temperature": "00", "stream": True}


def test_a_form_on_the_wire_without_its_file(server):
    raw, kind = form(UPLOAD_PARTS[0])
    answer = post(server, "/v1/audio/transcriptions", raw, Content_Type=kind)
    assert error_of(answer)["param"] == "file"


def test_an_ollama_server_lacks_what_ollama_lacks(gemini):
    with serving(gemini.url, api="ollama") as server:
        paths = [
            "completions",
            "audio/transcriptions",
            "images/generations",
            "audio/speech",
            "audio/translations",
        ]
        assert [post(server, "/v1/" + path, {})[0] for path in paths] == [400, 400, 404, 404, 404]


MODEL_ANSWERS = [[{"models": MODELS}]]
MODEL_CONTEXT = Context(aliases=(("gpt-4o", FLASH), ("gpt-*", FLASH)))


def models_exchange(context):
    return exchange(plan_and_ignored({}, proxy.openai_models_request, context)[0], context)


def test_the_list_of_models_holds_what_can_chat_or_embed_and_aliases():
    one = models_exchange(MODEL_CONTEXT)
    entries = proxy.openai_models_response(one, map(iter, MODEL_ANSWERS))["data"]
    assert [entry["id"] for entry in entries] == [FLASH, NEWEST, EMBEDDER, "gpt-4o"]


YES, NO = {"supported": True}, {"supported": False}


def listed_model(name):
    one = models_exchange(MODEL_CONTEXT._replace(params={"model": name}))
    return proxy.openai_model_response(one, map(iter, MODEL_ANSWERS))


def test_a_model_has_the_fields_of_openai_and_of_anthropic():
    assert listed_model(FLASH) == {
        "id": FLASH,
        "object": "model",
        "created": proxy.GEMINI_OPENED,
        "owned_by": "google",
        "type": "model",
        "display_name": FLASH,
        "created_at": "2023-12-13T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": 1048576,
        "max_tokens": 65536,
        "capabilities": {
            "batch": NO,
            "citations": NO,
            "code_execution": NO,
            "context_management": NO,
            "image_input": YES,
            "pdf_input": YES,
            "structured_outputs": YES,
            "compaction": {**YES, "summarize": YES},
            "effort": {**YES, "low": YES, "medium": YES, "high": YES, "xhigh": YES, "max": YES},
            "server_tools": {**YES, "code_execution": YES, "web_search": YES},
            "thinking": {
                **YES,
                "types": {"adaptive": YES, "between_tools": YES, "disabled": YES, "enabled": YES},
            },
        },
    }


def test_a_model_for_vectors_neither_sees_nor_thinks():
    capabilities = listed_model(EMBEDDER)["capabilities"]
    assert capabilities["image_input"] == capabilities["structured_outputs"] == NO
    parts = [capabilities[name] for name in ("thinking", "effort", "compaction")]
    assert [part["supported"] for part in parts] == [False] * 3
    assert capabilities["thinking"]["types"]["enabled"] == NO


@pytest.mark.parametrize(
    "query, names, has_more",
    [
        ({}, [FLASH, NEWEST, EMBEDDER, "gpt-4o"], False),
        ({"limit": "2"}, [FLASH, NEWEST], True),
        ({"limit": "2", "after_id": NEWEST}, [EMBEDDER, "gpt-4o"], False),
        ({"limit": "1", "after_id": NEWEST}, [EMBEDDER], True),
        ({"after_id": "gpt-4o"}, [], False),
        ({"limit": "1", "before_id": EMBEDDER}, [NEWEST], True),
        ({"limit": "2", "before_id": EMBEDDER}, [FLASH, NEWEST], False),
        ({"after_id": "nobody", "limit": "1000"}, [FLASH, NEWEST, EMBEDDER, "gpt-4o"], False),
    ],
)
def test_the_list_of_models_has_pages_for_anthropics_clients(query, names, has_more):
    one = models_exchange(MODEL_CONTEXT._replace(request=queried(query)))
    page = proxy.openai_models_response(one, map(iter, MODEL_ANSWERS))
    assert [entry["id"] for entry in page["data"]] == names
    ends = [None, None]
    if names:
        ends = [names[0], names[-1]]
    assert [page["first_id"], page["last_id"], page["has_more"]] == [*ends, has_more]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "9" * 5000])
def test_a_page_has_between_one_and_a_thousand_models(limit):
    with pytest.raises(ProxyError) as caught:
        one = models_exchange(MODEL_CONTEXT._replace(request=queried({"limit": limit})))
        proxy.openai_models_response(one, map(iter, MODEL_ANSWERS))
    assert (caught.value.status, caught.value.path) == (400, "limit")


def test_a_list_without_models_is_an_empty_page():
    one = models_exchange(NO_CONTEXT)
    page = proxy.openai_models_response(one, iter([iter([{"models": []}])]))
    assert (page["data"], page["first_id"], page["has_more"]) == ([], None, False)


def test_a_name_that_stands_in_is_described_where_its_model_is_listed():
    one = models_exchange(Context(params={"model": "text-embedding-3-small"}))
    entry = proxy.openai_model_response(one, map(iter, MODEL_ANSWERS))
    assert (entry["id"], entry["display_name"]) == ("text-embedding-3-small", EMBEDDER)


@pytest.mark.parametrize(
    "name, entry_id", [(FLASH, FLASH), ("models/" + FLASH, FLASH), ("gpt-5", "gpt-5")]
)
def test_a_model_is_described_under_the_clients_name(name, entry_id):
    one = models_exchange(MODEL_CONTEXT._replace(params={"model": name}))
    assert proxy.openai_model_response(one, map(iter, MODEL_ANSWERS))["id"] == entry_id


@pytest.mark.parametrize("name", ["gemini-9", "veo-3.1"])
def test_a_model_that_cannot_be_used_is_unknown(name):
    one = models_exchange(MODEL_CONTEXT._replace(params={"model": name}))
    with pytest.raises(ProxyError, match="does not exist") as caught:
        proxy.openai_model_response(one, map(iter, MODEL_ANSWERS))
    assert caught.value.status == 404


@pytest.mark.parametrize(
    "error, kind, code",
    [
        (ProxyError(401, "m", code="invalid_api_key"), "invalid_request_error", "invalid_api_key"),
        (
            ProxyError(429, "m", code="insufficient_quota"),
            "insufficient_quota",
            "insufficient_quota",
        ),
        (ProxyError(429, "m", code="rate_limit_exceeded"), "requests", "rate_limit_exceeded"),
        (ProxyError(502, "m"), "server_error", "server_error"),
    ],
)
def test_errors_have_openais_types_and_codes(error, kind, code):
    assert proxy.openai_error(error) == (
        error.status,
        {"error": {"message": "m", "type": kind, "param": None, "code": code}},
    )


def test_audio_is_a_note_in_the_text_of_a_completion():
    body = {"model": FLASH, "prompt": "Hi"}
    one = exchange(plan_and_ignored(body, proxy.openai_completions_request)[0])
    audio = {"inlineData": {"mimeType": "audio/wav", "data": PNG}}
    answer = whole_of(openai_route("/v1/completions"), one, [whole("Hear:", audio)])
    note = "\n[Gemini made something of type audio/wav, for which there is no place here.]\n"
    assert answer["choices"][0]["text"] == "Hear:" + note


def test_a_stream_of_images_that_breaks_off_says_so(server, gemini, monkeypatch):
    # Or the second image's call may come first.
    monkeypatch.setattr(proxy, "MAX_PARALLEL_CALLS", 1)
    image = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    gemini.say(whole(image), gemini_error(400, "boom"))
    body = {"prompt": "x", "n": 2, "stream": True}
    wire = post(server, "/v1/images/generations", body)[2].decode()
    assert wire.count("event: ") == 2
    assert "event: error\ndata: {" in wire
    assert "boom" in wire


# ======================================================================================
# 8. Responses
# ======================================================================================

FLAT = {"type": "function", "strict": False, **WEATHER["function"]}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
}
NAMESPACE = {"type": "namespace", "name": "code", "description": "Code", "tools": [PATCH]}
THOUGHT = {"text": "Hm", "thought": True}
IMAGE = {"inlineData": {"mimeType": "image/png", "data": PNG}}
OSLO_CALL = {"type": "function_call", "call_id": "call_9", "name": "weather", "arguments": "{}"}


def signatures(call_id):
    """The `encrypted_content` of a reasoning item about this call."""
    content = {"generation": 3, "signatures": {call_id: sign("s")}}
    return base64.b64encode(proxy.encode_json(content).encode()).decode()


def reasoning_item(encrypted_content):
    return {"type": "reasoning", "summary": [], "encrypted_content": encrypted_content}


def response_plan(body, context=None):
    """(the Plan, what was ignored) for a response's body."""
    body = {"model": FLASH, "input": "Hi", **body}
    return plan_and_ignored(body, proxy.openai_responses_request, context or Context())


def response_events(body, *answers, context=None, notes=None):
    """The events of a response, when Gemini says these chunks; the last one has the whole answer."""
    body, notes = {"model": FLASH, "input": "Hi", **body}, Notes() if notes is None else notes
    context = looked_up(RESPONSES_ROUTE, body, context or Context(), notes)
    plan = response_plan(body, context)[0]
    events = stream_of(RESPONSES_ROUTE, exchange(plan, context), answers, notes=notes)
    answer = whole_of(RESPONSES_ROUTE, exchange(plan, context), answers, notes=notes)
    assert answer == events[-1]["response"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def response_to(body, *answers, **more):
    return response_events(body, *answers, **more)[-1]["response"]


def response_to_gemini(body, notes=None):
    """What Gemini is asked for the body of a response."""
    body = {"model": FLASH, "input": "Hi", **body}
    context = looked_up(RESPONSES_ROUTE, body, Context(), Notes() if notes is None else notes)
    return gemini_body(body, request=proxy.openai_responses_request, context=context)


def contents_of(*items, **more):
    """The turns of Gemini's that these input items become."""
    return response_to_gemini({"input": list(items), **more})["contents"]


def without(events, *keys):
    return [{key: event[key] for key in event if key not in keys} for event in events]


def stored_answer(path, notes, method="GET", **query):
    """What a route about a stored response answers."""
    route = openai_route(path, method)
    context = Context(params={"id": "resp_1"}, request=queried(query))
    context = looked_up(route, {}, context, notes)
    return whole_of(route, exchange(context=context), notes=notes)


REASONING_ITEM = {
    "id": "rs_1_0",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "Hm"}],
}
HELLO_PART = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
MESSAGE_ITEM = {
    "id": "msg_1_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [HELLO_PART],
}
SIGNATURES_ITEM = {"id": "rs_1_2", **reasoning_item(signatures("call_2"))}
CALL_ITEM = {
    "id": "fc_1_3",
    "type": "function_call",
    "status": "completed",
    "call_id": "call_2",
    "name": "weather",
    "arguments": '{"city":"Oslo"}',
}
IN_REASONING = {"item_id": "rs_1_0", "output_index": 0, "summary_index": 0}
IN_MESSAGE = {"item_id": "msg_1_1", "output_index": 1, "content_index": 0}
IN_CALL = {"item_id": "fc_1_3", "output_index": 3}
RESPONSE_EVENTS = [
    {"type": "response.created"},
    {"type": "response.in_progress"},
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {**REASONING_ITEM, "summary": []},
    },
    {
        "type": "response.reasoning_summary_part.added",
        **IN_REASONING,
        "part": {"type": "summary_text", "text": ""},
    },
    {"type": "response.reasoning_summary_text.delta", **IN_REASONING, "delta": "Hm"},
    {"type": "response.reasoning_summary_text.done", **IN_REASONING, "text": "Hm"},
    {
        "type": "response.reasoning_summary_part.done",
        **IN_REASONING,
        "part": {"type": "summary_text", "text": "Hm"},
    },
    {"type": "response.output_item.done", "output_index": 0, "item": REASONING_ITEM},
    {
        "type": "response.output_item.added",
        "output_index": 1,
        "item": {**MESSAGE_ITEM, "status": "in_progress", "content": []},
    },
    {"type": "response.content_part.added", **IN_MESSAGE, "part": {**HELLO_PART, "text": ""}},
    {"type": "response.output_text.delta", **IN_MESSAGE, "delta": "He", "logprobs": []},
    {"type": "response.output_text.delta", **IN_MESSAGE, "delta": "llo", "logprobs": []},
    {"type": "response.output_text.done", **IN_MESSAGE, "text": "Hello", "logprobs": []},
    {"type": "response.content_part.done", **IN_MESSAGE, "part": HELLO_PART},
    {"type": "response.output_item.done", "output_index": 1, "item": MESSAGE_ITEM},
    {"type": "response.output_item.added", "output_index": 2, "item": SIGNATURES_ITEM},
    {"type": "response.output_item.done", "output_index": 2, "item": SIGNATURES_ITEM},
    {
        "type": "response.output_item.added",
        "output_index": 3,
        "item": {**CALL_ITEM, "status": "in_progress", "arguments": ""},
    },
    {
        "type": "response.function_call_arguments.delta",
        **IN_CALL,
        "delta": '{"city":"Oslo"}',
    },
    {
        "type": "response.function_call_arguments.done",
        **IN_CALL,
        "arguments": '{"city":"Oslo"}',
        "name": "weather",
    },
    {"type": "response.output_item.done", "output_index": 3, "item": CALL_ITEM},
    {"type": "response.completed"},
]


def weather_events():
    """The events of an answer with a thought, a text, and a call with its signature."""
    body = {
        "model": NEWEST,
        "tools": [FLAT],
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
    }
    last = whole(call("weather", {"city": "Oslo"}, "s"))
    return response_events(body, chunk(THOUGHT), chunk("He"), chunk("llo"), last)


def test_the_events_of_a_response_are_openais():
    assert without(weather_events(), "sequence_number", "response") == RESPONSE_EVENTS


def test_the_last_event_has_all_items_of_the_response():
    assert weather_events()[-1]["response"]["output"] == [
        REASONING_ITEM,
        MESSAGE_ITEM,
        SIGNATURES_ITEM,
        CALL_ITEM,
    ]


def test_the_first_event_has_the_response_as_it_begins():
    response = weather_events()[0]["response"]
    assert response["status"] == "in_progress"
    assert response["output"] == []
    assert response["usage"] is None


WHOLE_RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1700000000,
    "completed_at": 1700000000,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {"a": "b"},
    "model": FLASH,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 0.5,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 0.95,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "truncation": "disabled",
    "user": "me",
    "output": [{**MESSAGE_ITEM, "id": "msg_1_0"}],
    "usage": {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 11,
    },
}


def test_a_whole_response_is_openais():
    body = {"temperature": 0.5, "metadata": {"a": "b"}, "user": "me"}
    assert response_to(body, whole("Hello")) == WHOLE_RESPONSE


OPEN_RESPONSE = {  # the required fields of ResponseResource in openresponses/openresponses, and their types
    **dict.fromkeys(("id", "object", "status", "model", "truncation", "service_tier"), str),
    **dict.fromkeys(("created_at", "top_logprobs"), int),
    **dict.fromkeys(("temperature", "top_p", "presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), bool),
    **dict.fromkeys(("output", "tools"), list),
    **dict.fromkeys(("text", "metadata"), dict),
    **dict.fromkeys(("completed_at", "max_output_tokens", "max_tool_calls"), (int, type(None))),
    **dict.fromkeys(("previous_response_id", "instructions"), (str, type(None))),
    **dict.fromkeys(("user", "safety_identifier", "prompt_cache_key"), (str, type(None))),
    **dict.fromkeys(("incomplete_details", "error", "reasoning", "usage"), (dict, type(None))),
    "tool_choice": (str, dict),
}


@pytest.mark.parametrize("finish", ["STOP", "MAX_TOKENS", "SAFETY", "MALFORMED_FUNCTION_CALL"])
def test_a_response_has_all_fields_of_open_responses_from_the_first_event_on(finish):
    nothing = dict.fromkeys(("temperature", "top_p", "tools", "tool_choice", "truncation"))
    events = response_events(nothing, whole("Once", finish=finish))
    for response in (events[0]["response"], events[-1]["response"]):
        for key, kind in OPEN_RESPONSE.items():
            assert isinstance(response[key], kind), key


@pytest.mark.parametrize(
    "model, penalty", [(FLASH, 0.0), ("gemini-2.0-flash", 1)], ids=["refuses", "takes"]
)
def test_a_response_tells_the_sampling_that_was_used(model, penalty):
    body = {"model": model, "presence_penalty": 1, "top_p": 0.5, "temperature": 0}
    response = response_to(body, whole("Hi"))
    assert response["presence_penalty"] == penalty
    assert (response["temperature"], response["top_p"]) == (0, 0.5)


NO_CALL = {
    "code": "server_error",
    "message": "Gemini's answer ended in an internal error, MALFORMED_FUNCTION_CALL.",
    "type": "server_error",
    "param": None,
}


@pytest.mark.parametrize(
    "finish, status, details, error, native",
    [
        ("STOP", "completed", None, None, None),
        ("MAX_TOKENS", "incomplete", {"reason": "max_output_tokens"}, None, None),
        ("SAFETY", "incomplete", {"reason": "content_filter"}, None, "SAFETY"),
        ("MALFORMED_FUNCTION_CALL", "failed", None, NO_CALL, "MALFORMED_FUNCTION_CALL"),
    ],
)
def test_a_finish_reason_becomes_the_status_of_a_response(finish, status, details, error, native):
    last = response_events({}, whole("Once", finish=finish))[-1]
    response = last["response"]
    assert last["type"] == f"response.{status}"
    assert response["status"] == status
    assert response["incomplete_details"] == details
    assert response["error"] == error
    assert response.get("native_finish_reason") == native


@pytest.mark.parametrize(
    "finish, status",
    [("STOP", "completed"), ("MAX_TOKENS", "incomplete"), ("SAFETY", "incomplete")],
)
def test_a_message_that_was_cut_off_is_incomplete(finish, status):
    response = response_to({}, whole("Once", finish=finish))
    assert response["output"][0]["status"] == status


def test_a_response_without_a_word_has_an_empty_message():
    response = response_to({}, whole())
    assert response["output"][0]["content"][0]["text"] == ""


def test_a_blocked_prompt_is_an_incomplete_response_without_items():
    response = response_to({}, {"promptFeedback": {"blockReason": "SAFETY"}})
    assert response["output"] == []
    assert response["incomplete_details"] == {"reason": "content_filter"}
    assert response["native_finish_reason"] == "SAFETY"


def test_a_response_that_breaks_off_ends_with_what_came():
    one = exchange(response_plan({})[0])
    stream = proxy.openai_responses_stream(one, events_of(one, [[chunk("Hel")]]))
    events = [next(stream) for _ in range(5)]
    with pytest.raises(ProxyError) as caught:
        next(stream)
    (last,) = kept_by(proxy.openai_responses_failure(one, caught.value), Notes())
    assert last["type"] == "response.failed"
    assert last["sequence_number"] == len(events)
    response = last["response"]
    assert response["id"] == events[0]["response"]["id"]
    assert response["error"] == {**NO_CALL, "message": caught.value.message}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hel"


def test_a_failed_responses_error_stands_where_openais_libraries_look_for_it():
    events = response_events({}, whole("Hel", finish="MALFORMED_FUNCTION_CALL"))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["error"] == events[-1]["response"]["error"] == NO_CALL


def test_a_failed_response_says_geminis_reason_and_its_message():
    failed = whole(finish="MALFORMED_FUNCTION_CALL", finishMessage="print(f(")
    assert response_to({}, failed)["error"]["message"].endswith("MALFORMED_FUNCTION_CALL. print(f(")


def test_a_response_that_went_well_has_no_error_beside_it():
    *_, last = response_events({}, whole("Hello."))
    assert last.keys() == {"type", "sequence_number", "response"}


def test_a_failure_before_the_first_event_has_the_first_events_too():
    one, error = exchange(response_plan({})[0]), ProxyError(400, "No.")
    events = list(kept_by(proxy.openai_responses_failure(one, error), Notes()))
    kinds = ["response.created", "response.in_progress", "response.failed"]
    assert [event["type"] for event in events] == kinds
    assert [event["sequence_number"] for event in events] == [0, 1, 2]


def test_a_failure_says_in_codexs_words_when_to_try_again():
    error = ProxyError(429, "Slow.", code="rate_limit_exceeded", retry_after=1.5)
    *_, last = proxy.openai_responses_failure(exchange(response_plan({})[0]), error)
    message = "Slow. Please try again in 1.5s."
    fields = {"code": "rate_limit_exceeded", "type": "requests", "param": None}
    assert last["response"]["error"] == {**fields, "message": message}


def test_instructions_and_developer_messages_are_the_system_instruction():
    items = [{"role": "developer", "content": "Be brief."}, user("Hi")]
    body = response_to_gemini({"input": items, "instructions": "Be kind."})
    assert body["systemInstruction"]["parts"] == [{"text": "Be kind."}, {"text": "Be brief."}]


def test_system_messages_among_the_items_stay_in_their_place():
    items = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), REMINDER]
    body = response_to_gemini({"input": items, "instructions": "Be kind."})
    assert body["systemInstruction"]["parts"] == [{"text": "Be kind."}, {"text": "Be brief."}]
    assert body["contents"] == [u("Hi"), m("Yes?"), u(*REMINDER_PARTS)]


def test_messages_become_turns():
    link = f"data:image/png;base64,{PNG}"
    parts = [{"type": "input_text", "text": "Look"}, {"type": "input_image", "image_url": link}]
    answer = [{"type": "output_text", "text": "I see.", "annotations": []}]
    items = [user(parts), {"type": "message", **assistant(answer)}, user("Well?")]
    assert contents_of(*items) == [u("Look", IMAGE), m("I see."), u("Well?")]


def test_calls_and_their_outputs_become_turns():
    output = [{"type": "input_text", "text": "done"}]
    contents = contents_of(
        user("Hi"),
        {**OSLO_CALL, "arguments": '{"city": "Oslo"}', "status": "completed"},
        {"type": "custom_tool_call", "call_id": "call_8", "name": "apply_patch", "input": "X"},
        {"type": "custom_tool_call_output", "call_id": "call_8", "output": output},
        {"type": "function_call_output", "call_id": "call_9", "output": '{"temp": 3}'},
    )
    calls = [
        {"id": "call_9", "name": "weather", "args": {"city": "Oslo"}},
        {"id": "call_8", "name": "apply_patch", "args": {"input": "X"}},
    ]
    results = [
        {"id": "call_9", "name": "weather", "response": {"temp": 3}},
        {"id": "call_8", "name": "apply_patch", "response": {"output": "done"}},
    ]
    assert contents == [
        u("Hi"),
        m(*({"functionCall": entry} for entry in calls)),
        u(*({"functionResponse": entry} for entry in results)),
    ]


def test_a_reasoning_item_gives_a_call_its_signature():
    contents = contents_of(
        user("Hi"),
        {**reasoning_item(signatures("call_9")), "id": "rs_1"},
        assistant("I call."),
        OSLO_CALL,
        {"type": "function_call_output", "call_id": "call_9", "output": "3"},
        model=NEWEST,
    )
    function_call = {"id": "call_9", "name": "weather", "args": {}}
    part = {"functionCall": function_call, "thoughtSignature": sign("s")}
    assert contents[1] == m("I call.", part)


SIGNED_TEXT = [chunk(THOUGHT), chunk("He"), whole({"text": "y", "thoughtSignature": sign("s")})]
SEALED = {"model": NEWEST, "include": ["reasoning.encrypted_content"]}


@pytest.mark.parametrize("summary", [None, "auto"])
def test_the_signature_of_a_text_is_sealed_after_it_and_goes_back_to_it(summary):
    output = response_to({**SEALED, "reasoning": {"summary": summary}}, *SIGNED_TEXT)["output"]
    assert [item["type"] for item in output[-2:]] == ["message", "reasoning"]
    assert output[-1] == {**reasoning_item(signatures("")), "id": output[-1]["id"]}
    contents = contents_of(user("Hi"), *output, user("And?"), model=NEWEST)
    signed = {"text": "Hey", "thoughtSignature": sign("s")}
    assert contents == [u("Hi"), m(signed), u("And?")]


def test_the_signature_of_a_text_is_sealed_only_for_clients_that_want_it():
    output = response_to({"model": NEWEST}, *SIGNED_TEXT)["output"]
    assert [item["type"] for item in output] == ["message"]


def test_the_signature_of_a_text_joins_the_thoughts_that_follow_it():
    body = {**SEALED, "reasoning": {"summary": "auto"}}
    signed = {"text": "Hey", "thoughtSignature": sign("s")}
    output = response_to(body, whole(signed, THOUGHT))["output"]
    assert [item["type"] for item in output] == ["message", "reasoning"]
    assert output[1]["encrypted_content"] == signatures("")


@pytest.mark.parametrize("before", [[], [user("Hi")], [assistant("")], [user("Hi"), OSLO_CALL]])
def test_the_signature_of_a_text_that_is_gone_is_left_out(before):
    contents = contents_of(*before, reasoning_item(signatures("")), user("And?"), model=NEWEST)
    assert sign("s") not in json.dumps(contents)


def test_the_summary_of_a_reasoning_item_does_not_go_back():
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]}
    assert contents_of(user("Hi"), item, assistant("Yes?"), user("Go")) == [
        u("Hi"),
        m("Yes?"),
        u("Go"),
    ]


@pytest.mark.parametrize(
    "action, output",
    [
        ({"commands": ["ls"]}, "a.txt"),
        ({"commands": ["ls"]}, [{"stdout": "a.txt", "stderr": ""}]),
    ],
)
@pytest.mark.parametrize("name", ["local_shell", "shell"])
def test_calls_of_openais_local_tools_are_functions(name, action, output):
    contents = contents_of(
        user("ls"),
        reasoning_item(signatures("call_9")),
        {"type": f"{name}_call", "id": "lsh_1", "call_id": "call_9", "action": action},
        {"type": f"{name}_call_output", "id": "call_9", "output": output},
        model=NEWEST,
    )
    function_call = {"id": "call_9", "name": name, "args": action}
    result = {"id": "call_9", "name": name, "response": {"output": output}}
    assert contents[1:] == [
        m({"functionCall": function_call, "thoughtSignature": sign("s")}),
        u({"functionResponse": result}),
    ]


def test_unknown_items_of_a_response_are_named_as_ignored():
    items = [user("Hi"), {"type": "mcp_call", "id": "1", "name": "x"}]
    assert response_plan({"input": items})[1] == ["input[].mcp_call"]


def test_a_search_in_the_input_of_a_response_is_left_out():
    plan, ignored = response_plan({"input": [user("Hi"), {"type": "web_search_call", "id": "ws"}]})
    assert plan.calls[0].body["contents"] == [u("Hi")]
    assert ignored == []


@pytest.mark.parametrize(
    "model, content, ignored",
    [
        (NEWEST, signatures("call_9"), []),
        (FLASH, signatures("call_9"), ["input[].encrypted_content"]),
        (NEWEST, "gAAA", ["input[].encrypted_content"]),
    ],
)
def test_encrypted_content_of_other_models_is_named_as_ignored(model, content, ignored):
    assert response_plan({"model": model, "input": [reasoning_item(content)]})[1] == ignored


def test_hosted_tools_of_a_response_are_googles_or_named_as_ignored():
    tools = [
        {"type": "file_search", "vector_store_ids": ["v"]},
        {"type": "web_search", "search_context_size": "low"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
    ]
    plan, ignored = response_plan({"model": NEWEST, "tools": tools})
    assert plan.calls[0].body["tools"] == [{"googleSearch": {}}, {"codeExecution": {}}]
    assert ignored == ["tools[].container", "tools[].file_search", "tools[].search_context_size"]


OPENAIS_MCP = {
    "type": "mcp",
    "server_label": "docs",
    "server_url": "https://mcp.example.com/mcp",
    "authorization": "t",
    "require_approval": "never",
}


@pytest.mark.parametrize("model, mixed", [(FLASH, False), (NEWEST, True)])
def test_gemini_calls_remote_mcp_servers(model, mixed):
    more = {**OPENAIS_MCP, "server_label": "more", "authorization": None, "headers": {"a": "b"}}
    functions = [FLAT] * mixed
    plan, ignored = response_plan({"model": model, "tools": [*functions, OPENAIS_MCP, more]})
    url = more["server_url"]
    transport = {"url": url, "headers": {"a": "b"}}
    servers = [GEMINIS_MCP, {"name": "more", "streamableHttpTransport": transport}]
    assert plan.calls[0].body["tools"][-1] == {"mcpServers": servers}
    assert (
        plan.calls[0].body.get("toolConfig", {}).get("includeServerSideToolInvocations", False)
        is mixed
    )
    assert ignored == []


@pytest.mark.parametrize(
    "model, more",
    [
        (FLASH, {"require_approval": None}),
        (FLASH, {"require_approval": "always"}),
        (FLASH, {"require_approval": {"never": {"tool_names": ["a"]}}}),
        (FLASH, {"allowed_tools": ["a"]}),
        (FLASH, {"server_url": None, "connector_id": "connector_gmail"}),
        ("gemini-2.0-flash", {}),
    ],
)
def test_an_mcp_server_that_gemini_cannot_use_as_the_client_wants_it_is_left_out(model, more):
    plan, ignored = response_plan({"model": model, "tools": [{**OPENAIS_MCP, **more}]})
    assert "tools" not in plan.calls[0].body
    assert ignored == ["tools[].mcp"]


@pytest.mark.parametrize("kind", ["additional_tools", "namespace"])
def test_what_opens_an_mcp_server_is_not_stored_wherever_its_tool_stands(kind):
    notes = Notes()
    tools = {"type": kind, "name": "more", "tools": [OPENAIS_MCP, {"type": "web_search"}]}
    body = {"tools": [tools]}
    if kind == "additional_tools":
        body = {"input": [user("Hi"), {**tools, "role": "developer"}]}
    assert response_plan(body)[0].calls[0].body["tools"][0] == {"mcpServers": [GEMINIS_MCP]}
    response_to(body, whole("Hi"), notes=notes)
    assert OPENAIS_MCP["server_url"] in str(notes)
    assert "authorization" not in str(notes)


def test_what_opens_an_mcp_server_is_not_stored():
    notes = Notes()
    tool = {**OPENAIS_MCP, "headers": {"X-Key": "h"}}
    response = response_to({"tools": [tool]}, whole("Hi"), notes=notes)
    assert response["tools"] == [
        {key: tool[key] for key in tool if key not in ("authorization", "headers")}
    ]
    assert "X-Key" not in str(notes)


@pytest.mark.parametrize(
    "path, more",
    [
        ("server_url", {"server_url": "http://127.0.0.1:9/mcp"}),
        ("server_url", {"server_url": "mcp.example.com"}),
        ("server_label", {"server_label": None}),
        ("headers.a", {"headers": {"a": 7}}),
    ],
)
def test_a_bad_mcp_server_is_a_400_with_the_place(path, more):
    with pytest.raises(ProxyError) as caught:
        response_plan({"tools": [{**OPENAIS_MCP, **more}]})
    assert (caught.value.status, caught.value.path) == (400, f"tools[0].{path}")


@pytest.mark.parametrize(
    "more, ignored",
    [
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["file_search_call.results"]}, "include.file_search_call.results"),
        ({"x": 1}, "x"),
    ],
)
def test_fields_without_effect_on_a_response_are_named_as_ignored(more, ignored):
    assert response_plan(more)[1] == [ignored]


@pytest.mark.parametrize(
    "path, more",
    [
        ("input", {"input": None}),
        ("input", {"input": 7}),
        ("input[0]", {"input": [7]}),
        ("input[0].type", {"input": [{}]}),
        ("input[0].id", {"input": [{"type": "mcp_call", "id": {}}]}),
        ("input[0].role", {"input": [{"role": "x"}]}),
        ("input[0].call_id", {"input": [{"type": "function_call", "name": "x"}]}),
        ("text.format.type", {"text": {"format": {"type": "x"}}}),
        ("reasoning.effort", {"reasoning": {"effort": "x"}}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("truncation", {"truncation": "x"}),
        ("include", {"include": 7}),
        ("metadata", {"metadata": 7}),
        ("metadata.a", {"metadata": {"a": 7}}),
        ("text.format.name", {"text": {"format": {"type": "json_schema", "name": 7}}}),
        ("text.format.strict", {"text": {"format": {"type": "json_schema", "strict": "x"}}}),
        ("tools[0].format", {"tools": [{"type": "custom", "name": "f", "format": "text"}]}),
        ("tools[0].environment", {"tools": [{"type": "shell", "environment": "local"}]}),
        ("input[0].status", {"input": [{**user("Hi"), "status": 7}]}),
        ("input[0].phase", {"input": [{**user("Hi"), "phase": 7}]}),
        ("tools[0].tools[0].name", {"tools": [{**NAMESPACE, "tools": [{"type": "function"}]}]}),
    ],
)
def test_a_response_that_cannot_be_made_is_a_400_with_the_place(path, more):
    error = refused({"model": FLASH, "input": "Hi", **more}, proxy.openai_responses_request)
    assert error.path == path
    assert error.status == 400


@pytest.mark.parametrize(
    "path, more",
    [
        ("input", {"input": [{"type": "item_reference", "id": "msg_1_0"}]}),
        ("previous_response_id", {"previous_response_id": "resp_1"}),
    ],
)
def test_what_is_not_stored_is_a_404_with_the_place(path, more):
    error = refused({"model": FLASH, "input": "Hi", **more}, proxy.openai_responses_request)
    assert error.path == path
    assert error.status == 404


def test_tools_of_responses_may_stand_in_namespaces_and_among_the_items():
    more = {"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]}
    body = response_to_gemini({"input": [user("Hi"), more], "tools": [FLAT]})
    weather, patch = body["tools"][0]["functionDeclarations"]
    assert weather["name"] == "weather"
    assert patch["name"] == "code.apply_patch"
    grammar = "Code\nThe text must conform to this lark grammar:\nstart: X"
    assert patch["description"].startswith(grammar)


def test_a_response_may_choose_among_tools_in_namespaces():
    allowed = [
        {"type": "function", "name": "weather"},
        {"type": "custom", "namespace": "code", "name": "apply_patch"},
        {"type": "web_search"},
    ]
    choice = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    body = response_to_gemini({"tools": [FLAT, NAMESPACE], "tool_choice": choice})
    names = ["weather", "code.apply_patch"]
    config = {"mode": "ANY", "allowedFunctionNames": names}
    assert body["toolConfig"]["functionCallingConfig"] == config


@pytest.mark.parametrize("place", ["tools[0]", "input[0].tools[0]"])
@pytest.mark.parametrize("depth, length", [(0, 129), (43, 2)])
def test_a_namespace_has_a_short_name_since_each_function_repeats_it(place, depth, length):
    tool = FLAT
    for _ in range(depth + 1):
        tool = {"type": "namespace", "name": "n" * length, "tools": [tool]}
    body = {"tools": [tool]}
    if place.startswith("input"):
        body = {"input": [{**FOUND, "tools": [tool]}]}
    with pytest.raises(ProxyError) as caught:
        response_plan(body)
    assert caught.value.path == f"{place}{'.tools[0]' * depth}.name"


def test_thousands_of_allowed_tools_are_found_in_proportion():
    tools = [{**FLAT, "name": f"f{i}"} for i in range(8000)]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": tools[-1:] * 8000}
    alone = cpu_seconds(lambda: response_plan({"tools": tools}))
    assert cpu_seconds(lambda: response_plan({"tools": tools, "tool_choice": choice})) < 3 * alone


PATCH_CALL = {
    "id": "ctc_1_0",
    "type": "custom_tool_call",
    "status": "completed",
    "call_id": "call_2",
    "name": "apply_patch",
    "namespace": "code",
    "input": "X",
}


def test_a_call_of_a_custom_tool_in_a_namespace_has_its_own_events():
    answer = whole(call("code.apply_patch", {"input": "X"}))
    events = response_events({"tools": [NAMESPACE]}, answer)
    assert events[-1]["response"]["output"] == [PATCH_CALL]
    place = {"item_id": "ctc_1_0", "output_index": 0}
    assert without(events[3:5], "sequence_number") == [
        {"type": "response.custom_tool_call_input.delta", **place, "delta": "X"},
        {"type": "response.custom_tool_call_input.done", **place, "input": "X"},
    ]


@pytest.mark.parametrize(
    "tool, name, args, kind, value",
    [
        (FLAT, "weather", {"city": NOVEL}, "function_call_arguments", {"city": NOVEL}),
        (NAMESPACE, "code.apply_patch", {"input": NOVEL}, "custom_tool_call_input", NOVEL),
    ],
    ids=short_id,
)
def test_long_calls_of_a_response_are_cut_into_deltas(tool, name, args, kind, value):
    events = response_events({"tools": [tool]}, whole(call(name, args)))
    pieces = [event["delta"] for event in events if event["type"] == f"response.{kind}.delta"]
    assert len(pieces) > 5
    assert max(map(len, pieces)) <= 16_000
    text = value
    if isinstance(value, dict):
        text = proxy.encode_json(value)
    assert "".join(pieces) == text


def test_long_texts_of_a_response_are_cut_into_deltas():
    body = {"reasoning": {"summary": "auto"}}
    events = response_events(body, whole({"text": NOVEL, "thought": True}, NOVEL))
    for kind in ("output_text", "reasoning_summary_text"):
        pieces = [event["delta"] for event in events if event["type"] == f"response.{kind}.delta"]
        assert len(pieces) > 5
        assert "".join(pieces) == NOVEL


def test_a_call_of_a_custom_tool_in_a_namespace_goes_back_to_gemini():
    output = {"type": "custom_tool_call_output", "call_id": "call_2", "output": "ok"}
    function_call = {"id": "call_2", "name": "code.apply_patch", "args": {"input": "X"}}
    contents = contents_of(user("Hi"), PATCH_CALL, output)
    assert contents[1] == m({"functionCall": function_call})


GROUNDING = {
    "webSearchQueries": ["oslo"],
    "groundingChunks": [{"web": {"uri": "https://a.example", "title": "A"}}],
    "groundingSupports": [
        {"segment": {"startIndex": 0, "endIndex": 3}, "groundingChunkIndices": [0]},
        {"segment": {"startIndex": 4, "endIndex": 7}, "groundingChunkIndices": [0]},
    ],
}
ANNOTATION = {
    "type": "url_citation",
    "start_index": 0,
    "end_index": 3,
    "url": "https://a.example",
    "title": "A",
}


def search_events():
    """The events of an answer in two messages that rest on a search."""
    body = {
        "tools": [{"type": "web_search"}],
        "include": ["web_search_call.action.sources"],
        "reasoning": {"summary": "auto"},
    }
    last = whole("two.", groundingMetadata=GROUNDING)
    return response_events(body, chunk("One "), chunk(THOUGHT), last)


def test_each_message_has_the_sources_that_it_rests_on():
    first, _, second, _ = search_events()[-1]["response"]["output"]
    assert first["content"][0]["annotations"] == [ANNOTATION]
    assert second["content"][0]["annotations"] == [ANNOTATION]


def test_the_sources_of_the_last_message_have_events():
    kind = "response.output_text.annotation.added"
    events = [event for event in search_events() if event["type"] == kind]
    place = {"item_id": "msg_1_2", "output_index": 2, "content_index": 0, "annotation_index": 0}
    assert without(events, "sequence_number") == [{"type": kind, **place, "annotation": ANNOTATION}]


def test_a_search_is_an_item_with_its_queries_and_sources():
    assert search_events()[-1]["response"]["output"][3] == {
        "id": "ws_1_3",
        "type": "web_search_call",
        "status": "completed",
        "action": {
            "type": "search",
            "query": "oslo",
            "queries": ["oslo"],
            "sources": [{"type": "url", "url": "https://a.example"}],
        },
    }


def test_an_image_is_an_item_of_a_response():
    assert response_to({}, whole("Here", IMAGE))["output"][1] == {
        "id": "ig_1_1",
        "type": "image_generation_call",
        "status": "completed",
        "result": PNG,
    }


@pytest.mark.parametrize(
    "answer, kind, work",
    [
        (whole(IMAGE), "image_generation_call", "generating"),
        (whole("Hi", groundingMetadata=GROUNDING), "web_search_call", "searching"),
    ],
)
def test_the_steps_of_openais_own_tools_have_events_within_their_item(answer, kind, work):
    kinds = [event["type"] for event in response_events({}, answer)]
    start = kinds.index(f"response.{kind}.in_progress")
    steps = [f"response.{kind}.{step}" for step in (work, "completed")]
    assert kinds[start - 1] == "response.output_item.added"
    assert kinds[start + 1 : start + 4] == [*steps, "response.output_item.done"]


def test_an_image_of_a_response_goes_back_to_gemini():
    items = response_to({}, whole("Here", IMAGE))["output"]
    assert contents_of(user("Draw"), *items, user("Redder"))[1] == m("Here", IMAGE)


def stored_response():
    """(what is stored, the response) of a short exchange."""
    notes = Notes()
    body = {"input": "Who?", "instructions": "Be brief."}
    return notes, response_to(body, whole("Gem."), notes=notes)


CONTINUED = [u("Who?"), m("Gem."), u("And now?")]


def test_a_response_continues_an_earlier_one_without_its_instructions():
    notes, first = stored_response()
    body = {"input": [user("And now?")], "previous_response_id": first["id"]}
    sent = response_to_gemini(body, notes)
    assert sent["contents"] == CONTINUED
    assert "systemInstruction" not in sent


def test_references_stand_for_stored_items():
    notes, first = stored_response()
    question = {"type": "item_reference", "id": "msg_1_i0"}
    answer = {"type": "item_reference", "id": first["output"][0]["id"]}
    items = [question, answer, user("And now?")]
    assert response_to_gemini({"input": items}, notes)["contents"] == CONTINUED


def test_a_second_reference_to_an_item_is_a_400_as_openais():
    notes, _ = stored_response()
    items = [{"type": "item_reference", "id": "msg_1_i0"}] * 2
    body = {"model": FLASH, "input": items}
    context = looked_up(RESPONSES_ROUTE, body, Context(), notes)
    with pytest.raises(ProxyError, match="Duplicate item found with id msg_1_i0") as caught:
        plan_and_ignored(body, proxy.openai_responses_request, context)
    assert (caught.value.status, caught.value.path) == (400, "input")


def test_a_reference_may_leave_out_its_type():
    notes, first = stored_response()
    items = [user("Who?"), {"id": first["output"][0]["id"]}, user("And now?")]
    assert response_to_gemini({"input": items}, notes)["contents"] == CONTINUED


def test_a_stored_response_is_read():
    notes, first = stored_response()
    assert stored_answer("/v1/responses/{id}", notes) == first


def test_a_stored_response_is_not_streamed():
    notes, _ = stored_response()
    with pytest.raises(ProxyError) as caught:
        stored_answer("/v1/responses/{id}", notes, stream="true")
    assert caught.value.path == "stream"


def test_a_stored_response_is_deleted_with_its_input():
    notes, first = stored_response()
    answer = stored_answer("/v1/responses/{id}", notes, "DELETE")
    assert answer == {"id": first["id"], "object": "response", "deleted": True}
    assert not notes


def test_a_response_that_is_not_stored_is_not_read():
    with pytest.raises(ProxyError) as caught:
        stored_answer("/v1/responses/{id}", Notes())
    assert caught.value.status == 404


def test_a_response_that_is_not_stored_is_not_continued():
    body = {"model": FLASH, "previous_response_id": "resp_1"}
    error = refused(body, proxy.openai_responses_request)
    assert error.code == "previous_response_not_found"


def test_a_response_too_large_to_store_says_that_it_is_not_stored(monkeypatch):
    monkeypatch.setattr(proxy, "MAX_STORED_CHARACTERS", 1000)
    notes = Notes()
    events = response_events({"input": "x" * 1000}, whole("Gem."), notes=notes)
    assert events[-1]["response"]["store"] is False
    assert not notes


def test_a_response_is_not_stored_where_the_client_forbids_it():
    notes = Notes()
    response_to({"store": False}, whole("Gem."), notes=notes)
    assert not notes


def test_a_stored_response_cannot_be_cancelled():
    notes, _ = stored_response()
    with pytest.raises(ProxyError) as caught:
        stored_answer("/v1/responses/{id}/cancel", notes, "POST")
    assert caught.value.status == 400


def item_page(**query):
    """A page of the input of a stored response with three messages."""
    notes = Notes()
    items = [user("a"), assistant("b", id=None), user("c")]
    response_to({"input": items}, whole("d"), notes=notes)
    return stored_answer("/v1/responses/{id}/input_items", notes, **query)


def test_the_input_of_a_stored_response_comes_newest_first():
    page = item_page()
    assert [item["id"] for item in page["data"]] == ["msg_1_i2", "msg_1_i1", "msg_1_i0"]


def test_a_page_of_input_items_is_openais():
    answer = [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]
    question = [{"type": "input_text", "text": "c"}]
    more = {"type": "message", "status": "completed"}
    assert item_page(order="asc", limit="2", after="msg_1_i0") == {
        "object": "list",
        "first_id": "msg_1_i1",
        "last_id": "msg_1_i2",
        "has_more": False,
        "data": [
            {"id": "msg_1_i1", "role": "assistant", "content": answer, **more},
            {"id": "msg_1_i2", "role": "user", "content": question, **more},
        ],
    }


def test_a_stored_item_has_a_status_where_openais_have_one():
    """ResponseItemList in https://github.com/openai/openai-openapi requires it."""
    items = [
        user("Hi"),
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "x"},
        {"type": "custom_tool_call", "call_id": "b", "name": "g", "input": "", "status": "failed"},
    ]
    notes = Notes()
    response_to({"input": items}, whole("d"), notes=notes)
    page = stored_answer("/v1/responses/{id}/input_items", notes, order="asc")
    states = [item.get("status") for item in page["data"]]
    assert states == ["completed", None, "completed", "completed", "failed"]


def test_an_image_in_a_stored_message_has_its_detail_which_loses_nothing_later():
    notes = Notes()
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}
    first = response_to({"input": [user([image])]}, whole("d"), notes=notes)
    (item,) = stored_answer("/v1/responses/{id}/input_items", notes)["data"]
    assert item["content"] == [{**image, "detail": "auto"}]
    body = {"model": FLASH, "input": "And?", "previous_response_id": first["id"]}
    context = looked_up(RESPONSES_ROUTE, body, Context(), notes)
    assert plan_and_ignored(body, proxy.openai_responses_request, context)[1] == []


@pytest.mark.parametrize("order", ["up", "DESCENDING"])
def test_an_order_of_input_items_that_does_not_exist_is_a_400(order):
    with pytest.raises(ProxyError) as caught:
        item_page(order=order)
    assert (caught.value.status, caught.value.path) == (400, "order")


def test_a_page_of_input_items_says_whether_there_are_more():
    assert item_page(limit="1")["has_more"]


def test_a_page_of_input_items_has_a_limit():
    with pytest.raises(ProxyError, match="limit"):
        item_page(limit="0")


JSON_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
JSON_TEXT = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": JSON_SCHEMA}}


def test_a_response_in_json_has_its_schema():
    assert response_to_gemini({"text": JSON_TEXT})["generationConfig"] == {
        "responseMimeType": "application/json",
        "responseJsonSchema": JSON_SCHEMA,
    }


def test_json_beside_tools_loses_its_code_fence():
    body = {"text": JSON_TEXT, "tools": [FLAT]}
    response = response_to(body, whole('```json\n{"a":"b"}\n```'))
    assert response["output"][0]["content"][0]["text"] == '{"a":"b"}'


@pytest.mark.parametrize(
    "form, echo",
    [
        (None, {"type": "text"}),
        ({"type": "text"}, {"type": "text"}),
        ({"type": "json_object"}, {"type": "json_object"}),
        (JSON_TEXT["format"], {**JSON_TEXT["format"], "description": None}),
        (
            {"type": "json_schema", "name": "x", "schema": JSON_SCHEMA, "strict": None},
            {**JSON_TEXT["format"], "description": None, "strict": False},
        ),
        (
            {**JSON_TEXT["format"], "description": "A letter"},
            {**JSON_TEXT["format"], "description": "A letter"},
        ),
    ],
)
def test_a_response_repeats_its_format_with_all_keys(form, echo):
    response = response_to({"text": {"format": form}}, whole('{"a":"b"}'))
    assert response["text"]["format"] == echo


def test_a_response_repeats_its_tools_with_all_keys():
    tools = [{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}]
    nulls = {"description": None, "defer_loading": None}
    expected = [
        {**tools[0], "description": None, "parameters": None, "strict": False},
        {**tools[1], "format": {"type": "text"}},
    ]
    for sent in (tools, [{**tool, **nulls} for tool in tools]):
        assert response_to({"tools": sent}, whole("Hi"))["tools"] == expected


@pytest.mark.parametrize(
    "reasoning, config, kinds",
    [
        ({"effort": "low"}, {"thinkingLevel": "LOW"}, ["message"]),
        ({"summary": "concise"}, {"includeThoughts": True}, ["reasoning", "message"]),
        (
            {"effort": "ultra", "generate_summary": "auto"},
            {"thinkingLevel": "HIGH", "includeThoughts": True},
            ["reasoning", "message"],
        ),
    ],
)
def test_thoughts_come_with_a_summary(reasoning, config, kinds):
    body = {"model": NEWEST, "reasoning": reasoning}
    assert response_to_gemini(body)["generationConfig"] == {"thinkingConfig": config}
    response = response_to(body, whole(THOUGHT, "42"))
    assert [item["type"] for item in response["output"]] == kinds


def test_thoughts_come_by_themselves_from_an_ollama_server():
    response = response_to({}, whole(THOUGHT, "42"), context=Context(ollama=True))
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]


def test_the_body_of_a_response_is_answered_as_a_chat_too():
    body = {"model": FLASH, "instructions": "Be brief.", "input": [user("Hi")]}
    sent = gemini_body({**body, "tools": [FLAT, PATCH]})
    assert sent["contents"] == [u("Hi")]
    assert sent["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    names = [entry["name"] for entry in sent["tools"][0]["functionDeclarations"]]
    assert names == ["weather", "apply_patch"]


@pytest.mark.parametrize("path, more", [("input", {"input": 7}), ("messages", {})])
def test_a_chat_without_messages_is_a_400_with_the_place(path, more):
    assert refused({"model": FLASH, **more}).path == path


def test_what_a_chat_in_the_form_of_a_response_cannot_do_is_named_as_ignored():
    body = {"model": FLASH, "input": [user("Hi"), {"type": "compaction_trigger"}]}
    assert plan_and_ignored(body)[1] == ["input[].compaction_trigger"]


def test_the_last_configuration_of_a_chat_in_the_form_of_a_response_counts():
    update = {"type": "configuration_update", "reasoning": {"effort": "low"}, "text": JSON_TEXT}
    body = {"model": NEWEST, "input": [user("Hi"), update], "reasoning_effort": "high"}
    plan, ignored = plan_and_ignored(body)
    config = plan.calls[0].body["generationConfig"]
    assert (config["thinkingConfig"]["thinkingLevel"], ignored) == ("LOW", [])
    assert config["responseMimeType"] == "application/json"


# ---- compaction ----

TRIGGER = {"type": "compaction_trigger"}
COMPACT_ROUTE = openai_route("/v1/responses/compact")


def compaction_item(summary="We spoke."):
    content = base64.b64encode(proxy.encode_json({"summary": summary}).encode()).decode()
    return {"type": "compaction", "encrypted_content": content}


SUMMARY = u(f"{proxy.SUMMARY_HEAD}We spoke.")
OSLO_OUTPUT = {"type": "function_call_output", "call_id": "call_9", "output": "3"}
OSLO_TURNS = [user("Hi"), OSLO_CALL, OSLO_OUTPUT]


def test_a_compaction_trigger_is_answered_with_one_compaction():
    body = {"input": [*OSLO_TURNS, TRIGGER], "tools": [FLAT]}
    events = response_events(body, chunk(THOUGHT), chunk("We "), whole("spoke."))
    item = {"id": "cmp_1_0", **compaction_item()}
    assert without(events, "sequence_number", "response") == [
        {"type": "response.created"},
        {"type": "response.in_progress"},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed"},
    ]
    assert events[-1]["response"]["output"] == [item]
    assert events[-1]["response"]["usage"]["total_tokens"] == 11


def test_a_summary_is_asked_for_in_words_after_the_conversation_and_without_a_call():
    body = {
        "input": [*OSLO_TURNS, TRIGGER],
        "tools": [FLAT, {"type": "web_search"}],
        "tool_choice": "required",
        "text": JSON_TEXT,
    }
    sent = response_to_gemini({"model": NEWEST, **body})
    assert sent["contents"][-1]["parts"][-1] == {"text": proxy.COMPACTION_PROMPT}
    assert len(sent["contents"]) == 4
    assert [list(tool) for tool in sent["tools"]] == [["functionDeclarations"]]
    assert sent["toolConfig"] == {"functionCallingConfig": {"mode": "NONE"}}
    assert "generationConfig" not in sent


@pytest.mark.parametrize("place", [0, 1])
def test_a_compaction_trigger_is_the_last_item(place):
    items = [user("Hi"), user("Hi")]
    items.insert(place, TRIGGER)
    with pytest.raises(ProxyError) as caught:
        response_plan({"input": items})
    assert (caught.value.status, caught.value.path) == (400, f"input[{place}]")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/compact"])
def test_nothing_is_not_compacted(path):
    body = {"model": FLASH, "instructions": "Be brief."}
    if path == "/v1/responses":
        body["input"] = [TRIGGER]
    error = refused(body, openai_route(path).request)
    assert (error.status, error.path) == (400, "input")


@pytest.mark.parametrize(
    "last, status",
    [
        (whole(), "failed"),
        (whole(THOUGHT), "failed"),
        (whole("We", finish="MAX_TOKENS"), "incomplete"),
        (whole("We", finish="SAFETY"), "incomplete"),
    ],
)
def test_a_conversation_whose_summary_is_not_whole_is_not_compacted(last, status):
    response = response_to({"input": [user("Hi"), TRIGGER]}, last)
    assert (response["status"], response["output"]) == (status, [])
    assert response["error"] or response["incomplete_details"]


def test_a_compaction_stands_for_all_before_it_but_the_users_words():
    contents = contents_of(
        *OSLO_TURNS,
        assistant("Cold."),
        user("And?"),
        compaction_item(),
        assistant("Warm."),
        user("?"),
    )
    assert contents == [
        u(*(part for turn in (u("Hi", "And?"), SUMMARY) for part in turn["parts"])),
        m("Warm."),
        u("?"),
    ]


def test_a_call_after_a_compaction_keeps_its_result():
    contents = contents_of(*OSLO_TURNS, compaction_item(), *OSLO_TURNS[1:])
    assert [next(iter(part)) for turn in contents for part in turn["parts"]] == [
        "text",
        "text",
        "functionCall",
        "functionResponse",
    ]


def test_the_last_of_several_compactions_counts():
    items = [user("Hi"), compaction_item("Old."), assistant("Yes."), user("And?")]
    contents = contents_of(*items, compaction_item(), user("Go"))
    assert contents == [u("Hi", "And?", *SUMMARY["parts"], "Go")]


@pytest.mark.parametrize(
    "content", ["gAAA", signatures("call_9"), compaction_item("")["encrypted_content"]]
)
def test_a_compaction_of_others_is_named_as_ignored(content):
    item = {**compaction_item(), "encrypted_content": content}
    plan, ignored = response_plan({"input": [assistant("Yes."), item, user("Hi")]})
    assert ignored == ["input[].encrypted_content"]
    assert plan.calls[0].body["contents"][-2:] == [m("Yes."), u("Hi")]


def test_what_is_sealed_is_not_unpacked_if_it_would_be_far_larger_in_memory(monkeypatch):
    monkeypatch.setattr(proxy, "SPARE_BYTES", 1000)
    text = json.dumps({"summary": "We spoke.", "x": [{}] * 1000})
    content = base64.b64encode(text.encode()).decode()
    items = [{**compaction_item(), "encrypted_content": content}, reasoning_item(content)]
    plan, ignored = response_plan({"input": [*items, user("Hi")]})
    assert (plan.calls[0].body["contents"], ignored) == ([u("Hi")], ["input[].encrypted_content"])


@pytest.mark.parametrize("kind", ["compaction_summary", "context_compaction"])
def test_codexs_other_names_of_compactions(kind):
    assert (
        contents_of({**compaction_item(), "type": kind}, user("Hi"))[0]["parts"][0]
        == SUMMARY["parts"][0]
    )
    assert response_plan({"input": [{"type": kind}, user("Hi")]})[1] == []


def test_a_stored_response_goes_on_from_its_compaction():
    notes = Notes()
    first = response_to({"input": [*OSLO_TURNS, TRIGGER]}, whole("We spoke."), notes=notes)
    sent = response_to_gemini({"previous_response_id": first["id"], "input": "And?"}, notes)
    assert sent["contents"] == [u("Hi", *SUMMARY["parts"], "And?")]


def managed(threshold, **more):
    management = [{"type": "compaction", "compact_threshold": threshold}]
    return {"input": [user("x" * 400)], "context_management": management, **more}


@pytest.mark.parametrize("threshold, calls", [(101, 2), (102, 1)])
def test_a_conversation_is_compacted_from_the_threshold_on(threshold, calls):
    plan, ignored = response_plan(managed(threshold, temperature=0.5, max_output_tokens=9))
    assert (len(plan.calls), ignored) == (calls, [])
    assert plan.calls[-1].body["contents"] == [u("x" * 400)]
    assert plan.calls[-1].body["generationConfig"] == {"temperature": 0.5, "maxOutputTokens": 9}
    if calls == 2:
        assert "generationConfig" not in plan.calls[0].body


def test_an_answer_follows_the_compaction_that_the_threshold_asked_for():
    plan = response_plan(managed(1))[0]
    answers = ([whole("We spoke.")], [whole("Hello")])
    events = stream_of(RESPONSES_ROUTE, exchange(plan), *answers)
    assert [event["type"] for event in events[:5]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.output_item.done",
        "response.output_item.added",
    ]
    response = events[-1]["response"]
    assert response["output"] == [
        {"id": "cmp_1_0", **compaction_item()},
        {**MESSAGE_ITEM, "id": "msg_1_1"},
    ]
    assert response["usage"]["total_tokens"] == 22


def test_an_answer_needs_no_whole_summary():
    plan = response_plan(managed(1))[0]
    answers = ([whole("We", finish="MAX_TOKENS")], [whole("Hello")])
    response = whole_of(RESPONSES_ROUTE, exchange(plan), *answers)
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["status"] == "completed"


def failing(message, *chunks):
    """Chunks of an answer that fails behind them."""
    yield from chunks
    raise ProxyError(429, message, upstream=True)


@pytest.mark.parametrize("chunks", [(), (chunk("We"),)])
def test_an_answer_needs_no_summary_at_all(chunks):
    answers = failing("No summary.", *chunks), [whole("Hello")]
    events = stream_of(RESPONSES_ROUTE, exchange(response_plan(managed(1))[0]), *answers)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    response = events[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["status"] == "completed"


def test_a_summary_and_an_answer_that_both_fail_are_the_answers_failure():
    answers = failing("No summary."), failing("No answer.")
    with pytest.raises(ProxyError, match="No answer"):
        stream_of(RESPONSES_ROUTE, exchange(response_plan(managed(1))[0]), *answers)


def test_media_count_by_their_number_in_an_estimate_of_tokens():
    parts = [{"text": "five?"}, IMAGE, {"functionResponse": {"name": "f", "parts": [IMAGE]}}]
    assert proxy.estimated_tokens(u(*parts)) == 1 + 2 + 1 + 2 * proxy.MEDIA_TOKENS


@pytest.mark.parametrize(
    "entry, ignored",
    [
        ({"type": "compaction"}, ["context_management[].compaction"]),
        ({"type": "other", "compact_threshold": 1}, ["context_management[].other"]),
    ],
)
def test_other_context_management_is_named_as_ignored(entry, ignored):
    plan, names = response_plan({"context_management": [entry]})
    assert (len(plan.calls), names) == (1, ignored)


def test_a_bad_threshold_is_a_400_with_the_place():
    with pytest.raises(ProxyError) as caught:
        response_plan(managed(0))
    assert caught.value.path == "context_management[0].compact_threshold"


def compacted(body, *answers, notes=None):
    """What the route for compaction answers, when Gemini says these chunks."""
    notes = Notes() if notes is None else notes
    context = looked_up(COMPACT_ROUTE, body, Context(), notes)
    plan, ignored = plan_and_ignored(body, COMPACT_ROUTE.request, context)
    return whole_of(COMPACT_ROUTE, exchange(plan, context), answers, notes=notes), ignored


def test_a_compacted_conversation_is_the_users_messages_and_one_compaction():
    notes = Notes()
    body = {"model": FLASH, "instructions": "Be brief.", "input": OSLO_TURNS, "stream": True}
    answer, ignored = compacted(body, whole("We spoke."), notes=notes)
    message = {"type": "message", "role": "user", "status": "completed"}
    message.update(id="msg_1_i0", content=[{"type": "input_text", "text": "Hi"}])
    assert answer.pop("usage")["total_tokens"] == 11
    assert answer == {
        "id": "resp_1",
        "object": "response.compaction",
        "created_at": 1700000000,
        "output": [message, {"id": "cmp_1_0", **compaction_item()}],
    }
    assert ignored == ["stream"]
    assert not notes


def test_a_stored_conversation_is_compacted_with_its_messages():
    notes = Notes()
    first = response_to({"input": "Hello?"}, whole("Yes?"), notes=notes)
    body = {"model": FLASH, "previous_response_id": first["id"], "input": "So?"}
    answer, _ = compacted(body, whole("We spoke."), notes=notes)
    texts = [item["content"][0]["text"] for item in answer["output"][:-1]]
    assert texts == ["Hello?", "So?"]
    assert answer["output"][-1]["type"] == "compaction"


@pytest.mark.parametrize(
    "last, words", [(whole(), "no summary"), (whole("We", finish="MAX_TOKENS"), "incomplete")]
)
def test_a_conversation_that_cannot_be_compacted_is_a_502(last, words):
    with pytest.raises(ProxyError) as caught:
        compacted({"model": FLASH, "input": "Hi"}, last)
    assert caught.value.status == 502
    assert words in caught.value.message


def test_a_compaction_opens_on_another_instance(server, gemini):
    gemini.say(whole("We spoke."))
    item = post_json(server, "/v1/responses/compact", {"model": FLASH, "input": "Hi"})["output"][-1]
    gemini.say(whole("Yes."))
    with serving(gemini.url) as other:
        post_json(other, "/v1/responses", {"model": FLASH, "input": [item, user("And?")]})
    assert gemini.bodies[-1]["contents"] == [u(*SUMMARY["parts"], "And?")]


# ---- Codex ----

FINDER = {
    "type": "tool_search",
    "execution": "client",
    "description": "Search for tools.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
FOUND_TOOL = {**FLAT, "defer_loading": True}
FOUND = {
    "type": "tool_search_output",
    "call_id": "call_9",
    "execution": "client",
    "status": "completed",
    "tools": [{"type": "namespace", "name": "met", "description": "Met", "tools": [FOUND_TOOL]}],
}
FINDER_CALL = {
    "type": "tool_search_call",
    "call_id": "call_9",
    "execution": "client",
    "status": "completed",
    "arguments": {"query": "weather"},
}


def declared(body):
    """{name: description} of the functions that Gemini gets."""
    tools = response_to_gemini(body)["tools"]
    return {
        entry["name"]: entry["description"]
        for tool in tools
        for entry in tool.get("functionDeclarations", ())
    }


def test_a_search_for_tools_is_a_function_and_its_call_an_item():
    body = {"tools": [FINDER]}
    sent = response_to_gemini(body)["tools"][0]["functionDeclarations"]
    assert sent == [
        {
            "name": "tool_search",
            "description": "Search for tools.",
            "parametersJsonSchema": FINDER["parameters"],
        }
    ]
    events = response_events(body, whole(call("tool_search", {"query": "weather"})))
    item = {"id": "tsc_1_0", **FINDER_CALL, "call_id": "call_2"}
    assert without(events[2:4], "sequence_number") == [
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "status": "in_progress"},
        },
        {"type": "response.output_item.done", "output_index": 0, "item": item},
    ]


def test_a_call_without_a_name_is_no_search_for_tools():
    events = response_events({}, whole(call("", {"a": 1})))
    assert events[2]["item"]["type"] == "function_call"


LOCAL_CALLS = {
    "shell": (
        {"commands": ["ls"]},
        {
            "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None},
            "environment": {"type": "local"},
        },
    ),
    "local_shell": (
        {"command": ["ls", "-l"]},
        {"action": {"type": "exec", "env": {}, "command": ["ls", "-l"]}},
    ),
    "apply_patch": (
        {"type": "create_file", "path": "a", "diff": "+a"},
        {"operation": {"type": "create_file", "path": "a", "diff": "+a"}},
    ),
}


@pytest.mark.parametrize("name", LOCAL_CALLS)
def test_openais_local_tools_are_functions_and_their_calls_items(name):
    body, (args, fields) = {"tools": [{"type": name}]}, LOCAL_CALLS[name]
    (sent,) = response_to_gemini(body)["tools"][0]["functionDeclarations"]
    assert sent["name"] == name
    assert set(sent["parametersJsonSchema"]["required"]) <= set(args)
    events = response_events(body, whole(call(name, args)))
    item = {"id": "lc_1_0", "type": f"{name}_call", "call_id": "call_2", **fields}
    assert [(event["type"], event["item"]) for event in events[2:4]] == [
        ("response.output_item.added", {**item, "status": "in_progress"}),
        ("response.output_item.done", {**item, "status": "completed"}),
    ]


@pytest.mark.parametrize("name, args", [*((name, args) for name, (args, _) in LOCAL_CALLS.items())])
def test_a_call_of_a_local_tool_goes_back_as_it_came(name, args):
    (item,) = response_to({"tools": [{"type": name}]}, whole(call(name, args)))["output"]
    turn = contents_of(user("Hi"), item)[1]
    assert turn["parts"][0]["functionCall"] == {"id": "call_2", "name": name, "args": args}


@pytest.mark.parametrize("args, commands", [({"commands": "ls -l"}, ["ls -l"]), ({}, [])])
def test_the_commands_of_a_shell_are_a_list_whatever_the_model_wrote(args, commands):
    (item,) = response_to({"tools": [{"type": "shell"}]}, whole(call("shell", args)))["output"]
    assert item["action"]["commands"] == commands


def test_a_patch_has_a_diff_even_if_it_is_empty():
    """ApplyPatchCreateFileOperation in https://github.com/openai/openai-openapi requires one."""
    answer = whole(call("apply_patch", {"type": "create_file", "path": "a"}))
    (item,) = response_to({"tools": [{"type": "apply_patch"}]}, answer)["output"]
    assert item["operation"] == {"type": "create_file", "path": "a", "diff": ""}


def test_the_skills_of_a_local_shell_are_told_to_the_model():
    skill = {"name": "csv", "description": "Reads tables", "path": "/skills/csv"}
    shell = {"type": "shell", "environment": {"type": "local", "skills": [skill]}}
    plan, ignored = response_plan({"tools": [shell]})
    (sent,) = plan.calls[0].body["tools"][0]["functionDeclarations"]
    words = "Skill csv, whose instructions are in /skills/csv/SKILL.md: Reads tables"
    assert sent["description"].splitlines()[1:] == [words]
    assert ignored == []


def test_a_local_tool_can_be_chosen():
    tools = [{"type": "shell", "environment": {"type": "local"}}, FLAT]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "shell"}]}
    for choice in ({"type": "shell"}, allowed):
        body = {"tools": tools, "tool_choice": choice}
        config = response_to_gemini(body)["toolConfig"]["functionCallingConfig"]
        assert config == {"mode": "ANY", "allowedFunctionNames": ["shell"]}
        assert response_plan(body)[1] == []


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "shell", "environment": {"type": "container_auto"}}],
        [{**FLAT, "name": "shell"}, {"type": "shell"}],
    ],
    ids=["in a container of OpenAI's", "beside a function of its name"],
)
def test_other_local_tools_are_ignored(tools):
    plan, ignored = response_plan({"tools": tools})
    assert (plan.chat.tools.local, ignored) == (set(), ["tools[].shell"])


def test_tools_that_were_found_are_declared_and_called_by_their_names():
    items = [user("Hi"), reasoning_item(signatures("call_9")), FINDER_CALL, FOUND]
    body = {"model": NEWEST, "tools": [FINDER], "input": items}
    plan, ignored = response_plan(body)
    assert ignored == []
    assert list(declared(body)) == ["met.weather", "tool_search"]
    search = {"id": "call_9", "name": "tool_search", "args": {"query": "weather"}}
    result = {"id": "call_9", "name": "tool_search", "response": {"tools": ["met.weather"]}}
    assert plan.calls[0].body["contents"] == [
        u("Hi"),
        m({"functionCall": search, "thoughtSignature": sign("s")}),
        u({"functionResponse": result}),
    ]
    output = response_to(body, whole(call("met.weather", {"city": "Oslo"})))["output"]
    assert (output[0]["namespace"], output[0]["name"]) == ("met", "weather")


def test_deferred_tools_wait_for_the_clients_search():
    description = (
        "Search for tools.\nIt finds these, among others:\nweather: " + FLAT["description"]
    )
    names = declared({"tools": [FOUND_TOOL, FINDER, {**PATCH, "type": "custom"}]})
    assert list(names) == ["apply_patch", "tool_search"]
    assert names["tool_search"] == description


@pytest.mark.parametrize("finder", [[], [{"type": "tool_search"}]])
def test_without_a_search_of_the_clients_deferred_tools_are_declared_at_once(finder):
    body = {"tools": [FOUND_TOOL, *finder]}
    assert list(declared(body)) == ["weather"]
    assert response_plan(body)[1] == ["tools[].tool_search" for _ in finder]


def test_a_deferred_function_may_stand_in_an_object_as_in_chats():
    tool = {"type": "function", "function": WEATHER["function"], "defer_loading": True}
    plan, ignored = plan_and_ignored(chat(tools=[FINDER, tool]))
    (finder,) = plan.calls[0].body["tools"][0]["functionDeclarations"]
    assert (finder["name"], ignored) == ("tool_search", [])
    assert f"weather: {WEATHER['function']['description']}" in finder["description"]


@pytest.mark.parametrize(
    "tool, key", [(OPENAIS_MCP, "mcpServers"), ({"type": "web_search"}, "googleSearch")]
)
def test_what_is_no_function_is_not_deferred(tool, key):
    tools = [FINDER, {**tool, "defer_loading": True}]
    plan, ignored = response_plan({"model": NEWEST, "tools": tools})
    assert (key in plan.calls[0].body["tools"][1], ignored) == (True, [])


def test_a_search_on_openais_servers_leaves_its_tools():
    call_item, output = (
        {**item, "call_id": None, "execution": "server"} for item in (FINDER_CALL, FOUND)
    )
    body = {"input": [user("Hi"), call_item, output]}
    assert response_to_gemini(body)["contents"] == [u("Hi")]
    assert list(declared(body)) == ["met.weather"]


def test_what_another_agent_says_is_text():
    content = [{"type": "input_text", "text": "Done."}]
    item = {"type": "agent_message", "author": "/a", "recipient": "/root", "content": content}
    assert contents_of(item) == [u("[Message from /a to /root]\n", "Done.")]


def test_the_last_configuration_update_counts():
    updates = [
        {"type": "configuration_update", "reasoning": {"effort": "low"}},
        {"type": "configuration_update", "text": JSON_TEXT},
    ]
    body = {"model": NEWEST, "input": [user("Hi"), *updates], "reasoning": {"effort": "high"}}
    config = response_to_gemini(body)["generationConfig"]
    assert config["thinkingConfig"] == {"thinkingLevel": "LOW"}
    assert config["responseMimeType"] == "application/json"
    assert response_to(body, whole("{}"))["reasoning"]["effort"] == "low"


def test_sealed_content_of_openais_is_named_as_ignored():
    output = [{"type": "encrypted_content", "encrypted_content": "gAAA"}]
    items = [OSLO_CALL, {**OSLO_OUTPUT, "output": output}]
    plan, ignored = response_plan({"input": items})
    assert ignored == ["input[].output[].encrypted_content"]
    result = plan.calls[0].body["contents"][-1]["parts"][0]["functionResponse"]["response"]
    assert result == {"output": "[sealed content]"}


def test_audio_in_codexs_form_is_read():
    part = {"type": "input_audio", "audio_url": f"data:audio/wav;base64,{PNG}"}
    assert contents_of(user([part]))[0]["parts"] == [
        {"inlineData": {"mimeType": "image/png", "data": PNG}}
    ]


def test_a_web_socket_is_refused_with_a_426_at_once(server):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    with RawClient(server) as client:
        status, answered, body = client.request("GET", "/v1/responses", **headers)
    assert (status, answered["upgrade"]) == (426, "HTTP/1.1")
    assert "POST" in json.loads(body)["error"]["message"]


def test_codex_gets_a_list_of_models_of_its_own():
    context = Context(request=queried({"client_version": "0.171.0"}))
    answers = iter([iter([{"models": MODELS}])])
    listed = proxy.openai_models_response(exchange(proxy.Plan(), context), answers)
    assert listed["models"] == []
    assert listed["data"]


def test_audio_is_a_note_in_the_text_of_a_response():
    one = exchange(
        plan_and_ignored({"model": FLASH, "input": "Hi"}, proxy.openai_responses_request)[0]
    )
    audio = {"inlineData": {"mimeType": "audio/wav", "data": PNG}}
    response = whole_of(RESPONSES_ROUTE, one, [whole("Hear:", audio)])
    note = "\n[Gemini made something of type audio/wav, for which there is no place here.]\n"
    texts = [part["text"] for item in response["output"] for part in item["content"]]
    assert texts == ["Hear:" + note]


def test_a_response_that_fails_before_its_first_word_begins_all_the_same():
    one = exchange(
        plan_and_ignored({"model": FLASH, "input": "Hi"}, proxy.openai_responses_request)[0]
    )
    failure = proxy.openai_responses_failure(one, ProxyError(429, "slow down", retry_after=7.0))
    events = list(kept_by(failure, Notes()))
    kinds = ["response.created", "response.in_progress", "response.failed"]
    assert [event["type"] for event in events] == kinds
    assert [event["sequence_number"] for event in events] == [0, 1, 2]


# ======================================================================================
# 9. Ollama
# ======================================================================================

OLLAMA = Context(ollama=True)


def ollama_route(path, method="POST"):
    return all_routes()["ollama", method, path]


def ollama(body, *answers, path="/api/chat", context=OLLAMA):
    """(the whole answer, the streamed events) to a body, when Gemini says this."""
    route = ollama_route(path)
    plan = plan_and_ignored(body, route.request, context)[0]
    answer = whole_of(route, exchange(plan, context), *answers)
    return answer, stream_of(route, exchange(plan, context), *answers) if plan.stream else None


def ollama_body(body, path="/api/chat"):
    return gemini_body(body, request=ollama_route(path).request, context=OLLAMA)


def ollama_config(body):
    return ollama_body(body).get("generationConfig", {})


STAMP = {"model": FLASH, "created_at": "2023-11-14T22:13:20.500000Z"}
METRICS = {
    "done": True,
    "done_reason": "stop",
    "total_duration": 1,
    "load_duration": 1,
    "prompt_eval_count": 4,
    "prompt_eval_duration": 1,
    "eval_count": 7,
    "eval_duration": 1,
}

# ---- requests to chat and generate ----

CHAT_WITH_SETTINGS = chat(
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is this?", "images": [PNG]},
    assistant("A dot.", thinking="Hm"),
    {"role": "user"},
    user("Sure?"),
    options={
        "temperature": 3,
        "top_p": 0.5,
        "top_k": 40,
        "num_predict": 100,
        "seed": 7,
        "stop": "END",
        "num_ctx": 9,
    },
    think="low",
    keep_alive="5m",
    model=NEWEST,
)


def test_an_ollama_chat_becomes_a_request():
    assert ollama_body(CHAT_WITH_SETTINGS) == {
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"text": "What is this?"},
                    {"inlineData": {"mimeType": "image/png", "data": PNG}},
                ],
            },
            {"role": "model", "parts": [{"text": "A dot."}]},
            {"role": "user", "parts": [{"text": "Sure?"}]},
        ],
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "generationConfig": {
            "temperature": 2,
            "topP": 0.5,
            "topK": 40,
            "maxOutputTokens": 100,
            "seed": 7,
            "stopSequences": ["END"],
            "thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True},
        },
    }


@pytest.mark.parametrize("role", ["system", "developer", "System"])
def test_a_system_message_between_turns_of_ollamas_stays_there(role):
    silence = {"role": role, "content": "The user is silent. Ask again."}
    body = chat(
        {"role": "system", "content": "Be brief."},
        user("A shirt."),
        assistant("Which size?"),
        silence,
    )
    gemini = ollama_body(body)
    assert gemini["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert gemini["contents"] == [
        u("A shirt."),
        m("Which size?"),
        u("<system>\n", "The user is silent. Ask again.", "\n</system>"),
    ]


def test_an_empty_system_message_between_turns_of_ollamas_says_nothing():
    body = chat(user("A"), assistant("B"), {"role": "system", "content": ""}, user("C"))
    assert ollama_body(body)["contents"] == [u("A"), m("B"), u("C")]


def test_an_ollama_chat_streams_unless_the_client_says_otherwise():
    plan = plan_and_ignored(chat(), proxy.ollama_chat_request, OLLAMA)[0]
    assert plan.stream
    assert plan.calls[0].streaming
    assert not plan_and_ignored(chat(stream=False), proxy.ollama_chat_request, OLLAMA)[0].stream


def test_an_option_of_local_models_is_named_as_ignored():
    ignored = plan_and_ignored(CHAT_WITH_SETTINGS, proxy.ollama_chat_request, OLLAMA)[1]
    assert ignored == ["options.num_ctx"]


@pytest.mark.parametrize(
    "more", [{"logprobs": True}, {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 0}]
)
def test_ollamas_logprobs_are_named_as_ignored(more):
    assert "logprobs" in plan_and_ignored(chat(**more), proxy.ollama_chat_request, OLLAMA)[1]


def test_fractions_of_whole_numbers_are_cut_off_as_ollama_does():
    config = ollama_config(chat(options={"top_k": 40.9, "num_predict": 2000.5, "seed": 1e300}))
    assert config["topK"] == 40
    assert config["maxOutputTokens"] == 2000
    assert 0 <= config["seed"] < 2**31


def test_the_content_parts_of_an_ollama_tool_result_are_kept():
    body = chat(
        user("q"),
        assistant("", tool_calls=[{"function": {"name": "look", "arguments": {}}}]),
        {
            "role": "tool",
            "tool_name": "look",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "text", "text": "b"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            ],
        },
    )
    contents = ollama_body(body)["contents"]
    assert contents[2:] == [
        u(answer_to("look", {"output": "a\nb"})),
        u({"inlineData": {"mimeType": "image/png", "data": PNG}}),
    ]


def test_ollama_takes_geminis_word_for_the_role_of_an_assistant():
    body = ollama_body(chat(user("q"), {"role": "model", "content": "a"}, user("b")))
    assert body["contents"] == [u("q"), m("a"), u("b")]


@pytest.mark.parametrize(
    "options",
    [
        {"num_predict": -1, "seed": -1, "top_k": -1, "stop": []},
        {"num_predict": -2, "top_k": 0},
        {"num_predict": None},
    ],
)
def test_ollamas_options_that_stand_for_none_set_nothing(options):
    assert set(ollama_config(chat(options=options))) == {"thinkingConfig"}


@pytest.mark.parametrize(
    "think, limit, config",
    [
        (None, 50, {"thinkingBudget": 0}),
        (True, 50, {"includeThoughts": True}),
        ("low", 50, {"thinkingBudget": 1024, "includeThoughts": True}),
        (None, 1024, {"includeThoughts": True}),
        (None, -1, {"includeThoughts": True}),
    ],
)
def test_a_small_limit_of_ollamas_is_not_used_up_by_thoughts(think, limit, config):
    """Gemini's thoughts count against it, so a title of 50 tokens would be none at all."""
    body = chat(think=think, options={"num_predict": limit})
    assert ollama_config(body)["thinkingConfig"] == config


@pytest.mark.parametrize(
    "limits, config",
    [
        ({"max_tokens": 50}, {"thinkingBudget": 0}),
        ({"max_tokens": 1024}, None),
        ({"max_completion_tokens": 50}, None),
        ({}, None),
    ],
)
def test_a_small_max_tokens_of_openais_is_not_used_up_by_thoughts(limits, config):
    body = gemini_body(chat(**limits))
    assert body.get("generationConfig", {}).get("thinkingConfig") == config


def test_the_older_of_two_limits_is_named_as_ignored():
    plan, ignored = plan_and_ignored(chat(max_tokens=50, max_completion_tokens=2000))
    assert plan.calls[0].body["generationConfig"] == {"maxOutputTokens": 2000}
    assert ignored == ["max_tokens"]


@pytest.mark.parametrize(
    "think, config",
    [
        (None, {"includeThoughts": True}),
        (True, {"includeThoughts": True}),
        (False, {"thinkingBudget": 0}),
        ("max", {"thinkingBudget": 24576, "includeThoughts": True}),
    ],
)
def test_think_becomes_a_thinking_config(think, config):
    assert ollama_config(chat(think=think))["thinkingConfig"] == config


@pytest.mark.parametrize("think", [None, False])
def test_a_model_that_cannot_think_gets_no_thinking_config(think):
    assert "generationConfig" not in ollama_body(chat(think=think, model="gemini-2.0-flash"))


@pytest.mark.parametrize(
    "name",
    [
        FLASH,
        FLASH + ":latest",
        "models/" + FLASH,
        "library/" + FLASH,
        "registry.ollama.ai/library/" + FLASH + ":latest",
        "Gemini-2.5-Flash",
    ],
)
def test_ollamas_spellings_of_a_model_all_mean_it(name):
    plan = plan_and_ignored(chat(model=name), proxy.ollama_chat_request, OLLAMA)[0]
    assert plan.calls[0].model.name == FLASH
    assert plan.model_name == name


@pytest.mark.parametrize(
    "results",
    [
        ({"content": "F"}, {"content": "G"}),
        ({"content": "G", "tool_name": "g"}, {"content": "F", "tool_name": "f"}),
    ],
    ids=["by order", "by name"],
)
def test_tool_results_without_an_id_go_by_name_or_order(results):
    calls = [
        {"function": {"name": "f", "arguments": {}}},
        {"function": {"name": "g", "arguments": "{}"}},
    ]
    messages = [{"role": "tool", **result} for result in results]
    body = ollama_body(chat(user("q"), assistant("", tool_calls=calls), *messages))
    assert body["contents"][2]["parts"] == [
        answer_to("f", {"output": "F"}),
        answer_to("g", {"output": "G"}),
    ]


def test_generate_with_a_suffix_asks_for_what_belongs_between():
    body = {"model": FLASH, "prompt": "def add(", "suffix": "):", "system": "Be neat."}
    gap = ollama_body(body, "/api/generate")
    assert gap["contents"] == [u("<before>def add(</before><gap/><after>):</after>")]
    system = gap["systemInstruction"]["parts"][0]["text"]
    assert system.startswith("Be neat.\n\nYou fill a gap")


def test_a_raw_prompt_goes_as_it_is():
    raw = ollama_body({"model": FLASH, "prompt": "[INST]", "raw": True}, "/api/generate")
    assert raw["contents"] == [u("[INST]")]
    assert "systemInstruction" not in raw


@pytest.mark.parametrize(
    "path, more", [("/api/chat", {"messages": []}), ("/api/generate", {})], ids=["chat", "generate"]
)
@pytest.mark.parametrize(
    "keep_alive, seconds",
    [
        (None, 300),
        ("5m0s", 300),
        (-1, 1e10),
        ("-1s", 1e10),
        (1.5, 1.5),
        ("1h30m", 5400),
        (0, 0),
        ("0s", 0),
        ("-0s", 0),
        ("0", 0),
    ],
)
def test_without_a_question_a_model_is_loaded_or_unloaded(keep_alive, seconds, path, more):
    body = {"model": FLASH, "keep_alive": keep_alive, **more}
    answer, _ = ollama(body, [{"models": MODELS}], path=path)
    form = {"response": ""}
    if path == "/api/chat":
        form = {"message": {"role": "assistant", "content": ""}}
    reason = "load" if seconds else "unload"
    assert answer == {**STAMP, "done": True, "done_reason": reason, **form}
    plan = plan_and_ignored(body, ollama_route(path).request, OLLAMA)[0]
    assert plan.loads == (FLASH, seconds)


def test_a_model_that_gemini_does_not_list_cannot_be_loaded():
    with pytest.raises(ProxyError) as caught:
        ollama({"model": "nobody"}, [{"models": MODELS}])
    assert proxy.ollama_error(caught.value) == (404, {"error": "model 'nobody' not found"})


# ---- answers to chat and generate ----

CALLED = {  # strict clients accept no index beside the id
    "id": "call_1",
    "function": {"index": 0, "name": "weather", "arguments": {"city": "Oslo"}},
}


def test_an_ollama_answer_whole_and_streamed():
    chunks = [
        chunk({"text": "Hm", "thought": True}),
        chunk("Let me ", "look."),
        chunk(call("weather", {"city": "Oslo"}), call("clock")),
        whole(""),
    ]
    answer, events = ollama(chat(tools=[WEATHER, CLOCK]), chunks)
    clock = {"id": "call_2", "function": {"index": 1, "name": "clock", "arguments": {}}}
    assert answer == {
        **STAMP,
        "message": {
            "role": "assistant",
            "content": "Let me look.",
            "thinking": "Hm",
            "tool_calls": [CALLED, clock],
        },
        **METRICS,
    }
    additions = (
        {"thinking": "Hm"},
        {"content": "Let me "},
        {"content": "look."},
        {"tool_calls": [CALLED]},
        {"tool_calls": [clock]},
    )
    assert events[:-1] == [
        {**STAMP, "message": {"role": "assistant", "content": "", **addition}, "done": False}
        for addition in additions
    ]
    assert events[-1] == {**STAMP, "message": {"role": "assistant", "content": ""}, **METRICS}


HI_HELLO = [
    61130,
    22333,
    23218,
    46073,
    29580,
    51566,
    34742,
    36122,
]  # the context of "Hi" and its answer "Hello"


def test_a_generated_answer_whole_and_streamed():
    answer, events = ollama(
        {"model": FLASH, "prompt": "Hi"},
        [chunk({"text": "Hm", "thought": True}), chunk("Hel"), whole("lo")],
        path="/api/generate",
    )
    context = {"context": HI_HELLO}
    assert answer == {**STAMP, "response": "Hello", "thinking": "Hm", **context, **METRICS}
    assert events[0] == {**STAMP, "response": "", "thinking": "Hm", "done": False}
    assert events[-1] == {**STAMP, "response": "", **context, **METRICS}


IMAGE_NOTE = "\n[Gemini made something of type image/png, for which there is no place here.]\n"


def test_an_image_is_a_note_in_the_answer_to_a_chat():
    answer, events = ollama(chat(), [chunk("See:"), whole(IMAGE)])
    assert answer["message"] == {"role": "assistant", "content": "See:" + IMAGE_NOTE}
    assert events[1]["message"] == {"role": "assistant", "content": IMAGE_NOTE}


def test_generate_gives_one_image_and_a_note_for_each_other():
    answer, events = ollama(
        {"model": FLASH, "prompt": "Draw"}, [chunk(IMAGE), whole(IMAGE)], path="/api/generate"
    )
    assert (answer["image"], answer["response"]) == (PNG, IMAGE_NOTE)
    assert events[0] == {**STAMP, "response": "", "image": PNG, "done": False}
    assert events[1] == {**STAMP, "response": IMAGE_NOTE, "done": False}


def generate(notes, prompt, answer="Hello", **more):
    """(Gemini's contents, the answer's context, what is ignored) of a prompt."""
    route, body = ollama_route("/api/generate"), {"model": FLASH, "prompt": prompt, **more}
    context = looked_up(route, body, OLLAMA, notes)
    plan, ignored = plan_and_ignored(body, route.request, context)
    whole_answer = whole_of(route, exchange(plan, context), [whole(answer)], notes=notes)
    return plan.calls[0].body["contents"], whole_answer["context"], ignored


def test_a_prompt_goes_on_from_a_context():
    notes = Notes()
    _, first, _ = generate(notes, "Hi")
    contents, second, ignored = generate(notes, "And?", "No.", context=first)
    assert contents == [u("Hi"), m("Hello"), u("And?")]
    assert ignored == []
    assert generate(notes, "Bye", context=second)[0] == [
        u("Hi"),
        m("Hello"),
        u("And?"),
        m("No."),
        u("Bye"),
    ]


def test_a_streamed_context_stands_for_the_same_conversation():
    route, notes = ollama_route("/api/generate"), Notes()
    plan = plan_and_ignored({"model": FLASH, "prompt": "Hi"}, route.request, OLLAMA)[0]
    events = stream_of(route, exchange(plan, OLLAMA), [chunk("Hel"), whole("lo")], notes=notes)
    contents, _, _ = generate(notes, "And?", context=events[-1]["context"])
    assert contents == [u("Hi"), m("Hello"), u("And?")]


def test_a_context_has_the_images_of_its_prompts():
    notes = Notes()
    _, context, _ = generate(notes, "Look.", images=[PNG])
    contents, _, _ = generate(notes, "And?", context=context)
    assert {"inlineData": {"mimeType": "image/png", "data": PNG}} in contents[0]["parts"]


def test_a_long_context_leaves_images_out(monkeypatch):
    monkeypatch.setattr(proxy, "MAX_CONTEXT_CHARACTERS", 120)
    notes = Notes()
    _, context, _ = generate(notes, "Look.", images=[PNG])
    assert generate(notes, "And?", context=context)[0] == [u("Look."), m("Hello"), u("And?")]


def test_too_long_a_conversation_has_no_context(monkeypatch):
    monkeypatch.setattr(proxy, "MAX_CONTEXT_CHARACTERS", 20)
    notes = Notes()
    assert generate(notes, "Hi")[1] == []
    assert notes == {}


@pytest.mark.parametrize("more", [{"raw": True}, {"suffix": "):"}])
def test_an_editors_completion_has_no_context(more):
    notes = Notes()
    assert generate(notes, "def add(", **more)[1] == []
    assert notes == {}


@pytest.mark.parametrize("context", [[1, 2, 3], list(range(8)), ["a"] * 8])
def test_an_unknown_context_is_named_as_ignored(context):
    contents, _, ignored = generate(Notes(), "Hi", context=context)
    assert contents == [u("Hi")]
    assert ignored == ["context"]


def test_an_empty_context_is_not_named_as_ignored():
    assert generate(Notes(), "Hi", context=[])[2] == []


def test_a_context_does_not_repeat_a_recipes_messages():
    notes = saved({**SAVED, "messages": [user("1"), assistant("2")]})
    _, context, _ = generate(notes, "Hi", model="saved")
    contents, _, _ = generate(notes, "And?", model="saved", context=context)
    assert contents == [u("1"), m("2"), u("Hi"), m("Hello"), u("And?")]


@pytest.mark.parametrize(
    "path, form",
    [
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
        ("/api/generate", {"response": ""}),
    ],
)
def test_ollamas_keep_alive_is_a_chunk_without_text(path, form):
    route = ollama_route(path)
    plan = plan_and_ignored(chat(prompt="Hi"), route.request, OLLAMA)[0]
    line = route.framing.keep_alive(exchange(plan, OLLAMA))
    assert json.loads(line) == {**STAMP, **form, "done": False}
    assert line.endswith(b"\n")


# ---- errors ----

OLLAMA_REFUSES = {  # what is wrong: (path, body, status, Ollama's text or the place that it names)
    "no model": ("/api/chat", {"messages": []}, 400, "model is required"),
    "no model to generate with": ("/api/generate", {"prompt": "x"}, 404, "model '' not found"),
    "no model to show": ("/api/show", {}, 400, "model is required"),
    "no such name": ("/api/chat", chat(model="a b"), 404, "model 'a b' not found"),
    "think": (
        "/api/chat",
        chat(think="extreme"),
        400,
        'invalid think value: "extreme" (must be "high", "medium", "low", "max", true, or false)',
    ),
    "think as a number": (
        "/api/chat",
        chat(think=7),
        400,
        'think must be a boolean or string ("high", "medium", "low", "max", true, or false)',
    ),
    "think where none is": (
        "/api/chat",
        chat(think=True, model="gemini-2.0-flash"),
        400,
        '"gemini-2.0-flash" does not support thinking',
    ),
    "format": (
        "/api/chat",
        chat(format=7),
        400,
        'invalid format: 7; expected "json" or a valid JSON Schema object',
    ),
    "top_logprobs": (
        "/api/chat",
        chat(top_logprobs=21),
        400,
        "top_logprobs must be between 0 and 20",
    ),
    "keep_alive": ("/api/chat", chat(keep_alive="300"), 400, "keep_alive"),
    "an option": ("/api/chat", chat(options={"temperature": "hot"}), 400, "options.temperature"),
    "an image": (
        "/api/chat",
        chat({"role": "user", "images": ["@@"]}),
        400,
        "messages[0].images[0]",
    ),
    "an image that is no text": (
        "/api/chat",
        chat({"role": "user", "images": [PNG, 7]}),
        400,
        "messages[0].images[1]",
    ),
    "images that are no list": (
        "/api/chat",
        chat({"role": "user", "images": PNG}),
        400,
        "Invalid type for 'messages[0].images': expected an array, but got a string instead.",
    ),
    "raw and system": (
        "/api/generate",
        {"model": FLASH, "prompt": "x", "raw": True, "system": "y"},
        400,
        "raw mode does not support template, system, or context",
    ),
    "input": ("/api/embed", {"model": EMBEDDER, "input": 7}, 400, "invalid input type"),
    "part of the input": ("/api/embed", {"model": EMBEDDER, "input": ["a", 7]}, 400, "input[1]"),
    "a nameless function": (
        "/api/chat",
        chat(tools=[{"type": "function", "function": {}}]),
        400,
        "tools[0].function.name",
    ),
    "files to build from": ("/api/create", {"model": "x", "files": {"a": "b"}}, 400, "from"),
}


@pytest.mark.parametrize(
    "path, body, status, words", OLLAMA_REFUSES.values(), ids=list(OLLAMA_REFUSES)
)
def test_ollamas_words_for_bad_input(path, body, status, words):
    with pytest.raises(ProxyError) as caught:
        plan_and_ignored(body, ollama_route(path).request, OLLAMA)
    answer_status, answer = proxy.ollama_error(caught.value)
    assert answer_status == status
    assert words in answer["error"]


@pytest.mark.parametrize(
    "listed, words",
    [(False, "model 'x' not found"), (None, "model 'x' not found: models/x is not found")],
)
def test_a_model_that_gemini_refuses_is_not_found_in_ollamas_words(listed, words):
    error = ProxyError(404, "models/x is not found", code="model_not_found", upstream=True)
    error.model, error.listed = "x", listed
    assert proxy.ollama_error(error) == (404, {"error": words})


def test_an_unknown_path_is_a_404_in_ollamas_words():
    error = proxy.NoRouteError(404, "x")
    assert proxy.ollama_error(error) == (404, proxy.Payload(b"404 page not found"))


def test_models_cannot_be_pushed():
    refusal = ollama_route("/api/push").fixed
    assert refusal == proxy.Refusal(400, "models cannot be pushed from here: they are Google's")


# ---- embeddings ----

VECTORS = [{"embeddings": [{"values": [3, 4]}]}]


def test_embed_answers_with_unit_vectors_and_metrics():
    body = {"model": EMBEDDER, "input": "one"}
    assert ollama(body, VECTORS, [{"totalTokens": 3}], path="/api/embed")[0] == {
        "model": EMBEDDER,
        "embeddings": [[0.6, 0.8]],
        "total_duration": 1,
        "load_duration": 1,
        "prompt_eval_count": 3,
    }


@pytest.mark.parametrize("nothing", ["", [], None])
def test_embed_without_input_asks_only_whether_there_is_such_a_model(nothing):
    body = {"model": EMBEDDER, "input": nothing}
    assert plan_and_ignored(body, proxy.ollama_embed_request, OLLAMA)[0].calls == (
        proxy.MODELS_CALL,
    )
    answer, _ = ollama(body, [{"models": MODELS}], path="/api/embed")
    assert answer == {"model": EMBEDDER, "embeddings": []}


def test_an_empty_text_to_embed_becomes_a_space():
    body = {"model": EMBEDDER, "input": ["a", ""]}
    (embed, *_) = plan_and_ignored(body, proxy.ollama_embed_request, OLLAMA)[0].calls
    parts = [request["content"]["parts"] for request in embed.body["requests"]]
    assert parts == [[{"text": "a"}], [{"text": " "}]]


TOO_LONG = {"model": EMBEDDER, "input": ["short", "word " * 500], "truncate": False}
SHORT_LIST = [{"models": [{**entry, "inputTokenLimit": 2048} for entry in MODELS]}]


def test_texts_that_must_not_be_cut_are_counted_before_they_are_embedded():
    calls = plan_and_ignored(TOO_LONG, proxy.ollama_embed_request, OLLAMA)[0].calls
    assert [call.path.rpartition(":")[2] for call in calls] == [
        "models",
        "countTokens",
        "batchEmbedContents",
        "countTokens",
    ]
    assert calls[1].body == {"contents": [u("word " * 500)]}
    assert [call.waits for call in calls] == [False, False, True, False]


def test_the_longest_of_short_texts_is_counted():
    body = {"model": EMBEDDER, "input": ["a", "abc", "ab"], "truncate": False}
    calls = plan_and_ignored(body, proxy.ollama_embed_request, OLLAMA)[0].calls
    assert calls[1].body == {"contents": [u("abc")]}


@pytest.mark.parametrize("truncate", [True, None])
def test_texts_that_may_be_cut_are_not_counted_first(truncate):
    body = {**TOO_LONG, "truncate": truncate}
    calls = plan_and_ignored(body, proxy.ollama_embed_request, OLLAMA)[0].calls
    assert "batchEmbedContents" in calls[0].path
    assert not any(call.waits for call in calls)


def test_a_text_that_is_too_long_and_must_not_be_cut_is_refused():
    with pytest.raises(ProxyError) as caught:
        ollama(TOO_LONG, SHORT_LIST, [{"totalTokens": 2049}], path="/api/embed")
    error = {"error": "the input length exceeds the context length"}
    assert proxy.ollama_error(caught.value) == (400, error)


def test_a_text_that_just_fits_is_embedded():
    vectors = [{"embeddings": [{"values": [3, 4]}, {"values": [4, 3]}]}]
    answers = SHORT_LIST, [{"totalTokens": 2048}], vectors, [{"totalTokens": 2050}]
    answer, _ = ollama(TOO_LONG, *answers, path="/api/embed")
    assert answer["embeddings"] == [[0.6, 0.8], [0.8, 0.6]]
    assert answer["prompt_eval_count"] == 2050


def test_the_older_embeddings_answer_with_one_vector():
    body = {"model": EMBEDDER, "prompt": "one"}
    assert ollama(body, VECTORS, [{}], path="/api/embeddings")[0] == {"embedding": [0.6, 0.8]}


def test_the_older_embeddings_without_a_prompt_have_no_vector():
    body = {"model": EMBEDDER, "prompt": ""}
    answer, _ = ollama(body, [{"models": MODELS}], path="/api/embeddings")
    assert answer == {"embedding": []}


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
def test_a_model_that_gemini_does_not_list_has_no_empty_vectors(path):
    with pytest.raises(ProxyError) as caught:
        ollama({"model": "nobody"}, [{"models": MODELS}], path=path)
    assert proxy.ollama_error(caught.value) == (404, {"error": "model 'nobody' not found"})


# ---- models and their management ----


def manage(method, path, body, context=OLLAMA, notes=None):
    """The whole answer to a body, or the list of events where it wants a stream."""
    route, notes = ollama_route(path, method), Notes() if notes is None else notes
    context = looked_up(route, body, context, notes)
    plan = plan_and_ignored(body, route.request, context)[0]
    answers = [[{"models": MODELS}]] * len(plan.calls)
    make = stream_of if plan.stream and route.stream else whole_of
    return make(route, exchange(plan, context), *answers, notes=notes)


def test_ollamas_list_names_each_model_with_its_tag():
    models = manage("GET", "/api/tags", {})["models"]
    names = [f"{name}:latest" for name in (FLASH, NEWEST, EMBEDDER)]
    assert [entry["name"] for entry in models] == names
    assert [entry["model"] for entry in models] == names


def test_each_model_in_ollamas_list_has_a_digest_of_its_own():
    digests = {entry["digest"] for entry in manage("GET", "/api/tags", {})["models"]}
    assert len(digests) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_ollamas_list_says_what_each_model_can_do():
    models = manage("GET", "/api/tags", {})["models"]
    words = ["completion", "tools", "insert", "vision", "audio", "thinking"]
    assert models[0]["capabilities"] == words
    assert models[2]["capabilities"] == ["embedding"]


@pytest.mark.parametrize(
    "name, hears",
    [("gemini-1.5-pro", True), ("gemini-2.0-flash", True), ("gemma-4-31b-it", False)],
)
def test_geminis_chat_models_hear_since_1_5(name, hears):
    entry = {"name": f"models/{name}", "supportedGenerationMethods": ["generateContent"]}
    assert ("audio" in proxy.ollama_capabilities(entry)) == hears


def test_the_size_in_ollamas_list_is_plainly_no_files():
    sizes = {entry["size"] for entry in manage("GET", "/api/tags", {})["models"]}
    assert sizes == {1}


def test_show_says_the_context_length_once():
    info = manage("POST", "/api/show", {"name": FLASH, "model": ""})["model_info"]
    lengths = {key: value for key, value in info.items() if "context_length" in key}
    assert lengths == {"gemini.context_length": 1048576}
    assert info["general.basename"] == FLASH


def test_the_template_says_what_a_model_can_do():
    template = manage("POST", "/api/show", {"model": FLASH})["template"]
    assert "tools" in template
    assert ".Suffix" in template
    assert manage("POST", "/api/show", {"model": EMBEDDER})["template"] == "{{ .Prompt }}"


def test_show_of_an_unknown_model_names_it_with_its_tag():
    with pytest.raises(ProxyError) as caught:
        manage("POST", "/api/show", {"model": "x"})
    assert proxy.ollama_error(caught.value) == (404, {"error": "model 'x:latest' not found"})


def test_running_models_are_listed_the_longest_first():
    context = OLLAMA._replace(loaded={FLASH: 1700000100.0, NEWEST: 1700000200.0, "gone": 1.0})
    running = manage("GET", "/api/ps", {}, context)["models"]
    assert [entry["name"] for entry in running] == [NEWEST + ":latest", FLASH + ":latest"]
    assert running[0]["context_length"] == 1048576
    assert running[1]["expires_at"] == "2023-11-14T22:15:00.000000Z"


def test_the_details_of_a_running_model_are_those_of_ollama():
    (running,) = manage("GET", "/api/ps", {}, OLLAMA._replace(loaded={FLASH: 1700000100.0}))[
        "models"
    ]
    assert running["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "gemini",
        "families": ["gemini"],
        "parameter_size": "unknown",
        "quantization_level": "unknown",
    }


@pytest.mark.parametrize("name", ["GPT-4o", "gpt-4o:8b", "Gemini-2.5-Flash"])
def test_a_running_model_has_the_name_that_the_client_used(name):
    body = chat(model=name)
    context = OLLAMA._replace(aliases=(("gpt-*", FLASH),))
    loaded, _ = plan_and_ignored(body, proxy.ollama_chat_request, context)[0].loads
    context = context._replace(loaded={loaded: 1700000100.0})
    (running,) = manage("GET", "/api/ps", {}, context)["models"]
    assert running["name"] == running["model"] == proxy.tagged(name)


def test_a_running_model_has_the_digest_of_the_list():
    context = OLLAMA._replace(loaded={"Gemini-2.5-Flash": 1700000100.0})
    (running,) = manage("GET", "/api/ps", {}, context)["models"]
    assert running["digest"] == manage("GET", "/api/tags", {})["models"][0]["digest"]


def test_without_running_models_the_list_is_empty():
    assert manage("GET", "/api/ps", {}) == {"models": []}


@pytest.mark.parametrize("key", ["model", "name"])
def test_a_streamed_pull_of_what_gemini_has_ends_in_success(key):
    assert manage("POST", "/api/pull", {key: FLASH})[-1] == {"status": "success"}


def test_a_whole_pull_of_what_gemini_has_is_a_success():
    body = {"name": FLASH, "stream": False}
    assert manage("POST", "/api/pull", body) == {"status": "success"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_pull_of_what_gemini_does_not_have_fails(stream):
    with pytest.raises(ProxyError, match="pull model manifest: file does not exist"):
        manage("POST", "/api/pull", {"model": "nobody", "stream": stream})


# ---- recipes ----

PIRATE = {
    "model": "pirate",
    "from": "gpt-4o",
    "system": "Arr.",
    "parameters": {"temperature": 0.1, "stop": ["a", "b"], "num_ctx": 4096},
    "stream": False,
}


def asked_with(body, context, notes, route=None):
    """The plan for a body, with what is stored."""
    route = route or ollama_route("/api/chat")
    return plan_and_ignored(body, route.request, looked_up(route, body, context, notes))[0]


def recipes():
    """What is stored after a copy, and a recipe made from it."""
    notes = Notes()
    copied = manage("POST", "/api/copy", {"source": FLASH, "destination": "gpt-4o"}, notes=notes)
    assert copied == proxy.Payload(b"")
    assert manage("POST", "/api/create", PIRATE, notes=notes) == {"status": "success"}
    return notes


def test_a_recipe_brings_its_system_and_its_options():
    body = chat(model="Pirate:latest", options={"top_k": 3})
    (gemini_call,) = asked_with(body, OLLAMA, recipes()).calls
    assert gemini_call.model.name == FLASH
    assert gemini_call.body["systemInstruction"] == {"parts": [{"text": "Arr."}]}
    assert gemini_call.body["generationConfig"]["temperature"] == 0.1
    assert gemini_call.body["generationConfig"]["topK"] == 3


def test_an_option_of_a_recipe_is_not_named_as_ignored():
    """The client of a chat never sent `num_ctx`: the recipe did."""
    route, body = ollama_route("/api/chat"), chat(model="pirate", options={"top_k": 3})
    context = looked_up(route, body, OLLAMA, recipes())
    assert plan_and_ignored(body, route.request, context)[1] == []


def test_an_option_of_the_clients_is_named_as_ignored_also_with_a_recipe():
    route, body = ollama_route("/api/chat"), chat(model="pirate", options={"num_ctx": 9})
    context = looked_up(route, body, OLLAMA, recipes())
    assert plan_and_ignored(body, route.request, context)[1] == ["options.num_ctx"]


def test_a_recipe_is_in_ollamas_list():
    models = manage("GET", "/api/tags", {}, notes=recipes())["models"]
    assert "pirate:latest" in [entry["name"] for entry in models]


def test_show_says_what_a_recipe_holds():
    entry = manage("POST", "/api/show", {"model": "pirate"}, notes=recipes())
    assert entry["details"]["parent_model"] == FLASH
    assert entry["system"] == "Arr."
    assert entry["parameters"] == 'temperature 0.1\nstop "a"\nstop "b"\nnum_ctx 4096'


SAVED = {
    "model": "saved",
    "from": FLASH,
    "system": 'Say "arr".\nAlways.',
    "parameters": {"temperature": 0.1, "stop": ["a", " b"]},
    "license": ["MIT", "Apache"],
    "messages": [user("Hi"), assistant("Arr!"), {"role": "tool", "content": "x"}],
    "stream": False,
}
MODELFILE = f"""\
# Gemini, by proxy-to-gemini
FROM {FLASH}
SYSTEM \"\"\"Say "arr".
Always.\"\"\"
PARAMETER temperature 0.1
PARAMETER stop a
PARAMETER stop " b"
LICENSE MIT
LICENSE Apache
MESSAGE user Hi
MESSAGE assistant Arr!
"""


def saved(body=SAVED):
    """What is stored after this creation."""
    notes = Notes()
    assert manage("POST", "/api/create", body, notes=notes) == {"status": "success"}
    return notes


def test_show_gives_back_what_was_created():
    entry = manage("POST", "/api/show", {"model": "saved"}, notes=saved())
    assert entry["license"] == "MIT\nApache"
    assert entry["messages"] == SAVED["messages"]
    assert entry["modelfile"] == MODELFILE


def test_show_of_geminis_own_model_has_no_messages():
    entry = manage("POST", "/api/show", {"model": FLASH})
    assert "messages" not in entry
    assert entry["modelfile"] == f"# Gemini, by proxy-to-gemini\nFROM {FLASH}:latest\n"


@pytest.mark.parametrize(
    "text, line",
    [
        ("plain # text", "plain # text"),
        ("two\nlines", '"two\nlines"'),
        ('say "hi"', 'say "hi"'),
        ('"quoted"', '"""' + '"quoted"' + '"""'),
        (" ", '" "'),
        ("", '""'),
    ],
)
def test_a_text_in_a_modelfile_is_in_quotes_where_it_must(text, line):
    assert proxy.modelfile_text(text) == line


def test_a_license_may_be_a_single_text():
    notes = saved({**SAVED, "license": "MIT"})
    assert manage("POST", "/api/show", {"model": "saved"}, notes=notes)["license"] == "MIT"


def test_a_copy_keeps_messages_and_licenses():
    notes = saved()
    manage("POST", "/api/copy", {"source": "saved", "destination": "copy"}, notes=notes)
    entry = manage("POST", "/api/show", {"model": "copy"}, notes=notes)
    assert entry["messages"] == SAVED["messages"]
    assert entry["license"] == "MIT\nApache"


@pytest.mark.parametrize(
    "more, messages", [({}, SAVED["messages"]), ({"messages": [user("Yo")]}, [user("Yo")])]
)
def test_a_recipe_from_a_recipe_has_its_messages_unless_it_brings_others(more, messages):
    notes = saved()
    body = {"model": "second", "from": "saved", "license": "BSD", "stream": False, **more}
    manage("POST", "/api/create", body, notes=notes)
    entry = manage("POST", "/api/show", {"model": "second"}, notes=notes)
    assert entry["messages"] == messages
    assert entry["license"] == "MIT\nApache\nBSD"


def test_a_wrong_message_of_a_recipe_is_refused_when_it_is_created():
    body = {**SAVED, "messages": [user("Hi"), {"role": "user", "images": ["@@"]}]}
    with pytest.raises(ProxyError) as caught:
        manage("POST", "/api/create", body)
    assert caught.value.status == 400
    assert caught.value.path == "messages[1].images[0]"


@pytest.mark.parametrize(
    "path, body",
    [
        ("/api/chat", chat(user("And?"), model="saved")),
        ("/api/generate", {"model": "saved", "prompt": "And?"}),
        ("/v1/chat/completions", chat(user("And?"), model="saved")),
        ("/v1/completions", {"model": "saved", "prompt": "And?"}),
        ("/v1/responses", {"model": "saved", "input": "And?"}),
        ("/v1/messages", chat(user("And?"), model="saved", max_tokens=9)),
        ("/v1/messages/count_tokens", chat(user("And?"), model="saved")),
    ],
)
def test_a_recipes_messages_come_before_those_of_the_client(path, body):
    notes = saved({**SAVED, "messages": [user("Hi"), assistant("Arr!")]})
    route, _ = proxy.find_route("ollama", "POST", path)
    request = asked_with(body, OLLAMA, notes, route).calls[0].body
    contents = request.get("generateContentRequest", request)["contents"]
    assert contents[:2] == [u("Hi"), m("Arr!")]
    assert "And?" in contents[2]["parts"][-1]["text"]


def test_a_recipes_leading_system_messages_go_before_the_clients():
    notes = saved({**SAVED, "messages": [{"role": "system", "content": "One."}, user("Hi")]})
    body = chat({"role": "system", "content": "Two."}, user("And?"), model="saved")
    (call,) = asked_with(body, OLLAMA, notes).calls
    assert call.body["systemInstruction"] == {"parts": [{"text": "One."}, {"text": "Two."}]}


def test_a_raw_prompt_goes_without_a_recipes_messages():
    body = {"model": "saved", "prompt": "x", "raw": True}
    (call,) = asked_with(body, OLLAMA, saved(), ollama_route("/api/generate")).calls
    assert call.body["contents"] == [u("x")]


def test_a_recipe_was_modified_when_it_was_created():
    notes = saved()
    listed = manage("GET", "/api/tags", {}, notes=notes)["models"][-1]
    shown = manage("POST", "/api/show", {"model": "saved"}, notes=notes)
    assert listed["name"] == "saved:latest"
    assert listed["modified_at"] == shown["modified_at"] == "2023-11-14T22:13:20.500000Z"


def test_openais_list_has_the_time_of_a_recipe_too():
    context = looked_up(ollama_route("/api/tags", "GET"), {}, OLLAMA, saved())
    assert proxy.openai_model_entry("saved:latest", {}, context)["created"] == 1700000000


def test_a_recipe_of_an_older_version_can_be_read():
    old = {"source": FLASH, "system": "Say arr.", "options": {}}
    notes = Notes({"model:pirate": json.dumps(old)})
    entry = manage("POST", "/api/show", {"model": "pirate"}, notes=notes)
    assert entry["system"] == "Say arr."
    assert entry["modified_at"] == "2023-12-13T00:00:00.000000Z"


@pytest.mark.parametrize(
    "body, status",
    [
        ({"source": "nobody", "destination": "x"}, 404),
        ({"source": FLASH, "destination": NEWEST}, 400),
        ({"source": FLASH, "destination": "a b"}, 400),
    ],
    ids=["no such model", "a name of Gemini's", "no valid name"],
)
def test_a_copy_that_cannot_be(body, status):
    with pytest.raises(ProxyError) as caught:
        manage("POST", "/api/copy", body)
    assert caught.value.status == status


def test_a_deleted_recipe_is_gone():
    notes = recipes()
    body = {"model": "gpt-4o"}
    assert manage("DELETE", "/api/delete", body, notes=notes) == proxy.Payload(b"")
    with pytest.raises(ProxyError) as caught:
        manage("DELETE", "/api/delete", body, notes=notes)
    assert caught.value.status == 404


def test_a_model_of_geminis_cannot_be_deleted():
    with pytest.raises(ProxyError) as caught:
        manage("DELETE", "/api/delete", {"name": FLASH})
    assert caught.value.status == 403


@pytest.mark.parametrize(
    "sources, model",
    [(["fast"], FLASH), (["gpt-4o"], NEWEST), (["gpt-4o", "recipe0"], NEWEST)],
    ids=["an alias", "a glob", "a recipe"],
)
def test_a_recipe_from_another_name_is_one_of_geminis_model(sources, model):
    notes = Notes()
    context = OLLAMA._replace(aliases=(("fast", FLASH), ("gpt-*", NEWEST)))
    for i, source in enumerate(sources):
        name, parameters = f"recipe{i}", {"temperature": 0.1, "top_p": 0.5}
        body = {"model": name, "from": source, "parameters": parameters}
        manage("POST", "/api/create", body, context, notes)
    body = chat(model=name, options={"temperature": None, "top_p": 1})
    (gemini_call,) = asked_with(body, context, notes).calls
    assert gemini_call.model.name == model
    assert gemini_call.body["generationConfig"]["temperature"] == 0.1
    assert gemini_call.body["generationConfig"]["topP"] == 1


def test_a_wrong_parameter_of_a_recipe_is_refused_when_it_is_created():
    body = {"model": "x", "from": FLASH, "parameters": {"temperature": "0.7"}}
    with pytest.raises(ProxyError) as caught:
        manage("POST", "/api/create", body)
    assert caught.value.status == 400
    assert caught.value.path == "parameters.temperature"


def test_a_recipe_for_a_model_without_a_system_instruction_begins_the_chat():
    recipe = {"source": "gemma-3-27b-it", "system": "Say arr.", "options": {}}
    notes = Notes({"model:pirate": json.dumps(recipe)})
    route, _ = proxy.find_route("ollama", "POST", "/v1/chat/completions")
    (gemini_call,) = asked_with(chat(model="pirate"), OLLAMA, notes, route).calls
    assert gemini_call.body["contents"][0] == u("Say arr.")
    assert "systemInstruction" not in gemini_call.body


# ---- OpenAI's routes on an Ollama server ----


def test_thoughts_on_an_ollama_server_are_called_reasoning():
    thought = {"text": "Hm", "thought": True}
    answer, events = respond(chat(stream=True), [whole(thought, "42")], context=OLLAMA)
    assert answer["choices"][0]["message"]["reasoning"] == "Hm"
    assert {"reasoning": "Hm"} in deltas(events)


def test_openais_list_on_an_ollama_server_has_ollamas_names():
    answers = iter([iter([{"models": MODELS}])])
    models = proxy.openai_models_response(exchange(proxy.Plan(), OLLAMA), answers)["data"]
    assert (models[0]["id"], models[0]["owned_by"]) == (FLASH + ":latest", "library")


PIRATE_RECIPE = {
    "model": "pirate",
    "from": FLASH,
    "system": "Say arr.",
    "parameters": {"temperature": 0.1, "stop": ["END"]},
}


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", chat(model="pirate")),
        ("/v1/messages", chat(model="pirate", max_tokens=9)),
        ("/v1/responses", {"model": "pirate", "input": "Hi"}),
        ("/api/chat", chat(model="pirate")),
    ],
)
def test_a_recipe_holds_on_every_route(path, body, gemini):
    with serving(gemini.url, api="ollama") as server:
        post(server, "/api/create", PIRATE_RECIPE)
        assert post(server, path, body)[0] == 200
    call_body = gemini.bodies[-1]
    assert call_body["systemInstruction"]["parts"][0]["text"] == "Say arr."
    assert call_body["generationConfig"]["temperature"] == 0.1


def test_a_recipes_words_come_before_those_that_ask_for_json(gemini):
    body = chat(model="pirate", tools=[WEATHER], response_format={"type": "json_object"})
    with serving(gemini.url, api="ollama") as server:
        post(server, "/api/create", PIRATE_RECIPE)
        post(server, body=body)
    parts = gemini.bodies[-1]["systemInstruction"]["parts"]
    assert [part["text"][:8] for part in parts] == ["Say arr.", proxy.json_words({})["text"][:8]]


def test_a_recipes_parameters_are_listed_as_ollama_lists_them(gemini):
    with serving(gemini.url, api="ollama") as server:
        post(server, "/api/create", PIRATE_RECIPE)
        details = json.loads(post(server, "/api/show", {"model": "pirate"})[2])
    assert details["parameters"] == 'temperature 0.1\nstop "END"'


def running_models(client):
    """Their names, on the connection on which they were used."""
    return [entry["name"] for entry in json.loads(client.request("GET", "/api/ps")[2])["models"]]


@pytest.mark.parametrize(
    "path, body",
    [
        ("/api/chat", chat(model="GPT-4o")),
        ("/api/generate", {"model": "GPT-4o", "prompt": "Hi"}),
        ("/api/generate", {"model": "GPT-4o"}),
        ("/api/embed", {"model": "GPT-4o", "input": "Hi"}),
        ("/v1/chat/completions", chat(model="GPT-4o")),
        ("/v1/responses", {"model": "GPT-4o", "input": "Hi"}),
        ("/v1/messages", chat(model="GPT-4o", max_tokens=9)),
    ],
)
def test_a_model_used_through_a_glob_runs_under_the_clients_name(path, body, gemini):
    aliases = (("gpt-*", EMBEDDER if "embed" in path else FLASH),)
    serving_it = serving(gemini.url, api="ollama", aliases=aliases)
    with serving_it as server, RawClient(server) as client:
        assert client.request("POST", path, body)[0] == 200
        assert running_models(client) == ["GPT-4o:latest"]


def test_a_running_model_is_unloaded_by_any_spelling(gemini):
    with serving(gemini.url, api="ollama") as server, RawClient(server) as client:
        client.request("POST", "/api/chat", chat(model="Gemini-2.5-Flash"))
        assert running_models(client) == ["Gemini-2.5-Flash:latest"]
        client.request("POST", "/api/generate", {"model": FLASH, "keep_alive": 0})
        assert running_models(client) == []


def test_a_conversation_goes_on_from_its_context(gemini):
    with serving(gemini.url, api="ollama") as server:
        *_, line = post(server, "/api/generate", {"model": FLASH, "prompt": "Hi"})[2].splitlines()
        context = json.loads(line)["context"]
        post(server, "/api/generate", {"model": FLASH, "prompt": "And?", "context": context})
    answer = "Hello from the stand-in for Gemini. You said: Hi"
    assert gemini.bodies[-1]["contents"] == [u("Hi"), m(answer), u("And?")]


def test_a_text_that_is_too_long_is_never_embedded(gemini, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MODELS", [{**MODELS[2], "inputTokenLimit": 6}])
    body = {"model": EMBEDDER, "input": "seven", "truncate": False}  # the stand-in counts 7
    with serving(gemini.url, api="ollama") as server:
        status, _, data = post(server, "/api/embed", body)
    assert status == 400
    assert json.loads(data) == {"error": "the input length exceeds the context length"}
    assert gemini.bodies == []


def test_a_recipes_words_are_counted_with_the_message():
    recipe = {"source": FLASH, "system": "Say arr.", "options": {"temperature": 0.1}}
    notes = Notes({"model:pirate": json.dumps(recipe)})
    route, _ = proxy.find_route("ollama", "POST", "/v1/messages/count_tokens")
    plan = asked_with(chat(model="pirate"), OLLAMA, notes, route)
    counted = plan.calls[0].body["generateContentRequest"]
    assert counted["systemInstruction"]["parts"][0]["text"] == "Say arr."
    assert "generationConfig" not in counted


# ======================================================================================
# 10. Anthropic
# ======================================================================================

CLAUDE = Context(ollama=True, aliases=(("claude-*", NEWEST),))
ASK_CITY = {
    "name": "weather",
    "description": "The weather",
    "input_schema": WEATHER["function"]["parameters"],
}
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search"}
PNG_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
PNG_PART = {"inlineData": {"mimeType": "image/png", "data": PNG}}


def claude_chat(*messages, model="claude-opus-5", **more):
    return {"model": model, "max_tokens": 100, "messages": list(messages) or [user("Hi")], **more}


def claude_plan(body):
    return plan_and_ignored(body, proxy.anthropic_messages_request, CLAUDE)[0]


def claude_ignored(body):
    return plan_and_ignored(body, proxy.anthropic_messages_request, CLAUDE)[1]


def claude_body(body):
    return gemini_body(body, request=proxy.anthropic_messages_request, context=CLAUDE)


def claude_answer(body, *chunks):
    """(the whole message, the streamed events) when Gemini says these chunks; both say the same."""
    plan, route = claude_plan(body), proxy.ANTHROPIC.routes[0]
    message = whole_of(route, exchange(plan, CLAUDE), chunks)
    events = stream_of(route, exchange(plan, CLAUDE), chunks)
    assert added_up(events) == message
    return message, events


def added_up(events):
    """The message that a client makes of the events of a stream."""
    message = {}
    for event in events:
        if event["type"] == "message_start":
            message = json.loads(json.dumps(event["message"]))
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            add_delta(message["content"][-1], event["delta"])
        elif event["type"] == "content_block_stop" and "json" in message["content"][-1]:
            block = message["content"][-1]
            block["input"] = json.loads(block.pop("json"))
        elif event["type"] == "message_delta":
            message.update(event["delta"], usage=event["usage"])
    return message


def add_delta(block, delta):
    kind = delta["type"].partition("_")[0]
    if kind == "input":
        block["json"] = block.get("json", "") + delta["partial_json"]
    elif kind == "citations":
        block.setdefault("citations", []).append(delta["citation"])
    elif kind == "compaction":
        block["content"] = delta["content"]
    else:
        block[kind] += delta[kind]


def text_block(text, **more):
    return {"type": "text", "text": text, **more}


def use_block(call_id, name="weather", **args):
    fields = {"id": call_id, "name": name, "input": args or {"city": "Oslo"}}
    return {"type": "tool_use", **fields, "caller": {"type": "direct"}}


def result_block(call_id, content="3", **more):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def document(source, **more):
    return {"type": "document", "source": source, **more}


@pytest.fixture
def claude_server(gemini):
    """A proxy that serves Anthropic's clients, in front of the stand-in."""
    with serving(gemini.url, api="ollama", aliases=CLAUDE.aliases) as server:
        yield server


MESSAGE = claude_chat(
    user([text_block("Hi"), PNG_BLOCK]),
    assistant("Hello"),
    user("Bye"),
    system=[text_block(proxy.BILLING_HEADER + " cc_version=2"), text_block("Be brief.")],
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    stop_sequences=["END"],
    max_tokens=100_000,
    metadata={"user_id": "u"},
)


def test_a_message_becomes_a_request():
    assert claude_body(MESSAGE) == {
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}, PNG_PART]},
            {"role": "model", "parts": [{"text": "Hello"}]},
            {"role": "user", "parts": [{"text": "Bye"}]},
        ],
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "generationConfig": {
            "temperature": 0.5,
            "topP": 0.9,
            "topK": 40,
            "maxOutputTokens": 65536,
            "stopSequences": ["END"],
        },
    }


def test_a_message_goes_to_the_model_behind_the_alias():
    plan = claude_plan(MESSAGE)
    assert plan.calls[0].path == "models/gemini-3.8-flash:generateContent"
    assert plan.model_name == "claude-opus-5"


def test_what_a_message_loses_is_named_as_ignored():
    assert claude_ignored(MESSAGE) == [
        "max_tokens>65536",
        "metadata",
        "system[].x-anthropic-billing-header",
    ]


def test_system_messages_stay_in_their_place():
    first, later = ({"role": "system", "content": text} for text in ("Be brief.", "It is late."))
    body = claude_body(claude_chat(first, user("Hi"), later))
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    texts = ["Hi", "<system>\n", "It is late.", "\n</system>"]
    assert body["contents"] == [{"role": "user", "parts": [{"text": text} for text in texts]}]


@pytest.mark.parametrize(
    "block, parts",
    [
        (
            {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            [{"fileData": {"mimeType": "image/png", "fileUri": "https://example.com/a.png"}}],
        ),
        (
            document({"type": "url", "url": "https://example.com/a"}),
            [{"fileData": {"mimeType": "application/pdf", "fileUri": "https://example.com/a"}}],
        ),
        (
            document({"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}),
            [{"inlineData": {"mimeType": "application/pdf", "data": "JVBERi0="}}],
        ),
        (
            document(
                {"type": "text", "media_type": "text/plain", "data": "C"}, title="A", context="B"
            ),
            [{"text": "A\nB:\n"}, {"text": "C"}],
        ),
        (
            document(
                {"type": "content", "content": [text_block("C")]}, citations={"enabled": False}
            ),
            [{"text": "C"}],
        ),
        (
            {
                "type": "search_result",
                "title": "T",
                "source": "https://a",
                "content": [text_block("C")],
            },
            [{"text": "T (https://a):\n"}, {"text": "C"}],
        ),
    ],
)
def test_images_documents_and_search_results_become_parts(block, parts):
    body = claude_chat(user([block]))
    assert claude_body(body)["contents"][0]["parts"] == parts
    assert claude_ignored(body) == []


def test_blocks_of_anthropics_servers_are_ignored_by_name():
    answer = text_block("Hello", citations=[{"type": "x"}], cache_control={"type": "ephemeral"})
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    thought = {"type": "redacted_thinking", "data": "x"}
    body = claude_chat(user("Hi"), assistant([thought, search, answer]), user("Bye"))
    assert claude_body(body)["contents"][1] == {"role": "model", "parts": [{"text": "Hello"}]}
    assert claude_ignored(body) == [
        "messages[].content[].cache_control",
        "messages[].content[].server_tool_use",
    ]


CLAUDE_SUMMARY = {"type": "compaction", "content": "We spoke.", "encrypted_content": "e"}


def test_the_summary_of_a_compaction_stays_in_its_place():
    failed = {"type": "compaction", "content": None}
    body = claude_chat(assistant([CLAUDE_SUMMARY, failed, text_block("Hello")]), user("Bye"))
    parts = [{"text": f"{proxy.SUMMARY_HEAD}We spoke."}, {"text": "Hello"}]
    assert claude_body(body)["contents"][-2] == {"role": "model", "parts": parts}
    assert claude_ignored(body) == []


TOOL_HISTORY = claude_chat(
    user("Hi"),
    assistant(
        [
            {"type": "thinking", "thinking": "Hm", "signature": sign("a")},
            text_block("Let me see."),
            use_block("t1"),
            use_block("t2", city="Bergen"),
        ]
    ),
    user(
        [
            text_block("Well?"),
            result_block("t2", [text_block("no"), text_block("net")], is_error=True),
            result_block("t1", [text_block("3"), PNG_BLOCK]),
        ]
    ),
    tools=[ASK_CITY],
)


def test_the_signature_in_a_thinking_block_goes_to_the_next_call():
    assert claude_body(TOOL_HISTORY)["contents"][1]["parts"] == [
        {"text": "Let me see."},
        {
            "functionCall": {"id": "t1", "name": "weather", "args": {"city": "Oslo"}},
            "thoughtSignature": sign("a"),
        },
        {"functionCall": {"id": "t2", "name": "weather", "args": {"city": "Bergen"}}},
    ]


def test_tool_results_come_in_the_order_of_the_calls_and_before_other_text():
    results, rest = claude_body(TOOL_HISTORY)["contents"][2:]
    output = {"name": "weather", "response": {"output": "3"}, "parts": [PNG_PART]}
    error = {"name": "weather", "response": {"error": "no\nnet"}}
    assert results["parts"] == [
        {"functionResponse": {"id": "t1", **output}},
        {"functionResponse": {"id": "t2", **error}},
    ]
    assert rest == {"role": "user", "parts": [{"text": "Well?"}]}


def test_a_clients_tool_is_declared_with_its_schema():
    declaration = {"name": "weather", "description": "The weather"}
    declaration["parametersJsonSchema"] = ASK_CITY["input_schema"]
    assert claude_body(TOOL_HISTORY)["tools"] == [{"functionDeclarations": [declaration]}]


ANTHROPICS_TOOLS = claude_chat(
    tools=[
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250124", "name": "str_replace_editor"},
        {
            "type": "text_editor_20250728",
            "name": "str_replace_based_edit_tool",
            "max_characters": 9,
        },
        {"type": "memory_20250818", "name": "memory"},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
        {"type": "code_execution_20250825", "name": "code_execution"},
        {"type": "web_fetch_20250910", "name": "web_fetch"},
        {"type": "computer_toolset_20260801"},
    ]
)


def test_tools_that_claude_knows_by_type_get_their_schemas():
    declarations = claude_body(ANTHROPICS_TOOLS)["tools"][0]["functionDeclarations"]
    fields = {one["name"]: one["parametersJsonSchema"]["properties"] for one in declarations}
    names = ["bash", "str_replace_editor", "str_replace_based_edit_tool", "memory"]
    assert list(fields) == names
    assert set(fields["bash"]) == {"command", "restart"}
    assert "undo_edit" in fields["str_replace_editor"]["command"]["enum"]
    assert "insert_text" not in fields["str_replace_editor"]
    assert "insert_text" in fields["str_replace_based_edit_tool"]
    assert "rename" in fields["memory"]["command"]["enum"]


def test_gemini_searches_and_runs_code_in_place_of_anthropics_servers():
    tools = claude_body(ANTHROPICS_TOOLS)["tools"]
    assert tools[1:] == [{"googleSearch": {}}, {"codeExecution": {}}, {"urlContext": {}}]


def test_tools_that_gemini_has_nothing_for_are_ignored_by_name():
    assert claude_ignored(ANTHROPICS_TOOLS) == [
        "tools[].computer_toolset_20260801",
        "tools[].max_characters",
        "tools[].max_uses",
    ]


CLAUDES_MCP = {
    "type": "url",
    "name": "docs",
    "url": "https://mcp.example.com/mcp",
    "authorization_token": "t",
}
GEMINIS_MCP = {
    "name": "docs",
    "streamableHttpTransport": {
        "url": "https://mcp.example.com/mcp",
        "headers": {"Authorization": "Bearer t"},
    },
}
TOOLSET = {"type": "mcp_toolset", "mcp_server_name": "docs"}


ENABLED = {"enabled": True}
FULL_TOOLSET = {**TOOLSET, "default_config": ENABLED, "configs": {"a": ENABLED}}


@pytest.mark.parametrize("tools", [[], [TOOLSET], [FULL_TOOLSET]])
@pytest.mark.parametrize("more", [{}, {"tool_configuration": {**ENABLED, "allowed_tools": None}}])
def test_gemini_calls_the_remote_mcp_servers_of_anthropics_clients(tools, more):
    body = claude_chat(tools=tools, mcp_servers=[{**CLAUDES_MCP, **more}])
    assert claude_body(body)["tools"] == [{"mcpServers": [GEMINIS_MCP]}]
    assert claude_ignored(body) == []


@pytest.mark.parametrize(
    "more",
    [
        {"mcp_servers": [{**CLAUDES_MCP, "tool_configuration": {"allowed_tools": ["a"]}}]},
        {"mcp_servers": [{**CLAUDES_MCP, "tool_configuration": {"enabled": False}}]},
        {
            "mcp_servers": [CLAUDES_MCP],
            "tools": [{**TOOLSET, "configs": {"a": {"enabled": False}}}],
        },
        {
            "mcp_servers": [CLAUDES_MCP],
            "tools": [{**TOOLSET, "default_config": {"enabled": False}}],
        },
    ],
)
def test_an_mcp_server_with_tools_that_are_not_to_be_called_is_left_out(more):
    body = claude_chat(**more)
    assert "tools" not in claude_body(body)
    assert claude_ignored(body) == ["mcp_servers[]"]


@pytest.mark.parametrize(
    "choice, config",
    [
        ({"type": "auto"}, None),
        ({"type": "any"}, {"mode": "ANY"}),
        ({"type": "none"}, {"mode": "NONE"}),
        ({"type": "tool", "name": "weather"}, {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
    ],
)
def test_a_tool_choice_becomes_geminis_mode(choice, config):
    body = claude_body(claude_chat(tools=[ASK_CITY], tool_choice=choice))
    assert body.get("toolConfig", {}).get("functionCallingConfig") == config


def change(kind, tool):
    return {"type": f"tool_{kind}", "tool": tool}


def reference(name):
    return {"type": "tool_reference", "name": name}


CLOCK_TOOL = {"name": "clock", "input_schema": {"type": "object"}}


def system_message(*content, **more):
    return {"role": "system", "content": list(content), **more}


def test_tools_come_and_go_in_mid_conversation():
    messages = [
        user("Hi"),
        system_message(change("addition", {"type": "tool_definition", "definition": CLOCK_TOOL})),
        system_message(
            change("removal", reference("weather")), change("removal", reference("clock"))
        ),
        user("What time is it?"),
        system_message(
            change("addition", reference("clock")), change("removal", reference("web_search"))
        ),
    ]
    body = claude_chat(*messages, tools=[ASK_CITY, WEB_SEARCH])
    assert claude_body(body)["tools"] == [{"functionDeclarations": [{"name": "clock"}]}]
    assert claude_body(body)["contents"] == [u("Hi", "What time is it?")]
    assert claude_ignored(body) == []


@pytest.mark.parametrize(
    "kind, tool",
    [
        ("removal", {"type": "mcp_tool_reference", "server_name": "s", "name": "t"}),
        (
            "addition",
            {
                "type": "tool_definition",
                "definition": {
                    "type": "mcp_toolset",
                    "mcp_server_name": "s",
                    "default_config": {"enabled": False},
                },
            },
        ),
    ],
)
def test_an_mcp_server_that_a_change_restricts_is_left_out(kind, tool):
    servers = [{"type": "url", "name": "s", "url": "https://example.com/mcp"}]
    body = claude_chat(user("Hi"), system_message(change(kind, tool)), mcp_servers=servers)
    assert "tools" not in claude_body(body)
    assert claude_ignored(body) == ["mcp_servers[]"]


def test_a_search_can_be_chosen_but_not_forced():
    choice = {"type": "tool", "name": "web_search"}
    body = claude_chat(tools=[WEB_SEARCH], tool_choice=choice)
    assert claude_body(body)["tools"] == [{"googleSearch": {}}]
    assert claude_ignored(body) == ["tool_choice"]


def test_a_search_can_be_forbidden():
    body = claude_chat(tools=[WEB_SEARCH], tool_choice={"type": "none"})
    assert "tools" not in claude_body(body)


@pytest.mark.parametrize(
    "model, more, config, takes_blocks",
    [
        (NEWEST, {"max_tokens": 1024}, None, False),
        (NEWEST, {"max_tokens": 1023}, {"thinkingLevel": "LOW"}, False),
        (NEWEST, {"thinking": {"type": "adaptive"}}, {"includeThoughts": True}, True),
        (
            NEWEST,
            {
                "thinking": {"type": "adaptive", "display": "omitted"},
                "output_config": {"effort": "low"},
            },
            {"thinkingLevel": "LOW"},
            True,
        ),
        (
            NEWEST,
            {"thinking": {"type": "enabled", "budget_tokens": 4096}},
            {"thinkingLevel": "MEDIUM", "includeThoughts": True},
            True,
        ),
        (
            NEWEST,
            {"thinking": {"type": "enabled", "budget_tokens": 99999}},
            {"thinkingLevel": "HIGH", "includeThoughts": True},
            True,
        ),
        (NEWEST, {"thinking": {"type": "disabled"}}, {"thinkingLevel": "LOW"}, False),
        (NEWEST, {"output_config": {"effort": "max"}}, {"thinkingLevel": "HIGH"}, False),
        (
            FLASH,
            {"thinking": {"type": "enabled", "budget_tokens": 4096}},
            {"thinkingBudget": 4096, "includeThoughts": True},
            True,
        ),
        (FLASH, {"thinking": {"type": "disabled"}}, {"thinkingBudget": 0}, False),
        (FLASH, {"thinking": {"type": "between_tools"}}, {"thinkingBudget": 0}, False),
    ],
)
def test_thinking_by_type_budget_and_effort(model, more, config, takes_blocks):
    body = claude_chat(model=model, **more)
    assert claude_body(body)["generationConfig"].get("thinkingConfig") == config
    assert claude_plan(body).chat.thinking.signatures is takes_blocks


def test_the_last_message_about_effort_counts():
    low, high = ({"output_config": {"effort": effort}} for effort in ("low", "high"))
    body = claude_chat(
        user("Hi"), system_message(**high), user("So?"), {"role": "system", **low}, **high
    )
    assert claude_body(body)["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "LOW"}
    assert claude_body(body)["contents"] == [u("Hi", "So?")]
    assert claude_ignored(body) == []


@pytest.mark.parametrize(
    "path, body",
    [
        ("model", {"max_tokens": 9}),
        ("max_tokens", {**claude_chat(), "max_tokens": None}),
        ("max_tokens", claude_chat(max_tokens=0)),
        ("messages", {**claude_chat(), "messages": []}),
        ("messages[0].role", claude_chat({"role": "wizard", "content": "Hi"})),
        ("messages[0].content", claude_chat(user(7))),
        ("messages[0].content", claude_chat(user(None))),
        ("messages[0].content[0].type", claude_chat(user([use_block("t1")]))),
        ("messages[0].content[0].type", claude_chat(assistant([result_block("t1")]))),
        (
            "messages[0].content[0].content[0].type",
            claude_chat(user([result_block("t1", [result_block("t2")])])),
        ),
        (
            "messages[0].content[0].source.data",
            claude_chat(user([{"type": "image", "source": {"type": "base64", "data": "@"}}])),
        ),
        (
            "messages[0].content[0].source.url",
            claude_chat(
                user([{"type": "image", "source": {"type": "url", "url": "http://localhost/a"}}])
            ),
        ),
        (
            "messages[0].content[0].source.file_id",
            claude_chat(user([document({"type": "file", "file_id": "f"})])),
        ),
        ("messages[0].content[0].source.type", claude_chat(user([document({"type": "smell"})]))),
        (
            "tool_choice.name",
            claude_chat(tools=[ASK_CITY], tool_choice={"type": "tool", "name": "clock"}),
        ),
        ("tools[0].name", claude_chat(tools=[{"input_schema": {}}])),
        ("messages[0].content[0].tool", claude_chat(system_message({"type": "tool_removal"}))),
        ("messages[0].content[0].type", claude_chat(user([change("removal", reference("a"))]))),
        ("messages[0].clear_at", claude_chat(system_message(clear_at="soon"))),
        (
            "messages[0].content[0].tool_changes[0].type",
            claude_chat(
                assistant([{**CLAUDE_SUMMARY, "tool_changes": [{"tool": reference("a")}]}])
            ),
        ),
        (
            "messages[0].content[0].tool_changes[0].type",
            claude_chat(
                assistant([{**CLAUDE_SUMMARY, "tool_changes": [change("x", reference("a"))]}])
            ),
        ),
        ("thinking.type", claude_chat(thinking={})),
        ("thinking.type", claude_chat(thinking={"type": "x"})),
    ],
)
def test_a_bad_message_is_a_400_that_names_the_place(path, body):
    with pytest.raises(ProxyError) as caught:
        claude_plan(body)
    assert (caught.value.status, caught.value.path) == (400, path)


def test_a_thread_cannot_be_continued():
    with pytest.raises(ProxyError) as caught:
        claude_plan(claude_chat(thread={"type": "continue"}))
    assert (caught.value.status, caught.value.path) == (404, "thread")
    error = proxy.anthropic_error(caught.value)[1]["error"]
    assert error["details"] == {"error_code": "thread_not_found"}


@pytest.mark.parametrize(
    "clear_at, later, stays",
    [
        (None, [user("So?")], True),
        ("never", [user("So?")], True),
        ("next_user_message", [], True),
        ("next_user_message", [assistant("Yes.")], True),
        ("next_user_message", [assistant("Yes."), user("So?"), assistant("So.")], False),
    ],
)
def test_what_the_system_says_for_one_turn_is_gone_by_the_next(clear_at, later, stays):
    said = system_message(text_block("It is late."), clear_at=clear_at)
    body = claude_chat(user("Hi"), said, *later)
    assert ("It is late." in json.dumps(claude_body(body))) is stays
    assert claude_ignored(body) == []


def test_only_what_the_system_says_can_be_cleared():
    body = claude_chat({**user("Hi"), "clear_at": "next_user_message"}, user("So?"))
    assert claude_body(body)["contents"][0]["parts"] == [{"text": "Hi"}, {"text": "So?"}]
    assert claude_ignored(body) == ["messages[].clear_at"]


JSON_FORMAT = {
    "type": "json_schema",
    "schema": {"type": "object", "properties": {"a": {"type": "string"}}},
}


@pytest.mark.parametrize(
    "more", [{"output_config": {"format": JSON_FORMAT}}, {"output_format": JSON_FORMAT}]
)
def test_a_format_becomes_a_response_schema(more):
    body = claude_chat(**more)
    config = claude_body(body)["generationConfig"]
    assert config["responseJsonSchema"] == JSON_FORMAT["schema"]
    assert claude_ignored(body) == []


def test_an_answer_in_json_comes_without_a_code_fence():
    body = claude_chat(model=FLASH, tools=[ASK_CITY], output_config={"format": JSON_FORMAT})
    message, _ = claude_answer(body, whole("```json\n{}\n```"))
    assert message["content"] == [text_block("{}")]


COMPACTING = {"compaction": {"type": "summarize"}, "tools": [ASK_CITY]}


def test_a_compaction_is_one_block_with_a_summary():
    chunks = {"text": "Hm.", "thought": True}, "We ", "spoke."
    message, events = claude_answer(claude_chat(**COMPACTING), *map(chunk, chunks), whole())
    assert message["content"] == [{"type": "compaction", "content": "We spoke."}]
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("compaction", 7)
    assert events[1]["content_block"] == {"type": "compaction", "content": None}
    assert events[2]["delta"] == {"type": "compaction_delta", "content": "We spoke."}
    history = [assistant(message["content"]), user("Bye")]
    assert claude_body(claude_chat(*history))["contents"][1] == m(proxy.SUMMARY_HEAD + "We spoke.")


@pytest.mark.parametrize(
    "instructions, prompt",
    [
        ({}, proxy.COMPACTION_PROMPT),
        ({"instructions": " \n"}, proxy.COMPACTION_PROMPT),
        ({"instructions": "In one word."}, "<system>\nIn one word.\n</system>"),
    ],
)
def test_a_compaction_is_asked_for_after_the_messages_and_calls_no_tool(instructions, prompt):
    body = claude_chat(**COMPACTING)
    body["compaction"] = {**body["compaction"], **instructions}
    sent = claude_body(body)
    assert sent["contents"][0]["parts"] == [{"text": "Hi"}, {"text": prompt}]
    assert sent["toolConfig"] == {"functionCallingConfig": {"mode": "NONE"}}
    assert claude_ignored(body) == []


def test_a_compaction_keeps_the_changes_of_the_tools():
    changes = [
        change("addition", {"type": "tool_definition", "definition": CLOCK_TOOL}),
        change("removal", reference("weather")),
    ]
    body = claude_chat(user("Hi"), system_message(*changes), **COMPACTING)
    message, events = claude_answer(body, whole("We spoke."))
    block = {"type": "compaction", "content": "We spoke.", "tool_changes": changes}
    assert message["content"] == [block]
    assert events[1]["content_block"] == {**block, "content": None}
    body = claude_chat(assistant([block]), user("Bye"), **COMPACTING)
    (declaration,) = claude_body(body)["tools"][0]["functionDeclarations"]
    assert declaration["name"] == "clock"
    assert claude_answer(body, whole("We spoke."))[0]["content"] == [block]


def test_what_is_about_an_answer_has_no_effect_on_a_compaction_and_is_named():
    form = {"type": "json_schema", "schema": {"type": "object"}}
    more = {"tool_choice": {"type": "any"}, "output_config": {"format": form, "effort": "low"}}
    body = claude_chat(**COMPACTING, **more)
    assert claude_ignored(body) == ["output_config.format", "tool_choice"]
    assert "responseJsonSchema" not in claude_body(body)["generationConfig"]


@pytest.mark.parametrize("answer", [whole(), whole("We", finish="MAX_TOKENS"), whole(call("f"))])
def test_a_compaction_without_a_whole_summary_has_none(answer):
    message, _ = claude_answer(claude_chat(**COMPACTING), answer)
    assert message["content"] == [{"type": "compaction", "content": None}]


@pytest.mark.parametrize(
    "compaction, path",
    [
        ("summarize", "compaction"),
        ({}, "compaction.type"),
        ({"type": "other"}, "compaction.type"),
        ({"type": "summarize", "instructions": 1}, "compaction.instructions"),
    ],
)
def test_a_bad_compaction_is_refused(compaction, path):
    error = refused(claude_chat(compaction=compaction), proxy.anthropic_messages_request)
    assert (error.status, error.path) == (400, path)


def test_tokens_are_counted_without_a_compaction():
    body = claude_chat(**COMPACTING)
    counted, ignored = plan_and_ignored(body, proxy.anthropic_count_request, CLAUDE)
    assert counted.calls[0].body["generateContentRequest"]["contents"] == [u("Hi")]
    assert ignored == ["compaction"]


@pytest.mark.parametrize("speed, ignored", [("standard", []), ("fast", ["speed"])])
def test_only_another_speed_than_the_standard_is_named_as_ignored(speed, ignored):
    assert claude_ignored(claude_chat(speed=speed)) == ignored


def test_thoughts_without_a_signature_say_so_and_the_word_signs_nothing_when_it_comes_back():
    body = claude_chat(tools=[ASK_CITY], thinking={"type": "adaptive"})
    message, _ = claude_answer(body, whole({"text": "Hm.", "thought": True}, call("weather")))
    assert message["content"][0] == {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"}
    history = [user("Hi"), assistant(message["content"])]
    assert "thoughtSignature" not in claude_body(claude_chat(*history))["contents"][1]["parts"][0]


def test_the_beginning_of_a_message_counts_no_output():
    _, events = claude_answer(claude_chat(), whole("Hello"))
    usage = events[0]["message"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (4, 0)
    assert events[-2]["usage"]["output_tokens"] == 7


STREAMED = b"".join(
    b"event: %b\ndata: %b\n\n" % (json.loads(line)["type"].encode(), line)
    for line in b"""
{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"claude-opus-5","content":[],"stop_reason":null,"stop_sequence":null,\
"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":1,"output_tokens":0,"output_tokens_details":{"thinking_tokens":0}}}}
{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Hm."}}
{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"unsigned"}}
{"type":"content_block_stop","index":0}
{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}
{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Let me "}}
{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"see."}}
{"type":"content_block_stop","index":1}
{"type":"content_block_start","index":2,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"content_block_delta","index":2,"delta":{"type":"signature_delta","signature":"EmFhYWFhYWFh"}}
{"type":"content_block_stop","index":2}
{"type":"content_block_start","index":3,"content_block":{"type":"tool_use","id":"call_2","name":"weather","input":{},\
"caller":{"type":"direct"}}}
{"type":"content_block_delta","index":3,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\":\\"Oslo\\"}"}}
{"type":"content_block_stop","index":3}
{"type":"content_block_start","index":4,"content_block":{"type":"tool_use","id":"call_3","name":"weather","input":{},\
"caller":{"type":"direct"}}}
{"type":"content_block_delta","index":4,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\":\\"Rome\\"}"}}
{"type":"content_block_stop","index":4}
{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},\
"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":1,"output_tokens":7,"output_tokens_details":{"thinking_tokens":2}}}
{"type":"message_stop"}
""".strip().splitlines()
)
TOOL_CHUNKS = (
    chunk(
        {"text": "Hm.", "thought": True},
        usage={"promptTokenCount": 4, "cachedContentTokenCount": 1},
    ),
    chunk("Let me "),
    chunk("see."),
    chunk(call("weather", {"city": "Oslo"}, "a"), call("weather", {"city": "Rome"})),
    whole("", usage={**USAGE, "cachedContentTokenCount": 1}),
)


def test_a_streamed_message_byte_by_byte():
    body = claude_chat(tools=[ASK_CITY], thinking={"type": "adaptive"})
    _, events = claude_answer(body, *TOOL_CHUNKS)
    assert b"".join(map(proxy.NAMED_SSE.encode, events)) == STREAMED


def test_a_whole_message():
    body = claude_chat(tools=[ASK_CITY], thinking={"type": "adaptive"})
    message, _ = claude_answer(body, *TOOL_CHUNKS)
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
        text_block("Let me see."),
        {"type": "thinking", "thinking": "", "signature": sign("a")},
        use_block("call_2", city="Oslo"),
        use_block("call_3", city="Rome"),
    ]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens"] == 7


def test_a_signature_joins_the_thinking_block_before_it():
    body = claude_chat(tools=[ASK_CITY], thinking={"type": "adaptive"})
    thought = {"text": "Hm.", "thought": True}
    message, _ = claude_answer(body, whole(thought, call("weather", {}, "a")))
    block = {"type": "thinking", "thinking": "Hm.", "signature": sign("a")}
    assert message["content"][0] == block
    assert len(message["content"]) == 2


def test_two_equal_calls_are_two_blocks():
    plan = claude_plan(claude_chat(tools=[ASK_CITY]))
    event = ToolCall("weather", {}, None, "call_1")
    end = End("stop", (event, event), "STOP", "", Usage(), [])
    events = list(
        proxy.anthropic_messages_stream(exchange(plan), iter([iter([event, event, end])]))
    )
    assert [one["index"] for one in events if one["type"] == "content_block_start"] == [0, 1]
    message = proxy.anthropic_messages_response(exchange(plan), iter([iter([event, event, end])]))
    assert len(message["content"]) == 2


def test_a_signature_goes_only_to_clients_that_take_thinking_blocks():
    message, _ = claude_answer(claude_chat(tools=[ASK_CITY]), whole(call("weather", {}, "a")))
    assert [block["type"] for block in message["content"]] == ["tool_use"]


def test_a_client_that_refuses_parallel_calls_gets_one():
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    body = claude_chat(tools=[ASK_CITY], tool_choice=choice)
    message, _ = claude_answer(body, whole(call("weather"), call("weather")))
    assert len(message["content"]) == 1


@pytest.mark.parametrize(
    "answer, stop",
    [
        (whole("Hi"), "end_turn"),
        (whole("Hi", finish="MAX_TOKENS"), "max_tokens"),
        (whole(finish="SAFETY"), "refusal"),
        (whole(finish="MALFORMED_FUNCTION_CALL"), "end_turn"),
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "refusal"),
    ],
)
def test_a_finish_reason_becomes_a_stop_reason(answer, stop):
    message, _ = claude_answer(claude_chat(), answer)
    assert message["stop_reason"] == stop
    assert ("stop_details" in message) is (stop == "refusal")


WIND_GROUNDING = {
    "webSearchQueries": ["wind"],
    "groundingChunks": [{"web": {"uri": "https://a", "title": "A"}}],
    "groundingSupports": [
        {"segment": {"startIndex": 0, "endIndex": 6, "text": "Æther"}, "groundingChunkIndices": [0]}
    ],
}
WIND_CITATION = {
    "type": "web_search_result_location",
    "cited_text": "Æther",
    "url": "https://a",
    "title": "A",
    "encrypted_index": "",
}
WIND_RESULT = {
    "type": "web_search_result",
    "url": "https://a",
    "title": "A",
    "encrypted_content": "",
    "page_age": None,
}


def test_a_search_comes_after_the_text_that_cites_its_results():
    chunks = chunk("Æther"), whole(" wind", groundingMetadata=WIND_GROUNDING)
    message, _ = claude_answer(claude_chat(tools=[WEB_SEARCH]), *chunks)
    search = {"type": "server_tool_use", "id": "srvtoolu_2", "name": "web_search"}
    result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_2"}
    direct = {"caller": {"type": "direct"}}
    assert message["content"] == [
        text_block("Æther wind", citations=[WIND_CITATION]),
        {**search, "input": {"query": "wind"}, **direct},
        {**result, "content": [WIND_RESULT], **direct},
    ]
    searches = {"web_search_requests": 1, "web_fetch_requests": 0}
    assert message["usage"]["server_tool_use"] == searches


def test_a_citation_quotes_150_characters_at_most():
    segment = {"startIndex": 0, "endIndex": 400}
    supports = [{"segment": segment, "groundingChunkIndices": [0]}]
    grounding = {**WIND_GROUNDING, "groundingSupports": supports}
    message, _ = claude_answer(claude_chat(), whole("wind " * 80, groundingMetadata=grounding))
    assert message["content"][0]["citations"][0]["cited_text"] == "wind " * 30


@pytest.mark.parametrize("thought", [False, True])
def test_a_long_text_of_a_message_is_cut_into_deltas(thought):
    body = claude_chat(thinking={"type": "adaptive"}, stream=True)
    message, events = claude_answer(body, whole({"text": NOVEL, "thought": thought}))
    assert max(len(proxy.NAMED_SSE.encode(event)) for event in events) < 20_000
    assert NOVEL in message["content"][0].values()


def test_a_long_call_in_a_message_is_cut_into_deltas():
    body = claude_chat(tools=[ASK_CITY], stream=True)
    message, events = claude_answer(body, whole(call("weather", {"city": NOVEL})))
    kind = "content_block_delta"
    texts = [event["delta"]["partial_json"] for event in events if event["type"] == kind]
    assert len(texts) > 5
    assert max(map(len, texts)) <= 16_000
    assert "".join(texts) == proxy.encode_json({"city": NOVEL})
    assert message["content"] == [use_block("call_1", city=NOVEL)]


@pytest.mark.parametrize("thinking", [{}, {"thinking": {"type": "adaptive"}}])
def test_a_call_comes_last_behind_the_citations_of_the_text_and_the_searches(thinking):
    answer = whole("Æther", call("weather", {}, "a"), groundingMetadata=WIND_GROUNDING)
    message, _ = claude_answer(claude_chat(tools=[ASK_CITY], **thinking), answer)
    assert message["content"][0] == text_block("Æther", citations=[WIND_CITATION])
    kinds = [block["type"] for block in message["content"][1:]]
    signature = ["thinking"] * len(thinking)
    assert kinds == ["server_tool_use", "web_search_tool_result", *signature, "tool_use"]


def test_an_image_is_a_note_in_the_text_of_a_message():
    message, _ = claude_answer(claude_chat(), whole("Look:", PNG_PART))
    note = "\n[Gemini made something of type image/png, for which there is no place here.]\n"
    assert message["content"] == [text_block("Look:" + note)]


def test_tokens_are_counted_by_gemini():
    messages = user("Hi"), assistant([use_block("t1")]), user([result_block("t1")])
    body = claude_chat(*messages, system="Be brief.", tools=[ASK_CITY], max_tokens=None)
    plan = plan_and_ignored(body, proxy.anthropic_count_request, CLAUDE)[0]
    call_path, call_body = plan.calls[0].path, plan.calls[0].body
    assert call_path == "models/gemini-3.8-flash:countTokens"
    assert refusal_of(call_path, call_body) is None
    counted = dict(call_body["generateContentRequest"])
    assert counted.pop("model") == "models/gemini-3.8-flash"
    assert set(counted) == {"contents", "systemInstruction", "tools"}
    assert refusal_of("models/gemini-3.8-flash:generateContent", counted) is None
    count = proxy.anthropic_count_response(exchange(plan), iter([iter([{"totalTokens": 61}])]))
    assert count == {"input_tokens": 61}


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_an_error_in_anthropics_form(status, kind):
    error = ProxyError(status, "No.")
    error.request_id = "req_1"
    body = {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "req_1"}
    assert proxy.anthropic_error(error) == (status, body)


def test_a_stream_of_messages_is_kept_alive_by_pings(claude_server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say(whole("Hi"), delay=0.12))
    body = claude_chat(stream=True, metadata={"user_id": "u"})
    status, headers, wire = post(claude_server, "/v1/messages?beta=true", body)
    assert status == 200
    assert wire.startswith(b'event: ping\ndata: {"type":"ping"}\n\n')
    assert wire.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert b"metadata" not in wire
    assert headers["request-id"] == headers["x-request-id"]


def test_a_stream_of_messages_that_fails_ends_in_an_error_event(claude_server, gemini):
    gemini.say([chunk("Hel"), {"error": {"code": 503, "message": "Busy."}}])
    _, headers, wire = post(claude_server, "/v1/messages", claude_chat(stream=True))
    assert json.loads(wire.strip().rpartition(b"event: error\ndata: ")[2]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "Busy."},
        "request_id": headers["request-id"],
    }
    assert b"message_stop" not in wire


def test_an_unknown_path_below_messages_is_a_404_in_anthropics_form(claude_server):
    status, _, body = post(claude_server, "/v1/messages/batches", claude_chat())
    assert status == 404
    assert json.loads(body)["error"]["type"] == "not_found_error"


def test_tokens_are_counted_on_the_wire(claude_server):
    path = "/v1/messages/count_tokens?beta=true"
    assert json.loads(post(claude_server, path, claude_chat())[2]) == {"input_tokens": 7}


def test_claudes_signatures_are_remembered_by_id_where_no_thinking_is_visible(
    claude_server, gemini
):
    answer = json.loads(post(claude_server, "/v1/messages", claude_chat(tools=[ASK_CITY]))[2])
    # Claude Code rewrites the arguments of its edits.
    block = {**answer["content"][0], "input": {"city": "Oslo", "unit": "C"}}
    history = user("Other words"), assistant([block]), user([result_block(block["id"])])
    post(claude_server, "/v1/messages", claude_chat(*history, tools=[ASK_CITY]))
    assert gemini.bodies[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("stand-in")
    assert not gemini.refused


# ======================================================================================
# 11. Gemini's own
# ======================================================================================


def passed_plan(method, path, query="", body=None, headers=()):
    """The plan for a request of Gemini's own API, and what it names as ignored."""
    fields = Fields({}) if body is None else proxy.passed_body(body, "")
    request = proxy.ClientRequest(method, path, query, dict(headers))
    plan = proxy.passed_request(fields, Context(request=request))
    return plan, fields.ignored()


GENERATE_PATH = f"/v1beta/models/{NEWEST}:generateContent"


def test_a_request_of_geminis_own_api_goes_on_as_it_came():
    body, kind = b'{"odd":  1.50, "new": "\xff"}', {"content-type": "application/json"}
    plan, _ = passed_plan("POST", GENERATE_PATH, "alt=sse&$fields=a%2Fb", body, kind.items())
    (call,) = plan.calls
    assert call.path == f"models/{NEWEST}:generateContent?alt=sse&$fields=a%2Fb"
    assert call.passed == proxy.HttpParts("POST", "v1beta", kind, body)
    assert plan.model_name == NEWEST


def test_credentials_in_headers_and_query_stay_behind():
    sent = {
        "x-goog-api-client": "sdk/1",
        "api-revision": "2026-05-20",
        "x-goog-upload-offset": "0",
        "x-goog-api-key": "k",
        "authorization": "Bearer k",
        "cookie": "k",
        "x-goog-user-project": "k",
    }
    query = "key=k&a=1&%6bey=k&a=1&access_token=k&$httpHeaders=k&proxy_ticket=k"
    plan, ignored = passed_plan("GET", "/v1/models/x/operations/1", query, headers=sent.items())
    assert plan.calls[0].path == "models/x/operations/1?a=1&a=1"
    assert list(plan.calls[0].passed.headers) == list(sent)[:3]
    assert ignored == ["$httpHeaders", "access_token"]


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "models"),
        ("GET", "models/gemini-2.5-flash"),
        ("GET", "models/veo-3.1/operations/x-1"),
        ("GET", "files/abc:download"),
        ("GET", "fileSearchStores/a/documents"),
        ("GET", "fileSearchStores/a/upload/operations/b"),
        ("POST", "models/x:verbOfNextYear"),
        ("POST", "tunedModels/mine:generateContent"),
        ("POST", "files:register"),
        ("POST", "cachedContents"),
        ("PATCH", "cachedContents/a"),
        ("DELETE", "files/a"),
        ("POST", "interactions/v1_a-b/cancel"),
        ("POST", "batches/a:cancel"),
    ],
)
def test_geminis_resources_are_known(method, path):
    (call,) = passed_plan(method, "/v1beta/" + path.replace(":", "%3A"))[0].calls
    assert (call.passed.method, call.path) == (method, path)


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "nonsense"),
        ("GET", "models/x:generateContent"),
        ("GET", "models/"),
        ("GET", "models/../files"),
        ("GET", "models/..%2Ffiles"),
        ("GET", "models/%2e%2e"),
        ("GET", "models/a/b"),
        ("GET", "models/a%2Foperations%2Fb"),
        ("GET", "models/a%3Fkey=1"),
        ("GET", "models/a%00"),
        ("GET", "models/a%0A"),
        ("GET", "models/a\n"),
        ("GET", "models/a."),
        ("POST", "models"),
        ("POST", "models/x"),
        ("POST", "models/x:"),
        ("POST", "models/x:a/b"),
        ("POST", "openai/chat/completions"),
        ("PATCH", "models/x"),
        ("DELETE", "models/x"),
    ],
)
def test_a_path_names_a_resource_or_nothing(method, path):
    with pytest.raises(proxy.NoRouteError) as caught:
        passed_plan(method, "/v1beta/" + path)
    assert caught.value.status == 404


def test_the_tokens_of_an_answer_count_although_its_blocks_cut_them():
    pieces = [
        proxy.AnswerHead(200, {}),
        b'data: {"usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 1}}\r\n\r\n',
        rb'data: {"text": "\"promptTokenCount\": 999", "usageMetadata": {"promptTokenCount": 3',
        b'1, "candidatesToken',
        b'Count":',
        b'25,"thoughtsTokenCount": 4}}\r\n\r\n',
    ]
    one = exchange()
    assert list(proxy.passed_stream(one, iter([iter(pieces)]))) == pieces
    assert one.usage == proxy.Usage(prompt=31, output=29, thoughts=4)


@pytest.mark.parametrize(
    "status, word",
    [
        (400, "INVALID_ARGUMENT"),
        (401, "UNAUTHENTICATED"),
        (404, "NOT_FOUND"),
        (413, "INVALID_ARGUMENT"),
        (502, "UNAVAILABLE"),
    ],
)
def test_our_own_errors_have_googles_form(status, word):
    error = {"code": status, "message": "why", "status": word}
    assert proxy.passed_error(ProxyError(status, "why")) == (status, {"error": error})


# ======================================================================================
# 12. Routing
# ======================================================================================


@pytest.mark.parametrize(
    "method, path, response",
    [
        ("POST", "/v1/responses", proxy.openai_responses_response),
        ("POST", "/v1/responses/input_tokens", proxy.openai_input_tokens_response),
        ("GET", "/v1/responses/resp_1", proxy.openai_stored_response),
        ("DELETE", "/v1/responses/resp_1", proxy.openai_delete_response),
        ("GET", "/v1/responses/resp_1/input_items", proxy.openai_input_items_response),
        ("POST", "/v1/responses/resp_1/cancel", proxy.openai_cancel_response),
    ],
)
def test_the_paths_below_responses_have_routes_of_their_own(method, path, response):
    assert proxy.find_route("ollama", method, path)[0].response is response


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/v1/chat/completions",
        "/v1/chat/completions/",
        "//v1//chat//completions",
        "chat/completions/",
    ],
)
def test_the_usual_misspellings_of_a_base_url_work(path):
    route, _ = proxy.find_route("openai", "POST", proxy.route_path(path, "openai"))
    assert route.request is proxy.openai_chat_request


@pytest.mark.parametrize("path", ["/v1/models/models%2Fgemini-x", "/v1/models/models/gemini-x"])
def test_a_captured_segment_is_unquoted_after_the_match(path):
    _, params = proxy.find_route("openai", "HEAD", proxy.route_path(path, "openai"))
    assert params == {"model": "models/gemini-x"}


def test_a_wrong_method_is_a_405_that_names_the_right_ones():
    with pytest.raises(ProxyError) as caught:
        proxy.find_route("openai", "GET", "/v1/chat/completions")
    assert (caught.value.status, caught.value.headers) == (405, {"Allow": "POST"})


def test_an_unknown_path_is_a_404():
    with pytest.raises(ProxyError) as caught:
        proxy.find_route("openai", "GET", "/v1/nonsense")
    assert caught.value.status == 404


@pytest.mark.parametrize("path", ["/v1beta/models", "/v1/v1beta/models", "/v1beta/v1beta/models/"])
def test_the_version_of_geminis_api_may_come_twice(path):
    for api in proxy.MOUNTS:
        route, params = proxy.find_route(api, "GET", proxy.route_path(path, api))
        assert route in proxy.GEMINI_ROUTES
        assert params == {"path": "models"}


@pytest.mark.parametrize(
    "method, path, protocol",
    [
        ("PUT", "/v1beta/models/x", "gemini"),
        ("GET", "/v1beta", "gemini"),
        ("POST", "/upload/v1beta/files", "gemini"),
        ("POST", "/v1/models/x:generateContent", "gemini"),
        ("GET", "/v1/models/x:latest", "openai"),
        ("POST", "/v1/models/x", "openai"),
        ("POST", "/v1/models/x:%20y", "openai"),
        ("POST", "/v1/interactions", "gemini"),
        ("POST", "/v1/uploads", "openai"),
    ],
)
def test_errors_of_geminis_own_paths_are_googles(method, path, protocol):
    for api in proxy.MOUNTS:
        assert proxy.protocol_of(api, method, proxy.route_path(path, api)).name == protocol


def test_each_route_belongs_to_the_protocol_that_writes_the_errors_of_its_path():
    for api, mounts in proxy.MOUNTS.items():
        for _, protocol in mounts:
            for route in protocol.routes:
                path = re.sub(r"\{\w+\}", "a", route.path)
                owner = proxy.protocol_of(api, route.method, path)
                found, _ = proxy.find_route(api, route.method, path)
                assert found in owner.routes
                assert owner is protocol


def all_routes():
    return {
        (protocol.name, route.method, route.path): route
        for mounts in reversed(list(proxy.MOUNTS.values()))
        for _, protocol in mounts
        for route in protocol.routes
    }


ANY_BODY = {
    "model": FLASH,
    "messages": [user("Hi")],
    "input": "Hi",
    "prompt": "Hi",
    "max_tokens": 9,
    "stream": True,
    "from": FLASH,
    "stream_format": "sse",
    "file": proxy.Upload("a.wav", "audio/wav", b"x"),
    "image": f"data:image/png;base64,{PNG}",
}  # every route with a stream takes it


@pytest.mark.parametrize(
    "route",
    [route for route in all_routes().values() if route.stream],
    ids=lambda route: route.path,
)
def test_no_stream_says_a_word_before_gemini_does(route):
    body = {**ANY_BODY, "model": "mine"} if "create" in route.path else ANY_BODY
    target = {"GET": "models", "POST": "cachedContents"}.get(route.method, "files/a")
    request = proxy.ClientRequest(route.method, f"/v1/{target}")
    one = exchange(route.request(Fields(body), Context(ollama=True, request=request)))
    chunks_read = []

    def chunks():
        chunks_read.append(True)
        yield {**whole("Hello", PNG_PART, AUDIO), "models": MODELS}

    events = route.stream(one, events_of(one, [chunks()]))
    assert not chunks_read
    next(events)
    assert chunks_read


# ======================================================================================
# 13. Credentials
# ======================================================================================

# ---- RSA keys and JWTs ----

PKCS8 = """\
MIICdwIBADANBgkqhkiG9w0BAQEFAASCAmEwggJdAgEAAoGBAKjPz6oX2x4sXGvyn02muRwn0Ujt97ESsHx1Bsr2QnYSZDILot2f
wYgGmIqX/0kdbVqi2HwSyCwePadjPKWfG3Twsck0QPtprDbNwgd4au1IoZyr/PBglxKq9iDELKWZX7UXV/u0AdQ0wPOtxjuVg0+G
C3U3qzkQvHLH5h1RjutvAgMBAAECgYArqayFyyvSrxislxGbLQ9d9/KK0XoqY7IgTsiWAIIKNhGSXC4g8qxE+afE2TGfgKwDMHGc
DeOWfa/mtqU+FVwtRFMcRh2QcBr76BOS/tzg/3i++U2UnCqoplJ6IZYFv0gAeBNFziMMFoMIWAE6ZteKU+BaUsJuui/BqBH0/Sq5
wQJBANqoABu9oaJhSnW+A6s30L9l+rHOh16XAuqu1yz4oV712oA1YgtMId8jpfoZ2D7cXAr+ktgRJwSUtre2RlLoTk8CQQDFpIfC
cnz09LBH5OsDEldqM5ORommlW7xPlTGTsnandM6NeTqotkRhf4n5ixioAmiMPduyTlcGkzxMyInwzmjhAkEAim+1adrc/Cbm8rb0
MbIr+xJA79RXxp6LnTRHTdS4rpuv1F54DbkM9O7oBfnY/KudpuRY6m2pq2/QY24HBjTIZwJAUbeybiJaKgnVrRQoW0/FFuMWW7u0
RKuGU71TD0dVqe0wzevW5hTedxV9ndD2M9kzEvEsmi+r6csMvo6YAhnF4QJBAJlZYYvu66I8iMtDcw/VVuNFK3vdffGsMseebsbv
Fp5mNzKhUyPdCJ63+VxFn2mOVWNbAlTW+4T1sIWZiX+ttSE="""
PKCS1 = base64.b64encode(base64.b64decode(PKCS8)[26:]).decode()  # what is inside of it
EC_KEY = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCjrs9s7/mlnvbwRS7yIKdv1O6l8427RhCa8N+dTBBSmhRANC"
    "AASLRAiAxkeYuP1m9lXKKj6V6tkElV9WdHyc/kLXH3FmaWDF8rrOpAnZYc3cR1ziL5Y8IeWmPCKp3bI1jz8JMa2S"
)
# printf Hello | openssl dgst -sha256 -sign
HELLO_SIGNATURE = (
    "98393a42ebc567bbb83dc12348095b2ae553aab73aec0a2afeb7f55c9b39856462fd3b7f8ea800f96dfca40123e2630a"
    "96743d324e3e6b154c5c3b990c9f9f3326303be31e8efcb8dfb648e797d35b023cb59ef2c42b9c5b5023ad62f6595858"
    "9428dfcbb47031e55f278b269bb97429d29442eef6f9317fcddfc4e1bdfc182d"
)


def pem(text, label="PRIVATE KEY"):
    return f"-----BEGIN {label}-----\n{text}\n-----END {label}-----\n"


@pytest.mark.parametrize(
    "text", [pem(PKCS8), pem(PKCS1, "RSA PRIVATE KEY"), pem(PKCS8).replace("\n", "\r\n")]
)
def test_a_signature_is_the_one_that_openssl_makes(text):
    assert proxy.rsa_signature(proxy.rsa_key(text), b"Hello").hex() == HELLO_SIGNATURE


def run_openssl(*arguments):
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False)


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl here")
@pytest.mark.parametrize("bits", [2048, 3072])
def test_openssl_finds_signatures_of_its_own_keys_right(bits, tmp_path):
    key, public, message, signature = (tmp_path / name for name in "kpms")
    assert run_openssl("genrsa", "-out", key, bits).returncode == 0
    assert run_openssl("rsa", "-in", key, "-pubout", "-out", public).returncode == 0
    message.write_bytes(b"the message")
    signature.write_bytes(proxy.rsa_signature(proxy.rsa_key(key.read_text()), b"the message"))
    verify = ("dgst", "-sha256", "-verify", public, "-signature", signature, message)
    assert run_openssl(*verify).returncode == 0


@pytest.mark.parametrize(
    "text, fault",
    [
        ("hello", "PEM"),
        (pem(PKCS8, "PUBLIC KEY"), "PEM"),
        (pem(EC_KEY), "no RSA key"),
        (pem(EC_KEY, "EC PRIVATE KEY"), "no RSA key"),
        (pem(PKCS8, "ENCRYPTED PRIVATE KEY"), "encrypted"),
        (pem("Proc-Type: 4,ENCRYPTED\n\n" + PKCS1, "RSA PRIVATE KEY"), "encrypted"),
        (pem(PKCS8[:400]), "cut short"),
        (pem(PKCS1[:400], "RSA PRIVATE KEY"), "cut short"),
        (pem(PKCS8.replace("wQJBANqo", "wQJBANqp")), "damaged"),
        (pem("\x00" + PKCS8), "cut short"),
        (pem(""), "cut short"),
    ],
)
def test_the_fault_of_a_private_key_is_told_without_the_key(text, fault):
    with pytest.raises(proxy.CredentialError) as caught:
        proxy.rsa_key(text)
    assert fault in str(caught.value)
    assert PKCS8[60:90] not in str(caught.value)


def decoded_jwt(token):
    """(head, claims) of a JWT."""
    assert "=" not in token
    return tuple(json.loads(proxy.decode_base64(text)) for text in token.split(".")[:2])


# ---- credentials ----

EMAIL = "bot@my-project.iam.gserviceaccount.com"
USER_FILE = {
    "type": "authorized_user",
    "client_id": "c",
    "client_secret": "the-client-secret",
    "refresh_token": "the-refresh-token",
}
SERVICE_FILE = {
    "type": "service_account",
    "project_id": "my-project",
    "private_key_id": "k1",
    "private_key": pem(PKCS8),
    "client_email": EMAIL,
    "token_uri": "https://office.example/token",
}
FEDERATED_FILE = {
    "type": "external_account",
    "audience": "//iam.example/pool",
    "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
    "credential_source": {"file": "/var/run/token"},
}
WORKFORCE_FILE = {
    **USER_FILE,
    "type": "external_account_authorized_user",
    "token_url": "https://sts.example/v1/oauthtoken",
}
IMPERSONATING = {
    "service_account_impersonation_url": f"https://iam.example/v1/projects/-/serviceAccounts/{EMAIL}:generateAccessToken"
}
IMPERSONATED_FILE = {
    "type": "impersonated_service_account",
    "source_credentials": USER_FILE,
    "delegates": ["d"],
    **IMPERSONATING,
}
AWS = {"environment_id": "aws1", "url": "http://169.254.169.254/"}


def credential_of(fields):
    return proxy.read_credential(fields, "a.json")


@pytest.mark.parametrize(
    "fields, fault",
    [
        ([USER_FILE], "no JSON object"),
        ({}, "type is None"),
        ({**USER_FILE, "type": "gdch_service_account"}, "gdch_service_account"),
        ({**USER_FILE, "type": "token command", "command": "id"}, "token command"),
        ({**USER_FILE, "refresh_token": ""}, "refresh_token"),
        ({**USER_FILE, "token_uri": "file:///etc/passwd"}, "token_uri"),
        ({**USER_FILE, "token_uri": "https://user@h/"}, "token_uri"),
        ({**USER_FILE, "universe_domain": "example.com"}, "universe_domain"),
        ({**SERVICE_FILE, "client_email": None}, "client_email"),
        ({**SERVICE_FILE, "private_key": 7}, "private_key"),
        ({**IMPERSONATED_FILE, "source_credentials": {}}, "source_credentials"),
        ({**IMPERSONATED_FILE, "source_credentials": {"type": "x"}}, "'x'"),
        ({**IMPERSONATED_FILE, "source_credentials": FEDERATED_FILE}, "not supported"),
        ({**FEDERATED_FILE, "credential_source": AWS}, "AWS"),
        (
            {**FEDERATED_FILE, "subject_token_type": "urn:ietf:params:aws:token-type:aws4_request"},
            "AWS",
        ),
        ({**FEDERATED_FILE, "credential_source": {"executable": {}}}, "-token-command"),
        ({**FEDERATED_FILE, "credential_source": {"certificate": {}}}, "X.509"),
        ({**FEDERATED_FILE, "credential_source": {}}, "credential_source"),
        ({**FEDERATED_FILE, "credential_source": {"file": "a", "url": "http://h"}}, "either"),
        ({**FEDERATED_FILE, "credential_source": {"url": "gopher://h"}}, "http"),
    ],
)
def test_the_fault_of_a_credential_is_told(fields, fault):
    with pytest.raises(proxy.CredentialError) as caught:
        credential_of(fields)
    assert fault in str(caught.value)
    assert "the-refresh-token" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, account",
    [
        (SERVICE_FILE, EMAIL),
        ({**USER_FILE, "account": "jane@example.com"}, "jane@example.com"),
        (USER_FILE, ""),
        (FEDERATED_FILE, "//iam.example/pool"),
        ({**FEDERATED_FILE, **IMPERSONATING}, EMAIL),
        (IMPERSONATED_FILE, EMAIL),
    ],
)
def test_a_credential_tells_its_account(fields, account):
    assert credential_of(fields).account == account


NOW = 1700000000.7
TOKEN_ANSWER = json.dumps({"access_token": "ya29.a", "expires_in": 1800})


def granted(fields, *answers):
    """(the token, the steps to it) that these answers lead to."""
    grant = proxy.token_grant(credential_of(fields), NOW)
    steps = [next(grant)]
    with pytest.raises(StopIteration) as caught:
        for answer in answers:
            step = grant.send(answer)
            steps.append(step)
    return caught.value.value, steps


def form_of(step):
    assert step.headers["Content-Type"] == "application/x-www-form-urlencoded"
    return dict(urllib.parse.parse_qsl(step.body.decode(), strict_parsing=True))


def test_a_user_gives_the_refresh_token_for_an_access_token():
    token, (step,) = granted(USER_FILE, TOKEN_ANSWER)
    assert token == proxy.Token("ya29.a", 1800.0)
    assert step.url == "https://oauth2.googleapis.com/token"
    assert "Authorization" not in step.headers
    fields = {key: USER_FILE[key] for key in ("client_id", "client_secret", "refresh_token")}
    assert form_of(step) == {"grant_type": "refresh_token", **fields}


def test_a_workforce_user_is_named_in_the_header_and_may_get_another_refresh_token():
    answer = json.dumps({"access_token": "t", "expires_in": 5, "refresh_token": "next"})
    token, (step,) = granted(WORKFORCE_FILE, answer)
    assert token.refresh_token == "next"
    assert (
        step.headers["Authorization"]
        == "Basic " + base64.b64encode(b"c:the-client-secret").decode()
    )
    assert form_of(step) == {"grant_type": "refresh_token", "refresh_token": "the-refresh-token"}


def test_a_service_account_gives_a_jwt_for_an_access_token():
    _, (step,) = granted(SERVICE_FILE, TOKEN_ANSWER)
    form = form_of(step)
    assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    head, claims = decoded_jwt(form["assertion"])
    assert head == {"alg": "RS256", "typ": "JWT", "kid": "k1"}
    assert claims == {
        "iss": EMAIL,
        "iat": 1700000000,
        "exp": 1700003600,
        "scope": "https://www.googleapis.com/auth/cloud-platform",
        "aud": "https://office.example/token",
    }


def test_a_jwt_is_signed_over_its_head_and_claims():
    credential = credential_of(SERVICE_FILE)
    text, _, signature = proxy.service_jwt(credential, NOW).rpartition(".")
    assert proxy.decode_base64(signature) == proxy.rsa_signature(credential.key, text.encode())


def test_where_no_token_can_be_had_a_service_account_signs_one():
    token = proxy.self_signed_token(credential_of(SERVICE_FILE), NOW)
    assert token.seconds == 3600.0
    assert decoded_jwt(token.value)[1] == {
        "iss": EMAIL,
        "sub": EMAIL,
        "iat": 1700000000,
        "exp": 1700003600,
        "aud": "https://aiplatform.googleapis.com/",
    }


@pytest.mark.parametrize(
    "form, text",
    [
        ({}, "the-subject\n"),
        ({"type": "json", "subject_token_field_name": "id"}, '{"id": "the-subject"}'),
    ],
)
def test_a_subject_token_is_read_and_exchanged(form, text):
    source = {"url": "http://h/", "headers": {"X": "y"}, "format": form}
    _, (reading, exchange) = granted(
        {**FEDERATED_FILE, "credential_source": source}, text, TOKEN_ANSWER
    )
    assert reading == proxy.TokenStep("http://h/", headers={"X": "y"})
    assert exchange.url == "https://sts.googleapis.com/v1/token"
    assert form_of(exchange) == {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "audience": "//iam.example/pool",
        "scope": "https://www.googleapis.com/auth/cloud-platform",
        "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token": "the-subject",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
    }


@pytest.mark.parametrize("end", ["2023-11-14T22:43:20Z", "2023-11-14T22:43:20.123456789Z"])
def test_an_account_is_impersonated_with_the_token_of_another(end):
    answer = json.dumps({"accessToken": "ya29.b", "expireTime": end})
    token, (_, step) = granted(IMPERSONATED_FILE, TOKEN_ANSWER, answer)
    assert (token.value, round(token.seconds)) == ("ya29.b", 1799)
    assert step.url == IMPERSONATING["service_account_impersonation_url"]
    assert step.headers["Authorization"] == "Bearer ya29.a"
    assert json.loads(step.body) == {
        "scope": ["https://www.googleapis.com/auth/cloud-platform"],
        "lifetime": "3600s",
        "delegates": ["d"],
    }


@pytest.mark.parametrize(
    "life, seconds",
    [("1800", 1800), (9.5, 9.5), (None, 3600), ("soon", 3600), (0, 1), (-5, 1), (1e30, 43200)],
)
def test_the_life_of_a_token_is_taken_with_care(life, seconds):
    assert (
        proxy.read_token(json.dumps({"access_token": "t", "expires_in": life})).seconds == seconds
    )


@pytest.mark.parametrize("value", ["", "a\r\nX: y", "caf\u00e9", "two words", 5, None, "x" * 20000])
def test_a_token_that_fits_into_no_header_is_none(value):
    with pytest.raises(ProxyError, match="none that can be used"):
        proxy.read_token(json.dumps({"access_token": value}))


# ======================================================================================
# 14. Backends
# ======================================================================================

PLACE = "projects/my-project/locations/europe-west4/"
GOOGLE = PLACE + "publishers/google/models/"
VERTEX = proxy.VERTEX._replace(
    project="my-project", location="europe-west4", credential=credential_of(SERVICE_FILE)
)


def wire(path, body, backend=VERTEX, **fields):
    """What becomes of a call: [(path, body)]."""
    calls = proxy.vertex_calls(proxy.GeminiCall(path, body, **fields), backend)
    return [(call.path, call.body) for call in calls]


@pytest.mark.parametrize(
    "name, path",
    [
        (FLASH, GOOGLE + FLASH),
        (f"google/{FLASH}", GOOGLE + FLASH),
        (f"publishers/google/models/{FLASH}", GOOGLE + FLASH),
        (f"{FLASH}@001", f"{GOOGLE}{FLASH}@001"),
        ("gemini-flash-latest", GOOGLE + NEWEST),
        ("endpoints/4711", PLACE + "endpoints/4711"),
        (
            "projects/a.b:c/locations/us/endpoints/4711",
            "projects/a.b:c/locations/us/endpoints/4711",
        ),
    ],
)
def test_a_models_name_has_its_place_on_vertex(name, path):
    model = proxy.model_named(name, NO_CONTEXT)
    ((sent, _),) = wire(f"{model.path}:generateContent", {})
    assert sent == f"{path}:generateContent"


@pytest.mark.parametrize(
    "name",
    ["projects/p/locations/../endpoints/1", "endpoints/", "endpoints/a/b", f"{FLASH}@", "@x"],
)
def test_a_name_that_would_leave_its_place_is_no_model(name):
    with pytest.raises(ProxyError, match="does not exist"):
        proxy.model_named(name, NO_CONTEXT)


def test_with_a_key_for_vertex_there_is_no_project_in_the_path():
    ((path, _),) = wire(f"models/{FLASH}:generateContent", {}, proxy.VERTEX)
    assert path == f"publishers/google/models/{FLASH}:generateContent"


def test_what_vertex_says_otherwise_is_said_so():
    body = {
        "contents": [],
        "cachedContent": "cachedContents/c",
        "toolConfig": {"includeServerSideToolInvocations": True},
        "serviceTier": "flex",
    }
    (call,) = proxy.vertex_calls(proxy.GeminiCall("models/m:generateContent", body), VERTEX)
    assert call.body == {"contents": [], "cachedContent": PLACE + "cachedContents/c"}
    assert call.headers == (("X-Vertex-AI-LLM-Shared-Request-Type", "flex"),)
    assert body["serviceTier"] == "flex"


def test_each_file_has_a_type_on_vertex():
    uris = [{"fileUri": "https://h/a"}, {"fileUri": "gs://b/c.pdf", "mimeType": "application/pdf"}]
    contents = [u("Look"), {"role": "user", "parts": [{"fileData": uri} for uri in uris]}]
    ((_, body),) = wire("models/m:generateContent", {"contents": contents})
    typed = [{"mimeType": "image/jpeg", **uris[0]}, uris[1]]
    assert [part["fileData"] for part in body["contents"][1]["parts"]] == typed
    assert contents[1]["parts"][0]["fileData"] == uris[0]


def test_tools_that_vertex_does_not_have_are_left_out_and_named():
    tools = [{"functionDeclarations": []}, {"mcpServers": []}, {"fileSearch": {}}]
    call = proxy.GeminiCall("models/m:generateContent", {"contents": [], "tools": tools})
    (sent,) = proxy.vertex_calls(call, VERTEX)
    assert sent.body == {"contents": [], "tools": tools[:1]}
    assert sent.left_out == ("tools.fileSearch", "tools.mcpServers")
    assert len(call.body["tools"]) == 3


def test_tokens_are_counted_of_a_plain_request():
    counted = {"contents": [user("Hi")], "tools": []}
    more = {"toolConfig": {}, "serviceTier": "flex", "cachedContent": "cachedContents/c"}
    body = {"generateContentRequest": {"model": "models/m", **counted, **more}}
    assert wire("models/m:countTokens", body) == [(GOOGLE + "m:countTokens", counted)]
    assert wire("models/m:countTokens", counted, optional=True) == []


def embed_body(*texts, **more):
    content = [
        {"model": "models/m", "content": {"parts": [{"text": text}]}, **more} for text in texts
    ]
    return {"requests": content}


def test_older_models_for_vectors_are_asked_to_predict():
    body = embed_body("a", "b", outputDimensionality=4, taskType="CLUSTERING")
    instances = [{"content": text, "task_type": "CLUSTERING"} for text in "ab"]
    parameters = {"outputDimensionality": 4}
    assert wire("models/text-embedding-005:batchEmbedContents", body) == [
        (
            GOOGLE + "text-embedding-005:predict",
            {"instances": instances, "parameters": parameters},
        )
    ]


def test_no_call_has_more_text_for_vectors_than_vertex_takes():
    calls = wire("models/text-embedding-005:batchEmbedContents", embed_body(*["x" * 9000] * 5))
    assert [len(body["instances"]) for _, body in calls] == [2, 2, 1]


def test_newer_models_for_vectors_get_their_options_apart():
    body = embed_body("a", "b", outputDimensionality=4)
    one = {"embedContentConfig": {"outputDimensionality": 4}}
    requests = [{"content": {"parts": [{"text": text}]}, **one} for text in "ab"]
    path = "models/gemini-embedding-2:batchEmbedContents"
    (call,) = proxy.vertex_calls(proxy.GeminiCall(path, body), VERTEX)
    assert (call.path, call.body) == (GOOGLE + path[7:], {"requests": requests})
    assert [single.body for single in call.instead] == requests
    (predict,) = call.instead[1].instead
    instance, parameters = {"content": "b"}, {"outputDimensionality": 4}
    assert predict.body == {"instances": [instance], "parameters": parameters}
    assert wire(path, embed_body("a")) == [
        (GOOGLE + "gemini-embedding-2:embedContent", {"content": {"parts": [{"text": "a"}]}})
    ]


@pytest.mark.parametrize(
    "chunks",
    [
        [
            {
                "predictions": [
                    {"embeddings": {"values": [n], "statistics": {"token_count": 3}}}
                    for n in (1, 2)
                ]
            }
        ],
        [{"embedding": {"values": [n]}, "usageMetadata": {"promptTokenCount": 3}} for n in (1, 2)],
        [
            {
                "embeddings": [{"values": [1]}, {"values": [2]}],
                "usageMetadata": {"promptTokenCount": 6},
            }
        ],
    ],
)
def test_vectors_come_in_one_form_whatever_was_asked(chunks):
    call = proxy.GeminiCall("models/m:batchEmbedContents")
    assert list(proxy.vertex_chunks(call, iter(chunks))) == [
        {
            "embeddings": [{"values": [1]}, {"values": [2]}],
            "usageMetadata": {"promptTokenCount": 6},
        }
    ]


def test_of_what_vertex_lists_gemini_is_left_and_what_is_known_is_added():
    names = ("gemini-9.9-flash", "bert", "gemini-old", "text-embedding-006", "gemini-x")
    entries = [{"name": f"publishers/google/models/{name}"} for name in names]
    entries[2]["launchStage"] = "DEPRECATED"
    entries[4]["supportedActions"] = {"deploy": {}}
    models = {entry["name"]: entry for entry in proxy.vertex_models([*entries, *entries])}
    assert set(models) == {f"models/{name}" for name in (names[0], names[3], *proxy.VERTEX_MODELS)}
    assert models["models/gemini-9.9-flash"]["supportedGenerationMethods"][0] == "generateContent"
    assert models["models/text-embedding-006"]["supportedGenerationMethods"][0] == "embedContent"
    assert models["models/gemini-embedding-2"]["inputTokenLimit"] == 8192


@pytest.mark.parametrize(
    "message, advice",
    [
        ("Vertex AI API has not been used in project 1", "gcloud services enable aiplatform"),
        ("Permission 'aiplatform.endpoints.predict' denied", f"--member=serviceAccount:{EMAIL}"),
        ("Request had insufficient authentication scopes.", "cloud-platform"),
        ("API keys are not supported by this API.", "unset GOOGLE_API_KEY"),
        (f"Publisher Model `{GOOGLE}x` not found.", "-vertex=my-project/global"),
    ],
)
def test_a_refusal_of_vertex_says_what_helps(message, advice):
    error = proxy.vertex_refusal(ProxyError(403, message, upstream=True), VERTEX)
    assert error.message.startswith(message)
    assert advice in error.message


def test_no_other_location_is_advised_where_all_models_are():
    message = "Publisher Model `projects/p/locations/global/publishers/google/models/x` not found."
    error = proxy.vertex_refusal(ProxyError(404, message, upstream=True), VERTEX)
    assert error.message == message


def test_a_shortage_of_vertex_is_worth_another_try():
    error = ProxyError(429, "Resource exhausted.", code="rate_limit_exceeded", upstream=True)
    assert proxy.vertex_refusal(error, VERTEX).retry_after == 0.0


def passed_on_vertex(method, path, body=None, query=""):
    plan, _ = passed_plan(method, path, query, body)
    return plan.calls[0], proxy.vertex_calls(plan.calls[0], VERTEX)


def test_geminis_own_api_passes_to_vertexs_paths():
    body = b'{"contents":  []}'
    path = f"/v1/models/{FLASH}:streamGenerateContent"
    _, (call,) = passed_on_vertex("POST", path, body, "alt=sse")
    assert call.path == f"{GOOGLE}{FLASH}:streamGenerateContent?alt=sse"
    assert (call.passed.root, call.passed.body) == ("v1beta1", body)


@pytest.mark.parametrize("path", ["/v1beta/files", "/v1beta/models:x", "/v1beta/cachedContents/c"])
def test_what_vertex_does_not_have_of_geminis_own_api_is_a_404(path):
    with pytest.raises(ProxyError, match="not served where Vertex AI") as caught:
        passed_on_vertex("POST" if ":" in path else "GET", path, b"{}")
    assert caught.value.status == 404


def test_vectors_of_geminis_own_api_are_translated_both_ways():
    body = json.dumps(embed_body("a")["requests"][0]).encode()
    path = "/v1beta/models/gemini-embedding-001:embedContent"
    passed, (call,) = passed_on_vertex("POST", path, body)
    assert call.body == {"content": {"parts": [{"text": "a"}]}}
    answer = {"embedding": {"values": [1.0]}, "usageMetadata": {"promptTokenCount": 3}}
    head, data = proxy.vertex_chunks(passed, iter([answer]))
    assert head == proxy.AnswerHead(200, {"content-type": "application/json; charset=UTF-8"})
    assert json.loads(data) == {
        "embedding": {"values": [1.0]},
        "usageMetadata": {"promptTokenCount": 3},
    }


@pytest.mark.parametrize(
    "method, body, place",
    [
        ("embedContent", {}, "content"),
        ("embedContent", {"content": {"parts": ["a"]}}, "content.parts[0]"),
        ("batchEmbedContents", {"requests": [{"content": 5}]}, "requests[0].content"),
        ("countTokens", {"generateContentRequest": []}, "generateContentRequest"),
        ("countTokens", {"tools": [5]}, "tools[0]"),
    ],
)
def test_a_wrong_request_of_geminis_own_api_is_a_400_that_names_the_place(method, body, place):
    with pytest.raises(ProxyError) as caught:
        passed_on_vertex("POST", f"/v1beta/models/m:{method}", json.dumps(body).encode())
    assert (caught.value.status, caught.value.path) == (400, place)


def test_models_of_geminis_own_api_are_in_its_form():
    listed, calls = passed_on_vertex("GET", "/v1beta/models")
    assert calls == (proxy.MODELS_CALL,)
    entries = [{"name": f"models/{FLASH}"}]
    _, data = proxy.vertex_chunks(listed, iter([{"models": entries}]))
    assert json.loads(data) == {"models": entries}
    single, _ = passed_on_vertex("GET", f"/v1beta/models/{FLASH}")
    assert (
        json.loads(list(proxy.vertex_chunks(single, iter([{"models": entries}])))[1]) == entries[0]
    )
    with pytest.raises(ProxyError, match="not listed"):
        list(proxy.vertex_chunks(single, iter([{"models": []}])))


# ======================================================================================
# 15. Client
# ======================================================================================


@pytest.fixture
def gemini():
    with StandIn() as stand_in:
        yield stand_in
        assert not stand_in.refused, stand_in.refused


PLAIN = proxy.generate_call(proxy.model_of(FLASH), False, [], [u("Hi")], {})
STREAM = proxy.generate_call(proxy.model_of(FLASH), True, [], [u("Hi")], {})


class Service:
    """The client side of the Gemini at a URL, and a client that its answers are for."""

    def __init__(self, url):
        self.gemini = proxy.Gemini(proxy.Backend(url=url))
        self.pool = self.gemini.pool
        self.client, self.far_end = socket.socketpair()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.gemini.close()
        self.client.close()
        self.far_end.close()

    def leave(self):
        self.far_end.close()

    def chunks(self, call, timeout=5.0, keep_alive=None):
        """The chunks that Gemini answers to one call."""
        waiter = proxy.Waiter(self.client, timeout, keep_alive=keep_alive)
        (chunks,) = self.ask((call,), waiter)
        return chunks

    def ask(self, calls, waiter=None, ignored=None):
        """For each call the list of its chunks."""
        waiter = waiter or proxy.Waiter(self.client, 5)
        if ignored is None:
            ignored = []
        answers = self.gemini.ask(calls, waiter, "the-key", ignored)
        with contextlib.closing(answers):
            for chunks in answers:
                yield list(chunks)

    def error(self, call=PLAIN, **how):
        """The error with which one call fails."""
        with pytest.raises(ProxyError) as caught:
            self.chunks(call, **how)
        return caught.value

    def leave_during(self, call):
        """Leave while Gemini is silent: the seconds until that was noticed."""
        leaving = threading.Timer(0.1, self.leave)
        leaving.start()
        began = time.monotonic()
        with pytest.raises(proxy.ClientGoneError):
            self.chunks(call)
        leaving.join()
        return time.monotonic() - began


class FailsAfter(urllib.request.BaseHandler):
    """A step of the opener's that lets so many requests pass."""

    def __init__(self, count):
        self.left = count

    def http_request(self, request):
        self.left -= 1
        if self.left < 0:
            raise OSError("no more of them")
        return request


@pytest.fixture
def service(gemini):
    with Service(gemini.url) as service:
        yield service


# ---- waiting ----


def test_a_long_silence_is_a_504_and_hangs_up(gemini, service):
    gemini.say(Say(whole("late"), delay=30))
    assert service.error(timeout=0.1).status == 504
    assert gemini.gone.wait(5)


def test_a_silent_stream_gets_keep_alives(gemini, service, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    ticks = []
    gemini.say(Say(chunk("a"), whole("b"), delay=0.3, gap=0.3))
    chunks = service.chunks(STREAM, keep_alive=lambda: ticks.append(1))
    assert chunks == [chunk("a"), whole("b")]
    assert len(ticks) >= 4


def test_a_stream_whose_gemini_only_comments_gets_keep_alives(gemini, service, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    ticks = []
    gemini.say(Say(*[b": still here\r\n\r\n"] * 12, whole("b"), gap=0.02))
    assert service.chunks(STREAM, keep_alive=lambda: ticks.append(1)) == [whole("b")]
    assert len(ticks) >= 2


def test_interim_answers_count_as_silence():
    with raw_upstream(b"HTTP/1.1 102 Processing\r\n\r\n") as url, Service(url) as service:
        assert service.error(timeout=0.2).status == 504


@contextlib.contextmanager
def raw_upstream(data):
    """The URL of a server that sends the same bytes again and again."""

    def serve(listener):
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            with sock:
                while True:
                    sock.sendall(data)
                    time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.join(5)


def test_a_whole_answer_is_bounded(gemini, service, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ANSWER_BYTES", 1000)
    gemini.say(whole("x" * 1000))
    assert service.error().status == 502


@pytest.mark.parametrize("how", [{"delay": 30}, {"gap": 30}])
def test_a_client_that_leaves_stops_gemini(gemini, service, how):
    gemini.say(Say(chunk("Once "), whole("upon"), **how))
    service.leave_during(STREAM)
    assert gemini.gone.wait(5)


def test_a_client_that_sends_its_next_request_early_has_not_left(gemini, service):
    gemini.say(Say(whole("Hello"), delay=0.2))
    service.far_end.sendall(b"GET / HTTP/1.1\r\n")
    assert service.chunks(PLAIN) == [whole("Hello")]


def test_the_end_of_the_server_ends_the_waiting():
    end, other_end = socket.socketpair()
    other_end.close()
    with end, pytest.raises(ProxyError) as caught:
        proxy.Waiter(None, 5, stopping=end).wait(None)
    assert caught.value.status == 503


def test_a_pause_ends_after_its_seconds():
    assert 0.05 <= proxy.Waiter(None, 5).wait(None, seconds=0.05) < 5


# ---- connections ----


def test_connections_are_used_again(gemini, service):
    for call in (PLAIN, STREAM) * 5:
        assert "Hello" in json.dumps(service.chunks(call))
    assert len(gemini.bodies) == 10
    assert gemini.opened == 1


def test_a_stale_connection_is_replaced(gemini, service):
    service.chunks(PLAIN)
    gemini.say(Say(cut=0), whole("At last."))
    assert service.chunks(PLAIN) == [whole("At last.")]
    assert gemini.opened == 2


def test_a_connection_that_was_idle_too_long_is_not_used(gemini, service, monkeypatch):
    service.chunks(PLAIN)
    monkeypatch.setattr(proxy, "IDLE_CONNECTION_SECONDS", 0)
    service.chunks(PLAIN)
    assert gemini.opened == 2


def test_connections_that_are_idle_too_long_are_closed(service, monkeypatch):
    service.chunks(PLAIN)
    service.pool.tidy()
    assert len(service.pool.idle) == 1
    monkeypatch.setattr(proxy, "IDLE_CONNECTION_SECONDS", -1)
    service.pool.tidy()
    assert not service.pool.idle


def test_the_request_is_what_gemini_wants_and_nothing_more(gemini, service):
    service.chunks(PLAIN)
    headers = {name.lower(): value for name, value in gemini.headers[0].items()}
    names = {"host", "content-type", "user-agent", "x-goog-api-key", "content-length"}
    assert set(headers) == names
    assert headers["x-goog-api-key"] == "the-key"
    assert gemini.paths == ["/v1beta/models/gemini-2.5-flash:generateContent"]


def resolve_to(monkeypatch, *hosts, port=1):
    """Have every name resolve to these addresses."""
    kinds = {True: socket.AF_INET6, False: socket.AF_INET}
    addresses = [
        (kinds[":" in host], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))
        for host in hosts
    ]
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lambda *_, **__: addresses)


def test_families_of_addresses_take_turns(monkeypatch):
    attempts = []
    resolve_to(monkeypatch, "fc00::1", "fc00::2", "fc00::3", "127.0.0.2")

    def refuse(address, waiter, seconds):
        attempts.append((address[-1][0], seconds > proxy.ADDRESS_SECONDS))
        raise TimeoutError

    monkeypatch.setattr(proxy, "reach", refuse)
    with pytest.raises(TimeoutError):
        proxy.dial("gemini", 1, proxy.Waiter(None, 1))
    assert attempts == [
        ("fc00::1", False),
        ("127.0.0.2", False),
        ("fc00::2", False),
        ("fc00::3", True),
    ]


def test_the_first_address_that_answers_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1", port=listener.getsockname()[1])
        with proxy.dial("gemini", 0, proxy.Waiter(None, 1)) as sock:
            assert sock.getpeername() == listener.getsockname()


def test_where_nobody_listens_is_a_502():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Service(f"http://127.0.0.1:{unused.getsockname()[1]}") as service:
            error = service.error()
    assert error.status == 502
    assert "refused" in error.message


@contextlib.contextmanager
def full_listener():
    """The port of a listener whose queue is full: a connection to it is never made (Linux)."""
    with socket.socket() as listener, contextlib.ExitStack() as guests:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            guest = guests.enter_context(socket.socket())
            guest.setblocking(False)
            guest.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def silent_listener():
    """The port of a listener that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


UNREACHABLE = pytest.mark.parametrize(
    "scheme, listener",
    [("http", full_listener), ("https", full_listener), ("https", silent_listener)],
)


@UNREACHABLE
def test_each_step_of_connecting_ends_in_time(scheme, listener, monkeypatch):
    monkeypatch.setattr(proxy, "CONNECT_SECONDS", 0.1)
    with listener() as port, Service(f"{scheme}://127.0.0.1:{port}") as service:
        assert service.error().status == 504


@UNREACHABLE
def test_each_step_of_connecting_has_keep_alives(scheme, listener, monkeypatch):
    monkeypatch.setattr(proxy, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.02)
    ticks = []
    with listener() as port, Service(f"{scheme}://127.0.0.1:{port}") as service:
        service.error(STREAM, keep_alive=lambda: ticks.append(1))
    assert ticks


@UNREACHABLE
def test_each_step_of_connecting_notices_a_client_that_leaves(scheme, listener):
    with listener() as port, Service(f"{scheme}://127.0.0.1:{port}") as service:
        assert service.leave_during(PLAIN) < proxy.CONNECT_SECONDS
        assert not service.pool.idle


@contextlib.contextmanager
def silent_proxy(monkeypatch):
    """A service behind an HTTP proxy that never answers."""
    with silent_listener() as port:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
        with Service("https://gemini.example") as service:
            yield service


def test_a_silent_proxy_is_a_504(monkeypatch):
    monkeypatch.setattr(proxy, "CONNECT_SECONDS", 0.1)
    with silent_proxy(monkeypatch) as service:
        assert service.error().status == 504


def test_a_client_that_leaves_is_noticed_while_a_proxy_is_silent(monkeypatch):
    with silent_proxy(monkeypatch) as service:
        assert service.leave_during(PLAIN) < proxy.CONNECT_SECONDS


@pytest.mark.parametrize(
    "env, expected",
    [
        ({"https_proxy": "http://proxy.example:3128"}, ("proxy.example", 3128, {})),
        ({"HTTPS_PROXY": "proxy.example:3128"}, ("proxy.example", 3128, {})),
        (
            {"https_proxy": "http://a%40b:c@proxy.example"},
            (
                "proxy.example",
                80,
                {"Proxy-Authorization": "Basic " + base64.b64encode(b"a@b:c").decode()},
            ),
        ),
        ({"https_proxy": "http://p:1", "no_proxy": "example.com,gemini.example"}, None),
        ({"http_proxy": "http://p:1"}, None),
        ({}, None),
    ],
)
def test_the_environment_names_the_proxy(monkeypatch, env, expected):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert proxy.proxy_for("https", "gemini.example") == expected


# ---- responses ----


@contextlib.contextmanager
def response_of(*pieces, ends=True):
    """The Response that reads these bytes; the connection ends after them, or stays open."""
    near, far = socket.socketpair()
    near.setblocking(False)
    response = proxy.Response(proxy.UpstreamSocket(near, proxy.Waiter(None, 5)))
    far.sendall(b"".join(pieces))
    if ends:
        far.close()
    yield response
    response.connection.close()
    far.close()


OK = b"HTTP/1.1 200 OK\r\n"
LENGTH_5 = OK + b"Content-Length: 5\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "wire, body, persistent",
    [
        (LENGTH_5 + b"Hello", b"Hello", True),
        (OK + b"Content-Length: 0\r\n\r\n", b"", True),
        (CHUNKED + b"2\r\nHe\r\n3;a=b\r\nllo\r\n0\r\n\r\n", b"Hello", True),
        (CHUNKED + b"0005 \r\nHello\r\n0\r\nx-trailer: 1\r\n\r\n", b"Hello", True),
        (CHUNKED + b"5\r\nHello\r\n0\r\n", b"Hello", False),
        (OK + b"\r\nHello", b"Hello", False),
        (OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nHello", b"Hello", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nHello", b"Hello", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH_5 + b"Hello", b"Hello", True),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 2 + LENGTH_5 + b"Hello", b"Hello", True),
    ],
)
def test_a_body_is_read_to_its_end(wire, body, persistent):
    with response_of(wire) as response:
        response.read_head()
        assert response.read() == body
        assert response.complete
        assert response.persistent is persistent


@pytest.mark.parametrize(
    "wire, partial",
    [
        (LENGTH_5, b""),
        (LENGTH_5 + b"Hell", b"Hell"),
        (CHUNKED, b""),
        (CHUNKED + b"5\r\nHell", b"Hell"),
        (CHUNKED + b"2\r\nHe\r\n", b"He"),
        (CHUNKED + b"2\r\nHello\r\n0\r\n\r\n", b"He"),
        (CHUNKED + b"2\r\nHe\r\n-3\r\nllo\r\n0\r\n\r\n", b"He"),
        (CHUNKED + b"zz\r\n", b""),
    ],
)
def test_a_body_that_is_cut_off_is_an_incomplete_read(wire, partial):
    with response_of(wire) as response:
        response.read_head()
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
    assert caught.value.partial == partial
    assert not response.complete


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        OK + b"no header\r\n\r\n",
        OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nHello",
        OK + b"content-length: five\r\n\r\nHello",
        OK + b"content-length: -5\r\n\r\nHello",
        OK + b"content-length: +5\r\n\r\nHello",
        OK + b"x: " + b"y" * (64 << 10) + b"\r\n\r\n",
        OK + b"x: y\r\n",
    ],
    ids=short_id,
)
def test_a_head_that_breaks_the_rules_is_an_error(wire):
    with response_of(wire) as response, pytest.raises(http.client.HTTPException):
        response.read_head()


def test_read1_gives_what_has_come():
    with response_of(CHUNKED, b"2\r\nHe\r\n3\r\nllo\r\n0\r\n\r\n") as response:
        response.read_head()
        blocks = iter(lambda: response.read1(100), b"")
        assert list(blocks) == [b"He", b"llo"]
        assert response.complete


def test_read_takes_no_more_than_its_limit():
    with response_of(CHUNKED, b"5\r\nHello\r\n0\r\n\r\n") as response:
        response.read_head()
        assert response.read(4) == b"Hell"
        assert not response.complete
        assert response.read() == b"o"


def test_a_body_is_not_waited_for_beyond_its_end():
    with response_of(LENGTH_5, b"Hello", ends=False) as response:
        response.read_head()
        assert response.read() == b"Hello"


# ---- calls ----


@pytest.mark.parametrize(
    "answer, attempts",
    [
        (gemini_error(503, "overloaded", "UNAVAILABLE"), 3),
        (gemini_error(400, "bad"), 1),
        (gemini_error(403, "no"), 1),
        (Say(status=302, raw=b"", headers=[("Location", "/x")]), 1),
        (gemini_error(429, "slow", "RESOURCE_EXHAUSTED", detail("RetryInfo", retryDelay="30s")), 1),
        (gemini_error(429, "slow", "X", detail("RetryInfo", retryDelay="0.01s")), 3),
        (gemini_error(429, "limit: 0", "X", detail("RetryInfo", retryDelay="0.01s")), 1),
        (Say(raw=b"<html>"), 1),
    ],
)
def test_only_what_may_go_well_is_tried_again(gemini, service, monkeypatch, answer, attempts):
    monkeypatch.setattr(proxy.random, "uniform", lambda low, high: 0.01)
    gemini.say(*[answer] * 9)
    error = service.error()
    assert len(gemini.bodies) == attempts
    assert error.status == (answer.status if answer.raw is None else 502)


def cut_off(*parts, token="dG9r", usage=None):
    """The last chunk of a call whose answer another call goes on with."""
    return chunk(*parts, finish="CONTINUATION", continuationToken=token, usage=usage)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_to_be_continued_is(gemini, service, stream):
    call = proxy.generate_call(proxy.model_of(NEWEST), stream, [], [u("Hi")], {})
    gemini.say(cut_off("One "), cut_off("two ", token="dG9s"), whole("three."))
    chunks = service.chunks(call)
    assert [one["candidates"][0]["content"]["parts"][0]["text"] for one in chunks] == [
        "One ",
        "two ",
        "three.",
    ]
    tokens = [body.pop("continuationToken", None) for body in gemini.bodies]
    assert tokens == [None, "dG9r", "dG9s"]
    assert gemini.bodies == [call.body] * 3
    assert gemini.opened == 1


@pytest.mark.parametrize(
    "answers, calls",
    [
        ([cut_off("One", token="")], 1),
        ([cut_off("One"), cut_off("Two")], 2),
        ([cut_off(str(i), token=str(i)) for i in range(99)], proxy.MAX_CALLS_OF_ANSWER),
    ],
    ids=["no token", "the same token", "no end"],
)
def test_an_answer_that_does_not_get_on_is_not_continued_for_ever(gemini, service, answers, calls):
    gemini.say(*answers)
    assert len(service.chunks(PLAIN)) == len(gemini.bodies) == calls


def test_an_answer_that_cannot_be_continued_ends_with_the_error(gemini, server):
    gemini.say(cut_off("One "), gemini_error(400, "no more"))
    wire = post(server, body=chat(stream=True))[2].decode()
    assert "One " in wire
    assert "no more" in wire
    assert "[DONE]" not in wire


def test_a_continued_answer_is_one_answer_to_the_client(gemini, server):
    first, second = ({"promptTokenCount": 9, "candidatesTokenCount": n} for n in (5, 2))
    gemini.say(cut_off("One ", usage=first), whole("two.", usage=second))
    answer = post_json(server, body=chat())
    assert answer["choices"][0]["message"]["content"] == "One two."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (9, 7)


def test_a_short_overload_is_not_noticed(gemini, service):
    gemini.say(
        gemini_error(503, "overloaded"),
        gemini_error(429, "slow", "X", detail("RetryInfo", retryDelay="0.1s")),
        whole("Fine."),
    )
    assert service.chunks(PLAIN) == [whole("Fine.")]


def test_a_call_is_not_tried_again_after_a_long_time(gemini, service, monkeypatch):
    """A Gemini that says 503 only after a long time would take as long again."""
    monkeypatch.setattr(proxy, "RETRY_WINDOW_SECONDS", 0.05)
    overloaded = gemini_error(503, "overloaded", "UNAVAILABLE")
    overloaded.delay = 0.2
    gemini.say(overloaded, whole("Hello"))
    assert service.error().status == 503
    assert len(gemini.bodies) == 1


def test_a_repaired_call_is_sent_however_long_the_refusal_took(gemini, service, monkeypatch):
    """A refusal costs nothing, and a large body may be long on its way."""
    monkeypatch.setattr(proxy, "RETRY_WINDOW_SECONDS", 0.05)
    refused = gemini_error(400, "Thinking level LOW is not supported for this model.")
    refused.delay = 0.2
    gemini.say(refused, whole("Fine."))
    settings = {"thinkingConfig": {"thinkingLevel": "LOW"}}
    call = proxy.generate_call(proxy.model_of(NEWEST), False, [], [u("Hi")], settings)
    assert service.chunks(call) == [whole("Fine.")]


def test_a_setting_that_is_refused_is_left_out_and_named(gemini, service):
    gemini.say(
        gemini_error(400, "Thinking level LOW is not supported for this model."), whole("Fine.")
    )
    settings = {"thinkingConfig": {"thinkingLevel": "LOW"}}
    call = proxy.generate_call(proxy.model_of(NEWEST), False, [], [u("Hi")], settings)
    ignored = []
    assert list(service.ask((call,), ignored=ignored)) == [[whole("Fine.")]]
    assert ignored == ["thinkingConfig"]
    assert "thinkingConfig" not in gemini.bodies[1]["generationConfig"]


def test_after_the_first_byte_nothing_is_sent_again(gemini, service):
    gemini.say(Say(chunk("Once "), chunk("upon"), cut=1), whole("again"))
    assert service.error(STREAM).message == "Connection lost: Gemini's answer broke off."
    assert len(gemini.bodies) == 1


def test_a_connection_that_breaks_late_is_not_tried_again(gemini, service, monkeypatch):
    """Gemini may have been at work on it, and would be paid twice."""
    monkeypatch.setattr(proxy, "BROKEN_RETRY_SECONDS", 0.05)
    gemini.say(Say(whole("late"), delay=0.2, cut=0), whole("Hello"))
    assert service.error().status == 502
    assert len(gemini.bodies) == 1


def test_a_refusal_that_is_cut_off_keeps_its_status(gemini, service):
    headers = [("Transfer-Encoding", "chunked"), ("Connection", "close")]
    gemini.say(Say(status=403, raw=b"99\r\n{", headers=headers))
    assert service.error().status == 403


def test_calls_of_one_request_are_answered_in_order(gemini, service):
    calls = [
        proxy.generate_call(proxy.model_of(FLASH), False, [], [u(f"number {i}")], {})
        for i in range(proxy.MAX_PARALLEL_CALLS + 3)
    ]
    texts = [json.dumps(chunks) for chunks in service.ask(calls)]
    assert len(texts) == len(calls)
    assert all(f"number {i}" in text for i, text in enumerate(texts))


def test_a_call_that_waits_is_sent_when_the_answers_before_it_are_read(gemini, service):
    model = proxy.model_of(FLASH)
    generating = proxy.generate_call(model, False, [], [u("Hi")], {})
    counting = proxy.count_plan(proxy.Plan((generating,))).calls[0]
    calls = [counting, generating._replace(waits=True), generating]
    answers = service.ask(calls)
    assert next(answers) == [{"totalTokens": 7}]
    assert gemini.bodies == []
    assert len(list(answers)) == 2
    assert len(gemini.bodies) == 2


def test_a_call_that_cannot_be_sent_fails_in_its_turn(gemini, service, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ATTEMPTS", 1)
    gemini.say(whole("Hello"))
    service.gemini.opener.add_handler(FailsAfter(1))
    answers = service.ask((PLAIN, PLAIN))
    assert next(answers) == [whole("Hello")]
    with pytest.raises(ProxyError, match="no more"):
        next(answers)


def test_the_key_is_masked_where_gemini_quotes_it(gemini, service):
    gemini.say(gemini_error(403, "Consumer the-key is suspended"))
    assert service.error().message == "Consumer [masked] is suspended"


def test_the_list_of_models_is_asked_for_once(gemini, service):
    assert service.chunks(proxy.MODELS_CALL) == [{"models": MODELS}]
    gemini.shutdown()
    assert service.chunks(proxy.MODELS_CALL) == [{"models": MODELS}]


def test_an_old_list_of_models_is_better_than_none(gemini, service):
    service.chunks(proxy.MODELS_CALL)
    since, models = service.gemini.models["the-key"]
    service.gemini.models["the-key"] = since - 1e6, models
    gemini.shutdown()
    gemini.server_close()
    service.gemini.close()
    assert service.chunks(proxy.MODELS_CALL, timeout=0.1) == [{"models": MODELS}]


# ---- access ----

VERTEX_GENERATE = {
    **{key: shape for key, shape in GENERATE.items() if key != "serviceTier"},
    "toolConfig": {"functionCallingConfig": {"mode": ANY, "allowedFunctionNames": ANY}},
}
VERTEX_SHAPES = {
    "generateContent": VERTEX_GENERATE,
    "streamGenerateContent": VERTEX_GENERATE,
    "countTokens": {key: GENERATE[key] for key in ("contents", "systemInstruction", "tools")},
    "predict": {"instances": [{"content": ANY}], "parameters": {"outputDimensionality": ANY}},
    "embedContent": {"content": CONTENT, "embedContentConfig": {"outputDimensionality": ANY}},
}
VECTOR = {"values": [0.6, 0.8]}


class Google(StandIn):
    """A stand-in for Vertex AI, and for what gives tokens for it."""

    def __init__(self):
        super().__init__()
        self.RequestHandlerClass = GoogleHandler
        self.tokens = []  # so far; the last one is good
        self.life, self.delay = 3600, 0.0  # of a token; before it is given
        self.trouble = None  # the Say that is given in place of a token
        self.listing = Say({"publisherModels": [{"name": f"publishers/google/models/{NEWEST}"}]})
        self.unauthorized = 0  # requests without a good token
        self.vector_refusals = []  # what embedContent says before it gives vectors

    def give_token(self):
        time.sleep(self.delay)
        self.tokens.append(f"ya29.secret-{len(self.tokens)}")
        if self.trouble:
            return self.trouble
        return Say({"access_token": self.tokens[-1], "expires_in": self.life})


class GoogleHandler(StandInHandler):
    def do_GET(self):
        if "/computeMetadata/v1/" not in self.path:
            self.send_whole(self.refusal(None) or self.server.listing)
        elif self.headers["Metadata-Flavor"] != "Google":
            self.send_whole(Say(status=403))
        elif self.path.endswith("/token"):
            self.send_whole(self.server.give_token())
        else:
            page = self.path.rpartition("/")[2]
            self.send_whole(Say(raw={"email": EMAIL, "project-id": "my-project"}[page].encode()))

    def do_POST(self):
        if self.path != "/token":
            super().do_POST()
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_whole(self.server.give_token())

    def refusal(self, body):
        google = self.server
        if self.headers["Authorization"] != f"Bearer {(google.tokens or [None])[-1]}":
            google.unauthorized += 1
            message = f"Request had invalid credentials: {self.headers['Authorization']}"
            return gemini_error(401, message, "UNAUTHENTICATED")
        method = model_and_verb(self.path)[1]
        if body is None:
            return None
        if method not in VERTEX_SHAPES:
            return gemini_error(404, "Method not found.", "NOT_FOUND")
        message = unknown_field(body, VERTEX_SHAPES[method])
        if message:
            google.refused.append(message)
            return gemini_error(400, message)
        if method == "predict":
            return Say({"predictions": [{"embeddings": VECTOR} for _ in body["instances"]]})
        if method == "embedContent":
            return (google.vector_refusals or [Say({"embedding": VECTOR})]).pop()
        return None


@pytest.fixture
def google():
    with Google() as google:
        yield google
        assert not google.refused, google.refused


def vertex_at(google, **fields):
    """Vertex AI with a user's file whose tokens come from this stand-in."""
    credential = credential_of({**USER_FILE, "token_uri": google.url + "/token", **fields})
    return VERTEX._replace(url=google.url, credential=credential)


@pytest.fixture
def on_vertex(google):
    """The client side of Vertex AI."""
    with Service(google.url) as service:
        service.gemini.close()
        service.gemini = proxy.Gemini(vertex_at(google))
        service.tokens = service.gemini.tokens
        yield service


def test_a_token_serves_all_calls_and_is_in_no_answer(google, on_vertex):
    for call in (PLAIN, STREAM, PLAIN):
        assert on_vertex.chunks(call)
    assert google.tokens == ["ya29.secret-0"]
    assert google.paths[0] == f"/v1beta1/{GOOGLE}{FLASH}:generateContent"
    assert google.headers[0]["Authorization"] == "Bearer ya29.secret-0"
    assert "X-goog-api-key" not in google.headers[0]


def test_the_quota_project_is_named(google):
    backend = vertex_at(google, quota_project_id="q-project")
    with Service(google.url) as service:
        service.gemini.close()
        service.gemini = proxy.Gemini(backend)
        service.chunks(PLAIN)
    assert google.headers[0]["X-goog-user-project"] == "q-project"


def at_once(count, action):
    """The results of an action in so many threads."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: action(), range(count)))


def test_calls_that_come_together_ask_for_one_token(google, on_vertex):
    google.delay = 0.2
    gets = at_once(8, lambda: on_vertex.tokens.get(proxy.Waiter(None, 5)))
    assert {access.secret for access in gets} == {"ya29.secret-0"}
    assert len(google.tokens) == 1


def test_an_old_token_serves_while_it_is_renewed(google, on_vertex):
    waiter, tokens = proxy.Waiter(None, 5), on_vertex.tokens
    old = tokens.access = tokens.get(waiter)._replace(due=0.0)
    google.delay = 0.3
    began = time.monotonic()
    assert tokens.get(waiter) is tokens.get(waiter) is old
    assert time.monotonic() - began < 0.3
    until(lambda: tokens.get(waiter) is not old)
    assert len(google.tokens) == 2


@pytest.mark.parametrize("life, margin", [(3600, 225), (500, 225), (280, 140)])
def test_a_token_is_due_when_little_of_its_life_is_left(google, on_vertex, life, margin):
    google.life = life
    access = on_vertex.tokens.get(proxy.Waiter(None, 5))
    assert round(access.ends - access.due) == margin


def test_a_renewal_in_trouble_leaves_the_old_token_and_is_not_repeated_at_once(
    google, on_vertex, log_lines, monkeypatch
):
    monkeypatch.setattr(proxy, "TOKEN_PAUSE_SECONDS", 60)
    waiter, tokens = proxy.Waiter(None, 5), on_vertex.tokens
    old = tokens.access = tokens.get(waiter)._replace(due=0.0)
    google.trouble = Say(
        status=400, raw=b'{"error": "invalid_grant", "error_description": "Gone."}'
    )
    assert tokens.get(waiter) is old
    until(lambda: log_lines)
    assert tokens.get(waiter) is old
    tokens.access = old._replace(ends=0.0)
    for _ in range(3):
        with pytest.raises(ProxyError) as caught:
            on_vertex.tokens.get(waiter)
    assert caught.value.status == 502
    assert "invalid_grant: Gone. (gcloud auth application-default login)" in caught.value.message
    assert len(google.tokens) == 2
    assert log_lines == [caught.value.message + "\n"]


def test_a_token_that_is_refused_is_renewed_once_for_all_calls(google, on_vertex):
    on_vertex.chunks(PLAIN)
    google.tokens.append("revoked all others")
    access = on_vertex.tokens.get(proxy.Waiter(None, 5))
    assert on_vertex.chunks(PLAIN)
    assert (len(google.tokens), google.unauthorized) == (3, 1)
    assert on_vertex.tokens.drop(access)  # by a call that was sent with it before
    assert on_vertex.tokens.get(proxy.Waiter(None, 5)).secret == google.tokens[-1]


def test_a_token_that_is_refused_again_is_an_error_without_the_token(google, on_vertex):
    google.tokens.append("the only good one")
    google.give_token = lambda: Say({"access_token": "never-good", "expires_in": 3600})
    error = on_vertex.error()
    assert (error.status, google.unauthorized) == (401, 2)
    assert "never-good" not in error.message
    assert proxy.MASK in error.message


def test_a_client_that_leaves_waits_for_no_token(google, on_vertex):
    google.delay = 1.0
    assert on_vertex.leave_during(PLAIN) < 0.8
    assert not google.bodies


def test_an_office_that_says_nothing_is_an_error_in_time(google, on_vertex, monkeypatch):
    monkeypatch.setattr(proxy, "TOKEN_ANSWER_SECONDS", 0.1)
    google.delay = 1.0
    error = on_vertex.error()
    assert error.status == 502
    assert "does not answer in time" in error.message


def test_an_office_that_is_busy_is_asked_again_and_one_that_refuses_is_not(google):
    step = proxy.form_step(google.url + "/token", {"refresh_token": "the-refresh-token"})
    google.trouble = Say(status=503, raw=b"busy")
    with pytest.raises(ProxyError, match="says"):
        proxy.token_answer(step)
    assert len(google.tokens) == proxy.MAX_TOKEN_ATTEMPTS
    google.trouble = Say(status=400, raw=b'{"error": "bad: the-refresh-token"}')
    with pytest.raises(ProxyError) as caught:
        proxy.token_answer(step)
    assert len(google.tokens) == proxy.MAX_TOKEN_ATTEMPTS + 1
    assert caught.value.message.endswith("says: bad: [masked]")


def test_a_service_account_does_without_an_office_that_cannot_be_reached():
    fields = {"token_uri": "http://127.0.0.1:1/token"}
    token = proxy.fetch_token(credential_of({**SERVICE_FILE, **fields}))
    assert decoded_jwt(token.value)[1]["aud"] == "https://aiplatform.googleapis.com/"
    with pytest.raises(proxy.UnreachableError):
        proxy.fetch_token(credential_of({**USER_FILE, **fields}))


def test_a_redirect_of_the_office_is_not_followed(google):
    google.trouble = Say(status=302, raw=b"", headers=[("Location", google.url + "/elsewhere")])
    with pytest.raises(ProxyError, match="status 302"):
        proxy.token_answer(proxy.form_step(google.url + "/token", {}))
    assert len(google.tokens) == 1


def test_the_metadata_server_is_asked_without_a_proxy(google, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    page = proxy.SERVICE_ACCOUNT + "email"
    assert proxy.token_answer(proxy.metadata_step(google.url, page)) == EMAIL


def test_a_subject_token_is_read_from_its_file(tmp_path):
    (tmp_path / "subject").write_text("the-subject")
    assert proxy.token_answer(proxy.TokenStep(file=str(tmp_path / "subject"))) == "the-subject"
    with pytest.raises(ProxyError, match="nowhere"):
        proxy.token_answer(proxy.TokenStep(file=str(tmp_path / "nowhere")))


def python_command(code):
    join = subprocess.list2cmdline if WINDOWS else shlex.join
    return join([sys.executable, "-c", code])


@pytest.mark.skipif(not WINDOWS, reason="elsewhere a name is a file's whole name")
def test_a_token_command_may_be_a_cmd_file(tmp_path, monkeypatch):
    (tmp_path / "my gcloud.cmd").write_text("@echo the-token-of-%1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert proxy.command_output('"my gcloud" me').strip() == "the-token-of-me"


@pytest.mark.parametrize("output", ["the-token\n", '{"access_token": "the-token"}'])
def test_a_token_command_prints_a_token_or_json(output):
    command = python_command(f"print({output!r})")
    credential = proxy.Credential("token command", {"command": command}, "-token-command")
    assert proxy.fetch_token(credential) == proxy.Token("the-token", 3600.0)


@pytest.mark.parametrize(
    "code, message",
    [
        (
            "import sys; print('a\\nno login \\n', file=sys.stderr); sys.exit(7)",
            "status 7: no login",
        ),
        ("import time; time.sleep(60)", "has not ended"),
    ],
)
def test_a_token_command_that_fails_says_why(code, message, monkeypatch):
    monkeypatch.setattr(proxy, "COMMAND_SECONDS", 0.5)
    with pytest.raises(ProxyError, match=message):
        proxy.command_output(python_command(code))


def test_a_token_command_that_is_not_there_says_so():
    with pytest.raises(ProxyError, match="cannot be run"):
        proxy.command_output("/nonexistent/command")


def test_a_refresh_token_that_is_replaced_is_the_next_one_sent(google):
    tokens = proxy.Tokens(vertex_at(google).credential)
    google.trouble = Say({"access_token": "t", "refresh_token": "next"})
    tokens.get(proxy.Waiter(None, 5))
    assert tokens.credential.text("refresh_token") == "next"


def test_another_credential_takes_the_place_of_the_old_one_and_its_token(google, on_vertex):
    on_vertex.chunks(PLAIN)
    on_vertex.gemini.use(vertex_at(google, quota_project_id="q-project"))
    on_vertex.chunks(PLAIN)
    assert len(google.tokens) == 2
    assert google.headers[1]["X-goog-user-project"] == "q-project"


METHODS = ["batchEmbedContents", "embedContent", "embedContent"]
NO_METHOD = gemini_error(400, "Precondition check failed.", "FAILED_PRECONDITION")


@pytest.mark.parametrize(
    "refusals, methods",
    [([], METHODS), ([NO_METHOD], [*METHODS, "predict"])],
)
def test_vectors_are_asked_for_otherwise_where_there_is_no_such_method(
    google, on_vertex, refusals, methods
):
    google.vector_refusals = refusals
    calls = proxy.embed_calls(proxy.model_of("gemini-embedding-2"), ["a", "b"], None)
    ((answer,),) = on_vertex.ask(calls)
    assert answer["embeddings"] == [VECTOR] * 2
    assert sorted(path.rpartition(":")[2] for path in google.paths) == methods


def test_a_text_that_is_refused_is_not_sent_again(google, on_vertex):
    google.vector_refusals = [gemini_error(400, "The text is too long.")]
    (call,) = proxy.embed_calls(proxy.model_of("gemini-embedding-2"), ["a"], None)
    assert on_vertex.error(call).status == 400
    assert len(google.paths) == 1


@pytest.mark.parametrize("status", [None, 401, 403, 404])
def test_models_are_known_where_vertex_lists_none(google, on_vertex, status):
    if status:
        google.listing = gemini_error(status, "No.")
    names = [entry["name"] for entry in on_vertex.chunks(proxy.MODELS_CALL)[0]["models"]]
    assert len(names) == len(set(names)) == len(proxy.VERTEX_MODELS)
    assert f"models/{NEWEST}" in names


# ---- memory ----


@pytest.fixture
def memory():
    with contextlib.closing(proxy.Memory()) as memory:
        yield memory


def test_memory_is_empty_at_first(memory):
    assert memory.get("a", "x") is None
    assert memory.pinned("x") == []


def test_memory_finds_by_key_before_alias(memory):
    memory.put("a", "x", "1")
    memory.put("b", "x", "2")
    assert memory.get("a", "x") == "1"
    assert memory.get("b", "y") == "2"


def test_memory_finds_the_newest_under_an_alias(memory):
    memory.put("a", "x", "1")
    memory.put("b", "x", "2")
    assert memory.get(None, "x") == "2"
    assert memory.get("c", "x") == "2"
    assert memory.get("c", "y") is None


def test_memory_evicts_the_oldest_rows(memory, monkeypatch):
    monkeypatch.setattr(proxy.Memory, "MAX_ROWS", 10)
    monkeypatch.setattr(proxy.Memory, "PRUNE_ROWS", 1)
    for i in range(30):
        memory.put(f"k{i}", "z", str(i))
    assert memory.get("k19") is None
    assert memory.get("k20") == "20"


def test_memory_evicts_the_oldest_bytes(memory, monkeypatch):
    monkeypatch.setattr(proxy.Memory, "MAX_BYTES", 1000)
    monkeypatch.setattr(proxy.Memory, "PRUNE_BYTES", 1)
    for i in range(30):
        memory.put(f"k{i}", "z", "x" * 400)
    assert memory.get("k27") is None
    assert memory.get("k28")
    assert memory.get("k29")


def test_memory_does_not_evict_what_is_pinned(memory, monkeypatch):
    monkeypatch.setattr(proxy.Memory, "MAX_ROWS", 1)
    monkeypatch.setattr(proxy.Memory, "PRUNE_ROWS", 1)
    memory.pin("recipes", "a", "1")
    memory.pin("recipes", "b", "2")
    for i in range(5):
        memory.put(f"k{i}", None, str(i))
    assert memory.pinned("recipes") == [("a", "1"), ("b", "2")]
    assert memory.get("k3") is None


def test_memory_lists_the_first_lines_of_what_is_pinned(memory):
    memory.pin("recipes", "a", "head\nrest")
    assert memory.pinned("recipes") == [("a", "head\n")]
    assert memory.get("a") == "head\nrest"


@pytest.mark.parametrize("key", ["model", "name", "source", "from"])
def test_a_recipe_is_read_whole_only_where_a_body_names_it(memory, key):
    shelf = proxy.Shelf(memory, "scope:")
    recipe = proxy.Recipe(FLASH, "Arr.", {"seed": 1}, [user("Hi")], ["MIT"], 1.5)
    for name in ("one", "two"):
        shelf.keep(proxy.Keep(f"model:{name}", proxy.recipe_text(recipe), pinned=True))
    head = proxy.Recipe(FLASH, modified=1.5)
    assert shelf.recipes(Fields({key: "One:latest"})) == {"one": recipe, "two": head}
    assert shelf.recipes(Fields({key: ["one"]})) == {"one": head, "two": head}


def test_memory_forgets_a_pinned_text(memory):
    memory.pin("recipes", "a", "1")
    memory.forget("a")
    assert memory.get("a") is None
    assert memory.pinned("recipes") == []


def test_memory_without_a_file_is_forgotten_when_it_is_closed(memory):
    memory.put("a", None, "1")
    memory.close()
    assert memory.get("a") is None


def test_memory_in_a_file_can_be_opened_again(tmp_path):
    with contextlib.closing(proxy.Memory(str(tmp_path / "state.db"))) as memory:
        memory.put("a", None, "1")
        memory.close()
        assert memory.get("a") == "1"


def test_a_state_file_of_version_1_0_can_be_read(tmp_path):
    path = str(tmp_path / "state.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE memory (key TEXT PRIMARY KEY, alias TEXT, value TEXT)")
        database.execute("CREATE INDEX aliases ON memory (alias)")
        database.execute("INSERT INTO memory VALUES ('a', 'x', '1'), ('b', '!', '2')")
    with contextlib.closing(proxy.Memory(path)) as memory:
        assert memory.get("a") == "1"
        assert memory.pinned("") == [("b", "2")]


@pytest.mark.skipif(os.name != "posix", reason="this system has no file modes")
def test_a_state_file_that_others_can_read_is_narrowed(tmp_path):
    path = tmp_path / "state.db"
    path.touch(0o644)
    with contextlib.closing(proxy.Memory(str(path))) as memory:
        memory.put("key", None, "text")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_database_is_refused_at_the_start(tmp_path):
    (tmp_path / "state.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(sqlite3.Error, match="not a database"):
        proxy.Memory(str(tmp_path / "state.db")).try_out()


def test_a_locked_file_can_still_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "STATE_LOCK_SECONDS", 0)
    monkeypatch.setattr(proxy, "log", lambda line: None)
    path = str(tmp_path / "state.db")
    with contextlib.closing(proxy.Memory(path)) as memory:
        memory.put("a", None, "1")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE").close()
            memory.put("b", None, "2")
            with pytest.raises(ProxyError):
                memory.pin("recipes", "c", "3")
            assert memory.get("a") == "1"
            assert memory.get("b") is None


def test_a_file_that_is_no_database_is_logged_and_stops_nothing(tmp_path, log_lines):
    (tmp_path / "state.db").write_bytes(b"this is no database" * 100)
    memory = proxy.Memory(str(tmp_path / "state.db"))
    memory.put("a", None, "1")
    assert memory.get("a") is None
    assert "not a database" in log_lines[0]


# ======================================================================================
# 16. Recording
# ======================================================================================

GOOGLE_KEY = "AIza" + "Sy" * 18
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "text, hidden",
    [
        (f"my key is {GOOGLE_KEY}.", GOOGLE_KEY[4:]),
        ("ya29.a0AfB_byC-secret", "a0AfB_byC-secret"),
        ("use sk-proj-0123456789abcdef", "proj-0123456789abcdef"),
        (f"token {JWT}", JWT[3:]),
        ("authorization: Bearer abc.def-123", "abc.def-123"),
        ("https://user:pa55@proxy.example/x", "user:pa55"),
        ('{"url":"https://x.example/?a=1&api_key=s3cret&b"}', "s3cret"),
        (r'{"url":"https://x.example/?a=1\u0026token=s3cret"}', "s3cret"),
        ("/upload/v1beta/files?upload_id=AbC-1&upload_protocol=resumable", "AbC-1"),
        ("https://bucket.example/x?X-Goog-Signature=0abc", "0abc"),
        ('{"Authorization" : "Basic dXNlcg=="}', "Basic dXNlcg=="),
        (r'{"password":"a\"b\\c"}', r"a\"b\\c"),
        (r'{"arguments":"{\"api_key\": \"s3cret\"}"}', "s3cret"),
        ('{"mcpServers":[{"headers":{"X-Team":"s3cret","Y":"t0"}}]}', "s3cret"),
        ('{"authorization_token":"mcp-token"}', "mcp-token"),
        (r'{"x":"{\"headers\" : {\"A\": \"1\", \"B\": \"s3cret\"}}"}', "s3cret"),
        ('{"headers":{"A":5,"B":"}","C":"s3cret"}}', "s3cret"),
    ],
)
def test_recordings_mask_what_looks_like_a_secret(text, hidden):
    masked = proxy.masked(text, ())
    assert hidden in text
    assert hidden not in masked
    assert proxy.MASK in masked
    if text.startswith("{"):
        json.loads(masked)


@pytest.mark.parametrize(
    "text",
    [
        '{"usageMetadata":{"promptTokenCount":4},"max_tokens":5}',
        '{"properties":{"password":{"type":"string"}},"required":["password"]}',
        "task-force-of-the-disk-desk-with-long-words",
        "the bearer of news",
        "https://example.com/?monkey=1&alt=sse",
        '{"headers":[],"a":{"token":null,"password":1}}',
        '"token"',
        '"headers":{',
        '{"properties":{"headers":{"type":"object","description":"of HTTP"}}}',
    ],
)
def test_recordings_keep_what_is_no_secret(text):
    assert proxy.masked(text, ()) == text.replace("monkey=1", f"monkey={proxy.MASK}")


def test_recordings_mask_a_secret_in_any_spelling():
    spelled = proxy.spellings('pa/ss"word')
    text = f"{json.dumps('pa/ss' + chr(34) + 'word')} pa%2Fss%22word"
    assert proxy.masked(text, spelled) == f'"{proxy.MASK}" {proxy.MASK}'


def test_recordings_mask_headers_by_their_names_and_keep_the_scheme():
    headers = {"authorization": "Bearer abc", "Cookie": "a=b", "x-api-key": "k", "accept": "*/*"}
    assert proxy.masked_headers(headers) == {
        "authorization": f"Bearer {proxy.MASK}",
        "Cookie": proxy.MASK,
        "x-api-key": proxy.MASK,
        "accept": "*/*",
    }


def test_recordings_mask_parameters_whose_names_are_encoded():
    masked = proxy.masked_query("/v1beta/models?alt=sse&%6bey=px%2D1")
    assert masked == f"/v1beta/models?alt=sse&%6bey={proxy.MASK}"


@pytest.mark.parametrize("first", ["plain", '"token":"', '"token":"a'])
def test_recordings_mask_headers_in_their_places(first):
    several = [{"x": first, "y": "my-key"}, {}, {"z": "sk-0123456789abcdefg"}]
    lines = proxy.masked_lines(several, ("my-key",))
    assert [list(fields) for fields in lines] == [["x", "y"], [], ["z"]]
    assert (lines[0]["y"], lines[2]["z"]) == (proxy.MASK, f"sk-{proxy.MASK}")


def media_mark(data):
    return f"[media: {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}]"


PNG_BYTES = base64.b64decode(PNG)
NOISE = hashlib.sha512(b"noise").digest() * 8
NOISE_TEXT = base64.b64encode(NOISE).decode()
assert {"+", "/"} < set(NOISE_TEXT)


def in_json(text):
    """A text that is escaped already, in a field."""
    return f'{{"x":"{text}"}}'


@pytest.mark.parametrize(
    "text, data",
    [
        (f'{{"inlineData":{{"mimeType":"image/png","data":"{PNG}"}}}}', PNG_BYTES),
        (f'{{"url": "data:image/png;base64,{PNG}"}}', PNG_BYTES),
        (f"an ![image](data:image/png;base64,{PNG}) in a text", PNG_BYTES),
        (f'{{"b64_json":"{PNG}"}}', PNG_BYTES),
        (f'{{"images":["{PNG}"]}}', PNG_BYTES),
        (f'{{"file":"{PNG}"}}', PNG_BYTES),
        (f'{{"delta":"{NOISE_TEXT}"}}', NOISE),
        (in_json(NOISE_TEXT.replace("/", r"\/")), NOISE),
        (in_json(NOISE_TEXT.replace("+", r"\u002B")), NOISE),
        (in_json(r"\u002B" * 400), b"\xfb\xef\xbe" * 100),
        (in_json(r"\/" * 400), b"\xff" * 300),
        (in_json(re.sub("(.{76})", r"\1\\r\\n", NOISE_TEXT)), NOISE),
        (in_json(rf"{{\"blob\": \"{NOISE_TEXT}\"}}"), NOISE),
        (in_json(base64.urlsafe_b64encode(NOISE).decode().rstrip("=")), NOISE),
        (f'{{"audio":"{NOISE_TEXT}A"}}', f"{NOISE_TEXT}A".encode()),
    ],
)
def test_recordings_cut_media(text, data):
    cut = proxy.without_media(text)
    assert media_mark(data) in cut
    assert len(cut) < 200
    if text.startswith("{"):
        json.loads(cut)


def test_recordings_cut_large_media_in_slices(monkeypatch):
    monkeypatch.setattr(proxy, "SLICE_CHARACTERS", 8)
    assert proxy.without_media(in_json(NOISE_TEXT)) == in_json(media_mark(NOISE))


@pytest.mark.parametrize(
    "text",
    [
        f'{{"thoughtSignature":"{NOISE_TEXT}"}}',
        f'{{"type":"reasoning","encrypted_content":"{NOISE_TEXT}"}}',
        in_json("0123456789abcdef" * 4),
        '{"id":"chatcmpl-b439ec7917887dfb5b690ae91b439ec7917887dfb5b690ae91"}',
        in_json("several words " * 100),
    ],
)
def test_recordings_keep_signatures_ids_and_texts(text):
    assert proxy.without_media(text) == text


def test_recordings_cut_the_files_of_a_form():
    body, kind = form(("model", "whisper-1"), ("file", "a.wav", "audio/wav", RIFF))
    text = proxy.body_text(body, kind)
    assert media_mark(RIFF) + "\r\n" in text
    assert "whisper-1" in text
    assert text.count("b0un:d") == 3


@pytest.mark.parametrize("kind", ["audio/wav", "application/octet-stream", ""])
def test_recordings_cut_bodies_that_are_no_text(kind):
    assert proxy.body_text(RIFF, kind) == media_mark(RIFF)


def test_recordings_show_bytes_that_are_no_utf_8():
    assert proxy.body_text(b'{"a": "\xff"}', "application/json") == r'{"a": "\xff"}'


@pytest.mark.parametrize(
    "part",
    [
        "\\",
        '"',
        "-eyJ",
        "://a",
        "&key",
        "bearer ",
        "sk-a",
        'token\\\\"',
        '"token":"a"',
        '"headers":{',
        '"headers":{\\\\',
        '"password":"',
        "\\/",
        "A\\/",
        ";base64,",
    ],
)
@pytest.mark.parametrize("start", ["", '"password":"', '"headers":{"'])
def test_masking_and_cutting_takes_time_in_proportion(start, part):
    def take(size):
        data = (start + part * (size // len(part))).encode()
        return lambda: proxy.masked(proxy.body_text(data, "application/json"), ("the-key",))

    assert cpu_seconds(take(1 << 17)) < 1


@pytest.mark.parametrize(
    "text",
    ['"' * (proxy.MAX_QUOTES + 1), "ä, b " * (proxy.MAX_TEXT_CHARACTERS // 5 + 1)],
    ids=short_id,
)
def test_of_an_endless_text_recordings_have_a_sample(text):
    sample, end = proxy.body_text(text.encode(), "").split(f" {proxy.CUT_OFF} ")
    assert text.startswith(sample)
    assert proxy.SAMPLE_BYTES - 5 <= len(sample) <= proxy.SAMPLE_BYTES
    assert end == media_mark(text.encode())


def test_no_half_of_a_key_stands_at_the_end_of_a_sample():
    assert proxy.beginning('{"model": "m", "key": "AIza-half') == '{"model": "m", "key": "'


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "recordings"


@contextlib.contextmanager
def recording(gemini, folder, **fields):
    """A server that records into this folder."""
    with serving(gemini.url, record=str(folder), **fields) as server:
        server.recorder.try_out()
        yield server


def recordings_in(folder):
    """The recordings, the oldest first; the server has ended, so that all are written."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.iterdir())]


def recorded(gemini, folder, *requests, **fields):
    """The recordings of these requests: of each the arguments of post()."""
    with recording(gemini, folder, **fields) as server:
        for path, body, headers in requests:
            post(server, path, body, **headers)
    return recordings_in(folder)


CHAT_REQUEST = ("/v1/chat/completions", chat(), {})


def test_a_recording_tells_what_passed(gemini, folder):
    gemini.say(whole("Hello"))
    body = {**chat(), "logit_bias": {"1": 2}}
    (one,) = recorded(gemini, folder, ("/v1/chat/completions?a=b", body, {"User_Agent": "x/1"}))
    assert one["recording"] == proxy.RECORDING_FORMAT
    assert (one["api"], one["status"]) == ("openai", 200)
    assert (one["route"], one["ignored"]) == ("POST /v1/chat/completions", ["logit_bias"])
    assert one["request"]["target"] == "/v1/chat/completions?a=b"
    assert one["request"]["headers"]["User-Agent".lower()] == "x/1"
    assert json.loads(one["request"]["body"]) == body
    (attempt,) = one["attempts"]
    assert attempt["url"] == f"{gemini.url}/v1beta/models/{FLASH}:generateContent"
    assert json.loads(attempt["body"]) == gemini.bodies[0]
    assert json.loads(attempt["answer"]["body"]) == whole("Hello")
    assert attempt["answer"]["headers"]["content-type"] == "application/json; charset=UTF-8"
    assert "Hello" in one["answer"]["body"]
    assert one["answer"]["headers"]["x-request-id"] == one["request_id"]
    assert 0 <= attempt["after"] <= attempt["answer"]["after"] <= one["answer"]["sent"][0][0]


def test_a_recording_of_a_stream_tells_when_its_pieces_came(gemini, folder):
    gemini.say(Say(chunk("One"), whole("two"), gap=0.05))
    (one,) = recorded(gemini, folder, ("/v1/chat/completions", chat(stream=True), {}))
    answer = one["attempts"][0]["answer"]
    assert answer["body"].encode() == event_bytes(chunk("One")) + event_bytes(whole("two"))
    (first, _), (second, size) = answer["arrived"]
    assert second - first >= 0.03
    assert size == len(answer["body"])
    assert one["answer"]["body"].endswith("data: [DONE]\n\n")


def test_a_recording_has_every_attempt(gemini, folder):
    gemini.say(gemini_error(503, "overloaded", "UNAVAILABLE"), whole("Hello"))
    (one,) = recorded(gemini, folder, CHAT_REQUEST)
    first, second = one["attempts"]
    assert (first["answer"]["status"], second["answer"]["status"]) == (503, 200)
    assert "overloaded" in first["error"]


def test_a_recording_tells_that_gemini_cannot_be_reached(folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        gone = types.SimpleNamespace(url=url)
        (one,) = recorded(gone, folder, CHAT_REQUEST)
    assert one["status"] == 502
    assert "could not be reached" in one["attempts"][-1]["error"]
    assert "answer" not in one["attempts"][-1]


def test_a_recording_tells_that_the_client_left(gemini, folder):
    gemini.say(Say(whole("late"), delay=30))
    with recording(gemini, folder) as server, RawClient(server) as client:
        client.send(raw_chat())
        until(lambda: gemini.bodies)
    (one,) = recordings_in(folder)
    assert (one["status"], one["notes"]) == (499, ["the client left"])


def test_a_recording_has_no_key(gemini, folder):
    """Each is quoted by the client, and by Gemini."""
    keys = ["the-key", "px", "client-key-1", "query-key-1"]
    gemini.say(gemini_error(400, "Bad: " + ", ".join(keys)))
    body = chat(user("My keys: " + ", ".join(keys)))
    headers = {"Authorization": "Bearer px", "x_api_key": "client-key-1"}
    request = ("/v1/chat/completions?key=query-key-1", body, headers)
    (one,) = recorded(gemini, folder, request, proxy_key="px")
    assert one["status"] == 400
    assert "Bad: [masked], [masked], [masked], [masked]" in one["attempts"][0]["answer"]["body"]
    text = json.dumps(one)
    assert not [key for key in keys if key in text]


def test_a_recording_has_no_key_of_a_client_that_brings_gemini_its_own(gemini, folder):
    request = ("/v1/chat/completions", chat(user("AIza-own")), {"Authorization": "Bearer AIza-own"})
    (one,) = recorded(gemini, folder, request, client_keys=True)
    assert key_of(gemini) == "AIza-own"
    assert "AIza-own" not in json.dumps(one)


def test_a_recording_has_no_token(google, folder):
    request = ("/v1/chat/completions", chat(user("ya29.secret-0 secret-0")), {})
    (one,) = recorded(google, folder, request, backend=vertex_at(google), key="")
    assert google.tokens == ["ya29.secret-0"]
    assert one["attempts"][0]["headers"]["Authorization"] == f"Bearer {proxy.MASK}"
    assert json.loads(one["request"]["body"]) == chat(user(f"{proxy.MASK} secret-0"))


def test_a_recording_of_an_upload_has_its_length_and_digest_and_no_ticket(gemini, folder):
    data = bytes(range(256)) * 4000
    with recording(gemini, folder, proxy_key="px-1") as server:
        address = start_upload(server, gemini, x_goog_api_key="px-1")
        gemini.say(Say(raw=b'{"file": {}}'))
        upload = {"X_Goog_Upload_Command": "upload, finalize"}
        assert passing(server, "POST", "/" + address.split("/", 3)[3], data, **upload)[0] == 200
        until(lambda: not server.recorder.held)
    start, upload = recordings_in(folder)
    assert start["request"]["body"] == "{}"
    assert upload["request"]["body"] == upload["attempts"][0]["body"] == media_mark(data)
    ticket = urllib.parse.parse_qs(address)[proxy.UPLOAD_TICKET][0]
    assert ticket not in json.dumps([start, upload])
    assert "a-1" not in json.dumps([start, upload])


def test_a_recording_holds_so_much_of_a_body(gemini, folder, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_TAPE_BYTES", 4000)
    monkeypatch.setattr(proxy, "SAMPLE_BYTES", 100)
    body = json.dumps(chat(user("word " * 1000))).encode()
    (one,) = recorded(gemini, folder, ("/v1/chat/completions", body, {}))
    sample = body[:100].decode().rpartition(" ")[0]
    assert one["request"]["body"] == f"{sample}  {proxy.CUT_OFF} {media_mark(body)}"


def test_recordings_hold_so_much_together_and_give_it_back(gemini, folder, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_TAPES_BYTES", 2000)
    gemini.say(whole("x" * 3000))
    with recording(gemini, folder) as server:
        assert post(server)[0] == 200
        assert server.recorder.held <= 2000
        until(lambda: not server.recorder.held)
    (one,) = recordings_in(folder)
    assert json.loads(one["request"]["body"]) == chat()
    assert one["attempts"][0]["answer"]["body"].startswith("[media: ")


def test_what_is_asked_for_all_the_time_is_not_recorded(gemini, folder):
    with recording(gemini, folder) as server, RawClient(server) as client:
        assert client.request("GET", "/healthz")[0] == 200
        assert client.request("GET", "/metrics")[0] == 200
        assert client.request("GET", "/nowhere")[0] == 404
        until(lambda: not server.recorder.held)
    assert [one["request"]["target"] for one in recordings_in(folder)] == ["/nowhere"]


@pytest.mark.skipif(WINDOWS, reason="there are no modes")
def test_recordings_are_for_the_user_alone(gemini, folder):
    recorded(gemini, folder, CHAT_REQUEST)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def recorder_of(folder, workers=1):
    notes = collections.Counter()
    recorder = proxy.Recorder(str(folder), workers, lambda name, outcome: notes.update([outcome]))
    recorder.try_out()
    return recorder, notes


def a_recording(recorder, number=0):
    one = proxy.Recording(recorder, config_for("http://x"), proxy.RequestHead())
    one.clock = datetime.datetime.fromtimestamp(1e9 + number, datetime.timezone.utc)
    one.facts = {"request_id": f"req_{number:024x}"}
    return one


def write(recorder, one):
    recorder.write(one.name, one.text())


@pytest.mark.parametrize("workers", [1, 3])
def test_the_oldest_recordings_go(folder, monkeypatch, workers):
    monkeypatch.setattr(proxy, "MAX_RECORDINGS", 60)
    recorders = [recorder_of(folder, workers)[0] for _ in range(workers)]
    (folder / "notes.txt").write_text("mine")
    for number in range(200):
        recorder = recorders[number % workers]
        write(recorder, a_recording(recorder, number))
        assert len(list(folder.iterdir())) <= 61
    names = sorted(path.name for path in folder.iterdir())
    assert names[-1] == "notes.txt"
    assert len(names) >= 40
    assert names[-2].endswith(f"req_{199:024x}.json")
    assert names[0].endswith(f"req_{200 - len(names) + 1:024x}.json")


def test_where_there_are_many_recordings_new_ones_are_written_over_the_oldest(folder, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_RECORDINGS", 20)
    recorder, _ = recorder_of(folder)
    for number in range(100):
        if number == 20:
            files = {path.stat().st_ino for path in folder.iterdir()}
        one = a_recording(recorder, number)
        one.notes = ["a long note " * (100 - number)]
        write(recorder, one)
    assert {path.stat().st_ino for path in folder.iterdir()} == files
    numbers = [int(one["request_id"][4:], 16) for one in recordings_in(folder)]
    assert numbers == list(range(100 - len(files), 100))


def test_a_worker_makes_a_file_where_another_one_took_the_oldest(folder, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_RECORDINGS", 20)
    first, second = [recorder_of(folder, 2)[0] for _ in range(2)]
    for number in range(21):
        write(second, a_recording(second, number))
    for number in range(21, 60):
        write(first, a_recording(first, number))
    for number in range(60, 65):
        write(second, a_recording(second, number))
    assert len(recordings_in(folder)) <= 21


def test_recordings_have_so_many_bytes_together(folder, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_RECORDINGS_BYTES", 10_000)
    recorder, _ = recorder_of(folder)
    for number in range(40):
        write(recorder, a_recording(recorder, number))
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000
    assert len(list(folder.iterdir())) > 5


def test_recordings_that_come_too_fast_are_dropped(folder, log_lines, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_UNWRITTEN_RECORDINGS", 2)
    recorder, outcomes = recorder_of(folder)
    for number in range(5):
        recorder.put(a_recording(recorder, number))
    assert outcomes == {"dropped": 3}
    assert len(log_lines) == 1
    recorder.start()
    recorder.close()
    assert len(recordings_in(folder)) == outcomes["written"] == 2


def write_to_full_disk(file, data):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("trouble", ["a full disk", "no folder"])
def test_answers_go_on_where_nothing_can_be_recorded(
    gemini, folder, log_lines, monkeypatch, trouble
):
    with recording(gemini, folder) as server:
        if trouble == "no folder":
            folder.rmdir()
        else:
            monkeypatch.setattr(proxy.os, "write", write_to_full_disk)
        assert [post(server)[0] for _ in range(5)] == [200] * 5
        until(lambda: metrics_of(server).get('recordings_total{outcome="failed"}') == 5)
        monkeypatch.undo()
        assert len([line for line in log_lines if "recordings" in line]) <= 1
    assert not folder.exists() or not list(folder.iterdir())


def test_a_recording_that_cannot_get_its_name_leaves_nothing_to_the_next_one(folder):
    recorder, _ = recorder_of(folder)
    long, short = a_recording(recorder, 0), a_recording(recorder, 1)
    long.notes = ["a long note " * 100]
    (folder / long.name).mkdir()
    with pytest.raises(OSError):
        write(recorder, long)
    assert [path.name for path in folder.iterdir()] == [long.name]
    (folder / long.name).rmdir()
    write(recorder, short)
    assert len(recordings_in(folder)) == 1


def test_a_bug_in_writing_a_recording_ends_nothing(gemini, folder, log_lines, monkeypatch):
    with recording(gemini, folder) as server:
        with monkeypatch.context() as patched:
            patched.setattr(proxy, "masked", None)
            assert post(server)[0] == 200
            until(lambda: metrics_of(server).get('recordings_total{outcome="failed"}') == 1)
        assert post(server)[0] == 200
    assert len(recordings_in(folder)) == 1


def test_without_the_flag_nothing_is_recorded(server, gemini):
    assert server.recorder is None
    assert post(server)[0] == 200
    assert not [thread for thread in threading.enumerate() if thread.name == "recorder"]


def test_a_folder_for_recordings_that_cannot_be_made_ends_the_start(gemini, tmp_path):
    (tmp_path / "file").write_text("")
    with start(
        "-listen=127.0.0.1:0", f"-record={tmp_path / 'file' / 'x'}", GEMINI_API_KEY="k"
    ) as process:
        (line,) = process.stdout.read().splitlines()
        assert process.wait(10) == 1
    assert re.match("proxy-to-gemini: cannot record in .*x: ", line)


def test_workers_record_into_one_folder_and_the_end_writes_what_waits(gemini, folder):
    if WINDOWS:
        pytest.skip("there is no fork")
    flags = ["-workers=2", f"-record={folder}"]
    with running(gemini, *flags, **ENV) as (process, server):
        for _ in range(10):
            assert post(server)[0] == 200
        process.terminate()
        assert process.wait(15) == 0
    assert len(recordings_in(folder)) == 10


# ---- replays ----


@contextlib.contextmanager
def replayed(one):
    """(the stand-in that plays this recording, a proxy in front of it, what it tells)"""
    told = []
    with Replay(one, tell=told.append) as stand_in, serving(stand_in.url) as server:
        yield stand_in, server, told


def ask_again(stand_in, server, one):
    """The answer to the recorded request."""
    with urllib.request.urlopen(stand_in.url + "/request") as answer:
        body = answer.read()
    headers = {"Content-Type": one["request"]["headers"].get("content-type")}
    return post(server, one["request"]["target"], body, **headers)


def without_ids(text):
    return re.sub(r"[0-9a-f]{24}|\"created\":\d+", "", text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_recording_can_be_run(gemini, folder, stream):
    gemini.say(
        gemini_error(503, "busy", "UNAVAILABLE"), [chunk("Oslo "), whole(call("f", {}, "s"))]
    )
    (one,) = recorded(gemini, folder, ("/v1/chat/completions", chat(stream=stream), {}))
    with replayed(one) as (stand_in, server, told):
        status, _, data = ask_again(stand_in, server, one)
    assert (status, len(told)) == (200, 2)
    assert all(line.endswith(": as recorded") for line in told)
    assert not stand_in.left
    ids = re.compile("call_[0-9a-f]{24}")
    assert without_ids(data.decode()) == without_ids(one["answer"]["body"])
    assert len(ids.findall(data.decode())) == len(ids.findall(one["answer"]["body"])) == 1


@pytest.mark.parametrize("kind", ["picture", "form"])
def test_a_recording_with_media_can_be_run(gemini, folder, kind):
    picture = {"type": "image_url", "image_url": {"url": PNG_LINK}}
    request = ("/v1/chat/completions", chat(user([picture])), {})
    if kind == "form":
        body, content_type = form(*UPLOAD_PARTS)
        request = ("/v1/audio/transcriptions", body, {"Content_Type": content_type})
    (one,) = recorded(gemini, folder, request)
    with replayed(one) as (stand_in, server, told):
        assert ask_again(stand_in, server, one)[0] == 200
    assert told[0].endswith("generateContent: as recorded")


def test_a_recorded_answer_that_broke_off_breaks_off_again(gemini, folder):
    gemini.say(Say(chunk("One"), chunk("two"), cut=1))
    (one,) = recorded(gemini, folder, ("/v1/chat/completions", chat(stream=True), {}))
    with replayed(one) as (stand_in, server, _):
        data = ask_again(stand_in, server, one)[2]
    assert b"broke off" in data
    assert without_ids(data.decode()) == without_ids(one["answer"]["body"])


def test_a_replay_tells_how_to_run_it(google, folder):
    request = ("/v1/chat/completions", {**chat(), "model": "a b"}, {"Content_Type": "text/plain"})
    place = {"backend": vertex_at(google), "key": "", "aliases": (("a b", FLASH, NEWEST),)}
    (one,) = recorded(google, folder, request, **place)
    with Replay(one) as stand_in:
        start, ask, _ = stand_in.how_to().split("\n")
    flags = shlex.split(start)[6:]
    assert flags[1:] == [
        f"-alias=a b={FLASH},{NEWEST}",
        f"-vertex={place['backend'].project}/{place['backend'].location}",
        "-token-command=echo replay",
        f"-upstream={stand_in.url}",
    ]
    assert configure(*flags).backend.project == place["backend"].project
    assert shlex.split(ask)[-4:] == ["-H", "Content-Type: text/plain", "--data-binary", "@-"]


@pytest.mark.parametrize(
    "line", [b"rubbish\r\n", b"GET / HTTP/1.1\r\n\r\n", b"PUT * HTTP/1.1\r\nHost: a\r\n\r\n"]
)
def test_requests_that_make_no_sense_are_recorded_too(gemini, folder, line):
    with recording(gemini, folder) as server, RawClient(server) as client:
        status, _, data = client.send(line).reply()
    (one,) = recordings_in(folder)
    assert (one["status"], one["answer"]["body"]) == (status, data.decode())
    assert one["attempts"] == []


def test_a_replay_tells_what_differs(gemini, folder):
    (one,) = recorded(gemini, folder, ("/v1/chat/completions", chat(user("old")), {}))
    with replayed(one) as (_, server, told):
        assert post(server, body=chat(user("new")))[0] == 200
        assert post(server)[0] == 404
    path = f"POST /v1beta/models/{FLASH}:generateContent"
    assert told[0] == f'{path}: contents[0].parts[0].text is "new", and was "old"'
    assert told[1] == f"{path}: not in the recording, or not so often"


# ======================================================================================
# 17. Server
# ======================================================================================


WRITE_LOG = proxy.write_log


@pytest.fixture(autouse=True)
def log_lines(monkeypatch):
    """The lines that servers in this process log; pytest's output has none of them."""
    lines = []
    monkeypatch.setattr(proxy, "write_log", lines.append)
    return lines


class ManualSignals(proxy.Signals):
    """Signals that a test sends to a server in this process, whose own signals stay as they are."""

    def __init__(self):
        self.pending, self.parent = set(), 0
        self.notify_socket, self.watchdog, self.last_ping = "", math.inf, 0.0
        self.poll_seconds = 1.0
        self.woken, self.wake = socket.socketpair()

    def send(self, name):
        self.pending.add(name)
        self.wake.send(b"\0")

    def close(self):
        self.woken.close()
        self.wake.close()


@contextlib.contextmanager
def in_thread(server):
    """The server in a loop of its own: a function that lets it begin to end, as SIGTERM does."""
    signals = ManualSignals()
    thread = threading.Thread(target=server.run, args=(signals,), daemon=True)
    thread.start()

    def stop():
        signals.send("SIGTERM")
        until(lambda: server.draining)

    try:
        yield stop
    finally:
        signals.send("SIGTERM")
        thread.join(15)
        signals.close()
    assert not thread.is_alive()


def config_for(url, api="openai", host="127.0.0.1"):
    """The configuration of a proxy in front of the Gemini at that URL."""
    return proxy.Config(api, (host, 0), proxy.Backend(url=url), "the-key")


@contextlib.contextmanager
def serving(url, api="openai", **fields):
    """A proxy in this process, in front of the Gemini at that URL."""
    config = config_for(url, api)._replace(timeout=5.0)
    server = proxy.Server(config._replace(**fields))
    with in_thread(server):
        yield server


@pytest.fixture
def server(gemini):
    with serving(gemini.url) as server:
        yield server


class RawClient:
    """A client's connection, for requests that no library would send."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.server_port), 5)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)
        return self

    def request(self, method, path, body=None, version="1.1", **headers):
        """(status, headers, body) of the answer to a request. A header that is None is left out."""
        fields, data = {"Host": "localhost"}, body or b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            fields["Content-Length"] = str(len(data))
        fields.update(headers)
        lines = [f"{method} {path} HTTP/{version}"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in fields.items() if v is not None]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + data)
        return self.reply(method)

    def reply(self, method="GET"):
        """(status, headers, body) of the next answer."""
        status = int(self.file.readline().split()[1])
        headers = {}
        for line in iter(self.file.readline, b"\r\n"):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if status == 100:
            return self.reply(method)
        if method == "HEAD" or status == 204:
            return status, headers, b""
        if "content-length" in headers:
            return status, headers, self.file.read(int(headers["content-length"]))
        if "transfer-encoding" in headers:
            return status, headers, b"".join(iter(self.read_chunk, b""))
        return status, headers, self.file.read()

    def read_chunk(self):
        data = self.file.read(int(self.file.readline(), 16))
        assert self.file.readline() == b"\r\n"
        return data

    def ended(self):
        """Whether the server hung up, and sent nothing more."""
        return self.file.read() == b""


CHAT_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def raw_chat(**more):
    """The bytes of a request for a chat completion."""
    data = json.dumps(chat(**more)).encode()
    return CHAT_HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


def open_stream(client):
    """Ask for a streamed answer, and read the first line of its head."""
    client.send(raw_chat(stream=True))
    assert client.file.readline() == b"HTTP/1.1 200 OK\r\n"


def post(server, path="/v1/chat/completions", body=None, **headers):
    """(status, headers, body) of the answer to a POST on a connection of its own."""
    with RawClient(server) as client:
        return client.request("POST", path, chat() if body is None else body, **headers)


def post_json(server, path="/v1/chat/completions", body=None, **headers):
    """The JSON of an answer that must be a 200."""
    status, _, data = post(server, path, body, **headers)
    assert status == 200
    return json.loads(data)


def chat_message(server, *messages, **more):
    """The assistant's message that answers these."""
    return post_json(server, body=chat(*messages, **more))["choices"][0]["message"]


def error_of(reply):
    error = json.loads(reply[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def tool_result(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def until(condition):
    """Wait for it: what is counted after an answer comes a moment after it."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- the log ----


def test_lines_that_come_while_the_log_is_written_wait_for_nobody(monkeypatch):
    pieces, writing, go_on = [], threading.Event(), threading.Event()

    def write(file, data):
        pieces.append(data)
        writing.set()
        assert go_on.wait(10)

    lines = [f"line {number}\n" for number in range(900)]
    with open(os.devnull, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(proxy.os, "write", write)
        writer = threading.Thread(target=WRITE_LOG, args=(lines[0],))
        writer.start()
        assert writing.wait(10)
        for line in lines[1:]:
            WRITE_LOG(line)
        assert len(pieces) == 1
        go_on.set()
        writer.join()
    assert b"".join(pieces).decode() == "".join(lines)
    assert max(map(len, pieces)) <= 4096
    assert len(pieces) == 3


def test_a_line_of_the_log_that_another_thread_has_just_written_is_no_trouble(monkeypatch):
    class LateLock:
        def acquire(self, blocking):
            proxy.LOG_LINES.clear()
            return True

        def release(self):
            pass

    monkeypatch.setattr(proxy, "LOG_LOCK", LateLock())
    WRITE_LOG("a line\n")
    assert not proxy.LOG_LINES


def test_of_lines_of_the_log_that_cannot_be_written_so_many_are_held(monkeypatch):
    lines = collections.deque(maxlen=proxy.LOG_LINES.maxlen)
    monkeypatch.setattr(proxy, "LOG_LINES", lines)
    with proxy.LOG_LOCK:
        for number in range(30_000):
            WRITE_LOG(f"{number}\n")
    assert len(lines) <= 10_000
    assert lines[-1] == b"29999\n"


def test_a_thread_writes_only_so_many_pieces_of_the_log_for_others(monkeypatch):
    pieces = []
    monkeypatch.setattr(proxy.os, "write", lambda file, data: pieces.append(data))
    with open(os.devnull, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        proxy.LOG_LINES.extend([b"x" * 3000 + b"\n"] * 6)
        WRITE_LOG("own\n")
        assert len(pieces) == proxy.MAX_LOG_PIECES == 4
        proxy.write_waiting_lines()
    assert b"".join(pieces) == (b"x" * 3000 + b"\n") * 6 + b"own\n"
    assert not proxy.LOG_LINES


def test_a_long_line_of_the_log_keeps_its_end(log_lines):
    proxy.log("why: " + "x" * 9000 + "\nthe cause")
    (line,) = log_lines
    assert len(line) < 4100
    assert line.startswith("why: x")
    assert line.endswith("\\nthe cause\n")


def test_the_log_holds_neither_keys_nor_content(server, log_lines):
    path = "/v1/chat/completions?key=secret"
    post(server, path, chat(user("secret words")), Authorization="Bearer secret")
    until(lambda: log_lines)
    assert re.fullmatch(
        r"POST /v1/chat/completions 200 \d+ ms 'gemini-2.5-flash' 4\+7 tokens\n", log_lines[0]
    )


@pytest.mark.parametrize(
    "target, agent, line",
    [
        ("/\x1b[31m", "x", r"- - 400 \d+ ms\n"),
        ("/%0aFORGED", "\x1b[2J", r"GET /%0aFORGED 400 \d+ ms\n"),
        ("/\xe9\x85", "x", r"GET /\\xe9\\x85 404 \d+ ms\n"),
    ],
    ids=["an escape in the path", "an escape in a header", "a line break of ISO 8859-1"],
)
def test_a_request_puts_no_control_characters_into_the_log(server, log_lines, target, agent, line):
    with RawClient(server) as client:
        client.request("GET", target, User_Agent=agent)
    until(lambda: log_lines)
    assert re.fullmatch(line, log_lines[0])


def test_a_log_that_nobody_reads_stops_no_answer(gemini):
    with start("-listen=127.0.0.1:0", "-upstream", gemini.url, **ENV) as process:
        port = int(re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline()).group(1))
        with RawClient(RemoteServer(port)) as client:  # the pipe holds a few hundred lines
            path = "/healthz?" + "x" * 100
            assert {client.request("GET", path)[0] for _ in range(1500)} == {200}
            assert client.request("GET", "/" + "x" * 4000)[0] == 404


def test_a_bug_is_a_500_whose_traceback_is_in_the_log_only(server, monkeypatch, log_lines):
    monkeypatch.setattr(proxy, "openai_usage", lambda usage: 1 // 0)
    reply = post(server)
    assert reply[0] == 500
    assert "ZeroDivision" not in str(reply)
    assert "ZeroDivisionError" in log_lines[0]


# ---- metrics ----


def metrics_of(server):
    """The lines of /metrics, as a dict."""
    with RawClient(server) as client:
        status, headers, body = client.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line.rpartition(" ") for line in body.decode().splitlines() if line[0] != "#"]
    return {name.replace("proxy_to_gemini_", ""): float(value) for name, _, value in lines}


def requests_counted(server, route, status):
    return metrics_of(server).get(f'requests_total{{route="{route}",status="{status}"}}')


CHAT_ROUTE_NAME = "POST /v1/chat/completions"


def test_metrics_count_requests_by_route_and_status(server):
    post(server)
    post(server)
    post(server, "/v1/nonsense")
    until(lambda: requests_counted(server, "other", 404) == 1)
    until(lambda: requests_counted(server, CHAT_ROUTE_NAME, 200) == 2)


def test_each_refusal_of_this_program_has_a_number_in_the_metrics():
    names = [name for name, value in vars(proxy).items() if isinstance(value, type)]
    errors = {name for name in names if issubclass(getattr(proxy, name), proxy.ProxyError)}
    calls = [node for node in NODES if isinstance(node, ast.Call) and node.args]
    made = [node for node in calls if getattr(node.func, "id", "") in {*errors, "Refusal"}]
    statuses = {getattr(node.args[0], "value", None) for node in made}
    statuses = {status for status in statuses if type(status) is int} | {414, 499}
    assert {401, 426, 503} < statuses
    assert statuses <= set(proxy.STATUSES)


@pytest.mark.parametrize("status", sorted(set(proxy.FALLBACK_REASONS) | {500, 502, 504}))
def test_what_gemini_refuses_with_has_a_number_in_the_metrics(status):
    metrics = proxy.Metrics(())
    metrics.add("upstream_errors_total", str(status))
    page = metrics.page(configure()).data.decode()
    assert f'upstream_errors_total{{status="{status}"}} 1' in page


def test_metrics_measure_the_time_of_answers_and_first_bytes(server):
    post(server)
    until(lambda: requests_counted(server, CHAT_ROUTE_NAME, 200) == 1)
    metrics = metrics_of(server)
    assert metrics[f'request_seconds_bucket{{route="{CHAT_ROUTE_NAME}",le="+Inf"}}'] == 1
    assert metrics[f'first_byte_seconds_count{{route="{CHAT_ROUTE_NAME}"}}'] == 1


def test_metrics_count_tokens_by_kind(server):
    post(server)
    until(lambda: requests_counted(server, CHAT_ROUTE_NAME, 200) == 1)
    metrics = metrics_of(server)
    kinds = ("prompt", "output", "thoughts")
    assert [metrics[f'tokens_total{{kind="{kind}"}}'] for kind in kinds] == [4, 7, 2]


def test_metrics_count_what_happens_upstream(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy.random, "uniform", lambda low, high: 0.01)
    gemini.say(gemini_error(503, "overloaded"), whole("Hello"))
    post(server)
    metrics = metrics_of(server)
    assert metrics['upstream_errors_total{status="503"}'] == 1
    assert metrics["upstream_retries_total"] == 1
    assert metrics["upstream_connections_total"] >= 1
    assert metrics["upstream_idle_connections"] == 1
    assert metrics["in_flight"] >= 1, "this very request"


def test_metrics_count_where_signatures_come_from(server, gemini):
    gemini.say(whole(call("weather", {"city": "Oslo"}, "s")))
    message = chat_message(server, model=NEWEST, tools=[WEATHER])
    unknown = assistant(None, tool_calls=[tool_call("x", "clock", "{}")])
    for history in (message, kept(message), unknown):
        result = tool_result(history["tool_calls"][0]["id"], "3")
        chat_message(server, user("Hi"), history, result, model=NEWEST, tools=[WEATHER])
    metrics = metrics_of(server)
    origins = ("client", "memory", "placeholder")
    assert [metrics[f'signatures_total{{origin="{origin}"}}'] for origin in origins] == [1, 1, 1]


@pytest.fixture
def three_rows():
    """The page of three workers with the same metrics; the second one was replaced."""
    metrics = proxy.Metrics(["GET /x"], workers=3)
    for worker in range(3):
        metrics.use_row(worker)
        metrics.add("tokens_total", "prompt", amount=2)
        metrics.add("requests_total", "GET /invented", "799")
        metrics.set("in_flight", 5)
        metrics.observe("request_seconds", "GET /x", seconds=0.05 * 3**worker)
    metrics.use_row(1)
    return metrics.page(proxy.Config("openai", ("", 1))).data.decode()


@pytest.mark.parametrize(
    "line",
    [
        'tokens_total{kind="prompt"} 6',
        'requests_total{route="other",status="other"} 3',
        "in_flight 10",
        'request_seconds_bucket{route="GET /x",le="0.05"} 1',
        'request_seconds_bucket{route="GET /x",le="0.25"} 2',
        'request_seconds_count{route="GET /x"} 3',
    ],
)
def test_the_metrics_of_workers_add_up(three_rows, line):
    assert f"\nproxy_to_gemini_{line}\n" in three_rows


@pytest.mark.parametrize(
    "clients, leads",
    [
        ((5,), False),
        ((5, 5), False),
        ((1, 0), True),
        ((0, 1), False),
        ((9, 8), False),
        ((10, 8), True),
        ((9, 9, 5), True),
    ],
)
def test_a_worker_leads_that_has_well_more_clients_than_another(clients, leads):
    metrics = proxy.Metrics([], workers=len(clients))
    for worker, number in reversed([*enumerate(clients)]):
        metrics.use_row(worker)
        metrics.set("clients", number)
    assert metrics.leads("clients") is leads


def test_a_worker_that_leads_lets_another_be_the_first_and_serves_whom_it_leaves(
    gemini, monkeypatch
):
    pauses, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pauses.append(seconds) or sleep(seconds))
    with serving(gemini.url, workers=2) as server, contextlib.ExitStack() as clients:
        for _ in range(3):
            client = clients.enter_context(RawClient(server))
            assert client.request("GET", "/healthz")[0] == 200
    assert pauses.count(proxy.YIELD_SECONDS) == 2


# ---- the last requests ----


def request_at(began, model="", **fields):
    row = proxy.RecentRequest(began, 0.1, 0.5, 200.0, 4.0, 7.0, "", "POST /x", model, "")
    return row._replace(**fields)


def test_the_last_requests_of_all_workers_come_newest_first():
    recent = proxy.Recent(workers=2)
    rows = [request_at(float(i), answered_by=f"gemini-{i}") for i in range(4)]
    for part in (0, 1):
        recent.use_part(part)
        for row in rows[part::2]:
            recent.add(row)
        recent.share()
    assert recent.requests() == rows[::-1]


def test_each_worker_remembers_so_many_requests():
    recent = proxy.Recent()
    for i in range(proxy.RECENT_REQUESTS + 3):
        recent.add(request_at(float(i)))
    times = [row.time for row in recent.requests()]
    assert times == [float(i) for i in reversed(range(3, proxy.RECENT_REQUESTS + 3))]


def test_a_row_that_is_half_written_is_none():
    recent = proxy.Recent()
    recent.add(request_at(1.0))
    recent.add(request_at(2.0))
    recent.share()
    recent.rows[20] ^= 1
    assert [row.time for row in recent.requests()] == [2.0]


@pytest.mark.parametrize(
    "name, kept_name",
    [("m" * 99, "m" * 64), ("x" * 63 + "é", "x" * 63), ("\ud800<b>", "?<b>"), ("日本", "日本")],
)
def test_a_long_or_broken_name_of_a_model_is_cut_to_what_fits(name, kept_name):
    recent = proxy.Recent()
    recent.add(request_at(1.0, name))
    assert recent.requests()[0].model == kept_name


def test_requests_and_tokens_add_up_by_the_minute_over_all_workers():
    recent, now = proxy.Recent(workers=2), 6_000_000.0
    for worker, seconds in ((1, 60 * 60), (0, 59 * 60), (0, 60), (0, 0), (1, 0)):
        recent.use_part(worker)
        recent.add(request_at(now - seconds))
    expected = [(0, 0)] * proxy.RECENT_MINUTES
    expected[-1], expected[-2], expected[0] = (2, 22), (1, 11), (1, 11)
    assert recent.sums(now) == expected


def state_of(server, **headers):
    """What /status tells."""
    with RawClient(server) as client:
        status, fields, body = client.request("GET", "/status", **headers)
    assert status == 200
    assert fields["cache-control"] == "no-store"
    return json.loads(body)


def test_the_last_requests_are_shown_without_what_was_said(server):
    post(server, body=chat(user("my secret"), model="gpt-5"))
    post(server, "/v1/nonsense?key=AIza-1")
    metrics_of(server)
    until(lambda: len(state_of(server)["requests"]) == 2)
    state = state_of(server)
    (lost, answered), text = state["requests"], json.dumps(state)
    words = ("route", "model", "answered_by", "prompt", "output", "status")
    assert [answered[word] for word in words] == [
        *(CHAT_ROUTE_NAME, "gpt-5", "gemini-flash-latest"),
        *(4, 7, 200),
    ]
    assert 0 < answered["first_byte"] <= answered["total"] < 5
    assert abs(answered["time"] - time.time()) < 60
    assert (lost["route"], lost["status"]) == ("POST /v1/nonsense", 404)
    assert [sum(numbers) for numbers in zip(*state["minutes"])] == [2, 11]
    for secret in ("my secret", "Hello", "AIza", "the-key", proxy.scope_of("the-key")):
        assert secret not in text


def test_with_keys_of_their_own_users_see_their_own_requests_only(gemini):
    with serving(gemini.url, client_keys=True) as server:
        for key in ("alice", "bob", "bob"):
            post(server, body=chat(model=f"tuned-{key}"), x_api_key=key)
        for key, count in (("alice", 1), ("bob", 2), ("eve", 0)):
            state = state_of(server, x_api_key=key)
            until(lambda k=key, n=count: len(state_of(server, x_api_key=k)["requests"]) == n)
            assert {row["model"] for row in state["requests"]} <= {f"tuned-{key}"}
        with RawClient(server) as client:
            assert client.request("GET", "/status")[0] == 401


@pytest.mark.parametrize("api_key, count", [("alice", 1), ("bob", 0)])
def test_models_that_will_go_are_shown_to_those_who_use_them(gemini, api_key, count):
    gemini.say([{**chunk("a"), "modelStatus": LEGACY}, whole("b")])
    with serving(gemini.url, client_keys=True, workers=2) as server:
        post(server, x_api_key="alice")
        until(lambda: state_of(server, x_api_key="alice")["retirements"])
        words = f"the model {FLASH} will go on 2026-10-16"
        texts = state_of(server, x_api_key=api_key)["retirements"]
    assert [text.startswith(words) for text in texts] == [True] * count
    assert all("one of the workers" in text for text in texts)


def test_the_last_requests_tell_which_model_did_not_answer(gemini):
    gemini.say(gemini_error(503, "overloaded"), whole("b"))
    with serving(gemini.url, aliases=(("m", NEWEST, FLASH),)) as server:
        post(server, body=chat(model="m"))
        until(lambda: state_of(server)["requests"])
        (row,) = state_of(server)["requests"]
    assert (row["model"], row["answered_by"]) == ("m", f"{FLASH}; {NEWEST}: overloaded")


# ---- one connection ----


def test_a_connection_serves_one_request_after_another(server):
    with RawClient(server) as client:
        for _ in range(3):
            status, headers, _ = client.request("POST", "/v1/chat/completions", chat())
            assert status == 200
            assert "connection" not in headers


def test_requests_may_come_before_the_answers_to_earlier_ones(server):
    with RawClient(server) as client:
        for i in range(3):
            client.send(raw_chat(messages=[user(f"number {i}")], stream=i == 1))
        for i in range(3):
            assert f"number {i}" in client.reply()[2].decode()


def test_a_connection_ends_if_the_client_says_so(server):
    with RawClient(server) as client:
        headers = client.request("GET", "/healthz", Connection="close")[1]
        assert headers["connection"] == "close"
        assert client.ended()


@pytest.mark.parametrize("stream", [False, True])
def test_an_http_1_0_client_gets_no_chunks_and_its_connection_ends(server, stream):
    with RawClient(server) as client:
        status, headers, body = client.request(
            "POST", "/v1/chat/completions", chat(stream=stream), version="1.0"
        )
        assert status == 200
        assert "transfer-encoding" not in headers
        assert b"Hello" in body
        assert client.ended()


def test_an_http_1_0_client_may_keep_its_connection(server):
    with RawClient(server) as client:
        for _ in range(2):
            headers = client.request("GET", "/", version="1.0", Connection="keep-alive")[1]
            assert headers["connection"] == "keep-alive"


def test_an_http_1_1_request_without_a_host_is_a_400(server, gemini):
    with RawClient(server) as client:
        reply = client.request("POST", "/v1/chat/completions", chat(), Host=None)
        assert reply[0] == 400
        assert error_of(reply)["message"] == "This HTTP/1.1 request has no Host header."
        assert client.ended()
    assert not gemini.bodies


def test_an_http_1_0_request_needs_no_host(server):
    with RawClient(server) as client:
        assert client.request("GET", "/healthz", version="1.0", Host=None)[0] == 200


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_body_may_come_in_chunks_with_extensions_and_trailers(server, size):
    data = json.dumps(chat()).encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    with RawClient(server) as client:
        client.send(CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        client.send(b"0\r\nX-Sum: 1\r\n\r\n")
        assert client.reply()[0] == 200
        assert client.request("GET", "/healthz")[0] == 200


def test_a_client_that_expects_100_continue_gets_it(server):
    head, _, data = raw_chat().partition(b"\r\n\r\n")
    with RawClient(server) as client:
        client.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.file.readline() == b"\r\n"
        assert client.send(data).reply()[0] == 200


def test_an_http_1_0_client_gets_no_100_continue(server):
    with RawClient(server) as client:
        client.send(CHAT_HEAD.replace(b"/1.1", b"/1.0"))
        client.send(b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}")
        assert client.file.readline() == b"HTTP/1.1 400 Bad Request\r\n"


@pytest.mark.parametrize(
    "options, ends",
    [
        ("close", True),
        ("Upgrade ,\tClose", True),
        ("keep-alive, not-close, closed", False),
        ("x-close", False),
    ],
)
def test_connection_is_a_list_of_tokens(server, options, ends):
    with RawClient(server) as client:
        headers = client.request("GET", "/healthz", Connection=options)[1]
        assert ("connection" in headers) is ends


BAD_FRAMING = [
    b"Content-Length: -1",
    b"Content-Length: +5",
    b"Content-Length: 5_0",
    b"Content-Length: 5, 5",
    b"Content-Length: 5\r\nContent-Length: 5",
    b"Content-Length: \xd9\xa3",
    b"Content-Length:",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding:\r\n chunked",
    b"X: y\rContent-Length: 5",
    b"no colon\r\nContent-Length: 5",
    b": x\r\nContent-Length: 5",
    b"Content-Length\0: 5",
    b"Host: other",
    b"X-A: \0",
    b"X-Long: " + b"x" * 100_000,
]


@pytest.mark.parametrize("field", BAD_FRAMING, ids=lambda field: repr(field[:40]))
def test_a_head_that_could_be_read_in_two_ways_is_refused_and_ends_the_connection(
    server, gemini, field
):
    with RawClient(server) as client:
        reply = client.send(CHAT_HEAD + field + b"\r\n\r\n").reply()
        assert 400 <= reply[0] < 500
        assert error_of(reply)
        assert reply[1]["connection"] == "close"
        assert client.ended()
    assert not gemini.bodies


@pytest.mark.parametrize("path", [b"/", b"/healthz", b"/v1/nonsense"])
@pytest.mark.parametrize(
    "field",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Content-Length: +5",
        b"Transfer-Encoding: gzip",
    ],
)
def test_ambiguous_framing_is_a_400_whatever_the_path(server, path, field):
    with RawClient(server) as client:
        head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\nhello" % (path, field)
        status, headers, _ = client.send(head).reply()
        assert status == 400
        assert headers["connection"] == "close"
        assert client.ended()


def chunked_chat(extension=b"", end=b"0\r\n\r\n"):
    """The bytes of a chat completion in one chunk."""
    data = json.dumps(chat()).encode()
    head = CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"%x%b\r\n%b\r\n%b" % (len(data), extension, data, end)


@pytest.mark.parametrize(
    "extension", [b";a", b";a=b;c=d", b' ; a = "b; \\" \xe9"', b";a=b ;c"], ids=repr
)
def test_a_chunk_may_have_extensions(server, extension):
    with RawClient(server) as client:
        assert client.send(chunked_chat(extension)).reply()[0] == 200


@pytest.mark.parametrize(
    "extension", [b" ", b";", b";;a", b";[=x", b";a=\0", b";a=", b';a="b', b";a=b c"], ids=repr
)
def test_a_malformed_chunk_extension_is_a_400(server, extension):
    with RawClient(server) as client:
        assert client.send(chunked_chat(extension)).reply()[0] == 400
        assert client.ended()


@pytest.mark.parametrize(
    "end",
    [
        b"0\r\n\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\nX: y\n\r\n",
        b"0\r\nX: \0\r\n\r\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\n folded\r\n\r\n",
    ],
    ids=repr,
)
def test_trailers_are_read_as_strictly_as_headers(server, end):
    with RawClient(server) as client:
        assert client.send(chunked_chat(end=end)).reply()[0] == 400
        assert client.ended()


@pytest.mark.parametrize("count, status", [(199, 200), (200, 431)])
def test_a_head_has_at_most_200_header_lines(server, count, status):
    with RawClient(server) as client:
        lines = b"".join(b"X-%d: y\r\n" % i for i in range(count))
        client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n")
        assert client.reply()[0] == status


BAD_CHUNKS = [
    b"zz\r\n",
    b"-5\r\n",
    b"0x5\r\n",
    b"5 5\r\n",
    b"f" * 17 + b"\r\n",
    b"\r\n",
    b"2\r\n{}XX\r\n",
    b"1;" + b"x" * 5000,
    b"fffffff0\r\n",
]


@pytest.mark.parametrize("chunks", BAD_CHUNKS)
def test_broken_chunks_are_refused_and_end_the_connection(server, chunks):
    with RawClient(server) as client:
        client.send(CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert 400 <= client.reply()[0] < 500
        assert client.ended()


BAD_REQUEST_LINES = [
    b"GARBAGE\r\n",
    b"GET /healthz HTTP/9\r\n",
    b"GET  /healthz HTTP/1.1\r\n",
    b"\0\1\2\r\n",
    b"get /x http/1.1\r\n",
    b"GET /" + b"x" * 99999,
]


@pytest.mark.parametrize("request_line", BAD_REQUEST_LINES, ids=lambda line: repr(line[:30]))
def test_a_bad_request_line_is_refused_and_ends_the_connection(server, request_line):
    with RawClient(server) as client:
        assert client.send(request_line + b"\r\n").reply()[0] in (400, 414)
        assert client.ended()


def test_a_body_that_is_too_large_is_a_413(server, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_BODY_BYTES", 1000)
    assert post(server, body=b"x" * 2000)[0] == 413


@pytest.fixture
def half_body(gemini, monkeypatch):
    """(a server that takes 1,000 bytes of bodies at a time, a client that has sent 600 of 800)"""
    monkeypatch.setattr(proxy, "MAX_ALL_BODIES_BYTES", 1000)
    with serving(gemini.url) as server, RawClient(server) as client:
        data = json.dumps(chat()).encode().ljust(800)
        client.send(CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        client.send(b"258\r\n" + data[:600] + b"\r\n")
        until(lambda: metrics_of(server)["body_bytes"] == 600)
        client.rest = b"c8\r\n" + data[600:] + b"\r\n0\r\n\r\n"
        yield server, client


@pytest.mark.parametrize(
    "body, headers",
    [
        (b"x" * 500, {}),
        (b"1f4\r\n%b\r\n0\r\n\r\n" % (b"x" * 500), {"Transfer_Encoding": "chunked"}),
        (gzip.compress(b" " * 500), {"Content_Encoding": "gzip"}),
    ],
    ids=["a length", "chunks", "gzip"],
)
def test_bodies_that_are_too_large_together_are_a_503(half_body, body, headers):
    server, first = half_body
    fields = {"Content_Length": None, **headers} if "Transfer_Encoding" in headers else headers
    reply = post(server, body=body, **{k.replace("_", "-"): v for k, v in fields.items()})
    assert reply[0] == 503
    assert reply[1]["retry-after"] == "5"
    assert "too many large requests" in error_of(reply)["message"]
    assert first.send(first.rest).reply()[0] == 200, "the first one goes on"


def test_what_a_body_goes_on_from_counts_with_it(half_body):
    server, first = half_body
    assert first.send(first.rest).reply()[0] == 200
    until(lambda: metrics_of(server)["body_bytes"] == 0)
    stored = post_json(server, "/v1/responses", {"model": FLASH, "input": "x" * 300})
    until(lambda: metrics_of(server)["body_bytes"] == 0)
    body = {"model": FLASH, "input": "y", "previous_response_id": stored["id"]}
    assert post(server, "/v1/responses", body)[0] == 503
    until(lambda: metrics_of(server)["body_bytes"] == 0)


def test_a_body_counts_until_its_answer_ends(half_body):
    server, first = half_body
    assert first.send(first.rest).reply()[0] == 200
    until(lambda: metrics_of(server)["body_bytes"] == 0)
    assert post(server, body=json.dumps(chat()).encode().ljust(900))[0] == 200


def test_a_body_of_a_client_that_left_counts_no_longer(half_body):
    server, first = half_body
    first.socket.shutdown(socket.SHUT_RDWR)
    until(lambda: metrics_of(server)["body_bytes"] == 0)


def test_a_body_may_come_in_gzip(server):
    body = gzip.compress(json.dumps(chat()).encode())
    assert post(server, body=body, Content_Encoding="gzip")[0] == 200


def test_a_body_that_unpacks_to_too_much_is_a_413(server, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_UNPACKED_BYTES", 1000)
    assert post(server, body=gzip.compress(b" " * 2000), Content_Encoding="gzip")[0] == 413


def test_a_body_may_unpack_to_a_hundred_times_what_came(server):
    data = json.dumps(chat(user("x" * 60_000))).encode()
    assert post(server, body=gzip.compress(data), Content_Encoding="gzip")[0] == 200
    data = json.dumps(chat(user("x" * 200_000))).encode()
    reply = post(server, body=gzip.compress(data), Content_Encoding="gzip")
    assert reply[0] == 413
    assert error_of(reply)["message"].startswith("The body of this request unpacks to more than")


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        gzip.compress(b"{}")[:-9],
        gzip.compress(b"{}") + gzip.compress(b"{}"),
        gzip.compress(b"{}") + b"\0",
    ],
    ids=["no gzip", "cut off", "two members", "something behind it"],
)
def test_broken_gzip_is_a_400(server, body):
    assert post(server, body=body, Content_Encoding="gzip")[0] == 400


def test_an_unknown_content_encoding_is_a_415(server):
    assert post(server, body=b"{}", Content_Encoding="zstd")[0] == 415


@pytest.mark.parametrize("raw", [raw for raw in RUBBISH if raw], ids=short_id)
def test_rubbish_in_a_body_is_a_400_and_the_connection_goes_on(server, gemini, raw):
    with RawClient(server) as client:
        reply = client.request("POST", "/v1/chat/completions", raw)
        assert error_of(reply)["type"] == "invalid_request_error"
        assert client.request("POST", "/v1/chat/completions", chat())[0] == 200


@pytest.mark.parametrize(
    "start_of_request",
    [b"", b"GET /hea", CHAT_HEAD + b"Content-Length: 9\r\n\r\n{"],
    ids=["nothing", "a part of the head", "a part of the body"],
)
def test_a_client_that_falls_silent_is_hung_up_on(gemini, monkeypatch, start_of_request):
    monkeypatch.setattr(proxy, "CLIENT_SECONDS", 0.1)
    with serving(gemini.url) as server, RawClient(server) as client:
        assert client.send(start_of_request).ended()


# ---- who may call ----


ALLOWED_ORIGINS = [
    "http://localhost:3000",
    "https://127.0.0.1",
    "app://obsidian.md",
    "vscode-webview://1k",
    "file://",
]
FOREIGN_ORIGINS = [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://localhost@evil.example",
    "null",
]


@pytest.mark.parametrize("origin", ALLOWED_ORIGINS)
def test_pages_of_this_machine_and_apps_may_call(server, origin):
    status, headers, _ = post(server, Origin=origin)
    assert status == 200
    assert headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_foreign_pages_may_not_call(server, gemini, origin):
    status, headers, _ = post(server, Origin=origin)
    assert status == 403
    assert "access-control-allow-origin" not in headers
    assert not gemini.bodies


def preflight(server, origin, names):
    with RawClient(server) as client:
        fields = {"Origin": origin, "Access_Control_Request_Headers": names}
        return client.request("OPTIONS", "/v1/chat/completions", **fields)


@pytest.mark.parametrize("origin", ALLOWED_ORIGINS)
def test_a_preflight_allows_the_headers_that_the_page_names(server, origin):
    status, headers, _ = preflight(server, origin, "authorization, x-new")
    assert status == 204
    assert headers["access-control-allow-headers"] == "authorization, x-new"
    assert headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_preflight_of_a_foreign_page_is_refused(server, origin):
    assert preflight(server, origin, "authorization")[0] == 403


def test_the_headers_of_a_preflight_stay_small(server):
    headers = preflight(server, "http://localhost", "a, " + "x" * 60_000)[1]
    assert sum(map(len, headers.values())) < 8000


@pytest.mark.parametrize(
    "origins, origin, status",
    [
        (("https://chat.example",), "https://chat.example", 200),
        (("https://chat.example",), "https://evil.chat.example", 403),
        (("*",), "null", 200),
    ],
)
def test_origins_can_be_added(gemini, origins, origin, status):
    with serving(gemini.url, origins=origins) as server:
        assert post(server, Origin=origin)[0] == status


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.2:80", 200),
        ("[::1]:5555", 200),
        ("host.docker.internal", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("localhost:1:2", 403),
    ],
)
def test_a_foreign_name_for_this_machine_is_refused(server, host, status):
    assert post(server, Host=host)[0] == status


BROWSER = {"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}


@pytest.mark.parametrize(
    "host, origins, status",
    [
        ("localhost:5555", (), 200),
        ("app.localhost", (), 200),
        ("box.local", (), 403),
        ("host.docker.internal:5555", (), 403),
        ("box.local:5555", ("http://box.local:3000",), 200),
        ("Box.local", ("https://box.local/",), 200),
        ("other.local", ("http://box.local",), 403),
        ("box.local", ("*",), 200),
    ],
)
def test_browsers_use_the_names_of_a_lan_only_if_origins_has_them(gemini, host, origins, status):
    with serving(gemini.url, origins=origins) as server:
        assert post(server, Host=host, **BROWSER)[0] == status


@pytest.mark.parametrize(
    "site, origin, origins, status",
    [
        ("cross-site", None, (), 403),
        ("cross-site", "https://evil.example", (), 403),
        ("cross-site", "http://localhost:3000", (), 200),
        ("cross-site", None, ("*",), 200),
        ("same-origin", None, (), 200),
        ("none", None, (), 200),
    ],
)
def test_a_cross_site_request_of_a_browser_needs_an_allowed_origin(
    gemini, site, origin, origins, status
):
    with serving(gemini.url, origins=origins) as server, RawClient(server) as client:
        reply = client.request("GET", "/v1/models", Sec_Fetch_Site=site, Origin=origin)
        assert reply[0] == status


@pytest.fixture
def locked(gemini):
    """A server that wants a key of its clients."""
    with serving(gemini.url, proxy_key="px-1") as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer px-1"},
        {"Authorization": "bearer  px-1"},
        {"x-api-key": "px-1"},
        {"api-key": "px-1", "Authorization": "Bearer no"},
        {"x-goog-api-key": "px-1"},
    ],
)
def test_the_key_of_clients_may_come_in_any_usual_header(locked, gemini, headers):
    assert post(locked, **headers)[0] == 200
    assert "px-1" not in str(gemini.headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer px-2"},
        {"x-api-key": "px-11"},
        {"api-key": "PX-1"},
        {"x-api-key": "\xe9"},
    ],
)
def test_a_wrong_key_of_a_client_is_a_401(locked, headers):
    reply = post(locked, **headers)
    assert reply[0] == 401
    assert error_of(reply)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/healthz", 200),
        ("GET", "/", 200),
        ("OPTIONS", "/v1/models", 204),
        ("GET", "/v1/models", 401),
        ("GET", "/metrics", 401),
    ],
)
def test_only_the_front_page_health_checks_and_preflights_need_no_key(locked, method, path, status):
    with RawClient(locked) as client:
        assert client.request(method, path, Origin="http://localhost")[0] == status


def key_of(gemini):
    """The key that came with Gemini's last request."""
    return {name.lower(): value for name, value in gemini.headers[-1].items()}["x-goog-api-key"]


def test_the_keys_file_is_read_again_when_gemini_refuses_the_key(gemini, tmp_path, monkeypatch):
    (tmp_path / "gemini_api_key").write_bytes("AIza-new\r\n".encode("utf-16"))  # as PowerShell does
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    refusal = error_body(400, "API key not valid. Please pass a valid API key.")
    gemini.say(Say(status=400, raw=json.dumps(refusal).encode()))
    with serving(gemini.url) as server:
        assert error_of(post(server))["code"] == "invalid_api_key"
        assert key_of(gemini) == "the-key"
        assert post(server)[0] == 200
        assert key_of(gemini) == "AIza-new"


def test_clients_may_bring_their_own_gemini_keys(gemini):
    with serving(gemini.url, api="ollama", client_keys=True) as server:
        for name in ("a", "b"):
            key = f"AIza-{name}"
            assert post(server, "/api/chat", Authorization=f"Bearer {key}")[0] == 200
            assert key_of(gemini) == key


def test_with_keys_of_clients_each_sees_only_what_runs_for_it(gemini):
    with serving(gemini.url, api="ollama", client_keys=True) as server, RawClient(server) as client:
        assert post(server, "/api/chat", Authorization="Bearer AIza-a")[0] == 200
        until(lambda: server.loaded)
        running = {
            key: json.loads(client.request("GET", "/api/ps", x_api_key=key)[2])["models"]
            for key in ("AIza-a", "AIza-b")
        }
    assert [len(models) for models in running.values()] == [1, 0]


def test_a_client_without_its_own_gemini_key_is_a_401(gemini):
    with serving(gemini.url, client_keys=True) as server:
        assert error_of(post(server))["code"] == "invalid_api_key"
        assert post(server, Authorization="Bearer AIza \xe9")[0] == 401


def test_health_checks_need_no_gemini_key(gemini):
    with serving(gemini.url, client_keys=True) as server, RawClient(server) as client:
        assert client.request("GET", "/healthz")[0] == 200


def test_clients_may_need_the_servers_key_and_one_of_their_own(gemini):
    with serving(gemini.url, client_keys=True, proxy_key="px-1") as server:
        assert post(server, Authorization="Bearer px-1", x_api_key="AIza-a")[0] == 200
        assert key_of(gemini) == "AIza-a"
        assert post(server, Authorization="Bearer px-1")[0] == 401


@pytest.mark.parametrize(
    "host, origin, fields, status",
    [
        ("192.0.2.7:5555", "http://192.0.2.7:5555", {}, 200),
        ("[2001:db8::7]:5555", "http://[2001:db8::7]:5555", {}, 200),
        ("192.0.2.7:5555", "http://192.0.2.8:5555", {}, 403),
        ("192.0.2.7:5555", "http://192.0.2.7", {}, 403),
        ("rebound.example", "http://rebound.example", {}, 403),
        ("ai.example", "https://ai.example", {"proxy_key": "px-1"}, 200),
        ("ai.example", "https://other.example", {"proxy_key": "px-1"}, 403),
    ],
)
def test_the_servers_own_page_may_call_it_unless_its_name_may_be_rebound(
    gemini, host, origin, fields, status
):
    server = proxy.Server(config_for(gemini.url, host="")._replace(**fields))
    with in_thread(server):
        headers = {"Host": host, "Origin": origin, "Sec-Fetch-Site": "same-origin"}
        assert post(server, "/checks", b"", X_API_Key="px-1", **headers)[0] == status


@pytest.mark.parametrize("method, path", [("GET", "/status"), ("POST", "/checks")])
def test_what_the_page_reads_is_locked_as_the_metrics_are(gemini, method, path):
    with serving(gemini.url, proxy_key="px-1") as server, RawClient(server) as client:
        assert client.request(method, path)[0] == 401
        assert client.request(method, path, X_API_Key="wrong")[0] == 401
        assert client.request(method, path, X_API_Key="px-1")[0] == 200
        assert client.request(method, path, Host="evil.example", X_API_Key="px-1")[0] == 403
        headers = {"Origin": "https://evil.example", "X_API_Key": "px-1"}
        assert client.request(method, path, **headers)[0] == 403


# ---- the page for people ----

JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"  # HttpURLConnection's default
PEOPLE = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def page_of(server):
    """(headers, text) of the page for people."""
    with RawClient(server) as client:
        status, headers, body = client.request("GET", "/", **PEOPLE)
    assert status == 200
    return headers, body.decode()


@pytest.mark.parametrize(
    "api, text", [("openai", b"api = openai"), ("ollama", b"Ollama is running")]
)
@pytest.mark.parametrize("accept", [None, "*/*", "application/json, text/plain, */*", JAVA])
def test_only_browsers_get_the_page(gemini, api, text, accept):
    with serving(gemini.url, api=api) as server, RawClient(server) as client:
        status, headers, body = client.request("GET", "/", Accept=accept)
        assert status == 200
        assert headers["content-type"] == "text/plain; charset=utf-8"
        assert text in body
        assert page_of(server)[0]["content-type"] == "text/html; charset=utf-8"
        assert client.request("HEAD", "/", **PEOPLE)[0] == 200


def test_the_page_has_a_strict_policy_and_nothing_that_it_would_stop(server):
    headers, page = page_of(server)
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    nonce = re.fullmatch("'nonce-([\\w-]{22})'", policy["script-src"]).group(1)
    assert policy == {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert len(re.findall("<(?:style|script)\\b", page)) == page.count(f'nonce="{nonce}"') == 2
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b|localStorage", page)
    assert not re.search(r"<[^>]* (?:on\w+|style)=|\b(?:src|href)=\"(?!data:)", page)
    assert nonce not in page_of(server)[1]


def test_the_page_has_at_most_250_lines():
    assert len([*proxy.PAGE.splitlines(), *proxy.KEY_FIELD.splitlines()]) <= 250


@pytest.mark.parametrize(
    "fields, names",
    [
        ({}, []),
        ({"proxy_key": "px-1"}, ["x-api-key"]),
        ({"client_keys": True}, ["x-goog-api-key"]),
        ({"client_keys": True, "proxy_key": "px-1"}, ["x-api-key", "x-goog-api-key"]),
    ],
)
def test_the_page_asks_for_the_keys_that_this_server_wants(gemini, fields, names):
    with serving(gemini.url, **fields) as server:
        page = page_of(server)[1]
        assert re.findall('<input name="(.+?)" type="password"', page) == names
        assert "px-1" not in page
        assert "the-key" not in page


def test_every_element_that_the_pages_script_looks_for_is_there(server):
    page = page_of(server)[1]
    ids = re.findall(r'\bid="(\w+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\b(?:byId|put|attempt)\("(\w+)"', page)) <= set(ids)


def test_the_page_is_told_what_serves_and_how_clients_reach_it(gemini):
    aliases = (("<b>", "gemini-3.8-flash"),)
    with serving(gemini.url, workers=3, aliases=aliases, proxy_key="px-1") as server:
        state = state_of(server, X_API_Key="px-1")
    assert state["api"] == "openai"
    assert state["backend"] == f"the Gemini API at {gemini.url}"
    assert state["workers"] == 3
    assert state["aliases"] == ["<b>=gemini-3.8-flash"]
    assert state["client_key"] == "the value of PROXY_API_KEY"
    names = [name for name, _ in state["clients"]]
    assert "Codex CLI" in names
    assert names + state["other_clients"] == [name for name, *_ in proxy.CLIENTS]


def checks_of(server, **headers):
    status, _, body = post(server, "/checks", b"", **headers)
    assert status == 200
    return json.loads(body)


def test_the_button_checks_the_way_to_gemini(server):
    results = checks_of(server)
    names = ["memory", "name", "connection", "key", "clock", "answer"]
    assert [(row["name"], row["works"]) for row in results] == [(name, True) for name in names]
    assert "the-key" not in str(results)


def test_the_checks_tell_what_fails_and_what_to_mend(server, gemini):
    gemini.say(gemini_error(400, "API key the-key is not valid.", "INVALID_ARGUMENT"))
    *_, last = checks_of(server)
    assert (last["name"], last["works"]) == ("key", False)
    assert "is not valid" in last["text"]
    assert "the-key" not in last["text"]
    assert "aistudio" in last["mend"]


def test_the_checks_use_the_key_of_the_client_that_has_its_own(gemini):
    with serving(gemini.url, key="", client_keys=True) as server:
        assert checks_of(server, X_API_Key="alice")[-1]["works"]
    assert key_of(gemini) == "alice"


def test_checks_run_one_at_a_time_and_end_with_who_wants_them(server, gemini):
    models = Say(raw=json.dumps({"models": MODELS}).encode())
    gemini.say(models, models, Say(whole("late"), delay=30))
    with RawClient(server) as client:
        client.send(b"POST /checks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        until(lambda: gemini.bodies)
        status, headers, _ = post(server, "/checks", b"")
        assert (status, headers["retry-after"]) == (429, "5")
    assert gemini.gone.wait(5)
    until(lambda: metrics_of(server)["checks"] == 0)
    assert checks_of(server)[-1]["works"]


def test_checks_end_in_time(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "ALL_CHECKS_SECONDS", 0.3)
    models = Say(raw=json.dumps({"models": MODELS}).encode())
    gemini.say(models, models, Say(whole("late"), delay=30))
    last = checks_of(server)[-1]
    assert (last["name"], last["works"]) == ("answer", False)
    assert "silent" in last["text"]


# ---- one request ----


def test_a_question_is_answered(server):
    status, headers, body = post(server)
    answer = "Hello from the stand-in for Gemini. You said: Hi"
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert json.loads(body)["choices"][0]["message"]["content"] == answer


def test_a_stream_on_the_wire(server, gemini):
    gemini.say([chunk("Hel"), whole("lo")])
    _, headers, body = post(server, body=chat(stream=True))
    *events, done, end = body.decode().split("\n\n")
    texts = [json.loads(event[6:])["choices"][0]["delta"].get("content") for event in events]
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert texts == ["", "Hel", "lo", None]
    assert (done, end) == ("data: [DONE]", "")


def test_many_clients_are_served_at_the_same_time(server):
    def question(i):
        answers[i] = chat_message(server, user(f"user {i}"))["content"]

    answers = {}
    threads = [threading.Thread(target=question, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(answers[i].endswith(f"You said: user {i}") for i in range(20))


TEXT_CONTENT = [{"type": "text", "text": "Hi"}]
RESPONSE_STREAM = {"model": FLASH, "input": "Hi", "stream": True}
THREE_PROMPTS = {"model": FLASH, "prompt": ["a", "b", "c"], "stream": True}
OWN_TYPES = (Fields, Exchange, proxy.RequestCycle, proxy.UpstreamCall, proxy.Plan)
# What is asked and what Gemini answers, and every way in which that can end.
CHAT_ENDS = {
    "an answer": (chat(user(TEXT_CONTENT), tools=[WEATHER]), whole("Hello")),
    "a stream": (chat(stream=True), [chunk("Hel"), whole("lo")]),
    "bad JSON": (b'{"model": ', whole("Hello")),
    "JSON that is nested too deeply": (b'{"a":' * 20_000, whole("Hello")),
    "a 400 of the proxy": (chat(temperature=9), whole("Hello")),
    "a 400": (chat(), gemini_error(400, "No.")),
    "a 404 of a model": (chat(), gemini_error(404, "models/x is not found")),
    "a 429 of a stream": (chat(stream=True), gemini_error(429, "Slow down.")),
    "a repaired 400": (chat(), gemini_error(400, "Penalty is not enabled for this model")),
    "a connection that breaks": (chat(), Say(chunk("Once "), cut=0)),
    "a stream that breaks": (chat(stream=True), Say(chunk("Once "), chunk("upon"), cut=1)),
    "a stream without an end": (chat(stream=True), Say(chunk("Once "))),
    "an error event": (chat(stream=True), Say(chunk("Once "), SHED)),
    "rubbish": (chat(), Say(raw=b"nonsense")),
    "silence": (chat(), Say(whole("Hello"), delay=0.4)),
    "silence in a stream": (chat(stream=True), Say(chunk("Once "), whole("upon"), gap=0.4)),
}
OTHER_ENDS = {
    "a 429 of several": ("/v1/completions", THREE_PROMPTS, gemini_error(429, "Slow down.")),
    "a response": ("/v1/responses", {"model": FLASH, "input": "Hi"}, whole("Hello")),
    "a response that breaks": ("/v1/responses", RESPONSE_STREAM, Say(chunk("Once "), cut=1)),
    "no image": ("/v1/images/generations", {"model": FLASH, "prompt": "x"}, whole("No.")),
}


@contextlib.contextmanager
def without_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def nothing_stays(server):
    """Whether no request is in memory any more, be it in use, in a cycle or in an error."""
    return not server.connections and not any(
        type(thing) in OWN_TYPES for thing in gc.get_objects()
    )


@pytest.mark.parametrize("body, answer", CHAT_ENDS.values(), ids=CHAT_ENDS)
def test_no_body_of_a_chat_stays_in_memory(gemini, body, answer):
    gemini.say(answer)
    with serving(gemini.url, timeout=0.2) as server, without_collector():
        post(server, body=body)
        until(lambda: nothing_stays(server))


@pytest.mark.parametrize("path, body, answer", OTHER_ENDS.values(), ids=OTHER_ENDS)
def test_no_body_stays_in_memory(server, gemini, path, body, answer):
    gemini.say(answer)
    with without_collector():
        post(server, path, body)
        until(lambda: nothing_stays(server))


@pytest.mark.parametrize("stream", [False, True])
def test_no_body_stays_in_memory_of_a_client_that_left(server, gemini, stream):
    gemini.say(Say(chunk("Once "), whole("upon"), delay=30))
    with without_collector():
        with RawClient(server) as client:
            client.send(raw_chat(stream=stream))
            until(lambda: gemini.bodies)
        until(lambda: nothing_stays(server))


def test_no_body_stays_in_memory_of_a_client_that_left_before_an_error(server, gemini, monkeypatch):
    gemini.say(Say(chunk("Once "), SHED))
    send, left = proxy.ClientSocket.send, threading.Event()

    def send_but_errors(self, data):
        if b'"error"' in data:
            left.set()
            raise proxy.ClientGoneError
        send(self, data)

    monkeypatch.setattr(proxy.ClientSocket, "send", send_but_errors)
    with without_collector():
        with RawClient(server) as client:
            client.send(raw_chat(stream=True))
            assert left.wait(5)
        until(lambda: nothing_stays(server))


def test_no_body_stays_in_memory_where_gemini_cannot_be_reached():
    with serving("http://127.0.0.1:9") as server, without_collector():
        assert post(server)[0] == 502
        until(lambda: nothing_stays(server))


def test_no_body_stays_in_memory_after_a_keep_alive(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say({"error": {"code": 429, "message": "Slow"}}, delay=0.3, status=429))
    with without_collector():
        post(server, body=chat(stream=True))
        until(lambda: nothing_stays(server))


def test_no_body_stays_in_memory_after_a_bug(server, monkeypatch):
    monkeypatch.setattr(proxy, "openai_usage", lambda usage: 1 // 0)
    with without_collector():
        assert post(server)[0] == 500
        until(lambda: nothing_stays(server))


def test_nothing_ignored_needs_no_header(server):
    assert "x-proxy-ignored" not in post(server)[1]


def test_a_header_names_what_was_ignored(server):
    names = {"a\r\nX-Injected: yes": 1, "ключ": 1}
    headers = post(server, body=chat(user="me", logit_bias={"1": 2}, **names))[1]
    assert headers["x-proxy-ignored"] == "a??X-Injected:?yes, logit_bias, user, ????"
    assert "x-injected" not in headers


def test_the_header_of_ignored_names_stays_small(server):
    body = chat(**{f"unknown_{i}": i for i in range(2000)})
    text = post(server, body=body)[1]["x-proxy-ignored"]
    assert len(text) < 4010
    assert text.endswith("...")


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_a_status_of_its_own_also_for_a_stream(server, gemini, stream):
    delay = detail("RetryInfo", retryDelay="6.2s")
    gemini.say(gemini_error(429, "Slow down.", "RESOURCE_EXHAUSTED", delay))
    reply = post(server, body=chat(stream=stream))
    assert reply[0] == 429
    assert reply[1]["retry-after"] == "7"
    assert error_of(reply)["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    "failure",
    [
        Say(chunk("Once "), SHED),
        Say(chunk("Once "), chunk("upon"), cut=1),
        Say(chunk("Once ")),
    ],
    ids=["an error event", "a connection that breaks", "no finish reason"],
)
def test_a_failure_in_mid_stream_is_the_last_event(server, gemini, failure):
    gemini.say(failure)
    status, _, body = post(server, body=chat(stream=True))
    *events, last = [json.loads(event[6:]) for event in body.decode().split("\n\n")[:-1]]
    assert status == 200
    assert [delta.get("content") for delta in deltas(events)] == ["", "Once "]
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "seconds, size, pieces", [(60.0, 16 << 10, 2), (60.0, 1, 5), (-1.0, 16 << 10, 5)]
)
def test_what_gemini_says_without_a_pause_is_sent_together(
    server, gemini, monkeypatch, seconds, size, pieces
):
    monkeypatch.setattr(proxy, "MAX_UNSENT_SECONDS", seconds)
    monkeypatch.setattr(proxy, "MAX_UNSENT_BYTES", size)
    sent, send = [], proxy.ClientSocket.send
    monkeypatch.setattr(
        proxy.ClientSocket, "send", lambda self, data: (sent.append(data), send(self, data))
    )
    lines = [b"data: %s\r\n\r\n" % json.dumps(one).encode() for one in (chunk("a"), whole("b"))]
    gemini.say(Say(raw=b"".join(lines)))
    body = post(server, body=chat(stream=True))[2]
    assert [len(event) > 0 for event in body.split(b"\n\n")] == [True] * 5 + [False]
    assert len(sent) == pieces
    assert b"".join(sent).count(b"\r\ndata: ") == 5  # each one is a chunk of its own


def test_no_event_waits_for_what_gemini_says_later(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_UNSENT_SECONDS", 60.0)
    gemini.say(Say(chunk("a"), chunk("b"), whole("c"), gap=0.1, delay=0.1))
    with RawClient(server) as client:
        client.send(raw_chat(stream=True))
        while client.file.readline() != b"\r\n":
            pass
        arrivals = [(client.read_chunk(), time.monotonic()) for _ in range(4)]
    _, *said = arrivals  # after the event with the role
    assert [word in data for word, (data, _) in zip((b'"a"', b'"b"', b'"c"'), said)] == [True] * 3
    (_, a), (_, b), (_, c) = said
    assert min(b - a, c - b) > 0.05


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", {"messages": [user("Hi")], "tools": [WEATHER]}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_no_event_waits_for_the_memory(server, gemini, monkeypatch, path, body):
    monkeypatch.setattr(proxy, "MAX_UNSENT_SECONDS", 60.0)
    seen, put = threading.Event(), proxy.Memory.put
    waited = []

    def slow_put(self, *values):
        waited.append(seen.wait(10))
        put(self, *values)

    monkeypatch.setattr(proxy.Memory, "put", slow_put)
    parts = ["Once", call("weather", {}, "s")] if "tools" in body else ["Once"]
    lines = [
        b"data: %s\r\n\r\n" % json.dumps(one).encode() for one in (chunk("One"), whole(*parts))
    ]
    gemini.say(Say(raw=b"".join(lines)))
    data = json.dumps({"model": NEWEST, "stream": True, **body}).encode()
    with RawClient(server) as client:
        client.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode())
        client.send(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        while b"Once" not in client.file.readline():
            pass
        seen.set()
        while client.file.readline() not in (b"0\r\n", b""):
            pass
    assert waited
    assert all(waited)


def test_a_stream_that_cannot_carry_errors_keeps_what_came_before_one(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_UNSENT_SECONDS", 60.0)
    lines = [b"data: %s\r\n\r\n" % json.dumps(one).encode() for one in (chunk(AUDIO), chunk(AUDIO))]
    gemini.say(Say(raw=b"".join([*lines, b"data: [\r\n\r\n"])))
    with RawClient(server) as client:
        data = json.dumps(PCM_BODY).encode()
        client.send(b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\n")
        client.send(b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert client.file.read().count(PCM_SAMPLES) == 2


def test_a_silent_stream_is_kept_alive(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say(whole("Hello"), delay=0.3))
    body = post(server, body=chat(stream=True))[2]
    assert re.match(rb"(: keep-alive\n\n){2,}data: {", body)


def test_a_refusal_after_a_keep_alive_is_the_last_event(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say({"error": {"code": 429, "message": "Slow"}}, delay=0.3, status=429))
    status, _, body = post(server, body=chat(stream=True))
    assert status == 200
    assert b'data: {"error":{"message":"Slow"' in body
    assert not body.endswith(b"[DONE]\n\n")


def test_a_body_that_is_slow_to_come_makes_no_keep_alive_due(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 1.0)
    gemini.say(Say({"error": {"code": 400, "message": "No"}}, delay=0.1, status=400))
    data = json.dumps(chat(stream=True)).encode()
    with RawClient(server) as client:
        client.send(CHAT_HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data[:9])
        time.sleep(1.1)  # longer than a stream may be silent
        assert client.send(data[9:]).reply()[0] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_call_to_gemini(server, gemini, stream):
    gemini.say(Say(chunk("Once "), whole("upon"), delay=30))
    with RawClient(server) as client:
        client.send(raw_chat(stream=stream))
        until(lambda: gemini.bodies)
    assert gemini.gone.wait(2)


@pytest.mark.parametrize("path, text", [("/healthz", "ok"), ("/", "api = openai")])
def test_the_servers_own_pages(server, path, text):
    with RawClient(server) as client:
        assert text in client.request("GET", path)[2].decode()
        assert client.request("HEAD", path)[0] == 200


@pytest.mark.parametrize(
    "target, host, version, status",
    [
        ("http://localhost/healthz", "localhost", "1.1", 200),
        ("HTTP://LOCALHOST:80/healthz?x", "localhost:80", "1.1", 200),
        ("http://localhost", "localhost", "1.1", 200),
        ("http://localhost/healthz", None, "1.0", 200),
        ("http://evil.example/healthz", "localhost", "1.1", 400),
        ("http://evil.example/healthz", "evil.example", "1.1", 403),
        ("http://evil.example/healthz", None, "1.0", 403),
        ("http://localhost@evil.example/healthz", "localhost", "1.1", 400),
        ("healthz", "localhost", "1.1", 400),
        ("ftp://localhost/healthz", "localhost", "1.1", 400),
    ],
)
def test_the_target_may_be_a_whole_url_of_this_server(server, target, host, version, status):
    with RawClient(server) as client:
        assert client.request("GET", target, version=version, Host=host)[0] == status


@pytest.mark.parametrize(
    "method, target",
    [("TRACE", "/healthz"), ("CONNECT", "localhost:443"), ("PROPFIND", "/"), ("get", "/healthz")],
)
def test_a_method_that_nothing_here_has_is_a_501(server, method, target):
    with RawClient(server) as client:
        reply = client.request(method, target)
        assert reply[0] == 501
        assert error_of(reply)["message"] == f"The method {method} is not implemented."


def test_a_wrong_method_is_a_405_that_names_the_right_one(server):
    with RawClient(server) as client:
        status, headers, _ = client.request("GET", "/v1/chat/completions")
        assert status == 405
        assert headers["allow"] == "POST"


def test_an_unknown_path_is_a_404_that_names_it(server):
    with RawClient(server) as client:
        reply = client.request("GET", "/v1/nonsense")
        assert reply[0] == 404
        assert error_of(reply)["message"] == "Invalid URL (GET /v1/nonsense)"


def test_the_events_of_a_streamed_response_are_named(server):
    _, headers, body = post(server, "/v1/responses", RESPONSE_STREAM)
    *frames, end = body.decode().split("\n\n")
    events = [re.fullmatch(r"event: (.+)\ndata: (.+)", frame).groups() for frame in frames]
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all(name == json.loads(data)["type"] for name, data in events)
    assert events[-1][0] == "response.completed"
    assert end == ""


def test_a_streamed_response_that_breaks_off_is_a_failed_response(server, gemini):
    gemini.say(Say(chunk("Hel"), cut=1))
    body = post(server, "/v1/responses", RESPONSE_STREAM)[2]
    last = json.loads(body.decode().rstrip().rpartition("data: ")[2])
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"


def test_a_refused_response_has_a_status_of_its_own(server, gemini):
    gemini.say(gemini_error(429, "Slow down.", "X"))
    assert post(server, "/v1/responses", RESPONSE_STREAM)[0] == 429


# ---- further models of an alias ----


FURTHER = (("mine", NEWEST, FLASH),)
OVERLOADED = gemini_error(503, "This model is experiencing high demand.", "UNAVAILABLE")
NOT_FOUND = gemini_error(404, "Gone.", "NOT_FOUND")
DAILY = detail("QuotaFailure", violations=[{"quotaId": "GenerateRequestsPerDay"}])


@pytest.fixture
def further(gemini):
    """A server with an alias for two models."""
    with serving(gemini.url, aliases=FURTHER) as server:
        yield server


def models_of(gemini):
    """The models that were asked for something."""
    return [model_and_verb(path)[0] for path in gemini.paths]


def say_by_model(gemini, **answers):
    """Let these models (with _ for - and .) give the same answer to each call."""
    answer_to = gemini.answer_to

    def answer_of_model(path, headers, body):
        answer = answer_to(path, headers, body)
        return answers.get(re.sub(r"[-.]", "_", model_and_verb(path)[0]), answer)

    gemini.answer_to = answer_of_model


def each_way(server):
    """Whole answers and streams, each while no model is passed over."""
    for stream in (False, True):
        server.gemini.cooldowns.ends.clear()
        yield stream


@pytest.mark.parametrize(
    "path, body, good",
    [
        ("/v1/chat/completions", {"messages": [user("Hi")]}, whole("Hello")),
        ("/v1/completions", {"prompt": "Hi"}, whole("Hello")),
        ("/v1/responses", {"input": "Hi"}, whole("Hello")),
        ("/v1/responses/compact", {"input": "Hi"}, whole("Hello")),
        ("/v1/messages", {"messages": [user("Hi")], "max_tokens": 99}, whole("Hello")),
        ("/v1/images/generations", {"prompt": "x"}, whole(IMAGE)),
        ("/v1/audio/speech", {"input": "x"}, whole(AUDIO)),
        ("/v1/embeddings", {"input": "x"}, {"embeddings": [VECTOR]}),
        ("/api/chat", {"messages": [user("Hi")]}, whole("Hello")),
        ("/api/generate", {"prompt": "Hi"}, whole("Hello")),
        ("/api/embed", {"input": "x"}, {"embeddings": [VECTOR]}),
        ("/api/embed", {"input": "x", "truncate": False}, {"embeddings": [VECTOR]}),
    ],
)
def test_the_next_model_answers_in_every_dialect(gemini, log_lines, path, body, good):
    api = "openai" if path.startswith("/v1/") else "ollama"
    with serving(gemini.url, api, aliases=FURTHER) as server:
        with RawClient(server) as client:
            client.request("GET", "/v1/models")  # is kept for a while
        for stream in each_way(server):
            gemini.say(OVERLOADED, good)
            reply = post(server, path, {"model": "mine", "stream": stream, **body})
            assert (reply[0], reply[1]["x-proxy-model"]) == (200, FLASH), reply[2]
            assert b"error" not in reply[2].replace(b'"error":null', b"")
        assert models_of(gemini) == [NEWEST, FLASH] * 2
        assert metrics_of(server)['fallbacks_total{reason="overloaded"}'] == 2
    assert "".join(log_lines).count(f" 'mine' ({FLASH}; {NEWEST}: overloaded) ") == 2


def test_the_next_model_gets_the_file_of_a_form(gemini, further):
    gemini.say(OVERLOADED, whole("God morgen."))
    raw, kind = form(("model", "mine"), ("file", "a.wav", "audio/wav", RIFF))
    reply = post(further, "/v1/audio/transcriptions", raw, Content_Type=kind)
    assert reply[0] == 200
    sent = [body["contents"][0]["parts"][0] for body in gemini.bodies]
    assert models_of(gemini) == [NEWEST, FLASH]
    assert sent[0]["inlineData"] == sent[1]["inlineData"]


@pytest.mark.parametrize(
    "failure, reason, asked",
    [
        (OVERLOADED, "overloaded", 1),
        (gemini_error(529, "Overloaded"), "overloaded", 1),
        (gemini_error(429, "Slow", "X", detail("RetryInfo", retryDelay="48s")), "quota", 1),
        (gemini_error(429, "Resource has been exhausted."), "quota", 1),
        (gemini_error(429, "No more today", "X", DAILY), "quota", 1),
        (gemini_error(429, "Slow", "X", detail("RetryInfo", retryDelay="0.01s")), "quota", 3),
        (gemini_error(404, f"models/{NEWEST} is no longer available"), "not_found", 1),
        (Say(SHED), "overloaded", 1),
        (Say(whole("late"), delay=30), "silent", 1),
    ],
)
def test_the_next_model_is_asked_where_it_can_help(
    gemini, log_lines, monkeypatch, failure, reason, asked
):
    monkeypatch.setattr(proxy.random, "uniform", lambda low, high: 0.01)
    say_by_model(gemini, gemini_3_8_flash=failure)
    with serving(gemini.url, aliases=FURTHER, timeout=0.6) as server:
        for stream in each_way(server):
            reply = post(server, body=chat(model="mine", stream=stream))
            assert (reply[0], reply[1]["x-proxy-model"]) == (200, FLASH)
        assert models_of(gemini) == ([NEWEST] * asked + [FLASH]) * 2
        assert metrics_of(server)[f'fallbacks_total{{reason="{reason}"}}'] == 2
    assert f" ({FLASH}; {NEWEST}: {reason}) " in str(log_lines)


def test_the_next_model_is_not_asked_for_what_it_would_refuse_too(gemini, further, monkeypatch):
    monkeypatch.setattr(proxy.random, "uniform", lambda low, high: 0.01)
    for status in (400, 401, 403, 413, 500, 502):
        gemini.say(*[gemini_error(status, "No.")] * 3)
        reply = post(further, body=chat(model="mine"))
        assert (reply[0], reply[1]["x-proxy-model"]) == (status, NEWEST)
    assert set(models_of(gemini)) == {NEWEST}


def test_the_next_model_is_not_asked_after_the_first_byte(gemini, further):
    gemini.say(Say(chunk("Once "), SHED))
    status, headers, body = post(further, body=chat(model="mine", stream=True))
    assert (status, headers["x-proxy-model"]) == (200, NEWEST)
    assert b'"error"' in body
    assert models_of(gemini) == [NEWEST]


def test_after_the_first_word_a_model_may_be_silent_for_as_long_as_the_last_one(gemini):
    gemini.say(Say(chunk("Once "), whole("upon"), gap=0.5))
    with serving(gemini.url, aliases=FURTHER, timeout=0.8) as server:
        body = post(server, body=chat(model="mine", stream=True))[2]
    assert b"upon" in body
    assert models_of(gemini) == [NEWEST]


@pytest.mark.parametrize(
    "api, path",
    [("openai", "/v1/chat/completions"), ("openai", "/v1/responses"), ("ollama", "/api/chat")],
)
def test_a_stream_that_a_keep_alive_opened_goes_on_with_the_next_model(
    gemini, api, path, monkeypatch
):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say(whole("late"), delay=30), Say(chunk("Hel"), whole("lo"), delay=0.2))
    with serving(gemini.url, api, aliases=FURTHER, timeout=0.6) as server:
        body = {**chat(model="mine", stream=True), "input": "Hi"}
        if path == "/v1/responses":
            del body["messages"]
        status, headers, data = post(server, path, body)
    assert status == 200
    assert "x-proxy-model" not in headers
    assert b"Hel" in data
    assert b"late" not in data
    assert models_of(gemini) == [NEWEST, FLASH]


def test_a_client_that_leaves_asks_no_further_model(gemini, further):
    gemini.say(Say(whole("late"), delay=30))
    with RawClient(further) as client:
        client.send(raw_chat(model="mine"))
        until(lambda: gemini.bodies)
    assert gemini.gone.wait(2)
    until(lambda: requests_counted(further, CHAT_ROUTE_NAME, 499) == 1)
    assert models_of(gemini) == [NEWEST]


@pytest.mark.parametrize("last", [gemini_error(404, "Gone."), gemini_error(400, "No.")])
def test_if_no_model_answers_the_first_ones_error_is_told(gemini, further, log_lines, last):
    for stream in each_way(further):
        gemini.say(gemini_error(429, "Slow.", "X", detail("RetryInfo", retryDelay="48s")), last)
        status, headers, body = post(further, body=chat(model="mine", stream=stream))
        assert (status, headers["x-proxy-model"], headers["retry-after"]) == (429, NEWEST, "48")
        assert json.loads(body)["error"]["message"] == "Slow."
    until(lambda: any("429" in line for line in log_lines))
    assert f" 'mine' ({NEWEST}; {NEWEST}: quota" in str(log_lines)


def test_the_first_ones_error_is_told_in_a_stream_that_a_keep_alive_opened(
    gemini, further, monkeypatch
):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    first = Say(*OVERLOADED.chunks, status=503, delay=0.2)
    gemini.say(first, gemini_error(404, "Gone."))
    data = post(further, body=chat(model="mine", stream=True))[2]
    assert data.startswith(b": keep-alive")
    assert b"high demand" in data
    assert b"Gone" not in data


def test_while_a_model_is_down_no_call_is_lost_and_few_try_it(gemini, further):
    say_by_model(gemini, gemini_3_8_flash=OVERLOADED)

    def ask(_):
        return post(further, body=chat(model="mine"))[0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(200))) == [200] * 200
    assert models_of(gemini).count(FLASH) == 200
    assert models_of(gemini).count(NEWEST) <= 4
    assert metrics_of(further)['fallbacks_total{reason="cooldown"}'] >= 196


def test_a_model_that_is_passed_over_answers_where_no_other_can(gemini, further, log_lines):
    further.gemini.cooldowns.start("the-key", NEWEST, 60)
    gemini.say(OVERLOADED, whole("Hello"))
    assert post(further, body=chat(model="mine"))[1]["x-proxy-model"] == NEWEST
    assert models_of(gemini) == [FLASH, NEWEST]
    until(lambda: log_lines)
    assert f" ({NEWEST}; {NEWEST}: cooldown; {FLASH}: overloaded) " in log_lines[0]


def test_a_tuned_model_is_passed_over_as_well(gemini):
    say_by_model(gemini, own=OVERLOADED)
    with serving(gemini.url, aliases=(("mine", "tunedModels/own", FLASH),)) as server:
        assert [post(server, body=chat(model="mine"))[0] for _ in range(2)] == [200, 200]
    assert models_of(gemini) == ["own", FLASH, FLASH]


def test_one_call_finds_out_whether_a_model_answers_again(gemini, further):
    cooldowns = further.gemini.cooldowns
    cooldowns.ends["the-key", NEWEST] = time.monotonic() - 1, 60.0
    assert cooldowns.in_turn("the-key", (NEWEST, FLASH)) == (NEWEST, FLASH)
    assert cooldowns.in_turn("the-key", (NEWEST, FLASH)) == (FLASH, NEWEST)
    assert cooldowns.in_turn("another key", (NEWEST, FLASH)) == (NEWEST, FLASH)
    cooldowns.ends["the-key", NEWEST] = time.monotonic() - 1, 60.0
    assert post(further, body=chat(model="mine"))[1]["x-proxy-model"] == NEWEST
    until(lambda: not cooldowns.ends)


def test_a_400_shows_that_a_model_answers_again(gemini, further):
    further.gemini.cooldowns.start("the-key", NEWEST, -1)
    gemini.say(gemini_error(400, "No."))
    assert post(further, body=chat(model="mine"))[0] == 400
    assert not further.gemini.cooldowns.ends


def test_so_many_models_are_passed_over(further):
    cooldowns = further.gemini.cooldowns
    for i in range(proxy.MAX_COOLDOWNS + 5):
        cooldowns.start("the-key", f"m-{i}", 60)
    assert len(cooldowns.ends) == proxy.MAX_COOLDOWNS


@pytest.mark.parametrize("delay, seconds", [(None, 60), ("48s", 48), ("0.01s", 5), ("3600s", 60)])
def test_a_quota_says_itself_how_long_a_model_is_passed_over(delay, seconds):
    details = [detail("RetryInfo", retryDelay=delay)] if delay else []
    error = proxy.gemini_refusal(429, error_body(429, "Quota", *details))
    assert proxy.cooldown_seconds(error, "quota") == seconds


def test_a_further_model_gets_settings_of_its_own(gemini):
    gemini.say(OVERLOADED, whole("{}"))
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body = chat(model="mine", reasoning_effort="high", tools=[WEATHER], response_format=schema)
    with serving(gemini.url, aliases=FURTHER) as server:
        assert post(server, body=body)[0] == 200
    first, second = (body["generationConfig"] for body in gemini.bodies)
    assert first["thinkingConfig"] == {"thinkingLevel": "HIGH", "includeThoughts": True}
    assert second["thinkingConfig"] == {"thinkingBudget": 24576, "includeThoughts": True}
    assert ("responseJsonSchema" in first, "responseJsonSchema" in second) == (True, False)


def test_what_a_further_model_ignores_is_named(gemini):
    gemini.say(OVERLOADED, whole("Hello"))
    with serving(gemini.url, aliases=(("mine", "gemini-2.0-flash", NEWEST),)) as server:
        headers = post(server, body=chat(model="mine", presence_penalty=0.5))[1]
    assert (headers["x-proxy-model"], headers["x-proxy-ignored"]) == (NEWEST, "presence_penalty")


def test_what_was_repaired_for_a_model_is_not_named_where_the_next_one_answers(gemini, further):
    repairable = gemini_error(400, "Thinking level MEDIUM is not supported for this model.")
    gemini.say(repairable, OVERLOADED, whole("Hello"))
    headers = post(further, body=chat(model="mine", reasoning_effort="medium"))[1]
    assert models_of(gemini) == [NEWEST, NEWEST, FLASH]
    assert "x-proxy-ignored" not in headers


def test_the_time_of_an_answer_begins_with_the_first_model(gemini):
    gemini.say(Say(*OVERLOADED.chunks, status=503, delay=0.2), whole("Hello"))
    with serving(gemini.url, "ollama", aliases=FURTHER) as server:
        answer = post_json(server, "/api/chat", chat(model="mine", stream=False))
    assert answer["total_duration"] > 0.2e9


def test_a_further_model_of_another_generation_gets_the_placeholder(gemini):
    with serving(gemini.url, aliases=(("mine", NEWEST, "gemini-4-argon"),)) as server:
        gemini.say(whole(call("weather", {"city": "Oslo"}, "s")))
        message = kept(chat_message(server, model="mine", tools=[WEATHER]))
        gemini.say(OVERLOADED, whole("Sun"))
        result = tool_result(message["tool_calls"][0]["id"], "3")
        chat_message(server, user("Hi"), message, result, model="mine", tools=[WEATHER])
    signatures = [
        part["thoughtSignature"]
        for body in gemini.bodies[1:]
        for content in body["contents"]
        for part in content["parts"]
        if "functionCall" in part
    ]
    assert signatures == [sign("s"), proxy.PLACEHOLDER]


def test_a_model_that_cannot_take_a_request_is_left_out(gemini):
    gemini.say(OVERLOADED, whole("Hello"))
    with serving(gemini.url, aliases=(("mine", NEWEST, "no model", FLASH),)) as server:
        assert post(server, body=chat(model="mine"))[1]["x-proxy-model"] == FLASH
    assert models_of(gemini) == [NEWEST, FLASH]


@pytest.mark.parametrize(
    "refusals, status, prompt_tokens", [((OVERLOADED,), 200, 12), ((OVERLOADED, NOT_FOUND), 503, 8)]
)
def test_all_choices_come_from_one_model_and_the_tokens_of_each_count_once(
    gemini, further, refusals, status, prompt_tokens
):
    answer_to, left = gemini.answer_to, list(refusals)

    def refuse_the_second_prompt(path, headers, body):
        answer_to(path, headers, body)
        return left.pop(0) if left and "second" in str(body) else Say(whole("Hello"))

    gemini.answer_to = refuse_the_second_prompt
    body = {"model": "mine", "prompt": ["first", "second"]}
    reply = post(further, "/v1/completions", body)
    assert reply[0] == status
    assert models_of(gemini) == [NEWEST, NEWEST, FLASH, FLASH]
    until(lambda: requests_counted(further, "POST /v1/completions", status) == 1)
    assert metrics_of(further)['tokens_total{kind="prompt"}'] == prompt_tokens


def test_the_next_model_answers_on_vertex(google):
    google.say(OVERLOADED, whole("Hello"))
    with serving(google.url, aliases=FURTHER, backend=vertex_at(google)) as server:
        reply = post(server, body=chat(model="mine"))
    assert (reply[0], reply[1]["x-proxy-model"]) == (200, FLASH)
    assert models_of(google) == [NEWEST, FLASH]


def test_no_body_stays_in_memory_after_a_further_model(server, gemini):
    with serving(gemini.url, aliases=FURTHER) as server, without_collector():
        for answers in ((OVERLOADED, whole("Hello")), (OVERLOADED, OVERLOADED)):
            gemini.say(*answers)
            post(server, body=chat(model="mine"))
            until(lambda: nothing_stays(server))


def test_no_body_of_a_response_stays_in_memory_after_a_further_models_refusal(gemini):
    body = {"model": "mine", "input": "Hi", "stream": True}
    with serving(gemini.url, aliases=FURTHER) as server, without_collector():
        gemini.say(OVERLOADED, gemini_error(400, "No."))
        assert post(server, "/v1/responses", body)[0] == 503
        until(lambda: nothing_stays(server))


# ---- models that go ----


LEGACY = {"modelStage": "LEGACY", "retirementTime": "2026-10-16T00:00:00Z", "message": "Move on."}


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_will_go_is_logged_once_a_day_and_counted(
    server, gemini, log_lines, stream, monkeypatch
):
    gemini.say(*[[{**chunk("a"), "modelStatus": LEGACY}, whole("b")]] * 3)
    with RawClient(server) as client:
        for seconds, lines in ((86400.0, 2), (86400.0, 3), (-1.0, 5)):
            monkeypatch.setattr(proxy, "RETIREMENT_LOG_SECONDS", seconds)
            client.request("POST", "/v1/chat/completions", chat(stream=stream))
            until(lambda lines=lines: len(log_lines) == lines)
    words = "will go on 2026-10-16 and is followed by gemini-flash-latest: Move on."
    lines = [line for line in log_lines if "will go" in line]
    assert lines == [f"the model {FLASH} {words}\n"] * 2
    assert metrics_of(server)["retiring_models_total"] == 3
    assert server.gemini.retirements.models[FLASH][1] == f"the model {FLASH} {words}"


def test_a_model_that_was_listed_and_is_not_found_any_more_is_gone(
    server, gemini, log_lines, monkeypatch
):
    monkeypatch.setattr(proxy, "MODEL_LIST_SECONDS", -1)
    with RawClient(server) as client:
        client.request("GET", "/v1/models")
    missing, rest = gemini_error(404, f"models/{FLASH} is not found"), {"models": MODELS[1:]}
    gemini.say(missing, Say(raw=json.dumps(rest).encode()))
    assert post(server)[0] == 404
    until(lambda: len(log_lines) == 3)
    words = f"is gone and is followed by {NEWEST}: models/{FLASH} is not found"
    assert f"the model {FLASH} {words}\n" in log_lines
    assert server.gemini.retirements.models[FLASH][1] == f"the model {FLASH} {words}"


@pytest.mark.parametrize("words", ["is not found", "is no longer available to new users"])
def test_a_model_that_is_not_served_is_gone_only_if_gemini_says_so(
    server, gemini, log_lines, words
):
    gemini.say(gemini_error(404, f"This model models/{FLASH} {words}."))
    assert post(server)[0] == 404
    until(lambda: any("POST" in line for line in log_lines))
    assert bool(server.gemini.retirements.models) == ("no longer" in words)


def test_as_many_models_that_go_are_remembered_as_gemini_may_have(server):
    retirements = server.gemini.retirements
    for i in range(proxy.MAX_RETIREMENTS + 5):
        retirements.note(f"m-{i}", "it is gone")
    retirements.see({"name": f"models/{i}"} for i in range(proxy.MAX_LISTED_MODELS + 5))
    assert len(retirements.models) == proxy.MAX_RETIREMENTS
    assert len(retirements.listed) == proxy.MAX_LISTED_MODELS


# ---- names that stand for Gemini's models ----


@pytest.mark.parametrize("api", sorted(proxy.MOUNTS))
@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", {"messages": [user("Hi")]}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [user("Hi")], "max_tokens": 99}),
    ],
)
def test_each_chat_is_answered_for_another_makers_name(gemini, api, path, body, log_lines):
    with serving(gemini.url, api) as server:
        status, headers, data = post(server, path, {"model": "gpt-5-pro", **body})
    assert (status, json.loads(data)["model"]) == (200, "gpt-5-pro")
    assert gemini.paths == ["/v1beta/models/gemini-pro-latest:generateContent"]
    assert headers["x-proxy-model"] == "gemini-pro-latest"
    assert " 'gpt-5-pro' (gemini-pro-latest) " in log_lines[0]


@pytest.mark.parametrize("stream", [False, True])
def test_each_answer_names_its_model(server, stream):
    assert post(server, body=chat(stream=stream))[1]["x-proxy-model"] == FLASH


def test_a_refusal_names_its_model(server, gemini):
    gemini.say(gemini_error(400, "No."))
    assert post(server)[1]["x-proxy-model"] == FLASH


@pytest.mark.parametrize("size", [{}, {"dimensions": 256}])
def test_vectors_for_another_makers_name_have_its_size_unless_the_client_says(server, gemini, size):
    post_json(server, "/v1/embeddings", {"model": "text-embedding-3-small", "input": "a", **size})
    (request,) = gemini.bodies[0]["requests"]
    assert request["outputDimensionality"] == size.get("dimensions", 1536)


@pytest.mark.parametrize(
    "path, body",
    [("/api/chat", {"messages": [user("Hi")]}), ("/api/embed", {"input": "Hi"}), ("/api/show", {})],
)
def test_nothing_stands_in_for_ollamas_own_routes(gemini, path, body):
    with serving(gemini.url, api="ollama") as server:
        gemini.say(gemini_error(404, "models/gpt-5 is not found"))
        assert post(server, path, {"model": "gpt-5", **body})[0] == 404
    assert not any("latest" in path for path in gemini.paths)


def test_a_running_model_is_listed_under_its_own_name_where_it_stood_in(gemini, monkeypatch):
    latest = {**MODELS[0], "name": "models/gemini-flash-latest"}
    monkeypatch.setattr(proxy, "MODEL_LIST_SECONDS", -1)
    with serving(gemini.url, api="ollama") as server:
        post_json(server, "/v1/chat/completions", chat(model="gpt-oss:20b"))
        until(lambda: server.loaded)
        gemini.say(Say(raw=json.dumps({"models": [latest]}).encode()))
        with RawClient(server) as client:
            running = json.loads(client.request("GET", "/api/ps")[2])["models"]
    assert [entry["name"] for entry in running] == ["gemini-flash-latest:latest"]


# ---- Anthropic's API ----


@pytest.mark.parametrize("api", sorted(proxy.MOUNTS))
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/none"])
def test_errors_of_anthropics_paths_have_its_form(gemini, api, path):
    with serving(gemini.url, api) as server:
        status, headers, data = post(server, path, {"model": FLASH})
    error = json.loads(data)
    assert (error["type"], error["request_id"]) == ("error", headers["request-id"])
    assert status == {"none": 404}.get(path.rpartition("/")[2], 400)


@pytest.mark.parametrize("api", sorted(proxy.MOUNTS))
@pytest.mark.parametrize("path", ["/v1/models/none", "/v1/files"])
def test_errors_of_paths_that_anthropics_clients_share_have_its_form_for_them(gemini, api, path):
    with serving(gemini.url, api) as server, RawClient(server) as client:
        version = {"anthropic-version": "2023-06-01"}
        status, headers, data = client.request("GET", path, **version)
        shared, _, _ = client.request("GET", path)
    error = json.loads(data)
    assert (error["type"], error["error"]["type"]) == ("error", "not_found_error")
    assert error["request_id"] == headers["request-id"]
    assert status == shared == 404


@pytest.mark.parametrize("api", sorted(proxy.MOUNTS))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
def test_a_header_of_anthropics_clients_changes_no_error_of_openais_own_paths(gemini, api, path):
    with serving(gemini.url, api) as server:
        status, _, data = post(server, path, {}, anthropic_version="2023-06-01")
    assert (status, json.loads(data)["error"]["code"]) == (400, "missing_required_parameter")


@pytest.mark.parametrize("api", sorted(proxy.MOUNTS))
def test_tokens_of_a_message_are_counted_with_either_api(gemini, api):
    with serving(gemini.url, api) as server:
        counted = post_json(server, "/v1/messages/count_tokens", claude_chat())
    assert counted["input_tokens"] > 0


# ---- Gemini's own API ----


def passing(server, method, path, body=None, **headers):
    """(status, headers, body) of the answer to a request of Gemini's own API."""
    with RawClient(server) as client:
        return client.request(method, path, body, **headers)


@pytest.mark.parametrize("api", sorted(proxy.MOUNTS))
def test_bytes_of_geminis_own_api_go_in_and_come_out(gemini, api):
    answer = Say(raw=b'{\n  "candidates":  [] }\n', headers=[("X-Gemini-Service-Tier", "flex")])
    gemini.say(answer)
    body = b'{ "contents":[{"role":"user", "parts":[{"text":"caf\\u00e9"}]}] }'
    with serving(gemini.url, api) as server:
        status, headers, data = passing(server, "POST", GENERATE_PATH, body, x_goog_api_key="mine")
    method, path, sent, arrived = gemini.passed[-1]
    assert (status, data) == (200, answer.raw)
    assert headers["content-type"] == "application/json; charset=UTF-8"
    assert headers["x-gemini-service-tier"] == "flex"
    assert (method, path, arrived) == ("POST", GENERATE_PATH, body)
    assert sent["x-goog-api-key"] == "the-key"


CONTENTS = {"contents": [u("Hi")]}


def test_a_login_in_the_target_is_not_logged(server, log_lines):
    address = f"localhost:{server.server_port}"
    with RawClient(server) as client:
        client.request("GET", f"http://me:secret@{address}/v1/models", Host=f"me:secret@{address}")
    until(lambda: log_lines)
    assert log_lines[0].startswith(f"GET {address}/v1/models 403 ")


def test_a_passed_answer_is_logged_with_its_model_and_tokens(server, gemini, log_lines):
    passing(server, "POST", GENERATE_PATH + "?key=secret", CONTENTS)
    until(lambda: log_lines)
    assert re.fullmatch(rf"POST {GENERATE_PATH} 200 \d+ ms '{NEWEST}' 4\+7 tokens\n", log_lines[0])


def test_an_answer_in_gzip_passes_as_such(server, gemini):
    gemini.say(Say(raw=gzip.compress(b"{}"), headers=[("Content-Encoding", "gzip")]))
    _, headers, data = passing(server, "GET", "/v1beta/models")
    assert (headers["content-encoding"], gzip.decompress(data)) == ("gzip", b"{}")


def test_a_passed_stream_keeps_its_events(server, gemini):
    gemini.say([chunk("Hel"), whole("lo")])
    path = f"/v1/models/{NEWEST}:streamGenerateContent?alt=sse"
    _, headers, data = passing(server, "POST", path, CONTENTS)
    assert headers["content-type"] == "text/event-stream"
    assert data == event_bytes(chunk("Hel")) + event_bytes(whole("lo"))


def test_a_passed_stream_that_breaks_off_does_not_look_whole(server, gemini):
    gemini.say(Say(chunk("Hel"), chunk("lo"), cut=1))
    body = json.dumps(CONTENTS).encode()
    path = f"/v1beta/models/{NEWEST}:streamGenerateContent?alt=sse"
    with RawClient(server) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        data = client.send(head.encode() + body).file.read()
    assert b"Hel" in data
    assert not data.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("status", [400, 429, 503])
def test_refusals_of_gemini_pass_at_once_and_without_the_key(server, gemini, status):
    raw = b'{"error": {"message": "Consumer the-key is suspended"}}\n'
    gemini.say(Say(raw=raw, status=status), whole("not asked again"))
    reply = passing(server, "POST", GENERATE_PATH, CONTENTS)
    assert (reply[0], reply[2]) == (status, raw.replace(b"the-key", b"[masked]"))
    assert len(gemini.answers) == 1


def test_head_is_a_get_without_a_body(server, gemini):
    with RawClient(server) as client:
        assert client.request("HEAD", "/v1beta/models")[0] == 200
        assert client.request("GET", "/healthz")[2] == b"ok"
    assert gemini.passed[-1][0] == "GET"


def test_of_an_answer_to_head_no_more_is_read_than_its_beginning():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nabc"
    with raw_upstream(head) as url, serving(url, timeout=60.0) as server:
        with RawClient(server) as client:
            assert client.request("HEAD", "/v1beta/files/a:download")[0] == 200
            assert client.request("GET", "/healthz")[2] == b"ok"
        assert not server.gemini.pool.idle


def test_no_content_has_no_body(server, gemini):
    gemini.say(Say(raw=b"", status=204))
    with RawClient(server) as client:
        assert client.request("DELETE", "/v1beta/files/a")[0] == 204
        assert client.request("GET", "/healthz")[2] == b"ok"


def test_a_compressed_request_of_geminis_own_api_arrives_unpacked(server, gemini):
    data = json.dumps(CONTENTS).encode()
    passing(server, "POST", GENERATE_PATH, gzip.compress(data), Content_Encoding="gzip")
    _, _, sent, arrived = gemini.passed[-1]
    assert arrived == data
    assert "content-encoding" not in sent


@pytest.mark.parametrize("path", [GENERATE_PATH, "/upload/v1beta/files", "/v1beta/nonsense"])
def test_a_client_of_geminis_api_hears_of_a_wrong_key_in_googles_form(locked, gemini, path):
    status, _, data = passing(locked, "POST", path + "?key=px-2", CONTENTS)
    assert status == json.loads(data)["error"]["code"] == 401
    assert json.loads(data)["error"]["status"] == "UNAUTHENTICATED"
    assert not gemini.passed


@pytest.mark.parametrize("query", ["key=px-1", "alt=sse&%6bey=px%2D1"])
def test_the_key_of_clients_may_come_in_the_query(locked, gemini, query):
    assert passing(locked, "POST", f"{GENERATE_PATH}?{query}", CONTENTS)[0] == 200
    assert "px-1" not in str(gemini.passed)


def test_the_own_key_of_a_client_may_come_in_the_query(gemini):
    with serving(gemini.url, client_keys=True) as server:
        assert passing(server, "POST", GENERATE_PATH + "?key=AIza-a", CONTENTS)[0] == 200
        assert passing(server, "POST", GENERATE_PATH, CONTENTS)[0] == 401
    assert key_of(gemini) == "AIza-a"


def test_googles_sdk_gets_its_own_api_below_the_version_that_openais_has_too(server, gemini):
    sdk = {"x_goog_api_client": "google-genai-sdk/3.6.1"}
    assert json.loads(passing(server, "GET", "/v1/models?pageSize=5", **sdk)[2]) == {
        "models": MODELS
    }
    assert gemini.passed[-1][1] == "/v1/models?pageSize=5"
    assert passing(server, "DELETE", "/v1/files/a", **sdk)[0] == 200
    assert gemini.passed[-1][:2] == ("DELETE", "/v1/files/a")
    error = json.loads(passing(server, "GET", "/v1/nonsense", **sdk)[2])["error"]
    assert error["status"] == "NOT_FOUND"


UPLOAD = "/upload/v1beta/files"
GOOGLES_UPLOAD = "https://generativelanguage.googleapis.com/upload/v1beta/files?upload_id=a-1"


def start_upload(server, gemini, **headers):
    """The address to which the bytes of a file are to go, by the answer to the start."""
    gemini.say(Say(raw=b"", headers=[("X-Goog-Upload-URL", GOOGLES_UPLOAD)]))
    status, answer, _ = passing(server, "POST", UPLOAD, b"{}", **headers)
    assert status == 200
    return answer["x-goog-upload-url"]


def test_an_upload_goes_on_at_this_server(server, gemini):
    host = f"localhost:{server.server_port}"
    assert start_upload(server, gemini, Host=host) == f"http://{host}{UPLOAD}?upload_id=a-1"
    tls = {"Host": host, "X_Forwarded_Proto": "https"}
    assert start_upload(server, gemini, **tls) == f"https://{host}{UPLOAD}?upload_id=a-1"


@pytest.mark.parametrize("in_chunks", [False, True])
def test_an_upload_is_held_nowhere(server, gemini, monkeypatch, in_chunks):
    monkeypatch.setattr(proxy, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(proxy, "MAX_ALL_BODIES_BYTES", 1000)
    data = bytes(range(256)) * 1000
    gemini.say(Say(raw=b'{"file": {}}', headers=[("X-Goog-Upload-Status", "final")]))
    body, fields = data, {"X_Goog_Upload_Command": "upload, finalize"}
    if in_chunks:
        body = b"".join(proxy.chunk_of(data[i : i + 1024]) for i in range(0, len(data), 1024))
        body += b"0\r\n\r\n"
        fields = {**fields, "Transfer-Encoding": "chunked", "Content-Length": None}
    status, headers, answer = passing(server, "POST", f"{UPLOAD}?upload_id=a-1", body, **fields)
    _, path, sent, arrived = gemini.passed[-1]
    assert (status, headers["x-goog-upload-status"], answer) == (200, "final", b'{"file": {}}')
    assert (path, arrived) == (f"{UPLOAD}?upload_id=a-1", data)
    assert sent["x-goog-upload-command"] == "upload, finalize"


def test_an_upload_has_a_limit_of_its_own(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_UPLOAD_BYTES", 1 << 20)
    reply = passing(server, "POST", UPLOAD, b"", **{"Content-Length": str((1 << 20) + 1)})
    assert json.loads(reply[2])["error"]["message"].endswith("larger than 1 MiB.")
    assert not gemini.opened


def test_a_client_that_leaves_an_upload_ends_it(server, gemini, log_lines):
    with RawClient(server) as client:
        client.send(f"POST {UPLOAD} HTTP/1.1\r\nHost: localhost\r\n".encode())
        client.send(b"Content-Length: 1000\r\n\r\nabc")
        until(lambda: gemini.opened)
    until(lambda: log_lines)
    assert f"POST {UPLOAD} 499 " in log_lines[0]


def test_an_upload_that_gemini_refuses_early_gets_its_answer(server):
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with raw_upstream(refusal) as url, serving(url) as server:
        assert passing(server, "POST", UPLOAD, b"x" * 100)[::2] == (413, b"{}")


@pytest.mark.parametrize("path", [UPLOAD, GENERATE_PATH, "/v1/chat/completions"])
def test_what_gemini_answers_while_a_body_is_sent_is_heard_at_once(path):
    refusal = b'HTTP/1.1 413 X\r\nContent-Length: 28\r\n\r\n{"error":{"message":"Large"}}'
    body = json.dumps(chat(user("x" * 20_000_000))).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with serving(url, timeout=60.0) as server, RawClient(server) as client:

            def send():
                with contextlib.suppress(ConnectionError):  # its answer may come before the end
                    client.send(head.encode() + body)

            sender = threading.Thread(target=send)
            sender.start()
            with listener.accept()[0] as gemini:
                gemini.recv(1000)
                gemini.sendall(refusal)  # it reads no more
                assert client.file.readline().startswith(b"HTTP/1.1 413 ")
            sender.join()
            assert not server.gemini.pool.idle


@pytest.mark.parametrize("name", ["X-Goog-Upload-URL", "Location"])
def test_an_address_of_geminis_that_is_none_is_a_502(server, gemini, name):
    gemini.say(Say(raw=b"", headers=[(name, "http://[")]))
    status, _, data = passing(server, "POST", UPLOAD, b"{}")
    assert (status, json.loads(data)["error"]["status"]) == (502, "UNAVAILABLE")


def test_no_address_of_geminis_has_the_key(server, gemini):
    own = f"{GOOGLES_UPLOAD}&key=the-key&$httpMethod=PUT&upload_protocol=resumable"
    other = "https://storage.example/a?key=the-key"
    gemini.say(Say(raw=b"", headers=[("X-Goog-Upload-URL", own), ("Location", other)]))
    _, headers, _ = passing(server, "POST", UPLOAD, b"{}")
    query = "upload_id=a-1&upload_protocol=resumable"
    assert headers["x-goog-upload-url"] == f"http://localhost{UPLOAD}?{query}"
    assert "the-key" not in headers["location"]


def test_an_answer_that_has_no_body_by_its_status_has_none(server, gemini):
    gemini.say(Say(raw=b"", status=304))
    with RawClient(server) as client:
        client.send(b"GET /v1beta/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = client.file.read()
    assert re.fullmatch(rb"HTTP/1.1 304 .*?\r\n\r\nHTTP/1.1 200 .*\r\n\r\nok", data, re.S)


def test_the_bytes_of_an_upload_need_no_key_but_the_ticket_of_its_start(locked, gemini):
    path = "/" + start_upload(locked, gemini, x_goog_api_key="px-1").split("/", 3)[3]
    gemini.say(Say(raw=b"{}"))
    assert passing(locked, "POST", path, b"abc")[0] == 200
    assert gemini.passed[-1][1] == f"{UPLOAD}?upload_id=a-1"
    assert "x-goog-api-key" not in gemini.passed[-1][2]  # or it would be good for other uploads too
    assert passing(locked, "POST", path.replace("a-1", "a-2"), b"abc")[0] == 401
    assert passing(locked, "POST", path + "&upload_id=a-2", b"abc")[0] == 401
    assert passing(locked, "POST", path.replace("?", "?upload%5fid=a-2&"), b"abc")[0] == 401
    assert passing(locked, "POST", path.replace("/upload", ""), b"abc")[0] == 401
    assert passing(locked, "POST", path + "\xe9", b"abc")[0] == 401


def test_with_keys_of_clients_the_bytes_of_an_upload_need_none(gemini):
    with serving(gemini.url, client_keys=True) as server:
        gemini.say(Say(raw=b"{}"))
        assert passing(server, "POST", f"{UPLOAD}?upload_id=a-1", b"abc")[0] == 200
        assert passing(server, "POST", UPLOAD, b"abc")[0] == 401
        assert passing(server, "POST", GENERATE_PATH + "?upload_id=a-1", CONTENTS)[0] == 401
    assert "x-goog-api-key" not in gemini.passed[-1][2]


# ---- what is remembered between requests ----


def kept(message):
    """An assistant's message as most clients keep it."""
    fields = ("id", "type", "function")
    calls = [{key: item[key] for key in fields} for item in message["tool_calls"]]
    return assistant(message["content"], tool_calls=calls)


def with_other_ids(message):
    """An assistant's message from a client that gives calls ids of its own."""
    calls = [{**item, "id": f"own-{i}"} for i, item in enumerate(message["tool_calls"])]
    return {**message, "tool_calls": calls}


@pytest.fixture
def two_conversations(server, gemini):
    """The same calls in two conversations, by the name of the user."""
    messages = {}
    for name in ("Ann", "Bob"):
        calls = [call("weather", {"city": "Oslo"}, name), call("weather", {"city": "Oslo"})]
        gemini.say(whole(*calls))
        message = chat_message(server, user(f"I am {name}"), model=NEWEST, tools=[WEATHER])
        messages[name] = kept(message)
    return messages


def signatures_sent(server, gemini, name, message):
    """The signatures of the calls, when their results are sent."""
    results = [tool_result(item["id"], "rain") for item in message["tool_calls"]]
    chat_message(server, user(f"I am {name}"), message, *results, model=NEWEST, tools=[WEATHER])
    return [part.get("thoughtSignature") for part in gemini.bodies[-1]["contents"][1]["parts"]]


@pytest.mark.parametrize("name", ["Ann", "Bob"])
def test_signatures_come_back_by_the_ids_of_the_calls(server, gemini, two_conversations, name):
    message = two_conversations[name]
    assert signatures_sent(server, gemini, name, message) == [sign(name), None]


@pytest.mark.parametrize("name", ["Ann", "Bob"])
def test_signatures_come_back_by_the_conversation(server, gemini, two_conversations, name):
    message = with_other_ids(two_conversations[name])
    assert signatures_sent(server, gemini, name, message) == [sign(name), None]


def test_signatures_come_back_in_no_other_conversation(server, gemini, two_conversations):
    message = with_other_ids(two_conversations["Ann"])
    assert signatures_sent(server, gemini, "Carl", message) == [proxy.PLACEHOLDER, None]


SEARCH_PARTS = [
    {
        "toolCall": {"toolType": "GOOGLE_SEARCH_WEB", "args": {"queries": ["rain"]}, "id": "t1"},
        "thoughtSignature": sign("x"),
    },
    {
        "toolResponse": {
            "toolType": "GOOGLE_SEARCH_WEB",
            "response": {"search_suggestions": "Oslo"},
            "id": "t1",
        },
        "thoughtSignature": sign("y"),
    },
]


@pytest.mark.parametrize(
    "options, parts_between",
    [({"web_search_options": {}}, SEARCH_PARTS), ({}, [])],
    ids=["with the search", "without it"],
)
def test_the_parts_of_geminis_search_come_back_before_the_call(
    server, gemini, options, parts_between
):
    """Gemini wants them as it made them, and no client can carry them."""
    history = [user("Search, then look.")]
    for turn in (1, 2):
        gemini.say(whole("So: ", *SEARCH_PARTS, call("weather", {"city": "Oslo"}, f"turn {turn}")))
        searching = {"model": NEWEST, "tools": [WEATHER], "web_search_options": {}}
        message = chat_message(server, *history, **searching)
        history += [kept(message), tool_result(message["tool_calls"][0]["id"], "rain")]
    gemini.say(whole("Rain."))
    chat_message(server, *history, model=NEWEST, tools=[WEATHER], **options)
    for index, turn in ((1, 1), (3, 2)):
        *before, last = gemini.bodies[-1]["contents"][index]["parts"]
        assert before == [{"text": "So: "}, *parts_between]
        assert last["thoughtSignature"] == sign(f"turn {turn}")


QUESTION = {"model": NEWEST, "input": "Hi"}


@pytest.fixture
def with_client_keys(gemini):
    """A server whose clients bring their own Gemini keys."""
    with serving(gemini.url, client_keys=True) as server:
        yield server


def test_a_response_is_kept_for_its_own_key(with_client_keys):
    ann, bob = {"Authorization": "Bearer AIza-a"}, {"Authorization": "Bearer AIza-b"}
    response_id = post_json(with_client_keys, "/v1/responses", QUESTION, **ann)["id"]
    with RawClient(with_client_keys) as client:
        assert client.request("GET", f"/v1/responses/{response_id}", **ann)[0] == 200
        assert client.request("GET", f"/v1/responses/{response_id}", **bob)[0] == 404
        assert client.request("DELETE", f"/v1/responses/{response_id}", **bob)[0] == 404
        assert client.request("DELETE", f"/v1/responses/{response_id}", **ann)[0] == 200
        assert client.request("GET", f"/v1/responses/{response_id}", **ann)[0] == 404


def test_a_response_is_continued_with_its_own_key_only(with_client_keys):
    response_id = post_json(with_client_keys, "/v1/responses", QUESTION, Authorization="Bearer a")[
        "id"
    ]
    body = {**QUESTION, "previous_response_id": response_id}
    assert post(with_client_keys, "/v1/responses", body, Authorization="Bearer b")[0] == 404
    assert post(with_client_keys, "/v1/responses", body, Authorization="Bearer a")[0] == 200


def test_a_call_with_the_id_of_a_response_gets_none_of_it(with_client_keys, gemini):
    key = {"Authorization": "Bearer AIza-a"}
    answer = post_json(with_client_keys, "/v1/responses", QUESTION, **key)
    response_id = proxy.RESPONSE_PREFIX + answer["id"]
    history = [
        assistant(None, tool_calls=[tool_call(response_id, "weather", "{}")]),
        tool_result(response_id, "3"),
    ]
    body = chat(user("Hi"), *history, model=NEWEST, tools=[WEATHER])
    assert post(with_client_keys, body=body, **key)[0] == 200
    assert gemini.bodies[-1]["contents"][1]["parts"][0]["thoughtSignature"] == proxy.PLACEHOLDER


def test_a_copied_model_is_its_keys_own(gemini):
    ann, bob = {"Authorization": "Bearer AIza-a"}, {"Authorization": "Bearer AIza-b"}
    with serving(gemini.url, api="ollama", client_keys=True) as server:
        assert post(server, "/api/copy", {"source": FLASH, "destination": "mine"}, **ann)[0] == 200
        with RawClient(server) as client:
            assert b'"mine:latest"' in client.request("GET", "/api/tags", **ann)[2]
            assert b'"mine:latest"' not in client.request("GET", "/api/tags", **bob)[2]


def test_signatures_in_a_file_outlive_the_server(gemini, tmp_path):
    state = str(tmp_path / "state.db")
    gemini.say(whole(call("weather", {"city": "Oslo"}, "s")))
    with serving(gemini.url, state=state) as server:
        message = kept(chat_message(server, model=NEWEST, tools=[WEATHER]))
    result = tool_result(message["tool_calls"][0]["id"], "3")
    with serving(gemini.url, state=state) as server:
        chat_message(server, user("Hi"), message, result, model=NEWEST, tools=[WEATHER])
    assert gemini.bodies[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("s")


@pytest.mark.skipif(WINDOWS, reason="there, the folder tells who may read")
def test_the_file_of_what_is_remembered_is_its_owners_only(gemini, tmp_path):
    state = tmp_path / "state.db"
    gemini.say(whole(call("weather", {"city": "Oslo"}, "s")))
    with serving(gemini.url, state=str(state)) as server:
        chat_message(server, model=NEWEST, tools=[WEATHER])
    assert state.stat().st_mode & 0o077 == 0


@pytest.fixture
def forgetful(gemini, tmp_path):
    """An Ollama server whose file of what is remembered cannot be made."""
    with serving(gemini.url, api="ollama", state=str(tmp_path / "no" / "state.db")) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_cannot_be_kept_is_no_success(forgetful, stream):
    body = {"model": "pirate", "from": FLASH, "system": "Say arr.", "stream": stream}
    answer = post(forgetful, "/api/create", body)[2]
    assert b"cannot remember" in answer
    assert b"success" not in answer


def test_a_copy_that_cannot_be_kept_is_a_503(forgetful):
    assert post(forgetful, "/api/copy", {"source": FLASH, "destination": "mine"})[0] == 503


def test_questions_are_answered_without_a_memory(forgetful):
    assert post(forgetful, "/api/chat", chat())[0] == 200


# ---- an Ollama server ----


@pytest.fixture
def ollama_client(gemini):
    """A connection to an Ollama server."""
    with serving(gemini.url, api="ollama") as server, RawClient(server) as client:
        yield client


def test_the_front_page_of_an_ollama_server_is_ollamas(ollama_client):
    status, headers, body = ollama_client.request("GET", "/")
    assert status == 200
    assert body == b"Ollama is running"
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert ollama_client.request("HEAD", "/")[0] == 200


def test_an_ollama_stream_is_lines_of_ascii_json(ollama_client, gemini):
    gemini.say([chunk("Straße"), whole("\u2028")])
    _, headers, body = ollama_client.request("POST", "/api/chat", chat())
    assert headers["content-type"] == "application/x-ndjson"
    assert body.isascii()
    assert body.endswith(b"}\n")
    assert [json.loads(line)["done"] for line in body.split(b"\n")[:-1]] == [False, False, True]


@pytest.mark.parametrize(
    "method, path, body, status, answer",
    [
        ("POST", "/api/chat", b"", 400, b'{"error":"missing request body"}'),
        ("GET", "/api/nonsense", None, 404, b"404 page not found"),
        ("GET", "/api/chat", None, 405, b'{"error":"Not allowed to GET on /api/chat."}'),
        ("POST", "/api/me", b"", 401, b'{"error":"unauthorized"}'),
        ("HEAD", "/api/blobs/sha256:x", None, 404, b""),
    ],
)
def test_errors_of_an_ollama_server_are_ollamas(ollama_client, method, path, body, status, answer):
    assert ollama_client.request(method, path, body)[::2] == (status, answer)


def test_a_model_that_gemini_lacks_is_ollamas_404(ollama_client, gemini):
    gemini.say(gemini_error(404, "models/gemini-9 is not found"))
    status, _, body = ollama_client.request("POST", "/api/chat", chat(model="gemini-9"))
    assert status == 404
    assert body == b'{"error":"model \'gemini-9\' not found"}'


@pytest.mark.parametrize(
    "api, path, status",
    [
        ("ollama", "/api/chat", 403),
        ("ollama", "/v1/chat/completions", 403),
        ("ollama", "/v1/messages", 403),
        ("openai", "/v1/messages", 403),
        ("openai", "/v1/chat/completions", 401),
    ],
)
def test_a_bad_gemini_key_is_a_401_for_openais_clients_alone(gemini, api, path, status):
    gemini.say(gemini_error(400, "API key not valid. Please pass a valid API key."))
    with serving(gemini.url, api) as server:
        assert post(server, path, chat(max_tokens=5))[0] == status


def test_a_missing_key_is_a_401_for_ollamas_clients_too(gemini):
    with serving(gemini.url, "ollama", proxy_key="px-1") as server:
        assert post(server, "/api/chat", chat())[0] == 401


def test_an_ollama_stream_that_fails_ends_in_an_error(ollama_client, gemini):
    gemini.say(Say(chunk("Once "), SHED))
    *_, before, last = ollama_client.request("POST", "/api/chat", chat())[2].splitlines()
    assert json.loads(before)["done"] is False
    assert json.loads(last) == {"error": "shed"}


ALIASES = (("Qwen:latest", FLASH), ("GPT-*", NEWEST))


@pytest.mark.parametrize(
    "name, model",
    [("qwen", FLASH), ("Qwen:latest", FLASH), ("gpt-4o", NEWEST), ("GPT-4o:latest", NEWEST)],
)
def test_an_alias_of_an_ollama_server_may_be_spelt_in_any_way(gemini, name, model):
    gemini.say(whole("Hello"))
    with serving(gemini.url, api="ollama", aliases=ALIASES) as server:
        assert post(server, "/api/chat", chat(model=name))[0] == 200
    assert gemini.paths[-1].startswith(f"/v1beta/models/{model}:")


def test_an_ollama_server_lists_its_aliases(gemini):
    with serving(gemini.url, api="ollama", aliases=ALIASES) as server, RawClient(server) as client:
        assert b'"name":"qwen:latest"' in client.request("GET", "/api/tags")[2]


@pytest.mark.parametrize(
    "path, body",
    [("/api/pull", {"model": FLASH}), ("/api/create", {"model": "x", "from": FLASH})],
)
def test_managing_models_is_kept_alive_with_status_lines(ollama_client, monkeypatch, path, body):
    read_models = proxy.Gemini.read_models

    def slow(self, waiter, key):
        waiter.wait(None, seconds=0.2)
        return read_models(self, waiter, key)

    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(proxy.Gemini, "read_models", slow)
    lines = ollama_client.request("POST", path, body)[2].splitlines()
    assert len(lines) > 4
    assert json.loads(lines[-1])["status"] == "success"


@pytest.mark.parametrize(
    "path, body, text",
    [
        ("/api/chat", chat(), lambda line: line["message"]["content"]),
        ("/api/generate", {"model": FLASH, "prompt": "x"}, lambda line: line["response"]),
    ],
    ids=["chat", "generate"],
)
def test_a_silent_ollama_stream_is_kept_alive_with_empty_chunks(
    ollama_client, gemini, monkeypatch, path, body, text
):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say(whole("Hello"), delay=0.2))
    lines = [json.loads(line) for line in ollama_client.request("POST", path, body)[2].splitlines()]
    assert len(lines) > 3
    assert [text(line) for line in lines[:2]] == ["", ""]
    assert "".join(map(text, lines)) == "Hello"


# ---- the end of a server ----


@pytest.fixture
def ending(gemini):
    """(a server, a function that lets it begin to end)"""
    server = proxy.Server(config_for(gemini.url))
    with in_thread(server) as stop:
        yield server, stop


def test_a_stream_that_takes_too_long_ends_with_an_error(ending, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "DRAIN_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(proxy, "DRAIN_SECONDS", 0.1)
    gemini.say(Say(chunk("Once "), whole("upon"), gap=30))
    server, stop = ending
    with RawClient(server) as client:
        open_stream(client)
        stop()
        rest = client.file.read()
    assert b"Once " in rest
    assert b"shutting down" in rest
    assert b"[DONE]" not in rest
    assert rest.endswith(b"\r\n0\r\n\r\n")


def test_health_checks_fail_once_the_server_is_to_end(ending):
    server, stop = ending
    with RawClient(server) as client:
        assert client.request("GET", "/healthz")[::2] == (200, b"ok")
        stop()
        assert client.request("GET", "/healthz")[::2] == (503, b"ending")


def test_the_last_answer_of_a_connection_says_that_it_is_the_last(ending):
    server, stop = ending
    with RawClient(server) as client:
        assert "connection" not in client.request("GET", "/healthz")[1]
        stop()
        status, headers, _ = client.request("POST", "/v1/chat/completions", chat())
        assert status == 200
        assert headers["connection"] == "close"
        assert client.ended()


def test_clients_are_served_until_load_balancers_can_have_noticed(ending):
    server, stop = ending
    with RawClient(server) as idle:
        idle.request("GET", "/healthz")
        stop()
        assert post(server)[0] == 200


def test_connections_without_a_request_are_closed_at_the_end(ending, monkeypatch):
    monkeypatch.setattr(proxy, "DRAIN_NOTICE_SECONDS", 0.1)
    server, stop = ending
    with RawClient(server) as idle:
        idle.request("GET", "/healthz")
        stop()
        assert idle.ended()


def test_a_server_that_ended_has_closed_its_memory_and_its_connections(gemini):
    gemini.say(whole(call("weather", {"city": "Oslo"}, "s")))
    with serving(gemini.url) as server:
        chat_message(server, model=NEWEST, tools=[WEATHER])
        assert server.gemini.memory.database is not None
    assert server.gemini.memory.database is None
    assert not server.gemini.pool.idle


# ======================================================================================
# 18. Command line
# ======================================================================================

ENV = {"GEMINI_API_KEY": "AIza-1"}
PROGRAM = HERE / "proxy_to_gemini.py"


def configure(*arguments, env=ENV):
    """The configuration for these flags."""
    return proxy.configure(proxy.flag_parser().parse_args(arguments), env)


def test_flags_take_one_dash_or_two_and_their_value_in_the_same_word_or_the_next():
    config = configure(
        *("-api=openai", "-listen", ":8080", "--timeout=7", "--origins", "x,y"),
        *("-alias=gpt-*=" + NEWEST, "-alias", "a=models/b"),
    )
    assert config == proxy.Config(
        api="openai",
        listen=("", 8080),
        key="AIza-1",
        aliases=(("gpt-*", NEWEST), ("a", "b")),
        origins=("x", "y"),
        timeout=7.0,
    )


def test_listen_takes_an_ipv6_address():
    assert configure("-listen=[::1]:5").listen == ("::1", 5)


def test_the_environment_may_name_the_upstream():
    env = {**ENV, "GOOGLE_GEMINI_BASE_URL": "http://h:1/"}
    assert configure(env=env).backend.url == "http://h:1"


def test_the_environment_names_the_key_of_clients():
    assert configure(env={**ENV, "PROXY_API_KEY": " k "}).proxy_key == "k"


def exit_of(action, *arguments, **how):
    """How the program ends in this function: its exit status, or the line that it prints."""
    with pytest.raises(SystemExit) as caught:
        action(*arguments, **how)
    return caught.value.code


@pytest.mark.parametrize(
    "flag",
    [
        "-workers=0",
        "-workers=many",
        "-workers=1_0",
        "-nonsense",
        "-api=gopher",
        "-timeout=soon",
        "-timeout=-1",
        "-listen=nonsense",
        "-listen=127.0.0.1:99999",
        "-listen=127.0.0.1:http",
        "-alias=nonsense",
        "-alias=a=",
        "-alias=a=b,",
        "-alias=a=b, ,c",
        "-alias==b,c",
        "-upstream=gopher://x",
        "-upstream=nonsense",
        "-upstream=http://h:port",
        "extra",
    ],
)
def test_a_bad_flag_is_a_usage_error(flag, capsys):
    assert exit_of(configure, flag) == 2
    assert "usage" in capsys.readouterr().err


def test_a_bad_upstream_in_the_environment_is_a_usage_error_that_names_it(capsys):
    assert exit_of(configure, env={**ENV, "GOOGLE_GEMINI_BASE_URL": "nonsense"}) == 2
    assert "GOOGLE_GEMINI_BASE_URL: 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "env, key",
    [
        ({"GEMINI_API_KEY": " AIza-1\n", "GOOGLE_API_KEY": "AIza-2"}, "AIza-1"),
        ({"GEMINI_API_KEY": "", "GOOGLE_API_KEY": "AIza-2"}, "AIza-2"),
        ({"CREDENTIALS_DIRECTORY": "."}, "AIza-3"),
    ],
)
def test_the_key_comes_from_the_environment_or_from_systemd(env, key, tmp_path, monkeypatch):
    (tmp_path / "gemini_api_key").write_text("AIza-3\n")
    monkeypatch.chdir(tmp_path)
    assert configure(env=env).key == key


@pytest.mark.parametrize(
    "env", [{}, {"GEMINI_API_KEY": " ", "CREDENTIALS_DIRECTORY": "/nonexistent"}]
)
def test_without_a_key_the_program_ends_and_says_where_to_get_one(env):
    assert "aistudio.google.com" in exit_of(configure, env=env)


def test_no_key_is_needed_where_clients_bring_theirs():
    assert configure("-client-keys", env={}).key == ""


def test_a_key_that_fits_into_no_header_is_refused_but_not_printed():
    message = exit_of(configure, env={"GEMINI_API_KEY": "AIza\r\nX: y"})
    assert "GEMINI_API_KEY" in message
    assert "AIza" not in message


@pytest.mark.parametrize(
    "flags, env, path",
    [
        (["-state=s.db"], {"STATE_DIRECTORY": "/a"}, "s.db"),
        ([], {"STATE_DIRECTORY": "/a:/b"}, os.path.join("/a", "proxy-to-gemini.db")),
        ([], {}, ":memory:"),
    ],
)
def test_the_state_is_in_the_flags_file_or_in_systemds_folder_or_in_memory(flags, env, path):
    assert configure(*flags, env={**ENV, **env}).state == path


@pytest.mark.parametrize("key", ["", " ", "\n", "two words", "naïve"])
def test_a_proxy_key_that_locks_nobody_out_ends_the_start(key):
    with pytest.raises(SystemExit, match="PROXY_API_KEY"):
        configure(env={**ENV, "PROXY_API_KEY": key})


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@127.0.0.1:9/",
        "http://127.0.0.1:9/#x",
        "http://127.0.0.1:9/ x",
        "http://127.0.0.1:9/?x=1",
        "ftp://127.0.0.1",
    ],
)
def test_an_upstream_that_is_no_plain_url_is_a_usage_error(url, capsys):
    with pytest.raises(SystemExit) as caught:
        configure("-upstream=" + url)
    assert caught.value.code == 2
    assert "secret" not in capsys.readouterr().err


def test_origins_may_have_blanks_and_slashes():
    config = configure("-origins=https://a.example, https://b.example/")
    assert config.origins == ("https://a.example", "https://b.example")


def test_a_zipapp_is_its_own_file(tmp_path, monkeypatch):
    archive = tmp_path / "proxy.pyz"
    archive.write_bytes(b"PK")
    monkeypatch.setattr(proxy, "__file__", str(archive / "__main__.py"))
    assert proxy.own_path() == str(archive)


@pytest.mark.skipif(os.name != "posix", reason="closing a standard stream is a shell's business")
def test_it_starts_with_its_standard_error_closed():
    words = [sys.executable, str(HERE / "proxy_to_gemini.py"), "-version"]
    command = " ".join(map(shlex.quote, words)) + " 2>&-"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=30, check=True
    )
    assert "SHA-256" in done.stdout


# ---- Vertex AI ----


@pytest.fixture
def user_file(google, tmp_path):
    """The path of a user's file whose tokens come from the stand-in."""
    path = tmp_path / "user.json"
    path.write_text(json.dumps({**USER_FILE, "token_uri": google.url + "/token"}))
    return str(path)


@pytest.fixture
def vertex_env(google, user_file):
    return {
        "GOOGLE_GENAI_USE_VERTEXAI": "true",
        "GOOGLE_CLOUD_PROJECT": "my-project",
        "GOOGLE_APPLICATION_CREDENTIALS": user_file,
        "GOOGLE_VERTEX_BASE_URL": google.url,
        "NO_GCE_CHECK": "true",
    }


@pytest.mark.parametrize(
    "enterprise, vertexai, wanted",
    [
        ("", "true", True),
        ("", "TRUE", True),
        ("1", "false", True),
        ("false", "true", False),
        ("", "0", False),
        ("", "", False),
    ],
)
def test_the_environment_of_googles_sdk_switches_to_vertex(enterprise, vertexai, wanted):
    env = {"GOOGLE_GENAI_USE_ENTERPRISE": enterprise, "GOOGLE_GENAI_USE_VERTEXAI": vertexai}
    assert proxy.uses_vertex(None, {**env, "GOOGLE_CLOUD_PROJECT": "my-project"}) is wanted


@pytest.mark.parametrize(
    "flags, location, place",
    [
        ([], "", ("my-project", "global")),
        ([], "us", ("my-project", "us")),
        (["-vertex=flag-project"], "us", ("flag-project", "us")),
        (["-vertex=example.com:a-project/us-east5"], "us", ("example.com:a-project", "us-east5")),
    ],
)
def test_the_flag_wins_over_the_environment(vertex_env, flags, location, place):
    env = {**vertex_env, "GOOGLE_CLOUD_LOCATION": location}
    backend = configure(*flags, env=env).backend
    assert (backend.project, backend.location) == place


@pytest.mark.parametrize(
    "location, host",
    [
        ("global", "aiplatform.googleapis.com"),
        ("eu", "aiplatform.eu.rep.googleapis.com"),
        ("us-east5", "us-east5-aiplatform.googleapis.com"),
    ],
)
def test_each_location_has_its_server(vertex_env, location, host):
    del vertex_env["GOOGLE_VERTEX_BASE_URL"]
    config = configure(env={**vertex_env, "GOOGLE_CLOUD_LOCATION": location, **GEMINI_URL})
    assert config.backend.url == f"https://{host}"


GEMINI_URL = {"GOOGLE_GEMINI_BASE_URL": "http://gemini.example"}  # which is not for Vertex AI


def test_an_upstream_in_the_flags_is_for_vertex_too(vertex_env):
    assert configure("-upstream=http://h:1/x", env=vertex_env).backend.url == "http://h:1/x"


@pytest.mark.parametrize(
    "place", ["", "/us", "p", "p-1234/", "p-1234/us/x", "a b/us", "p-1234/x.y"]
)
def test_a_place_that_is_none_is_a_usage_error(place, capsys):
    assert exit_of(configure, f"-vertex={place}") == 2
    assert "PROJECT/LOCATION" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["-vertex=my-project", "-client-keys"], ["-token-command=id"], ["-token-command='"]]
)
def test_flags_that_do_not_go_together_are_a_usage_error(flags, capsys):
    assert exit_of(configure, *flags) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    "env, words",
    [
        ({"GOOGLE_CLOUD_PROJECT": "a/../b"}, "the project 'a/../b'"),
        ({"GOOGLE_CLOUD_LOCATION": "evil.example/"}, "the location 'evil.example/'"),
        ({"GOOGLE_CLOUD_QUOTA_PROJECT": "a\r\nb"}, "the quota project"),
        ({"GOOGLE_CLOUD_PROJECT": ""}, "GOOGLE_CLOUD_PROJECT"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent.json"}, "/nonexistent.json"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": "/"}, "/ cannot be used"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": ""}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ({"GOOGLE_API_KEY": "a b", "GOOGLE_CLOUD_PROJECT": ""}, "GOOGLE_API_KEY"),
    ],
)
def test_what_is_wrong_for_vertex_ends_the_start_with_one_line(vertex_env, env, words):
    line = exit_of(configure, env={**vertex_env, **env})
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("data", [b"", b"{no json", b"\xff\xfe{\x00", b"[" * 5000, b"[]", b"{}"])
def test_a_file_that_is_no_credential_ends_the_start_with_one_line(vertex_env, tmp_path, data):
    (tmp_path / "bad.json").write_bytes(data)
    path = str(tmp_path / "bad.json")
    line = exit_of(configure, env={**vertex_env, "GOOGLE_APPLICATION_CREDENTIALS": path})
    assert path in line
    assert "\n" not in line


def test_the_first_credential_that_is_there_is_taken(tmp_path):
    gcloud = "application_default_credentials.json"
    env = {"HOME": str(tmp_path)}
    assert proxy.credential_path(env) == ""
    steps = (
        ({}, tmp_path / ".config" / "gcloud" / gcloud),
        ({"CLOUDSDK_CONFIG": str(tmp_path / "sdk")}, tmp_path / "sdk" / gcloud),
        ({"CREDENTIALS_DIRECTORY": str(tmp_path)}, tmp_path / "google_credentials"),
    )
    for more, path in steps:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        env.update(more)
        assert proxy.credential_path(env) == str(path)
    env["GOOGLE_APPLICATION_CREDENTIALS"] = "missing.json"
    assert proxy.credential_path(env) == "missing.json"


def test_the_project_may_be_the_credentials(vertex_env, tmp_path):
    (tmp_path / "service.json").write_text(json.dumps(SERVICE_FILE))
    path = str(tmp_path / "service.json")
    del vertex_env["GOOGLE_CLOUD_PROJECT"]
    config = configure(env={**vertex_env, "GOOGLE_APPLICATION_CREDENTIALS": path})
    assert config.backend.project == "my-project"
    assert config.key == f"my-project service_account {EMAIL}"


def test_a_machine_at_google_needs_no_file(google):
    host = google.url.partition("//")[2]
    env = {"GOOGLE_GENAI_USE_VERTEXAI": "1", "GCE_METADATA_HOST": host, "HOME": "/nonexistent"}
    backend = configure(env=env).backend
    assert backend.project == "my-project"
    assert backend.credential.account == EMAIL
    assert proxy.fetch_token(backend.credential).value == "ya29.secret-0"


def test_a_key_alone_is_express_mode(vertex_env, google):
    key = {"GOOGLE_API_KEY": "AQ.1", "GEMINI_API_KEY": "AIza-1"}
    assert configure(env={**vertex_env, **key}).backend.project == "my-project"
    config = configure(env={**vertex_env, **key, "GOOGLE_CLOUD_PROJECT": ""})
    assert (config.key, config.backend) == ("AQ.1", proxy.VERTEX._replace(url=google.url))


def test_the_unit_loads_the_credential_for_vertex():
    unit = proxy.systemd_unit(["-vertex=my-project/us"])
    assert "\nLoadCredential=google_credentials:/etc/proxy-to-gemini/google_credentials\n" in unit
    assert "-vertex=my-project/us\n" in unit
    assert "LoadCredential" not in proxy.systemd_unit(["-vertex=my-project", "-token-command=id"])


def test_the_checks_walk_the_way_to_vertex(vertex_env, user_file, capsys):
    config = configure("-vertex=my-project/us", "-listen=127.0.0.1:0", env=vertex_env)
    assert proxy.run_checks(config) == 0
    output = capsys.readouterr().out
    names = [line.split()[1] for line in output.splitlines()]
    assert names == [f"{name}:" for name in proxy.VERTEX.checks]
    assert f"authorized_user of an account that it does not name, from {user_file}" in output
    assert "project my-project, location us" in output
    assert "ya29" not in output


def test_a_model_that_is_listed_and_not_there_fails_no_check(vertex_env, google, capsys):
    google.say(gemini_error(404, "Publisher Model `x` not found.", "NOT_FOUND"), whole("Hello"))
    assert proxy.run_checks(configure("-listen=127.0.0.1:0", env=vertex_env)) == 0
    output = capsys.readouterr().out
    assert f"said 'Hello' after 0.0 seconds, models/{NEWEST} is missing" in output


def test_models_that_are_all_missing_fail_the_check(vertex_env, google, capsys):
    message = f"Publisher Model `{GOOGLE}x` not found."
    missing = gemini_error(404, message, "NOT_FOUND")
    google.say(*[missing] * (proxy.MAX_MISSING_MODELS + 1))
    assert proxy.run_checks(configure("-listen=127.0.0.1:0", env=vertex_env)) == 1
    assert "-vertex=my-project/global" in capsys.readouterr().out


def test_a_failed_check_of_vertex_says_what_to_mend(vertex_env, google, capsys):
    google.trouble = Say(status=400, raw=b'{"error": "invalid_grant"}')
    assert proxy.run_checks(configure("-listen=127.0.0.1:0", env=vertex_env)) == 1
    assert "gcloud auth application-default login" in capsys.readouterr().out


@pytest.mark.skipif(WINDOWS, reason="there is no SIGHUP")
def test_the_program_answers_by_vertex_and_reads_its_credential_again(
    vertex_env, google, user_file
):
    with start("-listen=127.0.0.1:0", **vertex_env) as process:
        line = process.stdout.readline()
        assert "answered by Vertex AI (project my-project, location global) at" in line
        server = RemoteServer(int(re.search(r"127\.0\.0\.1:(\d+)", line).group(1)))
        assert b"Hello" in post(server)[2]
        Path(user_file).write_text("broken")
        process.send_signal(signal.SIGHUP)
        assert post(server)[0] == 200
        output = process.stdout
        assert any("the old credential stays" in line for line in iter(output.readline, ""))
        fields = {**USER_FILE, "token_uri": google.url + "/token", "quota_project_id": "q-project"}
        Path(user_file).write_text(json.dumps(fields))
        process.send_signal(signal.SIGHUP)
        assert any("was read again" in line for line in iter(output.readline, ""))
        assert post(server)[0] == 200
    assert google.headers[-1]["X-goog-user-project"] == "q-project"


# ---- systemd ----


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["proxy_to_gemini.py", *arguments])
    proxy.main()


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
def test_the_unit_runs_this_file_with_these_flags(capsys, monkeypatch):
    run_main(monkeypatch, "-api=ollama", "--print-unit", "-alias=a b=$c%d")
    unit = capsys.readouterr().out
    assert f'{PROGRAM} -api=ollama "-alias=a b=$$c%%d"\n' in unit
    assert "AIza" not in unit


def test_the_unit_is_hardened_and_loads_the_key_as_a_credential():
    lines = proxy.systemd_unit([]).splitlines()
    assert "Type=notify" in lines
    assert "DynamicUser=yes" in lines
    assert "LoadCredential=gemini_api_key:/etc/proxy-to-gemini/gemini_api_key" in lines


@pytest.mark.parametrize("flag", ["-client-keys", "--client-keys"])
def test_the_unit_loads_no_key_where_clients_bring_theirs(flag):
    unit = proxy.systemd_unit([flag])
    assert "gemini_api_key" not in unit
    assert "\nEnvironmentFile=-/etc/proxy-to-gemini/environment\n" in unit


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, float("inf")),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, float("inf")),
        ({"WATCHDOG_USEC": "soon"}, float("inf")),
    ],
)
def test_the_watchdog_counts_if_it_is_meant_for_this_process(env, expected):
    assert proxy.watchdog_seconds(env) == expected


@contextlib.contextmanager
def started(*command, **how):
    """A Python process, which does not outlive the test."""
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **how,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None and not WINDOWS:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()


def start(*arguments, **env):
    """The program with these flags; no key of the real environment reaches it."""
    inherited = {key: value for key, value in os.environ.items() if "KEY" not in key}
    console = ["-c", CONSOLE] if WINDOWS else []
    return started(*console, PROGRAM, *arguments, env={**inherited, **env})


# Runs a script that gets a Ctrl-Break for each line of its input: not every console can send one.
CONSOLE = (
    "import runpy, signal, sys, threading; "
    "lines = iter(sys.stdin.readline, ''); "
    "press = lambda: [signal.raise_signal(signal.SIGBREAK) for _ in lines]; "
    "threading.Thread(target=press, daemon=True).start(); "
    "sys.argv.pop(0); "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def interrupt(process):
    """Press Ctrl-C, or on Windows Ctrl-Break."""
    if not WINDOWS:
        process.send_signal(signal.SIGINT)
        return
    process.stdin.write("\n")
    process.stdin.flush()


class RemoteServer:
    """A server in another process, for the helpers that take a server."""

    def __init__(self, port):
        self.server_port = port


def port_of(process):
    """The port in the start line."""
    return int(re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline()).group(1))


@contextlib.contextmanager
def running(gemini, *flags, **env):
    """(the process, the server) of the program on a free port, in front of this Gemini."""
    with start("-listen=127.0.0.1:0", "-upstream", gemini.url, *flags, **env) as process:
        yield process, RemoteServer(port_of(process))


STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"

# Passes a listening socket on as systemd does: as file 3, named in the environment (sd_listen_fds(3)).
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); "
    "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class Supervised:
    """The program as systemd runs it: with a socket, a folder for its state, a key and a watchdog."""

    def __init__(self, folder, listener, notified, process):
        self.folder, self.notified, self.process = folder, notified, process
        self.server = RemoteServer(listener.getsockname()[1])

    def write_key(self, key):
        (self.folder / "gemini_api_key").write_text(key)

    def wait_for(self, line):
        """Wait until the program has notified systemd of this."""
        while line not in self.notified.recv(4096).decode().split("\n"):
            pass


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def supervised(gemini, tmp_path, request):
    if WINDOWS:
        pytest.skip("there is no systemd")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(10)
        (tmp_path / "gemini_api_key").write_text("AIza-old")
        flags = [f"-workers={request.param}", "-listen=127.0.0.1:1", "-upstream=" + gemini.url]
        env = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "400000",
            "CREDENTIALS_DIRECTORY": str(tmp_path),
            "STATE_DIRECTORY": str(tmp_path),
        }
        file = listener.fileno()
        with started("-c", LAUNCHER, file, PROGRAM, *flags, pass_fds=[file], env=env) as process:
            program = Supervised(tmp_path, listener, notified, process)
            program.wait_for("READY=1")
            yield program


def test_the_watchdog_is_pinged(supervised):
    supervised.wait_for("WATCHDOG=1")
    supervised.wait_for("WATCHDOG=1")


def test_systemds_socket_key_and_folder_are_used(supervised, gemini):
    assert post(supervised.server)[0] == 200
    assert key_of(gemini) == "AIza-old"
    assert (supervised.folder / "proxy-to-gemini.db").exists()


def test_sighup_reads_the_key_again(supervised, gemini):
    supervised.write_key("AIza-new")
    supervised.process.send_signal(signal.SIGHUP)
    until(lambda: post(supervised.server)[0] == 200 and key_of(gemini) == "AIza-new")


def test_sigterm_closes_idle_connections_and_lets_answers_end(supervised, gemini):
    gemini.say(Say(chunk("Once "), whole("upon"), gap=0.3))
    with RawClient(supervised.server) as line, RawClient(supervised.server) as idle:
        assert idle.request("GET", "/healthz")[0] == 200
        open_stream(line)
        supervised.process.send_signal(signal.SIGTERM)
        supervised.wait_for("STOPPING=1")
        assert idle.ended()
        assert line.file.read().endswith(STREAM_END)
    assert supervised.process.wait(10) == 0
    assert "Traceback" not in supervised.process.stdout.read()


# ---- other systems ----

# Runs a script as on a system that lacks what comes before "--": names of modules, and modules.
POORER = (
    "import os, runpy, select, signal, sys, urllib.request; "
    "lacks = sys.argv[1 : sys.argv.index('--')]; "
    "sys.argv = sys.argv[len(lacks) + 2 :]; "
    "paths = [name.rpartition('.') for name in lacks]; "
    "[delattr(sys.modules[module], name) for module, _, name in paths if module]; "
    "sys.modules.update({name: None for module, _, name in paths if not module}); "
    "sys.platform = 'other'; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
LACKING = {
    "macOS": ["select.POLLRDHUP"],
    "Windows": [
        "select.POLLRDHUP",
        "select.poll",
        "os.fork",
        "signal.SIGHUP",
        "signal.SIGCHLD",
        "resource",
    ],
}


@pytest.fixture(params=LACKING.values(), ids=LACKING)
def elsewhere(request, gemini):
    """(the process, the server) of the program on a system that lacks something."""
    if sys.platform != "linux" or not hasattr(select, "POLLRDHUP"):
        pytest.skip("takes away what is not there")
    flags = ["-listen=127.0.0.1:0", "-upstream", gemini.url]
    command = ["-c", POORER, *request.param, "--", PROGRAM, *flags]
    with started(*command, env={**os.environ, **ENV}) as process:
        yield process, RemoteServer(port_of(process))


def test_it_answers_elsewhere(elsewhere, gemini):
    gemini.say(Say(chunk("Once "), whole("upon"), gap=0.1))
    process, server = elsewhere
    with RawClient(server) as client:
        open_stream(client)
        client.send(raw_chat())  # the next one while the first one is under way
        interrupt(process)
        assert b"upon" in client.file.read()
    assert process.wait(10) == 0


@pytest.mark.parametrize("silent", [True, False], ids=["in silence", "in mid-stream"])
def test_a_client_that_leaves_is_noticed_elsewhere(silent, elsewhere, gemini):
    gemini.say(Say(chunk("Once "), whole("upon"), delay=60.0 * silent, gap=60.0))
    with RawClient(elsewhere[1]) as client:
        if silent:
            client.send(raw_chat(stream=True))
            until(lambda: gemini.bodies)
        else:
            open_stream(client)
    assert gemini.gone.wait(5)


@pytest.mark.parametrize(
    "share, cores", [("max 100000", 8), ("150000 100000", 2), ("9000000 1000", 8)]
)
def test_there_is_a_worker_for_each_core_that_may_be_used(share, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(share)
    monkeypatch.setattr(proxy, "CPU_SHARE_FILE", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "fork", None, raising=False)
    assert configure("-workers=auto").workers == cores
    monkeypatch.delattr(os, "fork")
    assert configure("-workers=auto").workers == 1


def test_threads_stay_on_one_core_that_may_be_used_while_there_are_many_connections(monkeypatch):
    chosen = {}
    monkeypatch.setattr(os, "listdir", lambda path: ["7", "8"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", chosen.__setitem__, raising=False)
    monkeypatch.setattr(sys, "abiflags", "", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("SCHED_OTHER", "SCHED_BATCH"):
        monkeypatch.setattr(os, name, 0, raising=False)
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: 1, raising=False)
    cores = proxy.Cores()
    monkeypatch.setattr(cores, "chosen", lambda: 5)
    masks = []
    for connections in (7, 8, 7):
        cores.settle(connections)
        masks.append(dict(chosen))
    assert masks == [{}, {7: {5}, 8: {5}}, {7: {1, 2, 5}, 8: {1, 2, 5}}]
    chosen.clear()
    cores.settle(7)
    assert not chosen
    numbers = []
    for number in range(4):
        worker = proxy.Cores()
        worker.worker = number
        numbers.append(worker.chosen())
    assert numbers == [1, 2, 5, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux lets a process choose")
@pytest.mark.parametrize("policy", ["SCHED_OTHER", "SCHED_IDLE"])
def test_threads_of_the_usual_policy_interrupt_no_other_while_there_are_many_connections(
    policy, monkeypatch
):
    policies = []
    monkeypatch.setattr(os, "listdir", lambda path: ["7"])
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: getattr(os, policy))
    monkeypatch.setattr(os, "sched_setscheduler", lambda *settings: policies.append(settings[:2]))
    cores = proxy.Cores()
    for connections in (7, 8, 7):
        cores.settle(connections)
    changes = {"SCHED_OTHER": [(7, os.SCHED_BATCH), (7, os.SCHED_OTHER)]}
    assert policies == changes.get(policy, [])


@pytest.mark.skipif(WINDOWS, reason="it has neither these functions nor sys.abiflags")
@pytest.mark.parametrize("lacking", ["sched_getaffinity", "sched_setaffinity"])
def test_a_process_that_may_not_choose_its_core_moves_as_before(lacking, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 5}, raising=False)
    monkeypatch.setattr(os, lacking, refuse)
    proxy.Cores().settle(100)
    monkeypatch.delattr(os, "sched_setaffinity")
    assert proxy.Cores().allowed == []
    proxy.Cores().settle(100)


@pytest.mark.parametrize("flag, lack", [("-workers=2", "fork"), ("-print-unit", "systemd")])
def test_what_a_system_lacks_is_a_wrong_flag_there(flag, lack, monkeypatch, capsys):
    monkeypatch.delattr(os, "fork", raising=False)
    monkeypatch.setattr(sys, "platform", "plan9")
    assert exit_of(run_main, monkeypatch, flag) == 2
    assert f"{flag}: plan9 has no {lack}" in capsys.readouterr().err


@pytest.mark.skipif(not WINDOWS, reason="the end of a console is a signal elsewhere")
def test_the_end_of_the_console_is_an_interrupt():
    signals = ManualSignals()
    proxy.Signals.watch_console(signals)
    threading.Thread(target=signals.console_handler, args=(2,), daemon=True).start()
    assert signals.woken.recv(1) == b"\0"
    assert signals.should_stop()


# ---- workers ----


def children_of(pid):
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {int(child) for child in output.split()} - {os.getpid()}


def listens(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def two_workers(gemini, **env):
    """(the process, the server) of the program with two workers, both of which have started."""
    if WINDOWS or not Path("/proc/self").exists():
        pytest.skip("looks at processes as Linux shows them")
    with running(gemini, "-workers=2", **env) as (process, server):
        until(lambda: len(children_of(process.pid)) == 2)
        yield process, server


def count_of_chats(server):
    return metrics_of(server).get('requests_total{route="POST /v1/chat/completions",status="200"}')


def test_workers_may_write_their_recordings_and_end_before_systemd_kills_them():
    steps = (proxy.DRAIN_NOTICE_SECONDS, proxy.DRAIN_SECONDS, *4 * [proxy.FINAL_SECONDS])
    allowed = float(re.search(r"^TimeoutStopSec=(\d+)$", proxy.UNIT, re.M).group(1))
    assert sum(steps) < proxy.WORKER_DRAIN_SECONDS < allowed


def cores_of(pid):
    """The cores that any thread of a process may run on."""
    cores = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            cores |= os.sched_getaffinity(int(thread))
    return cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux lets a process choose")
@pytest.mark.skipif("t" in getattr(sys, "abiflags", ""), reason="its threads run at once")
def test_a_busy_server_stays_on_one_core_until_its_clients_leave(gemini):
    allowed = os.sched_getaffinity(0)
    with running(gemini, **ENV) as (process, server):
        assert cores_of(process.pid) == allowed
        with contextlib.ExitStack() as clients:
            for _ in range(proxy.BUSY_CONNECTIONS):
                clients.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            until(lambda: len(cores_of(process.pid)) == 1)
            post(server)
            assert len(cores_of(process.pid)) == 1
        until(lambda: post(server) and cores_of(process.pid) == allowed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux lets a process choose")
@pytest.mark.skipif("t" in getattr(sys, "abiflags", ""), reason="its threads run at once")
def test_each_busy_worker_has_a_core_of_its_own(gemini):
    allowed = sorted(os.sched_getaffinity(0))
    with two_workers(gemini, **ENV) as (process, server), contextlib.ExitStack() as clients:

        def all_are_busy():
            clients.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            return all(len(cores_of(pid)) == 1 for pid in children_of(process.pid))

        until(all_are_busy)
        assert set().union(*map(cores_of, children_of(process.pid))) == set(allowed[:2])


def test_workers_share_signatures(gemini):
    with two_workers(gemini, **ENV) as (_, server):
        for i in range(6):
            question = {"model": NEWEST, "tools": [WEATHER]}
            first = post(server, body=chat(user(f"{i}"), **question))
            message = kept(json.loads(first[2])["choices"][0]["message"])
            call_id = message["tool_calls"][0]["id"]
            result = {"role": "tool", "tool_call_id": call_id, "content": "3"}
            post(server, body=chat(user(f"{i}"), message, result, **question))
            part = gemini.bodies[-1]["contents"][1]["parts"][0]
            assert part["thoughtSignature"] == sign("stand-in")


def test_workers_add_up_their_metrics(gemini):
    with two_workers(gemini, **ENV) as (_, server):
        for _ in range(12):
            post(server)
        until(lambda: count_of_chats(server) == 12)


def test_each_worker_shows_the_last_requests_of_all(gemini):
    with two_workers(gemini, **ENV) as (_, server):
        for _ in range(12):
            post(server)
        until(lambda: len(state_of(server)["requests"]) == 12)
        assert {len(state_of(server)["requests"]) for _ in range(12)} == {12}


def test_a_dead_worker_is_replaced_and_its_metrics_stay(gemini):
    with two_workers(gemini, **ENV) as (process, server):
        for _ in range(12):
            post(server)
        until(lambda: count_of_chats(server) == 12)
        victim = children_of(process.pid).pop()
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(children_of(process.pid) - {victim}) == 2)
        assert post(server)[0] == 200
        until(lambda: count_of_chats(server) == 13)


def test_a_replaced_worker_has_the_key_that_was_read_again(gemini, tmp_path):
    (tmp_path / "gemini_api_key").write_text("AIza-old")
    with two_workers(gemini, CREDENTIALS_DIRECTORY=str(tmp_path)) as (process, server):
        (tmp_path / "gemini_api_key").write_text("AIza-new")
        process.send_signal(signal.SIGHUP)
        until(lambda: post(server)[0] == 200 and key_of(gemini) == "AIza-new")
        before = children_of(process.pid)
        for child in before:
            os.kill(child, signal.SIGKILL)
        until(lambda: len(children_of(process.pid) - before) == 2)
        assert post(server)[0] == 200
        assert key_of(gemini) == "AIza-new"


def test_workers_that_drain_leave_no_client_in_the_queue_and_end_their_answers(gemini):
    gemini.say(Say(chunk("Once "), whole("upon"), gap=1.0))
    with two_workers(gemini, **ENV) as (process, server):
        with RawClient(server) as line:
            open_stream(line)
            process.send_signal(signal.SIGTERM)
            until(lambda: not listens(server.server_port))
            assert process.poll() is None, "the answer is still under way"
            assert line.file.read().endswith(STREAM_END)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize("name, touched", [("proxy-to-gemini-x1", True), ("mine", False)])
def test_only_the_workers_own_folder_is_kept_young(tmp_path, name, touched):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "state.db").touch()
    os.utime(folder, (1, 1))
    server = types.SimpleNamespace(
        config=proxy.Config("openai", ("", 0), state=str(folder / "state.db"))
    )
    proxy.Workers(server, None).touch_state()
    assert (folder.stat().st_mtime > 1) is touched


@pytest.mark.skipif(WINDOWS, reason="there are no workers")
def test_workers_without_a_file_to_share_end_with_advice(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    monkeypatch.setattr(proxy, "raise_limits", lambda: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-1")
    assert "-state" in exit_of(run_main, monkeypatch, "-workers=2", "-listen=127.0.0.1:0")


# ---- checks ----


def test_the_checks_pass_in_the_order_in_which_they_need_each_other(gemini, capsys):
    assert proxy.run_checks(config_for(gemini.url)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = ["port:", "memory:", "name:", "connection:", "key:", "clock:", "answer:"]
    assert [line[:2] for line in lines] == [["ok", name] for name in names]


def test_the_checks_print_a_models_answer_but_not_the_key(gemini, capsys):
    proxy.run_checks(config_for(gemini.url))
    output = capsys.readouterr().out
    assert "gemini-3.8-flash said 'Hello from the stand-in" in output
    assert "the-key" not in output


def test_the_checks_ask_no_question_where_clients_bring_their_keys(gemini, capsys):
    checker = proxy.Checker(config_for(gemini.url)._replace(key=""))
    assert checker.check_answer() == "every client asks with a key of its own"
    assert gemini.bodies == []


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"backend": proxy.Backend(url="http://127.0.0.1:1")}, "refused"),
        ({"state": "/nonexistent/file"}, "No such file"),
        ({"backend": proxy.Backend(url="http://nowhere.invalid")}, "FAIL  name"),
    ],
)
def test_a_failed_check_says_what_failed_and_what_to_mend(gemini, capsys, fields, words):
    assert proxy.run_checks(config_for(gemini.url)._replace(**fields)) == 1
    failure, advice = capsys.readouterr().out.splitlines()[-2:]
    assert failure.startswith("FAIL")
    assert words in failure
    assert advice.startswith("      mend: ")


def test_a_taken_port_fails_the_first_check(gemini, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert proxy.run_checks(config_for(gemini.url)._replace(listen=other.getsockname())) == 1
    failure, advice = capsys.readouterr().out.splitlines()
    assert failure.startswith("FAIL  port: ")
    assert "in use" in failure
    assert advice.startswith("      mend: ")


@pytest.mark.parametrize(
    "names, newest",
    [
        (["gemini-3-pro", "gemini-2.5-flash", "gemini-3-flash"], "gemini-3-flash"),
        (["gemini-2.5-pro", "gemini-3-pro"], "gemini-3-pro"),
    ],
)
def test_the_newest_flash_model_is_asked_or_else_the_newest(names, newest):
    models = [
        {"name": f"models/{name}", "supportedGenerationMethods": ["generateContent"]}
        for name in names
    ]
    assert proxy.newest_flash(models).name == newest


# ---- start and end ----


def test_the_start_line_names_the_address_and_the_api_but_not_the_key(gemini):
    with start("-listen=127.0.0.1:0", "-upstream", gemini.url, **ENV) as process:
        line = process.stdout.readline()
    assert re.search(r"api openai at http://127\.0\.0\.1:\d+", line)
    assert "AIza" not in line


def health_of(server):
    """The status of its health check."""
    with RawClient(server) as client:
        return client.request("GET", "/healthz")[0]


@pytest.mark.skipif(WINDOWS, reason="there, SIGTERM is the end without a signal")
def test_the_program_answers_and_ends_at_sigterm(gemini):
    with running(gemini, **ENV) as (process, server):
        assert b"Hello" in post(server)[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert "Traceback" not in process.stdout.read()


def test_an_interrupt_gives_answers_under_way_their_time(gemini):
    gemini.say(Say(whole("Hello"), delay=0.5))
    with running(gemini, **ENV) as (process, server), RawClient(server) as client:
        client.send(raw_chat())
        until(lambda: gemini.bodies)
        interrupt(process)
        assert b"Hello" in client.reply()[2]
        assert process.wait(10) == 0
        assert "Traceback" not in process.stdout.read()


def test_a_second_interrupt_ends_the_program_at_once(gemini):
    gemini.say(Say(whole("Hello"), delay=60.0))
    with running(gemini, **ENV) as (process, server), RawClient(server) as client:
        client.send(raw_chat())
        until(lambda: gemini.bodies)
        interrupt(process)
        until(lambda: health_of(server) == 503)
        interrupt(process)
        assert process.wait(5) > 128
        assert "Traceback" not in process.stdout.read()


def test_the_program_ends_also_while_clients_keep_coming_back(gemini):
    over = threading.Event()

    def client(server):
        while not over.is_set():
            with contextlib.suppress(OSError, ValueError, IndexError):
                post(server, "/v1/nonsense")

    with running(gemini, **ENV) as (process, server):
        clients = [threading.Thread(target=client, args=(server,)) for _ in range(12)]
        for thread in clients:
            thread.start()
        process.stdout.close()
        interrupt(process)
        try:
            assert process.wait(10) == 0
        finally:
            over.set()
            for thread in clients:
                thread.join(5)


def test_the_version_comes_with_the_hash_of_the_file():
    with start("-version") as process:
        output = process.stdout.read()
        assert process.wait(5) == 0
    assert hashlib.sha256(PROGRAM.read_bytes()).hexdigest() in output


def test_a_taken_port_ends_the_program_with_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with start(f"-listen=127.0.0.1:{port}", **ENV) as process:
            output = process.stdout.read()
            assert process.wait(5) == 1
    assert "in use" in output
    assert len(output.splitlines()) == 1


def test_the_program_starts_from_any_folder_and_under_any_name(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    elsewhere = tmp_path / "else where's {x}"
    elsewhere.mkdir()
    (elsewhere / "odd-name").write_bytes(PROGRAM.read_bytes())
    for command in ([PROGRAM], ["-I", PROGRAM], [elsewhere / "odd-name"]):
        with started(*command, "-version", cwd=tmp_path) as process:
            assert "SHA-256" in process.stdout.read()
            assert process.wait(10) == 0


# ---- installation ----


class Installed:
    """The program as `make install` leaves it under a folder."""

    HOME = "opt/x/lib/proxy-to-gemini/"

    def __init__(self, folder):
        self.folder = folder
        self.output = self.make("install", "FLAGS=-api=ollama '-alias=a b=c'")

    def make(self, target, *variables):
        where = ("DESTDIR=" + str(self.folder), "PREFIX=/opt/x", "PYTHON=" + sys.executable)
        command = ["make", "-s", target, *where, *variables]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout

    def files(self):
        paths = [path for path in self.folder.rglob("*") if not path.is_dir()]
        return {str(path.relative_to(self.folder)) for path in paths}


@pytest.fixture
def installed(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    return Installed(tmp_path)


def test_make_install_says_where_the_key_goes_and_how_to_start(installed):
    assert "/etc/proxy-to-gemini/gemini_api_key" in installed.output
    assert "systemctl" in installed.output


def test_make_install_puts_each_file_in_its_place(installed):
    assert installed.files() == {
        installed.HOME + "proxy_to_gemini.py",
        installed.HOME + "README.md",
        installed.HOME + "LICENSE",
        "opt/x/bin/proxy-to-gemini",
        "etc/systemd/system/proxy-to-gemini.service",
    }


def test_the_installed_unit_runs_the_installed_file(installed):
    unit = (installed.folder / "etc/systemd/system/proxy-to-gemini.service").read_text(
        encoding="utf-8"
    )
    assert '/opt/x/lib/proxy-to-gemini/proxy_to_gemini.py -api=ollama "-alias=a b=c"\n' in unit
    assert "Documentation=file:///opt/x/lib/proxy-to-gemini/README.md" in unit
    assert str(installed.folder) not in unit


def test_the_installed_command_is_the_program(installed):
    command = installed.folder / "opt/x/bin/proxy-to-gemini"
    assert os.access(command, os.X_OK)
    assert command.resolve().read_bytes() == PROGRAM.read_bytes()


def test_make_uninstall_leaves_nothing(installed):
    installed.make("uninstall")
    assert installed.files() == set()
    assert not (installed.folder / installed.HOME).exists()


# ======================================================================================
# The file itself
# ======================================================================================


def test_names_of_tests_fit_into_windows_environment(request):
    assert max(len(item.nodeid) for item in request.session.items) < 30_000


SOURCE = (HERE / "proxy_to_gemini.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
NODES = list(ast.walk(TREE))
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef)]
BANNER = re.compile(r"^# =+\n# (\d+)\. ([^:]+): (.+)\n# =+$", re.M)


@functools.cache
def first_lines():
    """Where each section begins, by its title."""
    return {match[2]: SOURCE.count("\n", 0, match.start()) + 1 for match in BANNER.finditer(SOURCE)}


def section_named(title):
    """The lines of the section with this title in its banner."""
    starts = [*first_lines().values(), SOURCE.count("\n") + 1]
    start = first_lines()[title]
    return range(start, min(line for line in starts if line > start))


@functools.cache
def pure_lines():
    """The lines of the sections before the one that talks to Gemini."""
    starts = first_lines()
    return range(starts["Vocabulary"], starts["Client"])


def pure_statements():
    return [node for node in TREE.body if node.lineno in pure_lines()]


def test_the_docstrings_map_is_true():
    rows = re.findall(r"^    (\d+)\. (\S.*?)  +(.+)$", ast.get_docstring(TREE, clean=False), re.M)
    assert rows == BANNER.findall(SOURCE)


# ---- purity ----

# Modules of which nothing reads a clock, a file, a socket, the environment or chance.
PURE_MODULES = {
    *(
        "array",
        "base64",
        "bisect",
        "codecs",
        "collections",
        "collections.abc",
        "contextlib",
        "datetime",
        "fnmatch",
    ),
    *("functools", "hashlib", "io", "ipaddress", "itertools", "json", "math", "operator", "re"),
    *("struct", "sys", "typing", "urllib.parse", "wave", "weakref"),
}
PURE_ATTRIBUTES = {
    "datetime": {"datetime", "fromisoformat", "fromtimestamp", "timezone"},  # and not now()
    "io": {"BytesIO"},
    "sys": {"byteorder"},
    "urllib": {"parse"},
}
IMPURE_BUILTINS = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}


def imported_modules():
    """The modules of each name that the head of the file imports; `urllib` has several."""
    modules = {}
    for node in TREE.body:
        for name in getattr(node, "names", ()):
            module = getattr(node, "module", None) or name.name
            bound = name.asname or name.name.partition(".")[0]
            modules.setdefault(bound, set()).add(module)
    return modules


def globals_used(statement):
    """The names in a statement of the module that are neither its variables nor its arguments."""
    nodes = list(ast.walk(statement))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names} - own


def names_defined(statement):
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    nodes = ast.walk(statement)
    return {node.id for node in nodes if isinstance(node, ast.Name)} - globals_used(statement)


def test_the_pure_sections_use_pure_modules_only():
    modules = imported_modules()
    for statement in pure_statements():
        for name in globals_used(statement) & set(modules):
            assert modules[name] & PURE_MODULES, (statement.lineno, name)


def test_the_pure_sections_import_pure_modules_only():
    for statement in pure_statements():
        for node in ast.walk(statement):
            assert not isinstance(node, ast.ImportFrom), node.lineno
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= PURE_MODULES, node.lineno


def test_the_pure_sections_use_the_pure_parts_of_modules_only():
    for node in NODES:
        if isinstance(node, ast.Attribute) and node.lineno in pure_lines():
            owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
            allowed = PURE_ATTRIBUTES.get(owner, {node.attr})
            assert node.attr in allowed, node.lineno


def test_the_pure_sections_open_and_print_nothing():
    for statement in pure_statements():
        assert not globals_used(statement) & IMPURE_BUILTINS, statement.lineno


def test_the_pure_sections_use_nothing_that_is_defined_below_them():
    border = pure_lines().stop
    below = [node for node in TREE.body if node.lineno >= border]
    names = set().union(*(names_defined(node) for node in below))
    for statement in pure_statements():
        assert not globals_used(statement) & names, statement.lineno


def test_a_context_is_made_of_values():
    for name, annotation in Context.__annotations__.items():
        assert "Callable" not in str(annotation), name


def test_generations_of_models_are_compared_in_their_section_only():
    models = section_named("Models")
    for comparison in NODES:
        if isinstance(comparison, ast.Compare) and comparison.lineno not in models:
            attributes = {getattr(part, "attr", "") for part in ast.walk(comparison)}
            assert "generation" not in attributes, comparison.lineno


# ---- form ----


def test_only_the_standard_library_is_imported():
    imports = [node for node in NODES if isinstance(node, ast.Import)]
    names = {alias.name for node in imports for alias in node.names}
    names |= {node.module for node in NODES if isinstance(node, ast.ImportFrom)}
    standard = getattr(sys, "stdlib_module_names", None)
    if standard is None:
        pytest.skip("Python 3.9 has no list of its modules")
    assert {name.partition(".")[0] for name in names} <= set(standard)


def test_the_syntax_is_that_of_python_3_9():
    ast.parse(SOURCE, feature_version=(3, 9))
    assert not [node.lineno for node in NODES if isinstance(node, getattr(ast, "Match", ()))]


def has_none(union):
    return any(getattr(side, "value", union) is None for side in (union.left, union.right))


def test_optional_types_stand_in_annotations_only():
    """Python 3.9 cannot evaluate `X | None`."""
    annotations = [
        getattr(node, field)
        for node in NODES
        for field in ("annotation", "returns")
        if getattr(node, field, None) is not None
    ]
    annotated = {id(part) for annotation in annotations for part in ast.walk(annotation)}
    for node in NODES:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and has_none(node):
            assert id(node) in annotated, node.lineno


def length(function):
    return function.end_lineno - function.lineno + 1


def test_nine_functions_in_ten_have_at_most_25_lines():
    lengths = sorted(map(length, FUNCTIONS))
    assert lengths[len(lengths) * 9 // 10] <= 25


def test_no_function_has_more_than_50_lines():
    assert [node.name for node in FUNCTIONS if length(node) > 50] == []


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def depth(node, level=0):
    """How deep blocks are nested in a function, where an `elif` is no deeper than its `if`."""
    depths = [level]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        depths.append(depth(child, level + isinstance(child, BLOCKS) - is_elif))
    return max(depths)


def test_blocks_are_nested_at_most_four_deep():
    assert [node.name for node in FUNCTIONS if depth(node) > 4] == []


def string_lines(source):
    """The lines on which a string begins, goes on or ends."""
    strings = (ast.JoinedStr, ast.Constant)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, strings)]
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


@pytest.mark.parametrize("name", ["proxy_to_gemini.py", "test_proxy.py"])
def test_lines_of_code_have_at_most_100_columns(name):
    source = (HERE / name).read_text(encoding="utf-8")
    lines = enumerate(source.splitlines(), 1)
    long = {i for i, line in lines if len(line) > 100 and "#" not in line}
    assert sorted(long - string_lines(source)) == []


def test_no_name_of_the_module_is_bound_twice():
    names = [name for node in TREE.body for name in names_bound_by(node)]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


def names_bound_by(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    names = [item for target in targets for item in getattr(target, "elts", [target])]
    return [item.id for item in names if isinstance(item, ast.Name)]


# ---- the README ----


def readme_table(heading):
    """The rows of the first table under a heading, as lists of cells."""
    table = re.search(
        rf"^#+ {re.escape(heading)}\n(?:(?!#).*\n)*?((?:\|.*\n)+)", README, re.M
    ).group(1)
    rows = table.splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_readmes_routes_are_the_programs():
    documented = {
        (api, *cell.strip("`").split(" ", 1))
        for route, apis, *_ in readme_table("Routes")
        for cell in route.split(", ")
        for api in apis.split(", ")
    }
    pages = [(method, path) for path, method in proxy.OWN_PAGES.items()]
    own = {(api, *page) for api in proxy.MOUNTS for page in pages}
    mounted = {
        (api, route.method, route.path)
        for api, mounts in proxy.MOUNTS.items()
        for _, protocol in mounts
        for route in protocol.routes
    }
    assert documented == mounted | own


def test_the_readmes_lines_for_clients_are_the_programs():
    example = {"url": "http://127.0.0.1:5555", "address": "127.0.0.1:5555"}
    example.update(host="HOST", port="5555")
    clients = [
        [name, api.strip("`"), re.sub(r"\{(\w+)\}", lambda word: example[word.group(1)], line)]
        for name, api, line in proxy.CLIENTS
    ]
    table = [
        [name, api.strip("`"), line] for name, api, line in readme_table("Point your client here")
    ]
    assert clients == table


def test_the_readmes_model_names_are_the_programs():
    uses = {
        "chats": "chat",
        "embeddings": "embedding",
        "images": "image",
        "transcripts": "transcript",
    }
    documented = set()
    for names, what, answering in readme_table("Model names"):
        use, model = uses.get(what, what), answering.split("`")[1]
        size = re.search(r"in (\d),(\d+) dimensions", answering)
        dimensions = int("".join(size.groups())) if size else None
        documented.add((use, model, dimensions))
        for name in re.findall(r"`([^`]+)`", names):
            example = re.sub(r"\*-", "x-", name.rstrip("*")) + ("x" if name.endswith("-*") else "")
            row = proxy.stand_in_for(example, (use,))
            assert (row.model, row.dimensions) == (model, dimensions), name
    assert documented == {(row.use, row.model, row.dimensions) for row in proxy.STAND_INS}


def test_the_readme_names_every_flag():
    flags = {"-" + name.replace("_", "-") for name in vars(proxy.flag_parser().parse_args([]))}
    assert {name.strip("`") for name, *_ in readme_table("Flags and environment")} == flags


def test_the_readme_names_every_variable_of_the_environment():
    table = README.partition("| environment |")[2].partition("\n\n")[0]
    documented = {
        name.strip("$")
        for cell in re.findall(r"^\|(.+?)\|", table, re.M)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    constants = [node for node in NODES if isinstance(node, ast.Constant)]
    used = {
        node.value
        for node in constants
        if node.lineno not in pure_lines()
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z]+(_[A-Z]+)+", node.value)
    }
    assert used <= documented


def test_the_readme_names_every_metric():
    documented = {
        name.strip("`"): (kind, tuple(re.findall(r"\w+", labels)))
        for name, kind, labels, _ in readme_table("Metrics")
    }
    metrics = {name: (family.kind, family.labels) for name, family in proxy.METRICS.items()}
    assert documented == metrics


def mib(number):
    return f"{number >> 20} MiB"


def kib(number):
    return f"{number >> 10} KiB"


def limits():
    """(the first words of a row, what must stand in it)"""
    return (
        ("body of a request", mib(proxy.MAX_BODY_BYTES)),
        ("body in gzip", mib(proxy.MAX_UNPACKED_BYTES)),
        ("body in gzip", f"{proxy.MAX_UNPACKED_RATIO} times"),
        ("a file's bytes", f"{proxy.MAX_UPLOAD_BYTES >> 30} GiB"),
        ("all bodies", mib(proxy.MAX_ALL_BODIES_BYTES)),
        ("request line", kib(proxy.MAX_HEAD_BYTES)),
        ("request line", f"{proxy.MAX_HEADER_LINES} header lines"),
        ("inputs", f"{proxy.MAX_EMBED_INPUTS:,}"),
        ("prompts repeated", f"{proxy.MAX_ECHO:,} characters"),
        ("an answer of Gemini's", mib(proxy.MAX_ANSWER_BYTES)),
        ("headers of an answer", f"{proxy.MAX_IGNORED_CHARACTERS} characters"),
        ("recordings", f"{proxy.MAX_RECORDINGS:,}, or {mib(proxy.MAX_RECORDINGS_BYTES)}"),
        ("recordings", f"{mib(proxy.MAX_TAPE_BYTES)} of a body"),
        ("recordings", f"{mib(proxy.MAX_TAPES_BYTES)} of all"),
        ("recordings", f"{proxy.MAX_UNWRITTEN_RECORDINGS} that wait"),
        ("a client's silence", f"{proxy.CLIENT_SECONDS:g} s"),
        ("a whole request", f"{proxy.CLIENT_SECONDS:g} s"),
        ("a whole request", f"{proxy.BODY_SECONDS:g} s"),
        ("connections of clients", f"{proxy.MAX_CONNECTIONS:,}"),
        ("connections to Gemini", f"{proxy.MAX_IDLE_CONNECTIONS} unused"),
        ("connections to Gemini", f"{proxy.IDLE_CONNECTION_SECONDS:g} s"),
        ("a connection to Gemini", f"{proxy.CONNECT_SECONDS:g} s"),
        ("an access token", f"{proxy.CONNECT_SECONDS:g} s to connect"),
        ("an access token", f"{proxy.TOKEN_ANSWER_SECONDS:g} s for the answer"),
        ("an access token", f"{proxy.METADATA_SECONDS:g} s for the metadata server"),
        ("an access token", f"{proxy.COMMAND_SECONDS:g} s for a command"),
        ("Gemini's silence", f"{configure().timeout:g} s"),
        ("Gemini's silence", f"every {proxy.KEEP_ALIVE_SECONDS:g} s"),
        ("tries", f"{proxy.MAX_ATTEMPTS}, "),
        ("tries", f"{proxy.MAX_BACKOFF_SECONDS:g} s"),
        ("tries", f"{proxy.RETRY_WINDOW_SECONDS:g} s"),
        ("memory", f"{proxy.Memory.MAX_ROWS:,} rows"),
        ("memory", mib(proxy.Memory.MAX_BYTES)),
        ("answers under way", f"{proxy.DRAIN_NOTICE_SECONDS + proxy.DRAIN_SECONDS:.0f} s"),
    )


def test_the_readmes_limits_are_the_programs():
    rows = {what: f"{limit}, {effect}" for what, limit, effect in readme_table("Limits")}
    for words, fact in limits():
        (row,) = [row for what, row in rows.items() if what.startswith(words)]
        assert fact in row, words


def test_each_limit_in_the_readme_is_compared_with_the_program():
    for what, *_ in readme_table("Limits"):
        assert any(what.startswith(words) for words, _ in limits()), what


def kinds_of(heading):
    """How each parameter of a table is treated."""
    return {
        name.strip("`"): kind
        for names, kind, *_ in readme_table(heading)
        for name in names.split(", ")
    }


def ignored_names(body, request=proxy.openai_chat_request, context=NO_CONTEXT):
    return plan_and_ignored(body, request, context)[1]


SAMPLES = {  # a value for each parameter of chat completions that is not OpenAI's default
    "model": FLASH,
    "messages": [user("Hi")],
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 9,
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "n": 2,
    "stop": ["a"],
    "seed": 7,
    "tools": [WEATHER],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "functions": [WEATHER["function"]],
    "function_call": "auto",
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "reasoning": {"effort": "low"},
    "modalities": ["text", "image"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {},
    "service_tier": "flex",
    "extra_body": {"google": {"thinking_config": {"thinking_budget": 1}}},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "media_resolution": "low",
    "image_config": {"aspect_ratio": "1:1"},
    "thinking_config": {"thinking_budget": 1},
    "cached_content": "cachedContents/x",
    "safety_settings": [{"category": "C", "threshold": "T"}],
    "google": {"thinking_config": {"thinking_budget": 1}},
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "logit_bias": {"1": 1},
    "logprobs": True,
    "top_logprobs": 2,
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "prediction": {"type": "content", "content": "x"},
    "verbosity": "low",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
}


def test_the_readme_says_which_parameters_of_chat_completions_are_ignored():
    kinds = kinds_of("Parameters of chat completions")
    companions = {
        "audio": {"modalities": ["text", "audio"]},
        "function_call": {"functions": [WEATHER["function"]]},
    }
    assert set(kinds) == set(SAMPLES)
    for name, kind in kinds.items():
        ignored = ignored_names({**chat(), **companions.get(name, {}), name: SAMPLES[name]})
        assert (name in ignored) is (kind == "ignored"), name


MEDIA_SAMPLES = {  # of each of the smaller endpoints: what it needs, and values that are not OpenAI's default
    "completions": (
        {"model": FLASH, "prompt": "x"},
        {
            **{
                name: SAMPLES[name]
                for name in (
                    "stream",
                    "stream_options",
                    "max_tokens",
                    "temperature",
                    "top_p",
                    "n",
                    "stop",
                    "seed",
                    "presence_penalty",
                    "frequency_penalty",
                    "logit_bias",
                    "user",
                )
            },
            "prompt": ["x", "y"],
            "suffix": "y",
            "echo": True,
            "best_of": 2,
            "logprobs": 1,
        },
    ),
    "images/generations": (
        {"model": "dall-e-3", "prompt": "x"},
        {
            "n": 2,
            "size": "1536x1024",
            "stream": True,
            "response_format": "url",
            "output_format": "webp",
            "quality": "high",
            "background": "transparent",
            "moderation": "low",
            "style": "vivid",
            "output_compression": 50,
            "partial_images": 2,
            "user": "u",
        },
    ),
    "images/edits": (
        {"model": "dall-e-3", "prompt": "x", "image": PNG_UPLOAD},
        {
            "n": 2,
            "size": "1536x1024",
            "stream": True,
            "response_format": "url",
            "output_format": "webp",
            "quality": "high",
            "background": "transparent",
            "moderation": "low",
            "mask": PNG_UPLOAD,
            "input_fidelity": "high",
            "output_compression": 50,
            "partial_images": 2,
            "user": "u",
        },
    ),
    "audio/speech": (
        {"model": "tts-1", "input": "x"},
        {
            "voice": "nova",
            "instructions": "softly",
            "response_format": "mp3",
            "stream_format": "sse",
            "speed": 2,
        },
    ),
    "audio/transcriptions": (
        {"model": "whisper-1", "file": proxy.Upload("a.wav", "", RIFF)},
        {
            "language": "no",
            "languages": ["no", "sv"],
            "keywords": ["Oslo"],
            "prompt": "x",
            "response_format": "srt",
            "temperature": "0.5",
            "stream": "true",
            "timestamp_granularities": ["word"],
            "include": ["logprobs"],
            "chunking_strategy": "x",
            "known_speaker_names": ["a"],
            "known_speaker_references": ["a"],
        },
    ),
}


def smaller_endpoints():
    """{endpoint: (the parameters that have an effect, those that are ignored)} of the README."""
    return {
        endpoint.strip("`"): [
            re.findall("`([^`]+)`", re.sub(r"\([^)]*\)", "", names)) for names in kinds
        ]
        for endpoint, *kinds in readme_table("Parameters of the smaller endpoints")
    }


def test_the_readme_lists_the_smaller_endpoints():
    assert set(smaller_endpoints()) == set(MEDIA_SAMPLES)


@pytest.mark.parametrize("endpoint", MEDIA_SAMPLES)
def test_the_readme_says_which_parameters_of_smaller_endpoints_are_ignored(endpoint):
    effective, ignored = smaller_endpoints()[endpoint]
    required, optional = MEDIA_SAMPLES[endpoint]
    samples = {**required, **optional}
    (route,) = [route for route in proxy.OPENAI.routes if route.path == "/v1/" + endpoint]
    assert sorted(effective + ignored) == sorted(samples)
    always = ignored_names(required, route.request)
    for name, value in samples.items():
        is_ignored = name in ignored_names({**required, name: value}, route.request)
        assert (is_ignored and name not in always) is (name in ignored), name


RESPONSE_SAMPLES = {
    "model": FLASH,
    "input": "Hi",
    "instructions": "Hm",
    "previous_response_id": "resp_1",
    "store": False,
    "metadata": {"a": "b"},
    "stream": True,
    "max_output_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.5,
    "tools": [{**WEATHER["function"], "type": "function"}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "service_tier": "flex",
    "truncation": "auto",
    "background": True,
    "user": "u",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "max_tool_calls": 3,
    "top_logprobs": 3,
    "context_management": [{"type": "compaction", "compact_threshold": 9000}],
}


def test_the_readme_says_which_parameters_of_responses_are_ignored():
    kinds = kinds_of("Parameters of responses")
    assert set(kinds) == set(RESPONSE_SAMPLES)
    previous = RESPONSE_SAMPLES["previous_response_id"]
    response = json.dumps({"input": [], "output": [], "previous_response_id": None})
    context = Context(stored={proxy.RESPONSE_PREFIX + previous: response})
    for name, kind in kinds.items():
        body = {"model": FLASH, "input": "Hi", name: RESPONSE_SAMPLES[name]}
        ignored = ignored_names(body, proxy.openai_responses_request, context)
        assert (name in ignored) is (kind == "ignored"), name


def test_the_readme_lists_the_names_of_googles_tools():
    rows = {key.strip("`"): names for key, names in readme_table("Google's own tools")}
    assert set(rows) == {*(key for _, key in proxy.HOSTED_TOOLS), proxy.MCP}
    for key in rows.keys() - {proxy.MCP}:
        for name in re.findall("`([^`]+)`", rows[key]):
            assert proxy.hosted_key(name) == key


OLLAMA_SAMPLES = {
    "model": FLASH,
    "messages": [user("Hi")],
    "stream": False,
    "format": "json",
    "think": False,
    "tools": [WEATHER],
    "keep_alive": "1m",
    "options.temperature": 0.1,
    "options.top_p": 0.5,
    "options.top_k": 5,
    "options.num_predict": 9,
    "options.seed": 7,
    "options.stop": ["a"],
    "options.num_ctx": 9,
    "options.repeat_penalty": 1.1,
    "options.presence_penalty": 1,
    "options.frequency_penalty": 1,
    "options.mirostat": 1,
    "logprobs": True,
    "prompt": "x",
    "suffix": "y",
    "system": "z",
    "raw": True,
    "images": [PNG],
    "template": "t",
    "context": [],  # numbers that nobody knows are ignored
}


def with_sample(body, name, samples):
    """The body with the sample of this parameter, which may be a field of an object."""
    key, _, inner_key = name.partition(".")
    if inner_key:
        return {**body, key: {inner_key: samples[name]}}
    return {**body, key: samples[name]}


def test_the_readme_says_which_parameters_of_ollama_are_ignored():
    kinds = kinds_of("Parameters of Ollama's chat and generate")
    generate = {"prompt", "suffix", "system", "raw", "images", "template", "context"}
    assert set(kinds) == set(OLLAMA_SAMPLES)
    for name, kind in kinds.items():
        body, request = chat(), proxy.ollama_chat_request
        if name in generate:
            body, request = {"model": FLASH, "prompt": "x"}, proxy.ollama_generate_request
        ignored = ignored_names(with_sample(body, name, OLLAMA_SAMPLES), request, OLLAMA)
        assert (name in ignored) is (kind == "ignored"), name


CLAUDE_SAMPLES = {
    "model": FLASH,
    "messages": [user("Hi")],
    "max_tokens": 9,
    "system": "x",
    "stream": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "stop_sequences": ["a"],
    "tools": [ASK_CITY],
    "tool_choice": {"type": "any"},
    "thinking": {"type": "adaptive"},
    "output_config.effort": "low",
    "output_config.format": {"type": "json_schema", "schema": {"type": "object"}},
    "output_format": {"type": "json_schema", "schema": {"type": "object"}},
    "cache_control": {"type": "ephemeral"},
    "metadata": {"user_id": "u"},
    "service_tier": "standard_only",
    "container": "c",
    "context_management": {"edits": [{}]},
    "mcp_servers": [{"type": "url", "name": "docs", "url": "https://mcp.example.com/mcp"}],
    "thread": {"type": "create"},
    "compaction": {"type": "summarize"},
}


def test_the_readme_says_which_parameters_of_messages_are_ignored():
    kinds = kinds_of("Parameters of Anthropic's messages")
    assert set(kinds) == set(CLAUDE_SAMPLES)
    for name, kind in kinds.items():
        body = with_sample(claude_chat(), name, CLAUDE_SAMPLES)
        if name == "tool_choice":
            body["tools"] = [ASK_CITY]
        ignored = ignored_names(body, proxy.anthropic_messages_request, CLAUDE)
        assert (name in ignored) is (kind == "ignored"), name


# ======================================================================================
# The official libraries
# ======================================================================================

RESULT = '{"temp": 3}'  # of a tool, and what the stand-in makes of it:
ANSWER_TO_RESULT = 'The function said: {"temp": 3}'
SLOW_DOWN = gemini_error(429, "Slow down.", "X", detail("RetryInfo", retryDelay="9s"))


def signature_of_call(gemini):
    """The signature of the tool call in the history of Gemini's last request."""
    return gemini.bodies[-1]["contents"][1]["parts"][0]["thoughtSignature"]


# ---- ollama ----


@pytest.fixture
def ollama_library(gemini):
    module = pytest.importorskip("ollama")
    with serving(gemini.url, api="ollama") as server, module.Client(host=server.url) as client:
        yield client


def test_ollamas_library_lists_models(ollama_library):
    assert FLASH + ":latest" in [model.model for model in ollama_library.list().models]


def test_ollamas_library_shows_what_a_model_can_do(ollama_library):
    assert "tools" in ollama_library.show(FLASH).capabilities


def test_ollamas_library_gets_an_error_for_an_unknown_model(ollama_library):
    import ollama

    with pytest.raises(ollama.ResponseError, match="not found"):
        ollama_library.show("gemini-9")


def test_ollamas_library_streams_the_answer_to_a_tools_result(ollama_library, gemini):
    history = [user("Hi")]
    first = ollama_library.chat(model=NEWEST, messages=history, tools=[WEATHER])
    history += [first.message, {"role": "tool", "content": RESULT}]
    stream = ollama_library.chat(model=NEWEST, messages=history, tools=[WEATHER], stream=True)
    assert "".join(part.message.content for part in stream) == ANSWER_TO_RESULT
    assert signature_of_call(gemini) == sign("stand-in")


@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_library_takes_answers_with_images(ollama_library, gemini, stream):
    gemini.say(whole(IMAGE), whole(IMAGE))
    answer = ollama_library.chat(model=FLASH, messages=[user("Draw")], stream=stream)
    first = next(answer) if stream else answer
    assert first.message.content == IMAGE_NOTE
    answer = ollama_library.generate(model=FLASH, prompt="Draw", stream=stream)
    assert (next(answer) if stream else answer).image == PNG


def test_ollamas_library_embeds(ollama_library):
    embeddings = ollama_library.embed(model=EMBEDDER, input=["a"]).embeddings
    assert embeddings[0] == pytest.approx([0.6, 0.8])


# ---- anthropic ----


@pytest.fixture(params=sorted(proxy.MOUNTS))
def anthropic_library(gemini, request):
    """Anthropic's client, which checks that answers are of its types."""
    module = pytest.importorskip("anthropic")
    options = {"api_key": "any", "max_retries": 0, "_strict_response_validation": True}
    with (
        serving(gemini.url, api=request.param) as server,
        module.Anthropic(base_url=server.url, **options) as client,
    ):
        yield client


CLAUDE_PLAN = {"model": "claude-opus-5", "max_tokens": 2000, "tools": [ASK_CITY]}


def claude_with_call(client):
    """A streamed message in which the model thinks and calls a tool."""
    thinking = {"type": "adaptive"}
    with client.messages.stream(messages=[user("Hi")], thinking=thinking, **CLAUDE_PLAN) as stream:
        return stream.get_final_message()


def claude_history(client):
    """The messages up to the result of the tool."""
    content = claude_with_call(client).content
    result = {"type": "tool_result", "tool_use_id": content[1].id, "content": RESULT}
    return [user("Hi"), {"role": "assistant", "content": content}, user([result])]


def test_anthropics_library_streams_a_thought_and_a_tool_call(anthropic_library):
    message = claude_with_call(anthropic_library)
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    assert message.stop_reason == "tool_use"


def test_anthropics_library_gets_the_answer_to_a_tools_result(anthropic_library, gemini):
    history = claude_history(anthropic_library)
    message = anthropic_library.messages.create(messages=history, **CLAUDE_PLAN)
    assert message.content[0].text == ANSWER_TO_RESULT
    assert signature_of_call(gemini) == sign("stand-in")


def test_anthropics_library_counts_tokens(anthropic_library):
    count = anthropic_library.messages.count_tokens(
        model="claude-opus-5", messages=claude_history(anthropic_library), tools=[ASK_CITY]
    )
    assert count.input_tokens == 7


def test_anthropics_library_gets_a_rate_limit_with_the_id_of_the_request(anthropic_library, gemini):
    import anthropic

    gemini.say(SLOW_DOWN)
    with pytest.raises(anthropic.RateLimitError) as caught:
        anthropic_library.messages.create(messages=[user("Hi")], **CLAUDE_PLAN)
    assert caught.value.request_id
    assert caught.value.request_id == caught.value.body["request_id"]


def test_anthropics_library_reads_the_models_page_by_page(anthropic_library):
    models = list(anthropic_library.models.list(limit=1))
    assert [model.display_name for model in models] == [FLASH, NEWEST, EMBEDDER][: len(models)]
    assert len(models) > 1
    assert anthropic_library.models.retrieve(models[0].id).max_tokens == 65536


# ---- google-genai ----


@pytest.fixture(params=["v1", "v1beta"])
def google_library(locked, request):
    """Google's client, whose key is the one that the server wants of its clients."""
    genai = pytest.importorskip("google.genai")
    options = {"base_url": locked.url, "api_version": request.param}
    with genai.Client(api_key="px-1", http_options=options) as client:
        yield client


def test_googles_library_gets_an_answer_and_a_stream(google_library):
    plan = {"model": NEWEST, "contents": "Hi"}
    answer = google_library.models.generate_content(**plan).text
    pieces = google_library.models.generate_content_stream(**plan)
    assert answer == "".join(piece.text or "" for piece in pieces)
    assert answer.endswith("You said: Hi")


def test_googles_library_keeps_the_signatures_of_its_calls(google_library, gemini):
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    conversation = google_library.chats.create(model=NEWEST, config={"tools": [weather]})
    for city in ("Rome", "Oslo"):
        gemini.say(whole(call("weather", {"city": city}, city)), whole(f"It is sunny in {city}."))
        assert conversation.send_message(city).text == f"It is sunny in {city}."
    parts = [part for content in gemini.bodies[-1]["contents"] for part in content["parts"]]
    signed = [part["thoughtSignature"] for part in parts if "functionCall" in part]
    own = [base64.urlsafe_b64encode(base64.b64decode(sign(city))) for city in ("Rome", "Oslo")]
    assert [text.encode() for text in signed] == own


def test_googles_library_lists_models_and_counts_tokens(google_library):
    assert [model.name for model in google_library.models.list()] == [
        entry["name"] for entry in MODELS
    ]
    assert google_library.models.count_tokens(model=NEWEST, contents="Hi").total_tokens > 0


def test_googles_library_gets_googles_words_of_a_refusal(google_library, gemini):
    from google.genai import errors

    gemini.say(SLOW_DOWN)
    with pytest.raises(errors.ClientError) as caught:
        google_library.models.generate_content(model=NEWEST, contents="Hi")
    assert (caught.value.code, caught.value.status) == (429, "X")  # as the stand-in says


def test_googles_library_uploads_a_file_although_it_sends_no_key_with_it(google_library, gemini):
    started = Say(raw=b"", headers=[("X-Goog-Upload-URL", GOOGLES_UPLOAD)])
    file = json.dumps({"file": {"name": "files/a", "state": "ACTIVE"}}).encode()
    gemini.say(started, Say(raw=file, headers=[("X-Goog-Upload-Status", "final")]))
    data, config = b"hello" * 1000, {"mime_type": "text/plain"}
    assert google_library.files.upload(file=io.BytesIO(data), config=config).name == "files/a"
    assert gemini.passed[-1][3] == data


# ---- openai ----


@pytest.fixture
def openai_library(server):
    """OpenAI's client, which checks that answers are of its types."""
    module = pytest.importorskip("openai")
    options = {"api_key": "any", "max_retries": 0, "_strict_response_validation": True}
    with module.OpenAI(base_url=server.url + "/v1", **options) as client:
        yield client


@pytest.fixture
def lenient_library(server):
    """OpenAI's client for what its own types do not fit, such as vectors in base64."""
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        yield client


def completion_with_call(client):
    """A streamed message that calls a tool."""
    plan = chat(model=NEWEST, tools=[WEATHER])
    with client.chat.completions.stream(**plan) as stream:
        return stream.get_final_completion().choices[0].message


def test_openais_library_gets_a_completion(openai_library):
    completion = openai_library.chat.completions.create(**chat())
    assert "You said: Hi" in completion.choices[0].message.content


def test_openais_library_streams_a_tool_call(openai_library):
    assert completion_with_call(openai_library).tool_calls[0].function.name == "weather"


def test_openais_library_streams_the_answer_to_a_tools_result(openai_library, gemini):
    message = completion_with_call(openai_library)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": RESULT}
    body = chat(user("Hi"), kept(message.model_dump()), result, model=NEWEST, tools=[WEATHER])
    events = openai_library.chat.completions.create(**body, stream=True)
    choices = [choice for event in events for choice in event.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == ANSWER_TO_RESULT
    assert signature_of_call(gemini) == sign("stand-in")


def test_openais_library_gets_a_rate_limit_instead_of_a_stream(openai_library, gemini):
    import openai

    gemini.say(SLOW_DOWN)
    with pytest.raises(openai.RateLimitError):
        openai_library.chat.completions.create(**chat(), stream=True)


def test_openais_library_streams_a_text_completion(lenient_library, gemini):
    gemini.say([chunk(" up"), whole("on")])
    stream = lenient_library.completions.create(model=FLASH, prompt="Once", stream=True)
    assert "".join(choice.text for part in stream for choice in part.choices) == " upon"


def test_openais_library_embeds(lenient_library):
    vectors = lenient_library.embeddings.create(model=EMBEDDER, input=["a", "b"]).data
    assert vectors[1].embedding == pytest.approx([0.6, 0.8])


def test_openais_library_lists_models(lenient_library):
    assert FLASH in [model.id for model in lenient_library.models.list()]


# ---- openai: responses ----


def response_with_call(client):
    """A streamed response that calls a tool, and what returns the result of that tool."""
    include = ["reasoning.encrypted_content"]
    plan = {"model": NEWEST, "input": "Hi", "tools": [FLAT], "include": include}
    with client.responses.stream(**plan) as stream:
        response = stream.get_final_response()
    tool_call = next(item for item in response.output if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": tool_call.call_id, "output": RESULT}
    return response, result


def test_openais_library_continues_a_stored_response(openai_library, gemini):
    first, result = response_with_call(openai_library)
    plan = {"model": NEWEST, "tools": [FLAT], "input": [result], "previous_response_id": first.id}
    assert openai_library.responses.create(**plan).output_text == ANSWER_TO_RESULT
    assert signature_of_call(gemini) == sign("stand-in")


def test_openais_library_sends_the_items_of_a_response_again(openai_library, gemini):
    first, result = response_with_call(openai_library)
    items = [user("Hi"), *(item.model_dump() for item in first.output), result]
    second = openai_library.responses.create(model=NEWEST, tools=[FLAT], input=items)
    assert second.output_text == ANSWER_TO_RESULT
    assert signature_of_call(gemini) == sign("stand-in")


def test_openais_library_retrieves_a_response(openai_library):
    first, _ = response_with_call(openai_library)
    stored = openai_library.responses.retrieve(first.id)
    assert [item.id for item in stored.output] == [item.id for item in first.output]


def test_openais_library_lists_the_input_of_a_response(openai_library):
    first, _ = response_with_call(openai_library)
    assert openai_library.responses.input_items.list(first.id).data[0].content[0].text == "Hi"


def test_openais_library_counts_the_tokens_of_an_input(openai_library):
    assert openai_library.responses.input_tokens.count(model=FLASH, input="Hi").input_tokens == 7


def test_openais_library_deletes_a_response(openai_library):
    import openai

    first, _ = response_with_call(openai_library)
    openai_library.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        openai_library.responses.retrieve(first.id)


def has_method(resource, name):
    """Skips the test where the library is too old for what it is about."""
    if not hasattr(resource, name):
        pytest.skip(f"this library has no {name}()")
    return getattr(resource, name)


def test_openais_library_compacts_a_conversation(lenient_library, gemini):
    compact = has_method(lenient_library.responses, "compact")
    gemini.say(whole("We spoke."), whole("Yes."))
    compacted = compact(model=FLASH, input=[user("Hi"), assistant("Hello.")])
    assert [item.type for item in compacted.output] == ["message", "compaction"]
    # Its types know no messages of the user's in an output.
    items = [item.model_dump(exclude_none=True, warnings=False) for item in compacted.output]
    items.append(user("And?"))
    assert lenient_library.responses.create(model=FLASH, input=items).output_text == "Yes."
    assert gemini.bodies[-1]["contents"] == [u("Hi", *SUMMARY["parts"], "And?")]


def test_openais_library_streams_an_answer_after_a_compaction(lenient_library, gemini):
    gemini.say(whole("We spoke."), whole("Hello."))
    more = {"extra_body": {"context_management": managed(1)["context_management"]}}
    with lenient_library.responses.stream(model=FLASH, input="Hi", **more) as stream:
        response = stream.get_final_response()
    assert [item.type for item in response.output] == ["compaction", "message"]
    assert response.output_text == "Hello."


def test_openais_library_gets_a_call_of_its_search_for_tools(lenient_library, gemini):
    gemini.say(whole(call("tool_search", {"query": "weather"})))
    response = lenient_library.responses.create(model=FLASH, input="Hi", tools=[FINDER])
    assert response.output[0].type == "tool_search_call"
    assert response.output[0].arguments == {"query": "weather"}


def test_openais_library_raises_an_error_when_gemini_hangs_up(openai_library, gemini):
    gemini.say(Say(chunk("Hel"), cut=1))
    stream = openai_library.responses.create(model=FLASH, input="Hi", stream=True)
    texts = []
    with pytest.raises(sys.modules["openai"].APIError) as caught:
        texts.extend(event.delta for event in stream if event.type == "response.output_text.delta")
    assert texts == ["Hel"]
    assert caught.value.code == "server_error"


# ---- openai: media ----

RECORDING = ("a.wav", RIFF)


def test_openais_library_draws_an_image(openai_library, gemini):
    gemini.say(whole(blob("image/png", PNG)))
    plan = {"prompt": "A dot", "size": "1536x1024", "output_format": "png"}
    images = openai_library.images.generate(model="gpt-image-1", **plan)
    assert images.data[0].b64_json == PNG


def test_openais_library_edits_images(openai_library, gemini):
    gemini.say(whole(blob("image/png", PNG)))
    files = [("a.png", PNG_UPLOAD.data), ("b.png", PNG_UPLOAD.data)]
    plan = {"model": "gpt-image-1", "prompt": "Redder", "image": files, "mask": files[0]}
    assert openai_library.images.edit(**plan).data[0].b64_json == PNG
    assert gemini.bodies[-1]["contents"] == [u(DOT, DOT, "Redder")]


def test_openais_library_streams_an_image(openai_library, gemini):
    gemini.say(whole(blob("image/png", PNG)))
    plan = {"prompt": "A dot", "stream": True, "partial_images": 1}
    events = openai_library.images.generate(model="gpt-image-1", **plan)
    assert [event.b64_json for event in events] == [PNG]


def test_openais_library_gets_speech(openai_library, gemini):
    gemini.say(whole(AUDIO))
    plan = {"model": "tts-1", "voice": "alloy", "input": "Hi"}
    assert openai_library.audio.speech.create(**plan).content == RIFF


def test_openais_library_streams_speech(openai_library, gemini):
    gemini.say([chunk(AUDIO), whole(AUDIO)])
    plan = {"model": "tts-1", "voice": "alloy", "input": "Hi", "response_format": "pcm"}
    with openai_library.audio.speech.with_streaming_response.create(**plan) as audio:
        assert b"".join(audio.iter_bytes()) == PCM_SAMPLES * 2


def test_openais_library_gets_a_transcript(openai_library, gemini):
    gemini.say(whole("Hei."))
    plan = {"model": "whisper-1", "file": RECORDING, "language": "no", "temperature": 0}
    assert openai_library.audio.transcriptions.create(**plan).text == "Hei."


def test_openais_library_streams_a_transcript(openai_library, gemini):
    gemini.say([chunk("He"), whole("i.")])
    plan = {"model": "gpt-4o-transcribe", "file": RECORDING, "stream": True}
    *deltas_of_text, done = openai_library.audio.transcriptions.create(**plan)
    assert [event.type for event in deltas_of_text] == ["transcript.text.delta"] * 2
    assert done.type == "transcript.text.done"
    assert done.text == "Hei."


def test_openais_library_gets_subtitles(openai_library, gemini):
    gemini.say(whole(TIMED))
    plan = {"model": "whisper-1", "file": RECORDING, "response_format": "srt"}
    assert openai_library.audio.transcriptions.create(**plan).startswith("1\n00:00:01,500 --> ")


def test_openais_library_gets_a_transcript_with_speakers(openai_library, gemini):
    gemini.say(whole(TIMED))
    model, form = "gpt-4o-transcribe-diarize", "diarized_json"
    transcript = openai_library.audio.transcriptions.create(
        model=model, file=RECORDING, response_format=form
    )
    assert transcript.segments[1].speaker == "B"


def test_openais_library_gets_a_verbose_transcript(lenient_library, gemini):
    gemini.say(whole(TIMED))
    transcript = lenient_library.audio.transcriptions.create(
        model="whisper-1",
        file=RECORDING,
        response_format="verbose_json",
        timestamp_granularities=["segment"],
    )
    assert transcript.duration == 3661.25
    assert transcript.segments[0].text == "Hello --> there."
    assert transcript.language == "english"
