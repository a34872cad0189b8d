"""One instruction at a time, as another CPU has run it: what lockstep needs of KVM.

Plain instructions run under KVM's single-step, which is the guest's own TF. That fails where an exception, an interrupt
or a system call enters a handler: TF is off in there, and nobody stops it. The other CPU has been there,
so the handler's first instruction is known: a HLT stands there for a moment, and that leaves the guest on any host.
"""

from __future__ import annotations

from collections.abc import Callable
from fcntl import ioctl
from time import monotonic_ns

from kvmbackend import abi
from kvmbackend.alarm import Alarm
from kvmbackend.vm import Vcpu
from vmm.cpu import paging
from vmm.cpu.protocol import CpuState
from vmm.ram import Ram

_HLT, _TF = 0xF4, 1 << 8
_PATIENCE_NS = 20_000_000_000  # no instruction takes as long, on a busy computer that emulates this one neither


class Stepper:
    """`serve(reason)` does what a KVM exit asks for, I/O or an instruction KVM cannot run; `save` reads the state."""

    def __init__(
        self, vcpu: Vcpu, ram: Ram, alarm: Alarm, serve: Callable[[int], None], save: Callable[[], CpuState]
    ) -> None:
        self._vcpu, self._ram, self._alarm = vcpu, ram, alarm
        self._serve, self._save = serve, save
        self._run32 = vcpu.run.cast("I")
        self._stepping = False

    def interrupt(self, vector: int) -> None:
        """Take an interrupt, to the handler's first instruction."""
        entry = self._handler(self._save(), vector)
        ioctl(self._vcpu.fd, abi.INTERRUPT, vector.to_bytes(4, "little"))
        self.enter(entry)

    def enter(self, address: int) -> None:
        """Run on to `address`, the first instruction of a handler. Elsewhere it may end when it never comes there."""
        state = self._save()
        physical = paging.translate(state, self._ram.read, state.cs.base + address & (1 << 64) - 1)
        if physical is None:
            return
        place = self._ram.slice(physical, 1)
        kept, place[0] = place[0], _HLT
        self._single_step(False)
        try:
            if self._until(abi.EXIT_HLT):
                regs = abi.Regs()
                abi.call("KVM_GET_REGS", self._vcpu.fd, abi.GET_REGS, regs)
                if regs.rip == address + 1 & (1 << 64) - 1:
                    regs.rip = address
                    abi.call("KVM_SET_REGS", self._vcpu.fd, abi.SET_REGS, regs)
        finally:
            place[0] = kept

    def instruction(self, sysret: bool) -> bool:
        """Run the one at RIP. False when it was HLT."""
        self._single_step(True)
        if sysret:
            self._r11_tf(True)
        self._until(abi.EXIT_DEBUG)
        if sysret:
            self._r11_tf(False)
        return self._run32[abi.RUN_REASON // 4] != abi.EXIT_HLT

    def _handler(self, state: CpuState, vector: int) -> int:
        """Where the IDT sends a vector (SDM vol. 3, figures 6-2 and 6-8; 20.1.4 for real mode)."""
        size = 4 if not state.cr0 & 1 else 16 if state.efer & 0x400 else 8
        raw = paging.read_virtual(state, self._ram.read, state.idtr.base + size * vector, size)
        gate = int.from_bytes(raw, "little")
        if size == 4:
            return gate & 0xFFFF
        return gate & 0xFFFF | gate >> 32 & 0xFFFF0000 | gate >> 64 << 32 & (1 << 64) - 1

    def _until(self, wanted: int) -> bool:
        """Run until KVM exits for `wanted`. False when something else came first."""
        self._alarm.enter()
        self._alarm.set(_PATIENCE_NS)
        end = monotonic_ns() + _PATIENCE_NS
        stored = False
        try:
            while True:
                try:
                    ioctl(self._vcpu.fd, abi.RUN, 0)
                except InterruptedError:
                    if stored:
                        return True
                    self._alarm.quiet()
                    if monotonic_ns() >= end:
                        return False
                    continue  # a kick
                stored = self._come_back(False)
                reason = self._run32[abi.RUN_REASON // 4]
                if reason == wanted:
                    return True
                if reason in (abi.EXIT_HLT, abi.EXIT_SHUTDOWN, abi.EXIT_FAIL_ENTRY):
                    return False
                self._serve(reason)
                if reason == abi.EXIT_INTERNAL_ERROR and wanted == abi.EXIT_DEBUG:
                    return True  # the emulated CPU has run it
                if reason == abi.EXIT_MMIO and wanted == abi.EXIT_DEBUG and self._vcpu.run[abi.RUN_MMIO_WRITE]:
                    # Behind a store to a device KVM forgets the trap, and takes that of the next instruction. So the
                    # store is finished, of which there may be more pieces, and no more is run.
                    stored = self._come_back(True)
        finally:
            self._come_back(False)
            self._alarm.set(0)
            self._alarm.leave()

    def _come_back(self, at_once: bool) -> bool:
        """Have KVM finish what it exited for, and run no instruction, or let it run."""
        self._vcpu.run[abi.RUN_IMMEDIATE_EXIT] = at_once
        return at_once

    def _r11_tf(self, on: bool) -> None:
        """SYSRET takes RFLAGS, and with it TF, from R11: without it there the trap would not come."""
        regs = abi.Regs()
        abi.call("KVM_GET_REGS", self._vcpu.fd, abi.GET_REGS, regs)
        regs.r11 = regs.r11 & ~_TF | (_TF if on else 0)
        abi.call("KVM_SET_REGS", self._vcpu.fd, abi.SET_REGS, regs)

    def _single_step(self, on: bool) -> None:
        # Asked for anew each time: an instruction that loads RFLAGS takes TF away.
        if on or self._stepping:
            control = abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP if on else 0
            abi.call("KVM_SET_GUEST_DEBUG", self._vcpu.fd, abi.SET_GUEST_DEBUG, abi.GuestDebug(control=control))
            self._stepping = on

    def close(self) -> None:
        self._run32.release()
