"""Routes of our own on vLLM's server: the handshake, the receipts and what was captured."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Header, HTTPException, Request, Response
from starlette.datastructures import State

from workbench.engines.vllm import access
from workbench.engines.vllm.capture.stream import UNFINISHED
from workbench.engines.vllm.paths import CAPTURES, HELLO, RECEIPTS
from workbench.settings import package_version

__all__ = ["WorkbenchEndpoints"]


class WorkbenchEndpoints:
    """Entry point `vllm.endpoint_plugins`."""

    name = "workbench_endpoints"
    required_tasks = None

    def __init__(self) -> None:
        self.engine: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""

        @app.get(HELLO)
        async def hello(authorization: str = Header("")) -> dict[str, Any]:
            """Who serves: asked of a worker, so the answer proves that the plugin is in it."""
            _admit(authorization)
            workers = await self._workers("workbench_hello")
            return {
                "base": os.environ.get("WORKBENCH_BASE", ""),
                "workbench": package_version("steering-workbench"),
                "workers": workers,
            }

        @app.get(RECEIPTS + "/{receipt}")
        async def receipt(receipt: str, authorization: str = Header("")) -> dict[str, Any]:
            """What was steered of the requests sent under this id; a receipt is taken once."""
            _admit(authorization)
            return (await self._workers("workbench_receipt", receipt))[0]

        @app.get(CAPTURES + "/{names}")
        async def captures(
            names: str, request: Request, authorization: str = Header("")
        ) -> Response:
            """Activations captured under ids joined by commas, as safetensors; taken once."""
            _admit(authorization)
            asked = list(dict.fromkeys(names.split(",")))
            unfinished = getattr(request.state, UNFINISHED, {})
            if busy := next((name for name in asked if name in unfinished), ""):
                words = "its reply is still being written; fetch when it has come."
                raise HTTPException(404, f"The capture '{busy}' is not complete: {words}")
            found, problem = (await self._workers("workbench_captures", asked))[0]
            if problem:
                raise HTTPException(404, problem)
            return Response(bytes(found), media_type="application/octet-stream")

    async def _workers(self, method: str, *args: Any) -> list[Any]:
        if self.engine is None:
            raise HTTPException(503, "The engine is not ready yet.")
        return await self.engine.collective_rpc(method, args=args)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Keep the engine's client for the routes."""
        self.engine = engine_client


def _admit(authorization: str) -> None:
    if not access.admitted(authorization):
        raise HTTPException(401, access.UNKNOWN)
