"""Errors that a user can put right: one clear line each, exit code 2 on the command line."""


class UserError(ValueError):
    """Something the user wrote cannot work: names the thing, the value and the way out, in one line."""


class ClientError(RuntimeError):
    """A client's training raised: the message opens with round and client and carries its own traceback."""


class WorkerDied(ClientError):
    """Worker processes died of the same work again and again: what they were at, and how each has ended, in its first line."""


class SumLost(RuntimeError):
    """A worker process died while it added to the one sum, which holds a part of its update: the round starts again."""


class OutOfMemory(RuntimeError):
    """Clients trained side by side needed more memory than the device has; fewer of them may fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here
        return True
    text = str(error)
    says = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in text for words in says)


def is_lost_context(error: BaseException) -> bool:
    """Whether an error says that the process can compute nothing more on its GPU: a kernel failed, or the device did."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in text or "device-side assert" in text
