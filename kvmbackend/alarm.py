"""A signal to this thread after so many nanoseconds, or from another thread: the only ways to end KVM_RUN.

The signal is blocked in the thread and let through by KVM_RUN alone (KVM_SET_SIGNAL_MASK), so it runs no handler and
cannot be lost between a look and the entry: one that comes early stays pending and ends the entry at once.
References: timer_create(2) with SIGEV_THREAD_ID; KVM api.rst, KVM_SET_SIGNAL_MASK.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading

from kvmbackend import abi
from vmm.errors import BackendError

SIGNAL = signal.SIGRTMIN + 6
_SIGEV_THREAD_ID, _CLOCK_MONOTONIC = 4, 1

_libc = ctypes.CDLL(None, use_errno=True)


class _Sigevent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_uint64),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_uint8 * 44),
    ]


class _SignalMask(ctypes.Structure):
    """struct kvm_signal_mask with the kernel's 8-byte set"""

    _pack_ = 1
    _fields_ = [("len", ctypes.c_uint32), ("set", ctypes.c_uint64)]


class Alarm:
    """Belongs to the thread that last entered it."""

    def __init__(self, vcpu: int) -> None:
        # The mask KVM_RUN runs with: everything stays blocked as it is for Python's other signals but ours.
        mask = _SignalMask(len=8, set=0)
        abi.call("KVM_SET_SIGNAL_MASK", vcpu, abi.SET_SIGNAL_MASK, mask)
        self._thread: int | None = None
        self._timer: ctypes.c_void_p | None = None
        self._lock = threading.Lock()
        self._inside = False
        self._time = (ctypes.c_int64 * 4)()  # struct itimerspec: interval s, ns; value s, ns

    def enter(self) -> None:
        """From here on this thread may be interrupted."""
        thread = threading.get_ident()
        if thread != self._thread:
            signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
            self._make_timer()
        with self._lock:
            self._thread, self._inside = thread, True

    def leave(self) -> None:
        with self._lock:
            self._inside = False

    def ring(self) -> None:
        """From any thread: end the other's KVM_RUN."""
        with self._lock:
            if self._inside and self._thread is not None and self._thread != threading.get_ident():
                signal.pthread_kill(self._thread, SIGNAL)

    def set(self, after_ns: int) -> None:
        """Ring once after `after_ns` (> 0)."""
        self._time[2], self._time[3] = divmod(after_ns, 1_000_000_000)
        _libc.timer_settime(self._timer, 0, self._time, None)

    @staticmethod
    def quiet() -> None:
        """Forget what has rung."""
        while signal.sigtimedwait([SIGNAL], 0):
            pass

    def _make_timer(self) -> None:
        self._drop_timer()
        event = _Sigevent(signo=SIGNAL, notify=_SIGEV_THREAD_ID, thread=threading.get_native_id())
        timer = ctypes.c_void_p()
        if _libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            raise BackendError("kvm: this host gives no timer for a thread")
        self._timer = timer

    def _drop_timer(self) -> None:
        if self._timer is not None:
            with contextlib.suppress(AttributeError):
                _libc.timer_delete(self._timer)
            self._timer = None

    def close(self) -> None:
        self._drop_timer()
