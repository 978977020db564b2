"""A typed client of the application: `Client("http://127.0.0.1:8000").recommend(user=7)`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import requests
from pydantic import BaseModel, ValidationError
from typing_extensions import Self

from raysys.errors import UserError
from raysys.serve.messages import (
    Context,
    FeedbackAnswer,
    FeedbackRequest,
    Models,
    Problem,
    RankBatch,
    RankBatchAnswer,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    RetrieveRequest,
)

Answer = TypeVar("Answer", bound=BaseModel)


class ServerError(RuntimeError):
    """The server did not answer. status: of HTTP. request_id: to be found in the server's log."""

    def __init__(self, status: int, message: str, request_id: str | None) -> None:
        super().__init__(f"{status}: {message} (request {request_id})")
        self.status, self.request_id = status, request_id


class Client:
    """Requests over one kept connection; use one client a thread.

    key: sent as X-API-Key. timeout: seconds for one attempt. attempts: how often a request is sent while the server says
    that it is overloaded (503); between them the client waits as long as `Retry-After` says.

    Every method raises UserError for what is wrong with the request, as the server names it, and ServerError where the
    server is overloaded or fails; what `requests` raises where there is no connection goes through.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 10.0, attempts: int = 3) -> None:
        self.url, self.timeout, self.attempts = url.rstrip("/"), timeout, attempts
        self._session = requests.Session()
        if key is not None:
            self._session.headers["X-API-Key"] = key

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def recommend(
        self,
        user: int | str,
        count: int = 10,
        *,
        context: Context | None = None,
        exclude: Sequence[int] = (),
        deadline_ms: float | None = None,
        explain: bool = False,
    ) -> Recommendation:
        """The best items for a user; see `RecommendRequest`."""
        request = _checked(
            RecommendRequest,
            user=user,
            count=count,
            context=context or {},
            exclude=list(exclude),
            deadline_ms=deadline_ms,
            explain=explain,
        )
        return self._send("POST", "/v1/recommend", Recommendation, request)

    def retrieve(
        self, user: int | str, count: int = 100, *, context: Context | None = None, exclude: Sequence[int] = ()
    ) -> Ranking:
        """Candidates for a user from the index."""
        request = _checked(RetrieveRequest, user=user, count=count, context=context or {}, exclude=list(exclude))
        return self._send("POST", "/v1/retrieve", Ranking, request)

    def rank(self, user: int | str, items: Sequence[int], *, context: Context | None = None) -> Ranking:
        """Predictions for a user's items, best first."""
        request = _checked(RankRequest, user=user, items=list(items), context=context or {})
        return self._send("POST", "/v1/rank", Ranking, request)

    def rank_batch(self, batch: Sequence[RankRequest]) -> list[Ranking]:
        """The rankings of several requests, sent as one."""
        return self._send("POST", "/v1/rank", RankBatchAnswer, _checked(RankBatch, requests=list(batch))).rankings

    def feedback(self, rewards: Mapping[str, float]) -> int:
        """Rewards in [0, 1] by impression, an item's `impression`; how many are on the server's disk now."""
        request = _checked(
            FeedbackRequest,
            rewards=[{"impression": impression, "reward": reward} for impression, reward in rewards.items()],
        )
        return self._send("POST", "/v1/feedback", FeedbackAnswer, request).accepted

    def models(self) -> Models:
        """What is served."""
        return self._send("GET", "/v1/models", Models)

    def _send(self, method: str, path: str, kind: type[Answer], body: BaseModel | None = None) -> Answer:
        data = body.model_dump_json().encode() if body is not None else None
        headers = {"Content-Type": "application/json"} if body is not None else {}
        for attempt in range(1, self.attempts + 1):
            answer = self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=self.timeout, allow_redirects=False
            )
            if answer.status_code != 503 or attempt == self.attempts:
                break
            time.sleep(float(answer.headers.get("Retry-After", 1)))
        if answer.ok:
            return kind.model_validate_json(answer.content)
        try:
            problem = Problem.model_validate_json(answer.content)
        except ValidationError:  # not from the application: a proxy's page
            problem = Problem(error=answer.reason, request_id=answer.headers.get("X-Request-ID", "unknown"))
        if 400 <= answer.status_code < 500:
            raise UserError(f"{path}: {problem.error}", f"request {problem.request_id}")
        raise ServerError(answer.status_code, problem.error, problem.request_id)


def _checked(kind: type[Answer], **arguments: object) -> Answer:
    """The request; a UserError that names the argument where it is not valid."""
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
