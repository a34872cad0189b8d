from musicbox import MusicBox

from anyhyve import check_device


def test_musicbox():
    check_device(MusicBox)
