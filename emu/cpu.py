"""The emulated CPU: a `vmm.cpu.protocol.Cpu` on Unicorn.

How time and stops work. Each block of straight-line code is charged to the clock, by its size in bytes, when it is
entered; a block that would cross the limit is refused, and `run()` decides what to do at that boundary. Everything
that happens to the machine (timers, interrupts) happens at such boundaries, and where they lie depends on the code
alone; so a run is a function of the state it began with.

A stop inside a block (`stop_at`) charges the block, then runs its instructions one by one. What is charged and not
yet run is `clock.prepaid`; a CPU that wakes there first finishes the block, one instruction at a time, before
anything else may happen. That is why a cut leaves no trace.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import unicorn
from unicorn import x86_const as x86

from emu import callbacks, delivery, layout, msr, state, thunks
from emu.engine import (
    EXIT_MSR,
    EXIT_SHUTDOWN,
    HOOK_BLOCK,
    HOOK_INSN,
    HOOK_INSN_INVALID,
    HOOK_INTR,
    INTERRUPT_VIRQ,
)
from vmm.clock import BYTES_PER_NS, GuestClock
from vmm.cpu import model as cpu_model
from vmm.cpu.protocol import (
    Cpu,
    CpuState,
    Crashed,
    EventState,
    Exit,
    Expired,
    Halted,
    Intr,
    IoBus,
    Kicked,
    Reached,
    Shutdown,
)
from vmm.ram import Ram

_TIME, _LIMIT, _SKIPPED_NS, _REFUSED, _EXCEPTIONS, _TSC_OFFSET, _TSC_SCALE = range(7)
_FOREVER = (1 << 64) - 1
_IF = 1 << 9

# What a port access costs the guest, as on an ISA bus. Without it a guest that times a chip by polling it (the PIT,
# to calibrate the TSC) polls a hundred thousand times.
_PORT_NS = 1000
_PORT_TIME = _PORT_NS * BYTES_PER_NS

_IN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
_OUT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_OTHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_NUMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_BLOCK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)

PORTABLE = "ANYHYVE_PORTABLE"  # set in the environment: use Python callbacks though machine code would do


@dataclass(frozen=True)
class _Mark:
    context: Any
    saved: CpuState
    dr: tuple[int, ...]


class EmuCpu(Cpu):
    """One emulated CPU over shared RAM."""

    def __init__(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock) -> None:
        self._engine = engine = layout.checked_engine()
        self._clock = clock
        self._words = clock.words
        self._words[_EXCEPTIONS] = 0
        self._words[_TSC_SCALE] = (clock.tsc_khz << 32) // (BYTES_PER_NS * 1_000_000)
        self._bus = bus
        self._intr = intr
        self._pin = False
        self._halted = False
        self._event: EventState | None = None
        self._kicked = False
        self._shutdown = False
        self._stop_at: int | None = None
        self._failure: BaseException | None = None
        self._msrs = msr.Msrs(engine, self._tsc, self._set_tsc)
        self._exits = {"port_in": 0, "port_out": 0, "mmio": 0, "msr": 0, "interrupt": 0, "syscall": 0,
                       "halt": 0, "stop": 0}  # fmt: skip
        engine.hide_features(cpu_model.CPUID[1][2], cpu_model.CPUID[1][3])
        for region in ram.regions:
            engine.map_ram(region.base, region.size, region.address)
        for base, size in ram.holes(1 << cpu_model.PHYS_BITS):
            engine.map_mmio(base, size, self._mmio_read, self._mmio_write)
        engine.intercept(self._acknowledge, msr.NATIVE)
        self._install_hooks()

    # --- the protocol

    def run(self, budget_ns: int) -> Exit:
        words, clock = self._words, self._clock
        expiry = words[_TIME] + budget_ns * BYTES_PER_NS
        if self._event is not None:
            event, self._event = self._event, None
            if not delivery.deliver(self._engine, event):
                return Shutdown()
        if clock.prepaid and (stopped := self._finish_block()) is not None:
            return stopped
        while True:
            if self._stop_at is not None and clock.position >= self._stop_at:
                return Reached()
            if self._kicked:
                self._kicked = False
                return Kicked()
            if words[_TIME] >= expiry:
                return Expired()
            if self._halted:
                if not (self._pin and self._engine.eflags.value & _IF):
                    return Halted(bool(self._engine.eflags.value & _IF))
                self._halted = False
            goal = _FOREVER if self._stop_at is None else words[_TIME] + self._stop_at - clock.position
            limit = min(expiry, goal)
            refused = self._enter(limit)
            if isinstance(refused, Shutdown | Crashed):
                return refused
            time = words[_TIME]
            if not refused or not time < limit < time + refused:
                continue
            # The next block crosses the limit. A deadline waits for its end; an exact stop goes into it.
            if limit == expiry:
                crossed = self._enter(time + refused)
                if isinstance(crossed, Shutdown | Crashed):
                    return crossed
            elif clock.position + refused > self._stop_at:  # type: ignore[operator]
                words[_TIME] = time + refused
                clock.prepaid = refused
                if (stopped := self._finish_block()) is not None:
                    return stopped

    def kick(self) -> None:
        self._kicked = True
        self._words[_LIMIT] = 0

    def intr(self, level: bool) -> None:
        self._pin = level
        if level:
            self._words[_LIMIT] = 0  # stop at the next boundary, where it can be taken
        else:
            self._engine.interrupt_request.value &= ~INTERRUPT_VIRQ

    def set_a20(self, enabled: bool) -> None:
        self._engine.set_a20(enabled)

    def stop_at(self, position: int | None) -> None:
        self._stop_at = position

    def registers(self) -> tuple[int, ...]:
        engine = self._engine
        return (*engine.regs, engine.eip.value, engine.uc.reg_read(x86.UC_X86_REG_RFLAGS) & 0xFFFFFFFF)

    def save(self) -> CpuState:
        return state.save(self._engine, self._tsc(), self._halted, self._event)

    def load(self, saved: CpuState) -> None:
        self._event = saved.event
        self._halted = saved.halted
        self._set_tsc(saved.tsc)
        state.load(self._engine, saved)

    def mark(self) -> object:
        return _Mark(self._engine.context(), self.save(), tuple(self._engine.dr))

    def reset(self, mark: object) -> None:
        assert isinstance(mark, _Mark)
        if tuple(self._engine.dr) != mark.dr:
            self.load(mark.saved)
            return
        self._engine.restore_context(mark.context)
        self._engine.old_exception.value = -1
        self._event, self._halted = mark.saved.event, mark.saved.halted

    @staticmethod
    def refusal(state: CpuState) -> str | None:
        return None

    @staticmethod
    def tsc_khz(wanted: int | None = None) -> int:
        return cpu_model.TSC_KHZ if wanted is None else wanted

    def post_writes(self, port: int, on: bool) -> None:
        pass  # a write costs less here than keeping it for later

    def discard_code(self, start: int, end: int) -> None:
        self._engine.discard_code(start, end)

    def exits(self) -> dict[str, int]:
        return self._exits | {"exception": self._words[_EXCEPTIONS]}

    def close(self) -> None:
        self._engine.close()

    # --- running

    def _enter(self, limit: int, inside: bool = False) -> int | Shutdown | Crashed:
        """Run until the limit, a halt or a failure. The size of the block that was refused; 0 when none was.
        `inside` a block nobody is heard: neither kicks nor the INTR pin."""
        words, engine = self._words, self._engine
        if self._pin and not inside:
            engine.interrupt_request.value |= INTERRUPT_VIRQ
        else:
            engine.interrupt_request.value &= ~INTERRUPT_VIRQ
        words[_REFUSED] = 0
        words[_LIMIT] = limit
        if self._kicked and not inside:
            words[_LIMIT] = 0
        self._exits["stop"] += 1
        try:
            engine.start(engine.eip.value)
        except unicorn.UcError as error:
            if self._failure is None and not self._shutdown:
                return Crashed(engine.eip.value, f"{error} at {engine.eip.value:#x}")
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._shutdown:
            self._shutdown = False
            return Shutdown()
        if engine.halted.value:
            self._halted = True
            self._exits["halt"] += 1
        return words[_REFUSED]

    def _finish_block(self) -> Exit | None:
        """Run what is prepaid, one instruction at a time; None at the block's end. Time stands at the block's end."""
        words, clock, engine = self._words, self._clock, self._engine
        while clock.prepaid:
            if self._stop_at is not None and clock.position >= self._stop_at:
                return Reached()
            # The first entry is refused and tells the instruction's size; the second runs it.
            end = words[_TIME]
            engine.cflags_next_tb.value = 1
            size = self._enter(end, inside=True)
            if isinstance(size, Shutdown | Crashed):
                return size
            left = words[_EXCEPTIONS] + self._exits["msr"]
            engine.cflags_next_tb.value = 1
            words[_TIME] = end - size
            refused = self._enter(end, inside=True)
            if isinstance(refused, Shutdown | Crashed):
                return refused
            if words[_TIME] < end:
                words[_TIME] = end
                continue  # another thread's kick came in between and lowered the limit
            # A fault leaves the block, and so does an intercepted RDMSR or WRMSR; what is left of it stays charged, as
            # when the block ran whole.
            leaves = words[_EXCEPTIONS] + self._exits["msr"] != left
            clock.prepaid = 0 if leaves else max(0, clock.prepaid - size)
        return None

    # --- what the engine calls

    def _install_hooks(self) -> None:
        engine = self._engine
        if native_refusal() is None:
            self._install_native()
        else:
            self._install_portable()
        for kind, function, instruction in (
            (_IN, self._on_in, x86.UC_X86_INS_IN),
            (_OUT, self._on_out, x86.UC_X86_INS_OUT),
            (_PLAIN, self._on_cpuid, x86.UC_X86_INS_CPUID),
            (_PLAIN, self._on_syscall, x86.UC_X86_INS_SYSCALL),
            (_PLAIN, self._on_sysenter, x86.UC_X86_INS_SYSENTER),
        ):
            engine.hook(HOOK_INSN, _address(engine.keep(kind(function))), 0, instruction)

    def _install_native(self) -> None:
        engine, words = self._engine, ctypes.addressof(self._words)
        code, exceptions = engine.executable, words + 8 * _EXCEPTIONS
        do_interrupt = engine.symbol("x86_cpu_do_interrupt_x86_64")
        is_int, eflags = engine.address("exception_is_int"), engine.address("eflags")
        other = _address(engine.keep(_OTHER(self._on_intercept)))
        places = engine.address("regs"), engine.address("cr") + 32, engine.address("hflags")
        rdtscp = thunks.rdtsc(*places, tsc_aux=engine.address("tsc_aux"))
        engine.hook(HOOK_INTR, code(thunks.interrupt(exceptions, do_interrupt, is_int, eflags, other)), engine.cpu)
        engine.hook(HOOK_INSN_INVALID, code(thunks.invalid_opcode(exceptions, do_interrupt, eflags)), engine.cpu)
        engine.hook(HOOK_BLOCK, code(thunks.block(engine.symbol("uc_emu_stop"))), words)
        engine.hook(HOOK_INSN, code(thunks.rdtsc(*places)), words, x86.UC_X86_INS_RDTSC)
        engine.hook(HOOK_INSN, code(rdtscp), words, x86.UC_X86_INS_RDTSCP)
        engine.filter_stores(thunks.store_filter)

    def _install_portable(self) -> None:
        engine = self._engine
        calls = callbacks.Callbacks(engine, self._words, self._on_intercept, self._tsc)
        for kind, prototype, function, instruction in (
            (HOOK_INTR, _NUMBER, calls.interrupt, None),
            (HOOK_INSN_INVALID, _PLAIN, calls.invalid_opcode, None),
            (HOOK_BLOCK, _BLOCK, calls.block, None),
            (HOOK_INSN, _PLAIN, calls.rdtsc, x86.UC_X86_INS_RDTSC),
            (HOOK_INSN, _PLAIN, calls.rdtscp, x86.UC_X86_INS_RDTSCP),
        ):
            engine.hook(kind, _address(engine.keep(prototype(self._guarded(function)))), 0, instruction)

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as failure:
                self._fail(failure)
                return 0

        return guarded

    def _fail(self, failure: BaseException) -> None:
        """An exception must not cross the engine's frames: keep it, stop, raise it from run()."""
        self._failure = self._failure or failure
        self._engine.uc.emu_stop()

    def _on_in(self, _uc: Any, port: int, size: int, _data: Any) -> int:
        try:
            self._exits["port_in"] += 1
            words = self._words
            words[_TIME] += _PORT_TIME
            words[_SKIPPED_NS] += _PORT_NS
            return self._bus.port_in(port, size)
        except BaseException as failure:
            self._fail(failure)
            return 0

    def _on_out(self, _uc: Any, port: int, size: int, value: int, _data: Any) -> None:
        try:
            self._exits["port_out"] += 1
            words = self._words
            words[_TIME] += _PORT_TIME
            words[_SKIPPED_NS] += _PORT_NS
            self._bus.port_out(port, size, value)
        except BaseException as failure:
            self._fail(failure)

    def _mmio_read(self, address: int, size: int) -> int:
        try:
            self._exits["mmio"] += 1
            return self._bus.mmio_read(address, size)
        except BaseException as failure:
            self._fail(failure)
            return 0

    def _mmio_write(self, address: int, size: int, value: int) -> None:
        try:
            self._exits["mmio"] += 1
            self._bus.mmio_write(address, size, value)
        except BaseException as failure:
            self._fail(failure)

    def _acknowledge(self) -> int:
        try:
            self._exits["interrupt"] += 1
            self._pin = False
            vector = self._intr.acknowledge()
            if self._intr.pending():  # another one waits: look again at the handler's first block
                self.intr(True)
            return vector
        except BaseException as failure:
            self._fail(failure)
            return 0

    def _on_intercept(self, _uc: Any, number: int, _data: Any) -> int:
        try:
            if number == EXIT_MSR:
                self._exits["msr"] += 1
                return self._on_msr()
            if number < 0x100 and delivery.settle(self._engine):
                return 1
            if number < 0x100 or number == EXIT_SHUTDOWN:
                self._shutdown = True
                self._engine.uc.emu_stop()
                return 0
            raise AssertionError(f"the engine reports an intercept {number:#x} nobody asked for")
        except BaseException as failure:
            self._fail(failure)
            return 0

    def _on_msr(self) -> int:
        engine = self._engine
        regs, number = engine.regs, engine.regs[1] & 0xFFFFFFFF
        if engine.error_code.value:
            done = self._msrs.write(number, (regs[2] & 0xFFFFFFFF) << 32 | regs[0] & 0xFFFFFFFF)
        elif (value := self._msrs.read(number)) is not None:
            regs[0], regs[2] = value & 0xFFFFFFFF, value >> 32
            done = True
        else:
            done = False
        if done:
            engine.eip.value += 2
            return 0
        engine.raise_exception(13, 0)
        return 1

    def _on_cpuid(self, _uc: Any, _data: Any) -> int:
        regs = self._engine.regs
        regs[0], regs[3], regs[1], regs[2] = cpu_model.cpuid(regs[0] & 0xFFFFFFFF, regs[1] & 0xFFFFFFFF)
        return 1

    def _on_syscall(self, _uc: Any, _data: Any) -> int:
        """SYSCALL in 64-bit mode or compatibility mode (AMD APM vol. 3). The engine adds 2 to RIP afterwards."""
        self._exits["syscall"] += 1
        engine = self._engine
        flags = engine.uc.reg_read(x86.UC_X86_REG_RFLAGS)
        star = engine.u64("star").value
        long_mode = bool(engine.u64("efer").value & 0x400)
        code = engine.segment("cs")
        compatibility = not code.flags >> 21 & 1
        selector = star >> 32 & 0xFFFC
        if long_mode:
            engine.regs[1] = engine.eip.value + 2 & _FOREVER
            engine.regs[11] = flags & ~0x10000
            flags = flags & ~engine.u64("fmask").value & ~0x10000
            target = engine.u64("cstar" if compatibility else "lstar").value
        else:
            engine.regs[1] = engine.eip.value + 2 & 0xFFFFFFFF
            flags &= ~0x30200
            target = star & 0xFFFFFFFF
        engine.uc.reg_write(x86.UC_X86_REG_RFLAGS, flags | 2)
        code.selector, code.base, code.limit = selector, 0, 0xFFFFFFFF
        code.flags = 0xA09B00 if long_mode else 0xC09B00
        stack = engine.segment("ss")
        stack.selector, stack.base, stack.limit, stack.flags = selector + 8 & 0xFFFF, 0, 0xFFFFFFFF, 0xC09300
        engine.update_hflags()
        engine.eip.value = target - 2 & _FOREVER
        return 1

    def _on_sysenter(self, _uc: Any, _data: Any) -> int:
        """SYSENTER outside long mode (SDM vol. 2); the model's vendor raises #UD for it in long mode."""
        self._exits["syscall"] += 1
        engine = self._engine
        entry = engine.read_msr(0x174) & 0xFFFC
        flags = engine.uc.reg_read(x86.UC_X86_REG_RFLAGS) & ~0x20200
        engine.uc.reg_write(x86.UC_X86_REG_RFLAGS, flags)
        for name, selector, bits in (("cs", entry, 0xC09B00), ("ss", entry + 8 & 0xFFFF, 0xC09300)):
            segment = engine.segment(name)
            segment.selector, segment.base, segment.limit, segment.flags = selector, 0, 0xFFFFFFFF, bits
        engine.regs[4] = engine.read_msr(0x175)
        engine.update_hflags()
        engine.eip.value = engine.read_msr(0x176) - 2 & _FOREVER
        return 1

    # --- time-stamp counter: guest time in the TSC's ticks, plus what the guest wrote

    def _tsc(self) -> int:
        return self._ticks() + self._words[_TSC_OFFSET] & _FOREVER

    def _set_tsc(self, value: int) -> None:
        self._words[_TSC_OFFSET] = value - self._ticks() & _FOREVER

    def _ticks(self) -> int:
        return self._words[_TIME] * self._words[_TSC_SCALE] >> 32


def _address(callback: Callable[..., Any]) -> int:
    address = ctypes.cast(callback, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


def native_refusal() -> str | None:
    """Why this host cannot use machine code for the engine's callbacks; None when it can."""
    if os.environ.get(PORTABLE):
        return f"{PORTABLE} is set"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the host is {platform.machine()}, not x86-64"
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError as error:
        return f"the host refuses executable memory ({error.strerror})"
    return None


def probe() -> str:
    """Build an engine, which checks its insides, and say how callbacks run here. Raises BackendError."""
    layout.check_running()
    refusal = native_refusal()
    how = "native callbacks" if refusal is None else f"portable callbacks, slower: {refusal}"
    return f"unicorn {unicorn.__version__}, {how}"
