# SPDX-License-Identifier: Apache-2.0
"""What a client may be told instead of an answer: HTTP statuses and bodies in OpenAI's form."""

from typing import Any

_TYPES = {
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  500: "server_error",
  503: "overloaded_error",
  504: "timeout_error",
}


class ApiError(Exception):
  """A request that is refused or that failed.

  Args:
    status: of HTTP.
    message: what was expected, what came, what to change.
    code: a short name that programs can compare.
    param: the field of the request, as in "messages[0].content".
    retry_after: seconds after which it may go well.
  """

  def __init__(
    self,
    status: int,
    message: str,
    code: str,
    param: str | None = None,
    retry_after: int | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.code = status, message, code
    self.param, self.retry_after = param, retry_after

  def __reduce__(self):  # Exceptions with several arguments do not travel between processes.
    return ApiError, (self.status, self.message, self.code, self.param, self.retry_after)

  def at(self, param: str) -> "ApiError":
    """The same error, about this field."""
    return ApiError(self.status, self.message, self.code, param, self.retry_after)

  @property
  def body(self) -> dict[str, Any]:
    kind = _TYPES.get(self.status, "invalid_request_error")
    error = {"message": self.message, "type": kind, "code": self.code, "param": self.param}
    return {"error": error}

  @property
  def headers(self) -> dict[str, str]:
    return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
  """The request itself is wrong."""
  return ApiError(400, message, code, param)


def overloaded(message: str, code: str = "overloaded") -> ApiError:
  """The request is fine, but not now."""
  return ApiError(503, message, code, retry_after=2)
