"""Two CPUs of one KVM machine in two threads, against the same two in turns in one: how much more they do together, by
how often a guest leaves. Each exit is answered in Python, as a machine's are. Needs /dev/kvm and two CPUs."""

from __future__ import annotations

import statistics
import threading
import time
from fcntl import ioctl

from kvmbackend import abi, state
from kvmbackend.cpu import KvmCpu
from kvmbackend.vm import Vcpu, Vm
from vmm.cli import show
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

WORK = (1, 100, 1_000, 10_000)  # times round a loop of two instructions between two exits
SECONDS, TURN, ROUNDS = 0.6, 0.002, 7


def code(work: int) -> bytes:
    """mov dx, 0x3fd; 1: mov ecx, work; 2: dec ecx; jnz 2b; in al, dx; jmp 1b"""
    return b"\x66\xba\xfd\x03\xb9" + work.to_bytes(4, "little") + b"\xff\xc9\x75\xfc\xec\xeb\xf4"


class Server:
    """Enters one CPU and answers its exits."""

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        self._fd, self._run8, self._run64 = vcpu.fd, vcpu.run, vcpu.run.cast("Q")
        self._port_in = machine.board.bus.port_in
        self.exits = 0

    def serve(self, until: float) -> None:
        while time.perf_counter() < until:
            ioctl(self._fd, abi.RUN, 0)
            self._run8[self._run64[abi.RUN_EXIT // 8 + 1]] = self._port_in(0x3FD, 1)
            self.exits += 1


def in_turns(servers: list[Server]) -> None:
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for server in servers:
            server.serve(time.perf_counter() + TURN)


def in_threads(servers: list[Server]) -> None:
    end = time.perf_counter() + SECONDS
    threads = [threading.Thread(target=server.serve, args=(end,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(work: int) -> tuple[float, float]:
    """Exits a second of both together in turns, and how many times as many in threads."""
    image = Image(code(work), flat=True)
    with Machine.boot(MachineConfig(memory_bytes=4 << 20), image, "kvm") as machine:
        assert isinstance(machine.cpu, KvmCpu)
        vm = Vm(machine.ram)
        vcpus = [Vcpu(vm, 0, 2), Vcpu(vm, 1, 2)]
        for vcpu in vcpus:
            state.load(vcpu.fd, machine.cpu.save())
        rows = []
        for _ in range(ROUNDS):
            counts = []
            for way in (in_turns, in_threads):
                servers = [Server(machine, vcpu) for vcpu in vcpus]
                way(servers)
                counts.append(sum(server.exits for server in servers))
            rows.append((counts[0] / SECONDS, counts[1] / counts[0]))
        del servers  # they hold the CPUs' pages
        for vcpu in reversed(vcpus):
            vcpu.close()
        vm.close()
    rate, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    return rate, ratio


def main() -> None:
    try:
        table = [(work, *measure(work)) for work in WORK]
    except BackendError as error:
        print(f"no figure for KVM: {error}")
        return
    show.table(
        ("loops between exits", "exits/s in turns", "times as many in threads"),
        [(f"{work:,}", f"{rate:,.0f}", f"{ratio:.2f}") for work, rate, ratio in table],
    )


if __name__ == "__main__":
    main()
