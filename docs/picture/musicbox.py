"""A device with a bug, for the README's picture. Register: +0 the next note (read)."""

from anyhyve import Device, reads, state, u8

NOTES = bytes(100)


@state("musicbox", version=1)
class MusicBoxState:
    """A music box that is read note by note."""

    index: u8 = 0


class MusicBox(Device[MusicBoxState]):
    State = MusicBoxState

    @reads(0)
    def read_note(self) -> int:
        note = NOTES[self.state.index]
        self.state.index += 1
        return note
