"""The KVM CPU: a `vmm.cpu.protocol.Cpu` on /dev/kvm.

Interrupt controllers and timers are the board's, in user space: KVM is asked for none. What leaves the guest comes
here: I/O, HLT, and the moment an interrupt can be taken.

An IN has not yet loaded AL when KVM exits for it; the next KVM_RUN does that. So `run()` ends only by a KVM_RUN that
ran nothing (`immediate_exit`, or a signal): then the instruction is complete, and the CPU can be saved.

Guest time is the host's, while the guest runs (kvmbackend.time_keeper): each exit moves the clock on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fcntl import ioctl
from operator import attrgetter

from kvmbackend import abi, state
from kvmbackend.alarm import Alarm
from kvmbackend.step import Stepper
from kvmbackend.time_keeper import TimeKeeper, now
from kvmbackend.vm import Vcpu, Vm
from vmm.clock import BYTES_PER_NS, LAST_NS, GuestClock, Word
from vmm.cpu import apic_msrs, backends, paging, rep, startup
from vmm.cpu.protocol import (
    REGISTERS,
    Apic,
    Cpu,
    CpuState,
    Crashed,
    Exit,
    Expired,
    Halted,
    Intr,
    IoBus,
    Kicked,
    Shutdown,
)
from vmm.dirty_pages import PAGE
from vmm.errors import BackendError, RequestError
from vmm.ram import Ram

_TIME, _SKIPPED_NS = Word.TIME.value, Word.SKIPPED_NS.value
_IMMEDIATE_EXIT, _WINDOW, _READY, _IF = abi.RUN_IMMEDIATE_EXIT, abi.RUN_WINDOW, abi.RUN_READY, abi.RUN_IF
_REASON32, _EXIT32, _EXIT64, _CR8 = abi.RUN_REASON // 4, abi.RUN_EXIT // 4, abi.RUN_EXIT // 8, abi.RUN_CR8 // 8
_RIP = REGISTERS.index("rip")
_IO, _MMIO, _HLT, _RUN = abi.EXIT_IO, abi.EXIT_MMIO, abi.EXIT_HLT, abi.RUN
_LOOK_NS = 50_000
_LEAST_NS = 100_000  # of a run: a timer that is faster than a run costs leaves a guest no time for itself


class KvmCpu(Cpu):
    """One CPU of KVM's over shared RAM."""

    turn_ns = 2_000_000
    counts_pauses = False

    def __init__(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock, first: Cpu | None = None, /) -> None:
        self._ram, self._bus, self._intr, self._clock = ram, bus, intr, clock
        self._apic = intr.apic
        assert first is None or isinstance(first, KvmCpu)
        self._first = first is None
        self._vm: Vm
        self._vm = vm = Vm(ram, self._apic is not None) if first is None else first._vm
        with contextlib.ExitStack() as undo:
            if first is None:
                undo.callback(vm.close)
            number, cpus = (0, 1) if self._apic is None else (self._apic.number, self._apic.cpus)
            self._vcpu = vcpu = Vcpu(vm, number, cpus)
            undo.callback(vcpu.close)
            vcpu.set_tsc_khz(clock.tsc_khz)
            self._fd, self._alarm = vcpu.fd, Alarm(vcpu.fd)
            undo.pop_all()
        self._run8, self._run16 = vcpu.run, vcpu.run.cast("H")
        self._run32, self._run64 = vcpu.run.cast("I"), vcpu.run.cast("Q")
        self._ring32 = None if vm.ring is None else vm.ring.cast("I")
        self._words = clock.words
        self._pin = False
        self._waits_at_apic = False  # an NMI, an INIT or a start-up message does
        self._cr8 = self._base = 0  # CR8 and IA32_APIC_BASE, as KVM was told last
        self._kicked = False
        self._halted = False
        self._time = TimeKeeper(vcpu, clock)
        self._finisher: Cpu | None = None
        self._stepper: Stepper | None = None
        self._regs = abi.Regs()
        self._exits = {"port_in": 0, "port_out": 0, "posted": 0, "mmio": 0, "interrupt": 0, "window": 0, "halt": 0,
                       "signal": 0, "emulated": 0, "msr": 0}  # fmt: skip

    # --- the protocol

    def run(self, limit: int) -> Exit:
        run8 = self._run8
        self._time.resume()
        self._vm.show_ram()
        self.attend()
        if self._apic is not None:
            self._show_apic(self._apic)
        if self._halted:
            if not ((self._pin and run8[_IF]) or (self._waits_at_apic and self._hand_over_nmi())):
                if self._kicked:
                    self._kicked = False
                    return Kicked()
                return Halted()
            self._halted = False
        left_ns = -(-(limit - self._words[_TIME]) // BYTES_PER_NS)
        if left_ns <= 0:
            return Expired()
        self._alarm.enter()
        try:
            self._alarm.set(max(left_ns, _LEAST_NS))
            return self._enter(limit)
        finally:
            self._alarm.leave()

    def kick(self) -> None:
        self._kicked = True
        self._run8[_IMMEDIATE_EXIT] = 1
        self._alarm.ring()

    def intr(self, level: bool) -> None:
        self._pin = level

    def apic_event(self, level: bool) -> None:
        self._waits_at_apic = level

    def can_run(self) -> bool:
        return not self._halted or bool(self._pin and self._run8[_IF]) or self._waits_at_apic

    def listens(self) -> bool:
        return bool(self._run8[_IF])

    def count_pauses(self, counted: Callable[[], None] | None) -> None:
        pass  # KVM does not tell of them

    def tsc(self) -> int:
        return self._time.tsc()

    def tsc_reaches(self, value: int) -> int | None:
        when_ns = self._time.reaches(value)
        return when_ns if when_ns < LAST_NS else None

    def set_a20(self, enabled: bool) -> None:
        self._vm.set_a20(enabled)

    def stop_at(self, position: int | None) -> None:
        if position is not None:
            raise RequestError("kvm does not count the code it runs: a position can be reached with --backend emu only")

    def defer_writes(self, port: int, on: bool) -> None:
        if self._ring32 is not None:
            self._vm.defer_writes(port, on)

    def registers(self) -> tuple[int, ...]:
        abi.call("KVM_GET_REGS", self._fd, abi.GET_REGS, self._regs)
        return _registers(self._regs)

    def attend(self) -> None:
        """Do an INIT, or the start-up message that is waited for."""
        if self._apic is not None and self._waits_at_apic:
            startup.begin_anew(self, self._apic)

    def step(self, arrive: int, interrupted: bool, entered: bool, sysret: bool) -> None:
        """One instruction as another CPU ran it, which came to RIP `arrive`: after an interrupt, into a handler."""
        self._time.step()
        self._kicked, self._run8[_IMMEDIATE_EXIT] = False, 0  # where it stops is the other CPU's affair
        if self._apic is not None:
            self._show_apic(self._apic)
        if self._stepper is None:
            self._stepper = Stepper(self._vcpu, self._ram, self._alarm, self._serve, self.save)
        if interrupted:
            self._halted = self._pin = False
            vector = self._intr.acknowledge()
            self._pin = self._intr.pending()
            self._stepper.interrupt(vector)
        if entered:
            if self._waits_at_apic and not interrupted:
                self._hand_over_nmi()
            self._stepper.enter(arrive)
        else:
            start = self.registers()[_RIP]
            self._halted = not self._stepper.instruction(sysret)
            if arrive != start and rep.is_done(self, self._ram.read, start):
                self._stepper.instruction(False)
        if self._apic is not None:
            self._take_cr8(self._apic)
        self._take_posted()

    def save(self) -> CpuState:
        saved = state.save(self._fd, self._halted, self._time.tsc())
        if self._apic is not None:
            saved.cr8 = self._apic.task_priority()
        return saved

    def load(self, saved: CpuState) -> None:
        state.load(self._fd, saved, self._base)
        self._clock.prepaid = 0  # time is not counted in code here: what was paid for and not run is forgotten
        self._run64[_CR8] = self._cr8 = saved.cr8
        self._halted = saved.halted
        self._time.set(saved.tsc)
        self._look()

    def mark(self) -> object:
        return self.save()

    def reset(self, mark: object) -> None:
        assert isinstance(mark, CpuState)
        self.load(mark)

    @staticmethod
    def refusal(saved: CpuState) -> str | None:
        with _scratch() as vcpu:
            try:
                state.load(vcpu.fd, saved)
            except BackendError as error:
                return str(error)
        return None

    @staticmethod
    def tsc_khz(wanted: int | None = None) -> int:
        with _scratch() as vcpu:
            if wanted is not None:
                vcpu.set_tsc_khz(wanted)
            return vcpu.tsc_khz

    def discard_code(self, start: int, end: int) -> None:
        pass  # KVM runs what is in memory

    def exits(self) -> dict[str, int]:
        return dict(self._exits)

    def close(self) -> None:
        if self._finisher is not None:
            self._finisher.close()
        if self._stepper is not None:
            self._stepper.close()
        self._alarm.close()
        for view in (self._run16, self._run32, self._run64, self._ring32):
            if view is not None:
                view.release()
        self._vcpu.close()
        if self._first:
            self._vm.close()

    # --- running

    def _enter(self, end: int) -> Exit:
        """Run until guest time `end` (in quarters of a ns), a halt, a kick or a failure."""
        fd, run8, run32, run64, words = self._fd, self._run8, self._run32, self._run64, self._words
        exits, ring, keeper, apic = self._exits, self._ring32, self._time, self._apic
        port_in, port_out = self._bus.port_in, self._bus.port_out
        while True:
            if self._waits_at_apic and not self._hand_over_nmi() and self._waits_at_apic:
                self._alarm.set(_LOOK_NS)  # KVM does not tell of an IRET
            if self._cr8 and apic is not None and apic.waits_for_task_priority():
                self._alarm.set(_LOOK_NS)  # not every KVM tells of a CR8 that is lowered
            if self._pin and not run8[_IMMEDIATE_EXIT]:
                self._offer_interrupt()
            try:
                ioctl(fd, _RUN, 0)
            except InterruptedError:
                exits["signal"] += 1
                self._alarm.quiet()
                keeper.move_on()
                self._take_posted()
                if self._kicked:
                    self._kicked = False
                    run8[_IMMEDIATE_EXIT] = 0
                    return Kicked()
                run8[_IMMEDIATE_EXIT] = 0
                if apic is not None:
                    self._take_cr8(apic)
                    self._show_apic(apic)
                if words[_TIME] >= end:
                    return Expired()
                self._alarm.set(-(-(end - words[_TIME]) // BYTES_PER_NS))
                continue
            except OSError as error:
                return Crashed(self._rip(), f"KVM_RUN: {error.strerror}")
            # The clock moves with the host's.
            host = now()
            passed = host - keeper.host_ns
            keeper.host_ns = host
            keeper.seen_ns += passed
            words[_SKIPPED_NS] += passed
            words[_TIME] += passed * BYTES_PER_NS
            if apic is not None:
                self._take_cr8(apic)
            if ring is not None and ring[0] != ring[1]:
                self._take_posted()
            reason = run32[_REASON32]
            if reason == _IO:
                what = run64[_EXIT64]  # direction, size (a byte each), port (two), count (four)
                size, port, at = what >> 8 & 0xFF, what >> 16 & 0xFFFF, run64[_EXIT64 + 1]
                if what >> 32 != 1:
                    self._any_io()
                elif what & 1:
                    exits["port_out"] += 1
                    port_out(port, size, int.from_bytes(run8[at : at + size], "little") if size > 1 else run8[at])
                else:
                    exits["port_in"] += 1
                    if size > 1:
                        run8[at : at + size] = port_in(port, size).to_bytes(size, "little")
                    else:
                        run8[at] = port_in(port, 1)
            elif reason == _MMIO:
                self._mmio()
            elif (stop := self._rare(reason)) is not None:
                return stop
            if words[_TIME] >= end:
                run8[_IMMEDIATE_EXIT] = 1

    def _offer_interrupt(self) -> None:
        """Hand an interrupt over when the CPU can take it, else ask to be told when it can."""
        run8 = self._run8
        if run8[_READY] and run8[_IF]:
            self._exits["interrupt"] += 1
            self._pin = False
            vector = self._intr.acknowledge()
            if self._intr.pending():
                self._pin = True
            ioctl(self._fd, abi.INTERRUPT, vector.to_bytes(4, "little"))
            run8[_READY] = 0
        run8[_WINDOW] = self._pin

    def _hand_over_nmi(self) -> bool:
        """Hand an NMI over where the CPU can take it. False: not now."""
        assert self._apic is not None
        if state.nmi_waits(self._fd):
            return False
        if not self._apic.take_nmi():
            self._waits_at_apic = False  # it is something else
            return False
        ioctl(self._fd, abi.NMI, 0)
        return True

    def _take_cr8(self, apic: Apic) -> None:
        """The guest may have written CR8."""
        if (cr8 := self._run64[_CR8]) != self._cr8:
            self._cr8 = cr8
            apic.set_task_priority(cr8)

    def _show_apic(self, apic: Apic) -> None:
        """What the local APIC has of the CPU's registers is shown to KVM."""
        self._run64[_CR8] = self._cr8 = apic.task_priority()
        if (base := apic.base()) != self._base:
            self._base = base
            state.set_apic_base(self._fd, base)

    def _serve(self, reason: int) -> None:
        """What _enter does with an exit, without its haste."""
        self._take_posted()
        if reason == _IO:
            self._any_io()
        elif reason == _MMIO:
            self._mmio()
        else:
            self._rare(reason)
            self._run8[_IMMEDIATE_EXIT] = 0  # IA32_APIC_BASE is shown before the next step

    def _any_io(self) -> None:
        """Port I/O of any count: string instructions come in pieces."""
        run8, bus, what, at = self._run8, self._bus, self._run64[_EXIT64], self._run64[_EXIT64 + 1]
        out, size, port, count = what & 1, what >> 8 & 0xFF, what >> 16 & 0xFFFF, what >> 32
        self._exits["port_out" if out else "port_in"] += 1
        for place in range(at, at + count * size, size):
            if out:
                bus.port_out(port, size, int.from_bytes(run8[place : place + size], "little"))
            else:
                run8[place : place + size] = bus.port_in(port, size).to_bytes(size, "little")

    def _mmio(self) -> None:
        self._exits["mmio"] += 1
        address, size = self._run64[_EXIT64], self._run32[_EXIT32 + 4]
        data = self._run8[abi.RUN_MMIO_DATA : abi.RUN_MMIO_DATA + size]
        if self._run8[abi.RUN_MMIO_WRITE]:
            self._bus.mmio_write(address, size, int.from_bytes(data, "little"))
        else:
            data[:] = self._bus.mmio_read(address, size).to_bytes(size, "little")
        if self._apic is not None:
            self._run64[_CR8] = self._cr8 = self._apic.task_priority()

    def _rare(self, reason: int) -> Exit | None:
        """What happens less often than I/O. None: go on."""
        match reason:
            case abi.EXIT_HLT:
                self._exits["halt"] += 1
                self._halted = not (self._pin and self._run8[_IF])
                return Halted() if self._halted else None
            case abi.EXIT_IRQ_WINDOW_OPEN:
                self._exits["window"] += 1
                return None
            case abi.EXIT_SET_TPR:
                return None  # CR8 is looked at after every exit
            case abi.EXIT_RDMSR | abi.EXIT_WRMSR:
                self._msr(reason == abi.EXIT_WRMSR)
                return None
            case abi.EXIT_SHUTDOWN:
                return Shutdown()
            case abi.EXIT_INTERNAL_ERROR if self._run32[_EXIT32] == abi.INTERNAL_ERROR_EMULATION:
                return self._finish_instruction()
            case abi.EXIT_INTERNAL_ERROR:
                return Crashed(self._rip(), f"KVM reports internal error {self._run32[_EXIT32]}")
            case abi.EXIT_FAIL_ENTRY:
                return Crashed(self._rip(), f"the CPU refuses this state (reason {self._run64[_EXIT64]:#x})")
            case _:
                return Crashed(self._rip(), f"KVM exits for a reason nobody asked for ({reason})")

    def _msr(self, write: bool) -> None:
        """An MSR that KVM leaves to us; what is none is #GP(0)."""
        assert self._apic is not None
        self._exits["msr"] += 1
        run64, number = self._run64, self._run32[abi.RUN_MSR_INDEX // 4]
        data = abi.RUN_MSR_DATA // 8
        if write and number == state.TSC:
            self._time.set(run64[data])
            self._apic.tsc_moved()
            refused = False
        elif write:
            refused = not apic_msrs.write(self._apic, number, run64[data])
        else:
            value = apic_msrs.read(self._apic, number)
            refused, run64[data] = value is None, value or 0
        self._run8[abi.RUN_EXIT] = refused
        self._run8[_IMMEDIATE_EXIT] = 1  # to be done whole, before KVM is told of another IA32_APIC_BASE

    def _take_posted(self) -> None:
        """The writes that wait in the ring, in their order; they came before whatever left the guest now."""
        ring = self._ring32
        if ring is None:
            return
        slots = (len(ring) * 4 - abi.RING_ENTRIES) // abi.RING_ENTRY
        while ring[0] != ring[1]:
            place = (abi.RING_ENTRIES + ring[0] * abi.RING_ENTRY) // 4
            self._exits["posted"] += 1
            self._bus.port_out(ring[place], ring[place + 2], ring[place + 4] & 0xFF)
            ring[0] = (ring[0] + 1) % slots

    def _finish_instruction(self) -> Exit | None:
        """KVM cannot run the instruction at RIP: the emulated CPU runs it, over the same RAM, and hands back."""
        self._exits["emulated"] += 1
        if self._finisher is None:
            self._finisher = backends.factory("emu")(self._ram, self._bus, self._intr, self._clock)
        finisher, clock, before = self._finisher, self._clock, self.save()
        stood = clock.save()
        for address in (before.cs.base + before.rip, before.cs.base + before.rip + 15):
            physical = paging.translate(before, self._ram.read, address & (1 << 64) - 1)
            if physical is not None:
                finisher.discard_code(physical & -PAGE, (physical & -PAGE) + PAGE)
        finisher.load(before)
        finisher.stop_at(clock.position + 1)
        stop = finisher.run(self._words[_TIME] + (1 << 40))
        clock.load(stood)
        match stop:
            case Crashed() | Shutdown():
                return stop
            case Halted():
                self._halted = True
        state.load(self._fd, finisher.save(), self._base)
        self._run64[_CR8] = self._cr8 = before.cr8
        self._look()
        return stop if self._halted else None

    def _look(self) -> None:
        """A KVM_RUN that runs nothing: what it says of IF and of readiness is of the state just loaded."""
        self._run8[_IMMEDIATE_EXIT] = 1
        try:
            ioctl(self._fd, _RUN, 0)
        except InterruptedError:
            pass
        except OSError as error:
            raise BackendError(f"kvm: this state cannot run: {error.strerror}") from None
        self._run8[_IMMEDIATE_EXIT] = self._kicked

    def _rip(self) -> int:
        regs = abi.Regs()
        abi.call("KVM_GET_REGS", self._fd, abi.GET_REGS, regs)
        return int(regs.rip)


_registers: Callable[[abi.Regs], tuple[int, ...]] = attrgetter(*REGISTERS)


def probe() -> str:
    """Make a machine, and say how this host's KVM runs one. Raises BackendError."""
    with _scratch() as vcpu:
        khz, posts, cpus = vcpu.tsc_khz, vcpu.vm.ring is not None, abi.extension(vcpu.vm.fd, abi.CAP_MAX_VCPUS)
    return f"TSC at {khz / 1000:.0f} MHz, up to {cpus} CPUs in turns, posted port writes: {'yes' if posts else 'no'}"


@contextlib.contextmanager
def _scratch() -> Iterator[Vcpu]:
    """Context manager: a CPU that nobody will run, to ask the host with."""
    with contextlib.ExitStack() as undo:
        vm = Vm(Ram.fresh(PAGE))
        undo.callback(vm.close)
        vcpu = Vcpu(vm)
        undo.callback(vcpu.close)
        yield vcpu
