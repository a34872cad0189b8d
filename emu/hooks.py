"""What the engine calls while it runs: ports and memory-mapped I/O, interrupts, exceptions, MSRs, CPUID, system calls.

No exception may cross the engine's frames: each hook runs guarded, and what it raises is kept, the engine stopped, and
raised again from `run()`. Where machine code can do a hook's work it does (emu.native, emu.callbacks).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from unicorn import x86_const as x86

from emu import callbacks, msr, system, system_calls
from emu.asked import Asked
from emu.delivery import Delivery
from emu.engine import (
    EXIT_MSR,
    EXIT_PAUSE,
    EXIT_SHUTDOWN,
    HOOK_BLOCK,
    HOOK_INSN,
    HOOK_INSN_INVALID,
    HOOK_INTR,
    Engine,
)
from emu.instruction import Instruction, retire_pause
from emu.linear import GP, FaultError
from emu.native.code import Code
from vmm.clock import BYTES_PER_NS, GuestClock, Word
from vmm.cpu import model as cpu_model
from vmm.cpu.protocol import IoBus, Shutdown

_TIME, _SKIPPED_NS = Word.TIME.value, Word.SKIPPED_NS.value

# What an access of a device costs the guest: about that of eight bits on an ISA bus, six clocks of 8.33 MHz and what
# the bridge adds (IEEE P996). Without it a guest that times a chip by polling it (the PIT, to calibrate the TSC) polls
# a hundred thousand times.
_ACCESS_NS = 1000
_ACCESS_TIME = _ACCESS_NS * BYTES_PER_NS

_COUNTED = ("port_in", "port_out", "mmio", "msr", "system", "interrupt", "syscall", "halt", "stop", "pause")

_IN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
_OUT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_OTHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_NUMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
_BLOCK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)


class Hooks:
    """The hooks of one engine, for the CPU of `core` that is on it; ports are the same for all of them. `counts` is how
    often the guest's code was left, by reason. `ended` is why a hook stopped the engine: a triple fault, or what it
    raised."""

    def __init__(self, engine: Engine, clock: GuestClock, bus: IoBus, core: Asked) -> None:
        self.delivery = Delivery(engine, clock.words)
        self._engine, self._clock, self._words, self._bus, self._core = engine, clock, clock.words, bus, core
        self._msrs = msr.Msrs(engine, core)
        self.ended: Shutdown | BaseException | None = None
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.mmio_read: Callable[[int, int], int] = self._guarded(self._mmio_read)
        self.mmio_write: Callable[[int, int, int], None] = self._guarded(self._mmio_write)
        self.acknowledge: Callable[[], int] = self._guarded(lambda: core.on.acknowledge())

    def end(self) -> Shutdown:
        """Give what the run ended with, once: raise what a hook raised."""
        ended, self.ended = self.ended, None
        if isinstance(ended, BaseException):
            raise ended
        assert ended is not None
        return ended

    def install(self, native: bool) -> None:
        """Hand the hooks to the engine; with `native` in machine code where there is some."""
        if native:
            self._install_native()
        else:
            self._install_portable()
        self._engine.on_breakpoint(self._guarded(self._on_breakpoint))
        for kind, hook, instruction in (
            (_IN, self._in(), x86.UC_X86_INS_IN),
            (_OUT, self._out(), x86.UC_X86_INS_OUT),
            (_PLAIN, self._guarded(self._on_cpuid), x86.UC_X86_INS_CPUID),
            (_PLAIN, self._guarded(self._on_syscall), x86.UC_X86_INS_SYSCALL),
            (_PLAIN, self._guarded(self._on_sysenter), x86.UC_X86_INS_SYSENTER),
        ):
            self._engine.hook(HOOK_INSN, self._address(kind, hook), 0, instruction)

    def _install_native(self) -> None:
        engine, words = self._engine, ctypes.addressof(self._clock.memory)
        code = engine.keep(
            Code(
                env=engine.env,
                words=words,
                emu_stop=engine.symbol("uc_emu_stop"),
                do_interrupt=engine.symbol("x86_cpu_do_interrupt_x86_64"),
                other=self._address(_OTHER, self._guarded(self._on_intercept)),
            )
        )
        engine.hook(HOOK_INTR, code["interrupt"], engine.cpu)
        engine.hook(HOOK_INSN_INVALID, code["invalid_opcode"], engine.cpu)
        engine.hook(HOOK_BLOCK, code["block"], words)
        engine.hook(HOOK_INSN, code["rdtsc"], words, x86.UC_X86_INS_RDTSC)
        engine.hook(HOOK_INSN, code["rdtscp"], words, x86.UC_X86_INS_RDTSCP)
        engine.filter_stores(code)

    def _install_portable(self) -> None:
        calls = callbacks.Callbacks(
            self._engine, self._words, self.delivery, self._guarded(self._on_intercept), lambda: self._core.on.tsc()
        )
        for kind, prototype, function, instruction in (
            (HOOK_INTR, _NUMBER, calls.interrupt, None),
            (HOOK_INSN_INVALID, _PLAIN, calls.invalid_opcode, None),
            (HOOK_BLOCK, _BLOCK, calls.block, None),
            (HOOK_INSN, _PLAIN, calls.rdtsc, x86.UC_X86_INS_RDTSC),
            (HOOK_INSN, _PLAIN, calls.rdtscp, x86.UC_X86_INS_RDTSCP),
        ):
            self._engine.hook(kind, self._address(prototype, self._guarded(function)), 0, instruction)

    def _address(self, prototype: Any, function: Callable[..., Any]) -> int:
        callback = self._engine.keep(prototype(function))
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        return address

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as failure:
                return self._fail(failure)

        return guarded

    def _fail(self, failure: BaseException) -> int:
        if not isinstance(self.ended, BaseException):
            self.ended = failure
        self._engine.uc.emu_stop()
        return 0

    # --- accesses. Those of ports guard themselves, and look nothing up: a wrapper is a tenth of what one costs.

    def _in(self) -> Callable[..., int]:
        counts, words, port_in, fail = self.counts, self._words, self._bus.port_in, self._fail

        def on_in(_uc: Any, port: int, size: int, _data: Any) -> int:
            try:
                counts["port_in"] += 1
                words[_TIME] += _ACCESS_TIME
                words[_SKIPPED_NS] += _ACCESS_NS
                return port_in(port, size)
            except BaseException as failure:
                return fail(failure)

        return on_in

    def _out(self) -> Callable[..., None]:
        counts, words, port_out, fail = self.counts, self._words, self._bus.port_out, self._fail

        def on_out(_uc: Any, port: int, size: int, value: int, _data: Any) -> None:
            try:
                counts["port_out"] += 1
                words[_TIME] += _ACCESS_TIME
                words[_SKIPPED_NS] += _ACCESS_NS
                port_out(port, size, value)
            except BaseException as failure:
                fail(failure)

        return on_out

    def _mmio_read(self, address: int, size: int) -> int:
        self.counts["mmio"] += 1
        self._clock.skip(_ACCESS_NS)
        return self._core.on.bus.mmio_read(address, size)

    def _mmio_write(self, address: int, size: int, value: int) -> None:
        self.counts["mmio"] += 1
        self._clock.skip(_ACCESS_NS)
        self._core.on.bus.mmio_write(address, size, value)

    # --- exceptions and intercepts

    def _on_intercept(self, _uc: Any, number: int, _data: Any) -> int:
        """Nonzero: the exception that is set up is to be delivered."""
        engine = self._engine
        if number == EXIT_SHUTDOWN or (number < 0x100 and not self.delivery.software(number)):
            self._shut_down()
            return 0
        if number < 0x100:
            return 0
        try:
            if number == EXIT_MSR:
                self.counts["msr"] += 1
                self._access_msr()
            elif number == EXIT_PAUSE:
                self.counts["pause"] += 1
                retire_pause(engine)
                self._core.on.pause()
            else:
                self.counts["system"] += 1
                system.perform(engine, number, self._core.on.apic)
        except FaultError as fault:
            engine.raise_fault(fault.vector, fault.error_code)
            return 1
        return int(engine.retire())

    def _on_breakpoint(self) -> None:
        if not self.delivery.exception(1):
            self._shut_down()

    def _shut_down(self) -> None:
        self.ended = self.ended or Shutdown()
        self._engine.uc.emu_stop()

    def _access_msr(self) -> None:
        """RDMSR or WRMSR. Raises FaultError."""
        engine = self._engine
        regs, number = engine.regs, engine.regs[1] & 0xFFFFFFFF
        if engine.error_code.value:
            if not self._msrs.write(number, (regs[2] & 0xFFFFFFFF) << 32 | regs[0] & 0xFFFFFFFF):
                raise FaultError(GP)
        elif (value := self._msrs.read(number)) is not None:
            regs[0], regs[2] = value & 0xFFFFFFFF, value >> 32
        else:
            raise FaultError(GP)
        Instruction(engine).retire()

    def _on_cpuid(self, _uc: Any, _data: Any) -> int:
        regs = self._engine.regs
        apic, leaf, subleaf = self._core.on.apic, regs[0] & 0xFFFFFFFF, regs[1] & 0xFFFFFFFF
        if apic is None:
            answer = cpu_model.cpuid(leaf, subleaf)
        else:
            answer = cpu_model.cpuid(leaf, subleaf, apic.base(), apic.number, apic.cpus)
        regs[0], regs[3], regs[1], regs[2] = answer
        return 1

    def _on_syscall(self, _uc: Any, _data: Any) -> int:
        self.counts["syscall"] += 1
        system_calls.syscall(self._engine)
        return 1

    def _on_sysenter(self, _uc: Any, _data: Any) -> int:
        self.counts["syscall"] += 1
        system_calls.sysenter(self._engine)
        return 1
