"""Errors that a user can put right: one clear line each, exit code 2 on the command line."""


class UserError(ValueError):
    """Something the user wrote cannot work: names the thing, the value and the way out, in one line."""


class ClientError(RuntimeError):
    """A client's training raised: the message opens with round and client and carries its own traceback."""
