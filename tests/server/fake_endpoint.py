"""An OpenAI endpoint that answers as it is told, in a thread of its own, for what a client makes of it."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterable

CUT = "cut the connection"
Script = Iterable[bytes | float | str]


def chunk(text: str | None = None, **more) -> bytes:
    """An event with a piece of the answer. more: beside content in the delta, or `usage`, `finish_reason`."""
    usage, finish = more.pop("usage", None), more.pop("finish_reason", None)
    delta = more | ({} if text is None else {"content": text})
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return data(body | ({"usage": usage} if usage else {}))


def data(body) -> bytes:
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


def usage(prompt: int, completion: int, cached: int | None = None) -> dict:
    found = {"prompt_tokens": prompt, "completion_tokens": completion}
    return found if cached is None else found | {"prompt_tokens_details": {"cached_tokens": cached}}


DONE = data("[DONE]")
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
PLAIN = [STREAM, chunk("one"), chunk(" two", finish_reason="stop"), data({"choices": [], "usage": usage(9, 2)}), DONE]


def words_in(body: dict) -> int:
    return sum(len(message["content"].split()) for message in body["messages"])


def respond(status: str, body: str = "", head: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{head}\r\n{body}".encode()


class FakeEndpoint:
    """answer: for the body of a chat request, the bytes to write, seconds to wait between them, or CUT. bodies, heads:
    of the chat requests so far; most: requests at once, at most; metrics: what /metrics says, one text after the other.
    """

    def __init__(self, answer: Callable[[dict], Script] = lambda body: PLAIN):
        self.answer = answer
        self.bodies: list[dict] = []
        self.heads: list[str] = []
        self.metrics: list[str] = []
        self.most = self._running = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FakeEndpoint":
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error) -> None:
        async def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if head.startswith("GET /v1/models "):
                writer.write(respond("200 OK", '{"data": [{"id": "fake"}]}'))
            elif head.startswith("GET /metrics "):
                writer.write(respond("200 OK", self.metrics.pop(0)) if self.metrics else respond("404 Not Found"))
            else:
                size = int(head.lower().partition("content-length:")[2].split()[0])
                self.heads.append(head)
                self.bodies.append(json.loads(await reader.readexactly(size)))
                for step in self.answer(self.bodies[-1]):
                    if step == CUT:
                        writer.transport.abort()
                        return
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                    else:
                        writer.write(step)
                        await writer.drain()
            # Counted before the client can see the end and ask again.
            self._running -= 1
            writer.write_eof()
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
