# SPDX-License-Identifier: Apache-2.0
"""The root of the errors that a user can mend; the command line prints them without a traceback."""


class UserError(ValueError):
  """A problem the user can mend; printed without a traceback."""


class UsageError(UserError):
  """The command line itself is wrong: an unknown name, or a value of the wrong type."""
