"""What the C library does with memory that is freed."""

import ctypes

# From glibc's malloc.h. Left alone, it raises the threshold to the size of whatever is freed, up to 32 MiB,
# and then keeps twice as much in the heap of each thread.
_M_MMAP_THRESHOLD = -3
_LARGE = 256 << 10


def return_large_buffers() -> None:
    """From now on buffers of 256 KiB or more go back to the system as soon as they are freed, in the whole
    process; nothing happens where malloc has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def return_free_memory() -> None:
    """Give back what is free now, whatever its size, where malloc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
