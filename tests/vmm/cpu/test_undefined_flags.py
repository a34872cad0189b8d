"""The table of what is undefined, by byte encodings: each row is read off the SDM's page, not off the code."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmm.cpu.protocol import CpuState
from vmm.cpu.undefined_flags import (
    _BY_NAME,
    _X87_BY_NAME,
    AF,
    C0,
    C1,
    C2,
    C3,
    CF,
    OF,
    PF,
    SF,
    STATUS,
    ZF,
    Undefined,
    _decode,
    undefined,
)

# what depends on no operand: encoding, mode, flags
FIXED = [
    ("37", 32, OF | SF | ZF | PF),  # AAA
    ("3f", 16, OF | SF | ZF | PF),  # AAS
    ("d40a", 32, OF | AF | CF),  # AAM
    ("d50a", 16, OF | AF | CF),  # AAD
    ("27", 32, OF),  # DAA
    ("2f", 32, OF),  # DAS
    ("21d8", 64, AF),  # AND EAX, EBX
    ("f0480918", 64, AF),  # LOCK OR [RAX], RBX
    ("3401", 64, AF),  # XOR AL, 1
    ("85c0", 64, AF),  # TEST EAX, EAX
    ("f6c8ff", 64, AF),  # TEST AL, 0xFF by its undocumented /1
    ("f7e3", 64, SF | ZF | AF | PF),  # MUL EBX
    ("f7eb", 64, SF | ZF | AF | PF),  # IMUL EBX
    ("0fafc3", 64, SF | ZF | AF | PF),  # IMUL EAX, EBX
    ("6bc305", 64, SF | ZF | AF | PF),  # IMUL EAX, EBX, 5
    ("f7f3", 64, STATUS),  # DIV EBX
    ("f7fb", 16, STATUS),  # IDIV BX
    ("0fa3d8", 64, OF | SF | AF | PF),  # BT EAX, EBX
    ("f00fab18", 64, OF | SF | AF | PF),  # LOCK BTS [RAX], EBX
    ("0fb318", 32, OF | SF | AF | PF),  # BTR
    ("0fbaf805", 64, OF | SF | AF | PF),  # BTC EAX, 5
    ("0fbcc3", 64, STATUS & ~ZF),  # BSF EAX, EBX
    ("480fbd00", 64, STATUS & ~ZF),  # BSR RAX, [RAX]
    ("f30fbcc3", 64, STATUS),  # F3 BSF, or TZCNT
    ("f3480fbdc3", 64, STATUS),  # F3 BSR, or LZCNT
    ("c4e268f2c3", 64, AF | PF),  # ANDN
    ("c4e278f3db", 64, AF | PF),  # BLSI
    ("c4e278f3d3", 64, AF | PF),  # BLSMSK
    ("c4e278f3cb", 64, AF | PF),  # BLSR
    ("c4e278f5c3", 64, AF | PF),  # BZHI
    ("c4e278f7c3", 64, SF | AF | PF),  # BEXTR
    ("01d8", 64, 0),  # ADD
    ("ffc0", 64, 0),  # INC
    ("f7d8", 64, 0),  # NEG
    ("0fb0d8", 64, 0),  # CMPXCHG
    ("0fc708", 64, 0),  # CMPXCHG8B
    ("f30fb8c3", 64, 0),  # POPCNT
    ("0f2fc1", 64, 0),  # COMISS
    ("dbf1", 64, 0),  # FCOMI
    ("660f3a63c100", 64, 0),  # PCMPISTRI
    ("0fc8", 64, 0),  # BSWAP EAX
    ("90", 64, 0),
]


@pytest.mark.parametrize(("code", "mode", "flags"), FIXED)
def test_flags_without_a_count(code, mode, flags):
    assert undefined(bytes.fromhex(code), mode).flags == flags


def name_of(code: str, mode: int) -> str:
    found = _decode(bytes.fromhex(code), mode)
    assert found is not None, code
    return found.name


def test_every_row_has_an_encoding():
    tested = {name_of(code, mode) for code, mode, _ in FIXED}
    assert set(_BY_NAME) <= tested
    assert set(_X87_BY_NAME) <= {name_of(code, 64) for code, _ in X87}


def byte_shift(extension: int, count: int) -> Undefined:  # C0 /extension ib, on AL
    return undefined(bytes([0xC0, 0xC0 | extension << 3, count]), 64)


@pytest.mark.parametrize("extension", range(8))  # ROL ROR RCL RCR SHL SHR SAL SAR
@pytest.mark.parametrize("opcode", [0xC1, 0xD3, 0xD1])
def test_shift_by_immediate_by_cl_and_by_one(extension, opcode):
    modrm = bytes([opcode, 0xC0 | extension << 3])
    shifts = extension >= 4
    for count in range(256):
        masked = {0xD1: 1}.get(opcode, count & 31)
        code = modrm + (bytes([count]) if opcode == 0xC1 else b"\x90")
        want = (OF if masked > 1 else 0) | (AF if shifts and masked else 0)
        assert undefined(code, 64, rcx=0xFFFF_FF00 | count) == Undefined(flags=want)


def test_shift_by_the_operands_size_or_more():
    for extension in (4, 5, 6):  # SHL SHR SAL
        assert not byte_shift(extension, 7).flags & CF
        assert byte_shift(extension, 8).flags == CF | OF | AF
        assert byte_shift(extension, 31).flags == CF | OF | AF
        assert byte_shift(extension, 32).flags == 0  # masked to 0
    assert byte_shift(7, 31).flags == OF | AF  # SAR's CF is the sign
    assert undefined(bytes.fromhex("66d3e0"), 64, rcx=16).flags == CF | OF | AF
    assert undefined(bytes.fromhex("d3e0"), 16, rcx=16).flags == CF | OF | AF  # the default size is the mode's
    assert undefined(bytes.fromhex("66d3e0"), 16, rcx=16).flags == OF | AF
    assert undefined(bytes.fromhex("48d3e0"), 64, rcx=32).flags == OF | AF  # masked to 6 bits
    assert undefined(bytes.fromhex("48d3e0"), 64, rcx=64).flags == 0
    assert undefined(bytes.fromhex("d22f"), 64, rcx=9).flags == CF | OF | AF  # SHR byte [RDI], CL


@pytest.mark.parametrize("right", [0, 8])  # SHLD, SHRD
def test_double_shift(right):
    imm8, cl = bytes([0x66, 0x0F, 0xA4 | right, 0xC3]), bytes([0x66, 0x0F, 0xA5 | right, 0xC3])  # BX, AX
    for count, flags, bits in [
        (0, 0, 0),
        (1, AF, 0),
        (2, AF | OF, 0),
        (16, AF | OF, 0),
        (17, STATUS, 0xFFFF),
        (31, STATUS, 0xFFFF),
        (32, 0, 0),
    ]:
        want = Undefined(flags, 0, "rbx" if bits else None, bits)
        assert undefined(imm8 + bytes([count]), 64) == want
        assert undefined(cl, 64, rcx=count) == want
    assert undefined(bytes([0x66, 0x0F, 0xA5 | right, 0x03]), 64, rcx=20) == Undefined(STATUS, 0, "memory", 0xFFFF)
    assert undefined(bytes([0x48, 0x0F, 0xA5 | right, 0xC3]), 64, rcx=63).flags == AF | OF


def test_undefined_results():
    high = 0xFFFFFFFF << 32
    for code, zero, destination, bits in [
        ("660fc9", 0, "rcx", 0xFFFF),  # BSWAP CX
        ("66410fcd", 0, "r13", 0xFFFF),
        ("66480fc9", 0, None, 0),  # REX.W wins over 66
        ("450fbcc3", ZF, "r8", high),  # BSF R8D, R11D
        ("450fbcc3", 0, None, 0),
        ("490fbdc3", ZF, None, 0),  # BSR RAX, R11: unmodified
        ("0fbc10", ZF, "rdx", high),  # BSF EDX, [RAX]
        ("660fbc10", ZF, None, 0),
        ("f30fbc10", ZF, None, 0),  # F3 BSF or TZCNT: a difference is the CPU model's fault
    ]:
        found = undefined(bytes.fromhex(code), 64, rflags=2 | zero)
        assert (found.destination, found.bits) == (destination, bits), code
    assert undefined(bytes.fromhex("0fc9"), 16).bits == 0xFFFF


X87 = [
    ("d8d1", 0), ("d8d9", 0), ("ded9", 0), ("de10", 0), ("de18", 0), ("d9e4", 0),  # FCOM(P)(P) FICOM(P) FTST
    ("dde1", 0), ("dde9", 0), ("dae9", 0), ("d9e5", 0), ("d9f8", 0), ("d9f5", 0),  # FUCOM(P)(P) FXAM FPREM FPREM1
    ("d920", 0), ("dd20", 0), ("dbe3", 0), ("dd30", 0),  # FLDENV FRSTOR FNINIT FNSAVE
    ("d9ff", C0 | C1 | C3), ("d9fe", C0 | C1 | C3), ("d9fb", C0 | C1 | C3), ("d9f2", C0 | C1 | C3),  # FCOS FSIN ..
    ("ddc0", C0 | C1 | C2 | C3), ("dfc0", C0 | C1 | C2 | C3), ("d928", C0 | C1 | C2 | C3),  # FFREE FFREEP FLDCW
    ("dbe2", C0 | C1 | C2 | C3), ("d9d0", C0 | C1 | C2 | C3), ("d938", C0 | C1 | C2 | C3),  # FNCLEX FNOP FNSTCW
    ("d930", C0 | C1 | C2 | C3), ("dfe0", C0 | C1 | C2 | C3), ("9b", C0 | C1 | C2 | C3),  # FNSTENV FNSTSW WAIT
    ("d8c1", C0 | C2 | C3), ("d9c1", C0 | C2 | C3), ("dd18", C0 | C2 | C3), ("d9e8", C0 | C2 | C3),  # FADD FLD FSTP ..
    ("d9fa", C0 | C2 | C3), ("dbf1", C0 | C2 | C3), ("dac1", C0 | C2 | C3), ("db08", C0 | C2 | C3),  # FSQRT FCOMI ..
    ("0fae00", 0), ("0f77", 0), ("c5f9d8c1", 0),  # FXSAVE EMMS VPSUBUSB: not x87, whatever their bytes
]  # fmt: skip


@pytest.mark.parametrize(("code", "fsw"), X87)
def test_condition_codes(code, fsw):
    assert undefined(bytes.fromhex(code), 64) == Undefined(fsw=fsw)


@given(
    st.binary(max_size=20),
    st.sampled_from([16, 32, 64]),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)
@example(b"", 64, 0, 0)
@example(b"\x66" * 20, 64, 0, 0)
def test_any_bytes_have_an_answer(code, mode, rcx, rflags):
    found = undefined(code, mode, rcx, rflags)
    assert found.flags & ~STATUS == 0 and found.fsw & ~(C0 | C1 | C2 | C3) == 0
    assert (found.destination is None) == (found.bits == 0)
    assert found.destination in (None, "memory") or hasattr(CpuState(), found.destination)
    assert undefined(code[:15], mode, rcx, rflags) == found


@given(st.integers(0xC0, 0xFF), st.integers(0x40, 0x4F), st.sampled_from(["66", "f3", ""]))
def test_destinations_are_registers_of_the_cpu(modrm, rex, prefix):
    for opcode in ("0fbc", "0fa5"):
        code = bytes.fromhex(prefix) + bytes([rex]) + bytes.fromhex(opcode) + bytes([modrm])
        found = undefined(code, 64, rcx=31, rflags=ZF)
        number = modrm >> 3 & 7 | (rex & 4) << 1 if opcode == "0fbc" else modrm & 7 | (rex & 1) << 3
        names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
        assert found.destination in (None, names[number])


def test_undecodable_leaves_nothing_undefined():
    assert undefined(b"\x0f\xff", 16) == undefined(bytes.fromhex("d40a"), 64) == Undefined()  # AAM is #UD here
    assert undefined(b"\xd3", 64, rcx=2) == Undefined()  # cut off
