"""What a guest's console shows when it will not come to where it was to go."""

from __future__ import annotations

_STAMP = r"^(?:<\d>)?(?:\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? )?"  # printk's level, time and caller

LOST = _STAMP + "(?:" + "|".join(
    (
        r"Kernel panic - not syncing: .*",
        r"kernel BUG at .*",
        r"BUG: .*",  # a page fault of the kernel's, a lock-up
        r"watchdog: BUG: .*",
        r".*: [0-9a-f]{4} \[#\d+\].*",  # Oops, general protection fault, invalid opcode, divide error
        r".*-- System halted",  # Linux's decompressor
        r"ALERT! .* does not exist\.  ?Dropping to a shell!",  # Debian's initial RAM disk
        r"panic: .*",  # the BSDs
        r"panic\[cpu\d+\].*",  # illumos
        r"Panic on CPU \d+:.*",  # Xen
        r"No bootable device.*",  # SeaBIOS
    )
) + ")"  # fmt: skip
