# SPDX-License-Identifier: Apache-2.0
"""The root of the errors that a user can mend, which the command line prints without a traceback."""


class UserError(ValueError):
  """A problem the user can mend; printed without a traceback."""


class UsageError(UserError):
  """The command line itself is wrong: an unknown name, or a value of the wrong type."""
