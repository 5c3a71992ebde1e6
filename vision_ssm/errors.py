"""The one error class for mistakes of the person at the keyboard, and the one error that any of them may cause."""

_NO_ROOM = ("can't allocate memory", "Storage size calculation overflowed", "Insufficient memory")
"""What torch on the host (twice) and OpenCV say, which have no class of error for it."""


class UserError(ValueError):
    """Something the user gave is wrong: a file, a flag, a configuration key, a data set.

    The message says what was given, what is allowed and what to do. The command line prints it without a traceback
    and exits with code 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    return is_out_of_gpu_memory(error) or isinstance(error, MemoryError) or any(text in str(error) for text in _NO_ROOM)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether it is torch's error for that; known by its name, so that torch need not be imported."""
    return any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
