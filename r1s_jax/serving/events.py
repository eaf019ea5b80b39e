"""Server-sent events to clients that may disconnect or stop reading at any moment."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_WRITE_S = 30.0  # a client that reads nothing for so long counts as gone


class EventStream(Response):
    """Sends events as they come; calls `leave` at the end, whatever ends the stream."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], leave: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:
            raise ConnectionError("the client stopped reading") from None
        finally:
            sending.cancel()
            gone.cancel()
            self._leave()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._events) as events:
            async for event in events:
                body = {"type": "http.response.body", "body": event, "more_body": True}
                await asyncio.wait_for(send(body), _WRITE_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
