"""Tests of proxy_to_gemini.py, in the order of its sections; and the stand-in Gemini that they talk to.

    python3 -m pytest -W error test_proxy.py     the tests; they need pytest and no network
    python3 test_proxy.py PORT                   the stand-in alone, to try things without a key

The stand-in is as strict as the real service: it refuses unknown fields, wrong turn order, unsigned
calls, and settings that a model does not take, each with Google's own kind of message.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
    "serviceTier": ANY,
    "safetySettings": [{"category": ANY, "threshold": ANY}],
    "tools": [
        {
            "functionDeclarations": [
                {"name": ANY, "description": ANY, "parametersJsonSchema": SCHEMA}
            ],
            "googleSearch": {},
            "codeExecution": {},
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
            ),
            ANY,
        ),
        "thinkingConfig": {"thinkingBudget": ANY, "thinkingLevel": ANY, "includeThoughts": ANY},
        "imageConfig": {"aspectRatio": ANY, "imageSize": ANY},
        "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": ANY}}},
    },
}
EMBED = {"requests": [{"model": ANY, "content": CONTENT, "outputDimensionality": ANY}]}
COUNT = {"contents": [CONTENT], "generateContentRequest": {"model": ANY, **GENERATE}}
SHAPES = {
    "generateContent": GENERATE,
    "streamGenerateContent": GENERATE,
    "batchEmbedContents": EMBED,
    "countTokens": COUNT,
}


def unknown_field(value, shape, path=""):
    """Google's complaint of the first field that it does not know; None where it knows all."""
    if shape is ANY:
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"Invalid value at '{path}': not a list"
        return next(
            filter(
                None,
                (unknown_field(item, shape[0], f"{path}[{i}]") for i, item in enumerate(value)),
            ),
            None,
        )
    if not isinstance(value, dict):
        return f"Invalid value at '{path}': not an object"
    for key, inner in value.items():
        if key not in shape:
            return f"Invalid JSON payload received. Unknown name \"{key}\" at '{path}': Cannot find field."
        found = unknown_field(inner, shape[key], f"{path}.{key}".lstrip("."))
        if found:
            return found
    return None


def generation(model):
    told = re.match(r"gemini-(\d+(?:\.\d+)?)", model)
    return float(told.group(1)) if told else 99.0


def refused_turns(model, contents):
    """Why Gemini would refuse the order of these turns, or None."""
    if not contents:
        return "contents is not specified"
    for i, content in enumerate(contents):
        parts = content.get("parts") or []
        if not parts:
            return f"contents[{i}].parts must not be empty."
        if content.get("role") not in ("user", "model"):
            return "Please use a valid role: user, model."
        calls = [part["functionCall"] for part in parts if "functionCall" in part]
        if calls and (i == 0 or contents[i - 1]["role"] != "user"):
            return "Please ensure that function call turn comes immediately after a user turn or after a function response turn."
        after = contents[i + 1]["parts"] if i + 1 < len(contents) else []
        answers = [part["functionResponse"] for part in after if "functionResponse" in part]
        if calls and [call["name"] for call in calls] != [answer["name"] for answer in answers]:
            return (
                "Please ensure that the number of function response parts is equal to the number of function call parts "
                "of the function call turn."
            )
    if contents[0]["role"] != "user":
        return "Please ensure that the first turn is the user's."
    if contents[-1]["role"] == "model" and (generation(model) >= 3.6 or "3.5-flash-lite" in model):
        return "Requests ending with a model turn are not supported."
    return unsigned_call(contents) if generation(model) >= 3 and "image" not in model else None


def unsigned_call(contents):
    """Gemini 3's complaint of a call in the current turn without its signature."""
    start = max(
        (
            i
            for i, content in enumerate(contents)
            if content["role"] == "user"
            and not any("functionResponse" in part for part in content["parts"])
        ),
        default=0,
    )
    for content in contents[start:]:
        calls = [part for part in content["parts"] if "functionCall" in part]
        if calls and not calls[0].get("thoughtSignature"):
            return (
                f"Function call is missing a thought_signature in functionCall parts. Additional data, function call "
                f"`default_api:{calls[0]['functionCall']['name']}`."
            )
    return None


def refused_settings(model, body):
    """Why Gemini would refuse these settings, or None."""
    config, new = body.get("generationConfig", {}), generation(model)
    thinking = config.get("thinkingConfig", {})
    names = [
        d["name"] for tool in body.get("tools", []) for d in tool.get("functionDeclarations", [])
    ]
    own = {key for tool in body.get("tools", []) for key in tool} - {"functionDeclarations"}
    tool_config = body.get("toolConfig", {})
    rules = (
        (
            "thinkingBudget" in thinking and "thinkingLevel" in thinking,
            "You can only set only one of thinking budget and thinking level.",
        ),
        (
            "thinkingLevel" in thinking and new < 3,
            "Thinking level is not supported for this model.",
        ),
        (thinking and new < 2.5, "Thinking is not supported for this model."),
        (
            thinking.get("thinkingLevel") == "MINIMAL" and (new in (3.7, 3.8, 4) or "pro" in model),
            "Thinking level MINIMAL is not supported for this model.",
        ),
        (
            thinking.get("thinkingBudget") == 0 and "2.5-pro" in model,
            "Budget 0 is invalid. This model only works in thinking mode.",
        ),
        (
            new >= 2.5 and (config.get("presencePenalty") or config.get("frequencyPenalty")),
            "Penalty is not enabled for this model",
        ),
        (
            new >= 3 and config.get("candidateCount", 1) > 1,
            "Multiple candidates is not enabled for this model",
        ),
        (config.get("maxOutputTokens", 1) < 1, "max_output_tokens must be positive."),
        (not 0 <= config.get("temperature", 0) <= 2, "temperature must be within [0, 2]."),
        (
            not -(2**31) <= config.get("seed", 0) < 2**31,
            "Invalid value at 'generation_config.seed'",
        ),
        (
            len(config.get("stopSequences", [])) > 5 or "" in config.get("stopSequences", []),
            "Invalid stop sequences.",
        ),
        (
            "responseJsonSchema" in config and config.get("responseMimeType") != "application/json",
            "A schema needs a JSON mime type.",
        ),
        (
            names and config.get("responseMimeType") == "application/json" and new < 3,
            "Function calling with a response mime type: 'application/json' is unsupported",
        ),
        (
            names
            and own
            and not (new >= 3 and tool_config.get("includeServerSideToolInvocations")),
            "Tool use with function calling is unsupported",
        ),
        (
            tool_config.get("functionCallingConfig") and not names,
            "Function calling config is set without function_declarations.",
        ),
        (
            set(tool_config.get("functionCallingConfig", {}).get("allowedFunctionNames", []))
            - set(names),
            "Undeclared function.",
        ),
        (len(set(names)) < len(names), "Duplicate function declaration found"),
        (
            any(not re.fullmatch(r"[A-Za-z_][\w.:-]{0,127}", name, re.ASCII) for name in names),
            "Invalid function name.",
        ),
    )
    return next((message for wrong, message in rules if wrong), None)


def refusal_of(path, body):
    """The message with which Gemini would refuse this request, or None."""
    model, _, verb = path.partition("?")[0].rpartition("/")[2].partition(":")
    shape = SHAPES.get(verb)
    if shape is None:
        return None if body is None else f"unknown method {verb}"
    return unknown_field(body, shape) or (
        refused_turns(model, body.get("contents", [])) or refused_settings(model, body)
        if shape is GENERATE
        else None
    )


class Say:
    """What the stand-in says to one request."""

    def __init__(self, *chunks, status=200, raw=None, headers=(), delay=0.0, gap=0.0, cut=None):
        self.chunks, self.status, self.raw, self.headers = list(chunks), status, raw, list(headers)
        self.delay, self.gap = delay, gap  # seconds before the answer, and after each chunk
        self.cut = cut  # hang up after this many chunks


def chunk(*parts, finish=None, usage=None, **candidate):
    """A chunk of an answer; plain strings are text parts."""
    made = [{"text": part} if isinstance(part, str) else part for part in parts]
    out = {
        "candidates": [
            {
                "content": {"role": "model", "parts": made},
                "index": 0,
                **({"finishReason": finish} if finish else {}),
                **candidate,
            }
        ]
    }
    return {**out, "usageMetadata": usage} if usage else out


USAGE = {
    "promptTokenCount": 4,
    "candidatesTokenCount": 5,
    "thoughtsTokenCount": 2,
    "totalTokenCount": 11,
}


def whole(*parts, finish="STOP", usage=USAGE, **candidate):
    return chunk(*parts, finish=finish, usage=usage, **candidate)


def call(name, args=None, signature=None):
    part = {"functionCall": {"name": name, "args": args or {}}}
    return {**part, "thoughtSignature": sign(signature)} if signature else part


def sign(word):
    return base64.b64encode(b"\x12" + word.encode() * 8).decode()


def gemini_error(status, message, word="INVALID_ARGUMENT", *details):
    return Say(
        {"error": {"code": status, "message": message, "status": word, "details": list(details)}},
        status=status,
    )


def joined(chunks):
    """The plain answer that the chunks of a stream amount to."""
    out = {}
    for one in chunks:
        parts = out["candidates"][0]["content"]["parts"] if "candidates" in out else []
        out = {**out, **one}
        for candidate in out.get("candidates", [])[:1]:
            parts = parts + candidate.get("content", {}).get("parts", [])
            out["candidates"] = [{**candidate, "content": {"role": "model", "parts": parts}}]
    return out


def obliging(path, body):
    """An answer for whoever tries things: it calls the first function that it is offered, and tells of its result."""
    verb = path.partition("?")[0].partition(":")[2]
    if verb == "batchEmbedContents":
        return Say({"embeddings": [{"values": [0.6, 0.8]} for _ in body["requests"]]})
    if verb == "countTokens":
        return Say({"totalTokens": 7})
    said = [part for content in body["contents"] for part in content["parts"]]
    functions = [d for tool in body.get("tools", []) for d in tool.get("functionDeclarations", [])]
    results = [part["functionResponse"] for part in said if "functionResponse" in part]
    if functions and not results:
        wanted = functions[0].get("parametersJsonSchema", {}).get("properties", {})
        args = {
            name: "Oslo" if schema.get("type") == "string" else 1 for name, schema in wanted.items()
        }
        return Say(chunk(call(functions[0]["name"], args, "stand-in")), whole(""))
    if results:
        return Say(chunk("The function said: "), whole(json.dumps(results[-1]["response"])))
    question = next((part["text"] for part in reversed(said) if part.get("text")), "")
    return Say(
        chunk("Hello from the stand-in "), chunk("for Gemini. You said: "), whole(question[:200])
    )


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
    """The stand-in: it says what it was told to say, and else obliges; `asked` are the bodies that it was asked with."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port=0, log=False):
        super().__init__(("127.0.0.1", port), StandInHandler)
        self.said, self.asked, self.paths, self.headers, self.refused = [], [], [], [], []
        self.opened, self.gone, self.log = 0, threading.Event(), log
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def say(self, *answers):
        """Say these in turn: Say, a chunk, or a list of chunks."""
        self.said = [
            one if isinstance(one, Say) else Say(*one) if isinstance(one, list) else Say(one)
            for one in answers
        ]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        self.gone.set()


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
        self.whole(Say(raw=json.dumps({"models": MODELS}).encode()))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        verb = self.path.partition("?")[0].partition(":")[2]
        message = refusal_of(self.path, body)
        with self.server.lock:
            if verb != "countTokens":
                self.server.asked.append(body)
                self.server.paths.append(self.path)
                self.server.headers.append(dict(self.headers))
            said = (
                self.server.said.pop(0) if self.server.said and verb != "countTokens" else obliging
            )
        if not self.headers["x-goog-api-key"]:
            said = gemini_error(
                403, "Method doesn't allow unregistered callers.", "PERMISSION_DENIED"
            )
        elif message:
            self.server.refused.append(message)
            said = gemini_error(400, message)
        said = said(self.path, body) if callable(said) else said
        if said.delay:
            self.pause(said.delay)
        if "alt=sse" in self.path and said.status == 200 and said.raw is None:
            self.stream(said)
        else:
            self.whole(said)

    def pause(self, seconds):
        """Wait, but notice a client that leaves."""
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
        except TimeoutError:
            pass
        except socket.timeout:  # another class before Python 3.10
            pass
        self.connection.settimeout(None)

    def whole(self, said):
        if said.cut == 0:
            return self.hang_up()
        data = json.dumps(joined(said.chunks), indent=2).encode() if said.raw is None else said.raw
        self.send_response(said.status)
        for name, value in [
            ("Content-Type", "application/json; charset=UTF-8"),
            *said.headers,
            ("Content-Length", str(len(data))),
        ]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, said):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i, one in enumerate(said.chunks):
            if said.cut == i:
                return self.hang_up()
            data = (
                one
                if isinstance(one, bytes)
                else b"data: " + json.dumps(one).encode() + b"\r\n\r\n"
            )
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            if said.gap:
                self.pause(said.gap)
        self.wfile.write(b"0\r\n\r\n")

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    with StandIn(int(sys.argv[1]) if len(sys.argv) > 1 else 0, log=True) as alone:
        print(f"the stand-in for Gemini listens at {alone.url}; any key will do", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(0)

# ======================================================================================
# Words for the tests
# ======================================================================================

import ast
import contextlib
import gc
import hashlib
import http.client
import itertools
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import urllib.parse
from pathlib import Path

import pytest

import proxy_to_gemini as proxy
from proxy_to_gemini import ToolCall, End, Exchange, Fields, ProxyError, Context, Text, Usage

HERE = Path(__file__).resolve().parent
FLASH, NEWEST, EMBEDDER = "gemini-2.5-flash", "gemini-3.8-flash", "gemini-embedding-001"
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCRIPTS = (
    'Ærlig – 日本語 👩‍👩‍👧 line\u2028paragraph\u2029next\x85end "quoted" \\ </script>\ttab\nnewline'
)
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool_call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


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


def exchange(plan=None, context=Context()):
    """An exchange whose ids count up, at a time that stands still."""
    return Exchange(plan or proxy.Plan(model="m"), context, "", 1700000000.5)


class Notes(dict):
    """What is stored, in place of the program's Memory."""

    def put(self, key, alias, text):
        self[key] = text

    def keep(self, shelf, key, text):
        self[key] = text
        if not text:
            del self[key]

    def kept(self, shelf):
        return [(key, text) for key, text in self.items() if key.startswith("model:")]


def looked_up(route, body, context, notes):
    """The context with what the route wants to know of what is stored."""
    keys = proxy.recipe_keys(Fields(body), context) + route.keys(Fields(body), context)
    return context._replace(stored=proxy.Shelf(notes, "").look_up(keys))


def kept_by(answer, notes):
    """A whole answer, or a list of events, without what they want to be kept; that is in the notes then."""
    if isinstance(answer, list):
        items = [item for item in answer if isinstance(item, proxy.Keep)]
        rest = [item for item in answer if not isinstance(item, proxy.Keep)]
    elif isinstance(answer, proxy.Kept):
        items, rest = answer.keep, answer.answer
    else:
        return answer
    for item in items:
        proxy.Shelf(notes, "").keep(item)
    return rest


def whole_of(route, one, *answers, notes=None):
    """The whole answer of a route, when Gemini says these lists of chunks to its calls."""
    events = events_of(one, answers)
    answer = (
        route.response(one, events)
        if route.response
        else proxy.last_event(route.stream(one, events))
    )
    return kept_by(answer, Notes() if notes is None else notes)


def stream_of(route, one, *answers, notes=None):
    """The same, as events."""
    return kept_by(
        list(route.stream(one, events_of(one, answers))), Notes() if notes is None else notes
    )


def openai_route(path, method="POST"):
    return next(
        route for route in proxy.OPENAI.routes if (route.method, route.path) == (method, path)
    )


CHAT_ROUTE, RESPONSES_ROUTE = openai_route("/v1/chat/completions"), openai_route("/v1/responses")


def events_of(one, answers):
    """The events, or the chunks, that a route gets of these answers."""
    for call, chunks in zip(one.plan.calls, answers):
        if not call.generates:
            yield iter(chunks)
            continue
        events = with_ids(proxy.read_gemini(iter(chunks), one), one)
        yield proxy.chat_events(events, call, one.chat) if one.chat else events


def with_ids(events, one):
    for event in events:
        if isinstance(event, ToolCall):
            event = event._replace(id=one.new_id("call_"))
        yield event


def chat(*messages, model=FLASH, **more):
    return {"model": model, "messages": list(messages) or [user("Hi")], **more}


def asked(body, request=proxy.openai_chat_request, context=Context()):
    """(the Plan, what was ignored) for a body."""
    fields = Fields(body)
    plan = request(fields, context)
    return plan, fields.ignored()


def gemini_body(body, **how):
    """What Gemini is asked for a body; the stand-in must find nothing wrong with it."""
    call = asked(body, **how)[0].calls[0]
    assert (
        refusal_of(
            "/v1beta/" + call.path,
            proxy.restore_signatures(call, "", lambda *_: proxy.KnownCall()).body,
        )
        is None
    )
    return call.body


def refused(body, request=proxy.openai_chat_request):
    """The error that a body gets."""
    with pytest.raises(ProxyError) as caught:
        asked(body, request)
    return caught.value


def read(*chunks):
    return list(proxy.read_gemini(iter(chunks), exchange()))


def respond(body, *answers, context=Context()):
    """(the whole answer, the streamed events) to a body, when Gemini says this: a list of chunks for each call."""
    plan = asked(body, context=context)[0]
    return (
        whole_of(CHAT_ROUTE, exchange(plan, context), *answers),
        stream_of(CHAT_ROUTE, exchange(plan, context), *answers),
    )


def deltas(events, index=0):
    return [
        choice["delta"]
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
    ]


# ======================================================================================
# 1. Vocabulary
# ======================================================================================


def test_fields_know_the_place_of_every_value():
    body = Fields({"a": [{"b": 7}], "n": 3.0, "s": "Yes", "none": None, "t": ["x", 1]})
    assert body.objects("a")[0].require("b", int) == 7
    assert (
        body.get("n", int) == 3
        and body.get("none", str) is None
        and body.choice("s", "yes", "no") == "yes"
    )
    for act, path in (
        (lambda: body.objects("a")[0].get("b", str), "a[0].b"),
        (lambda: body.require("none", str), "none"),
        (lambda: body.objects("a")[0].require("c", str), "a[0].c"),
        (lambda: body.choice("s", "no"), "s"),
        (lambda: body.number("n", 0, 2), "n"),
        (lambda: body.objects("t"), "t[0]"),
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
        }
    )
    body.get("read", int)
    for message in body.objects("messages"):
        message.get("role", str)
    body.ignore("told")
    assert body.ignored() == ["messages[].name", "metadata", "told", "user"]


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


@pytest.mark.parametrize("raw", RUBBISH)
def test_a_body_that_is_no_json_object_is_a_400(raw):
    with pytest.raises(ProxyError) as caught:
        proxy.parse_body(raw)
    assert caught.value.status == 400


def test_what_is_sent_is_ascii_and_never_nan():
    assert proxy.encode_json({"t": SCRIPTS}).isascii()
    with pytest.raises(ValueError):
        proxy.encode_json({"x": float("inf")})


# ======================================================================================
# 2. Writing Gemini
# ======================================================================================


@pytest.mark.parametrize(
    "asked_for, path",
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
def test_model_names(asked_for, path):
    assert (
        proxy.model_named(
            asked_for, Context(aliases=(("gpt-*", NEWEST), ("gpt-exact", "gemma-4")))
        ).path
        == path
    )


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
def test_a_name_never_changes_the_url(name):
    for ollama in (False, True):
        with pytest.raises(ProxyError) as caught:
            proxy.model_named(name, Context(ollama=ollama))
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")


THINKERS = {  # what each model may be told, by Google's documentation
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


@pytest.mark.parametrize("name", THINKERS)
def test_every_effort_is_legal_on_every_model(name):
    allowed, amounts = THINKERS[name], []
    for effort in proxy.EFFORTS:
        config = proxy.thinking_config(proxy.model_of(name), effort, True)
        assert config.pop("includeThoughts", None) is (None if effort == "none" else True)
        ((key, value),) = config.items()
        if isinstance(allowed[0], int):
            assert key == "thinkingBudget" and allowed[0] <= value <= allowed[1]
            amounts.append(value)
        else:
            assert key == "thinkingLevel" and value in allowed
            amounts.append(allowed.index(value))
    assert amounts == sorted(amounts) and amounts[2] < amounts[4]
    assert proxy.thinking_config(proxy.model_of(name), None, True) == {"includeThoughts": True}


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
def test_models_that_do_not_think_are_not_told_to(name):
    assert proxy.thinking_config(proxy.model_of(name), "high", True) == {}


@pytest.mark.parametrize(
    "source, part",
    [
        (f"data:image/png;base64,{PNG}", {"inlineData": {"mimeType": "image/png", "data": PNG}}),
        (f"data:;base64,{PNG}", {"inlineData": {"mimeType": "image/png", "data": PNG}}),
        (
            f"data:image/jpg;charset=x;base64,{PNG}",
            {"inlineData": {"mimeType": "image/jpeg", "data": PNG}},
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
def test_media(source, part):
    assert proxy.source_part(source, None, "p") == part


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
def test_media_that_nobody_can_fetch_is_refused(source):
    with pytest.raises(ProxyError) as caught:
        proxy.source_part(source, None, "messages[0].content[1].image_url")
    assert (caught.value.status, caught.value.path) == (400, "messages[0].content[1].image_url")


def u(*parts):
    return proxy.user_turn(*[{"text": part} if isinstance(part, str) else part for part in parts])


def m(*parts):
    return proxy.model_turn(*[{"text": part} if isinstance(part, str) else part for part in parts])


def fc(name, id=None):
    return proxy.call_part(name, {}, id)


def fr(name, result, id=None):
    return proxy.result_part(name, result, id)


def answer_to(name, output, id=None):
    return {"functionResponse": {**({"id": id} if id else {}), "name": name, "response": output}}


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
    "a missing result": (
        [u("q"), m(fc("f")), u("never mind")],
        [u("q"), m(fc("f")), u(answer_to("f", proxy.MISSING_RESULT)), u("never mind")],
    ),
    "no results at all": (
        [u("q"), m("look", fc("f"))],
        [u("q"), m("look", fc("f")), u(answer_to("f", proxy.MISSING_RESULT))],
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
            u(answer_to("f", proxy.MISSING_RESULT, "a"), answer_to("g", proxy.MISSING_RESULT, "b")),
            u('Result of a function: {"output":"F"}'),
        ],
    ),
    "an orphaned result": (
        [u("q"), m("a"), u(fr("f", "F", "9"))],
        [u("q"), m("a"), u('Result of f: {"output":"F"}')],
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


@pytest.mark.parametrize("history, settled", HISTORIES.values(), ids=list(HISTORIES))
def test_turns_are_settled(history, settled):
    before = json.dumps(history)
    assert proxy.valid_turns(history, proxy.model_of(FLASH)) == settled
    assert json.dumps(history) == before


def test_only_the_newer_models_refuse_to_go_on_with_their_own_turn():
    for name, ends in (
        (FLASH, "model"),
        ("gemini-3-pro-preview", "model"),
        ("gemini-3.5-flash", "model"),
        ("gemini-3.5-flash-lite", "user"),
        ("gemini-3.6-flash", "user"),
        (NEWEST, "user"),
        ("gemini-flash-latest", "user"),
    ):
        assert proxy.valid_turns([u("q"), m("Once")], proxy.model_of(name))[-1]["role"] == ends


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
    ],
)
def test_results_become_objects_and_lose_no_digit(content, response):
    assert proxy.result_part("f", content)["functionResponse"]["response"] == response


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
def test_arguments_of_every_kind(text, args):
    assert proxy.call_arguments(text) == args


@pytest.mark.parametrize(
    "schema, wanted",
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
    ],
)
def test_schemas_keep_their_meaning(schema, wanted):
    before = json.dumps(schema)
    assert proxy.gemini_schema(schema) == wanted
    assert json.dumps(schema) == before


def test_names_that_gemini_would_refuse_are_mapped_and_stay_apart():
    names = ["3d_map", "a b", "a.b", "a b!", "x" * 65, "x" * 66, "ключ", "ok_name"]
    mapped = [proxy.gemini_name(name) for name in names]
    assert len(set(mapped)) == len(names) and mapped[-1] == "ok_name" and mapped[2] == "a.b"
    assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}", name) for name in mapped)


def test_a_refused_setting_is_left_out_for_a_second_try():
    call = proxy.generate_call(
        proxy.model_of("gemini-9"),
        False,
        [],
        [u("q"), m(call_with("old"))],
        {"thinkingConfig": {"thinkingLevel": "LOW"}, "topK": 3},
    )
    mended, names = proxy.repaired(call, "Thinking level LOW is not supported for this model.")
    assert (
        names == ["thinkingConfig"]
        and mended.body["generationConfig"] == {"topK": 3}
        and "thinkingConfig" in call.body["generationConfig"]
    )
    mended, names = proxy.repaired(call, "Invalid thought signature.")
    assert (
        names == ["thoughtSignature"]
        and mended.body["contents"][1]["parts"][0]["thoughtSignature"] == proxy.PLACEHOLDER
    )
    assert proxy.repaired(call, "Request contains an invalid argument.") == (None, [])


def call_with(signature):
    return proxy.call_part("f", {}, None, sign(signature))


def trail_of(*contents, system="", scope="key"):
    trail = proxy.ConversationDigest({"systemInstruction": {"parts": [{"text": system}]}}, scope)
    for content in contents:
        trail.turn(content)
    return trail


def test_a_trail_ties_a_call_to_its_conversation():
    digest = trail_of(u("q")).call("f", {"a": 1.0, "b": [2]})
    assert digest == trail_of(u("q")).call("f", {"b": [2.0], "a": 1})
    assert digest != trail_of(u("other")).call("f", {"a": 1, "b": [2]})
    assert digest != trail_of(u("q"), system="s").call("f", {"a": 1, "b": [2]})
    assert digest != trail_of(u("q"), scope="another key").call("f", {"a": 1, "b": [2]})
    twice = trail_of(u("q"))
    assert twice.call("f", {}) != twice.call("f", {})
    with_ids = (
        [u("q"), m(fc("f", "id-1")), u(answer_to("f", {}, "id-1"))],
        [u("q"), m(call_with("s")), u(answer_to("f", {}))],
    )
    assert trail_of(*with_ids[0]).call("f", {}) == trail_of(*with_ids[1]).call("f", {})


# ======================================================================================
# 3. Reading Gemini
# ======================================================================================

EVENTS = [chunk("Straße €"), chunk("a\u2028b\x85c"), whole("!")]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
def test_an_event_stream_may_be_cut_anywhere(size, end):
    raw = "".join(
        f": hi{end[: len(end) // 2]}event: x{end[: len(end) // 2]}data:{json.dumps(one, ensure_ascii=False)}{end}"
        for one in EVENTS
    ).encode()
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert list(proxy.read_events(blocks)) == EVENTS
    assert list(proxy.read_events([b"\xef\xbb\xbf" + raw.rstrip()])) == EVENTS
    assert list(proxy.read_events([raw.replace(b", ", b",\ndata: ", 1)])) == EVENTS


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
    events = proxy.read_events([b"data: " + json.dumps(EVENTS[0]).encode() + b"\n\n", tail])
    assert next(events) == EVENTS[0]
    with pytest.raises(ProxyError, match=words) as caught:
        list(events)
    assert caught.value.status == status


def detail(kind, **fields):
    return {"@type": f"type.googleapis.com/google.rpc.{kind}", **fields}


def error_body(code, message, *details):
    return {"error": {"code": code, "message": message, "status": "X", "details": list(details)}}


@pytest.mark.parametrize(
    "status, said, wanted",
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
def test_refusals(status, said, wanted):
    error = proxy.gemini_refusal(status, said)
    assert (error.status, error.code, error.headers) == wanted and error.message


def test_text_thoughts_and_calls_come_in_order_and_calls_last():
    events = read(
        chunk({"text": "Hm", "thought": True}, "A"),
        chunk(call("f", {"a": 1}, "s"), "B"),
        chunk("", finish="STOP", usage=USAGE),
    )
    assert events == [
        Text("Hm", True),
        Text("A"),
        Text("B"),
        ToolCall("f", {"a": 1}, sign("s")),
        End("stop", True, "STOP", "", Usage(prompt=4, output=7, thoughts=2), []),
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
    assert [type(event) for event in events] == [Text, End] and not events[-1].calls


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
def test_finish_reasons(reason, finish):
    end = read(whole("Hm", finish=reason, finishMessage="why"))[-1]
    assert (end.finish, end.message) == (finish, "why")


def test_a_blocked_prompt_is_a_filtered_end():
    assert read({"promptFeedback": {"blockReason": "OTHER"}})[-1][:3] == ("filter", False, "OTHER")


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
    told = "".join(event.text for event in events[:-1])
    (citation,) = events[-1].citations
    assert told[citation.start : citation.end] == cited and (citation.url, citation.title) == (
        "https://a.example/",
        "a",
    )
    assert told == text[:5] + "\n```python\n1\n```\n" + text[5:]


# ======================================================================================
# 4. OpenAI
# ======================================================================================


def test_a_chat_becomes_a_request():
    body = chat(
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
    plan, ignored = asked(body)
    assert (
        plan.calls[0].path == "models/gemini-3.8-flash:generateContent"
        and not plan.stream
        and ignored == []
    )
    assert gemini_body(body) == {
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


def test_tools_become_declarations():
    body = chat(
        tools=[
            WEATHER,
            {"type": "function", "function": {"name": "now"}},
            {"type": "custom", "custom": {"name": "sql"}},
            CLOCK["function"],
            WEATHER,
        ]
    )
    declared = gemini_body(body)["tools"][0]["functionDeclarations"]
    assert declared[0] == {
        "name": "weather",
        "description": "The weather",
        "parametersJsonSchema": WEATHER["function"]["parameters"],
    }
    assert declared[1] == {"name": "now"} and [d["name"] for d in declared] == [
        "weather",
        "now",
        "sql",
        "clock",
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
def test_tool_choices(choice, config):
    assert (
        gemini_body(chat(tools=[WEATHER, CLOCK], tool_choice=choice))
        .get("toolConfig", {})
        .get("functionCallingConfig")
        == config
    )


def test_a_tool_choice_without_tools_is_no_error():
    for choice in ("auto", "none", "required"):
        assert "toolConfig" not in gemini_body(chat(tools=[], tool_choice=choice))
    assert asked(chat(tool_choice="required"))[1] == ["tool_choice"]


def test_search_and_functions_go_together_only_on_gemini_3():
    new = gemini_body(chat(model=NEWEST, tools=[WEATHER], web_search_options={}))
    assert new["tools"][1] == {"googleSearch": {}} and new["toolConfig"] == {
        "includeServerSideToolInvocations": True
    }
    assert asked(chat(tools=[WEATHER], web_search_options={}))[1] == ["web_search_options"]
    assert gemini_body(chat(web_search_options={}))["tools"] == [{"googleSearch": {}}]


def test_an_answer_in_json():
    schema = {"type": "object", "properties": {"kind": {"const": "a"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    config = {
        "responseMimeType": "application/json",
        "responseJsonSchema": {"type": "object", "properties": {"kind": {"enum": ["a"]}}},
    }
    assert gemini_body(chat(response_format=wanted))["generationConfig"] == config
    assert gemini_body(chat(response_format={"type": "json_object"}))["generationConfig"] == {
        "responseMimeType": "application/json"
    }
    assert (
        gemini_body(chat(model=NEWEST, tools=[WEATHER], response_format=wanted))["generationConfig"]
        == config
    )
    old = gemini_body(chat(tools=[WEATHER], response_format=wanted))
    assert (
        "generationConfig" not in old and '"kind"' in old["systemInstruction"]["parts"][0]["text"]
    )
    answer, events = respond(
        chat(tools=[WEATHER], response_format=wanted, stream=True),
        [chunk("```json\n"), whole('{"kind":"a"}\n```')],
    )
    assert answer["choices"][0]["message"]["content"] == '{"kind":"a"}'
    assert [d["content"] for d in deltas(events) if d.get("content")] == ['{"kind":"a"}']


def test_googles_own_settings_pass():
    google = {
        "thinking_config": {"thinking_budget": 800, "include_thoughts": True},
        "cached_content": "cachedContents/x",
    }
    for more in ({"extra_body": {"google": google}}, {"google": google}):
        body = gemini_body(chat(**more))
        assert (
            body["generationConfig"]
            == {"thinkingConfig": {"thinkingBudget": 800, "includeThoughts": True}}
            and body["cachedContent"] == "cachedContents/x"
        )


def test_googles_own_settings_in_camel_case_and_beside_an_empty_extra_body():
    google = {
        "thinkingConfig": {"thinkingBudget": 0, "includeThoughts": False},
        "cachedContent": "cachedContents/x",
        "safetySettings": [{"category": "C", "threshold": "T"}],
    }
    for more in ({"extra_body": {"google": google}}, {"extra_body": {}, "google": google}):
        body = gemini_body(chat(**more))
        assert body["generationConfig"] == {
            "thinkingConfig": {"thinkingBudget": 0, "includeThoughts": False}
        }
        assert (body["cachedContent"], body["safetySettings"]) == (
            "cachedContents/x",
            google["safetySettings"],
        )


def test_what_a_schema_is_for_reaches_the_model():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    named = {"name": "bill", "description": "In EUR", "strict": True, "schema": schema}
    plan, ignored = asked(chat(response_format={"type": "json_schema", "json_schema": named}))
    assert (
        plan.calls[0].body["generationConfig"]["responseJsonSchema"]
        == {"description": "In EUR", **schema}
        and not ignored
    )
    own = {**named, "schema": {**schema, "description": "Its own"}}
    assert (
        gemini_body(chat(response_format={"type": "json_schema", "json_schema": own}))[
            "generationConfig"
        ]["responseJsonSchema"]["description"]
        == "Its own"
    )


def test_the_body_of_a_response_sent_to_chats():
    """Cursor does that."""
    body = {
        "model": FLASH,
        "input": [user("Hi")],
        "max_output_tokens": 77,
        "text": {"format": {"type": "json_object"}},
    }
    plan, ignored = asked(body)
    assert (
        plan.calls[0].body
        == {
            "contents": [u("Hi")],
            "generationConfig": {"maxOutputTokens": 77, "responseMimeType": "application/json"},
        }
        and not ignored
    )


def test_a_named_choice_without_tools_is_ignored():
    plan, ignored = asked(chat(tool_choice={"type": "function", "function": {"name": "f"}}))
    assert ignored == ["tool_choice"] and "toolConfig" not in plan.calls[0].body


def test_half_an_emoji_goes_to_gemini_as_what_it_takes():
    made = proxy.gemini_json({"text": "a \ud83d b \U0001f600 \\ud83d", "args": {"\udc00": "x"}})
    assert made.decode() == '{"text":"a \ufffd b \U0001f600 \\\\ud83d","args":{"\ufffd":"x"}}'


def test_a_choice_of_values_beside_a_choice_of_kinds():
    made = proxy.gemini_schema({"anyOf": [{"type": "string"}], "enum": ["a", None]})
    assert made == {
        "allOf": [{"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, {"anyOf": [{"type": "string"}]}]
    }


def test_lines_cut_between_cr_and_lf():
    for cut in (
        [b"a\r", b"\n", b"\nb\n"],
        [b"a\r\n\nb\n"],
        [b"a\r", b"\n\nb\n"],
        [b"a\r\n", b"\nb", b"\n"],
    ):
        assert list(proxy.read_lines(cut)) == [b"a", b"", b"b"], cut


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
    (call,) = asked(body)[0].calls
    signed = proxy.restore_signatures(
        call, "", lambda id, digest, name: proxy.KnownCall(sign("known") if id == "b" else None)
    )
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
    "carrier",
    [
        {"extra_content": {"google": {"thought_signature": sign("s")}}},
        {"provider_specific_fields": {"thought_signature": sign("s")}},
        {"id": "call_1__thought__" + sign("a longer one")},
        {"id": "call_1_ts_" + sign("a longer one")},
        {"function": {"name": "weather", "arguments": "{}", "thought_signature": sign("s")}},
    ],
)
def test_signatures_that_clients_and_other_proxies_kept(carrier):
    made = {**tool_call("call_1", "weather", "{}"), **carrier}
    part = gemini_body(
        chat(
            user("q"),
            assistant(None, tool_calls=[made]),
            {"role": "tool", "tool_call_id": made["id"], "content": "ok"},
        )
    )["contents"][1]["parts"][0]
    assert (
        part["thoughtSignature"] in (sign("s"), sign("a longer one"))
        and part["functionCall"]["id"] == "call_1"
    )


def test_a_picture_from_a_tool():
    def body(model):
        return chat(
            user("q"),
            assistant(None, tool_calls=[tool_call("a", "look", "{}")]),
            {
                "role": "tool",
                "tool_call_id": "a",
                "content": [
                    {"type": "text", "text": "Here:"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                ],
            },
            model=model,
        )

    image = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    assert gemini_body(body(NEWEST))["contents"][2]["parts"][0]["functionResponse"]["parts"] == [
        image
    ]
    assert gemini_body(body(FLASH))["contents"][3]["parts"] == [image]


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
    assert (error.status, error.path) == (400, path) and path in error.message
    status, told = proxy.openai_error(error)
    assert (
        status == 400
        and told["error"]["param"] == path
        and told["error"]["type"] == "invalid_request_error"
    )


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
    assert answer == {
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
    base = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": FLASH,
    }

    def event(delta, finish=None):
        return {
            **base,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
            "usage": None,
        }

    assert events[:-1] == [
        event({"role": "assistant", "content": ""}),
        event({"reasoning_content": "Hm"}),
        event({"content": "Hel"}),
        event(
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "call_2",
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{}"},
                        "extra_content": {"google": {"thought_signature": sign("s")}},
                    }
                ]
            }
        ),
        event(
            {
                "tool_calls": [
                    {
                        "index": 1,
                        "id": "call_3",
                        "type": "function",
                        "function": {"name": "clock", "arguments": "{}"},
                    }
                ]
            }
        ),
        event({}, "tool_calls"),
    ]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 11


@pytest.mark.parametrize(
    "said, content, finish",
    [
        (whole("Once", finish="MAX_TOKENS"), "Once", "length"),
        (whole(finish="MAX_TOKENS"), "", "length"),
        (whole("Take", finish="SAFETY"), "Take", "content_filter"),
        ({"promptFeedback": {"blockReason": "SAFETY"}}, "", "content_filter"),
        (whole(finish="MALFORMED_FUNCTION_CALL", finishMessage="f("), "", "stop"),
        (whole("x", finish="OTHER"), "x", "stop"),
    ],
)
def test_ends(said, content, finish):
    answer, events = respond(chat(stream=True), [said])
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, finish)
    assert (
        "".join(d.get("content") or "" for d in deltas(events)) == content
        and events[-1]["choices"][0]["finish_reason"] == finish
    )
    assert choice.get("finish_message") == ("f(" if "f(" in str(said) else None)


def test_several_choices_are_several_calls():
    assert len(asked(chat(n=3))[0].calls) == 3
    answer, events = respond(chat(n=2, stream=True), [whole("One")], [whole("Two")])
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        "One",
        "Two",
    ] and answer["usage"]["total_tokens"] == 22
    assert [event["choices"][0]["index"] for event in events] == [0, 0, 0, 1, 1, 1]


def test_no_parallel_calls_is_one_call():
    answer, events = respond(
        chat(tools=[WEATHER], parallel_tool_calls=False, stream=True),
        [whole(call("weather"), call("weather"))],
    )
    assert (
        len(answer["choices"][0]["message"]["tool_calls"]) == 1
        and len([d for d in deltas(events) if "tool_calls" in d]) == 1
    )


def test_legacy_functions():
    body = chat(functions=[WEATHER["function"]], function_call={"name": "weather"}, stream=True)
    assert gemini_body(body)["toolConfig"]["functionCallingConfig"] == {
        "mode": "ANY",
        "allowedFunctionNames": ["weather"],
    }
    answer, events = respond(body, [whole(call("weather", {"city": "Oslo"}))])
    assert answer["choices"][0]["message"]["function_call"] == {
        "name": "weather",
        "arguments": '{"city":"Oslo"}',
    }
    assert (
        answer["choices"][0]["finish_reason"]
        == events[-1]["choices"][0]["finish_reason"]
        == "function_call"
    )
    history = chat(
        user("q"),
        assistant(None, function_call={"name": "weather", "arguments": "{}"}),
        {"role": "function", "name": "weather", "content": "rain"},
    )
    assert gemini_body(history)["contents"][2]["parts"] == [
        answer_to("weather", {"output": "rain"})
    ]


def test_custom_tools():
    body = chat(
        tools=[
            {
                "type": "custom",
                "custom": {
                    "name": "sql",
                    "format": {
                        "type": "grammar",
                        "grammar": {"syntax": "lark", "definition": "start: X"},
                    },
                },
            }
        ]
    )
    assert "start: X" in gemini_body(body)["tools"][0]["functionDeclarations"][0]["description"]
    made = respond(body, [whole(call("sql", {"input": "select 1"}))])[0]["choices"][0]["message"][
        "tool_calls"
    ][0]
    assert made == {
        "id": "call_1",
        "type": "custom",
        "custom": {"name": "sql", "input": "select 1"},
    }
    part = gemini_body(chat(user("q"), assistant(None, tool_calls=[made])))["contents"][1]["parts"][
        0
    ]
    assert part["functionCall"]["args"] == {"input": "select 1"}


def test_pictures_and_sound_in_a_chat():
    answer, events = respond(
        chat(stream=True, modalities=["text", "image"]),
        [whole("Here", {"inlineData": {"mimeType": "image/png", "data": PNG}})],
    )
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}, "index": 0}
    assert answer["choices"][0]["message"]["images"] == [image] and {"images": [image]} in deltas(
        events
    )
    assert gemini_body(chat(assistant("", images=[image]), user("Redder")))["contents"][1][
        "parts"
    ] == [{"inlineData": {"mimeType": "image/png", "data": PNG}}]
    body = chat(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})
    assert gemini_body(body)["generationConfig"] == {
        "responseModalities": ["AUDIO"],
        "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Kore"}}},
    }
    audio = respond(
        body,
        [
            whole(
                {
                    "inlineData": {
                        "mimeType": "audio/L16;rate=24000",
                        "data": base64.b64encode(b"\1\2").decode(),
                    }
                }
            )
        ],
    )[0]
    assert base64.b64decode(audio["choices"][0]["message"]["audio"]["data"]).startswith(b"RIFF")


def test_every_script_survives():
    answer, events = respond(chat(user(SCRIPTS), stream=True), [*map(chunk, SCRIPTS), whole("")])
    assert (
        answer["choices"][0]["message"]["content"]
        == "".join(d.get("content") or "" for d in deltas(events))
        == SCRIPTS
    )
    assert gemini_body(chat(user(SCRIPTS)))["contents"] == [u(SCRIPTS)]


def embed(body, *answers):
    plan = asked(body, proxy.openai_embeddings_request)[0]
    return proxy.openai_embeddings_response(exchange(plan), map(iter, answers))


def test_embeddings():
    body = {"model": EMBEDDER, "input": ["one", "two"], "dimensions": 2}
    plan = asked(body, proxy.openai_embeddings_request)[0]
    assert [call.path.partition(":")[2] for call in plan.calls] == [
        "batchEmbedContents",
        "countTokens",
    ]
    assert plan.calls[0].body["requests"][1] == {
        "model": "models/gemini-embedding-001",
        "content": {"parts": [{"text": "two"}]},
        "outputDimensionality": 2,
    }
    vectors = [{"embeddings": [{"values": [3, 4]}, {"values": [0.6, 0.8]}]}]
    assert embed(body, vectors, [{"totalTokens": 7}]) == {
        "object": "list",
        "model": EMBEDDER,
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]},
            {"object": "embedding", "index": 1, "embedding": [0.6, 0.8]},
        ],
    }
    packed = embed({**body, "encoding_format": "base64"}, vectors, [{}])["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == pytest.approx((0.6, 0.8))
    with pytest.raises(ProxyError, match="1 vectors for 2"):
        embed(body, [{"embeddings": [{"values": [1]}]}], [{}])


def test_many_texts_go_in_batches_in_order():
    plan = asked(
        {"model": "gemini-embedding-2", "input": [str(i) for i in range(250)]},
        proxy.openai_embeddings_request,
    )[0]
    sent = [
        request["content"]["parts"][0]["text"]
        for call in plan.calls
        for request in call.body["requests"]
    ]
    assert [len(call.body["requests"]) for call in plan.calls] == [100, 100, 50] and sent == [
        str(i) for i in range(250)
    ]


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
def test_what_cannot_be_embedded(path, more):
    assert (
        refused({"model": EMBEDDER, "input": "x", **more}, proxy.openai_embeddings_request).path
        == path
    )


def blob(mime, data):
    return {"inlineData": {"mimeType": mime, "data": data}}


SAMPLES_OF_SOUND = bytes(range(8))
SOUND = blob("audio/L16;codec=pcm;rate=24000", base64.b64encode(SAMPLES_OF_SOUND).decode())
RIFF = proxy.wav_file(SAMPLES_OF_SOUND, 24000)


def endpoint(name, body, *answers, context=Context()):
    """(the whole answer, the streamed events) of one of OpenAI's endpoints; the stand-in must find nothing wrong with its calls."""
    route = next(route for route in proxy.OPENAI.routes if route.path == "/v1/" + name)
    plan = asked(body, route.request, context)[0]
    assert [refusal_of("/v1beta/" + call.path, call.body) for call in plan.calls] == [None] * len(
        plan.calls
    )
    whole_answer = whole_of(route, exchange(plan, context), *answers)
    events = stream_of(route, exchange(plan, context), *answers) if plan.stream else []
    return whole_answer, events


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
    assert [event["usage"] for event in events] == [None, None, None, answer["usage"]] and events[
        -1
    ]["choices"] == []
    assert (
        complete([whole("", finish="SAFETY")])[0]["choices"][0]["finish_reason"] == "content_filter"
    )


def test_several_prompts_and_choices():
    answer, events = complete(
        [whole("a")],
        [whole("b")],
        [whole("c")],
        [whole("d")],
        prompt=["A", "B"],
        n=2,
        echo=True,
        stream=True,
    )
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "Aa"),
        (1, "Ab"),
        (2, "Bc"),
        (3, "Bd"),
    ]
    assert [event["choices"][0]["text"] for event in events][:4] == ["Aa", "", "Ab", ""] and answer[
        "usage"
    ]["total_tokens"] == 44


def completion(**body):
    return gemini_body(
        {"model": FLASH, "prompt": "Once", **body}, request=proxy.openai_completions_request
    )


def test_what_a_completion_asks():
    assert completion(stop="END", temperature=0.5)["generationConfig"] == {
        "temperature": 0.5,
        "stopSequences": ["END"],
    }
    assert completion(max_tokens=16)["generationConfig"] == {
        "maxOutputTokens": 16,
        "thinkingConfig": {"thinkingBudget": 0},
    }  # thoughts would eat it up
    assert completion(reasoning_effort="low", max_tokens=16)["generationConfig"][
        "thinkingConfig"
    ] == {"thinkingBudget": 1024}
    gap = completion(prompt="def f(", suffix="return 1")
    assert (
        gap["contents"] == [u("<before>def f(</before><gap/><after>return 1</after>")]
        and "gap" in gap["systemInstruction"]["parts"][0]["text"]
    )
    assert completion(prompt=None)["contents"] == [u("")]
    assert asked(
        {"model": FLASH, "prompt": "x", "best_of": 3, "logprobs": 2, "user": "u"},
        proxy.openai_completions_request,
    )[1] == ["best_of", "logprobs", "user"]


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
def test_what_cannot_be_completed(path, more):
    assert (
        refused({"model": FLASH, "prompt": "x", **more}, proxy.openai_completions_request).path
        == path
    )


@pytest.mark.parametrize(
    "what, name, aliases, model",
    [
        ("image", None, (), "gemini-nano-banana-2.1"),
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
def test_openais_media_models_have_stand_ins(what, name, aliases, model):
    assert proxy.media_model(name, what, Context(aliases=aliases)).name == model


def draw(*answers, **body):
    return endpoint(
        "images/generations",
        {"model": "gemini-2.5-flash-image", "prompt": "A dot", **body},
        *answers,
    )


def test_pictures():
    answer, events = draw(
        [whole("Here:", blob("image/png", PNG))], [whole(blob("image/png", PNG))], n=2, stream=True
    )
    usage = {
        "input_tokens": 4,
        "input_tokens_details": {"text_tokens": 4, "image_tokens": 0},
        "output_tokens": 7,
        "total_tokens": 11,
    }
    assert answer == {
        "created": 1700000000,
        "data": [{"b64_json": PNG}] * 2,
        "output_format": "png",
        "usage": {
            **usage,
            "input_tokens": 8,
            "input_tokens_details": {"text_tokens": 8, "image_tokens": 0},
            "output_tokens": 14,
            "total_tokens": 22,
        },
    }
    assert (
        events
        == [
            {
                "type": "image_generation.completed",
                "b64_json": PNG,
                "created_at": 1700000000,
                "size": "auto",
                "quality": "auto",
                "background": "auto",
                "output_format": "png",
                "usage": usage,
            }
        ]
        * 2
    )
    for more in ({"response_format": "url"}, {"model": "dall-e-2"}):
        assert draw([whole(blob("image/jpeg", "AAAA"))], **more)[0]["data"] == [
            {"url": "data:image/jpeg;base64,AAAA"}
        ]
    assert (
        len(draw([whole(finish="NO_IMAGE")], [whole(blob("image/png", PNG))], n=2)[0]["data"]) == 1
    )


@pytest.mark.parametrize(
    "size, model, config",
    [
        (None, FLASH, None),
        ("auto", FLASH, None),
        ("1024x1024", FLASH, {"aspectRatio": "1:1"}),
        ("1792x1024", FLASH, {"aspectRatio": "16:9"}),
        ("1024X1536", NEWEST, {"aspectRatio": "2:3"}),
        ("256x256", NEWEST, {"aspectRatio": "1:1"}),
        ("2048x2048", NEWEST, {"aspectRatio": "1:1", "imageSize": "2K"}),
        ("4096x2304", NEWEST, {"aspectRatio": "16:9", "imageSize": "4K"}),
        ("4096x2304", FLASH, {"aspectRatio": "16:9"}),
        ("9999x10", FLASH, {"aspectRatio": "21:9"}),
    ],
)
def test_sizes_become_ratios(size, model, config):
    body = gemini_body(
        {"model": model, "prompt": "A dot", "size": size}, request=proxy.openai_images_request
    )
    assert body["generationConfig"] == {
        "responseModalities": ["IMAGE"],
        **({"imageConfig": config} if config else {}),
    }


@pytest.mark.parametrize(
    "said, code, words",
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
def test_a_picture_that_is_not_drawn_is_an_error(said, code, words):
    with pytest.raises(ProxyError, match=words) as caught:
        draw([said])
    assert (caught.value.status, caught.value.code) == (400, code)


def test_what_no_picture_heeds():
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
    assert asked(body, proxy.openai_images_request)[1] == [
        "background",
        "output_format",
        "partial_images",
        "quality",
        "style",
        "user",
    ]
    assert (
        asked(
            {
                **body,
                **dict.fromkeys(body, None),
                "model": NEWEST,
                "prompt": "x",
                "quality": "auto",
                "output_format": "jpeg",
            },
            proxy.openai_images_request,
        )[1]
        == []
    )


def speak(*chunks, **body):
    return endpoint(
        "audio/speech",
        {"model": "gemini-3.8-flash-tts", "input": "Hello", "voice": "nova", **body},
        list(chunks),
    )


def test_speech():
    two = [chunk(SOUND), whole(SOUND)]
    assert (
        speak(*two, response_format="wav")[0]
        == speak(*two)[0]
        == proxy.Payload(proxy.wav_file(SAMPLES_OF_SOUND * 2, 24000), "audio/wav")
    )
    answer, events = speak(*two, response_format="pcm")
    assert (
        answer == proxy.Payload(SAMPLES_OF_SOUND * 2, "audio/pcm")
        and [*map(proxy.PCM.encode, events)] == [SAMPLES_OF_SOUND] * 2
    )
    events = speak(*two, stream_format="sse")[1]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.done"]
    head, more = (base64.b64decode(event["audio"]) for event in events[:2])
    assert (
        head == RIFF[:4] + b"\xff" * 4 + RIFF[8:40] + b"\xff" * 4 + SAMPLES_OF_SOUND
        and more == SAMPLES_OF_SOUND
    )
    assert events[2]["usage"] == {"input_tokens": 4, "output_tokens": 7, "total_tokens": 11}
    assert (
        speak(*two, stream_format="sse", response_format="pcm")[1][0]["audio"]
        == SOUND["inlineData"]["data"]
    )


def test_what_speech_asks():
    body = {
        "model": "tts-1",
        "input": "Hello",
        "voice": {"id": "nova"},
        "instructions": "Cheerfully",
        "speed": 2,
        "response_format": "opus",
    }
    plan, ignored = asked(body, proxy.openai_speech_request)
    assert plan.calls[0].body == {
        "contents": [u("Cheerfully\n\nSay: Hello")],
        "generationConfig": {
            "responseModalities": ["AUDIO"],
            "speechConfig": {"voiceConfig": {"prebuiltVoiceConfig": {"voiceName": "Zephyr"}}},
        },
    }
    assert ignored == ["response_format", "speed"] and not plan.stream
    older = asked(
        {
            **body,
            "model": "gemini-2.5-flash-preview-tts",
            "response_format": "pcm",
            "voice": "Kore",
            "speed": 1.0,
        },
        proxy.openai_speech_request,
    )
    assert (older[0].stream, older[0].calls[0].streaming, older[1]) == (False, False, [])


@pytest.mark.parametrize(
    "chunks", [[whole("No.")], [whole(finish="SAFETY")], [chunk(SOUND), whole(finish="MAX_TOKENS")]]
)
def test_speech_that_is_not_whole_is_an_error(chunks):
    for more in ({}, {"stream_format": "sse"}):
        with pytest.raises(ProxyError, match="no whole speech"):
            speak(*chunks, **more)


def form(*parts, boundary="b0un:d"):
    """(body, Content-Type) of a form: (name, text), or (name, file name, type, bytes)."""
    body = b""
    for name, *told in parts:
        told = [told[0].encode()] if len(told) == 1 else told
        file = f'; filename="{told[0]}"\r\nContent-Type: {told[1]}' if len(told) == 3 else ""
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
            + told[-1]
            + b"\r\n"
        )
    return body + f"--{boundary}--\r\n".encode(), f'multipart/form-data; boundary="{boundary}"'


def test_forms():
    tricky = b"\r\n\r\n--b0un:\r\n\0\xff--"
    fields = proxy.parse_form(
        *form(
            ("model", "m\r\nn"),
            ("file", '\u00e5 \\"b\\".wav', "Audio/WAV; x=y", tricky),
            ("g[]", "a"),
            ("g[]", "b"),
        )
    )
    assert fields.data == {
        "model": "m\r\nn",
        "file": proxy.Upload('\u00e5 "b".wav', "audio/wav", tricky),
        "g": ["a", "b"],
    }
    raw = (
        b"--x \r\ncontent-disposition:form-data;name=a;filename*=UTF-8''b%20c.mp3\r\n\r\n1\r\n--x--"
    )
    assert proxy.parse_form(raw, "Multipart/Form-Data; charset=utf-8; BOUNDARY=x").data == {
        "a": proxy.Upload("UTF-8''b c.mp3", "", b"1")
    }
    fields.data.update(temperature="0.5", stream="True", prompt="7")
    proxy.form_scalars(fields, "temperature", "stream", "missing")
    assert (fields.data["temperature"], fields.data["stream"], fields.data["prompt"]) == (
        0.5,
        True,
        "7",
    )


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


def transcribe(said, name="audio/transcriptions", **body):
    return endpoint(
        name, {"model": FLASH, "file": proxy.Upload("a.wav", "audio/x-wav", RIFF), **body}, said
    )


def test_transcripts():
    answer, events = transcribe(
        [
            chunk(" God "),
            whole(
                "morgen.\n",
                usage={**USAGE, "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 3}]},
            ),
        ],
        stream="true",
    )
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
    assert transcribe([whole("Hei.")], response_format="text")[0] == proxy.Payload(b"Hei.\n")
    assert transcribe([whole("")])[0]["text"] == ""
    for finish in ("RECITATION", "MAX_TOKENS"):
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


def test_transcripts_with_times():
    srt = "1\n00:00:01,500 --> 00:00:02,000\nHello -> there.\n\n2\n01:01:01,250 --> 01:01:01,250\nBye.\n"
    assert transcribe([whole(TIMED)], response_format="srt")[0].data.decode() == srt
    vtt = "WEBVTT\n\n00:00:01.500 --> 00:00:02.000\nHello -> there.\n\n01:01:01.250 --> 01:01:01.250\nBye.\n"
    assert transcribe([whole(TIMED)], response_format="vtt")[0].data.decode() == vtt
    base = {"task": "transcribe", "duration": 3661.25, "text": "Hello --> there. Bye."}
    segments = [
        {"start": 1.5, "end": 2.0, "text": "Hello --> there."},
        {"start": 3661.25, "end": 3661.25, "text": "Bye."},
    ]
    verbose = transcribe([whole(TIMED)], response_format="verbose_json", stream="true")
    assert verbose == (
        {
            **base,
            "language": "english",
            "segments": [{"id": i, **segment} for i, segment in enumerate(segments)],
        },
        [],
    )
    diarized = transcribe([whole("```json\n" + TIMED + "\n```")], response_format="diarized_json")[
        0
    ]
    assert {key: diarized[key] for key in base} == base and [
        (s["id"], s["speaker"], s["type"]) for s in diarized["segments"]
    ] == [("seg_0", "A", "transcript.text.segment"), ("seg_1", "B", "transcript.text.segment")]
    assert (
        transcribe([whole(TIMED)], "audio/translations", response_format="verbose_json")[0]["task"]
        == "translate"
    )
    for invalid_answer in (
        "Hello.",
        '{"segments":[7]}',
        '{"segments":[{"start":"soon","end":"later","text":""}]}',
        '{"segments":[{"start":1,"end":2,"text":""}]}',
    ):
        with pytest.raises(ProxyError) as caught:
            transcribe([whole(invalid_answer)], response_format="srt")
        assert caught.value.status == 502


def test_what_a_transcript_asks():
    body = {
        "model": "gemini-3.8-flash",
        "file": proxy.Upload("a.wav", "audio/x-wav", RIFF),
        "language": "no",
        "prompt": "\u00c5se",
        "temperature": "0.2",
        "include": ["logprobs"],
        "timestamp_granularities": ["word"],
        "response_format": "verbose_json",
    }
    plan, ignored = asked(body, proxy.openai_transcriptions_request)
    sent = plan.calls[0].body
    assert (
        sent["contents"][0]["parts"][0] == blob("audio/wav", base64.b64encode(RIFF).decode())
        and sent["generationConfig"]["temperature"] == 0.2
    )
    assert (
        "no" in sent["contents"][0]["parts"][1]["text"]
        and "\u00c5se" in sent["contents"][0]["parts"][1]["text"]
        and ignored == ["include", "timestamp_granularities"]
    )
    assert (
        sent["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "LOW"}
        and sent["generationConfig"]["responseJsonSchema"]["properties"]["segments"]
    )
    assert asked({**body, "stream": "true"}, proxy.openai_transcriptions_request)[1] == [
        "include",
        "stream",
        "timestamp_granularities",
    ]


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
        (("a.txt", "text/plain", b"?"), None),
        (("a.wav", "audio/wav", b"%PDF-1"), None),
        (("a.wav", "audio/wav", b""), None),
    ],
)
def test_recordings_are_taken_for_what_they_are(upload, mime):
    body = {"model": FLASH, "file": proxy.Upload(*upload)}
    if mime is None:
        assert refused(body, proxy.openai_transcriptions_request).path == "file"
    else:
        assert (
            asked(body, proxy.openai_transcriptions_request)[0]
            .calls[0]
            .body["contents"][0]["parts"][0]["inlineData"]["mimeType"]
            == mime
        )


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
def test_what_cannot_be_written_down(path, more):
    assert (
        refused(
            {"model": FLASH, "file": proxy.Upload("a.wav", "", RIFF), **more},
            proxy.openai_transcriptions_request,
        ).path
        == path
    )


def test_a_form_on_the_wire(server, gemini):
    gemini.say(whole("Hei."), [chunk("He"), whole("i.")])
    parts = ("model", "whisper-1"), ("file", "a.wav", "audio/wav", RIFF), ("user", "me")
    raw, kind = form(*parts)
    status, headers, body = post(server, "/v1/audio/transcriptions", raw, Content_Type=kind)
    assert (status, json.loads(body)["text"], headers["x-proxy-ignored"], gemini.paths) == (
        200,
        "Hei.",
        "user",
        ["/v1beta/models/gemini-3.8-flash:generateContent"],
    )
    raw, kind = form(*parts, ("stream", "true"))
    assert (
        post(server, "/audio/transcriptions", raw, Content_Type=kind)[2]
        .decode()
        .count("transcript.text.delta")
        == 2
    )
    assert (
        error_of(post(server, "/v1/audio/transcriptions", form(parts[0])[0], Content_Type=kind))[
            "param"
        ]
        == "file"
    )


def test_bare_sound_on_the_wire(server, gemini):
    body = {"model": "tts-1", "input": "Hello", "voice": "alloy", "response_format": "pcm"}
    gemini.say(
        [chunk(SOUND), whole(SOUND)],
        [whole("No.")],
        [chunk(SOUND), whole(finish="OTHER_SAFETY"), b"{"],
        whole(SOUND),
    )
    status, headers, audio = post(server, "/v1/audio/speech", body)
    assert (status, headers["content-type"], audio) == (200, "audio/pcm", SAMPLES_OF_SOUND * 2)
    assert post(server, "/v1/audio/speech", body)[0] == 400
    with (
        UpstreamSocket(server) as line,
        pytest.raises(ValueError),
    ):  # it breaks off: no word of an error among the samples, and no end
        line.plan("POST", "/v1/audio/speech", body)
    headers = post(server, "/v1/audio/speech", {**body, "response_format": "mp3"})[1]
    assert (headers["content-type"], headers["x-proxy-ignored"]) == ("audio/wav", "response_format")


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


def test_models():
    answers = [[{"models": MODELS}]]
    context = Context(aliases=(("gpt-4o", FLASH), ("gpt-*", FLASH)))
    listed = proxy.openai_models_response(
        exchange(asked({}, proxy.openai_models_request, context)[0], context), map(iter, answers)
    )
    assert [entry["id"] for entry in listed["data"]] == [FLASH, NEWEST, EMBEDDER, "gpt-4o"]
    assert listed["data"][0] == {
        "id": FLASH,
        "object": "model",
        "created": proxy.GEMINI_OPENED,
        "owned_by": "google",
    }
    for name, found in (
        (FLASH, True),
        ("models/" + FLASH, True),
        ("gpt-5", True),
        ("gemini-9", False),
        ("veo-3.1", False),
    ):
        one = context._replace(params={"model": name})
        one = exchange(asked({}, proxy.openai_models_request, one)[0], one)
        if found:
            assert proxy.openai_model_response(one, map(iter, answers))["id"] == name.replace(
                "models/", ""
            )
        else:
            with pytest.raises(ProxyError):
                proxy.openai_model_response(one, map(iter, answers))


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
def test_openais_errors(error, kind, code):
    assert proxy.openai_error(error) == (
        error.status,
        {"error": {"message": "m", "type": kind, "param": None, "code": code}},
    )


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
    return asked(body, proxy.openai_responses_request, context or Context())


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


def stored_exchange(route, notes, response_id="resp_1", **query):
    """An exchange of a route about a stored response."""
    context = Context(params={"id": response_id}, query=query)
    context = looked_up(route, {}, context, notes)
    return exchange(route.request(Fields({}), context), context)


REASONING = {
    "id": "rs_1_0",
    "type": "reasoning",
    "summary": [{"type": "summary_text", "text": "Hm"}],
}
HELLO = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
MESSAGE = {
    "id": "msg_1_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [HELLO],
}
SEALED = {"id": "rs_1_2", **reasoning_item(signatures("call_2"))}
CALL = {
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
EVENTS = [
    {"type": "response.created"},
    {"type": "response.in_progress"},
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {**REASONING, "summary": []},
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
    {"type": "response.output_item.done", "output_index": 0, "item": REASONING},
    {
        "type": "response.output_item.added",
        "output_index": 1,
        "item": {**MESSAGE, "status": "in_progress", "content": []},
    },
    {"type": "response.content_part.added", **IN_MESSAGE, "part": {**HELLO, "text": ""}},
    {"type": "response.output_text.delta", **IN_MESSAGE, "delta": "He", "logprobs": []},
    {"type": "response.output_text.delta", **IN_MESSAGE, "delta": "llo", "logprobs": []},
    {"type": "response.output_text.done", **IN_MESSAGE, "text": "Hello", "logprobs": []},
    {"type": "response.content_part.done", **IN_MESSAGE, "part": HELLO},
    {"type": "response.output_item.done", "output_index": 1, "item": MESSAGE},
    {"type": "response.output_item.added", "output_index": 2, "item": SEALED},
    {"type": "response.output_item.done", "output_index": 2, "item": SEALED},
    {
        "type": "response.output_item.added",
        "output_index": 3,
        "item": {**CALL, "status": "in_progress", "arguments": ""},
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
    {"type": "response.output_item.done", "output_index": 3, "item": CALL},
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
    assert without(weather_events(), "sequence_number", "response") == EVENTS


def test_the_last_event_has_all_items_of_the_response():
    assert weather_events()[-1]["response"]["output"] == [REASONING, MESSAGE, SEALED, CALL]


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
    "top_p": None,
    "truncation": "disabled",
    "user": "me",
    "output": [{**MESSAGE, "id": "msg_1_0"}],
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


NO_CALL = {
    "code": "server_error",
    "message": "Gemini ended its answer with MALFORMED_FUNCTION_CALL.",
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
    events = list(itertools.islice(stream, 5))
    with pytest.raises(ProxyError) as caught:
        next(stream)
    (last,) = kept_by(proxy.openai_responses_failure(one, caught.value), Notes())
    assert last["type"] == "response.failed"
    assert last["sequence_number"] == len(events)
    response = last["response"]
    assert response["id"] == events[0]["response"]["id"]
    assert response["error"] == {"code": "server_error", "message": caught.value.message}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hel"


def test_a_failure_before_the_first_event_has_the_first_events_too():
    one, error = exchange(response_plan({})[0]), ProxyError(400, "No.")
    events = kept_by(proxy.openai_responses_failure(one, error), Notes())
    kinds = ["response.created", "response.in_progress", "response.failed"]
    assert [event["type"] for event in events] == kinds
    assert [event["sequence_number"] for event in events] == [0, 1, 2]


def test_a_failure_says_in_codexs_words_when_to_try_again():
    error = ProxyError(429, "Slow.", code="rate_limit_exceeded", retry_after=1.5)
    *_, last = proxy.openai_responses_failure(exchange(response_plan({})[0]), error)
    message = "Slow. Please try again in 1.5s."
    assert last["response"]["error"] == {"code": "rate_limit_exceeded", "message": message}


def test_instructions_and_developer_messages_are_the_system_instruction():
    items = [{"role": "developer", "content": "Be brief."}, user("Hi")]
    body = response_to_gemini({"input": items, "instructions": "Be kind."})
    assert body["systemInstruction"]["parts"] == [{"text": "Be kind."}, {"text": "Be brief."}]


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
        {"type": f"{name}_call", "id": "lsh_1", "call_id": "call_1", "action": action},
        {"type": f"{name}_call_output", "id": "call_1", "output": output},
    )
    function_call = {"id": "call_1", "name": name, "args": action}
    result = {"id": "call_1", "name": name, "response": {"output": output}}
    assert contents[1:] == [m({"functionCall": function_call}), u({"functionResponse": result})]


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


def test_a_reference_may_leave_out_its_type():
    notes, first = stored_response()
    items = [user("Who?"), {"id": first["output"][0]["id"]}, user("And now?")]
    assert response_to_gemini({"input": items}, notes)["contents"] == CONTINUED


def test_a_stored_response_is_read():
    notes, first = stored_response()
    route = openai_route("/v1/responses/{id}", "GET")
    assert whole_of(route, stored_exchange(route, notes)) == first


def test_a_stored_response_is_not_streamed():
    notes, _ = stored_response()
    with pytest.raises(ProxyError) as caught:
        stored_exchange(openai_route("/v1/responses/{id}", "GET"), notes, stream="true")
    assert caught.value.path == "stream"


def test_a_stored_response_is_deleted_with_its_input():
    notes, first = stored_response()
    route = openai_route("/v1/responses/{id}", "DELETE")
    answer = whole_of(route, stored_exchange(route, notes), notes=notes)
    assert answer == {"id": first["id"], "object": "response", "deleted": True}
    assert not notes


def test_a_response_that_is_not_stored_is_not_read():
    with pytest.raises(ProxyError) as caught:
        stored_exchange(openai_route("/v1/responses/{id}", "GET"), Notes())
    assert caught.value.status == 404


def test_a_response_that_is_not_stored_is_not_continued():
    body = {"model": FLASH, "previous_response_id": "resp_1"}
    error = refused(body, proxy.openai_responses_request)
    assert error.code == "previous_response_not_found"


def test_a_response_is_not_stored_where_the_client_forbids_it():
    notes = Notes()
    response_to({"store": False}, whole("Gem."), notes=notes)
    assert not notes


def test_a_stored_response_cannot_be_cancelled():
    notes, _ = stored_response()
    route = openai_route("/v1/responses/{id}/cancel")
    with pytest.raises(ProxyError) as caught:
        whole_of(route, stored_exchange(route, notes))
    assert caught.value.status == 400


def item_page(**query):
    """A page of the input of a stored response with three messages."""
    notes = Notes()
    items = [user("a"), assistant("b", id=None), user("c")]
    response_to({"input": items}, whole("d"), notes=notes)
    route = openai_route("/v1/responses/{id}/input_items", "GET")
    return whole_of(route, stored_exchange(route, notes, **query))


def test_the_input_of_a_stored_response_comes_newest_first():
    page = item_page()
    assert [item["id"] for item in page["data"]] == ["msg_1_i2", "msg_1_i1", "msg_1_i0"]


def test_a_page_of_input_items_is_openais():
    answer = [{"type": "output_text", "text": "b", "annotations": []}]
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
    assert response["text"] == JSON_TEXT


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
def test_thoughts_come_where_a_summary_is_wanted(reasoning, config, kinds):
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


def test_codex_gets_a_list_of_models_of_its_own():
    context = Context(query={"client_version": "0.171.0"})
    answers = iter([iter([{"models": MODELS}])])
    listed = proxy.openai_models_response(exchange(proxy.Plan(), context), answers)
    assert listed["models"] == []
    assert listed["data"]


# ======================================================================================
# 6. Ollama
# ======================================================================================

OLLAMA = Context(ollama=True)


def ollama(body, *answers, path="/api/chat", context=OLLAMA):
    """(the whole answer, the streamed events) to a body, when Gemini says this."""
    route = all_routes()["ollama", "POST", path]
    plan = asked(body, route.request, context)[0]
    answer = whole_of(route, exchange(plan, context), *answers)
    return answer, stream_of(route, exchange(plan, context), *answers) if plan.stream else None


def ollama_body(body, path="/api/chat"):
    return gemini_body(body, request=all_routes()["ollama", "POST", path].request, context=OLLAMA)


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


def test_an_ollama_chat_becomes_a_request():
    body = chat(
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
    assert ollama_body(body) == {
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
    plan, ignored = asked(body, proxy.ollama_chat_request, OLLAMA)
    assert plan.stream and plan.calls[0].streaming and ignored == ["options.num_ctx"]


def test_whole_numbers_are_cut_as_ollama_does():
    config = ollama_body(chat(options={"top_k": 40.9, "num_predict": 2000.5, "seed": 1e300}))[
        "generationConfig"
    ]
    assert (config["topK"], config["maxOutputTokens"]) == (40, 2000) and 0 <= config["seed"] < 2**31


def test_what_an_ollama_tool_says_in_parts_is_kept():
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


def test_a_model_turn_by_geminis_word():
    assert ollama_body(chat(user("q"), {"role": "model", "content": "a"}, user("b")))[
        "contents"
    ] == [u("q"), m("a"), u("b")]


@pytest.mark.parametrize(
    "options",
    [
        {"num_predict": -1, "seed": -1, "top_k": -1, "stop": []},
        {"num_predict": -2, "top_k": 0},
        {"num_predict": None},
    ],
)
def test_options_that_mean_nothing_set(options):
    assert set(ollama_body(chat(options=options))["generationConfig"]) == {"thinkingConfig"}


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
def test_a_small_limit_is_not_thought_away(think, limit, config):
    """Gemini's thoughts count against it, so a title of 50 tokens would be none at all."""
    assert (
        ollama_body(chat(think=think, options={"num_predict": limit}))["generationConfig"][
            "thinkingConfig"
        ]
        == config
    )
    body = gemini_body(chat(max_tokens=limit) if limit > 0 else chat())
    assert body.get("generationConfig", {}).get("thinkingConfig") == (
        {"thinkingBudget": 0} if limit == 50 else None
    )
    assert "thinkingConfig" not in gemini_body(chat(max_completion_tokens=50))["generationConfig"]


@pytest.mark.parametrize(
    "think, config",
    [
        (None, {"includeThoughts": True}),
        (True, {"includeThoughts": True}),
        (False, {"thinkingBudget": 0}),
        ("max", {"thinkingBudget": 24576, "includeThoughts": True}),
    ],
)
def test_think(think, config):
    assert ollama_body(chat(think=think))["generationConfig"]["thinkingConfig"] == config
    assert (
        ("generationConfig" not in ollama_body(chat(think=think, model="gemini-2.0-flash")))
        if not think
        else True
    )


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
def test_ollamas_spellings_of_a_model(name):
    plan = asked(chat(model=name), proxy.ollama_chat_request, OLLAMA)[0]
    assert plan.calls[0].model.name == FLASH and plan.model == name


def test_results_without_an_id_go_by_name_or_order():
    calls = [
        {"function": {"name": "f", "arguments": {}}},
        {"function": {"name": "g", "arguments": "{}"}},
    ]
    for results in (
        ({"content": "F"}, {"content": "G"}),
        ({"content": "G", "tool_name": "g"}, {"content": "F", "tool_name": "f"}),
    ):
        contents = ollama_body(
            chat(
                user("q"),
                assistant("", tool_calls=calls),
                *({"role": "tool", **result} for result in results),
            )
        )["contents"]
        assert contents[2]["parts"] == [
            answer_to("f", {"output": "F"}),
            answer_to("g", {"output": "G"}),
        ]


CALLED = {
    "id": "call_1",
    "index": 0,
    "function": {"index": 0, "name": "weather", "arguments": {"city": "Oslo"}},
}


def test_an_ollama_answer_whole_and_streamed():
    said = [
        chunk({"text": "Hm", "thought": True}),
        chunk("Let me ", "look."),
        chunk(call("weather", {"city": "Oslo"}), call("clock")),
        whole(""),
    ]
    answer, events = ollama(chat(tools=[WEATHER, CLOCK]), said)
    clock = {"id": "call_2", "index": 1, "function": {"index": 1, "name": "clock", "arguments": {}}}
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
    assert events == [
        *(
            {**STAMP, "message": {"role": "assistant", "content": "", **more}, "done": False}
            for more in (
                {"thinking": "Hm"},
                {"content": "Let me "},
                {"content": "look."},
                {"tool_calls": [CALLED]},
                {"tool_calls": [clock]},
            )
        ),
        {**STAMP, "message": {"role": "assistant", "content": ""}, **METRICS},
    ]


def test_ollamas_generate():
    answer, events = ollama(
        {"model": FLASH, "prompt": "Hi"},
        [chunk({"text": "Hm", "thought": True}), chunk("Hel"), whole("lo")],
        path="/api/generate",
    )
    assert answer == {**STAMP, "response": "Hello", "thinking": "Hm", "context": [], **METRICS}
    assert events[0] == {**STAMP, "response": "", "thinking": "Hm", "done": False} and events[
        -1
    ] == {**STAMP, "response": "", "context": [], **METRICS}
    gap = ollama_body(
        {"model": FLASH, "prompt": "def add(", "suffix": "):", "system": "Be neat."},
        "/api/generate",
    )
    assert gap["contents"] == [u("<before>def add(</before><gap/><after>):</after>")] and gap[
        "systemInstruction"
    ]["parts"][0]["text"].startswith("Be neat.\n\nYou fill a gap")
    raw = ollama_body({"model": FLASH, "prompt": "[INST]", "raw": True}, "/api/generate")
    assert raw["contents"] == [u("[INST]")] and "systemInstruction" not in raw


@pytest.mark.parametrize(
    "keep_alive, reason",
    [
        (None, "load"),
        ("5m0s", "load"),
        (-1, "load"),
        ("-1s", "load"),
        (1.5, "load"),
        ("1h30m", "load"),
        (0, "unload"),
        ("0s", "unload"),
        ("0", "unload"),
    ],
)
def test_nothing_asked_is_a_load_or_an_unload(keep_alive, reason):
    for path, more in (("/api/chat", {"messages": []}), ("/api/generate", {})):
        body = {"model": FLASH, "keep_alive": keep_alive, **more}
        answer, _ = ollama(
            body,
            [{"models": MODELS}],
            path=path,
        )
        assert (answer["done"], answer["done_reason"], "total_duration" in answer) == (
            True,
            reason,
            False,
        )
        plan = asked(body, all_routes()["ollama", "POST", path].request, OLLAMA)[0]
        assert plan.loads[0] == FLASH
        assert (plan.loads[1] > 0) is (reason == "load")


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
        asked(body, all_routes()["ollama", "POST", path].request, OLLAMA)
    got, body = proxy.ollama_error(caught.value)
    assert got == status
    assert words in body["error"]


def test_nothing_can_be_pushed():
    refusal = all_routes()["ollama", "POST", "/api/push"].answer
    assert refusal == proxy.Refusal(400, "models cannot be pushed from here: they are Google's")


def test_ollamas_errors():
    upstream = ProxyError(404, "models/x is not found", code="model_not_found", upstream=True)
    upstream.model, upstream.listed = "x", False
    assert proxy.ollama_error(upstream) == (404, {"error": "model 'x' not found"})
    upstream.listed = None
    assert proxy.ollama_error(upstream) == (
        404,
        {"error": "model 'x' not found: models/x is not found"},
    )
    assert (
        proxy.ollama_error(ProxyError(401, "bad key", upstream=True))[0] == 403
        and proxy.ollama_error(ProxyError(401, "no key"))[0] == 401
    )
    assert proxy.MOUNTS["ollama"][-2][1].error(ProxyError(401, "bad key", upstream=True))[0] == 403
    assert proxy.ollama_error(proxy.NoRoute(404, "x")) == (
        404,
        proxy.Payload(b"404 page not found"),
    )


def test_ollamas_embeddings():
    vectors = [{"embeddings": [{"values": [3, 4]}]}]
    assert ollama(
        {"model": EMBEDDER, "input": "one"}, vectors, [{"totalTokens": 3}], path="/api/embed"
    )[0] == {
        "model": EMBEDDER,
        "embeddings": [[0.6, 0.8]],
        "total_duration": 1,
        "load_duration": 1,
        "prompt_eval_count": 3,
    }
    assert ollama({"model": EMBEDDER, "prompt": "one"}, vectors, [{}], path="/api/embeddings")[
        0
    ] == {"embedding": [0.6, 0.8]}
    for nothing in ("", [], None):
        assert ollama({"model": EMBEDDER, "input": nothing}, path="/api/embed")[0] == {
            "model": EMBEDDER,
            "embeddings": [],
        }
    assert ollama({"model": EMBEDDER, "prompt": ""}, path="/api/embeddings")[0] == {"embedding": []}
    plan = asked({"model": EMBEDDER, "input": ["a", ""]}, proxy.ollama_embed_request, OLLAMA)[0]
    assert [
        request["content"]["parts"][0]["text"] for request in plan.calls[0].body["requests"]
    ] == ["a", " "]


def manage(method, path, body, context, notes=None):
    """The whole answer to a body, or the list of events where it wants a stream."""
    route, notes = all_routes()["ollama", method, path], Notes() if notes is None else notes
    context = looked_up(route, body, context, notes)
    plan = asked(body, route.request, context)[0]
    answers = [[{"models": MODELS}]] * len(plan.calls)
    make = stream_of if plan.stream else whole_of
    return make(route, exchange(plan, context), *answers, notes=notes)


def test_ollamas_lists_say_what_clients_insist_on():
    tags = manage("GET", "/api/tags", {}, OLLAMA)["models"]
    assert (
        [entry["name"] for entry in tags]
        == [f"{name}:latest" for name in (FLASH, NEWEST, EMBEDDER)]
        == [entry["model"] for entry in tags]
    )
    assert len({entry["digest"] for entry in tags}) == 3 and all(
        re.fullmatch("[0-9a-f]{64}", entry["digest"]) for entry in tags
    )
    assert tags[0]["capabilities"] == [
        "completion",
        "tools",
        "insert",
        "vision",
        "thinking",
    ] and tags[2]["capabilities"] == ["embedding"]
    shown = manage("POST", "/api/show", {"name": FLASH, "model": ""}, OLLAMA)
    assert {
        key: value for key, value in shown["model_info"].items() if "context_length" in key
    } == {"gemini.context_length": 1048576}
    assert (
        shown["model_info"]["general.basename"] == FLASH
        and "tools" in shown["template"]
        and ".Suffix" in shown["template"]
    )
    with pytest.raises(ProxyError) as caught:
        manage("POST", "/api/show", {"model": "x"}, OLLAMA)
    assert proxy.ollama_error(caught.value) == (404, {"error": "model 'x:latest' not found"})


def test_ollamas_running_models():
    context = OLLAMA._replace(loaded={FLASH: 1700000100.0, NEWEST: 1700000200.0, "gone": 1.0})
    running = manage("GET", "/api/ps", {}, context)["models"]
    assert [entry["name"] for entry in running] == [
        NEWEST + ":latest",
        FLASH + ":latest",
    ]
    assert (
        running[1]["expires_at"] == "2023-11-14T22:15:00.000000Z"
        and running[0]["context_length"] == 1048576
    )
    assert manage("GET", "/api/ps", {}, OLLAMA._replace(loaded={})) == {"models": []}


def asked_with(body, context, notes, route=None):
    """The plan for a body, with what is stored."""
    route = route or all_routes()["ollama", "POST", "/api/chat"]
    return asked(body, route.request, looked_up(route, body, context, notes))[0]


def test_names_that_clients_make():
    notes = Notes()
    assert manage(
        "POST", "/api/copy", {"source": FLASH, "destination": "gpt-4o"}, OLLAMA, notes
    ) == proxy.Payload(b"")
    assert manage(
        "POST",
        "/api/create",
        {
            "model": "pirate",
            "from": "gpt-4o",
            "system": "Arr.",
            "parameters": {"temperature": 0.1},
            "stream": False,
        },
        OLLAMA,
        notes,
    ) == {"status": "success"}
    body = (
        asked_with(chat(model="Pirate:latest", options={"top_k": 3}), OLLAMA, notes).calls[0].body
    )
    assert (
        body["systemInstruction"] == {"parts": [{"text": "Arr."}]}
        and body["generationConfig"]["temperature"] == 0.1
        and body["generationConfig"]["topK"] == 3
    )
    assert "pirate:latest" in [
        entry["name"] for entry in manage("GET", "/api/tags", {}, OLLAMA, notes)["models"]
    ]
    assert (
        manage("POST", "/api/show", {"model": "pirate"}, OLLAMA, notes)["details"]["parent_model"]
        == FLASH
    )
    for body in (
        {"source": "nobody", "destination": "x"},
        {"source": FLASH, "destination": NEWEST},
        {"source": FLASH, "destination": "a b"},
    ):
        with pytest.raises(ProxyError):
            manage("POST", "/api/copy", body, OLLAMA, notes)
    assert manage("DELETE", "/api/delete", {"model": "gpt-4o"}, OLLAMA, notes) == proxy.Payload(b"")
    for name, status in (("gpt-4o", 404), (FLASH, 403)):
        with pytest.raises(ProxyError) as caught:
            manage("DELETE", "/api/delete", {"name": name}, OLLAMA, notes)
        assert caught.value.status == status


def test_a_model_made_from_an_alias_is_geminis():
    notes = Notes()
    context = OLLAMA._replace(aliases=(("fast", FLASH), ("gpt-*", NEWEST)))
    for source, model in (("fast", FLASH), ("gpt-4o", NEWEST), ("mario", FLASH)):
        manage(
            "POST",
            "/api/create",
            {
                "model": "luigi" if source == "mario" else "mario",
                "from": source,
                "parameters": {"temperature": 0.1, "top_p": 0.5},
            },
            context,
            notes,
        )
        name = "luigi" if source == "mario" else "mario"
        body = chat(model=name, options={"temperature": None, "top_p": 1})
        (call,) = asked_with(body, context, notes).calls
        assert call.model.name == (
            NEWEST if source == "gpt-4o" else FLASH if source == "fast" else NEWEST
        )
        assert (
            call.body["generationConfig"]["temperature"] == 0.1
            and call.body["generationConfig"]["topP"] == 1
        )
    with pytest.raises(ProxyError) as caught:
        manage(
            "POST",
            "/api/create",
            {"model": "x", "from": FLASH, "parameters": {"temperature": "0.7"}},
            context,
        )
    assert (caught.value.status, caught.value.path) == (400, "parameters.temperature")


def test_a_recipe_for_a_model_without_a_system_instruction():
    notes = Notes(
        {
            "model:pirate": json.dumps(
                {"source": "gemma-3-27b-it", "system": "Say arr.", "options": {}}
            )
        }
    )
    route = proxy.find_route("ollama", "POST", "/v1/chat/completions").route
    plan = asked_with(chat(model="pirate"), OLLAMA, notes, route)
    assert (
        plan.calls[0].body["contents"][0] == u("Say arr.")
        and "systemInstruction" not in plan.calls[0].body
    )


def test_a_pull_of_what_gemini_has_succeeds_and_of_else_fails():
    assert (
        manage("POST", "/api/pull", {"model": FLASH}, OLLAMA)[-1]
        == manage("POST", "/api/pull", {"name": FLASH, "stream": False}, OLLAMA)
        == {"status": "success"}
    )
    for stream in (True, False):
        with pytest.raises(ProxyError, match="pull model manifest: file does not exist"):
            manage("POST", "/api/pull", {"model": "nobody", "stream": stream}, OLLAMA)


def test_openais_routes_on_an_ollama_server():
    answer, events = respond(
        chat(stream=True), [whole({"text": "Hm", "thought": True}, "42")], context=OLLAMA
    )
    assert answer["choices"][0]["message"]["reasoning"] == "Hm" and {"reasoning": "Hm"} in deltas(
        events
    )
    listed = proxy.openai_models_response(
        exchange(proxy.Plan(), OLLAMA), iter([iter([{"models": MODELS}])])
    )["data"]
    assert listed[0] == {
        "id": FLASH + ":latest",
        "object": "model",
        "created": proxy.GEMINI_OPENED,
        "owned_by": "library",
    }


# ======================================================================================
# 7. Anthropic
# ======================================================================================

CLAUDE = Context(ollama=True, aliases=(("claude-*", NEWEST),))
ASK_CITY = {
    "name": "weather",
    "description": "The weather",
    "input_schema": WEATHER["function"]["parameters"],
}


def said_to_claude(*messages, model="claude-opus-5", **more):
    return {"model": model, "max_tokens": 100, "messages": list(messages) or [user("Hi")], **more}


def claude_body(body):
    return gemini_body(body, request=proxy.anthropic_messages_request, context=CLAUDE)


def claude_says(body, *chunks):
    """(the whole message, the streamed events) when Gemini says these chunks; an event adds up to the same message."""
    plan = asked(body, proxy.anthropic_messages_request, CLAUDE)[0]
    route = proxy.ANTHROPIC.routes[0]
    message = whole_of(route, exchange(plan, CLAUDE), chunks)
    return message, stream_of(route, exchange(plan, CLAUDE), chunks)


def use(id, name="weather", **input):
    return {"type": "tool_use", "id": id, "name": name, "input": input or {"city": "Oslo"}}


def used(id, content="3", **more):
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def test_a_message_becomes_a_request():
    body = said_to_claude(
        user(
            [
                {"type": "text", "text": "Hi"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                },
            ]
        ),
        assistant("Hello"),
        user("Bye"),
        system=[
            {"type": "text", "text": proxy.BILLING + " cc_version=2"},
            {"type": "text", "text": "Be brief."},
        ],
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop_sequences=["END"],
        max_tokens=100_000,
        metadata={"user_id": "u"},
    )
    assert claude_body(body) == {
        "contents": [
            {
                "role": "user",
                "parts": [{"text": "Hi"}, {"inlineData": {"mimeType": "image/png", "data": PNG}}],
            },
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
    plan, ignored = asked(body, proxy.anthropic_messages_request, CLAUDE)
    assert (
        plan.calls[0].path == "models/gemini-3.8-flash:generateContent"
        and plan.model == "claude-opus-5"
    )
    assert ignored == ["max_tokens>65536", "metadata", "system[].x-anthropic-billing-header"]


def test_what_the_system_says_stays_in_its_place():
    body = claude_body(
        said_to_claude(
            {"role": "system", "content": "Be brief."},
            user("Hi"),
            {"role": "system", "content": "It is late."},
        )
    )
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert body["contents"] == [
        {
            "role": "user",
            "parts": [
                {"text": "Hi"},
                {"text": "<system>\n"},
                {"text": "It is late."},
                {"text": "\n</system>"},
            ],
        }
    ]


@pytest.mark.parametrize(
    "block, parts",
    [
        (
            {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
            [{"fileData": {"mimeType": "image/png", "fileUri": "https://example.com/a.png"}}],
        ),
        (
            {"type": "document", "source": {"type": "url", "url": "https://example.com/a"}},
            [{"fileData": {"mimeType": "application/pdf", "fileUri": "https://example.com/a"}}],
        ),
        (
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="},
            },
            [{"inlineData": {"mimeType": "application/pdf", "data": "JVBERi0="}}],
        ),
        (
            {
                "type": "document",
                "title": "A",
                "context": "B",
                "source": {"type": "text", "media_type": "text/plain", "data": "C"},
            },
            [{"text": "A\nB:\n"}, {"text": "C"}],
        ),
        (
            {
                "type": "document",
                "citations": {"enabled": False},
                "source": {"type": "content", "content": [{"type": "text", "text": "C"}]},
            },
            [{"text": "C"}],
        ),
        (
            {
                "type": "search_result",
                "title": "T",
                "source": "https://a",
                "content": [{"type": "text", "text": "C"}],
            },
            [{"text": "T (https://a):\n"}, {"text": "C"}],
        ),
    ],
)
def test_blocks(block, parts):
    body = said_to_claude(user([block]))
    assert (
        claude_body(body)["contents"][0]["parts"] == parts
        and asked(body, proxy.anthropic_messages_request, CLAUDE)[1] == []
    )


def test_blocks_of_anthropics_servers_are_told_as_ignored():
    body = said_to_claude(
        user("Hi"),
        assistant(
            [
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {
                    "type": "text",
                    "text": "Hello",
                    "citations": [{"type": "x"}],
                    "cache_control": {"type": "ephemeral"},
                },
            ]
        ),
        user("Bye"),
    )
    assert claude_body(body)["contents"][1] == {"role": "model", "parts": [{"text": "Hello"}]}
    assert asked(body, proxy.anthropic_messages_request, CLAUDE)[1] == [
        "messages[].content[].cache_control",
        "messages[].content[].server_tool_use",
    ]


def test_a_history_with_tools_and_a_signature_in_a_thinking_block():
    body = claude_body(
        said_to_claude(
            user("Hi"),
            assistant(
                [
                    {"type": "thinking", "thinking": "Hm", "signature": sign("a")},
                    {"type": "text", "text": "Let me see."},
                    use("t1"),
                    use("t2", city="Bergen"),
                ]
            ),
            user(
                [
                    {"type": "text", "text": "Well?"},
                    used(
                        "t2",
                        [{"type": "text", "text": "no"}, {"type": "text", "text": "net"}],
                        is_error=True,
                    ),
                    used(
                        "t1",
                        [
                            {"type": "text", "text": "3"},
                            {
                                "type": "image",
                                "source": {
                                    "type": "base64",
                                    "media_type": "image/png",
                                    "data": PNG,
                                },
                            },
                        ],
                    ),
                ]
            ),
            tools=[ASK_CITY],
        )
    )
    first, second = (
        {"id": id, "name": "weather", "args": {"city": city}}
        for id, city in (("t1", "Oslo"), ("t2", "Bergen"))
    )
    assert body["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {"text": "Let me see."},
                {"functionCall": first, "thoughtSignature": sign("a")},
                {"functionCall": second},
            ],
        },
        {
            "role": "user",
            "parts": [
                {
                    "functionResponse": {
                        "id": "t1",
                        "name": "weather",
                        "response": {"output": "3"},
                        "parts": [{"inlineData": {"mimeType": "image/png", "data": PNG}}],
                    }
                },
                {
                    "functionResponse": {
                        "id": "t2",
                        "name": "weather",
                        "response": {"error": "no\nnet"},
                    }
                },
            ],
        },
        {"role": "user", "parts": [{"text": "Well?"}]},
    ]
    assert body["tools"] == [
        {
            "functionDeclarations": [
                {
                    "name": "weather",
                    "description": "The weather",
                    "parametersJsonSchema": ASK_CITY["input_schema"],
                }
            ]
        }
    ]


def test_tools_of_anthropics():
    tools = [
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
    body = said_to_claude(tools=tools)
    functions, search, code = claude_body(body)["tools"]
    declared = {
        one["name"]: one["parametersJsonSchema"]["properties"]
        for one in functions["functionDeclarations"]
    }
    assert list(declared) == [
        "bash",
        "str_replace_editor",
        "str_replace_based_edit_tool",
        "memory",
    ] and (search, code) == ({"googleSearch": {}}, {"codeExecution": {}})
    assert (
        set(declared["bash"]) == {"command", "restart"}
        and "undo_edit" in declared["str_replace_editor"]["command"]["enum"]
    )
    assert (
        "insert_text" in declared["str_replace_based_edit_tool"]
        and "rename" in declared["memory"]["command"]["enum"]
    )
    assert asked(body, proxy.anthropic_messages_request, CLAUDE)[1] == [
        "tools[].computer_toolset_20260801",
        "tools[].max_characters",
        "tools[].max_uses",
        "tools[].web_fetch_20250910",
    ]


SEARCH = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    "choice, config",
    [
        ({"type": "auto"}, None),
        ({"type": "any"}, {"mode": "ANY"}),
        ({"type": "none"}, {"mode": "NONE"}),
        ({"type": "tool", "name": "weather"}, {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
    ],
)
def test_choices_of_a_tool(choice, config):
    body = claude_body(said_to_claude(tools=[ASK_CITY], tool_choice=choice))
    assert body.get("toolConfig", {}).get("functionCallingConfig") == config


def test_a_search_can_be_chosen_but_not_forced_and_can_be_forbidden():
    chosen = said_to_claude(tools=[SEARCH], tool_choice={"type": "tool", "name": "web_search"})
    assert claude_body(chosen)["tools"] == [{"googleSearch": {}}] and asked(
        chosen, proxy.anthropic_messages_request, CLAUDE
    )[1] == ["tool_choice"]
    assert "tools" not in claude_body(said_to_claude(tools=[SEARCH], tool_choice={"type": "none"}))


@pytest.mark.parametrize(
    "model, more, config, shown",
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
    ],
)
def test_thinking(model, more, config, shown):
    body = said_to_claude(model=model, **more)
    assert claude_body(body)["generationConfig"].get("thinkingConfig") == config
    assert asked(body, proxy.anthropic_messages_request, CLAUDE)[0].options.thinking is shown


@pytest.mark.parametrize(
    "path, body",
    [
        ("model", {"max_tokens": 9}),
        ("max_tokens", {**said_to_claude(), "max_tokens": None}),
        ("max_tokens", said_to_claude(max_tokens=0)),
        ("messages", {**said_to_claude(), "messages": []}),
        ("messages[0].role", said_to_claude({"role": "wizard", "content": "Hi"})),
        ("messages[0].content", said_to_claude(user(7))),
        ("messages[0].content[0].type", said_to_claude(user([use("t1")]))),
        ("messages[0].content[0].type", said_to_claude(assistant([used("t1")]))),
        (
            "messages[0].content[0].content[0].type",
            said_to_claude(user([used("t1", [used("t2")])])),
        ),
        (
            "messages[0].content[0].source.data",
            said_to_claude(user([{"type": "image", "source": {"type": "base64", "data": "@"}}])),
        ),
        (
            "messages[0].content[0].source.url",
            said_to_claude(
                user([{"type": "image", "source": {"type": "url", "url": "http://localhost/a"}}])
            ),
        ),
        (
            "messages[0].content[0].source.file_id",
            said_to_claude(
                user([{"type": "document", "source": {"type": "file", "file_id": "f"}}])
            ),
        ),
        (
            "messages[0].content[0].source.type",
            said_to_claude(user([{"type": "document", "source": {"type": "smell"}}])),
        ),
        (
            "tool_choice.name",
            said_to_claude(tools=[ASK_CITY], tool_choice={"type": "tool", "name": "clock"}),
        ),
        ("tools[0].name", said_to_claude(tools=[{"input_schema": {}}])),
        ("thinking.type", said_to_claude(thinking={})),
        ("thread", said_to_claude(thread={"type": "continue"})),
    ],
)
def test_bad_messages_name_the_place(path, body):
    with pytest.raises(ProxyError) as caught:
        asked(body, proxy.anthropic_messages_request, CLAUDE)
    assert (caught.value.status, caught.value.path) == (404 if path == "thread" else 400, path)


def test_an_answer_in_json_for_claudes_clients():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    for more in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ):
        body = said_to_claude(**more)
        assert (
            claude_body(body)["generationConfig"]["responseJsonSchema"] == schema
            and asked(body, proxy.anthropic_messages_request, CLAUDE)[1] == []
        )
    message, _ = claude_says(
        said_to_claude(model=FLASH, tools=[ASK_CITY], **more), whole("```json\n{}\n```")
    )
    assert message["content"] == [{"type": "text", "text": "{}"}]


STREAMED = b"".join(
    b"event: %b\ndata: %b\n\n" % (json.loads(line)["type"].encode(), line)
    for line in b"""
{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"claude-opus-5","content":[],"stop_reason":null,"stop_sequence":null,\
"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":1,"output_tokens":0,"output_tokens_details":{"thinking_tokens":0}}}}
{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Hm."}}
{"type":"content_block_stop","index":0}
{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}
{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Let me "}}
{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"see."}}
{"type":"content_block_stop","index":1}
{"type":"content_block_start","index":2,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"content_block_delta","index":2,"delta":{"type":"signature_delta","signature":"EmFhYWFhYWFh"}}
{"type":"content_block_stop","index":2}
{"type":"content_block_start","index":3,"content_block":{"type":"tool_use","id":"call_2","name":"weather","input":{}}}
{"type":"content_block_delta","index":3,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\":\\"Oslo\\"}"}}
{"type":"content_block_stop","index":3}
{"type":"content_block_start","index":4,"content_block":{"type":"tool_use","id":"call_3","name":"weather","input":{}}}
{"type":"content_block_delta","index":4,"delta":{"type":"input_json_delta","partial_json":"{\\"city\\":\\"Rome\\"}"}}
{"type":"content_block_stop","index":4}
{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},\
"usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":1,"output_tokens":7,"output_tokens_details":{"thinking_tokens":2}}}
{"type":"message_stop"}
""".strip().splitlines()
)


def test_a_streamed_message():
    body = said_to_claude(tools=[ASK_CITY], thinking={"type": "adaptive"})
    chunks = (
        chunk(
            {"text": "Hm.", "thought": True},
            usage={"promptTokenCount": 4, "cachedContentTokenCount": 1},
        ),
        chunk("Let me "),
        chunk("see."),
        chunk(call("weather", {"city": "Oslo"}, "a"), call("weather", {"city": "Rome"})),
        whole("", usage={**USAGE, "cachedContentTokenCount": 1}),
    )
    message, events = claude_says(body, *chunks)
    assert b"".join(map(proxy.NAMED_SSE.encode, events)) == STREAMED
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "thinking", "thinking": "", "signature": sign("a")},
        {"type": "tool_use", "id": "call_2", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_3", "name": "weather", "input": {"city": "Rome"}},
    ]
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("tool_use", 7)


def test_a_signature_is_shown_only_to_who_asked_for_thinking():
    message, _ = claude_says(
        said_to_claude(
            tools=[ASK_CITY], tool_choice={"type": "auto", "disable_parallel_tool_use": True}
        ),
        whole(call("weather", {}, "a"), call("weather")),
    )
    assert [block["type"] for block in message["content"]] == ["tool_use"]


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
def test_stop_reasons(answer, stop):
    message, events = claude_says(said_to_claude(), answer)
    assert message["stop_reason"] == events[-2]["delta"]["stop_reason"] == stop and (
        "stop_details" in message
    ) is (stop == "refusal")


def test_a_search_is_told_with_its_sources():
    found = {
        "webSearchQueries": ["wind"],
        "groundingChunks": [{"web": {"uri": "https://a", "title": "A"}}],
        "groundingSupports": [
            {
                "segment": {"startIndex": 0, "endIndex": 6, "text": "Æther"},
                "groundingChunkIndices": [0],
            }
        ],
    }
    message, events = claude_says(
        said_to_claude(tools=[SEARCH]), chunk("Æther"), whole(" wind", groundingMetadata=found)
    )
    assert message["content"] == [
        {
            "type": "text",
            "text": "Æther wind",
            "citations": [
                {
                    "type": "web_search_result_location",
                    "cited_text": "Æther",
                    "url": "https://a",
                    "title": "A",
                    "encrypted_index": "",
                }
            ],
        },
        {
            "type": "server_tool_use",
            "id": "srvtoolu_2",
            "name": "web_search",
            "input": {"query": "wind"},
        },
        {
            "type": "web_search_tool_result",
            "tool_use_id": "srvtoolu_2",
            "content": [
                {
                    "type": "web_search_result",
                    "url": "https://a",
                    "title": "A",
                    "encrypted_content": "",
                    "page_age": None,
                }
            ],
        },
    ]
    assert message["usage"]["server_tool_use"] == {
        "web_search_requests": 1,
        "web_fetch_requests": 0,
    }
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [
        0,
        1,
        2,
    ]


def test_sound_without_a_place_is_a_note():
    audio = {"inlineData": {"mimeType": "audio/wav", "data": PNG}}
    note = "\n[Gemini made something of type audio/wav, for which there is no place here.]\n"
    made = exchange(asked({"model": FLASH, "input": "Hi"}, proxy.openai_responses_request)[0])
    response = whole_of(RESPONSES_ROUTE, made, [whole("Hear:", audio)])
    assert [part["text"] for item in response["output"] for part in item["content"]] == [
        "Hear:" + note
    ]
    made = exchange(asked({"model": FLASH, "prompt": "Hi"}, proxy.openai_completions_request)[0])
    assert (
        whole_of(openai_route("/v1/completions"), made, [whole("Hear:", audio)])["choices"][0][
            "text"
        ]
        == "Hear:" + note
    )


def test_a_response_that_fails_before_its_first_word_begins_all_the_same():
    made = exchange(asked({"model": FLASH, "input": "Hi"}, proxy.openai_responses_request)[0])
    failure = proxy.openai_responses_failure(made, ProxyError(429, "slow down", retry_after=7.0))
    events = kept_by(failure, Notes())
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]


def test_ollama_takes_numbers_that_openai_refuses():
    body = {
        "model": FLASH,
        "messages": [user("Hi")],
        "max_tokens": -1,
        "temperature": 3,
        "top_p": 1.5,
    }
    config = asked(body, context=Context(ollama=True))[0].calls[0].body["generationConfig"]
    assert "maxOutputTokens" not in config and (config["temperature"], config["topP"]) == (2, 1)
    with pytest.raises(ProxyError, match="max_tokens"):
        asked(body)


def test_recipes_hold_on_every_route(gemini):
    with serving(gemini.url, api="ollama") as server:
        post(
            server,
            "/api/create",
            {
                "model": "pirate",
                "from": FLASH,
                "system": "Say arr.",
                "parameters": {"temperature": 0.1, "stop": ["END"]},
            },
        )
        for path, body in (
            ("/v1/chat/completions", chat(model="pirate")),
            ("/v1/messages", {**chat(model="pirate"), "max_tokens": 9}),
            ("/v1/responses", {"model": "pirate", "input": "Hi"}),
            ("/api/chat", chat(model="pirate")),
        ):
            assert post(server, path, body)[0] == 200
            asked_ = gemini.asked[-1]
            assert (
                asked_["systemInstruction"]["parts"][0]["text"] == "Say arr."
                and asked_["generationConfig"]["temperature"] == 0.1
            ), path
        post(
            server,
            body=chat(model="pirate", tools=[WEATHER], response_format={"type": "json_object"}),
        )
        assert [part["text"][:8] for part in gemini.asked[-1]["systemInstruction"]["parts"]] == [
            "Say arr.",
            proxy.JSON_ALONE[:8],
        ]
        shown = json.loads(post(server, "/api/show", {"model": "pirate"})[2])
        assert shown["parameters"] == 'temperature 0.1\nstop "END"'


def test_recipes_count():
    notes = Notes(
        {
            "model:pirate": json.dumps(
                {"source": FLASH, "system": "Say arr.", "options": {"temperature": 0.1}}
            )
        }
    )
    route = proxy.find_route("ollama", "POST", "/v1/messages/count_tokens").route
    plan = asked_with(chat(model="pirate"), OLLAMA, notes, route)
    counted = plan.calls[0].body["generateContentRequest"]
    assert (
        counted["systemInstruction"]["parts"][0]["text"] == "Say arr."
        and "generationConfig" not in counted
    )


def test_a_name_with_a_space_keeps_its_signature(server, gemini):
    tool = {"type": "function", "function": {"name": "my tool"}}
    gemini.say(whole(call("my_tool", {}, "s")))
    message = kept(
        json.loads(post(server, body=chat(model=NEWEST, tools=[tool]))[2])["choices"][0]["message"]
    )
    post(
        server,
        body=chat(
            user("Hi"),
            message,
            {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"},
            model=NEWEST,
            tools=[tool],
        ),
    )
    assert gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("s")


def test_a_stream_of_pictures_that_breaks_off_says_so(server, gemini, monkeypatch):
    monkeypatch.setattr(
        proxy, "MAX_PARALLEL_CALLS", 1
    )  # or the second picture's call may come first
    gemini.say(
        whole({"inlineData": {"mimeType": "image/png", "data": PNG}}), gemini_error(400, "boom")
    )
    body = post(server, "/v1/images/generations", {"prompt": "x", "n": 2, "stream": True})[
        2
    ].decode()
    assert body.count("event: ") == 2 and "event: error\ndata: {" in body and "boom" in body


def test_a_picture_is_a_note_in_a_message():
    message, _ = claude_says(
        said_to_claude(), whole("Look:", {"inlineData": {"mimeType": "image/png", "data": PNG}})
    )
    assert message["content"] == [
        {
            "type": "text",
            "text": "Look:\n[Gemini made something of type image/png, for which there is no place here.]\n",
        }
    ]


def test_tokens_are_counted_by_gemini():
    body = {
        **said_to_claude(
            user("Hi"),
            assistant([use("t1")]),
            user([used("t1")]),
            system="Be brief.",
            tools=[ASK_CITY],
        ),
        "max_tokens": None,
    }
    plan = asked(body, proxy.anthropic_count_request, CLAUDE)[0]
    inner_body = plan.calls[0].body["generateContentRequest"]
    assert (
        plan.calls[0].path == "models/gemini-3.8-flash:countTokens"
        and refusal_of(plan.calls[0].path, plan.calls[0].body) is None
    )
    assert inner_body["model"] == "models/gemini-3.8-flash" and set(inner_body) == {
        "model",
        "contents",
        "systemInstruction",
        "tools",
    }
    assert (
        refusal_of(
            "models/gemini-3.8-flash:generateContent",
            {key: value for key, value in inner_body.items() if key != "model"},
        )
        is None
    )
    assert proxy.anthropic_count_response(exchange(plan), iter([iter([{"totalTokens": 61}])])) == {
        "input_tokens": 61
    }


@pytest.mark.parametrize(
    "status, upstream, told, kind",
    [
        (400, True, 400, "invalid_request_error"),
        (401, False, 401, "authentication_error"),
        (401, True, 403, "permission_error"),
        (404, True, 404, "not_found_error"),
        (405, False, 405, "invalid_request_error"),
        (413, False, 413, "request_too_large"),
        (429, True, 429, "rate_limit_error"),
        (500, True, 500, "api_error"),
        (503, True, 503, "overloaded_error"),
        (504, True, 504, "timeout_error"),
    ],
)
def test_anthropics_errors(status, upstream, told, kind):
    error = ProxyError(status, "No.", upstream=upstream)
    error.request_id = "req_1"
    assert proxy.anthropic_error(error) == (
        told,
        {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "req_1"},
    )


def test_a_name_of_anthropics_without_an_alias_is_told_what_to_do():
    told = proxy.anthropic_error(proxy.no_such_model("claude-opus-5"))[1]["error"]
    assert (
        told["type"] == "not_found_error"
        and "claude-opus-5" in told["message"]
        and "-alias='claude-*=MODEL'" in told["message"]
    )


def test_messages_on_the_wire(gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    with serving(gemini.url, api="ollama", aliases=(("claude-*", NEWEST),)) as server:
        gemini.say(Say(whole("Hi"), delay=0.12))
        status, headers, wire = post(
            server, "/v1/messages?beta=true", said_to_claude(stream=True, metadata={"user_id": "u"})
        )
        assert (
            status == 200
            and wire.startswith(b'event: ping\ndata: {"type":"ping"}\n\n')
            and wire.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
        )
        assert headers["request-id"] == headers["x-request-id"] and b"metadata" not in wire
        gemini.say([chunk("Hel"), {"error": {"code": 503, "message": "Busy."}}])
        status, headers, wire = post(server, "/v1/messages", said_to_claude(stream=True))
        last = json.loads(wire.strip().rpartition(b"event: error\ndata: ")[2])
        assert (
            last
            == {
                "type": "error",
                "error": {"type": "overloaded_error", "message": "Busy."},
                "request_id": headers["request-id"],
            }
            and b"message_stop" not in wire
        )
        status, headers, body = post(server, "/v1/messages/batches", said_to_claude())
        assert (status, json.loads(body)["error"]["type"]) == (404, "not_found_error")
        assert json.loads(
            post(server, "/v1/messages/count_tokens?beta=true", said_to_claude())[2]
        ) == {"input_tokens": 7}


def test_claudes_signatures_are_found_by_id_where_no_thinking_is_shown(gemini):
    with serving(gemini.url, api="ollama", aliases=(("claude-*", NEWEST),)) as server:
        message = json.loads(post(server, "/v1/messages", said_to_claude(tools=[ASK_CITY]))[2])
        block = {
            **message["content"][0],
            "input": {"city": "Oslo", "unit": "C"},
        }  # Claude Code rewrites what it edits with
        post(
            server,
            "/v1/messages",
            said_to_claude(
                user("Other words"), assistant([block]), user([used(block["id"])]), tools=[ASK_CITY]
            ),
        )
        assert (
            gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("stand-in")
            and not gemini.refused
        )


# ======================================================================================
# 8. Routing
# ======================================================================================


def test_the_paths_below_responses():
    for method, path, function in (
        ("POST", "/v1/responses", proxy.openai_responses_response),
        ("POST", "/v1/responses/input_tokens", proxy.openai_input_tokens_response),
        ("GET", "/v1/responses/resp_1", proxy.openai_stored_response),
        ("DELETE", "/v1/responses/resp_1", proxy.openai_delete_response),
        ("GET", "/v1/responses/resp_1/input_items", proxy.openai_input_items_response),
        ("POST", "/v1/responses/resp_1/cancel", proxy.openai_cancel_response),
    ):
        assert proxy.find_route("ollama", method, path).route.response is function


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
def test_the_usual_misspellings_of_a_base_url(path):
    assert (
        proxy.find_route("openai", "POST", proxy.plain_path(path, "openai")).route.request
        is proxy.openai_chat_request
    )


def test_a_captured_segment_is_unquoted_after_it_was_found():
    for path in ("/v1/models/models%2Fgemini-x", "/v1/models/models/gemini-x"):
        assert proxy.find_route("openai", "HEAD", proxy.plain_path(path, "openai")).params == {
            "model": "models/gemini-x"
        }


def test_no_route():
    with pytest.raises(ProxyError) as caught:
        proxy.find_route("openai", "GET", "/v1/chat/completions")
    assert (caught.value.status, caught.value.headers) == (405, {"Allow": "POST"})
    with pytest.raises(ProxyError) as caught:
        proxy.find_route("openai", "GET", "/v1/nonsense")
    assert caught.value.status == 404


def all_routes():
    return {
        (protocol.name, route.method, route.path): route
        for mounts in reversed(list(proxy.MOUNTS.values()))
        for _, protocol in mounts
        for route in protocol.routes
    }


@pytest.mark.parametrize(
    "route",
    [route for route in all_routes().values() if route.stream],
    ids=lambda route: route.path,
)
def test_no_stream_says_a_word_before_gemini_does(route):
    body = {
        "model": FLASH,
        "messages": [user("Hi")],
        "input": "Hi",
        "prompt": "Hi",
        "max_tokens": 9,
        "stream": True,
        "from": FLASH,
        "stream_format": "sse",
        "file": proxy.Upload("a.wav", "audio/wav", b"x"),
    }
    plan = route.request(
        Fields({**body, "model": "mine"} if "create" in route.path else body), Context(ollama=True)
    )
    read = []

    def chunks():
        read.append(True)
        yield {**whole("Hello", blob("image/png", PNG), SOUND), "models": MODELS}

    one = exchange(plan)
    events = route.stream(one, events_of(one, [chunks()]))
    assert not read
    next(events)
    assert read


# ======================================================================================
# 9. Client
# ======================================================================================


@pytest.fixture
def gemini():
    with StandIn() as stand_in:
        yield stand_in
        assert not stand_in.refused, stand_in.refused


class Nobody:
    """A client that is there."""

    def __init__(self):
        self.here, self.there = socket.socketpair()

    def leave(self):
        self.there.close()


@contextlib.contextmanager
def service(url, timeout=5.0, keep_alive=None):
    """(ask, the service, the client) of a Gemini service at that URL; `ask` gives the chunks of one call."""
    gemini, client = proxy.Gemini(url), Nobody()

    def plan(call, **how):
        waiter = proxy.Waiter(
            client.here, how.pop("timeout", timeout), keep_alive=how.pop("keep_alive", keep_alive)
        )
        with gemini.call((call,), waiter, "the-key") as answers:
            return [list(chunks) for chunks in answers][0]

    yield plan, gemini, client
    while gemini.pool.idle:
        gemini.pool.drop_oldest()
    client.here.close()
    client.there.close()


PLAIN = proxy.generate_call(proxy.model_of(FLASH), False, [], [u("Hi")], {})
STREAM = proxy.generate_call(proxy.model_of(FLASH), True, [], [u("Hi")], {})


def test_connections_are_used_again_and_replaced_when_stale(gemini):
    with service(gemini.url) as (plan, service_, client):
        for call in (PLAIN, STREAM) * 5:
            assert "Hello" in json.dumps(plan(call))
        assert service_.pool.opened == 1 and len(gemini.asked) == 10
        gemini.say(Say(cut=0), whole("At last."))
        assert plan(PLAIN) == [whole("At last.")] and service_.pool.opened == 2


def test_the_request_is_what_gemini_wants_and_nothing_more(gemini):
    with service(gemini.url) as (plan, service_, client):
        plan(PLAIN)
    headers = {name.lower(): value for name, value in gemini.headers[0].items()}
    assert (
        set(headers) == {"host", "content-type", "user-agent", "x-goog-api-key", "content-length"}
        and headers["x-goog-api-key"] == "the-key"
    )
    assert gemini.paths == ["/v1beta/models/gemini-2.5-flash:generateContent"]


def refusal_by(plan, call=PLAIN, **how):
    with pytest.raises(ProxyError) as caught:
        plan(call, **how)
    return caught.value


@pytest.mark.parametrize(
    "said, tries",
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
def test_only_what_may_go_well_is_tried_again(gemini, monkeypatch, said, tries):
    monkeypatch.setattr(proxy.random, "uniform", lambda low, high: 0.01)
    gemini.say(*[said] * 9)
    with service(gemini.url) as (plan, service_, client):
        error = refusal_by(plan)
    assert len(gemini.asked) == tries and error.status == (
        502 if said.raw is not None else said.status
    )
    gemini.refused.clear()


def test_a_short_trouble_is_not_noticed(gemini):
    gemini.say(
        gemini_error(503, "overloaded"),
        gemini_error(429, "slow", "X", detail("RetryInfo", retryDelay="0.1s")),
        whole("Fine."),
    )
    with service(gemini.url) as (plan, service_, client):
        assert plan(PLAIN) == [whole("Fine.")]


def test_a_setting_that_is_refused_is_left_out_and_told(gemini):
    gemini.say(
        gemini_error(400, "Thinking level LOW is not supported for this model."), whole("Fine.")
    )
    call = proxy.generate_call(
        proxy.model_of(NEWEST), False, [], [u("Hi")], {"thinkingConfig": {"thinkingLevel": "LOW"}}
    )
    with service(gemini.url) as (_, service_, client):
        with service_.call((call,), proxy.Waiter(client.here, 5), "the-key") as answers:
            assert [list(chunks) for chunks in answers] == [
                [whole("Fine.")]
            ] and answers.ignored == ["thinkingConfig"]
    assert "thinkingConfig" not in gemini.asked[1]["generationConfig"]


def test_after_the_first_byte_nothing_is_asked_again(gemini):
    gemini.say(Say(chunk("Once "), chunk("upon"), cut=1), whole("again"))
    with service(gemini.url) as (plan, service_, client):
        assert "broke off" in refusal_by(plan, STREAM).message
    assert len(gemini.asked) == 1


def test_what_breaks_late_is_not_asked_again(gemini, monkeypatch):
    """Gemini may have been at work on it, and what is asked twice is paid twice."""
    monkeypatch.setattr(proxy, "BROKEN_RETRY_SECONDS", 0.05)
    gemini.say(Say(whole("late"), delay=0.2, cut=0), whole("Hello"))
    with service(gemini.url) as (plan, service_, client):
        assert refusal_by(plan).status == 502 and len(gemini.asked) == 1


def test_a_long_line_of_the_log_keeps_its_end(capfd):
    proxy.log("why: " + "x" * 9000 + "\nthe cause")
    said = capfd.readouterr().err
    assert len(said) < 4100 and said.startswith("why: x") and said.endswith("\\nthe cause\n")


def addresses(monkeypatch, *hosts, port=1):
    found = [
        (
            socket.AF_INET6 if ":" in host else socket.AF_INET,
            socket.SOCK_STREAM,
            6,
            "",
            (host, port),
        )
        for host in hosts
    ]
    monkeypatch.setattr(proxy.socket, "getaddrinfo", lambda *_, **__: found)


def test_families_of_addresses_take_turns(monkeypatch):
    tried = []
    addresses(monkeypatch, "fc00::1", "fc00::2", "fc00::3", "127.0.0.2")

    def refuse(sock, where, waiter, seconds):
        tried.append((where[0], seconds > proxy.ADDRESS_SECONDS))
        raise TimeoutError

    monkeypatch.setattr(proxy, "reach", refuse)
    with pytest.raises(TimeoutError):
        proxy.dial("gemini", 1, proxy.Waiter(None, 1))
    assert tried == [
        ("fc00::1", False),
        ("127.0.0.2", False),
        ("fc00::2", False),
        ("fc00::3", True),
    ]


def test_the_first_address_that_answers_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        addresses(monkeypatch, "127.0.0.2", "127.0.0.1", port=listener.getsockname()[1])
        with proxy.dial("gemini", 0, proxy.Waiter(None, 1)) as sock:
            assert sock.getpeername() == listener.getsockname()


@contextlib.contextmanager
def full_house():
    """The port of a listener that takes nobody in, so that a connection is never made (Linux drops what its queue cannot hold)."""
    with socket.socket() as listener, contextlib.ExitStack() as guests:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            guest = guests.enter_context(socket.socket())
            guest.setblocking(False)
            guest.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def mute():
    """The port of a listener that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    "scheme, port_of", [("http", full_house), ("https", full_house), ("https", mute)]
)
def test_a_connection_that_is_not_made(scheme, port_of, monkeypatch):
    """Each step of making it ends in time, beats meanwhile, and notices a client that leaves."""
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.02)
    with port_of() as port, service(f"{scheme}://127.0.0.1:{port}") as (plan, service_, client):
        ticks = []
        monkeypatch.setattr(proxy, "CONNECT_SECONDS", 0.2)
        assert refusal_by(plan, STREAM, keep_alive=lambda: ticks.append(1)).status == 504 and ticks
        monkeypatch.setattr(proxy, "CONNECT_SECONDS", 20)
        threading.Timer(0.1, client.leave).start()
        began = time.monotonic()
        with pytest.raises(proxy.ClientGone):
            plan(PLAIN)
        assert time.monotonic() - began < 10 and not service_.pool.idle


def test_a_proxy_that_says_nothing_is_left_by_those_who_leave(monkeypatch):
    with mute() as port:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
        with service("https://gemini.example") as (plan, service_, client):
            monkeypatch.setattr(proxy, "CONNECT_SECONDS", 0.1)
            assert refusal_by(plan).status == 504
            monkeypatch.setattr(proxy, "CONNECT_SECONDS", 20)
            threading.Timer(0.1, client.leave).start()
            with pytest.raises(proxy.ClientGone):
                plan(PLAIN)


def test_patience_ends(gemini, monkeypatch):
    """A Gemini that says 503 only after a long time is not asked for as long again."""
    monkeypatch.setattr(proxy, "RETRY_WINDOW_SECONDS", 0.05)
    gemini.say(
        Say(
            {"error": {"code": 503, "status": "UNAVAILABLE", "message": "overloaded"}},
            status=503,
            delay=0.2,
        ),
        whole("Hello"),
    )
    with service(gemini.url) as (plan, service_, client):
        assert refusal_by(plan).status == 503 and len(gemini.asked) == 1


def test_silence_is_a_504_and_hangs_up(gemini):
    gemini.say(Say(whole("late"), delay=30))
    with service(gemini.url) as (plan, service_, client):
        assert refusal_by(plan, timeout=0.1).status == 504 and gemini.gone.wait(5)


def test_silence_in_a_stream_beats(gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    ticks = []
    gemini.say(Say(chunk("a"), whole("b"), delay=0.3, gap=0.3))
    with service(gemini.url) as (plan, service_, client):
        assert plan(STREAM, keep_alive=lambda: ticks.append(1)) == [chunk("a"), whole("b")]
    assert len(ticks) >= 4


@pytest.mark.parametrize("how", [{"delay": 30}, {"gap": 30}])
def test_a_client_that_leaves_stops_gemini(gemini, how):
    gemini.say(Say(chunk("Once "), whole("upon"), **how))
    with service(gemini.url) as (plan, service_, client):
        threading.Timer(0.1, client.leave).start()
        with pytest.raises(proxy.ClientGone):
            plan(STREAM)
        assert gemini.gone.wait(5)


def test_a_client_that_says_the_next_thing_early_is_still_there(gemini):
    gemini.say(Say(whole("Hello"), delay=0.2))
    with service(gemini.url) as (plan, service_, client):
        client.there.sendall(b"GET / HTTP/1.1\r\n")
        assert plan(PLAIN) == [whole("Hello")]


def test_nobody_there():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with service(f"http://127.0.0.1:{nobody.getsockname()[1]}") as (plan, service_, client):
            error = refusal_by(plan)
    assert error.status == 502 and "refused" in error.message


def test_the_key_is_masked_where_gemini_quotes_it(gemini):
    gemini.say(gemini_error(403, "Consumer the-key is suspended"))
    with service(gemini.url) as (plan, service_, client):
        assert refusal_by(plan).message == "Consumer [the Gemini key] is suspended"


def test_the_list_of_models_is_kept(gemini):
    with service(gemini.url) as (plan, service_, client):
        assert plan(proxy.MODELS_CALL) == [{"models": MODELS}]
        gemini.shutdown()
        assert plan(proxy.MODELS_CALL) == [{"models": MODELS}]
        since, models = service_.models["the-key"]
        service_.models["the-key"] = since - 1e6, models
        gemini.server_close()
        service_.pool.drop_oldest()
        assert plan(proxy.MODELS_CALL, timeout=0.1) == [{"models": MODELS}], (
            "better an old list than none"
        )


@pytest.mark.parametrize(
    "env, way",
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
def test_the_proxy_on_the_way(monkeypatch, env, way):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert proxy.proxy_for("https", "gemini.example") == way


def test_memory_by_key_and_alias_within_bounds(monkeypatch):
    memory = proxy.Memory()
    assert memory.get("a", "x") is None
    memory.put("a", "x", "1")
    memory.put("b", "x", "2")
    assert (
        memory.get("a", "y"),
        memory.get("b", "y"),
        memory.get(None, "x"),
        memory.get("c", "y"),
    ) == ("1", "2", "2", None)
    monkeypatch.setattr(proxy.Memory, "ROWS", 10)
    monkeypatch.setattr(proxy.Memory, "LOOK", (1, 1 << 20))
    for i in range(30):
        memory.put(f"k{i}", "z", str(i))
    assert memory.get("k19", "") is None and memory.get("k20", "") == "20"
    monkeypatch.setattr(proxy.Memory, "SIZE", 1000)
    for i in range(30):
        memory.put(f"l{i}", "z", "x" * 400)
    assert memory.get("l27", "") is None and memory.get("l28", "") and memory.get("l29", "")


# ======================================================================================
# 10. Server
# ======================================================================================


@contextlib.contextmanager
def serving(url, api="openai", **config):
    """A proxy in front of the Gemini at that URL."""
    server = proxy.Server(
        proxy.Config(
            api=api,
            listen=("127.0.0.1", 0),
            upstream=url,
            key="the-key",
            **{"timeout": 5.0, **config},
        )
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
        server.gemini.pool.close()


@pytest.fixture
def server(gemini):
    with serving(gemini.url) as server:
        yield server


class UpstreamSocket:
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

    def plan(self, method, path, body=None, version="1.1", **headers):
        data = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        fields = {
            "Host": "localhost",
            **({"Content-Length": str(len(data))} if body is not None else {}),
            **headers,
        }
        lines = [f"{method} {path} HTTP/{version}"] + [
            f"{name.replace('_', '-')}: {value}"
            for name, value in fields.items()
            if value is not None
        ]
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + data).reply(method)

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
        body = b""
        while "transfer-encoding" in headers:
            size = int(self.file.readline(), 16)
            body += self.file.read(size)
            assert self.file.readline() == b"\r\n"
            if not size:
                return status, headers, body
        return status, headers, self.file.read()

    def ended(self):
        """Whether the server hung up, and said nothing more."""
        return self.file.read() == b""


def post(server, path="/v1/chat/completions", body=None, **headers):
    with UpstreamSocket(server) as line:
        return line.plan("POST", path, chat() if body is None else body, **headers)


def error_of(reply):
    error = json.loads(reply[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_question_is_answered(server):
    status, headers, body = post(server)
    assert (
        status == 200
        and headers["content-type"] == "application/json"
        and headers["x-request-id"].startswith("req_")
    )
    assert (
        json.loads(body)["choices"][0]["message"]["content"]
        == "Hello from the stand-in for Gemini. You said: Hi"
    )
    assert "x-proxy-ignored" not in headers and "connection" not in headers


def test_a_stream_on_the_wire(server, gemini):
    gemini.say([chunk("Hel"), whole("lo")])
    status, headers, body = post(server, body=chat(stream=True))
    events = body.decode().split("\n\n")
    assert headers["content-type"] == "text/event-stream; charset=utf-8" and events[-2:] == [
        "data: [DONE]",
        "",
    ]
    assert [
        json.loads(event[6:])["choices"][0]["delta"].get("content") for event in events[:-2]
    ] == ["", "Hel", "lo", None]


def test_no_body_stays_in_memory(server):
    gc.collect()
    gc.disable()
    try:
        assert (
            post(
                server,
                body=chat(user([{"type": "text", "text": "Hi"}]), tools=[WEATHER], stream=True),
            )[0]
            == 200
        )
        until(
            lambda: (
                not server.handlers and not any(type(thing) is Fields for thing in gc.get_objects())
            )
        )
    finally:
        gc.enable()


def test_what_was_ignored_is_told(server):
    headers = post(
        server, body=chat(user="me", logit_bias={"1": 2}, **{"a\r\nX-Injected: yes": 1, "ключ": 1})
    )[1]
    assert (
        headers["x-proxy-ignored"] == "a??X-Injected:?yes, logit_bias, user, ????"
        and "x-injected" not in headers
    )
    long = post(server, body=chat(**{f"unknown_{i}": i for i in range(2000)}))[1]["x-proxy-ignored"]
    assert len(long) < 4010 and long.endswith("...")


def test_keep_alive_pipelining_and_http_1_0(server, gemini):
    with UpstreamSocket(server) as line:
        one = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
        )
        for i in range(3):
            data = json.dumps(chat(user(f"number {i}"), stream=i == 1)).encode()
            line.send(one % (len(data), data))
        for i in range(3):
            assert f"number {i}" in line.reply()[2].decode()
        assert (
            line.plan("GET", "/healthz", Connection="close")[1]["connection"] == "close"
            and line.ended()
        )
    for stream in (False, True):
        with UpstreamSocket(server) as line:
            status, headers, body = line.plan(
                "POST", "/v1/chat/completions", chat(stream=stream), version="1.0"
            )
            assert (
                status == 200
                and "transfer-encoding" not in headers
                and b"Hello" in body
                and line.ended()
            )


def test_chunked_bodies_and_expectations(server):
    data = json.dumps(chat()).encode()
    with UpstreamSocket(server) as line:
        for size in (1, 7, 4096):
            pieces = b"".join(
                b"%x;a=b\r\n%b\r\n" % (len(data[i : i + size]), data[i : i + size])
                for i in range(0, len(data), size)
            )
            line.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                + pieces
                + b"0\r\nX-Sum: 1\r\n\r\n"
            )
            assert line.reply()[0] == 200
        line.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
            % len(data)
        )
        assert (
            line.file.readline() == b"HTTP/1.1 100 Continue\r\n" and line.file.readline() == b"\r\n"
        )
        assert line.send(data).reply()[0] == 200


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
def test_a_request_that_could_be_read_in_two_ways_is_refused_and_ends_the_connection(
    server, gemini, field
):
    with UpstreamSocket(server) as line:
        line.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + field + b"\r\n\r\n"
        )
        reply = line.reply()
        assert (
            400 <= reply[0] < 500
            and error_of(reply)
            and reply[1]["connection"] == "close"
            and line.ended()
        )
    assert not gemini.asked


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n",
        b"-5\r\n",
        b"0x5\r\n",
        b"5 5\r\n",
        b"f" * 17 + b"\r\n",
        b"\r\n",
        b"2\r\n{}XX\r\n",
        b"1;" + b"x" * 5000,
        b"fffffff0\r\n",
    ],
)
def test_broken_chunks(server, chunks):
    with UpstreamSocket(server) as line:
        line.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunks
        )
        assert 400 <= line.reply()[0] < 500 and line.ended()


@pytest.mark.parametrize(
    "line_",
    [
        b"GARBAGE\r\n",
        b"GET /healthz HTTP/9\r\n",
        b"GET  /healthz HTTP/1.1\r\n",
        b"\0\1\2\r\n",
        b"get /x http/1.1\r\n",
        b"GET /" + b"x" * 99999,
    ],
)
def test_bad_request_lines(server, line_):
    with UpstreamSocket(server) as line:
        assert line.send(line_ + b"\r\n").reply()[0] in (400, 414) and line.ended()


def test_bodies_that_are_too_large_or_bombs(server, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(proxy, "MAX_UNPACKED_BYTES", 1000)
    import gzip

    assert post(server, body=b"x" * 2000)[0] == 413
    assert post(server, body=gzip.compress(b" " * 2000), Content_Encoding="gzip")[0] == 413
    assert (
        post(server, body=gzip.compress(json.dumps(chat()).encode()), Content_Encoding="gzip")[0]
        == 200
    )
    for body, coding in ((b"{}", "gzip"), (gzip.compress(b"{}")[:-9], "gzip")):
        assert post(server, body=body, Content_Encoding=coding)[0] == 400
    assert post(server, body=b"{}", Content_Encoding="zstd")[0] == 415


@pytest.mark.parametrize("raw", [raw for raw in RUBBISH if raw])
def test_rubbish_in_a_body_is_a_400_and_the_connection_goes_on(server, gemini, raw):
    with UpstreamSocket(server) as line:
        assert (
            error_of(line.plan("POST", "/v1/chat/completions", raw))["type"]
            == "invalid_request_error"
        )
        assert line.plan("POST", "/v1/chat/completions", chat())[0] == 200


def test_refusals_have_a_status_also_for_streams(server, gemini):
    for stream in (False, True):
        gemini.say(
            gemini_error(
                429, "Slow down.", "RESOURCE_EXHAUSTED", detail("RetryInfo", retryDelay="6.2s")
            )
        )
        reply = post(server, body=chat(stream=stream))
        assert (
            reply[0] == 429
            and reply[1]["retry-after"] == "7"
            and error_of(reply)["code"] == "rate_limit_exceeded"
        )


def test_a_failure_in_mid_stream_is_the_last_event(server, gemini):
    for failure in (
        Say(chunk("Once "), SHED),
        Say(chunk("Once "), chunk("upon"), cut=1),
        Say(chunk("Once ")),
    ):
        gemini.say(failure)
        status, headers, body = post(server, body=chat(stream=True))
        events = [json.loads(event[6:]) for event in body.decode().split("\n\n")[:-1]]
        assert status == 200 and [d.get("content") for d in deltas(events[:-1])] == ["", "Once "]
        assert set(events[-1]) == {"error"} and set(events[-1]["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }


def test_a_silent_stream_is_kept_alive(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    gemini.say(Say(whole("Hello"), delay=0.3))
    assert re.match(rb"(: keep-alive\n\n){2,}data: {", post(server, body=chat(stream=True))[2])
    gemini.say(Say({"error": {"code": 429, "message": "Slow"}}, delay=0.3, status=429))
    status, _, body = post(server, body=chat(stream=True))
    assert (
        status == 200
        and b'data: {"error":{"message":"Slow"' in body
        and not body.endswith(b"[DONE]\n\n")
    )


def test_a_client_that_leaves_is_noticed(server, gemini):
    for stream in (False, True):
        gemini.gone.clear()
        gemini.say(Say(chunk("Once "), whole("upon"), delay=30))
        with UpstreamSocket(server) as line:
            data = json.dumps(chat(stream=stream)).encode()
            line.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                % (len(data), data)
            )
            while len(gemini.asked) < 1 + stream:
                time.sleep(0.01)
        assert gemini.gone.wait(2)


def test_a_bug_of_ours_is_a_500_with_a_traceback_in_the_log_only(server, monkeypatch, capfd):
    monkeypatch.setattr(proxy, "openai_usage", lambda usage: 1 // 0)
    reply = post(server)
    assert (
        reply[0] == 500
        and "ZeroDivision" not in str(reply)
        and "ZeroDivisionError" in capfd.readouterr().err
    )


def test_the_log_tells_neither_keys_nor_content(server, capfd):
    post(
        server,
        path="/v1/chat/completions?key=secret",
        body=chat(user("secret words")),
        Authorization="Bearer secret",
    )
    with UpstreamSocket(server) as line:
        line.plan("GET", "/\x1b[31m%0aFORGED", User_Agent="\x1b[2J")
    said, deadline = "", time.monotonic() + 5
    while (
        said.count("\n") < 2 and time.monotonic() < deadline
    ):  # a line is written after its answer
        said += capfd.readouterr().err
    assert (
        "secret" not in said
        and "\x1b" not in said
        and "the-key" not in said
        and len(said.splitlines()) == 2
    )
    assert re.search(
        r"^POST /v1/chat/completions 200 \d+ ms 'gemini-2.5-flash' 4\+7 tokens$", said, re.M
    )


def test_methods_and_paths(server):
    with UpstreamSocket(server) as line:
        assert line.plan("HEAD", "/healthz")[0] == 200 and line.plan("GET", "/healthz")[2] == b"ok"
        assert "api = openai" in line.plan("GET", "/")[2].decode()
        assert line.plan("GET", "http://localhost/healthz")[0] == 200
        status, headers, _ = line.plan("GET", "/v1/chat/completions")
        assert status == 405 and headers["allow"] == "POST"
        assert (
            error_of(line.plan("GET", "/v1/nonsense"))["message"]
            == "Invalid URL (GET /v1/nonsense)"
        )


ORIGINS = {
    "http://localhost:3000": True,
    "https://127.0.0.1": True,
    "app://obsidian.md": True,
    "vscode-webview://1k": True,
    "file://": True,
    "https://evil.example": False,
    "http://localhost.evil.example": False,
    "http://localhost@evil.example": False,
    "null": False,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_foreign_pages_may_not_call(server, gemini, origin):
    status, headers, _ = post(server, Origin=origin)
    assert (
        status == 200,
        headers.get("access-control-allow-origin") == origin,
        len(gemini.asked),
    ) == (ORIGINS[origin],) * 2 + (int(ORIGINS[origin]),)
    with UpstreamSocket(server) as line:
        status, headers, _ = line.plan(
            "OPTIONS",
            "/v1/chat/completions",
            Origin=origin,
            Access_Control_Request_Headers="authorization, x-new",
        )
    if ORIGINS[origin]:
        assert (
            status == 204
            and headers["access-control-allow-headers"] == "authorization, x-new"
            and headers["vary"] == "Origin"
        )


def test_added_origins_and_the_star(gemini):
    for added, origin, allowed in (
        (("https://chat.example",), "https://chat.example", True),
        (("https://chat.example",), "https://evil.chat.example", False),
        (("*",), "null", True),
    ):
        with serving(gemini.url, origins=added) as server:
            assert (post(server, Origin=origin)[0] == 200) is allowed


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("127.0.0.2:80", True),
        ("[::1]:5555", True),
        ("host.docker.internal", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("localhost:1:2", False),
    ],
)
def test_another_name_for_this_machine_is_refused(server, host, allowed):
    assert (post(server, Host=host)[0] == 200) is allowed


def test_the_clients_key(gemini):
    with serving(gemini.url, proxy_key="px-1") as server:
        for headers, allowed in (
            ({"Authorization": "Bearer px-1"}, True),
            ({"Authorization": "bearer  px-1"}, True),
            ({"x-api-key": "px-1"}, True),
            ({"api-key": "px-1", "Authorization": "Bearer no"}, True),
            ({"x-goog-api-key": "px-1"}, True),
            ({}, False),
            ({"Authorization": "Bearer px-2"}, False),
            ({"x-api-key": "px-11"}, False),
            ({"api-key": "PX-1"}, False),
            ({"x-api-key": "\xe9"}, False),
        ):
            reply = post(server, **headers)
            assert reply[0] == (200 if allowed else 401), headers
            assert allowed or error_of(reply)["code"] == "invalid_api_key"
        with UpstreamSocket(server) as line:
            assert line.plan("GET", "/healthz")[0] == line.plan("GET", "/")[0] == 200
            assert line.plan("OPTIONS", "/v1/models", Origin="http://localhost")[0] == 204
            assert line.plan("GET", "/v1/models")[0] == 401
    assert "px-1" not in str(gemini.headers)


def kept(message):
    """An assistant's message as most clients keep it."""
    return assistant(
        message["content"],
        tool_calls=[
            {key: made[key] for key in ("id", "type", "function")} for made in message["tool_calls"]
        ],
    )


def test_signatures_come_back_to_their_own_conversation_only(server, gemini):
    first = {}
    for who in ("Ann", "Bob"):
        gemini.say(whole(call("weather", {"city": "Oslo"}, who), call("weather", {"city": "Oslo"})))
        first[who] = json.loads(
            post(server, body=chat(user(f"I am {who}"), model=NEWEST, tools=[WEATHER]))[2]
        )["choices"][0]["message"]

    def signatures(who, message):
        results = [
            {"role": "tool", "tool_call_id": made["id"], "content": "rain"}
            for made in message["tool_calls"]
        ]
        post(
            server, body=chat(user(f"I am {who}"), message, *results, model=NEWEST, tools=[WEATHER])
        )
        return [part.get("thoughtSignature") for part in gemini.asked[-1]["contents"][1]["parts"]]

    for who in ("Ann", "Bob"):
        other_ids = kept(first[who])
        for i, made in enumerate(other_ids["tool_calls"]):
            made["id"] = f"framework-{i}"
        assert signatures(who, kept(first[who])) == signatures(who, other_ids) == [sign(who), None]
        assert signatures("Carl", other_ids) == [proxy.PLACEHOLDER, None]


def test_the_parts_of_geminis_own_search_come_back_before_the_call(server, gemini):
    """It wants them as it made them, and no client can carry them."""
    own = [
        {
            "toolCall": {
                "toolType": "GOOGLE_SEARCH_WEB",
                "args": {"queries": ["rain"]},
                "id": "t1",
            },
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
    history = [user("Search, then look.")]
    for turn in (1, 2):
        gemini.say(whole("So: ", *own, call("weather", {"city": "Oslo"}, f"turn {turn}")))
        message = json.loads(
            post(server, body=chat(*history, model=NEWEST, tools=[WEATHER], web_search_options={}))[
                2
            ]
        )["choices"][0]["message"]
        history += [
            kept(message),
            {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"},
        ]
    gemini.say(whole("Rain."), whole("Rain."))
    post(server, body=chat(*history, model=NEWEST, tools=[WEATHER], web_search_options={}))
    post(server, body=chat(*history, model=NEWEST, tools=[WEATHER]))
    for parts, between in ((gemini.asked[-2]["contents"], own), (gemini.asked[-1]["contents"], [])):
        for i, turn in ((1, 1), (3, 2)):
            *before, last = parts[i]["parts"]
            assert before == [{"text": "So: "}, *between] and last["thoughtSignature"] == sign(
                f"turn {turn}"
            )


def key_of(gemini):
    """The key that Gemini was asked with last."""
    return {name.lower(): value for name, value in gemini.headers[-1].items()}["x-goog-api-key"]


def metrics_of(server):
    """The lines of /metrics, as a dict."""
    with UpstreamSocket(server) as line:
        status, headers, body = line.plan("GET", "/metrics")
    assert status == 200 and headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [
        line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#")
    ]
    return {name.replace("proxy_to_gemini_", ""): float(value) for name, _, value in lines}


def until(true):
    """Wait for it: what is counted after an answer comes a moment after it."""
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_metrics_tell_what_happened(server, gemini, monkeypatch):
    monkeypatch.setattr(proxy.random, "uniform", lambda low, high: 0.01)
    gemini.say(
        gemini_error(503, "overloaded"),
        whole("Hello"),
        whole(call("weather", {"city": "Oslo"}, "s")),
    )
    post(server)
    message = json.loads(post(server, body=chat(model=NEWEST, tools=[WEATHER]))[2])["choices"][0][
        "message"
    ]
    lost = assistant(None, tool_calls=[tool_call("x", "clock", "{}")])
    for said in (message, kept(message), lost):
        post(
            server,
            body=chat(
                user("Hi"),
                said,
                {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "3"},
                model=NEWEST,
                tools=[WEATHER],
            ),
        )
    post(server, path="/v1/nonsense")
    count = 'requests_total{route="%s",status="%s"}'
    route = "POST /v1/chat/completions"
    until(
        lambda: (
            (
                metrics_of(server).get(count % ("other", "404")),
                metrics_of(server).get(count % (route, "200")),
            )
            == (1, 5)
        )
    )
    found = metrics_of(server)
    assert found['upstream_errors_total{status="503"}'] == found["upstream_retries_total"] == 1
    assert [
        found[f'signatures_total{{origin="{origin}"}}']
        for origin in ("client", "memory", "placeholder")
    ] == [1, 1, 1]
    assert (
        found['tokens_total{kind="prompt"}'] == 20
        and found['tokens_total{kind="output"}'] == 35
        and found['tokens_total{kind="thoughts"}'] == 10
    )
    assert (
        found[f'request_seconds_bucket{{route="{route}",le="+Inf"}}']
        == found[f'first_byte_seconds_count{{route="{route}"}}']
        == 5
    )
    assert (
        found["upstream_connections_total"] >= 1
        and found["upstream_idle_connections"] == 1
        and found["in_flight"] >= 1
    )


def test_rows_of_the_metrics_add_up():
    metrics = proxy.Metrics(["GET /x"], workers=3)
    for worker in range(3):
        metrics.take(worker)
        metrics.add("tokens_total", "prompt", amount=2)
        metrics.add("requests_total", "GET /invented", "799")
        metrics.set("in_flight", 5)
        metrics.observe("request_seconds", "GET /x", seconds=0.05 * 3**worker)
    metrics.take(1)
    page = metrics.page(proxy.Config("openai", ("", 1), "", "k")).data.decode()
    for line in (
        'tokens_total{kind="prompt"} 6',
        'requests_total{route="other",status="other"} 3',
        "in_flight 10",
        'request_seconds_bucket{route="GET /x",le="0.05"} 1',
        'request_seconds_bucket{route="GET /x",le="0.25"} 2',
        'request_seconds_count{route="GET /x"} 3',
    ):
        assert f"\nproxy_to_gemini_{line}\n" in page


def test_the_stream_of_a_response(server, gemini):
    status, headers, body = post(
        server, "/v1/responses", {"model": FLASH, "input": "Hi", "stream": True}
    )
    frames = body.decode().split("\n\n")
    assert (
        status == 200
        and headers["content-type"] == "text/event-stream; charset=utf-8"
        and frames.pop() == ""
        and "[DONE]" not in frames[-1]
    )
    events = [
        (name, json.loads(data))
        for name, data in re.findall(r"event: (.+)\ndata: (.+)", body.decode())
    ]
    assert (
        len(events) == len(frames)
        and all(name == event["type"] for name, event in events)
        and events[-1][0] == "response.completed"
    )
    gemini.say(Say(chunk("Hel"), cut=1))
    body = post(server, "/v1/responses", {"model": FLASH, "input": "Hi", "stream": True})[2]
    last = json.loads(body.decode().rstrip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"], last["response"]["error"]["code"]) == (
        "response.failed",
        "failed",
        "server_error",
    )
    gemini.say(gemini_error(429, "Slow down.", "X"))
    assert post(server, "/v1/responses", {"model": FLASH, "input": "Hi", "stream": True})[0] == 429


def test_a_response_is_kept_for_its_own_key(gemini):
    with serving(gemini.url, client_keys=True) as server, UpstreamSocket(server) as line:
        made = json.loads(
            line.plan(
                "POST",
                "/v1/responses",
                {"model": FLASH, "input": "Hi"},
                Authorization="Bearer AIza-a",
            )[2]
        )
        assert [
            line.plan("GET", f"/v1/responses/{made['id']}", Authorization=f"Bearer AIza-{who}")[0]
            for who in "ab"
        ] == [200, 404]
        assert (
            line.plan("DELETE", f"/v1/responses/{made['id']}", Authorization="Bearer AIza-b")[0]
            == 404
        )
        assert json.loads(
            line.plan("DELETE", f"/v1/responses/{made['id']}", Authorization="Bearer AIza-a")[2]
        )["deleted"]
        server.gemini.memory.database.close()


def test_clients_with_keys_of_their_own(gemini):
    with serving(gemini.url, client_keys=True, proxy_key="px-1") as server:
        assert (
            post(server, Authorization="Bearer px-1", x_api_key="AIza-a")[0] == 200
            and key_of(gemini) == "AIza-a"
        )
        assert post(server, Authorization="Bearer px-1")[0] == 401
    with (
        serving(gemini.url, api="ollama", client_keys=True) as server,
        UpstreamSocket(server) as line,
    ):
        assert error_of(post(server))["code"] == "invalid_api_key"
        assert post(server, "/api/chat", Authorization="Bearer AIza \xe9")[0] == 401
        for who in ("a", "b"):
            assert (
                line.plan(
                    "POST", "/api/chat", chat(stream=False), Authorization=f"Bearer AIza-{who}"
                )[0]
                == 200
            )
            assert key_of(gemini) == f"AIza-{who}"
        assert (
            line.plan(
                "POST",
                "/api/copy",
                {"source": FLASH, "destination": "mine"},
                Authorization="Bearer AIza-a",
            )[0]
            == 200
        )
        names = [
            [
                model["name"]
                for model in json.loads(
                    line.plan("GET", "/api/tags", Authorization=f"Bearer AIza-{who}")[2]
                )["models"]
            ]
            for who in "ab"
        ]
        assert ["mine:latest" in of_one for of_one in names] == [True, False]
        assert line.plan("GET", "/healthz")[0] == 200


def test_what_is_kept_in_a_file_outlives_the_server(gemini, tmp_path):
    state = str(tmp_path / "state.db")
    gemini.say(whole(call("weather", {"city": "Oslo"}, "s")))
    with serving(gemini.url, state=state) as server:
        message = kept(
            json.loads(post(server, body=chat(model=NEWEST, tools=[WEATHER]))[2])["choices"][0][
                "message"
            ]
        )
        server.gemini.memory.database.close()
    assert os.stat(state).st_mode & 0o077 == 0
    with serving(gemini.url, state=state) as server:
        post(
            server,
            body=chat(
                user("Hi"),
                message,
                {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "3"},
                model=NEWEST,
                tools=[WEATHER],
            ),
        )
        server.gemini.memory.database.close()
    assert gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("s")


def test_what_cannot_be_kept_is_no_success(gemini, tmp_path):
    with serving(gemini.url, api="ollama", state=str(tmp_path / "no" / "state.db")) as server:
        for stream in (False, True):
            body = post(
                server,
                "/api/create",
                {"model": "pirate", "from": FLASH, "system": "Say arr.", "stream": stream},
            )[2]
            assert b"cannot remember" in body and b"success" not in body
        assert post(server, "/api/copy", {"source": FLASH, "destination": "mine"})[0] == 503
        assert post(server, "/api/chat", chat())[0] == 200


def test_ids_of_clients_open_nothing_else(gemini):
    with serving(gemini.url, client_keys=True) as server:
        made = json.loads(
            post(
                server,
                "/v1/responses",
                {"model": NEWEST, "input": "Hi"},
                Authorization="Bearer AIza-a",
            )[2]
        )
        said = assistant(None, tool_calls=[tool_call("response:" + made["id"], "weather", "{}")])
        body = chat(
            user("Hi"),
            said,
            {"role": "tool", "tool_call_id": "response:" + made["id"], "content": "3"},
            model=NEWEST,
            tools=[WEATHER],
        )
        assert post(server, body=body, Authorization="Bearer AIza-a")[0] == 200
        assert gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == proxy.PLACEHOLDER
        assert (
            post(
                server,
                "/v1/responses",
                {"model": NEWEST, "input": "Hi", "previous_response_id": made["id"]},
                Authorization="Bearer AIza-b",
            )[0]
            == 404
        )


def test_a_log_that_nobody_reads_stops_no_answer(gemini):
    with start("-listen=127.0.0.1:0", "-upstream", gemini.url, **ENV) as process:
        with UpstreamSocket(At(port_of(process))) as line:
            assert {line.plan("GET", "/healthz" + "?" + "x" * 100)[0] for _ in range(1500)} == {
                200
            }, "the pipe holds a few hundred lines"
            assert line.plan("GET", "/" + "x" * 4000)[0] == 404


def test_headers_of_a_preflight_stay_small(server):
    with UpstreamSocket(server) as line:
        headers = line.plan(
            "OPTIONS",
            "/v1/models",
            Origin="http://localhost",
            Access_Control_Request_Headers="a, " + "x" * 60_000,
        )[1]
    assert sum(map(len, headers.values())) < 8000


def test_a_file_in_trouble_is_no_clients(gemini, tmp_path, capfd):
    (tmp_path / "state.db").write_bytes(b"this is no database" * 100)
    memory = proxy.Memory(str(tmp_path / "state.db"))
    with pytest.raises(ValueError, match="not a database"):
        memory.try_out()
    memory.put("a", None, "1")
    assert memory.get("a") is None and "not a database" in capfd.readouterr().err


def test_a_client_that_dawdles_is_hung_up_on(gemini, monkeypatch):
    monkeypatch.setattr(proxy, "CLIENT_SECONDS", 0.1)
    with serving(gemini.url) as server:
        for begun in (
            b"",
            b"GET /hea",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
        ):
            with UpstreamSocket(server) as line:
                assert line.send(begun).ended()


def test_a_second_user_at_the_same_time(server, gemini):
    def one(i, out):
        out[i] = json.loads(post(server, body=chat(user(f"user {i}")))[2])["choices"][0]["message"][
            "content"
        ]

    out = {}
    threads = [threading.Thread(target=one, args=(i, out)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(out[i].endswith(f"You said: user {i}") for i in range(20))


def test_an_ollama_server_on_the_wire(gemini):
    with serving(gemini.url, api="ollama") as server, UpstreamSocket(server) as line:
        status, headers, body = line.plan("GET", "/")
        assert (status, body, headers["content-type"]) == (
            200,
            b"Ollama is running",
            "text/plain; charset=utf-8",
        ) and line.plan("HEAD", "/")[0] == 200
        gemini.say([chunk("Straße"), whole("\u2028")])
        status, headers, body = line.plan("POST", "/api/chat", chat())
        assert (
            headers["content-type"] == "application/x-ndjson"
            and body.isascii()
            and body.endswith(b"}\n")
            and b"\n\n" not in body
        )
        assert [json.loads(line_)["done"] for line_ in body.splitlines()] == [False, False, True]
        assert line.plan("POST", "/api/chat", b"")[::2] == (
            400,
            b'{"error":"missing request body"}',
        )
        assert (
            line.plan("GET", "/api/nonsense")[::2] == (404, b"404 page not found")
            and line.plan("GET", "/api/chat")[0] == 405
        )
        assert (
            line.plan("POST", "/api/me", b"")[::2] == (401, b'{"error":"unauthorized"}')
            and line.plan("HEAD", "/api/blobs/sha256:x")[0] == 404
        )
        gemini.say(gemini_error(404, "models/gemini-9 is not found"))
        assert line.plan("POST", "/api/chat", chat(model="gemini-9"))[::2] == (
            404,
            b'{"error":"model \'gemini-9\' not found"}',
        )
        gemini.say(gemini_error(400, "API key not valid. Please pass a valid API key."))
        assert line.plan("POST", "/v1/chat/completions", chat())[0] == 403
        gemini.say(Say(chunk("Once "), SHED))
        lines = line.plan("POST", "/api/chat", chat())[2].splitlines()
        assert json.loads(lines[-1]) == {"error": "shed"} and json.loads(lines[-2])["done"] is False


def test_aliases_on_an_ollama_server_are_known_in_any_spelling(gemini):
    with serving(
        gemini.url, api="ollama", aliases=(("Qwen:latest", FLASH), ("GPT-*", NEWEST))
    ) as server:
        with UpstreamSocket(server) as line:
            assert b'"name":"qwen:latest"' in line.plan("GET", "/api/tags")[2]
        for name, model in (
            ("qwen", FLASH),
            ("Qwen:latest", FLASH),
            ("gpt-4o", NEWEST),
            ("GPT-4o:latest", NEWEST),
        ):
            gemini.say(whole("Hello"))
            assert post(server, "/api/chat", chat(model=name))[0] == 200 and gemini.paths[
                -1
            ].startswith(f"/v1beta/models/{model}:")


def test_silent_managing_beats_in_json_too(gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    pages = proxy.ModelList.pages

    def slow(self):
        self.waiter.wait(None, seconds=0.2)
        return pages(self)

    monkeypatch.setattr(proxy.ModelList, "pages", slow)
    for path, body in (
        ("/api/pull", {"model": FLASH}),
        ("/api/create", {"model": "x", "from": FLASH}),
    ):
        with serving(gemini.url, api="ollama") as server:
            lines = [
                json.loads(line)["status"] for line in post(server, path, body)[2].splitlines()
            ]
        assert len(lines) > 4 and lines[-1] == "success"


def test_a_silent_ollama_stream_beats_with_empty_chunks(gemini, monkeypatch):
    monkeypatch.setattr(proxy, "KEEP_ALIVE_SECONDS", 0.05)
    with serving(gemini.url, api="ollama") as server:
        for path, body, text in (
            ("/api/chat", chat(), lambda o: o["message"]["content"]),
            ("/api/generate", {"model": FLASH, "prompt": "x"}, lambda o: o["response"]),
        ):
            gemini.say(Say(whole("Hello"), delay=0.2))
            objects = [json.loads(line) for line in post(server, path, body)[2].splitlines()]
            assert (
                len(objects) > 3
                and [text(o) for o in objects[:2]] == ["", ""]
                and "".join(map(text, objects)) == "Hello"
            )


# ======================================================================================
# 11. Command line
# ======================================================================================

ENV = {"GEMINI_API_KEY": "AIza-1"}


def test_flags_in_both_spellings():
    config, _ = proxy.configured(
        [
            "-api=openai",
            "-listen",
            ":8080",
            "--timeout=7",
            "-alias=gpt-*=" + NEWEST,
            "-alias",
            "a=models/b",
            "-origins=x,y",
        ],
        ENV,
    )
    assert config == proxy.Config(
        "openai",
        ("", 8080),
        proxy.GEMINI,
        "AIza-1",
        (("gpt-*", NEWEST), ("a", "b")),
        ("x", "y"),
        7.0,
        "",
    )
    assert proxy.configured(
        ["-listen=[::1]:5"],
        {**ENV, "GOOGLE_GEMINI_BASE_URL": "http://h:1/", "PROXY_API_KEY": " k "},
    )[0][1:3] == (("::1", 5), "http://h:1")


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
        "-upstream=gopher://x",
        "-upstream=nonsense",
        "extra",
    ],
)
def test_a_bad_flag_is_a_usage_error(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        proxy.configured([flag], ENV)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


def test_where_the_key_comes_from(tmp_path):
    (tmp_path / "gemini_api_key").write_text("AIza-3\n")
    for env, key in (
        ({"GEMINI_API_KEY": " AIza-1\n", "GOOGLE_API_KEY": "AIza-2"}, "AIza-1"),
        ({"GEMINI_API_KEY": "", "GOOGLE_API_KEY": "AIza-2"}, "AIza-2"),
        ({"CREDENTIALS_DIRECTORY": str(tmp_path)}, "AIza-3"),
    ):
        assert proxy.configured([], env)[0].key == key
    for env in ({}, {"GEMINI_API_KEY": " ", "CREDENTIALS_DIRECTORY": "/nonexistent"}):
        with pytest.raises(SystemExit, match="aistudio.google.com"):
            proxy.configured([], env)
    with pytest.raises(SystemExit, match="GEMINI_API_KEY") as caught:
        proxy.configured([], {"GEMINI_API_KEY": "AIza\r\nX: y"})
    assert "AIza" not in str(caught.value)


@contextlib.contextmanager
def started(*command, **how):
    """A process, which does not outlive the test."""
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **how,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def start(*arguments, **env):
    return started(
        HERE / "proxy_to_gemini.py",
        *arguments,
        env={**{key: value for key, value in os.environ.items() if "KEY" not in key}, **env},
    )


def test_the_program_starts_says_where_it_is_and_ends(gemini):
    with start("-listen=127.0.0.1:0", "-upstream", gemini.url, **ENV) as process:
        first = process.stdout.readline()
        port = int(re.search(r"127\.0\.0\.1:(\d+)", first).group(1))
        assert "openai" in first and "AIza" not in first
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
        assert "Hello" in connection.getresponse().read().decode()
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0 and "Traceback" not in process.stdout.read()


@contextlib.contextmanager
def systemd(tmp_path):
    """Where systemd would listen for what it is told: (the socket's name, a function that waits for a word)."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.settimeout(10)

        def hears(word):
            while word not in sock.recv(4096).decode().split("\n"):
                pass

        yield name, hears


def port_of(process):
    return int(re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline()).group(1))


class At:
    """A server in another process, for UpstreamSocket and post."""

    def __init__(self, port):
        self.server_port = port


@pytest.mark.parametrize("workers", [1, 2])
def test_its_life_under_systemd(gemini, tmp_path, workers):
    with systemd(tmp_path) as (name, hears), socket.create_server(("127.0.0.1", 0)) as listener:
        (tmp_path / "gemini_api_key").write_text("AIza-old")
        code = "import os, sys; os.dup2(%d, 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        flags = [f"-workers={workers}", "-listen=127.0.0.1:1", "-upstream=" + gemini.url]
        env = {
            "NOTIFY_SOCKET": name,
            "WATCHDOG_USEC": "400000",
            "CREDENTIALS_DIRECTORY": str(tmp_path),
            "STATE_DIRECTORY": str(tmp_path),
        }
        with started(
            "-c",
            code % listener.fileno(),
            HERE / "proxy_to_gemini.py",
            *flags,
            pass_fds=[listener.fileno()],
            env=env,
        ) as process:
            hears("READY=1")
            hears("WATCHDOG=1")
            server = At(listener.getsockname()[1])
            assert (
                post(server)[0] == 200
                and key_of(gemini) == "AIza-old"
                and (tmp_path / "proxy-to-gemini.db").exists()
            )
            (tmp_path / "gemini_api_key").write_text("AIza-new")
            process.send_signal(signal.SIGHUP)
            until(lambda: post(server)[0] == 200 and key_of(gemini) == "AIza-new")
            gemini.say(Say(chunk("Once "), whole("upon"), gap=0.3))
            with UpstreamSocket(server) as line, UpstreamSocket(server) as idle:
                assert idle.plan("GET", "/healthz")[0] == 200
                data = json.dumps(chat(stream=True)).encode()
                line.send(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                    % (len(data), data)
                )
                assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
                process.send_signal(signal.SIGTERM)
                hears("STOPPING=1")
                assert idle.ended() and line.file.read().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert process.wait(10) == 0 and "Traceback" not in process.stdout.read()


def test_a_stream_that_would_take_too_long_is_told_of_the_end(gemini, monkeypatch):
    monkeypatch.setattr(proxy, "DRAIN_SECONDS", 0.1)
    gemini.say(Say(chunk("Once "), whole("upon"), gap=30))
    server = proxy.Server(proxy.Config("openai", ("127.0.0.1", 0), gemini.url, "the-key"))

    class Signals:
        pipe, wake = os.pipe()
        poll_seconds, ended = 0.01, False
        drain_pipe = asks = tell = lambda *_: None
        over = lambda self: self.ended

    signals = Signals()
    thread = threading.Thread(target=server.run, args=(signals,))
    thread.start()
    with (
        UpstreamSocket(server) as line,
        UpstreamSocket(server) as new,
        UpstreamSocket(server) as old,
        UpstreamSocket(server) as idle,
    ):
        data = json.dumps(chat(stream=True)).encode()
        line.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
            % (len(data), data)
        )
        assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
        assert all("connection" not in one.plan("GET", "/healthz")[1] for one in (old, idle))
        signals.ended = True
        until(lambda: server.draining)
        assert new.plan("GET", "/healthz")[::2] == (503, b"ending"), (
            "who had come is served, and told"
        )
        status, headers, _ = old.plan("POST", "/v1/chat/completions", chat())
        assert (status, headers["connection"]) == (200, "close") and old.ended(), (
            "no request is lost to a connection that is just closed"
        )
        assert post(server)[0] == 200, "who comes before balancers have noticed is served"
        assert idle.ended()
        rest = line.file.read()
        assert (
            b"Once " in rest
            and b"shutting down" in rest
            and rest.endswith(b"\r\n0\r\n\r\n")
            and b"[DONE]" not in rest
        )
    thread.join(5)
    server.gemini.pool.close()
    for end in (signals.pipe, signals.wake, server.ending, server.stopping):
        os.close(end)
    assert not thread.is_alive()


def children_of(pid):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout.split()
    return {int(child) for child in found if str(child) != str(os.getpid())}


def listens(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_an_end_comes_also_when_clients_come_back_at_once(gemini):
    with start("-listen=127.0.0.1:0", "-upstream", gemini.url, **ENV) as process:
        server, over = At(port_of(process)), threading.Event()

        def client():
            while not over.is_set():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    post(server, "/v1/nonsense")

        clients = [threading.Thread(target=client) for _ in range(12)]
        for thread in clients:
            thread.start()
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == 0
        finally:
            over.set()
            for thread in clients:
                thread.join(5)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="looks at processes as Linux shows them"
)
def test_a_replaced_worker_has_the_key_that_was_read_again(gemini, tmp_path):
    (tmp_path / "gemini_api_key").write_text("AIza-old")
    with start(
        "-listen=127.0.0.1:0",
        "-workers=2",
        "-upstream",
        gemini.url,
        CREDENTIALS_DIRECTORY=str(tmp_path),
    ) as process:
        server = At(port_of(process))
        until(lambda: len(children_of(process.pid)) == 2)
        (tmp_path / "gemini_api_key").write_text("AIza-new")
        process.send_signal(signal.SIGHUP)
        until(lambda: post(server)[0] == 200 and key_of(gemini) == "AIza-new")
        before = children_of(process.pid)
        for child in before:
            os.kill(child, signal.SIGKILL)
        until(lambda: len(children_of(process.pid) - before) == 2)
        assert post(server)[0] == 200 and key_of(gemini) == "AIza-new"


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="looks at processes as Linux shows them"
)
def test_workers_share_what_they_know_and_are_replaced(gemini):
    with start("-listen=127.0.0.1:0", "-workers=2", "-upstream", gemini.url, **ENV) as process:
        server = At(port_of(process))
        until(lambda: len(children_of(process.pid)) == 2)
        before = children_of(process.pid)
        for i in range(6):
            message = kept(
                json.loads(post(server, body=chat(user(f"{i}"), model=NEWEST, tools=[WEATHER]))[2])[
                    "choices"
                ][0]["message"]
            )
            post(
                server,
                body=chat(
                    user(f"{i}"),
                    message,
                    {
                        "role": "tool",
                        "tool_call_id": message["tool_calls"][0]["id"],
                        "content": "3",
                    },
                    model=NEWEST,
                    tools=[WEATHER],
                ),
            )
            assert gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign(
                "stand-in"
            )
        answered = lambda: metrics_of(server).get(
            'requests_total{route="POST /v1/chat/completions",status="200"}'
        )
        until(lambda: answered() == 12)
        victim = before.pop()
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(children_of(process.pid) - {victim}) == 2)
        assert post(server)[0] == 200
        until(lambda: answered() == 13)
        gemini.say(Say(chunk("Once "), whole("upon"), gap=1.0))
        with UpstreamSocket(server) as line:
            data = json.dumps(chat(stream=True)).encode()
            line.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                % (len(data), data)
            )
            assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
            process.send_signal(signal.SIGTERM)
            until(lambda: not listens(server.server_port))
            assert process.poll() is None, (
                "nobody waits in the queue of a socket that no worker will look at"
            )
            assert line.file.read().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert process.wait(10) == 0 and "Traceback" not in process.stdout.read()


def test_the_unit_is_for_this_file_and_these_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        proxy.configured(["-api=ollama", "--print-unit", "-alias=a b=$c%d"], ENV)
    said = capsys.readouterr().out
    assert (
        not caught.value.code
        and f'{HERE / "proxy_to_gemini.py"} -api=ollama "-alias=a b=$$c%%d"' in said
        and "AIza" not in said
    )
    assert {
        "DynamicUser=yes",
        "LoadCredential=gemini_api_key:/etc/proxy-to-gemini/gemini_api_key",
        "Type=notify",
    } <= set(said.splitlines())


def test_a_unit_for_clients_with_keys_of_their_own_wants_none():
    assert "LoadCredential" in proxy.unit(["-api=ollama"]) and "gemini_api_key" not in proxy.unit(
        ["--client-keys"]
    )
    assert "\nEnvironmentFile=-/etc/proxy-to-gemini/environment\n" in proxy.unit(["-client-keys"])


def test_workers_without_a_place_for_what_they_share(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    monkeypatch.setattr(sys, "argv", ["proxy_to_gemini.py", "-workers=2", "-listen=127.0.0.1:0"])
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-1")
    with pytest.raises(SystemExit, match="-state"):
        proxy.main()


def make(*words):
    return subprocess.run(
        ["make", "-s", *words, "PYTHON=" + sys.executable],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_program_starts_from_any_folder_and_under_any_name(tmp_path):
    """It starts wherever it lies and whatever it is called, and the folder it is called from has no say."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    (tmp_path / "link").symlink_to(HERE / "proxy_to_gemini.py")
    elsewhere = tmp_path / "else where's {x}"
    elsewhere.mkdir()
    (elsewhere / "odd-name").write_bytes((HERE / "proxy_to_gemini.py").read_bytes())
    for command in (
        [HERE / "proxy_to_gemini.py"],
        ["-I", HERE / "proxy_to_gemini.py"],
        [tmp_path / "else where's {x}" / "odd-name"],
    ):
        with started(*command, "-version", cwd=tmp_path) as process:
            assert "SHA-256" in process.stdout.read() and process.wait(10) == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_installs_and_takes_it_away_again(tmp_path):
    where = ["DESTDIR=" + str(tmp_path), "PREFIX=/opt/x"]
    said = make("install", *where, "FLAGS=-api=ollama '-alias=a b=c'")
    assert "/etc/proxy-to-gemini/gemini_api_key" in said and "systemctl" in said
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    home = "opt/x/lib/proxy-to-gemini/"
    assert files == {
        home + "proxy_to_gemini.py",
        home + "README.md",
        home + "LICENSE",
        "opt/x/bin/proxy-to-gemini",
        "etc/systemd/system/proxy-to-gemini.service",
    }
    text = (tmp_path / "etc/systemd/system/proxy-to-gemini.service").read_text()
    assert (
        '/opt/x/lib/proxy-to-gemini/proxy_to_gemini.py -api=ollama "-alias=a b=c"' in text
        and str(tmp_path) not in text
    )
    assert "Documentation=file:///opt/x/lib/proxy-to-gemini/README.md" in text
    command = tmp_path / "opt/x/bin/proxy-to-gemini"
    assert (
        os.access(command, os.X_OK)
        and command.resolve().read_bytes() == (HERE / "proxy_to_gemini.py").read_bytes()
    )
    make("uninstall", *where)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [] and not (
        tmp_path / home
    ).exists()


def test_the_checks_tell_what_to_mend(gemini, capsys, tmp_path):
    config = proxy.Config("openai", ("127.0.0.1", 0), gemini.url, "the-key")
    assert proxy.check(config) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines()] == [
        "port:",
        "memory:",
        "name:",
        "connection:",
        "key:",
        "clock:",
        "answer:",
    ]
    assert "gemini-3.8-flash said 'Hello from the stand-in" in said and "the-key" not in said
    with socket.create_server(("127.0.0.1", 0)) as other:
        for failure, words in (
            (config._replace(listen=other.getsockname()), "in use"),
            (config._replace(upstream="http://127.0.0.1:1"), "refused"),
            (config._replace(state=str(tmp_path / "no" / "file")), "No such file"),
            (config._replace(upstream="http://nowhere.invalid"), "FAIL  name"),
        ):
            assert proxy.check(failure) == 1
            last, mend = capsys.readouterr().out.splitlines()[-2:]
            assert last.startswith("FAIL") and words in last and mend.startswith("      mend: ")


def test_errands():
    with start("-version") as process:
        assert (
            hashlib.sha256((HERE / "proxy_to_gemini.py").read_bytes()).hexdigest()
            in process.stdout.read()
            and process.wait(5) == 0
        )
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        start(f"-listen=127.0.0.1:{other.getsockname()[1]}", **ENV) as process,
    ):
        said = process.stdout.read()
        assert process.wait(5) == 1 and "in use" in said and len(said.splitlines()) == 1


# ======================================================================================
# The file itself
# ======================================================================================

SOURCE = (HERE / "proxy_to_gemini.py").read_text()
README = (HERE / "README.md").read_text()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+\n# (\d+)\. ([^:]+): (.+)\n# =+$", re.M)


def test_the_docstrings_map_is_true():
    banners = [(number, name, words) for number, name, words in BANNER.findall(SOURCE)]
    assert (
        re.findall(r"^    (\d+)\. (\S.*?)  +(.+)$", ast.get_docstring(TREE, clean=False), re.M)
        == banners
    )


def section_of(line):
    return max(
        (
            int(match[1])
            for match in BANNER.finditer(SOURCE)
            if SOURCE.count("\n", 0, match.start()) < line
        ),
        default=0,
    )


def test_the_pure_sections_are_pure():
    """Sections 1 to 8 know no socket, clock, randomness, environment or log."""
    impure = {
        "socket",
        "select",
        "ssl",
        "os",
        "sys",
        "time",
        "random",
        "secrets",
        "threading",
        "signal",
        "log",
        "open",
        "print",
        "input",
        "sqlite3",
        "http",
        "socketserver",
        "subprocess",
        "tempfile",
    }
    for node in ast.walk(TREE):
        if isinstance(node, ast.Name) and node.id in impure and 1 <= section_of(node.lineno) <= 8:
            assert (
                (node.id, ast.get_source_segment(SOURCE, node))
                and f"{node.id}" == "sys"
                and "byteorder" in SOURCE.splitlines()[node.lineno - 1]
            ), node.lineno
        if isinstance(node, ast.Attribute) and 1 <= section_of(node.lineno) <= 8:
            assert not (
                node.attr == "request"
                and isinstance(node.value, ast.Name)
                and node.value.id == "urllib"
            ), node.lineno


def test_only_the_standard_library_is_imported():
    names = {
        alias.name
        for node in ast.walk(TREE)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    known = getattr(sys, "stdlib_module_names", None)
    assert known is None or {name.partition(".")[0] for name in names} <= set(known)


def test_the_file_is_python_3_9():
    ast.parse(SOURCE, feature_version=(3, 9))
    for node in ast.walk(TREE):
        assert not isinstance(node, getattr(ast, "Match", ())), node.lineno
    evaluated = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.BitOr)
        and any(
            isinstance(side, ast.Constant) and side.value is None
            for side in (node.left, node.right)
        )
    ]
    annotations = {
        id(inner)
        for node in ast.walk(TREE)
        for field in ("annotation", "returns")
        if getattr(node, field, None) is not None
        for inner in ast.walk(getattr(node, field))
    }
    assert all(id(node) in annotations for node in evaluated)


def depth(node, level=0):
    inside = isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and not (
        isinstance(node, ast.If) and getattr(node, "is_elif", False)
    )
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and child in node.orelse
            and len(node.orelse) == 1
        ):
            child.is_elif = True
    return max(
        [level + inside] + [depth(child, level + inside) for child in ast.iter_child_nodes(node)]
    )


def test_functions_fit_on_a_screen():
    lengths = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef):
            lengths.append(node.end_lineno - node.lineno + 1)
            assert lengths[-1] <= 80, f"{node.name} has {lengths[-1]} lines"
            assert depth(node) <= 4, f"{node.name} is nested {depth(node)} deep"
    assert sorted(lengths)[int(len(lengths) * 0.9)] <= 25


def test_lines_are_not_too_long():
    assert [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 140] == []


def readme_table(heading):
    """The rows of the first table under a heading, as lists of cells."""
    rows = (
        re.search(rf"^#+ {re.escape(heading)}\n(?:(?!#).*\n)*?((?:\|.*\n)+)", README, re.M)
        .group(1)
        .splitlines()
    )
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_readmes_routes_are_the_programs():
    told = {
        (api, *cell.strip("`").split(" ", 1))
        for route, apis, *_ in readme_table("Routes")
        for cell in route.split(", ")
        for api in apis.split(", ")
    }
    own = {(api, "GET", path) for api in proxy.MOUNTS for path in ("/", "/healthz", "/metrics")}
    mounted = {
        (api, route.method, route.path)
        for api, mounts in proxy.MOUNTS.items()
        for _, protocol in mounts
        for route in protocol.routes
    }
    assert told == mounted | own


def words_in(cells):
    """What stands in backquotes there."""
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_the_readme_names_every_flag_and_all_of_the_environment():
    flags = {action.option_strings[0] for action in proxy.flag_parser()._actions} - {"-h"}
    assert {name.strip("`") for name, *_ in readme_table("Flags and environment")} == flags
    names = words_in(
        re.findall(r"^\|(.+?)\|", README.partition("| environment |")[2].partition("\n\n")[0], re.M)
    )
    read = {
        node.value
        for node in ast.walk(TREE)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and section_of(node.lineno) >= 7
        and re.fullmatch(r"[A-Z]+(_[A-Z]+)+", node.value)
    }
    assert read <= {name.strip("$") for name in names}


def test_the_readme_names_every_metric():
    told = {
        name.strip("`"): (kind, tuple(re.findall(r"\w+", labels)))
        for name, kind, labels, _ in readme_table("Metrics")
    }
    assert told == {name: (family.kind, family.labels) for name, family in proxy.FAMILIES.items()}


def test_the_readmes_limits_are_the_programs():
    told = {what: f"{limit}, {then}" for what, limit, then in readme_table("Limits")}
    mib, kib = (lambda number: f"{number >> 20} MiB"), (lambda number: f"{number >> 10} KiB")
    for words, facts in (
        ("body of a request", [mib(proxy.MAX_BODY_BYTES)]),
        ("body in gzip", [mib(proxy.MAX_UNPACKED_BYTES)]),
        ("request line", [kib(proxy.MAX_HEAD_BYTES)]),
        ("headers of an answer", [f"{proxy.MAX_IGNORED_CHARACTERS} characters"]),
        ("a client's silence", [f"{proxy.CLIENT_SECONDS:g} s"]),
        ("a whole request", [f"{proxy.CLIENT_SECONDS:g} s", f"{proxy.BODY_SECONDS:g} s"]),
        ("connections of clients", [f"{proxy.MAX_CONNECTIONS:,}"]),
        (
            "connections to Gemini",
            [f"{proxy.MAX_IDLE_CONNECTIONS} unused", f"{proxy.IDLE_CONNECTION_SECONDS:g} s"],
        ),
        ("a connection to Gemini", [f"{proxy.CONNECT_SECONDS:g} s"]),
        (
            "Gemini's silence",
            [
                f"{proxy.configured([], ENV)[0].timeout:g} s",
                f"every {proxy.KEEP_ALIVE_SECONDS:g} s",
            ],
        ),
        (
            "tries",
            [
                f"{proxy.MAX_ATTEMPTS}, ",
                f"{proxy.MAX_BACKOFF_SECONDS:g} s",
                f"{proxy.RETRY_WINDOW_SECONDS:g} s",
            ],
        ),
        ("memory", [f"{proxy.Memory.ROWS:,} rows", mib(proxy.Memory.SIZE)]),
        ("answers under way", [f"{proxy.DRAIN_NOTICE_SECONDS + proxy.DRAIN_SECONDS:.0f} s"]),
    ):
        (row,) = [row for what, row in told.items() if what.startswith(words)]
        assert all(fact in row for fact in facts), (words, facts, row)
    assert len(told) == 13


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


def test_the_readmes_parameters_are_treated_as_it_says():
    table = {
        name.strip("`"): kind
        for names, kind, *_ in readme_table("Parameters of chat completions")
        for name in names.split(", ")
    }
    assert set(table) == set(SAMPLES)
    for name, kind in table.items():
        more = {
            "audio": {"modalities": ["text", "audio"]},
            "function_call": {"functions": [WEATHER["function"]]},
        }.get(name, {})
        ignored = asked({**chat(), **more, name: SAMPLES[name]})[1]
        assert (name in ignored) is (kind == "ignored"), (name, ignored)


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


def test_the_readmes_other_parameters_are_treated_as_it_says():
    table = {
        endpoint.strip("`"): [
            re.findall("`([^`]+)`", re.sub(r"\([^)]*\)", "", names)) for names in kinds
        ]
        for endpoint, *kinds in readme_table("Parameters of the smaller endpoints")
    }
    assert set(table) == set(MEDIA_SAMPLES)
    for name, (heeded, ignored) in table.items():
        needs, more = MEDIA_SAMPLES[name]
        route = next(route for route in proxy.OPENAI.routes if route.path == "/v1/" + name)
        assert sorted(heeded + ignored) == sorted({*needs, *more})
        told = {
            key: asked({**needs, key: {**needs, **more}[key]}, route.request)[1]
            for key in heeded + ignored
        }
        always = asked(needs, route.request)[1]
        assert {key: key in names and key not in always for key, names in told.items()} == {
            **dict.fromkeys(heeded, False),
            **dict.fromkeys(ignored, True),
        }


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
}


def test_the_readmes_parameters_of_responses_are_treated_as_it_says():
    table = {
        name.strip("`"): kind
        for names, kind, *_ in readme_table("Parameters of responses")
        for name in names.split(", ")
    }
    assert set(table) == set(RESPONSE_SAMPLES)
    id = RESPONSE_SAMPLES["previous_response_id"]
    response = json.dumps({"output": [], "previous_response_id": None})
    context = Context(stored={f"input:{id}": "[]", f"response:{id}": response})
    for name, kind in table.items():
        ignored = asked(
            {"model": FLASH, "input": "Hi", name: RESPONSE_SAMPLES[name]},
            proxy.openai_responses_request,
            context,
        )[1]
        assert (name in ignored) is (kind == "ignored"), (name, ignored)


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
    "context": [1],
}


def test_the_readmes_ollama_parameters_are_treated_as_it_says():
    table = {
        name.strip("`"): kind
        for names, kind, *_ in readme_table("Parameters of Ollama's chat and generate")
        for name in names.split(", ")
    }
    assert set(table) == set(OLLAMA_SAMPLES)
    for name, kind in table.items():
        generate = name in ("prompt", "suffix", "system", "raw", "images", "template", "context")
        key, _, inner_key = name.partition(".")
        body = {
            **({"model": FLASH, "prompt": "x"} if generate else chat()),
            key: {inner_key: OLLAMA_SAMPLES[name]} if inner_key else OLLAMA_SAMPLES[name],
        }
        ignored = asked(
            body, proxy.ollama_generate_request if generate else proxy.ollama_chat_request, OLLAMA
        )[1]
        assert (name in ignored) is (kind == "ignored"), (name, ignored)


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
    "mcp_servers": [{}],
    "thread": {"type": "create"},
}


def test_the_readmes_parameters_of_messages_are_treated_as_it_says():
    table = {
        name.strip("`"): kind
        for names, kind, *_ in readme_table("Parameters of Anthropic's messages")
        for name in names.split(", ")
    }
    assert set(table) == set(CLAUDE_SAMPLES)
    for name, kind in table.items():
        key, _, inner_key = name.partition(".")
        more = {"tools": [ASK_CITY]} if name == "tool_choice" else {}
        body = {
            **said_to_claude(),
            **more,
            key: {inner_key: CLAUDE_SAMPLES[name]} if inner_key else CLAUDE_SAMPLES[name],
        }
        assert (name in asked(body, proxy.anthropic_messages_request, CLAUDE)[1]) is (
            kind == "ignored"
        ), name


# ======================================================================================
# The official libraries
# ======================================================================================


def test_ollamas_own_library(gemini):
    ollama_library = pytest.importorskip("ollama")
    with serving(gemini.url, api="ollama") as server:
        client = ollama_library.Client(host=server.url)
        assert (
            FLASH + ":latest" in [model.model for model in client.list().models]
            and "tools" in client.show(FLASH).capabilities
        )
        history = [user("Hi")]
        first = client.chat(model=NEWEST, messages=history, tools=[WEATHER])
        history += [first.message, {"role": "tool", "content": '{"temp": 3}'}]
        text = "".join(
            part.message.content
            for part in client.chat(model=NEWEST, messages=history, tools=[WEATHER], stream=True)
        )
        assert text == 'The function said: {"temp": 3}' and gemini.asked[-1]["contents"][1][
            "parts"
        ][0]["thoughtSignature"] == sign("stand-in")
        assert client.embed(model=EMBEDDER, input=["a"]).embeddings[0] == pytest.approx([0.6, 0.8])
        with pytest.raises(ollama_library.ResponseError, match="not found"):
            client.show("gemini-9")
        client._client.close()


def test_anthropics_own_library(gemini):
    anthropic = pytest.importorskip("anthropic")
    with (
        serving(gemini.url, api="ollama", aliases=(("claude-*", NEWEST),)) as server,
        anthropic.Anthropic(
            base_url=server.url, api_key="any", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        plan = {"model": "claude-opus-5", "max_tokens": 2000, "tools": [ASK_CITY]}
        history = [user("Hi")]
        with client.messages.stream(
            messages=history, thinking={"type": "adaptive"}, **plan
        ) as stream:
            message = stream.get_final_message()
        assert [block.type for block in message.content] == [
            "thinking",
            "tool_use",
        ] and message.stop_reason == "tool_use"
        history += [
            {"role": "assistant", "content": message.content},
            user([used(message.content[1].id, '{"temp": 3}')]),
        ]
        assert (
            client.messages.create(messages=history, **plan).content[0].text
            == 'The function said: {"temp": 3}'
        )
        assert gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign("stand-in")
        assert (
            client.messages.count_tokens(
                model=plan["model"], messages=history, tools=plan["tools"]
            ).input_tokens
            == 7
        )
        gemini.say(gemini_error(429, "Slow down.", "X", detail("RetryInfo", retryDelay="9s")))
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(messages=[user("Hi")], **plan)
        assert caught.value.request_id == caught.value.body["request_id"]


def test_openais_own_library_and_responses(server, gemini):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        with client.responses.stream(
            model=NEWEST, input="Hi", tools=[FLAT], include=["reasoning.encrypted_content"]
        ) as stream:
            first = stream.get_final_response()
        made = next(item for item in first.output if item.type == "function_call")
        result = {"type": "function_call_output", "call_id": made.call_id, "output": '{"temp": 3}'}
        for more in (
            {"previous_response_id": first.id, "input": [result]},
            {"input": [user("Hi"), *(item.model_dump() for item in first.output), result]},
        ):
            assert (
                client.responses.create(model=NEWEST, tools=[FLAT], **more).output_text
                == 'The function said: {"temp": 3}'
            )
            assert gemini.asked[-1]["contents"][1]["parts"][0]["thoughtSignature"] == sign(
                "stand-in"
            )
        assert [item.id for item in client.responses.retrieve(first.id).output] == [
            item.id for item in first.output
        ]
        assert client.responses.input_items.list(first.id).data[0].content[0].text == "Hi"
        assert client.responses.input_tokens.count(model=FLASH, input="Hi").input_tokens == 7
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        gemini.say(Say(chunk("Hel"), cut=1))
        assert [
            event.type for event in client.responses.create(model=FLASH, input="Hi", stream=True)
        ][-1] == "response.failed"


def test_openais_own_library(server, gemini):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        assert (
            "You said: Hi"
            in client.chat.completions.create(model=FLASH, messages=[user("Hi")])
            .choices[0]
            .message.content
        )
        with client.chat.completions.stream(
            model=NEWEST, messages=[user("Hi")], tools=[WEATHER]
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.tool_calls[0].function.name == "weather"
        history = [
            user("Hi"),
            kept(message.model_dump()),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"temp": 3}'},
        ]
        text = "".join(
            choice.delta.content or ""
            for event in client.chat.completions.create(
                model=NEWEST, messages=history, tools=[WEATHER], stream=True
            )
            for choice in event.choices
        )
        assert text == 'The function said: {"temp": 3}' and gemini.asked[-1]["contents"][1][
            "parts"
        ][0]["thoughtSignature"] == sign("stand-in")
        gemini.say(gemini_error(429, "Slow down.", "X", detail("RetryInfo", retryDelay="9s")))
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=FLASH, messages=[user("Hi")], stream=True)
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="any"
    ) as client:  # its type of a vector knows no base64
        assert client.embeddings.create(model=EMBEDDER, input=["a", "b"]).data[
            1
        ].embedding == pytest.approx([0.6, 0.8])
        assert FLASH in [model.id for model in client.models.list()]


def test_openais_own_library_and_media(server, gemini):
    openai = pytest.importorskip("openai")
    recording = ("a.wav", RIFF)
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        gemini.say(*[whole(blob("image/png", PNG))] * 2)
        assert (
            client.images.generate(
                model="gpt-image-1", prompt="A dot", size="1536x1024", output_format="png"
            )
            .data[0]
            .b64_json
            == PNG
        )
        assert [
            event.b64_json
            for event in client.images.generate(
                model="gpt-image-1", prompt="A dot", stream=True, partial_images=1
            )
        ] == [PNG]
        gemini.say(whole(SOUND), [chunk(SOUND), whole(SOUND)])
        assert client.audio.speech.create(model="tts-1", voice="alloy", input="Hi").content == RIFF
        with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="alloy", input="Hi", response_format="pcm"
        ) as audio:
            assert b"".join(audio.iter_bytes()) == SAMPLES_OF_SOUND * 2
        gemini.say(whole("Hei."), [chunk("He"), whole("i.")], whole(TIMED), whole(TIMED))
        assert (
            client.audio.transcriptions.create(
                model="whisper-1", file=recording, language="no", temperature=0
            ).text
            == "Hei."
        )
        events = list(
            client.audio.transcriptions.create(
                model="gpt-4o-transcribe", file=recording, stream=True
            )
        )
        assert [event.type for event in events] == ["transcript.text.delta"] * 2 + [
            "transcript.text.done"
        ] and events[-1].text == "Hei."
        assert client.audio.transcriptions.create(
            model="whisper-1", file=recording, response_format="srt"
        ).startswith("1\n00:00:01,500 --> ")
        assert (
            client.audio.transcriptions.create(
                model="gpt-4o-transcribe-diarize", file=recording, response_format="diarized_json"
            )
            .segments[1]
            .speaker
            == "B"
        )
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="any"
    ) as client:  # its types want what Gemini does not tell
        gemini.say(whole(TIMED), [chunk(" up"), whole("on")])
        verbose = client.audio.transcriptions.create(
            model="whisper-1",
            file=recording,
            response_format="verbose_json",
            timestamp_granularities=["segment"],
        )
        assert (verbose.duration, verbose.segments[0].text, verbose.language) == (
            3661.25,
            "Hello --> there.",
            "english",
        )
        chunks = client.completions.create(model=FLASH, prompt="Once", stream=True)
        assert "".join(choice.text for part in chunks for choice in part.choices) == " upon"
