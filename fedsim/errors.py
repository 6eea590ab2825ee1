"""Errors that a user can put right: one clear line each, exit code 2 on the command line."""


class UserError(ValueError):
    """Something the user wrote cannot work: names the thing, the value and the way out, in one line."""


class ClientError(RuntimeError):
    """A client's training raised: the message opens with round and client and carries its own traceback."""


class OutOfMemory(RuntimeError):
    """Clients trained side by side needed more memory than the device has; fewer of them may fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
